"""The op ``torch.ops.fastdrop.draw_named``: what a dropout of compiled code draws from in a named model.

`functional.plan` calls it in place of ``draw`` while a compiler looks at a call and models have names. Its result has a
fixed size, so the graph is the same for all steps, samples and processes: the seed, the step, and for each run of cells
six numbers, 0 in those that are not needed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from ...core.part import Run
from ..runtime import located, names, seeds, tracing
from ..runtime.dispatch import hide_from_dynamo
from ..runtime.dispatch.ops import innermost_map
from ..runtime.located import Located
from ..runtime.traced_names import NOT_TRACED
from .record import called_by_inductor, library

__all__ = ["BY_MODULE", "SAMPLES_FIRST", "WEIGHTS", "draw_named"]

BY_MODULE, SAMPLES_FIRST, WEIGHTS = 0, 1, 2  # where the data has samples: along the module's axis, axis 0, nowhere
SCHEMA = (
    "draw_named(Tensor like, SymInt[] shape, Tensor? after, bool[] shared, int axes, int place, Tensor? cells, "
    "str key, int order) -> Tensor"
)


def draw_named(x: Tensor, shape: Any, shared: Any, place: int, cells: Tensor | None) -> Tensor:
    """The seed of a dropout whose mask is for data of a shape, as ops take it. ``cells`` are those of a part."""
    axes = 1 if place == SAMPLES_FIRST else names.largest_axis + 1
    shares = [] if shared is None else [extent == 1 for extent in shared]
    options = axes, place, cells, NOT_TRACED, 0
    seed: Tensor = torch.ops.fastdrop.draw_named(x, shape, None, shares, *options)
    return seed if cells is None else seeds.with_cells(seed, cells)


def _size(shape: list[Any], axes: int, place: int, cells: Tensor | None) -> Any:
    """How many runs of cells the result has room for: one for each entry of the axes up to that of samples."""
    if cells is not None:
        return 0
    return 1 if place == WEIGHTS else math.prod(shape[:axes])


def _draw_named(like: Tensor, shape: list[int], after: Tensor | None, shared: list[bool], *options: Any) -> Tensor:
    axes, place, cells, key, order = options
    whole: tuple[int, ...] = tuple(shape)
    shares = tuple(1 if one else None for one in shared) if shared else None
    part = located.Weights(cells) if place == WEIGHTS else cells
    drawn = names.draw_traced(whole, shares, part, place == SAMPLES_FIRST, key, order)
    if drawn is None:
        drawn = Located(int(torch.ops.fastdrop.draw(like.new_empty(0, device="cpu"), []).item()))
    numbers = located.as_numbers(drawn._replace(runs=None))
    room = _size(shape, axes, place, cells)
    if cells is None:
        own = math.prod(1 if one == 1 else extent for one, extent in zip(shares or whole, whole, strict=True))
        runs = drawn.runs or (Run(0, 0, 1, 0, 1, 0, own),)
        numbers += located.numbers_of(runs)
        if len(runs) > room:
            raise RuntimeError(
                f"compiled dropout of shape {whole} has room for {room} runs of cells, but the samples and the layout "
                f"have {len(runs)}: give samples that are evenly spaced, or do not compile the model"
            )
    numbers += [0] * (2 + located.NUMBERS * room - len(numbers))
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _fake(like: Tensor, shape: Any, after: Any, shared: Any, *options: Any) -> Tensor:
    return torch.empty(2 + located.NUMBERS * _size(shape, *options[:3]), dtype=torch.int64, device="cpu")


def _batched(like: Tensor, shape: Any, after: Tensor | None, *options: Any) -> Tensor:
    """Under `vmap` all that is mapped has one mask."""
    around = innermost_map()
    if around.randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
            "randomness flags on vmap or perform the randomness operation out of vmap"
        )
    like, after = around.unwrap(like)[0], around.unwrap(after)[0]
    with around.below("FuncTorchVmapMode"):
        seed: Tensor = torch.ops.fastdrop.draw_named(like, shape, after, *options)
        return seed


library.define(SCHEMA, tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag))
library.impl("draw_named", _draw_named, "CompositeExplicitAutograd")
torch.library.register_fake("fastdrop::draw_named", called_by_inductor("draw_named", _fake), lib=library)
torch.library.register_torch_dispatch(
    "fastdrop::draw_named", ProxyTorchDispatchMode, tracing.named_in_order, lib=library
)
library.impl("draw_named", _batched, "FuncTorchVmapMode")
hide_from_dynamo(_draw_named, _batched)

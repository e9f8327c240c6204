"""The ops ``torch.ops.fastdrop.*``: what compilers, transforms and tracers see of dropout.

``draw`` takes a seed from torch's generator; ``forward`` and ``backward`` are functions of their arguments alone. Every
op has a fake kernel, ``vmap`` rules and, both ways, a gradient; backward is linear and its own adjoint. p may be a
float or, in the overloads named ``tensor``, a tensor without axes: one that changes from step to step then costs no
recompilation. Forward-mode AD is `functional.dropout`'s alone: `torch.library` drops an op's tangents without a word.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..mask import word_count
from ..stream import threshold_and_scale
from . import _kernels, _random

SEED_FROM_GENERATOR = "draw(Tensor like, SymInt[] size) -> Tensor"
FORWARD = "(Tensor x, Tensor seed, {p} p, SymInt[]? noise_shape, bool bits) -> (Tensor y, Tensor words)"
BACKWARD = "(Tensor dy, Tensor words, {p} p, SymInt[]? noise_shape) -> Tensor"
P_TYPES = {"": "float", ".tensor": "Tensor"}  # by overload

library = torch.library.Library("fastdrop", "DEF")


def threshold_scale(p: float | Tensor) -> tuple[int, float]:
    number = float(p)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {number}")
    return threshold_and_scale(number)


def _cells_shape(x: Tensor, noise_shape: Any) -> tuple[int, ...] | None:
    return None if noise_shape is None else _checks.noise_shape(tuple(noise_shape), tuple(x.shape))


def _checked_words(words: Tensor, cells: int) -> Tensor:
    """As kernels take them, who would read past the end of fewer."""
    if words.dtype != torch.int32 or words.shape != (word_count(cells),) or not words.is_cpu:
        raise ValueError(
            f"words must be {word_count(cells)} int32 on the CPU for {cells} cells, but got {words.dtype} of shape "
            f"{tuple(words.shape)} on {words.device}"
        )
    return words.contiguous()


# ---- CPU ----


def _draw(like: Tensor, size: list[int]) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device="cpu").random_()


def _forward(
    x: Tensor, seed: Tensor, p: float | Tensor, noise_shape: list[int] | None, bits: bool
) -> tuple[Tensor, Tensor]:
    cut, scale = threshold_scale(p)
    y, words = _kernels.forward(x, int(seed.item()) & _random.WRAP, cut, scale, _cells_shape(x, noise_shape), bits)
    return y, torch.empty(0, dtype=torch.int32) if words is None else words


def _backward(dy: Tensor, words: Tensor, p: float | Tensor, noise_shape: list[int] | None) -> Tensor:
    _, scale = threshold_scale(p)
    cells_shape = _cells_shape(dy, noise_shape)
    words = _checked_words(words, dy.numel() if cells_shape is None else math.prod(cells_shape))
    return _kernels.apply(dy, words, scale, cells_shape)


# ---- shapes alone ----


def _draw_fake(like: Tensor, size: list[int]) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device="cpu")


def _forward_fake(
    x: Tensor, seed: Tensor, p: float | Tensor, noise_shape: list[int] | None, bits: bool
) -> tuple[Tensor, Tensor]:
    _kernels.check_dtype(x)
    cells = x.numel() if noise_shape is None else math.prod(noise_shape)
    return torch.empty_like(x), x.new_empty(word_count(cells) if bits else 0, dtype=torch.int32)


def _backward_fake(dy: Tensor, words: Tensor, p: float | Tensor, noise_shape: list[int] | None) -> Tensor:
    return torch.empty_like(dy)


# ---- gradients ----


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, seed, p, noise_shape, bits = inputs
    ctx.save_for_backward(output[1] if bits else seed, p if isinstance(p, Tensor) else None)
    ctx.p, ctx.noise_shape, ctx.bits = None if isinstance(p, Tensor) else p, noise_shape, bits
    ctx.set_materialize_grads(False)


def _forward_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None, None, None
    kept, p = ctx.saved_tensors
    p = ctx.p if p is None else p
    if ctx.bits:
        dx = torch.ops.fastdrop.backward(dy, kept, p, ctx.noise_shape)
    else:
        dx = torch.ops.fastdrop.forward(dy, kept, p, ctx.noise_shape, False)[0]
    return dx, None, None, None, None


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, words, p, noise_shape = inputs
    ctx.save_for_backward(words, p if isinstance(p, Tensor) else None)
    ctx.p, ctx.noise_shape = None if isinstance(p, Tensor) else p, noise_shape


def _backward_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    words, p = ctx.saved_tensors
    return torch.ops.fastdrop.backward(ddx, words, ctx.p if p is None else p, ctx.noise_shape), None, None, None


# ---- vmap ----


def _draw_vmap(info: Any, in_dims: tuple[Any, ...], like: Tensor, size: list[int]) -> tuple[Tensor, int | None]:
    if info.randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
            "randomness flags on vmap or perform the randomness operation out of vmap"
        )
    if info.randomness == "same":
        return torch.ops.fastdrop.draw(like, size), None
    return torch.ops.fastdrop.draw(like, [info.batch_size, *size]), 0


def _forward_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    seed: Tensor,
    p: float | Tensor,
    noise_shape: list[int] | None,
    bits: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    op = torch.ops.fastdrop.forward
    _no_batch(in_dims[2], p)
    if in_dims[1] is None:  # one seed: all samples under the same mask
        x = x.movedim(in_dims[0], 0)
        return op(x, seed, p, [1, *(x.shape[1:] if noise_shape is None else noise_shape)], bits), (0, None)
    seeds = seed.movedim(in_dims[1], 0)
    samples = _samples(x, in_dims[0], info.batch_size)
    results = [op(x_, seed_, p, noise_shape, bits) for x_, seed_ in zip(samples, seeds.unbind(), strict=True)]
    if not results:
        y, words = op(_sample_like(x, in_dims[0]), torch.zeros((), dtype=torch.int64), p, noise_shape, bits)
        return (y.new_empty((0, *y.shape)), words.new_empty((0, *words.shape))), (0, 0)
    return (torch.stack([y for y, _ in results]), torch.stack([words for _, words in results])), (0, 0)


def _backward_vmap(
    info: Any, in_dims: tuple[Any, ...], dy: Tensor, words: Tensor, p: float | Tensor, noise_shape: list[int] | None
) -> tuple[Tensor, int]:
    op = torch.ops.fastdrop.backward
    _no_batch(in_dims[2], p)
    if in_dims[1] is None:
        dy = dy.movedim(in_dims[0], 0)
        return op(dy, words, p, [1, *(dy.shape[1:] if noise_shape is None else noise_shape)]), 0
    masks = words.movedim(in_dims[1], 0).unbind()
    samples = _samples(dy, in_dims[0], info.batch_size)
    if not samples:
        return dy.new_empty((0, *_sample_like(dy, in_dims[0]).shape)), 0
    return torch.stack([op(dy_, mask, p, noise_shape) for dy_, mask in zip(samples, masks, strict=True)]), 0


def _samples(x: Tensor, batch_axis: int | None, count: int) -> list[Tensor]:
    return [x] * count if batch_axis is None else list(x.movedim(batch_axis, 0).unbind())


def _sample_like(x: Tensor, batch_axis: int | None) -> Tensor:
    """A sample's shape, where there is none."""
    return x if batch_axis is None else x.new_empty(x.movedim(batch_axis, 0).shape[1:])


def _no_batch(batch_axis: int | None, p: float | Tensor) -> None:
    if isinstance(p, Tensor) and batch_axis is not None:
        raise ValueError("vmap over p, the dropout probability, is not supported: p must be one number for all samples")


# ---- registration ----

library.define(SEED_FROM_GENERATOR, tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag))
library.impl("draw", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("fastdrop::draw", _draw_fake, lib=library)
torch.library.register_vmap("fastdrop::draw", _draw_vmap, lib=library)

for _overload, _type in P_TYPES.items():
    for _name, _schema, _kernel, _fake, _setup, _gradient, _vmap in (
        ("forward", FORWARD, _forward, _forward_fake, _forward_setup, _forward_backward, _forward_vmap),
        ("backward", BACKWARD, _backward, _backward_fake, _backward_setup, _backward_backward, _backward_vmap),
    ):
        _op = f"{_name}{_overload}"
        library.define(_op + _schema.format(p=_type), tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(_op, _kernel, "CPU")
        torch.library.register_fake(f"fastdrop::{_op}", _fake, lib=library)
        torch.library.register_autograd(f"fastdrop::{_op}", _gradient, setup_context=_setup, lib=library)
        torch.library.register_vmap(f"fastdrop::{_op}", _vmap, lib=library)

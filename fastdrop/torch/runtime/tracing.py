"""Keeps the draws of seeds in their order in compiled programs.

A draw takes the next number of torch's generator. Compilers merge calls with equal arguments, reorder calls, and run
them again in backward. None of this may happen to a draw. So each traced draw has the draw before it as an argument,
``after``: no two draws have equal arguments then, and data flows from each to the next. The result, 8 bytes, is marked
as one to keep for backward.

`ops.mask` registers `in_order` with the mode by which ``make_fx`` and AOTAutograd trace. So it holds for draws of our
functions and modules, and of torch's own dropout while that is enabled. `torch.jit.trace` has no such mode, so `draw`
adds the argument there.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils.checkpoint import CheckpointPolicy

from . import traced_names
from .dispatch.compilers import memory_budget, runs_again_in_backward
from .dispatch.tensors import jit_trace

# None before torch 2.13
MEMORY_BUDGET_ANNOTATION_KEY = getattr(torch.fx.traceback, "MEMORY_BUDGET_ANNOTATION_KEY", None)

# With a budget of 0 the partitioner keeps nothing at all, not even what it was told to keep. With this one it keeps
# just that.
LEAST_BUDGET = 1e-9

_last: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()  # the last draw of each graph, by tracer
_last_jit: dict[Any, Tensor] = {}  # the last draw of the newest trace, by its state, which weak references don't hold


def draw(x: Tensor) -> Tensor:
    """The next seed for x, by the op."""
    state = jit_trace()
    if state is None:
        seed: Tensor = torch.ops.fastdrop.draw(x, [])
        return seed
    seed = torch.ops.fastdrop.draw(x, [], _last_jit.get(state))
    _last_jit.clear()
    _last_jit[state] = seed
    return seed


def is_recorded() -> bool:
    """Whether `torch.jit.trace` or ``make_fx`` records the calls, so that a number of the host becomes a constant."""
    return jit_trace() is not None or get_proxy_mode() is not None


def in_order(mode: Any, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    """Traces ``draw(like, size)`` as ``draw(like, size, after)``, whose result is kept for backward."""
    like, size, *given = args
    after = given[0] if given else None
    if after is None:
        after = _last.get(mode.tracer)
    seed = mode.__torch_dispatch__(op, types, (like, size, after, *given[1:]), kwargs)
    traced = get_proxy_slot(seed, mode.tracer, None) if isinstance(seed, Tensor) else None
    if traced is not None:
        _last[mode.tracer] = seed
        _keep(traced.proxy.node.meta)
        if runs_again_in_backward(sys._getframe()):
            raise RuntimeError(
                "dropout in a branch of torch.cond, in a loop or, with a memory budget, in a region that is "
                "compiled once would be drawn anew in backward: give the dropout a seed"
            )
    return seed


def named_in_order(mode: Any, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
    """`in_order` for ``draw_named``, which also gets the key of the module that it comes from."""
    *options, key, order = args
    if key == traced_names.NOT_TRACED:
        key, order = traced_names.key_of_draw(mode.tracer)
    seed = in_order(mode, op, types, (*options, key, order), kwargs)
    traced = get_proxy_slot(seed, mode.tracer, None) if isinstance(seed, Tensor) else None
    if traced is not None:
        traced.proxy.node.meta = _Saved(traced.proxy.node.meta)
    return seed


class _Saved(dict[str, Any]):
    """The meta of a node whose result backward must get from forward, also in a checkpoint.

    A checkpoint marks all nodes in it as ones to compute again, after they were traced. Random operators are then run
    again from the generator's state, but the pass that a name belongs to has ended in backward.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "recompute":
            super().__setitem__(key, value)


def _keep(meta: dict[str, Any]) -> None:
    """Has the partitioner keep a node's result, because a second draw in backward would give another."""
    meta["recompute"] = CheckpointPolicy.MUST_SAVE
    if memory_budget() == 0:
        meta["memory_budget"] = LEAST_BUDGET
    if meta.get("custom", {}).get(MEMORY_BUDGET_ANNOTATION_KEY) == 0:  # which overrides that for the whole graph
        raise RuntimeError(
            "region_activation_memory_budget(0) would draw dropout's mask anew in backward: give a budget above 0, "
            f"such as {LEAST_BUDGET}, or the dropout a seed"
        )

"""Two of the three kinds of dropout that all functions and modules are made of: `drop` and `gaussian`. `blocks` has the
third.

Each takes its way from `plan_call`. Eager dense tensors go to the kernel, and if a gradient is wanted through an
autograd function that calls the kernel at once. Everybody else gets the ops of `ops.mask`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import checks, variants
from ...core.random import DROP_ALL
from ...core.random import threshold as threshold_of
from ..ops import mask as mask_ops
from ..runtime import dtypes, mask_kernels, nested, seeds
from ..runtime.dispatch import can_call_kernel
from ..runtime.dispatch.ops import fast_apply
from ..runtime.dispatch.tensors import jit_trace
from ..runtime.dtypes import DTYPES
from . import onnx, sharded
from .plan import (
    KEEPS_ALL,
    KERNEL,
    MASK_OPS,
    ONNX,
    Source,
    check_one,
    check_tensor,
    check_unused_seed,
    is_p_differentiated,
    plan_call,
    refuse_part_of_nested,
    seed_for_kernel,
    seed_for_ops,
)

__all__ = ["drop", "gaussian"]

_is_compiling = torch.compiler.is_compiling


def drop(
    x: Tensor, p: float | Tensor, training: bool, inplace: bool, source: Source, shared: Any, store: str, scaling: str
) -> Tensor:
    """Everything that keeps or drops. ``source`` is the generator, the seed and the part. ``shared`` says along which
    axes elements share decisions; None: along none. ``scaling`` is one of `variants.affine`."""
    if type(x) is not Tensor:
        check_tensor(x)
        if sharded.is_dtensor(x) and training and not (type(p) in (float, int) and p <= KEEPS_ALL):
            own = None if shared is None else tuple(1 if extent == 1 else None for extent in shared)
            p = sharded.number(p)

            def dropped(local: Tensor, part: Any) -> Tensor:
                return drop(local, p, True, False, (*source[:2], part), own, store, scaling)

            return sharded.drop_shard(x, source[2], inplace, dropped)
    way, p, drops = plan_call(x, p, training)
    if store != "bits":
        checks.choice("store", store, checks.STORES)
    if not drops:
        check_unused_seed(source)
        return _evaluated(x, p, inplace) if scaling == "standard" and not training else x
    if way != KERNEL:
        return _drop_by_ops(x, p, way, inplace, source, shared, store, scaling)
    if x.dtype not in DTYPES:
        dtypes.check_dtype(x)
    if scaling == "alpha":
        dtypes.check_real(x, "alpha dropout")
    cells = None if shared is None else _full_extents(shared, x)
    seed = seed_for_kernel(x, source, inplace, None, shared)
    threshold = threshold_of(p)  # type: ignore[arg-type]
    affine = variants.affine(scaling, threshold)
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _apply_dropout(x, inplace, (seed, threshold, affine, cells, store == "bits", p, scaling))
        return result
    if inplace:
        torch.autograd.graph.increment_version(x)
    return mask_kernels.forward(x, seed, threshold, affine, cells, False, inplace)[0]


class Dropout(torch.autograd.Function):
    """Dropout of eager dense tensors. It is in the old style, which costs a quarter of ``setup_context``'s.

    The record of ``forward`` would make the same function, but this one computes threshold and affine once for both
    passes. For a small tensor that is a tenth of the call.

    torch's profiler, if it records shapes, raises for an argument that is an int of 2**63 or more, as seeds may be. It
    does not look into ``drawn``, because that holds a text.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool, drawn: tuple[Any, ...]) -> Tensor:
        seed, threshold, affine, cells, store_bits, _, _ = drawn
        ctx.drawn = drawn[1:]
        y, words = mask_kernels.forward(x, seed, threshold, affine, cells, store_bits, inplace)
        ctx.save_for_backward(seeds.as_tensor(seed) if words is None else words)
        if inplace:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (saved_mask,) = ctx.saved_tensors
        threshold, (a, _, _), cells, store_bits, p, scaling = ctx.drawn
        if not can_call_kernel(dy):
            return mask_ops.masked(dy, saved_mask, p, cells, store_bits, scaling), None, None
        if store_bits:
            return mask_kernels.apply(dy, saved_mask, (a, 0.0, 0.0), cells), None, None
        seed = seeds.for_kernel(saved_mask, dy)
        dx, _ = mask_kernels.forward(dy, seed, threshold, (a, 0.0, 0.0), cells, False)
        return dx, None, None


_apply_dropout = fast_apply(Dropout)


def _drop_by_ops(
    x: Tensor, p: Any, way: str, inplace: bool, source: Source, shared: Any, store: str, scaling: str
) -> Tensor:
    """`drop` for all but eager dense tensors. Compilers look into this function: it does as little as it can.

    Nested tensors come here too. `drop` is called on their values, and takes its own way.
    """
    if not _is_compiling():
        dtypes.check_dtype(x)
        if scaling == "alpha":
            dtypes.check_real(x, "alpha dropout")
    if x.is_nested:

        def dropped(values: Tensor, cells: Any) -> Tensor:
            return drop(values, p, True, False, source, cells, store, scaling)

        refuse_part_of_nested(source)
        y = nested.drop(x, shared, scaling, dropped)
        return nested.write(x, y) if inplace else y
    nested.check_dense(x)
    cells = None if shared is None else _full_extents(shared, x)
    if way == ONNX:
        y = onnx.drop(x, p, source, cells, scaling)
    else:
        y = drop_by_op(x, p, seed_for_ops(x, source, None, shared), cells, store == "bits", scaling)
    return x.copy_(y) if inplace else y


def drop_by_op(x: Tensor, p: Any, seed: Any, cells: Any, store_bits: bool, scaling: str) -> Tensor:
    y: Tensor = mask_ops.FORWARD(mask_ops.Forward(x, seed, p, cells, store_bits, scaling))[0]
    return y


def _full_extents(shared: Any, x: Tensor) -> Any:
    """The mask's shape as ops take it, or None if each element has its own cell."""
    if len(shared) != x.dim():
        raise ValueError("noise_shape must have one entry per axis of x")
    cells = [x.shape[i] if extent is None else extent for i, extent in enumerate(shared)]
    if _is_compiling():
        return cells
    return None if cells == list(x.shape) else _numbers(tuple(cells))


def _numbers(cells: Any) -> Any:
    """Extents as numbers, because those of a tensor's shape are tensors in `torch.jit.trace`."""
    return cells if jit_trace() is None else [int(extent) for extent in cells]


def _evaluated(x: Tensor, p: Any, inplace: bool) -> Tensor:
    """Standard scaling outside of training: x times the probability that an element would have been kept."""
    threshold = torch.round(p.double() * DROP_ALL) if isinstance(p, Tensor) else threshold_of(p)
    known = not isinstance(p, Tensor)
    if known and not _is_compiling() and threshold == 0:
        return x
    dtypes.check_dtype(x)
    if x.is_nested:
        y: Tensor = nested.on_values(lambda values: _evaluated(values, p, False), x)
        return nested.write(x, y) if inplace else y
    scale = 1.0 - threshold / DROP_ALL
    if known and scale == 0.0:  # infinities and NaNs become 0 too
        everywhere = x.new_ones((), dtype=torch.bool)
        return x.masked_fill_(everywhere, 0.0) if inplace else x.masked_fill(everywhere, 0.0)
    return x.mul_(scale) if inplace else (x * scale).to(x.dtype)  # a tensor scale gives x without axes its own dtype


def gaussian(x: Tensor, p: float | Tensor, training: bool, inplace: bool, source: Source) -> Tensor:
    check_tensor(x)
    if is_p_differentiated(p):
        check_one(p)
        way, drops = MASK_OPS, training
    else:
        way, p, drops = plan_call(x, p, training, least=0.0)
    if not isinstance(p, Tensor) and not _is_compiling():
        p = checks.gaussian_probability(p)
    if not drops:
        check_unused_seed(source)
        return x
    if not _is_compiling():
        dtypes.check_real(x, "Gaussian dropout")
    y: Tensor
    if x.is_nested:
        refuse_part_of_nested(source)
        y = nested.on_values(lambda values: gaussian(values, p, True, False, source), x)
        return nested.write(x, y) if inplace else y
    if way == KERNEL:
        call = mask_ops.Gaussian(x, seed_for_kernel(x, source, inplace), p)
        y = mask_ops.GAUSSIAN.call_kernel(call, x.requires_grad and torch.is_grad_enabled(), inplace)
        return y
    nested.check_dense(x)
    if onnx.is_exported():
        onnx.refuse("Gaussian noise")
    y = mask_ops.GAUSSIAN(mask_ops.Gaussian(x, seed_for_ops(x, source), p))
    return x.copy_(y) if inplace else y

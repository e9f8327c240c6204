"""The fused primitives as the rest of `fastdrop.torch` calls them: tensors in, tensors out.

`ops.pointwise`, `ops.norm`, `ops.softmax` and `ops.attention` call this module once they know that tensors are eager
and dense. Data is ``[..., columns]`` of one dtype, and the residual has the same dtype or float32. ``input_bias``,
``weight`` and ``norm_bias`` are ``[columns]``, and an added mask broadcasts to the scores. These may have any float
dtype, and their gradients come in the dtype that kernels compute in: float64 for float64, otherwise float32.

There is no autograd here and no generator. The only checks are those without which a kernel would read past the end of
its arguments, because ops are called by hand and hooks may change saved tensors. Strides may be any. Results of
pointwise functions have the strides that torch gives to an element-wise op on the same tensors, and so have softmax's
results and all gradients. Results of norms, and tensors saved for backward, are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...backends import c as native
from ...core import variants
from ...core.mask import word_count
from ...core.random import DROP_ALL, keep_scale
from . import cuda, mask_kernels, memory
from .dispatch import hide_from_dynamo, read_address
from .dtypes import TAGS, computed
from .located import Located
from .memory import like_elementwise, new_like, new_words

Maybe = Tensor | None
DrawSpec = tuple[int, int, int]  # seed, offset, threshold


class Mask(NamedTuple):
    """What drops: packed words, and the scale of kept elements. No words mean that nothing is dropped.

    With ``draw``, the words are still to be written: a forward kernel draws them while it reads its data.
    """

    words: Maybe
    scale: float
    draw: DrawSpec | None = None


NO_MASK = Mask(None, 1.0)


def mask_to_draw(x: Tensor, seed: Any, threshold: int) -> Mask:
    """A mask of x for a forward function below: drawn, or for the C backend to be drawn by the kernel."""
    n, offset, drawn = x.numel(), 0, seed
    if type(seed) is Located and seed.runs is None:
        seed, offset, _ = seed
    if type(seed) is int and not x.is_cuda and 0 < threshold < DROP_ALL and n and backends.draws():
        return Mask(new_words(word_count(n)), keep_scale(threshold), (seed, offset, threshold))
    return Mask(mask_kernels.draw_mask(x, n, drawn, threshold), keep_scale(threshold))


def pointwise_forward(
    x: Tensor, input_bias: Maybe, multiplier: Maybe, residual: Maybe, mask: Mask, activation: int, signs: bool
) -> tuple[Tensor, Maybe]:
    """y and, if ``signs``, the bits of elements that are kept and positive. Only a relu may ask for these."""
    n, given = x.numel(), layout_of_sum(x, residual)
    x, copied = _in_order(x)
    stream = x if residual is None else _stream("residual", residual, x)
    y = x if copied and x.dtype is stream.dtype else new_like(stream, n)
    positive = x.new_empty(word_count(n), dtype=torch.int32) if signs else None
    if n:
        residual = None if residual is None else stream
        input_bias, multiplier = _vector("input_bias", input_bias, x), _same("multiplier", multiplier, x)
        arrays = x, input_bias, multiplier, residual, _checked(mask.words, x), y, positive
        tags, options = (TAGS[x.dtype], TAGS[y.dtype]), (mask.scale, activation)
        run("pointwise_forward", *tags, *arrays, *_extents(x), *options, draw=mask.draw)
    return _laid_out(y, given), positive


def pointwise_backward(
    dy: Tensor,
    x: Maybe,
    input_bias: Maybe,
    multiplier: Maybe,
    mask: Mask,
    activation: int,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Maybe, Maybe]:
    """dx, and dinput_bias and dmultiplier if wanted. ``dtype`` is x's. x is None if the gradient needs no data."""
    wants_bias, wants_multiplier = wanted
    if dy.dtype is not dtype:
        _check_dtypes("dy", dy.dtype, dtype)
    if (activation or wants_multiplier) and x is None:
        raise ValueError("x must be a tensor for an activation's and for multiplier's gradient, but got None")
    if wants_multiplier and multiplier is None:
        raise ValueError("multiplier must be a tensor for its gradient, but got None")
    given, dy, (rows, columns) = dy, dy.contiguous(), _extents(dy)
    dx = new_like(dy, dy.numel()) if dy.dtype is dtype else torch.empty_like(dy, dtype=dtype)
    dmultiplier = torch.empty_like(dx) if wants_multiplier else None
    panels = variants.panels(rows)
    sums = dy.new_empty((panels, columns), dtype=computed(dtype)) if wants_bias else None
    if dy.numel():
        x, multiplier = _same("x", x, dx), _same("multiplier", multiplier, dx)
        inputs = dy, x, _vector("input_bias", input_bias, dx), multiplier, _checked(mask.words, dx)
        tags, outputs = (TAGS[dtype], TAGS[dy.dtype]), (dx, dmultiplier, sums)
        run("pointwise_backward", *tags, *inputs, *outputs, rows, columns, panels, mask.scale, activation)
    dmultiplier = None if dmultiplier is None else _laid_out(dmultiplier, given)
    return _laid_out(dx, given), _total(sums, dy), dmultiplier


def norm_forward(
    x: Tensor,
    input_bias: Maybe,
    residual: Maybe,
    weight: Maybe,
    norm_bias: Maybe,
    mask: Mask,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the new residual whose norm y is, and ``statistics[rows, 2]``."""
    x, (rows, columns) = x.contiguous(), _extents(x)
    stream = x if residual is None else _stream("residual", residual, x)
    y, residual_out = new_like(x, x.numel()), new_like(stream, x.numel())
    statistics = x.new_empty((rows, 2), dtype=computed(x.dtype))
    if x.numel():
        residual = None if residual is None else stream
        inputs = x, _vector("input_bias", input_bias, x), residual, _checked(mask.words, x)
        vectors = _vector("weight", weight, x), _vector("norm_bias", norm_bias, x)
        tags, outputs = (TAGS[x.dtype], TAGS[residual_out.dtype]), (y, residual_out, statistics)
        options = mask.scale, eps, int(centred)
        run("norm_forward", *tags, *inputs, *vectors, *outputs, rows, columns, *options, draw=mask.draw)
    else:
        statistics.zero_()
    return y, residual_out, statistics


def norm_backward(
    dy: Tensor,
    dresidual_out: Maybe,
    residual_out: Tensor,
    statistics: Tensor,
    weight: Maybe,
    mask: Mask,
    centred: bool,
    wanted: Sequence[bool],
) -> tuple[Maybe, ...]:
    """dx, dinput_bias, dresidual, dweight and dnorm_bias, of those that are wanted.

    dx and dresidual are one tensor if nothing was dropped and both have one dtype, because they are equal then.
    """
    residual_out, dtype = _stream("residual_out", residual_out, dy), dy.dtype
    dy, (rows, columns) = dy.contiguous(), _extents(dy)
    wants_x, wants_input_bias, wants_residual, wants_weight, wants_norm_bias = wanted
    alike = mask.words is None and mask.scale == 1.0 and dtype is residual_out.dtype
    dresidual = new_like(residual_out.contiguous(), residual_out.numel()) if wants_residual else None
    # The kernel must write at least one of the two.
    dx = new_like(dy, dy.numel()) if not wants_residual or (wants_x and not alike) else None
    panels, wants_sums = variants.panels(rows), (wants_weight, wants_norm_bias, wants_input_bias)
    sums = dy.new_empty((panels, 3, columns), dtype=computed(dtype)) if any(wants_sums) else None
    if dy.numel():
        dresidual_out = _same("dresidual_out", dresidual_out, dy, residual_out.dtype)
        statistics = check("statistics", statistics, (rows, 2), computed(dtype), dy)
        inputs = dy, dresidual_out, residual_out, statistics, _vector("weight", weight, dy), _checked(mask.words, dy)
        tags, outputs = (TAGS[dtype], TAGS[residual_out.dtype]), (dx, dresidual, sums)
        run("norm_backward", *tags, *inputs, *outputs, rows, columns, panels, mask.scale, int(centred))
    totals = [_total(sums[:, i], dy) if sums is not None and wants else None for i, wants in enumerate(wants_sums)]
    dweight, dnorm_bias, dinput_bias = totals
    return (dresidual if dx is None else dx) if wants_x else None, dinput_bias, dresidual, dweight, dnorm_bias


class AddedMask(NamedTuple):
    """What is added to the scores, as softmax kernels take it.

    ``memory`` holds a row's keys side by side. ``strides`` are those of the axes before the heads, the heads and the
    queries.
    """

    memory: Maybe
    heads: int
    queries: int
    strides: tuple[int, int, int]


def softmax_forward(
    scores: Tensor, attn_mask: Maybe, mask: Mask, scale: float, causal: bool, keep: bool
) -> tuple[Tensor, Maybe]:
    """y and, if ``keep``, the probabilities before dropout. Scores are ``[..., queries, keys]``."""
    given, n = scores, scores.numel()
    scores, copied = _in_order(scores)
    y = scores if copied else new_like(scores, n)
    probabilities = new_like(scores, n) if keep else None
    if n:
        mask = mask._replace(words=_checked(mask.words, scores))
        added = added_mask(attn_mask, scores)
        arrays = scores, added.memory, mask.words, probabilities, y
        sizes = *_extents(scores), added.heads, added.queries, *added.strides
        run("softmax_forward", TAGS[y.dtype], *arrays, *sizes, scale, mask.scale, int(causal), draw=mask.draw)
    return _laid_out(y, given), probabilities


def softmax_backward(dy: Tensor, probabilities: Tensor, mask: Mask, scale: float) -> Tensor:
    """The scores' gradient."""
    given = dy
    dy, copied = _in_order(dy)
    dx = dy if copied else new_like(dy, dy.numel())
    if dy.numel():
        probabilities = check("probabilities", probabilities, dy.shape, dy.dtype, dy)
        arrays = dy, probabilities, _checked(mask.words, dy), dx, None
        run("softmax_backward", TAGS[dy.dtype], *arrays, *_extents(dy), scale, mask.scale)
    return _laid_out(dx, given)


# ---- memory ----


def _in_order(x: Tensor) -> tuple[Tensor, bool]:
    """x in logical order, and whether that is a copy. A result may be written over a copy."""
    ordered = x.contiguous()
    return ordered, ordered is not x


def layout_of_sum(x: Tensor, residual: Tensor | None) -> Tensor:
    """The tensor whose strides torch gives to ``residual + x``: the residual, unless that was expanded."""
    if residual is None:
        return x
    if residual.is_contiguous():
        return residual
    # A stride that a compiler knows as a symbol is not 0.
    strides = zip(residual.shape, residual.stride(), strict=True)
    expanded = any(isinstance(stride, int) and stride == 0 and extent != 1 for extent, stride in strides)
    return x if expanded else residual


def _laid_out(y: Tensor, given: Tensor) -> Tensor:
    """y, which is contiguous, with the strides that torch gives the result of an element-wise op on ``given``."""
    return y if given.is_contiguous() else like_elementwise(y, given)


def run(primitive: str, *arguments: Any, draw: DrawSpec | None = None) -> None:
    """Calls a primitive on the device of its first tensor. Its arrays are tensors or None."""
    if next(x for x in arguments if isinstance(x, Tensor)).is_cuda:
        cuda.run(primitive, *arguments)
        return
    backend = backends.active()
    if draw is not None or backend is native:
        at = [read_address(x) if isinstance(x, Tensor) else x or 0 for x in arguments]  # results are new memory
        kernel = getattr(native, f"{primitive}_at" if draw is None else f"{primitive}_drawn_at")
        if status := kernel(torch.get_num_threads(), *(draw or ()), *at):
            raise memory.kernel_error(status)
    else:
        arrays = [_array(x) if isinstance(x, Tensor) else x for x in arguments]
        memory.call_with_threads(backend, getattr(backend, primitive), *arrays)


def _array(x: Tensor) -> Any:
    return memory.mask_words(x) if x.dtype is torch.int32 else memory.read_array(x)


def _extents(x: Tensor) -> tuple[int, int]:
    """Rows and columns. A tensor without axes has one of each."""
    return math.prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1


def _vector(name: str, x: Tensor | None, data: Tensor) -> Tensor | None:
    """A vector of columns in the dtype that kernels for this data compute in."""
    if x is None:
        return None
    wide = computed(data.dtype)
    return check(name, x if x.dtype is wide else _as(name, x, wide), data.shape[-1:], wide, data)


def _as(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype not in TAGS:
        raise TypeError(f"{name} must be of a float dtype, but got {x.dtype}")
    return x.to(dtype)


def _same(name: str, x: Tensor | None, data: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """x, which must have the data's shape, and its dtype unless another is given."""
    return None if x is None else check(name, x, data.shape, dtype or data.dtype, data)


def _stream(name: str, x: Tensor, data: Tensor) -> Tensor:
    """x, a residual, which must have the data's shape and a dtype that goes with the data's."""
    if x.dtype is not data.dtype:
        _check_dtypes(name, x.dtype, data.dtype)
    return check(name, x, data.shape, x.dtype, data)


def _check_dtypes(name: str, stream: torch.dtype, dtype: torch.dtype) -> None:
    """Raises unless a residual's dtype is the data's, or float32 beside 16-bit data. Kernels know no other pairs."""
    if dtype not in TAGS:
        raise ValueError(f"dtype must be float32, float64, float16 or bfloat16, but got {dtype}")
    if stream is not dtype and (stream is not torch.float32 or dtype is torch.float64):
        raise ValueError(f"{name} must be {dtype}, or float32 beside 16-bit data, but got {stream}")


def check(name: str, x: Tensor, shape: Any, dtype: torch.dtype, data: Tensor) -> Tensor:
    """x in C order. Raises if it is not what it must be, because a kernel would read past the end of less."""
    if x.shape != shape or x.dtype is not dtype or x.device != data.device:
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(shape)} on {data.device}, but got {x.dtype} of shape "
            f"{tuple(x.shape)} on {x.device}"
        )
    return x.contiguous()


def _checked(words: Tensor | None, data: Tensor) -> Tensor | None:
    return None if words is None else memory.check_words(words, data.numel(), data.device)


def _total(sums: Tensor | None, data: Tensor) -> Tensor | None:
    """The sum over all panels. It has its own memory, because a gradient lives longer than the panels should."""
    if sums is None:
        return None
    return (sums[0].clone() if data.numel() else sums.new_zeros(sums.shape[1:])).view(data.shape[-1:])


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask of bool adds to scores. Axes along which it was expanded keep one element."""
    mask = unexpanded(mask)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask.logical_not(), -math.inf)


def unexpanded(mask: Tensor) -> Tensor:
    """A mask as it was before it was expanded."""
    return mask[tuple(slice(1 if stride == 0 else None) for stride in mask.stride())]


def added_mask(mask: Maybe, scores: Tensor) -> AddedMask:
    """An attention mask of a float dtype that broadcasts to the scores, as kernels take it."""
    shape = scores.shape if scores.dim() > 2 else (1,) * (3 - scores.dim()) + tuple(scores.shape)
    heads, queries, keys = shape[-3:]
    if mask is None:
        return AddedMask(None, heads, queries, (0, 0, 0))
    mask = _as("mask", unexpanded(mask), computed(scores.dtype))
    if mask.dim() and (mask.shape[-1] != keys or (keys > 1 and mask.stride(-1) != 1)):
        mask = mask.expand(*mask.shape[:-1], keys).contiguous()
    mask = mask.expand(shape)
    if mask.stride(-1) != 1 and keys > 1:
        mask = mask.contiguous()
    try:
        mask = mask.view(-1, heads, queries, keys)
    except RuntimeError:  # its outer axes are not one
        mask = mask.contiguous().view(-1, heads, queries, keys)
    outer, head, query, _ = mask.stride()
    end = (mask.shape[0] - 1) * outer + (heads - 1) * head + (queries - 1) * query + keys
    return AddedMask(mask.as_strided((end,), (1,)), heads, queries, (outer, head, query))


hide_from_dynamo(pointwise_forward, pointwise_backward, norm_forward, norm_backward, softmax_forward, softmax_backward)

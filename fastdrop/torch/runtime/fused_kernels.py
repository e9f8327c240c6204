"""Plain tensors in, plain tensors out: the fused primitives as torch's side of the package calls them.

Data is ``[..., columns]`` of one dtype, the residual stream of the same or of float32; bias, weight and shift are
``[columns]`` and a mask broadcasts to the scores, of any float dtype, and their gradients come in the type that kernels
compute in: float64 for float64, else float32. Words are those of `mask_kernels.draw`, or None where everything is kept;
forward functions may be asked to draw them first, as `words_for` says.

As in `mask_kernels` there is no autograd here, no generator, and of checks only those without which kernels would read
past the end of what an op was called with, or of what hooks on saved tensors gave back. Strides may be any. Results of
pointwise functions have the strides that torch gives the result of an element-wise op on x, or on the residual and x,
those of softmax the strides of one on the scores, and gradients of one on dy. Norms and what is kept are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...backends import c as native
from ...core import variants
from ...core.mask import word_count
from ...core.random import DROP_ALL
from . import cuda, mask_kernels
from .dispatch import hide_from_dynamo, read_address

TAGS = mask_kernels.TAGS

Draw = tuple[int, int, int]  # seed, offset, threshold


def computed(dtype: torch.dtype) -> torch.dtype:
    """What kernels compute in, and what vectors, statistics and sums are stored as."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def pointwise_forward(
    x: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    residual: Tensor | None,
    words: Tensor | None,
    a: float,
    activation: int,
    signs: bool,
    draw: Draw | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y and, if asked for and only of a relu, the bits of elements that are kept and positive."""
    n, given = x.numel(), layout_of_sum(x, residual)
    x, copied = _in_order(x)
    stream = x if residual is None else _stream("residual", residual, x)
    y = x if copied and x.dtype is stream.dtype else mask_kernels._new_like(stream, n)
    kept = x.new_empty(word_count(n), dtype=torch.int32) if signs else None
    if n:
        residual = None if residual is None else stream
        bias, factor, words = _vector("bias", bias, x), _same("factor", factor, x), _checked(words, x)
        arrays, tags = (x, bias, factor, residual, words, y, kept), (TAGS[x.dtype], TAGS[y.dtype])
        _run("pointwise_forward", *tags, *arrays, *_extents(x), a, activation, draw=draw)
    return _laid_out(y, given), kept


def pointwise_backward(
    dy: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    words: Tensor | None,
    a: float,
    activation: int,
    dtype: torch.dtype,
    bias_gradient: bool,
    factor_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dfactor and dbias; ``dtype`` is x's, which is None where the gradient needs none."""
    if dy.dtype is not dtype:
        _check_dtypes("dy", dy.dtype, dtype)
    if (activation or factor_gradient) and x is None:
        raise ValueError("x must be a tensor for an activation's and for factor's gradient, but got None")
    if factor_gradient and factor is None:
        raise ValueError("factor must be a tensor for its gradient, but got None")
    given, dy, (rows, columns) = dy, dy.contiguous(), _extents(dy)
    dx = mask_kernels._new_like(dy, dy.numel()) if dy.dtype is dtype else torch.empty_like(dy, dtype=dtype)
    dfactor = torch.empty_like(dx) if factor_gradient else None
    panels = variants.panels(rows)
    sums = dy.new_empty((panels, columns), dtype=computed(dtype)) if bias_gradient else None
    if dy.numel():
        x, bias, factor = _same("x", x, dx), _vector("bias", bias, dx), _same("factor", factor, dx)
        tags, sizes, words = (TAGS[dtype], TAGS[dy.dtype]), (rows, columns, panels), _checked(words, dx)
        _run("pointwise_backward", *tags, dy, x, bias, factor, words, dx, dfactor, sums, *sizes, a, activation)
    return _laid_out(dx, given), None if dfactor is None else _laid_out(dfactor, given), _total(sums, dy)


def norm_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    words: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    a: float,
    eps: float,
    centred: bool,
    draw: Draw | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the new residual stream that it is the norm of, and ``statistics[rows, 2]``."""
    x, (rows, columns) = x.contiguous(), _extents(x)
    stream = x if residual is None else _stream("residual", residual, x)
    y, sum = mask_kernels._new_like(x, x.numel()), mask_kernels._new_like(stream, x.numel())
    statistics = x.new_empty((rows, 2), dtype=computed(x.dtype))
    if x.numel():
        bias, weight, shift = _vector("bias", bias, x), _vector("weight", weight, x), _vector("shift", shift, x)
        residual = None if residual is None else stream
        words = _checked(words, x)
        arrays, tags = (x, bias, residual, words, weight, shift, y, sum, statistics), (TAGS[x.dtype], TAGS[sum.dtype])
        _run("norm_forward", *tags, *arrays, rows, columns, a, eps, int(centred), draw=draw)
    else:
        statistics.zero_()
    return y, sum, statistics


def norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    sum: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    words: Tensor | None,
    a: float,
    centred: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dx, dresidual, dweight, dshift and dbias, of those that are wanted; ``dtype`` is x's and dy's.

    dx and dresidual are one tensor where both have one dtype, nothing was dropped and so nothing tells them apart.
    """
    if dy.dtype is not dtype:
        raise ValueError(f"dy must have the dtype of the norm's input, {dtype}, but got {dy.dtype}")
    sum = _stream("sum", sum, dy)
    dy, (rows, columns) = dy.contiguous(), _extents(dy)
    needs_x, needs_residual, *needs_totals = wanted
    alike = words is None and a == 1.0 and dtype is sum.dtype
    dresidual = mask_kernels._new_like(sum.contiguous(), sum.numel()) if needs_residual else None
    # The kernel writes one of them at least.
    dx = mask_kernels._new_like(dy, dy.numel()) if not needs_residual or (needs_x and not alike) else None
    panels = variants.panels(rows)
    sums = dy.new_empty((panels, 3, columns), dtype=computed(dtype)) if any(needs_totals) else None
    if dy.numel():
        dsum = _same("dsum", dsum, dy, sum.dtype)
        statistics = _kept("statistics", statistics, (rows, 2), computed(dtype), dy)
        tags, words, sizes = (TAGS[dtype], TAGS[sum.dtype]), _checked(words, dy), (rows, columns, panels)
        inputs, outputs = (dy, dsum, sum, statistics, _vector("weight", weight, dy), words), (dx, dresidual, sums)
        _run("norm_backward", *tags, *inputs, *outputs, *sizes, a, int(centred))
    totals = [_total(sums[:, i], dy) if sums is not None and needs else None for i, needs in enumerate(needs_totals)]
    return (dresidual if dx is None else dx) if needs_x else None, dresidual, *totals


def softmax_forward(
    scores: Tensor,
    mask: Tensor | None,
    words: Tensor | None,
    a: float,
    scale: float,
    causal: bool,
    keep: bool,
    draw: Draw | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y and, if they are to be kept, the probabilities.

    Scores are ``[..., queries, keys]``.
    """
    given, n = scores, scores.numel()
    scores, copied = _in_order(scores)
    y = scores if copied else mask_kernels._new_like(scores, n)
    probabilities = mask_kernels._new_like(scores, n) if keep else None
    if n:
        flat, heads, queries, strides = _mask(mask, scores)
        words = _checked(words, scores)
        softmax_into(y, probabilities, scores, flat, strides, words, heads, queries, a, scale, causal, draw)
    return _laid_out(y, given), probabilities


def softmax_into(
    y: Tensor,
    probabilities: Tensor | None,
    scores: Tensor,
    mask: Tensor | None,
    strides: tuple[int, int, int],
    words: Tensor | None,
    heads: int,
    queries: int,
    a: float,
    scale: float,
    causal: bool,
    draw: Draw | None = None,
) -> None:
    """The same of tensors as kernels take them, the mask as `_mask` gives it; a result may lie over scores."""
    arrays, sizes = (scores, mask, words, probabilities, y), (*_extents(scores), heads, queries, *strides)
    _run("softmax_forward", TAGS[scores.dtype], *arrays, *sizes, scale, a, int(causal), draw=draw)


def softmax_backward(dy: Tensor, probabilities: Tensor, words: Tensor | None, a: float, scale: float) -> Tensor:
    """The scores' gradient."""
    given = dy
    dy, copied = _in_order(dy)
    dx = dy if copied else mask_kernels._new_like(dy, dy.numel())
    if dy.numel():
        probabilities = _kept("probabilities", probabilities, dy.shape, dy.dtype, dy)
        softmax_backward_into(dx, None, dy, probabilities, _checked(words, dy), a, scale)
    return _laid_out(dx, given)


def softmax_backward_into(
    dx: Tensor, y: Tensor | None, dy: Tensor, probabilities: Tensor, words: Tensor | None, a: float, scale: float
) -> None:
    """The same of tensors as kernels take them; dx may lie over dy, and y is forward's once more."""
    _run("softmax_backward", TAGS[dy.dtype], dy, probabilities, words, dx, y, *_extents(dy), scale, a)


# ---- memory ----


def _in_order(x: Tensor) -> tuple[Tensor, bool]:
    """x in logical order, and whether that is a copy, over which a result may be written."""
    ordered = x.contiguous()
    return ordered, ordered is not x


def layout_of_sum(x: Tensor, residual: Tensor | None) -> Tensor:
    """Of which of them torch's sum has the strides: the residual's, which comes first, unless it was expanded."""
    if residual is None:
        return x
    if residual.is_contiguous():
        return residual
    # A compiler's symbols are no zeros.
    strides = zip(residual.shape, residual.stride(), strict=True)
    expanded = any(isinstance(stride, int) and stride == 0 and extent != 1 for extent, stride in strides)
    return x if expanded else residual


def _laid_out(y: Tensor, given: Tensor) -> Tensor:
    """y, in logical order, with the strides that an element-wise op of torch's gives its result on what was given."""
    if given.is_contiguous():
        return y
    result = torch.empty_like(given, dtype=y.dtype)
    return y if result.stride() == y.stride() else result.copy_(y)


def words_for(x: Tensor, seed: Any, cut: int) -> tuple[Tensor, Draw | None]:
    """The words of a mask of x for a forward function here, and what it needs if it is to draw them: C does so while
    data is on its way."""
    n = x.numel()
    if not x.is_cuda and 0 < cut < DROP_ALL and n and backends.draws():
        return mask_kernels._NO_WORDS.new_empty(word_count(n)), (seed, 0, cut)
    return mask_kernels.draw(x, n, seed, cut), None


def _run(primitive: str, *arguments: Any, draw: Draw | None = None) -> None:
    """A primitive where its first tensor is; tensors or None stand in the place of arrays."""
    if next(x for x in arguments if isinstance(x, Tensor)).is_cuda:
        getattr(cuda, primitive)(*arguments)
        return
    backend = backends.active()
    if draw is not None or backend is native:
        at = [read_address(x) if isinstance(x, Tensor) else x or 0 for x in arguments]  # results are new
        kernel = getattr(native, f"{primitive}_at" if draw is None else f"{primitive}_drawn_at")
        if kernel(torch.get_num_threads(), *(draw or ()), *at):
            raise mask_kernels._refusal()
    else:
        arrays = [_array(x) if isinstance(x, Tensor) else x for x in arguments]
        mask_kernels._call(backend, getattr(backend, primitive), *arrays)


def _array(x: Tensor) -> Any:
    return mask_kernels._words(x) if x.dtype is torch.int32 else mask_kernels._read_array(x)


def _extents(x: Tensor) -> tuple[int, int]:
    """Rows and columns; a number without axes is one of each."""
    return math.prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1


def _vector(name: str, x: Tensor | None, data: Tensor) -> Tensor | None:
    """As kernels for this data take it."""
    if x is None:
        return None
    wide = computed(data.dtype)
    return _kept(name, x if x.dtype is wide else _as(name, x, wide), data.shape[-1:], wide, data)


def _as(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype not in TAGS:
        raise TypeError(f"{name} must be of a float dtype, but got {x.dtype}")
    return x.to(dtype)


def _same(name: str, x: Tensor | None, data: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """An array of the data's shape, and dtype unless one is named."""
    return None if x is None else _kept(name, x, data.shape, dtype or data.dtype, data)


def _stream(name: str, x: Tensor, data: Tensor) -> Tensor:
    """A residual stream beside data: of its shape, and of a dtype that goes with it."""
    if x.dtype is not data.dtype:
        _check_dtypes(name, x.dtype, data.dtype)
    return _kept(name, x, data.shape, x.dtype, data)


def _check_dtypes(name: str, stream: torch.dtype, dtype: torch.dtype) -> None:
    """Raises unless a residual stream's dtype is the data's, or float32 beside 16 bits: all that kernels know."""
    if dtype not in TAGS:
        raise ValueError(f"dtype must be float32, float64, float16 or bfloat16, but got {dtype}")
    if stream is not dtype and (stream is not torch.float32 or dtype is torch.float64):
        raise ValueError(f"{name} must be {dtype}, or float32 beside 16-bit data, but got {stream}")


def _kept(name: str, x: Tensor, shape: Any, dtype: torch.dtype, data: Tensor) -> Tensor:
    """x in C order, if it is what it must be: kernels would read past the end of less."""
    if x.shape != shape or x.dtype is not dtype or x.device != data.device:
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(shape)} on {data.device}, but got {x.dtype} of shape "
            f"{tuple(x.shape)} on {x.device}"
        )
    return x.contiguous()


def _checked(words: Tensor | None, data: Tensor) -> Tensor | None:
    return None if words is None else mask_kernels._checked(words, data.numel(), data.device)


def _total(sums: Tensor | None, data: Tensor) -> Tensor | None:
    """The sum over all panels, in memory of its own: gradients live longer than panels should."""
    if sums is None:
        return None
    return (sums[0].clone() if data.numel() else sums.new_zeros(sums.shape[1:])).view(data.shape[-1:])


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask of bool adds to scores; expanded axes have one element."""
    mask = _once(mask)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask.logical_not(), -math.inf)


def _once(mask: Tensor) -> Tensor:
    """A mask as it was before it was expanded."""
    return mask[tuple(slice(1 if stride == 0 else None) for stride in mask.stride())]


def _mask(mask: Tensor | None, scores: Tensor) -> tuple[Tensor | None, int, int, tuple[int, int, int]]:
    """The mask's memory, a row's keys side by side; heads, queries, and strides of what is before heads, of both."""
    shape = scores.shape if scores.dim() > 2 else (1,) * (3 - scores.dim()) + tuple(scores.shape)
    heads, queries, keys = shape[-3:]
    if mask is None:
        return None, heads, queries, (0, 0, 0)
    mask = _as("mask", _once(mask), computed(scores.dtype))
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
    return mask.as_strided((end,), (1,)), heads, queries, (outer, head, query)


hide_from_dynamo(pointwise_forward, pointwise_backward, norm_forward, norm_backward, softmax_forward, softmax_backward)

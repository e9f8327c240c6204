"""The fused primitives in NumPy, and their contract: the part of `reference` that works on rows.

Data is ``[rows, columns]``, C-contiguous, ``columns >= 1``; element (r, c) stands under bit ``r * columns + c`` of
``words``, and everything is kept where ``words`` is None. Two dtypes take part: ``dtype``, of what is dropped, and
``sum_dtype``, of the residual stream, which is the same or float32 beside a 16-bit dtype. Arithmetic is float64's where
the data is float64 and float32's elsewhere, with one rounding where a result is stored. Vectors of columns (bias,
weight, shift, mask), statistics and sums come in the type of that arithmetic.

What a call has not is None. Kept elements are multiplied by ``a``; dropped ones are +0, selected and not multiplied, in
the forward pass and in gradients. An output may be an input of the same dtype, element on element; other overlaps are
the caller's to exclude.

Sums over rows are taken a panel of rows at a time and then panel after panel: in an order that the shape alone decides.
Panel k of n begins at row ``k * (rows // n) + min(k, rows % n)``. ``sums`` has a line for each panel; the first ends as
the total, the others as anything.

Here all arithmetic is float64's, so that results are the most exact; other backends agree to the tolerance that
tests/cases.py gives.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.activations import GELU, GELU_TANH, NORMAL_DENSITY, RELU, SILU, SQRT_HALF, TANH_CUBIC, TANH_SCALE
from ...core.checks import BFLOAT16
from .storage import bfloat16_to_float32, float32_to_bfloat16, unpack_bits, write_bits

Array = NDArray[Any]
Words = NDArray[np.uint32]
Doubles = NDArray[np.float64]


def pointwise_forward(
    dtype: int,
    residual_dtype: int,
    x: Array,
    input_bias: Array | None,
    multiplier: Array | None,
    residual: Array | None,
    words: Words | None,
    y: Array,
    signs: Words | None,
    rows: int,
    columns: int,
    a: float,
    activation: int,
) -> None:
    """``y = residual + (bit ? a * act(x + bias) * factor : 0)``, with y and residual of sum_dtype.

    ``signs``, for relu alone and not ``words`` itself, takes the bits of elements that are kept and not at or below 0
    before the activation: all that the gradient needs.
    """
    shape = rows, columns
    with np.errstate(all="ignore"):
        h = _wide(dtype, x, shape)
        if input_bias is not None:
            h = h + input_bias
        keep = _bits(words, shape)
        if signs is not None:
            write_bits(signs, 0, (keep & ~(h <= 0)).reshape(-1))
        h = activated(h, activation)
        if multiplier is not None:
            h = h * _wide(dtype, multiplier, shape)
        result = np.where(keep, h * a, 0.0)
        if residual is not None:
            result = result + _wide(residual_dtype, residual, shape)
        _store(residual_dtype, y, result)


def pointwise_backward(
    dtype: int,
    residual_dtype: int,
    dy: Array,
    x: Array | None,
    input_bias: Array | None,
    multiplier: Array | None,
    words: Words | None,
    dx: Array,
    dmultiplier: Array | None,
    sums: Array | None,
    rows: int,
    columns: int,
    panels: int,
    a: float,
    activation: int,
) -> None:
    """Gradients of `pointwise_forward`, given dy of sum_dtype: dx, dfactor and, in ``sums[panels, columns]``, of bias.

    x is None where the activation is none and there is no dfactor; for a relu whose ``signs`` were kept, those are
    ``words`` here and the activation is none.
    """
    shape = rows, columns
    with np.errstate(all="ignore"):
        g = _wide(residual_dtype, dy, shape) * a
        keep = _bits(words, shape)
        slope = g
        if x is not None:
            h = _wide(dtype, x, shape)
            if input_bias is not None:
                h = h + input_bias
            slope = g * activation_slope(h, activation)
            scaled = g * activated(h, activation)
        if multiplier is not None:
            slope = slope * _wide(dtype, multiplier, shape)
        slope = np.where(keep, slope, 0.0)
        if dmultiplier is not None:
            _store(dtype, dmultiplier, np.where(keep, scaled, 0.0))
        _store(dtype, dx, slope)
        if sums is not None:
            sums.reshape(panels, columns)[0] = slope.sum(0)


def norm_forward(
    dtype: int,
    residual_dtype: int,
    x: Array,
    input_bias: Array | None,
    residual: Array | None,
    words: Words | None,
    weight: Array | None,
    norm_bias: Array | None,
    y: Array,
    residual_out: Array,
    statistics: Array,
    rows: int,
    columns: int,
    a: float,
    eps: float,
    centred: int,
) -> None:
    """``sum = residual + (bit ? a * (x + bias) : 0)``, of sum_dtype, and its norm by rows, of dtype:
    ``y = (sum - mean) / sqrt(variance + eps) * weight + shift``, of the sum as it was rounded.

    ``statistics[rows, 2]`` takes the mean and ``1 / sqrt(variance + eps)``. Unless ``centred`` the mean counts as 0,
    which makes a root mean square of the deviation.
    """
    shape = rows, columns
    pointwise_forward(
        dtype, residual_dtype, x, input_bias, None, residual, words, residual_out, None, rows, columns, a, 0
    )
    with np.errstate(all="ignore"):
        stored = _wide(residual_dtype, residual_out, shape)
        mean = stored.mean(1, keepdims=True) if centred else np.zeros((rows, 1))
        rstd = 1.0 / np.sqrt(np.square(stored - mean).mean(1, keepdims=True) + eps)
        statistics.reshape(rows, 2)[...] = np.concatenate([mean, rstd], 1)
        normal = (stored - mean) * rstd
        if weight is not None:
            normal = normal * weight
        if norm_bias is not None:
            normal = normal + norm_bias
        _store(dtype, y, normal)


def norm_backward(
    dtype: int,
    residual_dtype: int,
    dy: Array,
    dresidual_out: Array | None,
    residual_out: Array,
    statistics: Array,
    weight: Array | None,
    words: Words | None,
    dx: Array | None,
    dresidual: Array | None,
    sums: Array | None,
    rows: int,
    columns: int,
    panels: int,
    a: float,
    centred: int,
) -> None:
    """Gradients of `norm_forward`, given dy of y and, of sum_dtype, dsum of its second output: dresidual is dsum plus
    what the norm passes on, ``dx = bit ? a * dresidual : 0``. ``sums[panels, 3, columns]``: of weight, shift and bias.
    """
    shape = rows, columns
    with np.errstate(all="ignore"):
        g = _wide(dtype, dy, shape)
        mean, rstd = np.split(statistics.reshape(rows, 2).astype(np.float64), 2, 1)
        normal = (_wide(residual_dtype, residual_out, shape) - mean) * rstd
        of_weight, of_norm_bias = (g * normal).sum(0), g.sum(0)
        if weight is not None:
            g = g * weight
        of_g = g.mean(1, keepdims=True) if centred else 0.0
        slope = (g - of_g - normal * (g * normal).mean(1, keepdims=True)) * rstd
        if dresidual_out is not None:
            slope = slope + _wide(residual_dtype, dresidual_out, shape)
        dropped = np.where(_bits(words, shape), slope * a, 0.0)
        if dresidual is not None:
            _store(residual_dtype, dresidual, slope)
        if dx is not None:
            _store(dtype, dx, dropped)
        if sums is not None:
            sums.reshape(panels, 3, columns)[0] = of_weight, of_norm_bias, dropped.sum(0)


def softmax_forward(
    dtype: int,
    x: Array,
    mask: Array | None,
    words: Words | None,
    probabilities: Array | None,
    y: Array,
    rows: int,
    columns: int,
    heads: int,
    queries: int,
    outer_stride: int,
    head_stride: int,
    query_stride: int,
    softmax_scale: float,
    a: float,
    causal: int,
) -> None:
    """``probabilities``, the softmax of ``scale * x + mask`` by rows, and ``y = bit ? a * probabilities : 0``.

    Row r is query ``r % queries`` of head ``r // queries % heads``; its line of the mask, a flat array, begins at
    element ``r // queries // heads * outer_stride + head * head_stride + query * query_stride``. Under ``causal`` a
    query sees the keys up to its own number. A row in which nothing is left, all minus infinity, is 0.
    """
    shape = rows, columns
    with np.errstate(all="ignore"):
        scores = _wide(dtype, x, shape) * softmax_scale
        row = np.arange(rows)
        query, head, outer = row % queries, row // queries % heads, row // queries // heads
        if mask is not None:
            begin = outer * outer_stride + head * head_stride + query * query_stride
            scores = scores + mask.reshape(-1)[begin[:, None] + np.arange(columns)]
        if causal:
            scores = np.where(np.arange(columns) <= query[:, None], scores, -np.inf)
        most = scores.max(1, keepdims=True)
        exponentials = np.exp(scores - most)
        result = exponentials / exponentials.sum(1, keepdims=True)
        result = np.where(most == -np.inf, 0.0, result)
        if causal:
            result = np.where(np.arange(columns) <= query[:, None], result, 0.0)
        if probabilities is not None:
            _store(dtype, probabilities, result)
        _store(dtype, y, np.where(_bits(words, shape), result * a, 0.0))


def softmax_backward(
    dtype: int,
    dy: Array,
    probabilities: Array,
    words: Words | None,
    dx: Array,
    y: Array | None,
    rows: int,
    columns: int,
    softmax_scale: float,
    a: float,
) -> None:
    """``dx = scale * probabilities * (g - (g * probabilities).sum())`` by rows, with ``g = bit ? a * dy : 0``.

    y, where it is wanted, takes what forward's y was, up to rounding: ``bit ? a * probabilities : 0``.
    """
    shape = rows, columns
    with np.errstate(all="ignore"):
        keep, p = _bits(words, shape), _wide(dtype, probabilities, shape)
        g = np.where(keep, _wide(dtype, dy, shape) * a, 0.0)
        if y is not None:
            _store(dtype, y, np.where(keep, p * a, 0.0))
        _store(dtype, dx, (g - (g * p).sum(1, keepdims=True)) * p * softmax_scale)


def activated(h: Doubles, activation: int) -> Doubles:
    """h under an activation, by its code; gelu_tanh is gelu's approximation by a tanh."""
    if activation == RELU:
        return np.where(h <= 0, 0.0, h)
    if activation == GELU:
        return h * _below(h)
    if activation == GELU_TANH:
        return 0.5 * h * (1.0 + np.tanh(TANH_SCALE * (h + TANH_CUBIC * h**3)))
    if activation == SILU:
        return h / (1.0 + np.exp(-h))
    return h


def activation_slope(h: Doubles, activation: int) -> Doubles:
    """The derivative of an activation at h."""
    if activation == RELU:
        return np.where(h <= 0, 0.0, 1.0)
    if activation == GELU:
        return _below(h) + h * NORMAL_DENSITY * np.exp(-0.5 * h * h)
    if activation == GELU_TANH:
        t = np.tanh(TANH_SCALE * (h + TANH_CUBIC * h**3))
        return 0.5 * (1.0 + t) + 0.5 * h * (1.0 - t * t) * TANH_SCALE * (1.0 + 3.0 * TANH_CUBIC * h * h)
    if activation == SILU:
        gate = 1.0 / (1.0 + np.exp(-h))
        return gate * (1.0 + h * (1.0 - gate))
    return np.ones_like(h)


_erfc: Any = np.frompyfunc(math.erfc, 1, 1)


def _below(h: Doubles) -> Doubles:
    """The probability of a standard normal number to be below h."""
    below: Doubles = 0.5 * _erfc(-SQRT_HALF * h).astype(np.float64)
    return below


def _wide(dtype: int, x: Array, shape: tuple[int, int]) -> Doubles:
    values = bfloat16_to_float32(x) if dtype == BFLOAT16 else x
    return values.reshape(shape).astype(np.float64)


def _store(dtype: int, to: Array, values: Doubles) -> None:
    flat = to.reshape(values.shape)
    flat[...] = float32_to_bfloat16(values.astype(np.float32)) if dtype == BFLOAT16 else values


def _bits(words: Words | None, shape: tuple[int, int]) -> NDArray[np.bool_]:
    if words is None:
        return np.ones(shape, np.bool_)
    return unpack_bits(words, 0, shape[0] * shape[1]).reshape(shape)

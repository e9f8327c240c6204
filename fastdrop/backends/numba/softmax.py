"""The softmax kernels of the Numba CPU backend: scale, mask, softmax by rows and dropout, and their gradient.

They work row by row with `stages`; `launch` calls them over ranges of rows.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import extending

from .math import curves
from .scalars import bits_of, double_of, float_of, kernel, long_bits_of, stage
from .stages import U, add, as_type, deliver, dot, drop, row_sum, scale, take, take_as

overload: Any = extending.overload


def _exponentials_stage(double: bool) -> Any:
    exponential = curves(double).exponential

    @stage
    def exponentials(h, n, top):
        for i in range(U(0), n):
            h[i] = exponential(h[i] - top)

    return exponentials


_stages = _exponentials_stage(False), _exponentials_stage(True)


def _exponentials(h: Any, n: Any, top: Any) -> Any:
    """The exponentials of h - top."""
    raise NotImplementedError


@overload(_exponentials, inline="always")
def _exponentials_of(h, n, top):
    exponentials = _stages[h.dtype == types.float64]
    return lambda h, n, top: exponentials(h, n, top)


def _ordered(v: Any) -> Any:
    """A float's bits as an integer of the same order, whose largest is found in lanes."""
    raise NotImplementedError


def _unordered(key: Any) -> Any:
    """The float again."""
    raise NotImplementedError


@overload(_ordered, inline="always")
def _ordered_of(v):
    if v == types.float64:
        return lambda v: _turned(np.int64(long_bits_of(v)))
    return lambda v: _turned(np.int32(bits_of(v)))


@overload(_unordered, inline="always")
def _unordered_of(key):
    if key == types.int64:
        return lambda key: double_of(np.uint64(_turned(key)))
    return lambda key: float_of(np.uint32(_turned(key)))


def _turned(key: Any) -> Any:
    """Negative numbers' magnitudes upside down."""
    raise NotImplementedError


@overload(_turned, inline="always")
def _turned_of(key):
    whole, last = (np.int64, 63) if key == types.int64 else (np.int32, 31)
    magnitude, sign = whole((1 << last) - 1), whole(last)
    return lambda key: whole(key ^ whole(whole(key >> sign) & magnitude))


@stage
def _largest(h, n):
    """NaN may be taken for larger or for smaller than anything."""
    largest = _ordered(h[U(0)])
    for i in range(U(1), n):
        key = _ordered(h[i])
        largest = key if key > largest else largest
    return _unordered(largest)


@kernel
def softmax_forward(
    begin,
    end,
    dtype,
    x,
    mask,
    words,
    probabilities,
    y,
    rows,
    columns,
    heads,
    queries,
    outer_stride,
    head_stride,
    query_stride,
    softmax_scale,
    a,
    causal,
):
    """Over rows."""
    columns, heads, queries, zero = U(columns), U(heads), U(queries), as_type(0, a)
    h, other = np.full(columns, a), np.full(columns, a)
    for r in range(U(begin), U(end)):
        at, query, head, outer = r * columns, r % queries, r // queries % heads, r // queries // heads
        keys = min(columns, query + U(1)) if causal else columns
        take(dtype, x, at, keys, h)
        scale(h, keys, softmax_scale)
        if mask:
            line = outer * U(outer_stride) + head * U(head_stride) + query * U(query_stride)
            take_as(mask, line, keys, other, a)
            add(h, other, U(0), keys)
        largest = _largest(h, keys)
        # Where nothing is left exponentials are then 0, and NaN stays what it is.
        _exponentials(h, keys, zero if largest == -np.inf else largest)
        total = row_sum(h, keys)
        scale(h, keys, as_type(1.0 / total if total != 0.0 else 0.0, a))
        h[keys:] = zero
        if probabilities:
            deliver(dtype, probabilities, at, columns, h)
        drop(h, words, at, columns, a)
        deliver(dtype, y, at, columns, h)


@stage
def _softmax_slope(g, p, n, dot, softmax_scale):
    """g becomes the gradient of the scores."""
    for i in range(U(0), n):
        g[i] = (g[i] - dot) * p[i] * softmax_scale


@kernel
def softmax_backward(begin, end, dtype, dy, probabilities, words, dx, y, rows, columns, softmax_scale, a):
    """Over rows."""
    columns = U(columns)
    g, p = np.full(columns, a), np.full(columns, a)
    for r in range(U(begin), U(end)):
        at = r * columns
        take(dtype, dy, at, columns, g)
        take(dtype, probabilities, at, columns, p)
        drop(g, words, at, columns, a)
        _softmax_slope(g, p, columns, as_type(dot(g, p, columns), a), softmax_scale)
        deliver(dtype, dx, at, columns, g)
        if y:
            drop(p, words, at, columns, a)
            deliver(dtype, y, at, columns, p)

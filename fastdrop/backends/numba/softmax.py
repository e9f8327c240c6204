"""The softmax kernels of the Numba CPU backend: scale, mask, softmax by rows and dropout, and their gradient.

They work row by row with `stages`; `launch` calls them over ranges of rows.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from typing import Any

import numpy as np

from .math import curves
from .scalars import bits_of, double_of, float_of, kernel, long_bits_of, scalar, stage
from .stages import U, add, as_type, by_type, deliver, dot, drop, row_sum, scale, take, take_as


def _stages_of(double: bool) -> tuple[Any, Any]:
    exponential = curves(double).exponential
    bits, number = (long_bits_of, double_of) if double else (bits_of, float_of)
    unsigned, whole, last = (np.uint64, np.int64, 63) if double else (np.uint32, np.int32, 31)
    magnitude, sign = whole((1 << last) - 1), whole(last)

    @scalar
    def turned(key):
        """A float's bits as an integer of the same order, whose largest is found in lanes; and back."""
        return whole(key ^ whole(whole(key >> sign) & magnitude))

    @stage
    def exponentials(h, n, top):
        """Of h - top."""
        for i in range(U(0), n):
            h[i] = exponential(h[i] - top)

    @stage
    def largest(h, n):
        """NaN may be taken for larger or for smaller than anything."""
        found = turned(whole(bits(h[U(0)])))
        for i in range(U(1), n):
            key = turned(whole(bits(h[i])))
            found = key if key > found else found
        return number(unsigned(turned(found)))

    return exponentials, largest


exponentials, largest_of = (by_type(pair, 0) for pair in zip(_stages_of(False), _stages_of(True), strict=True))


@stage
def mask_line(r, heads, queries, outer_stride, head_stride, query_stride):
    """Where the mask's row for row r begins."""
    outer, head, query = r // queries // heads, r // queries % heads, r % queries
    return outer * U(outer_stride) + head * U(head_stride) + query * U(query_stride)


@stage
def take_scores(dtype, x, at, mask, line, n, softmax_scale, h, other):
    """h = softmax_scale x + mask, by other as scratch."""
    take(dtype, x, at, n, h)
    scale(h, n, softmax_scale)
    if mask:
        take_as(mask, line, n, other, softmax_scale)
        add(h, other, U(0), n)


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
        at, keys = r * columns, min(columns, r % queries + U(1)) if causal else columns
        line = mask_line(r, heads, queries, outer_stride, head_stride, query_stride)
        take_scores(dtype, x, at, mask, line, keys, softmax_scale, h, other)
        largest = largest_of(h, keys)
        # Where nothing is left exponentials are then 0, and NaN stays what it is.
        exponentials(h, keys, zero if largest == -np.inf else largest)
        total = row_sum(h, keys)
        scale(h, keys, as_type(1.0 / total if total != 0.0 else 0.0, a))
        h[keys:] = zero
        if probabilities:
            deliver(dtype, probabilities, at, columns, h)
        drop(h, words, at, columns, a)
        deliver(dtype, y, at, columns, h)


@stage
def softmax_slope(g, p, n, dot, softmax_scale):
    """g becomes the gradient of the scores."""
    for i in range(U(0), n):
        g[i] = (g[i] - dot) * p[i] * softmax_scale


@kernel
def softmax_backward(begin, end, dtype, dy, probabilities, words, dx, y, columns, softmax_scale, a):
    """Over rows."""
    columns = U(columns)
    g, p = np.full(columns, a), np.full(columns, a)
    for r in range(U(begin), U(end)):
        at = r * columns
        take(dtype, dy, at, columns, g)
        take(dtype, probabilities, at, columns, p)
        drop(g, words, at, columns, a)
        softmax_slope(g, p, columns, as_type(dot(g, p, columns), a), softmax_scale)
        deliver(dtype, dx, at, columns, g)
        if y:
            drop(p, words, at, columns, a)
            deliver(dtype, y, at, columns, p)

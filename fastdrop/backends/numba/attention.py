"""The attention kernels of the Numba CPU backend: a tile of scores under running statistics, and its gradient.

They work row by row with `stages` and the parts of `softmax`; `launch` calls them over ranges of rows.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

import numpy as np

from .scalars import kernel, stage
from .softmax import exponentials, largest_of, mask_line, softmax_slope, take_scores
from .stages import U, as_type, deliver, drop, fetch, put, row_sum, scale, take, take_as


@stage
def _seen(columns, causal, query, first_key):
    """How many columns a row sees."""
    if not causal:
        return columns
    return U(0) if query < first_key else min(columns, query - first_key + U(1))


@kernel
def attention_forward(
    begin,
    end,
    dtype,
    x,
    mask,
    words,
    before,
    totals,
    after,
    y,
    scaled,
    columns,
    width,
    heads,
    queries,
    outer_stride,
    head_stride,
    query_stride,
    first_query,
    first_key,
    softmax_scale,
    causal,
):
    """Over rows."""
    columns, width, heads, queries = U(columns), U(width), U(heads), U(queries)
    zero, one = as_type(0, softmax_scale), as_type(1, softmax_scale)
    h, other, sums = np.full(columns, zero), np.full(columns, zero), np.full(width, zero)
    for r in range(U(begin), U(end)):
        at, keys = r * columns, _seen(columns, causal, U(first_query) + r % queries, U(first_key))
        line = mask_line(r, heads, queries, outer_stride, head_stride, query_stride)
        take_scores(dtype, x, at, mask, line, keys, softmax_scale, h, other)
        old, total = as_type(-np.inf, zero), zero
        if before:
            old, total = fetch(before, U(2) * r, zero), fetch(before, U(2) * r + U(1), zero)
        top = old
        if keys:
            largest = largest_of(h, keys)
            top = largest if largest > old else old
        exponentials(h, keys, zero if top == -np.inf else top)
        added = row_sum(h, keys)
        if np.isnan(added):
            top = as_type(np.nan, zero)
            h[:keys] = top
        factor = one if top == old else as_type(np.exp(np.float64(old) - np.float64(top)), zero)
        put(after, U(2) * r, top)
        put(after, U(2) * r + U(1), as_type(np.float64(total) * np.float64(factor) + added, zero))
        h[keys:] = zero
        drop(h, words, at, columns, one)
        deliver(dtype, y, at, columns, h)
        if scaled:
            take_as(totals, r * width, width, sums, zero)
            scale(sums, width, factor)
            for i in range(U(0), width):
                put(scaled, r * width + i, sums[i])


@kernel
def attention_backward(
    begin,
    end,
    dtype,
    x,
    mask,
    words,
    base_and_dot,
    dy,
    y,
    dx,
    columns,
    heads,
    queries,
    outer_stride,
    head_stride,
    query_stride,
    first_query,
    first_key,
    softmax_scale,
    a,
    causal,
):
    """Over rows."""
    columns, heads, queries, zero, one = U(columns), U(heads), U(queries), as_type(0, a), as_type(1, a)
    p, g = np.full(columns, a), np.full(columns, a)
    for r in range(U(begin), U(end)):
        at, keys = r * columns, _seen(columns, causal, U(first_query) + r % queries, U(first_key))
        line = mask_line(r, heads, queries, outer_stride, head_stride, query_stride)
        take_scores(dtype, x, at, mask, line, keys, softmax_scale, p, g)
        exponentials(p, keys, fetch(base_and_dot, U(2) * r, zero))
        p[keys:] = zero
        if dx:
            take(dtype, dy, at, columns, g)
            drop(g, words, at, columns, a)
            softmax_slope(g, p, keys, fetch(base_and_dot, U(2) * r + U(1), zero), one)
            g[keys:] = zero
            deliver(dtype, dx, at, columns, g)
        if y:
            drop(p, words, at, columns, a)
            deliver(dtype, y, at, columns, p)

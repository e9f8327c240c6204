"""The bodies of the CUDA kernels for a softmax by rows with dropout, and its gradient.

`compile` makes kernels of them; a body is written in the words of `vector_intrinsics`. A warp takes a short row,
a block a long one; values are read again for each of the three passes over a row, as in `norm`.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from typing import Any

import numpy as np

from ..numba.math import curves
from .teams import ONE, U, arithmetic, loads, over_team, teams


def softmax_forward(v: Any) -> Any:
    _, _, numbers_or, bits_at = loads(v)
    team, total, most, (plus, times) = teams(v), v.total, v.most, arithmetic(v)
    row_sum, row_most = over_team(v, lambda a, b: a + b), over_team(v, lambda a, b: b if b > a else a)
    load_data, store_data, kept, spread, multiply_high = v.load_data, v.store_data, v.kept, v.spread, v.multiply_high
    item, count, zero, one, lowest = U(v.item_bytes), U(v.count), v.number(0), v.number(1), v.number(-np.inf)
    exponential = curves(v.doubles).exponential
    scaled = v.each(lambda x, m, softmax_scale: x * softmax_scale + m, "vvn")
    first_of = v.each(lambda s, j, left, beyond: s if j < left else beyond, "vjkn")
    larger = v.each(lambda a, b: b if b > a else a, "vv")
    powers = v.each(lambda s, top: exponential(s - top), "vn")

    @v.inline
    def up_to(keys, column, s, beyond):
        """What is beyond the last key that is seen replaced, which is where that lies within the vector."""
        if column + count > keys:
            return first_of(s, keys - column, beyond)
        return s

    @v.inline
    def scores(cell, column, x, mask, line, keys, softmax_scale):
        """Of keys that are seen; minus infinity beyond."""
        s = load_data(x + cell * item)
        m = numbers_or(spread(zero), mask, line + column)
        return up_to(keys, column, scaled(s, m, softmax_scale), lowest)

    @v.inline
    def divided(n, multiplier, shift):
        """n, below 2**63, by what `reciprocal` gave the others for."""
        return multiply_high(n << ONE, multiplier) >> shift

    def kernel(
        x,
        mask,
        words,
        probabilities,
        y,
        rows,
        columns,
        queries,
        queries_multiplier,
        queries_shift,
        heads,
        heads_multiplier,
        heads_shift,
        outer_stride,
        head_stride,
        query_stride,
        by_block,
        causal,
        softmax_scale,
        a,
    ):
        row, row_step, first, step = team(by_block)
        while row < rows:
            begin = row * columns
            over = divided(row, queries_multiplier, queries_shift)
            outer = divided(over, heads_multiplier, heads_shift)
            query, head = row - over * queries, over - outer * heads
            line = outer * outer_stride + head * head_stride + query * query_stride
            keys = columns
            if causal:
                keys = min(columns, query + ONE)
            found, column = spread(lowest), first
            while column < keys:
                found = larger(found, scores(begin + column, column, x, mask, line, keys, softmax_scale))
                column += step
            top = row_most(most(found), by_block)
            if top == lowest:  # nothing is left, and the sum is 0; or there is a NaN, which it shows
                top = zero
            found, column = spread(zero), first
            while column < keys:
                s = scores(begin + column, column, x, mask, line, keys, softmax_scale)
                found = plus(found, powers(s, top))
                column += step
            share = row_sum(total(found), by_block)
            if share != zero:
                share = one / share
            column = first
            while column < columns:
                cell, p = begin + column, spread(zero)
                if column < keys:
                    s = scores(cell, column, x, mask, line, keys, softmax_scale)
                    p = up_to(keys, column, times(powers(s, top), share), zero)
                if probabilities:
                    store_data(probabilities + cell * item, p)
                store_data(y + cell * item, kept(bits_at(words, cell), times(p, a)))
                column += step
            row += row_step

    return kernel


def softmax_backward(v: Any) -> Any:
    _, _, _, bits_at = loads(v)
    team, row_sum, total, (_, times) = teams(v), over_team(v, lambda a, b: a + b), v.total, arithmetic(v)
    load_data, store_data, kept, spread = v.load_data, v.store_data, v.kept, v.spread
    item, zero = U(v.item_bytes), v.number(0)
    add_product = v.each(lambda total, g, p: total + g * p, "vvv")
    slope = v.each(lambda g, p, dot, softmax_scale: (g - dot) * p * softmax_scale, "vvnn")

    def kernel(dy, probabilities, words, dx, y, rows, columns, by_block, softmax_scale, a):
        row, row_step, first, step = team(by_block)
        while row < rows:
            begin = row * columns
            found, column = spread(zero), first
            while column < columns:
                cell = begin + column
                g, p = load_data(dy + cell * item), load_data(probabilities + cell * item)
                found = add_product(found, kept(bits_at(words, cell), times(g, a)), p)
                column += step
            dot = row_sum(total(found), by_block)
            column = first
            while column < columns:
                cell = begin + column
                g, p = load_data(dy + cell * item), load_data(probabilities + cell * item)
                bits = bits_at(words, cell)
                if y:
                    store_data(y + cell * item, kept(bits, times(p, a)))
                store_data(dx + cell * item, slope(kept(bits, times(g, a)), p, dot, softmax_scale))
                column += step
            row += row_step

    return kernel

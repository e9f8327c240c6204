"""The bodies of the pointwise CUDA kernels: bias, activation, dropout and residual, and their gradients.

`compile` makes kernels of them; a body is written in the words of `vector_intrinsics`. Data is read under mask words
that were drawn before. A thread takes 16 bytes of data where the addresses allow it, else one element. An absent array
is address 0, and all threads alike then pass over the load. `pointwise_columns` adds up the gradients of a bias by
columns, in an order that the shape alone decides; nothing is atomic.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from typing import Any

from ...core.activations import RELU
from ..numba.math import curves
from .teams import (
    LOW_5,
    ONE,
    WORD_BYTES,
    WORD_SHIFT,
    U,
    arithmetic,
    loads,
    sum_over_warps,
    tasks_of,
    thread_counter,
    warp_counter,
    warp_number,
)


def _forward(v: Any, activation: int) -> Any:
    data_or, residual_or, numbers_or, bits_at = loads(v)
    load_data, store_residual, kept, above, spread = v.load_data, v.store_residual, v.kept, v.above, v.spread
    item, residual_item, zero, one = U(v.item_bytes), U(v.residual_bytes), v.number(0), v.number(1)
    activate = curves(v.doubles).activations[activation]
    plus, _ = arithmetic(v)
    value = v.each(lambda h, f, a: activate(h) * f * a, "vvn")

    @v.inline
    def forward(cell, column, arrays, a):
        """The elements from ``cell`` on; the bits of those kept and not at or below 0."""
        x, input_bias, multiplier, residual, words, y = arrays
        zeros = spread(zero)
        h = load_data(x + cell * item)
        b = numbers_or(zeros, input_bias, column)
        f = data_or(spread(one), multiplier, cell)
        r = residual_or(zeros, residual, cell)
        bits = bits_at(words, cell)
        h = plus(h, b)
        store_residual(y + cell * residual_item, plus(kept(bits, value(h, f, a)), r))
        return bits & U(above(h))

    return forward


def _backward(v: Any, activation: int) -> Any:
    data_or, _, numbers_or, bits_at = loads(v)
    load_residual, store_data, kept, spread = v.load_residual, v.store_data, v.kept, v.spread
    item, residual_item, zero, one = U(v.item_bytes), U(v.residual_bytes), v.number(0), v.number(1)
    functions = curves(v.doubles)
    activate, slope = functions.activations[activation], functions.slopes[activation]
    plus, times = arithmetic(v)
    of_input = v.each(lambda g, h, f: g * slope(h) * f, "vvv")
    of_multiplier = v.each(lambda g, h: g * activate(h), "vv")

    @v.inline
    def backward(cell, column, arrays, a):
        """The gradients of the elements from ``cell`` on; that of the input."""
        dy, x, input_bias, multiplier, words, dx, dmultiplier = arrays
        zeros = spread(zero)
        g = load_residual(dy + cell * residual_item)
        h = data_or(zeros, x, cell)
        b = numbers_or(zeros, input_bias, column)
        f = data_or(spread(one), multiplier, cell)
        bits = bits_at(words, cell)
        g, h = times(g, a), plus(h, b)
        result = kept(bits, of_input(g, h, f))
        if dmultiplier:
            store_data(dmultiplier + cell * item, kept(bits, of_multiplier(g, h)))
        if dx:
            store_data(dx + cell * item, result)
        return result

    return backward


def _walk(v: Any) -> Any:
    warps, lane_index, count = warp_counter(v), v.lane, U(v.count)

    @v.inline
    def walk(first, columns):
        """Of this warp: its first element from ``first`` on, and how far the next ones are; of this thread: its first
        element's column, and how far the next one's is, round the row."""
        warp_first, threads = warps()
        begin, step = first + warp_first * count, threads * count
        return begin, step, (begin + U(lane_index()) * count) % columns, step % columns

    return walk


def _forward_over(v: Any, activation: int) -> Any:
    walk, forward, gather = _walk(v), _forward(v, activation), v.gather
    lane_index, store_word, count, has_signs = v.lane, v.store_word, U(v.count), activation == RELU

    @v.inline
    def over(first, end, arrays, signs, columns, a):
        begin, step, column, column_step = walk(first, columns)
        while begin < end:  # whole warps, since lanes put their bits together
            cell, bits = begin + U(lane_index()) * count, U(0)
            if cell < end:
                bits = forward(cell, column, arrays, a)
            if has_signs and signs:
                word = gather(bits, lane_index())
                if cell < end and cell & LOW_5 == U(0):
                    store_word(signs + (cell >> WORD_SHIFT) * WORD_BYTES, word)
            begin += step
            column += column_step
            if column >= columns:
                column -= columns

    return over


def pointwise_forward(wide: Any, narrow: Any, activation: int) -> Any:
    over_vectors, over_items = _forward_over(wide, activation), _forward_over(narrow, activation)

    def kernel(x, input_bias, multiplier, residual, words, y, signs, n, columns, whole, a):
        """``whole`` elements in vectors, full words of them; what is left one by one."""
        arrays = x, input_bias, multiplier, residual, words, y
        over_vectors(U(0), whole, arrays, signs, columns, a)
        over_items(whole, n, arrays, signs, columns, a)

    return kernel


def _backward_over(v: Any, activation: int) -> Any:
    walk, backward, lane_index, count = _walk(v), _backward(v, activation), v.lane, U(v.count)

    @v.inline
    def over(first, end, arrays, columns, a):
        begin, step, column, column_step = walk(first, columns)
        cell = begin + U(lane_index()) * count
        while cell < end:
            backward(cell, column, arrays, a)
            cell += step
            column += column_step
            if column >= columns:
                column -= columns

    return over


def pointwise_backward(wide: Any, narrow: Any, activation: int) -> Any:
    over_vectors, over_items = _backward_over(wide, activation), _backward_over(narrow, activation)

    def kernel(dy, x, input_bias, multiplier, words, dx, dmultiplier, n, columns, whole, a):
        arrays = dy, x, input_bias, multiplier, words, dx, dmultiplier
        over_vectors(U(0), whole, arrays, columns, a)
        over_items(whole, n, arrays, columns, a)

    return kernel


def pointwise_columns(v: Any, activation: int) -> Any:
    (tasks, task_of), own_warp, over_warps, warps = tasks_of(v), warp_number(v), sum_over_warps(v), U(v.team_warps)
    block_index, blocks, spread, store_numbers = v.block, v.blocks, v.spread, v.store_numbers
    backward, (plus, _) = _backward(v, activation), arithmetic(v)
    number_item, zero = U(v.number_bytes), v.number(0)

    def kernel(dy, x, input_bias, multiplier, words, dx, dmultiplier, sums, rows, columns, panels, width, a):
        """`pointwise_backward`, and the sum of dx by columns; ``width`` is from one panel's to the next one's."""
        arrays = dy, x, input_bias, multiplier, words, dx, dmultiplier
        warp = own_warp()
        number, end = U(block_index()), tasks(columns, panels)
        while number < end:
            panel, row, stop, column = task_of(number, rows, columns, panels)
            row += warp
            total = spread(zero)
            if column < columns:
                while row < stop:
                    total = plus(total, backward(row * columns + column, column, arrays, a))
                    row += warps
            total = over_warps(total)
            if warp == U(0) and column < columns:
                store_numbers(sums + (panel * width + column) * number_item, total)
            number += U(blocks())

    return kernel


def add_panels(v: Any) -> Any:
    threads_of, load_number, store_number = thread_counter(v), v.load_number, v.store_number
    item = U(v.number_bytes)

    def kernel(sums, panels, width):
        """A thread per column: all lines into the first."""
        i, threads = threads_of()
        while i < width:
            total, panel = load_number(sums + i * item), ONE
            while panel < panels:
                total += load_number(sums + (panel * width + i) * item)
                panel += ONE
            store_number(sums + i * item, total)
            i += threads

    return kernel

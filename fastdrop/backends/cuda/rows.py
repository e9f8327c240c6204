"""The bodies of the CUDA kernels for the fused primitives, each once, in the words of `row_words`.

Data is read under mask words that were drawn before. A thread takes 16 bytes of data where all memory allows, else an
element. What a call has not is address 0: all threads alike then pass over the load.

Flat (``pointwise_forward``, ``pointwise_backward``): threads side by side take elements side by side. Rows (``norm_*``,
``softmax_*``): a warp takes a short row, a block a long one, however long: values are not held but read again, which
the first-level cache has by then, and are computed anew. Columns (``*_columns``): a block takes 32 threads' columns of
a panel of rows; its warps take rows in turn and add up what they have, and ``add_panels`` adds the panels. The shape
alone decides the order of all sums, and nothing is atomic.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...core.activations import RELU
from ..numba.math import curves
from .mask import LANES, LOW_5, ONE, WORD_BYTES, WORD_SHIFT, U, thread_counter, warp_counter

TWO, ALL = U(2), U(0xFFFFFFFF)


def _loads(v: Any) -> Any:
    """Loads of what may not be there: data, numbers of the residual stream, of the arithmetic; and bits."""
    load_data, load_sums, load_numbers, load_word = v.load_data, v.load_sums, v.load_numbers, v.load_word
    item, sum_item, number_item = U(v.item_bytes), U(v.residual_bytes), U(v.number_bytes)

    @v.inline
    def data_or(otherwise, address, cell):
        if address:
            return load_data(address + cell * item)
        return otherwise

    @v.inline
    def sums_or(otherwise, address, cell):
        if address:
            return load_sums(address + cell * sum_item)
        return otherwise

    @v.inline
    def numbers_or(otherwise, address, cell):
        if address:
            return load_numbers(address + cell * number_item)
        return otherwise

    @v.inline
    def bits_at(words, cell):
        """Bits of a vector, which lie in one word."""
        if words:
            return U(load_word(words + (cell >> WORD_SHIFT) * WORD_BYTES)) >> (cell & LOW_5)
        return ALL

    return data_or, sums_or, numbers_or, bits_at


def _arithmetic(v: Any) -> Any:
    """Of vectors: the sum of two, one times a number."""
    return v.each(lambda a, b: a + b, "vv"), v.each(lambda a, b: a * b, "vn")


# ---- flat ----


def _forward(v: Any, activation: int) -> Any:
    data_or, sums_or, numbers_or, bits_at = _loads(v)
    load_data, store_sums, kept, above, spread = v.load_data, v.store_sums, v.kept, v.above, v.spread
    item, sum_item, zero, one = U(v.item_bytes), U(v.residual_bytes), v.number(0), v.number(1)
    activate = curves(v.doubles).activations[activation]
    plus, _ = _arithmetic(v)
    value = v.each(lambda h, f, a: activate(h) * f * a, "vvn")

    @v.inline
    def forward(cell, column, x, input_bias, multiplier, residual, words, y, a):
        """The elements from ``cell`` on; the bits of those kept and not at or below 0."""
        zeros = spread(zero)
        h = load_data(x + cell * item)
        b = numbers_or(zeros, input_bias, column)
        f = data_or(spread(one), multiplier, cell)
        r = sums_or(zeros, residual, cell)
        bits = bits_at(words, cell)
        h = plus(h, b)
        store_sums(y + cell * sum_item, plus(kept(bits, value(h, f, a)), r))
        return bits & U(above(h))

    return forward


def _backward(v: Any, activation: int) -> Any:
    data_or, _, numbers_or, bits_at = _loads(v)
    load_sums, store_data, kept, spread = v.load_sums, v.store_data, v.kept, v.spread
    item, sum_item, zero, one = U(v.item_bytes), U(v.residual_bytes), v.number(0), v.number(1)
    functions = curves(v.doubles)
    activate, slope = functions.activations[activation], functions.slopes[activation]
    plus, times = _arithmetic(v)
    of_input = v.each(lambda g, h, f: g * slope(h) * f, "vvv")
    of_multiplier = v.each(lambda g, h: g * activate(h), "vv")

    @v.inline
    def backward(cell, column, dy, x, input_bias, multiplier, words, dx, dmultiplier, a):
        """The gradients of the elements from ``cell`` on; that of the input."""
        zeros = spread(zero)
        g = load_sums(dy + cell * sum_item)
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
    def over(first, end, x, input_bias, multiplier, residual, words, y, signs, columns, a):
        begin, step, column, column_step = walk(first, columns)
        while begin < end:  # whole warps, since lanes put their bits together
            cell, bits = begin + U(lane_index()) * count, U(0)
            if cell < end:
                bits = forward(cell, column, x, input_bias, multiplier, residual, words, y, a)
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
        over_vectors(U(0), whole, x, input_bias, multiplier, residual, words, y, signs, columns, a)
        over_items(whole, n, x, input_bias, multiplier, residual, words, y, signs, columns, a)

    return kernel


def _backward_over(v: Any, activation: int) -> Any:
    walk, backward, lane_index, count = _walk(v), _backward(v, activation), v.lane, U(v.count)

    @v.inline
    def over(first, end, dy, x, input_bias, multiplier, words, dx, dmultiplier, columns, a):
        begin, step, column, column_step = walk(first, columns)
        cell = begin + U(lane_index()) * count
        while cell < end:
            backward(cell, column, dy, x, input_bias, multiplier, words, dx, dmultiplier, a)
            cell += step
            column += column_step
            if column >= columns:
                column -= columns

    return over


def pointwise_backward(wide: Any, narrow: Any, activation: int) -> Any:
    over_vectors, over_items = _backward_over(wide, activation), _backward_over(narrow, activation)

    def kernel(dy, x, input_bias, multiplier, words, dx, dmultiplier, n, columns, whole, a):
        over_vectors(U(0), whole, dy, x, input_bias, multiplier, words, dx, dmultiplier, columns, a)
        over_items(whole, n, dy, x, input_bias, multiplier, words, dx, dmultiplier, columns, a)

    return kernel


# ---- columns ----


def _tasks(v: Any) -> Any:
    lane_index, count, width = v.lane, U(v.count), LANES * U(v.count)

    @v.inline
    def tasks(columns, panels):
        """How many a kernel has: a panel's columns of 32 threads are one."""
        return (columns + width - ONE) // width * panels

    @v.inline
    def task(number, rows, columns, panels):
        """The panel, its first row, the one after its last; this thread's first column."""
        tiles = (columns + width - ONE) // width
        panel = number // tiles
        size, longer = rows // panels, rows % panels
        begin = panel * size + min(panel, longer)
        end = begin + size
        if panel < longer:
            end += ONE
        return panel, begin, end, (number - panel * tiles) * width + U(lane_index()) * count

    return tasks, task


def _own_warp(v: Any) -> Any:
    thread_index, uniform = v.thread, v.uniform

    @v.inline
    def own_warp():
        """This warp's number in its block."""
        return U(uniform(thread_index() >> 5))

    return own_warp


def _over_warps(v: Any) -> Any:
    own_warp, lane_index, share, shared, meet = _own_warp(v), v.lane, v.share, v.shared, v.meet
    warps, (plus, _) = U(v.team_warps), _arithmetic(v)

    @v.inline
    def over_warps(vector):
        """The sum of what the threads of this lane hold, one in each of the block's warps."""
        lane = U(lane_index())
        share(own_warp() * LANES + lane, vector)
        meet()
        total, warp = shared(lane), ONE
        while warp < warps:
            total = plus(total, shared(warp * LANES + lane))
            warp += ONE
        meet()
        return total

    return over_warps


def pointwise_columns(v: Any, activation: int) -> Any:
    (tasks, task_of), own_warp, over_warps, warps = _tasks(v), _own_warp(v), _over_warps(v), U(v.team_warps)
    block_index, blocks, spread, store_numbers = v.block, v.blocks, v.spread, v.store_numbers
    backward, (plus, _) = _backward(v, activation), _arithmetic(v)
    number_item, zero = U(v.number_bytes), v.number(0)

    def kernel(dy, x, input_bias, multiplier, words, dx, dmultiplier, sums, rows, columns, panels, width, a):
        """`pointwise_backward`, and the sum of dx by columns; ``width`` is from one panel's to the next one's."""
        warp = own_warp()
        number, end = U(block_index()), tasks(columns, panels)
        while number < end:
            panel, row, stop, column = task_of(number, rows, columns, panels)
            row += warp
            total = spread(zero)
            if column < columns:
                while row < stop:
                    cell = row * columns + column
                    total = plus(
                        total, backward(cell, column, dy, x, input_bias, multiplier, words, dx, dmultiplier, a)
                    )
                    row += warps
            total = over_warps(total)
            if warp == U(0) and column < columns:
                store_numbers(sums + (panel * width + column) * number_item, total)
            number += U(blocks())

    return kernel


def norm_columns(v: Any) -> Any:
    (tasks, task_of), own_warp, over_warps, warps = _tasks(v), _own_warp(v), _over_warps(v), U(v.team_warps)
    block_index, blocks, spread, store_numbers = v.block, v.blocks, v.spread, v.store_numbers
    load_data, load_sums, load_number, (plus, _) = v.load_data, v.load_sums, v.load_number, _arithmetic(v)
    item, sum_item, number_item, zero = U(v.item_bytes), U(v.residual_bytes), U(v.number_bytes), v.number(0)
    add_normal = v.each(lambda total, g, s, mean, rstd: total + g * ((s - mean) * rstd), "vvvnn")

    def kernel(dy, residual_out, statistics, sums, rows, columns, panels):
        """The gradients of a norm's weight and shift, the first two lines of a panel's three."""
        warp = own_warp()
        number, end = U(block_index()), tasks(columns, panels)
        while number < end:
            panel, row, stop, column = task_of(number, rows, columns, panels)
            row += warp
            of_weight, of_norm_bias = spread(zero), spread(zero)
            if column < columns:
                while row < stop:
                    cell = row * columns + column
                    g, s = load_data(dy + cell * item), load_sums(residual_out + cell * sum_item)
                    mean = load_number(statistics + row * TWO * number_item)
                    rstd = load_number(statistics + (row * TWO + ONE) * number_item)
                    of_weight = add_normal(of_weight, g, s, mean, rstd)
                    of_norm_bias = plus(of_norm_bias, g)
                    row += warps
            of_weight = over_warps(of_weight)
            of_norm_bias = over_warps(of_norm_bias)
            if warp == U(0) and column < columns:
                at = sums + (panel * U(3) * columns + column) * number_item
                store_numbers(at, of_weight)
                store_numbers(at + columns * number_item, of_norm_bias)
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


# ---- rows ----


def _teams(v: Any) -> Any:
    warps, lane_index = warp_counter(v), v.lane
    thread_index, block_index, blocks, block_threads = v.thread, v.block, v.blocks, v.block_threads
    count = U(v.count)

    @v.inline
    def team(by_block):
        """This team's first row, how far the next one is; this thread's first column, how far the next one is.

        A team is a block or a warp.
        """
        if by_block:
            return U(block_index()), U(blocks()), U(thread_index()) * count, U(block_threads()) * count
        first, threads = warps()
        return first >> WORD_SHIFT, threads >> WORD_SHIFT, U(lane_index()) * count, LANES * count

    return team


def _over_team(v: Any, join: Callable[..., Any]) -> Any:
    lane_index, across, warps = v.lane, v.across, U(v.team_warps)
    thread_index, share, shared, meet, join = v.thread, v.share_number, v.shared_number, v.meet, v.inline(join)

    @v.inline
    def over_team(value, by_block):
        """What joins the numbers of all threads, the same in each of them."""
        value = join(value, across(value, 16))
        value = join(value, across(value, 8))
        value = join(value, across(value, 4))
        value = join(value, across(value, 2))
        value = join(value, across(value, 1))
        if by_block:
            if lane_index() == 0:
                share(U(thread_index()) >> WORD_SHIFT, value)
            meet()
            value, warp = shared(0), ONE
            while warp < warps:
                value = join(value, shared(warp))
                warp += ONE
            meet()
        return value

    return over_team


def norm_forward(v: Any) -> Any:
    _, sums_or, numbers_or, bits_at = _loads(v)
    team, row_sum, total, (plus, times) = _teams(v), _over_team(v, lambda a, b: a + b), v.total, _arithmetic(v)
    load_data, store_data, store_sums, store_number = v.load_data, v.store_data, v.store_sums, v.store_number
    kept, rounded, spread, root = v.kept, v.rounded, v.spread, v.number_root
    item, sum_item, number_item = U(v.item_bytes), U(v.residual_bytes), U(v.number_bytes)
    number, zero, one = v.number, v.number(0), v.number(1)
    add_square = v.each(lambda total, s, mean: total + (s - mean) * (s - mean), "vvn")
    normal = v.each(lambda s, mean, rstd, w, b: (s - mean) * rstd * w + b, "vnnvv")

    @v.inline
    def summed(cell, column, x, input_bias, residual, words, a):
        """Elements of the sum, as they are stored."""
        zeros = spread(zero)
        h = load_data(x + cell * item)
        b = numbers_or(zeros, input_bias, column)
        r = sums_or(zeros, residual, cell)
        bits = bits_at(words, cell)
        return rounded(plus(kept(bits, times(plus(h, b), a)), r))

    def kernel(
        x,
        input_bias,
        residual,
        words,
        weight,
        norm_bias,
        y,
        residual_out,
        statistics,
        rows,
        columns,
        by_block,
        centred,
        a,
        eps,
    ):
        row, row_step, first, step = team(by_block)
        extent = number(columns)
        while row < rows:
            begin = row * columns
            mean = zero
            if centred:
                found, column = spread(zero), first
                while column < columns:
                    found = plus(found, summed(begin + column, column, x, input_bias, residual, words, a))
                    column += step
                mean = row_sum(total(found), by_block) / extent
            found, column = spread(zero), first
            while column < columns:
                s = summed(begin + column, column, x, input_bias, residual, words, a)
                found = add_square(found, s, mean)
                column += step
            rstd = one / root(row_sum(total(found), by_block) / extent + eps)
            column = first
            while column < columns:
                cell = begin + column
                w = numbers_or(spread(one), weight, column)
                b = numbers_or(spread(zero), norm_bias, column)
                s = summed(cell, column, x, input_bias, residual, words, a)
                store_sums(residual_out + cell * sum_item, s)
                store_data(y + cell * item, normal(s, mean, rstd, w, b))
                column += step
            if first == U(0):
                store_number(statistics + row * TWO * number_item, mean)
                store_number(statistics + (row * TWO + ONE) * number_item, rstd)
            row += row_step

    return kernel


def norm_backward(v: Any) -> Any:
    _, sums_or, numbers_or, bits_at = _loads(v)
    team, row_sum, total, (plus, times) = _teams(v), _over_team(v, lambda a, b: a + b), v.total, _arithmetic(v)
    load_data, load_sums, load_number = v.load_data, v.load_sums, v.load_number
    store_data, store_sums, kept, spread = v.store_data, v.store_sums, v.kept, v.spread
    item, sum_item, number_item = U(v.item_bytes), U(v.residual_bytes), U(v.number_bytes)
    number, zero, one = v.number, v.number(0), v.number(1)
    weighted = v.each(lambda g, w: g * w, "vv")
    add_normal = v.each(lambda total, g, s, mean, rstd: total + g * ((s - mean) * rstd), "vvvnn")
    slope_of = v.each(
        lambda g, s, d, mean, rstd, of_g, of_normal: (g - of_g - (s - mean) * rstd * of_normal) * rstd + d, "vvvnnnn"
    )

    def kernel(
        dy, dresidual_out, residual_out, statistics, weight, words, dx, dresidual, rows, columns, by_block, centred, a
    ):
        row, row_step, first, step = team(by_block)
        extent = number(columns)
        while row < rows:
            begin = row * columns
            mean = load_number(statistics + row * TWO * number_item)
            rstd = load_number(statistics + (row * TWO + ONE) * number_item)
            plain, by_normal, column = spread(zero), spread(zero), first
            while column < columns:
                cell = begin + column
                g, s = load_data(dy + cell * item), load_sums(residual_out + cell * sum_item)
                g = weighted(g, numbers_or(spread(one), weight, column))
                plain, by_normal = plus(plain, g), add_normal(by_normal, g, s, mean, rstd)
                column += step
            of_normal = row_sum(total(by_normal), by_block) / extent
            of_g = zero
            if centred:
                of_g = row_sum(total(plain), by_block) / extent
            column = first
            while column < columns:
                cell = begin + column
                g, s = load_data(dy + cell * item), load_sums(residual_out + cell * sum_item)
                d, bits = sums_or(spread(zero), dresidual_out, cell), bits_at(words, cell)
                g = weighted(g, numbers_or(spread(one), weight, column))
                slope = slope_of(g, s, d, mean, rstd, of_g, of_normal)
                if dresidual:
                    store_sums(dresidual + cell * sum_item, slope)
                if dx:
                    store_data(dx + cell * item, kept(bits, times(slope, a)))
                column += step
            row += row_step

    return kernel


def softmax_forward(v: Any) -> Any:
    _, _, numbers_or, bits_at = _loads(v)
    team, total, most, (plus, times) = _teams(v), v.total, v.most, _arithmetic(v)
    row_sum, row_most = _over_team(v, lambda a, b: a + b), _over_team(v, lambda a, b: b if b > a else a)
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
    _, _, _, bits_at = _loads(v)
    team, row_sum, total, (_, times) = _teams(v), _over_team(v, lambda a, b: a + b), v.total, _arithmetic(v)
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


FLAT = pointwise_forward, pointwise_backward
ALONE = norm_columns, add_panels, norm_forward, norm_backward, softmax_forward, softmax_backward


def build(vocabulary: Callable[[bool], Any], body: str, form: str, activation: int) -> Any:
    """The Python function of a kernel, in the vocabularies of vectors and of elements."""
    for make in FLAT:
        if body == make.__name__:
            return make(vocabulary(True), vocabulary(False), activation)
    v = vocabulary(form == "wide")
    if body == "pointwise_columns":
        return pointwise_columns(v, activation)
    return {make.__name__: make for make in ALONE}[body](v)

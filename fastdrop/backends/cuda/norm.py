"""The bodies of the CUDA kernels for norms by rows, and their gradients.

`compile` makes kernels of them; a body is written in the words of `vector_intrinsics`. A warp takes a short row, a
block a long one, however long. The values of a row are not held but read again and computed anew, because the
first-level cache has them by then.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from typing import Any

from .teams import ONE, TWO, U, arithmetic, loads, over_team, sum_over_warps, tasks_of, teams, warp_number


def norm_columns(v: Any) -> Any:
    (tasks, task_of), own_warp, over_warps, warps = tasks_of(v), warp_number(v), sum_over_warps(v), U(v.team_warps)
    block_index, blocks, spread, store_numbers = v.block, v.blocks, v.spread, v.store_numbers
    load_data, load_residual, load_number, (plus, _) = v.load_data, v.load_residual, v.load_number, arithmetic(v)
    item, residual_item, number_item, zero = U(v.item_bytes), U(v.residual_bytes), U(v.number_bytes), v.number(0)
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
                    g, s = load_data(dy + cell * item), load_residual(residual_out + cell * residual_item)
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


def norm_forward(v: Any) -> Any:
    _, residual_or, numbers_or, bits_at = loads(v)
    team, row_sum, total, (plus, times) = teams(v), over_team(v, lambda a, b: a + b), v.total, arithmetic(v)
    load_data, store_data, store_residual, store_number = v.load_data, v.store_data, v.store_residual, v.store_number
    kept, rounded, spread, root = v.kept, v.rounded, v.spread, v.number_root
    item, residual_item, number_item = U(v.item_bytes), U(v.residual_bytes), U(v.number_bytes)
    number, zero, one = v.number, v.number(0), v.number(1)
    add_square = v.each(lambda total, s, mean: total + (s - mean) * (s - mean), "vvn")
    normal = v.each(lambda s, mean, rstd, w, b: (s - mean) * rstd * w + b, "vnnvv")

    @v.inline
    def summed(cell, column, x, input_bias, residual, words, a):
        """Elements of the sum, as they are stored."""
        zeros = spread(zero)
        h = load_data(x + cell * item)
        b = numbers_or(zeros, input_bias, column)
        r = residual_or(zeros, residual, cell)
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
                store_residual(residual_out + cell * residual_item, s)
                store_data(y + cell * item, normal(s, mean, rstd, w, b))
                column += step
            if first == U(0):
                store_number(statistics + row * TWO * number_item, mean)
                store_number(statistics + (row * TWO + ONE) * number_item, rstd)
            row += row_step

    return kernel


def norm_backward(v: Any) -> Any:
    _, residual_or, numbers_or, bits_at = loads(v)
    team, row_sum, total, (plus, times) = teams(v), over_team(v, lambda a, b: a + b), v.total, arithmetic(v)
    load_data, load_residual, load_number = v.load_data, v.load_residual, v.load_number
    store_data, store_residual, kept, spread = v.store_data, v.store_residual, v.kept, v.spread
    item, residual_item, number_item = U(v.item_bytes), U(v.residual_bytes), U(v.number_bytes)
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
                g, s = load_data(dy + cell * item), load_residual(residual_out + cell * residual_item)
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
                g, s = load_data(dy + cell * item), load_residual(residual_out + cell * residual_item)
                d, bits = residual_or(spread(zero), dresidual_out, cell), bits_at(words, cell)
                g = weighted(g, numbers_or(spread(one), weight, column))
                slope = slope_of(g, s, d, mean, rstd, of_g, of_normal)
                if dresidual:
                    store_residual(dresidual + cell * residual_item, slope)
                if dx:
                    store_data(dx + cell * item, kept(bits, times(slope, a)))
                column += step
            row += row_step

    return kernel

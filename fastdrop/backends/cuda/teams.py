"""How the threads of a CUDA kernel share its work; the kernels of `mask`, `pointwise`, `norm` and `softmax` use it.

Each function here takes a vocabulary (`intrinsics`, `vector_intrinsics`) and returns device functions. Work is shared
in one of three ways. Elements: threads side by side take elements side by side. Rows: a warp takes a short row, a block
a long one; together they are called a team. Columns: a block takes 32 threads' columns of a panel of rows, and its
warps take the rows in turn.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import tile

U = np.uint64
ONE, TWO, WORD_SHIFT, LOW_5, ALL = U(1), U(2), U(5), U(31), U(0xFFFFFFFF)
WORD_BYTES, LANES = U(4), U(tile.LANES)


# ---- elements ----


def thread_counter(v: Any) -> Any:
    thread_index, block_index, blocks, block_threads = v.thread, v.block, v.blocks, v.block_threads

    @v.inline
    def threads():
        """(this thread's number, how many there are)."""
        return U(block_index()) * U(block_threads()) + U(thread_index()), U(blocks()) * U(block_threads())

    return threads


def warp_counter(v: Any) -> Any:
    thread_index, block_index, blocks, block_threads = v.thread, v.block, v.blocks, v.block_threads
    uniform = v.uniform

    @v.inline
    def warps():
        """(number of this warp's first thread, how many threads there are)."""
        first = U(block_index()) * U(block_threads()) + (U(uniform(thread_index() >> 5)) << WORD_SHIFT)
        return first, U(blocks()) * U(block_threads())

    return warps


# ---- what kernels on rows read and add ----


def loads(v: Any) -> Any:
    """Loads of what may not be there: data, numbers of the residual stream, of the arithmetic; and bits."""
    load_data, load_residual, load_numbers, load_word = v.load_data, v.load_residual, v.load_numbers, v.load_word
    item, residual_item, number_item = U(v.item_bytes), U(v.residual_bytes), U(v.number_bytes)

    @v.inline
    def data_or(otherwise, address, cell):
        if address:
            return load_data(address + cell * item)
        return otherwise

    @v.inline
    def residual_or(otherwise, address, cell):
        if address:
            return load_residual(address + cell * residual_item)
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

    return data_or, residual_or, numbers_or, bits_at


def arithmetic(v: Any) -> Any:
    """Of vectors: the sum of two, one times a number."""
    return v.each(lambda a, b: a + b, "vv"), v.each(lambda a, b: a * b, "vn")


# ---- columns ----


def tasks_of(v: Any) -> Any:
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


def warp_number(v: Any) -> Any:
    thread_index, uniform = v.thread, v.uniform

    @v.inline
    def own_warp():
        """This warp's number in its block."""
        return U(uniform(thread_index() >> 5))

    return own_warp


def sum_over_warps(v: Any) -> Any:
    own_warp, lane_index, share, shared, meet = warp_number(v), v.lane, v.share, v.shared, v.meet
    warps, (plus, _) = U(v.team_warps), arithmetic(v)

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


# ---- rows ----


def teams(v: Any) -> Any:
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


def over_team(v: Any, join: Callable[..., Any]) -> Any:
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

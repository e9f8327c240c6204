"""The bodies of the CUDA kernels for masks and plain dropout.

`compile` makes kernels of them; a body is written in the words of a vocabulary (`intrinsics`).

draw_words
    A thread draws a word.
draw_rows
    A thread makes a word of the output: it draws each word of the mask that has some of its bits.
elementwise
    A warp takes a tile of 1,024 cells: lane ``l`` draws or loads word ``l``, then the warp sweeps the tile.
strided
    A thread takes a vector or an element, whose cells lie at any strides: for masks that are shared along axes, and for
    data whose order in memory is not the mask's.
gaussian_multiply
    A thread draws four normal numbers and takes their elements.
dilate_bits
    A thread makes a word.
count_bits
    A thread counts the bits of several words; then its warp adds once.

Numbers of tiles, words and bytes have 64 bits. Elements of strided data are numbered with 32, because each number is
divided by the extents; the launcher splits larger data.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from typing import Any

import numpy as np

from ...core import random as stream
from ...core.random import GROUP_SHIFT, LOW, MASK_DOMAIN, NOISE_DOMAIN, PLANES_PER_GROUP
from ..numba.scalars import decide_group, normal_pair, philox
from . import tile as shares
from .teams import LANES, LOW_5, ONE, WORD_BYTES, WORD_SHIFT, U, thread_counter, warp_counter

HALF, LOW_32 = U(32), U(LOW)
DOMAIN, NOISE, GROUP_AT = U(MASK_DOMAIN), U(NOISE_DOMAIN), U(GROUP_SHIFT)
VECTOR_BYTES, BATCH = U(shares.VECTOR_BYTES), U(shares.BATCH)
TILE, TILE_SHIFT = U(shares.TILE_CELLS), U(shares.TILE_CELLS.bit_length() - 1)
NOISE_CELLS, NOISE_COUNTERS = U(stream.NOISE_CELLS), U(stream.NOISE_COUNTERS)  # of a tile of noise


def _drawing(v: Any) -> Any:
    any_lane, plane_mask, philox_planes = v.any_lane, v.plane_mask, philox(v.multiply)

    @v.inline
    def draw(word, state, threshold, groups):
        """A mask word of each lane, group by group until no lane of the warp has an undecided cell left."""
        k0, k1, o0, o1 = state
        c1 = (word >> HALF) | DOMAIN
        keep, undecided = ~U(0), ~U(0)
        t, group = threshold, np.uint32(0)
        while group < groups:
            r0, r1, r2, r3 = philox_planes(word, c1 | (U(group) << GROUP_AT), o0, o1, k0, k1)
            t0, t1, t2, t3 = U(plane_mask(t, 0)), U(plane_mask(t, 1)), U(plane_mask(t, 2)), U(plane_mask(t, 3))
            decided, equal = decide_group(r0, r1, r2, r3, t0, t1, t2, t3)
            keep &= decided | ~undecided
            undecided &= equal
            if not any_lane((undecided & LOW_32) != U(0)):
                break
            group = np.uint32(group + 1)
            t = np.uint32(t << PLANES_PER_GROUP)
        return keep & LOW_32

    return draw


def _states(v: Any) -> Any:
    load_long = v.load_long

    @v.inline
    def state_of(seed, seed_at, offset):
        """Key and offset in halves; of the seed itself, or of the one that lies at an address."""
        if seed_at:
            seed = load_long(seed_at)
        return seed & LOW_32, seed >> HALF, offset & LOW_32, offset >> HALF

    return state_of


def draw_words(v: Any) -> Any:
    draw, state_of, warps = _drawing(v), _states(v), warp_counter(v)
    lane_index, load_word, store_word = v.lane, v.load_word, v.store_word

    def kernel(words, position, first, n, seed, seed_at, offset, threshold, groups):
        """Bits of cells first .. first+n-1, to bits position .. position+n-1 of words, a thread per word written."""
        state = state_of(seed, seed_at, offset)
        lead = position & LOW_5
        shift = (first - lead) & LOW_5
        # Where the first word begins before cell 0 this wraps: its bits are not ours, and the next one, 2**59, has the
        # counter of word 0, since the bit above a word's 59 is the domain's.
        begin = (first - lead) >> WORD_SHIFT
        count = (lead + n + LOW_5) >> WORD_SHIFT
        at = words + (position >> WORD_SHIFT) * WORD_BYTES
        warp_first, step = warps()
        while warp_first < count:  # whole warps, since lanes vote
            i = warp_first + U(lane_index())
            word = draw(begin + i, state, threshold, groups)
            if shift:
                high = draw(begin + i + ONE, state, threshold, groups)
                word = ((word | (high << HALF)) >> shift) & LOW_32
            if i < count:
                end = lead + n - (i << WORD_SHIFT)
                if end < HALF:
                    word &= (ONE << end) - ONE
                if i == U(0) and lead:
                    below = (ONE << lead) - ONE
                    word = (word & ~below) | (U(load_word(at)) & below)
                store_word(at + i * WORD_BYTES, word)
            warp_first += step

    return kernel


def draw_rows(v: Any) -> Any:
    draw, state_of, warps = _drawing(v), _states(v), warp_counter(v)
    any_lane, multiply_high = v.any_lane, v.multiply_high
    lane_index, load_word, store_word = v.lane, v.load_word, v.store_word

    @v.inline
    def divide(number, extent, multiplier, shift):
        """(quotient, remainder)"""
        quotient = multiply_high(number << ONE, multiplier) >> shift
        return quotient, number - quotient * extent

    @v.inline
    def gather(element, bit, end, first, axes, drawing):
        """Bits bit .. end-1 of a lane's word, from an element on. A mask word is drawn at a time, by all lanes until
        none has a bit left."""
        columns, by_columns, shift, rows, by_rows, row_shift, pitch, outer_pitch = axes
        row, column = divide(element, columns, by_columns, shift)
        outer, r = divide(row, rows, by_rows, row_shift)
        start = first + outer * outer_pitch
        at, word = start + r * pitch, U(0)
        while any_lane(bit < end):
            cell = at + column
            n = min(min(columns - column, HALF - (cell & LOW_5)), end - bit)
            drawn = draw(cell >> WORD_SHIFT, drawing[0], drawing[1], drawing[2]) >> (cell & LOW_5)
            word |= (drawn & ((ONE << n) - ONE)) << bit
            bit += n
            column += n
            if column == columns:
                column = U(0)
                r += ONE
                at += pitch
                if r == rows:
                    start += outer_pitch
                    at, r = start, U(0)
        return word

    def kernel(words, position, first, n, e0, m0, s0, e1, m1, s1, c1, c2, seed, seed_at, offset, threshold, groups):
        """Bits of n cells of rows, a thread per word written. Extents and strides of axes, as of `strided`, but those
        of columns are 1."""
        drawing = state_of(seed, seed_at, offset), threshold, groups
        axes = e0, m0, s0, e1, m1, s1, c1, c2
        lead = position & LOW_5
        count = (lead + n + LOW_5) >> WORD_SHIFT
        to = words + (position >> WORD_SHIFT) * WORD_BYTES
        warp_first, step = warps()
        while warp_first < count:  # whole warps, since lanes vote
            i = warp_first + U(lane_index())
            bit = U(0) if i else lead
            end = min(lead + n - (i << WORD_SHIFT), HALF) if i < count else bit
            word = gather((i << WORD_SHIFT) + bit - lead, bit, end, first, axes, drawing)
            if i < count:
                if i == U(0) and lead:
                    word |= U(load_word(to)) & ((ONE << lead) - ONE)
                store_word(to + i * WORD_BYTES, word)
            warp_first += step

    return kernel


def elementwise(v: Any, source: str) -> Any:
    draw, state_of, warps = _drawing(v), _states(v), warp_counter(v)
    drawn, shifted = source != "stored", source == "drawn_shifted"
    item, lane_index, load_word, store_word, scale_of = U(v.item_bytes), v.lane, v.load_word, v.store_word, v.scale
    load_tile, store_tile, load_batch, store_batch = v.load_tile, v.store_tile, v.load_batch, v.store_batch

    @v.inline
    def word_of(tile, words, first, n, state, threshold, groups):
        """The lane's word of the tile: drawn, or read from words, where element 0 has bit ``first``."""
        index = (tile << WORD_SHIFT) + U(lane_index())
        if drawn:
            word = draw((first >> WORD_SHIFT) + index, state, threshold, groups)
            if shifted:
                high = draw((first >> WORD_SHIFT) + index + ONE, state, threshold, groups)
                word = ((word | (high << HALF)) >> (first & LOW_5)) & LOW_32
            return word
        shift = first & LOW_5
        last = (first + n - ONE) >> WORD_SHIFT
        index += first >> WORD_SHIFT
        word = U(load_word(words + min(index, last) * WORD_BYTES))
        if shift:
            high = U(load_word(words + min(index + ONE, last) * WORD_BYTES))
            word = ((word | (high << HALF)) >> shift) & LOW_32
        return word

    def kernel(x, y, words, first, n, whole, seed, seed_at, offset, threshold, groups, kept_at, a, b, c):
        """``whole`` tiles in vectors, what is left element by element; all of it where whole is 0."""
        affine, state = (scale_of(a, kept_at), b, c), state_of(seed, seed_at, offset)
        lane = U(lane_index())
        warp_first, step = warps()
        tile = warp_first >> WORD_SHIFT
        while tile < whole:
            at = tile * (TILE * item) + lane * VECTOR_BYTES
            held = load_tile(x + at)
            word = word_of(tile, words, first, n, state, threshold, groups)
            if drawn and words:
                store_word(words + ((tile << WORD_SHIFT) + lane) * WORD_BYTES, word)
            store_tile(y + at, held, word, affine)
            tile += step >> WORD_SHIFT
        tile = whole + (warp_first >> WORD_SHIFT)
        tiles = (n + TILE - ONE) >> TILE_SHIFT
        while tile < tiles:
            at = tile * (TILE * item)
            valid = min(n - (tile << TILE_SHIFT), TILE)
            word = word_of(tile, words, first, n, state, threshold, groups)
            if drawn and words and (lane << WORD_SHIFT) < valid:
                bits = min(valid - (lane << WORD_SHIFT), HALF)
                store_word(words + ((tile << WORD_SHIFT) + lane) * WORD_BYTES, word & ((ONE << bits) - ONE))
            owner = U(0)
            while owner < LANES:
                batch = load_batch(x + at, owner, valid)
                store_batch(y + at, owner, valid, batch, word, affine)
                owner += BATCH
            tile += step >> WORD_SHIFT

    return kernel


def strided(v: Any, wide: bool) -> Any:
    """Elements in memory order, whose cells lie at strides: extents and strides of up to four axes, innermost first.

    ``wide``: 16 bytes at a time; addresses and the innermost extent must be multiples of them.
    """
    threads_of, load_word, divide, scale_of = thread_counter(v), v.load_word, v.divide, v.scale
    load_vector, store_vector, load_item, store_item = v.load_vector, v.store_vector, v.load_item, v.store_item
    step, item = v.vector_items, U(v.item_bytes)

    @v.inline
    def along(e, axis):
        """How far cells are along an axis for element e, and what number e is without it."""
        extent, multiplier, shift, cells = axis
        outer = divide(e, multiplier, shift)
        return U(e - outer * extent) * cells, outer

    @v.inline
    def cell_of(e, axes, outermost):
        cell0, outer0 = along(e, axes[0])
        cell1, outer1 = along(outer0, axes[1])
        cell2, outer2 = along(outer1, axes[2])
        return cell0 + cell1 + cell2 + U(outer2) * outermost

    @v.inline
    def bit(words, cell):
        return (U(load_word(words + (cell >> WORD_SHIFT) * WORD_BYTES)) >> (cell & LOW_5)) & ONE

    def kernel(x, y, words, position, n, e0, m0, s0, c0, e1, m1, s1, c1, e2, m2, s2, c2, c3, kept_at, a, b, c):
        axes, affine = ((e0, m0, s0, c0), (e1, m1, s1, c1), (e2, m2, s2, c2)), (scale_of(a, kept_at), b, c)
        i, threads = threads_of()
        if wide:
            while i * U(step) < U(n):
                at = i * VECTOR_BYTES
                held = load_vector(x + at)
                cell = position + cell_of(i * U(step), axes, c3)
                if c0 == U(0):
                    bits = U(0) - bit(words, cell)
                elif c0 == ONE:
                    last = cell + U(step) - ONE
                    low = U(load_word(words + (cell >> WORD_SHIFT) * WORD_BYTES))
                    high = U(load_word(words + (last >> WORD_SHIFT) * WORD_BYTES))
                    bits = (low | (high << HALF)) >> (cell & LOW_5)
                else:
                    bits = U(0)
                    for j in range(step):
                        bits |= bit(words, cell + U(j) * c0) << U(j)
                store_vector(y + at, held, bits, affine)
                i += threads
        else:
            while i < U(n):
                held = load_item(x + i * item)
                store_item(y + i * item, held, bit(words, position + cell_of(i, axes, c3)), affine)
                i += threads

    return kernel


def gaussian_multiply(v: Any) -> Any:
    threads_of, state_of = thread_counter(v), _states(v)
    philox_planes, normals = philox(v.multiply), normal_pair(v.plus, v.times, v.root)
    load_four, store_four, plus, times = v.load_four, v.store_four, v.plus, v.times
    item, one, three = U(v.item_bytes), np.float32(1), U(3)

    @v.inline
    def factor(z, sigma):
        return plus(one, times(sigma, z))

    def kernel(x, y, first, n, seed, seed_at, offset, sigma):
        """A thread per counter, whose cells lie 16 apart: threads side by side access elements side by side."""
        k0, k1, o0, o1 = state_of(seed, seed_at, offset)
        thread, threads = threads_of()
        counter = first // NOISE_CELLS * NOISE_COUNTERS + thread
        end = (first + n + NOISE_CELLS - ONE) // NOISE_CELLS * NOISE_COUNTERS
        while counter < end:
            # Counter j of tile t is 16 t + j, its first cell 64 t + j. Before element 0 this wraps: to no element.
            element = (counter << U(2)) - three * (counter & (NOISE_COUNTERS - ONE)) - first
            held = load_four(x + element * item, element, n)
            r0, r1, r2, r3 = philox_planes(counter, (counter >> HALF) | NOISE, o0, o1, k0, k1)
            z0, z1 = normals(U(np.uint32(r0)), U(np.uint32(r1)))  # in which upper halves are seen to be 0
            z2, z3 = normals(U(np.uint32(r2)), U(np.uint32(r3)))
            factors = factor(z0, sigma), factor(z1, sigma), factor(z2, sigma), factor(z3, sigma)
            store_four(y + element * item, element, n, held, factors)
            counter += threads

    return kernel


def dilate_bits(v: Any) -> Any:
    threads_of, multiply_high = thread_counter(v), v.multiply_high
    load_word, store_word = v.load_word, v.store_word

    def kernel(to, words, cells, row, multiplier, shift, length, inner):
        """A thread per word of ``to``: rows of words and-ed with themselves, moved in steps of ``inner``.

        ``row`` and ``length``: bits of a row, there and in words; ``multiplier`` and ``shift`` divide by row.
        """
        i, threads = threads_of()
        while i << WORD_SHIFT < cells:
            cell = i << WORD_SHIFT
            end = min(cell + HALF, cells)
            line = multiply_high(cell << ONE, multiplier) >> shift
            start = cell - line * row
            dropped, at = U(0), U(0)
            while cell + at < end:
                stop = min(start + end - cell - at, row)
                back = U(0)
                while back <= row - length:
                    low, high = max(start, back), min(stop, back + length)
                    if low < high:
                        bit, count = line * length + low - back, high - low
                        bits = U(load_word(words + (bit >> WORD_SHIFT) * WORD_BYTES))
                        bits |= U(load_word(words + ((bit + count - ONE) >> WORD_SHIFT) * WORD_BYTES)) << HALF
                        gone = ~(bits >> (bit & LOW_5)) & ((ONE << count) - ONE)
                        dropped |= gone << (at + low - start)
                    back += inner
                at += stop - start
                line, start = line + ONE, U(0)
            store_word(to + i * WORD_BYTES, ~dropped & ((ONE << (end - cell)) - ONE))
            i += threads

    return kernel


def count_bits(v: Any) -> Any:
    warps, lane_index, load_word = warp_counter(v), v.lane, v.load_word
    ones, sum_lanes, add_long = v.ones, v.sum_lanes, v.add_long

    def kernel(words, count, kept):
        """Adds the 1s of so many words to what lies at ``kept``."""
        warp_first, step = warps()
        found = np.uint32(0)
        while warp_first < count:
            i = warp_first + U(lane_index())
            if i < count:
                found = np.uint32(found + ones(load_word(words + i * WORD_BYTES)))
            warp_first += step
        found = sum_lanes(found)
        if lane_index() == 0:
            add_long(kept, U(found))

    return kernel

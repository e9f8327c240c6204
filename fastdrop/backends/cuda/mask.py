"""The bodies of the CUDA kernels for masks and plain dropout.

`compile` makes kernels of them; a body is written in the words of a vocabulary (`intrinsics`).

draw_words
    A thread draws a word.
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
from .teams import LANES, LOW_5, ONE, WORD_BYTES, WORD_SHIFT, U, indices, thread_counter, warp_counter

HALF, LOW_32 = U(32), U(LOW)
DOMAIN, NOISE, GROUP_AT = U(MASK_DOMAIN), U(NOISE_DOMAIN), U(GROUP_SHIFT)
VECTOR_BYTES, BATCH = U(shares.VECTOR_BYTES), U(shares.BATCH)
TILE, TILE_SHIFT = U(shares.TILE_CELLS), U(shares.TILE_CELLS.bit_length() - 1)
NOISE_CELLS, NOISE_COUNTERS = U(stream.NOISE_CELLS), U(stream.NOISE_COUNTERS)  # of a tile of noise


def _drawing(v: Any) -> Any:
    any_lane, plane_mask, philox_planes = v.any_lane, v.plane_mask, philox(v.multiply)

    @v.inline
    def draw(word, k0, k1, o0, o1, threshold, groups):
        """A mask word of each lane, group by group until no lane of the warp has an undecided cell left."""
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


def _seeds(v: Any) -> Any:
    load_long = v.load_long

    @v.inline
    def seed_of(seed, seed_at):
        """The seed itself, or the one that lies at an address."""
        if seed_at:
            return load_long(seed_at)
        return seed

    return seed_of


def draw_words(v: Any) -> Any:
    draw, seed_of, warps = _drawing(v), _seeds(v), warp_counter(v)
    lane_index, load_word, store_word = v.lane, v.load_word, v.store_word

    def kernel(words, position, first, n, seed, seed_at, offset, threshold, groups):
        """Bits of cells first .. first+n-1, to bits position .. position+n-1 of words, a thread per word written."""
        seed = seed_of(seed, seed_at)
        k0, k1, o0, o1 = seed & LOW_32, seed >> HALF, offset & LOW_32, offset >> HALF
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
            word = draw(begin + i, k0, k1, o0, o1, threshold, groups)
            if shift:
                high = draw(begin + i + ONE, k0, k1, o0, o1, threshold, groups)
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


def elementwise(v: Any, source: str) -> Any:
    draw, seed_of = _drawing(v), _seeds(v)
    drawn, shifted = source != "stored", source == "drawn_shifted"
    item = U(v.item_bytes)
    lane_index, thread_index, block_index, blocks, block_threads = indices(v)
    load_word, store_word, uniform = v.load_word, v.store_word, v.uniform
    load_tile, store_tile, load_rest, store_rest = v.load_tile, v.store_tile, v.load_rest, v.store_rest
    scale_of = v.scale

    @v.inline
    def word_of(tile, words, first, n, k0, k1, o0, o1, threshold, groups):
        """The lane's word of the tile: drawn, or read from words, where element 0 has bit ``first``."""
        index = (tile << WORD_SHIFT) + U(lane_index())
        if drawn:
            word = draw((first >> WORD_SHIFT) + index, k0, k1, o0, o1, threshold, groups)
            if shifted:
                high = draw((first >> WORD_SHIFT) + index + ONE, k0, k1, o0, o1, threshold, groups)
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
        scale, seed = scale_of(a, kept_at), seed_of(seed, seed_at)
        k0, k1, o0, o1 = seed & LOW_32, seed >> HALF, offset & LOW_32, offset >> HALF
        lane = U(lane_index())
        warps = U(blocks()) * (U(block_threads()) >> WORD_SHIFT)
        warp = U(block_index()) * (U(block_threads()) >> WORD_SHIFT) + U(uniform(thread_index() >> 5))
        tile = warp
        while tile < whole:
            at = tile * (TILE * item) + lane * VECTOR_BYTES
            held = load_tile(x + at)
            word = word_of(tile, words, first, n, k0, k1, o0, o1, threshold, groups)
            if drawn and words:
                store_word(words + ((tile << WORD_SHIFT) + lane) * WORD_BYTES, word)
            store_tile(y + at, held, word, lane, scale, b, c)
            tile += warps
        tile = whole + warp
        tiles = (n + TILE - ONE) >> TILE_SHIFT
        while tile < tiles:
            at = tile * (TILE * item)
            valid = min(n - (tile << TILE_SHIFT), TILE)
            word = word_of(tile, words, first, n, k0, k1, o0, o1, threshold, groups)
            if drawn and words and (lane << WORD_SHIFT) < valid:
                bits = min(valid - (lane << WORD_SHIFT), HALF)
                store_word(words + ((tile << WORD_SHIFT) + lane) * WORD_BYTES, word & ((ONE << bits) - ONE))
            batch = U(0)
            while batch < LANES:
                first_item = (batch << WORD_SHIFT) + lane
                rest = load_rest(x + at, first_item, valid)
                store_rest(y + at, first_item, valid, rest, word, batch, lane, scale, b, c)
                batch += BATCH
            tile += warps

    return kernel


def strided(v: Any, wide: bool) -> Any:
    """Elements in memory order, whose cells lie at strides: extents and strides of up to four axes, innermost first.

    ``wide``: 16 bytes at a time; addresses and the innermost extent must be multiples of them.
    """
    threads_of, load_word, divide, scale_of = thread_counter(v), v.load_word, v.divide, v.scale
    load_vector, store_vector, load_item, store_item = v.load_vector, v.store_vector, v.load_item, v.store_item
    step, vector_bytes = v.vector_items, VECTOR_BYTES
    item = U(v.item_bytes)

    @v.inline
    def cell_of(e, e0, m0, s0, c0, e1, m1, s1, c1, e2, m2, s2, c2, c3):
        q = divide(e, m0, s0)
        cell = U(e - q * e0) * c0
        e = q
        q = divide(e, m1, s1)
        cell += U(e - q * e1) * c1
        e = q
        q = divide(e, m2, s2)
        return cell + U(e - q * e2) * c2 + U(q) * c3

    @v.inline
    def bit(words, cell):
        return (U(load_word(words + (cell >> WORD_SHIFT) * WORD_BYTES)) >> (cell & LOW_5)) & ONE

    def kernel(x, y, words, position, n, e0, m0, s0, c0, e1, m1, s1, c1, e2, m2, s2, c2, c3, kept_at, a, b, c):
        scale = scale_of(a, kept_at)
        i, threads = threads_of()
        if wide:
            while i * U(step) < U(n):
                at = i * vector_bytes
                held = load_vector(x + at)
                cell = position + cell_of(i * U(step), e0, m0, s0, c0, e1, m1, s1, c1, e2, m2, s2, c2, c3)
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
                store_vector(y + at, held, bits, scale, b, c)
                i += threads
        else:
            while i < U(n):
                held = load_item(x + i * item)
                cell = position + cell_of(i, e0, m0, s0, c0, e1, m1, s1, c1, e2, m2, s2, c2, c3)
                store_item(y + i * item, held, bit(words, cell), scale, b, c)
                i += threads

    return kernel


def gaussian_multiply(v: Any) -> Any:
    threads_of, seed_of = thread_counter(v), _seeds(v)
    philox_planes, normals = philox(v.multiply), normal_pair(v.plus, v.times, v.root)
    load_four, store_four, plus, times = v.load_four, v.store_four, v.plus, v.times
    item, one, three = U(v.item_bytes), np.float32(1), U(3)

    @v.inline
    def factor(z, sigma):
        return plus(one, times(sigma, z))

    def kernel(x, y, first, n, seed, seed_at, offset, sigma):
        """A thread per counter, whose cells lie 16 apart: threads side by side access elements side by side."""
        seed = seed_of(seed, seed_at)
        k0, k1, o0, o1 = seed & LOW_32, seed >> HALF, offset & LOW_32, offset >> HALF
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

"""Draws mask words, as kernels of the Numba CPU backend: `draw_bits`, `draw_rows`, and what `mask` needs to draw ahead
of its data.

Blocks of 16 words are drawn two groups of random bits at a time. The few words that are then undecided are gathered
over a chunk of blocks and given more groups together, as in csrc/draw.inc.h. A chunk's words are neighbours in the
mask, and ``words`` is the index of the first one; or they are listed, and ``words`` is an array of their indices.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (Numba types the kernels, by what they are called with)

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core.extending import overload

from ...core.random import GROUP_SHIFT, GROUPS, MASK_DOMAIN, PLANES_PER_GROUP
from .scalars import decide_group, inner, kernel, philox_planes, stage
from .threads import BLOCK_CELLS

U = np.uint64
BLOCK_WORDS = 16
CHUNK_BLOCKS = 32
CHUNK_WORDS = CHUNK_BLOCKS * BLOCK_WORDS
CHUNK_CELLS = CHUNK_BLOCKS * BLOCK_CELLS
DOMAIN = U(MASK_DOMAIN)
GROUP_COUNT = GROUPS * PLANES_PER_GROUP  # index, past the planes, of the number of groups that can decide anything


class Draw(NamedTuple):
    """What decides a cell: the generator's key and offset, and the threshold as `planes_of` gives it."""

    key: Any
    offset: Any
    planes: Any


class Chunk(NamedTuple):
    """Words that are drawn together: the bits to keep, those that are undecided, and room for lists of the latter."""

    keep: Any
    undecided: Any
    lists: Any


@kernel
def one_block(c0, c1, c2, c3, k0, k1):
    return philox_planes(c0, c1, c2, c3, k0, k1)


@stage
def draw_of(seed, offset, threshold):
    """With the planes: the threshold's bits, most significant first, each spread to a whole word; then the number of
    groups up to its last 1, because later groups decide nothing."""
    planes = np.zeros(GROUP_COUNT + 1, np.uint64)
    for k in range(32):
        if (threshold >> U(31 - k)) & U(1):
            planes[k] = ~U(0)
            planes[GROUP_COUNT] = U(k // PLANES_PER_GROUP + 1)
    return Draw((seed, seed >> U(32)), (offset, offset >> U(32)), planes)


@inner
def _second(word, group):
    """The second counter word. Loops over the words of a block compute it once, and what follows from it alone."""
    return (word >> U(32)) | DOMAIN | (group << U(GROUP_SHIFT))


@inner
def _planes(draw, word, second):
    """Four bit planes of a word of the mask."""
    return philox_planes(word, second, draw.offset[0], draw.offset[1], draw.key[0], draw.key[1])


def _word_in(words: Any, slot: Any) -> Any:
    """The index in the mask of the word in a slot of the chunk."""
    raise NotImplementedError


def _second_in(words: Any, slot: Any, i: Any, group: Any) -> Any:
    """The second counter word of the word in slot + i, where slot begins a block."""
    raise NotImplementedError


@overload(_word_in, inline="always")
def _word_in_of(words, slot):
    listed = isinstance(words, types.Array)
    return (lambda words, slot: words[slot]) if listed else (lambda words, slot: words + slot)


@overload(_second_in, inline="always")
def _second_in_of(words, slot, i, group):
    if isinstance(words, types.Array):
        return lambda words, slot, i, group: _second(words[slot + i], group)
    return lambda words, slot, i, group: _second(words + slot, group)


@inner
def _look_1(chunk, draw, slot, words):
    """A block of words, from slot on, for a threshold that one group decides."""
    t0, t1, t2, t3 = draw.planes[0], draw.planes[1], draw.planes[2], draw.planes[3]
    for i in range(BLOCK_WORDS):
        second = _second_in(words, slot, U(i), U(0))
        r0, r1, r2, r3 = _planes(draw, _word_in(words, slot + U(i)), second)
        decided, _ = decide_group(r0, r1, r2, r3, t0, t1, t2, t3)
        chunk.keep[slot + U(i)] = np.uint32(decided)


@inner
def _look_2(chunk, draw, slot, words):
    """The same after two groups; ``undecided`` takes what they leave open."""
    t0, t1, t2, t3 = draw.planes[0], draw.planes[1], draw.planes[2], draw.planes[3]
    t4, t5, t6, t7 = draw.planes[4], draw.planes[5], draw.planes[6], draw.planes[7]
    for i in range(BLOCK_WORDS):
        high, low = _second_in(words, slot, U(i), U(0)), _second_in(words, slot, U(i), U(1))
        word = _word_in(words, slot + U(i))
        r0, r1, r2, r3 = _planes(draw, word, high)
        r4, r5, r6, r7 = _planes(draw, word, low)
        keep_high, equal_high = decide_group(r0, r1, r2, r3, t0, t1, t2, t3)
        keep_low, equal_low = decide_group(r4, r5, r6, r7, t4, t5, t6, t7)
        chunk.keep[slot + U(i)] = np.uint32(keep_high & (keep_low | ~equal_high))
        chunk.undecided[slot + U(i)] = np.uint32(equal_high & equal_low)


@stage
def _look_on(lists, draw, words, pending, group):
    """One more group for the pending words, listed up to a multiple of 16 so that the loop has no tail: ``result``
    takes the word to AND in, ``left`` the bits still undecided."""
    slots, bits, result, left = lists[0], lists[1], lists[2], lists[3]
    g = U(PLANES_PER_GROUP) * group
    t0, t1, t2, t3 = draw.planes[g], draw.planes[g + U(1)], draw.planes[g + U(2)], draw.planes[g + U(3)]
    for block in range(U(0), pending, U(BLOCK_WORDS)):
        for i in range(BLOCK_WORDS):
            at = block + U(i)
            word = _word_in(words, U(slots[at]))
            r0, r1, r2, r3 = _planes(draw, word, _second(word, group))
            decided, equal = decide_group(r0, r1, r2, r3, t0, t1, t2, t3)
            result[at] = np.uint32(decided | ~U(bits[at]))
            left[at] = np.uint32(equal & U(bits[at]))


@stage
def decide_pending(chunk, draw, blocks, words):
    groups = draw.planes[GROUP_COUNT]
    if groups <= U(2):
        return
    slots, bits, result, left = chunk.lists[0], chunk.lists[1], chunk.lists[2], chunk.lists[3]
    pending = U(0)
    for i in range(U(0), blocks * U(BLOCK_WORDS)):
        slots[pending] = np.uint32(i)
        bits[pending] = chunk.undecided[i]
        pending += U(chunk.undecided[i] != 0)  # no branch: it would be mispredicted one time in eight
    group = U(2)
    while pending and group < groups:
        for i in range(pending, pending + U(BLOCK_WORDS)):
            slots[i] = 0
            bits[i] = 0
        _look_on(chunk.lists, draw, words, pending, group)
        still = U(0)
        for i in range(U(0), pending):
            chunk.keep[slots[i]] &= result[i]
            if left[i]:
                slots[still] = slots[i]
                bits[still] = left[i]
                still += U(1)
        pending = still
        group += U(1)


@inner
def draw_block(chunk, draw, block, words):
    """First look at a block of the chunk; decide_pending ends the chunk."""
    slot = block * U(BLOCK_WORDS)
    if draw.planes[GROUP_COUNT] == U(1):
        _look_1(chunk, draw, slot, words)
    else:
        _look_2(chunk, draw, slot, words)


@stage
def copy_bits(to, to_position, words, position, n):
    """Copies n bits; bits below them in their first word stay, bits above them in their last are cleared."""
    if (to_position | position) & U(31) == U(0):
        start, source = to_position >> U(5), position >> U(5)
        for i in range(U(0), n >> U(5)):
            to[start + i] = words[source + i]
        done = n & ~U(31)
        to_position += done
        position += done
        n -= done
    while n:
        room = min(U(32) - (to_position & U(31)), n, U(32) - (position & U(31)))
        bits = (U(words[position >> U(5)]) >> (position & U(31))) & ((U(1) << room) - U(1))
        at, shift = to_position >> U(5), to_position & U(31)
        below = U(to[at]) & ((U(1) << shift) - U(1))
        to[at] = np.uint32(below | (bits << shift))
        to_position += room
        position += room
        n -= room


@inner
def _new_chunk():
    keep = np.empty(CHUNK_WORDS + BLOCK_WORDS + 1, np.uint32)
    undecided = np.empty(CHUNK_WORDS + BLOCK_WORDS, np.uint32)
    return Chunk(keep, undecided, np.empty((4, CHUNK_WORDS + 2 * BLOCK_WORDS), np.uint32))


@kernel
def draw_bits(begin, end, words, position, first, seed, offset, threshold):
    draw = draw_of(seed, offset, U(threshold))
    chunk = _new_chunk()
    at, stop = U(begin), U(end)
    while at < stop:
        step = min(stop - at, U(CHUNK_CELLS))
        cell = first + at
        lead = cell % U(BLOCK_CELLS)
        blocks = (lead + step + U(BLOCK_CELLS - 1)) // U(BLOCK_CELLS)
        first_word = cell // U(BLOCK_CELLS) * U(BLOCK_WORDS)
        for block in range(U(0), blocks):
            draw_block(chunk, draw, block, first_word)
        decide_pending(chunk, draw, blocks, first_word)
        copy_bits(words, U(position) + at, chunk.keep, lead, step)
        at += step


@stage
def _list_words(index, runs, at, stop, first, extents):
    """Lists the words of cells at .. stop-1 of the rows, as many as a chunk holds: (words, runs of cells).

    A run is a row or a part of one: a row of ``runs`` is the position of its first bit in the chunk, and its length.
    """
    outer_pitch, rows, pitch, columns = extents
    words, count, row, column = U(0), U(0), at // columns, at % columns
    while at < stop and words < U(CHUNK_WORDS):
        cell = first + row // rows * outer_pitch + row % rows * pitch + column
        lead = cell & U(31)
        n = min(columns - column, stop - at, U(32) * (U(CHUNK_WORDS) - words) - lead)
        runs[count, 0], runs[count, 1] = U(32) * words + lead, n
        for i in range(U(0), (lead + n + U(31)) >> U(5)):
            index[words + i] = (cell >> U(5)) + i
        words += (lead + n + U(31)) >> U(5)
        count += U(1)
        at += n
        row, column = row + U(1), U(0)
    for i in range(words, words + U(BLOCK_WORDS)):
        index[i] = U(0)  # the last block may be drawn past the list
    return words, count


@kernel
def draw_rows(begin, end, words, position, first, outer_pitch, rows, pitch, columns, seed, offset, threshold):
    """As csrc/rows.inc.h: the words that the rows need are listed, drawn together, and copied run by run."""
    draw, chunk = draw_of(seed, offset, U(threshold)), _new_chunk()
    index, runs = np.empty(CHUNK_WORDS + BLOCK_WORDS, np.uint64), np.empty((CHUNK_WORDS, 2), np.uint64)
    extents = outer_pitch, U(rows), pitch, U(columns)
    at, stop = U(begin), U(end)
    while at < stop:
        listed, count = _list_words(index, runs, at, stop, first, extents)
        blocks = (listed + U(BLOCK_WORDS - 1)) // U(BLOCK_WORDS)
        for block in range(U(0), blocks):
            draw_block(chunk, draw, block, index)
        decide_pending(chunk, draw, blocks, index)
        for run in range(U(0), count):
            copy_bits(words, U(position) + at, chunk.keep, runs[run, 0], runs[run, 1])
            at += runs[run, 1]

"""Masks and plain dropout in NumPy: draw bits, apply them, gaussian noise, widen what is dropped.

The package's docstring has the contract that all primitives share; what a mask's bits are is defined here and in
`core.random`. `_keep_words` draws: bit i of word w decides cell ``32 * w + i``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.mask import word_count
from ...core.random import (
    COSINE,
    GROUP_SHIFT,
    GROUPS,
    LN2_HIGH,
    LN2_LOW,
    LOG,
    LOW,
    MASK_DOMAIN,
    NOISE_CELLS,
    NOISE_COUNTERS,
    NOISE_DOMAIN,
    PLANES_PER_GROUP,
    RADIANS,
    SINE,
    SQRT_HALF_BITS,
    philox4x32_10,
)
from ..generate import primitive
from .storage import align_rows, as_computed, copy_bits, select, store, unpack_bits, write_bits

Array = NDArray[Any]
Words = NDArray[np.uint32]

# Temporaries of the draw stay in a core's second cache. Smaller pieces would leave more to NumPy's own costs.
PHILOX_BLOCKS = 1 << 14
FEW_BLOCKS = 1 << 11  # take no longer than one
DRAWN_WORDS = 1 << 18  # drawn at a time; bounds the temporaries at some tens of MB
APPLIED_CELLS = 1 << 18  # elements at a time that a mask is applied to
FEWEST_COLUMNS = 1 << 10
FEWEST_GROUPS = 2  # drawn together: after them one word in eight has a cell that is not decided


@primitive
def draw_bits(p: Any) -> None:
    """Draws cells ``first .. first+n-1`` and writes them at bits ``position .. position+n-1`` of words.

    Bits below ``position`` in its word stay, bits above the last one written in its word are cleared.
    """
    for at in range(0, p.n, 32 * DRAWN_WORDS):
        count = min(p.n - at, 32 * DRAWN_WORDS)
        cell = p.first + at
        lead = cell & 31
        index = np.arange(word_count(lead + count), dtype=np.uint64) + np.uint64(cell >> 5)
        drawn = _keep_words(index, p.seed, p.offset, p.threshold)
        copy_bits(p.words, p.position + at, drawn, lead, count)


@primitive
def draw_rows(p: Any) -> None:
    """Draws a part of a mask: row ``o * rows + r`` is the cells ``first + o * outer_pitch + r * pitch + c``, c below
    columns, for o below outer and r below rows. The rows' bits follow each other in words, from bit ``position`` on.

    Words are left as by `draw_bits`.
    """
    rows, width = p.outer * p.rows if p.columns else 0, word_count(31 + p.columns)
    together = DRAWN_WORDS // width
    for at in range(0, rows, max(together, 1)):
        position = p.position + at * p.columns
        if together < 2:
            cell = p.first + at // p.rows * p.outer_pitch + at % p.rows * p.pitch
            draw_bits(p.words, position, cell, p.columns, p.seed, p.offset, p.threshold)
            continue
        row = np.arange(at, min(at + together, rows), dtype=np.uint64)
        o = row // np.uint64(p.rows)
        r = row - o * np.uint64(p.rows)
        cells = np.uint64(p.first) + o * np.uint64(p.outer_pitch) + r * np.uint64(p.pitch)
        index = (cells >> np.uint64(5))[:, None] + np.arange(width, dtype=np.uint64)
        drawn = _keep_words(index.reshape(-1), p.seed, p.offset, p.threshold).reshape(index.shape)
        aligned = align_rows(drawn, cells & np.uint64(31))
        bits = unpack_bits(aligned.reshape(-1), 0, 32 * aligned.size).reshape(row.size, -1)
        write_bits(p.words, position, bits[:, : p.columns].reshape(-1))


@primitive
def dropout_forward(p: Any) -> None:
    """Element i < n is decided by cell ``first + i``; its bit goes to bit i of words too, unless that is None."""
    bits = np.empty(word_count(p.n), np.uint32) if p.words is None else p.words
    draw_bits(bits, 0, p.first, p.n, p.seed, p.offset, p.threshold)
    masked_affine(p.dtype, p.x, p.y, bits, 0, 1, 1, p.n, p.a, p.b, p.c)


@primitive
def masked_affine(p: Any) -> None:
    """Data ``[outer, repeat, inner]`` under stored bits: element (o, r, i) by bit ``position + o * inner + i``."""
    outer, repeat, inner = (1, 1, p.outer * p.inner) if p.repeat == 1 else (p.outer, p.repeat, p.inner)
    columns = max(FEWEST_COLUMNS, APPLIED_CELLS // max(1, repeat))
    rows = max(1, APPLIED_CELLS // max(1, repeat * inner))
    x, y = p.x.reshape(outer, repeat, inner), p.y.reshape(outer, repeat, inner)
    with np.errstate(all="ignore"):  # inf and NaN in data are data
        for o in range(0, outer, rows):
            for i in range(0, inner, columns):
                part = slice(o, o + rows), slice(None), slice(i, i + columns)
                _apply(p, p.position + o * inner + i, x[part], y[part])


def _apply(p: Any, position: int, x: Array, y: Array) -> None:
    """`masked_affine` of a block ``[outer, repeat, inner]``, whose bits are side by side."""
    keep = unpack_bits(p.words, position, x.shape[0] * x.shape[2])
    source = as_computed(p.dtype, x)
    kind = source.dtype.type
    in_place = source.dtype == y.dtype
    kept = np.multiply(source, kind(p.a), out=y if in_place else None)
    if p.b != 0.0 or p.c != 0.0:
        kept += kind(p.b)
    select(keep.reshape(x.shape[0], 1, x.shape[2]), kept, p.c)
    if not in_place:
        store(p.dtype, y, kept)


@primitive
def gaussian_multiply(p: Any) -> None:
    """``y[i] = x[i] * (1 + sigma * z)`` with z the standard normal number of cell ``first + i``, for i < n.

    Cells are below 2**61. The factor is float32 for every dtype, computed by the steps of `_normals` in their order,
    each rounded to nearest even and none contracted with the next, so that all backends have it bit for bit; then the
    product is as for the affine: float64 in itself, 16-bit types in float32, rounded once.
    """
    source, target = p.x.reshape(-1), p.y.reshape(-1)
    one, spread = np.float32(1), np.float32(p.sigma)
    for at in range(0, p.n, 4 * PHILOX_BLOCKS):
        part = slice(at, min(p.n, at + 4 * PHILOX_BLOCKS))
        factor = one + spread * _normals(p.first + at, part.stop - at, p.seed, p.offset)
        with np.errstate(all="ignore"):
            store(p.dtype, target[part], as_computed(p.dtype, source[part]) * factor)


@primitive
def dilate_bits(p: Any) -> None:
    """Widens what is dropped along an axis: bits ``[outer, n, inner]`` of words to bits ``[outer, n + block - 1,
    inner]`` of to, where cell i is kept if those of the cells ``i - block + 1 .. i`` that there are, are kept.

    ``to`` and ``words`` are different arrays; bits past the last in the last word of ``to`` become 0.
    """
    keep = unpack_bits(p.words, 0, p.outer * p.n * p.inner).reshape(p.outer, p.n, p.inner)
    result = np.ones((p.outer, p.n + p.block - 1, p.inner), np.bool_)
    for shift in range(p.block):
        result[:, shift : shift + p.n] &= keep
    write_bits(p.to, 0, result.reshape(-1))


def _normals(first: int, n: int, seed: int, offset: int) -> NDArray[np.float32]:
    """Standard normal numbers of cells ``first .. first+n-1``, by Box and Muller's transform.

    Counter j of tile t is number ``b = 16 t + j``: a Philox block at ``(b low, b high | 2 << 27, offset low, offset
    high)``. Its outputs 0 and 1 make normals 0 and 1, outputs 2 and 3 normals 2 and 3.
    """
    tile = first // NOISE_CELLS
    tiles = -(-(first + n) // NOISE_CELLS) - tile
    b = np.arange(tiles * NOISE_COUNTERS, dtype=np.uint64) + np.uint64(tile * NOISE_COUNTERS)
    counter = b & np.uint64(LOW), (b >> np.uint64(32)) | np.uint64(NOISE_DOMAIN), offset & LOW, offset >> 32
    r0, r1, r2, r3 = philox4x32_10(counter, (seed & LOW, seed >> 32))
    normals = (*_normal_pair(r0, r1), *_normal_pair(r2, r3))
    ordered = np.stack([z.reshape(tiles, NOISE_COUNTERS) for z in normals], axis=1).reshape(-1)
    lead = first - tile * NOISE_CELLS
    return ordered[lead : lead + n]


def _normal_pair(radius: Words, angle: Words) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two independent standard normal numbers of two uniform ones."""
    f = np.float32
    # -2 ln u for u = (the upper 31 bits + 1/2) / 2**31: u = m 2**e with m about 1, ln u = ln m + e ln 2.
    u = ((radius >> 1).astype(np.int32).astype(f) + f(0.5)) * f(2.0**-31)
    bits = u.view(np.int32)
    exponent = (bits - np.int32(SQRT_HALF_BITS)) >> 23
    x = (bits - (exponent << 23)).view(f) - f(1)
    e, square = exponent.astype(f), x * x
    log = _polynomial(LOG, x) * x * square
    log = log + e * f(LN2_LOW)
    log = log - square * f(0.5)
    log = (x + log) + e * f(LN2_HIGH)
    r = np.sqrt(log * f(-2))
    # The upper two bits turn by quarters, the lower thirty within one: -pi/4 to pi/4.
    t = (angle << 2).view(np.int32).astype(f) * f(RADIANS)
    square = t * t
    sine = _polynomial(SINE, square) * square * t + t
    cosine = _polynomial(COSINE, square) * square * square - square * f(0.5) + f(1)
    cosine = (cosine.view(np.uint32) ^ (angle & np.uint32(1 << 31))).view(f)
    swap = (angle & np.uint32(1 << 30)) != 0
    return r * np.where(swap, sine, cosine), r * np.where(swap, cosine, sine)


def _polynomial(coefficients: tuple[float, ...], x: NDArray[np.float32]) -> NDArray[np.float32]:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + np.float32(coefficient)
    return value


def _keep_words(index: NDArray[np.uint64], seed: int, offset: int, threshold: int) -> Words:
    """Mask words of these indices, drawn lazily: words leave the draw when all their cells are decided."""
    drop, undecided = np.zeros(index.size, np.uint32), np.full(index.size, LOW, np.uint32)
    _decide(index, drop, undecided, 0, (seed, offset), threshold)
    return np.invert(drop, out=drop)


def _decide(
    index: NDArray[np.uint64], drop: Words, undecided: Words, first: int, state: tuple[int, int], threshold: int
) -> None:
    """Compares the undecided cells of these words with the threshold, by groups from ``first`` on."""
    # Once the rest of the threshold is 0, no draw can be below it.
    needed = next(g for g in range(GROUPS + 1) if not threshold << PLANES_PER_GROUP * g & LOW)
    if first >= needed or not index.size:
        return
    groups = range(first, min(needed, first + max(FEWEST_GROUPS, FEW_BLOCKS // index.size)))
    together = PHILOX_BLOCKS // len(groups)
    for at in range(0, index.size, together):
        part = slice(at, at + together)
        _compare(drop[part], undecided[part], _planes(index[part], groups, *state), first, threshold)
    open_words = np.flatnonzero(undecided)
    dropped = drop[open_words]
    _decide(index[open_words], dropped, undecided[open_words], groups.stop, state, threshold)
    drop[open_words] = dropped


def _compare(drop: Words, undecided: Words, planes: Iterator[Words], first: int, threshold: int) -> None:
    """The first plane in which draw and threshold differ decides a cell: it is dropped if the draw's bit is the 0."""
    for k, plane in enumerate(planes, PLANES_PER_GROUP * first):
        if k % PLANES_PER_GROUP == 0 and not undecided.any():
            break
        if threshold >> (31 - k) & 1:
            drop ^= undecided
            undecided &= plane
            drop ^= undecided
        else:
            undecided &= ~plane


def _planes(index: NDArray[np.uint64], groups: range, seed: int, offset: int) -> Iterator[Words]:
    """The bit planes of these groups of words, from the top."""
    high = index >> np.uint64(32)
    if high[0] == high[-1] and (high == high[0]).all():
        high = high[:1]  # Philox then has less to compute
    group = np.array(groups, np.uint64)[:, None] << np.uint64(GROUP_SHIFT)
    counter = index & np.uint64(LOW), high | np.uint64(MASK_DOMAIN) | group, offset & LOW, offset >> 32
    drawn = philox4x32_10(counter, (seed & LOW, seed >> 32))
    return (output[row] for row in range(len(groups)) for output in drawn)

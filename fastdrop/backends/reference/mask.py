"""Masks and plain dropout in NumPy: draw bits, apply them, gaussian noise, widen what is dropped.

The package's docstring has the contract that all primitives share; what a mask's bits are is defined here and in
`core.random`. `_keep_words` draws: bit i of word w decides cell ``32 * w + i``.
"""

from __future__ import annotations

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
from .storage import as_computed, store, unpack_bits, write_bits

Array = NDArray[Any]
Words = NDArray[np.uint32]

CHUNK_WORDS = 1 << 14  # drawn at a time; bounds the temporaries at a few MB


@primitive
def draw_bits(p: Any) -> None:
    """Draws cells ``first .. first+n-1`` and writes them at bits ``position .. position+n-1`` of words.

    Bits below ``position`` in its word stay, bits above the last one written in its word are cleared.
    """
    for at in range(0, p.n, 32 * CHUNK_WORDS):
        count = min(p.n - at, 32 * CHUNK_WORDS)
        cell = p.first + at
        lead = cell & 31
        index = np.arange(word_count(lead + count), dtype=np.uint64) + np.uint64(cell >> 5)
        drawn = _keep_words(index, p.seed, p.offset, p.threshold)
        write_bits(p.words, p.position + at, unpack_bits(drawn, lead, count))


@primitive
def draw_rows(p: Any) -> None:
    """Draws a part of a mask: row ``o * rows + r`` is the cells ``first + o * outer_pitch + r * pitch + c``, c below
    columns, for o below outer and r below rows. The rows' bits follow each other in words, from bit ``position`` on.

    Words are left as by `draw_bits`.
    """
    rows, width = p.outer * p.rows if p.columns else 0, word_count(31 + p.columns)
    together = CHUNK_WORDS // width
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
        drawn = _keep_words(index.reshape(-1), p.seed, p.offset, p.threshold)
        bits = unpack_bits(drawn, 0, 32 * drawn.size).reshape(row.size, 32 * width)
        columns = (cells & np.uint64(31))[:, None] + np.arange(p.columns, dtype=np.uint64)
        write_bits(p.words, position, np.take_along_axis(bits, columns.astype(np.intp), 1).reshape(-1))


@primitive
def dropout_forward(p: Any) -> None:
    """Element i < n is decided by cell ``first + i``; its bit goes to bit i of words too, unless that is None."""
    bits = np.empty(word_count(p.n), np.uint32) if p.words is None else p.words
    draw_bits(bits, 0, p.first, p.n, p.seed, p.offset, p.threshold)
    masked_affine(p.dtype, p.x, p.y, bits, 0, 1, 1, p.n, p.a, p.b, p.c)


@primitive
def masked_affine(p: Any) -> None:
    """Data ``[outer, repeat, inner]`` under stored bits: element (o, r, i) by bit ``position + o * inner + i``."""
    keep = unpack_bits(p.words, p.position, p.outer * p.inner).reshape(p.outer, 1, p.inner)
    source = as_computed(p.dtype, p.x).reshape(p.outer, p.repeat, p.inner)
    kind = source.dtype.type
    with np.errstate(all="ignore"):  # inf and NaN in data are data
        kept = source * kind(p.a)
        if p.b != 0.0 or p.c != 0.0:
            kept += kind(p.b)
        store(p.dtype, p.y.reshape(p.outer, p.repeat, p.inner), np.where(keep, kept, kind(p.c)))


@primitive
def gaussian_multiply(p: Any) -> None:
    """``y[i] = x[i] * (1 + sigma * z)`` with z the standard normal number of cell ``first + i``, for i < n.

    Cells are below 2**61. The factor is float32 for every dtype, computed by the steps of `_normals` in their order,
    each rounded to nearest even and none contracted with the next, so that all backends have it bit for bit; then the
    product is as for the affine: float64 in itself, 16-bit types in float32, rounded once.
    """
    source, target = p.x.reshape(-1), p.y.reshape(-1)
    one, spread = np.float32(1), np.float32(p.sigma)
    for at in range(0, p.n, 32 * CHUNK_WORDS):
        part = slice(at, min(p.n, at + 32 * CHUNK_WORDS))
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
    drop = np.zeros(index.size, np.uint32)
    undecided = np.full(index.size, LOW, np.uint32)
    open_words = np.arange(index.size)
    key = (seed & LOW, seed >> 32)
    for group in range(GROUPS):
        if not (threshold << (PLANES_PER_GROUP * group)) & LOW or not open_words.size:
            break  # the rest of the threshold is 0, no draw can be below it
        w = index[open_words]
        counter = (
            w & np.uint64(LOW),
            (w >> np.uint64(32)) | np.uint64(MASK_DOMAIN | group << GROUP_SHIFT),
            offset & LOW,
            offset >> 32,
        )
        for k, plane in enumerate(philox4x32_10(counter, key)):
            at = undecided[open_words]
            if threshold >> (31 - PLANES_PER_GROUP * group - k) & 1:
                drop[open_words] |= at & ~plane
                undecided[open_words] = at & plane
            else:
                undecided[open_words] = at & ~plane
        open_words = open_words[undecided[open_words] != 0]
    return ~drop

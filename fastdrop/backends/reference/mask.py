"""The NumPy backend, and the contract of the primitives: what every backend must do is what is written here.

All backends have the same functions with the same parameters in the same order as ``csrc/ops.def``. They take what
`fastdrop.arrays.dropout` has checked and never validate, allocate results or call each other:

* ``x`` and ``y`` are C-contiguous arrays of the same number of elements, of the dtype that the tag ``dtype`` names;
  bfloat16 comes as its bits, uint16. ``y`` may be ``x``.
* ``words`` is a contiguous array of uint32 that has room for the bits.
* ``0 < threshold < 2**32``: keeping all and dropping all need no draw.
* Kept elements become ``a * x + b``, dropped ones ``c``, selected and not multiplied: a dropped inf or NaN leaves no
  trace. With ``b == c == 0`` it is ``a * x`` and exactly +0. float32 and float64 are computed in themselves, 16-bit
  types in float32 with ``a``, ``b`` and ``c`` rounded to it, and rounded once at the end, to nearest even.

The fused primitives are in `rows`, with their contract.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.checks import BFLOAT16, FLOAT16
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
from .storage import bfloat16_to_float32, float32_to_bfloat16, unpack_bits, write_bits

Array = NDArray[Any]
Words = NDArray[np.uint32]

CHUNK_WORDS = 1 << 14  # drawn at a time; bounds the temporaries at a few MB


def unavailable() -> str | None:
    """Why this backend can't run here; None if it can."""
    return None


def describe() -> str:
    """One line for `show_config`."""
    return f"NumPy {np.__version__}"


def set_num_threads(n: int) -> None:
    """NumPy runs on the calling thread."""


def draw_bits(words: Words, position: int, first: int, n: int, seed: int, offset: int, threshold: int) -> None:
    """Draws cells ``first .. first+n-1`` and writes them at bits ``position .. position+n-1`` of words.

    Bits below ``position`` in its word stay, bits above the last one written in its word are cleared.
    """
    for at in range(0, n, 32 * CHUNK_WORDS):
        count = min(n - at, 32 * CHUNK_WORDS)
        cell = first + at
        lead = cell & 31
        drawn = _keep_words(cell >> 5, word_count(lead + count), seed, offset, threshold)
        write_bits(words, position + at, unpack_bits(drawn, lead, count))


def dropout_forward(
    dtype: int,
    x: Array,
    y: Array,
    words: Words | None,
    first: int,
    n: int,
    seed: int,
    offset: int,
    threshold: int,
    a: float,
    b: float,
    c: float,
) -> None:
    """Element i < n is decided by cell ``first + i``; its bit goes to bit i of words too, unless that is None."""
    bits = np.empty(word_count(n), np.uint32) if words is None else words
    draw_bits(bits, 0, first, n, seed, offset, threshold)
    masked_affine(dtype, x, y, bits, 0, 1, 1, n, a, b, c)


def masked_affine(
    dtype: int,
    x: Array,
    y: Array,
    words: Words,
    position: int,
    outer: int,
    repeat: int,
    inner: int,
    a: float,
    b: float,
    c: float,
) -> None:
    """Data ``[outer, repeat, inner]`` under stored bits: element (o, r, i) by bit ``position + o * inner + i``."""
    keep = unpack_bits(words, position, outer * inner).reshape(outer, 1, inner)
    source, target = x.reshape(outer, repeat, inner), y.reshape(outer, repeat, inner)
    if dtype == BFLOAT16:
        source = bfloat16_to_float32(source)
    elif dtype == FLOAT16:
        source = source.astype(np.float32)
    kind = source.dtype.type
    with np.errstate(all="ignore"):  # inf and NaN in data are data
        kept = source * kind(a)
        if b != 0.0 or c != 0.0:
            kept += kind(b)
        result = np.where(keep, kept, kind(c))
        target[...] = float32_to_bfloat16(result) if dtype == BFLOAT16 else result


def gaussian_multiply(dtype: int, x: Array, y: Array, first: int, n: int, seed: int, offset: int, sigma: float) -> None:
    """``y[i] = x[i] * (1 + sigma * z)`` with z the standard normal number of cell ``first + i``, for i < n.

    Cells are below 2**61. The factor is float32 for every dtype, computed by the steps of `_normals` in their order,
    each rounded to nearest even and none contracted with the next, so that all backends have it bit for bit; then the
    product is as for the affine: float64 in itself, 16-bit types in float32, rounded once.
    """
    source, target = x.reshape(-1), y.reshape(-1)
    one, spread = np.float32(1), np.float32(sigma)
    for at in range(0, n, 32 * CHUNK_WORDS):
        part = slice(at, min(n, at + 32 * CHUNK_WORDS))
        factor = one + spread * _normals(first + at, part.stop - at, seed, offset)
        values = source[part]
        if dtype == BFLOAT16:
            values = bfloat16_to_float32(values)
        with np.errstate(all="ignore"):
            if dtype == FLOAT16:
                values = values.astype(np.float32)
            result = values * factor
            target[part] = float32_to_bfloat16(result) if dtype == BFLOAT16 else result


def dilate_bits(to: Words, words: Words, outer: int, n: int, inner: int, block: int) -> None:
    """Widens what is dropped along an axis: bits ``[outer, n, inner]`` of words to bits ``[outer, n + block - 1,
    inner]`` of to, where cell i is kept if those of the cells ``i - block + 1 .. i`` that there are, are kept.

    ``to`` and ``words`` are different arrays; bits past the last in the last word of ``to`` become 0.
    """
    keep = unpack_bits(words, 0, outer * n * inner).reshape(outer, n, inner)
    result = np.ones((outer, n + block - 1, inner), np.bool_)
    for shift in range(block):
        result[:, shift : shift + n] &= keep
    write_bits(to, 0, result.reshape(-1))


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


def _keep_words(first: int, count: int, seed: int, offset: int, threshold: int) -> Words:
    """Mask words ``first .. first+count-1``, drawn lazily: words leave the draw when all their cells are decided."""
    index = np.arange(count, dtype=np.uint64) + np.uint64(first)
    drop = np.zeros(count, np.uint32)
    undecided = np.full(count, LOW, np.uint32)
    open_words = np.arange(count)
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

"""Calls of the CUDA primitives, by address on arrays between guards, and the reference's results for them."""

from __future__ import annotations

import math
import re

import numpy as np

from fastdrop.backends import reference
from fastdrop.backends.cuda import driver
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.core.mask import word_count
from fastdrop.core.random import LOW, MULTIPLIERS, NOISE_CELLS, NOISE_COUNTERS, NOISE_DOMAIN, ROUNDS, WEYL

from ...cases import AFFINE, OFFSET, SEED, TENTH, Guarded, assert_same_bits

SCALE = AFFINE["scale"]
STREAM = 0x5000

AXES = {
    "channels-last": ((2, 105), (5, 7), (7, 1), (3, 35)),
    "channels-last, whole vectors": ((2, 280), (5, 7), (7, 1), (8, 35)),
    "channels-last, shared in space": ((2, 8), (5, 0), (7, 0), (8, 1)),
    "transposed": ((64, 1), (48, 64)),
    "innermost shared": ((6, 1), (40, 0)),
    "innermost in steps": ((6, 1), (40, 6)),
    "all shared": ((500, 0),),
    "one axis in steps": ((500, 3),),
    "gaps": ((7, 1000), (16, 30), (5, 0)),
    "ones": ((1, 5), (6, 1), (1, 0), (8, 6), (1, 1)),
    "five axes": ((2, 1), (3, 0), (2, 50), (5, 2), (8, 100)),
    "seven axes": ((2, 300), (1, 9), (2, 0), (3, 11), (2, 1), (2, 0), (4, 40)),
    "words apart": ((3, 3200), (4, 320), (8, 32)),
    "vectors of any stride": ((3, 1), (5, 1001), (7, 17), (16, 170)),
    "vectors of neighbours": ((3, 2003), (5, 0), (2, 501), (32, 1)),
    "vectors that share a cell": ((3, 409), (5, 31), (2, 3), (16, 0)),
    "elements of any stride": ((3, 1), (5, 1001), (7, 17), (9, 170)),
}


def forward(
    gpu,
    dtype,
    n,
    *,
    first=0,
    cut=TENTH,
    affine=SCALE,
    shifts=(0, 0, 0),
    stored=True,
    in_place=False,
    seed=SEED,
    seed_at=0,
):
    """(y, words) of dropout_forward on poisoned arrays; kernels may write y and words, and read x, no more."""
    x = Guarded.of(dtype.data(n), shifts[0])
    y = x if in_place else Guarded(n, dtype.storage, shifts[1])
    words = Guarded(word_count(n), np.uint32, shifts[2])
    x.array.flags.writeable = in_place
    gpu.forget()
    gpu.allow(x.array, y.array, *[words.array] * stored)
    numba_cuda.dropout_forward_at(
        *(0, STREAM, dtype.tag, x.array.ctypes.data, y.array.ctypes.data, words.array.ctypes.data * stored),
        *(first, n, seed, OFFSET, cut, *affine),
        seed_at=seed_at,
    )
    return y.array, words.array


def expected_forward(dtype, n, *, first=0, cut=TENTH, affine=SCALE):
    y, words = np.empty(n, dtype.storage), np.empty(word_count(n), np.uint32)
    reference.dropout_forward(dtype.tag, dtype.data(n), y, words, first, n, SEED, OFFSET, cut, *affine)
    return y, words


def assert_as_reference(dtype, actual, expected, what=""):
    """A GPU has one NaN; where it is computed with there must be one."""
    nan = is_nan(dtype, expected)
    assert_same_bits(is_nan(dtype, actual), nan, (what, "NaN"))
    assert_same_bits(np.where(nan, expected, actual), expected, what)


def is_nan(dtype, values):
    magnitude = values.view(dtype.bits) & dtype.bits((1 << (dtype.exponent + dtype.mantissa)) - 1)
    return magnitude > ((1 << dtype.exponent) - 1) << dtype.mantissa


def assert_forward_as_reference(gpu, dtype, n, *, shifts=(0, 0, 0), **options):
    y, words = forward(gpu, dtype, n, shifts=shifts, **options)
    expected_y, expected_words = expected_forward(dtype, n, **options)
    assert_same_bits(words, expected_words, ("words", n, options, shifts))
    assert_as_reference(dtype, y, expected_y, ("y", n, options, shifts))


def strided(
    gpu, dtype, axes, words, *, position=0, affine=SCALE, shifts=(0, 0, 0), in_place=False, kept=None, grid=None
):
    """strided_affine likewise, or masked_affine for a grid; ``kept`` is to lie on the device."""
    n = math.prod(extent for extent, _ in axes)
    x = Guarded.of(dtype.data(n), shifts[0])
    y = x if in_place else Guarded(n, dtype.storage, shifts[1])
    stored = Guarded.of(words, shifts[2])
    x.array.flags.writeable = in_place
    stored.array.flags.writeable = False
    gpu.forget()
    gpu.allow(x.array, y.array, stored.array)
    addresses = [array.ctypes.data for array in (x.array, y.array, stored.array)]
    options = {}
    if kept is not None:
        there = np.array([kept], np.uint64)
        there.flags.writeable = False
        gpu.allow(there)
        options = {"kept_at": there.ctypes.data}
    if grid:
        numba_cuda.masked_affine_at(0, STREAM, dtype.tag, *addresses, position, *grid, *affine, **options)
    else:
        numba_cuda.strided_affine_at((0, STREAM), dtype.tag, addresses, position, axes, affine, **options)
    return y.array


def masked(gpu, dtype, grid, words, **options):
    return strided(gpu, dtype, [(extent, 0) for extent in grid], words, grid=grid, **options)


def expected_masked(dtype, grid, words, *, position=0, affine=SCALE):
    y = np.empty(math.prod(grid), dtype.storage)
    reference.masked_affine(dtype.tag, dtype.data(y.size), y, words, position, *grid, *affine)
    return y


def expected_strided(dtype, axes, words, *, position=0, affine=SCALE):
    """Each element's bit looked up, and packed in the order of memory."""
    cells = np.zeros((), np.int64)
    for extent, stride in axes:
        cells = cells[..., None] + np.arange(extent) * stride
    flags = np.unpackbits(words.view(np.uint8), bitorder="little")[position + cells.reshape(-1)]
    packed = np.zeros(word_count(flags.size), np.uint32)
    packed.view(np.uint8)[: -(-flags.size // 8)] = np.packbits(flags, bitorder="little")
    return expected_masked(dtype, (1, 1, flags.size), packed, affine=affine)


def reach(axes):
    """Cells that the axes span."""
    return sum((extent - 1) * stride for extent, stride in axes) + 1


def random_words(cells):
    return np.random.default_rng(cells).integers(0, 2**32, word_count(cells), np.uint32)


def assert_masked_as_reference(gpu, dtype, grid, *, position=0, affine=SCALE, **options):
    words = random_words(position + grid[0] * grid[2])
    y = masked(gpu, dtype, grid, words, position=position, affine=affine, **options)
    expected = expected_masked(dtype, grid, words, position=position, affine=affine)
    assert_as_reference(dtype, y, expected, (grid, position, affine, options))


def assert_strided_as_reference(gpu, dtype, axes, *, position=0, affine=SCALE, **options):
    words = random_words(position + reach(axes))
    y = strided(gpu, dtype, axes, words, position=position, affine=affine, **options)
    expected = expected_strided(dtype, axes, words, position=position, affine=affine)
    assert_as_reference(dtype, y, expected, (axes, position, affine, options))


def assert_gaussian_as_reference(
    gpu, dtype, n, *, first=0, seed=SEED, offset=OFFSET, sigma=0.5, shifts=(0, 0), in_place=False, seed_at=0
):
    x = Guarded.of(dtype.data(n), shifts[0])
    y = x if in_place else Guarded(n, dtype.storage, shifts[1])
    expected = np.empty(n, dtype.storage)
    reference.gaussian_multiply(dtype.tag, x.array, expected, first, n, seed, offset, sigma)
    x.array.flags.writeable = in_place
    gpu.allow(x.array, y.array)
    by_value = 0 if seed_at else seed
    addresses = x.array.ctypes.data, y.array.ctypes.data
    numba_cuda.gaussian_multiply_at(
        0, STREAM, dtype.tag, *addresses, first, n, by_value, offset, sigma, seed_at=seed_at
    )
    assert_as_reference(dtype, y.array, expected, (n, first, sigma, shifts))


def assert_dilated_as_reference(gpu, outer, n, inner, block):
    words = random_words(outer * n * inner) | np.random.default_rng(1).integers(0, 2**32, 1, np.uint32)
    words.flags.writeable = False
    to = Guarded(word_count(outer * (n + block - 1) * inner), np.uint32)
    expected = np.empty_like(to.array)
    reference.dilate_bits(expected, words, outer, n, inner, block)
    gpu.forget()
    gpu.allow(words, to.array)
    numba_cuda.dilate_bits_at(0, STREAM, to.array.ctypes.data, words.ctypes.data, outer, n, inner, block)
    assert_same_bits(to.array, expected, (outer, n, inner, block))


def assert_counted(gpu, count, before=0):
    words, kept = random_words(32 * count), np.array([before], np.uint64)
    words.flags.writeable = False
    gpu.forget()
    gpu.allow(words, kept)
    numba_cuda.count_bits_at(0, STREAM, words.ctypes.data, count, kept.ctypes.data)
    assert kept.tolist() == [before + int(np.bitwise_count(words).sum())], count


def drawing_noise(radius, angle, seed=SEED):
    """(first cell of a tile, offset): normals 0 and 1 of a cell of it are made of these two uniform numbers.

    Philox is undone, round by round; outputs 2 and 3 are tried until the counter is one of noise.
    """
    inverse = [pow(m, -1, 1 << 32) for m in MULTIPLIERS]
    for rest in range(1 << 10):
        c0, c1, c2, c3 = radius, angle, rest, radius ^ angle
        for done in reversed(range(ROUNDS)):
            k0, k1 = ((seed >> 32 * i) + done * WEYL[i] & LOW for i in range(2))
            before0, before2 = c3 * inverse[0] & LOW, c1 * inverse[1] & LOW
            c1, c3 = c0 ^ k0 ^ before2 * MULTIPLIERS[1] >> 32, c2 ^ k1 ^ before0 * MULTIPLIERS[0] >> 32
            c0, c2 = before0, before2
        if c1 >> 27 == NOISE_DOMAIN >> 27:
            counter = c0 | (c1 ^ NOISE_DOMAIN) << 32
            return counter // NOISE_COUNTERS * NOISE_CELLS, c2 | c3 << 32
    raise AssertionError("no counter of noise")


def accesses_vectors(launch):
    opcodes = " ".join(launch.executed)
    loads, stores = (bool(re.search(rf"{kind}\.global\.v[24]\.", opcodes)) for kind in ("ld", "st"))
    assert loads == stores
    return loads


def launched(gpu):
    return {(launch.variant.body, launch.variant.form) for launch in gpu.launches}


def drawn(gpu, n, *, first=0, cut=TENTH, position=0, seed=SEED, seed_at=0):
    """draw_bits into words of a pattern, one more than it needs; the words, and what they are to be."""
    expected = np.random.default_rng(0).integers(0, 2**32, word_count(position + n) + 1, np.uint32)
    words = Guarded.of(expected)
    reference.draw_bits(expected, position, first, n, seed, OFFSET, cut)
    gpu.allow(words.array)
    by_value = 0 if seed_at else seed
    numba_cuda.draw_bits_at(
        0, STREAM, words.array.ctypes.data, position, first, n, by_value, OFFSET, cut, seed_at=seed_at
    )
    return words.array, expected


def blocks_of(gpu, monkeypatch, *counts):
    """For each count, a GPU that launches at most so many blocks: fewer than there are tiles work in turn."""
    for blocks in counts:
        monkeypatch.setattr(driver, "BLOCKS_PER_SM", blocks)
        gpu.install((9, 0), sms=1)
        yield blocks

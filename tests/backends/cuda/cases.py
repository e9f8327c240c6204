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

from ...cases import AFFINE, OFFSET, SEED, TENTH, Guarded, assert_same_bits, golden

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


def run(gpu, primitive, *arguments, **options):
    """Calls a primitive on arrays between guards, by address; a kernel may write where NumPy may.

    A real ``gpu`` has memory of its own: ``address`` puts an array with its guards there, ``fetch`` brings all back.
    """
    guarded = [x for x in (*arguments, *options.values()) if isinstance(x, Guarded)]
    gpu.forget()
    gpu.allow(*[one.array for one in guarded])
    address, stream = getattr(gpu, "address", lambda one: one.array.ctypes.data), getattr(gpu, "stream", STREAM)
    at = [address(x) if isinstance(x, Guarded) else x for x in arguments]
    options = {name: address(x) if isinstance(x, Guarded) else x for name, x in options.items()}
    if primitive == "strided_affine":
        tag, x, y, words, *rest = at
        numba_cuda.strided_affine_at((0, stream), tag, (x, y, words), *rest, **options)
    else:
        getattr(numba_cuda, f"{primitive}_at")(0, stream, *at, **options)
    getattr(gpu, "fetch", lambda: None)()
    assert all(one.intact for one in guarded)


def read_only(values, shift=0):
    guarded = Guarded.of(values, shift)
    guarded.array.flags.writeable = False
    return guarded


def on_device(number):
    """The option of a primitive for a number on the device, or no number."""
    return 0 if number is None else read_only(np.array([number], np.uint64))


def data(dtype, n, shifts, in_place):
    """x and y, each so many bytes past a border."""
    x = Guarded.of(dtype.data(n), shifts[0]) if in_place else read_only(dtype.data(n), shifts[0])
    return x, x if in_place else Guarded(n, dtype.storage, shifts[1])


def forward(
    gpu, dtype, n, *, first=0, cut=TENTH, affine=SCALE, shifts=(0, 0, 0), stored=True, in_place=False, seed_at=None
):
    """(y, words) of dropout_forward on poisoned arrays; ``seed_at``: the seed lies on the device."""
    (x, y), words = data(dtype, n, shifts, in_place), Guarded(word_count(n), np.uint32, shifts[2])
    draw = first, n, SEED if seed_at is None else 0, OFFSET, cut
    run(gpu, "dropout_forward", dtype.tag, x, y, words if stored else 0, *draw, *affine, seed_at=on_device(seed_at))
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


def assert_forward_as_reference(gpu, dtype, n, *, shifts=(0, 0, 0), seed_at=None, **options):
    y, words = forward(gpu, dtype, n, shifts=shifts, seed_at=seed_at, **options)
    expected_y, expected_words = expected_forward(dtype, n, **options)
    assert_same_bits(words, expected_words, ("words", n, options, shifts))
    assert_as_reference(dtype, y, expected_y, ("y", n, options, shifts))


def strided(
    gpu, dtype, axes, words, *, position=0, affine=SCALE, shifts=(0, 0, 0), in_place=False, kept=None, grid=None
):
    """strided_affine likewise, or masked_affine for a grid; ``kept`` is to lie on the device."""
    x, y = data(dtype, math.prod(extent for extent, _ in axes), shifts, in_place)
    arrays = dtype.tag, x, y, read_only(words, shifts[2]), position
    if grid:
        run(gpu, "masked_affine", *arrays, *grid, *affine, kept_at=on_device(kept))
    else:
        run(gpu, "strided_affine", *arrays, axes, affine, kept_at=on_device(kept))
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


def assert_scaled_by_a_count(gpu, dtype, grid, cells, kept):
    """masked_affine with ``cells / kept``, where only the GPU knows what was kept."""
    words, scale = random_words(5 + grid[0] * grid[2]), cells / kept if kept else 0.0
    y = masked(gpu, dtype, grid, words, position=5, affine=(float(cells), 0.0, 0.0), kept=kept)
    expected = expected_masked(dtype, grid, words, position=5, affine=(scale, 0.0, 0.0))
    assert_as_reference(dtype, y, expected, (cells, kept, grid))


def assert_gaussian_as_reference(
    gpu, dtype, n, *, first=0, offset=OFFSET, sigma=0.5, shifts=(0, 0), in_place=False, seed_at=None
):
    expected = np.empty(n, dtype.storage)
    reference.gaussian_multiply(dtype.tag, dtype.data(n), expected, first, n, SEED, offset, sigma)
    (x, y), seed = data(dtype, n, shifts, in_place), SEED if seed_at is None else 0
    run(gpu, "gaussian_multiply", dtype.tag, x, y, first, n, seed, offset, sigma, seed_at=on_device(seed_at))
    assert_as_reference(dtype, y.array, expected, (n, first, sigma, shifts))


def assert_dilated_as_reference(gpu, outer, n, inner, block):
    words = read_only(random_words(outer * n * inner))
    to = Guarded(word_count(outer * (n + block - 1) * inner), np.uint32)
    expected = np.empty_like(to.array)
    reference.dilate_bits(expected, words.array, outer, n, inner, block)
    run(gpu, "dilate_bits", to, words, outer, n, inner, block)
    assert_same_bits(to.array, expected, (outer, n, inner, block))


def assert_counted(gpu, count, before=0):
    words, kept = random_words(32 * count), Guarded.of(np.array([before], np.uint64))
    run(gpu, "count_bits", read_only(words), count, kept)
    assert kept.array.tolist() == [before + int(np.bitwise_count(words).sum())], count


def assert_drawn_as_reference(gpu, n, *, first=0, cut=TENTH, position=0, seed_at=None):
    """draw_bits into words of a pattern, one more than it needs."""
    expected = np.random.default_rng(0).integers(0, 2**32, word_count(position + n) + 1, np.uint32)
    words, seed = Guarded.of(expected), SEED if seed_at is None else 0
    reference.draw_bits(expected, position, first, n, SEED, OFFSET, cut)
    run(gpu, "draw_bits", words, position, first, n, seed, OFFSET, cut, seed_at=on_device(seed_at))
    assert_same_bits(words.array, expected, (n, first, cut, position))


def assert_rows_as_reference(gpu, shape, *, first=0, cut=TENTH, position=0, seed_at=None):
    """draw_rows of outer, outer_pitch, rows, pitch and columns, into words as above."""
    n = shape[0] * shape[2] * shape[4]
    expected = np.random.default_rng(0).integers(0, 2**32, word_count(position + n) + 1, np.uint32)
    words, seed = Guarded.of(expected), SEED if seed_at is None else 0
    reference.draw_rows(expected, position, first, *shape, SEED, OFFSET, cut)
    run(gpu, "draw_rows", words, position, first, *shape, seed, OFFSET, cut, seed_at=on_device(seed_at))
    assert_same_bits(words.array, expected, (shape, first, cut, position))


def assert_golden_vectors(gpu):
    vectors = [vector for vector in golden()["masks"] if 0 < vector["threshold"] < 1 << 32]
    assert vectors
    for vector in vectors:
        expected = [int(word, 16) for word in vector["words"]]
        words, n = Guarded(len(expected), np.uint32), 32 * len(expected)
        seed, offset = int(vector["seed"], 16), int(vector["offset"], 16)
        run(gpu, "draw_bits", words, 0, 32 * vector["first_word"], n, seed, offset, vector["threshold"])
        assert words.array.tolist() == expected, vector


# Uniform numbers at the borders of what makes a normal one: u = 1, its smallest, sqrt(1/2) and 1/2; quarters of a turn.
RADII = (0xFFFFFFFF, 0xFFFFFF7F, 0, 1, 0xB504F333, 0xB504F2FF, 0x80000000, 0x7FFFFFFF)
ANGLES = (0, 0x1FFFFFFF, 0x20000000, 0x3FFFFFFF, 0x40000000, 0x60000000, 0x80000000, 0xDFFFFFFF, 0xE0000000, 0xFFFFFFFF)


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


def blocks_of(gpu, monkeypatch, *counts):
    """For each count, a GPU that launches at most so many blocks: fewer than there are tiles work in turn."""
    for blocks in counts:
        monkeypatch.setattr(driver, "BLOCKS_PER_SM", blocks)
        gpu.install((9, 0), sms=1)
        yield blocks

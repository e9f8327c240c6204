"""The CUDA kernels' PTX against the reference backend, bit for bit, in an interpreter behind a stub driver.

It stops at what lies outside of the arrays, at misaligned addresses and at data races. NaNs are compared as NaNs.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdrop.backends import reference
from fastdrop.backends.cuda import driver
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.core.mask import word_count
from fastdrop.core.random import keep_scale

from ...cases import AFFINE, DTYPES, GRIDS, OFFSET, SEED, TENTH, THRESHOLDS, Guarded, assert_same_bits, golden
from .cases import (
    ANGLES,
    AXES,
    COUNTS,
    DILATIONS,
    RADII,
    SCALE,
    accesses_vectors,
    assert_as_reference,
    assert_counted,
    assert_dilated_as_reference,
    assert_forward_as_reference,
    assert_gaussian_as_reference,
    assert_masked_as_reference,
    assert_scaled_by_a_count,
    assert_strided_as_reference,
    drawing_noise,
    drawn,
    expected_drawn,
    expected_forward,
    expected_strided,
    forward,
    launched,
    masked,
    random_words,
    reach,
    strided,
)

pytest_plugins = ["tests.backends.cuda.gpu_stub"]

# Borders of bit, word, tile (1,024) and block (4,096).
LENGTHS = (1, 31, 32, 33, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 20_001)
# First cells within a word and a tile, and so that the word index passes 2**32 midway.
FIRSTS = (0, 1, 31, 32, 1024, 2**37 - 1024, 2**37 - 1029)
POSITIONS = (0, 1, 31, 32, 33, 1000)
OLD = (7, 5)


# ---- draw_bits ----


def test_draw_bits_golden_vectors(gpu):
    vectors = [vector for vector in golden()["masks"] if 0 < vector["threshold"] < 1 << 32]
    assert vectors
    for vector in vectors:
        expected = np.array([int(word, 16) for word in vector["words"]], np.uint32)
        words = np.full(expected.size, 0xA5A5A5A5, np.uint32)
        gpu.forget()
        gpu.allow(words)
        seed, offset = int(vector["seed"], 16), int(vector["offset"], 16)
        first, n = 32 * vector["first_word"], 32 * words.size
        numba_cuda.draw_bits_at(0, 0, words.ctypes.data, 0, first, n, seed, offset, vector["threshold"])
        assert words.tolist() == expected.tolist(), vector


@pytest.mark.parametrize("position", POSITIONS)
def test_draw_bits_positions(gpu, position):
    """Bits below stay, those above the last one are cleared, the next word stays."""
    for n, first in itertools.product((1, 31, 33, 1000, 5000), (*FIRSTS, 7)):
        gpu.forget()
        words, before = drawn(gpu, n, first=first, position=position)
        assert_same_bits(words, expected_drawn(n, before, first=first, position=position), (n, first))


@pytest.mark.parametrize("cut", THRESHOLDS.values(), ids=THRESHOLDS)
def test_draw_bits_thresholds(gpu, cut):
    for n, first, position in ((1, 0, 0), (5000, 2**37 - 2000, 0), (9000, 3, 40)):
        words, before = drawn(gpu, n, first=first, position=position, cut=cut)
        assert_same_bits(words, expected_drawn(n, before, first=first, position=position, cut=cut), (n, first))


def test_draw_bits_to_the_last_cell(gpu):
    for n in (1, 33, 1024, 5000):
        for position in (0, 9):
            words, before = drawn(gpu, n, first=2**64 - n, position=position)
            assert_same_bits(words, expected_drawn(n, before, first=2**64 - n, position=position), (n, position))


def test_draw_bits_any_number_of_blocks(gpu, monkeypatch):
    n, first, position = 50_001, 12_345, 3
    for blocks in (1, 2, 3, 132):
        monkeypatch.setattr(driver, "BLOCKS_PER_SM", blocks)
        gpu.install((9, 0), sms=1)
        words, before = drawn(gpu, n, first=first, position=position)
        assert_same_bits(words, expected_drawn(n, before, first=first, position=position), blocks)
        assert gpu.launches[0].grid[0] == min(blocks, -(-word_count(n + position) // driver.THREADS))


def test_draw_bits_any_split(gpu):
    """Parts drawn in turn into one array of words leave what one call leaves, seams within words included."""
    n, first = 5001, 12_345
    whole = expected_drawn(n, np.zeros(word_count(n), np.uint32), first=first)
    for cuts in ((1,), (31,), (500,), (1024,), (1, 2, 33, 600, 4097)):
        words = Guarded(word_count(n), np.uint32)
        gpu.forget()
        gpu.allow(words.array)
        for start, stop in itertools.pairwise((0, *cuts, n)):
            at = words.array.ctypes.data
            numba_cuda.draw_bits_at(0, 0, at, start, first + start, stop - start, SEED, OFFSET, TENTH)
        assert_same_bits(words.array, whole, cuts)


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**64 - 1])
def test_seed_on_the_device(gpu, seed):
    """The seed given by value is not used then."""
    at = np.array([seed], np.uint64)
    at.flags.writeable = False
    gpu.allow(at)
    words, before = drawn(gpu, 3000, seed=123, seed_at=at.ctypes.data)
    assert_same_bits(words, expected_drawn(3000, before, seed=seed))
    dtype = DTYPES[0]
    for first in (0, 5):
        x, y, kept = dtype.data(1500), np.empty(1500, np.float32), np.empty(word_count(1500), np.uint32)
        gpu.allow(x, y, kept)
        addresses = [array.ctypes.data for array in (x, y, kept)]
        numba_cuda.dropout_forward_at(
            0, 0, dtype.tag, *addresses, first, 1500, 123, OFFSET, TENTH, *SCALE, seed_at=at.ctypes.data
        )
        expected_y, expected_words = np.empty_like(y), np.empty_like(kept)
        reference.dropout_forward(dtype.tag, x, expected_y, expected_words, first, 1500, seed, OFFSET, TENTH, *SCALE)
        assert_same_bits(kept, expected_words, first)
        assert_as_reference(dtype, y, expected_y, first)


# ---- dropout_forward ----


@pytest.mark.parametrize("first", FIRSTS)
def test_dropout_forward_lengths(gpu, dtype, first):
    for n in LENGTHS:
        assert_forward_as_reference(gpu, dtype, n, first=first)
    assert launched(gpu) == {("elementwise", "drawn_shifted" if first % 32 else "drawn")}


@pytest.mark.parametrize("cut", THRESHOLDS.values(), ids=THRESHOLDS)
def test_dropout_forward_thresholds(gpu, cut):
    for n, first in ((1, 0), (2049, 31), (9000, 2**37 - 4096)):
        assert_forward_as_reference(gpu, DTYPES[0], n, first=first, cut=cut)


def test_dropout_forward_to_the_last_cell(gpu):
    for n in (1, 32, 33, 1024, 2049):
        assert_forward_as_reference(gpu, DTYPES[0], n, first=2**64 - n)


def test_dropout_forward_alignment(gpu, dtype):
    """Vectors where x and y both allow them, else elements, with one result."""
    item = dtype.itemsize
    for shifts in itertools.product((0, item, 16 - item, 16), (0, item, 16 - item, 16), (0, 4)):
        gpu.launches.clear()
        for n in (33, 2100):
            assert_forward_as_reference(gpu, dtype, n, shifts=shifts)
        wide = shifts[0] % 16 == shifts[1] % 16 == 0
        assert [accesses_vectors(launch) for launch in gpu.launches] == [False, wide], shifts


@pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE)
def test_dropout_forward_affine(gpu, dtype, affine):
    for n, first in ((1, 0), (1023, 32), (5000, 1024)):
        assert_forward_as_reference(gpu, dtype, n, first=first, affine=affine)
    if dtype.tag == 0:
        assert_forward_as_reference(gpu, dtype, 5000, first=5, affine=affine)


def test_dropout_forward_in_place(gpu, dtype):
    for n in LENGTHS:
        y, words = forward(gpu, dtype, n, first=32, in_place=True)
        expected_y, expected_words = expected_forward(dtype, n, first=32)
        assert_same_bits(words, expected_words, n)
        assert_as_reference(dtype, y, expected_y, n)


def test_dropout_forward_without_words(gpu, dtype):
    """Nothing is stored and y is the same: what backward from the seed relies on."""
    for n in LENGTHS:
        y, words = forward(gpu, dtype, n, first=64, stored=False)
        assert_as_reference(dtype, y, expected_forward(dtype, n, first=64)[0], n)
        assert (words == 0xFFFFFFFF).all()


def test_dropout_forward_any_number_of_blocks(gpu, monkeypatch, dtype):
    """Also fewer than there are tiles: then a warp takes several in turn."""
    n = 20_001
    for blocks in (1, 2, 3):
        monkeypatch.setattr(driver, "BLOCKS_PER_SM", blocks)
        gpu.install((9, 0), sms=1)
        for shift in (0, dtype.itemsize):
            assert_forward_as_reference(gpu, dtype, n, shifts=(shift, 0, 0))
        assert {launch.grid for launch in gpu.launches} == {(blocks, 1, 1)}


# ---- masked_affine ----


@pytest.mark.parametrize("position", POSITIONS)
def test_masked_affine_lengths(gpu, dtype, position):
    for n in LENGTHS:
        assert_masked_as_reference(gpu, dtype, (1, 1, n), random_words(position + n), position=position)
    assert launched(gpu) == {("elementwise", "stored")}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masked_affine_grids(gpu, dtype, grid):
    size = math.prod(grid)
    for position in (33,) if size > 50_000 else (0, 1, 33, 1000):
        words = random_words(position + grid[0] * grid[2])
        assert_masked_as_reference(gpu, dtype, grid, words, position=position)
    assert bool(gpu.launches) == bool(size)


@pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE)
def test_masked_affine_affine(gpu, dtype, affine):
    for grid in ((1, 1, 5000), (24, 25, 1), (4, 33, 40), (4, 33, 37)):
        words = random_words(5 + grid[0] * grid[2])
        assert_masked_as_reference(gpu, dtype, grid, words, position=5, affine=affine)
    assert launched(gpu) == {("elementwise", "stored"), ("strided", "wide"), ("strided", "narrow")}


def test_masked_affine_alignment(gpu, dtype):
    item = dtype.itemsize
    for shifts in itertools.product((0, item, 16), (0, item, 16), (0, 4)):
        gpu.launches.clear()
        for grid in ((1, 1, 2100), (3, 5, 40)):
            words = random_words(9 + grid[0] * grid[2])
            assert_masked_as_reference(gpu, dtype, grid, words, position=9, shifts=shifts)
        assert [accesses_vectors(launch) for launch in gpu.launches] == [shifts[0] % 16 == shifts[1] % 16 == 0] * 2


def test_masked_affine_in_place(gpu, dtype):
    for grid in ((1, 1, 4097), (5, 7, 33), (5, 7, 64)):
        words = random_words(grid[0] * grid[2])
        assert_masked_as_reference(gpu, dtype, grid, words, in_place=True)


def test_masked_affine_reads_only_its_bits(gpu, dtype):
    """Garbage in the unused bits of the last word, and below position, changes nothing."""
    keep = np.unpackbits(random_words(3000).view(np.uint8), bitorder="little")
    for position, grid in ((0, (1, 1, 1)), (3, (1, 1, 33)), (40, (1, 1, 2061)), (3, (5, 3, 9)), (7, (4, 4, 16))):
        y = []
        for fill in (0, 1):
            flags = np.full(-(-(position + grid[0] * grid[2]) // 32) * 32, fill, np.uint8)
            used = slice(position, position + grid[0] * grid[2])
            flags[used] = keep[used]
            words = np.packbits(flags, bitorder="little").view(np.uint32)
            y.append(masked(gpu, dtype, grid, words, position=position))
        assert_same_bits(y[0], y[1], (position, grid))


def test_masked_affine_any_number_of_blocks(gpu, monkeypatch, dtype):
    for blocks in (1, 3):
        monkeypatch.setattr(driver, "BLOCKS_PER_SM", blocks)
        gpu.install((9, 0), sms=1)
        for grid in ((1, 1, 20_001), (3, 20, 112), (3, 20, 61)):
            assert_masked_as_reference(gpu, dtype, grid, random_words(7 + grid[0] * grid[2]), position=7)
        assert max(launch.grid[0] for launch in gpu.launches) == blocks


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_scale_of_a_count(gpu, dtype, counts):
    assert_scaled_by_a_count(gpu, dtype, *counts)
    assert {launch.variant.counted for launch in gpu.launches} == {True}
    assert launched(gpu) == {("elementwise", "stored"), ("strided", "wide"), ("strided", "narrow")}


# ---- strided_affine ----


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_strided_affine_axes(gpu, dtype, axes):
    for position in (0, 29):
        assert_strided_as_reference(gpu, dtype, axes, position=position)
    assert_strided_as_reference(gpu, dtype, axes, shifts=(dtype.itemsize, 0, 4), affine=AFFINE["affine"])


def test_strided_affine_of_channels_last_is_that_of_the_mask(gpu):
    """NHWC memory under a mask of NCHW cells: transposed back, it is what contiguous data gives."""
    dtype, (n, c, h, w) = DTYPES[0], (3, 8, 5, 6)
    words = random_words(n * c * h * w)
    axes = (n, c * h * w), (h, w), (w, 1), (c, h * w)
    y = strided(gpu, dtype, axes, words).reshape(n, h, w, c).transpose(0, 3, 1, 2)
    x = dtype.data(n * c * h * w).reshape(n, h, w, c).transpose(0, 3, 1, 2)
    expected = np.empty(x.shape, np.float32)
    reference.masked_affine(dtype.tag, np.ascontiguousarray(x), expected, words, 0, 1, 1, x.size, *SCALE)
    assert_as_reference(dtype, np.ascontiguousarray(y), expected)


def test_strided_affine_in_place(gpu, dtype):
    assert_strided_as_reference(gpu, dtype, AXES["channels-last, whole vectors"], in_place=True)
    assert_strided_as_reference(gpu, dtype, AXES["gaps"], in_place=True)


@pytest.mark.parametrize(
    "axes",
    [
        ((5, 700), (7, 1), (100, 7)),  # pieces of the outermost axis
        ((2, 1), (3, 2), (11, 0), (100, 6)),
        ((2, 1), (3000, 2)),  # one step of it is too large
        ((9000, 0),),
        ((9001, 3),),
        ((2, 1), (2, 2), (5, 0), (30, 4), (33, 150)),  # and five axes
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[3]], ids=str, indirect=True)
def test_strided_affine_in_parts(gpu, monkeypatch, dtype, axes):
    """What 32 bits can't number goes in pieces. Elementwise needs none."""
    monkeypatch.setattr(numba_cuda, "INDEX_END", 2500)
    assert_strided_as_reference(gpu, dtype, axes, position=3)
    assert len(gpu.launches) > 1
    words = random_words(3 + reach(axes))
    y = strided(gpu, dtype, axes, words, position=3, affine=(9.0, 0.0, 0.0), kept=8)
    assert_as_reference(dtype, y, expected_strided(dtype, axes, words, position=3, affine=(9 / 8, 0.0, 0.0)))
    gpu.launches.clear()
    assert_masked_as_reference(gpu, dtype, (1, 1, 9000), random_words(9000))
    assert len(gpu.launches) == 1


@st.composite
def layouts(draw):
    """Up to six axes in an order of memory that isn't the mask's, some of them shared."""
    extents = [*draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)), draw(st.sampled_from([1, 3, 4, 8, 16]))]
    cells, stride = [0] * len(extents), 1
    for axis in draw(st.permutations(range(len(extents)))):
        if draw(st.booleans()):
            cells[axis] = stride
            stride *= extents[axis]
    return tuple(zip(extents, cells, strict=True))


@settings(max_examples=40)
@given(axes=layouts(), position=st.integers(0, 70), small=st.booleans())
def test_strided_affine_any_layout(gpu, axes, position, small):
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(numba_cuda, "INDEX_END", 1025)
        assert_strided_as_reference(gpu, DTYPES[0], axes, position=position)


@given(extent=st.integers(1, 2**31 - 1), n=st.integers(0, 2**31 - 1))
@example(extent=1, n=2**31 - 1)
@example(extent=2**31 - 1, n=2**31 - 2)
@example(extent=2**30 + 1, n=2**31 - 1)
@settings(max_examples=500)
def test_reciprocal_is_exact(extent, n):
    """Too large a quotient comes first where n is one less than a multiple of extent, and of those the largest."""
    for bits in (31, 63):
        multiplier, shift = numba_cuda.reciprocal(extent, bits)
        assert 0 < multiplier < 2 << bits  # as the kernels take it
        assert shift <= 2 * bits
        worst = (2**bits // extent) * extent - 1
        for number in (n, n - n % extent, worst, 2**bits - 1):
            assert number * multiplier >> shift == number // extent


# ---- gaussian_multiply ----


@pytest.mark.parametrize("first", [0, 1, 15, 16, 63, 2**34 - 100, 2**61 - 20_001])
def test_gaussian_multiply_lengths(gpu, dtype, first):
    """From within a tile, over where the counter passes 2**32, to the last cell."""
    for n in (1, 15, 16, 17, 48, 63, 64, 65, 2047, 20_001):
        assert_gaussian_as_reference(gpu, dtype, n, first=first)


def test_gaussian_multiply_alignment(gpu, dtype):
    item = dtype.itemsize
    for shifts in itertools.product((0, item, 16 - item), repeat=2):
        assert_gaussian_as_reference(gpu, dtype, 1000, first=3, shifts=shifts)
    assert_gaussian_as_reference(gpu, dtype, 5000, first=3, shifts=(item, 0), in_place=True)


@pytest.mark.parametrize("sigma", [0.0, 1 / 3, 1.0, 1e-8, 1e30])
def test_gaussian_multiply_sigma(gpu, dtype, sigma):
    assert_gaussian_as_reference(gpu, dtype, 3000, sigma=sigma)


@pytest.mark.parametrize("radius", RADII, ids=hex)
def test_gaussian_multiply_at_the_borders_of_uniform_numbers(gpu, radius):
    for angle in ANGLES:
        first, offset = drawing_noise(radius, angle)
        assert_gaussian_as_reference(gpu, DTYPES[0], 64, first=first, offset=offset)


def test_draws_at_the_borders_are_those_asked_for():
    first, offset = drawing_noise(0xFFFFFFFF, 0)
    y = np.ones(64, np.float32)
    reference.gaussian_multiply(0, y, y, first, 64, SEED, offset, 1.0)
    assert (y == 1.0).sum() >= 2  # both normals are 0, since u = 1


def test_gaussian_multiply_any_number_of_blocks(gpu, monkeypatch):
    for blocks in (1, 3):
        monkeypatch.setattr(driver, "BLOCKS_PER_SM", blocks)
        gpu.install((9, 0), sms=1)
        assert_gaussian_as_reference(gpu, DTYPES[0], 20_001, first=9)
        assert gpu.launches[0].grid == (blocks, 1, 1)


def test_gaussian_multiply_seed_on_the_device(gpu):
    at = np.array([SEED + 1], np.uint64)
    gpu.allow(at)
    assert_gaussian_as_reference(gpu, DTYPES[0], 3000, seed=SEED + 1, seed_at=at.ctypes.data)


# ---- dilate_bits and count_bits ----


@pytest.mark.parametrize("shape", [*DILATIONS, (300, 56, 56, 7), (9, 0, 3, 5)], ids=str)
def test_dilate_bits(gpu, shape):
    assert_dilated_as_reference(gpu, *shape)


@settings(max_examples=60)
@given(outer=st.integers(1, 40), n=st.integers(1, 70), inner=st.integers(1, 70), block=st.integers(1, 80))
def test_dilate_bits_any_shape(gpu, outer, n, inner, block):
    assert_dilated_as_reference(gpu, outer, n, inner, block)


def test_count_bits(gpu):
    for count in (1, 31, 32, 33, 127, 128, 129, 2047, 20_001):
        assert_counted(gpu, count)
        assert_counted(gpu, count, before=2**32 - 1)


def test_bits_any_number_of_blocks(gpu, monkeypatch):
    for blocks in (1, 3):
        monkeypatch.setattr(driver, "BLOCKS_PER_SM", blocks)
        gpu.install((9, 0), sms=1)
        assert_dilated_as_reference(gpu, 3, 100, 70, 3)
        assert_counted(gpu, 20_001)
        assert {launch.grid for launch in gpu.launches} == {(blocks, 1, 1)}


# ---- values ----


def test_dropped_values_leave_no_trace(gpu, dtype):
    """A dropped infinity or NaN, of either sign, is +0: every bit of it."""
    x = np.tile(dtype.specials(), 110)
    for shift in (0, dtype.itemsize):
        source, y = Guarded.of(x, shift), Guarded(x.size, dtype.storage)
        words = np.zeros(word_count(x.size), np.uint32)
        gpu.forget()
        gpu.allow(source.array, y.array, words)
        addresses = [array.ctypes.data for array in (source.array, y.array, words)]
        numba_cuda.masked_affine_at(0, 0, dtype.tag, *addresses, 0, 1, 1, x.size, *SCALE)
        assert not y.array.view(dtype.bits).any()
        cut = 1 << 31
        numba_cuda.dropout_forward_at(
            0, 0, dtype.tag, *addresses, 0, x.size, SEED, OFFSET, cut, keep_scale(cut), 0.0, 0.0
        )
        keep = np.unpackbits(words.view(np.uint8), bitorder="little")[: x.size].view(np.bool_)
        assert not keep.all()
        assert not y.array.view(dtype.bits)[~keep].any()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=str, indirect=True)
@pytest.mark.parametrize("cc", [(9, 0), OLD], ids=["9.0", "7.5"])
@pytest.mark.parametrize("shift", [0, 2], ids=["wide", "narrow"])
def test_every_16_bit_pattern(gpu, dtype, cc, shift):
    """All 65,536 of them kept, among them NaNs with payloads, subnormals, and results that overflow or vanish."""
    gpu.install(cc)
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype.storage)
    keep_all = np.full(x.size // 32, 0xFFFFFFFF, np.uint32)
    source, y, expected = Guarded.of(x, shift), Guarded(x.size, dtype.storage), np.empty_like(x)
    gpu.allow(source.array, y.array, keep_all)
    addresses = [array.ctypes.data for array in (source.array, y.array, keep_all)]
    for affine in ((keep_scale(TENTH), 0.0, 0.0), (1e-4, 0.0, 0.0), (-1e4, 0.0, 0.0), (1.0, 0.5, -1.0)):
        numba_cuda.masked_affine_at(0, 0, dtype.tag, *addresses, 0, 1, 1, x.size, *affine)
        reference.masked_affine(dtype.tag, x, expected, keep_all, 0, 1, 1, x.size, *affine)
        assert_as_reference(dtype, y.array, expected, affine)


def test_oldest_gpus(gpu, dtype):
    """Compute capability 7.5 rounds to bfloat16, and 16-bit types in pairs, by other instructions."""
    gpu.install(OLD)
    for n in (1, 1023, 1025, 5000):
        assert_forward_as_reference(gpu, dtype, n, first=32)
    for grid in ((5, 7, 16), (3, 5, 11)):
        assert_masked_as_reference(gpu, dtype, grid, random_words(grid[0] * grid[2]), affine=AFFINE["affine"])
    assert_gaussian_as_reference(gpu, dtype, 5000, first=3)
    assert_scaled_by_a_count(gpu, dtype, 1100, 987)
    assert {launch.cc for launch in gpu.launches} == {OLD}


def test_coefficients_too_large_for_the_type(gpu, dtype):
    """Infinite, as in the reference."""
    affine = (1e300, -1e300, 1e300)
    assert_masked_as_reference(gpu, dtype, (1, 1, 2000), random_words(2000), affine=affine)


def test_nothing_to_do_launches_nothing(gpu, dtype):
    forward(gpu, dtype, 0)
    drawn(gpu, 0)
    assert_gaussian_as_reference(gpu, dtype, 0)
    assert_dilated_as_reference(gpu, 0, 3, 5, 2)
    assert_counted(gpu, 0)
    for grid in ((0, 3, 5), (3, 0, 5), (3, 5, 0)):
        masked(gpu, dtype, grid, random_words(32))
    assert gpu.launches == []

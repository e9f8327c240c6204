"""Runs the PTX of the CUDA kernels on masks in an interpreter, and compares it with the reference, bit for bit.

The interpreter stops at memory outside of the arrays, at misaligned addresses and at data races. NaNs are compared as
NaNs. The kernel bodies are the same code for each dtype but for loads, stores and conversions: what has nothing to do
with those runs in float32 alone.
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
from fastdrop.core.checks import FLOAT32
from fastdrop.core.mask import word_count
from fastdrop.core.random import keep_scale

from ...cases import AFFINE, DTYPES, GRIDS, OFFSET, SEED, TENTH, THRESHOLDS, Guarded, assert_same_bits, golden
from .cases import (
    AXES,
    COUNTS,
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
    blocks_of,
    drawn,
    expected_drawn,
    expected_forward,
    expected_masked,
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
LENGTHS = (1, 31, 32, 33, 1023, 1024, 1025, 2047, 2049, 4095, 4097, 9001)
# First cells within a word and a tile, and so that the word index passes 2**32 midway.
FIRSTS = (0, 1, 31, 32, 1024, 2**37 - 1024, 2**37 - 1029)
POSITIONS = (0, 1, 31, 32, 33, 1000)
OLD = (7, 5)
NO_OFFSET = AFFINE | {"dropped": (1.25, 0.0, 0.7)}  # b = 0, but not c: -0 that is kept becomes +0
F32 = DTYPES[0]
BY_WIDTH = pytest.mark.parametrize("dtype", [F32, DTYPES[1]], ids=str, indirect=True)  # computed in 4 bytes, in 8
HALVES = pytest.mark.parametrize("dtype", DTYPES[2:], ids=str, indirect=True)


# ---- draw_bits ----


def assert_drawn_as_reference(gpu, n, **options):
    gpu.forget()
    words, before = drawn(gpu, n, **options)
    assert_same_bits(words, expected_drawn(n, before, **options), (n, options))


def test_draw_bits_golden_vectors(gpu):
    vectors = [vector for vector in golden()["masks"] if 0 < vector["threshold"] < 1 << 32]
    assert vectors
    for vector in vectors:
        expected = [int(word, 16) for word in vector["words"]]
        words = np.full(len(expected), 0xA5A5A5A5, np.uint32)
        gpu.forget()
        gpu.allow(words)
        seed, offset = int(vector["seed"], 16), int(vector["offset"], 16)
        first, n = 32 * vector["first_word"], 32 * words.size
        numba_cuda.draw_bits_at(0, 0, words.ctypes.data, 0, first, n, seed, offset, vector["threshold"])
        assert words.tolist() == expected, vector


def test_draw_bits_positions(gpu):
    """Bits below stay, those above the last one are cleared, the next word stays."""
    for position, n, first in itertools.product(POSITIONS, (1, 33, 1000), (0, 7, 2**37 - 1029)):
        assert_drawn_as_reference(gpu, n, first=first, position=position)
    for first in FIRSTS:
        assert_drawn_as_reference(gpu, 5000, first=first, position=33)
    for n, position in itertools.product((1, 33, 1024), (0, 9)):
        assert_drawn_as_reference(gpu, n, first=2**64 - n, position=position)


@pytest.mark.parametrize("cut", THRESHOLDS.values(), ids=THRESHOLDS)
def test_draw_bits_and_dropout_forward_thresholds(gpu, cut):
    assert_drawn_as_reference(gpu, 5000, first=2**37 - 2000, position=3, cut=cut)
    for first in (31, 2**37 - 4096):
        assert_forward_as_reference(gpu, F32, 2049, first=first, cut=cut)


def test_draw_bits_any_number_of_blocks_and_any_split(gpu, monkeypatch):
    n, first, position = 50_001, 12_345, 3
    for blocks in blocks_of(gpu, monkeypatch, 1, 3, 132):
        assert_drawn_as_reference(gpu, n, first=first, position=position)
        assert gpu.launches[0].grid[0] == min(blocks, -(-word_count(n + position) // driver.THREADS))
    n, cuts = 5001, (1, 2, 33, 600, 1024, 4097)  # parts in turn leave what one call leaves, seams within words included
    words = Guarded(word_count(n), np.uint32)
    gpu.allow(words.array)
    for start, stop in itertools.pairwise((0, *cuts, n)):
        at = words.array.ctypes.data
        numba_cuda.draw_bits_at(0, 0, at, start, first + start, stop - start, SEED, OFFSET, TENTH)
    assert_same_bits(words.array, expected_drawn(n, np.zeros(word_count(n), np.uint32), first=first))


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_seed_on_the_device(gpu, seed):
    """The seed given by value is not used then."""
    at = np.array([seed], np.uint64)
    at.flags.writeable = False
    gpu.allow(at)
    words, before = drawn(gpu, 3000, seed=123, seed_at=at.ctypes.data)
    assert_same_bits(words, expected_drawn(3000, before, seed=seed))
    for first in (0, 5):
        x, y, saved = F32.data(1500), np.empty(1500, np.float32), np.empty(word_count(1500), np.uint32)
        gpu.allow(x, y, saved)
        addresses = [array.ctypes.data for array in (x, y, saved)]
        numba_cuda.dropout_forward_at(
            0, 0, FLOAT32, *addresses, first, 1500, 123, OFFSET, TENTH, *SCALE, seed_at=at.ctypes.data
        )
        expected_y, expected_words = np.empty_like(y), np.empty_like(saved)
        reference.dropout_forward(FLOAT32, x, expected_y, expected_words, first, 1500, seed, OFFSET, TENTH, *SCALE)
        assert_same_bits(saved, expected_words, first)
        assert_as_reference(F32, y, expected_y, first)
    assert_gaussian_as_reference(gpu, F32, 3000, seed=seed, seed_at=at.ctypes.data)


def test_positions_beyond_32_bits(gpu):
    """Words that lie where bit 0 would be 16 GiB below them."""
    far = 2**37
    x, y, words, expected = F32.data(240), np.empty(240, np.float32), random_words(300), random_words(300)
    gpu.allow(x, y, words)
    at = words.ctypes.data - far // 8
    numba_cuda.draw_bits_at(0, 0, at, far + 41, 7, 200, SEED, OFFSET, TENTH)
    reference.draw_bits(expected, 41, 7, 200, SEED, OFFSET, TENTH)
    assert_same_bits(words, expected)
    for grid in ((1, 1, 240), (3, 5, 16), (5, 16, 3)):
        numba_cuda.masked_affine_at(0, 0, FLOAT32, x.ctypes.data, y.ctypes.data, at, far + 41, *grid, *SCALE)
        assert_as_reference(F32, y, expected_masked(F32, grid, words, position=41), grid)


# ---- dropout_forward ----


@pytest.mark.parametrize("first", [0, 5])
def test_dropout_forward_lengths(gpu, dtype, first):
    for n in LENGTHS:
        assert_forward_as_reference(gpu, dtype, n, first=first)
    assert launched(gpu) == {("elementwise", "drawn_shifted" if first else "drawn")}


def test_dropout_forward_firsts(gpu):
    for first, n in itertools.product(FIRSTS, (33, 1100)):
        assert_forward_as_reference(gpu, F32, n, first=first)
    for n in (1, 33, 2049):
        assert_forward_as_reference(gpu, F32, n, first=2**64 - n)


def test_dropout_forward_alignment(gpu, dtype):
    """Vectors where x and y both lie at multiples of 16 bytes, else elements, with the same result."""
    item = dtype.itemsize
    for x, y in ((0, 0), (16, 48), (item, 0), (0, item), (16 - item, 16), (8, 24)):
        gpu.launches.clear()
        assert_forward_as_reference(gpu, dtype, 2100, shifts=(x, y, 4))
        assert [accesses_vectors(launch) for launch in gpu.launches] == [x % 16 == y % 16 == 0], (x, y)


@pytest.mark.parametrize("affine", NO_OFFSET.values(), ids=NO_OFFSET)
@BY_WIDTH
def test_affine(gpu, dtype, affine):
    for first in (0, 5) if dtype is F32 else (1024,):
        assert_forward_as_reference(gpu, dtype, 2049, first=first, affine=affine)
    words = random_words(5 + 1100)
    words[0] |= 0x3FE0  # keeps zeros of both signs, and other special values
    for grid in ((1, 1, 1100), (24, 25, 1), (4, 33, 40), (4, 33, 37)):
        assert_masked_as_reference(gpu, dtype, grid, words, position=5, affine=affine)
    assert launched(gpu) >= {("elementwise", "stored"), ("strided", "wide"), ("strided", "narrow")}
    assert {launch.variant.plain for launch in gpu.launches} == {affine[1] == affine[2] == 0.0}


def test_dropout_forward_in_place_and_without_words(gpu, dtype):
    """Without words y is the same: backward from a seed relies on it."""
    for n, shift, first in ((33, 0, 64), (2100, 0, 32), (2100, 8, 5)):
        shifts = (shift, shift, 0)
        y, words = forward(gpu, dtype, n, first=first, shifts=shifts, in_place=True)
        expected_y, expected_words = expected_forward(dtype, n, first=first)
        assert_same_bits(words, expected_words, n)
        assert_as_reference(dtype, y, expected_y, n)
        y, words = forward(gpu, dtype, n, first=first, shifts=shifts, stored=False)
        assert_as_reference(dtype, y, expected_y, n)
        assert (words == 0xFFFFFFFF).all()


def test_elementwise_any_number_of_blocks(gpu, monkeypatch):
    for blocks in blocks_of(gpu, monkeypatch, 1, 2, 3):
        for shift, n in itertools.product((0, 4), (20_001,)):
            assert_forward_as_reference(gpu, F32, n, shifts=(shift, 0, 0))
            assert_masked_as_reference(gpu, F32, (1, 1, n), random_words(n + 7), position=7, shifts=(shift, 0, 0))
        for grid in ((3, 20, 112), (3, 20, 61)):
            assert_masked_as_reference(gpu, F32, grid, random_words(7 + grid[0] * grid[2]), position=7)
        assert max(launch.grid[0] for launch in gpu.launches) == blocks


# ---- masked_affine ----


def test_masked_affine_lengths(gpu, dtype):
    for position, lengths in ((0, LENGTHS), (29, LENGTHS[1::2])):
        for n in lengths:
            assert_masked_as_reference(gpu, dtype, (1, 1, n), random_words(position + n), position=position)
    assert launched(gpu) == {("elementwise", "stored")}


def test_masked_affine_positions(gpu):
    for position, n in itertools.product(POSITIONS, (33, 2049)):
        assert_masked_as_reference(gpu, F32, (1, 1, n), random_words(position + n), position=position)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masked_affine_grids(gpu, grid):
    """Of sixteen bits too, which come eight to a vector."""
    for dtype, position in ((F32, 33), (DTYPES[3], 0))[: 1 if math.prod(grid) > 50_000 else 2]:
        assert_masked_as_reference(gpu, dtype, grid, random_words(position + grid[0] * grid[2]), position=position)
    assert bool(gpu.launches) == bool(math.prod(grid))


def test_masked_affine_alignment_and_in_place(gpu, dtype):
    item = dtype.itemsize
    for shifts in ((0, 0, 4), (16, 32, 0), (item, 0, 0), (0, item, 4), (item, item, 0)):
        gpu.launches.clear()
        for grid in ((1, 1, 2100), (3, 5, 40)):
            words = random_words(9 + grid[0] * grid[2])
            assert_masked_as_reference(gpu, dtype, grid, words, position=9, shifts=shifts)
        assert [accesses_vectors(launch) for launch in gpu.launches] == [shifts[0] % 16 == shifts[1] % 16 == 0] * 2
    for grid, shift in itertools.product(((1, 1, 2100), (5, 7, 33), (5, 7, 64)), (0, 8)):
        words = random_words(grid[0] * grid[2])
        assert_masked_as_reference(gpu, dtype, grid, words, shifts=(shift, shift, 0), in_place=True)


def test_masked_affine_reads_only_its_bits(gpu):
    """Garbage in the unused bits of the last word, and below position, changes nothing."""
    keep = np.unpackbits(random_words(3000).view(np.uint8), bitorder="little")
    for position, grid in ((0, (1, 1, 1)), (3, (1, 1, 33)), (40, (1, 1, 2061)), (3, (5, 3, 9)), (7, (4, 4, 16))):
        y, cells = [], grid[0] * grid[2]
        for fill in (0, 1):
            flags = np.full(-(-(position + cells) // 32) * 32, fill, np.uint8)
            flags[position : position + cells] = keep[position : position + cells]
            y.append(masked(gpu, F32, grid, np.packbits(flags, bitorder="little").view(np.uint32), position=position))
        assert_same_bits(y[0], y[1], (position, grid))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@BY_WIDTH
def test_scale_of_a_count(gpu, dtype, counts):
    assert_scaled_by_a_count(gpu, dtype, *counts)
    assert {launch.variant.counted for launch in gpu.launches} == {True}
    assert launched(gpu) == {("elementwise", "stored"), ("strided", "wide"), ("strided", "narrow")}


# ---- strided_affine ----


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_strided_affine_axes(gpu, axes):
    for dtype, position in ((F32, 0), (F32, 29), (DTYPES[3], 29)):
        assert_strided_as_reference(gpu, dtype, axes, position=position, in_place=position == 29)
    assert_strided_as_reference(gpu, F32, axes, shifts=(4, 0, 4), affine=AFFINE["affine"])


def test_strided_affine_of_each_dtype(gpu, dtype):
    for name in ("channels-last, whole vectors", "channels-last", "gaps"):
        assert_strided_as_reference(gpu, dtype, AXES[name], position=3)
    assert launched(gpu) == {("strided", "wide"), ("strided", "narrow")}


def test_strided_affine_of_channels_last_is_that_of_the_mask(gpu):
    """NHWC memory under a mask of NCHW cells: transposed back, it is what contiguous data gives."""
    n, c, h, w = 3, 8, 5, 6
    words = random_words(n * c * h * w)
    axes = (n, c * h * w), (h, w), (w, 1), (c, h * w)
    y = strided(gpu, F32, axes, words).reshape(n, h, w, c).transpose(0, 3, 1, 2)
    x = F32.data(n * c * h * w).reshape(n, h, w, c).transpose(0, 3, 1, 2)
    expected = np.empty(x.shape, np.float32)
    reference.masked_affine(FLOAT32, np.ascontiguousarray(x), expected, words, 0, 1, 1, x.size, *SCALE)
    assert_as_reference(F32, np.ascontiguousarray(y), expected)


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
def test_strided_affine_in_parts(gpu, monkeypatch, axes):
    """What 32 bits can't number goes in pieces. Elementwise needs none."""
    monkeypatch.setattr(numba_cuda, "INDEX_END", 2500)
    assert_strided_as_reference(gpu, F32, axes, position=3)
    assert len(gpu.launches) > 1
    words = random_words(3 + reach(axes))
    y = strided(gpu, F32, axes, words, position=3, affine=(9.0, 0.0, 0.0), kept=8)
    assert_as_reference(F32, y, expected_strided(F32, axes, words, position=3, affine=(9 / 8, 0.0, 0.0)))
    gpu.launches.clear()
    assert_masked_as_reference(gpu, F32, (1, 1, 9000), random_words(9000))
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


@settings(max_examples=25)
@given(axes=layouts(), position=st.integers(0, 70), small=st.booleans())
def test_strided_affine_any_layout(gpu, axes, position, small):
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(numba_cuda, "INDEX_END", 1025)
        assert_strided_as_reference(gpu, F32, axes, position=position)


@given(extent=st.integers(1, 2**31 - 1), n=st.integers(0, 2**31 - 1))
@example(extent=1, n=2**31 - 1)
@example(extent=2**31 - 1, n=2**31 - 2)
@example(extent=2**30 + 1, n=2**31 - 1)
def test_reciprocal_is_exact(extent, n):
    """Too large a quotient comes first where n is one less than a multiple of extent, and of those the largest."""
    for bits in (31, 63):
        multiplier, shift = numba_cuda.reciprocal(extent, bits)
        assert 0 < multiplier < 2 << bits  # as the kernels take it
        assert shift <= 2 * bits
        worst = (2**bits // extent) * extent - 1
        for number in (n, n - n % extent, worst, 2**bits - 1):
            assert number * multiplier >> shift == number // extent


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


@HALVES
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
    for affine in ((1e-4, 0.0, 0.0), (-1e4, 0.0, 0.0), (1.0, 0.5, -1.0)):
        numba_cuda.masked_affine_at(0, 0, dtype.tag, *addresses, 0, 1, 1, x.size, *affine)
        reference.masked_affine(dtype.tag, x, expected, keep_all, 0, 1, 1, x.size, *affine)
        assert_as_reference(dtype, y.array, expected, affine)


@HALVES
def test_oldest_gpus(gpu, dtype):
    """Compute capability 7.5 rounds to 16-bit types, alone and in pairs, by other instructions."""
    gpu.install(OLD)
    assert_forward_as_reference(gpu, dtype, 1025, first=32)
    for grid in ((5, 7, 16), (3, 5, 11)):
        assert_masked_as_reference(gpu, dtype, grid, random_words(grid[0] * grid[2]), affine=AFFINE["affine"])
    assert_gaussian_as_reference(gpu, dtype, 1000, first=3)
    assert {launch.cc for launch in gpu.launches} == {OLD}


def test_coefficients_too_large_for_the_type(gpu, dtype):
    """Infinite, as in the reference."""
    affine = (1e300, -1e300, 1e300)
    assert_masked_as_reference(gpu, dtype, (1, 1, 2000), random_words(2000), affine=affine)


def test_nothing_to_do_launches_nothing(gpu):
    forward(gpu, F32, 0)
    drawn(gpu, 0)
    assert_gaussian_as_reference(gpu, F32, 0)
    assert_dilated_as_reference(gpu, 0, 3, 5, 2)
    assert_counted(gpu, 0)
    for grid in ((0, 3, 5), (3, 0, 5), (3, 5, 0)):
        masked(gpu, F32, grid, random_words(32))
    assert gpu.launches == []


# ---- costs ----


@pytest.mark.parametrize("dtype", [F32, DTYPES[3]], ids=str, indirect=True)
def test_instructions_per_element(gpu, dtype):
    """Of PTX, of which machine code needs half: see the instruction budget in docs/design.md."""
    n = 16 * 1024
    forward(gpu, dtype, n)
    (launch,) = gpu.launches
    assert launch.executed.total() * 32 / n < 32

"""Runs the PTX of the CUDA kernels on masks and noise in an interpreter, and compares it with the reference.

All agrees bit for bit, NaNs as NaNs. The interpreter stops at memory outside of the arrays, at misaligned addresses and
at data races. The kernel bodies are the same code for each dtype but for loads, stores and conversions: what has
nothing to do with those runs in float32 alone.
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

from ...cases import AFFINE, DTYPES, GRIDS, OFFSET, SEED, TENTH, THRESHOLDS, Guarded, assert_same_bits
from .cases import (
    ANGLES,
    AXES,
    RADII,
    SCALE,
    accesses_vectors,
    assert_as_reference,
    assert_counted,
    assert_dilated_as_reference,
    assert_drawn_as_reference,
    assert_forward_as_reference,
    assert_gaussian_as_reference,
    assert_golden_vectors,
    assert_masked_as_reference,
    assert_rows_as_reference,
    assert_scaled_by_a_count,
    assert_strided_as_reference,
    blocks_of,
    drawing_noise,
    expected_forward,
    expected_masked,
    expected_strided,
    forward,
    launched,
    masked,
    random_words,
    reach,
    read_only,
    run,
    strided,
)
from .launching import parameters

pytest_plugins = ["tests.backends.cuda.gpu_stub"]

F32, F64, F16, BF16 = DTYPES
# Borders of bit, word, tile (1,024) and block (4,096).
LENGTHS = (1, 31, 32, 33, 1023, 1024, 1025, 4095, 4097, 9001)
# First cells within a word and a tile, and so that the word index passes 2**32 midway.
FIRSTS = (0, 1, 31, 32, 1024, 2**37 - 1024, 2**37 - 1029)
ROWS = (  # outer, outer_pitch, rows, pitch, columns
    (2, 300, 70, 2, 1),
    (3, 9999, 9, 32, 32),
    (2, 5000, 11, 40, 31),
    (3, 70_000, 5, 1000, 125),
    (2, 4 * 125, 4, 125, 125),
    (2, 30_000, 3, 1024, 512),
    (2, 0, 3, 2**37, 140),
    (3, 10, 7, 3, 70),
)
DILATIONS = (  # (outer, n, inner, block)
    (1, 1, 1, 1),
    (5, 7, 1, 3),  # several rows in a word
    (70, 1, 1, 7),
    (3, 10, 7, 4),
    (2, 5, 33, 3),
    (1, 100, 1, 40),  # blocks wider than a word
    (3, 4, 40, 9),  # and than what is widened
    (2, 64, 32, 2),
    (6, 50, 1, 1),  # a copy
    (50, 56, 56, 7),
)


# ---- draw_bits ----


def test_draw_bits_golden_vectors(gpu):
    assert_golden_vectors(gpu)


def test_draw_bits_positions(gpu):
    """Bits below stay, those above the last one are cleared, the next word stays."""
    for position, n in itertools.product((0, 1, 31, 32, 33, 1000), (1, 33, 1000)):
        assert_drawn_as_reference(gpu, n, first=7 * (n % 2), position=position)
    for first in FIRSTS:
        assert_drawn_as_reference(gpu, 5000, first=first, position=33)
    for n, position in itertools.product((1, 33, 1024), (0, 9)):
        assert_drawn_as_reference(gpu, n, first=2**64 - n, position=position)


def test_draw_bits_thresholds(gpu):
    for cut in THRESHOLDS.values():
        assert_drawn_as_reference(gpu, 5000, first=2**37 - 2000, position=3, cut=cut)


def test_draw_bits_any_number_of_blocks_and_any_split(gpu, monkeypatch):
    n, first, position = 50_001, 12_345, 3
    for blocks in blocks_of(gpu, monkeypatch, 1, 3, 132):
        assert_drawn_as_reference(gpu, n, first=first, position=position)
        assert gpu.launches[0].grid[0] == min(blocks, -(-word_count(n + position) // driver.THREADS))
    n, cuts = 5001, (1, 2, 33, 600, 1024, 4097)  # parts in turn leave what one call leaves, seams within words included
    words, expected = Guarded(word_count(n), np.uint32), np.zeros(word_count(n), np.uint32)
    gpu.allow(words.array)
    for start, stop in itertools.pairwise((0, *cuts, n)):
        at = words.array.ctypes.data
        numba_cuda.draw_bits_at(0, 0, at, start, first + start, stop - start, SEED, OFFSET, TENTH)
    reference.draw_bits(expected, 0, first, n, SEED, OFFSET, TENTH)
    assert_same_bits(words.array, expected)


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_draw_rows(gpu, shape):
    outer, outer_pitch, rows, pitch, columns = shape
    reach = (outer - 1) * outer_pitch + (rows - 1) * pitch + columns
    for position, first in ((0, 0), (13, 7), (1000, 2**37 - 50), (31, 2**64 - reach)):
        assert_rows_as_reference(gpu, shape, first=first, position=position)


def test_draw_rows_thresholds_and_any_number_of_blocks(gpu, monkeypatch):
    for cut in THRESHOLDS.values():
        assert_rows_as_reference(gpu, (2, 9000, 9, 1000, 125), first=7, position=3, cut=cut)
    for blocks in blocks_of(gpu, monkeypatch, 1, 3):
        assert_rows_as_reference(gpu, (2, 200_000, 101, 1001, 125), first=7, position=3)
        assert gpu.launches[0].grid[0] == min(blocks, -(-word_count(3 + 2 * 101 * 125) // driver.THREADS))


def test_seed_on_the_device(gpu):
    assert_drawn_as_reference(gpu, 3000, seed_at=SEED)
    assert_rows_as_reference(gpu, (2, 9000, 9, 1000, 125), seed_at=SEED)
    assert_gaussian_as_reference(gpu, F32, 3000, seed_at=SEED)
    for first in (0, 5):
        assert_forward_as_reference(gpu, F32, 1500, first=first, seed_at=SEED)


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


def test_dropout_forward_of_each_dtype(gpu, dtype):
    """Vectors where x and y both lie at multiples of 16 bytes, else elements, with the same result."""
    item = dtype.itemsize
    shifts = itertools.cycle(((0, 0, 4), (item, 0, 0), (16, 48, 0), (0, item, 4), (16 - item, 16, 0)))
    for n, (x, y, words) in zip(LENGTHS, shifts, strict=False):
        gpu.launches.clear()
        assert_forward_as_reference(gpu, dtype, n, shifts=(x, y, words))
        tiles_in_vectors = parameters(gpu.launches[0])[5]
        assert tiles_in_vectors == (n // 1024 if x % 16 == y % 16 == 0 else 0)
    for n, shift in ((33, 0), (2100, 0), (2100, 8)):
        shifts = (shift, shift, 0)
        y, words = forward(gpu, dtype, n, first=64, shifts=shifts, in_place=True)
        expected_y, expected_words = expected_forward(dtype, n, first=64)
        assert_same_bits(words, expected_words, n)
        assert_as_reference(dtype, y, expected_y, n)
        y, words = forward(gpu, dtype, n, first=64, shifts=shifts, stored=False)  # backward from a seed relies on it
        assert_as_reference(dtype, y, expected_y, n)
        assert (words == 0xFFFFFFFF).all()
    assert launched(gpu) == {("elementwise", "drawn")}


def test_dropout_forward_firsts(gpu):
    for first, n in itertools.product(FIRSTS, (33, 2100)):
        assert_forward_as_reference(gpu, F32, n, first=first, shifts=(4 * (n == 33), 0, 0))
    for n in (1, 33, 2049):
        assert_forward_as_reference(gpu, F32, n, first=2**64 - n)
    for cut, first in itertools.product((1, 1 << 31, 2**32 - 1), (31, 2**37 - 4096)):
        assert_forward_as_reference(gpu, F32, 2049, first=first, cut=cut)


@pytest.mark.parametrize(("dtype", "name"), [*((F32, name) for name in AFFINE), (F64, "affine")], ids=str)
def test_affine(gpu, dtype, name):
    affine = AFFINE[name]
    assert_forward_as_reference(gpu, dtype, 2049, first=1024, affine=affine)
    for grid in ((1, 1, 1100), (4, 33, 40), (4, 33, 37)):
        assert_masked_as_reference(gpu, dtype, grid, position=5, affine=affine)
    forms = {("elementwise", "drawn"), ("elementwise", "stored"), ("strided", "wide"), ("strided", "narrow")}
    assert launched(gpu) == forms
    assert {launch.variant.plain for launch in gpu.launches} == {affine[1] == affine[2] == 0.0}


def test_coefficients_too_large_for_the_type(gpu):
    """Infinite, as in the reference."""
    assert_masked_as_reference(gpu, F32, (1, 1, 2000), affine=(1e300, -1e300, 1e300))


def test_elementwise_and_strided_any_number_of_blocks(gpu, monkeypatch):
    for blocks in blocks_of(gpu, monkeypatch, 1, 3):
        for shift in (0, 4):
            assert_forward_as_reference(gpu, F32, 20_001, shifts=(shift, 0, 0))
            assert_masked_as_reference(gpu, F32, (1, 1, 20_001), position=7, shifts=(shift, 0, 0))
        for grid in ((3, 20, 112), (3, 20, 61)):
            assert_masked_as_reference(gpu, F32, grid, position=7)
        assert max(launch.grid[0] for launch in gpu.launches) == blocks


# ---- masked_affine ----


def test_masked_affine_lengths(gpu):
    for position, lengths in ((0, LENGTHS), (29, LENGTHS[1::2])):
        for n in lengths:
            assert_masked_as_reference(gpu, F32, (1, 1, n), position=position)
    for position in (1, 31, 32, 33, 1000):
        assert_masked_as_reference(gpu, F32, (1, 1, 2049), position=position)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masked_affine_grids(gpu, grid):
    """Of sixteen bits too, which come eight to a vector."""
    for dtype, position in ((F32, 33), (BF16, 0))[: 1 if math.prod(grid) > 50_000 else 2]:
        assert_masked_as_reference(gpu, dtype, grid, position=position)
    assert bool(gpu.launches) == bool(math.prod(grid))


@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_masked_affine_alignment_and_in_place(gpu, dtype):
    item = dtype.itemsize
    for shifts in ((16, 32, 4), (item, 0, 0), (0, item, 4)):
        gpu.launches.clear()
        for grid in ((1, 1, 2100), (3, 5, 40)):
            assert_masked_as_reference(gpu, dtype, grid, position=9, shifts=shifts)
        assert [accesses_vectors(launch) for launch in gpu.launches] == [shifts[0] % 16 == shifts[1] % 16 == 0] * 2
    for grid, shift in itertools.product(((1, 1, 2100), (5, 7, 33), (5, 7, 64)), (0, 8)):
        assert_masked_as_reference(gpu, dtype, grid, shifts=(shift, shift, 0), in_place=True)


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


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_scale_of_a_count(gpu, dtype):
    """``cells / kept``, where only the GPU knows what was kept: none, all, more cells than float32 can hold."""
    for cells, kept in ((1000, 0), (1000, 1000), (25_613_457, 23_052_111), (2**40 + 1, 2**39)):
        for grid in ((1, 1, 1100), (3, 5, 16), (3, 5, 11))[: 3 if dtype is F32 else 1]:
            assert_scaled_by_a_count(gpu, dtype, grid, cells, kept)
    assert {launch.variant.counted for launch in gpu.launches} == {True}


# ---- strided_affine ----


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_strided_affine_axes(gpu, axes):
    for dtype, position in ((F32, 0), (BF16, 29)):
        assert_strided_as_reference(gpu, dtype, axes, position=position, in_place=position == 29)


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
    assert_masked_as_reference(gpu, F32, (1, 1, 9000))
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


@settings(max_examples=20)
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


# ---- 16 bits ----


@pytest.mark.parametrize("cc", [(9, 0), (7, 5)], ids=["9.0", "7.5"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_every_16_bit_pattern(gpu, dtype, cc):
    """All 65,536 of them kept, among them NaNs with payloads, subnormals, and results that overflow or vanish.

    Compute capability 7.5 rounds to 16-bit types, alone and in pairs, by other instructions.
    """
    gpu.install(cc)
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype.storage)
    keep_all, expected = np.full(x.size // 32, 0xFFFFFFFF, np.uint32), np.empty_like(x)
    for shift, scale in ((0, 1e-4), (2, 1e-4), (0, -1e4), (2, -1e4)):
        numbers, y = (0, 1, 1, x.size, scale, 0.0, 0.0), Guarded(x.size, dtype.storage)
        run(gpu, "masked_affine", dtype.tag, read_only(x, shift), y, read_only(keep_all), *numbers)
        reference.masked_affine(dtype.tag, x, expected, keep_all, *numbers)
        assert_as_reference(dtype, y.array, expected, (shift, scale))


# ---- gaussian_multiply ----


@pytest.mark.parametrize("first", [0, 63, 2**34 - 100, 2**61 - 2047])
def test_gaussian_multiply_lengths(gpu, first):
    """From within a tile, over where the counter passes 2**32, to the last cell."""
    for n in (1, 15, 16, 17, 63, 64, 65, 2047):
        assert_gaussian_as_reference(gpu, F32, n, first=first)


def test_gaussian_multiply_of_each_dtype(gpu, dtype):
    item = dtype.itemsize
    for shifts, sigma in (((item, 0), 1 / 3), ((0, 16 - item), 1e-8), ((0, 0), 1e30)):
        assert_gaussian_as_reference(gpu, dtype, 1000, first=3, shifts=shifts, sigma=sigma)
    assert_gaussian_as_reference(gpu, dtype, 1000, first=3, shifts=(item, 0), in_place=True)


def test_gaussian_multiply_at_the_borders_of_uniform_numbers(gpu):
    for i in range(20):
        first, offset = drawing_noise(RADII[i % len(RADII)], ANGLES[i % len(ANGLES)])
        assert_gaussian_as_reference(gpu, F32, 64, first=first, offset=offset)
    first, offset = drawing_noise(0xFFFFFFFF, 0)
    y = np.ones(64, np.float32)
    reference.gaussian_multiply(0, y, y, first, 64, SEED, offset, 1.0)
    assert (y == 1.0).sum() >= 2  # the draws are those asked for: both normals are 0, since u = 1


# ---- dilate_bits and count_bits ----


@pytest.mark.parametrize("shape", DILATIONS, ids=str)
def test_dilate_bits(gpu, shape):
    assert_dilated_as_reference(gpu, *shape)


def test_count_bits(gpu):
    for count in (1, 31, 33, 127, 129, 2047):
        assert_counted(gpu, count, before=2**32 - 1)


def test_noise_and_bits_any_number_of_blocks(gpu, monkeypatch):
    for blocks in blocks_of(gpu, monkeypatch, 1, 3):
        assert_gaussian_as_reference(gpu, F32, 20_001, first=9)
        assert_dilated_as_reference(gpu, 3, 100, 70, 3)
        assert_counted(gpu, 20_001)
        assert {launch.grid for launch in gpu.launches} == {(blocks, 1, 1)}


# ---- costs ----


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_instructions_per_element(gpu, dtype):
    """Of PTX, of which machine code needs half: see the instruction budget in docs/design.md."""
    n = 16 * 1024
    forward(gpu, dtype, n)
    (launch,) = gpu.launches
    assert launch.executed.total() * 32 / n < 32

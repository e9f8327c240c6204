"""Every primitive of every backend x instruction set x dtype, bit for bit against the reference backend.

Outputs start as NaN between guards, data is random bits with special values first, inputs must stay as they were.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
import mmap
import runpy
import sys

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.backends import reference
from fastdrop.backends.primitives import PRIMITIVES
from fastdrop.core.mask import word_count
from fastdrop.core.random import keep_scale

from ..cases import (
    AFFINE,
    DILATIONS,
    DTYPES,
    FIRSTS,
    GRAIN,
    GRIDS,
    LENGTHS,
    NOISE_END,
    NOISE_FIRSTS,
    OFFSET,
    POSITIONS,
    ROOT,
    SEED,
    TENTH,
    THRESHOLDS,
    Guarded,
    assert_same_bits,
    primitive_modules,
    streaming_elements,
)
from .cuda.cases import ANGLES, RADII, drawing_noise

SCALE = AFFINE["scale"]
MANY = 7 * GRAIN + 777  # enough for seven threads
# Bytes past a cache line: elements of 2 to 8 bytes aligned and not, and odd addresses.
SHIFTS = (0, 1, 2, 3, 4, 8, 12, 24, 63)


def forward(module, dtype, n, *, first=0, cut=TENTH, affine=SCALE, shifts=(0, 0, 0), stored=True):
    """(y, words) of dropout_forward on poisoned arrays so many bytes past a line; what must not change is checked."""
    x = Guarded.of(dtype.data(n), shifts[0])
    y = Guarded(n, dtype.storage, shifts[1])
    words = Guarded(word_count(n), np.uint32, shifts[2])
    into = words.array if stored else None
    module.dropout_forward(dtype.tag, x.array, y.array, into, first, n, SEED, OFFSET, cut, *affine)
    assert_same_bits(x.array, dtype.data(n), "x")
    assert x.intact
    assert y.intact
    assert words.intact
    return y.array, words.array


def masked(module, dtype, grid, words, *, position=0, affine=SCALE, shifts=(0, 0, 0)):
    """masked_affine likewise: y."""
    n = grid[0] * grid[1] * grid[2]
    x = Guarded.of(dtype.data(n), shifts[0])
    y = Guarded(n, dtype.storage, shifts[1])
    stored = Guarded.of(words, shifts[2])
    module.masked_affine(dtype.tag, x.array, y.array, stored.array, position, *grid, *affine)
    assert_same_bits(x.array, dtype.data(n), "x")
    assert_same_bits(stored.array, words, "words")
    assert x.intact
    assert y.intact
    assert stored.intact
    return y.array


def gaussian(module, dtype, n, *, first=0, seed=SEED, offset=OFFSET, sigma=0.5, shifts=(0, 0)):
    """gaussian_multiply likewise: y."""
    x, y = Guarded.of(dtype.data(n), shifts[0]), Guarded(n, dtype.storage, shifts[1])
    module.gaussian_multiply(dtype.tag, x.array, y.array, first, n, seed, offset, sigma)
    assert_same_bits(x.array, dtype.data(n), "x")
    assert x.intact
    assert y.intact
    return y.array


def dilated(module, words, outer, n, inner, block):
    """dilate_bits likewise: the wider words."""
    source, to = Guarded.of(words), Guarded(word_count(outer * (n + block - 1) * inner), np.uint32)
    module.dilate_bits(to.array, source.array, outer, n, inner, block)
    assert_same_bits(source.array, words, "words")
    assert source.intact
    assert to.intact
    return to.array


def keeping_words(cells, halvings):
    """Words of which 1 bit in 2**halvings is 0, garbage past the last cell included."""
    rng = np.random.default_rng(cells + halvings)
    return np.bitwise_or.reduce(rng.integers(0, 2**32, (halvings, word_count(cells)), np.uint32))


def random_words(cells):
    return np.random.default_rng(cells).integers(0, 2**32, word_count(cells), np.uint32)


def assert_forward_as_reference(module, dtype, n, **options):
    y, words = forward(module, dtype, n, **options)
    expected_y, expected_words = forward(reference, dtype, n, **options)
    assert_same_bits(words, expected_words, ("words", n, options))
    assert_same_bits(y, expected_y, ("y", n, options))


def assert_masked_as_reference(module, dtype, grid, words, **options):
    expected = masked(reference, dtype, grid, words, **options)
    assert_same_bits(masked(module, dtype, grid, words, **options), expected, (grid, options))


def assert_gaussian_as_reference(module, dtype, n, **options):
    expected = gaussian(reference, dtype, n, **options)
    assert_same_bits(gaussian(module, dtype, n, **options), expected, (n, options))


def assert_dilated_as_reference(module, words, *shape):
    assert_same_bits(dilated(module, words, *shape), dilated(reference, words, *shape), shape)


def a_third_of_all(some, others):
    """Pairs in which each of some meets every third of the others, from another one on."""
    return [(one, other) for i, one in enumerate(some) for j, other in enumerate(others) if (i + j) % 3 == 0]


# ---- contract ----


def test_ops_def_is_written_from_the_table():
    """If this fails, run ``make format``."""
    assert (ROOT / "csrc" / "ops.def").read_text() == runpy.run_path(str(ROOT / "csrc" / "ops_def.py"))["text"]()


@pytest.mark.parametrize("name", primitive_modules())
def test_backend_has_the_primitives_of_the_table(name):
    module = primitive_modules()[name]
    if reason := module.unavailable():
        pytest.skip(reason)
    for op, primitive in PRIMITIVES.items():
        assert list(inspect.signature(getattr(module, op)).parameters) == primitive.names


def test_cuda_has_them_by_address_on_a_device_and_a_stream():
    from fastdrop.backends.cuda import launch as module

    for op, primitive in PRIMITIVES.items():
        own = inspect.signature(getattr(module, f"{op}_at")).parameters.values()
        assert [p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD] == ["device", "stream", *primitive.names]
        assert {p.name for p in own if p.kind is p.KEYWORD_ONLY} <= {"seed_at", "kept_at"}


@pytest.mark.parametrize("name", primitive_modules())
def test_backend_has_the_shared_functions(name):
    """What the registry calls on each: same names, parameters and defaults as the reference's."""
    module = primitive_modules()[name]
    for function in ("unavailable", "describe", "set_num_threads"):
        signature = inspect.signature(getattr(module, function))
        assert signature.parameters == inspect.signature(getattr(reference, function)).parameters, function


def test_reference_states_the_contract_of_each_primitive():
    assert all(getattr(reference, op).__doc__ for op in PRIMITIVES)


# ---- the reference itself ----


@pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE)
def test_reference_computes_wide_and_rounds_once(dtype, affine):
    a, b, c = (dtype.computed(v) for v in affine)
    x, keep = dtype.data(GRAIN), np.arange(GRAIN) % 3 != 0
    with np.errstate(all="ignore"):
        wide = x.view(dtype.public).astype(dtype.computed)
        wanted = np.where(keep, wide * a if b == c == 0 else wide * a + b, c).astype(dtype.public)
    y = masked(reference, dtype, (1, 1, GRAIN), fd.PackedMask.from_bool(keep, 0.1).words, affine=affine)
    nan = np.isnan(wanted.astype(dtype.computed))
    assert_same_bits(y[~nan], wanted.view(dtype.storage)[~nan])  # payloads of NaNs are not this test's affair
    assert np.isnan(y[nan].view(dtype.public).astype(dtype.computed)).all()


# ---- dropout_forward ----


def test_dropout_forward_lengths(variant, dtype):
    for n, first in a_third_of_all(LENGTHS, FIRSTS):
        assert_forward_as_reference(variant, dtype, n, first=first)


def test_dropout_forward_thresholds(variant):
    """Whatever the dtype, the draw is the same code: each threshold is drawn under one or two of them."""
    for k, cut in enumerate(THRESHOLDS.values()):
        for j, (n, first) in enumerate(((513, 31), (8704, 512), (20_000, 2**37 - 4101), (140_001, 3))):
            assert_forward_as_reference(variant, DTYPES[(k + j % 2) % len(DTYPES)], n, first=first, cut=cut)


def test_dropout_forward_to_the_last_cell(variant, dtype):
    for n in LENGTHS[1:]:
        assert_forward_as_reference(variant, dtype, n, first=2**64 - n)


def test_dropout_forward_alignment(variant, dtype):
    for k, (x_shift, y_shift) in enumerate(itertools.product(SHIFTS, SHIFTS)):
        shifts = x_shift, y_shift, (0, 1, 4)[k % 3]
        assert_forward_as_reference(variant, dtype, (33, 1023)[k % 2], first=13, shifts=shifts)


def test_dropout_forward_affine(variant, dtype):
    for affine in AFFINE.values():
        for n, first in ((33, 31), (20_000, 512)):
            assert_forward_as_reference(variant, dtype, n, first=first, affine=affine)


def test_dropout_forward_in_place(variant, dtype):
    for k, n in enumerate(LENGTHS):
        affine = AFFINE[("scale", "affine")[k % 2]]
        expected, words = forward(reference, dtype, n, first=7, affine=affine)
        x, stored = Guarded.of(dtype.data(n)), np.empty_like(words)
        variant.dropout_forward(dtype.tag, x.array, x.array, stored, 7, n, SEED, OFFSET, TENTH, *affine)
        assert_same_bits(x.array, expected, n)
        assert_same_bits(stored, words, n)
        assert x.intact


def test_dropout_forward_without_words(variant, dtype):
    """With None for words nothing is stored and y is the same: what backward from the seed relies on."""
    for n in LENGTHS:
        y, words = forward(variant, dtype, n, first=5, stored=False)
        assert_same_bits(y, forward(variant, dtype, n, first=5)[0], n)
        assert (words == 0xFFFFFFFF).all()


# ---- masked_affine ----


def test_masked_affine_lengths(variant, dtype):
    for n, position in a_third_of_all(LENGTHS, POSITIONS):
        assert_masked_as_reference(variant, dtype, (1, 1, n), random_words(position + n), position=position)


def test_masked_affine_grids(variant, dtype):
    for grid, position in a_third_of_all(GRIDS, (0, 1, 33, 512, 1000, 31)):
        words = random_words(position + grid[0] * grid[2])
        assert_masked_as_reference(variant, dtype, grid, words, position=position)


def test_masked_affine_affine(variant, dtype):
    for affine, grid in itertools.product(AFFINE.values(), ((1, 1, 20_000), (24, 25, 1), (4, 33, 37))):
        words = random_words(5 + grid[0] * grid[2])
        assert_masked_as_reference(variant, dtype, grid, words, position=5, affine=affine)


def test_masked_affine_alignment(variant, dtype):
    for k, (x_shift, y_shift) in enumerate(itertools.product(SHIFTS, SHIFTS)):
        grid, shifts = ((1, 1, 1023), (3, 5, 40))[k % 2], (x_shift, y_shift, (0, 1, 4)[k % 3])
        words = random_words(9 + grid[0] * grid[2])
        assert_masked_as_reference(variant, dtype, grid, words, position=9, shifts=shifts)


def test_masked_affine_in_place(variant, dtype):
    grids = (1, 1, 8193), (5, 7, 33), (1, 1, 140_001)
    for affine, grid in itertools.product((AFFINE["scale"], AFFINE["affine"]), grids):
        words = random_words(grid[0] * grid[2])
        x = Guarded.of(dtype.data(grid[0] * grid[1] * grid[2]))
        variant.masked_affine(dtype.tag, x.array, x.array, words, 0, *grid, *affine)
        assert_same_bits(x.array, masked(reference, dtype, grid, words, affine=affine), grid)
        assert x.intact


def test_masked_affine_reads_only_its_words(variant, dtype):
    """Garbage in the unused bits of the last word, and below position, changes nothing."""
    keep = random_words(101)
    for position, n in ((0, 1), (3, 33), (40, 61)):
        ones, zeros = np.full_like(keep, 0xFFFFFFFF), np.zeros_like(keep)
        for words in (ones, zeros):
            flags = np.unpackbits(words.view(np.uint8), bitorder="little")
            source = np.unpackbits(keep.view(np.uint8), bitorder="little")
            flags[position : position + n] = source[position : position + n]
            words[:] = np.packbits(flags, bitorder="little").view(np.uint32)
        y = [masked(variant, dtype, (1, 1, n), words, position=position) for words in (ones, zeros)]
        assert_same_bits(y[0], y[1], (position, n))


# ---- gaussian_multiply ----

TILE = 64
NOISE_LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1000, 8191, 8193, 140_001)


def test_gaussian_multiply_lengths(variant, dtype):
    for n, first in a_third_of_all(NOISE_LENGTHS, NOISE_FIRSTS):
        assert_gaussian_as_reference(variant, dtype, n, first=first)


def test_gaussian_multiply_to_the_last_cell(variant, dtype):
    for n in NOISE_LENGTHS[1:]:
        assert_gaussian_as_reference(variant, dtype, n, first=NOISE_END - n)


def test_gaussian_multiply_sigma(variant, dtype):
    """From no change to overflow."""
    for sigma in (0.0, 1 / 3, 1.0, 1e-8, 1e30):
        assert_gaussian_as_reference(variant, dtype, 20_000, first=5, sigma=sigma)


def test_gaussian_multiply_whole_seeds_and_offsets(variant):
    for seed, offset in ((0, 0), (2**64 - 1, 2**64 - 1), (1 << 32, 1), (1, 1 << 32)):
        assert_gaussian_as_reference(variant, DTYPES[0], 1000, first=5, seed=seed, offset=offset)


def test_gaussian_multiply_at_the_borders_of_uniform_numbers(variant):
    for radius, angle in itertools.product(RADII, ANGLES):
        first, offset = drawing_noise(radius, angle)
        assert_gaussian_as_reference(variant, DTYPES[0], TILE, first=first, offset=offset)


def test_gaussian_multiply_alignment(variant, dtype):
    for k, shifts in enumerate(itertools.product(SHIFTS, SHIFTS)):
        assert_gaussian_as_reference(variant, dtype, (33, 1023)[k % 2], first=13, shifts=shifts)


def test_gaussian_multiply_in_place(variant, dtype):
    for n in NOISE_LENGTHS:
        x = Guarded.of(dtype.data(n), dtype.itemsize)
        variant.gaussian_multiply(dtype.tag, x.array, x.array, 7, n, SEED, OFFSET, 0.5)
        assert_same_bits(x.array, gaussian(reference, dtype, n, first=7), n)
        assert x.intact


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=str, indirect=True)
@pytest.mark.parametrize("sigma", [0.0, 0.5, 1e4])
def test_gaussian_multiply_every_16_bit_pattern(variant, dtype, sigma):
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype.storage)
    y, expected = np.empty_like(x), np.empty_like(x)
    for module, out in ((variant, y), (reference, expected)):
        module.gaussian_multiply(dtype.tag, x, out, 0, x.size, SEED, OFFSET, sigma)
    assert_same_bits(y, expected)


# ---- dilate_bits ----


def dilated_naively(words, outer, n, inner, block):
    """Cell by cell."""
    keep = np.unpackbits(words.view(np.uint8), count=outer * n * inner, bitorder="little").reshape(outer, n, inner)
    wider = np.ones((outer, n + block - 1, inner), bool)
    for o, j, i in np.argwhere(keep == 0):
        wider[o, j : j + block, i] = False
    return fd.PackedMask.from_bool(wider, 0.1).words


@pytest.mark.parametrize("shape", DILATIONS, ids=str)
def test_reference_dilates_as_the_definition_does(shape):
    for halvings in (3, 6):
        words = keeping_words(shape[0] * shape[1] * shape[2], halvings)
        assert_same_bits(dilated(reference, words, *shape), dilated_naively(words, *shape), halvings)


def test_dilate_bits_shapes(variant):
    for shape, halvings in itertools.product(DILATIONS, (1, 4, 9)):
        assert_dilated_as_reference(variant, keeping_words(shape[0] * shape[1] * shape[2], halvings), *shape)


def test_dilate_bits_small_shapes(variant):
    """All of them, so that rows and blocks end at every bit of a word."""
    for n, inner, block in itertools.product((1, 2, 3, 7, 31, 32, 33, 64), (1, 2, 3, 17, 32), (1, 2, 3, 4, 5, 8, 33)):
        assert_dilated_as_reference(variant, keeping_words(3 * n * inner, 4), 3, n, inner, block)


@pytest.mark.parametrize("keep", [0, 0xFFFFFFFF], ids=["none", "all"])
def test_dilate_bits_of_all_or_none(variant, keep):
    for shape in DILATIONS:
        words = np.full(word_count(shape[0] * shape[1] * shape[2]), keep, np.uint32)
        assert_dilated_as_reference(variant, words, *shape)


def test_dilate_bits_of_one_dropped_cell(variant):
    """It drops the block that begins with it, wherever it lies, and nothing else."""
    outer, n, inner, block = 3, 40, 5, 9
    for cell in range(outer * n * inner):
        keep = np.arange(outer * n * inner) != cell
        words = dilated(variant, fd.PackedMask.from_bool(keep, 0.1).words, outer, n, inner, block)
        gone = ~fd.PackedMask(words, (outer, n + block - 1, inner), 0.1).to_bool()
        o, j, i = np.unravel_index(cell, (outer, n, inner))
        assert gone[o, j : j + block, i].all()
        assert gone.sum() == block


# ---- the ends of memory ----


PROT_NONE = 0


def against_forbidden_page(n, dtype, *, last):
    """An array that ends where a page begins that may not be touched, or begins where one ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    page, size = mmap.PAGESIZE, n * np.dtype(dtype).itemsize
    room = -(-size // page) * page
    memory = np.frombuffer(mmap.mmap(-1, room + page), np.uint8)
    forbidden = memory.ctypes.data + (room if last else 0)
    assert libc.mprotect(ctypes.c_void_p(forbidden), page, PROT_NONE) == 0
    start = room - size if last else page
    return memory[start : start + size].view(dtype)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect as Linux has it")
@pytest.mark.parametrize("last", [True, False], ids=["end", "start"])
def test_primitives_stay_within_memory(variant, dtype, last):
    """Reads count as well: a kernel that touches a byte beside its arrays is killed here."""
    for n in (1, 7, 31, 33, 100, 513, 8193, 20_001):
        for first in (0, 5, 511):
            x, y = (against_forbidden_page(n, dtype.storage, last=last) for _ in range(2))
            words = against_forbidden_page(word_count(n), np.uint32, last=last)
            x[:] = dtype.data(n)
            variant.draw_bits(words, 0, first, n, SEED, OFFSET, TENTH)
            variant.dropout_forward(dtype.tag, x, y, words, first, n, SEED, OFFSET, TENTH, *SCALE)
            variant.masked_affine(dtype.tag, x, x, words, 0, 1, 1, n, *SCALE)
            assert_same_bits(x, y, (n, first))
            variant.gaussian_multiply(dtype.tag, x, y, first, n, SEED, OFFSET, 0.5)
    for outer, repeat, inner in ((5, 7, 1), (33, 3, 5), (2, 9, 64), (1, 2, 700), (64, 200, 1)):
        x, y = (against_forbidden_page(outer * repeat * inner, dtype.storage, last=last) for _ in range(2))
        words = against_forbidden_page(word_count(outer * inner), np.uint32, last=last)
        variant.masked_affine(dtype.tag, x, y, words, 0, outer, repeat, inner, *SCALE)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect as Linux has it")
@pytest.mark.parametrize("last", [True, False], ids=["end", "start"])
def test_dilate_bits_stays_within_memory(variant, last):
    for outer, n, inner, block in DILATIONS:
        cells, wider = outer * n * inner, outer * (n + block - 1) * inner
        if cells:
            words = against_forbidden_page(word_count(cells), np.uint32, last=last)
            words[:] = random_words(cells)
            to = against_forbidden_page(word_count(wider), np.uint32, last=last)
            variant.dilate_bits(to, words, outer, n, inner, block)


# ---- special values ----


def test_dropped_values_leave_no_trace(variant, dtype):
    """A dropped infinity or NaN, of either sign, is +0: every bit of it."""
    x = np.tile(dtype.specials(), 50)
    drop_all = np.zeros(word_count(x.size), np.uint32)
    y = np.full_like(x, 1)
    variant.masked_affine(dtype.tag, x, y, drop_all, 0, 1, 1, x.size, *SCALE)
    assert not y.view(dtype.bits).any()
    for cut in (TENTH, 1 << 31):
        words = np.empty_like(drop_all)
        variant.dropout_forward(dtype.tag, x, y, words, 0, x.size, SEED, OFFSET, cut, keep_scale(cut), 0.0, 0.0)
        keep = fd.PackedMask(words, x.shape, 0.1).to_bool()
        assert not keep.all()
        assert not y.view(dtype.bits)[~keep].any()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=str, indirect=True)
@pytest.mark.parametrize("scale", [1.0, keep_scale(TENTH), 1e-4, 1e4, -2.0])
def test_every_16_bit_pattern(variant, dtype, scale):
    """All 65,536 of them kept, among them NaNs with payloads, subnormals, and results that overflow or vanish."""
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype.storage)
    keep_all = np.full(x.size // 32, 0xFFFFFFFF, np.uint32)
    for b, c in ((0.0, 0.0), (0.5, -1.0)):
        y, expected = np.empty_like(x), np.empty_like(x)
        for module, out in ((variant, y), (reference, expected)):
            module.masked_affine(dtype.tag, x, out, keep_all, 0, 1, 1, x.size, scale, b, c)
        assert_same_bits(y, expected, (scale, b, c))


# ---- streaming stores ----


@pytest.mark.parametrize(("shift", "affine"), [(0, "scale"), (1, "affine"), (8, "affine"), (40, "scale")])
def test_dropout_forward_streaming(compiled, dtype, shift, affine):
    """Outputs large enough to be written around the cache, words on a cache line or not."""
    affine = AFFINE[affine]
    n = streaming_elements(compiled, dtype) + 12_345
    x = np.resize(dtype.data(MANY), n)
    expected, y = np.empty_like(x), Guarded(n, dtype.storage, shift)
    words, stored = np.empty(word_count(n), np.uint32), Guarded(word_count(n), np.uint32, shift // 8 * 4)
    reference.dropout_forward(dtype.tag, x, expected, words, 3, n, SEED, OFFSET, TENTH, *affine)
    compiled.dropout_forward(dtype.tag, x, y.array, stored.array, 3, n, SEED, OFFSET, TENTH, *affine)
    assert_same_bits(y.array, expected, "y")
    assert_same_bits(stored.array, words, "words")
    assert y.intact
    assert stored.intact


@pytest.mark.parametrize("first", [0, 512])
def test_dropout_forward_streaming_whole_chunks(compiled, first):
    """From the first cell of a block the words are streamed as well, a chunk at a time."""
    dtype = DTYPES[0]
    n = streaming_elements(compiled, dtype) + 8192 + 5
    x = np.resize(dtype.data(MANY), n)
    y, expected, words = np.empty_like(x), np.empty_like(x), np.empty(word_count(n), np.uint32)
    stored = Guarded(word_count(n), np.uint32)
    reference.dropout_forward(dtype.tag, x, expected, words, first, n, SEED, OFFSET, TENTH, *SCALE)
    compiled.dropout_forward(dtype.tag, x, y, stored.array, first, n, SEED, OFFSET, TENTH, *SCALE)
    assert_same_bits(stored.array, words, "words")
    assert_same_bits(y, expected, "y")
    assert stored.intact


@pytest.mark.parametrize(("shift", "affine"), [(0, "affine"), (1, "scale"), (8, "scale")])
def test_masked_affine_streaming(compiled, dtype, shift, affine):
    affine = AFFINE[affine]
    n = streaming_elements(compiled, dtype) + 12_345
    x, words = np.resize(dtype.data(MANY), n), random_words(n + 7)
    expected, y = np.empty_like(x), Guarded(n, dtype.storage, shift)
    reference.masked_affine(dtype.tag, x, expected, words, 7, 1, 1, n, *affine)
    compiled.masked_affine(dtype.tag, x, y.array, words, 7, 1, 1, n, *affine)
    assert_same_bits(y.array, expected, "y")
    assert y.intact


def test_gaussian_multiply_streaming(compiled, dtype):
    n = streaming_elements(compiled, dtype) + 12_345
    x = np.resize(dtype.data(MANY), n)
    expected, y = np.empty_like(x), Guarded(n, dtype.storage)
    reference.gaussian_multiply(dtype.tag, x, expected, 3, n, SEED, OFFSET, 0.5)
    compiled.gaussian_multiply(dtype.tag, x, y.array, 3, n, SEED, OFFSET, 0.5)
    assert_same_bits(y.array, expected, "y")
    assert y.intact


# ---- splits ----

COUNTS = (1, 2, 3, 7)


def test_dropout_forward_any_number_of_threads(variant, dtype):
    for first in (0, 77):
        expected_y, expected_words = forward(reference, dtype, MANY, first=first)
        for count in COUNTS:
            fd.set_num_threads(count)
            y, words = forward(variant, dtype, MANY, first=first)
            assert_same_bits(words, expected_words, ("words", count, first))
            assert_same_bits(y, expected_y, ("y", count, first))


@pytest.mark.parametrize("position", [0, 13, 1000])
def test_draw_bits_any_number_of_threads(variant, position):
    drawn = {}
    for count in (0, *COUNTS):
        module = variant if count else reference
        fd.set_num_threads(count or 1)
        words = Guarded(word_count(position + MANY), np.uint32)
        module.draw_bits(words.array, position, 99, MANY, SEED, OFFSET, TENTH)
        assert words.intact
        drawn[count] = words.array
    for count in COUNTS:
        assert_same_bits(drawn[count], drawn[0], count)


def test_masked_affine_any_number_of_threads(variant, dtype):
    for grid in ((1, 1, MANY), (3, 7, 24_000), (1000, 513, 1)):
        words = random_words(7 + grid[0] * grid[2])
        expected = masked(reference, dtype, grid, words, position=7)
        for count in COUNTS:
            fd.set_num_threads(count)
            assert_same_bits(masked(variant, dtype, grid, words, position=7), expected, (grid, count))


def test_gaussian_multiply_any_number_of_threads(variant, dtype):
    for first in (0, 77):
        expected = gaussian(reference, dtype, MANY, first=first)
        for count in COUNTS:
            fd.set_num_threads(count)
            assert_same_bits(gaussian(variant, dtype, MANY, first=first), expected, (count, first))


@pytest.mark.parametrize("shape", [(1, MANY, 1, 9), (9000, 50, 1, 7), (150, 50, 56, 7), (2, 5, 45_001, 3)], ids=str)
def test_dilate_bits_any_number_of_threads(variant, shape):
    words = keeping_words(shape[0] * shape[1] * shape[2], 4)
    expected = dilated(reference, words, *shape)
    for count in COUNTS:
        fd.set_num_threads(count)
        assert_same_bits(dilated(variant, words, *shape), expected, count)


CUTS = (1, 31, 32, 500, 8191, GRAIN, GRAIN + 4099, 139_999)


def test_dropout_forward_any_split(variant, dtype):
    """Two calls over two parts of a range give the elements and the bits of one call over all of it."""
    n, first = 140_001, 12_345
    x, (whole, words) = dtype.data(n), forward(variant, dtype, n, first=first)
    keep = fd.PackedMask(words, (n,), 0.1).to_bool()
    for cut in CUTS:
        y = Guarded(n, dtype.storage)
        for part in (slice(0, cut), slice(cut, n)):
            length, at = part.stop - part.start, first + part.start
            bits = np.empty(word_count(length), np.uint32)
            source = x[part].copy()
            variant.dropout_forward(dtype.tag, source, y.array[part], bits, at, length, SEED, OFFSET, TENTH, *SCALE)
            assert (fd.PackedMask(bits, (length,), 0.1).to_bool() == keep[part]).all(), cut
        assert_same_bits(y.array, whole, cut)


def test_draw_bits_any_split(variant):
    """Parts drawn in turn into one array of words leave what one call leaves, seams within words included."""
    n, first = 140_001, 12_345
    whole = np.empty(word_count(n), np.uint32)
    variant.draw_bits(whole, 0, first, n, SEED, OFFSET, TENTH)
    for cuts in [(cut,) for cut in CUTS] + [(1, 2, 33, 600, 70_001)]:
        words = Guarded(word_count(n), np.uint32)
        for start, stop in itertools.pairwise((0, *cuts, n)):
            variant.draw_bits(words.array, start, first + start, stop - start, SEED, OFFSET, TENTH)
        assert_same_bits(words.array, whole, cuts)
        assert words.intact


def test_masked_affine_any_split(variant, dtype):
    n, position = 140_001, 9
    x, words = dtype.data(n), random_words(n + position)
    whole = masked(variant, dtype, (1, 1, n), words, position=position)
    for cut in CUTS:
        y = Guarded(n, dtype.storage)
        for start, stop in ((0, cut), (cut, n)):
            source = x[start:stop].copy()
            grid = (1, 1, stop - start)
            variant.masked_affine(dtype.tag, source, y.array[start:stop], words, position + start, *grid, *SCALE)
        assert_same_bits(y.array, whole, cut)


def test_gaussian_multiply_any_split(variant, dtype):
    """What a shard computes from its first cell on is what the whole has there."""
    n, first = 140_001, 12_345
    x, whole = dtype.data(n), gaussian(variant, dtype, n, first=first)
    for cut in CUTS:
        y = Guarded(n, dtype.storage)
        for start, stop in ((0, cut), (cut, n)):
            source = x[start:stop].copy()
            target, cells = y.array[start:stop], stop - start
            variant.gaussian_multiply(dtype.tag, source, target, first + start, cells, SEED, OFFSET, 0.5)
        assert_same_bits(y.array, whole, cut)


# ---- bad arguments at the C ABI ----

DRAW = {"position": 0, "first": 0, "n": 64, "seed": 1, "offset": 0, "threshold": TENTH}


@pytest.mark.parametrize(
    "bad",
    [{"threshold": 0}, {"threshold": 1 << 32}, {"first": 2**64 - 63}, {"position": 2**64 - 63}],
    ids=str,
)
def test_c_draw_bits_refuses_and_writes_nothing(c_variant, bad):
    words = Guarded(2, np.uint32)
    with pytest.raises(ValueError, match="refused"):
        c_variant.draw_bits(words.array, *(DRAW | bad).values())
    assert (words.array == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    "bad",
    [{"dtype": 4}, {"dtype": -1}, {"threshold": 0}, {"threshold": 1 << 32}, {"first": 2**64 - 63}],
    ids=str,
)
def test_c_dropout_forward_refuses_and_writes_nothing(c_variant, bad):
    x, y, words = np.ones(64, np.float32), Guarded(64, np.float32), Guarded(2, np.uint32)
    arguments = {"dtype": 0, "first": 0, "n": 64, "seed": 1, "offset": 0, "threshold": TENTH} | bad
    with pytest.raises(ValueError, match="refused"):
        c_variant.dropout_forward(
            arguments["dtype"], x, y.array, words.array, *list(arguments.values())[1:], 1.0, 0.0, 0.0
        )
    assert np.isnan(y.array).all()
    assert (words.array == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    ("dtype_tag", "position", "grid"),
    [(4, 0, (1, 1, 64)), (0, 2**64 - 63, (1, 1, 64)), (0, 0, (2**32, 2**32, 1)), (0, 0, (2**40, 2, 2**40))],
)
def test_c_masked_affine_refuses_and_writes_nothing(c_variant, dtype_tag, position, grid):
    x, y, words = np.ones(64, np.float32), Guarded(64, np.float32), np.zeros(2, np.uint32)
    with pytest.raises(ValueError, match="refused"):
        c_variant.masked_affine(dtype_tag, x, y.array, words, position, *grid, 1.0, 0.0, 0.0)
    assert np.isnan(y.array).all()


@pytest.mark.parametrize(
    ("dtype_tag", "first"), [(4, 0), (-1, 0), (0, NOISE_END - 63), (0, NOISE_END + 1), (0, 2**64 - 63)]
)
def test_c_gaussian_multiply_refuses_and_writes_nothing(c_variant, dtype_tag, first):
    x, y = np.ones(64, np.float32), Guarded(64, np.float32)
    with pytest.raises(ValueError, match="refused"):
        c_variant.gaussian_multiply(dtype_tag, x, y.array, first, 64, SEED, OFFSET, 0.5)
    assert np.isnan(y.array).all()


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 0), (1, 2**63, 1, 2**63 + 1), (1, 2, 2**63, 1), (2**40, 2**20, 2**4, 1)], ids=str
)
def test_c_dilate_bits_refuses_and_writes_nothing(c_variant, shape):
    to, words = Guarded(2, np.uint32), np.zeros(2, np.uint32)
    with pytest.raises(ValueError, match="refused"):
        c_variant.dilate_bits(to.array, words, *shape)
    assert (to.array == 0xFFFFFFFF).all()


@pytest.mark.parametrize("n", [0, 257, -1])
def test_c_set_num_threads_refuses(c_variant, n):
    with pytest.raises(ValueError, match="refused"):
        c_variant.set_num_threads(n)


def test_c_select_isa_refuses_what_is_not_there(c_variant):
    before = c_variant.isa()
    with pytest.raises(ValueError, match=rf"FASTDROP_ISA must be one of {', '.join(c_variant.usable_isas())}.*'sse9'"):
        c_variant.select_isa("sse9")
    assert c_variant.isa() == before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shift", [0, 4])
def test_c_scale_float32_is_a_multiplication(c_variant, stream, shift):
    """The yardstick of the benchmarks does what it says."""
    for n in (0, 1, 31, 32, 100, 8193):
        x, y = np.random.default_rng(0).normal(size=n).astype(np.float32), Guarded(n, np.float32, shift)
        c_variant.scale_float32(x, y.array, 1.5, stream)
        assert (y.array == x * np.float32(1.5)).all()
        assert y.intact

"""Every primitive of masks, of every backend x instruction set x dtype, bit for bit against the reference backend.

Outputs start as NaN between guards, data is random bits with special values first, inputs must stay as they were.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import runpy
import sys

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.backends import memory, reference
from fastdrop.backends.memory import Policy
from fastdrop.backends.primitives import PRIMITIVES
from fastdrop.core.mask import word_count

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
)
from .calls import AtPage, AtPageEnd, Call, assert_same_results
from .cuda.cases import ANGLES, RADII, drawing_noise

FLOAT32 = DTYPES[0]
SCALE = AFFINE["scale"]
MANY = 7 * GRAIN + 777  # enough for seven threads
NOISE_LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1000, 8191, 8193, 140_001)
# Bytes past a cache line: elements of 2 to 8 bytes aligned and not, and odd addresses.
SHIFTS = (0, 1, 2, 3, 4, 8, 12, 24, 63)
ROWS = (  # of masks: outer, outer_pitch, rows, pitch, columns
    *((1, 0, 600, pitch, 1) for pitch in (1, 2, 33, 1000)),
    (3, 20_000, 300, 64, 31),
    (2, 9999, 310, 32, 32),
    (3, 5000, 101, 40, 33),
    (2, 125 * 77, 77, 125, 125),  # all cells in order
    (2, 99_999, 77, 1000, 125),
    (3, 40_000, 9, 4096, 512),
    (2, 7 * 512, 7, 512, 512),
    (1, 0, 20, 1024, 513),
    (2, 30_000, 11, 2000, 1000),
    (2, 70_000, 3, 10_001, 9000),
    (3, 9000, 1, 9000, 9000),
    (3, 10, 40, 3, 70),  # rows that overlap
    *((0, 5, 5, 9, 5), (5, 90, 0, 9, 5), (5, 90, 5, 9, 0)),
)
LAYOUTS = [(SHIFTS[k], SHIFTS[k - turn], (0, 1, 4)[k % 3]) for turn in (0, 3) for k in range(len(SHIFTS))]


# ---- calls ----


def forward(dtype, n, *, first=0, threshold=TENTH, affine=SCALE, stored=True):
    outputs = {"y": (n, dtype.storage)} | ({"words": (word_count(n), np.uint32)} if stored else {})
    numbers = {"dtype": dtype.tag, "first": first, "n": n, "seed": SEED, "offset": OFFSET, "threshold": threshold}
    return Call("dropout_forward", {"x": data_of(dtype, n)}, outputs, numbers | dict(zip("abc", affine, strict=True)))


def masked(dtype, grid, *, position=0, affine=SCALE, words=None, x=None):
    n = grid[0] * grid[1] * grid[2]
    words = random_words(position + grid[0] * grid[2]) if words is None else words
    numbers = {"dtype": dtype.tag, "position": position, **dict(zip(("outer", "repeat", "inner"), grid, strict=True))}
    inputs = {"x": data_of(dtype, n) if x is None else x, "words": words}
    return Call("masked_affine", inputs, {"y": (n, dtype.storage)}, numbers | dict(zip("abc", affine, strict=True)))


def gaussian(dtype, n, *, first=0, seed=SEED, offset=OFFSET, sigma=0.5, x=None):
    numbers = {"dtype": dtype.tag, "first": first, "n": n, "seed": seed, "offset": offset, "sigma": sigma}
    inputs = {"x": data_of(dtype, n) if x is None else x}
    return Call("gaussian_multiply", inputs, {"y": (n, dtype.storage)}, numbers)


def dilated(words, *shape):
    outer, n, inner, block = shape
    outputs = {"to": (word_count(outer * (n + block - 1) * inner), np.uint32)}
    return Call("dilate_bits", {"words": words}, outputs, {"outer": outer, "n": n, "inner": inner, "block": block})


def drawing(n, *, position=0, first=0):
    numbers = {"position": position, "first": first, "n": n, "seed": SEED, "offset": OFFSET, "threshold": TENTH}
    return Call("draw_bits", {}, {"words": (word_count(position + n), np.uint32)}, numbers)


def drawing_rows(shape, *, position=0, first=0, threshold=TENTH):
    """``shape``: outer, outer_pitch, rows, pitch, columns."""
    numbers = dict(zip(("outer", "outer_pitch", "rows", "pitch", "columns"), shape, strict=True))
    numbers |= {"position": position, "first": first, "seed": SEED, "offset": OFFSET, "threshold": threshold}
    return Call("draw_rows", {}, {"words": (word_count(position + shape[0] * shape[2] * shape[4]), np.uint32)}, numbers)


def data_of(dtype, n):
    return dtype.data(n) if n <= 8 * GRAIN else np.resize(dtype.data(8 * GRAIN), n)


def every_pattern(dtype):
    """All numbers of 16 bits: NaNs with payloads, subnormals, numbers whose multiples overflow or vanish."""
    return np.arange(1 << 16, dtype=np.uint16).view(dtype.storage)


def keeping_words(cells, halvings):
    """Words of which 1 bit in 2**halvings is 0, garbage past the last cell included."""
    rng = np.random.default_rng(cells + halvings)
    return np.bitwise_or.reduce(rng.integers(0, 2**32, (halvings, word_count(cells)), np.uint32))


def random_words(cells):
    return np.random.default_rng(cells).integers(0, 2**32, word_count(cells), np.uint32)


def last_cell(shape):
    """The last cell of rows whose first cell is 0."""
    outer, outer_pitch, rows, pitch, columns = shape
    return max((outer - 1) * outer_pitch + (rows - 1) * pitch + columns - 1, 0) if outer * rows * columns else 0


def a_third_of_all(some, others):
    """Pairs in which each of some meets every third of the others, from another one on."""
    return [(one, other) for i, one in enumerate(some) for j, other in enumerate(others) if (i + j) % 3 == 0]


# ---- the table of primitives ----


def test_ops_def_is_written_from_the_table():
    """If this fails, run ``make format``."""
    assert (ROOT / "csrc" / "ops.def").read_text() == runpy.run_path(str(ROOT / "csrc" / "ops_def.py"))["text"]()


@pytest.mark.parametrize("name", primitive_modules())
def test_backend_has_the_functions_of_the_table_and_of_the_registry(name):
    module = primitive_modules()[name]
    for function in ("unavailable", "describe", "set_num_threads"):
        signature = inspect.signature(getattr(module, function))
        assert signature.parameters == inspect.signature(getattr(reference, function)).parameters, function
    if reason := module.unavailable():
        pytest.skip(reason)
    for op, primitive in PRIMITIVES.items():
        assert list(inspect.signature(getattr(module, op)).parameters) == primitive.names


def test_cuda_has_them_by_address_on_a_device_and_a_stream():
    from fastdrop.backends.cuda import launch as module

    for op, primitive in PRIMITIVES.items():
        if primitive.cpu_only:
            assert not hasattr(module, f"{op}_at")
            continue
        own = inspect.signature(getattr(module, f"{op}_at")).parameters.values()
        assert [p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD] == ["device", "stream", *primitive.names]
        assert {p.name for p in own if p.kind is p.KEYWORD_ONLY} <= {"seed_at", "kept_at"}


# ---- the reference itself ----


@pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE)
def test_reference_computes_wide_and_rounds_once(dtype, affine):
    a, b, c = (dtype.computed(v) for v in affine)
    x, keep = dtype.data(GRAIN), np.arange(GRAIN) % 3 != 0
    with np.errstate(all="ignore"):
        wide = x.view(dtype.public).astype(dtype.computed)
        wanted = np.where(keep, wide * a if b == c == 0 else wide * a + b, c).astype(dtype.public)
    words = fd.PackedMask.from_bool(keep, 0.1).words
    y = masked(dtype, (1, 1, GRAIN), affine=affine, words=words).run(reference)["y"]
    nan = np.isnan(wanted.astype(dtype.computed))
    assert_same_bits(y[~nan], wanted.view(dtype.storage)[~nan])  # payloads of NaNs are not this test's affair
    assert np.isnan(y[nan].view(dtype.public).astype(dtype.computed)).all()


@pytest.mark.parametrize("shape", DILATIONS, ids=str)
def test_reference_dilates_as_the_definition_does(shape):
    outer, n, inner, block = shape
    for halvings in (3, 6):
        words = keeping_words(outer * n * inner, halvings)
        keep = np.unpackbits(words.view(np.uint8), count=outer * n * inner, bitorder="little")
        wider = np.ones((outer, n + block - 1, inner), bool)
        for o, j, i in np.argwhere(keep.reshape(outer, n, inner) == 0):
            wider[o, j : j + block, i] = False
        assert_same_bits(dilated(words, *shape).run(reference)["to"], fd.PackedMask.from_bool(wider, 0.1).words)


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_reference_draws_rows_as_it_draws_bits(shape):
    outer, outer_pitch, rows, pitch, columns = shape
    call = drawing_rows(shape, position=13, first=7)
    whole = drawing(7 + last_cell(shape) + 1).run(reference)["words"]
    mask = np.unpackbits(whole.view(np.uint8), bitorder="little")
    cells = np.add.outer(7 + outer_pitch * np.arange(outer), np.add.outer(pitch * np.arange(rows), np.arange(columns)))
    drawn = np.unpackbits(call.run(reference)["words"].view(np.uint8), bitorder="little")
    assert (drawn[:13] == 1).all()  # what was there
    assert (drawn[13 : 13 + cells.size] == mask[cells.reshape(-1)]).all()
    assert not cells.size or not drawn[13 + cells.size :].any()


# ---- against the reference ----


def drawn_thresholds(dtype):
    """Whatever the dtype, the draw is the same code: each threshold is drawn under one or two of them."""
    for k, threshold in enumerate(THRESHOLDS.values()):
        for j, (n, first) in enumerate(((513, 31), (8704, 512), (20_000, 2**37 - 4101), (140_001, 3))):
            if (k + j % 2) % len(DTYPES) == dtype.tag:
                yield forward(dtype, n, first=first, threshold=threshold)


def grids(dtype):
    for grid, position in a_third_of_all(GRIDS, (0, 1, 33, 512, 1000, 31)):
        yield masked(dtype, grid, position=position)


def affines(dtype):
    for affine in AFFINE.values():
        yield forward(dtype, 33, first=31, affine=affine)
        yield forward(dtype, 20_000, first=512, affine=affine)
        for grid in ((1, 1, 20_000), (24, 25, 1), (4, 33, 37)):
            yield masked(dtype, grid, position=5, affine=affine)


def noises(dtype):
    """From no change to overflow; whole seeds and offsets; where uniform numbers have borders."""
    for sigma in (0.0, 1 / 3, 1.0, 1e-8, 1e30):
        yield gaussian(dtype, 20_000, first=5, sigma=sigma)
    for seed, offset in ((0, 0), (2**64 - 1, 2**64 - 1), (1 << 32, 1), (1, 1 << 32)):
        yield gaussian(dtype, 1000, first=5, seed=seed, offset=offset)
    if dtype is FLOAT32:
        for first, offset in itertools.starmap(drawing_noise, itertools.product(RADII, ANGLES)):
            yield gaussian(dtype, 64, first=first, offset=offset)


def patterns(dtype):
    if dtype.itemsize == 2:
        x, keep_all = every_pattern(dtype), np.full(1 << 11, 0xFFFFFFFF, np.uint32)
        for a, (b, c) in itertools.product((1.0, SCALE[0], 1e-4, 1e4, -2.0), ((0.0, 0.0), (0.5, -1.0))):
            yield masked(dtype, (1, 1, x.size), affine=(a, b, c), words=keep_all, x=x)
        for sigma in (0.0, 1e4):
            yield gaussian(dtype, x.size, sigma=sigma, x=x)


def dilations(dtype):
    """Also all small shapes, so that rows and blocks end at every bit of a word."""
    if dtype is FLOAT32:
        for shape in DILATIONS:
            cells = shape[0] * shape[1] * shape[2]
            ends = (np.full(word_count(cells), word, np.uint32) for word in (0, 0xFFFFFFFF))
            for words in (*ends, *(keeping_words(cells, halvings) for halvings in (1, 4, 9))):
                yield dilated(words, *shape)
        small = (1, 2, 3, 7, 31, 32, 33, 64), (1, 2, 3, 17, 32), (1, 2, 3, 4, 5, 8, 33)
        for n, inner, block in itertools.product(*small):
            yield dilated(keeping_words(3 * n * inner, 4), 3, n, inner, block)


def parts_of_masks(dtype):
    """Each third of the shapes at each position and first cell; the last cells; rows on both sides of word 2**32, in
    rising and in falling order; all thresholds."""
    if dtype is not FLOAT32:
        return
    for shape, (position, first) in a_third_of_all(ROWS, list(itertools.product((0, 13, 1000), (0, 7, 2**37 + 77)))):
        yield drawing_rows(shape, position=position, first=first)
    for shape in ROWS:
        yield drawing_rows(shape, first=2**64 - 1 - last_cell(shape))
        yield drawing_rows(shape, position=5, first=2**37 - last_cell(shape) // 2)
    yield drawing_rows((3, 0, 40, 2**37 // 20, 33), first=31)
    yield drawing_rows((2, 0, 3, 2**37, 140), first=7)
    yield drawing_rows((2, 2**63, 2, 2**62, 1000), first=2**62 - 1000)
    for threshold in THRESHOLDS.values():
        yield drawing_rows((2, 70_001, 30, 1000, 125), position=13, first=7, threshold=threshold)


CALLS = {
    "forward, lengths": lambda d: (forward(d, n, first=first) for n, first in a_third_of_all(LENGTHS, FIRSTS)),
    "forward, the last cells": lambda d: (forward(d, n, first=2**64 - n) for n in LENGTHS[1:]),
    "forward, thresholds": drawn_thresholds,
    "forward without words": lambda d: (forward(d, n, first=5, stored=False) for n in LENGTHS),
    "masked, lengths": lambda d: (masked(d, (1, 1, n), position=at) for n, at in a_third_of_all(LENGTHS, POSITIONS)),
    "masked, grids": grids,
    "affine": affines,
    "noise, lengths": lambda d: (gaussian(d, n, first=i) for n, i in a_third_of_all(NOISE_LENGTHS, NOISE_FIRSTS)),
    "noise, the last cells": lambda d: (gaussian(d, n, first=NOISE_END - n) for n in NOISE_LENGTHS[1:]),
    "noise": noises,
    "every 16-bit pattern": patterns,
    "dilations": dilations,
    "parts of masks": parts_of_masks,
}


@functools.cache
def expected_of(name, dtype):
    """Calls of the table, and their results by the reference."""
    return [(call, call.run(reference)) for call in CALLS[name](dtype)]


@pytest.mark.parametrize("name", CALLS)
def test_results_as_reference(compiled, dtype, name):
    for call, expected in expected_of(name, dtype):
        assert_same_results(call.run(compiled), expected, call)


# ---- memory ----


def short_calls(dtype):
    for n in (1, 7, 31, 33, 100, 513, 1023, 8193, 20_001):
        for first in (0, 5, 511):
            yield forward(dtype, n, first=first)
            yield masked(dtype, (1, 1, n), position=first)
            yield gaussian(dtype, n, first=first)
    for grid in ((5, 7, 1), (33, 3, 5), (2, 9, 64), (1, 2, 700), (64, 200, 1)):
        yield masked(dtype, grid)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect as Linux has it")
@pytest.mark.parametrize("memory", [AtPage, AtPageEnd])
def test_primitives_stay_within_memory(compiled, dtype, memory):
    """Reads count as well: a kernel that touches a byte beside its arrays is killed here."""
    calls = list(short_calls(dtype))
    if dtype is FLOAT32:
        calls += [drawing(n, first=first) for n in (1, 33, 513, 20_001) for first in (0, 5, 511)]
        calls += [drawing_rows(shape, first=5) for shape in ROWS]
        calls += [dilated(random_words(o * n * i), o, n, i, block) for o, n, i, block in DILATIONS if o * n * i]
    for call in calls:
        call.run(compiled, memory=memory)


def test_any_alignment(compiled, dtype):
    for k, shifts in enumerate(LAYOUTS):
        n = (33, 1023)[k % 2]
        for call in (forward(dtype, n, first=13), masked(dtype, (1, 1, n), position=9), masked(dtype, (3, 5, 40))):
            assert_same_results(call.run(compiled, shifts=shifts), call.run(reference), (call, shifts))
        call = gaussian(dtype, n, first=13)
        assert_same_results(call.run(compiled, shifts=shifts), call.run(reference), (call, shifts))


def test_in_place(variant, dtype):
    for k, n in enumerate(LENGTHS):
        affine = AFFINE[("scale", "affine")[k % 2]]
        calls = [forward(dtype, n, first=7, affine=affine), masked(dtype, (1, 1, n), affine=affine)]
        for call in (*calls, gaussian(dtype, n, first=7), masked(dtype, (5, 7, k), affine=affine)):
            over, expected = call.run(variant, over={"y": "x"}), call.run(variant)
            assert_same_results(over, expected, call)


STREAMED = {  # calls and layouts
    "forward": (lambda d, n: forward(d, n, first=3), (0, 0, 0)),
    "forward, no element at a line": (lambda d, n: forward(d, n, first=3, affine=AFFINE["affine"]), (0, 1, 0)),
    "forward, words past a line": (lambda d, n: forward(d, n, first=3, affine=AFFINE["affine"]), (0, 40, 20)),
    "forward, whole chunks of words": (lambda d, n: forward(d, n, first=512), (0, 0, 0)),
    "forward, no words": (lambda d, n: forward(d, n, stored=False), (0, 16)),
    "masked": (lambda d, n: masked(d, (1, 1, n), position=7, affine=AFFINE["affine"]), (0, 0, 0)),
    "masked, past a line": (lambda d, n: masked(d, (1, 1, n), position=7), (0, 8, 0)),
    "shared decisions": (lambda d, n: masked(d, (3, 1 + n // 300, 100), position=7), (0, 24, 0)),
    "noise, past a line": (lambda d, n: gaussian(d, n, first=3), (0, 8)),
}
# Linear, and each number of pages and lines. Lengths end with a chunk (8,192 in C, 16,384 in Numba), with a piece, and
# next to them; the shortest ends before a line of y begins.
WAYS = [Policy(0, *way) for way in ((1, 8), (2, 16), (4, 8), (8, 4))]
STREAMED_LENGTHS = (5, 8193, 16384 + 513, 2 * 16384 - 1, 3 * 16384)


@functools.lru_cache(3)
def streamed(name, dtype):
    make, shifts = STREAMED[name]
    calls = [make(dtype, n) for n in STREAMED_LENGTHS]
    return [(call, call.run(reference)) for call in calls], shifts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STREAMED)
def test_streaming(name, dtype, compiled):
    calls, shifts = streamed(name, dtype)
    for way in WAYS:
        with memory.use_policy(way):
            for call, expected in calls:
                assert_same_results(call.run(compiled, shifts=shifts), expected, (call, way))


def test_streaming_in_place(compiled, dtype):
    for way in WAYS:
        for call in (forward(dtype, 3 * 16384 + 777), masked(dtype, (1, 1, 4 * 8192))):
            expected = call.run(compiled)
            with memory.use_policy(way):
                assert_same_results(call.run(compiled, over={"y": "x"}, shifts=(16, 0)), expected, (call, way))


def test_streaming_by_any_number_of_threads(compiled, dtype):
    for call, expected in shared_calls(dtype):
        for count, way, shift in zip((2, 3, 7), WAYS[1:], (0, 16, 24), strict=True):
            fd.set_num_threads(count)
            with memory.use_policy(way):
                assert_same_results(call.run(compiled, shifts=(0, shift, 0)), expected, (call, count, way))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect as Linux has it")
@pytest.mark.parametrize("place", [AtPage, AtPageEnd])
def test_streaming_stays_within_memory(compiled, dtype, place):
    with memory.use_policy(WAYS[-1]):
        for n in STREAMED_LENGTHS:
            forward(dtype, n).run(compiled, memory=place)
            masked(dtype, (1, 1, n)).run(compiled, memory=place)


# ---- threads ----


@functools.cache
def shared_calls(dtype):
    calls = [forward(dtype, MANY, first=77), gaussian(dtype, MANY, first=77)]
    calls += [masked(dtype, grid, position=7) for grid in ((1, 1, MANY), (3, 7, 24_000), (1000, 513, 1))]
    if dtype is FLOAT32:
        shapes = (1, MANY, 1, 9), (9000, 50, 1, 7), (150, 50, 56, 7), (2, 5, 45_001, 3)
        calls += [dilated(keeping_words(shape[0] * shape[1] * shape[2], 4), *shape) for shape in shapes]
        calls += [drawing(MANY, position=position, first=99) for position in (0, 13, 1000)]
        calls += [drawing_rows((3, 2_000_001, 1250, 1001, 125), position=position, first=9) for position in (0, 13)]
        calls += [drawing_rows((2, 2**40, 57, 9001, 4111), position=1000)]
    return [(call, call.run(reference)) for call in calls]


def test_any_number_of_threads(compiled, dtype):
    for call, expected in shared_calls(dtype):
        for count in (2, 3, 7):
            fd.set_num_threads(count)
            assert_same_results(call.run(compiled), expected, (call, count))


# ---- the C ABI ----

REFUSED = [
    *((drawing(64), bad) for bad in ({"threshold": 0}, {"threshold": 1 << 32}, {"first": 2**64 - 63})),
    (drawing(64), {"position": 2**64 - 63}),
    *((drawing_rows((2, 99, 3, 9, 5)), bad) for bad in ({"threshold": 0}, {"threshold": 1 << 32})),
    *((drawing_rows((2, 99, 3, 9, 5)), bad) for bad in ({"first": 2**64 - 121}, {"position": 2**64 - 29})),
    *((drawing_rows((2, 99, 3, 9, 5)), bad) for bad in ({"outer_pitch": 2**64 - 22}, {"pitch": 2**63})),
    *((drawing_rows((2, 99, 3, 9, 5)), {name: 2**63 + 1}) for name in ("outer", "rows", "columns")),
    *((forward(FLOAT32, 64), bad) for bad in ({"dtype": 4}, {"dtype": -1}, {"threshold": 0}, {"threshold": 1 << 32})),
    (forward(FLOAT32, 64), {"first": 2**64 - 63}),
    *((masked(FLOAT32, (1, 1, 64)), bad) for bad in ({"dtype": 4}, {"position": 2**64 - 63})),
    (masked(FLOAT32, (1, 1, 64)), {"outer": 2**32, "repeat": 2**32, "inner": 1}),
    (masked(FLOAT32, (1, 1, 64)), {"outer": 2**40, "repeat": 2, "inner": 2**40}),
    *((gaussian(FLOAT32, 64), bad) for bad in ({"dtype": 4}, {"dtype": -1}, {"first": NOISE_END - 63})),
    *((gaussian(FLOAT32, 64), bad) for bad in ({"first": NOISE_END + 1}, {"first": 2**64 - 63})),
    (dilated(random_words(64), 1, 64, 1, 1), {"block": 0}),
    (dilated(random_words(64), 1, 64, 1, 1), {"n": 2**63, "block": 2**63 + 1}),
    (dilated(random_words(64), 1, 64, 1, 1), {"n": 2, "inner": 2**63}),
    (dilated(random_words(64), 1, 64, 1, 1), {"outer": 2**40, "n": 2**20, "inner": 2**4}),
]


def test_c_refuses_and_writes_nothing(c_variant):
    for call, bad in REFUSED:
        arrays = call.arrays()
        with pytest.raises(ValueError, match="refused"):
            Call(call.op, call.inputs, call.outputs, call.numbers | bad).on(c_variant, arrays)
        for name in call.outputs:
            assert (arrays[name].array.view(np.uint32) == 0xFFFFFFFF).all(), (call, bad)
    for n in (0, 257, -1):
        with pytest.raises(ValueError, match="refused"):
            c_variant.set_num_threads(n)


def test_c_select_isa_refuses_what_is_not_there(c_variant):
    before = c_variant.isa()
    with pytest.raises(ValueError, match=rf"FASTDROP_ISA must be one of {', '.join(c_variant.usable_isas())}.*'sse9'"):
        c_variant.select_isa("sse9")
    assert c_variant.isa() == before


@pytest.mark.parametrize("how", ["memcpy", "ordinary", "streaming", "interleaved"])
def test_c_scale_float32_is_a_multiplication(c_variant, how, threads):
    """The yardstick of the benchmarks does what it says."""
    factor = np.float32(1 if how == "memcpy" else 1.5)
    fd.set_num_threads(2)
    for n, shift in zip((0, 1, 31, 32, 100, 8193, 3 * GRAIN + 8192 + 77), (0, 4, 1, 0, 16, 4, 0), strict=True):
        x, y = np.random.default_rng(0).normal(size=n).astype(np.float32), Guarded(n, np.float32, shift)
        with memory.use_policy(WAYS[-1]):
            c_variant.scale_float32(x, y.array, 1.5, how)
        assert (y.array == x * factor).all()
        assert y.intact

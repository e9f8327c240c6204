"""Shared by the tests of the CUDA primitives, on `gpu_stub.Gpu` and on a real GPU.

Here are calls by address on arrays between guards, the reference's results for them, and layouts.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re

import numpy as np

from fastdrop.backends import reference
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.core import variants
from fastdrop.core.activations import ACTIVATIONS
from fastdrop.core.mask import word_count
from fastdrop.core.random import LOW, MULTIPLIERS, NOISE_CELLS, NOISE_COUNTERS, NOISE_DOMAIN, ROUNDS, WEYL

from ...cases import AFFINE, DTYPES, OFFSET, SEED, TENTH, Guarded, assert_same_bits

SCALE = AFFINE["scale"]
STREAM = 0x5000

# (cells, kept): of none, of all, and where float32 would not hold the cells.
COUNTS = ((1000, 0), (1000, 1000), (1100, 987), (25_613_457, 23_052_111), (2**40 + 1, 2**39))
# Uniform numbers at the borders of what makes a normal one: u = 1, its smallest, sqrt(1/2) and 1/2; quarters of a turn.
RADII = (0xFFFFFFFF, 0xFFFFFF7F, 0, 1, 0xB504F333, 0xB504F2FF, 0x80000000, 0x7FFFFFFF)
ANGLES = (0, 0x1FFFFFFF, 0x20000000, 0x3FFFFFFF, 0x40000000, 0x60000000, 0x80000000, 0xDFFFFFFF, 0xE0000000, 0xFFFFFFFF)
DILATIONS = (  # (outer, n, inner, block)
    (1, 1, 1, 1),
    (5, 7, 1, 3),  # several rows in a word
    (70, 1, 1, 7),
    (3, 10, 7, 4),
    (2, 5, 33, 3),
    (1, 100, 1, 40),  # blocks wider than a word
    (3, 4, 40, 9),  # and than what is widened
    (2, 64, 32, 2),
    (1, 2, 1000, 3),
    (6, 50, 1, 1),  # a copy
)

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


def forward(gpu, dtype, n, *, first=0, cut=TENTH, affine=SCALE, shifts=(0, 0, 0), stored=True, in_place=False):
    """(y, words) of dropout_forward on poisoned arrays; kernels may write y and words, and read x, no more."""
    x = Guarded.of(dtype.data(n), shifts[0])
    y = x if in_place else Guarded(n, dtype.storage, shifts[1])
    words = Guarded(word_count(n), np.uint32, shifts[2])
    x.array.flags.writeable = in_place
    gpu.forget()
    gpu.allow(x.array, y.array, *[words.array] * stored)
    numba_cuda.dropout_forward_at(
        0,
        STREAM,
        dtype.tag,
        x.array.ctypes.data,
        y.array.ctypes.data,
        words.array.ctypes.data if stored else 0,
        first,
        n,
        SEED,
        OFFSET,
        cut,
        *affine,
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
    gpu, dtype, axes, words, *, position=0, affine=SCALE, shifts=(0, 0, 0), in_place=False, kept=None, launch=None
):
    """strided_affine likewise; ``kept`` is to lie on the device; ``launch`` may put another call in its place."""
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
    if launch:
        launch(0, STREAM, dtype.tag, *addresses, position, **options)
    else:
        numba_cuda.strided_affine_at(0, STREAM, dtype.tag, *addresses, position, axes, *affine, **options)
    return y.array


def masked(gpu, dtype, grid, words, *, affine=SCALE, **options):
    def launch(*arguments, **kept):
        numba_cuda.masked_affine_at(*arguments, *grid, *affine, **kept)

    return strided(gpu, dtype, [(extent, 0) for extent in grid], words, launch=launch, **options)


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


def assert_masked_as_reference(gpu, dtype, grid, words, *, position=0, affine=SCALE, **options):
    y = masked(gpu, dtype, grid, words, position=position, affine=affine, **options)
    expected = expected_masked(dtype, grid, words, position=position, affine=affine)
    assert_as_reference(dtype, y, expected, (grid, position, affine, options))


def assert_strided_as_reference(gpu, dtype, axes, *, position=0, affine=SCALE, **options):
    words = random_words(position + reach(axes))
    y = strided(gpu, dtype, axes, words, position=position, affine=affine, **options)
    expected = expected_strided(dtype, axes, words, position=position, affine=affine)
    assert_as_reference(dtype, y, expected, (axes, position, affine, options))


def assert_scaled_by_a_count(gpu, dtype, cells, kept):
    """masked_affine with ``cells / kept``, where only the GPU knows what was kept."""
    scale = cells / kept if kept else 0.0
    for grid, (b, c) in itertools.product(((1, 1, 1100), (3, 5, 16), (3, 5, 11)), ((0.0, 0.0), (-0.25, 0.7))):
        words = random_words(5 + grid[0] * grid[2])
        y = masked(gpu, dtype, grid, words, position=5, affine=(float(cells), b, c), kept=kept)
        expected = expected_masked(dtype, grid, words, position=5, affine=(scale, b, c))
        assert_as_reference(dtype, y, expected, (cells, kept, grid, b, c))


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


def drawn(gpu, n, *, first=0, cut=TENTH, position=0, seed=SEED, offset=OFFSET, seed_at=0):
    """draw_bits into words of a pattern, one more than it needs; the words, and what they held before."""
    before = np.random.default_rng(0).integers(0, 2**32, word_count(position + n) + 1, np.uint32)
    words = Guarded.of(before)
    gpu.allow(words.array)
    at = words.array.ctypes.data
    numba_cuda.draw_bits_at(0, STREAM, at, position, first, n, seed, offset, cut, seed_at=seed_at)
    return words.array, before


def expected_drawn(n, before, *, first=0, cut=TENTH, position=0, seed=SEED, offset=OFFSET):
    words = before.copy()
    reference.draw_bits(words, position, first, n, seed, offset, cut)
    return words


# ---- rows ----

DATA, SUMS, NUMBERS, WORDS = range(4)  # types of the arrays: the data's, the residual stream's, the arithmetic's; bits
FUSED = {  # arrays of each primitive: those it must have, those it may have, those it writes
    "pointwise_forward": (
        {"x": DATA, "y": SUMS},
        {"input_bias": NUMBERS, "multiplier": DATA, "residual": SUMS, "signs": WORDS},
        "y signs",
    ),
    "pointwise_backward": (
        {"dy": SUMS, "dx": DATA},
        {"x": DATA, "input_bias": NUMBERS, "multiplier": DATA, "dmultiplier": DATA, "sums": NUMBERS},
        "dx dmultiplier sums",
    ),
    "norm_forward": (
        {"x": DATA, "y": DATA, "residual_out": SUMS, "statistics": NUMBERS},
        {"input_bias": NUMBERS, "residual": SUMS, "weight": NUMBERS, "norm_bias": NUMBERS},
        "y residual_out statistics",
    ),
    "norm_backward": (
        {"dy": DATA, "residual_out": SUMS, "statistics": NUMBERS},
        {"dresidual_out": SUMS, "weight": NUMBERS, "dx": DATA, "dresidual": SUMS, "sums": NUMBERS},
        "dx dresidual sums",
    ),
    "softmax_forward": ({"x": DATA, "y": DATA}, {"mask": NUMBERS, "probabilities": DATA}, "probabilities y"),
    "softmax_backward": ({"dy": DATA, "probabilities": DATA, "dx": DATA}, {"y": DATA}, "dx y"),
}
# Relative, of a result as it is stored; and of numbers of the size of 1 in the arithmetic that leads to it.
STORED = {"float32": 4e-6, "float64": 1e-13, "float16": 2.0**-10, "bfloat16": 2.0**-7}
COMPUTED = {np.float32: 4e-6, np.float64: 1e-13}


def stored(dtype, values):
    return (
        reference.storage.float32_to_bfloat16(values.astype(np.float32))
        if dtype.name == "bfloat16"
        else values.astype(dtype.storage)
    )


def numbers_of(dtype, values):
    return (reference.storage.bfloat16_to_float32(values) if dtype.name == "bfloat16" else values).astype(np.float64)


def fused(gpu, primitive, pair, rows, columns, *, given="", words=True, shift=0, over=None, content=None, **numbers):
    """Calls a fused primitive on arrays between guards. By output: (its type, what it is, what the reference makes).

    A real ``gpu`` has memory of its own: ``address`` puts an array with its guards there, ``fetch`` brings all back.
    ``given`` names arrays that it may have. ``shift`` in elements, of all arrays but words and vectors of columns.
    ``over`` says which input an output lies over, ``content`` what is in an array instead of random numbers.
    """
    needed, possible, written = FUSED[primitive]
    kinds_of = needed | {name: (possible | {"words": WORDS})[name] for name in [*given.split(), *["words"] * words]}
    dtype, stream = pair
    plain = next(one for one in DTYPES if one.storage is dtype.computed)
    types = {DATA: dtype, SUMS: stream, NUMBERS: plain}
    n, over, generator = rows * columns, over or {}, np.random.default_rng(rows * 1009 + columns)
    sizes = dict.fromkeys(kinds_of, n) | dict.fromkeys(("input_bias", "weight", "norm_bias"), columns)
    panels = variants.panels(rows)
    sizes |= {"statistics": 2 * rows, "sums": panels * columns * (3 if primitive == "norm_backward" else 1)}
    arrays = {}
    for name, kind in kinds_of.items():
        if kind == WORDS:
            arrays[name] = generator.integers(0, 2**32, word_count(n), np.uint32)
        else:
            arrays[name] = stored(types[kind], generator.normal(size=sizes[name]))
    for name, values in (content or {}).items():
        arrays[name] = values if kinds_of[name] == WORDS else stored(types[kinds_of[name]], values)
    if primitive == "norm_backward":
        of_rows = numbers_of(stream, arrays["residual_out"]).reshape(rows, columns)
        mean = of_rows.mean(1) if numbers["centred"] else np.zeros(rows)
        rstd = 1 / np.sqrt(np.square(of_rows - mean[:, None]).mean(1) + 1e-5)
        arrays["statistics"] = np.stack([mean, rstd], 1).reshape(-1).astype(dtype.computed)
    if primitive == "softmax_backward" and n:
        e = np.exp(generator.normal(size=(rows, columns)))
        arrays["probabilities"] = stored(dtype, e / e.sum(1, keepdims=True)).reshape(-1)
    numbers |= {"rows": rows, "columns": columns, "panels": panels, "dtype": dtype.tag, "residual_dtype": stream.tag}
    names = list(inspect.signature(getattr(reference, primitive)).parameters)
    outputs = [name for name in written.split() if name in kinds_of]
    expected = {name: np.empty_like(array) if name in outputs else array for name, array in arrays.items()}
    getattr(reference, primitive)(*[numbers[name] if name in numbers else expected.get(name) for name in names])
    guarded = {}
    for name, kind in kinds_of.items():
        at = 0 if kind == WORDS or sizes[name] != n else shift * types[kind].itemsize
        guarded[name] = Guarded(arrays[name].size, arrays[name].dtype.type, at)
        if name not in outputs:
            guarded[name].array[:] = arrays[name]
    guarded |= {output: guarded[source] for output, source in over.items()}
    gpu.forget()
    for name in kinds_of:
        guarded[name].array.flags.writeable = any(guarded[name] is guarded[output] for output in outputs)
        if name not in over:
            gpu.allow(guarded[name].array)
    address = getattr(gpu, "address", lambda one: one.array.ctypes.data)
    at = {name: address(one) for name, one in guarded.items()}
    values = [numbers[name] if name in numbers else at.get(name, 0) for name in names]
    getattr(numba_cuda, f"{primitive}_at")(0, getattr(gpu, "stream", STREAM), *values)
    getattr(gpu, "fetch", lambda: None)()
    assert all(one.intact for one in guarded.values())
    of_type = {name: None if kinds_of[name] == WORDS else types[kinds_of[name]] for name in outputs}
    return {name: (of_type[name], guarded[name].array, expected[name]) for name in outputs}


def assert_fused_as_reference(gpu, primitive, pair, rows, columns, **options):
    """To `STORED` and `COMPUTED`; signs bit for bit. Sums are of so many numbers of the size of 1."""
    results = fused(gpu, primitive, pair, rows, columns, **options)
    for name, (dtype, actual, expected) in results.items():
        what, slack = (primitive, name, pair, rows, columns, options), COMPUTED[pair[0].computed]
        if dtype is None:
            assert_same_bits(actual, expected, what)
            continue
        got, wanted = numbers_of(dtype, actual), numbers_of(dtype, expected)
        if name == "sums":
            lines = 3 if primitive == "norm_backward" else 1
            got, wanted = (values[: lines * columns].reshape(lines, columns) for values in (got, wanted))
            slack = np.full((lines, 1), slack * max(rows, 1))
            slack[2:] = max(slack[0, 0], STORED[pair[0].name] * rows)  # of dx as it is stored
        with np.errstate(all="ignore"):
            near = (np.abs(got - wanted) <= STORED[dtype.name] * np.abs(wanted) + slack) | (got == wanted)
        wrong = np.flatnonzero(~(near | (np.isnan(got) & np.isnan(wanted))))
        assert wrong.size == 0, (what, wrong[:5], got.reshape(-1)[wrong[:5]], wanted.reshape(-1)[wrong[:5]])
    return results


F32, F64, F16, BF16 = DTYPES
NO_MASK = {"heads": 1, "queries": 1, "outer_stride": 0, "head_stride": 0, "query_stride": 0}
PAIR = {"float32": (F32, F32), "float64": (F64, F64), "float16": (F16, F16), "bfloat16": (BF16, BF16)}
PAIR |= {"float16 on float32": (F16, F32), "bfloat16 on float32": (BF16, F32)}


def norm_numbers(centred):
    return {"a": 1.25, "eps": 1e-5, "centred": centred}


def masked_softmax(rows, columns, heads, queries, of_queries):
    """Options of a mask [outer, 1, queries or 1, columns], and of a row in which nothing is left."""
    outer = -(-rows // (heads * queries))
    mask = np.random.default_rng(7).normal(size=(outer, queries if of_queries else 1, columns))
    mask[0, 0, 1::2] = -np.inf
    mask[-1, -1] = -np.inf
    strides = {"outer_stride": mask[0].size, "head_stride": 0, "query_stride": columns if of_queries else 0}
    return {
        "given": "mask probabilities",
        "content": {"mask": mask.reshape(-1)},
        "heads": heads,
        "queries": queries,
    } | strides


# (primitive, columns of data's pair, rows, columns, options): operands there and not, vectors and single elements,
# a warp's rows and a block's, one column, one row, no row, outputs over inputs.
ROWS_CASES = {
    "dropout_add": ("pointwise_forward", 3, 40, {"given": "residual"}),
    "dropout_add, in place": ("pointwise_forward", 3, 41, {"given": "residual", "over": {"y": "residual"}}),
    "bias_dropout_add": ("pointwise_forward", 3, 40, {"given": "input_bias residual"}),
    "bias_dropout_add, odd": ("pointwise_forward", 5, 7, {"given": "input_bias residual"}),
    "unaligned": ("pointwise_forward", 5, 40, {"given": "input_bias residual multiplier", "shift": 1}),
    "all kept": ("pointwise_forward", 3, 40, {"words": False}),
    "one column": ("pointwise_forward", 70, 1, {"given": "input_bias residual"}),
    "bias's sums": ("pointwise_backward", 40, 40, {"given": "sums"}),
    "bias's sums, odd": ("pointwise_backward", 33, 35, {"given": "x input_bias sums"}),
    "bias's sums, one column": ("pointwise_backward", 40, 1, {"given": "sums"}),
    "bias's sums, no row": ("pointwise_backward", 0, 40, {"given": "sums"}),
    "gradient's flat": ("pointwise_backward", 3, 41, {"words": False}),
    "layer norm": ("norm_forward", 3, 40, {"given": "input_bias residual weight norm_bias", **norm_numbers(1)}),
    "layer norm, bare": ("norm_forward", 2, 40, {"words": False, **norm_numbers(1)}),
    "layer norm, odd": ("norm_forward", 3, 37, {"given": "residual weight", **norm_numbers(1)}),
    "layer norm, long": ("norm_forward", 3, 600, {"given": "input_bias residual weight norm_bias", **norm_numbers(1)}),
    "layer norm, one column": ("norm_forward", 3, 1, {"given": "residual norm_bias", **norm_numbers(1)}),
    "layer norm, in place": (
        "norm_forward",
        3,
        40,
        {"given": "residual", "over": {"residual_out": "residual", "y": "x"}, **norm_numbers(1)},
    ),
    "rms norm": ("norm_forward", 3, 600, {"given": "residual weight", **norm_numbers(0)}),
    "norm's gradients": (
        "norm_backward",
        33,
        40,
        {"given": "dresidual_out weight dx dresidual sums", **norm_numbers(1)},
    ),
    "norm's gradients, odd": ("norm_backward", 17, 37, {"given": "weight dresidual sums", **norm_numbers(1)}),
    "norm's gradients, long": ("norm_backward", 3, 600, {"given": "dresidual_out dx", **norm_numbers(1)}),
    "norm's gradients, in place": (
        "norm_backward",
        18,
        40,
        {
            "given": "dresidual_out weight dx dresidual sums",
            "over": {"dx": "dy", "dresidual": "dresidual_out"},
            **norm_numbers(1),
        },
    ),
    "rms norm's gradients": ("norm_backward", 3, 40, {"given": "weight dx sums", "words": False, **norm_numbers(0)}),
    "softmax": ("softmax_forward", 3, 40, {"given": "probabilities", "causal": 0, "softmax_scale": 0.5, **NO_MASK}),
    "softmax, long": ("softmax_forward", 3, 601, {"causal": 0, "softmax_scale": 2.0, **NO_MASK}),
    "softmax, one column": (
        "softmax_forward",
        3,
        1,
        {"given": "probabilities", "causal": 0, "softmax_scale": 0.5, **NO_MASK},
    ),
    "softmax, causal": (
        "softmax_forward",
        9,
        40,
        {"given": "probabilities", "causal": 1, "softmax_scale": 0.5, **NO_MASK, "heads": 3, "queries": 3},
    ),
    "softmax, causal, odd": (
        "softmax_forward",
        10,
        5,
        {"causal": 1, "softmax_scale": 0.5, "words": False, **NO_MASK, "queries": 10},
    ),
    "softmax, mask": (
        "softmax_forward",
        12,
        40,
        {"causal": 0, "softmax_scale": 0.5, **masked_softmax(12, 40, 2, 3, True)},
    ),
    "softmax, mask of keys": (
        "softmax_forward",
        8,
        9,
        {"causal": 1, "softmax_scale": 1.0, **masked_softmax(8, 9, 2, 2, False)},
    ),
    "softmax, in place": ("softmax_forward", 3, 40, {"over": {"y": "x"}, "causal": 0, "softmax_scale": 0.5, **NO_MASK}),
    "softmax's gradient": ("softmax_backward", 3, 40, {"softmax_scale": 0.5}),
    "softmax's gradient, long": ("softmax_backward", 2, 601, {"given": "y", "softmax_scale": 0.5}),
    "softmax's gradient, in place": (
        "softmax_backward",
        3,
        40,
        {"given": "y", "over": {"dx": "dy", "y": "probabilities"}, "softmax_scale": 0.5},
    ),
}


def assert_case_as_reference(gpu, name, pair):
    primitive, rows, columns, options = ROWS_CASES[name]
    return assert_fused_as_reference(
        gpu, primitive, PAIR[pair], rows, columns, **{"a": 1.25, "activation": 0} | options
    )


def assert_activations_as_reference(gpu, activation, pair, columns):
    """Forward, with the bits that a relu keeps, and backward, by both of the ways that its kernels go."""
    numbers, pair = {"a": 1.25, "activation": ACTIVATIONS[activation]}, PAIR[pair]
    signs = "signs" if activation == "relu" else ""
    assert_fused_as_reference(
        gpu, "pointwise_forward", pair, 5, columns, given=f"input_bias multiplier {signs}", **numbers
    )
    assert_fused_as_reference(
        gpu, "pointwise_backward", pair, 5, columns, given="x input_bias multiplier dmultiplier", **numbers
    )
    assert_fused_as_reference(gpu, "pointwise_backward", pair, 20, columns, given="x input_bias sums", **numbers)


SPECIAL = (np.inf, -np.inf, np.nan, 0.0, -0.0, 1e15, -1e15)
HUGE = (1e20, -1e20, 3e38, -3e38)  # for activations alone: a norm squares


def assert_special_numbers_as_reference(gpu, pair, activations):
    """Rows of infinities and NaN: dropped ones leave no trace, kept ones what arithmetic makes of them."""
    rows, columns, pair = 16, 8, PAIR[pair]
    x = np.random.default_rng(3).normal(size=(rows, columns))
    for i, value in enumerate(SPECIAL):
        x[2 * i, i] = value
    x[1], x[3] = -np.inf, np.inf
    h = x.copy()
    h[5:12:2, :4] = HUGE
    for activation in activations:
        signs = "signs" if activation == "relu" else ""
        numbers = {"a": 1.25, "activation": ACTIVATIONS[activation], "content": {"x": h.reshape(-1)}}
        assert_fused_as_reference(gpu, "pointwise_forward", pair, rows, columns, given=f"residual {signs}", **numbers)
        if activation:
            assert_fused_as_reference(gpu, "pointwise_backward", pair, rows, columns, given="x", **numbers)
    content = {"x": x.reshape(-1)}
    norm = {"given": "residual", "content": content, **norm_numbers(1)}
    assert_fused_as_reference(gpu, "norm_forward", pair, rows, columns, **norm)
    for causal in (0, 1):
        numbers = NO_MASK | {"a": 1.25, "queries": rows, "causal": causal, "softmax_scale": 0.5}
        assert_fused_as_reference(gpu, "softmax_forward", pair, rows, columns, content=content, **numbers)
    content = {"dy": x.reshape(-1)}
    norm = {"given": "weight dx dresidual", "content": content, **norm_numbers(1)}
    assert_fused_as_reference(gpu, "norm_backward", pair, rows, columns, **norm)
    assert_fused_as_reference(gpu, "softmax_backward", pair, rows, columns, content=content, a=1.25, softmax_scale=0.5)

"""Cases of the fused CUDA primitives, for `gpu_stub.Gpu` and for a real GPU, with the reference's results beside."""

from __future__ import annotations

import inspect

import numpy as np

from fastdrop.backends import reference
from fastdrop.core import variants
from fastdrop.core.activations import ACTIVATIONS
from fastdrop.core.mask import word_count

from ...cases import DTYPES, Guarded, assert_same_bits
from .cases import run

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
NUMBERS_GIVEN = {"a": 1.25, "activation": 0, "eps": 1e-5, "centred": 1, "causal": 0, "softmax_scale": 0.5}
NUMBERS_GIVEN |= {"heads": 1, "queries": 1, "outer_stride": 0, "head_stride": 0, "query_stride": 0}
# Relative, of a result as it is stored; and of numbers of the size of 1 in the arithmetic that leads to it.
STORED = {"float32": 4e-6, "float64": 1e-13, "float16": 2.0**-10, "bfloat16": 2.0**-7}
COMPUTED = {np.float32: 4e-6, np.float64: 1e-13}


def fused(gpu, primitive, pair, rows, columns, *, given="", words=True, shift=0, over=None, content=None, **numbers):
    """Calls a fused primitive on arrays between guards. By output: (its type, what it is, what the reference makes).

    ``given`` names arrays that it may have. ``shift`` in elements, of all arrays but words and vectors of columns.
    ``over`` says which input an output lies over, ``content`` what is in an array instead of random numbers. Of the
    numbers those are given that differ from `NUMBERS_GIVEN`.
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
            arrays[name] = types[kind].narrow(generator.normal(size=sizes[name]))
    for name, values in (content or {}).items():
        arrays[name] = values if kinds_of[name] == WORDS else types[kinds_of[name]].narrow(values)
    if primitive == "norm_backward":
        of_rows = stream.wide(arrays["residual_out"]).reshape(rows, columns)
        mean = of_rows.mean(1) if numbers.get("centred", 1) else np.zeros(rows)
        rstd = 1 / np.sqrt(np.square(of_rows - mean[:, None]).mean(1) + 1e-5)
        arrays["statistics"] = np.stack([mean, rstd], 1).reshape(-1).astype(dtype.computed)
    if primitive == "softmax_backward" and n:
        e = np.exp(generator.normal(size=(rows, columns)))
        arrays["probabilities"] = dtype.narrow(e / e.sum(1, keepdims=True)).reshape(-1)
    numbers = NUMBERS_GIVEN | numbers
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
    for one in guarded.values():
        one.array.flags.writeable = any(one is guarded[output] for output in outputs)
    run(gpu, primitive, *[numbers[name] if name in numbers else guarded.get(name, 0) for name in names])
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
        got, wanted = dtype.wide(actual), dtype.wide(expected)
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
PAIR = {dtype.name: (dtype, dtype) for dtype in DTYPES}
PAIR |= {"float16 on float32": (F16, F32), "bfloat16 on float32": (BF16, F32)}


def masked_softmax(rows, columns, heads, queries, of_queries):
    """Options of a mask [outer, 1, queries or 1, columns], and of a row in which nothing is left."""
    outer = -(-rows // (heads * queries))
    mask = np.random.default_rng(7).normal(size=(outer, queries if of_queries else 1, columns))
    mask[0, 0, 1::2] = -np.inf
    mask[-1, -1] = -np.inf
    strides = {"outer_stride": mask[0].size, "query_stride": columns if of_queries else 0}
    given = {"given": "mask probabilities", "content": {"mask": mask.reshape(-1)}}
    return given | {"heads": heads, "queries": queries} | strides


FORWARD, BACKWARD = "pointwise_forward", "pointwise_backward"
ALL = "dresidual_out weight dx dresidual sums"
OVER_INPUTS = {"dx": "dy", "dresidual": "dresidual_out"}
# (primitive, rows, columns of data's pair, options): operands there and not, vectors and single elements, a warp's rows
# and a block's, one column, one row, no row, outputs over inputs.
ROWS_CASES = {
    "dropout_add": (FORWARD, 3, 40, {"given": "residual"}),
    "dropout_add, in place": (FORWARD, 3, 41, {"given": "residual", "over": {"y": "residual"}}),
    "bias_dropout_add": (FORWARD, 3, 40, {"given": "input_bias residual"}),
    "bias_dropout_add, odd": (FORWARD, 5, 7, {"given": "input_bias residual"}),
    "unaligned": (FORWARD, 5, 40, {"given": "input_bias residual multiplier", "shift": 1}),
    "all kept": (FORWARD, 3, 40, {"words": False}),
    "one column": (FORWARD, 70, 1, {"given": "input_bias residual"}),
    "bias's sums": (BACKWARD, 40, 40, {"given": "sums"}),
    "bias's sums, odd": (BACKWARD, 33, 35, {"given": "x input_bias sums"}),
    "bias's sums, gelu": (BACKWARD, 20, 40, {"given": "x input_bias sums", "activation": ACTIVATIONS["gelu"]}),
    "bias's sums, one column": (BACKWARD, 40, 1, {"given": "sums"}),
    "bias's sums, no row": (BACKWARD, 0, 40, {"given": "sums"}),
    "gradient's flat": (BACKWARD, 3, 41, {"words": False}),
    "layer norm": ("norm_forward", 3, 40, {"given": "input_bias residual weight norm_bias"}),
    "layer norm, bare": ("norm_forward", 2, 40, {"words": False}),
    "layer norm, odd": ("norm_forward", 3, 37, {"given": "residual weight"}),
    "layer norm, long": ("norm_forward", 3, 600, {"given": "input_bias residual weight norm_bias"}),
    "layer norm, one column": ("norm_forward", 3, 1, {"given": "residual norm_bias"}),
    "layer norm, in place": (
        *("norm_forward", 3, 40),
        {"given": "residual", "over": {"residual_out": "residual", "y": "x"}},
    ),
    "rms norm": ("norm_forward", 3, 600, {"given": "residual weight", "centred": 0}),
    "norm's gradients": ("norm_backward", 33, 40, {"given": ALL}),
    "norm's gradients, odd": ("norm_backward", 17, 37, {"given": "weight dresidual sums"}),
    "norm's gradients, long": ("norm_backward", 3, 600, {"given": "dresidual_out dx"}),
    "norm's gradients, in place": ("norm_backward", 18, 40, {"given": ALL, "over": OVER_INPUTS}),
    "rms norm's gradients": ("norm_backward", 3, 40, {"given": "weight dx sums", "words": False, "centred": 0}),
    "softmax": ("softmax_forward", 3, 40, {"given": "probabilities"}),
    "softmax, long": ("softmax_forward", 3, 601, {"softmax_scale": 2.0}),
    "softmax, one column": ("softmax_forward", 3, 1, {"given": "probabilities"}),
    "softmax, causal": ("softmax_forward", 9, 40, {"given": "probabilities", "causal": 1, "heads": 3, "queries": 3}),
    "softmax, causal, odd": ("softmax_forward", 10, 5, {"causal": 1, "words": False, "queries": 10}),
    "softmax, mask": ("softmax_forward", 12, 40, masked_softmax(12, 40, 2, 3, True)),
    "softmax, mask of keys": ("softmax_forward", 8, 9, {"causal": 1, **masked_softmax(8, 9, 2, 2, False)}),
    "softmax, in place": ("softmax_forward", 3, 40, {"over": {"y": "x"}}),
    "softmax's gradient": ("softmax_backward", 3, 40, {}),
    "softmax's gradient, long": ("softmax_backward", 2, 601, {"given": "y"}),
    "softmax's gradient, in place": (
        *("softmax_backward", 3, 40),
        {"given": "y", "over": {"dx": "dy", "y": "probabilities"}},
    ),
}


def assert_case_as_reference(gpu, name, pair):
    primitive, rows, columns, options = ROWS_CASES[name]
    return assert_fused_as_reference(gpu, primitive, PAIR[pair], rows, columns, **options)


def assert_activations_as_reference(gpu, activation, pair, columns):
    """Forward, with the bits that a relu keeps, and backward."""
    pair, code, signs = PAIR[pair], ACTIVATIONS[activation], "signs" if activation == "relu" else ""
    given = f"input_bias multiplier {signs}"
    assert_fused_as_reference(gpu, FORWARD, pair, 5, columns, given=given, activation=code)
    given = "x input_bias multiplier dmultiplier"
    assert_fused_as_reference(gpu, BACKWARD, pair, 5, columns, given=given, activation=code)


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
        given = f"residual {'signs' if activation == 'relu' else ''}"
        numbers = {"activation": ACTIVATIONS[activation], "content": {"x": h.reshape(-1)}}
        assert_fused_as_reference(gpu, FORWARD, pair, rows, columns, given=given, **numbers)
        assert_fused_as_reference(gpu, BACKWARD, pair, rows, columns, given="x", **numbers)
    content = {"x": x.reshape(-1)}
    assert_fused_as_reference(gpu, "norm_forward", pair, rows, columns, given="residual", content=content)
    for causal in (0, 1):
        numbers = {"queries": rows, "causal": causal, "content": content}
        assert_fused_as_reference(gpu, "softmax_forward", pair, rows, columns, **numbers)
    content = {"dy": x.reshape(-1)}
    given = "weight dx dresidual"
    assert_fused_as_reference(gpu, "norm_backward", pair, rows, columns, given=given, content=content)
    assert_fused_as_reference(gpu, "softmax_backward", pair, rows, columns, content=content)

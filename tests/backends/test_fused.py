"""The fused primitives over rows, of every backend x instruction set x dtypes, against the reference in float64.

Those of attention are in `test_attention`.

Outputs start as NaN between guards, inputs must stay as they were. What is exact is compared bit for bit: signs,
dropped elements, the same call in place, by several threads or on unaligned arrays.
"""

from __future__ import annotations

import functools
import itertools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.backends import memory, reference
from fastdrop.backends.memory import NEVER, Policy
from fastdrop.backends.primitives import PRIMITIVES, TABLE
from fastdrop.core.activations import ACTIVATIONS, GELU, NONE, RELU, SILU
from fastdrop.core.mask import word_count
from fastdrop.core.variants import panels

from ..cases import DTYPES, Dtype, assert_close, assert_same_bits
from .calls import AtPage, AtPageEnd, Call, Results, assert_same_results

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = DTYPES
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(FLOAT16, FLOAT32), (BFLOAT16, FLOAT32)]

# Rows of one element, shorter and longer than a vector, a strip, the room for a row (4,096) and a thread's grain, rows
# that begin anywhere within a word, and rows that end where a strip ends (2,048).
SHAPES = ((1, 1), (3, 5), (7, 100), (33, 48), (2, 1000), (5, 8200), (1, 70_001), (200, 300), (3, 2048))

# A primitive's arrays, each with its kind in the table.
FUSED = [primitive for primitive in TABLE if primitive.is_fused and primitive.over != "heads"]
ARRAYS = {primitive.name: [array for array in primitive.parameters if array.is_array] for primitive in FUSED}
INPUTS = {op: {array.name: array.kind for array in arrays if not array.written} for op, arrays in ARRAYS.items()}
OUTPUTS = {op: {array.name: array.kind for array in arrays if array.written} for op, arrays in ARRAYS.items()}
# Telling combinations of what a call has not.
ABSENT = {
    "pointwise_forward": [
        "",
        "words",
        "multiplier",
        "input_bias multiplier",
        "residual",
        "input_bias multiplier residual",
        "input_bias words",
    ],
    "pointwise_backward": [
        "",
        "words",
        "multiplier dmultiplier",
        "sums",
        "input_bias",
        "input_bias sums",
        "x input_bias multiplier dmultiplier",
    ],
    "norm_forward": ["", "residual", "weight norm_bias", "input_bias words", "norm_bias"],
    "norm_backward": ["", "dresidual_out", "weight sums", "dx", "dresidual", "words", "dresidual_out dx"],
    "softmax_forward": ["", "mask", "probabilities", "words", "mask probabilities"],
    "softmax_backward": ["", "y", "words"],
}


def is_of_scores(op: str) -> bool:
    """These have no residual."""
    return op.startswith("softmax")


CALLS = [(op, *pair) for op in INPUTS for pair in (PAIRS[:4] if is_of_scores(op) else PAIRS)]
each_call = pytest.mark.parametrize(("op", "dtype", "stream"), CALLS, ids=str)
each_op = pytest.mark.parametrize("op", INPUTS)


@dataclass(frozen=True)
class Case:
    """A call: its parameters that are no arrays, and the names of arrays that it has not."""

    op: str
    dtype: Dtype
    stream: Dtype
    rows: int
    columns: int
    absent: str = ""
    activation: int = NONE
    a: float = 1.25
    eps: float = 1e-5
    centred: int = 1
    heads: int = 1
    queries: int = 0  # 0: as many as there are rows
    strides: tuple[int, int, int] | None = None  # of the mask; None: a line for each query
    softmax_scale: float = 0.3
    causal: int = 0

    @property
    def inputs(self) -> dict[str, str]:
        return {name: kind for name, kind in INPUTS[self.op].items() if name not in self.absent.split()}

    @property
    def outputs(self) -> dict[str, str]:
        absent = self.absent.split() + ["signs"] * (self.activation != RELU)
        return {name: kind for name, kind in OUTPUTS[self.op].items() if name not in absent}

    def type_of(self, kind: str) -> Dtype:
        real = FLOAT64 if self.dtype is FLOAT64 else FLOAT32
        return {"data": self.dtype, "residual": self.stream}.get(kind, real)

    def empty(self, kind: str) -> Any:
        """Elements and storage of an array."""
        size = {
            "words": word_count(self.rows * self.columns),
            "column": self.columns,
            "statistics": 2 * self.rows,
            "sums": panels(self.rows) * (3 if self.op == "norm_backward" else 1) * self.columns,
        }.get(kind, self.rows * self.columns)
        return size, np.uint32 if kind == "words" else self.type_of(kind).storage

    def call(self, arrays: Results) -> Call:
        strides = self.strides or (0, 0, self.columns)
        numbers = {name: getattr(self, name, None) for name in PRIMITIVES[self.op].names} | {
            "dtype": self.dtype.tag,
            "residual_dtype": self.stream.tag,
            "panels": panels(self.rows),
            "queries": self.queries or max(self.rows, 1),
            **dict(zip(("outer_stride", "head_stride", "query_stride"), strides, strict=True)),
        }
        return Call(self.op, arrays, {name: self.empty(kind) for name, kind in self.outputs.items()}, numbers)


@functools.cache
def numbers_of(case: Case) -> Results:
    """Ordinary inputs, three bits in four of them kept. Read-only."""
    rng = np.random.default_rng(case.rows * 100_003 + case.columns)
    shape, arrays = (case.rows, case.columns), {}
    for name, kind in case.inputs.items():
        size, storage = case.empty(kind)
        if kind == "words":
            arrays[name] = np.bitwise_or.reduce(rng.integers(0, 2**32, (2, size), np.uint32))
        elif name == "probabilities":
            exponentials = np.exp(rng.normal(size=shape))
            arrays[name] = case.dtype.narrow(exponentials / exponentials.sum(1, keepdims=True))
        elif name == "statistics":
            arrays[name] = moments(case, arrays["residual_out"]).astype(storage)
        else:
            arrays[name] = case.type_of(kind).narrow(rng.normal(size=size))
    arrays = {name: array.reshape(-1) for name, array in arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def moments(case: Case, stored: np.ndarray) -> np.ndarray:
    """Statistics of a sum as it is stored, in float64."""
    values = case.stream.wide(stored).reshape(case.rows, case.columns)
    mean = values.mean(1) if case.centred else np.zeros(case.rows)
    return np.stack([mean, 1 / np.sqrt(np.square(values - mean[:, None]).mean(1) + case.eps)], 1)


def run(module: Any, case: Case, arrays: Results | None = None, **layout: Any) -> Results:
    """Results, sums as their first line. `Call.arrays` explains layouts."""
    results = case.call(numbers_of(case) if arrays is None else arrays).run(module, **layout)
    if "sums" in results:
        results["sums"] = results["sums"].reshape(panels(case.rows), -1)[0]
    return results


@functools.cache
def expected_of(case: Case) -> Results:
    return run(reference, case)


def assert_results_close(case: Case, results: Results, expected: Results) -> None:
    """A norm's are held to the sum that it stored, on which one rounding may differ."""
    if case.op == "norm_forward" and case.rows:
        values = case.stream.wide(results["residual_out"]).reshape(case.rows, case.columns)
        statistics = moments(case, results["residual_out"])
        y = (values - statistics[:, :1]) * statistics[:, 1:]
        arrays = numbers_of(case)
        y = y * arrays.get("weight", 1.0) + arrays.get("norm_bias", 0.0)
        real = case.type_of("statistics")
        assert_close(real.wide(results["statistics"]), statistics.reshape(-1), real, ("statistics", case))
        assert_close(case.dtype.wide(results["y"]), y.reshape(-1), case.dtype, ("y", case))
        expected = {"residual_out": expected["residual_out"]}
    for name, wanted in expected.items():
        if case.outputs[name] == "words":
            assert_same_bits(results[name], wanted, (name, case))
        else:
            own = case.type_of(case.outputs[name])
            assert_close(own.wide(results[name]), own.wide(wanted), own, (name, case))


def cases(op: str, dtype: Dtype, stream: Dtype) -> list[Case]:
    """Every shape, with other operands absent and another activation at each, from other ones on for each dtype."""
    chosen = []
    for k, (rows, columns) in enumerate(SHAPES):
        turn = k + dtype.tag + stream.tag
        absent = ABSENT[op][turn % len(ABSENT[op])]
        activation = NONE if "x" in absent.split() or "pointwise" not in op else turn % len(ACTIVATIONS)
        chosen.append(
            Case(op, dtype, stream, rows, columns, absent, activation, centred=turn % 2, causal=turn // 2 % 2)
        )
    return chosen


# ---- against the reference ----


@each_call
def test_results_as_reference(compiled, op, dtype, stream):
    for case in cases(op, dtype, stream):
        assert_results_close(case, run(compiled, case), expected_of(case))


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_as_reference(compiled, dtype, activation):
    """Numbers of one magnitude at a time, each special one alone: errors are allowed by the largest of a result."""
    specials = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-5, -1e-5, 1e4, -1e4]
    if dtype is not FLOAT16:  # numbers whose squares or cubes float32 does not hold
        specials += [1e15, -1e15, 1e20, -1e20, 3e38, -3e38]
    parts = [np.linspace(-most, most, 401) for most in (0.1, 1.0, 5.0, 30.0)] + [np.array([one]) for one in specials]
    borders = np.cumsum([part.size for part in parts])[:-1]
    h = dtype.narrow(np.concatenate(parts))
    for op, absent in (
        ("pointwise_forward", "input_bias multiplier residual words signs"),
        ("pointwise_backward", "input_bias words sums"),
    ):
        case = Case(op, dtype, dtype, h.size, 1, absent, ACTIVATIONS[activation], a=1.0)
        arrays = dict(numbers_of(case)) | {"x": h}
        got = run(compiled, case, arrays)
        for name, wanted in run(reference, case, arrays).items():
            both = (np.split(dtype.wide(values), borders) for values in (got[name], wanted))
            for part, *results in zip(parts, *both, strict=True):
                assert_close(*results, dtype, (name, activation, part[-1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_leaves_a_zero_to_be_multiplied(variant, dtype):
    """Like any other number of the activation's, in both passes: by infinity it is NaN, by -2 it is -0."""
    x, factor = ([-1, -1, -1, 0, 0, 1, 1, 2], [np.inf, -2, 3, np.nan, -1, np.inf, np.nan, -3])
    given = {"x": x, "multiplier": factor, "dy": np.ones(8)}
    for op, absent in (
        ("pointwise_forward", "input_bias residual words"),
        ("pointwise_backward", "input_bias words sums"),
    ):
        case = Case(op, dtype, dtype, 2, 4, absent, RELU)
        arrays = {name: dtype.narrow(np.array(given[name], np.float64)) for name in case.inputs}
        got = run(variant, case, arrays)
        for name, wanted in run(reference, case, arrays).items():
            if case.outputs[name] == "words":
                assert_same_bits(got[name], wanted, (name, op))
                continue
            lost = np.isnan(dtype.wide(wanted))
            assert_same_bits(np.isnan(dtype.wide(got[name])), lost, (name, op))
            assert_same_bits(got[name][~lost], wanted[~lost], (name, op))


def test_an_unknown_activation_is_an_error(variant):
    for op, code in itertools.product(("pointwise_forward", "pointwise_backward"), (-1, len(ACTIVATIONS))):
        case = Case(op, FLOAT32, FLOAT32, 3, 5, "signs sums", code)
        with pytest.raises((ValueError, KeyError)):
            run(variant, case)


@each_op
def test_no_rows(variant, op):
    """Sums of nothing are 0."""
    case = Case(op, FLOAT32, FLOAT32, 0, 7)
    results = run(variant, case)
    if "sums" in results:
        assert_same_bits(results["sums"], np.zeros_like(results["sums"]))


# ---- signs and dropped elements ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs_bit_for_bit(variant, dtype):
    shapes = (1, 1), (3, 5), (1, 31), (1, 32), (1, 33), (7, 100), (16, 32), (3, 1365), (2, 5000)
    for absent, (rows, columns) in itertools.product(("", "words", "input_bias"), shapes):
        case = Case("pointwise_forward", dtype, dtype, rows, columns, absent, RELU)
        x = dtype.data(rows * columns)  # of which half or so is NaN or out of the ordinary
        arrays = dict(numbers_of(case)) | {"x": x}
        assert_same_bits(run(variant, case, arrays)["signs"], run(reference, case, arrays)["signs"], case)


def kept(case: Case, words: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return bits[: case.rows * case.columns].astype(bool)


def poisoned(case: Case, arrays: Results, name: str, keep: np.ndarray) -> np.ndarray:
    """An input with NaN and infinities for elements that are not to be kept."""
    own = case.type_of(INPUTS[case.op][name])
    specials = np.resize(own.narrow(np.array([np.nan, np.inf, -np.inf])), arrays[name].size)
    return np.where(keep, arrays[name], specials)


FORWARD, BACKWARD = "pointwise_forward", "pointwise_backward"
TRACELESS = [  # options of a call, inputs that are poisoned where elements are dropped, outputs that are +0 there
    *((FORWARD, 3, 1365, "residual", activation, ["x", "multiplier"], ["y"]) for activation in (NONE, SILU)),
    *((FORWARD, 7, 100, "residual", activation, ["x", "multiplier"], ["y"]) for activation in (RELU, GELU)),
    *((BACKWARD, 3, 1365, "", activation, ["dy", "x"], ["dx", "dmultiplier"]) for activation in (NONE, SILU)),
    *((BACKWARD, 7, 100, "", activation, ["dy", "x"], ["dx", "dmultiplier"]) for activation in (RELU, GELU)),
    ("norm_forward", 7, 100, "", NONE, ["x"], []),
    ("softmax_backward", 7, 100, "", NONE, ["dy"], ["y"]),
]
# Whole rows of an input that are not finite, as outputs then are except where elements are dropped.
LOST = [("norm_backward", "dresidual_out", "dx"), ("softmax_forward", "x", "y")]


@pytest.mark.parametrize(("dtype", "stream"), PAIRS, ids=str)
def test_dropped_elements_leave_no_trace(variant, dtype, stream):
    for op, rows, columns, absent, activation, names, zeros in TRACELESS:
        case = Case(op, dtype, dtype if is_of_scores(op) else stream, rows, columns, absent, activation)
        clean = numbers_of(case)
        keep = kept(case, clean["words"])
        results = run(variant, case, dict(clean) | {name: poisoned(case, clean, name, keep) for name in names})
        assert_same_results(results, run(variant, case), case)
        for name in zeros:
            assert_same_bits(results[name][~keep], np.zeros_like(results[name][~keep]), (name, case))
    for op, name, output in LOST:
        case = Case(op, dtype, dtype if is_of_scores(op) else stream, 7, 100)
        clean = numbers_of(case)
        keep, lost = kept(case, clean["words"]), np.arange(700) < 300
        y = run(variant, case, dict(clean) | {name: poisoned(case, clean, name, ~lost)})[output]
        assert not np.isfinite(dtype.wide(y[keep & lost])).any(), case
        assert_same_bits(y[~keep], np.zeros_like(y[~keep]), case)


# ---- rows that are out of the ordinary ----


@pytest.mark.parametrize(("dtype", "stream"), PAIRS, ids=str)
def test_norm_of_a_row_with_nan_or_infinity(variant, dtype, stream):
    """Only that row's results are NaN."""
    case = Case("norm_forward", dtype, stream, 5, 300, "words")
    plain = run(variant, case)
    for number in (np.nan, -np.inf):
        x = numbers_of(case)["x"].copy()
        x[700] = dtype.narrow(np.array([number]))[0]
        results = run(variant, case, dict(numbers_of(case)) | {"x": x})
        lost = np.isnan(dtype.wide(results["y"])).reshape(5, 300)
        assert lost[2].all(), number
        assert not lost[[0, 1, 3, 4]].any(), number
        assert_same_bits(results["y"].reshape(5, 300)[3], plain["y"].reshape(5, 300)[3], number)
        assert_same_bits(results["statistics"][6:], plain["statistics"][6:], number)


@pytest.mark.parametrize(("dtype", "stream"), [pair for pair in PAIRS if pair[1] is not FLOAT16], ids=str)
def test_norm_backward_of_even_rows(compiled, dtype, stream):
    """So far from 0 that a 0 beyond the end of a row would be normed to infinity."""
    for columns in (1, 5, 33, 101):
        case = Case("norm_backward", dtype, stream, 3, columns, eps=1e-12)
        even = np.full(3 * columns, 2.0 ** (np.finfo(dtype.computed).maxexp - 18))
        arrays = dict(numbers_of(case)) | {"residual_out": stream.narrow(even)}
        arrays["statistics"] = moments(case, arrays["residual_out"]).astype(dtype.computed).reshape(-1)
        assert_results_close(case, run(compiled, case, arrays), run(reference, case, arrays))


@pytest.mark.parametrize("columns", [1, 5, 100, 8200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_of_rows_out_of_the_ordinary(variant, dtype, columns):
    """Rows of minus infinities are 0; of one number, even; with NaN or infinity anywhere, NaN."""
    last = columns - 1
    rows = {
        "masked": lambda row: row.fill(-np.inf),
        "all but the last": lambda row: row[:last].fill(-np.inf),
        "all but the first": lambda row: row[1:].fill(-np.inf),
        "even": lambda row: row.fill(3.0),
        "huge": lambda row: row.fill(3e4),
        "nan first": lambda row: (row.fill(-np.inf), row.__setitem__(0, np.nan)),
        "nan last": lambda row: (row.fill(-np.inf), row.__setitem__(last, np.nan)),
        "nan among numbers": lambda row: row.__setitem__(last // 2, np.nan),
        "infinity": lambda row: row.__setitem__(last // 2, np.inf),
        "negative nan": lambda row: row.__setitem__(last // 2, -np.float64(np.nan)),
    }
    values = np.random.default_rng(columns).normal(size=(len(rows), columns))
    for row, change in zip(values, rows.values(), strict=True):
        change(row)
    case = Case("softmax_forward", dtype, dtype, len(rows), columns, "mask words", a=1.0)
    with np.errstate(all="ignore"):
        arrays = {"x": dtype.narrow(values).reshape(-1)}
    got, wanted = (run(module, case, arrays)["probabilities"].reshape(values.shape) for module in (variant, reference))
    for r, name in enumerate(rows):
        assert_close(dtype.wide(got[r]), dtype.wide(wanted[r]), dtype, (name, columns))
    assert_same_bits(got[0], np.zeros_like(got[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 64, 5000])
def test_softmax_under_a_mask_that_leaves_nothing(variant, dtype, columns):
    """By minus infinities in the mask, and causal too: NaN beyond a query's keys is never looked at."""
    case = Case("softmax_forward", dtype, dtype, 6, columns, "words", a=1.0, queries=3, heads=2, causal=1)
    mask = np.zeros((3, columns), case.dtype.computed)
    mask[1] = -np.inf
    x = case.dtype.wide(numbers_of(case)["x"]).reshape(6, columns)
    for r in range(6):
        x[r, r % 3 + 1 :] = np.nan
    arrays = {"x": dtype.narrow(x).reshape(-1), "mask": mask.reshape(-1)}
    results = {module: run(module, case, arrays) for module in (variant, reference)}
    assert_results_close(case, results[variant], results[reference])
    y = results[variant]["y"].reshape(6, columns)
    assert_same_bits(y[[1, 4]], np.zeros_like(y[[1, 4]]))
    assert np.isfinite(dtype.wide(y)).all()


def test_softmax_takes_masks_of_any_strides(compiled):
    """outer 2, heads 3, queries 5, keys 9."""
    strided = (0, 0, 0), (0, 0, 9), (0, 45, 9), (135, 45, 9), (135, 0, 9), (9, 0, 0), (18, 9, 0)
    for strides, causal, dtype in itertools.product(strided, (0, 1), (FLOAT32, FLOAT64, BFLOAT16)):
        case = Case("softmax_forward", dtype, dtype, 30, 9, "", heads=3, queries=5, strides=strides, causal=causal)
        mask = np.random.default_rng(sum(strides)).normal(size=270).astype(dtype.computed)
        mask[::7] = -np.inf
        arrays = dict(numbers_of(case)) | {"mask": mask[: 1 * strides[0] + 2 * strides[1] + 4 * strides[2] + 9]}
        assert_results_close(case, run(compiled, case, arrays), run(reference, case, arrays))


# ---- memory ----

IN_PLACE = {
    "pointwise_forward": [{"y": "x"}, {"y": "residual"}, {"y": "multiplier"}],
    "pointwise_backward": [{"dx": "dy"}, {"dx": "x", "dmultiplier": "multiplier"}, {"dx": "dy", "dmultiplier": "x"}],
    "norm_forward": [{"residual_out": "residual", "y": "x"}, {"residual_out": "x"}],
    "norm_backward": [{"dx": "dy", "dresidual": "dresidual_out"}, {"dresidual": "residual_out"}],
    "softmax_forward": [{"probabilities": "x"}, {"y": "x"}],
    "softmax_backward": [{"dx": "dy"}, {"dx": "probabilities"}, {"dx": "dy", "y": "probabilities"}],
}


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_bit_for_bit(variant, op, dtype):
    for rows, columns in ((33, 48), (3, 5001)):
        case = Case(op, dtype, dtype, rows, columns, "", GELU if "pointwise" in op else NONE)
        wanted = run(variant, case)
        for over in IN_PLACE[op]:
            assert_same_results(run(variant, case, over=over), wanted, (over, case))


@each_call
def test_unaligned_bit_for_bit(compiled, op, dtype, stream):
    """Arrays past a cache line, at addresses of elements and at others, and rows that begin anywhere."""
    for rows, columns in ((3, 5), (7, 101), (3, 4099)):
        case = Case(op, dtype, stream, rows, columns, "", SILU if "pointwise" in op else NONE)
        wanted = run(compiled, case)
        for shift in (8, 5):
            assert_same_results(run(compiled, case, shifts=(shift,)), wanted, (shift, case))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect as Linux has it")
@pytest.mark.parametrize("memory", [AtPage, AtPageEnd])
@each_op
def test_fused_primitives_stay_within_memory(compiled, op, memory):
    """Reads count as well: a kernel that touches a byte beside its arrays is killed here."""
    for dtype, stream in PAIRS[:4] if is_of_scores(op) else PAIRS:
        for rows, columns in ((1, 1), (3, 5), (1, 33), (3, 101), (2, 513), (1, 4099)):
            case = Case(op, dtype, stream, rows, columns, "", RELU if "pointwise" in op else NONE)
            run(compiled, case, memory=memory)


@pytest.mark.parametrize("c_variant", ["c-avx2", "c-avx512"], indirect=True)  # others have ordinary stores alone
@each_call
def test_results_around_the_cache_bit_for_bit(c_variant, op, dtype, stream):
    """Aligned, not, and in place; rows that end anywhere, at a line, and with a strip."""
    for rows, columns in ((9, 1001), (3, 4099), (5, 1024)):
        case = Case(op, dtype, stream, rows, columns, "", RELU if op == "pointwise_forward" else NONE)
        ways = [over for over in IN_PLACE[op] if all(same_type(case, *names) for names in over.items())]
        for shift, over in ((0, None), (8, None), (12, ways[-1])):
            with memory.use_policy(Policy(NEVER)):
                wanted = run(c_variant, case, shifts=(shift,), over=over)
            with memory.use_policy(Policy(0)):
                assert_same_results(run(c_variant, case, shifts=(shift,), over=over), wanted, (shift, over, op))


def same_type(case: Case, output: str, name: str) -> bool:
    return case.type_of(case.outputs[output]) is case.type_of(case.inputs[name])


# ---- threads ----


@pytest.mark.parametrize(("op", "absent"), [*((op, "") for op in INPUTS), ("pointwise_backward", "sums")])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1100, 301), (40, 10_007), (3, 131_073)], ids=["short", "two panels", "long"]
)
def test_threads_never_change_a_bit(compiled, threads, op, absent, rows, columns):
    """Enough for five threads; also more threads than panels of rows, and than rows."""
    case = Case(op, FLOAT32, FLOAT32, rows, columns, absent, RELU if op == "pointwise_forward" else NONE)
    fd.set_num_threads(1)
    wanted = run(compiled, case)
    for count in (2, 5):
        fd.set_num_threads(count)
        assert_same_results(run(compiled, case), wanted, (count, case))


def test_panels_decide_the_order_of_sums(compiled):
    """In float32, where the order shows: a panel's sum is taken before it is added to the others."""
    rows, columns = 64, 3
    case = Case(
        "pointwise_backward", FLOAT32, FLOAT32, rows, columns, "x input_bias multiplier dmultiplier words", a=1.0
    )
    dy = np.full((rows, columns), 2.0**-24, np.float32)
    dy[0] = 1.0
    first = rows // panels(rows)
    wanted = np.float32(1) + np.float32((rows - first) * 2.0**-24)
    sums = run(compiled, case, {"dy": dy.reshape(-1)})["sums"]
    assert_same_bits(sums, np.full(columns, wanted, np.float32))

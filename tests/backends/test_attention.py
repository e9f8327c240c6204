"""The primitives of attention, of every backend x instruction set x dtype, against the reference in float64.

Outputs start as NaN between guards, inputs must stay as they were. What is exact is compared bit for bit: drawn bits
beside given ones, gradients asked for one at a time, several threads, unaligned arrays.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.backends import reference

from ..cases import DTYPES, TENTH, Dtype, assert_close, assert_same_bits
from .attention_cases import (
    BFLOAT16,
    COLUMN,
    FLOAT16,
    FLOAT64,
    GRADIENTS,
    HEAD,
    OUTER,
    ROW,
    STRIDED,
    Case,
    assert_numbers_close,
    assert_results_close,
    backward,
    bits_of_draw,
    expected_forward_of,
    expected_of,
    forward,
    inputs_of,
    rows_of,
    run,
    values_of,
)
from .calls import AtPage, AtPageEnd, Results, assert_same_results

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Scores lie in tiles of 96 queries and 256 keys, and forward takes 480 queries at a time.
CASES = {
    "one score": Case(queries=1, keys=1, width=1, value_width=1),
    "one key": Case(queries=300, keys=1, width=64, value_width=65),
    "one query": Case(queries=1, keys=300, width=65, value_width=64, group=3, parts=2),
    "below a tile": Case(queries=95, keys=255, width=64, value_width=65, heads=2),
    "a tile": Case(queries=96, keys=256, width=7, value_width=1, outer=2, group=2),
    "past a tile": Case(queries=97, keys=257, width=65, value_width=64, parts=2),
    "past a chunk": Case(queries=481, keys=97, width=1, value_width=7),
    "wider than strips": Case(queries=2, keys=5, width=2100, value_width=2100),
    "causal": Case(queries=300, keys=300, group=2, causal=True, parts=2),
    "causal, keys that none sees": Case(queries=97, keys=481, causal=True, parts=2),
    "causal, queries that see all": Case(queries=481, keys=95, causal=True),
    "long": Case(queries=1100, keys=1100, width=64, value_width=64, causal=True, parts=5),
    "by rows": Case(outer=2, heads=2, group=3, queries=97, keys=257, by_rows=True, words=True, parts=2),
    "a mask for keys": Case(group=2, queries=97, keys=257, mask="data", broadcast=(HEAD, ROW), causal=True),
    "far cells": Case(outer=2, first=2**37 - 500, threshold=2**31),
    "all kept": Case(threshold=0),
    "all dropped": Case(threshold=2**32),
}


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_results_as_reference(compiled, name, dtype):
    case = replace(CASES[name], dtype=dtype)
    assert_results_close(case, run(compiled, case), expected_of(case))


MASKS = [(kind, dtype) for kind in ("bool", "data") for dtype in DTYPES] + [("float32", FLOAT16), ("float32", BFLOAT16)]


@pytest.mark.parametrize(("kind", "dtype"), MASKS, ids=str)
def test_masks_of_any_strides(compiled, kind, dtype):
    """0 in every set of axes, and keys that lie apart."""
    axes = itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in range(5))
    for k, (broadcast, transposed) in enumerate(itertools.product(axes, (False, True))):
        extents = {"outer": 1, "heads": 1} if k % 4 < 2 else {"outer": 2, "heads": 2}
        case = Case(dtype, **extents, group=2, queries=3, keys=259, width=3, causal=k % 3 == 0)
        case = replace(case, mask=kind, broadcast=broadcast, transposed=transposed)
        assert_results_close(case, run(compiled, case), expected_of(case))


# ---- the reference itself ----

SMALL = Case(FLOAT64, 2, 2, 3, queries=7, keys=9, width=3, value_width=4, mask="data", threshold=2**31)


def dense(case: Case, words: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray):
    """Attention in three lines, of arrays [outer, heads, rows, columns]."""
    key, value = key.repeat(case.group, 1), value.repeat(case.group, 1)
    scores = query @ key.swapaxes(2, 3) / math.sqrt(case.width) + mask
    scores = np.where(np.tri(case.queries, case.keys) if case.causal else True, scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    keep = np.unpackbits(words.view(np.uint8), bitorder="little")[case.first : case.first + case.scores]
    return np.where(keep.reshape(weights.shape), 1.25 * weights, 0.0) @ value


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_attention_and_its_gradient(causal):
    """The gradient along a direction, beside the difference of two results near by."""
    case = replace(SMALL, causal=causal, first=3)
    names = ("query", "key", "value", "mask")
    at = [np.where(np.isinf(values_of(case, name)), 0.5, values_of(case, name)) for name in names]
    words, dy = bits_of_draw(case), values_of(case, "dy")
    given = inputs_of(case, mask=at[3])
    results = forward(reference, case, given)
    assert_close(results["y"], dense(case, words, *at).reshape(-1), FLOAT64)
    given |= results | {"dquery": np.zeros(at[0].size), "dmask": np.zeros_like(given["mask"])}
    gradients = backward(reference, case, given)
    gradients["dmask"] = rows_of(case, "dmask", gradients["dmask"], given)
    rng, step = np.random.default_rng(5), 1e-5
    for i, name in enumerate(names):
        way = rng.normal(size=at[i].shape)
        ends = [dense(case, words, *at[:i], at[i] + sign * step * way, *at[i + 1 :]) for sign in (1, -1)]
        wanted = ((ends[0] - ends[1]) / (2 * step) * dy).sum()
        got = (gradients[f"d{name}"].reshape(way.shape) * way).sum()
        assert abs(got - wanted) < 1e-7 * max(1.0, abs(wanted)), name


# ---- bits ----

WHOLE = Case(outer=2, heads=2, group=2, queries=98, keys=261, causal=True, parts=2)  # ends within words and tiles


@each_dtype
@pytest.mark.parametrize("threshold", [0, 1, TENTH, 2**31, 2**32], ids=hex)
def test_given_bits_do_what_drawn_ones_do(variant, threshold, dtype):
    case = replace(WHOLE, dtype=dtype, threshold=threshold, first=77, causal=threshold == TENTH)
    drawn, given = (run(variant, replace(case, words=words)) for words in (False, True))
    assert_same_results(given, drawn, case)
    if threshold >> 32:
        assert not drawn["y"].any()
        assert not drawn["dvalue"].any()


def test_shared_cells_are_cells_that_are_repeated(variant):
    """Bit for bit as under a mask that has them for each weight, drawn and given."""
    for shared in ((HEAD,), (OUTER, HEAD), (ROW,), (OUTER, ROW), (OUTER, HEAD, ROW)):
        case = replace(WHOLE, first=77, shared_cells=shared)
        bits = np.unpackbits(bits_of_draw(case).view(np.uint8), bitorder="little")[: 77 + math.prod(case.mask_shape)]
        repeated = np.broadcast_to(bits[77:].reshape(case.mask_shape), case.shape("weights")).reshape(-1)
        whole = np.zeros(-(-(77 + case.scores) // 32) * 32, np.uint8)
        whole[77 : 77 + case.scores] = repeated
        plain, expected = replace(case, shared_cells=(), words=True), expected_forward_of(case)
        given = inputs_of(plain) | {"words": np.packbits(whole, bitorder="little").view(np.uint32)}
        wanted = forward(variant, plain, given) | backward(variant, plain, given | expected)
        for words in (False, True):
            assert_same_results(run(variant, replace(case, words=words)), wanted, (shared, words))


@pytest.mark.parametrize("words", [False, True])
def test_a_part_of_a_call_is_a_call_from_a_later_cell_on(variant, words):
    """The second outer index, bit for bit."""
    case = replace(WHOLE, words=words, parts=1)
    given, results = inputs_of(case), run(variant, case)
    part = replace(case, outer=1, first=case.scores // 2)
    outer_strides = given["strides"][:-4:4]
    half = {name: given[name] for name in ("strides", "words") if name in given}
    for name, stride in zip(STRIDED, outer_strides, strict=True):
        if name in given:
            half[name] = given[name][stride:].copy()
    half["dquery"] = given["dquery"][given["dquery"].size // 2 :].copy()
    expected = expected_forward_of(case)
    own = forward(variant, part, half)
    own |= backward(variant, part, half | {name: x[x.size // 2 :].copy() for name, x in expected.items()})
    assert_same_results(own, {name: x[x.size // 2 :] for name, x in results.items()}, case)


# ---- gradients ----


@each_dtype
def test_gradients_one_at_a_time(variant, dtype):
    """Bit for bit as all together, or all but the mask's; that of the values alone needs neither value nor y."""
    case = replace(WHOLE, dtype=dtype, mask="data")
    given = inputs_of(case) | expected_forward_of(case)
    wanted = backward(variant, case, given)
    wanted |= backward(variant, replace(case, gradients="dquery dkey dvalue"), without(given, "dmask"))
    for name in GRADIENTS.split():
        alone = backward(variant, replace(case, gradients=name), without(given, *({*GRADIENTS.split()} - {name})))
        assert_same_results(alone, {name: wanted[name]}, name)
    dvalue = backward(variant, replace(case, gradients="dvalue"), without(given, "value", "y", "dquery", "dmask"))
    assert_same_results(dvalue, {"dvalue": wanted["dvalue"]}, "without value and y")


def without(arrays: Results, *names: str) -> Results:
    return {name: array for name, array in arrays.items() if name not in names}


@each_dtype
def test_parts_divide_the_sum_of_the_gradient_of_queries(compiled, dtype):
    """More parts than tiles of keys too. All else is as with one part, bit for bit."""
    for keys, parts in ((1100, 2), (1100, 5), (300, 5)):
        case = Case(dtype, heads=2, queries=100, keys=keys, mask="data", parts=parts)
        results, one = run(compiled, case), run(compiled, replace(case, parts=1))
        assert_results_close(case, results, expected_of(case))
        assert_same_results(without(results, "dquery"), without(one, "dquery"), case)


# ---- rows that are out of the ordinary ----

NAN, INF = np.nan, np.inf


def rows_of_mask(dtype: Dtype) -> dict[str, np.ndarray]:
    """Lines of 300 keys, the last 44 of them in a second tile."""
    least = -float(dtype.wide(dtype.narrow(np.array(3.38e38 if dtype is not FLOAT16 else 65504.0))))
    if dtype is FLOAT64:
        least = float(np.finfo(np.float64).min)
    rows = {name: np.zeros(300) for name in ("ordinary", "larger later", "larger before")}
    rows["larger later"][256:], rows["larger before"][:256] = 30.0, 30.0
    rows["nothing seen"] = np.full(300, -INF)
    rows["the second tile alone"] = np.repeat([-INF, 0.0], [256, 44])
    rows["the first tile alone"] = np.repeat([0.0, -INF], [256, 44])
    rows["the last key alone"] = np.repeat([-INF, 0.0], [299, 1])
    rows["all but one at the least number"] = np.repeat([least, 0.0, least], [7, 1, 292])
    if dtype is not FLOAT16:  # whose least number leaves something of a score
        rows["the least number"] = np.full(300, least)
    rows["NaN first"] = np.repeat([NAN, -INF], [1, 299])
    rows["NaN last"] = np.repeat([-INF, NAN], [299, 1])
    rows["infinity"] = np.repeat([0.0, INF, 0.0], [7, 1, 292])
    rows["infinity later"] = np.repeat([0.0, INF], [299, 1])
    return rows


@each_dtype
@pytest.mark.parametrize("lost", [False, True], ids=["finite", "lost"])
def test_rows_out_of_the_ordinary(variant, dtype, lost):
    """Rows that see nothing are 0, rows with NaN or infinity NaN. They change no other row."""
    lines = rows_of_mask(dtype)
    names = [name for name in lines if lost or not name.startswith(("NaN", "infinity"))]
    case = Case(dtype, queries=len(names), keys=300, mask="data", threshold=2**31)
    given = inputs_of(case, mask=np.array([lines[name] for name in names]))
    expected = forward(reference, case, given)
    results = forward(variant, case, given) | backward(variant, case, given | expected)
    expected |= backward(reference, case, given | expected)
    for name in ("dkey", "dvalue"):
        assert_numbers_close(case, name, *(dtype.wide(values[name]) for values in (results, expected)))
    for name in ("y", "dquery", "dmask"):
        both = [rows_of(case, name, values[name], given) for values in (results, expected)]
        for row, got, wanted in zip(names, *both, strict=True):
            assert_numbers_close(case, name, got, wanted, what=row)
    statistics = [rows_of(case, "statistics", values["statistics"], given) for values in (results, expected)]
    for row, got, wanted in zip(names, *statistics, strict=True):
        assert_numbers_close(case, "statistics", got[1:], wanted[1:], what=row)
        if np.isnan(wanted[1]):  # then the largest score may be anything
            continue
        if np.abs(wanted[0]) < 1e4:
            assert_numbers_close(case, "statistics", got[:1], wanted[:1], what=row)
        else:
            assert got[0] == wanted[0], row
    seen = names.index("nothing seen")
    assert not rows_of(case, "y", results["y"], given)[seen].any()


def both_of(variant: ModuleType, case: Case, given: Results) -> list[Results]:
    """Results of a variant and of the reference, each backward from its own forward."""
    forwards = [(module, forward(module, case, given)) for module in (variant, reference)]
    return [own | backward(module, case, given | own) for module, own in forwards]


@each_dtype
@pytest.mark.parametrize(("name", "place"), [("mask", (3, 1)), ("key", (100, 2))], ids=["mask", "key"])
def test_nan_is_lost_to_those_that_see_it(variant, dtype, name, place):
    """Under causal: one in the mask of query 3 reaches keys 0 to 3, one in key 100 the queries from 100 on."""
    case = Case(dtype, queries=120, keys=300, causal=True, mask="data")
    numbers = dtype.wide(values_of(case, name))
    numbers[(0, 0, *place)] = NAN
    given = inputs_of(case, **{name: numbers})
    results, expected = both_of(variant, case, given)
    for gradient in ("y", "dkey", "dvalue"):
        assert_numbers_close(case, gradient, *(dtype.wide(values[gradient]) for values in (results, expected)))
    lost = np.isnan(rows_of(case, "y", results["y"], given)).all(1)
    assert_same_bits(np.flatnonzero(lost), np.array([3] if name == "mask" else range(100, 120)))
    plain = forward(variant, case)["y"].reshape(120, -1)
    assert_same_bits(results["y"].reshape(120, -1)[~lost], plain[~lost])
    reached = np.isnan(dtype.wide(results["dkey"])).reshape(300, -1).all(1)
    assert_same_bits(reached, np.arange(300) < (4 if name == "mask" else 120))


@each_dtype
def test_nan_that_is_dropped_leaves_no_trace(variant, dtype):
    """A row whose keys are all dropped is 0: by chance if they are few, and where everything is dropped."""
    case = Case(dtype, queries=200, keys=3, causal=True, threshold=2**31)
    given = inputs_of(case, key=np.full(case.width, NAN))
    y = forward(variant, case, given)["y"].reshape(200, -1)
    keep = np.unpackbits(bits_of_draw(case).view(np.uint8), bitorder="little")[: case.scores].reshape(200, 3) > 0
    kept = (keep & np.tri(200, 3, dtype=np.bool_)).any(1)
    assert 100 < kept.sum() < 199
    assert_same_bits(np.isnan(dtype.wide(y)), kept[:, None].repeat(case.value_width, 1))
    assert not y[~kept].any()
    case = Case(dtype, keys=300, threshold=2**32)
    given = inputs_of(case, key=np.where(np.arange(300) == 280, NAN, 1.0)[:, None])  # after a tile of numbers
    assert not forward(variant, case, given)["y"].any()


@each_dtype
def test_scores_of_any_magnitude(variant, dtype):
    """Products of powers of two, which are exact: up to 2**100. Backward finds the scores of its own forward."""
    power = 2.0 ** (7 if dtype is FLOAT16 else 50)
    case = Case(dtype, queries=4, keys=300, width=1, threshold=2**31)
    sizes = np.repeat([0.5, 1.0, -1.0], [250, 20, 30])  # the largest score is in the second tile, or in both
    given = inputs_of(
        case,
        query=power * np.array([1.0, -1.0, 0.5, 0.0])[:, None],
        key=power * sizes[:, None],
    )
    results, expected = both_of(variant, case, given)
    del expected["statistics"], results["statistics"]
    for name, wanted in expected.items():
        both = (case.type_of(name).wide(values) for values in (results[name], wanted))
        assert_numbers_close(case, name, *both, size=power)


# ---- memory ----

ALL_KINDS = (  # every layout, and everything that a call may go without
    Case(outer=2, group=2, queries=3, keys=5, mask="data", words=True, first=5),
    Case(heads=2, queries=97, keys=257, width=33, mask="bool", by_rows=True, causal=True, parts=2),
    Case(outer=2, heads=2, queries=5, keys=67, width=1, mask="data", transposed=True, words=True),
    Case(queries=1, keys=300, width=16, value_width=17, mask="data", broadcast=(ROW, COLUMN)),
)


@each_dtype
def test_unaligned_bit_for_bit(compiled, dtype):
    """Arrays past a cache line, at addresses of elements and at others."""
    for case in (replace(case, dtype=dtype) for case in ALL_KINDS):
        wanted = run(compiled, case)
        for shift in (8, 5):
            assert_same_results(run(compiled, case, shifts=(shift,)), wanted, (shift, case))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect as Linux has it")
@pytest.mark.parametrize("memory", [AtPage, AtPageEnd])
@each_dtype
def test_nothing_outside_of_arrays_is_touched(compiled, memory, dtype):
    """Reads count as well: a kernel that touches a byte beside its arrays is killed here."""
    for case in ALL_KINDS:
        run(compiled, replace(case, dtype=dtype), memory=memory)


# ---- threads ----


@pytest.mark.parametrize(
    "case",
    [
        Case(outer=2, heads=3, group=2, queries=200, keys=300, mask="data"),
        Case(queries=1500, keys=1100, causal=True, parts=5),
    ],
    ids=["heads", "one head"],
)
def test_threads_never_change_a_bit(compiled, threads, case):
    fd.set_num_threads(1)
    wanted = run(compiled, case)
    for count in (2, 5):
        fd.set_num_threads(count)
        assert_same_results(run(compiled, case), wanted, (count, case))

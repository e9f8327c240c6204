"""gather_cells and scatter_cells, of every backend x instruction set x dtype, bit for bit against NumPy's indexing."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.backends import reference

from ..cases import DTYPES, GRAIN, assert_same_bits
from .calls import AtPage, AtPageEnd, Call, assert_same_results

SHAPES = ((1, 1), (2, 31), (33, 7), (70, 129), (1, 600), (300, 1))
SHARES = (1.0, 0.5, 0.03)  # of rows and columns that are kept; at least one of each is
FLOAT32 = DTYPES[0]


def kept_of(extent, share, seed):
    kept = np.flatnonzero(np.random.default_rng(seed).random(extent) < share)
    return (kept if kept.size else np.array([extent - 1])).astype(np.int64)


def calls(dtype, shape, rows, columns):
    """Both primitives with these indices."""
    numbers = {"dtype": dtype.tag, "m": rows.size, "n": columns.size, "height": shape[0], "width": shape[1]}
    index = {"kept_rows": rows, "kept_columns": columns}
    part, whole = rows.size * columns.size, shape[0] * shape[1]
    yield Call("gather_cells", {"x": dtype.data(whole), **index}, {"y": (part, dtype.storage)}, numbers)
    yield Call("scatter_cells", {"x": dtype.data(part), **index}, {"y": (whole, dtype.storage)}, numbers)


def cases(dtype):
    for k, shape in enumerate(SHAPES):
        for share in SHARES:
            yield from calls(dtype, shape, kept_of(shape[0], share, k), kept_of(shape[1], share, k + 10))
    none = np.empty(0, np.int64)
    yield tuple(calls(dtype, (5, 6), none, np.arange(0, 6, 2)))[1]  # zeros alone
    yield tuple(calls(dtype, (5, 6), np.arange(5), none))[1]


def test_reference_is_indexing(dtype):
    for call in cases(dtype):
        numbers, x = call.numbers, call.inputs["x"]
        at = np.ix_(call.inputs["kept_rows"], call.inputs["kept_columns"])
        whole = numbers["height"], numbers["width"]
        if call.op == "gather_cells":
            wanted = x.reshape(whole)[at]
        else:
            wanted = np.zeros(whole, x.dtype)
            wanted[at] = x.reshape(numbers["m"], numbers["n"])
        assert_same_bits(call.run(reference)["y"], wanted.reshape(-1))


def test_results_as_reference(compiled, dtype):
    for call in cases(dtype):
        expected = call.run(reference)
        for shifts in ((0,), (1, 0, 8), (4, 24, 8)):
            assert_same_results(call.run(compiled, shifts=shifts), expected, call)


def test_threads_share_rows(compiled, dtype, threads):
    shape = (700, 7 * GRAIN // 700)
    for rows in (kept_of(700, 0.5, 1), kept_of(700, 0.002, 2), np.arange(690, 700), np.arange(700)):
        for call in calls(dtype, shape, rows, kept_of(shape[1], 0.7, 3)):
            expected = call.run(reference)
            for n in (1, 3, 7):
                fd.set_num_threads(n)
                assert_same_results(call.run(compiled), expected, call)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect as Linux has it")
@pytest.mark.parametrize("memory", [AtPage, AtPageEnd])
def test_primitives_stay_within_memory(compiled, dtype, memory):
    for call in cases(dtype):
        if all(array.size for array in call.inputs.values()):
            call.run(compiled, memory=memory)


def test_c_refuses_and_writes_nothing(c_variant):
    rows, columns = np.array([0, 2, 3]), np.array([1, 4])
    bad_numbers = ({"dtype": 4}, {"dtype": -1}, {"height": 3}, {"width": 4}, {"width": 2**62}, {"width": 0})
    bad_rows = ([2, 0, 3], [0, 0, 3], [-1, 2, 3], [0, 2, 4])
    for call in calls(FLOAT32, (4, 5), rows, columns):
        bad_calls = [Call(call.op, call.inputs, call.outputs, call.numbers | bad) for bad in bad_numbers]
        for index in bad_rows:
            inputs = call.inputs | {"kept_rows": np.array(index)}
            bad_calls.append(Call(call.op, inputs, call.outputs, call.numbers))
        for bad in bad_calls:
            arrays = bad.arrays()
            with pytest.raises(ValueError, match="refused"):
                bad.on(c_variant, arrays)
            assert (arrays["y"].array.view(np.uint32) == 0xFFFFFFFF).all(), bad
    gather = next(calls(FLOAT32, (4, 5), rows, columns))
    with pytest.raises(ValueError, match="refused"):
        Call(gather.op, gather.inputs, gather.outputs, gather.numbers | {"n": 0}).on(c_variant, gather.arrays())

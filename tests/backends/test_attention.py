"""The primitives of attention, of every backend x instruction set x dtype, against the reference in float64.

Outputs start as NaN between guards, inputs must stay as they were. What is exact is compared bit for bit: drawn bits
beside given ones, gradients asked for one at a time, several threads, unaligned arrays.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.backends import reference

from ..cases import DTYPES, TENTH, assert_close, assert_same_bits
from .attention_cases import (
    COLUMN,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    GRADIENTS,
    HEAD,
    OUTER,
    ROW,
    Case,
    assert_results_close,
    backward,
    expected_of,
    forward,
    inputs_of,
    run,
    values_of,
)
from .calls import AtPage, AtPageEnd, assert_same_results

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
    "by rows": Case(outer=2, heads=2, group=3, queries=97, keys=257, by_rows=True, words=True),
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


@each_dtype
@pytest.mark.parametrize("kind", ["bool", "data", "float32"])
def test_masks_of_any_strides(compiled, kind, dtype):
    """0 in every set of axes, and keys that lie apart."""
    if kind == "float32" and dtype in (FLOAT32, FLOAT64):
        pytest.skip("only beside 16-bit data")
    axes = itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in range(5))
    for k, (broadcast, transposed) in enumerate(itertools.product(axes, (False, True))):
        extents = {"outer": 1, "heads": 1} if k % 4 < 2 else {"outer": 2, "heads": 2}
        case = Case(dtype, **extents, group=2, queries=3, keys=259, width=3, causal=k % 3 == 0)
        case = replace(case, mask=kind, broadcast=broadcast, transposed=transposed)
        assert_results_close(case, run(compiled, case), expected_of(case))

"""exp, tanh and gelu in float32 beside double precision, and their coefficients, which stand in Python and in C.

tests/c/vector_math_test.c measures C's exp, tanh and normal distribution.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from fastdrop.backends.reference import pointwise
from fastdrop.core import activations
from fastdrop.core.activations import GELU
from fastdrop.core.checks import FLOAT32

from ..cases import ROOT

MOST = 2  # ulp
STRIDE, DENSER = 4001, 499  # of bit patterns: over all, and where the functions are curved
NEAR = 200
EXACT = {"exponential": np.exp, "tanh": np.tanh}
NUMBER = r"-?\d+\.\d+(?:e[+-]?\d+)?"


def numbers() -> np.ndarray:
    """All floats at a stride, densely from 2**-12 to 2**7, and around 0, infinity and where formulas change."""
    edges = np.abs([value for value in vars(activations).values() if isinstance(value, float)] + [0.0, np.inf])
    around = np.arange(-NEAR, NEAR)[:, None] + edges.astype(np.float32).view(np.uint32).astype(np.int64)
    magnitudes = np.concatenate([np.arange(0x39800000, 0x43000000, DENSER), around[around >= 0]])
    bits = np.concatenate([np.arange(0, 1 << 32, STRIDE), magnitudes, magnitudes | 1 << 31])
    return bits.astype(np.uint32).view(np.float32)


def ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Errors in spacings of float32 at the true value; infinity counts as 2**128, where the next number would be."""
    got, exact = (np.clip(values, -(2.0**128), 2.0**128) for values in (got.astype(np.float64), exact))
    exponent = np.clip(np.frexp(exact)[1], -125, 128)
    return np.abs(got - exact) * np.exp2(24.0 - exponent)


@pytest.mark.parametrize("name", EXACT)
def test_curves_to_the_true_value(name):
    numba = pytest.importorskip("numba", reason="the Numba backend needs numba")
    from fastdrop.backends.numba.math import curves

    function = getattr(curves(False), name)

    @numba.njit
    def curved(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    x = numbers()
    got = np.empty_like(x)
    curved(x, got)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
    x, got = x[~np.isnan(x)], got[~np.isnan(x)]
    with np.errstate(all="ignore"):
        exact = EXACT[name](x.astype(np.float64)).astype(np.float64)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(exact))
    errors = ulps(got, exact)
    worst = np.argmax(errors)
    assert errors[worst] <= MOST, f"{errors[worst]:.3g} ulp at {x[worst]}"


def test_every_table_has_every_activation():
    pytest.importorskip("numba", reason="the Numba backend needs numba")
    from fastdrop.backends.numba.math import curves

    of_numba = [table for double in (False, True) for table in (curves(double).activations, curves(double).slopes)]
    for table in (pointwise.ACTIVATIONS, pointwise.SLOPES, *of_numba):
        assert sorted(table) == sorted(activations.ACTIVATIONS.values())


def test_c_lists_every_activation():
    """C makes its switches from this list, and does not compile if a function of a row is missing."""
    header = in_c("fastdrop.h")
    codes = dict(re.findall(r"(FD_\w+) = (\d+)", header))
    rows = {name: int(codes[code]) for code, name in re.findall(r"ROW\((FD_\w+), (\w+)\)", header)}
    assert {None: int(codes["FD_NO_ACTIVATION"]), **rows} == activations.ACTIVATIONS


def test_gelu_keeps_its_digits(compiled):
    """Where a difference of near numbers would lose them, as by erf: far below 0."""
    h = np.concatenate([np.linspace(-8, 8, 40_001), np.geomspace(1e-30, 1, 997), -np.geomspace(1e-30, 1, 997)])
    h = h.astype(np.float32)
    y = np.empty_like(h)
    compiled.pointwise_forward(FLOAT32, FLOAT32, h, None, None, None, None, y, None, 1, h.size, 1.0, GELU)
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in h.tolist()])
    assert ulps(y, exact)[h >= -1].max() <= 5
    tail = (h < -1) & (h > -6)
    assert (np.abs(y - exact)[tail] / np.abs(exact)[tail]).max() <= 1e-3
    assert np.abs(y - exact)[h <= -6].max() <= 1e-8


def in_c(name: str) -> str:
    return (ROOT / "csrc" / name).read_text()


def of_python(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(activations).items() if name.isupper() and isinstance(value, kind)}


def test_polynomials_are_the_same_in_c():
    tables = re.findall(r"static const float (\w+)\[\] = \{(.*?)\};", in_c("vector_math.inc.h"), re.DOTALL)
    assert {name: tuple(map(float, re.findall(NUMBER, body))) for name, body in tables} == of_python(tuple)


def test_constants_are_the_same_in_c():
    """Those that have a name in C by that name; others stand where they are used."""
    text = in_c("vector_math.inc.h") + in_c("activations.inc.h")
    named = {name: float(value) for name, value in re.findall(rf"\b([A-Z][A-Z0-9_]+) =? ?({NUMBER})f?\b", text)}
    ours = of_python(float)
    assert named
    assert named == {name: ours.get(name) for name in named}
    assert set(ours.values()) - set(map(float, re.findall(NUMBER, text))) == set()

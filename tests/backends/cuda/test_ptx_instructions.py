"""Tests what the PTX interpreter computes, against Python integers, libm and NumPy.

An instruction is a row of a table: a new one needs a row here and one in `ptx.arithmetic`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from . import ptx
from .ptx_running import (
    BITS,
    TYPES,
    Array,
    N,
    assembled,
    bits_of,
    check_integers,
    evaluate,
    integers,
    same_bits,
    samples,
    wrapped,
)

__all__ = ["assembled"]

# ---- integers ----


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def inserted(a: int, b: int, position: int, length: int, width: int) -> int:
    inside = range(position & 255, min((position & 255) + (length & 255), width))
    mask = sum(1 << i for i in inside)
    return (b & ~mask) | (a << (position & 255) & mask)


SHIFTS = np.resize(np.array([0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 2**31, 2**32 - 1], np.uint32), N)
# Opcode: types, operands, what Python makes of them and of the type's width.
INTEGERS: dict[str, tuple[Sequence[str], int, Callable[..., int]]] = {
    "add": (TYPES, 2, lambda a, b, width: a + b),
    "sub": (TYPES, 2, lambda a, b, width: a - b),
    "mul.lo": (TYPES, 2, lambda a, b, width: a * b),
    "mul.hi": (TYPES, 2, lambda a, b, width: a * b >> width),
    "mad.lo": (TYPES, 3, lambda a, b, c, width: a * b + c),
    "div": (TYPES, 2, lambda a, b, width: quotient(a, b)),
    "rem": (TYPES, 2, lambda a, b, width: a - b * quotient(a, b)),
    "min": (TYPES, 2, lambda a, b, width: min(a, b)),
    "max": (TYPES, 2, lambda a, b, width: max(a, b)),
    "neg": (TYPES[1::2], 1, lambda a, width: -a),
    "and": (BITS, 2, lambda a, b, width: a & b),
    "or": (BITS, 2, lambda a, b, width: a | b),
    "xor": (BITS, 2, lambda a, b, width: a ^ b),
    "not": (BITS, 1, lambda a, width: ~a),
    "popc": (BITS[1:], 1, lambda a, width: a.bit_count()),
    "mul.wide": (TYPES[:4], 2, lambda a, b, width: a * b),
    "shl": (BITS, 2, lambda a, b, width: a << min(b, 64)),
    "shr": ([*BITS, *TYPES], 2, lambda a, b, width: a >> b),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    types, count, reference = INTEGERS[name]
    for type in types:
        operands = [(type, samples(type, seed)) for seed in range(count)]
        if name in ("div", "rem"):
            operands[1] = type, np.where(operands[1][1] == 0, operands[1][1].dtype.type(3), operands[1][1])
        if name in ("shl", "shr"):
            operands[1] = "u32", SHIFTS
        result = {"popc": "u32", "mul.wide": f"{type[0]}{2 * bits_of(type)}"}.get(name, type)
        names = ", ".join(f"${letter}" for letter in "dabc"[: 1 + count])
        instruction = f"{name}.{type} {names};"
        check_integers(instruction, partial(reference, width=bits_of(type)), result, *operands)


def test_bfi() -> None:
    for type in ("b32", "b64"):
        a, b = samples(type), samples(type, 1)
        for position, length in ((0, 0), (0, 1), (5, 8), (31, 32), (63, 1), (64, 8), (260, 31), (0, 255)):
            expected = [
                inserted(x, y, position, length, bits_of(type)) for x, y in zip(integers(a), integers(b), strict=True)
            ]
            constants = f".reg .b32 %p, %l; mov.u32 %p, {position}; mov.u32 %l, {length};"
            result = evaluate(f"{constants} bfi.{type} $d, $a, $b, %p, %l;", type, (type, a), (type, b))
            np.testing.assert_array_equal(result, wrapped(expected, type))


def test_logic_of_predicates_and_selp() -> None:
    a, b, c = (samples("pred", seed) for seed in range(3))
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        result = evaluate(f"{name}.pred $d, $a, $b;", "pred", ("pred", a), ("pred", b))
        np.testing.assert_array_equal(result, function(a, b))
    np.testing.assert_array_equal(evaluate("not.pred $d, $a;", "pred", ("pred", a)), ~a)
    for type in (*BITS, "u64", "f32", "f64"):
        x, y = samples(type), samples(type, 1)
        result = evaluate(f"selp.{type} $d, $a, $b, $c;", type, (type, x), (type, y), ("pred", c))
        assert result.tobytes() == np.where(c, x, y).tobytes()


ORDERED = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
ORDERED |= {"gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("type", [*BITS, *TYPES, "f32", "f64"])
def test_setp(type: str) -> None:
    a, b, c = samples(type), samples(type, 1), samples("pred")
    b[::3] = a[::3]
    operands, nan = ((type, a), (type, b)), (a != a) | (b != b)
    expected = {name: compare(a, b) & ~nan for name, compare in ORDERED.items()}
    if type[0] == "b":
        expected = {name: expected[name] for name in ("eq", "ne")}
    if type[0] == "f":
        expected |= {f"{name}u": holds | nan for name, holds in expected.items()} | {"num": ~nan, "nan": nan}
    for name, holds in expected.items():
        np.testing.assert_array_equal(evaluate(f"setp.{name}.{type} $d, $a, $b;", "pred", *operands), holds, name)
    joined = f".reg .pred %q; setp.eq.and.{type} %q|$d, $a, $b, !$c;"
    np.testing.assert_array_equal(evaluate(joined, "pred", *operands, ("pred", c)), ~expected["eq"] & ~c)


# ---- floats ----


def canonical(values: Array) -> Array:
    """float32 with the NaN that GPUs return."""
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF).view(np.float32), values)


def same_floats(a: Array, b: Array) -> None:
    """NaN for NaN in float64, bit for bit otherwise."""
    if a.dtype == np.float32:
        same_bits(a, canonical(b))
    else:
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(np.signbit(a)[~np.isnan(a)], np.signbit(b)[~np.isnan(b)])


FLOATS: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
FLOATS |= {f"{name}.rn": function for name, function in FLOATS.items()} | {"div.rn": np.divide}
FLOATS |= {"rcp.rn": np.reciprocal, "sqrt.rn": np.sqrt, "neg": np.negative, "abs": np.abs}
FLOATS |= {"copysign": lambda a, b: np.copysign(b, a)}


@pytest.mark.parametrize("name", FLOATS)
def test_floats(name: str) -> None:
    for type in ("f32", "f64"):
        count = 1 if name in ("rcp.rn", "sqrt.rn", "neg", "abs") else 2
        operands = [samples(type, seed, n=20_000) for seed in range(count)]
        names = ", ".join(f"${letter}" for letter in "dab"[: 1 + count])
        result = evaluate(f"{name}.{type} {names};", type, *[(type, operand) for operand in operands])
        with np.errstate(all="ignore"):
            expected = FLOATS[name](*operands)
        same_bits(result, expected) if name == "copysign" else same_floats(result, expected)


def test_approximate_functions() -> None:
    a = np.linspace(-120, 120, N)
    close = {"rtol": 2.0**-20}
    result = evaluate("rcp.approx.ftz.f64 $d, $a;", "f64", ("f64", a))
    np.testing.assert_allclose(result, 1 / a, **close)
    assert not (result.view(np.uint64) & 0xFFFFFFFF).any()
    powers = evaluate("ex2.approx.ftz.f32 $d, $a;", "f32", ("f32", a.astype(np.float32)))
    np.testing.assert_allclose(powers, 2 ** a.astype(np.float32), **close)


def libm(name: str) -> Callable[[float, float, float], float]:
    path = ctypes.util.find_library("m")
    if path is None:
        pytest.skip("there is no libm to compare with")
    function = getattr(ctypes.CDLL(path), name)
    kind = ctypes.c_float if name == "fmaf" else ctypes.c_double
    function.restype, function.argtypes = kind, [kind] * 3
    return function  # type: ignore[no-any-return]


@pytest.mark.parametrize(("type", "name"), [("f32", "fmaf"), ("f64", "fma")])
def test_fma_rounds_once(type: str, name: str) -> None:
    a, b, c = (samples(type, seed, n=5_000) for seed in range(3))
    dtype = ptx.DTYPES[type]
    digits = 24 if type == "f32" else 53
    # Products halfway between two results, then a little more or less than that; cancellation; subnormals.
    half = dtype.type(1 + 2.0 ** -(digits // 2))
    tiny = [sign * x for x in (2.0**-60, 2.0**-120, 2.0**-52 - 2.0**-76) for sign in (1, -1)]
    rng = np.random.default_rng(3)
    with np.errstate(all="ignore"):
        near = rng.standard_normal((2, 2000)).astype(dtype)
        cancelling = -(near[0] * near[1])
        small = (rng.standard_normal((3, 2000)) * np.array([1, *[float(np.finfo(dtype).tiny)] * 2])[:, None]).astype(
            dtype
        )
    a = np.concatenate([a, np.full(len(tiny), half), near[0], small[0]])
    b = np.concatenate([b, np.full(len(tiny), half), near[1], small[1]])
    c = np.concatenate([c, np.array(tiny, dtype), cancelling, small[2]])
    fma = libm(name)
    with np.errstate(all="ignore"):
        expected = np.array([fma(*row) for row in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], dtype)
    result = evaluate(f"fma.rn.{type} $d, $a, $b, $c;", type, (type, a), (type, b), (type, c))
    same_floats(result, expected)


# ---- conversions ----


def test_cvt_between_integers() -> None:
    for source in ("u8", "s8", *TYPES):
        a = samples(source)
        for result in {"u8", "s8", *TYPES} - {source}:
            held = result if bits_of(result) > 8 else f"{result[0]}16"  # 8 bits are extended to a register of 16
            got = evaluate(f"cvt.{result}.{source} $d, $a;", held, (source, a))
            np.testing.assert_array_equal(got, a.astype(ptx.DTYPES[result]), f"{result} of {source}")
    wide = ("b32", samples("b32"))
    np.testing.assert_array_equal(evaluate("cvt.s64.s8 $d, $a;", "s64", wide), wide[1].astype(np.int8))


def test_cvt_to_floats() -> None:
    for source in TYPES:
        a = samples(source)
        for result in ("f32", "f64"):
            got = evaluate(f"cvt.rn.{result}.{source} $d, $a;", result, (source, a))
            same_bits(got, np.array(integers(a), ptx.DTYPES[source]).astype(ptx.DTYPES[result]))
    a, b = samples("f64"), samples("f32")
    with np.errstate(all="ignore"):
        same_bits(evaluate("cvt.rn.f32.f64 $d, $a;", "f32", ("f64", a)), canonical(a.astype(np.float32)))
        same_floats(evaluate("cvt.f64.f32 $d, $a;", "f64", ("f32", b)), b.astype(np.float64))
    quarters = np.arange(-20, 20, dtype=np.float32) / 4
    same_bits(evaluate("cvt.rni.f32.f32 $d, $a;", "f32", ("f32", quarters)), np.rint(quarters))
    halves = np.arange(2**16, dtype=np.uint16)
    wide = evaluate("cvt.f32.f16 $d, $a;", "f32", ("b16", halves))
    same_bits(wide, canonical(halves.view(np.float16).astype(np.float32)))


def nearest_even(x: Array, values: Array) -> Array:
    """Indices of the nearest among ascending finite ``values``, by exact arithmetic; ties to the even index."""
    x = x.astype(np.float64)
    above = np.searchsorted(values, x).clip(1, len(values) - 1)
    to_low, to_high = x - values[above - 1], values[above] - x  # exact: floats of few bits, close together
    return np.where((to_high < to_low) | ((to_high == to_low) & (above % 2 == 0)), above, above - 1)


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_cvt_to_16_bit_floats(type: str) -> None:
    halves = np.arange(0x7C00 if type == "f16" else 0x7F80, dtype=np.uint16)
    values = (halves.view(np.float16) if type == "f16" else (halves.astype(np.uint32) << 16).view(np.float32)).astype(
        float
    )
    infinity = len(values)
    values = np.append(values, 2 * values[-1] - values[-2])  # where the next one would be: half way is infinite
    a = np.concatenate([samples("f32", n=20_000), ((values[1:] + values[:-1]) / 2).astype(np.float32)])
    magnitude = np.minimum(np.nan_to_num(np.abs(a), nan=0, posinf=np.inf).astype(float), values[-1])
    expected = nearest_even(magnitude, values).astype(np.uint16)
    assert expected.max() == infinity
    expected = np.where(np.isnan(a), 0x7FFF, expected | np.where(np.signbit(a), 0x8000, 0)).astype(np.uint16)
    np.testing.assert_array_equal(evaluate(f"cvt.rn.{type}.f32 $d, $a;", "b16", ("f32", a)), expected)
    pairs = evaluate(f"cvt.rn.{type}x2.f32 $d, $a, $b;", "b32", ("f32", a), ("f32", a[::-1]))
    np.testing.assert_array_equal(pairs >> 16, expected)
    np.testing.assert_array_equal(pairs & 0xFFFF, expected[::-1])

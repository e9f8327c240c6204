"""Tests what the PTX interpreter computes, against Python integers, libm and NumPy.

The tests of the kernels would miss it if an instruction were wrong for operands that kernels seldom have: shifts beyond
a word, NaN, ties. An instruction is a row of a table: a new one needs a row here and one in `ptx.arithmetic`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from . import ptx
from .ptx_running import Array, N, bits_of, evaluate, same_bits, samples


def integers(values: Array) -> list[int]:
    return [int(value) for value in values]


def inserted(a: int, b: int, position: int, length: int) -> int:
    """The low bits of a, so many, put into b."""
    mask = sum(1 << i for i in range(position, min(position + length, 64)))
    return (b & ~mask) | (a << position & mask)


# Opcode: types, what Python makes of the operands.
INTEGERS: dict[str, tuple[str, Callable[..., int]]] = {
    "add": ("s32 s64", lambda a, b: a + b),
    "sub": ("s32 s64", lambda a, b: a - b),
    "mul.lo": ("s32 s64", lambda a, b: a * b),
    "mul.hi": ("u64", lambda a, b: a * b >> 64),
    "mul.wide": ("s32 u32", lambda a, b: a * b),
    "div": ("u32 u64", lambda a, b: a // b),
    "rem": ("u32 u64", lambda a, b: a % b),
    "min": ("u64", min),
    "max": ("u64", max),
    "neg": ("s32 s64", lambda a: -a),
    "and": ("b32 b64", lambda a, b: a & b),
    "or": ("b32 b64", lambda a, b: a | b),
    "xor": ("b32 b64", lambda a, b: a ^ b),
    "not": ("b32 b64", lambda a: ~a),
    "popc": ("b32", lambda a: a.bit_count()),
    "shl": ("b32 b64", lambda a, b: a << min(b, 64)),
    "shr": ("s32 u32 u64", lambda a, b: a >> b),
    **{f"bfi {at} {n}": ("b64", lambda a, b, at=at, n=n: inserted(a, b, at, n)) for at, n in ((5, 8), (0, 0), (60, 9))},
}
SHIFTS = np.resize(np.array([0, 1, 16, 31, 32, 33, 63, 64, 65, 2**32 - 1], np.uint32), N)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    types, function = INTEGERS[name]
    opcode, *constants = name.split()
    for type in types.split():
        operands = [(type, samples(type, seed)) for seed in range(1 if opcode in ("neg", "not", "popc") else 2)]
        if opcode in ("div", "rem"):
            operands[1] = type, np.maximum(operands[1][1], 1)
        if opcode in ("shl", "shr"):
            operands[1] = "u32", SHIFTS
        result = {"popc": "u32", "mul.wide": f"{type[0]}64"}.get(opcode, type)
        names = ", ".join([f"${letter}" for letter in "dab"[: 1 + len(operands)]] + constants)
        expected = [function(*row) for row in zip(*(integers(values) for _, values in operands), strict=True)]
        width = bits_of(result)
        wrapped = np.array([x % 2**width for x in expected], f"u{width // 8}").view(ptx.DTYPES[result])
        np.testing.assert_array_equal(evaluate(f"{opcode}.{type} {names};", result, *operands), wrapped)


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARISONS |= {"gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("type", ["b32", "s64", "u32", "u64", "f32", "f64"])
def test_setp(type: str) -> None:
    a, b = samples(type), samples(type, 1)
    b[::3] = a[::3]
    nan = (a != a) | (b != b)
    expected = {name: compare(a, b) for name, compare in COMPARISONS.items() if (type, name) != ("f32", "ne")}
    if type[0] == "f":
        expected = {name: holds & ~nan for name, holds in expected.items() if name != "ne"}
        expected |= {f"{name}u": expected[name] | nan for name in ("lt", "gt", "ge")} | {"nan": nan}
    for name, holds in expected.items():
        result = evaluate(f"setp.{name}.{type} $d, $a, $b;", "pred", (type, a), (type, b))
        np.testing.assert_array_equal(result, holds, name)


# ---- floats ----


def same_floats(a: Array, b: Array) -> None:
    """Bit for bit; NaN is the GPU's in float32, any in float64."""
    same = np.isnan(b) & (np.isnan(a) if a.dtype == np.float64 else a.view(np.uint32) == 0x7FFFFFFF)
    same_bits(np.where(same, 0, a), np.where(same, 0, b))


FLOATS: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div.rn": np.divide}
FLOATS |= {"add.rn": np.add, "mul.rn": np.multiply}
FLOATS |= {"rcp.rn": np.reciprocal, "sqrt.rn": np.sqrt, "neg": np.negative, "abs": np.abs}


@pytest.mark.parametrize("name", FLOATS)
def test_floats(name: str) -> None:
    for type in ("f32", "f64")[: 1 if name == "abs" else 2]:
        operands = [samples(type, seed) for seed in range(FLOATS[name].nin)]
        names = ", ".join(f"${letter}" for letter in "dab"[: 1 + len(operands)])
        result = evaluate(f"{name}.{type} {names};", type, *[(type, operand) for operand in operands])
        with np.errstate(all="ignore"):
            same_floats(result, FLOATS[name](*operands))
    for type in ("f32", "f64"):
        x, sign = samples(type), samples(type, 1)
        same_bits(evaluate(f"copysign.{type} $d, $a, $b;", type, (type, sign), (type, x)), np.copysign(x, sign))


def test_fma_rounds_once() -> None:
    """Products halfway between two results, then a little more or less; cancellation; subnormals. float64 is libm's."""
    rng, half = np.random.default_rng(3), np.float32(1 + 2.0**-12)
    a, b, c = (samples("f32", seed) for seed in range(3))
    a[:6] = b[:6] = half
    c[:6] = [sign * x for x in (2.0**-60, 2.0**-120, 2.0**-52 - 2.0**-76) for sign in (1, -1)]
    a[6:400], b[6:400] = rng.standard_normal((2, 394))
    with np.errstate(all="ignore"):
        c[6:200] = -(a[6:200] * b[6:200])
    b[200:400], c[200:400] = np.finfo(np.float32).tiny * rng.standard_normal((2, 200))
    fma = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fma.restype, fma.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    expected = np.array([fma(*row) for row in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], np.float32)
    same_floats(evaluate("fma.rn.f32 $d, $a, $b, $c;", "f32", ("f32", a), ("f32", b), ("f32", c)), expected)
    wide = [1 + 2.0**-30, 1 + 2.0**-30, -1 - 2.0**-29]
    result = evaluate("fma.rn.f64 $d, $a, $b, $c;", "f64", *(("f64", np.full(4, x)) for x in wide))
    np.testing.assert_array_equal(result, 2.0**-60)


# ---- conversions ----


def test_cvt() -> None:
    for source in ("u16", "s32", "u32", "u64"):
        a = samples(source)
        for result in {"u16", "u32", "u64"} - {source}:
            got = evaluate(f"cvt.{result}.{source} $d, $a;", result, (source, a))
            np.testing.assert_array_equal(got, a.astype(ptx.DTYPES[result]), f"{result} of {source}")
        for result in ("f32", "f64"):
            got = evaluate(f"cvt.rn.{result}.{source} $d, $a;", result, (source, a))
            same_bits(got, a.astype(ptx.DTYPES[result]))
    a, b, halves = samples("f64"), samples("f32"), np.arange(2**16, dtype=np.uint16)
    quarters = np.arange(-20, 20, dtype=np.float32) / 4
    with np.errstate(all="ignore"):
        same_floats(evaluate("cvt.rn.f32.f64 $d, $a;", "f32", ("f64", a)), a.astype(np.float32))
        same_floats(evaluate("cvt.f64.f32 $d, $a;", "f64", ("f32", b)), b.astype(np.float64))
        same_bits(evaluate("cvt.rni.f32.f32 $d, $a;", "f32", ("f32", quarters)), np.rint(quarters))
        wide = evaluate("cvt.f32.f16 $d, $a;", "f32", ("b16", halves))
        same_floats(wide, halves.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_cvt_to_16_bit_floats(type: str) -> None:
    """To the nearest of all numbers of the type, by exact arithmetic; ties to the even one."""
    halves = np.arange(0x7C00 if type == "f16" else 0x7F80, dtype=np.uint16)
    values = halves.view(np.float16) if type == "f16" else (halves.astype(np.uint32) << 16).view(np.float32)
    values = values.astype(float)
    values = np.append(values, 2 * values[-1] - values[-2])  # where the next one would be: half way is infinite
    a = np.concatenate([samples("f32"), ((values[1:] + values[:-1]) / 2).astype(np.float32)])
    x = np.minimum(np.nan_to_num(np.abs(a), nan=0, posinf=np.inf).astype(float), values[-1])
    above = np.searchsorted(values, x).clip(1, len(values) - 1)
    to_low, to_high = x - values[above - 1], values[above] - x  # exact: floats of few bits, close together
    nearest = np.where((to_high < to_low) | ((to_high == to_low) & (above % 2 == 0)), above, above - 1)
    expected = np.where(np.isnan(a), 0x7FFF, nearest | np.where(np.signbit(a), 0x8000, 0)).astype(np.uint16)
    np.testing.assert_array_equal(evaluate(f"cvt.rn.{type}.f32 $d, $a;", "b16", ("f32", a)), expected)
    pairs = evaluate(f"cvt.rn.{type}x2.f32 $d, $a, $b;", "b32", ("f32", a), ("f32", a[::-1]))
    np.testing.assert_array_equal(pairs >> 16, expected)
    np.testing.assert_array_equal(pairs & 0xFFFF, expected[::-1])

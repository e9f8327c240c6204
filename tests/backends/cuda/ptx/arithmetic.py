"""What PTX instructions compute, in NumPy: tables of opcodes for `program`.

Arithmetic is bit exact. NaNs, where PTX leaves them open, are those of ptxas's code for sm_90: 0x7fffffff from float32
arithmetic, ``neg`` and ``abs`` included. float64 has the host's. ptxas may contract ``mul`` and ``add`` that lack
``.rn``; here they never are. Only instructions that the kernels have are here: if a new compiler writes another one,
add a row here and a row in the tests.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

DTYPES = {f"{kind}{bits}": np.dtype(f"{code}{bits // 8}") for kind, code in ("bu", "uu", "si") for bits in (16, 32, 64)}
DTYPES |= {"pred": np.dtype(bool), "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
UNSIGNED = {size: np.dtype(f"u{size}") for size in (2, 4, 8)}


def _multiply_wide(a: Any, b: Any) -> Any:
    dtype = np.dtype(f"{a.dtype.kind}8")
    return a.astype(dtype) * b.astype(dtype)


def _multiply_high(a: Any, b: Any) -> Any:
    a0, a1, b0, b1 = a & 0xFFFFFFFF, a >> 32, b & 0xFFFFFFFF, b >> 32
    middle = a1 * b0 + (a0 * b0 >> 32)
    return a1 * b1 + (middle >> 32) + ((a0 * b1 + (middle & 0xFFFFFFFF)) >> 32)


def _width(x: Any) -> int:
    return 8 * int(x.dtype.itemsize)


def _shift_left(a: Any, count: Any) -> Any:
    return np.where(count < _width(a), a << np.minimum(count, _width(a) - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Any, count: Any) -> Any:
    shifted = a >> np.minimum(count, _width(a) - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < _width(a), shifted, a.dtype.type(0))


def _insert_field(a: Any, b: Any, position: Any, length: Any) -> Any:
    mask = _shift_left(~_shift_left(np.uint64(2**64 - 1), length & 0xFF), position & 0xFF)
    return (b & ~mask) | (_shift_left(a, position & 0xFF) & mask)


def _count_ones(x: Any) -> Any:
    return np.bitwise_count(x).astype(np.uint32)


NAN = np.uint32(0x7FFFFFFF).view(np.float32)


def rounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Float arithmetic, with float32's NaN."""

    def canonical(*operands: Any) -> Any:
        x = function(*operands)
        nan = np.isnan(x) if x.dtype == np.float32 else np.bool_(False)
        return np.where(nan, NAN, x) if nan.any() else x

    return canonical


_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_fma_64 = np.vectorize(_libm.fma, otypes=[np.float64])


def _fma(a: Any, b: Any, c: Any) -> Any:
    if a.dtype == np.float64:
        return _fma_64(a, b, c)
    # The product is exact in float64. The sum is rounded to odd there, by its exact error: rounding that to float32 is
    # rounding once.
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    inexact = np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    odd = bits + np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, odd, bits).view(np.float64).astype(np.float32)


def _approximate_reciprocal(x: Any) -> Any:
    """The upper half of a float64: what follows refines it."""
    return (np.reciprocal(x).view(np.uint64) & np.uint64(0xFFFFFFFF << 32)).view(np.float64)


def _inverse(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: ~function(a, b)


Table = dict[str, Callable[..., Any]]
ORDERINGS: Table = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
UNORDERED: Table = {"ltu": _inverse(np.greater_equal), "gtu": _inverse(np.less_equal), "geu": _inverse(np.less)}
INTEGER_COMPARISONS: Table = ORDERINGS | {"eq": np.equal, "ne": np.not_equal}
FLOAT_COMPARISONS: Table = ORDERINGS | UNORDERED | {"eq": np.equal, "nan": lambda a, b: (a != a) | (b != b)}

INTEGER, FLOAT, LOGIC = r"(?P<t>[us](?:32|64))", r"(?P<t>f32|f64)", r"(?P<t>b(?:32|64)|pred)"

# Opcodes that compute: pattern, types of result and operands ("t" as matched, "w" twice as wide), function.
Row = tuple[str, str, Callable[..., Any]]
INTEGERS: list[Row] = [
    (rf"add\.{INTEGER}", "t t t", np.add),
    (rf"sub\.{INTEGER}", "t t t", np.subtract),
    (rf"mul\.lo\.{INTEGER}", "t t t", np.multiply),
    (r"mul\.hi\.(?P<t>u64)", "t t t", _multiply_high),
    (r"mul\.wide\.(?P<t>[us]32)", "w t t", _multiply_wide),
    (r"div\.(?P<t>u32|u64)", "t t t", np.floor_divide),
    (r"rem\.(?P<t>u32|u64)", "t t t", np.remainder),
    (r"min\.(?P<t>u64)", "t t t", np.minimum),
    (r"max\.(?P<t>u64)", "t t t", np.maximum),
    (r"neg\.(?P<t>s32|s64)", "t t", np.negative),
    (rf"and\.{LOGIC}", "t t t", np.bitwise_and),
    (rf"or\.{LOGIC}", "t t t", np.bitwise_or),
    (rf"xor\.{LOGIC}", "t t t", np.bitwise_xor),
    (rf"not\.{LOGIC}", "t t", np.invert),
    (r"shl\.(?P<t>b32|b64)", "t t u32", _shift_left),
    (r"shr\.(?P<t>[us](?:32|64))", "t t u32", _shift_right),
    (r"bfi\.(?P<t>b64)", "t t t u32 u32", _insert_field),
    (r"popc\.(?P<t>b32)", "u32 t", _count_ones),
    (r"selp\.(?P<t>b16|[bu]32|[bu]64|f32|f64)", "t t t pred", lambda a, b, p: np.where(p, a, b)),
    (r"mov\.(?P<t>[bu](?:16|32|64)|f32|f64)", "t t", lambda a: a),
    (rf"copysign\.{FLOAT}", "t t t", lambda a, b: np.copysign(b, a)),
]
FLOATS: list[Row] = [
    (rf"add(?:\.rn)?\.{FLOAT}", "t t t", np.add),
    (rf"sub\.{FLOAT}", "t t t", np.subtract),
    (rf"mul(?:\.rn)?\.{FLOAT}", "t t t", np.multiply),
    (rf"fma\.rn\.{FLOAT}", "t t t t", _fma),
    (rf"div\.rn\.{FLOAT}", "t t t", np.divide),
    (rf"rcp\.rn\.{FLOAT}", "t t", np.reciprocal),
    (rf"sqrt\.rn\.{FLOAT}", "t t", np.sqrt),
    (rf"neg\.{FLOAT}", "t t", np.negative),
    (r"abs\.(?P<t>f32)", "t t", np.abs),
    (r"rcp\.approx\.ftz\.(?P<t>f64)", "t t", _approximate_reciprocal),
    (r"ex2\.approx\.ftz\.(?P<t>f32)", "t t", np.exp2),
]

# Conversions of floats to floats, (result, operand), by rounding.
RESIZING = {
    "": [("f32", "f16"), ("f64", "f32")],
    "rn": [("f16", "f32"), ("bf16", "f32"), ("f32", "f64")],
    "rni": [("f32", "f32")],
}


def _cast(x: Any, dtype: np.dtype[Any]) -> Any:
    return x.astype(dtype)


def _to_float(x: Any, type: str) -> Any:
    """Rounded to nearest even; 16-bit floats as uint16."""
    if type in ("f32", "f64"):
        return x.astype(DTYPES[type])
    bits = x.view(UNSIGNED[x.itemsize])
    halves = x.astype(np.float16).view(np.uint16) if type == "f16" else bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), 0x7FFF, halves).astype(np.uint16)


def pair(high: Any, low: Any, type: str) -> Any:
    return _to_float(high, type).astype(np.uint32) << 16 | _to_float(low, type)


def conversion(result: str, operand: str, rounding: str) -> Callable[..., Any]:
    """cvt; KeyError for forms that aren't known."""
    if operand[0] in "us":
        if rounding == ("" if result[0] in "us" else "rn") and result not in ("f16", "bf16"):
            return rounded(partial(_cast, dtype=DTYPES[result]))
    elif (result, operand) in RESIZING.get(rounding, ()):
        return rounded(np.rint if rounding == "rni" else partial(_to_float, type=result))
    raise KeyError(result)

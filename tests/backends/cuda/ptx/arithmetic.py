"""What PTX instructions compute, in NumPy: tables of opcodes for `program`.

Arithmetic is bit exact. NaNs, where PTX leaves them open, are those of ptxas's code for sm_90: 0x7fffffff from float32
arithmetic, ``neg`` and ``abs`` included. float64 has the host's. ptxas may contract ``mul`` and ``add`` that lack
``.rn``; here they never are. Only instructions that the kernels have are here: if a new compiler writes another one,
add a row here and a row in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

DTYPES = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}") for kind, code in ("bu", "uu", "si") for bits in (8, 16, 32, 64)
}
DTYPES |= {"pred": np.dtype(bool), "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
DTYPES |= {"bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4")}
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def _widened(function: Callable[..., Any], *operands: Any) -> Any:
    """``function`` of integers in twice their width."""
    dtype = np.dtype(f"{operands[0].dtype.kind}{operands[0].dtype.itemsize * 2}")
    return function(*(operand.astype(dtype) for operand in operands))


def _multiply_high(a: Any, b: Any) -> Any:
    size = a.dtype.itemsize
    if size < 8:
        return (_widened(np.multiply, a, b) >> (8 * size)).astype(a.dtype)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    x0, x1, y0, y1 = x & 0xFFFFFFFF, x >> 32, y & 0xFFFFFFFF, y >> 32
    middle = x1 * y0 + (x0 * y0 >> 32)
    high = x1 * y1 + (middle >> 32) + ((x0 * y1 + (middle & 0xFFFFFFFF)) >> 32)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, 0) - np.where(b < 0, x, 0)
    return high.astype(a.dtype)


def divide(a: Any, b: Any) -> Any:
    return (a - np.fmod(a, b)) // b  # towards zero


def _width(x: Any) -> int:
    return 8 * int(x.dtype.itemsize)


def _shift_left(a: Any, count: Any) -> Any:
    return np.where(count < _width(a), a << np.minimum(count, _width(a) - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Any, count: Any) -> Any:
    shifted = a >> np.minimum(count, _width(a) - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < _width(a), shifted, a.dtype.type(0))


def _ones(count: Any, like: Any) -> Any:
    unsigned = UNSIGNED[like.dtype.itemsize].type
    return ~_shift_left(unsigned(2**64 - 1 >> 64 - _width(like)), count)


def _insert_field(a: Any, b: Any, position: Any, length: Any) -> Any:
    mask = _shift_left(_ones(length & 0xFF, a), position & 0xFF)
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


@np.vectorize
def _fma_64(a: float, b: float, c: float) -> float:
    rough = a * b + c
    if not (np.isfinite(a) and np.isfinite(b)):
        return rough
    if not np.isfinite(c):
        return c
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return rough
    try:
        magnitude = float(abs(exact))
    except OverflowError:
        magnitude = float("inf")
    return magnitude if exact > 0 else -magnitude


def _approximate_reciprocal(x: Any) -> Any:
    """The upper half of a float64: what follows refines it."""
    return (np.reciprocal(x).view(np.uint64) & np.uint64(0xFFFFFFFF << 32)).view(np.float64)


def _not_equal(a: Any, b: Any) -> Any:
    return (a < b) | (a > b)


def _numbers(a: Any, b: Any) -> Any:
    return (a == a) & (b == b)


def _inverse(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: ~function(a, b)


ORDERINGS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARISONS: dict[str, dict[str, Callable[..., Any]]] = {
    "b": {"eq": np.equal, "ne": np.not_equal},
    "s": ORDERINGS | {"ne": np.not_equal},
}
COMPARISONS["u"] = COMPARISONS["s"] | {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
COMPARISONS["f"] = ORDERINGS | {"ne": _not_equal, "num": _numbers, "nan": _inverse(_numbers)}
COMPARISONS["f"] |= {"equ": _inverse(_not_equal), "neu": np.not_equal}
COMPARISONS["f"] |= {
    f"{name}u": _inverse(ORDERINGS[opposite])
    for name, opposite in zip(("lt", "le", "gt", "ge"), ("ge", "gt", "le", "lt"), strict=True)
}
JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}

INTEGER, FLOAT, BITS = r"(?P<t>[us](?:16|32|64))", r"(?P<t>f32|f64)", r"(?P<t>b(?:16|32|64))"
LOGIC, NARROW = r"(?P<t>b(?:16|32|64)|pred)", r"(?P<t>[us](?:16|32))"

# Opcodes that compute: pattern, types of result and operands ("t" as matched, "w" twice as wide), function.
Row = tuple[str, str, Callable[..., Any]]
INTEGERS: list[Row] = [
    (rf"add\.{INTEGER}", "t t t", np.add),
    (rf"sub\.{INTEGER}", "t t t", np.subtract),
    (rf"mul\.lo\.{INTEGER}", "t t t", np.multiply),
    (rf"mul\.hi\.{INTEGER}", "t t t", _multiply_high),
    (rf"mul\.wide\.{NARROW}", "w t t", partial(_widened, np.multiply)),
    (rf"mad\.lo\.{INTEGER}", "t t t t", lambda a, b, c: a * b + c),
    (rf"mad\.wide\.{NARROW}", "w t t w", lambda a, b, c: _widened(np.multiply, a, b) + c),
    (rf"div\.{INTEGER}", "t t t", divide),
    (rf"rem\.{INTEGER}", "t t t", np.fmod),
    (rf"min\.{INTEGER}", "t t t", np.minimum),
    (rf"max\.{INTEGER}", "t t t", np.maximum),
    (r"neg\.(?P<t>s\d+)", "t t", np.negative),
    (rf"and\.{LOGIC}", "t t t", np.bitwise_and),
    (rf"or\.{LOGIC}", "t t t", np.bitwise_or),
    (rf"xor\.{LOGIC}", "t t t", np.bitwise_xor),
    (rf"not\.{LOGIC}", "t t", np.invert),
    (rf"shl\.{BITS}", "t t u32", _shift_left),
    (r"shr\.(?P<t>[bus](?:16|32|64))", "t t u32", _shift_right),
    (r"bfi\.(?P<t>b(?:32|64))", "t t t u32 u32", _insert_field),
    (r"popc\.(?P<t>b(?:32|64))", "u32 t", _count_ones),
    (r"selp\.(?P<t>[bus](?:16|32|64)|f32|f64)", "t t t pred", lambda a, b, p: np.where(p, a, b)),
    (r"mov\.(?P<t>[bus](?:16|32|64)|f32|f64|pred)", "t t", lambda a: a),
    (r"cvta(?:\.to)?\.global\.u64", "u64 u64", lambda a: a),
    (rf"copysign\.{FLOAT}", "t t t", lambda a, b: np.copysign(b, a)),
]
FLOATS: list[Row] = [
    (rf"add(?:\.rn)?\.{FLOAT}", "t t t", np.add),
    (rf"sub(?:\.rn)?\.{FLOAT}", "t t t", np.subtract),
    (rf"mul(?:\.rn)?\.{FLOAT}", "t t t", np.multiply),
    (rf"fma\.rn\.{FLOAT}", "t t t t", _fma),
    (rf"div\.rn\.{FLOAT}", "t t t", np.divide),
    (rf"rcp\.rn\.{FLOAT}", "t t", np.reciprocal),
    (rf"sqrt\.rn\.{FLOAT}", "t t", np.sqrt),
    (rf"neg\.{FLOAT}", "t t", np.negative),
    (rf"abs\.{FLOAT}", "t t", np.abs),
    (r"rcp\.approx\.ftz\.(?P<t>f64)", "t t", _approximate_reciprocal),
    (r"ex2\.approx\.ftz\.(?P<t>f32)", "t t", np.exp2),
]

# Conversions of floats to floats, (result, operand), by rounding.
RESIZING = {
    "": [("f32", "f16"), ("f64", "f16"), ("f64", "f32")],
    "rn": [("f16", "f32"), ("f16", "f64"), ("bf16", "f32"), ("f32", "f64")],
    "rni": [("f32", "f32"), ("f64", "f64")],
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

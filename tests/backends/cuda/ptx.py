"""A PTX interpreter in NumPy: runs what Numba compiles for a GPU, over host memory and without one.

A register is an array with an element per thread; all threads of many blocks advance together. Where they diverge,
those at the lowest program counter run, which brings structured code together again. Threads that reach a warp
instruction wait there for the lanes that its membermask names.

A program that PTX leaves undefined is stopped rather than given some result: memory outside of what was allowed,
misaligned addresses, data races, lanes that never come to a warp instruction or are read though they aren't there,
threads that never come to their block's barrier, division by zero. Races: no two threads may touch a byte that either
writes within a launch, whatever orders them, unless both add atomically; in shared memory, between two barriers.

Arithmetic is bit exact. NaNs, where PTX leaves them open, are those of ptxas's code for sm_90: 0x7fffffff from float32
arithmetic, ``neg`` and ``abs`` included, while bfloat16 widens by a shift. float64 has the host's. ptxas may contract
``mul`` and ``add`` that lack ``.rn``; here they never are.

Not there: local and constant memory, generic addresses, atomics but 64-bit addition, barriers but ``bar.sync 0``,
calls, approximate functions, roundings other than to nearest: `Unsupported` names the line. Nor do lanes meet at two
different warp instructions, or threads at two different barriers, as GPUs let them.
"""

from __future__ import annotations

import re
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial, reduce
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

Selection = Any  # of threads, in order: a slice, or an index array where they have gaps
Read = Callable[["_Threads", Selection], Any]
Write = Callable[["_Threads", Selection, Any], None]
Run = Callable[["_Threads", Selection], None]
Form = dict[str, str]  # what an opcode's pattern matched

LANES = 32
THREADS_AT_ONCE = 8192  # registers of more would leave the cache
MOST_THREADS_PER_BLOCK = 1024
WIDEST = 16  # bytes of one access
POISON = {size: int("A5" * size, 16) for size in (1, 2, 4, 8)}  # what registers hold that nothing was written to
SEVERAL, ATOMIC = -1, -2  # in the place of a thread: several have read it; some have added to it

DTYPES = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}") for kind, code in ("bu", "uu", "si") for bits in (8, 16, 32, 64)
}
DTYPES |= {"pred": np.dtype(bool), "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
DTYPES |= {"bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4")}
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


class Fault(Exception):
    """What a GPU stops at, or what PTX leaves undefined."""


class Race(Exception):
    """Two threads of a launch on the same byte, at least one of them writing."""


class Unsupported(Exception):
    """PTX that this interpreter doesn't know."""


# ---- memory ----


class Memory:
    """Arrays that kernels may access, from lowest to highest byte, and write unless they are read-only; kept alive."""

    def __init__(self, arrays: Iterable[NDArray[Any]] = ()) -> None:
        self._arrays: list[NDArray[Any]] = []
        self._ranges: list[tuple[int, int, bool]] = []
        for array in arrays:
            self.allow(array)

    def allow(self, array: NDArray[Any]) -> None:
        if array.size:
            reach = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
            low = array.ctypes.data + sum(min(r, 0) for r in reach)
            high = array.ctypes.data + sum(max(r, 0) for r in reach) + array.itemsize
            self._arrays.append(array)
            self._ranges.append((low, high, array.flags.writeable))

    def intervals(self, writeable: bool) -> NDArray[np.uint64]:
        """Starts and ends of what may be read or written, joined where they touch."""
        joined: list[list[int]] = []
        for low, high, may_write in sorted(self._ranges):
            if may_write or not writeable:
                if joined and low <= joined[-1][1]:
                    joined[-1][1] = max(high, joined[-1][1])
                else:
                    joined.append([low, high])
        return np.array(joined or [[2**64 - 1] * 2], np.uint64).T


class _Bytes:
    """The address space from ``low`` to ``high``, for numpy.asarray; what isn't indexed isn't touched."""

    def __init__(self, low: int, high: int) -> None:
        self.__array_interface__ = {"data": (low, False), "shape": (high - low,), "typestr": "|u1", "version": 3}


class _Window:
    """Memory as one launch sees it. Threads' marks are kept per granule: the narrowest access there is."""

    def __init__(self, memory: Memory, granule: int, races: bool) -> None:
        (self.starts, self.ends), (self.may_start, self.may_end) = map(memory.intervals, (False, True))
        self.low = int(self.starts[0]) // WIDEST * WIDEST
        high = _round_up(int(self.ends[-1]), WIDEST) if self.ends[-1] < 2**63 else self.low
        self.bytes = np.asarray(_Bytes(self.low, high)) if high > self.low else np.empty(0, np.uint8)
        self.granule, self.races = granule, races
        if races and high > self.low:
            firsts = self.starts // np.uint64(WIDEST) * np.uint64(WIDEST)
            sizes = [_round_up(int(size), WIDEST) for size in self.ends - firsts]
            *offsets, total = accumulate(sizes, initial=0)
            self.shifts = firsts - np.array(offsets, np.uint64)
            self.writer, self.reader = np.zeros((2, total // granule), np.int32)  # thread + 1

    def forget(self, interval: int) -> None:
        """What was accessed there: a barrier is between that and what follows."""
        if self.races:
            first, end = (int(at[interval] - self.shifts[interval]) // self.granule for at in (self.starts, self.ends))
            self.writer[first:end] = self.reader[first:end] = 0

    def load(self, t: _Threads, at: Selection, address: Any, dtype: np.dtype[Any], count: int) -> list[NDArray[Any]]:
        units, index = self._units(t, at, address, dtype, count, writes=False)
        return list(units[index].T)

    def store(self, t: _Threads, at: Selection, address: Any, dtype: np.dtype[Any], values: Sequence[Any]) -> None:
        units, index = self._units(t, at, address, dtype, len(values), writes=True)
        for i, value in enumerate(values):
            units[index, i] = value

    def add(self, t: _Threads, at: Selection, address: Any, values: Any) -> NDArray[Any]:
        """Atomically, in the threads' order; what was there before."""
        units, index = self._units(t, at, address, np.dtype("u8"), 1, writes=True, atomic=True)
        before = np.empty(len(index), np.uint64)
        for i, value in enumerate(np.broadcast_to(values, before.shape)):
            before[i] = units[index[i], 0]
            units[index[i], 0] += value
        return before

    def _units(
        self,
        t: _Threads,
        at: Selection,
        address: Any,
        dtype: np.dtype[Any],
        count: int,
        writes: bool,
        atomic: bool = False,
    ) -> Any:
        width = count * dtype.itemsize
        address = np.broadcast_to(address, t.ids[at].shape)
        self._fail_if(t, at, address, address % width != 0, f"misaligned for {width} bytes:", writes)
        interval, inside = self._find(self.starts, self.ends, address, width)
        self._fail_if(t, at, address, ~inside, "outside of the memory allowed:", writes)
        if writes:
            _, inside = self._find(self.may_start, self.may_end, address, width)
            self._fail_if(t, at, address, ~inside, "read-only memory:", writes)
        if self.races:
            self._mark(t, at, address, address - self.shifts[interval], width, writes, atomic)
        return self.bytes.view(dtype).reshape(-1, count), ((address - self.low) // width).astype(np.intp)

    @staticmethod
    def _find(starts: Any, ends: Any, address: Any, width: int) -> Any:
        interval = np.searchsorted(starts, address, side="right") - 1  # -1, the last, where below all
        return interval, (starts[interval] <= address) & (address <= ends[interval] - width)

    @staticmethod
    def _fail_if(t: _Threads, at: Selection, address: Any, wrong: Any, what: str, writes: bool) -> None:
        if wrong.any():
            t.fail(Fault, f"{what} {'store to' if writes else 'load from'} {int(address[wrong][0]):#x}", at, wrong)

    def _mark(
        self, t: _Threads, at: Selection, address: Any, place: Any, width: int, writes: bool, atomic: bool
    ) -> None:
        cells, me, per = (place // self.granule).astype(np.intp), t.first + 1 + t.ids[at], width // self.granule
        if atomic:
            me = np.full_like(me, ATOMIC)
        if per > 1:
            cells, me = (cells[:, None] + np.arange(per)).ravel(), me.repeat(per)
        other = self.writer[cells]
        if writes:
            other = np.where((other == 0) | (other == me), self.reader[cells], other)
            self.writer[cells] = me
            other = np.where((other == 0) | (other == me), self.writer[cells], other)
        else:
            before = self.reader[cells]
            self.reader[cells] = me
            several = ((before != 0) & (before != me)) | (self.reader[cells] != me)
            self.reader[cells[several]] = SEVERAL
        clash = (other != 0) & (other != me)
        if clash.any():
            first = int(clash.argmax())
            who = {SEVERAL: "several threads", ATOMIC: "an atomic"}.get(other[first]) or t.name(int(other[first]) - 1)
            what = f"{'writes' if writes else 'reads'} {int(address[first // per]):#x}, which {who} accessed"
            t.fail(Race, what, at, np.arange(len(address)) == first // per)


# ---- arithmetic ----


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


def _divide(a: Any, b: Any) -> Any:
    return (a - np.fmod(a, b)) // b  # towards zero


def _width(x: Any) -> int:
    return 8 * int(x.dtype.itemsize)


def _shift_left(a: Any, count: Any) -> Any:
    return np.where(count < _width(a), a << np.minimum(count, _width(a) - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Any, count: Any) -> Any:
    shifted = a >> np.minimum(count, _width(a) - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < _width(a), shifted, a.dtype.type(0))


def _funnel(a: Any, b: Any, count: Any, left: bool, wrap: bool) -> Any:
    count = (count & 31 if wrap else np.minimum(count, 32)).astype(np.uint64)
    both = b.astype(np.uint64) << 32 | a
    return ((both << count) >> 32 if left else both >> count).astype(np.uint32)


def _permute(a: Any, b: Any, selector: Any) -> Any:
    both, result = b.astype(np.uint64) << 32 | a, np.uint64(0)
    for i in range(4):
        nibble = (selector >> (4 * i) & 15).astype(np.uint64)
        byte = both >> (nibble & 7) * 8 & 0xFF
        result = result | np.where(nibble & 8, (byte >> 7) * 0xFF, byte) << (8 * i)
    return result.astype(np.uint32)


def _lop3(a: Any, b: Any, c: Any, truth: Any) -> Any:
    rows = (
        (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c) for row in range(8) if truth >> row & 1
    )
    return reduce(np.bitwise_or, rows, np.uint32(0))


def _ones(count: Any, like: Any) -> Any:
    unsigned = UNSIGNED[like.dtype.itemsize].type
    return ~_shift_left(unsigned(2**64 - 1 >> 64 - _width(like)), count)


def _extract_field(a: Any, position: Any, length: Any) -> Any:
    position, length, width = position & 0xFF, length & 0xFF, _width(a)
    bits = a.astype(UNSIGNED[a.dtype.itemsize])
    field = _shift_right(bits, position) & _ones(length, a)
    if a.dtype.kind == "i":
        sign = _shift_right(bits, np.minimum(position + length - 1, width - 1)) & 1
        inside = np.minimum(length, width - np.minimum(position, width))
        field = np.where((sign != 0) & (length != 0), field | ~_ones(inside, a), field)
    return field.astype(a.dtype)


def _insert_field(a: Any, b: Any, position: Any, length: Any) -> Any:
    mask = _shift_left(_ones(length & 0xFF, a), position & 0xFF)
    return (b & ~mask) | (_shift_left(a, position & 0xFF) & mask)


def _bits(x: Any) -> NDArray[np.uint8]:
    """(n, width), lowest bit first."""
    x = np.ascontiguousarray(np.atleast_1d(x))[:, None]
    return np.unpackbits(x.view(np.uint8), axis=1, bitorder="little")


def _count_ones(x: Any) -> Any:
    return _bits(x).sum(axis=1, dtype=np.uint32)


def _leading_zeros(x: Any) -> Any:
    return np.where(x == 0, _width(x), _bits(x)[:, ::-1].argmax(axis=1)).astype(np.uint32)


def _reverse(x: Any) -> Any:
    return np.packbits(_bits(x)[:, ::-1], axis=1, bitorder="little").view(x.dtype)[:, 0]


def _find_highest(x: Any, shift: bool) -> Any:
    """Of the highest bit that isn't a copy of the sign, its position or how far it is from the top; -1 if none."""
    x = np.where(x < 0, ~x, x)
    zeros = _leading_zeros(x)
    return np.where(x == 0, 2**32 - 1, zeros if shift else _width(x) - 1 - zeros).astype(np.uint32)


NAN = np.uint32(0x7FFFFFFF).view(np.float32)


def _flush(x: Any) -> Any:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x) if x.dtype == np.float32 else x


def _rounded(function: Callable[..., Any], ftz: bool) -> Callable[..., Any]:
    """Float arithmetic, with float32's NaN and .ftz."""

    def canonical(*operands: Any) -> Any:
        x = function(*operands)
        nan = np.isnan(x) if x.dtype == np.float32 else np.bool_(False)
        return np.where(nan, NAN, x) if nan.any() else x

    return (lambda *operands: _flush(canonical(*map(_flush, operands)))) if ftz else canonical


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


def _extremum(function: Any, join: Any, a: Any, b: Any) -> Any:
    """fmin or fmax in which -0 is below +0."""
    unsigned = UNSIGNED[a.dtype.itemsize]
    return np.where(a == b, join(a.view(unsigned), b.view(unsigned)).view(a.dtype), function(a, b))


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
WORD = r"(?P<t>b(?:32|64))"
LOGIC, NARROW, FIELD, SIGNED = (
    r"(?P<t>b(?:16|32|64)|pred)",
    r"(?P<t>[us](?:16|32))",
    r"(?P<t>[us](?:32|64))",
    r"(?P<t>s\d+)",
)
FTZ = r"(?P<ftz>\.ftz(?!\.f64))?"

# Opcodes that compute: pattern, types of result and operands ("t" as matched, "w" twice as wide), function.
INTEGERS: list[tuple[str, str, Callable[..., Any]]] = [
    (rf"add\.{INTEGER}", "t t t", np.add),
    (rf"sub\.{INTEGER}", "t t t", np.subtract),
    (rf"mul\.lo\.{INTEGER}", "t t t", np.multiply),
    (rf"mul\.hi\.{INTEGER}", "t t t", _multiply_high),
    (rf"mul\.wide\.{NARROW}", "w t t", partial(_widened, np.multiply)),
    (rf"mad\.lo\.{INTEGER}", "t t t t", lambda a, b, c: a * b + c),
    (rf"mad\.hi\.{INTEGER}", "t t t t", lambda a, b, c: _multiply_high(a, b) + c),
    (rf"mad\.wide\.{NARROW}", "w t t w", lambda a, b, c: _widened(np.multiply, a, b) + c),
    (rf"div\.{INTEGER}", "t t t", _divide),
    (rf"rem\.{INTEGER}", "t t t", np.fmod),
    (rf"min\.{INTEGER}", "t t t", np.minimum),
    (rf"max\.{INTEGER}", "t t t", np.maximum),
    (rf"neg\.{SIGNED}", "t t", np.negative),
    (rf"abs\.{SIGNED}", "t t", np.abs),
    (rf"and\.{LOGIC}", "t t t", np.bitwise_and),
    (rf"or\.{LOGIC}", "t t t", np.bitwise_or),
    (rf"xor\.{LOGIC}", "t t t", np.bitwise_xor),
    (rf"not\.{LOGIC}", "t t", np.invert),
    (r"lop3\.b32", "b32 b32 b32 b32 u8", _lop3),
    (rf"shl\.{BITS}", "t t u32", _shift_left),
    (r"shr\.(?P<t>[bus](?:16|32|64))", "t t u32", _shift_right),
    (r"shf\.l\.wrap\.b32", "b32 b32 b32 u32", partial(_funnel, left=True, wrap=True)),
    (r"shf\.l\.clamp\.b32", "b32 b32 b32 u32", partial(_funnel, left=True, wrap=False)),
    (r"shf\.r\.wrap\.b32", "b32 b32 b32 u32", partial(_funnel, left=False, wrap=True)),
    (r"shf\.r\.clamp\.b32", "b32 b32 b32 u32", partial(_funnel, left=False, wrap=False)),
    (r"prmt\.b32", "b32 b32 b32 b32", _permute),
    (rf"bfe\.{FIELD}", "t t u32 u32", _extract_field),
    (rf"bfi\.{WORD}", "t t t u32 u32", _insert_field),
    (rf"popc\.{WORD}", "u32 t", _count_ones),
    (rf"clz\.{WORD}", "u32 t", _leading_zeros),
    (rf"brev\.{WORD}", "t t", _reverse),
    (rf"bfind\.{FIELD}", "u32 t", partial(_find_highest, shift=False)),
    (rf"bfind\.shiftamt\.{FIELD}", "u32 t", partial(_find_highest, shift=True)),
    (r"selp\.(?P<t>[bus](?:16|32|64)|f32|f64)", "t t t pred", lambda a, b, p: np.where(p, a, b)),
    (r"mov\.(?P<t>[bus](?:16|32|64)|f32|f64|pred)", "t t", lambda a: a),
    (r"cvta(?:\.to)?\.global\.u64", "u64 u64", lambda a: a),
    (rf"copysign\.{FLOAT}", "t t t", lambda a, b: np.copysign(b, a)),
]
FLOATS: list[tuple[str, str, Callable[..., Any]]] = [
    (rf"add(?:\.rn)?{FTZ}\.{FLOAT}", "t t t", np.add),
    (rf"sub(?:\.rn)?{FTZ}\.{FLOAT}", "t t t", np.subtract),
    (rf"mul(?:\.rn)?{FTZ}\.{FLOAT}", "t t t", np.multiply),
    (rf"(?:fma|mad)\.rn{FTZ}\.{FLOAT}", "t t t t", _fma),
    (rf"div\.rn{FTZ}\.{FLOAT}", "t t t", np.divide),
    (rf"rcp\.rn{FTZ}\.{FLOAT}", "t t", np.reciprocal),
    (rf"sqrt\.rn{FTZ}\.{FLOAT}", "t t", np.sqrt),
    (rf"min{FTZ}\.{FLOAT}", "t t t", partial(_extremum, np.fmin, np.bitwise_or)),
    (rf"max{FTZ}\.{FLOAT}", "t t t", partial(_extremum, np.fmax, np.bitwise_and)),
    (rf"min{FTZ}\.NaN\.(?P<t>f32)", "t t t", partial(_extremum, np.minimum, np.bitwise_or)),
    (rf"max{FTZ}\.NaN\.(?P<t>f32)", "t t t", partial(_extremum, np.maximum, np.bitwise_and)),
    (rf"neg{FTZ}\.{FLOAT}", "t t", np.negative),
    (rf"abs{FTZ}\.{FLOAT}", "t t", np.abs),
]

ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
# Of floats, (result, operand), by rounding.
RESIZING = {
    "": [("f32", "f16"), ("f64", "f16"), ("f64", "f32")],
    "rn": [("f16", "f32"), ("f16", "f64"), ("bf16", "f32"), ("f32", "f64")],
}


def _cast(x: Any, dtype: np.dtype[Any]) -> Any:
    return x.astype(dtype)


def _to_integer(x: Any, dtype: np.dtype[Any], integral: Callable[..., Any], zero_for_nan: bool) -> Any:
    """Clamped."""
    x, limits = integral(x).astype(np.float64), np.iinfo(dtype)
    low, high, nan = x <= float(limits.min), x >= float(limits.max), np.isnan(x)
    of_nan = 0 if zero_for_nan else limits.min or limits.max // 2 + 1
    results = [dtype.type(value) for value in (limits.min, limits.max, of_nan)]
    return np.select([low, high, nan], results, np.where(low | high | nan, 0, x).astype(dtype))


def _to_float(x: Any, type: str) -> Any:
    """Rounded to nearest even; 16-bit floats as uint16."""
    if type in ("f32", "f64"):
        return x.astype(DTYPES[type])
    bits = x.view(UNSIGNED[x.itemsize])
    halves = x.astype(np.float16).view(np.uint16) if type == "f16" else bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), 0x7FFF, halves).astype(np.uint16)


def _pair(high: Any, low: Any, type: str) -> Any:
    return _to_float(high, type).astype(np.uint32) << 16 | _to_float(low, type)


def _conversion(result: str, operand: str, rounding: str, ftz: bool) -> Callable[..., Any]:
    """cvt; KeyError for forms that aren't known."""
    to, integral = DTYPES[result], ROUNDINGS.get(rounding)
    if (result, operand, rounding, ftz) == ("f32", "bf16", "", False):
        return lambda x: (x.astype(np.uint32) << 16).view(np.float32)
    function: Callable[..., Any] | None = None
    if operand[0] in "us":
        if rounding == ("" if result[0] in "us" else "rn") and result not in ("f16", "bf16"):
            function = partial(_cast, dtype=to)
    elif result[0] in "us":
        if integral and operand != "bf16":
            zero_for_nan = operand != "f64" and to.itemsize < 8
            function = partial(_to_integer, dtype=to, integral=integral, zero_for_nan=zero_for_nan)
    elif (result, operand) in RESIZING.get(rounding, ()):
        function = partial(_to_float, type=result)
    elif result == operand and result in ("f32", "f64") and (integral or ftz):
        function = integral or np.positive
    if function is None or (ftz and "f32" not in (result, operand)):
        raise KeyError(result)
    return _rounded(function, ftz)


# ---- from text to closures ----

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|^\s*\.(?:loc|file)\b[^\n]*", re.S | re.M)
ENTRY = re.compile(r"\.entry\s+[\w$]+\s*(?:\((?P<parameters>[^)]*)\))?(?P<bounds>[^{;]*)\{", re.S)
PARAMETER = re.compile(
    r"\.param(?:\s*\.align\s+(?P<align>\d+))?\s*\.(?P<type>\w+)(?:\s*\.ptr(?:\s*\.(?:global|align\s+\d+))*)?"
    r"\s+(?P<name>[\w$]+)(?:\[(?P<length>\d+)\])?"
)
TOKEN = re.compile(r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$%.]+)\s*:(?!:)|(?P<statement>[^;]+);)", re.S)
STATEMENT = re.compile(r"(?:@(?P<guard>!?\s*[\w$%]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*);")
DECLARATION = re.compile(r"\.reg\s*\.(?P<type>\w+) (?P<names>.*);")
SHARED = re.compile(r"\.shared \.align (?P<align>\d+) \.b8 (?P<name>[\w$]+)\[(?P<size>\d+)\];")
COMMA = re.compile(r"\s*,\s*(?![^{\[]*[}\]])")
ADDRESS = re.compile(r"\[\s*(?P<base>[\w$%.]+)\s*(?:\+\s*(?P<offset>-?\w+))?\s*\]")
NUMBER = re.compile(r"-?\d[\w.+-]*|WARP_SZ")

SPECIAL = ["%laneid", "%warpid", *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz")]


class Register(NamedTuple):
    number: int
    dtype: np.dtype[Any]  # bool, or unsigned


@dataclass
class Instruction:
    text: str
    opcode: str
    kind: str = "plain"  # or "branch", "exit", "warp", "block"
    guard: Read | None = None
    run: Run = lambda t, at: None
    members: Read = lambda t, at: None  # membermask
    target: int = -1


class Program:
    """An entry: where its parameters lie, its registers, its instructions as closures over `_Threads`."""

    def __init__(self, text: str) -> None:
        text = COMMENT.sub("", text)
        entries = list(ENTRY.finditer(text))
        if len(entries) != 1:
            raise Unsupported(f"one .entry is expected, not {len(entries)}")
        (entry,) = entries
        bounds = re.search(r"\.maxntid\s+(\d+)", entry["bounds"])
        self.most_threads = int(bounds[1]) if bounds else MOST_THREADS_PER_BLOCK
        self.granule = WIDEST
        self.shared: dict[str, int] = {}  # where variables lie in the block's memory
        self.shared_bytes = 0
        self.dtypes: list[np.dtype[Any]] = []  # by register
        self.slots: dict[tuple[int, np.dtype[Any]], int] = {}  # views of registers
        self.special = {name: self._register("u32") for name in SPECIAL}
        self.names: ChainMap[str, Register] = ChainMap({}, self.special)
        self.labels: ChainMap[str, int] = ChainMap()
        self.branches: list[tuple[Instruction, str, ChainMap[str, int]]] = []
        self.instructions: list[Instruction] = []
        self._parse_parameters(entry["parameters"] or "")
        self._parse_body(text, entry.end())
        for branch, label, labels in self.branches:
            if label not in labels:
                raise Unsupported(branch.text)
            branch.target = labels[label]

    def _parse_parameters(self, text: str) -> None:
        self.parameters: dict[str, int] = {}
        self.parameter_bytes = 0
        for declaration in filter(str.strip, text.split(",")):
            match = PARAMETER.fullmatch(declaration.strip())
            if not match or match["type"] not in DTYPES:
                raise Unsupported(declaration.strip())
            size = DTYPES[match["type"]].itemsize
            offset = _round_up(self.parameter_bytes, int(match["align"] or size))
            self.parameters[match["name"]] = offset
            self.parameter_bytes = offset + size * int(match["length"] or 1)

    def _parse_body(self, text: str, at: int) -> None:
        depth = 1
        while depth:
            token = TOKEN.match(text, at)
            if not token:
                raise Unsupported(text[at : at + 80].strip())
            at = token.end()
            if token["open"]:
                depth, self.names, self.labels = depth + 1, self.names.new_child(), self.labels.new_child()
            elif token["close"]:
                depth, self.names, self.labels = depth - 1, self.names.parents, self.labels.parents
            elif token["label"]:
                self.labels[token["label"]] = len(self.instructions)
            else:
                line = " ".join(token["statement"].split()) + ";"
                try:
                    self._statement(line)
                except (KeyError, ValueError, TypeError) as error:
                    raise Unsupported(line) from error
        self.instructions.append(Instruction("ret;", "ret", "exit"))

    def _statement(self, line: str) -> None:
        if declaration := DECLARATION.fullmatch(line):
            for name in COMMA.split(declaration["names"]):
                stem, _, count = name.rstrip(">").partition("<")
                for full in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                    self.names[full] = self._register(declaration["type"])
        elif variable := SHARED.fullmatch(line):
            self.shared[variable["name"]] = _round_up(self.shared_bytes, int(variable["align"]))
            self.shared_bytes = self.shared[variable["name"]] + int(variable["size"])
        elif match := STATEMENT.fullmatch(line):
            self.current = Instruction(line, match["opcode"])
            if match["guard"]:
                self.current.guard = self._read(match["guard"], "pred")
            operands = COMMA.split(match["operands"]) if match["operands"] else []
            self.current.run = self._compiled(match["opcode"], operands)
            self.instructions.append(self.current)
        elif not line.startswith(".pragma"):
            raise KeyError(line)

    def _register(self, type: str) -> Register:
        self.dtypes.append(DTYPES[type] if type == "pred" else UNSIGNED[DTYPES[type].itemsize])
        return Register(len(self.dtypes) - 1, self.dtypes[-1])

    # ---- operands ----

    def _slot(self, register: Register, dtype: np.dtype[Any]) -> int:
        return self.slots.setdefault((register.number, dtype), len(self.slots))

    def _read(self, operand: str, type: str, wide: bool = False) -> Read:
        """The operand's values as ``type``; ``wide`` takes the low bits of wider registers."""
        dtype = DTYPES[type]
        if operand.startswith("!") and type == "pred":
            positive = self._read(operand[1:].strip(), type)
            return lambda t, at: ~positive(t, at)
        if NUMBER.fullmatch(operand):
            constant = _constant(operand, dtype)
            return lambda t, at: constant
        if operand in self.shared and type in ("u64", "b64"):
            place = np.uint64(self.shared[operand])
            return lambda t, at: place
        register = self.names[operand]
        if _alike(register.dtype, dtype):
            slot = self._slot(register, dtype)
            return lambda t, at: t.registers[slot][at]
        if not wide or register.dtype.itemsize < dtype.itemsize or dtype.kind == "f":
            raise KeyError(operand)
        slot = self._slot(register, register.dtype)
        return lambda t, at: t.registers[slot][at].astype(dtype)

    def _write(self, operand: str, type: str, wide: bool = False) -> Write:
        """Puts values of ``type``; ``wide`` extends integers to wider registers, by the sign if they have one."""
        if operand == "_":
            return lambda t, at, value: None
        dtype, register = DTYPES[type], self.names[operand]
        if not _alike(register.dtype, dtype):
            if not wide or register.dtype.itemsize < dtype.itemsize or dtype.kind == "f":
                raise KeyError(operand)
            dtype = np.dtype(f"{dtype.kind}{register.dtype.itemsize}")
        if operand in self.special:
            raise KeyError(operand)
        slot = self._slot(register, dtype)

        def put(t: _Threads, at: Selection, value: Any) -> None:
            t.registers[slot][at] = value

        return put

    def _address(self, operand: str) -> Read:
        match = ADDRESS.fullmatch(operand)
        if not match:
            raise KeyError(operand)
        base, offset = self._read(match["base"], "u64"), np.uint64(int(match["offset"] or "0", 0) % 2**64)
        return lambda t, at: base(t, at) + offset

    # ---- instructions ----

    def _compiled(self, opcode: str, operands: list[str]) -> Run:
        for pattern, build in BUILDERS:
            if form := re.fullmatch(pattern, opcode):
                return build(self, form.groupdict(""), *operands)
        if opcode.startswith("mov.") and any("{" in operand for operand in operands):
            return self._repack(opcode.removeprefix("mov."), *operands)
        for pattern, signature, function in INTEGERS + FLOATS:
            if form := re.fullmatch(pattern, opcode):
                t, ftz = (form.groupdict("").get(name, "") for name in ("t", "ftz"))
                wide = f"{t[0]}{2 * int(t[1:])}" if "w" in signature else ""
                result, *types = ({"t": t, "w": wide}.get(type, type) for type in signature.split())
                reads = [self._read(operand, type) for operand, type in zip(operands[1:], types, strict=True)]
                if function in (_divide, np.fmod):
                    reads[1] = _nonzero(reads[1])
                if (pattern, signature, function) in FLOATS:
                    function = _rounded(function, bool(ftz))
                return _compute(self._write(operands[0], result), function, *reads)
        raise KeyError(opcode)

    def _branch(self, form: Form, label: str) -> Run:
        self.current.kind = "branch"
        self.branches.append((self.current, label, self.labels))
        return self.current.run

    def _exit(self, form: Form) -> Run:
        self.current.kind = "exit"
        return self.current.run

    def _trap(self, form: Form) -> Run:
        return lambda t, at: t.fail(Fault, "trap", at)

    def _convert(self, form: Form, result: str, operand: str) -> Run:
        d, a = form["d"], form["a"]
        function = _conversion(d, a, form["round"], bool(form["ftz"]))
        write = self._write(result, "b16" if d in ("f16", "bf16") else d, wide=True)
        return _compute(write, function, self._read(operand, a, wide=True))

    def _convert_pair(self, form: Form, result: str, high: str, low: str) -> Run:
        reads = self._read(high, "f32"), self._read(low, "f32")
        return _compute(self._write(result, "b32"), partial(_pair, type=form["t"]), *reads)

    def _repack(self, type: str, result: str, operand: str) -> Run:
        whole, parts = (operand, _names(result)) if result.startswith("{") else (result, _names(operand))
        bits = int(type.removeprefix("b"))
        shifts, part = range(0, bits, bits // len(parts)), f"b{bits // len(parts)}"
        if whole == operand:
            read, writes = self._read(whole, type), [self._write(name, part) for name in parts]

            def unpack(t: _Threads, at: Selection) -> None:
                value = read(t, at)
                for write, shift in zip(writes, shifts, strict=True):
                    write(t, at, value >> shift)

            return unpack

        def pack(*values: Any) -> Any:
            return sum(value.astype(DTYPES[type]) << shift for value, shift in zip(values, shifts, strict=True))

        return _compute(self._write(whole, type), pack, *(self._read(name, part) for name in parts))

    def _compare(self, form: Form, result: str, a: str, b: str, *more: str) -> Run:
        compare, join = COMPARISONS[form["t"][0]][form["compare"]], JOINS.get(form["join"])
        reads = [self._read(operand, form["t"]) for operand in (a, b)]
        others = [self._read(operand, "pred") for operand in more]
        holds, *fails = [self._write(name.strip(), "pred") for name in result.split("|")]
        if len(others) != (join is not None) or len(fails) > 1:
            raise KeyError(result)

        def run(t: _Threads, at: Selection) -> None:
            x, y = (_flush(read(t, at)) if form["ftz"] else read(t, at) for read in reads)
            true = compare(x, y)
            holds(t, at, join(true, others[0](t, at)) if join else true)
            for write in fails:
                write(t, at, join(~true, others[0](t, at)) if join else ~true)

        return run

    def _load_parameter(self, form: Form, result: str, source: str) -> Run:
        address = ADDRESS.fullmatch(source)
        dtype, write = DTYPES[form["t"]], self._write(result, form["t"], wide=True)
        offset = self.parameters[address["base"]] + int(address["offset"] or "0", 0) if address else -1
        if not 0 <= offset <= self.parameter_bytes - dtype.itemsize:
            raise KeyError(source)
        return lambda t, at: write(t, at, np.frombuffer(t.parameters, dtype, 1, offset))

    def _accessed(self, form: Form, group: str) -> tuple[str, np.dtype[Any], list[str]]:
        """Type, without the difference of floats and bits; and the registers."""
        type, names = form["t"].replace("f", "b"), _names(group) if form["count"] else [group]
        if len(names) != int(form["count"] or 1):
            raise KeyError(group)
        self.granule = min(self.granule, DTYPES[type].itemsize * len(names))
        return type, DTYPES[type], names

    def _load(self, form: Form, result: str, source: str) -> Run:
        type, dtype, names = self._accessed(form, result)
        address, writes = self._address(source), [self._write(name, type, wide="f" not in form["t"]) for name in names]
        space = form["space"]

        def load(t: _Threads, at: Selection) -> None:
            window, where = t.space(space, at, address(t, at))
            for write, value in zip(writes, window.load(t, at, where, dtype, len(writes)), strict=True):
                write(t, at, value)

        return load

    def _store(self, form: Form, target: str, source: str) -> Run:
        type, dtype, names = self._accessed(form, source)
        address, reads = self._address(target), [self._read(name, type, wide="f" not in form["t"]) for name in names]
        space = form["space"]

        def store(t: _Threads, at: Selection) -> None:
            window, where = t.space(space, at, address(t, at))
            window.store(t, at, where, dtype, [read(t, at) for read in reads])

        return store

    def _add(self, form: Form, result: str, target: str, source: str) -> Run:
        self.granule = min(self.granule, 8)
        address, read, write = self._address(target), self._read(source, "u64"), self._write(result, "u64")
        return lambda t, at: write(t, at, t.window.add(t, at, address(t, at), read(t, at)))

    def _synchronise(self, form: Form, members: str) -> Run:
        self.current.kind, self.current.members = "warp", self._read(members, "b32")
        return self.current.run

    def _barrier(self, form: Form, number: str) -> Run:
        if number != "0":
            raise KeyError(number)
        self.current.kind = "block"
        return lambda t, at: t.meet(at)

    def _shuffle(self, form: Form, result: str, source: str, step: str, bounds: str, members: str) -> Run:
        self._synchronise(form, members)
        read, mode, mask = self._read(source, "b32"), form["mode"], self.current.members
        operands = self._read(step, "u32"), self._read(bounds, "u32")
        names = [name.strip() for name in result.split("|")]
        writes = [self._write(name, type) for name, type in zip(names, ("b32", "pred"), strict=False)]

        def shuffle(t: _Threads, at: Selection) -> None:
            threads = t.ids[at]
            lane = threads % LANES
            b, c = (np.asarray(operand(t, at), np.int64) for operand in operands)
            b, clamp, segment = b & 31, c & 31, c >> 8 & 31
            first, last = lane & segment, (lane & segment) | (clamp & ~segment)
            other = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
            inside = other >= last if mode == "up" else other <= last
            other = np.where(inside, other, lane)
            absent = ~t.here[threads - lane + other] | (mask(t, at) >> other & 1 == 0)
            if absent.any():
                t.fail(Fault, f"reads lane {other[absent][0]}, which is not there", at, absent)
            values = read(t, threads - lane + other)
            for write, value in zip(writes, (values, inside), strict=False):
                write(t, at, value)

        return shuffle

    def _vote(self, form: Form, result: str, source: str, members: str) -> Run:
        self._synchronise(form, members)
        read, mode, mask = self._read(source, "pred"), form["mode"], self.current.members
        write = self._write(result, "b32" if mode == "ballot" else "pred")

        def vote(t: _Threads, at: Selection) -> None:
            yes, voters = (ballot & mask(t, at) for ballot in (t.ballot(at, read(t, at)), t.ballot(at)))
            none, all = yes == 0, yes == voters
            write(t, at, {"any": ~none, "all": all, "uni": none | all, "ballot": yes}[mode])

        return vote

    def _active(self, form: Form, result: str) -> Run:
        return _compute(self._write(result, "b32"), lambda ballot: ballot, lambda t, at: t.ballot(at))


CACHE = r"(?:\.(?:ca|cg|cs|lu|cv|nc|wb|wt|L1::\w+|L2::(?:evict_\w+|\d+B)))*"
SPACE = r"(?:\.(?P<space>global|shared))?"
ACCESS = rf"(?:\.weak|\.volatile)?{SPACE}{CACHE}(?:\.v(?P<count>[24]))?\.(?P<t>[bus](?:8|16|32|64)|f32|f64)"
CONVERTED = "[us](?:8|16|32|64)|f16|bf16|f32|f64"
BUILDERS: list[tuple[str, Callable[..., Run]]] = [
    (r"bra(?:\.uni)?", Program._branch),
    (r"ret(?:\.uni)?|exit", Program._exit),
    (r"trap", Program._trap),
    (
        rf"cvt(?:\.(?P<round>rn|rni|rzi|rmi|rpi))?(?P<ftz>\.ftz)?\.(?P<d>{CONVERTED})\.(?P<a>{CONVERTED})",
        Program._convert,
    ),
    (r"cvt\.rn\.(?P<t>b?f16)x2\.f32", Program._convert_pair),
    (rf"setp\.(?P<compare>\w+)(?:\.(?P<join>and|or|xor))?{FTZ}\.(?P<t>[bus](?:16|32|64)|f32|f64)", Program._compare),
    (r"ld\.param\.(?P<t>[bus](?:8|16|32|64)|f32|f64)", Program._load_parameter),
    (rf"ld{ACCESS}", Program._load),
    (rf"st{ACCESS}", Program._store),
    (r"atom\.global\.add\.u64", Program._add),
    (r"bar\.warp\.sync", Program._synchronise),
    (r"bar\.sync", Program._barrier),
    (r"shfl\.sync\.(?P<mode>idx|up|down|bfly)\.b32", Program._shuffle),
    (r"vote\.sync\.(?P<mode>any(?=\.p)|all(?=\.p)|uni(?=\.p)|ballot(?=\.b))\.(?:pred|b32)", Program._vote),
    (r"activemask\.b32", Program._active),
]


def _names(group: str) -> list[str]:
    """Those in ``{a, b}``."""
    return [name.strip() for name in group.removeprefix("{").removesuffix("}").split(",")]


def _alike(register: np.dtype[Any], operand: np.dtype[Any]) -> bool:
    return register.itemsize == operand.itemsize and (register.kind == "b") == (operand.kind == "b")


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _constant(text: str, dtype: np.dtype[Any]) -> Any:
    if bits := re.fullmatch(r"0(?:[fF]([\da-fA-F]{8})|[dD]([\da-fA-F]{16}))", text):
        return UNSIGNED[4 if bits[1] else 8].type(int(text[2:], 16)).view(dtype).reshape(())[()]
    if dtype.kind == "f":
        return dtype.type(float(text))
    number = LANES if text == "WARP_SZ" else int(text.rstrip("U"), 0)
    return (
        np.bool_(number)
        if dtype.kind == "b"
        else UNSIGNED[dtype.itemsize].type(number % 256**dtype.itemsize).view(dtype)
    )


def _compute(write: Write, function: Callable[..., Any], *reads: Read) -> Run:
    if len(reads) == 1:
        (a,) = reads
        return lambda t, at: write(t, at, function(a(t, at)))
    if len(reads) == 2:
        a, b = reads
        return lambda t, at: write(t, at, function(a(t, at), b(t, at)))
    return lambda t, at: write(t, at, function(*[read(t, at) for read in reads]))


def _nonzero(read: Read) -> Read:
    def checked(t: _Threads, at: Selection) -> Any:
        divisor = read(t, at)
        if not np.all(divisor):
            t.fail(Fault, "division by zero", at, np.broadcast_to(divisor == 0, t.ids[at].shape))
        return divisor

    return checked


# ---- threads ----


def _pack(flags: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """A word per warp."""
    return np.packbits(flags.reshape(-1, LANES), axis=1, bitorder="little").view(np.uint32)[:, 0]


def _selection(ids: NDArray[np.intp]) -> Selection:
    """None for nobody."""
    if not len(ids):
        return None
    return slice(int(ids[0]), int(ids[-1]) + 1) if ids[-1] - ids[0] + 1 == len(ids) else ids


class _Threads:
    """Some blocks of a launch, in ``groups`` by program counter. Blocks are padded with lanes that never live."""

    def __init__(
        self, program: Program, window: _Window, parameters: bytes, grid: tuple[int, int], blocks: range
    ) -> None:
        self.program, self.window, self.parameters = program, window, parameters
        self.padded = _round_up(grid[1], LANES)
        self.first, self.ids = blocks.start * self.padded, np.arange(len(blocks) * self.padded)
        block, thread = np.divmod(self.ids, self.padded)
        self.alive = thread < grid[1]
        self.here = np.zeros_like(self.alive)  # at the warp instruction that runs
        self.groups: dict[int, Selection] = {0: _selection(self.ids[self.alive])}
        self.parked: dict[int, Selection] = {}  # waiting for lanes
        self.current = program.instructions[0]
        n = len(self.ids)
        files = [np.full(n, POISON[dtype.itemsize] if dtype.kind == "u" else 0, dtype) for dtype in program.dtypes]
        special: dict[str, Any] = {
            "%tid.x": thread,
            "%laneid": thread % LANES,
            "%warpid": thread // LANES,
            "%ctaid.x": block + blocks.start,
        }
        special |= {"%ntid.x": grid[1], "%nctaid.x": grid[0]}
        for name, register in program.special.items():
            files[register.number][:] = special.get(name, int(name.startswith(("%nt", "%nc"))))
        self.registers = [files[number].view(dtype) for number, dtype in program.slots]
        if program.shared_bytes:
            apart = _round_up(program.shared_bytes, WIDEST) + 4 * WIDEST
            room = np.full((len(blocks) + 1) * apart, POISON[1], np.uint8)
            start = -room.ctypes.data % WIDEST
            self.of_blocks = room[start:][: len(blocks) * apart].reshape(-1, apart)[:, : program.shared_bytes]
            self.shared = _Window(Memory(self.of_blocks), program.granule, window.races)

    def space(self, name: str, at: Selection, address: Any) -> tuple[_Window, Any]:
        """The memory of a state space, and where these threads' addresses are there."""
        if name != "shared":
            return self.window, address
        within = np.minimum(address, np.uint64(self.of_blocks.shape[1]))  # there it lies in no array
        return self.shared, self.shared.starts[self.ids[at] // self.padded] + within

    def meet(self, at: Selection) -> None:
        """Whole blocks have come to a barrier."""
        if self.program.shared_bytes:
            for block in np.unique(self.ids[at] // self.padded).tolist():
                self.shared.forget(block)

    def name(self, thread: int) -> str:
        return f"thread {thread % self.padded} of block {thread // self.padded}"

    def fail(self, error: type[Exception], what: str, at: Selection, flags: Any = slice(None)) -> NoReturn:
        raise error(f"{what}, by {self.name(self.first + int(self.ids[at][flags][0]))}, at: {self.current.text}")

    def ballot(self, at: Selection, flags: Any = True) -> Any:
        """For each of the threads, those flags that its warp's lanes raise."""
        raised = np.zeros(len(self.ids), bool)
        raised[at] = flags
        return _pack(raised)[self.ids[at] // LANES]

    def run(self, executed: NDArray[np.int64], steps: int) -> None:
        instructions = self.program.instructions
        while self.groups:
            pc = min(self.groups)
            at = self.groups.pop(pc)
            if not (steps := steps - 1):
                self.fail(Fault, "still running", at)
            stop = min((other for other in (*self.groups, *self.parked) if other > pc), default=len(instructions))
            warps = self._warps(at)
            while pc < stop:
                self.current = instruction = instructions[pc]
                if instruction.kind != "plain":
                    self._control(pc, at, executed)
                    break
                executed[pc] += warps
                chosen, _ = self._guarded(at)
                if chosen is not None:
                    instruction.run(self, chosen)
                pc += 1
            else:
                self._arrive(pc, at)
        for pc, at in self.parked.items():
            self.current = instructions[pc]
            who = "threads of the block" if self.current.kind == "block" else "lanes named in the membermask"
            self.fail(Fault, f"{who} never come here", at)

    def _control(self, pc: int, at: Selection, executed: NDArray[np.int64]) -> None:
        instruction = self.current
        chosen, rest = self._guarded(at)
        if rest is not None:
            self._arrive(pc + 1, rest)
        if instruction.kind == "warp" and chosen is not None:
            waiting, chosen = self._split(chosen, self._lacks(chosen, instruction.members(self, chosen)))
            if waiting is not None:
                self.parked[pc] = waiting
        if instruction.kind == "block" and chosen is not None:
            self.here[:] = False
            self.here[chosen] = True
            absent = (self.alive & ~self.here).reshape(-1, self.padded).any(axis=1)
            waiting, chosen = self._split(chosen, np.take(absent, self.ids[chosen] // self.padded))
            if waiting is not None:
                self.parked[pc] = waiting
        executed[pc] += self._warps(self._joined(chosen, rest))
        if chosen is None:
            return
        if instruction.kind == "exit":
            self.alive[chosen] = False
        else:
            instruction.run(self, chosen)
            self._arrive(instruction.target if instruction.kind == "branch" else pc + 1, chosen)

    def _arrive(self, pc: int, at: Selection) -> None:
        for others in (self.groups, self.parked):
            at = self._joined(at, others.pop(pc, None))
        self.groups[pc] = at

    def _joined(self, a: Selection, b: Selection) -> Selection:
        if a is None or b is None:
            return b if a is None else a
        return _selection(np.sort(np.concatenate((self.ids[a], self.ids[b]))))

    def _guarded(self, at: Selection) -> tuple[Selection, Selection]:
        guard = self.current.guard
        return (at, None) if guard is None else self._split(at, guard(self, at))

    def _split(self, at: Selection, flags: Any) -> tuple[Selection, Selection]:
        if flags.all():
            return at, None
        return _selection(self.ids[at][flags]), _selection(self.ids[at][~flags])

    def _warps(self, at: Selection) -> int:
        if at is None:
            return 0
        warps = self.ids[at] // LANES
        return 1 + int(np.count_nonzero(warps[1:] != warps[:-1]))

    def _ends(self, pc: int) -> bool:
        seen: set[int] = set()
        instruction = self.program.instructions[pc]
        while instruction.kind == "branch" and instruction.guard is None and instruction.target not in seen:
            seen.add(instruction.target)
            instruction = self.program.instructions[instruction.target]
        return instruction.kind == "exit" and instruction.guard is None

    def _lacks(self, at: Selection, members: Any) -> NDArray[np.bool_]:
        """Threads that lack lanes of their membermask; those that have exited, or are about to, don't count."""
        threads = self.ids[at]
        warp, members = threads // LANES, np.broadcast_to(members, threads.shape)
        outside = members >> (threads % LANES) & 1 == 0
        if outside.any():
            self.fail(Fault, "lane not in its own membermask", at, outside)
        self.here[:] = False
        self.here[at] = True
        expected = self.alive & ~self.here
        for pc, others in self.groups.items():
            if self._ends(pc):
                expected[others] = False
        if members.min() != members.max():
            masks = np.zeros(len(self.ids), np.uint32)
            masks[at] = members
            named = (members[:, None] >> np.arange(LANES) & 1 != 0) & self.here.reshape(-1, LANES)[warp]
            differ = (named & (masks.reshape(-1, LANES)[warp] != members[:, None])).any(axis=1)
            if differ.any():
                self.fail(Fault, "lanes with different membermasks", at, differ)
        return (members & _pack(expected)[warp]) != 0  # type: ignore[no-any-return]


class Machine:
    """Runs kernels over ``memory``: arrays, or a `Memory` that may grow.

    ``races`` looks for data races. ``steps`` ends runaway loops; it counts stretches without a branch.
    """

    def __init__(self, memory: Memory | Iterable[NDArray[Any]], *, races: bool = True, steps: int = 1_000_000) -> None:
        self.memory = memory if isinstance(memory, Memory) else Memory(memory)
        self.races, self.steps = races, steps

    def launch(self, ptx: str, blocks: int, threads_per_block: int, parameters: bytes) -> Counter[str]:
        """Warp instructions executed, by opcode: one for each warp that comes to an instruction, whatever its guard.

        ``parameters`` as CU_LAUNCH_PARAM_BUFFER_POINTER takes them: each at its natural alignment.
        """
        program = _program(ptx)
        if not program.parameter_bytes <= len(parameters) <= _round_up(program.parameter_bytes, 8):
            raise ValueError(f"the kernel has {program.parameter_bytes} bytes of parameters, but got {len(parameters)}")
        if blocks < 1 or not 1 <= threads_per_block <= program.most_threads:
            raise ValueError(f"no launch of {blocks} blocks of {threads_per_block} threads")
        window = _Window(self.memory, program.granule, self.races)
        executed = np.zeros(len(program.instructions), np.int64)
        at_once = max(1, THREADS_AT_ONCE // threads_per_block)
        with np.errstate(all="ignore"):
            for first in range(0, blocks, at_once):
                some = range(first, min(first + at_once, blocks))
                _Threads(program, window, parameters, (blocks, threads_per_block), some).run(executed, self.steps)
        counts: Counter[str] = Counter()
        for instruction, times in zip(program.instructions, executed.tolist(), strict=True):
            counts[instruction.opcode] += times
        return +counts


_program = lru_cache(maxsize=256)(Program)

"""Scalar functions of the Numba CPU and CUDA kernels: Philox, the decision of a cell, normal numbers, conversions.

The conversions of 16-bit types are for the CPU. All integers are uint64, of which the low 32 bits count: LLVM then
multiplies with one instruction and never masks. Signed and unsigned integers are never mixed, because Numba turns a mix
into float.

16-bit arrays come as integers whose type tells the dtype: int16 holds float16 bits, uint16 bfloat16 bits.
"""

from __future__ import annotations

import mmap
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.extending import intrinsic, overload

from ...core.random import COSINE, LN2_HIGH, LN2_LOW, LOG, LOW, MULTIPLIERS, RADIANS, SINE, SQRT_HALF_BITS, WEYL

U, S, F = np.uint64, np.int32, np.float32
M0, M1 = U(MULTIPLIERS[0]), U(MULTIPLIERS[1])
W0, W1 = U(WEYL[0]), U(WEYL[1])
LOW_32 = U(LOW)
HALF = U(32)
scalar = njit(inline="always")

# The CPU's functions: those that Python calls, whose compiled code is kept on disk; those that only they call; and
# those put into their callers, as arrays for arguments cost more than the work of a block.
OPTIONS: Any = {"nogil": True, "error_model": "numpy"}
stage = njit(**OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True})
inner = njit(forceinline=True, error_model="numpy")
COMPILE_BYTES = 256 << 20  # of addresses; the first compile takes 180 MB, later ones some 10 MB each


def kernel(function: Callable[..., Any]) -> Any:
    """A function that Python calls. It raises MemoryError where there is no room to compile it: LLVM would abort."""
    dispatcher = njit(cache=True, **OPTIONS)(function)
    compile_for = getattr(dispatcher, "_compile_for_args", None)  # what Numba calls for new types of arguments

    def checked(*arguments: Any, **named: Any) -> Any:
        _require_room()
        return compile_for(*arguments, **named)  # type: ignore[misc]

    if compile_for is not None:
        dispatcher._compile_for_args = checked
    return dispatcher


def _require_room() -> None:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return
    try:
        mmap.mmap(-1, COMPILE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        raise MemoryError(
            f"Numba must compile a kernel, for which it may need {COMPILE_BYTES >> 20} MB of addresses, and they are "
            "not there"
        ) from None


def philox(multiply: Any) -> Any:
    """Four bit planes of a counter under a key. ``multiply(c, m)``: c's low 32 bits times m, all 64 bits of it."""

    @scalar
    def philox_round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
        p0, p1 = multiply(c0, M0), multiply(c2, M1)
        return (p1 >> HALF) ^ c1 ^ k0, p1, (p0 >> HALF) ^ c3 ^ k1, p0

    @scalar
    def philox_planes(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
        """Written out, because loops within loops are not vectorised."""
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + W0, k1 + W1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + U(2) * W0, k1 + U(2) * W1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + U(3) * W0, k1 + U(3) * W1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + U(4) * W0, k1 + U(4) * W1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + U(5) * W0, k1 + U(5) * W1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + U(6) * W0, k1 + U(6) * W1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + U(7) * W0, k1 + U(7) * W1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + U(8) * W0, k1 + U(8) * W1)
        return philox_round(c0, c1, c2, c3, k0 + U(9) * W0, k1 + U(9) * W1)

    return philox_planes


@scalar
def multiply_low(c: Any, m: Any) -> Any:
    return (c & LOW_32) * m


philox_planes = philox(multiply_low)


@scalar
def keep_plane(keep: Any, r: Any, t: Any) -> Any:
    """One plane r of the draw against plane t of the threshold, least significant first: draw not below it so far."""
    return (keep & r) | (~t & (keep | r))


@scalar
def equal_plane(equal: Any, r: Any, t: Any) -> Any:
    return equal & ~(r ^ t)


@scalar
def decide_group(r0: Any, r1: Any, r2: Any, r3: Any, t0: Any, t1: Any, t2: Any, t3: Any) -> Any:
    """(keep, equal) of one group of planes."""
    ones = ~U(0)
    keep = keep_plane(keep_plane(keep_plane(keep_plane(ones, r3, t3), r2, t2), r1, t1), r0, t0)
    equal = equal_plane(equal_plane(equal_plane(equal_plane(ones, r3, t3), r2, t2), r1, t1), r0, t0)
    return keep, equal


def _reinterpret(to: Any) -> Any:
    """An intrinsic that takes a value's bits for those of another type of the same size."""

    @intrinsic
    def reinterpret(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(to))

        return to(value), codegen

    return reinterpret


bits_of = _reinterpret(types.uint32)
float_of = _reinterpret(types.float32)
long_bits_of = _reinterpret(types.uint64)
double_of = _reinterpret(types.float64)


def normal_pair(add: Any, multiply: Any, root: Any) -> Any:
    """Two normal numbers from two uniform ones, by the steps of `reference`; it subtracts by adding the negative.

    ``add(a, b)``, ``multiply(a, b)`` and ``root(a)`` are those of float32, each rounded and never contracted.
    """

    @scalar
    def multiply_add(a: Any, b: Any, c: Any) -> Any:
        return add(multiply(a, b), c)

    log, sine, cosine = (polynomial(coefficients, multiply_add) for coefficients in (LOG, SINE, COSINE))
    half, minus_half, one, minus_one, minus_two = F(0.5), F(-0.5), F(1), F(-1), F(-2)
    step, ln2_high, ln2_low, radians = F(2.0**-31), F(LN2_HIGH), F(LN2_LOW), F(RADIANS)
    sqrt_half, mantissa = S(SQRT_HALF_BITS), S((1 << 23) - 1)
    quarter, half_turn = U(1 << 30), U(1 << 31)

    @scalar
    def pair(radius: Any, angle: Any) -> Any:
        u = multiply(add(F(S((radius & LOW_32) >> U(1))), half), step)
        above = S(S(bits_of(u)) - sqrt_half)  # of u = m 2**e: e in its upper bits, m over sqrt(1/2) below
        e = F(S(above >> S(23)))
        x = add(float_of(np.uint32(S(above & mantissa) + sqrt_half)), minus_one)
        square = multiply(x, x)
        ln_m = multiply(multiply(log(x), x), square)
        ln_m = add(add(ln_m, multiply(e, ln2_low)), multiply(square, minus_half))
        ln_u = add(add(x, ln_m), multiply(e, ln2_high))
        r = root(multiply(ln_u, minus_two))
        t = multiply(F(S(np.uint32(angle << U(2)))), radians)
        square = multiply(t, t)
        s = add(multiply(multiply(sine(square), square), t), t)
        c = add(multiply(multiply(cosine(square), square), square), multiply(square, minus_half))
        c = float_of(np.uint32(bits_of(add(c, one)) ^ np.uint32(angle & half_turn)))
        swap = (angle & quarter) != U(0)
        return multiply(r, s if swap else c), multiply(r, c if swap else s)

    return pair


def polynomial(coefficients: tuple[float, ...], multiply_add: Any) -> Any:
    """In float32, highest power first; a function for each step, because loops within loops are not vectorised.

    ``multiply_add(a, b, c)`` is a b + c.
    """
    constant = F(coefficients[-1])
    if len(coefficients) == 1:
        return scalar(lambda x: constant)
    higher = polynomial(coefficients[:-1], multiply_add)
    return scalar(lambda x: multiply_add(higher(x), x, constant))


normals = normal_pair(operator.add, operator.mul, np.sqrt)


def as_computed(coefficients: Any, like: Any) -> Any:
    """Coefficients, ``(a,)`` or ``(a, b, c)``, in the type that elements of the array ``like`` are computed in."""
    raise NotImplementedError


def affine(v: Any, coefficients: Any) -> Any:
    """What becomes of a number that is kept."""
    raise NotImplementedError


def dropped(coefficients: Any) -> Any:
    """What becomes of one that is not."""
    raise NotImplementedError


@overload(as_computed, inline="always")
def _as_computed(coefficients: Any, like: Any) -> Any:
    compute = np.float64 if like.dtype == types.float64 else np.float32

    def scale(coefficients: Any, like: Any) -> Any:
        return (compute(coefficients[0]),)

    def whole(coefficients: Any, like: Any) -> Any:
        return compute(coefficients[0]), compute(coefficients[1]), compute(coefficients[2])

    return scale if len(coefficients) == 1 else whole


@overload(affine, inline="always")
def _affine(v: Any, coefficients: Any) -> Any:
    def scale(v: Any, coefficients: Any) -> Any:
        return v * coefficients[0]

    def whole(v: Any, coefficients: Any) -> Any:
        return v * coefficients[0] + coefficients[1]

    return scale if len(coefficients) == 1 else whole


@overload(dropped, inline="always")
def _dropped(coefficients: Any) -> Any:
    zero = np.float64(0) if coefficients.dtype == types.float64 else np.float32(0)

    def scale(coefficients: Any) -> Any:
        return zero

    def whole(coefficients: Any) -> Any:
        return coefficients[2]

    return scale if len(coefficients) == 1 else whole


def widen(v: Any) -> Any:
    """A stored number as the type it is computed in."""
    raise NotImplementedError


def narrow(v: Any, like: Any) -> Any:
    """A computed number as it is stored in ``like``'s type, rounded once to nearest even."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(v: Any) -> Any:
    if v == types.uint16:  # bfloat16

        def bfloat16(v: Any) -> Any:
            return float_of(np.uint32(np.uint32(v) << np.uint32(16)))

        return bfloat16
    if v == types.int16:  # float16: no float is subnormal on the way, as it would be 0 under flush-to-zero

        def float16(v: Any) -> Any:
            bits = np.uint32(np.uint16(v))
            sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
            magnitude = np.uint32(bits & np.uint32(0x7FFF))
            shifted = np.uint32(magnitude << np.uint32(13))
            quiet = np.uint32(0x400000) if magnitude > np.uint32(0x7C00) else np.uint32(0)
            special = np.uint32(np.uint32(0x7F800000) | shifted | quiet)
            small = bits_of(np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)))
            finite = small if magnitude < np.uint32(0x400) else np.uint32(shifted + np.uint32(0x38000000))
            return float_of(np.uint32(sign | (special if magnitude >= np.uint32(0x7C00) else finite)))

        return float16

    def same(v: Any) -> Any:
        return v

    return same


@overload(narrow, inline="always")
def _narrow(v: Any, like: Any) -> Any:
    if like == types.uint16:

        def bfloat16(v: Any, like: Any) -> Any:
            bits = bits_of(v)
            odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
            nan = np.uint32(np.uint32(bits >> np.uint32(16)) | np.uint32(0x40))
            return np.uint16(nan if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)

        return bfloat16
    if like == types.int16:

        def float16(v: Any, like: Any) -> Any:
            bits = bits_of(v)
            sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
            normal = np.uint32(np.uint32(magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13))
            # Below 2**-14 the adder rounds at 2**-24.
            small = np.uint32(bits_of(np.float32(float_of(magnitude) + np.float32(0.5))) - np.uint32(0x3F000000))
            nan = np.uint32(np.uint32(0x7E00) | ((magnitude >> np.uint32(13)) & np.uint32(0x3FF)))
            half = small if magnitude < np.uint32(0x38800000) else normal
            half = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else half
            half = nan if magnitude > np.uint32(0x7F800000) else half
            return np.int16(np.uint16(sign | half))

        return float16

    def same(v: Any, like: Any) -> Any:
        return v

    return same

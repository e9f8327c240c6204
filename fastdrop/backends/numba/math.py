"""exp, tanh, the normal distribution and activations, as scalar functions for the Numba and CUDA kernels.

float32 uses the polynomials of `core.activations`: exp and tanh are at most 2 ulp from the true value, subnormal
results included. There are no branches, so loops over these functions are vectorised. float64 uses Numba's math. NaN
stays NaN. `curves` makes the functions of one type; its two tables hold the activations and their slopes by code.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import extending

from ...core import activations as at
from ...core.activations import GELU, GELU_TANH, NONE, RELU, SILU
from ...core.random import LN2_HIGH, LN2_LOW
from .scalars import bits_of, float_of, polynomial, scalar

S, F = np.int32, np.float32
intrinsic: Any = extending.intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c of one type, rounded once where the hardware does that."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        function = builder.module.declare_intrinsic("llvm.fmuladd", [kind], ir.FunctionType(kind, [kind] * 3))
        return builder.call(function, args)

    return a(a, a, a), codegen


class Curves(NamedTuple):
    """Functions of one type. ``activations`` and ``slopes`` are by code, each of (h)."""

    exponential: Any
    tanh: Any
    activations: dict[int, Any]
    slopes: dict[int, Any]


@cache
def curves(double: bool) -> Curves:
    """Of float64 or of float32."""
    exponential, tanh, below = (_exponential64, _tanh64, _below64) if double else _curves32()
    real: Any = np.float64 if double else np.float32
    zero, half, one, minus_half = real(0), real(0.5), real(1), real(-0.5)
    density = real(at.NORMAL_DENSITY)
    tanh_scale, tanh_cubic = real(at.TANH_SCALE), real(at.TANH_SCALE * at.TANH_CUBIC)
    tanh_slope = real(3 * at.TANH_SCALE * at.TANH_CUBIC)

    @scalar
    def tanh_of_cubic(h: Any) -> Any:
        return tanh(h * multiply_add(tanh_cubic * h, h, tanh_scale))

    @scalar
    def gate(h: Any) -> Any:
        return one / (one + exponential(-h))

    @scalar
    def same(h: Any) -> Any:
        return h

    @scalar
    def relu(h: Any) -> Any:
        return zero if h <= zero else h

    @scalar
    def gelu(h: Any) -> Any:
        return h * below(h)

    @scalar
    def gelu_tanh(h: Any) -> Any:
        return half * h * (one + tanh_of_cubic(h))

    @scalar
    def silu(h: Any) -> Any:
        return h * gate(h)

    @scalar
    def same_slope(h: Any) -> Any:
        return one

    @scalar
    def relu_slope(h: Any) -> Any:
        return zero if h <= zero else one

    @scalar
    def gelu_slope(h: Any) -> Any:
        return multiply_add(h, density * exponential(minus_half * h * h), below(h))

    @scalar
    def gelu_tanh_slope(h: Any) -> Any:
        t = tanh_of_cubic(h)
        g = h * (one - t * t)  # 0 where h**2 may be infinite
        return half * (one + t + multiply_add(g * h, tanh_slope * h, g * tanh_scale))

    @scalar
    def silu_slope(h: Any) -> Any:
        g = gate(h)
        return g * multiply_add(h, one - g, one)

    values = {NONE: same, RELU: relu, GELU: gelu, GELU_TANH: gelu_tanh, SILU: silu}
    slopes = {NONE: same_slope, RELU: relu_slope, GELU: gelu_slope, GELU_TANH: gelu_tanh_slope, SILU: silu_slope}
    return Curves(exponential, tanh, values, slopes)


def _curves32() -> tuple[Any, Any, Any]:
    exp_of, exp2_of, tail_of, tanh_near = (
        polynomial(coefficients, multiply_add) for coefficients in (at.EXP, at.EXP2, at.TAIL, at.TANH_NEAR)
    )
    log2_e, minus_ln2_high, minus_ln2_low = F(at.LOG2_E), F(-LN2_HIGH), F(-LN2_LOW)
    lowest, highest = F(at.EXP_LOWEST), F(at.EXP_HIGHEST)
    tanh_seam, tanh_end = F(at.TANH_SEAM), F(at.TANH_END)
    tail_end = F(at.TAIL_END)
    zero, one, two = F(0), F(1), F(2)
    whole, whole_bits = F(1.5 * 2**23), S(0x4B400000)  # adding it leaves a whole number, in the lowest bits
    bias, mantissa_bits = S(127), S(23)

    @scalar
    def scaled(value: Any, rounded: Any) -> Any:
        """value 2**n of `rounded`, n + whole; in two steps, as 2**n may be out of range."""
        power = S(S(bits_of(rounded)) - whole_bits)
        part = S(power >> S(1))
        value = value * float_of(np.uint32(S(part + bias) << mantissa_bits))
        return value * float_of(np.uint32(S(S(power - part) + bias) << mantissa_bits))

    @scalar
    def within(x: Any) -> Any:
        """Of x from EXP_LOWEST to EXP_HIGHEST: e**x = 2**n e**r."""
        rounded = x * log2_e + whole
        n = rounded - whole
        return scaled(exp_of(multiply_add(n, minus_ln2_low, multiply_add(n, minus_ln2_high, x))), rounded)

    @scalar
    def exp2_within(x: Any) -> Any:
        rounded = x + whole
        return scaled(exp2_of(x - (rounded - whole)), rounded)

    @scalar
    def exponential(x: Any) -> Any:
        x = highest if x > highest else x
        return within(lowest if x < lowest else x)

    @scalar
    def tanh(x: Any) -> Any:
        t = abs(x)
        square = x * x
        near = multiply_add(tanh_near(square) * square, t, t)
        capped = tanh_end if t > tanh_end else t
        far = one - two / (within(capped + capped) + one)
        magnitude = near if t < tanh_seam else far
        return math.copysign(magnitude, x)

    @scalar
    def below(h: Any) -> Any:
        """The probability that a standard normal number is below h. Not by erf, which keeps no digits for low h."""
        t = abs(h)
        tail = exp2_within(tail_of(tail_end if t > tail_end else t))
        tail = zero if t > tail_end else tail
        return tail if h < zero else one - tail

    return exponential, tanh, below


@scalar
def _exponential64(x: Any) -> Any:
    return math.exp(x)


@scalar
def _tanh64(x: Any) -> Any:
    return math.tanh(x)


@scalar
def _below64(h: Any) -> Any:
    return np.float64(0.5) * math.erfc(np.float64(-at.SQRT_HALF) * h)

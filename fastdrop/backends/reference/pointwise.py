"""Bias, activation, dropout and residual in one pass, in NumPy: `pointwise_forward` and its gradient.

`norm` uses the forward pass too. The package's docstring has the contract that all fused primitives share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.activations import GELU, GELU_TANH, NONE, NORMAL_DENSITY, RELU, SILU, SQRT_HALF, TANH_CUBIC, TANH_SCALE
from ..generate import primitive
from .storage import read_bits, read_doubles, write_bits, write_doubles

Doubles = NDArray[np.float64]


@primitive
def pointwise_forward(p: Any) -> None:
    """``y = residual + (bit ? a * act(x + input_bias) * multiplier : 0)``; y and residual are of residual_dtype.

    ``signs``, for relu alone and never the array ``words``, takes the bits of the elements that are kept and that are
    not at or below 0 before the activation. The gradient needs nothing else.
    """
    shape = p.rows, p.columns
    with np.errstate(all="ignore"):
        h = read_doubles(p.dtype, p.x, shape)
        if p.input_bias is not None:
            h = h + p.input_bias
        keep = read_bits(p.words, shape)
        if p.signs is not None:
            write_bits(p.signs, 0, (keep & ~(h <= 0)).reshape(-1))
        h = ACTIVATIONS[p.activation](h)
        if p.multiplier is not None:
            h = h * read_doubles(p.dtype, p.multiplier, shape)
        result = np.where(keep, h * p.a, 0.0)
        if p.residual is not None:
            result = result + read_doubles(p.residual_dtype, p.residual, shape)
        write_doubles(p.residual_dtype, p.y, result)


@primitive
def pointwise_backward(p: Any) -> None:
    """Gradients of `pointwise_forward` from dy, of residual_dtype: dx, dmultiplier and, in ``sums[panels, columns]``,
    that of input_bias.

    x is None where there is neither an activation nor a dmultiplier. For a relu whose ``signs`` were saved, those are
    ``words`` here and the activation is none.
    """
    shape = p.rows, p.columns
    with np.errstate(all="ignore"):
        g = read_doubles(p.residual_dtype, p.dy, shape) * p.a
        keep = read_bits(p.words, shape)
        dx = g
        if p.x is not None:
            h = read_doubles(p.dtype, p.x, shape)
            if p.input_bias is not None:
                h = h + p.input_bias
            dx = g * SLOPES[p.activation](h)
            dmultiplier = g * ACTIVATIONS[p.activation](h)
        if p.multiplier is not None:
            dx = dx * read_doubles(p.dtype, p.multiplier, shape)
        dx = np.where(keep, dx, 0.0)
        if p.dmultiplier is not None:
            write_doubles(p.dtype, p.dmultiplier, np.where(keep, dmultiplier, 0.0))
        write_doubles(p.dtype, p.dx, dx)
        if p.sums is not None:
            p.sums.reshape(p.panels, p.columns)[0] = dx.sum(0)


_erfc: Any = np.frompyfunc(math.erfc, 1, 1)


def _normal_cdf(h: Doubles) -> Doubles:
    """The probability that a standard normal number is below h."""
    below: Doubles = 0.5 * _erfc(-SQRT_HALF * h).astype(np.float64)
    return below


def _logistic(h: Doubles) -> Doubles:
    return 1.0 / (1.0 + np.exp(-h))


def _tanh_of_cubic(h: Doubles) -> Doubles:
    return np.tanh(TANH_SCALE * (h + TANH_CUBIC * h**3))


def _gelu_tanh_slope(h: Doubles) -> Doubles:
    t = _tanh_of_cubic(h)
    return 0.5 * (1.0 + t) + 0.5 * h * (1.0 - t * t) * TANH_SCALE * (1.0 + 3.0 * TANH_CUBIC * h * h)


def _silu_slope(h: Doubles) -> Doubles:
    gate = _logistic(h)
    return gate * (1.0 + h * (1.0 - gate))


# By code. gelu_tanh approximates gelu by a tanh.
ACTIVATIONS: dict[int, Callable[[Doubles], Doubles]] = {
    NONE: lambda h: h,
    RELU: lambda h: np.where(h <= 0, 0.0, h),
    GELU: lambda h: h * _normal_cdf(h),
    GELU_TANH: lambda h: 0.5 * h * (1.0 + _tanh_of_cubic(h)),
    SILU: lambda h: h / (1.0 + np.exp(-h)),
}
# Their derivatives.
SLOPES: dict[int, Callable[[Doubles], Doubles]] = {
    NONE: np.ones_like,
    RELU: lambda h: np.where(h <= 0, 0.0, 1.0),
    GELU: lambda h: _normal_cdf(h) + h * NORMAL_DENSITY * np.exp(-0.5 * h * h),
    GELU_TANH: _gelu_tanh_slope,
    SILU: _silu_slope,
}

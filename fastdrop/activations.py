"""Activations that the fused kernels know, and the coefficients of their float32 arithmetic.

This module owns the polynomials that every backend evaluates, highest power first; csrc/vector_math.inc.h has the same.
They were fitted by Remez's algorithm to the relative error of the result; what each is of is written beside it.
"""

from __future__ import annotations

__all__ = ["ACTIVATIONS"]

# Names as users give them, and the codes of csrc/fastdrop.h. "relu" keeps bits alone for backward, others their input.
ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
NONE, RELU, GELU, GELU_TANH, SILU = ACTIVATIONS.values()

# exp(r) for |r| <= ln 2 / 2.
EXP = (
    1.38358019285e-3,
    8.37564503033e-3,
    4.16682887279e-2,
    1.66664102439e-1,
    4.99999915941e-1,
    1.00000003853,
    1.0,
)
EXP_LOWEST, EXP_HIGHEST = -104.0, 89.0  # beyond: 0 and infinity
LOG2_E = 1.44269504088896341
# erf(t) / t - 1 of t**2 for t < 0.6, and -ln(1 - erf(t)) up to 4, from where on erf rounds to 1.
ERF_NEAR = (4.51235798907e-3, -2.66469863602e-2, 1.12809917263e-1, -3.76125126092e-1, 1.283791579e-1)
ERF_FAR = (
    -2.22470671764e-4,
    3.2871615016e-3,
    -2.31347473276e-2,
    1.05683466521e-1,
    6.35331245612e-1,
    1.12869238343,
    -3.15452024931e-5,
)
ERF_SEAM, ERF_END = 0.6, 4.0
# (tanh(t) / t - 1) / t**2 of t**2 for t < 0.8; 1 - 2 / (exp(2 t) + 1) from there on.
TANH_NEAR = (
    1.58475578222e-3,
    -7.40955650978e-3,
    2.13029904058e-2,
    -5.38523313966e-2,
    1.33322210242e-1,
    -3.33332973583e-1,
)
TANH_SEAM, TANH_END = 0.8, 10.0
SQRT_HALF = 0.70710678118654752
NORMAL_DENSITY = 0.39894228040143268  # at 0: 1 / sqrt(2 pi)
TANH_SCALE, TANH_CUBIC = 0.79788456080286536, 0.044715  # gelu_tanh: tanh(scale (h + cubic h**3))

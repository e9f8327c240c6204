"""The activations of the fused kernels: their codes, what their gradients need, and their polynomials.

The Numba and CUDA backends evaluate the polynomials in float32, highest power first; csrc/vector_math.inc.h has the
same numbers, and a test compares them. They were fitted by Remez's algorithm to the relative error of the result. A
comment says which function each approximates.
"""

from __future__ import annotations

# The names that users pass, and the codes of csrc/fastdrop.h.
ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
NONE, RELU, GELU, GELU_TANH, SILU = ACTIVATIONS.values()


def keeps_signs(activation: int, has_multiplier: bool = False) -> bool:
    """Whether the gradient needs bits only: those of elements that are kept and positive."""
    return activation == RELU and not has_multiplier


def keeps_input(activation: int, has_multiplier: bool = False) -> bool:
    """Whether the gradient needs the input: the slope of a curve does, and so does the gradient of a multiplier."""
    return has_multiplier or activation not in (NONE, RELU)


# exp(r) for |r| <= ln 2 / 2.
EXP = (1.38358019285e-3, 8.37564503033e-3, 4.16682887279e-2, 1.66664102439e-1, 4.99999915941e-1, 1.00000003853, 1.0)
# 2**r for |r| <= 1 / 2.
EXP2 = (1.53457891094e-4, 1.3399957587e-3, 9.61848924371e-3, 5.55032871194e-2, 2.40226468861e-1, 6.93147205767e-1, 1.0)
EXP_LOWEST, EXP_HIGHEST = -104.0, 89.0  # below: 0, above: infinity
LOG2_E = 1.44269504088896341
# log2 of the probability that a standard normal number is above t, for t up to 6; above that, 0 is used.
TAIL = (
    -9.93506565309e-7,
    1.73076391383e-5,
    -8.36138771077e-5,
    -3.73801107022e-4,
    7.35248590299e-3,
    -5.26788466017e-2,
    -4.59154094879e-1,
    -1.15111107757,
    -9.99999890982e-1,
)
TAIL_END = 6.0
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

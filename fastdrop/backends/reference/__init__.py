"""The NumPy backend, which is also the contract of the primitives: every backend must do what is written here.

`fastdrop.backends` loads it as the backend "numpy"; tests compare every other backend with it. A function's parameters
are those that the table in `backends.primitives` gives to its name; within the function they are fields of a record
``p``. Callers have checked everything: a primitive validates nothing and allocates no results.

Data
    ``x`` and ``y`` are C-contiguous arrays with the same number of elements, of the dtype that the tag ``dtype``
    names; bfloat16 comes as its bits, uint16. ``y`` may be ``x``. ``words`` is a contiguous array of uint32 with room
    for the bits.
Thresholds
    ``0 < threshold < 2**32``: to keep everything or to drop everything needs no draw.
Values
    Kept elements become ``a * x + b``, dropped ones ``c``. They are selected and not multiplied, so a dropped inf or
    NaN leaves no trace. With ``b == c == 0`` the results are ``a * x`` and exactly +0. float32 and float64 are computed
    in themselves, 16-bit types in float32 with ``a``, ``b`` and ``c`` rounded to it; the result is rounded once, to
    nearest even.

The fused primitives `pointwise`, `norm` and `softmax` work on data ``[rows, columns]``, C-contiguous, ``columns >= 1``.
`attention` works on rows of tensors ``[outer, heads, length, width]``, at strides, and draws its bits or is given them
(the module `attention`). For all of them:

Bits
    Element (r, c) stands under bit ``r * columns + c`` of ``words``. Without ``words`` everything is kept.
Dtypes
    ``dtype`` is that of the data, ``residual_dtype`` that of the residual stream: the same, or float32 beside a 16-bit
    dtype. Arithmetic is float64 for float64 data and float32 for all other data, with one rounding where a result is
    stored. Vectors of columns (``input_bias``, ``weight``, ``norm_bias``), the mask of a softmax, statistics and
    sums have the type of the arithmetic.
Absent arrays
    An optional array that a call doesn't have is None.
Dropped elements
    They are +0 in the forward pass and in gradients, selected and not multiplied.
Memory
    An output may be an input of the same dtype, element on element. Callers exclude other overlaps.
Sums over rows
    A panel of rows is added up at a time, then panel after panel, so the shape alone decides the order. Panel k of n
    begins at row ``k * (rows // n) + min(k, rows % n)``. ``sums`` has a line for each panel; the first ends as the
    total, the others hold anything.

This backend computes the fused primitives in float64, so its results are the most exact. Others agree within the
tolerance that tests/cases.py gives.
"""

from __future__ import annotations

import numpy as np

from ...core.random import philox4x32_10
from .attention import attention_backward, attention_forward
from .cells import gather_cells, scatter_cells
from .mask import dilate_bits, draw_bits, draw_rows, dropout_forward, gaussian_multiply, masked_affine
from .norm import norm_backward, norm_forward
from .pointwise import pointwise_backward, pointwise_forward
from .softmax import softmax_backward, softmax_forward

__all__ = [
    "attention_backward",
    "attention_forward",
    "describe",
    "dilate_bits",
    "draw_bits",
    "draw_rows",
    "dropout_forward",
    "gather_cells",
    "gaussian_multiply",
    "masked_affine",
    "norm_backward",
    "norm_forward",
    "philox4x32_10",
    "pointwise_backward",
    "pointwise_forward",
    "scatter_cells",
    "set_num_threads",
    "softmax_backward",
    "softmax_forward",
    "unavailable",
]


def unavailable() -> str | None:
    """Why this backend can't run here; None if it can."""
    return None


def describe() -> str:
    """One line for `show_config`."""
    return f"NumPy {np.__version__}"


def set_num_threads(n: int) -> None:
    """NumPy runs on the calling thread."""

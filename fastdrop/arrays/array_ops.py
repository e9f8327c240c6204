"""What the modules of the NumPy API share: their types, and how shapes and dtypes reach the kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import checks
from ..core.mask import GaussianNoise, PackedMask, SeededMask
from ..core.random import State, Stream

Array = NDArray[Any]
Shape = tuple[int, ...]
BitMask = PackedMask | SeededMask
Mask = BitMask | GaussianNoise
RandomState = None | int | Stream | np.random.Generator  # the values of ``rng``
DeferredDraw = tuple[Any, State, int]  # the backend's function that draws and runs a primitive; state, threshold
BlockPasses = tuple[tuple[int, int, int, int], ...]
Scaling = tuple[float, float, float]  # scale, shift, dropped: a `core.variants.Coefficients`, or as much as one

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def rows_and_columns(shape: Shape) -> tuple[int, int]:
    """The shape as rows of the last axis; an array without axes is one row of one column."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that fused kernels compute in, and that vectors, statistics and sums are stored in."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def dtype_tags(*dtypes: np.dtype[Any]) -> tuple[int, ...]:
    return tuple([checks.dtype_tag("x", dtype) for dtype in dtypes])

"""What each kind of dropout is, in numbers: which cells it draws, and what becomes of kept and dropped elements.

The NumPy face (`fastdrop.arrays`) and the torch face call the same functions here, so both drop alike. For example,
feature dropout of an array of shape (8, 3, 5, 5) draws a mask of shape (8, 3, 1, 1), and inverted scaling at p = 0.5
multiplies what is kept by 2. This module knows shapes and numbers only, no arrays.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, TypeVar

from . import checks
from .random import DROP_ALL, keep_scale, nearest, threshold

Shape = tuple[int, ...]
# None stands for an extent that does not matter.
Extent = TypeVar("Extent", int, int | None)

SCALINGS = (*checks.SCALINGS, "alpha", "alpha_slope")

# SELU's limit for x far below 0 is -lambda alpha: alpha dropout sets dropped elements to it before it restores mean
# and variance.
SELU_FLOOR = -1.7580993408473766


class Coefficients(NamedTuple):
    """A kept x becomes ``scale * x + shift``, a dropped x becomes ``dropped``."""

    scale: float
    shift: float
    dropped: float


@lru_cache(maxsize=1024)
def affine(scaling: str, threshold: int) -> Coefficients:
    """The coefficients of a scaling for masks drawn with a threshold.

    "inverted" keeps the mean. "standard" leaves kept elements as they are. "alpha" keeps mean 0 and variance 1, which
    is SELU's fixed point: with ``q`` the drop probability that is really used and ``f`` SELU's floor, ``scale = ((1 -
    q) (1 + q f**2)) ** -1/2``, ``shift = -scale q f`` and ``dropped = scale f (1 - q)`` (Klambauer et al. 2017).
    "alpha_slope" is the derivative of "alpha": the same scale, no shift, and 0 for what is dropped.

    >>> affine("inverted", 2**31), affine("standard", 2**31)
    (Coefficients(scale=2.0, shift=0.0, dropped=0.0), Coefficients(scale=1.0, shift=0.0, dropped=0.0))
    """
    checks.choice("scaling", scaling, SCALINGS)
    if scaling == "standard":
        return Coefficients(1.0, 0.0, 0.0)
    if scaling == "inverted" or threshold == DROP_ALL:  # where everything is dropped all are 0
        return Coefficients(keep_scale(threshold), 0.0, 0.0)
    from fractions import Fraction  # takes as long to import as all of `core`

    q, f = Fraction(threshold, DROP_ALL), Fraction(SELU_FLOOR)
    square = 1 / ((1 - q) * (1 + q * f**2))
    # Integer arithmetic, because the cached result must not depend on the rounding mode of the first caller.
    a = Fraction(math.isqrt((square.numerator << 256) // square.denominator), 1 << 128)
    scale, shift, dropped = (nearest(x.numerator, x.denominator) for x in (a, -a * q * f, a * f * (1 - q)))
    return Coefficients(scale, 0.0, 0.0) if scaling == "alpha_slope" else Coefficients(scale, shift, dropped)


def slope(scaling: str) -> str:
    """The scaling of the derivative."""
    return "alpha_slope" if scaling == "alpha" else scaling


def feature_cells(shape: tuple[Extent, ...], channel_axis: int) -> tuple[Extent | int, ...]:
    """The mask's shape for feature dropout: a cell for each channel of each sample.

    Axis 0 counts samples, unless it is the channel axis itself.

    >>> feature_cells((8, 3, 5, 5), 1), feature_cells((8, 5, 5, 3), 3), feature_cells((3, 5, 5), 0)
    ((8, 3, 1, 1), (8, 1, 1, 3), (3, 1, 1))
    """
    return tuple(extent if axis in (0, channel_axis) else 1 for axis, extent in enumerate(shape))


def shared_cells(shape: tuple[Extent, ...], *shared: int) -> tuple[Extent | int, ...]:
    """The mask's shape where one decision is shared along the given axes, as in variational dropout along time.

    >>> shared_cells((8, 100, 32), 1)
    (8, 1, 32)
    """
    return tuple(1 if axis in shared else extent for axis, extent in enumerate(shape))


def sample_cells(shape: tuple[Extent, ...], mode: str) -> tuple[Extent | int, ...]:
    """The mask's shape for stochastic depth: a cell for each sample ("row"), or one for all ("batch").

    >>> sample_cells((8, 3, 5, 5), "row"), sample_cells((8, 3, 5, 5), "batch")
    ((8, 1, 1, 1), (1, 1, 1, 1))
    """
    return tuple(extent if axis == 0 and mode == "row" else 1 for axis, extent in enumerate(shape))


class Blocks(NamedTuple):
    """DropBlock's geometry.

    A mask of shape ``seeds`` is drawn with drop probability ``gamma``; each dropped cell of it drops a whole block.
    ``passes`` widen the seeds to the full mask, one axis at a time: each holds the (outer, n, inner, block) of one
    `dilate_bits`.
    """

    seeds: Shape
    gamma: float
    passes: tuple[tuple[int, int, int, int], ...]


def block_seeds(mask_shape: Shape, block_size: Shape) -> Shape:
    """The shape of the mask that DropBlock draws: a cell for each place of a block inside of a mask.

    >>> block_seeds((8, 3, 10, 10), (3, 20))
    (8, 3, 8, 1)
    """
    axes = len(block_size)
    free = [extent - min(size, extent) + 1 for extent, size in zip(mask_shape[-axes:], block_size, strict=True)]
    return (*mask_shape[:-axes], *free)


@lru_cache(maxsize=1024)
def blocks(mask_shape: Shape, p: float, block_size: Shape) -> Blocks:
    """DropBlock's geometry over the last ``len(block_size)`` axes of a mask.

    Every block lies inside of the mask. A block longer than an axis is shortened to it.

    ``gamma = p / prod(block) * prod(extent / (extent - block + 1))``, Ghiasi et al. 2018, section 3.

    >>> blocks((8, 3, 10, 10), 0.1, (3, 3))
    Blocks(seeds=(8, 3, 8, 8), gamma=0.017361111111111112, passes=((192, 8, 1, 3), (24, 8, 10, 3)))
    """
    lead, extents = mask_shape[: -len(block_size)], mask_shape[-len(block_size) :]
    sizes = [min(size, extent) for size, extent in zip(block_size, extents, strict=True)]
    free = block_seeds(mask_shape, block_size)[-len(block_size) :]
    passes = []
    for axis in reversed(range(len(sizes))):
        outer, inner = math.prod(lead) * math.prod(free[:axis]), math.prod(extents[axis + 1 :])
        passes.append((outer, free[axis], inner, sizes[axis]))
    room = math.prod(sizes) * math.prod(free)
    if threshold(p) == DROP_ALL or not room:
        gamma = p
    else:  # p * (cells / room), in two roundings; exactly p where blocks are cells
        (top, bottom), (cells_top, cells_bottom) = (
            number.as_integer_ratio() for number in (p, nearest(math.prod(extents), room))
        )
        gamma = nearest(top * cells_top, bottom * cells_bottom)
    return Blocks((*lead, *free), gamma, tuple(passes))


def spread(p: float) -> float:
    """Standard deviation of Gaussian dropout's multiplier, ``(p / (1 - p)) ** 1/2``.

    Its variance is that of dropout's multiplier at the same p.

    >>> spread(0.5)
    1.0
    """
    return math.sqrt(p / (1.0 - p))


def panels(rows: int) -> int:
    """The number of panels of rows in which fused kernels sum over rows.

    It depends on the shape only, and so does the order of the sums.
    """
    return min(32, max(1, rows // 16))

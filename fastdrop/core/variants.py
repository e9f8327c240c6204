"""Every kind of dropout as a grid, a draw and an affine.

This module owns the cells that each kind draws and what becomes of kept and dropped ones; the NumPy and the torch face
ask it alike. It knows numbers and shapes alone.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from . import checks
from .random import DROP_ALL, keep_scale, nearest, threshold

__all__ = [
    "Blocks",
    "affine",
    "blocks",
    "feature_cells",
    "panels",
    "sample_cells",
    "shared_cells",
    "slope",
    "spread",
]

Shape = tuple[int, ...]

LAWS = ("inverted", "standard", "alpha", "alpha_slope")

# SELU's value far to the left is -lambda alpha: what alpha dropout drops to, before it restores mean and variance.
SELU_FLOOR = -1.7580993408473766


@lru_cache(maxsize=1024)
def affine(law: str, cut: int) -> tuple[float, float, float]:
    """``(a, b, c)``: kept x becomes ``a x + b``, dropped x becomes c.

    "inverted" keeps the mean, "standard" leaves what is kept. "alpha" keeps mean 0 and variance 1, SELU's fixed point:
    with ``q`` the probability really used and ``f`` the floor, ``a = ((1 - q) (1 + q f**2)) ** -1/2``, ``b = -a q f``
    and ``c = a f (1 - q)`` (Klambauer et al. 2017). "slope" in its name: b and c left out, as in a gradient.

    >>> affine("inverted", 2**31), affine("standard", 2**31)
    ((2.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    """
    checks.choice("law", law, LAWS)
    if law == "standard":
        return 1.0, 0.0, 0.0
    if law == "inverted" or cut == DROP_ALL:  # where everything is dropped all are 0
        return keep_scale(cut), 0.0, 0.0
    q, f = Fraction(cut, DROP_ALL), Fraction(SELU_FLOOR)
    square = 1 / ((1 - q) * (1 + q * f**2))
    # By integers, because what is remembered must not depend on the rounding mode of who asked first.
    a = Fraction(math.isqrt((square.numerator << 256) // square.denominator), 1 << 128)
    kept, shift, dropped = (nearest(x.numerator, x.denominator) for x in (a, -a * q * f, a * f * (1 - q)))
    return (kept, 0.0, 0.0) if law == "alpha_slope" else (kept, shift, dropped)


def slope(law: str) -> str:
    """The law of the derivative."""
    return "alpha_slope" if law == "alpha" else law


def feature_cells(shape: Shape, channel_axis: int) -> Shape:
    """A cell for each channel of each sample: axis 0 is the samples', unless it is the channels' own.

    >>> feature_cells((8, 3, 5, 5), 1), feature_cells((8, 5, 5, 3), 3), feature_cells((3, 5, 5), 0)
    ((8, 3, 1, 1), (8, 1, 1, 3), (3, 1, 1))
    """
    return tuple(extent if axis in (0, channel_axis) else 1 for axis, extent in enumerate(shape))


def shared_cells(shape: Shape, *shared: int) -> Shape:
    """One cell along the axes named, as variational dropout has along time.

    >>> shared_cells((8, 100, 32), 1)
    (8, 1, 32)
    """
    return tuple(1 if axis in shared else extent for axis, extent in enumerate(shape))


def sample_cells(shape: Shape, mode: str) -> Shape:
    """Stochastic depth's: one for each sample ("row"), or one for all ("batch").

    >>> sample_cells((8, 3, 5, 5), "row"), sample_cells((8, 3, 5, 5), "batch")
    ((8, 1, 1, 1), (1, 1, 1, 1))
    """
    return tuple(extent if axis == 0 and mode == "row" else 1 for axis, extent in enumerate(shape))


class Blocks(NamedTuple):
    """DropBlock's geometry: cells of ``seeds`` are dropped with probability gamma, and with each a block of cells.

    ``passes`` widen the seeds to the mask, axis after axis: (outer, n, inner, block) of each `dilate_bits`.
    """

    seeds: Shape
    gamma: float
    passes: tuple[tuple[int, int, int, int], ...]


@lru_cache(maxsize=1024)
def blocks(cells: Shape, p: float, block_size: Shape) -> Blocks:
    """DropBlock's geometry over the last ``len(block_size)`` axes of a mask; blocks lie inside, cut to the extents.

    ``gamma = p / prod(block) * prod(extent / (extent - block + 1))``, Ghiasi et al. 2018, section 3.

    >>> blocks((8, 3, 10, 10), 0.1, (3, 3))
    Blocks(seeds=(8, 3, 8, 8), gamma=0.017361111111111112, passes=((192, 8, 1, 3), (24, 8, 10, 3)))
    """
    lead, extents = cells[: -len(block_size)], cells[-len(block_size) :]
    sizes = [min(size, extent) for size, extent in zip(block_size, extents, strict=True)]
    free = [extent - size + 1 for extent, size in zip(extents, sizes, strict=True)]
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
    """Standard deviation of Gaussian dropout's factor, ``(p / (1 - p)) ** 1/2``: the variance that dropout at p has.

    >>> spread(0.5)
    1.0
    """
    return math.sqrt(p / (1.0 - p))


def panels(rows: int) -> int:
    """In how many panels of rows fused kernels sum over rows: a function of the shape, and with it the sums' order."""
    return min(32, max(1, rows // 16))

"""Which cell decides which element: a shape with shared axes, brought to (outer, repeat, inner).

Data is ``[outer, repeat, inner]`` and its mask ``[outer, inner]``, both in C order. Element-wise dropout is
``(1, 1, n)``, one decision per channel of NCHW data is ``(N*C, H*W, 1)``, a mask shared along the time axis of
``(T, B, F)`` is ``(1, T, B*F)``. A grid with more alternations of shared and separate axes loops over the outer ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Grid", "cell_axes"]


def cell_axes(shape: tuple[int, ...], cells_shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(extent, stride in cells) of each axis of data under a mask: 0 where a decision is shared.

    >>> cell_axes((8, 3, 5, 5), (8, 3, 1, 1))
    [(8, 3), (3, 1), (5, 0), (5, 0)]
    """
    axes: list[tuple[int, int]] = []
    stride = 1
    for extent, cells in zip(reversed(shape), reversed(cells_shape), strict=True):
        axes.append((extent, stride if cells == extent else 0))
        stride *= cells
    return axes[::-1]


@dataclass(frozen=True, slots=True)
class Grid:
    """Extents of one piece, and the loop over pieces: ``lead`` holds (extent, shared) of the axes looped over."""

    outer: int
    repeat: int
    inner: int
    lead: tuple[tuple[int, bool], ...] = ()

    @classmethod
    def of(cls, shape: tuple[int, ...], cells_shape: tuple[int, ...]) -> Grid:
        """The grid of data of one shape under a mask of another: equal on each axis, or 1 in the mask.

        >>> Grid.of((8, 3, 5, 5), (8, 3, 1, 1))
        Grid(outer=24, repeat=25, inner=1, lead=())
        >>> Grid.of((9, 4, 6), (1, 4, 6))
        Grid(outer=1, repeat=9, inner=24, lead=())
        >>> Grid.of((2, 3, 4, 5), (1, 3, 1, 5))
        Grid(outer=3, repeat=4, inner=5, lead=((2, True),))
        """
        runs: list[tuple[int, bool]] = []
        for extent, cells in zip(shape, cells_shape, strict=True):
            shared = cells != extent
            if extent == 1:
                continue
            if runs and runs[-1][1] == shared:
                runs[-1] = (runs[-1][0] * extent, shared)
            else:
                runs.append((extent, shared))
        inner = runs.pop()[0] if runs and not runs[-1][1] else 1
        repeat = runs.pop()[0] if runs and runs[-1][1] else 1
        outer = runs.pop()[0] if runs and not runs[-1][1] else 1
        return cls(outer, repeat, inner, tuple(runs))

    @property
    def size(self) -> int:
        """Elements of one piece."""
        return self.outer * self.repeat * self.inner

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(first element, first cell) of each piece, in memory order."""
        cells_in_piece = self.outer * self.inner
        extents = [extent for extent, _ in self.lead]
        strides = [
            0 if shared else cells_in_piece * math.prod(e for e, s in self.lead[axis + 1 :] if not s)
            for axis, (_, shared) in enumerate(self.lead)
        ]
        for i, index in enumerate(itertools.product(*map(range, extents))):
            yield i * self.size, sum(at * stride for at, stride in zip(index, strides, strict=True))

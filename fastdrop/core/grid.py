"""The mapping of a mask's cells to data, as the three extents that primitives know.

`fastdrop.arrays` and `fastdrop.torch.runtime` call it to apply a mask whose cells decide more than one element. A
primitive sees data ``[outer, repeat, inner]`` under a mask ``[outer, inner]``. One decision per channel of NCHW is
``(N*C, H*W, 1)``. One per channel of NHWC is ``(N, H*W, C)``, both for an array of that shape and for an NCHW array
that lies in memory in that order. One shared along the first axis of ``(T, B, F)`` is ``(1, T, B*F)``; dropout of
elements is ``(1, 1, n)``. If shared and separate axes alternate more often, the caller loops over the outer ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

Axis = tuple[int, int]  # extent, stride in cells; the stride is 0 if elements share a decision along the axis

SMALL_PIECE = 1 << 14  # elements; a kernel's call takes about as long as a copy of so many


def cell_axes(shape: tuple[int, ...], mask_shape: tuple[int, ...]) -> list[Axis]:
    """(extent, stride in cells) of each axis of the data; the stride is 0 if elements share a decision along the axis.

    >>> cell_axes((8, 3, 5, 5), (8, 3, 1, 1))
    [(8, 3), (3, 1), (5, 0), (5, 0)]
    """
    axes: list[Axis] = []
    stride = 1
    for extent, cells in zip(reversed(shape), reversed(mask_shape), strict=True):
        axes.append((extent, stride if cells == extent else 0))
        stride *= cells
    return axes[::-1]


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """The axes with more than one element, outermost in memory first; None if elements overlap or leave gaps.

    Strides are in elements.

    >>> memory_order((8, 3, 5, 5), (75, 1, 15, 3))
    [0, 2, 3, 1]
    """
    order = sorted((axis for axis, extent in enumerate(shape) if extent != 1), key=lambda axis: -strides[axis])
    step = 1
    for axis in reversed(order):
        if strides[axis] != step:
            return None
        step *= shape[axis]
    return order


def collapse(axes: Iterable[Axis]) -> list[Axis]:
    """The same cells with as few axes as can be, none of them of one element.

    >>> collapse([(8, 15), (3, 5), (5, 1)])
    [(120, 1)]
    """
    result: list[Axis] = []
    for extent, stride in axes:
        if extent == 1:
            continue
        if result and result[-1][1] == extent * stride:
            result[-1] = result[-1][0] * extent, stride
        else:
            result.append((extent, stride))
    return result


@dataclass(frozen=True, slots=True)
class Grid:
    """The extents of one piece of the data, and ``lead``, the axes that the caller loops over."""

    outer: int
    repeat: int
    inner: int
    lead: tuple[Axis, ...] = ()

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, shape: tuple[int, ...], mask_shape: tuple[int, ...]) -> Grid:
        """The grid of data in C order. On each axis the mask's extent is the data's or 1.

        >>> Grid.of((8, 3, 5, 5), (8, 3, 1, 1))
        Grid(outer=24, repeat=25, inner=1, lead=())
        >>> Grid.of((9, 4, 6), (1, 4, 6))
        Grid(outer=1, repeat=9, inner=24, lead=())
        >>> Grid.of((2, 3, 4, 5), (1, 3, 1, 5))
        Grid(outer=3, repeat=4, inner=5, lead=((2, 0),))
        """
        grid = cls.over(cell_axes(shape, mask_shape))
        assert grid is not None  # in C order the innermost cells are adjacent
        return grid

    @classmethod
    @lru_cache(maxsize=256)
    def in_memory(cls, shape: tuple[int, ...], strides: tuple[int, ...], mask_shape: tuple[int, ...]) -> Grid | None:
        """The grid of data in its memory order; strides are in elements.

        None if the elements or their cells are not adjacent, or if pieces would be so small that a copy costs less.

        >>> Grid.in_memory((8, 3, 5, 5), (75, 1, 15, 3), (8, 3, 1, 1))
        Grid(outer=8, repeat=25, inner=3, lead=())
        """
        order = memory_order(shape, strides)
        if order is None:
            return None
        axes = cell_axes(shape, mask_shape)
        grid = cls.over([axes[axis] for axis in order])
        return grid if grid is None or not grid.lead or grid.size >= SMALL_PIECE else None

    @classmethod
    def over(cls, axes: Sequence[Axis]) -> Grid | None:
        """The grid of data whose axes are given in memory order; None if the innermost cells are not adjacent.

        >>> Grid.over([(8, 3), (5, 0), (5, 0), (3, 1)])
        Grid(outer=8, repeat=25, inner=3, lead=())
        """
        runs = collapse(axes)
        if runs and runs[-1][1] > 1:
            return None
        inner = runs.pop()[0] if runs and runs[-1][1] == 1 else 1
        repeat = runs.pop()[0] if runs and runs[-1][1] == 0 else 1
        outer = runs.pop()[0] if runs and runs[-1][1] == inner else 1
        return cls(outer, repeat, inner, tuple(runs))

    @property
    def size(self) -> int:
        """The number of elements in one piece."""
        return self.outer * self.repeat * self.inner

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(first element, first cell) of each piece, in memory order."""
        strides = [stride for _, stride in self.lead]
        for i, index in enumerate(itertools.product(*(range(extent) for extent, _ in self.lead))):
            yield i * self.size, sum(at * stride for at, stride in zip(index, strides, strict=True))

"""Grids, which tell a kernel the cell of each element, against NumPy's own broadcasting."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastdrop.core.grid import Grid, cell_axes, memory_order

axes = st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=7)


def cells_of(grid, elements):
    """The cell of each element, computed from the pieces and extents; -1 if no piece has it."""
    cells = np.full(elements, -1)
    o, _, i = np.ogrid[: grid.outer, : grid.repeat, : grid.inner]
    piece = np.broadcast_to(o * grid.inner + i, (grid.outer, grid.repeat, grid.inner)).reshape(-1)
    for start, cell in grid.pieces():
        assert (cells[start : start + grid.size] == -1).all()
        cells[start : start + grid.size] = cell + piece
    return cells


@given(axes)
def test_grid_pieces_match_broadcasting(axes):
    """Shared and separate axes alternate in the loop over pieces, and no extent of 1 is looped over."""
    shape = tuple(extent for extent, _ in axes)
    mask_shape = tuple(1 if shared else extent for extent, shared in axes)
    cells = np.arange(math.prod(mask_shape)).reshape(mask_shape)
    expected = np.broadcast_to(cells, shape).reshape(-1)
    grid = Grid.of(shape, mask_shape)
    assert (cells_of(grid, math.prod(shape)) == expected).all()
    assert grid.size * math.prod(extent for extent, _ in grid.lead) == math.prod(shape)
    kinds = [stride == 0 for _, stride in grid.lead]
    assert all(a != b for a, b in itertools.pairwise(kinds))
    assert all(extent != 1 for extent, _ in grid.lead)


@given(axes.flatmap(lambda drawn: st.tuples(st.just(drawn), st.permutations(range(len(drawn))))))
def test_grid_over_memory_matches_broadcasting(drawn):
    """For any order of the axes in memory the grid gives each element its logical cell, or there is no grid."""
    axes, order = drawn
    shape = tuple(extent for extent, _ in axes)
    mask_shape = tuple(1 if shared else extent for extent, shared in axes)
    cells = np.arange(math.prod(mask_shape)).reshape(mask_shape)
    expected = np.broadcast_to(cells, shape).transpose(order).reshape(-1)
    by_axis = cell_axes(shape, mask_shape)
    grid = Grid.over([by_axis[axis] for axis in order])
    if grid is None:
        assert expected.size == 0 or expected[1] - expected[0] > 1
    else:
        assert (cells_of(grid, math.prod(shape)) == expected).all()


@given(axes.flatmap(lambda drawn: st.tuples(st.just(drawn), st.permutations(range(len(drawn))))))
def test_memory_order_finds_the_order_of_dense_data(drawn):
    axes, order = drawn
    shape = [extent + 1 for extent, _ in axes]
    x = np.empty([shape[axis] for axis in order], np.uint8).transpose(np.argsort(order))
    assert memory_order(x.shape, x.strides) == [axis for axis in order if x.shape[axis] > 1]


def test_memory_order_of_gaps_is_none():
    for x in (np.empty((4, 6))[:, :3], np.empty((4, 6))[::2], np.empty(6)[::-1]):
        assert memory_order(x.shape, [stride // x.itemsize for stride in x.strides]) is None


def test_canonical_forms():
    for axes, expected in (
        ([(8, 3), (5, 0), (5, 0), (3, 1)], Grid(8, 25, 3)),
        ([(7, 0), (16, 5), (5, 1)], Grid(1, 7, 80)),
        ([(16, 5), (7, 0), (5, 1)], Grid(16, 7, 5)),
        ([(7, 0), (5, 1), (16, 5)], None),
    ):
        assert Grid.over(axes) == expected
    for shape, cells, expected in (
        ((1, 1), (1, 1), Grid(1, 1, 1)),
        ((4, 5, 6), (4, 5, 6), Grid(1, 1, 120)),
        ((8, 3, 5, 5), (8, 3, 1, 1), Grid(24, 25, 1)),
        ((8, 5, 5, 3), (8, 1, 1, 3), Grid(8, 25, 3)),
        ((9, 4, 6), (1, 4, 6), Grid(1, 9, 24)),
        ((2, 3, 4, 5, 6), (2, 1, 4, 1, 6), Grid(4, 5, 6, ((2, 24), (3, 0)))),
    ):
        assert Grid.of(shape, cells) == expected


def test_grid_in_memory_declines_many_small_pieces():
    """A call for each piece would take longer than a copy. The first case is a transposed batch of tokens."""
    assert Grid.in_memory((1000, 64, 64), (64, 64_000, 1), (1000, 64, 1)) is None
    assert Grid.in_memory((2, 100, 1 << 14), (100 << 14, 1 << 14, 1), (2, 100, 1)) == Grid(200, 1 << 14, 1)
    large = Grid.in_memory((2, 3, 1 << 14), (1 << 14, 2 << 14, 1), (2, 3, 1))
    assert large is not None
    assert len(list(large.pieces())) == 6

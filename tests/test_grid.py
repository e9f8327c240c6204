"""Grids against NumPy's own broadcasting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdrop.grid import Grid

axes = st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=7)


def cells_of(grid, elements):
    """The cell of each element, from the pieces and their extents; -1 where no piece reaches."""
    cells = np.full(elements, -1)
    o, _, i = np.ogrid[: grid.outer, : grid.repeat, : grid.inner]
    piece = np.broadcast_to(o * grid.inner + i, (grid.outer, grid.repeat, grid.inner)).reshape(-1)
    for start, cell in grid.pieces():
        assert (cells[start : start + grid.size] == -1).all()
        cells[start : start + grid.size] = cell + piece
    return cells


@given(axes)
def test_grid_pieces_match_broadcasting(axes):
    shape = tuple(extent for extent, _ in axes)
    cells_shape = tuple(1 if shared else extent for extent, shared in axes)
    cells = np.arange(math.prod(cells_shape)).reshape(cells_shape)
    expected = np.broadcast_to(cells, shape).reshape(-1)
    grid = Grid.of(shape, cells_shape)
    assert (cells_of(grid, math.prod(shape)) == expected).all()
    assert grid.size * math.prod(extent for extent, _ in grid.lead) == math.prod(shape)


@given(axes)
def test_grid_merges_neighbours(axes):
    """Shared and separate axes alternate in the loop over pieces, and no extent of 1 is looped over."""
    shape = tuple(extent for extent, _ in axes)
    grid = Grid.of(shape, tuple(1 if shared else extent for extent, shared in axes))
    kinds = [shared for _, shared in grid.lead]
    assert all(a != b for a, b in itertools.pairwise(kinds))
    assert all(extent != 1 for extent, _ in grid.lead)


@pytest.mark.parametrize(
    ("shape", "cells", "expected"),
    [
        ((), (), Grid(1, 1, 1)),
        ((1, 1), (1, 1), Grid(1, 1, 1)),
        ((4, 5, 6), (4, 5, 6), Grid(1, 1, 120)),
        ((8, 3, 5, 5), (8, 3, 1, 1), Grid(24, 25, 1)),
        ((8, 5, 5, 3), (8, 1, 1, 3), Grid(8, 25, 3)),
        ((9, 4, 6), (1, 4, 6), Grid(1, 9, 24)),
        ((16, 7, 5), (16, 1, 1), Grid(16, 35, 1)),
        ((2, 3, 4, 5), (1, 3, 1, 5), Grid(3, 4, 5, ((2, True),))),
        ((2, 3, 4, 5, 6), (2, 1, 4, 1, 6), Grid(4, 5, 6, ((2, False), (3, True)))),
    ],
    ids=str,
)
def test_grid_canonical_forms(shape, cells, expected):
    assert Grid.of(shape, cells) == expected

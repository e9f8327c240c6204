"""dilate_bits makes blocks of dropped cells: axis by axis, it is the max-pool of what is dropped."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core.mask import word_count

SHAPES = ((3, 2, 40), (2, 3, 9, 11), (5, 1, 30, 64), (2, 2, 5, 6, 7), (1, 1, 1, 1), (64, 4, 1, 3), (2, 2, 40, 1))


def dropped(shape, p, seed=0):
    return np.random.default_rng(seed).random(shape) < p


def widened(module, drop, block, axes):
    """By dilate_bits, along one axis after the other."""
    words, shape = fd.PackedMask.from_bool(~drop, 0.1).words, list(drop.shape)
    for axis in axes:
        outer, n, inner = int(np.prod(shape[:axis])), shape[axis], int(np.prod(shape[axis + 1 :]))
        shape[axis] = n + block - 1
        to = np.empty(word_count(int(np.prod(shape))), np.uint32)
        module.dilate_bits(to, words, outer, n, inner, block)
        words = to
    return ~fd.PackedMask(words, tuple(shape), 0.1).to_bool()


def max_pooled(drop, block):
    """Windows of ``block`` along each spatial axis, over what is dropped and block - 1 cells of padding around."""
    spatial = drop.ndim - 2
    padded = np.pad(drop, [(0, 0), (0, 0), *[(block - 1, block - 1)] * spatial])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (block,) * spatial, tuple(range(2, drop.ndim)))
    return windows.max(tuple(range(drop.ndim, windows.ndim)))


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_dilating_each_axis_is_max_pooling(variant, block):
    for shape, p in itertools.product(SHAPES, (0.3, 0.02, 0.0, 1.0)):
        drop = dropped(shape, p)
        assert (widened(variant, drop, block, range(2, drop.ndim)) == max_pooled(drop, block)).all(), (shape, p)


def test_dilating_agrees_with_torch(variant):
    torch = pytest.importorskip("torch")
    drop, block = dropped((4, 3, 21, 34), 0.05), 5
    pooled = torch.nn.functional.max_pool2d(
        torch.nn.functional.pad(torch.from_numpy(drop).float(), [block - 1] * 4), block, stride=1
    )
    assert (widened(variant, drop, block, (2, 3)) == pooled.numpy().astype(bool)).all()


def test_order_of_axes_does_not_matter(variant):
    drop = dropped((2, 3, 7, 10, 13), 0.01)
    results = [widened(variant, drop, 4, axes) for axes in itertools.permutations((2, 3, 4))]
    assert all((result == results[0]).all() for result in results)


def test_blocks_of_two_widths_are_one_of_their_sum(variant):
    """Cells 0 to a - 1 on, then 0 to b - 1: 0 to a + b - 2."""
    drop = dropped((5, 200, 3), 0.01)
    for a, b in ((1, 6), (2, 3), (5, 5), (64, 30)):
        twice = widened(variant, widened(variant, drop, a, [1]), b, [1])
        assert (twice == widened(variant, drop, a + b - 1, [1])).all()


def test_a_cell_becomes_a_block(variant):
    """A block of cells for each dropped one, whole even at the borders, and nothing else."""
    block, shape = 3, (2, 2, 4, 5)
    for cell in np.ndindex(shape):
        drop = np.zeros(shape, bool)
        drop[cell] = True
        wider = widened(variant, drop, block, (2, 3))
        n, c, i, j = cell
        assert wider[n, c, i : i + block, j : j + block].all()
        assert wider.sum() == block**2

"""Plain dropout and masks in the NumPy API: rounding, and the odd kinds of input.

What plain dropout has in common with the other kinds is tested in test_variants.py, whose table has it as a row.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core.random import threshold

from ..cases import DTYPES, TOLERANCE, assert_same_bits

FLOAT32 = DTYPES[0]


def test_dropout_matches_float64_within_tolerance(variant, dtype):
    """Compares with NumPy's arithmetic, up to the rounding of a scale and a product."""
    x = dtype.numbers(10_000)
    y, mask = fd.dropout(x, 0.1, rng=0)
    wanted = x.astype(np.float64) / (1 - threshold(0.1) / 2**32) * mask.to_bool()
    np.testing.assert_allclose(y.astype(np.float64), wanted, rtol=TOLERANCE[dtype.name], atol=0)


@pytest.mark.every_backend
def test_16_bits_equal_the_numpy_backend(variant):
    """Also under shared decisions of each orientation, from a seed, and at p without a draw."""
    dtype = DTYPES[3]
    x = np.resize(dtype.specials().view(dtype.public), (9, 700))
    cases = (0.1, None, "bits"), (1e-6, (1, None), "seed"), (1.0, (None, 1), "bits"), (0.5, (None, 1), "seed")

    def results():
        for p, noise_shape, store in cases:
            y, mask = fd.dropout(x.T, p, rng=7, noise_shape=noise_shape, store=store)
            yield from (y, fd.dropout_backward(x.T, mask))

    with fd.use_backend("numpy"):
        wanted = list(results())
    for actual, want in zip(results(), wanted, strict=True):
        assert_same_bits(actual, want)


def test_dropout_out_may_interleave_with_x(variant):
    """Odd and even elements of one buffer do not overlap."""
    both = FLOAT32.numbers(2000)
    source = both[::2].copy()
    y, _ = fd.dropout(both[::2], 0.3, rng=0, out=both[1::2])
    assert_same_bits(y, fd.dropout(source, 0.3, rng=0)[0])
    assert_same_bits(both[::2], source)


def test_dropout_of_arrays_that_repeat_or_may_not_be_written(variant):
    row = FLOAT32.numbers(33)
    y, mask = fd.dropout(np.broadcast_to(row, (40, 33)), 0.5, rng=0)
    assert_same_bits(y, fd.dropout(np.tile(row, (40, 1)), 0.5, rng=0)[0])
    assert len(np.unique(mask.to_bool(), axis=0)) > 1
    row.flags.writeable = False
    assert_same_bits(fd.dropout(row, 0.5, rng=0)[0], fd.dropout(row.copy(), 0.5, rng=0)[0])


def test_lists_and_scalars_are_arrays(variant):
    for do_nothing in (fd.dropout([1.0, 2.0], 0.0)[0], fd.dropout_backward([1.0, 2.0], None)):
        assert do_nothing.tolist() == [1.0, 2.0]
    assert fd.dropout(np.float32(3), 0.5, rng=0)[0].dtype == np.float32
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    for op in (fd.dropout, fd.gaussian_dropout, lambda x, p, rng: fd.drop_block(x, p, 2, rng=rng)):
        y, mask = op(x.tolist(), 0.3, rng=0)
        assert_same_bits(y, op(x, 0.3, rng=0)[0])
        assert_same_bits(fd.dropout_backward(x.tolist(), mask), fd.dropout_backward(x, mask))


def test_backward_without_a_mask_is_dy_itself(variant):
    dy = FLOAT32.numbers((4, 5))
    assert fd.dropout_backward(dy, None) is dy
    out = np.empty_like(dy)
    assert fd.dropout_backward(dy, None, out=out) is out
    assert_same_bits(out, dy)


def test_draw_mask_takes_shapes_of_any_kind_and_draws_shards(variant):
    for shape in (5, [5], np.array([5]), (np.int64(5),)):
        assert fd.draw_mask(shape, 0.5, rng=0) == fd.draw_mask((5,), 0.5, rng=0)
    whole = fd.draw_mask(10_000, 0.1, rng=0).to_bool()
    for first in (1, 512, 9999, 10_000):
        shard = fd.draw_mask(10_000 - first, 0.1, rng=0, first_cell=first)
        assert (shard.to_bool() == whole[first:]).all(), first
    fd.manual_seed(6)
    assert fd.draw_mask(500, 0.5) == fd.draw_mask(500, 0.5, rng=6)
    assert fd.draw_mask(500, 0.5) == fd.draw_mask(500, 0.5, rng=fd.Stream(6, 1))

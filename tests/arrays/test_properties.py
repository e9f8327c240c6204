"""Dropout of random shapes, layouts and shared axes, against NumPy's arithmetic on the mask as booleans."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as st

import fastdrop as fd
from fastdrop.core.random import keep_scale, threshold

from ..cases import DTYPES, assert_same_bits

SEEDS = st.integers(0, 2**64 - 1)
PROBABILITIES = st.one_of(
    st.sampled_from([0.0, 1e-10, 1e-6, 0.003, 3 / 256, 0.1, 1 / 3, 0.5, 0.75, 0.999, 1.0]), st.floats(0, 1)
)
SHAPES = st.lists(st.integers(0, 7), max_size=5).map(tuple)


@st.composite
def laid_out(draw, values):
    """values in memory of some other order, stride and direction: equal by logical index."""
    order = draw(st.permutations(range(values.ndim)))
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in order]
    flips = [draw(st.booleans()) for _ in order]
    base = np.zeros([values.shape[axis] * step for axis, step in zip(order, steps, strict=True)], values.dtype)
    view = base[(..., *(slice(None, None, step) for step in steps))]
    view = view[(..., *(slice(None, None, -1 if flip else 1) for flip in flips))]
    view = view.transpose(np.argsort(order)) if order else view
    view[...] = values
    return view


@st.composite
def noise_shapes(draw, shape):
    """(noise_shape as a user writes it, the mask's shape)."""
    if draw(st.booleans()):
        return None, shape
    entries = [draw(st.sampled_from(["shared", "none", "full"])) for _ in shape]
    written = tuple({"shared": 1, "none": None, "full": e}[kind] for kind, e in zip(entries, shape, strict=True))
    return written, tuple(1 if kind == "shared" else e for kind, e in zip(entries, shape, strict=True))


@given(data=st.data(), shape=SHAPES, p=PROBABILITIES, seed=SEEDS)
def test_dropout_agrees_with_numpy(variant, dtype, data, shape, p, seed):
    cut = threshold(p)
    scaling, store = data.draw(st.sampled_from(["inverted", "standard"])), data.draw(st.sampled_from(["bits", "seed"]))
    written, cells = data.draw(noise_shapes(shape))
    x, dy = dtype.numbers(shape, seed=1), dtype.numbers(shape, seed=2)
    source, gradient = data.draw(laid_out(x)), data.draw(laid_out(dy))
    out = data.draw(st.one_of(st.none(), laid_out(np.full_like(x, np.nan))))

    y, mask = fd.dropout(source, p, noise_shape=written, scaling=scaling, store=store, rng=seed, out=out)
    dx = fd.dropout_backward(gradient, mask)

    keep = fd.draw_mask(cells, p, rng=seed).to_bool()
    scale = 1.0 if scaling == "standard" else keep_scale(cut)
    for result, values in ((y, x), (dx, dy)):
        assert_same_bits(result, np.where(keep, dtype.rounded(values, scale), np.zeros((), x.dtype)))
    assert_same_bits(source, x)
    assert_same_bits(gradient, dy)
    if out is not None:
        assert y is out
    if cut == 0:
        assert mask is None
        assert y is (source if out is None else out)


@given(data=st.data(), shape=SHAPES, p=PROBABILITIES, seed=SEEDS)
def test_dropout_in_place_agrees_with_a_copy(variant, data, shape, p, seed):
    dtype = data.draw(st.sampled_from(DTYPES[:3]))
    written, _ = data.draw(noise_shapes(shape))
    store = data.draw(st.sampled_from(["bits", "seed"]))
    x = data.draw(laid_out(dtype.numbers(shape)))
    y, _ = fd.dropout(x, p, noise_shape=written, rng=seed)
    y = y.copy()
    assert fd.dropout(x, p, noise_shape=written, rng=seed, store=store, out=x)[0] is x
    assert_same_bits(x, y)


@given(
    n=st.integers(0, 3000),
    p=PROBABILITIES,
    seed=SEEDS,
    first=st.one_of(st.integers(0, 2000), st.just(2**37 - 700), st.integers(0, 2**64 - 3001)),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
)
def test_shards_tile_the_whole_mask(variant, n, p, seed, first, cuts):
    whole = fd.draw_mask(n, p, rng=seed, first_cell=first).to_bool()
    borders = [0, *sorted(cut for cut in cuts if cut <= n), n]
    shards = [
        fd.draw_mask(stop - start, p, rng=seed, first_cell=first + start).to_bool()
        for start, stop in itertools.pairwise(borders)
    ]
    assert (np.concatenate(shards) == whole).all()


@given(shape=SHAPES, other=SHAPES, p=PROBABILITIES, seed=SEEDS)
def test_mask_depends_on_the_logical_index_alone(shape, other, p, seed):
    """The same cells under another shape are the same bits."""
    assume(math.prod(shape) <= math.prod(other))
    n = math.prod(shape)
    mask, longer = fd.draw_mask(shape, p, rng=seed), fd.draw_mask(other, p, rng=seed)
    assert (mask.to_bool().reshape(-1) == longer.to_bool().reshape(-1)[:n]).all()


@given(p=st.floats(0, 1), q=st.floats(0, 1), seed=SEEDS)
@example(p=0.0, q=1.0, seed=0)
def test_masks_are_nested_in_p(p, q, seed):
    low, high = (fd.draw_mask(300, r, rng=seed).to_bool() for r in sorted((p, q)))
    assert (high <= low).all()

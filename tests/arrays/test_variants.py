"""The whole family in the NumPy API: what each kind drops, multiplies, keeps and hands back, on every variant."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

import fastdrop as fd
from fastdrop.core.random import NOISE_DOMAIN, keep_scale, philox4x32_10, threshold

from ..cases import DTYPES, GRAIN, VARIANTS, activated, assert_same_bits, bits_of
from .test_properties import laid_out
from .variant_cases import BLOCKS, DENSE, KINDS, LAYOUTS, MASKED, SCALINGS, STORES, drawn, in_blocks, layouts, under

P = (0.5, 0.1, 1 / 3, 0.999, 1.0)
MASKS = (fd.PackedMask, fd.SeededMask)

kinds_of_all = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
kinds_of_masks = pytest.mark.parametrize("kind", MASKED.values(), ids=MASKED)
kinds_of_blocks = pytest.mark.parametrize("kind", BLOCKS.values(), ids=BLOCKS)


def wide(x):
    return x.astype(np.float64)


# ---- worked numbers ----

# Hidden activations of the domain, p = 0.5, units 0 and 2 kept: each kind where its cells are these four.
HIDDEN = np.array([0.36, 0.13, 0.42, 0.25])
GRADIENT = np.array([0.3, -0.1, 0.2, -0.05])
UNITS = [True, False, True, False]
WORKED = {
    "dropout": (fd.dropout, HIDDEN.shape, {}),
    "drop_connect": (fd.drop_connect, (2, 2), {}),
    "feature_dropout": (fd.feature_dropout, (2, 2), {}),
    "feature_dropout, channels last": (fd.feature_dropout, (1, 1, 4), {"channel_axis": -1}),
    "variational_dropout": (fd.variational_dropout, (1, 4), {"time_axis": 0}),
    "stochastic_depth": (fd.stochastic_depth, (4, 1), {"mode": "row"}),
}
worked = pytest.mark.parametrize(("op", "shape", "arguments"), WORKED.values(), ids=WORKED)


@pytest.fixture(scope="module")
def units_seed():
    """A seed that keeps just those units."""
    return next(seed for seed in itertools.count() if drawn(4)(0.5, seed).tolist() == UNITS)


@worked
def test_worked_forward(variant, units_seed, op, shape, arguments):
    a = HIDDEN.reshape(shape)
    for store in STORES:
        y, _ = op(a, p=0.5, rng=units_seed, store=store, **arguments)
        assert y.ravel().tolist() == [0.72, 0, 0.84, 0]
        y, _ = op(a, p=0.5, rng=units_seed, store=store, scaling="standard", **arguments)
        assert y.ravel().tolist() == [0.36, 0, 0.42, 0]


@worked
def test_worked_evaluation(variant, op, shape, arguments):
    a = HIDDEN.reshape(shape)
    assert op(a, p=0.5, training=False, **arguments)[0] is a
    y, _ = op(a, p=0.5, training=False, scaling="standard", **arguments)
    assert y.ravel().tolist() == (HIDDEN * 0.5).tolist()


@worked
def test_worked_gradient(variant, units_seed, op, shape, arguments):
    for store in STORES:
        _, mask = op(HIDDEN.reshape(shape), p=0.5, rng=units_seed, store=store, **arguments)
        assert fd.dropout_backward(GRADIENT.reshape(shape), mask).ravel().tolist() == [0.6, 0, 0.4, 0]


@worked
def test_worked_mean_over_masks(variant, op, shape, arguments):
    masks = fd.Stream(0)
    mean = np.mean([op(HIDDEN.reshape(shape), p=0.5, rng=masks, **arguments)[0].ravel() for _ in range(1000)], axis=0)
    assert np.abs(mean - HIDDEN).max() < 0.02


def test_worked_drop_block(variant, units_seed):
    """Two of four cells are kept, so the count gives the same scale."""
    a = HIDDEN.reshape(1, 1, 4)
    y, mask = fd.drop_block(a, 0.5, 1, rng=units_seed)
    assert y.ravel().tolist() == [0.72, 0, 0.84, 0]
    assert fd.dropout_backward(GRADIENT.reshape(1, 1, 4), mask).ravel().tolist() == [0.6, 0, 0.4, 0]
    assert fd.drop_block(a, 0.5, 1, training=False)[0] is a


def test_worked_alpha_dropout(variant, units_seed):
    """Klambauer et al. for p = 0.5: a = (1/2 + f**2 / 4) ** -1/2, b = -a f / 2."""
    floor = -1.7580993408473766
    a = (0.5 + floor**2 / 4) ** -0.5
    b = -a * floor / 2
    for op, shape in ((fd.alpha_dropout, (4,)), (fd.feature_alpha_dropout, (2, 2))):
        y, mask = op(HIDDEN.reshape(shape), 0.5, rng=units_seed)
        wanted = np.where(UNITS, a * HIDDEN + b, a * floor + b)
        np.testing.assert_allclose(y.ravel(), wanted, rtol=1e-14)
        dx = fd.dropout_backward(GRADIENT.reshape(shape), mask).ravel()
        np.testing.assert_allclose(dx, np.where(UNITS, a * GRADIENT, 0), rtol=1e-14)
        assert not bits_of(dx)[[1, 3]].any()


def test_worked_average_of_all_thinned_weights_is_the_full_one(variant):
    """All 16 masks of four connections, at p = 0.5, in numbers that float64 holds exactly."""
    w = np.array([[1.5, -2.0], [0.625, 4.0]])
    keeps = itertools.product([True, False], repeat=4)
    thinned = [fd.apply_mask(w, fd.PackedMask.from_bool(np.reshape(keep, (2, 2)), 0.5)) for keep in keeps]
    assert len(thinned) == 16
    assert (np.mean(thinned, axis=0) == w).all()


# ---- what is dropped, what becomes of it, and the gradient ----


@kinds_of_masks
def test_forward_and_backward_are_their_law(variant, dtype, kind):
    x, dy = dtype.numbers(kind.shape), dtype.numbers(kind.shape, seed=1)
    before = x.copy(), dy.copy()
    for p, options in itertools.product(P, kind.options()):
        keep = kind.keep(p, 5)
        a, b, c = kind.affine(p, keep, options.get("scaling", "alpha"))
        y, mask = kind.call(x, p=p, rng=5, **options)
        what = p, options
        assert type(mask) is MASKS[options.get("store") == "seed"], what
        assert (mask.shape, mask.p, mask.scale) == (keep.shape, p, a), what
        assert_same_bits(y, under(dtype, x, keep, a, b, c), ("y", what))
        assert_same_bits(fd.dropout_backward(dy, mask), under(dtype, dy, keep, a), ("dx", what))
        assert_same_bits(fd.apply_mask(dy, mask), under(dtype, dy, keep, a), ("apply_mask", what))
        if isinstance(mask, fd.PackedMask):
            assert (mask.to_bool() == keep).all(), what
            assert mask.nbytes == -(-keep.size // 32) * 4, what
        else:
            assert mask.nbytes == 0
            assert (fd.draw_mask(mask.shape, p, rng=fd.Stream(mask.seed, mask.offset)).to_bool() == keep).all(), what
    assert_same_bits(x, before[0], "x must stay")
    assert_same_bits(dy, before[1], "dy must stay")


@kinds_of_all
def test_gradient_matches_finite_differences(variant, kind):
    rng, h = np.random.default_rng(0), 2.0**-10
    x, dy = rng.normal(size=kind.shape), rng.normal(size=kind.shape)
    picked = list(np.ndindex(x.shape))[:: max(1, x.size // 60)]
    for options in kind.options():
        _, mask = kind.call(x, p=0.4, rng=9, **options)
        numeric = []
        for index in picked:
            step = np.zeros_like(x)
            step[index] = h
            up, down = (kind.call(x + side * step, p=0.4, rng=9, **options)[0] for side in (1, -1))
            numeric.append(((up - down) * dy).sum() / (2 * h))
        dx = fd.dropout_backward(dy, mask)
        np.testing.assert_allclose([dx[index] for index in picked], numeric, rtol=1e-9, atol=1e-10)


@kinds_of_masks
def test_dropped_infinities_and_nans_leave_no_trace(variant, kind):
    for dtype, p, options in itertools.product(DTYPES, (0.3, 1.0), kind.options()):
        x = np.resize(np.array([np.inf, -np.inf, np.nan]), kind.shape).astype(dtype.public)
        keep = np.broadcast_to(kind.keep(p, 2), kind.shape)
        _, _, c = kind.affine(p, keep, options.get("scaling", "alpha"))
        y, mask = kind.call(x, p=p, rng=2, **options)
        dx = fd.dropout_backward(x, mask)
        assert not keep.all()
        assert_same_bits(y[~keep], np.full_like(y[~keep], c), (dtype.name, p, options))
        assert not bits_of(dx[~keep]).any()
        assert not np.isfinite(wide(y[keep])).any()
        assert not np.isfinite(wide(dx[keep])).any()


@kinds_of_masks
def test_everything_dropped_is_zero(variant, kind):
    """p = 1: no NaN even from infinities, and no floor of SELU's either, as in torch."""
    for dtype, options in itertools.product(DTYPES, kind.options()):
        x = np.full(kind.shape, np.inf).astype(dtype.public)
        y, mask = kind.call(x, p=1.0, rng=0, **options)
        assert not bits_of(y).any(), (dtype.name, options)
        assert not bits_of(fd.dropout_backward(x, mask)).any(), (dtype.name, options)
        assert mask.scale == (1.0 if options.get("scaling") == "standard" else 0.0)


@kinds_of_all
def test_what_drops_nothing_is_x_itself(kind):
    stream = fd.Stream(0)
    undrawn = ({"p": 0.0}, {"p": 0}, {"p": 0.4, "training": False}, {"p": 0.0, "training": False})
    for dtype, how, options in itertools.product(DTYPES, undrawn, kind.options()):
        if options.get("scaling") == "standard" and how["p"]:
            continue
        x = dtype.numbers(kind.shape).T.copy().T
        y, mask = kind.call(x, rng=stream, **how, **options)
        assert y is x
        assert mask is None
        out = np.full_like(x, np.nan)
        assert kind.call(x, rng=stream, out=out, **how, **options)[0] is out
        assert_same_bits(out, x)
    assert stream.offset == 0


@kinds_of_masks
def test_a_p_that_rounds_to_0_drops_nothing(kind):
    x = np.ones(kind.shape)
    y, mask = kind.call(x, p=1e-10)
    assert y is x
    assert mask is None


@kinds_of_masks
def test_a_p_that_rounds_to_1_drops_everything(kind):
    y, mask = kind.call(np.full(kind.shape, np.inf), p=1.0 - 2.0**-34, rng=0)
    dropped = mask.to_bool() == 0
    assert not y[np.broadcast_to(dropped, y.shape)].any()
    assert kind.shape != mask.shape or kind in BLOCKS.values() or dropped.all()


@pytest.mark.parametrize("name", [name for name, kind in MASKED.items() if kind.scalings])
def test_standard_evaluation_multiplies_by_the_realised_keep_probability(variant, name):
    """At p = 1 by nothing: zeros."""
    kind = MASKED[name]
    for dtype, p, store in itertools.product(DTYPES, (0.1, 1 / 3, 1.0), STORES):
        x = dtype.numbers(kind.shape)
        for out in (None, np.full_like(x, np.nan)):
            y, mask = kind.call(x, p=p, training=False, scaling="standard", store=store, out=out)
            assert mask is None
            assert out is None or y is out
            assert_same_bits(y, under(dtype, x, p < 1, 1 - threshold(p) / 2**32), (dtype.name, p))


# ---- layouts ----


@kinds_of_all
def test_results_follow_the_logical_index(variant, kind):
    """Whatever the memory of x; the result lies as x does where that has no gaps."""
    for dtype, options in itertools.product(DTYPES, kind.options()):
        x, dy = dtype.numbers(kind.shape), dtype.numbers(kind.shape, seed=1)
        y, mask = kind.call(x, p=0.3, rng=4, **options)
        dx = fd.dropout_backward(dy, mask)
        for layout, other, gradient in zip(LAYOUTS, layouts(x).values(), layouts(dy).values(), strict=True):
            z, other_mask = kind.call(other, p=0.3, rng=4, **options)
            other_dx = fd.dropout_backward(gradient, other_mask)
            what = dtype.name, options, layout
            assert other_mask == mask, what
            assert_same_bits(z, y, what)
            assert_same_bits(other_dx, dx, what)
            assert_same_bits(other, x, what)
            if layout in DENSE:
                assert z.strides == other.strides, what
                assert other_dx.strides == gradient.strides, what


@kinds_of_all
def test_out_of_any_layout(variant, kind):
    """The same as x or another."""
    for dtype, source in itertools.product(DTYPES, DENSE):
        x = layouts(dtype.numbers(kind.shape))[source]
        y, mask = kind.call(x, p=0.3, rng=4)
        dx = fd.dropout_backward(x, mask)
        for layout in LAYOUTS:
            for call, wanted in (
                (lambda x, out: kind.call(x, p=0.3, rng=4, out=out)[0], y),
                (lambda x, out, mask=mask: fd.dropout_backward(x, mask, out=out), dx),
            ):
                out = layouts(np.full_like(x, np.nan, order="C"))[layout]
                assert call(x, out) is out
                assert_same_bits(out, wanted, (dtype.name, source, layout))


@kinds_of_all
def test_in_place(variant, kind):
    """out may be x itself, or another view of the same elements."""
    for dtype, options in itertools.product(DTYPES, kind.options()):
        source = dtype.numbers(kind.shape)
        y, mask = kind.call(source, p=0.3, rng=4, **options)
        dx = fd.dropout_backward(source, mask)
        for layout, view in itertools.product(LAYOUTS, (lambda x: x, lambda x: x[:])):
            x = layouts(source)[layout]
            kind.call(x, p=0.3, rng=4, out=view(x), **options)
            assert_same_bits(x, y, (dtype.name, options, layout))
            x = layouts(source)[layout]
            fd.dropout_backward(x, mask, out=view(x))
            assert_same_bits(x, dx, (dtype.name, options, layout))


@kinds_of_all
def test_out_writes_between_the_lines_of_others(variant, kind):
    """An out that is every second column leaves the columns between alone."""
    for dtype in DTYPES:
        x = dtype.numbers(kind.shape)
        broad = np.full((*kind.shape[:-1], 2 * kind.shape[-1]), 7).astype(dtype.public)
        y, _ = kind.call(x, p=0.3, rng=4, out=broad[..., ::2])
        assert_same_bits(y, kind.call(x, p=0.3, rng=4)[0])
        assert (wide(broad[..., 1::2]) == 7).all()


@kinds_of_all
def test_results_are_memory_of_their_own(kind):
    x = np.ones(kind.shape)
    y, mask = kind.call(x, p=0.3, rng=0)
    assert not np.shares_memory(x, y)
    assert not np.shares_memory(y, fd.dropout_backward(y, mask))


@kinds_of_all
def test_lists_are_arrays_of_float64(kind):
    x = np.random.default_rng(0).normal(size=kind.shape)
    y, mask = kind.call(x.tolist(), p=0.3, rng=0)
    assert_same_bits(y, kind.call(x, p=0.3, rng=0)[0])
    assert_same_bits(fd.dropout_backward(x.tolist(), mask), fd.dropout_backward(x, mask))


# ---- extents of 0 and 1 ----

DEGENERATE = [
    (0, 3, 4, 5),
    (2, 0, 4, 5),
    (2, 3, 0, 5),
    (2, 3, 4, 0),
    (1, 3, 4, 5),
    (2, 1, 1, 5),
    (1, 1, 1, 1),
    (0, 0, 0, 0),
]


@pytest.mark.parametrize("shape", DEGENERATE, ids=str)
def test_extents_of_0_and_1(variant, dtype, shape):
    x = dtype.numbers(shape)
    n, c, _, w = shape
    calls = {
        "feature": (lambda **o: fd.feature_dropout(x, 0.5, **o), (n, c, 1, 1)),
        "feature, channels last": (lambda **o: fd.feature_dropout(x, 0.5, 3, **o), (n, 1, 1, w)),
        "feature, one sample": (lambda **o: fd.feature_dropout(x, 0.5, 0, **o), (n, 1, 1, 1)),
        "variational": (lambda **o: fd.variational_dropout(x, 0.5, 2, **o), (n, c, 1, w)),
        "drop_connect": (lambda **o: fd.drop_connect(x, 0.5, **o), shape),
        "row": (lambda **o: fd.stochastic_depth(x, 0.5, "row", **o), (n, 1, 1, 1)),
        "batch": (lambda **o: fd.stochastic_depth(x, 0.5, "batch", **o), (1, 1, 1, 1)),
    }
    for (name, (call, cells)), store in itertools.product(calls.items(), STORES):
        y, mask = call(rng=3, store=store)
        keep = drawn(*cells)(0.5, 3)
        assert mask.shape == cells, name
        assert_same_bits(y, under(dtype, x, keep, 2.0), name)
        assert_same_bits(fd.dropout_backward(x, mask), under(dtype, x, keep, 2.0), name)
    for op in (fd.alpha_dropout, fd.feature_alpha_dropout, fd.gaussian_dropout):
        y, mask = op(x, 0.5, rng=3)
        assert y.shape == fd.dropout_backward(x, mask).shape == shape
        with fd.use_backend("numpy"):
            assert_same_bits(y, op(x, 0.5, rng=3)[0], op)


@pytest.mark.parametrize("shape", DEGENERATE, ids=str)
@pytest.mark.parametrize("size", [1, 2, (9, 1)], ids=str)
def test_drop_block_extents_of_0_and_1(variant, dtype, shape, size):
    x = dtype.numbers(shape)
    for p in (0.5, 1.0):
        y, mask = fd.drop_block(x, p, size, rng=3)
        if not x.size:
            assert (y.shape, y.dtype, mask.shape, mask.nbytes) == (x.shape, x.dtype, shape, 0)
            assert fd.drop_block(x, p, size, out=x)[0] is x
            state = fd.Stream(3)
            fd.drop_block(x, p, size, rng=state)
            assert state.offset == 1, "takes its number, as of every other kind"
        else:
            keep = in_blocks(shape, size if isinstance(size, tuple) else (size, size))(p, 3)
            assert (mask.to_bool() == keep).all()
            assert_same_bits(y, under(dtype, x, keep, mask.scale))


def test_arrays_without_axes(variant, dtype):
    """What needs none takes them."""
    x = dtype.numbers(())
    for seed in range(10):
        kept = bool(fd.draw_mask((), 0.5, rng=seed).to_bool())
        y, mask = fd.drop_connect(x, 0.5, rng=seed)
        assert_same_bits(y, under(dtype, x, kept, 2.0))
        assert_same_bits(fd.dropout_backward(x, mask), y)
        for op in (fd.alpha_dropout, fd.gaussian_dropout):
            y, mask = op(x, 0.5, rng=seed)
            assert y.shape == mask.shape == ()
            assert_same_bits(y, op(x.reshape(1), 0.5, rng=seed)[0].reshape(()))


# ---- axes ----


@pytest.mark.parametrize("kind", [int, np.int8, np.uint64], ids=lambda kind: kind.__name__)
def test_axes_of_any_integer_type(kind):
    x = np.ones((4, 5, 6))
    assert fd.feature_dropout(x, 0.5, kind(2), rng=0)[1].shape == (4, 1, 6)
    assert fd.variational_dropout(x, 0.5, kind(2), rng=0)[1].shape == (4, 5, 1)


def test_negative_axes_count_from_the_end():
    x = np.random.default_rng(0).normal(size=(4, 5, 6))
    for axis in range(3):
        for call in (fd.feature_dropout, fd.feature_alpha_dropout, fd.variational_dropout):
            (y, mask), (z, other) = call(x, 0.5, axis, rng=1), call(x, 0.5, axis - 3, rng=1)
            assert mask == other
            assert_same_bits(y, z)


def test_channels_first_and_last_are_the_same_but_for_the_axes(variant, dtype):
    """The cells (N, C) are counted alike, so the channels that go are the same."""
    x = dtype.numbers((6, 7, 5, 9))
    for call in (fd.feature_dropout, fd.feature_alpha_dropout):
        y, _ = call(x, 0.4, 1, rng=1)
        z, _ = call(x.transpose(0, 2, 3, 1), 0.4, -1, rng=1)
        assert_same_bits(z.transpose(0, 3, 1, 2), y)


# ---- whole and shared: laws that need no reference ----


def test_feature_dropout_drops_whole_channels():
    y, _ = fd.feature_dropout(np.ones((50, 20, 3, 4)), 0.5, rng=0)
    channels = y.reshape(50, 20, 12)
    assert (channels == channels[:, :, :1]).all()
    assert {*channels.ravel()} == {0.0, 2.0}
    assert len({tuple(row) for row in channels[:, :, 0]}) > 40, "samples decide for themselves"


def test_variational_dropout_holds_one_mask_over_time():
    y, _ = fd.variational_dropout(np.ones((30, 8, 40)), 0.5, 0, rng=0)
    assert (y == y[:1]).all()
    assert len({tuple(sample) for sample in y[0]}) == 8, "sequences have masks of their own"


def test_variational_dropout_of_more_steps_is_the_same_mask():
    """Whatever the length, so that a sequence may be cut."""
    x = np.random.default_rng(0).normal(size=(30, 8, 40))
    y, _ = fd.variational_dropout(x, 0.5, 0, rng=0)
    for part in (slice(0, 11), slice(11, 30)):
        assert_same_bits(fd.variational_dropout(x[part], 0.5, 0, rng=0)[0], y[part])


def test_stochastic_depth_drops_whole_samples():
    y, _ = fd.stochastic_depth(np.ones((100, 6, 7)), 0.5, "row", rng=0)
    assert {*y.reshape(100, -1).sum(1)} == {0.0, 84.0}
    sums = {fd.stochastic_depth(np.ones((100, 6, 7)), 0.5, "batch", rng=seed)[0].sum() for seed in range(20)}
    assert sums == {0.0, 8400.0}


def test_drop_connect_is_dropout_of_the_weight(variant, dtype):
    w = dtype.numbers((37, 53))
    for options in ({}, {"store": "seed"}, {"scaling": "standard"}):
        (y, mask), (z, other) = fd.drop_connect(w, 0.3, rng=3, **options), fd.dropout(w, 0.3, rng=3, **options)
        assert mask == other
        assert_same_bits(y, z)


def test_alpha_dropout_of_the_floor_is_flat(variant):
    """Kept elements at SELU's floor and dropped ones are the same: what is dropped goes there."""
    y, mask = fd.alpha_dropout(np.full(1000, -1.7580993408473766), 0.3, rng=0)
    keep = mask.to_bool()
    np.testing.assert_allclose(y[keep], y[~keep][0], rtol=1e-14)


def test_feature_alpha_dropout_is_alpha_dropout_of_channels(variant):
    x = np.random.default_rng(0).normal(size=(33, 7))
    (y, mask), (z, other) = fd.feature_alpha_dropout(x, 0.3, rng=0), fd.alpha_dropout(x, 0.3, rng=0)
    assert mask == other
    assert_same_bits(y, z)


# ---- DropBlock ----


@kinds_of_blocks
def test_drop_block_drops_full_blocks_only(variant, kind):
    """Each dropped cell lies in a block of dropped cells that lies inside."""
    size = kind.call.keywords["block_size"]
    sizes = size if isinstance(size, tuple) else (size,) * (len(kind.shape) - 2)
    fitting = tuple(min(size, extent) for size, extent in zip(sizes, kind.shape[2:], strict=True))
    axes = tuple(range(2, len(kind.shape)))
    for p in (0.05, 0.3, 0.8):
        dropped = ~kind.call(np.ones(kind.shape), p=p, rng=1)[1].to_bool()
        whole = sliding_window_view(dropped, fitting, axes).all(axis=tuple(range(-len(axes), 0)))
        covered = np.zeros_like(dropped)
        for index in np.argwhere(whole):
            covered[(*index[:2], *(slice(i, i + size) for i, size in zip(index[2:], fitting, strict=True)))] = True
        assert dropped.any()
        assert (covered == dropped).all()


@kinds_of_blocks
def test_drop_block_scales_by_what_is_left(variant, kind):
    """A whole array of ones keeps its sum."""
    for p, seed in itertools.product((0.05, 0.3, 0.8), range(3)):
        y, mask = kind.call(np.ones(kind.shape), p=p, rng=seed)
        assert mask.kept == mask.to_bool().sum()
        assert mask.scale == y.size / mask.kept
        assert math.isclose(y.sum(), y.size, rel_tol=1e-12)


def test_drop_block_of_one_cell_is_dropout(variant, dtype):
    """The mask is; the scale is by count."""
    x = dtype.numbers((3, 4, 7, 9))
    for p in P:
        y, mask = fd.drop_block(x, p, 1, rng=2)
        keep = fd.draw_mask(x.shape, p, rng=2)
        assert (mask.words == keep.words).all()
        assert mask.scale == (x.size / keep.kept if keep.kept else 0.0)
        assert_same_bits(y, under(dtype, x, keep.to_bool(), mask.scale))


def test_drop_block_as_large_as_the_extents_drops_whole_channels(variant, dtype):
    x = dtype.numbers((13, 7, 4, 6))
    for size in ((4, 6), 6, (4, 100)):
        y, mask = fd.drop_block(x, 0.3, size, rng=2)
        channels = fd.draw_mask((13, 7), 0.3, rng=2)
        assert (mask.to_bool() == channels.to_bool()[:, :, None, None]).all()
        assert mask.scale == 13 * 7 / channels.kept
        assert_same_bits(y, under(dtype, x, mask.to_bool(), mask.scale))


@pytest.mark.parametrize("size", [3, np.int64(3), (3, 3), [3, 3], np.array([3, 3])], ids=repr)
def test_drop_block_size_of_any_kind(size):
    x = np.ones((2, 3, 8, 9))
    assert fd.drop_block(x, 0.3, size, rng=0)[1] == fd.drop_block(x, 0.3, 3, rng=0)[1]


@given(data=st.data(), seed=st.integers(0, 2**64 - 1), p=st.one_of(st.sampled_from([0.1, 0.5, 1.0]), st.floats(0, 1)))
def test_drop_block_agrees_with_a_loop_over_blocks(variant, data, seed, p):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=5)))
    sizes = tuple(data.draw(st.integers(1, 10)) for _ in shape[2:])
    dtype = data.draw(st.sampled_from(DTYPES[:3]))
    x = dtype.numbers(shape)
    y, mask = fd.drop_block(data.draw(laid_out(x)), p, sizes, rng=seed)
    keep = in_blocks(shape, sizes)(p, seed)
    if mask is None:
        assert keep.all()
        assert_same_bits(y, x)
    else:
        assert (mask.to_bool() == keep).all()
        assert_same_bits(y, under(dtype, x, keep, keep.size / keep.sum() if keep.any() else 0.0))
        assert_same_bits(fd.dropout_backward(x, mask), y)


# ---- Gaussian ----


def factors(n, p, seed, offset=0):
    """``1 + sigma z`` in float64, from the generator's own numbers and textbook formulas."""
    tiles = -(-n // 64)
    b = np.arange(16 * tiles, dtype=np.uint64)
    counter = b & np.uint64(2**32 - 1), b >> np.uint64(32) | np.uint64(NOISE_DOMAIN), offset % 2**32, offset >> 32
    r0, r1, r2, r3 = (word.astype(np.int64) for word in philox4x32_10(counter, (seed % 2**32, seed >> 32)))
    normals = []
    for radius, angle in ((r0, r1), (r2, r3)):
        r = np.sqrt(-2 * np.log(((radius >> 1) + 0.5) / 2**31))
        t = ((angle << 2 & 2**32 - 1) + 2**31) % 2**32 - 2**31
        t = t * (math.pi / 2**33)  # within a quarter, from its middle
        sine, cosine = np.sin(t), np.cos(t) * np.where(angle >> 31, -1, 1)
        swap = angle >> 30 & 1 == 1
        normals += [r * np.where(swap, sine, cosine), r * np.where(swap, cosine, sine)]
    z = np.stack([normal.reshape(tiles, 16) for normal in normals], axis=1).reshape(-1)[:n]
    return 1 + math.sqrt(p / (1 - p)) * z


@pytest.mark.parametrize("p", [0.5, 0.1, 0.9])
def test_gaussian_dropout_multiplies_by_normal_numbers(variant, p):
    """Those of the formulas, within float32's rounding of a radius up to 6.7."""
    for n in (1, 63, 64, 65, 1000, 20_001):
        y, _ = fd.gaussian_dropout(np.ones(n, np.float32), p, rng=fd.Stream(2**40 + 7, 2**33 + 5))
        np.testing.assert_allclose(y, factors(n, p, 2**40 + 7, 2**33 + 5), rtol=0, atol=1e-5 * math.sqrt(p / (1 - p)))


@pytest.mark.parametrize("p", [1e-300, 0.1, 0.5, 1 - 2.0**-53])
def test_gaussian_dropout_multiplies_by_float32_factors(variant, dtype, p):
    """The same for every dtype, forward and backward; the product in the wider type, rounded once."""
    x, dy = dtype.numbers((6, 7, 41)), dtype.numbers((6, 7, 41), seed=1)
    factor, _ = fd.gaussian_dropout(np.ones((6, 7, 41), np.float32), p, rng=8)
    y, noise = fd.gaussian_dropout(x, p, rng=8)
    for result, values in ((y, x), (fd.dropout_backward(dy, noise), dy), (fd.apply_mask(dy, noise), dy)):
        with np.errstate(over="ignore"):
            wanted = (values.astype(dtype.computed) * factor.astype(dtype.computed)).astype(dtype.public)
        assert_same_bits(result, wanted)
    assert noise == fd.GaussianNoise(8, 0, (6, 7, 41), p)
    assert noise.nbytes == 0


def test_gaussian_noise_made_by_hand_is_noise():
    x = np.random.default_rng(0).normal(size=(5, 40))
    y, _ = fd.gaussian_dropout(x, 0.3, rng=fd.Stream(3, 4))
    assert_same_bits(fd.apply_mask(x, fd.GaussianNoise(3, 4, (5, 40), 0.3)), y)
    assert_same_bits(fd.apply_mask(x, fd.GaussianNoise(3, 4, (5, 40), 0.0)), x)


def test_gaussian_noise_depends_on_the_logical_index_alone(variant):
    flat, _ = fd.gaussian_dropout(np.ones(1000), 0.3, rng=1)
    for shape in ((10, 100), (25, 4, 10), (500, 2)):
        assert_same_bits(fd.gaussian_dropout(np.ones(shape), 0.3, rng=1)[0].ravel(), flat)
    assert_same_bits(fd.gaussian_dropout(np.ones(77), 0.3, rng=1)[0], flat[:77])


def test_gaussian_dropout_shares_no_randomness_with_masks():
    """Where a mask of the same state drops is no guide to the noise."""
    z = fd.gaussian_dropout(np.zeros(1 << 16) + 1, 0.5, rng=1)[0] - 1
    keep = drawn(1 << 16)(0.5, 1)
    assert abs(np.corrcoef(z, keep)[0, 1]) < 5 / 2**8
    assert abs(np.corrcoef(z**2, keep)[0, 1]) < 5 / 2**8


def test_gaussian_dropout_keeps_special_values(variant, dtype):
    """A product: infinities stay, NaNs stay NaNs, zeros stay zeros."""
    x = np.resize(np.array([np.inf, -np.inf, np.nan, 0.0, -0.0]), 500).astype(dtype.public)
    y = wide(fd.gaussian_dropout(x, 0.2, rng=0)[0])
    assert np.isinf(y[0::5]).all()
    assert np.isinf(y[1::5]).all()
    assert np.isnan(y[2::5]).all()
    assert (y[3::5] == 0).all()
    assert (y[4::5] == 0).all()


# ---- masks and noise as objects ----


@kinds_of_all
def test_masks_pickle_and_compare(kind):
    x = np.random.default_rng(0).normal(size=kind.shape)
    for options in kind.options():
        y, mask = kind.call(x, p=0.3, rng=6, **options)
        restored = pickle.loads(pickle.dumps(mask))
        assert restored == mask
        assert_same_bits(fd.dropout_backward(x, restored), fd.dropout_backward(x, mask))
        assert kind.call(x, p=0.3, rng=6, **options)[1] == mask
        assert any(kind.call(x, p=0.3, rng=seed, **options)[1] != mask for seed in range(9))
        assert kind.call(x, p=0.31, rng=6, **options)[1] != mask
        assert y.shape == kind.shape


@kinds_of_all
def test_random_state_of_every_kind(kind):
    """An int is a seed, a Stream takes one offset a call, a Generator gives a seed, None is the process-wide stream."""
    x, stream = np.ones(kind.shape), fd.Stream(3)
    masks = [kind.call(x, p=0.5, rng=stream)[1] for _ in range(3)]
    assert stream.offset == 3
    assert masks == [kind.call(x, p=0.5, rng=fd.Stream(3, offset))[1] for offset in range(3)]
    assert masks[0] == kind.call(x, p=0.5, rng=3)[1] == kind.call(x, p=0.5, rng=np.uint64(3))[1]
    seed = int(np.random.default_rng(8).integers(0, 2**64, dtype=np.uint64))
    assert kind.call(x, p=0.5, rng=np.random.default_rng(8))[1] == kind.call(x, p=0.5, rng=seed)[1]
    fd.manual_seed(6)
    assert [kind.call(x, p=0.5)[1] for _ in range(2)] == [kind.call(x, p=0.5, rng=fd.Stream(6, at))[1] for at in (0, 1)]


@kinds_of_all
def test_p_of_any_real_type(kind):
    for p in (np.float64(0.25), np.float32(0.25), np.array(0.25)):
        _, mask = kind.call(np.ones(kind.shape), p=p, rng=0)
        assert mask == kind.call(np.ones(kind.shape), p=0.25, rng=0)[1]
        assert type(mask.p) is float


# ---- the same everywhere ----


@kinds_of_all
def test_results_equal_the_numpy_backend(compiled, dtype, kind):
    """With whatever special values there are, in C's order and another, and in more than one grain of threads."""
    small = np.resize(dtype.specials().view(dtype.public), kind.shape)
    large = np.resize(dtype.data(3 * GRAIN).view(dtype.public), (larger(kind.shape)))

    def results():
        stream = fd.Stream(77)
        for x in (small, small.copy("F"), large):
            for options in kind.options():
                y, mask = kind.call(x, p=0.1, rng=stream, **options)
                yield y
                yield fd.dropout_backward(x, mask)

    with fd.use_backend("numpy"):
        wanted = list(results())
    for actual, want in zip(results(), wanted, strict=True):
        assert_same_bits(actual, want)


def larger(shape):
    """With a first axis so long that several threads have something to do."""
    return (-(-2 * GRAIN // math.prod(shape[1:])), *shape[1:])


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "numpy"])
@kinds_of_all
def test_any_number_of_threads_gives_the_same_bits(name, threads, kind):
    with activated(name):
        dtype, found = DTYPES[0], []
        x = dtype.numbers(larger(kind.shape))
        for count in (1, 2, 5):
            fd.set_num_threads(count)
            (y, mask), *rest = (kind.call(x, p=0.1, rng=5, **options) for options in kind.options())
            found.append([y, fd.dropout_backward(x, mask), *(y for y, _ in rest)])
        for other in found[1:]:
            for actual, want in zip(other, found[0], strict=True):
                assert_same_bits(actual, want)


# ---- any shape, axis and layout ----

SHARING = {
    "feature": (2, lambda x, p, axis, **o: fd.feature_dropout(x, p, axis, **o)),
    "variational": (1, lambda x, p, axis, **o: fd.variational_dropout(x, p, axis, **o)),
    "row": (1, lambda x, p, axis, **o: fd.stochastic_depth(x, p, "row", **o)),
    "batch": (1, lambda x, p, axis, **o: fd.stochastic_depth(x, p, "batch", **o)),
}


def cells_of(name, shape, axis):
    own = {"feature": {0, axis}, "variational": set(range(len(shape))) - {axis}, "row": {0}, "batch": set()}[name]
    return tuple(extent if at in own else 1 for at, extent in enumerate(shape))


@given(data=st.data(), name=st.sampled_from(list(SHARING)), p=st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
def test_sharing_agrees_with_numpy(variant, data, name, p, seed):
    least, call = SHARING[name]
    dtype = data.draw(st.sampled_from(DTYPES[:3]))
    shape = tuple(data.draw(st.lists(st.integers(0, 7), min_size=least, max_size=5)))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    options = {"scaling": data.draw(st.sampled_from(SCALINGS)), "store": data.draw(st.sampled_from(STORES))}
    x, dy = dtype.numbers(shape, seed=1), dtype.numbers(shape, seed=2)
    out = data.draw(st.one_of(st.none(), laid_out(np.full_like(x, np.nan))))
    y, mask = call(data.draw(laid_out(x)), p, axis, rng=seed, out=out, **options)
    cells = cells_of(name, shape, axis % len(shape))
    keep, scale = drawn(*cells)(p, seed), keep_scale(threshold(p)) if options["scaling"] == "inverted" else 1.0
    assert mask is None or mask.shape == cells
    assert_same_bits(y, under(dtype, x, keep, scale))
    assert_same_bits(fd.dropout_backward(data.draw(laid_out(dy)), mask), under(dtype, dy, keep, scale))

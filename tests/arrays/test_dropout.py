"""The NumPy API: what dropout, its backward pass and masks promise, on every variant."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core.random import keep_scale, threshold

from ..cases import TOLERANCE, assert_same_bits, bits_of

SCALINGS = ("inverted", "standard")
STORES = ("bits", "seed")

# Worked numbers of the domain: a hidden layer of four, p = 0.5, units 0 and 2 kept.
HIDDEN = np.array([0.36, 0.13, 0.42, 0.25])
UNITS = fd.PackedMask.from_bool([True, False, True, False], 0.5)


def expected(dtype, x, keep, scale):
    """x * scale where kept, +0 elsewhere, as the specification rounds it."""
    return np.where(np.broadcast_to(keep, x.shape), dtype.rounded(x, scale), np.zeros((), x.dtype))


# ---- worked numbers ----


def test_worked_forward_inverted(variant):
    assert fd.apply_mask(HIDDEN, UNITS).tolist() == [0.72, 0, 0.84, 0]


def test_worked_forward_standard(variant):
    mask = fd.PackedMask(UNITS.words, UNITS.shape, 0.5, scale=1.0)
    assert fd.apply_mask(HIDDEN, mask).tolist() == [0.36, 0, 0.42, 0]


def test_worked_evaluation(variant):
    inverted, none = fd.dropout(HIDDEN, 0.5, training=False)
    assert inverted is HIDDEN
    assert none is None
    standard, none = fd.dropout(HIDDEN, 0.5, training=False, scaling="standard")
    assert standard.tolist() == (HIDDEN * 0.5).tolist()
    assert none is None


def test_worked_gradient(variant):
    assert fd.dropout_backward([0.3, -0.1, 0.2, -0.05], UNITS).tolist() == [0.6, 0, 0.4, 0]


def test_worked_mean_over_masks(variant):
    masks = fd.Stream(0)
    mean = np.mean([fd.dropout(HIDDEN, 0.5, rng=masks)[0] for _ in range(1000)], axis=0)
    assert np.abs(mean - HIDDEN).max() < 0.02


def test_worked_average_of_all_thinned_networks_is_the_full_one(variant):
    """16 networks of a linear layer: numbers that float64 holds exactly, so that equality is exact."""
    a, weights = np.array([0.375, 0.125, 0.4375, 0.25]), np.array([[1.5, -2.0], [0.5, 4.0], [-1.25, 8.0], [3.0, 0.75]])
    keeps = list(itertools.product([True, False], repeat=4))
    outputs = [fd.apply_mask(a, fd.PackedMask.from_bool(keep, 0.5)) @ weights for keep in keeps]
    assert len(outputs) == 16
    assert (np.mean(outputs, axis=0) == a @ weights).all()


# ---- laws of forward and backward ----


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("p", [0.5, 0.1, 1 / 3, 0.999, 1.0])
def test_dropout_is_mask_times_scale(variant, dtype, p, store, scaling):
    x, dy = dtype.numbers((37, 53)), dtype.numbers((37, 53), seed=1)
    scale = keep_scale(threshold(p)) if scaling == "inverted" else 1.0
    keep = fd.draw_mask(x.shape, p, rng=5).to_bool()
    y, mask = fd.dropout(x, p, scaling=scaling, store=store, rng=5)
    assert y.dtype == x.dtype
    assert (mask.shape, mask.p, mask.scale) == (x.shape, p, scale)
    assert_same_bits(y, expected(dtype, x, keep, scale), "y")
    assert_same_bits(fd.dropout_backward(dy, mask), expected(dtype, dy, keep, scale), "dx")
    assert_same_bits(fd.apply_mask(x, mask), y, "apply_mask")


def test_dropout_matches_float64_within_tolerance(variant, dtype):
    """The one comparison with arithmetic not our own: within the rounding of a scale and a product."""
    x = dtype.numbers(10_000)
    y, mask = fd.dropout(x, 0.1, rng=0)
    wanted = x.astype(np.float64) / (1 - threshold(0.1) / 2**32) * mask.to_bool()
    np.testing.assert_allclose(y.astype(np.float64), wanted, rtol=TOLERANCE[dtype.name], atol=0)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("noise_shape", [None, (6, 1)])
def test_dropout_gradient_matches_finite_differences(variant, store, scaling, noise_shape):
    rng = np.random.default_rng(0)
    x, dy, h = rng.normal(size=(6, 7)), rng.normal(size=(6, 7)), 2.0**-10

    def loss(at):
        y, _ = fd.dropout(at, 0.4, scaling=scaling, store=store, noise_shape=noise_shape, rng=9)
        return (y * dy).sum()

    _, mask = fd.dropout(x, 0.4, scaling=scaling, store=store, noise_shape=noise_shape, rng=9)
    numeric = np.empty_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        numeric[index] = (loss(x + step) - loss(x - step)) / (2 * h)
    np.testing.assert_allclose(fd.dropout_backward(dy, mask), numeric, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("noise_shape", [None, (1, None, 1)])
def test_dropout_seed_store_equals_bits_store(variant, dtype, p, noise_shape):
    x, dy = dtype.numbers((9, 65, 40)), dtype.numbers((9, 65, 40), seed=1)
    (y, packed), (z, seeded) = (
        fd.dropout(x, p, store=store, rng=fd.Stream(3, 8), noise_shape=noise_shape) for store in STORES
    )
    assert isinstance(packed, fd.PackedMask)
    assert isinstance(seeded, fd.SeededMask)
    assert seeded.nbytes == 0
    assert (seeded.seed, seeded.offset) == (3, 8)
    assert_same_bits(y, z)
    assert_same_bits(fd.dropout_backward(dy, packed), fd.dropout_backward(dy, seeded))
    assert fd.draw_mask(seeded.shape, p, rng=fd.Stream(seeded.seed, seeded.offset)) == packed


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropped_infinities_and_nans_are_zero(variant, dtype, p):
    x = np.resize(np.array([np.inf, -np.inf, np.nan, -0.0, -1.0]), 5000).astype(dtype.public)
    y, mask = fd.dropout(x, p, rng=1)
    dx = fd.dropout_backward(x, mask)
    dropped = ~mask.to_bool()
    assert dropped.any()
    assert not bits_of(y)[dropped].any()
    assert not bits_of(dx)[dropped].any()
    assert not np.isfinite(y.astype(np.float64)[~dropped]).all() or p == 1.0


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_dropout_of_everything_is_zero(variant, dtype, store, scaling):
    """p = 1: zeros forward and backward, no NaN even from infinities, and the mask says so."""
    x = np.full((3, 50), np.inf).astype(dtype.public)
    y, mask = fd.dropout(x, 1.0, store=store, scaling=scaling, rng=0)
    assert not bits_of(y).any()
    assert not bits_of(fd.dropout_backward(x, mask)).any()
    assert mask.scale == (0.0 if scaling == "inverted" else 1.0)


def test_standard_evaluation_of_everything_dropped_is_zero(variant, dtype):
    x = np.full(50, np.inf).astype(dtype.public)
    assert not bits_of(fd.dropout(x, 1.0, scaling="standard", training=False)[0]).any()


@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3])
def test_standard_evaluation_multiplies_by_the_realised_keep_probability(variant, dtype, p):
    x = dtype.numbers((11, 13))
    y, mask = fd.dropout(x, p, scaling="standard", training=False)
    assert mask is None
    assert_same_bits(y, dtype.rounded(x, 1 - threshold(p) / 2**32))


@pytest.mark.parametrize(
    "options",
    [
        {"training": False},
        {"p": 0.0},
        {"p": 0},
        {"p": 1e-10},
        {"p": 0.0, "scaling": "standard"},
        {"p": 0.0, "scaling": "standard", "training": False},
        {"p": 0.0, "store": "seed"},
        {"training": False, "noise_shape": (1, None)},
    ],
    ids=str,
)
def test_dropout_that_does_nothing_returns_x_itself(variant, dtype, options):
    x = dtype.numbers((4, 5)).T[::-1]
    options = {"noise_shape": None} | options
    if options["noise_shape"]:
        options["noise_shape"] = (None, 1)
    stream = fd.Stream(0)
    y, mask = fd.dropout(x, **options, rng=stream)
    assert y is x
    assert mask is None
    assert stream.offset == 0
    dy = dtype.numbers(x.shape)
    assert fd.dropout_backward(dy, None) is dy


def test_dropout_that_does_nothing_fills_out(variant, dtype):
    x = dtype.numbers((4, 5))
    for options in ({"training": False}, {"p": 0.0}):
        out = np.empty_like(x)
        y, mask = fd.dropout(x, **options, out=out)
        assert y is out
        assert mask is None
        assert_same_bits(out, x)
    out = np.empty_like(x)
    assert fd.dropout_backward(x, None, out=out) is out
    assert_same_bits(out, x)


# ---- grids ----


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("shape", "noise_shape", "cells"),
    [
        ((8, 3, 5, 5), (None, None, 1, 1), (8, 3, 1, 1)),  # spatial dropout, channels first
        ((8, 5, 5, 3), (8, 1, 1, 3), (8, 1, 1, 3)),  # and last
        ((9, 4, 6), (1, 4, 6), (1, 4, 6)),  # shared along time
        ((16, 7, 5), (None, 1, 1), (16, 1, 1)),  # stochastic depth
        ((3, 4, 5, 6), (1, None, 1, None), (1, 4, 1, 6)),  # needs a loop over pieces
        ((2, 3, 4, 5, 6), (None, 1, None, 1, None), (2, 1, 4, 1, 6)),
        ((50, 60), (1, 1), (1, 1)),
        ((1, 700), (1, None), (1, 700)),
        ((40, 1), (None, None), (40, 1)),
    ],
    ids=str,
)
def test_dropout_noise_shape_broadcasts(variant, dtype, shape, noise_shape, cells, store):
    x, dy = dtype.numbers(shape), dtype.numbers(shape, seed=1)
    y, mask = fd.dropout(x, 0.5, noise_shape=noise_shape, store=store, rng=2)
    keep = fd.draw_mask(cells, 0.5, rng=2).to_bool()
    assert mask.shape == cells
    assert_same_bits(y, expected(dtype, x, keep, 2.0))
    assert_same_bits(fd.dropout_backward(dy, mask), expected(dtype, dy, keep, 2.0))


def test_dropout_noise_shape_draws_one_bit_per_decision(variant):
    _, mask = fd.dropout(np.ones((64, 8, 28, 28), np.float32), 0.5, noise_shape=(None, None, 1, 1), rng=0)
    assert mask.nbytes == 64 * 8 // 8


# ---- layouts ----


def layouts(x):
    """The same logical array in other memory."""
    wide = np.zeros((x.shape[0], 2 * x.shape[1], x.shape[2]), x.dtype)
    wide[:, ::2] = x
    backwards = x[::-1, :, ::-1].copy()
    shifted = np.zeros(x.nbytes + 1, np.uint8)
    shifted[1:] = np.frombuffer(x.tobytes(), np.uint8)
    readonly = x.copy()
    readonly.flags.writeable = False
    return {
        "contiguous": x.copy(),
        "fortran": np.asfortranarray(x),
        "transposed": x.transpose(2, 0, 1).copy().transpose(1, 2, 0),
        "sliced": wide[:, ::2],
        "negative": backwards[::-1, :, ::-1],
        "unaligned": shifted[1:].view(x.dtype).reshape(x.shape),
        "readonly": readonly,
    }


LAYOUTS = tuple(layouts(np.zeros((2, 2, 2))))
WRITEABLE = tuple(name for name in LAYOUTS if name != "readonly")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noise_shape", [None, (1, None, None)])
@pytest.mark.parametrize("store", STORES)
def test_dropout_follows_the_logical_index(variant, dtype, layout, noise_shape, store):
    x = dtype.numbers((5, 6, 37))
    y, mask = fd.dropout(x, 0.3, rng=4, noise_shape=noise_shape)
    other = layouts(x)[layout]
    z, other_mask = fd.dropout(other, 0.3, rng=4, noise_shape=noise_shape, store=store)
    assert_same_bits(z, y)
    assert_same_bits(other, x, "x must stay")
    assert_same_bits(fd.dropout_backward(other, other_mask), y)
    assert_same_bits(fd.apply_mask(other, mask), y)


@pytest.mark.parametrize("layout", WRITEABLE)
@pytest.mark.parametrize("store", STORES)
def test_dropout_out_of_any_layout(variant, dtype, layout, store):
    x = dtype.numbers((5, 6, 37))
    y, mask = fd.dropout(x, 0.3, rng=4)
    for call in (
        lambda out: fd.dropout(x, 0.3, rng=4, store=store, out=out)[0],
        lambda out: fd.dropout_backward(x, mask, out=out),
        lambda out: fd.apply_mask(x, mask, out=out),
    ):
        out = layouts(np.full_like(x, np.nan))[layout]
        assert call(out) is out
        assert_same_bits(out, y)


def test_dropout_out_writes_between_the_lines_of_others(variant, dtype):
    """An out that is every second column leaves the columns between alone."""
    x = dtype.numbers((20, 30))
    wide = np.full((20, 60), 7).astype(dtype.public)
    y, _ = fd.dropout(x, 0.3, rng=4, out=wide[:, ::2])
    assert_same_bits(y, fd.dropout(x, 0.3, rng=4)[0])
    assert (wide[:, 1::2].astype(np.float64) == 7).all()


@pytest.mark.parametrize("layout", WRITEABLE)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("noise_shape", [None, (1, None, 1)])
def test_dropout_in_place(variant, dtype, layout, store, noise_shape):
    """out may be x itself, or another view of the same elements."""
    source = dtype.numbers((5, 6, 37))
    y, mask = fd.dropout(source, 0.3, rng=4, noise_shape=noise_shape)
    for view in (lambda x: x, lambda x: x[:]):
        x = layouts(source)[layout]
        assert_same_bits(fd.dropout(x, 0.3, rng=4, noise_shape=noise_shape, store=store, out=view(x))[0], y)
        assert_same_bits(x, y)
        x = layouts(source)[layout]
        assert_same_bits(fd.dropout_backward(x, mask, out=view(x)), y)
        assert_same_bits(x, y)


def test_dropout_out_may_interleave_with_x(variant, dtype):
    """Sharing a buffer is not overlapping: odd and even elements."""
    both = dtype.numbers(2000)
    source = both[::2].copy()
    y, _ = fd.dropout(both[::2], 0.3, rng=0, out=both[1::2])
    assert_same_bits(y, fd.dropout(source, 0.3, rng=0)[0])
    assert_same_bits(both[::2], source)


def test_dropout_of_a_broadcast_array(variant, dtype):
    row = dtype.numbers(33)
    y, mask = fd.dropout(np.broadcast_to(row, (40, 33)), 0.5, rng=0)
    assert_same_bits(y, fd.dropout(np.tile(row, (40, 1)), 0.5, rng=0)[0])
    assert len(np.unique(mask.to_bool(), axis=0)) > 1


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout_of_0d_arrays(variant, dtype, store, p):
    x = dtype.numbers(())
    seen = set()
    for seed in range(20):
        y, mask = fd.dropout(x, p, rng=seed, store=store)
        kept = bool(fd.draw_mask((), p, rng=seed).to_bool())
        assert y.shape == mask.shape == ()
        assert_same_bits(y, expected(dtype, x, kept, 2.0))
        assert_same_bits(fd.dropout_backward(x, mask), y)
        seen.add(kept)
    assert seen == ({True, False} if p == 0.5 else {False})


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("noise_shape", [None, 1])
def test_dropout_of_empty_arrays(variant, dtype, shape, store, noise_shape):
    x = np.empty(shape, dtype.public)
    if noise_shape:
        noise_shape = (1,) * len(shape)
    y, mask = fd.dropout(x, 0.5, rng=0, store=store, noise_shape=noise_shape)
    assert y.shape == shape
    assert fd.dropout_backward(y, mask).shape == shape
    assert fd.apply_mask(y, mask, out=y) is y


def test_dropout_of_lists(variant):
    y, mask = fd.dropout([[1.0, 2.0], [3.0, 4.0]], 0.5, rng=0)
    assert y.dtype == np.float64
    assert_same_bits(y, fd.dropout(np.array([[1.0, 2.0], [3.0, 4.0]]), 0.5, rng=0)[0])
    assert_same_bits(fd.dropout_backward([[1.0, 2.0], [3.0, 4.0]], mask), y)
    for do_nothing in (fd.dropout([1.0, 2.0], 0.0)[0], fd.dropout_backward([1.0, 2.0], None)):
        assert do_nothing.tolist() == [1.0, 2.0]


def test_dropout_of_an_array_scalar(variant):
    assert fd.dropout(np.float32(3), 0.5, rng=0)[0].dtype == np.float32


def test_dropout_leaves_inputs_alone(variant, dtype):
    x = dtype.numbers((31, 33))
    before = x.copy()
    _, mask = fd.dropout(x, 0.5, rng=0)
    words = mask.words.copy()
    fd.dropout_backward(x, mask)
    fd.apply_mask(x, mask)
    fd.dropout(x, 0.5, training=False, scaling="standard")
    assert_same_bits(x, before)
    assert (mask.words == words).all()


def test_dropout_allocates_its_result(variant, dtype):
    x = dtype.numbers(100)
    y, _ = fd.dropout(x, 0.5, rng=0)
    assert not np.shares_memory(x, y)


# ---- random state ----


def test_rng_int_is_a_seed(variant):
    assert fd.draw_mask(500, 0.5, rng=3) == fd.draw_mask(500, 0.5, rng=3) == fd.draw_mask(500, 0.5, rng=fd.Stream(3))
    assert fd.draw_mask(500, 0.5, rng=3) != fd.draw_mask(500, 0.5, rng=4)


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint64])
def test_rng_takes_numpy_integers(variant, kind):
    assert fd.draw_mask(500, 0.5, rng=kind(3)) == fd.draw_mask(500, 0.5, rng=3)


def test_rng_takes_the_largest_seed(variant):
    mask = fd.draw_mask(500, 0.5, rng=2**64 - 1)
    assert mask == fd.draw_mask(500, 0.5, rng=np.uint64(2**64 - 1))


def test_rng_stream_gives_each_call_its_next_offset(variant):
    stream, x = fd.Stream(3), np.ones(500)
    masks = [fd.dropout(x, 0.5, rng=stream)[1], fd.draw_mask(500, 0.5, rng=stream), fd.dropout(x, 0.5, rng=stream)[1]]
    assert stream.offset == 3
    assert masks == [fd.draw_mask(500, 0.5, rng=fd.Stream(3, offset)) for offset in range(3)]
    assert masks[0] != masks[1] != masks[2] != masks[0]


def test_rng_generator_gives_a_64_bit_seed(variant):
    seed = int(np.random.default_rng(8).integers(0, 2**64, dtype=np.uint64))
    generator = np.random.default_rng(8)
    first, second = fd.draw_mask(500, 0.5, rng=generator), fd.draw_mask(500, 0.5, rng=generator)
    assert first == fd.draw_mask(500, 0.5, rng=seed)
    assert first != second


def test_rng_none_draws_from_the_process_wide_stream(variant):
    x = np.ones(500)
    assert fd.dropout(x, 0.5)[1] != fd.dropout(x, 0.5)[1]
    fd.manual_seed(6)
    assert fd.dropout(x, 0.5)[1] == fd.draw_mask(500, 0.5, rng=6)


# ---- parameters ----


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.float16, np.array], ids=lambda kind: kind.__name__)
def test_p_of_any_real_type(variant, kind):
    _, mask = fd.dropout(np.ones(500), kind(0.25), rng=0)
    assert mask == fd.draw_mask(500, 0.25, rng=0)
    assert type(mask.p) is float


def test_p_is_not_quantised(variant):
    """Both sides of a cell's draw give masks that differ, however near: the threshold has 32 bits."""
    n = 1 << 16
    for p, q in ((0.1, 0.1 + 2.0**-16), (0.5, 0.5 - 2.0**-16)):
        differ = (fd.draw_mask(n, p, rng=0).to_bool() != fd.draw_mask(n, q, rng=0).to_bool()).sum()
        assert 0 < differ < 20


def test_masks_of_growing_p_are_nested(variant):
    """A cell dropped at some p is dropped at every larger one."""
    masks = [fd.draw_mask(5000, p, rng=0).to_bool() for p in (0, 1e-6, 0.003, 0.1, 1 / 3, 0.5, 0.999, 1)]
    assert all((after <= before).all() for before, after in itertools.pairwise(masks))


@pytest.mark.parametrize("shape", [5, (5,), [5], np.array([5]), (np.int64(5),)], ids=str)
def test_draw_mask_shape_of_any_kind(variant, shape):
    assert fd.draw_mask(shape, 0.5, rng=0) == fd.draw_mask((5,), 0.5, rng=0)


def test_draw_mask_first_cell_shards(variant):
    whole = fd.draw_mask(10_000, 0.1, rng=0).to_bool()
    for first in (0, 1, 31, 512, 4097, 9999, 10_000):
        shard = fd.draw_mask(10_000 - first, 0.1, rng=0, first_cell=first)
        assert (shard.to_bool() == whole[first:]).all(), first


# ---- the same everywhere ----


def test_results_equal_the_numpy_backend(variant, dtype):
    """Through the public API, over calls of several kinds and sizes, with whatever special values there are."""
    source = np.resize(dtype.specials().view(dtype.public), 9 * 700).reshape(9, 700)

    def results():
        stream = fd.Stream(77)
        for p, noise_shape in itertools.product((0.5, 0.1, 1e-6, 1.0), (None, (1, None), (None, 1))):
            for store in STORES:
                y, mask = fd.dropout(source.T, p, rng=stream, noise_shape=noise_shape, store=store)
                yield y
                yield fd.dropout_backward(source.T, mask)

    with fd.use_backend("numpy"):
        wanted = list(results())
    for actual, want in zip(results(), wanted, strict=True):
        assert_same_bits(actual, want)

"""Worked numbers, and moments against their closed forms and against torch's own functions.

All seeds are fixed. Bounds are four standard errors of what is estimated, unless a test says otherwise.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core import variants
from fastdrop.core.mask import PackedMask

torch = pytest.importorskip("torch")

import torch.nn.functional as F

import fastdrop.torch as fdt

from ..cases import KINDS, alpha, assert_equal

HIDDEN = torch.tensor([0.36, 0.13, 0.42, 0.25], dtype=torch.float64)  # DOMAIN's network of 2-4-1, p = 0.5
KEEP = [True, False, True, False]


def seed_of(keep, p):
    """A seed whose mask is this."""
    return next(s for s in itertools.count() if fd.draw_mask(len(keep), p, rng=s).to_bool().tolist() == keep)


def normal(n, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_near(estimate, expected, error):
    assert abs(float(estimate) - expected) < error, f"{float(estimate)} is not within {error} of {expected}"


# ---- worked numbers ----


def test_worked_forward_and_gradient():
    seed = seed_of(KEEP, 0.5)
    a = HIDDEN.clone().requires_grad_()
    y = fdt.dropout(a, 0.5, seed=seed)
    torch.testing.assert_close(y, torch.tensor([0.72, 0.0, 0.84, 0.0]).double(), rtol=1e-7, atol=0)
    y.backward(torch.tensor([0.3, -0.1, 0.2, -0.05], dtype=torch.float64))
    assert a.grad.tolist() == [0.6, 0.0, 0.4, 0.0]
    assert fdt.dropout(a, 0.5, seed=seed, scaling="standard").tolist() == [0.36, 0.0, 0.42, 0.0]
    assert fdt.dropout(a, 0.5, training=False) is a
    assert_equal(fdt.dropout(a, 0.5, training=False, scaling="standard"), a * 0.5)
    assert fdt.Dropout(0.5).eval()(a) is a
    assert_equal(fdt.Dropout(0.5, scaling="standard").eval()(a), a * 0.5)


def test_worked_mean_of_many_masks():
    """The standard error is a / sqrt(1000), 0.013 for the largest: about 0.02, as the domain's numbers say."""
    torch.manual_seed(0)
    drop = fdt.Dropout(0.5)
    mean = torch.stack([drop(HIDDEN) for _ in range(1000)]).mean(0)
    torch.testing.assert_close(mean, HIDDEN, rtol=0, atol=0.02)


def test_worked_16_thinned_networks_average_to_the_full_one():
    """Of a linear layer and equal odds, exactly, and so for its gradient."""
    weight = torch.tensor([[0.5, -1.25, 2.0, 0.75], [1.5, 0.25, -0.5, 3.0]], dtype=torch.float64)
    a = torch.tensor([0.375, 0.125, 0.4375, 0.25], dtype=torch.float64)  # sums of such numbers round nothing
    outputs = []
    for keep in itertools.product((False, True), repeat=4):
        words = torch.from_numpy(PackedMask.from_bool(keep, 0.5).words.view(np.int32).copy())
        outputs.append(torch.ops.fastdrop.backward(a, words, 0.5, None) @ weight.T)
    assert len({tuple(y.tolist()) for y in outputs}) == 16
    assert_equal(torch.stack(outputs).mean(0), a @ weight.T)


def test_worked_16_thinned_networks_are_all_drawn():
    seen = {tuple(fdt.dropout(torch.ones(4), 0.5, seed=seed).tolist()) for seed in range(200)}
    assert len(seen) == 16


# ---- means ----

MEAN_KEPT = [name for name, kind in KINDS.items() if kind.law in ("inverted", "blocks", "gaussian")]


@pytest.mark.parametrize("name", MEAN_KEPT)
def test_mean_is_kept(name):
    """Of the input and, of ones, of the gradient: the variance is at most that of p / (1 - p) per decision."""
    kind = KINDS[name]
    runs, p = 400, 0.25
    x = torch.ones(kind.shape, dtype=torch.float64, requires_grad=True)
    total = torch.zeros(())
    for seed in range(runs):
        total = total + kind.torch(x, p, seed=seed).mean() / runs
    (dx,) = torch.autograd.grad(total, x)
    error = 4 * math.sqrt(p / (1 - p) / (runs * math.prod(kind.cells)))
    if kind.law == "blocks":
        assert_near(total.detach(), 1.0, 1e-12)  # exactly, in each run
    assert_near(total.detach(), 1.0, error)
    assert_near(dx.sum(), 1.0, error)


def test_mean_of_each_element_under_drop_block():
    """Not kept at each place: cells near the border are covered by fewer blocks. Above 1 there, below 1 inside."""
    y = fdt.drop_block2d(torch.ones(4000, 5, 9, 9), 0.3, 3, seed=1).mean((0, 1))
    assert (y[0, 0], y[0, -1], y[-1, 0], y[-1, -1]) > (y[4, 4],) * 4
    assert_near(y.mean(), 1.0, 1e-4)


# ---- alpha dropout ----


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("source", ["normal", "SELU"])
def test_alpha_dropout_keeps_mean_0_and_variance_1(source, p):
    """Of a standard normal and of what SELU makes of one; the input's own deviation counts with it."""
    n = 1 << 20
    x = normal(n, torch.float64)
    x = F.selu(x) if source == "SELU" else x
    y = fdt.alpha_dropout(x, p, True, seed=2)
    spread = float(((y - y.mean()) ** 2 - y.var()).std())  # of the squares, which the variance is the mean of
    assert_near(y.mean(), 0.0, 4 * math.sqrt(2 / n))
    assert_near(y.var(), 1.0, 4 * spread * math.sqrt(2 / n))


def test_alpha_dropout_of_channels_keeps_mean_0_and_variance_1():
    """Fewer decisions: of 100,000 channels of 8 elements."""
    x = normal(800_000, torch.float64).view(100, 1000, 8)
    y = fdt.feature_alpha_dropout(x, 0.2, True, seed=2)
    assert_near(y.mean(), 0.0, 4 * math.sqrt(2 / 100_000))
    assert_near(y.var(), 1.0, 4 * math.sqrt(2 * 3 / 100_000))


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
def test_alpha_dropout_has_the_moments_of_torchs(name, p):
    x = normal(400_000, torch.float64).view(50, 2000, 4)
    torch.manual_seed(0)
    theirs, ours = getattr(F, name)(x, p, True), getattr(fdt, name)(x, p, True, seed=2)
    decisions = x.numel() if name == "alpha_dropout" else 100_000
    for power in (1, 2, 3):
        a, b = (y**power for y in (ours, theirs))
        assert_near(a.mean() - b.mean(), 0.0, 4 * math.sqrt((a.var() + b.var()) / decisions))


def test_alpha_dropout_share_of_floor():
    n, p = 1 << 20, 0.3
    y = fdt.alpha_dropout(torch.zeros(n), p, True, seed=1)
    _, b, c = alpha(p)
    assert {round(value, 5) for value in y.unique().tolist()} == {round(c, 5), round(b, 5)}
    assert_near((y < 0).double().mean(), p, 4 * math.sqrt(p * (1 - p) / n))


# ---- Gaussian ----


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_gaussian_factors_are_normal_with_the_variance_of_dropout(p):
    """p / (1 - p). Third and fourth moments and three quantiles are a normal distribution's."""
    n = 1 << 20
    factor = fdt.gaussian_dropout(torch.ones(n, dtype=torch.float64), p, seed=3)
    variance = p / (1 - p)
    assert_near(factor.mean(), 1.0, 4 * math.sqrt(variance / n))
    assert_near(factor.var(), variance, 4 * variance * math.sqrt(2 / n))
    z = (factor - 1) / math.sqrt(variance)
    assert_near((z**3).mean(), 0.0, 4 * math.sqrt(15 / n))
    assert_near((z**4).mean(), 3.0, 4 * math.sqrt(96 / n))
    for bound in (0.5, 1.0, 3.0):
        share = math.erf(bound / math.sqrt(2))
        assert_near((z.abs() < bound).double().mean(), share, 4 * math.sqrt(share * (1 - share) / n))


def test_gaussian_factors_are_independent():
    """Of neighbours, of the two of a pair, across tiles of 64, of other seeds."""
    n = 1 << 18
    z = fdt.gaussian_dropout(torch.ones(n, dtype=torch.float64), 0.5, seed=3) - 1
    other = fdt.gaussian_dropout(torch.ones(n, dtype=torch.float64), 0.5, seed=4) - 1
    for lag in (1, 2, 4, 16, 32, 48, 64, 128):
        assert_near((z[:-lag] * z[lag:]).mean(), 0.0, 4 / math.sqrt(n))
        assert_near((z[:-lag] ** 2 * z[lag:] ** 2).mean(), 1.0, 4 * math.sqrt(8 / n))
    assert_near((z * other).mean(), 0.0, 4 / math.sqrt(n))


def test_gaussian_variance_is_that_of_dropout_itself():
    n, p = 1 << 20, 0.3
    dropped = fdt.dropout(torch.ones(n, dtype=torch.float64), p, seed=3)
    noisy = fdt.gaussian_dropout(torch.ones(n, dtype=torch.float64), p, seed=3)
    variance = p / (1 - p)
    assert_near(dropped.var(), variance, 4 * variance * math.sqrt(2 / n))
    assert_near(noisy.var(), variance, 4 * variance * math.sqrt(2 / n))


# ---- DropBlock ----


def kept_on_average(cells, block_size, p):
    """The share of cells that DropBlock keeps: a cell that k blocks can cover stays with (1 - gamma)**k."""
    plan = variants.blocks((1, *cells), p, block_size)
    covers = [
        np.convolve(np.ones(extent - size + 1), np.ones(size)) for extent, size in zip(cells, block_size, strict=True)
    ]
    return float(((1 - plan.gamma) ** np.multiply.outer(*covers)).mean())


@pytest.mark.parametrize("couple_channels", [False, True])
@pytest.mark.parametrize(
    ("extents", "size", "p"),
    [
        ((28, 28), 7, 0.1),
        ((28, 28), 3, 0.1),
        ((14, 14), 7, 0.25),
        ((9, 16), 3, 0.5),
        ((8, 8), 1, 0.3),
        ((7, 7), 7, 0.2),
    ],
    ids=str,
)
def test_drop_block_keeps_near_1_minus_p(extents, size, p, couple_channels):
    """Never less on average: gamma is such that blocks, counted as often as they overlap, cover a share p.

    The overlap, at most half the square of the blocks expected at a cell, is kept beyond 1 - p: 0.006 more at p = 0.1
    and blocks of 7 in 28, 0.11 more at p = 0.5 and blocks of 3. None for blocks of 1 and for blocks of the whole
    extent, of which there is but one.
    """
    samples, channels = (4000, 2) if couple_channels else (500, 8)
    y = fdt.drop_block2d(torch.ones(samples, channels, *extents), p, size, seed=5, couple_channels=couple_channels)
    planes = (y != 0).double().mean((2, 3))
    planes = planes[:, :1] if couple_channels else planes
    expected = kept_on_average(extents, (size, size), p)
    assert_near(planes.mean(), expected, 4 * float(planes.std()) / math.sqrt(planes.numel()))
    at_most = (p * math.prod(extents) / math.prod(extent - size + 1 for extent in extents)) ** 2 / 2
    assert -1e-12 <= expected - (1 - p) <= at_most
    if size in (1, *extents):
        assert expected == pytest.approx(1 - p, rel=1e-9)


def test_drop_block_excess_is_what_its_test_says():
    assert kept_on_average((28, 28), (7, 7), 0.1) - 0.9 == pytest.approx(0.006, abs=0.0005)
    assert kept_on_average((9, 16), (3, 3), 0.5) - 0.5 == pytest.approx(0.11, abs=0.005)


def by_pooling(x, p, size):
    """DropBlock as torch code has it: seeds, widened by a maximum, renormalised by the count."""
    extents = x.shape[2:]
    room = [extent - size + 1 for extent in extents]
    gamma = p * math.prod(extents) / (size**2 * math.prod(room))
    seeds = torch.bernoulli(torch.full((*x.shape[:2], *room), gamma, dtype=x.dtype))
    keep = 1 - F.max_pool2d(F.pad(seeds, [size - 1] * 4), size, stride=1)
    return x * keep * keep.numel() / keep.sum()


def test_drop_block_has_the_moments_of_the_formula_in_torch():
    """The mean, the spread between planes and the correlation of neighbours, along and across."""
    x = torch.ones(400, 8, 14, 14, dtype=torch.float64)
    torch.manual_seed(0)
    both = [(y != 0).double() for y in (fdt.drop_block2d(x, 0.2, 3, seed=5), by_pooling(x, 0.2, 3))]
    for moment in (
        lambda keep: keep.mean((2, 3)),
        lambda keep: keep.mean((2, 3)) ** 2,
        lambda keep: (keep[..., 1:] * keep[..., :-1]).mean((2, 3)),
        lambda keep: (keep[..., 2:, :] * keep[..., :-2, :]).mean((2, 3)),
        lambda keep: (keep[..., 3:, 3:] * keep[..., :-3, :-3]).mean((2, 3)),
        lambda keep: keep[..., 0],
    ):
        ours, theirs = (moment(keep).flatten() for keep in both)
        assert_near(ours.mean() - theirs.mean(), 0.0, 4 * math.sqrt((ours.var() + theirs.var()) / (400 * 8)))


# ---- torch's channels ----


@pytest.mark.parametrize("name", ["dropout1d", "dropout2d", "dropout3d"])
def test_channels_are_dropped_as_often_as_by_torch(name):
    shape = (500, 40, *(2,) * int(name[-2]))
    torch.manual_seed(0)
    for function in (getattr(F, name), getattr(fdt, name)):
        y = function(torch.ones(shape), 0.3).flatten(2)
        assert_equal(y.amin(2), y.amax(2))
        assert_near((y[..., 0] == 0).double().mean(), 0.3, 4 * math.sqrt(0.21 / 20_000))
        assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_samples_are_dropped_with_probability_p(mode):
    kept = [fdt.stochastic_depth(torch.ones(20, 2), 0.3, mode, seed=seed)[:, 0] != 0 for seed in range(500)]
    decisions = torch.stack([k if mode == "row" else k[:1] for k in kept])
    assert_near(decisions.double().mean(), 0.7, 4 * math.sqrt(0.21 / decisions.numel()))
    assert all(k.all() or not k.any() for k in kept) == (mode == "batch")

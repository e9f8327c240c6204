"""Worked numbers, and moments against those of torch's own functions.

The moments of each kind by their closed forms are tested in tests/arrays, because both faces give the same bits. All
seeds are fixed. Bounds are four standard errors of the estimate.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core.mask import PackedMask

torch = pytest.importorskip("torch")

import torch.nn.functional as F

import fastdrop.torch as fdt

from ..cases import assert_equal

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


# ---- means ----


# ---- alpha dropout ----


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


# ---- Gaussian ----


# ---- DropBlock ----


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

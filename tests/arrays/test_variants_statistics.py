"""Statistics of the whole family by closed forms: z-scores within 5 sigma, seeds fixed, so that a pass stays a pass.

Values are the same on every backend, so that the fastest one here speaks for all.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core import variants
from fastdrop.core.random import threshold

SIGMAS = 5.0
N = 1 << 22
P = (0.5, 0.1, 1 / 3, 0.9)

probabilities = pytest.mark.parametrize("p", P, ids=lambda p: f"p={p:.4g}")


def realised(p):
    return threshold(p) / 2**32


def mean_z(values, mean, deviation):
    """Of the mean of independent values."""
    return (np.mean(values, dtype=np.float64) - mean) / (deviation / math.sqrt(np.size(values)))


# ---- kinds that share decisions ----

# Call with data of ones, and how to read one number per decision off the result.
DECISIONS = {
    "feature_dropout": (lambda x, p: fd.feature_dropout(x, p, rng=1), (1 << 10, 1 << 9, 2), np.s_[:, :, 0]),
    "feature_dropout, channels last": (
        lambda x, p: fd.feature_dropout(x, p, -1, rng=1),
        (1 << 10, 2, 1 << 9),
        np.s_[:, 0],
    ),
    "variational_dropout": (lambda x, p: fd.variational_dropout(x, p, 1, rng=1), (1 << 10, 2, 1 << 9), np.s_[:, 0]),
    "drop_connect": (lambda x, p: fd.drop_connect(x, p, rng=1), (1 << 10, 1 << 9), np.s_[:]),
    "stochastic_depth": (lambda x, p: fd.stochastic_depth(x, p, "row", rng=1), (1 << 19, 2), np.s_[:, 0]),
}
decisions = pytest.mark.parametrize(("call", "shape", "one"), DECISIONS.values(), ids=DECISIONS)


@probabilities
@decisions
def test_kept_share_mean_and_variance(call, shape, one, p):
    """Kept 1 - p; E[y] = x; E[(y - x)**2] = p / (1 - p) x**2, by its own fourth moment's deviation."""
    q = realised(p)
    y = call(np.full(shape, 3.0), p)[0][one]
    assert abs(mean_z(y != 0, 1 - q, math.sqrt(q * (1 - q)))) < SIGMAS
    variance = 9 * q / (1 - q)
    assert abs(mean_z(y, 3.0, math.sqrt(variance))) < SIGMAS
    fourth = 81 * (q + (1 - q) * (q / (1 - q)) ** 4)
    deviation = math.sqrt(fourth - variance**2)  # 0 at p = 1/2, where the square is certain
    assert abs(np.mean((y - 3.0) ** 2) - variance) <= SIGMAS * deviation / math.sqrt(y.size) + 1e-9


@probabilities
def test_stochastic_depth_of_batches_keeps_its_share(p):
    """One decision a call, over the offsets of a stream."""
    q, stream, x = realised(p), fd.Stream(1), np.ones((2, 2))
    kept = [fd.stochastic_depth(x, p, "batch", rng=stream)[0][0, 0] != 0 for _ in range(20_000)]
    assert abs(mean_z(kept, 1 - q, math.sqrt(q * (1 - q)))) < SIGMAS


@probabilities
def test_channels_and_samples_are_independent(p):
    """All pairs of 64 channels over 2**14 samples; one sample and the next."""
    q = realised(p)
    samples, channels = 1 << 14, 64
    y, _ = fd.feature_dropout(np.ones((samples, channels, 2), np.float32), p, rng=2)
    bits = (y[:, :, 0] == 0) - np.float32(q)
    pairs = np.einsum("ki,kj->ij", bits, bits) / (math.sqrt(samples) * q * (1 - q))
    assert np.abs(pairs[~np.eye(channels, dtype=bool)]).max() < SIGMAS
    neighbours = np.einsum("ki,kj->ij", bits[1:], bits[:-1]) / (math.sqrt(samples) * q * (1 - q))
    assert np.abs(neighbours).max() < SIGMAS


def test_layers_and_steps_are_independent():
    """Masks of one stream, call after call."""
    stream, x = fd.Stream(3), np.ones((256, 64, 2), np.float32)
    masks = np.array([fd.feature_dropout(x, 0.3, rng=stream)[1].to_bool().ravel() for _ in range(20)], np.float64)
    q = realised(0.3)
    z = (masks - (1 - q)) @ (masks - (1 - q)).T / (math.sqrt(masks.shape[1]) * q * (1 - q))
    assert np.abs(z[~np.eye(20, dtype=bool)]).max() < SIGMAS


# ---- DropBlock ----

MAPS = 1 << 14
BLOCKS = {
    "3 of 20": ((20,), (3,)),
    "2 x 2 of 6 x 7": ((6, 7), (2, 2)),
    "3 x 3 of 8 x 8": ((8, 8), (3, 3)),
    "5 x 1 of 7 x 4": ((7, 4), (5, 1)),
    "2 x 2 x 3 of 3 x 4 x 5": ((3, 4, 5), (2, 2, 3)),
    "7 x 7 of 7 x 7": ((7, 7), (7, 7)),
}


def covered_by(extents, sizes):
    """Matrix [cell, block] of a map: 1 where the block holds the cell."""
    columns = []
    for at in np.ndindex(*(extent - size + 1 for extent, size in zip(extents, sizes, strict=True))):
        cells = np.zeros(extents)
        cells[tuple(slice(i, i + size) for i, size in zip(at, sizes, strict=True))] = 1
        columns.append(cells.ravel())
    return np.array(columns).T


@pytest.mark.parametrize("p", [0.1, 0.5], ids=str)
@pytest.mark.parametrize(("extents", "sizes"), BLOCKS.values(), ids=BLOCKS)
def test_drop_block_keeps_cells_as_its_blocks_allow(extents, sizes, p):
    """A cell is kept if none of the c blocks that hold it is drawn, (1 - gamma)**c; a pair likewise, of either."""
    shape = (MAPS // 8, 8, *extents)
    gamma = realised(variants.blocks(shape, p, sizes).gamma)
    holds = covered_by(extents, sizes)
    c = holds.sum(1)
    kept = (1 - gamma) ** c
    covariance = (1 - gamma) ** (c[:, None] + c - holds @ holds.T) - np.outer(kept, kept)

    _, mask = fd.drop_block(np.ones(shape, np.float16), p, sizes, rng=4)
    bits = mask.to_bool().reshape(MAPS, -1)
    z = (bits.mean(0) - kept) / np.sqrt(np.diag(covariance) / MAPS)
    assert np.abs(z).max() < SIGMAS
    total = math.sqrt(covariance.sum() / MAPS)
    assert abs(bits.sum(1).mean() - kept.sum()) / total < SIGMAS
    overlap = gamma**2 * np.mean(c * (c - 1)) / 2  # Bonferroni's inequality
    assert 1 - p - SIGMAS * total / c.size <= bits.mean() <= 1 - p + overlap + SIGMAS * total / c.size


def test_drop_block_maps_are_independent():
    """Neighbouring maps' kept counts, and neighbouring samples'."""
    _, mask = fd.drop_block(np.ones((1 << 11, 8, 8, 8), np.float16), 0.2, 3, rng=5)
    counts = mask.to_bool().reshape(1 << 14, -1).sum(1)
    counts = (counts - counts.mean()) / counts.std()
    for lag in (1, 8):
        assert abs((counts[lag:] * counts[:-lag]).sum() / math.sqrt(counts.size - lag)) < SIGMAS, lag


# ---- alpha ----


def selu(z):
    return 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * np.expm1(z))


ALPHA_CALLS = {
    "alpha_dropout": (lambda x, p: fd.alpha_dropout(x, p, rng=6), (N,)),
    "feature_alpha_dropout": (lambda x, p: fd.feature_alpha_dropout(x, p, rng=6), (N // 64, 64, 1)),
}
INPUTS = {"normal": lambda z: z, "SELU of normal": selu}


@pytest.mark.parametrize(("call", "shape"), ALPHA_CALLS.values(), ids=ALPHA_CALLS)
@pytest.mark.parametrize("activation", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_alpha_dropout_keeps_mean_0_and_variance_1(call, shape, activation, p):
    """SELU's fixed point: both inputs have mean 0 and variance 1, and so has what comes out."""
    x = activation(np.random.default_rng(7).normal(size=shape))
    y, _ = call(x, p)
    assert abs(mean_z(x, 0, 1)) < SIGMAS
    assert abs(mean_z(y, 0, 1)) < SIGMAS
    fourth = np.mean(y**4)
    assert abs(mean_z(y**2, 1, math.sqrt(fourth - 1))) < SIGMAS


def test_selu_network_keeps_mean_and_variance_under_alpha_dropout():
    """Four layers of LeCun-normal weights: moments stay near their fixed point where plain dropout's drift away."""
    rng = np.random.default_rng(10)
    weights = [rng.normal(scale=256**-0.5, size=(256, 256)) for _ in range(4)]
    ends = {}
    for op in (fd.alpha_dropout, fd.dropout):
        x = rng.normal(size=(1024, 256))
        for i, w in enumerate(weights):
            x, _ = op(selu(x @ w), 0.2, rng=i)
        ends[op] = abs(x.mean()), abs(x.var() - 1)
    assert max(ends[fd.alpha_dropout]) < 0.05
    assert max(ends[fd.dropout]) > 0.1


# ---- Gaussian ----


def noise(n=N, *, p=0.5, seed=11, offset=0):
    """Standard normal numbers, read off the factors."""
    y, _ = fd.gaussian_dropout(np.ones(n), p, rng=fd.Stream(seed, offset))
    return (y - 1) / variants.spread(p)


def test_gaussian_noise_has_normal_moments():
    """1 to 8: 0, 1, 0, 3, 0, 15, 0, 105."""
    z = noise()
    moments = [0, 1, 0, 3, 0, 15, 0, 105]
    for k, moment in enumerate(moments, start=1):
        double = math.prod(range(1, 2 * k, 2))  # E[z**2k] = (2 k - 1)!!
        assert abs(mean_z(z**k, moment, math.sqrt(double - moment**2))) < SIGMAS, k


def test_gaussian_noise_is_normally_distributed():
    """Chi-squared over 1,024 equally likely bins, and Kolmogorov's distance."""
    z = noise()
    bins = 1024
    edges = [NormalDist().inv_cdf(i / bins) for i in range(1, bins)]
    counts = np.bincount(np.searchsorted(edges, z), minlength=bins)
    chi = ((counts - N / bins) ** 2 / (N / bins)).sum()
    assert abs(chi - (bins - 1)) / math.sqrt(2 * (bins - 1)) < SIGMAS
    distance = np.abs(np.cumsum(counts)[:-1] / N - np.arange(1, bins) / bins).max()
    assert distance * math.sqrt(N) < 2.7  # probability 1e-6


@pytest.mark.parametrize("beyond", [2.0, 3.0, 4.0, 5.0])
def test_gaussian_noise_has_normal_tails(beyond):
    z = noise()
    share = NormalDist().cdf(-beyond)
    for side in (z > beyond, z < -beyond):
        assert abs(side.sum() - N * share) < SIGMAS * math.sqrt(N * share) + 1
    assert np.abs(z).max() < 6.67  # sqrt(-2 ln 2**-32)


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 32, 48, 64, 512, 1 << 16])
def test_gaussian_noise_of_neighbours_is_independent(lag):
    """Also of the pairs that one transform makes, 16 cells apart: values, sizes, and size against value."""
    z = noise()
    for f, g in (
        (lambda z: z, lambda z: z),
        (lambda z: z * z - 1, lambda z: z * z - 1),
        (lambda z: z, lambda z: z * z - 1),
    ):
        a, b = f(z[lag:]), g(z[:-lag])
        assert abs(mean_z(a * b, 0, math.sqrt(np.mean(a * a) * np.mean(b * b)))) < SIGMAS


@pytest.mark.parametrize(
    "other", [{"offset": 1}, {"offset": 1 << 32}, {"seed": 10}, {"seed": 11 | 1 << 32}, {"seed": 2**64 - 2}], ids=str
)
def test_gaussian_noise_of_streams_is_independent(other):
    a, b = noise(), noise(**other)
    assert abs(mean_z(a * b, 0, 1)) < SIGMAS
    assert abs(mean_z((a * a - 1) * (b * b - 1), 0, 2)) < SIGMAS


def test_gaussian_noise_positions_within_a_tile_are_alike():
    """Each of the 64 places has mean 0 and variance 1."""
    z = noise().reshape(-1, 64)
    assert np.abs(z.mean(0) * math.sqrt(len(z))).max() < SIGMAS
    assert np.abs(((z * z).mean(0) - 1) * math.sqrt(len(z) / 2)).max() < SIGMAS

"""Statistics of masks and noise as z-scores: every one within 5 sigma, seeds fixed, so that a pass stays a pass.

The bits are the same on every backend, so that the fastest one here speaks for all. Other kinds of dropout draw the
same masks (test_variants.py), so that these statistics are theirs as well.
"""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core import variants
from fastdrop.core.random import keep_scale, threshold

from ..cases import DTYPES

SIGMAS = 5.0
N = 1 << 22  # cells
PROBABILITIES = (0.5, 0.1, 0.003)
BLOCK = 512

probabilities = pytest.mark.parametrize("p", PROBABILITIES, ids=lambda p: f"p={p:.4g}")


def drops(p, *, seed=1, offset=0, first=0, n=N):
    """Words whose 1 bits are the dropped cells."""
    return ~fd.draw_mask(n, p, rng=fd.Stream(seed, offset), first_cell=first).words


def realised(p):
    return threshold(p) / 2**32


def count(words):
    return fd.PackedMask(words, (32 * words.size,), 0.5).kept


def count_z(words, p):
    q, n = realised(p), 32 * words.size
    return (count(words) - n * q) / math.sqrt(n * q * (1 - q))


def correlation_z(a, b, p):
    """z-score of sum (a - q)(b - q), which has mean 0 and deviation q (1 - q) sqrt(n) if a and b are independent."""
    q, n = realised(p), 32 * a.size
    total = count(a & b) - q * (count(a) + count(b)) + n * q * q
    return total / (math.sqrt(n) * q * (1 - q))


def lagged(words, lag):
    """The words, and those of the cells ``lag`` further on, for the cells that have both."""
    whole, bits = divmod(lag, 32)
    later = words[whole:] if not bits else (words[whole:-1] >> bits) | (words[whole + 1 :] << (32 - bits))
    return words[: later.size], later


def test_kept_counts():
    for p, seed in itertools.product((*PROBABILITIES, 1 / 3, 1e-6), range(3)):
        words = drops(p, seed=seed, n=1 << 24 if p == 1e-6 else N)  # 17 drops expected
        assert abs(count_z(words, p)) < SIGMAS, (p, seed)


@probabilities
def test_neighbours_are_independent(p):
    """The lags reach across cells, words, blocks, chunks and the parts of threads."""
    words = drops(p)
    for lag in (1, 2, 31, 32, 33, 512, 8192, 1 << 16):
        assert abs(correlation_z(*lagged(words, lag), p)) < SIGMAS, lag


OTHERS = [{"offset": 1}, {"offset": 1 << 32}, {"seed": 0}, {"seed": 1 | 1 << 32}, {"seed": 2**64 - 2}]


@probabilities
def test_streams_and_far_cells_are_independent(p):
    """A word index cut to 32 bits, or its upper half lost, would give the same mask again."""
    words = drops(p)
    for other in (*OTHERS, {"first": N}, {"first": 1 << 32}, {"first": 1 << 37}, {"first": 1 << 63}):
        assert abs(correlation_z(words, drops(p, **other), p)) < SIGMAS, other


@probabilities
def test_positions_within_a_block_are_uniform(p):
    """Tests each of the 512 cells of a block, and all together by chi-squared."""
    bits = np.unpackbits(drops(p).view(np.uint8), bitorder="little").reshape(-1, BLOCK)
    q, blocks = realised(p), N // BLOCK
    z = (bits.sum(0, dtype=np.int64) - blocks * q) / math.sqrt(blocks * q * (1 - q))
    assert np.abs(z).max() < SIGMAS
    spread = math.sqrt(2 * BLOCK + BLOCK / (blocks * q))  # of a sum of squared binomials, rare ones included
    assert abs((z**2).sum() - BLOCK) / spread < SIGMAS


@probabilities
def test_bit_positions_are_uncorrelated(p):
    """All pairs of the 32 bits of a word."""
    q = realised(p)
    bits = np.unpackbits(drops(p).view(np.uint8), bitorder="little").reshape(-1, 32).astype(np.float32) - np.float32(q)
    pairs = np.einsum("ki,kj->ij", bits, bits)  # not by BLAS, whose threads would fight those of other tests
    z = pairs / (math.sqrt(len(bits)) * q * (1 - q))
    assert np.abs(z[~np.eye(32, dtype=bool)]).max() < SIGMAS


def test_draws_are_uniform_in_every_plane():
    """Half of all cells fall on each side at every depth: P(drop) is T / 2**32 along one cell's bisection of T."""
    for k in range(1, 12):
        for p in (2.0**-k, 1 - 2.0**-k):
            assert abs(count_z(drops(p, seed=k), p)) < SIGMAS, p


def test_kept_counts_vary_as_independent_cells_do():
    """The variance of counts over blocks of 512 is binomial, and not smaller."""
    q = realised(0.1)
    counts = np.unpackbits(drops(0.1).view(np.uint8)).reshape(-1, BLOCK).sum(1, dtype=np.int64)
    z = (counts - BLOCK * q) ** 2 / (BLOCK * q * (1 - q)) - 1
    assert abs(z.sum() / math.sqrt(2 * z.size)) < SIGMAS


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[3]], ids=str)
def test_mean_of_dropout_is_its_input(dtype):
    """E[y] = x: a scale rounded to bfloat16 would be off by 0.16%, p taken in 8 bits by 0.3%; 5 sigma here is 0.08%."""
    x = np.exp(np.random.default_rng(0).normal(scale=0.2, size=N)).astype(dtype.public)
    y, _ = fd.dropout(x, 0.1, rng=1)
    wide = x.astype(np.float64)
    sigma = math.sqrt((wide**2).sum() * (keep_scale(threshold(0.1)) - 1)) / wide.sum()
    assert SIGMAS * sigma < 1e-3
    assert abs(y.astype(np.float64).sum() / wide.sum() - 1) < SIGMAS * sigma


def mean_z(values, mean, deviation):
    """z-score of the mean of independent values."""
    return (np.mean(values, dtype=np.float64) - mean) / (deviation / math.sqrt(np.size(values)))


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_alpha_dropout_keeps_mean_0_and_variance_1(p):
    """SELU's fixed point: both inputs have mean 0 and variance 1, and so has what comes out."""
    z = np.random.default_rng(7).normal(size=N)
    selu = 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * np.expm1(z))
    for x in (z, selu):
        y, _ = fd.alpha_dropout(x, p, rng=6)
        assert abs(mean_z(y, 0, 1)) < SIGMAS
        assert abs(mean_z(y**2, 1, math.sqrt(np.mean(y**4) - 1))) < SIGMAS


# ---- Gaussian noise ----


def noise(*, seed=1, offset=0):
    """The standard normal numbers from which the multipliers were made."""
    y, _ = fd.gaussian_dropout(np.ones(N), 0.5, rng=fd.Stream(seed, offset))
    return (y - 1) / variants.spread(0.5)


def test_gaussian_noise_is_normally_distributed():
    """Tests moments, 1,024 equally likely bins (chi-squared), Kolmogorov's distance, tails, places within a tile."""
    z = noise()
    for k, moment in enumerate([0, 1, 0, 3, 0, 15, 0, 105], start=1):
        double = math.prod(range(1, 2 * k, 2))  # E[z**2k] = (2 k - 1)!!
        assert abs(mean_z(z**k, moment, math.sqrt(double - moment**2))) < SIGMAS, k
    bins = 1024
    edges = [NormalDist().inv_cdf(i / bins) for i in range(1, bins)]
    counts = np.bincount(np.searchsorted(edges, z), minlength=bins)
    chi = ((counts - N / bins) ** 2 / (N / bins)).sum()
    assert abs(chi - (bins - 1)) / math.sqrt(2 * (bins - 1)) < SIGMAS
    distance = np.abs(np.cumsum(counts)[:-1] / N - np.arange(1, bins) / bins).max()
    assert distance * math.sqrt(N) < 2.7  # probability 1e-6
    for beyond in (2.0, 3.0, 4.0, 5.0):
        share = NormalDist().cdf(-beyond)
        for side in (z > beyond, z < -beyond):
            assert abs(side.sum() - N * share) < SIGMAS * math.sqrt(N * share) + 1
    assert np.abs(z).max() < 6.67  # sqrt(-2 ln 2**-32)
    z = z.reshape(-1, 64)
    assert np.abs(z.mean(0) * math.sqrt(len(z))).max() < SIGMAS
    assert np.abs(((z * z).mean(0) - 1) * math.sqrt(len(z) / 2)).max() < SIGMAS


def test_gaussian_noise_of_neighbours_is_independent():
    """Tests values, squares, and squares against values. One transform makes pairs that lie 16 cells apart."""
    z = noise()
    size = z * z - 1
    for lag in (1, 2, 3, 16, 32, 48, 64, 512, 1 << 16):
        for f, g in ((z, z), (size, size), (z, size)):
            a, b = f[lag:], g[:-lag]
            assert abs(mean_z(a * b, 0, math.sqrt(np.mean(a * a) * np.mean(b * b)))) < SIGMAS, lag


def test_gaussian_noise_of_streams_is_independent():
    a = noise()
    for other in OTHERS:
        b = noise(**other)
        assert abs(mean_z(a * b, 0, 1)) < SIGMAS, other
        assert abs(mean_z((a * a - 1) * (b * b - 1), 0, 2)) < SIGMAS, other

"""Statistics of the masks as z-scores: every one within 5 sigma, seeds fixed, so that a pass stays a pass.

The masks are the same on every backend, so that the fastest one here speaks for all.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core.random import keep_scale, threshold

from ..cases import DTYPES

SIGMAS = 5.0
N = 1 << 24  # cells: 17 drops expected at p = 1e-6
PROBABILITIES = (0.5, 0.1, 1 / 3, 0.003, 1e-6)
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
    """Of sum (a - q)(b - q) over cells, q known: mean 0 and standard deviation q (1 - q) sqrt(n) if independent."""
    q, n = realised(p), 32 * a.size
    total = count(a & b) - q * (count(a) + count(b)) + n * q * q
    return total / (math.sqrt(n) * q * (1 - q))


def lagged(words, lag):
    """(words, those of the cells lag further on), of the cells that have both."""
    whole, bits = divmod(lag, 32)
    later = words[whole:] if not bits else (words[whole:-1] >> bits) | (words[whole + 1 :] << (32 - bits))
    return words[: later.size], later


@probabilities
def test_kept_counts(p):
    for seed in range(4):
        assert abs(count_z(drops(p, seed=seed), p)) < SIGMAS, seed


@probabilities
@pytest.mark.parametrize("lag", [1, 2, 31, 32, 33, 512, 8192, 1 << 16])
def test_neighbours_are_independent(p, lag):
    """Across cells, words, blocks, chunks, thread grains."""
    assert abs(correlation_z(*lagged(drops(p), lag), p)) < SIGMAS


@probabilities
@pytest.mark.parametrize(
    "other",
    [{"offset": 1}, {"offset": 1 << 31}, {"offset": 1 << 32}, {"seed": 0}, {"seed": 1 | 1 << 32}, {"seed": 2**64 - 2}],
    ids=str,
)
def test_streams_are_independent(p, other):
    assert abs(correlation_z(drops(p), drops(p, **other), p)) < SIGMAS


@probabilities
@pytest.mark.parametrize("first", [N, 1 << 32, 1 << 37, 1 << 63], ids=lambda first: f"cell 2**{first.bit_length() - 1}")
def test_far_cells_are_independent(p, first):
    """A word index cut to 32 bits, or its upper half lost, would give the same mask again."""
    assert abs(correlation_z(drops(p), drops(p, first=first), p)) < SIGMAS


@probabilities
def test_positions_within_a_block_are_uniform(p):
    """Each of the 512 cells of a block alone, and all together as chi-squared."""
    words = drops(p)
    counts = np.zeros(BLOCK)
    for part in np.split(words, 16):
        counts += np.unpackbits(part.view(np.uint8), bitorder="little").reshape(-1, BLOCK).sum(0, dtype=np.int64)
    q, blocks = realised(p), N // BLOCK
    z = (counts - blocks * q) / math.sqrt(blocks * q * (1 - q))
    if blocks * q >= 10:  # normal enough one by one
        assert np.abs(z).max() < SIGMAS
    spread = math.sqrt(2 * BLOCK + BLOCK / (blocks * q))  # of a sum of squared binomials, rare ones included
    assert abs((z**2).sum() - BLOCK) / spread < SIGMAS


@pytest.mark.parametrize("p", PROBABILITIES[:4], ids=lambda p: f"p={p:.4g}")
def test_bit_positions_are_uncorrelated(p):
    """All pairs of the 32 bits of a word."""
    words, q = drops(p, n=1 << 23), realised(p)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").reshape(-1, 32).astype(np.float32) - np.float32(q)
    pairs = np.einsum("ki,kj->ij", bits, bits)  # not by BLAS, whose threads would fight those of other tests
    z = pairs / (math.sqrt(len(bits)) * q * (1 - q))
    assert np.abs(z[~np.eye(32, dtype=bool)]).max() < SIGMAS


def test_draws_are_uniform_in_every_plane():
    """Half of all cells fall on each side at every depth: P(drop) is T / 2**32 along one cell's bisection of T."""
    for k in range(1, 12):
        for p in (2.0**-k, 1 - 2.0**-k):
            assert abs(count_z(drops(p, seed=k), p)) < SIGMAS, p


def test_kept_counts_vary_as_independent_cells_do():
    """Not too even either: the variance of counts over blocks of 512 is binomial."""
    q = realised(0.1)
    bytes_ = drops(0.1).view(np.uint8)
    counts = np.unpackbits(bytes_).reshape(-1, BLOCK).sum(1, dtype=np.int64)
    z = (counts - BLOCK * q) ** 2 / (BLOCK * q * (1 - q)) - 1
    assert abs(z.sum() / math.sqrt(2 * z.size)) < SIGMAS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 1 / 3])
def test_mean_of_dropout_is_its_input(dtype, p):
    """E[y] = x: a scale rounded to bfloat16 would be off by 0.16%, p taken in 8 bits by 0.3%; 5 sigma here is 0.08%."""
    n = 1 << 22 if p < 0.2 else 1 << 24
    x = np.exp(np.random.default_rng(0).normal(scale=0.2, size=n)).astype(dtype.public)
    y, mask = fd.dropout(x, p, rng=1)
    wide = x.astype(np.float64)
    sigma = math.sqrt((wide**2).sum() * (keep_scale(threshold(p)) - 1)) / wide.sum()
    assert SIGMAS * sigma < 1e-3
    assert abs(y.astype(np.float64).sum() / wide.sum() - 1) < SIGMAS * sigma
    assert mask.scale == keep_scale(threshold(p))

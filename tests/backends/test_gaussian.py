"""The normal numbers behind Gaussian dropout: what they are, how they are spread, that they are independent.

All backends have them bit for bit as the reference does (test_mask.py), so that the reference speaks for all.
Statistics are z-scores within 5 sigma, seeds fixed.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fastdrop.backends import reference
from fastdrop.core.random import LOW, philox4x32_10

from ..cases import NOISE_END, NOISE_FIRSTS, OFFSET, SEED

SIGMAS = 5.0
N = 1 << 20
TILE, COUNTERS = 64, 16
ULPS = 4
FARTHEST = math.sqrt(2 * 32 * math.log(2))  # the radius of the smallest uniform number, 2**-32


def normals(n=N, *, first=0, seed=1, offset=0):
    return reference.mask._normals(first, n, seed, offset)


@pytest.fixture(scope="module")
def z():
    return normals().astype(np.float64)


def uniform(first, n, *, seed=SEED, offset=OFFSET):
    """The two 32-bit numbers of each cell's pair, and which of the pair the cell has: from the specification's text."""
    cell = np.arange(n, dtype=np.uint64) + np.uint64(first)
    k = cell % np.uint64(TILE) // np.uint64(COUNTERS)
    b = cell // np.uint64(TILE) * np.uint64(COUNTERS) + cell % np.uint64(COUNTERS)
    counter = b & np.uint64(LOW), (b >> np.uint64(32)) | np.uint64(2 << 27), offset & LOW, offset >> 32
    r = philox4x32_10(counter, (seed & LOW, seed >> 32))
    return np.where(k < 2, r[0], r[2]), np.where(k < 2, r[1], r[3]), k % np.uint64(2) == 1


def box_muller(radius, angle, second):
    """In float64, but for the uniform number of the radius, which is a float32."""
    u = ((radius >> 1).astype(np.float32) + np.float32(0.5)).astype(np.float64) / 2**31
    t = (angle << 2).view(np.int32) * (math.pi / 2 / 2**32)
    right, up = np.cos(t) * np.where(angle >> 31, -1, 1), np.sin(t)
    return np.sqrt(-2 * np.log(u)) * np.where(second ^ (angle >> 30 & 1 == 1), up, right)


# ---- what they are ----


@pytest.mark.parametrize("first", [*NOISE_FIRSTS, NOISE_END - 100_000])
def test_normals_are_those_of_the_transform(first):
    n = 100_000
    wanted = box_muller(*uniform(first, n))
    error = np.abs(normals(n, first=first, seed=SEED, offset=OFFSET) - wanted)
    assert (error <= ULPS * np.spacing(np.abs(wanted).astype(np.float32))).all()


def test_radii_at_their_ends():
    """u is never 0, so that no number is infinite; where it rounds to 1 both are 0."""
    ends = np.array([0, 1, LOW], np.uint32)
    z0, z1 = reference.mask._normal_pair(ends, np.zeros_like(ends))
    assert z0.tolist()[:2] == [np.float32(FARTHEST)] * 2
    assert (z0[2], z1[2]) == (0, 0)


# ---- how they are spread ----


def double_factorial(k):
    return math.prod(range(k, 0, -2))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6], ids=["mean", "variance", "skewness", "kurtosis", "sixth moment"])
def test_moments(z, k):
    """Of all cells, and of each of the four that a counter makes."""
    quarters = z.reshape(-1, 4, COUNTERS)
    for values in (z, *(quarters[:, part].reshape(-1) for part in range(4))):
        expected = double_factorial(k - 1) if k % 2 == 0 else 0
        deviation = math.sqrt((double_factorial(2 * k - 1) - expected**2) / values.size)
        assert abs((values**k).mean() - expected) < SIGMAS * deviation


def test_tails(z):
    for bound, side in itertools.product((1.0, 3.0, 4.0), (z, -z)):
        q = 0.5 * math.erfc(bound / math.sqrt(2))
        assert abs((side > bound).sum() - z.size * q) < SIGMAS * math.sqrt(z.size * q * (1 - q))
    assert np.abs(z).max() <= FARTHEST


# ---- independence ----


def assert_independent(a, b):
    """Uncorrelated, and so are their sizes: the two of a pair share a radius."""
    assert abs((a * b).sum()) < SIGMAS * math.sqrt(a.size)
    assert abs(((a**2 - 1) * (b**2 - 1)).sum()) < SIGMAS * 2 * math.sqrt(a.size)


def test_neighbours_are_independent(z):
    """Across cells, the cells of a counter, tiles, chunks, thread grains."""
    for lag in (1, 16, 17, 32, 48, 64, 8192, 1 << 16):
        assert_independent(z[:-lag], z[lag:])


def test_streams_are_independent(z):
    """A counter cut to 32 bits would give the same numbers again from cell 2**34 on."""
    for other in ({"offset": 1}, {"offset": 1 << 32}, {"seed": 0}, {"seed": 1 | 1 << 32}, {"first": 1 << 34}):
        assert_independent(z, normals(**other).astype(np.float64))


def test_noise_and_masks_share_no_block(monkeypatch):
    """Nor does noise with itself: no counter of one tensor is taken twice, whatever the cells."""
    blocks = []

    def recorded(counter, key):
        c0, c1 = (np.asarray(c).astype(np.uint64) for c in np.broadcast_arrays(*counter[:2]))
        blocks.append((c0 | c1 << np.uint64(32)).reshape(-1))
        return philox4x32_10(counter, key)

    monkeypatch.setattr(reference.mask, "philox4x32_10", recorded)
    words, x = np.empty(200, np.uint32), np.ones(6400, np.float32)
    for first in (0, 2**34 - 3200, 2**37 - 3200, NOISE_END - 6400):
        reference.gaussian_multiply(0, x, x, first, x.size, SEED, OFFSET, 0.5)
    noise, masks = np.concatenate(blocks), []
    for first in (0, 2**34 - 3200, 2**37 - 3200, NOISE_END - 6400, 2**64 - 6400):
        blocks.clear()
        reference.draw_bits(words, 0, first, 6400, SEED, OFFSET, 1)
        masks += blocks
    assert np.unique(noise).size == noise.size == 4 * 6400 // 4
    assert not np.isin(noise, np.concatenate(masks)).any()
    assert set(noise >> np.uint64(59) & np.uint64(3)) == {2}
    assert set(np.concatenate(masks) >> np.uint64(59) & np.uint64(3)) == {1}


# ---- what they do ----


def test_noise_has_mean_1_and_the_variance_of_dropout(dtype):
    """``1 + sqrt(p / (1 - p)) z``: mean and variance of x are those that inverted dropout gives it."""
    p = 0.8
    sigma, x = math.sqrt(p / (1 - p)), np.ones(N, dtype.public)
    y = np.empty_like(x)
    reference.gaussian_multiply(dtype.tag, x.view(dtype.storage), y.view(dtype.storage), 0, N, 1, 0, sigma)
    noise = y.astype(np.float64)
    assert abs(noise.mean() - 1) < SIGMAS * sigma / math.sqrt(N)
    assert abs(noise.var() / sigma**2 - 1) < SIGMAS * math.sqrt(2 / N)


def test_gaussian_multiply_is_one_rounded_product(dtype):
    """x times the float32 factor, in x's own precision, float32 for 16 bits."""
    x, y = dtype.numbers(5000), np.empty(5000, dtype.storage)
    reference.gaussian_multiply(dtype.tag, x.view(dtype.storage), y, 9, x.size, SEED, OFFSET, 1 / 3)
    factor = np.float32(1) + np.float32(1 / 3) * normals(5000, first=9, seed=SEED, offset=OFFSET)
    wanted = (x.astype(dtype.computed) * factor.astype(dtype.computed)).astype(dtype.public)
    assert (y.view(dtype.public) == wanted).all()

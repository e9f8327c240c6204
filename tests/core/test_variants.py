"""The numbers behind each kind: scales by exact arithmetic, cells by NumPy, the geometry of DropBlock by a loop."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastdrop as fd
from fastdrop.backends import reference
from fastdrop.core import variants
from fastdrop.core.mask import word_count
from fastdrop.core.random import DROP_ALL

from ..cases import THRESHOLDS

SCALINGS = ("inverted", "standard", "alpha", "alpha_slope")
CUTS = {"T=0": 0, **THRESHOLDS}
ULP = 2.0**-52


# ---- affine ----


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_affine_is_what_the_papers_say(cut):
    """Inverted dropout divides by the keep probability q; standard leaves what is kept.

    Klambauer's a is (q + f**2 q (1 - q)) ** -1/2, and b is -a (1 - q) f; kept x becomes a x + b, dropped x a f + b.
    """
    q, floor = 1 - Fraction(cut, DROP_ALL), Fraction(variants.SELU_FLOOR)
    a, b, c = variants.affine("inverted", cut)
    assert abs(Fraction(a) * q - 1) <= ULP
    assert (b, c) == (0.0, 0.0)
    assert variants.affine("standard", cut) == (1.0, 0.0, 0.0)
    a, b, c = (Fraction(value) for value in variants.affine("alpha", cut))
    assert abs(a * a * (q + floor**2 * q * (1 - q)) - 1) <= 8 * ULP
    assert abs(b + a * (1 - q) * floor) <= 4 * ULP * abs(b)
    assert abs(c - (a * floor + b)) <= 4 * ULP * abs(a * floor)
    for scaling in SCALINGS:  # the slope is the derivative
        a, _, _ = variants.affine(scaling, cut)
        assert variants.affine(variants.slope(scaling), cut) == (a, 0.0, 0.0)
        assert variants.slope(variants.slope(scaling)) == variants.slope(scaling)


def test_selu_floor_is_selus():
    """-lambda alpha of Klambauer et al., equation 14, to the last bit but one, which is torch's."""
    scale, alpha = 1.0507009873554804934, 1.6732632423543772848
    assert -scale * alpha == variants.SELU_FLOOR


def test_affine_of_everything_and_of_nothing_dropped():
    """If everything is dropped all are 0, except the scale of standard scaling."""
    for scaling in SCALINGS:
        assert variants.affine(scaling, DROP_ALL) == ((1.0 if scaling == "standard" else 0.0), 0.0, 0.0)
        assert variants.affine(scaling, 0)[:2] == (1.0, 0.0)
        assert all(map(math.isfinite, variants.affine(scaling, DROP_ALL - 1)))
    with pytest.raises(ValueError, match="scaling must be one of 'inverted', 'standard', 'alpha', 'alpha_slope'"):
        variants.affine("invertd", 1 << 31)


# ---- spread ----


def test_spread_is_what_dropout_has():
    """Dropout's factor is 1 / (1 - p) with probability 1 - p and else 0: its variance is p / (1 - p)."""
    for p in (1e-300, 1e-6, 1 / 3, 0.9, 1 - 2.0**-53):
        exact = Fraction(p)
        assert abs(Fraction(variants.spread(p)) ** 2 / (exact / (1 - exact)) - 1) <= 4 * ULP


# ---- cells ----

shapes = st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple)


@given(shapes, st.data())
def test_cells_are_ones_where_decisions_are_shared(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    own = {
        variants.feature_cells(shape, axis): {0, axis},
        variants.shared_cells(shape, axis): set(range(len(shape))) - {axis},
        variants.shared_cells(shape, 0, axis): set(range(len(shape))) - {0, axis},
        variants.shared_cells(shape): set(range(len(shape))),
        variants.sample_cells(shape, "row"): {0},
        variants.sample_cells(shape, "batch"): set(),
    }
    for cells, axes in own.items():
        assert cells == tuple(extent if at in axes else 1 for at, extent in enumerate(shape))


# ---- blocks ----


@st.composite
def geometries(draw):
    """(shape of the mask, extents of blocks on its last axes)."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=5)))
    axes = draw(st.integers(1, len(shape)))
    return shape, tuple(draw(st.integers(1, 9)) for _ in range(axes))


def fitting(shape, sizes):
    """The extents of the last axes, and those of the blocks, which are at most as long."""
    extents = shape[len(shape) - len(sizes) :]
    return extents, [min(size, extent) for size, extent in zip(sizes, extents, strict=True)]


@given(geometries(), st.floats(0, 1), st.integers(0, 99))
def test_blocks_widen_seeds_to_blocks(geometry, p, seed):
    """Compares the passes, run by the reference, with a loop over blocks."""
    shape, sizes = geometry
    plan = variants.blocks(shape, p, sizes)
    extents, fits = fitting(shape, sizes)
    lead = shape[: len(shape) - len(sizes)]
    assert plan.seeds == (*lead, *(extent - size + 1 for extent, size in zip(extents, fits, strict=True)))
    assert len(plan.passes) == len(sizes)
    seeds = fd.draw_mask(plan.seeds, 0.2, rng=seed)
    words = seeds.words
    bits = math.prod(plan.seeds)
    for outer, n, inner, block in plan.passes:
        assert outer * n * inner == bits
        bits = outer * (n + block - 1) * inner
        to = np.empty(word_count(bits), np.uint32)
        reference.dilate_bits(to, words, outer, n, inner, block)
        words = to
    assert bits == math.prod(shape)
    keep = np.ones(shape, np.bool_)
    for at in np.argwhere(~seeds.to_bool()):
        corner = zip(at[len(lead) :], fits, strict=True)
        keep[(*at[: len(lead)], *(slice(i, i + size) for i, size in corner))] = False
    assert (fd.PackedMask(words, shape, 0.5).to_bool() == keep).all()


def test_blocks_gamma_is_ghiasis():
    """Equation 1 of the paper, for square maps: (1 - keep_prob) / size**2 * feature**2 / (feature - size + 1)**2."""
    for feature, size, p in itertools.product((7, 14, 56), (1, 2, 3, 7), (0.1, 0.9)):
        gamma = p / size**2 * feature**2 / (feature - size + 1) ** 2
        shape = (8, 3, feature, feature)
        assert math.isclose(variants.blocks(shape, p, (size, size)).gamma, gamma, rel_tol=4 * ULP)


@given(geometries(), st.floats(0, 1))
def test_blocks_gamma_is_a_probability_up_to_p(geometry, p):
    """gamma is p if blocks are single cells or fill the axes, because nothing overlaps then."""
    shape, sizes = geometry
    gamma = variants.blocks(shape, p, sizes).gamma
    assert 0 <= gamma <= p
    extents, fits = fitting(shape, sizes)
    if all(size in (1, extent) for size, extent in zip(fits, extents, strict=True)):
        assert gamma == p


def test_blocks_of_nothing():
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (0, 0, 0, 0)):
        assert 0 <= variants.blocks(shape, 0.3, (3, 3)).gamma <= 1


def covers(extents, fits):
    """How many blocks contain each cell: the product over the axes."""
    along = []
    for extent, size in zip(extents, fits, strict=True):
        count = np.zeros(extent, np.int64)
        for start in range(extent - size + 1):
            count[start : start + size] += 1
        along.append(count)
    return math.prod(np.ix_(*along)).reshape(-1)


@given(geometries(), st.floats(0, 0.999))
def test_blocks_drop_a_little_less_than_p(geometry, p):
    """A cell in c blocks is kept with probability (1 - gamma)**c, and the c average to p / gamma: by Bernoulli's and
    Bonferroni's inequalities the share dropped lies between p - gamma**2 mean(c (c - 1)) / 2 and p."""
    shape, sizes = geometry
    gamma, c = variants.blocks(shape, p, sizes).gamma, covers(*fitting(shape, sizes))
    assert math.isclose(c.mean() * gamma, p, rel_tol=1e-12, abs_tol=1e-300)
    dropped = 1 - np.mean((1 - gamma) ** c)
    assert p - gamma**2 * np.mean(c * (c - 1)) / 2 - 1e-12 <= dropped <= p + 1e-12

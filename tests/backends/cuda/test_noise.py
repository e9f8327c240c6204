"""Runs the PTX of the CUDA kernels of noise and of bits alone, and compares it with the reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdrop.backends import reference

from ...cases import DTYPES, SEED
from .cases import (
    ANGLES,
    DILATIONS,
    RADII,
    assert_counted,
    assert_dilated_as_reference,
    assert_gaussian_as_reference,
    blocks_of,
    drawing_noise,
)

pytest_plugins = ["tests.backends.cuda.gpu_stub"]

F32 = DTYPES[0]


# ---- gaussian_multiply ----


@pytest.mark.parametrize("first", [0, 1, 63, 2**34 - 100, 2**61 - 2047])
def test_gaussian_multiply_lengths(gpu, first):
    """From within a tile, over where the counter passes 2**32, to the last cell."""
    for n in (1, 15, 16, 17, 63, 64, 65, 2047):
        assert_gaussian_as_reference(gpu, F32, n, first=first)


def test_gaussian_multiply_of_each_dtype(gpu, dtype):
    item = dtype.itemsize
    for shifts in ((0, 0), (item, 0), (0, 16 - item)):
        assert_gaussian_as_reference(gpu, dtype, 1000, first=3, shifts=shifts)
    assert_gaussian_as_reference(gpu, dtype, 1000, first=3, shifts=(item, 0), in_place=True)
    for sigma in (0.0, 1 / 3, 1e-8, 1e30):
        assert_gaussian_as_reference(gpu, dtype, 1000, sigma=sigma)


@pytest.mark.parametrize("radius", RADII, ids=hex)
def test_gaussian_multiply_at_the_borders_of_uniform_numbers(gpu, radius):
    for angle in ANGLES:
        first, offset = drawing_noise(radius, angle)
        assert_gaussian_as_reference(gpu, F32, 64, first=first, offset=offset)


def test_draws_at_the_borders_are_those_asked_for():
    first, offset = drawing_noise(0xFFFFFFFF, 0)
    y = np.ones(64, np.float32)
    reference.gaussian_multiply(0, y, y, first, 64, SEED, offset, 1.0)
    assert (y == 1.0).sum() >= 2  # both normals are 0, since u = 1


def test_noise_and_bits_any_number_of_blocks(gpu, monkeypatch):
    for blocks in blocks_of(gpu, monkeypatch, 1, 3):
        assert_gaussian_as_reference(gpu, F32, 20_001, first=9)
        assert_dilated_as_reference(gpu, 3, 100, 70, 3)
        assert_counted(gpu, 20_001)
        assert {launch.grid for launch in gpu.launches} == {(blocks, 1, 1)}


# ---- dilate_bits and count_bits ----


@pytest.mark.parametrize("shape", [*DILATIONS, (50, 56, 56, 7), (9, 0, 3, 5)], ids=str)
def test_dilate_bits(gpu, shape):
    assert_dilated_as_reference(gpu, *shape)


@settings(max_examples=25)
@given(outer=st.integers(1, 40), n=st.integers(1, 70), inner=st.integers(1, 70), block=st.integers(1, 80))
def test_dilate_bits_any_shape(gpu, outer, n, inner, block):
    assert_dilated_as_reference(gpu, outer, n, inner, block)


def test_count_bits(gpu):
    for count in (1, 31, 33, 127, 129, 2047):
        assert_counted(gpu, count, before=2**32 - 1)

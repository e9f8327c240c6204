"""Tests what the launcher hands to the driver: parameters, streams, grids."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastdrop.backends.cuda import driver
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.backends.cuda.compile import Variant
from fastdrop.core.checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

from ...cases import TENTH
from .launching import (
    AFFINE,
    CODES,
    FIRST,
    KEPT,
    OFFSET,
    POSITION,
    SEED,
    SEED_AT,
    STREAM,
    WORDS,
    X,
    Y,
    coefficients,
    draw,
    forward,
    parameters,
)

pytest_plugins = ["tests.backends.cuda.gpu_stub"]


# ---- parameters ----


@pytest.mark.parametrize("seed_at", [0, SEED_AT])
def test_draw_bits_parameters(recorded, seed_at):
    draw(n=2**40 + 1, seed_at=seed_at)
    (launch,) = recorded.launches
    assert launch.variant == Variant("draw_words")
    assert parameters(launch) == [WORDS, POSITION, FIRST, 2**40 + 1, SEED, seed_at, OFFSET, TENTH, 8]


@pytest.mark.parametrize(
    ("dtype", "first", "affine"),
    [
        *[(dtype, FIRST, AFFINE) for dtype in (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)],
        (FLOAT32, FIRST, (1.1, 0.0, 0.0)),
        (FLOAT64, FIRST + 5, (1.1, 0.0, 0.0)),
    ],
)
def test_dropout_forward_parameters(recorded, dtype, first, affine):
    n = 5 * 1024 + 3
    forward(dtype=dtype, n=n, first=first, affine=affine, seed_at=SEED_AT)
    (launch,) = recorded.launches
    form = "drawn_shifted" if first % 32 else "drawn"
    assert launch.variant == Variant("elementwise", dtype, form, affine[1] == 0.0)
    expected = [X, Y, WORDS, first, n, 5, SEED, SEED_AT, OFFSET, TENTH, 8, 0, *coefficients(dtype, affine)]
    assert parameters(launch) == expected


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_masked_affine_parameters(recorded, dtype):
    numba_cuda.masked_affine_at(0, STREAM, dtype, X, Y, WORDS, POSITION, 1, 1, 3000, *AFFINE)
    (launch,) = recorded.launches
    assert launch.variant == Variant("elementwise", dtype, "stored", False)
    assert parameters(launch) == [X, Y, WORDS, POSITION, 3000, 2, 0, 0, 0, 0, 0, 0, *coefficients(dtype, AFFINE)]


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_parameters_with_a_count(recorded, dtype):
    """The count's number of cells arrives whole, whatever is computed in."""
    affine = (float(2**53 - 1), 0.0, 0.0)
    numba_cuda.masked_affine_at(0, STREAM, dtype, X, Y, WORDS, POSITION, 1, 1, 3000, *affine, kept_at=KEPT)
    numba_cuda.masked_affine_at(0, STREAM, dtype, X, Y, WORDS, POSITION, 30, 20, 5, *affine, kept_at=KEPT)
    stored, narrow = recorded.launches
    assert stored.variant == Variant("elementwise", dtype, "stored", True, True)
    assert narrow.variant == Variant("strided", dtype, "narrow", True, True)
    assert parameters(stored)[-4:] == parameters(narrow)[-4:] == [KEPT, *affine]


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, FLOAT16, BFLOAT16])
def test_gaussian_multiply_parameters(recorded, dtype):
    numba_cuda.gaussian_multiply_at(0, STREAM, dtype, X, Y, 2**60 + 5, 1000, SEED, OFFSET, 1 / 3, seed_at=SEED_AT)
    (launch,) = recorded.launches
    assert launch.variant == Variant("gaussian_multiply", dtype)
    assert parameters(launch) == [X, Y, 2**60 + 5, 1000, SEED, SEED_AT, OFFSET, float(np.float32(1 / 3))]


def test_parameters_of_bits(recorded):
    numba_cuda.dilate_bits_at(0, STREAM, X, Y, 2**40, 50, 7, 3)
    numba_cuda.count_bits_at(0, STREAM, WORDS, 2**40 + 1, KEPT)
    dilated, counted = recorded.launches
    assert dilated.variant == Variant("dilate_bits")
    to, words, cells, row, multiplier, shift, length, inner = parameters(dilated)
    assert (to, words, cells, row, length, inner) == (X, Y, 2**40 * 364, 364, 350, 7)
    for cell in (0, 363, 364, cells - 1):
        assert (2 * cell * multiplier >> 64) >> shift == cell // 364
    assert counted.variant == Variant("count_bits")
    assert parameters(counted) == [WORDS, 2**40 + 1, KEPT]


@pytest.mark.parametrize(("x", "form"), [(X, "wide"), (X + 8, "narrow")])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_strided_affine_parameters(recorded, dtype, x, form):
    axes = ((3, 400), (5, 0), (7, 40), (8, 3))
    numba_cuda.strided_affine_at(0, STREAM, dtype, x, Y, WORDS, POSITION, axes, *AFFINE)
    (launch,) = recorded.launches
    assert launch.variant == Variant("strided", dtype, form, False)
    values = parameters(launch)
    assert values[:5] == [x, Y, WORDS, POSITION, 840]
    extents, cells = values[5:17:4], [*values[8:17:4], values[17]]
    assert extents == [8, 7, 5]  # innermost first; the outermost's isn't needed
    assert cells == [3, 40, 0, 400]
    for extent, multiplier, shift in zip(extents, values[6:17:4], values[7:17:4], strict=True):
        assert [n * multiplier >> shift for n in range(840)] == [n // extent for n in range(840)]
    assert values[18:] == [0, *coefficients(dtype, AFFINE)]


def test_parameters_of_every_variant_are_what_its_ptx_declares(stub_driver):
    """Also of variants that nothing above launches."""
    _, images = stub_driver
    for variant in (
        Variant("draw_words"),
        Variant("elementwise", FLOAT64, "drawn"),
        *(Variant("strided", BFLOAT16, "narrow", counted=counted) for counted in (False, True)),
        Variant("gaussian_multiply", FLOAT64),
        Variant("dilate_bits"),
        Variant("count_bits"),
    ):
        text = images(variant, (9, 0))[1].decode()
        declared = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)", text, re.S)[1]
        assert [CODES[kind] for kind in re.findall(r"\.param\s+\.(\w+)", declared)] == list(variant.codes)


# ---- stream and grid ----


@pytest.mark.parametrize("stream", [0, 1, 2, STREAM, 2**64 - 16])
def test_launch_goes_to_the_stream_it_is_given(recorded, stream):
    draw(stream=stream)
    forward(stream=stream)
    assert [launch.stream for launch in recorded.launches] == [stream, stream]
    assert {launch.shared for launch in recorded.launches} == {0}


@pytest.mark.parametrize("sms", [1, 132])
def test_grid_is_what_is_needed_and_no_more_than_the_device_is_worth(recorded, sms):
    recorded.install((9, 0), sms=sms)
    recorded.executes = False
    most = sms * driver.BLOCKS_PER_SM
    per_block = driver.THREADS * 32  # cells of draw_words, elements of elementwise
    for blocks in (1, 2, most - 1, most, most + 1, 1000 * most, 2**40):
        for n in ((blocks - 1) * per_block + 1, blocks * per_block):
            recorded.launches.clear()
            draw(n=n)
            numba_cuda.draw_bits_at(0, 0, WORDS, 0, 0, n, SEED, OFFSET, TENTH)
            forward(n=n)
            grids = [launch.grid for launch in recorded.launches]
            assert grids[1:] == [(min(blocks, most), 1, 1)] * 2, n
            assert grids[0][0] - grids[1][0] in (0, 1), n  # it begins within a word
            assert {launch.block for launch in recorded.launches} == {(driver.THREADS, 1, 1)}


@pytest.mark.parametrize(("x", "per_thread"), [(X, 4), (X + 4, 1)], ids=["wide", "narrow"])
def test_grid_of_strided_elements(recorded, x, per_thread):
    for rows in (1, 31, 32, 33, 1000):
        recorded.launches.clear()
        numba_cuda.strided_affine_at(0, 0, FLOAT32, x, Y, WORDS, 0, ((rows, 1), (16, 0)), *AFFINE)
        (launch,) = recorded.launches
        assert launch.grid == (-(-rows * 16 // per_thread // driver.THREADS), 1, 1)


def test_grid_of_noise_and_bits(recorded):
    for n, first, blocks in ((1, 0, 1), (512, 0, 1), (512, 1, 2), (65, 63, 1), (100_000, 0, 196)):
        recorded.launches.clear()
        numba_cuda.gaussian_multiply_at(0, 0, FLOAT32, X, Y, first, n, SEED, OFFSET, 0.5)
        assert recorded.launches[0].grid == (blocks, 1, 1), (n, first)
    recorded.launches.clear()
    numba_cuda.dilate_bits_at(0, 0, X, Y, 1, 4095, 1, 2)
    numba_cuda.dilate_bits_at(0, 0, X, Y, 1, 4095, 1, 3)
    numba_cuda.count_bits_at(0, 0, WORDS, 128 * 16, KEPT)
    numba_cuda.count_bits_at(0, 0, WORDS, 128 * 16 + 1, KEPT)
    assert [launch.grid[0] for launch in recorded.launches] == [1, 2, 1, 2]


def test_nothing_to_do_launches_nothing(recorded):
    draw(n=0)
    forward(n=0)
    numba_cuda.masked_affine_at(0, STREAM, FLOAT32, X, Y, WORDS, 0, 3, 0, 5, *AFFINE)
    numba_cuda.strided_affine_at(0, STREAM, FLOAT32, X, Y, WORDS, 0, ((3, 0), (0, 5), (2, 2)), *AFFINE)
    numba_cuda.gaussian_multiply_at(0, STREAM, FLOAT32, X, Y, 5, 0, SEED, OFFSET, 0.5)
    numba_cuda.dilate_bits_at(0, STREAM, X, Y, 0, 3, 5, 2)
    numba_cuda.count_bits_at(0, STREAM, WORDS, 0, KEPT)
    assert recorded.launches == []
    assert recorded.calls == {}

"""Tests what the launcher hands to the driver: parameters, streams, grids."""

from __future__ import annotations

import numpy as np
import pytest

from fastdrop.backends.cuda import driver
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.backends.cuda.compile import Variant
from fastdrop.core.checks import BFLOAT16, FLOAT32, FLOAT64

from ...cases import TENTH
from .launching import (
    AFFINE,
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
    draw,
    forward,
    parameters,
)

pytest_plugins = ["tests.backends.cuda.gpu_stub"]

SCALE = (1.1, 0.0, 0.0)
CELLS = (float(2**53 - 1), 0.0, 0.0)  # of which float32 would lose some
AXES = ((3, 400), (5, 0), (7, 40), (8, 3))


def rounded(affine):
    return [float(np.float32(v)) for v in affine]


def masked(dtype, grid, affine=AFFINE, **options):
    numba_cuda.masked_affine_at(0, STREAM, dtype, X, Y, WORDS, POSITION, *grid, *affine, **options)


def rows(shape):
    numba_cuda.draw_rows_at(0, STREAM, WORDS, POSITION, FIRST, *shape, SEED, OFFSET, TENTH, seed_at=SEED_AT)


def strided(dtype, axes, x=X, affine=AFFINE):
    numba_cuda.strided_affine_at((0, STREAM), dtype, (x, Y, WORDS), POSITION, axes, affine)


# ---- parameters ----

N = 5 * 1024 + 3
DRAW = SEED, SEED_AT, OFFSET, TENTH, 8
CASES = {  # call, kernel, its parameters or the last of them
    "draw_bits": (lambda: draw(n=2**40 + 1), Variant("draw_words"), [WORDS, POSITION, FIRST, 2**40 + 1, SEED, 0]),
    "draw_bits, seed on the device": (
        lambda: draw(n=2**40 + 1, seed_at=SEED_AT),
        Variant("draw_words"),
        [WORDS, POSITION, FIRST, 2**40 + 1, *DRAW],
    ),
    "draw_rows": (
        lambda: rows((2**20, 2**62 + 1, 64, 2**61 + 3, 2**14)),
        Variant("draw_rows"),
        [WORDS, POSITION, FIRST, 2**40, 2**14, 2**63, 14, 64, 2**63, 6, 2**61 + 3, 2**62 + 1, *DRAW],
    ),
    "dropout_forward": (
        lambda: forward(n=N, seed_at=SEED_AT),
        Variant("elementwise", FLOAT32, "drawn", False),
        [X, Y, WORDS, FIRST, N, 5, *DRAW, 0, *rounded(AFFINE)],
    ),
    "dropout_forward, shifted": (
        lambda: forward(FLOAT32, N, FIRST + 5, SCALE, seed_at=SEED_AT),
        Variant("elementwise", FLOAT32, "drawn_shifted"),
        [X, Y, WORDS, FIRST + 5, N, 5, *DRAW, 0, *rounded(SCALE)],
    ),
    "masked_affine": (
        lambda: masked(FLOAT64, (1, 1, 3000)),
        Variant("elementwise", FLOAT64, "stored", False),
        [X, Y, WORDS, POSITION, 3000, 2, 0, 0, 0, 0, 0, 0, *AFFINE],
    ),
    "masked_affine, counted": (
        lambda: masked(FLOAT32, (1, 1, 3000), CELLS, kept_at=KEPT),
        Variant("elementwise", FLOAT32, "stored", True, True),
        [X, Y, WORDS, POSITION, 3000, 2, 0, 0, 0, 0, 0, KEPT, *CELLS],
    ),
    "gaussian_multiply": (
        lambda: numba_cuda.gaussian_multiply_at(
            0, STREAM, BFLOAT16, X, Y, 2**60 + 5, 1000, SEED, OFFSET, 1 / 3, seed_at=SEED_AT
        ),
        Variant("gaussian_multiply", BFLOAT16),
        [X, Y, 2**60 + 5, 1000, SEED, SEED_AT, OFFSET, *rounded([1 / 3])],
    ),
    "count_bits": (
        lambda: numba_cuda.count_bits_at(0, STREAM, WORDS, 2**40 + 1, KEPT),
        Variant("count_bits"),
        [WORDS, 2**40 + 1, KEPT],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_parameters(recorded, name):
    call, variant, expected = CASES[name]
    call()
    (launch,) = recorded.launches
    assert launch.variant == variant
    assert parameters(launch)[: len(expected)] == expected
    assert (launch.stream, launch.shared) == (STREAM, 0)


def test_divisions_among_the_parameters(recorded):
    """Multipliers and shifts that divide exactly by extents."""
    strided(FLOAT32, AXES)
    strided(FLOAT32, AXES, x=X + 4)
    masked(FLOAT32, (30, 20, 5), CELLS, kept_at=KEPT)
    wide, narrow, counted = recorded.launches
    assert wide.variant == Variant("strided", FLOAT32, "wide", False)
    assert narrow.variant == Variant("strided", FLOAT32, "narrow", False)
    assert counted.variant == Variant("strided", FLOAT32, "narrow", True, True)
    values = parameters(wide)
    assert values[:5] == [X, Y, WORDS, POSITION, 840]
    extents, cells = values[5:17:4], [*values[8:17:4], values[17]]
    assert extents == [8, 7, 5]  # innermost first; the outermost's isn't needed
    assert cells == [3, 40, 0, 400]
    for extent, multiplier, shift in zip(extents, values[6:17:4], values[7:17:4], strict=True):
        assert [n * multiplier >> shift for n in range(840)] == [n // extent for n in range(840)]
    assert values[18:] == [0, *rounded(AFFINE)]
    assert parameters(counted)[-4:] == [KEPT, *CELLS]
    numba_cuda.dilate_bits_at(0, STREAM, X, Y, 2**40, 50, 7, 3)
    dilated = recorded.launches[-1]
    to, words, cells, row, multiplier, shift, length, inner = parameters(dilated)
    assert (to, words, cells, row, length, inner) == (X, Y, 2**40 * 364, 364, 350, 7)
    for cell in (0, 363, 364, cells - 1):
        assert (2 * cell * multiplier >> 64) >> shift == cell // 364


# ---- grid ----


@pytest.mark.parametrize("sms", [1, 132])
def test_grid_is_what_is_needed_and_no_more_than_the_device_is_worth(recorded, sms):
    recorded.install((9, 0), sms=sms)
    recorded.executes = False
    most = sms * driver.BLOCKS_PER_SM
    per_block = driver.THREADS * 32  # cells of draw_words, elements of elementwise
    for blocks in (1, 2, most, most + 1, 2**40):
        for n in ((blocks - 1) * per_block + 1, blocks * per_block):
            recorded.launches.clear()
            numba_cuda.draw_bits_at(0, 0, WORDS, 0, 0, n, SEED, OFFSET, TENTH)
            forward(n=n)
            assert [launch.grid for launch in recorded.launches] == [(min(blocks, most), 1, 1)] * 2, n
            assert {launch.block for launch in recorded.launches} == {(driver.THREADS, 1, 1)}
    draw(n=32 * driver.THREADS)  # which begins within a word
    assert recorded.launches[-1].grid == (2, 1, 1)


GRIDS = {  # call, blocks
    "wide": (lambda: strided(FLOAT32, ((33, 1), (16, 0))), 2),
    "narrow": (lambda: strided(FLOAT32, ((33, 1), (16, 0)), x=X + 4), 5),
    **{
        f"noise {first}, {n}": (
            lambda n=n, first=first: numba_cuda.gaussian_multiply_at(0, 0, BFLOAT16, X, Y, first, n, SEED, OFFSET, 0.5),
            blocks,
        )
        for n, first, blocks in ((512, 0, 1), (512, 1, 2), (65, 63, 1))
    },
    "dilated": (lambda: numba_cuda.dilate_bits_at(0, 0, X, Y, 1, 4095, 1, 2), 1),
    "dilated beyond a block": (lambda: numba_cuda.dilate_bits_at(0, 0, X, Y, 1, 4095, 1, 3), 2),
    "counted": (lambda: numba_cuda.count_bits_at(0, 0, WORDS, 128 * 16, KEPT), 1),
    "counted beyond a block": (lambda: numba_cuda.count_bits_at(0, 0, WORDS, 128 * 16 + 1, KEPT), 2),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grid(recorded, name):
    call, blocks = GRIDS[name]
    call()
    assert [launch.grid for launch in recorded.launches] == [(blocks, 1, 1)]


def test_nothing_to_do_launches_nothing(recorded):
    draw(n=0)
    rows((3, 99, 0, 9, 5))
    rows((3, 99, 5, 9, 0))
    forward(n=0)
    masked(FLOAT32, (3, 0, 5))
    masked(FLOAT32, (0, 1, 5))
    strided(FLOAT32, ((3, 0), (0, 5), (2, 2)))
    numba_cuda.gaussian_multiply_at(0, STREAM, FLOAT32, X, Y, 5, 0, SEED, OFFSET, 0.5)
    numba_cuda.dilate_bits_at(0, STREAM, X, Y, 0, 3, 5, 2)
    numba_cuda.count_bits_at(0, STREAM, WORDS, 0, KEPT)
    assert recorded.calls == {}

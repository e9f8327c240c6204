"""Arrays beyond 2**31 elements and masks beyond 2**32 cells, where an index of 32 bits would wrap around."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import fastdrop as fd
from fastdrop import backends
from fastdrop.backends import reference
from fastdrop.core.random import keep_scale, threshold

from ..cases import DTYPES, assert_same_bits

pytestmark = pytest.mark.large
GUARD = "test_draw_bits_at_positions_beyond_2_32"
needs_memfd = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memfd_create, which Linux has")

PIECE = 1000


def needs(gigabytes: float) -> None:
    """Skips if there is less memory than that, or only the NumPy backend."""
    if backends.active_name() == "numpy":
        pytest.skip("2**31 elements take the NumPy backend a minute: needs the C extension or numba")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        pytest.skip("can't tell how much memory there is without /proc/meminfo")
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    if available < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of memory, {available:.1f} are available")


@pytest.fixture(autouse=True)
def _memory() -> None:
    gc.collect()  # of what is large nothing is left afterwards: no cycle holds it


def around(*borders: int, end: int) -> list[slice]:
    """Pieces on both sides of each border, and at both ends."""
    starts = [0, *(border - PIECE // 2 for border in borders), end - PIECE]
    return [slice(start, start + PIECE) for start in starts]


def keep_of(part: slice, p: float, rng: int) -> np.ndarray:
    return fd.draw_mask(part.stop - part.start, p, rng=rng, first_cell=part.start).to_bool()


@contextmanager
def repeating(n: int, repeat: int) -> Iterator[np.ndarray]:
    """n numbers of float16 in memory that repeats after ``repeat`` of them, so that it takes little memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    access, fixed, period = mmap.PROT_READ | mmap.PROT_WRITE, 0x10, 2 * repeat
    shared = mmap.MAP_SHARED | mmap.MAP_POPULATE  # all pages of a mapping at once: a fault for each takes seconds
    total = -(-2 * n // period) * period
    file = os.memfd_create("repeating")
    os.ftruncate(file, period)
    start = libc.mmap(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    try:
        for at in range(start, start + total, period):
            assert libc.mmap(at, period, access, shared | fixed, file, 0) == at
        yield np.frombuffer((ctypes.c_uint8 * (2 * n)).from_address(start), np.float16)
    finally:
        libc.munmap(start, total)
        os.close(file)


@pytest.mark.slow(GUARD)
@needs_memfd
def test_dropout_and_noise_beyond_2_32_elements(threads):
    """One thread writes in order, so y holds the last ``repeat`` elements afterwards, with element 2**32 among them."""
    needs(2)
    dtype, n, repeat = DTYPES[2], 2**32 + PIECE, 2**24
    fd.set_num_threads(1)
    with repeating(n, repeat) as x, repeating(n, repeat) as y:
        x[:repeat] = 1
        _, mask = fd.dropout(x, 0.1, rng=3, out=y)
        parts = [slice(part, part + PIECE) for part in (n - repeat, 2**32 - 2 * PIECE, 2**32 - PIECE // 2, 2**32)]
        wanted = [dtype.rounded(keep_of(part, 0.1, 3).astype(np.float16), mask.scale) for part in parts]
        seeded = fd.SeededMask(3, 0, (n,), 0.1)
        for call in (None, lambda: fd.dropout_backward(x, mask, out=y), lambda: fd.apply_mask(x, seeded, out=y)):
            if call:
                y[:repeat] = np.nan
                call()
            for part, want in zip(parts, wanted, strict=True):
                assert_same_bits(y[part], want, part)
        fd.gaussian_dropout(x, 0.2, rng=3, out=y)
        for part in parts:
            want = np.empty(PIECE, np.float16)
            reference.gaussian_multiply(2, np.ones(PIECE, np.float16), want, part.start, PIECE, 3, 0, 0.5)
            assert_same_bits(y[part], want, part)


@pytest.mark.slow(GUARD)
@needs_memfd
def test_several_threads_and_torch_beyond_2_31_elements(threads):
    """The tests above have one thread, which writes in order; here the whole result stays, 4 GiB of it."""
    torch = pytest.importorskip("torch")
    import fastdrop.torch as fdt

    needs(6)
    dtype, n, before = DTYPES[2], 2**31 + PIECE, torch.get_num_threads()
    parts = around(2**29, 2**30, 2**31, end=n)
    wanted = [dtype.rounded(keep_of(part, 0.1, 3).astype(np.float16), keep_scale(threshold(0.1))) for part in parts]
    fd.set_num_threads(2)
    torch.set_num_threads(2)
    y = np.empty(n, np.float16)
    with repeating(n, 2**24) as ones:
        ones[: 2**24] = 1
        x = torch.from_numpy(ones)
        for call in (
            lambda: fd.dropout(ones, 0.1, rng=3, out=y),
            lambda: fdt.dropout(torch.from_numpy(y).copy_(x), 0.1, seed=3, inplace=True),
        ):
            for part in parts:
                y[part] = np.nan
            call()
            for part, want in zip(parts, wanted, strict=True):
                assert_same_bits(y[part], want, part)
    torch.set_num_threads(before)


ROWS, SAMPLES = 2**22 + 1, 2**12 + 1
SHARED = {  # shape of the data and of the mask
    "a row of cells": ((ROWS, 1024), (1, 1024)),
    "a cell per row": ((ROWS, 1024), (ROWS, 1)),
    "channels first": ((SAMPLES, 1024, 1024), (SAMPLES, 1024, 1)),
    "channels last": ((SAMPLES, 1024, 1024), (SAMPLES, 1, 1024)),
}


@pytest.mark.slow(GUARD)
@needs_memfd
@pytest.mark.parametrize("name", SHARED)
def test_shared_mask_beyond_2_32_elements(name, threads):
    """y holds the last rows or samples afterwards."""
    needs(2)
    (shape, cells), repeat = SHARED[name], 2**24
    fd.set_num_threads(1)
    mask = fd.draw_mask(cells, 0.5, rng=4)
    keep = np.broadcast_to(mask.to_bool(), shape)
    with repeating(math.prod(shape), repeat) as x, repeating(math.prod(shape), repeat) as y:
        x[:repeat] = 1
        y[:repeat] = np.nan
        fd.apply_mask(x.reshape(shape), mask, out=y.reshape(shape))
        for at in (shape[0] - repeat // math.prod(shape[1:]), shape[0] - 2, shape[0] - 1):
            assert_same_bits(y.reshape(shape)[at], 2 * keep[at].astype(np.float16), at)


@pytest.mark.slow(GUARD)
def test_mask_beyond_2_32_cells():
    """The mask is drawn, counted, and applied at cells far from its start."""
    needs(3)
    n = 2**32 + PIECE
    mask = fd.draw_mask(n, 0.1, rng=5)
    assert mask.nbytes == -(-n // 32) * 4
    assert abs(mask.kept - 0.9 * n) < 5 * math.sqrt(0.09 * n)
    for part in around(2**30, 2**31, 2**32 - 2**31 // 3 * 2, 2**32, end=n):
        start = part.start // 32 * 32
        keep = keep_of(slice(start, part.stop), 0.1, 5)
        words = mask.words[start // 32 : -(-part.stop // 32)]
        got = np.unpackbits(words.view(np.uint8), bitorder="little")[: keep.size]
        assert (got == keep).all(), part
        keep = keep[part.start - start :]
        for grid in ((1, 1, PIECE), (1, 3, PIECE), (PIECE, 3, 1), (PIECE // 8, 3, 8)):
            ones, y = np.ones(grid, np.float32), np.empty(grid, np.float32)
            backends.active().masked_affine(0, ones, y, mask.words, part.start, *grid, 1.0, 0.0, 0.0)
            assert (y == keep.reshape(grid[0], 1, grid[2])).all(), (part, grid)


def test_draw_bits_at_positions_beyond_2_32():
    needs(2)
    words = np.zeros(2**27 + 64, np.uint32)
    for position in (2**31 - 7, 2**32 - 500, 2**32 + 13):
        backends.active().draw_bits(words, position, 2**33 + 5, PIECE, 6, 0, 1 << 31)
        lead = position % 32
        got = np.unpackbits(words[position // 32 :][:64].view(np.uint8), bitorder="little")[lead : lead + PIECE]
        assert (got == fd.draw_mask(PIECE, 0.5, rng=6, first_cell=2**33 + 5).to_bool()).all(), position

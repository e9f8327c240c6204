"""The CUDA backend: the primitives on a GPU's memory, by kernels written in Numba.

This module chooses the kernel and the path of each call and lays out its parameters. The same words bit for bit as on
the CPU; values too, but that a NaN that is computed with comes out as the GPU's one NaN.

Memory comes as addresses on a device and work goes to a stream: ``*_at(device, stream, ...)``, otherwise with the
parameters that `reference` gives the primitives. A seed may lie on the device: then ``seed_at`` is its address and
nobody waits for it, and a captured graph reads it anew at each replay.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..stream import NOISE_CELLS, NOISE_COUNTERS, PLANES_PER_GROUP
from ._cuda import driver
from ._cuda.tile import COUNTED, ITEM_BYTES, LANES, TILE_CELLS, VECTOR_BYTES

DIMS = 4
INDEX_END = 1 << 31  # elements that one launch of `strided` numbers

Axis = tuple[int, int]  # extent, stride in cells


def unavailable() -> str | None:
    """Why this backend can't run here; None if it can."""
    return driver.unavailable()


def describe() -> str:
    """One line for `show_config`."""
    return f"CUDA, {driver.count()} GPU" + ("s" if driver.count() > 1 else "")


def prepare(device: int) -> None:
    """Raises what the first launch on a device would; loads a kernel there."""
    driver.device(device).kernel("draw_words")


def draw_bits_at(
    device: int,
    stream: int,
    words: int,
    position: int,
    first: int,
    n: int,
    seed: int,
    offset: int,
    threshold: int,
    *,
    seed_at: int = 0,
) -> None:
    if n:
        kernel = driver.device(device).kernel("draw_words")
        threads = (position % 32 + n + 31) // 32
        groups = _groups(threshold)
        kernel.launch(stream, threads, words, position, first, n, seed, seed_at, offset, threshold, groups)


def dropout_forward_at(
    device: int,
    stream: int,
    dtype: int,
    x: int,
    y: int,
    words: int,
    first: int,
    n: int,
    seed: int,
    offset: int,
    threshold: int,
    a: float,
    b: float,
    c: float,
    *,
    seed_at: int = 0,
) -> None:
    """``words`` 0: they are not kept."""
    if n:
        form = "drawn_shifted" if first & 31 else "drawn"
        whole, threads = _tiles(x, y, n)
        kernel = driver.device(device).kernel("elementwise", dtype, form, b == 0.0 and c == 0.0)
        draw = seed, seed_at, offset, threshold, _groups(threshold)
        kernel.launch(stream, threads, x, y, words, first, n, whole, *draw, 0, a, b, c)


def masked_affine_at(
    device: int,
    stream: int,
    dtype: int,
    x: int,
    y: int,
    words: int,
    position: int,
    outer: int,
    repeat: int,
    inner: int,
    a: float,
    b: float,
    c: float,
    *,
    kept_at: int = 0,
) -> None:
    """``kept_at``: kept elements become ``a / kept * x + b`` for the uint64 kept at this address, 0 x + b for 0."""
    if repeat == 1:
        _stored_affine_at(device, stream, dtype, x, y, words, position, outer * inner, a, b, c, kept_at)
        return
    axes = (outer, inner), (repeat, 0), (inner, 1)
    strided_affine_at(device, stream, dtype, x, y, words, position, axes, a, b, c, kept_at=kept_at)


def _stored_affine_at(
    device: int,
    stream: int,
    dtype: int,
    x: int,
    y: int,
    words: int,
    position: int,
    n: int,
    a: float,
    b: float,
    c: float,
    kept_at: int,
) -> None:
    """An element for each cell, in the cells' order."""
    if n:
        whole, threads = _tiles(x, y, n)
        kernel = driver.device(device).kernel("elementwise", dtype, "stored", b == 0.0 and c == 0.0, kept_at != 0)
        kernel.launch(stream, threads, x, y, words, position, n, whole, 0, 0, 0, 0, 0, kept_at, a, b, c)


def strided_affine_at(
    device: int,
    stream: int,
    dtype: int,
    x: int,
    y: int,
    words: int,
    position: int,
    axes: Sequence[Axis],
    a: float,
    b: float,
    c: float,
    *,
    kept_at: int = 0,
) -> None:
    """``masked_affine`` for cells at any strides, ``axes`` in the order of memory, outermost first; a stride of 0
    shares a decision. One launch, unless there are 2**31 elements or more than four axes that don't merge."""
    axes = _collapsed(axes)
    n = math.prod(extent for extent, _ in axes)
    if not axes or axes == [(n, 1)] or not n:
        _stored_affine_at(device, stream, dtype, x, y, words, position, n, a, b, c, kept_at)
        return
    if len(axes) > DIMS or n >= INDEX_END:
        for start, cell, part in _parts(axes):
            at = start * ITEM_BYTES[dtype]
            strided_affine_at(
                device, stream, dtype, x + at, y + at, words, position + cell, part, a, b, c, kept_at=kept_at
            )
        return
    step = VECTOR_BYTES // ITEM_BYTES[dtype]
    wide = (x | y) % VECTOR_BYTES == 0 and axes[-1][0] % step == 0
    form = "wide" if wide else "narrow"
    kernel = driver.device(device).kernel("strided", dtype, form, b == 0.0 and c == 0.0, kept_at != 0)
    inner_first = [*reversed(axes), *[(1, 0)] * (DIMS - len(axes))]
    divisions = [value for extent, cells in inner_first[:-1] for value in (extent, *reciprocal(extent), cells)]
    threads, outermost = n // step if wide else n, inner_first[-1][1]
    kernel.launch(stream, threads, x, y, words, position, n, *divisions, outermost, kept_at, a, b, c)


def gaussian_multiply_at(
    device: int,
    stream: int,
    dtype: int,
    x: int,
    y: int,
    first: int,
    n: int,
    seed: int,
    offset: int,
    sigma: float,
    *,
    seed_at: int = 0,
) -> None:
    if n:
        kernel = driver.device(device).kernel("gaussian_multiply", dtype)
        tiles = -(-(first % NOISE_CELLS + n) // NOISE_CELLS)
        kernel.launch(stream, tiles * NOISE_COUNTERS, x, y, first, n, seed, seed_at, offset, sigma)


def dilate_bits_at(device: int, stream: int, to: int, words: int, outer: int, n: int, inner: int, block: int) -> None:
    row = (n + block - 1) * inner
    cells = outer * row
    if cells:
        kernel = driver.device(device).kernel("dilate_bits")
        multiplier, shift = reciprocal(row, 63)
        kernel.launch(stream, -(-cells // 32), to, words, cells, row, multiplier, shift - 63, n * inner, inner)


def count_bits_at(device: int, stream: int, words: int, count: int, kept: int) -> None:
    """Adds the number of 1s in so many words to the uint64 at an address."""
    if count:
        driver.device(device).kernel("count_bits").launch(stream, -(-count // COUNTED), words, count, kept)


def fill_at(device: int, stream: int, address: int, word: int, count: int) -> None:
    """So many words, all the same."""
    with driver.device(device) as on:
        driver.check(*on.driver.cuMemsetD32Async(address, word, count, stream))


def copy_at(device: int, stream: int, to: int, source: int, size: int) -> None:
    """So many bytes, on one device."""
    with driver.device(device) as on:
        driver.check(*on.driver.cuMemcpyDtoDAsync(to, source, size, stream))


def empty(shape: tuple[int, ...], dtype: Any, device: int, stream: Any) -> Any:
    """One of Numba's arrays, bound to a stream; ``device`` -1: on the current GPU."""
    from numba import cuda

    with contextlib.nullcontext() if device < 0 else cuda.gpus[device]:
        return cuda.device_array(shape, dtype, stream=stream)


def upload(x: Any) -> Any:
    """The same for what a NumPy array holds."""
    from numba import cuda

    return cuda.to_device(x)


device_of = driver.device_of


def reciprocal(extent: int, bits: int = 31) -> tuple[int, int]:
    """(multiplier, shift) with ``n * multiplier >> shift == n // extent`` for n of so many bits.

    The multiplier is 2**shift / extent rounded up, too large by less than 1; with ``shift = bits + ceil(log2(extent))``
    n times that is less than 2**shift / extent.
    """
    shift = bits + (extent - 1).bit_length()
    return -(-(1 << shift) // extent), shift


@lru_cache(maxsize=1024)
def _groups(threshold: int) -> int:
    """Groups up to the one with the threshold's last 1: later ones decide nothing."""
    return 8 - ((threshold & -threshold).bit_length() - 1) // PLANES_PER_GROUP


def _tiles(x: int, y: int, n: int) -> tuple[int, int]:
    """(tiles to take in vectors, threads that have something to do)."""
    whole = n // TILE_CELLS if (x | y) % VECTOR_BYTES == 0 else 0
    return whole, LANES * -(-n // TILE_CELLS)


def _collapsed(axes: Sequence[Axis]) -> list[Axis]:
    """The same data with as few axes as can be."""
    result: list[Axis] = []
    for extent, cells in axes:
        if extent == 1:
            continue
        if result and result[-1][1] == extent * cells:
            result[-1] = result[-1][0] * extent, cells
        else:
            result.append((extent, cells))
    return result


def _parts(axes: list[Axis]) -> list[tuple[int, int, list[Axis]]]:
    """(first element, first cell, axes) of pieces along the outermost axis, each small enough or one step of it."""
    (extent, cells), rest = axes[0], axes[1:]
    size = math.prod(e for e, _ in rest)
    step = max(1, (INDEX_END - 1) // size) if len(axes) <= DIMS else 1
    if not rest:
        step = step // TILE_CELLS * TILE_CELLS
    return [
        (start * size, start * cells, [(min(step, extent - start), cells), *rest]) for start in range(0, extent, step)
    ]

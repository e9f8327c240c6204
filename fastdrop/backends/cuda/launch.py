"""The CUDA backend: the primitives on a GPU's memory, by kernels written in Numba.

This module chooses the kernel and the path of each call and lays out its parameters. The same words bit for bit as on
the CPU; values too, but that a NaN that is computed with comes out as the GPU's one NaN. The fused primitives agree to
a tolerance, as on every backend.

Memory comes as addresses on a device and work goes to a stream: ``*_at(device, stream, ...)``, otherwise with the
parameters that `reference` gives the primitives. A seed may lie on the device: then ``seed_at`` is its address and
nobody waits for it, and a captured graph reads it anew at each replay.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ...core.checks import FLOAT32, FLOAT64
from ...core.random import NOISE_CELLS, NOISE_COUNTERS, PLANES_PER_GROUP
from . import driver
from .tile import COUNTED, ITEM_BYTES, LANES, SHORT_ROW, TILE_CELLS, VECTOR_BYTES

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
        kernel.launch(stream, -(-cells // 32), to, words, cells, row, *_division(row), n * inner, inner)


def count_bits_at(device: int, stream: int, words: int, count: int, kept: int) -> None:
    """Adds the number of 1s in so many words to the uint64 at an address."""
    if count:
        driver.device(device).kernel("count_bits").launch(stream, -(-count // COUNTED), words, count, kept)


def pointwise_forward_at(
    device: int,
    stream: int,
    dtype: int,
    residual_dtype: int,
    x: int,
    input_bias: int,
    multiplier: int,
    residual: int,
    words: int,
    y: int,
    signs: int,
    rows: int,
    columns: int,
    a: float,
    activation: int,
) -> None:
    """Here and below 0 is in the place of an array that isn't given."""
    n = rows * columns
    if n:
        wide = _in_vectors(dtype, columns if input_bias else 0, x, input_bias, multiplier, residual, y)
        whole, threads = _whole(dtype, n, wide)
        kernel = _rows_kernel(device, "pointwise_forward", dtype, residual_dtype, activation=activation)
        kernel.launch(stream, threads, x, input_bias, multiplier, residual, words, y, signs, n, columns, whole, a)


def pointwise_backward_at(
    device: int,
    stream: int,
    dtype: int,
    residual_dtype: int,
    dy: int,
    x: int,
    input_bias: int,
    multiplier: int,
    words: int,
    dx: int,
    dmultiplier: int,
    sums: int,
    rows: int,
    columns: int,
    panels: int,
    a: float,
    activation: int,
) -> None:
    n, arrays = rows * columns, (dy, x, input_bias, multiplier, words, dx, dmultiplier)
    aligned = dy, x, input_bias, multiplier, dx, dmultiplier
    if sums:
        _columns_at(
            device, stream, dtype, residual_dtype, arrays, aligned, sums, rows, columns, panels, columns, a, activation
        )
        _add_panels_at(device, stream, dtype, sums, panels, columns)
    elif n:
        whole, threads = _whole(dtype, n, _in_vectors(dtype, columns if input_bias else 0, *aligned))
        kernel = _rows_kernel(device, "pointwise_backward", dtype, residual_dtype, activation=activation)
        kernel.launch(stream, threads, *arrays, n, columns, whole, a)


def norm_forward_at(
    device: int,
    stream: int,
    dtype: int,
    residual_dtype: int,
    x: int,
    input_bias: int,
    residual: int,
    words: int,
    weight: int,
    norm_bias: int,
    y: int,
    residual_out: int,
    statistics: int,
    rows: int,
    columns: int,
    a: float,
    eps: float,
    centred: int,
) -> None:
    if rows:
        wide = _in_vectors(dtype, columns, x, input_bias, residual, weight, norm_bias, y, residual_out)
        by_block, threads = _teams(rows, columns)
        kernel = _rows_kernel(device, "norm_forward", dtype, residual_dtype, wide)
        arrays = x, input_bias, residual, words, weight, norm_bias, y, residual_out, statistics
        kernel.launch(stream, threads, *arrays, rows, columns, by_block, centred, a, eps)


def norm_backward_at(
    device: int,
    stream: int,
    dtype: int,
    residual_dtype: int,
    dy: int,
    dresidual_out: int,
    residual_out: int,
    statistics: int,
    weight: int,
    words: int,
    dx: int,
    dresidual: int,
    sums: int,
    rows: int,
    columns: int,
    panels: int,
    a: float,
    centred: int,
) -> None:
    """With sums there must be a dresidual or a dx, which the bias's gradient is the sum of, as it was rounded."""
    width = 3 * columns
    if sums:  # first, for dx may lie over dy
        kernel = _rows_kernel(
            device, "norm_columns", dtype, residual_dtype, _in_vectors(dtype, columns, dy, residual_out, sums)
        )
        threads = _column_threads(dtype, columns, panels)
        kernel.launch(stream, threads, dy, residual_out, statistics, sums, rows, columns, panels)
    if rows:
        wide = _in_vectors(dtype, columns, dy, dresidual_out, residual_out, weight, dx, dresidual)
        by_block, threads = _teams(rows, columns)
        kernel = _rows_kernel(device, "norm_backward", dtype, residual_dtype, wide)
        inputs = dy, dresidual_out, residual_out, statistics, weight, words
        kernel.launch(stream, threads, *inputs, dx, dresidual, rows, columns, by_block, centred, a)
    if sums:
        dropped = dx and (residual_dtype == dtype or not dresidual)
        g, tag, under, scale = (dx, dtype, 0, 1.0) if dropped else (dresidual, residual_dtype, words, a)
        of_input_bias = sums + 2 * columns * ITEM_BYTES[_computed(dtype)]
        arrays = g, 0, 0, 0, under, 0, 0
        _columns_at(device, stream, dtype, tag, arrays, (g,), of_input_bias, rows, columns, panels, width, scale, 0)
        _add_panels_at(device, stream, dtype, sums, panels, width)


def softmax_forward_at(
    device: int,
    stream: int,
    dtype: int,
    x: int,
    mask: int,
    words: int,
    probabilities: int,
    y: int,
    rows: int,
    columns: int,
    heads: int,
    queries: int,
    outer_stride: int,
    head_stride: int,
    query_stride: int,
    softmax_scale: float,
    a: float,
    causal: int,
) -> None:
    if rows:
        strides = outer_stride, head_stride, query_stride
        lines = [stride * ITEM_BYTES[_computed(dtype)] for stride in strides] if mask else []
        wide = _in_vectors(dtype, columns, x, mask, *lines, probabilities, y)
        by_block, threads = _teams(rows, columns)
        divisions = [part for extent in (queries, heads) for part in (extent, *_division(extent))]
        kernel = _rows_kernel(device, "softmax_forward", dtype, dtype, wide)
        arrays = x, mask, words, probabilities, y
        kernel.launch(stream, threads, *arrays, rows, columns, *divisions, *strides, by_block, causal, softmax_scale, a)


def softmax_backward_at(
    device: int,
    stream: int,
    dtype: int,
    dy: int,
    probabilities: int,
    words: int,
    dx: int,
    y: int,
    rows: int,
    columns: int,
    softmax_scale: float,
    a: float,
) -> None:
    if rows:
        wide = _in_vectors(dtype, columns, dy, probabilities, dx, y)
        by_block, threads = _teams(rows, columns)
        kernel = _rows_kernel(device, "softmax_backward", dtype, dtype, wide)
        kernel.launch(stream, threads, dy, probabilities, words, dx, y, rows, columns, by_block, softmax_scale, a)


def _columns_at(
    device: int,
    stream: int,
    dtype: int,
    residual_dtype: int,
    arrays: tuple[int, ...],
    aligned: tuple[int, ...],
    sums: int,
    rows: int,
    columns: int,
    panels: int,
    width: int,
    a: float,
    activation: int,
) -> None:
    """`pointwise_backward` with a sum for each panel, ``width`` from one to the next."""
    wide = _in_vectors(dtype, columns, *aligned, sums)
    kernel = _rows_kernel(device, "pointwise_columns", dtype, residual_dtype, wide, activation)
    kernel.launch(stream, _column_threads(dtype, columns, panels), *arrays, sums, rows, columns, panels, width, a)


def _add_panels_at(device: int, stream: int, dtype: int, sums: int, panels: int, width: int) -> None:
    if panels > 1:
        tag = _computed(dtype)
        _rows_kernel(device, "add_panels", tag, tag, False).launch(stream, width, sums, panels, width)


def _rows_kernel(
    device: int, body: str, dtype: int, residual_dtype: int, wide: bool | None = None, activation: int = 0
) -> driver.Kernel:
    """``wide`` None: both ways in one kernel."""
    form = "" if wide is None else "wide" if wide else "narrow"
    return driver.device(device).kernel(body, dtype, form, residual_dtype=residual_dtype, activation=activation)


def _in_vectors(dtype: int, columns: int, *addresses: int) -> bool:
    """Whether arrays may be taken 16 bytes of data at a time, from each row's first element on."""
    together = 0
    for address in addresses:
        together |= address
    return together % VECTOR_BYTES == 0 and columns % (VECTOR_BYTES // ITEM_BYTES[dtype]) == 0


def _whole(dtype: int, n: int, wide: bool) -> tuple[int, int]:
    """(elements to take in vectors, threads that have something to do)."""
    whole = n // LANES * LANES if wide else 0
    return whole, max(whole // (VECTOR_BYTES // ITEM_BYTES[dtype]), n - whole)


def _teams(rows: int, columns: int) -> tuple[int, int]:
    """(whether a row is a block's, threads that have something to do)."""
    return (1, rows * driver.THREADS) if columns > SHORT_ROW else (0, rows * LANES)


def _column_threads(dtype: int, columns: int, panels: int) -> int:
    """Of blocks whose warps' lanes take 16 bytes of data."""
    return panels * -(-columns // (LANES * VECTOR_BYTES // ITEM_BYTES[dtype])) * driver.THREADS


def _computed(dtype: int) -> int:
    """The type of the arithmetic."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def _division(extent: int) -> tuple[int, int]:
    """For numbers below 2**63, of which the kernel takes the upper half of a product."""
    multiplier, shift = reciprocal(extent, 63)
    return multiplier, shift - 63


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
    cuda = _numba_cuda()
    with contextlib.nullcontext() if device < 0 else cuda.gpus[device]:
        return cuda.device_array(shape, dtype, stream=stream)


def upload(x: Any) -> Any:
    """The same for what a NumPy array holds."""
    return _numba_cuda().to_device(x)


@functools.cache  # held: nothing can be imported at the interpreter's exit
def _numba_cuda() -> Any:
    from numba import cuda

    return cuda


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

"""The CUDA backend: the primitives on a GPU's memory, by kernels written in Numba.

`fastdrop.arrays.device` and `fastdrop.torch.runtime.cuda` call it. This module chooses the kernel and the path of each
call and lays out its parameters. Mask words are the same bit for bit as on the CPU. So are values, except that a NaN
that is computed with becomes the GPU's one NaN; the fused primitives agree to a tolerance, as on every backend.

Memory comes as addresses on a device and work goes to a stream: ``<primitive>_at(device, stream, ...)``, with the
parameters that the table gives the primitive. A seed may lie on the device: then ``seed_at`` is its address, nobody
waits for it, and a captured graph reads it anew at each replay.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ...core.checks import FLOAT32, FLOAT64
from ...core.grid import Axis, collapse
from ...core.random import NOISE_CELLS, NOISE_COUNTERS, PLANES_PER_GROUP
from ..generate import primitive_at
from . import driver
from .tile import COUNTED, ITEM_BYTES, LANES, SHORT_ROW, TILE_CELLS, VECTOR_BYTES

DIMS = 4
INDEX_END = 1 << 31  # elements that one launch of `strided` numbers

Place = tuple[int, int]  # device, stream
Arrays = tuple[int, int, int]  # addresses of x, y, words
Affine = tuple[float, float, float]


def unavailable() -> str | None:
    """Why this backend can't run here; None if it can."""
    return driver.unavailable()


def describe() -> str:
    """One line for `show_config`."""
    return f"CUDA, {driver.count()} GPU" + ("s" if driver.count() > 1 else "")


def prepare(device: int) -> None:
    """Raises what the first launch on a device would; loads a kernel there."""
    driver.device(device).kernel("draw_words")


@primitive_at("seed_at")
def draw_bits_at(p: Any) -> None:
    if p.n:
        kernel = driver.device(p.device).kernel("draw_words")
        threads = (p.position % 32 + p.n + 31) // 32
        draw = p.seed, p.seed_at, p.offset, p.threshold, _groups(p.threshold)
        kernel.launch(p.stream, threads, p.words, p.position, p.first, p.n, *draw)


@primitive_at("seed_at")
def draw_rows_at(p: Any) -> None:
    n = p.outer * p.rows * p.columns
    if n:
        kernel = driver.device(p.device).kernel("draw_rows")
        threads = (p.position % 32 + n + 31) // 32
        axes = p.columns, *_division(p.columns), p.rows, *_division(p.rows), p.pitch, p.outer_pitch
        draw = p.seed, p.seed_at, p.offset, p.threshold, _groups(p.threshold)
        kernel.launch(p.stream, threads, p.words, p.position, p.first, n, *axes, *draw)


@primitive_at("seed_at")
def dropout_forward_at(p: Any) -> None:
    """``words`` 0: they are not stored."""
    if p.n:
        form = "drawn_shifted" if p.first & 31 else "drawn"
        whole, threads = _tiles(p.x, p.y, p.n)
        kernel = driver.device(p.device).kernel("elementwise", p.dtype, form, p.b == 0.0 and p.c == 0.0)
        draw = p.seed, p.seed_at, p.offset, p.threshold, _groups(p.threshold)
        kernel.launch(p.stream, threads, p.x, p.y, p.words, p.first, p.n, whole, *draw, 0, p.a, p.b, p.c)


@primitive_at("kept_at")
def masked_affine_at(p: Any) -> None:
    """``kept_at``: kept elements become ``a / kept * x + b`` for the uint64 kept at this address, 0 x + b for 0."""
    call = (p.device, p.stream), p.dtype, (p.x, p.y, p.words), p.position
    if p.repeat == 1:
        _stored_affine_at(*call, p.outer * p.inner, (p.a, p.b, p.c), p.kept_at)
    else:
        axes = (p.outer, p.inner), (p.repeat, 0), (p.inner, 1)
        strided_affine_at(*call, axes, (p.a, p.b, p.c), p.kept_at)


def _stored_affine_at(
    place: Place, dtype: int, arrays: Arrays, position: int, n: int, affine: Affine, kept_at: int
) -> None:
    """An element for each cell, in the cells' order."""
    if n:
        device, stream = place
        whole, threads = _tiles(arrays[0], arrays[1], n)
        kernel = driver.device(device).kernel(
            "elementwise", dtype, "stored", affine[1] == affine[2] == 0.0, kept_at != 0
        )
        kernel.launch(stream, threads, *arrays, position, n, whole, 0, 0, 0, 0, 0, kept_at, *affine)


def strided_affine_at(
    place: Place, dtype: int, arrays: Arrays, position: int, axes: Sequence[Axis], affine: Affine, kept_at: int = 0
) -> None:
    """``masked_affine`` for cells at any strides.

    ``place`` is (device, stream), ``arrays`` are x, y and words, ``affine`` is (a, b, c). ``axes`` are in the order of
    memory, outermost first; a stride of 0 shares a decision. One launch, unless there are 2**31 elements or more than
    four axes that don't merge.
    """
    axes = collapse(axes)
    n = math.prod(extent for extent, _ in axes)
    if not axes or axes == [(n, 1)] or not n:
        _stored_affine_at(place, dtype, arrays, position, n, affine, kept_at)
        return
    x, y, words = arrays
    if len(axes) > DIMS or n >= INDEX_END:
        for start, cell, part in _parts(axes):
            at = start * ITEM_BYTES[dtype]
            strided_affine_at(place, dtype, (x + at, y + at, words), position + cell, part, affine, kept_at)
        return
    wide = _in_vectors(dtype, axes[-1][0], x, y)
    kernel = driver.device(place[0]).kernel(
        "strided", dtype, "wide" if wide else "narrow", affine[1] == affine[2] == 0.0, kept_at != 0
    )
    inner_first = [*reversed(axes), *[(1, 0)] * (DIMS - len(axes))]
    divisions = [value for extent, cells in inner_first[:-1] for value in (extent, *reciprocal(extent), cells)]
    threads, outermost = n * ITEM_BYTES[dtype] // VECTOR_BYTES if wide else n, inner_first[-1][1]
    kernel.launch(place[1], threads, *arrays, position, n, *divisions, outermost, kept_at, *affine)


@primitive_at("seed_at")
def gaussian_multiply_at(p: Any) -> None:
    if p.n:
        kernel = driver.device(p.device).kernel("gaussian_multiply", p.dtype)
        tiles = -(-(p.first % NOISE_CELLS + p.n) // NOISE_CELLS)
        draw = p.seed, p.seed_at, p.offset
        kernel.launch(p.stream, tiles * NOISE_COUNTERS, p.x, p.y, p.first, p.n, *draw, p.sigma)


@primitive_at()
def dilate_bits_at(p: Any) -> None:
    row = (p.n + p.block - 1) * p.inner
    cells = p.outer * row
    if cells:
        kernel = driver.device(p.device).kernel("dilate_bits")
        kernel.launch(p.stream, -(-cells // 32), p.to, p.words, cells, row, *_division(row), p.n * p.inner, p.inner)


def count_bits_at(device: int, stream: int, words: int, count: int, kept: int) -> None:
    """Adds the number of 1s in so many words to the uint64 at an address."""
    if count:
        driver.device(device).kernel("count_bits").launch(stream, -(-count // COUNTED), words, count, kept)


@primitive_at()
def pointwise_forward_at(p: Any) -> None:
    """Here and below 0 stands for an array that is absent."""
    n = p.rows * p.columns
    if n:
        wide = _in_vectors(p.dtype, p.columns if p.input_bias else 0, p.x, p.input_bias, p.multiplier, p.residual, p.y)
        whole, threads = _whole(p.dtype, n, wide)
        arrays = p.x, p.input_bias, p.multiplier, p.residual, p.words, p.y, p.signs
        kernel = _fused_kernel(p, "pointwise_forward", activation=p.activation)
        kernel.launch(p.stream, threads, *arrays, n, p.columns, whole, p.a)


@primitive_at()
def pointwise_backward_at(p: Any) -> None:
    n, arrays = p.rows * p.columns, (p.dy, p.x, p.input_bias, p.multiplier, p.words, p.dx, p.dmultiplier)
    aligned = p.dy, p.x, p.input_bias, p.multiplier, p.dx, p.dmultiplier
    if p.sums:
        wide = _in_vectors(p.dtype, p.columns, *aligned, p.sums)
        kernel = _fused_kernel(p, "pointwise_columns", wide, p.activation)
        sizes = p.rows, p.columns, p.panels, p.columns
        kernel.launch(p.stream, _column_threads(p), *arrays, p.sums, *sizes, p.a)
        _add_panels(p, p.columns)
    elif n:
        whole, threads = _whole(p.dtype, n, _in_vectors(p.dtype, p.columns if p.input_bias else 0, *aligned))
        kernel = _fused_kernel(p, "pointwise_backward", activation=p.activation)
        kernel.launch(p.stream, threads, *arrays, n, p.columns, whole, p.a)


@primitive_at()
def norm_forward_at(p: Any) -> None:
    if p.rows:
        arrays = p.x, p.input_bias, p.residual, p.words, p.weight, p.norm_bias, p.y, p.residual_out, p.statistics
        aligned = p.x, p.input_bias, p.residual, p.weight, p.norm_bias, p.y, p.residual_out
        by_block, threads = _teams(p.rows, p.columns)
        kernel = _fused_kernel(p, "norm_forward", _in_vectors(p.dtype, p.columns, *aligned))
        kernel.launch(p.stream, threads, *arrays, p.rows, p.columns, by_block, p.centred, p.a, p.eps)


@primitive_at()
def norm_backward_at(p: Any) -> None:
    """With sums there must be a dresidual or a dx: the gradient of input_bias is the sum of that, as it was rounded."""
    if p.sums:  # first, because dx may lie over dy
        kernel = _fused_kernel(p, "norm_columns", _in_vectors(p.dtype, p.columns, p.dy, p.residual_out, p.sums))
        inputs = p.dy, p.residual_out, p.statistics
        kernel.launch(p.stream, _column_threads(p), *inputs, p.sums, p.rows, p.columns, p.panels)
    if p.rows:
        aligned = p.dy, p.dresidual_out, p.residual_out, p.weight, p.dx, p.dresidual
        arrays = p.dy, p.dresidual_out, p.residual_out, p.statistics, p.weight, p.words, p.dx, p.dresidual
        by_block, threads = _teams(p.rows, p.columns)
        kernel = _fused_kernel(p, "norm_backward", _in_vectors(p.dtype, p.columns, *aligned))
        kernel.launch(p.stream, threads, *arrays, p.rows, p.columns, by_block, p.centred, p.a)
    if p.sums:
        _sum_input_bias(p)
        _add_panels(p, 3 * p.columns)


def _sum_input_bias(p: Any) -> None:
    """The third line of each panel's sums: of dx if that is as exact as dresidual, otherwise of dresidual, masked."""
    from_dx = p.dx and (p.residual_dtype == p.dtype or not p.dresidual)
    g, dtype, words, scale = (p.dx, p.dtype, 0, 1.0) if from_dx else (p.dresidual, p.residual_dtype, p.words, p.a)
    sums = p.sums + 2 * p.columns * ITEM_BYTES[_computed(p.dtype)]
    form = "wide" if _in_vectors(p.dtype, p.columns, g, sums) else "narrow"
    kernel = driver.device(p.device).kernel("pointwise_columns", p.dtype, form, residual_dtype=dtype)
    sizes = p.rows, p.columns, p.panels, 3 * p.columns
    kernel.launch(p.stream, _column_threads(p), g, 0, 0, 0, words, 0, 0, sums, *sizes, scale)


@primitive_at()
def softmax_forward_at(p: Any) -> None:
    if p.rows:
        strides = p.outer_stride, p.head_stride, p.query_stride
        lines = [stride * ITEM_BYTES[_computed(p.dtype)] for stride in strides] if p.mask else []
        wide = _in_vectors(p.dtype, p.columns, p.x, p.mask, *lines, p.probabilities, p.y)
        by_block, threads = _teams(p.rows, p.columns)
        divisions = [part for extent in (p.queries, p.heads) for part in (extent, *_division(extent))]
        arrays = p.x, p.mask, p.words, p.probabilities, p.y
        numbers = by_block, p.causal, p.softmax_scale, p.a
        kernel = _fused_kernel(p, "softmax_forward", wide)
        kernel.launch(p.stream, threads, *arrays, p.rows, p.columns, *divisions, *strides, *numbers)


@primitive_at()
def softmax_backward_at(p: Any) -> None:
    if p.rows:
        wide = _in_vectors(p.dtype, p.columns, p.dy, p.probabilities, p.dx, p.y)
        by_block, threads = _teams(p.rows, p.columns)
        arrays = p.dy, p.probabilities, p.words, p.dx, p.y
        kernel = _fused_kernel(p, "softmax_backward", wide)
        kernel.launch(p.stream, threads, *arrays, p.rows, p.columns, by_block, p.softmax_scale, p.a)


def _add_panels(p: Any, width: int) -> None:
    """All panels' lines of sums, of so many numbers, into the first."""
    if p.panels > 1:
        tag = _computed(p.dtype)
        kernel = driver.device(p.device).kernel("add_panels", tag, "narrow", residual_dtype=tag)
        kernel.launch(p.stream, width, p.sums, p.panels, width)


def _fused_kernel(p: Any, body: str, wide: bool | None = None, activation: int = 0) -> driver.Kernel:
    """The kernel for a call's dtypes; ``wide`` None: both ways in one kernel."""
    form = "" if wide is None else "wide" if wide else "narrow"
    residual_dtype = getattr(p, "residual_dtype", p.dtype)
    return driver.device(p.device).kernel(body, p.dtype, form, residual_dtype=residual_dtype, activation=activation)


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


def _column_threads(p: Any) -> int:
    """Of blocks whose warps' lanes take 16 bytes of data."""
    return int(p.panels * -(-p.columns // (LANES * VECTOR_BYTES // ITEM_BYTES[p.dtype])) * driver.THREADS)


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

"""Arrays in the host's memory: how an ndarray reaches a backend.

The ops call `HOST` for every array that is not on a GPU. An array whose elements fill their memory without gaps is
passed as it lies, in any order of axes; others are copied to C order. bfloat16, which NumPy itself does not know, is
passed as its bits. Backends receive ndarrays, never instances of a subclass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import backends
from ..core import checks
from ..core.checks import BFLOAT16
from ..core.grid import Grid
from ..core.mask import fill_words, popcount
from ..core.part import Run
from ..core.random import DROP_ALL, State
from .array_ops import BlockPasses, DeferredDraw, Scaling, Shape
from .signatures import Array

Words = NDArray[np.uint32]

UINT32 = np.dtype(np.uint32)
LINE_BYTES = 64
# Masks of so many words and more are written past the cache, one cache line at a time: they must start on a line.
ALIGNED_FROM_WORDS = 1 << 16


class HostOps:
    """`ArrayOps` for ndarrays."""

    __slots__ = ()

    on_device = False

    # ---- arguments and results ----

    as_array = staticmethod(checks.as_array)
    output_array = staticmethod(checks.output_array)
    check_no_overlap = staticmethod(checks.check_no_overlap)

    def as_attention_mask(self, name: str, value: Any) -> Array:
        """Extents are 1 on axes that the caller broadcast, so that these take no memory."""
        array = checks.as_ndarray(name, value)
        if array.dtype != np.bool_:
            checks.dtype_tag(f"{name}, unless boolean,", array.dtype)
        return array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]

    def check_mask_memory(self, name: str, words: Any) -> None:
        if type(words) is not np.ndarray:
            raise TypeError(f"mask must be in memory, as {name} is, or a SeededMask, but got a PackedMask on a GPU")

    def copy_into(self, y: Array, x: Array) -> None:
        np.copyto(y, x)

    # ---- masks ----

    kept_count = staticmethod(popcount)

    def empty_words(self, like: Any, cells: int) -> Words:
        """Large ones start on a cache line, at the cost of up to 64 bytes."""
        n = (cells + 31) >> 5
        if n < ALIGNED_FROM_WORDS:
            return np.empty(n, UINT32)
        padded = np.empty(n + LINE_BYTES // 4, UINT32)
        skip = -padded.ctypes.data % LINE_BYTES // 4
        return padded[skip : skip + n]

    def draw_words(
        self, words: Words, like: Any, cells: int, state: State, threshold: int, runs: Iterable[Run] | None = None
    ) -> None:
        if not (0 < threshold < DROP_ALL and cells):
            fill_words(words, cells, threshold)
        elif runs is None:
            backends.active().draw_bits(words, 0, 0, cells, *state, threshold)
        else:
            for run in runs:
                primitive, numbers = run.draw
                getattr(backends.active(), primitive)(words, *numbers, *state, threshold)

    def draw_or_defer(
        self, words: Words, like: Array, cells: int, state: State, threshold: int, runs: Iterable[Run] | None = None
    ) -> DeferredDraw | None:
        """C draws while data is on its way to the CPU, so the draw is left to its primitive, which knows no parts."""
        primitive_with_draw = backends.drawn()
        if runs is None and 0 < threshold < DROP_ALL and primitive_with_draw is not None:
            return primitive_with_draw, state, threshold
        self.draw_words(words, like, cells, state, threshold, runs)
        return None

    def widen_blocks(self, words: Words, buffers: list[Words], passes: BlockPasses) -> Words:
        for buffer, (outer, n, inner, block) in zip(buffers, passes, strict=True):
            backends.active().dilate_bits(buffer, words, outer, n, inner, block)
            words = buffer
        return words

    # ---- the primitives of plain dropout ----

    def kernel_arrays(self, x: Array, y: Array, mask_shape: Shape) -> tuple[Array, Array]:
        if x.flags.c_contiguous and y.flags.c_contiguous:
            return x, y
        if mask_shape != x.shape and _grid_in_memory(x, y, mask_shape) is not None:
            return x, y
        return self.as_contiguous(x), self.output_buffer(y)

    def dropout_forward(
        self,
        tag: int,
        x: Array,
        y: Array,
        words: Words | None,
        state: State,
        threshold: int,
        coefficients: Scaling,
        first: int = 0,
    ) -> None:
        if tag == BFLOAT16:
            x, y = x.view(np.uint16), y.view(np.uint16)
        seed, offset = state
        scale, shift, dropped = coefficients
        forward = backends.active().dropout_forward
        forward(tag, x, y, words, first, x.size, seed, offset, threshold, scale, shift, dropped)

    def gaussian_multiply(
        self, tag: int, x: Array, y: Array, state: State, sigma: float, runs: Iterable[Run] | None = None
    ) -> None:
        if tag == BFLOAT16:
            x, y = x.view(np.uint16), y.view(np.uint16)
        if not x.size:
            return
        if runs is None:
            backends.active().gaussian_multiply(tag, x, y, 0, x.size, *state, sigma)
            return
        elements, results = x.reshape(-1), y.reshape(-1)
        for run in runs:
            for position, first, n in run.each_row():
                row = slice(position, position + n)
                backends.active().gaussian_multiply(tag, elements[row], results[row], first, n, *state, sigma)

    def apply_mask(self, tag: int, x: Array, y: Array, words: Words, mask_shape: Shape, coefficients: Scaling) -> None:
        if not x.size:
            return
        if tag == BFLOAT16:
            x, y = x.view(np.uint16), y.view(np.uint16)
        masked_affine = backends.active().masked_affine
        if mask_shape == x.shape:
            masked_affine(tag, x, y, words, 0, 1, 1, x.size, *coefficients)
            return
        grid = _grid_in_memory(x, y, mask_shape) or Grid.of(x.shape, mask_shape)
        elements, results = x.ravel("K"), y.ravel("K")
        for start, cell in grid.pieces():
            piece = slice(start, start + grid.size)
            extents = grid.outer, grid.repeat, grid.inner
            masked_affine(tag, elements[piece], results[piece], words, cell, *extents, *coefficients)

    # ---- the fused primitives; None stands for an array that an op does not have ----

    def empty(self, like: Array, shape: Shape, dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def zeros(self, like: Array, shape: Shape, dtype: Any) -> Array:
        return np.zeros(shape, dtype)

    def as_contiguous(self, x: Any) -> Any:
        return x if x is None or x.flags.c_contiguous else np.ascontiguousarray(x)

    def output_buffer(self, y: Array) -> Array:
        return y if y.flags.c_contiguous else np.empty(y.shape, y.dtype)

    def copy_if_overlapping(self, x: Any, y: Array) -> Any:
        return x if x is None or not np.may_share_memory(x, y) else x.copy()

    def cast(self, name: str, x: Array, dtype: Any) -> Array:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(x, dtype)

    def as_additive_mask(self, name: str, mask: Array, shape: Shape, dtype: Any) -> Array:
        if mask.dtype == np.bool_:
            mask = np.where(mask, 0.0, -np.inf)
        return self.cast(name, np.broadcast_to(mask, shape), dtype)

    def run_primitive(
        self,
        primitive: str,
        dtypes: tuple[int, ...],
        arrays: tuple[Array | None, ...],
        numbers: tuple[float, ...],
        draw: DeferredDraw | None = None,
    ) -> None:
        if BFLOAT16 in dtypes:
            arrays = tuple(x.view(np.uint16) if x is not None and x.dtype.kind == "V" else x for x in arrays)
        if draw is not None:
            # The function is the one found before: another thread may have switched backends since.
            primitive_with_draw, state, threshold = draw
            primitive_with_draw(primitive, *state, threshold, *dtypes, *arrays, *numbers)
        else:
            getattr(backends.active(), primitive)(*dtypes, *arrays, *numbers)


HOST = HostOps()


def _grid_in_memory(x: Array, y: Array, mask_shape: Shape) -> Grid | None:
    """The grid of x and y in their common memory order; None if the orders differ or x is in C order."""
    if x.flags.c_contiguous:
        return None
    longer = [axis for axis, extent in enumerate(x.shape) if extent != 1]
    if any(x.strides[axis] != y.strides[axis] or x.strides[axis] % x.itemsize for axis in longer):
        return None
    return Grid.in_memory(x.shape, tuple(stride // x.itemsize for stride in x.strides), mask_shape)

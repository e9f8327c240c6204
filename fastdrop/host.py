"""Arrays in memory, as the NumPy API's flow (`ops`) asks for them; `device` answers the same for a GPU's.

This module owns how an ndarray's memory reaches a backend: where it lies if its cells come side by side in it, in any
order of its axes, through a C-contiguous copy elsewhere; bfloat16 as its bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _checks, backends
from ._checks import BFLOAT16
from .grid import Grid
from .mask import PackedMask, empty_words, fill_words, popcount
from .stream import DROP_ALL

__all__ = [
    "apply",
    "check_words",
    "copy",
    "dilated",
    "draw_words",
    "empty_words_like",
    "forward",
    "gaussian",
    "kept",
    "output",
    "taken",
]

Array = NDArray[Any]
Words = NDArray[np.uint32]

taken = _checks.data
output = _checks.output


def copy(y: Array, x: Array) -> None:
    np.copyto(y, x)


def check_words(name: str, mask: PackedMask) -> None:
    """Raises unless the mask lies in memory."""
    if type(mask._words) is not np.ndarray:
        raise TypeError(f"mask must be in memory, as {name} is, or a SeededMask, but got a PackedMask on a GPU")


def empty_words_like(x: Array, cells: int) -> Words:
    return empty_words(cells)


def draw_words(like: Array | None, cells: int, first: int, seed: int, offset: int, cut: int) -> Words:
    """The words of a mask of so many cells, any threshold."""
    words = empty_words(cells)
    if 0 < cut < DROP_ALL and cells:
        backends.active().draw_bits(words, 0, first, cells, seed, offset, cut)
    else:
        fill_words(words, cells, cut)
    return words


def dilated(words: Words, passes: tuple[tuple[int, int, int, int], ...]) -> Words:
    """Words after each of DropBlock's passes."""
    for outer, n, inner, block in passes:
        to = empty_words(outer * (n + block - 1) * inner)
        backends.active().dilate_bits(to, words, outer, n, inner, block)
        words = to
    return words


def kept(words: Words) -> int:
    """How many cells words keep."""
    return popcount(words)


def forward(
    tag: int,
    x: Array,
    y: Array,
    words: Words | None,
    seed: int,
    offset: int,
    cut: int,
    a: float,
    b: float,
    c: float,
) -> None:
    """y = x under a mask of its shape that is drawn and, unless words is None, kept."""
    if tag != BFLOAT16 and x.flags.c_contiguous and y.flags.c_contiguous:  # all that counts for a small array
        backends.active().dropout_forward(tag, x, y, words, 0, x.size, seed, offset, cut, a, b, c)
        return
    source, target = _flat(x, tag), _flat_output(y, tag)
    backends.active().dropout_forward(tag, source, target, words, 0, x.size, seed, offset, cut, a, b, c)
    _deliver(target, y, tag)


def gaussian(tag: int, x: Array, y: Array, seed: int, offset: int, sigma: float) -> None:
    """y = x times its Gaussian factors."""
    source, target = _flat(x, tag), _flat_output(y, tag)
    backends.active().gaussian_multiply(tag, source, target, 0, x.size, seed, offset, sigma)
    _deliver(target, y, tag)


def apply(
    tag: int, x: Array, y: Array, words: Words, cells_shape: tuple[int, ...], a: float, b: float, c: float
) -> None:
    """y = x under stored bits of a mask that fits."""
    if not x.size:
        return
    masked_affine = backends.active().masked_affine
    if cells_shape == x.shape:
        source, target = _flat(x, tag), _flat_output(y, tag)
        masked_affine(tag, source, target, words, 0, 1, 1, x.size, a, b, c)
        _deliver(target, y, tag)
        return
    as_it_lies = _grid_in_memory(x, y, cells_shape)
    if as_it_lies is None:
        grid = Grid.of(x.shape, cells_shape)
        source, target = _flat(x, tag), _flat_output(y, tag)
    else:
        grid = as_it_lies
        source, target = (_bits(array.ravel("K"), tag) for array in (x, y))
    elements, results = source.reshape(-1), target.reshape(-1)
    for start, cell in grid.pieces():
        part = slice(start, start + grid.size)
        masked_affine(tag, elements[part], results[part], words, cell, grid.outer, grid.repeat, grid.inner, a, b, c)
    if as_it_lies is None:
        _deliver(target, y, tag)


def _grid_in_memory(x: Array, y: Array, cells_shape: tuple[int, ...]) -> Grid | None:
    """The grid of x and y as they lie, where both lie alike, and not in C order."""
    if x.flags.c_contiguous:
        return None
    longer = [axis for axis, extent in enumerate(x.shape) if extent != 1]
    if any(x.strides[axis] != y.strides[axis] or x.strides[axis] % x.itemsize for axis in longer):
        return None
    return Grid.in_memory(x.shape, tuple(stride // x.itemsize for stride in x.strides), cells_shape)


def _bits(x: Array, tag: int) -> Array:
    return x.view(np.uint16) if tag == BFLOAT16 else x


def _flat(x: Array, tag: int) -> Array:
    """x as backends take it: C-contiguous in logical order (a copy where it is not), bfloat16 as its bits."""
    return _bits(x if x.flags.c_contiguous else np.ascontiguousarray(x), tag)


def _flat_output(y: Array, tag: int) -> Array:
    """y as backends take it, or an array in its stead that `_deliver` copies over."""
    return _bits(y if y.flags.c_contiguous else np.empty(y.shape, y.dtype), tag)


def _deliver(target: Array, y: Array, tag: int) -> None:
    if target is not y and not y.flags.c_contiguous:
        np.copyto(y, target.view(y.dtype) if tag == BFLOAT16 else target)

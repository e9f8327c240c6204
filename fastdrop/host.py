"""Arrays in memory, as the NumPy API's flow (`ops`, `fused`) asks for them; `device` answers the same for a GPU's.

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
    "additive",
    "apart",
    "apply",
    "cast",
    "check_words",
    "contiguous",
    "copy",
    "detached",
    "dilated",
    "draw_words",
    "empty",
    "empty_words_like",
    "forward",
    "gaussian",
    "kept",
    "output",
    "run",
    "taken",
    "taken_mask",
    "target",
    "words_for",
    "zeros",
]

Array = NDArray[Any]
Words = NDArray[np.uint32]
Draw = tuple[int, int, int]  # seed, offset, threshold

taken = _checks.data
output = _checks.output
apart = _checks.apart


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


def words_for(like: Array, cells: int, seed: int, offset: int, cut: int) -> tuple[Words, Draw | None]:
    """The words for `run`, and what it needs if it is to draw them: C does so while data is on its way."""
    if 0 < cut < DROP_ALL and backends.draws():
        return empty_words(cells), (seed, offset, cut)
    return draw_words(like, cells, 0, seed, offset, cut), None


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
    source, target = _flat(x), _flat_output(y)
    backends.active().dropout_forward(tag, source, target, words, 0, x.size, seed, offset, cut, a, b, c)
    _deliver(target, y)


def gaussian(tag: int, x: Array, y: Array, seed: int, offset: int, sigma: float) -> None:
    """y = x times its Gaussian factors."""
    source, target = _flat(x), _flat_output(y)
    backends.active().gaussian_multiply(tag, source, target, 0, x.size, seed, offset, sigma)
    _deliver(target, y)


def apply(
    tag: int, x: Array, y: Array, words: Words, cells_shape: tuple[int, ...], a: float, b: float, c: float
) -> None:
    """y = x under stored bits of a mask that fits."""
    if not x.size:
        return
    masked_affine = backends.active().masked_affine
    if cells_shape == x.shape:
        source, target = _flat(x), _flat_output(y)
        masked_affine(tag, source, target, words, 0, 1, 1, x.size, a, b, c)
        _deliver(target, y)
        return
    as_it_lies = _grid_in_memory(x, y, cells_shape)
    if as_it_lies is None:
        grid = Grid.of(x.shape, cells_shape)
        source, target = _flat(x), _flat_output(y)
    else:
        grid = as_it_lies
        source, target = (_bits(array.ravel("K")) for array in (x, y))
    elements, results = source.reshape(-1), target.reshape(-1)
    for start, cell in grid.pieces():
        part = slice(start, start + grid.size)
        masked_affine(tag, elements[part], results[part], words, cell, grid.outer, grid.repeat, grid.inner, a, b, c)
    if as_it_lies is None:
        _deliver(target, y)


# ---- rows, for the fused ops ----


def taken_mask(name: str, value: Any) -> Array:
    """A mask of booleans or floats as an ndarray, extents 1 where it says one thing for all of an axis."""
    mask = np.asarray(value)
    if mask.dtype != np.bool_:
        _checks.dtype_tag(f"{name}, unless boolean,", mask.dtype)
    return mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.strides)]


def empty(like: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return np.empty(shape, dtype)


def zeros(like: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return np.zeros(shape, dtype)


def contiguous(x: Array) -> Array:
    """x in C order, a copy where it is not."""
    return x if x.flags.c_contiguous else x.copy("C")


def target(y: Array) -> Array:
    """What takes y's result: y, or an array in its stead where it is not in C order, to be copied over."""
    return y if y.flags.c_contiguous else np.empty(y.shape, y.dtype)


def detached(x: Array, y: Array) -> Array:
    """x, or a copy if writing y might change it."""
    return x.copy() if np.may_share_memory(x, y) else x


def cast(name: str, x: Array, dtype: Any) -> Array:
    """x as numbers of a dtype, contiguous."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, dtype)


def additive(name: str, mask: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """A mask as what is added to scores, contiguous and of a shape that it broadcasts to."""
    if mask.dtype == np.bool_:
        mask = np.where(mask, 0.0, -np.inf)
    return cast(name, np.broadcast_to(mask, shape), dtype)


def run(
    primitive: str,
    dtypes: tuple[int, ...],
    arrays: tuple[Array | None, ...],
    numbers: tuple[float, ...],
    draw: Draw | None = None,
) -> None:
    """A fused primitive on contiguous arrays; it draws its words where `words_for` has left that to it."""
    stored = [None if x is None else _bits(x) for x in arrays]
    if draw is not None:
        from .backends import native  # asked by name: it need not be there

        native.drawn(primitive, *draw, *dtypes, *stored, *numbers)
    else:
        getattr(backends.active(), primitive)(*dtypes, *stored, *numbers)


# ---- memory ----


def _grid_in_memory(x: Array, y: Array, cells_shape: tuple[int, ...]) -> Grid | None:
    """The grid of x and y as they lie, where both lie alike, and not in C order."""
    if x.flags.c_contiguous:
        return None
    longer = [axis for axis, extent in enumerate(x.shape) if extent != 1]
    if any(x.strides[axis] != y.strides[axis] or x.strides[axis] % x.itemsize for axis in longer):
        return None
    return Grid.in_memory(x.shape, tuple(stride // x.itemsize for stride in x.strides), cells_shape)


def _bits(x: Array) -> Array:
    """x as backends take it: of bfloat16, the one dtype that NumPy does not know itself, the bits."""
    return x.view(np.uint16) if x.dtype.kind == "V" else x


def _flat(x: Array) -> Array:
    """x as backends take it, C-contiguous in logical order: a copy where it is not."""
    return _bits(contiguous(x))


def _flat_output(y: Array) -> Array:
    """y as backends take it, or an array in its stead that `_deliver` copies over."""
    return _bits(target(y))


def _deliver(source: Array, y: Array) -> None:
    if not y.flags.c_contiguous:
        np.copyto(y, source.view(y.dtype))

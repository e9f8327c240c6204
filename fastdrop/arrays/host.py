"""Arrays in memory, as the NumPy API's flow (`ops`, `fused`) asks for them; `device` answers the same for a GPU's.

This module owns how an ndarray's memory reaches a backend: where it lies if its cells come side by side in it, in any
order of its axes, through a C-contiguous copy elsewhere; bfloat16 as its bits. Backends see instances of ndarray alone,
never of a subclass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import backends
from ..core import checks
from ..core.checks import BFLOAT16
from ..core.grid import Grid
from ..core.mask import PackedMask, empty_words, fill_words, popcount
from ..core.random import DROP_ALL

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
    "draw_into",
    "draw_or_defer",
    "draw_words",
    "empty",
    "empty_words_like",
    "forward",
    "gaussian",
    "in_order",
    "kept",
    "output",
    "run",
    "taken",
    "taken_mask",
    "target",
    "zeros",
]

Array = NDArray[Any]
Words = NDArray[np.uint32]
Draw = tuple[Any, int, int, int]  # C's function that draws and runs a primitive; seed, offset, threshold

taken = checks.data
output = checks.output
apart = checks.apart


def copy(y: Array, x: Array) -> None:
    np.copyto(y, x)


def check_words(name: str, mask: PackedMask) -> None:
    """Raises unless the mask lies in memory."""
    if type(mask._words) is not np.ndarray:
        raise TypeError(f"mask must be in memory, as {name} is, or a SeededMask, but got a PackedMask on a GPU")


def empty_words_like(x: Array | None, cells: int) -> Words:
    return empty_words(cells)


def draw_words(like: Array | None, cells: int, first: int, seed: int, offset: int, cut: int) -> Words:
    """The words of a mask of so many cells, any threshold."""
    words = empty_words(cells)
    draw_into(words, like, cells, first, seed, offset, cut)
    return words


def draw_into(words: Words, like: Array | None, cells: int, first: int, seed: int, offset: int, cut: int) -> None:
    """The same into words that are there: whoever takes a random state has them before."""
    if 0 < cut < DROP_ALL and cells:
        backends.active().draw_bits(words, 0, first, cells, seed, offset, cut)
    else:
        fill_words(words, cells, cut)


def draw_or_defer(words: Words, like: Array, cells: int, seed: int, offset: int, cut: int) -> Draw | None:
    """Draws words, or returns what `run` needs if it is to draw them: C does so while data is on its way."""
    drawn = backends.drawn()
    if 0 < cut < DROP_ALL and drawn is not None:
        return drawn, seed, offset, cut
    draw_into(words, like, cells, 0, seed, offset, cut)
    return None


def dilated(words: Words, rooms: list[Words], passes: tuple[tuple[int, int, int, int], ...]) -> Words:
    """Words after each of DropBlock's passes, which have a room each."""
    for to, (outer, n, inner, block) in zip(rooms, passes, strict=True):
        backends.active().dilate_bits(to, words, outer, n, inner, block)
        words = to
    return words


def kept(words: Words) -> int:
    """How many cells words keep."""
    return popcount(words)


def in_order(x: Array, y: Array, cells_shape: tuple[int, ...]) -> tuple[Array, Array]:
    """x and y, or arrays in their stead where `apply` can't take them as they lie; y's is then to be copied over."""
    if cells_shape != x.shape and _grid_in_memory(x, y, cells_shape) is not None:
        return x, y
    return contiguous(x), target(y)


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
    """y = x, both contiguous, under a mask of its shape that is drawn and, unless words is None, kept."""
    if tag == BFLOAT16:
        x, y = _bits(x), _bits(y)
    backends.active().dropout_forward(tag, x, y, words, 0, x.size, seed, offset, cut, a, b, c)


def gaussian(tag: int, x: Array, y: Array, seed: int, offset: int, sigma: float) -> None:
    """y = x times its Gaussian factors, both contiguous."""
    backends.active().gaussian_multiply(tag, _bits(x), _bits(y), 0, x.size, seed, offset, sigma)


def apply(
    tag: int, x: Array, y: Array, words: Words, cells_shape: tuple[int, ...], a: float, b: float, c: float
) -> None:
    """y = x, as they come from `in_order`, under stored bits of a mask that fits."""
    if not x.size:
        return
    masked_affine = backends.active().masked_affine
    if cells_shape == x.shape:
        masked_affine(tag, _bits(x), _bits(y), words, 0, 1, 1, x.size, a, b, c)
        return
    grid = _grid_in_memory(x, y, cells_shape) or Grid.of(x.shape, cells_shape)
    elements, results = (_bits(array.ravel("K")) for array in (x, y))
    for start, cell in grid.pieces():
        part = slice(start, start + grid.size)
        masked_affine(tag, elements[part], results[part], words, cell, grid.outer, grid.repeat, grid.inner, a, b, c)


# ---- rows, for the fused ops ----


def taken_mask(name: str, value: Any) -> Array:
    """A mask of booleans or floats as an ndarray, extents 1 where it says one thing for all of an axis."""
    mask = checks.plain(name, value)
    if mask.dtype != np.bool_:
        checks.dtype_tag(f"{name}, unless boolean,", mask.dtype)
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
    """A fused primitive on contiguous arrays; it draws its words where `draw_or_defer` has left that to it."""
    stored = [None if x is None else _bits(x) for x in arrays]
    if draw is not None:
        drawn, *state = draw  # the function that was asked then: another thread may have switched backends
        drawn(primitive, *state, *dtypes, *stored, *numbers)
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

"""The NumPy API: each op is a grid, a draw and an affine over a backend's primitives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _checks, backends, device
from ._checks import BFLOAT16
from .grid import Grid
from .mask import PackedMask, SeededMask, empty_words, fill_words
from .stream import DROP_ALL, Stream, check_random_state, random_state, threshold_and_scale

__all__ = ["apply_mask", "draw_mask", "dropout", "dropout_backward"]

Array = NDArray[Any]
Mask = PackedMask | SeededMask
RandomState = None | int | Stream | np.random.Generator


def dropout(
    x: ArrayLike,
    p: float = 0.5,
    *,
    training: bool = True,
    noise_shape: tuple[int | None, ...] | None = None,
    scaling: str = "inverted",
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, Mask | None]:
    """Returns x with each element dropped with probability p, and the mask that backward needs.

    ``y = x / (1 - p)`` where kept and exactly +0 where dropped, whatever x holds there: a dropped inf or NaN is 0. The
    mask is a function of the random state, p and the logical (C-order) index alone: the same on every backend, thread
    count and memory layout.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, any shape ``(*)``, any strides
        Also an array on a GPU, of CuPy or Numba and C-contiguous: the results are of its kind, on its stream.
    p : float
        Drop probability, 0 to 1; the threshold has 32 bits and the scale is that threshold's own. p = 1 gives zeros.
    training : bool
        False returns x unchanged (times ``1 - p`` under standard scaling).
    noise_shape : tuple of (int or None), optional
        1 on axes that share one decision, None or the full extent elsewhere, as in Keras.
    scaling : {"inverted", "standard"}
        "inverted" multiplies kept elements by ``1 / (1 - p)`` in training; "standard", the 2014 paper's, leaves them
        and multiplies by ``1 - p`` when not training.
    store : {"bits", "seed"}
        What the mask keeps for backward: 1/8 byte per cell, or the random state alone, from which backward draws the
        same bits again.
    rng : None, int, Stream or numpy.random.Generator
        None draws from the process-wide stream; an int is a seed, the same seed the same mask; a `Stream` gives each
        call its next offset; from a Generator a 64-bit seed is drawn.
    out : ndarray, optional
        Takes the result: shape and dtype of x, x itself for in place.

    Returns
    -------
    y : ndarray like x
        x itself when nothing is to be done (not training, or p = 0) and out is None.
    mask : PackedMask, SeededMask or None
        None when nothing was dropped. (Under standard scaling outside of training `dropout_backward` of None is not the
        gradient: that is ``1 - p`` times dy.)

    Raises
    ------
    TypeError
        dtype not in the list above; p not a number; rng of another type; out not an array of x's dtype.
    ValueError
        p outside [0, 1]; noise_shape that does not fit; unknown scaling or store; out of another shape, read-only, or
        overlapping x in part. Nothing is written to out then.

    Sources: Hinton et al. 2012; Srivastava et al., JMLR 15, 2014.

    >>> import fastdrop as fd, numpy as np
    >>> x = np.arange(1, 7, dtype=np.float32)
    >>> y, mask = fd.dropout(x, 0.5, rng=4)
    >>> y
    array([ 0.,  0.,  6.,  8.,  0., 12.], dtype=float32)
    >>> fd.dropout_backward(np.ones_like(x), mask)
    array([0., 0., 2., 2., 0., 2.], dtype=float32)
    """
    given = x
    if type(x) is not np.ndarray and device.is_on_device(x):
        return device.dropout(x, p, training, noise_shape, scaling, store, rng, out)
    x, tag = _checks.data("x", x)
    p = _checks.probability(p)
    if scaling != "inverted":
        _checks.choice("scaling", scaling, _checks.SCALINGS)
    if store != "bits":
        _checks.choice("store", store, _checks.STORES)
    shape = x.shape
    cells_shape = shape if noise_shape is None else _checks.noise_shape(noise_shape, shape)
    cut, scale = threshold_and_scale(p)
    if not training or cut == 0:
        check_random_state(rng)
        return _evaluated(given, x, cut, scaling, out), None
    y = _checks.output(out, x, "x")
    seed, offset = random_state(rng)
    if scaling == "standard":
        scale = 1.0
    if store == "seed":
        seeded = SeededMask._of(seed, offset, cells_shape, p, scale, cut)
        _apply(x, tag, seeded, y)
        return y, seeded
    cells = x.size if cells_shape is shape else math.prod(cells_shape)
    if cells_shape == shape and cut < DROP_ALL and cells:
        words = empty_words(cells)
        source, target = _flat(x, tag), _flat_output(y, tag)
        backends.active().dropout_forward(tag, source, target, words, 0, cells, seed, offset, cut, scale, 0.0, 0.0)
        _deliver(target, y, tag)
        return y, PackedMask._of(words, shape, p, scale)
    mask = PackedMask._of(_draw_words(cells, 0, seed, offset, cut), cells_shape, p, scale)
    _apply(x, tag, mask, y)
    return y, mask


def dropout_backward(dy: ArrayLike, mask: Mask | None, *, out: Array | None = None) -> Array:
    """Returns the gradient of dropout's input: dy times the mask's scale where kept, exactly 0 where dropped.

    Parameters
    ----------
    dy : array_like of float32, float64, float16 or bfloat16, of the shape dropout was applied to
    mask : PackedMask, SeededMask or None
        What `dropout` returned; None returns dy itself.
    out : ndarray, optional
        Takes the result: shape and dtype of dy, dy itself for in place.

    Reads 1/8 byte per cell beside dy, or nothing with ``store="seed"``.

    Raises
    ------
    TypeError, ValueError
        dtype, mask or out that do not fit, as in `dropout`.

    >>> import fastdrop as fd, numpy as np
    >>> mask = fd.PackedMask.from_bool([True, False, True, False], 0.5)
    >>> fd.dropout_backward(np.array([0.3, -0.1, 0.2, -0.05]), mask)
    array([0.6, 0. , 0.4, 0. ])
    """
    return _masked("dy", dy, mask, out)


def apply_mask(x: ArrayLike, mask: Mask | None, *, out: Array | None = None) -> Array:
    """Returns x under a mask drawn before: kept elements times its scale, dropped ones exactly 0.

    For masks shared between layers or steps, Monte Carlo passes with common masks, and masks of one's own
    (`PackedMask.from_bool`). Parameters and errors as in `dropout_backward`.

    >>> import fastdrop as fd, numpy as np
    >>> mask = fd.draw_mask((1, 4), 0.5, rng=5)  # one decision per column
    >>> fd.apply_mask(np.ones((2, 4), np.float32), mask)
    array([[0., 0., 2., 0.],
           [0., 0., 2., 0.]], dtype=float32)
    """
    return _masked("x", x, mask, out)


def draw_mask(shape: int | tuple[int, ...], p: float, *, rng: RandomState = None, first_cell: int = 0) -> PackedMask:
    """Returns a mask alone, drawn but not applied.

    Parameters
    ----------
    shape : int or tuple of int
    p : float
        Drop probability, 0 to 1.
    rng : None, int, Stream or numpy.random.Generator
        As in `dropout`.
    first_cell : int
        Cell of the logical grid that the mask begins with, up to ``2**64`` less its size. A shard that holds cells
        ``a`` to ``b`` of a larger array draws its part of the one mask with ``first_cell=a``.

    Raises
    ------
    TypeError, ValueError
        As in `dropout`; first_cell out of range.

    >>> import fastdrop as fd, numpy as np
    >>> whole = fd.draw_mask(100, 0.3, rng=1).to_bool()
    >>> shard = fd.draw_mask(60, 0.3, rng=1, first_cell=40).to_bool()
    >>> bool((whole[40:] == shard).all())
    True
    """
    extents = _checks.shape("shape", shape)
    p = _checks.probability(p)
    cells = math.prod(extents)
    first = _checks.first_cell(first_cell, cells)
    seed, offset = random_state(rng)
    cut, scale = threshold_and_scale(p)
    return PackedMask._of(_draw_words(cells, first, seed, offset, cut), extents, p, scale)


def _masked(name: str, x: ArrayLike, mask: Mask | None, out: Array | None) -> Array:
    given = x
    if type(x) is not np.ndarray and device.is_on_device(x):
        result: Array = device.masked(name, x, mask, out)
        return result
    x, tag = _checks.data(name, x)
    if mask is not None:
        if type(mask) is not PackedMask and not isinstance(mask, (PackedMask, SeededMask)):
            raise TypeError(f"mask must be a PackedMask, a SeededMask or None, but got {type(mask).__name__}")
        if type(mask) is PackedMask and type(mask._words) is not np.ndarray:
            raise TypeError(f"mask must be in memory, as {name} is, or a SeededMask, but got a PackedMask on a GPU")
        if mask.shape != x.shape:
            _checks.mask_grid(name, x.shape, mask.shape)
    elif out is None:
        return given if isinstance(given, np.ndarray) else x
    y = _checks.output(out, x, name)
    if mask is None:
        if y is not x:
            np.copyto(y, x)
        return y
    _apply(x, tag, mask, y)
    return y


def _apply(x: Array, tag: int, mask: Mask, y: Array) -> None:
    """y = x under the mask, which fits."""
    if not x.size:
        return
    backend = backends.active()
    source, target = _flat(x, tag), _flat_output(y, tag)
    if isinstance(mask, SeededMask):
        if mask._shape == x.shape and 0 < mask._threshold < DROP_ALL:
            backend.dropout_forward(
                tag, source, target, None, 0, x.size, mask._seed, mask._offset, mask._threshold, mask._scale, 0.0, 0.0
            )
            _deliver(target, y, tag)
            return
        words = _draw_words(math.prod(mask._shape), 0, mask._seed, mask._offset, mask._threshold)
    else:
        words = mask._words
    a = mask._scale
    if mask._shape == x.shape:
        backend.masked_affine(tag, source, target, words, 0, 1, 1, x.size, a, 0.0, 0.0)
    else:
        grid = Grid.of(x.shape, mask._shape)
        elements, results = source.reshape(-1), target.reshape(-1)
        for start, cell in grid.pieces():
            part = slice(start, start + grid.size)
            backend.masked_affine(
                tag, elements[part], results[part], words, cell, grid.outer, grid.repeat, grid.inner, a, 0.0, 0.0
            )
    _deliver(target, y, tag)


def _evaluated(given: ArrayLike, x: Array, cut: int, scaling: str, out: Array | None) -> Array:
    """x when dropout is off: itself, or times the realised 1 - p under standard scaling."""
    if scaling == "standard" and cut:
        return _masked("x", x, _every_element(x, 1.0 - cut / DROP_ALL), out)
    return _masked("x", given, None, out)


def _every_element(x: Array, scale: float) -> PackedMask:
    """A mask of one cell, shared by all of x, that keeps and scales."""
    kept = scale != 0.0
    return PackedMask._of(np.full(1, kept, np.uint32), (1,) * x.ndim, 0.0, scale)


def _draw_words(cells: int, first: int, seed: int, offset: int, cut: int) -> NDArray[np.uint32]:
    words = empty_words(cells)
    if 0 < cut < DROP_ALL and cells:
        backends.active().draw_bits(words, 0, first, cells, seed, offset, cut)
    else:
        fill_words(words, cells, cut)
    return words


def _flat(x: Array, tag: int) -> Array:
    """x as backends take it: C-contiguous in logical order (a copy where it is not), bfloat16 as its bits."""
    if not x.flags.c_contiguous:
        x = np.ascontiguousarray(x)
    return x.view(np.uint16) if tag == BFLOAT16 else x


def _flat_output(y: Array, tag: int) -> Array:
    """y as backends take it, or an array in its stead that `_deliver` copies over."""
    if not y.flags.c_contiguous:
        y = np.empty(y.shape, y.dtype)
    return y.view(np.uint16) if tag == BFLOAT16 else y


def _deliver(target: Array, y: Array, tag: int) -> None:
    if target is not y and not y.flags.c_contiguous:
        np.copyto(y, target.view(y.dtype) if tag == BFLOAT16 else target)

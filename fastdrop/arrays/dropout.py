"""The NumPy API of dropout with a decision for each element, and of masks that exist already.

`fastdrop.dropout` and the other functions here are public. Kinds of dropout that drop channels, samples or blocks as a
whole are in `structured.py`, ops that fuse dropout with other layers in `fused.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from numpy.typing import ArrayLike

from ..core import checks
from ..core.mask import GaussianNoise, PackedMask, empty_words, gaussian_noise, packed_mask
from ..core.random import check_random_state, random_state, threshold_and_scale
from .array_ops import Array, BitMask, Mask, RandomState, Shape
from .host import draw_cells
from .masking import Options, array_ops, copy_to_output, drop, masked, multiply_by_noise

__all__ = [
    "alpha_dropout",
    "apply_mask",
    "draw_mask",
    "drop_connect",
    "dropout",
    "dropout_backward",
    "gaussian_dropout",
]


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
) -> tuple[Array, BitMask | None]:
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
        Takes the result: shape and dtype of x, x itself for in place. May be of a subclass of ndarray, as x may.

    Returns
    -------
    y : ndarray like x
        out, where it is given; x itself when nothing is to be done (not training, or p = 0) and out is None.
    mask : PackedMask, SeededMask or None
        None when nothing was dropped. (Under standard scaling outside of training `dropout_backward` of None is not the
        gradient: that is ``1 - p`` times dy.)

    Raises
    ------
    TypeError
        dtype not in the list above; a masked or a sparse array; p not a number; rng of another type; out not an array
        of x's dtype.
    ValueError
        p outside [0, 1]; noise_shape that does not fit; unknown scaling or store; out of another shape, read-only,
        overlapping x in part, or with elements that overlap one another. Nothing is written to out then.
    MemoryError
        rng has not moved on where the result or the mask could not be made.

    Sources: Hinton et al. 2012; Srivastava et al., JMLR 15, 2014.

    >>> import fastdrop as fd, numpy as np
    >>> x = np.arange(1, 7, dtype=np.float32)
    >>> y, mask = fd.dropout(x, 0.5, rng=4)
    >>> y
    array([ 0.,  0.,  6.,  8.,  0., 12.], dtype=float32)
    >>> fd.dropout_backward(np.ones_like(x), mask)
    array([0., 0., 2., 2., 0., 2.], dtype=float32)
    """
    mask_shape_of: Callable[[Shape], Shape] | None = None
    if noise_shape is not None:
        mask_shape_of = lambda shape: checks.noise_shape(noise_shape, shape)  # noqa: E731
    return drop("x", x, p, mask_shape_of, checks.scaling(scaling), Options(training, store, rng, out))


def dropout_backward(dy: ArrayLike, mask: Mask | None, *, out: Array | None = None) -> Array:
    """Returns the gradient of dropout's input: dy times the mask's scale where kept, exactly 0 where dropped.

    Parameters
    ----------
    dy : array_like of float32, float64, float16 or bfloat16, of the shape dropout was applied to
    mask : PackedMask, SeededMask, GaussianNoise or None
        What `dropout`, or another kind, returned; None returns dy itself.
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
    dx: Array = masked("dy", dy, mask, out)
    return dx


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
    y: Array = masked("x", x, mask, out)
    return y


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
    extents = checks.shape("shape", shape)
    p = checks.probability(p)
    cells = math.prod(extents)
    first = checks.first_cell(first_cell, cells)
    threshold, scale = threshold_and_scale(p)
    words = empty_words(cells)
    draw_cells(words, first, cells, random_state(rng), threshold)
    return packed_mask(words, extents, p, scale)


def alpha_dropout(
    x: ArrayLike,
    p: float = 0.5,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, BitMask | None]:
    """Returns x with elements dropped to SELU's floor and all shifted and scaled back to mean 0 and variance 1.

    Kept elements become ``a x + b``, dropped ones ``a f + b`` with ``f = -1.758...``, ``a = ((1 - p) (1 + p f**2)) **
    -1/2`` and ``b = -a p f``: where x has mean 0 and variance 1, so has the result. `dropout_backward` is the gradient:
    a where kept, 0 where dropped.

    Parameters
    ----------
    x : array_like of a float dtype, any shape ``(*)``
    p : float
        Drop probability, 0 to 1; p = 1 gives zeros.
    training, store, rng, out
        As in `dropout`, and so are the errors.

    Kept for backward: a bit per element, or nothing. Source: Klambauer et al., NeurIPS 2017.

    >>> import fastdrop as fd, numpy as np
    >>> y, mask = fd.alpha_dropout(np.zeros(4), 0.5, rng=4)
    >>> y.round(4), round(mask.scale, 4)
    (array([-0.7792, -0.7792,  0.7792,  0.7792]), 0.8864)
    """
    return drop("x", x, p, None, "alpha", Options(training, store, rng, out))


def drop_connect(
    w: ArrayLike,
    p: float = 0.5,
    *,
    training: bool = True,
    scaling: str = "inverted",
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, BitMask | None]:
    """Returns weights w with connections dropped, one mask for the whole batch: DropConnect.

    It is `dropout` of a weight, whose parameters and errors these are. The gradient of w is `dropout_backward` of the
    dropped weight's, so neither w nor its dropped form need be kept: a bit per weight, or nothing.

    Source: Wan et al., ICML 2013 (who draw a mask for each example); Merity et al., ICLR 2018, for recurrent weights.

    >>> import fastdrop as fd, numpy as np
    >>> w, mask = fd.drop_connect(np.ones((2, 3), np.float32), 0.5, rng=4)
    >>> w
    array([[0., 0., 2.],
           [2., 0., 2.]], dtype=float32)
    """
    return drop("w", w, p, None, checks.scaling(scaling), Options(training, store, rng, out))


def gaussian_dropout(
    x: ArrayLike,
    p: float = 0.5,
    *,
    training: bool = True,
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, GaussianNoise | None]:
    """Returns x times Gaussian noise of mean 1 and variance ``p / (1 - p)``, and what the noise is drawn from.

    Nothing is dropped: each element is multiplied by ``1 + sigma z``, whose first two moments are those of dropout's
    factor. The noise is float32 for every dtype and the same bit for bit on every backend. `dropout_backward` is the
    gradient.

    Parameters
    ----------
    x : array_like of a float dtype, any shape ``(*)``
    p : float
        From 0 to below 1.
    training, rng, out
        As in `dropout`, and so are the errors; ValueError for p = 1, which has no variance.

    Kept for backward: nothing, the noise is drawn again. Source: Srivastava et al., JMLR 15, 2014, section 10.

    >>> import fastdrop as fd, numpy as np
    >>> y, noise = fd.gaussian_dropout(np.ones(3, np.float32), 0.5, rng=4)
    >>> y.round(4)
    array([-0.4915,  1.1203,  1.2279], dtype=float32)
    """
    ops = array_ops(x)
    source, tag = ops.as_array("x", x)
    p = checks.gaussian_probability(p)
    if not training or p == 0.0:
        check_random_state(rng)
        return masked("x", x, None, out), None
    y = ops.output_array(out, source, "x")
    shape = tuple(source.shape)
    kernel_x, kernel_y = ops.kernel_arrays(source, y, shape)
    noise = gaussian_noise(random_state(rng), shape, p)
    multiply_by_noise(ops, tag, kernel_x, kernel_y, noise)
    return copy_to_output(ops, kernel_y, y, out), noise

"""The NumPy API of dropout with a decision for each element, and of masks that exist already.

`fastdrop.dropout` and the other functions here are public. Kinds of dropout that drop channels, samples or blocks as a
whole are in `structured.py`, ops that fuse dropout with other layers in `fused.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

from numpy.typing import ArrayLike

from ..core import checks
from ..core.mask import PackedMask, SeededMask, packed_mask
from ..core.part import Run, parts_of, runs
from ..core.random import random_state, threshold_and_scale
from .array_ops import Shape
from .host import HOST
from .masking import array_ops, drop, masked
from .signatures import (
    AnyArray,
    Array,
    BitMask,
    CommonOptions,
    GridOptions,
    Mask,
    MaybeNone,
    PartOfWhole,
    RandomState,
    SameArray,
    ScaledOptions,
)


@overload
def dropout(
    x: SameArray, p: float = ..., *, store: Literal["bits"] = ..., **options: Unpack[GridOptions]
) -> tuple[SameArray, PackedMask | MaybeNone]: ...
@overload
def dropout(
    x: SameArray, p: float = ..., *, store: Literal["seed"], **options: Unpack[GridOptions]
) -> tuple[SameArray, SeededMask | MaybeNone]: ...
@overload
def dropout(x: ArrayLike, p: float = ..., *, store: str = ..., **options: Unpack[GridOptions]) -> tuple[Array, Any]: ...
def dropout(
    x: Any,
    p: float = 0.5,
    *,
    training: bool = True,
    noise_shape: Sequence[int | None] | None = None,
    scaling: str = "inverted",
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Any, BitMask | None]:
    """Returns x with each element dropped with probability p, and the mask that backward needs.

    ``y = x / (1 - p)`` where an element is kept and exactly +0 where it is dropped, even if it is inf or NaN. The mask
    depends on the random state, p and the logical (C-order) index only, so it is the same on every backend, with every
    number of threads and in every memory layout.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, any shape ``(*)``, any strides
        An array on a GPU must be a C-contiguous one of CuPy or Numba; the results are arrays of the same library.
    p : float
        Drop probability, 0 to 1. It is rounded to 32 bits, and the scale is computed from the rounded value. p = 1
        gives zeros.
    training : bool
        False returns x unchanged (times ``1 - p`` under standard scaling).
    noise_shape : tuple of (int or None), optional
        1 on axes that share one decision, None or x's extent elsewhere, as in Keras.
    scaling : {"inverted", "standard"}
        "inverted" multiplies kept elements by ``1 / (1 - p)`` in training. "standard", as in the 2014 paper, leaves
        them unchanged in training and multiplies everything by ``1 - p`` when not training.
    store : {"bits", "seed"}
        "bits" keeps 1/8 byte per cell for backward. "seed" keeps the random state only, and backward draws the same
        bits again.
    rng : None, int, Stream or numpy.random.Generator
        None draws from the process-wide stream. An int is a seed: the same seed gives the same mask. A `Stream` gives
        each call its next offset. A Generator is asked for a 64-bit seed.
    out : ndarray, optional
        Receives the result. It has the shape and dtype of x; x itself works in place. x and out may be instances of
        subclasses of ndarray.
    part : Part or sequence of them, optional
        Of which whole array x is a part: x then has that part of the whole's mask. A sequence is of parts that lie one
        after the other along one axis of x, in any order. A call takes the same random numbers whatever its part.

    Returns
    -------
    y : ndarray like x
        out if it is given; x itself if there is nothing to do (not training, or p = 0) and out is None.
    mask : PackedMask, SeededMask or None
        None if nothing was dropped. (With standard scaling and training False, the gradient is ``1 - p`` times dy, and
        not `dropout_backward` of None.)

    Raises
    ------
    TypeError
        If the dtype is not in the list above; an array is masked or sparse; p is not a number; rng has another type;
        or out is not an array of x's dtype.
    ValueError
        If p is outside [0, 1]; noise_shape or part does not fit; parts along an axis that shares decisions would have
        different ones; scaling or store is unknown; or out has another shape, is read-only, overlaps x in part, or has
        elements that overlap. Nothing is written to out then.
    MemoryError
        If the result or the mask cannot be allocated. No random number is taken then.

    Notes
    -----
    Kept for backward: 1/8 byte per cell, or nothing with ``store="seed"``. Sources: Hinton et al. 2012; Srivastava et
    al., JMLR 15, 2014.

    Examples
    --------
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
        if part is not None:  # its extents are x's, and the whole's are asked for
            checks.noise_shape(noise_shape, tuple(array_ops(x).as_array("x", x)[0].shape))
            noise_shape = tuple(1 if extent == 1 else None for extent in noise_shape)
        mask_shape_of = partial(checks.noise_shape, noise_shape)
    return drop("x", x, p, mask_shape_of, checks.scaling(scaling), (training, store, rng, out), part)


@overload
def dropout_backward(dy: SameArray, mask: Mask | None, *, out: AnyArray | None = ...) -> SameArray: ...
@overload
def dropout_backward(dy: ArrayLike, mask: Mask | None, *, out: AnyArray | None = ...) -> Array: ...
def dropout_backward(dy: Any, mask: Mask | None, *, out: AnyArray | None = None) -> Any:
    """Returns the gradient of dropout's input: dy times the mask's scale where kept, exactly 0 where dropped.

    Parameters
    ----------
    dy : array_like of float32, float64, float16 or bfloat16, of the shape dropout was applied to
    mask : PackedMask, SeededMask, GaussianNoise or None
        The mask that `dropout` or another kind of dropout returned. None returns dy itself.
    out : ndarray, optional
        Receives the result. It has the shape and dtype of dy; dy itself works in place.

    Returns
    -------
    ndarray like dy
        out if it is given.

    Raises
    ------
    TypeError, ValueError
        If dtype, mask or out do not fit, as in `dropout`.

    Notes
    -----
    Besides dy it reads 1/8 byte per cell, or nothing with ``store="seed"``.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> mask = fd.PackedMask.from_bool([True, False, True, False], 0.5)
    >>> fd.dropout_backward(np.array([0.3, -0.1, 0.2, -0.05]), mask)
    array([0.6, 0. , 0.4, 0. ])
    """
    return masked("dy", dy, mask, out)


@overload
def apply_mask(x: SameArray, mask: Mask | None, *, out: AnyArray | None = ...) -> SameArray: ...
@overload
def apply_mask(x: ArrayLike, mask: Mask | None, *, out: AnyArray | None = ...) -> Array: ...
def apply_mask(x: Any, mask: Mask | None, *, out: AnyArray | None = None) -> Any:
    """Returns x under an existing mask: kept elements times its scale, dropped ones exactly 0.

    Use it to share a mask between layers or steps, or to apply a mask of your own (`PackedMask.from_bool`).

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, of the shape that the mask is for
    mask : PackedMask, SeededMask, GaussianNoise or None
        None returns x itself.
    out : ndarray, optional
        Receives the result. It has the shape and dtype of x; x itself works in place.

    Returns
    -------
    ndarray like x
        out if it is given.

    Raises
    ------
    TypeError, ValueError
        If dtype, mask or out do not fit, as in `dropout`.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> mask = fd.draw_mask((1, 4), 0.5, rng=5)  # one decision per column
    >>> fd.apply_mask(np.ones((2, 4), np.float32), mask)
    array([[0., 0., 2., 0.],
           [0., 0., 2., 0.]], dtype=float32)
    """
    return masked("x", x, mask, out)


def draw_mask(
    shape: int | tuple[int, ...],
    p: float,
    *,
    rng: RandomState = None,
    first_cell: int = 0,
    part: PartOfWhole = None,
) -> PackedMask:
    """Returns a mask without applying it.

    Parameters
    ----------
    shape : int or tuple of int
    p : float
        Drop probability, 0 to 1.
    rng : None, int, Stream or numpy.random.Generator
        As in `dropout`.
    first_cell : int
        The cell of the logical grid at which the mask begins, up to ``2**64`` less the mask's size. A shard with the
        cells ``a`` to ``b`` of a larger array draws its part of the array's mask with ``first_cell=a``.
    part : Part or sequence of them, optional
        Of which whole mask this one is a part, as in `dropout`, in place of first_cell.

    Returns
    -------
    PackedMask

    Raises
    ------
    TypeError, ValueError
        As in `dropout`, and if first_cell is out of range or given beside part.

    Examples
    --------
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
    cells_of: Iterable[Run] = (Run(0, first, 1, 0, 1, 0, cells),)
    parts = None
    if part is not None:
        if first:
            raise ValueError("first_cell and part must not both be given")
        parts = parts_of(part, extents)
        cells_of = runs(parts, extents)
    threshold, scale = threshold_and_scale(p)
    words = HOST.empty_words(None, cells)
    HOST.draw_words(words, None, cells, random_state(rng), threshold, cells_of)
    return packed_mask(words, extents, p, scale, parts)


@overload
def alpha_dropout(
    x: SameArray, p: float = ..., *, store: Literal["bits"] = ..., **options: Unpack[CommonOptions]
) -> tuple[SameArray, PackedMask | MaybeNone]: ...
@overload
def alpha_dropout(
    x: SameArray, p: float = ..., *, store: Literal["seed"], **options: Unpack[CommonOptions]
) -> tuple[SameArray, SeededMask | MaybeNone]: ...
@overload
def alpha_dropout(
    x: ArrayLike, p: float = ..., *, store: str = ..., **options: Unpack[CommonOptions]
) -> tuple[Array, Any]: ...
def alpha_dropout(
    x: Any,
    p: float = 0.5,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Any, BitMask | None]:
    """Returns x with dropped elements set to SELU's floor, and everything scaled so that mean and variance stay.

    Kept elements become ``a x + b``, dropped ones ``a f + b`` with ``f = -1.758...``, ``a = ((1 - p) (1 + p f**2)) **
    -1/2`` and ``b = -a p f``. If x has mean 0 and variance 1, the result does too. `dropout_backward` is the gradient:
    dy times a where kept, 0 where dropped.

    Parameters
    ----------
    x : array_like of a float dtype, any shape ``(*)``
    p : float
        Drop probability, 0 to 1; p = 1 gives zeros.
    training : bool
        False drops nothing.
    store : {"bits", "seed"}
        What is kept for backward: bits, or the random state, from which they are drawn again.
    rng : None, int, Stream or numpy.random.Generator
        What the mask is drawn from: the process-wide stream, a seed, or the given source.
    out : ndarray, optional
        Receives the result.
    part : Part or sequence of them, optional
        Of which whole array the data is a part.

    Returns
    -------
    y : ndarray like x
        out if it is given.
    mask : PackedMask, SeededMask or None
        What `dropout_backward` needs; None if nothing was dropped.

    Raises
    ------
    TypeError, ValueError
        As in `dropout`.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per element, or nothing. Source: Klambauer et al., NeurIPS 2017.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> y, mask = fd.alpha_dropout(np.zeros(4), 0.5, rng=4)
    >>> y.round(4), round(mask.scale, 4)
    (array([-0.7792, -0.7792,  0.7792,  0.7792]), 0.8864)
    """
    return drop("x", x, p, None, "alpha", (training, store, rng, out), part)


@overload
def drop_connect(
    w: SameArray, p: float = ..., *, store: Literal["bits"] = ..., **options: Unpack[ScaledOptions]
) -> tuple[SameArray, PackedMask | MaybeNone]: ...
@overload
def drop_connect(
    w: SameArray, p: float = ..., *, store: Literal["seed"], **options: Unpack[ScaledOptions]
) -> tuple[SameArray, SeededMask | MaybeNone]: ...
@overload
def drop_connect(
    w: ArrayLike, p: float = ..., *, store: str = ..., **options: Unpack[ScaledOptions]
) -> tuple[Array, Any]: ...
def drop_connect(
    w: Any,
    p: float = 0.5,
    *,
    training: bool = True,
    scaling: str = "inverted",
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Any, BitMask | None]:
    """Returns weights w with connections dropped, one mask for the whole batch: DropConnect.

    It is `dropout` of a weight. The gradient of w is `dropout_backward` of the gradient of the dropped weight.

    Parameters
    ----------
    w : array_like of a float dtype, any shape ``(*)``
        The weights.
    p : float
        Drop probability of a connection, 0 to 1.
    training : bool
        False drops nothing.
    scaling : {"inverted", "standard"}
        "inverted" scales what is kept in training, "standard" everything when not training.
    store : {"bits", "seed"}
        What is kept for backward: bits, or the random state, from which they are drawn again.
    rng : None, int, Stream or numpy.random.Generator
        What the mask is drawn from: the process-wide stream, a seed, or the given source.
    out : ndarray, optional
        Receives the result.
    part : Part or sequence of them, optional
        Of which whole array the data is a part.

    Returns
    -------
    y : ndarray like w
        out if it is given.
    mask : PackedMask, SeededMask or None
        What `dropout_backward` needs; None if nothing was dropped.

    Raises
    ------
    TypeError, ValueError
        As in `dropout`.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per weight, or nothing. Sources: Wan et al., ICML 2013 (who draw a mask for each example);
    Merity et al., ICLR 2018, for recurrent weights.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> w, mask = fd.drop_connect(np.ones((2, 3), np.float32), 0.5, rng=4)
    >>> w
    array([[0., 0., 2.],
           [2., 0., 2.]], dtype=float32)
    """
    return drop("w", w, p, None, checks.scaling(scaling), (training, store, rng, out), part)

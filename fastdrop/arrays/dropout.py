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

from ..core import checks, variants
from ..core.mask import GaussianNoise, PackedMask, SeededMask, gaussian_noise, packed_mask, parts_of_noise
from ..core.part import Run, parts_of, runs
from ..core.random import check_random_state, random_state, threshold_and_scale
from .array_ops import Shape
from .host import HOST
from .masking import array_ops, copy_to_output, drop, masked
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

    Besides dy it reads 1/8 byte per cell, or nothing with ``store="seed"``.

    Raises
    ------
    TypeError, ValueError
        If dtype, mask or out do not fit, as in `dropout`.

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

    Use it to share a mask between layers or steps, or to apply a mask of your own (`PackedMask.from_bool`). Parameters
    and errors are those of `dropout_backward`.

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

    Raises
    ------
    TypeError, ValueError
        As in `dropout`, and if first_cell is out of range or given beside part.

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
    training, store, rng, out, part
        As in `dropout`, with the same errors.

    Kept for backward: a bit per element, or nothing. Source: Klambauer et al., NeurIPS 2017.

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

    It is `dropout` of a weight, with the same parameters and errors. The gradient of w is `dropout_backward` of the
    gradient of the dropped weight. Kept for backward: a bit per weight, or nothing.

    Source: Wan et al., ICML 2013 (who draw a mask for each example); Merity et al., ICLR 2018, for recurrent weights.

    >>> import fastdrop as fd, numpy as np
    >>> w, mask = fd.drop_connect(np.ones((2, 3), np.float32), 0.5, rng=4)
    >>> w
    array([[0., 0., 2.],
           [2., 0., 2.]], dtype=float32)
    """
    return drop("w", w, p, None, checks.scaling(scaling), (training, store, rng, out), part)


@overload
def gaussian_dropout(
    x: SameArray, p: float = ..., **options: Unpack[CommonOptions]
) -> tuple[SameArray, GaussianNoise | MaybeNone]: ...
@overload
def gaussian_dropout(
    x: ArrayLike, p: float = ..., **options: Unpack[CommonOptions]
) -> tuple[Array, GaussianNoise | MaybeNone]: ...
def gaussian_dropout(
    x: Any,
    p: float = 0.5,
    *,
    training: bool = True,
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Any, GaussianNoise | None]:
    """Returns x times Gaussian noise of mean 1 and variance ``p / (1 - p)``, and the noise.

    Nothing is dropped: each element is multiplied by ``1 + sigma z``, which has the mean and the variance of dropout's
    multiplier. The noise is float32 for every dtype and the same bit for bit on every backend. `dropout_backward` is
    the gradient.

    Parameters
    ----------
    x : array_like of a float dtype, any shape ``(*)``
    p : float
        From 0 to below 1.
    training, rng, out, part
        As in `dropout`, with the same errors; ValueError for p = 1, whose variance is infinite.

    Kept for backward: nothing, because the noise is drawn again. Source: Srivastava et al., JMLR 15, 2014, section 10.

    >>> import fastdrop as fd, numpy as np
    >>> y, noise = fd.gaussian_dropout(np.ones(3, np.float32), 0.5, rng=4)
    >>> y.round(4)
    array([-0.4915,  1.1203,  1.2279], dtype=float32)
    """
    ops = array_ops(x)
    source, tag = ops.as_array("x", x)
    p = checks.gaussian_probability(p)
    shape = tuple(source.shape)
    parts = None if part is None else parts_of_noise(part, shape)
    if not training or p == 0.0:
        check_random_state(rng)
        return masked("x", x, None, out), None
    y = ops.output_array(out, source, "x")
    kernel_x, kernel_y = ops.kernel_arrays(source, y, shape)
    state = random_state(rng)
    ops.gaussian_multiply(
        tag, kernel_x, kernel_y, state, variants.spread(p), None if parts is None else runs(parts, shape)
    )
    return copy_to_output(ops, kernel_y, y, out), gaussian_noise(state, shape, p, parts)

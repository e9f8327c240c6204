"""The NumPy API: each op is a grid, a draw and an affine over a backend's primitives.

The flow is here once; `host` and `device` know how arrays in memory and on a GPU reach the primitives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..core import checks, variants
from ..core.mask import GaussianNoise, PackedMask, SeededMask
from ..core.random import DROP_ALL, Stream, check_random_state, random_state, threshold_and_scale
from . import device, host

__all__ = [
    "alpha_dropout",
    "apply_mask",
    "draw_mask",
    "drop_block",
    "drop_connect",
    "dropout",
    "dropout_backward",
    "feature_alpha_dropout",
    "feature_dropout",
    "gaussian_dropout",
    "stochastic_depth",
    "variational_dropout",
]

Array = NDArray[Any]
Shape = tuple[int, ...]
BitMask = PackedMask | SeededMask
Mask = BitMask | GaussianNoise
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
    cells: Callable[[Shape], Shape] | None = None
    if noise_shape is not None:
        cells = lambda shape: checks.noise_shape(noise_shape, shape)  # noqa: E731
    return _drop("x", x, p, cells, checks.scaling(scaling), training, store, rng, out)


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
    dx: Array = _masked("dy", dy, mask, out)
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
    y: Array = _masked("x", x, mask, out)
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
    cut, scale = threshold_and_scale(p)
    words = host.empty_words_like(None, cells)
    host.draw_into(words, None, cells, first, *random_state(rng), cut)
    return PackedMask._of(words, extents, p, scale)


def feature_dropout(
    x: ArrayLike,
    p: float = 0.5,
    channel_axis: int = 1,
    *,
    training: bool = True,
    scaling: str = "inverted",
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, BitMask | None]:
    """Returns x with whole channels dropped, and the mask that backward needs: spatial dropout.

    Neighbouring pixels of a feature map tell the same, so dropping some of them drops little; here each channel of each
    sample goes or stays whole. `dropout_backward` is the gradient.

    Parameters
    ----------
    x : array_like of a float dtype, ``(N, C, *)``, at least two axes
        Axis 0 is the samples', unless ``channel_axis`` is 0: then x is one sample, ``(C, *)``.
    p : float
        Drop probability of a channel, 0 to 1; 0.1 to 0.3 is usual in convolutional networks.
    channel_axis : int
        1 for channels first, -1 for channels last.
    training, scaling, store, rng, out
        As in `dropout`, and so are the errors; TypeError or ValueError for a channel_axis that x hasn't.

    Kept for backward: a bit per channel and sample, or nothing. Source: Tompson et al., CVPR 2015.

    >>> import fastdrop as fd, numpy as np
    >>> y, mask = fd.feature_dropout(np.ones((2, 2, 3)), 0.5, rng=4)
    >>> y[:, :, 0], mask.nbytes
    (array([[0., 0.],
           [2., 2.]]), 4)
    """
    return _drop("x", x, p, _features(channel_axis), checks.scaling(scaling), training, store, rng, out)


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
    return _drop("x", x, p, None, "alpha", training, store, rng, out)


def feature_alpha_dropout(
    x: ArrayLike,
    p: float = 0.5,
    channel_axis: int = 1,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, BitMask | None]:
    """Returns `alpha_dropout` of x with whole channels dropped, as `feature_dropout` drops them.

    Parameters, errors and what is kept are those two's. Source: Klambauer et al., NeurIPS 2017.

    >>> import fastdrop as fd, numpy as np
    >>> y, mask = fd.feature_alpha_dropout(np.zeros((2, 2, 3)), 0.5, rng=4)
    >>> y[:, :, 0].round(4)
    array([[-0.7792, -0.7792],
           [ 0.7792,  0.7792]])
    """
    return _drop("x", x, p, _features(channel_axis), "alpha", training, store, rng, out)


def variational_dropout(
    x: ArrayLike,
    p: float,
    time_axis: int,
    *,
    training: bool = True,
    scaling: str = "inverted",
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, BitMask | None]:
    """Returns x with one mask held over a whole sequence, and that mask: locked dropout.

    Fresh masks at each step of a recurrent network wash out what it remembers; this one drops the same units at all
    steps. `dropout_backward` is the gradient.

    Parameters
    ----------
    x : array_like of a float dtype, any shape ``(*)``, such as ``(T, B, F)``
    p : float
        Drop probability, 0 to 1; 0.2 to 0.5 is usual.
    time_axis : int
        The axis along which decisions are shared.
    training, scaling, store, rng, out
        As in `dropout`, and so are the errors; TypeError or ValueError for a time_axis that x hasn't.

    Kept for backward: a bit per element of one step, or nothing. Source: Gal and Ghahramani, NeurIPS 2016.

    >>> import fastdrop as fd, numpy as np
    >>> y, mask = fd.variational_dropout(np.ones((3, 1, 4)), 0.5, 0, rng=4)
    >>> y[:, 0]
    array([[0., 0., 2., 2.],
           [0., 0., 2., 2.],
           [0., 0., 2., 2.]])
    """
    cells = lambda shape: variants.shared_cells(shape, checks.axis("time_axis", time_axis, len(shape)))  # noqa: E731
    return _drop("x", x, p, cells, checks.scaling(scaling), training, store, rng, out)


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
    return _drop("w", w, p, None, checks.scaling(scaling), training, store, rng, out)


def stochastic_depth(
    x: ArrayLike,
    p: float,
    mode: str,
    *,
    training: bool = True,
    scaling: str = "inverted",
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, BitMask | None]:
    """Returns x, the output of a residual branch, with whole samples dropped: stochastic depth, also called DropPath.

    `dropout_backward` is the gradient.

    Parameters
    ----------
    x : array_like of a float dtype, ``(N, *)``
    p : float
        Drop probability of the branch, 0 to 1.
    mode : {"row", "batch"}
        "row" decides for each sample, "batch" once for all.
    training, scaling, store, rng, out
        As in `dropout`, and so are the errors; ValueError for another mode or x without axes.

    Kept for backward: a bit per sample, or nothing. Source: Huang et al., ECCV 2016, whose scaling is "standard".

    >>> import fastdrop as fd, numpy as np
    >>> y, mask = fd.stochastic_depth(np.ones((4, 2)), 0.5, "row", rng=4)
    >>> y[:, 0]
    array([0., 0., 2., 2.])
    """
    checks.choice("mode", mode, checks.DEPTH_MODES)

    def cells(shape: Shape) -> Shape:
        checks.at_least("x", len(shape), 1, "an axis of samples")
        return variants.sample_cells(shape, mode)

    return _drop("x", x, p, cells, checks.scaling(scaling), training, store, rng, out)


def drop_block(
    x: ArrayLike,
    p: float,
    block_size: int | tuple[int, ...],
    *,
    training: bool = True,
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, PackedMask | None]:
    """Returns x with blocks of neighbouring cells dropped in each channel, scaled by cells / cells kept.

    Blocks are drawn where they fit, with the probability that would drop a share p in all if none overlapped. They do:
    0.093 are dropped for p = 0.1, 0.38 for 0.5 and 0.57 for 0.9 (blocks of 7 x 7 on 56 x 56), and at p = 1 everything.
    `dropout_backward` is the gradient.

    Parameters
    ----------
    x : array_like of a float dtype, ``(N, C, *)`` with one to three spatial axes
    p : float
        Share of cells to drop, 0 to 1; 0.1 is usual.
    block_size : int or tuple of int
        Extent of a block on each spatial axis, cut to x's. One is dropout of elements.
    training, rng, out
        As in `dropout`, and so are the errors; TypeError or ValueError for a block_size that doesn't fit and x of other
        numbers of axes.

    Kept for backward: a bit per element. Arrays on a GPU are waited for, to count what is kept. Source: Ghiasi et al.,
    NeurIPS 2018.

    >>> import fastdrop as fd, numpy as np
    >>> y, mask = fd.drop_block(np.ones((1, 1, 4, 6), np.float32), 0.3, 2, rng=3)
    >>> mask.to_bool()[0, 0].astype(int)
    array([[1, 1, 1, 1, 1, 1],
           [1, 0, 0, 1, 1, 1],
           [1, 0, 0, 1, 1, 1],
           [1, 1, 1, 1, 1, 1]])
    >>> float(mask.scale)
    1.2
    """
    memory = _memory(x)
    source, tag = memory.taken("x", x)
    p = checks.probability(p)
    shape = tuple(source.shape)
    checks.spatial("x", len(shape))
    plan = variants.blocks(shape, p, checks.block_size(block_size, len(shape) - 2))
    cut, _ = threshold_and_scale(plan.gamma)
    if not training or cut == 0:
        check_random_state(rng)
        return _masked("x", x, None, out), None
    y = memory.output(out, source, "x")
    elements, results = memory.in_order(source, y, shape)
    cells, seeds = math.prod(shape), math.prod(plan.seeds)
    words = memory.empty_words_like(source, seeds if cells else 0)
    rooms = [
        memory.empty_words_like(source, outer * (n + b - 1) * inner) for outer, n, inner, b in plan.passes if cells
    ]
    memory.draw_into(words, source, seeds if cells else 0, 0, *random_state(rng), cut)
    if cells:
        words = memory.dilated(words, rooms, plan.passes)
    kept = memory.kept(words) if cells else 0
    mask = PackedMask._of(words, shape, p, cells / kept if kept else 0.0)
    memory.apply(tag, elements, results, words, shape, mask.scale, 0.0, 0.0)
    return _delivered(memory, results, y, out), mask


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
    memory = _memory(x)
    source, tag = memory.taken("x", x)
    p = checks.gaussian_probability(p)
    if not training or p == 0.0:
        check_random_state(rng)
        return _masked("x", x, None, out), None
    y = memory.output(out, source, "x")
    shape = tuple(source.shape)
    elements, results = memory.in_order(source, y, shape)
    noise = GaussianNoise._of(*random_state(rng), shape, p)
    _multiply(memory, tag, elements, results, noise)
    return _delivered(memory, results, y, out), noise


def _memory(x: Any) -> ModuleType:
    """Who knows the memory that x lies in."""
    return device if type(x) is not np.ndarray and device.is_on_device(x) else host


def _features(channel_axis: int) -> Callable[[Shape], Shape]:
    def cells(shape: Shape) -> Shape:
        checks.at_least("x", len(shape), 2, "at least two axes")
        return variants.feature_cells(shape, checks.axis("channel_axis", channel_axis, len(shape)))

    return cells


def _drop(
    name: str,
    given: Any,
    p: Any,
    cells_of: Callable[[Shape], Shape] | None,
    law: str,
    training: bool,
    store: str,
    rng: RandomState,
    out: Array | None,
) -> tuple[Any, BitMask | None]:
    """Every op that keeps or drops: cells as ``cells_of`` the shape says (None: every element), affine as the law."""
    memory = _memory(given)
    x, tag = memory.taken(name, given)
    p = checks.probability(p)
    if store != "bits":
        checks.choice("store", store, checks.STORES)
    shape = tuple(x.shape)
    cells_shape = shape if cells_of is None else cells_of(shape)
    cut, _ = threshold_and_scale(p)
    if not training or cut == 0:
        check_random_state(rng)
        if law == "standard" and cut:
            return _masked(name, given, _every_element(memory, x, 1.0 - cut / DROP_ALL), out), None
        return _masked(name, given, None, out), None
    # The random state is taken when all memory is there: a call that fails for want of it has drawn nothing.
    y = memory.output(out, x, name)
    a, b, c = variants.affine(law, cut)
    cells = math.prod(cells_shape)
    while_drawing = cells_shape == shape and cut < DROP_ALL and cells
    words: Any = memory.empty_words_like(x, cells) if store == "bits" or not while_drawing else None
    elements, results = memory.in_order(x, y, cells_shape)
    seed, offset = random_state(rng)
    if while_drawing:
        memory.forward(tag, elements, results, words, seed, offset, cut, a, b, c)
    else:
        memory.draw_into(words, x, cells, 0, seed, offset, cut)
        memory.apply(tag, elements, results, words, cells_shape, a, b, c)
    y = _delivered(memory, results, y, out)
    if store == "seed":
        return y, SeededMask._of(seed, offset, cells_shape, p, a, cut)
    return y, PackedMask._of(words, cells_shape, p, a)


def _delivered(memory: ModuleType, results: Any, y: Any, out: Any) -> Any:
    """The result where the caller expects it, as the very object that was given for it."""
    if results is not y:
        memory.copy(y, results)
    return y if out is None else out


def _masked(name: str, given: Any, mask: Mask | None, out: Array | None) -> Any:
    """x under a mask: its scale where kept, 0 where dropped."""
    memory = _memory(given)
    x, tag = memory.taken(name, given)
    if mask is None:
        if out is None:
            return given if memory is device or isinstance(given, np.ndarray) else x
        y = memory.output(out, x, name)
        return _delivered(memory, x, y, out)
    if not isinstance(mask, (PackedMask, SeededMask, GaussianNoise)):
        raise TypeError(
            f"mask must be a PackedMask, a SeededMask, a GaussianNoise or None, but got {type(mask).__name__}"
        )
    if isinstance(mask, PackedMask):
        memory.check_words(name, mask)
    if mask.shape != x.shape:
        checks.mask_grid(name, tuple(x.shape), mask.shape, shared=not isinstance(mask, GaussianNoise))
    y = memory.output(out, x, name)
    if out is not None and isinstance(mask, PackedMask):
        memory.apart(y, mask._words, "mask")
    elements, results = memory.in_order(x, y, mask.shape)
    if isinstance(mask, GaussianNoise):
        _multiply(memory, tag, elements, results, mask)
    else:
        _apply(memory, tag, elements, results, mask, mask._scale, 0.0, 0.0)
    return _delivered(memory, results, y, out)


def _apply(memory: ModuleType, tag: int, x: Any, y: Any, mask: BitMask, a: float, b: float, c: float) -> None:
    """y = x under the mask, which fits; both as they come from `in_order`."""
    cells_shape = mask._shape
    if isinstance(mask, PackedMask):
        words = mask._words
    elif cells_shape == tuple(x.shape) and 0 < mask._threshold < DROP_ALL:
        if math.prod(cells_shape):
            memory.forward(tag, x, y, None, mask._seed, mask._offset, mask._threshold, a, b, c)
        return
    else:
        cells = math.prod(cells_shape)
        words = memory.draw_words(x, cells, 0, mask._seed, mask._offset, mask._threshold)
    memory.apply(tag, x, y, words, cells_shape, a, b, c)


def _multiply(memory: ModuleType, tag: int, x: Any, y: Any, noise: GaussianNoise) -> None:
    if math.prod(noise._shape):
        memory.gaussian(tag, x, y, noise._seed, noise._offset, variants.spread(noise._p))


def _every_element(memory: ModuleType, x: Any, scale: float) -> PackedMask:
    """A mask of one cell, shared by all of x, that keeps and scales."""
    words = memory.draw_words(x, 1, 0, 0, 0, 0 if scale else DROP_ALL)
    return PackedMask._of(words, (1,) * len(x.shape), 0.0, scale)

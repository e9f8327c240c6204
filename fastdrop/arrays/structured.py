"""The NumPy API of dropout that keeps or drops whole structures: channels, time sequences, samples, blocks.

The functions here are public. Each differs from `dropout` in the shape of its mask only, which has 1 on the axes along
which elements share a decision; `drop_block` widens its mask after the draw as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

from numpy.typing import ArrayLike

from ..core import checks, variants
from ..core.mask import PackedMask, SeededMask
from .array_ops import Shape
from .masking import drop
from .signatures import (
    AnyArray,
    Array,
    BitMask,
    CommonOptions,
    MaybeNone,
    PartOfWhole,
    RandomState,
    SameArray,
    ScaledOptions,
)


@overload
def feature_dropout(
    x: SameArray,
    p: float = ...,
    channel_axis: int = ...,
    *,
    store: Literal["bits"] = ...,
    **options: Unpack[ScaledOptions],
) -> tuple[SameArray, PackedMask | MaybeNone]: ...
@overload
def feature_dropout(
    x: SameArray, p: float = ..., channel_axis: int = ..., *, store: Literal["seed"], **options: Unpack[ScaledOptions]
) -> tuple[SameArray, SeededMask | MaybeNone]: ...
@overload
def feature_dropout(
    x: ArrayLike, p: float = ..., channel_axis: int = ..., *, store: str = ..., **options: Unpack[ScaledOptions]
) -> tuple[Array, Any]: ...
def feature_dropout(
    x: Any,
    p: float = 0.5,
    channel_axis: int = 1,
    *,
    training: bool = True,
    scaling: str = "inverted",
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Any, BitMask | None]:
    """Returns x with whole channels dropped, and the mask that backward needs: spatial dropout.

    Neighbouring pixels of a feature map carry similar information, so dropping single pixels drops little. Here each
    channel of each sample is kept or dropped as a whole. `dropout_backward` is the gradient.

    Parameters
    ----------
    x : array_like of a float dtype, ``(N, C, *)``, at least two axes
        Axis 0 counts samples. If ``channel_axis`` is 0, x is a single sample, ``(C, *)``.
    p : float
        Drop probability of a channel, 0 to 1; 0.1 to 0.3 is usual in convolutional networks.
    channel_axis : int
        1 for channels first, -1 for channels last.
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
    y : ndarray like x
        out if it is given.
    mask : PackedMask, SeededMask or None
        What `dropout_backward` needs; None if nothing was dropped.

    Raises
    ------
    TypeError, ValueError
        As in `dropout`. TypeError or ValueError if x does not have the channel_axis.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per channel and sample, or nothing. Source: Tompson et al., CVPR 2015.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> y, mask = fd.feature_dropout(np.ones((2, 2, 3)), 0.5, rng=4)
    >>> y[:, :, 0], mask.nbytes
    (array([[0., 0.],
           [2., 2.]]), 4)
    """
    mask_shape_of = _mask_shape_of_features(channel_axis)
    return drop("x", x, p, mask_shape_of, checks.scaling(scaling), (training, store, rng, out), part)


@overload
def feature_alpha_dropout(
    x: SameArray,
    p: float = ...,
    channel_axis: int = ...,
    *,
    store: Literal["bits"] = ...,
    **options: Unpack[CommonOptions],
) -> tuple[SameArray, PackedMask | MaybeNone]: ...
@overload
def feature_alpha_dropout(
    x: SameArray, p: float = ..., channel_axis: int = ..., *, store: Literal["seed"], **options: Unpack[CommonOptions]
) -> tuple[SameArray, SeededMask | MaybeNone]: ...
@overload
def feature_alpha_dropout(
    x: ArrayLike, p: float = ..., channel_axis: int = ..., *, store: str = ..., **options: Unpack[CommonOptions]
) -> tuple[Array, Any]: ...
def feature_alpha_dropout(
    x: Any,
    p: float = 0.5,
    channel_axis: int = 1,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Any, BitMask | None]:
    """Returns `alpha_dropout` of x with whole channels dropped, as in `feature_dropout`.

    Parameters
    ----------
    x : array_like of a float dtype, ``(N, C, *)``, at least two axes
    p : float
        Drop probability of a channel, 0 to 1.
    channel_axis : int
        1 for channels first, -1 for channels last.
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
        As in `feature_dropout`.

    See Also
    --------
    alpha_dropout : what kept and dropped elements become.
    feature_dropout, dropout : say more about these parameters.

    Notes
    -----
    Kept for backward: a bit per channel and sample, or nothing. Source: Klambauer et al., NeurIPS 2017.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> y, mask = fd.feature_alpha_dropout(np.zeros((2, 2, 3)), 0.5, rng=4)
    >>> y[:, :, 0].round(4)
    array([[-0.7792, -0.7792],
           [ 0.7792,  0.7792]])
    """
    return drop("x", x, p, _mask_shape_of_features(channel_axis), "alpha", (training, store, rng, out), part)


@overload
def variational_dropout(
    x: SameArray, p: float, time_axis: int, *, store: Literal["bits"] = ..., **options: Unpack[ScaledOptions]
) -> tuple[SameArray, PackedMask | MaybeNone]: ...
@overload
def variational_dropout(
    x: SameArray, p: float, time_axis: int, *, store: Literal["seed"], **options: Unpack[ScaledOptions]
) -> tuple[SameArray, SeededMask | MaybeNone]: ...
@overload
def variational_dropout(
    x: ArrayLike, p: float, time_axis: int, *, store: str = ..., **options: Unpack[ScaledOptions]
) -> tuple[Array, Any]: ...
def variational_dropout(
    x: Any,
    p: float,
    time_axis: int,
    *,
    training: bool = True,
    scaling: str = "inverted",
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Any, BitMask | None]:
    """Returns x with the same units dropped at all time steps, and the mask: locked dropout.

    A new mask at each step of a recurrent network would disturb its memory. `dropout_backward` is the gradient.

    Parameters
    ----------
    x : array_like of a float dtype, any shape ``(*)``, such as ``(T, B, F)``
    p : float
        Drop probability, 0 to 1; 0.2 to 0.5 is usual.
    time_axis : int
        The axis along which elements share a decision.
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
    y : ndarray like x
        out if it is given.
    mask : PackedMask, SeededMask or None
        What `dropout_backward` needs; None if nothing was dropped.

    Raises
    ------
    TypeError, ValueError
        As in `dropout`. TypeError or ValueError if x does not have the time_axis.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per element of one step, or nothing. Source: Gal and Ghahramani, NeurIPS 2016.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> y, mask = fd.variational_dropout(np.ones((3, 1, 4)), 0.5, 0, rng=4)
    >>> y[:, 0]
    array([[0., 0., 2., 2.],
           [0., 0., 2., 2.],
           [0., 0., 2., 2.]])
    """

    def mask_shape_of(shape: Shape) -> Shape:
        return variants.shared_cells(shape, checks.axis("time_axis", time_axis, len(shape)))

    return drop("x", x, p, mask_shape_of, checks.scaling(scaling), (training, store, rng, out), part)


@overload
def stochastic_depth(
    x: SameArray,
    p: float,
    mode: Literal["row", "batch"],
    *,
    store: Literal["bits"] = ...,
    **options: Unpack[ScaledOptions],
) -> tuple[SameArray, PackedMask | MaybeNone]: ...
@overload
def stochastic_depth(
    x: SameArray, p: float, mode: Literal["row", "batch"], *, store: Literal["seed"], **options: Unpack[ScaledOptions]
) -> tuple[SameArray, SeededMask | MaybeNone]: ...
@overload
def stochastic_depth(
    x: ArrayLike, p: float, mode: Literal["row", "batch"], *, store: str = ..., **options: Unpack[ScaledOptions]
) -> tuple[Array, Any]: ...
def stochastic_depth(
    x: Any,
    p: float,
    mode: str,
    *,
    training: bool = True,
    scaling: str = "inverted",
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Any, BitMask | None]:
    """Returns x, the output of a residual branch, with whole samples dropped: stochastic depth, also called DropPath.

    `dropout_backward` is the gradient.

    Parameters
    ----------
    x : array_like of a float dtype, ``(N, *)``
    p : float
        Drop probability of the branch, 0 to 1.
    mode : {"row", "batch"}
        "row" decides for each sample, "batch" once for all samples.
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
    y : ndarray like x
        out if it is given.
    mask : PackedMask, SeededMask or None
        What `dropout_backward` needs; None if nothing was dropped.

    Raises
    ------
    TypeError, ValueError
        As in `dropout`. ValueError for another mode, or if x has no axes.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per sample, or nothing. Source: Huang et al., ECCV 2016, whose scaling is "standard".

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> y, mask = fd.stochastic_depth(np.ones((4, 2)), 0.5, "row", rng=4)
    >>> y[:, 0]
    array([0., 0., 2., 2.])
    """
    checks.choice("mode", mode, checks.DEPTH_MODES)

    def mask_shape_of(shape: Shape) -> Shape:
        checks.at_least("x", len(shape), 1, "an axis of samples")
        return variants.sample_cells(shape, mode)

    return drop("x", x, p, mask_shape_of, checks.scaling(scaling), (training, store, rng, out), part)


def _mask_shape_of_features(channel_axis: int) -> Callable[[Shape], Shape]:
    def mask_shape_of(shape: Shape) -> Shape:
        checks.at_least("x", len(shape), 2, "at least two axes")
        return variants.feature_cells(shape, checks.axis("channel_axis", channel_axis, len(shape)))

    return mask_shape_of

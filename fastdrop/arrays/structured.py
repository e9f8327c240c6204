"""The NumPy API of dropout that keeps or drops whole structures: channels, time sequences, samples, blocks.

The functions here are public. Each differs from `dropout` in the shape of its mask only, which has 1 on the axes along
which elements share a decision; `drop_block` widens its mask after the draw as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

from numpy.typing import ArrayLike

from ..core import checks, variants
from ..core.mask import PackedMask, SeededMask, packed_mask
from ..core.part import Part, Parts, check_uncut, parts_of, runs
from ..core.random import State, check_random_state, random_state, threshold_and_scale
from .array_ops import ArrayOps, Shape
from .masking import array_ops, copy_to_output, drop, masked
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
    training, scaling, store, rng, out, part
        As in `dropout`, with the same errors; TypeError or ValueError if x does not have the channel_axis.

    Kept for backward: a bit per channel and sample, or nothing. Source: Tompson et al., CVPR 2015.

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

    Parameters, errors and memory kept are those of these two functions. Source: Klambauer et al., NeurIPS 2017.

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
    training, scaling, store, rng, out, part
        As in `dropout`, with the same errors; TypeError or ValueError if x does not have the time_axis.

    Kept for backward: a bit per element of one step, or nothing. Source: Gal and Ghahramani, NeurIPS 2016.

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
    training, scaling, store, rng, out, part
        As in `dropout`, with the same errors; ValueError for another mode, or if x has no axes.

    Kept for backward: a bit per sample, or nothing. Source: Huang et al., ECCV 2016, whose scaling is "standard".

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


@overload
def drop_block(
    x: SameArray, p: float, block_size: int | tuple[int, ...], **options: Unpack[CommonOptions]
) -> tuple[SameArray, PackedMask | MaybeNone]: ...
@overload
def drop_block(
    x: ArrayLike, p: float, block_size: int | tuple[int, ...], **options: Unpack[CommonOptions]
) -> tuple[Array, PackedMask | MaybeNone]: ...
def drop_block(
    x: Any,
    p: float,
    block_size: int | tuple[int, ...],
    *,
    training: bool = True,
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Any, PackedMask | None]:
    """Returns x with blocks of neighbouring cells dropped in each channel, scaled by cells / cells kept.

    A block is drawn at each place where it fits, with the probability that would drop a share p of the cells if blocks
    did not overlap. Because they overlap, less is dropped: 0.093 for p = 0.1, 0.38 for 0.5 and 0.57 for 0.9 (blocks of
    7 x 7 on 56 x 56); at p = 1 everything is. `dropout_backward` is the gradient.

    Parameters
    ----------
    x : array_like of a float dtype, ``(N, C, *)`` with one to three spatial axes
    p : float
        The share of cells to drop if blocks did not overlap, 0 to 1; 0.1 is usual.
    block_size : int or tuple of int
        The extent of a block on each spatial axis; a block longer than the axis is shortened to it. 1 is dropout of
        elements.
    training, rng, out, part
        As in `dropout`, with the same errors; TypeError or ValueError if block_size does not fit or x has another
        number of axes. A part has the spatial axes whole. Its scale is the whole's, so the call also draws the whole's
        mask, in memory too, to count its kept cells.

    Kept for backward: a bit per element. For an array on a GPU the call waits, to count the kept cells. Source: Ghiasi
    et al., NeurIPS 2018.

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
    ops = array_ops(x)
    source, tag = ops.as_array("x", x)
    p = checks.probability(p)
    shape = tuple(source.shape)
    checks.check_spatial_axes("x", len(shape))
    sizes = checks.block_size(block_size, len(shape) - 2)
    plan = variants.blocks(shape, p, sizes)
    parts = None if part is None else parts_of(part, shape)
    check_uncut(parts, 2, "the spatial axes, along which blocks reach")
    threshold, _ = threshold_and_scale(plan.gamma)
    if not training or threshold == 0:
        check_random_state(rng)
        return masked("x", x, None, out), None
    y = ops.output_array(out, source, "x")
    kernel_x, kernel_y = ops.kernel_arrays(source, y, shape)
    own = whole = _BlockMask(ops, source, shape, plan)
    if parts is not None:
        whole = _BlockMask(ops, source, parts[0].shape, variants.blocks(parts[0].shape, p, sizes))
    state = random_state(rng)
    words = own.draw(state, threshold, parts)
    counted = words if whole is own else whole.draw(state, threshold)
    kept = ops.kept_count(counted) if whole.cells else 0
    mask = packed_mask(words, shape, p, whole.cells / kept if kept else 0.0, parts)
    ops.apply_mask(tag, kernel_x, kernel_y, words, shape, (mask.scale, 0.0, 0.0))
    return copy_to_output(ops, kernel_y, y, out), mask


class _BlockMask:
    """DropBlock's mask of an array of a shape. Its memory is allocated before a random state is taken."""

    def __init__(self, ops: ArrayOps, like: Any, shape: Shape, plan: variants.Blocks) -> None:
        self.ops, self.like, self.plan = ops, like, plan
        self.cells = math.prod(shape)
        self.seeds = math.prod(plan.seeds) if self.cells else 0
        self.words = ops.empty_words(like, self.seeds)
        widened = [outer * (n + block - 1) * inner for outer, n, inner, block in plan.passes if self.cells]
        self.buffers = [ops.empty_words(like, cells) for cells in widened]

    def draw(self, state: State, threshold: int, parts: Parts | None = None) -> Any:
        """The words of the mask."""
        cells_of = None if parts is None else runs(tuple(self.seeds_of(part) for part in parts), self.plan.seeds)
        self.ops.draw_words(self.words, self.like, self.seeds, state, threshold, cells_of)
        return self.ops.widen_blocks(self.words, self.buffers, self.plan.passes) if self.cells else self.words

    def seeds_of(self, part: Part) -> Part:
        """The part of the seeds of the whole."""
        places = self.plan.seeds[2:]
        return Part(part.shape[:2] + places, part.start, part.local[:2] + places)


def _mask_shape_of_features(channel_axis: int) -> Callable[[Shape], Shape]:
    def mask_shape_of(shape: Shape) -> Shape:
        checks.at_least("x", len(shape), 2, "at least two axes")
        return variants.feature_cells(shape, checks.axis("channel_axis", channel_axis, len(shape)))

    return mask_shape_of

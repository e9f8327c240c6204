"""The NumPy API of DropBlock, which widens its mask after the draw."""

from __future__ import annotations

import math
from typing import Any, Unpack, overload

from numpy.typing import ArrayLike

from ..core import checks, variants
from ..core.mask import PackedMask, packed_mask
from ..core.part import Part, Parts, check_uncut, parts_of, runs
from ..core.random import State, check_random_state, random_state, threshold_and_scale
from .array_ops import ArrayOps, Shape
from .masking import array_ops, copy_to_output, masked
from .signatures import AnyArray, Array, CommonOptions, MaybeNone, PartOfWhole, RandomState, SameArray


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
    training : bool
        False drops nothing.
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
    mask : PackedMask or None
        What `dropout_backward` needs; None if nothing was dropped.

    Raises
    ------
    TypeError, ValueError
        As in `dropout`, and if block_size does not fit or x has another number of axes.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    A part has the spatial axes whole. Its scale is the whole's, so the call also draws the whole's mask, in memory too,
    to count its kept cells.

    Kept for backward: a bit per element. For an array on a GPU the call waits, to count the kept cells. Source: Ghiasi
    et al., NeurIPS 2018.

    Examples
    --------
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

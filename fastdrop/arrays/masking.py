"""What the ops of the NumPy API do with a mask: draw and apply a new one, or apply one that exists.

`dropout.py` and `structured.py` call `drop` and `masked`; `saved.py` calls `masked` for gradients. An op makes three
choices: the shape of the mask (which elements share a decision), the draw, and the coefficients (what becomes of kept
and dropped elements). `fastdrop.core.variants` has the choices of each kind of dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..core import checks, variants
from ..core.mask import GaussianNoise, PackedMask, SeededMask, packed_mask, seeded_mask
from ..core.part import Parts, first_cell, parts_of, parts_of_mask, runs
from ..core.random import DROP_ALL, State, check_random_state, random_state, threshold_and_scale
from .array_ops import ArrayOps, Shape
from .device import DEVICE, is_on_device
from .host import HOST
from .signatures import AnyArray, BitMask, Mask, RandomState

Options = tuple[bool, str, RandomState, AnyArray | None]  # training, store, rng, out


def array_ops(x: Any) -> ArrayOps:
    """The operations for the memory that x lies in."""
    return DEVICE if type(x) is not np.ndarray and is_on_device(x) else HOST


def drop(
    name: str,
    given: Any,
    p: Any,
    mask_shape_of: Callable[[Shape], Shape] | None,
    scaling: str,
    options: Options,
    part: Any = None,
) -> tuple[Any, BitMask | None]:
    """Draws a mask and applies it: the whole of an op that keeps or drops elements.

    ``mask_shape_of`` gives the mask's shape for the data's shape; None means a decision for each element. ``options``
    are the arguments that all ops have: training, store, rng, out. (A plain tuple: a small call has little else to do.)
    ``part`` says of which whole x is a part. The mask's shape then follows from the whole's, because a part may have an
    extent of 1 along an axis that shares nothing.
    """
    training, store, rng, out = options
    ops = array_ops(given)
    x, tag = ops.as_array(name, given)
    p = checks.probability(p)
    if type(store) is not str or store != "bits":
        checks.choice("store", store, checks.STORES)
    shape = tuple(x.shape)
    parts = None
    if part is not None:
        parts, mask_shape = _parts_of_mask(part, shape, mask_shape_of)
    else:
        mask_shape = shape if mask_shape_of is None else mask_shape_of(shape)
    threshold, _ = threshold_and_scale(p)
    if not training or threshold == 0:
        check_random_state(rng)
        if scaling == "standard" and threshold:
            return masked(name, given, _scale_everything(ops, x, 1.0 - threshold / DROP_ALL), out), None
        return masked(name, given, None, out), None
    # All memory is allocated before the random state is taken, so a call that runs out of memory draws nothing.
    y = ops.output_array(out, x, name)
    coefficients = variants.affine(scaling, threshold)
    cells = math.prod(mask_shape)
    first = _first_if_drawn_at_once(shape, mask_shape, threshold, parts)
    words: Any = ops.empty_words(x, cells) if store == "bits" or first is None else None
    kernel_x, kernel_y = ops.kernel_arrays(x, y, mask_shape)
    state = random_state(rng)
    if first is not None:
        ops.dropout_forward(tag, kernel_x, kernel_y, words, state, threshold, coefficients, first)
    else:
        ops.draw_words(words, x, cells, state, threshold, None if parts is None else runs(parts, mask_shape))
        ops.apply_mask(tag, kernel_x, kernel_y, words, mask_shape, coefficients)
    y = copy_to_output(ops, kernel_y, y, out)
    if store == "seed":
        return y, seeded_mask(state, mask_shape, p, coefficients.scale, threshold, parts)
    return y, packed_mask(words, mask_shape, p, coefficients.scale, parts)


def masked(name: str, given: Any, mask: Mask | None, out: AnyArray | None) -> Any:
    """x under an existing mask: times the mask's scale where kept, 0 where dropped. None changes nothing."""
    ops = array_ops(given)
    x, tag = ops.as_array(name, given)
    if mask is None:
        if out is None:
            return given if ops.on_device or isinstance(given, np.ndarray) else x
        y = ops.output_array(out, x, name)
        return copy_to_output(ops, x, y, out)
    if not isinstance(mask, (PackedMask, SeededMask, GaussianNoise)):
        raise TypeError(
            f"mask must be a PackedMask, a SeededMask, a GaussianNoise or None, but got {type(mask).__name__}"
        )
    words = mask.words if isinstance(mask, PackedMask) else None
    if words is not None:
        ops.check_mask_memory(name, words)
    mask_shape = mask.shape
    if mask_shape != x.shape:
        checks.check_mask_shape(name, tuple(x.shape), mask_shape, shared=not isinstance(mask, GaussianNoise))
    y = ops.output_array(out, x, name)
    if out is not None and words is not None:
        ops.check_no_overlap(y, words, "mask")
    kernel_x, kernel_y = ops.kernel_arrays(x, y, mask_shape)
    if isinstance(mask, GaussianNoise):
        cells_of = None if mask.parts is None else runs(mask.parts, mask_shape)
        ops.gaussian_multiply(tag, kernel_x, kernel_y, (mask.seed, mask.offset), variants.spread(mask.p), cells_of)
    elif (
        isinstance(mask, SeededMask)
        and (first := _first_if_drawn_at_once(tuple(x.shape), mask_shape, mask.threshold, mask.parts)) is not None
    ):
        state, coefficients = (mask.seed, mask.offset), (mask.scale, 0.0, 0.0)
        ops.dropout_forward(tag, kernel_x, kernel_y, None, state, mask.threshold, coefficients, first)
    else:
        words = mask_words(ops, mask, x) if words is None else words
        ops.apply_mask(tag, kernel_x, kernel_y, words, mask_shape, (mask.scale, 0.0, 0.0))
    return copy_to_output(ops, kernel_y, y, out)


def mask_words(ops: ArrayOps, mask: BitMask, like: Any) -> Any:
    """The mask's words, drawn again if the mask has only its random state."""
    if isinstance(mask, PackedMask):
        return mask.words
    return _new_words(ops, like, mask.shape, (mask.seed, mask.offset), mask.threshold, mask.parts)


def _first_if_drawn_at_once(shape: Shape, mask_shape: Shape, threshold: int, parts: Parts | None) -> int | None:
    """The mask's first cell if one primitive can draw the mask and apply it, otherwise None."""
    if mask_shape != shape or not 0 < threshold < DROP_ALL or 0 in shape:
        return None
    return 0 if parts is None else first_cell(parts, shape)


def _parts_of_mask(part: Any, shape: Shape, mask_shape_of: Callable[[Shape], Shape] | None) -> tuple[Parts, Shape]:
    """The parts of x as parts of its mask, which has 1 on axes that share decisions, and the mask's shape."""
    parts = parts_of(part, shape)
    if mask_shape_of is None:
        return parts, shape
    whole = parts[0].shape
    shared = [cells != extent for cells, extent in zip(mask_shape_of(whole), whole, strict=True)]
    return parts_of_mask(parts, shape, shared)


def copy_to_output(ops: ArrayOps, result: Any, y: Any, out: Any) -> Any:
    """Copies a result to the array that the caller expects it in, and returns that array: ``out`` itself if given."""
    if result is not y:
        ops.copy_into(y, result)
    return y if out is None else out


def _scale_everything(ops: ArrayOps, x: Any, scale: float) -> PackedMask:
    """A mask of one cell for all of x, which keeps and scales."""
    words = _new_words(ops, x, (1,), (0, 0), 0 if scale else DROP_ALL)
    return packed_mask(words, (1,) * len(x.shape), 0.0, scale)


def _new_words(ops: ArrayOps, like: Any, shape: Shape, state: State, threshold: int, parts: Parts | None = None) -> Any:
    cells = math.prod(shape)
    words = ops.empty_words(like, cells)
    ops.draw_words(words, like, cells, state, threshold, None if parts is None else runs(parts, shape))
    return words

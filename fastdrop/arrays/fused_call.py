"""One call of a fused op: its arguments checked, its mask drawn, its primitive run.

Each function of `fused.py` makes a `FusedCall` and calls `pointwise`, `norm` or `softmax` on it, after the family of
primitives that computes the op. Everything is checked before a random number is taken or a result is written. A call
gets the mask that plain `dropout` would draw with the same random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..core import checks
from ..core.activations import NONE, keeps_input, keeps_signs
from ..core.mask import packed_mask, seeded_mask
from ..core.part import check_uncut, parts_of, runs
from ..core.random import check_random_state, random_state, threshold_and_scale
from .array_ops import (
    FLOAT32,
    DeferredDraw,
    Shape,
    compute_dtype,
    dtype_tags,
    rows_and_columns,
)
from .masking import array_ops, copy_to_output
from .saved import Gradients, SavedNorm, SavedPointwise, SavedSoftmax, SoftmaxGradients
from .signatures import Array, BitMask, PartOfWhole, RandomState

Vector = tuple[Any, Any]  # an element for each column, and the dtype that it was given in
NO_VECTOR: Vector = (None, None)
Options = tuple[bool, str, RandomState, PartOfWhole]  # training, store, rng, part


class FusedCall:
    """The arguments that all fused ops have in common, checked."""

    def __init__(self, op: str, given: Any, name: str, p: Any, options: Options) -> None:
        training, store, rng, part = options
        self.op, self.name, self.store, self.rng = op, name, store, rng
        self.ops = array_ops(given)
        self.x, _ = self.ops.as_array(name, given)
        self.p = checks.probability(p)
        if type(store) is not str or store != "bits":
            checks.choice("store", store, checks.STORES)
        self.threshold, self.scale = threshold_and_scale(self.p if training else 0.0)
        self.shape: Shape = tuple(self.x.shape)
        self.dtype: np.dtype[Any] = self.x.dtype
        self.rows, self.columns = rows_and_columns(self.shape)
        self.cells = self.rows * self.columns
        self.parts = None if part is None else parts_of(part, self.shape)

    # ---- the families of ops ----

    def pointwise(
        self,
        gradients: Callable[..., Gradients],
        out: Any,
        *,
        bias: Vector = NO_VECTOR,
        multiplier: Any = None,
        residual: Any = None,
        activation: int = NONE,
    ) -> tuple[Array, SavedPointwise[Gradients]]:
        """``residual + dropout(act(x + bias) * multiplier)``; what is None is left out."""
        ops = self.ops
        if residual is None:
            y = self.output(out, self.name, self.x, up=multiplier)
        else:
            y = self.output(out, "residual", residual, x=self.x)
        x, multiplier, residual = ops.as_contiguous(self.x), ops.as_contiguous(multiplier), ops.as_contiguous(residual)
        input_bias, bias_dtype = ops.copy_if_overlapping(bias[0], y), bias[1]
        kept_x = kept_multiplier = kept_bias = None
        if keeps_input(activation, multiplier is not None):
            kept_x, kept_multiplier = ops.copy_if_overlapping(x, y), ops.copy_if_overlapping(multiplier, y)
            kept_bias = input_bias
        y_buffer = ops.output_buffer(y)
        signs = ops.empty_words(x, self.cells) if keeps_signs(activation, multiplier is not None) else None
        arrays = (x, input_bias, multiplier, residual), (y_buffer, signs)
        mask = self.forward("pointwise_forward", (self.dtype, y.dtype), *arrays, self.scale, activation)
        result = copy_to_output(ops, y_buffer, y, out)
        if signs is not None:
            mask = packed_mask(signs, self.shape, self.p if self.threshold else 0.0, self.scale, self.parts)
            activation = NONE
        common = self.op, mask, gradients, self.shape, self.dtype
        kept = kept_x, kept_multiplier, kept_bias, bias_dtype
        return result, SavedPointwise(*common, y.dtype, activation, *kept)

    def norm(
        self,
        gradients: Callable[..., Gradients],
        residual: Any,
        vectors: dict[str, Any],
        eps: Any,
        centred: bool,
    ) -> tuple[Array, Array, SavedNorm[Gradients]]:
        """The layer norm (``centred``) or RMS norm of ``residual + dropout(x + x_bias)``, and that sum."""
        ops = self.ops
        checks.at_least(self.name, len(self.shape), 1, "an axis of columns")
        check_uncut(self.parts, -1, "the last axis, which is normalised as a whole")
        given = {
            name: self.vector(name, value, is_saved=name == "weight")
            for name, value in vectors.items()
            if value is not None
        }
        residual = None if residual is None else ops.as_contiguous(self.residual(residual))
        eps = checks.number_from("eps", eps, 0)
        x = ops.as_contiguous(self.x)
        y = ops.empty(x, self.shape, self.dtype)
        residual_out = ops.empty(x, self.shape, self.dtype if residual is None else residual.dtype)
        statistics = ops.empty(x, (self.rows, 2), compute_dtype(self.dtype))
        weight, norm_bias, input_bias = (given.get(name, NO_VECTOR)[0] for name in ("weight", "bias", "x_bias"))
        arrays = (x, input_bias, residual), (weight, norm_bias, y, residual_out, statistics)
        dtypes = self.dtype, residual_out.dtype
        mask = self.forward("norm_forward", dtypes, *arrays, self.scale, eps, int(centred))
        common = self.op, mask, gradients, self.shape, self.dtype
        vector_dtypes = {name: dtype for name, (_, dtype) in given.items()}
        has_residual = residual is not None
        saved = SavedNorm(*common, residual_out, statistics, weight, centred, vector_dtypes, has_residual)
        return y, residual_out, saved

    def softmax(self, softmax_scale: Any, attn_mask: Any, causal: bool, out: Any) -> tuple[Array, SavedSoftmax]:
        """``dropout(softmax(softmax_scale * x + attn_mask))`` over the last axis."""
        ops = self.ops
        checks.at_least(self.name, len(self.shape), 1 + bool(causal), "queries and keys" if causal else "keys")
        check_uncut(self.parts, -1, "the last axis, whose softmax is of all keys")
        if causal:
            check_uncut(self.parts, -2, "the axis of queries, which causal counts: give an attn_mask instead")
        softmax_scale = checks.finite("scale", softmax_scale)
        additive, strides = self.additive_mask(attn_mask)
        y = self.output(out, self.name, self.x)
        x = ops.as_contiguous(self.x)
        additive = ops.copy_if_overlapping(additive, y)
        y_buffer = ops.output_buffer(y)
        probabilities = ops.empty(x, self.shape, self.dtype) if self.threshold else None
        heads, queries = (1, 1, *self.shape)[-3:-1]
        numbers = heads, queries, *strides, softmax_scale, self.scale, int(bool(causal))
        mask = self.forward("softmax_forward", (self.dtype,), (x, additive), (probabilities, y_buffer), *numbers)
        result = copy_to_output(ops, y_buffer, y, out)
        common = self.op, mask, SoftmaxGradients, self.shape, self.dtype
        return result, SavedSoftmax(*common, y if probabilities is None else probabilities, softmax_scale)

    def forward(
        self,
        primitive: str,
        dtypes: tuple[Any, ...],
        arrays_before: tuple[Any, ...],
        arrays_after: tuple[Any, ...],
        *numbers: float,
    ) -> BitMask | None:
        """Draws the mask and runs a primitive, whose parameters have the mask's words between the two groups of arrays.

        If nothing is to be dropped, the mask is None and no random number is taken.
        """
        words: Any = None
        draw: DeferredDraw | None = None
        mask: BitMask | None = None
        if self.threshold == 0:
            check_random_state(self.rng)
        else:
            words = self.ops.empty_words(self.x, self.cells)  # allocated before a random number is taken
            state = random_state(self.rng)
            cells_of = None if self.parts is None else runs(self.parts, self.shape)
            draw = self.ops.draw_or_defer(words, self.x, self.cells, state, self.threshold, cells_of)
            if self.store == "seed":
                mask = seeded_mask(state, self.shape, self.p, self.scale, self.threshold, self.parts)
            else:
                mask = packed_mask(words, self.shape, self.p, self.scale, self.parts)
        if self.cells:
            arrays = *arrays_before, words, *arrays_after
            self.ops.run_primitive(primitive, dtype_tags(*dtypes), arrays, (self.rows, self.columns, *numbers), draw)
        return mask

    # ---- the other arguments ----

    def as_array(self, name: str, value: Any) -> Any:
        """Another argument as an array, which must lie in the same kind of memory as x."""
        checks.check_same_memory(name, array_ops(value).on_device, self.name, self.ops.on_device)
        return self.ops.as_array(name, value)[0]

    def like_x(self, name: str, value: Any, *wider: np.dtype[Any]) -> Any:
        """Another argument of x's shape, and of x's dtype or one of ``wider``."""
        array = self.as_array(name, value)
        checks.fits(name, array, self.name, self.shape, self.dtype, *wider)
        return array

    def residual(self, value: Any) -> Any:
        """The residual, which may be float32 beside x of 16 bits."""
        return self.like_x("residual", value, *((FLOAT32,) if self.dtype.itemsize == 2 else ()))

    def vector(self, name: str, value: Any, is_saved: bool = False) -> Vector:
        """An argument with an element for each column, as kernels accept it, and the dtype of its gradient.

        What is saved for backward is copied, because optimisers change weights and biases in place.
        """
        array = self.as_array(name, value)
        checks.at_least(self.name, len(self.shape), 1, "an axis of columns")
        checks.per_column(name, tuple(array.shape), self.name, self.columns)
        vector = self.ops.cast(name, array, compute_dtype(self.dtype))
        return self.ops.copy_if_overlapping(vector, array) if is_saved else vector, array.dtype

    def output(self, out: Any, name: str, like: Any, **others: Any) -> Any:
        """``out``, or a new array, for a result like an input of this name; ``others`` are inputs too, or None."""
        if out is None:
            return self.ops.empty(like, self.shape, like.dtype)
        y = self.ops.output_array(out, like, name)
        for other, array in others.items():
            if array is not None:
                self.ops.check_no_overlap(y, array, other)
        return y

    def additive_mask(self, value: Any) -> tuple[Any, tuple[int, ...]]:
        """attn_mask as numbers to add, and its strides along the axes before heads, along heads and along queries.

        Axes of heads and queries that the mask shares stay shared: their stride is 0. The axes before them are copied
        in full unless the mask shares all of them.
        """
        if value is None:
            return None, (0, 0, 0)
        name = "attn_mask"
        checks.check_same_memory(name, array_ops(value).on_device, self.name, self.ops.on_device)
        mask = self.ops.as_attention_mask(name, value)
        checks.broadcasts(name, tuple(mask.shape), self.name, self.shape)
        full = (*(1,) * (3 - len(self.shape)), *self.shape)
        given = (*(1,) * (len(full) - len(mask.shape)), *mask.shape)
        lead = full[:-3] if math.prod(given[:-3]) > 1 else given[:-3]
        shape = (*lead, *given[-3:-1], self.columns)
        heads, queries = given[-3:-1]
        query_stride = self.columns
        head_stride = query_stride * queries
        outer_stride = head_stride * heads
        additive = self.ops.as_additive_mask(name, mask, shape, compute_dtype(self.dtype))
        strides = (math.prod(lead), outer_stride), (heads, head_stride), (queries, query_stride)
        return additive, tuple(stride if extent > 1 else 0 for extent, stride in strides)

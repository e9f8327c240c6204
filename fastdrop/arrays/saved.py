"""What a fused op keeps for its backward pass, and that backward pass.

`fused_call.py` makes these objects; users get one as the last result of each op in `fused.py` and call its
``backward``. For example, `dropout_add` keeps its mask only, and `swiglu_dropout` keeps the mask and both inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from ..core import checks, variants
from ..core.mask import PackedMask
from .array_ops import ArrayOps, Shape, compute_dtype, dtype_tags, rows_and_columns
from .masking import array_ops, mask_words, masked
from .signatures import Array, ArrayArgument, BitMask, MaybeNone

# A gradient that may be None is None if its argument was not given.


class DropoutAddGradients(NamedTuple):
    x: Array
    residual: Array


class BiasDropoutAddGradients(NamedTuple):
    x: Array
    bias: Array
    residual: Array


class BiasActGradients(NamedTuple):
    x: Array
    bias: Array | MaybeNone


class GatedGradients(NamedTuple):
    gate: Array
    up: Array


class LayerNormGradients(NamedTuple):
    x: Array
    residual: Array | MaybeNone
    weight: Array | MaybeNone
    bias: Array | MaybeNone
    x_bias: Array | MaybeNone


class RmsNormGradients(NamedTuple):
    x: Array
    residual: Array | MaybeNone
    weight: Array | MaybeNone
    x_bias: Array | MaybeNone


class SoftmaxGradients(NamedTuple):
    scores: Array


Gradients = TypeVar("Gradients")


@dataclass(frozen=True, repr=False, eq=False)
class Saved(Generic[Gradients]):
    """What a fused op keeps for its backward pass. Fused ops return it; it is not made directly.

    Attributes
    ----------
    op : str
        The name of the op.
    mask : PackedMask, SeededMask or None
        None if nothing was dropped.
    nbytes : int
        The number of bytes kept.

    Notes
    -----
    Data arrays are kept without a copy where that is possible. Do not change those that the op's documentation names
    until the last call of ``backward``; it may be called more than once. Weights and biases are copied, so they may
    change.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> y, saved = fd.dropout_add(np.ones((2, 3)), np.zeros((2, 3)), 0.5, rng=4)
    >>> saved
    Saved(op='dropout_add', shape=(2, 3), keeps=('mask',), nbytes=4)
    """

    op: str
    mask: BitMask | None
    _gradients: Callable[..., Gradients]
    _shape: Shape
    _dtype: np.dtype[Any]  # of x

    def backward(self, dy: ArrayArgument) -> Gradients:
        """Returns the gradients of the op's array arguments.

        Parameters
        ----------
        dy : array_like of the shape and dtype of the op's result
            The gradient of the result. A norm also takes ``dresidual``, the gradient of residual_out, or None if only
            the norm was used.

        Returns
        -------
        NamedTuple of ndarray
            The gradient of each array argument, under the argument's name; None for an argument that was not given.

        Raises
        ------
        TypeError, ValueError
            If a gradient does not have the dtype and shape of its result.
        """
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes kept for backward."""
        bits = 0 if self.mask is None else self.mask.nbytes
        return bits + sum(int(array.nbytes) for array in self._kept().values())

    def __repr__(self) -> str:
        keeps = (*(() if self.mask is None else ("mask",)), *self._kept())
        return f"Saved(op={self.op!r}, shape={self._shape}, keeps={keeps}, nbytes={self.nbytes})"

    def _arrays(self) -> dict[str, Any]:
        """The arrays that may be kept besides the mask, by name; None for one that is not."""
        raise NotImplementedError

    def _kept(self) -> dict[str, Any]:
        return {name: array for name, array in self._arrays().items() if array is not None}

    def _check_gradient(self, name: str, given: Any, result: str, dtype: np.dtype[Any]) -> tuple[ArrayOps, Any]:
        """A gradient as an array, checked against the result that it is the gradient of; and its operations."""
        ops, kept = array_ops(given), self._kept()
        if isinstance(self.mask, PackedMask):
            kept["mask"] = self.mask.words
        for kept_name, array in kept.items():
            checks.check_same_memory(name, ops.on_device, kept_name, array_ops(array).on_device)
        gradient, _ = ops.as_array(name, given)
        checks.fits(name, gradient, result, self._shape, dtype)
        return ops, gradient

    def _words(self, ops: ArrayOps, dy: Any) -> Any:
        return None if self.mask is None else mask_words(ops, self.mask, dy)

    def _scale(self) -> float:
        return 1.0 if self.mask is None else self.mask.scale

    def _named(self, by_name: dict[str, Any]) -> Gradients:
        return self._gradients(*(by_name.get(name) for name in self._gradients._fields))  # type: ignore[attr-defined]


@dataclass(frozen=True, repr=False, eq=False)
class SavedPointwise(Saved[Gradients]):
    """What an elementwise op keeps; see `Saved`."""

    _residual_dtype: np.dtype[Any]
    _activation: int  # NONE after relu, whose mask already has the signs
    _x: Any  # x, multiplier and bias are None if the mask is enough for the gradient
    _multiplier: Any
    _bias: Any
    _bias_dtype: np.dtype[Any] | None  # None if the op had no bias

    def backward(self, dy: ArrayArgument) -> Gradients:
        ops, given = self._check_gradient("dy", dy, "the result", self._residual_dtype)
        if self._x is None and self._bias_dtype is None and self._dtype == self._residual_dtype:  # as plain dropout
            dx = given if self.mask is None else masked("dy", ops.as_contiguous(given), self.mask, None)
            return self._named({"x": dx, "residual": given})
        g = ops.as_contiguous(given)
        rows, columns = rows_and_columns(self._shape)
        dx = ops.empty(g, self._shape, self._dtype)
        dmultiplier = None if self._multiplier is None else ops.empty(g, self._shape, self._dtype)
        sums = None if self._bias_dtype is None else _panel_sums(ops, g, (columns,), rows, self._dtype)
        if rows * columns:
            inputs = g, self._x, self._bias, self._multiplier, self._words(ops, g)
            numbers = rows, columns, variants.panels(rows), self._scale(), self._activation
            tags = dtype_tags(self._dtype, self._residual_dtype)
            ops.run_primitive("pointwise_backward", tags, (*inputs, dx, dmultiplier, sums), numbers)
        dbias = None if sums is None else _from_first_panel(ops, sums, sums[0], self._bias_dtype)
        return self._named({"x": dx, "gate": dx, "up": dmultiplier, "bias": dbias, "residual": given})

    def _arrays(self) -> dict[str, Any]:
        first = "x" if self._multiplier is None else "gate"
        return {first: self._x, "up": self._multiplier, "bias": self._bias}


@dataclass(frozen=True, repr=False, eq=False)
class SavedNorm(Saved[Gradients]):
    """What an op that ends in a norm keeps; see `Saved`."""

    _residual_out: Any
    _statistics: Any
    _weight: Any
    _centred: bool
    _vector_dtypes: dict[str, np.dtype[Any]]  # of those of weight, bias and x_bias that were given
    _has_residual: bool

    def backward(self, dy: ArrayArgument, dresidual: ArrayArgument | None = None) -> Gradients:
        """The gradients, given those of y and, unless it is None, of residual_out."""
        ops, g = self._check_gradient("dy", dy, "y", self._dtype)
        residual_dtype, dresidual_out = self._residual_out.dtype, None
        if dresidual is not None:
            _, dresidual_out = self._check_gradient("dresidual", dresidual, "residual_out", residual_dtype)
            dresidual_out = ops.as_contiguous(dresidual_out)
        g = ops.as_contiguous(g)
        rows, columns = rows_and_columns(self._shape)
        gradients = {"x": ops.empty(g, self._shape, self._dtype)}
        if self._has_residual:
            gradients["residual"] = ops.empty(g, self._shape, residual_dtype)
        sums: Any = _panel_sums(ops, g, (3, columns), rows, self._dtype) if self._vector_dtypes else None
        if rows * columns:
            inputs = g, dresidual_out, self._residual_out, self._statistics, self._weight, self._words(ops, g)
            outputs = gradients["x"], gradients.get("residual"), sums
            numbers = rows, columns, variants.panels(rows), self._scale(), int(self._centred)
            tags = dtype_tags(self._dtype, residual_dtype)
            ops.run_primitive("norm_backward", tags, (*inputs, *outputs), numbers)
        for line, name in enumerate(("weight", "bias", "x_bias")):
            if name in self._vector_dtypes:
                gradients[name] = _from_first_panel(ops, sums, sums[0][line], self._vector_dtypes[name])
        return self._named(gradients)

    def _arrays(self) -> dict[str, Any]:
        return {"residual_out": self._residual_out, "statistics": self._statistics, "weight": self._weight}


@dataclass(frozen=True, repr=False, eq=False)
class SavedSoftmax(Saved[SoftmaxGradients]):
    """What `softmax_dropout` keeps; see `Saved`."""

    _probabilities: Any
    _softmax_scale: float

    def backward(self, dy: ArrayArgument) -> SoftmaxGradients:
        ops, g = self._check_gradient("dy", dy, "the result", self._dtype)
        rows, columns = rows_and_columns(self._shape)
        dscores = ops.empty(g, self._shape, self._dtype)
        if rows * columns:
            inputs = ops.as_contiguous(g), ops.as_contiguous(self._probabilities), self._words(ops, g)
            numbers = rows, columns, self._softmax_scale, self._scale()
            ops.run_primitive("softmax_backward", dtype_tags(self._dtype), (*inputs, dscores, None), numbers)
        return self._named({"scores": dscores})

    def _arrays(self) -> dict[str, Any]:
        return {"probabilities": self._probabilities}


def _panel_sums(ops: ArrayOps, like: Any, line: Shape, rows: int, dtype: np.dtype[Any]) -> Any:
    """An array of sums over rows, with a line for each panel of rows."""
    make = ops.empty if rows * line[-1] else ops.zeros
    return make(like, (variants.panels(rows), *line), compute_dtype(dtype))


def _from_first_panel(ops: ArrayOps, sums: Any, line: Any, dtype: Any) -> Any:
    """A gradient copied out of the sums, so that it does not keep their memory alive."""
    return ops.cast("the gradient", ops.copy_if_overlapping(line, sums), dtype)

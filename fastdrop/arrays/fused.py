"""The NumPy API of the fused ops: dropout with what stands before and after it in a network, in one pass over memory.

The mask is `dropout`'s, and one primitive does the rest under its words, which it may draw itself: a fused op has the
mask of plain `dropout` with the same random state. This module owns what each op hands to its primitive and what it
keeps for backward; `host` and `device` know how arrays in memory and on a GPU get there.

Data is ``(*, columns)``, any axes before the last, any strides. Results are C-contiguous, and so are gradients but for
one that is dy itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ..core import checks, variants
from ..core.activations import ACTIVATIONS, NONE, SILU, keeps_input, keeps_signs
from ..core.mask import PackedMask, SeededMask
from ..core.random import check_random_state, random_state, threshold_and_scale
from . import device
from .dropout import Array, BitMask, RandomState, Shape, _delivered, _masked, _memory

__all__ = [
    "Saved",
    "bias_act_dropout",
    "bias_dropout_add",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "softmax_dropout",
    "swiglu_dropout",
]

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


class DropoutAddGradients(NamedTuple):
    x: Array
    residual: Array


class BiasDropoutAddGradients(NamedTuple):
    x: Array
    bias: Array
    residual: Array


class BiasActGradients(NamedTuple):
    x: Array
    bias: Array | None


class SwigluGradients(NamedTuple):
    gate: Array
    up: Array


class LayerNormGradients(NamedTuple):
    x: Array
    residual: Array | None
    weight: Array | None
    bias: Array | None
    x_bias: Array | None


class RmsNormGradients(NamedTuple):
    x: Array
    residual: Array | None
    weight: Array | None
    x_bias: Array | None


class SoftmaxGradients(NamedTuple):
    scores: Array


Gradients = TypeVar("Gradients")
Vector = tuple[Any, Any]  # an element per column, and the dtype that it was given in
NO_VECTOR: Vector = (None, None)


# ---- ops ----


def dropout_add(
    x: ArrayLike,
    residual: ArrayLike,
    p: float = 0.5,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, SavedPointwise[DropoutAddGradients]]:
    """Returns ``residual + dropout(x, p)``, and what backward needs: the end of a residual branch.

    The mask is that of ``dropout(x, p, rng=rng)``, and what is dropped adds nothing, even where x is inf or NaN.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, any shape ``(*)``, any strides
        Also an array on a GPU, of CuPy or Numba and C-contiguous; then the others must be too.
    residual : array_like of x's shape
        Of x's dtype, or float32 beside 16-bit x. The result has its dtype; the sum is rounded once.
    p : float
        Drop probability, 0 to 1; p = 1 gives the residual.
    training : bool
        False adds all of x, unscaled.
    store : {"bits", "seed"}
        Keeps 1/8 byte per element for backward, or the random state alone, from which backward draws the bits again.
    rng : None, int, Stream or numpy.random.Generator
        As in `dropout`.
    out : ndarray, optional
        Takes the result: shape and dtype of residual; residual itself, or x if it has that dtype, for in place.

    Returns
    -------
    y : ndarray like residual
    saved : Saved
        ``saved.backward(dy)`` is ``(x, residual)``: the residual's gradient is dy itself, and x's is too where nothing
        was dropped and dtypes are the same. Nothing of x or residual is kept.

    Raises
    ------
    TypeError
        dtype not in the list above, or not allowed beside x's; p not a number; rng of another type; out not an array of
        the result's dtype; arrays partly in memory and partly on a GPU.
    ValueError
        residual of another shape than x; p outside [0, 1]; unknown store; out of another shape, read-only, or
        overlapping an argument in part. Nothing is written to out then, and no random number is taken.

    Source: Vaswani et al., NeurIPS 2017, section 5.4.

    >>> import fastdrop as fd, numpy as np
    >>> x, residual = np.ones(6, np.float32), np.arange(6, dtype=np.float32)
    >>> y, saved = fd.dropout_add(x, residual, 0.5, rng=4)
    >>> y
    array([0., 1., 4., 5., 4., 7.], dtype=float32)
    >>> saved.backward(np.ones_like(y)).x
    array([0., 0., 2., 2., 0., 2.], dtype=float32)
    """
    call = _Call("dropout_add", x, "x", p, training, store, rng)
    return call.pointwise(DropoutAddGradients, out, residual=call.residual(residual))


def bias_dropout_add(
    x: ArrayLike,
    bias: ArrayLike,
    residual: ArrayLike,
    p: float = 0.5,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, SavedPointwise[BiasDropoutAddGradients]]:
    """Returns ``residual + dropout(x + bias, p)``, and what backward needs: a linear layer's bias joins the pass.

    Parameters
    ----------
    x : array_like of a float dtype, ``(*, columns)``
    bias : array_like of any float dtype, ``(columns,)``
        A Numba array on a GPU must be float32, or float64 beside float64 x, here and in the ops below.
    residual : array_like of x's shape
        Of x's dtype, or float32 beside 16-bit x. The result has its dtype.
    p, training, store, rng, out
        As in `dropout_add`, and so are the errors; ValueError for a bias of another shape or x without axes.

    Returns
    -------
    y : ndarray like residual
    saved : Saved
        ``saved.backward(dy)`` is ``(x, bias, residual)``. The bias's gradient has its dtype; it is summed in float32
        (float64 for float64) in an order that x's shape decides.

    Kept for backward: a bit per element, or nothing. Source: Vaswani et al., NeurIPS 2017, section 5.4.

    >>> import fastdrop as fd, numpy as np
    >>> x, bias, residual = np.ones((2, 3)), np.array([0.0, 1.0, 2.0]), np.zeros((2, 3))
    >>> y, saved = fd.bias_dropout_add(x, bias, residual, 0.5, rng=4)
    >>> y
    array([[0., 0., 6.],
           [2., 0., 6.]])
    >>> saved
    Saved(op='bias_dropout_add', shape=(2, 3), keeps=('mask',), nbytes=4)
    >>> saved.backward(np.ones_like(y)).bias
    array([2., 0., 4.])
    """
    call = _Call("bias_dropout_add", x, "x", p, training, store, rng)
    return call.pointwise(
        BiasDropoutAddGradients, out, vector=call.vector("bias", bias), residual=call.residual(residual)
    )


def bias_act_dropout(
    x: ArrayLike,
    bias: ArrayLike | None,
    p: float = 0.5,
    activation: str | None = "gelu",
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, SavedPointwise[BiasActGradients]]:
    """Returns ``dropout(act(x + bias), p)``, and what backward needs: the middle of a feed-forward block.

    The activations: "relu", ``max(h, 0)``; "gelu", ``h Phi(h)`` with Phi the normal distribution function; "gelu_tanh",
    ``h / 2 (1 + tanh((2 / pi) ** 1/2 (h + 0.044715 h**3)))``; "silu", ``h / (1 + exp(-h))``; None, h.

    Parameters
    ----------
    x : array_like of a float dtype, ``(*, columns)``
    bias : array_like of any float dtype, ``(columns,)``, or None
    p : float
        Drop probability, 0 to 1.
    activation : {"relu", "gelu", "gelu_tanh", "silu", None}
    training, store, rng, out
        As in `dropout_add`, and so are the errors; ValueError for another activation, a bias of another shape, or x
        without axes beside a bias. out is like x and may be x itself.

    Returns
    -------
    y : ndarray of x's shape and dtype
    saved : Saved
        ``saved.backward(dy)`` is ``(x, bias)``.

    Kept for backward: with "relu" **bits alone**, 1/8 byte per element, under either store and out of training too:
    ``saved.mask`` has the elements that were kept and positive, or NaN. With None the mask as in `dropout_add`. With
    the others that, a copy of bias, and x: itself where it is C-contiguous and the result isn't written over it, else
    a copy. Sources: Hendrycks and Gimpel, arXiv 1606.08415, 2016 (GELU, and SiLU); Vaswani et al., NeurIPS 2017.

    >>> import fastdrop as fd, numpy as np
    >>> x = np.array([[-2.0, 1.0, 2.0], [3.0, -1.0, -3.0]], np.float32)
    >>> y, saved = fd.bias_act_dropout(x, None, 0.5, "relu", rng=4)
    >>> y
    array([[0., 0., 4.],
           [6., 0., 0.]], dtype=float32)
    >>> saved.backward(np.ones_like(y)).x, saved.nbytes
    (array([[0., 0., 2.],
           [2., 0., 0.]], dtype=float32), 4)
    """
    call = _Call("bias_act_dropout", x, "x", p, training, store, rng)
    checks.choice("activation", activation, tuple(ACTIVATIONS))
    code = ACTIVATIONS[activation]
    vector = NO_VECTOR if bias is None else call.vector("bias", bias, kept=keeps_input(code))
    return call.pointwise(BiasActGradients, out, vector=vector, activation=code)


def swiglu_dropout(
    gate: ArrayLike,
    up: ArrayLike,
    p: float = 0.5,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, SavedPointwise[SwigluGradients]]:
    """Returns ``dropout(silu(gate) * up, p)``, and what backward needs: a gated feed-forward block's middle.

    ``silu(h) = h / (1 + exp(-h))``.

    Parameters
    ----------
    gate : array_like of a float dtype, any shape ``(*)``
    up : array_like of gate's shape and dtype
    p, training, store, rng, out
        As in `dropout_add`, and so are the errors. out is like gate and may be gate or up itself.

    Returns
    -------
    y : ndarray of gate's shape and dtype
    saved : Saved
        ``saved.backward(dy)`` is ``(gate, up)``.

    Kept for backward: gate and up, each itself where it is C-contiguous and the result isn't written over it, else a
    copy; and a bit per element, or nothing beside them. Source: Shazeer, arXiv 2002.05202, 2020.

    >>> import fastdrop as fd, numpy as np
    >>> gate, up = np.array([1.0, -1.0, 2.0, 0.0]), np.ones(4)
    >>> y, saved = fd.swiglu_dropout(gate, up, 0.5, rng=4)
    >>> y.round(3)
    array([0.   , 0.   , 3.523, 0.   ])
    >>> saved.backward(np.ones(4)).gate.round(3)
    array([0.   , 0.   , 2.182, 1.   ])
    """
    call = _Call("swiglu_dropout", gate, "gate", p, training, store, rng)
    return call.pointwise(SwigluGradients, out, factor=call.alike("up", up), activation=SILU)


def dropout_add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    p: float = 0.5,
    eps: float = 1e-5,
    *,
    x_bias: ArrayLike | None = None,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
) -> tuple[Array, Array, SavedNorm[LayerNormGradients]]:
    """Returns the layer norm of a residual stream after dropout, that stream, and what backward needs.

    ``residual_out = residual + dropout(x + x_bias, p)`` and, over the last axis, ``y = (residual_out - mean) /
    sqrt(variance + eps) * weight + bias``. A post-norm block goes on with y, a pre-norm block with both.

    Parameters
    ----------
    x : array_like of a float dtype, ``(*, columns)``
    residual : array_like of x's shape, or None
        Of x's dtype, or float32 beside 16-bit x. None adds nothing.
    weight, bias : array_like of any float dtype, ``(columns,)``, or None
        The norm's.
    p : float
        Drop probability, 0 to 1.
    eps : float
        At least 0.
    x_bias : array_like of any float dtype, ``(columns,)``, or None
        Added to x before dropout.
    training, store, rng
        As in `dropout_add`, and so are the errors; ValueError for weight or a bias of another shape, eps below 0, or x
        without axes.

    Returns
    -------
    y : ndarray of x's shape and dtype
    residual_out : ndarray of x's shape, and of the residual's dtype
        It is rounded first; the norm is that of its stored values, with statistics in float32 (float64 for float64).
        Backward reads it: don't give it to a later op as out.
    saved : Saved
        ``saved.backward(dy, dresidual=None)``, given the gradients of y and residual_out, is ``(x, residual, weight,
        bias, x_bias)``, with None for what was not given.

    Kept for backward: residual_out itself, two numbers per row, a copy of weight, and a bit per element, or nothing.
    Sources: Ba et al., arXiv 1607.06450, 2016; Vaswani et al., NeurIPS 2017.

    >>> import fastdrop as fd, numpy as np
    >>> x, residual = np.ones((2, 4)), np.arange(8.0).reshape(2, 4)
    >>> y, residual_out, saved = fd.dropout_add_layer_norm(x, residual, p=0.5, rng=4)
    >>> residual_out
    array([[0., 1., 4., 5.],
           [4., 7., 6., 7.]])
    >>> y.round(3)
    array([[-1.213, -0.728,  0.728,  1.213],
           [-1.633,  0.816,  0.   ,  0.816]])
    >>> gradients = saved.backward(np.eye(2, 4), dresidual=np.ones((2, 4)))
    >>> gradients.x.round(3), gradients.weight is None
    (array([[0.   , 0.   , 1.971, 2.114],
           [0.   , 2.953, 0.   , 0.   ]]), True)
    """
    call = _Call("dropout_add_layer_norm", x, "x", p, training, store, rng)
    vectors = {"weight": weight, "bias": bias, "x_bias": x_bias}
    return call.norm(LayerNormGradients, residual, vectors, eps, centred=True)


def dropout_add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike | None,
    weight: ArrayLike | None = None,
    p: float = 0.5,
    eps: float | None = None,
    *,
    x_bias: ArrayLike | None = None,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
) -> tuple[Array, Array, SavedNorm[RmsNormGradients]]:
    """Returns the RMS norm of a residual stream after dropout, that stream, and what backward needs.

    ``residual_out = residual + dropout(x + x_bias, p)`` and, over the last axis, ``y = residual_out /
    sqrt(mean(residual_out**2) + eps) * weight``.

    Parameters
    ----------
    eps : float, optional
        At least 0. None is that of the arithmetic, ``numpy.finfo(numpy.float32).eps`` or float64's, as in torch.
    x, residual, weight, p, x_bias, training, store, rng
        As in `dropout_add_layer_norm`, and so are results, what is kept and errors.

    Returns
    -------
    y, residual_out : ndarray
    saved : Saved
        ``saved.backward(dy, dresidual=None)`` is ``(x, residual, weight, x_bias)``.

    Source: Zhang and Sennrich, NeurIPS 2019.

    >>> import fastdrop as fd, numpy as np
    >>> y, residual_out, saved = fd.dropout_add_rms_norm(np.ones((1, 4)), np.ones((1, 4)), p=0.5, rng=4)
    >>> residual_out, y.round(3)
    (array([[1., 1., 3., 3.]]), array([[0.447, 0.447, 1.342, 1.342]]))
    """
    call = _Call("dropout_add_rms_norm", x, "x", p, training, store, rng)
    vectors = {"weight": weight, "x_bias": x_bias}
    eps = np.finfo(computed(call.dtype)).eps if eps is None else eps
    return call.norm(RmsNormGradients, residual, vectors, eps, centred=False)


def softmax_dropout(
    scores: ArrayLike,
    p: float = 0.5,
    scale: float = 1.0,
    attn_mask: ArrayLike | None = None,
    causal: bool = False,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: Array | None = None,
) -> tuple[Array, SavedSoftmax]:
    """Returns ``dropout(softmax(scale * scores + attn_mask), p)`` over the last axis, and what backward needs.

    Parameters
    ----------
    scores : array_like of a float dtype, ``(*, queries, keys)``, or ``(keys,)`` unless causal
    p : float
        Drop probability, 0 to 1.
    scale : float
        Finite; ``1 / sqrt(width)`` in attention.
    attn_mask : array_like that broadcasts to scores' shape, or None
        Booleans, True = takes part, or floats of any dtype that are added. It is a constant: it gets no gradient. Axes
        of queries and heads along which it is the same take no memory. A Numba array on a GPU must be of the dtype that
        is computed in, with all of the keys.
    causal : bool
        Key j takes part for query i where ``j <= i``, as torch's ``is_causal`` has it: aligned at the upper left.
    training, store, rng, out
        As in `dropout_add`, and so are the errors; ValueError for scale that isn't finite, attn_mask that doesn't
        broadcast, or scores without axes. out is like scores and may be scores itself.

    Returns
    -------
    y : ndarray of scores' shape and dtype
        A row in which no key takes part is 0.
    saved : Saved
        ``saved.backward(dy)`` is ``(scores,)``.

    Kept for backward: probabilities in scores' dtype (y itself where nothing was dropped: leave it unchanged then) and
    a bit per element, or nothing. Source: Vaswani et al., NeurIPS 2017, sections 3.2.1 and 5.4.

    >>> import fastdrop as fd, numpy as np
    >>> scores = np.log([[1.0, 1.0, 2.0], [1.0, 3.0, 4.0]])
    >>> y, saved = fd.softmax_dropout(scores, 0.5, rng=1)
    >>> y.round(3)
    array([[0.5 , 0.  , 1.  ],
           [0.  , 0.75, 0.  ]])
    >>> saved.backward(np.eye(2, 3)).scores.round(3)
    array([[ 0.375, -0.125, -0.25 ],
           [-0.094,  0.469, -0.375]])
    """
    call = _Call("softmax_dropout", scores, "scores", p, training, store, rng)
    return call.softmax(scale, attn_mask, causal, out)


# ---- what is kept ----


@dataclass(frozen=True, repr=False, eq=False)
class Saved(Generic[Gradients]):
    """What a fused op keeps for its backward pass.

    ``mask`` is a `PackedMask`, a `SeededMask` or, where nothing was dropped, None; ``nbytes`` is how many bytes are
    kept. Arrays of data are kept themselves where they can be: leave those that an op's documentation names unchanged
    until ``backward`` has run, which may be more than once. Of weights and biases copies are kept: they may change.

    ``backward(dy)`` returns a named tuple with the gradient of each array that the op was given, by the argument's
    name, and None for what was not given. That of a norm is ``backward(dy, dresidual=None)``: dresidual is the gradient
    of residual_out, None where nothing but the norm went on. TypeError or ValueError is raised for one that does not
    have the dtype and shape of its result.

    >>> import fastdrop as fd, numpy as np
    >>> y, saved = fd.dropout_add(np.ones((2, 3)), np.zeros((2, 3)), 0.5, rng=4)
    >>> saved
    Saved(op='dropout_add', shape=(2, 3), keeps=('mask',), nbytes=4)
    """

    op: str
    mask: BitMask | None
    _gradients: Callable[..., Gradients]
    _shape: Shape
    _dtype: np.dtype[Any]  # of what is dropped

    def backward(self, dy: ArrayLike) -> Gradients:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes kept for backward."""
        bits = 0 if self.mask is None else self.mask.nbytes
        return bits + sum(int(array.nbytes) for array in self._arrays().values())

    def __repr__(self) -> str:
        keeps = (*(() if self.mask is None else ("mask",)), *self._arrays())
        return f"Saved(op={self.op!r}, shape={self._shape}, keeps={keeps}, nbytes={self.nbytes})"

    def _arrays(self) -> dict[str, Any]:
        """What is kept beside the mask, by name."""
        return {}

    def _taken(self, name: str, given: Any, of: str, dtype: np.dtype[Any]) -> tuple[ModuleType, Any]:
        """A gradient that fits, and who knows its memory."""
        memory, kept = _memory(given), self._arrays()
        if isinstance(self.mask, PackedMask):
            kept["mask"] = self.mask._words
        for of_kept, array in kept.items():
            checks.beside(name, memory is device, of_kept, _memory(array) is device)
        gradient, _ = memory.taken(name, given)
        checks.fits(name, gradient, of, self._shape, dtype)
        return memory, gradient

    def _words(self, memory: ModuleType, dy: Any) -> Any:
        """The mask's words, drawn again if need be."""
        mask = self.mask
        if isinstance(mask, SeededMask):
            return memory.draw_words(dy, math.prod(mask._shape), 0, mask._seed, mask._offset, mask._threshold)
        return None if mask is None else mask._words

    def _named(self, by_name: dict[str, Any]) -> Gradients:
        return self._gradients(*(by_name.get(name) for name in self._gradients._fields))  # type: ignore[attr-defined]


@dataclass(frozen=True, repr=False, eq=False)
class SavedPointwise(Saved[Gradients]):
    """What an op keeps that works element on element; see `Saved`."""

    _sum_dtype: np.dtype[Any]
    _activation: int  # none after a relu, whose mask has its signs
    _x: Any  # this and what it was computed with: None where bits alone are kept
    _up: Any
    _bias: Any
    _bias_dtype: np.dtype[Any] | None  # None: there was none

    def backward(self, dy: ArrayLike) -> Gradients:
        memory, given = self._taken("dy", dy, "the result", self._sum_dtype)
        if self._x is None and self._bias_dtype is None and self._dtype == self._sum_dtype:  # plain dropout's
            dx = given if self.mask is None else _masked("dy", memory.contiguous(given), self.mask, None)
            return self._named({"x": dx, "residual": given})
        g = memory.contiguous(given)
        rows, columns = _extents(self._shape)
        dx = memory.empty(g, self._shape, self._dtype)
        dup = None if self._up is None else memory.empty(g, self._shape, self._dtype)
        sums = None if self._bias_dtype is None else _sums(memory, g, (columns,), rows, self._dtype)
        if rows * columns:
            arrays = g, self._x, self._bias, self._up, self._words(memory, g), dx, dup, sums
            numbers = rows, columns, variants.panels(rows), _scale(self.mask), self._activation
            memory.run("pointwise_backward", _tags(self._dtype, self._sum_dtype), arrays, numbers)
        dbias = None if sums is None else _line(memory, sums, sums[0], self._bias_dtype)
        return self._named({"x": dx, "gate": dx, "up": dup, "bias": dbias, "residual": given})

    def _arrays(self) -> dict[str, Any]:
        arrays = {"x" if self._up is None else "gate": self._x, "up": self._up, "bias": self._bias}
        return {name: array for name, array in arrays.items() if array is not None}


@dataclass(frozen=True, repr=False, eq=False)
class SavedNorm(Saved[Gradients]):
    """What an op keeps that ends in a norm; see `Saved`."""

    _sum: Any
    _statistics: Any
    _weight: Any
    _centred: bool
    _vector_dtypes: dict[str, np.dtype[Any]]  # of weight, bias and x_bias, where given
    _has_residual: bool

    def backward(self, dy: ArrayLike, dresidual: ArrayLike | None = None) -> Gradients:
        """Gradients, given those of y and, unless it is None, of residual_out."""
        memory, g = self._taken("dy", dy, "y", self._dtype)
        sum_dtype, dsum = np.dtype(self._sum.dtype), None
        if dresidual is not None:
            dsum = memory.contiguous(self._taken("dresidual", dresidual, "residual_out", sum_dtype)[1])
        g = memory.contiguous(g)
        rows, columns = _extents(self._shape)
        gradients = {"x": memory.empty(g, self._shape, self._dtype)}
        if self._has_residual:
            gradients["residual"] = memory.empty(g, self._shape, sum_dtype)
        sums: Any = _sums(memory, g, (3, columns), rows, self._dtype) if self._vector_dtypes else None
        if rows * columns:
            inputs = g, dsum, self._sum, self._statistics, self._weight, self._words(memory, g)
            outputs = gradients["x"], gradients.get("residual"), sums
            numbers = rows, columns, variants.panels(rows), _scale(self.mask), int(self._centred)
            memory.run("norm_backward", _tags(self._dtype, sum_dtype), (*inputs, *outputs), numbers)
        for line, name in enumerate(("weight", "bias", "x_bias")):
            if name in self._vector_dtypes:
                gradients[name] = _line(memory, sums, sums[0][line], self._vector_dtypes[name])
        return self._named(gradients)

    def _arrays(self) -> dict[str, Any]:
        weight = {} if self._weight is None else {"weight": self._weight}
        return {"residual_out": self._sum, "statistics": self._statistics, **weight}


@dataclass(frozen=True, repr=False, eq=False)
class SavedSoftmax(Saved[SoftmaxGradients]):
    """What `softmax_dropout` keeps; see `Saved`."""

    _probabilities: Any
    _factor: float

    def backward(self, dy: ArrayLike) -> SoftmaxGradients:
        memory, g = self._taken("dy", dy, "the result", self._dtype)
        rows, columns = _extents(self._shape)
        dx = memory.empty(g, self._shape, self._dtype)
        if rows * columns:
            inputs = memory.contiguous(g), memory.contiguous(self._probabilities), self._words(memory, g)
            numbers = rows, columns, self._factor, _scale(self.mask)
            memory.run("softmax_backward", _tags(self._dtype), (*inputs, dx, None), numbers)
        return self._named({"scores": dx})

    def _arrays(self) -> dict[str, Any]:
        return {"probabilities": self._probabilities}


# ---- the flow ----


class _Call:
    """One call of an op: what it was given, checked, and its way to a primitive.

    Everything is checked before a random number is taken, and nothing is written before that.
    """

    def __init__(self, op: str, given: Any, name: str, p: Any, training: bool, store: str, rng: RandomState) -> None:
        self.op, self.name, self.store, self.rng = op, name, store, rng
        self.memory = _memory(given)
        self.x, _ = self.memory.taken(name, given)
        self.p = checks.probability(p)
        checks.choice("store", store, checks.STORES)
        self.cut, self.scale = threshold_and_scale(self.p if training else 0.0)
        self.shape: Shape = tuple(self.x.shape)
        self.dtype = np.dtype(self.x.dtype)
        self.rows, self.columns = _extents(self.shape)

    def pointwise(
        self,
        gradients: Callable[..., Gradients],
        out: Any,
        *,
        vector: Vector = NO_VECTOR,
        factor: Any = None,
        residual: Any = None,
        activation: int = NONE,
    ) -> tuple[Array, SavedPointwise[Gradients]]:
        memory = self.memory
        y = self.output(out, {"residual": residual, self.name: self.x, "up": factor})
        x, factor, residual = (None if v is None else memory.contiguous(v) for v in (self.x, factor, residual))
        bias, bias_dtype = vector
        bias = None if bias is None else memory.detached(bias, y)
        keeps = (x, factor, bias) if keeps_input(activation, factor is not None) else (None, None, None)
        kept_x, kept_up, kept_bias = (None if v is None else memory.detached(v, y) for v in keeps)
        target = memory.target(y)
        signs = memory.empty_words_like(x, self.cells) if keeps_signs(activation, factor is not None) else None
        inputs, outputs = (x, bias, factor, residual), (target, signs)
        mask = self.forward("pointwise_forward", (self.dtype, y.dtype), inputs, outputs, self.scale, activation)
        result = _delivered(memory, target, y, out)
        if signs is not None:
            mask = PackedMask._of(signs, self.shape, self.p if self.cut else 0.0, self.scale)
            activation = NONE
        common = self.op, mask, gradients, self.shape, self.dtype
        return result, SavedPointwise(*common, np.dtype(y.dtype), activation, kept_x, kept_up, kept_bias, bias_dtype)

    def norm(
        self,
        gradients: Callable[..., Gradients],
        residual: Any,
        vectors: dict[str, Any],
        eps: Any,
        centred: bool,
    ) -> tuple[Array, Array, SavedNorm[Gradients]]:
        memory = self.memory
        checks.at_least(self.name, len(self.shape), 1, "an axis of columns")
        taken = {
            name: self.vector(name, value, kept=name == "weight")
            for name, value in vectors.items()
            if value is not None
        }
        residual = None if residual is None else memory.contiguous(self.residual(residual))
        eps = checks.number_from("eps", eps, 0)
        x = memory.contiguous(self.x)
        y = memory.empty(x, self.shape, self.dtype)
        total = memory.empty(x, self.shape, self.dtype if residual is None else residual.dtype)
        statistics = memory.empty(x, (self.rows, 2), computed(self.dtype))
        weight, shift, x_bias = (taken.get(name, NO_VECTOR)[0] for name in ("weight", "bias", "x_bias"))
        inputs, outputs = (x, x_bias, residual), (weight, shift, y, total, statistics)
        mask = self.forward("norm_forward", (self.dtype, total.dtype), inputs, outputs, self.scale, eps, int(centred))
        common = self.op, mask, gradients, self.shape, self.dtype
        dtypes = {name: dtype for name, (_, dtype) in taken.items()}
        return y, total, SavedNorm(*common, total, statistics, weight, centred, dtypes, residual is not None)

    def softmax(self, factor: Any, attn_mask: Any, causal: bool, out: Any) -> tuple[Array, SavedSoftmax]:
        memory = self.memory
        checks.at_least(self.name, len(self.shape), 1 + bool(causal), "queries and keys" if causal else "keys")
        factor = checks.finite("scale", factor)
        additive, strides = self.additive(attn_mask)
        y = self.output(out, {self.name: self.x})
        x = memory.contiguous(self.x)
        additive = None if additive is None else memory.detached(additive, y)
        target = memory.target(y)
        probabilities = memory.empty(x, self.shape, self.dtype) if self.cut else None
        heads, queries = (1, 1, *self.shape)[-3:-1]
        numbers = heads, queries, *strides, factor, self.scale, int(bool(causal))
        mask = self.forward("softmax_forward", (self.dtype,), (x, additive), (probabilities, target), *numbers)
        result = _delivered(memory, target, y, out)
        common = self.op, mask, SoftmaxGradients, self.shape, self.dtype
        return result, SavedSoftmax(*common, y if probabilities is None else probabilities, factor)

    @property
    def cells(self) -> int:
        return self.rows * self.columns

    def forward(
        self,
        primitive: str,
        dtypes: tuple[Any, ...],
        before: tuple[Any, ...],
        after: tuple[Any, ...],
        *numbers: float,
    ) -> BitMask | None:
        """Draws plain dropout's mask and runs a primitive, which takes its words between these arrays.

        The mask is None where it would drop nothing; no random number is taken then.
        """
        words: Any = None
        draw: Any = None
        mask: BitMask | None = None
        if self.cut == 0:
            check_random_state(self.rng)
        else:
            words = self.memory.empty_words_like(self.x, self.cells)  # before a random number is taken
            seed, offset = random_state(self.rng)
            draw = self.memory.draw_or_defer(words, self.x, self.cells, seed, offset, self.cut)
            if self.store == "seed":
                mask = SeededMask._of(seed, offset, self.shape, self.p, self.scale, self.cut)
            else:
                mask = PackedMask._of(words, self.shape, self.p, self.scale)
        if self.cells:
            arrays, numbers = (*before, words, *after), (self.rows, self.columns, *numbers)
            self.memory.run(primitive, _tags(*dtypes), arrays, numbers, draw)
        return mask

    def taken(self, name: str, value: Any) -> Any:
        """Another array, that lies where x does."""
        checks.beside(name, _memory(value) is device, self.name, self.memory is device)
        return self.memory.taken(name, value)[0]

    def alike(self, name: str, value: Any, *wider: np.dtype[Any]) -> Any:
        """Another array of x's shape and dtype, or one that is wider."""
        array = self.taken(name, value)
        checks.fits(name, array, self.name, self.shape, self.dtype, *wider)
        return array

    def residual(self, value: Any) -> Any:
        """The residual, which may be float32 beside 16 bits."""
        return self.alike("residual", value, *((FLOAT32,) if self.dtype.itemsize == 2 else ()))

    def vector(self, name: str, value: Any, kept: bool = False) -> Vector:
        """An element per column as kernels take it, and the dtype that its gradient will have. What is kept is a copy,
        as weights and biases are written to between steps."""
        array = self.taken(name, value)
        checks.at_least(self.name, len(self.shape), 1, "an axis of columns")
        checks.per_column(name, tuple(array.shape), self.name, self.columns)
        vector = self.memory.cast(name, array, computed(self.dtype))
        return self.memory.detached(vector, array) if kept else vector, np.dtype(array.dtype)

    def output(self, out: Any, inputs: dict[str, Any]) -> Any:
        """out, or a new array, for a result like the first of these inputs that there is."""
        given = [(name, array) for name, array in inputs.items() if array is not None]
        name, like = given[0]
        if out is None:
            return self.memory.empty(like, self.shape, like.dtype)
        y = self.memory.output(out, like, name)
        for name, array in given[1:]:
            self.memory.apart(y, array, name)
        return y

    def additive(self, value: Any) -> tuple[Any, tuple[int, int, int]]:
        """attn_mask as numbers to add, and its strides from one to the next of what is before heads, of heads, queries.

        Axes of heads and queries stay as they are given, and so do those before, if they are all shared or none is.
        """
        if value is None:
            return None, (0, 0, 0)
        name = "attn_mask"
        checks.beside(name, _memory(value) is device, self.name, self.memory is device)
        mask = self.memory.taken_mask(name, value)
        checks.broadcasts(name, tuple(mask.shape), self.name, self.shape)
        full = (*(1,) * (3 - len(self.shape)), *self.shape)
        given = (*(1,) * (len(full) - len(mask.shape)), *mask.shape)
        lead = full[:-3] if math.prod(given[:-3]) > 1 else given[:-3]
        shape = (*lead, *given[-3:-1], self.columns)
        strides = []
        step = self.columns
        for extent in (given[-2], given[-3], math.prod(lead)):
            strides.append(step if extent > 1 else 0)
            step *= extent
        return self.memory.additive(name, mask, shape, computed(self.dtype)), (strides[2], strides[1], strides[0])


def _extents(shape: Shape) -> tuple[int, int]:
    """Rows and columns; a number without axes is one of each."""
    columns = shape[-1] if shape else 1
    return math.prod(shape[:-1]), columns


def computed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What kernels compute in, and what vectors, statistics and sums are stored as."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def _tags(*dtypes: Any) -> tuple[int, ...]:
    return tuple(checks.dtype_tag("x", np.dtype(dtype)) for dtype in dtypes)


def _scale(mask: BitMask | None) -> float:
    return 1.0 if mask is None else mask.scale


def _sums(memory: ModuleType, like: Any, line: Shape, rows: int, dtype: np.dtype[Any]) -> Any:
    """A line for each panel of rows."""
    make = memory.empty if rows * line[-1] else memory.zeros
    return make(like, (variants.panels(rows), *line), computed(dtype))


def _line(memory: ModuleType, sums: Any, line: Any, dtype: Any) -> Any:
    """A gradient in memory of its own, as it lives longer than the panels should."""
    return memory.cast("the gradient", memory.detached(line, sums), dtype)

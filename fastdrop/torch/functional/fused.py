"""Dropout with what stands before and after it in a network, in one pass over memory.

Plain eager tensors take an `autograd.Function` that calls the kernel at once, compilers the ops of `ops.fused`;
transforms, forward-mode AD, tracers, modes, subclasses and complex numbers take the same formula composed of torch's
ops. The mask is `dropout`'s with the same seed on every way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import checks
from ...core.activations import ACTIVATIONS
from ...core.random import threshold
from ..ops import fused as fused_ops
from ..ops import mask as mask_ops
from ..ops.mask import overload
from ..runtime import fused_kernels, mask_kernels, nested, seeds
from ..runtime.dispatch import is_eager_dense
from ..runtime.dispatch.ops import fast_apply
from . import routing
from .routing import for_subclasses

__all__ = [
    "bias_act_dropout",
    "bias_dropout_add",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "softmax_dropout",
    "swiglu_dropout",
]

Seed = int | Tensor | None
HALVES = (torch.float16, torch.bfloat16)

_is_compiling = torch.compiler.is_compiling


@for_subclasses
def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> Tensor:
    """Returns ``residual + dropout(input, p)``: the end of a residual branch.

    Parameters
    ----------
    input : Tensor of float32, float64, float16, bfloat16, complex64 or complex128, any shape ``(*)``, any strides
    residual : Tensor of input's shape
        Of input's dtype, or float32 beside a 16-bit one; under autocast also of others, which then are promoted.
    p : float or Tensor of one number
        Drop probability, 0 to 1. As a tensor, on the CPU, it may change from call to call of a compiled function
        without compiling anew.
    training : bool
        False drops nothing, and draws nothing; so does p = 0.
    generator, seed
        As in `dropout`, whose mask it is: of a call of this shape with the same seed.
    store : {"bits", "seed"}
        What is kept for backward: 1/8 byte per element, or 8 bytes in all, from which backward draws the mask again.

    Returns
    -------
    Tensor with residual's dtype and strides, as of ``residual + input``
        Computed in float32, or float64 for float64, and rounded once. What is dropped adds +0, whatever input holds.

    Raises
    ------
    ValueError
        p or seed out of range; a residual of another shape or on another device; unknown store; both seed and
        generator.
    TypeError
        input or residual that is no Tensor; residual's dtype; p or seed of another type.
    RuntimeError
        input of an integer dtype; what `dropout` refuses under ``torch.compile`` and ``vmap``.

    The residual's gradient is that of the result itself, and not a copy. Like the other fused functions it has a
    gradient of any order and a forward-mode derivative, and works under ``torch.compile``, ``torch.func``, autocast
    and checkpointing. Sources: Srivastava et al., JMLR 15, 2014; Vaswani et al., NeurIPS 2017, section 5.4.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.dropout_add(torch.ones(6), torch.arange(6.0), 0.5, seed=4)
    tensor([0., 1., 4., 5., 4., 7.])
    """
    _tensor("residual", residual)
    return _pointwise(input, None, None, residual, p, training, None, generator, seed, store)


@for_subclasses
def bias_dropout_add(
    input: Tensor,
    bias: Tensor,
    residual: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> Tensor:
    """Returns ``residual + dropout(input + bias, p)``: `dropout_add` after a linear layer without its bias.

    Parameters
    ----------
    input : Tensor, ``(*, columns)``, of the dtypes of `dropout_add`
    bias : Tensor of any float dtype, ``(columns,)``
    residual, p, training, generator, seed, store
        As in `dropout_add`, and so are the result and the errors; ValueError for a bias of another shape.

    Kept for backward: a bit per element, or a seed. The bias's gradient is summed in float32 (float64 for float64) in
    an order that input's shape decides.

    >>> import torch, fastdrop.torch as fdt
    >>> input, bias, residual = torch.ones(2, 3), torch.tensor([0.0, 1.0, 2.0]), torch.zeros(2, 3)
    >>> fdt.bias_dropout_add(input, bias, residual, 0.5, seed=4)
    tensor([[0., 0., 6.],
            [2., 0., 6.]])
    """
    _tensor("bias", bias)
    _tensor("residual", residual)
    return _pointwise(input, bias, None, residual, p, training, None, generator, seed, store)


@for_subclasses
def bias_act_dropout(
    input: Tensor,
    bias: Tensor | None,
    p: float | Tensor = 0.5,
    activation: str | None = "gelu",
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> Tensor:
    """Returns ``dropout(activation(input + bias), p)``: the middle of a feed-forward block.

    Parameters
    ----------
    input : Tensor, ``(*, columns)``, of a float dtype; complex without an activation
    bias : Tensor of any float dtype, ``(columns,)``, or None
    activation : {"relu", "gelu", "gelu_tanh", "silu", None}
        "gelu_tanh" is ``F.gelu(x, approximate="tanh")``; ValueError for another.
    p, training, generator, seed, store
        As in `dropout_add`, and so are the errors; ValueError for a bias of another shape.

    Returns
    -------
    Tensor with input's dtype and strides

    Kept for backward: with "relu" one bit per element and nothing else, whatever ``store`` is; with None that bit or
    a seed; with the others input too.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.bias_act_dropout(torch.arange(-2.0, 4.0), None, 0.5, "relu", seed=4)
    tensor([0., 0., 0., 2., 0., 6.])
    """
    return _pointwise(input, bias, None, None, p, training, activation, generator, seed, store)


@for_subclasses
def swiglu_dropout(
    gate: Tensor,
    up: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> Tensor:
    """Returns ``dropout(silu(gate) * up, p)``: the middle of a gated feed-forward block.

    Parameters
    ----------
    gate : Tensor of float32, float64, float16 or bfloat16, any shape ``(*)``
    up : Tensor of gate's shape and dtype
        Under autocast also of others, which then are promoted.
    p, training, generator, seed, store
        As in `dropout_add`, and so are the errors.

    Returns
    -------
    Tensor with gate's dtype and strides

    Kept for backward: gate, up and a bit per element, or a seed. Source: Shazeer, "GLU variants improve Transformer",
    2020.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.swiglu_dropout(torch.arange(4.0), torch.ones(4), 0.5, seed=4)
    tensor([0.0000, 0.0000, 3.5232, 5.7154])
    """
    _tensor("up", up)
    return _pointwise(gate, None, up, None, p, training, "silu", generator, seed, store, "gate")


@for_subclasses
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    eps: float = 1e-5,
    training: bool = True,
    *,
    input_bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> tuple[Tensor, Tensor]:
    """Returns ``(layer_norm(sum, weight, bias), sum)`` with ``sum = residual + dropout(input + input_bias, p)``.

    After attention and feed-forward layers that normalise their result take the first, those that normalise their
    input both: the second is the residual stream that goes on.

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16, ``(*, columns)``
    residual : Tensor of input's shape, or None
        Of input's dtype, or float32 beside a 16-bit one; under autocast also of others, which then are promoted.
    weight, bias, input_bias : Tensor of any float dtype, ``(columns,)``, or None
        Of the norm, and what is added to input.
    eps : float
        Added to the variance.
    p, training, generator, seed, store
        As in `dropout_add`, and so are the errors; ValueError for other shapes or input without axes.

    Returns
    -------
    normed : Tensor with input's dtype, contiguous
    sum : Tensor with residual's dtype, contiguous
        Kept for backward, as results of torch's own ops are: it must not be written to before that.

    Kept for backward: sum, a bit per element or a seed, and mean and deviation of each row in float32 (float64 for
    float64). Sources: Ba, Kiros, Hinton, "Layer normalization", 2016; Xiong et al., ICML 2020, of pre-norm.

    >>> import torch, fastdrop.torch as fdt
    >>> normed, sum = fdt.dropout_add_layer_norm(torch.ones(2, 3), torch.zeros(2, 3), p=0.5, seed=4)
    >>> sum
    tensor([[0., 0., 2.],
            [2., 0., 2.]])
    >>> normed
    tensor([[-0.7071, -0.7071,  1.4142],
            [ 0.7071, -1.4142,  0.7071]])
    """
    return _norm(input, residual, weight, bias, input_bias, p, eps, training, True, generator, seed, store)


@for_subclasses
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    p: float | Tensor = 0.5,
    eps: float | None = None,
    training: bool = True,
    *,
    input_bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> tuple[Tensor, Tensor]:
    """Returns ``(rms_norm(sum, weight), sum)`` with ``sum = residual + dropout(input + input_bias, p)``.

    Parameters
    ----------
    eps : float, optional
        Added to the mean square; None is that of float32, or of float64 for float64, as in ``F.rms_norm``.
    input, residual, weight, p, training, input_bias, generator, seed, store
        As in `dropout_add_layer_norm`, and so are the results, the errors and what is kept.

    Source: Zhang and Sennrich, "Root mean square layer normalization", NeurIPS 2019.

    >>> import torch, fastdrop.torch as fdt
    >>> normed, sum = fdt.dropout_add_rms_norm(torch.ones(2, 3), torch.zeros(2, 3), p=0.5, seed=4)
    >>> normed
    tensor([[0.0000, 0.0000, 1.7321],
            [1.2247, 0.0000, 1.2247]])
    """
    return _norm(input, residual, weight, None, input_bias, p, eps, training, False, generator, seed, store)


@for_subclasses
def softmax_dropout(
    scores: Tensor,
    p: float | Tensor = 0.5,
    scale: float = 1.0,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> Tensor:
    """Returns ``dropout(softmax(scale * scores + attn_mask), p)`` along the last axis: the weights of attention.

    Parameters
    ----------
    scores : Tensor of float32, float64, float16 or bfloat16, ``(*, keys)`` or ``(*, queries, keys)``
    scale : float
    attn_mask : Tensor of bool or any float dtype, broadcastable to scores, optional
        Added to the scores; of bool, False excludes a key. A row in which nothing is left is 0.
    causal : bool
        A query sees the keys up to its own number; together with attn_mask, what both leave.
    p, training, generator, seed, store
        As in `dropout_add`, and so are the errors; ValueError for an attn_mask that does not broadcast, for a scale
        that is not finite, and for scores without axes, or with one under ``causal``.

    Returns
    -------
    Tensor with scores' shape, dtype and strides

    Kept for backward: the softmax in scores' dtype, and a bit per element or a seed. attn_mask has a gradient where it
    wants one. Source: Vaswani et al., NeurIPS 2017.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.softmax_dropout(torch.zeros(2, 4), 0.5, causal=True, seed=4)
    tensor([[0., 0., 0., 0.],
            [0., 1., 0., 0.]])
    """
    _real(scores, "scores", "softmax")
    checks.at_least("scores", scores.dim(), 2 if causal else 1, "queries and keys" if causal else "keys")
    scale = scale + 0.0 if _is_compiling() else checks.finite("scale", scale)
    if scores.is_nested:
        if causal or attn_mask is not None:
            raise RuntimeError("softmax_dropout of nested tensors takes no attn_mask, and causal=False alone")
        random: Any = {"generator": generator, "seed": seed, "store": store}
        return nested.on_values(  # type: ignore[no-any-return]
            lambda values: softmax_dropout(values, p, scale, None, False, training, **random), scores, columns=True
        )
    if attn_mask is not None:
        _beside("attn_mask", attn_mask, "scores", scores)
        checks.broadcasts("attn_mask", tuple(attn_mask.shape), "scores", tuple(scores.shape))
        if attn_mask.dtype is torch.bool:
            attn_mask = fused_kernels.additive(attn_mask, fused_kernels.computed(scores.dtype))
        elif attn_mask.dtype not in mask_kernels.TAGS:
            raise TypeError(f"attn_mask must be of bool or a float dtype, but got {attn_mask.dtype}")
    call = _Call((scores, attn_mask), (), p, training, generator, seed, store)
    options = scale, bool(causal)
    if call.compiles:
        y: Tensor = overload(torch.ops.fastdrop.softmax, call.p)(
            scores, attn_mask, call.seed, call.p, *options, call.bits, call.wanted
        )[0]
    elif not call.plain:
        y = call.drop(fused_ops.softmax_of(scores, attn_mask, *options)).to(scores.dtype)
    elif call.wanted:
        y = _apply_softmax(scores, attn_mask, (call.seed, call.p, *options, call.bits))[0]
    else:
        y = fused_ops.softmax(scores, attn_mask, call.seed, call.p, *options, False, False)[0]
    return y


# ---- calls ----


class _Call:
    """What a call's way is, and its random state: drawn when the arguments have been found good.

    Gradients of what is ``dropped``, the first of it the data, want the mask; those of ``others`` don't. p is 0 and
    seed None where nothing is dropped; ``bits`` tells whether words are to be kept.
    """

    __slots__ = ("bits", "compiles", "onnx", "p", "plain", "seed", "wanted")

    def __init__(
        self,
        dropped: tuple[Tensor | None, ...],
        others: tuple[Tensor | None, ...],
        p: Any,
        training: bool,
        generator: torch.Generator | None,
        seed: Seed,
        store: str,
    ) -> None:
        tracing = _is_compiling()
        p = routing.traced_probability(p) if tracing else routing.eager_probability(p)
        checks.choice("store", store, checks.STORES)
        masked = [tensor for tensor in dropped if tensor is not None]
        given = masked + [tensor for tensor in others if tensor is not None]
        x = given[0]
        recording = torch.is_grad_enabled()
        self.wanted = recording and any(tensor.requires_grad for tensor in given)
        self.bits = store == "bits" and recording and any(tensor.requires_grad for tensor in masked)
        self.compiles = tracing and not x.is_complex() and not routing.is_transformed_there()
        self.plain = not tracing and all(is_eager_dense(tensor) for tensor in given) and not x.is_complex()
        self.onnx = not self.plain and routing.is_exported_to_onnx()
        if self.onnx:
            self.compiles = False
        if not self.plain:
            nested.check_dense(*given)
        drops = training and (isinstance(p, Tensor) or (p > routing.KEEPS_ALL if tracing else threshold(p) > 0))
        self.p: Any = p if drops else 0.0
        self.seed: Any = None
        if not drops:
            routing._check_unused(seed, generator)
        elif self.onnx:
            self.seed = seed, generator
        elif self.plain:
            self.seed = routing._number_of_seed(x, generator, seed, False)
        else:
            self.seed = routing._tensor_of_seed(x, generator, seed)

    def drop(self, x: Tensor, law: str = "inverted") -> Tensor:
        """x under the mask, by ops that everyone knows; "standard" does not scale."""
        if self.seed is None or (self.onnx and law == "standard"):  # whose use is its gradient
            return x
        if self.onnx:
            return routing.for_onnx(x, self.p, None, law, *self.seed)
        return routing._by_ops(x, self.p, False, None, self.seed, None, self.bits, law)


def _pointwise(
    x: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    residual: Tensor | None,
    p: Any,
    training: bool,
    activation: str | None,
    generator: torch.Generator | None,
    seed: Seed,
    store: str,
    name: str = "input",
) -> Tensor:
    checks.choice("activation", activation, tuple(ACTIVATIONS))
    if activation is None:
        _tensor(name, x)
        mask_kernels.check_dtype(x)
    else:
        _real(x, name, activation)
    if x.is_nested:
        rest: Any = (p, training, activation, generator, seed, store, name)
        tensors = x, bias, factor, residual
        return nested.on_values(lambda *values: _pointwise(*values, *rest), *tensors, columns=bias is not None)  # type: ignore[no-any-return]
    _vector("bias", bias, name, x)
    if factor is not None:
        x, factor = _promoted(x, "up", factor, name, False)
    if residual is not None:
        x, residual = _promoted(x, "residual", residual, name, True)
    tensors = (x, bias, factor, residual)
    call = _Call(tensors[:3], (residual,), p, training, generator, seed, store)
    bits = call.bits or (call.wanted and activation == "relu")
    if call.compiles:
        y: Tensor = overload(torch.ops.fastdrop.pointwise, call.p)(*tensors, call.seed, call.p, activation, bits)[0]
    elif not call.plain:
        y = _composed(call, *tensors, activation)
    elif call.wanted:
        y = _apply_pointwise(*tensors, (call.seed, call.p, activation, bits))
    else:
        y = fused_ops.pointwise(*tensors, call.seed, call.p, activation, False)[0]
    return y


def _composed(
    call: _Call,
    x: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """An activation's argument is dropped too, and a factor: their gradients are then 0 whatever they hold."""
    wide = fused_ops.wide
    h = wide(x) if bias is None else wide(x) + wide(bias)
    if activation is not None:
        h = fused_ops.activated(call.drop(h, "standard"), activation)
        h = h if factor is None else h * call.drop(wide(factor), "standard")
    h = call.drop(h)
    return h.to(x.dtype) if residual is None else (wide(residual) + h).to(residual.dtype)


class _Pointwise(torch.autograd.Function):
    """In the old style, which costs a quarter of ``setup_context``'s."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        factor: Tensor | None,
        residual: Tensor | None,
        call: tuple[Any, ...],
    ) -> Tensor:
        seed, p, activation, bits = call
        y, words = fused_ops.pointwise(x, bias, factor, residual, seed, p, activation, bits)
        fused_ops.keep_pointwise(ctx, x, bias, factor, _stored(words, seed), p, activation, bits)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        return *fused_ops.pointwise_gradients(ctx.needs_input_grad[:4], dy, *mask_ops._kept(ctx)), None


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    p: Any,
    eps: Any,
    training: bool,
    centred: bool,
    generator: torch.Generator | None,
    seed: Seed,
    store: str,
) -> tuple[Tensor, Tensor]:
    _real(x, "input", "a norm")
    checks.at_least("input", x.dim(), 1, "an axis of columns")
    if x.is_nested:
        rest: Any = (p, eps, training, centred, generator, seed, store)
        tensors = x, residual, weight, shift, bias
        return nested.on_values(lambda *values: _norm(*values, *rest), *tensors, columns=True)  # type: ignore[no-any-return]
    for name, vector in (("weight", weight), ("bias", shift), ("input_bias", bias)):
        _vector(name, vector, "input", x)
    if residual is not None:
        x, residual = _promoted(x, "residual", residual, "input", True)
    if eps is None:
        eps = torch.finfo(fused_kernels.computed(x.dtype)).eps
    eps = eps + 0.0 if _is_compiling() else checks.number_from("eps", eps, 0)
    tensors = (x, bias, residual, weight, shift)
    call = _Call(tensors[:2], tensors[2:], p, training, generator, seed, store)
    if call.compiles:
        op = overload(torch.ops.fastdrop.norm, call.p)
        y, sum, *_ = op(*tensors, call.seed, call.p, eps, centred, call.bits)
    elif not call.plain:
        sum = _composed(call, x, bias, None, residual, None)
        y = fused_ops.normalised(sum, weight, shift, eps, centred).to(x.dtype)
    elif call.wanted:
        y, sum = _apply_norm(*tensors, (call.seed, call.p, eps, centred, call.bits))
    else:
        y, sum, *_ = fused_ops.norm(*tensors, call.seed, call.p, eps, centred, False)
    return y, sum


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        weight: Tensor | None,
        shift: Tensor | None,
        call: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        seed, p, eps, centred, bits = call
        y, sum, statistics, words = fused_ops.norm(x, bias, residual, weight, shift, *call)
        kept = _stored(words, seed)
        fused_ops.keep_norm(ctx, x, bias, weight, shift, sum, statistics, kept, p, eps, centred, bits)
        return y, sum

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Any, ...]:
        return *fused_ops.norm_gradients(ctx.needs_input_grad[:5], dy, dsum, *mask_ops._kept(ctx)), None


class _Softmax(torch.autograd.Function):
    """Its second output, the probabilities, is there for gradients of second order."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, mask: Tensor | None, call: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor] | tuple[Tensor]:
        seed, p, scale, causal, bits = call
        y, probabilities, words = fused_ops.softmax(scores, mask, seed, p, scale, causal, bits, True)
        normal = y if probabilities is None else probabilities
        fused_ops.keep_softmax(ctx, scores, mask, normal, _stored(words, seed), p, scale, causal, bits)
        return (y,) if probabilities is None else (y, probabilities)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dprobabilities: Tensor | None = None) -> tuple[Any, ...]:
        return *fused_ops.softmax_gradients(ctx.needs_input_grad[:2], dy, dprobabilities, *mask_ops._kept(ctx)), None


_apply_pointwise, _apply_norm, _apply_softmax = fast_apply(_Pointwise), fast_apply(_Norm), fast_apply(_Softmax)


def _stored(words: Tensor | None, seed: Any) -> Tensor | None:
    """What backward has the mask from."""
    return words if words is not None or seed is None else seeds.as_tensor(seed)


# ---- arguments ----


def _tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, but got {type(x).__name__}")


def _real(x: Any, name: str, what: str) -> None:
    _tensor(name, x)
    mask_kernels.check_real(x, what)


def _beside(name: str, x: Any, of: str, data: Tensor) -> None:
    _tensor(name, x)
    if x.is_nested:
        raise ValueError(f"{name} is a nested tensor, and {of} is not")
    if x.device != data.device:
        raise ValueError(f"{name} must be on {data.device}, as {of} is, but got one on {x.device}")


def _vector(name: str, x: Any, of: str, data: Tensor) -> None:
    if x is None:
        return
    _beside(name, x, of, data)
    if x.dtype not in mask_kernels.TAGS and x.dtype is not data.dtype:
        raise TypeError(f"{name} must be of a float dtype, but got {x.dtype}")
    checks.at_least(of, data.dim(), 1, "an axis of columns")
    checks.per_column(name, tuple(x.shape), of, data.shape[-1])


def _promoted(x: Tensor, name: str, other: Any, of: str, wider: bool) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape, and of dtypes that go together: one and the same or, if it may be, float32 beside 16
    bits. Autocast promotes others as it does for torch's own sums and products."""
    _beside(name, other, of, x)
    allowed = (x.dtype, torch.float32) if wider and x.dtype in HALVES else (x.dtype,)
    mixed = other.dtype not in allowed and other.dtype in mask_kernels.TAGS and x.dtype in mask_kernels.TAGS
    if mixed and routing.autocast_dtype(x) is not None:
        common = torch.promote_types(x.dtype, other.dtype)
        other = other.to(common)
        if not (wider and x.dtype in HALVES and common is torch.float32):
            x = x.to(common)
        allowed = (common,)
    checks.fits(name, other, of, tuple(x.shape), *allowed)
    return x, other

"""What the fused functions have in common: checks of their tensors, and the three computations that serve them all.

`fused` calls `pointwise`, `norm` and `softmax`. Each makes a `Call`, which has the way that `plan_call` named and the
seed, and then hands its arguments to the op, to the kernel, or to the same formula composed of torch's ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.activations import ACTIVATIONS
from ..ops import norm as norm_ops
from ..ops import pointwise as pointwise_ops
from ..ops import softmax as softmax_ops
from ..runtime import dtypes, fused_kernels, nested
from ..runtime.dtypes import HALVES, computed, wide
from . import onnx
from .plan import (
    FUSED_OP,
    KERNEL,
    ONNX,
    Source,
    autocast_dtype,
    check_tensor,
    check_uncut,
    check_unused_seed,
    plan_call,
    refuse_part_of_nested,
    seed_for_kernel,
    seed_for_ops,
    wants_gradient,
)
from .routing import drop_by_op

__all__ = ["Call", "Options", "norm", "pointwise", "softmax"]

Maybe = Tensor | None

_is_compiling = torch.compiler.is_compiling


class Options(NamedTuple):
    """The arguments that all fused functions share."""

    p: Any
    training: bool
    source: Source
    store: str


class Call:
    """The way of a fused call, and its random state, which is drawn when the arguments have been found good.

    Gradients of ``dropped``, whose first tensor is the data, need the mask. Gradients of ``others`` do not. p is 0 and
    the seed None if nothing is dropped. ``store_bits`` says whether the mask's words are kept, and ``wanted`` whether a
    gradient is wanted.
    """

    __slots__ = ("p", "seed", "source", "store_bits", "wanted", "way")

    def __init__(self, dropped: tuple[Maybe, ...], others: tuple[Maybe, ...], options: Options) -> None:
        x = dropped[0]
        assert x is not None
        self.way, p, drops = plan_call(x, options.p, options.training, (*dropped[1:], *others))
        checks.choice("store", options.store, checks.STORES)
        needs_mask = wants_gradient(dropped)
        self.wanted = needs_mask or wants_gradient(others)
        self.store_bits = options.store == "bits" and needs_mask
        if self.way != KERNEL:
            nested.check_dense(*dropped, *others)
        self.p, self.seed, self.source = p if drops else 0.0, None, options.source
        if not drops:
            check_unused_seed(options.source)
        elif self.way != ONNX:
            take_seed = seed_for_kernel if self.way == KERNEL else seed_for_ops
            self.seed = take_seed(x, options.source)

    def run(self, op: Any, arguments: Any) -> Any:
        """The results of an op for compilers or, of eager dense tensors, of its kernel."""
        if self.way == FUSED_OP:
            return op(arguments)
        return op.call_kernel(arguments, self.wanted)

    @property
    def composes(self) -> bool:
        """Whether the formula must be composed of torch's ops."""
        return self.way not in (KERNEL, FUSED_OP)

    def drop(self, x: Tensor, scaling: str = "inverted") -> Tensor:
        """x under the mask, by the mask's op. "standard" does not scale."""
        if self.way == ONNX:
            keeps_all = not isinstance(self.p, Tensor) and self.p == 0.0
            # "standard" is there only for its gradient, and ONNX has none.
            return x if keeps_all or scaling == "standard" else onnx.drop(x, self.p, self.source)
        return x if self.seed is None else drop_by_op(x, self.p, self.seed, None, self.store_bits, scaling)


def pointwise(
    x: Tensor,
    options: Options,
    input_bias: Maybe = None,
    multiplier: Maybe = None,
    residual: Maybe = None,
    activation: str | None = None,
) -> Tensor:
    """``residual + dropout(activation(x + input_bias) * multiplier)``."""
    name = "input" if multiplier is None else "gate"
    checks.choice("activation", activation, tuple(ACTIVATIONS))
    _check_data(name, x, activation)
    if x.is_nested:
        refuse_part_of_nested(options.source)
        y: Tensor = nested.on_values(
            lambda x, b, m, r: pointwise(x, options, b, m, r, activation),
            *(x, input_bias, multiplier, residual),
            columns=input_bias is not None,
        )
        return y
    _check_vector("bias", input_bias, name, x)
    if multiplier is not None:
        x, multiplier = _promoted(x, "up", multiplier, name, False)
    if residual is not None:
        x, residual = _promoted(x, "residual", residual, name, True)
    tensors = x, input_bias, multiplier, residual
    call = Call(tensors[:3], (residual,), options)
    if call.composes:
        return _composed(call, *tensors, activation)
    store_bits = call.store_bits or (call.wanted and activation == "relu")
    arguments = pointwise_ops.Pointwise(*tensors, call.seed, call.p, activation, store_bits)
    y = call.run(pointwise_ops.POINTWISE, arguments)[0]
    return y


def _composed(
    call: Call, x: Tensor, input_bias: Maybe, multiplier: Maybe, residual: Maybe, activation: str | None
) -> Tensor:
    """An activation's argument is dropped too, and a multiplier, so that their gradients are 0 whatever they hold."""
    h = wide(x) if input_bias is None else wide(x) + wide(input_bias)
    if activation is not None:
        h = pointwise_ops.activated(call.drop(h, "standard"), activation)
        h = h if multiplier is None else h * call.drop(wide(multiplier), "standard")
    h = call.drop(h)
    return h.to(x.dtype) if residual is None else (wide(residual) + h).to(residual.dtype)


def norm(tensors: tuple[Any, ...], options: Options, eps: Any, centred: bool) -> tuple[Tensor, Tensor]:
    """The norm of ``residual + dropout(x + input_bias)``, and that sum.

    ``tensors`` are x, input_bias, residual, and the norm's weight and bias. All but x may be None.
    """
    x, input_bias, residual, weight, norm_bias = tensors
    _check_data("input", x, "a norm")
    checks.at_least("input", x.dim(), 1, "an axis of columns")
    if x.is_nested:
        refuse_part_of_nested(options.source)
        results: tuple[Tensor, Tensor] = nested.on_values(
            lambda *values: norm(values, options, eps, centred), *tensors, columns=True
        )
        return results
    check_uncut(options.source[2], tuple(x.shape), -1, "the last axis, which is normalised as a whole")
    for name, vector in (("weight", weight), ("bias", norm_bias), ("input_bias", input_bias)):
        _check_vector(name, vector, "input", x)
    if residual is not None:
        x, residual = _promoted(x, "residual", residual, "input", True)
    if eps is None:
        eps = torch.finfo(computed(x.dtype)).eps
    eps = eps + 0.0 if _is_compiling() else checks.number_from("eps", eps, 0)
    call = Call((x, input_bias), (residual, weight, norm_bias), options)
    if call.composes:
        residual_out = _composed(call, x, input_bias, None, residual, None)
        return norm_ops.normalised(residual_out, weight, norm_bias, eps, centred).to(x.dtype), residual_out
    tensors = x, input_bias, residual, weight, norm_bias
    arguments = norm_ops.Norm(*tensors, call.seed, call.p, eps, centred, call.store_bits)
    y, residual_out, *_ = call.run(norm_ops.NORM, arguments)
    return y, residual_out


def softmax(scores: Tensor, options: Options, attn_mask: Maybe, scale: Any, causal: Any) -> Tensor:
    """``dropout(softmax(scale * scores + attn_mask))``."""
    _check_data("scores", scores, "softmax")
    checks.at_least("scores", scores.dim(), 2 if causal else 1, "queries and keys" if causal else "keys")
    scale = scale + 0.0 if _is_compiling() else checks.finite("scale", scale)
    y: Tensor
    if scores.is_nested:
        refuse_part_of_nested(options.source)
        if causal or attn_mask is not None:
            raise RuntimeError("softmax_dropout of nested tensors takes no attn_mask, and causal=False alone")
        y = nested.on_values(lambda values: softmax(values, options, None, scale, False), scores, columns=True)
        return y
    if attn_mask is not None:
        _check_beside("attn_mask", attn_mask, "scores", scores)
        checks.broadcasts("attn_mask", tuple(attn_mask.shape), "scores", tuple(scores.shape))
        if attn_mask.dtype is torch.bool:
            attn_mask = fused_kernels.additive(attn_mask, computed(scores.dtype))
        elif attn_mask.dtype not in dtypes.TAGS:
            raise TypeError(f"attn_mask must be of bool or a float dtype, but got {attn_mask.dtype}")
    call = Call((scores, attn_mask), (), options)
    causal = bool(causal)
    if call.composes:
        return call.drop(softmax_ops.softmax_of(scores, attn_mask, scale, causal)).to(scores.dtype)
    random = call.seed, call.p
    arguments = softmax_ops.Softmax(scores, attn_mask, *random, scale, causal, call.store_bits, call.wanted)
    y = call.run(softmax_ops.SOFTMAX, arguments)[0]
    return y


# ---- arguments ----


def _check_data(name: str, x: Any, what: str | None) -> None:
    """``what`` names an operation of real numbers."""
    check_tensor(x, name)
    if what is None:
        dtypes.check_dtype(x)
    else:
        dtypes.check_real(x, what)


def _check_beside(name: str, x: Any, of: str, data: Tensor) -> None:
    check_tensor(x, name)
    if x.is_nested:
        raise ValueError(f"{name} is a nested tensor, and {of} is not")
    if x.device != data.device:
        raise ValueError(f"{name} must be on {data.device}, as {of} is, but got one on {x.device}")


def _check_vector(name: str, x: Any, of: str, data: Tensor) -> None:
    if x is None:
        return
    _check_beside(name, x, of, data)
    if x.dtype not in dtypes.TAGS and x.dtype is not data.dtype:
        raise TypeError(f"{name} must be of a float dtype, but got {x.dtype}")
    checks.at_least(of, data.dim(), 1, "an axis of columns")
    checks.per_column(name, tuple(x.shape), of, data.shape[-1])


def _promoted(x: Tensor, name: str, other: Any, of: str, wider: bool) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape, and of dtypes that go together: the same or, if ``wider``, float32 beside 16 bits.

    Autocast promotes other dtypes as it does for torch's own sums and products.
    """
    _check_beside(name, other, of, x)
    allowed = (x.dtype, torch.float32) if wider and x.dtype in HALVES else (x.dtype,)
    mixed = other.dtype not in allowed and other.dtype in dtypes.TAGS and x.dtype in dtypes.TAGS
    if mixed and autocast_dtype(x) is not None:
        common = torch.promote_types(x.dtype, other.dtype)
        other = other.to(common)
        if not (wider and x.dtype in HALVES and common is torch.float32):
            x = x.to(common)
        allowed = (common,)
    checks.fits(name, other, of, tuple(x.shape), *allowed)
    return x, other

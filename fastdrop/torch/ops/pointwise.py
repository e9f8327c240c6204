"""The ops ``torch.ops.fastdrop.pointwise`` and ``pointwise_backward``:
``residual + dropout(activation(x + input_bias) * multiplier, p)``.

`functional.fused` calls them for every fused function without a norm or a softmax, such as ``dropout_add``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import checks
from ...core.activations import ACTIVATIONS, keeps_signs
from ..runtime import fused_kernels
from ..runtime.dtypes import computed, wide
from . import formulas
from . import mask as mask_ops
from .record import Maybe, MaybeSeed, Op, P, saved_mask


class Pointwise(NamedTuple):
    x: Tensor
    input_bias: Maybe
    multiplier: Maybe
    residual: Maybe
    seed: MaybeSeed
    p: P
    activation: str | None
    store_bits: bool


class Result(NamedTuple):
    y: Tensor
    saved_mask: Maybe


class PointwiseBackward(NamedTuple):
    dy: Tensor
    x: Maybe
    input_bias: Maybe
    multiplier: Maybe
    saved_mask: Maybe
    p: P
    store_bits: bool
    activation: str | None
    dtype: torch.dtype  # x's
    wants_input_bias: bool
    wants_multiplier: bool


class Gradients(NamedTuple):
    dx: Tensor
    dinput_bias: Maybe
    dmultiplier: Maybe


class Saved(NamedTuple):
    """x and input_bias are None if the gradient needs no data: it does for a curved activation and for a multiplier."""

    x: Maybe
    input_bias: Maybe
    multiplier: Maybe
    saved_mask: Maybe
    p: float | Tensor
    store_bits: bool
    activation: str | None
    dtype: torch.dtype
    input_bias_dtype: torch.dtype | None


# ---- activations, composed of torch's ops ----

FORMULAS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda h: h,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": lambda h: h * torch.sigmoid(h),  # `F.silu` has no forward-mode derivative of its gradient
}


def activated(h: Tensor, activation: str | None) -> Tensor:
    return FORMULAS[activation](h)


def code_of(activation: str | None) -> int:
    checks.choice("activation", activation, tuple(ACTIVATIONS))
    return ACTIVATIONS[activation]


def saves_signs(activation: str | None, multiplier: Maybe) -> bool:
    """Whether the saved words are those of elements that are kept and positive: of a relu they tell the gradient."""
    return keeps_signs(ACTIVATIONS[activation], multiplier is not None)


# ---- pointwise ----


def _pointwise(call: Pointwise) -> Result:
    code, mask = code_of(call.activation), formulas.mask_of_call(call.x, call.seed, call.p)
    signs = call.store_bits and saves_signs(call.activation, call.multiplier)
    y, positive = fused_kernels.pointwise_forward(*call[:4], mask, code, signs)
    return Result(y, positive if signs else mask.words if call.store_bits else None)


def _pointwise_outputs(call: Pointwise) -> Result:
    code_of(call.activation)
    has_words = call.store_bits and (call.seed is not None or saves_signs(call.activation, call.multiplier))
    x, residual = call.x, call.residual
    layout, dtype = fused_kernels.layout_of_sum(x, residual), (x if residual is None else residual).dtype
    return Result(torch.empty_like(layout, dtype=dtype), formulas.empty_words(x) if has_words else None)


def _pointwise_saved(call: Pointwise, results: Result, needs: Any) -> Saved:
    activation, signs = call.activation, call.store_bits and saves_signs(call.activation, call.multiplier)
    has_words = call.store_bits and (call.seed is not None or signs)
    if signs:  # the words hold what the gradient needs of the activation
        activation = None
    curved = activation is not None or call.multiplier is not None
    return Saved(
        call.x if curved else None,
        call.input_bias if curved else None,
        call.multiplier,
        saved_mask(results.saved_mask if has_words else None, call.seed),
        call.p,
        call.store_bits,
        activation,
        call.x.dtype,
        None if call.input_bias is None else call.input_bias.dtype,
    )


def gradients(needs: Any, saved: Saved, dy: Maybe, _words: Maybe = None) -> tuple[Maybe, ...]:
    """dx, dinput_bias, dmultiplier and dresidual, of those that are needed."""
    needs_x, needs_bias, needs_multiplier, needs_residual, *_ = needs
    dresidual = dy if needs_residual else None
    if dy is None or not (needs_x or needs_bias or needs_multiplier):
        return None, None, None, dresidual
    x, input_bias, multiplier, *_, activation, dtype, bias_dtype = saved
    mask = saved.saved_mask, saved.p, saved.store_bits
    if not formulas.is_differentiated():
        call = PointwiseBackward(dy, *saved[:8], needs_bias, needs_multiplier)
        dx, dinput_bias, dmultiplier = POINTWISE_BACKWARD.run(call)
    else:
        dx, dmultiplier = wide(dy), None
        if x is not None:  # the mask comes after, so that what it drops is 0 whatever the slope is there
            with formulas.differentiating() as options:
                h = formulas.alias(wide(x) if input_bias is None else wide(x) + wide(input_bias))
                inputs = [h] if multiplier is None else [h, formulas.alias(wide(multiplier))]
                y = activated(h, activation)
                y = y if multiplier is None else y * inputs[1]
                dx, *others = torch.autograd.grad(y, inputs, dy.to(y.dtype), **options)
            dmultiplier = formulas.masked(others[0], *mask) if others else None
        dx = formulas.masked(dx, *mask)
        dinput_bias = formulas.sum_to_columns(dx) if needs_bias else None
    dx, dinput_bias = formulas.cast(dx, dtype, needs_x), formulas.cast(dinput_bias, bias_dtype, needs_bias)
    return dx, dinput_bias, formulas.cast(dmultiplier, dtype, needs_multiplier), dresidual


POINTWISE = Op(
    "pointwise",
    Pointwise,
    _pointwise_outputs,
    _pointwise,
    _pointwise_saved,
    gradients,
    check=formulas.check_real,
)


# ---- its gradient ----


def _backward(call: PointwiseBackward) -> Gradients:
    wanted = call.wants_input_bias, call.wants_multiplier
    only_mask = call.x is None and call.multiplier is None and call.activation is None
    if only_mask and call.dy.dtype is call.dtype and not any(wanted):  # dropout's own gradient
        return Gradients(_under_mask(call), None, None)
    code, mask = code_of(call.activation), formulas.mask_of_saved(call.dy, call.saved_mask, call.p, call.store_bits)
    return Gradients(*fused_kernels.pointwise_backward(*call[:4], mask, code, call.dtype, wanted))


def _under_mask(call: PointwiseBackward) -> Tensor:
    dy, words = call.dy, call.saved_mask
    if words is None:
        return dy
    dx: Tensor
    if call.store_bits:
        dx = mask_ops.BACKWARD.launch(mask_ops.Backward(dy, words, call.p, None))
    else:
        dx = mask_ops.FORWARD.launch(mask_ops.Forward(dy, words, call.p, None, False)).y
    return dx


def _backward_outputs(call: PointwiseBackward) -> Gradients:
    code_of(call.activation)
    dy, dtype = call.dy, call.dtype
    dx = torch.empty_like(dy, dtype=dtype)
    dinput_bias = dy.new_empty(dy.shape[-1:], dtype=computed(dtype)) if call.wants_input_bias else None
    return Gradients(dx, dinput_bias, torch.empty_like(dx) if call.wants_multiplier else None)


POINTWISE_BACKWARD = Op(
    "pointwise_backward", PointwiseBackward, _backward_outputs, _backward, check=formulas.check_real
)

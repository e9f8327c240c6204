"""The ops ``torch.ops.fastdrop.norm`` and ``norm_backward``: the norm of ``residual + dropout(x + input_bias, p)``, and
that sum itself, ``residual_out``.

`functional.fused` calls them for layer norm (``centred``) and RMS norm.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime import fused_kernels
from ..runtime.dtypes import computed, wide
from . import formulas, pointwise
from .record import Flags5, Maybe, MaybeSeed, Op, P, saved_mask


class Norm(NamedTuple):
    x: Tensor
    input_bias: Maybe
    residual: Maybe
    weight: Maybe
    norm_bias: Maybe
    seed: MaybeSeed
    p: P
    eps: float
    centred: bool
    store_bits: bool


class Result(NamedTuple):
    y: Tensor
    residual_out: Tensor
    statistics: Tensor
    saved_mask: Maybe


class NormBackward(NamedTuple):
    dy: Tensor
    dresidual_out: Maybe
    residual_out: Tensor
    statistics: Tensor
    weight: Maybe
    saved_mask: Maybe
    p: P
    store_bits: bool
    centred: bool
    wanted: Flags5  # of the gradients below


class Gradients(NamedTuple):
    dx: Maybe
    dinput_bias: Maybe
    dresidual: Maybe
    dweight: Maybe
    dnorm_bias: Maybe


class Saved(NamedTuple):
    residual_out: Tensor
    statistics: Tensor
    weight: Maybe
    saved_mask: Maybe
    p: float | Tensor
    store_bits: bool
    centred: bool
    eps: float
    dtype: torch.dtype
    input_bias_dtype: torch.dtype | None
    norm_bias_dtype: torch.dtype | None


def normalised(x: Tensor, weight: Maybe, norm_bias: Maybe, eps: float, centred: bool) -> Tensor:
    """The norm, composed of torch's ops."""
    x = wide(x)
    if centred:
        x = x - x.mean(-1, keepdim=True)
    normal = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    if weight is not None:
        normal = normal * weight.to(normal.dtype)
    return normal if norm_bias is None else normal + norm_bias.to(normal.dtype)


def _norm(call: Norm) -> Result:
    mask = formulas.mask_of_call(call.x, call.seed, call.p)
    results = fused_kernels.norm_forward(*call[:5], mask, call.eps, call.centred)
    return Result(*results, mask.words if call.store_bits else None)


def _norm_outputs(call: Norm) -> Result:
    x, residual = call.x, call.residual
    statistics = x.new_empty((math.prod(x.shape[:-1]), 2), dtype=computed(x.dtype))
    words = formulas.empty_words(x) if call.store_bits and call.seed is not None else None
    return Result(formulas.empty_like(x), formulas.empty_like(x if residual is None else residual), statistics, words)


def _norm_saved(call: Norm, results: Result, needs: Any) -> Saved:
    has_words = call.store_bits and call.seed is not None
    return Saved(
        results.residual_out,
        results.statistics,
        call.weight,
        saved_mask(results.saved_mask if has_words else None, call.seed),
        call.p,
        call.store_bits,
        call.centred,
        call.eps,
        call.x.dtype,
        None if call.input_bias is None else call.input_bias.dtype,
        None if call.norm_bias is None else call.norm_bias.dtype,
    )


def _norm_gradients(needs: Any, saved: Saved, dy: Maybe, dresidual_out: Maybe, *_: Any) -> tuple[Maybe, ...]:
    """dx, dinput_bias, dresidual, dweight and dnorm_bias, of those that are needed."""
    needs_x, needs_bias, needs_residual, needs_weight, needs_norm_bias, *_ = needs
    if not (needs_x or needs_bias):
        saved = saved._replace(saved_mask=None)
    if dy is None:
        return *_of_sum(needs, saved, dresidual_out), None, None
    if not formulas.is_differentiated():
        call = NormBackward(dy, dresidual_out, *saved[:7], list(needs[:5]))
        dx, dinput_bias, dresidual, dweight, dnorm_bias = NORM_BACKWARD.run(call)
        dx, dresidual = dx if needs_x else None, dresidual if needs_residual else None
        dinput_bias = formulas.cast(dinput_bias, saved.input_bias_dtype, needs_bias)
    else:
        with formulas.differentiating() as options:
            inputs = [formulas.alias(wide(x)) for x in (saved.residual_out, saved.weight) if x is not None]
            weight = None if saved.weight is None else inputs[1]
            y = normalised(inputs[0], weight, None, saved.eps, saved.centred)
            dresidual, *others = torch.autograd.grad(y, inputs, dy.to(y.dtype), **options)
        dweight, dnorm_bias = next(iter(others), None), formulas.sum_to_columns(dy)
        if dresidual_out is not None:
            dresidual = dresidual + wide(dresidual_out)
        dx, dinput_bias, dresidual = _of_sum(needs, saved, dresidual)
        dresidual = formulas.cast(dresidual, saved.residual_out.dtype)
    weight_dtype = None if saved.weight is None else saved.weight.dtype
    dweight = formulas.cast(dweight, weight_dtype, needs_weight)
    return dx, dinput_bias, dresidual, dweight, formulas.cast(dnorm_bias, saved.norm_bias_dtype, needs_norm_bias)


def _of_sum(needs: Any, saved: Saved, dy: Maybe) -> tuple[Maybe, Maybe, Maybe]:
    """dx, dinput_bias and dresidual of ``residual + dropout(x + input_bias, p)``, which is a pointwise op."""
    needs_x, needs_bias, needs_residual, *_ = needs
    mask = saved.saved_mask, saved.p, saved.store_bits
    of_sum = pointwise.Saved(None, None, None, *mask, None, saved.dtype, saved.input_bias_dtype)
    dx, dinput_bias, _, dresidual = pointwise.gradients((needs_x, needs_bias, False, needs_residual), of_sum, dy)
    return dx, dinput_bias, dresidual


NORM = Op(
    "norm",
    Norm,
    _norm_outputs,
    _norm,
    _norm_saved,
    _norm_gradients,
    differentiable=lambda call: 2,
    check=formulas.check_real,
)


def _backward(call: NormBackward) -> Gradients:
    mask = formulas.mask_of_saved(call.dy, call.saved_mask, call.p, call.store_bits)
    return Gradients(*fused_kernels.norm_backward(*call[:5], mask, call.centred, call.wanted))


def _backward_outputs(call: NormBackward) -> Gradients:
    dy, dtype = call.dy, computed(call.dy.dtype)
    gradients = (
        formulas.empty_like(dy),
        dy.new_empty(dy.shape[-1:], dtype=dtype),
        formulas.empty_like(call.residual_out),
        *(dy.new_empty(dy.shape[-1:], dtype=dtype) for _ in range(2)),
    )
    return Gradients(*(x if wants else None for x, wants in zip(gradients, call.wanted, strict=True)))


NORM_BACKWARD = Op("norm_backward", NormBackward, _backward_outputs, _backward, check=formulas.check_real)

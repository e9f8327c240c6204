"""The fused functions below autograd: kernels with their draw, gradients, and the ops ``torch.ops.fastdrop.*`` that
compilers see of them.

A kernel takes a seed, or None where everything is kept, and gives back what backward wants of the mask: its words or,
for a relu, those of what is kept and positive. What was not asked for is None, and an empty tensor where an op must
give one. Backward takes that or, unless ``bits``, the seed, as ``kept``.

A gradient comes from a kernel where tensors are plain and nobody differentiates it, from an op where a compiler looks
on, and is composed of torch's ops and the mask's in all other cases: it then has derivatives of any order.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import checks
from ...core.activations import ACTIVATIONS, keeps_signs
from ...core.mask import word_count
from ...core.random import keep_scale, threshold
from ..runtime import fused_kernels, mask_kernels, seeds
from ..runtime.dispatch import can_call_kernel, hide_from_dynamo
from ..runtime.dispatch.ops import below_autograd
from ..runtime.dispatch.tensors import may_be_differentiated_forward
from . import mask as mask_ops
from .mask import overload

POINTWISE = (
    "(Tensor x, Tensor? bias, Tensor? factor, Tensor? residual, Tensor? seed, {p} p, str? activation, bool bits)"
    " -> (Tensor y, Tensor kept)"
)
POINTWISE_BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor? bias, Tensor? factor, Tensor? kept, {p} p, bool bits, str? activation, "
    "ScalarType dtype, bool bias_gradient, bool factor_gradient) -> (Tensor dx, Tensor dfactor, Tensor dbias)"
)
NORM = (
    "(Tensor x, Tensor? bias, Tensor? residual, Tensor? weight, Tensor? shift, Tensor? seed, {p} p, float eps, "
    "bool centred, bool bits) -> (Tensor y, Tensor sum, Tensor statistics, Tensor kept)"
)
NORM_BACKWARD = (
    "(Tensor dy, Tensor? dsum, Tensor sum, Tensor statistics, Tensor? weight, Tensor? kept, {p} p, bool bits, "
    "bool centred, ScalarType dtype, bool[5] wanted) -> "
    "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dshift, Tensor dbias)"
)
SOFTMAX = (
    "(Tensor scores, Tensor? mask, Tensor? seed, {p} p, float scale, bool causal, bool bits, bool keep)"
    " -> (Tensor y, Tensor probabilities, Tensor kept)"
)
SOFTMAX_BACKWARD = "(Tensor dy, Tensor probabilities, Tensor? kept, {p} p, bool bits, float scale) -> (Tensor dscores)"

P = float | Tensor
Maybe = Tensor | None

# ---- kernels ----


def pointwise(
    x: Tensor, bias: Maybe, factor: Maybe, residual: Maybe, seed: Any, p: P, activation: str | None, bits: bool
) -> tuple[Tensor, Maybe]:
    code = _code(activation)
    words, a, draw = _to_draw(x, seed, p)
    signs = bits and _by_signs(activation, factor)
    y, kept = fused_kernels.pointwise_forward(x, bias, factor, residual, words, a, code, signs, draw)
    return y, kept if signs else words if bits else None


def pointwise_backward(
    dy: Tensor,
    x: Maybe,
    bias: Maybe,
    factor: Maybe,
    kept: Maybe,
    p: P,
    bits: bool,
    activation: str | None,
    dtype: torch.dtype,
    bias_gradient: bool,
    factor_gradient: bool,
) -> tuple[Tensor, Maybe, Maybe]:
    own = x is None and factor is None and activation is None and dy.dtype is dtype
    if own and not bias_gradient and not factor_gradient:  # dropout's
        if kept is None:
            return dy, None, None
        return (
            mask_ops._backward(dy, kept, p, None) if bits else mask_ops._forward(dy, kept, p, None, False)[0],
            None,
            None,
        )
    code, gradients = _code(activation), (bias_gradient, factor_gradient)
    words, a = _again(dy, kept, p, bits)
    return fused_kernels.pointwise_backward(dy, x, bias, factor, words, a, code, dtype, *gradients)


def norm(
    x: Tensor,
    bias: Maybe,
    residual: Maybe,
    weight: Maybe,
    shift: Maybe,
    seed: Any,
    p: P,
    eps: float,
    centred: bool,
    bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Maybe]:
    words, a, draw = _to_draw(x, seed, p)
    y, sum, statistics = fused_kernels.norm_forward(x, bias, residual, words, weight, shift, a, eps, centred, draw)
    return y, sum, statistics, words if bits else None


def norm_backward(
    dy: Tensor,
    dsum: Maybe,
    sum: Tensor,
    statistics: Tensor,
    weight: Maybe,
    kept: Maybe,
    p: P,
    bits: bool,
    centred: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Maybe, ...]:
    words, a = _again(dy, kept, p, bits)
    return fused_kernels.norm_backward(dy, dsum, sum, statistics, weight, words, a, centred, dtype, wanted)


def softmax(
    scores: Tensor, mask: Maybe, seed: Any, p: P, scale: float, causal: bool, bits: bool, keep: bool
) -> tuple[Tensor, Maybe, Maybe]:
    """Probabilities are None too where y is what they are: where nothing can be dropped."""
    words, a, draw = _to_draw(scores, seed, p)
    keep = keep and words is not None
    y, probabilities = fused_kernels.softmax_forward(scores, mask, words, a, scale, causal, keep, draw)
    return y, probabilities, words if bits else None


def softmax_backward(dy: Tensor, probabilities: Tensor, kept: Maybe, p: P, bits: bool, scale: float) -> tuple[Tensor]:
    words, a = _again(dy, kept, p, bits)
    return (fused_kernels.softmax_backward(dy, probabilities, words, a, scale),)


def _to_draw(x: Tensor, seed: Any, p: P) -> tuple[Maybe, float, fused_kernels.Draw | None]:
    """The words of a mask of x, the scale of what is kept, and what forward needs if it is to draw the words."""
    if seed is None:
        return None, 1.0, None
    cut = threshold(mask_ops.probability(p))
    words, draw = fused_kernels.words_for(x, _number(seed, x), cut)
    return words, keep_scale(cut), draw


def _again(dy: Tensor, kept: Maybe, p: P, bits: bool) -> tuple[Maybe, float]:
    """Words and scale for backward, of what was kept: words, or the seed to draw them by once more."""
    if kept is None:
        return None, 1.0
    cut = threshold(mask_ops.probability(p))
    return kept if bits else mask_kernels.draw(dy, dy.numel(), _number(kept, dy), cut), keep_scale(cut)


def _number(seed: Any, x: Tensor) -> Any:
    return seeds.for_kernel(seed, x) if isinstance(seed, Tensor) else seed


def _code(activation: str | None) -> int:
    checks.choice("activation", activation, tuple(ACTIVATIONS))
    return ACTIVATIONS[activation]


def _by_signs(activation: str | None, factor: Maybe) -> bool:
    return keeps_signs(ACTIVATIONS[activation], factor is not None)


# ---- shapes alone ----


def _pointwise_fake(
    x: Tensor, bias: Maybe, factor: Maybe, residual: Maybe, seed: Maybe, p: P, activation: str | None, bits: bool
) -> tuple[Tensor, Maybe]:
    _code(activation)
    kept = bits and (seed is not None or _by_signs(activation, factor))
    dtype = (x if residual is None else residual).dtype
    return torch.empty_like(fused_kernels.layout_of_sum(x, residual), dtype=dtype), _words(x) if kept else None


def _pointwise_backward_fake(
    dy: Tensor,
    x: Maybe,
    bias: Maybe,
    factor: Maybe,
    kept: Maybe,
    p: P,
    bits: bool,
    activation: str | None,
    dtype: torch.dtype,
    bias_gradient: bool,
    factor_gradient: bool,
) -> tuple[Tensor, Maybe, Maybe]:
    _code(activation)
    dbias = dy.new_empty(dy.shape[-1:], dtype=fused_kernels.computed(dtype)) if bias_gradient else None
    dx = torch.empty_like(dy, dtype=dtype)
    return dx, torch.empty_like(dx) if factor_gradient else None, dbias


def _norm_fake(
    x: Tensor,
    bias: Maybe,
    residual: Maybe,
    weight: Maybe,
    shift: Maybe,
    seed: Maybe,
    p: P,
    eps: float,
    centred: bool,
    bits: bool,
) -> tuple[Tensor, Tensor, Tensor, Maybe]:
    statistics = x.new_empty((math.prod(x.shape[:-1]), 2), dtype=fused_kernels.computed(x.dtype))
    kept = _words(x) if bits and seed is not None else None
    return _empty(x), _empty(x if residual is None else residual), statistics, kept


def _norm_backward_fake(
    dy: Tensor,
    dsum: Maybe,
    sum: Tensor,
    statistics: Tensor,
    weight: Maybe,
    kept: Maybe,
    p: P,
    bits: bool,
    centred: bool,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Maybe, ...]:
    shape = dy.shape[-1:]
    results = [
        _empty(dy, dtype),
        _empty(sum),
        *(dy.new_empty(shape, dtype=fused_kernels.computed(dtype)) for _ in range(3)),
    ]
    return tuple(result if needed else None for result, needed in zip(results, wanted, strict=True))


def _softmax_fake(
    scores: Tensor, mask: Maybe, seed: Maybe, p: P, scale: float, causal: bool, bits: bool, keep: bool
) -> tuple[Tensor, Maybe, Maybe]:
    drops = seed is not None
    y = torch.empty_like(scores)
    return y, _empty(scores) if keep and drops else None, _words(scores) if bits and drops else None


def _softmax_backward_fake(dy: Tensor, *rest: Any) -> tuple[Tensor]:
    return (torch.empty_like(dy),)


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _words(x: Tensor) -> Tensor:
    return x.new_empty(word_count(x.numel()), dtype=torch.int32)


# ---- formulas ----


def wide(x: Tensor) -> Tensor:
    """As kernels compute."""
    return x if x.is_complex() else x.to(fused_kernels.computed(x.dtype))


def activated(h: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return torch.relu(h)
    if activation == "silu":
        return h * torch.sigmoid(h)  # `F.silu` has no forward-mode derivative of its gradient
    if activation is None:
        return h
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


def normalised(sum: Tensor, weight: Maybe, shift: Maybe, eps: float, centred: bool) -> Tensor:
    sum = wide(sum)
    if centred:
        sum = sum - sum.mean(-1, keepdim=True)
    normal = sum * torch.rsqrt((sum * sum).mean(-1, keepdim=True) + eps)
    if weight is not None:
        normal = normal * weight.to(normal.dtype)
    return normal if shift is None else normal + shift.to(normal.dtype)


def softmax_of(scores: Tensor, mask: Maybe, scale: float, causal: bool) -> Tensor:
    """Rows in which nothing is left are 0."""
    logits = wide(scores) * scale
    if mask is not None:
        logits = logits + mask.to(logits.dtype)
    if not logits.shape[-1]:
        return logits
    hidden = None
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        hidden = seen.logical_not()
        logits = logits.masked_fill(hidden, -math.inf)
    lost = logits.detach().amax(-1, keepdim=True) == -math.inf
    probabilities = torch.softmax(logits.masked_fill(lost, 0.0), -1).masked_fill(lost, 0.0)
    return probabilities if hidden is None else probabilities.masked_fill(hidden, 0.0)


# ---- gradients ----


def _masked(x: Tensor, kept: Maybe, p: P, bits: bool) -> Tensor:
    return x if kept is None else mask_ops.masked(x, kept, p, None, bits)


def _composes() -> bool:
    """Whether somebody wants a gradient's derivative."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return may_be_differentiated_forward()


def _gradient_of(name: str, dy: Tensor, p: P) -> Any:
    return KERNELS[name][0] if can_call_kernel(dy) else overload(getattr(torch.ops.fastdrop, name), p)


@contextlib.contextmanager
def _differentiating() -> Iterator[dict[str, bool]]:
    """Has a formula leave a graph, and says to `torch.autograd.grad` whether it must last."""
    lasting = torch.is_grad_enabled()
    with torch.enable_grad():
        yield {"create_graph": lasting}


def _cast(x: Maybe, dtype: torch.dtype | None, wanted: bool = True) -> Maybe:
    return x.to(dtype) if wanted and x is not None and dtype is not None else None


def _of_columns(x: Tensor) -> Tensor:
    return wide(x).sum_to_size(x.shape[-1:])


def keep_pointwise(
    ctx: Any,
    x: Tensor,
    bias: Maybe,
    factor: Maybe,
    kept: Maybe,
    p: P,
    activation: str | None,
    bits: bool,
) -> None:
    """Data is kept only where the gradient asks for it: for a curved activation's slope, and for a factor's."""
    if bits and _by_signs(activation, factor):
        activation = None
    data = (None, None) if activation is None and factor is None else (x, bias)
    of_bias = None if bias is None else bias.dtype
    _keep(ctx, *data, factor, kept, p, bits, activation, x.dtype, of_bias)


def pointwise_gradients(
    needs: Any,
    dy: Maybe,
    x: Maybe,
    bias: Maybe,
    factor: Maybe,
    kept: Maybe,
    p: P,
    bits: bool,
    activation: str | None,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[Maybe, Maybe, Maybe, Maybe]:
    """dx, dbias, dfactor and dresidual, of those that are needed."""
    needs_x, needs_bias, needs_factor, needs_residual = needs
    dresidual = dy if needs_residual else None
    if dy is None or not (needs_x or needs_bias or needs_factor):
        return None, None, None, dresidual
    if not _composes():
        backward = _gradient_of("pointwise_backward", dy, p)
        data, wanted = (x, bias, factor, kept), (needs_bias, needs_factor)
        dx, dfactor, dbias = backward(dy, *data, p, bits, activation, dtype, *wanted)
    else:
        dx, dfactor = wide(dy), None
        if x is not None:  # then the mask, so that what it drops is 0 whatever the slope is there
            with _differentiating() as lasting:
                h = wide(x) if bias is None else wide(x) + wide(bias)
                h, factor = _alias(h), None if factor is None else _alias(wide(factor))
                y = activated(h, activation) if factor is None else activated(h, activation) * factor
                dx, *others = torch.autograd.grad(y, [h] if factor is None else [h, factor], dy.to(y.dtype), **lasting)
            dfactor = _masked(others[0], kept, p, bits) if others else None
        dx = _masked(dx, kept, p, bits)
        dbias = _of_columns(dx) if needs_bias else None
    dfactor = _cast(dfactor, dtype, needs_factor)
    return _cast(dx, dtype, needs_x), _cast(dbias, bias_dtype, needs_bias), dfactor, dresidual


def _alias(x: Tensor) -> Tensor:
    """x for a formula, also where it needs no gradient, or where two arguments are one tensor."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def keep_norm(
    ctx: Any,
    x: Tensor,
    bias: Maybe,
    weight: Maybe,
    shift: Maybe,
    sum: Tensor,
    statistics: Tensor,
    kept: Maybe,
    p: P,
    eps: float,
    centred: bool,
    bits: bool,
) -> None:
    dtypes = [x.dtype, None if bias is None else bias.dtype, None if shift is None else shift.dtype]
    _keep(ctx, sum, statistics, weight, kept, p, bits, eps, centred, *dtypes)


def norm_gradients(
    needs: Any,
    dy: Maybe,
    dsum: Maybe,
    sum: Tensor,
    statistics: Tensor,
    weight: Maybe,
    kept: Maybe,
    p: P,
    bits: bool,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    shift_dtype: torch.dtype | None,
) -> tuple[Maybe, ...]:
    """dx, dbias, dresidual, dweight and dshift, of those that are needed."""
    needs_x, needs_bias, needs_residual, needs_weight, needs_shift = needs
    if not (needs_x or needs_bias):
        kept = None
    of_stream = (needs_x, needs_bias, False, needs_residual), (None, None, None, kept, p, bits, None, dtype, bias_dtype)
    if dy is None:
        dx, dbias, _, dresidual = pointwise_gradients(of_stream[0], dsum, *of_stream[1])
        return dx, dbias, dresidual, None, None
    weight_dtype = None if weight is None else weight.dtype
    if not _composes():
        backward = _gradient_of("norm_backward", dy, p)
        wanted = needs_x, needs_residual, needs_weight, needs_shift, needs_bias
        data = (dy, dsum, sum, statistics, weight, kept)
        dx, dresidual, dweight, dshift, dbias = backward(*data, p, bits, centred, dtype, wanted)
        dx, dresidual = dx if needs_x else None, dresidual if needs_residual else None
        dbias = _cast(dbias, bias_dtype, needs_bias)
    else:
        with _differentiating() as lasting:
            inputs = [_alias(wide(x)) for x in (sum, weight) if x is not None]
            y = normalised(inputs[0], None if weight is None else inputs[1], None, eps, centred)
            dresidual, *others = torch.autograd.grad(y, inputs, dy.to(y.dtype), **lasting)
        dweight, dshift = next(iter(others), None), _of_columns(dy)
        if dsum is not None:
            dresidual = dresidual + wide(dsum)
        dx, dbias, _, dresidual = pointwise_gradients(of_stream[0], dresidual, *of_stream[1])
        dresidual = _cast(dresidual, sum.dtype)
    return dx, dbias, dresidual, _cast(dweight, weight_dtype, needs_weight), _cast(dshift, shift_dtype, needs_shift)


def keep_softmax(
    ctx: Any,
    scores: Tensor,
    mask: Maybe,
    probabilities: Maybe,
    kept: Maybe,
    p: P,
    scale: float,
    causal: bool,
    bits: bool,
) -> None:
    """Of data the probabilities alone, or what they are made of where they were not asked for."""
    of_mask = (None, None) if mask is None else (mask.shape, mask.dtype)
    data = (scores, mask) if probabilities is None else (None, None)
    _keep(ctx, probabilities, kept, p, bits, scale, scores.dtype, *of_mask, *data, causal)


def softmax_gradients(
    needs: Any,
    dy: Maybe,
    dprobabilities: Maybe,
    probabilities: Maybe,
    kept: Maybe,
    p: P,
    bits: bool,
    scale: float,
    dtype: torch.dtype,
    mask_shape: Any,
    mask_dtype: torch.dtype | None,
    scores: Maybe,
    mask: Maybe,
    causal: bool,
) -> tuple[Maybe, Maybe]:
    """Of scores and mask, of those that are needed. Probabilities have a gradient where that of this is wanted."""
    needs_scores, needs_mask = needs
    if (dy is None and dprobabilities is None) or not (needs_scores or needs_mask):
        return None, None
    if probabilities is None:
        probabilities = overload(torch.ops.fastdrop.softmax, p)(scores, mask, None, p, scale, causal, False, False)[0]
    if dy is not None and dprobabilities is None and not _composes():
        once = scale
        if needs_mask:  # which is summed, and then multiplied, before anything is rounded
            dy, probabilities, once = wide(dy), wide(probabilities), 1.0
        (slope,) = _results(_gradient_of("softmax_backward", dy, p)(dy, probabilities, kept, p, bits, once))
    else:
        normal = wide(probabilities)
        g = torch.zeros_like(normal) if dprobabilities is None else wide(dprobabilities)
        if dy is not None:
            g = g + _masked(wide(dy), kept, p, bits)
        slope, once = (g - (g * normal).sum(-1, keepdim=True)) * normal, 1.0
    dmask = slope.sum_to_size(mask_shape).to(mask_dtype) if needs_mask else None
    return _cast(slope if once == scale else slope * scale, dtype, needs_scores), dmask


def _keep(ctx: Any, *values: Any) -> None:
    """Keeps tensors as autograd wants it, others as they are; `ops.mask._kept` has them again."""
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))
    ctx.others = [None if isinstance(value, Tensor) else value for value in values]
    ctx.set_materialize_grads(False)


# ---- ops ----


class _Op(torch.autograd.Function):
    """As it is, of an op that must not be differentiated: torch says so then."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return below_autograd(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass


class _Pointwise(_Op):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, x, bias, factor, _, seed, p, activation, bits = inputs
        words = bits and (seed is not None or _by_signs(activation, factor))
        ctx.mark_non_differentiable(output[1])
        keep_pointwise(ctx, x, bias, factor, output[1] if words else seed, p, activation, bits)

    @staticmethod
    def backward(ctx: Any, dy: Maybe, _: Any) -> tuple[Any, ...]:
        gradients = pointwise_gradients(ctx.needs_input_grad[2:6], dy, *mask_ops._kept(ctx))
        return None, None, *gradients, None, None, None, None


class _Norm(_Op):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, x, bias, _, weight, shift, seed, p, eps, centred, bits = inputs
        _, sum, statistics, words = output
        ctx.mark_non_differentiable(statistics, words)
        kept = words if bits and seed is not None else seed
        keep_norm(ctx, x, bias, weight, shift, sum, statistics, kept, p, eps, centred, bits)

    @staticmethod
    def backward(ctx: Any, dy: Maybe, dsum: Maybe, *_: Any) -> tuple[Any, ...]:
        gradients = norm_gradients(ctx.needs_input_grad[2:7], dy, dsum, *mask_ops._kept(ctx))
        return None, None, *gradients, None, None, None, None, None


class _Softmax(_Op):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, scores, mask, seed, p, scale, causal, bits, keep = inputs
        y, probabilities, words = output
        apart = keep and seed is not None
        ctx.mark_non_differentiable(words, *(() if apart else (probabilities,)))
        kept = words if bits and seed is not None else seed
        normal = probabilities if apart else y if seed is None else None
        keep_softmax(ctx, scores, mask, normal, kept, p, scale, causal, bits)

    @staticmethod
    def backward(ctx: Any, dy: Maybe, dprobabilities: Maybe, _: Any) -> tuple[Any, ...]:
        gradients = softmax_gradients(ctx.needs_input_grad[2:4], dy, dprobabilities, *mask_ops._kept(ctx))
        return None, None, *gradients, None, None, None, None, None, None


def _results(results: Any) -> Any:
    """An op with one result gives that and no tuple."""
    return (results,) if isinstance(results, Tensor) else results


def _whole(kernel: Any) -> Any:
    """A kernel as an op must have it: every result is a tensor, and none is another or an argument."""

    def called(first: Tensor, *rest: Any) -> Any:
        mask_kernels.check_real(first, "a fused function")
        seen, results = {id(value) for value in (first, *rest)}, []
        for result in kernel(first, *rest):
            if result is None:
                result = first.new_empty(0)
            elif id(result) in seen:
                result = result.clone()
            seen.add(id(result))
            results.append(result)
        return tuple(results) if len(results) > 1 else results[0]

    return called


def _by_sample(overload: str, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """The rule under vmap: one after the other. Functions compose theirs of other ops, and seldom come here."""
    op = operator.attrgetter(overload)(torch.ops.fastdrop)
    count = max(info.batch_size, 1)  # of none the shape

    def samples(value: Any, axis: int | None) -> list[Any]:
        if axis is not None and not info.batch_size:
            return [mask_ops._sample_like(value, axis)]
        return mask_ops._samples(value, axis, count)

    columns = [samples(value, axis) for value, axis in zip(arguments, in_dims, strict=True)]
    results = [_results(op(*sample)) for sample in zip(*columns, strict=True)]
    stacked = [torch.stack(result)[: info.batch_size] for result in zip(*results, strict=True)]
    return (tuple(stacked), (0,) * len(stacked)) if len(stacked) > 1 else (stacked[0], 0)


KERNELS: dict[str, tuple[Any, Any, str, Any]] = {
    "pointwise": (pointwise, _pointwise_fake, POINTWISE, _Pointwise),
    "pointwise_backward": (pointwise_backward, _pointwise_backward_fake, POINTWISE_BACKWARD, _Op),
    "norm": (norm, _norm_fake, NORM, _Norm),
    "norm_backward": (norm_backward, _norm_backward_fake, NORM_BACKWARD, _Op),
    "softmax": (softmax, _softmax_fake, SOFTMAX, _Softmax),
    "softmax_backward": (softmax_backward, _softmax_backward_fake, SOFTMAX_BACKWARD, _Op),
}


def register(name: str, kernel: Any, fake: Any, schema: str, function: type[_Op]) -> None:
    """An op, with p as a number and as a tensor."""
    hide_from_dynamo(kernel)
    for suffix, p in mask_ops.P_TYPES.items():
        vmap = functools.partial(_by_sample, name + (suffix or ".default"))
        mask_ops._register(name + suffix, schema.format(p=p), _whole(kernel), _whole(fake), vmap, function)


for _name, _parts in KERNELS.items():
    register(_name, *_parts)

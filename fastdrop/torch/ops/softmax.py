"""The ops ``torch.ops.fastdrop.softmax`` and ``softmax_backward``:
``dropout(softmax(softmax_scale * scores + attn_mask), p)``.

`functional.fused` calls them for ``softmax_dropout``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime import fused_kernels
from ..runtime.dtypes import wide
from . import formulas
from .record import Maybe, MaybeSeed, Op, P, saved_mask


class Softmax(NamedTuple):
    scores: Tensor
    attn_mask: Maybe
    seed: MaybeSeed
    p: P
    softmax_scale: float
    causal: bool
    store_bits: bool
    keep_probabilities: bool


class Result(NamedTuple):
    """``probabilities`` are those before dropout. They are None if nothing can be dropped, because y has them then."""

    y: Tensor
    probabilities: Maybe
    saved_mask: Maybe


class SoftmaxBackward(NamedTuple):
    dy: Tensor
    probabilities: Tensor
    saved_mask: Maybe
    p: P
    store_bits: bool
    softmax_scale: float


class Saved(NamedTuple):
    """``scores`` and ``attn_mask`` are there only to compute the probabilities again if these were not kept."""

    probabilities: Maybe
    saved_mask: Maybe
    p: float | Tensor
    store_bits: bool
    softmax_scale: float
    dtype: torch.dtype
    attn_mask_shape: Any
    attn_mask_dtype: torch.dtype | None
    scores: Maybe
    attn_mask: Maybe
    causal: bool


def softmax_of(scores: Tensor, attn_mask: Maybe, scale: float, causal: bool) -> Tensor:
    """The softmax, composed of torch's ops. A row in which nothing is left is 0."""
    logits = wide(scores) * scale
    if attn_mask is not None:
        logits = logits + attn_mask.to(logits.dtype)
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


def _keeps_probabilities(call: Softmax) -> bool:
    return call.keep_probabilities and call.seed is not None


def _softmax(call: Softmax) -> Result:
    mask = formulas.mask_of_call(call.scores, call.seed, call.p)
    options = call.softmax_scale, call.causal, _keeps_probabilities(call)
    y, probabilities = fused_kernels.softmax_forward(call.scores, call.attn_mask, mask, *options)
    return Result(y, probabilities, mask.words if call.store_bits else None)


def _softmax_outputs(call: Softmax) -> Result:
    scores, has_words = call.scores, call.store_bits and call.seed is not None
    probabilities = formulas.empty_like(scores) if _keeps_probabilities(call) else None
    return Result(torch.empty_like(scores), probabilities, formulas.empty_words(scores) if has_words else None)


def _softmax_saved(call: Softmax, results: Result, needs: Any) -> Saved:
    attn_mask, has_words = call.attn_mask, call.store_bits and call.seed is not None
    probabilities = results.probabilities if _keeps_probabilities(call) else results.y if call.seed is None else None
    return Saved(
        probabilities,
        saved_mask(results.saved_mask if has_words else None, call.seed),
        call.p,
        call.store_bits,
        call.softmax_scale,
        call.scores.dtype,
        None if attn_mask is None else attn_mask.shape,
        None if attn_mask is None else attn_mask.dtype,
        call.scores if probabilities is None else None,
        attn_mask if probabilities is None else None,
        call.causal,
    )


def _softmax_gradients(needs: Any, saved: Saved, dy: Maybe, dprobabilities: Maybe = None, *_: Any) -> tuple[Maybe, ...]:
    """dscores and dattn_mask, of those that are needed. Probabilities have a gradient if that of this one is wanted."""
    needs_scores, needs_mask, *_ = needs
    if (dy is None and dprobabilities is None) or not (needs_scores or needs_mask):
        return None, None
    probabilities, scale = saved.probabilities, saved.softmax_scale
    if probabilities is None:
        again = Softmax(saved.scores, saved.attn_mask, None, saved.p, scale, saved.causal, False, False)  # type: ignore[arg-type]
        probabilities, *_ = SOFTMAX(again)
    mask = saved.saved_mask, saved.p, saved.store_bits
    if dy is not None and dprobabilities is None and not formulas.is_differentiated():
        once = scale
        if needs_mask:  # the mask's gradient is summed, and then multiplied, before anything is rounded
            dy, probabilities, once = wide(dy), wide(probabilities), 1.0
        slope = SOFTMAX_BACKWARD.run(SoftmaxBackward(dy, probabilities, *mask, once))
    else:
        normal = wide(probabilities)
        g = torch.zeros_like(normal) if dprobabilities is None else wide(dprobabilities)
        if dy is not None:
            g = g + formulas.masked(wide(dy), *mask)
        slope, once = (g - (g * normal).sum(-1, keepdim=True)) * normal, 1.0
    dmask = slope.sum_to_size(saved.attn_mask_shape).to(saved.attn_mask_dtype) if needs_mask else None
    return formulas.cast(slope if once == scale else slope * scale, saved.dtype, needs_scores), dmask


SOFTMAX = Op(
    "softmax",
    Softmax,
    _softmax_outputs,
    _softmax,
    _softmax_saved,
    _softmax_gradients,
    differentiable=lambda call: 1 + _keeps_probabilities(call),
    check=formulas.check_real,
)


def _backward(call: SoftmaxBackward) -> Tensor:
    mask = formulas.mask_of_saved(call.dy, call.saved_mask, call.p, call.store_bits)
    return fused_kernels.softmax_backward(call.dy, call.probabilities, mask, call.softmax_scale)


SOFTMAX_BACKWARD = Op(
    "softmax_backward", SoftmaxBackward, lambda call: torch.empty_like(call.dy), _backward, check=formulas.check_real
)

"""The ops ``torch.ops.fastdrop.attention`` and ``attention_backward``: two matrix products around a softmax and its
dropout.

`functional.attention` calls them, or their kernels, for tensors on the CPU. `runtime.attention_kernels` does the work.
Forward keeps its arguments, its result, two numbers for each query and the seed or the mask's words: backward computes
the scores again, and draws the mask again unless it has the words.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.mask import word_count
from ...core.random import threshold as threshold_of
from ..runtime import attention_kernels, fused_kernels, mask_kernels
from ..runtime.attention_kernels import Gradients
from ..runtime.dispatch import hide_from_dynamo
from ..runtime.dtypes import TAGS, computed
from ..runtime.located import Located
from ..runtime.memory import check_words
from . import formulas
from . import mask as mask_ops
from .record import Flags4, Maybe, MaybeSizes, Op, P, Seed, saved_mask
from .softmax import softmax_of


class Attention(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Maybe
    seed: Seed
    p: P
    causal: bool
    softmax_scale: float
    store_bits: bool
    keep: bool  # what backward needs
    mask_shape: MaybeSizes = None


class Result(NamedTuple):
    """``saved_mask`` has the mask's words if backward is to have them."""

    y: Tensor
    statistics: Maybe  # [*, L, 2] of each query's scores, in the dtype that is computed in: the largest; 1 / sum of exp
    saved_mask: Maybe


class AttentionBackward(NamedTuple):
    dy: Tensor
    query: Tensor
    key: Tensor
    value: Maybe
    attn_mask: Maybe
    y: Maybe
    statistics: Tensor
    saved_mask: Tensor  # words if ``store_bits``, otherwise the seed
    p: P
    causal: bool
    softmax_scale: float
    store_bits: bool
    wanted: Flags4  # of the gradients of query, key, value and attn_mask
    mask_shape: MaybeSizes = None


class Saved(NamedTuple):
    """value's own gradient needs neither value nor y."""

    query: Tensor
    key: Tensor
    value: Maybe
    attn_mask: Maybe
    y: Maybe
    statistics: Tensor
    saved_mask: Tensor
    p: float | Tensor
    causal: bool
    softmax_scale: float
    store_bits: bool
    mask_shape: Any


# ---- which arguments are regular ----


def is_regular(
    query: Tensor, key: Tensor, value: Tensor, mask: Maybe, causal: bool, scale: float | None, gqa: bool
) -> bool:
    """Whether shapes and dtypes are those that `scaled_dot_product_attention` documents, and no tensor is empty.

    torch's own function broadcasts more, and has its own errors for the rest.
    """
    if not _are_regular_shapes(query.shape, key.shape, value.shape, gqa):
        return False
    if not has_known_dtypes(query, key, value, mask) or (scale is not None and not abs(scale) < math.inf):
        return False
    if mask is not None:
        scores = (*query.shape[:-1], value.shape[-2])
        extents = zip(reversed(mask.shape), reversed(scores), strict=False)
        if causal or mask.dim() > len(scores) or any(extent not in (1, full) for extent, full in extents):
            return False
    return True


def _are_regular_shapes(query: Any, key: Any, value: Any, gqa: bool) -> bool:
    if not len(query) == len(key) == len(value) >= 2 + gqa:
        return False
    *outer, _, width = query
    if outer and gqa and key[-3] and outer[-1] % key[-3] == 0:
        outer = [*outer[:-1], key[-3]]
    keys = value[-2]
    if list(key) != [*outer, keys, width] or list(value[:-2]) != outer:
        return False
    return bool(math.prod(query) > 0 and math.prod(value) > 0)


def has_strides(mask_shape: Any, query: Tensor) -> bool:
    """Whether kernels can find the cells of a mask of this shape. To them the axes before the heads are one, so these
    either all share their cells, or none does."""
    if mask_shape is None:
        return True
    pairs = zip(mask_shape[:-3], query.shape[:-3], strict=True)
    return len({cells == 1 for cells, extent in pairs if extent != 1}) < 2


def _check_mask_shape(call: Any) -> None:
    """Raises unless the mask of an `Attention` or an `AttentionBackward` has a shape that kernels take."""
    shape, query = call.mask_shape, call.query
    weights = (*query.shape[:-1], call.key.shape[-2])
    if shape is None:
        return
    fits = len(shape) == len(weights) and all(n in (1, extent) for n, extent in zip(shape, weights, strict=True))
    if not fits or shape[-1] != weights[-1] or not has_strides(shape, query):
        raise ValueError(
            f"mask_shape must have 1 or the full extent of each axis of the weights, of shape {tuple(weights)}, all "
            f"keys, and 1 on all axes before the heads or on none, but got {tuple(shape)}"
        )


def has_known_dtypes(query: Tensor, key: Tensor, value: Tensor, mask: Maybe) -> bool:
    """Whether dtypes are the documented ones, on one device."""
    known = query.dtype in TAGS and query.dtype is key.dtype is value.dtype
    if mask is not None:
        known = known and mask.dtype in (torch.bool, torch.float32, query.dtype) and mask.device == query.device
    return known and query.device == key.device == value.device


def _check_call(call: Attention) -> None:
    """Raises unless the op's arguments are regular. `functional.attention` has made sure of it."""
    formulas.check_real(call)
    query, key, value, mask = call[:4]
    if not is_regular(query, key, value, mask, call.causal, call.softmax_scale, query.dim() > 2):
        given = _described(query=query, key=key, value=value, mask=mask)
        raise ValueError(
            "query, key, value and mask must be (*, H, L, E), (*, H, S, E), (*, H, S, Ev) and broadcastable to (*, H, "
            "L, S), of one float dtype and not empty, without a mask where causal, and scale must be finite, but got "
            f"{given}, causal {call.causal}, scale {call.softmax_scale}"
        )
    _check_mask_shape(call)


def _check_gradient(call: AttentionBackward) -> None:
    """Raises unless backward has tensors that forward may have had: ops are called by hand, and hooks may change saved
    tensors."""
    dy, query, key, value, attn_mask, y, statistics = call[:7]
    wanted, of_scores = call.wanted, call.wanted[0] or call.wanted[1] or call.wanted[3]
    values = key.new_empty(()).expand(*key.shape[:-1], dy.shape[-1] if dy.dim() else 0) if value is None else value
    if not is_regular(query, key, values, attn_mask, call.causal, call.softmax_scale, query.dim() > 2):
        raise ValueError(
            "query, key, value and mask must be those of forward, but got "
            + _described(query=query, key=key, value=value, mask=attn_mask)
        )
    _check_mask_shape(call)
    shape = (*query.shape[:-1], values.shape[-1])
    for name, x, wide in (
        ("dy", dy, query.dtype),
        ("y", y, query.dtype),
        ("statistics", statistics, computed(query.dtype)),
    ):
        if x is not None:
            fused_kernels.check(name, x, (*query.shape[:-1], 2) if x is statistics else shape, wide, query)
    if of_scores and (value is None or y is None):
        raise ValueError("value and y must be tensors for the gradients of query, key and attn_mask, but got None")
    if wanted[3] and (attn_mask is None or attn_mask.dtype is torch.bool):
        raise ValueError("attn_mask must be of a float dtype for its gradient, but got " + _described(mask=attn_mask))


def _described(**tensors: Maybe) -> str:
    return ", ".join(
        f"{name} None" if x is None else f"{name} {tuple(x.shape)} of {x.dtype}" for name, x in tensors.items()
    )


# ---- attention ----


def _kernel_call(call: Any, words: Maybe, seed: Any) -> attention_kernels.Call:
    """Of an `Attention` or an `AttentionBackward`. The mask is drawn from the seed unless there are words."""
    threshold = threshold_of(mask_ops.probability(call.p))
    seed = 0 if seed is None else mask_ops.kernel_seed(seed, call.query)
    data = call.query, call.key, call.value, call.attn_mask
    shape = None if call.mask_shape is None else tuple(call.mask_shape)
    given = attention_kernels.Call(*data, words, seed, threshold, call.softmax_scale, call.causal, shape)
    if type(seed) is Located and words is None:
        seed.check(_cells(call))
        if not given.has_strides:
            words = mask_kernels.draw_mask(call.query, _cells(call), seed, threshold)
            return given._replace(words=words, seed=0)
    return given


def _cells(call: Any) -> Any:
    """How many cells the mask has."""
    return math.prod(call.mask_shape or (*call.query.shape[:-1], call.key.shape[-2]))


def _attention(call: Attention) -> Result:
    given = _kernel_call(call, None, call.seed)
    words = given.words
    if call.store_bits and words is None:
        words = mask_kernels.draw_mask(call.query, _cells(call), given.seed, given.threshold)
        given = given._replace(words=words)
    y, statistics = attention_kernels.forward(given)
    return Result(y, statistics if call.keep else None, words if call.store_bits else None)


def _attention_outputs(call: Attention) -> Result:
    query = call.query
    y = query.new_empty((*query.shape[:-1], call.value.shape[-1]))
    statistics = query.new_empty((*query.shape[:-1], 2), dtype=computed(query.dtype)) if call.keep else None
    words = query.new_empty(word_count(_cells(call)), dtype=torch.int32) if call.store_bits else None
    return Result(y, statistics, words)


def _attention_saved(call: Attention, results: Result, needs: Any) -> Saved:
    of_scores = needs[0] or needs[1] or needs[3]
    value, y = (call.value, results.y) if of_scores else (None, None)
    data = call.query, call.key, value, call.attn_mask, y, results.statistics
    mask = saved_mask(results.saved_mask if call.store_bits else None, call.seed)
    options = call.causal, call.softmax_scale, call.store_bits, call.mask_shape
    return Saved(*data, mask, call.p, *options)  # type: ignore[arg-type]


def _attention_gradients(needs: Any, saved: Saved, dy: Maybe, *_: Any) -> tuple[Maybe, ...]:
    """dquery, dkey, dvalue and dattn_mask, of those that are needed."""
    if dy is None:
        return ()
    wanted = list(needs[:4])
    call = AttentionBackward(dy, *saved[:-1], wanted, saved.mask_shape)
    if formulas.is_differentiated():
        _check_gradient(call)
        gradients = _composed_gradients(dy, saved)
    else:
        gradients = ATTENTION_BACKWARD.run(call)
    return tuple(x if wants else None for x, wants in zip(gradients, wanted, strict=True))


ATTENTION = Op(
    "attention",
    Attention,
    _attention_outputs,
    _attention,
    _attention_saved,
    _attention_gradients,
    check=_check_call,
)


# ---- its gradient ----


def _backward(call: AttentionBackward) -> Gradients:
    _check_gradient(call)
    words: Maybe = None
    seed: Maybe = call.saved_mask
    if call.store_bits:
        words, seed = check_words(call.saved_mask, _cells(call), call.query.device), None
    return attention_kernels.backward(_kernel_call(call, words, seed), call.dy, call.y, call.statistics, call.wanted)


def _backward_outputs(call: AttentionBackward) -> Gradients:
    _check_gradient(call)
    key, mask = call.key, call.attn_mask
    shapes = call.query.shape, key.shape, (*key.shape[:-1], call.dy.shape[-1])
    dq, dk, dv = (
        call.dy.new_empty(shape) if wants else None for shape, wants in zip(shapes, call.wanted, strict=False)
    )
    return Gradients(dq, dk, dv, mask.new_empty(mask.shape) if call.wanted[3] and mask is not None else None)


ATTENTION_BACKWARD = Op(
    "attention_backward", AttentionBackward, _backward_outputs, _backward, check=formulas.check_real
)


def _composed_gradients(dy: Tensor, saved: Saved) -> tuple[Maybe, ...]:
    """dquery, dkey, dvalue and dattn_mask, composed of ops that have derivatives themselves."""
    query, key, value, attn_mask, scale = saved.query, saved.key, saved.value, saved.attn_mask, saved.softmax_scale
    dtype, wide, grouped = dy.dtype, computed(dy.dtype), query.dim() > 2
    mask = saved.saved_mask, saved.p, saved.mask_shape, saved.store_bits
    g, q, k = dy.to(wide), query.to(wide), key.to(wide)
    normal = softmax_of(q @ repeat_heads(k, q, grouped).mT, _added(attn_mask, wide), scale, saved.causal)
    dq = dk = dmask = None
    if value is not None:
        d = mask_ops.masked(g @ repeat_heads(value.to(wide), q, grouped).mT, *mask)
        d = normal * (d - (d * normal).sum(-1, keepdim=True))
        if attn_mask is not None and attn_mask.dtype is not torch.bool:
            dmask = d.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
        d = d * scale
        dq, dk = (d @ repeat_heads(k, q, grouped)).to(dtype), _sum_heads(d.mT @ q, key.shape).to(dtype)
    dropped = mask_ops.masked(normal, *mask)
    return dq, dk, _sum_heads(dropped.mT @ g, (*key.shape[:-1], dy.shape[-1])).to(dtype), dmask


def _added(attn_mask: Maybe, dtype: torch.dtype) -> Maybe:
    """What a mask adds to the scores."""
    if attn_mask is None or attn_mask.dtype is not torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=dtype).masked_fill(attn_mask.logical_not(), -math.inf)


def repeat_heads(x: Tensor, query: Tensor, gqa: bool) -> Tensor:
    """Keys or values, each repeated for all heads of query that it serves."""
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) if gqa and x.shape[-3] != query.shape[-3] else x


def _sum_heads(x: Tensor, shape: Any) -> Tensor:
    """The sums over the heads of query that one head serves."""
    return x if tuple(x.shape) == tuple(shape) else x.unflatten(-3, (shape[-3], -1)).sum(-3)


hide_from_dynamo(_attention, _backward)

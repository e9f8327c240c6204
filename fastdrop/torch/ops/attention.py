"""The ops ``torch.ops.fastdrop.attention`` and ``attention_backward``: two matrix products around a softmax and its
dropout.

`functional.attention` calls them, or their kernels, for tensors on the CPU. The scores are by far the largest tensor of
attention, so the kernels work on a few heads at a time: the scores of these heads are made, used and overwritten while
they lie in the cache. Only the probabilities are written to memory as a whole, once, and only if a gradient is wanted.
Arithmetic on 16-bit data is float32's, as in torch, but the probabilities kept for backward have 16 bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.mask import word_count
from ...core.random import keep_scale
from ...core.random import threshold as threshold_of
from ..runtime import fused_kernels, mask_kernels, memory
from ..runtime.dispatch import hide_from_dynamo
from ..runtime.dtypes import TAGS, computed
from ..runtime.fused_kernels import AddedMask, Mask
from . import formulas
from . import mask as mask_ops
from .record import Flags3, Maybe, Op, P, Seed, Sizes
from .softmax import softmax_of

# How many scores a thread works on at once, and one head's at least. Two arrays of them stay in the cache, and the
# calls that are needed, at each of which threads wait for one another, cost little beside them.
BLOCK = 1 << 20


class Attention(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Maybe
    seed: Seed
    p: P
    causal: bool
    softmax_scale: float
    keep: bool  # the mask and the probabilities, for backward


class Result(NamedTuple):
    y: Tensor
    saved_mask: Maybe
    probabilities: Maybe  # before dropout


class AttentionBackward(NamedTuple):
    dy: Tensor
    saved_mask: Tensor
    probabilities: Tensor
    query: Maybe
    key: Maybe
    value: Maybe
    p: P
    causal: bool
    softmax_scale: float
    query_shape: Sizes
    key_shape: Sizes
    value_shape: Sizes
    wanted: Flags3  # of the gradients below


class Gradients(NamedTuple):
    dquery: Maybe
    dkey: Maybe
    dvalue: Maybe


class Saved(NamedTuple):
    """value's own gradient needs none of the data. ``attn_mask`` is kept for derivatives of its gradient."""

    saved_mask: Tensor
    probabilities: Tensor
    query: Maybe
    key: Maybe
    value: Maybe
    p: float | Tensor
    causal: bool
    softmax_scale: float
    query_shape: Any
    key_shape: Any
    value_shape: Any
    attn_mask: Maybe


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
        tensors = {"query": query, "key": key, "value": value, "mask": mask}
        given = ", ".join(f"{name} {tuple(x.shape)} of {x.dtype}" for name, x in tensors.items() if x is not None)
        raise ValueError(
            "query, key, value and mask must be (*, H, L, E), (*, H, S, E), (*, H, S, Ev) and broadcastable to (*, H, "
            "L, S), of one float dtype and not empty, without a mask where causal, and scale must be finite, but got "
            f"{given}, causal {call.causal}, scale {call.softmax_scale}"
        )


def _check_gradient(dy: Tensor, saved: Any, wanted: Any) -> None:
    """Raises unless backward has the tensors that forward had. ``saved`` is a `Saved` or an `AttentionBackward`: ops
    are called by hand, and hooks may change saved tensors."""
    query_shape, key_shape, value_shape = shapes = _shapes(saved)
    if not _are_regular_shapes(query_shape, key_shape, value_shape, len(query_shape) > 2):
        raise ValueError(
            "query_shape, key_shape and value_shape must be (*, H, L, E), (*, H, S, E) and (*, H, S, Ev), and not "
            f"empty, but got {tuple(query_shape)}, {tuple(key_shape)} and {tuple(value_shape)}"
        )
    if tuple(dy.shape) != (*query_shape[:-1], value_shape[-1]):
        raise ValueError(f"dy must have shape {(*query_shape[:-1], value_shape[-1])}, but got {tuple(dy.shape)}")
    for name, shape in zip(("query", "key", "value"), shapes, strict=True):
        x = getattr(saved, name)
        if x is None:
            if wanted[0] or wanted[1]:
                raise ValueError(f"{name} must be a tensor for the gradients of query and key, but got None")
        elif tuple(x.shape) != tuple(shape) or x.dtype is not dy.dtype or x.device != dy.device:
            raise ValueError(
                f"{name} must be {dy.dtype} of shape {tuple(shape)} on {dy.device}, but got {x.dtype} of shape "
                f"{tuple(x.shape)} on {x.device}"
            )


def _shapes(saved: Any) -> tuple[Any, Any, Any]:
    return saved.query_shape, saved.key_shape, saved.value_shape


# ---- blocks ----


class Extents(NamedTuple):
    """Scores are ``[outer, heads, rows, keys]``, of as many heads as key has."""

    outer: int
    heads: int
    rows: int  # the queries of all the heads that a key serves
    queries: int
    keys: int

    @classmethod
    def of(cls, query_shape: Any, key_shape: Any) -> Extents:
        *outer, queries, _ = query_shape
        heads = key_shape[-3] if outer else 1
        rows = math.prod(outer[-1:]) // heads * queries
        return cls(math.prod(outer[:-1]), heads, rows, queries, key_shape[-2])

    @property
    def matrices(self) -> tuple[int, int, int]:
        return self.outer * self.heads, self.rows, self.keys

    def blocks(self) -> list[Block]:
        """The largest first."""
        count = max(1, BLOCK * torch.get_num_threads() // (self.rows * self.keys))
        heads, outer = min(count, self.heads), min(max(1, count // self.heads), self.outer)
        return [
            Block(self, o, h, min(outer, self.outer - o), min(heads, self.heads - h))
            for o in range(0, self.outer, outer)
            for h in range(0, self.heads, heads)
        ]


class Block(NamedTuple):
    """Heads whose scores are worked on at once: all heads of some outer indices, or some heads of one."""

    extents: Extents
    first_outer: int
    first_head: int
    outer: int
    heads: int

    @property
    def matrices(self) -> int:
        return self.outer * self.heads

    @property
    def first(self) -> int:
        return self.first_outer * self.extents.heads + self.first_head

    def of(self, x: Tensor) -> Tensor:
        """The block's part of what `_by_heads` gives, as a batch of matrices."""
        if x.dim() == 3:
            return x if self.matrices == len(x) else x[self.first : self.first + self.matrices]
        part = x[self.first_outer : self.first_outer + self.outer, self.first_head : self.first_head + self.heads]
        return part.flatten(0, 1)

    def mask(self, words: Tensor, scale: float) -> Mask:
        """The block's part of the mask, in words of its own."""
        matrix = self.extents.rows * self.extents.keys
        begin, shift = divmod(self.first * matrix, 32)
        count = word_count(self.matrices * matrix)
        low = words[begin : begin + count]
        if not shift:
            return Mask(low, scale)
        low = (low >> shift) & ((1 << (32 - shift)) - 1)
        high = words[begin + 1 : begin + 1 + count]
        low[: high.numel()] |= high << (32 - shift)
        return Mask(low, scale)

    def added(self, whole: AddedMask) -> AddedMask:
        """The block's part of what is added to the scores."""
        group = self.extents.rows // self.extents.queries
        added = whole._replace(heads=self.heads * group)
        if whole.memory is None:
            return added
        outer, head, _ = whole.strides
        return added._replace(memory=whole.memory[self.first_outer * outer + self.first_head * group * head :])


def _by_heads(x: Tensor, blocks: list[Block]) -> Tensor:
    """Matrices in the dtype that is computed in, one for each of key's heads. They have one batch axis, or two if one
    would take a copy of all."""
    x, extents = x.to(computed(x.dtype)), blocks[0].extents
    if len(blocks) == 1 or x.is_contiguous():
        return x.reshape(extents.outer * extents.heads, -1, x.shape[-1])
    return x.reshape(extents.outer, extents.heads, -1, x.shape[-1])


def _scratch(x: Tensor, blocks: list[Block]) -> Tensor:
    """Room for the scores of the largest block."""
    return x.new_empty((blocks[0].matrices, *blocks[0].extents.matrices[1:]))


def _added_mask(call: Attention, extents: Extents) -> AddedMask:
    query, mask = call.query, call.attn_mask
    if mask is None:
        return AddedMask(None, 0, extents.queries, (0, 0, 0))  # `Block.added` knows the heads
    wide = computed(query.dtype)
    mask = fused_kernels.additive(mask, wide) if mask.dtype is torch.bool else mask.detach()
    scores = query.new_empty((), dtype=wide).expand(*query.shape[:-1], extents.keys)
    return fused_kernels.added_mask(mask, scores)


# ---- attention ----


def _attention(call: Attention) -> Result:
    threshold = threshold_of(mask_ops.probability(call.p))
    query, extents = call.query, Extents.of(call.query.shape, call.key.shape)
    cells = math.prod(extents.matrices)
    words = mask_kernels.draw_mask(query, cells, mask_ops.kernel_seed(call.seed, query), threshold)
    dtype, blocks = query.dtype, extents.blocks()
    q, k, v = (_by_heads(x, blocks) for x in call[:3])
    y = q.new_empty((*extents.matrices[:2], v.shape[-1]))
    probabilities = None
    if call.keep:
        probabilities = memory.new_like(query.new_empty(()).expand(extents.matrices), cells)
    whole, dropped = _added_mask(call, extents), _scratch(q, blocks)
    narrow = _scratch(q, blocks) if call.keep and dtype is not q.dtype else None
    for block in blocks:
        to = dropped[: block.matrices]
        stored = None if probabilities is None else block.of(probabilities)
        scores = to if stored is None else stored if narrow is None else narrow[: block.matrices]
        torch.bmm(block.of(q), block.of(k).mT, out=scores)
        mask, added = block.mask(words, keep_scale(threshold)), block.added(whole)
        probable = None if stored is None else scores
        fused_kernels.softmax_into(to, probable, scores, added, mask, call.softmax_scale, call.causal)
        if stored is not None and narrow is not None:
            stored.copy_(scores)
        torch.bmm(to, block.of(v), out=block.of(y))
    y = y.view(*query.shape[:-1], v.shape[-1]).to(dtype)
    return Result(y, words if call.keep else None, probabilities)


def _attention_outputs(call: Attention) -> Result:
    query = call.query
    y = query.new_empty((*query.shape[:-1], call.value.shape[-1]))
    if not call.keep:
        return Result(y, None, None)
    scores = Extents.of(query.shape, call.key.shape).matrices
    return Result(y, query.new_empty(word_count(math.prod(scores)), dtype=torch.int32), query.new_empty(scores))


def _attention_saved(call: Attention, results: Result, needs: Any) -> Saved:
    of_scores = needs[0] or needs[1] or needs[3]
    query, key, value = call[:3] if of_scores else (None, None, None)
    return Saved(
        results.saved_mask,  # type: ignore[arg-type]
        results.probabilities,  # type: ignore[arg-type]
        query,
        key,
        value,
        call.p,
        call.causal,
        call.softmax_scale,
        tuple(call.query.shape),
        tuple(call.key.shape),
        tuple(call.value.shape),
        call.attn_mask if needs[3] else None,
    )


def _attention_gradients(needs: Any, saved: Saved, dy: Maybe, *_: Any) -> tuple[Maybe, ...]:
    """dquery, dkey, dvalue and dattn_mask, of those that are needed."""
    if dy is None:
        return ()
    wanted, dmask = list(needs[:3]), None
    if needs[3] or formulas.is_differentiated():
        _check_gradient(dy, saved, wanted)
        *gradients, dmask = _composed_gradients(dy, saved)
    else:
        gradients = list(ATTENTION_BACKWARD.run(AttentionBackward(dy, *saved[:11], wanted)))
    return *(x if wants else None for x, wants in zip(gradients, wanted, strict=True)), dmask


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
    dy, wanted, shapes = call.dy, call.wanted, _shapes(call)
    _check_gradient(dy, call, wanted)
    scale, extents = keep_scale(threshold_of(mask_ops.probability(call.p))), Extents.of(*shapes[:2])
    dtype, blocks, scores = dy.dtype, extents.blocks(), extents.matrices
    g = _by_heads(dy, blocks)
    q, k, v = (None if x is None else _by_heads(x, blocks) for x in (call.query, call.key, call.value))
    probabilities = fused_kernels.check("probabilities", call.probabilities, scores, dtype, dy)
    words = memory.check_words(call.saved_mask, math.prod(scores), dy.device)
    dq, dk, dv = (
        g.new_empty(shape).view(scores[0], -1, shape[-1]) if wants else None
        for shape, wants in zip(shapes, wanted, strict=True)
    )
    dscores, dropped = _scratch(g, blocks), None if dv is None else _scratch(g, blocks)
    for block in blocks:
        of_y, normal, mask = block.of(g), block.of(probabilities).to(g.dtype), block.mask(words, scale)
        again = None if dropped is None else dropped[: block.matrices]
        if q is None or k is None or v is None:
            assert mask.words is not None
            again = mask_kernels.apply(normal, mask.words, (scale, 0.0, 0.0), None)
        else:
            d = dscores[: block.matrices]
            torch.bmm(of_y, block.of(v).mT, out=d)
            fused_kernels.softmax_backward_into(d, again, d, normal, mask, call.softmax_scale)
            if dq is not None:
                torch.bmm(d, block.of(k), out=block.of(dq))
            if dk is not None:
                torch.bmm(d.mT, block.of(q), out=block.of(dk))
        if dv is not None and again is not None:
            torch.bmm(again.mT, of_y, out=block.of(dv))
    found = zip((dq, dk, dv), shapes, strict=True)
    return Gradients(*(None if d is None else d.view(shape).to(dtype) for d, shape in found))


def _backward_outputs(call: AttentionBackward) -> Gradients:
    _check_gradient(call.dy, call, call.wanted)
    found = zip(_shapes(call), call.wanted, strict=True)
    return Gradients(*(call.dy.new_empty(shape) if wants else None for shape, wants in found))


ATTENTION_BACKWARD = Op(
    "attention_backward", AttentionBackward, _backward_outputs, _backward, check=formulas.check_real
)


def _composed_gradients(dy: Tensor, saved: Saved) -> tuple[Maybe, ...]:
    """dquery, dkey, dvalue and dattn_mask, composed of ops that have derivatives themselves."""
    query_shape, key_shape, value_shape = _shapes(saved)
    query, key, value, attn_mask, scale = saved.query, saved.key, saved.value, saved.attn_mask, saved.softmax_scale
    dtype, wide, grouped = dy.dtype, computed(dy.dtype), len(query_shape) > 2
    mask = saved.saved_mask, saved.p, True
    g, normal = dy.to(wide), saved.probabilities.to(wide).view(*query_shape[:-1], key_shape[-2])
    dq = dk = dmask = None
    if query is not None and key is not None and value is not None:
        q, k, v = query.to(wide), key.to(wide), value.to(wide)
        if formulas.is_differentiated():
            # A softmax of the probabilities' logarithms, which hold what was masked. The scores that are added are 0,
            # but have derivatives.
            scores = q @ repeat_heads(k, q, grouped).mT * scale
            scores = scores if attn_mask is None else scores + attn_mask.to(wide)
            scores = (scores - scores.detach()).masked_fill(normal == 0, 0.0)  # of infinities no NaN
            normal = softmax_of(scores + normal.log(), None, 1.0, False)
        d = formulas.masked(g @ repeat_heads(v, q, grouped).mT, *mask)
        d = normal * (d - (d * normal).sum(-1, keepdim=True))
        dmask = None if attn_mask is None else d.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
        d = d * scale
        dq, dk = (d @ repeat_heads(k, q, grouped)).to(dtype), _sum_heads(d.mT @ q, key_shape).to(dtype)
    dropped = formulas.masked(normal, *mask)
    return dq, dk, _sum_heads(dropped.mT @ g, value_shape).to(dtype), dmask


def repeat_heads(x: Tensor, query: Tensor, gqa: bool) -> Tensor:
    """Keys or values, each repeated for all heads of query that it serves."""
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) if gqa and x.shape[-3] != query.shape[-3] else x


def _sum_heads(x: Tensor, shape: Any) -> Tensor:
    """The sums over the heads of query that one head serves."""
    return x if tuple(x.shape) == tuple(shape) else x.unflatten(-3, (shape[-3], -1)).sum(-3)


hide_from_dynamo(_attention, _backward)

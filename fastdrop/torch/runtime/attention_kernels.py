"""Attention with dropout on the CPU, forward and backward, by the primitives of that name: tensors in, tensors out.

`ops.attention` calls this module once it knows that tensors are eager, dense and of the right shapes. Tensors are brought
to ``[outer, heads, length, width]``, with strides of any kind but the last, and kernels do all the rest.

Two things are summed over more than one unit of the kernels' work, and here in an order that the shape fixes. Of few
heads, several parts of the keys are worked on at once, and each has its own sum of query's gradient. A mask that
broadcasts over heads has one gradient for all of them, so heads are worked on one after the other.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.checks import BOOL
from ...core.random import keep_scale
from . import fused_kernels
from .dispatch import hide_from_dynamo
from .dtypes import TAGS, computed
from .fused_kernels import Maybe

# Query's gradient is summed in parts until there are so many units of work, or until the sums are so large.
UNITS = 16
SUM_BYTES = 8 << 20
PART_KEYS = 256  # the fewest keys of a part: a tile of the kernels


class Call(NamedTuple):
    """What both passes are given. The value may be None if no gradient but its own is wanted."""

    query: Tensor
    key: Tensor
    value: Maybe
    attn_mask: Maybe
    seed: int
    threshold: int
    softmax_scale: float
    causal: bool


class Gradients(NamedTuple):
    dquery: Maybe
    dkey: Maybe
    dvalue: Maybe
    dattn_mask: Maybe


class _Extents(NamedTuple):
    """Scores are ``[outer, heads group, queries, keys]``: each of key's heads serves a group of query's."""

    outer: int
    heads: int
    group: int
    queries: int
    keys: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> _Extents:
        *outer, queries, _ = query.shape
        heads = key.shape[-3] if outer else 1
        return cls(math.prod(outer[:-1]), heads, math.prod(outer[-1:]) // heads, queries, key.shape[-2])

    @property
    def scores(self) -> tuple[int, int, int, int]:
        return self.outer, self.heads * self.group, self.queries, self.keys

    def parts(self, element: int) -> int:
        """Parts of the keys for sums of ``element`` bytes each."""
        wanted = min(-(-UNITS // (self.outer * self.heads)), SUM_BYTES // element)
        return max(1, min(wanted, -(-self.keys // PART_KEYS)))


def _by_heads(x: Tensor, extents: _Extents) -> Tensor:
    """``[outer, heads, length, width]``, with columns side by side."""
    x = x.detach().reshape(extents.outer, -1, *x.shape[-2:])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _mask_of_scores(call: Call, extents: _Extents) -> Maybe:
    """attn_mask as a tensor of the scores' shape, whose memory it keeps where strides can say it."""
    mask = call.attn_mask
    if mask is None:
        return None
    mask = mask.detach()
    if mask.dtype is torch.float32 and call.query.dtype is torch.float64:
        mask = mask.double()
    return mask.expand(*call.query.shape[:-1], extents.keys).reshape(extents.scores)


def _strides(*tensors: Maybe) -> list[int]:
    """Four of each."""
    return [stride for x in tensors for stride in ((0, 0, 0, 0) if x is None else x.stride())]


class _Heads(NamedTuple):
    """Some outer indices and key's heads, which one call of a kernel works on."""

    outer: slice
    heads: slice

    def of(self, x: Maybe, group: int = 1) -> Maybe:
        """Their part of a tensor of heads, or of query's heads with the size of a group."""
        if x is None or x.dim() < 4:
            return x
        return x[..., self.outer, self.heads.start * group : self.heads.stop * group, :, :]


def _run(
    primitive: str,
    call: Call,
    extents: _Extents,
    tensors: list[Maybe],
    arrays: tuple[Maybe, ...],
    parts: tuple[int, ...],
    first: int,
) -> None:
    query, key, value, mask, dy, dmask = tensors
    assert query is not None and key is not None
    strides = torch.tensor(_strides(query, key, value, mask, dy, dmask), dtype=torch.int64)
    tags = TAGS[query.dtype], 0 if mask is None else BOOL if mask.dtype is torch.bool else TAGS[mask.dtype]
    widths = query.shape[-1], value.shape[-1] if value is not None else dy.shape[-1]  # type: ignore[union-attr]
    draw = first, call.seed, 0, call.threshold
    options = call.softmax_scale, keep_scale(call.threshold), int(call.causal)
    fused_kernels.run(
        primitive, *tags, query, key, value, mask, None, *arrays, strides, *extents, *widths, *parts, *draw, *options
    )


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y, and ``[*, L, 2]`` numbers of each query: its largest score, plus infinity if it sees no key, and one over its
    sum of exponentials, then 0. Their logarithm would lose the sum beside a large score."""
    query, key, value = call.query, call.key, call.value
    assert value is not None
    extents = _Extents.of(query, key)
    y = query.new_empty((*query.shape[:-1], value.shape[-1]))
    known = query.new_empty((*query.shape[:-1], 2), dtype=computed(query.dtype))
    tensors: list[Maybe] = [_by_heads(x, extents) for x in (query, key, value)]
    tensors += [_mask_of_scores(call, extents), None, None]
    _run("attention_forward", call, extents, tensors, (y, known), (), 0)
    return y, known


def backward(call: Call, dy: Tensor, y: Maybe, known: Tensor, wanted: list[bool]) -> Gradients:
    """The gradients of query, key, value and attn_mask that are wanted, by what forward knew. y is None if only that of
    value is."""
    query, key = call.query, call.key
    extents, wide = _Extents.of(query, key), computed(query.dtype)
    data = [None if x is None else _by_heads(x, extents) for x in (query, key, call.value, dy, y, known)]
    q, k, v, g, y, known = data  # type: ignore[assignment]
    assert q is not None and k is not None and g is not None
    y, known = None if y is None else y.contiguous(), known.contiguous()
    mask, sums = _mask_of_scores(call, extents), None
    if wanted[3] and call.attn_mask is not None:
        sums = _MaskSums.of(call.attn_mask, extents, wide)
    pieces = [_Heads(slice(0, extents.outer), slice(0, extents.heads))] if sums is None else sums.pieces
    parts = extents.parts(q.numel() * wide.itemsize) if sums is None else 1
    dquery = q.new_zeros((parts, *q.shape), dtype=wide) if wanted[0] else None
    dkey = k.new_empty(k.shape) if wanted[1] else None
    dvalue = k.new_empty((*k.shape[:-1], g.shape[-1])) if wanted[2] else None
    for piece in pieces:
        of, group = piece.of, extents.group
        size = extents._replace(outer=piece.outer.stop - piece.outer.start, heads=piece.heads.stop - piece.heads.start)
        of_mask = None if sums is None else of(sums.expanded, group)
        tensors = [of(q, group), of(k), of(v), of(mask, group), of(g, group), of_mask]
        arrays = of(g, group), of(y, group), of(known, group), of(dquery, group), of(dkey), of(dvalue), of_mask
        first = (
            math.prod(extents.scores[1:]) * piece.outer.start
            + math.prod(extents.scores[2:]) * piece.heads.start * group
        )
        _run("attention_backward", call, size, tensors, arrays, (parts,), first)
    return Gradients(
        None if dquery is None else (dquery[0] if parts == 1 else dquery.sum(0)).to(query.dtype).view(query.shape),
        None if dkey is None else dkey.view(key.shape),
        None if dvalue is None else dvalue.view(*key.shape[:-1], -1),
        None if sums is None else sums.total(call),
    )


class _MaskSums(NamedTuple):
    """The gradient of a mask: sums of the scores' gradients over the axes along which it broadcasts."""

    sums: Tensor  # [outer, heads, queries, keys], 1 where it broadcasts
    expanded: Tensor  # the same memory, as the scores' shape
    pieces: list[_Heads]  # heads that share no element, together; in order

    @classmethod
    def of(cls, mask: Tensor, extents: _Extents, wide: torch.dtype) -> _MaskSums:
        heads, queries, keys = (1,) * (3 - mask.dim()) + tuple(mask.shape[-3:])
        outer = extents.outer if math.prod(mask.shape[:-3]) > 1 else 1
        sums = mask.new_zeros((outer, heads, queries, keys), dtype=wide)
        outers = _one_by_one(extents.outer, outer < extents.outer or heads < extents.heads * extents.group)
        of_heads = _one_by_one(extents.heads, heads < extents.heads * extents.group)
        pieces = [_Heads(o, h) for o, h in itertools.product(outers, of_heads)]
        return cls(sums, sums.expand(extents.scores), pieces)

    def total(self, call: Call) -> Tensor:
        """In the mask's shape and dtype."""
        mask = call.attn_mask
        assert mask is not None
        lead = tuple(call.query.shape[:-3]) if self.sums.shape[0] > 1 else ()
        sums = self.sums.reshape(*lead, -1, *self.sums.shape[-2:])
        return sums[(None,) * (mask.dim() - sums.dim())].sum_to_size(mask.shape).to(mask.dtype)


def _one_by_one(n: int, apart: bool) -> list[slice]:
    return [slice(i, i + 1) for i in range(n)] if apart else [slice(0, n)]


hide_from_dynamo(forward, backward)

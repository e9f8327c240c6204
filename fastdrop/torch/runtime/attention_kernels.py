"""Attention with dropout on the CPU, forward and backward, by the primitives of that name: tensors in, tensors out.

`ops.attention` calls this module once it knows that tensors are eager, dense and of the right shapes. Kernels take
tensors ``[outer, heads, length, width]``, at any strides but the last, and do the rest.

Two things are summed over several units of the kernels' work, and here in an order that the shape fixes. If heads are
few, parts of the keys are worked on at once, and each part has its own sum of query's gradient. A mask that broadcasts
over heads has one gradient for all of them, so these heads are worked on one after the other.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.checks import BOOL
from ...core.part import Run
from ...core.random import keep_scale
from . import fused_kernels
from .dispatch import hide_from_dynamo
from .dtypes import TAGS, computed
from .fused_kernels import Maybe
from .located import Located

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
    words: Maybe  # of the mask; None: it is drawn
    seed: Any  # an int, or a `Located` of one run
    threshold: int
    softmax_scale: float
    causal: bool
    mask_shape: tuple[int, ...] | None = None  # of the mask's cells, as `ops.attention` allows; None: the scores'

    @property
    def cell_strides(self) -> tuple[int, int, int, int]:
        """Of the mask's cells along outer indices, heads, queries and keys. 0: they share them."""
        strides = _strides_of_cells(self.cells)
        run = self.run
        return strides if run is None else tuple(map(run.distance, strides))  # type: ignore[return-value]

    @property
    def cells(self) -> tuple[int, ...]:
        """The mask's shape."""
        return self.mask_shape or (*self.query.shape[:-1], self.key.shape[-2])

    @property
    def run(self) -> Run | None:
        """Where the cells lie if they are not 0, 1, 2, ..."""
        if self.words is not None or type(self.seed) is not Located or not self.seed.runs:
            return None
        return self.seed.runs[0]

    @property
    def has_strides(self) -> bool:
        """Whether strides tell where all cells of a mask lie that is to be drawn."""
        run = self.run
        if run is None or len(self.seed.runs) > 1:
            return run is None
        *outer, heads, queries, keys = (1, 1, 1, *self.cells)
        axes = zip((math.prod(outer), heads, queries, keys), _strides_of_cells(self.cells), strict=True)
        return all(run.distance((n - 1) * step) == (n - 1) * run.distance(step) for n, step in axes)

    @property
    def draw(self) -> tuple[int, int, int]:
        """The first cell, the seed and its offset."""
        if type(self.seed) is not Located:
            return 0, self.seed, 0
        seed: Any = self.seed.seed
        return 0 if self.run is None else self.run.first, seed, self.seed.offset


@functools.lru_cache(maxsize=256)
def _strides_of_cells(mask_shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    *leading, queries, keys = mask_shape
    *outer, heads = leading or [1]
    strides = math.prod((heads, queries, keys)), queries * keys, keys
    of_outer, of_heads, of_queries = (
        stride if extent > 1 else 0 for stride, extent in zip(strides, (math.prod(outer), heads, queries), strict=True)
    )
    return of_outer, of_heads, of_queries, 1


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
    if x.dim() != 4:
        x = x.reshape(extents.outer, -1, *x.shape[-2:])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _mask_of_scores(call: Call, extents: _Extents) -> Maybe:
    """attn_mask as a tensor of the scores' shape. Axes along which it broadcasts take no memory, but for those before
    the heads where strides can't say which they are."""
    mask = call.attn_mask
    if mask is None:
        return None
    mask = fused_kernels.unexpanded(mask.detach())
    if mask.dtype is torch.float32 and call.query.dtype is torch.float64:
        mask = mask.double()
    mask = mask[(None,) * (3 - mask.dim())]
    outer, own = call.query.shape[:-3], mask.shape[-3:]
    return mask.expand(*outer, *own).reshape(extents.outer, *own).expand(extents.scores)


@functools.lru_cache(maxsize=256)
def _table(of: tuple[tuple[int, ...] | None, ...]) -> Tensor:
    """The strides of several tensors, four of each, in memory that kernels read and nobody writes."""
    with torch.inference_mode(False):
        return torch.tensor([strides or (0, 0, 0, 0) for strides in of], dtype=torch.int64, device="cpu")


class _Tensors(NamedTuple):
    """What backward reads and writes, by heads. Query's gradient is ``[parts, outer, heads, ...]``."""

    query: Tensor
    key: Tensor
    value: Maybe
    mask: Maybe
    dy: Tensor
    y: Maybe
    known: Tensor
    dquery: Maybe
    dkey: Maybe
    dvalue: Maybe
    dmask: Maybe  # of the scores' shape; where the mask broadcasts, strides are 0

    def of(self, outer: slice, heads: slice, group: int) -> _Tensors:
        """Their parts of some outer indices and some of key's heads."""
        shared = {"key", "value", "dkey", "dvalue"}
        of_query = slice(heads.start * group, heads.stop * group)
        return _Tensors(
            *(
                None if x is None else x[..., outer, heads if name in shared else of_query, :, :]
                for name, x in zip(self._fields, self, strict=True)
            )  # type: ignore[arg-type]
        )


# ---- forward ----


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y, and ``[*, L, 2]`` numbers of each query: its largest score, plus infinity if it sees no key, and one over its
    sum of exponentials, then 0. Their logarithm would lose the sum beside a large score."""
    query, value = call.query, call.value
    assert value is not None
    extents = _Extents.of(query, call.key)
    y = query.new_empty((*query.shape[:-1], value.shape[-1]))
    known = query.new_empty((*query.shape[:-1], 2), dtype=computed(query.dtype))
    q, k, v = (_by_heads(x, extents) for x in (query, call.key, value))
    data = q, k, v, _mask_of_scores(call, extents)
    _run("attention_forward", call, extents, data, (y, known), (None, None), (v.shape[-1],), 0)
    return y, known


def _run(
    primitive: str,
    call: Call,
    extents: _Extents,
    data: tuple[Maybe, ...],
    others: tuple[Maybe, ...],
    strided: tuple[Maybe, Maybe],
    sizes: tuple[int, ...],
    first: int,
) -> None:
    """``data`` are query, key, value and mask, ``others`` the arrays that follow; ``strided`` are dy and dmask."""
    query, _, _, mask = data
    assert query is not None
    mask_tag = 0 if mask is None else BOOL if mask.dtype is torch.bool else TAGS[mask.dtype]
    own = (None if x is None else x.stride() for x in (*data, *strided))
    strides = _table((*own, call.cell_strides))
    first_cell, *seed = call.draw
    numbers = *extents, query.shape[-1], *sizes, first + first_cell, *seed, call.threshold
    options = call.softmax_scale, keep_scale(call.threshold), int(call.causal)
    fused_kernels.run(primitive, TAGS[query.dtype], mask_tag, *data, call.words, *others, strides, *numbers, *options)


# ---- backward ----


def backward(call: Call, dy: Tensor, y: Maybe, known: Tensor, wanted: list[bool]) -> Gradients:
    """The gradients of query, key, value and attn_mask that are wanted, by what forward knew. y is None if only that of
    value is."""
    query, key, attn_mask = call.query, call.key, call.attn_mask
    extents, wide = _Extents.of(query, key), computed(query.dtype)
    q, k, g = (_by_heads(x, extents) for x in (query, key, dy))
    of_value_alone = call.value is None or y is None  # C is given both or none
    v, y = (None if x is None or of_value_alone else _by_heads(x, extents) for x in (call.value, y))
    sums = _MaskSums.of(attn_mask, extents, wide) if wanted[3] and attn_mask is not None else None
    parts = extents.parts(q.numel() * wide.itemsize) if sums is None else 1
    tensors = _Tensors(
        query=q,
        key=k,
        value=v,
        mask=_mask_of_scores(call, extents),
        dy=g,
        y=None if y is None else y.contiguous(),
        known=_by_heads(known, extents).contiguous(),
        dquery=q.new_zeros((parts, *q.shape), dtype=wide) if wanted[0] else None,
        dkey=k.new_empty(k.shape) if wanted[1] else None,
        dvalue=k.new_empty((*k.shape[:-1], g.shape[-1])) if wanted[2] else None,
        dmask=None if sums is None else sums.expanded,
    )
    if sums is None:
        _run_backward(call, extents, tensors, parts, 0)
    else:
        sums.add(call, extents, tensors)
    dquery = None if tensors.dquery is None else tensors.dquery[0] if parts == 1 else tensors.dquery.sum(0)
    return Gradients(
        None if dquery is None else dquery.to(query.dtype).view(query.shape),
        None if tensors.dkey is None else tensors.dkey.view(key.shape),
        None if tensors.dvalue is None else tensors.dvalue.view(*key.shape[:-1], -1),
        None if sums is None else sums.total(call),
    )


def _run_backward(call: Call, extents: _Extents, tensors: _Tensors, parts: int, first: int) -> None:
    query, key, value, mask, dy, *others, dmask = tensors
    data = query, key, value, mask
    sizes = dy.shape[-1], parts
    _run("attention_backward", call, extents, data, (dy, *others, dmask), (dy, dmask), sizes, first)


class _MaskSums(NamedTuple):
    """The gradient of a mask: sums of the scores' gradients over the axes along which it broadcasts."""

    sums: Tensor  # [outer, heads, queries, keys], 1 where it broadcasts
    expanded: Tensor  # the same memory, as the scores' shape

    @classmethod
    def of(cls, mask: Tensor, extents: _Extents, wide: torch.dtype) -> _MaskSums:
        heads, queries, keys = (1,) * (3 - mask.dim()) + tuple(mask.shape[-3:])
        outer = extents.outer if math.prod(mask.shape[:-3]) > 1 else 1
        sums = mask.new_zeros((outer, heads, queries, keys), dtype=wide)
        return cls(sums, sums.expand(extents.scores))

    def add(self, call: Call, extents: _Extents, tensors: _Tensors) -> None:
        """Runs backward over heads that share no element of the mask, together, and over others one after the other.

        Parts of the keys share none either, unless the mask broadcasts over the keys.
        """
        (outer, heads, _, of_key), (_, of_query, _, keys) = self.sums.shape, extents.scores
        of_outer, of_head, *_ = call.cell_strides
        shares_heads = heads < of_query
        for o in _slices(extents.outer, shares_heads or outer < extents.outer):
            for h in _slices(extents.heads, shares_heads):
                some = extents._replace(outer=o.stop - o.start, heads=h.stop - h.start)
                first = o.start * of_outer + h.start * extents.group * of_head
                own = tensors.of(o, h, extents.group)
                parts = some.parts(own.query.numel() * self.sums.itemsize) if of_key == keys else 1
                if own.dquery is None or parts == 1:
                    _run_backward(call, some, own, parts, first)
                    continue
                by_parts = own.dquery.new_zeros((parts, *own.dquery.shape[1:]))
                _run_backward(call, some, own._replace(dquery=by_parts), parts, first)
                torch.sum(by_parts, 0, keepdim=True, out=own.dquery)

    def total(self, call: Call) -> Tensor:
        """In the mask's shape and dtype."""
        mask = call.attn_mask
        assert mask is not None
        lead = tuple(call.query.shape[:-3]) if self.sums.shape[0] > 1 else ()
        sums = self.sums.reshape(*lead, -1, *self.sums.shape[-2:])
        return sums[(None,) * (mask.dim() - sums.dim())].sum_to_size(mask.shape).to(mask.dtype)


def _slices(n: int, one_by_one: bool) -> list[slice]:
    return [slice(i, i + 1) for i in range(n)] if one_by_one else [slice(0, n)]


hide_from_dynamo(forward, backward)

"""Attention with dropout on the CPU, a tile of scores at a time, forward and backward.

`ops.attention` calls this module once it knows that tensors are eager, dense and of the right shapes. A block of
queries goes over the keys tile by tile: torch multiplies the matrices into scratch that stays in the cache, a row
kernel turns the scores into dropped exponentials under each query's running maximum and sum, and torch multiplies those
with the values. Backward computes the scores again and draws the mask again, so that memory grows with the number of
queries and keys and not with their product.

Matrices are worked on together, at least as many as torch has threads: torch then gives each of them to one thread, so
results do not depend on the number of threads. With fewer heads than threads they depend on it as `torch.bmm` does.
Products of 16-bit data are float32's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.mask import word_count
from ...core.random import keep_scale
from . import fused_kernels, mask_kernels
from .dispatch import hide_from_dynamo
from .dtypes import TAGS, computed
from .fused_kernels import AddedMask, Maybe

# The largest tile. Two of float32 for each of two heads take 1 MiB, half of a server's second-level cache. Smaller
# tiles would be more calls.
QUERIES = 256
KEYS = 256
FEWEST_TOGETHER = 2  # heads: a single matrix is multiplied in another way, which depends on the number of threads


class Extents(NamedTuple):
    """Scores are ``[outer, heads, group, queries, keys]``: each of key's heads serves a group of query's."""

    outer: int
    heads: int
    group: int
    queries: int
    keys: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> Extents:
        *outer, queries, _ = query.shape
        heads = key.shape[-3] if outer else 1
        return cls(math.prod(outer[:-1]), heads, math.prod(outer[-1:]) // heads, queries, key.shape[-2])

    def by_heads(self, x: Tensor) -> Tensor:
        """``[outer, heads, group, length, width]``."""
        return x.reshape(self.outer, self.heads, -1, *x.shape[-2:])

    def parts(self) -> list[Part]:
        """All heads, in parts that are worked on at once."""
        size = min(self.queries, QUERIES) * min(self.keys, KEYS)
        count = max(torch.get_num_threads(), FEWEST_TOGETHER) * QUERIES * KEYS // size
        if count < self.heads:
            seams = _shared_out(self.heads, count)
            return [Part(self, o, 1, h, n) for o in range(self.outer) for h, n in seams]
        return [Part(self, o, n, 0, self.heads) for o, n in _shared_out(self.outer, -(-count // self.heads))]


def _shared_out(n: int, least: int) -> list[tuple[int, int]]:
    """Begins and lengths of even ranges, none of which is shorter than ``least``, unless there is only one."""
    parts = max(1, n // least)
    begins = [n * i // parts for i in range(parts + 1)]
    return [(begins[i], begins[i + 1] - begins[i]) for i in range(parts)]


class Part(NamedTuple):
    """Heads that are worked on at once: some heads of one outer index, or all heads of some."""

    extents: Extents
    first_outer: int
    outer: int
    first_head: int
    heads: int

    @property
    def matrices(self) -> int:
        return self.outer * self.heads

    def view(self, x: Tensor, member: int = 0) -> Tensor:
        """``[outer, heads, length, ...]`` of what `Extents.by_heads` gives. ``member`` is one of the group."""
        outer, heads = self.first_outer, self.first_head
        return x[outer : outer + self.outer, heads : heads + self.heads, member]

    def of(self, x: Tensor, member: int = 0) -> Tensor:
        """The same as a batch of matrices in the dtype that is computed in."""
        x = self.view(x, member).flatten(0, 1).to(computed(x.dtype))
        return x if x.stride(-1) == 1 else x.contiguous()

    def blocks(self, member: int, causal: bool) -> Iterator[Block]:
        _, _, _, queries, keys = self.extents
        for query in range(0, queries, QUERIES):
            rows = min(QUERIES, queries - query)
            yield Block(self, member, query, rows, min(keys, query + rows) if causal else keys)


class Block(NamedTuple):
    """Queries of one member of the groups, and how many keys the last of them sees."""

    part: Part
    member: int
    query: int
    rows: int
    keys: int

    def of(self, x: Tensor) -> Tensor:
        """Its rows of ``[..., queries, width]``."""
        return x.narrow(-2, self.query, self.rows)

    def tiles(self) -> Iterator[Tile]:
        for key in range(0, self.keys, KEYS):
            yield Tile(self, key, min(KEYS, self.keys - key))


class Tile(NamedTuple):
    """The scores of a block's queries with some keys, ``[matrices, rows, columns]``."""

    block: Block
    key: int
    columns: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.block.part.matrices, self.block.rows, self.columns

    def of(self, x: Tensor) -> Tensor:
        """Its rows of keys or values."""
        return x.narrow(1, self.key, self.columns)

    def scratch(self, memory: Tensor) -> Tensor:
        return memory[: math.prod(self.shape)].view(self.shape)

    def added(self, whole: AddedMask) -> AddedMask:
        """Its part of what is added to the scores."""
        part, member, query, rows, _ = self.block
        outer, head, row = whole.strides
        added = AddedMask(None, part.heads, rows, (outer, part.extents.group * head, row))
        if whole.memory is None:
            return added
        first = part.first_outer * outer + (part.first_head * part.extents.group + member) * head
        return added._replace(memory=whole.memory[first + query * row + self.key :])

    def draw(self, words: Tensor, seed: int, threshold: int) -> Tensor:
        """Its part of the mask, written to the beginning of ``words``."""
        (part, member, query, rows, _), extents = self.block, self.block.part.extents
        matrix = extents.queries * extents.keys
        head = (part.first_outer * extents.heads + part.first_head) * extents.group + member
        first = head * matrix + query * extents.keys + self.key
        pitches = extents.group * matrix, extents.keys
        mask_kernels.draw_rows(words, first, part.matrices, rows, self.columns, pitches, (seed, 0, threshold))
        return words


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


class _Scratch:
    """What the tiles of a call share: memory for two of them and for their words, and the whole mask that is added."""

    def __init__(self, call: Call, parts: list[Part]) -> None:
        query, (_, _, _, queries, keys) = call.query, parts[0].extents
        size = max(part.matrices for part in parts) * min(queries, QUERIES) * min(keys, KEYS)
        self.wide = computed(query.dtype)
        self.scores, self.slopes = (query.new_empty(size, dtype=self.wide) for _ in range(2))
        self.words = query.new_empty(word_count(size), dtype=torch.int32)
        mask = call.attn_mask
        if mask is not None:
            mask = fused_kernels.additive(mask, self.wide) if mask.dtype is torch.bool else mask.detach()
        self.added = fused_kernels.added_mask(
            mask, query.new_empty((), dtype=self.wide).expand(*query.shape[:-1], keys)
        )


# ---- forward ----


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y, and ``[*, L, 2]`` numbers of each query: its largest score, plus infinity if it sees no key, and one over its
    sum of exponentials, then 0. Their logarithm would lose the sum beside a large score."""
    query, value = call.query, call.value
    assert value is not None
    extents = Extents.of(query, call.key)
    parts = extents.parts()
    scratch, width = _Scratch(call, parts), value.shape[-1]
    y, known = query.new_empty((*query.shape[:-1], width)), query.new_empty((*query.shape[:-1], 2), dtype=scratch.wide)
    queries, keys, values, ys, all_known = map(extents.by_heads, (query, call.key, value, y, known))
    scale = keep_scale(call.threshold)
    for part in parts:
        k, v = part.of(keys), part.of(values)
        for member in range(extents.group):
            q, to, to_known = part.of(queries, member), part.view(ys, member), part.view(all_known, member)
            for block in part.blocks(member, call.causal):
                totals, statistics = _attend(call, scratch, block, block.of(q), k, v)
                top, total = statistics.view(*totals.shape[:2], 2).split(1, -1)
                nothing = total == 0
                share = torch.where(nothing, 0.0, 1.0 / total)
                totals *= share * scale
                block.of(to).copy_(totals.view(block.of(to).shape))
                found = torch.cat([torch.where(nothing, math.inf, top), share], -1)
                block.of(to_known).copy_(found.view(block.of(to_known).shape))
    return y, known


def _attend(call: Call, scratch: _Scratch, block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of dropped exponentials times values, and the exponentials' maximum and sum, of all keys."""
    totals = q.new_empty((*q.shape[:2], v.shape[-1]))
    statistics = q.new_empty(2 * len(q) * block.rows)
    known: tuple[Maybe, Maybe] = (None, None)
    for tile in block.tiles():
        x = torch.bmm(q, tile.of(k).mT, out=tile.scratch(scratch.scores))
        arrays = *_before(call, scratch, tile, x), *known, statistics, x, known[1]
        _run("attention_forward", call, scratch, tile, arrays, (totals.shape[-1],), ())
        if known[1] is None:
            torch.bmm(x, tile.of(v), out=totals)
        else:
            totals.baddbmm_(x, tile.of(v))
        known = statistics, totals
    return totals, statistics


def _before(call: Call, scratch: _Scratch, tile: Tile, x: Tensor) -> tuple[Maybe, ...]:
    """The first arrays of both kernels: scores, mask and words."""
    return x, tile.added(scratch.added).memory, tile.draw(scratch.words, call.seed, call.threshold)


def _run(
    primitive: str, call: Call, scratch: _Scratch, tile: Tile, arrays: Any, sizes: tuple[int, ...], a: tuple[float, ...]
) -> None:
    added, (matrices, rows, columns) = tile.added(scratch.added), tile.shape
    extents = matrices * rows, columns, *sizes, added.heads, added.queries, *added.strides
    places = tile.block.query, tile.key
    fused_kernels.run(
        primitive, TAGS[scratch.wide], *arrays, *extents, *places, call.softmax_scale, *a, int(call.causal)
    )


# ---- backward ----


class _KeySums(NamedTuple):
    """The gradient of keys or values of a part, a tensor for each tile."""

    tiles: list[Tensor]

    @classmethod
    def of(cls, x: Tensor) -> _KeySums:
        return cls([torch.zeros_like(tile, memory_format=torch.contiguous_format) for tile in x.split(KEYS, 1)])

    def add(self, tile: Tile, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
        """Adds ``scale * a @ b``, in the same way for any number of heads."""
        total = self.tiles[tile.key // KEYS]
        if tile.columns == total.shape[1]:
            total.baddbmm_(a, b, alpha=scale)
        else:  # out=: autocast would round a product that is returned
            product = torch.bmm(a, b, out=total.new_empty((len(a), tile.columns, total.shape[2])))
            total.narrow(1, 0, tile.columns).add_(product, alpha=scale)

    def deliver(self, to: Tensor) -> None:
        to.copy_(torch.cat(self.tiles, 1).view(to.shape))


def backward(call: Call, dy: Tensor, y: Maybe, known: Tensor, wanted: list[bool]) -> Gradients:
    """The gradients of query, key, value and attn_mask that are wanted, by what forward knew. y is None if only that of
    value is."""
    extents = Extents.of(call.query, call.key)
    parts = extents.parts()
    scratch = _Scratch(call, parts)
    dquery, dkey = (x.new_empty(x.shape) if wants else None for x, wants in zip(call[:2], wanted[:2], strict=True))
    dvalue = call.key.new_empty((*call.key.shape[:-1], dy.shape[-1])) if wanted[2] else None
    sums = _MaskSums(call.attn_mask, extents, scratch.wide) if wanted[3] and call.attn_mask is not None else None
    by_heads = extents.by_heads
    arrays = [None if x is None else by_heads(x) for x in (dquery, dkey, dvalue, call.value, y)]
    inputs = [by_heads(x) for x in (call.query, call.key, dy, known)]
    for part in parts:
        _of_part(call, scratch, part, inputs, arrays, sums)
    of_mask = None if sums is None else sums.total(call.attn_mask, call.query.shape[:-3])  # type: ignore[arg-type]
    return Gradients(dquery, dkey, dvalue, of_mask)


def _of_part(
    call: Call, scratch: _Scratch, part: Part, inputs: list[Tensor], arrays: list[Maybe], sums: _MaskSums | None
) -> None:
    queries, keys, slopes, all_known = inputs
    dquery, dkey, dvalue, values, ys = arrays
    k, v = part.of(keys), None if values is None or ys is None else part.of(values)
    of_keys = None if dkey is None else _KeySums.of(k)
    of_values = None if dvalue is None else _KeySums.of(part.of(dvalue))
    for member in range(part.extents.group):
        q, (top, share) = part.of(queries, member), part.of(all_known, member).split(1, -1)
        g = part.of(slopes, member) * share  # what the exponentials below lack
        dot = torch.zeros_like(top) if ys is None else (g * part.of(ys, member)).sum(-1, keepdim=True)
        base_and_dot = torch.cat([top, dot], -1)
        for block in part.blocks(member, call.causal):
            q_block, g_block, known = block.of(q), block.of(g), block.of(base_and_dot).contiguous()
            total = None if dquery is None else torch.zeros_like(q_block, memory_format=torch.contiguous_format)
            for tile in block.tiles():
                x = torch.bmm(q_block, tile.of(k).mT, out=tile.scratch(scratch.scores))
                d = None if v is None else torch.bmm(g_block, tile.of(v).mT, out=tile.scratch(scratch.slopes))
                written = None if of_values is None else x, d
                data = *_before(call, scratch, tile, x), known, d, *written
                _run("attention_backward", call, scratch, tile, data, (), (keep_scale(call.threshold),))
                if of_values is not None:
                    of_values.add(tile, x.mT, g_block)
                if total is not None and d is not None:
                    total.baddbmm_(d, tile.of(k), alpha=call.softmax_scale)
                if of_keys is not None and d is not None:
                    of_keys.add(tile, d.mT, q_block, call.softmax_scale)
                if sums is not None and d is not None:
                    sums.add(tile, d)
            if total is not None and dquery is not None:
                to = block.of(part.view(dquery, member))
                to.copy_(total.view(to.shape))
    for found, gradient in ((of_keys, dkey), (of_values, dvalue)):
        if found is not None and gradient is not None:
            found.deliver(part.view(gradient))


class _MaskSums:
    """The gradient of a mask: sums of the scores' gradients over the axes along which it broadcasts."""

    def __init__(self, mask: Tensor, extents: Extents, wide: torch.dtype) -> None:
        heads, queries, keys = (1,) * (3 - mask.dim()) + tuple(mask.shape[-3:])
        outer = extents.outer if math.prod(mask.shape[:-3]) > 1 else 1
        by_heads = (1, 1) if heads == 1 else (extents.heads, extents.group)
        self.sums = mask.new_zeros((outer, *by_heads, queries, keys), dtype=wide)

    def add(self, tile: Tile, d: Tensor) -> None:
        part, member, query, rows, _ = tile.block
        begins = part.first_outer, part.first_head, member, query, tile.key
        lengths = part.outer, part.heads, 1, rows, tile.columns
        to, d = self.sums, d.view(lengths)
        for axis, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
            if to.shape[axis] > 1:
                to = to.narrow(axis, begin, length)
        to += d.sum_to_size(to.shape)

    def total(self, mask: Tensor, outer: Any) -> Tensor:
        """In the mask's shape and dtype. ``outer`` are the extents of query's axes before the heads."""
        lead = tuple(outer) if self.sums.shape[0] > 1 else ()
        sums = self.sums.reshape(*lead, -1, *self.sums.shape[-2:])
        return sums[(None,) * (mask.dim() - sums.dim())].sum_to_size(mask.shape).to(mask.dtype)


hide_from_dynamo(forward, backward)

"""DropBlock: `drop_block`, of which `structured` makes the public functions.

Its mask is drawn on a smaller grid, a cell for each place of a block. What is kept is scaled by the number of kept
cells of the whole mask, so the processes that hold parts of it add up theirs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks, variants
from ..ops import mask as mask_ops
from ..runtime import dtypes, layouts, nested
from ..runtime.dispatch.tensors import jit_trace
from . import onnx
from .plan import KERNEL, ONNX, Cells, Source, check_tensor, check_unused_seed, plan_call, seed_for_kernel, seed_for_ops

__all__ = ["drop_block"]

Shape = tuple[int, ...]


def drop_block(
    x: Tensor,
    p: float | Tensor,
    sizes: tuple[Any, int],
    inplace: bool,
    training: bool,
    couple_channels: bool,
    source: Source,
) -> Tensor:
    """DropBlock. ``sizes`` is the block's size and the number of spatial axes."""
    check_tensor(x)
    way, p, drops = plan_call(x, p, training, what="drop probability")
    block_size, axes = checks.block_size(*sizes), sizes[1]
    if x.dim() != axes + 2:
        raise ValueError(f"input should be {axes + 2} dimensional. Got {x.dim()} dimensions.")
    if not drops:
        check_unused_seed(source)
        return x
    nested.refuse(x, "DropBlock")
    nested.check_dense(x)
    if way == ONNX:
        onnx.refuse("blocks")
    shape = tuple(x.shape)
    if jit_trace() is not None:  # extents are tensors there
        shape = tuple(int(extent) for extent in shape)
    cells = (shape[0], 1, *shape[2:]) if couple_channels else shape
    shard = _Shard(source, variants.block_seeds(cells, block_size))
    if source[2] is not None:
        shard = _shard(source, shape, block_size, couple_channels)
    if way == KERNEL:
        dtypes.check_dtype(x)
        seed = seed_for_kernel(x, shard.source, inplace, shard.seeds, shard.shared)
        words, count = mask_ops.DRAW_BLOCKS.launch(mask_ops.DrawBlocks(x, seed, p, cells, block_size))
        keep, wanted = _keep(x, words, count, cells, shard), x.requires_grad and torch.is_grad_enabled()
        y: Tensor = mask_ops.KEEP_BLOCKS.call_kernel(keep, wanted, inplace)
        return y
    seed = seed_for_ops(x, shard.source, shard.seeds, shard.shared)
    words, count = mask_ops.DRAW_BLOCKS(mask_ops.DrawBlocks(x, seed, p, cells, block_size))
    y = mask_ops.KEEP_BLOCKS(_keep(x, words, count, cells, shard))
    return x.copy_(y) if inplace else y


class _Shard(NamedTuple):
    """What one process has of a mask: ``seeds`` is the shape of its grid of places."""

    source: Source
    seeds: Shape
    shared: Cells = None
    whole_cells: float = 0.0  # 0: it has all


def _shard(source: Source, shape: Shape, block_size: Shape, couple_channels: bool) -> _Shard:
    generator, seed, given = source
    layout = layouts.as_layout(given)
    if layout is None:
        raise TypeError("part of DropBlock must be a device mesh with placements: its processes add up what they keep")
    if torch.compiler.is_compiling():
        raise RuntimeError("DropBlock of a part can't be compiled, because processes add up the cells that they keep")
    whole = layout.parts(shape)[0].shape
    if whole[2:] != shape[2:]:
        raise ValueError(f"DropBlock needs axes of blocks whole, but has {shape[2:]} of {whole[2:]}")
    places = variants.block_seeds(shape, block_size)[2:]
    layout = layout._replace(shape=(*whole[:2], *places))
    shared = (None, 1, *[None] * len(places)) if couple_channels else None
    whole_cells = float(math.prod(whole) // (whole[1] or 1) if couple_channels else math.prod(whole))
    return _Shard((generator, seed, layout), (*shape[:2], *places), shared, whole_cells)


def _keep(x: Tensor, words: Tensor, count: Tensor, cells: Shape, shard: _Shard) -> mask_ops.KeepBlocks:
    if shard.source[2] is not None:
        count = layouts.add_up(shard.source[2], count, (0, 1) if shard.shared is None else (0,), len(cells))
    return mask_ops.KeepBlocks(x, words, count, cells, shard.whole_cells)

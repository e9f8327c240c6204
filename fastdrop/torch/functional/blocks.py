"""DropBlock as functions.

Its mask is drawn on a smaller grid, a cell for each place of a block. What is kept is scaled by the number of kept
cells of the whole mask, so the processes that hold parts of it add up theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks, variants
from ..ops import mask as mask_ops
from ..runtime import dtypes, layouts, nested
from ..runtime.dispatch.tensors import jit_trace
from . import onnx, sharded
from .plan import (
    KERNEL,
    ONNX,
    Cells,
    Seed,
    Source,
    Whole,
    check_tensor,
    check_unused_seed,
    for_subclasses,
    plan_call,
    seed_for_kernel,
    seed_for_ops,
)

__all__ = ["drop_block2d", "drop_block3d"]

Shape = tuple[int, ...]


_blocks = {4: sharded.rule("input", whole=(-2, -1)), 5: sharded.rule("input", whole=(-3, -2, -1))}


def _drop_blocks_of_shards(function: Callable[..., Any], arguments: sharded.Arguments) -> Any:
    rule = _blocks.get(arguments["input"].dim())
    return function(**arguments) if rule is None else rule(function, arguments)


@for_subclasses(_drop_blocks_of_shards)
def drop_block2d(
    input: Tensor,
    p: float | Tensor,
    block_size: int | tuple[int, int],
    inplace: bool = False,
    *,
    training: bool = True,
    couple_channels: bool = False,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
) -> Tensor:
    """Returns input with blocks of neighbouring cells dropped, scaled by cells / cells kept: torchvision's, faster.

    Parameters
    ----------
    input : Tensor of a float dtype, ``(N, C, H, W)``
    p : float or Tensor of one number
        Share of cells to drop, 0 to 1. p = 1 gives zeros.
    block_size : int or tuple of int
        Extent of a block on each spatial axis, odd or even. It is cut to input's extent on each axis, as in timm.
    inplace : bool
        Writes the result to the input.
    training : bool
        False drops nothing.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    couple_channels : bool
        True gives all channels of a sample one mask, as in timm. Otherwise each channel has its own.
    part : (DeviceMesh, sequence of placements), optional
        As in `dropout`, but of a mesh only, whose processes add up the cells that they keep. Blocks need their axes
        whole.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout`. ValueError for other ranks, as torchvision's. There is no ``eps``, because nothing is divided
        if nothing is kept.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per cell and 8 bytes. A seed's mask is that of `fastdrop.drop_block`. Source: Ghiasi et
    al., NeurIPS 2018.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> fdt.drop_block2d(torch.ones(1, 1, 4, 6), 0.3, 2, seed=3)[0, 0]
    tensor([[1.2000, 1.2000, 1.2000, 1.2000, 1.2000, 1.2000],
            [1.2000, 0.0000, 0.0000, 1.2000, 1.2000, 1.2000],
            [1.2000, 0.0000, 0.0000, 1.2000, 1.2000, 1.2000],
            [1.2000, 1.2000, 1.2000, 1.2000, 1.2000, 1.2000]])
    """
    return _drop_block(input, p, (block_size, 2), inplace, training, couple_channels, (generator, seed, part))


@for_subclasses(_drop_blocks_of_shards)
def drop_block3d(
    input: Tensor,
    p: float | Tensor,
    block_size: int | tuple[int, int, int],
    inplace: bool = False,
    *,
    training: bool = True,
    couple_channels: bool = False,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
) -> Tensor:
    """Returns `drop_block2d` in three spatial axes, ``(N, C, D, H, W)``: torchvision's, faster.

    Parameters
    ----------
    input : Tensor of a float dtype, ``(N, C, D, H, W)``
    p : float or Tensor of one number
        Share of cells to drop, 0 to 1. p = 1 gives zeros.
    block_size : int or tuple of int
        Extent of a block on each spatial axis, cut to input's.
    inplace : bool
        Writes the result to the input.
    training : bool
        False drops nothing.
    couple_channels : bool
        True gives all channels of a sample one mask.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : (DeviceMesh, sequence of placements), optional
        Of which whole the data is a part.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `drop_block2d`.

    See Also
    --------
    drop_block2d : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per cell and 8 bytes. Source: Ghiasi et al., NeurIPS 2018.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> y = fdt.drop_block3d(torch.ones(1, 2, 6, 6, 6), 0.1, 3, seed=3)
    >>> y.shape, bool((y == 0).any()), round(float(y.mean()), 4)
    (torch.Size([1, 2, 6, 6, 6]), True, 1.0)
    """
    return _drop_block(input, p, (block_size, 3), inplace, training, couple_channels, (generator, seed, part))


def _drop_block(
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

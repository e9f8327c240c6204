"""The kinds of dropout in which elements share decisions, as functions: channels, time steps, samples and blocks.

Each function works out the shape of its mask, which has 1 on the axes along which elements share a decision. `routing`
does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import checks, variants
from . import sharded
from .blocks import drop_block
from .plan import Cells, Seed, Whole, check_tensor, eager_probability, for_subclasses
from .routing import drop

__all__ = [
    "drop_block2d",
    "drop_block3d",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "stochastic_depth",
    "variational_dropout",
]


@for_subclasses()
def dropout1d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> Tensor:
    """Returns input with whole channels dropped: `torch.nn.functional.dropout1d`, faster.

    Parameters
    ----------
    input : Tensor, ``(N, C, L)`` or ``(C, L)``
    p, training, inplace, generator, seed, part, store
        As in `dropout`, with the same errors. RuntimeError for input of other ranks, as torch's.

    Kept for backward: a bit per channel and sample, or a seed. A seed's mask is that of `fastdrop.feature_dropout`.
    Source: Tompson et al., CVPR 2015.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.dropout1d(torch.ones(2, 2, 3), 0.5, seed=4)[..., 0]
    tensor([[0., 0.],
            [2., 2.]])
    """
    cells = _feature_cells(input, p, training, F.dropout1d, (2, 3), 3)
    return drop(input, p, training, inplace, (generator, seed, part), cells, store, "inverted")


@for_subclasses()
def dropout2d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> Tensor:
    """Returns input with whole channels dropped: `torch.nn.functional.dropout2d`, faster.

    Parameters
    ----------
    input : Tensor, ``(N, C, H, W)``
        Input of three axes is taken for ``(N, C, L)``, with torch's warning. Other ranks are deprecated, as in torch.
    p, training, inplace, generator, seed, part, store
        As in `dropout`, with the same errors. Channels-last tensors stay channels-last.

    Kept for backward: a bit per channel and sample, or a seed. A seed's mask is that of `fastdrop.feature_dropout`.
    Source: Tompson et al., CVPR 2015.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.dropout2d(torch.ones(2, 2, 3, 3), 0.5, seed=4)[..., 0, 0]
    tensor([[0., 0.],
            [2., 2.]])
    """
    cells = _feature_cells(input, p, training, F.dropout2d, (4,), None)
    return drop(input, p, training, inplace, (generator, seed, part), cells, store, "inverted")


@for_subclasses()
def dropout3d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> Tensor:
    """Returns input with whole channels dropped: `torch.nn.functional.dropout3d`, faster.

    Parameters
    ----------
    input : Tensor, ``(N, C, D, H, W)`` or ``(C, D, H, W)``
        Other ranks are deprecated, with torch's warning.
    p, training, inplace, generator, seed, part, store
        As in `dropout`, with the same errors.

    Kept for backward: a bit per channel and sample, or a seed. A seed's mask is that of `fastdrop.feature_dropout`.
    Source: Tompson et al., CVPR 2015.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.dropout3d(torch.ones(2, 2, 3, 3, 3), 0.5, seed=4)[..., 0, 0, 0]
    tensor([[0., 0.],
            [2., 2.]])
    """
    cells = _feature_cells(input, p, training, F.dropout3d, (4, 5), 5)
    return drop(input, p, training, inplace, (generator, seed, part), cells, store, "inverted")


@for_subclasses()
def feature_alpha_dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> Tensor:
    """Returns `alpha_dropout` of input, whole channels dropped: `torch.nn.functional.feature_alpha_dropout`, faster.

    Parameters, errors and memory are those of `alpha_dropout`, but one bit stands for a channel of a sample. input is
    ``(N, C, *)``, RuntimeError if it has fewer axes.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.feature_alpha_dropout(torch.zeros(2, 2, 3), 0.5, True, seed=4)[..., 0]
    tensor([[-0.7792, -0.7792],
            [ 0.7792,  0.7792]])
    """
    return drop(input, p, training, inplace, (generator, seed, part), _channels(input, p, training), store, "alpha")


@for_subclasses()
def variational_dropout(
    input: Tensor,
    p: float | Tensor,
    time_axis: int,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
    scaling: str = "inverted",
) -> Tensor:
    """Returns input with one mask held over a whole sequence: locked dropout.

    Parameters
    ----------
    input : Tensor of any shape ``(*)``, such as ``(T, B, F)``
    p : float or Tensor of one number
        Drop probability, 0 to 1.
    time_axis : int
        The axis along which decisions are shared; ValueError or TypeError if input does not have it.
    training, inplace, generator, seed, part, store, scaling
        As in `dropout`, with the same errors.

    Kept for backward: a bit per element of one step, or a seed. Source: Gal and Ghahramani, NeurIPS 2016.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.variational_dropout(torch.ones(3, 1, 4), 0.5, 0, seed=4)[:, 0]
    tensor([[0., 0., 2., 2.],
            [0., 0., 2., 2.],
            [0., 0., 2., 2.]])
    """
    checks.scaling(scaling)
    check_tensor(input)
    cells = variants.shared_cells(_unknown(input), checks.axis("time_axis", time_axis, input.dim()))
    return drop(input, p, training, inplace, (generator, seed, part), cells, store, scaling)


@for_subclasses()
def stochastic_depth(
    input: Tensor,
    p: float | Tensor,
    mode: str,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
    scaling: str = "inverted",
) -> Tensor:
    """Returns input, the output of a residual branch, with whole samples dropped: torchvision's, faster.

    Parameters
    ----------
    input : Tensor, ``(N, *)``
    p : float or Tensor of one number
        Drop probability of the branch, 0 to 1.
    mode : {"batch", "row"}
        "row" decides for each sample, "batch" once for all samples. ValueError for another.
    training, inplace, generator, seed, part, store, scaling
        As in `dropout`, with the same errors. (``scaling="standard"`` is that of the paper.)

    Kept for backward: a bit per sample, or a seed. Source: Huang et al., ECCV 2016.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.stochastic_depth(torch.ones(4, 2), 0.5, "row", seed=4)[:, 0]
    tensor([0., 0., 2., 2.])
    """
    checks.scaling(scaling)
    if mode not in checks.DEPTH_MODES:
        raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode}")
    check_tensor(input)
    if not torch.compiler.is_compiling():
        p = eager_probability(p, "drop probability")
    cells = variants.sample_cells(_unknown(input), mode)
    return drop(input, p, training, inplace, (generator, seed, part), cells, store, scaling)


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
    inplace, training, generator, seed
        As in `dropout`, with the same errors. ValueError for other ranks, as torchvision's. There is no ``eps``,
        because nothing is divided if nothing is kept.
    couple_channels : bool
        True gives all channels of a sample one mask, as in timm. Otherwise each channel has its own.
    part : (DeviceMesh, sequence of placements), optional
        As in `dropout`, but of a mesh only, whose processes add up the cells that they keep. Blocks need their axes
        whole.

    Kept for backward: a bit per cell and 8 bytes. A seed's mask is that of `fastdrop.drop_block`. Source: Ghiasi et
    al., NeurIPS 2018.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.drop_block2d(torch.ones(1, 1, 4, 6), 0.3, 2, seed=3)[0, 0]
    tensor([[1.2000, 1.2000, 1.2000, 1.2000, 1.2000, 1.2000],
            [1.2000, 0.0000, 0.0000, 1.2000, 1.2000, 1.2000],
            [1.2000, 0.0000, 0.0000, 1.2000, 1.2000, 1.2000],
            [1.2000, 1.2000, 1.2000, 1.2000, 1.2000, 1.2000]])
    """
    return drop_block(input, p, (block_size, 2), inplace, training, couple_channels, (generator, seed, part))


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

    >>> import torch, fastdrop.torch as fdt
    >>> y = fdt.drop_block3d(torch.ones(1, 2, 6, 6, 6), 0.1, 3, seed=3)
    >>> y.shape, bool((y == 0).any()), round(float(y.mean()), 4)
    (torch.Size([1, 2, 6, 6, 6]), True, 1.0)
    """
    return drop_block(input, p, (block_size, 3), inplace, training, couple_channels, (generator, seed, part))


def _feature_cells(
    x: Tensor,
    p: float | Tensor,
    training: bool,
    theirs: Callable[..., Tensor],
    ranks: tuple[int, ...],
    batched: int | None,
) -> Cells:
    """A cell for each channel. ``theirs`` is torch's function for tensors of these ranks. x has samples if its rank is
    ``batched``; None means that it always has."""
    check_tensor(x)
    rank = x.dim()
    if rank not in ranks:
        theirs(x, 0.0, False)  # warns of other ranks, or refuses them, as torch does
    if batched is None or rank == batched or not rank:
        return _channels(x, p, training)
    return variants.feature_cells(_unknown(x), 0)


def _channels(x: Tensor, p: float | Tensor, training: bool) -> Cells:
    check_tensor(x)
    if x.dim() < 2 and training and (isinstance(p, Tensor) or p != 0.0):
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return variants.feature_cells(_unknown(x), 1)


def _unknown(x: Tensor) -> tuple[int | None, ...]:
    """x's shape without its extents, so that 1 stands for axes along which elements share decisions."""
    return (None,) * x.dim()

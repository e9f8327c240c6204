"""The kinds of dropout in which elements share decisions, as functions: channels, time steps and samples.

Each function works out the shape of its mask, which has 1 on the axes along which elements share a decision. `routing`
does the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import checks, variants
from .plan import Cells, Seed, Whole, check_tensor, eager_probability, for_subclasses
from .routing import drop

__all__ = [
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
    p : float or Tensor of one number
        Drop probability, 0 to 1.
    training : bool
        False drops nothing.
    inplace : bool
        Writes the result to the input.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable or Tensor, optional
        Of which whole the data is a part.
    store : {"bits", "seed"}
        What is kept for backward: bits, or a seed, from which they are drawn again.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout`. RuntimeError for input of other ranks, as torch's.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per channel and sample, or a seed. A seed's mask is that of `fastdrop.feature_dropout`.
    Source: Tompson et al., CVPR 2015.

    Examples
    --------
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
    p : float or Tensor of one number
        Drop probability, 0 to 1.
    training : bool
        False drops nothing.
    inplace : bool
        Writes the result to the input.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable or Tensor, optional
        Of which whole the data is a part.
    store : {"bits", "seed"}
        What is kept for backward: bits, or a seed, from which they are drawn again.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout`.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Channels-last tensors stay channels-last.

    Kept for backward: a bit per channel and sample, or a seed. A seed's mask is that of `fastdrop.feature_dropout`.
    Source: Tompson et al., CVPR 2015.

    Examples
    --------
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
    p : float or Tensor of one number
        Drop probability, 0 to 1.
    training : bool
        False drops nothing.
    inplace : bool
        Writes the result to the input.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable or Tensor, optional
        Of which whole the data is a part.
    store : {"bits", "seed"}
        What is kept for backward: bits, or a seed, from which they are drawn again.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout`.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per channel and sample, or a seed. A seed's mask is that of `fastdrop.feature_dropout`.
    Source: Tompson et al., CVPR 2015.

    Examples
    --------
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

    Parameters
    ----------
    input : Tensor of a float dtype, ``(N, C, *)``
    p : float or Tensor of one number
        Drop probability of a channel, 0 to 1.
    training : bool
        False, torch's default here, returns input itself.
    inplace : bool
        Writes the result to the input.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable or Tensor, optional
        Of which whole the data is a part.
    store : {"bits", "seed"}
        What is kept for backward: bits, or a seed, from which they are drawn again.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `alpha_dropout`. RuntimeError if input has fewer than two axes.

    See Also
    --------
    alpha_dropout : what kept and dropped elements become.
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per channel and sample, or a seed. Source: Klambauer et al., NeurIPS 2017.

    Examples
    --------
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
    training : bool
        False drops nothing.
    inplace : bool
        Writes the result to the input.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable or Tensor, optional
        Of which whole the data is a part.
    store : {"bits", "seed"}
        What is kept for backward: bits, or a seed, from which they are drawn again.
    scaling : {"inverted", "standard"}
        "inverted" scales what is kept in training, "standard" everything in evaluation.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout`.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per element of one step, or a seed. Source: Gal and Ghahramani, NeurIPS 2016.

    Examples
    --------
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
    training : bool
        False drops nothing.
    inplace : bool
        Writes the result to the input.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable or Tensor, optional
        Of which whole the data is a part.
    store : {"bits", "seed"}
        What is kept for backward: bits, or a seed, from which they are drawn again.
    scaling : {"inverted", "standard"}
        "inverted" scales what is kept in training, "standard" everything in evaluation.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout`.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    ``scaling="standard"`` is that of the paper.

    Kept for backward: a bit per sample, or a seed. Source: Huang et al., ECCV 2016.

    Examples
    --------
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

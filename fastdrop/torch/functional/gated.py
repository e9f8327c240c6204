"""The fused functions of gated feed-forward blocks. They work as those of `fused` do."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import checks
from . import fused_calls as calls
from . import sharded
from .fused_calls import Options
from .plan import Seed, Whole, check_tensor, for_subclasses

__all__ = ["geglu_dropout", "swiglu_dropout"]


@for_subclasses(sharded.rule("gate", "up"))
def swiglu_dropout(
    gate: Tensor,
    up: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> Tensor:
    """Returns ``dropout(silu(gate) * up, p)``: the middle of a gated feed-forward block.

    Parameters
    ----------
    gate : Tensor of float32, float64, float16 or bfloat16, any shape ``(*)``
    up : Tensor of gate's shape and dtype
        Autocast promotes other dtypes.
    p : float or Tensor of one number
        Drop probability, 0 to 1.
    training : bool
        False drops nothing.
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
    Tensor with gate's dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout_add`.

    See Also
    --------
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: gate, up and a bit per element, or a seed. Source: Shazeer, "GLU variants improve Transformer",
    2020.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> fdt.swiglu_dropout(torch.arange(4.0), torch.ones(4), 0.5, seed=4)
    tensor([0.0000, 0.0000, 3.5232, 5.7154])
    """
    check_tensor(up, "up")
    return calls.pointwise(gate, Options(p, training, (generator, seed, part), store), multiplier=up, activation="silu")


@for_subclasses(sharded.rule("gate", "up"))
def geglu_dropout(
    gate: Tensor,
    up: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    approximate: str = "none",
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> Tensor:
    """Returns ``dropout(F.gelu(gate, approximate=approximate) * up, p)``: the gated feed-forward block of T5 v1.1.

    Parameters
    ----------
    gate : Tensor of float32, float64, float16 or bfloat16, any shape ``(*)``
    up : Tensor of gate's shape and dtype
        Autocast promotes other dtypes.
    approximate : {"none", "tanh"}
        The exact gelu, or its approximation by tanh, which T5 v1.1 and Gemma use ("gelu_new"). ValueError for another.
    p : float or Tensor of one number
        Drop probability, 0 to 1.
    training : bool
        False drops nothing.
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
    Tensor with gate's dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout_add`.

    See Also
    --------
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: as in `swiglu_dropout`. Source: Shazeer, "GLU variants improve Transformer", 2020.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> fdt.geglu_dropout(torch.arange(4.0), torch.ones(4), 0.5, seed=4)
    tensor([0.0000, 0.0000, 3.9090, 5.9919])
    """
    checks.choice("approximate", approximate, ("none", "tanh"))
    check_tensor(up, "up")
    activation = "gelu" if approximate == "none" else "gelu_tanh"
    return calls.pointwise(
        gate, Options(p, training, (generator, seed, part), store), multiplier=up, activation=activation
    )

"""A linear layer with a low-rank adapter whose input drops.

`lora_linear` calls the kernel of `ops.lora` for eager dense tensors, and its op for compilers. Everything else gets the
formula composed of torch's products and `dropout`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import checks
from ..ops.lora import LORA, Lora, check_arguments
from ..runtime import dtypes, nested
from . import sharded
from .plan import (
    FUSED_OP,
    KERNEL,
    Source,
    Whole,
    autocast_dtype,
    check_tensor,
    check_unused_seed,
    for_subclasses,
    plan_call,
    seed_for_kernel,
    seed_for_ops,
    wants_gradient,
)
from .routing import drop

__all__ = ["lora_linear"]

Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]  # x, weight, bias, lora_A and lora_B
NAMES = ("x", "weight", "bias", "lora_A", "lora_B")


def _add_lora_to_shards(function: Callable[..., Any], arguments: sharded.Arguments) -> Any:
    """Each process has some rows of x, and the parameters whole."""
    x = sharded.data_of(arguments, "x")
    sharded.check_whole(x, -1, "x", function)
    local = sharded.local_tensor(x)
    own = {
        name: sharded.of_whole(name, arguments[name], x) for name in NAMES[1:] if isinstance(arguments[name], Tensor)
    }
    y = function(**{**arguments, **own, "x": local, "part": sharded.layout_of(x)})
    return sharded.to_dtensor(y, x, local, (*x.shape[:-1], y.shape[-1]))


@for_subclasses(_add_lora_to_shards)
def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float | Tensor,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    part: Whole = None,
) -> Tensor:
    """Returns ``F.linear(x, weight, bias) + F.linear(F.linear(dropout(x, p), lora_A), lora_B) * scaling``: a linear
    layer with a LoRA adapter, whose dropout keeps nothing.

    Parameters
    ----------
    x : Tensor of float32, float64, float16 or bfloat16, ``(*, in)``, any strides
    weight : Tensor of x's dtype, ``(out, in)``
    bias : Tensor of x's dtype, ``(out,)``, or None
    lora_A, lora_B : Tensor of x's dtype, ``(r, in)`` and ``(out, r)``
    scaling : float
        A finite number, which multiplies the adapter's result.
    p : float or Tensor of one number
        Drop probability of each element of x on its way to the adapter, 0 to 1.
    training : bool
        False drops nothing and draws nothing, and so does p = 0.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable or Tensor, optional
        Of which whole the data is a part.

    Returns
    -------
    Tensor with x's dtype, ``(*, out)``

    Raises
    ------
    ValueError
        Shapes that don't fit one another; tensors on several devices; scaling that is not finite; p or seed out of
        range; both seed and generator.
    TypeError
        A tensor of another dtype than x, unless autocast is on; an argument that is no Tensor.
    RuntimeError
        x of an integer or a complex dtype, or nested; what `dropout` refuses under ``torch.compile`` and ``vmap``.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    The mask is that of `dropout` of x.

    Kept for backward: x, the parameters and the seed, 8 bytes. Calls on one x keep it once, under autocast too, which
    casts the arguments as it does for `F.linear`. Backward computes dropped x again, and its product with lora_A.
    Gradients that nobody needs are not computed. If nothing is dropped, torch's own functions compute it, and keep x
    and the product with lora_A. It has a gradient of any order and a forward-mode derivative, and works under
    ``torch.compile``, ``torch.func``, autocast and checkpointing. Gradients of higher order are composed of torch's ops
    under the same mask. So is all of it under a transform; dropped x is then kept too. Sources: Hu et al., "LoRA:
    Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2021); Srivastava et al., JMLR 15, 2014.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> x, weight = torch.ones(2, 3), torch.eye(3)
    >>> lora_A, lora_B = torch.ones(1, 3), torch.tensor([[1.0], [0.0], [2.0]])
    >>> fdt.lora_linear(x, weight, None, lora_A, lora_B, 0.5, p=0.5, seed=4)
    tensor([[2., 1., 3.],
            [3., 1., 5.]])
    """
    arguments: Arguments = x, weight, bias, lora_A, lora_B
    for name, given in zip(NAMES, arguments, strict=True):
        if name != "bias" or given is not None:
            check_tensor(given, name)
    dtypes.check_real(x, "lora_linear")
    nested.refuse(x, "lora_linear")
    nested.check_dense(*arguments)
    dtype = x.dtype
    if (cast := autocast_dtype(x)) is not None and dtype is not torch.float64:
        dtype, arguments = cast, _autocast(arguments, cast)
    scaling = scaling + 0.0 if torch.compiler.is_compiling() else checks.finite("scaling", scaling)
    check_arguments(*arguments, dtype)
    way, p, drops = plan_call(x, p, training, arguments[1:])
    source = generator, seed, part
    if not drops:
        check_unused_seed(source)
    elif way == KERNEL:
        call = Lora(*arguments, seed_for_kernel(x, source), p, scaling)
        y: Tensor = LORA.call_kernel(call, wants_gradient(arguments))
        return y
    elif way == FUSED_OP:
        return LORA(Lora(*arguments, seed_for_ops(x, source), p, scaling))  # type: ignore[no-any-return]
    return _compose(arguments, scaling, p if drops else 0.0, source)


def _autocast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """What autocast does to the arguments of `F.linear`, but for x: the op casts it, and keeps it as it is."""
    x, *parameters = arguments
    weight, bias, lora_A, lora_B = (
        given if given is None or given.dtype is torch.float64 or not given.is_floating_point() else given.to(dtype)
        for given in parameters
    )
    return x, weight, bias, lora_A, lora_B  # type: ignore[return-value]


def _compose(arguments: Arguments, scaling: float, p: Any, source: Source) -> Tensor:
    """The formula by torch's ops, for transforms and modes, and for calls that drop nothing."""
    x, weight, bias, lora_A, lora_B = arguments
    x = x.to(weight.dtype)
    drops = isinstance(p, Tensor) or p > 0.0
    dropped = drop(x, p, True, False, source, None, "seed", "inverted") if drops else x
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, lora_A), lora_B) * scaling

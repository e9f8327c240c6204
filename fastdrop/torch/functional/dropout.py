"""The kinds of dropout that decide for each element, as functions; `structured` has the others.

Each function works out its scaling. `routing` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ...core import checks
from . import sharded
from .plan import Seed, Whole, check_one, check_tensor, for_subclasses
from .routing import drop, gaussian

__all__ = [
    "alpha_dropout",
    "drop_connect",
    "dropout",
    "gaussian_dropout",
]


def dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    part: Whole = None,
    noise_shape: Sequence[int | None] | None = None,
    store: str = "bits",
    scaling: str = "inverted",
) -> Tensor:
    """Returns input with each element dropped with probability p: `torch.nn.functional.dropout`, faster.

    ``y = x / (1 - p)`` where kept and exactly +0 where dropped, whatever x holds there: a dropped inf or NaN is 0, in
    the gradient too. The mask is a function of the seed, the logical (C-order) index and p alone: the same on any
    number of threads, any strides, on a GPU and, with `fastdrop.dropout(x.numpy(), p, rng=seed)`, in NumPy.

    Parameters
    ----------
    input : Tensor of float32, float64, float16, bfloat16, complex64 or complex128, any shape ``(*)``, any strides
        Complex numbers are dropped whole. Of a nested tensor the mask is that of its ``values()``.
    p : float or Tensor of one number
        Drop probability, 0 to 1. p = 1 gives zeros, with zeros for a gradient. As a tensor, on the CPU, it may change
        from call to call of a compiled function without compiling anew.
    training : bool
        False returns input itself, and so does p = 0.
    inplace : bool
        Writes the result to input and returns that.
    generator : torch.Generator, optional
        Of input's device. None is torch's default generator there, which `torch.manual_seed` sets. Each call takes
        one number. Can't be compiled, and checkpointing doesn't restore it: give ``seed`` there.
    seed : int from 0 to 2**64 - 1, or Tensor of one int64 or two, optional
        Draws the mask from this number and nothing from any generator. Ints that vary in a compiled function must be
        below 2**63. A tensor on input's GPU is read there when the kernel runs. The second of two numbers, on the CPU,
        is the seed's offset, such as the number of a training step.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable, or Tensor of int64, optional
        Of which whole input is a part: its mask is that part of the whole's. Processes that hold parts and have one
        seed drop together as one process would. A sequence has parts that lie one after the other along an axis.
        Placements are torch's, ``Shard`` and ``Replicate``, for shards of one size; a callable is given input's shape
        and returns one of the others, for shards of several. A tensor has what `cells_of` gives. A DTensor tells its
        part itself.
    noise_shape : sequence of (int or None), optional
        1 on axes that share one decision, None or the full extent elsewhere, as in Keras.
    store : {"bits", "seed"}
        What is kept for backward: 1/8 byte per element, or 8 bytes in all, from which backward draws the mask again.
    scaling : {"inverted", "standard"}
        "standard", the 2014 paper's, leaves kept elements as they are and multiplies by ``1 - p`` when not training.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    ValueError
        p or seed out of range; noise_shape or part that does not fit; unknown store or scaling; both seed and
        generator; a seed tensor of more than two numbers or on another GPU; p on a GPU.
    TypeError
        input that is no Tensor; p or seed of another type; p that requires grad.
    RuntimeError
        input of an integer dtype, or sparse; what torch won't have written in place; ``generator`` under
        ``torch.compile``, or of another kind of device; ``vmap`` without randomness="same" or "different", or over p;
        input on a GPU without numba-cuda.
    NotImplementedError
        input that is neither on the CPU nor on an NVIDIA GPU (nor "meta").

    Notes
    -----
    Has a gradient of any order and a forward-mode derivative, and works under ``torch.compile``, ``torch.func``,
    autocast and checkpointing. Sources: Hinton et al. 2012; Srivastava et al., JMLR 15, 2014.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> x = torch.arange(1.0, 7.0, requires_grad=True)
    >>> y = fdt.dropout(x, 0.5, seed=4)
    >>> y
    tensor([ 0.,  0.,  6.,  8.,  0., 12.], grad_fn=<DropoutBackward>)
    >>> y.sum().backward()
    >>> x.grad
    tensor([0., 0., 2., 2., 0., 2.])
    """
    if has_torch_function_unary(input):
        options: dict[str, Any] = {"generator": generator, "seed": seed, "part": part}
        options |= {"noise_shape": noise_shape, "store": store, "scaling": scaling}
        return handle_torch_function(dropout, (input,), input, p=p, training=training, inplace=inplace, **options)
    if scaling != "inverted":
        checks.scaling(scaling)
    if noise_shape is not None and not torch.compiler.is_compiling() and not getattr(input, "is_nested", False):
        check_tensor(input)
        checks.noise_shape(noise_shape, tuple(input.shape))
        noise_shape = tuple(noise_shape)
    return drop(input, p, training, inplace, (generator, seed, part), noise_shape, store, scaling)


@for_subclasses()
def alpha_dropout(
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
    """Returns input with elements dropped to SELU's floor, shifted and scaled back to mean 0 and variance 1:
    `torch.nn.functional.alpha_dropout`, faster.

    Parameters
    ----------
    input : Tensor of a float dtype, any shape ``(*)``
    p : float or Tensor of one number
        Drop probability, 0 to 1.
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
    training : bool
        False, torch's default here, returns input itself.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout`. RuntimeError for complex input.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per element, or a seed. Formula: `fastdrop.alpha_dropout`. Source: Klambauer et al.,
    NeurIPS 2017.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> fdt.alpha_dropout(torch.zeros(4), 0.5, True, seed=4)
    tensor([-0.7792, -0.7792,  0.7792,  0.7792])
    """
    return drop(input, p, training, inplace, (generator, seed, part), None, store, "alpha")


@for_subclasses()
def drop_connect(
    weight: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
    scaling: str = "inverted",
) -> Tensor:
    """Returns a weight with connections dropped, one mask for the whole batch: DropConnect.

    It is `dropout` of a weight.

    Parameters
    ----------
    weight : Tensor of a float or complex dtype, any shape
    p : float or Tensor of one number
        Drop probability of a connection, 0 to 1.
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
    scaling : {"inverted", "standard"}
        When elements are scaled: in training, or else when in evaluation.

    Returns
    -------
    Tensor with weight's shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout`.

    See Also
    --------
    dropout : says more about these parameters.
    DropConnect : the module.

    Notes
    -----
    Kept for backward by this function: a bit per weight, or a seed; the op that uses the dropped weight keeps that
    weight too, unless it runs inside `DropConnect`. Sources: Wan et al., ICML 2013 (a mask for each example); Merity et
    al., ICLR 2018, for recurrent weights.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> fdt.drop_connect(torch.ones(2, 3), 0.5, seed=4)
    tensor([[0., 0., 2.],
            [2., 0., 2.]])
    """
    checks.scaling(scaling)
    return drop(weight, p, training, False, (generator, seed, part), None, store, scaling)


def _gaussian_rule(function: Callable[..., Any], arguments: sharded.Arguments) -> Any:
    check_one(arguments.get("p"))  # on all processes, before any of them has a shard of it
    return sharded.rule("input", "p")(function, arguments)


@for_subclasses(_gaussian_rule)
def gaussian_dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
) -> Tensor:
    """Returns input times Gaussian noise of mean 1 and variance ``p / (1 - p)``.

    Parameters
    ----------
    input : Tensor of a float dtype, any shape ``(*)``
    p : float or Tensor of one number
        From 0 to below 1, otherwise ValueError. Only here may a tensor require grad.
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

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout`. RuntimeError for complex input.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: 8 bytes, from which the noise is drawn again, and input if p requires grad. The noise of a seed
    is that of `fastdrop.gaussian_dropout`. Source: Srivastava et al., JMLR 15, 2014, section 10.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> fdt.gaussian_dropout(torch.ones(3), 0.5, seed=4)
    tensor([-0.4915,  1.1203,  1.2279])
    """
    return gaussian(input, p, training, inplace, (generator, seed, part))

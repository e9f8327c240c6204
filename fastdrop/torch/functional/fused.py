"""Dropout with what stands before and after it in a network, in one pass over memory: the fused functions.

Each function checks its tensors and calls `fused_calls`, which takes the way that `plan_call` names. The mask is that
of `dropout` with the same seed, whichever way a call takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import fused_calls as calls
from . import sharded
from .fused_calls import Options
from .plan import Seed, Whole, check_tensor, check_uncut, for_subclasses

__all__ = [
    "bias_act_dropout",
    "bias_dropout_add",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "softmax_dropout",
]


@for_subclasses(sharded.rule("input", "residual"))
def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> Tensor:
    """Returns ``residual + dropout(input, p)``: the end of a residual branch.

    Parameters
    ----------
    input : Tensor of float32, float64, float16, bfloat16, complex64 or complex128, any shape ``(*)``, any strides
    residual : Tensor of input's shape
        Of input's dtype, or float32 beside 16-bit input. Autocast promotes other dtypes.
    p : float or Tensor of one number
        Drop probability, 0 to 1. As a tensor, on the CPU, it may change from call to call of a compiled function
        without compiling anew.
    training : bool
        False drops nothing and draws nothing, and so does p = 0.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable or Tensor, optional
        Of which whole the data is a part.
    store : {"bits", "seed"}
        What is kept for backward: 1/8 byte per element, or 8 bytes in all, from which backward draws the mask again.

    Returns
    -------
    Tensor with residual's dtype and strides, as of ``residual + input``
        Computed in float32, or float64 for float64, and rounded once. What is dropped adds +0, whatever input holds.

    Raises
    ------
    ValueError
        p or seed out of range; a residual of another shape or on another device; unknown store; both seed and
        generator.
    TypeError
        input or residual that is no Tensor; residual's dtype; p or seed of another type.
    RuntimeError
        input of an integer dtype; what `dropout` refuses under ``torch.compile`` and ``vmap``.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    The mask is that of `dropout` of this shape with the same seed.

    The residual's gradient is that of the result itself, and not a copy. Like the other fused functions it has a
    gradient of any order and a forward-mode derivative, and works under ``torch.compile``, ``torch.func``, autocast and
    checkpointing. Sources: Srivastava et al., JMLR 15, 2014; Vaswani et al., NeurIPS 2017, section 5.4.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> fdt.dropout_add(torch.ones(6), torch.arange(6.0), 0.5, seed=4)
    tensor([0., 1., 4., 5., 4., 7.])
    """
    check_tensor(residual, "residual")
    return calls.pointwise(input, Options(p, training, (generator, seed, part), store), residual=residual)


@for_subclasses(sharded.rule("input", "bias", "residual"))
def bias_dropout_add(
    input: Tensor,
    bias: Tensor,
    residual: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> Tensor:
    """Returns ``residual + dropout(input + bias, p)``: `dropout_add` after a linear layer without its bias.

    Parameters
    ----------
    input : Tensor of a float dtype, ``(*, columns)``
    bias : Tensor of a float dtype, ``(columns,)``
    residual : Tensor of input's shape and dtype, or float32 beside 16-bit input
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
    Tensor with residual's dtype and strides, as of ``residual + input``

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout_add`. ValueError for a bias of another shape.

    See Also
    --------
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per element, or a seed. The bias's gradient is summed in float32 (float64 for float64) in
    an order that input's shape decides. Source: Vaswani et al., NeurIPS 2017.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> input, bias, residual = torch.ones(2, 3), torch.tensor([0.0, 1.0, 2.0]), torch.zeros(2, 3)
    >>> fdt.bias_dropout_add(input, bias, residual, 0.5, seed=4)
    tensor([[0., 0., 6.],
            [2., 0., 6.]])
    """
    check_tensor(bias, "bias")
    check_tensor(residual, "residual")
    return calls.pointwise(input, Options(p, training, (generator, seed, part), store), bias, residual=residual)


@for_subclasses(sharded.rule("input", "bias"))
def bias_act_dropout(
    input: Tensor,
    bias: Tensor | None,
    p: float | Tensor = 0.5,
    activation: str | None = "gelu",
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> Tensor:
    """Returns ``dropout(activation(input + bias), p)``: the middle of a feed-forward block.

    Parameters
    ----------
    input : Tensor, ``(*, columns)``, of a float dtype, or complex without an activation
    bias : Tensor of any float dtype, ``(columns,)``, or None
    activation : {"relu", "gelu", "gelu_tanh", "silu", None}
        "gelu_tanh" is ``F.gelu(x, approximate="tanh")``. ValueError for another name.
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
    Tensor with input's dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout_add`. ValueError for a bias of another shape.

    See Also
    --------
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: with "relu" one bit per element and nothing else, whatever ``store`` is. With None that bit or a
    seed. With the other activations input too. Source: Vaswani et al., NeurIPS 2017.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> fdt.bias_act_dropout(torch.arange(-2.0, 4.0), None, 0.5, "relu", seed=4)
    tensor([0., 0., 0., 2., 0., 6.])
    """
    return calls.pointwise(input, Options(p, training, (generator, seed, part), store), bias, activation=activation)


@for_subclasses(sharded.rule("input", "residual", "weight", "bias", "input_bias", whole=(-1,)))
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    eps: float = 1e-5,
    training: bool = True,
    *,
    input_bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> tuple[Tensor, Tensor]:
    """Returns ``(layer_norm(sum, weight, bias), sum)`` with ``sum = residual + dropout(input + input_bias, p)``.

    After attention and feed-forward layers that normalise their result take the first, those that normalise their
    input both: the second is the residual stream that goes on.

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16, ``(*, columns)``
    residual : Tensor of input's shape, or None
        Of input's dtype, or float32 beside 16-bit input. Autocast promotes other dtypes.
    weight, bias, input_bias : Tensor of any float dtype, ``(columns,)``, or None
        weight and bias belong to the norm, and input_bias is added to input.
    eps : float
        Added to the variance.
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
    normed : Tensor with input's dtype, contiguous
    sum : Tensor with residual's dtype, contiguous
        Kept for backward, as results of torch's own ops are: it must not be written to before that.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout_add`. ValueError for other shapes, input without axes, or a part that cuts the last one.

    See Also
    --------
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: sum, a bit per element or a seed, and mean and deviation of each row in float32 (float64 for
    float64). Sources: Ba, Kiros, Hinton, "Layer normalization", 2016; Xiong et al., ICML 2020, of pre-norm.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> normed, sum = fdt.dropout_add_layer_norm(torch.ones(2, 3), torch.zeros(2, 3), p=0.5, seed=4)
    >>> sum
    tensor([[0., 0., 2.],
            [2., 0., 2.]])
    >>> normed
    tensor([[-0.7071, -0.7071,  1.4142],
            [ 0.7071, -1.4142,  0.7071]])
    """
    tensors = input, input_bias, residual, weight, bias
    return calls.norm(tensors, Options(p, training, (generator, seed, part), store), eps, centred=True)


@for_subclasses(sharded.rule("input", "residual", "weight", "input_bias", whole=(-1,)))
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    p: float | Tensor = 0.5,
    eps: float | None = None,
    training: bool = True,
    *,
    input_bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> tuple[Tensor, Tensor]:
    """Returns ``(rms_norm(sum, weight), sum)`` with ``sum = residual + dropout(input + input_bias, p)``.

    Parameters
    ----------
    input : Tensor of a float dtype, ``(*, columns)``
    residual : Tensor of input's shape and dtype, or float32 beside 16-bit input, or None
    weight : Tensor of a float dtype, ``(columns,)``, optional
    p : float or Tensor of one number
        Drop probability, 0 to 1.
    eps : float, optional
        Added to the mean square. None is float32's eps, or float64's for float64, as in ``F.rms_norm``.
    training : bool
        False drops nothing.
    input_bias : Tensor of a float dtype, ``(columns,)``, optional
        Added to input before dropout.
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
    y : Tensor with input's shape and dtype
    sum : Tensor with input's shape and residual's dtype

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout_add_layer_norm`.

    See Also
    --------
    dropout_add_layer_norm, dropout_add : say more about these parameters.

    Notes
    -----
    Kept for backward: as in `dropout_add_layer_norm`. Source: Zhang and Sennrich, NeurIPS 2019.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> normed, sum = fdt.dropout_add_rms_norm(torch.ones(2, 3), torch.zeros(2, 3), p=0.5, seed=4)
    >>> normed
    tensor([[0.0000, 0.0000, 1.7321],
            [1.2247, 0.0000, 1.2247]])
    """
    tensors = input, input_bias, residual, weight, None
    return calls.norm(tensors, Options(p, training, (generator, seed, part), store), eps, centred=False)


_softmax = sharded.rule("scores", "attn_mask", whole=(-1,))
_causal_softmax = sharded.rule("scores", "attn_mask", whole=(-2, -1))


def _softmax_of_shards(function: Callable[..., Any], arguments: sharded.Arguments) -> Any:
    return (_causal_softmax if arguments.get("causal") else _softmax)(function, arguments)


@for_subclasses(_softmax_of_shards)
def softmax_dropout(
    scores: Tensor,
    p: float | Tensor = 0.5,
    scale: float = 1.0,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    store: str = "bits",
) -> Tensor:
    """Returns ``dropout(softmax(scale * scores + attn_mask), p)`` along the last axis: the weights of attention.

    Parameters
    ----------
    scores : Tensor of float32, float64, float16 or bfloat16, ``(*, keys)`` or ``(*, queries, keys)``
    scale : float
    attn_mask : Tensor of bool or any float dtype, broadcastable to scores, optional
        Added to the scores. In a mask of bool, False excludes a key. A row in which no key is left is 0.
    causal : bool
        A query sees the keys up to its own number. With an attn_mask too, it sees the keys that both allow.
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
    Tensor with scores' shape, dtype and strides

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `dropout_add`. ValueError for an attn_mask that does not broadcast, for a scale that is not finite, for
        scores without axes, or with one under ``causal``, and for a part that cuts the keys or, under ``causal``, the
        queries.

    See Also
    --------
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: the softmax in scores' dtype, and a bit per element or a seed. attn_mask has a gradient if it
    requires one. Source: Vaswani et al., NeurIPS 2017.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> fdt.softmax_dropout(torch.zeros(2, 4), 0.5, causal=True, seed=4)
    tensor([[0., 0., 0., 0.],
            [0., 1., 0., 0.]])
    """
    check_tensor(scores, "scores")
    if not scores.is_nested:
        shape = tuple(scores.shape)
        check_uncut(part, shape, -1, "the last axis, whose softmax is of all keys")
        if causal:
            check_uncut(part, shape, -2, "the axis of queries, which causal counts: give an attn_mask instead")
    return calls.softmax(scores, Options(p, training, (generator, seed, part), store), attn_mask, scale, causal)

"""Dropout as a function, and the adapters that give it a gradient.

`dropout` routes. Plain eager tensors take `_Fast`, an `autograd.Function` that calls the kernel at once; compilers,
tracers, transforms, modes and subclasses take the ops of `_ops`, which serve all of those and cost three times as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _checks
from ..stream import threshold_and_scale
from . import _kernels, _ops, _random
from ._plain import is_plain

__all__ = ["dropout"]

KEEPS_ALL = 2.0**-33  # p up to here rounds to a threshold of 0

_is_compiling = torch.compiler.is_compiling


def dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    noise_shape: Any = None,
    store: str = "bits",
) -> Tensor:
    """Returns input with each element dropped with probability p: `torch.nn.functional.dropout`, faster.

    ``y = x / (1 - p)`` where kept and exactly +0 where dropped, whatever x holds there: a dropped inf or NaN is 0, in
    the gradient too. The mask is a function of the seed, the logical (C-order) index and p alone: the same on any
    number of threads, any strides, on a GPU and, with `fastdrop.dropout(x.numpy(), p, rng=seed)`, in NumPy.

    Parameters
    ----------
    input : Tensor of float32, float64, float16, bfloat16, complex64 or complex128, any shape ``(*)``, any strides
        Complex numbers are dropped whole.
    p : float or Tensor of one number
        Drop probability, 0 to 1. p = 1 gives zeros, with zeros for a gradient. As a tensor, on the CPU, it may change
        from call to call of a compiled function without compiling anew.
    training : bool
        False returns input itself; so does p = 0.
    inplace : bool
        Writes the result to input and returns that.
    generator : torch.Generator, optional
        Of input's device; None is torch's default generator there, the one `torch.manual_seed` sets. Each call takes
        one number. Can't be compiled, and checkpointing doesn't restore it: give ``seed`` there.
    seed : int from 0 to 2**64 - 1, or Tensor of one int64, optional
        Draws the mask from this number and nothing from any generator. Ints that vary in a compiled function must be
        below 2**63. A tensor on input's GPU is read there when the kernel runs.
    noise_shape : sequence of (int or None), optional
        1 on axes that share one decision, None or the full extent elsewhere, as in Keras.
    store : {"bits", "seed"}
        What is kept for backward: 1/8 byte per element, or 8 bytes in all, from which backward draws the mask again.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    ValueError
        p or seed out of range; noise_shape that does not fit; unknown store; both seed and generator; a seed tensor of
        more than one number or on another GPU; p on a GPU.
    TypeError
        input that is no Tensor; p or seed of another type.
    RuntimeError
        input of an integer dtype; what torch won't have written in place; ``generator`` under ``torch.compile``, or of
        another kind of device; ``vmap`` without randomness="same" or "different", or over p; input on a GPU without
        numba-cuda.
    NotImplementedError
        input that is neither on the CPU nor on an NVIDIA GPU (nor "meta").

    Has a gradient of any order and a forward-mode derivative, and works under ``torch.compile``, ``torch.func``,
    autocast and checkpointing. Sources: Hinton et al. 2012; Srivastava et al., JMLR 15, 2014.

    >>> import torch, fastdrop.torch as fdt
    >>> x = torch.arange(1.0, 7.0, requires_grad=True)
    >>> y = fdt.dropout(x, 0.5, seed=4)
    >>> y
    tensor([ 0.,  0.,  6.,  8.,  0., 12.], grad_fn=<_FastBackward>)
    >>> y.sum().backward()
    >>> x.grad
    tensor([0., 0., 2., 2., 0., 2.])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            dropout,
            (input,),
            input,
            p=p,
            training=training,
            inplace=inplace,
            generator=generator,
            seed=seed,
            noise_shape=noise_shape,
            store=store,
        )
    if _is_compiling():
        return _compiled(input, p, training, inplace, generator, seed, noise_shape, store)
    given = p
    if type(p) is not float:
        p = _number(p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {given}")
    if store != "bits":
        _checks.choice("store", store, _checks.STORES)
    cut, scale = threshold_and_scale(p)
    if not training or cut == 0:
        _check_tensor(input)
        _ops.cells_shape(noise_shape, input)
        if seed is not None:
            _random.check(seed, generator)
        return input
    try:
        known = input.dtype in _kernels.DTYPES
    except AttributeError:
        known = False
    if not known:
        _check_tensor(input)
        _kernels.check_dtype(input)
    cells_shape = None if noise_shape is None else _ops.cells_shape(noise_shape, input)
    if not is_plain(input):
        return _by_ops(input, p, inplace, generator, seed, cells_shape, store == "bits")
    if seed is not None:
        seed = _random.given(seed, generator, input)
    if inplace:
        _check_inplace(input)
    if seed is not None:
        number = seed
    elif input.is_cuda:
        number = _random.draw_cuda(input.device, generator)
    else:
        number = _random.draw(generator)
    if input.requires_grad and torch.is_grad_enabled():
        result: Tensor = _apply_fast(input, (number, cut, scale, cells_shape, store == "bits", inplace, p))
        return result
    if inplace:
        torch.autograd.graph.increment_version(input)
    return _kernels.forward(input, number, cut, scale, cells_shape, False, inplace)[0]


class _Fast(torch.autograd.Function):
    """Plain eager tensors: straight to the kernel. In the old style, which costs a quarter of ``setup_context``'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: tuple[Any, ...]) -> Tensor:
        seed, cut, scale, cells_shape, bits, inplace, _ = call
        y, words = _kernels.forward(x, seed, cut, scale, cells_shape, bits, inplace)
        ctx.save_for_backward(_random.as_tensor(seed) if words is None else words)
        ctx.call = (None, *call[1:]) if isinstance(seed, Tensor) else call  # kept where needed, and not twice
        if inplace:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        _, cut, scale, cells_shape, bits, _, p = ctx.call
        if _is_compiling() or torch.is_grad_enabled() or not is_plain(dy):
            return _ops.masked(dy, kept, p, cells_shape, bits), None
        if bits:
            return _kernels.apply(dy, kept, scale, cells_shape), None
        return _kernels.forward(dy, _random.for_kernel(kept, dy), cut, scale, cells_shape, False)[0], None


# Past `Function.apply`, whose Python looks for functorch (which `is_plain` has ruled out), and past its counterpart in
# backward, which looks for a `vjp`: two microseconds of twenty for a small tensor.
_apply_fast = super(torch.autograd.Function, _Fast).apply
_Fast._backward_cls.apply = _Fast.backward  # type: ignore[attr-defined]


def _compiled(
    x: Tensor, p: Any, training: bool, inplace: bool, generator: Any, seed: Any, noise_shape: Any, store: str
) -> Tensor:
    """What a compiler looks into: as little as can be."""
    if store != "bits" and store != "seed":
        raise ValueError(f"store must be one of 'bits', 'seed', but got {store!r}")
    if not isinstance(p, Tensor):
        p = p + 0.0
        if p < 0.0 or p > 1.0:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or (not isinstance(p, Tensor) and p <= KEEPS_ALL):
        return x
    if noise_shape is not None:
        if len(noise_shape) != x.dim():
            raise ValueError("noise_shape must have one entry per axis of x")
        noise_shape = [x.shape[i] if cells is None else cells for i, cells in enumerate(noise_shape)]
    return _by_ops(x, p, inplace, generator, seed, noise_shape, store == "bits")


def _by_ops(x: Tensor, p: Any, inplace: bool, generator: Any, seed: Any, cells_shape: Any, bits: bool) -> Tensor:
    """Compilers, tracers, transforms, forward-mode AD, modes and subclasses: the ops and nothing else."""
    if seed is not None:
        number = _random.as_tensor(seed, generator, like=x)
    elif generator is None:
        number = torch.ops.fastdrop.draw(x, [])
    elif _is_compiling():
        raise RuntimeError("generator can't be compiled: give seed, an int or a tensor, in its place")
    else:
        number = _random.draw_tensor(generator, x)
    y: Tensor = _ops.overload(torch.ops.fastdrop.forward, p)(x, number, p, cells_shape, bits)[0]
    return x.copy_(y) if inplace else y


def _check_tensor(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a Tensor, but got {type(x).__name__}")


def _check_inplace(x: Tensor) -> None:
    """Raises torch's own error where torch would not have x written to, before anything is drawn or written."""
    base = x._base
    view = base is not None and (
        (base.requires_grad and base.is_leaf)
        or torch._C._autograd._get_creation_meta(x) != torch._C._autograd.CreationMeta.DEFAULT
    )
    forbidden = torch.is_grad_enabled() and x.requires_grad and (x.is_leaf or view)
    outside = x.is_inference() and not torch.is_inference_mode_enabled()
    if forbidden or outside or torch._debug_has_internal_overlap(x) == 1:
        x.mul_(1)


def _number(p: Any) -> float:
    if isinstance(p, Tensor):
        if p.numel() != 1:
            raise TypeError(f"p must be a number or a tensor of one, but got shape {tuple(p.shape)}")
        return _ops.value_of(p)
    return float(p) if isinstance(p, bool) else _checks.number("p", p)

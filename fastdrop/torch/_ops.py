"""The ops ``torch.ops.fastdrop.*``: what compilers, transforms and tracers see of dropout.

``draw`` takes a seed from torch's generator; ``forward`` and ``backward`` are functions of their arguments alone. Every
op has a fake kernel, ``vmap`` rules and derivatives of any order, reverse and forward; backward is linear and its own
adjoint. p may be a float or, in the overloads named ``tensor``, a tensor without axes: one that changes from step to
step then costs no recompilation.

The derivatives are kernels of our own and not `torch.library.register_autograd`'s, which drop tangents without a word
and refuse to be transformed.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import forward_ad

from .. import _checks
from ..mask import word_count
from ..stream import threshold_and_scale
from . import _kernels, _random
from ._plain import is_transformed

DRAW = "draw(Tensor like, SymInt[] size) -> Tensor"
FORWARD = "(Tensor x, Tensor seed, {p} p, SymInt[]? noise_shape, bool bits) -> (Tensor y, Tensor words)"
BACKWARD = "(Tensor dy, Tensor words, {p} p, SymInt[]? noise_shape) -> Tensor"
P_TYPES = {"": "float", ".tensor": "Tensor"}  # by overload

library = torch.library.Library("fastdrop", "DEF")


def threshold_scale(p: float | Tensor) -> tuple[int, float]:
    number = value_of(p) if isinstance(p, Tensor) else float(p)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {number}")
    return threshold_and_scale(number)


def value_of(p: Tensor) -> float:
    """The number in a tensor, unless a GPU would have to be waited for."""
    if p.is_cuda:
        raise ValueError("p, the drop probability, must be a number or a tensor on the CPU, but got one on the GPU")
    return float(p.item())


def cells_shape(noise_shape: Any, x: Tensor) -> tuple[int, ...] | None:
    """Extents of x's mask, None where they are those of x."""
    if noise_shape is None:
        return None
    full = tuple(x.shape)
    cells = _checks.noise_shape(noise_shape, full)
    return None if cells == full else cells


# ---- CPU and CUDA ----


def _draw(like: Tensor, size: list[int]) -> Tensor:
    """``like`` is for the dispatcher: a fake or wrapped tensor gets a fake or wrapped seed."""
    if size or not like.is_cuda:
        return torch.empty(size, dtype=torch.int64, device=_random.device_for(like)).random_()
    seed = _random.draw_cuda(like.device, None)  # what eager code takes
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), _random.signed(seed), dtype=torch.int64, device=like.device)


def _forward(
    x: Tensor, seed: Tensor, p: float | Tensor, noise_shape: list[int] | None, bits: bool
) -> tuple[Tensor, Tensor]:
    cut, scale = threshold_scale(p)
    number = _random.for_kernel(seed, x)
    y, words = _kernels.forward(x, number, cut, scale, cells_shape(noise_shape, x), bits)
    return y, x.new_empty(0, dtype=torch.int32) if words is None else words


def _backward(dy: Tensor, words: Tensor, p: float | Tensor, noise_shape: list[int] | None) -> Tensor:
    _, scale = threshold_scale(p)
    return _kernels.apply(dy, words, scale, cells_shape(noise_shape, dy))


# ---- shapes alone ----


def _draw_fake(like: Tensor, size: list[int]) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device=_random.device_for(like))


def _forward_fake(
    x: Tensor, seed: Tensor, p: float | Tensor, noise_shape: list[int] | None, bits: bool
) -> tuple[Tensor, Tensor]:
    _kernels.check_dtype(x)
    cells = x.numel() if noise_shape is None else math.prod(noise_shape)
    return torch.empty_like(x), x.new_empty(word_count(cells) if bits else 0, dtype=torch.int32)


def _backward_fake(dy: Tensor, words: Tensor, p: float | Tensor, noise_shape: list[int] | None) -> Tensor:
    return torch.empty_like(dy)


# ---- gradients ----


def overload(op: Any, p: float | Tensor) -> Any:
    """By hand: an op called with a tensor for p may read the number in it, and a compiler then keeps that number."""
    return op.tensor if isinstance(p, Tensor) else op.default


def masked(x: Tensor, kept: Tensor, p: float | Tensor, noise_shape: Any, bits: bool) -> Tensor:
    """The derivative: x under the mask that was kept, as words or as a seed."""
    if bits:
        dx: Tensor = overload(torch.ops.fastdrop.backward, p)(x, kept, p, noise_shape)
        return dx
    again: Tensor = overload(torch.ops.fastdrop.forward, p)(x, kept, p, noise_shape, False)[0]
    return again


def _below_autograd(op: Any, keyset: Any, *arguments: Any) -> Any:
    """The op's next kernel. `Function` has turned derivatives off; transforms further out want theirs."""
    outer = is_transformed()
    on = (torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True)) if outer else ()
    with contextlib.ExitStack() as stack:
        for context in (*on, torch._C._AutoDispatchBelowAutograd()):
            stack.enter_context(context)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _keep(ctx: Any, kept: Tensor, p: float | Tensor, noise_shape: Any, bits: bool) -> None:
    variable = p if isinstance(p, Tensor) else None
    ctx.p, ctx.noise_shape, ctx.bits = None if variable is p else p, noise_shape, bits
    ctx.save_for_backward(kept, variable)
    ctx.save_for_forward(kept, variable)


def _derivative(ctx: Any, x: Tensor) -> Tensor:
    kept, p = ctx.saved_tensors
    return masked(x, kept, ctx.p if p is None else p, ctx.noise_shape, ctx.bits)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _below_autograd(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, _, seed, p, noise_shape, bits = inputs
        _keep(ctx, output[1] if bits else seed, p, noise_shape, bits)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
        return None, None, None if dy is None else _derivative(ctx, dy), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, _op: Any, _keyset: Any, dx: Tensor | None, *_: Any) -> tuple[Any, None]:
        return None if dx is None else _derivative(ctx, dx), None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _below_autograd(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, _, words, p, noise_shape = inputs
        _keep(ctx, words, p, noise_shape, True)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
        return None, None, _derivative(ctx, ddx), None, None, None

    @staticmethod
    def jvp(ctx: Any, _op: Any, _keyset: Any, ddy: Tensor, *_: Any) -> Tensor:
        return _derivative(ctx, ddy)


def _autograd(op: Any, function: type[torch.autograd.Function]) -> Any:
    """A kernel for autograd's key: one level of derivatives, as the dispatcher goes from one transform to the next."""
    # `Function.apply` itself would start again from the outermost transform.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if not is_transformed():
            return apply(op, keyset, *arguments)
        with enable_single_level_autograd_function():
            return apply(op, keyset, *arguments)

    return kernel


# ---- vmap ----


def _draw_vmap(like: Tensor, size: list[int]) -> Tensor:
    """On the key of the mode and not of batched tensors: under "different" each sample draws, batched or not."""
    interpreter: Any = torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter()
    randomness = interpreter.randomness()
    if randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
            "randomness flags on vmap or perform the randomness operation out of vmap"
        )
    level = interpreter.level()
    like, _ = torch._C._functorch._unwrap_batched(like, level)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)):
        if randomness == "same":
            seed: Tensor = torch.ops.fastdrop.draw(like, size)
            return seed
        seeds = torch.ops.fastdrop.draw(like, [interpreter.batch_size(), *size])
        return torch._C._functorch._add_batch_dim(seeds, 0, level)


def _forward_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    seed: Tensor,
    p: float | Tensor,
    noise_shape: list[int] | None,
    bits: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    op = overload(torch.ops.fastdrop.forward, p)
    _no_batch(in_dims[2], p)
    if in_dims[1] is None:  # one seed: all samples under the same mask
        x = x.movedim(in_dims[0], 0)
        return op(x, seed, p, [1, *(x.shape[1:] if noise_shape is None else noise_shape)], bits), (0, None)
    seeds = seed.movedim(in_dims[1], 0)
    samples = _samples(x, in_dims[0], info.batch_size)
    results = [op(x_, seed_, p, noise_shape, bits) for x_, seed_ in zip(samples, seeds.unbind(), strict=True)]
    if not results:
        y, words = op(_sample_like(x, in_dims[0]), torch.zeros((), dtype=torch.int64), p, noise_shape, bits)
        return (y.new_empty((0, *y.shape)), words.new_empty((0, *words.shape))), (0, 0)
    return (torch.stack([y for y, _ in results]), torch.stack([words for _, words in results])), (0, 0)


def _backward_vmap(
    info: Any, in_dims: tuple[Any, ...], dy: Tensor, words: Tensor, p: float | Tensor, noise_shape: list[int] | None
) -> tuple[Tensor, int]:
    op = overload(torch.ops.fastdrop.backward, p)
    _no_batch(in_dims[2], p)
    if in_dims[1] is None:
        dy = dy.movedim(in_dims[0], 0)
        return op(dy, words, p, [1, *(dy.shape[1:] if noise_shape is None else noise_shape)]), 0
    masks = words.movedim(in_dims[1], 0).unbind()
    samples = _samples(dy, in_dims[0], info.batch_size)
    if not samples:
        return dy.new_empty((0, *_sample_like(dy, in_dims[0]).shape)), 0
    return torch.stack([op(dy_, mask, p, noise_shape) for dy_, mask in zip(samples, masks, strict=True)]), 0


def _samples(x: Tensor, batch_axis: int | None, count: int) -> list[Tensor]:
    return [x] * count if batch_axis is None else list(x.movedim(batch_axis, 0).unbind())


def _sample_like(x: Tensor, batch_axis: int | None) -> Tensor:
    """A sample's shape, where there is none."""
    return x if batch_axis is None else x.new_empty(x.movedim(batch_axis, 0).shape[1:])


def _no_batch(batch_axis: int | None, p: float | Tensor) -> None:
    if isinstance(p, Tensor) and batch_axis is not None:
        raise ValueError("vmap over p, the dropout probability, is not supported: p must be one number for all samples")


# ---- registration ----

library.define(DRAW, tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag))
library.impl("draw", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("fastdrop::draw", _draw_fake, lib=library)
library.impl("draw", _draw_vmap, "FuncTorchVmapMode")

for _suffix, _type in P_TYPES.items():
    for _name, _schema, _kernel, _fake, _function, _vmap in (
        ("forward", FORWARD, _forward, _forward_fake, _Forward, _forward_vmap),
        ("backward", BACKWARD, _backward, _backward_fake, _Backward, _backward_vmap),
    ):
        _op = f"{_name}{_suffix}"
        library.define(_op + _schema.format(p=_type), tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(_op, _kernel, "CPU")
        library.impl(_op, _kernel, "CUDA")
        torch.library.register_fake(f"fastdrop::{_op}", _fake, lib=library)
        _packet = getattr(torch.ops.fastdrop, _name)
        library.impl(
            _op, _autograd(getattr(_packet, _suffix[1:] or "default"), _function), "Autograd", with_keyset=True
        )
        torch.library.register_vmap(f"fastdrop::{_op}", _vmap, lib=library)

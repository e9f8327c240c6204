"""How a call reaches a kernel, and the adapters that give it a gradient.

Plain eager tensors take an `autograd.Function` that calls the kernel at once; compilers, tracers, transforms, modes and
subclasses take the ops of `ops.mask`, which serve all of those and cost three times as much. What functions and modules
offer is `drop` with cells and a law of its own, `drop_block` or `gaussian`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ...core import checks, variants
from ...core.random import DROP_ALL, threshold
from ..ops import mask as mask_ops
from ..runtime import mask_kernels, nested, seeds, tracing
from ..runtime.dispatch import can_call_kernel, is_eager_dense, is_transformed
from ..runtime.dispatch.compilers import constant_in_graphs
from ..runtime.dispatch.ops import fast_apply
from ..runtime.dispatch.tensors import check_inplace, is_in_dispatch_mode, jit_trace, may_be_differentiated_forward

__all__ = ["autocast_dtype", "check_tensor", "drop", "drop_block", "eager_probability", "for_subclasses", "gaussian"]

KEEPS_ALL = 2.0**-33  # p up to here rounds to a threshold of 0

_is_compiling = torch.compiler.is_compiling

Shape = tuple[int, ...]
Function = TypeVar("Function", bound=Callable[..., Any])


def for_subclasses(function: Function) -> Function:
    """Lets tensor subclasses, in the place of any argument, have their way with a function, as torch's own do."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(called, given, *args, **kwargs)
        return function(*args, **kwargs)

    return called  # type: ignore[return-value]


def drop(
    x: Tensor,
    p: float | Tensor,
    training: bool,
    inplace: bool,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    cells_shape: Any,
    store: str,
    law: str,
) -> Tensor:
    """Everything that keeps or drops: ``cells_shape`` fits x, or is None for every element; ``law`` is the affine's."""
    if _is_compiling() or (type(p) is not float and _is_traced_number(p)):
        return _compiled(x, p, training, inplace, generator, seed, cells_shape, store, law)
    p = eager_probability(p)
    if store != "bits":
        checks.choice("store", store, checks.STORES)
    cut = threshold(p)  # type: ignore[arg-type]
    if not training or cut == 0:
        check_tensor(x)
        _check_unused(seed, generator)
        return _evaluated(x, 1.0 - cut / DROP_ALL, inplace) if law == "standard" and cut else x
    try:
        known = x.dtype in mask_kernels.DTYPES
    except AttributeError:
        known = False
    if not known:
        check_tensor(x)
        mask_kernels.check_dtype(x)
    if law == "alpha":
        mask_kernels.check_real(x, "alpha dropout")
    if cells_shape is not None and not x.is_nested and cells_shape == x.shape:
        cells_shape = None
    if not is_eager_dense(x):
        return _by_ops(x, p, inplace, generator, seed, cells_shape, store == "bits", law)
    number = _number_of_seed(x, generator, seed, inplace)
    affine = variants.affine(law, cut)
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _apply_fast(x, (number, cut, affine, cells_shape, store == "bits", inplace, p, law))
        return result
    if inplace:
        torch.autograd.graph.increment_version(x)
    return mask_kernels.forward(x, number, cut, affine, cells_shape, False, inplace)[0]


class _Fast(torch.autograd.Function):
    """Plain eager tensors: straight to the kernel. In the old style, which costs a quarter of ``setup_context``'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: tuple[Any, ...]) -> Tensor:
        seed, cut, affine, cells_shape, bits, inplace, _, _ = call
        y, words = mask_kernels.forward(x, seed, cut, affine, cells_shape, bits, inplace)
        ctx.save_for_backward(seeds.as_tensor(seed) if words is None else words)
        ctx.call = (None, *call[1:]) if isinstance(seed, Tensor) else call  # kept where needed, and not twice
        if inplace:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        _, cut, (a, _, _), cells_shape, bits, _, p, law = ctx.call
        if not can_call_kernel(dy):
            return mask_ops.masked(dy, kept, p, cells_shape, bits, law), None
        if bits:
            return mask_kernels.apply(dy, kept, (a, 0.0, 0.0), cells_shape), None
        return mask_kernels.forward(dy, seeds.for_kernel(kept, dy), cut, (a, 0.0, 0.0), cells_shape, False)[0], None


_apply_fast = fast_apply(_Fast)


def _compiled(
    x: Tensor,
    p: Any,
    training: bool,
    inplace: bool,
    generator: Any,
    seed: Any,
    noise_shape: Any,
    store: str,
    law: str,
) -> Tensor:
    """What a compiler looks into: as little as can be."""
    if store != "bits" and store != "seed":
        raise ValueError(f"store must be one of 'bits', 'seed', but got {store!r}")
    p = traced_probability(p)
    if not training and law == "standard":
        cut = torch.round(p.double() * DROP_ALL) if isinstance(p, Tensor) else threshold(p)
        return _evaluated(x, 1.0 - cut / DROP_ALL, inplace)
    if not training or (not isinstance(p, Tensor) and p <= KEEPS_ALL):
        return x
    if noise_shape is not None and not x.is_nested:
        if len(noise_shape) != x.dim():
            raise ValueError("noise_shape must have one entry per axis of x")
        noise_shape = [x.shape[i] if cells is None else cells for i, cells in enumerate(noise_shape)]
    return _by_ops(x, p, inplace, generator, seed, noise_shape, store == "bits", law)


def _by_ops(
    x: Tensor, p: Any, inplace: bool, generator: Any, seed: Any, cells_shape: Any, bits: bool, law: str
) -> Tensor:
    """Compilers, tracers, transforms, forward-mode AD, modes and subclasses: the ops and nothing else.

    Nested tensors come by here too; what is called on their values then finds its own way.
    """
    if x.is_nested:
        store = "bits" if bits else "seed"

        def dropped(values: Tensor, cells: Any) -> Tensor:
            return drop(values, p, True, False, generator, seed, cells, store, law)

        y = nested.drop(x, cells_shape, law, dropped)
        return nested.write(x, y) if inplace else y
    nested.check_dense(x)
    if is_exported_to_onnx():
        y = for_onnx(x, p, cells_shape, law, seed, generator)
        return x.copy_(y) if inplace else y
    number = _tensor_of_seed(x, generator, seed)
    if cells_shape is not None:
        cells_shape = _extents(cells_shape)
    y = mask_ops.overload(torch.ops.fastdrop.forward, p)(x, number, p, cells_shape, bits, law)[0]
    return x.copy_(y) if inplace else y


def _extents(cells: Any) -> Any:
    """A mask's shape as ops take it: what `torch.jit.trace` finds in a tensor's shape are tensors."""
    return cells if jit_trace() is None else [int(extent) for extent in cells]


def _evaluated(x: Tensor, scale: Any, inplace: bool) -> Tensor:
    """Standard scaling outside of training."""
    mask_kernels.check_dtype(x)
    if x.is_nested:
        y: Tensor = nested.on_values(lambda values: _evaluated(values, scale, False), x)
        return nested.write(x, y) if inplace else y
    if not isinstance(scale, Tensor) and scale == 0.0:  # where infinities and NaNs leave no trace
        all_of_it = x.new_ones((), dtype=torch.bool)
        return x.masked_fill_(all_of_it, 0.0) if inplace else x.masked_fill(all_of_it, 0.0)
    return x.mul_(scale) if inplace else (x * scale).to(x.dtype)  # without axes it would take on a tensor's dtype


def drop_block(
    x: Tensor,
    p: float | Tensor,
    block_size: Any,
    spatial_axes: int,
    inplace: bool,
    training: bool,
    couple_channels: bool,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
) -> Tensor:
    check_tensor(x)
    p = traced_probability(p) if _is_compiling() else eager_probability(p, "drop probability")
    if x.dim() != spatial_axes + 2:
        raise ValueError(f"input should be {spatial_axes + 2} dimensional. Got {x.dim()} dimensions.")
    sizes = checks.block_size(block_size, spatial_axes)
    if not training or (not isinstance(p, Tensor) and p <= KEEPS_ALL):
        _check_unused(seed, generator)
        return x
    nested.refuse(x, "DropBlock")
    nested.check_dense(x)
    if is_exported_to_onnx():
        refuse_onnx("blocks")
    shape = tuple(x.shape)
    cells = (shape[0], 1, *shape[2:]) if couple_channels else shape
    if _is_compiling() or not is_eager_dense(x):
        drawn, cells = _tensor_of_seed(x, generator, seed), _extents(cells)
        words, kept = mask_ops.overload(torch.ops.fastdrop.draw_blocks, p)(x, drawn, p, cells, sizes)
        y: Tensor = torch.ops.fastdrop.keep_blocks(x, words, kept, cells)
        return x.copy_(y) if inplace else y
    mask_kernels.check_dtype(x)
    number = _number_of_seed(x, generator, seed, inplace)
    plan = variants.blocks(cells, p, sizes)
    words, kept = mask_kernels.draw_blocks(x, number, threshold(plan.gamma), plan)
    cells_shape = cells if couple_channels else None
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _FastBlocks.apply(x, words, kept, cells_shape, inplace)
        return result
    if inplace:
        torch.autograd.graph.increment_version(x)
    return mask_kernels.keep_blocks(x, words, kept, cells_shape, inplace)


class _FastBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, words: Tensor, kept: Tensor, cells_shape: Shape | None, inplace: bool) -> Tensor:
        ctx.save_for_backward(words, kept)
        ctx.cells_shape = cells_shape
        if inplace:
            ctx.mark_dirty(x)
        return mask_kernels.keep_blocks(x, words, kept, cells_shape, inplace)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        words, kept = ctx.saved_tensors
        if can_call_kernel(dy):
            dx = mask_kernels.keep_blocks(dy, words, kept, ctx.cells_shape)
        else:
            dx = torch.ops.fastdrop.keep_blocks(dy, words, kept, ctx.cells_shape or dy.shape)
        return dx, None, None, None, None


def gaussian(
    x: Tensor,
    p: float | Tensor,
    training: bool,
    inplace: bool,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
) -> Tensor:
    check_tensor(x)
    if not _is_differentiated(p):
        p = traced_probability(p) if _is_compiling() else eager_probability(p)
    if not isinstance(p, Tensor) and not _is_compiling():
        p = checks.gaussian_probability(p)
    if not training or (not isinstance(p, Tensor) and p == 0.0):
        _check_unused(seed, generator)
        return x
    if not _is_compiling():
        mask_kernels.check_real(x, "Gaussian dropout")
    if x.is_nested:
        y: Tensor = nested.on_values(lambda values: gaussian(values, p, True, False, generator, seed), x)
        return nested.write(x, y) if inplace else y
    if _is_compiling() or isinstance(p, Tensor) or not is_eager_dense(x):
        nested.check_dense(x)
        if is_exported_to_onnx():
            refuse_onnx("Gaussian noise")
        drawn = _tensor_of_seed(x, generator, seed)
        y = mask_ops.overload(torch.ops.fastdrop.gaussian, p)(x, drawn, p)
        return x.copy_(y) if inplace else y
    number = _number_of_seed(x, generator, seed, inplace)
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _FastGaussian.apply(x, number, p, inplace)
        return result
    if inplace:
        torch.autograd.graph.increment_version(x)
    return mask_kernels.gaussian(x, number, variants.spread(p), inplace)


class _FastGaussian(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: int | Tensor, p: float, inplace: bool) -> Tensor:
        y = mask_kernels.gaussian(x, seed, variants.spread(p), inplace)
        ctx.save_for_backward(seeds.as_tensor(seed))
        ctx.p = p
        if inplace:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (seed,) = ctx.saved_tensors
        if can_call_kernel(dy):
            dx = mask_kernels.gaussian(dy, seeds.for_kernel(seed, dy), variants.spread(ctx.p))
        else:
            dx = torch.ops.fastdrop.gaussian(dy, seed, ctx.p)
        return dx, None, None, None


# ---- export to ONNX ----


@constant_in_graphs
def is_exported_to_onnx() -> bool:
    """Whether `torch.onnx.export` looks at the call; asked while it traces, not by the graph."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def for_onnx(
    x: Tensor, p: Any, cells_shape: Any, law: str, seed: int | Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """Dropout as ONNX has it: an operator whose mask is drawn by whoever runs the model."""
    if cells_shape is not None or law != "inverted":
        refuse_onnx("decisions that elements share, and no other scaling than 1 / (1 - p)")
    if isinstance(p, Tensor) or seed is not None or generator is not None:
        refuse_onnx("seed, generator or tensor for p")
    y: Tensor = torch.ops.aten.native_dropout.default(x, p, True)[0]
    return y


def refuse_onnx(missing: str) -> None:
    raise RuntimeError(f"ONNX's Dropout has no {missing}: call model.eval() before torch.onnx.export")


# ---- arguments ----


def _check_unused(seed: int | Tensor | None, generator: torch.Generator | None) -> None:
    """Refuses a bad seed where nothing is drawn from it."""
    if seed is not None and not _is_compiling():
        seeds.check(seed, generator)


def _number_of_seed(
    x: Tensor, generator: torch.Generator | None, seed: int | Tensor | None, inplace: bool
) -> int | Tensor:
    """The seed of a call on a plain tensor, once nothing can be wrong with it any more."""
    if seed is not None:
        seed = seeds.given(seed, generator, x)
    if inplace:
        check_inplace(x)
    if seed is not None:
        return seed
    return seeds.draw_cuda(x.device, generator) if x.is_cuda else seeds.draw(generator)


def _tensor_of_seed(x: Tensor, generator: torch.Generator | None, seed: int | Tensor | None) -> Tensor:
    """The seed of a call that goes by the ops."""
    if seed is not None:
        return seeds.as_tensor(seed, generator, like=x)
    if generator is None:
        return tracing.draw(x)
    if _is_compiling():
        raise RuntimeError("generator can't be compiled: give seed, an int or a tensor, in its place")
    return seeds.draw_tensor(generator, x)


def eager_probability(p: Any, what: str = "dropout probability") -> Any:
    """The number, but a tensor where a tracer has it and nobody reads it yet."""
    if type(p) is not float:
        if _is_traced_number(p):
            return traced_probability(p)
        return checks.dropout_probability(_number(p), p, what)
    return checks.dropout_probability(p, p, what)


def traced_probability(p: Any) -> Any:
    """p as a compiler may see it: a number, perhaps a symbolic one, or a tensor that nobody reads yet."""
    if not isinstance(p, Tensor):
        p = checks.dropout_probability(p + 0.0)
    elif p.requires_grad:
        _refuse_gradient()
    return p


def _is_traced_number(p: Any) -> bool:
    """Whether p is a tensor of which a mode or a subclass, such as `make_fx` has, would not tell the number."""
    if not isinstance(p, Tensor):
        return False
    return is_in_dispatch_mode() or type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _is_differentiated(p: Any) -> bool:
    """Whether somebody may want a derivative with respect to p."""
    if not isinstance(p, Tensor):
        return False
    return p.requires_grad or (not _is_compiling() and may_be_differentiated_forward())


def _refuse_gradient() -> None:
    raise TypeError(
        "p, the drop probability, must be a number or a tensor that does not require grad: only gaussian_dropout has a "
        "gradient with respect to p"
    )


@constant_in_graphs
def is_transformed_there() -> bool:
    """`is_transformed` of a call that is being compiled: asked while it is traced, not by the graph."""
    return is_transformed()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast has ops compute in where x is, if it is on."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def check_tensor(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a Tensor, but got {type(x).__name__}")


def _number(p: Any) -> float:
    if isinstance(p, Tensor):
        if p.numel() != 1:
            raise TypeError(f"p must be a number or a tensor of one, but got shape {tuple(p.shape)}")
        if p.requires_grad:
            _refuse_gradient()
        return mask_ops.value_of(p)
    return float(p) if isinstance(p, bool) else checks.number("p", p)

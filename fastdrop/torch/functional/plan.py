"""The one answer to "does this call drop, and how?".

Every function of this package asks `plan_call` once, and then takes the way that it names. `seed_for_kernel` and
`seed_for_ops` give it the seed, once all arguments have been found good.

Eager dense tensors go to a kernel at once. Compilers get one op for a fused function. Transforms, tracers, forward-mode
AD, modes, subclasses and complex numbers get the formula composed of torch's ops and the mask's. The mask's ops serve
all calls, and cost three times as much as a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ...core import checks
from ...core.part import Part
from ..ops import mask as mask_ops
from ..ops import named
from ..ops.layouts import cells_in_graph
from ..runtime import layouts, located, names, seeds, tracing
from ..runtime.dispatch import is_eager_dense, is_transformed
from ..runtime.dispatch.compilers import constant_in_graphs
from ..runtime.dispatch.dtensors import any_dtensor
from ..runtime.dispatch.tensors import check_inplace, is_in_dispatch_mode, may_be_differentiated_forward
from . import onnx, sharded

__all__ = [
    "Plan",
    "Seed",
    "Source",
    "autocast_dtype",
    "check_one",
    "check_tensor",
    "check_uncut",
    "check_unused_seed",
    "eager_probability",
    "for_subclasses",
    "is_p_differentiated",
    "plan_call",
    "refuse_part_of_nested",
    "seed_for_kernel",
    "seed_for_ops",
    "wants_gradient",
]

KEEPS_ALL = 2.0**-33  # p up to here rounds to a threshold of 0

# The ways of a call.
NOTHING = "nothing"  # nothing is dropped, and the function has nothing else to do
KERNEL = "kernel"
FUSED_OP = "fused op"
MASK_OPS = "mask ops"
ONNX = "onnx"

Seed = int | Tensor | None
# What a caller may give as ``part``: a `Part`, a sequence of them, a device mesh with placements, a function of the
# local shape that gives one of these, or the cells as a tensor.
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

    Place = Part | Sequence[Part] | tuple[DeviceMesh, Placement | Sequence[Placement]] | Tensor
    Whole = Place | Callable[[tuple[int, ...]], Place] | None
else:
    Whole = Any  # without an import of torch.distributed
# What a caller gives to draw from, and of which whole x is a part. A function that takes the seed for another one hands
# it on as a `Located` or a `Drawn`.
Source = tuple[torch.Generator | None, Any, Any]
NO_SOURCE: Source = (None, None, None)  # torch's default generator
Shape = tuple[int, ...]
# Which axes share decisions, as a noise_shape says it: 1, and None or the full extent where they don't. That x has an
# extent of 1 does not tell: the part of one process may have one.
Cells = tuple[int | None, ...] | None
Plan = tuple[str, Any, bool]  # the way; p, a number or a tensor that must not be read yet; whether the call drops
Function = TypeVar("Function", bound=Callable[..., Any])

_is_compiling = torch.compiler.is_compiling


def plan_call(
    x: Tensor,
    p: Any,
    training: bool,
    beside: tuple[Tensor | None, ...] | None = None,
    what: str = "dropout probability",
    least: float = KEEPS_ALL,
) -> Plan:
    """How a call on x goes on. ``beside`` are the other tensors of a fused function, which computes something even if
    it drops nothing. ``what`` names p in an error, and ``least`` is the largest p that drops nothing."""
    tracing = _is_compiling()
    if tracing or type(p) is not float or not 0.0 <= p <= 1.0:
        p = traced_probability(p) if tracing else eager_probability(p, what)
        drops = training and (isinstance(p, Tensor) or p > least)
        readable = not tracing and not isinstance(p, Tensor)
    else:
        drops, readable = training and p > least, True
    if beside is None:
        if not drops:
            return NOTHING, p, False
        if readable and is_eager_dense(x):
            return KERNEL, p, True
    elif readable and not x.is_complex() and all(y is None or is_eager_dense(y) for y in (x, *beside)):
        return KERNEL, p, drops
    if onnx.is_exported():
        return ONNX, p, drops
    composes = beside is None or not tracing or x.is_complex() or _is_transformed_there()
    return MASK_OPS if composes else FUSED_OP, p, drops


def wants_gradient(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient is wanted of one of the tensors."""
    if torch.is_grad_enabled():
        for x in tensors:  # in a third of the time of `any`
            if x is not None and x.requires_grad:
                return True
    return False


def seed_for_kernel(
    x: Tensor, source: Source, inplace: bool = False, shape: Shape | None = None, shared: Cells = None
) -> Any:
    """The seed of a call that drops by a kernel: a number, a `Located`, or a tensor if a CUDA kernel is to read it.

    The mask is for data of a shape, x's unless given.
    """
    generator, seed, part = source
    if names.are_used and seed is None and generator is None:
        if inplace:
            check_inplace(x)
        drawn = names.draw(tuple(x.shape) if shape is None else shape, shared, part, shape is not None)
        if drawn is not None:
            if x.is_cuda:
                seeds.refuse_capture(x.device)
            return drawn
    if seed is not None:
        seed = seeds.from_caller(seed, generator, x)
    cells = None
    if part is not None:  # found good or bad before anything is drawn
        if isinstance(part, located.Weights):
            part = part.part
        if part is not None:
            cells = located.runs_of(part, tuple(x.shape) if shape is None else shape, shared)
    if inplace:
        check_inplace(x)
    if seed is None:
        if cells is not None:
            _compare_generators(part, x, generator)
        seed = seeds.next_cuda_seed(x.device, generator) if x.is_cuda else seeds.next_seed(generator)
    return seed if cells is None else located.locate(seed, cells)


def seed_for_ops(x: Tensor, source: Source, shape: Shape | None = None, shared: Cells = None) -> Tensor:
    """The seed of a call that drops by an op: a tensor. Arguments are those of `seed_for_kernel`."""
    generator, seed, part = source
    if names.are_used and seed is None and generator is None and _is_compiling():
        return _traced_seed(x, part, shape, shared)
    if names.are_used and seed is None and generator is None:
        if names.are_in_force() and tracing.is_recorded():
            raise RuntimeError(
                "a model with named masks can't be traced in training, because each call of the trace would have the "
                "masks of one step: call eval(), or masks.remove()"
            )
        drawn = names.draw(tuple(x.shape) if shape is None else shape, shared, part, shape is not None)
        if drawn is not None:
            return seeds.as_tensor(drawn)
    if isinstance(part, located.Weights):
        part = part.part
    cells = None if part is None else _cells_of(part, x, tuple(x.shape) if shape is None else shape, shared)
    if seed is None and part is not None and not _is_compiling():
        _compare_generators(part, x, generator)
    number = _tensor_seed(x, generator, seed)
    return number if cells is None else seeds.with_cells(number, cells)


def _traced_seed(x: Tensor, part: Any, shape: Shape | None, shared: Cells) -> Tensor:
    """The seed of a dropout in compiled code, where models have names."""
    place = named.BY_MODULE if shape is None else named.SAMPLES_FIRST
    if isinstance(part, located.Weights):
        part, place = part.part, named.WEIGHTS
    shape = tuple(x.shape) if shape is None else shape
    cells = None if part is None else _cells_of(part, x, shape, shared)
    return named.draw_named(x, shape, shared, place, cells)


def _cells_of(part: Any, x: Tensor, shape: Shape, shared: Cells) -> Tensor:
    if (_is_compiling() or is_in_dispatch_mode()) and (layout := layouts.as_layout(part)) is not None:
        return cells_in_graph(x, layout, shape, shared)
    return located.cells_of(part, shape, shared)


def refuse_part_of_nested(source: Source) -> None:
    if source[2] is not None:
        raise RuntimeError("part takes dense tensors, but got a nested one: call it on each of x.unbind()")


def _compare_generators(part: Any, x: Tensor, generator: torch.Generator | None) -> None:
    """Has the processes of a layout's mesh compare their generators, if seeds come from those."""
    layout = layouts.as_layout(part)
    if layout is not None and seeds.sample_seeds() is None:
        layouts.compare_generators(layout.mesh, x.device, generator)


def _tensor_seed(x: Tensor, generator: torch.Generator | None, seed: Seed) -> Tensor:
    if seed is not None:
        return seeds.as_tensor(seed, generator, like=x)
    if generator is None:
        return tracing.draw(x)
    if _is_compiling():
        raise RuntimeError("generator can't be compiled: give seed, an int or a tensor, in its place")
    return seeds.draw_tensor(generator, x)


def check_uncut(part: Any, shape: Shape, first_axis: int, what: str) -> None:
    """Raises for a part, the caller's or a named module's, without the whole of the axes from ``first_axis`` on."""
    if part is None and names.are_used and not _is_compiling():
        part = names.layout()
    if part is not None:
        located.check_uncut_part(part, shape, first_axis, what)


def check_unused_seed(source: Source) -> None:
    """Refuses a bad seed in a call that draws nothing."""
    generator, seed, _ = source
    if seed is not None and not _is_compiling():
        seeds.check(seed, generator)


# ---- p ----


def eager_probability(p: Any, what: str = "dropout probability") -> Any:
    """The number, or a tensor that is not read yet, because a mode or a subclass such as `make_fx` has would not tell
    its number."""
    if type(p) is float:
        return checks.dropout_probability(p, p, what)
    if not isinstance(p, Tensor):
        number = float(p) if isinstance(p, bool) else checks.number("p", p)
        return checks.dropout_probability(number, p, what)
    if is_in_dispatch_mode() or type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return traced_probability(p)
    check_one(p)
    _check_constant(p)
    return checks.dropout_probability(mask_ops.value_of(p), p, what)


def traced_probability(p: Any) -> Any:
    """p as a compiler may see it: a number, perhaps a symbolic one, or a tensor that is not read yet."""
    if not isinstance(p, Tensor):
        return checks.dropout_probability(p + 0.0)
    check_one(p)
    _check_constant(p)
    return p


def check_one(p: Any) -> None:
    """Refuses a tensor p of several numbers. It does not read p."""
    if isinstance(p, Tensor) and p.numel() != 1:
        raise TypeError(f"p must be a number or a tensor of one, but got shape {tuple(p.shape)}")


def _check_constant(p: Tensor) -> None:
    if p.requires_grad:
        raise TypeError(
            "p, the drop probability, must be a number or a tensor that does not require grad: only gaussian_dropout "
            "has a gradient with respect to p"
        )


def is_p_differentiated(p: Any) -> bool:
    """Whether a derivative with respect to p may be wanted."""
    if not isinstance(p, Tensor):
        return False
    return p.requires_grad or (not _is_compiling() and may_be_differentiated_forward())


# ---- x ----


def for_subclasses(shards: sharded.Rule | None = None) -> Callable[[Function], Function]:
    """Lets tensor subclasses override a function, whichever argument they are, as they override torch's own.

    ``shards`` gives the result for DTensors. Without it the function takes them as they are.
    """

    def decorate(function: Function) -> Function:
        names = function.__code__.co_varnames[: function.__code__.co_argcount]

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values()) if kwargs else args
            if has_torch_function(given):
                return handle_torch_function(called, given, *args, **kwargs)
            if shards is not None and any_dtensor(given):
                return shards(function, {**dict(zip(names, args, strict=False)), **kwargs})
            return function(*args, **kwargs)

        return called  # type: ignore[return-value]

    return decorate


def check_tensor(x: Any, name: str = "input") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, but got {type(x).__name__}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast has ops compute on x's device, if it is on."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


@constant_in_graphs
def _is_transformed_there() -> bool:
    """`is_transformed` of a call that is being compiled. It is asked while the call is traced, and not by the graph."""
    return is_transformed()

"""DTensors: each process draws its own part of the whole tensor's mask.

A function is called on the local tensors, with the part that the placements tell, and its result becomes a DTensor
again. So forward and backward are local. `routing.drop` calls `drop_shard` for all functions that keep or drop.
`plan.for_subclasses` calls the rule of each other function: what `rule` makes, or one that its module defines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime.dispatch.dtensors import is_dtensor, like_dtensor, local_of, shard_order
from ..runtime.dispatch.tensors import check_inplace
from ..runtime.layouts import Layout
from ..runtime.located import Weights

__all__ = [
    "Arguments",
    "Rule",
    "axis_of",
    "check_whole",
    "data_of",
    "drop_shard",
    "is_dtensor",
    "is_whole",
    "layout_of",
    "local_tensor",
    "number",
    "of_whole",
    "operand",
    "refuse",
    "rule",
    "to_dtensor",
    "whole_layout",
]

Shape = tuple[int, ...]
Arguments = dict[str, Any]  # of a call of a public function, by name
Rule = Callable[[Callable[..., Any], Arguments], Any]  # gives the result of a function for DTensors


def drop_shard(x: Any, given: Any, inplace: bool, drop: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """``drop`` of a DTensor, which gives a result of x's shape. ``given`` is the part that the caller gave."""
    of_weights = isinstance(given, Weights)
    refuse_part(given.part if of_weights else given, "input")
    if inplace:
        check_inplace(x)
    whole = reduced(x)
    local, layout = local_tensor(whole), layout_of(whole)
    y: Tensor = to_dtensor(drop(local, Weights(layout) if of_weights else layout), whole, local)
    return x.copy_(y) if inplace else y


def rule(data: str, *beside: str, whole: tuple[int, ...] = ()) -> Rule:
    """The rule of a function whose results have the shape of one argument, ``data``. The tensors ``beside`` it
    broadcast to it. Axes that the function needs ``whole`` must not be sharded."""

    def run(function: Callable[..., Any], arguments: Arguments) -> Any:
        x = data_of(arguments, data)
        for axis in whole:
            check_whole(x, axis, data, function)
        local = local_tensor(x)
        others: Arguments = {
            name: operand(name, arguments[name], x, tuple(x.shape))
            for name in beside
            if isinstance(arguments.get(name), Tensor)
        }
        inplace = arguments.get("inplace", False)
        if inplace:
            check_inplace(x)
            others["inplace"] = False
        results = function(**{**arguments, **others, data: local, "part": layout_of(x)})
        if isinstance(results, tuple):
            return tuple(to_dtensor(y, x, local) for y in results)
        y = x if results is local else to_dtensor(results, x, local)
        return arguments[data].copy_(y) if inplace else y

    return run


def refuse(instead: str) -> Rule:
    """The rule of a function that takes no DTensor."""

    def run(function: Callable[..., Any], arguments: Arguments) -> Any:
        raise RuntimeError(f"{function.__name__} takes no DTensor: {instead}")

    return run


# ---- arguments ----


def data_of(arguments: Arguments, name: str) -> Any:
    """The argument whose placements the others and the result follow."""
    x = arguments[name]
    if not is_dtensor(x):
        raise TypeError(f"{name} must be a DTensor, as another argument is, but got {type(x).__name__}")
    refuse_part(arguments.get("part"), name)
    return reduced(x)


def number(p: Any) -> Any:
    """p, of which a DTensor has to be the same on all processes."""
    if not is_dtensor(p):
        return p
    if not all(placement.is_replicate() for placement in p.placements):
        raise TypeError(f"p must be a number, a tensor of one or a replicated DTensor of one, but got {p.placements}")
    return p.to_local()


def refuse_part(part: Any, name: str) -> None:
    if part is not None:
        raise ValueError(f"part must not be given where {name} is a DTensor, whose placements tell it")


def reduced(x: Any) -> Any:
    """x with the sums that are pending: what is dropped is the sum, as one process would drop it."""
    if not any(placement.is_partial() for placement in x.placements):
        return x
    replicate = torch.distributed.tensor.Replicate()
    return x.redistribute(placements=[replicate if each.is_partial() else each for each in x.placements])


def check_whole(x: Any, axis: int, name: str, function: Callable[..., Any]) -> None:
    """Raises if an axis is sharded that a function needs whole. ``axis`` is negative."""
    if not is_whole(x, axis):
        raise ValueError(
            f"{function.__name__} needs axis {axis} of {name} whole, but it is sharded: call {name}.redistribute with "
            f"another placement first"
        )


def is_whole(x: Any, axis: int) -> bool:
    return not is_dtensor(x) or all(axis_of(placement) != x.dim() + axis for placement in x.placements)


def axis_of(placement: Any) -> int | None:
    """The axis that a placement shards."""
    return None if placement.is_replicate() or placement.is_partial() else placement.dim


def layout_of(x: Any, shape: Shape | None = None) -> Layout | None:
    """Where a DTensor's shards lie in a whole of its shape, or of another one with the same sharded axes. None on
    processes outside of its mesh."""
    if x.device_mesh.get_coordinate() is None:
        return None
    return Layout(x.device_mesh, x.placements, tuple(x.shape) if shape is None else shape, shard_order(x))


def whole_layout(x: Any, shape: Shape) -> Layout | None:
    """The layout of a tensor of which each process of x's mesh has all."""
    layout = layout_of(x, shape)
    replicate = torch.distributed.tensor.Replicate()
    return None if layout is None else layout._replace(placements=(replicate,) * len(layout.placements), order=None)


def local_tensor(x: Any) -> Tensor:
    """This process's shard. Outside of the mesh it is a tensor without samples, so that the process takes as many
    numbers from its generator as the others do."""
    local = local_of(x)
    if x.device_mesh.get_coordinate() is not None:
        return local
    return local.new_zeros(x.shape if x.dim() < 2 else (0, *x.shape[1:]))


def operand(name: str, given: Any, x: Any, shape: Shape, along: int | None = None) -> Tensor:
    """This process's part of a tensor that broadcasts to data of a shape, which is sharded as x is. Its gradient is
    partial where it is not sharded and x is. A plain tensor is taken for a replicated one.

    ``along`` is an axis of x that the tensor does not have, and another in its place."""
    skipped = len(shape) - given.dim()
    replicate, partial = torch.distributed.tensor.Replicate(), torch.distributed.tensor.Partial()
    placements, of_gradient = [], []
    for placement in x.placements:
        axis = axis_of(placement)
        has = axis is not None and axis != along and axis >= skipped and given.shape[axis - skipped] != 1
        own = axis - skipped if has and axis is not None else None
        placements.append(replicate if own is None else moved(placement, own))
        of_gradient.append(partial if own is None and axis is not None else placements[-1])
    return _placed(name, given, x, tuple(placements), tuple(of_gradient))


def of_whole(name: str, given: Any, x: Any) -> Tensor:
    """A tensor that each process has whole, such as a weight. Its gradient is partial where x is sharded."""
    replicate, partial = torch.distributed.tensor.Replicate(), torch.distributed.tensor.Partial()
    if is_dtensor(given) and any(axis_of(placement) is not None for placement in given.placements):
        raise ValueError(f"{name} must be replicated beside a DTensor, but is sharded: call {name}.redistribute first")
    of_gradient = tuple(replicate if placement.is_replicate() else partial for placement in x.placements)
    return _placed(name, given, x, (replicate,) * len(of_gradient), of_gradient)


def moved(placement: Any, axis: int) -> Any:
    """A placement that shards another axis in the same way."""
    if placement.dim == axis:
        return placement
    factor = getattr(placement, "split_factor", None)
    return type(placement)(axis) if factor is None else type(placement)(axis, split_factor=factor)


def _placed(name: str, given: Any, x: Any, placements: tuple[Any, ...], of_gradient: tuple[Any, ...]) -> Tensor:
    mesh = x.device_mesh
    if is_dtensor(given):
        if given.device_mesh != mesh:
            raise ValueError(f"{name} must be on the mesh of the data, {mesh}, but got one on {given.device_mesh}")
    elif not given.requires_grad and all(placement.is_replicate() for placement in placements):
        return given  # type: ignore[no-any-return]
    else:
        replicate = [torch.distributed.tensor.Replicate()] * mesh.ndim
        given = torch.distributed.tensor.DTensor.from_local(given, mesh, replicate, run_check=False)
    if given.placements != placements:
        given = given.redistribute(placements=placements)
    local: Tensor = given.to_local(grad_placements=of_gradient)
    if mesh.get_coordinate() is not None:
        return local
    return local.new_zeros((0, *given.shape[1:]) if 1 < given.dim() == x.dim() and given.shape[0] > 1 else given.shape)


# ---- results ----


def to_dtensor(
    y: Tensor, x: Any, local: Tensor, shape: Shape | None = None, placements: tuple[Any, ...] | None = None
) -> Any:
    """What a function made of x's local tensor, as a DTensor. Unless given, its shape and placements are x's."""
    if x.device_mesh.get_coordinate() is None:
        if shape is None:
            return x * 1  # which has no elements here, and a gradient
        order, y = [-axis for axis in range(len(shape))], y.detach().reshape(-1)[:0]
    elif shape is None and y.dtype == x.dtype and y.stride() == local.stride():
        return like_dtensor(y, x)
    else:
        shape, order = tuple(x.shape) if shape is None else shape, list(y.stride())
    strides, size = [0] * len(shape), 1
    for axis in sorted(range(len(shape)), key=lambda axis: (order[axis], -axis)):
        strides[axis], size = size, size * max(shape[axis], 1)
    placements = x.placements if placements is None else placements
    return torch.distributed.tensor.DTensor.from_local(
        y, x.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )

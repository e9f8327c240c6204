"""DTensors: each process draws its own part of the whole tensor's mask.

A function is called on the local tensor, with the part that the placements tell, and its result becomes a DTensor
again. So forward and backward are local. `routing.drop` calls this module for all functions that keep or drop, and
`plan.for_subclasses` for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime.dispatch.dtensors import is_dtensor, like_dtensor, shard_order
from ..runtime.dispatch.tensors import check_inplace
from ..runtime.layouts import Layout

__all__ = ["drop_shard", "is_dtensor"]


def drop_shard(x: Any, given: Any, inplace: bool, drop: Callable[[Tensor, Layout | None], Tensor]) -> Tensor:
    """``drop`` of a DTensor, which gives a result of x's shape. ``given`` is the part that the caller gave."""
    refuse_part(given, "input")
    if inplace:
        check_inplace(x)
    whole = reduced(x)
    local = local_tensor(whole)
    y: Tensor = like_dtensor(drop(local, layout_of(whole)), whole)
    return x.copy_(y) if inplace else y


def refuse_part(part: Any, name: str) -> None:
    if part is not None:
        raise ValueError(f"part must not be given where {name} is a DTensor, whose placements tell it")


def reduced(x: Any) -> Any:
    """x with the sums that are pending: what is dropped is the sum, as one process would drop it."""
    if not any(placement.is_partial() for placement in x.placements):
        return x
    replicate = torch.distributed.tensor.Replicate()
    return x.redistribute(placements=[replicate if each.is_partial() else each for each in x.placements])


def layout_of(x: Any) -> Layout | None:
    """Where a DTensor's shards lie. None on processes outside of its mesh."""
    if x.device_mesh.get_coordinate() is None:
        return None
    return Layout(x.device_mesh, x.placements, tuple(x.shape), shard_order(x))


def local_tensor(x: Any) -> Tensor:
    """This process's shard. Outside of the mesh it is a tensor without samples, so that the process takes as many
    numbers from its generator as the others do."""
    local: Tensor = x.to_local()
    if x.device_mesh.get_coordinate() is not None:
        return local
    return local.new_zeros(x.shape if x.dim() < 2 else (0, *x.shape[1:]))

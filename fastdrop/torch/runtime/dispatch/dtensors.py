"""Private names of torch that tell what a DTensor is made of.

torch imports ``torch.distributed.tensor`` only where somebody needs it, and that takes seconds. So it is looked up in
``sys.modules``: without it there is no DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_dtensor(x: Any) -> bool:
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(x, package.DTensor)


def any_dtensor(values: Iterable[Any]) -> bool:
    """Whether one of the arguments of a call is a DTensor."""
    package = sys.modules.get("torch.distributed.tensor")
    if package is not None:
        for x in values:
            if type(x) is not Tensor and isinstance(x, package.DTensor):
                return True
    return False


def shard_order(x: Any) -> Any:
    """In which order mesh axes shard the axes of a DTensor, where torch tells. None: from the first mesh axis on."""
    try:
        order: Any = x._spec.shard_order
    except AttributeError:
        order = None
    return order


def like_dtensor(y: Tensor, x: Any) -> Any:
    """A DTensor with the placements, shape and strides of x, whose local tensor y is."""
    try:
        spec = x._spec
    except AttributeError:
        return sys.modules["torch.distributed.tensor"].DTensor.from_local(
            y, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
        )
    if y.requires_grad and torch.is_grad_enabled():
        return _FromLocal.apply(y, type(x), spec)
    return type(x)(y, spec, requires_grad=False)


class _FromLocal(torch.autograd.Function):
    """``DTensor.from_local`` in a tenth of its time, because the description of the result is there already."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, kind: Any, spec: Any) -> Any:
        ctx.placements = spec.placements
        ctx.set_materialize_grads(False)
        return kind(y.view_as(y), spec, requires_grad=y.requires_grad)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Tensor | None, None, None]:
        if dy is not None and dy.placements != ctx.placements:
            dy = dy.redistribute(placements=ctx.placements)
        return None if dy is None else dy.to_local(), None, None

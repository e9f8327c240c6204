"""Private names of torch that tell what a DTensor is made of.

torch imports ``torch.distributed.tensor`` only where somebody needs it, and that takes seconds. So it is looked up in
``sys.modules``: without it there is no DTensor.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .compilers import constant_in_graphs


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
    """In which order mesh axes shard the axes of a DTensor, where torch tells: compilers do not know it. None: from the
    first mesh axis on."""
    if torch.compiler.is_compiling():
        return None
    try:
        order: Any = x._spec.shard_order
    except AttributeError:
        order = None
    return order


@constant_in_graphs
def ranks_of(mesh: Any) -> tuple[int, ...]:
    """The ranks of a device mesh in C order. Its own tensor of them can't be read in a mode of fake tensors."""
    try:
        return tuple(mesh._flatten_rank_map)
    except AttributeError:
        return tuple(mesh.mesh.flatten().tolist())


def local_of(x: Any) -> Tensor:
    """``x.to_local()``, in less time."""
    spec = None if torch.compiler.is_compiling() else _spec_of(x)
    if spec is None:
        return x.to_local()  # type: ignore[no-any-return]
    if x.requires_grad and torch.is_grad_enabled():
        return _ToLocal.apply(x, spec)  # type: ignore[no-any-return]
    return x._local_tensor  # type: ignore[no-any-return]


def like_dtensor(y: Tensor, x: Any) -> Any:
    """A DTensor with the placements, shape and strides of x, whose local tensor y is.

    ``DTensor.from_local`` makes a description of the result, and takes ten times as long. This one takes that of x.
    """
    kind = sys.modules["torch.distributed.tensor"].DTensor
    spec = None if torch.compiler.is_compiling() else _spec_of(x)
    if spec is None:
        return kind.from_local(y, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
    return _described(y, kind, spec)


def _spec_of(x: Any) -> Any:
    try:
        return x._spec if x._local_tensor is not None else None
    except AttributeError:
        return None


def _described(y: Tensor, kind: Any, spec: Any) -> Any:
    if y.requires_grad and torch.is_grad_enabled():
        return _FromLocal.apply(y, kind, spec)
    return kind.__new__(kind, y, spec, requires_grad=False)


class _ToLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, spec: Any) -> Tensor:
        local: Tensor = x._local_tensor
        ctx.kind, ctx.spec, ctx.stride = type(x), spec, local.stride()
        ctx.set_materialize_grads(False)
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, None]:
        if dy is None:
            return None, None
        spec = ctx.spec
        if dy.stride() == ctx.stride:
            return _described(dy, ctx.kind, spec), None
        # Strides that are told must be those of the local tensor, or views of the gradient fail.
        strides = itertools.accumulate(spec.shape[:0:-1], operator.mul, initial=1)
        given = {"shape": spec.shape, "stride": tuple(strides)[::-1] if spec.shape else ()}
        return ctx.kind.from_local(dy.contiguous(), spec.mesh, spec.placements, run_check=False, **given), None


class _FromLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, kind: Any, spec: Any) -> Any:
        ctx.placements = spec.placements
        ctx.set_materialize_grads(False)
        return kind.__new__(kind, y.view_as(y), spec, requires_grad=y.requires_grad)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Tensor | None, None, None]:
        if dy is not None and dy.placements != ctx.placements:
            dy = dy.redistribute(placements=ctx.placements)
        return None if dy is None else dy.to_local(), None, None

"""The rules by which ops run under `torch.vmap`.

A rule is called as ``rule(around, op, axes, call)``. ``around`` is the map, a `dispatch.ops.Map`, ``call`` holds the
arguments, and ``axes`` the map's axis of each argument, None if it is not batched. A rule returns the results and the
map's axis of each. `record` registers the rules, and that of most ops is `by_sample`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def of_arguments(op: Any, signature: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule as the dispatcher calls it, which leaves out arguments that have their default."""
    count = len(signature._fields)

    def called(around: Any, axes: Any, *arguments: Any) -> Any:
        return rule(around, op, signature(*axes, *(None,) * (count - len(axes))), signature(*arguments))

    return called


def by_sample(around: Any, op: Any, axes: Any, call: Any) -> Any:
    """The op for each sample, one after the other. Arguments that are not batched are the same for all."""
    size = around.batch_size
    count = max(size, 1)  # an empty batch runs one sample, for its shape

    def samples(value: Any, axis: int | None) -> list[Any]:
        if axis is None:
            return [value] * count
        return list(value.movedim(axis, 0).unbind()) if size else [sample_like(value, axis)]

    columns = [samples(value, axis) for value, axis in zip(call, axes, strict=True)]
    results = [op(*sample) for sample in zip(*columns, strict=True)]

    def stacked(result: Any) -> Tensor:
        y = torch.stack(result)
        return y if size else y[:0]

    if isinstance(results[0], Tensor):
        return stacked(results), 0
    together = [stacked(result) for result in zip(*results, strict=True)]
    return tuple(together), (0,) * len(together)


def sample_like(x: Tensor, axis: int | None) -> Tensor:
    """A tensor of the shape of one sample, for shapes alone or for an empty batch. Zeros, because a seed is read."""
    return x if axis is None else x.new_zeros(x.movedim(axis, 0).shape[1:])

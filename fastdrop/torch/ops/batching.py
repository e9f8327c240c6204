"""The rules by which ops run under `torch.vmap`.

`record` registers ``kernel(op, signature, rule)`` for each op. A rule is called as ``rule(batch, op, dims, call)``.
``call`` holds the arguments, and ``dims`` the map's axis of each argument, None if it is not batched. A rule returns
the results and the map's axis of each. The rule of most ops is `by_sample`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.dispatch import hide_from_dynamo, is_eager_dense

__all__ = ["Batch", "by_sample", "kernel", "sample_like"]


class Batch(NamedTuple):
    """What a rule knows of the map."""

    size: int
    interpreter: Any

    def is_eager_dense_within(self, *tensors: Tensor) -> bool:
        """Whether nothing but this map surrounds the call, so that a kernel may be called at once."""
        with self.interpreter.lower():
            return all(is_eager_dense(x) and not (x.requires_grad and torch.is_grad_enabled()) for x in tensors)


def interpreter() -> Any:
    return torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter()


def kernel(op: Any, signature: Any, rule: Any) -> Any:
    """A kernel for vmap's key. `torch.library.register_vmap` does the same with trees, which takes twice as long."""

    def batched(*arguments: Any) -> Any:
        current = interpreter()
        level, batch = current.level(), Batch(current.batch_size(), current)
        unwrap, wrap = torch._C._functorch._unwrap_batched, torch._C._functorch._add_batch_dim
        unwrapped = [unwrap(value, level) if isinstance(value, Tensor) else (value, None) for value in arguments]
        values, dims = zip(*unwrapped, strict=True)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)):
            if all(dim is None for dim in dims):
                return op(*values)
            call = signature(*values)
            results, out_dims = rule(batch, op, signature(*dims, *(None,) * (len(call) - len(dims))), call)
        if isinstance(results, Tensor):
            return results if out_dims is None else wrap(results, out_dims, level)
        stacked = zip(results, out_dims, strict=True)
        return tuple(result if dim is None else wrap(result, dim, level) for result, dim in stacked)

    hide_from_dynamo(batched)
    return batched


def by_sample(batch: Batch, op: Any, dims: Any, call: Any) -> Any:
    """The op for each sample, one after the other. Arguments that are not batched are the same for all."""
    count = max(batch.size, 1)  # an empty batch runs one sample, for its shape

    def samples(value: Any, axis: int | None) -> list[Any]:
        if axis is None:
            return [value] * count
        return list(value.movedim(axis, 0).unbind()) if batch.size else [sample_like(value, axis)]

    columns = [samples(value, axis) for value, axis in zip(call, dims, strict=True)]
    results = [op(*sample) for sample in zip(*columns, strict=True)]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[: batch.size], 0
    stacked = [torch.stack(result)[: batch.size] for result in zip(*results, strict=True)]
    return tuple(stacked), (0,) * len(stacked)


def sample_like(x: Tensor, axis: int | None) -> Tensor:
    """A tensor of the shape of one sample, for shapes alone or for an empty batch. Zeros, because a seed is read."""
    return x if axis is None else x.new_zeros(x.movedim(axis, 0).shape[1:])

"""Whether a call may go straight to a kernel, asked of names that torch keeps to itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import (  # type: ignore[attr-defined]
    DispatchKey,
    DispatchKeySet,
    _data_address,
    _dispatch_keys,
    _get_tracing_state,
    _is_cow_tensor,
    _len_torch_dispatch_stack,
)
from torch._C._dynamo import eval_frame
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

__all__ = ["can_call_kernel", "hide_from_dynamo", "is_eager_dense", "is_lazy", "is_transformed", "read_address"]


def _plain_keys() -> frozenset[int]:
    """Dispatch keys of tensors whose memory may be read as it is: dense, on the CPU or a CUDA device, no negative or
    conjugate view."""
    tensors = [torch.empty(0, device="cpu")]
    with torch.inference_mode():
        tensors.append(torch.empty(0, device="cpu"))
    on_cpu = [_dispatch_keys(x).raw_repr() for x in tensors]
    return frozenset(on_cpu + [_on_cuda(keys) for keys in on_cpu])


def _on_cuda(keys: int) -> int:
    """The keys that a CPU tensor's would be on a GPU, which need not be there to be asked."""
    for cpu, cuda in ((DispatchKey.CPU, DispatchKey.CUDA), (DispatchKey.AutocastCPU, DispatchKey.AutocastCUDA)):
        here, there = DispatchKeySet(cpu).raw_repr(), DispatchKeySet(cuda).raw_repr()
        if keys & here & ~there:
            keys ^= here ^ there
    return keys


PLAIN = _plain_keys()


def is_eager_dense(x: Tensor) -> bool:
    """Whether x is memory, on the CPU or a CUDA device, and no mode, transform, forward-mode AD or `torch.jit.trace` is
    around."""
    return (
        _dispatch_keys(x).raw_repr() in PLAIN
        and not _len_torch_dispatch_stack()
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and _get_tracing_state() is None
    )


is_lazy: Callable[[Tensor], bool] = _is_cow_tensor  # whether x shares memory until either is written to: `_lazy_clone`


def read_address(x: Tensor) -> int:
    """Where x's elements begin, for who only reads: `Tensor.data_ptr` would give a lazy clone memory of its own.

    Of one tensor that is read and written the address for writing must be asked for first: it may be a new one."""
    if not is_lazy(x):
        return x.data_ptr()
    address: int = _data_address(x) + x.storage_offset() * x.element_size()
    return address


def is_transformed() -> bool:
    """Whether a transform of `torch.func` surrounds the call."""
    return peek_interpreter_stack() is not None


def can_call_kernel(dy: Tensor) -> bool:
    """Whether backward may call a kernel, or must leave an op for whoever looks at it."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and is_eager_dense(dy)


def hide_from_dynamo(*functions: Callable[..., Any]) -> None:
    """Where a graph breaks, these and all they call run as they are: NumPy's arithmetic is not for torch to compile.

    Marks their code, which costs a call nothing; `torch.compiler.disable` wraps it and imports the compiler.
    """
    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
    for function in functions:
        eval_frame.set_code_exec_strategy(function.__code__, skip)

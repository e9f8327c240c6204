"""How the memory of tensors reaches the backends, and how results get theirs.

`mask_kernels` and `fused_kernels` call this module. The C backend takes addresses, the others NumPy views of the same
memory. Threads are as many as torch's own ops may use.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import backends
from ...backends import c as native
from ...core.mask import word_count
from .dispatch import is_lazy, read_address

# A large result often lies in memory that is new to the process: glibc maps 32 MiB and more anew for each tensor, and
# gives the end of its heap back when two results of 16 MiB there are freed. The system takes three times as long to
# provide such memory page by page as the kernel takes to fill it: 3.8 ns per element of forward and backward, but 0.8
# in pages of 2 MiB. NumPy asks for large pages itself.
HUGE_PAGES_BYTES = 8 << 20
HUGE_PAGES_FROM = HUGE_PAGES_BYTES // 8  # fewer elements are never that many bytes
_advise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None  # Linux alone

with torch.inference_mode(False):
    _NO_WORDS = torch.empty(0, dtype=torch.int32, device="cpu")  # its `new_empty` costs less than `torch.empty`

new_words = _NO_WORDS.new_empty  # words on the CPU, not yet written


def new_like(x: Tensor, n: int) -> Tensor:
    """An output for x's n elements, not yet written."""
    return in_large_pages(torch.empty_like(x), n)


def in_large_pages(y: Tensor, n: int) -> Tensor:
    """A new tensor of n elements, whose memory the system provides in large pages if it is large."""
    if n >= HUGE_PAGES_FROM and y.is_cpu and _advise is not None and (size := n * y.element_size()) >= HUGE_PAGES_BYTES:
        first, end = (y.data_ptr() + mmap.PAGESIZE - 1) & -mmap.PAGESIZE, (y.data_ptr() + size) & -mmap.PAGESIZE
        # The system may refuse the advice, and nothing is lost then.
        _advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_HUGEPAGE)
    return y


def like_elementwise(y: Tensor, x: Tensor) -> Tensor:
    """y, which is contiguous, with the strides that torch gives the result of an element-wise op on x."""
    result = torch.empty_like(x, dtype=y.dtype)
    return y if result.stride() == y.stride() else result.copy_(y)


def _borrow_threads() -> None:
    """Runs the C kernels on torch's own threads, because these spin between torch's loops and would fight a second
    pool."""
    if native.unavailable() is None and "OpenMP" in torch.__config__.parallel_info():
        with contextlib.suppress(AttributeError, OSError, TypeError):  # no GNU OpenMP; TypeError: Windows' CDLL(None)
            native.use_team(ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0)


_borrow_threads()


def call_with_threads(backend: Any, primitive: Any, *arguments: Any) -> None:
    """Calls a primitive of a backend that has one number of threads for all its callers."""
    backend.set_num_threads(min(torch.get_num_threads(), 256))
    try:
        primitive(*arguments)
    finally:
        backend.set_num_threads(backends.get_num_threads())


def as_array(x: Tensor) -> Any:
    """x as an array that may be written to. bfloat16 comes as uint16."""
    x = x.detach()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype is torch.bfloat16 else x.numpy()


def read_array(x: Tensor) -> Any:
    """x as an array that is only read: a lazy clone stays one."""
    if not is_lazy(x):
        return as_array(x)
    size, dtype = x.element_size(), as_array(x.new_empty(0)).dtype
    reach = 1 + sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True))
    memory: Any = (ctypes.c_char * (reach * size if x.numel() else 0)).from_address(read_address(x))
    return np.ndarray(tuple(x.shape), dtype, memory, strides=[stride * size for stride in x.stride()])


def mask_words(words: Tensor) -> Any:
    """Packed mask words as an array of uint32."""
    return read_array(words).view(np.uint32).reshape(-1)


def check_words(words: Tensor, cells: int, device: torch.device) -> Tensor:
    """Words in C order, if there are as many as the mask has. A kernel would read past the end of fewer, and hooks on
    saved tensors may change them."""
    if words.dtype != torch.int32 or words.shape != (word_count(cells),) or words.device != device:
        raise ValueError(
            f"words must be {word_count(cells)} int32 on {device} for {cells} cells, but got {words.dtype} of shape "
            f"{tuple(words.shape)} on {words.device}"
        )
    return words.contiguous()


def kernel_error(status: int = native.BAD_ARGUMENT) -> Exception:
    """The error of a C kernel that returned ``status``. The public functions check arguments first, so it should never
    be another one than MemoryError."""
    if status == native.NO_MEMORY:
        return MemoryError("there is no memory for the tiles of scores that attention works on")
    return RuntimeError("the C kernel refused its arguments")

"""Private names of torch that tell about tensors: whether a kernel may use their memory, and how nested ones are built.

`is_eager_dense` is asked at each call, so it reads names that were bound at import and calls nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import DispatchKey, DispatchKeySet, Tensor
from torch.autograd import forward_ad

from .names import has, named

# ---- tensors whose memory a kernel may use ----

_read_keys = named("torch._C._dispatch_keys")
_count_dispatch_modes = named("torch._C._len_torch_dispatch_stack")
_peek_transform = named("torch._C._functorch.peek_interpreter_stack")
_jit_tracing_state = named("torch._C._get_tracing_state")
knows_transforms = _peek_transform is not None
_forward_level = named("torch.autograd.forward_ad._current_level")
_KNOWS_EAGER = has(_read_keys, _count_dispatch_modes, _peek_transform, _jit_tracing_state, _forward_level)


def _eager_dense_keys() -> frozenset[int]:
    """Dispatch keys of tensors whose memory may be read as it is: dense, on the CPU or a CUDA device, no negative or
    conjugate view."""
    if not _KNOWS_EAGER:
        return frozenset()
    tensors = [torch.empty(0, device="cpu")]
    with torch.inference_mode():
        tensors.append(torch.empty(0, device="cpu"))
    on_cpu = [_read_keys(x).raw_repr() for x in tensors]
    return frozenset(on_cpu + [_on_cuda(keys) for keys in on_cpu])


def _on_cuda(keys: int) -> int:
    """A CPU tensor's keys as they would be on a GPU. No GPU is needed to tell."""
    for cpu, cuda in ((DispatchKey.CPU, DispatchKey.CUDA), (DispatchKey.AutocastCPU, DispatchKey.AutocastCUDA)):
        here, there = DispatchKeySet(cpu).raw_repr(), DispatchKeySet(cuda).raw_repr()
        if keys & here & ~there:
            keys ^= here ^ there
    return keys


EAGER_DENSE_KEYS = _eager_dense_keys()


def is_eager_dense(x: Tensor) -> bool:
    """Whether x is plain memory on the CPU or a CUDA device, and no mode, transform, forward-mode AD or
    `torch.jit.trace` surrounds the call. A kernel may then be called at once."""
    return (
        _read_keys(x).raw_repr() in EAGER_DENSE_KEYS
        and not _count_dispatch_modes()
        and _peek_transform() is None
        and forward_ad._current_level < 0
        and _jit_tracing_state() is None
    )


if not _KNOWS_EAGER:

    def is_eager_dense(x: Tensor) -> bool:
        """False, because nothing tells: each call goes by the ops, which are right for all tensors."""
        return False


def can_call_kernel(dy: Tensor) -> bool:
    """Whether backward may call a kernel. If not, it calls an op, for whatever records or transforms it."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and is_eager_dense(dy)


def is_in_dispatch_mode() -> bool:
    """Whether a `TorchDispatchMode` surrounds the call. True if nothing tells."""
    return _count_dispatch_modes is None or bool(_count_dispatch_modes())


def is_transformed() -> bool:
    """Whether a transform of `torch.func` surrounds the call. True if nothing tells."""
    return _peek_transform is None or _peek_transform() is not None


def may_be_differentiated_forward() -> bool:
    """Whether forward-mode AD or a transform surrounds the call. True if nothing tells."""
    return getattr(forward_ad, "_current_level", 0) >= 0 or is_transformed()


def jit_trace() -> Any:
    """The state of the `torch.jit.trace` that surrounds the call, None without one."""
    if _jit_tracing_state is None:
        return torch.jit.is_tracing() or None  # type: ignore[attr-defined]
    return _jit_tracing_state()


# is_lazy(x): whether x shares memory until either of two tensors is written to, as a lazy clone does.
is_lazy: Callable[[Tensor], bool] = named("torch._C._is_cow_tensor", lambda x: False)
_data_address = named("torch._C._data_address")
if _data_address is None:
    is_lazy = lambda x: False  # noqa: E731


def read_address(x: Tensor) -> int:
    """Where x's elements begin, for code that only reads: `Tensor.data_ptr` would give a lazy clone memory of its own.

    If one tensor is read and written, the address for writing must be asked for first: it may be a new one."""
    if not is_lazy(x):
        return x.data_ptr()
    address: int = _data_address(x) + x.storage_offset() * x.element_size()
    return address


_has_overlap = named("torch._debug_has_internal_overlap")
_creation_meta = named("torch._C._autograd._get_creation_meta")
_default_creation = named("torch._C._autograd.CreationMeta.DEFAULT")
_base = named("torch.Tensor._base")
_KNOWS_VIEWS = has(_has_overlap, _creation_meta, _default_creation, _base)


def check_inplace(x: Tensor) -> None:
    """Raises torch's own error where torch would not have x written to, before anything is drawn or written."""
    if _KNOWS_VIEWS:
        base = x._base
        view = base is not None and ((base.requires_grad and base.is_leaf) or _creation_meta(x) != _default_creation)
        forbidden = torch.is_grad_enabled() and x.requires_grad and (x.is_leaf or view)
        outside = x.is_inference() and not torch.is_inference_mode_enabled()
        if not (forbidden or outside or _has_overlap(x) == 1):
            return
    x.mul_(1)


# ---- what a tensor is made of ----


def version_of(x: Tensor) -> int:
    """How often x was written to; always 0 if torch does not tell."""
    version: int = getattr(x, "_version", 0)
    return version


def storage_id(x: Tensor) -> int:
    """A number for the memory of x, 0 for layouts without one memory. Views have their base's."""
    if x.layout is not torch.strided:
        return 0
    storage: Any = x.untyped_storage()
    try:
        number: int = storage._cdata
    except AttributeError:
        number = storage.data_ptr()
    return number


def has_hook_after_gradient(x: Tensor) -> bool:
    """Whether something runs once x's gradient is there. False if torch does not tell."""
    return bool(getattr(x, "_post_accumulate_grad_hooks", None))


# ---- nested tensors ----

_view_from_buffer = named("torch._nested_view_from_buffer")


def ragged_axis(x: Any) -> int:
    """The axis of a jagged nested tensor along which samples differ."""
    try:
        axis: int = x._ragged_idx
    except AttributeError:
        axis = next(axis for axis, extent in enumerate(x.shape) if not isinstance(extent, int))
    return axis


def sample_sizes(x: Any) -> Tensor:
    """The sizes of a strided nested tensor's samples, a row for each."""
    try:
        sizes: Tensor = x._nested_tensor_size()
    except AttributeError:
        parts = x.unbind()
        sizes = torch.tensor([list(part.shape) for part in parts], dtype=torch.int64).reshape(len(parts), x.dim() - 1)
    return sizes


def jagged_like(values: Tensor, x: Any) -> Tensor:
    """Values in the structure of a jagged nested tensor."""
    least, most = getattr(x, "_maybe_min_seqlen", None), getattr(x, "_maybe_max_seqlen", None)
    y: Tensor = torch.nested.nested_tensor_from_jagged(values, x.offsets(), x.lengths(), ragged_axis(x), least, most)
    return y


def strided_like(values: Tensor, x: Any) -> Tensor:
    """Values in the structure of a contiguous strided nested tensor."""
    flat = values.reshape(-1)
    try:
        structure = x._nested_tensor_size(), x._nested_tensor_strides(), x._nested_tensor_storage_offsets()
        y: Tensor = _view_from_buffer(flat, *structure)
    except (AttributeError, TypeError):
        shapes = sample_sizes(x).tolist()
        parts = flat.split([math.prod(shape) for shape in shapes])
        y = torch.nested.as_nested_tensor([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
    return y


# ---- streams ----

_raw_stream = named("torch._C._cuda_getCurrentRawStream")


def _current_stream(device: int) -> int:
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


# The handle of a CUDA device's current stream.
current_stream: Callable[[int], int] = _raw_stream or _current_stream

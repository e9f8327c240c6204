"""torch's own dropout on fastdrop: kernels registered with torch's dispatcher for ``aten::dropout`` and ``dropout_``.

The dispatcher finds them by the same table look-up that finds any kernel, so no other operator pays for it, and
everything that drops through the ops is reached, from Python or from C++. docs/design.md tells why not a mode.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .. import __version__
from . import _cuda, _kernels
from .functional import dropout

__all__ = ["disable", "enable", "enabled"]

# Calls on CPU and CUDA tensors without and with autograd, and calls inside of torch.func's transforms.
KEYS = ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA", "FuncTorchDynamicLayerFrontMode")

CACHE_TAG = f"+fastdrop {__version__}"

_registrations: torch.library.Library | None = None  # torch is as it was when this is None
_lock = threading.Lock()


def enable() -> None:
    """Makes torch's own dropout run on fastdrop, until `disable`: process-wide, wherever it is called from, on the CPU
    and, with numba-cuda, on NVIDIA GPUs.

    `torch.nn.functional.dropout`, ``torch.dropout`` and their in-place forms, and with them `torch.nn.Dropout`,
    `torch.nn.MultiheadAttention`, `torch.nn.functional.scaled_dot_product_attention`, `torch.nn.LSTM` and
    `torch.nn.GRU` between layers, and any model built of these. Values and gradients are those of
    `fastdrop.torch.dropout`; other operators, the dropouts of whole features and alpha dropout, other devices, integer,
    sparse and nested tensors and DTensors stay as they are. So do, on a GPU, fused attention and cuDNN's recurrent
    layers, which drop inside of kernels of their own.

    Calling it again does nothing. What `torch.compile` has compiled is compiled anew at its next call, so switch once
    and not in a loop.

    >>> import torch, fastdrop.torch as fdt
    >>> x = torch.tensor([1.0, float("nan"), 3.0])
    >>> fdt.enable()
    >>> torch.nn.functional.dropout(x, 1.0)
    tensor([0., 0., 0.])
    >>> fdt.disable()
    >>> torch.nn.functional.dropout(x, 1.0)
    tensor([0., nan, 0.])
    """
    global _registrations
    with _lock:
        if _registrations is None:
            library = torch.library.Library("aten", "IMPL")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch says that it has kernels for transforms itself
                for key in KEYS:
                    library.impl("dropout", _dropout, key)
                    library.impl("dropout_", _dropout_, key)
            _registrations = library
            _mark_compiled(True)


def disable() -> None:
    """Undoes `enable`: torch is as it was. Does nothing where torch's dropout is its own already.

    >>> import fastdrop.torch as fdt
    >>> fdt.disable()
    """
    global _registrations
    with _lock:
        if _registrations is not None:
            _registrations._destroy()
            _registrations = None
            _mark_compiled(False)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable` for a block or, as a decorator, a function; the state before is restored at its end, errors or not.

    The state is the process's: other threads are in it too.

    >>> import torch, fastdrop.torch as fdt
    >>> with fdt.enabled():
    ...     torch.nn.functional.dropout(torch.tensor([float("inf")]), 1.0)
    tensor([0.])
    """
    before = _registrations is not None
    enable()
    try:
        yield
    finally:
        if not before:
            disable()


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    if not _ours(input, p):
        return _torchs(torch.ops.aten.dropout.default, input, p, train)
    return dropout(input, p, train)


def _dropout_(input: Tensor, p: float, train: bool) -> Tensor:
    if not _ours(input, p):
        return _torchs(torch.ops.aten.dropout_.default, input, p, train)
    return dropout(input, p, train, True)


def _ours(x: Tensor, p: float) -> bool:
    """Whether fastdrop has it; torch refuses a bad p in its own words."""
    known = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ or isinstance(x, (FakeTensor, FunctionalTensor))
    dense = x.layout is torch.strided and not x.is_nested
    if not known or not dense or x.dtype not in _kernels.DTYPES or not 0.0 <= p <= 1.0:
        return False
    return x.is_cpu or (x.is_cuda and _cuda.is_usable(x.get_device()))


def _torchs(op: Any, *arguments: Any) -> Tensor:
    """What torch does when nobody overrides it."""
    result: Tensor = op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *arguments)
    return result


def _mark_compiled(ours: bool) -> None:
    """What is compiled from here on is of the new state: on disk by its cache key, in memory by compiling anew.

    Both caches know a graph by torch's names, before dropout becomes what it is in this state.
    """
    config = torch.compiler.config
    config.cache_key_tag = config.cache_key_tag + CACHE_TAG if ours else config.cache_key_tag.replace(CACHE_TAG, "")
    for op in (torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default):
        op._dispatch_cache.clear()  # tracing remembers there which kernel it found
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

"""torch's own dropout on fastdrop: kernels registered with torch's dispatcher for ``aten::dropout`` and ``dropout_``.

The dispatcher finds them by the same table look-up that finds any kernel, so no other operator pays for it, and
everything that drops through the ops is reached, from Python or from C++. docs/design.md tells why not a mode.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _kernels
from .functional import dropout

__all__ = ["disable", "enable", "enabled"]

KEYS = ("CPU", "AutogradCPU")

_registrations: torch.library.Library | None = None  # torch is as it was when this is None
_lock = threading.Lock()


def enable() -> None:
    """Makes torch's own dropout run on fastdrop, process-wide, for CPU tensors of floating-point or complex dtypes."""
    global _registrations
    with _lock:
        if _registrations is None:
            library = torch.library.Library("aten", "IMPL")
            for key in KEYS:
                library.impl("dropout", _dropout, key)
                library.impl("dropout_", _dropout_, key)
            _registrations = library
            _forget_compiled()


def disable() -> None:
    """Undoes `enable`."""
    global _registrations
    with _lock:
        if _registrations is not None:
            _registrations._destroy()
            _registrations = None
            _forget_compiled()


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable` for a block or, as a decorator, a function; the state before is restored at its end."""
    before = _registrations is not None
    enable()
    try:
        yield
    finally:
        if not before:
            disable()


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    if not _ours(input):
        return _torchs(torch.ops.aten.dropout.default, input, p, train)
    return dropout(input, p, train)


def _dropout_(input: Tensor, p: float, train: bool) -> Tensor:
    if not _ours(input):
        return _torchs(torch.ops.aten.dropout_.default, input, p, train)
    return dropout(input, p, train, True)


def _ours(x: Tensor) -> bool:
    return x.layout is torch.strided and x.dtype in _kernels.DTYPES and not x.is_nested


def _torchs(op: Any, *arguments: Any) -> Tensor:
    """What torch does when nobody overrides it."""
    result: Tensor = op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *arguments)
    return result


def _forget_compiled() -> None:
    """Functions compiled before hold the dropout they were compiled with; the next call compiles anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

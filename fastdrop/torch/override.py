"""torch's own dropouts on fastdrop: kernels registered with torch's dispatcher for ``aten::dropout`` and its like.

The dispatcher finds them by the same table look-up that finds any kernel, so no other operator pays for it, and
everything that drops through the ops is reached, from Python or from C++. docs/design.md tells why not a mode. timm's
and torchvision's modules are written in Python; theirs is another ``forward`` for as long.
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

from .. import __version__, kinds
from . import _cuda, _kernels
from ._plain import is_transformed
from ._route import KEEPS_ALL, drop
from .attention import attend, compose, is_direct, is_regular, trace
from .convert import FOREIGN, refusal
from .modules import Rated

__all__ = ["disable", "enable", "enabled"]

# Calls on CPU and CUDA tensors without and with autograd, and calls inside of torch.func's transforms: from Python, and
# from torch's own C++ under vmap, where attention drops.
KEYS = ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA", "FuncTorchDynamicLayerFrontMode", "FuncTorchVmapMode")

# aten's ops, each with its in-place form: whether whole channels are dropped, and the law.
OPS = {
    "dropout": (False, "inverted"),
    "feature_dropout": (True, "inverted"),
    "alpha_dropout": (False, "alpha"),
    "feature_alpha_dropout": (True, "alpha"),
}
# Attention, of tensors on the CPU where it drops; elsewhere it is torch's, and its dropout ours.
ATTENTION = "scaled_dot_product_attention"
ATTENTION_KEYS = ("CPU", "AutogradCPU")
FEWEST_SCORES = 1 << 15  # below, the Python around a call costs more than its kernels save
CACHE_TAG = f"+fastdrop {__version__}"

_registrations: torch.library.Library | None = None  # torch is as it was when this is None
_grafted: list[tuple[type[torch.nn.Module], dict[str, Any]]] = []  # classes of others, and what they had before
_lock = threading.Lock()


def enable() -> None:
    """Makes torch's own dropouts run on fastdrop, until `disable`: process-wide, wherever they are called from, on the
    CPU and, with numba-cuda, on NVIDIA GPUs.

    `torch.nn.functional.dropout`, ``dropout1d`` to ``dropout3d``, ``alpha_dropout``, ``feature_alpha_dropout`` and
    their in-place forms, and with them torch's modules of these names, `torch.nn.MultiheadAttention`,
    `torch.nn.functional.scaled_dot_product_attention`, `torch.nn.LSTM` and `torch.nn.GRU` between layers, and any model
    built of these; of timm and torchvision, where they were imported before, the modules that `convert` knows. Values
    and gradients are those of the functions of `fastdrop.torch`; other operators and devices, integer, sparse and
    nested tensors and DTensors stay as they are. So do, on a GPU, fused attention and cuDNN's recurrent layers, which
    drop inside of kernels of their own. timm's and torchvision's modules can't be scripted meanwhile.

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
                for name, (features, law) in OPS.items():
                    for inplace in (False, True):
                        kernel = _kernel(name + "_" * inplace, features, law, inplace)
                        for key in KEYS:
                            library.impl(name + "_" * inplace, kernel, key)
                for key in ATTENTION_KEYS:
                    library.impl(ATTENTION, _attention, key)
            for (module, name), ours in FOREIGN.items():
                if theirs := getattr(sys.modules.get(module), name, None):
                    _grafted.append((theirs, _graft(theirs, ours)))
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
            while _grafted:
                theirs, before = _grafted.pop()
                for name, value in before.items():
                    if value is None:
                        delattr(theirs, name)
                    else:
                        setattr(theirs, name, value)
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


def _kernel(name: str, features: bool, law: str, inplace: bool) -> Any:
    """What one of aten's ops does while enabled."""
    op = getattr(torch.ops.aten, name).default

    def kernel(input: Tensor, p: float, train: bool) -> Tensor:
        if not _ours(input, p) or (features and input.dim() < 2) or (law == "alpha" and input.is_complex()):
            return _torchs(op, input, p, train)
        cells = kinds.feature_cells(tuple(input.shape), 1) if features else None
        return drop(input, p, train, inplace, None, None, cells, "bits", law)

    return kernel


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What attention does while enabled: in one piece where it can, else as torch composes it around our dropout."""
    arguments = query, key, value, attn_mask
    options = is_causal, scale, enable_gqa
    drops = dropout_p > KEEPS_ALL  # most calls end here
    known = drops and all(_ours(x, dropout_p) for x in arguments[:3]) and (attn_mask is None or _is_known(attn_mask))
    if known and is_regular(*arguments, *options):
        if any(isinstance(x, (FakeTensor, FunctionalTensor)) for x in arguments):
            traced = compose if is_transformed() or not query.is_cpu else trace
            return traced(*arguments, dropout_p, *options)
        if query.numel() // query.shape[-1] * key.shape[-2] >= FEWEST_SCORES and is_direct(*arguments):
            return attend(*arguments, dropout_p, *options)
    op = torch.ops.aten.scaled_dot_product_attention.default
    return _torchs(op, *arguments, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _graft(theirs: type[torch.nn.Module], ours: type[Rated]) -> dict[str, Any]:
    """Gives another's class our way of dropping and what that wants; returns what it had before, None for nothing."""
    forward = theirs.forward

    def dropped(self: Any, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or not _ours(input, 0.0) or refusal(self):
            result: Tensor = forward(self, input)
            return result
        return ours._drop(self, input)

    wanted = {
        name: value for cls in reversed(ours.__mro__) if issubclass(cls, Rated) for name, value in vars(cls).items()
    }
    missing = {name: value for name, value in wanted.items() if not name.startswith("__") and not hasattr(theirs, name)}
    before: dict[str, Any] = dict.fromkeys(missing)
    before["forward"] = vars(theirs)["forward"]
    for name, value in missing.items():
        setattr(theirs, name, value)
    theirs.forward = dropped
    return before


def _ours(x: Tensor, p: float) -> bool:
    """Whether fastdrop has it; torch refuses a bad p in its own words."""
    if not _is_known(x) or x.dtype not in _kernels.DTYPES or not 0.0 <= p <= 1.0:
        return False
    return x.is_cpu or (x.is_cuda and _cuda.is_usable(x.get_device()))


def _is_known(x: Tensor) -> bool:
    """Whether x is dense, and no subclass but a compiler's."""
    known = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ or isinstance(x, (FakeTensor, FunctionalTensor))
    return known and x.layout is torch.strided and not x.is_nested


def _torchs(op: Any, *arguments: Any, **options: Any) -> Tensor:
    """What torch does when nobody overrides it."""
    result: Tensor = op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *arguments, **options)
    return result


def _mark_compiled(ours: bool) -> None:
    """What is compiled from here on is of the new state: on disk by its cache key, in memory by compiling anew.

    Both caches know a graph by torch's names, before dropout becomes what it is in this state.
    """
    config = torch.compiler.config
    config.cache_key_tag = config.cache_key_tag + CACHE_TAG if ours else config.cache_key_tag.replace(CACHE_TAG, "")
    for name in (*OPS, *(name + "_" for name in OPS), ATTENTION):
        getattr(torch.ops.aten, name).default._dispatch_cache.clear()  # tracing remembers there which kernel it found
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

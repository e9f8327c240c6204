"""`enable`: torch's own dropouts run on fastdrop, by kernels for ``aten::dropout`` and its like.

Users call `enable`, `disable` and `enabled`; Monte Carlo sampling uses `enabled` too. The kernels are registered with
torch's dispatcher, which finds them by the same table look-up as any kernel. So no other operator gets slower, and all
calls of the ops are reached, from Python or from C++. docs/design.md tells why this is not a mode.

Kernels are registered once and stay, because a process ends if a kernel is taken away while another thread is about to
call it. Each kernel asks `context` whether fastdrop is enabled here, and calls torch's kernel if not. timm's and
torchvision's modules are written in Python; their ``forward`` is replaced once, and asks in the same way.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...core import variants
from ..functional.attention import (
    attend,
    compose,
    drops_result,
    is_direct,
    refuse,
    scaled_dot_product_attention,
    takes_shards,
    trace,
    why_composed,
)
from ..functional.plan import KEEPS_ALL, NO_SOURCE, eager_probability
from ..functional.routing import drop
from ..nn.base import Rated
from ..ops.attention import is_regular
from ..runtime import context, cuda
from ..runtime.context import drops_in_scripts, is_enabled, note_traced
from ..runtime.dispatch import is_transformed
from ..runtime.dispatch.compilers import FakeTensor, FunctionalTensor, is_dynamo_imported
from ..runtime.dispatch.dtensors import any_dtensor
from ..runtime.dispatch.modules import UNSCRIPTED
from ..runtime.dispatch.ops import TRANSFORMS, call_as_torch, check_overridable, forget_kernels, kernel_in_transforms
from ..runtime.dtypes import DTYPES
from .classes import THIRD_PARTY_CLASSES, unsupported_option

__all__ = ["disable", "enable", "enabled", "explain_attention", "is_supported", "register"]

# Calls on CPU and CUDA tensors without and with autograd, and calls inside of torch.func's transforms: from Python, and
# from torch's own C++ under vmap, where attention drops.
KEYS = ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA", TRANSFORMS, "FuncTorchVmapMode")

# aten's ops, each with its in-place form: whether whole channels are dropped, and the scaling.
OPS = {
    "dropout": (False, "inverted"),
    "feature_dropout": (True, "inverted"),
    "alpha_dropout": (False, "alpha"),
    "feature_alpha_dropout": (True, "alpha"),
}
# Attention, of tensors on the CPU where it drops; elsewhere it is torch's, and its dropout ours.
ATTENTION = "scaled_dot_product_attention"
ATTENTION_KEYS = ("CPU", "AutogradCPU")
OVERRIDDEN = (*OPS, *(name + "_" for name in OPS), ATTENTION)
GRAFTED = "_fastdrop_grafted"  # on the forward of timm's and torchvision's classes, once it is ours
FEWEST_SCORES = 256  # in a head; below, a head's own costs are more than kernels save

_library: torch.library.Library | None = None  # never taken away: another thread may be on its way to a kernel
_is_registered = False
_lock = threading.Lock()


def enable(*, even_if_slower: bool = False) -> None:
    """Makes torch's own dropouts run on fastdrop, until `disable`: process-wide, wherever they are called from, on the
    CPU and, with numba-cuda, on NVIDIA GPUs.

    `torch.nn.functional.dropout`, ``dropout1d`` to ``dropout3d``, ``alpha_dropout``, ``feature_alpha_dropout`` and
    their in-place forms, and with them torch's modules of these names, `torch.nn.MultiheadAttention`,
    `torch.nn.functional.scaled_dot_product_attention`, `torch.nn.LSTM` and `torch.nn.GRU` between layers, and any model
    built of these; of timm and torchvision, where they were imported before, the modules that `convert` knows. Values
    and gradients are those of the functions of `fastdrop.torch`, also of DTensors; other operators and devices,
    integer, sparse and nested tensors stay as they are. So do, on a GPU, fused attention and cuDNN's recurrent layers,
    which drop inside of kernels of their own.

    Calling it again does nothing. It may be called while other threads work: what is switched is a flag that each call
    reads. The first call in a process also registers kernels with torch's dispatcher, which are never taken away, and
    resets `torch.compile`, if that was used. Make it before threads start: torch doesn't say that registering is safe
    while another thread calls the same operator. Code compiled from then on follows the state by itself, each state
    with its own code.

    Where fastdrop has neither its C extension nor Numba, it computes with NumPy, which takes longer than torch for
    tensors of fewer than about 100,000 elements. `enable` then changes nothing and warns, unless NumPy was chosen by
    name: by `fastdrop.use_backend` or ``FASTDROP_BACKEND``. `enabled` does not ask.

    Parameters
    ----------
    even_if_slower : bool
        Whether to go on in that case.

    Warns
    -----
    RuntimeWarning
        Nothing was enabled; the message says why, and how to get the C extension.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> x = torch.tensor([1.0, float("nan"), 3.0])
    >>> fdt.enable()
    >>> torch.nn.functional.dropout(x, 1.0)
    tensor([0., 0., 0.])
    >>> fdt.disable()
    >>> torch.nn.functional.dropout(x, 1.0)
    tensor([0., nan, 0.])
    """
    why = None if even_if_slower else backends.why_numpy()
    if why is not None:
        warnings.warn(
            "torch's own dropout goes on, because fastdrop would compute with NumPy here, which is slower for most "
            f"models: {why}\nTo enable fastdrop anyway: fastdrop.torch.enable(even_if_slower=True)",
            RuntimeWarning,
            stacklevel=backends.user_level(),
        )
        return
    register()
    context.set_everywhere(True)


def disable() -> None:
    """Undoes `enable`: torch's dropout gives what it did. Does nothing where it is torch's own already.

    Once `enable` or `enabled` was used, calls of torch's dropout pass through Python on their way to torch, which costs
    a few microseconds each. Blocks of `enabled` that are being run go on as they began.

    Examples
    --------
    >>> import fastdrop.torch as fdt
    >>> fdt.disable()
    """
    context.set_everywhere(False)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable` for a block or, as a decorator, a function, and for what runs in it alone: the thread or asyncio task.

    Threads that are started in the block are not in it, other than those of torch's autograd. A forward with
    checkpoints runs a second time in ``backward``: call ``backward`` inside of the block too, or the masks differ.

    Returns
    -------
    context manager, and decorator

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> with fdt.enabled():
    ...     torch.nn.functional.dropout(torch.tensor([float("inf")]), 1.0)
    tensor([0.])
    """
    register()
    with context.enabled_here():
        yield


def register() -> None:
    """Registers the kernels, once. They call torch's until something is switched on."""
    global _library, _is_registered
    if not _is_registered:
        with _lock:
            # An exception from a signal may end this anywhere; the next call does it again.
            if not _is_registered:
                overridden = [getattr(torch.ops.aten, name).default for name in OVERRIDDEN]
                check_overridable(*overridden)
                kernels = list(_kernels_to_register())  # before anything of torch is changed
                _library = _library or torch.library.Library("aten", "IMPL")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # torch says that it has kernels for transforms itself
                    for name, keys, kernel in kernels:
                        for key in keys:
                            _library.impl(name, kernel, key)
                for op in overridden:
                    forget_kernels(op)
                if is_dynamo_imported():
                    torch.compiler.reset()  # what was compiled before has no guard
                _is_registered = True
    for (module, name), ours in THIRD_PARTY_CLASSES.items():
        theirs = getattr(sys.modules.get(module), name, None)
        if theirs is not None and not hasattr(vars(theirs)["forward"], GRAFTED):
            with _lock:
                _graft(theirs, ours)


def _kernels_to_register() -> Iterator[tuple[str, tuple[str, ...], Any]]:
    for name, (features, scaling) in OPS.items():
        for inplace in (False, True):
            yield name + "_" * inplace, KEYS, _kernel(name + "_" * inplace, features, scaling, inplace)
    yield ATTENTION, ATTENTION_KEYS, _attention


def _kernel(name: str, features: bool, scaling: str, inplace: bool) -> Any:
    """The kernel of one of aten's ops."""
    op = getattr(torch.ops.aten, name).default
    transformed = kernel_in_transforms(op)

    def torchs(input: Tensor, p: float, train: bool) -> Tensor:
        if is_transformed():
            result: Tensor = transformed(input, p, train)
            return result
        return call_as_torch(op, input, p, train)

    def kernel(input: Tensor, p: float, train: bool) -> Tensor:
        on = is_enabled()
        if not train and drops_in_scripts():
            train = not _is_called_from_python()
        if is_transformed() or (type(input) is not Tensor and isinstance(input, FakeTensor)):
            note_traced(on)
        if (
            not on
            or not is_supported(input, p)
            or (features and input.dim() < 2)
            or (scaling == "alpha" and input.is_complex())
        ):
            return torchs(input, p, train)
        cells = variants.feature_cells((None,) * input.dim(), 1) if features else None
        try:
            return drop(input, p, train, inplace, NO_SOURCE, cells, "bits", scaling)
        except (NotImplementedError, TypeError):
            if _is_known(input):
                raise
            return torchs(input, p, train)  # a subclass that knows torch's ops alone

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
    """The kernel of attention: one fused kernel where possible, else torch's composition around our dropout."""
    arguments = query, key, value, attn_mask
    options = is_causal, scale, enable_gqa
    drops = dropout_p > KEEPS_ALL  # most calls end here
    on = drops and is_enabled()
    if drops and (is_transformed() or isinstance(query, FakeTensor)):
        note_traced(on)
    supported = on and all(is_supported(x, dropout_p) for x in arguments[:3])
    if supported and any_dtensor(arguments):
        if takes_shards(query, key, value, is_causal):
            given: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            y: Tensor = scaled_dot_product_attention(*arguments, dropout_p, is_causal, **given)
            return y
        supported = False  # torch's composition knows all placements
    known = supported and (attn_mask is None or _is_known(attn_mask))
    if known and is_regular(*arguments, *options):
        if any(isinstance(x, (FakeTensor, FunctionalTensor)) for x in arguments):
            traced = compose if is_transformed() or not query.is_cpu else trace
            return traced(arguments, dropout_p, options)
        if _why_not(query, key) is None and is_direct(*arguments):
            return attend(arguments, dropout_p, options)
    op = torch.ops.aten.scaled_dot_product_attention.default
    return call_as_torch(op, *arguments, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _why_not(query: Tensor, key: Tensor) -> str | None:
    """Why the kernel would be slower than torch's attention around our dropout. None if it is faster."""
    if query.shape[-2] * key.shape[-2] < FEWEST_SCORES:
        return f"each head has fewer than {FEWEST_SCORES} scores"
    return None if backends.is_vectorized() else f"backend {backends.active_name()} is slower than torch"


def explain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    training: bool = True,
    noise_shape: Any = None,
) -> str:
    """Tells which code computes attention of these arguments here and now.

    Nothing is computed, and no random number is drawn.

    Parameters
    ----------
    query, key, value : Tensor
    attn_mask : Tensor, optional
    dropout_p : float
    is_causal : bool
    scale : float, optional
    enable_gqa : bool
        As in `scaled_dot_product_attention`, of fastdrop and of torch.
    training : bool
    noise_shape : sequence of (int or None), optional
        As in `fastdrop.torch.scaled_dot_product_attention`. torch's function has neither, so they concern the first
        line only.

    Returns
    -------
    str
        A line for `fastdrop.torch.scaled_dot_product_attention`, and one for torch's function and all that calls it.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        What the functions raise for arguments that they refuse.

    Examples
    --------
    >>> import torch, fastdrop as fd, fastdrop.torch as fdt
    >>> x = torch.ones(2, 4, 128, 64)
    >>> print(fdt.explain_attention(x, x, x))
    fastdrop.torch's: torch's own, because nothing is dropped
    torch's: torch's own, because nothing is dropped
    >>> with fdt.enabled(), fd.use_backend("numpy"):
    ...     print(fdt.explain_attention(x, x, x, dropout_p=0.1))
    fastdrop.torch's: the kernel of backend numpy
    torch's: torch's own around fastdrop's dropout, because backend numpy is slower than torch
    """
    arguments, options = (query, key, value, attn_mask), (is_causal, scale, enable_gqa)
    if not is_regular(*arguments, *options):
        refuse(*arguments, *options)
    kernel = f"the kernel of backend {backends.active_name()}"
    ours = theirs = "torch's own, because nothing is dropped"
    drops = eager_probability(dropout_p, "dropout probability") > KEEPS_ALL
    composed = why_composed(arguments, options, noise_shape)
    if drops and training:
        ours = f"composed of products of matrices and softmax_dropout, because {composed}" if composed else kernel
        if drops_result(arguments, options, noise_shape):
            ours += "; it drops the result, because keys share a decision"
        elif query.is_cuda and noise_shape is None:
            ours = "torch's own, unless seed or generator is given"
    if drops and not is_enabled():
        theirs = "torch's own, because enable() is off"
    elif drops:
        reason = why_composed(arguments, options) or _why_not(query, key)
        theirs = f"torch's own around fastdrop's dropout, because {reason}" if reason else kernel
    return f"fastdrop.torch's: {ours}\ntorch's: {theirs}"


def _graft(theirs: type[torch.nn.Module], ours: type[Rated]) -> None:
    """Replaces forward of timm's or torchvision's class by ours while enabled, and adds the attributes it needs."""
    forward = theirs.forward
    if hasattr(forward, GRAFTED):
        return

    def dropped(self, input):  # type: ignore[no-untyped-def]
        # Only closure variables and builtins: the function is made anew below.
        if not is_enabled_there() or not is_ours(input) or is_refused(self):
            return forward(self, input)
        return ours.drop_input(self, input)

    wanted = {
        name: value for cls in reversed(ours.__mro__) if issubclass(cls, Rated) for name, value in vars(cls).items()
    }
    added = [name for name in wanted if not name.startswith("__") and not hasattr(theirs, name)]
    for name in added:
        setattr(theirs, name, wanted[name])
    unscripted = [name for name in added if isinstance(wanted[name], property)]
    setattr(theirs, UNSCRIPTED, [*getattr(theirs, UNSCRIPTED, ()), *unscripted])
    is_enabled_there, is_refused, is_ours = context.is_enabled_there, unsupported_option, _is_ours
    # TorchScript compiles the source of what is wrapped, with the globals of the function that it finds.
    grafted: Any = types.FunctionType(dropped.__code__, forward.__globals__, closure=dropped.__closure__)
    theirs.forward = functools.update_wrapper(grafted, forward)
    setattr(grafted, GRAFTED, True)


def _is_ours(x: Any) -> bool:
    return isinstance(x, Tensor) and is_supported(x, 0.0)


def is_supported(x: Tensor, p: float) -> bool:
    """Whether fastdrop has kernels for a tensor. A p out of range is left to torch, which raises its own error."""
    if x.layout is not torch.strided or x.is_nested or x.dtype not in DTYPES or not 0.0 <= p <= 1.0:
        return False
    return x.is_cpu or (x.is_cuda and cuda.is_usable(x.get_device()))


def _is_known(x: Tensor) -> bool:
    """Whether x is dense, and a plain tensor or a compiler's."""
    known = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ or isinstance(x, (FakeTensor, FunctionalTensor))
    return known and x.layout is torch.strided and not x.is_nested


def _is_called_from_python() -> bool:
    """Whether one of torch's Python functions called the kernel that asks. Scripted code calls it directly."""
    return sys._getframe(2).f_code.co_filename == torch.nn.functional.__file__

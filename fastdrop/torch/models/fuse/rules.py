"""What a fused module is, which calls of others it may leave out, and the passes that stand for them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...functional import fused
from ...nn import dropout as ours
from ...nn.dropout import Rated
from ...runtime import cuda
from ...runtime.dispatch.compilers import constant_in_graphs
from ...runtime.dispatch.modules import hook_obstacle
from ..enable import _ours
from ..report import class_name

__all__ = [
    "DROPOUTS",
    "Fused",
    "activation_name",
    "activation_obstacle",
    "add",
    "add_then_norm",
    "become",
    "call_obstacle",
    "change",
    "is_taken",
    "norm_obstacle",
    "norm_of_sum",
    "obstacle",
    "options_of",
    "original_class",
    "replaced_method",
    "scripted_as",
]

Method = TypeVar("Method", bound=Callable[..., Any])

DROPOUTS = (nn.Dropout, ours.Dropout)
REPLACED = "was replaced on the object itself"
FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))
TRANSFORMERS_ACTIVATIONS = {
    ("transformers.activations", "AccurateGELUActivation"): "gelu_tanh",
    ("transformers.activations", "FastGELUActivation"): "gelu_tanh",  # its constant has ten digits
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
    ("transformers.activations", "SiLUActivation"): "silu",
}
ACTIVATION_NAMES = {
    *(function.__name__ for function, _ in FUNCTIONS),
    *(name for _, name in TRANSFORMERS_ACTIVATIONS),
    *("ReLU", "GELU", "SiLU"),
}


class Fused(nn.Module):
    """A module that `fuse` changed: a subclass of what it was, without attributes of its own."""

    original: ClassVar[type[nn.Module]]
    # The original class's methods which are not called: torch's own, transformers' by name alone.
    METHODS: ClassVar[dict[str, Any]] = {"forward": None}
    ARGUMENTS: ClassVar[str] = ""  # of its forward, where that differs from version to version

    @classmethod
    def refusal(cls, module: Any) -> str:
        """Why a module of the original class can't be fused; nothing if it can."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> Any:
        """`torch.jit.script` asks before it reads a forward: it can read the original's alone."""
        if not hasattr(type(self).forward, "__wrapped__"):
            raise RuntimeError(f"a {type(self).__name__} can't be scripted: call fdt.unfuse before torch.jit.script")
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a module of the original class, which `pickle` finds by its name, and what to make of it."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        own = vars(type(self))
        if "original" not in own:  # a subclass of another's
            return reduced
        given = [own["original"] if argument is type(self) else argument for argument in arguments]
        return (_remade, (own.get("known", type(self)), make, given), *rest)


def _remade(known: type[Fused], make: Any, arguments: list[Any]) -> Any:
    module = make(*arguments)
    become(module, known)
    return module


def become(module: nn.Module, known: type[Fused]) -> None:
    """Changes a module's class to the one that is known, or to one of that before its own."""
    module.__class__ = _fused_class(type(module), known)  # type: ignore[arg-type]


@functools.cache
def _fused_class(theirs: Any, known: Any) -> type[Fused]:
    if theirs is getattr(known, "original", None):
        return known  # type: ignore[no-any-return]
    return type(f"Fused{theirs.__name__}", (known, theirs), {"original": theirs, "known": known})


def scripted_as(method: Callable[..., Any]) -> Callable[[Method], Method]:
    """Has `torch.jit.script` read torch's method where one of ours stands: what it scripts drops by torch's means.

    TorchScript finds a method's source, as `inspect` does, behind ``__wrapped__``, and the names in it where ours is.
    """

    def marked(ours: Method) -> Method:
        ours.__wrapped__ = method  # type: ignore[attr-defined]
        return ours

    return marked


def original_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, but for `fuse`."""
    kind = type(module)
    return kind.original if issubclass(kind, Fused) else kind


def change(module: nn.Module, known: type[Fused]) -> str:
    """What of a module isn't the code that its class stands for; nothing if all is. Asked when it is fused."""
    if reason := replaced_method(module, known):
        return reason
    kind = original_class(module)
    base = getattr(known, "original", kind)
    for name, torchs in known.METHODS.items():
        method = getattr(kind, name)
        if torchs is None:  # transformers decorates its own
            method = inspect.unwrap(method)
        named = (method.__module__, method.__qualname__) == (base.__module__, f"{base.__qualname__}.{name}")
        if not named or torchs not in (None, method):
            return f"its {name} is not {class_name(base, kind) if base is not kind else base.__name__}'s"
    if known.ARGUMENTS and " ".join(inspect.signature(kind.forward).parameters) != known.ARGUMENTS:
        return "its forward is that of an unknown version of transformers"
    return ""


def replaced_method(module: nn.Module, known: type[Fused]) -> str:
    for name in known.METHODS:
        if name in module.__dict__:
            return f"its {name} {REPLACED}"
    return ""


def obstacle(name: str, module: Any, *classes: type[nn.Module]) -> str:
    """Why the call of a module can't be left out, nothing if it can. A subclass may have a forward of its own."""
    if type(module) not in classes:
        return f"{name} is a {class_name(type(module), classes[0])}, not nn.{classes[0].__name__}"
    return call_obstacle(name, module)


def call_obstacle(name: str, module: Any) -> str:
    """As `obstacle`, for a module whose class is known to be right."""
    if "forward" in module.__dict__:
        return f"{name}'s forward {REPLACED}"
    if hooks := hook_obstacle(module):
        return f"{name} {hooks}"
    if getattr(module, "scaling", None) == "standard":
        return f"{name} doesn't scale what it keeps"
    return ""


def norm_obstacle(name: str, norm: Any) -> str:
    if reason := obstacle(name, norm, nn.LayerNorm):
        return reason
    return "" if len(norm.normalized_shape) == 1 else f"{name} is of more than one axis"


def activation_name(function: Any) -> str | None:
    """What the fused functions call an activation, a function or a module; None if they don't have it."""
    if isinstance(function, nn.Module):
        kind = type(function)
        if kind is nn.GELU:
            return "gelu" if function.approximate == "none" else "gelu_tanh"
        if kind is nn.ReLU or kind is nn.SiLU:
            return "relu" if kind is nn.ReLU else "silu"
        return TRANSFORMERS_ACTIVATIONS.get((kind.__module__, kind.__name__))
    if isinstance(function, functools.partial):
        tanh = function.func is F.gelu and not function.args and function.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if tanh else None
    for known, name in FUNCTIONS:
        if function is known:
            return name
    return None


def activation_obstacle(name: str, function: Any) -> str:
    if activation_name(function) is None:
        given = type(function) if isinstance(function, nn.Module) else function
        called = getattr(given, "__name__", repr(given))
        if called in ACTIVATION_NAMES:  # another of that name
            called = f"{given.__module__}.{called}"
        return f"{name} is {called}, not a known one"
    return call_obstacle(name, function) if isinstance(function, nn.Module) else ""


def is_taken(x: Any) -> bool:
    """Whether the fused functions are for what layers make of x."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    if not torch.compiler.is_compiling():
        return _ours(x, 0.0)
    return not x.is_nested and (x.is_cpu or (x.is_cuda and _is_usable(x.get_device())))


@constant_in_graphs
def _is_usable(device: int) -> bool:
    return cuda.is_usable(device)


def options_of(drop: Any) -> dict[str, Any]:
    """A dropout module's state, as the fused functions take it."""
    p = drop.rate if isinstance(drop, Rated) else drop.p
    return {"p": p, "training": drop.training, "store": getattr(drop, "store", "bits")}


# ---- the pieces ----


def _alike(h: Tensor, x: Tensor, keep_half: bool) -> tuple[Tensor, Tensor]:
    """h and the residual x as ``h + x`` would have them; with ``keep_half``, 16-bit h may stay beside a float32 x."""
    if h.dtype == x.dtype:
        return h, x
    dtype = torch.promote_types(h.dtype, x.dtype)
    return h if keep_half and dtype == torch.float32 else h.to(dtype), x.to(dtype)


def add(h: Tensor, bias: Tensor | None, x: Tensor, drop: Any) -> Tensor:
    """``x + drop(h + bias)``"""
    h, x = _alike(h, x, True)
    if bias is None:
        return fused.dropout_add(h, x, **options_of(drop))
    return fused.bias_dropout_add(h, bias, x, **options_of(drop))


def add_then_norm(h: Tensor, bias: Tensor | None, x: Tensor, drop: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """``x + drop(h + bias)``, after its norm: pre-norm layers go on from the sum."""
    h, x = _alike(h, x, True)
    return fused.dropout_add_layer_norm(h, x, norm.weight, norm.bias, eps=norm.eps, input_bias=bias, **options_of(drop))


def norm_of_sum(h: Tensor, bias: Tensor | None, x: Tensor, drop: Any, norm: Any) -> Tensor:
    """``norm(x + drop(h + bias))``: the residual stream of post-norm layers, and so of the sum's dtype."""
    h, x = _alike(h, x, False)
    if h.is_cuda and h.dtype in fused.HALVES and torch.is_autocast_enabled("cuda"):  # under which norms are float32
        h, x = h.float(), x.float()
    return add_then_norm(h, bias, x, drop, norm)[0]

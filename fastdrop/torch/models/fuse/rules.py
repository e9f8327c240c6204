"""What all fused layers share: their base class, which calls they may leave out, and the passes that replace them.

`torch_layers`, `transformers_layers`, `peft_layers` and `residual_layers` build on it. A function called
``..._obstacle`` returns a sentence for the report of `fuse` that says why something can't be fused, and "" if it can.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...functional import fused
from ...nn import dropout as ours
from ...nn.base import Rated
from ...runtime import cuda
from ...runtime.dispatch.compilers import constant_in_graphs
from ...runtime.dispatch.modules import hook_obstacle
from ...runtime.dtypes import HALVES
from ..enable import is_supported
from ..rates import rate_name
from ..report import class_name

__all__ = [
    "DROPOUTS",
    "Fused",
    "activation_name",
    "activation_obstacle",
    "add",
    "add_then_norm",
    "call_obstacle",
    "can_fuse_input",
    "change_class",
    "changed_code",
    "linear_obstacle",
    "module_obstacle",
    "norm_obstacle",
    "norm_of_sum",
    "options_of",
    "original_class",
    "rate_of",
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
    """A module that `fuse` changed: its class is a subclass of what it was, without attributes of its own."""

    original: ClassVar[type[nn.Module]]
    # The methods of the original class that are not called any more. transformers' are known by name alone.
    METHODS: ClassVar[dict[str, Any]] = {"forward": None}
    ARGUMENTS: ClassVar[str] = ""  # of its forward, if they differ from version to version
    NAMES: ClassVar[str] = ""  # that its forward reads, in their order, if they differ likewise

    @classmethod
    def obstacle(cls, module: Any) -> str:
        """Why a module of the original class can't be fused."""
        raise NotImplementedError

    @classmethod
    def batch_norm_obstacle(cls, module: Any) -> str:
        """Why it can't be fused if batch norm in it must compute what it did."""
        return ""

    @classmethod
    def parts(cls, module: Any) -> Iterable[nn.Module]:
        """The modules inside that have no rows of their own in the report."""
        return module.children()  # type: ignore[no-any-return]

    def __prepare_scriptable__(self) -> Any:
        """`torch.jit.script` calls this before it reads a forward. It can only read the original one."""
        if not hasattr(type(self).forward, "__wrapped__"):
            raise RuntimeError(f"a {type(self).__name__} can't be scripted: call fdt.unfuse before torch.jit.script")
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle has a module of the original class, which `pickle` finds by name, and the class to change it to."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        own = vars(type(self))
        if "original" not in own:  # a subclass of a fused class, not from here
            return reduced
        given = [own["original"] if argument is type(self) else argument for argument in arguments]
        return (_rebuild, (own.get("fused_class", type(self)), make, given), *rest)


def _rebuild(fused_class: type[Fused], make: Any, arguments: list[Any]) -> Any:
    module = make(*arguments)
    change_class(module, fused_class)
    return module


def change_class(module: nn.Module, fused_class: type[Fused]) -> None:
    """Changes a module's class to the fused one; if its class is a subclass of the original, to a fused subclass."""
    module.__class__ = _subclass_of_both(type(module), fused_class)  # type: ignore[arg-type]


def restore_class(module: nn.Module) -> bool:
    """Undoes `change_class` of this module, not of those inside. Returns whether it did."""
    if not isinstance(module, Fused) or "original" not in vars(type(module)):  # its class was changed since
        return False
    module.__class__ = type(module).original  # type: ignore[assignment]
    return True


@functools.cache
def _subclass_of_both(original: Any, fused_class: Any) -> type[Fused]:
    if original is getattr(fused_class, "original", None):
        return fused_class  # type: ignore[no-any-return]
    return type(
        f"Fused{original.__name__}", (fused_class, original), {"original": original, "fused_class": fused_class}
    )


def scripted_as(method: Callable[..., Any]) -> Callable[[Method], Method]:
    """A decorator that has `torch.jit.script` read torch's method in place of the decorated one.

    TorchScript finds a method's source behind ``__wrapped__``, as `inspect` does, and its names in the decorated
    method's module. What it scripts drops by torch's dropout.
    """

    def mark(ours: Method) -> Method:
        ours.__wrapped__ = method  # type: ignore[attr-defined]
        return ours

    return mark


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `fuse`."""
    cls = type(module)
    return cls.original if issubclass(cls, Fused) else cls


def changed_code(module: nn.Module, fused_class: type[Fused]) -> str:
    """Which of a module's methods isn't the code that the fused class was written for. `fuse` asks once."""
    if reason := replaced_method(module, fused_class):
        return reason
    cls = original_class(module)
    base = getattr(fused_class, "original", cls)
    for name, torch_method in fused_class.METHODS.items():
        method = getattr(cls, name)
        if torch_method is None:  # transformers decorates its methods
            method = inspect.unwrap(method)
        named = (method.__module__, method.__qualname__) == (base.__module__, f"{base.__qualname__}.{name}")
        if not named or torch_method not in (None, method):
            return f"its {name} is not {class_name(base, cls) if base is not cls else base.__name__}'s"
    names = getattr(getattr(inspect.unwrap(cls.forward), "__code__", None), "co_names", ())
    for found, known in (
        (inspect.signature(cls.forward).parameters, fused_class.ARGUMENTS),
        (names, fused_class.NAMES),
    ):
        if known and " ".join(found) != known:
            return f"its forward is that of an unknown version of {base.__module__.partition('.')[0]}"
    return ""


def replaced_method(module: nn.Module, fused_class: type[Fused]) -> str:
    for name in fused_class.METHODS:
        if name in module.__dict__:
            return f"its {name} {REPLACED}"
    return ""


def module_obstacle(name: str, module: Any, *classes: type[nn.Module]) -> str:
    """Why the call of a module can't be left out. Subclasses are refused, because their forward may be their own."""
    if type(module) not in classes:
        return f"{name} is a {class_name(type(module), classes[0])}, not nn.{classes[0].__name__}"
    return call_obstacle(name, module)


def call_obstacle(name: str, module: Any, shared: bool = False) -> str:
    """The same for a module whose class is known to be right. ``shared`` lets its elements share decisions."""
    if "forward" in module.__dict__:
        return f"{name}'s forward {REPLACED}"
    if hooks := hook_obstacle(module):
        return f"{name} {hooks}"
    if getattr(module, "scaling", None) == "standard":
        return f"{name} doesn't scale what it keeps"
    if getattr(module, "noise_shape", None) is not None and not shared:
        return f"{name} has a noise_shape"
    if getattr(module, "own_source", None) is not None:
        return f"{name} has a seed or a generator of its own"
    if getattr(module, "layout", None) is not None:
        return f"{name} has a layout"
    return ""


def linear_obstacle(name: str, linear: Any) -> str:
    reason = module_obstacle(name, linear, nn.Linear)
    return reason or ("" if linear.weight.is_floating_point() else f"{name} is not of real numbers")


def norm_obstacle(name: str, norm: Any) -> str:
    if reason := module_obstacle(name, norm, nn.LayerNorm):
        return reason
    return "" if len(norm.normalized_shape) == 1 else f"{name} is of more than one axis"


def activation_name(function: Any) -> str | None:
    """The fused functions' name of an activation, which is a function or a module; None if they don't have it."""
    if isinstance(function, nn.Module):
        cls = type(function)
        if cls is nn.GELU:
            return "gelu" if function.approximate == "none" else "gelu_tanh"
        if cls is nn.ReLU or cls is nn.SiLU:
            return "relu" if cls is nn.ReLU else "silu"
        return TRANSFORMERS_ACTIVATIONS.get((cls.__module__, cls.__name__))
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
        if called in ACTIVATION_NAMES:  # something else of that name
            called = f"{given.__module__}.{called}"
        return f"{name} is {called}, not a known one"
    return call_obstacle(name, function) if isinstance(function, nn.Module) else ""


def can_fuse_input(x: Any) -> bool:
    """Whether the fused functions have kernels for a layer's input, and so for what the layer makes of it."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    if not torch.compiler.is_compiling():
        return is_supported(x, 0.0)
    return not x.is_nested and (x.is_cpu or (x.is_cuda and _is_usable(x.get_device())))


@constant_in_graphs
def _is_usable(device: int) -> bool:
    return cuda.is_usable(device)


def rate_of(drop: Any) -> Any:
    """A dropout module's p, which is a tensor in compiled code for fastdrop's modules."""
    if isinstance(drop, Rated):
        return drop.rate
    return drop.p if isinstance(drop, nn.Dropout) else getattr(drop, rate_name(drop) or "p")


def options_of(drop: Any) -> dict[str, Any]:
    """The options that a dropout module stands for in calls of the fused functions."""
    return {"p": rate_of(drop), "training": drop.training, "store": getattr(drop, "store", "bits")}


# ---- the passes ----


def _match_dtypes(h: Tensor, x: Tensor, keep_half: bool) -> tuple[Tensor, Tensor]:
    """h and the residual x in the dtype of ``h + x``. With ``keep_half``, a 16-bit h may stay beside a float32 x."""
    if h.dtype == x.dtype:
        return h, x
    dtype = torch.promote_types(h.dtype, x.dtype)
    return h if keep_half and dtype == torch.float32 else h.to(dtype), x.to(dtype)


def add(h: Tensor, bias: Tensor | None, x: Tensor, drop: Any) -> Tensor:
    """``x + drop(h + bias)``"""
    h, x = _match_dtypes(h, x, True)
    if bias is None:
        return fused.dropout_add(h, x, **options_of(drop))
    return fused.bias_dropout_add(h, bias, x, **options_of(drop))


def add_then_norm(h: Tensor, bias: Tensor | None, x: Tensor, drop: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """``norm(x + drop(h + bias))`` and the sum that it normalises, from which pre-norm layers go on."""
    h, x = _match_dtypes(h, x, True)
    return fused.dropout_add_layer_norm(h, x, norm.weight, norm.bias, eps=norm.eps, input_bias=bias, **options_of(drop))


def norm_of_sum(h: Tensor, bias: Tensor | None, x: Tensor, drop: Any, norm: Any) -> Tensor:
    """``norm(x + drop(h + bias))``, in the sum's dtype: it is the residual stream of post-norm layers."""
    h, x = _match_dtypes(h, x, False)
    if h.is_cuda and h.dtype in HALVES and torch.is_autocast_enabled("cuda"):  # which computes norms in float32
        h, x = h.float(), x.float()
    return add_then_norm(h, bias, x, drop, norm)[0]

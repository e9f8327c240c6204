"""Which modules drop, ours or others', and under what name each keeps its drop probability."""

from __future__ import annotations

import numbers

from torch import Tensor, nn

from ..nn.dropout import Rated
from ..runtime.dispatch.modules import TorchDropout
from .drop_path import is_drop_path

# Of packages that need not be installed: recognised by the names of a module's class and of those it derives from.
NAMES = {
    "DropPath": ("drop_prob",),  # timm
    "StochasticDepth": ("p",),  # torchvision
    "DropBlock2d": ("drop_prob", "p"),  # timm, torchvision
    "DropBlock3d": ("p",),
}


def rate_name(module: nn.Module) -> str | None:
    """The attribute that holds the drop probability of a module that drops by itself; None of any other.

    Attention and recurrent layers count if they were built to drop.
    """
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        drops = number(module, "dropout") and getattr(module, "num_layers", 2) > 1
        return "dropout" if drops else None
    if isinstance(module, TorchDropout | Rated) or _was_dropout(module):
        return "p"
    for cls in type(module).__mro__:
        for name in NAMES.get(cls.__name__, ()):
            if number(module, name) is not None:
                return name
    # transformers has a class of its own for each model: known by what the forward computes
    return "drop_prob" if number(module, "drop_prob") is not None and is_drop_path(type(module)) else None


def _was_dropout(module: nn.Module) -> bool:
    """Whether a scripted module was one of torch's that drop."""
    theirs = getattr(nn, getattr(module, "original_name", ""), None)
    return isinstance(theirs, type) and issubclass(theirs, TorchDropout)


def number(module: nn.Module, name: str) -> float | None:
    """An attribute that is a number or a tensor of one."""
    value = getattr(module, name, None)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        return float(value)
    return float(value) if isinstance(value, numbers.Real) else None


def set_rate(module: nn.Module, name: str, p: float) -> None:
    setattr(module, name, p)
    if isinstance(module, Rated):
        module.drive(p)

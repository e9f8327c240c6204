"""Which modules drop, and in which attribute each keeps its drop probability.

The scheduler, `audit`, `mc_dropout` and the reports ask `rate_name`. For `nn.Dropout` it is "p", for timm's DropPath
"drop_prob", for `nn.LSTM` with dropout "dropout". It is None for a module that doesn't drop.
"""

from __future__ import annotations

import numbers

from torch import Tensor, nn

from ..nn.base import Rated
from ..runtime.dispatch.modules import TorchDropout
from .drop_path import is_drop_path

# By the name of a class or of one of its base classes, because these packages need not be installed.
NAMES = {
    "DropPath": ("drop_prob",),  # timm
    "StochasticDepth": ("p",),  # torchvision
    "DropBlock2d": ("drop_prob", "p"),  # timm, torchvision
    "DropBlock3d": ("p",),
}


def rate_name(module: nn.Module) -> str | None:
    """The attribute with the drop probability of a module that drops; None for a module that doesn't.

    Attention and recurrent layers drop if they were built with dropout.
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
    # transformers has such a class for each model. They are recognised by what the forward computes.
    return "drop_prob" if number(module, "drop_prob") is not None and is_drop_path(type(module)) else None


def _was_dropout(module: nn.Module) -> bool:
    """Whether a scripted module was made of one of torch's dropout modules."""
    theirs = getattr(nn, getattr(module, "original_name", ""), None)
    return isinstance(theirs, type) and issubclass(theirs, TorchDropout)


def number(module: nn.Module, name: str) -> float | None:
    """The value of an attribute that is a number or a tensor of one number; None for any other."""
    value = getattr(module, name, None)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        return float(value)
    return float(value) if isinstance(value, numbers.Real) else None


def set_rate(module: nn.Module, name: str, p: float) -> None:
    """Sets the drop probability of a module, for compiled code too if the module is fastdrop's."""
    setattr(module, name, p)
    if isinstance(module, Rated):
        module.drive(p)

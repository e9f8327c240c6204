"""Which classes of torch, timm and torchvision fastdrop has a module for, and which options of theirs it lacks.

`convert` changes modules of these classes, `enable` replaces the forward of timm's and torchvision's, and `reasons`
explains to users what happens to a module.
"""

from __future__ import annotations

from torch import nn

from ..nn import dropout as ours
from ..nn import structured
from ..nn.base import Rated
from .drop_path import is_drop_path

__all__ = ["THIRD_PARTY_CLASSES", "TORCH_CLASSES", "class_for", "is_listed", "unsupported_option"]

TORCH_CLASSES: dict[type[nn.Module], type[Rated]] = {
    nn.Dropout: ours.Dropout,
    nn.Dropout1d: ours.Dropout1d,
    nn.Dropout2d: ours.Dropout2d,
    nn.Dropout3d: ours.Dropout3d,
    nn.AlphaDropout: ours.AlphaDropout,
    nn.FeatureAlphaDropout: ours.FeatureAlphaDropout,
}
# By module and name, because these packages need not be installed. The attributes of both classes are the same.
THIRD_PARTY_CLASSES: dict[tuple[str, str], type[Rated]] = {
    ("timm.layers.drop", "DropPath"): structured.DropPath,
    ("timm.layers.drop", "DropBlock2d"): structured.TimmDropBlock2d,
    ("torchvision.ops.stochastic_depth", "StochasticDepth"): structured.StochasticDepth,
    ("torchvision.ops.drop_block", "DropBlock2d"): structured.DropBlock2d,
    ("torchvision.ops.drop_block", "DropBlock3d"): structured.DropBlock3d,
}


def _listed_class(cls: type[nn.Module]) -> type[Rated] | None:
    return TORCH_CLASSES.get(cls) or THIRD_PARTY_CLASSES.get((cls.__module__, cls.__qualname__))


def is_listed(module: nn.Module) -> bool:
    """Whether a module's class is in one of the two tables."""
    return _listed_class(type(module)) is not None


def class_for(module: nn.Module) -> type[Rated] | None:
    """fastdrop's class for a module: by the tables, or because the module's forward computes stochastic depth."""
    known = _listed_class(type(module))
    if known is None and not isinstance(module, Rated) and "drop_prob" in vars(module) and is_drop_path(type(module)):
        return structured.DropPath
    return known


def unsupported_option(module: nn.Module) -> str:
    """What one of timm's DropBlock2d does that fastdrop's doesn't, for a report; "" if nothing."""
    if getattr(module, "with_noise", False):
        return "puts noise where it drops"
    if hasattr(module, "gamma_scale") and not getattr(module, "scale_by_keep", True):
        return "doesn't scale what it keeps"
    if getattr(module, "batchwise", False):  # before timm 1.0.23
        return "drops the same of all samples"
    return ""

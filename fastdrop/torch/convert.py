"""Models that exist: their dropout modules made ours, and back.

A module changes its class where it stands: whoever holds it, under whatever name and however often, holds it still,
with its hooks, its training state and its p.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .. import _checks
from . import modules as ours
from .modules import Rated

__all__ = ["FOREIGN", "Report", "convert", "refusal", "revert", "why_left"]

BEFORE = "_fastdrop_before"  # on a converted module: the class it had
CLASSES: dict[type[nn.Module], type[Rated]] = {
    nn.Dropout: ours.Dropout,
    nn.Dropout1d: ours.Dropout1d,
    nn.Dropout2d: ours.Dropout2d,
    nn.Dropout3d: ours.Dropout3d,
    nn.AlphaDropout: ours.AlphaDropout,
    nn.FeatureAlphaDropout: ours.FeatureAlphaDropout,
}
# Of packages that need not be there, by module and name; their attributes are ours.
FOREIGN: dict[tuple[str, str], type[Rated]] = {
    ("timm.layers.drop", "DropPath"): ours.DropPath,
    ("timm.layers.drop", "DropBlock2d"): ours.TimmDropBlock2d,
    ("torchvision.ops.stochastic_depth", "StochasticDepth"): ours.StochasticDepth,
    ("torchvision.ops.drop_block", "DropBlock2d"): ours.DropBlock2d,
    ("torchvision.ops.drop_block", "DropBlock3d"): ours.DropBlock3d,
}


def refusal(module: nn.Module) -> str:
    """What one of timm's DropBlock2d does that ours doesn't."""
    if getattr(module, "with_noise", False):
        return "puts noise where it drops"
    if hasattr(module, "gamma_scale") and not getattr(module, "scale_by_keep", True):
        return "doesn't scale what it keeps"
    if getattr(module, "batchwise", False):  # before timm 1.0.23
        return "drops the same of all samples"
    return ""


def class_for(theirs: type[nn.Module]) -> type[Rated] | None:
    """Our class for torch's, timm's or torchvision's."""
    return CLASSES.get(theirs) or FOREIGN.get((theirs.__module__, theirs.__qualname__))


@dataclass(frozen=True)
class Row:
    """What became of one module: ``after`` is None where it was left, and ``reason`` says why."""

    path: str
    before: str
    after: str | None
    reason: str = ""


class Report:
    """What `convert` or `revert` did to a model; prints as a table.

    ``rows`` has one `Row` for each module that draws dropout, ``changed`` those that were changed, ``left`` the others.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    @property
    def changed(self) -> list[Row]:
        return [row for row in self.rows if row.after is not None]

    @property
    def left(self) -> list[Row]:
        return [row for row in self.rows if row.after is None]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if not self.rows:
            return "no module with dropout"
        lines = [("module", "before", "after")]
        lines += [(row.path or "(the model)", row.before, row.after or f"left: {row.reason}") for row in self.rows]
        widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
        return "\n".join(f"{path:{widths[0]}}  {before:{widths[1]}}  {after}" for path, before, after in lines)


def convert(model: nn.Module, *, store: str = "bits") -> Report:
    """Makes every dropout module of a model a fastdrop one, in place, and reports what it did.

    Each of torch's `Dropout`, `Dropout1d` to `Dropout3d`, `AlphaDropout` and `FeatureAlphaDropout`, timm's ``DropPath``
    and ``DropBlock2d``, torchvision's ``StochasticDepth``, ``DropBlock2d`` and ``DropBlock3d``, at any depth and the
    model itself included, becomes the module of `fastdrop.torch` for it: the same object with the same p, training
    state and hooks, whoever refers to it, listed once. What drops by other means is left and listed with the reason;
    where that names `enable`, it is reached so.

    Parameters
    ----------
    model : Module
    store : {"bits", "seed"}
        As in `fastdrop.torch.dropout`; ValueError for any other.

    Returns
    -------
    Report
        Prints as a table: module path, before, after or why left.

    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1))
    >>> print(fdt.convert(model))
    module  before                         after
    1       Dropout(p=0.1, inplace=False)  Dropout(p=0.1, inplace=False, store='bits')
    """
    _checks.choice("store", store, _checks.STORES)
    rows = []
    routed: set[int] = set()  # attention in layers that `fuse` has changed, which drops by ours
    for path, module in model.named_modules():
        routed.update(id(getattr(module, name)) for name in getattr(type(module), "ATTENTIONS", ()))
        become = class_for(type(module))
        before = repr(module) if become or isinstance(module, (_DropoutNd, Rated)) else type(module).__name__
        reason = "" if id(module) in routed else why_left(module)
        if become is not None and not reason:
            setattr(module, BEFORE, type(module))
            module.__class__ = become
            if hasattr(become, "store"):
                module.store = store
            rows.append(Row(path, before, repr(module)))
        elif BEFORE in vars(module) and getattr(module, "store", store) != store:
            module.store = store
            rows.append(Row(path, before, repr(module)))
        elif reason:
            rows.append(Row(path, before, None, reason))
    return Report(rows)


def revert(model: nn.Module) -> Report:
    """Undoes `convert`: every module it changed has its old class again. Modules built as ours stay ours.

    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(torch.nn.Dropout(0.1))
    >>> _ = fdt.convert(model)
    >>> print(fdt.revert(model))
    module  before                                       after
    0       Dropout(p=0.1, inplace=False, store='bits')  Dropout(p=0.1, inplace=False)
    """
    rows = []
    for path, module in model.named_modules():
        original = module.__dict__.get(BEFORE)
        if original is not None:
            before = repr(module)
            module.__class__ = original
            for name in (BEFORE, "store", "_rate"):
                module.__dict__.pop(name, None)
            rows.append(Row(path, before, repr(module)))
    return Report(rows)


def why_left(module: nn.Module) -> str:
    """Why a module that draws dropout is not changed; nothing for one that draws none, is ours or can be."""
    if isinstance(module, Rated):
        return ""
    if class_for(type(module)):
        if "forward" in vars(module):
            return "its forward was replaced on the object itself"
        return refusal(module)
    if isinstance(module, _DropoutNd):
        theirs = next(cls for cls in type(module).__mro__ if cls.__module__ == nn.Dropout.__module__)
        return f"a subclass of nn.{theirs.__name__}; its forward may be its own"
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0.0:
        return "drops attention weights inside torch's attention; use fdt.enable()"
    if isinstance(module, nn.RNNBase) and module.dropout > 0.0 and module.num_layers > 1:
        return "drops between layers inside torch; use fdt.enable()"
    return ""

"""Models that exist: their dropout modules made ours, and back.

A module changes its class where it stands: whoever holds it, under whatever name and however often, holds it still,
with its hooks, its training state and its p.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...core import checks
from ..nn import dropout as ours
from ..nn.dropout import Rated
from ..runtime.dispatch.modules import TorchDropout
from .drop_path import is_drop_path
from .rates import rate_name
from .report import Report, Row, class_name
from .source import (
    ENABLE,
    Owners,
    functional_drops,
    is_unreadable,
    lenders,
    own_random,
    rate_text,
    reached_by,
    scripted_drop,
)

__all__ = [
    "FOREIGN",
    "Report",
    "Row",
    "convert",
    "functional_rows",
    "reach",
    "refusal",
    "revert",
    "why_left",
    "why_lent",
]

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


def class_for(module: nn.Module) -> type[Rated] | None:
    """Our class for a module of torch's, timm's or torchvision's, or one that is stochastic depth by its forward."""
    theirs = type(module)
    known = CLASSES.get(theirs) or FOREIGN.get((theirs.__module__, theirs.__qualname__))
    if known is None and not isinstance(module, Rated) and "drop_prob" in vars(module) and is_drop_path(theirs):
        return ours.DropPath
    return known


def convert(model: nn.Module, *, store: str = "bits") -> Report:
    """Makes every dropout module of a model a fastdrop one, in place, and reports what it did.

    Each of torch's `Dropout`, `Dropout1d` to `Dropout3d`, `AlphaDropout` and `FeatureAlphaDropout`, timm's ``DropPath``
    and ``DropBlock2d``, torchvision's ``StochasticDepth``, ``DropBlock2d`` and ``DropBlock3d``, and any class whose
    forward is that of ``DropPath``, as those of transformers, at any depth and the model itself included, becomes the
    module of `fastdrop.torch` for it: the same object with the same p, training state and hooks, whoever refers to it,
    listed once.

    All else that drops is left and listed with the reason and, where there is one, with what reaches it: attention and
    recurrent layers; modules of which only ``p`` is read, to be given to attention; functions such as
    ``F.dropout(x, self.p, self.training)`` in the forward of a module. Who calls what is read off the source of the
    forwards. Where that can't tell whether a module is called, the module is changed, and its row says so. A forward
    that has no source, and of which nothing else is known, has a row that says it.

    Parameters
    ----------
    model : Module
    store : {"bits", "seed"}
        As in `fastdrop.torch.dropout`; ValueError for any other.

    Returns
    -------
    Report
        Prints as a table: module path, before, after or why left. Equal rows of numbered modules are one line.

    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1))
    >>> print(fdt.convert(model))
    module  before                         after
    1       Dropout(p=0.1, inplace=False)  Dropout(p=0.1, inplace=False, store='bits')
    """
    checks.choice("store", store, checks.STORES)
    rows = []
    owners = Owners(model)
    routed: set[int] = set()  # attention in layers that `fuse` has changed, which drops by ours
    for path, module in model.named_modules():
        routed.update(id(getattr(module, name)) for name in getattr(type(module), "ATTENTIONS", ()))
        become = class_for(module)
        before = repr(module) if become or isinstance(module, (TorchDropout, Rated)) else type(module).__name__
        reason = "" if id(module) in routed else why_lent(owners, module) or why_left(module)
        if become is not None and not reason:
            setattr(module, BEFORE, type(module))
            module.__class__ = become
            if hasattr(become, "store"):
                module.store = store
            rows.append(Row(path, before, repr(module), UNSEEN if owners.use_of(module) == "unknown" else ""))
        elif BEFORE in vars(module) and getattr(module, "store", store) != store:
            module.store = store
            rows.append(Row(path, before, repr(module)))
        elif reason:
            rows.append(Row(path, before, None, reason))
        rows += functional_rows(path, module, owners)
    return Report(rows)


UNSEEN = "it can't be told whether anything calls it"


def why_lent(owners: Owners, module: nn.Module) -> str:
    """Why it is of no use to change a module of which only p is read, as far as is known by all that may call it.

    Nothing for any other, for one of ours, and in doubt.
    """
    if isinstance(module, Rated) or not (class_for(module) or isinstance(module, TorchDropout)):
        return ""
    if owners.use_of(module) != "lent":
        return ""
    found = owners.borrower(module)
    if found is None:
        return "only its p is read; fdt.enable() reaches what drops with it, if that is torch's"
    owner, drop = found
    fusible = "fdt.fuse() reaches it; " if _is_fusible(owner) else ""
    return f"only its p is read, for {drop.call}({drop.name}=...); {fusible}{reached_by(owner, drop)}"


def reach(module: nn.Module) -> str:
    """What makes a module that drops by itself drop by fastdrop, in words."""
    if isinstance(module, Rated):
        return "it is fastdrop's as it is"
    theirs = type(module)
    if class_for(module) is not None and not why_left(module):
        named = theirs in CLASSES or (theirs.__module__, theirs.__qualname__) in FOREIGN
        return "fdt.convert or fdt.enable reaches it" if named else "fdt.convert reaches it"
    if isinstance(module, torch.jit.ScriptModule):
        return "fdt.enable reaches it"
    if isinstance(module, TorchDropout):
        return "fdt.enable reaches it if it calls torch's dropout"
    return "nothing of fastdrop reaches it"


def _is_fusible(owner: nn.Module) -> bool:
    from .fuse.rules import change  # both import what imports this
    from .fuse.transformers_layers import known_class

    known = known_class(type(owner))
    return known is not None and not (change(owner, known) or known.refusal(owner))


def functional_rows(path: str, module: nn.Module, owners: Owners | None = None) -> list[Row]:
    """What drops in a module's own forward: torch's functions, and random numbers of its own.

    With owners, without the calls whose rate is that of a module that is lent to them: its own row tells of them.
    """
    rows = []
    for drop in functional_drops(module):
        if owners is None or not any(why_lent(owners, lender) for lender in lenders(module, drop)):
            before = f"{drop.call}({drop.name}={rate_text(module, drop)})"
            rows.append(Row(path, before, None, f"a function, called in {drop.place}; {reached_by(module, drop)}"))
    known: Any = class_for(module) or why_left(module)
    if not known and (name := scripted_drop(module)):
        rows.append(Row(path, type(module).__name__, None, f"scripted, calls {name}; {ENABLE}"))
    if not rows and not known and (name := own_random(module)):
        before = class_name(type(module), "Dropout", *(cls.__name__ for cls in CLASSES))
        rows.append(Row(path, before, None, f"its forward drops by {name}; nothing of fastdrop reaches it"))
    if not rows and not known and is_unreadable(module):
        reason = "its forward can't be read, it has no source; fdt.enable() reaches it if it calls torch's dropout"
        rows.append(Row(path, class_name(type(module)), None, reason))
    return rows


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
    if class_for(module):
        if "forward" in vars(module):
            return "its forward was replaced on the object itself"
        return refusal(module)
    if isinstance(module, TorchDropout):
        theirs = next(cls for cls in type(module).__mro__ if cls.__module__ == nn.Dropout.__module__)
        named = f"{class_name(type(module), theirs)}, " if type(module).__name__ == theirs.__name__ else ""
        return f"{named}a subclass of nn.{theirs.__name__}; its forward may be its own"
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0.0:
        return "drops attention weights inside torch's attention; use fdt.enable()"
    if isinstance(module, nn.RNNBase) and module.dropout > 0.0 and module.num_layers > 1:
        return "drops between layers inside torch; use fdt.enable()"
    if rate_name(module) is None:
        return ""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted; fdt.enable() reaches it"
    return f"its forward {_drops_by(module)}; nothing of fastdrop reaches it"


def _drops_by(module: nn.Module) -> str:
    name = own_random(module)
    return f"drops by {name}" if name else "is not a known one"

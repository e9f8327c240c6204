"""`convert` makes the dropout modules of a model fastdrop's; `revert` undoes it.

A converted module stays the same object; only its class changes. So its hooks, its mode and its p stay, and every
reference to it still holds.
"""

from __future__ import annotations

from torch import nn

from ...core import checks
from ..nn.base import OWN_SOURCE, RATE_TENSOR, Rated
from ..runtime.dispatch.modules import TorchDropout
from .classes import class_for
from .reasons import functional_rows, why_left, why_lent
from .report import Report, Row, describe
from .source.owners import Owners

__all__ = ["convert", "revert"]

BEFORE = "_fastdrop_before"  # on a converted module: the class it had
UNSEEN = "it can't be told whether anything calls it"


def convert(model: nn.Module, *, store: str = "bits") -> Report:
    """Makes every dropout module of a model a fastdrop one, in place, and reports what it did.

    These modules become the module of `fastdrop.torch` for them, at any depth, the model itself included:

    * torch's `Dropout`, `Dropout1d` to `Dropout3d`, `AlphaDropout` and `FeatureAlphaDropout`
    * timm's ``DropPath`` and ``DropBlock2d``
    * torchvision's ``StochasticDepth``, ``DropBlock2d`` and ``DropBlock3d``
    * any class whose forward computes the same as ``DropPath``, such as those in transformers

    Each stays the same object with the same p, mode and hooks, and is listed once.

    Everything else that drops is left. The report gives the reason and says which function of fastdrop reaches it:
    attention and recurrent layers; modules whose ``p`` is only read, to be given to attention; functions such as
    ``F.dropout(x, self.p, self.training)`` in the forward of a module. The source of the forwards tells which modules
    are called. If it can't tell that of a dropout module, the module is changed, and its row says so. A module whose
    forward has no source is listed too, unless something else is known of it.

    Parameters
    ----------
    model : Module
    store : {"bits", "seed"}
        As in `fastdrop.torch.dropout`.

    Returns
    -------
    Report
        Prints as a table: the path of each module, what it was, and what it is now or why it was left. Equal rows of
        numbered modules are one line.

    Raises
    ------
    ValueError
        For another store.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1))
    >>> print(fdt.convert(model))
    module  before                         after
    1       Dropout(p=0.1, inplace=False)  Dropout(p=0.1, inplace=False, store='bits')
    """
    checks.choice("store", store, checks.STORES)
    rows = []
    owners = Owners(model)
    routed: set[int] = set()  # attention in layers that `fuse` has changed drops by fastdrop already
    for path, module in model.named_modules():
        routed.update(id(getattr(module, name)) for name in getattr(type(module), "ATTENTIONS", ()))
        become = class_for(module)
        before = describe(module) if become or isinstance(module, (TorchDropout, Rated)) else type(module).__name__
        reason = "" if id(module) in routed else why_lent(owners, module) or why_left(module)
        if become is not None and not reason:
            setattr(module, BEFORE, type(module))
            module.__class__ = become
            if hasattr(become, "store"):
                module.store = store
            rows.append(Row(path, before, describe(module), UNSEEN if owners.use_of(module) == "unknown" else ""))
        elif BEFORE in vars(module) and getattr(module, "store", store) != store:
            module.store = store
            rows.append(Row(path, before, describe(module)))
        elif reason:
            rows.append(Row(path, before, None, reason))
        rows += functional_rows(path, module, owners)
    return Report(rows)


def revert(model: nn.Module) -> Report:
    """Undoes `convert`: every module it changed has its old class again. Modules built as ours stay ours.

    Parameters
    ----------
    model : Module

    Returns
    -------
    Report
        Prints as a table: the path of each module, what it was, and what it is now.

    Examples
    --------
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
            before = describe(module)
            module.__class__ = original
            for name in (BEFORE, "store", RATE_TENSOR, OWN_SOURCE):
                module.__dict__.pop(name, None)
            rows.append(Row(path, before, describe(module)))
    return Report(rows)

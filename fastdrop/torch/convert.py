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
from .modules import Dropout

__all__ = ["Report", "convert", "revert"]

BEFORE = "_fastdrop_before"  # on a converted module: the class it had
CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Dropout: Dropout}


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

    Each `torch.nn.Dropout`, at any depth and the model itself included, becomes a `fastdrop.torch.Dropout`: the same
    object with the same p, training state and hooks, whoever refers to it, listed once. What drops by other means is
    left and listed with the reason; where that names `enable`, it is reached so.

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
    for path, module in model.named_modules():
        before = repr(module) if isinstance(module, _DropoutNd) else type(module).__name__
        ours = CLASSES.get(type(module))
        if ours is not None and "forward" not in vars(module):
            setattr(module, BEFORE, type(module))
            module.__class__ = ours
            module.store = store
            rows.append(Row(path, before, repr(module)))
        elif BEFORE in vars(module) and module.store != store:
            module.store = store
            rows.append(Row(path, before, repr(module)))
        elif reason := _why_left(module):
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
            del module.__dict__[BEFORE], module.__dict__["store"]
            rows.append(Row(path, before, repr(module)))
    return Report(rows)


def _why_left(module: nn.Module) -> str:
    """Why a module that draws dropout is not changed; nothing for one that draws none or is ours already."""
    if isinstance(module, Dropout):
        return ""
    if type(module) in CLASSES:
        return "its forward was replaced on the object itself"
    if isinstance(module, nn.Dropout):
        return "a subclass of nn.Dropout; its forward may be its own"
    if isinstance(module, _DropoutNd):
        return "no fastdrop module of this kind yet"
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0.0:
        return "drops attention weights inside torch's attention; use fdt.enable()"
    if isinstance(module, nn.RNNBase) and module.dropout > 0.0 and module.num_layers > 1:
        return "drops between layers inside torch; use fdt.enable()"
    return ""

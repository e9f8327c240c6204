"""Why a module that drops is left as it is, and which function of fastdrop reaches it instead.

`convert` and `fuse` put these sentences into the rows of their reports, and `audit` the rows about functions. An
example: "drops between layers inside torch; use fdt.enable()".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn.base import Rated
from ..runtime.dispatch.modules import TorchDropout
from .classes import TORCH_CLASSES, class_for, is_listed, unsupported_option
from .fuse.rules import changed_code
from .fuse.transformers_layers import fused_class
from .rates import rate_name
from .report import Row, class_name
from .source.calls import ENABLE
from .source.forward import (
    functional_drops,
    is_unreadable,
    lenders,
    own_random,
    rate_text,
    reached_by,
    scripted_drop,
)
from .source.owners import Owners

UNREACHED = "nothing of fastdrop reaches it; use a function or module of fastdrop.torch in its place"

__all__ = ["functional_rows", "reach", "why_left", "why_lent"]


def why_left(module: nn.Module) -> str:
    """Why `convert` leaves a module that drops; "" if it can change it, if it is fastdrop's, or if it drops nothing."""
    if isinstance(module, Rated):
        return ""
    if class_for(module):
        if "forward" in vars(module):
            return "its forward was replaced on the object itself"
        return unsupported_option(module)
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
    return f"its forward {_drops_by(module)}; {UNREACHED}"


def _drops_by(module: nn.Module) -> str:
    name = own_random(module)
    return f"drops by {name}" if name else "is not a known one"


def why_lent(owners: Owners, module: nn.Module) -> str:
    """Why it is of no use to change a module whose ``p`` is read and which nothing calls; "" for any other.

    It is "" too if the module is fastdrop's, or if the source doesn't tell whether anything calls it.
    """
    if isinstance(module, Rated) or not (class_for(module) or isinstance(module, TorchDropout)):
        return ""
    if owners.use_of(module) != "lent":
        return ""
    found = owners.borrower(module)
    if found is None:
        return "only its p is read; fdt.enable() reaches the function that drops with it, if that is torch's"
    owner, drop = found
    fusible = "fdt.fuse() reaches it; " if _is_fusible(owner) else ""
    return f"only its p is read, for {drop.call}({drop.name}=...); {fusible}{reached_by(owner, drop)}"


def reach(module: nn.Module) -> str:
    """Which function of fastdrop makes a module that drops draw by fastdrop."""
    if isinstance(module, Rated):
        return "it is fastdrop's as it is"
    if class_for(module) is not None and not why_left(module):
        return "fdt.convert or fdt.enable reaches it" if is_listed(module) else "fdt.convert reaches it"
    if isinstance(module, torch.jit.ScriptModule):
        return "fdt.enable reaches it"
    if isinstance(module, TorchDropout):
        return "fdt.enable reaches it if it calls torch's dropout"
    return "nothing of fastdrop reaches it"


def _is_fusible(owner: nn.Module) -> bool:
    known = fused_class(type(owner))
    return known is not None and not (changed_code(owner, known) or known.obstacle(owner))


def functional_rows(path: str, module: nn.Module, owners: Owners | None = None) -> list[Row]:
    """A row for each function that drops in a module's own forward, and for random numbers that it draws itself.

    With ``owners``, calls whose rate is lent by a dropout module are left out, because that module's row names them.
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
        before = class_name(type(module), "Dropout", *(cls.__name__ for cls in TORCH_CLASSES))
        rows.append(Row(path, before, None, f"its forward drops by {name}; {UNREACHED}"))
    if not rows and not known and is_unreadable(module):
        reason = "its forward can't be read, it has no source; fdt.enable() reaches it if it calls torch's dropout"
        rows.append(Row(path, class_name(type(module)), None, reason))
    return rows

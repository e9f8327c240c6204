"""Which dropout modules of a model are called, and which only lend their ``p`` to a function.

BERT's attention has a module ``self.dropout`` and calls ``attention(q, k, v, dropout_p=self.dropout.p)``: converting
that module changes nothing. `convert` and `fuse` ask `Owners.use_of` before they change a dropout module.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from ...runtime.dispatch.modules import forward_hooks_of
from .attributes import CONTAINERS, children_of, guards_hold, modules_at, modules_in, values_at
from .calls import Drop
from .forward import has_library_forward, lenders, other_methods, uses_of
from .functions import package_of
from .reader import Uses

__all__ = ["Owners"]

LISTS = (nn.ModuleList, nn.ModuleDict)  # which have no forward
KNOWN_HOOKS = ("torch", "fastdrop", "transformers")  # packages whose hooks call no modules


class Owners:
    """What the modules of a model do with the dropout modules inside them."""

    def __init__(self, model: nn.Module) -> None:
        # By module: "called", "p" (only read), "other", "unknown", "unseen" (its owner does not use it), and "open" for
        # children of the model itself, which code outside may call.
        self._uses: dict[int, set[str]] = defaultdict(set)
        self._drops: dict[int, tuple[nn.Module, Drop]] = {}
        for owner in model.modules():
            if any(package_of(hook) not in KNOWN_HOOKS for hook in forward_hooks_of(owner)):
                self._note([*owner.modules()][1:], "other")
            if has_library_forward(owner):
                if not isinstance(owner, LISTS):
                    self._note(owner.children(), "called")
                continue
            uses = uses_of(owner)
            if not uses.readable or uses.asks_by_name:
                self._note(owner.children(), "unknown")
            self._note_uses(owner, uses)
            unseen = {id(child) for child in owner.children()} - self._uses.keys()
            self._note((child for child in owner.children() if id(child) in unseen), "unseen")
            for drop, guards in uses.drops:
                if guards_hold(owner, guards):
                    self._drops.update((id(lender), (owner, drop)) for lender in lenders(owner, drop))
        self._note(model.children(), "open")
        self._note_other_methods(model)

    def use_of(self, module: nn.Module) -> str:
        """What is done with a dropout module: "called", "lent" or "unknown".

        It is "called" also if no owner is seen. It is "lent" if all that may call it read its ``p`` instead. It is
        "unknown" if its owner has hooks, if it is handed to a function that isn't read, or if code outside may hold it.
        """
        uses = self._uses[id(module)]
        if "called" in uses or uses <= {"open"}:
            return "called"
        return "lent" if uses <= {"p", "unseen"} and "p" in uses else "unknown"

    def borrower(self, module: nn.Module) -> tuple[nn.Module, Drop] | None:
        """The owner of a lent module and the call that takes its ``p``; None if that call isn't seen."""
        return self._drops.get(id(module))

    def _note(self, modules: Iterable[nn.Module], use: str) -> None:
        for module in modules:
            self._uses[id(module)].add(use)

    def _note_uses(self, owner: nn.Module, uses: Uses) -> None:
        for chain, kind, guards in uses.uses:
            if not guards_hold(owner, guards):
                continue
            modules = modules_at(owner, chain)
            self._note(modules, kind)
            if kind == "other":  # a list that is handed on, with all that it holds
                self._note(children_of(module for module in modules if isinstance(module, LISTS)), kind)
            if kind != "p" and chain[0] in vars(owner):
                values = [vars(owner)[chain[0]], *values_at(owner, chain)]
                inside = modules_in(value for value in values if callable(value) or isinstance(value, CONTAINERS))
                self._note([*inside, *children_of(inside)], "other")

    def _note_other_methods(self, model: nn.Module) -> None:
        """Methods besides the forward may be called from anywhere, and may call modules that seem to be only lent."""
        paths = [path for path, m in model.named_modules(remove_duplicate=False) if self.use_of(m) == "lent"]
        names = {next((name for name in reversed(path.split(".")) if not name.isdigit()), "") for path in paths}
        owners = [owner for owner in model.modules() if names and not has_library_forward(owner)]
        read: dict[type, list[Uses]] = {}
        for owner in owners:
            if type(owner) not in read:
                read[type(owner)] = other_methods(type(owner), uses_of(owner), names)
            for uses in read[type(owner)]:
                self._note_uses(owner, Uses(uses=[use._replace(kind="other") for use in uses.uses if use.kind != "p"]))

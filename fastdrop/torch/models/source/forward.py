"""What the forward of a module does with dropout, for the reports of `convert`, `fuse`, `audit` and the scheduler.

`functional_drops` is the main question: which functions that drop does a module call? The answer for a module with
``F.dropout(x, self.p, self.training)`` in its forward is one `Drop`, whose rate is the module's attribute ``p``.
"""

from __future__ import annotations

import inspect
import itertools
import re
import types
from typing import Any

import torch
from torch import nn

from .attributes import attribute, guards_hold, modules_at, values_at
from .calls import ENABLE, ENABLE_CPU, Drop
from .functions import LIBRARIES, definition, names_in, package_of, python_function, remembered, unwrap
from .reader import Uses, read_function

__all__ = [
    "functional_drops",
    "has_library_forward",
    "is_unreadable",
    "lenders",
    "other_methods",
    "own_random",
    "rate_text",
    "reached_by",
    "scripted_drop",
    "uses_of",
]

SCRIPTED = re.compile(r"(?:name=\"|aten::)(\w*dropout\w*|scaled_dot_product_attention)\b")


def functional_drops(module: nn.Module) -> list[Drop]:
    """The functions that drop which a module's forward calls, each once.

    Classes of torch and fastdrop have none. A class that inherits the forward of one of these has those in the methods
    that it overrides.
    """
    uses = uses_of(module) if not has_library_forward(module) else _overriding_methods(type(module))
    drops = [drop for drop, guards in uses.drops if guards_hold(module, guards)]
    for drop_if_held, chain, guards in uses.held:
        if guards_hold(module, guards):
            drops += filter(None, map(drop_if_held, values_at(module, chain) or [None]))
    return list({(drop.call, drop.name, rate_text(module, drop)): drop for drop in drops}.values())


def is_unreadable(module: nn.Module) -> bool:
    """Whether a module has a forward, neither torch's nor fastdrop's, without source."""
    function = python_function(_forward_of(module))
    return not has_library_forward(module) and (function is None or definition(function.__code__) is None)


def scripted_drop(module: nn.Module) -> str:
    """The name of a function that drops in the graph of a scripted module; "" if there is none."""
    if not isinstance(module, torch.jit.ScriptModule):
        return ""
    try:
        graph = str(module.graph)
    except Exception:  # it has no forward
        return ""
    found = SCRIPTED.search(graph)
    return found[1] if found else ""


def rate_text(module: nn.Module, drop: Drop) -> str:
    """The rate of a call as a number if it is known, else as the source writes it."""
    value = drop.value if drop.chain is None else attribute(module, drop.chain)
    return f"{value:g}" if isinstance(value, int | float) else drop.text


def reached_by(module: nn.Module, drop: Drop) -> str:
    """Which function of fastdrop makes a call draw by fastdrop, for a report."""
    if drop.reach:
        return drop.reach
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation in ("eager", "sdpa"):
        return ENABLE if implementation == "eager" else ENABLE_CPU
    if isinstance(implementation, str):
        return f"nothing reaches it: {implementation!r} attention drops in kernels of its own"
    return f"{ENABLE} if it calls torch's dropout or attention"


def own_random(module: nn.Module) -> str:
    """The random function by which a module drops, if it does so without torch's dropout functions; else "".

    A module counts as one that drops if it draws random numbers in a function that takes ``training``, or if it draws
    any, reads ``self.training`` and has neither parameters nor children.
    """
    if has_library_forward(module):
        return ""
    uses = uses_of(module)
    is_bare = next(module.parameters(), None) is None and next(module.children(), None) is None
    reads_mode = any(use.chain == ("training",) for use in uses.uses)
    return next((name for name, takes_training in uses.draws if takes_training or (is_bare and reads_mode)), "")


def lenders(owner: nn.Module, drop: Drop) -> list[nn.Module]:
    """The modules whose ``p`` is the rate of a call that their owner makes; mostly none."""
    return modules_at(owner, drop.chain[:-1]) if drop.chain and drop.chain[-1] == "p" else []


# ---- reading classes, each once ----


def _forward_of(module: nn.Module) -> Any:
    return vars(module).get("forward", getattr(type(module), "forward", None))


def has_library_forward(module: nn.Module) -> bool:
    """Whether the forward is torch's or fastdrop's, or scripted. Such a forward is not read."""
    return isinstance(module, torch.jit.ScriptModule) or package_of(_forward_of(module)) in LIBRARIES


def uses_of(module: nn.Module) -> Uses:
    """What the module's forward does. It is read once for each class."""
    cls = type(module)
    if "forward" in vars(module):
        forward = vars(module)["forward"]
        return read_function(forward, cls, getattr(unwrap(forward), "__self__", None) is module)
    return _uses_of_class(cls)


@remembered
def _uses_of_class(cls: type) -> Uses:
    forward = inspect.getattr_static(cls, "forward", None)
    return read_function(forward, cls, not isinstance(forward, staticmethod))


@remembered
def _overriding_methods(cls: type) -> Uses:
    """What the methods of a class do that override methods of a class of torch or fastdrop."""
    uses = Uses()
    own = list(itertools.takewhile(lambda base: package_of(base) not in LIBRARIES, cls.__mro__))
    library_class = cls.__mro__[len(own)]
    for name, method in ((name, method) for base in own for name, method in vars(base).items()):
        if isinstance(method, types.FunctionType) and name != "__init__" and name in dir(library_class):
            part = read_function(method, cls, True)
            uses.drops += part.drops
            uses.held += part.held
    return uses


def other_methods(cls: type, uses: Uses, names: set[str]) -> list[Uses]:
    """What the methods of a class do that name one of ``names`` and were not read with the forward."""
    found = []
    for base in cls.__mro__:
        if package_of(base) in LIBRARIES:
            continue
        for name, method in vars(base).items():
            function = python_function(method.fget if isinstance(method, property) else method)
            if function is None or name in ("__init__", "extra_repr") or function.__code__ in uses.followed:
                continue
            if names & names_in(function.__code__):
                found.append(read_function(function, cls, not isinstance(method, staticmethod)))
    return found

"""Names of dropouts in compiled code: which named module each draw of a graph comes from.

A graph has no modules any more, and hooks of modules are not called by it. But while AOTAutograd traces a call, torch
tells the ids of the modules that the call came from. So a traced draw gets its module's key, and its place among the
draws of one call of the module, as constants of the graph. They are the same on all processes.

A module whose forward begins a graph is not among these ids. Its hooks are called, because Dynamo compiles its forward
alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from .dispatch.compilers import constant_in_graphs, modules_being_traced

__all__ = ["NOT_TRACED", "OF_NO_MODEL", "OF_SOME_CALL", "forget", "guard_by", "key_of_draw", "module_of", "register"]

# In place of a key: the graph has not been traced yet; no module around the call has a name; the innermost call that
# runs counts, because the graph knows of no module around.
NOT_TRACED, OF_NO_MODEL, OF_SOME_CALL = "not traced", "", "?"

_by_key: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_by_id: dict[str, tuple[weakref.ref[nn.Module], str]] = {}  # the key, by the module's id
_orders: weakref.WeakKeyDictionary[Any, dict[tuple[str, str], int]] = weakref.WeakKeyDictionary()  # by tracer


def register(key: str, named: Any, module: nn.Module) -> None:
    _by_key[key] = named
    own = str(id(module))
    _by_id[own] = weakref.ref(module, lambda _: _by_id.pop(own, None)), key


def forget(number: int) -> None:
    """Takes away the keys of a model."""
    for key in list(_by_key):
        if key.startswith(f"{number}: "):
            _by_key.pop(key, None)


def module_of(key: str) -> Any:
    """What was registered under a key, while it lives."""
    return _by_key.get(key)


@constant_in_graphs
def guard_by(key: str) -> int:
    """What hooks call while Dynamo looks into them: the graph is for a module of this key only."""
    return len(key)


def key_of_draw(tracer: Any) -> tuple[str, int]:
    """The key for the draw that is being traced, and its place among those of one call of its module, from 1 on."""
    around = modules_being_traced()
    call, key = next(_named(around), ("", None))
    if key is None:
        return (OF_NO_MODEL if around else OF_SOME_CALL), 0
    orders = _orders.setdefault(tracer, {})
    orders[key, call] = order = orders.get((key, call), 0) + 1
    return key, order


def _named(around: list[str]) -> Iterator[tuple[str, str]]:
    """(the call's number, key) of the named modules around, innermost first."""
    for entry in reversed(around):
        own, _, call = entry.partition("@")
        reference, key = _by_id.get(own, (None, ""))
        if reference is not None and reference() is not None and key in _by_key:
            yield call, key

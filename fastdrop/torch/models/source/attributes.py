"""Attributes that a forward uses, looked up on a module.

`reader` writes down where a forward goes as chains of attribute names, such as ``("layers", "*", "dropout")`` for
``for layer in self.layers: layer.dropout(x)``. `forward` and `owners` look the chains up on the modules of a model.
"""

from __future__ import annotations

import itertools
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .functions import cell_contents

__all__ = [
    "CONTAINERS",
    "Chain",
    "Guards",
    "attribute",
    "children_of",
    "guards_hold",
    "modules_at",
    "modules_in",
    "values_at",
]

Chain = tuple[str, ...]  # attributes, from self on; "*" is any item of a container
Guards = tuple[tuple[Chain, bool], ...]  # the attributes that decide whether a branch runs, and what each must be

CONTAINERS = (list, tuple, dict, set)
MOST_VALUES = 2000  # that `modules_in` looks at


def attribute(value: Any, chain: Chain) -> Any:
    """An attribute of an attribute and so on; None if there is none. Properties may run, and raise what they like."""
    for name in chain:
        try:
            value = getattr(value, name, None)
        except Exception:
            return None
    return value


def guards_hold(module: nn.Module, guards: Guards) -> bool:
    """Whether a branch can run: it can't if an attribute that guards it is the other bool. Any mode is possible."""
    return all(chain == ("training",) or attribute(module, chain) is not (not truth) for chain, truth in guards)


def modules_at(owner: nn.Module, chain: Chain) -> list[nn.Module]:
    return [item for item in values_at(owner, chain) if isinstance(item, nn.Module)]


def values_at(owner: nn.Module, chain: Chain) -> list[Any]:
    found: list[Any] = [owner] if chain else []
    for name in chain:
        if name == "*":
            found = [part for item in found for part in _items(item)]
        else:
            found = [attribute(item, (name,)) for item in found if not isinstance(item, (torch.Tensor, *CONTAINERS))]
    return found


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, nn.Module):
        return value.children()
    return value.values() if isinstance(value, dict) else value if isinstance(value, CONTAINERS) else ()


def children_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [child for module in modules for child in module.children()]


def modules_in(values: Iterable[Any]) -> list[nn.Module]:
    """The modules in containers, and those that functions hold: bound to, given by `functools.partial`, closed over."""
    found, seen, ahead = [], dict[int, Any](), deque(values)
    while ahead and len(seen) < MOST_VALUES:
        value = ahead.popleft()
        if id(value) in seen or isinstance(value, torch.Tensor | type | types.ModuleType | str | int | float):
            continue
        seen[id(value)] = value  # kept, so that no other value gets its id
        if isinstance(value, nn.Module):
            found.append(value)
            continue
        ahead += itertools.islice(_items(value), MOST_VALUES)
        ahead += _items(attribute(value, ("__dict__",)))
        ahead += [attribute(value, (name,)) for name in ("__self__", "func", "args", "keywords", "__defaults__")]
        ahead += [part for cell in attribute(value, ("__closure__",)) or () for part in cell_contents(cell)]
    return found

"""Recognises stochastic depth by what a forward computes, whatever the class is called.

transformers has a class for it in each model's file. `convert` changes those that compute exactly one of the functions
below, and the scheduler and `audit` take ``drop_prob`` for their rate.
"""

from __future__ import annotations

import ast
import functools
import re
import types

import torch

from .source.functions import definition, global_value, python_function, remembered

__all__ = ["is_drop_path"]

# The forwards of `DropPath` modules in transformers, and in timm before and after ``scale_by_keep`` came. The
# comparison ignores names, annotations and docstrings. The rate is the attribute ``drop_prob``.
DROP_PATHS = """
def forward(self, x):
    if self.drop_prob == 0.0 or not self.training:
        return x
    keep_prob = 1 - self.drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = torch.rand(shape, dtype=x.dtype, device=x.device)
    random_tensor = torch.floor(random_tensor + keep_prob)
    return x.div(keep_prob) * random_tensor
"""
CALLS_DROP_PATH = """
def forward(self, x):
    return drop_path(x, self.drop_prob, self.training)
"""
DROP_PATH_FUNCTIONS = """
def drop_path(x, drop_prob, training):
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = keep_prob + torch.rand(shape, dtype=x.dtype, device=x.device)
    random_tensor.floor_()
    output = x.div(keep_prob) * random_tensor
    return output

def drop_path(x, drop_prob, training):
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
    return x * random_tensor.div_(keep_prob)
"""


@remembered
def is_drop_path(cls: type) -> bool:
    """Whether a class's forward drops whole samples with the rate ``drop_prob`` and scales the others by 1 / (1 - p).

    It must be one of the forwards above, whatever names it uses.
    """
    forward = python_function(getattr(cls, "forward", None))
    return forward is not None and _is_drop_path(forward)


def _is_drop_path(forward: types.FunctionType) -> bool:
    tree = definition(forward.__code__)
    if tree is None:
        return False
    if _normalise(tree) in _known_functions(DROP_PATHS):
        return global_value(forward, "torch") is torch
    call = getattr(_without_docstring(tree)[-1], "value", None)
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return False
    function = python_function(global_value(forward, call.func.id))
    if _normalise(tree, {call.func.id: "drop_path"}) not in _known_functions(CALLS_DROP_PATH) or function is None:
        return False
    inner = definition(function.__code__)
    rand = global_value(function, "torch") in (torch, None)
    return rand and inner is not None and _normalise(inner) in _known_functions(DROP_PATH_FUNCTIONS)


@functools.cache
def _known_functions(sources: str) -> frozenset[str]:
    return frozenset(_normalise(tree) for tree in ast.parse(sources).body if isinstance(tree, ast.FunctionDef))


def _without_docstring(tree: ast.FunctionDef) -> list[ast.stmt]:
    return tree.body[ast.get_docstring(tree) is not None :] or tree.body


def _normalise(tree: ast.FunctionDef, names: dict[str, str] | None = None) -> str:
    """The body of a function as text, with its own names numbered in their order and without annotations."""
    own = {argument.arg: f"_{i}" for i, argument in enumerate(tree.args.args)} | (names or {})
    lines = []
    for statement in _without_docstring(tree):
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            statement = ast.Assign([statement.target], statement.value)
        lines.append(ast.dump(statement))
    text = "\n".join(lines)
    for name in re.findall(r"Name\(id='(\w+)', ctx=Store", text):
        own.setdefault(name, f"_{len(own)}")
    return re.sub(r"(?<=Name\(id=')\w+", lambda found: own.get(found[0], found[0]), text)

"""Stochastic depth by whatever name, recognised by what its forward computes."""

from __future__ import annotations

import ast
import functools
import types
import weakref
from typing import Any

import torch
from torch import nn

from .source import _global, _python_function, _tree

__all__ = ["is_drop_path"]

# What forwards of `DropPath` modules compute, as written by transformers and by timm before and after they had
# ``scale_by_keep``. Compared without names, annotations and docstrings; the rate is the attribute ``drop_prob``.
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

# By class, with the code of the forward at that time: a class may be given another one.
_drop_paths: weakref.WeakKeyDictionary[type, tuple[Any, bool]] = weakref.WeakKeyDictionary()


def is_drop_path(kind: type[nn.Module]) -> bool:
    """Whether a class's forward is stochastic depth by sample with the rate ``drop_prob``, scaled by what is kept.

    It is if its code is one of those in `DROP_PATHS`, whatever names it uses.
    """
    forward = _python_function(getattr(kind, "forward", None))
    code = getattr(forward, "__code__", None)
    if kind not in _drop_paths or _drop_paths[kind][0] is not code:
        _drop_paths[kind] = code, forward is not None and _is_drop_path(forward)
    return _drop_paths[kind][1]


def _is_drop_path(forward: types.FunctionType) -> bool:
    tree = _tree(forward.__code__)
    if tree is None:
        return False
    if _normalised(tree) in _known(DROP_PATHS):
        return _global(forward, "torch") is torch
    call = getattr(_without_docstring(tree)[-1], "value", None)
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return False
    function = _python_function(_global(forward, call.func.id))
    if _normalised(tree, {call.func.id: "drop_path"}) not in _known(CALLS_DROP_PATH) or function is None:
        return False
    inner = _tree(function.__code__)
    rand = _global(function, "torch") in (torch, None)
    return rand and inner is not None and _normalised(inner) in _known(DROP_PATH_FUNCTIONS)


@functools.cache
def _known(sources: str) -> frozenset[str]:
    return frozenset(_normalised(tree) for tree in ast.parse(sources).body if isinstance(tree, ast.FunctionDef))


def _without_docstring(tree: ast.FunctionDef) -> list[ast.stmt]:
    return tree.body[ast.get_docstring(tree) is not None :] or tree.body


def _normalised(tree: ast.FunctionDef, names: dict[str, str] | None = None) -> str:
    """The body of a function with its own names numbered in their order, without annotations."""
    own = {argument.arg: f"_{i}" for i, argument in enumerate(tree.args.args)} | (names or {})
    lines = []
    for statement in _without_docstring(tree):
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            statement = ast.Assign([statement.target], statement.value)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.setdefault(node.id, f"_{len(own)}")
        lines.append(ast.dump(_Renamed(own).visit(ast.parse(ast.unparse(ast.fix_missing_locations(statement))))))
    return "\n".join(lines)


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)

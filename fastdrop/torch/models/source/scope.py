"""What names and expressions stand for inside one function, as far as its source tells.

`reader` makes a `Scope` for each function that it reads. In ``drop = self.attn.drop; x = drop(x)`` the scope knows that
``drop`` is the attribute ``("attn", "drop")`` of the module. Arguments are looked up in the scope of the caller.
"""

from __future__ import annotations

import ast
import sys
import types
from typing import Any

from ...runtime.dispatch.ops import OpOverloadPacket
from .attributes import Chain
from .functions import global_value

__all__ = ["NAMESPACES", "Scope", "is_zero"]

NAMESPACES = (types.ModuleType, type, OpOverloadPacket)  # whose names are taken to stand for the same at every call
DEEPEST = 8  # how many assignments and arguments an expression is followed through


def is_zero(node: ast.expr) -> bool:
    """Whether an expression is the number 0 or None, which both mean that nothing is dropped."""
    return isinstance(node, ast.Constant) and (node.value is None or node.value == 0)


class Scope:
    """The names of one function. ``given`` has, for each parameter, the argument and the scope that it is from."""

    def __init__(self, function: types.FunctionType, has_self: bool, given: dict[str, tuple[ast.expr, Scope]]) -> None:
        self.function, self.given = function, given
        self.parameters = function.__code__.co_varnames[: function.__code__.co_argcount]
        self.self_name = self.parameters[0] if has_self and self.parameters else None
        self.assigned: dict[str, ast.expr | None] = {}  # None: assigned more than once, or not known
        self.imported: dict[str, Any] = {}

    def note_assignments(self, tree: ast.FunctionDef) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                self._assign(node.targets[0], node.value)
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                self._assign(node.target, node.value)
            elif isinstance(node, ast.AugAssign):
                self._assign(node.target, None)
            elif isinstance(node, ast.For | ast.comprehension):
                self._assign_item(node.target, node.iter)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.name if alias.asname else alias.name.partition(".")[0]
                    self.imported[alias.asname or name] = sys.modules.get(name)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    found = getattr(sys.modules.get(node.module or ""), alias.name, None)
                    self.imported[alias.asname or alias.name] = found

    def _assign(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Name):
            self.assigned[target.id] = None if target.id in self.assigned else value
        elif isinstance(target, ast.Tuple | ast.List):
            parts = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
            for i, part in enumerate(target.elts):
                self._assign(part, parts[i] if parts else None)

    def _assign_item(self, target: ast.expr, of: ast.expr) -> None:
        """Notes that the variable of a loop is an item of what the loop goes over."""
        called = of.func.id if isinstance(of, ast.Call) and isinstance(of.func, ast.Name) else ""
        if isinstance(of, ast.Call) and called in ("zip", "enumerate") and isinstance(target, ast.Tuple):
            over: list[ast.expr | None] = [None, *of.args[:1]] if called == "enumerate" else list(of.args)
            for part, each in zip(target.elts, over, strict=False):
                if each is None:
                    self._assign(part, None)
                else:
                    self._assign_item(part, each)
        else:
            self._assign(target, ast.Subscript(of, ast.Constant(0), ast.Load()))

    def chain(self, node: ast.expr, steps: int = DEEPEST) -> Chain | None:
        """The attributes that lead from the module to an expression: () for the module itself, None if none do."""
        if steps == 0:
            return None
        if isinstance(node, ast.Name):
            if node.id == self.self_name and node.id not in self.assigned:
                return ()
            if self.assigned.get(node.id) is not None:
                return self.chain(self.assigned[node.id], steps - 1)  # type: ignore[arg-type]
            if node.id in self.given and node.id not in self.assigned:
                value, scope = self.given[node.id]
                return scope.chain(value, steps - 1)
            return None
        if isinstance(node, ast.Attribute | ast.Subscript):
            before = self.chain(node.value, steps - 1)
            if before is None:
                return None
            return (*before, node.attr) if isinstance(node, ast.Attribute) else (*before, "*")
        return None

    def object(self, node: ast.expr, steps: int = DEEPEST) -> Any:
        """The value of a name, or of a name in a module or class; None if it may change from call to call."""
        if steps == 0:
            return None
        if isinstance(node, ast.Name):
            if node.id in self.imported:
                return self.imported[node.id]
            value = self.assigned.get(node.id)
            if node.id in self.assigned:
                return self.object(value, steps - 1) if isinstance(value, ast.Name | ast.Attribute) else None
            if node.id in self.given:
                expression, scope = self.given[node.id]
                return scope.object(expression, steps - 1)
            if node.id in self.function.__code__.co_varnames:
                return None
            return global_value(self.function, node.id)
        if isinstance(node, ast.Attribute):
            holder = self.object(node.value, steps - 1)
            return getattr(holder, node.attr, None) if isinstance(holder, NAMESPACES) else None
        return None

    def rate(self, node: ast.expr, steps: int = DEEPEST) -> tuple[str, Chain | None, float | None]:
        """A drop probability three ways: as the source writes it, as attributes of the module, as a number."""
        if steps:
            if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
                return ast.unparse(node), None, float(node.value)
            if isinstance(node, ast.IfExp):  # 0.0 if not self.training else p
                parts = [part for part in (node.body, node.orelse) if not is_zero(part)]
                if len(parts) == 1:
                    return self.rate(parts[0], steps - 1)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "float" and len(node.args) == 1:
                return self.rate(node.args[0], steps - 1)
            chain = self.chain(node)
            if chain:
                return ast.unparse(node), chain, None
            if isinstance(node, ast.Name):
                if node.id in self.assigned:
                    value = self.assigned[node.id]
                    return (node.id, None, None) if value is None else self.rate(value, steps - 1)
                if node.id in self.given:
                    expression, scope = self.given[node.id]
                    return scope.rate(expression, steps - 1)
        return ast.unparse(node), None, None

"""What a module's class reads ``self.training`` for: for dropout alone, for something else, or for both.

`monte_carlo` asks, because it turns on modules whose forward calls dropout as a function, such as
``F.dropout(x, self.p, self.training)`` or ``dropout_p=self.p if self.training else 0.0``. A read counts as dropout's if
"drop" is in the name of the class, or in the call, the condition or the statement around the read. If no read counts
but the module calls a function that drops, the gate is `Gate.MIXED`, because the source doesn't tell.
"""

from __future__ import annotations

import ast
import enum
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from .forward import functional_drops, own_random, rate_text
from .functions import LIBRARIES, definition, names_in, package_of, python_function, remembered

__all__ = ["Gate", "gate_of"]

MODE_METHODS = ("train", "eval")

DROP, MORE, CHECKPOINT = "drop", "more", "checkpoint"
CASTS = ("bool", "float", "int")
DEEPEST_HELPER = 3  # how many calls deep helper functions are looked at
ATTENTION = ("attention", "attn")  # in the name of a function: an argument that is 0 in evaluation is its dropout


class Gate(enum.Enum):
    """What a class reads ``self.training`` for."""

    NOTHING = "not for dropout"
    DROPOUT = "for dropout alone"
    MIXED = "for dropout and more, or the source does not tell"


def gate_of(module: nn.Module) -> Gate:
    """What the methods of a module's class and of its base classes read ``self.training`` for."""
    cls = type(module)
    gate = _gate_of_class(cls)
    if gate is Gate.NOTHING and _mentions_mode(cls):
        drops_as_function = any(rate_text(module, drop) != "0" for drop in functional_drops(module))
        if drops_as_function or own_random(module):
            return Gate.MIXED
    return gate


@remembered
def _gate_of_class(cls: type) -> Gate:
    drops = [
        reads or _says_drop(base.__name__)
        for base in cls.__mro__
        for method in _methods(base)
        if "training" in names_in(method.__code__)
        for reads in _reads(method)
    ]
    return Gate.NOTHING if True not in drops else Gate.DROPOUT if all(drops) else Gate.MIXED


@remembered
def _mentions_mode(cls: type) -> bool:
    """Whether "training" is among the names and strings of a class's methods or of functions that they name."""
    return any(_mentions_training(method, DEEPEST_HELPER) for base in cls.__mro__ for method in _methods(base))


def _mentions_training(function: Any, depth: int) -> bool:
    names = names_in(function.__code__)
    if "training" in names:
        return True
    called = [function.__globals__.get(name) for name in names]
    return depth > 0 and any(
        inspect.isfunction(one) and package_of(one) not in LIBRARIES and _mentions_training(one, depth - 1)
        for one in called
    )


def _methods(cls: type) -> Iterator[types.FunctionType]:
    if package_of(cls) in LIBRARIES or not issubclass(cls, nn.Module):
        return
    for name, value in vars(cls).items():
        method = python_function(value)
        if name not in MODE_METHODS and method is not None:
            yield method


def _reads(method: types.FunctionType) -> Iterator[bool]:
    """Whether each read of ``training`` in a method is for dropout. Reads for checkpoints are passed over."""
    tree = definition(method.__code__)
    if tree is None:
        if any(_says_drop(name) for name in names_in(method.__code__)):
            yield from (True, False)  # for both, because it can't be told
        return
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    me = method.__code__.co_varnames[:1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "training" and isinstance(node.ctx, ast.Load):
            verdicts = list(_verdicts(node, parents))
            if CHECKPOINT not in verdicts:
                yield DROP in verdicts
                # Another module's mode is not turned on together with this one's, unless that module drops.
                other = not (isinstance(node.value, ast.Name) and node.value.id in me)
                if MORE in verdicts or (other and not _says_drop(ast.unparse(node.value))):
                    yield False


def _verdicts(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[str]:
    """What a read decides about: `DROP`, `MORE` or `CHECKPOINT`, from the inside out to a call or to its statement."""
    chooses_zero = False
    while node in parents:
        before, node = node, parents[node]
        if isinstance(node, ast.If | ast.While):
            yield from _verdict(node.test)
            branch = _branch_verdicts(node.body)
            if not branch and not node.orelse and isinstance(node.body[-1], ast.Return):
                branch = _branch_verdicts(_following(node, parents[node]))  # the rest of the block is the other branch
            yield from branch
        elif isinstance(node, ast.IfExp | ast.BoolOp):
            yield from _verdict(node)
            if isinstance(node, ast.IfExp):
                chooses_zero = any(isinstance(end, ast.Constant) and end.value == 0 for end in (node.body, node.orelse))
        elif isinstance(node, ast.keyword):
            yield from _verdict(node.arg or "")
        elif isinstance(node, ast.Call) and before is not node.func:
            function = ast.unparse(node.func).lower()
            if function not in CASTS:
                if chooses_zero and any(word in function for word in ATTENTION):
                    yield DROP
                yield from _verdict(function)
                return
        elif isinstance(node, ast.stmt):
            yield from _verdict(node)
        if isinstance(node, ast.stmt):
            return


def _branch_verdicts(statements: list[ast.stmt]) -> list[str]:
    """A branch that drops and does more can only be turned on as a whole."""
    said = [any(_verdict(statement)) for statement in statements]
    return [] if not any(said) else [DROP] if all(said) else [DROP, MORE]


def _following(statement: ast.stmt, block: ast.AST) -> list[ast.stmt]:
    body = getattr(block, "body", [])
    return body[body.index(statement) + 1 :] if statement in body else []


def _verdict(code: ast.AST | str) -> Iterator[str]:
    text = code if isinstance(code, str) else ast.unparse(code)
    if "checkpoint" in text.lower():
        yield CHECKPOINT
    elif _says_drop(text):
        yield DROP


def _says_drop(text: str) -> bool:
    return "drop" in text.lower()

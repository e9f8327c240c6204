"""What a module's class reads ``training`` for, found in its source.

`monte_carlo` asks, to turn on modules whose forward calls dropout as a function, such as
``F.dropout(x, self.p, self.training)`` or ``dropout_p=self.p if self.training else 0.0``. A read counts as dropout's if
the class, or the call, the condition or the statement around the read, has "drop" in one of its names. Where no read
counts, but the module drops as a function (`source` knows), whatever it reads `training` for can't be told.
"""

from __future__ import annotations

import ast
import enum
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..models.source import functional_drops, own_random, rate_text

__all__ = ["Gate", "gate_of"]

CHANGES_MODE = ("train", "eval")  # methods
FOREIGN_CLASSES = ("torch.", "fastdrop.")  # by module: those that drop are known without


DROP, MORE, CHECKPOINT = "drop", "more", "checkpoint"
CASTS = ("bool", "float", "int")
HELPERS = 3  # how many calls deep helper functions are looked at
ATTENTION = ("attention", "attn")  # functions whose argument that is 0 in evaluation is their dropout


class Gate(enum.Enum):
    """What a class reads ``training`` for."""

    NOTHING = "not for dropout"
    DROPOUT = "for dropout alone"
    MIXED = "for dropout and more, or in a way that can't be told"


_known: WeakKeyDictionary[type[nn.Module], Gate] = WeakKeyDictionary()


def gate_of(module: nn.Module) -> Gate:
    """What the methods of a module's class, and of those it derives from, read ``self.training`` for."""
    cls = type(module)
    gate = _known.get(cls)
    if gate is None:
        drops = [
            reads or _says_drop(base.__name__)
            for base in cls.__mro__
            for method in _methods(base)
            if "training" in _names(method.__code__)
            for reads in _reads(method)
        ]
        gate = Gate.NOTHING if True not in drops else Gate.DROPOUT if all(drops) else Gate.MIXED
        _known[cls] = gate
    if gate is Gate.NOTHING and _asks(cls):
        drops_as_function = any(rate_text(module, drop) != "0" for drop in functional_drops(module))
        if drops_as_function or own_random(module):
            return Gate.MIXED
    return gate


_asking: WeakKeyDictionary[type[nn.Module], bool] = WeakKeyDictionary()


def _asks(cls: type[nn.Module]) -> bool:
    """Whether the methods of a class, or functions that they name, have "training" among their names and strings."""
    if cls not in _asking:
        _asking[cls] = any(_mentions_training(method, HELPERS) for base in cls.__mro__ for method in _methods(base))
    return _asking[cls]


def _mentions_training(function: Any, depth: int) -> bool:
    names = _names(function.__code__)
    if "training" in names:
        return True
    called = [function.__globals__.get(name) for name in names]
    return depth > 0 and any(
        inspect.isfunction(one)
        and not (one.__module__ or "").startswith(FOREIGN_CLASSES)
        and _mentions_training(one, depth - 1)
        for one in called
    )


def _methods(cls: type) -> Iterator[Any]:
    if cls.__module__.startswith(FOREIGN_CLASSES) or not issubclass(cls, nn.Module):
        return
    for name, value in vars(cls).items():
        method = inspect.unwrap(value) if callable(value) else value
        code = getattr(method, "__code__", None)
        if name not in CHANGES_MODE and code is not None:
            yield method


def _names(code: Any) -> set[str]:
    """Of a function, and of those inside it, with strings that may be names."""
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    strings = [constant for constant in code.co_consts if isinstance(constant, str)]
    return {*code.co_names, *strings, *(name for one in inner for name in _names(one))}


def _reads(method: Any) -> Iterator[bool]:
    """For each read of ``training`` in a method whether it is for dropout; those for checkpoints are passed over."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        if any(_says_drop(name) for name in _names(method.__code__)):
            yield from (True, False)  # can't be told
        return
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    me = method.__code__.co_varnames[:1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "training" and isinstance(node.ctx, ast.Load):
            verdicts = list(_verdicts(node, parents))
            if CHECKPOINT not in verdicts:
                yield DROP in verdicts
                # Another module's mode is not turned on with this one's, unless it is dropout's.
                other = not (isinstance(node.value, ast.Name) and node.value.id in me)
                if MORE in verdicts or (other and not _says_drop(ast.unparse(node.value))):
                    yield False


def _verdicts(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[str]:
    """What a read decides about, from the inside out: up to a call, or else the statement it is in."""
    chooses_zero = False
    while node in parents:
        before, node = node, parents[node]
        if isinstance(node, ast.If | ast.While):
            # A branch that drops and does more can't be told apart.
            yield from _verdict(node.test)
            said = [list(_verdict(statement)) for statement in node.body]
            if any(said):
                yield DROP
                if not all(said):
                    yield MORE
            elif not node.orelse and isinstance(node.body[-1], ast.Return):  # what follows is the other branch
                said = [list(_verdict(statement)) for statement in _following(node, parents[node])]
                if any(said):
                    yield DROP
                    if not all(said):
                        yield MORE
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

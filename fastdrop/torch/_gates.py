"""What a module's class reads ``training`` for, found in its source.

`monte_carlo` asks, to turn on modules whose forward calls dropout as a function, such as
``F.dropout(x, self.p, self.training)`` or ``dropout_p=self.p if self.training else 0.0``. A read counts as dropout's if
the class, or the call, the condition or the statement around the read, has "drop" in one of its names.
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

__all__ = ["Gate", "gate_of"]

CHANGES_MODE = ("train", "eval")  # methods
FOREIGN_CLASSES = ("torch.", "fastdrop.")  # by module: those that drop are known without


DROP, MORE, CHECKPOINT = "drop", "more", "checkpoint"
CASTS = ("bool", "float", "int")
ATTENTION = ("attention", "attn")  # functions whose argument that is 0 in evaluation is their dropout


class Gate(enum.Enum):
    """What a class reads ``training`` for."""

    NOTHING = "not for dropout"
    DROPOUT = "for dropout alone"
    MIXED = "for dropout and more"


_known: WeakKeyDictionary[type[nn.Module], Gate] = WeakKeyDictionary()


def gate_of(cls: type[nn.Module]) -> Gate:
    """What the methods of a class, and of those it derives from, read ``self.training`` for."""
    gate = _known.get(cls)
    if gate is None:
        drops = [
            reads or _says_drop(base.__name__)
            for base in cls.__mro__
            for method in _methods(base)
            for reads in _reads(method)
        ]
        gate = Gate.NOTHING if True not in drops else Gate.DROPOUT if all(drops) else Gate.MIXED
        _known[cls] = gate
    return gate


def _methods(cls: type) -> Iterator[Any]:
    if cls.__module__.startswith(FOREIGN_CLASSES) or not issubclass(cls, nn.Module):
        return
    for name, value in vars(cls).items():
        method = inspect.unwrap(value) if callable(value) else value
        code = getattr(method, "__code__", None)
        if name not in CHANGES_MODE and code is not None and "training" in _names(code):
            yield method


def _names(code: Any) -> set[str]:
    """Of a function, and of those inside it."""
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    return {*code.co_names, *(name for one in inner for name in _names(one))}


def _reads(method: Any) -> Iterator[bool]:
    """For each read of ``training`` in a method whether it is for dropout; those for checkpoints are passed over."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        if any(_says_drop(name) for name in _names(method.__code__)):
            yield from (True, False)  # can't be told
        return
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "training" and isinstance(node.ctx, ast.Load):
            verdicts = list(_verdicts(node, parents))
            if CHECKPOINT not in verdicts:
                yield DROP in verdicts
                if MORE in verdicts:
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


def _verdict(code: ast.AST | str) -> Iterator[str]:
    text = code if isinstance(code, str) else ast.unparse(code)
    if "checkpoint" in text.lower():
        yield CHECKPOINT
    elif _says_drop(text):
        yield DROP


def _says_drop(text: str) -> bool:
    return "drop" in text.lower()

"""Reads the forward of a class and the functions that it calls, and writes down what they do with dropout.

`forward` and `owners` call `read_function`. It follows the class's own methods, ``super()`` and helper functions. A
branch on an attribute, such as ``if self.fused_attn:``, is written down with that condition as its guard, because the
attribute may differ from module to module. Of functions without source only the names in their bytecode are known.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ...runtime.dispatch.modules import CHILDREN, TorchDropout
from .attributes import Chain, Guards
from .calls import DROPS, ENABLE, Drop, Rate, draws_numbers, drops, reach_of
from .functions import LIBRARIES, definition, global_value, package_of, python_function
from .scope import NAMESPACES, Scope, is_zero

__all__ = ["Use", "Uses", "read_function"]

UNKNOWN_RATES = ("dropout", "dropout_p", "attn_dropout", "attention_dropout")  # keywords of functions that are unknown
CALL_NOTHING = (getattr, hasattr, id, isinstance, len, setattr, super, type, vars)  # of what they are given
DRAWING_METHODS = ("bernoulli_", "bernoulli")
DEEPEST, MOST_FUNCTIONS = 6, 400  # how many calls deep a forward is read, and how many functions in all

# Takes the function that an attribute holds, and returns the `Drop` that calling it makes.
DropIfHeld = Callable[[Any], "Drop | None"]


class Use(NamedTuple):
    """What a forward does with an attribute: "called", "p" if it reads the attribute's p, or "other"."""

    chain: Chain
    kind: str
    guards: Guards


@dataclass
class Uses:
    """All that the forward of one class does."""

    drops: list[tuple[Drop, Guards]] = field(default_factory=list)
    held: list[tuple[DropIfHeld, Chain, Guards]] = field(default_factory=list)  # calls of attributes
    uses: list[Use] = field(default_factory=list)
    draws: list[tuple[str, bool]] = field(default_factory=list)  # random functions; in a helper that takes `training`?
    readable: bool = True  # whether all of it was read
    followed: list[types.CodeType] = field(default_factory=list)  # the functions read
    asks_by_name: bool = False  # whether it gets attributes by names that it computes


def read_function(function: Any, cls: type, has_self: bool) -> Uses:
    """What a forward or another method of a class does; ``has_self`` says whether its first parameter is the module."""
    uses = Uses()
    found = python_function(function)
    try:
        if found is not None:
            Reader(Scope(found, has_self, {}), cls, uses).read()
            return uses
    except Exception:  # a report must not fail because of any source
        uses = Uses()
    uses.readable = False
    return uses


class Reader(ast.NodeVisitor):
    """Visits the source of one function, and of those that it calls, and adds what they do to ``uses``."""

    def __init__(
        self,
        scope: Scope,
        cls: type,
        uses: Uses,
        *,
        above: tuple[types.CodeType, ...] = (),
        guards: Guards = (),
        defined_in: type | None = None,
    ) -> None:
        function = scope.function
        self.scope, self.cls, self.uses, self.guards = scope, cls, uses, guards
        self.above = (*above, function.__code__)  # this function and those that call it
        uses.followed.append(function.__code__)
        self.defined_in = defined_in or next((base for base in cls.__mro__ if _defines(base, function)), cls)

    def read(self) -> None:
        tree = definition(self.scope.function.__code__)
        if tree is None:
            self._read_bytecode()
            return
        self.scope.note_assignments(tree)
        self._visit_block(tree.body)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        yes, no = self._guards_of(node.test)
        for part, guards in ((node.body, yes), (node.orelse, no)):
            before, self.guards = self.guards, (*self.guards, *guards)
            if isinstance(part, list):
                self._visit_block(part)
            else:
                self.visit(part)
            self.guards = before

    visit_IfExp = visit_If

    def _visit_block(self, statements: list[ast.stmt]) -> None:
        before = self.guards
        for statement in statements:
            self.visit(statement)
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return | ast.Raise):
                self.guards = (*self.guards, *self._guards_of(statement.test)[1])  # the rest of the block is its else
        self.guards = before

    def _guards_of(self, test: ast.expr) -> tuple[Guards, Guards]:
        """What a condition says of the module's attributes if it is true, and if it is false."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            yes, no = self._guards_of(test.operand)
            return no, yes
        if isinstance(test, ast.BoolOp):
            parts = [self._guards_of(value) for value in test.values]
            if isinstance(test.op, ast.And):
                return tuple(guard for yes, _ in parts for guard in yes), ()
            return (), tuple(guard for _, no in parts for guard in no)
        chain = self.scope.chain(test)
        return (((chain, True),), ((chain, False),)) if chain else ((), ())

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = self.scope.chain(node)
        if chain is None:
            if not self._note_mention(node):
                self.visit(node.value)
        elif len(chain) > 1 and chain[-1] == "p":
            self._use(chain[:-1], "p")
        else:
            self._use(chain, "other")
            self.uses.asks_by_name |= chain[-1] in (CHILDREN, "__dict__")
            own = inspect.getattr_static(self.cls, chain[0], None) if len(chain) == 1 else None
            if isinstance(own, property):
                own = own.fget
            if isinstance(own, types.FunctionType):  # a method that is given to another function is called there
                self._follow(own, ast.Call(node, [], []), True)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(part)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and not self._note_mention(node) and self.scope.chain(node) == ():
            self._use(("*",), "other")  # the module itself is given away

    def visit_Assign(self, node: ast.Assign) -> None:
        alias = isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Name | ast.Attribute)
        if not (alias and (drops(self.scope.object(node.value)) or self.scope.chain(node.value) == ())):
            self.generic_visit(node)

    def _note_mention(self, node: ast.Name | ast.Attribute) -> bool:
        """Notes a function that drops and is handed on instead of called. Its rate is not known."""
        function = self.scope.object(node)
        if not drops(function):
            return False
        place, reach = self.scope.function.__qualname__, reach_of(function)
        self._add(Drop(ast.unparse(node), DROPS[function][0], "?", None, None, place, reach))
        return True

    def visit_Call(self, node: ast.Call) -> None:
        if node.args and self.scope.object(node.func) is functools.partial:
            self.visit_Call(ast.Call(node.args[0], node.args[1:], node.keywords))
            return
        chain = self.scope.chain(node.func)
        if chain is not None:
            followed = self._call_of_own(chain, node)
        elif isinstance(node.func, ast.Attribute) and _is_super(node.func.value):
            mro = self.cls.__mro__
            after = mro[mro.index(self.defined_in) + 1 :] if self.defined_in in mro else ()
            holder = next((cls for cls in after if node.func.attr in vars(cls)), None)
            followed = holder is None or self._follow(vars(holder)[node.func.attr], node, True, holder)
            if not followed:
                self._use(("*",), "other")
        else:
            followed = self._call_of_function(node)
        for argument in _arguments(node):
            if not (followed and isinstance(argument, ast.Name) and self.scope.chain(argument) == ()):
                self.visit(argument)
        if chain is None and not isinstance(node.func, ast.Name) and self.scope.object(node.func) is None:
            self.visit(node.func)

    def _call_of_own(self, chain: Chain, node: ast.Call) -> bool:
        """Notes a call of an attribute. Returns whether all was read that it does with the module, if given it."""
        if len(chain) > 1 and chain[-1] in ("forward", "__call__"):
            chain = chain[:-1]
        self._use(chain, "called")
        method = None
        if len(chain) == 1:
            method = inspect.getattr_static(self.cls, chain[0], None)
            self.uses.asks_by_name |= chain[0] in ("children", "named_children", "modules", "named_modules")
        self.uses.asks_by_name |= chain[:1] == (CHILDREN,)
        if method is not None:
            return self._follow(method, node, not isinstance(method, staticmethod | classmethod))
        self.uses.held.append((functools.partial(self._drop_if_held, node, ast.unparse(node.func)), chain, self.guards))
        return self._rate_given(node) is not None

    def _drop_if_held(self, node: ast.Call, written: str, value: Any) -> Drop | None:
        """The `Drop` of a call of an attribute that holds ``value``."""
        node, function = _unpack_partial(node, value)
        if drops(function):
            return self._drop_of(node, written, DROPS[function], reach_of(function))
        return None if isinstance(value, nn.Module) else self._drop_of_unknown(node, written)

    def _call_of_function(self, node: ast.Call) -> bool:
        """Notes a call of anything else. Returns the same as `_call_of_own`."""
        node, target = _unpack_partial(node, self.scope.object(node.func))
        written = ast.unparse(node.func)
        takes_training = "training" in self.scope.parameters or "train" in self.scope.parameters
        given = any(self.scope.chain(argument) == () for argument in _arguments(node))
        if target in (getattr, vars) and node.args and self.scope.chain(node.args[0]) == ():
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant):
                self._use((str(name.value),), "other")
            else:
                self.uses.asks_by_name = True
        if isinstance(target, type):
            if issubclass(target, TorchDropout) and target.__module__ == nn.Dropout.__module__:
                self._add(self._drop_of(node, written, ("p", 0, 0.5), ENABLE))
        elif drops(target):
            self._add(self._drop_of(node, written, DROPS[target], reach_of(target)))
        elif draws_numbers(target):
            self.uses.draws.append((written, takes_training))
        elif isinstance(node.func, ast.Attribute) and node.func.attr in DRAWING_METHODS and target is None:
            self.uses.draws.append((f".{node.func.attr}", takes_training))
        elif isinstance(target, types.FunctionType):
            if package_of(target) not in LIBRARIES:
                return (given or _mentions_dropout(target.__code__)) and self._follow(target, node, False)
        elif target is None:
            self._add(self._drop_of_unknown(node, written))
            return self._rate_given(node) is not None
        return target in CALL_NOTHING

    def _use(self, chain: Chain, kind: str) -> None:
        if chain:
            self.uses.uses.append(Use(chain, kind, self.guards))

    def _follow(self, method: Any, node: ast.Call, has_self: bool, defined_in: type | None = None) -> bool:
        """Reads a function that is called. Returns whether all was read that it does with the module, if given it."""
        function = python_function(method)
        if function is None or not self._may_follow(function):
            return function is not None and function.__code__ in self.above
        code = function.__code__
        names = code.co_varnames[: code.co_argcount]
        given: dict[str, tuple[ast.expr, Scope]] = {}
        for name, default in zip(reversed(names), reversed(function.__defaults__ or ()), strict=False):
            if isinstance(default, int | float):
                given[name] = ast.Constant(default), self.scope
        for name, argument in zip(names[has_self:], node.args, strict=False):
            if isinstance(argument, ast.Starred):
                break
            given[name] = argument, self.scope
        given.update({keyword.arg: (keyword.value, self.scope) for keyword in node.keywords if keyword.arg})
        scope = Scope(function, has_self, given)
        Reader(scope, self.cls, self.uses, above=self.above, guards=self.guards, defined_in=defined_in).read()
        mine = {name for name, (value, of) in given.items() if of.chain(value) == ()}
        known = mine <= {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]} - scope.assigned.keys()
        return (
            known
            and len(mine) == [self.scope.chain(each) for each in _arguments(node)].count(())
            and definition(code) is not None
        )

    def _may_follow(self, function: types.FunctionType) -> bool:
        """Whether to read a function that is called: not if it is a caller of this one, nor if there are too many."""
        if package_of(function) == "torch" or function.__code__ in self.above:  # as `register_buffer` of nn.Module
            return False
        if len(self.above) > DEEPEST or len(self.uses.followed) > MOST_FUNCTIONS:
            self.uses.readable = False
            return False
        return True

    def _drop_of(self, node: ast.Call, written: str, rate: Rate, reach: str) -> Drop | None:
        name, position, default = rate
        argument = _argument(node, name, position)
        training = _argument(node, "training", 2) if name == "p" else None
        if argument is None and any(keyword.arg is None for keyword in node.keywords):
            text, chain, value = "**", None, None
        else:
            text, chain, value = self.scope.rate(argument or ast.Constant(default))
        never = isinstance(training, ast.Constant) and training.value is False
        if never or (value == 0.0 and (argument is None or is_zero(argument))):
            return None
        return Drop(written, name, text, chain, value, self.scope.function.__qualname__, reach)

    def _rate_given(self, node: ast.Call) -> ast.keyword | None:
        return next((keyword for keyword in node.keywords if keyword.arg in UNKNOWN_RATES), None)

    def _drop_of_unknown(self, node: ast.Call, written: str) -> Drop | None:
        """The `Drop` of a function that is known only at run time, such as transformers' attention, if given a rate."""
        keyword = self._rate_given(node)
        if keyword is None or is_zero(keyword.value):
            return None
        text, chain, value = self.scope.rate(keyword.value)
        place = self.scope.function.__qualname__
        return Drop(written, keyword.arg or "", text, chain, value, place, "") if value != 0.0 else None

    def _add(self, drop: Drop | None) -> None:
        if drop is not None:
            self.uses.drops.append((drop, self.guards))

    # ---- without source ----

    def _read_bytecode(self) -> None:
        """Looks at dotted names alone: an attribute of the module counts as called, unless its p is read."""
        chain: Chain | None = None
        value: Any = None
        written = ""
        for step in (*dis.get_instructions(self.scope.function), None):
            if step is not None and chain is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                chain, written = (*chain, step.argval), f"{written}.{step.argval}"
                continue
            if step is not None and value is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                value = getattr(value, step.argval, None) if isinstance(value, NAMESPACES) else None
                written = f"{written}.{step.argval}"
                continue
            if chain:
                lends = len(chain) > 1 and chain[-1] == "p"
                self._use(chain[:-1] if lends else chain, "p" if lends else "called")
                method = python_function(getattr(self.cls, chain[0], None)) if len(chain) == 1 else None
                if method is not None and self._may_follow(method):
                    Reader(Scope(method, True, {}), self.cls, self.uses, above=self.above).read()
            elif drops(value):
                name, reach = DROPS[value][0], reach_of(value)
                self._add(Drop(written, name, "?", None, None, self.scope.function.__qualname__, reach))
            chain, value, written = None, None, ""
            if step is not None and step.opname.startswith("LOAD_FAST") and step.argval == self.scope.self_name:
                chain = ()
            elif step is not None and step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
                value, written = global_value(self.scope.function, step.argval), step.argval


def _defines(cls: type, function: types.FunctionType) -> bool:
    own = vars(cls).get(function.__name__)
    return own is not None and python_function(own) is function


def _argument(node: ast.Call, name: str, position: int) -> ast.expr | None:
    for keyword in node.keywords:
        if keyword.arg == name:
            return keyword.value
    return node.args[position] if len(node.args) > position else None


def _arguments(node: ast.Call) -> list[ast.expr]:
    return [*node.args, *(keyword.value for keyword in node.keywords)]


def _unpack_partial(node: ast.Call, function: Any) -> tuple[ast.Call, Any]:
    """The call that a `functools.partial` makes, and its function. Other calls and functions stay as they are."""
    if not isinstance(function, functools.partial):
        return node, function
    ours = {keyword.arg for keyword in node.keywords}
    more = [ast.keyword(name, ast.Constant(value)) for name, value in function.keywords.items() if name not in ours]
    return ast.Call(node.func, [*map(ast.Constant, function.args), *node.args], [*node.keywords, *more]), function.func


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _mentions_dropout(code: types.CodeType) -> bool:
    names = (*code.co_names, *code.co_varnames)
    return any("drop" in name.lower() or "bernoulli" in name or name.startswith("rand") for name in names) or any(
        _mentions_dropout(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)
    )

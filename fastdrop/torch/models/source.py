"""What the forward of a module does with dropout, read off its source. A list of class names would be wrong tomorrow.

`convert`, `fuse`, `audit` and the scheduler ask two questions. Which functions that drop does a module call
(`functional_drops`)? Is a dropout module called, or does its owner only read its ``p``, to give it to attention
(`Owners.use_of`)?

The source of a function is followed through the module's own methods, ``super()`` and helper functions. A branch on an
attribute such as ``if self.fused_attn:`` is taken as that attribute stands on the module. Where there is no source,
names are read off the bytecode.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import inspect
import itertools
import re
import sys
import textwrap
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..runtime.dispatch.modules import CHILDREN, TorchDropout, forward_hooks_of
from ..runtime.dispatch.ops import OpOverload, OpOverloadPacket

__all__ = [
    "Drop",
    "Owners",
    "functional_drops",
    "is_unreadable",
    "lenders",
    "own_random",
    "rate_text",
    "reached_by",
    "scripted_drop",
]

# Functions that drop: the name of their rate, its position and its default.
DROPS: dict[Any, tuple[str, int, float]] = {
    F.dropout: ("p", 1, 0.5),
    F.dropout1d: ("p", 1, 0.5),
    F.dropout2d: ("p", 1, 0.5),
    F.dropout3d: ("p", 1, 0.5),
    F.alpha_dropout: ("p", 1, 0.5),
    F.feature_alpha_dropout: ("p", 1, 0.5),
    F.scaled_dot_product_attention: ("dropout_p", 4, 0.0),
    F.multi_head_attention_forward: ("dropout_p", 10, 0.0),
    **{
        getattr(torch, name): ("p", 1, 0.5)
        for of in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
        for name in (of, f"{of}_")
    },
    torch.native_dropout: ("p", 1, 0.5),
}
for _name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):  # as in exported programs
    for _packet in (getattr(torch.ops.aten, _name), getattr(torch.ops.aten, f"{_name}_")):
        DROPS[_packet] = DROPS[_packet.default] = ("p", 1, 0.5)
_packet = torch.ops.aten.scaled_dot_product_attention
DROPS[_packet] = DROPS[_packet.default] = ("dropout_p", 4, 0.0)
ATTENTION_RATES = (
    "dropout",
    "dropout_p",
    "attn_dropout",
    "attention_dropout",
)  # keywords of functions that are unknown
DRAWS = {torch.rand, torch.rand_like, torch.bernoulli}
ITEMS = (list, tuple, dict, set)
LISTS = (nn.ModuleList, nn.ModuleDict)  # which have no forward
SCRIPTED = re.compile(r"(?:name=\"|aten::)(\w*dropout\w*|scaled_dot_product_attention)\b")
HARMLESS = (
    getattr,
    hasattr,
    id,
    isinstance,
    len,
    setattr,
    super,
    type,
    vars,
)  # which call nothing of what they are given
HOLDERS = (types.ModuleType, type, OpOverloadPacket)  # in which names stand for the same at every call
DRAWING_METHODS = ("bernoulli_", "bernoulli")
DEPTH, FOLLOWED = 6, 400  # how many calls deep, and how many functions in all, a forward is read
REACHED = 2000  # how many objects that a held function may use are looked at

Chain = tuple[str, ...]  # attributes from self on; "*" is any item
Guards = tuple[tuple[Chain, bool], ...]
Held = Callable[[Any], "Drop | None"]  # what is called at some place if the attribute called there is this

ENABLE = "fdt.enable() reaches it"
ENABLE_CPU = f"{ENABLE} on the CPU"  # on a GPU, fused attention drops in torch's own kernels
REACH: dict[Any, str] = {
    F.scaled_dot_product_attention: ENABLE_CPU,
    F.multi_head_attention_forward: ENABLE_CPU,
    torch.ops.aten.scaled_dot_product_attention: ENABLE_CPU,
    torch.ops.aten.scaled_dot_product_attention.default: ENABLE_CPU,
    torch.native_dropout: "it stays torch's",
}


class Drop(NamedTuple):
    """A call of a function that drops, or of an unknown one that is given a dropout rate."""

    call: str  # as written
    name: str  # the keyword
    text: str  # the rate as written
    chain: Chain | None  # the rate as attributes of the module
    value: float | None  # or as a number
    place: str  # the function that has the call
    reach: str  # what of fastdrop reaches it, in words; empty if the function isn't one of DROPS


class Use(NamedTuple):
    """What is done with an attribute of a module: "called", "p" where its p is read, or "other"."""

    chain: Chain
    kind: str
    guards: Guards


@dataclass
class Uses:
    """All that the forward of one class does."""

    drops: list[tuple[Drop, Guards]] = field(default_factory=list)
    held: list[tuple[Held, Chain, Guards]] = field(default_factory=list)  # calls of attributes, which may be functions
    uses: list[Use] = field(default_factory=list)
    draws: list[tuple[str, bool]] = field(default_factory=list)  # random functions; in a helper that is told `training`
    readable: bool = True  # whether all of it was read
    followed: list[types.CodeType] = field(default_factory=list)  # the functions read
    by_name: bool = False  # whether attributes are asked for by computed names


# ---- the questions ----


def functional_drops(module: nn.Module) -> list[Drop]:
    """The functions that drop which the module's forward calls, each once; none for torch's own and our classes.

    Of a class whose forward is torch's, those in the methods that it overrides.
    """
    uses = _uses(module) if not _is_known(module) else _overrides(type(module))
    drops = [drop for drop, guards in uses.drops if _holds(module, guards)]
    for held, chain, guards in uses.held:
        if _holds(module, guards):
            drops += filter(None, map(held, _values_at(module, chain) or [None]))
    return list({(drop.call, drop.name, rate_text(module, drop)): drop for drop in drops}.values())


def is_unreadable(module: nn.Module) -> bool:
    """Whether a module has a forward, neither torch's nor ours, whose source can't be had."""
    function = _python_function(vars(module).get("forward", getattr(type(module), "forward", None)))
    return not _is_known(module) and (function is None or _tree(function.__code__) is None)


def scripted_drop(module: nn.Module) -> str:
    """What drops in the graph of a scripted module; nothing where nothing does, or where it isn't scripted."""
    if not isinstance(module, torch.jit.ScriptModule):
        return ""
    try:
        graph = str(module.graph)
    except Exception:  # it has no forward
        return ""
    found = SCRIPTED.search(graph)
    return found[1] if found else ""


def rate_text(module: nn.Module, drop: Drop) -> str:
    """The rate of a call as a number, where it is an attribute of the module, else as written."""
    value = drop.value if drop.chain is None else _attribute(module, drop.chain)
    return f"{value:g}" if isinstance(value, int | float) else drop.text


def reached_by(module: nn.Module, drop: Drop) -> str:
    """What makes a call draw by fastdrop, in words."""
    if drop.reach:
        return drop.reach
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation in ("eager", "sdpa"):
        return ENABLE if implementation == "eager" else ENABLE_CPU
    if isinstance(implementation, str):
        return f"nothing reaches it: {implementation!r} attention drops in kernels of its own"
    return f"{ENABLE} if it calls torch's dropout or attention"


def own_random(module: nn.Module) -> str:
    """The random function by which a module drops that calls none of torch's dropouts; nothing for any other.

    A module without parameters and modules inside that draws random numbers in training, or any that calls a function
    which draws them and is told ``training``.
    """
    if _is_known(module):
        return ""
    uses = _uses(module)
    plain = next(module.parameters(), None) is None and next(module.children(), None) is None
    in_training = any(use.chain == ("training",) for use in uses.uses)
    return next((name for name, told in uses.draws if told or (plain and in_training)), "")


def lenders(owner: nn.Module, drop: Drop) -> list[nn.Module]:
    """The modules whose p is the rate of a call that their owner makes; mostly none."""
    return _modules_at(owner, drop.chain[:-1]) if drop.chain and drop.chain[-1] == "p" else []


class Owners:
    """Which dropout modules of a model are called, and of which only p is read."""

    def __init__(self, model: nn.Module) -> None:
        self._kinds: dict[int, set[str]] = defaultdict(set)
        self._drops: dict[int, tuple[nn.Module, Drop]] = {}
        for owner in model.modules():
            if any(map(_is_theirs, forward_hooks_of(owner))):
                self._mark([*owner.modules()][1:], "other")
            if _is_known(owner):
                if not isinstance(owner, LISTS):
                    self._mark(owner.children(), "called")
                continue
            uses = _uses(owner)
            if not uses.readable or uses.by_name:
                self._mark(owner.children(), "unknown")
            self._mark_used(owner, uses)
            held = {id(child) for child in owner.children()} - self._kinds.keys()
            self._mark((child for child in owner.children() if id(child) in held), "unseen")
            for drop, guards in uses.drops:
                if _holds(owner, guards):
                    self._drops.update((id(lender), (owner, drop)) for lender in lenders(owner, drop))
        self._mark(model.children(), "open")  # whoever holds the model may call them
        self._look_at_other_methods(model)

    def _mark_used(self, owner: nn.Module, uses: Uses) -> None:
        for chain, kind, guards in uses.uses:
            if _holds(owner, guards):
                modules = _modules_at(owner, chain)
                self._mark(modules, kind)
                if kind == "other":  # a list that is given away, with all that it holds
                    self._mark(_children(module for module in modules if isinstance(module, LISTS)), kind)
                if kind != "p" and chain[0] in vars(owner):
                    values = [vars(owner)[chain[0]], *_values_at(owner, chain)]
                    inside = _modules_in(value for value in values if callable(value) or isinstance(value, ITEMS))
                    self._mark([*inside, *_children(inside)], "other")

    def _look_at_other_methods(self, model: nn.Module) -> None:
        """Methods that no forward calls: anybody may call them, and they what so far is lent."""
        paths = [path for path, m in model.named_modules(remove_duplicate=False) if self.use_of(m) == "lent"]
        names = {next((name for name in reversed(path.split(".")) if not name.isdigit()), "") for path in paths}
        owners = [owner for owner in model.modules() if names and not _is_known(owner)]
        read: dict[type, list[Uses]] = {}
        for owner in owners:
            if type(owner) not in read:
                read[type(owner)] = _other_methods(type(owner), _uses(owner), names)
            for uses in read[type(owner)]:
                self._mark_used(owner, Uses(uses=[use._replace(kind="other") for use in uses.uses if use.kind != "p"]))

    def _mark(self, modules: Iterable[nn.Module], kind: str) -> None:
        for module in modules:
            self._kinds[id(module)].add(kind)

    def use_of(self, module: nn.Module) -> str:
        """ "called", also where no owner is seen; "lent" if only its p is read by all that may call it; or "unknown".

        It is "unknown" too if its owner has hooks, is the model itself, which others may hold, or goes to a function
        that isn't followed.
        """
        kinds = self._kinds[id(module)]
        if "called" in kinds or kinds <= {"open"}:
            return "called"
        return "lent" if kinds <= {"p", "unseen"} and "p" in kinds else "unknown"

    def borrower(self, module: nn.Module) -> tuple[nn.Module, Drop] | None:
        """Of a lent module: the call that its p goes to, and the module that makes it; None if that isn't seen."""
        return self._drops.get(id(module))


# ---- their parts ----


# By class, with the code of the forward at that time: a class may be given another one.
_read: weakref.WeakKeyDictionary[type, tuple[Any, Uses]] = weakref.WeakKeyDictionary()
_overriding: weakref.WeakKeyDictionary[type, Uses] = weakref.WeakKeyDictionary()


def _is_known(module: nn.Module) -> bool:
    """Whether the forward is torch's or ours, or scripted."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    forward = vars(module).get("forward", getattr(type(module), "forward", None))
    return (getattr(forward, "__module__", None) or "").partition(".")[0] in ("torch", "fastdrop")


def _overrides(kind: type[nn.Module]) -> Uses:
    """What methods do by which a class replaces those of torch that torch's forward calls."""
    if kind not in _overriding:
        uses = Uses()
        own = list(
            itertools.takewhile(lambda cls: not cls.__module__.startswith(("torch.", "fastdrop.")), kind.__mro__)
        )
        base = kind.__mro__[len(own)]
        for name, method in ((name, method) for cls in own for name, method in vars(cls).items()):
            if isinstance(method, types.FunctionType) and name != "__init__" and name in dir(base):
                part = _read_function(method, kind, True)
                uses.drops += part.drops
                uses.held += part.held
        _overriding[kind] = uses
    return _overriding[kind]


def _uses(module: nn.Module) -> Uses:
    kind = type(module)
    if "forward" in vars(module):
        forward = vars(module)["forward"]
        bound = getattr(_unwrapped(forward), "__self__", None) is module
        return _read_function(forward, kind, bound)
    forward = inspect.getattr_static(kind, "forward", None)
    code = getattr(_python_function(forward), "__code__", None)
    if kind not in _read or _read[kind][0] is not code:
        _read[kind] = code, _read_function(forward, kind, not isinstance(forward, staticmethod))
    return _read[kind][1]


def _read_function(forward: Any, kind: type, has_self: bool) -> Uses:
    uses = Uses()
    function = _python_function(forward)
    try:
        if function is not None:
            _Reader(function, kind, uses, has_self=has_self).read()
            return uses
    except Exception:  # a report must not fail for what somebody's source may look like
        uses = Uses()
    uses.readable = False
    return uses


def _other_methods(kind: type, uses: Uses, names: set[str]) -> list[Uses]:
    """What the methods of a class do that name one of some attributes and were not read with the forward."""
    found = []
    for cls in kind.__mro__:
        if not cls.__module__.startswith(("torch.", "fastdrop.")):
            for name, method in vars(cls).items():
                function = _python_function(method.fget if isinstance(method, property) else method)
                if function is None or name in ("__init__", "extra_repr") or function.__code__ in uses.followed:
                    continue
                if names & _names(function.__code__):
                    found.append(_read_function(function, kind, not isinstance(method, staticmethod)))
    return found


def _names(code: types.CodeType) -> set[str]:
    """The names in a function and in those inside it, with the strings by which it may ask for attributes."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}.union(*inner)


def _is_theirs(hook: Any) -> bool:
    """Whether a hook is no part of a library whose hooks are known to call no modules."""
    return (getattr(hook, "__module__", None) or "").partition(".")[0] not in ("torch", "fastdrop", "transformers")


def _unwrapped(function: Any) -> Any:
    with contextlib.suppress(Exception):  # a cycle of wrappers, or an attribute that raises
        return inspect.unwrap(function)
    return function


def _python_function(function: Any) -> types.FunctionType | None:
    function = _unwrapped(function)
    function = _unwrapped(_attribute(function, ("__func__",)) or function)
    return function if isinstance(function, types.FunctionType) else None


@functools.lru_cache(1024)
def _tree(code: types.CodeType) -> ast.FunctionDef | None:
    """The definition of a function, None where its source can't be had or is of several."""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    defined = parsed.body[0] if parsed.body else None
    if isinstance(defined, ast.FunctionDef) and defined.name == code.co_name:
        return defined
    return None


def _attribute(module: Any, chain: Chain) -> Any:
    """An attribute of an attribute ..., None where there is none. Properties may run and raise whatever they like."""
    for name in chain:
        try:
            module = getattr(module, name, None)
        except Exception:
            return None
    return module


def _holds(module: nn.Module, guards: Guards) -> bool:
    """Whether a branch can be taken: not if an attribute that it asks for is a bool and the other one."""
    return all(chain == ("training",) or _attribute(module, chain) is not (not truth) for chain, truth in guards)


def _modules_at(owner: nn.Module, chain: Chain) -> list[nn.Module]:
    return [item for item in _values_at(owner, chain) if isinstance(item, nn.Module)]


def _values_at(owner: nn.Module, chain: Chain) -> list[Any]:
    found: list[Any] = [owner] if chain else []
    for name in chain:
        if name == "*":
            found = [part for item in found for part in _items(item)]
        else:
            found = [_attribute(item, (name,)) for item in found if not isinstance(item, (torch.Tensor, *ITEMS))]
    return found


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, nn.Module):
        return value.children()
    return value.values() if isinstance(value, dict) else value if isinstance(value, ITEMS) else ()


def _children(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [child for module in modules for child in module.children()]


def _modules_in(values: Iterable[Any]) -> list[nn.Module]:
    """The modules that containers hold, or functions: as what they are bound to, given beforehand or closed over."""
    found, seen, ahead = [], dict[int, Any](), deque(values)
    while ahead and len(seen) < REACHED:
        value = ahead.popleft()
        if id(value) in seen or isinstance(value, torch.Tensor | type | types.ModuleType | str | int | float):
            continue
        seen[id(value)] = value  # kept, so that no other gets its id
        if isinstance(value, nn.Module):
            found.append(value)
            continue
        ahead += itertools.islice(_items(value), REACHED)
        ahead += _items(_attribute(value, ("__dict__",)))
        ahead += [_attribute(value, (name,)) for name in ("__self__", "func", "args", "keywords", "__defaults__")]
        ahead += [part for cell in _attribute(value, ("__closure__",)) or () for part in _cell(cell)]
    return found


def _cell(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # empty as yet
        return []


class _Reader(ast.NodeVisitor):
    """Goes through one function and those that it calls."""

    def __init__(
        self,
        function: types.FunctionType,
        kind: type,
        uses: Uses,
        *,
        has_self: bool,
        given: dict[str, tuple[ast.expr, _Reader]] | None = None,
        above: tuple[types.CodeType, ...] = (),
        guards: Guards = (),
        defined_in: type | None = None,
    ) -> None:
        self.function, self.kind, self.uses = function, kind, uses
        self.given = given or {}
        self.above = (*above, function.__code__)
        uses.followed.append(function.__code__)
        self.guards = guards
        self.defined_in = defined_in or next((c for c in kind.__mro__ if _defines(c, function)), kind)
        self.parameters = function.__code__.co_varnames[: function.__code__.co_argcount]
        self.me = self.parameters[0] if has_self and self.parameters else None
        self.assigned: dict[str, ast.expr | None] = {}
        self.imported: dict[str, Any] = {}

    def read(self) -> None:
        tree = _tree(self.function.__code__)
        if tree is None:
            self._read_bytecode()
            return
        for node in ast.walk(tree):
            self._note_assignment(node)
        self._visit_block(tree.body)

    def _note_assignment(self, node: ast.AST) -> None:
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
        """What a loop's variable is: an item of what it goes over."""
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

    # ---- what an expression stands for ----

    def chain(self, node: ast.expr, steps: int = 8) -> Chain | None:
        """The attributes by which an expression is reached from the module; () for the module."""
        if steps == 0:
            return None
        if isinstance(node, ast.Name):
            if node.id == self.me and node.id not in self.assigned:
                return ()
            if self.assigned.get(node.id) is not None:
                return self.chain(self.assigned[node.id], steps - 1)  # type: ignore[arg-type]
            if node.id in self.given and node.id not in self.assigned:
                value, reader = self.given[node.id]
                return reader.chain(value, steps - 1)
            return None
        if isinstance(node, ast.Attribute | ast.Subscript):
            before = self.chain(node.value, steps - 1)
            if before is None:
                return None
            return (*before, node.attr) if isinstance(node, ast.Attribute) else (*before, "*")
        return None

    def object(self, node: ast.expr, steps: int = 8) -> Any:
        """What a name, or a name in a module or class, stands for in the function; None if that is not constant."""
        if steps == 0:
            return None
        if isinstance(node, ast.Name):
            if node.id in self.imported:
                return self.imported[node.id]
            value = self.assigned.get(node.id)
            if node.id in self.assigned:
                return self.object(value, steps - 1) if isinstance(value, ast.Name | ast.Attribute) else None
            if node.id in self.given:
                expression, reader = self.given[node.id]
                return reader.object(expression, steps - 1)
            if node.id in self.function.__code__.co_varnames:
                return None
            return _global(self.function, node.id)
        if isinstance(node, ast.Attribute):
            holder = self.object(node.value, steps - 1)
            return getattr(holder, node.attr, None) if isinstance(holder, HOLDERS) else None
        return None

    def rate(self, node: ast.expr, steps: int = 8) -> tuple[str, Chain | None, float | None]:
        """A drop probability: as written, as attributes of the module, as a number."""
        if steps:
            if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
                return ast.unparse(node), None, float(node.value)
            if isinstance(node, ast.IfExp):  # 0.0 if not self.training else p
                parts = [part for part in (node.body, node.orelse) if not _is_zero(part)]
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
                    expression, reader = self.given[node.id]
                    return reader.rate(expression, steps - 1)
        return ast.unparse(node), None, None

    # ---- what it does ----

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
                self.guards = (*self.guards, *self._guards_of(statement.test)[1])  # what follows is its else
        self.guards = before

    def _guards_of(self, test: ast.expr) -> tuple[Guards, Guards]:
        """What holds of attributes of the module where a test is true, and where it is false."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            yes, no = self._guards_of(test.operand)
            return no, yes
        if isinstance(test, ast.BoolOp):
            parts = [self._guards_of(value) for value in test.values]
            if isinstance(test.op, ast.And):
                return tuple(guard for yes, _ in parts for guard in yes), ()
            return (), tuple(guard for _, no in parts for guard in no)
        chain = self.chain(test)
        return (((chain, True),), ((chain, False),)) if chain else ((), ())

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = self.chain(node)
        if chain is None:
            if not self._mention(node):
                self.visit(node.value)
        elif len(chain) > 1 and chain[-1] == "p":
            self._use(chain[:-1], "p")
        else:
            self._use(chain, "other")
            self.uses.by_name |= chain[-1] in (CHILDREN, "__dict__")
            own = inspect.getattr_static(self.kind, chain[0], None) if len(chain) == 1 else None
            if isinstance(own, property):
                own = own.fget
            if isinstance(own, types.FunctionType):  # a method given to another function, which then calls it
                self._follow(own, ast.Call(node, [], []), True)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        self.visit(node.slice)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and not self._mention(node) and self.chain(node) == ():
            self._use(("*",), "other")  # the module itself is given away

    def visit_Assign(self, node: ast.Assign) -> None:
        alias = isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Name | ast.Attribute)
        if not (alias and (_drops(self.object(node.value)) or self.chain(node.value) == ())):
            self.generic_visit(node)

    def _mention(self, node: ast.Name | ast.Attribute) -> bool:
        """A function that drops that is given away or kept, not called: its rate isn't seen."""
        function = self.object(node)
        if not _drops(function):
            return False
        place, reach = self.function.__qualname__, REACH.get(function, ENABLE)
        self._add(Drop(ast.unparse(node), DROPS[function][0], "?", None, None, place, reach))
        return True

    def visit_Call(self, node: ast.Call) -> None:
        if node.args and self.object(node.func) is functools.partial:
            self.visit_Call(ast.Call(node.args[0], node.args[1:], node.keywords))
            return
        chain = self.chain(node.func)
        if chain is not None:
            followed = self._call_of_own(chain, node)
        elif isinstance(node.func, ast.Attribute) and _is_super(node.func.value):
            mro = self.kind.__mro__
            after = mro[mro.index(self.defined_in) + 1 :] if self.defined_in in mro else ()
            holder = next((cls for cls in after if node.func.attr in vars(cls)), None)
            followed = holder is None or self._follow(vars(holder)[node.func.attr], node, True, holder)
            if not followed:
                self._use(("*",), "other")
        else:
            followed = self._call_of_function(node)
        for argument in _arguments(node):
            if not (followed and isinstance(argument, ast.Name) and self.chain(argument) == ()):
                self.visit(argument)
        if chain is None and not isinstance(node.func, ast.Name) and self.object(node.func) is None:
            self.visit(node.func)

    def _call_of_own(self, chain: Chain, node: ast.Call) -> bool:
        """A call of an attribute; whether what it does with the module, where it is given it, is read."""
        if len(chain) > 1 and chain[-1] in ("forward", "__call__"):
            chain = chain[:-1]
        self._use(chain, "called")
        method = None
        if len(chain) == 1:
            method = inspect.getattr_static(self.kind, chain[0], None)
            self.uses.by_name |= chain[0] in ("children", "named_children", "modules", "named_modules")
        self.uses.by_name |= chain[:1] == (CHILDREN,)
        if method is not None:
            return self._follow(method, node, not isinstance(method, staticmethod | classmethod))
        self.uses.held.append((functools.partial(self._held, node, ast.unparse(node.func)), chain, self.guards))
        return self._rate_given(node) is not None

    def _held(self, node: ast.Call, written: str, value: Any) -> Drop | None:
        node, function = _applied(node, value)
        if _drops(function):
            return self._drop(node, written, DROPS[function], REACH.get(function, ENABLE))
        return None if isinstance(value, nn.Module) else self._hand_on(node, written)

    def _call_of_function(self, node: ast.Call) -> bool:
        node, target = _applied(node, self.object(node.func))
        written = ast.unparse(node.func)
        told = "training" in self.parameters or "train" in self.parameters
        given = any(self.chain(argument) == () for argument in _arguments(node))
        if target in (getattr, vars) and node.args and self.chain(node.args[0]) == ():
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant):
                self._use((str(name.value),), "other")
            else:
                self.uses.by_name = True
        if isinstance(target, type):
            if issubclass(target, TorchDropout) and target.__module__ == nn.Dropout.__module__:
                self._add(self._drop(node, written, ("p", 0, 0.5), ENABLE))
        elif _drops(target):
            self._add(self._drop(node, written, DROPS[target], REACH.get(target, ENABLE)))
        elif _is_hashable(target) and target in DRAWS:
            self.uses.draws.append((written, told))
        elif isinstance(node.func, ast.Attribute) and node.func.attr in DRAWING_METHODS and target is None:
            self.uses.draws.append((f".{node.func.attr}", told))
        elif isinstance(target, types.FunctionType):
            if not target.__module__.startswith(("torch.", "fastdrop.")):
                return (given or _mentions_dropout(target.__code__)) and self._follow(target, node, False)
        elif target is None:
            self._add(self._hand_on(node, written))
            return self._rate_given(node) is not None
        return target in HARMLESS

    def _use(self, chain: Chain, kind: str) -> None:
        if chain:
            self.uses.uses.append(Use(chain, kind, self.guards))

    def _follow(self, method: Any, node: ast.Call, has_self: bool, defined_in: type | None = None) -> bool:
        """Reads a function that is called; whether it could be read, with all it does with the module if given it."""
        function = _python_function(method)
        if function is None or not self._is_followed(function):
            return function is not None and function.__code__ in self.above
        code = function.__code__
        names = code.co_varnames[: code.co_argcount]
        given: dict[str, tuple[ast.expr, _Reader]] = {}
        for name, default in zip(reversed(names), reversed(function.__defaults__ or ()), strict=False):
            if isinstance(default, int | float):
                given[name] = ast.Constant(default), self
        for name, argument in zip(names[has_self:], node.args, strict=False):
            if isinstance(argument, ast.Starred):
                break
            given[name] = argument, self
        given.update({keyword.arg: (keyword.value, self) for keyword in node.keywords if keyword.arg})
        reader = _Reader(
            function,
            self.kind,
            self.uses,
            has_self=has_self,
            given=given,
            above=self.above,
            guards=self.guards,
            defined_in=defined_in,
        )
        reader.read()
        mine = {name for name, (value, of) in given.items() if of.chain(value) == ()}
        known = mine <= {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]} - reader.assigned.keys()
        return (
            known and len(mine) == [self.chain(each) for each in _arguments(node)].count(()) and _tree(code) is not None
        )

    def _is_followed(self, function: types.FunctionType) -> bool:
        """Whether a function that is called is read too: none that calls this one, and not too many in all."""
        if (function.__module__ or "").partition(".")[0] == "torch":  # Module's own, as `register_buffer`
            return False
        if function.__code__ in self.above:
            return False
        if len(self.above) > DEPTH or len(self.uses.followed) > FOLLOWED:
            self.uses.readable = False
            return False
        return True

    def _drop(self, node: ast.Call, written: str, rate: tuple[str, int, float], reach: str) -> Drop | None:
        name, position, default = rate
        argument = _argument(node, name, position)
        training = _argument(node, "training", 2) if name == "p" else None
        if argument is None and any(keyword.arg is None for keyword in node.keywords):
            text, chain, value = "**", None, None
        else:
            text, chain, value = self.rate(argument or ast.Constant(default))
        never = isinstance(training, ast.Constant) and training.value is False
        if never or (value == 0.0 and (argument is None or _is_zero(argument))):
            return None
        return Drop(written, name, text, chain, value, self.function.__qualname__, reach)

    def _rate_given(self, node: ast.Call) -> ast.keyword | None:
        return next((keyword for keyword in node.keywords if keyword.arg in ATTENTION_RATES), None)

    def _hand_on(self, node: ast.Call, written: str) -> Drop | None:
        """A rate given to a function that is known only when it runs, as transformers' attention is."""
        keyword = self._rate_given(node)
        if keyword is None or _is_zero(keyword.value):
            return None
        text, chain, value = self.rate(keyword.value)
        place = self.function.__qualname__
        return Drop(written, keyword.arg or "", text, chain, value, place, "") if value != 0.0 else None

    def _add(self, drop: Drop | None) -> None:
        if drop is not None:
            self.uses.drops.append((drop, self.guards))

    # ---- without source ----

    def _read_bytecode(self) -> None:
        """Dotted names alone: an attribute of the module counts as called, unless its p is read."""
        chain: Chain | None = None
        value: Any = None
        written = ""
        for step in (*dis.get_instructions(self.function), None):
            if step is not None and chain is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                chain, written = (*chain, step.argval), f"{written}.{step.argval}"
                continue
            if step is not None and value is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                value = getattr(value, step.argval, None) if isinstance(value, HOLDERS) else None
                written = f"{written}.{step.argval}"
                continue
            if chain:
                lends = len(chain) > 1 and chain[-1] == "p"
                self._use(chain[:-1] if lends else chain, "p" if lends else "called")
                method = _python_function(getattr(self.kind, chain[0], None)) if len(chain) == 1 else None
                if method is not None and self._is_followed(method):
                    _Reader(method, self.kind, self.uses, has_self=True, above=self.above).read()
            elif _drops(value):
                name, reach = DROPS[value][0], REACH.get(value, ENABLE)
                self._add(Drop(written, name, "?", None, None, self.function.__qualname__, reach))
            chain, value, written = None, None, ""
            if step is not None and step.opname.startswith("LOAD_FAST") and step.argval == self.me:
                chain = ()
            elif step is not None and step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
                value, written = _global(self.function, step.argval), step.argval


def _defines(kind: type, function: types.FunctionType) -> bool:
    own = vars(kind).get(function.__name__)
    return own is not None and _python_function(own) is function


def _global(function: types.FunctionType, name: str) -> Any:
    code = function.__code__
    if name in code.co_freevars:
        cell = (function.__closure__ or ())[code.co_freevars.index(name)]
        return next(iter(_cell(cell)), None)
    builtin = function.__globals__.get("__builtins__", {})
    builtins = builtin if isinstance(builtin, dict) else vars(builtin)
    return function.__globals__.get(name, builtins.get(name))


def _argument(node: ast.Call, name: str, position: int) -> ast.expr | None:
    for keyword in node.keywords:
        if keyword.arg == name:
            return keyword.value
    return node.args[position] if len(node.args) > position else None


def _arguments(node: ast.Call) -> list[ast.expr]:
    return [*node.args, *(keyword.value for keyword in node.keywords)]


def _applied(node: ast.Call, function: Any) -> tuple[ast.Call, Any]:
    """A call, of a `functools.partial` the one that it makes, and the function called."""
    if not isinstance(function, functools.partial):
        return node, function
    ours = {keyword.arg for keyword in node.keywords}
    more = [ast.keyword(name, ast.Constant(value)) for name, value in function.keywords.items() if name not in ours]
    return ast.Call(node.func, [*map(ast.Constant, function.args), *node.args], [*node.keywords, *more]), function.func


def _drops(function: Any) -> bool:
    return _is_hashable(function) and function in DROPS


def _is_zero(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or node.value == 0)


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _is_hashable(value: Any) -> bool:
    return isinstance(value, types.FunctionType | types.BuiltinFunctionType | OpOverloadPacket | OpOverload)


def _mentions_dropout(code: types.CodeType) -> bool:
    names = (*code.co_names, *code.co_varnames)
    return any("drop" in name.lower() or "bernoulli" in name or name.startswith("rand") for name in names) or any(
        _mentions_dropout(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)
    )

"""State that belongs to a context: whether torch's dropout is fastdrop's, and attributes that modules appear to have.

`override` and `monte_carlo` set it; kernels and modules read it at each call. A context is a thread or an asyncio task
(`contextvars`). So one thread never sees what another has switched, and nothing shared is written: inside of
`mc_dropout` a module's ``training`` reads True, and the module's own ``training`` stays False.

Compiled code must not run in another state than it was compiled in. Each function here that reads the state while
`torch.compile` traces adds a guard to the code that is being compiled: it runs where the answer is the same, and is
compiled again where it isn't.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch._C import _get_obj_in_tls, _is_key_in_tls, _stash_obj_in_tls
from torch._guards import TracingContext
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .. import __version__

__all__ = [
    "appearing",
    "dispatching",
    "drops_in_scripts",
    "enabled_here",
    "is_enabled",
    "is_enabled_there",
    "note_traced",
    "overriding",
    "set_everywhere",
    "without_gradients",
]

CACHE_TAG = f"+fastdrop {__version__}"
CALLER = "context"  # torch keeps the caller's context under this key while backward runs, for the engine's threads

_everywhere = False
_here: ContextVar[_Entry | None] = ContextVar("fastdrop_enabled", default=None)
_appearances: ContextVar[_Appearances | None] = ContextVar("fastdrop_appearances", default=None)
_lock = threading.Lock()


def _value(variable: ContextVar[Any]) -> Any:
    """A variable of this context or, in a thread of autograd's engine, of the one that called backward."""
    value = variable.get()
    if value is None and _is_key_in_tls(CALLER):
        caller = _get_obj_in_tls(CALLER)
        value = None if caller is None else caller.get(variable)
        # Where backward calls backward, as checkpoints do, torch takes the context of the engine's thread, which is
        # empty. So the value is put beside it: torch hands that on too, and takes it away at the end of the task.
        if value is not None:
            _stash_obj_in_tls(variable.name, value)
        elif _is_key_in_tls(variable.name):
            value = _get_obj_in_tls(variable.name)
    return value


class _Entry:
    """What a block has a variable be, and what it was before the block."""

    before: _Entry | None

    def is_in(self, current: _Entry | None) -> bool:
        """Whether the block of ``current`` is inside of this one's, or is this one's."""
        while current is not None and current is not self:
            current = current.before
        return current is self


@contextlib.contextmanager
def _set(variable: ContextVar[Any], entry: _Entry) -> Iterator[None]:
    entry.before = variable.get()
    try:
        variable.set(entry)
        yield
    finally:
        # An exception from a signal may come after any call, here too. It may even come between this generator and the
        # block, which then never begins or never ends: the generator is closed some time later, when blocks around
        # this one have ended, and must not undo what they did.
        inside = True
        try:
            inside = entry.is_in(variable.get())
        finally:
            if inside:
                variable.set(entry.before)


# Like torch's own `no_grad` and modes, but an exception from a signal can't leave them on: what is on is entered by one
# call, inside of try, and left by one call.


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    before = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(False)
        yield
    finally:
        torch._C._set_grad_enabled(before)


@contextlib.contextmanager
def dispatching(mode: TorchDispatchMode) -> Iterator[None]:
    """Without the flags, beside, that all threads share and that entering a mode sets."""
    try:
        torch._C._push_on_torch_dispatch_stack(mode)
        yield
    finally:
        top: Any = torch._C._pop_torch_dispatch_stack(None)
        while top is not mode:  # others that were left
            top = torch._C._pop_torch_dispatch_stack(None)


@contextlib.contextmanager
def overriding(mode: TorchFunctionMode) -> Iterator[None]:
    try:
        torch._C._push_on_torch_function_stack(mode)
        yield
    finally:
        top = torch._C._pop_torch_function_stack()
        while top is not mode:
            top = torch._C._pop_torch_function_stack()


# ---- torch's dropout ----


def set_everywhere(on: bool) -> None:
    """For all threads."""
    global _everywhere
    _everywhere = on


def enabled_here() -> contextlib.AbstractContextManager[None]:
    """For this context."""
    return _set(_here, _Entry())


def is_enabled() -> bool:
    """Whether torch's dropout is fastdrop's."""
    return _everywhere or _value(_here) is not None


def is_enabled_there() -> bool:
    """`is_enabled` of Python code that a compiler traces: asked at compile time, with a guard."""
    on = is_enabled()
    note_traced(on)
    return on


is_enabled_there._dynamo_marked_constant = True  # type: ignore[attr-defined]


def note_traced(on: bool) -> None:
    """Has the code that is being compiled now, if there is any, run in this state alone."""
    if not _guard(is_enabled, on):
        return
    # torch's caches on disk know a graph by the names of torch's functions, before dropout becomes what it is in this
    # state. Both states come by here, so the tag is right for every graph that drops.
    config = torch.compiler.config
    tag = config.cache_key_tag.replace(CACHE_TAG, "") + CACHE_TAG * on
    if config.cache_key_tag != tag:
        config.cache_key_tag = tag


def _guard(question: Callable[[], Any], answer: Any) -> bool:
    """Adds a guard to what is being compiled; returns whether something is."""
    if TracingContext.try_get() is None:
        return False
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource

    def create(builder: Any, guard: Any) -> None:
        parts = ["fastdrop's state is that of compile time"]
        builder.guard_manager.root.add_lambda_guard(lambda _: question() == answer, parts, guard.user_stack)

    install_guard(GlobalStateSource().make_guard(create))
    return True


# ---- attributes of modules ----


class _Appearances(_Entry):
    """Values that attributes of modules appear to have, by module and name."""

    def __init__(self, around: _Appearances | None, values: dict[tuple[nn.Module, str], bool], scripted: bool) -> None:
        self.values: dict[tuple[int, str], bool]
        self.scripted: bool
        self.modules = [module for module, _ in values]  # kept alive, so that no other module gets one of these ids
        self.values = {} if around is None else dict(around.values)
        self.values |= {(id(module), name): value for (module, name), value in values.items()}
        self.around = around  # keeps its modules
        self.scripted = scripted or (around is not None and around.scripted)


class _Attribute:
    """In a module class's place for an attribute: gives the context's value of it where there is one.

    It stays on the class. A class that changes back while other threads read from it would be changed for them.
    """

    def __init__(self, name: str, before: Any) -> None:
        self.name, self.before = name, before
        self.delegates = hasattr(type(before), "__get__") and hasattr(type(before), "__set__")  # a property

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        appearance = _appearance(id(module), self.name)
        if appearance != OWN:
            return appearance == ON
        if self.delegates:
            return self.before.__get__(module, owner)
        own = module.__dict__
        if self.name in own:
            return own[self.name]
        if self.before is None:
            raise AttributeError(self.name)
        return self.before

    def __set__(self, module: Any, value: Any) -> None:
        if self.delegates:
            self.before.__set__(module, value)
        else:
            module.__dict__[self.name] = value

    def __delete__(self, module: Any) -> None:
        del module.__dict__[self.name]


OFF, ON, OWN = 0, 1, 2


def _read(module_id: int, name: str) -> int:
    appearances = _value(_appearances)
    return OWN if appearances is None else appearances.values.get((module_id, name), OWN)


def _appearance(module_id: int, name: str) -> int:
    """OFF, ON, or OWN where the module's own value counts."""
    found = _read(module_id, name)
    _guard(lambda: _read(module_id, name), found)
    return found


_appearance._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def appearing(values: dict[tuple[nn.Module, str], bool]) -> Iterator[None]:
    """Has attributes of modules appear to have other values, in this context and for a block.

    What was scripted keeps its mode in C++, out of reach of Python: `drops_in_scripts` tells the kernels.
    """
    scripted = False
    for module, name in values:
        if isinstance(module, torch.jit.ScriptModule):
            scripted = scripted or (name == "training" and values[module, name])
        else:
            _watch(type(module), name)
    with _set(_appearances, _Appearances(_value(_appearances), values, scripted)):
        yield


def _watch(cls: type[nn.Module], name: str) -> None:
    with _lock:
        before = inspect.getattr_static(cls, name, None)
        if not isinstance(before, _Attribute):
            setattr(cls, name, _Attribute(name, before))


def drops_in_scripts() -> bool:
    """Whether dropout in scripted code drops, in whatever mode it is."""
    appearances = _value(_appearances)
    return appearances is not None and appearances.scripted

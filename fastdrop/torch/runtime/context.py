"""State of a context: whether torch's dropout is fastdrop's, and which values modules' attributes appear to have.

`enable` and `monte_carlo` set this state, and kernels and modules read it at each call. A context is a thread or an
asyncio task (`contextvars`), so one thread never sees what another has switched. Nothing that threads share is written:
in a block of `mc_dropout` a module's ``training`` reads True, but the module itself keeps False.

Compiled code must run only in the state it was compiled in. Each function here that reads the state while
`torch.compile` traces adds a guard to the code that is being compiled. Where the answer differs, torch compiles again.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from ... import __version__
from .dispatch.compilers import add_guard, constant_in_graphs, guard_by
from .dispatch.modes import (
    CALLER,
    can_push_dispatch_modes,
    can_push_function_modes,
    count_function_modes,
    hand_on,
    handed_on,
    is_handed_on,
    pop_dispatch_mode,
    pop_function_mode,
    push_dispatch_mode,
    push_function_mode,
)

CACHE_TAG = f"+fastdrop {__version__}"

_everywhere = False
# The blocks that a context is in, outermost first.
_here: ContextVar[tuple[_Entry, ...]] = ContextVar("fastdrop_enabled", default=())
_appearances: ContextVar[tuple[_Appearances, ...]] = ContextVar("fastdrop_appearances", default=())
# Ids of the entries that any context of the process has. Most calls find none and look no further.
_enabled_somewhere: set[int] = set()
_appearing_somewhere: set[int] = set()
_lock = threading.Lock()


def _value(variable: ContextVar[Any]) -> Any:
    """A variable's value in this context or, in a thread of autograd's engine, in the one that called backward."""
    value = variable.get()
    if not value and is_handed_on(CALLER):
        caller = handed_on(CALLER)
        value = () if caller is None else caller.get(variable, ())
        # If backward calls backward, as checkpoints do, torch hands on the context of the engine's thread, which is
        # empty. So the value is put beside it: torch hands that on too, and removes it at the end of the task.
        if value:
            hand_on(variable.name, value)
        elif is_handed_on(variable.name):
            value = handed_on(variable.name)
    return value


class _Entry:
    """One block. Its id is in ``somewhere`` as long as any context has the block, copies of contexts included."""

    def __init__(self, somewhere: set[int]) -> None:
        self.somewhere = somewhere
        somewhere.add(id(self))

    def __del__(self) -> None:
        self.somewhere.discard(id(self))


@contextlib.contextmanager
def _set(variable: ContextVar[Any], entry: _Entry) -> Iterator[None]:
    try:
        variable.set((*variable.get(), entry))
        yield
    finally:
        # A signal may raise an exception after any call, here too, and between this generator and its block. Then the
        # generator is closed some time later. Other blocks have begun and ended since, and what they did must stay.
        try:
            _leave(variable, entry)
        except BaseException:
            _leave(variable, entry)
            raise


def _leave(variable: ContextVar[Any], entry: _Entry) -> None:
    entries = variable.get()
    if entry in entries:
        variable.set(tuple(other for other in entries if other is not entry))


# These are like torch's own `no_grad` and modes, but an exception from a signal can't leave them on, because one call
# within ``try`` enters them and one call leaves them.


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    before = torch.is_grad_enabled()
    try:
        torch.set_grad_enabled(False)
        yield
    finally:
        torch.set_grad_enabled(before)


@contextlib.contextmanager
def dispatching(mode: Any) -> Iterator[None]:
    """A block in a dispatch mode. torch's own ``with mode`` also sets flags that all threads share."""
    if not can_push_dispatch_modes:
        with mode:
            yield
        return
    try:
        push_dispatch_mode(mode)
        yield
    finally:
        while pop_dispatch_mode(None) is not mode:  # modes above it that an exception left on
            pass


@contextlib.contextmanager
def overriding(mode: TorchFunctionMode) -> Iterator[None]:
    """A block in a function mode. It also ends well if torch took the mode off for a while and didn't put it back."""
    if not can_push_function_modes:
        with mode:
            yield
        return
    depth = count_function_modes()
    try:
        push_function_mode(mode)
        yield
    except BaseException as error:
        if count_function_modes() <= depth:
            _end_contexts(error)
        raise
    finally:
        try:
            _pop_to(depth)
        except BaseException:  # from a signal
            _pop_to(depth)
            raise


def _end_contexts(error: BaseException) -> None:
    """Ends the blocks that were being entered when an exception came, because their end would put the mode back."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == contextlib.__file__:
            with contextlib.suppress(RuntimeError):  # the frame still runs
                frame.clear()


def _pop_to(depth: int) -> None:
    while count_function_modes() > depth:
        pop_function_mode()


# ---- torch's dropout ----


def set_everywhere(on: bool) -> None:
    """Switches fastdrop on or off for all threads."""
    global _everywhere
    _everywhere = on


def is_enabled_everywhere() -> bool:
    """Whether `set_everywhere` has switched it on. Blocks of a context do not count."""
    return _everywhere


def enabled_here() -> contextlib.AbstractContextManager[None]:
    """A block in which fastdrop is on for this context."""
    return _set(_here, _Entry(_enabled_somewhere))


def is_enabled() -> bool:
    """Whether torch's dropout is fastdrop's."""
    return _everywhere or (bool(_enabled_somewhere) and bool(_value(_here)))


@constant_in_graphs
def is_enabled_there() -> bool:
    """`is_enabled` for code that a compiler traces: it is called at compile time and adds a guard."""
    on = is_enabled()
    note_traced(on)
    return on


def note_traced(on: bool) -> None:
    """Makes code that is being compiled, if there is any, run in this state only."""
    if not _guard(is_enabled, on):
        return
    # torch's caches on disk know a graph by the names of torch's functions, which are the same in both states. The tag
    # tells them apart. Every graph that drops comes here in either state.
    config = torch.compiler.config
    tag = config.cache_key_tag.replace(CACHE_TAG, "") + CACHE_TAG * on
    if config.cache_key_tag != tag:
        config.cache_key_tag = tag


def _guard(question: Callable[[], Any], answer: Any) -> bool:
    """Adds a guard to the code that is being compiled, unless it has an equal one. Returns whether any is."""
    return add_guard(_guard_maker(question, answer))


@functools.lru_cache(64)
def _guard_maker(question: Callable[[], Any], answer: Any) -> Callable[[Any, Any], None]:
    def create(builder: Any, guard: Any) -> None:
        guard_by(builder, guard, lambda _: question() == answer, "fastdrop's state is that of compile time")

    return create


# ---- attributes of modules ----


class _Appearances(_Entry):
    """Values that attributes of modules appear to have, by module and name. They hide those of outer blocks."""

    def __init__(self, values: dict[tuple[nn.Module, str], bool], scripted: bool) -> None:
        super().__init__(_appearing_somewhere)
        self.modules = [module for module, _ in values]  # kept alive, so that no other module gets one of these ids
        self.values = {(id(module), name): value for (module, name), value in values.items()}
        self.scripted = scripted
        # A thread of autograd's engine does not have the blocks around it in its context: its caller has them.
        self.around = () if _appearances.get() else _value(_appearances)

    def read(self, key: tuple[int, str]) -> int:
        if key in self.values:
            return self.values[key]
        return _read(self.around, key)


def _read(appearances: tuple[_Appearances, ...], key: tuple[int, str]) -> int:
    found = OWN
    for entry in reversed(appearances):
        found = entry.read(key)
        if found != OWN:
            break
    return found


class _Attribute:
    """Replaces an attribute of a module's class and gives the context's value if it has one.

    It stays on the class, because other threads may be reading from the class when a block ends.
    """

    def __init__(self, name: str, before: Any) -> None:
        self.name, self.before = name, before
        self.delegates = hasattr(type(before), "__get__") and hasattr(type(before), "__set__")  # a property

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        # This is asked first because code compiled for a module's id is for that module only. Most reads end here.
        if _some_appear_there() if is_dynamo_compiling() else _appearing_somewhere and _some_appear():
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
        if self.delegates:
            self.before.__delete__(module)
        elif self.name in module.__dict__:
            del module.__dict__[self.name]
        else:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {self.name!r}")


OFF, ON, OWN = 0, 1, 2


def _some_appear() -> bool:
    """Whether any attributes appear to have other values in this context."""
    return bool(_appearing_somewhere) and bool(_value(_appearances))


@constant_in_graphs
def _some_appear_there() -> bool:
    """`_some_appear` for code that a compiler traces: it is called at compile time and adds a guard."""
    found = _some_appear()
    _guard(_some_appear, found)
    return found


@constant_in_graphs
def _appearance(module_id: int, name: str) -> int:
    """OFF, ON, or OWN if the module's own value counts."""

    def read() -> int:
        return _read(_value(_appearances), (module_id, name))

    found = read()
    _guard(read, found)
    return found


@contextlib.contextmanager
def appearing(values: dict[tuple[nn.Module, str], bool]) -> Iterator[None]:
    """A block in which attributes of modules appear to have other values, in this context.

    Scripted modules keep their mode in C++, where Python can't change it. `drops_in_scripts` tells the kernels.
    """
    scripted = False
    for module, name in values:
        if isinstance(module, torch.jit.ScriptModule):
            scripted = scripted or (name == "training" and values[module, name])
        else:
            _watch(type(module), name)
    with _set(_appearances, _Appearances(values, scripted)):
        yield


def _watch(cls: type[nn.Module], name: str) -> None:
    with _lock:
        before = inspect.getattr_static(cls, name, None)
        if not isinstance(before, _Attribute):
            setattr(cls, name, _Attribute(name, before))


def drops_in_scripts() -> bool:
    """Whether dropout in scripted code drops, also in evaluation mode."""
    return bool(_appearing_somewhere) and any(entry.scripted for entry in _value(_appearances))

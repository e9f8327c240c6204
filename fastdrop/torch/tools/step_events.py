"""Runs training steps of a model and finds out which code dropped where. `step_report` makes its table of it.

torch's profiler records each operator, autograd function and backward node of a step. `record` adds three kinds of
events: calls of modules (by hooks), runs of fastdrop's kernels (by wrappers around the backend's functions), and
tensors kept for backward. All of them nest, so a tree of events tells which kernel or random operator ran in which
module. None of this changes the way that a call takes: dispatch modes and global hooks would.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import os
import sys
import threading
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile, record_function
from torch.overrides import TorchFunctionMode

from ... import backends
from ...backends.primitives import entry_points
from ...core.random import DROP_ALL
from ..functional.routing import Dropout
from ..models.rates import number, rate_name
from ..models.source.calls import drops
from ..models.source.forward import own_random
from ..models.source.functions import LIBRARIES, package_of
from ..ops import attention, lora, mask, norm, pointwise, softmax
from ..ops.record import Op
from ..runtime.context import overriding
from ..runtime.dispatch.modules import MAY_BE_LEFT_OUT, is_compiled, uncompiled
from ..runtime.dispatch.tensors import storage_id

__all__ = ["Call", "is_dropout_module", "modules_in_compiled", "record"]

PREFIX = "fastdrop.report"
MODULE, KERNEL, LINE, KEPT = (f"{PREFIX}/{kind}/" for kind in ("module", "kernel", "line", "kept"))
BACKWARD = "autograd::engine::evaluate_function: "
COMPILED = ("Torch-Compiled Region", "CompiledF", "## Call CompiledFxGraph")  # of whose inside little is known

# torch's operators that drop, with the position of p in the schema. A call's interval is that of the outermost.
KINDS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
DROPPING = {f"aten::{kind}{end}": 1 for kind in KINDS for end in ("", "_")}
DROPPING |= {"aten::native_dropout": 1, "aten::_fused_dropout": 1, "aten::scaled_dot_product_attention": 4}
# What draws in torch: always for dropout, in kernels that drop if their p (by position) is above 0, and for anything.
DRAWING = ("aten::native_dropout", "aten::_fused_dropout")
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention": 3,
    "aten::_scaled_dot_product_efficient_attention": 5,
    "aten::_scaled_dot_product_cudnn_attention": 5,
    "aten::_scaled_dot_product_fused_attention_overrideable": 4,
    "aten::_cudnn_rnn": 11,
}
RANDOM = ("aten::bernoulli_", "aten::bernoulli", "aten::rand", "aten::rand_like", "aten::randn", "aten::randn_like")
# fastdrop's kernels that draw. Others apply masks that these have drawn, or drop nothing.
DRAWN = ("draw_bits", "draw_rows", "dropout_forward", "gaussian_multiply", "attention_forward")

_recording = threading.RLock()  # torch's profiler breaks if two threads use it at once


@dataclass
class Call:
    """One call that dropped. Times are in milliseconds; ``backward`` is None where the call's part is not known."""

    path: str
    module: nn.Module  # the innermost that was called
    name: str  # the dropout module's class, or the operator or autograd function
    operator: str = ""  # the outermost operator of torch or fastdrop that drops
    compiled: bool = False  # whether it ran in compiled code, which hides what it belongs to
    line: str = ""  # where a function was called
    p: float | None = None
    shape: tuple[int, ...] = ()
    kernels: list[str] = field(default_factory=list)  # of fastdrop
    operators: list[str] = field(default_factory=list)  # of torch, that drew
    kept: int = 0
    forward: float = 0.0
    backward: float | None = None


def is_dropout_module(module: nn.Module) -> bool:
    """Whether all that a module does is to drop: its time is dropout's. Attention and recurrent layers do more."""
    return rate_name(module) is not None and next(module.parameters(), None) is None and not [*module.children()]


def record(model: nn.Module, step: Callable[[], Any], *, closely: bool = False) -> list[Call]:
    """Runs a step and returns the calls that dropped, in their order.

    ``closely`` also finds what is kept for backward and the lines that call functions. Compiled models would be
    compiled anew for it.
    """
    modules = [*model.named_modules()]
    hidden = modules_in_compiled(model)
    with _recording, contextlib.ExitStack() as stack:
        profiler = stack.enter_context(_profiling())  # first: it refuses if another profiler is on
        for i, (_, module) in enumerate(modules):
            if id(module) not in hidden and not isinstance(module, torch.jit.ScriptModule):
                for hook in _hooks(module, i):
                    stack.callback(hook.remove)
        stack.enter_context(_watched_kernels())
        if closely:
            stack.enter_context(saved_tensors_hooks(_Keeper(model).pack, lambda x: x))
            stack.enter_context(overriding(_Lines()))
        step()
    return _Finder(modules, profiler.function_events).calls()


# ---- what is recorded beside torch's own events ----


def modules_in_compiled(model: nn.Module) -> set[int]:
    """Ids of the modules that run in compiled code. It would be compiled anew if they got hooks."""
    hidden: set[int] = set()
    for module in model.modules():
        if is_compiled(module):
            hidden.update(map(id, uncompiled(module).modules()))
    return hidden


def _hooks(module: nn.Module, index: int) -> Iterator[Any]:
    """Registers hooks that make an event of each call. They are marked, so that fused layers run as without them."""
    running: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        shape = next((x.shape for x in args if isinstance(x, Tensor)), ())
        running.append(record_function(f"{MODULE}{index}/{'x'.join(map(str, shape))}"))
        running[-1].__enter__()

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if running:
            running.pop().__exit__(None, None, None)

    for hook in (enter, leave):
        setattr(hook, MAY_BE_LEFT_OUT, True)
    yield module.register_forward_pre_hook(enter, prepend=True)
    yield module.register_forward_hook(leave, always_call=True)


@contextlib.contextmanager
def _watched_kernels() -> Iterator[None]:
    """Makes an event of each run of a primitive. The functions of the backend are replaced, for all threads."""
    modules = [backends.active()]
    if torch.cuda.is_initialized() and backends.reason(backends.CUDA) is None:
        modules.append(backends.cuda_backend())
    before: list[tuple[Any, str, Any]] = []
    try:
        for backend in modules:
            for primitive, parameters in entry_points().items():
                for name in (primitive, f"{primitive}_at"):
                    if (function := getattr(backend, name, None)) is not None:
                        before.append((backend, name, function))
                        setattr(backend, name, _watched(function, primitive, [each.name for each in parameters]))
        yield
    finally:
        for backend, name, function in before:
            setattr(backend, name, function)


def _watched(function: Any, primitive: str, parameters: list[str]) -> Any:
    def run(*arguments: Any, **options: Any) -> Any:
        given = dict(zip(parameters, arguments[len(arguments) - len(parameters) :], strict=True))
        with record_function(f"{KERNEL}{primitive}/{_drop_probability(given)}"):
            return function(*arguments, **options)

    return run


def _drop_probability(given: dict[str, Any]) -> float:
    if "sigma" in given:
        return float(f"{given['sigma'] ** 2 / (1.0 + given['sigma'] ** 2):.6g}")
    return float(f"{given.get('threshold', 0) / DROP_ALL:.6g}")


class _Keeper:
    """Makes an event of each tensor that is kept for backward, with its bytes. Parameters and buffers are there anyway,
    and what was kept before needs no more memory."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: set[tuple[int, ...]] = set()
        self.of_model = {storage_id(x) for x in (*model.parameters(), *model.buffers())}

    def pack(self, x: Tensor) -> Tensor:
        if x.layout is not torch.strided:
            return x
        memory = storage_id(x)
        key = memory, int(x.storage_offset()), x.numel()
        if memory not in self.of_model and key not in self.seen:
            self.seen.add(key)
            with record_function(f"{KEPT}{x.numel() * x.element_size()}"):
                pass
        return x


class _Lines(TorchFunctionMode):
    """Makes an event of each call of a function that drops, with the line that calls it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not drops(func) and package_of(func) != "fastdrop":
            return func(*args, **(kwargs or {}))
        with record_function(f"{LINE}{_line()}"):
            return func(*args, **(kwargs or {}))


def _line() -> str:
    """The innermost line that runs outside of torch and fastdrop."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame = frame.f_back
    return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


@contextlib.contextmanager
def _profiling() -> Iterator[Any]:
    """torch's profiler, which else prints two lines to stderr each time."""
    variable, before = "KINETO_LOG_LEVEL", os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault(variable, "6")  # it reads this once, when it is first used
    try:
        with profile(record_shapes=True) as profiler:
            yield profiler
    finally:
        if before is None:
            os.environ.pop(variable, None)


# ---- from events to calls ----


class _Place:
    """Where an event is: in which module, and which event around it is the call that dropped."""

    def __init__(self, event: Any, modules: list[tuple[str, nn.Module]]) -> None:
        self.path, self.module, self.line = "", modules[0][1], ""
        self.shape: tuple[int, ...] = ()
        self.call, self.compiled, self.in_backward = event, False, False
        operator = function = None
        around = event
        while around is not None:
            name = around.name
            if name.startswith(MODULE):
                index, _, shape = name.removeprefix(MODULE).partition("/")
                self.path, self.module = modules[int(index)]
                self.shape = tuple(int(extent) for extent in shape.split("x") if extent)
                break
            if name.startswith(LINE):
                self.line = name.removeprefix(LINE)
            elif name.startswith(COMPILED):
                self.compiled = True
            elif name in DROPPING or name.startswith("fastdrop::"):
                operator = around
            elif name in _names_of_functions() and function is None:
                function = around
            self.in_backward |= name.startswith(BACKWARD)
            around = around.cpu_parent
        self.operator = "" if operator is None else operator.name
        if around is not None and is_dropout_module(self.module):
            self.call, self.line = around, ""
        else:
            self.call = operator or function or event
        if package_of(type(self.module)) in LIBRARIES:
            self.line = ""


@functools.cache
def _names_of_functions() -> frozenset[str]:
    """The names of fastdrop's autograd functions."""
    rooms = (attention, lora, mask, norm, pointwise, softmax)
    ops = [value for room in rooms for value in vars(room).values() if isinstance(value, Op)]
    return frozenset([Dropout.__name__, *(op.signature.__name__ for op in ops)])


class _Finder:
    """Finds the calls that dropped among the events of a step."""

    def __init__(self, modules: list[tuple[str, nn.Module]], events: Any) -> None:
        self.modules, self.events = modules, sorted(events, key=lambda event: event.time_range.start)
        self.found: dict[int, tuple[Any, Call]] = {}
        self.numbers: dict[int, list[tuple[float, int]]] = defaultdict(list)  # by thread: starts and sequence numbers
        for event in self.events:
            if event.sequence_nr >= 0:
                self.numbers[event.thread].append((event.time_range.start, event.sequence_nr))

    def calls(self) -> list[Call]:
        for event in self.events:
            p = self._evidence(event)
            if p is not None:
                self._note(event, p)
        self._measure()
        return [call for _, call in self.found.values()]

    def _evidence(self, event: Any) -> float | None:
        """p, if the event proves that something was dropped; -1 if p is not known."""
        name = event.name
        if name.startswith(KERNEL):
            primitive, _, p = name.removeprefix(KERNEL).partition("/")
            draws = primitive.endswith("_drawn") or primitive in DRAWN
            return float(p) if draws and float(p) > 0.0 else None
        if name in ATTENTION:
            p = _number(event, ATTENTION[name])
            return p if p else None
        return -1.0 if name in DRAWING or name in RANDOM else None

    def _note(self, event: Any, p: float) -> None:
        place = _Place(event, self.modules)
        if place.in_backward:  # a mask that is drawn again from its seed
            return
        if event.name in RANDOM and not (place.operator or rate_name(place.module) or own_random(place.module)):
            return
        _, call = self.found.setdefault(id(place.call), (place.call, self._call(place)))
        if p >= 0.0 and call.p is None:
            call.p = p
        (call.kernels if event.name.startswith(KERNEL) else call.operators).append(_short(event))

    def _call(self, place: _Place) -> Call:
        event = place.call
        if event.name.startswith(MODULE):
            name, p = type(place.module).__name__, number(place.module, rate_name(place.module) or "")
        else:
            name, p = _short(event), _number(event, DROPPING[event.name]) if event.name in DROPPING else None
        shape = next((tuple(shape) for shape in event.input_shapes or () if shape), ()) or place.shape
        return Call(place.path, place.module, name, place.operator, place.compiled, place.line, p, shape)

    def _measure(self) -> None:
        backward = [event for event in self.events if event.name.startswith(BACKWARD)]
        for event, call in self.found.values():
            call.forward = event.time_range.elapsed_us() / 1e3
            inside = [*_inside(event)]
            call.kept = sum(int(each.name.removeprefix(KEPT)) for each in inside if each.name.startswith(KEPT))
            others = [_short(each) for each in inside if each.name.startswith(KERNEL)]
            call.kernels = list(dict.fromkeys(others)) or call.kernels
            first = min((each.sequence_nr for each in inside if each.sequence_nr >= 0), default=None)
            nodes = range(0) if first is None else range(first, self._next_number(event))
            mine = (each for each in backward if each.sequence_nr in nodes and each.fwd_thread == event.thread)
            call.backward = None if call.compiled else sum(map(_own_time, mine))

    def _next_number(self, event: Any) -> int:
        """The number of the first node that was made after an event."""
        numbers = self.numbers[event.thread]
        after = bisect.bisect_left(numbers, (event.time_range.end, 0))
        return numbers[after][1] if after < len(numbers) else 0


def _inside(event: Any) -> Iterator[Any]:
    yield event
    for child in event.cpu_children:
        yield from _inside(child)


def _own_time(event: Any) -> float:
    """Milliseconds of a node in backward, without the modules that a checkpoint runs again there."""
    return float(event.time_range.elapsed_us() / 1e3) - sum(_time_of_modules(child) for child in event.cpu_children)


def _time_of_modules(event: Any) -> float:
    if event.name.startswith(MODULE):
        return float(event.time_range.elapsed_us() / 1e3)
    return sum(map(_time_of_modules, event.cpu_children))


def _number(event: Any, position: int) -> float | None:
    inputs = event.concrete_inputs or ()
    value = inputs[position] if len(inputs) > position else None
    return float(value) if isinstance(value, int | float) else None


def _short(event: Any) -> str:
    name: str = event.name
    return name.removeprefix(KERNEL).partition("/")[0] if name.startswith(KERNEL) else name

"""Private names of torch's compilers and tracers: `torch.compile`, `make_fx`, AOTAutograd and inductor.

Modules of the compilers are large, so those that torch itself has not imported are looked up when they are needed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from torch.fx import traceback

from .names import has, named, require

Function = TypeVar("Function", bound=Callable[..., Any])

# ---- what dynamo looks into ----

_set_strategy = named("torch._C._dynamo.eval_frame.set_code_exec_strategy")
_frame_strategy = named("torch._C._dynamo.eval_frame._FrameExecStrategy")
_skip = named("torch._C._dynamo.eval_frame._FrameAction.SKIP")
_CAN_HIDE = has(_set_strategy, _frame_strategy, _skip)


def hide_from_dynamo(*functions: Callable[..., Any]) -> None:
    """Has these functions, and all that they call, run as they are where a graph breaks: torch need not compile NumPy's
    arithmetic. Without the names for it torch tries to, which takes longer.

    This marks their code, which costs a call nothing. `torch.compiler.disable` wraps them and imports the compiler.
    """
    if _CAN_HIDE:
        strategy = _frame_strategy(_skip, _skip)
        for function in functions:
            _set_strategy(function.__code__, strategy)


def constant_in_graphs(function: Function) -> Function:
    """Has a compiler call a function once, while it traces, and take the result as a constant.

    `torch.compiler.assume_constant_result` does this, and imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# ---- guards ----

_tracing_context = named("torch._guards.TracingContext")


def add_guard(create: Callable[[Any, Any], None]) -> bool:
    """Adds a guard to what is being compiled, if it has none by this function; returns whether something is.

    ``create(builder, guard)`` calls `guard_by` when the compiler builds the code's guards.
    """
    compiling = None if _tracing_context is None else _tracing_context.try_get()
    if compiling is None:
        return False
    if all(guard.create_fn is not create for guard in compiling.guards_context.dynamo_guards):
        install = named("torch._dynamo.guards.install_guard")
        source = named("torch._dynamo.source.GlobalStateSource")
        require(
            "compiled dropout that follows fastdrop.torch.enable()",
            "torch._dynamo.guards.install_guard",
            "torch._dynamo.source.GlobalStateSource",
        )
        install(source().make_guard(create))
    return True


def guard_by(builder: Any, guard: Any, holds: Callable[[Any], bool], reason: str) -> None:
    builder.guard_manager.root.add_lambda_guard(holds, [reason], guard.user_stack)


# ---- modules that code comes from ----


def modules_being_traced() -> list[str]:
    """The ids of the modules that a call of a graph came from, outermost first, while AOTAutograd traces it. Those of
    later calls of a module end in "@1", "@2" and so on."""
    return list(traceback.get_current_meta().get("nn_module_stack") or ())


@functools.cache
def _functorch_config() -> Any:
    """Settings of AOTAutograd, which take a while to import and which only traced calls need."""
    return named("torch._functorch.config")


def cache_graphs(on: bool) -> bool:
    """Whether AOTAutograd may take a graph from its cache from now on. Returns whether it was so before.

    The cache does not know which modules a graph comes from."""
    before: bool = getattr(_functorch_config(), "enable_autograd_cache", False)
    if before != on:
        _functorch_config().enable_autograd_cache = on
    return before


# ---- tensors of tracers ----


class _Never:
    """No tensor is one."""


FakeTensor: Any = named("torch._subclasses.FakeTensor", _Never)
FunctionalTensor: Any = named("torch._subclasses.functional_tensor.FunctionalTensor", _Never)


# ---- what backward computes again ----


def memory_budget() -> float:
    """The share of activations that AOTAutograd may keep for backward: 1 if nothing limits it."""
    budget: float = getattr(_functorch_config(), "activation_memory_budget", 1.0)
    return budget


def runs_again_in_backward(frame: FrameType | None) -> bool:
    """Whether what is traced is a part of a program that backward will run again.

    Such parts are branches of `torch.cond` and bodies of loops, whose backward calls their forward, and, with a memory
    budget, regions that are compiled once. Nothing in the graph says so. The frames of the tracing code do.
    """
    while frame is not None:
        directory, _, file = frame.f_code.co_filename.rpartition("/")
        if directory.endswith("_higher_order_ops"):
            calls_forward = file == "utils.py" and frame.f_locals.get("return_fw_outputs") is False
            if calls_forward or (file == "invoke_subgraph.py" and memory_budget() < 1):
                return True
        frame = frame.f_back
    return False


# The number of the backward pass that this thread is in, -1 if none.
current_backward: Callable[[], int] = named("torch._C._current_graph_task_id", lambda: 0)


def is_recomputed(frame: FrameType | None) -> bool:
    """Whether a checkpoint in backward computes a part of forward again: torch's, in both forms, or a library's like
    torch's. Frames tell, because a hook of a gradient may drop in backward too, and for the first time."""
    if current_backward() == -1:
        return False
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        code = frame.f_code
        if code.co_name in ("unpack_hook", "backward") and "checkpoint" in code.co_qualname.lower():
            return True
        frame = frame.f_back
    return False


def let_inductor_call(name: str) -> None:
    """Has inductor call an op as it is, also where it is told not to do so with ops that it doesn't know."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and hasattr(lowering, "FALLBACK_ALLOW_LIST"):
        lowering.FALLBACK_ALLOW_LIST.add(name)


def is_dynamo_imported() -> bool:
    return "torch._dynamo" in sys.modules


@contextlib.contextmanager
def stance_kept() -> Iterator[None]:
    """Puts `torch.compiler.set_stance` back where an exception from a signal kept torch from it."""
    eval_frame = named("torch._dynamo.eval_frame")
    before = getattr(eval_frame, "_stance", None)
    try:
        yield
    finally:
        if before is not None:
            eval_frame._stance = before

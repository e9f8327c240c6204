"""`report` runs training steps of a model and tells for each dropout which code really dropped, and why.

`step_events` finds the calls, `step_table` prints them. This module restores the model's state, adds up times, and says
which function of fastdrop reaches what torch dropped.
"""

from __future__ import annotations

import contextlib
import platform
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ... import __version__, backends
from ...backends.primitives import PRIMITIVES
from ...core import checks
from ..models.classes import class_for, is_listed
from ..models.enable import OVERRIDDEN
from ..models.fuse.fuse import would_fuse
from ..models.fuse.rules import Fused
from ..models.rates import number, rate_name
from ..models.reasons import why_left, why_lent
from ..models.report import MODEL
from ..models.source.owners import Owners
from ..nn.base import Rated
from ..ops.lora import Lora
from ..runtime.context import is_enabled
from ..runtime.dispatch.modules import buffers_of, is_compiled
from ..runtime.dispatch.ops import tree_leaves, tree_map_only
from ..runtime.dispatch.tensors import has_hook_after_gradient
from ..runtime.names import uncounted
from .monte_carlo import inputs_of
from .step_events import Call, is_dropout_module, modules_in_compiled, record
from .step_table import DropoutRow, StepReport

__all__ = ["report"]

HIDDEN = (
    "Compiled: {}. Calls in it are listed with the module that calls it; what torch's compiler drops in kernels of "
    "its own, and what compiled code keeps and takes in backward, can't be seen. Run the model before torch.compile to "
    "see it."
)


def report(
    model: nn.Module,
    example_input: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    runs: int = 3,
) -> StepReport:
    """Runs training steps of a model, and tells which code dropped where, how long it took and what it kept.

    Parameters
    ----------
    model : Module
        It may be converted, fused, compiled, or run under `enable`, or nothing of it: the report then says what
        fastdrop would reach.
    example_input : Tensor, tuple, dict or anything else
        The model's argument. A tuple has several arguments, a dict has arguments with names.
    kwargs : dict, optional
        Arguments with names, in addition to those of example_input.
    loss : callable, optional
        Takes what the model returns and returns a Tensor of one number.
    runs : int
        How many steps are timed, 1 or more. The report has their medians.

    Returns
    -------
    StepReport
        Prints as a table to paste into an issue; ``to_dict()`` is for JSON.

    Raises
    ------
    TypeError
        model that is no Module; kwargs that is no dict; loss that can't be called; a model that returns no floating
        tensor, or a loss that is none.
    ValueError
        runs below 1; a model with lazy parameters.
    RuntimeError
        Parameters whose hooks step an optimizer; another profiler that is on.

    Notes
    -----
    The model stays as it is: its mode, gradients and buffers are put back, and so are the states of random generators.
    If the model is in evaluation mode, it is put in training mode for the steps; otherwise each module keeps its mode.
    A step is a forward and a backward pass, from the sum of the means of all floating outputs unless ``loss`` is given.
    No optimizer runs. Each step gets copies of the tensors in the arguments.

    Times of calls are measured by torch's profiler in steps in which hooks and the profiler are on, which adds some
    microseconds to each call. On a GPU they are of the host, which does not wait for the device.

    What the model raises is raised.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.25), fdt.Dropout(0.5))
    >>> [(row.path, row.by, row.p, row.kept_bytes) for row in fdt.report(model, torch.ones(4, 8)).rows]
    [('1', 'torch', 0.25, 128), ('2', 'fastdrop', 0.5, 4)]
    """
    checks.number_from("runs", checks.integer("runs", runs), 1)
    if loss is not None:
        checks.function("loss", loss)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    arguments, keywords = inputs_of(example_input, kwargs)
    _check(model)
    compiled = [path for path, module in model.named_modules() if is_compiled(module)]

    def step() -> None:
        given, named = tree_map_only(Tensor, _copy, (arguments, keywords))
        _backward(model(*given, **named), loss)

    with _unchanged(model):
        step()  # compiles, and allocates
        first = record(model, step, closely=not compiled)
        timed = [record(model, step) for _ in range(int(runs))]
        step_ms = statistics.median(_milliseconds(step) for _ in range(int(runs)))
        enabled = bool(is_enabled())
        rows = _rows(model, first, timed, step_ms, enabled, bool(compiled))
        silent = _silent(model, first)
    notes = [HIDDEN.format(", ".join(path or MODEL for path in compiled))] if compiled else []
    return StepReport(_header(model, enabled), step_ms, rows, silent, notes)


def _check(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"model must have been run once, but {name} is lazy and has no shape yet")
        if has_hook_after_gradient(parameter):
            raise RuntimeError(
                f"report would train the model: {name} has a hook that runs once its gradient is there, as an "
                "optimizer in backward has; remove it first"
            )


# ---- a step ----


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _backward(output: Any, loss: Callable[[Any], Tensor] | None) -> None:
    if loss is not None:
        total = loss(output)
        if not isinstance(total, Tensor):
            raise TypeError(f"loss must return a Tensor of one number, but got {type(total).__name__}")
    else:
        floating = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
        if not floating:
            raise TypeError(f"model must return a floating Tensor, but got {type(output).__name__}: give loss=")
        total = sum((x.mean() for x in floating if x.requires_grad), torch.zeros(()))
    if total.requires_grad:
        total.backward()


def _milliseconds(step: Callable[[], None]) -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """A block of training after which the model and all generators are as they were before."""
    modules = [*model.modules()]
    modes = [(module, module.training) for module in modules]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffers_of(module), dict(buffers_of(module))) for module in modules]
    values = [(buffer, buffer.clone()) for _, named in buffers for buffer in named.values() if buffer is not None]
    sources = {id(one.own_source): one.own_source for one in modules if isinstance(one, Rated)}
    positions = [(source, source.position()) for source in sources.values() if source is not None]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad(), uncounted():
            for parameter, _ in gradients:
                parameter.grad = None
            if not model.training:
                model.train()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for of_module, named in buffers:
            for name in {*of_module.keys()} - {*named}:
                del of_module[name]
            for name, buffer in named.items():
                of_module[name] = buffer
        for buffer, value in values:
            buffer.data.copy_(value)  # .data: a graph that is waiting for its backward may hold the buffer's version
        for source, position in positions:
            source.move_to(position)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


# ---- rows ----

Key = tuple[Any, ...]


def _keys(calls: list[Call]) -> list[Key]:
    """What tells calls apart in any run: the module, what it called, and the how manieth such call it was."""
    seen: Counter[Key] = Counter()
    keys = []
    for call in calls:
        which = call.path, call.name
        keys.append((*which, seen[which]))
        seen[which] += 1
    return keys


def _rows(
    model: nn.Module, first: list[Call], timed: list[list[Call]], step_ms: float, enabled: bool, compiled: bool
) -> list[DropoutRow]:
    """Rows of the calls of the first run that are alike, with the times of the other runs."""
    times: dict[Key, list[Call]] = defaultdict(list)
    for calls in timed:
        for key, call in zip(_keys(calls), calls, strict=True):
            times[key].append(call)
    groups: dict[Key, list[tuple[Key, Call]]] = defaultdict(list)
    lines = _lines_of(first)
    for key, call in zip(_keys(first), first, strict=True):
        call.line = lines.get((call.path, call.name), call.line)
        what = call.path, call.name, call.line, call.p, call.shape, (*call.kernels,), (*call.operators,)
        groups[what].append((key, call))
    rows = []
    for members in groups.values():
        call = members[0][1]
        same = [times[key] or [one] for key, one in members]
        forward = sum(statistics.median(one.forward for one in calls) for calls in same)
        backward = None if call.compiled else sum(statistics.median(one.backward or 0.0 for one in c) for c in same)
        fastdrops = bool(call.kernels) and not call.operators
        reached = () if fastdrops else _reached_by(model, call)
        rows.append(
            DropoutRow(
                path=call.path,
                call=call.name,
                line=call.line,
                by="fastdrop" if fastdrops else "torch",
                code=tuple(
                    dict.fromkeys(call.kernels if fastdrops else filter(None, (call.operator, *call.operators)))
                ),
                fused=_is_fused(call),
                p=call.p,
                shape=call.shape,
                runs=len(members),
                forward_ms=forward,
                backward_ms=backward,
                share=None if backward is None else (forward + backward) / step_ms,
                kept_bytes=None if compiled else sum(one.kept for _, one in members),
                reached_by=tuple(name for name in reached if not (enabled and name == "enable")),
                why="" if fastdrops else _why(reached, enabled, call),
            )
        )
    return rows


def _is_fused(call: Call) -> bool:
    # LoRA's matrix products are torch's, but its op keeps their inputs together with the mask.
    return call.name == Lora.__name__ or any(
        PRIMITIVES[kernel.removesuffix("_drawn")].is_fused for kernel in call.kernels
    )


def _lines_of(calls: list[Call]) -> dict[Key, str]:
    """The line of all such calls of a module, where only one is known: those of a checkpoint in backward have none."""
    lines: dict[Key, set[str]] = defaultdict(set)
    for call in calls:
        lines[call.path, call.name].add(call.line)
    known = {what: found - {""} for what, found in lines.items()}
    return {what: found.pop() for what, found in known.items() if len(found) == 1}


def _reached_by(model: nn.Module, call: Call) -> tuple[str, ...]:
    """Which functions of fastdrop would have a call of torch drop by fastdrop."""
    reached = []
    whole, module = is_dropout_module(call.module), call.module
    name = call.operator.removeprefix("aten::")
    on_gpu = next((x.is_cuda for x in model.parameters()), False) and name == "scaled_dot_product_attention"
    if (name in OVERRIDDEN and not on_gpu) or (whole and not call.operator and is_listed(module)):
        reached.append("enable")
    if whole and class_for(module) is not None and not why_left(module):
        reached.append("convert")
    parent = dict(model.named_modules())[call.path.rpartition(".")[0]]  # scripted modules have no get_submodule
    if (parent is not module and would_fuse(parent, module)) or (not whole and would_fuse(module)):
        reached.append("fuse")
    return tuple(reached)


def _why(reached: tuple[str, ...], enabled: bool, call: Call) -> str:
    if call.compiled:
        return "it ran in compiled code"
    if enabled and "enable" in reached:
        return "fdt.enable() is on, but has no kernel for these tensors"
    if not reached:
        return "nothing of fastdrop reaches it"
    *names, last = (f"fdt.{name}()" for name in reached)
    says = f"{', '.join(names)} and {last} reach it" if names else f"{last} reaches it"
    return says if "convert" in reached else f"{says}, fdt.convert() does not"


def _silent(model: nn.Module, calls: list[Call]) -> list[tuple[str, str]]:
    """Dropout modules that dropped nothing, with the reason. Those in fused layers drop in the layer's own calls."""
    called = {id(call.module) for call in calls}
    hidden = modules_in_compiled(model)
    owners, silent = Owners(model), []
    fused = [path for path, module in model.named_modules() if isinstance(module, Fused)]
    for path, module in model.named_modules():
        name = rate_name(module)
        in_fused = any(path.startswith(f"{layer}." if layer else "") for layer in fused)
        if name is None or id(module) in called or id(module) in hidden or in_fused:
            continue
        if not number(module, name):
            reason = "p is 0"
        elif not module.training:
            reason = "they are in evaluation mode"
        elif why_lent(owners, module):
            reason = "only their p is read"
        else:
            reason = "they were not called, or their call could not be seen"
        silent.append((path, reason))
    return silent


# ---- printing ----


def _header(model: nn.Module, enabled: bool) -> dict[str, str]:
    backend = backends.active()
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "fastdrop": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "backend": backends.active_name() + (f" ({backend.isa()})" if hasattr(backend, "isa") else ""),
        "threads": str(torch.get_num_threads()),
        "device": f"{device} ({where})",
        "fdt.enable()": "on" if enabled else "off",
    }


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()  # on Arm they have no name
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return platform.processor() or platform.machine()

"""What is timed on a GPU: a function per section, which returns the section's items by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastdrop.backends.cuda import driver

from .processes import Item, Task, one_line
from .races import COPY, Contender, race, race_on_host

DTYPES = ("float32", "bfloat16")
FUSED_SIZES = ("16384 x 4096", "8192 x 1024", "2048 x 2048")
FUSED_DTYPES = ("bfloat16", "float32", "float16")
LAYOUTS = ("contiguous_format", "channels_last")
HOST_ELEMENTS = 1000
P, L2_TURNS = 0.1, 4

OURS, SEEDED, EAGER, COMPILED, TRITON = "fastdrop", 'fastdrop, store="seed"', "torch", "torch.compile", "triton"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
NO_GRAD, THEIRS = "no grad", "F.dropout"

Step = Callable[[int], object]  # of a buffer
Operations = dict[str, tuple[int | None, tuple[Step, ...]]]  # bytes, and steps that each do all buffers in turn


def fused_cases() -> Any:
    from bench.torch import fused_cases

    return fused_cases


# ---- a function and its gradients ----


def kernels(quick: bool) -> dict[str, Item]:
    sizes = ("256M", "16M") if quick else ("256M", "16M", "1M")
    return {
        f"{size} {dtype} p={p}": partial(time_dropout, size=size, dtype=dtype, p=p)
        for p, size, dtype in itertools.product((P,) if quick else (P, 0.5), sizes, DTYPES)
    }


def channels(quick: bool) -> dict[str, Item]:
    return {
        f"{dtype}, {layout}": partial(time_channels, dtype=dtype, layout=layout)
        for dtype, layout in itertools.product(DTYPES, LAYOUTS)
    }


def fused(quick: bool) -> dict[str, Item]:
    sizes, dtypes = (FUSED_SIZES[:1], FUSED_DTYPES[:2]) if quick else (FUSED_SIZES, FUSED_DTYPES)
    return {
        f"{name}, {size} {dtype}": partial(time_fused, name=name, size=size, dtype=dtype)
        for size, dtype, name in itertools.product(sizes, dtypes, fused_cases().FUSED)
    }


def time_dropout(task: Task, size: str, dtype: str, p: float) -> dict[str, Any]:
    cases, x = fused_cases(), rotation(task.machine, size, dtype)
    ours = {OURS: cases.dropout(p), SEEDED: cases.dropout(p, store="seed")}
    more: Operations = {}
    notes = {}
    try:
        from .triton_dropout import dropout

        y = [task.machine.torch.empty_like(each) for each in x]
        seeded: Step = lambda i: dropout(x[i], y[i], p, i)  # noqa: E731
        seeded(0)
        assert abs(float((y[0] == 0).double().mean()) - p) < 0.01, "it is wrong"
        more = {f"{TRITON} {what}": (ours[SEEDED].moved(x[0])[0], (seeded,)) for what in (FORWARD, BACKWARD)}
        more[f"{TRITON} {BOTH}"] = sum(ours[SEEDED].moved(x[0])), (seeded, seeded)
    except Exception as error:
        notes[TRITON] = one_line(error)
    return time_functions(task, ours, x, p == P, 3.0, more, notes)


def time_channels(task: Task, dtype: str, layout: str) -> dict[str, Any]:
    x = rotation(task.machine, "images", dtype, layout)
    return time_functions(task, {OURS: fused_cases().dropout2d()}, x, False, 2.0)


def time_fused(task: Task, name: str, size: str, dtype: str) -> dict[str, Any]:
    x = rotation(task.machine, size, dtype)
    return time_functions(task, {OURS: fused_cases().FUSED[name]}, x, size == FUSED_SIZES[0], 1.5)


def time_functions(
    task: Task,
    ours: dict[str, Any],
    x: list[Any],
    compiles: bool,
    seconds: float,
    more: Operations | None = None,
    notes: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Our functions and their gradients, beside a copy of memory and the formula in torch, eager and compiled."""
    machine, cases, notes = task.machine, fused_cases(), notes or {}
    first, y = ours[OURS], [machine.torch.empty_like(each) for each in x]
    tensors = [first.tensors(each) for each in x]
    count = len(cases.results(first.ours, tensors[0]))
    upstream = [tuple(machine.torch.randn_like(each) for _ in range(count)) for each in x]
    for function in ours.values():
        cases.assert_right(function, tensors[0], upstream[0])

    operations: Operations = {COPY: (copied_bytes(x), (lambda i: y[i].copy_(x[i]),))}
    for who, function in ours.items():
        nbytes = dict(zip((FORWARD, BACKWARD, BOTH), (*function.moved(x[0]), sum(function.moved(x[0]))), strict=True))
        ours_passes = passes(function.ours, tensors, upstream)
        operations |= {f"{who} {what}": (nbytes[what], steps) for what, steps in ours_passes.items()}
    eager = passes(first.formula, tensors, upstream)
    operations |= {f"{EAGER} {what}": (None, steps) for what, steps in eager.items()}
    if compiles:  # without backward alone, which would need what compiled code frees
        compiled = passes(machine.compile(first.formula), tensors, upstream)
        operations |= {f"{COMPILED} {what}": (None, compiled[what]) for what in (FORWARD, BOTH)}
    contenders = captured(task, len(x), operations | (more or {}), notes)
    return {"rows": race(machine, contenders, task.share(seconds), COPY, f"{OURS} {BOTH}"), "notes": notes}


def passes(
    function: Callable[..., Any], tensors: list[dict[str, Any]], upstream: list[Any]
) -> dict[str, tuple[Step, ...]]:
    """Forward, backward alone, and both, on each buffer's tensors; results stay until the next ones replace them."""
    cases = fused_cases()
    held: dict[str, list[Any]] = {what: [None] * len(tensors) for what in (FORWARD, BACKWARD, "lasting")}

    def forward(i: int) -> None:
        held[FORWARD][i] = cases.results(function, tensors[i])

    def backward(i: int) -> None:
        held[BACKWARD][i] = cases.gradients(held[FORWARD][i], tensors[i], upstream[i])

    def backward_alone(i: int) -> None:
        if held["lasting"][i] is None:  # not before: it goes to the stream that forward went to
            held["lasting"][i] = cases.results(function, tensors[i])
        held[BACKWARD][i] = cases.gradients(held["lasting"][i], tensors[i], upstream[i], again=True)

    return {FORWARD: (forward,), BACKWARD: (backward_alone,), BOTH: (forward, backward)}


def rotation(machine: Any, shape: str, dtype: str, layout: str = "contiguous_format") -> list[Any]:
    """Inputs, so many that the cache has nothing of one when its turn comes again; at least two."""
    machine.free()
    torch = machine.torch
    first = torch.randn(machine.shapes[shape], dtype=getattr(torch, dtype), device=machine.device)
    first = first.contiguous(memory_format=getattr(torch, layout))
    count = max(2, -(-L2_TURNS * machine.l2_bytes // (first.numel() * first.element_size())))
    return [first, *(torch.randn_like(first) for _ in range(count - 1))]


def copied_bytes(x: list[Any]) -> int:
    return int(2 * x[0].numel() * x[0].element_size())


def captured(task: Task, buffers: int, operations: Operations, notes: dict[str, str]) -> list[Contender]:
    """Each as a graph, or launched one by one where none could be captured; in ``notes`` what went wrong."""
    machine, contenders = task.machine, []
    for name, (nbytes, steps) in operations.items():

        def enqueue(steps: Sequence[Step] = steps) -> None:
            for step in steps:  # of all buffers before the next one: backward finds nothing of forward in the cache
                for i in range(buffers):
                    step(i)

        call: Callable[[], object] = enqueue
        try:
            machine.warm_up(enqueue)
        except Exception as error:
            notes[name] = one_line(error)
            machine.synchronize()  # raises if the GPU is lost to this process
            continue
        try:
            call = machine.capture(enqueue)
        except Exception as error:
            task.is_spoiled = True  # torch's allocator and generator may stay in the capture
            notes[name] = f"launched one by one, since no graph could be captured: {one_line(error)}"
        contenders.append(Contender(name, call, buffers, nbytes))
    return contenders


# ---- the host ----


def host(quick: bool) -> dict[str, Item]:
    return {"calls": time_host_calls, "kept": kept_bytes}


def kept_bytes(task: Task) -> dict[str, int]:
    """Bytes of the tensors that forward saves for backward."""
    import fastdrop.torch as fdt

    torch = task.machine.torch
    x = torch.randn(HOST_ELEMENTS, device=task.machine.device, requires_grad=True)
    kept = {}
    for name, function in ((OURS, fdt.dropout), (THEIRS, torch.nn.functional.dropout)):
        seen: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, seen=seen: seen.append(tensor), lambda _: _):
            function(x, P)
        kept[name] = sum(tensor.numel() * tensor.element_size() for tensor in seen)
    return kept


def time_host_calls(task: Task) -> dict[str, Any]:
    import fastdrop.torch as fdt

    torch = task.machine.torch
    ours, theirs, grad = fdt.dropout, torch.nn.functional.dropout, torch.autograd.grad
    x = torch.randn(HOST_ELEMENTS, device=task.machine.device)
    leaf, dy = x.detach().clone().requires_grad_(), torch.randn_like(x)
    named: dict[str, Callable[[], object]] = {
        f"{THEIRS}, {NO_GRAD}": lambda: theirs(x, P),
        f"{THEIRS}, {FORWARD}": lambda: theirs(leaf, P),
        f"{THEIRS}, {BOTH}": lambda: grad(theirs(leaf, P), leaf, dy),
        f"{OURS}, {NO_GRAD}": lambda: ours(x, P),
        f"{OURS}, seed=7, {NO_GRAD}": lambda: ours(x, P, seed=7),
        f"{OURS}, {FORWARD}": lambda: ours(leaf, P),
        f"{OURS}, {BOTH}": lambda: grad(ours(leaf, P), leaf, dy),
        f"{SEEDED}, {BOTH}": lambda: grad(ours(leaf, P, store="seed"), leaf, dy),
    }
    return race_on_host(task.machine, named, task.share(5.0), *[name for name in named if name.startswith(THEIRS)])


# ---- launch shapes ----

SHAPES = tuple(itertools.product((64, 128, 256, 512), (4, 8, 16, 32, 64, 4096)))  # threads, blocks per SM


def tune(quick: bool) -> dict[str, Item]:
    return {
        f"{size} {dtype}": partial(time_shapes, size=size, dtype=dtype)
        for size, dtype in itertools.product(("256M", "16M"), DTYPES)
    }


def time_shapes(task: Task, size: str, dtype: str) -> dict[str, Any]:
    """Forward and backward, in blocks of each shape."""
    machine, torch, function = task.machine, task.machine.torch, fused_cases().dropout(P)
    x = rotation(machine, size, dtype)
    steps = passes(function.ours, [function.tensors(each) for each in x], [(each,) for each in x])
    sms, default = machine.describe()["sms"], (driver.THREADS, driver.BLOCKS_PER_SM)
    notes: dict[str, str] = {}
    y = [torch.empty_like(each) for each in x]
    contenders = captured(task, len(x), {COPY: (copied_bytes(x), (lambda i: y[i].copy_(x[i]),))}, notes)
    for threads, per_sm in dict.fromkeys([default, *SHAPES]):
        operations: Operations = {
            f"{what} {threads} x {per_sm}": (nbytes, steps[what])
            for what, nbytes in zip((FORWARD, BACKWARD), function.moved(x[0]), strict=True)
        }
        with machine.launch_shape(threads, per_sm * sms):
            found = captured(task, len(x), operations, notes)
        contenders += [contender for contender in found if contender.name not in notes]  # only a graph keeps its shape
    rows = race(machine, contenders, task.share(12.0), COPY)
    ordered = dict(sorted(rows.items(), key=lambda named: named[1]["seconds"]))
    return {"default": f"{default[0]} x {default[1]}", "rows": ordered, "notes": notes}

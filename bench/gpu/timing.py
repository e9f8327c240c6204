"""What is timed on a GPU: a function per section, which returns the section's items by name."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from fastdrop import backends
from fastdrop.backends.cuda import driver
from fastdrop.core.checks import BFLOAT16, FLOAT32
from fastdrop.core.random import threshold_and_scale

from .processes import Item, Skip, Task, one_line
from .races import COPY, Contender, for_each, moved, race, race_on_host, rotation

DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16}
FUSED_SIZES = ("16384 x 4096", "8192 x 1024", "2048 x 2048")
FUSED_DTYPES = ("bfloat16", "float32", "float16")
HOST_ELEMENTS = 1000
SEED = 0x9E3779B97F4A7C15

OURS, SEEDED, NATIVE, COMPILED, TRITON = "fastdrop", 'fastdrop, store="seed"', "native", "torch.compile", "triton"
EAGER = "torch"
FORWARD, BACKWARD, REGENERATE, BOTH = "forward", "backward", "regenerate", "forward+backward"
NO_GRAD, THEIRS = "no grad", "F.dropout"
COMPILE_WORKS = "torch.compile works"

Step = Callable[[int], object]  # of a buffer
Operations = dict[str, tuple[int | None, tuple[Step, ...]]]  # bytes, steps as for `for_each`


def captured(task: Task, buffers: Sequence[Any], operations: Operations, notes: dict[str, str]) -> list[Contender]:
    """Each as a graph, or launched one by one where none could be captured; in ``notes`` what went wrong."""
    machine, contenders = task.machine, []
    for name, (nbytes, steps) in operations.items():
        enqueue = call = for_each(buffers, *steps)
        try:
            enqueue = machine.capture(call)
        except Exception as error:
            task.is_spoiled = True  # torch's allocator and generator may stay in the capture
            notes[name] = f"launched one by one, since no graph could be captured: {one_line(error)}"
            try:
                call()
                machine.synchronize()
            except Exception as again:
                notes[name] = one_line(again)
                continue
        contenders.append(Contender(name, enqueue, len(buffers), nbytes))
    return contenders


def fdt() -> Any:
    import fastdrop.torch

    return fastdrop.torch


def fused_cases() -> Any:
    from bench.torch import fused_cases

    return fused_cases


def copies(x: Sequence[Any], y: Sequence[Any]) -> tuple[int, tuple[Step, ...]]:
    return moved(x[0].numel(), x[0].element_size(), 1), (lambda i: y[i].copy_(x[i]),)


# ---- kernels ----


def kernels(quick: bool) -> dict[str, Item]:
    items: dict[str, Item] = {COMPILE_WORKS: try_compile}
    sizes = ("256M", "16M") if quick else ("256M", "16M", "1M")
    for p, size, dtype in itertools.product((0.1,) if quick else (0.1, 0.5), sizes, DTYPES):
        items[f"{size} {dtype} p={p}"] = lambda task, case=(size, dtype, p): time_kernels(task, *case)
    return items


def try_compile(task: Task) -> dict[str, Any]:
    """Whether torch.compile works here; and its first start, which takes longest, apart."""
    machine, torch = task.machine, task.machine.torch
    x = torch.randn(4096, device=machine.device, requires_grad=True)
    torch.autograd.grad(compiled_dropout(machine, 0.1)(x).sum(), x)
    machine.synchronize()
    return {}


def compiled_dropout(machine: Any, p: float) -> Callable[[Any], Any]:
    dropout = machine.torch.nn.functional.dropout
    return machine.compile(lambda x: dropout(x, p, True))  # type: ignore[no-any-return]


def triton_dropout(task: Task) -> Any:
    if importlib.util.find_spec("triton") is None:
        raise Skip("triton is not installed")
    if task.dry_run:
        raise Skip("it needs a GPU")
    from . import triton_dropout

    return triton_dropout.dropout


def why_not_compiled(task: Task, is_case: bool, only: str) -> str | None:
    row = task.found.get(COMPILE_WORKS, {})
    if row.get("status") != "ok":
        return str(row.get("error", "not tried"))
    return None if is_case else f"timed at {only} alone, since compiling takes long"


def primitives(machine: Any, x: Any, y: Any, words: Any, tag: int, p: float) -> dict[str, Callable[[int], object]]:
    """Our kernels by address on one buffer, given a seed."""
    threshold, scale = threshold_and_scale(p)
    backend, stream, n = machine.backend, machine.stream, x.numel()
    a, b, w = x.data_ptr(), y.data_ptr(), words.data_ptr()
    rest = 0, threshold, scale, 0.0, 0.0
    return {
        FORWARD: lambda seed: backend.dropout_forward_at(0, stream(), tag, a, b, w, 0, n, seed, *rest),
        BACKWARD: lambda seed: backend.masked_affine_at(0, stream(), tag, a, b, w, 0, 1, 1, n, scale, 0.0, 0.0),
        REGENERATE: lambda seed: backend.dropout_forward_at(0, stream(), tag, a, b, 0, 0, n, seed, *rest),
    }


def time_kernels(task: Task, size: str, dtype_name: str, p: float) -> dict[str, Any]:
    machine, torch = task.machine, task.machine.torch
    x = rotation(machine, machine.sizes[size], dtype_name)
    y = [torch.empty_like(each) for each in x]
    n, itemsize = x[0].numel(), x[0].element_size()
    words = [torch.empty((n + 31) // 32, dtype=torch.int32, device=machine.device) for _ in x]
    ours = [primitives(machine, *each, DTYPES[dtype_name], p) for each in zip(x, y, words, strict=True)]
    forward, backward, regenerate = (
        (lambda i, name=name: ours[i][name](SEED + i)) for name in (FORWARD, BACKWARD, REGENERATE)
    )
    held: dict[str, list[Any]] = {name: [None] * len(x) for name in ("y", "dx")}

    def native_forward(i: int) -> None:
        held["y"][i] = torch.native_dropout(x[i], p, True)

    def native_backward(i: int) -> None:
        held["dx"][i] = torch.ops.aten.native_dropout_backward(x[i], held["y"][i][1], 1.0 / (1.0 - p))

    width = min(4096, n)
    with backends.use_backend("numpy"):
        expected = fdt().dropout(x[0][:width].cpu(), p, seed=SEED)
    for name, step in ((FORWARD, forward), (BACKWARD, backward), (REGENERATE, regenerate)):
        step(0)
        assert torch.equal(y[0][:width].cpu(), expected), f"{name} is wrong"

    one, mask = moved(n, itemsize, 1), moved(n, itemsize, 0, 1)
    operations: Operations = {
        COPY: copies(x, y),
        f"{OURS} {FORWARD}": (one + mask, (forward,)),
        f"{OURS} {BACKWARD}": (one + mask, (backward,)),
        f"{OURS} {REGENERATE}": (one, (regenerate,)),
        f"{OURS} {BOTH}": (2 * (one + mask), (forward, backward)),
        f"{SEEDED} {BOTH}": (2 * one, (regenerate, regenerate)),
        f"{NATIVE} {FORWARD}": (one + n, (native_forward,)),
        f"{NATIVE} {BACKWARD}": (one + n, (native_backward,)),
        f"{NATIVE} {BOTH}": (2 * (one + n), (native_forward, native_backward)),
    }
    notes: dict[str, str] = {}
    try:
        triton = triton_dropout(task)
        seeded = lambda i: triton(x[i], y[i], p, i)  # noqa: E731
        seeded(0)
        assert abs(float((y[0] == 0).double().mean()) - p) < 0.01, "triton's is wrong"
        operations |= {f"{TRITON} {FORWARD}": (one, (seeded,)), f"{TRITON} {BOTH}": (2 * one, (seeded, seeded))}
    except Exception as error:
        notes[TRITON] = str(error) if isinstance(error, Skip) else one_line(error)
    if why := why_not_compiled(task, p == 0.1, "p = 0.1"):
        notes[COMPILED] = why
    else:
        compiled, leaves = compiled_dropout(machine, p), [each.detach().requires_grad_() for each in x]

        def compiled_forward(i: int) -> None:
            held["y"][i] = compiled(leaves[i])

        def compiled_backward(i: int) -> None:
            (held["dx"][i],) = torch.autograd.grad(held["y"][i], leaves[i], x[i])

        operations[f"{COMPILED} {FORWARD}"] = None, (compiled_forward,)
        operations[f"{COMPILED} {BOTH}"] = None, (compiled_forward, compiled_backward)
    rows = race(machine, captured(task, x, operations, notes), task.share(3.0), COPY, f"{OURS} {BOTH}")
    return {"case": f"{size} {dtype_name} p={p}", "elements": n, "rows": rows, "notes": notes}


# ---- fused kernels ----


def fused(quick: bool) -> dict[str, Item]:
    items: dict[str, Item] = {COMPILE_WORKS: try_compile}
    sizes, dtypes = (FUSED_SIZES[:1], FUSED_DTYPES[:2]) if quick else (FUSED_SIZES, FUSED_DTYPES)
    for size, dtype, name in itertools.product(sizes, dtypes, fused_cases().FUSED):
        items[f"{name}, {size} {dtype}"] = lambda task, case=(name, size, dtype): time_fused(task, *case)
    return items


def time_fused(task: Task, name: str, size: str, dtype_name: str) -> dict[str, Any]:
    """Whole calls and their gradients, beside torch's formula, eager and compiled."""
    machine, torch, cases = task.machine, task.machine.torch, fused_cases()
    ours, x = cases.FUSED[name], rotation(machine, machine.matrices[size], dtype_name)
    y = [torch.empty_like(each) for each in x]
    tensors = [ours.tensors(each) for each in x]
    count = len(cases.results(ours.ours, tensors[0]))
    upstream = [tuple(torch.randn_like(each) for _ in range(count)) for each in x]
    cases.assert_right(ours, tensors[0], upstream[0])

    def steps(function: Callable[..., Any]) -> dict[str, tuple[Step, ...]]:
        held: dict[str, list[Any]] = {what: [None] * len(x) for what in (FORWARD, BACKWARD, "lasting")}

        def forward(i: int) -> None:
            held[FORWARD][i] = cases.results(function, tensors[i])

        def backward(i: int) -> None:
            held[BACKWARD][i] = cases.gradients(held[FORWARD][i], tensors[i], upstream[i])

        def backward_alone(i: int) -> None:
            if held["lasting"][i] is None:  # not before: it goes to the stream that forward went to
                held["lasting"][i] = cases.results(function, tensors[i])
            held[BACKWARD][i] = cases.gradients(held["lasting"][i], tensors[i], upstream[i], again=True)

        return {FORWARD: (forward,), BACKWARD: (backward_alone,), BOTH: (forward, backward)}

    of_forward, of_backward = ours.moved(x[0])
    nbytes = {FORWARD: of_forward, BACKWARD: of_backward, BOTH: of_forward + of_backward}
    operations: Operations = {COPY: copies(x, y)}
    operations |= {f"{OURS} {what}": (nbytes[what], calls) for what, calls in steps(ours.ours).items()}
    operations |= {f"{EAGER} {what}": (None, calls) for what, calls in steps(ours.formula).items()}
    notes: dict[str, str] = {}
    if why := why_not_compiled(task, size == FUSED_SIZES[0], FUSED_SIZES[0]):
        notes[COMPILED] = why
    else:  # backward alone would need what compiled code frees
        compiled = steps(machine.compile(ours.formula))
        operations |= {f"{COMPILED} {what}": (None, compiled[what]) for what in (FORWARD, BOTH)}
    rows = race(machine, captured(task, x, operations, notes), task.share(1.5), COPY, f"{OURS} {BOTH}")
    return {"case": f"{name}, {size} {dtype_name}", "elements": x[0].numel(), "rows": rows, "notes": notes}


# ---- the host ----


def host(quick: bool) -> dict[str, Item]:
    return {"calls": time_host_calls, "pieces": time_host_pieces, "kept": kept_bytes}


def kept_bytes(task: Task) -> dict[str, int]:
    """Bytes of the tensors that forward saves for backward."""
    machine, torch = task.machine, task.machine.torch
    x = torch.randn(HOST_ELEMENTS, device=machine.device, requires_grad=True)
    kept = {}
    for name, function in ((OURS, fdt().dropout), (THEIRS, torch.nn.functional.dropout)):
        seen: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, seen=seen: seen.append(tensor), lambda _: _):
            function(x, 0.1)
        kept[name] = sum(tensor.numel() * tensor.element_size() for tensor in seen)
    return kept


def time_host_calls(task: Task) -> dict[str, Any]:
    machine, torch = task.machine, task.machine.torch
    ours, theirs, grad = fdt().dropout, torch.nn.functional.dropout, torch.autograd.grad
    x = torch.randn(HOST_ELEMENTS, device=machine.device)
    leaf, dy = x.detach().clone().requires_grad_(), torch.randn_like(x)
    named: dict[str, Callable[[], object]] = {
        f"{THEIRS}, {NO_GRAD}": lambda: theirs(x, 0.1),
        f"{THEIRS}, {FORWARD}": lambda: theirs(leaf, 0.1),
        f"{THEIRS}, {BOTH}": lambda: grad(theirs(leaf, 0.1), leaf, dy),
        f"{OURS}, {NO_GRAD}": lambda: ours(x, 0.1),
        f"{OURS}, seed=7, {NO_GRAD}": lambda: ours(x, 0.1, seed=7),
        f"{OURS}, {FORWARD}": lambda: ours(leaf, 0.1),
        f"{OURS}, {BOTH}": lambda: grad(ours(leaf, 0.1), leaf, dy),
        f"{SEEDED}, {BOTH}": lambda: grad(ours(leaf, 0.1, store="seed"), leaf, dy),
    }
    return race_on_host(machine, named, task.share(5.0), *[name for name in named if name.startswith(THEIRS)])


def time_host_pieces(task: Task) -> dict[str, Any]:
    """What a call is made of, each alone."""
    machine, torch = task.machine, task.machine.torch
    x = torch.randn(HOST_ELEMENTS, device=machine.device)
    y, words = torch.empty_like(x), torch.zeros((x.numel() + 31) // 32, dtype=torch.int32, device=machine.device)
    ours = primitives(machine, x, y, words, FLOAT32, 0.1)
    pieces: dict[str, Callable[[], object]] = {
        "dropout_forward_at": lambda: ours[FORWARD](7),
        "masked_affine_at": lambda: ours[BACKWARD](7),
        "seed": machine.seeds(),
        "stream": machine.stream,
        "empty_like": lambda: torch.empty_like(x),
        "empty words": lambda: x.new_empty(words.numel(), dtype=torch.int32),
        "native_dropout": lambda: torch.native_dropout(x, 0.1, True),
        "copy_": lambda: y.copy_(x),
    }
    return race_on_host(machine, pieces, task.share(3.0))


# ---- a decision per channel ----


def channels(quick: bool) -> dict[str, Item]:
    return {
        f"{dtype}, {layout}": lambda task, case=(dtype, layout): time_channels(task, *case)
        for dtype, layout in itertools.product(DTYPES, ("contiguous_format", "channels_last"))
    }


def time_channels(task: Task, dtype_name: str, layout: str) -> dict[str, Any]:
    """Forward without grad, beside dropout2d."""
    machine, torch = task.machine, task.machine.torch
    ours, theirs = fdt().dropout, torch.nn.functional.dropout2d
    images = rotation(machine, machine.image, dtype_name)
    x = [images.pop().contiguous(memory_format=getattr(torch, layout)) for _ in range(len(images))]
    y = [torch.empty_like(each) for each in x]
    one, copy = copies(x, y)
    calls: Operations = {
        COPY: (one, copy),
        OURS: (one, (lambda i: ours(x[i], 0.1, noise_shape=(*machine.image[:2], 1, 1)),)),
        "F.dropout2d": (None, (lambda i: theirs(x[i], 0.1),)),
    }
    contenders = [Contender(name, for_each(x, *steps), len(x), nbytes) for name, (nbytes, steps) in calls.items()]
    rows = race(machine, contenders, task.share(2.0), COPY)
    return {"case": f"{dtype_name}, {layout}", "elements": x[0].numel(), "rows": rows}


# ---- launch shapes ----

SHAPES = tuple(itertools.product((64, 128, 256, 512), (4, 8, 16, 32, 64, 4096)))  # threads, blocks per SM


def tune(quick: bool) -> dict[str, Item]:
    return {
        f"{size} {dtype}": lambda task, case=(size, dtype): time_shapes(task, *case)
        for size, dtype in itertools.product(("256M", "16M"), DTYPES)
    }


def time_shapes(task: Task, size: str, dtype_name: str) -> dict[str, Any]:
    machine, torch = task.machine, task.machine.torch
    x = rotation(machine, machine.sizes[size], dtype_name)
    y = [torch.empty_like(each) for each in x]
    n = x[0].numel()
    words = torch.zeros((n + 31) // 32, dtype=torch.int32, device=machine.device)
    ours = [primitives(machine, a, b, words, DTYPES[dtype_name], 0.1) for a, b in zip(x, y, strict=True)]
    one, copy = copies(x, y)
    sms, default = machine.describe()["sms"], (driver.THREADS, driver.BLOCKS_PER_SM)
    contenders = [Contender(COPY, for_each(x, *copy), len(x), one)]
    for what, (threads, per_sm) in itertools.product((FORWARD, BACKWARD), dict.fromkeys([default, *SHAPES])):

        def call(what: str = what, threads: int = threads, blocks: int = per_sm * sms) -> None:
            with machine.launch_shape(threads, blocks):
                for_each(x, lambda i: ours[i][what](7))()

        contenders.append(Contender(f"{what} {threads} x {per_sm}", call, len(x), one + moved(n, 0, 0, 1)))
    rows = race(machine, contenders, task.share(12.0), COPY)
    ordered = dict(sorted(rows.items(), key=lambda named: named[1]["seconds"]))
    return {"case": f"{size} {dtype_name} p=0.1", "default": f"{default[0]} x {default[1]}", "rows": ordered}

"""What is timed on a GPU, and how.

Device times: contenders are graphs with a launch for each of several buffers, which together hold four times the L2
cache, so that no buffer is there when its turn comes again. They run in shuffled rounds, each enqueued as a whole
behind work that isn't timed, and ratios are taken within a round, where both met the same machine. Host times: seconds
that the calling thread spends.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.gpu.guard import Item, Skip, Task, one_line
from fastdrop import backends
from fastdrop.backends.cuda import driver
from fastdrop.core.checks import BFLOAT16, FLOAT32
from fastdrop.core.random import threshold_and_scale

DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16}
FUSED_SIZES = ("16384 x 4096", "8192 x 1024", "2048 x 2048")
FUSED_DTYPES = ("bfloat16", "float32", "float16")
L2_TURNS = 4
MIN_ROUNDS, MAX_ROUNDS = 5, 101
HOST_ELEMENTS = 1000
SEED = 0x9E3779B97F4A7C15

COPY = "copy"
OURS, SEEDED, NATIVE, COMPILED, TRITON = "fastdrop", 'fastdrop, store="seed"', "native", "torch.compile", "triton"
EAGER = "torch"
FORWARD, BACKWARD, REGENERATE, BOTH = "forward", "backward", "regenerate", "forward+backward"
NO_GRAD, THEIRS = "no grad", "F.dropout"
COMPILE_WORKS, TRITON_CHOICE = "torch.compile works", "triton's block"


# ---- races ----


@dataclass(frozen=True)
class Contender:
    """``call`` enqueues ``launches`` of what is timed, each of which moves ``nbytes`` (None: not known)."""

    name: str
    call: Callable[[], object]
    launches: int = 1
    nbytes: int | None = None


def race(machine: Any, contenders: Sequence[Contender], seconds: float, *bases: str) -> dict[str, dict[str, Any]]:
    """Rows by contender, times by marks in the device's queue, ratios to each of ``bases``."""

    def sample(contender: Contender, repeats: int) -> tuple[Any, Any]:
        start = machine.mark()
        for _ in range(repeats):
            contender.call()
        return start, machine.mark()

    repeats = {}
    for contender in contenders:
        contender.call()
        marks = sample(contender, 1)
        machine.synchronize()
        repeats[contender.name] = math.ceil(machine.sample_seconds / max(machine.seconds(*marks), 1e-6))
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for order in rounds(contenders, seconds):
        order[-1].call()
        taken = [(contender, sample(contender, repeats[contender.name])) for contender in order]
        machine.synchronize()
        for contender, marks in taken:
            samples[contender.name].append(machine.seconds(*marks) / repeats[contender.name] / contender.launches)
    return {contender.name: row(contender, samples, contenders, bases) for contender in contenders}


def race_on_host(
    machine: Any, contenders: Sequence[Contender], seconds: float, *bases: str
) -> dict[str, dict[str, Any]]:
    """The same for the calling thread's time: the device is waited for between samples."""
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for order in rounds(contenders, seconds):
        for contender in order:
            contender.call()
            machine.synchronize()
            start = time.perf_counter()
            for _ in range(machine.host_calls):
                contender.call()
            samples[contender.name].append((time.perf_counter() - start) / machine.host_calls)
    machine.synchronize()
    return {contender.name: row(contender, samples, contenders, bases) for contender in contenders}


def rounds(contenders: Sequence[Contender], seconds: float) -> Iterator[list[Contender]]:
    """Orders to take them in, as long as there is time, without garbage collection."""
    order, shuffle, end = list(contenders), random.Random(0).shuffle, time.monotonic() + seconds
    gc.collect()
    gc.disable()
    try:
        for count in range(MAX_ROUNDS):
            if count >= MIN_ROUNDS and time.monotonic() > end:
                return
            shuffle(order)
            yield order
    finally:
        gc.enable()


def row(
    contender: Contender, samples: dict[str, list[float]], contenders: Sequence[Contender], bases: Sequence[str]
) -> dict[str, Any]:
    mine = samples[contender.name]
    low, middle, high = statistics.quantiles(mine, n=4)
    result: dict[str, Any] = {"seconds": middle, "low": low, "high": high, "min": min(mine), "max": max(mine)}
    result |= {"rounds": len(mine), "bytes": contender.nbytes}
    result["ratios"] = {
        base: statistics.median(a / b for a, b in zip(mine, samples[base], strict=True))
        for base in bases
        if base in samples
    }
    if contender.nbytes:
        result["bytes_per_second"] = contender.nbytes / middle
        limit = next((other.nbytes for other in contenders if other.name == COPY), None)
        if limit and COPY in result["ratios"]:
            result["share"] = contender.nbytes / limit / result["ratios"][COPY]
    return result


def moved(elements: int, itemsize: int, passes: int, mask_bits: int = 0) -> int:
    """Bytes that so many passes over data read and write, with ``mask_bits`` per element read or written in all."""
    return passes * 2 * elements * itemsize + (elements + 31) // 32 * 4 * mask_bits


def rotation(machine: Any, shape: Any, dtype_name: str) -> list[Any]:
    """Inputs, so many that the cache has nothing of one when its turn comes again; at least two."""
    machine.free()
    make = partial(machine.torch.randn, shape, dtype=getattr(machine.torch, dtype_name), device=machine.device)
    first = make()
    count = max(2, -(-L2_TURNS * machine.l2_bytes // (first.numel() * first.element_size())))
    return [first, *(make() for _ in range(count - 1))]


def for_each(buffers: Sequence[Any], *steps: Callable[[int], object]) -> Callable[[], None]:
    """Each step for all buffers before the next one: backward finds nothing of forward in the cache."""

    def call() -> None:
        for step in steps:
            for i in range(len(buffers)):
                step(i)

    return call


Operations = dict[str, tuple[int | None, tuple[Callable[[int], object], ...]]]  # bytes, steps as for `for_each`


def captured(task: Task, buffers: Sequence[Any], operations: Operations, notes: dict[str, str]) -> list[Contender]:
    """Each as a graph, or launched one by one where none could be captured; in ``notes`` what went wrong."""
    machine, contenders = task.machine, []
    for name, (nbytes, steps) in operations.items():
        call = for_each(buffers, *steps)
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
            enqueue = call
        contenders.append(Contender(name, enqueue, len(buffers), nbytes))
    return contenders


def fdt() -> Any:
    import fastdrop.torch

    return fastdrop.torch


# ---- kernels ----


def kernels(quick: bool) -> dict[str, Item]:
    items: dict[str, Item] = {COMPILE_WORKS: try_compile, TRITON_CHOICE: choose_triton}
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
    return machine.compile(lambda x: dropout(x, p, True))


def triton_dropout() -> Any:
    if importlib.util.find_spec("triton") is None:
        raise Skip("triton is not installed")
    from bench.gpu import triton_dropout

    return triton_dropout


def choose_triton(task: Task) -> dict[str, Any]:
    """The fastest of a few kernels and blocks, by dtype."""
    machine = task.machine
    triton = triton_dropout()
    if task.dry_run:
        raise Skip("it needs a GPU")
    chosen = {}
    for dtype_name in DTYPES:
        x, y = rotation(machine, machine.sizes["16M"], dtype_name)[:2]
        calls = [
            Contender(str(choice), lambda choice=choice, x=x, y=y: triton.dropout(x, y, 0.1, 7, choice))
            for choice in triton.CHOICES
        ]
        rows = race(machine, calls, 0.3)
        share = float((y == 0).double().mean())
        assert abs(share - 0.1) < 0.01, f"{dtype_name}: {share:.3f} dropped"
        chosen[dtype_name] = min(triton.CHOICES, key=lambda choice: rows[str(choice)]["seconds"])
    return chosen


def time_kernels(task: Task, size: str, dtype_name: str, p: float) -> dict[str, Any]:
    machine, torch, tag = task.machine, task.machine.torch, DTYPES[dtype_name]
    x = rotation(machine, machine.sizes[size], dtype_name)
    y = [torch.empty_like(each) for each in x]
    n, itemsize = x[0].numel(), x[0].element_size()
    words = [torch.empty((n + 31) // 32, dtype=torch.int32, device=machine.device) for _ in x]
    addresses = [(a.data_ptr(), b.data_ptr(), w.data_ptr()) for a, b, w in zip(x, y, words, strict=True)]
    cut, scale = threshold_and_scale(p)
    backend, stream = machine.backend, machine.stream
    held: dict[str, list[Any]] = {name: [None] * len(x) for name in ("y", "dx")}

    def copy(i: int) -> None:
        y[i].copy_(x[i])

    def forward(i: int) -> None:
        a, b, w = addresses[i]
        backend.dropout_forward_at(0, stream(), tag, a, b, w, 0, n, SEED + i, 0, cut, scale, 0.0, 0.0)

    def backward(i: int) -> None:
        a, b, w = addresses[i]
        backend.masked_affine_at(0, stream(), tag, a, b, w, 0, 1, 1, n, scale, 0.0, 0.0)

    def regenerate(i: int) -> None:
        a, b, _ = addresses[i]
        backend.dropout_forward_at(0, stream(), tag, a, b, 0, 0, n, SEED + i, 0, cut, scale, 0.0, 0.0)

    def native_forward(i: int) -> None:
        held["y"][i] = torch.native_dropout(x[i], p, True)

    def native_backward(i: int) -> None:
        held["dx"][i] = torch.ops.aten.native_dropout_backward(x[i], held["y"][i][1], 1.0 / (1.0 - p))

    width = min(4096, n)
    with backends.use_backend("numpy"):
        expected = fdt().dropout(x[0][:width].cpu(), p, seed=SEED)
    for step in (forward, backward, regenerate):
        step(0)
        assert torch.equal(y[0][:width].cpu(), expected), f"{step.__name__} is wrong"

    one, mask = moved(n, itemsize, 1), moved(n, itemsize, 0, 1)
    operations: Operations = {
        COPY: (one, (copy,)),
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

    triton_row = task.found.get(TRITON_CHOICE, {})
    if triton_row.get("status") == "ok":
        triton, choice = triton_dropout(), tuple(triton_row["result"][dtype_name])

        def seeded(i: int) -> None:
            triton.dropout(x[i], y[i], p, i, choice)

        operations |= {f"{TRITON} {FORWARD}": (one, (seeded,)), f"{TRITON} {BOTH}": (2 * one, (seeded, seeded))}
    else:
        notes[TRITON] = triton_row.get("error", "not tried")

    compile_row = task.found.get(COMPILE_WORKS, {})
    if compile_row.get("status") != "ok":
        notes[COMPILED] = compile_row.get("error", "not tried")
    elif p != 0.1:
        notes[COMPILED] = "timed at p = 0.1 alone, since compiling takes long"
    else:
        compiled, leaves = compiled_dropout(machine, p), [each.detach().requires_grad_() for each in x]

        def compiled_forward(i: int) -> None:
            held["y"][i] = compiled(leaves[i])

        def compiled_backward(i: int) -> None:
            (held["dx"][i],) = torch.autograd.grad(held["y"][i], leaves[i], x[i])

        operations |= {
            f"{COMPILED} {FORWARD}": (None, (compiled_forward,)),
            f"{COMPILED} {BOTH}": (None, (compiled_forward, compiled_backward)),
        }

    contenders = captured(task, x, operations, notes)
    rows = race(machine, contenders, task.share(3.0), COPY, f"{OURS} {BOTH}")
    return {"case": f"{size} {dtype_name} p={p}", "elements": n, "buffers": len(x), "rows": rows, "notes": notes}


# ---- fused kernels ----


def fused(quick: bool) -> dict[str, Item]:
    from bench.torch import fused_cases

    items: dict[str, Item] = {COMPILE_WORKS: try_compile}
    sizes, dtypes = (FUSED_SIZES[:1], FUSED_DTYPES[:2]) if quick else (FUSED_SIZES, FUSED_DTYPES)
    for size, dtype, name in itertools.product(sizes, dtypes, fused_cases.FUSED):
        items[f"{name}, {size} {dtype}"] = lambda task, case=(name, size, dtype): time_fused(task, *case)
    return items


def time_fused(task: Task, name: str, size: str, dtype_name: str) -> dict[str, Any]:
    """Whole calls and their gradients, beside torch's formula, eager and compiled."""
    from bench.torch import fused_cases

    machine, torch, ours = task.machine, task.machine.torch, fused_cases.FUSED[name]
    x = rotation(machine, machine.matrices[size], dtype_name)
    y = [torch.empty_like(each) for each in x]
    tensors = [ours.tensors(each) for each in x]
    count = len(fused_cases.results(ours.ours, tensors[0]))
    upstream = [tuple(torch.randn_like(each) for _ in range(count)) for each in x]
    fused_cases.assert_right(ours, tensors[0], upstream[0])

    def steps(function: Callable[..., Any]) -> dict[str, tuple[Callable[[int], object], ...]]:
        held: dict[str, list[Any]] = {what: [None] * len(x) for what in (FORWARD, BACKWARD, "lasting")}

        def forward(i: int) -> None:
            held[FORWARD][i] = fused_cases.results(function, tensors[i])

        def backward(i: int) -> None:
            held[BACKWARD][i] = fused_cases.gradients(held[FORWARD][i], tensors[i], upstream[i])

        def backward_alone(i: int) -> None:
            if held["lasting"][i] is None:  # not before: it goes to the stream that forward went to
                held["lasting"][i] = fused_cases.results(function, tensors[i])
            held[BACKWARD][i] = fused_cases.gradients(held["lasting"][i], tensors[i], upstream[i], again=True)

        return {FORWARD: (forward,), BACKWARD: (backward_alone,), BOTH: (forward, backward)}

    of_forward, of_backward = ours.moved(x[0])
    nbytes = {FORWARD: of_forward, BACKWARD: of_backward, BOTH: of_forward + of_backward}
    operations: Operations = {COPY: (moved(x[0].numel(), x[0].element_size(), 1), (lambda i: y[i].copy_(x[i]),))}
    operations |= {f"{OURS} {what}": (nbytes[what], calls) for what, calls in steps(ours.ours).items()}
    operations |= {f"{EAGER} {what}": (None, calls) for what, calls in steps(ours.formula).items()}
    notes: dict[str, str] = {}
    compile_row = task.found.get(COMPILE_WORKS, {})
    if compile_row.get("status") != "ok":
        notes[COMPILED] = compile_row.get("error", "not tried")
    elif size != FUSED_SIZES[0]:
        notes[COMPILED] = f"timed at {FUSED_SIZES[0]} alone, since compiling takes long"
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
    contenders = [Contender(name, call) for name, call in named.items()]
    return race_on_host(machine, contenders, task.share(5.0), *[name for name in named if name.startswith(THEIRS)])


def time_host_pieces(task: Task) -> dict[str, Any]:
    """What a call is made of, each alone."""
    machine, torch, backend = task.machine, task.machine.torch, task.machine.backend
    n = HOST_ELEMENTS
    x = torch.randn(n, device=machine.device)
    y, words = torch.empty_like(x), torch.zeros((n + 31) // 32, dtype=torch.int32, device=machine.device)
    cut, scale = threshold_and_scale(0.1)
    head = 0, machine.stream(), FLOAT32, x.data_ptr(), y.data_ptr(), words.data_ptr(), 0
    pieces: dict[str, Callable[[], object]] = {
        "dropout_forward_at": lambda: backend.dropout_forward_at(*head, n, 7, 0, cut, scale, 0.0, 0.0),
        "masked_affine_at": lambda: backend.masked_affine_at(*head, 1, 1, n, scale, 0.0, 0.0),
        "seed": machine.seeds(),
        "stream": machine.stream,
        "empty_like": lambda: torch.empty_like(x),
        "empty words": lambda: x.new_empty((n + 31) // 32, dtype=torch.int32),
        "native_dropout": lambda: torch.native_dropout(x, 0.1, True),
        "copy_": lambda: y.copy_(x),
    }
    return race_on_host(machine, [Contender(name, call) for name, call in pieces.items()], task.share(3.0))


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
    noise = (*machine.image[:2], 1, 1)
    one = moved(x[0].numel(), x[0].element_size(), 1)
    contenders = [
        Contender(COPY, for_each(x, lambda i: y[i].copy_(x[i])), len(x), one),
        Contender(OURS, for_each(x, lambda i: ours(x[i], 0.1, noise_shape=noise)), len(x), one),
        Contender("F.dropout2d", for_each(x, lambda i: theirs(x[i], 0.1)), len(x)),
    ]
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
    machine, torch, tag, backend = task.machine, task.machine.torch, DTYPES[dtype_name], task.machine.backend
    x = rotation(machine, machine.sizes[size], dtype_name)
    y = [torch.empty_like(each) for each in x]
    n, stream = x[0].numel(), machine.stream()
    words = torch.zeros((n + 31) // 32, dtype=torch.int32, device=machine.device)
    cut, scale = threshold_and_scale(0.1)
    heads = [(0, stream, tag, a.data_ptr(), b.data_ptr(), words.data_ptr(), 0) for a, b in zip(x, y, strict=True)]
    one, mask = moved(n, x[0].element_size(), 1), moved(n, 0, 0, 1)
    sms = machine.describe()["sms"]
    default = driver.THREADS, driver.BLOCKS_PER_SM
    shapes = list(dict.fromkeys([default, *SHAPES]))
    steps = {
        FORWARD: lambda i: backend.dropout_forward_at(*heads[i], n, 7, 0, cut, scale, 0.0, 0.0),
        BACKWARD: lambda i: backend.masked_affine_at(*heads[i], 1, 1, n, scale, 0.0, 0.0),
    }
    contenders = [Contender(COPY, for_each(x, lambda i: y[i].copy_(x[i])), len(x), one)]
    for operation, (threads, per_sm) in itertools.product(steps, shapes):

        def call(step: Any = steps[operation], threads: int = threads, blocks: int = per_sm * sms) -> None:
            with machine.launch_shape(threads, blocks):
                for_each(x, step)()

        contenders.append(Contender(f"{operation} {threads} x {per_sm}", call, len(x), one + mask))
    rows = race(machine, contenders, task.share(12.0), COPY)
    return {
        "case": f"{size} {dtype_name} p=0.1",
        "default": f"{default[0]} x {default[1]}",
        "rows": dict(sorted(rows.items(), key=lambda named: named[1]["seconds"])),
    }

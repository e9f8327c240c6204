"""All that needs a GPU, by one command: python bench/gpu.py [--output FOLDER] [--quick] [--no-tune].

It checks fastdrop on GPU 0 and times it there beside a copy of memory, torch's dropout, torch.compile's and a seeded
one in Triton: under eight minutes, a table last, everything in gpu-NAME.json and gpu-NAME.md of the folder. It needs
torch with CUDA and numba-cuda, and no build of this package.

An error on a GPU ends its process's use of it, and a kernel that hangs can only be killed. So each section runs in a
process of its own, which leaves a line on disk per item; where the process dies or an item takes too long, that item
has failed and another process goes on with the next.

``--dry-run`` goes the same ways on the CPU, with tiny tensors, the NumPy backend in the kernels' place and the wall
clock for events: it says that the script runs, and nothing else. Without ``--output`` it leaves no files.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import ctypes
import datetime
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import pstats
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a script, Python knows bench/ alone

from fastdrop import backends  # noqa: E402
from fastdrop._checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64  # noqa: E402
from fastdrop.backends import reference  # noqa: E402
from fastdrop.stream import DROP_ALL, threshold_and_scale  # noqa: E402

TOTAL_SECONDS = 450.0
QUICK_SECONDS = 200.0
PRINTED = 11_500  # characters: those who see only the end of the output see all of the table
AGAIN, NO_GPU = 3, 2  # exit codes: a child's, whose other items need another process; ours, where there is no GPU

DTYPES = ("float32", "bfloat16")  # timed
TAGS = {"float32": FLOAT32, "float64": FLOAT64, "float16": FLOAT16, "bfloat16": BFLOAT16}
PROBABILITIES = (0.1, 0.5)
SIZES = {"256M": 1 << 28, "16M": 1 << 24, "1M": 1 << 20}
DRY_SIZES = {"256M": 5001, "16M": 3000, "1M": 1000}
HOST_ELEMENTS = 1000

L2_TURNS = 4  # buffers in rotation hold so many times the L2 cache
MIN_ROUNDS, MAX_ROUNDS = 5, 101

SHARE_OF_COPY = 0.9
HOST_RATIO = 1.5


# ---- figures ----


def moved(elements: int, itemsize: int, passes: int, mask_bits: int = 0) -> int:
    """Bytes that so many passes over data read and write, with ``mask_bits`` per element read or written in all."""
    return passes * 2 * elements * itemsize + (elements + 31) // 32 * 4 * mask_bits


def buffers(nbytes: int, l2_bytes: int) -> int:
    """How many buffers in rotation leave the cache nothing of one when its turn comes again; at least two."""
    return max(2, -(-L2_TURNS * l2_bytes // max(1, nbytes)))


def summary(samples: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {"seconds": middle, "low": low, "high": high, "min": min(samples), "max": max(samples)}


def paired(mine: Sequence[float], its: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round, where both met the same machine."""
    return statistics.median(a / b for a, b in zip(mine, its, strict=True))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Contender:
    """``call`` enqueues ``launches`` of what is timed, each of which moves ``nbytes`` (None: not known)."""

    name: str
    call: Callable[[], object]
    launches: int = 1
    nbytes: int | None = None
    note: str = ""


def race(
    machine: Any, contenders: Sequence[Contender], seconds: float, against: Mapping[str, str] | str = ""
) -> dict[str, dict[str, Any]]:
    """Times contenders in shuffled rounds, by marks in the device's queue.

    ``against`` names whom to take paired ratios to, for all or by contender. A round is enqueued as a whole, behind
    work that isn't timed, so that no sample has the device wait for the host.
    """
    repeats = {}
    for contender in contenders:
        contender.call()
        machine.synchronize()
        start = machine.mark()
        contender.call()
        end = machine.mark()
        machine.synchronize()
        repeats[contender.name] = max(1, math.ceil(machine.sample_seconds / max(machine.seconds(start, end), 1e-6)))
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    end_at, rounds = time.monotonic() + seconds, 0
    with collector_off():
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.monotonic() < end_at):
            shuffle(order)
            order[-1].call()
            marks = []
            for contender in order:
                start = machine.mark()
                for _ in range(repeats[contender.name]):
                    contender.call()
                marks.append((contender, start, machine.mark()))
            machine.synchronize()
            for contender, start, end in marks:
                launches = repeats[contender.name] * contender.launches
                samples[contender.name].append(machine.seconds(start, end) / launches)
            rounds += 1
    rows = {}
    for contender in contenders:
        mine = samples[contender.name]
        row: dict[str, Any] = summary(mine)
        row |= {"rounds": rounds, "launches": contender.launches * repeats[contender.name], "bytes": contender.nbytes}
        if contender.note:
            row["note"] = contender.note
        other = against if isinstance(against, str) else against.get(contender.name, "")
        if contender.nbytes:
            row["bytes_per_second"] = contender.nbytes / row["seconds"]
        if other in samples:
            row["time_ratio"] = paired(mine, samples[other])
            limit = next(c for c in contenders if c.name == other).nbytes
            if contender.nbytes and limit:
                row["share"] = contender.nbytes / limit / row["time_ratio"]
        rows[contender.name] = row
    return rows


def race_on_host(
    machine: Any, calls: Mapping[str, Callable[[], object]], seconds: float, against: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Seconds that the calling thread spends in each call; what it enqueues runs meanwhile, and is waited for between
    samples."""
    for call in calls.values():
        for _ in range(3):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    end_at, rounds = time.monotonic() + seconds, 0
    with collector_off():
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.monotonic() < end_at):
            shuffle(order)
            for name in order:
                call = calls[name]
                machine.synchronize()
                start = time.perf_counter()
                for _ in range(machine.host_calls):
                    call()
                samples[name].append((time.perf_counter() - start) / machine.host_calls)
            rounds += 1
    machine.synchronize()
    rows = {}
    for name, mine in samples.items():
        rows[name] = {**summary(mine), "rounds": rounds}
        other = against.get(name, "")
        if other in samples:
            rows[name] |= {"against": other, "time_ratio": paired(mine, samples[other])}
    return rows


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ---- devices ----


class Cuda:
    """GPU 0 by torch, and the primitives by address."""

    name = "cuda"
    sizes = SIZES
    channels_shape = (64, 256, 56, 56)
    large = (1 << 31) + 1000
    borders = (1 << 30, 1 << 31)
    ordinal = 0
    sample_seconds = 1.5e-3  # events resolve half a microsecond
    host_calls = 100  # between two synchronisations: the queue of launches must not fill up
    is_spoiled = False  # torch's allocator and generator may stay in a capture that failed

    def __init__(self) -> None:
        import torch

        from fastdrop.backends import numba_cuda
        from fastdrop.backends._cuda import driver

        reason = numba_cuda.unavailable()
        if reason:
            raise RuntimeError(reason)
        self.torch, self.backend, self.driver = torch, numba_cuda, driver
        self.device = torch.device("cuda", self.ordinal)
        torch.cuda.set_device(self.device)
        self.l2_bytes = int(getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)) or 64 << 20
        self._side = torch.cuda.Stream()

    def describe(self) -> dict[str, Any]:
        torch = self.torch
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name,
            "compute_capability": [properties.major, properties.minor],
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": self.l2_bytes,
            "torch_cuda": torch.version.cuda,
            **nvidia_smi(),
        }

    def stream(self) -> int:
        return int(self.torch.cuda.current_stream().cuda_stream)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def mark(self) -> Any:
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) * 1e-3

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """A graph of what call enqueues. It is warmed up on the stream that captures: autograd remembers streams."""
        torch = self.torch
        before = torch.cuda.current_stream()
        self._side.wait_stream(before)
        with torch.cuda.stream(self._side):
            call()
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._side):
                call()
        except Exception:
            self.is_spoiled = True
            raise
        finally:
            torch.cuda.set_stream(before)  # where capturing failed, nobody else has
        torch.cuda.synchronize()
        return graph.replay

    def graphed(self, module: Any, arguments: tuple[Any, ...]) -> Any:
        try:
            return self.torch.cuda.make_graphed_callables(module, arguments)
        except Exception:
            self.is_spoiled = True
            raise

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self.torch._dynamo.reset()
        return self.torch.compile(function, dynamic=False)

    def streams(self, count: int) -> list[Any]:
        """Contexts in which work goes to a stream of its own."""
        torch = self.torch
        found = [torch.cuda.Stream() for _ in range(count)]
        for stream in found:
            stream.wait_stream(torch.cuda.current_stream())
        return [torch.cuda.stream(stream) for stream in found]

    @contextlib.contextmanager
    def forbidding_synchronisation(self) -> Iterator[None]:
        """torch raises where it would wait for the device."""
        self.torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            self.torch.cuda.set_sync_debug_mode("default")

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Most bytes of device memory that call holds at a time, its result included."""
        torch = self.torch
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated() - before)

    def has_room_for(self, nbytes: int) -> bool:
        self.free()
        return int(self.torch.cuda.mem_get_info()[0]) > nbytes

    def free(self) -> None:
        gc.collect()
        self.torch.cuda.empty_cache()

    def clocks(self) -> dict[str, Any]:
        return nvidia_smi()

    def host_pieces(self) -> dict[str, Callable[[], object]]:
        """Parts of a call that wants a stream and a seed."""
        torch, ordinal = self.torch, self.ordinal
        generator = torch.cuda.default_generators[ordinal]

        def take_offset() -> int:
            seed, offset = generator.initial_seed(), generator.get_offset()
            generator.set_offset(offset + 4)
            return int(seed)

        return {
            "current_stream().cuda_stream": lambda: torch.cuda.current_stream().cuda_stream,
            "raw stream": lambda: torch._C._cuda_getCurrentRawStream(ordinal),
            "generator: seed, offset": take_offset,
        }

    def alive(self) -> bool:
        try:
            self.synchronize()
        except RuntimeError:
            return False
        return True


class Host:
    """The CPU in a GPU's place, for a dry run: the same methods, which do as little as can be."""

    name = "dry run on the CPU"
    sizes = DRY_SIZES
    channels_shape = (2, 3, 4, 5)
    large = 10_007
    borders = (5000, 7000)
    ordinal = 0
    sample_seconds, host_calls = 1e-5, 3
    is_spoiled = False
    l2_bytes = 2 << 10

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.device = torch.device("cpu")
        self.backend = AddressedReference
        self._launcher = SimpleNamespace(blocks=132 * 32)
        self.driver = SimpleNamespace(THREADS=128, BLOCKS_PER_SM=32, device=lambda ordinal: self._launcher)

    def describe(self) -> dict[str, Any]:
        return {
            "device": self.name, "compute_capability": [9, 0], "sms": 132, "memory_bytes": 0, "l2_bytes": self.l2_bytes,
            "torch_cuda": None, **nvidia_smi(),
        }  # fmt: skip

    def stream(self) -> int:
        return 0

    def synchronize(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        call()
        return call

    def graphed(self, module: Any, arguments: tuple[Any, ...]) -> Any:
        module(*arguments)
        return module

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.torch.compile(function, dynamic=False, backend="eager")

    def streams(self, count: int) -> list[Any]:
        return [contextlib.nullcontext() for _ in range(count)]

    def forbidding_synchronisation(self) -> Any:
        return contextlib.nullcontext()

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        return 0

    def has_room_for(self, nbytes: int) -> bool:
        return True

    def free(self) -> None:
        gc.collect()

    def clocks(self) -> dict[str, Any]:
        return nvidia_smi()

    def host_pieces(self) -> dict[str, Callable[[], object]]:
        return {"generator: seed, offset": self.torch.default_generator.initial_seed}

    def alive(self) -> bool:
        return True


class AddressedReference:
    """The reference backend with the parameters of `fastdrop.backends.numba_cuda`, over memory of the CPU."""

    @staticmethod
    def draw_bits_at(
        device: int, stream: int, words: int, position: int, first: int, n: int, seed: int, offset: int, threshold: int,
        *, seed_at: int = 0,
    ) -> None:  # fmt: skip
        seed = _seed(seed, seed_at)
        reference.draw_bits(_words_at(words, position + n), position, first, n, seed, offset, threshold)

    @staticmethod
    def dropout_forward_at(
        device: int, stream: int, dtype: int, x: int, y: int, words: int, first: int, n: int, seed: int, offset: int,
        threshold: int, a: float, b: float, c: float, *, seed_at: int = 0,
    ) -> None:  # fmt: skip
        keep = _words_at(words, n) if words else None
        seed = _seed(seed, seed_at)
        data = _data_at(x, n, dtype), _data_at(y, n, dtype)
        reference.dropout_forward(dtype, *data, keep, first, n, seed, offset, threshold, a, b, c)

    @staticmethod
    def masked_affine_at(
        device: int, stream: int, dtype: int, x: int, y: int, words: int, position: int, outer: int, repeat: int,
        inner: int, a: float, b: float, c: float,
    ) -> None:  # fmt: skip
        n = outer * repeat * inner
        data = _data_at(x, n, dtype), _data_at(y, n, dtype)
        keep = _words_at(words, position + outer * inner)
        reference.masked_affine(dtype, *data, keep, position, outer, repeat, inner, a, b, c)

    @staticmethod
    def strided_affine_at(
        device: int, stream: int, dtype: int, x: int, y: int, words: int, position: int,
        axes: Sequence[tuple[int, int]], a: float, b: float, c: float,
    ) -> None:  # fmt: skip
        n = math.prod(extent for extent, _ in axes)
        cells = cells_of(axes)
        keep = _words_at(words, position + int(cells.max(initial=0)) + 1)
        data = _data_at(x, n, dtype), _data_at(y, n, dtype)
        reference.masked_affine(dtype, *data, gathered(keep, position, cells), 0, 1, 1, n, a, b, c)


def _seed(seed: int, seed_at: int) -> int:
    return int(_at(seed_at, 8).view(np.uint64)[0]) if seed_at else seed


def _at(address: int, nbytes: int) -> Any:
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8) if nbytes else np.empty(0, np.uint8)


def _words_at(address: int, bits: int) -> Any:
    return _at(address, (bits + 31) // 32 * 4).view(np.uint32)


def _data_at(address: int, n: int, dtype: int) -> Any:
    storage = STORAGE[dtype]
    return _at(address, n * np.dtype(storage).itemsize).view(storage)


def cells_of(axes: Sequence[tuple[int, int]]) -> Any:
    """The cell of each element, for axes as `strided_affine_at` takes them."""
    cells = np.zeros(1, np.int64)
    for extent, stride in axes:
        cells = np.add.outer(cells, np.arange(extent) * stride)
    return cells.reshape(-1)


def gathered(words: Any, position: int, cells: Any) -> Any:
    """Words of a mask whose bit i is bit ``position + cells[i]``."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[position + cells]
    packed = np.zeros((cells.size + 31) // 32 * 4, np.uint8)
    small = np.packbits(bits, bitorder="little")
    packed[: small.size] = small
    return packed.view(np.uint32)


def nvidia_smi() -> dict[str, Any]:
    """Driver, clocks, temperature and power as the GPU reports them now; empty where they can't be read."""
    fields = (
        "driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"
    )
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (value.strip() for value in answer.split(",")), strict=False))


# ---- sections, each in a process of its own ----


class Skip(Exception):
    """Why there is nothing to do here."""


@dataclass(frozen=True)
class Options:
    quick: bool = False
    tune: bool = True
    dry_run: bool = False

    def as_arguments(self) -> list[str]:
        chosen = ("--quick", self.quick), ("--no-tune", not self.tune), ("--dry-run", self.dry_run)
        return [flag for flag, on in chosen if on]


@dataclass
class Task:
    """What an item of a section gets."""

    options: Options
    deadline: float = math.inf  # of the section, by time.monotonic
    remaining: int = 1  # items, this one included
    found: dict[str, dict[str, Any]] = field(default_factory=dict)  # rows of items before it
    _machine: Any = None

    @property
    def machine(self) -> Any:
        if self._machine is None:
            self._machine = Host() if self.options.dry_run else Cuda()
        return self._machine

    @property
    def needs_another_process(self) -> bool:
        return self._machine is not None and (self._machine.is_spoiled or not self._machine.alive())

    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def share(self, at_most: float) -> float:
        """Seconds to measure for: this item's part of what is left, half of it for preparations."""
        return 0.02 if self.options.dry_run else max(0.3, min(at_most, self.left() / self.remaining / 2))


Item = Callable[[Task], Any]


@dataclass(frozen=True)
class Section:
    title: str
    items: Callable[[Options], dict[str, Item]]
    seconds: float  # at most, all items together
    limit: float  # of one item
    quick: bool = True  # also in a quick run


class Lines:
    """Rows of JSON on disk, one per line, whole as soon as they are written."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def add(self, row: dict[str, Any]) -> None:
        with self._file.open("a") as stream:
            stream.write(json.dumps(row, default=str) + "\n")

    def read(self) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []
        whole = self._file.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def done(self) -> dict[str, dict[str, Any]]:
        return {row["item"]: row for row in self.read() if "item" in row}

    def in_flight(self) -> str | None:
        """The item that was started last, if it hasn't ended."""
        started = [row["start"] for row in self.read() if "start" in row]
        return started[-1] if started and started[-1] not in self.done() else None


def run_item(name: str, item: Item, task: Task) -> dict[str, Any]:
    """The item's row: its result, or why there is none."""
    start = time.monotonic()
    row: dict[str, Any] = {"item": name}
    try:
        row |= {"status": "ok", "result": item(task)}
    except Skip as reason:
        row |= {"status": "skipped", "error": str(reason)}
    except Exception as error:
        row |= {"status": "failed", "error": one_line(error), "traceback": traceback.format_exc()[-6000:]}
    return row | {"seconds": round(time.monotonic() - start, 3)}


def one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:300] + "..."


def run_items(items: Mapping[str, Item], lines: Lines, task: Task) -> bool:
    """Those that have no row yet, in order, while there is time. False where what is left needs another process."""
    done = lines.done()
    pending = {name: item for name, item in items.items() if name not in done}
    task.found = dict(done)
    for k, (name, item) in enumerate(pending.items()):
        if task.left() <= 0:
            row: dict[str, Any] = {"item": name, "status": "not run", "error": "no time was left", "seconds": 0.0}
        else:
            lines.add({"start": name})
            task.remaining = len(pending) - k
            row = run_item(name, item, task)
        lines.add(row)
        task.found[name] = row
        if task.needs_another_process:
            return False
    lines.add({"end": True})
    return True


def child(name: str, file: Path, seconds: float, options: Options) -> int:
    """A section's process."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # whoever ends this process ends what it has started
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    task = Task(options, time.monotonic() + seconds)
    return 0 if run_items(SECTIONS[name].items(options), Lines(file), task) else AGAIN


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def run_section(section: Section, command: Sequence[str], folder: Path, name: str, seconds: float) -> dict[str, Any]:
    """Runs a section to its end, in as many processes as it takes.

    ``command`` starts one, given the file of lines and the seconds that are left.
    """
    lines, output = Lines(folder / f"{name}.jsonl"), folder / f"{name}.log"
    start = time.monotonic()
    ended, status = False, ""
    while not ended and (left := seconds - (time.monotonic() - start)) > 0:
        before = len(lines.read())
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [*command, "--child", name, "--lines", str(folder / f"{name}.jsonl"), "--seconds", f"{left:.1f}"],
                stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(),
            )  # fmt: skip
        try:
            status = _watch(process, lines, section.limit, start + seconds)
        finally:
            _end(process)
        rows = lines.read()
        ended = bool(rows) and "end" in rows[-1]
        stuck = lines.in_flight()
        tail = output.read_bytes()[-3000:].decode(errors="replace")
        if stuck is not None:
            fate = "not run" if status == TIME_OVER else "failed"
            lines.add({"item": stuck, "status": fate, "error": status, "traceback": tail, "seconds": None})
        elif not ended and len(rows) == before:  # not even one item: another process would fare no better
            lines.add({"item": "process", "status": "failed", "error": status, "traceback": tail, "seconds": None})
            break
    items = lines.done()
    fates = {row["status"] for row in items.values()}
    return {
        "title": section.title,
        "status": "failed" if "failed" in fates else "cut" if "not run" in fates or not ended else "ok",
        "seconds": round(time.monotonic() - start, 1),
        "items": items,
    }


GRACE_SECONDS = 5.0  # for an item that was begun in time
TIME_OVER = "the section's time was over before it ended"


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _watch(process: subprocess.Popen[bytes], lines: Lines, limit: float, deadline: float) -> str:
    """Waits for the process; how it ended, or why it has to be ended."""
    count, since = -1, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"its process ended with code {process.wait(0.1)}"
        now = time.monotonic()
        if (length := len(lines.read())) != count:
            count, since = length, now
        if now - since > limit:
            return f"it had not ended after {limit:.0f} s and was killed"
        if now > deadline + GRACE_SECONDS:
            return TIME_OVER


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (OSError, AttributeError):
            process.kill()
        process.wait()


# ---- correctness: what is in the tests ----


def machine_items(options: Options) -> dict[str, Item]:
    def describe(task: Task) -> dict[str, Any]:
        import fastdrop

        packages = ("torch", "triton", "numba", "numba-cuda", "cuda-bindings", "cuda-core", "numpy", "nvidia-nvjitlink")
        found = {name: version(name) for name in packages}
        return {
            **task.machine.describe(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "fastdrop": fastdrop.__version__,
            "packages": {name: number for name, number in found.items() if number},
        }

    return {"machine": describe}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def build_items(options: Options) -> dict[str, Item]:
    """Compiling the kernels, apart from all that is timed."""

    def build(task: Task) -> dict[str, Any]:
        if importlib.util.find_spec("numba_cuda") is None:
            raise Skip("numba-cuda is not installed")
        cc = tuple(task.machine.describe()["compute_capability"])
        variants = [("draw_words",)] + [
            (body, tag, form, plain)
            for body, forms in (("elementwise", ("drawn", "drawn_shifted", "stored")), ("strided", ("wide", "narrow")))
            for tag in TAGS.values()
            for form in forms
            for plain in (True, False)
        ]
        if options.dry_run:
            variants = variants[:1]
        workers = min(len(variants), os.cpu_count() or 1, 16)
        start = time.monotonic()
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            took = list(pool.map(build_variant, [cc] * len(variants), variants))
        return {"kernels": len(variants), "workers": workers, "seconds": time.monotonic() - start, "each": max(took)}

    return {"kernels": build}


def build_variant(cc: tuple[int, int], variant: tuple[Any, ...]) -> float:
    from fastdrop.backends._cuda import compile

    start = time.monotonic()
    compile.image(compile.Variant(*variant), cc)
    return time.monotonic() - start


GPU_TESTS = "tests/test_cuda_gpu.py"


def suite_items(options: Options) -> dict[str, Item]:
    def suite(task: Task) -> dict[str, Any]:
        if not (ROOT / GPU_TESTS).exists():
            raise Skip(f"there is no {GPU_TESTS}")
        flags = ["-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "--maxfail=40"]
        seconds = min(task.left(), 60.0) if options.quick or options.dry_run else task.left()
        code, text = run_for([sys.executable, "-m", "pytest", *flags, GPU_TESTS], seconds)
        try:
            return judged_suite(code, text)
        except Skip as reason:
            if options.dry_run:
                raise
            raise AssertionError(str(reason)) from None

    return {GPU_TESTS: suite}


def judged_suite(code: int | None, text: str) -> dict[str, Any]:
    """pytest's summary; AssertionError where a test failed or they didn't end, Skip where none ran."""
    lines = text.strip().splitlines()
    last = lines[-1].strip("= ") if lines else "no output"
    failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if code is None:
        begun = [line.split()[0] for line in lines if "::" in line]
        raise AssertionError(f"the tests did not end in time; the last one begun is {begun[-1] if begun else 'none'}")
    if failures or code not in (0, 5):  # 5: nothing was collected
        raise AssertionError("; ".join([f"{last} (code {code})", *failures[:12]]) + "\n" + text[-5000:])
    if not re.search(r"\d+ passed", last):
        raise Skip(f"no test ran: {last}")
    return {"summary": last}


def run_for(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """(code, output) of a command; code None where it had to be killed."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment())
        try:
            code = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        output.seek(0)
        return code, output.read().decode(errors="replace")


# ---- correctness: the primitives, between guards ----

STORAGE = {FLOAT32: np.float32, FLOAT64: np.float64, FLOAT16: np.float16, BFLOAT16: np.uint16}
POISON = 0xFF  # NaN in every dtype
GUARD = 256

# Borders of byte, word, vector and tile of 1,024 cells.
LENGTHS = (1, 7, 31, 32, 33, 1023, 1024, 1025, 4100, 20_011)
FIRSTS = (0, 5, (1 << 37) - 1000)  # within a word; so that the word index passes 2**32 midway
GRIDS = ((24, 25, 1), (1, 9, 24), (4, 3, 33), (3, 2, 513), (2, 5, 512), (5, 7, 8))
AXES = (((3, 5), (4, 0), (5, 1)), ((2, 60), (3, 0), (4, 15), (5, 0), (15, 1)), ((7, 8), (6, 0), (8, 1)))
SEED, OFFSET = 0x9E3779B97F4A7C15, 0x1_0000_0003


class TorchMemory:
    """A device's memory by torch: areas so many bytes past a border of 256, poisoned, with guards on both sides."""

    def __init__(self, machine: Any) -> None:
        self._machine = machine

    def stream(self) -> int:
        return int(self._machine.stream())

    def area(self, content: Any, shift: int = 0) -> Any:
        """An area that holds the content, an array of bytes."""
        torch = self._machine.torch
        whole = np.full(content.size + shift + 2 * GUARD, POISON, np.uint8)
        inside = slice(GUARD + shift, GUARD + shift + content.size)
        whole[inside] = content
        buffer = torch.from_numpy(whole.copy()).to(self._machine.device)

        def read() -> Any:
            now = buffer.cpu().numpy().copy()
            got = now[inside].copy()
            now[inside] = POISON
            assert (now == POISON).all(), "bytes around the output were written"
            return got

        return SimpleNamespace(address=buffer.data_ptr() + GUARD + shift, read=read, keep=buffer)


class DriverMemory:
    """A device's memory by the driver alone: each area is an allocation that ends where it ends, for a sanitizer."""

    def __init__(self) -> None:
        from fastdrop.backends._cuda import driver

        self._api, self._check = driver.api(), driver.check
        self._check(*self._api.cuInit(0))
        device = self._check(*self._api.cuDeviceGet(0))
        self._check(*self._api.cuCtxSetCurrent(self._check(*self._api.cuDevicePrimaryCtxRetain(device))))

    def stream(self) -> int:
        return 0

    def area(self, content: Any, shift: int = 0) -> Any:
        api, check = self._api, self._check
        base = int(check(*api.cuMemAlloc(content.size + shift)))
        kept = np.ascontiguousarray(content)
        check(*api.cuMemcpyHtoD(base + shift, kept.ctypes.data, kept.size))

        def read() -> Any:
            got = np.empty(content.size, np.uint8)
            check(*api.cuMemcpyDtoH(got.ctypes.data, base + shift, got.size))
            return got

        return SimpleNamespace(address=base + shift, read=read, free=lambda: check(*api.cuMemFree(base)))


class HostMemory:
    """The CPU's memory, for a dry run of what takes `DriverMemory`."""

    def stream(self) -> int:
        return 0

    def area(self, content: Any, shift: int = 0) -> Any:
        whole = np.full(content.size + shift, POISON, np.uint8)
        whole[shift:] = content
        return SimpleNamespace(address=whole.ctypes.data + shift, read=whole[shift:].copy, keep=whole)


def check_primitives(
    memory: Any, backend: Any, tag: int, lengths: Sequence[int] = LENGTHS, ordinal: int = 0
) -> dict[str, int]:
    """Every primitive against the reference, bit by bit. Outputs are poisoned, seeds given by value or by address."""
    storage = STORAGE[tag]
    size = np.dtype(storage).itemsize
    random_state = np.random.default_rng(tag)
    wrong: list[str] = []
    count = 0

    def numbers(n: int) -> Any:
        values = random_state.normal(size=n)
        return reference.float32_to_bfloat16(values.astype(np.float32)) if tag == BFLOAT16 else values.astype(storage)

    def poison(nbytes: int) -> Any:
        return np.full(nbytes, POISON, np.uint8)

    def compare(what: str, areas: Sequence[tuple[Any, Any]]) -> None:
        nonlocal count
        count += 1
        for area, expected in areas:
            bits = expected.view(np.uint8)
            try:
                got = area.read()
            except AssertionError as error:
                wrong.append(f"{what}: {error}")
                continue
            differ = np.flatnonzero(got != bits)
            if differ.size:
                wrong.append(f"{what}: {differ.size} of {bits.size} bytes differ, the first is byte {differ[0]}")

    def release(*areas: Any) -> None:
        for area in areas:
            if hasattr(area, "free"):
                area.free()

    cut, scale = threshold_and_scale(0.1)
    affine = (1.3, -0.25, 0.7)
    seeds = memory.area(np.array([SEED], np.uint64).view(np.uint8))
    for k, (n, first, shift) in enumerate(itertools.product(lengths, FIRSTS, (0, 1, 3))):
        a, b, c = affine if k % 4 == 3 else (scale, 0.0, 0.0)
        kept, by_address = k % 2 == 0, k % 3 == 0
        x = numbers(n)
        y_expected, words_expected = np.empty(n, storage), np.empty((n + 31) // 32, np.uint32)
        reference.dropout_forward(tag, x, y_expected, words_expected, first, n, SEED, OFFSET, cut, a, b, c)
        source = memory.area(x.view(np.uint8), shift * size)
        y, words = memory.area(poison(n * size), shift * size), memory.area(poison(words_expected.nbytes))
        backend.dropout_forward_at(
            ordinal, memory.stream(), tag, source.address, y.address, words.address if kept else 0, first, n,
            0 if by_address else SEED, OFFSET, cut, a, b, c, seed_at=seeds.address if by_address else 0,
        )  # fmt: skip
        what = f"forward n={n} first={first} shift={shift} a={a:.3g}"
        untouched = poison(words_expected.nbytes)
        compare(what, [(y, y_expected), (words, words_expected if kept else untouched), (source, x)])
        release(source, y, words)

    bits = random_state.integers(0, 1 << 32, 3000, dtype=np.uint32)
    strided = [(f"grid {grid}", ((grid[0], grid[2]), (grid[1], 0), (grid[2], 1)), grid) for grid in GRIDS]
    strided += [(f"elementwise {n}", ((n, 1),), (1, 1, n)) for n in lengths]
    strided += [(f"axes {axes}", axes, None) for axes in AXES]
    for (what, axes, grid), position, shift in itertools.product(strided, (0, 7), (0, 1)):
        n = math.prod(extent for extent, _ in axes)
        cells = cells_of(axes)
        x, y_expected = numbers(n), np.empty(n, storage)
        used = bits[: (position + int(cells.max()) + 32) // 32]
        a, b, c = (scale, 0.0, 0.0) if position else affine
        reference.masked_affine(tag, x, y_expected, gathered(used, position, cells), 0, 1, 1, n, a, b, c)
        source = memory.area(x.view(np.uint8), shift * size)
        y, words = memory.area(poison(n * size), shift * size), memory.area(used.view(np.uint8))
        head = ordinal, memory.stream(), tag, source.address, y.address, words.address, position
        if grid is None:
            backend.strided_affine_at(*head, axes, a, b, c)
        else:
            backend.masked_affine_at(*head, *grid, a, b, c)
        compare(f"{what} position={position} shift={shift}", [(y, y_expected), (words, used), (source, x)])
        release(source, y, words)

    if tag == FLOAT32:
        for n, first, position in itertools.product(lengths, FIRSTS, (0, 7, 33)):
            expected = random_state.integers(0, 1 << 32, (position + n + 31) // 32, dtype=np.uint32)
            words = memory.area(expected.view(np.uint8).copy())
            reference.draw_bits(expected, position, first, n, SEED, OFFSET, cut)
            backend.draw_bits_at(ordinal, memory.stream(), words.address, position, first, n, SEED, OFFSET, cut)
            compare(f"draw n={n} first={first} position={position}", [(words, expected)])
            release(words)
    release(seeds)
    if wrong:
        raise AssertionError(f"{len(wrong)} of {count} calls are wrong: " + "; ".join(wrong[:8]))
    return {"calls": count}


def check_golden(backend: Any, memory: Any, ordinal: int = 0) -> dict[str, int]:
    """The masks that are written down in fastdrop/vectors."""
    masks = json.loads((ROOT / "fastdrop" / "vectors" / "masks.json").read_text())["masks"]
    wrong, count = [], 0
    for mask in masks:
        expected = np.array([int(word, 16) for word in mask["words"]], np.uint32)
        if not 0 < mask["threshold"] < DROP_ALL:
            continue
        words = memory.area(np.full(expected.nbytes, POISON, np.uint8))
        backend.draw_bits_at(
            ordinal, memory.stream(), words.address, 0, 32 * mask["first_word"], 32 * expected.size,
            int(mask["seed"], 16), int(mask["offset"], 16), mask["threshold"],
        )  # fmt: skip
        count += 1
        if not np.array_equal(words.read().view(np.uint32), expected):
            wrong.append(f"p={mask['p']}, seed {mask['seed']}")
    assert not wrong, f"{len(wrong)} of {count} masks are wrong: {'; '.join(wrong[:5])}"
    return {"masks": count}


def memory_check(options: Options) -> int:
    """What a sanitizer looks at: the primitives on small allocations, without torch. 0 if their results are right."""
    if options.dry_run:
        memory: Any = HostMemory()
        backend: Any = AddressedReference
    else:
        from fastdrop.backends import numba_cuda

        memory, backend = DriverMemory(), numba_cuda
    for tag in TAGS.values():
        print(f"dtype {tag}:", check_primitives(memory, backend, tag, (1, 33, 1025, 4100)), flush=True)
    return 0


SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")


def sanitizer_items(options: Options) -> dict[str, Item]:
    script = [sys.executable, str(Path(__file__).resolve()), "--memory-check", *options.as_arguments()]

    def without(task: Task) -> dict[str, Any]:
        code, text = run_for(script, task.left())
        assert code == 0, f"code {code}: {text[-2000:]}"
        return {"output": text[-300:]}

    def under(tool: str) -> Item:
        def check(task: Task) -> dict[str, Any]:
            found = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
            if found is None:
                raise Skip(f"{SANITIZER} is not installed")
            code, text = run_for([found, "--tool", tool, "--error-exitcode", "86", *script], min(task.left(), 40.0))
            return judged_sanitizer(code, text)

        return check

    return {"no tool": without, **{tool: under(tool) for tool in TOOLS}}


def judged_sanitizer(code: int | None, text: str) -> dict[str, Any]:
    """The tool's summary; AssertionError where it found something, Skip where it couldn't run."""
    summaries = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
    if code == 0 and summaries:
        return {"summary": summaries[-1]}
    if code is None:
        raise Skip("it did not end in time")
    if not summaries or "Device not supported" in text:
        raise Skip(f"it could not run (code {code}): {' '.join(text.split())[:300]}")
    raise AssertionError(f"{summaries[-1]} (code {code})\n{text[:5000]}")


# ---- correctness: torch ----


def check_items(options: Options) -> dict[str, Item]:
    items: dict[str, Item] = {
        "golden masks": lambda task: check_golden(task.machine.backend, TorchMemory(task.machine)),
        **{f"primitives {name}": primitives_item(tag) for name, tag in TAGS.items()},
        **{f"CPU = GPU {name}": same_values_item(name) for name in TAGS},
        "backward on a fresh thread": check_fresh_thread,
        "two streams": check_streams,
        "graph: fresh masks": check_graph,
        "graph: a given seed": check_graph_seed,
        "make_graphed_callables": check_graphed_callables,
        "generator": check_generator,
        "no synchronisation": check_no_synchronisation,
        "no hidden copies": check_memory,
        "2**31 elements": check_large,
        "2**31 elements, per row": check_large_rows,
    }
    return items


def primitives_item(tag: int) -> Item:
    return lambda task: check_primitives(TorchMemory(task.machine), task.machine.backend, tag)


def fdt() -> Any:
    import fastdrop.torch

    return fastdrop.torch


def bits_of(tensor: Any) -> Any:
    """Its elements in logical order, as integers."""
    torch = sys.modules["torch"]
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(kinds[tensor.element_size()]).reshape(-1)


def differences(actual: Any, expected: Any) -> str | None:
    """How tensors differ in shape, dtype, strides or bits; None if they don't."""
    for what in ("shape", "dtype"):
        if getattr(actual, what) != getattr(expected, what):
            return f"{what} {getattr(actual, what)}, expected {getattr(expected, what)}"
    if actual.stride() != expected.stride():
        return f"strides {actual.stride()}, expected {expected.stride()}"
    wrong = (bits_of(actual) != bits_of(expected)).nonzero().reshape(-1)
    if len(wrong):
        at = int(wrong[0])
        got, wanted = actual.detach().cpu().reshape(-1)[at], expected.detach().cpu().reshape(-1)[at]
        return f"{len(wrong)} of {expected.numel()} elements, first at {at}: {got:.6g}, expected {wanted:.6g}"
    return None


def layouts() -> dict[str, tuple[Callable[[Any], Any], list[tuple[int, ...] | None]]]:
    """Views of a flat tensor by name, and shapes of noise to try on each."""
    torch = sys.modules["torch"]
    last = torch.channels_last
    image: list[tuple[int, ...] | None] = [None, (2, 16, 1, 1), (1, 16, 9, 1), (2, 1, 9, 12), (1, 1, 1, 1)]
    flat = {f"{n}": (lambda t, n=n: t[:n], [None]) for n in (1, 31, 33, 1024, 1025, 4099, 100_003)}
    shifted = {f"4099 from {k}": (lambda t, k=k: t[k : k + 4099], [None]) for k in (1, 3, 8)}
    return {
        **flat,
        **shifted,
        "empty": (lambda t: t[:0].view(0, 3), [None]),
        "scalar": (lambda t: t[0], [None]),
        "transposed": (lambda t: t[: 37 * 53].view(37, 53).t(), [None, (53, 1), (1, 37)]),
        "every other": (lambda t: t[:8198:2], [None]),
        "image": (lambda t: t[:3456].view(2, 16, 9, 12), image),
        "image, unaligned": (lambda t: t[1:3457].view(2, 16, 9, 12), image),
        "image, channels last": (lambda t: t[:3456].view(2, 16, 9, 12).contiguous(memory_format=last), image),
        "image, permuted": (lambda t: t[:3456].view(9, 2, 12, 16).permute(1, 3, 0, 2), image),
    }


def same_values_item(name: str) -> Item:
    def check(task: Task) -> dict[str, int]:
        machine, torch = task.machine, task.machine.torch
        dropout = fdt().dropout
        dtype = getattr(torch, name)
        torch.manual_seed(0)
        base = torch.randn(100_100, dtype=torch.float64).to(dtype)
        base[:4] = torch.tensor([math.inf, -math.inf, -0.0, torch.finfo(dtype).tiny / 2], dtype=dtype)
        gradient = torch.randn(100_100, dtype=torch.float64).to(dtype)
        wrong, count = [], 0

        def both(source: Any, other: Any, view: Any, p: float, noise: Any, store: str) -> tuple[Any, Any]:
            x = view(source).detach().requires_grad_()
            y = dropout(x, p, seed=7, noise_shape=noise, store=store)
            (dx,) = torch.autograd.grad(y, x, view(other))
            return y, dx

        base_there, gradient_there = base.to(machine.device), gradient.to(machine.device)
        for layout, (view, noises) in layouts().items():
            for noise, p, store in itertools.product(noises, (0.1, 0.5), ("bits", "seed")):
                with backends.use_backend("numpy"):
                    expected = both(base, gradient, view, p, noise, store)
                what = f"{layout}, p={p}, noise {noise}, store={store}"
                try:
                    actual = both(base_there, gradient_there, view, p, noise, store)
                except Exception as error:
                    if not machine.alive():
                        raise
                    wrong.append(f"{what}: {one_line(error)}")
                    continue
                count += 1
                for part, got, wanted in zip(("y", "dx"), actual, expected, strict=True):
                    problem = differences(got, wanted)
                    if problem:
                        wrong.append(f"{what}: {part}: {problem}")
        x = base_there.detach()
        with torch.no_grad(), backends.use_backend("numpy"):
            problem = differences(dropout(x.clone(), 0.3, inplace=True, seed=9), dropout(base.clone(), 0.3, seed=9))
            ends = [differences(dropout(x, p, seed=9), dropout(base, p, seed=9)) for p in (0.0, 1.0)]
        wrong += [f"in place, p = 0, p = 1: {found}" for found in (problem, *ends) if found]
        assert not wrong, f"{len(wrong)} differ: " + "; ".join(wrong[:8])
        return {"cases": count}

    return check


def check_fresh_thread(task: Task) -> dict[str, Any]:
    """Forward here and backward there, and both there: a thread that has no current context of its own."""
    machine, torch = task.machine, task.machine.torch
    dropout = fdt().dropout
    x = torch.randn(10_001, device=machine.device, requires_grad=True)
    dy = torch.randn(10_001, device=machine.device)

    def there(call: Callable[[], Any]) -> Any:
        found: list[Any] = []

        def run() -> None:
            try:
                found.append(call())
                machine.synchronize()
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(30)
        assert found, "the thread did not end"
        if isinstance(found[-1], Exception):
            raise found[-1]
        return found[0]

    for store in ("bits", "seed"):
        y = dropout(x, 0.25, seed=3, store=store)
        (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (dx,) = there(lambda y=y: torch.autograd.grad(y, x, dy))
        assert differences(dx, expected) is None, differences(dx, expected)
        again = there(lambda store=store: dropout(x, 0.25, seed=3, store=store))
        assert differences(again, y) is None, differences(again, y)
    return {}


def check_streams(task: Task) -> dict[str, Any]:
    machine, torch = task.machine, task.machine.torch
    dropout = fdt().dropout
    inputs = [torch.randn(1_000_003 if machine.name == "cuda" else 1003, device=machine.device) for _ in range(2)]
    expected = [[dropout(x, 0.3, seed=100 * k + i) for i in range(20)] for k, x in enumerate(inputs)]
    machine.synchronize()
    found: list[list[Any]] = [[], []]
    contexts = machine.streams(2)
    for i in range(20):
        for k, context in enumerate(contexts):
            with context:
                found[k].append(dropout(inputs[k], 0.3, seed=100 * k + i))
    machine.synchronize()
    for k, i in itertools.product(range(2), range(20)):
        problem = differences(found[k][i], expected[k][i])
        assert problem is None, f"stream {k}, call {i}: {problem}"
    return {"calls": 40}


def replayed(task: Task, times: int, **options: Any) -> list[Any]:
    """The masks of a captured forward and backward, one per replay; AssertionError where the two disagree in one."""
    machine, torch = task.machine, task.machine.torch
    dropout = fdt().dropout
    x = (1.0 + torch.rand(100_003, device=machine.device)).requires_grad_()
    dy = torch.ones(100_003, device=machine.device)
    held: dict[str, Any] = {}

    def step() -> None:
        held["y"] = dropout(x, 0.5, **options)
        (held["dx"],) = torch.autograd.grad(held["y"], x, dy)

    replay = machine.capture(step)
    masks = []
    for k in range(times):
        replay()
        machine.synchronize()
        keep = held["dx"] != 0
        problem = differences(held["y"], torch.where(keep, 2.0 * x, 0.0))
        assert problem is None, f"replay {k}, {options}: backward has another mask than forward: {problem}"
        share = float(keep.double().mean())
        assert abs(share - 0.5) < 0.02, f"replay {k}, {options}: {share:.3f} kept"
        masks.append(keep.cpu())
    return masks


def check_graph(task: Task) -> dict[str, Any]:
    torch = task.machine.torch
    for store in ("bits", "seed"):
        masks = replayed(task, 6, store=store)
        for (i, one), (k, other) in itertools.combinations(enumerate(masks), 2):
            same = float((one == other).double().mean())
            assert abs(same - 0.5) < 0.02, f"store={store}: replays {i} and {k} agree in {same:.3f} of their cells"
        torch.manual_seed(5)
    return {"replays": 12}


def check_graph_seed(task: Task) -> dict[str, Any]:
    torch = task.machine.torch
    for store in ("bits", "seed"):
        first, *others = replayed(task, 3, seed=11, store=store)
        assert all(torch.equal(first, other) for other in others), f"store={store}: replays differ under one seed"
    return {"replays": 6}


def check_graphed_callables(task: Task) -> dict[str, Any]:
    machine, torch = task.machine, task.machine.torch
    sample = torch.rand(50_001, device=machine.device, requires_grad=True)
    graphed = machine.graphed(fdt().Dropout(0.5).to(machine.device).train(), (sample,))
    seen = []
    for k in range(4):
        x = (1.0 + torch.rand(50_001, device=machine.device)).requires_grad_()
        y = graphed(x)
        y.backward(torch.ones_like(y))
        problem = differences(y.detach(), torch.where(x.grad != 0, 2.0 * x.detach(), 0.0))
        assert problem is None, f"call {k}: {problem}"
        seen.append((x.grad != 0).cpu())
    for one, other in itertools.combinations(seen, 2):
        same = float((one == other).double().mean())
        assert abs(same - 0.5) < 0.02, f"two calls agree in {same:.3f} of their cells"
    return {"calls": 4}


def check_generator(task: Task) -> dict[str, Any]:
    """torch's seed decides, each call draws anew, and torch's own stream goes on as it would."""
    machine, torch = task.machine, task.machine.torch
    dropout = fdt().dropout
    x = torch.ones(100_003, device=machine.device)
    torch.manual_seed(3)
    first = [dropout(x, 0.5) for _ in range(3)]
    torch.manual_seed(3)
    again = [dropout(x, 0.5) for _ in range(3)]
    for k, (one, other) in enumerate(zip(first, again, strict=True)):
        assert torch.equal(one, other), f"call {k} differs after the same manual_seed"
    theirs = [torch.nn.functional.dropout(x, 0.5) for _ in range(3)]
    for one, other in itertools.combinations([*first, *theirs], 2):
        same = float((one == other).double().mean())
        assert abs(same - 0.5) < 0.02, f"two calls agree in {same:.3f} of their cells"
    return {}


def check_no_synchronisation(task: Task) -> dict[str, Any]:
    machine, torch = task.machine, task.machine.torch
    dropout = fdt().dropout
    x = torch.randn(4099, device=machine.device, requires_grad=True)
    dy = torch.randn(4099, device=machine.device)

    def step() -> None:
        for options in ({}, {"seed": 7}, {"store": "seed"}, {"noise_shape": (1,)}):
            torch.autograd.grad(dropout(x, 0.3, **options), x, dy)

    step()
    with machine.forbidding_synchronisation():
        step()
    return {}


def check_memory(task: Task) -> dict[str, Any]:
    """Forward takes its output and the mask, backward its output, and neither anything else for a while."""
    machine, torch = task.machine, task.machine.torch
    dropout = fdt().dropout
    n = 1 << 22
    base = torch.randn(n + 8, device=machine.device)
    views = {
        "contiguous": base[:n],
        "unaligned": base[1 : n + 1],
        "transposed": base[:n].view(1 << 10, 1 << 12).t(),
        "channels last": base[:n].view(16, 64, 64, 64).contiguous(memory_format=torch.channels_last),
    }
    slack = 4 << 20  # the allocator hands out up to a MiB more than asked for
    found: dict[str, Any] = {}
    wrong = []
    for (name, view), noise in itertools.product(views.items(), (False, True)):
        shape = (*view.shape[:-1], 1) if noise and view.dim() > 1 else None
        if noise and shape is None:
            continue
        x = view.detach().requires_grad_()
        limit = 4 * n + (math.prod(shape) if shape else n) // 8 + slack
        forward = machine.peak_bytes(lambda x=x, shape=shape: dropout(x, 0.1, noise_shape=shape))
        y = dropout(x, 0.1, noise_shape=shape)
        backward = machine.peak_bytes(lambda x=x, y=y: torch.autograd.grad(y, x, torch.ones_like(y)))
        del y
        found[f"{name}{', noise' if noise else ''}"] = [forward, backward]
        if forward > limit:
            wrong.append(f"{name}, noise {shape}: forward takes {forward:,} bytes, expected at most {limit:,}")
        if backward > 8 * n + slack:  # dy and dx
            wrong.append(
                f"{name}, noise {shape}: backward takes {backward:,} bytes, expected at most {8 * n + slack:,}"
            )
    assert not wrong, "; ".join(wrong)
    return found


def as_array(tensor: Any) -> Any:
    """A tensor's elements as the reference takes them."""
    torch = sys.modules["torch"]
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype is torch.bfloat16 else tensor.numpy()


def expect_slice(x: Any, y: Any, start: int, stop: int, seed: int, p: float) -> None:
    """y = dropout of x, by the reference, for these elements alone."""
    tag = TAGS[str(x.dtype).removeprefix("torch.")]
    source = as_array(x[start:stop])
    expected = np.empty_like(source)
    cut, scale = threshold_and_scale(p)
    reference.dropout_forward(tag, source, expected, None, start, stop - start, seed, 0, cut, scale, 0.0, 0.0)
    differ = np.flatnonzero(as_array(y[start:stop]).view(np.uint8) != expected.view(np.uint8))
    assert not differ.size, f"elements {start}..{stop}: {differ.size} bytes differ, the first of element " + str(
        start + int(differ[0]) // source.itemsize
    )


def check_large(task: Task) -> dict[str, Any]:
    machine, torch = task.machine, task.machine.torch
    dropout = fdt().dropout
    n = machine.large
    if not machine.has_room_for(12 * n):
        raise Skip(f"{12 * n:,} bytes of memory are not free")
    width = min(3000, n // 8)
    spots = [0, *(border - width for border in machine.borders), n - 2 * width]
    for dtype, start in ((torch.bfloat16, 0), (torch.float16, 1)):
        x = (
            torch.empty(n + 1, dtype=dtype, device=machine.device)
            .uniform_(1.0, 2.0)[start : start + n]
            .requires_grad_()
        )
        poison = torch.full((n,), math.nan, dtype=dtype, device=machine.device)
        del poison  # the next output finds it
        y = dropout(x, 0.1, seed=21)
        for at in spots:
            expect_slice(x, y, at, at + 2 * width, 21, 0.1)
        kept = int(torch.count_nonzero(y.detach()))
        assert abs(kept / n - 0.9) < 0.02, f"{dtype}: {kept / n:.4f} kept"
        dy = torch.ones_like(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        for at in spots:
            expect_slice(dy, dx, at, at + 2 * width, 21, 0.1)
        # NaN is nonzero: an element left unwritten in either is one too many in one of them
        assert int(torch.count_nonzero(dx)) == kept, f"{dtype}: backward keeps other elements than forward"
        assert not bool(torch.isnan(torch.max(y.detach())))
        assert not bool(torch.isnan(torch.max(dx)))
        del x, y, dy, dx
        machine.free()
    return {"elements": n}


def check_large_rows(task: Task) -> dict[str, Any]:
    """More than 2**31 elements that share decisions: one per row."""
    machine, torch = task.machine, task.machine.torch
    dropout = fdt().dropout
    rows = machine.large // 1000 + 1
    n = rows * 1000
    if not machine.has_room_for(8 * n):
        raise Skip(f"{8 * n:,} bytes of memory are not free")
    x = torch.empty(rows, 1000, dtype=torch.bfloat16, device=machine.device).uniform_(1.0, 2.0)
    poison = torch.full_like(x, math.nan)
    del poison
    y = dropout(x, 0.5, seed=22, noise_shape=(rows, 1))
    words = np.empty((rows + 31) // 32, np.uint32)
    cut, _ = threshold_and_scale(0.5)
    reference.draw_bits(words, 0, 0, rows, 22, 0, cut)
    keep = torch.from_numpy(np.unpackbits(words.view(np.uint8), bitorder="little")[:rows].astype(bool))
    keep = keep.to(machine.device)
    step = max(1, rows // 8)
    for at in range(0, rows, step):
        expected = torch.where(keep[at : at + step, None], 2 * x[at : at + step], 0)
        assert torch.equal(y[at : at + step], expected), f"rows from {at} on differ"
    del x, y, keep
    machine.free()
    return {"elements": n}


# ---- times: the kernels ----

COPY = "copy"
OURS, SEEDED, NATIVE, COMPILED, TRITON = "fastdrop", 'fastdrop, store="seed"', "native", "torch.compile", "triton"
FORWARD, BACKWARD, REGENERATE, BOTH = "forward", "backward", "regenerate", "forward+backward"
COMPILE_WORKS, TRITON_CHOICE = "torch.compile works", "triton's block"


def kernel_items(options: Options) -> dict[str, Item]:
    sizes = ("256M", "16M") if options.quick else tuple(SIZES)
    items: dict[str, Item] = {COMPILE_WORKS: try_compile, TRITON_CHOICE: choose_triton}
    for p, size, dtype in itertools.product(PROBABILITIES[:1] if options.quick else PROBABILITIES, sizes, DTYPES):
        items[f"{size} {dtype} p={p}"] = kernel_item(size, dtype, p)
    return items


def kernel_item(size: str, dtype: str, p: float) -> Item:
    return lambda task: time_kernels(task, size, dtype, p)


def try_compile(task: Task) -> dict[str, Any]:
    """Whether torch.compile works here; and its first start, which takes longest, apart."""
    machine, torch = task.machine, task.machine.torch
    start = time.monotonic()
    x = torch.randn(4096, device=machine.device, requires_grad=True)
    y = compiled_dropout(machine, 0.1)(x)
    torch.autograd.grad(y, x, torch.ones_like(y))
    machine.synchronize()
    return {"seconds": time.monotonic() - start}


def compiled_dropout(machine: Any, p: float) -> Callable[[Any], Any]:
    dropout = machine.torch.nn.functional.dropout
    return machine.compile(lambda x: dropout(x, p, True))


def triton_dropout() -> Any:
    if importlib.util.find_spec("triton") is None:
        raise Skip("triton is not installed")
    from bench import gpu_triton

    return gpu_triton


def choose_triton(task: Task) -> dict[str, Any]:
    """The fastest of a few kernels and blocks, by dtype."""
    machine, torch = task.machine, task.machine.torch
    kernels = triton_dropout()
    if machine.name != "cuda":
        raise Skip("it needs a GPU")
    chosen = {}
    for name in DTYPES:
        n = machine.sizes["16M"]
        x = torch.randn(n, dtype=getattr(torch, name), device=machine.device)
        y = torch.empty_like(x)
        calls = [
            Contender(str(choice), lambda choice=choice, x=x, y=y: kernels.dropout(x, y, 0.1, 7, choice))
            for choice in kernels.CHOICES
        ]
        rows = race(machine, calls, 0.3)
        share = float((y == 0).double().mean())
        assert abs(share - 0.1) < 0.01, f"{name}: {share:.3f} dropped"
        best = min(kernels.CHOICES, key=lambda choice: rows[str(choice)]["seconds"])
        chosen[name] = {"choice": list(best), "seconds": {key: row["seconds"] for key, row in rows.items()}}
    return chosen


def time_kernels(task: Task, size: str, dtype_name: str, p: float) -> dict[str, Any]:
    """All contenders on one size, dtype and p, each captured as a graph of a launch per buffer in rotation."""
    machine, torch = task.machine, task.machine.torch
    machine.free()
    n, dtype, tag = machine.sizes[size], getattr(torch, dtype_name), TAGS[dtype_name]
    cut, scale = threshold_and_scale(p)
    itemsize = dtype.itemsize
    count = buffers(n * itemsize, machine.l2_bytes)
    x = [torch.randn(n, dtype=dtype, device=machine.device) for _ in range(count)]
    y = [torch.full_like(each, math.nan) for each in x]
    words = [torch.full(((n + 31) // 32,), -1, dtype=torch.int32, device=machine.device) for _ in x]
    addresses = [(a.data_ptr(), b.data_ptr(), w.data_ptr()) for a, b, w in zip(x, y, words, strict=True)]
    backend, ordinal, stream = machine.backend, machine.ordinal, machine.stream
    contenders: list[Contender] = []
    missing: dict[str, str] = {}

    def add(implementation: str, operation: str, nbytes: int | None, *steps: Callable[[int], object]) -> None:
        def call() -> None:
            for step in steps:
                for i in range(count):
                    step(i)

        name = f"{implementation} {operation}".strip()
        note = ""
        try:
            enqueue = machine.capture(call)
        except Exception as error:
            if not machine.alive():
                raise
            enqueue, note = call, f"launched one by one, since no graph could be captured: {one_line(error)}"
            try:
                call()
                machine.synchronize()
            except Exception as again:
                if not machine.alive():
                    raise
                missing[name] = one_line(again)
                return
        contenders.append(Contender(name, enqueue, count, nbytes, note))

    def copy(i: int) -> None:
        y[i].copy_(x[i])

    def forward(i: int) -> None:
        a, b, w = addresses[i]
        backend.dropout_forward_at(ordinal, stream(), tag, a, b, w, 0, n, SEED + i, 0, cut, scale, 0.0, 0.0)

    def regenerate(i: int) -> None:
        a, b, _ = addresses[i]
        backend.dropout_forward_at(ordinal, stream(), tag, a, b, 0, 0, n, SEED + i, 0, cut, scale, 0.0, 0.0)

    def backward(i: int) -> None:
        a, b, w = addresses[i]
        backend.masked_affine_at(ordinal, stream(), tag, a, b, w, 0, 1, 1, n, scale, 0.0, 0.0)

    forward(0)
    machine.synchronize()
    width = min(2048, n // 2)
    for start in (0, n - width):
        cells = slice(start, start + width)
        expected = np.empty(width, STORAGE[tag])
        given = as_array(x[0][cells])
        reference.dropout_forward(tag, given, expected, None, start, width, SEED, 0, cut, scale, 0.0, 0.0)
        assert np.array_equal(as_array(y[0][cells]).view(np.uint8), expected.view(np.uint8)), "forward is wrong"

    one, mask = moved(n, itemsize, 1), moved(n, itemsize, 0, 1)
    add(COPY, "", one, copy)
    add(OURS, FORWARD, one + mask, forward)
    add(OURS, BACKWARD, one + mask, backward)
    add(OURS, REGENERATE, one, regenerate)
    add(OURS, BOTH, 2 * (one + mask), forward, backward)
    add(SEEDED, BOTH, 2 * one, regenerate, regenerate)

    held: dict[str, list[Any]] = {name: [None] * count for name in ("y", "dx")}  # no buffer is used twice in a sample

    def native_forward(i: int) -> None:
        held["y"][i] = torch.native_dropout(x[i], p, True)

    def native_backward(i: int) -> None:
        held["dx"][i] = torch.ops.aten.native_dropout_backward(x[i], held["y"][i][1], 1.0 / (1.0 - p))

    add(NATIVE, FORWARD, one + n, native_forward)
    add(NATIVE, BACKWARD, one + n, native_backward)
    add(NATIVE, BOTH, 2 * (one + n), native_forward, native_backward)

    compile_row = task.found.get(COMPILE_WORKS, {})
    if compile_row.get("status") != "ok":
        missing[COMPILED] = compile_row.get("error", "not tried")
    elif p != PROBABILITIES[0]:
        missing[COMPILED] = f"timed at p = {PROBABILITIES[0]} alone, since compiling takes long"
    else:
        leaves = [each.detach().requires_grad_() for each in x]
        compiled = compiled_dropout(machine, p)

        def compiled_forward(i: int) -> None:
            held["y"][i] = compiled(leaves[i])

        def compiled_backward(i: int) -> None:
            (held["dx"][i],) = torch.autograd.grad(held["y"][i], leaves[i], x[i])

        add(COMPILED, FORWARD, None, compiled_forward)
        add(COMPILED, BOTH, None, compiled_forward, compiled_backward)

    triton_row = task.found.get(TRITON_CHOICE, {})
    if triton_row.get("status") != "ok":
        missing[TRITON] = triton_row.get("error", "not tried")
    else:
        kernels = triton_dropout()
        choice = tuple(triton_row["result"][dtype_name]["choice"])

        def triton_forward(i: int) -> None:
            kernels.dropout(x[i], y[i], p, i, choice)

        add(TRITON, FORWARD, one, triton_forward)
        add(TRITON, BOTH, 2 * one, triton_forward, triton_forward)

    rows = race(machine, contenders, task.share(3.0), COPY)
    ours = f"{OURS} {BOTH}"
    clocks = machine.clocks()
    contenders.clear()  # and the graphs with them, whose memory is theirs
    held.clear()
    machine.free()
    return {
        "size": size, "elements": n, "dtype": dtype_name, "p": p, "buffers": count, "rows": rows, "missing": missing,
        "faster": {name: rows[name]["seconds"] / rows[ours]["seconds"] for name in rows if name.endswith(BOTH)},
        "clocks": clocks,
    }  # fmt: skip


# ---- times: whole calls ----


def call_items(options: Options) -> dict[str, Item]:
    return {f"16M {name}": (lambda task, name=name: time_calls(task, name)) for name in DTYPES}


def time_calls(task: Task, dtype_name: str) -> dict[str, Any]:
    """Forward and backward through autograd as users call them, Python's share included; and the bytes kept between."""
    machine, torch = task.machine, task.machine.torch
    machine.free()
    ours, theirs = fdt().dropout, torch.nn.functional.dropout
    n, dtype = machine.sizes["16M"], getattr(torch, dtype_name)
    count = buffers(n * dtype.itemsize, machine.l2_bytes)
    x = [torch.randn(n, dtype=dtype, device=machine.device, requires_grad=True) for _ in range(count)]
    dy = torch.randn(n, dtype=dtype, device=machine.device)
    functions: dict[str, Callable[[Any], Any]] = {
        "F.dropout": lambda x: theirs(x, 0.1, True),
        OURS: lambda x: ours(x, 0.1),
        SEEDED: lambda x: ours(x, 0.1, store="seed"),
        COMPILED: compiled_dropout(machine, 0.1),
    }
    missing, kept, contenders = {}, {}, []
    for name, function in functions.items():

        def call(function: Callable[[Any], Any] = function) -> None:
            outputs = [function(each) for each in x]
            for each, output in zip(x, outputs, strict=True):
                torch.autograd.grad(output, each, dy)

        try:
            kept[name] = kept_bytes(torch, function, x[0])
            call()
            machine.synchronize()
        except Exception as error:
            if not machine.alive():
                raise
            missing[name] = one_line(error)
        else:
            contenders.append(Contender(name, call, count))
    rows = race(machine, contenders, task.share(4.0), "F.dropout")
    return {"size": "16M", "elements": n, "dtype": dtype_name, "p": 0.1, "rows": rows, "kept": kept, "missing": missing}


def kept_bytes(torch: Any, function: Callable[[Any], Any], x: Any) -> int:
    """Bytes of the tensors that forward saves for backward."""
    seen: list[int] = []

    def pack(tensor: Any) -> Any:
        seen.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x)
    return sum(seen)


def host_items(options: Options) -> dict[str, Item]:
    return {"calls": time_host_calls, "pieces": time_host_pieces, "profile": profile_host}


F_NO_GRAD, F_GRAD, F_BOTH = "F.dropout, no grad", "F.dropout, forward", "F.dropout, forward+backward"


def time_host_calls(task: Task) -> dict[str, Any]:
    machine, torch = task.machine, task.machine.torch
    ours, theirs = fdt().dropout, torch.nn.functional.dropout
    x = torch.randn(HOST_ELEMENTS, device=machine.device)
    leaf = x.detach().clone().requires_grad_()
    dy = torch.randn(HOST_ELEMENTS, device=machine.device)
    grad = torch.autograd.grad
    calls: dict[str, Callable[[], object]] = {
        F_NO_GRAD: lambda: theirs(x, 0.1),
        F_GRAD: lambda: theirs(leaf, 0.1),
        F_BOTH: lambda: grad(theirs(leaf, 0.1), leaf, dy),
        "fastdrop, no grad": lambda: ours(x, 0.1),
        "fastdrop, no grad, seed=7": lambda: ours(x, 0.1, seed=7),
        "fastdrop, forward": lambda: ours(leaf, 0.1),
        "fastdrop, forward+backward": lambda: grad(ours(leaf, 0.1), leaf, dy),
        'fastdrop, store="seed", forward+backward': lambda: grad(ours(leaf, 0.1, store="seed"), leaf, dy),
    }
    against = {name: {"no grad": F_NO_GRAD, "forward": F_GRAD, "forward+backward": F_BOTH}[
        "no grad" if "no grad" in name else name.rpartition(", ")[2]
    ] for name in calls}  # fmt: skip
    return race_on_host(machine, calls, task.share(5.0), against)


def time_host_pieces(task: Task) -> dict[str, Any]:
    """What a call is made of, each alone."""
    machine, torch = task.machine, task.machine.torch
    n = HOST_ELEMENTS
    x = torch.randn(n, device=machine.device)
    y = torch.empty_like(x)
    words = torch.zeros((n + 31) // 32, dtype=torch.int32, device=machine.device)
    cut, scale = threshold_and_scale(0.1)
    backend = machine.backend
    head = machine.ordinal, machine.stream(), FLOAT32, x.data_ptr(), y.data_ptr(), words.data_ptr()
    calls: dict[str, Callable[[], object]] = {
        "dropout_forward_at": lambda: backend.dropout_forward_at(*head, 0, n, 7, 0, cut, scale, 0.0, 0.0),
        "masked_affine_at": lambda: backend.masked_affine_at(*head, 0, 1, 1, n, scale, 0.0, 0.0),
        "empty_like": lambda: torch.empty_like(x),
        "empty words": lambda: words.new_empty((n + 31) // 32),
        "native_dropout": lambda: torch.native_dropout(x, 0.1, True),
        "copy_": lambda: y.copy_(x),
        **machine.host_pieces(),
    }
    return race_on_host(machine, calls, task.share(3.0), {})


def profile_host(task: Task) -> dict[str, Any]:
    """Where Python spends the time of a call, by cProfile, whose own cost inflates short functions."""
    machine, torch = task.machine, task.machine.torch
    ours = fdt().dropout
    leaf = torch.randn(HOST_ELEMENTS, device=machine.device, requires_grad=True)
    dy = torch.randn(HOST_ELEMENTS, device=machine.device)
    found, count = {}, 5 * machine.host_calls
    for name, call in {
        "no grad": lambda: ours(leaf.detach(), 0.1),
        "forward+backward": lambda: torch.autograd.grad(ours(leaf, 0.1), leaf, dy),
    }.items():
        call()
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(count):
            call()
        profile.disable()
        machine.synchronize()
        ranked = sorted(pstats.Stats(profile).stats.items(), key=lambda entry: -entry[1][2])
        found[name] = [
            f"{1e6 * own / count:.2f} us in {Path(file).name}:{line} {function}, {calls / count:g} calls"
            for (file, line, function), (_, calls, own, _, _) in ranked[:15]
        ]
    return found


def channel_items(options: Options) -> dict[str, Item]:
    return {
        f"{dtype}, {layout}": (lambda task, dtype=dtype, layout=layout: time_channels(task, dtype, layout))
        for dtype in DTYPES
        for layout in ("channels first", "channels last")
    }


def time_channels(task: Task, dtype_name: str, layout: str) -> dict[str, Any]:
    """One decision per channel of an image, forward without grad, beside dropout2d."""
    machine, torch = task.machine, task.machine.torch
    machine.free()
    ours, theirs = fdt().dropout, torch.nn.functional.dropout2d
    shape, dtype = machine.channels_shape, getattr(torch, dtype_name)
    form = torch.channels_last if layout == "channels last" else torch.contiguous_format
    n = math.prod(shape)
    count = buffers(n * dtype.itemsize, machine.l2_bytes)
    x = [torch.randn(shape, dtype=dtype, device=machine.device).contiguous(memory_format=form) for _ in range(count)]
    y = [torch.empty_like(each) for each in x]
    noise = (*shape[:2], 1, 1)
    one = moved(n, dtype.itemsize, 1)

    def each(function: Callable[[int], object]) -> Callable[[], None]:
        def call() -> None:
            for i in range(count):
                function(i)

        return call

    contenders = [
        Contender(COPY, each(lambda i: y[i].copy_(x[i])), count, one),
        Contender(OURS, each(lambda i: ours(x[i], 0.1, noise_shape=noise)), count, one),
        Contender("F.dropout2d", each(lambda i: theirs(x[i], 0.1)), count),
    ]
    return {
        "dtype": dtype_name,
        "layout": layout,
        "elements": n,
        "rows": race(machine, contenders, task.share(2.0), COPY),
    }


# ---- launch shapes ----

NO_LIMIT = (1 << 31) - 1
SHAPES = tuple(itertools.product((64, 128, 256, 512), (4, 8, 16, 32, 64, NO_LIMIT)))  # threads, blocks per SM


def tune_items(options: Options) -> dict[str, Item]:
    return {
        f"{size} {dtype}": (lambda task, size=size, dtype=dtype: tune(task, size, dtype))
        for size in ("256M", "16M")
        for dtype in DTYPES
    }


@contextlib.contextmanager
def launch_shape(machine: Any, threads: int, per_sm: int, sms: int) -> Iterator[None]:
    """Kernels are launched in blocks of so many threads, at most so many blocks per multiprocessor."""
    driver, device = machine.driver, machine.driver.device(machine.ordinal)
    before = driver.THREADS, device.blocks
    driver.THREADS, device.blocks = threads, min(per_sm * sms, NO_LIMIT)
    try:
        yield
    finally:
        driver.THREADS, device.blocks = before


def tune(task: Task, size: str, dtype_name: str) -> dict[str, Any]:
    machine, torch = task.machine, task.machine.torch
    machine.free()
    n, dtype, tag = machine.sizes[size], getattr(torch, dtype_name), TAGS[dtype_name]
    cut, scale = threshold_and_scale(0.1)
    sms = machine.describe()["sms"]
    default = machine.driver.THREADS, machine.driver.BLOCKS_PER_SM
    shapes = list(dict.fromkeys([default, *SHAPES]))
    count = buffers(n * dtype.itemsize, machine.l2_bytes)
    x = [torch.randn(n, dtype=dtype, device=machine.device) for _ in range(count)]
    y = [torch.empty_like(each) for each in x]
    words = torch.zeros((n + 31) // 32, dtype=torch.int32, device=machine.device)
    w, stream = words.data_ptr(), machine.stream()
    pairs = [(a.data_ptr(), b.data_ptr()) for a, b in zip(x, y, strict=True)]
    backend, ordinal = machine.backend, machine.ordinal
    one, mask = moved(n, dtype.itemsize, 1), moved(n, dtype.itemsize, 0, 1)

    def contender(operation: str, threads: int, per_sm: int) -> Contender:
        def call() -> None:
            with launch_shape(machine, threads, per_sm, sms):
                for a, b in pairs:
                    if operation == FORWARD:
                        backend.dropout_forward_at(ordinal, stream, tag, a, b, w, 0, n, 7, 0, cut, scale, 0.0, 0.0)
                    else:
                        backend.masked_affine_at(ordinal, stream, tag, a, b, w, 0, 1, 1, n, scale, 0.0, 0.0)

        return Contender(f"{operation} {threads}x{per_sm}", call, count, one + mask)

    def copy() -> None:
        for a, b in zip(x, y, strict=True):
            b.copy_(a)

    contenders = [contender(operation, *shape) for operation in (FORWARD, BACKWARD) for shape in shapes]
    rows = race(machine, [Contender(COPY, copy, count, one), *contenders], task.share(12.0), COPY)
    found: dict[str, Any] = {"size": size, "dtype": dtype_name, "copy": rows[COPY]}
    for operation in (FORWARD, BACKWARD):
        ranked = sorted(
            (
                {"threads": shape[0], "per_sm": shape[1], **rows[f"{operation} {shape[0]}x{shape[1]}"]}
                for shape in shapes
            ),
            key=lambda row: row["seconds"],
        )
        chosen = next(row for row in ranked if (row["threads"], row["per_sm"]) == default)
        found[operation] = {"default": chosen, "best": ranked[0], "all": ranked}
    return found


# ---- the report ----


def rows_of(data: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """Results of a section's items that have one."""
    items = data["sections"].get(section, {}).get("items", {})
    return [row["result"] for row in items.values() if row["status"] == "ok" and row.get("result")]


Target = tuple[str, str, str, str, bool]


def targets(data: dict[str, Any]) -> list[Target]:
    """(what, case, must be, measured, met), misses first."""
    found: list[Target] = []
    for result in rows_of(data, "kernels"):
        if "rows" not in result:
            continue
        rows, case = result["rows"], f"{result['size']} {result['dtype']} p={result['p']}"
        if result["size"] == "256M":
            for operation in (FORWARD, BACKWARD):
                share = rows.get(f"{OURS} {operation}", {}).get("share")
                if share is not None:
                    must = f"at least {SHARE_OF_COPY:.0%} of the copy's bandwidth"
                    found.append((operation, case, must, f"{share:.1%}", share >= SHARE_OF_COPY))
        for other in (NATIVE, COMPILED):
            ratio = result["faster"].get(f"{other} {BOTH}")
            if ratio is not None:
                found.append((f"{BOTH} against {other}", case, "faster", f"{ratio:.2f}x", ratio > 1.0))
    for result in rows_of(data, "calls"):
        kept = result["kept"]
        if OURS in kept and "F.dropout" in kept:
            limit = kept["F.dropout"] / 8 + 4
            case = f"{result['size']} {result['dtype']}"
            found.append(("bytes kept", case, f"at most {limit:,.0f}", f"{kept[OURS]:,}", kept[OURS] <= limit))
    for result in rows_of(data, "host"):
        for name, row in result.items():
            if name.startswith("fastdrop") and isinstance(row, dict) and "against" in row:
                ratio = row["time_ratio"]
                must = f"at most {HOST_RATIO}x {row['against']}"
                found.append((f"host: {name}", f"{HOST_ELEMENTS} elements", must, f"{ratio:.2f}x", ratio <= HOST_RATIO))
    return sorted(found, key=lambda target: target[4])


def failures(data: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(section, item, status, reason) of items that failed or weren't run, failures first."""
    found = [
        (name, item, row["status"], row.get("error", ""))
        for name, section in data["sections"].items()
        for item, row in section["items"].items()
        if row["status"] in ("failed", "not run", "skipped")
    ]
    return sorted(found, key=lambda entry: ("failed", "not run", "skipped").index(entry[2]))


def microseconds(row: dict[str, Any] | None, share: bool = False) -> str:
    if row is None:
        return "-"
    text = f"{1e6 * row['seconds']:,.1f}"
    return f"{text} ({row['share']:.0%})" if share and "share" in row else text


def report(data: dict[str, Any], full: bool = True) -> str:
    """Markdown. Not ``full``: what is printed, without every contender's spread."""
    about = next(iter(rows_of(data, "machine")), {})
    packages = ", ".join(f"{name} {number}" for name, number in about.get("packages", {}).items())
    lines = [f"# GPU report: {about.get('device', 'no device')}", ""]
    if data["options"]["dry_run"]:
        lines += ["**A dry run on the CPU: it shows that the script runs. No number here means anything.**", ""]
    lines += [
        f"{about.get('sms', '?')} SMs, L2 {about.get('l2_bytes', 0) / 1e6:.0f} MB, memory "
        f"{about.get('memory_bytes', 0) / 1e9:.0f} GB; driver {about.get('driver_version', '?')}, SM clock "
        f"{about.get('clocks.sm', '?')} idle of {about.get('clocks.max.sm', '?')}, memory clock "
        f"{about.get('clocks.mem', '?')}; Python {about.get('python', '?')}, {packages}; fastdrop "
        f"{about.get('fastdrop', '?')}; {data['started'][:16]}, {data.get('seconds', 0):.0f} s"
        f"{', quick' if data['options']['quick'] else ''}.",
        "",
        "## Correctness",
        "",
    ]
    for section in data["sections"].values():
        counts: dict[str, int] = {}
        for row in section["items"].values():
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        told = ", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing ran"
        mark = {"failed": "**failed**", "cut": "**cut short**"}.get(section["status"], "ok")
        lines.append(f"* {section['title']}: {mark}; {told}; {section['seconds']} s")
    summaries = [row["summary"] for name in ("suite", "sanitizer") for row in rows_of(data, name) if "summary" in row]
    lines += [f"* {text}" for text in summaries]
    bad = failures(data)
    if bad:
        lines += ["", "| section | item | | why |", "|---|---|---|---|"]
        shown = bad if full else bad[:14]
        clipped = 400 if full else 200
        for section_name, item, status, reason in shown:
            mark = "**failed**" if status == "failed" else status
            lines.append(f"| {section_name} | {item} | {mark} | {cell(reason, clipped)} |")
        if len(shown) < len(bad):
            lines.append(f"| | and {len(bad) - len(shown)} more | | |")
    judged = targets(data)
    if judged:
        if any(data["sections"].get(name, {}).get("status") == "failed" for name in ("suite", "checks")):
            lines += ["", "**Checks have failed: what follows are times of something that isn't known to be right.**"]
        lines += ["", "## Targets", "", "| what | case | must be | measured | |", "|---|---|---|---|---|"]
        lines += [
            f"| {what} | {case} | {must} | {measured} | {'met' if met else '**missed**'} |"
            for what, case, must, measured, met in judged
            if full or not met
        ]
        met = [f"{what} {case} {measured}" for what, case, _, measured, met in judged if met]
        if met and not full:
            lines += ["", f"Met: {'; '.join(met)}."]
    lines += kernel_table(data, full) + call_tables(data) + tune_table(data, full)
    return "\n".join(lines) + "\n"


def cell(text: str, clipped: int) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= clipped else text[:clipped] + "..."


def kernel_table(data: dict[str, Any], full: bool) -> list[str]:
    results = [result for result in rows_of(data, "kernels") if "rows" in result]
    if not results:
        return []
    columns = (
        (OURS, FORWARD), (OURS, BACKWARD), (OURS, REGENERATE), (NATIVE, FORWARD), (NATIVE, BACKWARD), (TRITON, FORWARD),
        (OURS, BOTH), (SEEDED, BOTH), (NATIVE, BOTH), (COMPILED, BOTH), (TRITON, BOTH),
    )  # fmt: skip
    short = {FORWARD: "f", BACKWARD: "b", REGENERATE: "regenerate", BOTH: "f+b"}
    lines = [
        "",
        "## Kernels",
        "",
        "us, medians of alternating rounds; in brackets the share of the copy's bandwidth, by the bytes each moves.",
        'f, b: forward, backward; regenerate: forward and backward of store="seed", which are one kernel.',
        "",
        "| case | copy, us | copy, GB/s | " + " | ".join(f"{who} {short[what]}" for who, what in columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for result in results:
        rows = result["rows"]
        copy = rows.get(COPY)
        speed = f"{copy['bytes_per_second'] / 1e9:,.0f}" if copy else "-"
        values = [microseconds(rows.get(f"{who} {what}"), True) for who, what in columns]
        case = f"{result['size']} {result['dtype']} p={result['p']}"
        lines.append(f"| {case} | {microseconds(copy)} | {speed} | " + " | ".join(values) + " |")
    notes = {f"{name}: {cell(why, 160)}" for result in results for name, why in result["missing"].items()}
    notes |= {
        f"{name}: {cell(row['note'], 160)}"
        for result in results
        for name, row in result["rows"].items()
        if "note" in row
    }
    lines += ["", *(f"* {note}" for note in sorted(notes))]
    if full:
        lines += [
            "", "## Every contender", "",
            "| case | contender | us | quartiles | min to max | GB/s | share of copy | rounds x launches |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for result in results:
            case = f"{result['size']} {result['dtype']} p={result['p']}"
            for name, row in result["rows"].items():
                speed = f"{row['bytes_per_second'] / 1e9:,.0f}" if "bytes_per_second" in row else ""
                share = f"{row['share']:.1%}" if "share" in row else ""
                middle, low, high, least, most = (
                    f"{1e6 * row[key]:,.2f}" for key in ("seconds", "low", "high", "min", "max")
                )
                lines.append(
                    f"| {case} | {name} | {middle} | {low} to {high} | {least} to {most} | {speed} | {share} | "
                    f"{row['rounds']} x {row['launches']} |"
                )
    else:
        spread = max(
            (row["high"] - row["low"]) / row["seconds"] for result in results for row in result["rows"].values()
        )
        lines.append(f"* quartiles lie at most {spread:.1%} of the median apart")
    return lines


def call_tables(data: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    calls = rows_of(data, "calls")
    if calls:
        lines += ["", "## Calls: forward+backward through autograd, us; bytes kept", ""]
        for result in calls:
            times = "; ".join(f"{name} {microseconds(row)}" for name, row in result["rows"].items())
            kept = "; ".join(f"{name} {count:,}" for name, count in result["kept"].items())
            lines.append(f"* {result['size']} {result['dtype']}: {times}. Kept: {kept}.")
            lines += [f"* {name}: {cell(why, 160)}" for name, why in result["missing"].items()]
    items = data["sections"].get("host", {}).get("items", {})
    for name in ("calls", "pieces"):
        row = items.get(name, {})
        if row.get("status") == "ok":
            lines += ["", f"## Host, {name}: us a call on {HOST_ELEMENTS} elements", ""]
            lines.append("; ".join(f"{what} {1e6 * took['seconds']:.2f}" for what, took in row["result"].items()) + ".")
    channels = rows_of(data, "channels")
    if channels:
        lines += ["", "## A decision per channel, forward, us (share of the copy's bandwidth)", ""]
        for result in channels:
            times = "; ".join(f"{name} {microseconds(row, True)}" for name, row in result["rows"].items())
            lines.append(f"* {result['dtype']}, {result['layout']}: {times}")
    return lines


def tune_table(data: dict[str, Any], full: bool) -> list[str]:
    results = rows_of(data, "tune")
    if not results:
        return []
    lines = [
        "", "## Launch shapes: threads per block x blocks per SM, us (share of the copy's bandwidth)", "",
        "| case | operation | default | best | next |", "|---|---|---|---|---|",
    ]  # fmt: skip

    def told(row: dict[str, Any]) -> str:
        limit = "no limit" if row["per_sm"] == NO_LIMIT else row["per_sm"]
        return f"{row['threads']} x {limit}: {microseconds(row, True)}"

    for result in results:
        for operation in (FORWARD, BACKWARD):
            found = result[operation]
            others = "; ".join(told(row) for row in found["all"][1 : None if full else 3])
            case, default, best = f"{result['size']} {result['dtype']}", told(found["default"]), told(found["best"])
            lines.append(f"| {case} | {operation} | {default} | {best} | {others} |")
    return lines


def printed(data: dict[str, Any]) -> str:
    """The report as it is printed, short enough for those who see its end alone; what comes last gives way."""
    text = report(data, full=False)
    if len(text) <= PRINTED:
        return text
    return text[:PRINTED].rpartition("\n")[0] + f"\n\n... and {len(text) - PRINTED:,} characters more in the .md\n"


def save(data: dict[str, Any], folder: Path | None) -> list[Path]:
    """Writes the JSON and the report, each whole or not at all."""
    if folder is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    about = next(iter(rows_of(data, "machine")), {})
    stem = f"gpu-{slug(about.get('device', 'unknown'))}"
    written = []
    for suffix, text in ((".json", json.dumps(data, indent=1) + "\n"), (".md", report(data))):
        file = folder / f"{stem}{suffix}"
        part = file.with_suffix(f"{suffix}.part")
        part.write_text(text)
        part.replace(file)
        written.append(file)
    return written


# ---- the command ----

SECTIONS = {
    "machine": Section("the machine", machine_items, 60, 60),
    "build": Section("compiling the kernels", build_items, 75, 75),
    "suite": Section(f"the tests in {GPU_TESTS}", suite_items, 110, 120),
    "checks": Section("checks of its own", check_items, 90, 45),
    "kernels": Section("times of kernels", kernel_items, 130, 60),
    "calls": Section("times of calls", call_items, 35, 30),
    "host": Section("time on the host", host_items, 25, 30),
    "channels": Section("a decision per channel", channel_items, 20, 30),
    "sanitizer": Section(SANITIZER, sanitizer_items, 70, 60, quick=False),
    "tune": Section("launch shapes", tune_items, 90, 60, quick=False),
}


def run_sections(
    data: dict[str, Any],
    sections: Mapping[str, Section],
    run: Callable[[str, Section, float], dict[str, Any]],
    seconds: float,
    folder: Path | None,
) -> None:
    """One section after the other within so many seconds, the JSON written after each; none stops those after it."""
    start = time.monotonic()
    for name, section in sections.items():
        allowed = min(section.seconds, seconds - (time.monotonic() - start))
        if allowed <= 1:
            outcome: dict[str, Any] = {"title": section.title, "status": "cut", "seconds": 0.0, "items": {}}
        else:
            try:
                outcome = run(name, section, allowed)
            except Exception as error:
                row = {
                    "status": "failed",
                    "error": one_line(error),
                    "traceback": traceback.format_exc(),
                    "seconds": None,
                }
                outcome = {"title": section.title, "status": "failed", "seconds": None, "items": {"section": row}}
        data["sections"][name] = outcome
        data["seconds"] = round(time.monotonic() - start, 1)
        save(data, folder)
        print(f"{data['seconds']:6.1f} s  {section.title}: {outcome['status']}", flush=True)


def unusable() -> str | None:
    """Why there is no GPU to run on, in a sentence; None if there is one."""
    from fastdrop.backends import numba_cuda

    reason = numba_cuda.unavailable()
    if reason:
        return reason
    try:
        import torch
    except ImportError as error:
        return f"torch is not installed ({error}): pip install torch"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU: install one built for CUDA"
    return None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the JSON and the report (default: bench/results)")
    parser.add_argument("--quick", action="store_true", help="about three minutes: fewer sizes, no launch shapes")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="don't try other launch shapes")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU: shows that the script runs, measures nothing"
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them (default: all): %(default)s")
    parser.add_argument("--memory-check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections must be of {', '.join(SECTIONS)}, but got {', '.join(sorted(unknown))}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    options = Options(chosen.quick, chosen.tune, chosen.dry_run)
    if chosen.child:
        return child(chosen.child, chosen.lines, chosen.seconds, options)
    if chosen.memory_check:
        return memory_check(options)
    reason = None if options.dry_run else unusable()
    if reason:
        print(f"bench/gpu.py needs a GPU: {reason}", file=sys.stderr)
        return NO_GPU
    folder = chosen.output or (None if options.dry_run else ROOT / "bench" / "results")
    wanted = {"machine", *chosen.sections.split(",")}
    sections = {
        name: section
        for name, section in SECTIONS.items()
        if name in wanted and (section.quick or not options.quick) and (options.tune or name != "tune")
    }
    data: dict[str, Any] = {
        "options": {"quick": options.quick, "tune": options.tune, "dry_run": options.dry_run},
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "sections": {},
    }
    command = [sys.executable, str(Path(__file__).resolve()), *options.as_arguments()]
    with tempfile.TemporaryDirectory() as scratch:

        def run(name: str, section: Section, seconds: float) -> dict[str, Any]:
            return run_section(section, command, Path(scratch), name, seconds)

        run_sections(data, sections, run, QUICK_SECONDS if options.quick else TOTAL_SECONDS, folder)
    written = save(data, folder)
    print()
    print(printed(data), flush=True)
    if written:
        print("wrote " + " and ".join(map(str, written)), flush=True)
    return int(any(section["status"] == "failed" for section in data["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())

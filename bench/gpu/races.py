"""How calls are timed on a GPU: in shuffled rounds, by marks in the device's queue.

A contender is a graph with a launch for each of several buffers, which together hold four times the L2 cache, so that
no buffer is in the cache when its turn comes again. Each round is enqueued as a whole behind work that isn't timed.
Ratios are taken within a round, where both contenders met the same machine.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

COPY = "copy"
L2_TURNS = 4
MIN_ROUNDS, MAX_ROUNDS = 5, 101


@dataclass(frozen=True)
class Contender:
    """``call`` enqueues ``launches`` of what is timed, each of which moves ``nbytes`` (None: not known)."""

    name: str
    call: Callable[[], object]
    launches: int = 1
    nbytes: int | None = None


def race(machine: Any, contenders: Sequence[Contender], seconds: float, *bases: str) -> dict[str, dict[str, Any]]:
    """Rows by contender, with ratios to each of ``bases``."""

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


def race_on_host(machine: Any, calls: dict[str, Callable[[], object]], seconds: float, *bases: str) -> dict[str, Any]:
    """The same for the calling thread's time: the device is waited for between samples."""
    contenders = [Contender(name, call) for name, call in calls.items()]
    samples: dict[str, list[float]] = {name: [] for name in calls}
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
    result: dict[str, Any] = {"seconds": middle, "low": low, "high": high, "rounds": len(mine)}
    result["bytes"] = contender.nbytes
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

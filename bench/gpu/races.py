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
from typing import Any

COPY = "copy"
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
    return table(contenders, samples, bases)


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
    return table(contenders, samples, bases)


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


def table(
    contenders: Sequence[Contender], samples: dict[str, list[float]], bases: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Medians and quartiles, ratios to ``bases``, and the share of the copy's bandwidth."""
    copied = next((contender.nbytes for contender in contenders if contender.name == COPY), None)
    result = {}
    for contender in contenders:
        mine = samples[contender.name]
        low, middle, high = statistics.quantiles(mine, n=4)
        ratios = {
            base: statistics.median(a / b for a, b in zip(mine, samples[base], strict=True))
            for base in bases
            if base in samples
        }
        row = {"seconds": middle, "low": low, "high": high, "rounds": len(mine), "ratios": ratios}
        if contender.nbytes:
            row |= {"bytes": contender.nbytes, "bytes_per_second": contender.nbytes / middle}
            if copied and COPY in ratios:
                row["share"] = contender.nbytes / copied / ratios[COPY]
        result[contender.name] = row
    return result

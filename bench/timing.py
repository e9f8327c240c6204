"""How pieces of code are compared: alternating, in one run, by medians and paired ratios.

A machine's speed drifts (clock, neighbours, temperature), by more than the differences that matter here. So the
callables take turns: every round runs each of them once, in an order shuffled anew, and ratios are taken within a
round, where both sides met the same machine. The median over rounds then ignores those that something else disturbed.

A sample is one callable's share of a round: as many calls as last `SAMPLE_SECONDS`, so that the clock's own cost and
resolution do not count, after a call that is not timed and brings the callable's data back into the caches that its
neighbours in the round have used. Garbage collection is off meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

__all__ = ["Timing", "alternate", "compare"]

SAMPLE_SECONDS = 200e-6
WARM_CALLS = 3
# If every call takes longer than this, all pass over more memory than caches hold: nothing to bring back beforehand.
UNCACHED_SECONDS = 20e-3
# With several threads each callable first runs for so long untimed: torch's threads take milliseconds to wake.
SETTLE_SECONDS = 4e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 201

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one callable, a sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def ratio(self, other: Timing) -> float:
        """Median of this callable's time over the other's in the same round."""
        return statistics.median(mine / its for mine, its in zip(self.samples, other.samples, strict=True))


def alternate(
    calls: Mapping[str, Call],
    *,
    seconds: float = 1.0,
    settle: float = 0.0,
    around: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[str, Timing]:
    """Times callables against each other.

    Parameters
    ----------
    calls : mapping of name to callable
        Their results are thrown away.
    seconds : float
        About how long all of it may take, warm-up aside. Slow callables get at least `MIN_ROUNDS` rounds.
    settle : float
        For so many seconds each callable runs untimed before each sample, unless all are slow.
    around : mapping of name to callable
        The context that a callable runs in. It is entered and left outside of the time taken.

    Returns
    -------
    dict of name to Timing, with the same number of rounds for all

    >>> timings = alternate({"one": lambda: sum(range(500)), "twice": lambda: sum(range(1000))}, seconds=0.02)
    >>> len(timings["one"].samples) == len(timings["twice"].samples) >= MIN_ROUNDS
    True
    """
    context = around or {}
    once = {}
    for name, call in calls.items():
        with context.get(name, contextlib.nullcontext)():
            call()  # compiles, allocates, starts threads
            once[name] = max(min(sample(call, 1) for _ in range(WARM_CALLS)), 1e-9)
    repeats = {name: max(1, round(SAMPLE_SECONDS / took + 0.5)) for name, took in once.items()}
    cached = min(once.values()) < UNCACHED_SECONDS  # of all or of none: none is to be the only one prepared
    cost = sum(took * repeats[name] + cached * max(took, settle) for name, took in once.items())
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(min(max(int(seconds / cost), MIN_ROUNDS), MAX_ROUNDS)):
            shuffle(order)
            for name in order:
                with context.get(name, contextlib.nullcontext)():
                    if cached:
                        run_for(calls[name], settle)
                    samples[name].append(sample(calls[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def compare(
    ours: Call,
    peers: Mapping[str, Call],
    seconds: float,
    threads: int = 1,
    around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> dict[str, Any]:
    """What a report's row has of times: ours, those of the peers, and the ratios of ours to theirs."""
    settle = SETTLE_SECONDS if threads > 1 else 0.0
    timings = alternate({"": ours, **peers}, seconds=seconds, settle=settle, around={"": around})
    mine = timings.pop("")
    times = {name: {"seconds": its.median, "ratio": mine.ratio(its)} for name, its in timings.items()}
    return {"seconds": mine.median, "peers": times}


def sample(call: Call, repeats: int) -> float:
    """Seconds per call of so many calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def run_for(call: Call, seconds: float) -> None:
    """At least once."""
    end = time.perf_counter() + seconds
    call()
    while time.perf_counter() < end:
        call()

"""How pieces of code are compared: alternating, in one run, by medians and paired ratios.

A machine's speed drifts (clock, neighbours, temperature), by more than the differences that matter here. So the
callables take turns: every round runs each of them once, in an order shuffled anew, and ratios are taken within a
round, where both sides met the same machine. The median over rounds then ignores those that something else disturbed.

A sample is one callable's share of a round: as many calls as last `SAMPLE_SECONDS`, so that the clock's own cost and
resolution do not count, after one call that is not timed and brings the callable's data back into the caches its
neighbours in the round have used. Garbage collection is off meanwhile.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Timing", "alternate", "sample"]

SAMPLE_SECONDS = 200e-6
WARM_CALLS = 2
# A call longer than this passes over more memory than caches hold: nothing to bring back before timing it.
UNCACHED_SECONDS = 20e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 201


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one callable, a sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median

    def ratio(self, other: Timing) -> float:
        """Median of this callable's time over the other's in the same round."""
        return statistics.median(mine / its for mine, its in zip(self.samples, other.samples, strict=True))


def alternate(calls: Mapping[str, Callable[[], object]], *, seconds: float = 1.0) -> dict[str, Timing]:
    """Times callables against each other.

    Parameters
    ----------
    calls : mapping of name to callable
        Their results are thrown away.
    seconds : float
        About how long all of it may take, warm-up aside. Slow callables get at least `MIN_ROUNDS` rounds.

    Returns
    -------
    dict of name to Timing, with the same number of rounds for all

    >>> timings = alternate({"one": lambda: sum(range(500)), "twice": lambda: sum(range(1000))}, seconds=0.02)
    >>> len(timings["one"].samples) == len(timings["twice"].samples) >= MIN_ROUNDS
    True
    """
    repeats, leads, cost = {}, {}, 0.0
    for name, call in calls.items():
        call()  # compiles, allocates, starts threads
        once = min(sample(call, 1) for _ in range(WARM_CALLS))
        repeats[name] = max(1, round(SAMPLE_SECONDS / max(once, 1e-9) + 0.5))
        leads[name] = once < UNCACHED_SECONDS
        cost += once * (repeats[name] + leads[name])
    rounds = min(max(int(seconds / cost), MIN_ROUNDS), MAX_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                if leads[name]:
                    calls[name]()
                samples[name].append(sample(calls[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def sample(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call of so many calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats

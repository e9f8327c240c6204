"""Times a benchmark beside its peers: pytest-benchmark times fastdrop, and each round first runs every peer once.

So all of them meet the same machine, and ratios are taken within a round, for the reasons that `timing` gives.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from .timing import MIN_ROUNDS, SAMPLE_SECONDS, UNCACHED_SECONDS, sample

MAX_ROUNDS = 151
# With several threads each callable first runs for so long untimed, where any is fast enough to be prepared at all:
# torch's threads take milliseconds to wake after idling.
SETTLE_SECONDS = 4e-3


def alternate(
    benchmark: Any,
    measured: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    seconds: float,
    settle: float = 0.0,
    around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> None:
    """Times ``measured`` by the fixture and the peers in its setup; leaves medians and paired ratios in extra_info.

    ``around`` gives the context that ``measured`` alone runs in, entered and left outside of the time taken.
    """
    repeats, seconds_once = {}, {}
    for name, call in {"": measured, **peers}.items():
        with around() if name == "" else contextlib.nullcontext():
            call()
            once = seconds_once[name] = min(sample(call, 1) for _ in range(3))
        repeats[name] = max(1, round(SAMPLE_SECONDS / once))
    cached = min(seconds_once.values()) < UNCACHED_SECONDS  # of all or of none: none is to be the only one prepared
    cost = sum(once * repeats[name] + cached * max(once, settle) for name, once in seconds_once.items())
    rounds = min(max(int(seconds / cost), MIN_ROUNDS), MAX_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in peers}
    order = list(peers)
    shuffle = random.Random(0).shuffle
    surroundings = contextlib.ExitStack()

    def take_turns() -> None:
        surroundings.close()
        shuffle(order)
        for name in order:
            if cached:
                _run_for(peers[name], settle)  # brings back into the caches what neighbours have used, wakes threads
            samples[name].append(sample(peers[name], repeats[name]))
        surroundings.enter_context(around())
        if cached:
            _run_for(measured, settle)

    def run() -> None:
        for _ in range(repeats[""]):
            measured()

    with surroundings:
        benchmark.pedantic(run, setup=take_turns, rounds=rounds, iterations=1)
    own = [time / repeats[""] for time in benchmark.stats.stats.data]
    benchmark.extra_info["repeats"] = repeats[""]
    benchmark.extra_info["settle"] = settle if cached else 0.0
    benchmark.extra_info["seconds"] = statistics.median(own)
    benchmark.extra_info["peers"] = {
        name: {
            "seconds": statistics.median(taken),
            "ratio": statistics.median(mine / its for mine, its in zip(own, taken, strict=True)),
        }
        for name, taken in samples.items()
    }


def _run_for(call: Callable[[], object], seconds: float) -> None:
    """At least once."""
    end = time.perf_counter() + seconds
    call()
    while time.perf_counter() < end:
        call()

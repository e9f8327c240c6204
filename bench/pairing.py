"""Times a benchmark beside its peers: pytest-benchmark times fastdrop, and each round first runs every peer once.

So all of them meet the same machine, and ratios are taken within a round, for the reasons that `timing` gives.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from .timing import MIN_ROUNDS, SAMPLE_SECONDS, UNCACHED_SECONDS, sample

MAX_ROUNDS = 151
# With several threads each callable first runs for so long untimed: torch's threads take milliseconds to wake.
SETTLE_SECONDS = 4e-3
Around = Callable[[], AbstractContextManager[object]]


def alternate(
    benchmark: Any,
    measured: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    seconds: float,
    settle: float = 0.0,
    around: Mapping[str, Around] | None = None,
) -> None:
    """Times ``measured`` by the fixture and the peers in its setup; leaves medians and paired ratios in extra_info.

    ``around`` gives, by a peer's name or "" for ``measured``, the context that this call runs in. It is entered and
    left outside of the time taken.
    """
    contexts: dict[str, Around] = dict.fromkeys(("", *peers), contextlib.nullcontext)
    contexts.update(around or {})
    repeats, seconds_once = {}, {}
    for name, call in {"": measured, **peers}.items():
        with contexts[name]():
            call()
            once = seconds_once[name] = min(sample(call, 1) for _ in range(3))
        repeats[name] = max(1, round(SAMPLE_SECONDS / once))
    # Of all or of none: none is to be the only one prepared.
    prepared = settle > 0 or min(seconds_once.values()) < UNCACHED_SECONDS
    cost = sum(once * repeats[name] + prepared * max(once, settle) for name, once in seconds_once.items())
    rounds = min(max(int(seconds / cost), MIN_ROUNDS), MAX_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in peers}
    order = list(peers)
    shuffle = random.Random(0).shuffle
    surroundings = contextlib.ExitStack()

    def take_turns() -> None:
        surroundings.close()
        shuffle(order)
        for name in order:
            with contexts[name]():
                if prepared:
                    _run_for(peers[name], settle)  # brings back into the caches what neighbours used, wakes threads
                samples[name].append(sample(peers[name], repeats[name]))
        surroundings.enter_context(contexts[""]())
        if prepared:
            _run_for(measured, settle)

    def run() -> None:
        for _ in range(repeats[""]):
            measured()

    with surroundings:
        benchmark.pedantic(run, setup=take_turns, rounds=rounds, iterations=1)
    own = [time / repeats[""] for time in benchmark.stats.stats.data]
    benchmark.extra_info["repeats"] = repeats[""]
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

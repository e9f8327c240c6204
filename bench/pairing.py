"""Times a benchmark beside its peers: pytest-benchmark times fastdrop, and each round first runs every peer once.

So all of them meet the same machine, and ratios are taken within a round, for the reasons that `fastdrop.cli.timing`
gives. pytest-benchmark's table gets a row for fastdrop and one for each peer, in a group for the case. All its numbers
are of one call.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

from fastdrop.cli.timing import MIN_ROUNDS, SAMPLE_SECONDS, UNCACHED_SECONDS, sample

from .contenders import FASTDROP

MAX_ROUNDS = 151
# With several threads each callable first runs for so long untimed: torch's threads take milliseconds to wake.
SETTLE_SECONDS = 4e-3
# Of a case's own seconds. bench/conftest.py sets it from --benchmark-max-time.
share_of_seconds = 1.0
# What a case says of itself that tables can be grouped by, as in --benchmark-group-by=param:size.
PARAMETERS = ("kind", "operation", "layout", "dtype", "size", "p", "threads")
Around = Callable[[], AbstractContextManager[object]]


def alternate(
    benchmark: Any,
    measured: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    seconds: float,
    settle: float = 0.0,
    around: Mapping[str, Around] | None = None,
    hidden: Container[str] = (),
) -> None:
    """Times ``measured`` by the fixture and the peers in its setup; leaves medians and paired ratios in extra_info.

    ``around`` gives, by a peer's name or "" for ``measured``, the context that this call runs in. It is entered and
    left outside of the time taken. ``hidden`` peers get no row in pytest-benchmark's table.
    """
    contexts: dict[str, Around] = dict.fromkeys(("", *peers), contextlib.nullcontext)
    contexts.update(around or {})
    if benchmark.disabled:
        return _run_once(benchmark, {"": measured, **peers}, contexts)
    repeats, prepared, rounds = _plan({"": measured, **peers}, contexts, share_of_seconds * seconds, settle)
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
    _show(benchmark, own, repeats[""])
    for name, taken in samples.items():
        if name not in hidden:
            _add_row(benchmark, name, taken, repeats[name])


def _plan(
    calls: Mapping[str, Callable[[], object]], contexts: Mapping[str, Around], seconds: float, settle: float
) -> tuple[dict[str, int], bool, int]:
    """The calls that a sample of each has, whether each is prepared by calls that are not timed, and the rounds."""
    repeats, seconds_once = {}, {}
    for name, call in calls.items():
        with contexts[name]():
            call()
            once = seconds_once[name] = min(sample(call, 1) for _ in range(3))
        repeats[name] = max(1, round(SAMPLE_SECONDS / once))
    # Of all or of none: none is to be the only one prepared.
    prepared = settle > 0 or min(seconds_once.values()) < UNCACHED_SECONDS
    cost = sum(once * repeats[name] + prepared * max(once, settle) for name, once in seconds_once.items())
    return repeats, prepared, min(max(int(seconds / cost), MIN_ROUNDS), MAX_ROUNDS)


def _run_once(benchmark: Any, calls: dict[str, Callable[[], object]], contexts: Mapping[str, Around]) -> None:
    """What --benchmark-disable asks for: everything runs and nothing is timed."""
    for name, call in calls.items():
        with contexts[name]():
            benchmark.pedantic(call) if not name else call()
    benchmark.extra_info["peers"] = {name: {"seconds": 1.0, "ratio": 1.0} for name in calls if name}


def _show(benchmark: Any, own: list[float], repeats: int) -> None:
    """Makes fastdrop's row one of times per call. Until here a round of it is ``repeats`` calls.

    pytest-benchmark divides by ``iterations`` itself, but allows no setup before rounds of several.
    """
    stats = benchmark.stats
    stats.iterations, stats.stats.data[:] = repeats, own
    described = {name: benchmark.extra_info[name] for name in PARAMETERS if name in benchmark.extra_info}
    contender = benchmark.extra_info.get("contender", FASTDROP)
    stats.params = {**(stats.params or {}), **described, "contender": contender}
    test, _, case = stats.name.removeprefix("test_").partition("[")
    parts = case.removesuffix("]").removesuffix(f"-{contender}").split("-")
    parts.sort(key=lambda part: part.endswith(("thread", "threads")))  # a fixture's, and so before the others
    case = "-".join(parts)
    stats.group = f"{test}: {', '.join(parts)}" if case else test
    folder = stats.fullname.rpartition("::")[0]
    stats.param, stats.name = case, f"{test}[{case}] {contender}"
    stats.fullname = f"{folder}::{stats.name}"


def _add_row(benchmark: Any, peer: str, taken: list[float], repeats: int) -> None:
    """A row for a peer, in fastdrop's group. Its samples are those that the ratios are made of."""
    from pytest_benchmark.stats import Metadata

    mine = benchmark.stats
    contender = mine.params["contender"]
    row = Metadata(
        SimpleNamespace(
            name=mine.name.removesuffix(contender) + peer,
            fullname=mine.fullname.removesuffix(contender) + peer,
            group=mine.group,
            param=mine.param,
            params={**mine.params, "contender": peer},
            extra_info={"peer_of": mine.fullname},
            cprofile_stats=None,
            has_error=False,
        ),
        repeats,
        mine.options,
    )
    row.stats.data.extend(taken)
    benchmark._add_stats(row)  # the session's list; pytest-benchmark has no public name for it


def _run_for(call: Callable[[], object], seconds: float) -> None:
    """At least once."""
    end = time.perf_counter() + seconds
    call()
    while time.perf_counter() < end:
        call()

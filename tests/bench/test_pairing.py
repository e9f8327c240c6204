"""How a case is timed beside its peers, and what pytest-benchmark's table, JSON and comparisons then have."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from bench import conftest, pairing
from fastdrop.backends import c as native

from ..cases import ROOT
from .benchmark import Benchmark

needs_c = pytest.mark.skipif(native.unavailable() is not None, reason="the C extension is not built")


def test_each_call_meets_its_own_context_outside_of_the_time_taken(monkeypatch):
    inside, met, clock = [], {"": set(), "a": set(), "b": set()}, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    @contextlib.contextmanager
    def around(name):
        inside.append(name)
        clock[0] += 1.0
        yield
        clock[0] += 1.0
        inside.remove(name)

    def call(name):
        met[name].add(tuple(inside))
        clock[0] += 1e-4

    benchmark = Benchmark()
    contexts = {name: lambda name=name: around(name) for name in ("", "a")}
    peers = {name: lambda name=name: call(name) for name in ("a", "b")}
    pairing.alternate(benchmark, lambda: call(""), peers, 0.01, around=contexts)
    assert met == {"": {("",)}, "a": {("a",)}, "b": {()}}
    assert not inside
    for timed in (benchmark.extra_info, *benchmark.extra_info["peers"].values()):
        assert timed["seconds"] == pytest.approx(1e-4)


def test_the_table_has_fastdrop_and_its_peers_by_the_call(monkeypatch):
    """Whatever number of calls a round has: `short` and `long` differ in it."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def lasting(seconds):
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    benchmark = Benchmark()
    benchmark.extra_info.update(operation="forward", threads=2)
    peers = {"short": lasting(1e-6), "long": lasting(3e-4), "memcpy": lasting(1e-5)}
    pairing.alternate(benchmark, lasting(1e-5), peers, 0.01, hidden={"memcpy"})
    rows = {row.name: row.as_dict() for row in benchmark.rows}
    name = "case[forward-1M-2threads] "
    assert [*rows] == [name + contender for contender in ("fastdrop", "short", "long")]
    calls = {"fastdrop": (1e-5, 20), "short": (1e-6, 200), "long": (3e-4, 1)}
    for contender, (seconds, iterations) in calls.items():
        row = rows[name + contender]
        assert row["stats"]["median"] == pytest.approx(seconds)
        assert row["stats"]["ops"] == pytest.approx(1 / seconds)
        assert row["stats"]["iterations"] == iterations
        assert row["group"] == "case: forward, 1M, 2threads"
        assert row["params"] == {"size": "1M", "operation": "forward", "threads": 2, "contender": contender}
    assert benchmark.extra_info["peers"]["short"]["ratio"] == pytest.approx(10)
    made = []
    pairing.alternate(Benchmark(disabled=True), lambda: made.append(""), {"a": lambda: made.append("a")}, 1.0)
    assert made == ["", "a"]


def test_a_comparison_says_in_short_what_differs():
    said, compared = [], {"machine_info": {"fastdrop": "0.0.9", "python_build": ["main"], "cpu": {"count": 2}}}
    session = SimpleNamespace(logger=SimpleNamespace(warning=said.append))
    here = {"fastdrop": "0.1.0", "python_build": ("main",), "cpu": {"count": 2}, "node": "some host"}
    conftest.pytest_benchmark_compare_machine_info(session, here, compared)
    assert said == ["the run to compare with is of something else: fastdrop: 0.0.9 there, 0.1.0 here"]
    assert compared["machine_info"] is here  # so that pytest-benchmark's own check finds no difference


# What a run meets where fastdrop's extra `bench` is installed and nothing else.
NUMPY_ONLY = """
import sys
for name in ("torch", "ml_dtypes", "numba", "matplotlib", "transformers"):
    sys.modules[name] = None
from fastdrop.cli import selftest
selftest.run = lambda **options: True
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@needs_c
def test_pytest_runs_the_benchmarks_of_numpy_without_torch(tmp_path):
    """Of all files: it finds the sweep, skips torch's, has no doctests, and its JSON keeps rows of peers."""
    saved = tmp_path / "saved.json"
    command = [
        sys.executable, "-c", NUMPY_ONLY, "bench", "--benchmark-only", "-k", "draw_rows or (sweep and 64k) or torch",
        "--benchmark-max-time", "0", "--benchmark-json", str(saved), "-p", "no:cacheprovider", "-q",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # xdist's
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed, 6 skipped" in done.stdout
    assert "benchmark 'sweep: 64k, forward, 2threads': 3 tests" in done.stdout
    found = {row["name"]: row for row in json.loads(saved.read_text())["benchmarks"]}
    own = found["draw_rows[125 columns] fastdrop"]
    assert own["stats"]["median"] == pytest.approx(own["extra_info"]["seconds"])
    assert own["stats"]["iterations"] == own["extra_info"]["repeats"]
    assert "draw_rows[125 columns] draw_bits" in found


def test_threads_are_woken_before_calls_of_any_length(monkeypatch):
    monkeypatch.setattr(pairing, "UNCACHED_SECONDS", 0.0)  # all calls are too long for caches
    calls = {0.0: [], 1e-9: []}
    for settle, made in calls.items():
        monkeypatch.setattr(pairing, "SAMPLE_SECONDS", 0.0)  # a call is a sample
        pairing.alternate(Benchmark(), lambda made=made: made.append(1), {}, 0.0, settle)
    assert [len(made) for made in calls.values()] == [4 + pairing.MIN_ROUNDS, 4 + 2 * pairing.MIN_ROUNDS]

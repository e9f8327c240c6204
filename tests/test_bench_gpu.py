"""The GPU benchmark without a GPU: its figures, its processes, its report, and every section on tensors of the CPU."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from bench import gpu
from bench.gpu import Contender, Lines, Options, Section, Skip, Task
from fastdrop.backends import numba_cuda

from .cases import ROOT

DRY = Options(dry_run=True)
SOURCE = Path(gpu.__file__)


# ---- figures ----


@pytest.mark.parametrize(
    ("elements", "itemsize", "passes", "mask_bits", "expected"),
    [
        (1 << 28, 4, 1, 0, 2 * 4 << 28),
        (1 << 28, 2, 1, 1, (4 << 28) + (1 << 25)),
        (1 << 20, 4, 2, 2, (16 << 20) + (1 << 18)),
        (33, 4, 1, 1, 264 + 8),
    ],
)
def test_bytes_moved(elements, itemsize, passes, mask_bits, expected):
    assert gpu.moved(elements, itemsize, passes, mask_bits) == expected


@pytest.mark.parametrize("nbytes", [1, 1000, 4 << 20, 64 << 20, 1 << 30])
def test_buffers_in_rotation_exceed_the_cache(nbytes):
    l2 = 50 << 20
    count = gpu.buffers(nbytes, l2)
    assert count >= 2
    assert count * nbytes >= gpu.L2_TURNS * l2
    assert count == 2 or (count - 1) * nbytes < gpu.L2_TURNS * l2


def test_summary_is_of_the_median():
    found = gpu.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found["seconds"], found["min"], found["max"]) == (3.0, 1.0, 5.0)
    assert found["min"] <= found["low"] < 3.0 < found["high"] <= found["max"]
    assert gpu.summary([2.0]) == {"seconds": 2.0, "low": 2.0, "high": 2.0, "min": 2.0, "max": 2.0}


def test_paired_ratios_are_taken_within_a_round():
    assert gpu.paired([1.0, 20.0, 300.0], [2.0, 10.0, 100.0]) == 2.0


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("  Tesla (T4)/2 ", "tesla-t4-2")]
)
def test_slug(name, expected):
    assert gpu.slug(name) == expected


class Clock:
    """A device on which each piece of work takes as long as it says, on a clock of its own."""

    sample_seconds, host_calls = 1e-3, 10

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def work(self, name, seconds):
        def call():
            self.now += seconds
            self.log.append(name)

        return call

    def synchronize(self):
        self.log.append("synchronize")

    def mark(self):
        return self.now

    def seconds(self, start, end):
        return end - start


def test_race_divides_by_launches_and_compares_bytes():
    clock = Clock()
    contenders = [
        Contender("copy", clock.work("copy", 4e-4), launches=4, nbytes=1000),
        Contender("ours", clock.work("ours", 1e-3), launches=5, nbytes=1500),
        Contender("unknown", clock.work("unknown", 2e-3)),
    ]
    rows = gpu.race(clock, contenders, 0.0, "copy")
    assert rows["copy"]["seconds"] == pytest.approx(1e-4)
    assert rows["ours"]["seconds"] == pytest.approx(2e-4)
    assert rows["copy"]["launches"] == 4 * 3  # as many as last for a sample
    assert rows["copy"]["bytes_per_second"] == pytest.approx(1e7)
    assert rows["ours"]["share"] == pytest.approx(0.75)  # 1.5 times the bytes in twice the time
    assert rows["copy"]["share"] == pytest.approx(1.0)
    assert rows["unknown"]["time_ratio"] == pytest.approx(20.0)
    assert "share" not in rows["unknown"]
    assert all(row["rounds"] == gpu.MIN_ROUNDS for row in rows.values())


def test_race_never_waits_within_a_round_and_fills_the_queue_first():
    clock = Clock()
    names = ("copy", "a", "b")
    contenders = [Contender(name, clock.work(name, 2e-3)) for name in names]
    gpu.race(clock, contenders, 0.0)
    rounds = "".join(f"{entry}," for entry in clock.log).split("synchronize,")[2 * len(names) : -1]
    assert len(rounds) == gpu.MIN_ROUNDS
    orders = set()
    for line in rounds:
        first, *rest = line.strip(",").split(",")
        assert first == rest[-1]  # not timed
        assert sorted(rest) == sorted(names)
        orders.add(tuple(rest))
    assert len(orders) > 1


def test_race_on_host_waits_before_each_sample():
    clock = Clock()
    rows = gpu.race_on_host(clock, {"a": clock.work("a", 0), "b": clock.work("b", 0)}, 0.0, {"b": "a"})
    batches = "".join(f"{entry}," for entry in clock.log[6:]).split("synchronize,")[1:-1]
    assert len(batches) == 2 * gpu.MIN_ROUNDS
    assert {batch.count(",") for batch in batches} == {clock.host_calls}
    assert rows["b"]["against"] == "a"
    assert rows["b"]["time_ratio"] > 0
    assert "against" not in rows["a"]


# ---- items and processes ----


def fails(task):
    raise ValueError("one\n  two")


def skips(task):
    raise Skip("not here")


def test_a_failing_item_leaves_its_reason_and_the_others(tmp_path):
    lines = Lines(tmp_path / "lines")
    seen = []
    items = {"a": fails, "b": skips, "c": lambda task: seen.append(dict(task.found)) or {"x": 1}}
    assert gpu.run_items(items, lines, Task(DRY))
    done = lines.done()
    assert [done[name]["status"] for name in "abc"] == ["failed", "skipped", "ok"]
    assert done["a"]["error"] == "ValueError: one two"
    assert "fails" in done["a"]["traceback"]
    assert done["b"]["error"] == "not here"
    assert done["c"]["result"] == {"x": 1}
    assert set(seen[0]) == {"a", "b"}  # an item knows those before it
    assert lines.read()[-1] == {"end": True}


def test_items_with_no_time_left_are_not_run(tmp_path):
    lines = Lines(tmp_path / "lines")
    gpu.run_items({"a": fails}, lines, Task(DRY, deadline=time.monotonic() - 1))
    assert lines.done()["a"]["status"] == "not run"


@pytest.mark.parametrize(("alive", "spoiled"), [(False, False), (True, True)])
def test_a_lost_device_ends_the_process(tmp_path, alive, spoiled):
    lines = Lines(tmp_path / "lines")
    task = Task(DRY)
    task._machine = SimpleNamespace(alive=lambda: alive, is_spoiled=spoiled)
    assert not gpu.run_items({"a": lambda task: {}, "b": lambda task: {}}, lines, task)
    assert list(lines.done()) == ["a"]
    task._machine = None  # another process
    assert gpu.run_items({"a": fails, "b": lambda task: {}}, lines, task)
    assert [row["status"] for row in lines.done().values()] == ["ok", "ok"]


def test_lines_leave_out_what_is_half_written(tmp_path):
    file = tmp_path / "lines"
    lines = Lines(file)
    assert lines.read() == []
    lines.add({"start": "a"})
    with file.open("a") as stream:
        stream.write('{"item": "a"')
    assert lines.read() == [{"start": "a"}]
    assert lines.in_flight() == "a"


# A section's process in a few lines, for a quick start.
CHILD = """
import json, os, sys, time
def dies():
    print("last words", flush=True)
    os._exit(9)
items = {"first": int, "dies": dies, "second": int, "hangs": lambda: time.sleep(600), "third": int}
file = open(dict(zip(sys.argv[1::2], sys.argv[2::2]))["--lines"], "a+")
file.seek(0)
done = [json.loads(line).get("item") for line in file]
def add(**row):
    print(json.dumps(row), file=file, flush=True)
for name, item in items.items():
    if name not in done:
        add(start=name)
        add(item=name, status="ok", result=item())
add(end=True)
"""


def test_a_section_goes_on_after_a_crash_and_a_hang(tmp_path):
    section = Section("title", lambda options: {}, 60, limit=3)
    outcome = gpu.run_section(section, [sys.executable, "-c", CHILD], tmp_path, "name", 60)
    rows = outcome["items"]
    assert [name for name, row in rows.items() if row["status"] == "ok"] == ["first", "second", "third"]
    assert rows["dies"]["status"] == rows["hangs"]["status"] == "failed"
    assert "code 9" in rows["dies"]["error"]
    assert "last words" in rows["dies"]["traceback"]
    assert "killed" in rows["hangs"]["error"]
    assert (outcome["status"], outcome["title"]) == ("failed", "title")


def test_a_section_ends_with_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.0)
    section = Section("title", lambda options: {}, 60, limit=600)
    child = CHILD.replace("os._exit(9)", "time.sleep(600)")
    outcome = gpu.run_section(section, [sys.executable, "-c", child], tmp_path, "name", 5)
    assert outcome["status"] == "cut"
    assert outcome["items"]["dies"]["status"] == "not run"


def test_a_process_that_never_starts_is_reported_once(tmp_path):
    section = Section("title", lambda options: {}, 60, limit=60)
    outcome = gpu.run_section(section, [sys.executable, "-c", "raise SystemExit('no start')"], tmp_path, "name", 60)
    assert outcome["status"] == "failed"
    assert "no start" in outcome["items"]["process"]["traceback"]


def test_sections_write_the_json_each_and_outlive_errors(tmp_path):
    data = {"options": {"dry_run": True, "quick": False}, "started": "2026-01-01T00:00", "sections": {}}
    sections = {name: Section(name, lambda options: {}, 10, 10) for name in ("one", "two", "three")}
    written = []

    def run(name, section, seconds):
        files = [*tmp_path.glob("*.json")]
        written.append(list(json.loads(files[0].read_text())["sections"]) if files else [])
        if name == "two":
            raise OSError("no more processes")
        return {"title": name, "status": "ok", "seconds": 0.0, "items": {}}

    gpu.run_sections(data, sections, run, 100.0, tmp_path)
    assert written == [[], ["one"], ["one", "two"]]
    assert [data["sections"][name]["status"] for name in sections] == ["ok", "failed", "ok"]
    assert "no more processes" in data["sections"]["two"]["items"]["section"]["error"]
    assert not [*tmp_path.glob("*.part")]


def test_sections_share_the_time_there_is():
    allowed = []
    data = {"options": {"dry_run": True, "quick": False}, "started": "2026-01-01T00:00", "sections": {}}
    sections = {"one": Section("", lambda options: {}, 10, 10), "two": Section("", lambda options: {}, 500, 10)}

    def run(name, section, seconds):
        allowed.append(seconds)
        return {"title": "", "status": "ok", "seconds": 0.0, "items": {}}

    gpu.run_sections(data, sections, run, 100.0, None)
    assert allowed[0] == 10
    assert 90 < allowed[1] <= 100
    data["sections"] = {}
    gpu.run_sections(data, sections, run, 0.0, None)
    assert [section["status"] for section in data["sections"].values()] == ["cut", "cut"]
    assert len(allowed) == 2


def test_all_sections_fit_into_eight_minutes():
    assert gpu.TOTAL_SECONDS + gpu.GRACE_SECONDS < 480 - 15  # what is left: starting, and writing the report
    assert gpu.QUICK_SECONDS < gpu.TOTAL_SECONDS


# ---- what others print ----


def test_suite_failures_are_told():
    text = "tests/x.py::test_a PASSED\nFAILED tests/x.py::test_b - assert 1\n===== 1 failed, 1 passed in 2.1s ====="
    with pytest.raises(AssertionError, match=r"1 failed, 1 passed.*test_b"):
        gpu.judged_suite(1, text)
    with pytest.raises(AssertionError, match=r"last one begun is tests/x\.py::test_b"):
        gpu.judged_suite(None, "tests/x.py::test_a PASSED\ntests/x.py::test_b ")
    with pytest.raises(Skip):
        gpu.judged_suite(0, "===== 3 skipped in 0.1s =====")
    with pytest.raises(Skip):
        gpu.judged_suite(5, "===== no tests ran in 0.1s =====")
    assert gpu.judged_suite(0, "x\n===== 7 passed, 1 skipped in 3.0s =====")["summary"].startswith("7 passed")


def test_sanitizer_findings_are_told():
    assert gpu.judged_sanitizer(0, "=== ERROR SUMMARY: 0 errors")["summary"] == "ERROR SUMMARY: 0 errors"
    with pytest.raises(AssertionError, match="3 errors"):
        gpu.judged_sanitizer(86, "=== Invalid read\n=== ERROR SUMMARY: 3 errors")
    with pytest.raises(Skip, match="Device not supported"):
        gpu.judged_sanitizer(1, "=== Error: Device not supported")
    with pytest.raises(Skip, match="in time"):
        gpu.judged_sanitizer(None, "")


def test_a_command_is_killed_in_time():
    code, text = gpu.run_for([sys.executable, "-c", "import time; print('a', flush=True); time.sleep(600)"], 3)
    assert code is None
    assert text == "a\n"
    assert gpu.run_for([sys.executable, "-c", "raise SystemExit(4)"], 60)[0] == 4


# ---- the primitives' check ----


def test_addressed_reference_has_the_parameters_of_the_backend():
    names = [name for name in vars(gpu.AddressedReference) if name.endswith("_at")]
    assert len(names) == 4
    for name in names:
        ours, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(owner, name)).parameters.values()]
            for owner in (gpu.AddressedReference, numba_cuda)
        )
        assert ours == theirs, name


class Wrong:
    """The reference with one primitive that does something more."""

    def __init__(self, name, more):
        self._name, self._more = name, more

    def __getattr__(self, name):
        primitive = getattr(gpu.AddressedReference, name)
        if name != self._name:
            return primitive

        def call(*arguments, **options):
            primitive(*arguments, **options)
            self._more(*arguments)

        return call


def _touch(address, nbytes=1):
    gpu._at(address, nbytes)[:] ^= 1


MISTAKES = {
    "a wrong output": ("dropout_forward_at", lambda *a: _touch(a[4])),
    "an input written": ("dropout_forward_at", lambda *a: _touch(a[3])),
    "a byte before": ("dropout_forward_at", lambda *a: _touch(a[4] - 1)),
    "a byte after": ("masked_affine_at", lambda *a: _touch(a[4] + 2 * a[7] * a[8] * a[9])),
    "words changed": ("masked_affine_at", lambda *a: _touch(a[5])),
    "a strided output": ("strided_affine_at", lambda *a: _touch(a[4])),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_of_primitives_finds(mistake):
    pytest.importorskip("torch")
    machine = gpu.Host()
    backend: Any = Wrong(*MISTAKES[mistake])
    tag = gpu.TAGS["float16"]
    assert gpu.check_primitives(gpu.TorchMemory(machine), gpu.AddressedReference, tag, (1, 33))["calls"] > 50
    with pytest.raises(AssertionError, match="calls are wrong"):
        gpu.check_primitives(gpu.TorchMemory(machine), backend, tag, (1, 33))


def test_check_of_golden_masks_finds_a_wrong_one():
    memory = gpu.HostMemory()
    assert gpu.check_golden(gpu.AddressedReference, memory)["masks"] > 10
    with pytest.raises(AssertionError, match="masks are wrong"):
        gpu.check_golden(Wrong("draw_bits_at", lambda *a: _touch(a[2])), memory)


def test_driver_memory_by_a_driver_of_arrays(monkeypatch):
    """Which calls a sanitizer's run makes, and that areas end where they end."""
    from fastdrop.backends._cuda import driver

    bindings = pytest.importorskip("cuda.bindings.driver")
    blocks = {}

    def allocate(size):
        block = np.zeros(size, np.uint8)
        blocks[block.ctypes.data] = block
        return 0, block.ctypes.data

    def copy(to, source, size):
        gpu._at(to, size)[:] = gpu._at(source, size)
        return (0,)

    api = SimpleNamespace(
        cuInit=lambda flags: (0,),
        cuDeviceGet=lambda ordinal: (0, "device"),
        cuDevicePrimaryCtxRetain=lambda device: (0, "context"),
        cuCtxSetCurrent=lambda context: (0,),
        cuMemAlloc=allocate,
        cuMemFree=lambda address: (blocks.pop(address) is None,),
        cuMemcpyHtoD=copy,
        cuMemcpyDtoH=copy,
    )
    assert all(hasattr(bindings, name) for name in vars(api))
    monkeypatch.setattr(driver, "api", lambda: api)
    memory = gpu.DriverMemory()
    area = memory.area(np.arange(10, dtype=np.uint8), 3)
    assert len(blocks[area.address - 3]) == 13
    assert area.read().tolist() == list(range(10))
    area.free()
    assert not blocks
    assert gpu.check_primitives(memory, gpu.AddressedReference, 0, (33,))["calls"]
    assert not blocks  # all was freed


# ---- every section, on the CPU ----

SLOW_TO_START = {"suite"}  # a pytest within this one


@pytest.mark.parametrize("name", [name for name in gpu.SECTIONS if name not in SLOW_TO_START])
def test_section_runs_dry(name, tmp_path):
    pytest.importorskip("torch")
    options = Options(dry_run=True, quick=name == "kernels")  # which has many items of a kind
    lines = Lines(tmp_path / "lines")
    assert gpu.run_items(gpu.SECTIONS[name].items(options), lines, Task(options))
    rows = lines.done()
    assert not [row for row in rows.values() if row["status"] not in ("ok", "skipped")], rows
    assert any(row["status"] == "ok" for row in rows.values()) or name == "build"
    json.dumps(rows)
    section = {"title": name, "status": "ok", "seconds": 0.0, "items": rows}
    data = {"options": {"dry_run": True, "quick": False}, "started": "2026-01-01T00:00", "sections": {name: section}}
    assert "A dry run" in gpu.report(data)
    assert len(gpu.printed(data)) < 12_000


def test_every_contender_takes_part(tmp_path):
    """With a Triton dropout that the CPU can run; none is missing but where it is meant to be."""
    torch = pytest.importorskip("torch")
    task = Task(DRY)
    task.found = {
        gpu.COMPILE_WORKS: {"status": "ok", "result": {}},
        gpu.TRITON_CHOICE: {"status": "ok", "result": {"float32": {"choice": ["one_draw", 1024]}}},
    }

    def dropout(x, y, p, seed, choice):
        assert choice == ("one_draw", 1024)
        torch.mul(x, 1.0 / (1.0 - p), out=y)

    with mock.patch.object(gpu, "triton_dropout", return_value=SimpleNamespace(dropout=dropout)):
        result = gpu.time_kernels(task, "1M", "float32", 0.1)
        other = gpu.time_kernels(task, "1M", "float32", 0.5)
    assert result["missing"] == {}
    assert list(other["missing"]) == [gpu.COMPILED]
    both = {f"{who} {gpu.BOTH}" for who in (gpu.OURS, gpu.SEEDED, gpu.NATIVE, gpu.COMPILED, gpu.TRITON)}
    assert set(result["faster"]) == both
    n = result["elements"]
    rows = result["rows"]
    assert rows[gpu.COPY]["bytes"] == 8 * n
    assert rows["fastdrop forward"]["bytes"] == 8 * n + (n + 31) // 32 * 4
    assert rows["native forward"]["bytes"] == 9 * n
    assert rows["fastdrop forward+backward"]["bytes"] == 2 * rows["fastdrop forward"]["bytes"]


def test_kernels_are_not_timed_while_they_are_wrong():
    pytest.importorskip("torch")
    task = Task(DRY)
    task.machine.backend = Wrong("dropout_forward_at", lambda *a: _touch(a[4], 100))
    with pytest.raises(AssertionError, match="forward is wrong"):
        gpu.time_kernels(task, "1M", "bfloat16", 0.1)


def test_a_contender_that_fails_is_missing_and_no_more():
    torch = pytest.importorskip("torch")
    task = Task(DRY)
    with mock.patch.object(torch, "native_dropout", side_effect=RuntimeError("not today")):
        result = gpu.time_kernels(task, "1M", "float32", 0.5)
    assert "not today" in result["missing"]["native forward"]
    assert "fastdrop forward" in result["rows"]
    assert "native forward" not in result["rows"]


@pytest.mark.parametrize("mistake", ["values", "strides", "raises"])
def test_cpu_and_gpu_that_differ_are_found(mistake):
    torch = pytest.importorskip("torch")
    fdt = gpu.fdt()
    dropout = fdt.dropout
    task = Task(DRY)

    def wrong(x, *arguments, **options):
        y = dropout(x, *arguments, **options)
        if gpu.backends.active_name() == "numpy" or x.dim() < 4 or "noise_shape" not in options:
            return y
        if mistake == "raises":
            raise RuntimeError("no such kernel")
        if mistake == "strides":
            return y.clone(memory_format=torch.contiguous_format)
        return y * 1.5

    with mock.patch.object(gpu, "fdt", return_value=SimpleNamespace(dropout=wrong)), backend_other_than_numpy():
        with pytest.raises(AssertionError, match="image") as failure:
            gpu.same_values_item("float32")(task)
        assert "scalar" not in str(failure.value)


@contextlib.contextmanager
def backend_other_than_numpy():
    found = [name for name, reason in gpu.backends.reasons().items() if reason is None and name in ("c", "numba")]
    if not found:
        pytest.skip("NumPy is the only backend here")
    with gpu.backends.use_backend(found[0]):
        yield


def test_a_graph_that_repeats_its_mask_is_found():
    pytest.importorskip("torch")
    task = Task(DRY)
    dropout = gpu.fdt().dropout
    stuck = SimpleNamespace(dropout=lambda x, p, **options: dropout(x, p, **{"seed": 5, **options}))
    with mock.patch.object(gpu, "fdt", return_value=stuck), pytest.raises(AssertionError, match=r"agree in 1\.000"):
        gpu.check_graph(task)


def test_launch_shapes_are_put_back():
    pytest.importorskip("torch")
    machine = gpu.Host()
    before = machine.driver.THREADS, machine.driver.device(0).blocks
    with contextlib.suppress(ValueError), gpu.launch_shape(machine, 256, 8, 100):
        assert (machine.driver.THREADS, machine.driver.device(0).blocks) == (256, 800)
        raise ValueError
    assert (machine.driver.THREADS, machine.driver.device(0).blocks) == before
    with gpu.launch_shape(machine, 64, gpu.NO_LIMIT, 132):
        assert machine.driver.device(0).blocks == gpu.NO_LIMIT


def test_launch_shapes_are_those_of_the_driver():
    from fastdrop.backends._cuda import driver

    assert isinstance(driver.THREADS, int)
    assert isinstance(driver.BLOCKS_PER_SM, int)
    assert "THREADS" in inspect.getsource(driver.Kernel.launch)
    assert "device.blocks" in inspect.getsource(driver.Kernel.launch)


# ---- the part that is a GPU's ----


def names_below(source: str, module: str) -> set[str]:
    """Dotted names that the source takes from a module, whoever holds that."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            parts.insert(0, node.id)
        if module in parts[:-1]:
            found.add(".".join(parts[parts.index(module) + 1 :]))
    return found


def test_torch_has_all_that_is_used():
    torch = pytest.importorskip("torch")
    absent = []
    names = names_below(SOURCE.read_text(), "torch")
    assert "cuda.Event" in names
    for name in names:
        value = torch
        for part in name.split("."):
            if name.startswith("_C._cuda") and not hasattr(value, part):
                break  # there in builds for CUDA
            if not hasattr(value, part):
                absent.append(name)
                break
            value = getattr(value, part)
    assert not absent
    inspect.signature(torch.cuda.graph).bind(None, stream=None)
    inspect.signature(torch.cuda.make_graphed_callables).bind(None, ())
    inspect.signature(torch.cuda.set_sync_debug_mode).bind("error")


def test_both_machines_have_the_same_methods():
    def names(machine):
        return {name for name in vars(machine) if not name.startswith("_")}

    assert names(gpu.Cuda) - {"l2_bytes"} == names(gpu.Host) - {"l2_bytes"}


@pytest.fixture
def cuda():
    """`Cuda` over a torch that does nothing."""
    machine = object.__new__(gpu.Cuda)
    machine.torch = mock.MagicMock()
    machine._side = mock.MagicMock()
    machine.device = "cuda:0"
    return machine


def test_cuda_captures_on_the_stream_that_it_warms_up(cuda):
    torch, calls = cuda.torch, []

    def call():
        entered = torch.cuda.stream.call_args
        calls.append((torch.cuda.graph.called, entered.args[0] if entered else None))

    replay = cuda.capture(call)
    assert calls == [(False, cuda._side), (False, cuda._side), (True, cuda._side)]
    assert torch.cuda.graph.call_args.kwargs == {"stream": cuda._side}
    assert replay == torch.cuda.CUDAGraph.return_value.replay
    assert not cuda.is_spoiled


def test_cuda_leaves_the_stream_of_a_failed_capture(cuda):
    torch = cuda.torch
    torch.cuda.graph.return_value.__exit__.side_effect = RuntimeError("capture failed")
    with pytest.raises(RuntimeError, match="capture failed"):
        cuda.capture(lambda: None)
    assert torch.cuda.set_stream.call_args.args == (torch.cuda.current_stream.return_value,)
    assert cuda.is_spoiled
    assert not gpu.Cuda.is_spoiled


def test_cuda_methods_run(cuda):
    torch = cuda.torch
    torch.cuda.max_memory_allocated.return_value, torch.cuda.memory_allocated.return_value = 700, 200
    torch.cuda.mem_get_info.return_value = (1000, 2000)
    torch.cuda.default_generators.__getitem__.return_value.initial_seed.return_value = 5
    torch.cuda.default_generators.__getitem__.return_value.get_offset.return_value = 8
    start, end = cuda.mark(), cuda.mark()
    start.elapsed_time.return_value = 3.0
    assert cuda.seconds(start, end) == pytest.approx(3e-3)
    assert cuda.peak_bytes(lambda: None) == 500
    assert cuda.has_room_for(999)
    assert not cuda.has_room_for(1000)
    with cuda.forbidding_synchronisation():
        assert torch.cuda.set_sync_debug_mode.call_args.args == ("error",)
    assert torch.cuda.set_sync_debug_mode.call_args.args == ("default",)
    assert len(cuda.streams(2)) == 2
    for piece in cuda.host_pieces().values():
        piece()
    assert torch.cuda.default_generators.__getitem__.return_value.set_offset.call_args.args == (12,)
    assert cuda.alive()
    torch.cuda.synchronize.side_effect = RuntimeError("illegal address")
    assert not cuda.alive()


def test_nvidia_smi_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.nvidia_smi() == {}
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '580.1, P0, 345 MHz, 1 MHz, 1980 MHz, 2 MHz, 30, 70.00 W, 700.00 W'\n")
    script.chmod(0o755)
    found = gpu.nvidia_smi()
    assert found["driver_version"] == "580.1"
    assert found["clocks.max.sm"] == "1980 MHz"


def test_triton_kernels_are_whole():
    source = (ROOT / "bench" / "gpu_triton.py").read_text()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert {"one_draw", "four_draws", "dropout"} <= set(functions)
    for name in ("one_draw", "four_draws"):
        arguments = [argument.arg for argument in functions[name].args.args]
        assert arguments == ["x", "y", "n", "p", "scale", "seed", "BLOCK"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_kernels_compile(dtype):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench import gpu_triton

    for name, block in gpu_triton.CHOICES:
        kernel, _ = gpu_triton.kernels()[name]
        types = {"x": f"*{dtype}", "y": f"*{dtype}", "n": "i32", "p": "fp32", "scale": "fp32", "seed": "i32"}
        source = ASTSource(
            fn=kernel,
            signature={**types, "BLOCK": "constexpr"},
            constexprs={"BLOCK": block},
            attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
        )
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert re.search(r"ld\.global[.\w:]*\.v[24]\.b32", ptx), name
        assert re.search(r"st\.global[.\w:]*\.v[24]\.b32", ptx), name


# ---- the report ----


def timed(seconds, nbytes=None, share=None):
    row = dict.fromkeys(("seconds", "low", "high", "min", "max"), seconds) | {"rounds": 9, "launches": 8}
    if nbytes:
        row |= {"bytes": nbytes, "bytes_per_second": nbytes / seconds}
    return row | ({"share": share} if share else {})


def run_of(sections):
    return {
        "options": {"dry_run": False, "quick": False},
        "started": "2026-01-01T00:00:00",
        "seconds": 1.0,
        "sections": {
            name: {
                "title": name,
                "status": "failed" if any(row["status"] == "failed" for row in items.values()) else "ok",
                "seconds": 1.0,
                "items": items,
            }
            for name, items in sections.items()
        },
    }


def kernel_result(forward=0.95, backward=0.8, native=3.0):
    rows = {
        "copy": timed(1e-3, 1000, 1.0),
        "fastdrop forward": timed(1e-3, 1000, forward),
        "fastdrop backward": timed(1e-3, 1000, backward),
        "fastdrop forward+backward": timed(2e-3, 2000, 0.9),
        "native forward+backward": timed(2e-3 * native),
    }
    faster = {"fastdrop forward+backward": 1.0, "native forward+backward": native}
    return {
        "size": "256M", "elements": 1 << 28, "dtype": "float32", "p": 0.1, "buffers": 2, "rows": rows,
        "missing": {"triton": "not installed"}, "faster": faster, "clocks": {},
    }  # fmt: skip


def ok(result):
    return {"status": "ok", "result": result, "seconds": 1.0}


def test_targets_have_misses_first():
    host = {"fastdrop, no grad": {**timed(2e-5), "against": "F.dropout, no grad", "time_ratio": 1.6}}
    host |= {"F.dropout, no grad": timed(1e-5)}
    calls = {"size": "16M", "dtype": "float32", "kept": {"fastdrop": 126, "F.dropout": 1000}, "rows": {}, "missing": {}}
    data = run_of({"kernels": {"a": ok(kernel_result())}, "calls": {"a": ok(calls)}, "host": {"calls": ok(host)}})
    judged = gpu.targets(data)
    assert [met for *_, met in judged] == sorted(met for *_, met in judged)
    missed = {(what, measured) for what, _, _, measured, met in judged if not met}
    assert missed == {("backward", "80.0%"), ("host: fastdrop, no grad", "1.60x")}
    met = {(what, measured) for what, _, _, measured, met in judged if met}
    assert met == {("forward", "95.0%"), ("forward+backward against native", "3.00x"), ("bytes kept", "126")}
    for text in (gpu.report(data), gpu.printed(data)):
        assert text.index("**missed**") < text.index("95.0%")
    assert gpu.report(data).count("**missed**") == 2


@pytest.mark.parametrize(
    ("result", "missed"),
    [
        (kernel_result(0.9, 0.9, 1.01), []),
        (kernel_result(0.8999, 0.9, 1.01), ["forward"]),
        (kernel_result(0.9, 0.9, 1.0), ["forward+backward against native"]),
    ],
)
def test_targets_at_their_limits(result, missed):
    judged = gpu.targets(run_of({"kernels": {"a": ok(result)}}))
    assert [what for what, *_, met in judged if not met] == missed


def test_report_tells_of_failures_and_of_what_was_not_run():
    failed = {"status": "failed", "error": "AssertionError: 3 | 4 differ", "traceback": "...", "seconds": 1.0}
    late = {"status": "not run", "error": "no time was left", "seconds": 0.0}
    absent = {"status": "skipped", "error": "not installed", "seconds": 0.0}
    data = run_of({"checks": {"golden": ok({}), "graph": failed, "large": late}, "sanitizer": {"memcheck": absent}})
    data["sections"]["kernels"] = run_of({"kernels": {"a": ok(kernel_result())}})["sections"]["kernels"]
    for text in (gpu.report(data), gpu.printed(data)):
        assert "| checks | graph | **failed** | AssertionError: 3 / 4 differ |" in text
        assert text.index("| checks | graph") < text.index("| checks | large | not run") < text.index("| sanitizer |")
        assert "isn't known to be right" in text
    assert "isn't known to be right" not in gpu.report(run_of({"kernels": {"a": ok(kernel_result())}}))


def test_printed_is_short_whatever_fails():
    items = {f"item {k}": {"status": "failed", "error": "x" * 5000, "seconds": 1.0} for k in range(200)}
    results = {f"case {k}": ok(kernel_result()) for k in range(60)}
    text = gpu.printed(run_of({"checks": items, "kernels": results}))
    assert len(text) < 12_000
    assert "186 more" in text
    assert "characters more in the .md" in text


def test_report_of_nothing():
    assert "no device" in gpu.report(run_of({}))


def test_save_writes_json_and_report(tmp_path):
    machine = {"device": "NVIDIA H100 80GB HBM3", "sms": 132, "packages": {"torch": "2.11"}}
    data = run_of({"machine": {"machine": ok(machine)}, "kernels": {"a": ok(kernel_result())}})
    files = gpu.save(data, tmp_path / "new")
    assert [file.name for file in files] == ["gpu-nvidia-h100-80gb-hbm3.json", "gpu-nvidia-h100-80gb-hbm3.md"]
    assert json.loads(files[0].read_text()) == data
    assert "NVIDIA H100 80GB HBM3" in files[1].read_text()
    assert gpu.save(data, None) == []


# ---- the command ----


def test_arguments():
    chosen = gpu.parse(["--quick", "--no-tune", "--output", "x"])
    assert (chosen.quick, chosen.tune, chosen.dry_run, chosen.output) == (True, False, False, Path("x"))
    options = Options(quick=True, tune=False, dry_run=True)
    again = gpu.parse(options.as_arguments())
    assert (again.quick, again.tune, again.dry_run) == (True, False, True)
    with pytest.raises(SystemExit):
        gpu.parse(["--sections", "kernels,nonsense"])


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A checkout without its C extension."""
    folder = tmp_path_factory.mktemp("bare")
    ignore = shutil.ignore_patterns("_native*", "__pycache__", "results")
    for name in ("fastdrop", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def run_bare(bare, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(bare / "bench" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=bare, timeout=240)


def test_without_a_gpu_the_reason_is_one_sentence(bare):
    result = run_bare(bare)
    assert result.returncode == gpu.NO_GPU
    assert result.stdout == ""
    assert re.fullmatch(r"bench/gpu\.py needs a GPU: [^\n]+\n", result.stderr)
    assert not [*bare.rglob("*.json.part")]
    assert not (bare / "bench" / "results").exists()


def test_command_from_a_bare_checkout(bare, tmp_path):
    pytest.importorskip("torch")
    result = run_bare(bare, "--dry-run", "--quick", "--sections", "channels", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "gpu-dry-run-on-the-cpu.json").read_text())
    assert list(data["sections"]) == ["machine", "channels"]
    assert all(section["status"] == "ok" for section in data["sections"].values())
    assert "A dry run" in (tmp_path / "gpu-dry-run-on-the-cpu.md").read_text()
    assert result.stdout.index("a decision per channel: ok") < result.stdout.index("# GPU report")
    assert result.stdout.splitlines()[-1].startswith("wrote ")
    assert not (bare / "bench" / "results").exists()

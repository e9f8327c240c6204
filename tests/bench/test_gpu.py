"""The GPU benchmark without a GPU: processes, compiled kernels, how and what it times, the report, the command."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest

from bench.gpu import __main__ as gpu
from bench.gpu import build, processes, races, timing
from bench.gpu import device as gpu_device
from bench.gpu import report as gpu_report
from bench.gpu.processes import Task
from bench.gpu.races import Contender
from fastdrop.backends.cuda import compile, driver
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.backends.cuda.compile import Variant

from ..backends.cuda import fused_cases as cuda_cases
from ..cases import ROOT

# ---- items and processes ----


def fails(task):
    raise ValueError("one\n  two")


def test_a_failing_item_leaves_its_reason_and_ends_the_process(tmp_path):
    file = tmp_path / "rows"
    items = {"a": fails, "b": lambda task: {"x": 1}}
    assert not processes.run_items(items, file, Task())
    assert list(processes.rows(file)) == ["a"]
    assert processes.run_items(items, file, Task())  # another process
    rows = processes.rows(file)
    assert (rows["a"]["status"], rows["a"]["error"]) == ("failed", "ValueError: one two")
    assert "fails" in rows["a"]["details"]
    assert rows["b"]["result"] == {"x": 1}
    late = tmp_path / "late"
    assert processes.run_items({"a": fails}, late, Task(deadline=time.monotonic() - 1))
    assert processes.rows(late)["a"]["status"] == "not run"


# A section's process in a few lines, for a quick start.
CHILD = """
import os, sys, time
from pathlib import Path
def ends():
    print("last words", flush=True)
    {end}
items = {{"first": int, "ends": ends, "second": int}}
file = Path(sys.argv[1])
text = file.read_text() if file.exists() else ""
for name, item in items.items():
    if name not in text:
        for row in ('"status": "failed", "error": "it was begun and did not end"', '"status": "ok"'):
            with file.open("a") as stream:
                print('{{"item": "%s", %s}}' % (name, row), file=stream)
            if "begun" in row:
                item()
"""


def run_child(end, tmp_path, seconds):
    return processes.run_section([sys.executable, "-c", CHILD.format(end=end)], tmp_path / "rows", seconds)


def test_a_section_goes_on_after_a_crash_and_ends_with_its_time(tmp_path, monkeypatch):
    rows = run_child("os._exit(9)", tmp_path, 60)
    assert {name: row["status"] for name, row in rows.items()} == {"first": "ok", "ends": "failed", "second": "ok"}
    assert "code 9" in rows["ends"]["error"]
    assert "last words" in rows["ends"]["details"]
    (tmp_path / "rows").unlink()
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.0)
    rows = run_child("time.sleep(600)", tmp_path, 3)
    assert {name: row["status"] for name, row in rows.items()} == {"first": "ok", "ends": "not run"}
    rows = processes.run_section([sys.executable, "-c", "raise SystemExit('no start')"], tmp_path / "none", 60)
    assert list(rows) == ["process"]
    assert "no start" in rows["process"]["details"]


def test_sections_share_the_time_write_the_json_and_outlive_errors(tmp_path):
    data = {"options": {"dry_run": True, "quick": False}, "started": "2026-01-01T00:00", "sections": {}}
    budgets = {"one": 10, "two": 20, "three": 500}
    sections = {name: gpu.Section(name, lambda quick: {}, seconds) for name, seconds in budgets.items()}
    written, allowed = [], []

    def run(name, seconds):
        allowed.append(seconds)
        files = [*tmp_path.glob("*.json")]
        written.append(list(json.loads(files[0].read_text())["sections"]) if files else [])
        if name == "two":
            raise OSError("no more processes")
        return {"item": {"status": "ok", "result": {}}}

    gpu.run_sections(data, sections, run, 100.0, tmp_path)
    assert written == [[], ["one"], ["one", "two"]]
    assert allowed[:2] == [10, 20]
    assert 90 < allowed[2] <= 100
    assert [data["sections"][name]["status"] for name in sections] == ["ok", "failed", "ok"]
    gpu.run_sections(data, sections, run, 0.0, None)
    assert {section["status"] for section in data["sections"].values()} == {"cut"}
    assert gpu.TOTAL_SECONDS + processes.GRACE_SECONDS < 480 - 15  # what is left: starting, and writing the report


def test_suite_failures_are_told():
    text = "tests/x.py::test_a PASSED\nFAILED tests/x.py::test_b - assert 1\n===== 1 failed, 1 passed in 2.1s ====="
    with pytest.raises(AssertionError, match=r"1 failed, 1 passed.*test_b"):
        gpu.judged_suite(1, text)
    with pytest.raises(AssertionError, match=r"last one begun is tests/x\.py::test_b"):
        gpu.judged_suite(None, "tests/x.py::test_a PASSED\ntests/x.py::test_b ")
    with pytest.raises(AssertionError, match="3 skipped"):
        gpu.judged_suite(0, "===== 3 skipped in 0.1s =====")
    assert gpu.judged_suite(0, "x\n===== 7 passed, 1 skipped in 3.0s =====")["summary"].startswith("7 passed")


# ---- what is compiled ----


@pytest.fixture
def launched(monkeypatch):
    """The variants that the driver is asked for, on a device that launches nothing."""
    found = set()

    def kernel(*parts, **others):
        found.add(Variant(*parts, **others))
        return SimpleNamespace(launch=lambda *arguments: None)

    monkeypatch.setattr(driver, "device", lambda ordinal: SimpleNamespace(kernel=kernel))
    return found


def test_every_kernel_is_compiled_before_it_is_timed(launched, monkeypatch):
    torch = pytest.importorskip("torch")
    from bench.torch import fused_cases
    from fastdrop import backends
    from fastdrop.torch.runtime import cuda as cuda_runtime

    monkeypatch.setattr(backends, "cuda_backend", lambda: numba_cuda)
    monkeypatch.setattr(cuda_runtime, "place", lambda x: (0, 0))
    monkeypatch.setattr(cuda_runtime, "is_usable", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    plain = fused_cases.dropout(0.1), fused_cases.dropout(0.1, store="seed"), fused_cases.dropout2d()
    for fused, dtype in itertools.product((*fused_cases.FUSED.values(), *plain), timing.FUSED_DTYPES):
        for layout in timing.LAYOUTS if fused is plain[-1] else timing.LAYOUTS[:1]:
            shape = (2, 3, 4, 8) if fused is plain[-1] else (48, 32)
            x = torch.zeros(shape, dtype=getattr(torch, dtype)).contiguous(memory_format=getattr(torch, layout))
            tensors = fused.tensors(x)
            found = fused_cases.results(fused.ours, tensors)
            fused_cases.gradients(found, tensors, tuple(torch.zeros_like(y) for y in found))
    assert {variant.body for variant in launched} == {*compile.ROW_PARAMETERS, "draw_words", "elementwise", "strided"}
    assert launched <= set(build.every_variant())


def test_every_fused_kernel_is_compiled_before_it_is_tested(launched):
    """Or the tests would not end in time."""
    on_nothing = SimpleNamespace(stream=0, forget=lambda: None, allow=lambda *arrays: None)
    for name, pair in itertools.product(cuda_cases.ROWS_CASES, cuda_cases.PAIR):
        with contextlib.suppress(AssertionError):  # there are no results
            cuda_cases.assert_case_as_reference(on_nothing, name, pair)
    assert {variant.body for variant in launched} == {*compile.ROW_PARAMETERS}
    variants = build.every_variant()
    assert launched <= set(variants)
    assert len(set(variants)) == len(variants)


# ---- the part that is a GPU's ----


def test_cuda_captures_on_the_stream_that_it_warms_up(monkeypatch):
    """`Cuda` over a torch that does nothing, and a device of the driver's."""

    def methods(kind):
        return {name for name in vars(kind) if not name.startswith("_")} - {"l2_bytes"}

    assert methods(gpu_device.Cuda) == methods(gpu_device.Host)
    device = object.__new__(gpu_device.Cuda)
    device.torch, device._side, device._pool = torch, side, pool = mock.MagicMock(), mock.MagicMock(), object()
    calls = []

    def call():
        entered = torch.cuda.stream.call_args
        calls.append((torch.cuda.graph.called, entered.args[0] if entered else None))

    device.warm_up(call)
    replay = device.capture(call)
    assert calls == [(False, side), (False, side), (True, side)]
    assert torch.cuda.graph.call_args.kwargs == {"stream": side, "pool": pool}
    assert replay == torch.cuda.CUDAGraph.return_value.replay
    torch.cuda.graph.return_value.__exit__.side_effect = RuntimeError("capture failed")
    with pytest.raises(RuntimeError, match="capture failed"):
        device.capture(lambda: None)
    assert torch.cuda.set_stream.call_args.args == (torch.cuda.current_stream.return_value,)

    found = SimpleNamespace(blocks=4224)
    monkeypatch.setattr(driver, "device", lambda ordinal: found)
    before = driver.THREADS, driver.device(0).blocks
    with device.launch_shape(256, 800):
        assert (driver.THREADS, driver.device(0).blocks) == (256, 800)
    assert (driver.THREADS, driver.device(0).blocks) == before
    launch = inspect.getsource(driver.Kernel.launch)
    assert "THREADS" in launch
    assert "device.blocks" in launch


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_kernel_compiles():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench.gpu import triton_dropout

    types = {"x": "*bf16", "y": "*bf16", "n": "i32", "p": "fp32", "scale": "fp32", "seed": "i32"}
    source = ASTSource(
        fn=triton_dropout.kernel(),
        signature={**types, "BLOCK": "constexpr"},
        constexprs={"BLOCK": triton_dropout.BLOCK_DRAWS},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert re.search(r"ld\.global[.\w:]*\.v[24]\.b32", ptx)
    assert re.search(r"st\.global[.\w:]*\.v[24]\.b32", ptx)


# ---- races ----


class Clock:
    """A device on which each piece of work takes as long as it says, on a clock of its own."""

    sample_seconds, host_calls = 1e-3, 10

    def __init__(self):
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


def test_race_divides_by_launches_compares_bytes_and_never_waits_within_a_round():
    clock = Clock()
    contenders = [
        Contender("copy", clock.work("copy", 4e-4), launches=4, nbytes=1000),
        Contender("ours", clock.work("ours", 1e-3), launches=5, nbytes=1500),
        Contender("unknown", clock.work("unknown", 2e-3)),
    ]
    rows = races.race(clock, contenders, 0.0, "copy", "absent")
    assert [row["seconds"] for row in rows.values()] == pytest.approx([1e-4, 2e-4, 2e-3])
    assert rows["copy"]["bytes_per_second"] == pytest.approx(1e7)
    assert rows["ours"]["share"] == pytest.approx(0.75)  # 1.5 times the bytes in twice the time
    assert rows["unknown"]["ratios"] == {"copy": pytest.approx(20.0)}
    assert "share" not in rows["unknown"]
    rounds = "".join(f"{entry}," for entry in clock.log).split("synchronize,")[len(contenders) : -1]
    assert len(rounds) == races.MIN_ROUNDS == rows["copy"]["rounds"]
    orders = set()
    for line in rounds:
        first, *rest = line.strip(",").split(",")
        assert first == rest[-1]  # not timed
        assert sorted(rest) == ["copy"] * 3 + ["ours", "unknown"]  # as many as last for a sample
        orders.add(tuple(rest))
    assert len(orders) > 1


def test_ratios_are_taken_within_a_round():
    samples = {"a": [1.0, 20.0, 300.0], "b": [2.0, 10.0, 100.0]}
    row = races.table([Contender(name, int) for name in samples], samples, ["b"])["a"]
    assert row["ratios"] == {"b": 2.0}
    assert row["low"] < row["seconds"] == 20.0 < row["high"]


def test_race_on_host_waits_before_each_sample():
    clock = Clock()
    rows = races.race_on_host(clock, {name: clock.work(name, 0) for name in "ab"}, 0.0, "a")
    warm_up, *batches = "".join(f"{entry}," for entry in clock.log).split("synchronize,")[:-1]
    assert warm_up in ("a,", "b,")
    assert len(batches) == 2 * races.MIN_ROUNDS
    assert {batch.count(",") for batch in batches[:-1]} == {clock.host_calls + 1}  # the next one's warm-up is there
    assert rows["b"]["ratios"]["a"] > 0


# ---- what is timed, on tensors of the CPU ----


@pytest.mark.parametrize("name", [name for name in gpu.SECTIONS if name not in ("suite", "build")])
def test_section_runs_dry(name, tmp_path):
    torch = pytest.importorskip("torch")
    items = dict(itertools.islice(gpu.SECTIONS[name].items(True).items(), 2 if name == "host" else 1))
    assert processes.run_items(items, tmp_path / "rows", Task(dry_run=True))
    rows = processes.rows(tmp_path / "rows")
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    section = {"title": name, "status": "ok", "seconds": 0.0, "items": rows}
    data = {"options": {"dry_run": True, "quick": False}, "started": "2026-01-01T00:00", "sections": {name: section}}
    text = gpu_report.report(data)
    assert "A dry run" in text
    assert all(f"| {item} |" in text for item in items) or name in ("machine", "host")
    for layout in timing.LAYOUTS if name == "channels" else ():
        buffers = timing.rotation(gpu_device.Host(), "images", "float32", layout)
        assert len(buffers) * buffers[0].nbytes >= timing.L2_TURNS * gpu_device.Host.l2_bytes
        assert len({x.data_ptr() for x in buffers}) == len(buffers) >= 2
        assert all(x.is_contiguous(memory_format=getattr(torch, layout)) for x in buffers)


def test_every_contender_takes_part_or_is_noted():
    """With a Triton dropout that the CPU can run."""
    torch = pytest.importorskip("torch")
    from bench.gpu import triton_dropout

    def dropout(x, y, p, seed):
        torch.mul(x, 1.0 / (1.0 - p), out=y).view(-1)[: round(p * x.numel())] = 0

    passes = "forward", "backward", "forward+backward"
    with mock.patch.object(triton_dropout, "dropout", dropout):
        result = timing.time_dropout(Task(dry_run=True), "1M", "float32", 0.1)
    rows, n = result["rows"], 33 * 16
    assert result["notes"] == {}
    every = {f"{who} {what}" for who in ("fastdrop", 'fastdrop, store="seed"', "torch", "triton") for what in passes}
    assert set(rows) == {"copy", *every, "torch.compile forward", "torch.compile forward+backward"}
    assert all(set(row["ratios"]) == {"copy", "fastdrop forward+backward"} for row in rows.values())
    kept = (n + 31) // 32 * 4
    assert [rows[f"fastdrop {what}"]["bytes"] for what in passes] == [8 * n + kept, 8 * n + kept, 16 * n + 2 * kept]
    assert rows["copy"]["bytes"] == rows["triton forward"]["bytes"] == 8 * n
    assert [who for who in rows if "share" not in rows[who]] == [who for who in rows if who.startswith("torch")]
    with mock.patch.object(torch.nn.functional, "dropout", side_effect=RuntimeError("not today")):
        result = timing.time_dropout(Task(dry_run=True), "1M", "float32", 0.5)
    assert "not today" in result["notes"]["torch forward"]
    assert "fastdrop forward" in result["rows"]
    assert not any("compile" in name or name == "torch forward" for name in result["rows"])


@pytest.mark.parametrize("name", ["results", "gradients"])
def test_nothing_is_timed_that_is_wrong(monkeypatch, name):
    pytest.importorskip("torch")
    from bench.torch import fused_cases

    right, calls = getattr(fused_cases, name), []

    def wrong(*arguments, **options):
        """The device's outcome in `assert_right` is a hundredth off."""
        calls.append(None)
        found = right(*arguments, **options)
        return tuple(1.01 * each for each in found) if len(calls) == 2 - (name == "gradients") else found

    monkeypatch.setattr(fused_cases, name, wrong)
    with pytest.raises(AssertionError, match=f"{'forward' if name == 'results' else 'backward'} is wrong"):
        timing.time_fused(Task(dry_run=True), "swiglu_dropout", timing.FUSED_SIZES[0], "float32")


def test_bytes_moved_are_those_of_arguments_results_and_what_is_kept():
    torch = pytest.importorskip("torch")
    from bench.torch import fused_cases

    functions = {"dropout": fused_cases.dropout(0.1), "seed": fused_cases.dropout(0.1, store="seed")}
    for k, (name, fused) in enumerate({**fused_cases.FUSED, **functions}.items()):
        x = torch.randn(40, 24, dtype=(torch.float32, torch.bfloat16)[k % 2])
        tensors, kept, n, item = fused.tensors(x), [], x.numel(), x.element_size()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            found = fused_cases.results(fused.ours, tensors)
        upstream = tuple(torch.randn_like(y) for y in found)
        gradients = fused_cases.gradients(found, tensors, upstream)
        words = sum(tensor.nbytes for tensor in kept if tensor.dtype is torch.int32)
        forward, backward = (
            len({tensor.data_ptr() for tensor in group if tensor.numel() == n}) * n * item + words
            for group in ([*tensors.values(), *found, *kept], [*upstream, *kept, *gradients])
        )
        assert fused.moved(x) == (forward, backward), name
        others = [t for t in [*tensors.values(), *kept, *gradients] if t.numel() != n and t.dtype is not torch.int32]
        assert all(tensor.numel() <= 2 * max(x.shape) for tensor in others), name  # what isn't counted is small


# ---- the report ----


def ok(result):
    return {"status": "ok", "result": result}


def run_of(**sections):
    def section(name, items):
        status = "failed" if any(row["status"] == "failed" for row in items.values()) else "ok"
        return {"title": name, "status": status, "seconds": 1.0, "items": items}

    found = {name: section(name, items) for name, items in sections.items()}
    return {"options": {"dry_run": False, "quick": False}, "started": "2026-01-01T00:00:00", "sections": found}


def timed_case(forward=0.95, backward=0.8, eager=3.0):
    def timed(share=None, ratio=1.0):
        row = dict.fromkeys(("seconds", "low", "high"), 1e-3) | {"rounds": 9, "bytes_per_second": 1e12}
        return row | {"ratios": {"fastdrop forward+backward": ratio}} | ({"share": share} if share else {})

    rows = {
        "copy": timed(1.0), "fastdrop forward": timed(forward), "fastdrop backward": timed(backward),
        "fastdrop forward+backward": timed(0.9), "torch forward+backward": timed(None, eager),
    }  # fmt: skip
    return ok({"rows": rows, "notes": {"triton": "not installed"}})


def test_targets_have_misses_first():
    base = {"F.dropout, no grad": {"seconds": 1e-5, "ratios": {"F.dropout, no grad": 1.0}}}
    host = ok(base | {"fastdrop, no grad": {"seconds": 2e-5, "ratios": {"F.dropout, no grad": 1.6}}})
    kept = ok({"fastdrop": 126, "F.dropout": 1000})
    fused = {"softmax_dropout": timed_case(0.85, 0.8499), "nothing": ok({})}
    data = run_of(kernels={"256M float32": timed_case()}, host={"calls": host, "kept": kept}, fused=fused)
    assert [(what, case, measured, met) for what, case, _, measured, met in gpu_report.targets(data)] == [
        ("backward", "256M float32", "80.0%", False),
        ("backward", "softmax_dropout", "85.0%", False),
        ("host: fastdrop, no grad", "1000 elements", "1.60x", False),
        ("forward", "256M float32", "95.0%", True),
        ("forward+backward against torch", "256M float32", "3.00x", True),
        ("forward", "softmax_dropout", "85.0%", True),
        ("bytes kept for backward", "1000 elements", "126", True),
    ]
    text = gpu_report.report(data)
    assert text.count("**missed**") == 3
    assert text.index("**missed**") < text.index("95.0%") < text.index("## Kernels") < text.index("## Fused")
    assert "| softmax_dropout | 1,000.0 (100%) | 1,000 | 1,000.0 (85%) |" in text


def test_report_tells_of_failures_and_of_what_was_not_run():
    suite = {
        "a": ok({"summary": "7 passed"}),
        "c": {"status": "not run", "error": "no time was left"},
        "d": {"status": "failed", "error": "AssertionError: 3 | 4 differ"},
    }
    text = gpu_report.report(run_of(suite=suite, kernels={"a": timed_case()}))
    assert text.index("| suite | d | **failed** | AssertionError: 3 / 4 differ |") < text.index(
        "| suite | c | not run |"
    )
    assert "7 passed" in text
    assert "may be those of wrong results" in text
    good = run_of(suite={"a": ok({})}, kernels={"a": timed_case()})
    assert "may be those of wrong results" not in gpu_report.report(good)
    assert "no device" in gpu_report.report(run_of())


def test_printed_is_short_whatever_fails():
    items = {f"item {k}": {"status": "failed", "error": "x" * 5000} for k in range(200)}
    text = gpu_report.printed(run_of(suite=items, kernels={f"256M case {k}": timed_case() for k in range(60)}))
    assert len(text) < 12_000
    assert "186 more" in text
    assert "characters more in the .md" in text


# ---- the command ----


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
    assert not (bare / "bench" / "results").exists()


def test_command_from_a_bare_checkout(bare, tmp_path):
    """With the section whose work goes to processes of its own, which find it by its module."""
    pytest.importorskip("torch")
    pytest.importorskip("numba_cuda")
    result = run_bare(bare, "--dry-run", "--quick", "--sections", "build", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    data = json.loads((tmp_path / "gpu-dry-run-on-the-cpu-build.json").read_text())
    assert list(data["sections"]) == ["machine", "build"]
    assert "A dry run" in (tmp_path / "gpu-dry-run-on-the-cpu-build.md").read_text()
    assert result.stdout.index("compiling the kernels: ok") < result.stdout.index("# GPU report")
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md"]
    assert not (bare / "bench" / "results").exists()

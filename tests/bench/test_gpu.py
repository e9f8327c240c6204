"""The GPU benchmark without a GPU: its processes, the kernels it compiles first, its report, the command."""

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
from bench.gpu import device as gpu_device
from bench.gpu import processes, timing
from bench.gpu import report as gpu_report
from bench.gpu.processes import Skip, Task
from fastdrop.backends.cuda import compile, driver
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.backends.cuda.compile import Variant

from ..backends.cuda import fused_cases as cuda_cases
from ..cases import ROOT

# ---- items and processes ----


def fails(task):
    raise ValueError("one\n  two")


def skips(task):
    raise Skip("not here")


def test_a_failing_item_leaves_its_reason_and_ends_the_process(tmp_path):
    file, seen = tmp_path / "rows", []
    items = {"a": skips, "b": fails, "c": lambda task: seen.append(dict(task.found)) or {"x": 1}}
    assert not processes.run_items(items, file, Task(dry_run=True))
    assert list(processes.rows(file)) == ["a", "b"]
    assert processes.run_items(items, file, Task(dry_run=True))  # another process
    rows = processes.rows(file)
    assert [rows[name]["status"] for name in "abc"] == ["skipped", "failed", "ok"]
    assert (rows["a"]["error"], rows["b"]["error"]) == ("not here", "ValueError: one two")
    assert "fails" in rows["b"]["details"]
    assert rows["c"]["result"] == {"x": 1}
    assert set(seen[0]) == {"a", "b"}  # an item knows those before it
    late = tmp_path / "late"
    assert processes.run_items({"a": fails}, late, Task(deadline=time.monotonic() - 1))
    assert processes.rows(late)["a"]["status"] == "not run"


# A section's process in a few lines, for a quick start.
CHILD = """
import os, sys, time
from pathlib import Path
def dies():
    print("last words", flush=True)
    os._exit(9)
items = {"first": int, "dies": dies, "second": int}
file = Path(sys.argv[1])
text = file.read_text() if file.exists() else ""
for name, item in items.items():
    if name not in text:
        for row in ('"status": "failed", "error": "it was begun and did not end"', '"status": "ok"'):
            with file.open("a") as stream:
                print('{"item": "%s", %s}' % (name, row), file=stream)
            if "begun" in row:
                item()
"""


def test_a_section_goes_on_after_a_crash(tmp_path):
    rows = processes.run_section([sys.executable, "-c", CHILD], tmp_path / "rows", 60)
    assert {name: row["status"] for name, row in rows.items()} == {"first": "ok", "dies": "failed", "second": "ok"}
    assert "code 9" in rows["dies"]["error"]
    assert "last words" in rows["dies"]["details"]


def test_a_section_ends_with_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.0)
    command = [sys.executable, "-c", CHILD.replace("os._exit(9)", "time.sleep(600)")]
    rows = processes.run_section(command, tmp_path / "rows", 3)
    assert {name: row["status"] for name, row in rows.items()} == {"first": "ok", "dies": "not run"}


def test_a_process_that_never_starts_is_reported_once(tmp_path):
    rows = processes.run_section([sys.executable, "-c", "raise SystemExit('no start')"], tmp_path / "rows", 60)
    assert rows["process"]["status"] == "failed"
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
    assert "no more processes" in data["sections"]["two"]["items"]["section"]["error"]
    gpu.run_sections(data, sections, run, 0.0, None)
    assert {section["status"] for section in data["sections"].values()} == {"cut"}
    assert len(allowed) == 3
    assert gpu.TOTAL_SECONDS + processes.GRACE_SECONDS < 480 - 15  # what is left: starting, and writing the report


def test_suite_failures_are_told():
    text = "tests/x.py::test_a PASSED\nFAILED tests/x.py::test_b - assert 1\n===== 1 failed, 1 passed in 2.1s ====="
    with pytest.raises(AssertionError, match=r"1 failed, 1 passed.*test_b"):
        gpu.judged_suite(1, text)
    with pytest.raises(AssertionError, match=r"last one begun is tests/x\.py::test_b"):
        gpu.judged_suite(None, "tests/x.py::test_a PASSED\ntests/x.py::test_b ")
    with pytest.raises(AssertionError, match="no test ran"):
        gpu.judged_suite(0, "===== 3 skipped in 0.1s =====")
    with pytest.raises(Skip):
        gpu.judged_suite(5, "===== no tests ran in 0.1s =====", may_skip=True)
    assert gpu.judged_suite(0, "x\n===== 7 passed, 1 skipped in 3.0s =====")["summary"].startswith("7 passed")


# ---- what is compiled ----


class Recorder:
    """A device of the driver's that notes the kernels asked for, and launches nothing."""

    def __init__(self):
        self.variants = set()

    def kernel(self, *parts, **others):
        self.variants.add(Variant(*parts, **others))
        return SimpleNamespace(launch=lambda *arguments: None)


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(driver, "device", lambda ordinal: found)
    return found


def test_every_fused_kernel_is_compiled_before_it_is_timed(recorder, monkeypatch):
    torch = pytest.importorskip("torch")
    from bench.torch import fused_cases
    from fastdrop import backends
    from fastdrop.torch.runtime import cuda as cuda_runtime

    monkeypatch.setattr(backends, "cuda_backend", lambda: numba_cuda)
    monkeypatch.setattr(cuda_runtime, "place", lambda x: (0, 0))
    monkeypatch.setattr(cuda_runtime, "is_usable", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    for name, dtype in itertools.product(fused_cases.FUSED, timing.FUSED_DTYPES):
        fused = fused_cases.FUSED[name]
        tensors = fused.tensors(torch.zeros(48, 32, dtype=getattr(torch, dtype)))
        found = fused_cases.results(fused.ours, tensors)
        fused_cases.gradients(found, tensors, tuple(torch.zeros_like(y) for y in found))
    bodies = {variant.body for variant in recorder.variants}
    assert bodies == {*compile.ROW_PARAMETERS, "draw_words", "elementwise"}
    assert recorder.variants <= set(gpu.every_variant())


def test_every_fused_kernel_is_compiled_before_it_is_tested(recorder):
    """Or the tests would not end in time."""

    class OnNothing:
        stream = 0

        def forget(self):
            pass

        def allow(self, *arrays):
            pass

    for name, pair in itertools.product(cuda_cases.ROWS_CASES, cuda_cases.PAIR):
        with contextlib.suppress(AssertionError):  # there are no results
            cuda_cases.assert_case_as_reference(OnNothing(), name, pair)
    assert {variant.body for variant in recorder.variants} == {*compile.ROW_PARAMETERS}
    assert recorder.variants <= set(gpu.every_variant())


def test_no_variant_is_compiled_twice():
    variants = gpu.every_variant()
    assert len(set(variants)) == len(variants) == len({str(variant) for variant in variants})


# ---- the part that is a GPU's ----


def test_both_devices_have_the_same_methods():
    def names(device):
        return {name for name in vars(device) if not name.startswith("_")} - {"l2_bytes", "backend"}

    assert names(gpu_device.Cuda) == names(gpu_device.Host)


@pytest.fixture
def cuda(monkeypatch):
    """`Cuda` over a torch that does nothing, and a device of the driver's."""
    device = object.__new__(gpu_device.Cuda)
    device.torch, device._side = mock.MagicMock(), mock.MagicMock()
    found = SimpleNamespace(blocks=4224)
    monkeypatch.setattr(driver, "device", lambda ordinal: found)
    return device


def test_cuda_captures_on_the_stream_that_it_warms_up(cuda):
    torch, calls = cuda.torch, []

    def call():
        entered = torch.cuda.stream.call_args
        calls.append((torch.cuda.graph.called, entered.args[0] if entered else None))

    replay = cuda.capture(call)
    assert calls == [(False, cuda._side), (False, cuda._side), (True, cuda._side)]
    assert torch.cuda.graph.call_args.kwargs == {"stream": cuda._side}
    assert replay == torch.cuda.CUDAGraph.return_value.replay


def test_cuda_leaves_the_stream_of_a_failed_capture(cuda):
    torch = cuda.torch
    torch.cuda.graph.return_value.__exit__.side_effect = RuntimeError("capture failed")
    with pytest.raises(RuntimeError, match="capture failed"):
        cuda.capture(lambda: None)
    assert torch.cuda.set_stream.call_args.args == (torch.cuda.current_stream.return_value,)


def test_launch_shapes_are_put_back(cuda):
    before = driver.THREADS, driver.device(0).blocks
    with cuda.launch_shape(256, 800):
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


# ---- the report ----


def ok(result):
    return {"status": "ok", "result": result}


def run_of(**sections):
    def section(name, items):
        status = "failed" if any(row["status"] == "failed" for row in items.values()) else "ok"
        return {"title": name, "status": status, "seconds": 1.0, "items": items}

    found = {name: section(name, items) for name, items in sections.items()}
    return {"options": {"dry_run": False, "quick": False}, "started": "2026-01-01T00:00:00", "sections": found}


def kernel_result(forward=0.95, backward=0.8, native=3.0):
    def timed(share=None, ratio=1.0):
        row = dict.fromkeys(("seconds", "low", "high"), 1e-3) | {"rounds": 9, "bytes_per_second": 1e12}
        return row | {"ratios": {"fastdrop forward+backward": ratio}} | ({"share": share} if share else {})

    rows = {
        "copy": timed(1.0), "fastdrop forward": timed(forward), "fastdrop backward": timed(backward),
        "fastdrop forward+backward": timed(0.9), "native forward+backward": timed(None, native),
    }  # fmt: skip
    return {"case": "256M float32 p=0.1", "rows": rows, "notes": {"triton": "not installed"}}


def test_targets_have_misses_first():
    base = {"F.dropout, no grad": {"seconds": 1e-5, "ratios": {"F.dropout, no grad": 1.0}}}
    host = ok(base | {"fastdrop, no grad": {"seconds": 2e-5, "ratios": {"F.dropout, no grad": 1.6}}})
    kept = ok({"fastdrop": 126, "F.dropout": 1000})
    data = run_of(kernels={"a": ok(kernel_result())}, host={"calls": host, "kept": kept})
    judged = [(what, measured, met) for what, _, _, measured, met in gpu_report.targets(data)]
    assert judged == [
        ("backward", "80.0%", False),
        ("host: fastdrop, no grad", "1.60x", False),
        ("forward", "95.0%", True),
        ("forward+backward against native", "3.00x", True),
        ("bytes kept for backward", "126", True),
    ]
    text = gpu_report.report(data)
    assert text.count("**missed**") == 2
    assert text.index("**missed**") < text.index("95.0%")


def test_targets_of_fused_kernels():
    for share, met in ((0.85, True), (0.8499, False)):
        result = kernel_result(share, 0.9) | {"case": "softmax_dropout, 2048 x 2048 float32"}
        data = run_of(fused={"a": ok(result), "b": ok({})})
        must = "at least 85% of the copy's bandwidth"
        targets = sorted(gpu_report.targets(data))
        assert targets == [
            ("backward", result["case"], must, "90.0%", True),
            ("forward", result["case"], must, f"{share:.1%}", met),
        ]
        text = gpu_report.report(data)
        assert f"| {result['case']} | 1,000.0 (100%) | 1,000 | 1,000.0 ({share:.0%}) |" in text
        assert text.index("## Targets") < text.index("## Fused kernels")


def test_report_tells_of_failures_and_of_what_was_not_run():
    suite = {
        "a": ok({"summary": "7 passed"}),
        "b": {"status": "skipped", "error": "not installed"},
        "c": {"status": "not run", "error": "no time was left"},
        "d": {"status": "failed", "error": "AssertionError: 3 | 4 differ"},
    }
    text = gpu_report.report(run_of(suite=suite, kernels={"a": ok(kernel_result())}))
    assert "| suite | d | **failed** | AssertionError: 3 / 4 differ |" in text
    assert text.index("| suite | d |") < text.index("| suite | c | not run |") < text.index("| suite | b | skipped |")
    assert "7 passed" in text
    assert "isn't known to be right" in text
    good = run_of(suite={"a": ok({})}, kernels={"a": ok(kernel_result())})
    assert "isn't known to be right" not in gpu_report.report(good)
    assert "no device" in gpu_report.report(run_of())


def test_printed_is_short_whatever_fails():
    items = {f"item {k}": {"status": "failed", "error": "x" * 5000} for k in range(200)}
    text = gpu_report.printed(run_of(suite=items, kernels={f"case {k}": ok(kernel_result()) for k in range(60)}))
    assert len(text) < 12_000
    assert "186 more" in text
    assert "characters more in the .md" in text


def test_save_writes_json_and_report(tmp_path):
    data = run_of(machine={"machine": ok({"device": "NVIDIA H100 80GB HBM3"})}, kernels={"a": ok(kernel_result())})
    files = gpu_report.save(data, tmp_path / "new")
    assert [file.name for file in files] == ["gpu-nvidia-h100-80gb-hbm3.json", "gpu-nvidia-h100-80gb-hbm3.md"]
    assert json.loads(files[0].read_text()) == data
    assert "NVIDIA H100 80GB HBM3" in files[1].read_text()
    assert sorted(tmp_path.rglob("*.*")) == sorted(files)


# ---- the command ----


def test_sections_with_a_run_of_their_own():
    chosen = gpu.parse([]).sections.split(",")
    assert set(gpu.SECTIONS) - set(chosen) == {"fused"}
    assert gpu.parse(["--sections", "build,fused"]).sections == "build,fused"


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
    data = json.loads((tmp_path / "gpu-dry-run-on-the-cpu-channels.json").read_text())
    assert list(data["sections"]) == ["machine", "channels"]
    assert all(section["status"] == "ok" for section in data["sections"].values())
    assert "A dry run" in (tmp_path / "gpu-dry-run-on-the-cpu-channels.md").read_text()
    assert result.stdout.index("a decision per channel: ok") < result.stdout.index("# GPU report")
    assert result.stdout.splitlines()[-1].startswith("wrote ")
    assert not (bare / "bench" / "results").exists()

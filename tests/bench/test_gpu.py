"""The GPU benchmark without a GPU: its figures, its processes, its report, and every section on tensors of the CPU."""

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
from bench.gpu import guard as gpu_guard
from bench.gpu import report as gpu_report
from bench.gpu import timing as gpu_timing
from bench.gpu.guard import Lines, Skip, Task
from bench.gpu.timing import Contender
from fastdrop.backends.cuda import compile, driver
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.backends.cuda.compile import Variant

from ..backends.cuda import cases as cuda_cases
from ..cases import ROOT

# ---- figures ----


@pytest.mark.parametrize(
    ("elements", "itemsize", "passes", "mask_bits", "expected"),
    [(1 << 28, 4, 1, 0, 2 * 4 << 28), (1 << 28, 2, 1, 1, (4 << 28) + (1 << 25)), (33, 4, 1, 1, 264 + 8)],
)
def test_bytes_moved(elements, itemsize, passes, mask_bits, expected):
    assert gpu_timing.moved(elements, itemsize, passes, mask_bits) == expected


@pytest.mark.parametrize("elements", [1, 1000, 5000, 100_000])
def test_buffers_in_rotation_exceed_the_cache(elements):
    pytest.importorskip("torch")
    machine = gpu_device.Host()
    buffers = gpu_timing.rotation(machine, elements, "float32")
    total = sum(x.numel() * x.element_size() for x in buffers)
    assert total >= gpu_timing.L2_TURNS * machine.l2_bytes
    assert len(buffers) == 2 or total - 4 * elements < gpu_timing.L2_TURNS * machine.l2_bytes
    assert len({x.data_ptr() for x in buffers}) == len(buffers) >= 2


FUSED = (
    "dropout_add",
    "bias_dropout_add",
    *(f"bias_act_dropout {activation}" for activation in ("relu", "gelu", "gelu_tanh", "silu")),
    "swiglu_dropout",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "softmax_dropout",
)


def data_pointers(tensors, n):
    """Of those of the data's size."""
    return {tensor.data_ptr() for tensor in tensors if tensor.numel() == n}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUSED)
def test_bytes_moved_are_those_of_arguments_results_and_what_is_kept(name, dtype):
    torch = pytest.importorskip("torch")
    from bench.torch import fused_cases

    assert tuple(fused_cases.FUSED) == FUSED
    fused, x = fused_cases.FUSED[name], torch.randn(40, 24, dtype=getattr(torch, dtype))
    tensors, kept, n, item = fused.tensors(x), [], x.numel(), x.element_size()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = fused_cases.results(fused.ours, tensors)
    upstream = tuple(torch.randn_like(y) for y in found)
    gradients = fused_cases.gradients(found, tensors, upstream)
    (words,) = [tensor for tensor in kept if tensor.dtype is torch.int32]
    of_forward = data_pointers([*tensors.values(), *found, *kept], n)
    of_backward = data_pointers([*upstream, *kept, *gradients], n)
    assert fused.moved(x) == (len(of_forward) * n * item + words.nbytes, len(of_backward) * n * item + words.nbytes)
    assert all(tensor.dtype is x.dtype for tensor in kept if tensor.numel() == n)
    few = [tensor for tensor in [*tensors.values(), *kept, *gradients] if tensor.numel() != n and tensor is not words]
    assert all(tensor.numel() <= 2 * max(x.shape) for tensor in few)  # what isn't counted is small


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
    rows = gpu_timing.race(clock, contenders, 0.0, "copy", "absent")
    assert rows["copy"]["seconds"] == pytest.approx(1e-4)
    assert rows["ours"]["seconds"] == pytest.approx(2e-4)
    assert rows["copy"]["bytes_per_second"] == pytest.approx(1e7)
    assert rows["ours"]["share"] == pytest.approx(0.75)  # 1.5 times the bytes in twice the time
    assert rows["unknown"]["ratios"] == {"copy": pytest.approx(20.0)}
    assert "share" not in rows["unknown"]
    assert clock.log.count("copy") >= gpu_timing.MIN_ROUNDS * 3  # as many as last for a sample
    assert all(row["rounds"] == gpu_timing.MIN_ROUNDS for row in rows.values())


def test_ratios_are_taken_within_a_round():
    samples = {"a": [1.0, 20.0, 300.0], "b": [2.0, 10.0, 100.0]}
    contenders = [Contender(name, int) for name in samples]
    row = gpu_timing.row(contenders[0], samples, contenders, ["b"])
    assert row["ratios"] == {"b": 2.0}
    assert (row["seconds"], row["min"], row["max"]) == (20.0, 1.0, 300.0)
    assert row["min"] <= row["low"] < 20.0 < row["high"] <= row["max"]


def test_race_never_waits_within_a_round_and_fills_the_queue_first():
    clock = Clock()
    names = ("copy", "a", "b")
    contenders = [Contender(name, clock.work(name, 2e-3)) for name in names]
    gpu_timing.race(clock, contenders, 0.0)
    rounds = "".join(f"{entry}," for entry in clock.log).split("synchronize,")[len(names) : -1]
    assert len(rounds) == gpu_timing.MIN_ROUNDS
    orders = set()
    for line in rounds:
        first, *rest = line.strip(",").split(",")
        assert first == rest[-1]  # not timed
        assert sorted(rest) == sorted(names)
        orders.add(tuple(rest))
    assert len(orders) > 1


def test_race_on_host_waits_before_each_sample():
    clock = Clock()
    contenders = [Contender("a", clock.work("a", 0)), Contender("b", clock.work("b", 0))]
    rows = gpu_timing.race_on_host(clock, contenders, 0.0, "a")
    warm_up, *batches = "".join(f"{entry}," for entry in clock.log).split("synchronize,")[:-1]
    assert warm_up in ("a,", "b,")
    assert len(batches) == 2 * gpu_timing.MIN_ROUNDS
    assert {batch.count(",") for batch in batches[:-1]} == {clock.host_calls + 1}  # the next one's warm-up is there
    assert rows["b"]["ratios"]["a"] > 0


# ---- items and processes ----


def fails(task):
    raise ValueError("one\n  two")


def skips(task):
    raise Skip("not here")


def test_a_failing_item_leaves_its_reason_and_ends_the_process(tmp_path):
    lines, seen = Lines(tmp_path / "lines"), []
    items = {"a": skips, "b": fails, "c": lambda task: seen.append(dict(task.found)) or {"x": 1}}
    gpu_guard.run_items(items, lines, Task(dry_run=True))
    assert list(lines.done()) == ["a", "b"]
    assert "end" not in lines.read()[-1]
    gpu_guard.run_items(items, lines, Task(dry_run=True))  # another process
    done = lines.done()
    assert [done[name]["status"] for name in "abc"] == ["skipped", "failed", "ok"]
    assert (done["a"]["error"], done["b"]["error"]) == ("not here", "ValueError: one two")
    assert "fails" in done["b"]["details"]
    assert done["c"]["result"] == {"x": 1}
    assert set(seen[0]) == {"a", "b"}  # an item knows those before it
    assert lines.read()[-1] == {"end": True}


def test_items_with_no_time_left_are_not_run(tmp_path):
    lines = Lines(tmp_path / "lines")
    gpu_guard.run_items({"a": fails}, lines, Task(deadline=time.monotonic() - 1))
    assert lines.done()["a"]["status"] == "not run"


# A section's process in a few lines, for a quick start.
CHILD = """
import json, os, sys, time
def dies():
    print("last words", flush=True)
    os._exit(9)
items = {"first": int, "dies": dies, "second": int, "hangs": lambda: time.sleep(600), "third": int}
file = open(sys.argv[1], "a+")
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
    command = [sys.executable, "-c", CHILD]
    ended, rows = gpu_guard.run_section(command, tmp_path / "lines", seconds=60, limit=2)
    assert ended
    assert [name for name, row in rows.items() if row["status"] == "ok"] == ["first", "second", "third"]
    assert rows["dies"]["status"] == rows["hangs"]["status"] == "failed"
    assert "code 9" in rows["dies"]["error"]
    assert "last words" in rows["dies"]["details"]
    assert "killed" in rows["hangs"]["error"]


def test_a_section_ends_with_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_guard, "GRACE_SECONDS", 0.0)
    command = [sys.executable, "-c", CHILD.replace("os._exit(9)", "time.sleep(600)")]
    ended, rows = gpu_guard.run_section(command, tmp_path / "lines", seconds=3, limit=600)
    assert not ended
    assert rows["dies"]["status"] == "not run"


def test_a_process_that_never_starts_is_reported_once(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no start')"]
    ended, rows = gpu_guard.run_section(command, tmp_path / "lines", seconds=60, limit=60)
    assert not ended
    assert rows["process"]["status"] == "failed"
    assert "no start" in rows["process"]["details"]


def test_sections_share_the_time_write_the_json_and_outlive_errors(tmp_path):
    data = {"options": {"dry_run": True, "quick": False}, "started": "2026-01-01T00:00", "sections": {}}
    budgets = {"one": 10, "two": 20, "three": 500}
    sections = {name: gpu.Section(name, lambda quick: {}, seconds, 10) for name, seconds in budgets.items()}
    written, allowed = [], []

    def run(name, section, seconds):
        allowed.append(seconds)
        files = [*tmp_path.glob("*.json")]
        written.append(list(json.loads(files[0].read_text())["sections"]) if files else [])
        if name == "two":
            raise OSError("no more processes")
        return True, {"item": {"status": "ok", "result": {}}}

    gpu.run_sections(data, sections, run, 100.0, tmp_path)
    assert written == [[], ["one"], ["one", "two"]]
    assert allowed[:2] == [10, 20]
    assert 90 < allowed[2] <= 100
    assert [data["sections"][name]["status"] for name in sections] == ["ok", "failed", "ok"]
    assert "no more processes" in data["sections"]["two"]["items"]["section"]["error"]
    gpu.run_sections(data, sections, run, 0.0, None)
    assert {section["status"] for section in data["sections"].values()} == {"cut"}
    assert len(allowed) == 3
    assert gpu.TOTAL_SECONDS + gpu_guard.GRACE_SECONDS < 480 - 15  # what is left: starting, and writing the report


# ---- what others print ----


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


def test_sanitizer_findings_are_told():
    assert gpu.judged_sanitizer(0, "=== ERROR SUMMARY: 0 errors")["summary"] == "ERROR SUMMARY: 0 errors"
    with pytest.raises(AssertionError, match="3 errors"):
        gpu.judged_sanitizer(86, "=== Invalid read\n=== ERROR SUMMARY: 3 errors")
    with pytest.raises(Skip, match="Device not supported"):
        gpu.judged_sanitizer(1, "=== Error: Device not supported")
    with pytest.raises(Skip, match="in time"):
        gpu.judged_sanitizer(None, "")


def test_the_sanitizer_has_tests_to_run():
    source = (ROOT / gpu.GPU_TESTS).read_text()
    for word in ("def test_cpu_and_gpu_agree(", "def test_device_arrays(", " 33,", " 1025,"):
        assert word in source
    assert gpu.SANITIZED == "agree and (33 or 1025) or device_arrays"


# ---- every section, on the CPU ----


@pytest.mark.parametrize("name", [name for name in gpu.SECTIONS if name != "suite"])  # a pytest within this one
def test_section_runs_dry(name, tmp_path):
    pytest.importorskip("torch")
    lines = Lines(tmp_path / "lines")
    items = gpu.SECTIONS[name].items(name in ("kernels", "fused"))
    if name == "fused":  # a type is enough here
        items = {what: item for what, item in items.items() if "float32" not in what}
        assert len(items) == 1 + len(FUSED)
    gpu_guard.run_items(items, lines, Task(dry_run=True))
    rows = lines.done()
    assert lines.read()[-1] == {"end": True}
    assert not [row for row in rows.values() if row["status"] not in ("ok", "skipped")], rows
    assert any(row["status"] == "ok" for row in rows.values()) or name in ("build", "sanitizer")
    section = {"title": name, "status": "ok", "seconds": 0.0, "items": rows}
    data = {"options": {"dry_run": True, "quick": False}, "started": "2026-01-01T00:00", "sections": {name: section}}
    assert "A dry run" in gpu_report.report(data)


def time_kernels(p, **found):
    task = Task(dry_run=True, found={name: {"status": "ok", "result": result} for name, result in found.items()})
    return gpu_timing.time_kernels(task, "1M", "float32", p)


def test_every_contender_takes_part():
    """With a Triton dropout that the CPU can run; none is missing but where it is meant to be."""
    torch = pytest.importorskip("torch")
    found = {gpu_timing.COMPILE_WORKS: {}, gpu_timing.TRITON_CHOICE: {"float32": ["one_draw", 1024]}}

    def dropout(x, y, p, seed, choice):
        assert choice == ("one_draw", 1024)
        torch.mul(x, 1.0 / (1.0 - p), out=y)

    with mock.patch.object(gpu_timing, "triton_dropout", return_value=SimpleNamespace(dropout=dropout)):
        result, other = time_kernels(0.1, **found), time_kernels(0.5, **found)
    assert result["notes"] == {}
    assert list(other["notes"]) == ["torch.compile"]
    rows, n = result["rows"], result["elements"]
    for who in ("fastdrop", 'fastdrop, store="seed"', "native", "torch.compile", "triton"):
        assert set(rows[f"{who} forward+backward"]["ratios"]) == {"copy", "fastdrop forward+backward"}
    assert rows["copy"]["bytes"] == 8 * n
    assert rows["fastdrop forward"]["bytes"] == 8 * n + (n + 31) // 32 * 4
    assert rows["native forward"]["bytes"] == 9 * n
    assert rows["fastdrop forward+backward"]["bytes"] == 2 * rows["fastdrop forward"]["bytes"]


@pytest.mark.parametrize(("name", "step"), [("dropout_forward_at", "forward"), ("masked_affine_at", "backward")])
def test_kernels_are_not_timed_while_they_are_wrong(monkeypatch, name, step):
    pytest.importorskip("torch")
    right = getattr(gpu_device.AddressedReference, name)

    def wrong(*arguments):
        right(*arguments)
        gpu_device._words(arguments[4], 32)[:] ^= 1

    monkeypatch.setattr(gpu_device.AddressedReference, name, staticmethod(wrong))
    with pytest.raises(AssertionError, match=f"{step} is wrong"):
        time_kernels(0.1)


def test_a_contender_that_fails_is_missing_and_no_more():
    torch = pytest.importorskip("torch")
    with mock.patch.object(torch, "native_dropout", side_effect=RuntimeError("not today")):
        result = time_kernels(0.5)
    assert "not today" in result["notes"]["native forward"]
    assert "fastdrop forward" in result["rows"]
    assert "native forward" not in result["rows"]


def time_fused(name, **found):
    task = Task(dry_run=True, found={name: {"status": "ok", "result": result} for name, result in found.items()})
    return gpu_timing.time_fused(task, name, gpu_timing.FUSED_SIZES[0], "float32")


def test_every_contender_of_a_fused_function_takes_part():
    pytest.importorskip("torch")
    result = time_fused("dropout_add_layer_norm", **{gpu_timing.COMPILE_WORKS: {}})
    rows, n = result["rows"], result["elements"]
    assert result["notes"] == {}
    assert set(rows) == {
        "copy",
        *(f"{who} {what}" for who in ("fastdrop", "torch") for what in ("forward", "backward", "forward+backward")),
        *(f"torch.compile {what}" for what in ("forward", "forward+backward")),
    }
    assert all(set(row["ratios"]) == {"copy", "fastdrop forward+backward"} for row in rows.values())
    assert [rows[f"fastdrop {what}"]["bytes"] for what in ("forward", "backward")] == [16 * n + n // 8, 20 * n + n // 8]
    assert rows["fastdrop forward+backward"]["bytes"] == 36 * n + n // 4
    assert [who for who, row in rows.items() if "share" not in row] == [who for who in rows if who.startswith("torch")]
    assert list(time_fused("dropout_add")["notes"]) == ["torch.compile"]


@pytest.mark.parametrize(("part", "step"), [(0, "forward"), (-1, "backward")])
def test_fused_functions_are_not_timed_while_they_are_wrong(monkeypatch, part, step):
    pytest.importorskip("torch")
    from bench.torch import fused_cases

    monkeypatch.setattr(fused_cases, "results" if part == 0 else "gradients", wrong_at_first(fused_cases, step))
    with pytest.raises(AssertionError, match=f"{step} is wrong"):
        time_fused("swiglu_dropout")


def wrong_at_first(fused_cases, step):
    """The first call's outcome, which is the device's, is a hundredth off."""
    right, calls = getattr(fused_cases, "results" if step == "forward" else "gradients"), []

    def wrong(*arguments, **options):
        calls.append(None)
        found = right(*arguments, **options)
        return tuple(1.01 * each for each in found) if len(calls) == 2 - (step == "backward") else found

    return wrong


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

    monkeypatch.setattr(backends, "cuda", lambda: numba_cuda)
    monkeypatch.setattr(cuda_runtime, "place", lambda x: (0, 0))
    monkeypatch.setattr(cuda_runtime, "is_usable", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    for name, dtype in itertools.product(fused_cases.FUSED, gpu_timing.FUSED_DTYPES):
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
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_kernels_compile(dtype):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench.gpu import triton_dropout as gpu_triton

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
        row = dict.fromkeys(("seconds", "low", "high", "min", "max"), 1e-3) | {"rounds": 9, "bytes_per_second": 1e12}
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


def test_targets_at_their_limits():
    for figures, missed in (
        ((0.9, 0.9, 1.01), []),
        ((0.8999, 0.9, 1.0), ["forward", "forward+backward against native"]),
    ):
        judged = gpu_report.targets(run_of(kernels={"a": ok(kernel_result(*figures))}))
        assert [what for what, *_, met in judged if not met] == missed


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

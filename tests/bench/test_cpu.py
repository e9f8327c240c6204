"""The CPU benchmarks: the limit, what is timed, names of machines, reports and pictures from rows."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import fastdrop as fd
from bench import contenders, machine, pictures, report, run
from bench.contenders import LIMIT, TORCH_MUL, WAYS, Buffers
from bench.cpu import cases, report_sweep
from bench.cpu import report as report_dropout
from fastdrop.backends import c as native
from fastdrop.backends import memory

from ..cases import DTYPES
from .benchmark import Benchmark

needs_c = pytest.mark.skipif(native.unavailable() is not None, reason="the C extension is not built")


# ---- what is timed ----


def test_the_limit_is_the_fastest_way_with_its_own_ratio():
    peers = {way: {"seconds": 2.0, "ratio": 0.5} for way in WAYS} | {TORCH_MUL: {"seconds": 0.1, "ratio": 10.0}}
    peers["streaming"] = {"seconds": 1.0, "ratio": 0.9}
    assert contenders.with_limit(peers)[LIMIT] == {"seconds": 1.0, "ratio": 0.9, "way": "streaming"}
    peers["memcpy"] = {"seconds": 0.9, "ratio": 1.2}
    found = contenders.with_limit(peers)
    assert found[LIMIT]["way"] == "memcpy"
    assert found["streaming"] == peers["streaming"]
    only_torch = {TORCH_MUL: peers[TORCH_MUL]}
    assert contenders.with_limit(only_torch) == only_torch


@needs_c
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_way_passes_over_all_bytes_of_any_dtype(dtype):
    buffers = Buffers.of((3, 1 << 12), dtype.public)
    scale, isa, before = np.float32(1 / 0.9), native.isa(), memory.policy()
    for way, limit in contenders.scale_limits(buffers, 0.1).items():
        for call, source, target in ((limit.forward, buffers.x, buffers.y), (limit.backward, buffers.dy, buffers.dx)):
            target[...] = 0
            with limit.around():
                assert native.isa() == native.usable_isas()[-1]
                assert way != "interleaved" or memory.policy().pages > 1
                call()
            expected = source.view(np.float32) * (1 if way == "memcpy" else scale)
            np.testing.assert_array_equal(target.view(np.float32), expected)
        assert (native.isa(), memory.policy()) == (isa, before)
    with memory.use_policy(dataclasses.replace(before, pages=8, lines=16)), limit.around():
        assert (memory.policy().pages, memory.policy().lines) == (8, 16)  # the policy's own, where it has several


@needs_c
def test_c_has_as_many_threads_as_a_case_wherever_it_is_a_peer(monkeypatch):
    given = []
    set_threads = native.set_num_threads
    monkeypatch.setattr(native, "set_num_threads", lambda n: (given.append(n), set_threads(n)))
    before = fd.get_num_threads()
    with fd.use_backend("numpy"), contenders.threads(3, None):
        assert given[-1] == 3
    assert given[-1] == before


# ---- rows and reports, from cases of few elements ----

MACHINE = {
    "cpu_name": "Some CPU (family 1, model 2)", "caches": {"L1d": "32 KiB", "L3": "8 MiB"}, "cpu": {"count": 2},
    "system": "Linux", "python_version": "3.11", "fastdrop": "0.1.0", "memory_policy": "stream=5M (of a test)",
}  # fmt: skip
RUN = {"machine_info": MACHINE, "datetime": "2026-01-02T03:04:05"}


def rendered(module, rows, tmp_path):
    """The report's text; its picture is drawn too."""
    text = module.report(RUN, rows)
    module.plot(RUN, rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    for words in ("Some CPU (family 1, model 2)", "L1d 32 KiB, L3 8 MiB", "2026-01-02", "stream=5M (of a test)"):
        assert words in text
    return text


@pytest.fixture
def small(monkeypatch, pytestconfig):
    """The benchmarks of NumPy's functions, with few rounds."""
    pytestconfig.addinivalue_line("markers", "quick: bench/conftest.py has it")
    pytest.importorskip("ml_dtypes")
    modules = [importlib.import_module(f"bench.cpu.{name}") for name in ("test_dropout", "test_sweep")]
    monkeypatch.setattr(modules[0], "CASE_SECONDS", 0.0)
    monkeypatch.setattr(modules[1], "SECONDS", 0.0)
    monkeypatch.setattr(modules[1], "APART_SECONDS", 0.0)
    yield modules
    for module in modules:
        module.buffers.cache_clear()


@needs_c
def test_the_sweep_times_both_choices_and_says_which_one_the_policy_makes(small, tmp_path):
    _, sweep = small
    rows = []
    for operation, threads, stream in (("forward", 1, 4 << 18), ("backward", 2, 4 << 10)):
        forced = dataclasses.replace(memory.policy(), stream=stream)
        with memory.use_policy(forced):
            benchmark = Benchmark()
            sweep.test_sweep(1 << 16, operation, threads, benchmark)
            rows.append(benchmark.extra_info)
            assert memory.policy() == forced
    with memory.use_policy(forced):
        data = sweep.buffers(1 << 16)
        peers = sweep.peers_of(contenders.kernels(native, data, 0.1), data)
        for name, threshold in ((report_sweep.ALWAYS, 0), (report_sweep.NEVER, memory.NEVER)):
            with peers[name].around():
                assert memory.policy() == dataclasses.replace(forced, stream=threshold)
    assert [row["streams_from"] for row in rows] == [1 << 18, 1 << 10]
    assert {*WAYS, LIMIT, report_sweep.ALWAYS, report_sweep.NEVER} <= rows[0]["peers"].keys()
    assert rows[0]["peers"][LIMIT]["seconds"] == min(rows[0]["peers"][way]["seconds"] for way in WAYS)
    text = rendered(report_sweep, rows, tmp_path)
    assert [line.split(" | ")[2] for line in text.splitlines() if line.startswith("| 64k")] == [
        report_sweep.NEVER,
        report_sweep.ALWAYS,
    ]
    assert "Not measured: 128k" in text


def sweep_row(size, always, never):
    """A row whose policy streams; the choices' seconds are relative to fastdrop's."""
    seconds = {report_sweep.ALWAYS: always, report_sweep.NEVER: never}
    peers = {name: {"seconds": its, "ratio": 1 / its} for name, its in seconds.items()}
    return {"operation": "forward", "threads": 1, "elements": size, "streams_from": 0, "seconds": 1.0, "peers": peers}


def test_the_sweep_judges_a_choice_by_the_better_one_from_1m_on():
    rows = [sweep_row(1 << 19, 1.0, 0.1), sweep_row(1 << 20, 1.0, 0.95), sweep_row(1 << 21, 1.0, 0.8)]
    text = report_sweep.report(RUN, [*rows, sweep_row(1 << 22, 1.0, 2.0)]).split(report_sweep.DETAILS)[0]
    assert [line for line in text.splitlines() if line.startswith("| forward")] == [
        "| forward, 1 thread | never streaming | 2M | 1.1 | 1.25 | **missed** |",
        "| forward, 1 thread | never streaming | 1M | 1.1 | 1.05 | met |",
        "| forward, 1 thread | always streaming | 4M | 1.1 | 1.00 | met |",
    ]


def test_the_sweep_skips_a_size_that_does_not_fit(small, monkeypatch):
    _, sweep = small
    monkeypatch.setattr(machine, "free_memory", lambda: 2 * 4 * 4 * (1 << 16) - 1)
    with pytest.raises(pytest.skip.Exception, match="half"):
        sweep.test_sweep(1 << 16, "forward", 1, Benchmark())


@needs_c
def test_a_case_runs_beside_the_limits_and_its_report_names_the_way(small, tmp_path, monkeypatch):
    dropout, _ = small
    monkeypatch.setattr(dropout, "DRAW_SECONDS", 0.0)
    rows = []
    for case in (
        cases.Case("forward", cases.best(), "float32", 1 << 16, 0.1, 1),
        cases.Case("backward", cases.best(), "bfloat16", 1 << 16, 0.1, 2),
        cases.Case("forward", cases.best(), "float32", 1 << 16, 0.5, 1),
    ):
        benchmark = Benchmark()
        with contenders.threads(case.threads, dropout.torch):
            dropout.test_dropout(case, None, benchmark)
        rows.append(benchmark.extra_info)
    assert [LIMIT in row["peers"] for row in rows] == [True, True, False]
    for layout in cases.ROWS:
        benchmark = Benchmark()
        dropout.test_draw_rows(layout, benchmark)
        rows.append(benchmark.extra_info)
    way = rows[0]["peers"][LIMIT]["way"]
    text = rendered(report_dropout, [*rows, whole_call()], tmp_path)
    name = f"| forward {cases.best()} float32 64k p=0.1 |"
    assert [line.endswith(f"| {way} |") for line in text.splitlines() if line.startswith(name)] == [True]
    for layout, limit in report_dropout.DRAW_ROWS.items():
        assert f"| C {layout} of a shard of 8 | draw_bits | 1M | {limit}x | " in text


def whole_call():
    case = dataclasses.replace(cases.Case("whole call", cases.best(), "float32", 1000, 0.1, 1, "call"))
    return {**case.as_dict(), "bytes_per_element": 8, "seconds": 1e-6, "peers": {}}


@needs_c
def test_quick_measures_every_target_of_its_report():
    """Each target finds exactly one of the cases of the quick set, as a kernel; all of them are missed here."""
    wanted = [row for row in report_dropout.TARGETS if row[3][1] in ("best", "seed", *cases.variants())]
    rows = [whole_call()]
    assert {*cases.quick_cases()} <= {*cases.every_case()}
    for case in cases.quick_cases():
        peers = {peer: {"seconds": 1.0, "ratio": 100.0} for peer in report_dropout.PEER_COLUMNS}
        rows.append({**case.as_dict(), "bytes_per_element": 8, "seconds": 1.0, "peers": peers})
    judged = report_dropout.targets(rows, "kernel")
    assert len(judged) == sum(len(row[2]) for row in wanted) + 1
    text = report_dropout.report(RUN, rows)
    assert "| C backward, 2 threads | limit | 64M | 1.15x | 100.00x | **missed** |" in text
    assert "| bfloat16 backward | torch.mul | 16M | 0.85x | 100.00x | **missed** |" in text


def torch_row(kind, operation, layout, threads, ratio, *peers):
    found = {peer: {"seconds": 1.0, "ratio": ratio} for peer in peers}
    return {
        "kind": kind, "operation": operation, "layout": layout, "threads": threads, "seconds": 1e-3, "elements": 1000,
        "peers": found,
    }  # fmt: skip


def test_report_of_attention_judges_by_length_and_kind(tmp_path):
    report = importlib.import_module("bench.torch.report_attention")
    peers = (report.P_ZERO, report.DROPPED)

    def row(kind, operation, length, masked="", dtype="", asked=peers):
        case = {"length": length, "masked": masked, "dtype": dtype}
        return torch_row(kind, operation, f"1 x 8 x {length} x 64", 1, 1.1, *asked) | case

    rows = [
        row("attention", "forward", 1024),
        row("attention", "forward+backward", 512),
        row("attention", "forward+backward", 1024, "causal"),
        row("attention", "forward+backward", 1024, dtype="bfloat16"),
        row("small attention, enabled", "forward+backward", 16, asked=(report.DROPPED,)),
        row("peak memory", "forward+backward", 4096, asked=(report.MEMORY, report.DROPPED)),
        row("training step, fuse", "TransformerEncoder, 2,048 tokens", 2048, asked=(report.P_ZERO,)),
    ]
    asked = [report.limits(row, peer) for row in rows for peer in row["peers"]]
    assert asked == [(1.2,), (0.3,), (), (1.0,), (1.3,), (0.3,), (1.4,), (0.3,), (1.05,), (1.0,), (), (1.1,)]
    text = rendered(report.SUITE, rows, tmp_path).split("## Every case")[0]
    assert text.count("**missed**") == 6
    run = {"machine_info": {"cpu_name": "a CPU"}}
    report.plot(run, rows, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 0


def test_report_of_saving_judges_kinds_at_their_rates(tmp_path):
    report = importlib.import_module("bench.torch.report_saving")
    peers = (report.P_ZERO, report.MASKED, report.KEPT)
    rows = [
        torch_row("skipped residual branches", "step", "p = 0.4", 1, 0.7, *peers),
        torch_row("skipped residual branches", "step", "p = 0.3", 1, 0.7, *peers),
        torch_row("LoRA", "step", "p = 0.1", 1, 0.7, report.P_ZERO, report.TORCH_DROPPED, report.INPUT),
        torch_row("shared recurrent mask, GRU", "step", "512 wide", 1, 0.7, report.FUSED),
        torch_row("batchwise", "step", "batch 64, p = 0.5", 2, 0.7, report.P_ZERO),
    ]
    asked = [report.limits(row, peer) for row in rows for peer in row["peers"]]
    assert asked == [(0.65,), (), (0.65,), (), (), (), (1.08,), (), (1.1,), (), (0.8,)]
    assert rendered(report.SUITE, rows, tmp_path).split("## Every case")[0].count("**missed**") == 2


def test_reports_of_torch_render_and_judge_single_cases(tmp_path):
    fused = importlib.import_module("bench.torch.report_fused")
    family = importlib.import_module("bench.torch.report_family")
    peers = (fused.LAYER_NORM, fused.ADD_AND_NORM)
    rows = [
        torch_row("dropout_add_layer_norm", "forward", "8192 x 1024", 1, 0.8, *peers),
        torch_row("dropout_add_layer_norm", "forward, fresh memory", "8192 x 1024", 1, 0.8, *peers),
        torch_row("dropout_add_layer_norm", "forward", "2048 x 2048", 1, 0.8, *peers),
        torch_row("bias_act_dropout gelu", "forward", "2048 x 2048", 2, 0.85, fused.GELU),
        torch_row("bias_act_dropout gelu", "forward", "2048 x 2048", 1, 0.85, fused.GELU),
    ]
    asked = [fused.limits(row, peer) for row in rows for peer in row["peers"]]
    assert asked == [(1.2,), (0.75,), (1.2,), (), (1.2,), (), (0.8, 0.9), (0.8,)]
    text = rendered(fused.SUITE, rows, tmp_path)
    assert f"8192 x 1024, 1 thread | {fused.ADD_AND_NORM} | at most 0.75 | 0.80 | **missed** |" in text
    assert "2048 x 2048, 2 threads | F.gelu | at most 0.9 | 0.85 | met |" in text
    rows = [torch_row("alpha", "forward", "1M", 1, 1.2, "fd.dropout", "other")]
    text = rendered(family.SUITE, rows, tmp_path).split("## Every case")[0]
    assert text.count("**missed**") == 1


def test_a_picture_has_the_worst_layout_of_a_line_and_1_in_view(monkeypatch, tmp_path):
    fused, drawn = importlib.import_module("bench.torch.report_fused"), []
    monkeypatch.setattr(report, "draw_ratios", lambda *arguments: drawn.append(arguments))
    kind = "bias_act_dropout gelu"
    rows = [
        torch_row(kind, "forward", "2048 x 2048", 1, 0.7, fused.GELU),
        torch_row(kind, "forward", "2048 x 2048", 2, 0.95, fused.GELU),
        torch_row(kind, "forward", "8192 x 1024", 1, 0.9, fused.GELU),
    ]
    fused.SUITE.plot(RUN, rows, tmp_path / "fused.png")
    (groups, *_rest) = drawn[0]
    assert [heading for heading, _ in groups] == ["forward"]
    ((label, points),) = groups[0][1]
    assert label == f"{kind}  /  {fused.GELU}"
    assert {n: (point.ratio, point.verdict) for n, point in points.items()} == {
        1: (0.7, "target met"),
        2: (0.95, "target missed"),
    }
    _, axis = pictures.pyplot().subplots()
    for ratios in ([0.02, 0.1], [3.0, 9.0]):
        pictures.ratio_axis(axis, ratios)
        low, high = axis.get_xlim()
        assert low < min(*ratios, 1) <= max(*ratios, 1) < high
        assert {1.0} <= {*axis.get_xticks()}
    pictures.pyplot().close()


# ---- machines ----

CPUS = {
    "amd-epyc-25-1": "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n",
    "amd-epyc-9r45-26-2": "cpu family: 26\nmodel: 2\nmodel name: AMD EPYC 9R45 64-Core Processor\n\nmodel name: other",
    "intel-xeon-platinum-8488c-6-143": "cpu family: 6\nmodel: 143\nmodel name: Intel(R) Xeon(R) Platinum 8488C\n",
    "intel-xeon-6-85": "cpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Intel(R) Xeon(R) CPU @ 2.00GHz\n",
    "aarch64-0x41-0xd40": "processor\t: 0\nBogoMIPS\t: 2100.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n",
    "aarch64": "",
}


@pytest.mark.parametrize("kind", CPUS)
def test_a_kind_of_machine_is_a_name_of_a_folder(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(CPUS[kind])
    assert machine.kind(tmp_path) == kind
    assert machine.cpu_name(tmp_path)


def test_a_system_without_files_has_a_name_too(tmp_path, monkeypatch):
    for name in ("machine", "processor"):
        monkeypatch.setattr(machine.platform, name, lambda: "")
    assert (machine.kind(tmp_path), machine.cpu_name(tmp_path)) == ("unknown", "unknown CPU")
    assert (machine.caches(tmp_path), machine.free_memory(tmp_path)) == ({}, None)


def test_caches_and_free_memory_are_read_from_the_system(tmp_path):
    levels = [("3", "Unified", "32768K"), ("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1280K")]
    for i, texts in enumerate(levels):
        index = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{i}"
        index.mkdir(parents=True)
        for name, text in zip(("level", "type", "size"), texts, strict=True):
            (index / name).write_text(f"{text}\n")
    (tmp_path / "sys/devices/system/cpu/cpu0/cache/index9").mkdir()  # says nothing
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   12 kB\n")
    assert list(machine.caches(tmp_path).items()) == [("L1d", "48 KiB"), ("L2", "1280 KiB"), ("L3", "32 MiB")]
    assert machine.free_memory(tmp_path) == 12 << 10


def test_results_go_to_the_folder_of_the_machine(tmp_path, monkeypatch):
    commands, done = [], SimpleNamespace(returncode=0)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "kind", lambda: "some-cpu-1-2")
    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: commands.append(command) or done)
    monkeypatch.setattr(sys, "argv", ["run", "--sweep"])
    assert run.main() == 0
    results = tmp_path / "some-cpu-1-2/sweep.json"
    assert results.parent.is_dir()
    assert commands[0][commands[0].index("--benchmark-json") + 1] == str(results)
    assert commands[0][3] == "bench/cpu/test_sweep.py"
    assert commands[1][1:] == ["-m", "bench.cpu.report_sweep", str(results)]
    monkeypatch.setattr(sys, "argv", ["run", "--report"])
    assert run.main() == 1  # there is nothing
    (tmp_path / "other-cpu").mkdir()
    for path in (results, tmp_path / "other-cpu/torch.json"):
        path.touch()
    assert run.main() == 0
    assert [command[3] for command in commands[2:]] == [str(results), str(tmp_path / "other-cpu/torch.json")]

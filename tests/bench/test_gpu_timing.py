"""What the GPU benchmark times, and how: its figures, its races, and every section on tensors of the CPU."""

from __future__ import annotations

from unittest import mock

import pytest

from bench.gpu import __main__ as gpu
from bench.gpu import device as gpu_device
from bench.gpu import processes, races, timing
from bench.gpu import report as gpu_report
from bench.gpu.processes import Task
from bench.gpu.races import Contender

# ---- figures ----


@pytest.mark.parametrize(
    ("elements", "itemsize", "passes", "mask_bits", "expected"),
    [(1 << 28, 4, 1, 0, 2 * 4 << 28), (1 << 28, 2, 1, 1, (4 << 28) + (1 << 25)), (33, 4, 1, 1, 264 + 8)],
)
def test_bytes_moved(elements, itemsize, passes, mask_bits, expected):
    assert races.moved(elements, itemsize, passes, mask_bits) == expected


@pytest.mark.parametrize("elements", [1, 1000, 5000, 100_000])
def test_buffers_in_rotation_exceed_the_cache(elements):
    pytest.importorskip("torch")
    machine = gpu_device.Host()
    buffers = races.rotation(machine, elements, "float32")
    total = sum(x.numel() * x.element_size() for x in buffers)
    assert total >= races.L2_TURNS * machine.l2_bytes
    assert len(buffers) == 2 or total - 4 * elements < races.L2_TURNS * machine.l2_bytes
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
    rows = races.race(clock, contenders, 0.0, "copy", "absent")
    assert rows["copy"]["seconds"] == pytest.approx(1e-4)
    assert rows["ours"]["seconds"] == pytest.approx(2e-4)
    assert rows["copy"]["bytes_per_second"] == pytest.approx(1e7)
    assert rows["ours"]["share"] == pytest.approx(0.75)  # 1.5 times the bytes in twice the time
    assert rows["unknown"]["ratios"] == {"copy": pytest.approx(20.0)}
    assert "share" not in rows["unknown"]
    assert clock.log.count("copy") >= races.MIN_ROUNDS * 3  # as many as last for a sample
    assert all(row["rounds"] == races.MIN_ROUNDS for row in rows.values())


def test_ratios_are_taken_within_a_round():
    samples = {"a": [1.0, 20.0, 300.0], "b": [2.0, 10.0, 100.0]}
    contenders = [Contender(name, int) for name in samples]
    row = races.row(contenders[0], samples, contenders, ["b"])
    assert row["ratios"] == {"b": 2.0}
    assert row["low"] < row["seconds"] == 20.0 < row["high"]


def test_race_never_waits_within_a_round_and_fills_the_queue_first():
    clock = Clock()
    names = ("copy", "a", "b")
    contenders = [Contender(name, clock.work(name, 2e-3)) for name in names]
    races.race(clock, contenders, 0.0)
    rounds = "".join(f"{entry}," for entry in clock.log).split("synchronize,")[len(names) : -1]
    assert len(rounds) == races.MIN_ROUNDS
    orders = set()
    for line in rounds:
        first, *rest = line.strip(",").split(",")
        assert first == rest[-1]  # not timed
        assert sorted(rest) == sorted(names)
        orders.add(tuple(rest))
    assert len(orders) > 1


def test_race_on_host_waits_before_each_sample():
    clock = Clock()
    rows = races.race_on_host(clock, {name: clock.work(name, 0) for name in "ab"}, 0.0, "a")
    warm_up, *batches = "".join(f"{entry}," for entry in clock.log).split("synchronize,")[:-1]
    assert warm_up in ("a,", "b,")
    assert len(batches) == 2 * races.MIN_ROUNDS
    assert {batch.count(",") for batch in batches[:-1]} == {clock.host_calls + 1}  # the next one's warm-up is there
    assert rows["b"]["ratios"]["a"] > 0


# ---- every section, on the CPU ----


@pytest.mark.parametrize("name", [name for name in gpu.SECTIONS if name not in ("suite", "build")])
def test_section_runs_dry(name, tmp_path):
    pytest.importorskip("torch")
    items = gpu.SECTIONS[name].items(True)
    if name == "fused":  # a type is enough here
        items = {what: item for what, item in items.items() if "float32" not in what}
        assert len(items) == 1 + len(FUSED)
    assert processes.run_items(items, tmp_path / "rows", Task(dry_run=True))
    rows = processes.rows(tmp_path / "rows")
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    section = {"title": name, "status": "ok", "seconds": 0.0, "items": rows}
    data = {"options": {"dry_run": True, "quick": False}, "started": "2026-01-01T00:00", "sections": {name: section}}
    assert "A dry run" in gpu_report.report(data)


def time_kernels(p, **found):
    task = Task(dry_run=True, found={name: {"status": "ok", "result": result} for name, result in found.items()})
    return timing.time_kernels(task, "1M", "float32", p)


def test_every_contender_takes_part():
    """With a Triton dropout that the CPU can run; none is missing but where it is meant to be."""
    torch = pytest.importorskip("torch")
    found = {timing.COMPILE_WORKS: {}}

    def dropout(x, y, p, seed):
        torch.mul(x, 1.0 / (1.0 - p), out=y)[: int(p * len(x))] = 0

    with mock.patch.object(timing, "triton_dropout", return_value=dropout):
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
        gpu_device.memory_words(arguments[4], 32)[:] ^= 1

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
    return timing.time_fused(task, name, timing.FUSED_SIZES[0], "float32")


def test_every_contender_of_a_fused_function_takes_part():
    pytest.importorskip("torch")
    result = time_fused("dropout_add_layer_norm", **{timing.COMPILE_WORKS: {}})
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

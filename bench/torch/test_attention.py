"""Times attention with dropout beside torch's own, with dropout and without, and measures the memory of a step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from .. import memory
from ..pairing import SETTLE_SECONDS, alternate
from .report_attention import DROPPED, MEMORY, P_ZERO, SPARE_BYTES

torch = pytest.importorskip("torch", reason="torch is not installed")
fdt = pytest.importorskip("fastdrop.torch")
models = pytest.importorskip("bench.torch.models")
peak = pytest.importorskip("bench.torch.peak_memory")
F = torch.nn.functional

SECONDS, STEP_SECONDS = 3.0, 15.0
P = 0.1
LONGEST_DROPPED = 2048  # torch's with dropout takes seconds and gigabytes for more


class Case(NamedTuple):
    """Extents of a self-attention, and what is masked."""

    batch: int
    heads: int
    length: int
    width: int = 64
    masked: str = ""
    dtype: str = ""

    @property
    def layout(self) -> str:
        extents = " x ".join(map(str, self[:4]))
        return ", ".join(part for part in (extents, self.masked, self.dtype) if part)

    def tensors(self) -> tuple[tuple[Any, ...], Any, dict[str, Any]]:
        """Query, key and value; dy; options."""
        torch.manual_seed(0)
        dtype = getattr(torch, self.dtype or "float32")
        query, key, value, dy = (torch.randn(self[:4], dtype=dtype) for _ in range(4))
        options: dict[str, Any] = {"is_causal": self.masked == "causal"}
        if self.masked == "padded":
            options["attn_mask"] = (torch.arange(self.length) < self.length * 7 // 8).view(1, 1, 1, -1)
        return tuple(x.requires_grad_() for x in (query, key, value)), dy, options


LONG = [(1, 8, 512), (1, 8, 1024), (1, 8, 2048), (1, 2, 4096), (1, 2, 8192)]
CASES = [
    *(Case(*extents, masked=masked) for extents in LONG for masked in ("", "causal")),
    Case(8, 4, 128),
    Case(8, 4, 128, masked="causal"),
    Case(1, 8, 1024, masked="padded"),
    Case(1, 8, 1024, dtype="bfloat16"),
    Case(1, 8, 2048, dtype="bfloat16"),
]
SMALL = [Case(1, 1, 16), Case(1, 2, 96), Case(2, 4, 32), Case(8, 4, 64), Case(1, 2, 160)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layout)
@pytest.mark.parametrize("operation", ["forward", "forward+backward"])
def test_attention(operation: str, case: Case, threads: int, benchmark: Any) -> None:
    """Against torch's without dropout and, up to a length, with it."""
    inputs, dy, options = case.tensors()
    rates = {P_ZERO: 0.0}
    if operation == "forward+backward" and case.length <= LONGEST_DROPPED and not case.dtype:
        rates[DROPPED] = P
    calls = {
        name: call(operation, F.scaled_dot_product_attention, inputs, dy, dropout_p=p, **options)
        for name, p in rates.items()
    }
    ours = call(operation, fdt.scaled_dot_product_attention, inputs, dy, dropout_p=P, **options)
    compare(benchmark, threads, ours, calls, kind="attention", operation=operation, case=case)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.layout)
def test_small_attention_while_enabled(case: Case, threads: int, benchmark: Any) -> None:
    """`enable` takes the faster way, whatever the size: torch's function with dropout, while enabled and not."""
    inputs, dy, options = case.tensors()
    step = call("forward+backward", F.scaled_dot_product_attention, inputs, dy, dropout_p=P, **options)
    compare(
        benchmark, threads, step, {DROPPED: step}, kind="small attention, enabled", operation="forward+backward",
        case=case, around={"": fdt.enabled},
    )  # fmt: skip


def compare(
    benchmark: Any, threads: int, ours: Any, peers: dict[str, Any], *, case: Case, around: Any = None, **info: Any
) -> None:
    elements = case.batch * case.heads * case.length**2
    benchmark.extra_info.update(
        threads=threads, layout=case.layout, length=case.length, elements=elements, masked=case.masked,
        dtype=case.dtype, **info,
    )  # fmt: skip
    with memory.results("reused"):
        alternate(benchmark, ours, peers, SECONDS, SETTLE_SECONDS if threads > 1 else 0.0, around)


def call(operation: str, attention: Callable[..., Any], inputs: Any, dy: Any, **options: Any) -> Callable[[], object]:
    if operation == "forward":
        inputs = tuple(x.detach() for x in inputs)
        return lambda: attention(*inputs, **options)
    return lambda: torch.autograd.grad(attention(*inputs, **options), inputs, dy)


@pytest.mark.parametrize("length", [4096, 8192])
@pytest.mark.parametrize("masked", ["", "causal"])
def test_peak_memory(masked: str, length: int, benchmark: Any) -> None:
    """What a step adds to a process of its own, beside the inputs. The table's time is that of fastdrop's process."""
    case = Case(1, 8, length, masked=masked)

    def measure(name: str, p: float) -> int:
        arguments = json.dumps({"ours": not name, "p": p, "extents": case[:4], "causal": masked == "causal"})
        command = [sys.executable, "-m", peak.__name__, arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    peers = {MEMORY: 0.0, **({DROPPED: P} if length == 4096 and not masked else {})}
    found = {"": benchmark.pedantic(lambda: measure("", P), rounds=1)}
    found |= {name: measure(name, p) for name, p in peers.items()}
    ours, plain = found.pop(""), found[MEMORY]
    found[MEMORY] += SPARE_BYTES
    benchmark.extra_info.update(
        kind="peak memory", operation="forward+backward", layout=case.layout, threads=1, seconds=0.0,
        bytes=ours, bytes_at_p_zero=plain,
        peers={name: {"ratio": ours / taken, "bytes": taken} for name, taken in found.items()},
    )  # fmt: skip


@pytest.mark.parametrize("name", models.ATTENTIVE)
def test_training_step(name: str, threads: int, benchmark: Any) -> None:
    """At p = 0.1, changed by fastdrop, against torch's own at p = 0."""
    change, around = models.ATTENTIVE[name][1], {}
    if change == "enable":
        around[""] = fdt.enabled
    benchmark.extra_info.update(kind=f"training step, {change}", operation=name, layout="p = 0.1", threads=threads)
    with memory.results("reused"):
        ours = models.training_step(name, P, fdt.fuse if change == "fuse" else None)
        alternate(benchmark, ours, {P_ZERO: models.training_step(name, 0.0)}, STEP_SECONDS, around=around)

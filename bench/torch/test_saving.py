"""Times dropout that computes or keeps less than its network does without dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from .. import contenders, memory
from ..pairing import SETTLE_SECONDS, alternate
from .report_saving import FUSED, INPUT, KEPT, MASKED, P_ZERO, TORCH_DROPPED

torch = pytest.importorskip("torch", reason="torch is not installed")
fdt = pytest.importorskip("fastdrop.torch")
models = pytest.importorskip("bench.torch.models")
networks = pytest.importorskip("bench.torch.saving_models")
nn = torch.nn

SECONDS, ENCODER_SECONDS = 8.0, 28.0  # a step of the encoder takes most of a second, and varies with what is kept
P = 0.1
LINEAR_RATES = tuple(0.4 * i / (networks.BLOCKS - 1) for i in range(networks.BLOCKS))


def compare(
    benchmark: Any,
    threads: int,
    ours: Callable[[], Any],
    peers: dict[str, Callable[[], Any]],
    seconds: float = SECONDS,
    **case: Any,
) -> None:
    """Each network is built, then stepped."""
    benchmark.extra_info.update(threads=threads, operation="step", **case)
    with memory.results("reused"):
        steps = {name: models.step(*build()) for name, build in {"": ours, **peers}.items()}
        alternate(benchmark, steps.pop(""), steps, seconds, SETTLE_SECONDS if threads > 1 else 0.0)


def add_bytes(benchmark: Any, name: str, kept: int, of: int) -> None:
    benchmark.extra_info["peers"][name] = {"ratio": kept / of, "bytes": of}


RATES = {f"p = {p}": (p,) * networks.BLOCKS for p in (0.05, 0.1, 0.2, 0.3, 0.4)} | {"p = 0 to 0.4": LINEAR_RATES}

BESIDE_MASKED = ("p = 0.4", "p = 0 to 0.4")


@pytest.mark.parametrize("layout", RATES)
def test_skipped_branches(layout: str, threads: int, benchmark: Any) -> None:
    rates, none = RATES[layout], (0.0,) * networks.BLOCKS
    ours, plain, masked = (
        partial(networks.encoder, *options)
        for options in ((rates, fdt.SkipResidual), (none, networks.Masked), (rates, networks.Masked))
    )
    peers = {P_ZERO: plain} | ({MASKED: masked} if layout in BESIDE_MASKED else {})
    compare(benchmark, threads, ours, peers, ENCODER_SECONDS, kind="skipped residual branches", layout=layout)
    if threads == 1:  # bytes don't depend on them; kept samples are drawn, so several draws are averaged
        draws = 8
        kept = sum(models.bytes_kept_by(*ours()) for _ in range(draws)) // draws
        add_bytes(benchmark, KEPT, kept, models.bytes_kept_by(*plain()))


def test_lora(threads: int, benchmark: Any) -> None:
    ours, plain, dropped = (
        partial(networks.lora, drop, p) for drop, p in ((None, P), (nn.Identity, 0.0), (partial(nn.Dropout, P), P))
    )
    compare(benchmark, threads, ours, {P_ZERO: plain, TORCH_DROPPED: dropped}, kind="LoRA", layout=f"p = {P}")
    if threads == 1:
        add_bytes(benchmark, INPUT, models.bytes_kept_by(*ours()), 4 * networks.LORA_TOKENS * networks.LORA_WIDTH)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per sequence"])
@pytest.mark.parametrize("hidden", [256, 512])
@pytest.mark.parametrize("layer", ["LSTM", "GRU"])
def test_recurrent(layer: str, hidden: int, shared: bool, threads: int, benchmark: Any) -> None:
    kind = ("shared recurrent mask" if shared else "recurrent mask per sequence") + ", GRU" * (layer == "GRU")
    build = getattr(fdt, f"Variational{layer}")
    compare(
        benchmark, threads, partial(networks.recurrent, build, hidden, dropout_recurrent=0.3, shared=shared),
        {FUSED: partial(networks.recurrent, getattr(nn, layer), hidden)}, kind=kind, layout=f"{hidden} wide",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "p"), [(256, 0.5), (256, 0.3), (256, 0.2), (256, 0.1), (64, 0.5)], ids=contenders.p_id
)
def test_batchwise(batch: int, p: float, threads: int, benchmark: Any) -> None:
    def ours() -> Any:
        model, loss = networks.perceptron(batch, partial(fdt.BatchwiseDropout, p))
        assert fdt.fuse(model).changed
        return model, loss

    peers = {P_ZERO: nn.Identity, TORCH_DROPPED: partial(nn.Dropout, p)}
    compare(
        benchmark, threads, ours, {name: partial(networks.perceptron, batch, drop) for name, drop in peers.items()},
        kind="batchwise", layout=f"batch {batch}, p = {p}",
    )  # fmt: skip

"""Times what masks for any number of processes cost in each of them: calls of DTensors, and named masks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .. import memory
from ..pairing import SETTLE_SECONDS, alternate
from .report_parallel import TORCH_MUL, UNNAMED

torch = pytest.importorskip("torch", reason="torch is not installed")
fdt = pytest.importorskip("fastdrop.torch")
models = pytest.importorskip("bench.torch.models")
dist = torch.distributed
tensors = pytest.importorskip("torch.distributed.tensor")

CALL_SECONDS, STEP_SECONDS = 5.0, 60.0  # names cost less than a step varies
ELEMENTS, P = 1 << 16, 0.1


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """Of this process alone: nothing is sent."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def compare(benchmark: Any, threads: int, peers: dict[str, Callable[[], Any]], seconds: float, **case: Any) -> None:
    benchmark.extra_info.update(threads=threads, **case)
    with memory.results("reused"):
        alternate(benchmark, peers.pop(""), peers, seconds, SETTLE_SECONDS if threads > 1 else 0.0)


@pytest.mark.parametrize("operation", ["forward", "forward, recorded", "forward+backward"])
def test_dtensor(operation: str, threads: int, mesh: Any, benchmark: Any) -> None:
    x = tensors.distribute_tensor(torch.randn(64, ELEMENTS // 64), mesh, [tensors.Shard(0)])
    dy, scale = x.clone(), 1 / (1 - P)
    x.requires_grad_(operation != "forward")
    calls = {"": lambda: fdt.dropout(x, P), TORCH_MUL: lambda: x.mul(scale)}
    if operation == "forward+backward":
        calls = {name: lambda call=call: torch.autograd.grad(call(), x, dy) for name, call in calls.items()}
    compare(
        benchmark, threads, calls, CALL_SECONDS, kind="DTensor", operation=operation, layout="64k elements",
        elements=ELEMENTS,
    )  # fmt: skip


def named(model: Any, loss: Any) -> tuple[Any, Any]:
    """A network whose masks have names, and its loss at the next step."""
    masks, steps = fdt.name_masks(model), itertools.count()

    def named_loss(model: Any) -> Any:
        with masks.at(next(steps), range(models.BATCH)):
            return loss(model)

    return model, named_loss


def test_named_masks(threads: int, benchmark: Any) -> None:
    with fdt.enabled():
        steps = {"": models.step(*named(*models.encoder(P))), UNNAMED: models.step(*models.encoder(P))}
        compare(
            benchmark, threads, steps, STEP_SECONDS, kind="named masks", operation="step",
            layout="TransformerEncoder, 8 x 128 tokens",
        )  # fmt: skip

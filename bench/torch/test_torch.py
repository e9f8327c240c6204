"""Times torch's dropout and ours in turn: the function alone, and training steps beside those at p = 0."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from .. import contenders
from ..pairing import SETTLE_SECONDS, alternate
from .report_torch import ELEMENTS, P_ZERO, SEED

torch = pytest.importorskip("torch", reason="torch is not installed")
fdt = pytest.importorskip("fastdrop.torch")
models = pytest.importorskip("bench.torch.models")

OPERATIONS = ("no grad", "forward+backward")
FUNCTION_SECONDS, STEP_SECONDS = 3.0, 15.0


@pytest.mark.parametrize(
    ("size", "dtype", "p"),
    [*itertools.product(ELEMENTS, ("float32", "bfloat16"), (0.1, 0.5))],
    ids=contenders.p_id,
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_function(operation: str, size: str, dtype: str, p: float, threads: int, benchmark: Any) -> None:
    x, dy = tensors(ELEMENTS[size], dtype)
    ours, theirs = call_of(fdt.dropout, operation, x, dy, p), call_of(torch.nn.functional.dropout, operation, x, dy, p)
    seed = call_of(lambda x, p: fdt.dropout(x, p, store="seed"), operation, x, dy, p)
    benchmark.extra_info.update(kind="function", operation=operation, size=size, dtype=dtype, p=p, threads=threads)
    if operation != "no grad":
        benchmark.extra_info["kept"] = {
            "fastdrop": kept(fdt.dropout, x, p),
            SEED: kept(lambda x, p: fdt.dropout(x, p, store="seed"), x, p),
            contenders.F_DROPOUT: kept(torch.nn.functional.dropout, x, p),
        }
    peers = {contenders.F_DROPOUT: theirs}
    if operation != "no grad":
        peers[SEED] = seed
    alternate(benchmark, ours, peers, FUNCTION_SECONDS, SETTLE_SECONDS if threads > 1 else 0.0)


@pytest.mark.parametrize("name", models.MODELS)
def test_training_step(name: str, threads: int, benchmark: Any) -> None:
    if name in ("BERT", "GPT-2"):
        pytest.importorskip("transformers")
    p = models.MODELS[name][1]
    peers = {contenders.F_DROPOUT: models.training_step(name, p), P_ZERO: models.training_step(name, 0.0)}
    benchmark.extra_info.update(kind="training step", operation=name, p=p, threads=threads)
    alternate(benchmark, models.training_step(name, p), peers, STEP_SECONDS, around={"": fdt.enabled})


@lru_cache(maxsize=1)
def tensors(size: int, dtype: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return tuple(torch.randn(size).to(getattr(torch, dtype)) for _ in range(2))


def call_of(dropout: Callable[..., Any], operation: str, x: Any, dy: Any, p: float) -> Callable[[], object]:
    if operation == "no grad":
        return lambda: dropout(x, p)
    leaf, grad = x.detach().requires_grad_(), torch.autograd.grad
    return lambda: grad(dropout(leaf, p), leaf, dy)


def kept(dropout: Callable[..., Any], x: Any, p: float) -> int:
    """Bytes that autograd keeps for backward."""
    sizes = []

    def pack(saved: Any) -> Any:
        sizes.append(saved.untyped_storage().nbytes())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        dropout(x.detach().requires_grad_(), p)
    return sum(sizes)

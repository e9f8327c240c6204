"""Times dropout fused with the operations around it, beside the separate passes that it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from .. import memory
from ..pairing import SETTLE_SECONDS, alternate
from .report_fused import ADD, ADD_AND_NORM, COMPILED, GELU, KEPT, LAYER_NORM, MUL, P_ZERO, SOFTMAX

torch = pytest.importorskip("torch", reason="torch is not installed")
fdt = pytest.importorskip("fastdrop.torch")
models = pytest.importorskip("bench.torch.models")
cases = pytest.importorskip("bench.torch.fused_cases")
F = torch.nn.functional

SECONDS, STEP_SECONDS = 3.0, 15.0
P = 0.1
SCALE = 1.25
SHAPES = {"2048 x 2048": (2048, 2048), "8192 x 1024": (8192, 1024)}


shapes = pytest.mark.parametrize("shape", SHAPES)
results = pytest.mark.parametrize("results", memory.KINDS)


def compare(
    benchmark: Any, threads: int, ours: Any, peers: dict[str, Any], shape: str, results: str = "reused", **case: Any
) -> None:
    case["operation"] += ", fresh memory" * (results == "fresh")
    benchmark.extra_info.update(threads=threads, layout=shape, elements=math.prod(SHAPES[shape]), **case)
    with memory.results(results):
        alternate(benchmark, ours, peers, SECONDS, SETTLE_SECONDS if threads > 1 else 0.0)
        benchmark.extra_info["faults"] = {name: memory.faults(call) for name, call in {"": ours, **peers}.items()}


@shapes
def test_bias_dropout_add(shape: str, threads: int, benchmark: Any) -> None:
    x, residual, y, bias, _ = arrays(shape)
    compare(
        benchmark, threads, lambda: fdt.bias_dropout_add(x, bias, residual, P),
        {ADD: lambda: torch.add(x, residual, out=y)}, shape, kind="bias_dropout_add", operation="forward",
    )  # fmt: skip


@shapes
def test_relu(shape: str, threads: int, benchmark: Any) -> None:
    x, _, y, bias, _ = arrays(shape)
    compare(
        benchmark, threads, lambda: fdt.bias_act_dropout(x, bias, P, "relu"),
        {MUL: lambda: torch.mul(x, SCALE, out=y)}, shape, kind="bias_act_dropout relu", operation="forward",
    )  # fmt: skip


@shapes
@results
def test_gelu(results: str, shape: str, threads: int, benchmark: Any) -> None:
    x, bias = (leaf(t) for t in arrays(shape)[:4:3])
    compare(
        benchmark, threads, lambda: fdt.bias_act_dropout(x, bias, P, "gelu"), {GELU: lambda: F.gelu(x)}, shape, results,
        kind="bias_act_dropout gelu", operation="forward",
    )  # fmt: skip


@shapes
@results
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_layer_norm(operation: str, results: str, shape: str, threads: int, benchmark: Any) -> None:
    x, residual, dy, shift, weight = (leaf(t) for t in arrays(shape))
    ours: Callable[[], Any] = lambda: fdt.dropout_add_layer_norm(x, residual, weight, shift, P)  # noqa: E731
    theirs: Callable[[], Any] = lambda: F.layer_norm(x, x.shape[-1:], weight, shift)  # noqa: E731
    peers = {LAYER_NORM: theirs, ADD_AND_NORM: lambda: F.layer_norm(residual + x, x.shape[-1:], weight, shift)}
    if operation == "backward":
        normed, normed_alone = ours()[0], theirs()
        ours = gradient(normed, (x, residual, weight, shift), dy)
        peers = {LAYER_NORM: gradient(normed_alone, (x, weight, shift), dy)}
    compare(
        benchmark, threads, ours, peers, shape, results, kind="dropout_add_layer_norm", operation=operation,
    )  # fmt: skip


@shapes
@results
def test_softmax(results: str, shape: str, threads: int, benchmark: Any) -> None:
    x = leaf(arrays(shape)[0])
    peers = {SOFTMAX: lambda: F.softmax(x, -1)}
    compare(
        benchmark, threads, lambda: fdt.softmax_dropout(x, P), peers, shape, results,
        kind="softmax_dropout", operation="forward",
    )  # fmt: skip


@shapes
@pytest.mark.parametrize("kind", cases.FUSED)
def test_compiled(kind: str, shape: str, threads: int, benchmark: Any) -> None:
    """Forward and backward, against what torch.compile makes of the formula."""
    torch.compiler.reset()
    fused = cases.FUSED[kind]
    tensors = fused.tensors(arrays(shape)[0])
    upstream = tuple(torch.randn_like(y) for y in cases.results(fused.ours, tensors))
    compiled = torch.compile(fused.formula)
    ours, theirs = (
        lambda function=function: cases.gradients(cases.results(function, tensors), tensors, upstream)
        for function in (fused.ours, compiled)
    )
    compare(
        benchmark, threads, ours, {COMPILED: theirs}, shape, kind=kind, operation="forward+backward",
    )  # fmt: skip


def test_training_step(threads: int, benchmark: Any) -> None:
    """TransformerEncoder, 4 layers, fused at p = 0.1 against torch's own at p = 0; and the bytes that forward keeps."""
    name = "TransformerEncoder"
    kept, plain = models.bytes_kept(name, P, fdt.fuse), models.bytes_kept(name, P)
    benchmark.extra_info.update(
        kind="training step", operation=name, layout="8 x 128 tokens, 256 wide", threads=threads
    )  # fmt: skip
    with memory.results("reused"):
        fused, unfused = models.training_step(name, P, fdt.fuse), models.training_step(name, 0.0)
        alternate(benchmark, fused, {P_ZERO: unfused}, STEP_SECONDS)
    if threads == 1:  # they don't depend on it
        benchmark.extra_info["peers"][KEPT] = {"ratio": kept / plain, "bytes": plain}


@lru_cache(maxsize=1)
def arrays(shape: str) -> tuple[Any, ...]:
    """x, a residual and a third of the shape, a bias and a weight."""
    torch.manual_seed(0)
    rows, columns = SHAPES[shape]
    return *(torch.randn(rows, columns) for _ in range(3)), torch.randn(columns), torch.randn(columns)


def leaf(t: Any) -> Any:
    return t.detach().requires_grad_()


def gradient(y: Any, inputs: tuple[Any, ...], dy: Any) -> Callable[[], object]:
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

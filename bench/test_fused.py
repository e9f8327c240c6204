"""Dropout fused with what surrounds it, beside the passes that would be there without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest

import fastdrop as fd
from fastdrop.cli import contenders

from .pairing import SETTLE_SECONDS, alternate
from .report_fused import ADD, COMPILED, GELU, KEPT, LAYER_NORM, MUL, P_ZERO, SOFTMAX

torch = pytest.importorskip("torch")
fdt = pytest.importorskip("fastdrop.torch")
models = pytest.importorskip("bench.models")
F = torch.nn.functional

SECONDS, STEP_SECONDS = 3.0, 15.0
P = 0.1
SCALE = 1.25
SHAPES = {"2048 x 2048": (2048, 2048), "8192 x 1024": (8192, 1024)}


@pytest.fixture(params=(1, 2), ids=lambda n: f"t{n}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with contenders.threads(request.param, torch):
        yield request.param


shapes = pytest.mark.parametrize("shape", SHAPES)


def compare(benchmark: Any, threads: int, ours: Any, peers: dict[str, Any], shape: str, **case: Any) -> None:
    benchmark.extra_info.update(threads=threads, layout=shape, elements=math.prod(SHAPES[shape]), **case)
    alternate(benchmark, ours, peers, SECONDS, SETTLE_SECONDS if threads > 1 else 0.0)


@shapes
def test_bias_dropout_add(shape: str, threads: int, benchmark: Any) -> None:
    x, residual, y, bias, _ = arrays(shape)
    peers = {ADD: lambda: torch.add(x, residual, out=y)}
    ours = lambda: fd.bias_dropout_add(x.numpy(), bias.numpy(), residual.numpy(), P, out=y.numpy())  # noqa: E731
    compare(benchmark, threads, ours, peers, shape, kind="bias_dropout_add", operation="forward")


@shapes
def test_relu(shape: str, threads: int, benchmark: Any) -> None:
    x, _, y, bias, _ = arrays(shape)
    peers = {MUL: lambda: torch.mul(x, SCALE, out=y)}
    ours = lambda: fd.bias_act_dropout(x.numpy(), bias.numpy(), P, "relu", out=y.numpy())  # noqa: E731
    compare(benchmark, threads, ours, peers, shape, kind="bias_act_dropout, relu", operation="forward")


@shapes
def test_gelu(shape: str, threads: int, benchmark: Any) -> None:
    x, bias = (leaf(t) for t in arrays(shape)[:4:3])
    compare(
        benchmark, threads, lambda: fdt.bias_act_dropout(x, bias, P, "gelu"), {GELU: lambda: F.gelu(x)}, shape,
        kind="bias_act_dropout, gelu", operation="forward",
    )  # fmt: skip


@shapes
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_layer_norm(operation: str, shape: str, threads: int, benchmark: Any) -> None:
    x, residual, dy, shift, weight = (leaf(t) for t in arrays(shape))
    ours: Callable[[], Any] = lambda: fdt.dropout_add_layer_norm(x, residual, weight, shift, P)  # noqa: E731
    theirs: Callable[[], Any] = lambda: F.layer_norm(x, x.shape[-1:], weight, shift)  # noqa: E731
    if operation == "backward":
        normed, normed_alone = ours()[0], theirs()
        ours = gradient(normed, (x, residual, weight, shift), dy)
        theirs = gradient(normed_alone, (x, weight, shift), dy)
    compare(
        benchmark, threads, ours, {LAYER_NORM: theirs}, shape, kind="dropout_add_layer_norm", operation=operation,
    )  # fmt: skip


@shapes
def test_softmax(shape: str, threads: int, benchmark: Any) -> None:
    x = leaf(arrays(shape)[0])
    peers = {SOFTMAX: lambda: F.softmax(x, -1)}
    compare(
        benchmark, threads, lambda: fdt.softmax_dropout(x, P), peers, shape,
        kind="softmax_dropout", operation="forward",
    )  # fmt: skip


# Ours, and the formula that torch.compile is given.
FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dropout_add": (
        lambda x, r, b, w: fdt.dropout_add(x, r, P),
        lambda x, r, b, w: r + F.dropout(x, P),
    ),
    "bias_dropout_add": (
        lambda x, r, b, w: fdt.bias_dropout_add(x, b, r, P),
        lambda x, r, b, w: r + F.dropout(x + b, P),
    ),
    "bias_act_dropout, relu": (
        lambda x, r, b, w: fdt.bias_act_dropout(x, b, P, "relu"),
        lambda x, r, b, w: F.dropout(F.relu(x + b), P),
    ),
    "bias_act_dropout, gelu": (
        lambda x, r, b, w: fdt.bias_act_dropout(x, b, P, "gelu"),
        lambda x, r, b, w: F.dropout(F.gelu(x + b), P),
    ),
    "swiglu_dropout": (
        lambda x, r, b, w: fdt.swiglu_dropout(x, r, P),
        lambda x, r, b, w: F.dropout(F.silu(x) * r, P),
    ),
    "dropout_add_layer_norm": (
        lambda x, r, b, w: fdt.dropout_add_layer_norm(x, r, w, b, P)[0],
        lambda x, r, b, w: F.layer_norm(r + F.dropout(x, P), x.shape[-1:], w, b),
    ),
    "dropout_add_rms_norm": (
        lambda x, r, b, w: fdt.dropout_add_rms_norm(x, r, w, P)[0],
        lambda x, r, b, w: F.rms_norm(r + F.dropout(x, P), x.shape[-1:], w),
    ),
    "softmax_dropout": (
        lambda x, r, b, w: fdt.softmax_dropout(x, P),
        lambda x, r, b, w: F.dropout(F.softmax(x, -1), P),
    ),
}


@shapes
@pytest.mark.parametrize("kind", FORMULAS)
def test_compiled(kind: str, shape: str, threads: int, benchmark: Any) -> None:
    """Forward and backward, against what torch.compile makes of the formula."""
    x, residual, dy, bias, weight = (leaf(t) for t in arrays(shape))
    ours, formula = FORMULAS[kind]
    torch.compiler.reset()
    compiled = torch.compile(formula)
    inputs = (x, residual, bias, weight)
    compare(
        benchmark, threads, step(ours, inputs, dy), {COMPILED: step(compiled, inputs, dy)}, shape,
        kind=kind, operation="forward+backward",
    )  # fmt: skip


def test_training_step(threads: int, benchmark: Any) -> None:
    """TransformerEncoder, 4 layers, fused at p = 0.1 against torch's own at p = 0; and the bytes that forward keeps."""
    name = "TransformerEncoder"
    fused = models.training_step(name, P, fdt.fuse)
    with fdt.enabled():
        kept = models.bytes_kept(name, P, fdt.fuse)
    plain = models.bytes_kept(name, P)
    tokens = models.BATCH * models.LENGTH
    benchmark.extra_info.update(
        kind="training step", operation=name, layout="8 x 128 tokens, 256 wide", threads=threads, elements=tokens
    )
    alternate(benchmark, fused, {P_ZERO: models.training_step(name, 0.0)}, STEP_SECONDS, around=fdt.enabled)
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


def step(function: Callable[..., Any], inputs: tuple[Any, ...], dy: Any) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(*inputs), inputs, dy, allow_unused=True)

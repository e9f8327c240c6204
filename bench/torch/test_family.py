"""Times the other kinds of dropout, each beside its target: a multiplication, plain dropout, a formula in torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import fastdrop as fd

from .. import contenders
from ..pairing import SETTLE_SECONDS, alternate

torch = pytest.importorskip("torch", reason="torch is not installed")
fdt = pytest.importorskip("fastdrop.torch")

SECONDS = 3.0
P = 0.2
IMAGES = (64, 256, 56, 56)
SCALE = 1.25
FLAT = {"1M": 1 << 20, "16M": 1 << 24}
NOISE = {"64k": 1 << 16, **FLAT}
SAMPLES = 50
MUL, DROPOUT, FORMULA = "torch.mul", "fd.dropout", "formula in torch"
LOOP, OWN_LOOP = "loop with nn.Dropout", "loop with fdt.Dropout"

SHARED: dict[str, Callable[..., Any]] = {
    "feature": fd.feature_dropout,
    "variational": lambda x, p, **options: fd.variational_dropout(x, p, 1, **options),
    "stochastic depth": lambda x, p, **options: fd.stochastic_depth(x, p, "row", **options),
}
TORCH_PEERS = {
    "feature": torch.nn.functional.dropout2d,
    "variational": lambda x, p: x * torch.empty(x.shape[0], 1, *x.shape[2:]).bernoulli_(1 - p).div_(1 - p),
    "stochastic depth": lambda x, p: x * torch.empty(len(x), 1, 1, 1).bernoulli_(1 - p).div_(1 - p),
}


def compare(benchmark: Any, threads: int, ours: Any, peers: dict[str, Any], **case: Any) -> None:
    benchmark.extra_info.update(threads=threads, **case)
    alternate(benchmark, ours, peers, SECONDS, SETTLE_SECONDS if threads > 1 else 0.0)


@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("kind", SHARED)
def test_shared(kind: str, layout: str, operation: str, threads: int, benchmark: Any) -> None:
    """Masks with shared decisions, whole calls of the NumPy API, against a multiplication over the same memory."""
    x, y = images(layout)
    drop = SHARED[kind]
    _, mask = drop(x, P, rng=0)
    peer = multiplication(x, y)
    if operation == "forward":
        ours: Callable[[], Any] = lambda: drop(x, P, out=y)  # noqa: E731
    else:
        ours = lambda: fd.dropout_backward(x, mask, out=y)  # noqa: E731
    compare(benchmark, threads, ours, {MUL: peer}, kind=kind, operation=operation, layout=layout, elements=x.size)


@pytest.mark.parametrize("kind", SHARED)
def test_shared_in_torch(kind: str, threads: int, benchmark: Any) -> None:
    """The same as torch's users call it, forward and backward, beside torch's own or its formula."""
    functions = {
        "feature": fdt.dropout2d,
        "variational": lambda x, p: fdt.variational_dropout(x, p, 1),
        "stochastic depth": lambda x, p: fdt.stochastic_depth(x, p, "row"),
    }
    x = torch.randn(16, *IMAGES[1:])
    ours, theirs = with_gradient(functions[kind], x, P), with_gradient(TORCH_PEERS[kind], x, P)
    compare(
        benchmark, threads, ours, {FORMULA: theirs}, kind=kind, operation="torch, forward+backward",
        layout="channels first", elements=x.numel(),
    )  # fmt: skip


@pytest.mark.parametrize("operation", ["forward", "forward+backward"])
def test_drop_block(operation: str, threads: int, benchmark: Any) -> None:
    x, p, block = torch.randn(16, *IMAGES[1:]), 0.1, 7
    if operation == "forward":
        ours: Callable[[], Any] = lambda: fdt.drop_block2d(x, p, block)  # noqa: E731
        theirs: Callable[[], Any] = lambda: drop_block_formula(x, p, block)  # noqa: E731
    else:
        ours = with_gradient(lambda x, p: fdt.drop_block2d(x, p, block), x, p)
        theirs = with_gradient(lambda x, p: drop_block_formula(x, p, block), x, p)
    compare(
        benchmark, threads, ours, {FORMULA: theirs}, kind="DropBlock", operation=operation, layout="7 x 7",
        elements=x.numel(),
    )  # fmt: skip


@pytest.mark.parametrize("p", [0.1, 0.5], ids=contenders.p_id)
def test_drop_connect(p: float, threads: int, benchmark: Any) -> None:
    w = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
    out = np.empty_like(w)
    compare(
        benchmark, threads, lambda: fd.drop_connect(w, p, out=out), {MUL: multiplication(w, out)},
        kind="DropConnect", operation="forward", layout=f"4096 x 4096, p = {p}", elements=w.size,
    )  # fmt: skip


@pytest.mark.parametrize("size", FLAT)
def test_alpha(size: str, threads: int, benchmark: Any) -> None:
    x, y = flat(FLAT[size])
    compare(
        benchmark, threads, lambda: fd.alpha_dropout(x, 0.1, out=y), {DROPOUT: lambda: fd.dropout(x, 0.1, out=y)},
        kind="alpha", operation="forward", layout=size, elements=x.size,
    )  # fmt: skip


@pytest.mark.parametrize("operation", ["forward", "forward+backward"])
@pytest.mark.parametrize("size", NOISE)
def test_gaussian(size: str, operation: str, threads: int, benchmark: Any) -> None:
    x, sigma = torch.randn(NOISE[size]), (P / (1 - P)) ** 0.5
    if operation == "forward":
        ours: Callable[[], Any] = lambda: fdt.gaussian_dropout(x, P)  # noqa: E731
        theirs: Callable[[], Any] = lambda: x * torch.normal(1.0, sigma, x.shape)  # noqa: E731
    else:
        ours = with_gradient(fdt.gaussian_dropout, x, P)
        theirs = with_gradient(lambda x, p: x * torch.normal(1.0, sigma, x.shape), x, P)
    compare(
        benchmark, threads, ours, {FORMULA: theirs}, kind="Gaussian", operation=operation, layout=size,
        elements=x.numel(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "batch"), [((16, 64, 64, 1), 32), ((64, 256, 256, 10), 32)], ids=["MLP 64 wide", "MLP 256 wide"]
)
def test_mc_predict(sizes: tuple[int, ...], batch: int, threads: int, benchmark: Any) -> None:
    """50 samples of an MLP, mean and standard deviation, against loops of as many forward passes: as torch's users
    write it, and with fastdrop's modules in their place."""
    x = torch.randn(batch, sizes[0])
    ours, theirs = mlp(fdt.Dropout, sizes), mlp(torch.nn.Dropout, sizes)

    def loop(model: Any) -> Any:
        with torch.no_grad(), fdt.mc_dropout(model):
            samples = torch.stack([model(x) for _ in range(SAMPLES)])
            return samples.mean(0), samples.std(0)

    compare(
        benchmark, threads, lambda: fdt.mc_predict(ours, x, SAMPLES),
        {LOOP: lambda: loop(theirs), OWN_LOOP: lambda: loop(ours)},
        kind="mc_predict", operation=f"{SAMPLES} samples",
        layout=f"MLP {'-'.join(map(str, sizes))}, batch {batch}", elements=SAMPLES,
    )  # fmt: skip


def mlp(dropout: Callable[[float], Any], sizes: tuple[int, ...]) -> Any:
    torch.manual_seed(0)
    layers: list[Any] = []
    for before, after in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(before, after), torch.nn.ReLU(), dropout(0.5)]
    return torch.nn.Sequential(*layers[:-2]).eval()


def drop_block_formula(x: Any, p: float, block: int) -> Any:
    """DropBlock as Ghiasi et al. have it and torchvision and timm compute it: centres, max pooling, renormalisation."""
    n, c, h, w = x.shape
    gamma = p * h * w / (block**2 * (h - block + 1) * (w - block + 1))
    centres = torch.empty(n, c, h - block + 1, w - block + 1).bernoulli_(gamma)
    dropped = torch.nn.functional.max_pool2d(
        torch.nn.functional.pad(centres, [block // 2] * 4), block, stride=1, padding=block // 2
    )
    keep = 1 - dropped
    return x * keep * (keep.numel() / keep.sum())


def with_gradient(drop: Callable[..., Any], x: Any, p: float) -> Callable[[], object]:
    leaf, dy = x.detach().requires_grad_(), torch.ones_like(x)
    return lambda: torch.autograd.grad(drop(leaf, p), leaf, dy)


@lru_cache(maxsize=1)
def images(layout: str) -> tuple[Any, Any]:
    """x and y of IMAGES, NCHW in shape, in either order in memory."""
    n, c, h, w = IMAGES
    if layout == "channels first":
        x, y = (np.zeros(IMAGES, np.float32) for _ in range(2))
    else:
        x, y = (np.zeros((n, h, w, c), np.float32).transpose(0, 3, 1, 2) for _ in range(2))
    x[...] = np.random.default_rng(0).standard_normal(x.shape, np.float32)
    y[...] = 0
    return x, y


@lru_cache(maxsize=1)
def flat(n: int) -> tuple[Any, Any]:
    buffers = contenders.Buffers.of((n,), np.dtype(np.float32))
    return buffers.x, buffers.y


def multiplication(x: Any, y: Any) -> Callable[[], object]:
    source, target = torch.from_numpy(x), torch.from_numpy(y)
    return lambda: torch.mul(source, SCALE, out=target)

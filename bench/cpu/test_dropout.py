"""Times plain dropout: forward, backward and both, every case in turn with its peers.

``extra_info`` keeps the median of each peer and the median of the paired ratios fastdrop / peer. The limit is the ways'
fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import fastdrop as fd
from fastdrop import backends
from fastdrop.backends import c as native
from fastdrop.cli.bench import import_torch
from fastdrop.core.random import threshold

from .. import contenders
from ..pairing import SETTLE_SECONDS, alternate
from . import cases

CASE_SECONDS, DRAW_SECONDS = 0.5, 1.0
COMPILED = "compiled F.dropout"
C, BITS, DRAW_BITS = "C", "bits", "draw_bits"

torch = import_torch()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        quick = {*cases.quick_cases()}
        marks = {case: [pytest.mark.quick] * (case in quick) for case in cases.every_case()}
        metafunc.parametrize("case", [pytest.param(case, id=case.id, marks=marks[case]) for case in marks])


@pytest.fixture
def running(case: cases.Case) -> Iterator[None]:
    """The case's variant and threads, for its time."""
    backend, _, isa = case.variant.partition("-")
    with fd.use_backend(backend), contenders.threads(case.threads, torch):
        if not isa:
            yield
            return
        before = native.isa()
        native.select_isa(isa)
        yield
        native.select_isa(before)


@lru_cache(maxsize=1)
def buffers(size: int, dtype: str) -> contenders.Buffers:
    if dtype == "bfloat16":
        return contenders.Buffers.of((size,), np.dtype(pytest.importorskip("ml_dtypes").bfloat16))
    return contenders.Buffers.of((size,), np.dtype(dtype))


def test_dropout(case: cases.Case, running: None, benchmark: Any) -> None:
    data = buffers(case.size, case.dtype)
    measured = fastdrop_contender(case, data).call(case.operation)
    limits = contenders.scale_limits(data, case.p) if case.has_limits else {}
    peers = dict(peers_of(case, data)) | {way: limit.call(case.operation) for way, limit in limits.items()}
    benchmark.extra_info.update(case.as_dict(), bytes_per_element=traffic(case, data))
    benchmark.extra_info["contender"] = case.contender
    around = {way: limit.around for way, limit in limits.items()}
    settle = SETTLE_SECONDS if case.threads > 1 else 0.0
    # The table has each peer once, beside fastdrop itself.
    hidden = {*limits} if case.contender == contenders.FASTDROP else {*peers}
    alternate(benchmark, measured, peers, CASE_SECONDS, settle, around, hidden)
    benchmark.extra_info["peers"] = contenders.with_limit(benchmark.extra_info["peers"])


@pytest.mark.quick
def test_whole_call_of_1000_elements(benchmark: Any) -> None:
    """What Python costs: fd.dropout on an array so small that the kernel hardly counts."""
    x = np.ones(1000, np.float32)
    y = np.empty_like(x)
    stream = fd.Stream(0)
    peers = {}
    if torch is not None:
        tensor = torch.from_numpy(x)
        peers["F.dropout"] = lambda: torch.nn.functional.dropout(tensor, 0.1, True)
    benchmark.extra_info.update(operation="whole call", variant=cases.best(), level="call", size=1000, p=0.1)
    benchmark.extra_info.update(dtype="float32", threads=1, store="bits", bytes_per_element=8.125)
    with contenders.threads(1, torch):
        alternate(benchmark, lambda: fd.dropout(x, 0.1, rng=stream, out=y), peers, 1.0)


@pytest.mark.quick
@pytest.mark.parametrize("layout", cases.ROWS, ids=lambda layout: layout.removeprefix("draw_rows, "))
def test_draw_rows(layout: str, benchmark: Any) -> None:
    """What a shard of 8 draws of the whole's mask, beside as many cells in a row."""
    if backends.reasons()["c"] is not None:
        pytest.skip("C is not built")
    rows, pitch, columns = cases.ROWS[layout]
    words, draw = np.empty((rows * columns + 31) // 32, np.uint32), (contenders.SEED, 0, threshold(0.1))
    first = 3 * columns  # the fourth shard's
    peers = {DRAW_BITS: lambda: native.draw_bits(words, 0, first, rows * columns, *draw)}
    benchmark.extra_info.update(operation=layout, variant=cases.best(), level="kernel", size=cases.SIZES["1M"], p=0.1)
    benchmark.extra_info.update(dtype="float32", threads=1, store="bits", bytes_per_element=0.125)
    with contenders.threads(1, torch):
        alternate(
            benchmark, lambda: native.draw_rows(words, 0, first, 1, 0, rows, pitch, columns, *draw), peers, DRAW_SECONDS
        )


def fastdrop_contender(case: cases.Case, data: contenders.Buffers) -> contenders.Contender:
    if case.level == "kernel":
        return contenders.kernels(backends.active(), data, case.p)
    if case.store == "bits":
        return contenders.fastdrop(data, case.p)
    _, mask = fd.dropout(data.x, case.p, store=case.store, rng=0, out=data.y)
    backward = lambda: fd.dropout_backward(data.dy, mask, out=data.dx)  # noqa: E731
    return contenders.Contender(contenders.FASTDROP, backward, backward, backward, 0.0)


def peers_of(case: cases.Case, data: contenders.Buffers) -> Iterator[tuple[str, Callable[[], object]]]:
    if torch is not None:
        yield contenders.TORCH_MUL, contenders.torch_mul(torch, data, case.p).call(case.operation)
    if case.store != "bits":
        yield BITS, contenders.fastdrop(data, case.p).call(case.operation)
        return
    if case.variant == "numba" and backends.reasons()["c"] is None:
        yield C, contenders.kernels(native, data, case.p).call(case.operation)
    if case.has_others:
        yield contenders.NUMPY, contenders.plain_numpy(data, case.p).call(case.operation)
        if torch is not None:
            yield contenders.F_DROPOUT, contenders.torch_dropout(torch, data, case.p).call(case.operation)
            if case.dtype == "float32" and case.operation != "backward" and compiled() is not None:
                yield COMPILED, compiled_call(data, case)


@lru_cache(maxsize=1)
def compiled() -> Any:
    """torch.compile'd F.dropout, or None where it can't compile (no C++ compiler)."""
    run = torch.compile(lambda x, p: torch.nn.functional.dropout(x, p, True), dynamic=True)
    try:
        run(torch.ones(4096), 0.1)
    except Exception:  # whatever a broken tool chain raises
        return None
    return run


def compiled_call(data: contenders.Buffers, case: cases.Case) -> Callable[[], object]:
    run, x, dy = compiled(), torch.from_numpy(data.x), torch.from_numpy(data.dy)
    if case.operation == "forward":
        return lambda: run(x, case.p)
    leaf = x.requires_grad_()
    return lambda: torch.autograd.grad(run(leaf, case.p), leaf, dy)


def traffic(case: cases.Case, data: contenders.Buffers) -> float:
    """Bytes an ideal kernel moves per element: each array once, and the mask."""
    one = 2 * data.x.itemsize + (0.125 if case.store == "bits" else 0.0)
    return one * (2 if case.operation == "forward+backward" else 1)

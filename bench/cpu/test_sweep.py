"""Times plain dropout of float32 over sizes, with the memory policy in force and with streaming forced on and off.

A cliff between two sizes, and a policy that streams from the wrong size on, can be seen in the report
(`report_sweep`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from fastdrop import backends
from fastdrop.backends import memory
from fastdrop.cli.bench import import_torch
from fastdrop.cli.timing import SAMPLE_SECONDS, sample

from .. import contenders, machine
from ..contenders import WAYS
from ..pairing import SETTLE_SECONDS, alternate
from .report_sweep import ALWAYS, NEVER, OPERATIONS, SIZES, THREADS, P, size_name

SECONDS = 4.0
# F.dropout takes so much longer than the others that it runs apart from them: for about so long, or twice.
APART_SECONDS, APART_ROUNDS = 0.5, (2, 31)
THRESHOLDS = {ALWAYS: 0, NEVER: memory.NEVER}

NAMES = {size: size_name(size) for size in SIZES} | {n: contenders.threads_id(n) for n in THREADS}

torch = import_torch()


@pytest.mark.parametrize(
    ("size", "operation", "threads"),
    [*itertools.product(SIZES, OPERATIONS, THREADS)],
    ids=lambda value: NAMES.get(value, value),
)
def test_sweep(size: int, operation: str, threads: int, benchmark: Any) -> None:
    free = machine.free_memory()
    if free is not None and len(dataclasses.fields(contenders.Buffers)) * 4 * size > free / 2:
        pytest.skip(f"the buffers need more than half of the {free >> 20} MiB that are free")
    with contenders.threads(threads, torch):
        data = buffers(size)
        ours = contenders.kernels(backends.active(), data, P)
        peers = peers_of(ours, data)
        around = {name: peer.around for name, peer in peers.items()}
        calls = {name: peer.call(operation) for name, peer in peers.items()}
        benchmark.extra_info.update(
            operation=operation, elements=size, threads=threads, streams_from=memory.policy().stream // 4
        )
        alternate(benchmark, ours.call(operation), calls, SECONDS, SETTLE_SECONDS if threads > 1 else 0.0, around, WAYS)
        timed = benchmark.extra_info["peers"] = contenders.with_limit(benchmark.extra_info["peers"])
        if torch is not None and operation == "forward":
            x = torch.from_numpy(data.x)
            timed[contenders.F_DROPOUT] = {"seconds": apart(lambda: torch.nn.functional.dropout(x, P, True))}


def peers_of(ours: contenders.Contender, data: contenders.Buffers) -> dict[str, contenders.Contender]:
    """Ours with each choice forced, over the same mask; torch's multiplication; the limits."""
    peers = {
        name: dataclasses.replace(ours, around=functools.partial(streaming_from, threshold))
        for name, threshold in THRESHOLDS.items()
    }
    if torch is not None:
        peers[contenders.TORCH_MUL] = contenders.torch_mul(torch, data, P)
    return peers | contenders.scale_limits(data, P)


def streaming_from(threshold: int) -> contextlib.AbstractContextManager[object]:
    """The policy in force, but for the size in bytes that outputs are streamed from."""
    return memory.use_policy(dataclasses.replace(memory.policy(), stream=threshold))


def apart(call: Callable[[], object]) -> float:
    """Seconds of a call that does not take turns with others."""
    once = sample(call, 1)
    repeats = max(1, round(SAMPLE_SECONDS / once))
    fewest, most = APART_ROUNDS
    rounds = min(max(int(APART_SECONDS / (once * repeats)), fewest), most)
    return statistics.median(sample(call, repeats) for _ in range(rounds))


@lru_cache(maxsize=1)
def buffers(size: int) -> contenders.Buffers:
    return contenders.Buffers.of((size,), np.dtype(np.float32))

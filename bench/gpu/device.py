"""The device that is timed: GPU 0 through torch, or the CPU in its place for a dry run.

This module owns how work is enqueued, captured, marked and waited for. `Host` has the same methods as `Cuda`, with
tiny tensors and the wall clock, so that tests can run every section without a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from fastdrop.backends.cuda import driver

Call = Callable[[], object]
SMI = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"


class Cuda:
    shapes = {  # noqa: RUF012
        "256M": (1 << 16, 1 << 12), "16M": (1 << 14, 1 << 10), "1M": (1 << 10, 1 << 10),
        "16384 x 4096": (16384, 4096), "8192 x 1024": (8192, 1024), "2048 x 2048": (2048, 2048),
        "images": (64, 256, 56, 56),
    }  # fmt: skip
    sample_seconds = 1.5e-3  # events resolve half a microsecond
    host_calls = 100  # between two synchronisations: the queue of launches must not fill up

    def __init__(self) -> None:
        import torch

        self.torch, self.device = torch, torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        self._properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes = int(getattr(self._properties, "L2_cache_size", 0)) or 64 << 20
        self._side = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def describe(self) -> dict[str, Any]:
        about = self._properties
        return {
            "device": about.name, "compute_capability": [about.major, about.minor], "sms": about.multi_processor_count,
            "memory_bytes": about.total_memory, "l2_bytes": self.l2_bytes, **nvidia_smi(),
        }  # fmt: skip

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def mark(self) -> Any:
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) * 1e-3

    def warm_up(self, call: Call) -> None:
        """Runs it on the stream that captures, because autograd remembers streams."""
        self._side.wait_stream(self.torch.cuda.current_stream())
        with self.torch.cuda.stream(self._side):
            call()
            call()
        self.synchronize()

    def capture(self, call: Call) -> Call:
        """A graph of what call enqueues. All graphs share one pool: each writes its memory before it reads it."""
        torch = self.torch
        before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side):
                call()
        finally:
            torch.cuda.set_stream(before)  # where capturing failed, nothing else has
        self.synchronize()
        replay: Call = graph.replay
        return replay

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self.torch.compiler.reset()
        return self.torch.compile(function, dynamic=False)

    @contextlib.contextmanager
    def launch_shape(self, threads: int, blocks: int) -> Iterator[None]:
        """Kernels are launched in blocks of so many threads, at most so many blocks."""
        device = driver.device(0)
        before = driver.THREADS, device.blocks
        driver.THREADS, device.blocks = threads, blocks
        try:
            yield
        finally:
            driver.THREADS, device.blocks = before

    def free(self) -> None:
        gc.collect()
        self.torch.cuda.empty_cache()


class Host:
    shapes = dict.fromkeys(Cuda.shapes, (33, 16)) | {"images": (9, 3, 4, 5)}
    sample_seconds, host_calls, l2_bytes = 1e-5, 3, 2 << 10

    def __init__(self) -> None:
        import torch

        self.torch, self.device = torch, torch.device("cpu")

    def describe(self) -> dict[str, Any]:
        about = {"device": "dry run on the CPU", "compute_capability": [9, 0], "sms": 132, "memory_bytes": 0}
        return {**about, "l2_bytes": self.l2_bytes, **nvidia_smi()}

    def synchronize(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def warm_up(self, call: Call) -> None:
        call()

    def capture(self, call: Call) -> Call:
        return call

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.torch.compile(function, dynamic=False, backend="eager")

    def launch_shape(self, threads: int, blocks: int) -> Any:
        return contextlib.nullcontext()

    def free(self) -> None:
        pass


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, temperature and power as the GPU reports them now; empty where they can't be read."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={SMI}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI.split(","), (value.strip() for value in answer.split(",")), strict=False))

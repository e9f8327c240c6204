"""The device that is timed: GPU 0 through torch, or the CPU in its place for a dry run.

This module owns how work is enqueued, captured, marked and waited for. `Host` has the same methods as `Cuda`. It does
as little as it can: the reference backend stands in for the kernels, and the wall clock for events.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from fastdrop.backends import reference
from fastdrop.backends.cuda import driver
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.core.checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

Call = Callable[[], object]
STORAGE = {FLOAT32: np.float32, FLOAT64: np.float64, FLOAT16: np.float16, BFLOAT16: np.uint16}
SMI = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"


class Cuda:
    sizes = {"256M": 1 << 28, "16M": 1 << 24, "1M": 1 << 20}  # noqa: RUF012
    matrices = {"16384 x 4096": (16384, 4096), "8192 x 1024": (8192, 1024), "2048 x 2048": (2048, 2048)}  # noqa: RUF012
    image = (64, 256, 56, 56)
    sample_seconds = 1.5e-3  # events resolve half a microsecond
    host_calls = 100  # between two synchronisations: the queue of launches must not fill up
    backend = numba_cuda

    def __init__(self) -> None:
        import torch

        from fastdrop.torch.runtime.dispatch.tensors import current_stream

        self.torch, self.device, self._current_stream = torch, torch.device("cuda", 0), current_stream
        torch.cuda.set_device(self.device)
        self._properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes = int(getattr(self._properties, "L2_cache_size", 0)) or 64 << 20
        self._side = torch.cuda.Stream()

    def describe(self) -> dict[str, Any]:
        about = self._properties
        return {
            "device": about.name, "compute_capability": [about.major, about.minor], "sms": about.multi_processor_count,
            "memory_bytes": about.total_memory, "l2_bytes": self.l2_bytes, **nvidia_smi(),
        }  # fmt: skip

    def stream(self) -> int:
        return int(self._current_stream(0))

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def mark(self) -> Any:
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) * 1e-3

    def capture(self, call: Call) -> Call:
        """A graph of what call enqueues. It is warmed up on the stream that captures: autograd remembers streams."""
        torch = self.torch
        before = torch.cuda.current_stream()
        self._side.wait_stream(before)
        with torch.cuda.stream(self._side):
            call()
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._side):
                call()
        finally:
            torch.cuda.set_stream(before)  # where capturing failed, nobody else has
        torch.cuda.synchronize()
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

    def seeds(self) -> Call:
        """Returns a function that draws a seed for a call."""
        from fastdrop.torch.runtime import seeds

        return partial(seeds.next_cuda_seed, self.device, None)

    def free(self) -> None:
        gc.collect()
        self.torch.cuda.empty_cache()


class Host:
    sizes = {"256M": 5001, "16M": 3000, "1M": 1000}  # noqa: RUF012
    matrices = {"16384 x 4096": (48, 32), "8192 x 1024": (33, 16), "2048 x 2048": (32, 16)}  # noqa: RUF012
    image = (2, 3, 4, 5)
    sample_seconds, host_calls, l2_bytes = 1e-5, 3, 2 << 10

    def __init__(self) -> None:
        import torch

        self.torch, self.device, self.backend = torch, torch.device("cpu"), AddressedReference

    def describe(self) -> dict[str, Any]:
        about = {"device": "dry run on the CPU", "compute_capability": [9, 0], "sms": 132, "memory_bytes": 0}
        return {**about, "l2_bytes": self.l2_bytes, **nvidia_smi()}

    def stream(self) -> int:
        return 0

    def synchronize(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def capture(self, call: Call) -> Call:
        call()
        return call

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.torch.compile(function, dynamic=False, backend="eager")

    def launch_shape(self, threads: int, blocks: int) -> Any:
        return contextlib.nullcontext()

    def seeds(self) -> Call:
        from fastdrop.torch.runtime import seeds

        return partial(seeds.next_seed, None)

    def free(self) -> None:
        gc.collect()


class AddressedReference:
    """The reference backend with the parameters of the CUDA launcher, over memory of the CPU."""

    @staticmethod
    def dropout_forward_at(device: int, stream: int, dtype: int, *rest: Any) -> None:
        x, y, words, first, n, *options = rest
        data = (memory(at, n, STORAGE[dtype]) for at in (x, y))
        reference.dropout_forward(dtype, *data, memory_words(words, n) if words else None, first, n, *options)

    @staticmethod
    def masked_affine_at(device: int, stream: int, dtype: int, *rest: Any) -> None:
        x, y, words, position, outer, repeat, inner, *affine = rest
        data = (memory(at, outer * repeat * inner, STORAGE[dtype]) for at in (x, y))
        keep = memory_words(words, position + outer * inner)
        reference.masked_affine(dtype, *data, keep, position, outer, repeat, inner, *affine)


def memory(address: int, n: int, dtype: Any) -> Any:
    return np.frombuffer((ctypes.c_uint8 * (n * np.dtype(dtype).itemsize)).from_address(address), dtype)


def memory_words(address: int, bits: int) -> Any:
    return memory(address, (bits + 31) // 32, np.uint32)


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, temperature and power as the GPU reports them now; empty where they can't be read."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={SMI}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI.split(","), (value.strip() for value in answer.split(",")), strict=False))

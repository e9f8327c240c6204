"""The CUDA driver: devices, the kernels loaded on them, and launches with raw pointers; `launch` calls it.

A launch goes to the stream that it is given, never waits and never copies. The device's primary context, which torch
and CuPy use too, is made current for a launch if it isn't: a thread of autograd may come without one.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import struct
import sys
import threading
from typing import Any

from ...core.installing import how_to_install
from . import compile
from .compile import OLDEST, Capability, Variant
from .tile import LANES, TEAM_WARPS

THREADS = LANES * TEAM_WARPS  # per block
BLOCKS_PER_SM = 32  # at most; beyond, a thread takes several turns

REFUSALS = (200, 209, 222)  # invalid image, none for this GPU, PTX too new: machine code and driver don't fit
_PARAMETER_BYTES = 256
_PARAM_BUFFER_POINTER, _PARAM_BUFFER_SIZE, _PARAM_END = 1, 2, 0  # as cuda.h has CU_LAUNCH_PARAM_*

_lock = threading.RLock()
_devices: dict[int, Device] = {}


_api: Any = None


def api() -> Any:
    """``cuda.bindings.driver``; at the interpreter's exit, when nothing can be imported any more, the one held."""
    global _api
    if sys.meta_path is not None:
        _api = importlib.import_module("cuda.bindings.driver")
    return _api


def unavailable() -> str | None:
    """Why there is no device to launch on, and what to install; None if there is one."""
    if not all(importlib.util.find_spec(package) for package in ("numba", "numba_cuda")):
        return f"numba-cuda is not installed: {how_to_install('cuda')}"
    try:
        driver = api()
    except ImportError as error:
        return f"cuda.bindings is not installed ({error}): {how_to_install('cuda')}"
    try:
        status = driver.cuInit(0)[0]
    except RuntimeError:
        return "there is no NVIDIA driver (libcuda): install one, then its GPU can be used"
    if status:
        return f"the NVIDIA driver finds no GPU that it can use ({status.name}): look at nvidia-smi"
    found = count()
    if found == 0:
        return "the NVIDIA driver finds no GPU: look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
    newest = max(capability(ordinal) for ordinal in range(found))
    return too_old(newest) if newest < OLDEST else None


def too_old(cc: Capability) -> str:
    oldest, own = (".".join(map(str, one)) for one in (OLDEST, cc))
    return f"it takes a GPU of compute capability {oldest} or later, and this one has {own}"


def count() -> int:
    check(*api().cuInit(0))
    return int(check(*api().cuDeviceGetCount()))


def capability(ordinal: int) -> Capability:
    """Of the GPU of this number."""
    driver = api()
    handle = check(*driver.cuDeviceGet(ordinal))
    asked = driver.CUdevice_attribute
    major = check(*driver.cuDeviceGetAttribute(asked.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle))
    minor = check(*driver.cuDeviceGetAttribute(asked.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle))
    return int(major), int(minor)


def check(status: Any, *values: Any) -> Any:
    """What a call of the driver returned beside its status, which must be success."""
    if status:
        raise RuntimeError(f"the CUDA driver reports {status.name}")
    return values[0] if values else None


class _Parameters(threading.local):
    """A launch's parameters as the driver takes them, in a buffer per thread: when it returns, it has copied them.

    ``parts``: the buffer, the number of bytes in it, the address of what names both to the driver.
    """

    def __init__(self) -> None:
        buffer, size = ctypes.create_string_buffer(_PARAMETER_BYTES), ctypes.c_size_t()
        self._extra = (ctypes.c_void_p * 5)(
            _PARAM_BUFFER_POINTER, ctypes.addressof(buffer), _PARAM_BUFFER_SIZE, ctypes.addressof(size), _PARAM_END
        )
        self.parts = buffer, size, ctypes.addressof(self._extra)


_parameters = _Parameters()


class Kernel:
    """A variant, loaded on a device."""

    __slots__ = ("_device", "_function", "_pack_into", "_size")

    def __init__(self, device: Device, function: Any, layout: struct.Struct) -> None:
        self._device, self._function = device, function
        self._pack_into, self._size = layout.pack_into, layout.size

    def launch(self, stream: int, threads: int, *values: Any) -> None:
        """Runs at least so many threads, or as many as the device is worth, on a stream."""
        device = self._device
        buffer, size, parameters = _parameters.parts
        self._pack_into(buffer, 0, *values)
        size.value = self._size
        blocks = min((threads + THREADS - 1) // THREADS, device.blocks)
        if device.is_current():
            status = device.launch(self._function, blocks, 1, 1, THREADS, 1, 1, 0, stream, 0, parameters)[0]
        else:
            with device:
                status = device.launch(self._function, blocks, 1, 1, THREADS, 1, 1, 0, stream, 0, parameters)[0]
        if status:
            check(status)


class Device:
    """A GPU by its number, and what is loaded on it. As a context manager: its primary context is current inside."""

    def __init__(self, ordinal: int) -> None:
        self.driver = driver = api()
        check(*driver.cuInit(0))
        handle = check(*driver.cuDeviceGet(ordinal))
        self.cc = capability(ordinal)
        if self.cc < OLDEST:
            raise RuntimeError(too_old(self.cc))
        multiprocessors = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        self.blocks = check(*driver.cuDeviceGetAttribute(multiprocessors, handle)) * BLOCKS_PER_SM
        self._context = check(*driver.cuDevicePrimaryCtxRetain(handle))
        self._address = int(self._context)
        self._get_current, self.launch = driver.cuCtxGetCurrent, driver.cuLaunchKernel
        self._kernels: dict[tuple[Any, ...], Kernel] = {}

    def is_current(self) -> bool:
        """Whether this thread's context is the device's."""
        return int(check(*self._get_current())) == self._address

    def __enter__(self) -> Device:
        check(*self.driver.cuCtxPushCurrent(self._context))
        return self

    def __exit__(self, *_: Any) -> None:
        check(*self.driver.cuCtxPopCurrent())

    def kernel(
        self,
        body: str,
        dtype: int = 0,
        form: str = "",
        plain: bool = True,
        counted: bool = False,
        residual_dtype: int = 0,
        activation: int = 0,
    ) -> Kernel:
        """A `Variant` by its parts."""
        found = self._kernels.get((body, dtype, form, plain, counted, residual_dtype, activation))
        if found is not None:
            return found
        return self._load(Variant(body, dtype, form, plain, counted, residual_dtype, activation))

    def _load(self, variant: Variant) -> Kernel:
        driver = self.driver
        with _lock, self:
            if variant not in self._kernels:
                name, code = compile.image(variant, self.cc)
                # A stream being captured forbids loading to threads that don't say that it is no part of the graph.
                mode = check(
                    *driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
                )
                try:
                    status, module = driver.cuModuleLoadData(code)
                    if status in REFUSALS:
                        version = check(*driver.cuDriverGetVersion())
                        its = f"{version // 1000}.{version % 1000 // 10}"
                        raise RuntimeError(
                            f"the NVIDIA driver, for CUDA {its}, can't load what the compiler made ({status.name}): "
                            "update the driver, or pip install 'numba-cuda[cu12]'"
                        )
                    check(status)
                    function = check(*driver.cuModuleGetFunction(module, name))
                finally:
                    check(*driver.cuThreadExchangeStreamCaptureMode(mode))
                self._kernels[variant] = Kernel(self, function, compile.packer(variant))
        return self._kernels[variant]


def device(ordinal: int) -> Device:
    found = _devices.get(ordinal)
    if found is None:
        with _lock:
            if ordinal not in _devices:
                _devices[ordinal] = Device(ordinal)
            found = _devices[ordinal]
    return found


def device_of(address: int) -> int:
    """The number of the GPU that has this address."""
    driver = api()
    wanted = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    check(*driver.cuInit(0))
    return int(check(*driver.cuPointerGetAttribute(wanted, address)))

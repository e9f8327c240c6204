"""A GPU for tests on a machine without one: `cuda.bindings` as it is, over a driver of ours (c/cuda_stub.c).

Launches run the kernels' PTX over host memory (`ptx`), with all its checks. For another test file::

    pytest_plugins = ["tests.backends.cuda.gpu_stub"]

    def test_something(gpu):
        gpu.allow(x, y)  # NumPy arrays; what else a kernel touches is a fault
        ...  # whatever launches on device 0

A launch ends before its call returns. Its fault becomes CUDA_ERROR_LAUNCH_FAILED, and at the end the test's error.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdrop.backends.cuda import compile, driver
from fastdrop.backends.cuda.compile import Capability, Variant

from ...cases import ROOT
from . import ptx

SOURCE = ROOT / "tests" / "c" / "cuda_stub.c"
SONAME = "libcuda.so.1"
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-pthread", f"-Wl,-soname,{SONAME}")
REAL_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
LAUNCH_FAILED = 719
HOPPER: Capability = (9, 0)


class _Launch(ctypes.Structure):
    """launch_t of cuda_stub.c."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("device", ctypes.c_uint64),
        ("image", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint64 * 3),
        ("block", ctypes.c_uint64 * 3),
        ("shared", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_void_p),
        ("parameter_bytes", ctypes.c_uint64),
    )


_on_launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))
_on_call = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@dataclass
class Launch:
    """What came to the driver, and what its kernel executed."""

    device: int
    variant: Variant
    cc: Capability
    ptx: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    parameters: bytes
    thread: int
    executed: Counter[str]  # warp instructions, by opcode


class Images:
    """PTX in the place of machine code, compiled once for all tests and workers, and while nothing changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for file in folder.glob("*.ptx"):
            if compile._fingerprint() not in file.name:
                file.unlink(missing_ok=True)
        self._kept: dict[tuple[Variant, Capability], tuple[bytes, bytes]] = {}
        self.of: dict[bytes, tuple[Variant, Capability]] = {}

    def __call__(self, variant: Variant, cc: Capability) -> tuple[bytes, bytes]:
        """`compile.image`."""
        found = self._kept.get((variant, cc))
        if found is None:
            file = self._folder / f"{variant}-{cc[0]}{cc[1]}-{compile._fingerprint()}.ptx"
            if not file.exists():
                text = compile.ptx(variant, cc).encode()
                own = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
                own.write_bytes(text)
                own.replace(file)
            text = file.read_bytes()
            found = self._kept[variant, cc] = compile.entry(text), text
            self.of[text] = variant, cc
        return found


class Gpu:
    """The stub driver of a test. It has one device, an H100's in compute capability and size, until `install`."""

    LAUNCHING = frozenset({"cuCtxGetCurrent", "cuCtxPushCurrent", "cuCtxPopCurrent", "cuLaunchKernel"})

    def __init__(self, library: Any, images: Images) -> None:
        self._library, self._images = library, images
        self._callbacks: list[Any] = []
        self.install(HOPPER)

    def install(self, *capabilities: Capability, sms: int = 132) -> None:
        """A new driver with these devices, on which nothing is loaded, allowed or counted yet."""
        self._library.stub_reset()
        driver._devices.clear()
        self.launches: list[Launch] = []
        self.faults: list[BaseException] = []
        self.executes = True  # whether launches run, or are recorded alone
        self._find: Callable[[], Iterable[Any]] = tuple
        self._allowed: list[list[np.ndarray]] = [[] for _ in capabilities]
        for major, minor in capabilities:
            self._library.stub_add_device(major, minor, sms)
        self._library.stub_on_launch(self._keep(_on_launch(self._launched)))

    # ---- memory ----

    def allow(self, *arrays: np.ndarray, device: int = 0) -> None:
        """Kernels on the device may access these too; write where NumPy may."""
        self._allowed[device] += arrays
        for start, end in ptx.Memory(arrays).intervals(writeable=False).T.tolist():
            self._library.stub_add_memory(start, end - start, device)

    def forget(self) -> None:
        """No kernel may access anything."""
        self._allowed = [[] for _ in self._allowed]
        self._library.stub_forget_memory()

    def allow_from(self, find: Callable[[], Iterable[np.ndarray]]) -> None:
        """At each launch kernels may access what ``find`` returns as well: arrays that the test doesn't make itself."""
        self._find = find

    # ---- what is called ----

    @property
    def calls(self) -> dict[str, int]:
        """The driver's functions that were called, and how often."""
        library = self._library
        counts = {library.stub_name(at).decode(): library.stub_calls(at) for at in range(library.stub_function_count())}
        return {name: count for name, count in counts.items() if count}

    def on_call(self, act: Callable[[str], None]) -> None:
        """Whenever a function of the driver is called, on the thread that calls it. Mustn't raise."""
        self._library.stub_on_call(self._keep(_on_call(lambda name: act(name.decode()))))

    def fail(self, function: str, status: int) -> None:
        """Calls of a driver's function return this status; 0 ends that."""
        assert self._library.stub_fail(function.encode(), status) == 0, function

    def capture(self, now: bool) -> None:
        """A stream is being captured, or no longer."""
        self._library.stub_set_capturing(now)

    @property
    def depth(self) -> int:
        """Contexts on this thread's stack."""
        return int(self._library.stub_stack_depth())

    @property
    def capture_mode(self) -> int:
        """This thread's: 0 global, 1 thread-local, 2 relaxed."""
        return int(self._library.stub_capture_mode())

    def retained(self, device: int) -> int:
        """How often its primary context was retained."""
        return int(self._library.stub_retained(device))

    # ---- inside ----

    def _keep(self, callback: Any) -> Any:
        self._callbacks.append(callback)
        return callback

    def _launched(self, pointer: Any) -> int:
        try:
            self._launch(pointer.contents)
        except BaseException as error:  # C has no exceptions
            self.faults.append(error)
            return LAUNCH_FAILED
        return 0

    def _launch(self, raw: _Launch) -> None:
        variant, cc = self._images.of[raw.image]
        launch = Launch(
            int(raw.device),
            variant,
            cc,
            raw.image.decode(),
            tuple(raw.grid),
            tuple(raw.block),
            int(raw.shared),
            int(raw.stream),
            ctypes.string_at(raw.parameters, raw.parameter_bytes),
            threading.get_ident(),
            Counter(),
        )
        self.launches.append(launch)
        if self.executes:
            assert launch.grid[1:] == launch.block[1:] == (1, 1), launch
            machine = ptx.Machine([*self._allowed[launch.device], *self._find()])
            launch.executed = machine.launch(launch.ptx, launch.grid[0], launch.block[0], launch.parameters)


def _library(folder: Path) -> Any:
    """The stub, built, loaded and taken for the driver; skips where that can't be."""
    pytest.importorskip("numba_cuda", reason="needs numba-cuda")
    bindings = pytest.importorskip("cuda.bindings.driver", reason="needs cuda.bindings")
    if not sys.platform.startswith("linux"):
        pytest.skip("the stub driver is for Linux")
    if any(map(os.path.exists, REAL_DRIVERS)):
        pytest.skip("there is a real driver, which the stub would hide")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("the stub driver needs a C compiler")
    file = folder / SONAME
    subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(file)], check=True)
    library = ctypes.CDLL(str(file))  # from here on glibc finds it by its SONAME
    library.stub_name.restype = ctypes.c_char_p
    library.stub_calls.restype = ctypes.c_ulong
    library.stub_add_memory.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    library.stub_on_launch.argtypes = (ctypes.c_void_p,)
    library.stub_on_call.argtypes = (ctypes.c_void_p,)
    library.stub_reset()
    before = library.cuDriverGetVersion(ctypes.byref(ctypes.c_int()))
    bindings.cuDriverGetVersion()
    at = [library.stub_name(i) for i in range(library.stub_function_count())].index(b"cuDriverGetVersion")
    if library.stub_calls(at) < 2 or before:
        pytest.skip("cuda.bindings has already loaded another libcuda")
    return library


@pytest.fixture(scope="session")
def stub_driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Images]:
    """The library and the images. What is loaded stays so: later tests of the process have a driver without a GPU."""
    own = tmp_path_factory.getbasetemp()
    cache = getattr(request.config, "cache", None)
    images = Path(cache.mkdir("fastdrop-ptx")) if cache else own
    return _library(own), Images(images)


@pytest.fixture
def gpu(stub_driver: tuple[Any, Images], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A driver with a GPU, until the test ends; then one with none."""
    library, images = stub_driver
    monkeypatch.setattr(driver, "_devices", {})
    monkeypatch.setattr(compile, "image", images)
    gpu = Gpu(library, images)
    yield gpu
    library.stub_reset()
    if gpu.faults:
        raise gpu.faults[0]


@pytest.fixture
def recorded(gpu: Gpu) -> Gpu:
    """The driver records launches and doesn't run them: addresses need not be any."""
    gpu.executes = False
    return gpu

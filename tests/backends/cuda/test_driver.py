"""Tests the driver module over a stub driver: contexts, loading, threads, errors; and the stub itself."""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastdrop.backends.cuda import compile, driver
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.backends.cuda.compile import Variant
from fastdrop.core.installing import how_to_install

from ...cases import TENTH, run_python
from .launching import AFFINE, KEPT, OFFSET, SEED, STREAM, WORDS, X, Y, draw, forward, parameters

pytest_plugins = ["tests.backends.cuda.gpu_stub"]

INVALID_CONTEXT = "CUDA_ERROR_INVALID_CONTEXT"


@pytest.fixture
def two(recorded):
    recorded.install((9, 0), (8, 0))
    recorded.executes = False
    return recorded


def context_of(device):
    api = driver.api()
    return driver.check(*api.cuDevicePrimaryCtxRetain(driver.check(*api.cuDeviceGet(device))))


def calls_of(gpu, action):
    before = gpu.calls
    action()
    return {name: count - before.get(name, 0) for name, count in gpu.calls.items() if count != before.get(name, 0)}


# ---- contexts and devices ----


def test_launch_pushes_a_context_only_if_another_is_current(two):
    api = driver.api()
    draw(device=0)
    draw(device=1)
    assert calls_of(two, draw) == dict.fromkeys(two.LAUNCHING, 1)
    assert two.depth == 0
    driver.check(*api.cuCtxPushCurrent(context_of(1)))
    assert calls_of(two, draw) == dict.fromkeys(two.LAUNCHING, 1)
    assert calls_of(two, lambda: draw(device=1)) == {"cuCtxGetCurrent": 1, "cuLaunchKernel": 1}
    with ThreadPoolExecutor(1) as pool:  # a thread without a context, as autograd's may be
        pool.submit(lambda: draw(device=1)).result()
    two.fail("cuLaunchKernel", 1)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        draw()
    assert two.depth == 1
    assert int(driver.check(*api.cuCtxGetCurrent())) == int(context_of(1))
    assert [launch.device for launch in two.launches] == [0, 1, 0, 0, 1, 1]


def test_device_of_an_address(gpu):
    gpu.install((9, 0), (8, 0))
    here, there, nowhere = (np.zeros(100, np.float32) for _ in range(3))
    gpu.allow(here)
    gpu.allow(there, device=1)
    assert [driver.device_of(a.ctypes.data + 396) for a in (here, there)] == [0, 1]
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        driver.device_of(nowhere.ctypes.data)


# ---- loading ----


def test_a_variant_is_loaded_once_on_each_device(two):
    for _ in range(2):
        draw()
        forward()
        draw(device=1)
    assert [(launch.device, launch.cc) for launch in two.launches] == [(0, (9, 0)), (0, (9, 0)), (1, (8, 0))] * 2
    assert two.calls["cuModuleLoadData"] == 3
    assert [two.retained(device) for device in (0, 1)] == [1, 1]


@pytest.mark.parametrize("known", [True, False], ids=["known devices", "new devices"])
def test_many_threads_load_a_variant_once(two, known):
    for number, cc in enumerate(((9, 0), (8, 0))):
        compile.image(Variant("draw_words"), cc)
        if known:
            driver.device(number)
    begin = threading.Barrier(8)

    def hold(name):
        if name in ("cuModuleLoadData", "cuDevicePrimaryCtxRetain"):
            time.sleep(0.1)  # so that others come to find nothing there

    def work(i):
        begin.wait()
        for _ in range(5):
            draw(device=i % 2)

    two.on_call(hold)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert two.calls["cuModuleLoadData"] == 2
    assert [two.retained(device) for device in (0, 1)] == [1, 1]
    assert len(two.launches) == 40


def test_loading_is_no_part_of_a_graph_that_is_captured(recorded):
    order = []
    recorded.on_call(lambda name: order.append((name, recorded.capture_mode)))
    recorded.capture(True)
    recorded.fail("cuModuleLoadData", 200)
    with pytest.raises(RuntimeError, match=r"driver, for CUDA 13\.0, can't load .*CUDA_ERROR_INVALID_IMAGE.*: update"):
        draw()
    assert (recorded.capture_mode, recorded.depth) == (0, 0)
    recorded.fail("cuModuleLoadData", 0)
    draw()
    assert recorded.capture_mode == 0
    of_interest = [(name, mode) for name, mode in order if "Module" in name or name == "cuLaunchKernel"]
    loading = ("cuModuleLoadData", 2)
    assert of_interest == [loading, loading, ("cuModuleGetFunction", 2), ("cuLaunchKernel", 0)]


def test_nothing_waits_or_copies(recorded):
    draw()
    forward()
    numba_cuda.masked_affine_at(0, STREAM, 0, X, Y, WORDS, 0, 3, 4, 5, *AFFINE)
    numba_cuda.dilate_bits_at(0, STREAM, X, Y, 2, 3, 5, 2)
    numba_cuda.count_bits_at(0, STREAM, WORDS, 7, KEPT)
    once = {"cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain"}
    loading = {"cuThreadExchangeStreamCaptureMode", "cuModuleLoadData", "cuModuleGetFunction"}
    assert recorded.calls.keys() == once | loading | recorded.LAUNCHING
    with pytest.raises(RuntimeError, match="not found"):
        driver.api().cuCtxSynchronize()


def test_threads_do_not_mix_their_parameters(recorded):
    """All have laid out their parameters before any of them launches."""
    count, cut = 6, TENTH | 1  # whose last 1 lies in the last group
    draw()
    laid_out = threading.Barrier(count)

    def hold(name):
        if name == "cuLaunchKernel":  # before it reads them
            laid_out.wait(timeout=60)

    def work(i):
        numba_cuda.draw_bits_at(0, i, WORDS + 4 * i, i, 32 * i, 1000 + i, SEED + i, OFFSET + i, cut + 2 * i)

    recorded.launches.clear()
    recorded.on_call(hold)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))
    launches = sorted(recorded.launches, key=lambda launch: launch.stream)
    assert [parameters(launch) for launch in launches] == [
        [WORDS + 4 * i, i, 32 * i, 1000 + i, SEED + i, 0, OFFSET + i, cut + 2 * i, 8] for i in range(count)
    ]
    assert len({launch.thread for launch in launches}) == count


# ---- errors ----


@pytest.mark.parametrize(
    "function",
    [
        "cuInit",
        "cuDeviceGet",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
        "cuCtxGetCurrent",
        "cuCtxPushCurrent",
        "cuCtxPopCurrent",
        "cuThreadExchangeStreamCaptureMode",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuLaunchKernel",
    ],
)
def test_errors_have_the_drivers_names(recorded, function):
    recorded.fail(function, 999)
    with pytest.raises(RuntimeError, match="the CUDA driver reports CUDA_ERROR_UNKNOWN"):
        draw()
    recorded.fail(function, 0)
    draw()  # and all is well again


def test_devices_that_are_not_there_or_too_old(recorded):
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_DEVICE"):
        draw(device=1)
    recorded.install((7, 0))
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5 or later, and this one has 7\.0"):
        draw()
    assert recorded.retained(0) == 0


# ---- what is missing ----


def test_available(gpu):
    assert numba_cuda.unavailable() is None
    assert numba_cuda.describe() == "CUDA, 1 GPU"
    gpu.install((9, 0), (8, 0))
    assert numba_cuda.unavailable() is None
    assert numba_cuda.describe() == "CUDA, 2 GPUs"
    gpu.install((7, 0), (6, 1))
    assert "compute capability 7.5 or later, and this one has 7.0" in numba_cuda.unavailable()


def test_unavailable_without_packages(gpu, monkeypatch):
    with monkeypatch.context() as patch:
        find_spec = importlib.util.find_spec
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba_cuda" else find_spec(name))
        assert driver.unavailable() == f"numba-cuda is not installed: {how_to_install('cuda')}"
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    wanted = rf"cuda\.bindings is not installed \(.+\): {re.escape(how_to_install('cuda'))}"
    assert re.fullmatch(wanted, str(driver.unavailable()))


def test_unavailable_without_a_device(gpu):
    gpu.fail("cuInit", 804)
    assert re.search("CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE.*nvidia-smi", str(driver.unavailable()))
    gpu.fail("cuInit", 0)
    assert driver.unavailable() is None
    gpu.install()
    assert re.search("CUDA_ERROR_NO_DEVICE.*nvidia-smi", str(driver.unavailable()))


WITHOUT_LIBRARY = """
import fastdrop as fd
from fastdrop.backends.cuda import driver
print(driver.unavailable())
print(fd.backends.active_name())
"""


def test_unavailable_without_libcuda(stub_driver):
    """Another process: in this one the stub is loaded."""
    result = run_python(WITHOUT_LIBRARY)
    assert result.returncode == 0, result.stderr
    reason, taken = result.stdout.splitlines()
    if "libcuda" not in reason:
        pytest.skip("there is a libcuda")
    assert reason == "there is no NVIDIA driver (libcuda): install one, then its GPU can be used"
    assert taken != "cuda"


# ---- the stub itself: else the tests above prove nothing ----


def test_stub_refuses_what_a_driver_refuses(two):
    name, code = compile.image(Variant("draw_words"), (9, 0))
    draw(device=0)
    draw(device=1)
    api = driver.api()

    def launch():
        return api.cuLaunchKernel(function, 1, 1, 1, 128, 1, 1, 0, 0, 0, 0)[0].name

    driver.check(*api.cuCtxPushCurrent(context_of(0)))
    function = driver.check(*api.cuModuleGetFunction(driver.check(*api.cuModuleLoadData(code)), name))
    assert launch() == "CUDA_ERROR_INVALID_VALUE"  # no parameters
    two.capture(True)
    assert api.cuModuleLoadData(code)[0].name == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    driver.check(*api.cuCtxPushCurrent(context_of(1)))
    assert launch() == INVALID_CONTEXT
    driver.check(*api.cuCtxPopCurrent())
    driver.check(*api.cuCtxPopCurrent())
    assert launch() == INVALID_CONTEXT


def test_faults_reach_the_test(gpu):
    """Of a kernel that writes where nothing was allowed."""
    with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
        draw(n=32)
    (fault,) = gpu.faults
    gpu.faults.clear()
    with pytest.raises(Exception, match="outside of the memory allowed"):
        raise fault

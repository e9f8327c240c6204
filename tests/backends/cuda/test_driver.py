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
from fastdrop.core.checks import FLOAT16, FLOAT64

from ...cases import TENTH, run_python
from .launching import AFFINE, KEPT, OFFSET, SEED, SEED_AT, STREAM, WORDS, X, Y, draw, forward, parameters

pytest_plugins = ["tests.backends.cuda.gpu_stub"]


# ---- contexts and devices ----


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


def test_launch_without_a_context_pushes_one_and_pops_it(recorded):
    draw()
    assert recorded.depth == 0
    assert calls_of(recorded, draw) == dict.fromkeys(recorded.LAUNCHING, 1)
    assert recorded.depth == 0
    assert len(recorded.launches) == 2


def test_launch_in_the_right_context_neither_pushes_nor_pops(recorded):
    draw()
    api = driver.api()
    driver.check(*api.cuCtxPushCurrent(context_of(0)))
    assert calls_of(recorded, draw) == {"cuCtxGetCurrent": 1, "cuLaunchKernel": 1}
    assert recorded.depth == 1
    assert int(driver.check(*api.cuCtxGetCurrent())) == int(context_of(0))


def test_launch_in_another_devices_context_leaves_it_current(two):
    api = driver.api()
    draw(device=0)
    draw(device=1)
    driver.check(*api.cuCtxPushCurrent(context_of(1)))
    assert calls_of(two, draw) == dict.fromkeys(two.LAUNCHING, 1)
    assert two.depth == 1
    assert int(driver.check(*api.cuCtxGetCurrent())) == int(context_of(1))
    assert [launch.device for launch in two.launches] == [0, 1, 0]


def test_contexts_are_popped_where_a_launch_fails(recorded):
    draw()
    recorded.fail("cuLaunchKernel", 1)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        draw()
    assert recorded.depth == 0


def test_each_device_has_its_own_module_for_its_own_compute_capability(two):
    for _ in range(2):
        for device in (0, 1):
            draw(device=device)
    assert [(launch.device, launch.cc) for launch in two.launches] == [(0, (9, 0)), (1, (8, 0))] * 2
    assert two.calls["cuModuleLoadData"] == 2
    assert [two.retained(device) for device in (0, 1)] == [1, 1]


def test_device_of_an_address(gpu):
    gpu.install((9, 0), (8, 0))
    here, there, nowhere = (np.zeros(100, np.float32) for _ in range(3))
    gpu.allow(here)
    gpu.allow(there, device=1)
    assert [driver.device_of(a.ctypes.data + 396) for a in (here, there)] == [0, 1]
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        driver.device_of(nowhere.ctypes.data)


# ---- loading ----


def test_a_variant_is_loaded_once(recorded):
    for _ in range(3):
        draw()
        forward()
        forward(dtype=FLOAT64)
        forward(affine=(1.0, 0.0, 0.0))
    assert recorded.calls["cuModuleLoadData"] == 4
    assert recorded.calls["cuDevicePrimaryCtxRetain"] == 1


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
    draw()
    assert recorded.capture_mode == 0
    of_interest = [(name, mode) for name, mode in order if "Module" in name or name == "cuLaunchKernel"]
    assert of_interest == [("cuModuleLoadData", 2), ("cuModuleGetFunction", 2), ("cuLaunchKernel", 0)]


def test_capture_mode_returns_where_loading_fails(recorded):
    recorded.fail("cuModuleLoadData", 200)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_IMAGE"):
        draw()
    assert recorded.capture_mode == 0
    assert recorded.depth == 0
    recorded.fail("cuModuleLoadData", 0)
    draw()
    assert len(recorded.launches) == 1


def test_nothing_waits_or_copies(recorded):
    draw()
    forward()
    numba_cuda.masked_affine_at(0, STREAM, FLOAT16, X, Y, WORDS, 0, 3, 4, 5, *AFFINE, kept_at=KEPT)
    numba_cuda.gaussian_multiply_at(0, STREAM, FLOAT16, X, Y, 0, 100, SEED, OFFSET, 0.5, seed_at=SEED_AT)
    numba_cuda.dilate_bits_at(0, STREAM, X, Y, 2, 3, 5, 2)
    numba_cuda.count_bits_at(0, STREAM, WORDS, 7, KEPT)
    once = {"cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain"}
    loading = {"cuThreadExchangeStreamCaptureMode", "cuModuleLoadData", "cuModuleGetFunction"}
    assert recorded.calls.keys() == once | loading | recorded.LAUNCHING


# ---- threads ----


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


def test_a_thread_without_a_context_can_launch(recorded):
    """As autograd's may be."""
    draw()
    driver.check(*driver.api().cuCtxPushCurrent(context_of(0)))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(draw).result()
    assert len(recorded.launches) == 2


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


def test_device_that_is_not_there(recorded):
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_DEVICE"):
        draw(device=1)


@pytest.mark.parametrize("cc", [(7, 0), (6, 1)])
def test_device_that_is_too_old(recorded, cc):
    recorded.install(cc)
    with pytest.raises(RuntimeError, match=rf"compute capability 7\.5 or later, and this one has {cc[0]}\.{cc[1]}"):
        draw()
    assert recorded.retained(0) == 0


# ---- what is missing ----


def test_available(gpu):
    assert driver.unavailable() is None
    assert driver.count() == 1
    assert numba_cuda.unavailable() is None
    assert numba_cuda.describe() == "CUDA, 1 GPU"
    gpu.install((9, 0), (8, 0))
    assert numba_cuda.unavailable() is None
    assert numba_cuda.describe() == "CUDA, 2 GPUs"


@pytest.mark.parametrize("missing", ["numba", "numba_cuda"])
def test_unavailable_without_numba_cuda(gpu, monkeypatch, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    assert driver.unavailable() == "numba-cuda is not installed: pip install 'fastdrop[cuda]'"


def test_unavailable_without_cuda_bindings(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert re.fullmatch(
        r"cuda\.bindings is not installed \(.+\): pip install 'fastdrop\[cuda\]'", str(driver.unavailable())
    )


def test_unavailable_without_a_device(gpu):
    gpu.install()
    reason = str(driver.unavailable())
    assert "CUDA_ERROR_NO_DEVICE" in reason
    assert "nvidia-smi" in reason


def test_unavailable_where_the_driver_fails(gpu):
    gpu.fail("cuInit", 804)
    reason = str(driver.unavailable())
    assert "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE" in reason
    assert "nvidia-smi" in reason
    gpu.fail("cuInit", 0)
    assert driver.unavailable() is None


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


# ---- the stub itself ----


def test_stub_refuses_a_launch_in_another_context(two):
    """Else the tests above prove nothing."""
    name, code = compile.image(Variant("draw_words"), (9, 0))
    draw(device=0)
    draw(device=1)
    api = driver.api()

    def launch():
        return api.cuLaunchKernel(function, 1, 1, 1, 128, 1, 1, 0, 0, 0, 0)[0].name

    driver.check(*api.cuCtxPushCurrent(context_of(0)))
    function = driver.check(*api.cuModuleGetFunction(driver.check(*api.cuModuleLoadData(code)), name))
    assert launch() == "CUDA_ERROR_INVALID_VALUE"  # no parameters
    driver.check(*api.cuCtxPushCurrent(context_of(1)))
    assert launch() == "CUDA_ERROR_INVALID_CONTEXT"
    driver.check(*api.cuCtxSetCurrent(0))
    driver.check(*api.cuCtxPopCurrent())
    assert launch() == "CUDA_ERROR_INVALID_CONTEXT"


def test_stub_refuses_to_load_while_a_stream_is_captured(recorded):
    draw()
    api = driver.api()
    code = compile.image(Variant("draw_words"), (9, 0))[1]
    recorded.capture(True)
    driver.check(*api.cuCtxPushCurrent(context_of(0)))
    assert api.cuModuleLoadData(code)[0].name == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"


def test_faults_reach_the_test(gpu):
    """Of a kernel that writes where nothing was allowed."""
    with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
        draw(n=32)
    (fault,) = gpu.faults
    gpu.faults.clear()
    with pytest.raises(Exception, match="outside of the memory allowed"):
        raise fault


def test_waiting_and_copying_are_counted(recorded):
    draw()
    api = driver.api()
    api.cuCtxSynchronize()
    api.cuMemcpyDtoH(np.empty(4, np.uint8).ctypes.data, WORDS, 4)
    assert recorded.calls.keys() >= {"cuCtxSynchronize", "cuMemcpyDtoH"}

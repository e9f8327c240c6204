"""The NumPy API for arrays on a GPU, without a GPU: a stand-in for CuPy, and the real kernels in the interpreter."""

from __future__ import annotations

import contextlib
import pickle
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import fastdrop as fd

pytest_plugins = ["tests.backends.cuda.gpu_stub"]

STREAM = 0x70


class Array:
    """As much of a CuPy array as is used: memory of a device, here the host's."""

    def __init__(self, own: np.ndarray, stream: int | None = STREAM) -> None:
        self.own, self._stream = own, stream
        self.device = contextlib.nullcontext()

    shape = property(lambda self: self.own.shape)
    dtype = property(lambda self: self.own.dtype)
    nbytes = property(lambda self: self.own.nbytes)

    @property
    def __cuda_array_interface__(self):
        described = self.own.__array_interface__
        strides = None if self.own.flags.c_contiguous else self.own.strides
        return {**described, "strides": strides, "version": 3, "stream": self._stream}

    def get(self):
        return self.own.copy()


Array.__module__ = "cupy"


@pytest.fixture
def cupy(gpu, monkeypatch):
    """A stand-in for the module: ``asarray``, ``empty`` and what the device saw."""

    def asarray(x, **options):
        own = x.copy()
        gpu.allow(own)
        return Array(own, **options)

    def empty(shape, dtype):
        own = np.empty(shape, dtype)
        own.reshape(-1).view(np.uint8)[...] = 0xA5  # what nobody wrote shows
        gpu.allow(own)
        return Array(own)

    module = SimpleNamespace(asarray=asarray, empty=empty, gpu=gpu)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def data(shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


CALLS = {  # call, shape, options beside none
    "dropout": (
        fd.dropout,
        (6, 300),
        (
            {"p": 0.5},
            {"store": "seed"},
            {"noise_shape": (6, 1)},
            {"noise_shape": (1, None)},
            {"noise_shape": (6, 1), "store": "seed"},
            {"scaling": "standard"},
            {"training": False, "scaling": "standard"},
            {"p": 1.0, "store": "seed"},
        ),
    ),
    "dropout of a number": (fd.dropout, (), ()),
    "feature_dropout": (fd.feature_dropout, (3, 5, 4, 6), ({"store": "seed"}, {"scaling": "standard"})),
    "feature_dropout, channels last": (partial(fd.feature_dropout, channel_axis=-1), (3, 4, 6, 5), ()),
    "alpha_dropout": (fd.alpha_dropout, (6, 50), ({"store": "seed"},)),
    "feature_alpha_dropout": (fd.feature_alpha_dropout, (3, 5, 4, 6), ({"store": "seed"},)),
    "variational_dropout": (partial(fd.variational_dropout, time_axis=0), (5, 3, 20), ({"store": "seed"},)),
    "drop_connect": (fd.drop_connect, (17, 20), ()),
    "stochastic_depth, row": (partial(fd.stochastic_depth, mode="row"), (40, 3, 2), ()),
    "stochastic_depth, batch": (partial(fd.stochastic_depth, mode="batch"), (4, 3, 5), ()),
    "drop_block, one axis": (partial(fd.drop_block, block_size=3), (3, 2, 40), ()),
    "drop_block": (partial(fd.drop_block, block_size=2), (3, 2, 7, 9), ()),
    "drop_block, three axes": (partial(fd.drop_block, block_size=(1, 2, 9)), (2, 2, 3, 4, 5), ()),
    "gaussian_dropout": (fd.gaussian_dropout, (5, 43), ()),
}
calls = pytest.mark.parametrize(("op", "shape", "ways"), CALLS.values(), ids=CALLS)


def assert_is_the_cpus(cupy, op, x, **options):
    """Output, mask and gradient, bit for bit."""
    options = {"p": 0.3, "rng": 5, **options}
    expected, expected_mask = op(x, **options)
    y, mask = op(cupy.asarray(x), **options)
    assert type(y) is Array
    assert y.own.dtype == x.dtype
    assert y.own.tobytes() == expected.tobytes(), options
    assert type(mask) is type(expected_mask)
    assert mask == expected_mask, options
    dy = x[::-1].copy() if x.ndim else x
    assert fd.dropout_backward(cupy.asarray(dy), mask).own.tobytes() == fd.dropout_backward(dy, expected_mask).tobytes()


@calls
def test_results_are_the_cpus(cupy, op, shape, ways):
    """Nothing waits for the GPU but DropBlock, which counts in the array's own method."""
    for options in ({}, *ways):
        assert_is_the_cpus(cupy, op, np.asarray(data(shape)), **options)
    assert {launch.stream for launch in cupy.gpu.launches} <= {STREAM}
    assert not [name for name in cupy.gpu.calls if "Synchronize" in name or "Memcpy" in name or "Alloc" in name]
    if shape:
        assert_is_the_cpus(cupy, op, data((0, *shape[1:])))


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["dropout", "alpha_dropout", "drop_block", "gaussian_dropout"])
def test_other_dtypes(cupy, name, kind):
    op, shape, _ = CALLS[name]
    assert_is_the_cpus(cupy, op, data(shape, pytest.importorskip("ml_dtypes").bfloat16 if kind == "bfloat16" else kind))


@calls
def test_everything_and_nothing_is_dropped(cupy, op, shape, ways):
    x = cupy.asarray(np.full(shape, np.inf, np.float32))
    if op is not fd.gaussian_dropout:
        y, mask = op(x, p=1.0, rng=5)
        assert not np.atleast_1d(y.own).view(np.uint32).any()
        assert mask == op(x.own, p=1.0, rng=5)[1]
        assert not np.atleast_1d(fd.dropout_backward(x, mask).own).view(np.uint32).any()
    launched = len(cupy.gpu.launches)
    for undrawn in ({"p": 0.0}, {"p": 0.3, "training": False}):
        y, mask = op(x, rng=5, **undrawn)
        assert y is x
        assert mask is None
    assert len(cupy.gpu.launches) == launched


@calls
def test_out(cupy, op, shape, ways):
    x, out = cupy.asarray(np.asarray(data(shape))), cupy.asarray(np.zeros(shape, np.float32))
    source = x.own.copy()
    expected, expected_mask = op(source, p=0.3, rng=5)
    y, mask = op(x, p=0.3, rng=5, out=out)
    assert y is out
    assert np.array_equal(out.own, expected)
    assert op(x, p=0.0, out=out)[0] is out
    assert np.array_equal(out.own, source)
    assert op(x, p=0.3, rng=5, out=x)[0] is x
    assert np.array_equal(x.own, expected)
    assert fd.dropout_backward(x, mask, out=x) is x
    assert np.array_equal(x.own, fd.dropout_backward(expected, expected_mask))


@calls
def test_bad_arguments_are_refused_as_in_memory(cupy, op, shape, ways):
    x, name = cupy.asarray(np.asarray(data(shape))), "w" if op is fd.drop_connect else "x"
    for error, pattern, arguments in (
        (ValueError, "^p, the drop probability", {"p": 1.5}),
        (TypeError, "^rng must be None", {"rng": "seed"}),
        (TypeError, f"^out must be an array on the GPU, as {name} is, but got ndarray", {"out": np.zeros(shape)}),
        (ValueError, f"^out must have {name}'s shape", {"out": cupy.asarray(data((2, 2)))}),
    ):
        with pytest.raises(error, match=pattern):
            op(x, **{"p": 0.3, **arguments})
    with pytest.raises(TypeError, match=f"^{name} must have dtype float32, .*, but got int64"):
        op(cupy.asarray(np.zeros(shape, np.int64)), p=0.3)
    if len(shape) > 1:
        with pytest.raises(ValueError, match=f"^{name} must be C-contiguous on a GPU, but got strides"):
            op(Array(data(shape).T.copy().T), p=0.3)
    assert not cupy.gpu.launches


def test_noise_needs_no_memory_of_a_gpu(cupy):
    """Made by hand, or for an array in memory, it serves one on a GPU."""
    x = data((5, 43))
    y, noise = fd.gaussian_dropout(x, 0.3, rng=5)
    assert np.array_equal(fd.apply_mask(cupy.asarray(x), noise).own, y)
    assert np.array_equal(fd.apply_mask(cupy.asarray(x), fd.GaussianNoise(5, 0, x.shape, 0.3)).own, y)
    with pytest.raises(ValueError, match=r"^mask must have the shape of x, \(4, 6\), but got noise of shape \(5, 43\)"):
        fd.apply_mask(cupy.asarray(data((4, 6))), noise)


def test_masks_stay_there_and_come_back_when_looked_at(cupy):
    x = data((6, 300))
    _, mask = fd.dropout(cupy.asarray(x), 0.3, rng=5)
    _, expected = fd.dropout(x, 0.3, rng=5)
    assert type(mask.words) is Array
    assert mask.nbytes == expected.nbytes
    assert mask.kept == expected.kept
    assert np.array_equal(mask.to_bool(), expected.to_bool())
    assert repr(mask) == repr(expected)
    assert pickle.loads(pickle.dumps(mask)) == expected


def test_streams(cupy):
    fd.dropout(cupy.asarray(data(100), stream=None), 0.3)
    fd.dropout(cupy.asarray(data(100), stream=2), 0.3)
    assert [launch.stream for launch in cupy.gpu.launches] == [0, 2]


# ---- bad input ----


def refused(kind, pattern, *arguments, **options):
    with pytest.raises(kind, match=pattern):
        fd.dropout(*arguments, **options)


def test_bad_arrays(cupy):
    x = cupy.asarray(data((4, 6)))
    refused(TypeError, r"^x must have dtype float32, .*, but got int64", cupy.asarray(np.arange(4)))
    refused(ValueError, r"^x must be C-contiguous on a GPU, but got strides", Array(data((4, 6)).T))
    refused(TypeError, r"^out must be an array on the GPU, as x is, but got ndarray", x, out=data((4, 6)))
    refused(TypeError, r"^out must have x's dtype, float32, but got", x, out=cupy.asarray(data((4, 6), np.float64)))
    refused(ValueError, r"^out must have x's shape, \(4, 6\), but got \(6, 4\)", x, out=cupy.asarray(data((6, 4))))
    frozen = cupy.asarray(data((4, 6)))
    frozen.own.flags.writeable = False
    refused(ValueError, r"^out must be writeable", x, out=frozen)
    shared = cupy.asarray(data(20))
    overlapping = Array(shared.own[:10]), Array(shared.own[5:15])
    refused(ValueError, r"^out must be x itself or not share memory", overlapping[0], out=overlapping[1])
    refused(ValueError, r"^p, the drop probability", x, 1.5)
    refused(ValueError, r"^noise_shape must", x, 0.5, noise_shape=(2, 6))
    refused(ValueError, r"^scaling must be one of", x, scaling="other")
    refused(ValueError, r"^store must be one of", x, store="other")
    refused(TypeError, r"^rng must be None", x, rng="seed")
    assert not cupy.gpu.launches


def test_bad_masks(cupy):
    x = cupy.asarray(data((4, 6)))
    with pytest.raises(TypeError, match=r"^mask must be of an array on the GPU, or a SeededMask"):
        fd.apply_mask(x, fd.draw_mask((4, 6), 0.5))
    with pytest.raises(
        TypeError, match=r"^mask must be a PackedMask, a SeededMask, a GaussianNoise or None, but got int"
    ):
        fd.apply_mask(x, 3)
    with pytest.raises(ValueError, match=r"^mask must have the shape of x"):
        fd.apply_mask(x, fd.dropout(cupy.asarray(data((4, 5))), 0.5)[1])


def test_arrays_on_different_gpus(cupy):
    cupy.gpu.install((9, 0), (9, 0))
    x, out = (Array(data(100)) for _ in range(2))
    cupy.gpu.allow(x.own, device=0)
    cupy.gpu.allow(out.own, device=1)
    refused(ValueError, r"^x, out and mask must lie on one GPU, but got GPUs 0, 1", x, 0.5, out=out, store="seed")


@pytest.mark.parametrize("kind", ["torch", "jax", "builtins"])
def test_arrays_of_others(cupy, kind):
    other = type("Other", (Array,), {"__module__": kind, "is_cuda": True})(data(4))
    refused(
        TypeError, r"fastdrop\.torch\.dropout takes those" if kind == "torch" else r"of CuPy or Numba, but got", other
    )


def test_arrays_that_only_dlpack_knows(cupy):
    other = SimpleNamespace(__dlpack_device__=lambda: (2, 0))
    refused(TypeError, r"^x on a GPU must be an array of CuPy or Numba, but got types\.SimpleNamespace", other)


def test_arrays_in_memory_that_dlpack_knows_are_ndarrays():
    assert fd.dropout(np.ones(8, np.float32).view(np.ndarray), 0.5, rng=1)[0].shape == (8,)
    torch = pytest.importorskip("torch")
    assert type(fd.dropout(torch.ones(8), 0.5, rng=1)[0]) is np.ndarray

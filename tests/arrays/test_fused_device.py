"""The fused ops for arrays on a GPU, without a GPU: stand-ins for arrays, and the kernels of the reference."""

from __future__ import annotations

import ctypes
import inspect
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.arrays import device
from fastdrop.backends import reference
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.backends.primitives import PRIMITIVES as TABLE

from ..cases import DTYPES, assert_same_bits
from .test_bad_input import refused
from .test_device import Array as CupyArray

STREAM = 0x70
PRIMITIVES = [f"{what}_{way}" for what in ("pointwise", "norm", "softmax") for way in ("forward", "backward")]


class Gpu:
    """A CUDA backend over the host's memory: what is not of an array that it made is not found."""

    def __init__(self):
        self.arrays, self.calls = [], []
        for name in ("draw_bits", *PRIMITIVES):
            setattr(self, f"{name}_at", partial(self._call, name))

    def keep(self, own):
        self.arrays.append(own)
        return own

    def _call(self, name, device, stream, *arguments):
        self.calls.append((name, device, stream))
        values = [
            self._found(value) if parameter.is_array else value
            for parameter, value in zip(TABLE[name].parameters, arguments, strict=True)
        ]
        getattr(reference, name)(*values)

    def _found(self, address):
        if address == 0:
            return None
        (own,) = (array for array in self.arrays if array.ctypes.data == address)
        return (own.view(np.uint16) if own.dtype.kind == "V" else own).reshape(-1)

    def device_of(self, address):
        return 0

    def fill_at(self, device, stream, address, word, count):
        ctypes.memmove(address, bytes(np.full(count, word, np.uint32)), 4 * count)

    def copy_at(self, device, stream, to, source, size):
        ctypes.memmove(to, source, size)

    def empty(self, shape, dtype, device, stream):
        return NumbaArray(self.keep(np.full(shape, 7, dtype)), self)

    def strided_affine_at(self, place, dtype, arrays, position, axes, affine):
        n = int(np.prod([extent for extent, _ in axes]))
        reference.masked_affine(dtype, *map(self._found, arrays), position, 1, 1, n, *affine)

    def dropout_forward_at(self, device, stream, dtype, x, y, words, *rest):
        reference.dropout_forward(dtype, self._found(x), self._found(y), self._found(words), *rest)


class NumbaArray(CupyArray):
    stream = STREAM

    def __init__(self, own, gpu):
        super().__init__(own)
        self.gpu = gpu

    def __getitem__(self, index):
        return type(self)(self.own[index], self.gpu)


class FullArray(NumbaArray):
    """With what CuPy's can do beyond."""

    def astype(self, dtype):
        return type(self)(self.gpu.keep(self.own.astype(dtype)), self.gpu)


NumbaArray.__module__ = "numba"
FullArray.__module__ = "cupy"


@pytest.fixture
def gpu(monkeypatch):
    """``there(x)`` is an array on the GPU with x's numbers."""
    gpu = Gpu()

    def ascontiguousarray(x, dtype):
        return FullArray(gpu.keep(np.array(x.own, dtype, order="C")), gpu)

    cupy = SimpleNamespace(
        empty=lambda shape, dtype: FullArray(gpu.keep(np.full(shape, 7, dtype)), gpu),
        where=lambda mask, a, b: FullArray(np.where(mask.own, a, b), gpu),
        broadcast_to=lambda x, shape: FullArray(np.broadcast_to(x.own, shape), gpu),
        ascontiguousarray=ascontiguousarray,
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(device, "cuda_backend", lambda: gpu)
    gpu.there = lambda x: x if x is None else FullArray(gpu.keep(np.array(x, order="C")), gpu)
    gpu.by_numba = lambda x: x if x is None else NumbaArray(gpu.keep(np.array(x, order="C")), gpu)
    return gpu


def numbers(*shape, dtype="float32", seed=0):
    return next(d for d in DTYPES if d.name == dtype).numbers(shape, seed)


X, OTHER, COLUMNS = numbers(6, 33), numbers(6, 33, seed=1), numbers(33, seed=2)
HALF = numbers(6, 33, dtype="bfloat16")
MASK = np.random.default_rng(0).random((1, 33)) < 0.8
CALLS = {
    "dropout_add": (fd.dropout_add, {"x": X, "residual": OTHER}, {}),
    "dropout_add, mixed": (fd.dropout_add, {"x": HALF, "residual": OTHER}, {}),
    "bias_dropout_add": (fd.bias_dropout_add, {"x": X, "bias": COLUMNS, "residual": OTHER}, {}),
    "bias_dropout_add, mixed": (
        fd.bias_dropout_add,
        {"x": HALF, "bias": COLUMNS.astype(HALF.dtype), "residual": OTHER},
        {},
    ),
    "relu": (fd.bias_act_dropout, {"x": X, "bias": COLUMNS}, {"activation": "relu"}),
    "gelu": (fd.bias_act_dropout, {"x": X, "bias": COLUMNS.astype(np.float64)}, {}),
    "swiglu_dropout": (fd.swiglu_dropout, {"gate": X, "up": OTHER}, {}),
    "layer_norm": (
        fd.dropout_add_layer_norm,
        {"x": HALF, "residual": OTHER, "weight": COLUMNS, "bias": COLUMNS, "x_bias": COLUMNS},
        {},
    ),
    "rms_norm": (fd.dropout_add_rms_norm, {"x": X, "residual": None, "weight": COLUMNS}, {}),
    "softmax": (fd.softmax_dropout, {"scores": X, "attn_mask": MASK}, {"scale": 0.5, "causal": True}),
    "softmax, floats": (fd.softmax_dropout, {"scores": X, "attn_mask": OTHER}, {}),
}
calls = pytest.mark.parametrize(("op", "arrays", "options"), CALLS.values(), ids=CALLS)
MODES = {
    "bits": {},
    "seed": {"store": "seed"},
    "all": {"p": 1.0},
    "evaluation": {"training": False},
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_the_stand_in_is_called_as_the_backend_is(name):
    own, contract = (
        inspect.signature(call).parameters for call in (getattr(numba_cuda, f"{name}_at"), getattr(reference, name))
    )
    assert list(own) == ["device", "stream", *contract]


@calls
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_results_are_the_cpus(gpu, op, arrays, options, mode):
    options = {"p": 0.3, "rng": 5, **options, **mode}
    with fd.use_backend("numpy"):
        *expected, expected_saved = op(**arrays, **options)
        down = [(expected[0] + 1).astype(result.dtype) for result in expected]
        gradients = expected_saved.backward(*down)._asdict()
    *results, saved = op(**{name: gpu.there(array) for name, array in arrays.items()}, **options)
    for result, other in zip(results, expected, strict=True):
        assert type(result) is FullArray
        assert_same_bits(result.own, other)
    assert type(saved.mask) is type(expected_saved.mask)
    assert saved.mask == expected_saved.mask
    assert (saved.nbytes, repr(saved)) == (expected_saved.nbytes, repr(expected_saved))
    for name, gradient in saved.backward(*map(gpu.there, down))._asdict().items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            assert_same_bits(gradient.own, gradients[name], name)
    assert {(device, stream) for _, device, stream in gpu.calls} == {(0, STREAM)}


@calls
def test_in_place(gpu, op, arrays, options):
    if "norm" in op.__name__:
        with pytest.raises(TypeError, match="out"):
            op(**arrays, **options, out=X)
        return
    over = "residual" if "residual" in arrays else next(iter(arrays))
    with fd.use_backend("numpy"):
        expected, expected_saved = op(**arrays, p=0.3, rng=5, **options)
        gradients = expected_saved.backward(expected)._asdict()
    there = {name: gpu.there(array) for name, array in arrays.items()}
    result, saved = op(**there, p=0.3, rng=5, **options, out=there[over])
    assert result is there[over]
    assert_same_bits(result.own, expected)
    for name, gradient in saved.backward(gpu.there(expected))._asdict().items():
        assert_same_bits(gradient.own, gradients[name], name)


@calls
def test_empty_arrays(gpu, op, arrays, options):
    for shape in ((0, 4), (3, 0)):
        data = {"attn_mask": None}
        for name, array in arrays.items():
            if array is not None and name != "attn_mask":
                data[name] = gpu.there(np.zeros(shape if array.ndim == 2 else shape[1:], array.dtype))
        data = {name: data.get(name) for name in arrays}
        *results, saved = op(**data, p=0.3, **options)
        assert all(result.shape == shape for result in results)
        for name, gradient in saved.backward(*results)._asdict().items():
            assert gradient is None or (gradient.shape == data[name].shape and not gradient.own.any())


def test_arrays_of_numba_of_the_types_that_kernels_take(gpu):
    for name in ("bias_dropout_add", "relu", "swiglu_dropout", "rms_norm", "softmax, floats"):
        op, arrays, options = CALLS[name]
        with fd.use_backend("numpy"):
            *expected, expected_saved = op(**arrays, p=0.3, rng=5, **options)
            gradients = expected_saved.backward(expected[0])._asdict()
        *results, saved = op(**{k: gpu.by_numba(array) for k, array in arrays.items()}, p=0.3, rng=5, **options)
        for result, other in zip(results, expected, strict=True):
            assert type(result) is NumbaArray
            assert_same_bits(result.own, other)
        for of, gradient in saved.backward(gpu.by_numba(expected[0]))._asdict().items():
            assert gradient is None or type(gradient) is NumbaArray
            if gradient is not None:
                assert_same_bits(gradient.own, gradients[of])


def test_arrays_of_numba_that_would_have_to_be_changed_are_refused(gpu):
    x, bias = gpu.by_numba(X), gpu.by_numba(COLUMNS.astype(np.float16))
    with refused(TypeError, "bias must have dtype float32 as an array of Numba, but got float16"):
        fd.bias_dropout_add(x, bias, x)
    for mask in (MASK, OTHER.astype(np.float64)):
        with refused(TypeError, "attn_mask must have dtype float32 as an array of Numba, but got", mask.dtype):
            fd.softmax_dropout(x, attn_mask=gpu.by_numba(mask))
    with refused(ValueError, "attn_mask must have shape (1, 6, 33) as an array of Numba, but got (1, 6, 1)"):
        fd.softmax_dropout(x, attn_mask=gpu.by_numba(OTHER[:, :1]))


def test_weights_may_change_before_backward(gpu):
    for there in (gpu.there, gpu.by_numba):
        x, weight, ones = there(X), there(COLUMNS), there(np.ones_like(X))
        for op in (fd.bias_act_dropout, partial(fd.dropout_add_rms_norm, x)):
            *_, saved = op(x, weight, p=0.3, rng=5)
            before = saved.backward(ones)
            weight.own += 1
            for gradient, other in zip(saved.backward(ones), before, strict=True):
                assert (gradient is None) == (other is None)
                if gradient is not None:
                    assert_same_bits(gradient.own, other.own)


def test_bad_input_is_refused(gpu):
    x = gpu.there(X)
    with refused(TypeError, "residual must be on a GPU, as x is, but got one in memory"):
        fd.dropout_add(x, X)
    with refused(TypeError, "residual must be in memory, as x is, but got one on a GPU"):
        fd.dropout_add(X, x)
    with refused(TypeError, "attn_mask must be on a GPU, as scores is, but got one in memory"):
        fd.softmax_dropout(x, attn_mask=MASK)
    with refused(TypeError, "attn_mask, unless boolean, must have dtype", "got int64"):
        fd.softmax_dropout(x, attn_mask=gpu.there(np.ones((6, 33), np.int64)))
    with refused(ValueError, "attn_mask must be C-contiguous on a GPU"):
        fd.softmax_dropout(x, attn_mask=FullArray(np.ones((33, 6), np.bool_).T, gpu))
    with refused(ValueError, "bias must have an element for each column of x, shape (33,), but got (6,)"):
        fd.bias_act_dropout(x, gpu.there(X[:, 0]))
    line = gpu.keep(np.zeros(300, np.float32))
    residual, out = (FullArray(line[start : start + 198].reshape(6, 33), gpu) for start in (0, 5))
    with refused(ValueError, "out must be residual itself or not share memory with it"):
        fd.dropout_add(x, residual, out=out)
    with refused(ValueError, "out must be x itself or not share memory with it"):
        fd.dropout_add(out, x, out=residual)
    assert not gpu.calls
    _, saved = fd.dropout_add(x, x, 0.5)
    with refused(TypeError, "dy must be on a GPU, as mask is, but got one in memory"):
        saved.backward(X)
    _, saved = fd.swiglu_dropout(X, X, 0.5, store="seed")
    with refused(TypeError, "dy must be in memory, as gate is, but got one on a GPU"):
        saved.backward(x)

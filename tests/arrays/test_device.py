"""The NumPy API for arrays on a GPU, without a GPU: stand-ins for arrays, and the primitives of the reference.

One test runs the real kernels, in the interpreter of tests/backends/cuda.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import pickle
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.arrays import device
from fastdrop.backends import reference
from fastdrop.backends.cuda import launch
from fastdrop.backends.primitives import PRIMITIVES

from ..cases import DTYPES, assert_same_bits
from .test_bad_input import KINDS, refused

pytest_plugins = ["tests.backends.cuda.gpu_stub"]

STREAM = 0x70


class Array:
    """A stand-in for an array on a GPU. Its memory is the host's."""

    def __init__(self, own, memory, stream=STREAM):
        self.own, self.memory, self._stream = own, memory, stream

    shape = property(lambda self: self.own.shape)
    dtype = property(lambda self: self.own.dtype)
    nbytes = property(lambda self: self.own.nbytes)

    def __getitem__(self, index):
        return type(self)(self.own[index], self.memory)

    @property
    def __cuda_array_interface__(self):
        described = self.own.__array_interface__
        strides = None if self.own.flags.c_contiguous else self.own.strides
        return {**described, "strides": strides, "version": 3, "stream": self._stream}


class CupyArray(Array):
    device = contextlib.nullcontext()

    def get(self):
        return self.own.copy()

    def astype(self, dtype):
        return CupyArray(self.memory.keep(self.own.astype(dtype)), self.memory)


class NumbaArray(Array):
    stream = STREAM

    def copy_to_host(self):
        return self.own.copy()


CupyArray.__module__, NumbaArray.__module__ = "cupy", "numba"


class Memory:
    """Makes arrays, and stands in for the module cupy. `keep` registers the memory that kernels may use."""

    def __init__(self, allow=lambda own: None):
        self.allow = allow

    def keep(self, own):
        self.allow(own)
        return own

    def cupy(self, x, **more):
        return x if x is None else CupyArray(self.keep(np.array(x, order="C")), self, **more)

    def numba(self, x):
        return x if x is None else NumbaArray(self.keep(np.array(x, order="C")), self)

    def empty(self, shape, dtype):
        own = np.empty(shape, dtype)
        own.reshape(-1).view(np.uint8)[...] = 0xA5  # what nobody wrote shows
        return CupyArray(self.keep(own), self)

    def where(self, mask, a, b):
        return CupyArray(np.where(mask.own, a, b), self)

    def broadcast_to(self, x, shape):
        return CupyArray(np.broadcast_to(x.own, shape), self)

    def ascontiguousarray(self, x, dtype):
        return self.cupy(x.own.astype(dtype))


ON_GPUS = [name for name, primitive in PRIMITIVES.items() if not primitive.cpu_only]


class Gpu(Memory):
    """A CUDA backend that runs the reference. It finds only arrays that were registered."""

    def __init__(self):
        super().__init__(lambda own: self.arrays.append(own))
        self.arrays, self.calls, self.devices = [], [], {}
        for name in ON_GPUS:
            setattr(self, f"{name}_at", partial(self._run, name))
        self.backend = self

    def _run(self, name, device, stream, *arguments):
        self.calls.append((name, device, stream))
        values = [
            self._found(value) if parameter.is_array else value
            for parameter, value in zip(PRIMITIVES[name].parameters, arguments, strict=True)
        ]
        getattr(reference, name)(*values)

    def _found(self, address):
        if address == 0:
            return None
        own = next(array for array in self.arrays if 0 <= address - array.ctypes.data < array.nbytes)
        first = (address - own.ctypes.data) // own.itemsize
        return (own.view(np.uint16) if own.dtype.kind == "V" else own).reshape(-1)[first:]

    def device_of(self, address):
        return self.devices.get(address, 0)

    def fill_at(self, device, stream, address, word, count):
        ctypes.memmove(address, bytes(np.full(count, word, np.uint32)), 4 * count)

    def copy_at(self, device, stream, to, source, size):
        ctypes.memmove(to, source, size)

    def count_bits_at(self, device, stream, words, count, kept):
        self._found(kept)[0] += np.unpackbits(self._found(words)[:count].view(np.uint8)).sum()

    def strided_affine_at(self, place, dtype, arrays, position, axes, affine):
        x, y, words = map(self._found, arrays)
        cells = np.full((), position)
        for extent, stride in axes:
            cells = np.add.outer(cells, stride * np.arange(extent))
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[cells.reshape(-1)]
        packed = np.packbits(np.pad(bits, (0, -bits.size % 32)), bitorder="little").view(np.uint32)
        self.calls.append(("strided_affine", *place))
        reference.masked_affine(dtype, x, y, packed, 0, 1, 1, bits.size, *affine)


@pytest.fixture
def there(monkeypatch):
    """``there.cupy(x)`` and ``there.numba(x)`` are arrays on the GPU with x's numbers."""
    gpu = Gpu()
    gpu.empty = lambda shape, dtype, *on: (
        NumbaArray(gpu.keep(np.full(shape, 7, dtype)), gpu) if on else Memory.empty(gpu, shape, dtype)
    )
    monkeypatch.setitem(sys.modules, "cupy", gpu)
    monkeypatch.setattr(device, "cuda_backend", lambda: gpu)
    return gpu


def numbers(*shape, dtype="float32", seed=0):
    return next(d for d in DTYPES if d.name == dtype).numbers(shape, seed)


X, OTHER, COLUMNS = numbers(6, 33), numbers(6, 33, seed=1), numbers(33, seed=2)
HALF = numbers(6, 33, dtype="bfloat16")
MASK = np.random.default_rng(0).random((1, 33)) < 0.8
SEED, ALL, EVALUATION = {"store": "seed"}, {"p": 1.0}, {"training": False}
ROWS, BOX = {"part": fd.Part((9, 33), (2, 0), X.shape)}, {"part": fd.Part((9, 50), (2, 7), X.shape)}
PLANES = {"part": fd.Part((5, 4, 40), (1, 2, 0), (3, 2, 40))}
PLAIN = {  # call, array, ways to call it
    "dropout": (
        fd.dropout,
        {"x": X},
        (
            *({}, SEED, ALL, {**ALL, **SEED}, {"noise_shape": (1, None)}, {"noise_shape": (6, 1), **SEED}),
            *(ROWS, BOX, {**ROWS, **SEED}, {**BOX, **SEED}, {"noise_shape": (1, None), **BOX}),
        ),
    ),
    "dropout, standard": (partial(fd.dropout, scaling="standard"), {"x": X}, ({}, EVALUATION, {**EVALUATION, **ALL})),
    "dropout, bfloat16": (fd.dropout, {"x": HALF}, ({}, SEED, ALL)),
    "dropout of a number": (fd.dropout, {"x": numbers()}, ({},)),
    "feature_dropout": (fd.feature_dropout, {"x": numbers(3, 5, 4, 6)}, ({}, SEED, {"channel_axis": -1})),
    "alpha_dropout": (fd.alpha_dropout, {"x": X}, ({}, SEED, ALL)),
    "stochastic_depth": (fd.stochastic_depth, {"x": numbers(40, 3, 2)}, ({"mode": "row"}, {"mode": "batch"})),
    "drop_block, one axis": (partial(fd.drop_block, block_size=3), {"x": numbers(3, 2, 40)}, ({}, ALL, PLANES)),
    "drop_block": (partial(fd.drop_block, block_size=(1, 2, 9)), {"x": numbers(2, 2, 3, 4, 5)}, ({},)),
    "gaussian_dropout": (fd.gaussian_dropout, {"x": X}, ({}, ROWS, BOX)),
}
MODES = ({}, SEED, ALL, EVALUATION)
FUSED = {
    "dropout_add": (fd.dropout_add, {"x": X, "residual": OTHER}, (*MODES, BOX, {**BOX, **SEED})),
    "dropout_add, mixed": (fd.dropout_add, {"x": HALF, "residual": OTHER}, MODES),
    "bias_dropout_add": (fd.bias_dropout_add, {"x": X, "bias": COLUMNS, "residual": OTHER}, MODES),
    "relu": (partial(fd.bias_act_dropout, activation="relu"), {"x": X, "bias": COLUMNS}, MODES),
    "gelu": (fd.bias_act_dropout, {"x": X, "bias": COLUMNS.astype(np.float64)}, MODES),
    "swiglu_dropout": (fd.swiglu_dropout, {"gate": X, "up": OTHER}, MODES),
    "layer_norm": (
        fd.dropout_add_layer_norm,
        {"x": HALF, "residual": OTHER, "weight": COLUMNS, "bias": COLUMNS, "x_bias": COLUMNS},
        MODES,
    ),
    "rms_norm": (fd.dropout_add_rms_norm, {"x": X, "residual": None, "weight": COLUMNS}, MODES),
    "softmax": (partial(fd.softmax_dropout, scale=0.5, causal=True), {"scores": X, "attn_mask": MASK}, MODES),
    "softmax, floats": (fd.softmax_dropout, {"scores": X, "attn_mask": OTHER}, ({},)),
}
CALLS = PLAIN | FUSED


def each(calls):
    return pytest.mark.parametrize(("op", "arrays", "ways"), calls.values(), ids=calls)


def run(op, arrays, options, at=lambda x: x):
    """Returns the results, the mask or Saved, and the gradients by name. ``at`` brings arrays to the GPU."""
    *results, kept = op(**{name: at(array) for name, array in arrays.items()}, **{"p": 0.3, "rng": 5, **options})
    down = [at(np.asarray(getattr(result, "own", result) + 1, result.dtype)) for result in results]
    if isinstance(kept, fd.Saved):
        return results, kept, kept.backward(*down)._asdict()
    return results, kept, {"x": fd.dropout_backward(down[0], kept)}


def assert_same(of_gpu, of_cpu, kind):
    """Compares bit for bit. The results on the GPU must be of type ``kind``."""
    assert len(of_gpu) == len(of_cpu)
    for result, expected in zip(of_gpu, of_cpu, strict=True):
        assert (result is None) == (expected is None)
        if result is not None:
            assert type(result) is kind
            assert_same_bits(result.own, np.asarray(expected))


def test_the_stand_in_is_called_as_the_backend_is():
    def parameters(call):
        return list(inspect.signature(call).parameters)

    for name in ON_GPUS:
        wanted = ["device", "stream", *parameters(getattr(reference, name))]
        assert parameters(getattr(launch, f"{name}_at"))[: len(wanted)] == wanted, name
    for name in ("device_of", "fill_at", "copy_at", "count_bits_at", "strided_affine_at"):
        wanted = parameters(getattr(Gpu(), name))
        assert parameters(getattr(launch, name))[: len(wanted)] == wanted, name
    assert parameters(launch.empty) == ["shape", "dtype", "device", "stream"]


@each(CALLS)
def test_results_are_the_cpus(there, op, arrays, ways):
    for options in ways:
        with fd.use_backend("numpy"):
            expected, expected_kept, expected_gradients = run(op, arrays, options)
        results, kept, gradients = run(op, arrays, options, there.cupy)
        assert_same(results, expected, CupyArray)
        assert_same(gradients.values(), expected_gradients.values(), CupyArray)
        assert repr(kept) == repr(expected_kept)
        mask, expected_mask = (getattr(k, "mask", k) for k in (kept, expected_kept))
        assert type(mask) is type(expected_mask)
        assert mask == expected_mask
    assert {(device, stream) for _, device, stream in there.calls} == {(0, STREAM)}


@each(CALLS)
def test_empty_arrays(there, op, arrays, ways):
    shape = next(iter(arrays.values())).shape
    for empty in [(0, *shape[1:]), (*shape[:-1], 0)] if shape else []:
        data = {
            name: array if array is None else np.zeros(empty if array.ndim > 1 else empty[-1:], array.dtype)
            for name, array in arrays.items()
            if name != "attn_mask"
        }
        results, _, gradients = run(op, data, ways[0], there.cupy)
        assert all(result.shape == empty for result in results)
        assert all(gradient is None or not gradient.own.any() for gradient in gradients.values())


@each({name: call for name, call in CALLS.items() if "norm" not in name})
def test_out(there, op, arrays, ways):
    over = "residual" if "residual" in arrays else next(iter(arrays))
    with fd.use_backend("numpy"):
        expected, _, expected_gradients = run(op, arrays, ways[0])
    own = {name: there.cupy(array) for name, array in arrays.items()}
    for out in (there.cupy(np.zeros_like(arrays[over])), own[over]):
        result, kept = op(**own, p=0.3, rng=5, **ways[0], out=out)
        assert result is out
        assert_same_bits(out.own, np.asarray(expected[0]))
    dy = there.cupy(np.asarray(expected[0] + 1, expected[0].dtype))
    if isinstance(kept, fd.Saved):
        assert_same(kept.backward(dy), expected_gradients.values(), CupyArray)
    else:
        assert fd.dropout_backward(dy, kept, out=dy) is dy
        assert_same([dy], expected_gradients.values(), CupyArray)


@each({name: call for name, call in PLAIN.items() if name != "dropout, standard"})
def test_what_drops_nothing_is_x_itself(there, op, arrays, ways):
    (array,) = arrays.values()
    x, out = there.cupy(array), there.cupy(np.zeros_like(array))
    for undrawn in ({"p": 0.0}, {"p": 0.3, "training": False}):
        assert op(x, rng=5, **{**ways[0], **undrawn}) == (x, None)
    assert op(x, **{**ways[0], "p": 0.0}, out=out)[0] is out
    assert_same_bits(out.own, x.own)
    assert not there.calls


def test_arrays_of_numba_of_the_types_that_kernels_take(there):
    for name in ("dropout", "drop_block", "bias_dropout_add", "relu", "swiglu_dropout", "rms_norm", "softmax, floats"):
        op, arrays, ways = CALLS[name]
        with fd.use_backend("numpy"):
            expected, _, expected_gradients = run(op, arrays, ways[0])
        results, _, gradients = run(op, arrays, ways[0], there.numba)
        assert_same(results, expected, NumbaArray)
        assert_same(gradients.values(), expected_gradients.values(), NumbaArray)


def test_weights_may_change_before_backward(there):
    for at in (there.cupy, there.numba):
        x, weight, ones = at(X), at(COLUMNS), at(np.ones_like(X))
        for op in (fd.bias_act_dropout, partial(fd.dropout_add_rms_norm, x)):
            *_, saved = op(x, weight, p=0.3, rng=5)
            before = saved.backward(ones)
            weight.own += 1
            assert_same(saved.backward(ones), [g if g is None else g.own for g in before], type(x))


def test_masks_stay_there_and_come_back_when_looked_at(there):
    _, mask = fd.dropout(there.cupy(X), 0.3, rng=5)
    _, expected = fd.dropout(X, 0.3, rng=5)
    assert type(mask.words) is CupyArray
    assert (mask.nbytes, mask.kept) == (expected.nbytes, expected.kept)
    assert np.array_equal(mask.to_bool(), expected.to_bool())
    assert pickle.loads(pickle.dumps(mask)) == expected


def test_noise_and_seeds_need_no_memory_of_a_gpu(there):
    """A mask without words that was made for an array in memory fits an array on a GPU."""
    for draw in (fd.gaussian_dropout, partial(fd.dropout, store="seed")):
        y, kept = draw(X, 0.3, rng=5)
        assert_same([fd.apply_mask(there.cupy(X), kept)], [y], CupyArray)


def test_streams(there):
    for stream in (None, 2):
        fd.dropout(there.cupy(X, stream=stream), 0.3)
    assert [stream for _, _, stream in there.calls] == [0, 2]


def test_the_kernels_give_what_the_cpu_gives(gpu, monkeypatch):
    """No call waits for the GPU. (DropBlock waits in the array's own method.)"""
    memory = Memory(gpu.allow)
    monkeypatch.setitem(sys.modules, "cupy", memory)
    op, arrays, ways = PLAIN["drop_block"]
    expected, expected_mask, expected_gradients = run(op, arrays, ways[0])
    results, mask, gradients = run(op, arrays, ways[0], memory.cupy)
    assert_same([*results, *gradients.values()], [*expected, *expected_gradients.values()], CupyArray)
    assert mask == expected_mask
    assert {launch.stream for launch in gpu.launches} == {STREAM}
    assert not [name for name in gpu.calls if "Synchronize" in name or "Memcpy" in name or "Alloc" in name]


# ---- bad input ----


def test_bad_arguments_are_refused_as_in_memory(there):
    for call in KINDS.values():
        name, array = next(iter(call.arrays.items()))
        x, other = there.cupy(array), there.cupy(X)
        for error, message, arguments in (
            (ValueError, "p, the drop probability", {"p": 1.5}),
            (TypeError, "rng must be None", {"rng": "seed"}),
            (TypeError, f"out must be an array on the GPU, as {name} is, but got ndarray", {"out": array.copy()}),
            (ValueError, f"out must have {name}'s shape", {"out": other}),
            (TypeError, f"out must have {name}'s dtype, float32", {"out": there.cupy(array.astype(float))}),
            (TypeError, f"{name} must have dtype float32", {name: there.cupy(array.astype(int))}),
            (ValueError, f"{name} must be C-contiguous on a GPU", {name: CupyArray(array.T, there)}),
        ):
            with refused(error, message):
                call(**{name: x, "p": 0.3, **arguments})
    assert not there.calls


def test_bad_arrays_are_refused(there):
    x = there.cupy(X)
    frozen = there.cupy(X)
    frozen.own.flags.writeable = False
    with refused(ValueError, "out must be writeable"):
        fd.dropout(x, out=frozen)
    line = there.keep(np.zeros(300, np.float32))
    first, second = (CupyArray(line[start : start + 198].reshape(6, 33), there) for start in (0, 5))
    with refused(ValueError, "out must be x itself or not share memory with it"):
        fd.dropout(first, out=second)
    with refused(ValueError, "out must be residual itself or not share memory with it"):
        fd.dropout_add(x, first, out=second)
    with refused(ValueError, "out must be x itself or not share memory with it"):
        fd.dropout_add(second, x, out=first)
    with refused(ValueError, "x must be C-contiguous on a GPU, but got strides (132, 4)"):
        fd.dropout(CupyArray(X[:, :5], there))
    with refused(TypeError, "residual must be on a GPU, as x is, but got one in memory"):
        fd.dropout_add(x, X)
    with refused(TypeError, "residual must be in memory, as x is, but got one on a GPU"):
        fd.dropout_add(X, x)
    with refused(TypeError, "attn_mask must be on a GPU, as scores is, but got one in memory"):
        fd.softmax_dropout(x, attn_mask=MASK)
    with refused(TypeError, "attn_mask, unless boolean, must have dtype", "got int64"):
        fd.softmax_dropout(x, attn_mask=there.cupy(np.ones((6, 33), np.int64)))
    with refused(ValueError, "attn_mask must be C-contiguous on a GPU"):
        fd.softmax_dropout(x, attn_mask=CupyArray(np.ones((33, 6), np.bool_).T, there))
    with refused(ValueError, "bias must have an element for each column of x, shape (33,), but got (6,)"):
        fd.bias_act_dropout(x, there.cupy(X[:, 0]))
    there.devices[frozen.own.ctypes.data] = 1
    frozen.own.flags.writeable = True
    with refused(ValueError, "x, out and mask must lie on one GPU, but got GPUs 0, 1"):
        fd.dropout(x, out=frozen)
    assert not there.calls


def test_bad_masks_and_gradients_are_refused(there):
    x, narrow = there.cupy(X), there.cupy(X[:, :5])
    for mask, error, message in (
        (fd.draw_mask(X.shape, 0.5), TypeError, "mask must be of an array on the GPU, or a SeededMask"),
        (3, TypeError, "mask must be a PackedMask, a SeededMask, a GaussianNoise or None, but got int"),
        (fd.dropout(narrow)[1], ValueError, "mask must have the shape of x"),
        (fd.gaussian_dropout(narrow)[1], ValueError, "mask must have the shape of x, (6, 33), but got noise"),
    ):
        with refused(error, message):
            fd.apply_mask(x, mask)
    with refused(TypeError, "mask must be in memory, as x is, or a SeededMask"):
        fd.apply_mask(X, fd.dropout(x)[1])
    with refused(TypeError, "dy must be on a GPU, as mask is, but got one in memory"):
        fd.dropout_add(x, x, 0.5)[1].backward(X)
    with refused(TypeError, "dy must be in memory, as gate is, but got one on a GPU"):
        fd.swiglu_dropout(X, X, 0.5, store="seed")[1].backward(x)


def test_arrays_of_numba_that_would_have_to_be_changed_are_refused(there):
    x = there.numba(X)
    with refused(TypeError, "bias must have dtype float32 as an array of Numba, but got float16"):
        fd.bias_dropout_add(x, there.numba(COLUMNS.astype(np.float16)), x)
    for mask in (MASK, OTHER.astype(np.float64)):
        with refused(TypeError, "attn_mask must have dtype float32 as an array of Numba, but got", mask.dtype):
            fd.softmax_dropout(x, attn_mask=there.numba(mask))
    with refused(ValueError, "attn_mask must have shape (1, 6, 33) as an array of Numba, but got (1, 6, 1)"):
        fd.softmax_dropout(x, attn_mask=there.numba(OTHER[:, :1]))


def test_arrays_of_others_are_refused(there):
    for kind, message in (("torch", "fastdrop.torch.dropout takes those"), ("jax", "CuPy or Numba, but got jax.Other")):
        other = type("Other", (Array,), {"__module__": kind, "is_cuda": True})(X, there)
        with refused(TypeError, message):
            fd.dropout(other)
    with refused(TypeError, "x on a GPU must be an array of CuPy or Numba, but got types.SimpleNamespace"):
        fd.dropout(SimpleNamespace(__dlpack_device__=lambda: (2, 0)))


def test_arrays_in_memory_that_dlpack_knows_are_ndarrays():
    torch = pytest.importorskip("torch")
    assert type(fd.dropout(torch.ones(8), 0.5, rng=1)[0]) is np.ndarray

"""Tests the CUDA primitives, by address, and the NumPy API on a GPU; skipped without one.

`bench/gpu.py` runs this file and test_gpu_torch.py. Neither needs the C extension.
"""

from __future__ import annotations

import itertools
import json
import math
from importlib.resources import files

import numpy as np
import pytest

import fastdrop as fd
from fastdrop import backends
from fastdrop.backends import reference
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.backends.primitives import PRIMITIVES
from fastdrop.core.activations import ACTIVATIONS
from fastdrop.core.random import DROP_ALL, threshold_and_scale

if reason := backends.reason("cuda"):
    pytest.skip(f"no GPU: {reason}", allow_module_level=True)
torch = pytest.importorskip("torch", reason="CUDA tensors come from torch")
if not torch.cuda.is_available():
    pytest.skip("this torch has no CUDA", allow_module_level=True)

from .fused_cases import (
    NO_MASK,
    PAIR,
    ROWS_CASES,
    assert_activations_as_reference,
    assert_case_as_reference,
    assert_fused_as_reference,
    assert_special_numbers_as_reference,
    norm_numbers,
)

STORAGE = (np.float32, np.float64, np.float16, np.uint16)  # by dtype tag
BFLOAT16 = 3
GUARD, POISON = 256, 0xFF  # bytes; NaN in every dtype
SEED, OFFSET = 0x9E3779B97F4A7C15, 0x1_0000_0003
FIRST = (0, 5, (1 << 37) - 1000)  # within a word; so that the word index passes 2**32 midway


class Area:
    """An array's bytes on the GPU, so many past a border of 256, between guards that nobody may write."""

    def __init__(self, content, shift=0):
        whole = np.full(content.nbytes + shift + 2 * GUARD, POISON, np.uint8)
        self._inside = slice(GUARD + shift, GUARD + shift + content.nbytes)
        whole[self._inside] = content.view(np.uint8)
        self._buffer = torch.from_numpy(whole).to("cuda")
        self.address = self._buffer.data_ptr() + GUARD + shift

    def expect(self, content):
        now = self._buffer.cpu().numpy()
        assert np.array_equal(now[self._inside], content.view(np.uint8))
        now[self._inside] = POISON
        assert (now == POISON).all()


def poison(n, storage):
    return np.full(n * np.dtype(storage).itemsize, POISON, np.uint8).view(storage)


def numbers(tag, n):
    x = np.random.default_rng(tag).normal(size=n).astype(np.float32)
    return reference.storage.float32_to_bfloat16(x) if tag == BFLOAT16 else x.astype(STORAGE[tag])


def where():
    return torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def assert_as_reference(primitive, *arguments, shift=0, seed_at=False):
    """A primitive's arrays, bit for bit, with nothing written around them; ``shift`` of data, in elements."""
    values = dict(zip(PRIMITIVES[primitive].names, arguments, strict=True))
    areas = {
        name: Area(x, 0 if x.dtype == np.uint32 else shift * x.itemsize)
        for name, x in values.items()
        if isinstance(x, np.ndarray)
    }
    getattr(reference, primitive)(*arguments)
    options = {}
    if seed_at:
        on_device = Area(np.array([values["seed"]], np.uint64))
        options, values["seed"] = {"seed_at": on_device.address}, 0
    values |= {name: area.address for name, area in areas.items()}
    at = [0 if value is None else value for value in values.values()]
    getattr(numba_cuda, f"{primitive}_at")(*where(), *at, **options)
    for name, area in areas.items():
        area.expect(arguments[list(values).index(name)])


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 33, 1023, 1024, 1025, 4100, 20_011])
@pytest.mark.parametrize("tag", range(4))
def test_dropout_forward(tag, n, shift):
    cut, scale = threshold_and_scale(0.1)
    for first, affine, kept in itertools.product(FIRST, ((scale, 0.0, 0.0), (1.3, -0.25, 0.7)), (True, False)):
        y, words = poison(n, STORAGE[tag]), poison((n + 31) // 32, np.uint32) if kept else None
        drawn = first, n, SEED, OFFSET, cut
        assert_as_reference(
            "dropout_forward", tag, numbers(tag, n), y, words, *drawn, *affine, shift=shift, seed_at=not kept
        )


class OnGpu:
    """Memory and stream for `cuda_cases.fused`."""

    def __init__(self):
        self.stream = torch.cuda.current_stream().cuda_stream
        self.forget()

    def forget(self):
        self._held = {}

    def allow(self, *arrays):
        pass

    def address(self, guarded):
        if id(guarded) not in self._held:
            self._held[id(guarded)] = guarded, torch.from_numpy(guarded._buffer).to("cuda")
        _, there = self._held[id(guarded)]
        return there.data_ptr() + guarded._start

    def fetch(self):
        for guarded, there in self._held.values():
            guarded.array.flags.writeable = True
            guarded._buffer[:] = there.cpu().numpy()


@pytest.mark.parametrize("pair", PAIR)
@pytest.mark.parametrize("name", ROWS_CASES)
def test_fused_primitives(name, pair):
    assert_case_as_reference(OnGpu(), name, pair)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(("pair", "columns"), [("float32", 8), ("float64", 9), ("float16", 16), ("bfloat16", 11)])
def test_fused_activations(activation, pair, columns):
    assert_activations_as_reference(OnGpu(), activation, pair, columns)
    options = {"given": "x input_bias sums", "a": 1.25, "activation": ACTIVATIONS[activation]}
    assert_fused_as_reference(OnGpu(), "pointwise_backward", PAIR[pair], 20, columns, **options)


@pytest.mark.parametrize("pair", PAIR)
def test_fused_special_numbers(pair):
    assert_special_numbers_as_reference(OnGpu(), pair, ACTIVATIONS)


@pytest.mark.parametrize("columns", [1000, 1024, 66_000])
@pytest.mark.parametrize("pair", ["float32", "bfloat16 on float32"])
def test_fused_primitives_on_many_rows(pair, columns):
    """More blocks than a GPU takes at once; the same bits each time."""
    rows = 2**22 // columns
    cases = (
        ("norm_forward", {"given": "input_bias residual weight norm_bias", **norm_numbers(1)}),
        ("norm_backward", {"given": "dresidual_out weight dx dresidual sums", **norm_numbers(1)}),
        ("softmax_forward", {"given": "probabilities", "causal": 0, "softmax_scale": 0.5, "a": 1.25, **NO_MASK}),
        ("pointwise_backward", {"given": "x input_bias sums", "a": 1.25, "activation": ACTIVATIONS["gelu"]}),
    )
    for primitive, options in cases:
        first, again = (
            assert_fused_as_reference(OnGpu(), primitive, PAIR[pair], rows, columns, **options) for _ in range(2)
        )
        for output, (_, y, _) in first.items():
            assert np.array_equal(y.view(np.uint8), again[output][1].view(np.uint8)), (primitive, output)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "grid", [(1, 1, 33), (1, 1, 20_011), (24, 25, 1), (1, 9, 24), (4, 3, 33), (3, 2, 513), (2, 5, 512)]
)
@pytest.mark.parametrize("tag", range(4))
def test_masked_affine(tag, grid, shift):
    n, cells = math.prod(grid), grid[0] * grid[2]
    x, words = numbers(tag, n), np.random.default_rng(0).integers(0, 1 << 32, (cells + 7 + 31) // 32, np.uint32)
    for position, affine in itertools.product((0, 7), ((1.25, 0.0, 0.0), (1.3, -0.25, 0.7))):
        y = poison(n, STORAGE[tag])
        assert_as_reference("masked_affine", tag, x, y, words, position, *grid, *affine, shift=shift)


@pytest.mark.parametrize("position", [0, 7, 33])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 1025, 20_011])
def test_draw_bits(n, position):
    cut, _ = threshold_and_scale(0.1)
    for first in FIRST:
        words = np.random.default_rng(n).integers(0, 1 << 32, (position + n + 31) // 32, np.uint32)
        assert_as_reference("draw_bits", words, position, first, n, SEED, OFFSET, cut)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 17, 64, 1025, 20_011])
@pytest.mark.parametrize("tag", range(4))
def test_gaussian_multiply(tag, n, shift):
    for first, sigma in itertools.product((0, 5, (1 << 34) - 1000), (1 / 3, 3.0)):
        x, y = numbers(tag, n), poison(n, STORAGE[tag])
        assert_as_reference(
            "gaussian_multiply", tag, x, y, first, n, SEED, OFFSET, sigma, shift=shift, seed_at=first == 5
        )


def test_millions_of_gaussian_factors():
    """Also by the ways that one draw in 2**25 takes."""
    n = 1 << 26
    x = torch.ones(n, device="cuda")
    numba_cuda.gaussian_multiply_at(*where(), 0, x.data_ptr(), x.data_ptr(), 0, n, SEED, OFFSET, 0.5)
    y = np.ones(n, np.float32)
    reference.gaussian_multiply(0, y, y, 0, n, SEED, OFFSET, 0.5)
    assert np.array_equal(x.cpu().numpy(), y)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (70, 1, 1, 7), (3, 10, 7, 4), (1, 100, 1, 40), (2, 64, 32, 2), (300, 56, 56, 7)]
)
def test_dilate_bits_and_count_them(shape):
    outer, n, inner, block = shape
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, (outer * n * inner + 31) // 32, np.uint32)
    to = poison((outer * (n + block - 1) * inner + 31) // 32, np.uint32)
    source, target, kept = Area(words), Area(to), Area(np.array([2**32 - 1], np.uint64))
    reference.dilate_bits(to, words, *shape)
    numba_cuda.dilate_bits_at(*where(), target.address, source.address, *shape)
    numba_cuda.count_bits_at(*where(), target.address, to.size, kept.address)
    source.expect(words)
    target.expect(to)
    kept.expect(np.array([2**32 - 1 + int(np.bitwise_count(to).sum())], np.uint64))


@pytest.mark.parametrize(("cells", "kept"), [(1000, 0), (25_613_457, 23_052_111)])
@pytest.mark.parametrize("grid", [(1, 1, 20_011), (4, 33, 40), (4, 33, 37)])
@pytest.mark.parametrize("tag", range(4))
def test_scale_of_a_count_on_the_device(tag, grid, cells, kept):
    x, words = numbers(tag, math.prod(grid)), np.random.default_rng(0).integers(0, 1 << 32, 700, np.uint32)
    y = poison(x.size, STORAGE[tag])
    areas, count = (Area(x), Area(y), Area(words)), Area(np.array([kept], np.uint64))
    reference.masked_affine(tag, x, y, words, 3, *grid, cells / kept if kept else 0.0, 0.0, 0.0)
    at = (area.address for area in areas)
    numba_cuda.masked_affine_at(*where(), tag, *at, 3, *grid, float(cells), 0.0, 0.0, kept_at=count.address)
    for area, content in zip(areas, (x, y, words), strict=True):
        area.expect(content)


def test_golden_masks():
    masks = json.loads((files("fastdrop") / "vectors" / "masks.json").read_text())["masks"]
    for mask in [mask for mask in masks if 0 < mask["threshold"] < DROP_ALL]:
        expected = np.array([int(word, 16) for word in mask["words"]], np.uint32)
        area = Area(poison(expected.size, np.uint32))
        seed, offset = int(mask["seed"], 16), int(mask["offset"], 16)
        numba_cuda.draw_bits_at(
            *where(), area.address, 0, 32 * mask["first_word"], 32 * expected.size, seed, offset, mask["threshold"]
        )
        area.expect(expected)


# ---- the NumPy API ----


def arrays():
    kinds = []
    try:
        import cupy

        kinds.append(("cupy", cupy.asarray, lambda x: x.get()))
    except ImportError:
        pass
    from numba import cuda

    kinds.append(("numba", cuda.to_device, lambda x: x.copy_to_host()))
    return kinds


@pytest.mark.parametrize(("to", "back"), [kind[1:] for kind in arrays()], ids=[kind[0] for kind in arrays()])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_device_arrays(dtype, to, back):
    x = np.random.default_rng(0).standard_normal((6, 700)).astype(dtype)
    on_gpu = to(x)
    for options in ({}, {"store": "seed"}, {"noise_shape": (6, 1)}, {"p": 1.0}, {"scaling": "standard"}):
        y, mask = fd.dropout(x, **{"p": 0.3, "rng": 5, **options})
        y_there, mask_there = fd.dropout(on_gpu, **{"p": 0.3, "rng": 5, **options})
        assert type(y_there) is type(on_gpu)
        assert np.array_equal(back(y_there), y)
        assert mask_there == mask
        assert np.array_equal(back(fd.dropout_backward(on_gpu, mask_there)), fd.dropout_backward(x, mask))
    out = to(np.zeros_like(x))
    assert fd.dropout(on_gpu, 0.3, rng=5, out=out)[0] is out
    assert np.array_equal(back(out), fd.dropout(x, 0.3, rng=5)[0])
    assert fd.dropout(on_gpu, 0.0)[0] is on_gpu
    standard = fd.dropout(on_gpu, 0.5, training=False, scaling="standard")[0]
    assert np.array_equal(back(standard), fd.dropout(x, 0.5, training=False, scaling="standard")[0])
    assert np.array_equal(mask_there.to_bool(), mask.to_bool())
    with pytest.raises(TypeError, match="mask must be of an array on the GPU"):
        fd.apply_mask(on_gpu, fd.draw_mask(x.shape, 0.5))


def test_tensors_have_a_face_of_their_own():
    with pytest.raises(TypeError, match=r"fastdrop\.torch\.dropout takes those"):
        fd.dropout(torch.ones(4, device="cuda"), 0.5)

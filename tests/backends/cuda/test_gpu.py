"""Tests the CUDA primitives, by address, and the NumPy API on a GPU; skipped without one.

`bench/gpu.py` runs this file and test_gpu_torch.py. Neither needs the C extension.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import fastdrop as fd
from fastdrop import backends
from fastdrop.backends import reference
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.core.activations import ACTIVATIONS

if reason := backends.reason("cuda"):
    pytest.skip(f"no GPU: {reason}", allow_module_level=True)
torch = pytest.importorskip("torch", reason="CUDA tensors come from torch")
if not torch.cuda.is_available():
    pytest.skip("this torch has no CUDA", allow_module_level=True)

from ...cases import AFFINE, SEED
from .cases import (
    assert_counted,
    assert_dilated_as_reference,
    assert_drawn_as_reference,
    assert_forward_as_reference,
    assert_gaussian_as_reference,
    assert_golden_vectors,
    assert_masked_as_reference,
    assert_rows_as_reference,
    assert_scaled_by_a_count,
)
from .fused_cases import (
    PAIR,
    ROWS_CASES,
    assert_activations_as_reference,
    assert_case_as_reference,
    assert_fused_as_reference,
    assert_special_numbers_as_reference,
)

FIRST = (0, 5, (1 << 37) - 1000)  # within a word; so that the word index passes 2**32 midway


class OnGpu:
    """Memory and stream for `cases.run`."""

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


@pytest.fixture
def gpu():
    return OnGpu()


# ---- plain dropout, bit for bit, and nothing around the arrays is written ----


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 33, 1023, 1024, 1025, 4100, 20_011])
def test_dropout_forward(gpu, dtype, n, shift):
    shifts = shift * dtype.itemsize, shift * dtype.itemsize, 0
    for first, affine, seed_at in itertools.product(FIRST, ("scale", "affine"), (None, SEED)):
        options = {"first": first, "affine": AFFINE[affine], "shifts": shifts, "seed_at": seed_at}
        assert_forward_as_reference(gpu, dtype, n, **options)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "grid", [(1, 1, 33), (1, 1, 20_011), (24, 25, 1), (1, 9, 24), (4, 3, 33), (3, 2, 513), (2, 5, 512)]
)
def test_masked_affine(gpu, dtype, grid, shift):
    shifts = shift * dtype.itemsize, shift * dtype.itemsize, 0
    for position, affine in itertools.product((0, 7), ("scale", "affine")):
        assert_masked_as_reference(gpu, dtype, grid, position=position, affine=AFFINE[affine], shifts=shifts)


@pytest.mark.parametrize("grid", [(1, 1, 20_011), (4, 33, 40), (4, 33, 37)])
def test_scale_of_a_count_on_the_device(gpu, dtype, grid):
    for cells, kept in ((1000, 0), (25_613_457, 23_052_111)):
        assert_scaled_by_a_count(gpu, dtype, grid, cells, kept)


@pytest.mark.parametrize("position", [0, 7, 33])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 1025, 20_011])
def test_draw_bits(gpu, n, position):
    for first in FIRST:
        assert_drawn_as_reference(gpu, n, first=first, position=position)


@pytest.mark.parametrize("shape", [(2, 300, 70, 2, 1), (3, 200_000, 101, 1000, 125), (2, 30_000, 9, 1024, 513)])
def test_draw_rows(gpu, shape):
    for position, first in ((0, 0), (13, 7), (1000, 2**37 - 50)):
        assert_rows_as_reference(gpu, shape, first=first, position=position)


def test_golden_masks(gpu):
    assert_golden_vectors(gpu)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 17, 64, 1025, 20_011])
def test_gaussian_multiply(gpu, dtype, n, shift):
    for first, sigma in itertools.product((0, 5, (1 << 34) - 1000), (1 / 3, 3.0)):
        options = {"first": first, "sigma": sigma, "shifts": (shift * dtype.itemsize, 0), "seed_at": SEED}
        assert_gaussian_as_reference(gpu, dtype, n, **options)


def test_millions_of_gaussian_factors(gpu):
    """Also by the ways that one draw in 2**25 takes."""
    n = 1 << 26
    x, y = torch.ones(n, device="cuda"), np.ones(n, np.float32)
    numba_cuda.gaussian_multiply_at(0, gpu.stream, 0, x.data_ptr(), x.data_ptr(), 0, n, SEED, 0, 0.5)
    reference.gaussian_multiply(0, y, y, 0, n, SEED, 0, 0.5)
    assert np.array_equal(x.cpu().numpy(), y)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (70, 1, 1, 7), (3, 10, 7, 4), (1, 100, 1, 40), (2, 64, 32, 2), (300, 56, 56, 7)]
)
def test_dilate_bits_and_count_them(gpu, shape):
    assert_dilated_as_reference(gpu, *shape)
    assert_counted(gpu, math.prod(shape[:3]), before=2**32 - 1)


# ---- fused primitives ----


@pytest.mark.parametrize("pair", PAIR)
@pytest.mark.parametrize("name", ROWS_CASES)
def test_fused_primitives(gpu, name, pair):
    assert_case_as_reference(gpu, name, pair)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(("pair", "columns"), [("float32", 8), ("float64", 9), ("float16", 16), ("bfloat16", 11)])
def test_fused_activations(gpu, activation, pair, columns):
    assert_activations_as_reference(gpu, activation, pair, columns)
    options = {"given": "x input_bias sums", "activation": ACTIVATIONS[activation]}
    assert_fused_as_reference(gpu, "pointwise_backward", PAIR[pair], 20, columns, **options)


@pytest.mark.parametrize("pair", PAIR)
def test_fused_special_numbers(gpu, pair):
    assert_special_numbers_as_reference(gpu, pair, ACTIVATIONS)


@pytest.mark.parametrize("columns", [1000, 1024, 66_000])
@pytest.mark.parametrize("pair", ["float32", "bfloat16 on float32"])
def test_fused_primitives_on_many_rows(gpu, pair, columns):
    """More blocks than a GPU takes at once; the same bits each time."""
    rows = 2**22 // columns
    cases = (
        ("norm_forward", {"given": "input_bias residual weight norm_bias"}),
        ("norm_backward", {"given": "dresidual_out weight dx dresidual sums"}),
        ("softmax_forward", {"given": "probabilities"}),
        ("pointwise_backward", {"given": "x input_bias sums", "activation": ACTIVATIONS["gelu"]}),
    )
    for primitive, options in cases:
        first, again = (
            assert_fused_as_reference(gpu, primitive, PAIR[pair], rows, columns, **options) for _ in range(2)
        )
        for output, (_, y, _) in first.items():
            assert np.array_equal(y.view(np.uint8), again[output][1].view(np.uint8)), (primitive, output)


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

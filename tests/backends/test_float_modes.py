"""The modes of floating-point arithmetic: how the caller rounds and whether it flushes subnormals to zero."""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import platform
from contextlib import contextmanager

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core import variants
from fastdrop.core.random import keep_scale, threshold_and_scale

from ..cases import DTYPES, VARIANTS, activated, assert_same_bits

MACHINE = platform.machine().lower()
UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}.get(MACHINE)
# (int) -> the register as it was; and sets it. Compilers offer no way to flush subnormals that is the same everywhere.
CODE = {
    "x86_64": bytes.fromhex("0fae5c24f8 8b4424f8 897c24f8 0fae5424f8 c3"),  # stmxcsr, ldmxcsr by the red zone
    "aarch64": bytes.fromhex("01443bd5 00441bd5 e00301aa c0035fd6"),  # mrs x1, fpcr; msr fpcr, x0; mov x0, x1; ret
}
FLUSH = {"x86_64": 0x1F80 | 0x8040, "aarch64": 1 << 24}

pytestmark = pytest.mark.skipif(UPWARD is None or platform.system() != "Linux", reason="modes are set for Linux alone")


@contextmanager
def rounding_upward():
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    assert library.fesetround(UPWARD) == 0
    try:
        yield
    finally:
        library.fesetround(0)


@contextmanager
def flushing():
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(CODE[MACHINE])
    exchange = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    before = exchange(FLUSH[MACHINE])
    try:
        yield
    finally:
        exchange(before)


MODES = {"upward": rounding_upward, "flushing": flushing}
SHAPE = (256, 1024)  # enough for four threads


def arrays(dtype):
    """Ordinary numbers, and subnormal ones in every other column."""
    x = dtype.numbers(SHAPE)
    bits = x.view(dtype.bits)
    bits[:, ::2] = np.random.default_rng(1).integers(1, 1 << dtype.mantissa, (SHAPE[0], SHAPE[1] // 2))
    return x


def plain(x):
    """What is not fused: the same bits on every instruction set in default modes."""
    y, mask = fd.dropout(x, 0.1, rng=3)
    alpha, alpha_mask = fd.alpha_dropout(x, 0.25, rng=3)
    shared, _ = fd.feature_dropout(x, 0.25, rng=3)
    noisy, _ = fd.gaussian_dropout(x, 0.25, rng=3)
    return {
        "dropout": y,
        "words": mask.words,
        "backward": fd.dropout_backward(x, mask),
        "seeded": fd.dropout(x, 0.1, rng=3, store="seed")[0],
        "alpha": alpha,
        "alpha words": alpha_mask.words,
        "shared": shared,
        "gaussian": noisy,
    }


def fused(x):
    line = x[0]
    found = {}
    for name, (*results, saved) in {
        "add": fd.dropout_add(x, x, 0.1, rng=3),
        "gelu": fd.bias_act_dropout(x, line, 0.1, "gelu", rng=3),
        "swiglu": fd.swiglu_dropout(x, x, 0.1, rng=3),
        "norm": fd.dropout_add_layer_norm(x, x, line, line, 0.1, rng=3),
        "softmax": fd.softmax_dropout(x, 0.1, rng=3),
    }.items():
        for i, array in enumerate((*results, *saved.backward(x))):
            if array is not None:
                found[f"{name} {i}"] = array
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "numpy"])
def test_any_number_of_threads_gives_one_threads_bits(name, mode, threads):
    with activated(name):
        for dtype in (DTYPES[0], DTYPES[2]):
            x = arrays(dtype)
            for call in [plain, fused] if name != "numba" and dtype is DTYPES[0] else [plain]:
                fd.set_num_threads(4)
                default = call(x)
                with MODES[mode]():
                    many = call(x)
                    fd.set_num_threads(1)
                    one = call(x)
                fd.set_num_threads(4)
                after = call(x)
                for key, want in one.items():
                    assert_same_bits(many[key], want, (str(dtype), key))
                    assert_same_bits(after[key], default[key], (str(dtype), key, "afterwards"))
                    if "words" in key:
                        assert_same_bits(want, default[key], (str(dtype), key))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flushing_does_the_same_on_every_backend(dtype):
    """float16 keeps its subnormals, which are normal numbers where it is computed; the others lose them."""
    x, found = arrays(dtype)[:3], {}
    for name in VARIANTS:
        try:
            with activated(name), flushing():
                found[name] = fd.dropout(x, 0.1, rng=3)[0], fd.alpha_dropout(x, 0.25, rng=3)[0]
        except pytest.skip.Exception:
            continue
    assert len(found) > 1
    for name, results in found.items():
        for result, want in zip(results, found["numpy"], strict=True):
            assert_same_bits(result, want, name)
    subnormal = np.asarray(found["numpy"][0][:, ::2]).view(dtype.bits)
    assert subnormal.any() == (dtype.name == "float16")


def test_what_is_remembered_does_not_depend_on_the_mode_of_the_first_call():
    cuts = range(1, 1 << 32, (1 << 32) // 997)
    cells, size = (2, 3, 11, 13), (3, 5)
    rates = [i / 1009 for i in range(1, 1009)]

    def found():
        gammas = [variants.blocks.__wrapped__(cells, p, size).gamma for p in rates]  # as if asked for the first time
        return [keep_scale(cut) for cut in cuts], gammas, [variants.affine.__wrapped__("alpha", cut) for cut in cuts]

    want = found()
    assert want[0] == [1.0 / (1.0 - cut / 2.0**32) for cut in cuts]
    assert want[1] == [p * (143 / (15 * 9 * 9)) for p in rates]
    with rounding_upward():
        assert found() == want
        scales = [threshold_and_scale(p)[1] for p in rates]
    threshold_and_scale.cache_clear()
    assert [threshold_and_scale(p)[1] for p in rates] == scales

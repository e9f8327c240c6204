"""Tables and helpers of all tests: variants, dtypes, lengths, probabilities, tolerances, guarded buffers."""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fastdrop as fd
from fastdrop import backends
from fastdrop.core.random import keep_scale, threshold

ROOT = Path(__file__).resolve().parents[1]

HANG_SECONDS = 240  # only to end a hang: no test is about time

# Every backend x instruction set there is; conftest's `variant` skips those that this machine lacks.
VARIANTS = ("numpy", "c-scalar", "c-avx2", "c-avx512", "c-neon", "numba")

# Relative error allowed where a result is compared with float64 arithmetic: two roundings, of the scale and of the
# product. The reference backend is met bit for bit.
TOLERANCE = {"float64": 2.0**-51, "float32": 2.0**-22, "float16": 2.0**-9, "bfloat16": 2.0**-6}

# What comes to that where results of fused kernels, which have transcendental functions and sums in them, are compared
# with float64 arithmetic: of the largest number of a result, whose terms may have cancelled, by the type of arithmetic.
# Errors measured are at most a quarter of it.
FUSED_TOLERANCE = {"float64": 2.0**-47, "float32": 2.0**-20}

SEED, OFFSET = 0x9E3779B97F4A7C15, 0x1_0000_0003

# Borders of byte, word, vector, block (512), chunk (8,192, with a block of lead 8,704), and two thread grains (65,536).
LENGTHS = (0, 1, 7, 8, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1023, 8191, 8192, 8193, 8704, 20_000, 140_001)
GRAIN = 1 << 16
# First cells within a word, within a block, and so that the word index passes 2**32 midway.
FIRSTS = (0, 1, 31, 32, 511, 512, 513, 2**37 - 4096, 2**37 - 4101)
POSITIONS = (0, 1, 7, 8, 31, 32, 33, 500, 512)

P = (0.5, 0.25, 0.75, 0.1, 1 / 3, 0.003, 1e-6, 0.999, 3 / 256)
TENTH = threshold(0.1)
# Thresholds whose last 1 bit lies in the first plane, the first group, the second, and later ones; then both ends.
THRESHOLDS = {f"p={p:.4g}": threshold(p) for p in P} | {"T=1": 1, "T=2**32-1": 2**32 - 1}

AFFINE = {
    "scale": (keep_scale(TENTH), 0.0, 0.0),
    "negative": (-2.0, 0.0, 0.0),
    "affine": (1.3, -0.25, 0.7),
    "shift": (1.0, 0.3, 0.0),
    "filled": (1.25, 0.0, 0.7),  # adding b makes +0 of -0
}

GRIDS = (  # (outer, repeat, inner)
    (1, 1, 1000),
    (3, 1, 70),
    (5, 7, 1),
    (24, 25, 1),
    (1, 9, 24),
    (4, 3, 33),
    (2, 5, 511),
    (3, 2, 513),
    (2, 3, 8193),
    (100, 1000, 3),
    (300, 513, 1),
    (3, 5, 9001),
    (70_001, 2, 1),
    (0, 3, 5),
    (3, 0, 5),
    (3, 5, 0),
)

# First cells of noise: within a tile of 64 cells and 16 counters, and so that the counter passes 2**32 midway.
NOISE_FIRSTS = (0, 1, 15, 16, 63, 64, 2**34 - 1000, 2**37 - 70)
NOISE_END = 2**61
DILATIONS = (  # (outer, n, inner, block)
    (1, 1000, 1, 1),
    (7, 33, 3, 1),
    (1, 1, 1, 7),
    (300, 5, 1, 3),
    (300, 50, 1, 7),
    (90, 50, 56, 7),
    (40, 8, 49, 5),
    (5, 3, 33, 9),
    (2, 31, 32, 2),
    (2, 63, 64, 2),
    (3, 100, 1, 64),
    (3, 100, 1, 65),
    (2, 700, 3, 130),
    (1, 20_000, 1, 1000),
    (2, 5, 9001, 3),
    (1, 3, 20_001, 4),
    (70_001, 1, 1, 2),
    (0, 3, 5, 2),
    (3, 0, 5, 4),
    (3, 0, 5, 1),
    (3, 5, 0, 2),
)


@dataclass(frozen=True)
class Dtype:
    """A storage type as the primitives take it: bfloat16 as uint16."""

    name: str
    tag: int
    storage: type
    bits: type
    exponent: int
    mantissa: int

    def __str__(self) -> str:
        return self.name

    @property
    def public(self) -> np.dtype[Any]:
        """The dtype at the public API."""
        if self.name != "bfloat16":
            return np.dtype(self.storage)
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes").bfloat16)

    @property
    def computed(self) -> type:
        """The type that kernels compute in."""
        return np.float64 if self.name == "float64" else np.float32

    def wide(self, stored: np.ndarray) -> np.ndarray:
        """Stored numbers as float64."""
        values = (stored.astype(np.uint32) << 16).view(np.float32) if self.name == "bfloat16" else stored
        return values.astype(np.float64)

    def narrow(self, values: np.ndarray) -> np.ndarray:
        """Numbers as they are stored. (bfloat16 is truncated, which is good enough for test data.)"""
        if self.name != "bfloat16":
            return values.astype(self.storage)
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    @property
    def itemsize(self) -> int:
        return int(np.dtype(self.storage).itemsize)

    def specials(self) -> np.ndarray:
        """Zeros, infinities, NaNs quiet and signalling with payloads, subnormals, extremes: of both signs."""
        inf, quiet = ((1 << self.exponent) - 1) << self.mantissa, 1 << (self.mantissa - 1)
        smallest_normal, one = 1 << self.mantissa, ((1 << (self.exponent - 1)) - 1) << self.mantissa
        magnitudes = [0, 1, smallest_normal - 1, smallest_normal, one, inf - 1]
        magnitudes += [inf, inf | 1, inf | quiet, inf | quiet | 5]
        sign = 1 << (self.exponent + self.mantissa)
        return np.array([m | s for m in magnitudes for s in (0, sign)], self.bits).view(self.storage)

    def data(self, n: int) -> np.ndarray:
        """n numbers of random bits, special ones first. Read-only."""
        return _data(self)[:n]

    def numbers(self, shape: Any, seed: int = 0) -> np.ndarray:
        """Ordinary numbers of the public dtype."""
        return np.random.default_rng(seed).normal(size=shape).astype(self.public)

    def rounded(self, values: np.ndarray, scale: float) -> np.ndarray:
        """values * scale as specified: computed in the wider type and rounded once."""
        with np.errstate(all="ignore"):
            return (values.astype(self.computed) * self.computed(scale)).astype(values.dtype)


DTYPES = (
    Dtype("float32", 0, np.float32, np.uint32, 8, 23),
    Dtype("float64", 1, np.float64, np.uint64, 11, 52),
    Dtype("float16", 2, np.float16, np.uint16, 5, 10),
    Dtype("bfloat16", 3, np.uint16, np.uint16, 8, 7),
)


@functools.cache
def _data(dtype: Dtype) -> np.ndarray:
    bits = np.random.default_rng(dtype.tag).bytes(8 * GRAIN * dtype.itemsize)
    data = np.frombuffer(bits, dtype.bits).copy().view(dtype.storage)
    data[: dtype.specials().size] = dtype.specials()
    data.flags.writeable = False
    return data


class Guarded:
    """An array in a larger buffer full of NaN, so many bytes past a cache line, with guards on both sides."""

    GUARD = 256
    POISON = 0xFF  # NaN in every dtype

    def __init__(self, n: int, dtype: type, shift: int = 0) -> None:
        size = n * np.dtype(dtype).itemsize
        self._buffer = np.full(size + shift + 2 * self.GUARD + 64, self.POISON, np.uint8)
        self._start = self.GUARD + -(self._buffer.ctypes.data + self.GUARD) % 64 + shift
        self._stop = self._start + size
        self.array = self._buffer[self._start : self._stop].view(dtype)

    @classmethod
    def of(cls, values: np.ndarray, shift: int = 0) -> Guarded:
        guarded = cls(values.size, values.dtype.type, shift)
        guarded.array[:] = values
        return guarded

    @property
    def intact(self) -> bool:
        """Nothing was written outside."""
        outside = self._buffer[: self._start], self._buffer[self._stop :]
        return all((part == self.POISON).all() for part in outside)


def bits_of(array: np.ndarray) -> np.ndarray:
    """The array's bits as integers, so that NaNs and signed zeros compare by their bits."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: object = "") -> None:
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    differ = np.flatnonzero(bits_of(actual) != bits_of(expected))
    if differ.size:
        at = differ[0]
        got, wanted = bits_of(actual)[at], bits_of(expected)[at]
        pytest.fail(f"{what}: {differ.size} of {actual.size} differ, first at {at}: {got:#x}, expected {wanted:#x}")


def assert_close(got: np.ndarray, wanted: np.ndarray, dtype: Dtype, what: object = "", terms: float = 0.0) -> None:
    """float64 numbers equal to the tolerance for fused kernels' results of a dtype; NaN and infinity exactly where they
    are wanted. ``terms``: the sum of the absolute terms of a number, where they may cancel in all numbers."""
    assert got.shape == wanted.shape, what
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(got[~finite], wanted[~finite], err_msg=str(what))
    got, wanted = got[finite], wanted[finite]
    if not wanted.size:
        return
    computed, smallest = np.dtype(dtype.computed).name, 2.0 ** (2 - 2 ** (dtype.exponent - 1) - dtype.mantissa)
    largest = max(np.abs(wanted).max(), terms)
    allowed = TOLERANCE[dtype.name] * np.abs(wanted) + FUSED_TOLERANCE[computed] * largest + smallest
    excess = np.abs(got - wanted) / allowed
    at = np.argmax(np.where(np.isnan(excess), np.inf, excess))
    assert excess[at] <= 1, (
        f"{what}: {got[at]}, expected {wanted[at]}, {excess[at]:.3g} times the error allowed at {at}"
    )


def readable(value: object) -> str:
    """A parameter's part of a test's id."""
    return value.__name__ if isinstance(value, type | ModuleType) else str(value)


@functools.cache
def golden() -> dict[str, Any]:
    text = (importlib.resources.files("fastdrop") / "vectors" / "masks.json").read_text()
    return json.loads(text)


def primitive_modules() -> dict[str, ModuleType]:
    """Each backend's module by name, whether or not it can run here."""
    return {name: importlib.import_module(f"fastdrop.backends.{file}") for name, file in backends.MODULES.items()}


@contextmanager
def activated(name: str) -> Iterator[ModuleType]:
    """Makes a variant the active backend until the block ends. Skips if the variant can't run."""
    backend, _, isa = name.partition("-")
    reason = primitive_modules()[backend].unavailable()
    if reason:
        pytest.skip(f"{name}: {reason}")
    threads = fd.get_num_threads()
    with fd.use_backend(backend):
        module = backends.active()
        before = module.isa() if isa else None
        if isa and isa not in module.usable_isas():
            pytest.skip(f"{name}: no {isa} on this machine, which has {', '.join(module.usable_isas())}")
        if isa:
            module.select_isa(isa)
        try:
            yield module
        finally:
            if isa:
                module.select_isa(before)
            fd.set_num_threads(threads)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter that imports this fastdrop. A hang, also of its children, is a failure."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTDROP_")}
    path = str(Path(fd.__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=clean | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail(f"still not done after {HANG_SECONDS} s: {code}")
    return subprocess.CompletedProcess(code, process.returncode, out, err)


def output_of(code: str, **environment: str) -> str:
    result = run_python(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()

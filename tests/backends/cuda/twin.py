"""The CUDA kernels without a GPU: their bodies in a vocabulary of plain Python, run by Numba's simulator.

A body of `fastdrop.backends.cuda.mask` is a function of its vocabulary. `Vocabulary` here has the same words as the
one that emits instructions, each for one thread at a time: a simulated thread is a Python thread, and the lanes of a
warp exchange what they hold through simulated shared memory. `Device` stands for a GPU under the launcher.

What a GPU may pass over is a `Fault` here: memory outside of the arrays, or not aligned, or touched once it was
written; a warp whose lanes don't meet in a warp operation.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numba import cuda  # in this module's functions the simulator's, while it runs a kernel
from numba.cuda.simulator.kernel import FakeCUDAKernel

from fastdrop.backends.cuda.compile import Variant, packer
from fastdrop.backends.cuda.tile import BATCH, LANES, TILE_CELLS, VECTOR_BYTES
from fastdrop.backends.reference.storage import bfloat16_to_float32, float32_to_bfloat16
from fastdrop.core.checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

STORAGE = {FLOAT32: np.float32, FLOAT64: np.float64, FLOAT16: np.float16, BFLOAT16: np.uint16}
COMPUTED = {FLOAT32: np.float32, FLOAT64: np.float64, FLOAT16: np.float32, BFLOAT16: np.float32}

ADDED, STORED = 1, 2  # what happened to a byte
VOTE, UNIFORM, TILE, REST, SUM, GATHER, ACROSS = range(1, 8)  # kinds of exchange within a warp
SHARED_VECTORS, SHARED_NUMBERS = 0, 1  # kinds of memory that a block shares
TURNS = 10_000  # in which a warp may come to a barrier that others wait at

# The simulator's main thread polls the others without a pause. At Python's 5 ms a turn, each meeting of a warp takes
# tens of milliseconds.
SWITCH_INTERVAL = 1e-4


class Fault(Exception):
    """A kernel does what it must not do."""


def interpreted(name: str) -> ModuleType:
    """A second copy of a module, in which nothing is compiled: Numba returns Python integers, without a width."""
    spec = importlib.util.find_spec(name)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for key, value in list(vars(module).items()):
        if hasattr(value, "py_func"):
            setattr(module, key, value.py_func)
    return module


def same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


scalars = interpreted("fastdrop.backends.numba.scalars")
scalars.scalar = same
kernels = interpreted("fastdrop.backends.cuda.mask")
scalars.bits_of, scalars.float_of = (lambda v: v.view(np.uint32)), (lambda v: v.view(np.float32))
kernels.philox, kernels.decide_group, kernels.normal_pair = scalars.philox, scalars.decide_group, scalars.normal_pair
curves = interpreted("fastdrop.backends.numba.math")
curves.scalar, curves.polynomial, curves.multiply_add = same, scalars.polynomial, (lambda a, b, c: a * b + c)
curves.bits_of, curves.float_of = scalars.bits_of, scalars.float_of
curves.math = SimpleNamespace(exp=np.exp, tanh=np.tanh, erf=math.erf, erfc=math.erfc, copysign=np.copysign)
rows = interpreted("fastdrop.backends.cuda.rows")
rows.curves = curves.curves


class Memory:
    """Arrays by address. Within a launch nothing is written twice, or read once written; but many may add."""

    def __init__(self) -> None:
        self._adding = threading.Lock()
        self._spans: list[tuple[int, np.ndarray, np.ndarray]] = []

    def add(self, array: np.ndarray) -> None:
        content = array.reshape(-1).view(np.uint8)
        self._spans.append((array.ctypes.data, content, np.zeros(content.size, np.uint8)))

    def begin(self) -> None:
        """Another launch."""
        for _, _, written in self._spans:
            written[:] = 0

    def load(self, address: int, dtype: type, count: int = 1) -> np.ndarray:
        content, _ = self._at(address, dtype, count)
        return content.view(dtype).copy()

    def store(self, address: int, values: np.ndarray) -> None:
        content, written = self._at(address, values.dtype.type, values.size)
        content.view(values.dtype)[:] = values
        written[:] = STORED

    def add_long(self, address: int, value: Any) -> None:
        with self._adding:
            content, written = self._at(address, np.uint64, 1, ADDED)
            content.view(np.uint64)[:] += value
            written[:] = ADDED

    def _at(self, address: int, dtype: type, count: int, allowed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        address, size = int(address), np.dtype(dtype).itemsize * count
        if address % size:
            raise Fault(f"{size} bytes at {address:#x} are not aligned")
        for start, content, written in self._spans:
            here = slice(address - start, address - start + size)
            if here.start >= 0 and here.stop <= content.size:
                if (written[here] > allowed).any():
                    raise Fault(f"{size} bytes at {address:#x} were written before")
                return content[here], written[here]
        raise Fault(f"{size} bytes at {address:#x} lie in no array")


class Vocabulary:
    """What kernels are written in, for one simulated thread."""

    def __init__(self, dtype: int, plain: bool, memory: Memory, counted: bool = False) -> None:
        self.dtype, self.plain, self.counted = dtype, plain, counted
        self._memory, self._storage, self._computed = memory, STORAGE[dtype], COMPUTED[dtype]
        self.item_bytes = np.dtype(self._storage).itemsize
        self.vector_items = VECTOR_BYTES // self.item_bytes
        self.sweeps = TILE_CELLS // (LANES * self.vector_items)
        self.inline = same
        self.multiply = scalars.multiply_low

    # ---- the grid ----

    def lane(self) -> Any:
        return np.uint32(cuda.threadIdx.x % LANES)

    def thread(self) -> Any:
        return np.uint32(cuda.threadIdx.x)

    def block(self) -> Any:
        return np.uint32(cuda.blockIdx.x)

    def blocks(self) -> Any:
        return np.uint32(cuda.gridDim.x)

    def block_threads(self) -> Any:
        return np.uint32(cuda.blockDim.x)

    # ---- the warp ----

    def any_lane(self, flag: Any) -> Any:
        return self._exchange(VOTE, int(bool(flag))).any()

    def uniform(self, value: Any) -> Any:
        values = self._exchange(UNIFORM, value)
        if (values != values[0]).any():
            raise Fault(f"lanes have different numbers: {values}")
        return np.uint32(values[0])

    def sum_lanes(self, value: Any) -> Any:
        return np.uint32(self._exchange(SUM, value).sum())

    def _exchange(self, kind: int, value: Any) -> np.ndarray:
        """What each lane of the warp brought to this meeting, to which all 32 must have come.

        Meetings are numbered; odd and even ones have memory of their own, so that one barrier is enough for each.
        """
        thread = cuda.threadIdx.x
        meetings, *places = cuda.shared.array(0, np.dtype(np.uint64)).reshape(5, -1)  # 0: the size is the launch's
        meetings[thread] += np.uint64(1)
        meeting = int(meetings[thread])
        tags, values = places[2 * (meeting & 1) :][:2]
        tags[thread], values[thread] = meeting << 8 | kind, value
        cuda.syncthreads()
        warp = slice(thread - thread % LANES, thread - thread % LANES + LANES)
        elsewhere = np.flatnonzero(tags[warp] != tags[thread])
        if elsewhere.size:
            raise Fault(f"lanes {elsewhere} are not where lane {thread % LANES} is")
        return values[warp].copy()

    # ---- memory ----

    def load_word(self, address: Any) -> Any:
        return self._memory.load(address, np.uint32)[0]

    def store_word(self, address: Any, word: Any) -> None:
        self._memory.store(address, np.array([word & np.uint64(0xFFFFFFFF)], np.uint32))

    def load_long(self, address: Any) -> Any:
        return self._memory.load(address, np.uint64)[0]

    def add_long(self, address: Any, value: Any) -> None:
        self._memory.add_long(address, value)

    def load_tile(self, address: Any) -> Any:
        return [self.load_vector(int(address) + s * LANES * VECTOR_BYTES) for s in range(self.sweeps)]

    def store_tile(self, address: Any, tile: Any, word: Any, lane: Any, a: Any, b: Any, c: Any) -> None:
        words = self._exchange(TILE, word)
        for sweep, vector in enumerate(tile):
            cells = (LANES * sweep + int(lane)) * self.vector_items + np.arange(self.vector_items)
            keep = words[cells >> 5] >> (cells & 31).astype(np.uint64) & np.uint64(1)
            self._put(int(address) + sweep * LANES * VECTOR_BYTES, vector, keep, a, b, c)

    def load_rest(self, address: Any, first: Any, end: Any) -> Any:
        elements = range(int(first), int(first) + BATCH * LANES, LANES)
        return [self.load_item(int(address) + e * self.item_bytes) if e < end else None for e in elements]

    def store_rest(
        self, address: Any, first: Any, end: Any, rest: Any, word: Any, owner: Any, lane: Any, a: Any, b: Any, c: Any
    ) -> None:
        words = self._exchange(REST, word)
        for i, item in enumerate(rest):
            element = int(first) + i * LANES
            if element < end:
                keep = words[int(owner) + i] >> np.uint64(lane) & np.uint64(1)
                self._put(int(address) + element * self.item_bytes, item, keep, a, b, c)

    def load_four(self, address: Any, first: Any, end: Any) -> Any:
        return [self.load_item(at) if inside else None for at, inside in self._four(address, first, end)]

    def store_four(self, address: Any, first: Any, end: Any, four: Any, factors: Any) -> None:
        for item, factor, (at, inside) in zip(four, factors, self._four(address, first, end), strict=True):
            if inside:
                self._put(at, item, 1, factor, 0, 0)

    def _four(self, address: Any, first: Any, end: Any) -> list[tuple[int, bool]]:
        steps = range(0, 64, 16)
        return [((int(address) + s * self.item_bytes) % 2**64, (int(first) + s) % 2**64 < end) for s in steps]

    def load_vector(self, address: Any) -> Any:
        return self._memory.load(address, self._storage, self.vector_items)

    def store_vector(self, address: Any, vector: Any, bits: Any, a: Any, b: Any, c: Any) -> None:
        keep = np.uint64(bits) >> np.arange(self.vector_items, dtype=np.uint64) & np.uint64(1)
        self._put(address, vector, keep, a, b, c)

    def load_item(self, address: Any) -> Any:
        return self._memory.load(address, self._storage)

    def store_item(self, address: Any, item: Any, bits: Any, a: Any, b: Any, c: Any) -> None:
        self._put(address, item, np.uint64(bits) & np.uint64(1), a, b, c)

    def _put(self, address: Any, items: np.ndarray, keep: Any, a: Any, b: Any, c: Any) -> None:
        wide = bfloat16_to_float32(items) if self.dtype == BFLOAT16 else items.astype(self._computed)
        kept = wide * self._computed(a)
        if not self.plain:
            kept = kept + self._computed(b)
        result = np.where(keep != 0, kept, self._computed(c))
        narrow = float32_to_bfloat16(result) if self.dtype == BFLOAT16 else result.astype(self._storage)
        self._memory.store(address, narrow)

    # ---- arithmetic ----

    def plus(self, a: Any, b: Any) -> Any:
        return np.float32(a + b)

    def times(self, a: Any, b: Any) -> Any:
        return np.float32(a * b)

    def root(self, a: Any) -> Any:
        return np.sqrt(a)

    def ones(self, word: Any) -> Any:
        return np.uint32(int(word).bit_count())

    def multiply_high(self, a: Any, b: Any) -> Any:
        return np.uint64(int(a) * int(b) >> 64)

    def scale(self, a: Any, kept_at: Any) -> Any:
        if not self.counted:
            return a
        kept = int(self.load_long(kept_at))
        return self._computed(float(a) / kept if kept else 0.0)

    def plane_mask(self, threshold: Any, k: int) -> Any:
        return np.uint32(0xFFFFFFFF if int(threshold) >> (31 - k) & 1 else 0)

    def divide(self, n: Any, multiplier: Any, shift: Any) -> Any:
        if n >= 2**31:
            raise Fault(f"divide takes numbers below 2**31, but got {n}")
        return np.uint32(int(n) * int(multiplier) >> int(shift))


class RowVocabulary(Vocabulary):
    """The same for `fastdrop.backends.cuda.vector_intrinsics`. What a thread holds is an array of numbers."""

    def __init__(self, dtype: int, memory: Memory, residual_dtype: int, wide: bool, warps: int) -> None:
        super().__init__(dtype, True, memory)
        self.count, self.doubles, self.team_warps = self.vector_items if wide else 1, dtype == FLOAT64, warps
        self.number = self._computed
        self.number_bytes, self.residual_bytes = (
            np.dtype(self.number).itemsize,
            np.dtype(STORAGE[residual_dtype]).itemsize,
        )
        self._residual_dtype, self._plain = residual_dtype, FLOAT64 if self.doubles else FLOAT32
        self._block = _Block()

    def each(self, function: Callable[..., Any], codes: str) -> Any:
        def apply(*arguments: Any) -> Any:
            results = []
            for j in range(self.count):
                left = iter(arguments)
                given = [np.uint64(j) if code == "j" else next(left) for code in codes]
                results.append(function(*[x[j] if code == "v" else x for x, code in zip(given, codes, strict=True)]))
            return np.array(results, self.number)

        return apply

    def spread(self, number: Any) -> Any:
        return np.full(self.count, number, self.number)

    def kept(self, bits: Any, vector: Any) -> Any:
        keep = np.uint64(bits) >> np.arange(self.count, dtype=np.uint64) & np.uint64(1)
        return np.where(keep != 0, vector, self.number(0))

    def rounded(self, vector: Any) -> Any:
        return self._widened(self._residual_dtype, self._narrowed(self._residual_dtype, vector))

    def total(self, vector: Any) -> Any:
        return vector.sum(dtype=self.number)

    def most(self, vector: Any) -> Any:
        return np.fmax.reduce(vector)

    def above(self, vector: Any) -> Any:
        return sum(int(not number <= 0) << i for i, number in enumerate(vector))

    def number_root(self, number: Any) -> Any:
        return np.sqrt(number)

    # ---- lanes, and the block ----

    def gather(self, bits: Any, lane: Any) -> Any:
        lanes = LANES // self.count
        first, own = int(lane) // lanes * lanes, int(bits) & (1 << self.count) - 1
        parts = self._exchange(GATHER, own)[first : first + lanes]
        return np.uint64(sum(int(part) << i * self.count for i, part in enumerate(parts)))

    def across(self, number: Any, step: Any) -> Any:
        others = self._exchange(ACROSS, np.float64(number).view(np.uint64))
        return self.number(others.view(np.float64)[int(self.lane()) ^ int(step)])

    def share(self, thread: Any, vector: Any) -> None:
        self._block.put((SHARED_VECTORS, int(thread)), vector)

    def shared(self, thread: Any) -> Any:
        return self._block.get((SHARED_VECTORS, int(thread)))

    def share_number(self, warp: Any, number: Any) -> None:
        self._block.put((SHARED_NUMBERS, int(warp)), number)

    def shared_number(self, warp: Any) -> Any:
        return self._block.get((SHARED_NUMBERS, int(warp)))

    def meet(self) -> None:
        self._block.meet()

    # ---- memory ----

    def load_data(self, address: Any) -> Any:
        return self._read(self.dtype, address, self.count)

    def store_data(self, address: Any, vector: Any) -> None:
        self._write(self.dtype, address, vector)

    def load_sums(self, address: Any) -> Any:
        return self._read(self._residual_dtype, address, self.count)

    def store_sums(self, address: Any, vector: Any) -> None:
        self._write(self._residual_dtype, address, vector)

    def load_numbers(self, address: Any) -> Any:
        return self._read(self._plain, address, self.count)

    def store_numbers(self, address: Any, vector: Any) -> None:
        self._write(self._plain, address, vector)

    def load_number(self, address: Any) -> Any:
        return self._read(self._plain, address, 1)[0]

    def store_number(self, address: Any, number: Any) -> None:
        self._write(self._plain, address, np.array([number], self.number))

    def _read(self, dtype: int, address: Any, count: int) -> np.ndarray:
        """In accesses of 16 bytes, or of an element."""
        storage = np.dtype(STORAGE[dtype])
        at_once = min(count, VECTOR_BYTES // storage.itemsize)
        starts = [int(address) + i * storage.itemsize for i in range(0, count, at_once)]
        return self._widened(
            dtype, np.concatenate([self._memory.load(start, storage.type, at_once) for start in starts])
        )

    def _write(self, dtype: int, address: Any, vector: np.ndarray) -> None:
        stored = self._narrowed(dtype, vector)
        at_once = min(stored.size, VECTOR_BYTES // stored.itemsize)
        for i in range(0, stored.size, at_once):
            self._memory.store(int(address) + i * stored.itemsize, stored[i : i + at_once])

    def _widened(self, dtype: int, stored: np.ndarray) -> np.ndarray:
        return bfloat16_to_float32(stored) if dtype == BFLOAT16 else stored.astype(self.number)

    def _narrowed(self, dtype: int, vector: np.ndarray) -> np.ndarray:
        return float32_to_bfloat16(vector) if dtype == BFLOAT16 else vector.astype(STORAGE[dtype])


class _Block:
    """Memory that a block's threads share, and their barrier. Between two barriers no thread may touch what another
    one touched, if either writes."""

    def __init__(self) -> None:
        self._forming = threading.Lock()
        self._of: tuple[int, int] = (-1, 0)  # the block that runs, and its threads
        self._met: dict[int, int] = {}  # barriers, by thread
        self._held: dict[tuple[int, int], Any] = {}
        self._touched: dict[tuple[int, int], dict[int, tuple[int, bool]]] = {}  # by thread: after how many barriers

    def _enter(self) -> int:
        thread, of = int(cuda.threadIdx.x), (int(cuda.blockIdx.x), int(cuda.blockDim.x))
        with self._forming:  # blocks run one after another
            if self._of != of:
                self._of, self._met = of, dict.fromkeys(range(of[1]), 0)
                self._held, self._touched = {}, {}
        return thread

    def _touch(self, place: tuple[int, int], writes: bool) -> None:
        thread = self._enter()
        with self._forming:
            now, by = self._met[thread], self._touched.setdefault(place, {})
            if any(when == now and (writes or wrote) for other, (when, wrote) in by.items() if other != thread):
                raise Fault(f"thread {thread} touches shared memory that no barrier is before")
            by[thread] = now, writes or by.get(thread, (-1, False)) == (now, True)

    def put(self, place: tuple[int, int], value: Any) -> None:
        self._touch(place, True)
        self._held[place] = value

    def get(self, place: tuple[int, int]) -> Any:
        self._touch(place, False)
        return self._held[place]

    def meet(self) -> None:
        thread = self._enter()
        self._met[thread] += 1
        mine = self._met[thread]
        for _ in range(TURNS):  # the simulator's barrier also holds warps that are at an exchange
            cuda.syncthreads()
            if min(self._met.values()) >= mine:
                return
        raise Fault("threads of the block never come to the barrier")


class Launch(NamedTuple):
    variant: Variant
    blocks: int
    values: tuple[Any, ...]


class Device:
    """In place of the driver's: ``blocks`` at most, of so many ``warps``. Kernels may touch what was allowed."""

    def __init__(self) -> None:
        self.blocks, self.warps = 2, 1
        self.launches: list[Launch] = []
        self.memory = Memory()

    def allow(self, *arrays: np.ndarray) -> None:
        for array in arrays:
            self.memory.add(array)

    def forget(self) -> None:
        self.memory = Memory()

    def kernel(self, *parts: Any, **others: Any) -> Kernel:
        return Kernel(self, Variant(*parts, **others))


class Kernel:
    def __init__(self, device: Device, variant: Variant) -> None:
        self._device, self._variant = device, variant

    def launch(self, stream: int, threads: int, *values: Any) -> None:
        """Runs the twin, on parameters that have been through the kernels' ABI."""
        device, variant = self._device, self._variant
        layout, of_code = packer(variant), {"Q": np.uint64, "I": np.uint32, "f": np.float32, "d": np.float64}
        packed = layout.unpack(layout.pack(*values))
        typed = [of_code[code](value) for code, value in zip(variant.codes, packed, strict=True)]
        if variant.on_rows:
            body = rows.build(self._row_vocabulary, variant.body, variant.form, variant.activation)
        else:
            vocabulary = Vocabulary(variant.dtype, variant.plain, device.memory, variant.counted)
            body = kernels.build(vocabulary, variant.body, variant.form)
        blocks = min(-(-threads // (LANES * device.warps)), device.blocks)
        device.launches.append(Launch(variant, blocks, packed))
        device.memory.begin()
        run(lambda: body(*typed), blocks, device.warps)

    def _row_vocabulary(self, wide: bool) -> RowVocabulary:
        variant = self._variant
        return RowVocabulary(variant.dtype, self._device.memory, variant.residual_dtype, wide, self._device.warps)


def run(body: Callable[[], Any], blocks: int, warps: int) -> None:
    """A body in each thread of a simulated grid."""

    def kernel() -> None:
        with np.errstate(all="ignore"):  # a thread has its own; integers wrap, and inf and NaN in data are data
            body()

    threads = LANES * warps
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        FakeCUDAKernel(kernel, device=False)[blocks, threads, 0, 5 * 8 * threads]()
    finally:
        sys.setswitchinterval(before)

"""The Numba CPU backend: the C kernels' scheme as loops that LLVM vectorises, on any CPU Numba runs on.

Blocks of 16 words are drawn two groups at a time, a chunk ahead of the data; the few words then undecided are gathered
over a chunk and given more groups together, as in csrc/kernels.inc.h. float32 and float64 are applied 32 elements at a
time by an intrinsic that hands LLVM whole vectors, since streaming stores are not vectorised otherwise.

Kernels release the GIL and run over ranges, which a small pool of Python threads shares: Numba's own parallel layers
hang or abort in forked children or under concurrent callers. Compiled code is cached on disk. The fused kernels are in
`rows`.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (Numba types the kernels, by what they are called with)

from __future__ import annotations

import importlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.checks import BFLOAT16, FLOAT16, FLOAT64
from ...core.random import (
    GROUP_SHIFT,
    GROUPS,
    LOW,
    MASK_DOMAIN,
    NOISE_CELLS,
    NOISE_COUNTERS,
    NOISE_DOMAIN,
    PLANES_PER_GROUP,
)

numba: Any
intrinsic: Any
try:
    numba = importlib.import_module("numba")
    from llvmlite import ir
    from numba import types

    from . import rows as row_kernels
    from .modes import float_modes, set_float_modes
    from .scalars import (
        OPTIONS,
        affine,
        coefficients,
        decide_group,
        dropped,
        inner,
        kernel,
        narrow,
        normals,
        philox_planes,
        widen,
    )
except ImportError as error:
    numba = None
    _import_error = str(error)

Array = NDArray[Any]
Words = NDArray[np.uint32]

BLOCK_WORDS = 16
BLOCK_CELLS = 512
CHUNK_BLOCKS = 32
CHUNK_WORDS = CHUNK_BLOCKS * BLOCK_WORDS
CHUNK_CELLS = CHUNK_BLOCKS * BLOCK_CELLS
LINE_BYTES = 64
PREFETCH_BYTES = 8192
STREAM_BYTES = 16 << 20  # as in csrc/fastdrop.h
GRAIN_CELLS = 128 * BLOCK_CELLS

_num_threads = 1
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def unavailable() -> str | None:
    if numba is None:
        return f"numba is not installed ({_import_error}): pip install numba"
    return None


def describe() -> str:
    return f"Numba {numba.__version__}"


def set_num_threads(n: int) -> None:
    global _num_threads
    _num_threads = n


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """One block, for known-answer tests."""
    return [int(word) & LOW for word in _one_block(*(np.uint64(word) for word in (*counter, *key)))]


def draw_bits(words: Words, position: int, first: int, n: int, seed: int, offset: int, threshold: int) -> None:
    arguments = words, position, threshold, *_halves(seed, offset, first)
    _over_ranges(_draw_bits, arguments, n, position)


def dropout_forward(
    dtype: int,
    x: Array,
    y: Array,
    words: Words | None,
    first: int,
    n: int,
    seed: int,
    offset: int,
    threshold: int,
    a: float,
    b: float,
    c: float,
) -> None:
    source, target = _typed(dtype, x), _typed(dtype, y)
    bits, keeps = (_NO_WORDS, False) if words is None else (words, True)
    state = threshold, *_halves(seed, offset, first)
    _over_ranges(_forward, (source, target, bits, keeps, *state, _law(a, b, c), _streams(target)), n)


def masked_affine(
    dtype: int,
    x: Array,
    y: Array,
    words: Words,
    position: int,
    outer: int,
    repeat: int,
    inner: int,
    a: float,
    b: float,
    c: float,
) -> None:
    source, target = _typed(dtype, x), _typed(dtype, y)
    arguments = source, target, words, position, repeat, inner, _law(a, b, c), _streams(target)
    _over_ranges(_masked, arguments, outer * repeat * inner)


def gaussian_multiply(dtype: int, x: Array, y: Array, first: int, n: int, seed: int, offset: int, sigma: float) -> None:
    arguments = _typed(dtype, x), _typed(dtype, y), *_halves(seed, offset, first), sigma
    _over_ranges(_gaussian, arguments, n, first)


def dilate_bits(to: Words, words: Words, outer: int, n: int, inner: int, block: int) -> None:
    _over_ranges(_dilate, (to, words, n, inner, block), outer * (n + block - 1) * inner)


def pointwise_forward(
    dtype: int,
    residual_dtype: int,
    x: Array,
    input_bias: Array | None,
    multiplier: Array | None,
    residual: Array | None,
    words: Words | None,
    y: Array,
    signs: Words | None,
    rows: int,
    columns: int,
    a: float,
    activation: int,
) -> None:
    at = _addresses(x, input_bias, multiplier, residual, words, y, signs)
    arguments = dtype, residual_dtype, *at, columns, _real(dtype, a), activation
    _over_ranges(row_kernels.pointwise_forward, arguments, rows * columns)


def pointwise_backward(
    dtype: int,
    residual_dtype: int,
    dy: Array,
    x: Array | None,
    input_bias: Array | None,
    multiplier: Array | None,
    words: Words | None,
    dx: Array,
    dmultiplier: Array | None,
    sums: Array | None,
    rows: int,
    columns: int,
    panels: int,
    a: float,
    activation: int,
) -> None:
    at = _addresses(dy, x, input_bias, multiplier, words, dx, dmultiplier, sums)
    arguments = dtype, residual_dtype, *at, rows, columns, panels, _real(dtype, a), activation
    if sums is None:
        _over_ranges(row_kernels.pointwise_backward, arguments, rows * columns)
    else:
        _over_ranges(row_kernels.pointwise_backward, arguments, panels, cells=rows * columns // panels)
        _add_panels(sums, panels)


def norm_forward(
    dtype: int,
    residual_dtype: int,
    x: Array,
    input_bias: Array | None,
    residual: Array | None,
    words: Words | None,
    weight: Array | None,
    norm_bias: Array | None,
    y: Array,
    residual_out: Array,
    statistics: Array,
    rows: int,
    columns: int,
    a: float,
    eps: float,
    centred: int,
) -> None:
    at = _addresses(x, input_bias, residual, words, weight, norm_bias, y, residual_out, statistics)
    arguments = dtype, residual_dtype, *at, columns, _real(dtype, a), float(eps), int(centred)
    _over_ranges(row_kernels.norm_forward, arguments, rows, cells=columns)


def norm_backward(
    dtype: int,
    residual_dtype: int,
    dy: Array,
    dresidual_out: Array | None,
    residual_out: Array,
    statistics: Array,
    weight: Array | None,
    words: Words | None,
    dx: Array | None,
    dresidual: Array | None,
    sums: Array | None,
    rows: int,
    columns: int,
    panels: int,
    a: float,
    centred: int,
) -> None:
    at = _addresses(dy, dresidual_out, residual_out, statistics, weight, words, dx, dresidual, sums)
    arguments = dtype, residual_dtype, *at, rows, columns, panels, _real(dtype, a), int(centred)
    _over_ranges(row_kernels.norm_backward, arguments, panels, cells=rows * columns // panels)
    if sums is not None:
        _add_panels(sums, panels)


def softmax_forward(
    dtype: int,
    x: Array,
    mask: Array | None,
    words: Words | None,
    probabilities: Array | None,
    y: Array,
    rows: int,
    columns: int,
    heads: int,
    queries: int,
    outer_stride: int,
    head_stride: int,
    query_stride: int,
    softmax_scale: float,
    a: float,
    causal: int,
) -> None:
    at, strides = _addresses(x, mask, words, probabilities, y), (outer_stride, head_stride, query_stride)
    arguments = dtype, *at, columns, heads, queries, *strides, _real(dtype, softmax_scale), _real(dtype, a), int(causal)
    _over_ranges(row_kernels.softmax_forward, arguments, rows, cells=columns)


def softmax_backward(
    dtype: int,
    dy: Array,
    probabilities: Array,
    words: Words | None,
    dx: Array,
    y: Array | None,
    rows: int,
    columns: int,
    softmax_scale: float,
    a: float,
) -> None:
    at = _addresses(dy, probabilities, words, dx, y)
    arguments = dtype, *at, columns, _real(dtype, softmax_scale), _real(dtype, a)
    _over_ranges(row_kernels.softmax_backward, arguments, rows, cells=columns)


_NO_WORDS = np.zeros(0, np.uint32)


def _addresses(*arrays: Array | None) -> tuple[int, ...]:
    return tuple(0 if array is None else int(array.__array_interface__["data"][0]) for array in arrays)


def _real(dtype: int, number: float) -> Any:
    """A number in the type that data of a dtype is computed in."""
    return np.float64(number) if dtype == FLOAT64 else np.float32(number)


def _add_panels(sums: Array, panels: int) -> None:
    lines = sums.reshape(panels, -1)
    for line in lines[1:]:
        lines[0] += line


def _typed(dtype: int, x: Array) -> Array:
    """Flat, with 16-bit dtypes told apart by the integer type that holds their bits."""
    flat = x if x.ndim == 1 else x.reshape(-1)
    if dtype == FLOAT16:
        return flat.view(np.int16)
    return flat.view(np.uint16) if dtype == BFLOAT16 else flat


def _streams(y: Array) -> bool:
    """Around the cache, if y is large; only from a line on, as runs of 32 must begin where lines do."""
    return y.nbytes >= STREAM_BYTES and y.ctypes.data % LINE_BYTES == 0


def _halves(seed: int, offset: int, first: int) -> tuple[int, ...]:
    """As ints that all fit into 64 signed bits, the type Numba takes every int for."""
    return seed & LOW, seed >> 32, offset & LOW, offset >> 32, first & LOW, first >> 32


def _law(a: float, b: float, c: float) -> tuple[float, ...]:
    """The affine as a tuple whose length, which is part of its type, makes kernels leave out what adds nothing."""
    return (a,) if b == 0 and c == 0 else (a, b, c)


def _over_ranges(
    kernel: Callable[..., None], arguments: tuple[Any, ...], n: int, lead: int = 0, cells: int = 1
) -> None:
    """kernel(begin, end, *arguments) over 0 .. n, units of so many cells, by several threads where that pays.

    Seams lie where ``lead`` + cell is a multiple of a block, so that no two threads share a word; between any units of
    several cells, which share none. The last part takes what rounding leaves.
    """
    parts = min(_num_threads, n * cells // GRAIN_CELLS, n)
    if parts <= 1:
        kernel(0, n, *arguments)
        return
    seam = BLOCK_CELLS if cells == 1 else 1
    step = n // parts // seam * seam
    seams = [0, *(i * step - lead % seam for i in range(1, parts)), n]
    # Over no range, to compile: where memory is short that fails, and must in the caller and not in a pool's thread.
    kernel(0, 0, *arguments)
    _Job(kernel, arguments, itertools.pairwise(seams)).run(parts)


class _Job:
    """One call's ranges. Whoever is free takes the next, under the modes of floating-point arithmetic of the caller."""

    def __init__(self, kernel: Callable[..., None], arguments: tuple[Any, ...], ranges: Iterable[Any]) -> None:
        self._kernel, self._arguments = kernel, arguments
        self._ranges = deque(ranges)
        self._left = len(self._ranges)
        self._ended: SimpleQueue[BaseException | None] = SimpleQueue()  # None, or what was raised, for each range
        self._modes = float_modes()

    def run(self, threads: int) -> None:
        """Everything, by so many threads, or fewer where the system gives no more."""
        for _ in range(threads - 1):
            try:
                _workers().submit(self._help)
            except RuntimeError:  # no thread can be started: memory is short, or the interpreter is about to end
                break
        self._work()
        ended = [self._ended.get() for _ in range(self._left)]
        for error in ended:
            if error is not None:
                raise error

    def _help(self) -> None:
        own = float_modes()
        set_float_modes(self._modes)
        try:
            self._work()
        finally:
            set_float_modes(own)

    def _work(self) -> None:
        while True:
            try:
                part = self._ranges.popleft()
            except IndexError:
                return
            error: BaseException | None = None
            try:
                self._kernel(*part, *self._arguments)
            except BaseException as raised:
                error = raised
            self._ended.put(error)


def _workers() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(256, thread_name_prefix="fastdrop")
        return _pool


def _forget_pool() -> None:
    """The threads of a parent are not in its forked child."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


if numba is not None:
    U = np.uint64
    intrinsic = numba.core.extending.intrinsic
    DOMAIN = U(MASK_DOMAIN)
    GROUP_COUNT = GROUPS * PLANES_PER_GROUP  # index, past the planes, of the number of groups that can decide anything

    def _one(builder: Any) -> Any:
        return builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])

    def _apply_run(stream: bool) -> Any:
        """Intrinsic: the law on 32 elements at address x, under the bits of a word, to address y."""

        @intrinsic  # type: ignore[untyped-decorator]
        def apply_run(typingctx: Any, x: Any, y: Any, word: Any, law: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                vector = ir.VectorType(context.get_value_type(law.dtype), 32)
                size = law.dtype.bitwidth // 8
                source = builder.inttoptr(args[0], ir.PointerType(vector))
                target = builder.inttoptr(args[1], ir.PointerType(vector))
                spread = [_spread(builder, builder.extract_value(args[3], i), vector) for i in range(len(law))]
                result = builder.fmul(builder.load(source, align=size), spread[0])
                cells = builder.bitcast(args[2], ir.VectorType(ir.IntType(1), 32))
                if len(law) == 1:
                    result = builder.select(cells, result, ir.Constant(vector, [0.0] * 32))
                else:
                    result = builder.select(cells, builder.fadd(result, spread[1]), spread[2])
                store = builder.store(result, target, align=LINE_BYTES if stream else size)
                if stream:
                    store.set_metadata("nontemporal", _one(builder))
                return context.get_dummy_value()

            return types.void(types.uintp, types.uintp, types.uint32, law), codegen

        return apply_run

    def _spread(builder: Any, value: Any, vector: Any) -> Any:
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), 32), [0] * 32)
        single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(single, single, zeros)

    store_run, stream_run = _apply_run(False), _apply_run(True)

    @intrinsic  # type: ignore[untyped-decorator]
    def stream_line(typingctx: Any, to: Any, source: Any) -> Any:
        """Copies 64 bytes to a line of memory, around the cache."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            line = ir.PointerType(ir.VectorType(ir.IntType(32), LINE_BYTES // 4))
            store = builder.store(
                builder.load(builder.inttoptr(args[1], line), align=4),
                builder.inttoptr(args[0], line),
                align=LINE_BYTES,
            )
            store.set_metadata("nontemporal", _one(builder))
            return context.get_dummy_value()

        return types.void(types.uintp, types.uintp), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def prefetch(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            i32 = ir.IntType(32)
            pointer = ir.PointerType(ir.IntType(8))
            kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
            function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
            read, nearest, data = ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)
            builder.call(function, [builder.inttoptr(args[0], pointer), read, nearest, data])
            return context.get_dummy_value()

        return types.void(types.uintp), codegen

    @kernel
    def _one_block(c0, c1, c2, c3, k0, k1):
        return philox_planes(c0, c1, c2, c3, k0, k1)

    @kernel
    def _planes(threshold):
        """The bits of the threshold, most significant first, each spread to a whole word; then the number of groups up
        to its last 1: later ones decide nothing."""
        planes = np.zeros(GROUP_COUNT + 1, np.uint64)
        for k in range(32):
            if (threshold >> U(31 - k)) & U(1):
                planes[k] = ~U(0)
                planes[GROUP_COUNT] = U(k // PLANES_PER_GROUP + 1)
        return planes

    @inner
    def _look_1(keep, slot, word, k0, k1, o0, o1, planes):
        """Words word .. word+15, written at slot, for a threshold that one group decides."""
        t0, t1, t2, t3 = planes[0], planes[1], planes[2], planes[3]
        c1 = (word >> U(32)) | DOMAIN
        for i in range(BLOCK_WORDS):
            r0, r1, r2, r3 = philox_planes(word + U(i), c1, o0, o1, k0, k1)
            decided, _ = decide_group(r0, r1, r2, r3, t0, t1, t2, t3)
            keep[slot + U(i)] = np.uint32(decided)

    @inner
    def _look_2(keep, undecided, slot, word, k0, k1, o0, o1, planes):
        """The same after two groups; ``undecided`` takes what they leave open."""
        t0, t1, t2, t3 = planes[0], planes[1], planes[2], planes[3]
        t4, t5, t6, t7 = planes[4], planes[5], planes[6], planes[7]
        c1 = (word >> U(32)) | DOMAIN
        for i in range(BLOCK_WORDS):
            w = word + U(i)
            r0, r1, r2, r3 = philox_planes(w, c1, o0, o1, k0, k1)
            r4, r5, r6, r7 = philox_planes(w, c1 | U(1 << GROUP_SHIFT), o0, o1, k0, k1)
            keep_high, equal_high = decide_group(r0, r1, r2, r3, t0, t1, t2, t3)
            keep_low, equal_low = decide_group(r4, r5, r6, r7, t4, t5, t6, t7)
            keep[slot + U(i)] = np.uint32(keep_high & (keep_low | ~equal_high))
            undecided[slot + U(i)] = np.uint32(equal_high & equal_low)

    @kernel
    def _look_on(result, bits, slots, base, pending, group, k0, k1, o0, o1, planes, left):
        """One more group for the pending words, listed up to a multiple of 16 so that the loop has no tail: ``result``
        takes the word to AND in, ``left`` the bits still undecided."""
        g = U(PLANES_PER_GROUP) * group
        t0, t1, t2, t3 = planes[g], planes[g + U(1)], planes[g + U(2)], planes[g + U(3)]
        for block in range(U(0), pending, U(BLOCK_WORDS)):
            for i in range(BLOCK_WORDS):
                at = block + U(i)
                w = base + U(slots[at])
                c1 = (w >> U(32)) | DOMAIN | (group << U(GROUP_SHIFT))
                r0, r1, r2, r3 = philox_planes(w, c1, o0, o1, k0, k1)
                decided, equal = decide_group(r0, r1, r2, r3, t0, t1, t2, t3)
                result[at] = np.uint32(decided | ~U(bits[at]))
                left[at] = np.uint32(equal & U(bits[at]))

    @kernel
    def _decide_pending(keep, undecided, blocks, base, k0, k1, o0, o1, planes, lists):
        if planes[GROUP_COUNT] <= U(2):
            return
        slots, bits, result, left = lists[0], lists[1], lists[2], lists[3]
        pending = U(0)
        for i in range(U(0), blocks * U(BLOCK_WORDS)):
            slots[pending] = np.uint32(i)
            bits[pending] = undecided[i]
            pending += U(undecided[i] != 0)  # no branch: it would be mispredicted one time in eight
        group = U(2)
        while pending and group < planes[GROUP_COUNT]:
            for i in range(pending, pending + U(BLOCK_WORDS)):
                slots[i] = 0
                bits[i] = 0
            _look_on(result, bits, slots, base, pending, group, k0, k1, o0, o1, planes, left)
            still = U(0)
            for i in range(U(0), pending):
                keep[slots[i]] &= result[i]
                if left[i]:
                    slots[still] = slots[i]
                    bits[still] = left[i]
                    still += U(1)
            pending = still
            group += U(1)

    @inner
    def _draw_block(keep, undecided, block, first_word, k0, k1, o0, o1, planes):
        """First look at a block of the chunk that begins at first_word; _decide_pending ends the chunk."""
        slot = block * U(BLOCK_WORDS)
        if planes[GROUP_COUNT] == U(1):
            _look_1(keep, slot, first_word + slot, k0, k1, o0, o1, planes)
        else:
            _look_2(keep, undecided, slot, first_word + slot, k0, k1, o0, o1, planes)

    @inner
    def _bits_at(words, position):
        """32 bits from a position on; the caller sees to it that both words are there."""
        low = U(words[position >> U(5)]) >> (position & U(31))
        high = U(words[(position >> U(5)) + U(1)]) << (U(32) - (position & U(31)))
        return np.uint32(low | high)

    @kernel
    def _copy_bits(to, to_position, words, position, n):
        """Copies n bits; bits below them in their first word stay, bits above them in their last are cleared."""
        if (to_position | position) & U(31) == U(0):
            start, source = to_position >> U(5), position >> U(5)
            for i in range(U(0), n >> U(5)):
                to[start + i] = words[source + i]
            done = n & ~U(31)
            to_position += done
            position += done
            n -= done
        while n:
            room = min(U(32) - (to_position & U(31)), n, U(32) - (position & U(31)))
            bits = (U(words[position >> U(5)]) >> (position & U(31))) & ((U(1) << room) - U(1))
            at, shift = to_position >> U(5), to_position & U(31)
            below = U(to[at]) & ((U(1) << shift) - U(1))
            to[at] = np.uint32(below | (bits << shift))
            to_position += room
            position += room
            n -= room

    @kernel
    def _draw_bits(begin, end, words, position, threshold, seed0, seed1, offset0, offset1, first0, first1):
        k0, k1, o0, o1 = U(seed0), U(seed1), U(offset0), U(offset1)
        first, planes = U(first0) | U(first1) << U(32), _planes(U(threshold))
        keep = np.empty(CHUNK_WORDS + BLOCK_WORDS + 1, np.uint32)
        undecided = np.empty(CHUNK_WORDS + BLOCK_WORDS, np.uint32)
        lists = np.empty((4, CHUNK_WORDS + 2 * BLOCK_WORDS), np.uint32)
        at, stop = U(begin), U(end)
        while at < stop:
            step = min(stop - at, U(CHUNK_CELLS))
            cell = first + at
            lead = cell % U(BLOCK_CELLS)
            blocks = (lead + step + U(BLOCK_CELLS - 1)) // U(BLOCK_CELLS)
            first_word = cell // U(BLOCK_CELLS) * U(BLOCK_WORDS)
            for block in range(U(0), blocks):
                _draw_block(keep, undecided, block, first_word, k0, k1, o0, o1, planes)
            _decide_pending(keep, undecided, blocks, first_word, k0, k1, o0, o1, planes, lists)
            _copy_bits(words, U(position) + at, keep, lead, step)
            at += step

    @kernel
    def _apply_rest(x, y, start, bits, lead, n, law):
        for i in range(U(0), n):
            cell = lead + i
            kept = (bits[cell >> U(5)] >> np.uint32(cell & U(31))) & np.uint32(1)
            value = affine(widen(x[start + i]), law)
            y[start + i] = narrow(value if kept else dropped(law), x[U(0)])

    def _apply_whole_runs(
        x: Any, y: Any, start: Any, bits: Any, lead: Any, n: Any, law: Any, stream: Any, held: Any
    ) -> Any:
        """The law on as many whole runs of 32 as there are; returns the number of elements done.

        ``held`` has room for them: as y may be x, a loop that reads one and writes the other would not be vectorised.
        """
        raise NotImplementedError

    @numba.core.extending.overload(_apply_whole_runs, jit_options=OPTIONS)
    def _whole_runs_of(x, y, start, bits, lead, n, law, stream, held):
        size = x.dtype.bitwidth // 8
        if isinstance(x.dtype, types.Float):

            def vectors(x, y, start, bits, lead, n, law, stream, held):
                source, target = U(x.ctypes.data) + start * U(size), U(y.ctypes.data) + start * U(size)
                runs = n >> U(5)
                for run in range(U(0), runs):
                    at = run * U(32 * size)
                    for line in range(U(0), U(32 * size), U(LINE_BYTES)):
                        prefetch(source + at + line + U(PREFETCH_BYTES))
                    if stream:
                        stream_run(source + at, target + at, _bits_at(bits, lead + (run << U(5))), law)
                    else:
                        store_run(source + at, target + at, _bits_at(bits, lead + (run << U(5))), law)
                return runs << U(5)

            return vectors

        def lanes(x, y, start, bits, lead, n, law, stream, held):
            runs = n >> U(5)
            for i in range(runs << U(5)):
                held[i] = x[start + i]
            for run in range(U(0), runs):
                word = _bits_at(bits, lead + (run << U(5)))
                at = run << U(5)
                for i in range(32):
                    value = affine(widen(held[at + U(i)]), law)
                    kept = (word >> np.uint32(i)) & np.uint32(1)
                    y[start + at + U(i)] = narrow(value if kept else dropped(law), held[U(0)])
            return runs << U(5)

        return lanes

    @inner
    def _apply(x, y, start, bits, lead, n, law, stream, held):
        """The law on at most a block of elements."""
        done = _apply_whole_runs(x, y, start, bits, lead, n, law, stream, held)
        if done < n:
            _apply_rest(x, y, start + done, bits, lead + done, n - done, law)

    @kernel
    def _forward(
        begin, end, x, y, words, keeps, threshold, seed0, seed1, offset0, offset1, first0, first1, law, stream
    ):
        """Draws a chunk ahead, block by block beside the one applied, so that drawing fills the time data takes."""
        k0, k1, o0, o1 = U(seed0), U(seed1), U(offset0), U(offset1)
        first, planes = U(first0) | U(first1) << U(32), _planes(U(threshold))
        law, held = coefficients(law, x), np.empty(BLOCK_CELLS, x.dtype)
        keeps_of = np.empty((2, CHUNK_WORDS + BLOCK_WORDS + 1), np.uint32)
        undecided = np.empty(CHUNK_WORDS + BLOCK_WORDS, np.uint32)
        lists = np.empty((4, CHUNK_WORDS + 2 * BLOCK_WORDS), np.uint32)
        at, stop = U(begin), U(end)
        lead = (first + at) % U(BLOCK_CELLS)
        word = (first + at) // U(BLOCK_CELLS) * U(BLOCK_WORDS)  # of the chunk drawn
        turn, step, ahead = U(0), U(0), min(stop - at, U(CHUNK_CELLS))
        while step or ahead:
            now, drawn = keeps_of[turn], keeps_of[U(1) - turn]
            apply_blocks = (step + U(BLOCK_CELLS - 1)) // U(BLOCK_CELLS)
            draw_blocks = (lead + ahead + U(BLOCK_CELLS - 1)) // U(BLOCK_CELLS) if ahead else U(0)
            for block in range(U(0), max(apply_blocks, draw_blocks)):
                if block < draw_blocks:
                    _draw_block(drawn, undecided, block, word, k0, k1, o0, o1, planes)
                if block < apply_blocks:
                    done = block * U(BLOCK_CELLS)
                    n = min(step - done, U(BLOCK_CELLS))
                    _apply(x, y, at + done, now, lead + done, n, law, stream, held)
            _decide_pending(drawn, undecided, draw_blocks, word, k0, k1, o0, o1, planes, lists)
            if keeps and step:
                line = U(words.ctypes.data) + (at >> U(3))
                if stream and step == U(CHUNK_CELLS) and lead == U(0) and line % U(LINE_BYTES) == U(0):
                    for byte in range(U(0), U(CHUNK_CELLS // 8), U(LINE_BYTES)):
                        stream_line(line + byte, U(now.ctypes.data) + byte)
                else:
                    _copy_bits(words, at, now, lead, step)
            at += step
            word += U(CHUNK_WORDS)
            turn = U(1) - turn
            step, ahead = ahead, min(stop - at - ahead, U(CHUNK_CELLS))

    @kernel
    def _gather_bits(to, words, position, repeat, inner, at, n):
        """Bits of elements at .. at+n-1 of data (outer, repeat, inner) under a mask (outer, inner)."""
        if repeat == U(1):
            _copy_bits(to, U(0), words, position + at, n)
            return
        row, i = at // inner, at % inner
        done = U(0)
        while done < n:
            cell = position + row // repeat * inner + i
            if inner == U(1):
                step = min(repeat - row % repeat, n - done)
                bit = U(0) - ((U(words[cell >> U(5)]) >> (cell & U(31))) & U(1))
                ones = np.uint32(bit & U(LOW))
                stop = done + step
                while done < stop:
                    room = min(U(32) - (done & U(31)), stop - done)
                    shift = done & U(31)
                    below = U(to[done >> U(5)]) & ((U(1) << shift) - U(1))
                    above = (U(ones) & ((U(1) << room) - U(1))) << shift
                    to[done >> U(5)] = np.uint32(below | above)
                    done += room
                row += step
            else:
                step = min(inner - i, n - done)
                _copy_bits(to, done, words, cell, step)
                done += step
                row += U(1)
                i = U(0)

    @kernel
    def _masked(begin, end, x, y, words, position, repeat, inner, law, stream):
        bits = np.empty(CHUNK_WORDS + 1, np.uint32)
        law, held = coefficients(law, x), np.empty(BLOCK_CELLS, x.dtype)
        at, stop = U(begin), U(end)
        while at < stop:
            step = min(stop - at, U(CHUNK_CELLS))
            _gather_bits(bits, words, U(position), U(repeat), U(inner), at, step)
            for done in range(U(0), step, U(BLOCK_CELLS)):
                _apply(x, y, at + done, bits, done, min(step - done, U(BLOCK_CELLS)), law, stream, held)
            at += step

    @kernel
    def _gaussian(begin, end, x, y, seed0, seed1, offset0, offset1, first0, first1, sigma):
        k0, k1, o0, o1 = U(seed0), U(seed1), U(offset0), U(offset1)
        first, one, spread = U(first0) | U(first1) << U(32), np.float32(1), np.float32(sigma)
        random = np.empty((4, NOISE_COUNTERS), np.uint32)
        factor = np.empty((4, NOISE_COUNTERS), np.float32)
        factors = factor.reshape(-1)
        held = np.empty(NOISE_CELLS, x.dtype)
        at, stop = U(begin), U(end)
        while at < stop:
            lead = (first + at) % U(NOISE_CELLS)
            b = (first + at) // U(NOISE_CELLS) * U(NOISE_COUNTERS)
            c1 = (b >> U(32)) | U(NOISE_DOMAIN)
            for j in range(NOISE_COUNTERS):
                r0, r1, r2, r3 = philox_planes(b + U(j), c1, o0, o1, k0, k1)
                random[0, j], random[1, j] = np.uint32(r0), np.uint32(r1)
                random[2, j], random[3, j] = np.uint32(r2), np.uint32(r3)
            for j in range(NOISE_COUNTERS):
                z0, z1 = normals(U(random[0, j]), U(random[1, j]))
                z2, z3 = normals(U(random[2, j]), U(random[3, j]))
                factor[0, j], factor[1, j] = one + spread * z0, one + spread * z1
                factor[2, j], factor[3, j] = one + spread * z2, one + spread * z3
            n = min(stop - at, U(NOISE_CELLS) - lead)
            for i in range(U(0), n):
                held[i] = x[at + i]
            for i in range(U(0), n):
                y[at + i] = narrow(widen(held[i]) * factors[lead + i], held[0])
            at += n

    @inner
    def _or_complement(to, to_position, words, position, n):
        """ORs the complement of n bits into items of 64; the item after the last of them is touched as well."""
        while n:
            room = min(U(32) - (position & U(31)), n)
            bits = (~U(words[position >> U(5)]) >> (position & U(31))) & ((U(1) << room) - U(1))
            item, shift = to_position >> U(6), to_position & U(63)
            to[item] |= bits << shift
            to[item + U(1)] |= bits >> U(1) >> (U(63) - shift)
            to_position += room
            position += room
            n -= room

    @kernel
    def _dilate(begin, end, to, words, n, inner, block):
        """Each row is first drawn out to its new length by kept cells. A cell is then dropped if it or one of those
        1 to ``block - 1`` times ``inner`` before it is, wherever rows end: before a row lie the cells that the last one
        was drawn out by. Every shift by as many as were looked at doubles how many are."""
        row, grown, reach = U(n) * U(inner), U(n + block - 1) * U(inner), U(block - 1) * U(inner)
        at, stop = U(begin), U(end)
        step = min(max(U(CHUNK_CELLS), reach & ~U(BLOCK_CELLS - 1)), stop - at)
        lead = (reach >> U(6)) + U(2)  # items before a chunk: what it reaches back to, and one for shifts to look at
        items = lead + (step >> U(6)) + U(2)
        drop, wider = np.empty(items, np.uint64), np.empty(items, np.uint64)
        while at < stop:
            chunk_end = min(at + step, stop)
            cell = at - min(at, reach)
            drop[:] = U(0)
            r = cell // grown
            while r * grown < chunk_end:
                skipped = max(cell, r * grown) - r * grown
                if skipped < row:
                    first = r * grown + skipped
                    length = min(row - skipped, chunk_end - first)
                    _or_complement(drop, U(64) * lead + first - at, words, r * row + skipped, length)
                r += U(1)
            seen = U(1)
            while seen < U(block):
                more = min(seen, U(block) - seen)
                back, shift = more * U(inner) >> U(6), more * U(inner) & U(63)
                for i in range(back + U(1), items):
                    before = (drop[i - back] << shift) | (drop[i - back - U(1)] >> U(1) >> (U(63) - shift))
                    wider[i] = drop[i] | before
                drop, wider = wider, drop
                seen += more
            for i in range(U(0), (chunk_end - at + U(31)) >> U(5)):
                to[(at >> U(5)) + i] = np.uint32(~(drop[lead + (i >> U(1))] >> ((i & U(1)) << U(5))))
            at = chunk_end
        if stop & U(31):
            to[stop >> U(5)] &= np.uint32((U(1) << (stop & U(31))) - U(1))

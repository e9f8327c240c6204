"""Plain dropout, Gaussian dropout and the widening of dropped blocks, as kernels of the Numba CPU backend.

`launch` calls them over ranges. float32 and float64 are applied 32 elements at a time by an intrinsic that hands LLVM
whole vectors, because LLVM doesn't vectorise streaming stores otherwise.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (Numba types the kernels, by what they are called with)

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import extending

from ...core.random import LOW, NOISE_CELLS, NOISE_COUNTERS, NOISE_DOMAIN
from .draw import BLOCK_WORDS, CHUNK_CELLS, CHUNK_WORDS, Chunk, U, copy_bits, decide_pending, draw_block, draw_of
from .scalars import OPTIONS, affine, as_computed, dropped, inner, kernel, narrow, normals, philox_planes, stage, widen
from .threads import BLOCK_CELLS

intrinsic: Any = extending.intrinsic
LINE_BYTES = 64
PAGE_BYTES = 4096


def _one(builder: Any) -> Any:
    return builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])


def _apply_run(stream: bool) -> Any:
    """Intrinsic: the affine on 32 elements at address x, under the bits of a word, to address y."""

    @intrinsic  # type: ignore[untyped-decorator]
    def apply_run(typingctx: Any, x: Any, y: Any, word: Any, coefficients: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector = ir.VectorType(context.get_value_type(coefficients.dtype), 32)
            size = coefficients.dtype.bitwidth // 8
            source = builder.inttoptr(args[0], ir.PointerType(vector))
            target = builder.inttoptr(args[1], ir.PointerType(vector))
            spread = [_spread(builder, builder.extract_value(args[3], i), vector) for i in range(len(coefficients))]
            result = builder.fmul(builder.load(source, align=size), spread[0])
            cells = builder.bitcast(args[2], ir.VectorType(ir.IntType(1), 32))
            if len(coefficients) == 1:
                result = builder.select(cells, result, ir.Constant(vector, [0.0] * 32))
            else:
                result = builder.select(cells, builder.fadd(result, spread[1]), spread[2])
            store = builder.store(result, target, align=LINE_BYTES if stream else size)
            if stream:
                store.set_metadata("nontemporal", _one(builder))
            return context.get_dummy_value()

        return types.void(types.uintp, types.uintp, types.uint32, coefficients), codegen

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


class Way(NamedTuple):
    """How a pass goes through memory, as csrc/order.inc.h explains it; the launchers ask the memory policy.

    A pass that streams does so from element `seam` of each chunk on, where a line of y begins. Pieces of so many cells
    come from 2**`page_bits` pages in turn, 2**`round_bits` of each. Data is prefetched so many bytes `ahead`.
    """

    stream: Any
    seam: Any
    cells: Any
    page_bits: Any
    round_bits: Any
    ahead: Any


class How(NamedTuple):
    """How elements are applied: the affine's coefficients, the way through memory, and room for a block of elements.

    If y is x, a loop that reads one and writes the other would not be vectorised: elements are held in between.
    """

    coefficients: Any
    way: Any
    held: Any


@inner
def _bits_at(words, position):
    """32 bits from a position on; the caller sees to it that both words are there."""
    low = U(words[position >> U(5)]) >> (position & U(31))
    high = U(words[(position >> U(5)) + U(1)]) << (U(32) - (position & U(31)))
    return np.uint32(low | high)


@stage
def _apply_rest(x, y, start, bits, lead, n, coefficients):
    for i in range(U(0), n):
        cell = lead + i
        kept = (bits[cell >> U(5)] >> np.uint32(cell & U(31))) & np.uint32(1)
        value = affine(widen(x[start + i]), coefficients)
        y[start + i] = narrow(value if kept else dropped(coefficients), x[U(0)])


def _apply_runs(x: Any, y: Any, start: Any, bits: Any, lead: Any, runs: Any, how: Any) -> None:
    """The affine on whole runs of 32."""
    raise NotImplementedError


@extending.overload(_apply_runs, jit_options=OPTIONS)
def _apply_runs_of(x, y, start, bits, lead, runs, how):
    size = x.dtype.bitwidth // 8

    def vectors(x, y, start, bits, lead, runs, how):
        source, target = U(x.ctypes.data) + start * U(size), U(y.ctypes.data) + start * U(size)
        for run in range(U(0), runs):
            at = run * U(32 * size)
            for line in range(U(0), U(32 * size), U(LINE_BYTES)):
                prefetch(source + at + line + how.way.ahead)
            word = _bits_at(bits, lead + (run << U(5)))
            if how.way.stream:
                stream_run(source + at, target + at, word, how.coefficients)
            else:
                store_run(source + at, target + at, word, how.coefficients)

    def lanes(x, y, start, bits, lead, runs, how):
        held, coefficients = how.held, how.coefficients
        for i in range(runs << U(5)):
            held[i] = x[start + i]
        for run in range(U(0), runs):
            word = _bits_at(bits, lead + (run << U(5)))
            at = run << U(5)
            for i in range(32):
                value = affine(widen(held[at + U(i)]), coefficients)
                kept = (word >> np.uint32(i)) & np.uint32(1)
                y[start + at + U(i)] = narrow(value if kept else dropped(coefficients), held[U(0)])

    return vectors if isinstance(x.dtype, types.Float) else lanes


@inner
def _piece_at(way, k):
    """Which piece of a chunk comes k-th."""
    page, turn = k & ((U(1) << way.page_bits) - U(1)), (k >> way.page_bits) & ((U(1) << way.round_bits) - U(1))
    group = k >> (way.page_bits + way.round_bits)
    return (((group << way.page_bits) | page) << way.round_bits) | turn


@inner
def _apply_block(x, y, start, bits, lead, n, block, how):
    """The affine on a block's share of a chunk of n elements."""
    way = how.way
    pieces = U(BLOCK_CELLS) // way.cells
    for k in range(block * pieces, (block + U(1)) * pieces):
        piece = _piece_at(way, k) if n == U(CHUNK_CELLS) else k
        begin = min(n, piece * way.cells + way.seam)
        end = min(n, begin + way.cells)
        if piece == U(0) and way.seam:
            _apply_rest(x, y, start, bits, lead, begin, how.coefficients)
        done = begin + ((end - begin) & ~U(31))
        _apply_runs(x, y, start + begin, bits, lead + begin, (end - begin) >> U(5), how)
        if done < end:
            _apply_rest(x, y, start + done, bits, lead + done, end - done, how.coefficients)


@kernel
def dropout_forward(begin, end, x, y, words, first, seed, offset, threshold, coefficients, way):
    """Draws one chunk ahead, alternating blocks to draw and blocks to apply: drawing fills the time that data takes."""
    draw = draw_of(seed, offset, U(threshold))
    how = How(as_computed(coefficients, x), way, np.empty(BLOCK_CELLS, x.dtype))
    keeps_of = np.empty((2, CHUNK_WORDS + BLOCK_WORDS + 1), np.uint32)
    undecided = np.empty(CHUNK_WORDS + BLOCK_WORDS, np.uint32)
    lists = np.empty((4, CHUNK_WORDS + 2 * BLOCK_WORDS), np.uint32)
    at, stop = U(begin), U(end)
    lead = (first + at) % U(BLOCK_CELLS)
    word = (first + at) // U(BLOCK_CELLS) * U(BLOCK_WORDS)  # of the chunk drawn
    turn, step, ahead = U(0), U(0), min(stop - at, U(CHUNK_CELLS))
    while step or ahead:
        now, drawn = keeps_of[turn], Chunk(keeps_of[U(1) - turn], undecided, lists)
        apply_blocks = (step + U(BLOCK_CELLS - 1)) // U(BLOCK_CELLS)
        draw_blocks = (lead + ahead + U(BLOCK_CELLS - 1)) // U(BLOCK_CELLS) if ahead else U(0)
        for block in range(U(0), max(apply_blocks, draw_blocks)):
            if block < draw_blocks:
                draw_block(drawn, draw, block, word)
            if block < apply_blocks:
                _apply_block(x, y, at, now, lead, step, block, how)
        decide_pending(drawn, draw, draw_blocks, word)
        if words.size and step:
            line = U(words.ctypes.data) + (at >> U(3))
            if way.stream and step == U(CHUNK_CELLS) and lead == U(0) and line % U(LINE_BYTES) == U(0):
                for byte in range(U(0), U(CHUNK_CELLS // 8), U(LINE_BYTES)):
                    stream_line(line + byte, U(now.ctypes.data) + byte)
            else:
                copy_bits(words, at, now, lead, step)
        at += step
        word += U(CHUNK_WORDS)
        turn = U(1) - turn
        step, ahead = ahead, min(stop - at - ahead, U(CHUNK_CELLS))


@stage
def _gather_bits(to, words, position, repeat, inner, at, n):
    """Bits of elements at .. at+n-1 of data (outer, repeat, inner) under a mask (outer, inner)."""
    if repeat == U(1):
        copy_bits(to, U(0), words, position + at, n)
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
            copy_bits(to, done, words, cell, step)
            done += step
            row += U(1)
            i = U(0)


@kernel
def masked_affine(begin, end, x, y, words, position, repeat, inner, coefficients, way):
    bits = np.empty(CHUNK_WORDS + 1, np.uint32)
    how = How(as_computed(coefficients, x), way, np.empty(BLOCK_CELLS, x.dtype))
    at, stop = U(begin), U(end)
    while at < stop:
        step = min(stop - at, U(CHUNK_CELLS))
        _gather_bits(bits, words, U(position), U(repeat), U(inner), at, step)
        for block in range(U(0), (step + U(BLOCK_CELLS - 1)) // U(BLOCK_CELLS)):
            _apply_block(x, y, at, bits, U(0), step, block, how)
        at += step


@kernel
def gaussian_multiply(begin, end, x, y, first, seed, offset, sigma):
    one, spread = np.float32(1), np.float32(sigma)
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
            r0, r1, r2, r3 = philox_planes(b + U(j), c1, offset, offset >> U(32), seed, seed >> U(32))
            random[0, j], random[1, j] = np.uint32(r0), np.uint32(r1)
            random[2, j], random[3, j] = np.uint32(r2), np.uint32(r3)
        for j in range(NOISE_COUNTERS):
            z0, z1 = normals(U(random[0, j]), U(random[1, j]))
            z2, z3 = normals(U(random[2, j]), U(random[3, j]))
            factor[0, j], factor[1, j] = one + spread * z0, one + spread * z1
            factor[2, j], factor[3, j] = one + spread * z2, one + spread * z3
        count = min(stop - at, U(NOISE_CELLS) - lead)
        for i in range(U(0), count):
            held[i] = x[at + i]
        for i in range(U(0), count):
            y[at + i] = narrow(widen(held[i]) * factors[lead + i], held[0])
        at += count


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
def dilate_bits(begin, end, to, words, n, inner, block):
    """First each row gets its new length, filled with kept cells. Then a cell is dropped if it is dropped itself or if
    a cell 1 to ``block - 1`` times ``inner`` before it is. The ends of rows need no care, because the filling of the
    row before lies in between. Each step combines the cells with themselves shifted by the width already covered, so
    the covered width doubles."""
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

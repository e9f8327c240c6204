"""The words that the fused CUDA kernels are written in: vectors of numbers, sums over lanes and warps.

`compile` hands a `RowVocabulary` to a body of `pointwise`, `norm` or `softmax`. A thread holds ``count`` neighbouring
elements, as a tuple of numbers of the type of the arithmetic: as many as 16 bytes of the data hold, or one. Three types
lie in memory: that of the data, that of the residual stream, and that of the arithmetic, which vectors of columns,
statistics and sums have.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba and LLVM)

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from ...core.checks import FLOAT32, FLOAT64
from .intrinsics import (
    F32,
    F64,
    I32,
    I64,
    Vocabulary,
    call,
    constant,
    define,
    define_in_context,
    operation,
    parts,
    shuffle,
)
from .tile import LANES, TEAM_WARPS, VECTOR_BYTES

SHARED = 3  # address space


class RowVocabulary(Vocabulary):
    """The words of kernels with one pair of storage types, for threads that hold vectors or single elements."""

    def __init__(self, dtype: int, cc: tuple[int, int], residual_dtype: int, wide: bool) -> None:
        super().__init__(dtype, cc, plain=True)
        count = self.vector_items if wide else 1
        self.count, self.doubles, self.team_warps = count, dtype == FLOAT64, TEAM_WARPS
        stream, plain = Vocabulary(residual_dtype, cc, True), Vocabulary(FLOAT64 if self.doubles else FLOAT32, cc, True)
        self.residual_bytes, self.number_bytes = stream.item_bytes, plain.item_bytes
        self.number: Any = np.float64 if self.doubles else np.float32  # of constants
        n: Any = types.float64 if self.doubles else types.float32
        self._stream, self._number_type, self._vector_type = stream, n, types.UniTuple(n, count)
        v, u32, u64, void = self._vector_type, types.uint32, types.uint64, types.void

        def memory(kind, type, count):
            def load(builder, address):
                numbers = kind.read(builder, address, count)
                return numbers if type is v else numbers[0]

            def store(builder, address, value):
                kind.write(builder, address, parts(builder, value) if type is v else [value])

            return define(type, (u64,), load), define(void, (u64, type), store)

        self.load_data, self.store_data = memory(self, v, count)
        self.load_residual, self.store_residual = memory(stream, v, count)
        self.load_numbers, self.store_numbers = memory(plain, v, count)
        self.load_number, self.store_number = memory(plain, n, 1)
        self.number_root = define(n, (n,), operation("nvvm.sqrt.rn.d" if self.doubles else "nvvm.sqrt.rn.f"))
        self.declare(
            spread=(v, n),
            kept=(v, u32, v),
            rounded=(v, v),
            total=(n, v),
            most=(n, v),
            above=(u32, v),
            gather=(u32, u32, u32),
            across=(n, n, u32),
            share=(void, u32, v),
            shared=(v, u32),
            share_number=(void, u32, n),
            shared_number=(n, u32),
            meet=(void,),
        )

    def each(self, function: Callable[..., Any], codes: str) -> Any:
        """Of a function of numbers, the one that applies it to each of a vector's elements.

        ``codes``, one per argument: "v" a vector, "n" a number, "k" a count, "j" the element's place, which is not
        passed.
        """
        of_code = {"v": self._number_type, "n": self._number_type, "k": types.uint64, "j": types.uint64}
        signature = self._number_type(*(of_code[code] for code in codes))
        passed = [self._vector_type if code == "v" else of_code[code] for code in codes if code != "j"]

        def apply(context, builder, *arguments):
            results = []
            for j in range(self.count):
                left, values = iter(arguments), []
                for code in codes:
                    value = constant(j, I64) if code == "j" else next(left)
                    values.append(builder.extract_value(value, j) if code == "v" else value)
                results.append(context.compile_internal(builder, function, signature, values))
            return results

        return define_in_context(self._vector_type, tuple(passed), apply)

    def _spread(self, builder, number):
        return [number] * self.count

    def _kept(self, builder, bits, vector):
        """Elements under 1s, and +0 for the others."""
        zero = ir.Constant(self._computed, 0)
        numbers = parts(builder, vector)
        return [builder.select(self._bit(builder, bits, i), number, zero) for i, number in enumerate(numbers)]

    def _rounded(self, builder, vector):
        """As numbers of the residual stream come back from memory."""
        numbers = parts(builder, vector)
        if self._stream.item_bytes == self.number_bytes:
            return numbers
        return [self._stream.number_of(builder, self._stream.item_of(builder, number)) for number in numbers]

    def _total(self, builder, vector):
        return reduce(builder.fadd, parts(builder, vector))

    def _most(self, builder, vector):
        """The largest of those that are numbers, if the first is one."""

        def larger(a, b):
            return builder.select(builder.fcmp_ordered(">", b, a), b, a)

        return reduce(larger, parts(builder, vector))

    def _above(self, builder, vector):
        """A bit for each: 0 at or below 0, 1 for NaN too."""
        zero, bits = ir.Constant(self._computed, 0), constant(0)
        for i, number in enumerate(parts(builder, vector)):
            above = builder.fcmp_unordered(">", number, zero)
            bits = builder.or_(bits, builder.select(above, constant(1 << i), constant(0)))
        return bits

    def _gather(self, builder, bits, lane):
        """A mask word, of the bits that the lanes beside each other have of it."""
        bits = builder.and_(bits, constant((1 << self.count) - 1))
        place = builder.and_(builder.mul(lane, constant(self.count)), constant(31))
        word, step = builder.shl(bits, place), 1
        while step * self.count < LANES:
            word, step = builder.or_(word, shuffle(builder, word, constant(step), "bfly")), 2 * step
        return word

    def _across(self, builder, number, step):
        """The number of the lane whose own number differs in the bits of ``step``."""
        if not self.doubles:
            return builder.bitcast(shuffle(builder, builder.bitcast(number, I32), step, "bfly"), F32)
        bits = builder.bitcast(number, I64)
        halves = builder.trunc(bits, I32), builder.trunc(builder.lshr(bits, constant(32, I64)), I32)
        low, high = (builder.zext(shuffle(builder, half, step, "bfly"), I64) for half in halves)
        return builder.bitcast(builder.or_(low, builder.shl(high, constant(32, I64))), F64)

    # ---- memory that a block shares ----

    def _place(self, builder, name, size, index):
        """Where a number lies in a block's memory of this name."""
        memory = builder.module.globals.get(name)
        if memory is None:
            kind = ir.ArrayType(self._computed, size)
            memory = ir.GlobalVariable(builder.module, kind, name, SHARED)
            memory.linkage, memory.align, memory.initializer = "internal", VECTOR_BYTES, ir.Constant(kind, ir.Undefined)
        return builder.gep(memory, [constant(0), index])

    def _vector_places(self, builder, thread):
        first, size = builder.mul(thread, constant(self.count)), TEAM_WARPS * LANES * self.count
        return [
            self._place(builder, "fastdrop_vectors", size, builder.add(first, constant(i))) for i in range(self.count)
        ]

    def _number_place(self, builder, warp):
        return self._place(builder, "fastdrop_numbers", TEAM_WARPS, warp)

    def _share(self, builder, thread, vector):
        for place, number in zip(self._vector_places(builder, thread), parts(builder, vector), strict=True):
            builder.store(number, place)

    def _shared(self, builder, thread):
        return [builder.load(place) for place in self._vector_places(builder, thread)]

    def _share_number(self, builder, warp, number):
        builder.store(number, self._number_place(builder, warp))

    def _shared_number(self, builder, warp):
        return builder.load(self._number_place(builder, warp))

    def _meet(self, builder):
        """Of all threads of the block."""
        call(builder, "llvm.nvvm.barrier0", ir.VoidType())

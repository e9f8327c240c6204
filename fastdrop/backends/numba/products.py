"""Products of small matrices in scratch memory, for the attention kernels of the Numba CPU backend.

A panel of the result, `PANEL_ROWS` rows by a vector of `PANEL_BYTES`, is summed in registers over the whole of the
inner axis, as in csrc/products.inc.h. LLVM would not find this in loops over elements, so the panel is written as
vector instructions. Each number of the result is summed in the order of the inner axis, whatever the other extents are.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, extending

from .scalars import stage
from .stages import U, spread, take

intrinsic: Any = extending.intrinsic
LINE_BYTES = 64
# Registers hold the sums, a vector of b and a number of a: 16 of AVX2's, or of AVX-512's that are twice as wide.
PANEL_ROWS = 6
PANEL_BYTES = 128 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 64


@stage
def matrix(rows, columns, zero):
    """Zeros, in whole panels.

    A row takes an odd number of cache lines, because an even one would put all rows into a part of the cache's sets.
    """
    size = np.full(1, zero).itemsize
    panel, line = PANEL_BYTES // size, LINE_BYTES // size
    rows = (np.intp(rows) + PANEL_ROWS - 1) // PANEL_ROWS * PANEL_ROWS
    pitch = (np.intp(columns) + panel - 1) // panel * panel
    if pitch // line % 2 == 0:
        pitch += line
    memory = np.full(rows * pitch + line, zero)
    lead = -np.intp(memory.ctypes.data) % LINE_BYTES // size
    return memory[lead : lead + rows * pitch].reshape(rows, pitch)


@stage
def take_rows(dtype, data, at, step, to, rows, columns):
    """Rows of data, ``step`` elements apart from element ``at`` on."""
    for r in range(U(0), rows):
        take(dtype, data, at + r * step, columns, to[r])


@stage
def take_transposed(dtype, data, at, step, to, rows, columns):
    """The same as columns: to [columns, rows]."""
    line = np.full(columns, to[0, 0])
    for r in range(U(0), rows):
        take(dtype, data, at + r * step, columns, line)
        for i in range(U(0), columns):
            to[i, r] = line[i]


@stage
def product(a, b, c, rows, columns, inner, add):
    """c = a b, or c += a b. c is [rows, columns], b [inner, columns], and a [rows, inner], maybe as a transposed view.

    Rows and columns are rounded up to whole panels.
    """
    width = U(PANEL_BYTES // c.itemsize)
    for j in range(U(0), columns, width):
        for i in range(U(0), rows, U(PANEL_ROWS)):
            _multiply_panel(a, b, c, i, j, inner, add)


@intrinsic  # type: ignore[untyped-decorator]
def _multiply_panel(typingctx: Any, a: Any, b: Any, c: Any, row: Any, column: Any, inner: Any, add: Any) -> Any:
    """The panel of c that begins at that row and column."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = context.get_value_type(c.dtype)
        size = context.get_abi_sizeof(number)
        vector = ir.VectorType(number, PANEL_BYTES // size)
        of_a, of_b, of_c = (_elements(context, builder, *pair) for pair in zip((a, b, c), args, strict=False))
        row, column, inner, add = args[3:]
        rows = [builder.add(row, row.type(r)) for r in range(PANEL_ROWS)]
        zero, contract = ir.Constant(vector, None), ("contract",)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in rows]  # LLVM keeps them in registers
        with cgutils.for_range(builder, inner) as loop:
            line = builder.load(of_b(loop.index, column, vector), align=size)
            for r, total in zip(rows, sums, strict=True):
                factor = spread(builder, builder.load(of_a(r, loop.index, number)), vector)
                term = builder.fmul(factor, line, flags=contract)
                builder.store(builder.fadd(builder.load(total), term, flags=contract), total)
        for r, total in zip(rows, sums, strict=True):
            to = of_c(r, column, vector)
            before = builder.select(add, builder.load(to, align=size), zero)
            builder.store(builder.fadd(before, builder.load(total)), to, align=size)
        return context.get_dummy_value()

    return types.void(a, b, c, types.uintp, types.uintp, types.uintp, types.boolean), codegen


def _elements(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The function from row, column and type to the address in an array."""
    array = context.make_array(kind)(context, builder, value)
    row_step, column_step = cgutils.unpack_tuple(builder, array.strides, 2)

    def address(row: Any, column: Any, element: Any) -> Any:
        offset = builder.add(builder.mul(row, row_step), builder.mul(column, column_step))
        return cgutils.pointer_add(builder, array.data, offset, element.as_pointer())

    return address

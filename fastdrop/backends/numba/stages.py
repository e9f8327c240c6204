"""What the fused kernels of the Numba CPU backend are made of: they read data to scratch, change it, and write it.

`pointwise`, `norm` and `softmax` call these stages. Scratch is an array of the type that is computed in, and no other
memory overlaps it, so LLVM vectorises a stage's loop: strips of cells in the pointwise kernels, whole rows in the
others, as in the C kernels. Arrays come as addresses, 0 for one that is absent, and dtypes as tags. A kernel is
therefore compiled twice, for float32 and for float64, by the type of ``a``, which multiplies kept elements.

Sums over a row are taken in float64, in an order that the row's length decides; sums over columns in the type of the
scratch, row after row within a panel.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import extending

from ...core.checks import BFLOAT16, FLOAT16
from .scalars import inner, narrow, stage, widen

intrinsic: Any = extending.intrinsic
overload: Any = extending.overload
U = np.uint64
RUN = U(32)  # bits taken from a word at a time
ONES = np.uint32(0xFFFFFFFF)


def by_type(stages: Any, scratch: int) -> Any:
    """A function that kernels call: the first stage for scratch of float32, the second for float64.

    ``scratch`` says which argument decides.
    """

    def call(*arguments: Any) -> Any:
        raise NotImplementedError

    @overload(call)
    def stage_of(*arguments):
        stage = stages[arguments[scratch].dtype == types.float64]
        return lambda *arguments: stage(*arguments)

    return call


# ---- memory ----


@intrinsic  # type: ignore[untyped-decorator]
def fetch(typingctx: Any, address: Any, i: Any, like: Any) -> Any:
    """Element i of numbers of like's type, at any address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_element(context, builder, like, args), align=1)

    return like(types.uintp, types.uintp, like), codegen


@intrinsic  # type: ignore[untyped-decorator]
def put(typingctx: Any, address: Any, i: Any, value: Any) -> Any:
    """A value as element i of numbers of its type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _element(context, builder, value, args), align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, value), codegen


def _element(context: Any, builder: Any, kind: Any, args: Any) -> Any:
    """Its address as a step from a base. Only then does LLVM vectorise loops over the elements."""
    return builder.gep(builder.inttoptr(args[0], ir.PointerType(context.get_value_type(kind))), [args[1]])


@inner
def take_as(address, at, n, scratch, like):
    for i in range(U(0), n):
        scratch[i] = widen(fetch(address, at + i, like))


@inner
def _deliver_as(address, at, n, scratch, like):
    for i in range(U(0), n):
        put(address, at + i, narrow(scratch[i], like))


def _by_dtype(as_kind: Any) -> tuple[Any, Any]:
    """A stage that branches on the dtype's tag, and one for float64, which needs no conversion."""

    @stage
    def by_tag(dtype, address, at, n, scratch):
        if dtype == FLOAT16:
            as_kind(address, at, n, scratch, np.int16(0))
        elif dtype == BFLOAT16:
            as_kind(address, at, n, scratch, np.uint16(0))
        else:
            as_kind(address, at, n, scratch, scratch[U(0)])

    @stage
    def as_it_is(dtype, address, at, n, scratch):
        as_kind(address, at, n, scratch, scratch[U(0)])

    return by_tag, as_it_is


take = by_type(_by_dtype(take_as), -1)  # elements at .. at+n-1 of a dtype into the scratch
deliver = by_type(_by_dtype(_deliver_as), -1)  # the scratch's first n numbers as elements at .. at+n-1 of a dtype


@stage
def columns_of(address, columns, beyond, like):
    """A vector of columns, of like's type, and its beginning again for as many more; nothing at address 0."""
    if not address:
        return np.full(0, like)
    scratch = np.full(columns + beyond, like)
    for i in range(U(0), columns):
        scratch[i] = fetch(address, i, like)
    for i in range(columns, columns + beyond):
        scratch[i] = scratch[i - columns]
    return scratch


@inner
def run_at(words, position, n):
    """n bits, 32 at most, from a position on, as a word with others above them; ones at address 0."""
    if not words:
        return ONES
    word, shift = position >> U(5), position & U(31)
    run = U(fetch(words, word, ONES)) >> shift
    if shift + n > RUN:
        run |= U(fetch(words, word + U(1), ONES)) << (RUN - shift)
    return np.uint32(run)


def as_type(number: Any, like: Any) -> Any:
    """A number in like's type."""
    raise NotImplementedError


# LLVM inlines this. Where Numba does, it drops what it takes for dead code, such as writes through fields of a tuple.
@overload(as_type)
def _as_real(number, like):
    real = np.float64 if like == types.float64 else np.float32
    return lambda number, like: real(number)


# ---- stages: scratch in place ----


@stage
def copy(to, h, n):
    for i in range(U(0), n):
        to[i] = h[i]


@stage
def add(h, other, first, n):
    for i in range(U(0), n):
        h[i] += other[first + i]


@stage
def multiply(h, other, n):
    for i in range(U(0), n):
        h[i] *= other[i]


@stage
def multiply_add(sums, h, other, n):
    for i in range(U(0), n):
        sums[i] += h[i] * other[i]


@stage
def scale(h, n, a):
    for i in range(U(0), n):
        h[i] *= a


@intrinsic  # type: ignore[untyped-decorator]
def _drop_word(typingctx: Any, address: Any, at: Any, run: Any, a: Any) -> Any:
    """32 numbers from ``at`` on, as vector instructions: from a loop over bits LLVM makes one step for each."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = context.get_value_type(a)
        vector, size = ir.VectorType(number, 32), context.get_abi_sizeof(number)
        place = builder.bitcast(_element(context, builder, a, args), vector.as_pointer())
        scaled = builder.fmul(builder.load(place, align=size), spread(builder, args[3], vector))
        keep = builder.bitcast(args[2], ir.VectorType(ir.IntType(1), 32))
        builder.store(builder.select(keep, scaled, ir.Constant(vector, None)), place, align=size)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uint32, a), codegen


def spread(builder: Any, number: Any, vector: Any) -> Any:
    """A number in all lanes of a vector, for intrinsics."""
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, lanes)


@stage
def drop(h, words, position, n, a):
    """a h where the bit says so, 0 elsewhere."""
    if not words:
        scale(h, n, a)
        return
    whole, zero = n & ~U(31), as_type(0, a)
    for at in range(U(0), whole, RUN):
        _drop_word(h.ctypes.data, at, run_at(words, position + at, RUN), a)
    run = run_at(words, position + whole, n - whole) if whole < n else ONES
    for i in range(whole, n):
        h[i] = h[i] * a if (run >> np.uint32(i - whole)) & np.uint32(1) else zero


# ---- sums over a row, and over the rows of a panel ----


@intrinsic  # type: ignore[untyped-decorator]
def add_in_any_order(typingctx: Any, a: Any, b: Any) -> Any:
    """A step of a sum whose order LLVM may change, so that it adds in lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1], flags=["reassoc"])

    return types.float64(types.float64, types.float64), codegen


@stage
def row_sum(h, n):
    total = 0.0
    for i in range(U(0), n):
        total = add_in_any_order(total, np.float64(h[i]))
    return total


@stage
def sum_of_squares(h, n, centre):
    total = 0.0
    for i in range(U(0), n):
        distance = np.float64(h[i] - centre)
        total = add_in_any_order(total, distance * distance)
    return total


@stage
def dot(h, other, n):
    total = 0.0
    for i in range(U(0), n):
        total = add_in_any_order(total, np.float64(h[i]) * np.float64(other[i]))
    return total


@inner
def first_row(panel, rows, panels):
    return panel * (rows // panels) + min(panel, rows % panels)


@stage
def put_line(sums, at, line):
    """A line of sums as the one of that number."""
    columns = U(line.size)
    for i in range(U(0), columns):
        put(sums, at * columns + i, line[i])

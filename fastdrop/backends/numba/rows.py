"""The fused kernels of the Numba CPU backend; `rows` has their contract.

As in csrc/rows.inc.h, data goes through a kernel's stages in rooms of the type that it is computed in: strips of cells
in the pointwise kernels, whole rows in the others. Arrays come as addresses, 0 for what a call has not, and dtypes as
tags, so that a kernel is compiled twice, for float32 and for float64: the type of ``a``, what is kept is multiplied by,
tells which. A stage's loop touches rooms, which overlap no other memory, so that LLVM vectorises it.

Sums over a row are taken in float64 and in an order that the row's length decides; sums over columns in the type of the
rooms, row after row within a panel.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import extending

from ...core.activations import GELU, GELU_TANH, RELU, SILU
from ...core.checks import BFLOAT16, FLOAT16
from .math import curves
from .scalars import bits_of, double_of, float_of, inner, kernel, long_bits_of, narrow, stage, widen

intrinsic: Any = extending.intrinsic
overload: Any = extending.overload
U = np.uint64
STRIP_CELLS = 1024  # a multiple of 32: signs are written by whole words
RUN = U(32)  # bits taken from a word at a time
ONES = np.uint32(0xFFFFFFFF)


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
    """As a step from a base, not as an address of its own: only then are loops over it vectorised."""
    return builder.gep(builder.inttoptr(args[0], ir.PointerType(context.get_value_type(kind))), [args[1]])


@inner
def _take_as(address, at, n, room, like):
    for i in range(U(0), n):
        room[i] = widen(fetch(address, at + i, like))


@inner
def _deliver_as(address, at, n, room, like):
    for i in range(U(0), n):
        put(address, at + i, narrow(room[i], like))


def _by_dtype(as_kind: Any) -> tuple[Any, Any]:
    """A stage that asks for the dtype by its tag, and one for float64, which is stored as it is computed."""

    @stage
    def by_tag(dtype, address, at, n, room):
        if dtype == FLOAT16:
            as_kind(address, at, n, room, np.int16(0))
        elif dtype == BFLOAT16:
            as_kind(address, at, n, room, np.uint16(0))
        else:
            as_kind(address, at, n, room, room[U(0)])

    @stage
    def as_it_is(dtype, address, at, n, room):
        as_kind(address, at, n, room, room[U(0)])

    return by_tag, as_it_is


_takes, _deliveries = _by_dtype(_take_as), _by_dtype(_deliver_as)


def _take(dtype: Any, address: Any, at: Any, n: Any, room: Any) -> Any:
    """Elements at .. at+n-1 of a dtype into the room."""
    raise NotImplementedError


def _deliver(dtype: Any, address: Any, at: Any, n: Any, room: Any) -> Any:
    """The room's first n numbers as elements at .. at+n-1 of a dtype."""
    raise NotImplementedError


@overload(_take, inline="always")
def _take_of(dtype, address, at, n, room):
    take = _takes[room.dtype == types.float64]
    return lambda dtype, address, at, n, room: take(dtype, address, at, n, room)


@overload(_deliver, inline="always")
def _deliver_of(dtype, address, at, n, room):
    deliver = _deliveries[room.dtype == types.float64]
    return lambda dtype, address, at, n, room: deliver(dtype, address, at, n, room)


@stage
def _columns(address, columns, beyond, like):
    """A vector of columns, of like's type, and its beginning again for as many more; nothing at address 0."""
    if not address:
        return np.full(0, like)
    room = np.full(columns + beyond, like)
    for i in range(U(0), columns):
        room[i] = fetch(address, i, like)
    for i in range(columns, columns + beyond):
        room[i] = room[i - columns]
    return room


@inner
def _run_at(words, position, n):
    """n bits, 32 at most, from a position on, as a word with others above them; ones at address 0."""
    if not words:
        return ONES
    word, shift = position >> U(5), position & U(31)
    run = U(fetch(words, word, ONES)) >> shift
    if shift + n > RUN:
        run |= U(fetch(words, word + U(1), ONES)) << (RUN - shift)
    return np.uint32(run)


def _as(number: Any, like: Any) -> Any:
    """A number in like's type."""
    raise NotImplementedError


@overload(_as, inline="always")
def _as_real(number, like):
    real = np.float64 if like == types.float64 else np.float32
    return lambda number, like: real(number)


# ---- stages: rooms in place ----


@stage
def _copy(to, h, n):
    for i in range(U(0), n):
        to[i] = h[i]


@stage
def _add(h, other, first, n):
    for i in range(U(0), n):
        h[i] += other[first + i]


@stage
def _multiply(h, other, n):
    for i in range(U(0), n):
        h[i] *= other[i]


@stage
def _multiply_add(sums, h, other, n):
    for i in range(U(0), n):
        sums[i] += h[i] * other[i]


@stage
def _scale(h, n, a):
    for i in range(U(0), n):
        h[i] *= a


@inner
def _drop_run(h, at, n, run, a):
    zero = _as(0, a)
    for k in range(n):
        scaled = h[at + U(k)] * a
        h[at + U(k)] = scaled if (run >> np.uint32(k)) & np.uint32(1) else zero


@stage
def _drop(h, words, position, n, a):
    """a h where the bit says so, 0 elsewhere."""
    if not words:
        _scale(h, n, a)
        return
    whole = n & ~U(31)
    for at in range(U(0), whole, RUN):
        _drop_run(h, at, 32, _run_at(words, position + at, RUN), a)
    if whole < n:
        _drop_run(h, whole, n - whole, _run_at(words, position + whole, n - whole), a)


@stage
def _write_signs(h, words, signs, position, n):
    """The bits of what is kept and not at or below 0, from a position where a word begins."""
    zero = _as(0, h[U(0)])
    for at in range(U(0), n, RUN):
        run, alive = min(n - at, RUN), np.uint32(0)
        for k in range(run):
            alive |= np.uint32(np.uint32(not h[at + k] <= zero) << np.uint32(k))
        put(signs, (position + at) >> U(5), np.uint32(alive & _run_at(words, position + at, run)))


def _curved(double: bool) -> tuple[Any, Any, Any]:
    """Stages of exponentials, activations and their slopes, for float64 or for float32."""
    exponential, _, _, values, slopes, _, _ = curves(double)
    (relu, gelu, gelu_tanh, silu), (relu_slope, gelu_slope, gelu_tanh_slope, silu_slope) = (
        [functions[code] for code in (RELU, GELU, GELU_TANH, SILU)] for functions in (values, slopes)
    )

    @stage
    def exponentials(h, n, top):
        for i in range(U(0), n):
            h[i] = exponential(h[i] - top)

    @stage
    def activate(h, n, activation):
        if activation == RELU:
            for i in range(U(0), n):
                h[i] = relu(h[i])
        elif activation == GELU:
            for i in range(U(0), n):
                h[i] = gelu(h[i])
        elif activation == GELU_TANH:
            for i in range(U(0), n):
                h[i] = gelu_tanh(h[i])
        elif activation == SILU:
            for i in range(U(0), n):
                h[i] = silu(h[i])

    @stage
    def times_slope(g, h, n, activation):
        if activation == RELU:
            for i in range(U(0), n):
                g[i] *= relu_slope(h[i])
        elif activation == GELU:
            for i in range(U(0), n):
                g[i] *= gelu_slope(h[i])
        elif activation == GELU_TANH:
            for i in range(U(0), n):
                g[i] *= gelu_tanh_slope(h[i])
        elif activation == SILU:
            for i in range(U(0), n):
                g[i] *= silu_slope(h[i])

    return exponentials, activate, times_slope


_stages = _curved(False), _curved(True)


def _exponentials(h: Any, n: Any, top: Any) -> Any:
    """The exponentials of h - top."""
    raise NotImplementedError


def _activate(h: Any, n: Any, activation: Any) -> Any:
    raise NotImplementedError


def _times_slope(g: Any, h: Any, n: Any, activation: Any) -> Any:
    """g times the activation's slope at h."""
    raise NotImplementedError


@overload(_exponentials, inline="always")
def _exponentials_of(h, n, top):
    exponentials, _, _ = _stages[h.dtype == types.float64]
    return lambda h, n, top: exponentials(h, n, top)


@overload(_activate, inline="always")
def _activate_of(h, n, activation):
    _, activate, _ = _stages[h.dtype == types.float64]
    return lambda h, n, activation: activate(h, n, activation)


@overload(_times_slope, inline="always")
def _times_slope_of(g, h, n, activation):
    _, _, times_slope = _stages[h.dtype == types.float64]
    return lambda g, h, n, activation: times_slope(g, h, n, activation)


# ---- sums over a row ----


@intrinsic  # type: ignore[untyped-decorator]
def add_in_any_order(typingctx: Any, a: Any, b: Any) -> Any:
    """A step of a sum that may be taken in lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1], flags=["reassoc"])

    return types.float64(types.float64, types.float64), codegen


@stage
def _sum(h, n):
    total = 0.0
    for i in range(U(0), n):
        total = add_in_any_order(total, np.float64(h[i]))
    return total


@stage
def _sum_of_squares(h, n, centre):
    total = 0.0
    for i in range(U(0), n):
        distance = np.float64(h[i] - centre)
        total = add_in_any_order(total, distance * distance)
    return total


@stage
def _dot(h, other, n):
    total = 0.0
    for i in range(U(0), n):
        total = add_in_any_order(total, np.float64(h[i]) * np.float64(other[i]))
    return total


def _ordered(v: Any) -> Any:
    """A float's bits as an integer of the same order, whose largest is found in lanes."""
    raise NotImplementedError


def _unordered(key: Any) -> Any:
    """The float again."""
    raise NotImplementedError


@overload(_ordered, inline="always")
def _ordered_of(v):
    if v == types.float64:
        return lambda v: _turned(np.int64(long_bits_of(v)))
    return lambda v: _turned(np.int32(bits_of(v)))


@overload(_unordered, inline="always")
def _unordered_of(key):
    if key == types.int64:
        return lambda key: double_of(np.uint64(_turned(key)))
    return lambda key: float_of(np.uint32(_turned(key)))


def _turned(key: Any) -> Any:
    """Negative numbers' magnitudes upside down."""
    raise NotImplementedError


@overload(_turned, inline="always")
def _turned_of(key):
    whole, last = (np.int64, 63) if key == types.int64 else (np.int32, 31)
    magnitude, sign = whole((1 << last) - 1), whole(last)
    return lambda key: whole(key ^ whole(whole(key >> sign) & magnitude))


@stage
def _largest(h, n):
    """NaN may be taken for larger or for smaller than anything."""
    largest = _ordered(h[U(0)])
    for i in range(U(1), n):
        key = _ordered(h[i])
        largest = key if key > largest else largest
    return _unordered(largest)


# ---- bias, activation, dropout, residual ----


@kernel
def pointwise_forward(
    begin, end, dtype, residual_dtype, x, input_bias, multiplier, residual, words, y, signs, columns, a, activation
):
    """Over cells, from one where a word of the signs begins."""
    columns, strip = U(columns), U(STRIP_CELLS)
    biases = _columns(input_bias, columns, strip, a)
    h, other = np.full(strip, a), np.full(strip, a)
    stop = U(end)
    for at in range(U(begin), stop, strip):
        n = min(stop - at, strip)
        _take(dtype, x, at, n, h)
        if input_bias:
            _add(h, biases, at % columns, n)
        if signs:
            _write_signs(h, words, signs, at, n)
        _activate(h, n, activation)
        if multiplier:
            _take(dtype, multiplier, at, n, other)
            _multiply(h, other, n)
        _drop(h, words, at, n, a)
        if residual:
            _take(residual_dtype, residual, at, n, other)
            _add(h, other, U(0), n)
        _deliver(residual_dtype, y, at, n, h)


@stage
def _add_to_columns(sums, columns, g, column, n):
    """Adds a strip, which begins at a column and goes round at the last one, to sums over columns."""
    done = U(0)
    while done < n:
        step = min(n - done, columns - column)
        for i in range(U(0), step):
            sums[column + i] += g[done + i]
        done += step
        column = U(0)


@inner
def _first_row(panel, rows, panels):
    return panel * (rows // panels) + min(panel, rows % panels)


@kernel
def pointwise_backward(
    begin,
    end,
    dtype,
    residual_dtype,
    dy,
    x,
    input_bias,
    multiplier,
    words,
    dx,
    dmultiplier,
    sums,
    rows,
    columns,
    panels,
    a,
    activation,
):
    """Over cells or, with sums, over panels."""
    rows, columns, panels, strip = U(rows), U(columns), U(panels), U(STRIP_CELLS)
    biases = _columns(input_bias, columns, strip, a)
    g, h, other = np.full(strip, a), np.full(strip, a), np.full(strip, a)
    line = np.full(columns if sums else U(0), a)
    at, stop = U(begin), U(end)
    for panel in range(U(begin), U(end) if sums else U(begin) + U(1)):
        if sums:
            line[:] = 0
            at, stop = _first_row(panel, rows, panels) * columns, _first_row(panel + U(1), rows, panels) * columns
        while at < stop:
            n = min(stop - at, strip)
            _take(residual_dtype, dy, at, n, g)
            if x:
                _take(dtype, x, at, n, h)
                if input_bias:
                    _add(h, biases, at % columns, n)
            if dmultiplier:
                _copy(other, h, n)
                _activate(other, n, activation)
                _multiply(other, g, n)
                _drop(other, words, at, n, a)
            _times_slope(g, h, n, activation)
            if multiplier:
                _take(dtype, multiplier, at, n, h)
                _multiply(g, h, n)
            _drop(g, words, at, n, a)
            _deliver(dtype, dx, at, n, g)
            if dmultiplier:
                _deliver(dtype, dmultiplier, at, n, other)
            if sums:
                _add_to_columns(line, columns, g, at % columns, n)
            at += n
        if sums:
            _put_line(sums, panel, line)


@stage
def _put_line(sums, at, line):
    """A line of sums as the one of that number."""
    columns = U(line.size)
    for i in range(U(0), columns):
        put(sums, at * columns + i, line[i])


# ---- norms ----


@stage
def _normalise(h, n, mean, rstd):
    for i in range(U(0), n):
        h[i] = (h[i] - mean) * rstd


@kernel
def norm_forward(
    begin,
    end,
    dtype,
    residual_dtype,
    x,
    input_bias,
    residual,
    words,
    weight,
    norm_bias,
    y,
    residual_out,
    statistics,
    columns,
    a,
    eps,
    centred,
):
    """Over rows."""
    columns, none = U(columns), U(0)
    biases, weights = _columns(input_bias, columns, none, a), _columns(weight, columns, none, a)
    norm_biases = _columns(norm_bias, columns, none, a)
    h, other = np.full(columns, a), np.full(columns, a)
    for r in range(U(begin), U(end)):
        at = r * columns
        _take(dtype, x, at, columns, h)
        if input_bias:
            _add(h, biases, U(0), columns)
        _drop(h, words, at, columns, a)
        if residual:
            _take(residual_dtype, residual, at, columns, other)
            _add(h, other, U(0), columns)
        _deliver(residual_dtype, residual_out, at, columns, h)
        if residual_dtype in (FLOAT16, BFLOAT16):  # statistics are those of what is stored
            _take(residual_dtype, residual_out, at, columns, h)
        mean = _as(_sum(h, columns) / np.float64(columns) if centred else 0.0, a)
        variance = _sum_of_squares(h, columns, mean) / np.float64(columns)
        rstd = _as(1.0 / math.sqrt(variance + eps), a)
        put(statistics, U(2) * r, mean)
        put(statistics, U(2) * r + U(1), rstd)
        _normalise(h, columns, mean, rstd)
        if weight:
            _multiply(h, weights, columns)
        if norm_bias:
            _add(h, norm_biases, U(0), columns)
        _deliver(dtype, y, at, columns, h)


@stage
def _norm_slope(g, normal, n, of_g, of_normal, rstd):
    """g becomes the gradient of what was normed."""
    for i in range(U(0), n):
        g[i] = (g[i] - of_g - normal[i] * of_normal) * rstd


@kernel
def norm_backward(
    begin,
    end,
    dtype,
    residual_dtype,
    dy,
    dresidual_out,
    residual_out,
    statistics,
    weight,
    words,
    dx,
    dresidual,
    sums,
    rows,
    columns,
    panels,
    a,
    centred,
):
    """Over panels."""
    rows, columns, panels = U(rows), U(columns), U(panels)
    weights = _columns(weight, columns, U(0), a)
    g, normal = np.full(columns, a), np.full(columns, a)
    width = columns if sums else U(0)
    of_weight, of_norm_bias, of_input_bias = np.full(width, a), np.full(width, a), np.full(width, a)
    for panel in range(U(begin), U(end)):
        of_weight[:] = 0
        of_norm_bias[:] = 0
        of_input_bias[:] = 0
        for r in range(_first_row(panel, rows, panels), _first_row(panel + U(1), rows, panels)):
            at = r * columns
            mean, rstd = fetch(statistics, U(2) * r, a), fetch(statistics, U(2) * r + U(1), a)
            _take(dtype, dy, at, columns, g)
            _take(residual_dtype, residual_out, at, columns, normal)
            _normalise(normal, columns, mean, rstd)
            if sums:
                _multiply_add(of_weight, g, normal, columns)
                _add(of_norm_bias, g, U(0), columns)
            if weight:
                _multiply(g, weights, columns)
            of_g = _as(_sum(g, columns) / np.float64(columns) if centred else 0.0, a)
            of_normal = _as(_dot(g, normal, columns) / np.float64(columns), a)
            _norm_slope(g, normal, columns, of_g, of_normal, rstd)
            if dresidual_out:
                _take(residual_dtype, dresidual_out, at, columns, normal)
                _add(g, normal, U(0), columns)
            if dresidual:
                _deliver(residual_dtype, dresidual, at, columns, g)
            if dx or sums:
                _drop(g, words, at, columns, a)
            if dx:
                _deliver(dtype, dx, at, columns, g)
            if sums:
                _add(of_input_bias, g, U(0), columns)
        if sums:
            _put_line(sums, U(3) * panel, of_weight)
            _put_line(sums, U(3) * panel + U(1), of_norm_bias)
            _put_line(sums, U(3) * panel + U(2), of_input_bias)


# ---- softmax ----


@kernel
def softmax_forward(
    begin,
    end,
    dtype,
    x,
    mask,
    words,
    probabilities,
    y,
    columns,
    heads,
    queries,
    outer_stride,
    head_stride,
    query_stride,
    softmax_scale,
    a,
    causal,
):
    """Over rows."""
    columns, heads, queries, zero = U(columns), U(heads), U(queries), _as(0, a)
    h, other = np.full(columns, a), np.full(columns, a)
    for r in range(U(begin), U(end)):
        at, query, head, outer = r * columns, r % queries, r // queries % heads, r // queries // heads
        keys = min(columns, query + U(1)) if causal else columns
        _take(dtype, x, at, keys, h)
        _scale(h, keys, softmax_scale)
        if mask:
            line = outer * U(outer_stride) + head * U(head_stride) + query * U(query_stride)
            _take_as(mask, line, keys, other, a)
            _add(h, other, U(0), keys)
        largest = _largest(h, keys)
        # Where nothing is left exponentials are then 0, and NaN stays what it is.
        _exponentials(h, keys, zero if largest == -np.inf else largest)
        total = _sum(h, keys)
        _scale(h, keys, _as(1.0 / total if total != 0.0 else 0.0, a))
        h[keys:] = zero
        if probabilities:
            _deliver(dtype, probabilities, at, columns, h)
        _drop(h, words, at, columns, a)
        _deliver(dtype, y, at, columns, h)


@stage
def _softmax_slope(g, p, n, dot, softmax_scale):
    """g becomes the gradient of the scores."""
    for i in range(U(0), n):
        g[i] = (g[i] - dot) * p[i] * softmax_scale


@kernel
def softmax_backward(begin, end, dtype, dy, probabilities, words, dx, y, columns, softmax_scale, a):
    """Over rows."""
    columns = U(columns)
    g, p = np.full(columns, a), np.full(columns, a)
    for r in range(U(begin), U(end)):
        at = r * columns
        _take(dtype, dy, at, columns, g)
        _take(dtype, probabilities, at, columns, p)
        _drop(g, words, at, columns, a)
        _softmax_slope(g, p, columns, _as(_dot(g, p, columns), a), softmax_scale)
        _deliver(dtype, dx, at, columns, g)
        if y:
            _drop(p, words, at, columns, a)
            _deliver(dtype, y, at, columns, p)

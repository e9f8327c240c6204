"""The pointwise kernels of the Numba CPU backend: bias, activation, dropout and residual, and their gradients.

They work strip by strip with `stages`; `launch` calls them over ranges.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from typing import Any

import numpy as np

from .math import curves
from .scalars import kernel, stage
from .stages import (
    RUN,
    U,
    add,
    as_type,
    by_type,
    columns_of,
    copy,
    deliver,
    drop,
    first_row,
    multiply,
    put,
    put_line,
    run_at,
    take,
)

STRIP_CELLS = 1024  # a multiple of 32: signs are written by whole words


@stage
def _write_signs(h, words, signs, position, n):
    """The bits of what is kept and not at or below 0, from a position where a word begins."""
    zero = as_type(0, h[U(0)])
    for at in range(U(0), n, RUN):
        run, alive = min(n - at, RUN), np.uint32(0)
        for k in range(run):
            alive |= np.uint32(np.uint32(not h[at + k] <= zero) << np.uint32(k))
        put(signs, (position + at) >> U(5), np.uint32(alive & run_at(words, position + at, run)))


# ---- activations by a code that is known when a kernel runs ----


@stage
def _refuse(*arguments):
    raise ValueError("unknown activation")


def _activate_or(code: int, function: Any, otherwise: Any) -> Any:
    """A stage that applies a function under its code, and otherwise does what another stage does."""

    @stage
    def activate(h, n, activation):
        if activation == code:
            for i in range(U(0), n):
                h[i] = function(h[i])
        else:
            otherwise(h, n, activation)

    return activate


def _times_slope_or(code: int, slope: Any, otherwise: Any) -> Any:
    @stage
    def times_slope(g, h, n, activation):
        if activation == code:
            for i in range(U(0), n):
                g[i] *= slope(h[i])
        else:
            otherwise(g, h, n, activation)

    return times_slope


def _stages_of(double: bool) -> tuple[Any, Any]:
    activate = times_slope = _refuse
    for code, function in curves(double).activations.items():
        activate = _activate_or(code, function, activate)
        times_slope = _times_slope_or(code, curves(double).slopes[code], times_slope)
    return activate, times_slope


_activate, _times_slope = (by_type(pair, 0) for pair in zip(_stages_of(False), _stages_of(True), strict=True))


# ---- kernels ----


@kernel
def pointwise_forward(
    begin,
    end,
    dtype,
    residual_dtype,
    x,
    input_bias,
    multiplier,
    residual,
    words,
    y,
    signs,
    columns,
    a,
    activation,
):
    """Over cells, from one where a word of the signs begins."""
    columns, strip = U(columns), U(STRIP_CELLS)
    biases = columns_of(input_bias, columns, strip, a)
    h, other = np.full(strip, a), np.full(strip, a)
    stop = U(end)
    for at in range(U(begin), stop, strip):
        n = min(stop - at, strip)
        take(dtype, x, at, n, h)
        if input_bias:
            add(h, biases, at % columns, n)
        if signs:
            _write_signs(h, words, signs, at, n)
        _activate(h, n, activation)
        if multiplier:
            take(dtype, multiplier, at, n, other)
            multiply(h, other, n)
        drop(h, words, at, n, a)
        if residual:
            take(residual_dtype, residual, at, n, other)
            add(h, other, U(0), n)
        deliver(residual_dtype, y, at, n, h)


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
    biases = columns_of(input_bias, columns, strip, a)
    g, h, other = np.full(strip, a), np.full(strip, a), np.full(strip, a)
    line = np.full(columns if sums else U(0), a)
    at, stop = U(begin), U(end)
    for panel in range(U(begin), U(end) if sums else U(begin) + U(1)):
        if sums:
            line[:] = 0
            at, stop = first_row(panel, rows, panels) * columns, first_row(panel + U(1), rows, panels) * columns
        while at < stop:
            n = min(stop - at, strip)
            take(residual_dtype, dy, at, n, g)
            if x:
                take(dtype, x, at, n, h)
                if input_bias:
                    add(h, biases, at % columns, n)
            if dmultiplier:
                copy(other, h, n)
                _activate(other, n, activation)
                multiply(other, g, n)
                drop(other, words, at, n, a)
            _times_slope(g, h, n, activation)
            if multiplier:
                take(dtype, multiplier, at, n, h)
                multiply(g, h, n)
            drop(g, words, at, n, a)
            deliver(dtype, dx, at, n, g)
            if dmultiplier:
                deliver(dtype, dmultiplier, at, n, other)
            if sums:
                _add_to_columns(line, columns, g, at % columns, n)
            at += n
        if sums:
            put_line(sums, panel, line)

"""The norm kernels of the Numba CPU backend: bias, dropout, residual and a norm by rows, and their gradients.

They work row by row with `stages`; `launch` calls them over ranges of rows, or of panels of rows.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

import math

import numpy as np

from ...core.checks import BFLOAT16, FLOAT16
from .scalars import kernel, stage
from .stages import (
    U,
    add,
    as_type,
    columns_of,
    deliver,
    dot,
    drop,
    fetch,
    first_row,
    multiply,
    multiply_add,
    put,
    put_line,
    row_sum,
    sum_of_squares,
    take,
)


@stage
def normalise(h, n, mean, rstd):
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
    biases, weights = columns_of(input_bias, columns, none, a), columns_of(weight, columns, none, a)
    norm_biases = columns_of(norm_bias, columns, none, a)
    h, other = np.full(columns, a), np.full(columns, a)
    for r in range(U(begin), U(end)):
        at = r * columns
        take(dtype, x, at, columns, h)
        if input_bias:
            add(h, biases, U(0), columns)
        drop(h, words, at, columns, a)
        if residual:
            take(residual_dtype, residual, at, columns, other)
            add(h, other, U(0), columns)
        deliver(residual_dtype, residual_out, at, columns, h)
        if residual_dtype in (FLOAT16, BFLOAT16):  # statistics are those of what is stored
            take(residual_dtype, residual_out, at, columns, h)
        mean = as_type(row_sum(h, columns) / np.float64(columns) if centred else 0.0, a)
        variance = sum_of_squares(h, columns, mean) / np.float64(columns)
        rstd = as_type(1.0 / math.sqrt(variance + eps), a)
        put(statistics, U(2) * r, mean)
        put(statistics, U(2) * r + U(1), rstd)
        normalise(h, columns, mean, rstd)
        if weight:
            multiply(h, weights, columns)
        if norm_bias:
            add(h, norm_biases, U(0), columns)
        deliver(dtype, y, at, columns, h)


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
    weights = columns_of(weight, columns, U(0), a)
    g, normal = np.full(columns, a), np.full(columns, a)
    width = columns if sums else U(0)
    of_weight, of_norm_bias, of_input_bias = np.full(width, a), np.full(width, a), np.full(width, a)
    for panel in range(U(begin), U(end)):
        of_weight[:] = 0
        of_norm_bias[:] = 0
        of_input_bias[:] = 0
        for r in range(first_row(panel, rows, panels), first_row(panel + U(1), rows, panels)):
            at = r * columns
            mean, rstd = fetch(statistics, U(2) * r, a), fetch(statistics, U(2) * r + U(1), a)
            take(dtype, dy, at, columns, g)
            take(residual_dtype, residual_out, at, columns, normal)
            normalise(normal, columns, mean, rstd)
            if sums:
                multiply_add(of_weight, g, normal, columns)
                add(of_norm_bias, g, U(0), columns)
            if weight:
                multiply(g, weights, columns)
            of_g = as_type(row_sum(g, columns) / np.float64(columns) if centred else 0.0, a)
            of_normal = as_type(dot(g, normal, columns) / np.float64(columns), a)
            _norm_slope(g, normal, columns, of_g, of_normal, rstd)
            if dresidual_out:
                take(residual_dtype, dresidual_out, at, columns, normal)
                add(g, normal, U(0), columns)
            if dresidual:
                deliver(residual_dtype, dresidual, at, columns, g)
            if dx or sums:
                drop(g, words, at, columns, a)
            if dx:
                deliver(dtype, dx, at, columns, g)
            if sums:
                add(of_input_bias, g, U(0), columns)
        if sums:
            put_line(sums, U(3) * panel, of_weight)
            put_line(sums, U(3) * panel + U(1), of_norm_bias)
            put_line(sums, U(3) * panel + U(2), of_input_bias)

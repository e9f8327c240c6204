"""Tiles of attention's scores, for the attention kernels of the Numba CPU backend.

What forward and backward share: how a tile's queries and keys are read, which of its scores count, the bits that
decide what is dropped, and the way from products to scores. A tile's rows are queries, its columns keys.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...core.checks import BFLOAT16, BOOL, FLOAT16
from .draw import draw_rows
from .products import take_rows, take_transposed
from .scalars import inner, stage, widen
from .stages import ONES, U, add, fetch, run_at, scale

QUERY, KEY, VALUE, MASK, DY, DMASK, CELL = range(7)  # the order of the strides, and of those of one array
OUTER, HEAD, ROW, COLUMN = range(4)


class Call(NamedTuple):
    """What both kernels are given: addresses (0 for none), and extents as uint64. ``heads`` are query's."""

    dtype: Any
    mask_dtype: Any
    mask: Any
    words: Any
    strides: Any
    heads: Any
    queries: Any
    keys: Any
    width: Any
    value_width: Any
    draw: Any  # first, seed, offset, threshold
    softmax_scale: Any
    causal: Any


class Tile(NamedTuple):
    """Some queries of one of query's heads, and some keys, up to the last that one of the queries sees."""

    outer: Any
    head: Any
    query: Any
    rows: Any
    key: Any
    columns: Any


@stage
def strides_at(address):
    strides = np.empty((7, 4), np.uint64)
    for i in range(28):
        strides[i // 4, i % 4] = fetch(address, U(i), U(0))
    return strides


@inner
def element(call, which, outer, head, row):
    """The number of the first element of a row."""
    strides = call.strides[which]
    return outer * strides[OUTER] + head * strides[HEAD] + row * strides[ROW]


@stage
def take_matrix(call, data, which, place, to, rows, transposed):
    """Rows of data from a place on: outer index, head and row."""
    outer, head, row = place
    at, step = element(call, which, outer, head, row), call.strides[which, ROW]
    width = call.value_width if which in (VALUE, DY) else call.width
    if transposed:
        take_transposed(call.dtype, data, at, step, to, rows, width)
    else:
        take_rows(call.dtype, data, at, step, to, rows, width)


@inner
def seen_of(call, query, key, columns):
    """How many of the keys from ``key`` on a query sees."""
    if not call.causal:
        return columns
    return U(0) if query < key else min(columns, query - key + U(1))


@inner
def first_row_of(call, tile):
    return (tile.outer * call.heads + tile.head) * call.queries + tile.query


@inner
def row_bits(tile):
    """How many bits there are for a row, which begins at a word."""
    return (tile.columns + U(31)) & ~U(31)


@stage
def draw_tile(call, tile, bits):
    cell, seed, offset, threshold = call.draw
    cell += element(call, CELL, tile.outer, tile.head, tile.query) + tile.key
    columns, pitch = row_bits(tile), call.strides[CELL, ROW]
    rows = tile.rows if pitch else U(1)  # 1: queries share a row of cells
    if call.words:
        for r in range(U(0), rows):
            for j in range(U(0), columns, U(32)):
                run = run_at(call.words, cell + r * pitch + j, min(U(32), tile.columns - j))
                bits[(r * columns + j) >> U(5)] = run
    elif threshold == U(0) or threshold >> U(32):
        bits[:] = np.uint32(0) if threshold else ONES
    else:
        draw_rows(0, rows * columns, bits, 0, cell, U(0), rows, pitch, columns, seed, offset, threshold)
    words = columns >> U(5)
    for i in range(rows * words, tile.rows * words):
        bits[i] = bits[i - words]


@inner
def _take_apart(address, at, step, n, room, like):
    for j in range(U(0), n):
        room[j] = widen(fetch(address, at + j * step, like))


@stage
def _take_mask(call, at, n, room):
    """What the mask adds to n scores."""
    step = call.strides[MASK, COLUMN]
    if call.mask_dtype == BOOL:
        for j in range(U(0), n):
            room[j] = 0.0 if fetch(call.mask, at + j * step, np.uint8(0)) else -np.inf
    elif call.mask_dtype == FLOAT16:
        _take_apart(call.mask, at, step, n, room, np.int16(0))
    elif call.mask_dtype == BFLOAT16:
        _take_apart(call.mask, at, step, n, room, np.uint16(0))
    else:
        _take_apart(call.mask, at, step, n, room, room[0])


@stage
def make_scores(call, tile, row, x, room):
    """From products to scores, in place; -infinity behind those that are seen."""
    query = tile.query + row
    keys = seen_of(call, query, tile.key, tile.columns)
    scale(x, keys, call.softmax_scale)
    if call.mask:
        at = element(call, MASK, tile.outer, tile.head, query) + tile.key * call.strides[MASK, COLUMN]
        _take_mask(call, at, keys, room)
        add(x, room, U(0), keys)
    x[keys : tile.columns] = -np.inf

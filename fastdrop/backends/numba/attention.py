"""The attention kernels of the Numba CPU backend: attention with dropout in memory that grows with queries plus keys.

They follow csrc/attention.inc.h in simpler form. Scores are made a tile at a time in scratch: a product of matrices
(`products`), then passes over its rows that leave dropped exponentials, then the product of these with the values. The
tile's mask is drawn beside it. Forward keeps a running maximum and sum for each query, and makes up for a new maximum.
Backward makes the scores and the mask again.

A unit of work is a chunk of queries of a head forward, and a part of the keys of a head backward: the keys of a tile
are brought into the form that products need once for all queries of the unit.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .products import PANEL_ROWS, matrix, product
from .scalars import inner, kernel, stage
from .softmax import exponentials, largest_of, softmax_slope
from .stages import U, as_type, deliver, dot, drop, fetch, first_row, put, row_sum, scale, take
from .tiles import (
    COLUMN,
    DMASK,
    DY,
    KEY,
    QUERY,
    VALUE,
    Call,
    Tile,
    draw_tile,
    element,
    first_row_of,
    make_scores,
    row_bits,
    seen_of,
    strides_at,
    take_matrix,
)

TILE_QUERIES, TILE_KEYS = 96, 256  # at most
CHUNK_QUERIES = 6 * TILE_QUERIES
ROWS, KEYS, CHUNK = U(TILE_QUERIES), U(TILE_KEYS), U(CHUNK_QUERIES)


class Forward(NamedTuple):
    """Scratch of forward: of a tile, whose keys are transposed, and from ``query`` on of a chunk of queries."""

    keys: Any
    values: Any
    scores: Any
    bits: Any
    room: Any
    query: Any
    sums: Any
    largest: Any
    totals: Any


class Backward(NamedTuple):
    """Scratch of backward, of a tile. dkey and dvalue are sums over all queries."""

    keys: Any
    keys_transposed: Any
    values_transposed: Any
    query: Any
    dy: Any
    scores: Any
    slopes: Any
    product: Any
    dkey: Any
    dvalue: Any
    bits: Any
    room: Any


class Arrays(NamedTuple):
    """Addresses of arrays, 0 for none; of dquery, that of the part to add to."""

    query: Any
    key: Any
    value: Any
    dy: Any
    y: Any
    statistics: Any
    dquery: Any
    dkey: Any
    dvalue: Any
    dmask: Any


# ---- forward ----


@stage
def _lose(sums, n):
    """What was summed becomes NaN. It stays 0 if nothing was kept."""
    for i in range(U(0), n):
        if sums[i] != 0:
            sums[i] = np.nan


@stage
def _attend_row(call, s, tile, row, at):
    """Scores become dropped exponentials under the running largest score of query ``at`` of the chunk.

    What was summed under another one before is multiplied.
    """
    x, old, one = s.scores[row], s.largest[at], as_type(1, call.softmax_scale)
    make_scores(call, tile, row, x, s.room)
    largest = largest_of(x, tile.columns)
    top = largest if largest > old else old
    # Where nothing is seen -inf - -inf would be NaN.
    exponentials(x, tile.columns, as_type(0, one) if top == -np.inf else top)
    total = row_sum(x, tile.columns)
    if np.isnan(total):  # all of the row becomes NaN; the largest may have passed it over
        top = as_type(np.nan, one)
        x[: seen_of(call, tile.query + row, tile.key, tile.columns)] = top
    drop(x, s.bits.ctypes.data, row * row_bits(tile), tile.columns, one)
    factor = 1.0 if top == old or old == -np.inf else np.exp(np.float64(old) - np.float64(top))
    if np.isnan(factor):
        _lose(s.sums[at], call.value_width)
    elif factor != 1.0:
        scale(s.sums[at], call.value_width, as_type(factor, one))
    s.largest[at] = top
    s.totals[at] = s.totals[at] * factor + total


@stage
def _attend_keys(call, s, chunk, key, columns):
    """The keys in scratch, under all queries of a chunk."""
    outer, head, first, queries = chunk
    for at in range(U(0), queries, ROWS):
        query, rows = first + at, min(ROWS, queries - at)
        tile = Tile(outer, head, query, rows, key, seen_of(call, query + rows - U(1), key, columns))
        if tile.columns == U(0):
            continue
        product(s.query[at:], s.keys, s.scores, rows, tile.columns, call.width, False)
        draw_tile(call, tile, s.bits)
        for r in range(U(0), rows):
            _attend_row(call, s, tile, r, at + r)
        product(s.scores, s.values, s.sums[at:], rows, call.value_width, tile.columns, True)


@stage
def _put_results(call, s, y, statistics, row, queries, a):
    for r in range(U(0), queries):
        total, at = s.totals[r], row + r
        share = as_type(0.0 if total == 0.0 else 1.0 / total, a)
        put(statistics, U(2) * at, as_type(np.inf, a) if total == 0.0 else s.largest[r])
        put(statistics, U(2) * at + U(1), share)
        scale(s.sums[r], call.value_width, a if np.isnan(share) else share * a)  # sums have the NaN
        deliver(call.dtype, y, at * call.value_width, call.value_width, s.sums[r])


@stage
def _forward_scratch(call, zero):
    queries = min(CHUNK, call.queries)
    return Forward(
        matrix(call.width, KEYS, zero),
        matrix(KEYS, call.value_width, zero),
        matrix(ROWS, KEYS, zero),
        np.empty(TILE_QUERIES * TILE_KEYS // 32, np.uint32),
        np.full(KEYS, zero),
        matrix(queries, call.width, zero),
        matrix(queries, call.value_width, zero),
        np.full(queries, zero),
        np.empty(queries),
    )


@kernel
def attention_forward(
    begin,
    end,
    dtype,
    mask_dtype,
    query,
    key,
    value,
    mask,
    words,
    y,
    statistics,
    strides,
    heads,
    group,
    queries,
    keys,
    width,
    value_width,
    first,
    seed,
    offset,
    threshold,
    softmax_scale,
    a,
    causal,
):
    """Over chunks of queries of heads."""
    heads, queries, keys, width, value_width = U(heads * group), U(queries), U(keys), U(width), U(value_width)
    given, draw = (dtype, mask_dtype, mask, words, strides_at(strides)), (first, seed, offset, U(threshold))
    call = Call(*given, heads, queries, keys, width, value_width, draw, softmax_scale, causal)
    chunks, s = (queries + CHUNK - U(1)) // CHUNK, _forward_scratch(call, as_type(0, a))
    for unit in range(U(begin), U(end)):
        row, start = unit // chunks, unit % chunks * CHUNK
        outer, head, shared = row // heads, row % heads, row % heads // U(group)
        rows = min(CHUNK, queries - start)
        take_matrix(call, query, QUERY, (outer, head, start), s.query, rows, False)
        s.sums[:], s.largest[:], s.totals[:] = 0, -np.inf, 0
        seen = seen_of(call, start + rows - U(1), U(0), keys)
        for at in range(U(0), seen, KEYS):
            columns = min(KEYS, seen - at)
            take_matrix(call, key, KEY, (outer, shared, at), s.keys, columns, True)
            take_matrix(call, value, VALUE, (outer, shared, at), s.values, columns, False)
            _attend_keys(call, s, (outer, head, start, rows), at, columns)
        _put_results(call, s, y, statistics, row * queries + start, rows, a)


# ---- backward ----


@inner
def _add_apart(address, at, step, n, h):
    """h is added to numbers of its type, to one of them if step is 0."""
    for i in range(U(0), n):
        put(address, at + i * step, fetch(address, at + i * step, h[i]) + h[i])


@stage
def _slope_row(call, arrays, s, tile, row, a):
    """From scores to dropped probabilities, and from products with dy to gradients of products."""
    x, d, columns, query, zero = s.scores[row], s.slopes[row], tile.columns, tile.query + row, as_type(0, a)
    bits, position, at = s.bits.ctypes.data, row * row_bits(tile), first_row_of(call, tile) + row
    keys = seen_of(call, query, tile.key, columns)
    make_scores(call, tile, row, x, s.room)
    exponentials(x, columns, fetch(arrays.statistics, U(2) * at, a))
    scale(x, columns, fetch(arrays.statistics, U(2) * at + U(1), a))
    if arrays.y:
        take(call.dtype, arrays.y, at * call.value_width, call.value_width, s.room)
        drop(d, bits, position, columns, a)
        softmax_slope(d, x, keys, as_type(dot(s.dy[row], s.room, call.value_width), a), as_type(1, a))
        d[keys:columns] = zero
        if arrays.dmask:
            step = call.strides[DMASK, COLUMN]
            to = element(call, DMASK, tile.outer, tile.head, query) + tile.key * step
            _add_apart(arrays.dmask, to, step, keys, d)
        scale(d, keys, call.softmax_scale)
        d[columns : columns + U(PANEL_ROWS)] = zero
    drop(x, bits, position, columns, a)
    x[keys : columns + U(PANEL_ROWS)] = zero  # also what is NaN in a row with NaN, though it is not seen


@stage
def _slope_tile(call, arrays, s, tile, a):
    rows, columns, width, value_width = tile.rows, tile.columns, call.width, call.value_width
    place = tile.outer, tile.head, tile.query
    take_matrix(call, arrays.query, QUERY, place, s.query, rows, False)
    take_matrix(call, arrays.dy, DY, place, s.dy, rows, False)
    product(s.query, s.keys_transposed, s.scores, rows, columns, width, False)
    if arrays.y:
        product(s.dy, s.values_transposed, s.slopes, rows, columns, value_width, False)
    draw_tile(call, tile, s.bits)
    for r in range(U(0), rows):
        _slope_row(call, arrays, s, tile, r, a)
    if arrays.dvalue:
        product(s.scores.T, s.dy, s.dvalue, columns, value_width, rows, True)
    if arrays.dkey:
        product(s.slopes.T, s.query, s.dkey, columns, width, rows, True)
    if arrays.dquery:
        product(s.slopes, s.keys, s.product, rows, width, columns, False)
        for r in range(U(0), rows):
            _add_apart(arrays.dquery, (first_row_of(call, tile) + r) * width, U(1), width, s.product[r])


@stage
def _slope_keys(call, arrays, s, keys, group, a):
    """Some keys of a head under all queries of its group."""
    outer, shared, key, columns = keys
    take_matrix(call, arrays.key, KEY, (outer, shared, key), s.keys, columns, False)
    take_matrix(call, arrays.key, KEY, (outer, shared, key), s.keys_transposed, columns, True)
    if arrays.y:
        take_matrix(call, arrays.value, VALUE, (outer, shared, key), s.values_transposed, columns, True)
    s.dkey[:], s.dvalue[:] = 0, 0
    for head in range(shared * group, (shared + U(1)) * group):
        for query in range(U(0), call.queries, ROWS):
            rows = min(ROWS, call.queries - query)
            tile = Tile(outer, head, query, rows, key, seen_of(call, query + rows - U(1), key, columns))
            if tile.columns:
                _slope_tile(call, arrays, s, tile, a)
    row = (outer * call.heads // group + shared) * call.keys + key
    for to, sums, width in ((arrays.dkey, s.dkey, call.width), (arrays.dvalue, s.dvalue, call.value_width)):
        for r in range(U(0), columns):
            if to:
                deliver(call.dtype, to, (row + r) * width, width, sums[r])


@stage
def _backward_scratch(call, zero):
    return Backward(
        matrix(KEYS, call.width, zero),
        matrix(call.width, KEYS, zero),
        matrix(call.value_width, KEYS, zero),
        matrix(ROWS, call.width, zero),
        matrix(ROWS, call.value_width, zero),
        matrix(ROWS, KEYS, zero),
        matrix(ROWS, KEYS, zero),
        matrix(ROWS, call.width, zero),
        matrix(KEYS, call.width, zero),
        matrix(KEYS, call.value_width, zero),
        np.empty(TILE_QUERIES * TILE_KEYS // 32, np.uint32),
        np.full(max(KEYS, call.value_width), zero),
    )


@kernel
def attention_backward(
    begin,
    end,
    dtype,
    mask_dtype,
    query,
    key,
    value,
    mask,
    words,
    dy,
    y,
    statistics,
    dquery,
    dkey,
    dvalue,
    dmask,
    strides,
    outer,
    heads,
    group,
    queries,
    keys,
    width,
    value_width,
    parts,
    first,
    seed,
    offset,
    threshold,
    softmax_scale,
    a,
    causal,
):
    """Over parts of the keys of heads."""
    outer, heads, group, parts = U(outer), U(heads), U(group), U(parts)
    queries, keys, width, value_width = U(queries), U(keys), U(width), U(value_width)
    given, draw = (dtype, mask_dtype, mask, words, strides_at(strides)), (first, seed, offset, U(threshold))
    call = Call(*given, heads * group, queries, keys, width, value_width, draw, softmax_scale, causal)
    s, tiles = _backward_scratch(call, as_type(0, a)), (keys + KEYS - U(1)) // KEYS
    part_bytes = outer * heads * group * queries * width * U(s.dkey.itemsize)
    for unit in range(U(begin), U(end)):
        part, head = unit % parts, unit // parts
        dquery_part = U(dquery) + part * part_bytes if dquery else U(0)
        arrays = Arrays(query, key, value, dy, y, statistics, dquery_part, dkey, dvalue, dmask)
        for t in range(first_row(part, tiles, parts), first_row(part + U(1), tiles, parts)):
            some = head // heads, head % heads, t * KEYS, min(KEYS, keys - t * KEYS)
            _slope_keys(call, arrays, s, some, group, a)

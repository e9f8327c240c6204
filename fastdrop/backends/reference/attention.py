"""Attention with dropout, in NumPy: `attention_forward` and its gradient, one head of query after the other.

Tensors are read at strides: the table of primitives says at which. The package's docstring has the contract that all
primitives share.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ...core.checks import BOOL
from ...core.mask import word_count
from ..generate import primitive
from .mask import draw_bits
from .storage import read_doubles, unpack_bits, write_doubles

Array = NDArray[Any]
QUERY, KEY, VALUE, MASK, DY, DMASK, CELL = range(7)  # the order of the strides


@primitive
def attention_forward(p: Any) -> None:
    """``y = W value``, where the weights W are a softmax by rows, of which dropout keeps those with a bit, times a.

    ``statistics`` are each row's largest score and one over the sum of ``exp(score - largest)``, before dropout. A row
    that sees no key has infinity and 0 there, and its weights are 0. A row with a NaN, or with infinity for its largest
    score, becomes NaN where it is kept. An infinite value or one that is NaN may reach queries that do not see its key:
    0 times it is NaN. How many it reaches is up to the backend.
    """
    y, statistics = _results(p, p.y, p.value_width), _results(p, p.statistics, 2)
    for head in _heads(p):
        with np.errstate(all="ignore"):
            scores, keep = _scores(p, head), _keep(p, head) & _seen(p)
            largest = scores.max(1, keepdims=True)
            exponentials = np.exp(scores - np.where(largest == -np.inf, 0.0, largest))
            total = exponentials.sum(1, keepdims=True)
            share = np.where(total == 0, 0.0, 1 / total)
            weights = np.where(keep, np.where(np.isnan(total), np.nan, exponentials) * share * p.a, 0.0)
            write_doubles(p.dtype, y[head.outer, head.of_query], weights @ head.value)
            statistics[head.outer, head.of_query] = np.hstack([np.where(total == 0, np.inf, largest), share])


@primitive
def attention_backward(p: Any) -> None:
    """The gradients of `attention_forward`, of those that have an array.

    dquery and dmask are added to. dquery is the sum of its parts, and all of it goes to the first part here. dkey and
    dvalue are written.
    """
    statistics = _results(p, p.statistics, 2)
    y = None if p.y is None else _results(p, p.y, p.value_width)
    dkey, dvalue = (np.zeros((p.outer, p.heads, p.keys, width)) for width in (p.width, p.value_width))
    for head in _heads(p):
        at = head.outer, head.of_query
        with np.errstate(all="ignore"):
            largest, share = statistics[at][:, :1].astype(np.float64), statistics[at][:, 1:].astype(np.float64)
            probabilities, keep = np.exp(_scores(p, head) - largest) * share, _keep(p, head) & _seen(p)
            dy = _read(p, p.dy, DY, head.outer, head.of_query, (p.queries, p.value_width))
            dvalue[head.outer, head.of_key] += np.where(keep, probabilities * p.a, 0.0).T @ dy
            if y is None:
                continue
            dot = (dy * read_doubles(p.dtype, y[at], dy.shape)).sum(1, keepdims=True)
            dscores = probabilities * (np.where(keep, dy @ head.value.T * p.a, 0.0) - dot)
            dscores = np.where(_seen(p), dscores, 0.0)
            if p.dmask is not None:
                _add_to_mask(p, head, dscores)
            dkey[head.outer, head.of_key] += p.softmax_scale * dscores.T @ head.query
            if p.dquery is not None:
                dquery = p.dquery.reshape(p.parts, p.outer, -1, p.queries, p.width)
                dquery[0][at] += p.softmax_scale * dscores @ head.key
    for to, gradient in ((p.dkey, dkey), (p.dvalue, dvalue)):
        if to is not None:
            write_doubles(p.dtype, to, gradient)


def _heads(p: Any) -> Iterator[SimpleNamespace]:
    """Each head of query, and what it attends to, as doubles."""
    for outer in range(p.outer):
        for of_query in range(p.heads * p.group):
            head = SimpleNamespace(outer=outer, of_query=of_query, of_key=of_query // p.group)
            head.query = _read(p, p.query, QUERY, outer, of_query, (p.queries, p.width))
            head.key = _read(p, p.key, KEY, outer, head.of_key, (p.keys, p.width))
            if p.value is not None:
                head.value = _read(p, p.value, VALUE, outer, head.of_key, (p.keys, p.value_width))
            yield head


def _at(p: Any, x: Array, which: int, outer: int, head: int, shape: tuple[int, int]) -> Array:
    """Rows and columns of x, where its strides say they are."""
    by_outer, by_head, row, column = (int(stride) for stride in p.strides.reshape(-1, 4)[which])
    first = outer * by_outer + head * by_head
    reach = 1 + first + (shape[0] - 1) * row + (shape[1] - 1) * column
    flat = as_strided(x, (reach,), (x.itemsize,))
    return as_strided(flat[first:], shape, (row * x.itemsize, column * x.itemsize))


def _read(p: Any, x: Array, which: int, outer: int, head: int, shape: tuple[int, int]) -> Array:
    """The same as doubles."""
    return read_doubles(p.dtype, _at(p, x, which, outer, head, shape), shape)


def _results(p: Any, x: Array, width: int) -> Array:
    return x.reshape(p.outer, p.heads * p.group, p.queries, width)


def _seen(p: Any) -> Any:
    """Which keys each query sees."""
    return np.tri(p.queries, p.keys, dtype=np.bool_) if p.causal else np.ones((p.queries, p.keys), np.bool_)


def _scores(p: Any, head: SimpleNamespace) -> Array:
    scores = p.softmax_scale * head.query @ head.key.T
    if p.mask is not None:
        mask = _at(p, p.mask, MASK, head.outer, head.of_query, scores.shape)
        mask = np.where(mask, 0.0, -np.inf) if p.mask_dtype == BOOL else read_doubles(p.mask_dtype, mask, scores.shape)
        scores = scores + mask
    return np.where(_seen(p), scores, -np.inf)


def _keep(p: Any, head: SimpleNamespace) -> Any:
    """The head's part of the mask."""
    by_outer, by_head, row, column = (int(stride) for stride in p.strides.reshape(-1, 4)[CELL])
    first = p.first + head.outer * by_outer + head.of_query * by_head
    n = (p.queries - 1) * row + (p.keys - 1) * column + 1
    if p.words is not None:
        cells = unpack_bits(p.words, first, n)
    elif p.threshold == 0 or p.threshold >> 32:
        return np.full((p.queries, p.keys), p.threshold == 0)
    else:
        words = np.zeros(word_count(n), np.uint32)
        draw_bits(words, 0, first, n, p.seed, p.offset, p.threshold)
        cells = unpack_bits(words, 0, n)
    return as_strided(cells, (p.queries, p.keys), (row * cells.itemsize, column * cells.itemsize))


def _add_to_mask(p: Any, head: SimpleNamespace, dscores: Array) -> None:
    """Adds the gradient of the scores to the mask's, of which elements with a stride of 0 are one."""
    _, _, row, column = p.strides.reshape(-1, 4)[DMASK]
    if row == 0:
        dscores = dscores.sum(0, keepdims=True)
    if column == 0:
        dscores = dscores.sum(1, keepdims=True)
    to = _at(p, p.dmask, DMASK, head.outer, head.of_query, dscores.shape)
    to += dscores

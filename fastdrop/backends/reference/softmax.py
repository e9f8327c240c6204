"""Scale, mask, softmax by rows and dropout, in NumPy: `softmax_forward` and its gradient.

A row holds the scores of one query with all keys. The package's docstring has the contract that all fused primitives
share.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..generate import primitive
from .storage import read_bits, read_doubles, write_doubles


@primitive
def softmax_forward(p: Any) -> None:
    """``probabilities``, the softmax of ``softmax_scale * x + mask`` by rows, and ``y = bit ? a * probabilities : 0``.

    Row r is query ``r % queries`` of head ``r // queries % heads``. Its line of the mask, a flat array, begins at
    element ``r // queries // heads * outer_stride + head * head_stride + query * query_stride``. Under ``causal`` a
    query sees the keys up to its own number. A row is 0 if its scores are all minus infinity.
    """
    shape = p.rows, p.columns
    with np.errstate(all="ignore"):
        scores, query = masked_scores(p), np.arange(p.rows) % p.queries
        if p.causal:
            scores = np.where(np.arange(p.columns) <= query[:, None], scores, -np.inf)
        largest = scores.max(1, keepdims=True)
        exponentials = np.exp(scores - largest)
        result = exponentials / exponentials.sum(1, keepdims=True)
        result = np.where(largest == -np.inf, 0.0, result)
        if p.causal:
            result = np.where(np.arange(p.columns) <= query[:, None], result, 0.0)
        if p.probabilities is not None:
            write_doubles(p.dtype, p.probabilities, result)
        write_doubles(p.dtype, p.y, np.where(read_bits(p.words, shape), result * p.a, 0.0))


def masked_scores(p: Any) -> Any:
    """``softmax_scale * x + mask``, ``[rows, columns]``."""
    scores = read_doubles(p.dtype, p.x, (p.rows, p.columns)) * p.softmax_scale
    if p.mask is None:
        return scores
    row = np.arange(p.rows)
    query, head, outer = row % p.queries, row // p.queries % p.heads, row // p.queries // p.heads
    begin = outer * p.outer_stride + head * p.head_stride + query * p.query_stride
    return scores + p.mask.reshape(-1)[begin[:, None] + np.arange(p.columns)]


@primitive
def softmax_backward(p: Any) -> None:
    """``dx = softmax_scale * probabilities * (g - (g * probabilities).sum())`` by rows, ``g = bit ? a * dy : 0``.

    y, if it is wanted, takes what forward's y was, up to rounding: ``bit ? a * probabilities : 0``.
    """
    shape = p.rows, p.columns
    with np.errstate(all="ignore"):
        keep, probabilities = read_bits(p.words, shape), read_doubles(p.dtype, p.probabilities, shape)
        g = np.where(keep, read_doubles(p.dtype, p.dy, shape) * p.a, 0.0)
        if p.y is not None:
            write_doubles(p.dtype, p.y, np.where(keep, probabilities * p.a, 0.0))
        dx = (g - (g * probabilities).sum(1, keepdims=True)) * probabilities * p.softmax_scale
        write_doubles(p.dtype, p.dx, dx)

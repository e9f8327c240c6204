"""Tiles of attention scores, in NumPy: `attention_forward` and its gradient.

A tile holds the scores of some queries with some keys. The caller multiplies matrices before and after, and goes from
tile to tile. The package's docstring has the contract that all fused primitives share.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..generate import primitive
from .softmax import masked_scores
from .storage import read_bits, read_doubles, write_doubles


def _seen(p: Any) -> Any:
    """Which columns each row sees."""
    query = p.first_query + np.arange(p.rows) % p.queries
    return (p.first_key + np.arange(p.columns) <= query[:, None]) if p.causal else np.ones((1, p.columns), bool)


@primitive
def attention_forward(p: Any) -> None:
    """One more tile for the running maximum m and sum l of each row, ``before`` and ``after``: ``[rows, 2]``.

    Without ``before``, m is minus infinity and l is 0. ``y = bit ? exp(score - m) : 0`` with the new m. ``scaled`` is
    ``totals``, what the caller has added up so far, in units of the new m. A row that has seen nothing yet keeps its m,
    and its y is 0. A row with NaN or infinity becomes NaN.
    """
    shape = p.rows, p.columns
    with np.errstate(all="ignore"):
        scores = np.where(_seen(p), masked_scores(p), -np.inf)
        before = np.tile([-np.inf, 0.0], p.rows) if p.before is None else p.before.astype(np.float64)
        old, total = before.reshape(p.rows, 2).T
        top = np.maximum(old, scores.max(1))
        base = np.where(top == -np.inf, 0.0, top)
        exponentials = np.exp(scores - base[:, None])
        lost = np.isnan(exponentials.sum(1))
        top, exponentials[lost] = np.where(lost, np.nan, top), np.nan
        factor = np.where(top == old, 1.0, np.exp(old - top))
        after = np.stack([top, total * factor + exponentials.sum(1)], 1)
        p.after.reshape(p.rows, 2)[:] = after
        write_doubles(p.dtype, p.y, np.where(read_bits(p.words, shape) & _seen(p), exponentials, 0.0))
        if p.scaled is not None:
            p.scaled.reshape(p.rows, p.width)[:] = p.totals.reshape(p.rows, p.width) * factor[:, None]


@primitive
def attention_backward(p: Any) -> None:
    """Exponentials ``exp(score - base)`` again: dropped in y, and in dx the gradient of the scores.

    With each row's log-sum-exp as base they are probabilities, and dot is the row's sum of ``dy * y``. With its largest
    score as base, which loses no digits however large it is, dy and dot have to be divided by the row's sum of
    exponentials before. The base of a row that saw nothing is plus infinity.
    """
    shape = p.rows, p.columns
    with np.errstate(all="ignore"):
        base, dot = p.base_and_dot.astype(np.float64).reshape(p.rows, 2, 1).swapaxes(0, 1)
        keep, seen = read_bits(p.words, shape), _seen(p)
        probabilities = np.where(seen, np.exp(masked_scores(p) - base), 0.0)
        dx = None
        if p.dx is not None:
            g = np.where(keep, read_doubles(p.dtype, p.dy, shape) * p.a, 0.0)
            dx = np.where(seen, (g - dot) * probabilities, 0.0)
        if p.y is not None:
            write_doubles(p.dtype, p.y, np.where(keep, probabilities * p.a, 0.0))
        if dx is not None:
            write_doubles(p.dtype, p.dx, dx)

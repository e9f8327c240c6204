"""The kept rows and columns of a matrix, in NumPy: the definition of these primitives."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..generate import primitive


@primitive
def gather_cells(p: Any) -> None:
    """``y[r, c] = x[kept_rows[r], kept_columns[c]]``, y being ``[m, n]`` with n at least 1, and x ``[height, width]``.

    The indices of each kind ascend. Elements keep their bits.
    """
    x, y = p.x.reshape(p.height, p.width), p.y.reshape(p.m, p.n)
    y[:] = x[np.ix_(p.kept_rows, p.kept_columns)]


@primitive
def scatter_cells(p: Any) -> None:
    """``y[kept_rows[r], kept_columns[c]] = x[r, c]``, x being ``[m, n]`` and y ``[height, width]``, and +0 elsewhere.

    It is the gradient of `gather_cells`.
    """
    x, y = p.x.reshape(p.m, p.n), p.y.reshape(p.height, p.width)
    y[:] = 0
    y[np.ix_(p.kept_rows, p.kept_columns)] = x

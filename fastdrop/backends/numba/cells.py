"""The kept rows and columns of a matrix, as kernels of the Numba CPU backend. `launch` calls them over rows."""

# mypy: allow-untyped-defs, allow-untyped-calls
# (Numba types the kernels, by what they are called with)

from __future__ import annotations

import numpy as np

from .draw import U
from .scalars import kernel


@kernel
def gather_cells(begin, end, x, y, kept_rows, kept_columns, n, width):
    for r in range(U(begin), U(end)):
        source, target = U(kept_rows[r]) * U(width), r * U(n)
        for c in range(U(0), U(n)):
            y[target + c] = x[source + U(kept_columns[c])]


@kernel
def scatter_cells(begin, end, x, y, kept_rows, kept_columns, m, n, width):
    r = U(np.searchsorted(kept_rows, begin))
    for at in range(U(begin), U(end)):
        row = at * U(width)
        for c in range(U(0), U(width)):
            y[row + c] = 0
        if r < U(m) and U(kept_rows[r]) == at:
            for c in range(U(0), U(n)):
                y[row + U(kept_columns[c])] = x[r * U(n) + c]
            r += U(1)

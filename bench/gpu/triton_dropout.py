"""Seeded dropout as one writes it in Triton, to compare with: nothing is kept, backward draws the mask again.

A block of Philox has four numbers, all of which are used: Triton's tutorial spends a block on each element. Forward and
backward are the same launch on other data. Triton is imported at the first use.
"""

from __future__ import annotations

from functools import cache
from typing import Any

triton: Any = None
tl: Any = None  # triton.language, by the name that the kernel's code has for it

BLOCK_DRAWS = 512


def four_draws(x, y, n, p, scale, seed, BLOCK: tl.constexpr):
    counter = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0) * (4 * BLOCK) + tl.arange(0, BLOCK)
    draws = tl.rand4x(seed, counter)
    for k in tl.static_range(4):
        here = at + k * BLOCK
        inside = here < n
        values = tl.load(x + here, mask=inside)
        tl.store(y + here, tl.where(draws[k] > p, values.to(tl.float32) * scale, 0.0), mask=inside)


@cache
def kernel() -> Any:
    global tl, triton
    import triton
    import triton.language as tl

    return triton.jit(do_not_specialize=["seed"])(four_draws)


def dropout(x: Any, y: Any, p: float, seed: int) -> None:
    """y = x with elements dropped, contiguous tensors of fewer than 2^31 elements on a GPU."""
    n = x.numel()
    kernel()[(triton.cdiv(n, BLOCK_DRAWS * 4),)](x, y, n, p, 1.0 / (1.0 - p), seed, BLOCK=BLOCK_DRAWS)

"""Seeded dropout as one writes it in Triton, to compare with: nothing is kept, backward draws the mask again.

Two kernels: `one_draw` spends a block of Philox on each element, as Triton's tutorial does; `four_draws` uses all four
numbers of a block. Forward and backward are the same launch, on other data. Triton is imported at the first use.
"""

from __future__ import annotations

from functools import cache
from typing import Any

triton: Any = None
tl: Any = None  # triton.language, by the name that the kernels' code has for it

CHOICES = (("one_draw", 1024), ("one_draw", 4096), ("four_draws", 512), ("four_draws", 1024))
END = 1 << 31  # elements: numbered with 32 bits, the faster way


def one_draw(x, y, n, p, scale, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    values = tl.load(x + at, mask=inside)
    kept = tl.rand(seed, at) > p
    tl.store(y + at, tl.where(kept, values.to(tl.float32) * scale, 0.0), mask=inside)


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
def kernels() -> dict[str, tuple[Any, int]]:
    """By name: the kernel, and how many elements it does for each of its BLOCK."""
    global tl, triton
    import triton
    import triton.language as tl

    jit = triton.jit(do_not_specialize=["seed"])
    return {"one_draw": (jit(one_draw), 1), "four_draws": (jit(four_draws), 4)}


def dropout(x: Any, y: Any, p: float, seed: int, choice: tuple[str, int] = CHOICES[0]) -> None:
    """y = x with elements dropped, contiguous tensors on a GPU."""
    name, block = choice
    kernel, each = kernels()[name]
    n = x.numel()
    if n >= END:
        raise ValueError(f"x must have fewer than {END} elements, but got {n}")
    kernel[(triton.cdiv(n, block * each),)](x, y, n, p, 1.0 / (1.0 - p), seed, BLOCK=block)

"""Prints the bytes that a step of attention adds to its process: `python -m bench.torch.peak_memory JSON`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

import fastdrop.torch as fdt


def peak() -> int:
    """Linux's own count: that of `resource` begins with what the parent had."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return 1024 * int(found[1])


def main(ours: bool, p: float, extents: list[int], causal: bool) -> int:
    """The highest that the process's memory rises above what it has once the inputs are there.

    Gradients and the result are part of it. A small step before loads what both need.
    """
    torch.set_num_threads(1)
    attention = fdt.scaled_dot_product_attention if ours else torch.nn.functional.scaled_dot_product_attention

    def step(shape: list[int]) -> int:
        inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
        before = peak()
        attention(*inputs, dropout_p=p, is_causal=causal).backward(torch.ones(()).expand(shape))
        return peak() - before

    step([1, 1, 64, extents[-1]])
    return step(extents)


if __name__ == "__main__":
    print(main(**json.loads(sys.argv[1])))

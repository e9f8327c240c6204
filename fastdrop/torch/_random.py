"""Seeds: one 63-bit number per dropout, drawn from torch's own generator.

There is no counter of our own: checkpointing, `torch.random.fork_rng`, DataLoader workers and forked processes save,
restore and split torch's state alone, and a mask that hangs on it follows.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from ._plain import is_transformed

SEED_BITS = 63
LOW_64_BITS = (1 << 64) - 1


class _Buffer(threading.local):
    """Where this thread's generator calls leave their number: made once and read through NumPy, a third of the cost."""

    def __init__(self) -> None:
        self.number = np.empty((), np.int64)
        with torch.inference_mode(False), torch._C._DisableTorchDispatch():
            self.fill = torch.from_numpy(self.number).random_


_buffer = _Buffer()


def draw(generator: torch.Generator | None) -> int:
    """The next seed, for eager code with no transform and no mode around it."""
    buffer = _buffer
    if generator is None:
        buffer.fill()
    else:
        buffer.fill(generator=generator)
    number: int = buffer.number.item()
    return number


def draw_tensor(generator: torch.Generator) -> Tensor:
    """The same number as a tensor, by an op that transforms know."""
    low, high = -(1 << SEED_BITS), (1 << SEED_BITS) - 1
    return torch.randint(low, high, (), dtype=torch.int64, device="cpu", generator=generator) & high


def as_int(seed: Any, generator: torch.Generator | None = None) -> int:
    """A seed given by the caller, an int or an int64 tensor of one element, as 64 bits."""
    _only_one(generator)
    if isinstance(seed, Tensor):
        return int(_one(seed).item()) & LOW_64_BITS
    return _checks.uint64("seed", seed)


def as_tensor(seed: Any, generator: torch.Generator | None = None, *, like: Tensor | None = None) -> Tensor:
    """The same as an int64 tensor without axes, of the kind of ``like``: the 64th bit comes out as the sign."""
    _only_one(generator)
    if isinstance(seed, Tensor):
        return _one(seed)
    bits = _checks.uint64("seed", seed)
    number = bits - (1 << 64) if bits >> SEED_BITS else bits
    if like is None or is_transformed():
        return torch.tensor(number, dtype=torch.int64, device="cpu")
    return like.new_full((), number, dtype=torch.int64, device="cpu")


def _one(seed: Tensor) -> Tensor:
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int or a tensor of int64, but got a tensor of {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"seed must be one number, but got a tensor of shape {tuple(seed.shape)}")
    return seed.reshape(())


def _only_one(generator: torch.Generator | None) -> None:
    if generator is not None:
        raise ValueError("seed and generator must not both be given")

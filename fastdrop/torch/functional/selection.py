"""The draw "exactly k of n", of which `residual` takes samples and `tokens` tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import mask as mask_ops
from ..runtime import mask_kernels
from .plan import KERNEL, Source, seed_for_kernel, seed_for_ops

__all__ = ["select_fixed"]

NORMAL_P = 0.5  # Gaussian dropout's p at which its noise has a standard deviation of 1


def select_fixed(
    x: Tensor, shape: tuple[int, ...], kept: int, way: str, source: Source, device: torch.device | str
) -> Tensor:
    """The numbers, in order, of the ``kept`` entries with the smallest Gaussian keys along the last axis of a shape,
    the first of equal ones. All sets of as many are equally likely.

    The seed is that of a call on x which goes a way. If the host knows it, the result is on ``device``, otherwise on
    that of x.
    """
    take_seed = seed_for_kernel if way == KERNEL else seed_for_ops
    seed: Any = take_seed(x, source, shape=shape)
    if isinstance(seed, Tensor):
        ones = x.new_ones(shape, dtype=torch.float64)
        keys = mask_ops.GAUSSIAN(mask_ops.Gaussian(ones, seed, NORMAL_P))
    else:
        keys = mask_kernels.gaussian(torch.ones(shape, dtype=torch.float64, device=device), seed, 1.0)
    index: Tensor = keys.argsort(stable=True)[..., :kept].sort().values
    return index

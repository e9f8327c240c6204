"""What the fused ops share: how a call draws its mask, and gradients that are composed of torch's ops.

A gradient comes from a kernel or an op if it is not differentiated itself. Otherwise it is composed of torch's ops and
the mask's, and then has derivatives of any order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core.mask import word_count
from ...core.random import keep_scale
from ...core.random import threshold as threshold_of
from ..runtime import dtypes, fused_kernels, mask_kernels
from ..runtime.dispatch.tensors import may_be_differentiated_forward
from ..runtime.dtypes import wide
from ..runtime.fused_kernels import Mask
from . import mask as mask_ops
from .record import Maybe


def check_real(call: Any) -> None:
    """Raises if an op is called by hand with complex data."""
    dtypes.check_real(call[0], "a fused function")


def mask_of_call(x: Tensor, seed: Any, p: float | Tensor) -> Mask:
    """The mask of x that a forward kernel drops by. Without a seed nothing is dropped."""
    if seed is None:
        return fused_kernels.NO_MASK
    return fused_kernels.mask_to_draw(x, mask_ops.kernel_seed(seed, x), threshold_of(mask_ops.probability(p)))


def mask_of_saved(dy: Tensor, saved_mask: Maybe, p: float | Tensor, store_bits: bool) -> Mask:
    """The same mask in backward. ``saved_mask`` is its words if ``store_bits``, otherwise the seed."""
    if saved_mask is None:
        return fused_kernels.NO_MASK
    threshold = threshold_of(mask_ops.probability(p))
    if not store_bits:
        saved_mask = mask_kernels.draw_mask(dy, dy.numel(), mask_ops.kernel_seed(saved_mask, dy), threshold)
    return Mask(saved_mask, keep_scale(threshold))


def masked(x: Tensor, saved_mask: Maybe, p: float | Tensor, store_bits: bool) -> Tensor:
    """x under a saved mask, by an op that has derivatives."""
    return x if saved_mask is None else mask_ops.masked(x, saved_mask, p, None, store_bits)


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor of x's shape."""
    return x.new_empty(x.shape)


def empty_words(x: Tensor) -> Tensor:
    return x.new_empty(word_count(x.numel()), dtype=torch.int32)


def is_differentiated() -> bool:
    """Whether the gradient that is computed now is to have a derivative."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return may_be_differentiated_forward()


@contextlib.contextmanager
def differentiating() -> Iterator[dict[str, bool]]:
    """Records the graph of a formula inside, and yields options that tell `torch.autograd.grad` whether to keep it."""
    lasting = torch.is_grad_enabled()
    with torch.enable_grad():
        yield {"create_graph": lasting}


def alias(x: Tensor) -> Tensor:
    """x as an argument of a formula, even if it needs no gradient or if two arguments are one tensor."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def cast(x: Maybe, dtype: torch.dtype | None, wanted: bool = True) -> Maybe:
    return x.to(dtype) if wanted and x is not None and dtype is not None else None


def sum_to_columns(x: Tensor) -> Tensor:
    return wide(x).sum_to_size(x.shape[-1:])

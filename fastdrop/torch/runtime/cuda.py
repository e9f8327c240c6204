"""The primitives on CUDA tensors, for `mask_kernels` and `fused_kernels`.

Kernels are launched on torch's current stream of the tensor's device, with raw pointers. Nothing waits for the device.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...core.grid import cell_axes
from .dispatch import read_address
from .dispatch.tensors import current_stream

Shape = tuple[int, ...]
Affine = tuple[float, float, float]


@cache
def is_usable(device: int) -> bool:
    """Whether the CUDA backend runs on a device. Warns with the reason if not, unless the backend is missing."""
    if backends.reason(backends.CUDA) is not None:
        return False
    try:
        backends.cuda_backend().prepare(device)
    except RuntimeError as error:
        warnings.warn(f"dropout on cuda:{device} stays torch's: {error}", stacklevel=2)
        return False
    return True


def place(x: Tensor) -> tuple[int, int]:
    """(device, stream) on which kernels for x run."""
    device = x.get_device()
    return device, current_stream(device)


def forward(
    tag: int,
    x: Tensor,
    y: Tensor,
    words: Tensor | None,
    first: int,
    n: int,
    seed: int | Tensor,
    offset: int,
    threshold: int,
    affine: Affine,
) -> None:
    """Draws a mask and writes x under it to y, and the mask to words unless that is None. x and y are contiguous."""
    at = 0 if words is None else words.data_ptr()
    number, seed_at = _by_value_or_address(seed)
    to, from_ = y.data_ptr(), read_address(x)
    backends.cuda_backend().dropout_forward_at(
        *place(x), tag, from_, to, at, first, n, number, offset, threshold, *affine, seed_at=seed_at
    )


def draw(primitive: str, words: Tensor, *numbers: Any) -> None:
    """Runs one of the primitives that draw words. Its last numbers are the seed, the offset and the threshold."""
    *cells, seed, offset, threshold = numbers
    number, seed_at = _by_value_or_address(seed)
    run = getattr(backends.cuda_backend(), primitive + "_at")
    run(*place(words), words.data_ptr(), *cells, number, offset, threshold, seed_at=seed_at)


def dilate(to: Tensor, words: Tensor, outer: int, n: int, inner: int, block: int) -> None:
    backends.cuda_backend().dilate_bits_at(*place(to), to.data_ptr(), read_address(words), outer, n, inner, block)


def count(words: Tensor) -> Tensor:
    """The number of 1 bits, int64 on the device."""
    ones = torch.zeros((), dtype=torch.int64, device=words.device)
    backends.cuda_backend().count_bits_at(*place(words), read_address(words), words.numel(), ones.data_ptr())
    return ones


def gaussian(
    tag: int, x: Tensor, y: Tensor, skip: int, first: int, n: int, seed: int | Tensor, offset: int, sigma: float
) -> None:
    """Writes n elements of x times their Gaussian factors to y, from ``skip`` bytes on. Both are contiguous."""
    number, seed_at = _by_value_or_address(seed)
    to, from_, numbers = y.data_ptr() + skip, read_address(x) + skip, (first, n, number, offset, sigma)
    backends.cuda_backend().gaussian_multiply_at(*place(x), tag, from_, to, *numbers, seed_at=seed_at)


def apply(tag: int, x: Tensor, y: Tensor, words: Tensor, n: int, affine: Affine, kept_count: Tensor | None) -> None:
    """Writes x under a packed mask to y. Both are contiguous. The kernel divides the scale by ``kept_count``."""
    to, from_ = y.data_ptr(), read_address(x)
    backends.cuda_backend().masked_affine_at(
        *place(x), tag, from_, to, read_address(words), 0, 1, 1, n, *affine, kept_at=_address(kept_count)
    )


def apply_strided(
    tag: int,
    x: Tensor,
    y: Tensor,
    order: list[int],
    words: Tensor,
    affine: Affine,
    mask_shape: Shape | None,
    kept_count: Tensor | None,
) -> None:
    """`apply` for shared cells, and for data in another order. ``order`` is `grid.memory_order` of x and y."""
    axes = cell_axes(tuple(x.shape), tuple(x.shape) if mask_shape is None else mask_shape)
    in_memory = [axes[axis] for axis in order]
    to, from_ = y.data_ptr(), read_address(x)
    at = from_, to, read_address(words)
    backends.cuda_backend().strided_affine_at(place(x), tag, at, 0, in_memory, affine, _address(kept_count))


def run(primitive: str, *arguments: Tensor | float | None) -> None:
    """Calls a fused primitive by its name. Its arrays are tensors of one device, or None."""
    at = [read_address(x) if isinstance(x, Tensor) else x or 0 for x in arguments]  # results are new memory
    first = next(x for x in arguments if isinstance(x, Tensor))
    getattr(backends.cuda_backend(), f"{primitive}_at")(*place(first), *at)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else read_address(x)


def _by_value_or_address(seed: int | Tensor) -> tuple[int, int]:
    return (0, read_address(seed)) if isinstance(seed, Tensor) else (seed, 0)

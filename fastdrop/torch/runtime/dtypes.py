"""The dtypes that the kernels know, and the dtype that they compute in.

Every other module of `fastdrop.torch` asks here. A tag is the number by which a backend knows a dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

TAGS = {
    torch.float32: FLOAT32,
    torch.float64: FLOAT64,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
}
DTYPES = frozenset([*TAGS, torch.complex64, torch.complex128])
HALVES = (torch.float16, torch.bfloat16)


def computed(dtype: torch.dtype) -> torch.dtype:
    """The dtype that fused kernels compute in, and in which they store vectors, statistics and sums."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the dtype that fused kernels compute in. Formulas made of torch's ops use it to round as the kernels do."""
    return x if x.is_complex() else x.to(computed(x.dtype))


def check_dtype(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"dropout takes float32, float64, float16, bfloat16, complex64 or complex128, but got {x.dtype}"
        )


def check_real(x: Tensor, what: str) -> None:
    """Raises if x is of no float dtype; ``what`` names the operation in the error."""
    check_dtype(x)
    if x.is_complex():
        raise RuntimeError(f"{what} takes real numbers, but got {x.dtype}")

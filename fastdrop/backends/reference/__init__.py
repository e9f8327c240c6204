"""The NumPy backend, and the contract of the primitives: what every backend must do is what is written here.

`mask` says it for masks and plain dropout, `rows` for the fused primitives.
"""

from ...core.random import philox4x32_10
from .mask import (
    describe,
    dilate_bits,
    draw_bits,
    dropout_forward,
    gaussian_multiply,
    masked_affine,
    set_num_threads,
    unavailable,
)
from .rows import (
    norm_backward,
    norm_forward,
    pointwise_backward,
    pointwise_forward,
    softmax_backward,
    softmax_forward,
)

__all__ = [
    "describe",
    "dilate_bits",
    "draw_bits",
    "dropout_forward",
    "gaussian_multiply",
    "masked_affine",
    "norm_backward",
    "norm_forward",
    "philox4x32_10",
    "pointwise_backward",
    "pointwise_forward",
    "set_num_threads",
    "softmax_backward",
    "softmax_forward",
    "unavailable",
]

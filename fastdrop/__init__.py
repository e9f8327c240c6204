"""Dropout at the speed of memory: fused kernels, one-bit masks, the same mask on every backend.

>>> import fastdrop as fd, numpy as np
>>> x = np.ones((4, 8), np.float32)
>>> y, mask = fd.dropout(x, 0.25, rng=0)
>>> dx = fd.dropout_backward(np.ones_like(y), mask)
>>> mask
PackedMask(shape=(4, 8), p=0.25, kept=24, nbytes=4)
"""

from .backends import explain, get_num_threads, set_num_threads, show_config, use_backend
from .mask import PackedMask, SeededMask
from .ops import apply_mask, draw_mask, dropout, dropout_backward
from .stream import Stream, manual_seed

__version__ = "0.1.0"

__all__ = [
    "PackedMask",
    "SeededMask",
    "Stream",
    "apply_mask",
    "draw_mask",
    "dropout",
    "dropout_backward",
    "explain",
    "get_num_threads",
    "manual_seed",
    "set_num_threads",
    "show_config",
    "use_backend",
]

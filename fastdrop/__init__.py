"""Dropout at the speed of memory: fused kernels, one-bit masks, the same mask on every backend.

>>> import fastdrop as fd, numpy as np
>>> x = np.ones((4, 8), np.float32)
>>> y, mask = fd.dropout(x, 0.25, rng=0)
>>> dx = fd.dropout_backward(np.ones_like(y), mask)
>>> mask
PackedMask(shape=(4, 8), p=0.25, kept=24, nbytes=4)
"""

from . import schedules
from .backends import explain, get_num_threads, set_num_threads, show_config, use_backend
from .mask import GaussianNoise, PackedMask, SeededMask
from .ops import (
    alpha_dropout,
    apply_mask,
    draw_mask,
    drop_block,
    drop_connect,
    dropout,
    dropout_backward,
    feature_alpha_dropout,
    feature_dropout,
    gaussian_dropout,
    stochastic_depth,
    variational_dropout,
)
from .stream import Stream, manual_seed

__version__ = "0.1.0"

__all__ = [
    "GaussianNoise",
    "PackedMask",
    "SeededMask",
    "Stream",
    "alpha_dropout",
    "apply_mask",
    "draw_mask",
    "drop_block",
    "drop_connect",
    "dropout",
    "dropout_backward",
    "explain",
    "feature_alpha_dropout",
    "feature_dropout",
    "gaussian_dropout",
    "get_num_threads",
    "manual_seed",
    "schedules",
    "set_num_threads",
    "show_config",
    "stochastic_depth",
    "use_backend",
    "variational_dropout",
]

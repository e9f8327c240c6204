"""Dropout at the speed of memory: fused kernels, one-bit masks, the same mask on every backend.

>>> import fastdrop as fd, numpy as np
>>> x = np.ones((4, 8), np.float32)
>>> y, mask = fd.dropout(x, 0.25, rng=0)
>>> dx = fd.dropout_backward(np.ones_like(y), mask)
>>> mask
PackedMask(shape=(4, 8), p=0.25, kept=24, nbytes=4)
"""

from . import schedules
from .arrays.blocks import drop_block
from .arrays.dropout import alpha_dropout, apply_mask, draw_mask, drop_connect, dropout, dropout_backward
from .arrays.fused import (
    bias_act_dropout,
    bias_dropout_add,
    dropout_add,
    geglu_dropout,
    swiglu_dropout,
)
from .arrays.fused_rows import dropout_add_layer_norm, dropout_add_rms_norm, softmax_dropout
from .arrays.noise import gaussian_dropout
from .arrays.saved import Saved
from .arrays.structured import (
    feature_alpha_dropout,
    feature_dropout,
    stochastic_depth,
    variational_dropout,
)
from .backends import explain, get_num_threads, set_num_threads, show_config, use_backend
from .core.mask import GaussianNoise, PackedMask, SeededMask
from .core.part import Part
from .core.random import Stream, manual_seed

__version__ = "0.1.0"

__all__ = [
    "GaussianNoise",
    "PackedMask",
    "Part",
    "Saved",
    "SeededMask",
    "Stream",
    "alpha_dropout",
    "apply_mask",
    "bias_act_dropout",
    "bias_dropout_add",
    "draw_mask",
    "drop_block",
    "drop_connect",
    "dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "dropout_backward",
    "explain",
    "feature_alpha_dropout",
    "feature_dropout",
    "gaussian_dropout",
    "geglu_dropout",
    "get_num_threads",
    "manual_seed",
    "schedules",
    "set_num_threads",
    "show_config",
    "softmax_dropout",
    "stochastic_depth",
    "swiglu_dropout",
    "use_backend",
    "variational_dropout",
]

"""Bias, dropout, residual and a norm by rows, in NumPy: `norm_forward` and its gradient.

With ``centred`` it is a layer norm, without it a root-mean-square norm. The package's docstring has the contract that
all fused primitives share.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.activations import NONE
from ..generate import primitive
from .pointwise import pointwise_forward
from .storage import read_bits, read_doubles, write_doubles


@primitive
def norm_forward(p: Any) -> None:
    """``residual_out = residual + (bit ? a * (x + input_bias) : 0)``, of residual_dtype, and its norm, of dtype:
    ``y = (residual_out - mean) / sqrt(variance + eps) * weight + norm_bias``, of residual_out as it was rounded.

    ``statistics[rows, 2]`` takes the mean and ``1 / sqrt(variance + eps)``. Unless ``centred`` the mean counts as 0,
    which makes the deviation a root mean square.
    """
    shape = p.rows, p.columns
    arrays = p.x, p.input_bias, None, p.residual, p.words, p.residual_out, None
    pointwise_forward(p.dtype, p.residual_dtype, *arrays, *shape, p.a, NONE)
    with np.errstate(all="ignore"):
        stored = read_doubles(p.residual_dtype, p.residual_out, shape)
        mean = stored.mean(1, keepdims=True) if p.centred else np.zeros((p.rows, 1))
        rstd = 1.0 / np.sqrt(np.square(stored - mean).mean(1, keepdims=True) + p.eps)
        p.statistics.reshape(p.rows, 2)[...] = np.concatenate([mean, rstd], 1)
        normal = (stored - mean) * rstd
        if p.weight is not None:
            normal = normal * p.weight
        if p.norm_bias is not None:
            normal = normal + p.norm_bias
        write_doubles(p.dtype, p.y, normal)


@primitive
def norm_backward(p: Any) -> None:
    """Gradients of `norm_forward` from dy, that of y, and dresidual_out, of residual_dtype.

    dresidual is dresidual_out plus what the norm passes on; ``dx = bit ? a * dresidual : 0``. The lines of
    ``sums[panels, 3, columns]`` are the gradients of weight, norm_bias and input_bias.
    """
    shape = p.rows, p.columns
    with np.errstate(all="ignore"):
        g = read_doubles(p.dtype, p.dy, shape)
        mean, rstd = np.split(p.statistics.reshape(p.rows, 2).astype(np.float64), 2, 1)
        normal = (read_doubles(p.residual_dtype, p.residual_out, shape) - mean) * rstd
        of_weight, of_norm_bias = (g * normal).sum(0), g.sum(0)
        if p.weight is not None:
            g = g * p.weight
        of_g = g.mean(1, keepdims=True) if p.centred else 0.0
        dresidual = (g - of_g - normal * (g * normal).mean(1, keepdims=True)) * rstd
        if p.dresidual_out is not None:
            dresidual = dresidual + read_doubles(p.residual_dtype, p.dresidual_out, shape)
        dx = np.where(read_bits(p.words, shape), dresidual * p.a, 0.0)
        if p.dresidual is not None:
            write_doubles(p.residual_dtype, p.dresidual, dresidual)
        if p.dx is not None:
            write_doubles(p.dtype, p.dx, dx)
        if p.sums is not None:
            p.sums.reshape(p.panels, 3, p.columns)[0] = of_weight, of_norm_bias, dx.sum(0)

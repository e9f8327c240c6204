"""Every fused function of torch's face, and its formula by torch's own ops; import after `pytest.importorskip`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdrop.torch as fdt
from fastdrop.core.random import keep_scale, threshold

P, SEED = 0.4, 3
ACTIVATIONS = {
    None: lambda h: h,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def mask_of(shape, p=P, seed=SEED):
    """What `fdt.dropout` keeps."""
    return fdt.dropout(torch.ones(shape), p, seed=seed) != 0


@dataclass(frozen=True)
class Fused:
    """A function of the tensors named in ``axes``: "*" of the data's shape, "c" of its columns, "m" of a mask.

    ``formula`` takes the same tensors and the dropout to be used. ``kept`` is what backward keeps per element, besides
    a bit: the names of inputs, and "result" for a tensor like the first result or residual.
    """

    function: Callable[..., Any]
    formula: Callable[..., Any]
    axes: dict[str, str]
    kept: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (6, 5, 33)

    @property
    def data(self) -> str:
        return next(iter(self.axes))

    def tensors(self, dtype=torch.float32, shape=None, seed=1, **dtypes) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = self.shape if shape is None else shape
        shapes = {"*": shape, "c": shape[-1:], "m": shape[-2:]}
        return {
            name: torch.randn(shapes[kind], generator=generator, dtype=torch.float64).to(dtypes.get(name, dtype))
            for name, kind in self.axes.items()
        }

    def __call__(self, tensors: dict[str, Tensor], p: Any = P, **options) -> tuple[Tensor, ...]:
        result = self.function(**tensors, p=p, **self.options, **({"seed": SEED} | options))
        return result if isinstance(result, tuple) else (result,)

    def bare(self, tensors, p=P, **options):
        """Without a seed."""
        return self(tensors, p, **({"seed": None} | options))

    def reference(self, tensors: dict[str, Tensor], p: float = P, seed: int = SEED) -> tuple[Tensor, ...]:
        """In float64, differentiable."""
        doubles = {name: x.double() for name, x in tensors.items()}
        keep = mask_of(tensors[self.data].shape, p, seed)
        scale = keep_scale(threshold(p))
        result = self.formula(**doubles, drop=lambda h: torch.where(keep, h * scale, 0.0))
        return result if isinstance(result, tuple) else (result,)


def _bias_act(activation):
    def formula(input, drop, bias=0.0):
        return drop(ACTIVATIONS[activation](input + bias))

    kept = () if activation in (None, "relu") else ("input", "bias")
    function = partial(fdt.bias_act_dropout, activation=activation)
    return Fused(function, formula, {"input": "*", "bias": "c"}, kept)


def _layer_norm(input, drop, residual=0.0, weight=None, bias=None, input_bias=0.0):
    sum = residual + drop(input + input_bias)
    return F.layer_norm(sum, sum.shape[-1:], weight, bias, 1e-5), sum


def _rms_norm(input, residual, weight, input_bias, drop):
    sum = residual + drop(input + input_bias)
    return F.rms_norm(sum, sum.shape[-1:], weight, 1e-3), sum


def _softmax(scores, drop, attn_mask=None, scale=1.0, causal=False):
    logits = scores * scale
    if attn_mask is not None:
        logits = logits + attn_mask
    hidden = torch.ones(logits.shape[-2:]).tril() == 0 if causal else torch.tensor(False)
    logits = logits.masked_fill(hidden, -math.inf)
    without_keys = (logits == -math.inf).all(-1, keepdim=True)
    softmax = torch.softmax(logits.masked_fill(without_keys, 0.0), -1)
    return drop(softmax.masked_fill(hidden | without_keys, 0.0))


def _softmax_case(axes, **options):
    return Fused(fdt.softmax_dropout, partial(_softmax, **options), axes, ("result",), options)


FUSED = {
    "dropout_add": Fused(
        fdt.dropout_add, lambda input, residual, drop: residual + drop(input), {"input": "*", "residual": "*"}
    ),
    "bias_dropout_add": Fused(
        fdt.bias_dropout_add,
        lambda input, bias, residual, drop: residual + drop(input + bias),
        {"input": "*", "bias": "c", "residual": "*"},
    ),
    **{f"bias_act_dropout {activation}": _bias_act(activation) for activation in ACTIVATIONS},
    "bias_act_dropout unbiased": Fused(
        partial(fdt.bias_act_dropout, bias=None), lambda input, drop: drop(F.gelu(input)), {"input": "*"}, ("input",)
    ),
    "swiglu_dropout": Fused(
        fdt.swiglu_dropout,
        lambda gate, up, drop: drop(F.silu(gate) * up),
        {"gate": "*", "up": "*"},
        ("gate", "up"),
    ),
    "geglu_dropout": Fused(
        fdt.geglu_dropout, lambda gate, up, drop: drop(F.gelu(gate) * up), {"gate": "*", "up": "*"}, ("gate", "up")
    ),
    "geglu_dropout tanh": Fused(
        fdt.geglu_dropout,
        lambda gate, up, drop: drop(F.gelu(gate, approximate="tanh") * up),
        {"gate": "*", "up": "*"},
        ("gate", "up"),
        {"approximate": "tanh"},
    ),
    "dropout_add_layer_norm": Fused(
        fdt.dropout_add_layer_norm,
        _layer_norm,
        {"input": "*", "residual": "*", "weight": "c", "bias": "c", "input_bias": "c"},
        ("result", "weight", "statistics"),
    ),
    "dropout_add_layer_norm alone": Fused(
        partial(fdt.dropout_add_layer_norm, residual=None), _layer_norm, {"input": "*"}, ("result", "statistics")
    ),
    "dropout_add_rms_norm": Fused(
        fdt.dropout_add_rms_norm,
        _rms_norm,
        {"input": "*", "residual": "*", "weight": "c", "input_bias": "c"},
        ("result", "weight", "statistics"),
        {"eps": 1e-3},
    ),
    "softmax_dropout": _softmax_case({"scores": "*"}, scale=0.3),
    "softmax_dropout causal": _softmax_case({"scores": "*"}, scale=0.3, causal=True),
    "softmax_dropout masked": _softmax_case({"scores": "*", "attn_mask": "m"}, scale=2.0),
}

"""The functions that drop, and the record of one call: `Drop`.

`reader` makes a `Drop` for each call that it finds; the reports print it.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...runtime.dispatch.ops import OpOverload, OpOverloadPacket
from .attributes import Chain

__all__ = ["DRAWS", "DROPS", "ENABLE", "ENABLE_CPU", "Drop", "Rate", "draws_numbers", "drops", "reach_of"]

# The name of a function's rate, its position among the arguments, and its default.
Rate = tuple[str, int, float]
P: Rate = ("p", 1, 0.5)
ATTENTION: Rate = ("dropout_p", 4, 0.0)

NAMES = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
DROPS: dict[Any, Rate] = {
    F.dropout: P,
    F.dropout1d: P,
    F.dropout2d: P,
    F.dropout3d: P,
    F.alpha_dropout: P,
    F.feature_alpha_dropout: P,
    F.scaled_dot_product_attention: ATTENTION,
    F.multi_head_attention_forward: ("dropout_p", 10, 0.0),
    torch.native_dropout: P,
}
for _name in (*NAMES, *(f"{name}_" for name in NAMES)):
    DROPS[getattr(torch, _name)] = P
    _packet = getattr(torch.ops.aten, _name)  # the op itself, as in exported programs
    DROPS[_packet] = DROPS[_packet.default] = P
_packet = torch.ops.aten.scaled_dot_product_attention
DROPS[_packet] = DROPS[_packet.default] = ATTENTION
DRAWS = {torch.rand, torch.rand_like, torch.bernoulli}

ENABLE = "fdt.enable() reaches it"
ENABLE_CPU = f"{ENABLE} on the CPU"  # on a GPU, fused attention drops in torch's own kernels
REACH: dict[Any, str] = {
    F.scaled_dot_product_attention: ENABLE_CPU,
    F.multi_head_attention_forward: ENABLE_CPU,
    torch.ops.aten.scaled_dot_product_attention: ENABLE_CPU,
    torch.ops.aten.scaled_dot_product_attention.default: ENABLE_CPU,
    torch.native_dropout: "it stays torch's",
}


class Drop(NamedTuple):
    """A call of a function that drops, or of an unknown function that is given a dropout rate."""

    call: str  # the function as the source writes it
    name: str  # the keyword of the rate
    text: str  # the rate as the source writes it
    chain: Chain | None  # the attributes of the module that hold the rate, if it is there
    value: float | None  # the rate, if it is a number in the source
    place: str  # the function whose source has the call
    reach: str  # which function of fastdrop reaches the call; empty if the function is not in DROPS


def drops(function: Any) -> bool:
    return _is_hashable(function) and function in DROPS


def draws_numbers(function: Any) -> bool:
    return _is_hashable(function) and function in DRAWS


def reach_of(function: Any) -> str:
    """Which function of fastdrop makes a function of `DROPS` draw by fastdrop, for a report."""
    return REACH.get(function, ENABLE)


def _is_hashable(value: Any) -> bool:
    return isinstance(value, types.FunctionType | types.BuiltinFunctionType | OpOverloadPacket | OpOverload)

"""The fused functions as benchmarks time them: our call, torch's formula, and the bytes that each has to move.

The CPU and the GPU benchmark use it. It imports torch, so import it only where torch is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdrop.torch as fdt
from fastdrop import backends
from fastdrop.core.mask import word_count

P, SEED = 0.1, 7
CHECKED_ROWS = 8


@dataclass(frozen=True)
class Fused:
    """A function of the tensors in ``arguments``: "*" of the data's shape, "c" of its columns.

    ``forward`` and ``backward``: how many arrays of the data's size each must read or write, once, beside the mask's
    bits if it ``has_bits``. Vectors and row statistics, a thousandth of that and less, don't count.
    """

    function: Callable[..., Any]
    formula: Callable[..., Any]
    arguments: dict[str, str]
    forward: int
    backward: int
    p: float = P
    has_bits: bool = True

    def tensors(self, x: Tensor) -> dict[str, Tensor]:
        """The first argument is x."""
        shapes = {"*": x.shape, "c": x.shape[-1:]}
        made = {
            name: torch.randn(shapes[kind], dtype=x.dtype, device=x.device) for name, kind in self.arguments.items()
        }
        made[next(iter(made))] = x
        return {name: tensor.detach().requires_grad_() for name, tensor in made.items()}

    def ours(self, **tensors: Tensor) -> Any:
        return self.function(**tensors, p=self.p, seed=SEED)

    def moved(self, x: Tensor) -> tuple[int, int]:
        """Bytes of forward and of backward."""
        bits, array = 4 * word_count(x.numel()) * self.has_bits, x.numel() * x.element_size()
        return self.forward * array + bits, self.backward * array + bits


Call = Callable[..., Any]
Results = tuple[Tensor, ...]


def results(function: Call, tensors: dict[str, Tensor]) -> Results:
    found = function(**tensors)
    return found if isinstance(found, tuple) else (found,)


def gradients(found: Results, tensors: dict[str, Tensor], upstream: Results, again: bool = False) -> Results:
    """``again``: what forward kept is to stay."""
    return torch.autograd.grad(found, tuple(tensors.values()), upstream, retain_graph=again)


def assert_right(fused: Fused, tensors: dict[str, Tensor], upstream: Results) -> None:
    """The first rows and their gradients, beside those of the reference on the CPU."""
    found = results(fused.ours, tensors)
    all_gradients = dict(zip(tensors, gradients(found, tensors, upstream), strict=True))
    actual = [*found, *(all_gradients[name] for name, kind in fused.arguments.items() if kind == "*")]
    few = {
        name: (x[:CHECKED_ROWS] if fused.arguments[name] == "*" else x).detach().cpu().requires_grad_()
        for name, x in tensors.items()
    }
    with backends.use_backend("numpy"):
        expected = results(fused.ours, few)
        of_few = dict(
            zip(few, gradients(expected, few, tuple(dy[:CHECKED_ROWS].cpu() for dy in upstream)), strict=True)
        )
    expected = [*expected, *(of_few[name] for name, kind in fused.arguments.items() if kind == "*")]
    for k, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        what, limit = ("forward" if k < len(found) else "backward"), max(8 * torch.finfo(theirs.dtype).eps, 1e-5)
        apart = (ours[:CHECKED_ROWS].detach().cpu().double() - theirs.detach().double()).abs().max()
        assert apart <= limit * theirs.detach().double().abs().max(), f"{what} is wrong"


def drop(x: Tensor) -> Tensor:
    return F.dropout(x, P)


def _bias_act(activation: str, curve: Callable[[Tensor], Tensor], backward: int) -> Fused:
    function = partial(fdt.bias_act_dropout, activation=activation)
    return Fused(function, lambda input, bias: drop(curve(input + bias)), {"input": "*", "bias": "c"}, 2, backward)


def _layer_norm(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    sum = residual + drop(input)
    return F.layer_norm(sum, sum.shape[-1:], weight, bias), sum


def _rms_norm(input: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    sum = residual + drop(input)
    return F.rms_norm(sum, sum.shape[-1:], weight), sum


def dropout(p: float, store: str = "bits") -> Fused:
    """Plain dropout, as a function fused with nothing."""
    function = partial(fdt.dropout, store=store)
    return Fused(function, lambda input: F.dropout(input, p), {"input": "*"}, 2, 2, p, store == "bits")


def dropout2d() -> Fused:
    return Fused(fdt.dropout2d, lambda input: F.dropout2d(input, P), {"input": "*"}, 2, 2, has_bits=False)


# A norm's second result, the sum, has a gradient too, as in a pre-norm network.
FUSED = {
    "dropout_add": Fused(
        fdt.dropout_add, lambda input, residual: residual + drop(input), {"input": "*", "residual": "*"}, 3, 2
    ),
    "bias_dropout_add": Fused(
        fdt.bias_dropout_add,
        lambda input, bias, residual: residual + drop(input + bias),
        {"input": "*", "bias": "c", "residual": "*"},
        3,
        2,
    ),
    "bias_act_dropout relu": _bias_act("relu", F.relu, 2),
    "bias_act_dropout gelu": _bias_act("gelu", F.gelu, 3),
    "bias_act_dropout gelu_tanh": _bias_act("gelu_tanh", partial(F.gelu, approximate="tanh"), 3),
    "bias_act_dropout silu": _bias_act("silu", F.silu, 3),
    "swiglu_dropout": Fused(
        fdt.swiglu_dropout, lambda gate, up: drop(F.silu(gate) * up), {"gate": "*", "up": "*"}, 3, 5
    ),
    "geglu_dropout": Fused(fdt.geglu_dropout, lambda gate, up: drop(F.gelu(gate) * up), {"gate": "*", "up": "*"}, 3, 5),
    "dropout_add_layer_norm": Fused(
        fdt.dropout_add_layer_norm, _layer_norm, {"input": "*", "residual": "*", "weight": "c", "bias": "c"}, 4, 5
    ),
    "dropout_add_rms_norm": Fused(
        fdt.dropout_add_rms_norm, _rms_norm, {"input": "*", "residual": "*", "weight": "c"}, 4, 5
    ),
    "softmax_dropout": Fused(fdt.softmax_dropout, lambda scores: drop(F.softmax(scores, -1)), {"scores": "*"}, 3, 3),
}

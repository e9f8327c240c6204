"""Runs of linear layers and batchwise dropout in a `torch.nn.Sequential`, which compute kept units only.

`torch_layers` looks for them. The call is `fastdrop.torch.batchwise_linear`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ...functional.batchwise import batchwise_linear
from ...nn import dropout as ours
from ...nn.structured import BatchwiseDropout
from ...runtime.dispatch.modules import children_of
from . import rules

__all__ = ["BatchwiseRun", "find_batchwise_runs", "is_batchwise"]

# Modules that compute each element by itself, and draw nothing.
ELEMENTWISE = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU),
    *(nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink, nn.Threshold),
)


class BatchwiseRun(NamedTuple):
    """Linear, perhaps an activation, and batchwise dropout, any number of times, and a Linear at the end."""

    start: int
    names: list[str]
    linears: list[Any]
    activations: list[Any]
    drops: list[Any]

    def can_run(self, x: Any) -> bool:
        """Whether something drops, and every mask is one for the whole batch of an input of x's axes."""
        return (
            any(drop.training for drop in self.drops)
            and rules.can_fuse_input(x)
            and x.dim() > 0
            and x.shape[-1] == self.linears[0].in_features
            and all(_fits(*pair, x.dim()) for pair in zip(self.drops, self.linears, strict=False))
        )

    def __call__(self, x: Tensor) -> Tensor:
        weights, biases = [linear.weight for linear in self.linears], [linear.bias for linear in self.linears]
        rates = [drop.rate if drop.training else 0.0 for drop in self.drops]
        return batchwise_linear(x, weights, biases, rates, self.activations)


def is_batchwise(module: Any) -> bool:
    """Whether a module drops units on the last axis for all other axes at once."""
    if type(module) is BatchwiseDropout:
        return True
    shape = getattr(module, "noise_shape", None) if type(module) is ours.Dropout else None
    return shape is not None and len(shape) > 1 and shape[-1] != 1 and all(extent == 1 for extent in shape[:-1])


def _fits(drop: Any, linear: Any, axes: int) -> bool:
    """Whether a dropout has a mask for what the Linear makes of so many axes. If not, its own forward raises."""
    if type(drop) is BatchwiseDropout:
        return True
    shape = drop.noise_shape
    return len(shape) == axes and shape[-1] in (None, linear.out_features)


def find_batchwise_runs(sequence: nn.Sequential) -> dict[int, BatchwiseRun | str]:
    """For each batchwise dropout, by its position: the run that it is in, or why it is in none."""
    modules = list(children_of(sequence).values())
    found: dict[int, BatchwiseRun | str] = {}
    at = 0
    while at < len(modules):
        run = _run_from(sequence, at)
        if run is None:
            if is_batchwise(modules[at]):
                found[at] = _reason(sequence, at)
            at += 1
            continue
        end = at + len(run.names)
        found.update({i: run for i in range(at, end) if is_batchwise(modules[i])})
        at = end  # a run takes all that it can, so its last Linear begins no other
    return found


def _run_from(sequence: nn.Sequential, start: int) -> BatchwiseRun | None:
    """The longest run that begins at a position."""
    names, modules = list(children_of(sequence)), list(children_of(sequence).values())
    linears, activations, drops, at = [modules[start]], [], [], start
    while (drop := _drop_after(modules, at)) is not None and not _part_reason(names, modules, at, drop):
        activations.append(modules[at + 1] if drop == at + 2 else None)
        drops.append(modules[drop])
        linears.append(modules[drop + 1])
        at = drop + 1
    return BatchwiseRun(start, names[start : at + 1], linears, activations, drops) if drops else None


def _drop_after(modules: list[Any], at: int) -> int | None:
    """The position of the batchwise dropout behind the module at a position, with an activation between at most."""
    for position in (at + 1, at + 2):
        if position < len(modules) and is_batchwise(modules[position]):
            return position
    return None


def _part_reason(names: list[str], modules: list[Any], start: int, drop: int) -> str:
    """Why Linear, perhaps activation, dropout and Linear from a position on are no run; "" if they are one."""
    if drop + 1 >= len(modules):
        return "no Linear right after it"
    reason = ""
    for position in (start, drop + 1):
        linear = modules[position]
        if not isinstance(linear, nn.Linear):
            return f"no Linear right {'after it' if position > drop else 'before it, or before its activation'}"
        reason = reason or rules.linear_obstacle(names[position], linear)
    if not reason and modules[start].out_features != modules[drop + 1].in_features:
        reason = f"{names[drop + 1]} takes another number of units"
    for between in range(start + 1, drop):
        module = modules[between]
        if type(module) not in ELEMENTWISE and rules.activation_name(module) is None:
            return f"{names[between]} is not known to work element by element"
        reason = reason or rules.call_obstacle(names[between], module)
    return reason or rules.call_obstacle(names[drop], modules[drop], shared=True)


def _reason(sequence: nn.Sequential, drop: int) -> str:
    names, modules = list(children_of(sequence)), list(children_of(sequence).values())
    starts = [at for at in (drop - 1, drop - 2) if at >= 0 and isinstance(modules[at], nn.Linear)]
    if not starts:
        return "no Linear right before it, or before its activation"
    return _part_reason(names, modules, starts[0], drop)

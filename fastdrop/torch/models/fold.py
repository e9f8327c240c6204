"""`fold_scaling` removes standard dropout from a model that is deployed, by scaling the weights that follow.

The output in evaluation is ``(1 - p) * x @ weight.T``. `fold_scaling` makes it ``x @ (weight * (1 - p)).T``, if nothing
between the dropout and the weight changes the result. The tables below say what a factor may pass through.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ...core.random import DROP_ALL, threshold
from ..nn import dropout as ours
from ..nn.base import Rated
from ..runtime.dispatch.modules import TorchDropout, hook_obstacle
from .report import Report, Row, describe

__all__ = ["fold_scaling"]

DIMENSIONS = (1, 2, 3)
POOLS = [f"{adaptive}{kind}" for adaptive in ("", "adaptive_") for kind in ("max", "avg")]

# Layers that multiply the whole input by their weight.
LAYERS = {nn.Linear, *(getattr(nn, f"{kind}{n}d") for kind in ("Conv", "ConvTranspose") for n in DIMENSIONS)}

# Modules, functions and methods of one tensor for which f(factor * x) = factor * f(x), if the factor is positive.
PASSING: set[Any] = {nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Flatten, nn.Unflatten}
PASSING |= {F.relu, torch.relu, F.leaky_relu, torch.flatten, torch.reshape}
PASSING |= {"relu", "flatten", "reshape", "view", "contiguous", "squeeze", "unsqueeze", "transpose", "permute"}
PASSING |= {getattr(nn, f"{kind.title().replace('_', '')}Pool{n}d") for kind in POOLS for n in DIMENSIONS}
PASSING |= {getattr(of, f"Dropout{n}") for of in (nn, ours) for n in ("", "1d", "2d", "3d")}
PASSING |= {getattr(F, f"{kind}_pool{n}d") for kind in POOLS for n in DIMENSIONS}

NO_VALUES = {"size", "dim", "shape", "ndim", "dtype", "device"}  # attributes that don't depend on the values


def fold_scaling(model: nn.Module) -> Report:
    """Multiplies the weights that follow standard dropout by its factor and removes the dropout, for deployment.

    ``Dropout(p, scaling="standard")`` multiplies by ``1 - p`` in evaluation. If all its output goes to linear and
    convolutional layers, their weights (not their biases) are multiplied by that factor in place, and the dropout
    becomes a `torch.nn.Identity`. ReLU, LeakyReLU, max and average pooling, reshaping and other dropout may be between.

    A dropout is left if anything else takes its output, if a module on the way has hooks or works in place, or if a
    layer that follows is called twice or shares its weight.

    Parameters
    ----------
    model : Module, in evaluation
        `torch.fx` traces it. If that fails, `fold_scaling` looks at its `torch.nn.Sequential` parts only, and doesn't
        see what else calls their layers.

    Returns
    -------
    Report
        Prints as a table: each dropout module, and which weights have its factor or why it was left.

    Notes
    -----
    The model's output in evaluation stays the same up to rounding. Raises ValueError if it is in training mode. Source:
    Srivastava et al., JMLR 15, 2014, section 4.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(fdt.Dropout(0.5, scaling="standard"), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> fdt.fold_scaling(model.eval()).changed[0].after
    'Identity(), 2.weight * 0.5'
    """
    if model.training:
        raise ValueError("model must be in evaluation mode, as in deployment: call model.eval() first")
    uses = _Uses(model)
    rows = []
    for path, module in list(model.named_modules()):
        if not isinstance(module, TorchDropout | Rated):
            continue
        before = describe(module) if isinstance(module, TorchDropout) else type(module).__name__
        if getattr(module, "scaling", None) != "standard":
            rows.append(Row(path, before, None, "no factor in evaluation: nothing to fold"))
            continue
        try:
            layers = uses.layers_after(module)
        except _Left as left:
            rows.append(Row(path, before, None, str(left)))
            continue
        keep = 1.0 - threshold(float(module.p)) / DROP_ALL
        with torch.no_grad():
            for layer in layers:
                layer.weight.mul_(keep)
        for name in [name for name, other in model.named_modules(remove_duplicate=False) if other is module]:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.Identity().eval())
        weights = ", ".join(f"{uses.paths[layer]}.weight" for layer in layers)
        rows.append(Row(path, before, f"Identity(), {weights} * {keep:g}"))
    return Report(rows)


class _Left(Exception):
    """Why a dropout can't be folded."""


def _graphs(module: nn.Module, is_whole: bool = True) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """The module's graph or, if it can't be traced, those of the sequences inside."""
    graph, attributes = None, set(vars(module))
    if is_whole or isinstance(module, nn.Sequential):
        with contextlib.suppress(Exception):  # any, because the forward runs on fx's proxies in place of tensors
            graph = fx.Tracer().trace(module)
    for name in set(vars(module)) - attributes:  # the tracer puts constants there
        delattr(module, name)
    if graph is not None:
        yield module, graph
    else:
        for child in module.children():
            yield from _graphs(child, False)


class _Uses:
    """The calls of each module in a model, as far as they can be traced, and how often each parameter is used."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self.holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self.modules: dict[fx.Node, nn.Module] = {}
        self.calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        for root, graph in _graphs(model):
            parameters = dict(root.named_parameters(remove_duplicate=False))
            for node in graph.nodes:
                if node.op == "call_module":
                    module = self.modules[node] = root.get_submodule(node.target)
                    self.calls[module].append(node)
                elif node.op == "get_attr" and node.target in parameters:
                    self.holders[id(parameters[node.target])] += 1

    def layers_after(self, dropout: nn.Module) -> list[Any]:
        """The layers whose weights take the factor, once for each call of the dropout. Raises `_Left`."""
        layers: list[Any] = []
        for call in self.calls[dropout]:
            self._check_pure(call)
            layers += self._follow(call)
        if not layers:
            raise _Left("no layer follows, as far as the model can be traced")
        return layers

    def _follow(self, node: fx.Node) -> Iterator[nn.Module]:
        for user in node.users:
            module: Any = self.modules.get(user)
            kind: Any = user.target if module is None else type(module)
            if kind is getattr:
                kind = user.args[1]
            if kind in NO_VALUES:
                continue
            if kind in LAYERS:
                self._check_pure(user)
                if len(self.calls[module]) > 1 or self.holders[id(module.weight)] > 1:
                    raise _Left(f"{self.paths[module]} is called, or its weight used, elsewhere too")
                yield module
            elif kind in PASSING:
                self._check_pure(user)
                yield from self._follow(user)
            else:
                name = getattr(kind, "__name__", kind) if module is None else self.paths[module]
                raise _Left(f"its output goes to {name}")

    def _check_pure(self, node: fx.Node) -> None:
        module = self.modules.get(node)
        name = getattr(node.target, "__name__", node.target) if module is None else self.paths[module]
        if node.kwargs.get("inplace") or getattr(module, "inplace", False):
            raise _Left(f"{name} writes in place")
        if module is not None and (hooks := hook_obstacle(module, gradients=False)):
            raise _Left(f"{name} {hooks}")

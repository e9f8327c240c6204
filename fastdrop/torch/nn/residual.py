"""Modules that do not compute what they drop: `SkipResidual` skips samples of a residual branch, `LayerDrop` layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ...core import checks
from ...core.random import threshold
from ..functional import residual
from ..functional.plan import Source, seed_for_kernel, seed_for_ops
from ..ops import mask as mask_ops
from ..runtime.dispatch import hide_from_dynamo, is_transformed
from ..runtime.dispatch.tensors import is_in_dispatch_mode, jit_trace
from .base import Seeded, SourceOptions, is_traced, trace_call

__all__ = ["LayerDrop", "SkipResidual"]


class SkipResidual(Seeded):
    """A residual branch that runs on the kept samples only: ``x + branch(x)``, in training with samples dropped.

    The result is that of ``x + StochasticDepth(p, "row")(branch(x))`` under the same mask, if samples do not influence
    each other in the branch.

    Parameters
    ----------
    branch : Module
        Called as ``branch(x, *along)``. It becomes the submodule ``branch``.
    p : float
        Drop probability of a sample, 0 to 1.
    scale_by_keep : bool
        Whether the branch's result is multiplied by ``1 / (1 - p)``.
    min_p : float
        For p below it all samples go through the branch.
    count : {"random", "fixed"}
        Whether each sample is kept with probability ``1 - p``, or the same number of them in each call. With "fixed"
        compiled code is compiled again if p changes.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts.

    Raises
    ------
    ValueError
        For p or min_p outside [0, 1] and an unknown count.
    TypeError
        For a branch that can't be called.

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    Its forward takes ``x``, ``(N, *)``, and further arguments of the branch with the same N samples. Errors, memory and
    compiled code as in `fastdrop.torch.skip_residual`. Sources: Huang et al., ECCV 2016; Oquab et al., "DINOv2", 2023.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> block = fdt.SkipResidual(torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)), 0.2)
    >>> block(torch.randn(32, 5, 8)).shape
    torch.Size([32, 5, 8])
    """

    def __init__(
        self,
        branch: nn.Module,
        p: float,
        *,
        scale_by_keep: bool = True,
        min_p: float = residual.MIN_P,
        count: str = "random",
        **source: Unpack[SourceOptions],
    ) -> None:
        super().__init__()
        self.draw_from(**source)
        checks.function("branch", branch)
        checks.choice("count", count, residual.COUNTS)
        self.p = checks.dropout_probability(p, what="drop probability")
        self.min_p = checks.between("min_p", min_p, 0, 1)
        self.scale_by_keep, self.count, self.branch = scale_by_keep, count, branch

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError("SkipResidual can't be scripted: for evaluation script its submodule `branch` instead")

    def forward(self, x: Tensor, *along: Tensor | None) -> Tensor:
        if is_traced(self, x):
            return trace_call(self, x, *along)  # type: ignore[no-any-return]
        if not self.training:  # also what fx traces
            return x + self.branch(x, *along)  # type: ignore[no-any-return]
        return residual.skip_residual(
            x,
            self.branch,
            self.rate if self.count == "random" else self.p,
            scale_by_keep=self.scale_by_keep,
            min_p=self.min_p,
            along=along,
            count=self.count,
            **self.source_options(),
        )

    def extra_repr(self) -> str:
        options = f"min_p={self.min_p}, count={self.count!r}{self.source_repr()}"
        return f"p={self.p}, scale_by_keep={self.scale_by_keep}, {options}"


class LayerDrop(Seeded, nn.ModuleList):
    """Layers that run one after the other, each of which is skipped in training with probability p.

    Parameters
    ----------
    layers : iterable of Module
        They are named "0", "1" and so on, as in `torch.nn.ModuleList`, so a ``state_dict`` of one fits the other.
    p : float
        Probability of a layer to be skipped, 0 to 1.
    static_parameters : bool
        Whether parameters of skipped layers get gradients of 0. Otherwise they get none, and optimizers leave them as
        they are. DDP without ``find_unused_parameters`` and with ``static_graph`` needs gradients for all; FSDP2 needs
        none.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : None
        Must be None: a layer is dropped as a whole.

    Raises
    ------
    ValueError
        For p outside [0, 1].
    TypeError
        For layers that are no modules and, in training with ``static_parameters``, for an input that is no Tensor.

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    A generator is one of the CPU.

    Its forward is ``x = layer(x, *args, **kwargs)`` for each layer. Nothing is scaled, as in the paper. One number
    decides for all layers of a call. It is drawn on the CPU, also for layers on a GPU. Ranks of a job skip the same
    layers if they give the same ``seed``, or if their default generators on the CPU have the same state. Otherwise each
    rank skips its own. Nothing is kept for a skipped layer.

    Code that `torch.compile` made of it, and code under a transform of `torch.func`, has to run all layers, and then
    takes the results of those that are kept: the same values, without the savings, and for a Tensor alone as x. Compile
    each layer instead. Source: Fan, Grave, Joulin, "Reducing transformer depth on demand with structured dropout", ICLR
    2020.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> layers = fdt.LayerDrop([torch.nn.Linear(8, 8) for _ in range(6)], 0.2)
    >>> layers(torch.randn(3, 8)).shape, len(layers)
    (torch.Size([3, 8]), 6)
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        p: float,
        *,
        static_parameters: bool = False,
        **source: Unpack[SourceOptions],
    ) -> None:
        super().__init__(layers)
        self.draw_from(**source)
        if self.layout is not None:
            raise ValueError("LayerDrop takes no layout, because it decides for layers and not for parts of tensors")
        self.p, self.static_parameters = checks.dropout_probability(p, what="drop probability"), static_parameters

    __repr__ = nn.Module.__repr__

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError("LayerDrop can't be scripted: for evaluation script a torch.nn.ModuleList of its layers")

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            part = LayerDrop(list(self)[index], self.p, static_parameters=self.static_parameters)
            part.own_source = self.own_source
            return part
        return super().__getitem__(index)

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        if is_traced(self, input):
            return trace_call(self, input, *args, **kwargs)
        x = input
        p = self.rate
        drops = self.training and (isinstance(p, Tensor) or p > 0.0)
        if drops and self.static_parameters and not isinstance(x, Tensor):
            raise TypeError(f"static_parameters=True takes a Tensor as input, but got {type(x).__name__}")
        options = self.source_options() if drops else {}
        source: Source = options.get("generator"), options.get("seed"), None
        if drops and (torch.compiler.is_compiling() or is_transformed() or is_in_dispatch_mode() or jit_trace()):
            return self._select(x, (p, source), args, kwargs)
        kept = _draw_layers(len(self), p, source) if drops else range(len(self))
        for i, layer in enumerate(self):
            if i in kept:
                x = layer(x, *args, **kwargs)
            elif self.static_parameters:
                x = _with_parameters(x, layer)
        return x

    def _select(self, x: Tensor, drawn: tuple[float | Tensor, Source], args: Any, kwargs: Any) -> Tensor:
        """Runs all layers, and takes the results of those that are kept. ``drawn`` is p and the source of the seed."""
        p, source = drawn
        ones = torch.ones(len(self), device="cpu")
        flags, _ = mask_ops.FORWARD(
            mask_ops.Forward(ones, seed_for_ops(ones, source, shared=(1,)), p, None, False, "standard")
        )
        kept = (flags != 0.0).to(x.device)
        for i, layer in enumerate(self):
            x = torch.where(kept[i], layer(x, *args, **kwargs), x)
        return x

    def extra_repr(self) -> str:
        return f"p={self.p}, static_parameters={self.static_parameters}{self.source_repr()}"


_ON_CPU = torch.empty(0, device="cpu")


def _draw_layers(count: int, p: Any, source: Source) -> set[int]:
    """The numbers of the layers that are kept, under one seed."""
    seed: Any = seed_for_kernel(_ON_CPU, source, shape=(count,), shared=(1,))
    return set(residual.draw_kept(count, seed, threshold(p)).tolist())


def _with_parameters(x: Tensor, layer: nn.Module) -> Tensor:
    """x, of which the layer's parameters get gradients of 0: the sum of none of their elements is added."""
    for parameter in layer.parameters():
        if parameter.requires_grad and torch.is_grad_enabled():
            own = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP2's are DTensors
            x = x + own.reshape(-1)[:0].sum().to(x.device)
    return x


hide_from_dynamo(_draw_layers)

"""Modules in which elements share decisions along time, within a sample or within a block; `dropout` has the others.

Users build models with them, and `convert` changes modules of timm and torchvision to them.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from ...core import checks
from ..functional import blocks, structured
from ..functional.batchwise import shared_by_batch
from .base import Seeded, SourceOptions

__all__ = [
    "BatchwiseDropout",
    "DropBlock2d",
    "DropBlock3d",
    "DropPath",
    "StochasticDepth",
    "TimmDropBlock2d",
    "VariationalDropout",
]


class VariationalDropout(Seeded):
    """Drops with one mask for a whole sequence (locked dropout), for the inputs and outputs of recurrent layers.

    Parameters
    ----------
    p : float
        Drop probability, 0 to 1.
    time_axis : int
        The axis along which decisions are shared: 0 for ``(T, B, F)``, 1 for ``(B, T, F)``.
    inplace : bool
        Writes the result to the input.
    store : {"bits", "seed"}
        What is kept for backward: bits, or a seed, from which they are drawn again.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts.

    Raises
    ------
    ValueError
        For p outside [0, 1] and an unknown store.

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    Source: Gal and Ghahramani, NeurIPS 2016.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> y = fdt.VariationalDropout(0.5, time_axis=0)(torch.ones(3, 2, 4))
    >>> bool((y == y[0]).all())
    True
    """

    def __init__(
        self,
        p: float = 0.5,
        time_axis: int = 0,
        inplace: bool = False,
        *,
        store: str = "bits",
        **source: Unpack[SourceOptions],
    ) -> None:
        super().__init__()
        self.draw_from(**source)
        checks.choice("store", store, checks.STORES)
        self.p, self.time_axis, self.inplace, self.store = checks.dropout_probability(p), time_axis, inplace, store

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        return structured.variational_dropout(
            input, self.rate, self.time_axis, self.training, self.inplace, store=self.store, **source
        )

    def extra_repr(self) -> str:
        options = f"time_axis={self.time_axis}, inplace={self.inplace}, store={self.store!r}"
        return f"p={self.p}, {options}{self.source_repr()}"


class BatchwiseDropout(Seeded):
    """Drops units on the last axis, with one mask for the whole batch. Between two linear layers of a Sequential,
    `fuse` computes the kept units only.

    Parameters
    ----------
    p : float
        Drop probability of a unit, 0 to 1.
    inplace : bool
        Writes the result to the input.
    store : {"bits", "seed"}
        What is kept for backward: bits, or a seed, from which they are drawn again.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts.

    Raises
    ------
    ValueError
        For p outside [0, 1] and an unknown store.

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    With a seed or a generator of its own it is not fused.

    By itself it is `Dropout` with ``noise_shape=(1, ..., 1, None)``. After `fuse`, a run of linear layers, activations
    and BatchwiseDropouts is `fastdrop.torch.batchwise_linear`, which says what is computed when. The price is noisier
    gradients: an MLP on handwritten digits diverged at a learning rate of 0.1 with momentum 0.9, where `Dropout`
    trained. Lower rates train, at up to the same accuracy. Source: Graham, Reizenstein, Robinson, 2015.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> from torch import nn
    >>> y = fdt.BatchwiseDropout(0.5)(torch.ones(3, 8))
    >>> bool((y == y[0]).all())
    True
    >>> print(fdt.fuse(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), fdt.BatchwiseDropout(0.5), nn.Linear(8, 2))))
    module       before      after
    (the model)  Sequential  FusedSequential: 0 + 1 + 2 + 3
    """

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, store: str = "bits", **source: Unpack[SourceOptions]
    ) -> None:
        super().__init__()
        self.draw_from(**source)
        checks.choice("store", store, checks.STORES)
        self.p, self.inplace, self.store = checks.dropout_probability(p), inplace, store

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        given = source.get("generator"), source.get("seed"), source.get("part")
        return shared_by_batch(input, self.rate, self.training, self.inplace, source=given, store=self.store)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}, store={self.store!r}{self.source_repr()}"


class StochasticDepth(Seeded):
    """torchvision's module of this name on fastdrop: drops a residual branch as a whole, by sample or by batch.

    Parameters
    ----------
    p : float
        Drop probability of the branch, 0 to 1.
    mode : {"batch", "row"}
        "row" decides for each sample, "batch" once for all.
    store : {"bits", "seed"}
        What is kept for backward: bits, or a seed, from which they are drawn again.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts.

    Raises
    ------
    ValueError
        For p outside [0, 1], another mode or store.

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    Source: Huang et al., ECCV 2016.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> fdt.StochasticDepth(0.5, "row")(torch.ones(100, 2)).unique()
    tensor([0., 2.])
    """

    store: str = "bits"

    def __init__(self, p: float, mode: str, *, store: str = "bits", **source: Unpack[SourceOptions]) -> None:
        super().__init__()
        self.draw_from(**source)
        checks.choice("mode", mode, checks.DEPTH_MODES)
        checks.choice("store", store, checks.STORES)
        self.p, self.mode, self.store = checks.dropout_probability(p, what="drop probability"), mode, store

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        return structured.stochastic_depth(input, self.rate, self.mode, self.training, store=self.store, **source)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}, store={self.store!r}{self.source_repr()}"


class _NamedDropProb(Seeded):
    """A module of timm's, where p is called ``drop_prob``."""

    drop_prob: float

    @property
    def p(self) -> float:
        return self.drop_prob

    @p.setter
    def p(self, p: float) -> None:
        self.drop_prob = p


class DropPath(_NamedDropProb):
    """timm's module of this name on fastdrop: drops a residual branch as a whole, by sample.

    Parameters
    ----------
    drop_prob : float
        Drop probability of the branch, 0 to 1; ``p`` is the same number.
    scale_by_keep : bool
        Whether kept samples are multiplied by ``1 / (1 - p)``. Evaluation is the identity either way.
    store : {"bits", "seed"}
        What is kept for backward: bits, or a seed, from which they are drawn again.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts.

    Raises
    ------
    ValueError
        For p outside [0, 1] and an unknown store.

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    Source: Huang et al., ECCV 2016.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> fdt.DropPath(0.5)(torch.ones(100, 2)).unique()
    tensor([0., 2.])
    """

    scale_by_keep = True  # for converted modules whose class has no such option
    store: str = "bits"

    def __init__(
        self,
        drop_prob: float = 0.0,
        scale_by_keep: bool = True,
        *,
        store: str = "bits",
        **source: Unpack[SourceOptions],
    ) -> None:
        super().__init__()
        self.draw_from(**source)
        checks.choice("store", store, checks.STORES)
        self.drop_prob, self.scale_by_keep, self.store = checks.dropout_probability(drop_prob), scale_by_keep, store

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        if not self.training:
            return input
        scaling = "inverted" if self.scale_by_keep else "standard"
        return structured.stochastic_depth(input, self.rate, "row", store=self.store, scaling=scaling, **source)

    def extra_repr(self) -> str:
        options = f"scale_by_keep={self.scale_by_keep}, store={self.store!r}{self.source_repr()}"
        # timm computes rates in float32: 0.4000000059604645
        return f"drop_prob={round(self.p, 6)}, {options}"


class _DropBlock(Seeded):
    """DropBlock for any number of spatial axes."""

    couple_channels: bool = False

    def __init__(
        self,
        p: float,
        block_size: int | tuple[int, ...],
        inplace: bool = False,
        *,
        couple_channels: bool = False,
        **source: Unpack[SourceOptions],
    ) -> None:
        super().__init__()
        self.draw_from(**source)
        self.p = checks.dropout_probability(p, what="drop probability")
        self.block_size, self.inplace, self.couple_channels = block_size, inplace, couple_channels

    def extra_repr(self) -> str:
        coupled = ", couple_channels=True" if self.couple_channels else ""
        return f"p={self.p}, block_size={self.block_size}, inplace={self.inplace}{coupled}{self.source_repr()}"


def _drop_blocks(function: Any, module: Any, input: Tensor, p: Any, source: Any) -> Tensor:
    options = {"training": module.training, "couple_channels": module.couple_channels}
    y: Tensor = function(input, p, module.block_size, module.inplace, **options, **source)
    return y


class DropBlock2d(_DropBlock):
    """torchvision's module of this name on fastdrop: drops blocks of neighbouring cells from ``(N, C, H, W)``.

    Parameters
    ----------
    p : float
        Share of cells to drop, 0 to 1.
    block_size : int or tuple of int
        Extent of a block on each spatial axis, odd or even, cut to the input's.
    inplace : bool
        Writes the result to the input.
    couple_channels : bool
        One mask for all channels of a sample, as in timm.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts.

    Raises
    ------
    ValueError
        For p outside [0, 1].

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    A layout is a mesh with placements.

    Stored for backward: a bit per cell. Source: Ghiasi et al., NeurIPS 2018.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> y = fdt.DropBlock2d(0.1, block_size=3)(torch.ones(2, 3, 16, 16))
    >>> round(float(y.mean()), 4)
    1.0
    """

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        return _drop_blocks(blocks.drop_block2d, self, input, self.rate, source)


class DropBlock3d(_DropBlock):
    """torchvision's module of this name on fastdrop: `DropBlock2d` for ``(N, C, D, H, W)``.

    Parameters
    ----------
    p : float
        Share of cells to drop, 0 to 1.
    block_size : int or tuple of int
        Extent of a block on each spatial axis, cut to the input's.
    inplace : bool
        Writes the result to the input.
    couple_channels : bool
        One mask for all channels of a sample.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts.

    Raises
    ------
    ValueError
        For p outside [0, 1].

    See Also
    --------
    DropBlock2d, Dropout : say more about these parameters.
    drop_block3d : the function.

    Notes
    -----
    Kept for backward: a bit per cell and 8 bytes. Source: Ghiasi et al., NeurIPS 2018.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> y = fdt.DropBlock3d(0.1, block_size=3)(torch.ones(2, 3, 8, 8, 8))
    >>> round(float(y.mean()), 4)
    1.0
    """

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        return _drop_blocks(blocks.drop_block3d, self, input, self.rate, source)


class TimmDropBlock2d(_NamedDropProb, DropBlock2d):
    """timm's DropBlock2d after `convert`: timm's attributes, of which ``gamma_scale`` multiplies the share to drop."""

    gamma_scale: float

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        return _drop_blocks(blocks.drop_block2d, self, input, self.rate * self.gamma_scale, source)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma_scale={self.gamma_scale}"

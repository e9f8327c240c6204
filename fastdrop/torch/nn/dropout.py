"""Every kind of dropout as a module, for users to build models with and for `convert` to change modules to.

The modules that torch has too are subclasses of torch's: `Dropout` takes the same arguments as `torch.nn.Dropout`, has
the same (empty) ``state_dict`` and passes ``isinstance(module, torch.nn.Dropout)``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...core import checks
from ..functional import dropout as F
from ..functional import structured
from .base import Rated

__all__ = [
    "AlphaDropout",
    "DropBlock2d",
    "DropBlock3d",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "StochasticDepth",
    "VariationalDropout",
]


class _Elementwise(Rated):
    """A dropout that torch has too, with fastdrop's ``store``."""

    inplace: bool
    store: str = "bits"

    def __init__(self, p: float = 0.5, inplace: bool = False, *, store: str = "bits") -> None:
        super().__init__(p, inplace)
        checks.choice("store", store, checks.STORES)
        self.store = store

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, store={self.store!r}"


class Dropout(_Elementwise, nn.Dropout):
    """`torch.nn.Dropout` on fastdrop: the same arguments, the same (empty) ``state_dict``, the same behaviour.

    Parameters
    ----------
    p : float
        Drop probability, 0 to 1.
    inplace : bool
        Writes the result to the input.
    store : {"bits", "seed"}
        What is stored for backward: the mask, 1/8 byte per element, or 8 bytes in all, from which backward draws the
        mask again.
    scaling : {"inverted", "standard"}
        "inverted" divides kept elements by ``1 - p`` in training. "standard" leaves them as they are and multiplies by
        ``1 - p`` in evaluation, as the paper of 2014 does; `fold_scaling` moves that factor into the next layer.

    Raises ValueError for p outside [0, 1] and for an unknown store or scaling.

    The input may have any shape, and the output has the same. Errors and details as in `fastdrop.torch.dropout`.

    >>> import torch, fastdrop.torch as fdt
    >>> drop = fdt.Dropout(0.1, store="seed")
    >>> drop, isinstance(drop, torch.nn.Dropout)
    (Dropout(p=0.1, inplace=False, store='seed'), True)
    >>> x = torch.ones(8)
    >>> drop.eval()(x) is x
    True
    """

    scaling = "inverted"  # without an annotation, which TorchScript would have to understand

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, store: str = "bits", scaling: str = "inverted"
    ) -> None:
        super().__init__(p, inplace, store=store)
        checks.scaling(scaling)
        self.scaling = scaling

    def drop_input(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.rate, self.training, self.inplace, store=self.store, scaling=self.scaling)

    def evaluate_input(self, input: Tensor) -> Tensor:
        if hasattr(self, "scaling"):  # noqa: SIM102 - TorchScript needs both: it sees only attributes of the object
            if self.scaling == "standard":
                return input * (1.0 - self.p)
        return input

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.scaling == "inverted" else f", scaling={self.scaling!r}")


class Dropout1d(_Elementwise, nn.Dropout1d):
    """`torch.nn.Dropout1d` on fastdrop: drops whole channels of ``(N, C, L)`` or ``(C, L)``.

    Parameters and errors as in `Dropout`, details as in `fastdrop.torch.dropout1d`.

    >>> import fastdrop.torch as fdt
    >>> fdt.Dropout1d(0.2)
    Dropout1d(p=0.2, inplace=False, store='bits')
    """

    def drop_input(self, input: Tensor) -> Tensor:
        return structured.dropout1d(input, self.rate, self.training, self.inplace, store=self.store)


class Dropout2d(_Elementwise, nn.Dropout2d):
    """`torch.nn.Dropout2d` on fastdrop: drops whole channels of ``(N, C, H, W)``, in either memory format.

    Parameters and errors as in `Dropout`, details as in `fastdrop.torch.dropout2d`.

    >>> import fastdrop.torch as fdt
    >>> fdt.Dropout2d(0.2)
    Dropout2d(p=0.2, inplace=False, store='bits')
    """

    def drop_input(self, input: Tensor) -> Tensor:
        return structured.dropout2d(input, self.rate, self.training, self.inplace, store=self.store)


class Dropout3d(_Elementwise, nn.Dropout3d):
    """`torch.nn.Dropout3d` on fastdrop: drops whole channels of ``(N, C, D, H, W)`` or ``(C, D, H, W)``.

    Parameters and errors as in `Dropout`, details as in `fastdrop.torch.dropout3d`.

    >>> import fastdrop.torch as fdt
    >>> fdt.Dropout3d(0.2)
    Dropout3d(p=0.2, inplace=False, store='bits')
    """

    def drop_input(self, input: Tensor) -> Tensor:
        return structured.dropout3d(input, self.rate, self.training, self.inplace, store=self.store)


class AlphaDropout(_Elementwise, nn.AlphaDropout):
    """`torch.nn.AlphaDropout` on fastdrop, for networks of SELUs: keeps mean 0 and variance 1.

    Parameters and errors as in `Dropout`, details as in `fastdrop.torch.alpha_dropout`. torch's own
    ignores its ``inplace``; this one does not.

    >>> import fastdrop.torch as fdt
    >>> fdt.AlphaDropout(0.1)
    AlphaDropout(p=0.1, inplace=False, store='bits')
    """

    def drop_input(self, input: Tensor) -> Tensor:
        return F.alpha_dropout(input, self.rate, self.training, self.inplace, store=self.store)


class FeatureAlphaDropout(_Elementwise, nn.FeatureAlphaDropout):
    """`torch.nn.FeatureAlphaDropout` on fastdrop: alpha dropout of drops whole channels of ``(N, C, *)``.

    Parameters and errors as in `Dropout`, details as in `fastdrop.torch.feature_alpha_dropout`. torch's
    own ignores its ``inplace``; this one does not.

    >>> import fastdrop.torch as fdt
    >>> fdt.FeatureAlphaDropout(0.1)
    FeatureAlphaDropout(p=0.1, inplace=False, store='bits')
    """

    def drop_input(self, input: Tensor) -> Tensor:
        return structured.feature_alpha_dropout(input, self.rate, self.training, self.inplace, store=self.store)


class VariationalDropout(Rated):
    """Drops with one mask for a whole sequence (locked dropout), for the inputs and outputs of recurrent layers.

    Parameters
    ----------
    p : float
        Drop probability, 0 to 1.
    time_axis : int
        The axis along which decisions are shared: 0 for ``(T, B, F)``, 1 for ``(B, T, F)``.
    inplace, store
        As in `Dropout`.

    Raises ValueError for p outside [0, 1] and an unknown store. Source: Gal and Ghahramani, NeurIPS 2016.

    >>> import torch, fastdrop.torch as fdt
    >>> y = fdt.VariationalDropout(0.5, time_axis=0)(torch.ones(3, 2, 4))
    >>> bool((y == y[0]).all())
    True
    """

    def __init__(self, p: float = 0.5, time_axis: int = 0, inplace: bool = False, *, store: str = "bits") -> None:
        super().__init__()
        checks.choice("store", store, checks.STORES)
        self.p, self.time_axis, self.inplace, self.store = checks.dropout_probability(p), time_axis, inplace, store

    def drop_input(self, input: Tensor) -> Tensor:
        return structured.variational_dropout(
            input, self.rate, self.time_axis, self.training, self.inplace, store=self.store
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, time_axis={self.time_axis}, inplace={self.inplace}, store={self.store!r}"


class StochasticDepth(Rated):
    """torchvision's module of this name on fastdrop: drops a residual branch as a whole, by sample or by batch.

    Parameters
    ----------
    p : float
        Drop probability of the branch, 0 to 1.
    mode : {"batch", "row"}
        "row" decides for each sample, "batch" once for all.
    store : {"bits", "seed"}
        As in `Dropout`.

    Raises ValueError for p outside [0, 1], another mode or store. Source: Huang et al., ECCV 2016.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.StochasticDepth(0.5, "row")(torch.ones(100, 2)).unique()
    tensor([0., 2.])
    """

    store: str = "bits"

    def __init__(self, p: float, mode: str, *, store: str = "bits") -> None:
        super().__init__()
        checks.choice("mode", mode, checks.DEPTH_MODES)
        checks.choice("store", store, checks.STORES)
        self.p, self.mode, self.store = checks.dropout_probability(p, what="drop probability"), mode, store

    def drop_input(self, input: Tensor) -> Tensor:
        return structured.stochastic_depth(input, self.rate, self.mode, self.training, store=self.store)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}, store={self.store!r}"


class _NamedDropProb(Rated):
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
        As in `Dropout`.

    Raises ValueError for p outside [0, 1] and an unknown store. Source: Huang et al., ECCV 2016.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.DropPath(0.5)(torch.ones(100, 2)).unique()
    tensor([0., 2.])
    """

    scale_by_keep = True  # for converted modules whose class has no such option
    store: str = "bits"

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True, *, store: str = "bits") -> None:
        super().__init__()
        checks.choice("store", store, checks.STORES)
        self.drop_prob, self.scale_by_keep, self.store = checks.dropout_probability(drop_prob), scale_by_keep, store

    def drop_input(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        scaling = "inverted" if self.scale_by_keep else "standard"
        return structured.stochastic_depth(input, self.rate, "row", store=self.store, scaling=scaling)

    def extra_repr(self) -> str:
        return f"drop_prob={self.p}, scale_by_keep={self.scale_by_keep}, store={self.store!r}"


class _DropBlock(Rated):
    """DropBlock for any number of spatial axes."""

    couple_channels: bool = False

    def __init__(
        self,
        p: float,
        block_size: int | tuple[int, ...],
        inplace: bool = False,
        *,
        couple_channels: bool = False,
    ) -> None:
        super().__init__()
        self.p = checks.dropout_probability(p, what="drop probability")
        self.block_size, self.inplace, self.couple_channels = block_size, inplace, couple_channels

    def extra_repr(self) -> str:
        coupled = ", couple_channels=True" if self.couple_channels else ""
        return f"p={self.p}, block_size={self.block_size}, inplace={self.inplace}{coupled}"


def _drop_blocks(function: Any, module: Any, input: Tensor, p: Any) -> Tensor:
    options = {"training": module.training, "couple_channels": module.couple_channels}
    y: Tensor = function(input, p, module.block_size, module.inplace, **options)
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

    Raises ValueError for p outside [0, 1]. Stored for backward: a bit per cell. Source: Ghiasi et al., NeurIPS 2018.

    >>> import torch, fastdrop.torch as fdt
    >>> y = fdt.DropBlock2d(0.1, block_size=3)(torch.ones(2, 3, 16, 16))
    >>> round(float(y.mean()), 4)
    1.0
    """

    def drop_input(self, input: Tensor) -> Tensor:
        return _drop_blocks(structured.drop_block2d, self, input, self.rate)


class DropBlock3d(_DropBlock):
    """torchvision's module of this name on fastdrop: `DropBlock2d` for ``(N, C, D, H, W)``.

    >>> import torch, fastdrop.torch as fdt
    >>> y = fdt.DropBlock3d(0.1, block_size=3)(torch.ones(2, 3, 8, 8, 8))
    >>> round(float(y.mean()), 4)
    1.0
    """

    def drop_input(self, input: Tensor) -> Tensor:
        return _drop_blocks(structured.drop_block3d, self, input, self.rate)


class GaussianDropout(Rated):
    """Multiplies by Gaussian noise of mean 1 and variance ``p / (1 - p)``, which backward draws again.

    Parameters
    ----------
    p : float
        At least 0 and less than 1; ValueError otherwise. Assign a `torch.nn.Parameter` to ``p`` to learn it.
    inplace : bool
        Writes the result to the input.

    Source: Srivastava et al., JMLR 15, 2014, section 10. Keras has a layer of this name.

    >>> import torch, fastdrop.torch as fdt
    >>> drop = fdt.GaussianDropout(0.2)
    >>> round(float(drop(torch.ones(100_000)).var()), 2)
    0.25
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        self.p, self.inplace = checks.gaussian_probability(checks.dropout_probability(p)), inplace

    def drop_input(self, input: Tensor) -> Tensor:
        return F.gaussian_dropout(input, self.rate, self.training, self.inplace)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class TimmDropBlock2d(_NamedDropProb, DropBlock2d):
    """timm's DropBlock2d after `convert`: timm's attributes, of which ``gamma_scale`` multiplies the share to drop."""

    gamma_scale: float

    def drop_input(self, input: Tensor) -> Tensor:
        return _drop_blocks(structured.drop_block2d, self, input, self.rate * self.gamma_scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma_scale={self.gamma_scale}"

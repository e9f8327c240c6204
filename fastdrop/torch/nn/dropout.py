"""The dropout modules that torch has too, and Gaussian dropout; `structured` has those of timm and torchvision.

Users build models with them, and `convert` changes modules to them. The first six are subclasses of torch's: `Dropout`
takes the arguments of `torch.nn.Dropout`, has the same (empty) ``state_dict`` and passes
``isinstance(module, torch.nn.Dropout)``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor, nn

from ...core import checks
from ..functional import dropout as F
from ..functional import structured
from .base import Seeded, SourceOptions

__all__ = [
    "AlphaDropout",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "GaussianDropout",
]


class _Elementwise(Seeded):
    """A dropout that torch has too, with fastdrop's ``store``."""

    inplace: bool
    store: str = "bits"

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, store: str = "bits", **source: Unpack[SourceOptions]
    ) -> None:
        super().__init__(p, inplace)
        checks.choice("store", store, checks.STORES)
        self.store = store
        self.draw_from(**source)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, store={self.store!r}{self.source_repr()}"


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
    noise_shape : sequence of (int or None), optional
        1 on axes that share one decision, None or the full extent elsewhere, as in `fastdrop.torch.dropout`.
    seed : int from 0 to 2**64 - 1, optional
        Gives the module a stream of its own: the n-th call in training has a mask that depends on seed and n only. So
        masks differ from call to call, and a new module with the same seed repeats them. `fastdrop.torch.dropout` with
        a seed has the same mask at every call. ``module.seed = seed`` starts the stream again.
    generator : torch.Generator, optional
        Each call in training draws a number from it. It must be of the input's device. Modules may share one.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts, as inside of plans of tensor parallelism: ``part`` of
        `fastdrop.torch.dropout`. DTensors need none.

    Raises
    ------
    ValueError
        For p or seed out of range, an unknown store or scaling, a negative extent in noise_shape, and both seed and
        generator.
    TypeError
        For a seed, a generator or a noise_shape of another type.

    Notes
    -----
    With neither seed nor generator, masks come from torch's default generator. It has the advantage that checkpoints
    restore it: a checkpoint that computes a module with a seed or a generator again raises RuntimeError, as the mask
    would be another one. Such a module can't be compiled with ``fullgraph=True`` either; without that it runs between
    two graphs. `torch.jit.trace` and ``make_fx`` refuse a seed in training. The stream is not part of ``state_dict``.
    Copies of the module, also unpickled ones, go on from where it was, each for itself; only `copy.copy` shares the
    stream. Under `vmap` a seed gives all samples the same mask. In `mc_predict` each sample has its own mask, and the
    stream stays where it is.

    The input may have any shape, and the output has the same. Errors and details as in `fastdrop.torch.dropout`.
    Sources: Hinton et al. 2012; Srivastava et al., JMLR 15, 2014.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> drop = fdt.Dropout(0.1, store="seed")
    >>> drop, isinstance(drop, torch.nn.Dropout)
    (Dropout(p=0.1, inplace=False, store='seed'), True)
    >>> x = torch.ones(8)
    >>> drop.eval()(x) is x
    True
    """

    scaling = "inverted"  # without an annotation, which TorchScript would have to understand
    noise_shape = None

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        store: str = "bits",
        scaling: str = "inverted",
        noise_shape: Any = None,
        **source: Unpack[SourceOptions],
    ) -> None:
        super().__init__(p, inplace, store=store, **source)
        checks.scaling(scaling)
        self.scaling = scaling
        if noise_shape is not None:
            self.noise_shape = checks.noise_shape_entries(noise_shape)

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        if source or self.noise_shape is not None:
            source["noise_shape"] = self.noise_shape
            return F.dropout(
                input, self.rate, self.training, self.inplace, store=self.store, scaling=self.scaling, **source
            )
        # Unpacking a dict and one more argument would take a few percent of a call on a small tensor.
        return F.dropout(input, self.rate, self.training, self.inplace, store=self.store, scaling=self.scaling)

    def evaluate_input(self, input: Tensor) -> Tensor:
        if hasattr(self, "scaling"):  # noqa: SIM102 - TorchScript needs both: it sees only attributes of the object
            if self.scaling == "standard":
                return input * (1.0 - self.p)
        return input

    def extra_repr(self) -> str:
        scaling = "" if self.scaling == "inverted" else f", scaling={self.scaling!r}"
        shared = "" if self.noise_shape is None else f", noise_shape={self.noise_shape}"
        return super().extra_repr() + scaling + shared


class Dropout1d(_Elementwise, nn.Dropout1d):
    """`torch.nn.Dropout1d` on fastdrop: drops whole channels of ``(N, C, L)`` or ``(C, L)``.

    Parameters
    ----------
    p : float
        Drop probability, 0 to 1.
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
    TypeError, ValueError
        As in `Dropout`.

    See Also
    --------
    Dropout : says more about these parameters.
    dropout1d : the function, with shapes, errors and memory kept.

    Notes
    -----
    Kept for backward: a bit per channel and sample, or a seed. Source: Tompson et al., CVPR 2015.

    Examples
    --------
    >>> import fastdrop.torch as fdt
    >>> fdt.Dropout1d(0.2)
    Dropout1d(p=0.2, inplace=False, store='bits')
    """

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        return structured.dropout1d(input, self.rate, self.training, self.inplace, store=self.store, **source)


class Dropout2d(_Elementwise, nn.Dropout2d):
    """`torch.nn.Dropout2d` on fastdrop: drops whole channels of ``(N, C, H, W)``, in either memory format.

    Parameters
    ----------
    p : float
        Drop probability, 0 to 1.
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
    TypeError, ValueError
        As in `Dropout`.

    See Also
    --------
    Dropout : says more about these parameters.
    dropout2d : the function, with shapes, errors and memory kept.

    Notes
    -----
    Kept for backward: a bit per channel and sample, or a seed. Source: Tompson et al., CVPR 2015.

    Examples
    --------
    >>> import fastdrop.torch as fdt
    >>> fdt.Dropout2d(0.2)
    Dropout2d(p=0.2, inplace=False, store='bits')
    """

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        return structured.dropout2d(input, self.rate, self.training, self.inplace, store=self.store, **source)


class Dropout3d(_Elementwise, nn.Dropout3d):
    """`torch.nn.Dropout3d` on fastdrop: drops whole channels of ``(N, C, D, H, W)`` or ``(C, D, H, W)``.

    Parameters
    ----------
    p : float
        Drop probability, 0 to 1.
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
    TypeError, ValueError
        As in `Dropout`.

    See Also
    --------
    Dropout : says more about these parameters.
    dropout3d : the function, with shapes, errors and memory kept.

    Notes
    -----
    Kept for backward: a bit per channel and sample, or a seed. Source: Tompson et al., CVPR 2015.

    Examples
    --------
    >>> import fastdrop.torch as fdt
    >>> fdt.Dropout3d(0.2)
    Dropout3d(p=0.2, inplace=False, store='bits')
    """

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        return structured.dropout3d(input, self.rate, self.training, self.inplace, store=self.store, **source)


class AlphaDropout(_Elementwise, nn.AlphaDropout):
    """`torch.nn.AlphaDropout` on fastdrop, for networks of SELUs: keeps mean 0 and variance 1.

    torch's own ignores its ``inplace``; this one does not.

    Parameters
    ----------
    p : float
        Drop probability, 0 to 1.
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
    TypeError, ValueError
        As in `Dropout`.

    See Also
    --------
    Dropout : says more about these parameters.
    alpha_dropout : the function, with shapes, errors and memory kept.

    Notes
    -----
    Kept for backward: a bit per element, or a seed. Source: Klambauer et al., NeurIPS 2017.

    Examples
    --------
    >>> import fastdrop.torch as fdt
    >>> fdt.AlphaDropout(0.1)
    AlphaDropout(p=0.1, inplace=False, store='bits')
    """

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        return F.alpha_dropout(input, self.rate, self.training, self.inplace, store=self.store, **source)


class FeatureAlphaDropout(_Elementwise, nn.FeatureAlphaDropout):
    """`torch.nn.FeatureAlphaDropout` on fastdrop: alpha dropout of whole channels of ``(N, C, *)``.

    torch's own ignores its ``inplace``; this one does not.

    Parameters
    ----------
    p : float
        Drop probability, 0 to 1.
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
    TypeError, ValueError
        As in `Dropout`.

    See Also
    --------
    Dropout : says more about these parameters.
    feature_alpha_dropout : the function, with shapes, errors and memory kept.

    Notes
    -----
    Kept for backward: a bit per channel and sample, or a seed. Source: Klambauer et al., NeurIPS 2017.

    Examples
    --------
    >>> import fastdrop.torch as fdt
    >>> fdt.FeatureAlphaDropout(0.1)
    FeatureAlphaDropout(p=0.1, inplace=False, store='bits')
    """

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        return structured.feature_alpha_dropout(
            input, self.rate, self.training, self.inplace, store=self.store, **source
        )


class GaussianDropout(Seeded):
    """Multiplies by Gaussian noise of mean 1 and variance ``p / (1 - p)``, which backward draws again.

    Parameters
    ----------
    p : float
        At least 0 and less than 1; ValueError otherwise. Assign a `torch.nn.Parameter` to ``p`` to learn it.
    inplace : bool
        Writes the result to the input.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts.

    Raises
    ------
    TypeError, ValueError
        As in `Dropout`.

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    Source: Srivastava et al., JMLR 15, 2014, section 10. Keras has a layer of this name.
    Kept for backward: 8 bytes, and the input if p requires grad.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> drop = fdt.GaussianDropout(0.2)
    >>> round(float(drop(torch.ones(100_000)).var()), 2)
    0.25
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, **source: Unpack[SourceOptions]) -> None:
        super().__init__()
        self.draw_from(**source)
        self.p, self.inplace = checks.gaussian_probability(checks.dropout_probability(p)), inplace

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        return F.gaussian_dropout(input, self.rate, self.training, self.inplace, **source)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}{self.source_repr()}"

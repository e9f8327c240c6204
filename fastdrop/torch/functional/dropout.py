"""Every kind of dropout as a function.

Each function works out the shape of its mask and its scaling. `routing` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ...core import checks, variants
from ..runtime.nested import shape_of
from .plan import Seed, check_tensor, eager_probability, for_subclasses
from .routing import drop, drop_block, gaussian

__all__ = [
    "alpha_dropout",
    "drop_block2d",
    "drop_block3d",
    "drop_connect",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "stochastic_depth",
    "variational_dropout",
]


def dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    noise_shape: Any = None,
    store: str = "bits",
    scaling: str = "inverted",
) -> Tensor:
    """Returns input with each element dropped with probability p: `torch.nn.functional.dropout`, faster.

    ``y = x / (1 - p)`` where kept and exactly +0 where dropped, whatever x holds there: a dropped inf or NaN is 0, in
    the gradient too. The mask is a function of the seed, the logical (C-order) index and p alone: the same on any
    number of threads, any strides, on a GPU and, with `fastdrop.dropout(x.numpy(), p, rng=seed)`, in NumPy.

    Parameters
    ----------
    input : Tensor of float32, float64, float16, bfloat16, complex64 or complex128, any shape ``(*)``, any strides
        Complex numbers are dropped whole. Of a nested tensor the mask is that of its ``values()``.
    p : float or Tensor of one number
        Drop probability, 0 to 1. p = 1 gives zeros, with zeros for a gradient. As a tensor, on the CPU, it may change
        from call to call of a compiled function without compiling anew.
    training : bool
        False returns input itself, and so does p = 0.
    inplace : bool
        Writes the result to input and returns that.
    generator : torch.Generator, optional
        Of input's device. None is torch's default generator there, which `torch.manual_seed` sets. Each call takes
        one number. Can't be compiled, and checkpointing doesn't restore it: give ``seed`` there.
    seed : int from 0 to 2**64 - 1, or Tensor of one int64, optional
        Draws the mask from this number and nothing from any generator. Ints that vary in a compiled function must be
        below 2**63. A tensor on input's GPU is read there when the kernel runs.
    noise_shape : sequence of (int or None), optional
        1 on axes that share one decision, None or the full extent elsewhere, as in Keras.
    store : {"bits", "seed"}
        What is kept for backward: 1/8 byte per element, or 8 bytes in all, from which backward draws the mask again.
    scaling : {"inverted", "standard"}
        "standard", the 2014 paper's, leaves kept elements as they are and multiplies by ``1 - p`` when not training.

    Returns
    -------
    Tensor with input's shape, dtype and strides

    Raises
    ------
    ValueError
        p or seed out of range; noise_shape that does not fit; unknown store or scaling; both seed and generator; a
        seed tensor of more than one number or on another GPU; p on a GPU.
    TypeError
        input that is no Tensor; p or seed of another type; p that requires grad.
    RuntimeError
        input of an integer dtype, or sparse; what torch won't have written in place; ``generator`` under
        ``torch.compile``, or of another kind of device; ``vmap`` without randomness="same" or "different", or over p;
        input on a GPU without numba-cuda.
    NotImplementedError
        input that is neither on the CPU nor on an NVIDIA GPU (nor "meta").

    Has a gradient of any order and a forward-mode derivative, and works under ``torch.compile``, ``torch.func``,
    autocast and checkpointing. Sources: Hinton et al. 2012; Srivastava et al., JMLR 15, 2014.

    >>> import torch, fastdrop.torch as fdt
    >>> x = torch.arange(1.0, 7.0, requires_grad=True)
    >>> y = fdt.dropout(x, 0.5, seed=4)
    >>> y
    tensor([ 0.,  0.,  6.,  8.,  0., 12.], grad_fn=<DropoutBackward>)
    >>> y.sum().backward()
    >>> x.grad
    tensor([0., 0., 2., 2., 0., 2.])
    """
    if has_torch_function_unary(input):
        options = {"generator": generator, "seed": seed, "noise_shape": noise_shape, "store": store, "scaling": scaling}
        return handle_torch_function(dropout, (input,), input, p=p, training=training, inplace=inplace, **options)
    if scaling != "inverted":
        checks.scaling(scaling)
    if noise_shape is not None and not torch.compiler.is_compiling() and not getattr(input, "is_nested", False):
        check_tensor(input)
        noise_shape = checks.noise_shape(noise_shape, tuple(input.shape))
    return drop(input, p, training, inplace, (generator, seed), noise_shape, store, scaling)


@for_subclasses
def dropout1d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> Tensor:
    """Returns input with whole channels dropped: `torch.nn.functional.dropout1d`, faster.

    Parameters
    ----------
    input : Tensor, ``(N, C, L)`` or ``(C, L)``
    p, training, inplace, generator, seed, store
        As in `dropout`, with the same errors. RuntimeError for input of other ranks, as torch's.

    Kept for backward: a bit per channel and sample, or a seed. A seed's mask is that of `fastdrop.feature_dropout`.
    Source: Tompson et al., CVPR 2015.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.dropout1d(torch.ones(2, 2, 3), 0.5, seed=4)[..., 0]
    tensor([[0., 0.],
            [2., 2.]])
    """
    cells = _feature_cells(input, p, training, F.dropout1d, (2, 3), 3)
    return drop(input, p, training, inplace, (generator, seed), cells, store, "inverted")


@for_subclasses
def dropout2d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> Tensor:
    """Returns input with whole channels dropped: `torch.nn.functional.dropout2d`, faster.

    Parameters
    ----------
    input : Tensor, ``(N, C, H, W)``
        Input of three axes is taken for ``(N, C, L)``, with torch's warning. Other ranks are deprecated, as in torch.
    p, training, inplace, generator, seed, store
        As in `dropout`, with the same errors. Channels-last tensors stay channels-last.

    Kept for backward: a bit per channel and sample, or a seed. A seed's mask is that of `fastdrop.feature_dropout`.
    Source: Tompson et al., CVPR 2015.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.dropout2d(torch.ones(2, 2, 3, 3), 0.5, seed=4)[..., 0, 0]
    tensor([[0., 0.],
            [2., 2.]])
    """
    cells = _feature_cells(input, p, training, F.dropout2d, (4,), None)
    return drop(input, p, training, inplace, (generator, seed), cells, store, "inverted")


@for_subclasses
def dropout3d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> Tensor:
    """Returns input with whole channels dropped: `torch.nn.functional.dropout3d`, faster.

    Parameters
    ----------
    input : Tensor, ``(N, C, D, H, W)`` or ``(C, D, H, W)``
        Other ranks are deprecated, with torch's warning.
    p, training, inplace, generator, seed, store
        As in `dropout`, with the same errors.

    Kept for backward: a bit per channel and sample, or a seed. A seed's mask is that of `fastdrop.feature_dropout`.
    Source: Tompson et al., CVPR 2015.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.dropout3d(torch.ones(2, 2, 3, 3, 3), 0.5, seed=4)[..., 0, 0, 0]
    tensor([[0., 0.],
            [2., 2.]])
    """
    cells = _feature_cells(input, p, training, F.dropout3d, (4, 5), 5)
    return drop(input, p, training, inplace, (generator, seed), cells, store, "inverted")


@for_subclasses
def alpha_dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> Tensor:
    """Returns input with elements dropped to SELU's floor, shifted and scaled back to mean 0 and variance 1:
    `torch.nn.functional.alpha_dropout`, faster.

    Parameters
    ----------
    input : Tensor of a float dtype, any shape ``(*)``
    p, inplace, generator, seed, store
        As in `dropout`, with the same errors. RuntimeError for complex input.
    training : bool
        False, torch's default here, returns input itself.

    Kept for backward: a bit per element, or a seed. Formula: `fastdrop.alpha_dropout`. Source: Klambauer et al.,
    NeurIPS 2017.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.alpha_dropout(torch.zeros(4), 0.5, True, seed=4)
    tensor([-0.7792, -0.7792,  0.7792,  0.7792])
    """
    return drop(input, p, training, inplace, (generator, seed), None, store, "alpha")


@for_subclasses
def feature_alpha_dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
) -> Tensor:
    """Returns `alpha_dropout` of input, whole channels dropped: `torch.nn.functional.feature_alpha_dropout`, faster.

    Parameters, errors and memory are those of `alpha_dropout`, but one bit stands for a channel of a sample. input is
    ``(N, C, *)``, RuntimeError if it has fewer axes.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.feature_alpha_dropout(torch.zeros(2, 2, 3), 0.5, True, seed=4)[..., 0]
    tensor([[-0.7792, -0.7792],
            [ 0.7792,  0.7792]])
    """
    return drop(input, p, training, inplace, (generator, seed), _channels(input, p, training), store, "alpha")


@for_subclasses
def variational_dropout(
    input: Tensor,
    p: float | Tensor,
    time_axis: int,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
    scaling: str = "inverted",
) -> Tensor:
    """Returns input with one mask held over a whole sequence: locked dropout.

    Parameters
    ----------
    input : Tensor of any shape ``(*)``, such as ``(T, B, F)``
    p : float or Tensor of one number
        Drop probability, 0 to 1.
    time_axis : int
        The axis along which decisions are shared; ValueError or TypeError if input does not have it.
    training, inplace, generator, seed, store, scaling
        As in `dropout`, with the same errors.

    Kept for backward: a bit per element of one step, or a seed. Source: Gal and Ghahramani, NeurIPS 2016.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.variational_dropout(torch.ones(3, 1, 4), 0.5, 0, seed=4)[:, 0]
    tensor([[0., 0., 2., 2.],
            [0., 0., 2., 2.],
            [0., 0., 2., 2.]])
    """
    checks.scaling(scaling)
    check_tensor(input)
    cells = variants.shared_cells(shape_of(input), checks.axis("time_axis", time_axis, input.dim()))
    return drop(input, p, training, inplace, (generator, seed), cells, store, scaling)


@for_subclasses
def drop_connect(
    weight: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
    scaling: str = "inverted",
) -> Tensor:
    """Returns a weight with connections dropped, one mask for the whole batch: DropConnect.

    It is `dropout` of a weight, whose parameters and errors these are. Kept for backward by this function: a bit per
    weight, or a seed; the op that uses the dropped weight keeps that weight too, unless it runs inside `DropConnect`.

    Source: Wan et al., ICML 2013 (a mask for each example); Merity et al., ICLR 2018, for recurrent weights.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.drop_connect(torch.ones(2, 3), 0.5, seed=4)
    tensor([[0., 0., 2.],
            [2., 0., 2.]])
    """
    checks.scaling(scaling)
    return drop(weight, p, training, False, (generator, seed), None, store, scaling)


@for_subclasses
def stochastic_depth(
    input: Tensor,
    p: float | Tensor,
    mode: str,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    store: str = "bits",
    scaling: str = "inverted",
) -> Tensor:
    """Returns input, the output of a residual branch, with whole samples dropped: torchvision's, faster.

    Parameters
    ----------
    input : Tensor, ``(N, *)``
    p : float or Tensor of one number
        Drop probability of the branch, 0 to 1.
    mode : {"batch", "row"}
        "row" decides for each sample, "batch" once for all samples. ValueError for another.
    training, inplace, generator, seed, store, scaling
        As in `dropout`, with the same errors. (``scaling="standard"`` is that of the paper.)

    Kept for backward: a bit per sample, or a seed. Source: Huang et al., ECCV 2016.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.stochastic_depth(torch.ones(4, 2), 0.5, "row", seed=4)[:, 0]
    tensor([0., 0., 2., 2.])
    """
    checks.scaling(scaling)
    if mode not in checks.DEPTH_MODES:
        raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode}")
    check_tensor(input)
    if not torch.compiler.is_compiling():
        p = eager_probability(p, "drop probability")
    cells = variants.sample_cells(shape_of(input), mode)
    return drop(input, p, training, inplace, (generator, seed), cells, store, scaling)


@for_subclasses
def drop_block2d(
    input: Tensor,
    p: float | Tensor,
    block_size: int | tuple[int, int],
    inplace: bool = False,
    *,
    training: bool = True,
    couple_channels: bool = False,
    generator: torch.Generator | None = None,
    seed: Seed = None,
) -> Tensor:
    """Returns input with blocks of neighbouring cells dropped, scaled by cells / cells kept: torchvision's, faster.

    Parameters
    ----------
    input : Tensor of a float dtype, ``(N, C, H, W)``
    p : float or Tensor of one number
        Share of cells to drop, 0 to 1. p = 1 gives zeros.
    block_size : int or tuple of int
        Extent of a block on each spatial axis, odd or even. It is cut to input's extent on each axis, as in timm.
    inplace, training, generator, seed
        As in `dropout`, with the same errors. ValueError for other ranks, as torchvision's. There is no ``eps``,
        because nothing is divided if nothing is kept.
    couple_channels : bool
        True gives all channels of a sample one mask, as in timm. Otherwise each channel has its own.

    Kept for backward: a bit per cell and 8 bytes. A seed's mask is that of `fastdrop.drop_block`. Source: Ghiasi et
    al., NeurIPS 2018.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.drop_block2d(torch.ones(1, 1, 4, 6), 0.3, 2, seed=3)[0, 0]
    tensor([[1.2000, 1.2000, 1.2000, 1.2000, 1.2000, 1.2000],
            [1.2000, 0.0000, 0.0000, 1.2000, 1.2000, 1.2000],
            [1.2000, 0.0000, 0.0000, 1.2000, 1.2000, 1.2000],
            [1.2000, 1.2000, 1.2000, 1.2000, 1.2000, 1.2000]])
    """
    return drop_block(input, p, (block_size, 2), inplace, training, couple_channels, (generator, seed))


@for_subclasses
def drop_block3d(
    input: Tensor,
    p: float | Tensor,
    block_size: int | tuple[int, int, int],
    inplace: bool = False,
    *,
    training: bool = True,
    couple_channels: bool = False,
    generator: torch.Generator | None = None,
    seed: Seed = None,
) -> Tensor:
    """Returns `drop_block2d` in three spatial axes, ``(N, C, D, H, W)``: torchvision's, faster.

    >>> import torch, fastdrop.torch as fdt
    >>> y = fdt.drop_block3d(torch.ones(1, 2, 6, 6, 6), 0.1, 3, seed=3)
    >>> y.shape, bool((y == 0).any()), round(float(y.mean()), 4)
    (torch.Size([1, 2, 6, 6, 6]), True, 1.0)
    """
    return drop_block(input, p, (block_size, 3), inplace, training, couple_channels, (generator, seed))


@for_subclasses
def gaussian_dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: Seed = None,
) -> Tensor:
    """Returns input times Gaussian noise of mean 1 and variance ``p / (1 - p)``.

    Parameters
    ----------
    input : Tensor of a float dtype, any shape ``(*)``
    p : float or Tensor of one number
        From 0 to below 1, otherwise ValueError. Only here may a tensor require grad.
    training, inplace, generator, seed
        As in `dropout`, with the same errors. RuntimeError for complex input.

    Kept for backward: 8 bytes, from which the noise is drawn again, and input if p requires grad. The noise of a
    seed is that of `fastdrop.gaussian_dropout`. Source: Srivastava et al., JMLR 15, 2014, section 10.

    >>> import torch, fastdrop.torch as fdt
    >>> fdt.gaussian_dropout(torch.ones(3), 0.5, seed=4)
    tensor([-0.4915,  1.1203,  1.2279])
    """
    return gaussian(input, p, training, inplace, (generator, seed))


def _feature_cells(
    x: Tensor,
    p: float | Tensor,
    training: bool,
    theirs: Callable[..., Tensor],
    ranks: tuple[int, ...],
    batched: int | None,
) -> tuple[int, ...]:
    """A cell for each channel. ``theirs`` is torch's function for tensors of these ranks. x has samples if its rank is
    ``batched``; None means that it always has."""
    check_tensor(x)
    rank = x.dim()
    if rank not in ranks:
        theirs(x, 0.0, False)  # warns of other ranks, or refuses them, as torch does
    if batched is None or rank == batched or not rank:
        return _channels(x, p, training)
    return variants.feature_cells(shape_of(x), 0)


def _channels(x: Tensor, p: float | Tensor, training: bool) -> tuple[int, ...]:
    check_tensor(x)
    if x.dim() < 2 and training and (isinstance(p, Tensor) or p != 0.0):
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return variants.feature_cells(shape_of(x), 1)

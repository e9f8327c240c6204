"""Batchwise dropout between linear layers: `batchwise_linear`, which computes kept units only.

The mask is one for the whole batch, so a dropped unit is a row of the weight before it and a column of the weight after
it that nobody needs. Which units are kept is drawn on the CPU from a seed that the CPU has, as in `residual`. Where it
isn't known there (compilers, transforms), or where gathering costs more than it saves, all units are computed and
dropped by `dropout` under the same mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import checks
from ...core.mask import PackedMask
from ...core.random import threshold as threshold_of
from ..ops import mask as mask_ops
from ..runtime import cell_kernels
from ..runtime.cell_kernels import Index
from ..runtime.dispatch import is_eager_dense
from . import sharded
from .dropout import dropout
from .plan import KERNEL, NO_SOURCE, Source, check_tensor, for_subclasses, plan_call, seed_for_kernel
from .residual import draw_kept, move_index

__all__ = ["batchwise_linear", "least_p", "shared_by_batch"]

# Below `least_p`, gathering weights and scattering their gradients costs more than the products save: measured on a CPU
# for layers of 2,048 units. The products of fewer rows cost less, what is gathered and scattered costs the same.
MIN_P, MIN_P_TIMES_ROWS = 0.1, 5.0
LINE = 16  # units: products of other numbers of them take up to 1.5 times as long

Activation = Callable[[Tensor], Tensor] | None


class _Layer(NamedTuple):
    """A linear layer and what follows it. The last one has neither activation nor dropout."""

    weight: Tensor
    bias: Tensor | None
    activation: Activation = None
    p: Any = 0.0
    source: Source = NO_SOURCE


@for_subclasses(sharded.refuse("call it on local tensors, with one seed on all ranks"))
def batchwise_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    p: Any = 0.5,
    activation: Any = F.relu,
    *,
    training: bool = True,
    generator: torch.Generator | None = None,
    seed: Any = None,
    min_p: float | None = None,
) -> Tensor:
    """Returns what linear layers make of x, with activation and dropout in between. Units are dropped for the whole
    batch at once, and only kept ones are computed.

    For two layers it is ``linear(dropout(activation(linear(x, W1, b1)), p, noise_shape=(1, None)), W2, b2)``, up to
    rounding: `fastdrop.torch.dropout` has the same mask under the same seed. The products take the kept rows of W1 and
    the kept columns of W2; a weight between two dropouts loses both. At p = 0.5 that leaves a quarter of its work.

    The price is noisier gradients, because the whole batch has one mask. An MLP on handwritten digits diverged at a
    learning rate of 0.1 with momentum 0.9, where `dropout` by elements trained. At 0.03 it was as good over 6 seeds,
    but behind in the short training of examples/batchwise.py. So lower the learning rate first.

    Parameters
    ----------
    x : Tensor of a float dtype, ``(*, features)``
        Units are on the last axis. All other axes share the mask.
    weights : sequence of n + 1 Tensors, ``(out_features, in_features)`` each
        Those of the layers in their order, n >= 1 hidden ones and the last.
    biases : sequence of n + 1 Tensors ``(out_features,)`` or None
    p : number, Tensor of one number, or a sequence of n of them
        Drop probability of a hidden unit, 0 to 1.
    activation : callable or None, or a sequence of n of them
        Called on the hidden layer, of which it gets the kept units alone: it must work element by element. None is
        the identity.
    training : bool
        False drops nothing.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    min_p : float, optional
        A layer with p below it computes all units, and drops the same ones: the same result up to rounding. None is
        ``0.1 + 5 / rows`` for x of so many rows, below which nothing is gained.

    Returns
    -------
    Tensor ``(*, out_features of the last layer)``

    Raises
    ------
    ValueError
        No hidden layer; weights, biases, p, activations or seeds of another number; weights that don't fit each other
        or x; p or min_p outside [0, 1].
    TypeError
        What is no Tensor, an activation that can't be called.
    RuntimeError
        What `dropout` and `torch.nn.functional.linear` refuse.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Each hidden layer takes a number. A seed for more than one hidden layer is a sequence.

    If nothing is kept the result is the last bias. Weights get dense gradients, which are 0 where nothing was computed.
    Kept for backward: what torch keeps for a network of the kept units, whose weights are copies, and 8 bytes for each
    unit. Has gradients of any order. Compiled code and code under transforms of `torch.func` computes all units.
    Source: Graham, Reizenstein, Robinson, "Efficient batchwise dropout training using submatrices", 2015.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> x, w1, w2 = torch.ones(64, 3), torch.ones(8, 3), torch.ones(1, 8)
    >>> fdt.batchwise_linear(x, (w1, w2), (None, None), 0.5, seed=4).unique()
    tensor([18.])
    >>> int(fdt.dropout(torch.ones(64, 8), 0.5, noise_shape=(1, None), seed=4)[0].count_nonzero()), "of 8 kept"
    (3, 'of 8 kept')
    """
    layers = _layers(x, weights, biases, (p, activation, seed), generator)
    if min_p is not None:
        checks.between("min_p", min_p, 0, 1)
    tensors = (x, *weights, *(bias for bias in biases if bias is not None))
    compact = not torch.compiler.is_compiling() and all(map(is_eager_dense, tensors))
    if compact and min_p is None:
        min_p = least_p(x)
    plans = [plan_call(x, layer.p, training) for layer in layers[:-1]]  # every p is checked before anything is drawn
    before: Index = None
    for layer, (way, number, _) in zip(layers, plans, strict=False):
        kept = _draw(x, layer, number, compact and way == KERNEL and number >= min_p)
        h = _linear(x, layer, kept.units, before)
        h = h if layer.activation is None else layer.activation(h)
        if kept.words is None:
            x = shared_by_batch(h, layer.p, training, source=kept.source)
        else:
            x = mask_ops.masked(h, kept.words, number, _shared_shape(h, h.shape[-1]), True, "inverted")
        before = kept.units
    return _linear(x, layers[-1], None, before)


def least_p(x: Tensor) -> float:
    """The p from which computing kept units alone pays."""
    return MIN_P + MIN_P_TIMES_ROWS / max(math.prod(x.shape[:-1]), 1)


def shared_by_batch(
    h: Tensor,
    p: Any,
    training: bool = True,
    inplace: bool = False,
    *,
    source: Source = NO_SOURCE,
    store: str = "bits",
) -> Tensor:
    """`dropout` of units on the last axis, with one mask for all other axes."""
    shape = _shared_shape(h, None)
    generator, seed, part = source
    given: dict[str, Any] = {"generator": generator, "seed": seed, "part": part}
    return dropout(h, p, training, inplace, noise_shape=shape, store=store, **given)


def _shared_shape(h: Tensor, units: int | None) -> list[Any]:
    return [1] * (h.dim() - 1) + [units]


class _Computed(NamedTuple):
    """The units of a layer that are computed, None for all of them, and the words of their mask. Without words they
    are still to be drawn from ``source``."""

    units: Index
    words: Tensor | None
    source: Source


def _draw(x: Tensor, layer: _Layer, p: Any, compact: bool) -> _Computed:
    """The units to compute: the kept ones, and as many dropped ones as fill the last line of them."""
    if not compact:
        return _Computed(None, None, layer.source)
    units = layer.weight.shape[0]
    seed = seed_for_kernel(x, layer.source, shape=(1, units), shared=(1, None))
    if isinstance(seed, Tensor):  # which is on a GPU
        return _Computed(None, None, (None, seed, None))
    kept = draw_kept(units, seed, threshold_of(p))
    computed = np.zeros(units, np.bool_)
    computed[kept] = True
    dropped = np.flatnonzero(~computed)
    computed[dropped[: -len(kept) % LINE]] = True
    index = np.flatnonzero(computed)
    words = PackedMask.from_bool(np.isin(index, kept, assume_unique=True), p).words
    on_device = [move_index(torch.from_numpy(array), x.device) for array in (index, words.view(np.int32))]
    return _Computed(on_device[0] if len(index) < units else None, on_device[1], layer.source)


def _linear(x: Tensor, layer: _Layer, rows: Index, columns: Index) -> Tensor:
    """The layer for these rows and columns of its weight, to which x's columns belong already."""
    weight, bias = layer.weight, layer.bias
    if rows is not None or columns is not None:
        weight = _Gather.apply(weight, rows, columns)
    if bias is not None and rows is not None:
        bias = bias.index_select(0, rows)
    return F.linear(x, weight, bias)


class _Gather(torch.autograd.Function):
    """`cell_kernels.gather`, whose gradient is `_Scatter`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Index, columns: Index) -> Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.shape = tuple(x.shape)
        return cell_kernels.gather(x, rows, columns)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.saved_tensors
        way: Any = _Scatter.apply if is_eager_dense(dy) else cell_kernels.scatter
        return way(dy, rows, columns, ctx.shape), None, None


class _Scatter(torch.autograd.Function):
    """`cell_kernels.scatter`, whose gradient is `_Gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Index, columns: Index, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(rows, columns)
        return cell_kernels.scatter(x, rows, columns, shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        rows, columns = ctx.saved_tensors
        way: Any = _Gather.apply if is_eager_dense(dy) else cell_kernels.gather
        return way(dy, rows, columns), None, None, None


# ---- arguments ----


def _layers(
    x: Any, weights: Any, biases: Any, of_each: tuple[Any, Any, Any], generator: torch.Generator | None
) -> list[_Layer]:
    """The layers. ``of_each`` are p, the activation and the seed, each one for all hidden layers or a sequence."""
    check_tensor(x, "x")
    checks.at_least("x", x.dim(), 1, "an axis of units")
    for name, values in (("weights", weights), ("biases", biases)):
        if isinstance(values, Tensor) or not isinstance(values, Sequence):
            raise TypeError(f"{name} must be a sequence of tensors, but got {type(values).__name__}")
    hidden = len(weights) - 1
    if hidden < 1 or len(biases) != len(weights):
        raise ValueError(
            f"weights and biases must be those of two layers or more, but got {len(weights)} and {len(biases)}"
        )
    _check_parameters(x, weights, biases)
    p, activation, seed = of_each
    if hidden > 1 and seed is not None and not isinstance(seed, Sequence):
        raise ValueError(f"seed must be a sequence of {hidden}, one for each hidden layer, but got one for all")
    activations = _one_each("activation", activation, hidden)
    for function in activations:
        if function is not None:
            checks.function("activation", function)
    seeds = _one_each("seed", seed, hidden)
    rates = _one_each("p", p, hidden)
    sources = [(generator, own, None) for own in seeds]
    whole = zip(weights, biases, activations, rates, sources, strict=False)
    return [*itertools.starmap(_Layer, whole), _Layer(weights[-1], biases[-1])]


def _one_each(name: str, values: Any, n: int) -> Sequence[Any]:
    if isinstance(values, Tensor | str) or not isinstance(values, Sequence):
        return [values] * n
    if len(values) != n:
        raise ValueError(f"{name} must be one for each of {n} hidden layers, but got {len(values)}")
    return values


def _check_parameters(x: Tensor, weights: Sequence[Any], biases: Sequence[Any]) -> None:
    features, of = x.shape[-1], "x"
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_tensor(weight, f"weights[{i}]")
        if weight.dim() != 2 or weight.shape[1] != features:
            raise ValueError(
                f"weights[{i}] must be of shape (out_features, {features}), as {of} is, but got {tuple(weight.shape)}"
            )
        features, of = weight.shape[0], f"weights[{i}]"
        if bias is None:
            continue
        check_tensor(bias, f"biases[{i}]")
        if bias.shape != (features,):
            raise ValueError(f"biases[{i}] must be of shape ({features},), but got {tuple(bias.shape)}")

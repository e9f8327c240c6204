"""Dropout of tokens that takes them out of the sequence: `token_dropout`, which `nn.structured` has as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ...core import checks
from ..runtime import nested
from ..runtime.dispatch.tensors import jit_trace
from . import onnx, sharded
from .plan import ONNX, Seed, Source, Whole, check_tensor, check_uncut, check_unused_seed, for_subclasses, plan_call
from .selection import select_fixed

__all__ = ["token_dropout"]


def _drop_tokens_of_shards(function: Callable[..., Any], arguments: sharded.Arguments) -> Any:
    """Each process has some samples, or some features of all samples, and chooses among all tokens of a sample."""
    x = sharded.data_of(arguments, "x")
    sharded.check_whole(x, 1 - x.dim(), "x", function)
    local = sharded.local_tensor(x)
    replicate = torch.distributed.tensor.Replicate()
    placements = tuple(each if sharded.axis_of(each) in (None, 0) else replicate for each in x.placements)
    samples = sharded.layout_of(x, (x.shape[0], x.shape[1] - arguments.get("keep_first", 1)))
    if samples is not None:
        samples = samples._replace(placements=placements)
    y, index = function(**{**arguments, "x": local, "part": samples, "return_index": True})
    y = x if y is local else sharded.to_dtensor(y, x, local, (x.shape[0], y.shape[1], *x.shape[2:]))
    if not arguments.get("return_index"):
        return y
    return y, sharded.to_dtensor(index, x, local, (x.shape[0], index.shape[1]), placements)


class _Options(TypedDict, total=False):
    """The keyword arguments that do not decide the type of the result."""

    training: bool
    generator: torch.Generator | None
    seed: Seed
    part: Whole


@overload
def token_dropout(
    x: Tensor, p: float, keep_first: int = ..., *, return_index: Literal[False] = ..., **options: Unpack[_Options]
) -> Tensor: ...
@overload
def token_dropout(
    x: Tensor, p: float, keep_first: int = ..., *, return_index: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def token_dropout(
    x: Tensor, p: float, keep_first: int = ..., *, return_index: bool, **options: Unpack[_Options]
) -> Any: ...
@for_subclasses(_drop_tokens_of_shards)
def token_dropout(
    x: Tensor,
    p: float,
    keep_first: int = 1,
    *,
    training: bool = True,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    return_index: bool = False,
) -> Any:
    """Returns x without a share p of its tokens: each sample keeps the same number of them, chosen for itself.

    The layers that follow compute, and keep for backward, a share p less. Kept tokens stay in their order and as they
    are: nothing is scaled.

    Parameters
    ----------
    x : Tensor, ``(N, L, *)``
        N samples of L tokens, of any dtype.
    p : float
        Share of tokens to drop, 0 to 1. Of ``n = L - keep_first`` tokens, ``k = round(n * (1 - p))`` are kept (ties to
        even), but at least 1. All sets of k tokens are equally likely.
    keep_first : int
        How many tokens at the beginning are always kept, such as that of the class.
    training : bool
        False returns x itself, and so does a p so small that all tokens are kept.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable or Tensor, optional
        Of which whole the data is a part.
    return_index : bool
        Whether to return the numbers of the kept tokens too, ``(N, keep_first + k)`` and int64, to take positions or
        masks along.

    Returns
    -------
    Tensor ``(N, keep_first + k, *)``, or with ``return_index`` a tuple of it and the index

    Raises
    ------
    ValueError
        p outside [0, 1], x of fewer than two axes or fewer than ``keep_first`` tokens, ``keep_first`` below 0.
    TypeError
        x that is no Tensor, p that is a Tensor.
    RuntimeError
        Nested tensors, ``torch.jit.trace`` of a call that drops, and what `dropout` refuses.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    A part is one of the tokens that may be dropped, ``(N, n)``, and has all of a sample's.

    Add positions before you drop, or take their rows by the index. Kept for backward: the index, 8 bytes per kept
    token. Shapes do not depend on what is drawn, so `torch.compile` makes one graph. Sources: Liu, Matsoukas et al.,
    "PatchDropout", WACV 2023; Yao et al., "Random-LTD", 2022.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> x = torch.arange(18.0).reshape(2, 9, 1)
    >>> fdt.token_dropout(x, 0.5, seed=0)[..., 0]
    tensor([[ 0.,  1.,  2.,  4.,  5.],
            [ 9., 10., 11., 14., 16.]])
    """
    check_tensor(x, "x")
    nested.check_dense(x)
    checks.at_least("x", x.dim(), 2, "an axis of samples and one of tokens")
    checks.number_from("keep_first", checks.integer("keep_first", keep_first), 0)
    if isinstance(p, Tensor):
        raise TypeError("p, the share of tokens to drop, must be a number, because it decides the shape of the result")
    n, length = x.shape[0], x.shape[1]
    if length < keep_first:
        raise ValueError(f"x must have at least keep_first={keep_first} tokens on axis 1, but got {length}")
    source = generator, seed, part
    way, p, drops = plan_call(x, p, training, what="drop probability")
    if drops and jit_trace() is not None:
        raise RuntimeError(
            "torch.jit.trace can't trace token_dropout in training, because it would write the number of kept tokens "
            "into the graph: call eval(), or use torch.compile"
        )
    count = length - keep_first
    kept = max(round(count * (1.0 - p)), 1) if drops and count else count
    if kept == count:
        check_unused_seed(source)
        return (x, torch.arange(length, device=x.device).expand(n, length)) if return_index else x
    if way == ONNX:
        onnx.refuse("a fixed number of kept tokens")
    check_uncut(part, (n, count), 1, "the tokens of a sample, among all of which a fixed number is chosen")
    index = _index(x, (keep_first, count, kept), way, source)
    y = x.flatten(0, 1).index_select(0, (index + _first_rows(x)).flatten()).unflatten(0, (n, keep_first + kept))
    return (y, index) if return_index else y


def _index(x: Tensor, counts: tuple[int, int, int], way: str, source: Source) -> Tensor:
    """The numbers of each sample's kept tokens, in order. ``counts`` are those of tokens that are always kept, of the
    others, and of those of the others that are kept."""
    first, count, kept = counts
    chosen = select_fixed(x, (x.shape[0], count), kept, way, source, x.device) + first
    always = torch.arange(first, device=x.device).expand(x.shape[0], first)
    return torch.cat([always, chosen], 1)


def _first_rows(x: Tensor) -> Tensor:
    """The row of each sample's first token among the tokens of all samples."""
    return torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device).unsqueeze(1)

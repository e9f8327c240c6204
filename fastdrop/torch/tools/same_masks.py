"""`same_masks`: several passes through a model under the same dropout masks; `multi_sample`: one pass under several."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core import checks
from ..nn.base import OwnSource, Rated
from ..runtime import seeds
from ..runtime.dispatch.compilers import is_dynamo_imported

__all__ = ["multi_sample", "same_masks"]


@contextlib.contextmanager
def same_masks(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """A block, or as a decorator a function, in which each pass through a model draws the same dropout masks.

    A pass is a call of ``model`` in the thread of the block. At its beginning torch's default generators, on the CPU
    and on all CUDA devices in use, are seeded. At its end they have the state from before again. So everything that
    the model draws from them is the same in each pass: dropout of fastdrop and of torch, modules and functions,
    attention, noise. Modules with a seed or a generator of their own go back to where they were at the beginning of the
    block, and after it go on as after one pass. The same holds for eager and compiled models, under transforms, and for
    checkpoints inside of the model, which restore the generators that they began with.

    Modules in evaluation do not drop here either. Code outside of the model draws as it does without the block. A pass
    with inputs of other shapes begins with the same numbers, but its masks have other shapes.

    Parameters
    ----------
    model : Module
        The module that is called: around a model that `torch.compile` or ``DistributedDataParallel`` made, the outer
        one. Each process of a distributed job has its own masks, unless they are given one seed.
    seed : int from 0 to 2**64 - 1, optional
        Decides all masks. By default a number from torch's generator, so that each block has other masks.

    Returns
    -------
    context manager, and decorator

    Notes
    -----
    Warns if the model was not called in the block. Raises TypeError for a model that is no Module and a seed that is no
    int, ValueError for a seed out of range.

    * If the model itself, as a whole, is what a checkpoint computes again, call ``backward`` inside the block.
    * Blocks may be nested. For one model the inner block counts, and blocks of different models do not disturb each
      other.
    * While a pass runs, other threads that draw from the default generators draw from the seeded state, as in
      `torch.random.fork_rng`. ``DataParallel`` runs the model in several threads, so its masks may differ.
    * A function called with ``generator=`` goes on drawing from that generator: it is not the model's.
    * Hooks of the model itself run before and after a pass, hooks of modules inside it during the pass.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 64), fdt.Dropout(0.5)), torch.randn(2, 4)
    >>> with fdt.same_masks(model):
    ...     print(torch.equal(model(x), model(x)))
    True
    >>> torch.equal(model(x), model(x))
    False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    passes = _Passes(model, seeds.next_seed(None) if seed is None else checks.uint64("seed", seed))
    # Models that are compiled in place call hooks in compiled code.
    hide = torch.compiler.disable if is_dynamo_imported() else lambda hook: hook
    before = model.register_forward_pre_hook(
        hide(passes.begin)
    )  # last and, below, first: the inner of two blocks counts
    after = model.register_forward_hook(hide(passes.end), prepend=True, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        passes.close()
    if not passes.count:
        warnings.warn(
            "same_masks: the model was not called in the block, so its masks were not fixed: give the module that is "
            "called, such as the one that torch.compile returned",
            stacklevel=3,
        )


class _Passes:
    """The passes of one block: hooks of its model."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.seed, self.thread = seed, threading.get_ident()
        self.count = self.depth = 0  # passes begun; calls of the model that run
        own = {id(source): source for source in map(_own_source, model.modules()) if source is not None}
        self.sources = [(source, source.position()) for source in own.values()]
        self.states: list[tuple[torch.Generator, Tensor]] = []

    def begin(self, model: nn.Module, args: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.depth += 1
        if self.depth > 1:  # the model calls itself
            return
        self.count += 1
        for generator in _default_generators():
            self.states.append((generator, generator.get_state()))
            generator.manual_seed(self.seed)
        for source, position in self.sources:
            source.move_to(position)

    def end(self, model: nn.Module, args: Any, result: Any) -> None:
        if threading.get_ident() == self.thread and self.depth:
            self.depth -= 1
            if not self.depth:
                self.close()

    def close(self) -> None:
        """Also after a pass that an exception ended without a call of `end`."""
        while self.states:
            generator, state = self.states.pop()
            generator.set_state(state)


def _own_source(module: nn.Module) -> OwnSource | None:
    return module.own_source if isinstance(module, Rated) else None


def _default_generators() -> list[torch.Generator]:
    on_gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *on_gpus]


def multi_sample(head: Callable[[Tensor], Tensor], x: Tensor, samples: int) -> Tensor:
    """Returns what a head gives for x under several dropout masks, stacked along a new first axis.

    This is multi-sample dropout: the layers before the head run once, and the loss is the mean over the samples. The
    head is called once, on a batch that repeats x, so it is one matrix product for all samples.

    Parameters
    ----------
    head : callable
        Drops and returns a Tensor with x's samples on its first axis, such as ``nn.Sequential(Dropout(0.5), Linear(8,
        2))``. Its masks must be drawn for each sample of the batch. Batch normalisation in it sees x several times.
    x : Tensor, ``(N, *)``
    samples : int
        How many masks, 1 or more.

    Returns
    -------
    Tensor ``(samples, N, *)``

    Raises
    ------
    ValueError
        For samples below 1, x without axes, and a head that returns another number of samples.
    TypeError
        For arguments of another type.

    Notes
    -----
    Source: Inoue, "Multi-sample dropout for accelerated training and better generalization", 2019.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> head = torch.nn.Sequential(fdt.Dropout(0.5), torch.nn.Linear(8, 2))
    >>> fdt.multi_sample(head, torch.randn(16, 8), 4).shape
    torch.Size([4, 16, 2])
    """
    checks.function("head", head)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, but got {type(x).__name__}")
    checks.at_least("x", x.dim(), 1, "an axis of samples")
    checks.number_from("samples", checks.integer("samples", samples), 1)
    y = head(x.expand(samples, *x.shape).flatten(0, 1))
    if not isinstance(y, Tensor):
        raise TypeError(f"head must return a Tensor, but got {type(y).__name__}")
    if not y.dim() or y.shape[0] != samples * x.shape[0]:
        raise ValueError(
            f"head must return as many samples as it gets, {samples * x.shape[0]}, but got shape {tuple(y.shape)}"
        )
    stacked: Tensor = y.unflatten(0, (samples, x.shape[0]))
    return stacked

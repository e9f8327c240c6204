"""Samples of a model under dropout, many to a pass.

This module owns how samples are put into passes. That a sample is the same in whatever pass it runs is
`_random.SampleSeeds`'s doing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map_only

from . import _random
from .override import enabled

__all__ = ["passes"]

PASS_BYTES = 256 << 20  # of activations, in a pass of several samples
STATISTICS_BYTES = 3 * 8  # for each element of the output: in float64, less what is common, and squared


def passes(
    model: nn.Module, arguments: tuple[Any, ...], samples: int, seed: int, batch: int | None
) -> Generator[Tensor, None, None]:
    """A model's samples, stacked, as they come out of each pass: first one, then as many as ``batch`` says or fit.

    Close it, and torch's generators are as they were.
    """
    sampler, modules = _Sampler(model, arguments, seed), list(model.modules())
    with contextlib.ExitStack() as stack:
        stack.enter_context(sampler.at_work())
        with _output_bytes(modules) as sizes:
            y, foreign = sampler.first()
        if foreign:
            stack.enter_context(enabled())
            y, foreign = sampler.first()
        if not isinstance(y, Tensor) or y.is_complex():
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"model must return a Tensor of real numbers, but got {got}")
        if foreign or any(isinstance(module, nn.RNNBase) and module.training for module in modules):
            batch = 1  # in a pass of several, what isn't fastdrop's may be drawn once for all
        elif batch is None and any(isinstance(module, torch.jit.ScriptModule) for module in modules):
            batch = 1  # what is inside can't be measured
        elif batch is None:
            batch = max(PASS_BYTES // (sum(sizes) + STATISTICS_BYTES * y.numel() + 1), 1)
        yield y[None]
        del y
        done = 1
        while done < samples:
            # The last runs alone: what a model puts where nobody looks, in a hook's dict, is then no tensor of a map.
            count = max(min(batch, samples - done - 1), 1)
            try:
                chunk = sampler.many(done, count) if count > 1 else sampler.one(done)[None]
            except Exception:
                if count == 1:
                    raise
                batch = 1  # one sample did run: what failed is the map
                continue
            done += count
            yield chunk


class _Sampler:
    """Runs samples of a model, one to a pass or many."""

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...], seed: int) -> None:
        self.model, self.arguments, self.seeds = model, arguments, _random.SampleSeeds(seed)
        self.generators = [torch.default_generator, *torch.cuda.default_generators]  # none before CUDA is in use

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        before = self._states()
        try:
            with _random.taken_from(self.seeds):
                yield
        finally:
            for generator, state in zip(self.generators, before, strict=True):
                generator.set_state(state)

    def one(self, sample: int) -> Any:
        self._begin(sample)
        return self.model(*self._copies())

    def many(self, first: int, count: int) -> Tensor:
        """Samples from ``first`` on, stacked."""
        self.seeds.begin(first, count)
        arguments = self._copies()
        with _left_alone(self.model):
            y: Tensor = vmap(lambda _: self.model(*arguments), randomness="different")(torch.empty(count))
        return y

    def first(self) -> tuple[Any, bool]:
        """Sample 0, and whether anything but fastdrop's dropout was drawn for it."""
        y = self.one(0)
        after = self._states()
        self._begin(0)
        return y, not all(map(torch.equal, after, self._states()))

    def _copies(self) -> Any:
        """Arguments that a model may write to."""
        return tree_map_only(Tensor, Tensor.clone, self.arguments)

    def _begin(self, sample: int) -> None:
        self.seeds.begin(sample)
        for generator in self.generators:
            generator.manual_seed(self.seeds.keys)

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Modules get back the attributes and buffers they had: a map's tensors are dead when it ends."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [(own, own.copy()) for module in modules for own in (vars(module), module._buffers)]
    try:
        yield
    finally:
        for own, had in before:
            for name in own.keys() - had.keys():
                del own[name]
            own.update(had)


@contextlib.contextmanager
def _output_bytes(modules: list[nn.Module]) -> Iterator[list[int]]:
    """Sizes of what innermost modules return."""
    sizes: list[int] = []

    def note(module: nn.Module, arguments: Any, output: Any) -> None:
        found = [output] if isinstance(output, Tensor) else tree_leaves(output)
        sizes.extend(x.nbytes for x in found if isinstance(x, Tensor))

    innermost = [module for module in modules if next(module.children(), None) is None]
    hooked = [module for module in innermost if not isinstance(module, torch.jit.ScriptModule)]  # which take no hooks
    handles = [module.register_forward_hook(note) for module in hooked]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()

"""Predictions under dropout: the mean of many, and how far they differ.

This module owns what `training` means to a sampled model, and the statistics; `_sampling` runs it.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .. import _checks
from . import _random
from ._rates import rate_name
from ._sampling import passes

__all__ = ["Prediction", "mc_dropout", "mc_predict"]

LONG = 5.0  # seconds from which on there is a progress bar
TASKS = ("regression", "classification")
OUTPUTS = ("logits", "probabilities")
FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)  # leave out what is inside unless in training themselves

Filter = Callable[[str, nn.Module], bool]


@contextlib.contextmanager
def mc_dropout(model: nn.Module, filter: Filter | None = None) -> Iterator[None]:
    """Turns on a model's dropout, and nothing else, for a block or, as a decorator, a function.

    Into training mode go fastdrop's and torch's dropout modules, `torch.nn.MultiheadAttention` and recurrent layers
    built with dropout, timm's and torchvision's by name, and transformer encoders around them, which would run fused,
    without dropout, and do nothing else in it. All others, batch normalisation above all, stay as they are: call
    ``model.eval()`` first. At the end, errors or not, each module's mode is what it was. Blocks may be nested.

    Parameters
    ----------
    model : Module
    filter : callable of (path, module) that returns bool, optional
        Picks the modules in place of the above, from all there are: fewer, or further ones, such as those that pass
        their ``training`` to `torch.nn.functional.dropout`. Batch and instance normalisation are never turned on.

    Raises TypeError for a filter that can't be called.

    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), fdt.Dropout(0.5)).eval()
    >>> with fdt.mc_dropout(model):
    ...     print([module.training for module in model])
    [False, True]
    >>> [module.training for module in model]
    [False, False]
    """
    modules = list(model.modules())
    if filter is None:
        chosen = {module for module in modules if rate_name(module) is not None}
    else:
        _checks.function("filter", filter)
        named = model.named_modules(remove_duplicate=False)
        chosen = {module for path, module in named if not isinstance(module, _NormBase) and filter(path, module)}
    for encoder in [module for module in modules if isinstance(module, FUSED)]:
        if not chosen.isdisjoint(encoder.modules()):
            chosen.update(module for module in encoder.modules() if isinstance(module, FUSED))
    with _in_mode(chosen, True):
        yield


@contextlib.contextmanager
def _in_mode(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    changed = [module for module in modules if module.training != training]
    try:
        for module in changed:
            module.training = training
        yield
    finally:
        for module in changed:
            module.training = not training


@contextlib.contextmanager
def _out_of_place(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What is the same for all samples of a pass can't be written to by each."""
    scripted = torch.jit.ScriptModule
    changed: list[Any] = [m for m in modules if not isinstance(m, scripted) and getattr(m, "inplace", None) is True]
    try:
        for module in changed:
            module.inplace = False
        yield
    finally:
        for module in changed:
            module.inplace = True


@dataclass(frozen=True, eq=False)
class Prediction:
    """What `mc_predict` finds, in the output's dtype or, for lower precision, float32.

    Attributes
    ----------
    mean, std : Tensor
        Of the model's output or, for classification, of its probabilities. The standard deviation is the unbiased one,
        over n - 1, as `torch.std` has it: NaN for one sample.
    entropy : Tensor or None
        Classification: of the mean probabilities, in nats, without the axis of classes. All that is uncertain.
    mutual_information : Tensor or None
        Classification: entropy less the mean of the samples' entropies, 0 or more. What the model doesn't know: high
        where the samples disagree, low where all say that the data is ambiguous.
    samples : Tensor or None
        If asked for, what mean and std are of; samples come first.
    """

    mean: Tensor
    std: Tensor
    entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    samples: Tensor | None = None


def mc_predict(
    model: nn.Module,
    x: Any,
    samples: int = 50,
    *,
    seed: int | None = None,
    batch: int | None = None,
    task: str = "regression",
    keep_samples: bool = False,
    class_axis: int = -1,
    outputs: str = "logits",
    filter: Filter | None = None,
    progress: bool | None = None,
) -> Prediction:
    """Statistics of a model's predictions over many dropout masks: Monte Carlo dropout.

    The model runs in evaluation but for its dropout, without gradients. Many samples go through in a pass by
    `torch.func.vmap`, what comes before the first dropout once for all of them, and are added up as they come: memory
    holds one pass. Samples of a model that can't be mapped run one by one. Modes and torch's generators are restored;
    x stays as it is: the model gets copies, and dropout modules return new tensors, whatever their ``inplace``.

    The k-th dropout of sample s has a seed made of ``seed``, s and k alone: the result is the same, up to rounding, for
    any ``batch``. This holds for fastdrop's dropout. If a model draws anything else, it runs inside of `enabled`, which
    makes torch's dropout fastdrop's but empties the caches of `torch.compile`, if that was used: `convert` such models,
    or `enable` for good. If it still does, samples run one by one, each with torch's generators at a seed of its own.

    Parameters
    ----------
    model : Module
        Returns one Tensor of real numbers.
    x
        The model's argument, a Tensor or any other; a tuple has several.
    samples : int
        How many, 1 or more.
    seed : int, optional
        0 to 2**64 - 1. Without it, a number from torch's generator.
    batch : int, optional
        Samples in a pass. Without it, as many as have 256 MiB of activations, judged by what the model's innermost
        modules return for the first.
    task : {"regression", "classification"}
        Of what the statistics are: the output as it is, or probabilities of classes.
    keep_samples : bool
        Returns all samples too.
    class_axis : int
        Classification: the output's axis of classes.
    outputs : {"logits", "probabilities"}
        Classification: what the model returns; probabilities are taken as they are.
    filter : callable of (path, module) that returns bool, optional
        As in `mc_dropout`.
    progress : bool, optional
        A bar on stderr, if tqdm is installed. Without it, on a terminal, where the samples will take seconds.

    Raises TypeError and ValueError for arguments other than these and for models that return something else,
    IndexError for a ``class_axis`` that the output lacks.

    Sources: Gal, Ghahramani, "Dropout as a Bayesian approximation", ICML 2016; for mutual information Gal, Islam,
    Ghahramani, "Deep Bayesian active learning with image data", ICML 2017.

    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(fdt.Dropout(0.5), torch.nn.Linear(100, 1, bias=False))
    >>> _ = torch.nn.init.ones_(model[1].weight)
    >>> prediction = fdt.mc_predict(model, torch.ones(1, 100), samples=2000, seed=0)  # 100 and (100 p / (1 - p)) ** 1/2
    >>> abs(prediction.mean.item() - 100) < 1, abs(prediction.std.item() - 10) < 0.5
    (True, True)
    """
    for name, value in ("samples", samples), ("batch", 1 if batch is None else batch):
        _checks.number_from(name, value, 1)
        _checks.uint64(name, value)
    _checks.choice("task", task, TASKS)
    _checks.choice("outputs", outputs, OUTPUTS)
    number = _random.draw(None) if seed is None else _checks.uint64("seed", seed)
    arguments = x if type(x) is tuple else (x,)
    moments, entropies = _Moments(), _Moments()

    with contextlib.ExitStack() as stack:
        for context in (_in_mode(model.modules(), False), mc_dropout(model, filter), torch.no_grad()):
            stack.enter_context(context)
        stack.enter_context(_out_of_place(module for module in model.modules() if module.training))
        chunks = stack.enter_context(contextlib.closing(passes(model, arguments, samples, number, batch)))
        started = time.perf_counter()
        first = next(chunks)
        advance = stack.enter_context(_bar(progress, samples, time.perf_counter() - started))
        dtype = torch.promote_types(first.dtype, torch.float32)
        kept = first.new_empty((samples, *first.shape[1:]), dtype=dtype) if keep_samples else None
        if task == "classification":
            first[0].size(class_axis)  # raises what torch raises
            class_axis %= first.dim() - 1
        for chunk in itertools.chain([first], chunks):
            if task == "classification":
                chunk = chunk.softmax(class_axis + 1, dtype=torch.float64) if outputs == "logits" else chunk.double()
                entropies.add(torch.special.entr(chunk).sum(class_axis + 1))
            if kept is not None:
                kept[moments.count :][: len(chunk)] = chunk
            moments.add(chunk)
            advance(len(chunk))

    mean, std = moments.result()
    if task == "regression":
        return Prediction(mean.to(dtype), std.to(dtype), samples=kept)
    entropy = torch.special.entr(mean).sum(class_axis)
    information = (entropy - entropies.result()[0]).clamp_(min=0.0)
    return Prediction(mean.to(dtype), std.to(dtype), entropy.to(dtype), information.to(dtype), kept)


class _Moments:
    """Mean and variance of what comes a few samples at a time, in float64.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    count = 0

    def add(self, samples: Tensor) -> None:
        samples = samples.double()
        if not self.count:  # the first is taken off throughout: what doesn't vary has a variance of exactly 0
            self.origin = samples[0].clone()
            self.mean = self.squares = torch.zeros_like(self.origin)
            self.count, samples = 1, samples[1:]
        if not len(samples):
            return
        samples = samples - self.origin
        count, total = len(samples), self.count + len(samples)
        mean = samples.mean(0)
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + (samples - mean).square_().sum(0) + delta.square_() * (self.count * count / total)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        variance = self.squares / (self.count - 1) if self.count > 1 else torch.full_like(self.squares, torch.nan)
        return self.origin + self.mean, variance.sqrt_()


@contextlib.contextmanager
def _bar(progress: bool | None, samples: int, seconds: float) -> Iterator[Callable[[int], Any]]:
    """What is told how many samples are done; ``seconds`` is what one takes."""
    tqdm = None
    if progress or (progress is None and samples * seconds > LONG and sys.stderr.isatty()):
        with contextlib.suppress(ImportError):
            tqdm = importlib.import_module("tqdm").tqdm
    if tqdm is None:
        yield lambda count: None
    else:
        with tqdm(total=samples, unit="sample") as bar:
            yield bar.update

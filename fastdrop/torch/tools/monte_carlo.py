"""Predictions under dropout: the mean of many, and how far they differ.

This module owns which modules of a sampled model drop, and the statistics; `sampling` runs it.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core import checks
from ..models.enable import register
from ..models.rates import rate_name
from ..runtime import context, seeds
from ..runtime.dispatch.modules import TorchNorm
from .gates import Gate, gate_of
from .sampling import passes

__all__ = ["Prediction", "mc_dropout", "mc_predict"]

LONG = 5.0  # seconds from which on there is a progress bar
TASKS = ("regression", "classification")
OUTPUTS = ("logits", "probabilities")
LISTED = 10  # modules in a warning
FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)  # leave out what is inside unless in training themselves

Filter = Callable[[str, nn.Module], bool]


@contextlib.contextmanager
def mc_dropout(model: nn.Module, filter: Filter | None = None) -> Iterator[None]:
    """Turns on a model's dropout, and nothing else, for a block or, as a decorator, a function.

    These modules are turned on:

    * the dropout modules of fastdrop and torch, and, known by name, those of timm and torchvision
    * `torch.nn.MultiheadAttention` and recurrent layers that were built with dropout
    * torch's transformer encoders that have any of these inside: in evaluation they would run fused, without dropout
    * modules that call dropout as a function, if the source of their class reads ``training`` for dropout alone, as in
      ``F.dropout(x, p, self.training)`` or ``dropout_p=self.p if self.training else 0.0``

    All others, batch normalisation above all, stay as they are: call ``model.eval()`` first.

    No module is written to. For the thread, or asyncio task, that runs the block, ``training`` of the modules above
    reads True; for others it is what it was. So one model may serve several threads at once. Blocks may be nested. A
    forward with checkpoints runs a second time in ``backward``: call ``backward`` inside of the block too.

    Parameters
    ----------
    model : Module
    filter : callable of (path, module) that returns bool, optional
        Picks the modules in place of the above, from all there are. Batch and instance normalisation are never turned
        on.

    Raises TypeError for a filter that can't be called. Warns of modules that read ``training`` for dropout and for
    something else, or call dropout and read ``training`` in a way that the source doesn't tell. They stay as they are
    unless a filter picks them.

    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), fdt.Dropout(0.5)).eval()
    >>> with fdt.mc_dropout(model):
    ...     print([module.training for module in model])
    [False, True]
    >>> [module.training for module in model]
    [False, False]
    """
    with context.appearing({(module, "training"): True for module in _chosen(model, filter, 4)}):
        yield


def _chosen(model: nn.Module, filter: Filter | None, stacklevel: int) -> set[nn.Module]:
    """The modules that are to drop."""
    modules = list(model.modules())
    if filter is None:
        chosen = {module for module in modules if rate_name(module) is not None or _gate(module) is Gate.DROPOUT}
        mixed = [path for path, module in model.named_modules() if module not in chosen and _gate(module) is Gate.MIXED]
        if mixed:
            warnings.warn(
                "these modules read training for dropout and for something else, or in a way that can't be told, and "
                f"stay as they are: {_listed(model, mixed)}; "
                "to turn them on give filter=, a function of path and module",
                stacklevel=stacklevel,
            )
    else:
        checks.function("filter", filter)
        named = model.named_modules(remove_duplicate=False)
        chosen = {module for path, module in named if not isinstance(module, TorchNorm) and filter(path, module)}
    for encoder in [module for module in modules if isinstance(module, FUSED)]:
        if not chosen.isdisjoint(encoder.modules()):
            chosen.update(module for module in encoder.modules() if isinstance(module, FUSED))
    if any(isinstance(module, torch.jit.ScriptModule) for module in chosen):
        register()  # scripted code keeps its mode out of reach, and asks the kernels
    return chosen


def _gate(module: nn.Module) -> Gate:
    norm = isinstance(module, TorchNorm | torch.jit.ScriptModule)
    return Gate.NOTHING if norm else gate_of(module)


def _listed(model: nn.Module, paths: list[str]) -> str:
    shown = [f"{path or 'the model'} ({type(model.get_submodule(path)).__name__})" for path in paths[:LISTED]]
    return ", ".join(shown) + (f" and {len(paths) - LISTED} more" if len(paths) > LISTED else "")


def _in_sampling(model: nn.Module, chosen: set[nn.Module]) -> dict[tuple[nn.Module, str], bool]:
    """What the attributes of a sampled model appear to be: dropout is on, out of place, and all else in evaluation."""
    appearances = {}
    for path, module in model.named_modules():
        if module in chosen:
            appearances[module, "training"] = True
            if not isinstance(module, torch.jit.ScriptModule) and getattr(module, "inplace", None) is True:
                appearances[module, "inplace"] = False  # what is the same for all samples of a pass
        elif module.training:
            if isinstance(module, torch.jit.ScriptModule) and '"training"' in str(getattr(module, "inlined_graph", "")):
                raise ValueError(f"{path or 'the model'} is scripted and in training: call model.eval() first")
            appearances[module, "training"] = False
    return appearances


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
    kwargs: Mapping[str, Any] | None = None,
    output: str | int | Callable[[Any], Any] | None = None,
    strict: bool = False,
) -> Prediction:
    """Statistics of a model's predictions over many dropout masks: Monte Carlo dropout.

    The model runs in evaluation but for its dropout, without gradients; `mc_dropout` says which modules drop. Many
    samples go through in a pass by `torch.func.vmap`, what comes before the first dropout once for all of them, and are
    added up as they come: memory holds one pass. Samples of a model that can't be mapped run one by one. No module is
    written to but by the model itself, and x stays as it is: the model gets copies, and dropout modules return new
    tensors, whatever their ``inplace``. So any number of threads may sample, the same model or others, and each gets
    what it would get alone.

    The k-th dropout of sample s has a seed made of ``seed``, s and k alone: the result is the same, up to rounding, for
    any ``batch``. This holds for fastdrop's dropout, and inside of another map or model that is sampled. If a model
    draws anything else, it runs inside of `enabled`, which makes torch's dropout fastdrop's for this thread. If it
    still does, samples run one by one, and torch's random operators draw from generators of the sample's own; torch's
    default generators are not used. (A few operators take no other. They get the default generator for one call each,
    with its state put back after it: a thread that draws from it in that moment disturbs them.)

    Parameters
    ----------
    model : Module
        Returns a Tensor of real numbers, or something that has one as ``logits``.
    x
        The model's argument, a Tensor or any other; a tuple has several, a dict those with names. (An argument that is
        itself a tuple or a dict goes into a tuple.)
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
    kwargs : dict, optional
        Arguments with names, beside those of x.
    output : str, int or callable, optional
        Which Tensor of what the model returns: a key or attribute, a place in a tuple, or a function of it.
    strict : bool
        If no random number was drawn when the model ran, the standard deviation is 0 everywhere: raises RuntimeError,
        where otherwise a warning says so.

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
        checks.number_from(name, value, 1)
        checks.uint64(name, value)
    checks.choice("task", task, TASKS)
    checks.choice("outputs", outputs, OUTPUTS)
    number = seeds.draw(None) if seed is None else checks.uint64("seed", seed)
    arguments, keywords = _inputs(x, kwargs)
    moments, entropies = _Moments(), _Moments()

    def without_draws() -> None:
        off = [
            path for path, module in model.named_modules() if module not in chosen and _gate(module) is not Gate.NOTHING
        ]
        hint = f"; these may drop if filter= picks them: {_listed(model, off)}" if off else ""
        message = f"nothing was dropped when the model ran, so its standard deviation is 0 everywhere{hint}"
        if strict:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=4)

    chosen = _chosen(model, filter, 3)
    run = passes(model, arguments, keywords, samples, number, batch, _taker(output), without_draws)
    with contextlib.ExitStack() as stack, context.appearing(_in_sampling(model, chosen)), context.without_gradients():
        chunks = stack.enter_context(contextlib.closing(run))
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


def _inputs(x: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments, by place and by name."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a dict, but got {type(kwargs).__name__}")
    keywords = dict(kwargs or {})
    if isinstance(x, Mapping):
        return (), {**x, **keywords}
    return x if type(x) is tuple else (x,), keywords


def _taker(output: Any) -> Callable[[Any], Any]:
    """What takes the Tensor out of what a model returns."""
    if output is None:
        return lambda y: y if isinstance(y, Tensor) or (logits := _part(y, "logits")) is None else logits
    if callable(output):
        return output  # type: ignore[no-any-return]
    if not isinstance(output, str | int):
        raise TypeError(f"output must be a str, an int or callable, but got {type(output).__name__}")

    def take(y: Any) -> Any:
        part = _part(y, output)
        if part is None:
            keys = f" with {', '.join(map(str, y))}" if isinstance(y, Mapping) else ""
            raise ValueError(
                f"output must be of what the model returns, a {type(y).__name__}{keys}, but got {output!r}"
            )
        return part

    return take


def _part(y: Any, name: str | int) -> Any:
    """What y has under a key, at an index or as an attribute; None if it has no such thing."""
    if isinstance(y, Mapping) and name in y:
        return y[name]
    if isinstance(name, str):
        return getattr(y, name, None)
    try:
        return y[name]
    except (TypeError, LookupError):
        return None


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
        samples = samples - mean
        squares = samples.mul_(samples).sum(0)  # not `square_`, which `vmap` doesn't know
        self.squares = self.squares + squares + delta * delta * (self.count * count / total)
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

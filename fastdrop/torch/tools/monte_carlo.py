"""Monte Carlo dropout: `mc_dropout` turns on a model's dropout only, `mc_predict` computes statistics of many samples.

This module decides which modules of a model drop, and computes mean, deviation, entropy and mutual information. The
samples come from `sampling`.
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

from ...arrays.signatures import MaybeNone
from ...core import checks
from ..models.enable import register
from ..models.rates import rate_name
from ..models.source.gates import Gate, gate_of
from ..runtime import context, seeds
from ..runtime.dispatch.modules import TorchNorm
from .sampling import passes

__all__ = ["Prediction", "inputs_of", "mc_dropout", "mc_predict"]

LONG = 5.0  # seconds; longer runs have a progress bar
TASKS = ("regression", "classification")
OUTPUTS = ("logits", "probabilities")
LISTED = 10  # modules in a warning
FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)  # don't call the modules inside while in evaluation

Filter = Callable[[str, nn.Module], bool]


@contextlib.contextmanager
def mc_dropout(model: nn.Module, filter: Filter | None = None) -> Iterator[None]:
    """Turns on a model's dropout, and nothing else, for a block or, as a decorator, for a function.

    It turns on these modules:

    * the dropout modules of fastdrop and torch, and those of timm and torchvision, which it recognises by name
    * `torch.nn.MultiheadAttention` and recurrent layers that were built with dropout
    * torch's transformer encoders that have any of these inside, because in evaluation they run fused and never drop
    * modules that call dropout as a function, if the source of their class reads ``training`` for dropout alone, as in
      ``F.dropout(x, p, self.training)`` or ``dropout_p=self.p if self.training else 0.0``

    All other modules stay as they are, batch normalisation above all. So call ``model.eval()`` first.

    No attribute is changed. ``training`` of the modules above reads True in the thread or asyncio task that runs the
    block, and what it was in all others. So one model may serve several threads at once. Blocks may be nested. A
    forward with checkpoints runs a second time in ``backward``, so call ``backward`` inside the block too.

    Parameters
    ----------
    model : Module
    filter : callable of (path, module) that returns bool, optional
        Picks the modules in place of the list above, from all modules of the model. Batch and instance normalisation
        are never turned on.

    Returns
    -------
    context manager, and decorator

    Raises
    ------
    TypeError
        For a filter that can't be called. Warns of modules that read ``training`` for dropout and for something else,
        and of modules that call dropout if their source doesn't tell what they read ``training`` for. These stay as
        they are unless a filter picks them.

    Examples
    --------
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
    """The modules to turn on. Warns of those that can't be turned on without changing more than dropout."""
    modules = list(model.modules())
    if filter is None:
        chosen = {module for module in modules if rate_name(module) is not None or _gate(module) is Gate.DROPOUT}
        mixed = [path for path, module in model.named_modules() if module not in chosen and _gate(module) is Gate.MIXED]
        if mixed:
            warnings.warn(
                "these modules read training for dropout and for something else, or the source does not tell for what, "
                f"and stay as they are: {_list_paths(model, mixed)}; "
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
        register()  # the mode of scripted code is out of reach; the registered kernels decide
    return chosen


def _gate(module: nn.Module) -> Gate:
    norm = isinstance(module, TorchNorm | torch.jit.ScriptModule)
    return Gate.NOTHING if norm else gate_of(module)


def _list_paths(model: nn.Module, paths: list[str]) -> str:
    shown = [f"{path or 'the model'} ({type(model.get_submodule(path)).__name__})" for path in paths[:LISTED]]
    return ", ".join(shown) + (f" and {len(paths) - LISTED} more" if len(paths) > LISTED else "")


def _in_sampling(model: nn.Module, chosen: set[nn.Module]) -> dict[tuple[nn.Module, str], bool]:
    """What attributes read as while a model is sampled: dropout is on and out of place, the rest in evaluation."""
    appearances = {}
    for path, module in model.named_modules():
        if module in chosen:
            appearances[module, "training"] = True
            if not isinstance(module, torch.jit.ScriptModule) and getattr(module, "inplace", None) is True:
                appearances[module, "inplace"] = False  # the input may be the same tensor for all samples of a pass
        elif module.training:
            if isinstance(module, torch.jit.ScriptModule) and '"training"' in str(getattr(module, "inlined_graph", "")):
                raise ValueError(f"{path or 'the model'} is scripted and in training: call model.eval() first")
            appearances[module, "training"] = False
    return appearances


@dataclass(frozen=True, eq=False)
class Prediction:
    """The result of `mc_predict`, in the output's dtype, or in float32 if that has lower precision.

    Attributes
    ----------
    mean, std : Tensor
        Mean and standard deviation of the model's output or, for classification, of its probabilities. The standard
        deviation divides by n - 1, the same as `torch.std`, so it is NaN for one sample.
    entropy : Tensor or None
        Classification: the entropy of the mean probabilities in nats, without the axis of classes. It measures the
        whole uncertainty.
    mutual_information : Tensor or None
        Classification: entropy less the mean of the samples' entropies, 0 or more. It measures what the model doesn't
        know: it is high if the samples disagree, and low if they agree that the data is ambiguous.
    samples : Tensor or None
        All samples along the first axis, if ``keep_samples``.
    """

    mean: Tensor
    std: Tensor
    entropy: Tensor | MaybeNone = None  # the caller's arguments decide
    mutual_information: Tensor | MaybeNone = None
    samples: Tensor | MaybeNone = None


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
    """Runs a model with many dropout masks and returns statistics of its predictions: Monte Carlo dropout.

    The model runs without gradients and in evaluation, except for its dropout; `mc_dropout` says which modules drop.
    `torch.func.vmap` runs many samples in one pass, and computes everything before the first dropout once for all of
    them. The statistics are updated after each pass, so memory holds the samples of one pass only. If a model can't be
    mapped, its samples run one by one.

    Only the model itself writes to its modules, and x stays as it is: the model gets copies, and dropout modules return
    new tensors, whatever their ``inplace``. So several threads may sample the same model at once.

    The k-th dropout of sample s has a seed that depends on ``seed``, s and k only. So the result is the same, up to
    rounding, for any ``batch``. This holds for fastdrop's dropout, also inside another map or another sampled model. If
    a model draws other random numbers, it runs inside `enabled`, which makes torch's dropout fastdrop's for this
    thread. If it still draws others, samples run one by one, and torch's random operators draw from generators of the
    sample. torch's default generators stay unused, except for a few operators that take no other: these get the
    default generator for one call, and its state is restored afterwards. A thread that draws from it in that moment
    changes their numbers.

    Parameters
    ----------
    model : Module
        Returns a Tensor of real numbers, or something that has one as ``logits``.
    x : Tensor or whatever the model accepts
        The model's argument, a Tensor or anything else. A tuple has several arguments, a dict has arguments with names.
        (Put an argument that is itself a tuple or a dict into a tuple.)
    samples : int
        How many, 1 or more.
    seed : int, optional
        0 to 2**64 - 1. By default a number from torch's generator.
    batch : int, optional
        Samples in a pass. By default as many as have 256 MiB of activations, estimated from the first sample.
    task : {"regression", "classification"}
        Whether the statistics are of the output as it is, or of probabilities of classes.
    keep_samples : bool
        Whether to return all samples too.
    class_axis : int
        Classification: the output's axis of classes.
    outputs : {"logits", "probabilities"}
        Classification: what the model returns. Logits go through softmax, probabilities stay as they are.
    filter : callable of (path, module) that returns bool, optional
        As in `mc_dropout`.
    progress : bool, optional
        Whether to show a bar on stderr, if tqdm is installed. By default it is shown on a terminal, if the samples will
        take more than 5 seconds.
    kwargs : dict, optional
        Arguments with names, in addition to those of x.
    output : str, int or callable, optional
        How to take the Tensor from what the model returns: a key or attribute, a position in a tuple, or a function.
    strict : bool
        Raises RuntimeError if the model drew no random number, because the standard deviation is 0 everywhere then.
        Otherwise a warning says so.

    Returns
    -------
    Prediction

    Raises
    ------
    TypeError, ValueError
        For arguments and for outputs of the model that are not as above, and IndexError for a ``class_axis`` that the
        output lacks.

    Notes
    -----
    Sources: Gal, Ghahramani, "Dropout as a Bayesian approximation", ICML 2016; for mutual information Gal, Islam,
    Ghahramani, "Deep Bayesian active learning with image data", ICML 2017.

    Examples
    --------
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
    first_seed = seeds.next_seed(None) if seed is None else checks.uint64("seed", seed)
    arguments, keywords = inputs_of(x, kwargs)
    moments, entropies = _Moments(), _Moments()

    def without_draws() -> None:
        off = [
            path for path, module in model.named_modules() if module not in chosen and _gate(module) is not Gate.NOTHING
        ]
        hint = f"; these may drop if filter= picks them: {_list_paths(model, off)}" if off else ""
        message = f"nothing was dropped when the model ran, so the standard deviation is 0 everywhere{hint}"
        if strict:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=4)

    chosen = _chosen(model, filter, 3)
    run = passes(model, arguments, keywords, samples, first_seed, batch, _output_selector(output), without_draws)
    with contextlib.ExitStack() as stack, context.appearing(_in_sampling(model, chosen)), context.without_gradients():
        chunks = stack.enter_context(contextlib.closing(run))
        started = time.perf_counter()
        first = next(chunks)
        advance = stack.enter_context(_bar(progress, samples, time.perf_counter() - started))
        dtype = torch.promote_types(first.dtype, torch.float32)
        kept_samples = first.new_empty((samples, *first.shape[1:]), dtype=dtype) if keep_samples else None
        if task == "classification":
            first[0].size(class_axis)  # raises what torch raises
            class_axis %= first.dim() - 1
        for chunk in itertools.chain([first], chunks):
            if task == "classification":
                chunk = chunk.softmax(class_axis + 1, dtype=torch.float64) if outputs == "logits" else chunk.double()
                entropies.add(torch.special.entr(chunk).sum(class_axis + 1))
            if kept_samples is not None:
                kept_samples[moments.count :][: len(chunk)] = chunk
            moments.add(chunk)
            advance(len(chunk))

    mean, std = moments.result()
    if task == "regression":
        return Prediction(mean.to(dtype), std.to(dtype), samples=kept_samples)
    entropy = torch.special.entr(mean).sum(class_axis)
    information = (entropy - entropies.result()[0]).clamp_(min=0.0)
    return Prediction(mean.to(dtype), std.to(dtype), entropy.to(dtype), information.to(dtype), kept_samples)


def inputs_of(x: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments, by place and by name."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a dict, but got {type(kwargs).__name__}")
    keywords = dict(kwargs or {})
    if isinstance(x, Mapping):
        return (), {**x, **keywords}
    return x if type(x) is tuple else (x,), keywords


def _output_selector(output: Any) -> Callable[[Any], Any]:
    """A function that takes the Tensor out of what a model returns."""
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
    """The part of y under a key, at an index or in an attribute; None if there is none."""
    if isinstance(y, Mapping) and name in y:
        return y[name]
    if isinstance(name, str):
        return getattr(y, name, None)
    try:
        return y[name]
    except (TypeError, LookupError):
        return None


class _Moments:
    """Mean and variance, in float64, of samples that are added a few at a time.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    count = 0

    def add(self, samples: Tensor) -> None:
        samples = samples.double()
        if not self.count:  # subtracted from all samples, so that the variance of equal samples is exactly 0
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
    """A function to call with the number of samples done. ``seconds`` is the time that one sample takes."""
    tqdm = None
    if progress or (progress is None and samples * seconds > LONG and sys.stderr.isatty()):
        with contextlib.suppress(ImportError):
            tqdm = importlib.import_module("tqdm").tqdm
    if tqdm is None:
        yield lambda count: None
    else:
        with tqdm(total=samples, unit="sample") as bar:
            yield bar.update

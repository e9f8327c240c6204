"""The pitfalls of dropout that `audit` looks for: `PITFALLS` has one entry for each.

A pitfall is a function that yields paths of modules and a sentence for each, with a severity, a reason and a remedy. To
add one, write such a function over `Subject` and add it to `PITFALLS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.nn.parameter import is_lazy

from ..models.drop_path import is_drop_path
from ..models.rates import number, rate_name
from ..nn.base import RATE_TENSOR
from .graph import LayerGraph, Step, backward, forward

__all__ = ["PITFALLS", "Pitfall", "Subject"]

HIGH_RATE = 0.7  # above it the training error rises: Srivastava et al. 2014, figure 9
FEW_SAMPLES = 1000  # below it dropout gained nothing: same paper, figure 10
FEW_PARAMETERS = 5000  # a judgement: a 64-64-10 network for digits of 8 by 8 pixels has 4,810
FEW_UNITS = 16  # a judgement

# What is dropped together, by the name of a function, of a module's class or of the first base class that is here.
GRANULARITIES = {
    "elements": "Dropout GaussianDropout dropout dropout_ gaussian_dropout",
    "elements, alpha": "AlphaDropout alpha_dropout alpha_dropout_",
    "features": "Dropout1d Dropout2d Dropout3d dropout1d dropout2d dropout3d feature_dropout feature_dropout_",
    "features, alpha": "FeatureAlphaDropout feature_alpha_dropout feature_alpha_dropout_",
    "held over time": "VariationalDropout variational_dropout",
    "units": "BatchwiseDropout",
    "blocks": "DropBlock2d DropBlock3d drop_block2d drop_block3d",
    "samples": "StochasticDepth DropPath SkipResidual stochastic_depth skip_residual",
    "layers": "LayerDrop",
    "attention": "MultiheadAttention scaled_dot_product_attention",
}
GRANULARITY_OF = {name: granularity for granularity, names in GRANULARITIES.items() for name in names.split()}
CHANGES_VARIANCE = ("elements", "features", "blocks", "held over time", "units")
OF_ELEMENTS = ("elements", "elements, alpha")
OF_FEATURES = ("features", "features, alpha")
PASSES_SHIFT = {"pointwise", "pooling", "shape", "join"}  # kinds of steps whose output has the changed variance too


@dataclass(frozen=True)
class DropSite:
    """A place where a model drops: a module, or a call of a function."""

    path: str
    label: str
    granularity: str
    p: float
    module: nn.Module | None
    on: bool  # whether it drops while the model is in evaluation mode


@dataclass
class Subject:
    """What the pitfalls look at: a model, the order of its layers, and how many samples there are to train on."""

    model: nn.Module
    graph: LayerGraph
    samples: int | None

    @cached_property
    def drops(self) -> list[DropSite]:
        modules = []
        for path, module in self.model.named_modules():
            step = Step(path, type(module).__name__, module)
            p = _rate(step)
            if p is not None:
                on = module.training and not self.model.training
                modules.append(DropSite(path, _label(step), _granularity(step), p, module, on))
        calls = []
        for step in self.graph.steps:
            p, on = _called_with(step)
            if p is not None:
                calls.append(DropSite(step.path, _label(step), GRANULARITY_OF[step.name], p, None, on))
        return modules + calls

    def dropped(self, *granularities: str) -> Iterator[Step]:
        """The steps that drop with one of the granularities."""
        for step in self.graph.steps:
            if step.kind == "dropout" and _granularity(step) in granularities and _rate(step):
                yield step


def _granularity(step: Step) -> str:
    if step.module is not None:
        named = next(
            (GRANULARITY_OF[cls.__name__] for cls in type(step.module).__mro__ if cls.__name__ in GRANULARITY_OF), ""
        )
        return named or ("samples" if rate_name(step.module) == "drop_prob" and is_drop_path(type(step.module)) else "")
    return GRANULARITY_OF.get(step.name, "") if step.kwargs.get("noise_shape") is None else ""


def _called_with(step: Step) -> tuple[float | None, bool]:
    """p of a call of a function that drops, and whether it drops in evaluation; None for p if it is no such call."""
    if step.module is not None or step.name not in GRANULARITY_OF:
        return None, False
    if step.name == "scaled_dot_product_attention":
        p = step.kwargs.get("dropout_p", step.args[4] if len(step.args) > 4 else 0.0)
        on = step.kwargs.get("training", True) is True  # torch's has no such argument
        return (float(p), on) if isinstance(p, int | float) and p else (None, False)
    try:
        bound = inspect.signature(step.function).bind(*step.args, **step.kwargs)
        bound.apply_defaults()
        given = bound.arguments
    except (TypeError, ValueError):  # torch's own builtins have no signature
        given = dict(zip(("input", "p", "training"), step.args, strict=False)) | step.kwargs
    p, training = given.get("p"), given.get("training", given.get("train"))
    return float(p) if isinstance(p, int | float) else None, training is True


def _rate(step: Step) -> float | None:
    """p of a module or function that drops; None for any other."""
    if step.module is None:
        return _called_with(step)[0]
    name = rate_name(step.module)
    return None if name is None else number(step.module, name)


def _label(step: Step) -> str:
    """A module or function with its rate, such as "Dropout(p=0.5)"."""
    if step.module is not None:
        name = rate_name(step.module)
    else:
        name = "dropout_p" if step.name == "scaled_dot_product_attention" else "p"
    return f"{step.name}({name}={_rate(step):g})"


def _place(step: Step) -> str:
    """A step for a sentence: the path of a module, or a function and where it is called."""
    return step.path or step.name if step.module is not None else f"{step.name} in {step.path or 'the model'}"


# ---- functions that find pitfalls: each yields the path of a module, and a sentence ----

Found = Iterator[tuple[str, str]]


def _left_on(subject: Subject) -> Found:
    for drop in subject.drops:
        if drop.on and drop.p > 0.0:
            where = (
                "is in training mode while the model is in evaluation mode" if drop.module else "drops in evaluation"
            )
            yield drop.path, f"{drop.label} {where}"


def _everything(subject: Subject) -> Found:
    yield from ((drop.path, f"{drop.label} drops everything") for drop in subject.drops if drop.p >= 1.0)


def _high_rate(subject: Subject) -> Found:
    for drop in subject.drops:
        if HIGH_RATE < drop.p < 1.0:
            yield drop.path, f"{drop.label} drops more than {HIGH_RATE:g}"


def _nothing(subject: Subject) -> Found:
    for drop in subject.drops:
        if drop.p > 0.0 or drop.module is None:
            continue
        # A rate of 0 may be meant: stochastic depth begins with 0 in the first layer, a schedule may begin with it, and
        # a variational layer need not use all of its three rates.
        is_meant = drop.granularity == "samples" or getattr(drop.module, RATE_TENSOR, None) is not None
        holder = subject.model.get_submodule(drop.path.rpartition(".")[0])
        if not is_meant and not isinstance(holder, nn.RNNBase):
            yield drop.path, f"{drop.label} drops nothing"


def _output(subject: Subject) -> Found:
    outputs = {id(step) for step in subject.graph.outputs}
    for step in subject.dropped(*OF_ELEMENTS, *OF_FEATURES):
        after = [step, *forward(step, {"pointwise", "shape"})]
        if any(id(end) in outputs for end in after) and all(end.kind in ("pointwise", "shape") for end in after[1:]):
            yield step.path, f"{_label(step)} is applied to the model's output"


def _after_convolution(subject: Subject) -> Found:
    for step in subject.dropped(*OF_ELEMENTS):
        before = backward(step, {"pointwise", "pooling", "join", "norm", "batch norm"})
        convolution = next((source for source, _ in before if source.kind == "convolution"), None)
        if convolution:
            yield step.path, f"{_label(step)} comes straight after the convolution {_place(convolution)}"


def _before_batch_norm(subject: Subject) -> Found:
    for step in subject.dropped(*CHANGES_VARIANCE):
        norm = _batch_norm(step, PASSES_SHIFT)
        if norm:
            yield step.path, f"{_label(step)} comes straight before the batch normalisation {_place(norm)}"


def _before_batch_norm_of_next(subject: Subject) -> Found:
    for step in subject.dropped(*CHANGES_VARIANCE):
        norm = _batch_norm(step, PASSES_SHIFT | {"linear", "convolution"})
        if norm and not _batch_norm(step, PASSES_SHIFT):
            yield step.path, f"{_label(step)} comes one layer before the batch normalisation {_place(norm)}"


def _batch_norm(step: Step, through: set[str]) -> Step | None:
    """The nearest batch normalisation that uses running statistics in evaluation."""
    reached = (user for user in forward(step, through) if user.kind == "batch norm")
    return next((user for user in reached if getattr(user.module, "track_running_stats", True)), None)


def _recurrent_connection(subject: Subject) -> Found:
    between = {"pointwise", "norm", "shape"}
    for step in subject.dropped(*OF_ELEMENTS):
        feeds = {id(user.module) for user in forward(step, between) if user.kind == "recurrent"}
        for source, _ in backward(step, between):
            if source.kind == "recurrent" and id(source.module) in feeds:
                yield step.path, f"{_label(step)} is on the recurrent connection of {_place(source)}"


def _between_layers(subject: Subject) -> Found:
    for drop in subject.drops:
        if isinstance(drop.module, nn.RNNBase):
            yield drop.path, f"{drop.label} draws a new mask at each time step between its layers"


def _beside_recurrent(subject: Subject) -> Found:
    for step in subject.dropped(*OF_ELEMENTS):
        for source, result in backward(step, {"pointwise", "norm"}):
            if isinstance(source.module, nn.RNNBase) and result == 0:
                yield step.path, f"{_label(step)} draws a new mask at each time step of the output of {_place(source)}"
        for user in forward(step, {"pointwise", "norm"}):
            if isinstance(user.module, nn.RNNBase):
                yield step.path, f"{_label(step)} draws a new mask at each time step of the input of {_place(user)}"


def _one_layer(subject: Subject) -> Found:
    for path, module in subject.model.named_modules():
        if isinstance(module, nn.RNNBase) and module.num_layers == 1 and (number(module, "dropout") or 0.0) > 0.0:
            yield path, f"{type(module).__name__}(dropout={module.dropout:g}) has one layer and drops nothing"


def _small_network(subject: Subject) -> Found:
    parameters = list(subject.model.parameters())
    if subject.drops and parameters and not any(map(is_lazy, parameters)):
        size = sum(parameter.numel() for parameter in parameters)
        if size < FEW_PARAMETERS:
            yield "", f"dropout in a network of {size:,} parameters"


def _narrow_layer(subject: Subject) -> Found:
    for step in subject.dropped(*OF_ELEMENTS, *OF_FEATURES):
        for source, _ in backward(step, {"pointwise", "norm", "batch norm"}):
            units = _units(source, _granularity(step) in OF_FEATURES)
            if units is not None and 0 < units <= FEW_UNITS:
                yield step.path, f"{_label(step)} drops among the {units} units of {_place(source)}"


def _units(step: Step, of_channels: bool) -> int | None:
    names = {"linear": "out_features", "recurrent": "hidden_size", "embedding": "embedding_dim"}
    if of_channels:
        names = {"convolution": "out_channels"}
    units = getattr(step.module, names.get(step.kind, ""), None)
    return units if isinstance(units, int) else None


def _few_samples(subject: Subject) -> Found:
    if subject.drops and subject.samples is not None and subject.samples < FEW_SAMPLES:
        yield "", f"dropout for {subject.samples:g} samples"


@dataclass(frozen=True)
class Pitfall:
    find: Callable[[Subject], Found]
    severity: str
    why: str
    remedy: str


PITFALLS = {
    "left on": Pitfall(
        _left_on,
        "error",
        "predictions are random, and worse than without dropout",
        "call model.eval() for the whole model; give functions training=self.training, or dropout_p=0.0 unless "
        "self.training; for Monte Carlo dropout use fdt.mc_dropout, which turns dropout on for a while",
    ),
    "drops everything": Pitfall(
        _everything, "error", "its output is 0 in training, and nothing before it learns", "use a p from 0.1 to 0.5"
    ),
    "on the output": Pitfall(
        _output,
        "warning",
        "in training the predictions themselves are set to 0 or scaled, so the loss has noise that no weight can "
        "average out",
        "move it before the last layer",
    ),
    "high rate": Pitfall(
        _high_rate,
        "warning",
        "so little is kept that most networks underfit (Srivastava et al. 2014, section 7.3)",
        "use a p from 0.2 to 0.5 for hidden units, 0.1 in transformers, 0.1 to 0.3 for channels",
    ),
    "after a convolution": Pitfall(
        _after_convolution,
        "warning",
        "neighbouring pixels are nearly equal, so the network finds a dropped value beside it, and dropout regularises "
        "little (Tompson et al. 2015; Ghiasi et al. 2018)",
        "use Dropout2d (1d, 3d), which drops whole channels, or DropBlock2d, which drops blocks",
    ),
    "before batch normalisation": Pitfall(
        _before_batch_norm,
        "warning",
        "dropout changes the variance in training only, so the running variance that evaluation uses is "
        "wrong (Li et al. 2019)",
        "move it after the last batch normalisation",
    ),
    "before the next layer's batch normalisation": Pitfall(
        _before_batch_norm_of_next,
        "note",
        "dropout changes the variance in training only, so the running variance that evaluation uses is "
        "wrong, the less the smaller p is (Li et al. 2019)",
        "move it after the last batch normalisation, or compare with and without",
    ),
    "on a recurrent connection": Pitfall(
        _recurrent_connection,
        "warning",
        "a new mask at each time step erases, step by step, what the state remembers (Gal & Ghahramani 2016)",
        "use one mask for the whole sequence: fdt.VariationalLSTM or VariationalGRU",
    ),
    "one layer": Pitfall(
        _one_layer,
        "warning",
        "torch drops between recurrent layers: after each one but the last",
        "use two layers, or a dropout module after it, or fdt.VariationalLSTM with recurrent and output masks",
    ),
    "small network": Pitfall(
        _small_network,
        "warning",
        "a network this small tends to lack capacity rather than to overfit, and dropout takes capacity away",
        "compare with and without dropout; try a wider network, or weight decay in its place",
    ),
    "narrow layer": Pitfall(
        _narrow_layer,
        "warning",
        "each step keeps few units, at times none, and they can't replace the others",
        "use a wider layer (n / (1 - p) units if n are needed), a smaller p, or no dropout here",
    ),
    "few samples": Pitfall(
        _few_samples,
        "warning",
        "a network learns very little data by heart in spite of dropout, which then gains nothing (Srivastava et al. "
        "2014, section 7.4)",
        "compare with and without dropout; try more or augmented data, weight decay, or a smaller model",
    ),
    "between recurrent layers": Pitfall(
        _between_layers,
        "note",
        "masks that change from step to step regularise recurrent layers less than one mask for the whole sequence "
        "(Gal & Ghahramani 2016)",
        "use fdt.VariationalLSTM or VariationalGRU",
    ),
    "beside a recurrent layer": Pitfall(
        _beside_recurrent,
        "note",
        "masks that change from step to step regularise recurrent layers less than one mask for the whole sequence "
        "(Gal & Ghahramani 2016)",
        "use fdt.VariationalDropout, or fdt.VariationalLSTM with input and output masks",
    ),
    "drops nothing": Pitfall(_nothing, "note", "it costs a call and does nothing", "remove it, or give it a p above 0"),
}

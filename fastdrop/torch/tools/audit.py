"""Pitfalls of dropout, looked for in a model.

`RULES` is the list; what order the layers run in is `graph`'s to find out.
"""

from __future__ import annotations

import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ...core import checks
from ..models.convert import functional_rows
from ..models.drop_path import is_drop_path
from ..models.rates import number, rate_name
from ..models.report import Row, fold, fold_and_count, table
from .graph import Flow, Op, backward, forward

__all__ = ["AuditReport", "Finding", "audit"]

SEVERITIES = ("error", "warning", "note")

HIGH_RATE = 0.7  # from here on training errors rise: Srivastava et al. 2014, figure 9
FEW_SAMPLES = 1000  # below it dropout gained nothing: there, figure 10
FEW_PARAMETERS = 5000  # a judgement: a 64-64-10 network for digits of 8 by 8 pixels has 4,810
FEW_UNITS = 16  # a judgement
SHOWN = 8  # findings of one kind, in print

# What a module or function drops, by its name or that of a class it derives from, whichever comes first.
LAWS = {
    "elements": "Dropout GaussianDropout dropout dropout_ gaussian_dropout",
    "elements, alpha": "AlphaDropout alpha_dropout alpha_dropout_",
    "features": "Dropout1d Dropout2d Dropout3d dropout1d dropout2d dropout3d feature_dropout feature_dropout_",
    "features, alpha": "FeatureAlphaDropout feature_alpha_dropout feature_alpha_dropout_",
    "held over time": "VariationalDropout variational_dropout",
    "blocks": "DropBlock2d DropBlock3d drop_block2d drop_block3d",
    "samples": "StochasticDepth DropPath stochastic_depth",
    "attention": "MultiheadAttention scaled_dot_product_attention",
}
LAW_OF = {name: law for law, names in LAWS.items() for name in names.split()}
CHANGES_VARIANCE = ("elements", "features", "blocks", "held over time")
OF_ELEMENTS = ("elements", "elements, alpha")
OF_FEATURES = ("features", "features, alpha")
SHIFTS_ON = {"pointwise", "pooling", "shape", "join"}  # kinds of ops that pass a shift of variance on


@dataclass(frozen=True)
class Finding:
    """One pitfall at one place: ``path`` is the module's, "" the model itself."""

    path: str
    severity: str
    rule: str
    what: str
    why: str
    remedy: str


class AuditReport:
    """What `audit` found; a sequence of `Finding`, the worst first, that prints as a table.

    ``functional`` has a row for each function that drops in the forward of a module: where, which, and what of fastdrop
    reaches it. Those are no findings. ``limit`` says what kept the audit from seeing the order of all layers; "" if
    nothing did.
    """

    def __init__(self, findings: list[Finding], limit: str = "", functional: list[Row] | None = None) -> None:
        self.findings = sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
        self.limit = limit
        self.functional = functional or []

    def at_least(self, severity: str) -> list[Finding]:
        """Findings of a severity, "error", "warning" or "note", or worse."""
        checks.choice("severity", severity, SEVERITIES)
        return [f for f in self.findings if SEVERITIES.index(f.severity) <= SEVERITIES.index(severity)]

    def __len__(self) -> int:
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, index: int) -> Finding:
        return self.findings[index]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [("module", "severity", "finding")]
        for _, group in itertools.groupby(self.findings, lambda finding: finding.rule):
            findings = list(group)
            told = fold_and_count((finding.path, finding.severity, finding.what) for finding in findings)
            for (path, severity, what), _ in told[:SHOWN]:
                lines += _row(path, severity, what)
            if rest := sum(count for _, count in told[SHOWN:]):
                lines += _row("", "", f"... and {rest} more of the kind")
            lines += _row("", "", f"why: {findings[0].why}") + _row("", "", f"do: {findings[0].remedy}")
        parts = [table(lines) if self.findings else "no findings"]
        if self.functional:
            functions = fold((row.path, row.before, row.reason) for row in self.functional)
            parts.append(table([("module", "drops by", "where"), *functions]))
        if self.limit:
            parts.append(f"not all rules applied: {self.limit}")
        return "\n".join(parts)


def _row(path: str, severity: str, text: str) -> list[tuple[str, str, str]]:
    first, *rest = textwrap.wrap(text, 88, subsequent_indent="  ")
    return [(path, severity, first), *(("", "", line) for line in rest)]


def audit(model: nn.Module, example_input: Any = None, *, samples: int | None = None) -> AuditReport:
    """Findings on how a model uses dropout: pitfalls, each with its place, the reason and what to do.

    Looked for: dropout that stays on in evaluation, that is the output, that comes straight after a convolution, before
    batch normalisation, on recurrent connections or with a new mask at each time step; rates of 0, above 0.7 and of 1;
    networks, layers and data sets that are too small. By class, torch's and fastdrop's dropout is recognised; by name,
    timm's and torchvision's. Below the findings, the report lists the functions that drop, such as
    ``F.dropout``, which the forwards of modules call. `convert` and `DropoutScheduler` don't reach them; the list says
    whether `enable` does.

    Parameters
    ----------
    model : Module
        Left as it is, its mode, parameters and buffers: what runs is a copy.
    example_input : Tensor or tuple of Tensors, optional
        The model is run on it in evaluation mode to see the order of its layers; that takes the memory of a second
        model and of all activations. Without one, torch.fx traces the model, and where it can't, the order is that
        within each `torch.nn.Sequential`; the report's ``limit`` says so. The state of torch's generators is restored.
    samples : int, optional
        How many samples there are to train on.

    Returns
    -------
    AuditReport

    Raises
    ------
    Whatever the model raises on example_input; TypeError and ValueError for samples that are no number from 0 on.

    >>> import torch, fastdrop.torch as fdt
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(57_600, 10))
    >>> print(fdt.audit(model))
    module  severity  finding
    2       warning   Dropout(p=0.5) comes straight after the convolution 0
                      why: neighbouring pixels say nearly the same, so what is dropped is still there in those
                        beside it, and little is regularised (Tompson et al. 2015; Ghiasi et al. 2018)
                      do: Dropout2d (1d, 3d), which drops whole channels, or DropBlock2d, which drops blocks
    """
    if samples is not None:
        checks.number_from("samples", samples, 0)
    subject = Subject(model, Flow.of(model, example_input), samples)
    found: dict[tuple[str, str, str], Finding] = {}
    for name, rule in RULES.items():
        for path, what in rule.look(subject):
            found.setdefault((name, path, what), Finding(path, rule.severity, name, what, rule.why, rule.remedy))
    functional = [row for path, module in model.named_modules() for row in functional_rows(path, module)]
    return AuditReport(list(found.values()), subject.flow.limit, functional)


@dataclass(frozen=True)
class Drop:
    """A place where something is dropped: a module of the model, or the call of a function."""

    path: str
    label: str
    law: str
    p: float
    module: nn.Module | None
    on: bool  # in the model's evaluation mode; as it stands, for a module


@dataclass
class Subject:
    model: nn.Module
    flow: Flow
    samples: int | None

    @cached_property
    def drops(self) -> list[Drop]:
        modules = []
        for path, module in self.model.named_modules():
            op = Op(path, type(module).__name__, module)
            p = _rate(op)
            if p is not None:
                on = module.training and not self.model.training
                modules.append(Drop(path, _label(op), _law(op), p, module, on))
        calls = []
        for op in self.flow.ops:
            p, on = _called_with(op)
            if p is not None:
                calls.append(Drop(op.path, _label(op), LAW_OF[op.name], p, None, on))
        return modules + calls

    def dropped(self, *laws: str) -> Iterator[Op]:
        """The ops that drop by one of the laws."""
        for op in self.flow.ops:
            if op.kind == "dropout" and _law(op) in laws and _rate(op):
                yield op


def _law(op: Op) -> str:
    if op.module is not None:
        named = next((LAW_OF[cls.__name__] for cls in type(op.module).__mro__ if cls.__name__ in LAW_OF), "")
        return named or ("samples" if rate_name(op.module) == "drop_prob" and is_drop_path(type(op.module)) else "")
    return LAW_OF.get(op.name, "") if op.kwargs.get("noise_shape") is None else ""


def _called_with(op: Op) -> tuple[float | None, bool]:
    """p of a function that drops, and whether it does in evaluation; None for what is no such function."""
    if op.module is not None or op.name not in LAW_OF:
        return None, False
    if op.name == "scaled_dot_product_attention":
        p = op.kwargs.get("dropout_p", op.args[4] if len(op.args) > 4 else 0.0)
        return (float(p), True) if isinstance(p, int | float) and p else (None, False)
    try:
        bound = inspect.signature(op.function).bind(*op.args, **op.kwargs)
        bound.apply_defaults()
        given = bound.arguments
    except (TypeError, ValueError):  # torch's own builtins have no signature
        given = dict(zip(("input", "p", "training"), op.args, strict=False)) | op.kwargs
    p, training = given.get("p"), given.get("training", given.get("train"))
    return float(p) if isinstance(p, int | float) else None, training is True


def _rate(op: Op) -> float | None:
    """p of a module or function that drops; None of any other."""
    if op.module is None:
        return _called_with(op)[0]
    name = rate_name(op.module)
    return None if name is None else number(op.module, name)


def _label(op: Op) -> str:
    """What drops, as in "Dropout(p=0.5)"."""
    if op.module is not None:
        name = rate_name(op.module)
    else:
        name = "dropout_p" if op.name == "scaled_dot_product_attention" else "p"
    return f"{op.name}({name}={_rate(op):g})"


def _place(op: Op) -> str:
    """An op in words: its path if it is a module."""
    return op.path or op.name if op.module is not None else f"{op.name} in {op.path or 'the model'}"


# ---- the rules: each yields paths and what is there ----

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
        # Rates of stochastic depth begin at 0 in the first layer, those of a schedule may, and of the three of a
        # variational layer not all need be in use.
        meant = drop.law == "samples" or getattr(drop.module, "_rate", None) is not None
        holder = subject.model.get_submodule(drop.path.rpartition(".")[0])
        if not meant and not isinstance(holder, nn.RNNBase):
            yield drop.path, f"{drop.label} drops nothing"


def _output(subject: Subject) -> Found:
    outputs = {id(op) for op in subject.flow.outputs}
    for op in subject.dropped(*OF_ELEMENTS, *OF_FEATURES):
        after = [op, *forward(op, {"pointwise", "shape"})]
        if any(id(end) in outputs for end in after) and all(end.kind in ("pointwise", "shape") for end in after[1:]):
            yield op.path, f"{_label(op)} is applied to the model's output"


def _after_convolution(subject: Subject) -> Found:
    for op in subject.dropped(*OF_ELEMENTS):
        before = backward(op, {"pointwise", "pooling", "join", "norm", "batch norm"})
        convolution = next((source for source, _ in before if source.kind == "convolution"), None)
        if convolution:
            yield op.path, f"{_label(op)} comes straight after the convolution {_place(convolution)}"


def _before_batch_norm(subject: Subject) -> Found:
    for op in subject.dropped(*CHANGES_VARIANCE):
        norm = _batch_norm(op, SHIFTS_ON)
        if norm:
            yield op.path, f"{_label(op)} comes straight before the batch normalisation {_place(norm)}"


def _before_batch_norm_of_next(subject: Subject) -> Found:
    for op in subject.dropped(*CHANGES_VARIANCE):
        norm = _batch_norm(op, SHIFTS_ON | {"linear", "convolution"})
        if norm and not _batch_norm(op, SHIFTS_ON):
            yield op.path, f"{_label(op)} comes one layer before the batch normalisation {_place(norm)}"


def _batch_norm(op: Op, through: set[str]) -> Op | None:
    """The nearest one that uses running statistics in evaluation."""
    reached = (user for user in forward(op, through) if user.kind == "batch norm")
    return next((user for user in reached if getattr(user.module, "track_running_stats", True)), None)


def _recurrent_connection(subject: Subject) -> Found:
    between = {"pointwise", "norm", "shape"}
    for op in subject.dropped(*OF_ELEMENTS):
        feeds = {id(user.module) for user in forward(op, between) if user.kind == "recurrent"}
        for source, _ in backward(op, between):
            if source.kind == "recurrent" and id(source.module) in feeds:
                yield op.path, f"{_label(op)} is on the recurrent connection of {_place(source)}"


def _between_layers(subject: Subject) -> Found:
    for drop in subject.drops:
        if isinstance(drop.module, nn.RNNBase):
            yield drop.path, f"{drop.label} draws a new mask at each time step between its layers"


def _beside_recurrent(subject: Subject) -> Found:
    for op in subject.dropped(*OF_ELEMENTS):
        for source, result in backward(op, {"pointwise", "norm"}):
            if isinstance(source.module, nn.RNNBase) and result == 0:
                yield op.path, f"{_label(op)} draws a new mask at each time step of the output of {_place(source)}"
        for user in forward(op, {"pointwise", "norm"}):
            if isinstance(user.module, nn.RNNBase):
                yield op.path, f"{_label(op)} draws a new mask at each time step of the input of {_place(user)}"


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
    for op in subject.dropped(*OF_ELEMENTS, *OF_FEATURES):
        for source, _ in backward(op, {"pointwise", "norm", "batch norm"}):
            units = _units(source, _law(op) in OF_FEATURES)
            if units is not None and 0 < units <= FEW_UNITS:
                yield op.path, f"{_label(op)} drops among the {units} units of {_place(source)}"


def _units(op: Op, of_channels: bool) -> int | None:
    names = {"linear": "out_features", "recurrent": "hidden_size", "embedding": "embedding_dim"}
    if of_channels:
        names = {"convolution": "out_channels"}
    units = getattr(op.module, names.get(op.kind, ""), None)
    return units if isinstance(units, int) else None


def _few_samples(subject: Subject) -> Found:
    if subject.drops and subject.samples is not None and subject.samples < FEW_SAMPLES:
        yield "", f"dropout for {subject.samples:g} samples"


@dataclass(frozen=True)
class Rule:
    look: Callable[[Subject], Found]
    severity: str
    why: str
    remedy: str


RULES = {
    "left on": Rule(
        _left_on,
        "error",
        "predictions are random, and worse than without",
        "model.eval() for all of the model; in calls of functions training=self.training, or dropout_p=0.0 unless "
        "self.training; for Monte Carlo dropout fdt.mc_dropout, which turns it on for a while",
    ),
    "drops everything": Rule(
        _everything, "error", "its output is 0 in training, and nothing before it learns", "p from 0.1 to 0.5"
    ),
    "on the output": Rule(
        _output,
        "warning",
        "predictions themselves are set to 0 and scaled in training, so the loss sees noise that no weight can average "
        "out",
        "move it before the last layer",
    ),
    "high rate": Rule(
        _high_rate,
        "warning",
        "so little is left that most networks underfit (Srivastava et al. 2014, section 7.3)",
        "p from 0.2 to 0.5 for hidden units, 0.1 in transformers, 0.1 to 0.3 for channels",
    ),
    "after a convolution": Rule(
        _after_convolution,
        "warning",
        "neighbouring pixels say nearly the same, so what is dropped is still there in those beside it, and little is "
        "regularised (Tompson et al. 2015; Ghiasi et al. 2018)",
        "Dropout2d (1d, 3d), which drops whole channels, or DropBlock2d, which drops blocks",
    ),
    "before batch normalisation": Rule(
        _before_batch_norm,
        "warning",
        "dropout changes the variance in training alone, and the running variance that is used in evaluation is then "
        "wrong (Li et al. 2019)",
        "move it behind the last batch normalisation",
    ),
    "before the next layer's batch normalisation": Rule(
        _before_batch_norm_of_next,
        "note",
        "dropout changes the variance in training alone, and the running variance that is used in evaluation is then "
        "wrong, less so the smaller p is (Li et al. 2019)",
        "move it behind the last batch normalisation, or compare with and without",
    ),
    "on a recurrent connection": Rule(
        _recurrent_connection,
        "warning",
        "a new mask at each step wipes out, step by step, what the state remembers (Gal & Ghahramani 2016)",
        "one mask for the whole sequence: fdt.VariationalLSTM or VariationalGRU",
    ),
    "one layer": Rule(
        _one_layer,
        "warning",
        "torch drops between recurrent layers, after all but the last",
        "two layers, or a dropout module after it, or fdt.VariationalLSTM with recurrent and output masks",
    ),
    "small network": Rule(
        _small_network,
        "warning",
        "a network this small rather lacks capacity than overfits, and dropout takes more of it",
        "compare with and without; a wider network, or weight decay in dropout's place",
    ),
    "narrow layer": Rule(
        _narrow_layer,
        "warning",
        "few units remain in each step, at times none, and the rest can't stand in for them",
        "a wider layer (n / (1 - p) units for n that are needed), a smaller p, or none here",
    ),
    "few samples": Rule(
        _few_samples,
        "warning",
        "with very little data a network learns it by heart in spite of dropout, which then brings nothing (Srivastava "
        "et al. 2014, section 7.4)",
        "compare with and without; more or augmented data, weight decay, a smaller model",
    ),
    "between recurrent layers": Rule(
        _between_layers,
        "note",
        "masks that change from step to step regularise recurrent layers less than one held over the sequence (Gal & "
        "Ghahramani 2016)",
        "fdt.VariationalLSTM or VariationalGRU",
    ),
    "beside a recurrent layer": Rule(
        _beside_recurrent,
        "note",
        "masks that change from step to step regularise recurrent layers less than one held over the sequence (Gal & "
        "Ghahramani 2016)",
        "fdt.VariationalDropout, or fdt.VariationalLSTM with input and output masks",
    ),
    "drops nothing": Rule(_nothing, "note", "it does no work", "remove it, or give it a p above 0"),
}

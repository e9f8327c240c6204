"""`audit` looks for pitfalls of dropout in a model and reports them. The pitfalls themselves are in `pitfalls`."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core import checks
from ..models.reasons import functional_rows
from ..models.report import Row, fold, fold_and_count, table
from .graph import LayerGraph
from .pitfalls import PITFALLS, Subject

__all__ = ["AuditReport", "Finding", "audit"]

SEVERITIES = ("error", "warning", "note")
SHOWN = 8  # findings of one kind, in print


@dataclass(frozen=True)
class Finding:
    """One pitfall at one place. ``path`` is the path of a module; "" is the model itself."""

    path: str
    severity: str
    rule: str
    what: str
    why: str
    remedy: str


class AuditReport:
    """What `audit` found; a sequence of `Finding`, the worst first, that prints as a table.

    Attributes
    ----------
    findings : list of Finding
        The worst first.
    limit : str
        Why the audit could not see the order of all layers; "" if it could.
    functional : list of Row
        A row for each function that drops in the forward of a module, which says where it is and which function of
        fastdrop reaches it. Those are no findings.
    """

    def __init__(self, findings: list[Finding], limit: str = "", functional: list[Row] | None = None) -> None:
        self.findings: list[Finding] = sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
        self.limit = limit
        self.functional: list[Row] = functional or []

    def at_least(self, severity: str) -> list[Finding]:
        """The findings of a severity and the worse ones.

        Parameters
        ----------
        severity : {"error", "warning", "note"}

        Returns
        -------
        list of Finding

        Raises
        ------
        ValueError
            For another severity.
        """
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
            folded = fold_and_count((finding.path, finding.severity, finding.what) for finding in findings)
            for (path, severity, what), _ in folded[:SHOWN]:
                lines += _row(path, severity, what)
            if rest := sum(count for _, count in folded[SHOWN:]):
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
    """Looks for pitfalls of dropout in a model. Each finding says where it is, why it matters and what to do.

    It looks for dropout that stays on in evaluation; dropout on the output, straight after a convolution, before batch
    normalisation, on recurrent connections or with a new mask at each time step; rates of 0, above 0.7 and of 1;
    networks, layers and data sets that are too small. It recognises the dropout modules of torch and fastdrop by their
    class, and those of timm and torchvision by name.

    Below the findings, the report lists the functions that drop, such as ``F.dropout``, which the forwards of modules
    call. `convert` and `DropoutScheduler` don't reach them; the list says whether `enable` does.

    Parameters
    ----------
    model : Module
        Its mode, parameters and buffers stay as they are, because the audit runs a copy.
    example_input : Tensor or tuple of Tensors, optional
        The audit runs the model on it in evaluation mode to see the order of its layers. That takes the memory of a
        second model and of all activations. Without an example, torch.fx traces the model. If it can't, the audit knows
        the order within each `torch.nn.Sequential` only, and the report's ``limit`` says so. The state of torch's
        generators is restored.
    samples : int, optional
        How many samples there are to train on.

    Returns
    -------
    AuditReport

    Raises
    ------
    Whatever the model raises on example_input; TypeError and ValueError if samples is not a number that is at least 0.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(57_600, 10))
    >>> print(fdt.audit(model))
    module  severity  finding
    2       warning   Dropout(p=0.5) comes straight after the convolution 0
                      why: neighbouring pixels are nearly equal, so the network finds a dropped value beside
                        it, and dropout regularises little (Tompson et al. 2015; Ghiasi et al. 2018)
                      do: use Dropout2d (1d, 3d), which drops whole channels, or DropBlock2d, which drops
                        blocks
    """
    if samples is not None:
        checks.number_from("samples", samples, 0)
    subject = Subject(model, LayerGraph.of(model, example_input), samples)
    found: dict[tuple[str, str, str], Finding] = {}
    for name, pitfall in PITFALLS.items():
        for path, what in pitfall.find(subject):
            found.setdefault(
                (name, path, what), Finding(path, pitfall.severity, name, what, pitfall.why, pitfall.remedy)
            )
    functional = [row for path, module in model.named_modules() for row in functional_rows(path, module)]
    return AuditReport(list(found.values()), subject.graph.limit, functional)

"""`DropoutScheduler` sets the drop probability of a model's dropout modules by a function of the step.

The schedules are in `fastdrop.schedules`; `models.rates` tells which modules drop and where each keeps its p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from ...core import checks
from ..models.rates import number, rate_name, set_rate
from ..models.report import Report, Row
from ..models.source.forward import functional_drops, lenders, rate_text

__all__ = ["DropoutScheduler"]


MODES = ("scale", "set")
OWN = "_fastdrop_own_rate"  # on a module: its p from before it was driven, and the p that a scheduler set last
OFF = "its p is 0; a filter that picks it turns it on"


class _Entry(NamedTuple):
    """A module that drops."""

    path: str
    module: nn.Module
    name: str  # of the attribute with its p
    own: float  # its own rate, from before it was driven
    reason: str  # why it is left; "" if it is driven
    share: float = 1.0  # the schedule's p is multiplied by this

    def row(self) -> Row:
        before = f"{type(self.module).__name__}({self.name}={self.own:.3g})"
        if self.reason:
            return Row(self.path, before, None, self.reason)
        factor = "" if self.share == 1.0 else f"{self.share:.3g} * "
        return Row(self.path, before, f"{factor}schedule, now {number(self.module, self.name) or 0.0:.3g}")


class DropoutScheduler:
    """Sets the drop probability of a model's dropout modules to ``schedule(step)``.

    It drives the modules that the model has when the scheduler is made, each once, however many names it has:

    * all dropout modules of fastdrop and torch
    * `torch.nn.MultiheadAttention`, and recurrent layers of two layers or more, if they were built with dropout
    * stochastic depth of transformers
    * DropPath, StochasticDepth and DropBlock of timm and torchvision, which it recognises by name

    Modules whose p is 0 are off and stay off, unless ``filter`` picks them. ``print(scheduler.report)`` shows which
    modules are driven, which are left, and why.

    A module's own rate is the p that it has when a scheduler first drives it. Another scheduler of the same model
    starts from the same own rates. If p was set by hand since, that is the new own rate. A p that is set by hand
    lasts until the next step, as a learning rate does.

    Under ``torch.compile``, fastdrop's modules read p from a tensor once a scheduler drives them, so nothing is
    compiled again if p changes. In torch's own modules p is a constant of the compiled code: each value of p
    compiles again, and after 8 values (``torch._dynamo.config.recompile_limit``) the code runs uncompiled. So
    `convert` the model first.

    Parameters
    ----------
    model : Module
    schedule : callable of the step that returns p
        One of `fastdrop.schedules` or any other function. The first step is 0.
    filter : callable of (path, module) that returns bool, optional
        Picks the modules to drive, also among those whose p is 0 (with "scale", 0 stays 0). By default all modules with
        a p above 0 are driven.
    mode : {"scale", "set"}, optional
        "set" gives the schedule's p to every module. "scale" keeps the proportions of the own rates, for example of
        stochastic depth that rises from layer to layer: the module with the largest own rate gets the schedule's p, and
        each other module gets ``p * own rate / largest own rate``. So ``schedule(step)`` is the largest p of the driven
        modules in both modes. The default is "set" if all own rates above 0 are equal, and "scale" if they differ.

    Attributes
    ----------
    last_step, last_p
        The current step and the schedule's p.
    mode : str
    paths : tuple of str
        The paths of the modules that are driven.
    report : Report
        A row for each module that drops: its own rate, how it follows the schedule and its p now, or why it is left.
        Functions that drop, such as ``F.dropout(x, self.p, self.training)``, have rows too.

    Raises
    ------
    ValueError
        If there is no module to drive, the mode is unknown, or the schedule returns a p outside [0, 1]. Nothing has
        been changed then.
    TypeError
        If schedule or filter can't be called, or the schedule returns no number.

    Notes
    -----
    Rates that differ keep their proportion, and modules that are off stay off:

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> from fastdrop.schedules import exponential
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), fdt.Dropout())
    >>> scheduler = fdt.DropoutScheduler(model, exponential(0.5, 0.9, floor=0.1))
    >>> for epoch in range(3):
    ...     # ... train, then
    ...     print(f"{scheduler.step():.3f}")
    0.450
    0.405
    0.365
    >>> model[1].p == scheduler.last_p
    True

    >>> model = torch.nn.Sequential(fdt.DropPath(0.1), fdt.DropPath(0.2), fdt.Dropout(0.0))
    >>> print(fdt.DropoutScheduler(model, lambda step: 0.4).report)
    module  before           after
    0       DropPath(p=0.1)  0.5 * schedule, now 0.2
    1       DropPath(p=0.2)  schedule, now 0.4
    2       Dropout(p=0)     left: its p is 0; a filter that picks it turns it on
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Callable[[Any], float],
        filter: Callable[[str, nn.Module], bool] | None = None,
        *,
        mode: str | None = None,
    ) -> None:
        checks.function("schedule", schedule)
        if filter is not None:
            checks.function("filter", filter)
        if mode is not None:
            checks.choice("mode", mode, MODES)
        self.schedule = schedule
        entries: dict[nn.Module, _Entry] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if (name := rate_name(module)) is not None:
                own = _own_rate(module, name)
                reason = "" if own else OFF
                if filter is not None:
                    reason = "" if filter(path, module) else "filter turns it down"
                if module not in entries or (entries[module].reason and not reason):
                    entries[module] = _Entry(path, module, name, own, reason)
        if all(entry.reason for entry in entries.values()):
            why = "whose p is 0: name them by filter" if filter is None else "that filter turns down"
            seen = f"{len(entries)} {why}" if entries else "none"
            raise ValueError(f"model must have a dropout module to drive, but got {seen}")
        rates = {entry.own for entry in entries.values() if entry.own and not entry.reason}
        self.mode = mode or ("set" if len(rates) < 2 else "scale")
        if self.mode == "scale":
            if not rates:
                raise ValueError("mode 'scale' must have a module whose p is above 0, but got none")
            entries = {module: _with_share(entry, max(rates)) for module, entry in entries.items()}
        self._driven = [entry for entry in entries.values() if not entry.reason]
        self._listed: list[_Entry | Row] = []
        for path, module in model.named_modules():
            if module in entries:
                self._listed.append(entries[module])
            self._listed += _function_rows(path, module)
        self.step(0)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the modules whose p it sets."""
        return tuple(entry.path for entry in self._driven)

    @property
    def report(self) -> Report:
        """Which modules are driven, and why others are not: prints as a table."""
        return Report([line if isinstance(line, Row) else line.row() for line in self._listed])

    def step(self, step: float | None = None) -> float:
        """Goes to the next step, or to the one given, and returns p. Call it after training the step before.

        Parameters
        ----------
        step : float, optional
            At least 0; by default the one after the last.

        Returns
        -------
        float
            The new p.

        Raises
        ------
        TypeError, ValueError
            For a step, or a result of the schedule, that is no number or out of range. The model and the scheduler stay
            as they are then.
        """
        if step is None:
            step = self.last_step + 1
        else:
            checks.number_from("step", step, 0)
        return self._set(step, checks.between(f"schedule({step})", self.schedule(step), 0, 1))

    def get_last_p(self) -> float:
        """The p that was set last.

        Returns
        -------
        float
        """
        return self.last_p

    def state_dict(self) -> dict[str, float]:
        """The step and p, but not the schedule. The model's own ``state_dict`` doesn't have p.

        Returns
        -------
        dict of str to float
        """
        return {"last_step": self.last_step, "last_p": self.last_p}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Goes to the saved step and sets the saved p. The schedule is called again at the next step.

        Parameters
        ----------
        state_dict : dict of str to float
        """
        step, p = state_dict["last_step"], state_dict["last_p"]
        checks.number_from("last_step", step, 0)
        self._set(step, checks.between("last_p", p, 0, 1))

    def _set(self, step: float, p: float) -> float:
        for entry in self._driven:
            value = p * entry.share
            set_rate(entry.module, entry.name, value)
            vars(entry.module)[OWN] = entry.own, value
        self.last_step, self.last_p = step, p
        return p

    def __repr__(self) -> str:
        mode = "" if self.mode == "set" else ", mode='scale'"
        return (
            f"DropoutScheduler({self.schedule!r}, step={self.last_step}, p={self.last_p:g}, "
            f"{len(self.paths)} modules{mode})"
        )


def _own_rate(module: nn.Module, name: str) -> float:
    """The p from before any scheduler or, if p was set by hand since, that p."""
    now = number(module, name) or 0.0
    own, last = vars(module).get(OWN, (now, now))
    return own if now == last else now


def _with_share(entry: _Entry, largest: float) -> _Entry:
    if not entry.own and not entry.reason:
        return entry._replace(reason="its p is 0, which stays 0 when scaled; mode='set' turns it on")
    return entry._replace(share=entry.own / largest)


def _function_rows(path: str, module: nn.Module) -> Iterator[Row]:
    """A row for each function that drops in a module's forward, unless its rate is a dropout module's p."""
    for drop in functional_drops(module):
        if not lenders(module, drop):
            before = f"{drop.call}({drop.name}={rate_text(module, drop)})"
            yield Row(path, before, None, f"a function, called in {drop.place}; only modules are driven")

"""`Session`: what a callback does to a model when training begins, at each step, and when training ends.

The callbacks of `transformers` and `lightning` inherit it, so that both have the same options and both put back the
same things. They only say when.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .. import torch as fdt
from ..core import checks
from ..torch.models.fuse.rules import restore_class
from ..torch.runtime import context
from ..torch.tools.scheduler import MODES

__all__ = ["LOGGED", "Session"]

LOGGED = "dropout_p"  # the name of the rate in logs


class _Switch:
    """`enable` for trainings that overlap: the last one to end undoes it, unless it was on before the first."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # the garbage collector may call off in the middle of on
        self.users = 0
        self.was_on = False

    def on(self) -> None:
        with self.lock:
            first = not self.users
            self.users += 1
            if first:
                self.was_on = context.is_enabled_everywhere()
            try:
                fdt.enable()
            except BaseException:
                self.users -= 1
                raise

    def off(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users and not self.was_on:
                fdt.disable()


_switch = _Switch()


class Session:
    """The base class of the callbacks.

    Attributes
    ----------
    reports : dict of str to Report
        Of the training that began last: the reports of "convert" and "fuse", and of the "schedule" which modules it
        drives.
    scheduler : DropoutScheduler or None
    """

    def __init__(
        self,
        enable: bool = True,
        fuse: bool = False,
        convert: bool | str = False,
        schedule: Callable[[Any], float] | None = None,
        *,
        filter: Callable[[str, nn.Module], bool] | None = None,
        mode: str | None = None,
    ) -> None:
        if schedule is not None:
            checks.function("schedule", schedule)
            if filter is not None:
                checks.function("filter", filter)
            checks.choice("mode", mode, (None, *MODES))
        elif filter is not None or mode is not None:
            raise ValueError("filter and mode must come with a schedule, but got none")
        if not isinstance(convert, bool):
            checks.choice("convert", convert, checks.STORES)
        self.enable, self.fuse, self.convert, self.schedule = enable, fuse, convert, schedule
        self.filter, self.mode = filter, mode
        self.reports: dict[str, fdt.Report] = {}
        self.scheduler: fdt.DropoutScheduler | None = None
        self._told: set[tuple[str, ...]] = set()
        self._end: Callable[[], Any] = _nothing

    def begin(self, model: nn.Module, log: Callable[[str], Any]) -> None:
        """Changes the model and switches fastdrop on. A training that never ended, because it raised, ends first."""
        self.end()
        self.reports, self.scheduler = {}, None
        with contextlib.ExitStack() as undo:
            for name, change, back in self._changes():
                before = [(module, type(module), vars(module).get("store")) for module in model.modules()]
                undo.callback(_put_back, before, back)
                self._report(name, change(model), log)
            if self.schedule is not None:
                self.scheduler = fdt.DropoutScheduler(model, self.schedule, self.filter, mode=self.mode)
                self._report("schedule", self.scheduler.report, log)
            if self.enable:
                _switch.on()
                undo.callback(_switch.off)
            # A callback that is thrown away while its training has not ended ends it, too.
            end = weakref.finalize(self, undo.pop_all().close)
            end.atexit = False
            self._end = end

    def set_step(self, step: int) -> float | None:
        """Gives the model the rate of a step and returns it; None without a schedule."""
        if self.scheduler is None:
            return None
        return self.scheduler.last_p if self.scheduler.last_step == step else self.scheduler.step(step)

    def end(self) -> None:
        """Puts back what `begin` changed, but for the rates, which stay those of the last step."""
        self._end()

    def _changes(self) -> Iterator[tuple[str, Callable[[nn.Module], fdt.Report], Callable[[nn.Module], Any]]]:
        """The changes of the model's modules that are asked for: their name, and what does and undoes them."""
        if self.convert:
            store = "bits" if self.convert is True else self.convert
            yield "convert", functools.partial(fdt.convert, store=store), fdt.revert
        if self.fuse:
            yield "fuse", fdt.fuse, restore_class

    def _report(self, name: str, report: fdt.Report, log: Callable[[str], Any]) -> None:
        self.reports[name] = report
        told = name, *(row.path for row in report.changed)
        if told not in self._told:
            self._told.add(told)
            log(f"fastdrop, {name}: {len(report.changed)} of {len(report)} places\n{report}")


def _put_back(before: list[tuple[nn.Module, type, str | None]], back: Callable[[nn.Module], Any]) -> None:
    """Undoes what has changed since ``before`` was noted. What the user had changed earlier stays changed."""
    for module, its_class, store in before:
        if type(module) is not its_class:
            back(module)
        elif vars(module).get("store") != store:
            module.store = store  # type: ignore[assignment]


def _nothing() -> None:
    pass

"""p as a function of the step, for all the dropout of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import _checks
from ._rates import rate_name, set_rate

__all__ = ["DropoutScheduler"]


class DropoutScheduler:
    """Sets the drop probability of a model's dropout modules to ``schedule(step)``.

    Driven are all dropout modules of fastdrop and of torch, those with a p of 0 included, `torch.nn.MultiheadAttention`
    and recurrent layers of two layers or more if built with dropout, and, by the names of their classes, DropPath,
    StochasticDepth and DropBlock of timm and torchvision. Those that the model has when the scheduler is made; each
    once, however many names it has. As with learning rates, what is then set by hand lasts until the next step.

    Under ``torch.compile``, fastdrop's modules read p from a tensor as soon as a scheduler drives them, which nobody
    but the scheduler sets: p changes, and nothing is compiled again. In torch's own modules p is a constant of the
    compiled code: it is compiled anew for each value, and after 8 of them (``torch._dynamo.config.recompile_limit``)
    no more, and runs uncompiled. So `convert` the model first.

    Parameters
    ----------
    model : Module
    schedule : callable of the step that returns p
        One of `fastdrop.schedules` or any other; the step is 0 first.
    filter : callable of (path, module) that returns bool, optional
        Picks the modules to be driven; all are without it.

    Attributes
    ----------
    last_step, last_p
        The present step and p.
    paths : tuple of str
        Of the modules that are driven.

    Raises
    ------
    ValueError
        No module to drive; a schedule's value outside [0, 1], before anything is changed.
    TypeError
        schedule or filter that can't be called, or a value that is no number.

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
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Callable[[Any], float],
        filter: Callable[[str, nn.Module], bool] | None = None,
    ) -> None:
        _checks.function("schedule", schedule)
        if filter is not None:
            _checks.function("filter", filter)
        self.schedule = schedule
        found = [
            (path, module, name)
            for path, module in model.named_modules(remove_duplicate=False)
            if (name := rate_name(module)) is not None
        ]
        picked = [entry for entry in found if filter is None or filter(*entry[:2])]
        if not picked:
            seen = f"{len(found)} that filter turns down" if found else "none"
            raise ValueError(f"model must have a dropout module to drive, but got {seen}")
        by_id: dict[int, tuple[str, nn.Module, str]] = {}
        for entry in picked:
            by_id.setdefault(id(entry[1]), entry)
        self._driven = list(by_id.values())
        self.step(0)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path, _, _ in self._driven)

    def step(self, step: float | None = None) -> float:
        """Goes on by one step, or to the one given, and returns p. Call it once the step before is trained.

        ValueError and TypeError as above; the model and the scheduler then stay as they are.
        """
        if step is None:
            step = self.last_step + 1
        else:
            _checks.number_from("step", step, 0)
        return self._set(step, _checks.between(f"schedule({step})", self.schedule(step), 0, 1))

    def get_last_p(self) -> float:
        return self.last_p

    def state_dict(self) -> dict[str, float]:
        """The step and p. The schedule is not in it, nor is p in the model's own ``state_dict``."""
        return {"last_step": self.last_step, "last_p": self.last_p}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Goes to the step and sets the p that were saved; the schedule is asked from the next step on."""
        step, p = state_dict["last_step"], state_dict["last_p"]
        _checks.number_from("last_step", step, 0)
        self._set(step, _checks.between("last_p", p, 0, 1))

    def _set(self, step: float, p: float) -> float:
        for _, module, name in self._driven:
            set_rate(module, name, p)
        self.last_step, self.last_p = step, p
        return p

    def __repr__(self) -> str:
        return (
            f"DropoutScheduler({self.schedule!r}, step={self.last_step}, p={self.last_p:g}, {len(self.paths)} modules)"
        )

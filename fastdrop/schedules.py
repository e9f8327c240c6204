"""p as a function of the step, be that a batch or an epoch.

A schedule is any callable that takes the step, a number from 0 on, and returns p. Those here are values too: they
compare, hash, print and pickle as what they were made of. `fastdrop.torch.DropoutScheduler` sets a model's p by one.

>>> from fastdrop import schedules
>>> schedule = schedules.warmup(schedules.exponential(0.5, 0.9, floor=0.1), 2)
>>> schedule
warmup(schedule=exponential(start=0.5, decay=0.9, floor=0.1), steps=2.0, start=0.0)
>>> [round(schedule(step), 3) for step in (0, 1, 2, 3, 4, 50)]
[0.0, 0.25, 0.5, 0.45, 0.405, 0.1]
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .core import checks

__all__ = ["constant", "cosine", "exponential", "linear", "piecewise", "warmup"]


class Schedule:
    """What the schedules here have in common: the checks."""

    def __call__(self, step: float) -> float:
        return self._at(checks.number_from("step", step, 0))

    def _at(self, step: float) -> float:
        raise NotImplementedError

    def _keep(self, **fields: object) -> None:
        """Replaces what was given by what was checked."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class constant(Schedule):
    """The same p at every step.

    >>> from fastdrop.schedules import constant
    >>> constant(0.1)(1000)
    0.1
    """

    p: float

    def __post_init__(self) -> None:
        self._keep(p=checks.probability(self.p))

    def _at(self, step: float) -> float:
        return self.p


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    end: float
    steps: float

    def __post_init__(self) -> None:
        self._keep(
            start=checks.between("start", self.start, 0, 1),
            end=checks.between("end", self.end, 0, 1),
            steps=checks.number_from("steps", self.steps, 1),
        )


class linear(_Ramp):
    """From start to end in equal amounts over the first ``steps`` steps, then end.

    Parameters
    ----------
    start, end : float
        p at step 0, and from step ``steps`` on; each from 0 to 1.
    steps : float
        At least 1.

    Raises ValueError for what is out of range, TypeError for what is no number.

    >>> from fastdrop.schedules import linear
    >>> [linear(0.5, 0.1, 4)(step) for step in (0, 1, 2, 4, 9)]
    [0.5, 0.4, 0.3, 0.1, 0.1]
    """

    def _at(self, step: float) -> float:
        return _mix(self.start, self.end, step / self.steps)


class cosine(_Ramp):
    """From start to end along half a cosine, slow at both ends, over the first ``steps`` steps, then end.

    ``end + (start - end) * (1 + cos(pi * step / steps)) / 2``. Source: Loshchilov & Hutter 2017, there for the rate of
    learning.

    Parameters and errors are those of `linear`.

    >>> from fastdrop.schedules import cosine
    >>> [round(cosine(0.5, 0.1, 4)(step), 4) for step in (0, 1, 2, 4, 9)]
    [0.5, 0.4414, 0.3, 0.1, 0.1]
    """

    def _at(self, step: float) -> float:
        fraction = min(step / self.steps, 1.0)
        return _mix(self.start, self.end, (1.0 - math.cos(math.pi * fraction)) / 2)


@dataclass(frozen=True)
class exponential(Schedule):
    """``max(floor, start * decay**step)``.

    Parameters
    ----------
    start : float
        p at step 0, from 0 to 1.
    decay : float
        What p is multiplied by at each step, from 0 to 1.
    floor : float
        What p doesn't fall below, from 0 to start.

    Raises ValueError for what is out of range, TypeError for what is no number.

    >>> from fastdrop.schedules import exponential
    >>> [round(exponential(0.5, 0.9, floor=0.1)(epoch), 4) for epoch in (0, 1, 2, 30)]
    [0.5, 0.45, 0.405, 0.1]
    """

    start: float
    decay: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        start = checks.between("start", self.start, 0, 1)
        self._keep(
            start=start,
            decay=checks.between("decay", self.decay, 0, 1),
            floor=checks.between("floor", self.floor, 0, start),
        )

    def _at(self, step: float) -> float:
        return max(self.floor, self.start * math.pow(self.decay, step))


@dataclass(frozen=True)
class piecewise(Schedule):
    """Stairs: ``values[0]`` before step ``boundaries[0]``, ``values[i]`` from ``boundaries[i - 1]`` on.

    Parameters
    ----------
    boundaries : sequence of float
        Steps at which p changes: from 0 on, each more than the one before.
    values : sequence of float
        p, from 0 to 1; one more than there are boundaries.

    Raises ValueError for what is out of range or order, or too few or many; TypeError for what is no number.

    >>> from fastdrop.schedules import piecewise
    >>> [piecewise([10, 20], [0.5, 0.3, 0.1])(step) for step in (0, 9, 10, 19, 20)]
    [0.5, 0.5, 0.3, 0.3, 0.1]
    """

    boundaries: Sequence[float]
    values: Sequence[float]

    def __post_init__(self) -> None:
        boundaries, values = checks.pieces(self.boundaries, self.values)
        self._keep(boundaries=boundaries, values=values)

    def _at(self, step: float) -> float:
        return self.values[bisect_right(self.boundaries, step)]


@dataclass(frozen=True)
class warmup(Schedule):
    """From start to where a schedule begins, in equal amounts over the first ``steps`` steps, then that schedule.

    The schedule's own steps count from the end of the warm-up: at step ``steps`` it is asked for its step 0, so it
    runs as long as it would alone.

    Parameters
    ----------
    schedule : callable of the step
        One of those here, or any other.
    steps : float
        At least 1.
    start : float
        p at step 0, from 0 to 1.

    Raises ValueError for what is out of range, TypeError for what is no number or can't be called.

    >>> from fastdrop.schedules import linear, warmup
    >>> schedule = warmup(linear(0.4, 0.2, 2), 2)
    >>> [round(schedule(step), 3) for step in range(6)]
    [0.0, 0.2, 0.4, 0.3, 0.2, 0.2]
    """

    schedule: Callable[[float], float]
    steps: float
    start: float = 0.0

    def __post_init__(self) -> None:
        checks.function("schedule", self.schedule)
        self._keep(steps=checks.number_from("steps", self.steps, 1), start=checks.between("start", self.start, 0, 1))

    def _at(self, step: float) -> float:
        if step < self.steps:
            return _mix(self.start, self.schedule(0), step / self.steps)
        return self.schedule(step - self.steps)


def _mix(start: float, end: float, fraction: float) -> float:
    """start at 0, end exactly at 1 and beyond."""
    return end if fraction >= 1.0 else start + (end - start) * fraction

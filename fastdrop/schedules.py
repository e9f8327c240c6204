"""Schedules: the drop probability p as a function of the step.

`fastdrop.torch.DropoutScheduler` calls one to set the p of a model. A step is a batch or an epoch, as the caller
decides, and counts from 0. Any function of the step is a schedule; those here can also be compared, hashed, printed and
pickled.

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

__all__ = ["constant", "cosine", "early", "exponential", "late", "linear", "piecewise", "warmup"]


class Schedule:
    """The base class of the schedules here: it checks the step."""

    def __call__(self, step: float) -> float:
        return self._at(checks.number_from("step", step, 0))

    def _at(self, step: float) -> float:
        raise NotImplementedError

    def _keep(self, **fields: object) -> None:
        """Replaces arguments by their checked values."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class constant(Schedule):
    """The same p at every step.

    Parameters
    ----------
    p : float
        From 0 to 1.

    Raises
    ------
    TypeError, ValueError
        For a p that is not a number from 0 to 1.

    Examples
    --------
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
    """From start to end in equal increments over the first ``steps`` steps, then end.

    Parameters
    ----------
    start, end : float
        p at step 0, and p from step ``steps`` on; each from 0 to 1.
    steps : float
        At least 1.

    Raises
    ------
    ValueError
        For a value out of range.
    TypeError
        For a value that is not a number.

    Examples
    --------
    >>> from fastdrop.schedules import linear
    >>> [linear(0.5, 0.1, 4)(step) for step in (0, 1, 2, 4, 9)]
    [0.5, 0.4, 0.3, 0.1, 0.1]
    """

    def _at(self, step: float) -> float:
        return _mix(self.start, self.end, step / self.steps)


class cosine(_Ramp):
    """From start to end along half a cosine wave, slow at both ends, over the first ``steps`` steps, then end.

    ``end + (start - end) * (1 + cos(pi * step / steps)) / 2``.

    Parameters
    ----------
    start, end : float
        p at step 0, and p from step ``steps`` on; each from 0 to 1.
    steps : float
        At least 1.

    Raises
    ------
    ValueError
        For a value out of range.
    TypeError
        For a value that is not a number.

    Notes
    -----
    Source: Loshchilov and Hutter, ICLR 2017, who use it for the learning rate.

    Examples
    --------
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
        The factor of p at each step, from 0 to 1.
    floor : float
        The lowest p, from 0 to start.

    Raises
    ------
    ValueError
        For a value out of range.
    TypeError
        For a value that is not a number.

    Examples
    --------
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
    """Constant pieces: ``values[0]`` before step ``boundaries[0]``, ``values[i]`` from step ``boundaries[i - 1]`` on.

    Parameters
    ----------
    boundaries : sequence of float
        The steps at which p changes: at least 0, each greater than the one before.
    values : sequence of float
        The values of p, from 0 to 1; one more than there are boundaries.

    Raises
    ------
    ValueError
        For values out of range or order, or of the wrong number.
    TypeError
        For one that is not a number.

    Examples
    --------
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
    """From start to the first p of a schedule, in equal increments over ``steps`` steps; then that schedule.

    The schedule's own steps count from the end of the warm-up: step ``steps`` is the schedule's step 0.

    Parameters
    ----------
    schedule : callable of the step
        A schedule of this module or any function of the step.
    steps : float
        At least 1.
    start : float
        p at step 0, from 0 to 1.

    Raises
    ------
    ValueError
        For a value out of range.
    TypeError
        For one that is not a number or, for schedule, not callable.

    Examples
    --------
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


def early(p: float, steps: float, *, falls: bool = True) -> Schedule:
    """Early dropout: drops over the first ``steps`` steps alone, to help a model that underfits.

    Parameters
    ----------
    p : float
        At step 0, from 0 to 1.
    steps : float
        At least 1. The source takes the first tenth of the training, up to a third.
    falls : bool
        Whether p falls in equal increments, as the source found best, or stays until then.

    Returns
    -------
    Schedule

    Raises
    ------
    ValueError
        For a value out of range.
    TypeError
        For a value that is not a number.

    Notes
    -----
    Source: Liu et al., "Dropout reduces underfitting", ICML 2023.

    Examples
    --------
    >>> from fastdrop.schedules import early
    >>> [round(early(0.1, 4)(step), 3) for step in range(6)]
    [0.1, 0.075, 0.05, 0.025, 0.0, 0.0]
    """
    falling = linear(checks.between("p", p, 0, 1), 0.0, steps)
    return falling if falls else piecewise([falling.steps], [falling.start, 0.0])


def late(p: float, steps: float) -> Schedule:
    """Late dropout: drops from step ``steps`` on, for a model that overfits.

    Parameters
    ----------
    p : float
        At all later steps, from 0 to 1.
    steps : float
        At least 1.

    Returns
    -------
    Schedule

    Raises
    ------
    ValueError
        For a value out of range.
    TypeError
        For a value that is not a number.

    Notes
    -----
    Source: Liu et al., "Dropout reduces underfitting", ICML 2023.

    Examples
    --------
    >>> from fastdrop.schedules import late
    >>> [late(0.4, 4)(step) for step in range(6)]
    [0.0, 0.0, 0.0, 0.0, 0.4, 0.4]
    """
    rising = linear(0.0, checks.between("p", p, 0, 1), steps)
    return piecewise([rising.steps], [0.0, rising.end])


def _mix(start: float, end: float, fraction: float) -> float:
    """start at fraction 0, exactly end at 1 and above."""
    return end if fraction >= 1.0 else start + (end - start) * fraction

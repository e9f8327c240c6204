"""p as a function of the step: values by the formulas, ends, order, range, and that a schedule is a value."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastdrop.schedules import constant, cosine, early, exponential, late, linear, piecewise, warmup

PROBABILITY = st.floats(0, 1)
STEPS = st.floats(1, 1e6)


def stairs(values):
    """Strictly increasing boundaries, one fewer than the values."""
    count = len(values) - 1
    return st.sets(st.floats(0, 1e6), min_size=count, max_size=count).map(
        lambda steps: piecewise(sorted(steps), values)
    )


RAMPS = st.one_of(
    st.builds(linear, PROBABILITY, PROBABILITY, STEPS), st.builds(cosine, PROBABILITY, PROBABILITY, STEPS)
)
PLAIN = st.one_of(
    st.builds(constant, PROBABILITY),
    RAMPS,
    st.tuples(PROBABILITY, PROBABILITY, PROBABILITY).map(lambda t: exponential(max(t[0], t[2]), t[1], min(t[0], t[2]))),
    st.lists(PROBABILITY, min_size=1, max_size=4).flatmap(stairs),
)
SCHEDULES = st.one_of(PLAIN, st.builds(warmup, PLAIN, STEPS, PROBABILITY))

EXAMPLES = {
    "constant": constant(0.3),
    "linear": linear(0.5, 0.1, 100),
    "cosine": cosine(0.1, 0.5, 10),
    "exponential": exponential(0.5, 0.9, floor=0.1),
    "piecewise": piecewise([10, 20], [0.5, 0.3, 0.1]),
    "warmup": warmup(linear(0.5, 0.1, 100), 10, start=0.05),
    "early": early(0.5, 100),
    "late": late(0.5, 100),
}
each = pytest.mark.parametrize("schedule", EXAMPLES.values(), ids=EXAMPLES)


# ---- values ----


def test_constant_and_linear_are_lines():
    assert [constant(0.3)(step) for step in (0, 1, 10**9)] == [0.3] * 3
    schedule = linear(0.75, 0.25, 8)
    assert [schedule(step) for step in (0, 1, 2, 4, 6, 8, 9, 10**9)] == [0.75, 0.6875, 0.625, 0.5, 0.375] + [0.25] * 3
    assert linear(0.25, 0.75, 8)(0.5) == 0.28125


def test_cosine_is_half_a_cosine():
    schedule = cosine(0.5, 0.1, 10)
    for step in range(11):
        assert schedule(step) == pytest.approx(0.1 + 0.4 * (1 + math.cos(math.pi * step / 10)) / 2, rel=1e-14)
    assert schedule(10) == schedule(11) == schedule(1e9) == 0.1


def test_exponential_is_the_formula():
    schedule = exponential(0.5, 0.9, floor=0.1)
    assert [schedule(epoch) for epoch in range(40)] == [max(0.1, 0.5 * 0.9**epoch) for epoch in range(40)]
    assert schedule(15) > 0.1 == schedule(16)
    assert exponential(0.5, 0.9)(1000) == 0.5 * 0.9**1000
    assert [exponential(0.5, 0)(step) for step in (0, 1, 2)] == [0.5, 0, 0]


def test_piecewise_changes_at_its_boundaries():
    schedule = piecewise([10, 20], [0.5, 0.3, 0.1])
    assert [schedule(step) for step in (0, 9.999, 10, 19, 20, 1e9)] == [0.5, 0.5, 0.3, 0.3, 0.1, 0.1]
    assert piecewise([], [0.2])(5) == 0.2
    assert piecewise([0], [0.2, 0.4])(0) == 0.4


def test_warmup_then_the_schedule_from_its_own_start():
    inner = linear(0.5, 0.25, 4)
    schedule = warmup(inner, 4)
    assert [schedule(step) for step in range(4)] == [0, 0.125, 0.25, 0.375]
    assert [schedule(4 + step) for step in range(10)] == [inner(step) for step in range(10)]
    assert [warmup(inner, 2, start=0.25)(step) for step in (0, 1, 2)] == [0.25, 0.375, 0.5]
    assert [warmup(inner, 2, start=1)(step) for step in (0, 1, 2)] == [1.0, 0.75, 0.5]


def test_early_and_late_drop_on_either_side_of_a_step():
    assert [early(0.5, 4)(step) for step in (0, 1, 3.5, 4, 100)] == [0.5, 0.375, 0.0625, 0.0, 0.0]
    assert [early(0.5, 4, falls=False)(step) for step in (0, 3.5, 4, 100)] == [0.5, 0.5, 0.0, 0.0]
    assert [late(0.5, 4)(step) for step in (0, 3.5, 4, 100)] == [0.0, 0.0, 0.5, 0.5]


def test_warmup_takes_any_callable():
    schedule = warmup(lambda step: 0.4 / (1 + step), 2)
    assert [schedule(step) for step in range(4)] == [0, 0.2, 0.4, 0.2]
    nested = warmup(warmup(constant(0.4), 2, start=0.2), 2)
    assert [nested(step) for step in range(6)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])


# ---- formulas ----


@given(SCHEDULES, st.floats(0, 1e7))
@example(linear(0.1, 1, 3), 2.9999999999999996)
@example(linear(0.3, 0, 3), 2.9999999999999996)
def test_p_is_a_probability(schedule, step):
    p = schedule(step)
    assert type(p) is float
    assert 0 <= p <= 1


@given(RAMPS, st.floats(0, 1e6), st.floats(0, 1e6))
def test_ramps_begin_and_end_where_they_say_and_never_turn_back(ramp, a, b):
    assert ramp(0) == ramp.start
    assert ramp(ramp.steps) == ramp.end
    earlier, later = ramp(min(a, b)), ramp(max(a, b))
    rounding = 2**-52
    if ramp.start <= ramp.end:
        assert ramp.start <= earlier <= later + rounding <= ramp.end + 2 * rounding
    else:
        assert ramp.start >= earlier >= later - rounding >= ramp.end - 2 * rounding


# ---- values that compare, print, pickle ----


@each
def test_schedule_is_a_value(schedule):
    twin = pickle.loads(pickle.dumps(schedule))
    assert twin == schedule
    assert twin is not schedule
    assert hash(twin) == hash(schedule)
    assert eval(repr(schedule)) == schedule
    assert [twin(step) for step in (0, 7, 50)] == [schedule(step) for step in (0, 7, 50)]
    assert all(schedule != other for other in EXAMPLES.values() if other is not schedule)


def test_schedules_compare_by_kind_and_numbers():
    assert linear(0.5, 0.1, 10) != cosine(0.5, 0.1, 10)
    assert linear(1, 0, 10) == linear(1.0, np.float32(0), np.int64(10))
    assert repr(linear(1, 0, 10)) == "linear(start=1.0, end=0.0, steps=10.0)"
    assert piecewise([1], [0, 1]) == piecewise((1.0,), np.array([0.0, 1.0]))
    with pytest.raises(AttributeError):
        linear(0.5, 0.1, 10).start = 0.9


# ---- bad input ----

ERRORS = {
    "early, p": (lambda: early(1.5, 4), ValueError, "p must be between 0 and 1, but got 1.5"),
    "late, steps": (lambda: late(0.5, 0), ValueError, "steps must be at least 1, but got 0"),
    "constant": (lambda: constant(1.5), ValueError, "p, the drop probability, must be between 0 and 1, but got 1.5"),
    "start": (lambda: linear(-0.1, 0.5, 10), ValueError, "start must be between 0 and 1, but got -0.1"),
    "end": (lambda: cosine(0.5, math.nan, 10), ValueError, "end must be between 0 and 1, but got nan"),
    "steps": (lambda: linear(0.5, 0.1, 0), ValueError, "steps must be at least 1, but got 0"),
    "infinite": (lambda: cosine(0.5, 0.1, math.inf), ValueError, "steps must be finite, but got inf"),
    "type": (lambda: linear("0.5", 0.1, 10), TypeError, "start must be a number, but got str"),
    "bool": (lambda: linear(0.5, True, 10), TypeError, "end must be a real number, but got bool"),
    "decay": (lambda: exponential(0.5, 1.1), ValueError, "decay must be between 0 and 1, but got 1.1"),
    "floor": (lambda: exponential(0.5, 0.9, 0.6), ValueError, "floor must be between 0 and 0.5, but got 0.6"),
    "count": (lambda: piecewise([10], [0.5]), ValueError, "values must be one more than boundaries, 2, but got 1"),
    "order": (lambda: piecewise([5, 5], [0, 0, 0]), ValueError, "boundaries must increase, but got (5.0, 5.0)"),
    "negative": (lambda: piecewise([-1], [0, 0]), ValueError, "boundaries[0] must be at least 0, but got -1"),
    "value": (lambda: piecewise([1], [0, 2]), ValueError, "values[1] must be between 0 and 1, but got 2.0"),
    "sequence": (
        lambda: piecewise(1, [0, 0]),
        TypeError,
        "boundaries and values must be sequences of numbers, but got 1 and [0, 0]",
    ),
    "callable": (lambda: warmup(0.5, 10), TypeError, "schedule must be callable, but got float"),
    "warm-up": (lambda: warmup(constant(0), 0.5), ValueError, "steps must be at least 1, but got 0.5"),
    "warm start": (lambda: warmup(constant(0), 5, 2), ValueError, "start must be between 0 and 1, but got 2.0"),
}


@pytest.mark.parametrize(("make", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments_are_refused_at_once(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


@each
def test_step_is_a_number_from_0_on(schedule):
    with pytest.raises(ValueError, match=r"^step must be at least 0, but got -1$"):
        schedule(-1)
    with pytest.raises(ValueError, match=r"^step must be finite, but got nan$"):
        schedule(math.nan)
    with pytest.raises(TypeError, match=r"^step must be a number, but got NoneType$"):
        schedule(None)

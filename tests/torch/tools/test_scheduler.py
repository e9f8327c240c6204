"""DropoutScheduler: which modules it drives, what it sets, what it saves, and that compilers don't notice."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch._dynamo.utils import counters

import fastdrop.torch as fdt
from fastdrop.schedules import constant, exponential, linear
from fastdrop.torch.tools.scheduler import DropoutScheduler

from ..module_cases import DropBlock2d, DropPath, StochasticDepth, one_layer

FALL = linear(0.5, 0.25, 8)


def perceptron(drop=fdt.Dropout):
    return nn.Sequential(nn.Linear(8, 8), drop(0.9), nn.ReLU(), nn.Linear(8, 8), drop(0.9))


# ---- which modules, and what ----


class SkipsBranch(nn.Module):
    """transformers' stochastic depth, whose class has another name in each model."""

    drop_prob = 0.1

    def forward(self, hidden):
        if self.drop_prob == 0.0 or not self.training:
            return hidden
        keep_prob = 1 - self.drop_prob
        shape = (hidden.shape[0],) + (1,) * (hidden.ndim - 1)
        random_tensor = torch.rand(shape, dtype=hidden.dtype, device=hidden.device)
        random_tensor = torch.floor(random_tensor + keep_prob)
        return hidden.div(keep_prob) * random_tensor


KINDS = {
    "ours": (lambda: fdt.DropPath(0.5), "p"),
    "subclass": (lambda: type("Mine", (nn.Dropout,), {})(), "p"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, dropout=0.1), "dropout"),
    "LSTM": (lambda: nn.LSTM(8, 8, 2, dropout=0.1), "dropout"),
    "MyDropPath": (lambda: type("MyDropPath", (DropPath,), {})(0.1), "drop_prob"),
    "StochasticDepth": (lambda: StochasticDepth(0.1, "row"), "p"),
    "DropBlock2d": (lambda: DropBlock2d(), "drop_prob"),
    "by its forward": (SkipsBranch, "drop_prob"),
}


@pytest.mark.parametrize(("make", "name"), KINDS.values(), ids=KINDS)
def test_scheduler_drives_every_kind(make, name):
    module = make()
    scheduler = DropoutScheduler(nn.ModuleDict({"a": nn.ModuleList([module])}), FALL)
    assert scheduler.paths == ("a.0",)
    assert getattr(module, name) == 0.5
    scheduler.step()
    assert getattr(module, name) == FALL(1)
    assert scheduler.last_p == scheduler.get_last_p() == FALL(1)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(8, 8),
        nn.Identity(),
        nn.MultiheadAttention(8, 2),
        nn.LSTM(8, 8, 2),
        one_layer(nn.LSTM),
        type("DropPath", (nn.Module,), {"drop_prob": None})(),
        type("StochasticDepth", (nn.Module,), {"p": "0.5"})(),
    ],
    ids=["Linear", "Identity", "attention", "LSTM", "LSTM of one layer", "None", "str"],
)
def test_scheduler_leaves_what_does_not_drop(module):
    before = dict(vars(module))
    scheduler = DropoutScheduler(nn.Sequential(module, nn.Dropout()), FALL)
    assert scheduler.paths == ("1",)
    assert vars(module) == before


def test_scheduler_filter_picks_by_path_and_by_module():
    model = nn.ModuleDict({"encoder": perceptron(), "head": perceptron(nn.Dropout)})
    DropoutScheduler(model, constant(0.1), lambda path, module: path[0] == "h" and isinstance(module, nn.Dropout))
    assert [model[part][i].p for part in ("encoder", "head") for i in (1, 4)] == [0.9, 0.9, 0.1, 0.1]


def test_scheduler_drives_a_shared_module_once_by_whichever_name():
    shared = fdt.Dropout()
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Dropout(0.9)])})
    scheduler = DropoutScheduler(model, FALL)
    assert scheduler.paths == ("a", "b.1")
    by_second_name = DropoutScheduler(model, FALL, lambda path, module: path == "b.0")
    assert by_second_name.paths == ("b.0",)
    assert by_second_name.step() == shared.p == FALL(1)
    assert model["b"][1].p == 0.5


# ---- steps ----


def test_step_goes_on_by_one_or_to_a_step():
    model = perceptron()
    scheduler = DropoutScheduler(model, FALL)
    assert (scheduler.last_step, scheduler.last_p) == (0, 0.5)
    assert [scheduler.step() for _ in range(3)] == [FALL(1), FALL(2), FALL(3)]
    assert scheduler.step(6) == FALL(6) == model[1].p
    assert scheduler.step() == FALL(7)
    assert scheduler.step(0.5) == FALL(0.5)
    assert scheduler.step() == FALL(1.5)
    assert scheduler.last_step == 1.5


# ---- state ----


def test_state_dict_resumes_where_it_was():
    first, second = perceptron(), perceptron()
    before = DropoutScheduler(first, FALL)
    for _ in range(3):
        before.step()
    assert repr(before) == "DropoutScheduler(linear(start=0.5, end=0.25, steps=8.0), step=3, p=0.40625, 2 modules)"
    state = json.loads(json.dumps(before.state_dict()))
    assert state == {"last_step": 3, "last_p": FALL(3)}
    after = DropoutScheduler(second, FALL)
    after.load_state_dict(state)
    assert second[1].p == second[4].p == after.last_p == FALL(3)
    assert after.step() == before.step() == FALL(4) == second[1].p
    after.load_state_dict({"last_step": 3, "last_p": 0.75})  # p holds until the next step
    assert second[1].p == 0.75
    assert after.step() == FALL(4)


def test_model_copies_without_a_trace_of_the_scheduler():
    model = perceptron()
    names = list(model.state_dict())
    scheduler = DropoutScheduler(model, FALL)
    assert list(model.state_dict()) == names
    assert not list(model[1].parameters()) + list(model[1].buffers())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[1].p == 0.5
        scheduler.step(8)
        assert twin[1].p == twin[1].rate == 0.5
        DropoutScheduler(twin, constant(0.125))
        assert (twin[1].p, model[1].p) == (0.125, 0.25)
        scheduler.step(0)


# ---- bad input ----

BAD = {
    "no dropout": (nn.Linear(2, 2), FALL, None, ValueError, "model must have a dropout module to drive, but got none"),
    "none picked": (
        perceptron(),
        FALL,
        lambda path, module: False,
        ValueError,
        "model must have a dropout module to drive, but got 2 that filter turns down",
    ),
    "schedule": (perceptron(), 0.5, None, TypeError, "schedule must be callable, but got float"),
    "filter": (perceptron(), FALL, "1", TypeError, "filter must be callable, but got str"),
    "above 1": (perceptron(), lambda t: 1.5, None, ValueError, "schedule(0) must be between 0 and 1, but got 1.5"),
    "nan": (perceptron(), lambda t: math.nan, None, ValueError, "schedule(0) must be between 0 and 1, but got nan"),
    "None": (perceptron(), lambda t: None, None, TypeError, "schedule(0) must be a number, but got NoneType"),
}


@pytest.mark.parametrize(("model", "schedule", "filter", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_and_change_nothing(model, schedule, filter, error, message):
    with pytest.raises(error) as raised:
        DropoutScheduler(model, schedule, filter)
    assert str(raised.value) == message
    assert all(module.p == 0.9 for module in model.modules() if isinstance(module, nn.Dropout))


def test_a_bad_step_changes_nothing():
    model = perceptron()
    scheduler = DropoutScheduler(model, lambda step: 0.5 + step / 4)
    scheduler.step()
    state = scheduler.state_dict()
    with pytest.raises(ValueError, match=r"^schedule\(9\) must be between 0 and 1, but got 2\.75$"):
        scheduler.step(9)
    with pytest.raises(ValueError, match=r"^step must be at least 0, but got -1$"):
        scheduler.step(-1)
    with pytest.raises(ValueError, match=r"^last_p must be between 0 and 1, but got 7\.0$"):
        scheduler.load_state_dict({"last_step": 0, "last_p": 7})
    with pytest.raises(KeyError, match="last_p"):
        scheduler.load_state_dict({"last_step": 0})
    assert scheduler.state_dict() == state
    assert model[1].p == 0.75


# ---- compilers ----


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def train(model, scheduler, steps):
    """Gradients and p over some steps under one seed."""
    torch.manual_seed(3)
    x = torch.linspace(-1, 1, 512).reshape(64, 8)
    results = []
    for _ in range(steps):
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results.append((scheduler.last_p, y.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        scheduler.step()
    return results


@pytest.mark.usefixtures("fresh_compiler")
def test_values_of_p_compile_once_and_equal_eager():
    model = perceptron()
    with torch.inference_mode():
        DropoutScheduler(model, FALL).step()  # its tensors must serve training too
    schedule = exponential(0.5, 0.7, floor=0.3)
    eager = train(model, DropoutScheduler(model, schedule), 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = train(compiled, DropoutScheduler(compiled, schedule), 4)
    assert counters["stats"]["unique_graphs"] == 1
    assert len({p for p, _, _ in results}) == 3  # then the floor
    torch.testing.assert_close(results, eager)


@pytest.mark.usefixtures("fresh_compiler")
def test_what_happens_to_p_between_calls_of_compiled_code():
    """A step before backward leaves its gradient; p set by hand is what the next call drops with."""
    model = nn.Sequential(fdt.Dropout(), fdt.DropPath(0.0))
    scheduler = DropoutScheduler(model[0], linear(0.5, 0.75, 1))
    DropoutScheduler(model[1], constant(0.0), lambda path, module: True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for function in (model, compiled):
        scheduler.step(0)
        x = torch.ones(1000, requires_grad=True)
        y = function(x)
        scheduler.step()
        y.sum().backward()
        assert set(x.grad.tolist()) == {0.0, 2.0}
        assert set(function(x).tolist()) == {0.0, 4.0}
    model[0].p = 0.0
    for network in (model, compiled, copy.deepcopy(model)):
        assert (network(x) == 1).all()
    model[1].drop_prob = 0.5
    assert set(compiled(x).tolist()) == set(model(x).tolist()) == {0.0, 2.0}

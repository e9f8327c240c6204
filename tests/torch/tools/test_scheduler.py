"""DropoutScheduler: which modules it drives, what it sets, what it saves, and that compilers don't notice."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch._dynamo.utils import counters

import fastdrop.torch as fdt
from fastdrop.schedules import constant, exponential, linear
from fastdrop.torch.nn.weights import DropConnect
from fastdrop.torch.tools.scheduler import DropoutScheduler

FALL = linear(0.5, 0.25, 8)


class DropPath(nn.Module):
    """What timm's has: by this name, and p by that."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob


class StochasticDepth(nn.Module):
    """As torchvision's."""

    def __init__(self, p, mode):
        super().__init__()
        self.p, self.mode = p, mode


class DropBlock2d(nn.Module):
    """As timm's; torchvision's has p."""

    def __init__(self, drop_prob=0.1):
        super().__init__()
        self.drop_prob = drop_prob


class MyDropPath(DropPath):
    pass


def one_layer():
    """With dropout, of which torch itself warns that it does nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.LSTM(8, 8, 1, dropout=0.5)


def perceptron(drop=fdt.Dropout):
    return nn.Sequential(nn.Linear(8, 8), drop(0.9), nn.ReLU(), nn.Linear(8, 8), drop(0.9))


# ---- which modules, and what ----

KINDS = {
    "ours": (lambda: fdt.Dropout(), "p"),
    "Dropout": (lambda: nn.Dropout(), "p"),
    "Dropout1d": (lambda: nn.Dropout1d(), "p"),
    "Dropout2d": (lambda: nn.Dropout2d(), "p"),
    "Dropout3d": (lambda: nn.Dropout3d(), "p"),
    "AlphaDropout": (lambda: nn.AlphaDropout(), "p"),
    "FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(), "p"),
    "subclass": (lambda: type("Mine", (nn.Dropout,), {})(), "p"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, dropout=0.1), "dropout"),
    "LSTM": (lambda: nn.LSTM(8, 8, 2, dropout=0.1), "dropout"),
    "GRU": (lambda: nn.GRU(8, 8, 3, dropout=0.1), "dropout"),
    "DropPath": (lambda: DropPath(0.1), "drop_prob"),
    "MyDropPath": (lambda: MyDropPath(0.1), "drop_prob"),
    "StochasticDepth": (lambda: StochasticDepth(0.1, "row"), "p"),
    "DropBlock2d": (lambda: DropBlock2d(), "drop_prob"),
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
        one_layer(),
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


def test_scheduler_drives_the_model_itself():
    model = nn.Dropout()
    assert DropoutScheduler(model, FALL).paths == ("",)
    assert model.p == 0.5


def test_scheduled_p_is_what_is_dropped():
    model, x = perceptron(), torch.ones(1000, 8)
    scheduler = DropoutScheduler(model, lambda step: [0.0, 0.25, 1.0][step])
    model[0].weight.data.fill_(1)
    model[3].weight.data.fill_(1)
    for share in (0.0, 0.25, 1.0):
        y = model[1](model[0](x))
        assert (y == 0).float().mean().item() == pytest.approx(share, abs=0.03)
        scheduler.step(scheduler.last_step if share == 1.0 else scheduler.last_step + 1)


def test_scheduler_filter_picks_by_path_and_by_module():
    model = nn.ModuleDict({"encoder": perceptron(), "head": perceptron(nn.Dropout)})
    assert DropoutScheduler(model, FALL, lambda path, module: path.startswith("head")).paths == ("head.1", "head.4")
    assert {model["encoder"][1].p, model["encoder"][4].p} == {0.9}
    DropoutScheduler(model, constant(0.1), filter=lambda path, module: isinstance(module, fdt.Dropout))
    assert [model[part][i].p for part in ("encoder", "head") for i in (1, 4)] == [0.1, 0.1, 0.5, 0.5]


def test_scheduler_drives_a_shared_module_once_by_whichever_name():
    shared = fdt.Dropout()
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Dropout(0.9)])})
    scheduler = DropoutScheduler(model, FALL)
    assert scheduler.paths == ("a", "b.1")
    by_second_name = DropoutScheduler(model, FALL, lambda path, module: path == "b.0")
    assert by_second_name.paths == ("b.0",)
    assert by_second_name.step() == shared.p == FALL(1)
    assert model["b"][1].p == 0.5


def test_two_schedulers_share_a_model():
    model = perceptron()
    first = DropoutScheduler(model, FALL, lambda path, module: path == "1")
    second = DropoutScheduler(model, constant(0.1), lambda path, module: path == "4")
    first.step(8)
    assert (model[1].p, model[4].p) == (0.25, 0.1)
    second.step()
    assert (model[1].p, model[4].p) == (0.25, 0.1)


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


def test_any_callable_is_asked_for_whole_steps():
    asked = []
    scheduler = DropoutScheduler(perceptron(), lambda step: asked.append(step) or 0.5)
    scheduler.step()
    scheduler.step(7)
    assert asked == [0, 1, 7]
    assert all(type(step) is int for step in asked)


def test_scheduler_repr():
    scheduler = DropoutScheduler(perceptron(), FALL)
    scheduler.step()
    assert repr(scheduler) == ("DropoutScheduler(linear(start=0.5, end=0.25, steps=8.0), step=1, p=0.46875, 2 modules)")


# ---- state ----


def test_state_dict_resumes_where_it_was():
    first, second = perceptron(), perceptron()
    before = DropoutScheduler(first, FALL)
    for _ in range(3):
        before.step()
    state = json.loads(json.dumps(before.state_dict()))
    assert state == {"last_step": 3, "last_p": FALL(3)}
    after = DropoutScheduler(second, FALL)
    after.load_state_dict(state)
    assert second[1].p == second[4].p == after.last_p == FALL(3)
    assert after.step() == before.step() == FALL(4) == second[1].p


def test_loaded_p_holds_until_the_next_step():
    model = perceptron()
    scheduler = DropoutScheduler(model, constant(0.1))
    scheduler.load_state_dict({"last_step": 3, "last_p": 0.75})
    assert model[1].p == 0.75
    assert scheduler.step() == 0.1


def test_scheduler_pickles_with_its_model():
    scheduler = DropoutScheduler(perceptron(), FALL)
    model, twin = pickle.loads(pickle.dumps((scheduler._driven[0][1], scheduler)))
    twin.step(8)
    assert model.p == 0.25
    assert scheduler.last_p == 0.5


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
def test_twenty_values_of_p_compile_once_and_equal_eager():
    model = perceptron()
    schedule = exponential(0.5, 0.9, floor=0.1)
    eager = train(model, DropoutScheduler(model, schedule), 20)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = train(compiled, DropoutScheduler(compiled, schedule), 20)
    assert counters["stats"]["unique_graphs"] == 1
    assert len({p for p, _, _ in results}) == 17  # then the floor
    torch.testing.assert_close(results, eager)


FAMILY = {
    "Dropout": lambda: fdt.Dropout(),
    "seed": lambda: fdt.Dropout(store="seed"),
    "standard": lambda: fdt.Dropout(scaling="standard"),
    "Dropout1d": lambda: nn.Sequential(nn.Flatten(2), fdt.Dropout1d()),
    "Dropout2d": lambda: fdt.Dropout2d(),
    "Dropout3d": lambda: fdt.Dropout3d(),
    "AlphaDropout": lambda: fdt.AlphaDropout(),
    "FeatureAlphaDropout": lambda: fdt.FeatureAlphaDropout(),
    "VariationalDropout": lambda: fdt.VariationalDropout(0.5, 1),
    "StochasticDepth": lambda: fdt.StochasticDepth(0.5, "row"),
    "DropPath": lambda: fdt.DropPath(0.5),
    "unscaled DropPath": lambda: fdt.DropPath(0.5, scale_by_keep=False),
    "DropBlock2d": lambda: fdt.DropBlock2d(0.5, 3),
    "GaussianDropout": lambda: fdt.GaussianDropout(),
    "DropConnect": lambda: DropConnect(nn.Linear(8, 8), ["weight"], 0.5),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_every_kind_of_ours_compiles_once(make):
    model, x = make(), torch.rand(4, 6, 8, 8)
    scheduler = DropoutScheduler(model, exponential(0.5, 0.8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(4):
        torch.manual_seed(step)
        y = compiled(x)
        torch.manual_seed(step)
        torch.testing.assert_close(y, model(x))
        scheduler.step()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_a_step_before_backward_leaves_the_gradient_that_of_the_p_that_was_drawn():
    drop = fdt.Dropout()
    scheduler = DropoutScheduler(drop, linear(0.5, 0.75, 1))
    compiled = torch.compile(drop, backend="aot_eager", fullgraph=True)
    for function in (drop, compiled):
        scheduler.step(0)
        x = torch.ones(1000, requires_grad=True)
        y = function(x)
        scheduler.step()
        y.sum().backward()
        assert set(x.grad.tolist()) == {0.0, 2.0}
        assert set(function(x).tolist()) == {0.0, 4.0}


@pytest.mark.usefixtures("fresh_compiler")
def test_scheduler_made_in_inference_mode_serves_training():
    model = perceptron()
    with torch.inference_mode():
        DropoutScheduler(model, FALL).step()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(torch.ones(4, 8)).sum().backward()
    assert model[0].weight.grad.isfinite().all()


def test_p_set_by_hand_afterwards_is_what_compiled_code_drops_with():
    model = torch.nn.Sequential(fdt.Dropout(0.5), fdt.DropPath(0.5))
    fdt.DropoutScheduler(model, lambda step: 0.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.ones(1000, 2)
    assert (compiled(x) == 0).any()
    model[0].p = 0.0
    model[1].drop_prob = 0.0
    assert (model(x) == 1).all()
    assert (compiled(x) == 1).all()
    assert (copy.deepcopy(model)(x) == 1).all()

"""DropoutScheduler of models whose rates differ, or are 0: what is off stays off, and proportions stay."""

from __future__ import annotations

import pickle

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import nn

import fastdrop.torch as fdt
from fastdrop.schedules import constant, linear
from fastdrop.torch.tools.scheduler import DropoutScheduler

from ..module_cases import DropPath

RISE = linear(0.2, 0.0, 10)


def swin(rate=0.2, blocks=12):
    """As timm's: dropouts that are off, and a ramp of stochastic depth from 0 on."""
    ramp = [rate * i / (blocks - 1) for i in range(blocks)]
    parts = [
        nn.ModuleDict({"drop": nn.Dropout(0.0), "path": DropPath(p) if p else nn.Identity(), "out": nn.Dropout(0.0)})
        for p in ramp
    ]
    return nn.ModuleDict({"pos_drop": nn.Dropout(0.0), "blocks": nn.ModuleList(parts)}), ramp


def rates(model):
    dropouts = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    paths = [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")]
    return dropouts, paths


def test_dropouts_that_are_off_stay_off_and_the_ramp_stays_one():
    model, ramp = swin()
    scheduler = DropoutScheduler(model, RISE)
    assert scheduler.mode == "scale"
    assert scheduler.paths == tuple(f"blocks.{i}.path" for i in range(1, 12))
    assert rates(model) == ({0.0}, ramp[1:])
    assert scheduler.step(5) == 0.1 == scheduler.last_p
    dropouts, paths = rates(model)
    assert dropouts == {0.0}
    assert paths == pytest.approx([p / 2 for p in ramp[1:]])
    assert paths[-1] == 0.1
    scheduler.step(10)
    assert set(rates(model)[1]) == {0.0}
    scheduler.step(0)
    assert rates(model) == ({0.0}, ramp[1:])


def test_the_mode_goes_by_the_rates_or_can_be_chosen():
    model = nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.0), fdt.Dropout(0.3))
    scheduler = DropoutScheduler(model, constant(0.1))
    assert (scheduler.mode, scheduler.paths) == ("set", ("0", "2"))
    assert [module.p for module in model] == [0.1, 0.0, 0.1]
    model, _ = swin()
    scheduler = DropoutScheduler(model, constant(0.1), lambda path, module: path == "pos_drop")  # which was off
    assert (scheduler.mode, scheduler.paths, model["pos_drop"].p) == ("set", ("pos_drop",), 0.1)
    model, _ = swin()
    scheduler = DropoutScheduler(model, constant(0.1), mode="set")
    assert (scheduler.mode, set(rates(model)[1])) == ("set", {0.1})
    assert "mode" not in repr(scheduler)
    model = nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.3))
    scheduler = DropoutScheduler(model, constant(0.1), mode="scale")
    assert repr(scheduler).endswith("2 modules, mode='scale')")
    assert [module.p for module in model] == [0.1, 0.1]
    with pytest.raises(ValueError, match=r"^mode must be one of 'scale', 'set', but got 'grow'$"):
        DropoutScheduler(model, constant(0.1), mode="grow")


def test_a_model_that_is_off_has_nothing_to_drive():
    model = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.0))
    with pytest.raises(ValueError, match=r"but got 2 whose p is 0: name them by filter$"):
        DropoutScheduler(model, constant(0.1))
    with pytest.raises(ValueError, match=r"^mode 'scale' must have a module whose p is above 0, but got none$"):
        DropoutScheduler(model, constant(0.1), lambda path, module: True, mode="scale")
    assert [module.p for module in model] == [0.0, 0.0]


def test_the_next_scheduler_starts_from_the_own_rates():
    """Also where the last one has left all at 0, or far from them."""
    model, ramp = swin()
    DropoutScheduler(model, constant(0.0))
    model = pickle.loads(pickle.dumps(model))
    second = DropoutScheduler(model, constant(0.4))
    assert second.mode == "scale"
    assert rates(model)[1] == pytest.approx([2 * p for p in ramp[1:]])
    model["blocks"][1]["path"].drop_prob = 0.4  # by hand: its own rate from now on, the model's largest
    DropoutScheduler(model, constant(0.4))
    assert rates(model)[1] == pytest.approx([0.4, *ramp[2:]])


def test_state_is_restored_in_proportion():
    first, _ = swin()
    scheduler = DropoutScheduler(first, RISE)
    scheduler.step(3)
    state = scheduler.state_dict()
    assert state == {"last_step": 3, "last_p": RISE(3)}
    second, _ = swin()
    after = DropoutScheduler(second, RISE)
    after.load_state_dict(state)
    assert rates(second) == rates(first)
    model, scheduler = pickle.loads(pickle.dumps((first, scheduler)))
    assert scheduler.step() == after.step()
    assert rates(model) == rates(second)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.lent, self.off = 0.3, nn.Dropout(0.1), nn.Dropout(0.0)
        self.paths = nn.ModuleList([DropPath(0.1), DropPath(0.2), DropPath(0.2)])

    def forward(self, x):
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=self.lent.p if self.training else 0.0)
        return F.dropout(self.off(x), self.p, self.training)


def test_the_report_tells_what_is_driven_and_what_is_left():
    model = Net()
    scheduler = DropoutScheduler(model, lambda step: 0.4 - 0.2 * step)
    lines = [cells(line) for line in str(scheduler.report).splitlines()]
    assert lines == [
        ["module", "before", "after"],
        ["(the model)", "F.dropout(p=0.3)", "left: a function, called in Net.forward; only modules are driven"],
        ["lent", "Dropout(p=0.1)", "0.5 * schedule, now 0.2"],
        ["off", "Dropout(p=0)", "left: its p is 0; a filter that picks it turns it on"],
        ["paths.0", "DropPath(drop_prob=0.1)", "0.5 * schedule, now 0.2"],
        ["paths.1-2 (2x)", "DropPath(drop_prob=0.2)", "schedule, now 0.4"],
    ]
    scheduler.step()
    assert "0.5 * schedule, now 0.1" in str(scheduler.report)
    scheduler = DropoutScheduler(model, constant(0.1), lambda path, module: path != "paths.0")
    reasons = {row.path: row.reason for row in scheduler.report.left}
    assert reasons["paths.0"] == "filter turns it down"
    assert reasons["off"] == "its p is 0, which stays 0 when scaled; mode='set' turns it on"
    assert len(scheduler.report.changed) == len(scheduler.paths) == 3


def cells(line):
    return [part.strip() for part in line.split("  ") if part.strip()]


@pytest.mark.slow("test_scheduler_drives_every_kind")
def test_stochastic_depth_of_transformers_is_driven():
    SwinDropPath = pytest.importorskip("transformers.models.swin.modeling_swin").SwinDropPath
    model = nn.Sequential(SwinDropPath(0.1), nn.Dropout(0.0), SwinDropPath(0.2))
    DropoutScheduler(model, constant(0.4))
    assert [model[0].drop_prob, model[1].p, model[2].drop_prob] == [0.2, 0.0, 0.4]
    fdt.convert(model)
    DropoutScheduler(model, constant(0.1))
    assert [model[0].p, model[1].p, model[2].p] == [0.05, 0.0, 0.1]

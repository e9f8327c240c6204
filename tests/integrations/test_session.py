"""What callbacks change when training begins, and put back when it ends, whoever else trains and however it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import fastdrop.torch as fdt
from fastdrop import schedules
from fastdrop.integrations.session import Session
from fastdrop.torch.runtime.context import is_enabled_everywhere

ALL = {"fuse": True, "convert": "seed", "schedule": schedules.linear(0.5, 0.1, 4)}


def model_and_classes():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.LSTM(8, 8, 2, dropout=0.5))
    return model, [type(module) for module in model.modules()]


def classes(model):
    return [type(module) for module in model.modules()]


def test_begin_and_end():
    model, before = model_and_classes()
    keys, texts = list(model.state_dict()), []
    session = Session(**ALL)
    for _ in range(2):
        session.begin(model, texts.append)
        assert is_enabled_everywhere()
        assert model[2].store == "seed"
        assert type(model).__name__ == "FusedSequential"
        assert list(model.state_dict()) == keys
        assert [session.set_step(step) for step in (0, 2, 2, 8)] == [0.5, 0.3, 0.3, 0.1]
        session.end()
        session.end()
        assert not is_enabled_everywhere()
        assert classes(model) == before
        assert model[2].p == model[3].dropout == 0.1
    assert [text.partition("\n")[0] for text in texts] == [  # once each
        "fastdrop, convert: 1 of 2 places",
        "fastdrop, fuse: 1 of 2 places",
        "fastdrop, schedule: 2 of 2 places",
    ]
    assert set(session.reports) == {"convert", "fuse", "schedule"}


def test_what_was_changed_before_stays():
    inner, _ = model_and_classes()
    fdt.convert(inner), fdt.fuse(inner)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), inner)
    before = classes(model)
    fdt.enable()
    try:
        session = Session(fuse=True, convert="seed")
        session.begin(model, str)
        assert inner[2].store == "seed"
        assert type(model).__name__ == "FusedSequential"
        session.end()
        assert is_enabled_everywhere()
        assert classes(model) == before
        assert inner[2].store == "bits"
    finally:
        fdt.disable()


def test_trainings_that_overlap():
    """Whatever the order in which they end, and if one of them begins again without an end or is thrown away."""
    first, second = Session(), Session()
    for ends in (first, second), (second, first):
        first.begin(nn.Dropout(), str)
        second.begin(nn.Dropout(), str)
        first.begin(nn.Dropout(), str)
        for session in ends:
            assert is_enabled_everywhere()
            session.end()
        assert not is_enabled_everywhere()
    model, before = model_and_classes()
    third = Session(fuse=True)
    third.begin(model, str)
    del third
    assert not is_enabled_everywhere()
    assert classes(model) == before


def test_what_is_not_asked_for():
    model, before = model_and_classes()
    session = Session(enable=False)
    session.begin(model, str)
    assert not is_enabled_everywhere()
    assert classes(model) == before
    assert session.set_step(3) is None
    assert session.reports == {}


def test_a_beginning_that_fails_changes_nothing():
    model, before = model_and_classes()
    session = Session(fuse=True, convert=True, schedule=lambda step: 2.0)
    with pytest.raises(ValueError, match="must be"):
        session.begin(model, str)
    assert not is_enabled_everywhere()
    assert classes(model) == before
    with pytest.raises(TypeError, match="schedule"):
        Session(schedule=0.1)
    for text, options in (
        ("must come with a schedule", {"mode": "set"}),
        ("mode must be", {"mode": "sat", "schedule": float}),
        ("convert must be", {"convert": "sead"}),
    ):
        with pytest.raises(ValueError, match=text):
            Session(**options)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_library_that_is_missing(name):
    """Importing the package imports no library, and its module says what to install."""
    code = f"""
import sys
import fastdrop.integrations
assert not {{"torch", "transformers", "lightning", "pytorch_lightning"}} & set(sys.modules)
class Session: pass
sys.modules["fastdrop.integrations.session"] = type(sys)("session")
sys.modules["fastdrop.integrations.session"].__dict__.update(Session=Session, LOGGED="")
for library in ("transformers.trainer_callback", "lightning", "pytorch_lightning"):
    sys.modules[library] = None
import fastdrop.integrations.{name}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: fastdrop.integrations.{name} needs ")
    assert done.stderr.splitlines()[-1].endswith(f": pip install {name}")

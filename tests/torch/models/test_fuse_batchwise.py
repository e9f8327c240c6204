"""`fuse` and batchwise dropout: the unfused model's numbers, with kept units alone computed."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import fastdrop.torch as fdt

from ..cases import under
from ..ops.compiling import compiled, fresh_compiler

__all__ = ["fresh_compiler"]


def mlp(*between):
    """Two hidden layers, each followed by these modules."""
    layers = []
    for n, m in ((7, 48), (48, 70)):
        layers += [nn.Linear(n, m), *(copy.deepcopy(module) for module in between)]
    return nn.Sequential(*layers, nn.Linear(70, 5))


def step(model, x):
    """The output and all gradients."""
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def assert_fused_equals(model, x, run, seed=0):
    fused = copy.deepcopy(model)
    assert run in str(fdt.fuse(fused))
    for one, other in zip(under(seed, step, fused, x), under(seed, step, model, x), strict=True):
        torch.testing.assert_close(one, other)
    return fused


@pytest.fixture
def x():
    return torch.randn(200, 7, requires_grad=True)


@pytest.mark.parametrize(
    "between",
    [(nn.ReLU(),), (nn.GELU("tanh"),), (nn.SiLU(),), (nn.Tanh(),), (nn.Sigmoid(),), ()],
    ids=lambda modules: type(modules[0]).__name__ if modules else "none",
)
def test_run_equals_the_modules(x, between):
    run = "FusedSequential: " + " + ".join(str(i) for i in range(len(between) * 2 + 5))
    assert_fused_equals(mlp(*between, fdt.BatchwiseDropout(0.5)), x, run)


def test_kept_units_alone_are_computed_and_only_in_training(x, monkeypatch):
    model = mlp(nn.ReLU(), fdt.BatchwiseDropout(0.5))
    fdt.fuse(model)
    widths = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: widths.append(tuple(w.shape)) or linear(x, w, b))
    model(x)
    (first, _), (second, columns), (_, last) = widths
    assert first == columns < 48
    assert second == last < 70
    widths.clear()
    model[2].eval()  # this one drops nothing, the other goes on
    model(x)
    assert widths[0] == (48, 7)
    assert widths[1][0] == widths[2][1] < 70
    widths.clear()
    full = [(48, 7), (70, 48), (5, 70)]
    model.eval()(x)
    assert widths == full
    widths.clear()
    model.train()
    model[1].register_forward_hook(lambda *_: None)
    model(x)  # the hook is called, and the second part still goes by itself
    assert widths[0] == full[0]
    assert widths[1][0] == widths[2][1] < 70
    assert type(fdt.unfuse(model)) is fdt.Report
    widths.clear()
    model(x)
    assert widths == full


def test_axes_dtypes_and_rates(x):
    model = mlp(nn.ReLU(), fdt.BatchwiseDropout(0.5))
    model[5].p = 1.0
    for given in (x, x[0], x.reshape(2, 100, 7), x[:0]):
        assert_fused_equals(model, given, "FusedSequential")
    assert_fused_equals(model.double(), x.double(), "FusedSequential")
    fdt.fuse(model)
    with pytest.raises(RuntimeError, match="shapes"):
        model(x.double()[:, :3])


def test_dropout_with_a_noise_shape(x):
    drop = fdt.Dropout(0.5, noise_shape=(1, None))
    model = nn.Sequential(nn.Linear(7, 48), nn.ReLU(), drop, nn.Linear(48, 5))
    assert "FusedSequential: 0 + 1 + 2 + 3" in str(fdt.fuse(model))
    alone = nn.Sequential(model[0], model[1], fdt.BatchwiseDropout(0.5), model[3])
    torch.testing.assert_close(under(3, model, x), under(3, alone, x))
    drop.noise_shape = (1, 48)
    torch.testing.assert_close(under(3, model, x), under(3, alone, x))
    drop.noise_shape = (1, 47)
    with pytest.raises(ValueError, match="noise_shape must be"):
        model(x)


def test_report_says_why_a_dropout_is_left():
    drop = fdt.BatchwiseDropout
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    cases = {
        "no Linear right before it, or before its activation": [nn.ReLU(), drop(), nn.Linear(4, 4)],
        "no Linear right after it": [nn.Linear(4, 4), drop(), nn.ReLU(), nn.Linear(4, 4)],
        "1 is not known to work element by element": [nn.Linear(4, 4), nn.Softmax(-1), drop(), nn.Linear(4, 4)],
        "2 takes another number of units": [nn.Linear(4, 4), drop(), nn.Linear(5, 4)],
        "1 has a seed": [nn.Linear(4, 4), drop(seed=3), nn.Linear(4, 4)],
        "2 has hooks": [nn.Linear(4, 4), drop(), hooked],
    }
    for reason, modules in cases.items():
        report = str(fdt.fuse(nn.Sequential(*modules)))
        assert f"left: {reason}" in report, report
        assert "Fused" not in report
    both = nn.Sequential(nn.Linear(4, 4), drop(), nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.1))
    assert "left: its Linear, 2, ends a run of batchwise dropout" in str(fdt.fuse(both))
    assert both(torch.ones(64, 4)).shape == (64, 4)
    apart = nn.Sequential(nn.Linear(4, 4), drop(), nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.1))
    assert "FusedSequential: 0 + 1 + 2, 3 + 4 + 5" in str(fdt.fuse(apart))


def test_compiled_pickled_and_scheduled(x):
    model = mlp(nn.ReLU(), fdt.BatchwiseDropout(0.5))
    fdt.fuse(model)
    copied = pickle.loads(pickle.dumps(model))
    wanted = under(2, model, x)
    torch.testing.assert_close(under(2, copied, x), wanted)
    torch.testing.assert_close(under(2, compiled(model), x), wanted)
    fdt.DropoutScheduler(model, lambda step: 0.0)
    assert model[2].p == 0.0
    torch.testing.assert_close(model(x), copied.eval()(x))


def test_neither_convert_nor_enable_makes_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    fdt.convert(model)
    with fdt.enabled():
        rows = model[1](torch.ones(8, 64))
    assert (rows != rows[0]).any()


def test_audit_knows_it():
    model = nn.Sequential(nn.Linear(9, 64), fdt.BatchwiseDropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 9))
    assert "variance" in str(fdt.audit(model))


def test_module_alone_is_dropout_with_a_shared_mask():
    x = torch.randn(3, 5, 40, requires_grad=True)
    drop = fdt.BatchwiseDropout(0.5, store="seed")
    y = under(1, drop, x)
    torch.testing.assert_close(y, under(1, fdt.dropout, x, 0.5, noise_shape=(1, 1, None)))
    assert repr(drop) == "BatchwiseDropout(p=0.5, inplace=False, store='seed')"
    assert drop.eval()(x) is x
    with pytest.raises(ValueError, match="store"):
        fdt.BatchwiseDropout(0.5, store="none")
    with pytest.raises(ValueError, match="probability"):
        fdt.BatchwiseDropout(1.5)

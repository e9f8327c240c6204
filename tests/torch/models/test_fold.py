"""Standard dropout folded into the weights that follow: the same output in evaluation, without the dropout."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn import functional as F

import fastdrop.torch as fdt
from fastdrop.torch.models.fold import fold_scaling

from ..module_cases import Calls


def standard(p=0.4, **options):
    return fdt.Dropout(p, scaling="standard", **options)


def outputs(model, *shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def calls(function, **modules):
    """A model of a function of itself and x, with a dropout ``drop``, a layer ``fc`` and more modules."""
    return Calls(function, **{"drop": standard(), "fc": nn.Linear(8, 2)} | modules)


def untraceable(self, x):
    return self.inner(x) if x.sum() < 1e9 else x


# A model, the shape of its input, and what of it takes a factor, how often.
FOLDED = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(8, 9), nn.ReLU(), standard(), nn.Linear(9, 7), standard(0.2), nn.Linear(7, 2)),
        (5, 8),
        {"3.weight": 1, "5.weight": 1},
    ),
    "cnn": (
        lambda: nn.Sequential(
            standard(),
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            standard(),
            nn.LeakyReLU(),
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.Dropout2d(0.1),
            nn.Flatten(),
            nn.Identity(),
            nn.Linear(16, 2),
        ),
        (5, 3, 8, 8),
        {"1.weight": 1, "9.weight": 1},
    ),
    "transposed": (lambda: nn.Sequential(standard(), nn.ConvTranspose1d(3, 4, 3)), (5, 3, 8), {"1.weight": 1}),
    "functions": (
        lambda: calls(
            lambda self, x: self.fc(F.adaptive_avg_pool2d(F.relu(F.max_pool2d(self.drop(x), 2)), 1).view(x.size(0), -1))
        ),
        (5, 8, 8, 8),
        {"fc.weight": 1},
    ),
    "shape read": (
        lambda: calls(lambda self, x: (lambda h: self.fc(h.relu().reshape(h.shape[0], h.size(1))))(self.drop(x))),
        (5, 8),
        {"fc.weight": 1},
    ),
    "two heads": (
        lambda: calls(lambda self, x: (lambda h: self.fc(h) + self.b(h.relu()))(self.drop(x)), b=nn.Linear(8, 2)),
        (5, 8),
        {"fc.weight": 1, "b.weight": 1},
    ),
    "one dropout, twice in a row": (
        lambda: calls(lambda self, x: self.fc(self.drop(self.drop(x).relu()))),
        (5, 8),
        {"fc.weight": 2},
    ),
    "two dropouts in a row": (lambda: nn.Sequential(standard(), standard(), nn.Linear(8, 2)), (5, 8), {"2.weight": 2}),
    "sequence in what can't be traced": (
        lambda: Calls(untraceable, inner=nn.Sequential(nn.Linear(8, 8), nn.Sequential(standard(), nn.Linear(8, 2)))),
        (5, 8),
        {"inner.1.1.weight": 1},
    ),
    "constants, arguments by name": (
        lambda: calls(lambda self, x: self.fc(input=self.drop(input=x)) + torch.ones(2)),
        (5, 8),
        {"fc.weight": 1},
    ),
    "p of 0": (lambda: nn.Sequential(standard(0.0), nn.Linear(8, 2)), (5, 8), {}),
    "p of 1": (lambda: nn.Sequential(standard(1.0), nn.Linear(8, 2)), (5, 8), {"1.weight": 1}),
}


@pytest.mark.parametrize(("make", "shape", "scaled"), FOLDED.values(), ids=FOLDED)
def test_folded_model_gives_the_same_without_dropout(make, shape, scaled):
    model = make().eval()
    rates = {module.p for module in model.modules() if isinstance(module, fdt.Dropout)}
    before, expected, attributes = weights(model), outputs(model, *shape), list(vars(model))
    report = fold_scaling(model)
    assert list(vars(model)) == attributes
    torch.testing.assert_close(outputs(model, *shape), expected)
    assert not any(isinstance(module, fdt.Dropout) for module in model.modules())
    assert all(not module.training for module in model.modules())
    changed = [row for row in report if "standard" in row.before]
    assert changed == report.changed
    assert len(report.changed) >= 1
    for name, weight in weights(model).items():
        if name in scaled and len(rates) == 1:
            torch.testing.assert_close(weight, before[name] * (1 - min(rates)) ** scaled[name])
        assert torch.equal(weight, before[name]) is (name not in scaled)


def test_factor_is_that_of_the_p_really_used():
    p = 0.3 + 2.0**-34
    model = nn.Sequential(standard(p), nn.Linear(4, 4, dtype=torch.float64)).eval()
    before = model[1].weight.detach().clone()
    fold_scaling(model)
    assert torch.equal(model[1].weight, before * (1 - round(p * 2**32) / 2**32))


def shared_weight():
    model = nn.Sequential(standard(), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[1].weight
    return model


def with_hook(index, register="register_forward_hook"):
    model = nn.Sequential(standard(), nn.ReLU(), nn.Linear(8, 2))
    getattr(model[index], register)(lambda *_: None)
    return model


class MyLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x + 1)


# Models that stay as they are, and why.
LEFT = {
    "output": (lambda: nn.Sequential(nn.Linear(8, 8), standard()), "output goes to output"),
    "residual": (
        lambda: calls(lambda self, x: (lambda h: self.fc(h) + h)(self.drop(x)), fc=nn.Linear(8, 8)),
        "output goes to add",
    ),
    "batch norm": (lambda: nn.Sequential(standard(), nn.BatchNorm1d(8), nn.Linear(8, 2)), "output goes to 1"),
    "subclass": (lambda: nn.Sequential(standard(), MyLinear(8, 2)), "output goes to add"),
    "transposed by attribute": (
        lambda: calls(lambda self, x: self.fc(self.drop(x).T), fc=nn.Linear(5, 2)),
        "output goes to T",
    ),
    "layer called twice": (
        lambda: calls(lambda self, x: self.fc(self.drop(x)) + self.fc(x)),
        "fc is called, or its weight used, elsewhere too",
    ),
    "weight of two layers": (shared_weight, "1 is called, or its weight used, elsewhere too"),
    "weight read": (
        lambda: calls(lambda self, x: self.fc(self.drop(x)) + self.fc.weight.norm()),
        "fc is called, or its weight used, elsewhere too",
    ),
    "one of two places": (
        lambda: calls(lambda self, x: self.drop(self.fc(self.drop(x)))),
        "output goes to output",
    ),
    "dropout in place": (
        lambda: nn.Sequential(nn.Linear(8, 8), standard(inplace=True), nn.Linear(8, 2)),
        "1 writes in place",
    ),
    "relu in place": (
        lambda: calls(
            lambda self, x: (lambda h: self.fc(F.relu(self.drop(h), inplace=True)) + h.sum())(self.a(x)),
            a=nn.Linear(8, 8),
        ),
        "relu writes in place",
    ),
    "hook on the dropout": (lambda: with_hook(0), "0 has hooks"),
    "hook between": (lambda: with_hook(1), "1 has hooks"),
    "hook before the layer": (lambda: with_hook(2, "register_forward_pre_hook"), "2 has hooks"),
    "not called": (lambda: calls(lambda self, x: x + 1), "no layer follows"),
    "end of a sequence in what can't be traced": (
        lambda: Calls(untraceable, inner=nn.Sequential(nn.Linear(8, 2), standard())),
        "output goes to output",
    ),
    "the model itself": (standard, "no layer follows"),
    "torch's": (lambda: nn.Sequential(nn.Dropout(0.4), nn.Linear(8, 2)), "nothing to fold"),
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT)
def test_left_with_the_reason(make, reason):
    model = make().eval()
    before, expected, text = weights(model), outputs(model, 5, 8), repr(model)
    report = fold_scaling(model)
    (row,) = report
    assert row.after is None
    assert reason in row.reason
    assert reason in str(report)
    assert repr(model) == text
    assert torch.equal(outputs(model, 5, 8), expected)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_dropout_held_under_two_names_is_replaced_under_both():
    model = calls(lambda self, x: self.fc(self.a(x)), a=standard())
    model.drop = model.a
    (row,) = fold_scaling(model.eval())
    assert row.path == "drop"
    assert row.after == "Identity(), fc.weight * 0.6"
    assert model.fc.weight.is_leaf
    assert type(model.a) is type(model.drop) is nn.Identity


def test_refuses_a_model_in_training():
    model = nn.Sequential(standard(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"^model must be in evaluation mode.*call model\.eval\(\) first$"):
        fold_scaling(model)
    assert isinstance(model[0], fdt.Dropout)

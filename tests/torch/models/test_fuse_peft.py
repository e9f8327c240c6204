"""`fuse` of LoRA layers of peft: a stand-in has the class name, the attributes and the forward that peft documents."""

from __future__ import annotations

import copy
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import fastdrop.torch as fdt
from fastdrop.torch.models.fuse import peft_layers
from fastdrop.torch.models.fuse.peft_layers import LINEAR

from ..cases import assert_equal, saved_tensors, under

WIDTH, OUT, RANK, P = 12, 9, 3, 0.4


class Linear(nn.Module):
    """peft's ``lora.Linear`` of one or several adapters, without what only initialisation and merging need."""

    def __init__(self, base_layer, adapters=("default",), p=P, lora_bias=False):
        super().__init__()
        self.base_layer = base_layer
        drop = nn.Dropout(p) if p else nn.Identity()
        self.lora_A = nn.ModuleDict({name: nn.Linear(base_layer.in_features, RANK, bias=False) for name in adapters})
        self.lora_B = nn.ModuleDict(
            {name: nn.Linear(RANK, base_layer.out_features, bias=lora_bias) for name in adapters}
        )
        self.lora_dropout = nn.ModuleDict({name: copy.deepcopy(drop) for name in adapters})
        self.scaling = dict.fromkeys(adapters, 2.0)
        self.use_dora = dict.fromkeys(adapters, False)
        self.lora_variant = {}
        self.merged_adapters = []
        self.active_adapters = list(adapters)
        self.disable_adapters = False
        self.forwards = 0  # how often the original runs

    @property
    def merged(self):
        return bool(self.merged_adapters)

    def forward(self, x, *args, **kwargs):
        self.forwards += 1
        kwargs.pop("adapter_names", None)
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.lora_A:
                x = x.to(self.lora_A[name].weight.dtype)
                result = result + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return result.to(dtype)


def as_in_peft(cls):
    """The class under peft's name."""
    cls.__module__, cls.__qualname__ = LINEAR
    cls.forward.__module__, cls.forward.__qualname__ = LINEAR[0], f"{LINEAR[1]}.forward"
    return cls


as_in_peft(Linear)


def layer(**options):
    torch.manual_seed(1)
    base = nn.Linear(WIDTH, OUT, dtype=torch.float64).requires_grad_(False)
    return Linear(base, **options).double()


def step(model, x, **options):
    """Result and gradients, under one seed."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = under(3, model, x, **options)
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.fixture
def x():
    return torch.randn(4, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def calls_of_lora_linear():
    return mock.patch.object(peft_layers, "lora_linear", wraps=peft_layers.lora_linear)


def test_fused_layer_computes_the_same_and_keeps_less(x):
    model = nn.Sequential(layer())
    plain = copy.deepcopy(model)
    report = fdt.fuse(model)
    assert [(row.path, row.before, row.after) for row in report.changed] == [("0", "Linear", "FusedLinear")]
    assert not report.left
    with fdt.enabled(), calls_of_lora_linear() as calls:
        for actual, expected in zip(step(model, x), step(plain, x), strict=True):
            torch.testing.assert_close(actual, expected)
    assert calls.call_count == 1
    assert model[0].forwards == 0
    with saved_tensors() as kept:
        y = model(x.requires_grad_())
    parameters = {p.data_ptr() for p in model.parameters()}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in parameters) == x.nbytes + 8
    del y
    assert [row.after for row in fdt.unfuse(model).changed] == ["Linear"]
    assert type(model[0]) is Linear


def merge(model):
    model.merged_adapters = ["default"]


def disable(model):
    model.disable_adapters = True


def cast(model):
    model.lora_A.float()
    model.lora_B.float()


def add(model):
    model.active_adapters = ["default", "other"]
    other = layer(adapters=("other",))
    for name in ("lora_A", "lora_B", "lora_dropout"):
        getattr(model, name).update(getattr(other, name))
    model.scaling["other"] = 1.0


def deactivate(model):
    model.active_adapters = ["of another layer"]


def add_bias(model):
    model.lora_B["default"] = nn.Linear(RANK, OUT).double()


def replace_base(model):
    model.base_layer = nn.Sequential(model.base_layer)


CHANGES = (
    merge, disable, cast, add, deactivate, add_bias, replace_base, nn.Module.eval
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_original_forward_runs_for_what_changed_since(change, x):
    model = layer()
    fdt.fuse(model)
    change(model)
    plain = copy.deepcopy(model)
    fdt.unfuse(plain)
    with calls_of_lora_linear() as calls:
        assert_equal(under(3, model, x), under(3, plain, x))
    assert calls.call_count == 0
    assert model.forwards == 1


def test_original_forward_runs_for_other_arguments(x):
    model = layer()
    fdt.fuse(model)
    model(x, adapter_names=["default"] * 4)
    assert model.forwards == 1


def test_dtypes_under_autocast(x):
    """Adapters of float32 around a base layer of bfloat16, as peft makes them."""
    model = layer().float()
    model.base_layer.bfloat16()
    plain = copy.deepcopy(model)
    fdt.fuse(model)
    with torch.autocast("cpu", torch.bfloat16), fdt.enabled():
        actual, expected = under(3, model, x.float()), under(3, plain, x.float())
    assert model.forwards == 0
    assert actual.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_compiled(x):
    model = layer()
    fdt.fuse(model)
    expected = step(model, x)
    ours = torch.compile(model, backend="aot_eager", fullgraph=True)
    for actual, e in zip(step(ours, x), expected, strict=True):
        torch.testing.assert_close(actual, e)


class Conv1D(nn.Linear):
    """A base layer of another class."""


def dora():
    model = layer()
    model.use_dora["default"] = True
    return model


def other_variant():
    model = layer()
    model.lora_variant["default"] = object()
    return model


LEFT = {
    "2 adapters are active, not one": lambda: layer(adapters=("one", "two")),
    "its adapter has no dropout": lambda: layer(p=0.0),
    "its adapter has a bias": lambda: layer(lora_bias=True),
    "base_layer is a Conv1D, not nn.Linear": lambda: Linear(Conv1D(WIDTH, OUT)),
    "its adapter is a variant of LoRA, such as DoRA": dora,
    "its adapter is a variant of LoRA": other_variant,
}


@pytest.mark.parametrize("reason", LEFT)
def test_layers_that_are_left(reason):
    model = LEFT[reason]()
    report = fdt.fuse(model)
    assert not report.changed
    assert [row.path for row in report.left] == [""]
    assert report.left[0].reason.startswith(reason)
    assert type(model) is Linear


class Older(Linear):
    def forward(self, x):
        return self.base_layer(x)


def test_another_version_is_left():
    model = layer()
    model.__class__ = as_in_peft(Older)
    (row,) = fdt.fuse(model).left
    assert row.reason == "its forward is that of an unknown version of peft"


def test_converted_dropout_is_fused_too(x):
    model = layer()
    fdt.convert(model)
    plain = copy.deepcopy(model)
    fdt.fuse(model)
    for actual, expected in zip(step(model, x), step(plain, x), strict=True):
        torch.testing.assert_close(actual, expected)
    assert model.forwards == 0

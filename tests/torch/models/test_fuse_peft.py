"""`fuse` of LoRA layers of peft, in small models that peft itself made."""

from __future__ import annotations

import copy
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from torch import nn

import fastdrop.torch as fdt
from fastdrop.torch.models.fuse import peft_layers

from ..cases import assert_equal, saved_tensors, under

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers, about what they are given
WIDTH, OUT, RANK, P = 12, 9, 3, 0.4
Linear = peft.tuners.lora.Linear


def adapted(model, targets=("0",), **options):
    """A model with adapters that compute something before they are trained."""
    torch.manual_seed(1)
    options = {"r": RANK, "lora_dropout": P, "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets), **options)).train()


def layer(base=None, **options):
    """One layer in a model of peft."""
    return adapted(nn.Sequential(base or nn.Linear(WIDTH, OUT)), **options).double()


def inner(model):
    return model.base_model.model[0]


def llama():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def step(model, *inputs, **options):
    """Result and gradients, under one seed."""
    model.zero_grad()
    y = under(3, model, *inputs, **options)
    y = y if isinstance(y, torch.Tensor) else y.logits
    y.sin().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_same_step(model, plain, *inputs, calls=1):
    """The fused model gives what the other one does, and calls `lora_linear` so often."""
    with fdt.enabled(), calls_of_lora_linear() as made:
        actual = step(model, *inputs)
        assert made.call_count == calls
        torch.testing.assert_close(actual, step(plain, *inputs))


@pytest.fixture
def x():
    return torch.randn(4, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def calls_of_lora_linear():
    return mock.patch.object(peft_layers, "lora_linear", wraps=peft_layers.lora_linear)


def test_fused_model_computes_the_same(tmp_path):
    """A transformer: its steps, what it saves, and what comes back."""
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    torch.manual_seed(0)
    base, tokens = llama().double(), torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(1))
    model = adapted(copy.deepcopy(base), targets).double()
    plain = copy.deepcopy(model)
    report = fdt.fuse(model)
    assert [row.path.rpartition(".")[2] for row in report.changed] == targets
    assert_same_step(model, plain, tokens, calls=4)

    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).double()
    assert len(fdt.fuse(loaded).changed) == 4
    assert_same_step(loaded, plain, tokens, calls=4)

    assert len(fdt.unfuse(model).changed) == 4
    assert_same_step(model, plain, tokens, calls=0)
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain.modules(), strict=True))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
def test_fused_layer_keeps_less(x, options):
    model = layer(**options)
    plain = copy.deepcopy(model)
    report = fdt.fuse(model)
    assert [(row.before, row.after) for row in report.changed] == [("Linear", "FusedLinear")]
    assert not [row for row in report.left if row.path.startswith("base_model.model.")]
    assert_same_step(model, plain, x)
    with saved_tensors() as kept:
        y = model(x.requires_grad_())
    parameters = {p.data_ptr() for p in model.parameters()}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in parameters) == x.nbytes + 8
    del y


def add_other(model):
    model.add_adapter("other", peft.LoraConfig(target_modules=["0"], r=2, lora_dropout=P, init_lora_weights=False))
    model.double()


def activate_both(model):
    add_other(model)
    model.base_model.set_adapter(["default", "other"])


def cast(model):
    inner(model).lora_A.float()
    inner(model).lora_B.float()


def replace_base(model):
    inner(model).base_layer = nn.Sequential(inner(model).base_layer)


CHANGES = {
    "merged": lambda model: model.merge_adapter(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "cast": cast,
    "two adapters": activate_both,
    "of another layer": lambda model: inner(model).set_adapter("absent"),
    "base replaced": replace_base,
    "evaluated": nn.Module.eval,
}


@pytest.mark.parametrize("change", CHANGES)
def test_original_forward_runs_for_what_changed_since(change, x):
    model = layer()
    fdt.fuse(model)
    CHANGES[change](model)
    plain = copy.deepcopy(model)
    fdt.unfuse(plain)
    with calls_of_lora_linear() as calls:
        assert_equal(under(3, model, x), under(3, plain, x))
    assert calls.call_count == 0


def test_fused_layer_follows_peft(x):
    """Through merging, a block without adapters, the other of two adapters, and its end."""
    model = layer()
    plain = copy.deepcopy(model)
    fdt.fuse(model)
    for network in (model, plain):
        network.merge_adapter()
        network.unmerge_adapter()
        with network.disable_adapter(), calls_of_lora_linear() as calls:
            network(x)
        assert calls.call_count == 0
        add_other(network)
    plain.load_state_dict(model.state_dict())
    assert_same_step(model, plain, x)
    for network in (model, plain):
        network.set_adapter("other")
    assert_same_step(model, plain, x)
    expected = model.eval()(x)
    merged = model.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), expected)


def test_original_forward_runs_for_batches_of_several_adapters(x):
    model = layer()
    fdt.fuse(model)
    with calls_of_lora_linear() as calls:
        inner(model)(x, adapter_names=["default"] * 2 + ["__base__"] * 2)
    assert calls.call_count == 0


def test_dtypes_under_autocast(x):
    """Adapters of float32 around a base layer of bfloat16, as peft makes them."""
    model = layer(nn.Linear(WIDTH, OUT)).float()
    inner(model).base_layer.bfloat16()
    plain = copy.deepcopy(model)
    fdt.fuse(model)
    with torch.autocast("cpu", torch.bfloat16), fdt.enabled(), calls_of_lora_linear() as calls:
        actual, expected = under(3, model, x.float()), under(3, plain, x.float())
    assert calls.call_count == 1
    assert actual.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_compiled(x):
    model = layer()
    fdt.fuse(model)
    expected = step(inner(model), x)
    ours = torch.compile(inner(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(ours, x), expected)


def two_active():
    model = layer()
    activate_both(model)
    return model


LEFT = {
    "2 adapters are active, not one": two_active,
    "its adapter has no dropout": lambda: layer(lora_dropout=0.0),
    "its adapter has a bias": lambda: layer(lora_bias=True),
    "base_layer is a Conv1D, not nn.Linear": lambda: layer(
        transformers.pytorch_utils.Conv1D(OUT, WIDTH), fan_in_fan_out=True
    ),
    "its adapter is a variant of LoRA, such as DoRA": lambda: layer(use_dora=True),
}


@pytest.mark.parametrize("reason", LEFT)
def test_layers_that_are_left(reason):
    model = LEFT[reason]()
    before = type(inner(model))
    report = fdt.fuse(model)
    assert not report.changed
    (row,) = [row for row in report.left if row.path.startswith("base_model.model.0")]
    assert row.path == "base_model.model.0"
    assert row.reason.startswith(reason)
    assert type(inner(model)) is before


@pytest.mark.parametrize("base", [nn.Embedding(WIDTH, OUT), nn.Conv2d(2, 3, 1)], ids=lambda base: type(base).__name__)
def test_dropout_of_layers_around_other_modules_is_left(base):
    model = layer(base)
    report = fdt.fuse(model)
    assert not report.changed
    (row,) = [row for row in report.left if row.path.startswith("base_model.model.0")]
    assert (row.path, row.before) == ("base_model.model.0.lora_dropout.default", f"Dropout(p={P}, inplace=False)")
    assert row.reason.startswith("not in a part that is known")


def test_another_version_is_left():
    class Older(Linear):
        def forward(self, x):
            return self.base_layer(x)

    Older.__module__, Older.__qualname__ = Linear.__module__, Linear.__qualname__
    Older.forward.__module__, Older.forward.__qualname__ = Linear.__module__, Linear.forward.__qualname__
    model = layer()
    inner(model).__class__ = Older
    (row,) = fdt.fuse(inner(model)).left
    assert row.reason == "its forward is that of an unknown version of peft"


def test_converted_dropout_is_fused_too(x):
    model = layer()
    fdt.convert(model)
    plain = copy.deepcopy(model)
    fdt.fuse(model)
    assert_same_step(model, plain, x)

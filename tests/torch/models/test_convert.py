"""convert and revert: which modules become fastdrop's, what stays of them, and what the report says."""

from __future__ import annotations

from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import fastdrop.torch as fdt

from ..cases import under
from ..module_cases import COPIES

seeded = partial(under, 5)


class Custom(nn.Dropout):
    """A subclass whose forward is its own."""

    def forward(self, input):
        return input * 3


class Block(nn.Module):
    """A user's module that holds dropout as an attribute."""

    def __init__(self, p):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return self.drop(self.linear(x))


def state_of(model):
    """All that can be seen of a model but for the modules and parameters themselves, in order."""
    own = ("_modules", "_parameters", "_buffers")
    modules = [
        (name, type(module), [(key, value) for key, value in vars(module).items() if key not in own])
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    return repr(model), modules, list(model.state_dict())


def nested():
    shared = nn.Dropout(0.3)
    return nn.Sequential(
        nn.Linear(8, 8),
        nn.Dropout(0.1),
        nn.Sequential(nn.ReLU(), nn.Sequential(nn.Dropout(0.2, inplace=True))),
        nn.ModuleDict({"a": nn.ModuleList([nn.Dropout(0.25), shared]), "b": shared}),
        Block(0.4),
    )


PATHS = {"1": 0.1, "2.1.0": 0.2, "3.a.0": 0.25, "3.a.1": 0.3, "3.b": 0.3, "4.drop": 0.4}


def test_convert_reaches_every_depth():
    model = nested()
    model[3].eval()
    before = [(path, module, module.training) for path, module in model.named_modules(remove_duplicate=False)]
    report = fdt.convert(model, store="seed")
    for path, p in PATHS.items():
        module = model.get_submodule(path)
        assert type(module) is fdt.Dropout, path
        assert (module.p, module.inplace, module.store) == (p, path == "2.1.0", "seed")
    assert [(path, m, m.training) for path, m in model.named_modules(remove_duplicate=False)] == before
    assert [row.path for row in report] == [path for path in PATHS if path != "3.b"]  # it is 3.a.1, once in the report
    assert not report.left


def test_convert_converts_the_model_itself_and_its_children():
    """A user may have hung a module on a dropout module."""
    model = nn.Dropout(0.1)
    model.inner = nn.Dropout(0.2)
    report = fdt.convert(model)
    assert [row.path for row in report] == ["", "inner"]
    assert "(the model)" in str(report)
    assert type(model) is type(model.inner) is fdt.Dropout
    assert len(fdt.revert(model)) == 2
    assert type(model) is type(model.inner) is nn.Dropout


def test_convert_keeps_hooks():
    drop, seen = nn.Dropout(0.5), []
    drop.register_forward_pre_hook(lambda module, inputs: seen.append(("pre", type(module))))
    drop.register_forward_hook(lambda module, inputs, output: seen.append(("forward", type(module))))
    drop.register_full_backward_hook(lambda module, dx, dy: seen.append(("backward", type(module))))
    model = nn.Sequential(nn.Linear(8, 8), drop)
    for change, cls in ((fdt.convert, fdt.Dropout), (fdt.revert, nn.Dropout)):
        change(model)
        model(torch.ones(3, 8)).sum().backward()
        assert seen == [(name, cls) for name in ("pre", "forward", "backward")]
        seen.clear()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Dropout", (4, 5)),
        ("Dropout1d", (4, 5, 3)),
        ("Dropout2d", (4, 5, 3, 2)),
        ("Dropout3d", (4, 5, 3, 2, 2)),
        ("AlphaDropout", (4, 5)),
        ("FeatureAlphaDropout", (4, 5, 3)),
    ],
)
def test_convert_knows_all_of_torchs_dropouts(name, shape):
    """Each becomes ours of the same name, and has its values; `revert` makes it torch's again."""
    theirs, ours, x = getattr(nn, name), getattr(fdt, name), torch.ones(shape)
    module = theirs(0.25, inplace=True).eval()
    before = state_of(module)
    (row,) = fdt.convert(module, store="seed")
    assert type(module) is ours
    assert (row.before, row.after) == (before[0], f"{name}(p=0.25, inplace=True, store='seed')")
    assert (module.p, module.inplace, module.training, module.store) == (0.25, True, False, "seed")
    assert module(x) is x
    expected = seeded(ours(0.25), x.clone())
    assert torch.equal(seeded(module.train(), x.clone()), expected)
    assert not torch.equal(expected, x)
    (row,) = fdt.revert(module.eval())
    assert row.after == before[0]
    assert state_of(module) == before


def replaced():
    """As wrappers do that keep the old bound method: the class would change and what runs would not."""
    module = nn.Dropout(0.5)
    module.forward = module.forward
    return module


LEFT = {
    "a subclass of nn.Dropout;": lambda: Custom(0.5),
    "a subclass of nn.Dropout2d;": type("CustomFeatures", (nn.Dropout2d,), {}),
    "attention; use fdt.enable()": lambda: nn.MultiheadAttention(8, 2, dropout=0.5),
    "between layers inside torch; use fdt.enable()": lambda: nn.LSTM(8, 8, 2, dropout=0.5),
    "its forward was replaced": replaced,
}


@pytest.mark.parametrize("reason", LEFT)
def test_convert_leaves_what_is_not_torchs_own_dropout_and_says_why(reason):
    model = nn.ModuleDict({"other": LEFT[reason]()})
    before = state_of(model)
    report = fdt.convert(model)
    (row,) = report.left
    assert (row.path, row.after) == ("other", None)
    assert reason in row.reason
    assert row.before.startswith(type(model["other"]).__name__)
    assert f"left: {row.reason}" in str(report)
    assert not report.changed
    assert len(fdt.revert(model)) == 0
    assert state_of(model) == before


def test_convert_does_not_list_what_draws_no_dropout_of_torchs():
    modules = nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.LSTM(8, 8, 2), fdt.Dropout(0.5), nn.Identity()
    assert len(fdt.convert(nn.Sequential(*modules))) == 0


def test_convert_changes_no_bit_in_evaluation():
    """The fused path that torch takes for a TransformerEncoder in evaluation included."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), 2)
    for model in (encoder, nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Dropout(0.2, inplace=True))):
        model.eval()
        with torch.no_grad():
            before = model(x := torch.randn(2, 5, 8))
            fdt.convert(model)
            assert torch.equal(model(x), before)


def test_convert_twice_is_harmless_and_revert_restores_all():
    model = nested().append(Custom(0.1)).append(nn.Dropout2d(0.1)).append(nn.LSTM(8, 8, 2, dropout=0.1))
    changed = [path for path in PATHS if path != "3.b"] + ["6"]
    model[1].register_forward_hook(lambda *_: None)
    model[1].note = "mine"
    before = state_of(model)
    assert [row.path for row in fdt.convert(model, store="seed").changed] == changed
    once = state_of(model)
    assert once != before
    assert not fdt.convert(model, store="seed").changed
    assert state_of(model) == once
    report = fdt.revert(model)
    assert state_of(model) == before
    assert [row.path for row in report] == changed
    assert all(row.before.endswith("store='seed')") and "store" not in row.after for row in report)


def test_store_is_changed_and_refused():
    model = nn.Sequential(nn.Dropout(0.1))
    fdt.convert(model)
    (row,) = fdt.convert(model, store="seed")
    assert (row.before[-7:], row.after[-7:], model[0].store) == ("'bits')", "'seed')", "seed")
    with pytest.raises(ValueError, match="store"):
        fdt.convert(model, store="words")


def test_revert_leaves_modules_that_were_built_as_ours():
    model = nn.Sequential(fdt.Dropout(0.1, store="seed"), nn.Dropout(0.2))
    fdt.convert(model)
    fdt.revert(model)
    assert [type(module) for module in model] == [fdt.Dropout, nn.Dropout]
    assert model[0].store == "seed"
    assert len(fdt.revert(model)) == 0


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_a_converted_model_run_and_revert(duplicate):
    model = nested()
    fdt.convert(model, store="seed")
    twin = duplicate(model)
    assert repr(twin) == repr(model)
    assert twin[3]["b"] is twin[3]["a"][1]
    assert torch.equal(seeded(twin[4].drop, torch.ones(100)), seeded(model[4].drop, torch.ones(100)))
    fdt.revert(twin)
    assert state_of(twin) == state_of(nested())
    assert type(model[1]) is fdt.Dropout


def test_report_prints_a_table():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.ModuleDict({"long": Custom(0.25, True)}))
    report = fdt.convert(model, store="seed")
    assert str(report).splitlines() == [
        "module  before                         after",
        "1       Dropout(p=0.1, inplace=False)  Dropout(p=0.1, inplace=False, store='seed')",
        "2.long  Custom(p=0.25, inplace=True)   left: a subclass of nn.Dropout; its forward may be its own",
    ]
    assert repr(report) == str(report)
    for function in (fdt.convert, fdt.revert):
        report = function(nn.Linear(2, 2))
        assert str(report) == "no module with dropout"
        assert (len(report), list(report), report.changed, report.left) == (0, [], [], [])


def test_compiled_model_is_compiled_anew_after_convert():
    """The graph made for nn.Dropout must not be run for ours, nor the other way round."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Dropout(0.5))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.ones(200)
    before = seeded(compiled, x)
    report = fdt.convert(compiled)
    assert [row.after for row in report] == [repr(fdt.Dropout(0.5))]
    wanted = seeded(fdt.dropout, x, 0.5)
    assert torch.equal(seeded(compiled, x), wanted)
    assert not torch.equal(before, wanted)
    fdt.revert(compiled)
    assert torch.equal(seeded(compiled, x), before)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_fx_quantisation_after_revert_is_that_of_torchs_dropout():
    """FX knows torch's dropout by its class, and puts a pair of quantize and dequantize around ours."""
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    def quantised(change=lambda model: None):
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)).eval(), torch.ones(4, 8)
        change(model)
        prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        return [str(node.target) for node in quantize_fx.convert_fx(prepared).graph.nodes]

    assert quantised().count("dequantize") == 1
    assert quantised(lambda model: (fdt.convert(model), fdt.revert(model))) == quantised()
    assert quantised(fdt.convert).count("dequantize") == 2  # if this fails the guide's sentence can go

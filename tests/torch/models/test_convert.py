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

STORES = ("bits", "seed")
CLASSES = {
    nn.Dropout: fdt.Dropout,
    nn.Dropout1d: fdt.Dropout1d,
    nn.Dropout2d: fdt.Dropout2d,
    nn.Dropout3d: fdt.Dropout3d,
    nn.AlphaDropout: fdt.AlphaDropout,
    nn.FeatureAlphaDropout: fdt.FeatureAlphaDropout,
}


class Custom(nn.Dropout):
    """A subclass whose forward is its own."""

    def forward(self, input):
        return input * 3


class CustomFeatures(nn.Dropout2d):
    """One of another of torch's classes."""


class Block(nn.Module):
    """A user's module that holds dropout as an attribute."""

    def __init__(self, p):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return self.drop(self.linear(x))


def classes(model):
    """Of all modules, by every name they have."""
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def attributes(model):
    """Of all modules but for those that are themselves modules or parameters."""
    own = ("_modules", "_parameters", "_buffers")
    return {
        name: {key: value for key, value in module.__dict__.items() if key not in own}
        for name, module in model.named_modules()
    }


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


@pytest.mark.parametrize("store", STORES)
def test_convert_reaches_every_depth(store):
    model = nested()
    before = dict(model.named_modules(remove_duplicate=False))
    report = fdt.convert(model, store=store)
    for path, p in PATHS.items():
        module = model.get_submodule(path)
        assert type(module) is fdt.Dropout, path
        assert (module.p, module.inplace, module.store) == (p, path == "2.1.0", store)
    after = dict(model.named_modules(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[path] is before[path] for path in before)
    assert [row.path for row in report] == [path for path in PATHS if path != "3.b"]  # it is 3.a.1, once in the report
    assert not report.left


def test_convert_converts_the_model_itself():
    model = nn.Dropout(0.3)
    report = fdt.convert(model)
    assert type(model) is fdt.Dropout
    (row,) = report
    assert row.path == ""
    assert "(the model)" in str(report)
    assert len(fdt.revert(model)) == 1
    assert type(model) is nn.Dropout


def test_convert_is_seen_by_whoever_holds_the_module():
    shared = nn.Dropout(0.3)
    held, other = [shared], nn.Sequential(shared)
    fdt.convert(nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])}))
    assert type(held[0]) is fdt.Dropout
    assert other[0] is shared
    fdt.revert(other)
    assert type(shared) is nn.Dropout


def test_convert_keeps_the_training_state_of_each_module():
    model = nested()
    model[3].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    fdt.convert(model)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert not model.get_submodule("3.b").training
    fdt.revert(model)
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_convert_keeps_hooks():
    drop, seen = nn.Dropout(0.5), []
    drop.register_forward_pre_hook(lambda module, inputs: seen.append(("pre", type(module))))
    handle = drop.register_forward_hook(lambda module, inputs, output: seen.append(("forward", type(module))))
    drop.register_full_backward_hook(lambda module, dx, dy: seen.append(("backward", type(module))))
    model = nn.Sequential(nn.Linear(8, 8), drop)
    fdt.convert(model)
    model(torch.ones(3, 8)).sum().backward()
    assert seen == [(name, fdt.Dropout) for name in ("pre", "forward", "backward")]
    seen.clear()
    handle.remove()
    fdt.revert(model)
    model(torch.ones(3, 8)).sum().backward()
    assert seen == [(name, nn.Dropout) for name in ("pre", "backward")]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("theirs", CLASSES, ids=lambda cls: cls.__name__)
def test_convert_knows_all_of_torchs_dropouts(theirs, store):
    """Each becomes ours of the same name, and has its values; `revert` makes it torch's again."""
    module, x = theirs(0.25, inplace=True).eval(), torch.ones(4, 5, 3, 2, 2)[..., 0, 0]
    if theirs in (nn.Dropout2d, nn.Dropout3d):
        x = torch.ones(4, 5, 3, 2, 2)[(..., 0)[theirs is nn.Dropout3d :]]
    before, attributes = repr(module), list(vars(module))
    (row,) = fdt.convert(module, store=store)
    assert type(module) is CLASSES[theirs]
    assert (row.before, row.after) == (before, f"{theirs.__name__}(p=0.25, inplace=True, store={store!r})")
    assert (module.p, module.inplace, module.training, module.store) == (0.25, True, False, store)
    assert module(x) is x
    expected = seeded(CLASSES[theirs](0.25), x.clone())
    assert torch.equal(seeded(module.train(), x.clone()), expected)
    assert not torch.equal(expected, x)
    (row,) = fdt.revert(module)
    assert (type(module), row.after, list(vars(module))) == (theirs, before, attributes)


LEFT = {
    "subclass": (lambda: Custom(0.5), "a subclass of nn.Dropout;"),
    "subclass of another": (lambda: CustomFeatures(0.5), "a subclass of nn.Dropout2d;"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, dropout=0.5), "enable()"),
    "LSTM": (lambda: nn.LSTM(8, 8, 2, dropout=0.5), "enable()"),
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT)
def test_convert_leaves_what_is_not_torchs_own_dropout_and_says_why(make, reason):
    module = make()
    model = nn.ModuleDict({"other": module})
    before = list(module.__dict__)
    report = fdt.convert(model)
    (row,) = report
    assert (row.path, row.after) == ("other", None)
    assert reason in row.reason
    assert row.before.startswith(type(module).__name__)
    assert f"left: {row.reason}" in str(report)
    assert report.left == [row]
    assert not report.changed
    assert type(module) is type(make())
    assert list(module.__dict__) == before
    assert len(fdt.revert(model)) == 0


def test_convert_leaves_a_module_whose_forward_was_replaced():
    """As wrappers do that keep the old bound method: the class would change and what runs would not."""
    module = nn.Dropout(0.5)
    inner = module.forward
    module.forward = lambda x: inner(x)
    (row,) = fdt.convert(nn.Sequential(module))
    assert type(module) is nn.Dropout
    assert (row.path, row.after) == ("0", None)
    assert "forward" in row.reason


@pytest.mark.parametrize(
    "module",
    [nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.LSTM(8, 8, 2), fdt.Dropout(0.5), nn.Identity()],
    ids=lambda module: type(module).__name__,
)
def test_convert_does_not_list_what_draws_no_dropout_of_torchs(module):
    assert len(fdt.convert(nn.Sequential(module))) == 0


@pytest.mark.parametrize("grad", [True, False])
def test_convert_changes_no_bit_in_evaluation(grad):
    """The fused path that torch takes for a TransformerEncoder in evaluation included."""
    x = torch.randn(2, 5, 8)
    for model in (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), 2),
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), Block(0.9), nn.Dropout(0.2, inplace=True)),
    ):
        model.eval()
        with torch.set_grad_enabled(grad):
            before = model(x)
            fdt.convert(model)
            assert torch.equal(model(x), before)
            fdt.revert(model)
            assert torch.equal(model(x), before)


def test_convert_twice_is_harmless():
    model = nested()
    before, was = repr(model), classes(model)
    assert len(fdt.convert(model, store="seed")) == 5
    once, modules = repr(model), attributes(model)
    assert len(fdt.convert(model, store="seed")) == 0
    assert repr(model) == once
    assert attributes(model) == modules
    assert len(fdt.revert(model)) == 5
    assert (repr(model), classes(model)) == (before, was)


# ---- revert ----


def test_revert_restores_classes_repr_and_attributes():
    model = nested().append(Custom(0.1)).append(nn.Dropout2d(0.1)).append(nn.LSTM(8, 8, 2, dropout=0.1))
    changed = [path for path in PATHS if path != "3.b"] + ["6"]
    model[1].register_forward_hook(lambda *_: None)
    model[1].note = "mine"
    before = repr(model), classes(model), attributes(model), list(model.state_dict())
    order = [list(module.__dict__) for module in model.modules()]
    fdt.convert(model, store="seed")
    assert repr(model) != before[0]
    report = fdt.revert(model)
    assert (repr(model), classes(model), attributes(model), list(model.state_dict())) == before
    assert [list(module.__dict__) for module in model.modules()] == order
    assert [row.path for row in report] == changed
    assert all(row.before.endswith("store='seed')") and "store" not in row.after for row in report)


def test_revert_leaves_modules_that_were_built_as_ours():
    model = nn.Sequential(fdt.Dropout(0.1, store="seed"), nn.Dropout(0.2))
    fdt.convert(model)
    fdt.revert(model)
    assert [type(module) for module in model] == [fdt.Dropout, nn.Dropout]
    assert model[0].store == "seed"
    assert len(fdt.revert(model)) == 0


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_a_converted_model_run_and_revert(duplicate):
    original, model = nested(), nested()
    fdt.convert(model, store="seed")
    twin = duplicate(model)
    assert repr(twin) == repr(model)
    assert twin[3]["b"] is twin[3]["a"][1]
    assert torch.equal(seeded(twin[4].drop, torch.ones(100)), seeded(model[4].drop, torch.ones(100)))
    fdt.revert(twin)
    assert (repr(twin), classes(twin)) == (repr(original), classes(original))
    assert type(model[1]) is fdt.Dropout
    assert [list(module.__dict__) for module in twin.modules()] == [
        list(module.__dict__) for module in original.modules()
    ]


# ---- the report ----


def test_report_prints_a_table():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.ModuleDict({"long": Custom(0.25, True)}))
    report = fdt.convert(model, store="seed")
    assert str(report).splitlines() == [
        "module  before                         after",
        "1       Dropout(p=0.1, inplace=False)  Dropout(p=0.1, inplace=False, store='seed')",
        "2.long  Custom(p=0.25, inplace=True)   left: a subclass of nn.Dropout; its forward may be its own",
    ]
    assert repr(report) == str(report)


def test_report_of_a_model_without_dropout():
    for function in (fdt.convert, fdt.revert):
        report = function(nn.Linear(2, 2))
        assert str(report) == "no module with dropout"
        assert (len(report), list(report), report.changed, report.left) == (0, [], [], [])


# ---- beside other parts of torch ----


def test_compiled_model_is_compiled_anew_after_convert():
    """The graph made for nn.Dropout must not be run for ours, nor the other way round."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Dropout(0.5))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.ones(200)
    before = seeded(compiled, x)
    report = fdt.convert(compiled)
    assert [row.after for row in report] == [repr(fdt.Dropout(0.5))]
    wanted = seeded(lambda x: fdt.dropout(x, 0.5), x)
    assert torch.equal(seeded(compiled, x), wanted)
    assert not torch.equal(before, wanted)
    fdt.revert(compiled)
    assert torch.equal(seeded(compiled, x), before)
    torch.compiler.reset()


def test_children_of_a_converted_module_are_reached():
    """A user may have hung a module on a dropout module."""
    outer = nn.Dropout(0.1)
    outer.inner = nn.Dropout(0.2)
    report = fdt.convert(nn.Sequential(outer))
    assert [row.path for row in report] == ["0", "0.inner"]
    assert len(fdt.revert(nn.Sequential(outer))) == 2
    assert type(outer.inner) is nn.Dropout

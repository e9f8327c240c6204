"""fastdrop.torch.Dropout in the place of torch.nn.Dropout, and models converted to it and back."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest

import fastdrop as fd

torch = pytest.importorskip("torch")

from torch import nn

import fastdrop.torch as fdt

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


@pytest.fixture(autouse=True)
def torch_state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def seeded(module, x, seed=5):
    torch.manual_seed(seed)
    return module(x)


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


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


COPIES = [copy.deepcopy, pickled, saved_and_loaded]


# ---- the module ----


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_module_is_the_function(p, inplace, store):
    module = fdt.Dropout(p, inplace, store=store)
    y = seeded(module, torch.ones(5, 100))
    assert torch.equal(y, seeded(lambda x: fdt.dropout(x, p), torch.ones(5, 100)))
    x = torch.ones(5, 100)
    assert (module(x) is x) is inplace
    leaf = torch.ones(5, 100, requires_grad=True)
    y = module(leaf * 1)
    y.sum().backward()
    assert torch.equal(leaf.grad, y.detach())


@pytest.mark.parametrize("store", STORES)
def test_module_keeps_what_store_says(store):
    kept = []
    x = torch.ones(10_000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        fdt.Dropout(0.5, store=store)(x)
    assert kept == [4 * math.ceil(10_000 / 32) if store == "bits" else 8]


def test_module_has_the_defaults_of_torchs():
    module, torchs = fdt.Dropout(), nn.Dropout()
    assert isinstance(module, nn.Dropout)
    assert (module.p, module.inplace, module.training) == (torchs.p, torchs.inplace, torchs.training)
    assert module.store == "bits"
    assert not list(module.parameters())
    assert not list(module.buffers())
    assert nn.Dropout.__constants__ == module.__constants__


def test_module_repr():
    assert repr(fdt.Dropout()) == "Dropout(p=0.5, inplace=False, store='bits')"
    assert repr(fdt.Dropout(0.1, True, store="seed")) == "Dropout(p=0.1, inplace=True, store='seed')"
    assert fdt.Dropout(0.1).extra_repr() == "p=0.1, inplace=False, store='bits'"
    assert "(0): Dropout(p=0.5, inplace=False, store='bits')" in str(nn.Sequential(fdt.Dropout()))


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle", "torch.save"])
def test_module_copies(duplicate):
    module = fdt.Dropout(0.3, True, store="seed").eval()
    twin = duplicate(module)
    assert type(twin) is fdt.Dropout
    assert twin is not module
    assert repr(twin) == repr(module)
    assert not twin.training
    x = torch.ones(100)
    assert twin(x) is x
    assert torch.equal(seeded(twin.train(), x.clone()), seeded(module.train(), x.clone()))


def test_module_has_an_empty_state_dict_that_loads_both_ways_strictly():
    ours, torchs = nn.Sequential(nn.Linear(4, 4), fdt.Dropout(0.1)), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    assert not fdt.Dropout().state_dict()
    for source, target in ((ours, torchs), (torchs, ours)):
        nn.init.normal_(source[0].weight)
        assert list(source.state_dict()) == list(target.state_dict())
        result = target.load_state_dict(source.state_dict(), strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert torch.equal(source[0].weight, target[0].weight)


def test_module_follows_train_and_eval():
    model = nn.Sequential(fdt.Dropout(0.5))
    x = torch.ones(100)
    assert not torch.equal(model(x), x)
    assert model.eval()(x) is x
    assert not torch.equal(model.train()(x), x)
    assert fdt.Dropout(0.0)(x) is x


def test_module_takes_a_p_that_changes():
    module, x = fdt.Dropout(0.5), torch.ones(100)
    module.p = 1.0
    assert not module(x).any()
    module.p = 0.0
    assert module(x) is x
    module.p = 1.5
    with pytest.raises(ValueError, match=r"^dropout probability has to be between 0 and 1, but got 1\.5$"):
        module(x)


@pytest.mark.parametrize("p", [-0.1, 1.1, 2, -1, math.inf, torch.tensor(1.5)], ids=str)
def test_module_refuses_p_as_torchs_does(p):
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1") as torchs:
        nn.Dropout(p)
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1") as ours:
        fdt.Dropout(p)
    assert str(ours.value) == str(torchs.value)


@pytest.mark.parametrize("p", ["0.5", None], ids=repr)
def test_module_refuses_p_of_another_type(p):
    with pytest.raises(TypeError):
        nn.Dropout(p)
    with pytest.raises(TypeError):
        fdt.Dropout(p)


@pytest.mark.parametrize("p", [0, 1, True, False, torch.tensor(0.5)], ids=repr)
def test_module_runs_with_any_p_that_torchs_runs_with(p):
    x = torch.ones(100)
    assert nn.Dropout(p)(x).shape == (100,)
    y = fdt.Dropout(p)(x)
    if p in (0, 1):
        assert torch.equal(y, nn.Dropout(p)(x))


def test_module_traced_by_fx_follows_eval():
    """As one of torch's own: a module in the graph, and not a call that drops for ever."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    fdt.convert(model)
    traced, x = torch.fx.symbolic_trace(model), torch.ones(64, 4)
    torch.manual_seed(0)
    dropped = traced(x)
    torch.manual_seed(0)
    assert torch.equal(dropped, model(x))
    assert (dropped == 0).any()
    traced.eval()
    assert torch.equal(traced(x), model.eval()(x))
    assert not (traced(x) == 0).any()


def test_module_refuses_an_unknown_store():
    with pytest.raises(ValueError, match=r"^store must be one of 'bits', 'seed', but got 'bytes'$"):
        fdt.Dropout(0.5, store="bytes")
    with pytest.raises(TypeError):
        fdt.Dropout(0.5, False, "seed")  # by name only, as torch may add arguments


def test_module_runs_hooks():
    module, seen = fdt.Dropout(0.5), []
    module.register_forward_pre_hook(lambda module, inputs: seen.append("pre") or (inputs[0] * 2,))
    module.register_forward_hook(lambda module, inputs, output: seen.append("forward") or output + 1)
    module.register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    x = torch.ones(100, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert seen == ["pre", "forward", "backward"]
    assert set(y.tolist()) == {1.0, 5.0}
    assert set(x.grad.tolist()) == {0.0, 4.0}


# ---- convert ----


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


def test_convert_keeps_attributes_that_users_set():
    model = nn.Sequential(nn.Dropout(0.5))
    model[0].note = "mine"
    fdt.convert(model)
    assert model[0].note == "mine"
    fdt.revert(model)
    assert model[0].note == "mine"


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
    "GRU": (lambda: nn.GRU(8, 8, 2, dropout=0.5), "enable()"),
    "RNN": (lambda: nn.RNN(8, 8, 2, dropout=0.5), "enable()"),
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


def test_convert_of_a_transformer():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), 2)
    report = fdt.convert(model)
    layers = [f"layers.{i}" for i in range(2)]
    drops = [f"{layer}.{name}" for layer in layers for name in ("dropout", "dropout1", "dropout2")]
    assert [row.path for row in report.changed] == drops
    assert [row.path for row in report.left] == [f"{layer}.self_attn" for layer in layers]
    assert all("enable()" in row.reason for row in report.left)
    model(torch.randn(2, 5, 8)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


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


@pytest.mark.parametrize("store", STORES)
def test_converted_model_trains_as_the_function_does(store):
    """Bit for bit under the same seed, gradients included."""
    model = nn.Sequential(nn.Linear(8, 30), nn.Dropout(0.5, inplace=True), nn.ReLU(), nn.Dropout(0.1), nn.Linear(30, 2))
    fdt.convert(model, store=store)
    x = torch.randn(50, 8)
    results = []
    for network in (model, lambda x: model[4](fdt.dropout(fdt.dropout(model[0](x), 0.5).relu(), 0.1))):
        model.zero_grad()
        y = seeded(network, x)
        y.square().sum().backward()
        results.append([y.detach()] + [parameter.grad.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *results))


def test_converted_model_no_longer_runs_torchs_dropout(monkeypatch):
    calls = []
    monkeypatch.setattr(nn.functional, "dropout", lambda x, *rest: calls.append(rest) or x)
    model = nn.Sequential(nn.Dropout(0.5))
    model(torch.ones(3))
    assert len(calls) == 1
    fdt.convert(model)
    model(torch.ones(3))
    assert len(calls) == 1
    fdt.revert(model)
    model(torch.ones(3))
    assert len(calls) == 2


@pytest.mark.parametrize("stores", [("bits", "bits"), ("seed", "seed")])
def test_convert_twice_is_harmless(stores):
    first, second = stores
    model = nested()
    before, was = repr(model), classes(model)
    assert len(fdt.convert(model, store=first)) == 5
    once, modules = repr(model), attributes(model)
    assert len(fdt.convert(model, store=second)) == 0
    assert repr(model) == once
    assert attributes(model) == modules
    assert len(fdt.revert(model)) == 5
    assert (repr(model), classes(model)) == (before, was)


def test_convert_refuses_an_unknown_store_and_changes_nothing():
    model = nested()
    before = repr(model)
    with pytest.raises(ValueError, match=r"^store must be one of 'bits', 'seed', but got 'bytes'$"):
        fdt.convert(model, store="bytes")
    assert repr(model) == before


def test_convert_leaves_the_state_dict_as_it_is():
    model, fresh = nested(), nested()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fdt.convert(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for source, target in ((model, fresh), (fresh, model)):
        result = target.load_state_dict(source.state_dict(), strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys


# ---- revert ----


@pytest.mark.parametrize("store", STORES)
def test_revert_restores_classes_repr_and_attributes(store):
    model = nested().append(Custom(0.1)).append(nn.Dropout2d(0.1)).append(nn.LSTM(8, 8, 2, dropout=0.1))
    changed = [path for path in PATHS if path != "3.b"] + ["6"]
    model[1].register_forward_hook(lambda *_: None)
    before = repr(model), classes(model), attributes(model), list(model.state_dict())
    order = [list(module.__dict__) for module in model.modules()]
    fdt.convert(model, store=store)
    assert repr(model) != before[0]
    report = fdt.revert(model)
    assert (repr(model), classes(model), attributes(model), list(model.state_dict())) == before
    assert [list(module.__dict__) for module in model.modules()] == order
    assert [row.path for row in report] == changed
    assert all(row.before.endswith(f"store='{store}')") and "store" not in row.after for row in report)


def test_revert_leaves_modules_that_were_built_as_ours():
    model = nn.Sequential(fdt.Dropout(0.1, store="seed"), nn.Dropout(0.2))
    fdt.convert(model)
    fdt.revert(model)
    assert [type(module) for module in model] == [fdt.Dropout, nn.Dropout]
    assert model[0].store == "seed"
    assert len(fdt.revert(model)) == 0


def test_revert_of_a_part():
    model = nested()
    fdt.convert(model)
    fdt.revert(model[2])
    assert type(model.get_submodule("2.1.0")) is nn.Dropout
    assert type(model.get_submodule("4.drop")) is fdt.Dropout


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("store", STORES)
def test_copies_of_a_converted_model_run_and_revert(duplicate, store):
    original, model = nested(), nested()
    fdt.convert(model, store=store)
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


def test_copy_of_a_model_made_before_is_not_converted():
    model = nested()
    twin = copy.deepcopy(model)
    fdt.convert(model)
    assert type(twin[1]) is nn.Dropout


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


def test_report_rows():
    model = nn.Sequential(nn.Dropout(0.1), Custom(0.2), nn.Dropout(0.3))
    report = fdt.convert(model)
    assert isinstance(report, fdt.Report)
    assert len(report) == 3
    assert list(report) == report.rows
    assert [row.path for row in report.changed] == ["0", "2"]
    assert [row.path for row in report.left] == ["1"]
    first = report.changed[0]
    assert (first.before, first.after) == (repr(nn.Dropout(0.1)), repr(fdt.Dropout(0.1)))
    assert first.reason == ""


# ---- beside other parts of torch ----


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_is_compiled_anew_after_convert(backend):
    """The graph made for nn.Dropout must not be run for ours, nor the other way round."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Dropout(0.5))
    compiled = torch.compile(model, backend=backend)
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


def test_converted_model_runs_under_any_backend(backend):
    model = nn.Sequential(nn.Dropout(0.5))
    fdt.convert(model)
    y = seeded(model, torch.ones(1000))
    with fd.use_backend("numpy"):
        assert torch.equal(seeded(model, torch.ones(1000)), y)


def test_convert_reaches_a_frozen_or_wrapped_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).requires_grad_(False)
    wrapped = nn.DataParallel(model)
    report = fdt.convert(wrapped)
    assert [row.path for row in report] == ["module.1"]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_convert_of_an_ema_copy():
    """AveragedModel copies the model deeply: each is converted and reverted by itself."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    fdt.convert(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    assert type(average.module[1]) is fdt.Dropout
    fdt.revert(model)
    assert type(average.module[1]) is fdt.Dropout
    average.update_parameters(model)
    assert len(fdt.revert(average)) == 1


def test_children_of_a_converted_module_are_reached():
    """A user may have hung a module on a dropout module."""
    outer = nn.Dropout(0.1)
    outer.inner = nn.Dropout(0.2)
    report = fdt.convert(nn.Sequential(outer))
    assert [row.path for row in report] == ["0", "0.inner"]
    assert len(fdt.revert(nn.Sequential(outer))) == 2
    assert type(outer.inner) is nn.Dropout

"""mc_dropout and mc_predict: what is turned on, which masks samples have, and what is said about them."""

from __future__ import annotations

import copy
import gc
import io
import math
import sys
import threading
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn import functional as F

import fastdrop.torch as fdt
from fastdrop.torch.models import enable
from fastdrop.torch.runtime import context
from fastdrop.torch.runtime import seeds as seed_source
from fastdrop.torch.tools import monte_carlo, sampling
from fastdrop.torch.tools.monte_carlo import Prediction, mc_dropout, mc_predict

from ..cases import assert_equal
from ..module_cases import Calls as Net
from ..module_cases import DropPath


def mlp(drop=fdt.Dropout):
    layers = [nn.Linear(6, 16), nn.ReLU(), drop(0.5), nn.Linear(16, 16), nn.ReLU(), drop(0.3), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


def cnn():
    norm = nn.BatchNorm2d(4)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    features = [nn.Conv2d(2, 4, 3), norm, nn.ReLU(inplace=True), fdt.Dropout2d(0.3), nn.Conv2d(4, 4, 3)]
    return nn.Sequential(*features, fdt.DropBlock2d(0.2, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))


def first(layer):
    """The first of what a layer returns."""
    return Net(lambda self, x: self.layer(x)[0], layer=layer)


def goes_where_the_numbers_say(self, x):
    """Which can't be mapped."""
    y = self.drop(x)
    return self.drop(y) if y.sum() > 0 else y


def maps(self, x):
    return torch.func.vmap(self.drop, randomness="different")(self.drop(x))


def with_dropout(forward):
    return lambda: Net(forward, drop=fdt.Dropout(0.5))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True), 2)


MODELS = {
    "MLP": (mlp, (4, 6)),
    "MLP of torch's": (lambda: mlp(nn.Dropout), (4, 6)),
    "in place, Gaussian": (
        lambda: nn.Sequential(
            nn.Linear(6, 6), fdt.Dropout(0.5, inplace=True), fdt.GaussianDropout(), fdt.DropPath(0.2)
        ),
        (4, 6),
    ),
    "CNN": (cnn, (2, 2, 8, 8)),
    "LSTM": (lambda: first(nn.LSTM(6, 5, 2, dropout=0.5)), (4, 2, 6)),
    "variational LSTM": (
        lambda: first(fdt.VariationalLSTM(6, 5, dropout_input=0.3, dropout_recurrent=0.3, dropout_output=0.3)),
        (3, 2, 6),
    ),
    "DropConnect": (lambda: fdt.DropConnect(nn.Linear(6, 3)), (4, 6)),
    "DropConnect GRU": (lambda: first(fdt.DropConnect(nn.GRU(6, 5))), (4, 2, 6)),
    "transformer": (encoder, (3, 5, 8)),
    "functional": (lambda: Net(lambda self, x: F.dropout(self.linear(x), 0.4), linear=nn.Linear(6, 6)), (4, 6)),
    "control flow": (with_dropout(goes_where_the_numbers_say), (4, 6)),
    "noise": (with_dropout(lambda self, x: self.drop(x) + torch.randn(3)), (4, 3)),
    "map": (with_dropout(maps), (4, 6)),
}


def built(name):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    return make().eval(), torch.randn(shape)


def modes(model):
    return {path: module.training for path, module in model.named_modules()}


def turned_on(model):
    return {path for path, training in modes(model).items() if training}


class Calls:
    """How often a model is called."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.count += 1


# ---- mc_dropout ----


ZOO = {
    "ours": fdt.Dropout,
    "torchs": nn.FeatureAlphaDropout,
    "path": DropPath,
    "attention": lambda: nn.MultiheadAttention(8, 2, dropout=0.1),
    "rnn": lambda: nn.GRU(8, 8, 2, dropout=0.1),
    "connect": lambda: fdt.DropConnect(nn.Linear(8, 8)),
    "variational": lambda: fdt.VariationalGRU(8, 8),
}
NORMS = {
    "norm": lambda: nn.BatchNorm1d(8),
    "sync": lambda: nn.SyncBatchNorm(8),
    "instance": lambda: nn.InstanceNorm1d(8, track_running_stats=True),
}
QUIET = {"linear": lambda: nn.Linear(8, 8), "rnn without": lambda: nn.LSTM(8, 8, 2), "noise": nn.RReLU}


def test_mc_dropout_turns_on_dropout_alone_or_what_a_filter_picks_but_no_norm():
    model = nn.ModuleDict({name: make() for name, make in (ZOO | NORMS | QUIET).items()}).eval()
    model["again"] = model["ours"]
    with mc_dropout(model):
        rates = {f"variational.dropout_{name}" for name in ("input", "recurrent", "output")}
        assert turned_on(model) == set(ZOO) - {"variational"} | rates
    assert not turned_on(model)
    asked = []
    with mc_dropout(model, lambda path, module: asked.append(path) or path != "linear"):
        assert turned_on(model) == set(modes(model)) - {*NORMS, "linear"}
    assert {"ours", "again", "linear"} < set(asked)
    with pytest.raises(TypeError, match="filter must be callable, but got str"), mc_dropout(model, "5"):
        pass


def test_mc_dropout_restores_modes_after_nesting_and_an_error():
    model = mlp().eval()
    model[0].train()
    model[5].train()
    before = modes(model)

    @mc_dropout(model)
    def decorated():
        return turned_on(model)

    @mc_dropout(model)
    def fails():
        assert turned_on(model) == decorated() == {"0", "2", "5"}
        model[2].eval()
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fails()
    assert modes(model) == before


@pytest.mark.parametrize("path", [None, "layers.1.dropout", "layers.0.self_attn"])
def test_mc_dropout_reaches_into_fused_transformers(path):
    torch.manual_seed(0)
    model, x = encoder().eval(), torch.randn(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        assert_equal(*(model(x, src_key_padding_mask=mask) for _ in range(2)))
        with mc_dropout(model, path and (lambda at, _: at == path)):
            assert path is None or turned_on(model) == {path, "", "layers.0", "layers.1"}
            assert not any(module.training for module in model.modules() if isinstance(module, nn.LayerNorm))
            assert not torch.allclose(model(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask))
        with mc_dropout(nn.ModuleList([model, fdt.Dropout()]), lambda at, _: at == "1"):
            assert not turned_on(model)


# What a forward reads ``training`` for is read off the source of its class.


def early(self, x):
    if not self.training:
        return x
    return F.dropout(x, 0.5)


def of_dropout(self, x):
    return F.dropout(x, self.lent.p, self.lent.training)


def always(self, x):
    return F.dropout(x, 0.5)


def early_and_more(self, x):
    if not self.training:
        return x
    x = x + 1.0
    return F.dropout(x, 0.5)


def skips(self, x):
    if self.p == 0.0 or not self.training:
        return x
    return x * x.new_empty(x.shape[0], 1).bernoulli_(self.p) / self.p


def by_name(self, x):
    mode = self.training
    return F.dropout(x, 0.5, mode)


def dropped_as(module, x):
    return F.dropout(x, 0.5, module.training)


def by_helper(self, x):
    return dropped_as(self, x)


def by_string(self, x):
    return F.dropout(x, 0.5, getattr(self, "training"))  # noqa: B009


def of_another(self, x):
    return F.dropout(x, 0.5, self.child.training)


def of_class(forward):
    """A module of a class of its own."""
    module = type(forward.__name__, (nn.Module,), {"forward": forward, "p": 0.5})()
    if forward is of_dropout:
        module.lent = nn.Dropout(0.5)
    if forward is of_another:
        module.child = nn.Linear(3, 3)
    return module


@pytest.mark.parametrize("forward", [early, of_dropout, always])
def test_modules_that_can_be_told_drop(forward, recwarn):
    assert mc_predict(of_class(forward), torch.ones(9, 3), 30, seed=1, strict=True).std.all()
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("forward", [early_and_more, skips, by_name, by_helper, by_string, of_another])
def test_modules_that_can_not_be_told_are_named(forward):
    """Beside dropout too, which leaves no other trace of them."""
    model, x, name = nn.Sequential(of_class(forward), nn.Dropout(0.5)), torch.ones(9, 3), forward.__name__
    with pytest.warns(UserWarning, match=rf"stay as they are: 0 \({name}\); to turn them on") as caught:
        mc_predict(model, x, 3)
    assert len(caught) == 1
    with (
        pytest.warns(UserWarning, match="stay as they are"),
        pytest.raises(RuntimeError, match=rf"nothing was dropped .*these may drop .*the model \({name}\)"),
    ):
        mc_predict(model[0], x, 3, strict=True)
    assert mc_predict(model[0], x, 30, seed=1, strict=True, filter=lambda path, module: True).std.all()


# ---- the samples ----


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_the_same_in_any_batch(name):
    model, x = built(name)
    alone, together = (mc_predict(model, x, 12, seed=5, batch=batch, keep_samples=True) for batch in (1, 4))
    assert len(alone.samples.flatten(1).unique(dim=0)) > 8
    torch.testing.assert_close(together.samples, alone.samples)
    torch.testing.assert_close(together.mean, alone.mean)
    torch.testing.assert_close(together.std, alone.std, rtol=1e-4, atol=1e-6)
    assert not turned_on(model)


@pytest.mark.parametrize("batch", [1, 3, None])
def test_masks_are_a_function_of_seed_sample_and_call(batch):
    model, x = nn.Sequential(fdt.Dropout(0.3), fdt.Dropout(0.5, store="seed")), torch.randn(5, 40)

    def seed(sample, call):
        return seed_source.mix(seed_source.mix(2**63 + 9, sample + 1), call + 1)

    samples = mc_predict(model, x, 9, seed=2**63 + 9, batch=batch, keep_samples=True).samples
    for s, y in enumerate(samples):
        assert_equal(y, fdt.dropout(fdt.dropout(x, 0.3, seed=seed(s, 0)), 0.5, seed=seed(s, 1)))


def test_a_model_that_samples_another_has_the_same_samples_in_any_batch():
    inner = nn.Sequential(fdt.Dropout(0.5), fdt.Dropout2d(0.5), nn.Tanh())
    model = Net(
        lambda self, x: mc_predict(self.inner, self.drop(x), 5, seed=1).mean + self.drop(x),
        drop=fdt.Dropout(0.5),
        inner=inner,
    )
    x = torch.randn(1, 1, 4, 6)
    one, two, many = (mc_predict(model, x, 9, seed=3, batch=batch, keep_samples=True).samples for batch in (1, 2, None))
    torch.testing.assert_close(two, one)
    torch.testing.assert_close(many, one)


@pytest.mark.parametrize(("batch", "randomness"), [(1, "same"), (None, "different")])
def test_a_map_around_sampling_has_the_masks_of_the_seed(randomness, batch, recwarn):
    x = torch.randn(3, 8)
    model = nn.Sequential(fdt.Dropout(0.5), nn.Tanh())
    sample = lambda row: mc_predict(model, row, 6, seed=1, batch=batch)  # noqa: E731
    mapped = torch.func.vmap(lambda row: (sample(row).mean, sample(row).std), randomness=randomness)(x)
    for i, row in enumerate(x):
        alone = sample(row)
        torch.testing.assert_close((mapped[0][i], mapped[1][i]), (alone.mean, alone.std))
    assert not [str(warning.message) for warning in recwarn]


def test_seeds_mix_alike_as_numbers_and_as_arrays():
    seeds = [0, 1, 2**63, 2**64 - 1]
    offsets = [1, 2, 77, 2**64 - 1]
    many = seed_source.mix(np.array(seeds, np.uint64)[:, None], np.array(offsets, np.uint64))
    assert many.tolist() == [[seed_source.mix(seed, offset) for offset in offsets] for seed in seeds]
    assert seed_source.mix(7, np.array(offsets, np.uint64)).tolist() == [seed_source.mix(7, o) for o in offsets]


@pytest.mark.parametrize(("name", "batch"), [("MLP of torch's", None), ("noise", 1)])
def test_a_given_seed_gives_the_samples_and_leaves_torchs_generator_alone(name, batch):
    model, x = built(name)
    before = torch.get_rng_state()
    first, again, other = (mc_predict(model, x, 5, seed=seed, batch=batch, keep_samples=True) for seed in (3, 3, 4))
    assert_equal(torch.get_rng_state(), before)
    assert_equal(again.samples, first.samples)
    assert not (other.samples == first.samples).all(0).any()


def test_without_a_seed_torchs_generator_gives_one_number():
    model, x = built("MLP")
    torch.manual_seed(8)
    first, after = mc_predict(model, x, 5).mean, torch.get_rng_state()
    torch.manual_seed(8)
    number = int(torch.empty((), dtype=torch.int64).random_())
    assert_equal(torch.get_rng_state(), after)
    assert_equal(mc_predict(model, x, 5, seed=number).mean, first)
    assert not torch.equal(mc_predict(model, x, 5).mean, first)


def test_seeds_of_the_models_own_and_of_other_threads_stay():
    def forward(self, x):
        thread = threading.Thread(target=lambda: elsewhere.append(seed_source.sample_seeds()))
        thread.start()
        thread.join()
        return fdt.dropout(self.drop(x), 0.5, seed=4)

    elsewhere, model = [], Net(forward, drop=fdt.Dropout(0.5))
    samples = mc_predict(model, torch.ones(40), 6, batch=1, keep_samples=True).samples
    assert not samples[:, fdt.dropout(torch.ones(40), 0.5, seed=4) == 0].any()
    assert elsewhere == [None] * 6
    assert seed_source.sample_seeds() is None


@pytest.mark.parametrize("call", [1, 3])
def test_an_error_of_any_sample_surfaces_and_leaves_nothing_behind(call):
    def fail(*_):
        if calls.count == call:
            raise ZeroDivisionError("the model's own")

    model = nn.Sequential(fdt.Dropout(), nn.BatchNorm1d(3)).train()
    calls, state = Calls(model), torch.get_rng_state()
    model[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="the model's own"):
        mc_predict(model, torch.ones(2, 3), seed=1, batch=1)
    assert turned_on(model) == set(modes(model))
    assert seed_source.sample_seeds() is None
    assert_equal(torch.get_rng_state(), state)


# ---- passes ----


@pytest.mark.parametrize(
    ("samples", "batch", "passes"), [(1, None, 1), (2, None, 2), (50, None, 3), (50, 8, 8), (5, 1, 5)]
)
def test_samples_share_passes(samples, batch, passes):
    model, x = built("MLP")
    calls = Calls(model)
    mc_predict(model, x, samples, batch=batch)
    assert calls.count == passes


def test_what_comes_before_the_first_dropout_is_computed_once_in_a_pass():
    model, x = built("MLP")
    batched = {}

    def note(path):
        return lambda module, arguments: batched.setdefault(path, []).append(
            torch._C._functorch.is_batchedtensor(arguments[0])
        )

    for path in ("0", "3"):
        model.get_submodule(path).register_forward_pre_hook(note(path))
    mc_predict(model, x, 9)
    assert batched == {"0": [False] * 3, "3": [False, True, False]}


def test_a_pass_has_as_many_samples_as_have_room(monkeypatch):
    model, x = built("MLP")
    activations = 4 * (4 * 16 * 6 + 4 * 3)  # bytes that the seven modules return
    activations += 2 * (8 + 4 * 16 // 8)  # and the seeds and masks of two of them
    monkeypatch.setattr(sampling, "PASS_BYTES", 5 * (activations + sampling.STATISTICS_BYTES * 12) + 100)
    calls = Calls(model)
    mc_predict(model, x, 22)
    assert calls.count == 1 + 4 + 1
    monkeypatch.setattr(sampling, "PASS_BYTES", 1)
    mc_predict(model, x, 21)
    assert calls.count == 6 + 21
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("name", "batch"), [("noise", 3), ("LSTM", 3), ("control flow", None)])
def test_what_can_not_be_mapped_or_might_be_shared_runs_sample_by_sample(name, batch):
    """Alone; again with torch's dropout rerouted, or mapped in vain; then the others."""
    model, x = built(name)
    calls = Calls(model)
    mc_predict(model, x, 6, batch=batch)
    assert calls.count == 1 + 1 + 5


def test_dropout_out_of_sight_of_a_map_is_refused():
    """Of a layer that nothing mapped goes into: torch runs it outside of the map, and all samples would be one."""
    model, x = built("LSTM")
    seeds = seed_source.SampleSeeds(1)
    seeds.begin(0, 4)
    with (
        torch.no_grad(),
        mc_dropout(model),
        fdt.enabled(),
        seed_source.draw_from(seeds),
        pytest.raises(RuntimeError, match="vmap"),
    ):
        torch.func.vmap(lambda _: model(x), randomness="different")(torch.empty(4))


def test_samples_do_not_pile_up():
    """The most memory that tensors shaped like the output hold at the start of any pass."""
    model, x = nn.Sequential(fdt.Dropout(0.5), nn.Linear(6, 977)), torch.randn(2, 6)

    def peak(samples):
        held = []

        def note(*_):
            tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape[-1:] == (977,)]
            held.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))

        handle = model.register_forward_pre_hook(note)
        mc_predict(model, x, samples, batch=4)
        handle.remove()
        return max(held)

    gc.freeze()  # what is there already is not looked through, nor need it be later
    assert peak(32) == peak(16)


# ---- around the model ----


def test_the_model_runs_in_evaluation_but_for_dropout_and_gets_its_modes_back():
    model, x = built("CNN")
    expected = mc_predict(model, x, 5, seed=2)
    model.train()
    model[0].eval()
    before, state = modes(model), {name: value.clone() for name, value in model.state_dict().items()}
    prediction = mc_predict(model, x, 5, seed=2)
    assert modes(model) == before
    assert_equal(tuple(model.state_dict().values()), tuple(state.values()))
    assert_equal(prediction.mean, expected.mean)
    assert prediction.std.max() > 0
    assert prediction.samples is None
    assert not prediction.mean.requires_grad
    assert torch.is_grad_enabled()
    assert not context.is_enabled()


def test_compiled_models_give_the_same_samples_and_stay_compiled(monkeypatch):
    model, x = built("MLP")
    expected = mc_predict(model, x, 6, seed=3, keep_samples=True).samples
    compiled = torch.compile(model, backend="aot_eager")
    enable.register()
    monkeypatch.setattr(torch.compiler, "reset", lambda: pytest.fail("compiled code is thrown away"))
    torch.testing.assert_close(mc_predict(compiled, x, 6, seed=3, batch=3, keep_samples=True).samples, expected)
    mc_predict(*built("MLP of torch's"), 5)


def test_behind_a_graph_break_no_frame_of_ours_is_compiled():
    class Broken(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            seed = torch.ops.fastdrop.draw(x, [])
            torch._dynamo.graph_break()
            return fdt.dropout(x, 0.5, seed=seed) + fdt.dropout(x, 0.5)

    def note(graph, inputs):
        frames.update(node.stack_trace.lstrip().splitlines()[0] for node in graph.graph.nodes if node.stack_trace)
        return graph.forward

    torch.compiler.reset()  # of code compiled for the other cases
    frames = set()
    model, x = Broken(), torch.ones(4, 6)
    expected = mc_predict(model, x, 8, seed=3, batch=1, keep_samples=True).samples
    compiled = torch.compile(model, backend=note)
    samples = mc_predict(compiled, x, 8, seed=3, batch=3, keep_samples=True).samples
    torch.testing.assert_close(samples, expected)
    assert frames  # the outermost ones: what is called inside may be compiled with its caller
    assert not [frame for frame in frames if "_random.py" in frame or "_ops.py" in frame]


def test_arguments():
    class Both(fdt.Dropout):
        def forward(self, x, y, scale=1):
            return super().forward(x) + y * scale

    x, y = torch.ones(3, 4), torch.full((3, 4), 10.0)
    mean = mc_predict(Both(), (x, y), 200, seed=1).mean
    assert ((mean - 11).abs() < 0.5).all()
    torch.testing.assert_close(mc_predict(Both(), (x, y, 2), 200, seed=1).mean, mean + 10)


@pytest.mark.parametrize("make", [fdt.Dropout, nn.Dropout, nn.ReLU])
def test_arguments_stay_as_they_are(make):
    first = make(inplace=True) if make is nn.ReLU else make(0.3, inplace=True)
    model, x = nn.Sequential(first, fdt.Dropout(0.3), nn.Linear(100, 1)), torch.ones(2, 100)
    x[0] = -1.0
    before = x.clone()
    out_of_place = copy.deepcopy(model)
    out_of_place[0].inplace = False
    samples = mc_predict(model, x, 20, seed=1, keep_samples=True).samples
    assert_equal(x, before)
    torch.testing.assert_close(samples, mc_predict(out_of_place, x, 20, seed=1, batch=1, keep_samples=True).samples)
    assert first.inplace


class Leaves(nn.Module):
    """What forward leaves behind: as a buffer that the next call reads, as attributes, old and new, with a hook."""

    def __init__(self):
        super().__init__()
        self.drop = fdt.Dropout(0.5)
        self.register_buffer("total", torch.zeros(4))
        self.last, self.seen = None, {}

    def forward(self, x):
        y = self.drop(x)
        self.total = self.total * 0.5 + y
        self.last = self.seen["y"] = y
        self.kept = [y]
        return y


class Fails(Leaves):
    """Under a map."""

    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > -1 else x


@pytest.mark.parametrize("cls", [Leaves, Fails])
def test_what_the_model_keeps_is_of_the_last_sample(cls):
    calls = Calls(model := cls())
    samples = mc_predict(model, torch.ones(4), 12, seed=1, batch=5, keep_samples=True).samples
    assert calls.count == (1 + 2 + 1 if cls is Leaves else 1 + 1 + 11)
    for left in (model.last, model.seen["y"], model.kept[0]):
        assert_equal(left, samples[-1])
    assert_equal(model.total.isfinite(), torch.ones(4, dtype=torch.bool))
    model.state_dict()["total"].tolist()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_models():
    """A module inside, and the whole, whose dropout has its mode in C++."""
    model, x = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), fdt.Dropout(0.5)), torch.randn(4, 6)
    expected = mc_predict(model, x, 6, seed=2, keep_samples=True).samples
    model[0] = torch.jit.script(model[0])
    torch.testing.assert_close(mc_predict(model, x, 6, seed=2, batch=3, keep_samples=True).samples, expected)
    whole = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5, inplace=True)))
    with pytest.raises(ValueError, match=r"the model is scripted and in training: call model\.eval\(\) first"):
        mc_predict(whole, x, filter=lambda path, module: False)
    whole.eval()
    assert mc_predict(whole, x, 50, seed=1, filter=lambda path, module: True).std.max() > 0
    assert not turned_on(whole)


# ---- statistics ----


@pytest.mark.parametrize("batch", [1, 7])
def test_mean_and_std_are_those_of_the_samples(batch):
    """Far from 0, where squares would lose digits."""
    model, x = built("MLP")
    nn.init.constant_(model[-1].bias, 1e4)
    prediction = mc_predict(model, x, 50, seed=1, batch=batch, keep_samples=True)
    assert isinstance(prediction, Prediction)
    assert prediction.samples.shape == (50, 4, 3)
    samples = prediction.samples.double()
    assert_equal(prediction.mean, samples.mean(0).float())
    torch.testing.assert_close(prediction.std, samples.std(0).float(), rtol=1e-6, atol=0)
    assert prediction.entropy is None
    assert prediction.mutual_information is None


@pytest.mark.parametrize(
    ("shape", "axis", "outputs"), [((4, 3), -1, "logits"), ((3,), 0, "probabilities"), ((2, 3, 4), -2, "logits")]
)
def test_entropy_and_mutual_information_match_their_formulas(shape, axis, outputs):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(fdt.Dropout(0.5), *([nn.Softmax(axis)] if outputs == "probabilities" else []))
    options = {"task": "classification", "class_axis": axis, "outputs": outputs, "keep_samples": True}
    prediction = mc_predict(model, x, 20, seed=6, batch=7, **options)

    logits = mc_predict(fdt.Dropout(0.5), x, 20, seed=6, keep_samples=True).samples
    along = axis if axis < 0 else axis + 1
    probabilities = logits.softmax(along)
    mean = probabilities.mean(0)
    entropy = -(mean * mean.log()).sum(axis)
    of_samples = -(probabilities * probabilities.log()).sum(along)
    torch.testing.assert_close(prediction.samples, probabilities)
    torch.testing.assert_close(prediction.mean, mean)
    torch.testing.assert_close(prediction.std, probabilities.std(0))
    torch.testing.assert_close(prediction.entropy, entropy)
    torch.testing.assert_close(prediction.mutual_information, entropy - of_samples.mean(0))
    assert (prediction.mutual_information > 0).all()


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_a_model_without_dropout_is_sure_of_itself(task):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7)).eval(), torch.randn(50, 6)
    with pytest.warns(UserWarning, match="nothing was dropped"):
        prediction = mc_predict(model, x, 8, batch=3, task=task)
    assert not prediction.std.any()
    y = model(x).detach()
    if task == "regression":
        assert_equal(prediction.mean, y)
    else:
        torch.testing.assert_close(prediction.mean, y.softmax(-1))
        assert not prediction.mutual_information.any()


def test_samples_that_disagree_are_all_mutual_information():
    """Each sample is sure of one of two classes: all of the entropy, log 2, is the model's."""

    def switch(self, x):
        one = self.drop(x) / 2
        return torch.stack([one, 1 - one], -1)

    model = Net(switch, drop=fdt.Dropout(0.5))
    prediction = mc_predict(model, torch.ones(20), 2000, seed=0, task="classification", outputs="probabilities")
    assert_equal(prediction.mutual_information, prediction.entropy)
    torch.testing.assert_close(prediction.entropy, torch.full((20,), math.log(2)), rtol=0, atol=0.01)


def test_one_sample_has_no_standard_deviation():
    prediction = mc_predict(*built("MLP"), 1, task="classification", keep_samples=True)
    assert prediction.std.isnan().all()
    assert_equal(prediction.mean, prediction.samples[0])
    assert not prediction.mutual_information.any()


@pytest.mark.parametrize(
    ("returned", "expected"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.bool, torch.float32)],
    ids=str,
)
def test_dtypes(returned, expected):
    model, x = Net(lambda self, x: self.drop(x).to(returned), drop=fdt.Dropout(0.5)), torch.ones(2, 3)
    prediction = mc_predict(model, x, 40, seed=1, keep_samples=True)
    assert {prediction.mean.dtype, prediction.std.dtype, prediction.samples.dtype} == {expected}
    torch.testing.assert_close(prediction.mean, prediction.samples.mean(0))
    torch.testing.assert_close(prediction.std, prediction.samples.std(0))


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples must be at least 1, but got 0"),
        ({"samples": 2.5}, TypeError, "samples must be an int, but got float"),
        ({"batch": 0}, ValueError, "batch must be at least 1, but got 0"),
        ({"seed": -1}, ValueError, r"seed must be from 0 to 2\*\*64 - 1, but got -1"),
        ({"task": "ranking"}, ValueError, "task must be one of 'regression', 'classification', but got 'ranking'"),
        ({"outputs": "odds"}, ValueError, "outputs must be one of 'logits', 'probabilities', but got 'odds'"),
        ({"filter": 3}, TypeError, "filter must be callable, but got int"),
        ({"kwargs": [1]}, TypeError, "kwargs must be a dict, but got list"),
        ({"task": "classification", "class_axis": -3}, IndexError, r"expected to be in range of \[-2, 1\], but got -3"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_mc_predict_refuses(options, error, message):
    model, x = built("MLP")
    model.train()
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        mc_predict(model, x, **({"seed": 1} | options))
    assert turned_on(model) == set(modes(model))
    assert_equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("returned", "got"), [((torch.ones(1),), "tuple"), (None, "NoneType"), (torch.ones(1) * 1j, "torch.complex64")]
)
def test_mc_predict_refuses_what_is_no_tensor_of_real_numbers(returned, got):
    with pytest.raises(TypeError, match=f"model must return a Tensor of real numbers, but got {got}"):
        mc_predict(Net(lambda self, x: returned), torch.ones(1))


# ---- progress ----


class Bar:
    """What tqdm's does."""

    def __init__(self, total):
        self.total, self.done, self.closed = total, 0, False

    def update(self, count):
        self.done += count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    made = []
    tqdm = lambda total, **_: made.append(Bar(total)) or made[-1]  # noqa: E731
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=tqdm))
    return made


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("progress", "long", "stderr", "shown"),
    [
        (None, True, Terminal, True),
        (None, True, io.StringIO, False),
        (None, False, Terminal, False),
        (False, True, Terminal, False),
        (True, False, io.StringIO, True),
    ],
)
def test_progress_is_shown_on_long_runs_on_a_terminal(bars, monkeypatch, progress, long, stderr, shown):
    monkeypatch.setattr(monte_carlo, "LONG", 0.0 if long else 1e9)
    monkeypatch.setattr(sys, "stderr", stderr())
    mc_predict(*built("MLP"), 3, progress=progress)
    assert len(bars) == shown


def test_progress_counts_samples(bars, monkeypatch):
    mc_predict(*built("MLP"), 11, batch=4, progress=True)
    (bar,) = bars
    assert (bar.total, bar.done, bar.closed) == (11, 11, True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert mc_predict(*built("MLP"), 3, progress=True).mean.shape == (4, 3)

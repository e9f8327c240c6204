"""Dropped weights: whole rows of embeddings, and connections of which autograd keeps bits alone."""

from __future__ import annotations

import copy
import math
import weakref
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt
from fastdrop.torch.nn.recurrent import VariationalLSTM
from fastdrop.torch.nn.weights import DropConnect, EmbeddingDropout
from fastdrop.torch.ops import mask as mask_ops

from ..cases import assert_equal, under
from ..module_cases import COPIES, Calls

seeded = partial(under, 5)


def first(result):
    return result[0] if isinstance(result, tuple) else result


# ---- rows of a table ----

WORDS, WIDTH = 50, 6
IDS = {
    "scalar": torch.tensor(3),
    "none": torch.empty(0, 4, dtype=torch.int64),
    "1 word": torch.arange(32) % 7,
    "33": torch.arange(33),
    "(4, 25)": torch.arange(100).reshape(4, 25) * 7 % WORDS,
    "int32": torch.tensor([[1, 2], [1, 49]], dtype=torch.int32),
}


def dropped_table(module):
    """The whole table under the mask of the next call."""
    return fdt.dropout(module.embedding.weight, module.p, noise_shape=(None, 1))


@pytest.mark.parametrize(("name", "p"), [*((name, 0.5) for name in IDS), ("(4, 25)", 1.0)])
def test_embedding_is_that_of_a_table_with_rows_dropped(name, p):
    module, ids = EmbeddingDropout(nn.Embedding(WORDS, WIDTH), p), IDS[name]
    weight = module.embedding.weight
    expected = F.embedding(ids, seeded(dropped_table, module))
    y = seeded(module, ids)
    assert_equal(y, expected)
    dy = torch.randn_like(y)
    # Words that come twice: one sums what it multiplies, the other multiplies sums.
    torch.testing.assert_close(torch.autograd.grad(y, weight, dy), torch.autograd.grad(expected, weight, dy))


def test_embedding_without_dropout_is_torchs():
    module = EmbeddingDropout(nn.Embedding(WORDS, WIDTH), 0.5)
    before = torch.get_rng_state()
    assert_equal(module.eval()(IDS["33"]), module.embedding(IDS["33"]))
    module.p = 0.0
    assert_equal(module.train()(IDS["33"]), module.embedding(IDS["33"]))
    assert torch.equal(torch.get_rng_state(), before)


def test_embedding_of_infinities_and_nan_that_are_dropped():
    table = torch.full((WORDS, WIDTH), math.nan)
    table[::2] = math.inf
    module = EmbeddingDropout(nn.Embedding.from_pretrained(table, freeze=False), 0.5)
    y = module(torch.arange(WORDS))
    y.backward(torch.full_like(y, math.inf))
    dropped = (y == 0).all(1)
    assert 0 < dropped.sum() < WORDS
    assert not y[~dropped].isfinite().any()
    assert (module.embedding.weight.grad[dropped] == 0).all()
    assert not module.embedding.weight.grad[~dropped].isfinite().any()


@pytest.mark.parametrize(
    "options",
    [{"padding_idx": 2, "scale_grad_by_freq": True}, {"max_norm": 0.5}, {"sparse": True}],
    ids=lambda options: next(iter(options)),
)
def test_embedding_options_work_as_in_torch(options):
    """What reaches the table is the gradient of a plain embedding whose output is dropped by words."""
    ids = torch.tensor([[1, 2, 3, 1], [2, 9, 1, 30]])
    module = EmbeddingDropout(nn.Embedding(WORDS, WIDTH, **options), 0.5)
    plain = copy.deepcopy(module.embedding)
    factors = seeded(lambda: fdt.dropout(torch.ones(WORDS, 1), 0.5))[ids]
    y, expected = seeded(module, ids), plain(ids) * factors
    assert_equal(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    found, wanted = module.embedding.weight.grad, plain.weight.grad
    assert found.is_sparse is bool(options.get("sparse"))
    found, wanted = found.to_dense(), wanted.to_dense()
    assert_equal(found, wanted)
    assert_equal(module.embedding.weight.detach(), plain.weight.detach())
    dropped = ids[factors[..., 0] == 0]
    assert len(dropped)
    assert not found[dropped].any()


def test_embedding_keeps_bits_of_words_read_and_no_table():
    ids = torch.arange(40)
    found, words = kept_by(EmbeddingDropout(nn.Embedding(1000, 64), 0.5), ids)
    assert (found, words) == ([ids.nbytes], 8)


def test_embedding_gradients_are_finite_differences():
    module, ids = EmbeddingDropout(nn.Embedding(5, 3, dtype=torch.float64), 0.5), torch.tensor([0, 1, 2, 1, 4])

    def run(weight):
        return seeded(torch.func.functional_call, module, {"embedding.weight": weight}, ids)

    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(run, weight)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_embedding_under_vmap(randomness):
    module, ids = EmbeddingDropout(nn.Embedding(WORDS, WIDTH), 0.5), IDS["(4, 25)"]
    y = seeded(torch.vmap(module, randomness=randomness), ids)
    rows = seeded(lambda: [seeded(module, row) if randomness == "same" else module(row) for row in ids])
    assert_equal(y, torch.stack(rows))


def test_embedding_as_a_module():
    module = EmbeddingDropout(nn.Embedding(WORDS, WIDTH, padding_idx=0), 0.25)
    assert list(module.state_dict()) == ["embedding.weight"]
    assert "p=0.25" in repr(module)
    assert "Embedding(50, 6, padding_idx=0)" in repr(module)
    for duplicate in COPIES.values():
        assert_equal(seeded(duplicate(module), IDS["33"]), seeded(module, IDS["33"]))
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    assert_equal(traced.eval()(IDS["33"]), module.embedding(IDS["33"]))


def test_embedding_refuses():
    with pytest.raises(ValueError, match=r"^dropout probability has to be between 0 and 1, but got 1\.5$"):
        EmbeddingDropout(nn.Embedding(2, 2), 1.5)
    with pytest.raises(TypeError, match=r"^embedding must be a torch\.nn\.Embedding, but got Linear$"):
        EmbeddingDropout(nn.Linear(2, 2))
    with pytest.raises(IndexError):
        EmbeddingDropout(nn.Embedding(2, 2))(torch.tensor([2]))


# ---- connections ----

MODULES = {
    "Linear": (lambda: nn.Linear(40, 30), (5, 40)),
    "Conv2d channels-last": (lambda: nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), (2, 4, 9, 9)),
    "Bilinear": (lambda: nn.Sequential(Calls(lambda s, x: s.a(x, x), a=nn.Bilinear(5, 5, 4)), nn.Linear(4, 2)), (3, 5)),
    "GRU": (lambda: nn.GRU(8, 16, 2, bidirectional=True), (3, 2, 8)),
    "LSTM, projected": (lambda: nn.LSTM(8, 16, proj_size=4), (5, 3, 8)),
}
NAMES = {
    "Bilinear": ["0.a.weight", "1.weight"],
    "GRU": [f"weight_hh_l{layer}{suffix}" for layer in (0, 1) for suffix in ("", "_reverse")],
    "LSTM, projected": ["weight_hh_l0"],
}


@pytest.fixture(params=MODULES)
def case(request):
    make, shape = MODULES[request.param]
    names = NAMES.get(request.param, ["weight"])
    module = DropConnect(make(), names if request.param == "Bilinear" else None, 0.4)
    assert module.names == tuple(names)
    return module, torch.randn(shape, requires_grad=True)


def with_dropped_weights(module, *arguments):
    """Definition: the wrapped module run with weights that are dropped by name, each from a seed of its own."""
    weights = {name: fdt.drop_connect(module.module.get_parameter(name), module.p) for name in module.names}
    return torch.func.functional_call(module.module, weights, arguments)


def results_of(module, run, x):
    """Output and gradients under one seed."""
    y = first(seeded(run, x))
    loss = y.abs().sum() if y.is_complex() else y.square().sum()
    return y.detach(), *torch.autograd.grad(loss, [x, *module.parameters()])


def assert_weights_are_dropped(module, x):
    assert_equal(results_of(module, module, x), results_of(module, lambda x: with_dropped_weights(module, x), x))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_connections_are_those_of_dropped_weights(case):
    module, x = case
    before = dict(module.module.named_parameters())
    assert_weights_are_dropped(module, x)
    assert not torch.equal(first(seeded(module, x)), first(under(6, module, x)))
    assert all(parameter is before[name] for name, parameter in module.module.named_parameters())
    assert list(module.state_dict()) == [f"module.{name}" for name in module.module.state_dict()]
    assert [name for name, _ in module.named_parameters()] == [f"module.{name}" for name in before]
    if isinstance(module.module, nn.RNNBase):
        assert all(a is b for a, b in zip(module.module._flat_weights, before.values(), strict=True))


def test_connections_without_dropout_are_the_modules(case):
    module, x = case
    before = torch.get_rng_state()
    assert_equal(first(module.eval()(x)), first(module.module(x)))
    module.p = 0.0
    assert_equal(first(module.train()(x)), first(module.module(x)))
    assert torch.equal(torch.get_rng_state(), before)


def test_connections_under_autocast():
    module, x = DropConnect(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 9, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        assert_weights_are_dropped(module, x)


def test_second_gradients_of_connections_are_finite_differences():
    module, x = DropConnect(nn.Linear(3, 4).double()), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: seeded(module, x).tanh(), (x, *module.parameters()))


def test_connections_are_made_once_in_each_backward_and_freed(case, monkeypatch):
    """Also those of which a recurrent layer keeps a view for each step."""
    module, x = case
    sources = [module.module.get_parameter(name).data_ptr() for name in module.names]
    masked, made = mask_ops.masked, []

    def recorded(x, *rest):
        y = masked(x, *rest)
        if x.data_ptr() in sources:
            made.append(weakref.ref(y))
        return y

    monkeypatch.setattr(mask_ops, "masked", recorded)
    y = first(seeded(module, x)).square().sum()
    results = []
    for times in (1, 2):
        results.append(torch.autograd.grad(y, [x, *module.parameters()], retain_graph=True))
        assert len(made) == times * len(sources)
        assert all(value() is None for value in made)
    assert_equal(*results)


def kept_by(function, *arguments):
    """Bytes of distinct memory that autograd keeps, but for the bits of masks; and those."""
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(*arguments)
    words = sum(t.nbytes for t in kept if t.dtype == torch.int32)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in kept if t.dtype != torch.int32}
    return [storage.nbytes() for storage in storages.values()], words


def test_connections_keep_bits_and_no_dropped_weight(case):
    module, x = case
    dropped = [module.module.get_parameter(name) for name in module.names]
    found, words = kept_by(module, x)
    plain, _ = kept_by(module.module, x)
    assert words == sum(4 * math.ceil(weight.numel() / 32) for weight in dropped)
    for weight in dropped:  # the plain module keeps the parameter itself, which is there anyway
        plain.remove(weight.nbytes)
    assert sorted(found) == sorted(plain)


def test_connections_keep_nothing_of_the_weight_if_the_input_has_no_gradient():
    module, x = DropConnect(nn.Linear(40, 30)), torch.randn(5, 40)
    assert kept_by(module, x) == ([5 * 40 * 4], 4 * 38)
    module.requires_grad_(False)
    assert kept_by(module, x) == ([], 0)


def test_connections_at_p_of_1():
    module, x = DropConnect(nn.Linear(40, 30), p=1.0), torch.randn(5, 40, requires_grad=True)
    nn.init.constant_(module.module.weight, math.nan)
    y = module(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert not module.module.weight.grad.any()


def test_connections_of_a_variational_layer():
    layer = VariationalLSTM(3, 5, 2, dropout_input=0.3, dropout_recurrent=0.4)
    module, x = DropConnect(layer, ["weight_hh_l0", "weight_ih_l1"]), torch.randn(4, 2, 3, requires_grad=True)
    assert_weights_are_dropped(module, x)


# ---- changes in place ----


@pytest.mark.parametrize("changed", ["weight", "input"])
def test_a_change_before_backward_raises(changed):
    module, x = DropConnect(nn.Linear(4, 3)), torch.randn(2, 4)
    y = module(x.requires_grad_(changed == "weight"))
    with torch.no_grad():
        (x if changed == "input" else module.module.weight).add_(1.0)
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation: .*is at version \d; expected version \d"
    ):
        y.sum().backward()


# ---- what else keeps, and calls ----


def test_hooks_outside_see_what_they_would_of_the_module():
    module, x = DropConnect(nn.GRU(8, 16)), torch.randn(5, 3, 8, requires_grad=True)
    expected = torch.autograd.grad(seeded(module, x)[0].sum(), [x, *module.parameters()])
    with save_on_cpu():
        y, _ = seeded(module, x)
    assert_equal(torch.autograd.grad(y.sum(), [x, *module.parameters()]), expected)


def test_connections_under_checkpointing():
    module, x = DropConnect(nn.LSTM(8, 16)), torch.randn(3, 2, 8, requires_grad=True)
    leaves = [x, *module.parameters()]
    expected = torch.autograd.grad(first(seeded(module, x)).square().sum(), leaves)
    y = first(seeded(lambda: checkpoint(module, x, use_reentrant=False)))
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)


def test_connections_without_gradients():
    module, x = DropConnect(nn.GRU(8, 16)), torch.randn(5, 3, 8)
    expected, _ = seeded(module, x)
    with torch.no_grad():
        assert_equal(seeded(module, x)[0], expected.detach())
    with torch.inference_mode():
        assert_equal(seeded(module, x)[0], expected.detach())
        module = DropConnect(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    assert_equal(seeded(module, x), seeded(with_dropped_weights, module, x))


class Conjugate(nn.Linear):
    """Its node keeps another view of the same memory."""

    def forward(self, x):
        return F.linear(x, self.weight.conj(), self.bias)


class Written(nn.Linear):
    """Its node keeps what the weight has become."""

    def forward(self, x):
        return F.linear(x, self.weight.mul_(3.0), self.bias)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Conjugate, torch.complex64), (Written, torch.float32), (nn.Linear, torch.bfloat16)],
)
def test_connections_of_a_layer_that_sees_its_weight_otherwise_and_of_other_dtypes(kind, dtype):
    module, x = DropConnect(kind(6, 5, dtype=dtype)), torch.randn(3, 6, dtype=dtype, requires_grad=True)
    assert_weights_are_dropped(module, x)


def test_compiled_they_are_one_graph_that_reads_the_rates():
    torch.compiler.reset()
    counters.clear()
    model = nn.Sequential(EmbeddingDropout(nn.Embedding(WORDS, 8)), DropConnect(nn.Conv1d(4, 8, 3)))
    compiled, ids = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.arange(8).reshape(2, 4)
    for p in (0.1, 0.9, 0.0, 1.0):
        for module in model:
            module.p, module.rate_tensor = p, torch.tensor(p, dtype=torch.float64)
        y, expected = seeded(compiled, ids), seeded(model, ids)
        assert_equal(y, expected)
        leaves = list(model.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
        )
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_connections_with_parameters_of_a_functional_call():
    module, other, x = DropConnect(nn.GRU(8, 16)), DropConnect(nn.GRU(8, 16)), torch.randn(5, 3, 8)
    y = seeded(torch.func.functional_call, module, dict(other.named_parameters()), x)
    assert_equal(first(y), first(seeded(other, x)))


def test_compiled_connections_of_a_recurrent_layer_run():
    torch.compiler.reset()
    module, x = DropConnect(nn.LSTM(8, 16)), torch.randn(5, 3, 8)
    model = nn.Sequential(nn.Linear(8, 8), module)
    y, _ = seeded(torch.compile(model, backend="aot_eager"), x)
    assert_equal(y, seeded(model, x)[0])
    y.sum().backward()
    assert all(a is b for a, b in zip(module.module._flat_weights, module.module.parameters(), strict=True))
    torch.compiler.reset()


@pytest.mark.slow("test_hooks_outside_see_what_they_would_of_the_module")
def test_compiled_backward_of_connections_run_eagerly():
    """Compiled autograd calls the hooks too."""
    torch.compiler.reset()
    module, x = DropConnect(nn.Linear(8, 8)), torch.randn(2, 8, requires_grad=True)
    expected = torch.autograd.grad(seeded(module, x).square().sum(), [x, *module.parameters()])
    y = seeded(module, x).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward()
    assert_equal((x.grad, *(parameter.grad for parameter in module.parameters())), expected)
    torch.compiler.reset()


def test_connections_under_transforms():
    module, x = DropConnect(nn.Linear(4, 3)), torch.randn(5, 4)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, x).square().sum()

    found = seeded(torch.func.grad(loss), parameters, x)
    module.zero_grad()
    seeded(module, x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")(parameters, x)
    assert per_sample["module.weight"].shape == (5, 3, 4)
    shared = (per_sample["module.weight"] == 0).all(0)
    assert 0 < shared.sum() < 12  # dropped in all samples alike


# ---- as a module among others ----


@pytest.mark.parametrize("duplicate", ["deepcopy", "torch.save"])
def test_connections_copy_after_a_call(duplicate):
    module, x = DropConnect(nn.GRU(8, 16), p=0.25), torch.randn(5, 3, 8)
    y = first(module(x))
    twin = COPIES[duplicate](module)
    assert repr(twin) == repr(module)
    assert "names=('weight_hh_l0',), p=0.25\n  (module): GRU(8, 16)" in repr(twin)
    assert_equal(first(seeded(twin, x)), first(seeded(module, x)))
    y.sum().backward()


def test_connections_restore_the_layer_when_it_raises():
    module = DropConnect(nn.LSTM(8, 16))
    with pytest.raises(RuntimeError, match="input_size"):
        module(torch.randn(5, 3, 7))
    assert all(a is b for a, b in zip(module.module._flat_weights, module.module.parameters(), strict=True))


@pytest.mark.parametrize("names", [["a.weight"], ["a.weight", "b.weight"]], ids=["one name", "both"])
def test_a_shared_weight_is_dropped_once(names):
    layers = {name: nn.Linear(4, 4, bias=False) for name in "ab"}
    layers["b"].weight = layers["a"].weight
    module = DropConnect(Calls(lambda self, x: self.b(self.a(x)), **layers), names)
    x = torch.randn(3, 4, requires_grad=True)
    weight = seeded(lambda: fdt.drop_connect(module.module.a.weight, 0.5))
    expected = F.linear(F.linear(x, weight), weight)
    y = seeded(module, x)
    assert_equal(y, expected)
    leaves = [x, module.module.a.weight]
    assert_equal(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves))


def test_connections_pass_arguments_by_name():
    module, x = DropConnect(nn.MultiheadAttention(8, 2), ["in_proj_weight", "out_proj.weight"]), torch.randn(3, 2, 8)
    y, weights = seeded(lambda: module(x, key=x, value=x, need_weights=False))
    assert weights is None
    torch.testing.assert_close(y, seeded(with_dropped_weights, module, x, x, x)[0])


def test_connections_traced_by_fx_stay_a_module():
    model, x = nn.Sequential(DropConnect(nn.Linear(4, 4)), nn.ReLU()), torch.randn(2, 4)
    traced = torch.fx.symbolic_trace(model)
    assert_equal(seeded(traced, x), seeded(model, x))
    assert_equal(traced.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("make", "names", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            "weights",
            r"^names must be of module's parameters, weight, bias, but got 'weights'$",
        ),
        (lambda: nn.BatchNorm1d(2), ["weight", "running_mean"], "but got 'running_mean'$"),
        (lambda: nn.ReLU(), None, "but got 'weight'$"),
        (lambda: nn.Sequential(nn.LSTM(2, 2)), "0.weight_hh_l0", "recurrent layer.*wrap '0' itself$"),
    ],
    ids=["unknown", "buffer", "none there", "inside a recurrent layer"],
)
def test_connections_refuse_names(make, names, message):
    with pytest.raises(ValueError, match=message):
        DropConnect(make(), names)
    with pytest.raises(ValueError, match=r"^dropout probability has to be between 0 and 1, but got 1\.5$"):
        DropConnect(nn.Linear(2, 2), p=1.5)

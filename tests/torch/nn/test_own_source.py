"""Modules with a seed or a generator of their own, and with a noise_shape."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..cases import assert_equal, numbers_drawn
from ..module_cases import COPIES
from ..ops.compiling import fresh_compiler

__all__ = ["fresh_compiler"]
MODULES = {
    "Dropout": fdt.Dropout,
    "Dropout1d": fdt.Dropout1d,
    "Dropout2d": fdt.Dropout2d,
    "Dropout3d": fdt.Dropout3d,
    "AlphaDropout": fdt.AlphaDropout,
    "FeatureAlphaDropout": fdt.FeatureAlphaDropout,
    "VariationalDropout": fdt.VariationalDropout,
    "StochasticDepth": lambda **source: fdt.StochasticDepth(0.5, "row", **source),
    "DropPath": lambda **source: fdt.DropPath(0.5, **source),
    "DropBlock2d": lambda **source: fdt.DropBlock2d(0.3, 2, **source),
    "DropBlock3d": lambda **source: fdt.DropBlock3d(0.3, 2, **source),
    "GaussianDropout": fdt.GaussianDropout,
    "EmbeddingDropout": lambda **source: fdt.EmbeddingDropout(
        nn.Embedding.from_pretrained(torch.ones(40, 3)), **source
    ),
    "SkipResidual": lambda **source: fdt.SkipResidual(nn.Identity(), 0.5, **source),
    "BatchwiseDropout": fdt.BatchwiseDropout,
    "TokenDropout": fdt.TokenDropout,
    "DropConnect": lambda **source: fdt.DropConnect(filled(nn.Linear(6, 6)), **source),
    "LayerDrop": lambda **source: fdt.LayerDrop([filled(nn.Linear(6, 6)) for _ in range(30)], 0.5, **source),
}


def filled(layer):
    """A layer whose parameters are all 0.25."""
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 0.25)
    return layer


def input_of(module):
    if isinstance(module, fdt.EmbeddingDropout):
        return torch.arange(40)
    axes = {"1d": 3, "3d": 5}.get(type(module).__name__[-2:], 4)
    x = torch.full((16, 4, 6, 6, 6)[:axes], 3.0)
    return x + torch.arange(4.0).view(4, 1, 1) if isinstance(module, fdt.TokenDropout) else x


def calls(module, count=3):
    x = input_of(module)
    return [module(x) for _ in range(count)]


@pytest.mark.parametrize("name", MODULES)
def test_module_draws_from_its_own_seed_or_generator(name):
    """The same masks in the same order, others at each call, and nothing from torch's generator."""
    make, results = MODULES[name], []
    sources = {
        "seed": lambda: {"seed": 2**64 - 1},
        "generator": lambda: {"generator": torch.Generator().manual_seed(7)},
    }
    for own, source in sources.items():
        module, twin = make(**source()), make(**source())
        assert numbers_drawn(lambda m=module: results.append(calls(m))) == 0
        assert_equal(tuple(results[-1]), tuple(calls(twin)))
        assert not torch.equal(results[-1][0], results[-1][1])
        assert f", {own}=" in repr(module)
        assert getattr(module, own) is getattr(module.own_source, own)
        assert getattr(module, own) is not None
        assert module.state_dict().keys() == dict(module.named_parameters()).keys()
        evaluated = calls(module.eval())
        assert torch.equal(evaluated[0], evaluated[1])
        assert_equal(calls(module.train(), 1)[0], calls(twin, 1)[0])  # evaluation has not moved it on
    assert not torch.equal(results[0][0], results[1][0])
    plain = make()
    assert "seed" not in repr(plain)
    assert numbers_drawn(lambda: calls(plain, 2)) == 2


def test_modules_of_several_masks_have_one_stream():
    """Recurrent layers have three rates, and a part of a LayerDrop goes on where the whole is."""
    x = torch.ones(4, 16, 6)
    for make in (fdt.VariationalLSTM, fdt.VariationalGRU):
        rates = {"dropout_input": 0.3, "dropout_recurrent": 0.4, "dropout_output": 0.2}
        layer, results = filled(make(6, 5, 2, **rates, seed=3)), []
        twin = copy.deepcopy(layer)
        assert numbers_drawn(lambda m=layer, r=results: r.extend([m(x)[0], m(x)[0]])) == 0
        assert layer.dropout_output.own_source.calls == 2 * (2 + 2 + 1)
        assert_equal((twin(x)[0], twin(x)[0]), tuple(results))
        assert not torch.equal(*results)
        with fdt.same_masks(layer):
            assert_equal(layer(x)[0], layer(x)[0])
    layers = fdt.LayerDrop([nn.Identity() for _ in range(4)], 0.5, seed=3)
    layers[1:](torch.ones(2))
    assert layers.own_source.calls == 1


def test_a_trace_refuses_a_seed_of_which_it_would_make_a_constant():
    x, traces = torch.ones(20), (lambda m: torch.jit.trace(m, x, check_trace=False), lambda m: make_fx(m)(x))
    for trace in traces:
        with pytest.raises(RuntimeError, match="a seed of its own can't be traced in training"):
            trace(fdt.Dropout(0.5, seed=3))
        traced = trace(fdt.Dropout(0.5, generator=torch.Generator()))
        assert not torch.equal(traced(x), traced(x))
        assert_equal(trace(fdt.Dropout(0.5, seed=3).eval())(x), x)


def test_generator_gives_what_the_function_draws_and_may_be_shared():
    x, shared = torch.ones(50), torch.Generator().manual_seed(3)
    first, second = fdt.Dropout(0.5, generator=shared), fdt.Dropout(0.5, generator=shared)
    results = first(x), second(x), first(x)
    other = torch.Generator().manual_seed(3)
    assert_equal(results, tuple(fdt.dropout(x, 0.5, generator=other) for _ in range(3)))


def test_copies_go_on_each_for_itself_and_setting_starts_anew():
    for source in ({"seed": 3}, {"generator": torch.Generator().manual_seed(3)}):
        module = fdt.Dropout(0.5, **source)
        calls(module, 2)
        twins = [duplicate(module) for duplicate in COPIES.values()]
        expected = tuple(calls(module))
        for twin in twins:
            assert_equal(tuple(calls(twin)), expected)
    module = fdt.Dropout(0.5, seed=3)
    first = calls(module)
    module.seed = 3
    assert_equal(calls(module), first)
    module.generator = torch.Generator().manual_seed(3)
    assert module.seed is None
    module.seed = None
    assert module.own_source is None
    converted = nn.Dropout(0.5)
    fdt.convert(converted)
    converted.seed = 3
    assert_equal(calls(converted), first)
    fdt.revert(converted)
    assert repr(converted) == "Dropout(p=0.5, inplace=False)"
    assert "own_source" not in vars(converted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_by_a_checkpoint_is_refused(reentrant):
    """Another mask would give a wrong gradient. A function with a generator is refused too, with a seed it is not."""

    def run(function):
        x = torch.ones(20, requires_grad=True)
        checkpoint(lambda x: function(x * 2).exp(), x, use_reentrant=reentrant).sum().backward()
        return x.grad

    generator = torch.Generator()
    seeded, drawing = fdt.Dropout(0.5, seed=3), fdt.Dropout(0.5, generator=generator)
    for function in (seeded, drawing, lambda x: fdt.dropout(x, 0.5, generator=generator)):
        with pytest.raises(RuntimeError, match="a checkpoint computes a dropout again"):
            run(function)
    assert run(seeded.eval()) is not None
    assert run(lambda x: fdt.dropout(x, 0.5, seed=3)) is not None


def test_a_hook_may_drop_gradients_from_a_generator():
    """Also one that a checkpoint in the form with reentrance calls in its own backward."""
    drop, seen = fdt.Dropout(0.5, seed=3), []

    def inner(x):
        y = x * 2
        if y.requires_grad:
            y.register_hook(lambda dy: seen.append(drop(dy)) or seen[-1])
        return y.exp()

    checkpoint(inner, torch.ones(20, requires_grad=True), use_reentrant=True).sum().backward()
    assert len(seen) == 1


def test_compiled_scripted_sampled_and_fused():
    x, module = torch.ones(2, 50), fdt.Dropout(0.5, seed=3)
    expected = tuple(module(x) for _ in range(3))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="can't be compiled"):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    torch.compiler.reset()
    module.seed = 3
    ours = torch.compile(nn.Sequential(nn.Identity(), module), backend="aot_eager")
    assert_equal(tuple(ours(x) for _ in range(3)), expected)
    model = nn.Sequential(nn.Linear(50, 50), module)
    assert "seed or a generator" in fdt.fuse(model).left[0].reason
    assert "noise_shape" in fdt.fuse(nn.Sequential(nn.Linear(5, 5), fdt.Dropout(noise_shape=(None, 1)))).left[0].reason
    calls_before = module.own_source.calls
    predictions = [fdt.mc_predict(model.eval(), x, samples=20, seed=1) for _ in range(2)]
    assert torch.equal(predictions[0].std, predictions[1].std)
    assert predictions[0].std.min() > 0
    assert module.own_source.calls == calls_before
    for scripted in (module, fdt.Dropout(noise_shape=(None, 1), generator=torch.Generator()).eval()):
        assert_equal(torch.jit.script(scripted)(x), x)
    with fdt.mc_dropout(model):
        assert not torch.equal(model(x), model(x))


def test_noise_shape_of_a_module():
    x, module = torch.randn(4, 5, 3), fdt.Dropout(0.5, noise_shape=[None, 1, 3], seed=3)
    y = module(x)
    module.seed = 3
    assert_equal(y, fdt.dropout(x, 0.5, noise_shape=(None, 1, None), seed=copy.copy(module.own_source).next()["seed"]))
    assert repr(module) == "Dropout(p=0.5, inplace=False, store='bits', seed=3, noise_shape=(None, 1, 3))"
    assert_equal(module.eval()(x), x)
    with pytest.raises(ValueError, match="noise_shape must be 1, None or the full extent"):
        module.train()(torch.ones(4, 5, 2))
    for shape, error in ((3, TypeError), (("a", 1), TypeError), ((-1, 1), ValueError)):
        with pytest.raises(error, match="noise_shape must"):
            fdt.Dropout(noise_shape=shape)


def test_bad_sources():
    for source, error, text in (
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator must not both be given"),
        ({"seed": -1}, ValueError, "seed must be from 0 to"),
        ({"seed": 0.5}, TypeError, "seed must be an int, but got float"),
        ({"generator": 3}, TypeError, r"generator must be a torch\.Generator, but got int"),
        ({"sead": 3}, TypeError, "unexpected keyword argument 'sead'"),
    ):
        for make in MODULES.values():
            with pytest.raises(error, match=text):
                make(**source)

"""`SkipResidual` and `LayerDrop`: what they compute, copies, and what schedulers, audit and mc_dropout see of them."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.func import vmap

import fastdrop.torch as fdt
from fastdrop.schedules import constant

from ..cases import assert_equal, numbers_drawn, under
from ..module_cases import COPIES
from ..ops.compiling import compiled, fresh_compiler, graphs

__all__ = ["fresh_compiler"]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, mask=None):
        y = self.layer(x).relu()
        return y if mask is None else y * mask


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def gradients(module):
    return [None if q.grad is None else q.grad.clone() for q in module.parameters()]


# ---- SkipResidual ----


@pytest.mark.parametrize("count", ["random", "fixed"])
def test_skip_residual_is_the_function(count):
    x, mask = normal(12, 4), normal(12, 1)
    for scale_by_keep in (True, False):
        module = fdt.SkipResidual(Scaled(), 0.4, scale_by_keep=scale_by_keep, count=count)
        options = {"scale_by_keep": scale_by_keep, "count": count}
        for along in ((), (mask,), (None,)):
            expected = under(5, fdt.skip_residual, x, module.branch, 0.4, along=along, **options)
            assert_equal(under(5, module, x, *along), expected)
        assert numbers_drawn(lambda m=module: m(x)) == 1
        assert numbers_drawn(lambda m=module: m.eval()(x)) == 0
        assert_equal(module(x, mask), x + module.branch(x, mask))


def test_skip_residual_takes_the_samples_of_stochastic_depth():
    module, depth, x = fdt.SkipResidual(Scaled(), 0.4), fdt.StochasticDepth(0.4, "row"), normal(12, 4)
    torch.testing.assert_close(under(5, module, x), under(5, lambda: x + depth(module.branch(x))))


def test_min_p_of_the_module():
    """Below it the branch gets all samples."""
    samples, branch = [], Scaled()
    branch.register_forward_hook(lambda module, args, y: samples.append(len(y)))
    for min_p in (0.05, 0.03):
        under(1, fdt.SkipResidual(branch, 0.04, min_p=min_p), normal(500, 4))
    assert samples[0] == 500
    assert 460 < samples[1] < 500


@pytest.mark.parametrize("name", COPIES)
def test_copies(name):
    for module in (fdt.SkipResidual(Scaled(), 0.4, count="fixed"), fdt.LayerDrop([Scaled(), Scaled()], 0.4)):
        twin = COPIES[name](module)
        assert repr(twin) == repr(module)
        assert_equal(under(3, twin, normal(12, 4)), under(3, module, normal(12, 4)))


def test_representations():
    skip = fdt.SkipResidual(nn.ReLU(), 0.4, count="fixed")
    assert repr(skip).splitlines()[1].strip() == "p=0.4, scale_by_keep=True, min_p=0.05, count='fixed'"
    assert "p=0.1, static_parameters=False" in repr(fdt.LayerDrop([nn.ReLU()], 0.1))


BAD = {
    "p": (ValueError, "drop probability has to be between 0 and 1", lambda: fdt.SkipResidual(nn.ReLU(), -0.1)),
    "min_p": (ValueError, "min_p must be between 0 and 1", lambda: fdt.SkipResidual(nn.ReLU(), 0.1, min_p=-1)),
    "count": (ValueError, "count must be one of", lambda: fdt.SkipResidual(nn.ReLU(), 0.1, count="all")),
    "branch": (TypeError, "branch must be callable", lambda: fdt.SkipResidual(None, 0.1)),
    "layers' p": (ValueError, "drop probability has to be between 0 and 1", lambda: fdt.LayerDrop([nn.ReLU()], 2.0)),
    "layers": (TypeError, "is not a Module subclass", lambda: fdt.LayerDrop([3], 0.1)),
    "scripted": (RuntimeError, "can't be scripted", lambda: torch.jit.script(fdt.SkipResidual(nn.ReLU(), 0.1))),
    "scripted layers": (RuntimeError, "can't be scripted", lambda: torch.jit.script(fdt.LayerDrop([nn.ReLU()], 0.1))),
}


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, match, call = BAD[name]
    with pytest.raises(error, match=match):
        call()


# ---- LayerDrop ----


def kept_layers(p, count, seed):
    """The layers that the mask of one seed keeps."""
    drawn = under(seed, lambda: int(torch.empty((), dtype=torch.int64).random_()))
    return (fdt.dropout(torch.ones(count), p, seed=drawn) != 0).tolist()


@pytest.mark.parametrize("static_parameters", [False, True])
def test_layer_drop_runs_the_kept_layers(static_parameters):
    """In order, with all arguments, unscaled; skipped layers have no gradients, or gradients of 0."""
    layers = fdt.LayerDrop([Scaled() for _ in range(6)], 0.5, static_parameters=static_parameters)
    with torch.no_grad():
        layers[2].layer.weight[0, 0] = torch.inf  # 0 times it would be NaN
    x, mask, seen = normal(3, 4), normal(3, 1), set()
    for seed in range(40):
        kept = kept_layers(0.5, 6, seed)
        if kept[2]:
            continue
        expected = x
        for layer, keep in zip(layers, kept, strict=True):
            expected = layer(expected, mask=mask) if keep else expected
        layers.zero_grad()
        y = under(seed, layers, x, mask=mask)
        assert_equal(y, expected)
        if not any(kept) and not static_parameters:
            assert y is x
            continue
        y.sum().backward()
        for layer, keep in zip(layers, kept, strict=True):
            given = gradients(layer)
            assert keep or all((not g.any()) if static_parameters else g is None for g in given)
        seen.add(sum(kept))
    assert len(seen) > 2


def test_layer_drop_draws_one_seed_and_drops_at_its_rate():
    layers, x = fdt.LayerDrop([nn.Flatten(0) for _ in range(5)], 0.3), torch.ones(2)
    runs = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, y: runs.append(1))
    assert numbers_drawn(lambda: layers(x)) == 1
    assert numbers_drawn(lambda: fdt.LayerDrop(layers, 0.0)(x)) == 0
    runs.clear()
    for seed in range(2000):
        under(seed, layers, x)
    assert abs(len(runs) / 10_000 - 0.7) < 0.02  # four standard deviations
    runs.clear()
    assert layers.eval()(x) is not None
    assert len(runs) == 5
    assert fdt.LayerDrop(layers, 1.0)(x) is x


def test_layer_drop_is_a_list():
    layers = fdt.LayerDrop([Scaled() for _ in range(3)], 0.4, static_parameters=True)
    assert list(layers.state_dict()) == list(nn.ModuleList(layers).state_dict())
    assert layers[-1] is list(layers)[2]
    part = layers[1:]
    assert (type(part), len(part), part.p, part.static_parameters) == (fdt.LayerDrop, 2, 0.4, True)


def test_layer_drop_takes_anything_as_x():
    layers = fdt.LayerDrop([nn.Identity() for _ in range(3)], 0.4)
    assert layers({"a": 1}) == {"a": 1}
    layers.static_parameters = True
    with pytest.raises(TypeError, match="static_parameters=True takes a Tensor as input, but got dict"):
        layers({"a": 1})
    assert layers.eval()({"a": 1}) == {"a": 1}


def test_compiled_layer_drop_equals_eager():
    layers, x = fdt.LayerDrop([Scaled() for _ in range(6)], 0.5, static_parameters=True), normal(3, 4)
    ours = compiled(layers)
    for seed in range(4):
        results = []
        for call in (layers, ours):
            layers.zero_grad()
            y = under(seed, call, x)
            y.sin().sum().backward()
            results.append((y.detach(), *gradients(layers)))
        torch.testing.assert_close(results[1], results[0])
    assert graphs() == 1
    one = nn.Linear(4, 4)
    mapped = under(2, vmap(fdt.LayerDrop([one], 0.5), randomness="different"), normal(40, 4))
    same = (mapped == normal(40, 4)).all(1)
    assert 8 < int(same.sum()) < 32
    torch.testing.assert_close(mapped[~same], one(normal(40, 4))[~same])


# ---- tools ----


def model():
    return nn.Sequential(
        fdt.SkipResidual(Scaled(), 0.2), fdt.LayerDrop([Scaled() for _ in range(4)], 0.2), nn.BatchNorm1d(4)
    )


def test_a_scheduler_drives_them():
    net = model()
    scheduler = fdt.DropoutScheduler(net, constant(1.0))
    assert scheduler.paths == ("0", "1")
    x = normal(6, 4)
    assert_equal(net[1](net[0](x)), x)
    scheduler = fdt.DropoutScheduler(net, lambda step: 1.0 if step else 0.0, filter=lambda path, m: path in "01")
    ours = compiled(lambda x: net[1](net[0](x)))
    wanted = net[0].branch(x) + x
    for layer in net[1]:
        wanted = layer(wanted)
    torch.testing.assert_close(ours(x), wanted)
    count = graphs()
    scheduler.step()
    assert_equal(ours(x), x)
    assert graphs() == count


def test_mc_dropout_turns_them_on():
    net, x = model().eval(), normal(6, 4)
    with fdt.mc_dropout(net):
        assert [m.training for m in net] == [True, True, False]
        assert len({tuple(net(x).flatten().tolist()) for _ in range(8)}) > 1
    prediction = fdt.mc_predict(net, x, samples=30, seed=1)
    one_by_one = fdt.mc_predict(net, x, samples=30, seed=1, batch=1)
    assert float(prediction.std.sum()) > 0
    torch.testing.assert_close(prediction.mean, one_by_one.mean)


def test_audit_looks_into_the_branch():
    """A layer in the branch is a step, and modules left on are found."""
    branch = nn.Sequential(nn.Linear(64, 64), fdt.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 64))
    net = nn.Sequential(nn.Linear(64, 64), fdt.SkipResidual(branch, 0.2), nn.Linear(64, 64))
    report = str(fdt.audit(net, torch.randn(8, 64)))
    assert "comes straight before the batch normalisation 1.branch.2" in report
    net.eval()
    net[1].training = True
    assert "SkipResidual(p=0.2) is in training mode" in str(fdt.audit(net))


def test_fx_sees_one_module():
    net = nn.Sequential(fdt.SkipResidual(Scaled(), 0.4), fdt.LayerDrop([Scaled()], 0.4))
    traced, x = torch.fx.symbolic_trace(net), normal(6, 4)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert_equal(under(1, traced, x), under(1, net, x))
    assert_equal(traced.eval()(x), copy.deepcopy(net).eval()(x))

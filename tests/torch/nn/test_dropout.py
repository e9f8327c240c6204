"""The modules of the whole family: the functions, torch's arguments, copies, tracing, a rate that may be driven."""

from __future__ import annotations

import copy
import math
import re

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import fastdrop.torch as fdt
from fastdrop.torch.nn.base import Rated

from ..cases import WAYS, Kind, assert_equal, numbers_drawn, saved_tensors, under
from ..module_cases import COPIES

PLAIN = Kind((7, 33), (7, 33), fdt.dropout, None, fdt.Dropout)
MODULES = {"dropout": PLAIN.stored_as("bits")} | {name: way for name, way in WAYS.items() if way.module is not None}
PEERS = {
    fdt.Dropout: nn.Dropout,
    fdt.Dropout1d: nn.Dropout1d,
    fdt.Dropout2d: nn.Dropout2d,
    fdt.Dropout3d: nn.Dropout3d,
    fdt.AlphaDropout: nn.AlphaDropout,
    fdt.FeatureAlphaDropout: nn.FeatureAlphaDropout,
}
# Those of the family that torch hasn't.
OTHERS = {
    "VariationalDropout": lambda p: fdt.VariationalDropout(p, 1),
    "StochasticDepth": lambda p: fdt.StochasticDepth(p, "row"),
    "DropPath": fdt.DropPath,
    "DropBlock2d": lambda p: fdt.DropBlock2d(p, 3),
    "DropBlock3d": lambda p: fdt.DropBlock3d(p, 3),
    "GaussianDropout": fdt.GaussianDropout,
}
REPRS = {
    "Dropout(p=0.5, inplace=False, store='bits', scaling='standard')": lambda: fdt.Dropout(scaling="standard"),
    "Dropout1d(p=0.5, inplace=False, store='bits')": fdt.Dropout1d,
    "Dropout2d(p=0.1, inplace=True, store='seed')": lambda: fdt.Dropout2d(0.1, True, store="seed"),
    "Dropout3d(p=0.5, inplace=False, store='bits')": fdt.Dropout3d,
    "AlphaDropout(p=0.5, inplace=False, store='bits')": fdt.AlphaDropout,
    "FeatureAlphaDropout(p=0.5, inplace=False, store='bits')": fdt.FeatureAlphaDropout,
    "VariationalDropout(p=0.5, time_axis=0, inplace=False, store='bits')": fdt.VariationalDropout,
    "VariationalDropout(p=0.2, time_axis=1, inplace=True, store='seed')": lambda: fdt.VariationalDropout(
        0.2, 1, True, store="seed"
    ),
    "StochasticDepth(p=0.2, mode='batch', store='seed')": lambda: fdt.StochasticDepth(0.2, "batch", store="seed"),
    "DropPath(drop_prob=0.0, scale_by_keep=True, store='bits')": fdt.DropPath,
    "DropPath(drop_prob=0.1, scale_by_keep=False, store='seed')": lambda: fdt.DropPath(0.1, False, store="seed"),
    "DropBlock2d(p=0.1, block_size=7, inplace=False)": lambda: fdt.DropBlock2d(0.1, 7),
    "DropBlock2d(p=0.1, block_size=(3, 5), inplace=True, couple_channels=True)": lambda: fdt.DropBlock2d(
        0.1, (3, 5), True, couple_channels=True
    ),
    "DropBlock3d(p=0.1, block_size=3, inplace=False)": lambda: fdt.DropBlock3d(0.1, 3),
    "GaussianDropout(p=0.5, inplace=False)": fdt.GaussianDropout,
}


@pytest.mark.parametrize("name", MODULES)
def test_module_is_the_function(name):
    way = MODULES[name]
    for p in way.p:
        module, x = way.module(p), torch.randn(way.shape, requires_grad=True)
        expected = under(5, way.torch, x, p)
        with saved_tensors() as kept:
            y = under(5, module, x)
        assert_equal(y.detach(), expected.detach())
        assert_equal(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))
        assert len(kept) == (2 if way.scaling == "blocks" else 1)
        assert numbers_drawn(lambda m=module, x=x: m(x)) == 1


@pytest.mark.parametrize("name", [name for name in MODULES if "stochastic" not in name])
def test_module_writes_in_place_if_asked(name):
    module, x = MODULES[name].module(0.3, inplace=True), torch.randn(MODULES[name].shape)
    expected = under(5, MODULES[name].torch, x, 0.3)
    assert under(5, module, x) is x
    assert_equal(x, expected)


@pytest.mark.parametrize("name", MODULES)
def test_module_follows_its_mode_and_a_p_that_changes(name):
    way = MODULES[name]
    module, x = way.module(0.5), torch.randn(way.shape)
    dropped = [module(x) for _ in range(8)]
    assert not all(torch.equal(y, dropped[0]) for y in dropped)
    assert numbers_drawn(lambda: module.eval()(x)) == 0
    if way.scaling == "standard":
        assert_equal(module(x), x * 0.5)
    else:
        assert module(x) is x
    module.train().p = 0.0
    assert module(x) is x
    module.p = 0.25
    assert_equal(under(3, module, x), under(3, way.torch, x, 0.25))
    module.p = 1.5
    with pytest.raises(ValueError, match=rf"^{way.probability} has to be between 0 and 1, but got 1\.5$"):
        module(x)


@pytest.mark.parametrize("ours", PEERS, ids=lambda cls: cls.__name__)
def test_module_has_the_arguments_of_torchs(ours):
    module, theirs = ours(), PEERS[ours]()
    assert isinstance(module, PEERS[ours])
    assert (module.p, module.inplace, module.training) == (theirs.p, theirs.inplace, theirs.training)
    assert ours.__constants__ == PEERS[ours].__constants__
    assert (ours(0.1, True).p, ours(0.1, True).inplace) == (0.1, True)


@pytest.mark.parametrize("text", REPRS)
def test_module_has_a_repr_and_copies(text):
    module = REPRS[text]().eval()
    assert repr(module) == text
    x = torch.ones((8,) * {"2d": 4, "3d": 5}.get(type(module).__name__[-2:], 3))
    for duplicate in (copy.deepcopy, COPIES["torch.save"]):
        twin = duplicate(module)
        assert (type(twin), repr(twin), twin.training) == (type(module), text, False)
        assert not [*twin.state_dict(), *twin.parameters(), *twin.buffers()]
        assert_equal(under(3, twin.train(), x.clone()), under(3, copy.copy(module).train(), x.clone()))


@pytest.mark.parametrize("name", MODULES)
def test_module_traced_by_fx_stays_a_module(name):
    """As one of torch's own: it follows eval(), and is no call that drops for ever."""
    way = MODULES[name]
    model, x = nn.Sequential(nn.Identity(), way.module(0.5)), torch.randn(way.shape)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert not [node for node in traced.graph.nodes if node.op == "call_function"]
    assert type(traced.get_submodule("1")) is type(model[1])
    assert_equal(under(3, traced, x), under(3, model, x))
    traced.eval()
    assert_equal(traced(x), model.eval()(x))


# ---- bad arguments ----


@pytest.mark.parametrize("p", [-0.1, 1.1, 2, math.inf, math.nan], ids=str)
def test_module_refuses_p_out_of_range(p):
    for ours, theirs in PEERS.items() if p == p else ():  # torch finds nothing wrong with NaN
        with pytest.raises(ValueError, match="between 0 and 1") as raised:
            ours(p)
        with pytest.raises(ValueError, match="between 0 and 1") as wanted:
            theirs(p)
        assert str(raised.value) == str(wanted.value)
    for make in OTHERS.values():
        with pytest.raises(ValueError, match=f"(dropout|drop) probability has to be between 0 and 1, but got {p}"):
            make(p)


@pytest.mark.parametrize("p", ["0.5", None], ids=repr)
def test_module_refuses_p_of_another_type(p):
    for make in (*PEERS, *OTHERS.values()):
        with pytest.raises(TypeError):
            make(p)


@pytest.mark.parametrize("make", [*PEERS, fdt.VariationalDropout, lambda **o: fdt.StochasticDepth(0.5, "row", **o)])
def test_module_refuses_an_unknown_store(make):
    with pytest.raises(ValueError, match=r"^store must be one of 'bits', 'seed', but got 'bytes'$"):
        make(store="bytes")


BAD = {
    "DropPath store": (lambda: fdt.DropPath(0.5, store="bytes"), "store must be one of 'bits', 'seed'"),
    "scaling": (lambda: fdt.Dropout(scaling="alpha"), "scaling must be one of 'inverted', 'standard', but got 'alpha'"),
    "mode": (lambda: fdt.StochasticDepth(0.5, "col"), "mode must be one of 'batch', 'row', but got 'col'"),
    "block size": (lambda: fdt.DropBlock2d(0.5, 0)(torch.ones(2, 3, 4, 4)), "block_size must be a positive int"),
    "Gaussian p = 1": (lambda: fdt.GaussianDropout(1.0), "p must be below 1 for Gaussian dropout"),
}


@pytest.mark.parametrize("name", BAD)
def test_module_refuses_other_bad_arguments(name):
    make, text = BAD[name]
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


# ---- one at a time ----


def test_drop_path_has_one_probability_of_two_names():
    module = fdt.DropPath(0.1)
    assert module.p == module.drop_prob == module.rate == 0.1
    module.p = 0.3
    assert module.drop_prob == 0.3
    module.drop_prob = 0.2
    assert module.p == module.rate == 0.2
    assert list(vars(module)).count("drop_prob") == 1
    assert "p" not in vars(module)
    x = torch.ones(20, 3)
    assert module.eval()(x) is x


# ---- a rate that may be driven ----


def test_rate_is_p_until_a_scheduler_drives_it_and_a_graph_reads_it(monkeypatch):
    for module in [way.module(0.5) for way in MODULES.values()] + [fdt.DropPath(0.5)]:
        assert isinstance(module, Rated)
        assert module.rate_tensor is None
        module.p = 0.25
        assert type(module.rate) is float
        fdt.DropoutScheduler(module, lambda step: 0.75)
        assert module.rate == 0.75
        assert not module.state_dict()
        twin = copy.deepcopy(module)
        assert (twin.p, float(twin.rate_tensor), twin.rate_tensor is not module.rate_tensor) == (0.75, 0.75, True)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert module.rate is module.rate_tensor
            module.rate_tensor = None
            assert module.rate == 0.75

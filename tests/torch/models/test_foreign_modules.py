"""timm's and torchvision's modules that drop, converted and while enabled, by stand-ins of the same names."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import fastdrop.torch as fdt
from fastdrop.torch.nn.structured import TimmDropBlock2d

from ...cases import output_of
from ..cases import assert_equal, gradient, numbers_drawn, under

TIMM, DEPTH, BLOCK = "timm.layers.drop", "torchvision.ops.stochastic_depth", "torchvision.ops.drop_block"


def stand_in(module, name, **defaults):
    """A class of theirs whose attributes are its arguments."""

    class Theirs(nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()
            vars(self).update(defaults | dict(zip(defaults, args, strict=False)) | kwargs)

        def forward(self, input):
            return input * 3 if self.training else input

    Theirs.__module__, Theirs.__name__, Theirs.__qualname__ = module, name, name
    setattr(sys.modules[module], name, Theirs)
    return Theirs


@pytest.fixture
def packages(monkeypatch):
    """Both packages as if imported: classes by name, which in training multiply by 3, so that they are told apart."""
    for name in ("timm", "timm.layers", TIMM, "torchvision", "torchvision.ops", DEPTH, BLOCK):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    block = {"inplace": False, "couple_channels": True, "scale_by_keep": True}
    return types.SimpleNamespace(
        DropPath=stand_in(TIMM, "DropPath", drop_prob=0.0, scale_by_keep=True),
        TimmBlock=stand_in(
            TIMM, "DropBlock2d", drop_prob=0.1, block_size=7, gamma_scale=1.0, with_noise=False, **block
        ),
        StochasticDepth=stand_in(DEPTH, "StochasticDepth", p=None, mode=None),
        Block2d=stand_in(BLOCK, "DropBlock2d", p=None, block_size=None, inplace=False, eps=1e-6),
        Block3d=stand_in(BLOCK, "DropBlock3d", p=None, block_size=None, inplace=False, eps=1e-6),
    )


IMAGES, VOLUMES = (6, 3, 7, 8), (3, 2, 4, 5, 6)


def depth(mode, scaling="inverted"):
    return partial(fdt.stochastic_depth, p=0.3, mode=mode, scaling=scaling)


# Theirs, what it becomes, the function that it then is, and the shape it takes.
MODULES = {
    "DropPath": (lambda p: p.DropPath(0.3), fdt.DropPath, depth("row"), IMAGES),
    "DropPath unscaled": (
        lambda p: p.DropPath(0.3, scale_by_keep=False),
        fdt.DropPath,
        depth("row", "standard"),
        IMAGES,
    ),
    "timm DropBlock2d": (
        lambda p: p.TimmBlock(0.3, 3),
        TimmDropBlock2d,
        partial(fdt.drop_block2d, p=0.3, block_size=3, couple_channels=True),
        IMAGES,
    ),
    "timm DropBlock2d of single channels": (
        lambda p: p.TimmBlock(0.4, 2, gamma_scale=0.5, couple_channels=False),
        TimmDropBlock2d,
        partial(fdt.drop_block2d, p=0.2, block_size=2),
        IMAGES,
    ),
    "StochasticDepth": (lambda p: p.StochasticDepth(0.3, "batch"), fdt.StochasticDepth, depth("batch"), IMAGES),
    "torchvision DropBlock2d": (
        lambda p: p.Block2d(0.3, 3),
        fdt.DropBlock2d,
        partial(fdt.drop_block2d, p=0.3, block_size=3),
        IMAGES,
    ),
    "torchvision DropBlock3d": (
        lambda p: p.Block3d(0.3, 3),
        fdt.DropBlock3d,
        partial(fdt.drop_block3d, p=0.3, block_size=3),
        VOLUMES,
    ),
}
LEFT = {
    "puts noise where it drops": {"with_noise": True},
    "doesn't scale what it keeps": {"scale_by_keep": False},
    "drops the same of all samples": {"batchwise": True},  # before timm 1.0.23
}


@pytest.fixture(params=MODULES)
def case(request, packages):
    """(module, its class with us, function, input)"""
    make, become, function, shape = MODULES[request.param]
    return make(packages), become, function, torch.randn(shape, dtype=torch.float64)


# ---- convert ----


def test_convert_and_revert(case):
    module, become, function, x = case
    theirs, before, attributes = type(module), repr(module), dict(vars(module))
    module.eval()
    model = nn.ModuleDict({"held": module, "again": nn.Sequential(module)})
    report = fdt.convert(model, store="seed")
    (row,) = report
    assert (row.path, row.before, row.after) == ("held", before, repr(module))
    assert not report.left
    assert (type(module), module.training) == (become, False)
    assert getattr(module, "store", "seed") == "seed"  # DropBlock keeps bits, and has no choice
    assert module(x) is x
    assert_equal(under(3, gradient, module.train(), x), under(3, gradient, function, x))
    assert len(fdt.convert(model, store="seed")) == 0
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is become
        assert_equal(under(3, twin, x), under(3, module, x))
        fdt.revert(twin)
        assert (type(twin), repr(twin)) == (theirs, before)
    (row,) = fdt.revert(model)
    assert (row.path, row.after) == ("held", before)
    assert type(module) is theirs
    assert dict(vars(module)) == attributes
    assert_equal(module(x), x * 3)


@pytest.mark.parametrize("reason", LEFT)
def test_convert_leaves_what_ours_does_not_do_and_says_why(packages, reason):
    module, x = packages.TimmBlock(0.3, 3, **LEFT[reason]), torch.ones(2, 3, 7, 8)
    before = dict(vars(module))
    (row,) = fdt.convert(nn.Sequential(module))
    assert (row.path, row.after, row.reason) == ("0", None, reason)
    assert type(module) is packages.TimmBlock
    assert dict(vars(module)) == before
    with fdt.enabled():
        assert_equal(module(x), x * 3)


def test_convert_knows_timms_former_drop_block(packages):
    """Which had no ``scale_by_keep`` and no ``couple_channels``."""
    module, x = packages.TimmBlock(0.3, 3), torch.randn(IMAGES)
    del module.scale_by_keep, module.couple_channels
    assert fdt.convert(nn.Sequential(module)).changed
    assert_equal(under(3, module, x), under(3, fdt.drop_block2d, x, 0.3, 3))


def test_converted_modules_follow_a_scheduler(packages):
    module, x = packages.DropPath(0.3), torch.randn(IMAGES)
    model = nn.Sequential(module)
    fdt.convert(model)
    scheduler = fdt.DropoutScheduler(model, lambda step: 0.2 * step)
    assert scheduler.paths == ("0",)
    assert model(x) is x
    scheduler.step()
    assert module.p == pytest.approx(0.2)
    assert float(module.rate_tensor) == pytest.approx(0.2)
    fdt.revert(model)
    assert "rate_tensor" not in vars(module)


# ---- enable ----


def test_enabled_module_is_fastdrops(case):
    module, become, function, x = case
    with fdt.enabled():
        assert type(module) is not become
        for seed in range(3):
            assert_equal(under(seed, gradient, module, x), under(seed, gradient, function, x))
        assert numbers_drawn(lambda: module(x)) == 1
        assert module.eval()(x) is x
        twins = copy.deepcopy(module.train()), pickle.loads(pickle.dumps(module))
        fdt.convert(module)
        assert type(module) is become
        assert_equal(under(3, module, x), under(3, function, x))
        fdt.revert(module)
    for outside in (module, *twins):
        assert_equal(outside(x), x * 3)


def test_classes_are_changed_once(packages):
    """Another thread may be on its way into what they have."""
    classes = list(vars(packages).values())
    before = [vars(cls)["forward"] for cls in classes]
    fdt.enable()
    grafted = [dict(vars(cls)) for cls in classes]
    assert all(own["forward"] is not was for own, was in zip(grafted, before, strict=True))
    fdt.disable()
    with pytest.raises(KeyError), fdt.enabled():
        raise KeyError
    assert [dict(vars(cls)) for cls in classes] == grafted


SCRIPTED = """
import sys, types, torch
import fastdrop.torch as fdt
class Watch:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("timm", "torchvision"):
            asked.append(name)
asked = []
sys.meta_path.insert(0, Watch())
fdt.enable()
fdt.convert(torch.nn.Sequential(torch.nn.Dropout2d(0.5)))
fdt.disable()
for name in ("timm", "timm.layers", "timm.layers.drop"):
    sys.modules[name] = types.ModuleType(name)
def thrice(x: torch.Tensor):
    return x * 3
class DropPath(torch.nn.Module):
    drop_prob: float
    def __init__(self):
        super().__init__()
        self.drop_prob = 0.5
    def forward(self, x):
        return thrice(x)
DropPath.__module__, sys.modules["timm.layers.drop"].DropPath = "timm.layers.drop", DropPath
fdt.enable()
forward = DropPath.forward
fdt.disable()
print(forward is DropPath.forward, torch.jit.script(DropPath())(torch.ones(1)).item(), asked)
"""


def test_module_can_be_scripted(tmp_path):
    """TorchScript finds the source of its own forward, and the names in it where that was written.

    And nothing of timm or torchvision is imported.
    """
    path = tmp_path / "scripted.py"
    path.write_text(SCRIPTED)
    assert output_of(f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')") == "True 3.0 []"


def test_enabled_leaves_other_tensors(case):
    module, x = case[0], torch.ones(case[3].shape, dtype=torch.int64)
    with fdt.enabled():
        assert_equal(module(x), x * 3)
        assert_equal(module(case[3].to_sparse()).to_dense(), case[3] * 3)


def test_enabled_reaches_what_derives_from_theirs(packages):
    """Unless its forward is its own."""

    class Mine(packages.StochasticDepth):
        pass

    class StochasticDepth(packages.StochasticDepth):
        def forward(self, x):
            return x * 5

    StochasticDepth.__qualname__ = "StochasticDepth"
    x, other = torch.randn(IMAGES), StochasticDepth(0.3, "row")
    with fdt.enabled():
        assert_equal(under(3, Mine(0.3, "row"), x), under(3, fdt.stochastic_depth, x, 0.3, "row"))
        assert_equal(other(x), x * 5)
    fdt.convert(nn.Sequential(other))
    assert type(other) is StochasticDepth


@pytest.mark.filterwarnings("ignore")
def test_enabled_module_compiles_in_one_graph(packages):
    make, _, function, shape = MODULES["timm DropBlock2d of single channels"]
    module, x = make(packages), torch.randn(shape, dtype=torch.float64)
    torch.compiler.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert_equal(compiled(x), x * 3)
        with fdt.enabled():
            for seed in range(2):
                assert_equal(under(seed, gradient, compiled, x), under(seed, gradient, function, x))
        assert_equal(compiled(x), x * 3)
    torch.compiler.reset()


def test_enable_passes_over_a_package_without_the_class(packages):
    del sys.modules[TIMM].DropBlock2d
    forward = vars(packages.TimmBlock)["forward"]
    with fdt.enabled():
        assert vars(packages.TimmBlock)["forward"] is forward
        assert vars(packages.DropPath)["forward"] is not forward


def test_enabled_modules_are_traced_by_fx(packages):
    model, x = nn.Sequential(packages.DropPath(0.3), packages.TimmBlock(0.3, 3)).eval(), torch.randn(IMAGES)
    with fdt.enabled():
        assert_equal(torch.fx.symbolic_trace(model)(x), x)

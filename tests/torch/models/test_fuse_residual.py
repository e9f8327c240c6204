"""`fuse` of timm's and torchvision's residual blocks, on stand-ins and, where the packages are, on their own models."""

from __future__ import annotations

import copy
import itertools
import pickle
import types
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import fastdrop.torch as fdt
from fastdrop.torch.models.fuse.residual_layers import FUSED_CLASSES

from ..cases import assert_equal, under
from ..ops.compiling import compiled, fresh_compiler
from . import vision_blocks as blocks
from .vision_blocks import SHAPES, WIDTH, DropPath

__all__ = ["fresh_compiler"]

MORE = [
    partial(blocks.ConvNeXtBlock, use_conv_mlp=True),
    partial(blocks.ConvNeXtBlock, gamma=False),
    partial(blocks.InvertedResidual, s2d=True),
    partial(blocks.DepthwiseSeparableConv, s2d=True),
]
EFFICIENT = [cls for cls in SHAPES if "fficient" in cls.__module__]


def block(make, p=0.5, **options):
    torch.manual_seed(1)
    return make(p, **options).double()


def input_of(make, samples=6):
    shape = SHAPES[getattr(make, "func", make)]
    generator = torch.Generator().manual_seed(2)
    return torch.randn((samples, *shape[1:]), dtype=torch.float64, generator=generator)


def converted(model):
    twin = copy.deepcopy(model)
    fdt.convert(twin)
    return twin


def step(model, x, seed=3, **options):
    """Result, gradients and torch's state after a step under one seed; gradients that are None stay None."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = under(seed, model, x, **options)
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers(), torch.get_rng_state()]


def assert_same_step(model, other, x, **options):
    torch.testing.assert_close(step(model, x, **options), step(other, x, **options))


def samples_of(model):
    """A list of the numbers of samples that the model's first leaf with parameters gets from here on."""
    leaf = next(m for m in model.modules() if not list(m.children()) and list(m.parameters()))
    counts: list = []
    leaf.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    return counts


def test_stand_ins_are_all_that_is_known():
    assert {(cls.__module__, cls.__qualname__) for cls in SHAPES} == set(FUSED_CLASSES)


@pytest.mark.parametrize("make", [*SHAPES, *MORE], ids=lambda make: getattr(make, "func", make).__name__)
def test_fused_block_is_the_converted_one(make):
    """Values, gradients, numbers taken from the generator; with p below min_p, none kept, one sample. Evaluation is
    the original's bit for bit."""
    x, seen = input_of(make), set()
    for p in (0.03, 0.5, 1.0):
        model = block(make, p)
        plain, name = converted(model), type(model).__name__
        report = fdt.fuse(model)
        assert [(row.path, row.before, row.after) for row in report] == [("", name, f"Fused{name}")]
        assert_equal(model.eval()(x), plain.eval()(x))
        model.train()
        plain.train()
        counts = samples_of(model)
        for seed in range(3 if p == 0.5 else 1):
            assert_same_step(model, plain, x, seed=seed)
            seen.add((p, counts[0]))
            assert_same_step(model, plain, x[:1], seed=seed)
            counts.clear()
        assert not len(fdt.fuse(model))
        expected = step(model, x)
        fdt.convert(model)  # the modules inside, which then give rate and seeds as before
        assert_equal(tuple(step(model, x)), tuple(expected))
        assert [row.after for row in fdt.unfuse(model)] == [name]
        assert type(model) is type(plain)
    assert seen >= {(0.03, 6), (1.0, 1)}  # no sample is kept: the first, whose result isn't used
    assert any(p == 0.5 and 1 < count < 6 for p, count in seen)


@pytest.mark.parametrize("make", EFFICIENT, ids=lambda make: make.__name__)
def test_batch_norm_is_left_unless_asked_for(make):
    """With kept samples only it computes what `SkipResidual` does around the same branch, running statistics too."""
    x = input_of(make)
    model = block(make, batch=True)
    (row,) = fdt.fuse(model)
    path = "block.1" if hasattr(model, "block") else "bn1"
    assert (row.after, row.reason) == (
        None,
        f"its batch norm {path} would compute statistics from kept samples only; "
        "fdt.fuse(model, batch_norm_on_kept=True) accepts that",
    )
    assert type(model) is make
    skip = fdt.SkipResidual(branch_of(copy.deepcopy(model)), 0.5)
    assert fdt.fuse(model, batch_norm_on_kept=True).changed
    assert not len(fdt.fuse(model))
    for seed in range(3):
        for samples in (1, 3, 6):
            assert_same_step(model, skip, x[:samples], seed=seed)


def branch_of(model):
    """A block without its residual."""
    for name in ("has_skip", "use_res_connect"):
        if hasattr(model, name):
            setattr(model, name, False)
    return model


def test_masks_of_attention():
    """A mask with an axis of samples is cut to those that are kept; others are shared."""
    n, length, _ = blocks.TOKENS
    draw = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    own = draw(n, 1, length, length)
    masks = [own, own > -1, draw(1, 2, length, length), draw(2, length, length), draw(length, length)]
    masks[1] |= torch.eye(length, dtype=torch.bool)
    for make in (blocks.Block, blocks.ResPostBlock):
        model, x = block(make), input_of(make)
        plain = converted(model)
        fdt.fuse(model)
        for p, options in itertools.product((0.5, 1.0), [{"is_causal": True}, *({"attn_mask": m} for m in masks)]):
            model.drop_path1.drop_prob = plain.drop_path1.drop_prob = p
            assert_same_step(model, plain, x, **options)
        assert_equal(under(3, model, x, own), under(3, model, x, attn_mask=own))


def test_options_of_the_module_that_drops():
    """scale_by_keep, a rate that changes later, one branch without dropout, torch's own dropout in a branch."""
    model, x = block(blocks.Block), input_of(blocks.Block)
    model.drop_path1.scale_by_keep, model.drop_path2 = False, nn.Identity()
    plain = converted(model)
    fdt.fuse(model)
    assert_same_step(model, plain, x)
    for each in (model, plain):
        each.drop_path1.drop_prob = 1.0
    assert_same_step(model, plain, x)
    for each in (model, plain):
        each.drop_path1.drop_prob, each.drop_path1.training = 0.5, False
    assert_same_step(model, plain, x)
    model = nn.Sequential(block(blocks.Block), block(blocks.CNBlock))
    model[0].mlp.append(nn.Dropout(0.25))
    assert [(row.path, row.after) for row in fdt.fuse(model)] == [
        ("0", "FusedBlock"),
        ("0.mlp", "FusedSequential: 2 + 3"),
        ("1", "FusedCNBlock"),
    ]
    assert not len(fdt.fuse(block(blocks.Block, 0.0)))


class Own(DropPath):
    def forward(self, x):
        return x * 2


def with_drop(drop):
    model = block(blocks.Block)
    model.drop_path2 = drop
    return model


def with_hook(model):
    model.drop_path2.register_forward_hook(lambda *args: None)
    return model


def with_forward(model):
    model.forward = types.MethodType(type(model).forward, model)
    return model


def with_shortcut():
    model = block(blocks.ConvNeXtBlock)
    model.shortcut = nn.Conv2d(WIDTH, WIDTH, 1).double()
    return model


def of_another_version():
    def forward(self, x, attn_mask=None, is_causal=False):
        return x + self.drop_path1(self.attn(x)) + self.drop_path2(self.mlp(x))

    Old = type("Block", (blocks.Block,), {"forward": forward})
    Old.__module__ = forward.__module__ = blocks.VIT
    forward.__qualname__ = "Block.forward"
    model = block(blocks.Block)
    model.__class__ = Old
    return model


LEFT = {
    "it has no residual": lambda: block(blocks.ConvBnAct, has_skip=False),
    "its shortcut is a Conv2d": with_shortcut,
    "stochastic_depth drops the whole batch at once": lambda: block(blocks.CNBlock, mode="batch"),
    "drop_path2 is a Own, not a known one": lambda: with_drop(Own(0.5)),
    "drop_path2 has hooks": lambda: with_hook(block(blocks.Block)),
    "drop_path2's forward was replaced on the object itself": lambda: with_drop(with_forward(DropPath(0.5))),
    "its forward was replaced on the object itself": lambda: with_forward(block(blocks.Block)),
    "its forward is that of an unknown version of timm": of_another_version,
}


@pytest.mark.parametrize("reason", LEFT)
def test_blocks_that_are_left(reason):
    model = LEFT[reason]()
    before = type(model)
    row, *others = fdt.fuse(model)
    assert (row.path, row.after, row.reason) == ("", None, reason)
    assert not others
    assert type(model) is before


def test_modules_that_skip_by_themselves_are_left():
    """Each has one line, without the modules inside."""
    model = nn.Sequential(fdt.SkipResidual(nn.Sequential(nn.Linear(4, 4)), 0.5))
    model.layers = fdt.LayerDrop([nn.Linear(4, 4)], 0.5)
    rows = list(fdt.fuse(model))
    assert [row.before.partition("(")[0] for row in rows] == ["SkipResidual", "LayerDrop"]
    assert {(row.after, row.reason, "\n" in row.before) for row in rows} == {
        (None, "it computes only what it keeps", False)
    }


def test_original_forward_runs_for_what_changed_since():
    """With hooks on the module that drops, another one, or an input that isn't floating point."""
    x = input_of(blocks.Block)
    for change in (with_hook, lambda model: setattr(model, "drop_path2", Own(0.5))):
        model = block(blocks.Block)
        fdt.convert(model)
        plain = copy.deepcopy(model)
        fdt.fuse(model)
        change(model)
        change(plain)
        counts = samples_of(model)
        assert_equal(under(3, model, x), under(3, plain, x))
        assert counts == [6]


def test_copies_and_scripting(monkeypatch):
    model, x = nn.Sequential(block(blocks.Block), block(blocks.MBConv)).double(), input_of(blocks.Block)
    fdt.fuse(model)
    blocks.register(monkeypatch, blocks.Block, blocks.MBConv, DropPath, blocks.StochasticDepth)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert_equal(under(3, twin[0], x), under(3, model[0], x))
    with pytest.raises(RuntimeError, match=r"a FusedBlock can't be scripted: call fdt\.unfuse before"):
        torch.jit.script(model[0])


def test_dtypes_under_autocast():
    """torchvision adds the residual in place, so the branch's dtype stays."""
    for make in (blocks.Block, blocks.CNBlock, blocks.MBConv):
        model, x = block(make).float(), input_of(make).float()
        plain = converted(model)
        fdt.fuse(model)
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = under(3, model, x), under(3, plain, x)
        assert actual.dtype is expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore")
def test_compiled():
    """In one graph, on all samples, with the same ones dropped."""
    model, x = block(blocks.Block), input_of(blocks.Block)
    fdt.fuse(model)
    expected = step(model, x)
    torch.testing.assert_close(step(compiled(model), x), expected)


# ---- their own models ----


def timm_models():
    timm = pytest.importorskip("timm")
    options = {"drop_path_rate": 0.5, "num_classes": 5}
    yield timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, **options)
    swin = {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (1, 2), "num_heads": (2, 4)}
    yield timm.create_model("swin_tiny_patch4_window7_224", **swin, **options)
    yield timm.create_model("convnext_atto", depths=(1, 1, 2, 1), **options)
    yield timm.create_model("efficientnet_b0", **options)


def torchvision_models():
    models = pytest.importorskip("torchvision").models
    options = {"stochastic_depth_prob": 0.5, "num_classes": 5}
    yield models.SwinTransformer([4, 4], 32, [1, 2], [2, 4], [4, 4], **options)
    yield models.convnext_tiny(**options)
    yield models.efficientnet_b0(**options)


@pytest.mark.parametrize("models", [timm_models, torchvision_models], ids=["timm", "torchvision"])
def test_their_own_models(models):
    torch.manual_seed(1)
    for model in models():
        plain, x = converted(model), torch.randn(3, 3, 64, 64)
        if isinstance(getattr(model, "patch_embed", None), nn.Module):
            x = x[..., : model.patch_embed.img_size[0], : model.patch_embed.img_size[1]]
        batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        report = fdt.fuse(model)
        assert bool(report.changed) != batch_norm
        assert fdt.fuse(model, batch_norm_on_kept=True).changed or not batch_norm
        assert_equal(model.eval()(x), plain.eval()(x))
        model.train()
        plain.train()
        if batch_norm:
            assert step(model, x)[0].isfinite().all()
            continue
        for seed in range(2):
            for actual, expected in zip(step(model, x, seed), step(plain, x, seed), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)

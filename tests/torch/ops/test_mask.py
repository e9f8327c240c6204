"""The ops of masks, called by themselves: torch's own checks, values, what they refuse, and transforms around them."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD
from torch.func import vmap

import fastdrop.torch as fdt

from ..cases import assert_equal, under

OPS = torch.ops.fastdrop
SAMPLES = {
    "plain": lambda: torch.randn(2, 3, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(5, 4, 3, 2).permute(3, 2, 1, 0),
    "strided": lambda: torch.randn(2, 3, 8, 15)[..., ::2, 1::3],
    "expanded": lambda: torch.randn(2, 3, 1, 5).expand(2, 3, 4, 5),
    "empty": lambda: torch.randn(2, 0, 4, 5),
    "bfloat16": lambda: torch.randn(2, 3, 4, 5).bfloat16(),
}
GUARD = "the plain sample"
some_samples = pytest.mark.parametrize(
    "sample", [pytest.param(name, marks=() if name == "plain" else pytest.mark.slow(GUARD)) for name in SAMPLES]
)


@pytest.fixture
def x():
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def overloads(overload):
    """p for an overload, and its ops by name."""
    p = 0.3 if overload == "default" else torch.tensor(0.3)
    return p, {
        name: getattr(getattr(OPS, name), overload) for name in ("gaussian", "forward", "backward", "draw_blocks")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("overload", ["default", "tensor"])
@some_samples
def test_opcheck(sample, overload):
    """Schemas, fake kernels, autograd and compiled graphs. Asking for a gradient changes nothing about a layout."""
    p, op = overloads(overload)
    seed = torch.tensor(3)
    torch.library.opcheck(OPS.draw, (torch.ones(3), [3]))
    for x in (SAMPLES[sample]().requires_grad_(), SAMPLES[sample]())[: 2 if sample == "plain" else 1]:
        torch.library.opcheck(op["gaussian"], (x, seed, p))
        channels = [*x.shape[:2], 1, 1]
        torch.library.opcheck(op["forward"], (x, seed, p, channels, True, "alpha"))
        torch.library.opcheck(op["forward"], (x, seed, p, None, False, "standard"))
        words = op["forward"](x.detach(), seed, p, channels, True, "alpha")[1]
        torch.library.opcheck(op["backward"], (x, words, p, channels, "alpha_slope"))
        coupled = [x.shape[0], min(1, x.shape[1]), *x.shape[2:]]
        torch.library.opcheck(op["draw_blocks"], (x, seed, p, coupled, [2, 3]))
        torch.library.opcheck(OPS.keep_blocks, (x, *op["draw_blocks"](x, seed, p, coupled, [2, 3]), coupled))


@pytest.mark.parametrize("overload", ["default", "tensor"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_ops_equal_functions(sample, overload):
    x, seed = SAMPLES[sample](), torch.tensor(3)
    p, op = overloads(overload)
    number = float(p)
    for z in (x, x.cfloat()):
        y, words = op["forward"](z, seed, p, None, True)
        expected = fdt.dropout(z, number, seed=3)
        assert_equal(y, expected)
        assert y.stride() == expected.stride()
        assert_equal(op["backward"](z, words, p, None), expected)
    assert_equal(op["gaussian"](x, seed, p), fdt.gaussian_dropout(x, number, seed=3))
    cells = [*x.shape[:2], 1, 1]
    y, words = op["forward"](x, seed, p, cells, True, "alpha")
    assert_equal(y, fdt.feature_alpha_dropout(x, number, True, seed=3))
    assert words.numel() == math.ceil(math.prod(cells) / 32)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(fdt.feature_alpha_dropout(leaf, number, True, seed=3), leaf, x)
    assert_equal(op["backward"](x, words, p, cells, "alpha_slope"), dx)
    words, kept = op["draw_blocks"](x, seed, p, [*x.shape], [2, 3])
    assert (words.dtype, kept.dtype, kept.shape) == (torch.int32, torch.int64, ())
    y = OPS.keep_blocks(x, words, kept, [*x.shape])
    assert_equal(y, fdt.drop_block2d(x, number, (2, 3), seed=3))
    assert int(kept) == int((fdt.drop_block2d(torch.ones(x.shape), number, (2, 3), seed=3) != 0).sum())
    assert y.stride() == torch.empty_like(x).stride()


# ---- what they refuse ----


def test_ops_refuse_words_they_would_read_beyond():
    for words in (torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(4).long()):
        for noise_shape in (None, [1, 100]):
            with pytest.raises(ValueError, match="words must be 4 int32"):
                OPS.backward(torch.ones(1, 100), words, 0.3, noise_shape)
        with pytest.raises(ValueError, match="words must be 4 int32"):
            OPS.keep_blocks(torch.ones(2, 3, 4, 5), words, torch.tensor(5), [2, 3, 4, 5])


def test_op_reads_strided_words_right_or_refuses_them():
    x = torch.randn(3, 100)
    words = OPS.forward(x, torch.tensor(3), 0.3, None, True)[1]
    spread = torch.full((2 * words.numel(),), -1, dtype=torch.int32)[::2].copy_(words)
    try:
        dx = OPS.backward(x, spread, 0.3, None)
    except ValueError:
        return
    assert_equal(dx, OPS.backward(x, words, 0.3, None))


@pytest.mark.parametrize("noise_shape", [[2, 6], [4], [4, 6, 1], [8, 6]], ids=str)
def test_op_refuses_a_noise_shape_that_does_not_fit(x, noise_shape):
    with pytest.raises((RuntimeError, ValueError)):
        OPS.forward(x, torch.tensor(3), 0.3, noise_shape, True)


@pytest.mark.parametrize("overload", ["default", "tensor"])
def test_ops_refuse_p_out_of_range(overload):
    x, seed = torch.ones(2, 3, 4, 5), torch.tensor(3)
    _, op = overloads(overload)
    for p in (1.5, -0.1, math.nan):
        given = p if overload == "default" else torch.tensor(p)
        with pytest.raises(ValueError, match="between 0 and 1"):
            op["gaussian"](x, seed, given)
        with pytest.raises(ValueError, match="between 0 and 1"):
            op["draw_blocks"](x, seed, given, [2, 3, 4, 5], [2, 2])
    with pytest.raises(ValueError, match="below 1"):
        op["gaussian"](x, seed, 1.0 if overload == "default" else torch.tensor(1.0))


# ---- transforms ----


def test_op_maps_over_words_on_any_axis():
    x = torch.randn(3, 100)
    words = torch.stack([OPS.forward(x, torch.tensor(seed), 0.3, None, True)[1] for seed in range(4)], -1)
    ours = vmap(lambda words: OPS.backward(x, words, 0.3, None), in_dims=1)(words)
    assert_equal(ours, torch.stack([fdt.dropout(x, 0.3, seed=seed) for seed in range(4)]))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_the_ops_draws_as_vmap_of_dropout(x, randomness):
    def op(x):
        return OPS.forward(x, OPS.draw(x, []), 0.5, None, True)[0]

    assert_equal(under(3, vmap(op, randomness=randomness), x), under(3, vmap(fdt.dropout, randomness=randomness), x))
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(op)(x)


def test_op_carries_a_forward_derivative(x):
    """Called by itself as well: silence would be a tangent of zero."""
    with fwAD.dual_level():
        y, _ = OPS.forward(fwAD.make_dual(x, x.cos()), torch.tensor(4), 0.5, None, True)
        assert_equal(fwAD.unpack_dual(y).tangent, fdt.dropout(x.cos(), 0.5, seed=4))


@pytest.mark.parametrize("bits", [True, False])
def test_op_under_a_transform_is_right_or_refused(x, bits):
    """Never a derivative of zero without a word."""
    from ..functional.test_gradients import TRANSFORMS

    for transform in TRANSFORMS.values():
        expected = transform(lambda x: fdt.dropout(x, 0.4, seed=7, noise_shape=(1, 6)), x)
        try:
            ours = transform(lambda x: OPS.forward(x, torch.tensor(7), 0.4, [1, 6], bits)[0], x)
        except RuntimeError:
            continue
        torch.testing.assert_close(ours, expected)

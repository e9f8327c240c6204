"""The ops called by themselves: torch's own checks, values, derivatives, and transforms around them.

What they refuse is in test_raw_ops.py.
"""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD
from torch.func import vmap

import fastdrop as fd
import fastdrop.torch as fdt
from fastdrop.core.activations import ACTIVATIONS
from fastdrop.torch.ops import pointwise as pointwise_ops

from ..cases import assert_equal, under
from ..functional.fused_cases import ACTIVATIONS as FORMULAS

# torch's own, when it first loads what forward-mode AD needs
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

OPS = torch.ops.fastdrop
P, SEED = 0.3, torch.tensor(3)
SAMPLES = {
    "plain": lambda: torch.randn(2, 3, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(2, 3, 8, 15)[..., ::2, 1::3],
    "expanded": lambda: torch.randn(2, 3, 1, 5).expand(2, 3, 4, 5),
    "empty": lambda: torch.randn(2, 0, 4, 5),
    "bfloat16": lambda: torch.randn(2, 3, 4, 5).bfloat16(),
}


@pytest.fixture
def x():
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---- torch's checks: schemas, fake kernels, autograd and compiled graphs ----


def check(name, *arguments):
    """With p as a number or as a tensor, whichever it is."""
    by_tensor = any(isinstance(x, torch.Tensor) and x.dtype is torch.float64 and x.dim() == 0 for x in arguments)
    overload = "tensor" if by_tensor else "default"
    op = getattr(getattr(OPS, name), overload)
    torch.library.opcheck(op, arguments)
    return op(*(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))


@pytest.mark.parametrize("sample", ["plain", "strided"])
def test_opcheck_of_masks(sample):
    x, p = SAMPLES[sample](), P if sample == "strided" else torch.tensor(P, dtype=torch.float64)
    leaf, channels, coupled = x.clone().requires_grad_() if sample == "plain" else x, [2, 3, 1, 1], [2, 1, *x.shape[2:]]
    check("draw", torch.ones(3), [3])
    check("gaussian", leaf, SEED, p)
    check("forward", leaf, SEED, p, None, False, "standard")
    _, words = check("forward", leaf, SEED, p, channels, True, "alpha")
    check("backward", leaf, words, p, channels, "alpha_slope")
    check("keep_blocks", leaf, *check("draw_blocks", x, SEED, p, coupled, [2, 3]), coupled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck_of_fused_ops(dtype):
    """All six, with and without what may be missing; p as a tensor beside float32."""
    p = P if dtype is torch.bfloat16 else torch.tensor(P, dtype=torch.float64)
    x, other = (torch.randn(4, 3, 10).to(dtype).requires_grad_() for _ in range(2))
    stream, bias = torch.randn(4, 3, 10, requires_grad=True), torch.randn(10, requires_grad=True)
    y, vector, residual = x.detach(), bias.detach(), stream.detach()
    check("pointwise", x, bias, None, None, SEED, p, "relu", True)
    check("pointwise", x, None, other, None, SEED, p, "silu", False)
    check("pointwise", x.transpose(0, 1), None, None, None, None, p, "gelu", True)
    _, words = check("pointwise", x, bias, None, stream, SEED, p, None, True)
    check("pointwise_backward", y, None, None, None, words, p, True, None, dtype, False, False)
    check("pointwise_backward", residual, None, None, None, SEED, p, False, None, dtype, True, False)
    check("pointwise_backward", y, y, vector, y, words, p, True, "silu", dtype, True, True)
    check("norm", x, None, None, None, None, None, p, 1e-5, False, True)
    _, sum, statistics, words = check("norm", x, bias, stream, bias, bias, SEED, p, 1e-5, True, True)
    check("norm_backward", y, sum, sum, statistics, vector, words, p, True, True, [True] * 5)
    check("norm_backward", y, None, y, statistics, None, None, p, True, True, [True, True, False, False, False])
    check("softmax", x, torch.randn(3, 10, requires_grad=True), SEED, p, 0.5, True, True, True)
    check("softmax", x, None, None, p, 0.5, False, True, True)
    _, probabilities, words = check("softmax", x, None, SEED, p, 1.0, False, True, True)
    check("softmax_backward", y, probabilities, words, p, True, 0.5)


# ---- values and derivatives ----


@pytest.mark.parametrize("sample", SAMPLES)
def test_ops_equal_functions(sample):
    x, p = SAMPLES[sample](), P if sample == "plain" else torch.tensor(P)
    number = float(p)
    for z in (x, x.cfloat()):
        y, words = OPS.forward(z, SEED, p, None, True)
        expected = fdt.dropout(z, number, seed=3)
        assert_equal(y, expected)
        assert y.stride() == expected.stride()
        assert_equal(OPS.backward(z, words, p, None), expected)
    assert_equal(OPS.gaussian(x, SEED, p), fdt.gaussian_dropout(x, number, seed=3))
    cells = [*x.shape[:2], 1, 1]
    y, words = OPS.forward(x, SEED, p, cells, True, "alpha")
    assert_equal(y, fdt.feature_alpha_dropout(x, number, True, seed=3))
    assert words.numel() == math.ceil(math.prod(cells) / 32)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(fdt.feature_alpha_dropout(leaf, number, True, seed=3), leaf, x)
    assert_equal(OPS.backward(x, words, p, cells, "alpha_slope"), dx)
    words, kept = OPS.draw_blocks(x, SEED, p, [*x.shape], [2, 3])
    assert (words.dtype, kept.dtype, kept.shape) == (torch.int32, torch.int64, ())
    y = OPS.keep_blocks(x, words, kept, [*x.shape])
    assert_equal(y, fdt.drop_block2d(x, number, (2, 3), seed=3))
    assert int(kept) == int((fdt.drop_block2d(torch.ones(x.shape), number, (2, 3), seed=3) != 0).sum())
    assert y.stride() == torch.empty_like(x).stride()


def test_op_reads_strided_words():
    x = torch.randn(3, 100)
    words = OPS.forward(x, SEED, P, None, True)[1]
    spread = torch.full((2 * words.numel(),), -1, dtype=torch.int32)[::2].copy_(words)
    assert_equal(OPS.backward(x, spread, P, None), OPS.backward(x, words, P, None))


def test_every_activation_has_a_formula():
    """The kernel's function, and the one that gradients of any order are composed of."""
    assert list(pointwise_ops.FORMULAS) == list(ACTIVATIONS)
    x = torch.randn(50)
    for name in ACTIVATIONS:
        expected = FORMULAS[name](x)
        torch.testing.assert_close(pointwise_ops.activated(x, name), expected)
        y, _ = OPS.pointwise(x, None, None, None, None, 0.0, name, False)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(KeyError, match="tanh"):
        pointwise_ops.activated(x, "tanh")


FUNCTIONS = {
    "pointwise": lambda x, bias: OPS.pointwise(x, bias, None, x, SEED, P, "gelu", True)[0] ** 2,
    "norm": lambda x, bias: OPS.norm(x, bias, None, bias, bias, SEED, P, 1e-5, True, False)[:2],
    "softmax": lambda x, bias: OPS.softmax(x, bias, SEED, P, 0.5, False, True, True)[0] ** 2,
    "softmax that keeps nothing": lambda x, bias: OPS.softmax(x, bias, SEED, P, 0.5, True, False, False)[0] ** 2,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_fused_ops(name):
    """Also of second order, as eager code may call them."""
    x, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (4,)))
    assert torch.autograd.gradcheck(FUNCTIONS[name], (x, bias))
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], (x, bias))


def test_gradient_ops_refuse_to_be_differentiated():
    """Instead of no gradient without a word: their derivatives are composed of others."""
    dy = torch.randn(3, 4, requires_grad=True)
    dx, _, _ = OPS.pointwise_backward(dy, None, None, None, SEED, P, False, None, dy.dtype, False, False)
    with pytest.raises(NotImplementedError, match="backward"):
        dx.sum().backward()


# ---- transforms ----


def test_ops_map_over_any_axis():
    x = torch.randn(3, 100)
    words = torch.stack([OPS.forward(x, torch.tensor(seed), P, None, True)[1] for seed in range(4)], -1)
    ours = vmap(lambda words: OPS.backward(x, words, P, None), in_dims=1)(words)
    assert_equal(ours, torch.stack([fdt.dropout(x, P, seed=seed) for seed in range(4)]))

    def fused(x):
        return OPS.pointwise(x, None, None, None, SEED, P, None, True)[0]

    assert_equal(vmap(fused, in_dims=1)(x), torch.stack([fused(x[:, i]) for i in range(100)]))
    assert vmap(fused)(x[:0]).shape == (0, 100)


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


def test_profilers_that_record_shapes_take_all_seeds():
    """torch converts the arguments of autograd functions then, and can't convert an int of 2**63 or more."""
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    calls = {
        "dropout": lambda: fdt.dropout(x, P, seed=2**64 - 1),
        "of a part": lambda: fdt.dropout(x, P, seed=2**64 - 1, part=fd.Part((4, *x.shape[1:]), (2, 0, 0, 0), x.shape)),
        "gaussian": lambda: fdt.gaussian_dropout(x, P, seed=2**64 - 1),
        "residual": lambda: fdt.dropout_add(x, x, P, seed=2**64 - 1),
        "norm": lambda: fdt.dropout_add_layer_norm(x, x, p=P, seed=2**64 - 1)[0],
        "softmax": lambda: fdt.softmax_dropout(x, P, seed=2**64 - 1),
        "attention": lambda: fdt.scaled_dot_product_attention(x, x, x, dropout_p=P, seed=2**64 - 1),
    }
    for name, call in calls.items():
        expected = call()
        with torch.autograd.profiler.profile(record_shapes=True):
            y = call()
            y.sum().backward()
        torch.testing.assert_close(y, expected, rtol=0, atol=0, msg=name)

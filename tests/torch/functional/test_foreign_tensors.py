"""Tensors of other memory layouts, sparse and quantised tensors, and a p that requires a gradient."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn import functional as F

import fastdrop.torch as fdt

from ..cases import assert_equal, under

# ---- memory layouts of fused functions ----

SHAPE = (2, 3, 4, 5)
LAYOUTS = {
    "channels_last": lambda: torch.randn(SHAPE).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(5, 4, 3, 2).permute(3, 2, 1, 0),
    "every other": lambda: torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last)[:, ::2],
    "contiguous": lambda: torch.randn(SHAPE),
    "expanded": lambda: torch.randn(2, 1, 1, 5).expand(SHAPE),
}
BIAS = torch.linspace(-1, 1, 5)
# Each with what torch composes of the same mask.
COMPOSED = {
    "dropout_add": (lambda x, r: fdt.dropout_add(x, r, seed=3), lambda x, r: r + fdt.dropout(x, seed=3)),
    "bias_dropout_add": (
        lambda x, r: fdt.bias_dropout_add(x, BIAS, r, seed=3),
        lambda x, r: r + fdt.dropout(x + BIAS, seed=3),
    ),
    "bias_act_dropout": (
        lambda x, r: fdt.bias_act_dropout(x, BIAS, seed=3),
        lambda x, r: fdt.dropout(F.gelu(x + BIAS), seed=3),
    ),
    "relu": (
        lambda x, r: fdt.bias_act_dropout(x, None, 0.5, "relu", seed=3),
        lambda x, r: fdt.dropout(F.relu(x), seed=3),
    ),
    "swiglu_dropout": (
        lambda x, r: fdt.swiglu_dropout(x, r, seed=3),
        lambda x, r: fdt.dropout(F.silu(x) * r, seed=3),
    ),
    "evaluation": (lambda x, r: fdt.dropout_add(x, r, training=False), lambda x, r: r + x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", LAYOUTS)
def test_layouts(layout, residual):
    """Results lie as torch's composition does, and hold what it does; gradients lie as dy does."""
    x, r, dy = LAYOUTS[layout](), LAYOUTS[residual](), LAYOUTS["channels_last"]()
    for name, (function, composed) in COMPOSED.items():
        inputs = [tensor.detach().requires_grad_() for tensor in (x, r)]
        y, expected = function(*inputs), composed(*inputs)
        torch.testing.assert_close(y, expected)
        if "expanded" not in (layout, residual):
            assert y.stride() == function(x, r).stride() == expected.stride(), name
        actual, wanted = (torch.autograd.grad(z, inputs, dy, allow_unused=True) for z in (y, expected))
        torch.testing.assert_close([a for a in actual if a is not None], [w for w in wanted if w is not None])
        assert all(a is None or a.stride() == dy.stride() for a in actual), name


def test_layout_beside_an_expanded_residual():
    """Which has no order of axes: then input's counts."""
    x = LAYOUTS["channels_last"]()
    assert fdt.dropout_add(x, torch.randn(5).expand(SHAPE)).stride() == x.stride()


def test_layout_of_softmax():
    x, y = LAYOUTS["channels_last"](), LAYOUTS["contiguous"]()
    y.copy_(x)
    assert_equal(fdt.softmax_dropout(x, seed=3), fdt.softmax_dropout(y, seed=3))
    assert fdt.softmax_dropout(x, seed=3).stride() == fdt.softmax_dropout(x, 0.0).stride() == x.stride()


def test_layouts_of_ops():
    """What compilers are told of strides is what they get, in both directions, float16 beside float32."""
    x, r, dy = LAYOUTS["channels_last"]().half(), LAYOUTS["every other"](), LAYOUTS["channels_last"]()
    seed, ops = torch.tensor(5), torch.ops.fastdrop
    forward = x, BIAS, None, r, seed, 0.5, "gelu", True
    bits = ops.pointwise(*forward)[1]
    scores = x, None, seed, 0.5, 1.0, False, True, True
    y, probabilities, words = ops.softmax(*scores)
    for op, arguments in (
        (ops.pointwise, forward),
        (ops.pointwise_backward, (dy, x, None, None, bits, 0.5, True, "gelu", x.dtype, True, False)),
        (ops.pointwise_backward, (dy, x, None, None, None, 0.5, False, "gelu", x.dtype, False, False)),
        (ops.pointwise_backward, (dy, None, None, None, bits, 0.5, True, None, x.dtype, False, False)),
        (ops.softmax, scores),
        (ops.softmax_backward, (y, probabilities, words, 0.5, True, 1.0)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_layouts_compiled():
    def function(x, r):
        y = fdt.swiglu_dropout(fdt.bias_act_dropout(x, BIAS, 0.5, seed=4), r, 0.5, seed=5)
        return fdt.softmax_dropout(fdt.dropout_add(y, r, 0.5, seed=6), 0.5, seed=7)

    results = []
    for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        inputs = [LAYOUTS["channels_last"]().requires_grad_() for _ in range(2)]
        y = f(*inputs)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
        assert compiled.stride() == eager.stride() == inputs[0].stride()


# ---- sparse ----

DENSE = torch.randn(4, 4)
SPARSE = {
    "coo": DENSE.to_sparse,
    "hybrid": lambda: DENSE.to_sparse(1),
    "csr": DENSE.to_sparse_csr,
    "bsc": lambda: DENSE.to_sparse_bsc((2, 2)),
    "mkldnn": DENSE.to_mkldnn,
}
DROPS = (
    fdt.dropout,
    lambda x: fdt.dropout(x, seed=3),
    lambda x: fdt.dropout(x, inplace=True),
    lambda x: fdt.dropout(x, noise_shape=(None, 1)),
    lambda x: fdt.alpha_dropout(x, 0.5, True),
    lambda x: fdt.feature_alpha_dropout(x, 0.5, True),
    lambda x: fdt.dropout1d(x, 0.5),
    lambda x: fdt.variational_dropout(x, 0.5, 0),
    lambda x: fdt.stochastic_depth(x, 0.5, "row"),
    lambda x: fdt.skip_residual(x, torch.clone, 0.5),
    fdt.gaussian_dropout,
    lambda x: fdt.dropout_add(x, x),
    lambda x: fdt.dropout_add(DENSE, x),
    lambda x: fdt.bias_act_dropout(x, None),
    lambda x: fdt.swiglu_dropout(DENSE, x),
    lambda x: fdt.dropout_add_layer_norm(x, None),
    lambda x: fdt.dropout_add_rms_norm(DENSE, x),
    fdt.softmax_dropout,
    lambda x: fdt.softmax_dropout(DENSE, attn_mask=x),
    lambda x: fdt.scaled_dot_product_attention(DENSE, x, DENSE, dropout_p=0.5),
    fdt.DropPath(0.5),
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch: its support of some layouts is in beta
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse(kind):
    """One sentence from all that drop, before anything is drawn; what drops nothing doesn't mind."""
    x = SPARSE[kind]()
    state = torch.get_rng_state()
    for function in DROPS:
        with pytest.raises(
            RuntimeError, match=r"dropout takes dense tensors, but got one of layout .*: give x.to_dense"
        ):
            function(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert fdt.dropout(x, 0.5, False) is x
    assert_equal(fdt.drop_connect(x.to_dense(), seed=1), fdt.dropout(DENSE, seed=1))


# ---- quantised ----


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("aware", "change"), [(False, fdt.convert), (True, fdt.fuse)], ids=["convert", "fuse"])
def test_quantised(aware, change):
    """A changed model becomes a quantised one as torch's does, and drops nothing there, training or not."""
    from torch.ao import quantization as quantize

    model = nn.Sequential(
        quantize.QuantStub(), nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.5), quantize.DeQuantStub()
    )
    change(model)
    fdt.convert(model)
    model.qconfig = (quantize.get_default_qat_qconfig if aware else quantize.get_default_qconfig)("fbgemm")
    prepared = (quantize.prepare_qat if aware else quantize.prepare)(model.train())
    x = torch.randn(8, 6)
    assert not torch.equal(prepared(x), prepared(x))
    quantised = quantize.convert(prepared)
    assert quantised[:2](x).dtype is torch.quint8
    assert_equal(quantised.train()(x), quantised.eval()(x))
    x = torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
    assert fdt.Dropout(0.5)(x) is x
    with pytest.raises(RuntimeError, match=r"but got torch\.quint8"):
        fdt.dropout(x, 0.5)


# ---- a p that wants a gradient ----


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_p_is_refused(compiled):
    """As `F.dropout` does, which takes other tensors: with gradients on or off."""
    p, x = torch.tensor(0.5, requires_grad=True), torch.randn(2, 3, 4, 4)
    functions = [
        lambda: fdt.dropout(x, p),
        lambda: fdt.dropout2d(x, p),
        lambda: fdt.alpha_dropout(x, p, True),
        lambda: fdt.stochastic_depth(x, p, "row"),
        lambda: fdt.skip_residual(x, torch.clone, p),
        lambda: fdt.drop_block2d(x, p, 2),
        lambda: fdt.dropout_add(x, x, p),
        lambda: fdt.dropout_add_layer_norm(x, x, p=p),
        lambda: fdt.softmax_dropout(x, p),
        lambda: fdt.scaled_dot_product_attention(x, x, x, dropout_p=p),
    ]
    for function in functions[-2:-1] if compiled else functions:
        called = torch.compile(function, backend="eager") if compiled else function
        for recording in (False, True):
            with torch.set_grad_enabled(recording), pytest.raises(TypeError, match="must be a number or a tensor that"):
                called()
    with pytest.raises(TypeError):
        F.dropout(x, p)
    assert_equal(fdt.dropout(x, p.detach(), seed=1), fdt.dropout(x, 0.5, seed=1))


@pytest.mark.parametrize("compiled", [False, True])
def test_gaussian_gradient_of_p(compiled):
    """``y = x (1 + sigma n)``: by differences, of second order and in forward mode. The noise is of float32."""

    def function(x, p):
        return fdt.gaussian_dropout(x, p, seed=7)

    called = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    p = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    bounds = {"eps": 5e-3, "atol": 5e-3}
    assert torch.autograd.gradcheck(called, (x, p), check_forward_ad=not compiled, **bounds)
    assert_equal(called(x, p).detach(), fdt.gaussian_dropout(x.detach(), 0.3, seed=7))
    if compiled:
        return
    assert torch.autograd.gradgradcheck(function, (x, p), eps=5e-3, atol=5e-2)
    torch.library.opcheck(torch.ops.fastdrop.gaussian.tensor, (x, torch.tensor(7), p))
    _, tangent = torch.func.jvp(lambda p: function(x, p), (p.detach(),), (torch.ones_like(p.detach()),))
    torch.testing.assert_close(tangent.sum().detach(), torch.autograd.grad(function(x, p).sum(), p)[0])
    halves, one = x.detach().half(), torch.tensor([0.3], requires_grad=True)
    (dp,) = torch.autograd.grad(function(halves, one).float().sum(), one)
    assert dp.shape == (1,)
    assert abs(dp.item() - tangent.sum().item()) < 0.1
    zero = torch.tensor(0.0, requires_grad=True)
    assert torch.autograd.grad(function(x, zero).sum(), zero)[0] == 0.0
    with pytest.raises(ValueError, match="below 1"):
        function(x, torch.tensor(1.0, requires_grad=True))


def test_learned_rate():
    """A module's p may be a parameter, and the seed of a step's noise comes from the generator."""
    drop = fdt.GaussianDropout(0.3)
    drop.p = nn.Parameter(torch.tensor(0.3))
    x = torch.randn(64)
    assert_equal(under(1, drop, x).detach(), under(1, fdt.gaussian_dropout, x, torch.tensor(0.3)))
    under(1, drop, x).square().sum().backward()
    assert drop.p.grad.item() != 0.0
    assert drop.eval()(x) is x

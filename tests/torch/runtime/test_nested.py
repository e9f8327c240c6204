"""Nested tensors, jagged and strided, through all that drops: as their values, with the mask by position there."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn import functional as F

import fastdrop.torch as fdt

from ..cases import assert_equal, under

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

LENGTHS = (2, 5, 3)
COLUMNS = 6

ELEMENTWISE = {
    "dropout": lambda x, **seed: fdt.dropout(x, 0.5, **seed),
    "store": lambda x, **seed: fdt.dropout(x, 0.5, store="seed", **seed),
    "p tensor": lambda x, **seed: fdt.dropout(x, torch.tensor(0.5), **seed),
    "alpha_dropout": lambda x, **seed: fdt.alpha_dropout(x, 0.5, True, **seed),
    "gaussian_dropout": lambda x, **seed: fdt.gaussian_dropout(x, 0.5, **seed),
    "bias_dropout_add": lambda x, **seed: fdt.bias_dropout_add(x, torch.ones(COLUMNS), x * 2, 0.5, **seed),
    "bias_act_dropout": lambda x, **seed: fdt.bias_act_dropout(x, torch.ones(COLUMNS), 0.5, **seed),
    "swiglu_dropout": lambda x, **seed: fdt.swiglu_dropout(x, x * 2, 0.5, **seed),
    "layer_norm": lambda x, **seed: fdt.dropout_add_layer_norm(x, x * 2, torch.ones(COLUMNS), p=0.5, **seed)[0],
    "rms_norm": lambda x, **seed: fdt.dropout_add_rms_norm(x, x * 2, p=0.5, **seed)[1],
    "softmax_dropout": lambda x, **seed: fdt.softmax_dropout(x, 0.5, **seed),
}


@pytest.fixture(params=["jagged", "strided"])
def layout(request):
    return getattr(torch, request.param)


def nested(layout, requires_grad=False):
    torch.manual_seed(0)
    samples = [torch.randn(length, COLUMNS) for length in LENGTHS]
    return torch.nested.nested_tensor(samples, layout=layout, requires_grad=requires_grad)


def rows_of(x):
    return x.values().reshape(-1, COLUMNS)


def gradients(function, x, rows):
    """Results and gradients of a nested tensor's rows, and of those rows given as they are."""
    rows = rows.detach().requires_grad_()
    y, expected = rows_of(function(x)), function(rows)
    weights = torch.randn(expected.shape)
    return torch.autograd.grad((y * weights).sum(), x)[0], torch.autograd.grad((expected * weights).sum(), rows)[0], y


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_values(layout, name):
    """With a seed and from the generator: the values' result, and their gradient in the structure of the whole."""
    function, x = ELEMENTWISE[name], nested(layout, True)
    assert_equal(rows_of(under(1, function, x)), under(1, function, rows_of(x)))
    dx, expected, y = gradients(lambda x: function(x, seed=3), x, rows_of(x))
    assert_equal(rows_of(dx), expected)
    assert (function(x, seed=3) + x).values().numel() == y.numel()  # one structure


def dense(cells):
    """What a mask of these cells decides for a sample of the longest length."""
    x = torch.ones(len(LENGTHS), max(LENGTHS), COLUMNS)
    return fdt.dropout(x, 0.5, noise_shape=cells, seed=3)


@pytest.mark.parametrize(
    ("function", "shared"),
    [
        (lambda x: fdt.dropout1d(x, 0.5, seed=3), (None, None, 1)),
        (lambda x: fdt.variational_dropout(x, 0.5, 2, seed=3), (None, None, 1)),
        (lambda x: fdt.dropout(x, 0.5, seed=3, noise_shape=(1, 1, None)), (1, 1, None)),
        (lambda x: fdt.stochastic_depth(x, 0.5, "batch", seed=3), (1, 1, 1)),
        (lambda x: fdt.variational_dropout(x, 0.5, 1, seed=3), (None, 1, None)),
        (lambda x: fdt.stochastic_depth(x, 0.5, "row", seed=3), (None, 1, 1)),
    ],
)
def test_shared_decisions(layout, function, shared):
    """Of rows, of columns, of all, and of samples whatever their length: as of a dense tensor where there is one."""
    x = nested(layout, True)
    y = function(x)
    rows = rows_of(x)
    if shared[0] is None and shared[1] is None:
        expected = fdt.dropout(rows, 0.5, noise_shape=(None, 1), seed=3)
    else:
        padded = dense(shared)
        factors = torch.cat([sample[:length] for sample, length in zip(padded, LENGTHS, strict=True)])
        expected = rows * factors
    assert_equal(rows_of(y).detach(), expected.detach())
    (dx,) = torch.autograd.grad(y.values().sum(), x)
    assert_equal(rows_of(dx) * rows.detach(), expected.detach())


def test_ragged_last():
    """Channels first: each channel of a sample is one decision, and a mask of values goes by where they lie."""
    samples = [torch.randn(4, length) for length in LENGTHS]
    x = torch.nested.nested_tensor([s.mT.contiguous() for s in samples], layout=torch.jagged).transpose(1, 2)
    y = fdt.dropout1d(x, 0.5, seed=3)
    expected = fdt.dropout1d(torch.ones(3, 4, 1), 0.5, seed=3)
    for sample, dropped, factor in zip(x.unbind(), y.unbind(), expected, strict=True):
        assert_equal(dropped, sample * factor)
    assert_equal(fdt.dropout(x, 0.5, seed=3).values(), fdt.dropout(x.values(), 0.5, seed=3))
    with pytest.raises(RuntimeError, match="last axis of a nested tensor is ragged"):
        fdt.softmax_dropout(x)


def test_holes():
    """A jagged tensor with lengths has values that are no sample's; they may be dropped, and nobody sees it."""
    x = torch.nested.nested_tensor_from_jagged(
        torch.randn(10, COLUMNS), torch.tensor([0, 2, 7, 10]), torch.tensor([1, 3, 3])
    )
    y = fdt.stochastic_depth(x, 0.5, "row", seed=3)
    kept = fdt.stochastic_depth(torch.ones(3, 1), 0.5, "row", seed=3)
    for sample, dropped, factor in zip(x.unbind(), y.unbind(), kept, strict=True):
        assert_equal(dropped, sample * factor)


def test_in_place_and_evaluation(layout):
    x = nested(layout)
    before, data = rows_of(x).clone(), x.values().data_ptr()
    y = fdt.dropout(x, 0.5, inplace=True, seed=3)
    assert y is x
    assert x.values().data_ptr() == data
    assert_equal(rows_of(x), fdt.dropout(before, 0.5, seed=3))
    assert fdt.dropout(x, 0.5, False) is x
    assert fdt.dropout(x, 0.0) is x
    evaluated = fdt.dropout(x, 0.25, False, scaling="standard")
    assert_equal(rows_of(evaluated), rows_of(x) * 0.75)
    with pytest.raises(RuntimeError, match="requires grad can't be dropped in place"):
        fdt.dropout(nested(layout, True) * 1.0, 0.5, inplace=True)


def test_training(layout):
    """A model takes a step on a nested batch, and the same on its rows."""
    model = nn.Sequential(nn.Linear(COLUMNS, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, COLUMNS), nn.Dropout(0.1))
    fdt.fuse(model)
    fdt.convert(model)
    x = nested(layout)
    grads = []
    for batch in (x, rows_of(x)):
        model.zero_grad()
        y = under(1, model, batch)
        rows = rows_of(y) if y.is_nested else y
        rows.square().sum().backward()
        grads.append((rows.detach(), *(parameter.grad.clone() for parameter in model.parameters())))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compiled():
    """Jagged; of strided ones torch.compile makes nothing."""
    model = nn.Sequential(
        nn.Linear(COLUMNS, 8), fdt.Dropout(0.5), fdt.StochasticDepth(0.5, "row"), fdt.GaussianDropout(0.3)
    )
    x = nested(torch.jagged)
    y = under(1, model, x)
    assert_equal(under(1, torch.compile(model, backend="aot_eager", fullgraph=True), x).values(), y.values())


def test_enabled(layout):
    """Ours works there too, and torch's own is as it was."""
    x = nested(layout, True)
    theirs, ours = rows_of(under(1, F.dropout, x, 0.5)), rows_of(under(1, fdt.dropout, x, 0.5))
    with fdt.enabled():
        y = under(1, F.dropout, x, 0.5)
        assert_equal(rows_of(y), theirs)
        torch.autograd.grad(y.values().sum(), x)
        assert_equal(rows_of(under(1, fdt.dropout, x, 0.5)), ours)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: fdt.dropout(x, 0.5, noise_shape=(1, None, None)), "no positions in common"),
        (lambda x: fdt.dropout(x, 0.5, noise_shape=(1, None)), "one entry per axis"),
        (lambda x: fdt.dropout(x, 0.5, noise_shape=(None, None, 4)), "must be 1, None or the full extent"),
        (lambda x: fdt.drop_block2d(x.unsqueeze(1), 0.5, 2), "DropBlock takes dense tensors"),
        (lambda x: fdt.dropout_add(x, torch.ones(3, 5, COLUMNS)), "must be nested too"),
        (lambda x: fdt.dropout_add(torch.ones(3, 5, COLUMNS), x), "residual is a nested tensor, and input is not"),
        (
            lambda x: fdt.dropout_add(x, torch.nested.nested_tensor(list(x.unbind())[::-1], layout=x.layout)),
            "structure",
        ),
        (lambda x: fdt.softmax_dropout(x, causal=True), "takes no attn_mask"),
        (lambda x: fdt.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "attention takes dense tensors"),
    ],
)
def test_refusals(layout, function, says):
    with pytest.raises((RuntimeError, ValueError), match=says):
        function(nested(layout))


def test_alpha_of_ragged_axes():
    x = torch.nested.nested_tensor([torch.randn(length, 4) for length in LENGTHS], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(RuntimeError, match="can't drop a ragged axis whole"):
        fdt.feature_alpha_dropout(x, 0.5, True)

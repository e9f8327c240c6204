"""`batchwise_linear` against what it stands for: linear layers and `dropout` with one mask for the batch."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F

import fastdrop.torch as fdt
from fastdrop.torch.runtime import cell_kernels

from ..ops.compiling import compiled, fresh_compiler

__all__ = ["fresh_compiler"]
WIDTHS = (11, 67, 53, 3)
SEEDS = (5, 6)
RATES = ((0.5, 0.6), (0.0, 0.5), (0.3, 0.0), (1.0, 0.3), (0.3, 1.0), (0.99, 0.99), (0.02, 0.02))


def parameters(widths=WIDTHS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        x = torch.randn(shape, dtype=torch.float64, generator=generator) / shape[-1] ** 0.5
        return x.to(dtype).requires_grad_()

    return [drawn(m, n) for n, m in itertools.pairwise(widths)], [drawn(m) for m in widths[1:]]


def inputs(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def masked_form(x, weights, biases, p, activation, seeds=SEEDS):
    for weight, bias, rate, seed in zip(weights, biases, p, seeds, strict=False):
        h = activation(F.linear(x, weight, bias))
        x = fdt.dropout(h, rate, noise_shape=[1] * (x.dim() - 1) + [None], seed=seed)
    return F.linear(x, weights[-1], biases[-1])


def assert_same(x, weights, biases, p, activation=torch.tanh, **tolerance):
    """Results and all gradients. Those that are 0 in the masked form are 0."""
    results = []
    seeds = SEEDS[: len(p)]
    for y in (
        fdt.batchwise_linear(x, weights, biases, p, activation, seed=seeds, min_p=0.0),
        masked_form(x, weights, biases, p, activation, seeds),
    ):
        of = [x, *weights, *(bias for bias in biases if bias is not None)]
        results.append([y, *torch.autograd.grad((y.double() * torch.arange(1, y.shape[-1] + 1)).sin().sum(), of)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
        assert not one[other == 0].any()


@pytest.mark.parametrize("p", RATES, ids=str)
def test_equals_the_masked_form(variant, p):
    weights, biases = parameters()
    for x in (inputs(20, 11), inputs(3, 2, 11), inputs(11), inputs(0, 11)):
        assert_same(x, weights, biases, p)
    assert_same(inputs(20, 11), weights, [biases[0], None, None], p)
    columnwise = [weight.detach().t().contiguous().t().requires_grad_() for weight in weights]
    assert_same(inputs(20, 11), columnwise, biases, p)
    for seed in range(4):  # one unit, kept or not, and a hidden layer alone
        one = parameters((11, 1, 3))
        y = fdt.batchwise_linear(inputs(20, 11), *one, p[0], seed=seed, min_p=0.0)
        torch.testing.assert_close(y, masked_form(inputs(20, 11), *one, p[:1], F.relu, (seed,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_every_dtype(variant, dtype):
    weights, biases = parameters(dtype=dtype)
    x = inputs(20, 11, dtype=dtype)
    y = fdt.batchwise_linear(x, weights, biases, (0.5, 0.4), torch.tanh, seed=SEEDS, min_p=0.0)
    close = {"atol": 1e-5 if dtype.itemsize > 2 else 0.05, "rtol": 1e-4}
    torch.testing.assert_close(y, masked_form(x, weights, biases, (0.5, 0.4), torch.tanh), **close)
    if dtype.is_floating_point:
        assert_same(x, weights, biases, (0.5, 0.4), **close)


def test_large_weights_and_threads():
    assert_same(inputs(4, 30), *parameters((30, 1700, 1500, 3)), (0.2, 0.1))


def test_autocast():
    weights, biases = parameters(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(inputs(20, 11, dtype=torch.float32), weights, biases, (0.5, 0.4), atol=0.05, rtol=0.05)


def test_second_gradients():
    weights, biases = parameters((3, 19, 20, 2))

    def function(x, *tensors):
        return fdt.batchwise_linear(x, tensors[:3], tensors[3:], 0.5, torch.tanh, seed=SEEDS, min_p=0.0)

    arguments = (inputs(2, 3), *weights, *biases)
    assert torch.autograd.gradcheck(function, arguments, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, check_batched_grad=True, fast_mode=True)


def test_kept_units_alone_are_computed_where_it_pays(monkeypatch):
    weights, biases = parameters((11, 640, 3))
    seen = []

    def activation(h):
        seen.append(h.shape[-1])
        return h.relu()

    def units(rows, p, **options):
        fdt.batchwise_linear(inputs(rows, 11), weights, biases, p, activation, seed=3, **options)
        return seen.pop()

    kept = int(fdt.dropout(torch.ones(640), 0.5, seed=3).count_nonzero())
    assert kept < 400
    assert units(256, 0.5) == -(-kept // 16) * 16  # the last line of 16 is full
    assert units(256, 0.11) == units(10, 0.5) == units(256, 0.5, min_p=0.6) == units(256, 0.5, training=False) == 640
    assert units(1, 0.5, min_p=0.5) < 400
    assert units(256, 1.0) == 0
    # What is dropped is not looked at: neither rows that are left out nor those that fill up.
    weight = weights[0].detach().clone()
    weight[fdt.dropout(torch.ones(640), 0.5, seed=3) == 0] = torch.nan
    y = fdt.batchwise_linear(inputs(256, 11), [weight, weights[1]], biases, 0.5, seed=3)
    torch.testing.assert_close(y, fdt.batchwise_linear(inputs(256, 11), weights, biases, 0.5, seed=3))


def test_indices_that_hooks_change_are_not_trusted():
    weights, _ = parameters()

    def gradients(change, of):
        def unpack(tensor):
            return change(tensor) if tensor.dtype is torch.int64 else tensor

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = fdt.batchwise_linear(inputs(9, 11), weights, [None] * 3, 0.5, torch.tanh, seed=SEEDS, min_p=0.0)
            return torch.autograd.grad(y.sum(), of)

    changes = lambda t: torch.arange(int(t[-1]) + 1), torch.Tensor.int, lambda t: t[:1], lambda t: -t
    for change in changes:
        with pytest.raises((IndexError, RuntimeError)):
            gradients(change, weights[-1])
    expected = gradients(torch.clone, weights)
    assert all(map(torch.equal, gradients(lambda t: torch.stack([t, t], 1)[:, 0], weights), expected))


def test_takes_its_numbers_as_dropout_does():
    weights, biases = parameters()
    x = inputs(200, 11)
    for make in (lambda: None, lambda: torch.Generator().manual_seed(9)):
        torch.manual_seed(2)
        y = fdt.batchwise_linear(x, weights, biases, 0.5, generator=make())
        after = torch.rand(1)
        torch.manual_seed(2)
        own = make()
        h = fdt.dropout(F.linear(x, weights[0], biases[0]).relu(), 0.5, noise_shape=(1, None), generator=own)
        h = fdt.dropout(F.linear(h, weights[1], biases[1]).relu(), 0.5, noise_shape=(1, None), generator=own)
        torch.testing.assert_close(y, F.linear(h, weights[2], biases[2]))
        assert after == torch.rand(1)


def test_compilers_and_transforms_compute_all_under_the_same_mask():
    weights, biases = parameters()
    x = inputs(200, 11)

    def function(x, *weights):
        return fdt.batchwise_linear(x, weights, biases, 0.5, torch.tanh, seed=SEEDS)

    y = function(x, *weights)
    torch.testing.assert_close(compiled(function)(x, *weights), y)
    torch.testing.assert_close(torch.vmap(function, (None, *[0] * 3))(x, *(w[None] for w in weights))[0], y)
    gradient = torch.func.grad(lambda w: function(x, w, *weights[1:]).sum())(weights[0])
    torch.testing.assert_close(gradient, torch.autograd.grad(y.sum(), weights[0])[0])
    _, tangent = torch.func.jvp(function, (x, *weights), (torch.ones_like(x), *map(torch.zeros_like, weights)))
    nudged = function(x + 1e-6, *weights)
    torch.testing.assert_close(tangent, (nudged - y) / 1e-6, atol=1e-4, rtol=1e-4)


def test_bad_input():
    x, (weights, biases) = inputs(20, 11), parameters()

    def refused(error, match, *arguments, **options):
        given = dict(enumerate((x, weights, biases, 0.5)))
        given |= {i: argument for i, argument in enumerate(arguments) if argument is not ...}
        with pytest.raises(error, match=match):
            fdt.batchwise_linear(*given.values(), **options)

    refused(TypeError, "x must be a Tensor", [1.0])
    refused(ValueError, "x must have", torch.ones(()))
    refused(TypeError, "weights must be a sequence", ..., torch.ones(2, 3, 3))
    refused(ValueError, "two layers or more, but got 1 and 3", ..., weights[:1])
    refused(ValueError, r"weights\[0\] must be of shape \(out_features, 11\), as x is", ..., weights[1:], biases[1:])
    refused(ValueError, r"biases\[1\] must be of shape \(53,\)", ..., ..., [None, biases[0], None])
    refused(TypeError, r"weights\[1\] must be a Tensor", ..., [weights[0], None, weights[2]])
    refused(ValueError, "p must be one for each of 2", ..., ..., ..., (0.5,) * 3)
    refused(ValueError, "probability", ..., ..., ..., 1.5)
    refused(ValueError, "seed must be a sequence of 2", seed=3)
    refused(ValueError, "min_p", min_p=1.5)
    refused(TypeError, "activation", activation="relu")
    refused(ValueError, "generator", seed=SEEDS, generator=torch.Generator())
    state = torch.get_rng_state()
    refused(ValueError, "probability", ..., ..., ..., (0.5, 1.5))
    assert torch.equal(state, torch.get_rng_state())


def test_gather_and_scatter_by_ops_are_those_of_the_kernels(variant, monkeypatch):
    x, rows, columns = torch.randn(30, 40), torch.tensor([0, 3, 29]), torch.arange(1, 40, 3)
    results = []
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(cell_kernels, "_has_kernel", lambda *given: False)
        for index in itertools.product((rows, None), (columns, None)):
            part = cell_kernels.gather(x, *index)
            results.append((part, cell_kernels.scatter(part, *index, (30, 40))))
    for (part, whole), (part_by_ops, whole_by_ops) in zip(results[:4], results[4:], strict=True):
        assert torch.equal(part, part_by_ops)
        assert torch.equal(whole, whole_by_ops)

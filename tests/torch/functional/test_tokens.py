"""`token_dropout` and `TokenDropout`: exactly k of n tokens of each sample, in their order."""

from __future__ import annotations

import re

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..cases import assert_equal, numbers_drawn, under
from ..ops.compiling import compiled, fresh_compiler, graphs

__all__ = ["fresh_compiler"]


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_keeps_as_many_tokens_as_asked_for_in_their_order():
    """The first ones always, at least one of the others, of any strides and dtype; the gradient is 0 elsewhere."""
    for length, keep_first, p, kept in ((9, 1, 0.5, 5), (9, 0, 0.5, 4), (9, 2, 0.9, 3), (5, 1, 1.0, 2), (7, 3, 0.3, 6)):
        for x in (normal(6, length, 4), normal(length, 6, 4).transpose(0, 1), normal(6, length)):
            x = x.detach().requires_grad_()
            y, index = fdt.token_dropout(x, p, keep_first, seed=3, return_index=True)
            assert index.shape == (6, kept)
            assert (index.diff() > 0).all()
            assert_equal(index[:, :keep_first], torch.arange(keep_first).expand(6, -1))
            rows = torch.stack([sample[chosen] for sample, chosen in zip(x, index, strict=True)])
            assert_equal(y, rows)
            weight = torch.randn_like(y)
            (gradient,) = torch.autograd.grad((y * weight).sum(), x, retain_graph=True)
            (expected,) = torch.autograd.grad((rows * weight).sum(), x)
            assert_equal(gradient, expected)
    names = torch.arange(20).reshape(2, 10)
    assert_equal(fdt.token_dropout(names, 0.5, seed=3), fdt.token_dropout(names.double(), 0.5, seed=3).long())


def test_all_choices_are_equally_likely_and_samples_choose_for_themselves():
    index = fdt.token_dropout(torch.zeros(30_000, 6), 0.6, return_index=True, seed=1)[1][:, 1:]
    counts = torch.bincount(index[:, 0] * 6 + index[:, 1])
    counts = counts[counts > 0].double()
    assert len(counts) == 10  # sets of 2 of 5
    assert ((counts - 3000).square() / 3000).sum() < 27.9  # chi-square of 9 degrees of freedom, 0.1 %


def test_nothing_to_drop_gives_x_itself_and_draws_nothing():
    x = normal(3, 5, 2)
    for options in ({"p": 0.0}, {"p": 0.5, "training": False}, {"p": 0.01}, {"p": 0.5, "keep_first": 5}):
        results = []
        assert numbers_drawn(lambda o=options, r=results: r.append(fdt.token_dropout(x, return_index=True, **o))) == 0
        y, index = results[0]
        assert y is x
        assert_equal(index, torch.arange(5).expand(3, 5))
    assert fdt.token_dropout(x, 0.5, training=False) is x
    assert numbers_drawn(lambda: fdt.token_dropout(x, 0.5)) == 1
    assert fdt.token_dropout(normal(0, 5, 2), 0.5).shape == (0, 3, 2)


def test_compiled_mapped_and_checkpointed_equal_eager():
    x = normal(4, 9, 3)
    ours = compiled(lambda x, seed: fdt.token_dropout(x, 0.5, seed=seed))
    for seed in (torch.tensor(3), torch.tensor(4)):
        assert_equal(ours(x, seed), fdt.token_dropout(x, 0.5, seed=seed))
    assert graphs() == 1
    module = fdt.TokenDropout(0.5)
    assert_equal(under(1, compiled(module), x), under(1, module, x))
    mapped = torch.vmap(lambda x: fdt.token_dropout(x, 0.5, seed=3), randomness="same")(torch.stack([x, 2 * x]))
    assert_equal(mapped[1], fdt.token_dropout(2 * x, 0.5, seed=3))
    differing = torch.vmap(lambda x: fdt.token_dropout(x, 0.5), randomness="different")(torch.stack([x, x]))
    assert not torch.equal(differing[0], differing[1])
    leaf = x.clone().requires_grad_()
    y = checkpoint(lambda x: module(x).exp(), leaf, use_reentrant=False)
    y.sum().backward()
    assert_equal(leaf.grad[leaf.grad != 0], y.detach().flatten())


def test_module():
    x, module = normal(4, 9, 3), fdt.TokenDropout(0.5, keep_first=2, seed=3)
    assert repr(module) == "TokenDropout(p=0.5, keep_first=2, seed=3)"
    assert module(x).shape == (4, 6, 3)
    assert module.eval()(x) is x
    assert torch.jit.script(module)(x).shape == x.shape
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace can't trace token_dropout in training"):
        torch.jit.trace(fdt.TokenDropout(0.5), x)
    fdt.DropoutScheduler(module, lambda step: 0.9)
    assert module.train()(x).shape == (4, 3, 3)


BAD = {
    "p": (lambda x: fdt.token_dropout(x, 1.5), ValueError, "drop probability has to be between 0 and 1, but got 1.5"),
    "tensor p": (lambda x: fdt.token_dropout(x, torch.tensor(0.5)), TypeError, "p, the share of tokens to drop, must"),
    "axes": (lambda x: fdt.token_dropout(x[0, 0], 0.5), ValueError, "x"),
    "tokens": (lambda x: fdt.token_dropout(x, 0.5, 6), ValueError, "x must have at least keep_first=6 tokens"),
    "keep_first": (lambda x: fdt.token_dropout(x, 0.5, -1), ValueError, "keep_first"),
    "no int": (lambda x: fdt.TokenDropout(0.5, 0.5), TypeError, "keep_first must be an int, but got float"),
    "two sources": (lambda x: fdt.token_dropout(x, 0.5, seed=1, generator=torch.Generator()), ValueError, "seed and"),
    "unused seed": (lambda x: fdt.token_dropout(x, 0.0, seed=-1), ValueError, "seed must be from 0"),
    "array": (lambda x: fdt.token_dropout(x.numpy(), 0.5), TypeError, "x must be a Tensor, but got ndarray"),
    "nested": (lambda x: fdt.token_dropout(torch.nested.as_nested_tensor([x[0], x[1]]), 0.5), RuntimeError, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=re.escape(text)):
        call(normal(3, 5, 2))

"""`same_masks` and `multi_sample`."""

from __future__ import annotations

import re
import threading
import warnings

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..cases import assert_equal, numbers_drawn
from ..module_cases import Calls
from ..ops.compiling import fresh_compiler

__all__ = ["fresh_compiler"]


def model_of(**source):
    """Drops by modules of fastdrop and torch, by functions and in attention."""

    def forward(self, x):
        x = F.dropout(self.theirs(self.ours(self.linear(x))), 0.3, self.training)
        x = fdt.dropout(x, 0.3, self.training)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if self.training else 0.0)

    modules = {"linear": nn.Linear(8, 8), "ours": fdt.Dropout(0.3, **source), "theirs": nn.Dropout(0.3)}
    return Calls(forward, **modules)


def gradient_of(y, model):
    model.linear.weight.grad = None
    y.square().sum().backward(retain_graph=True)
    return model.linear.weight.grad


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))


def test_passes_of_a_block_are_equal_and_blocks_differ():
    """Values and gradients, whether fastdrop is enabled or not; what is around a pass draws as without the block."""
    model = model_of()
    for enabled in (False, True):
        seen = []
        for _ in range(2):
            if enabled:
                fdt.enable()
            try:
                with fdt.same_masks(model):
                    first, between, second = model(X), torch.rand(3), model(X)
            finally:
                fdt.disable()
            assert_equal(first, second)
            assert_equal(gradient_of(first, model), gradient_of(second, model))
            seen += [first, between]
        assert not torch.equal(seen[0], seen[2])
        assert not torch.equal(seen[1], seen[3])
    with fdt.same_masks(model, seed=3):
        assert numbers_drawn(lambda: model(X)) == 0
        third = model(X)
    assert numbers_drawn(lambda: model(X)) is None  # attention of torch draws in its own way
    with fdt.same_masks(model, 3):
        assert_equal(model(X), third)
        model.eval()
        assert_equal(model(X), model(X))


@pytest.mark.parametrize("source", ["seed", "generator"])
def test_own_streams_repeat_and_go_on_after_one_pass(source):
    make = {"seed": lambda: {"seed": 3}, "generator": lambda: {"generator": torch.Generator().manual_seed(3)}}[source]
    model, twin = nn.Sequential(fdt.Dropout(**make())), nn.Sequential(fdt.Dropout(**make()))
    assert_equal(model(X), twin(X))
    with fdt.same_masks(model):
        results = model(X), model(X), model(X)
    once = twin(X)
    assert_equal(results, (once,) * 3)
    assert_equal(model(X), twin(X))


def test_nested_blocks_and_two_models():
    first, second = model_of(), model_of()
    with fdt.same_masks(first, 1), fdt.same_masks(second, 2):
        before = second(first(X))
        torch.rand(5)
        assert_equal(second(first(X)), before)
        with fdt.same_masks(first, 5):
            inner = first(X)
            torch.manual_seed(9)
            assert numbers_drawn(lambda: first(X)) == 0
        outer = first(X)
    with fdt.same_masks(first, 5):
        assert_equal(first(X), inner)
    with fdt.same_masks(first, 1):
        assert_equal(first(X), outer)
    assert not torch.equal(inner, outer)
    assert not first._forward_hooks
    assert not first._forward_pre_hooks


def test_an_exception_and_another_thread_leave_the_state_alone():
    model, results = Calls(lambda self, x: self.drop(x) / (x.sum() > 0 or 1 // 0), drop=fdt.Dropout(0.5)), []
    with fdt.same_masks(model):
        expected = model(X.abs())

        def fails():
            with pytest.raises(ZeroDivisionError):
                model(-X.abs())

        assert numbers_drawn(fails) == 0
        assert_equal(model(X.abs()), expected)
        thread = threading.Thread(target=lambda: results.extend([model(X.abs()), model(X.abs())]))
        thread.start()
        thread.join()
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_in_the_model_compute_the_same_again(reentrant):
    """With backward in the block or after it."""
    plain = model_of()

    def whole(self, x):
        return checkpoint(self.inner, x + 0 * self.inner.linear.weight.sum(), use_reentrant=reentrant)

    saving = Calls(whole, inner=plain)
    with fdt.same_masks(saving, 3):
        first = saving(X)
        torch.rand(7)
        inside = gradient_of(saving(X), plain)
    with fdt.same_masks(plain, 3):
        expected = plain(X)
        around = checkpoint(plain, X.clone().requires_grad_(), use_reentrant=reentrant)  # the model as a whole
        as_a_whole = gradient_of(around, plain)
    assert_equal(first, expected)
    assert_equal(inside, gradient_of(expected, plain))
    assert_equal(gradient_of(first, plain), gradient_of(expected, plain))
    assert_equal(as_a_whole, gradient_of(expected, plain))


def test_compiled_models():
    model = nn.Sequential(nn.Linear(8, 8), fdt.Dropout(0.5), nn.Dropout(0.2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with fdt.same_masks(compiled):
        assert_equal(compiled(X), compiled(X))
    with pytest.warns(UserWarning, match="the model was not called in the block"), fdt.same_masks(model):
        compiled(X)
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fdt.same_masks(model):
            assert_equal(model(X), model(X))


def test_monte_carlo_samples_differ_in_a_block():
    model = nn.Sequential(fdt.Dropout(0.5)).eval()
    with fdt.same_masks(model):
        model(X)
        assert fdt.mc_predict(model, X, samples=20).std.max() > 0


def test_multi_sample():
    """One call of the head, as many masks; in evaluation they are all equal. The mean has the gradients of a loop."""
    head, seen = nn.Sequential(fdt.Dropout(0.5), nn.Linear(8, 2)), []
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    y = fdt.multi_sample(head, X, 3)
    assert (y.shape, seen) == ((3, 2, 6, 2), [(6, 6, 8)])
    assert not torch.equal(y[0], y[1])
    assert_equal(
        fdt.multi_sample(lambda x: fdt.dropout(x, 0.5, seed=3), X, 2).flatten(0, 1),
        fdt.dropout(torch.cat([X, X]), 0.5, seed=3),
    )
    y = fdt.multi_sample(head.eval(), X, 3)
    torch.testing.assert_close(y, torch.stack([head(X)] * 3))


def test_bad_arguments():
    for call, error, text in (
        (lambda: fdt.same_masks(print).__enter__(), TypeError, "model must be a torch.nn.Module, but got builtin"),
        (lambda: fdt.same_masks(nn.Identity(), -1).__enter__(), ValueError, "seed must be from 0"),
        (lambda: fdt.multi_sample(3, X, 3), TypeError, "head must be"),
        (lambda: fdt.multi_sample(torch.sin, X, 0), ValueError, "samples must be"),
        (lambda: fdt.multi_sample(torch.sin, [1], 2), TypeError, "x must be a Tensor, but got list"),
        (lambda: fdt.multi_sample(len, X, 2), TypeError, "head must return a Tensor, but got int"),
        (lambda: fdt.multi_sample(torch.sum, X, 2), ValueError, "head must return as many samples as it gets, 4, but"),
    ):
        with pytest.raises(error, match=re.escape(text)):
            call()

"""Draws in compiled code: each in its place, once, whatever the compiler merges, moves or computes again."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..ops.compiling import fresh_compiler

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of many kinds
__all__ = ["fresh_compiler"]  # a fixture of every test here

WIDTH = 16
BUDGET = "activation_memory_budget"


@pytest.fixture
def x():
    return torch.randn(4, WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))


def of_each_kind(x):
    """A dropout of x by every op that draws."""
    image, weight = x[:, None], x[0]
    query = x[:, :, :8]
    return (
        fdt.dropout(x, 0.5),
        fdt.dropout(x, 0.5, store="seed"),
        fdt.dropout1d(x, 0.5),
        fdt.alpha_dropout(x, 0.5, True),
        fdt.gaussian_dropout(x, 0.5),
        fdt.drop_block2d(image, 0.5, 3),
        fdt.stochastic_depth(x, 0.5, "row"),
        fdt.drop_connect(weight, 0.5),
        fdt.dropout_add(x, x, 0.5),
        fdt.bias_act_dropout(x, weight[0], 0.5, "relu"),
        *fdt.dropout_add_layer_norm(x, x, p=0.5),
        fdt.softmax_dropout(x, 0.5),
        fdt.scaled_dot_product_attention(query, query, query, dropout_p=0.5),
    )


def twice(x):
    return (*of_each_kind(x), *of_each_kind(x))


def chains(x):
    """Independent ones, whose order a scheduler may choose."""
    a, b = x, x.flip(0)
    for _ in range(3):
        a = fdt.dropout(torch.tanh(a @ a), 0.3)
    for _ in range(3):
        b = fdt.dropout(torch.tanh(b @ b), 0.3, store="seed")
    return a, b


def block(x):
    a = fdt.dropout(x.sin(), 0.5)
    b = fdt.dropout(x.sin(), 0.3, store="seed")
    return fdt.dropout((a @ b).tanh(), 0.2)


def outputs_and_gradient(function, x, seed=3):
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = function(x)
    y = y if isinstance(y, tuple) else (y,)
    weights = torch.linspace(0.5, 2.0, x.numel())
    sum((part.flatten() * weights[: part.numel()]).sum() for part in y).backward()
    return [*(part.detach() for part in y), x.grad, torch.get_rng_state()]


def assert_as_eager(function, x, compiled=None, seeds=(3,), **options):
    """The same masks, gradients, and state of the generator after."""
    compiled = compiled or torch.compile(function, fullgraph=True, **options)
    for seed in seeds:
        expected = outputs_and_gradient(function, x, seed)
        actual = outputs_and_gradient(compiled, x, seed)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a == 0, e == 0)
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_each_kind_twice_of_one_tensor(x):
    """Equal calls are not merged: each kind's two results differ, and are eager's."""
    assert_as_eager(twice, x, seeds=(3, 4), backend="aot_eager")
    results = twice(x)
    half = len(results) // 2
    assert not any(torch.equal(a, b) for a, b in zip(results[:half], results[half:], strict=True))


def test_each_kind_by_inductor(x):
    """Which calls every op as it is, also where it is told to know no others than its own. The data is transposed."""
    with torch._inductor.config.patch(implicit_fallbacks=False):
        assert_as_eager(of_each_kind, x.mT, backend="inductor")


def test_independent_chains(x):
    assert_as_eager(chains, x, backend="inductor")


def test_torchs_own_dropout_while_enabled(x):
    """Draws that no Python of ours is traced for: two passes of one batch, as R-Drop and SimCSE have them."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.3, batch_first=True)

    def function(x):
        a, b = F.dropout(x), F.dropout(x)
        return layer(x), layer(x), a, b, F.dropout((a @ a).tanh()), F.dropout((b @ b).tanh())

    with fdt.enabled():
        assert_as_eager(function, x, backend="aot_eager")


@pytest.mark.parametrize("budget", [0.5, 0.0])
def test_memory_budgets(x, budget):
    """What is computed again in backward has the mask that it had."""
    with torch._functorch.config.patch({BUDGET: budget}):
        assert_as_eager(lambda x: block(block(x)).exp() - 1, x, backend="aot_eager")
        if budget == 0:
            assert_as_eager(twice, x, backend="aot_eager")


def test_budgets_of_regions(x):
    region = torch.autograd.graph.region_activation_memory_budget

    def program(x):
        return block(block(x))

    def some(x):
        with region(0.3):
            return program(x)

    def none(x):
        with region(0.0):
            return program(x)

    assert_as_eager(program, x, compiled=torch.compile(some, backend="aot_eager"))
    with pytest.raises(Exception, match="give a budget above 0"):
        torch.compile(none, backend="aot_eager")(x.clone().requires_grad_())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_and_around(x, reentrant):
    def inside(x):
        return checkpoint(block, fdt.dropout(x, 0.1), use_reentrant=reentrant) + fdt.dropout(x, 0.1)

    with torch._functorch.config.patch({BUDGET: 1.0 if reentrant else 0.0}):
        assert_as_eager(inside, x, backend="aot_eager")

    compiled_block = torch.compile(block, fullgraph=True, backend="aot_eager")

    def around(x):
        return checkpoint(compiled_block, fdt.dropout(x, 0.1), use_reentrant=reentrant) + fdt.dropout(x, 0.1)

    assert_as_eager(inside, x, compiled=around)


def test_without_a_gradient_and_frozen():
    """Freezing folds what depends on weights alone, and merges what is equal: draws of a weight are neither."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))

        def forward(self, x):
            y = F.linear(x, fdt.drop_connect(self.weight, 0.5)), F.linear(x, fdt.drop_connect(self.weight, 0.5))
            return (*y, fdt.dropout(x, 0.5), fdt.dropout(x, 0.5))

    model, x = Twice().eval(), torch.ones(3, WIDTH)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model)
        for seed in (3, 4):
            torch.manual_seed(seed)
            expected = model(x)
            torch.manual_seed(seed)
            for a, e in zip(compiled(x), expected, strict=True):
                torch.testing.assert_close(a, e)


def test_under_vmap(x):
    function = torch.func.vmap(lambda x: fdt.dropout(x, 0.5) + fdt.dropout(x, 0.5), randomness="different")
    assert_as_eager(lambda x: (function(x), function(x)), x, backend="aot_eager")


def test_results_that_nobody_uses(x):
    """A draw takes its number, used or not, if another comes after it."""

    def function(x):
        fdt.dropout(x, 0.5)
        return fdt.dropout(x, 0.5)

    assert_as_eager(function, x, backend="aot_eager")


def test_subgraphs_that_are_called_again(x):
    """A region that is compiled once draws anew at each call."""
    region = torch.compiler.nested_compile_region(block)
    compiled = torch.compile(lambda x: region(region(x)), fullgraph=True, backend="aot_eager")
    assert_as_eager(lambda x: block(block(x)), x, compiled=compiled)


def test_jit_trace(x):
    traced = torch.jit.trace(chains, x, check_trace=False)
    pair = torch.jit.trace(lambda x: (fdt.dropout(x, 0.5), fdt.dropout(x, 0.5)), x, check_trace=False)
    for function, jitted in ((chains, traced), (lambda x: (fdt.dropout(x, 0.5), fdt.dropout(x, 0.5)), pair)):
        for _ in range(3):  # compiled at the second
            torch.manual_seed(3)
            expected = function(x)
            torch.manual_seed(3)
            assert all(map(torch.equal, jitted(x), expected))


def test_parts_that_backward_would_run_again(x):
    """A mask that backward would draw anew is refused; under a seed it is the same, and so is what keeps its draw."""

    def branch(seed):
        def dropped(x):
            return fdt.dropout(x, 0.5, seed=seed) * 2

        return lambda x: torch.cond(x.sum() < torch.inf, dropped, torch.sin, (x,))

    region = torch.compiler.nested_compile_region(block)
    for function in (branch(None), lambda x: region(region(x))):
        torch.compiler.reset()
        with torch._functorch.config.patch({BUDGET: 0.5}), pytest.raises(Exception, match="give the dropout a seed"):
            torch.compile(function, backend="aot_eager")(x.clone().requires_grad_()).sum().backward()
    leaf = x.clone().requires_grad_()
    y = torch.compile(branch(5), backend="aot_eager")(leaf)
    y.sum().backward()
    torch.testing.assert_close((leaf * leaf.grad).sum(), y.sum())

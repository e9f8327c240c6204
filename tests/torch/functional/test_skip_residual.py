"""`skip_residual`: the masked form's values and gradients, with the branch on kept samples only."""

from __future__ import annotations

import itertools
import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..cases import assert_equal, numbers_drawn, saved_tensors, under, untouched
from ..ops.compiling import compiled, fresh_compiler, graphs

__all__ = ["fresh_compiler"]
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}
COUNTS = ("random", "fixed")


class Branch(nn.Module):
    """Elementwise in the samples, nonlinear, with parameters; it notes how many samples it got."""

    def __init__(self, width=4, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(torch.randn(width, width, generator=generator, dtype=torch.float64).to(dtype))
        self.samples = []

    def forward(self, x, *along):
        if not torch.compiler.is_compiling():
            self.samples.append(x.shape[0])
        y = (x @ self.weight).sin()
        for a in along:
            y = y if a is None else y * a
        return y


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def masked(x, branch, p, *, along=(), scale_by_keep=True, **options):
    scaling = "inverted" if scale_by_keep else "standard"
    return x + fdt.stochastic_depth(branch(x, *along), p, "row", scaling=scaling, **options)


def kept_by(x, y):
    """Which samples the branch has changed."""
    return (y != x).flatten(1).any(1)


def derivatives(function, inputs):
    """The result, its gradients and the gradients of these."""
    y = function()
    first = torch.autograd.grad(y.double().sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.double().square().sum() for g in first), inputs)
    return y, *first, *second


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("p", [0.0, 0.03, 0.3, 0.9, 1.0])
def test_equals_the_masked_form(dtype, p):
    """Values and gradients of two orders: of x, the parameters and a tensor along. p = 0.03 is below min_p, at 0.9 and
    1 with these seeds nothing is kept."""
    x, a = normal(6, 3, 4, dtype=dtype).requires_grad_(), normal(6, 1, 4, dtype=dtype).requires_grad_()
    for seed, scale_by_keep in itertools.product(range(4), (True, False)):
        branch = Branch(dtype=dtype)
        options = {"seed": seed, "along": (a, None), "scale_by_keep": scale_by_keep}
        inputs = (x, branch.weight, a)
        expected = derivatives(lambda b=branch, o=options: masked(x, b, p, **o), inputs)
        actual = derivatives(lambda b=branch, o=options: fdt.skip_residual(x, b, p, **o), inputs)
        tolerance = TOLERANCES[dtype]
        for got, wanted in zip(actual, expected, strict=True):
            assert got.dtype == wanted.dtype
            scale = max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * scale)
        wanted = fdt.stochastic_depth(torch.ones(6, 1, 1, dtype=dtype), p, "row", seed=seed).flatten() != 0
        assert_equal(kept_by(x, actual[0]), wanted)
        assert branch.samples[-1] == (6 if p < 0.05 else int(wanted.sum()))


def test_extreme_masks():
    """One sample, nothing kept, everything kept: parameters get gradients of 0, and nothing is gathered."""
    branch, x = Branch(), normal(1, 4).requires_grad_()
    seen = set()
    for seed in range(20):
        y = fdt.skip_residual(x, branch, 0.5, seed=seed)
        kept = branch.samples[-1]
        seen.add(kept)
        (gradient,) = torch.autograd.grad(y.sum(), branch.weight)
        assert bool(gradient.any()) == bool(kept)
        assert_equal(y, masked(x, Branch(), 0.5, seed=seed))
    assert seen == {0, 1}
    empty = fdt.skip_residual(normal(0, 4), branch, 0.5)
    assert empty.shape == (0, 4)
    given = []
    fdt.skip_residual(x, lambda kept: given.append(kept) or kept, 0.06, seed=0)
    assert given[0] is x
    assert_equal(fdt.skip_residual(torch.ones(8), torch.zeros_like, 0.5), torch.ones(8))  # samples without axes


def test_dropped_samples_leave_no_trace():
    """A branch that gives NaN for the dropped samples is never asked for them."""
    keep = fdt.stochastic_depth(torch.ones(50, 1), 0.5, "row", seed=3).flatten() != 0
    x = normal(50, 4)
    x[~keep] = math.inf
    x.requires_grad_()
    y = fdt.skip_residual(x, lambda x: x - x, 0.5, seed=3)
    y.sum().backward()
    assert_equal(y, x)
    assert_equal(x.grad, torch.ones_like(x))


def test_memory_for_backward():
    x, branch = normal(1000, 4).requires_grad_(), Branch()
    with saved_tensors() as kept:
        fdt.skip_residual(x, branch, 0.6, seed=0)
    n = branch.samples[0]
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in kept if t is not branch.weight}
    assert 350 < n < 450
    assert sorted(sizes.values()) == [8 * n, 16 * n, 16 * n]  # the index, the kept rows, the sine's input


def test_seed_comes_before_the_branch():
    """One number from the generator, drawn before the branch's own, in every form."""
    x = normal(40, 4)

    def drops(x):
        return fdt.dropout(x, 0.5) + 1

    assert numbers_drawn(lambda: fdt.skip_residual(x, Branch(), 0.5)) == 1
    assert numbers_drawn(lambda: fdt.skip_residual(x, Branch(), 0.5, training=False)) == 0
    generator = torch.Generator().manual_seed(3)
    assert numbers_drawn(lambda: fdt.skip_residual(x, Branch(), 0.5, generator=generator), generator) == 1
    seed = under(3, lambda: int(torch.empty((), dtype=torch.int64).random_()))
    wanted = kept_by(x, fdt.skip_residual(x, drops, 0.3, seed=seed))
    for min_p, count in ((0.05, "random"), (1.0, "random")):
        y = under(3, fdt.skip_residual, x, drops, 0.3, min_p=min_p, count=count)
        assert_equal(kept_by(x, y), wanted)
    whole = compiled(lambda x: fdt.skip_residual(x, drops, 0.3))
    assert_equal(kept_by(x, under(3, whole, x)), wanted)


@pytest.mark.parametrize("p", [0.0, 0.04, 0.3, 0.5, 0.97, 1.0])
def test_fixed_number(p):
    """Exactly round(N (1 - p)) samples: those with the least noise; below min_p too."""
    for n, seed in itertools.product((1, 2, 5, 33), range(3)):
        x, k = normal(n, 4), round(n * (1 - p))
        y = fdt.skip_residual(x, torch.ones_like, p, seed=seed, count="fixed")
        keys = fdt.gaussian_dropout(torch.ones(n, dtype=torch.float64), 0.5, seed=seed)
        kept = torch.zeros(n, dtype=torch.bool)
        kept[keys.argsort()[:k]] = True
        assert_equal(kept_by(x, y), kept)
        torch.testing.assert_close(y - x, kept[:, None] * torch.full_like(x, n / k if k else 0.0))


def test_fixed_number_is_uniform():
    """Chi-square over samples, and over the pairs that are kept together."""
    n, p, seeds = 6, 0.5, 4000
    x = torch.zeros(n)
    keep = torch.stack([fdt.skip_residual(x, torch.ones_like, p, seed=s, count="fixed") for s in range(seeds)]) != 0
    together = keep.double().T @ keep.double()
    upper = torch.triu_indices(n, n, 1)
    for counts, expected in ((together.diagonal(), seeds / 2), (together[upper[0], upper[1]], seeds / 5)):
        chi_square = float(((counts - expected).square() / expected).sum())
        assert chi_square < 40  # the sum of squares of at most 15 variables, each of variance 1 at most


def test_fixed_equals_masked_by_hand():
    x, branch = normal(9, 4, dtype=torch.float64).requires_grad_(), Branch(dtype=torch.float64)

    def by_hand():
        keep = kept_by(x, fdt.skip_residual(x.detach(), torch.ones_like, 0.4, seed=5, count="fixed"))
        return x + branch(x) * keep[:, None] * (9 / 5)

    inputs = (x, branch.weight)
    expected = derivatives(by_hand, inputs)
    for min_p in (0.05, 1.0):
        actual = derivatives(lambda m=min_p: fdt.skip_residual(x, branch, 0.4, seed=5, count="fixed", min_p=m), inputs)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("seed", [None, 7])
def test_compiled_equals_eager(count, seed):
    x, branch, a = normal(12, 4).requires_grad_(), Branch(), normal(12, 1)

    def function(x, a):
        return fdt.skip_residual(x, branch, 0.4, seed=seed, along=(a,), count=count)

    ours, inputs = compiled(function), (x, branch.weight)
    for start in range(3):
        expected, actual = under(start, function, x, a), under(start, ours, x, a)
        assert_equal(kept_by(x, actual), kept_by(x, expected))
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs)
        )
    assert graphs() == 1


def test_compiled_fixed_skips_samples():
    shapes = []

    def branch(x):
        shapes.append(tuple(x.shape))
        return x.cos()

    ours = compiled(lambda x: fdt.skip_residual(x, branch, 0.4, count="fixed"))
    ours(normal(10, 4))
    assert shapes[-1] == (6, 4)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(count, reentrant):
    x, branch = normal(12, 4).requires_grad_(), Branch()

    def function(x):
        return fdt.skip_residual(x, branch, 0.4, count=count)

    results = []
    for call in (function, lambda x: checkpoint(function, x, use_reentrant=reentrant)):
        y = under(3, call, x)
        y.sin().sum().backward()
        results.append((y.detach(), x.grad, branch.weight.grad))
        x.grad = branch.weight.grad = None
    assert_equal(results[1], results[0])


def test_autocast():
    x, layer = normal(12, 4), nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = (f(x, layer, 0.4, seed=2) for f in (fdt.skip_residual, masked))
    assert y.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("count", COUNTS)
def test_layouts_are_those_of_the_sum(count):
    """The branch and the result see channels-last tensors where x is one."""
    for x in (normal(6, 3, 4, 5).contiguous(memory_format=torch.channels_last), normal(6, 4, 3).mT, normal(12, 3)[::2]):
        strides: list = []
        y = fdt.skip_residual(x, lambda x, s=strides: s.append(x.stride()) or 2 * x, 0.5, seed=1, count=count)
        plain = fdt.skip_residual(x.contiguous(), lambda x: 2 * x, 0.5, seed=1, count=count)
        assert_equal(y, plain)
        if x.dim() == 4:
            assert y.stride() == x.stride()
            assert strides[0] == x[: len(plain)].stride()


def test_under_transforms():
    """Everything goes through the branch, under each sample's own mask."""
    x = normal(3, 10, 4)
    y = under(1, vmap(lambda x: fdt.skip_residual(x, torch.ones_like, 0.5), randomness="different"), x)
    seeds = under(1, lambda: torch.empty(3, dtype=torch.int64).random_())
    for i in range(3):
        assert_equal(y[i], fdt.skip_residual(x[i], torch.ones_like, 0.5, seed=int(seeds[i])))


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_traced():
    """By `torch.jit.trace`: everything goes through the branch, as compiled; a fixed number is refused."""
    x = normal(12, 4)

    def function(x, count="random"):
        return fdt.skip_residual(x, torch.cos, 0.4, count=count)

    traced = torch.jit.trace(function, x, check_trace=False)
    torch.testing.assert_close(under(3, traced, x), under(3, function, x))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace can't trace count='fixed' in training, because"):
        torch.jit.trace(lambda x: function(x, "fixed"), x)


X = torch.ones(4, 2)
BAD = {
    "p": (ValueError, "drop probability has to be between 0 and 1, but got 1.5", (X, torch.sin, 1.5), {}),
    "min_p": (ValueError, "min_p must be between 0 and 1, but got 2", (X, torch.sin, 0.5), {"min_p": 2}),
    "count": (
        ValueError,
        "count must be one of 'random', 'fixed', but got 'exact'",
        (X, torch.sin, 0.5),
        {"count": "exact"},
    ),
    "axes": (ValueError, "x must have an axis of samples, but got 0 axes", (torch.ones(()), torch.sin, 0.5), {}),
    "x": (TypeError, "x must be a Tensor, but got list", ([1.0], torch.sin, 0.5), {}),
    "branch": (TypeError, "branch must be callable, but got int", (X, 3, 0.5), {}),
    "along": (TypeError, "along must be a sequence of tensors, but got Tensor", (X, torch.mul, 0.5), {"along": X}),
    "along's entry": (TypeError, r"along\[0\] must be a Tensor, but got int", (X, torch.mul, 0.5), {"along": [3]}),
    "along's samples": (
        ValueError,
        r"along\[1\] must have x's number of samples, 4, on axis 0, but got shape \(3, 2\)",
        (X, torch.mul, 0.5),
        {"along": [None, X[:3]]},
    ),
    "seed": (
        ValueError,
        "seed and generator must not both be given",
        (X, torch.sin, 0.5),
        {"seed": 1, "generator": torch.default_generator},
    ),
    "dtype": (RuntimeError, "dropout takes float32", (X.int(), torch.clone, 0.5), {"seed": 4}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, match, args, options = BAD[name]
    if isinstance(args[0], torch.Tensor):
        untouched(args[0], lambda: fdt.skip_residual(*args, **options), error, match)
    else:
        with pytest.raises(error, match=match):
            fdt.skip_residual(*args, **options)


def test_bad_branches():
    for p in (0.0, 0.04, 0.5):
        with pytest.raises(ValueError, match=r"branch must return the shape of its input, \(\d, 2\), but got \(1, 2\)"):
            fdt.skip_residual(X, lambda x: x.new_ones(1, 2), p, seed=4)
        with pytest.raises(TypeError, match="branch must return a Tensor, but got tuple"):
            fdt.skip_residual(X, lambda x: (x, x), p, seed=4)
    for p, count in ((0.04, "random"), (0.5, "random"), (0.06, "fixed")):  # all run; some are kept; all are kept
        with pytest.raises(RuntimeError, match="branch must not write to its input, because skip_residual adds"):
            fdt.skip_residual(torch.randn(4, 2), torch.relu_, p, seed=4, count=count)
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    with pytest.raises(RuntimeError, match="skip_residual takes dense tensors, but got a nested one"):
        fdt.skip_residual(nested, torch.sin, 0.5)

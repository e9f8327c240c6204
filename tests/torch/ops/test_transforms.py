"""Plain dropout under transforms of torch that nest, map without samples, or save programs.

What every kind must do under `torch.func`, modes, tracers and subclasses is tested in ../functional/test_gradients.py.
"""

from __future__ import annotations

import io

import pytest

import fastdrop as fd
from fastdrop.core.random import keep_scale, threshold

torch = pytest.importorskip("torch")

from torch import nn
from torch.func import functional_call, grad, jacfwd, linearize, vmap
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..cases import Log, assert_equal, gradient, under

STORES = ("bits", "seed")


def drop(x, p=0.5, **options):
    return fdt.dropout(x, p, **options)


def reference(x, p, seed):
    """Dropout by torch's own differentiable ops, under the mask that the NumPy side draws."""
    keep = torch.from_numpy(fd.draw_mask(tuple(x.shape), p, rng=seed).to_bool())
    return torch.where(keep, x * keep_scale(threshold(p)), torch.zeros_like(x))


@pytest.fixture
def x():
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---- derivatives ----


@pytest.mark.parametrize(("store", "noise_shape"), [("bits", None), ("seed", (1, 5))])
def test_derivatives_of_complex_numbers(store, noise_shape):
    def function(x):
        return fdt.dropout(x, 0.5, seed=6, store=store, noise_shape=noise_shape)

    x = torch.randn(3, 5, dtype=torch.complex128, requires_grad=True)
    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, (x,), **checks)
    assert torch.autograd.gradgradcheck(function, (x,), check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize(("store", "p"), [("bits", 0.5), ("seed", 0.5), ("seed", 1.0)])
def test_derivatives_of_any_order(x, p, store):
    """Also through the gradient that comes in."""

    def derivatives(function):
        z, weight = x.clone().requires_grad_(), x.cos().requires_grad_()
        (first,) = torch.autograd.grad((function(z).pow(4) * weight).sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), z, create_graph=True)
        return first.detach(), second.detach(), *torch.autograd.grad(second.sum(), (z, weight))

    ours = derivatives(lambda x: fdt.dropout(x, p, seed=5, store=store))
    assert (ours[0] != 0).any() == (p < 1)
    torch.testing.assert_close(ours, derivatives(lambda x: reference(x, p, 5)))


RARE = {
    "linearize": lambda f, x: linearize(f, x)[1](x.cos()),
    "forward over forward": lambda f, x: jacfwd(jacfwd(lambda x: f(x).pow(3).sum()))(x),
    "jacobian batched": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "jacobian forward": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "hessian batched": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).pow(3).sum(), x, vectorize=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", RARE)
def test_rare_transforms_equal_those_of_torchs_own_ops(x, transform):
    expected = RARE[transform](lambda x: reference(x, 0.4, 7), x)
    for store in STORES:
        ours = RARE[transform](lambda x: fdt.dropout(x, 0.4, seed=7, store=store), x)  # noqa: B023
        torch.testing.assert_close(ours, expected)


# ---- vmap ----


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_an_unbatched_input(randomness):
    x, weights = torch.ones(40), torch.arange(1.0, 4.0)
    ours = under(3, vmap(lambda w: drop(x) * w, randomness=randomness), weights)
    if randomness == "same":
        expected = under(3, drop, x) * weights[:, None]
    else:
        expected = under(3, lambda: torch.stack([drop(x) * w for w in weights]))
    assert_equal(ours, expected)


def test_vmap_with_seeds_needs_no_randomness(x):
    seeds = torch.tensor([5, 0, -3, 2**40])
    ours = vmap(lambda x, seed: drop(x, seed=seed))(x, seeds)
    assert_equal(ours, torch.stack([drop(sample, seed=seed) for sample, seed in zip(x, seeds, strict=True)]))
    assert_equal(vmap(lambda x: drop(x, seed=4))(x), drop(x, seed=4, noise_shape=(1, None)))


@pytest.mark.parametrize("outer", ["same", "different"])
@pytest.mark.parametrize("inner", ["same", "different"])
def test_vmap_nested(outer, inner):
    x = torch.randn(3, 4, 30)
    ours = under(6, vmap(vmap(drop, randomness=inner), randomness=outer), x)
    masks = ours == 0
    assert torch.equal(masks.any(0), masks.all(0)) == (outer == "same")
    assert torch.equal(masks.any(1), masks.all(1)) == (inner == "same")
    if inner == outer == "same":
        assert_equal(ours, under(6, lambda: drop(x, noise_shape=(1, 1, None))))
    elif inner == outer == "different":
        assert_equal(ours, under(6, lambda: torch.stack([torch.stack([drop(row) for row in rows]) for rows in x])))
    else:
        assert_equal(ours[~masks], 2 * x[~masks])


def test_vmap_in_place(x):
    z = x.clone()
    ours = under(2, vmap(lambda x: drop(x, inplace=True), randomness="different"), z)
    assert_equal(ours, under(2, lambda: torch.stack([drop(sample) for sample in x])))
    assert_equal(z, ours)


def test_grad_of_vmap_equals_the_loop(x):
    def loss(x):
        return drop(x, 0.4).sin().sum()

    batch = under(5, grad(lambda x: vmap(loss, randomness="different")(x).sum()), x)
    assert_equal(batch, under(5, lambda: torch.stack([grad(loss)(sample) for sample in x])))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradients_per_sample(randomness):
    net = nn.Sequential(nn.Linear(6, 5), fdt.Dropout(0.5), nn.Tanh(), fdt.Dropout(0.2, store="seed"), nn.Linear(5, 1))
    net.double()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    x, target = torch.randn(4, 6).double(), torch.randn(4, 1).double()

    def loss(parameters, x, target):
        return (functional_call(net, parameters, (x,)) - target).pow(2).mean()

    ours = under(7, vmap(grad(loss), in_dims=(None, 0, 0), randomness=randomness), parameters, x, target)
    # Samples under one vmap draw layer by layer, so the loop is given each layer's seeds.
    draws = under(7, lambda: [torch.empty(4, dtype=torch.int64).random_() for _ in range(2)])
    if randomness == "same":
        draws = under(7, lambda: [torch.empty(1, dtype=torch.int64).random_().expand(4) for _ in range(2)])
    for i in range(4):
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        z = nn.functional.linear(x[i], leaves["0.weight"], leaves["0.bias"])
        z = drop(drop(z, seed=draws[0][i]).tanh(), 0.2, seed=draws[1][i])
        z = nn.functional.linear(z, leaves["4.weight"], leaves["4.bias"])
        (z - target[i]).pow(2).mean().backward()
        for name, leaf in leaves.items():
            torch.testing.assert_close(ours[name][i], leaf.grad)


# ---- checkpoint, traces, modes ----


def test_checkpoint_without_the_generators_state_needs_a_seed(x):
    def function(x):
        return drop(x * 3, 0.5, seed=11).exp()

    def saved(x):
        return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)

    assert_equal(gradient(saved, x), gradient(function, x))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_of_evaluation_has_no_dropout(x):
    net = nn.Sequential(nn.Linear(6, 20), fdt.Dropout(0.5), nn.Tanh(), fdt.Dropout(0.3)).double().eval()
    traced = torch.jit.trace(net, x)
    assert_equal(traced(x), net(x))
    assert "aten::dropout" not in str(traced.inlined_graph)
    assert "fastdrop::" not in str(traced.inlined_graph)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_of_training_can_be_saved(x):
    traced = torch.jit.trace(drop, (x,), check_trace=False)
    assert not torch.equal(traced(x), traced(x))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert_equal(under(1, torch.jit.load(file), x), under(1, drop, x))


def test_dispatch_mode_in_place(x):
    own = x.clone()
    with Log() as log:
        ours = under(3, lambda: drop(own, inplace=True))
    assert ours is own
    assert "fastdrop.forward.default" in log.seen
    assert_equal(own, under(3, drop, x))

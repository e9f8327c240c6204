"""Dropout for torch under transforms, modes, tracers and subclasses: the values are those of plain eager code."""

from __future__ import annotations

import io

import pytest

import fastdrop as fd
from fastdrop.core.random import keep_scale, threshold

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..cases import Log, LogFunctions, Named, Wrapped, assert_equal, gradient, under

STORES = ("bits", "seed")
OPS = torch.ops.fastdrop


def drop(x, p=0.5, **options):
    return fdt.dropout(x, p, **options)


def reference(x, p, seed, noise_shape=None):
    """Dropout by torch's own differentiable ops, under the mask that the NumPy side draws."""
    cells = tuple(x.shape) if noise_shape is None else noise_shape
    keep = torch.from_numpy(fd.draw_mask(cells, p, rng=seed).to_bool())
    return torch.where(keep, x * keep_scale(threshold(p)), torch.zeros_like(x))


@pytest.fixture
def x():
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---- derivatives against finite differences ----


@pytest.mark.parametrize("noise_shape", [None, (1, 5), (3, 1)], ids=str)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_derivatives_match_finite_differences(dtype, store, noise_shape):
    x = torch.randn(3, 5, dtype=dtype, requires_grad=True)

    def function(x):
        return fdt.dropout(x, 0.5, seed=6, store=store, noise_shape=noise_shape)

    assert 0 < (function(x) == 0).sum() < x.numel()
    assert torch.autograd.gradcheck(
        function, (x,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(
        function, (x,), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("store", STORES)
def test_derivatives_in_place_match_finite_differences(store):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    arguments = (lambda x: fdt.dropout(x * 2, 0.5, seed=3, store=store, inplace=True), (x,))
    assert torch.autograd.gradcheck(*arguments, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(*arguments, check_fwd_over_rev=True)


@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("store", STORES)
def test_derivatives_of_any_order(x, p, store):
    def derivatives(function):
        z = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(z).pow(4).sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), z, create_graph=True)
        (third,) = torch.autograd.grad(second.sum(), z)
        return first.detach(), second.detach(), third

    ours = derivatives(lambda x: fdt.dropout(x, p, seed=5, store=store))
    theirs = derivatives(lambda x: reference(x, p, 5))
    assert (ours[0] == 0).any()
    assert (ours[0] != 0).any() == (p < 1)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("store", STORES)
def test_derivatives_of_gradients_with_a_weight(x, store):
    """Double backward by hand, through the gradient that comes in as well."""

    def by_hand(function):
        z, weight = x.clone().requires_grad_(), x.cos().requires_grad_()
        (first,) = torch.autograd.grad((function(z).sin() * weight).sum(), z, create_graph=True)
        first.pow(2).sum().backward()
        return first.detach(), z.grad, weight.grad

    ours = by_hand(lambda x: fdt.dropout(x, 0.4, seed=8, store=store))
    torch.testing.assert_close(ours, by_hand(lambda x: reference(x, 0.4, 8)))


@pytest.mark.parametrize("store", STORES)
def test_batched_gradients_equal_the_loop(x, store):
    z = x.clone().requires_grad_()
    y = fdt.dropout(z, 0.5, seed=2, store=store)
    dys = torch.randn(5, *x.shape, dtype=x.dtype)
    (batched,) = torch.autograd.grad(y, z, dys, is_grads_batched=True, retain_graph=True)
    loop = torch.stack([torch.autograd.grad(y, z, dy, retain_graph=True)[0] for dy in dys])
    assert (loop == 0).any()
    assert_equal(batched, loop)


# ---- torch.func ----

SCALAR = {
    "grad": lambda f, x: grad(lambda x: f(x).sin().sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](x.cos())[0],
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "jvp of grad": lambda f, x: jvp(grad(lambda x: f(x).sin().sum()), (x,), (x.cos(),)),
    "grad of grad": lambda f, x: grad(lambda x: grad(lambda x: f(x).sin().sum())(x).pow(2).sum())(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda x: f(x).pow(3).sum())(x),
    "linearize": lambda f, x: linearize(f, x)[1](x.cos()),
    "forward over forward": lambda f, x: jacfwd(jacfwd(lambda x: f(x).pow(3).sum()))(x),
    "functional.jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "functional.jacobian batched": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "functional.jacobian forward": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "functional.hessian": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).pow(3).sum(), x),
    "functional.hessian batched": lambda f, x: torch.autograd.functional.hessian(
        lambda x: f(x).pow(3).sum(), x, vectorize=True
    ),
    "functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x.cos()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("noise_shape", [None, (1, 6)], ids=str)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("transform", SCALAR)
def test_transform_equals_that_of_torchs_own_ops(x, transform, store, noise_shape):
    ours = SCALAR[transform](lambda x: fdt.dropout(x, 0.4, seed=7, store=store, noise_shape=noise_shape), x)
    theirs = SCALAR[transform](lambda x: reference(x, 0.4, 7, noise_shape), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jvp of grad", "jacrev", "functional.jacobian batched"])
@pytest.mark.parametrize("store", STORES)
def test_transform_draws_the_mask_that_eager_draws(x, transform, store):
    seed = int(under(9, lambda: torch.empty((), dtype=torch.int64).random_()))
    ours = under(9, SCALAR[transform], lambda x: fdt.dropout(x, 0.4, store=store), x)
    torch.testing.assert_close(ours, SCALAR[transform](lambda x: reference(x, 0.4, seed), x))


@pytest.mark.parametrize("store", STORES)
def test_dual_numbers(x, store):
    with fwAD.dual_level():
        y = fdt.dropout(fwAD.make_dual(x, x.cos()), 0.5, seed=4, store=store)
        primal, tangent = fwAD.unpack_dual(y)
    assert_equal(primal, reference(x, 0.5, 4))
    assert_equal(tangent, reference(x.cos(), 0.5, 4))


def test_dual_numbers_in_place(x):
    with fwAD.dual_level():
        dual = fwAD.make_dual(x.clone(), x.cos())
        y = fdt.dropout(dual, 0.5, seed=4, inplace=True)
        assert y is dual
        primal, tangent = fwAD.unpack_dual(dual)
    assert_equal(primal, reference(x, 0.5, 4))
    assert_equal(tangent, reference(x.cos(), 0.5, 4))


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_functionalize(x, inplace):
    assert_equal(functionalize(lambda x: drop(x * 1, seed=3, inplace=inplace))(x), drop(x, seed=3))
    assert_equal(under(3, functionalize(lambda x: drop(x * 1, inplace=inplace)), x), under(3, drop, x))


# ---- vmap ----


@pytest.mark.parametrize("store", STORES)
def test_vmap_same_is_one_mask_for_all_samples(x, store):
    ours = under(3, vmap(lambda x: drop(x, store=store), randomness="same"), x)
    assert_equal(ours, under(3, lambda: drop(x, noise_shape=(1, None))))
    assert_equal((ours == 0).any(0), (ours == 0).all(0))


@pytest.mark.parametrize("store", STORES)
def test_vmap_different_equals_the_loop(x, store):
    ours = under(3, vmap(lambda x: drop(x, store=store), randomness="different"), x)
    assert_equal(ours, under(3, lambda: torch.stack([drop(sample) for sample in x])))
    assert not torch.equal((ours == 0).any(0), (ours == 0).all(0))


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("store", STORES)
def test_vmap_of_an_unbatched_input(randomness, store):
    x, weights = torch.ones(40), torch.arange(1.0, 4.0)
    ours = under(3, vmap(lambda w: drop(x, store=store) * w, randomness=randomness), weights)
    if randomness == "same":
        expected = under(3, drop, x) * weights[:, None]
    else:
        expected = under(3, lambda: torch.stack([drop(x) * w for w in weights]))
    assert_equal(ours, expected)


def test_vmap_error_has_torchs_text(x):
    def text(function):
        with pytest.raises(RuntimeError) as raised:
            vmap(function, randomness="error")(x)
        return str(raised.value)

    assert text(drop) == text(torch.rand_like)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(lambda x: OPS.forward(x, OPS.draw(x, []), 0.5, None, True)[0])(x)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_the_ops_draws_as_vmap_of_dropout(x, randomness):
    ours = under(3, vmap(lambda x: OPS.forward(x, OPS.draw(x, []), 0.5, None, True)[0], randomness=randomness), x)
    assert_equal(ours, under(3, vmap(drop, randomness=randomness), x))


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
@pytest.mark.parametrize("store", STORES)
def test_vmap_over_seeds_equals_the_loop(x, store, randomness):
    seeds = torch.tensor([5, 0, -3, 2**40])
    ours = vmap(lambda x, seed: drop(x, seed=seed, store=store), randomness=randomness)(x, seeds)
    assert_equal(ours, torch.stack([drop(sample, seed=seed) for sample, seed in zip(x, seeds, strict=True)]))
    one = vmap(lambda seed: drop(x, seed=seed, store=store), randomness=randomness)(seeds)
    assert_equal(one, torch.stack([drop(x, seed=seed) for seed in seeds]))


@pytest.mark.parametrize("store", STORES)
def test_vmap_with_one_seed_needs_no_randomness(x, store):
    ours = vmap(lambda x: drop(x, seed=4, store=store))(x)
    assert_equal(ours, drop(x, seed=4, noise_shape=(1, None)))


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


@pytest.mark.parametrize("in_dim", [1, -1, 2])
@pytest.mark.parametrize("store", STORES)
def test_vmap_over_another_axis(store, in_dim):
    x = torch.randn(5, 4, 3)
    samples = x.movedim(in_dim, 0).unbind()
    ours = under(2, vmap(lambda x: drop(x, store=store), randomness="different", in_dims=in_dim, out_dims=in_dim), x)
    assert_equal(ours, under(2, lambda: torch.stack([drop(sample) for sample in samples], in_dim)))
    same = under(2, vmap(lambda x: drop(x, store=store), randomness="same", in_dims=in_dim), x)
    mask = under(2, drop, torch.ones_like(samples[0]))
    assert_equal(same, torch.stack([sample * mask for sample in samples]))


@pytest.mark.parametrize("store", STORES)
def test_vmap_of_noise_shape(store):
    x = torch.ones(3, 4, 9)
    ours = under(2, vmap(lambda x: drop(x, noise_shape=(1, None), store=store), randomness="different"), x)
    assert_equal(ours, under(2, lambda: torch.stack([drop(sample, noise_shape=(1, None)) for sample in x])))
    same = under(2, vmap(lambda x: drop(x, noise_shape=(1, None), store=store), randomness="same"), x)
    assert_equal(same, under(2, lambda: drop(x, noise_shape=(1, 1, None))))


def test_vmap_in_place(x):
    z = x.clone()
    ours = under(2, vmap(lambda x: drop(x, inplace=True), randomness="different"), z)
    assert_equal(ours, under(2, lambda: torch.stack([drop(sample) for sample in x])))
    assert_equal(z, ours)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_no_samples(randomness):
    assert vmap(drop, randomness=randomness)(torch.ones(0, 3)).shape == (0, 3)


def test_vmap_over_p_is_refused(x):
    with pytest.raises((RuntimeError, ValueError)):
        vmap(lambda x, p: drop(x, p, seed=0))(x, torch.full((4,), 0.5))


@pytest.mark.parametrize("store", STORES)
def test_vmap_of_grad_and_grad_of_vmap(x, store):
    def loss(x):
        return drop(x, 0.4, store=store).sin().sum()

    per_sample = under(5, vmap(grad(loss), randomness="different"), x)
    loop = under(5, lambda: torch.stack([grad(loss)(sample) for sample in x]))
    assert_equal(per_sample, loop)
    batch = under(5, grad(lambda x: vmap(loss, randomness="different")(x).sum()), x)
    assert_equal(batch, loop)
    eager = under(5, lambda: gradient(lambda x: torch.stack([drop(sample, 0.4) for sample in x]), x))[1]
    assert_equal(batch, eager)


@pytest.mark.parametrize("store", STORES)
def test_vmap_keeps_a_gradient_for_eager_backward(x, store):
    ours = under(5, gradient, vmap(lambda x: drop(x, store=store), randomness="different"), x)
    assert_equal(ours, under(5, gradient, lambda x: torch.stack([drop(sample) for sample in x]), x))


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


# ---- the ops themselves ----

SAMPLES = {
    "plain": lambda: (torch.randn(5, 13), None),
    "channels_last": lambda: (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), None),
    "transposed": lambda: (torch.randn(5, 13).t(), None),
    "strided": lambda: (torch.randn(10, 13)[::2, 1::3], None),
    "expanded": lambda: (torch.randn(3, 1, 4).permute(2, 1, 0).expand(4, 3, 3), None),
    "empty": lambda: (torch.randn(0, 6), None),
    "scalar": lambda: (torch.randn(()), None),
    "bfloat16": lambda: (torch.randn(5, 13).bfloat16(), None),
    "complex": lambda: (torch.randn(13, 5, dtype=torch.complex64).t(), None),
    "noise_shape": lambda: (torch.randn(5, 13), [1, 13]),
    "noise_shape channels_last": lambda: (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        [2, 3, 1, 1],
    ),
}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("overload", ["default", "tensor"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample, overload, requires_grad):
    """All four checks hold for all samples."""
    x, noise_shape = SAMPLES[sample]()
    x.requires_grad_(requires_grad)
    p = 0.3 if overload == "default" else torch.tensor(0.3)
    forward, backward = getattr(OPS.forward, overload), getattr(OPS.backward, overload)
    for bits in (True, False):
        torch.library.opcheck(forward, (x, torch.tensor(3), p, noise_shape, bits))
    words = forward(x.detach(), torch.tensor(3), p, noise_shape, True)[1]
    torch.library.opcheck(backward, (x, words, p, noise_shape))


@pytest.mark.parametrize("size", [[], [3]], ids=str)
def test_opcheck_draw(size):
    torch.library.opcheck(OPS.draw, (torch.ones(3), size))


@pytest.mark.parametrize("overload", ["default", "tensor"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_ops_equal_dropout(sample, overload):
    x, noise_shape = SAMPLES[sample]()
    p = 0.3 if overload == "default" else torch.tensor(0.3, dtype=torch.float64)
    y, words = getattr(OPS.forward, overload)(x, torch.tensor(3), p, noise_shape, True)
    expected = fdt.dropout(x, 0.3, seed=3, noise_shape=noise_shape)
    assert_equal(y, expected)
    assert y.stride() == expected.stride()
    assert_equal(getattr(OPS.backward, overload)(x, words, p, noise_shape), expected)


def test_op_reads_strided_words_right_or_refuses_them():
    x = torch.randn(3, 100)
    words = OPS.forward(x, torch.tensor(3), 0.3, None, True)[1]
    spread = torch.full((2 * words.numel(),), -1, dtype=torch.int32)[::2].copy_(words)
    try:
        dx = OPS.backward(x, spread, 0.3, None)
    except ValueError:
        return
    assert_equal(dx, OPS.backward(x, words, 0.3, None))


def test_op_maps_over_words_on_any_axis():
    x = torch.randn(3, 100)
    words = torch.stack([OPS.forward(x, torch.tensor(seed), 0.3, None, True)[1] for seed in range(4)], -1)
    ours = vmap(lambda words: OPS.backward(x, words, 0.3, None), in_dims=1)(words)
    assert_equal(ours, torch.stack([drop(x, 0.3, seed=seed) for seed in range(4)]))


@pytest.mark.parametrize(
    "words",
    [
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int64),
    ],
    ids=["too few", "none", "int64"],
)
@pytest.mark.parametrize("noise_shape", [None, [1, 100]], ids=str)
def test_op_refuses_words_it_would_read_beyond(words, noise_shape):
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        OPS.backward(torch.ones(1, 100), words, 0.3, noise_shape)


@pytest.mark.parametrize("noise_shape", [[2, 6], [4], [4, 6, 1], [8, 6]], ids=str)
def test_op_refuses_a_noise_shape_that_does_not_fit(x, noise_shape):
    with pytest.raises((RuntimeError, ValueError)):
        OPS.forward(x, torch.tensor(3), 0.3, noise_shape, True)


def test_op_carries_a_forward_derivative(x):
    """Called by itself as well: silence would be a tangent of zero."""
    with fwAD.dual_level():
        y, _ = OPS.forward(fwAD.make_dual(x, x.cos()), torch.tensor(4), 0.5, None, True)
        assert_equal(fwAD.unpack_dual(y).tangent, reference(x.cos(), 0.5, 4))


@pytest.mark.parametrize("bits", [True, False], ids=STORES)
@pytest.mark.parametrize("transform", [name for name in SCALAR if not name.startswith("functional.")])
def test_op_under_a_transform_is_right_or_refused(x, transform, bits):
    """Never a derivative of zero without a word."""

    def op(x):
        return OPS.forward(x, torch.tensor(7), 0.4, [1, 6], bits)[0]

    try:
        ours = SCALAR[transform](op, x)
    except RuntimeError:
        return
    torch.testing.assert_close(ours, SCALAR[transform](lambda x: reference(x, 0.4, 7, (1, 6)), x))


# ---- autocast, checkpoint, inference ----


def test_autocast_dtype_follows(x):
    linear = nn.Linear(6, 50)
    x = x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = linear(x)
        y = drop(hidden, seed=1)
        assert drop(x, seed=1).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert_equal(y, drop(hidden, seed=1))
    y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    kept = (drop(torch.ones_like(hidden), seed=1)).sum(0)
    assert_equal(linear.bias.grad, kept.float())


def network(store):
    torch.manual_seed(1)
    first, second = fdt.Dropout(0.5, store=store), fdt.Dropout(0.3, store=store)
    return nn.Sequential(nn.Linear(6, 20), first, nn.Tanh(), second, nn.Linear(20, 3)).double()


def gradients(net, function, x):
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    torch.rand(7)  # whoever runs again must go back in the generator
    y.sin().sum().backward()
    return (y.detach(), x.grad, *(p.grad.clone() for p in net.parameters()))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("store", STORES)
def test_checkpoint_changes_nothing(x, store, use_reentrant):
    net = network(store)
    plain = under(5, gradients, net, net, x)
    assert_equal(under(5, gradients, net, lambda x: checkpoint(net, x, use_reentrant=use_reentrant), x), plain)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("store", STORES)
def test_checkpoint_without_the_generators_state_needs_a_seed(x, store, use_reentrant):
    def function(x):
        return drop(x * 3, 0.5, seed=11, store=store).exp()

    def saved(x):
        return checkpoint(function, x, use_reentrant=use_reentrant, preserve_rng_state=False)

    assert_equal(gradient(saved, x), gradient(function, x))


def test_inference_mode(x):
    expected = under(3, drop, x)
    with torch.inference_mode():
        y = under(3, drop, x)
        own = x.clone()
        z = under(3, lambda: drop(own, inplace=True))
    assert y.is_inference()
    assert z is own
    assert_equal(y.clone(), expected)
    assert_equal(z.clone(), expected)


def test_inference_tensors_are_not_written_outside_of_inference_mode():
    with torch.inference_mode():
        x = torch.ones(8)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode is not allowed"):
        drop(x, inplace=True)
    assert (x == 1).all()


def test_deterministic_algorithms(x):
    """Which also fill new memory with NaN: words of a mask are written to the last."""
    expected = [under(3, gradient, lambda x, s=store: drop(x, store=s), x) for store in STORES]
    words = OPS.forward(x, torch.tensor(3), 0.5, None, True)[1]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.isnan(torch.empty(3)).all()
        ours = [under(3, gradient, lambda x, s=store: drop(x, store=s), x) for store in STORES]
        assert_equal(OPS.forward(x, torch.tensor(3), 0.5, None, True)[1], words)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(tuple(ours), tuple(expected))


# ---- tensors without memory ----


def described(x):
    return x.shape, x.stride(), x.dtype, x.device.type


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("store", STORES)
def test_fake_tensors_have_the_shape_of_real_ones(sample, store):
    x, noise_shape = SAMPLES[sample]()
    real = x.detach().requires_grad_()
    y = drop(real, noise_shape=noise_shape, store=store)
    (dx,) = torch.autograd.grad(y, real, torch.ones_like(y))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x).requires_grad_()
        fy = drop(fake, noise_shape=noise_shape, store=store)
        (fdx,) = torch.autograd.grad(fy, fake, torch.ones_like(fy))
        assert type(fy) is type(fdx) is type(fake)
        assert described(fy) == described(y)
        assert described(fdx) == described(dx)
        assert described(drop(mode.from_tensor(x), seed=3, noise_shape=noise_shape, store=store)) == described(y)


@pytest.mark.parametrize("seed", [None, 3], ids=["drawn", "given"])
def test_fake_tensors_outside_of_their_mode(x, seed):
    fake = FakeTensorMode().from_tensor(x)
    assert described(drop(fake, seed=seed)) == described(x)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("store", STORES)
def test_meta_tensors_have_the_shape_of_real_ones(sample, store):
    x, noise_shape = SAMPLES[sample]()
    real = drop(x, noise_shape=noise_shape)
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta", requires_grad=True)
    y = drop(meta, noise_shape=noise_shape, store=store)
    assert described(y) == (*described(real)[:3], "meta")
    y.backward(torch.ones_like(y))
    assert meta.grad.shape == x.shape


# ---- tracers ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("store", STORES)
def test_make_fx_equals_eager(x, tracing_mode, store):
    def function(x):
        y = drop(x, store=store)
        (dx,) = torch.autograd.grad(y.sin().sum(), x)
        return y, dx

    graph = make_fx(function, tracing_mode=tracing_mode)(x.clone().requires_grad_())
    for seed in range(3):
        z = x.clone().requires_grad_()
        ours, eager = under(seed, graph, z), under(seed, function, z)
        assert_equal(tuple(t.detach() for t in ours), tuple(t.detach() for t in eager))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_of_evaluation_has_no_dropout(x):
    net = network("bits").eval()
    traced = torch.jit.trace(net, x)
    assert_equal(traced(x), net(x))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any("drop" in kind for kind in kinds)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", STORES)
def test_jit_trace_of_training_draws_anew(x, store):
    net = network(store)
    traced = torch.jit.trace(net, x, check_trace=False)
    for seed in range(3):
        assert_equal(under(seed, gradient, traced, x), under(seed, gradient, net, x))
    assert not torch.equal(traced(x), traced(x))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_of_training_can_be_saved(x):
    traced = torch.jit.trace(drop, (x,), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert_equal(under(1, torch.jit.load(file), x), under(1, drop, x))


# ---- modes and subclasses ----


@pytest.mark.parametrize("store", STORES)
def test_dispatch_mode_sees_the_ops_and_changes_nothing(x, store):
    with Log() as log:
        ours = under(3, gradient, lambda x: drop(x, store=store), x)
    assert "fastdrop.forward.default" in log.seen
    assert ("fastdrop.backward.default" in log.seen) == (store == "bits")
    assert_equal(ours, under(3, gradient, drop, x))


def test_dispatch_mode_in_place(x):
    own = x.clone()
    with Log() as log:
        ours = under(3, lambda: drop(own, inplace=True))
    assert ours is own
    assert "fastdrop.forward.default" in log.seen
    assert_equal(own, under(3, drop, x))


def test_function_mode_sees_dropout_with_its_arguments(x):
    with LogFunctions() as log:
        ours = under(3, lambda: drop(x, 0.3, store="seed", noise_shape=(1, None)))
        also = under(4, fdt.Dropout(0.3), x)
        given = drop(x, 0.3, seed=2)
    assert log.seen.count(fdt.dropout) == 3
    assert_equal(ours, under(3, lambda: drop(x, 0.3, noise_shape=(1, None))))
    assert_equal(also, under(4, drop, x, 0.3))
    assert_equal(given, drop(x, 0.3, seed=2))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("store", STORES)
def test_default_device_is_without_effect(x, device, store):
    with torch.device(device):
        ours = under(3, gradient, lambda x: drop(x, store=store), x)
        seeded = drop(x, seed=3, store=store)
        mapped = under(3, vmap(drop, randomness="different"), x)
    assert_equal(ours, under(3, gradient, drop, x))
    assert_equal(seeded, drop(x, seed=3))
    assert_equal(mapped, under(3, lambda: torch.stack([drop(sample) for sample in x])))


def test_default_dtype_is_without_effect(x):
    expected = drop(x, seed=3), under(3, drop, x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_equal((drop(x, seed=3), under(3, drop, x)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("store", STORES)
def test_function_subclass(x, store):
    Named.seen = []
    ours = x.clone().as_subclass(Named).requires_grad_()
    y = under(3, lambda: drop(ours, store=store))
    assert type(y) is Named
    assert fdt.dropout in Named.seen
    y.sin().sum().backward()
    expected = under(3, gradient, drop, x)
    assert_equal((y.detach().as_subclass(torch.Tensor), ours.grad.as_subclass(torch.Tensor)), expected)
    own = x.clone().as_subclass(Named)
    assert under(3, lambda: drop(own, inplace=True)) is own
    assert_equal(own.as_subclass(torch.Tensor), expected[0])


@pytest.mark.parametrize("store", STORES)
def test_dispatch_subclass(x, store):
    ours = Wrapped(x.clone()).requires_grad_()
    y = under(3, lambda: drop(ours, store=store))
    assert type(y) is Wrapped
    y.sin().sum().backward()
    assert type(ours.grad) is Wrapped
    assert_equal((y.inner, ours.grad.inner), under(3, gradient, drop, x))


@pytest.mark.parametrize("store", STORES)
def test_parameters_are_plain_tensors(x, store):
    ours = nn.Parameter(x.clone())
    y = under(3, lambda: drop(ours, store=store))
    y.sin().sum().backward()
    assert_equal((y.detach(), ours.grad), under(3, gradient, drop, x))

"""Derivatives of every kind of dropout, and its behaviour under transforms, modes, tracers and subclasses."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

import fastdrop as fd

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..cases import DISTINCT, Kind, Log, LogFunctions, Named, Wrapped, assert_equal, gradient, numbers_drawn, under

# torch's own, when it first loads what forward-mode AD needs
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def torch_state():
    with torch.random.fork_rng():
        yield


@pytest.fixture(params=DISTINCT)
def way(request) -> Kind:
    return DISTINCT[request.param]


@pytest.fixture
def x(way):
    return torch.randn(way.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seed_that_drops(way, p):
    """A seed under which something is dropped and something kept, or, of a mask of one cell, all is kept."""
    for seed in range(20):
        _, mask = way.numpy(np.zeros(way.shape), p, rng=seed)
        if way.law == "gaussian" or 0 < mask.kept < math.prod(way.cells) or math.prod(way.cells) == mask.kept == 1:
            return seed
    raise AssertionError("no such seed")


def reference(way, x, p, seed):
    """By torch's own differentiable ops: every way is an affine of each element, which NumPy gives."""
    shift, mask = way.numpy(np.zeros(way.shape), p, rng=seed)
    slope = fd.dropout_backward(np.ones(way.shape), mask)
    return x * torch.from_numpy(slope) + torch.from_numpy(shift)


def part(way):
    """So small a piece of a way's shape that finite differences take little time."""
    least = 4 if way.law == "blocks" else 3
    shape = [min(extent, least) for extent in way.shape]
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


# ---- derivatives against finite differences ----


def test_derivatives_match_finite_differences(way):
    """Reverse, forward, batched, and of second order."""

    def function(x):
        return way.torch(x, 0.4, seed=1)

    assert torch.autograd.gradcheck(
        function, part(way), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(lambda x: function(x) ** 3, part(way), check_fwd_over_rev=True)


@pytest.mark.parametrize("name", [name for name, way in DISTINCT.items() if way.in_place])
def test_derivatives_in_place_match_finite_differences(name):
    way = DISTINCT[name]
    arguments = (lambda x: way.torch(x * 2, 0.4, seed=1, inplace=True), part(way))
    assert torch.autograd.gradcheck(*arguments, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(*arguments, check_fwd_over_rev=True)


def test_gradient_is_exactly_0_where_dropped(way, x):
    for p in way.p:
        z = x.clone().requires_grad_()
        seed = 3 if p == 1.0 else seed_that_drops(way, p)
        y = way.torch(z, p, seed=seed)
        y.backward(torch.full_like(x, math.inf))
        dropped = reference(way, torch.ones_like(x), p, seed) == reference(way, torch.zeros_like(x), p, seed)
        assert dropped.any() or way.law == "gaussian" or math.prod(way.cells) == 1
        assert_equal(z.grad[dropped], torch.zeros_like(z.grad[dropped]))
        assert z.grad[~dropped].isinf().all()


def test_used_twice_and_again(way, x):
    """One output in two losses, one input in two dropouts, one graph run twice."""
    seed = seed_that_drops(way, 0.4)
    z, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, again = way.torch(z, 0.4, seed=seed), way.torch(z, 0.4, seed=seed + 1)
    loss = (y.sin() + y * again).sum()
    loss.backward(retain_graph=True)
    once = z.grad.clone()
    loss.backward()
    assert_equal(z.grad, 2 * once)
    y, again = reference(way, expected, 0.4, seed), reference(way, expected, 0.4, seed + 1)
    (y.sin() + y * again).sum().backward()
    torch.testing.assert_close(once, expected.grad)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


def test_gradient_penalty(way, x):
    """A loss of a gradient: backward under create_graph."""
    results = []
    for drop in (lambda x: way.torch(x, 0.4, seed=1), lambda x: reference(way, x, 0.4, 1)):
        z = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(drop(z.sin()).pow(2).sum(), z, create_graph=True)
        results.append(torch.autograd.grad(dx.pow(2).sum(), z)[0])
    torch.testing.assert_close(*results)


# ---- torch.func ----

TRANSFORMS = {
    "grad": lambda f, x: grad(lambda x: f(x).sin().sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](x.cos())[0],
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "jvp of grad": lambda f, x: jvp(grad(lambda x: f(x).sin().sum()), (x,), (x.cos(),)),
    "grad of grad": lambda f, x: grad(lambda x: grad(lambda x: f(x).sin().sum())(x).pow(2).sum())(x),
    "jacrev": lambda f, x: jacrev(lambda x: f(x).sum(-1))(x),
    "jacfwd": lambda f, x: jacfwd(lambda t: f(x * t))(torch.ones(3, dtype=x.dtype).mean()),
    "hessian": lambda f, x: hessian(lambda t: f(x * t).pow(3).sum())(torch.ones((), dtype=x.dtype)),
    "functionalize": lambda f, x: functionalize(f)(x),
}


def test_transforms_equal_those_of_torchs_own_ops(way, x):
    """Without a seed they draw the mask that eager code draws."""
    seed = seed_that_drops(way, 0.4)
    drawn = int(under(9, lambda: torch.empty((), dtype=torch.int64).random_()))
    for name, transform in TRANSFORMS.items():
        expected = transform(lambda x: reference(way, x, 0.4, seed), x)
        torch.testing.assert_close(transform(lambda x: way.torch(x, 0.4, seed=seed), x), expected, msg=name)
        if name in ("grad", "vjp", "jvp", "jvp of grad", "functionalize"):
            expected = transform(lambda x: reference(way, x, 0.4, drawn), x)
            torch.testing.assert_close(under(9, transform, lambda x: way.torch(x, 0.4), x), expected, msg=name)


def test_dual_numbers(way, x):
    seed = seed_that_drops(way, 0.4)
    shift = reference(way, torch.zeros_like(x), 0.4, seed)
    for options in way.in_places:
        with fwAD.dual_level():
            dual = fwAD.make_dual(x.clone(), x.cos())
            y = way.torch(dual, 0.4, seed=seed, **options)
            assert (y is dual) == bool(options)
            primal, tangent = fwAD.unpack_dual(y)
        torch.testing.assert_close(primal, reference(way, x, 0.4, seed))
        torch.testing.assert_close(tangent, reference(way, x.cos(), 0.4, seed) - shift)


# ---- vmap ----


def stacked(x):
    """Samples of a way's shape."""
    return torch.stack([x, x.cos(), x.sin()])


def loop(function, *arguments):
    """What a map is to give."""
    return torch.stack([function(*sample) for sample in zip(*arguments, strict=True)])


@pytest.fixture
def drop(way):
    return functools.partial(way.torch, p=0.4)


def test_vmap_different_equals_the_loop(drop, x):
    ours = under(3, gradient, vmap(drop, randomness="different"), stacked(x))
    assert_equal(ours, under(3, gradient, functools.partial(loop, drop), stacked(x)))


def test_vmap_same_is_one_mask_for_all_samples(drop, x):
    seed = int(under(3, lambda: torch.empty((), dtype=torch.int64).random_()))
    given = functools.partial(drop, seed=seed)
    ours = under(3, gradient, vmap(drop, randomness="same"), stacked(x))
    assert_equal(ours, gradient(functools.partial(loop, given), stacked(x)))
    assert_equal(vmap(given)(stacked(x)), ours[0])


def test_vmap_error_has_torchs_text(drop, x):
    with pytest.raises(RuntimeError) as theirs:
        vmap(torch.rand_like)(x)
    with pytest.raises(RuntimeError) as ours:
        vmap(drop)(stacked(x))
    assert str(ours.value) == str(theirs.value)


def test_vmap_over_seeds_equals_the_loop(drop, x):
    seeds = torch.tensor([5, -3, 2**40])
    of_both = lambda x, seed: drop(x, seed=seed)  # noqa: E731
    assert_equal(vmap(of_both)(stacked(x), seeds), loop(of_both, stacked(x), seeds))
    of_seeds = lambda seed: drop(x, seed=seed)  # noqa: E731
    assert_equal(vmap(of_seeds)(seeds), loop(of_seeds, seeds))


def test_vmap_over_the_last_axis_nested_and_of_nothing(drop, x):
    samples = stacked(x)
    each = vmap(drop, randomness="different")
    last = under(3, vmap(drop, randomness="different", in_dims=-1, out_dims=-1), samples.movedim(0, -1))
    assert_equal(last.movedim(-1, 0), under(3, loop, drop, samples))
    nested = under(3, vmap(each, randomness="different"), torch.stack([samples, samples]))
    assert_equal(nested.flatten(0, 1), under(3, loop, drop, torch.cat([samples, samples])))
    for randomness in ("same", "different"):
        assert vmap(drop, randomness=randomness)(samples[:0]).shape == (0, *x.shape)


def test_vmap_over_p_is_refused(way, x):
    with pytest.raises((RuntimeError, ValueError)):
        vmap(lambda x, p: way.torch(x, p, seed=0))(stacked(x), torch.full((3,), 0.5))


def test_vmap_of_grad_equals_the_loop(drop, x):
    gradient_of = grad(lambda x: drop(x).sin().sum())
    ours = under(5, vmap(gradient_of, randomness="different"), stacked(x))
    assert_equal(ours, under(5, loop, gradient_of, stacked(x)))


# ---- around it ----


def test_checkpoint_draws_the_same_mask_again(drop, x):
    """And leaves the generator where it would be without a checkpoint."""

    def block(x):
        return drop(drop(x.sin()) * x)

    for reentrant in (False, True):

        def run():
            return gradient(lambda x: checkpoint(block, x, use_reentrant=reentrant), x)  # noqa: B023

        assert_equal(under(5, run), under(5, gradient, block, x))
        assert numbers_drawn(run) == 2


def test_autocast_keeps_the_dtype(way, x):
    weight = torch.randn(way.shape[-1], way.shape[-1], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = x.float() @ weight
        y = way.torch(hidden, 0.4, seed=1)
        assert way.torch(x.float(), 0.4, seed=1).dtype is torch.float32
    assert y.dtype is hidden.dtype is torch.bfloat16
    assert_equal(y, way.torch(hidden, 0.4, seed=1))
    y.sum().backward()
    assert weight.grad.dtype is torch.float32


def test_inference_mode_and_no_grad_give_the_same_numbers(way, x):
    expected = way.torch(x.clone().requires_grad_(), 0.4, seed=3).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = way.torch(x.requires_grad_(), 0.4, seed=3)
            assert not y.requires_grad
            assert_equal(y.clone(), expected)


def test_deterministic_algorithms_are_no_matter(way, x):
    """torch then fills new memory with NaN: none may be left over."""
    expected = gradient(lambda x: way.torch(x, 0.4, seed=3), x)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(gradient(lambda x: way.torch(x, 0.4, seed=3), x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_default_device_and_dtype_are_without_effect(drop, x):
    expected = under(3, gradient, drop, x), drop(x, seed=3)
    with torch.device("meta"):
        assert_equal((under(3, gradient, drop, x), drop(x, seed=3)), expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_equal((under(3, gradient, drop, x), drop(x, seed=3)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- modes and subclasses ----


def function_of(way):
    return way.torch.func if isinstance(way.torch, functools.partial) else way.torch


def test_function_subclass_keeps_its_type(way, drop, x):
    Named.seen = []
    ours, expected = x.clone().as_subclass(Named).requires_grad_(), under(3, gradient, drop, x)
    y = under(3, drop, ours)
    assert type(y) is Named
    assert function_of(way) in Named.seen
    y.sin().sum().backward()
    assert_equal((y.detach().as_subclass(torch.Tensor), ours.grad.as_subclass(torch.Tensor)), expected)
    if way.in_place:
        own = x.clone().as_subclass(Named)
        assert under(3, drop, own, inplace=True) is own
        assert_equal(own.as_subclass(torch.Tensor), expected[0])


def test_function_subclass_is_found_by_keyword():
    Named.seen = []
    x = torch.ones(2, 3, 4).as_subclass(Named)
    assert type(fdt.dropout1d(p=0.5, input=x)) is Named
    assert fdt.dropout1d in Named.seen


def test_function_mode_sees_the_call(way, drop, x):
    with LogFunctions() as log:
        ours = under(3, drop, x)
    assert function_of(way) in log.seen
    assert_equal(ours, under(3, drop, x))


def test_dispatch_subclass_keeps_its_type(drop, x):
    ours = Wrapped(x.clone()).requires_grad_()
    y = under(3, drop, ours)
    y.sin().sum().backward()
    assert type(y) is type(ours.grad) is Wrapped
    assert_equal((y.inner, ours.grad.inner), under(3, gradient, drop, x))


def test_dispatch_mode_sees_the_ops_and_changes_nothing(way, drop, x):
    names = {"gaussian": {"gaussian"}, "blocks": {"draw_blocks", "keep_blocks"}}.get(way.law, {"forward"})
    with Log() as log:
        ours = under(3, gradient, drop, x)
    assert {f"fastdrop.{name}.default" for name in {"draw", *names}} <= set(log.seen)
    assert_equal(ours, under(3, gradient, drop, x))


def test_parameters_are_plain_tensors(drop, x):
    ours = torch.nn.Parameter(x.clone())
    y = under(3, drop, ours)
    assert type(y) is torch.Tensor
    y.sin().sum().backward()
    assert_equal((y.detach(), ours.grad), under(3, gradient, drop, x))


# ---- without memory, and traced ----


def described(x):
    return x.shape, x.stride(), x.dtype, x.device.type


def test_fake_and_meta_tensors_have_the_shape_of_real_ones(drop, x):
    for real in (x.clone(), x.mT.contiguous().mT, x.float(), x[:0], x[..., ::2]):
        assert_fake_is_like(drop, real)


def assert_fake_is_like(drop, real):
    y, dx = with_gradient(drop, real)
    with FakeTensorMode() as mode:
        fakes = with_gradient(drop, mode.from_tensor(real))
        assert [described(fake) for fake in fakes] == [described(y), described(dx)]
        assert described(drop(mode.from_tensor(real), seed=3)) == described(y)
    assert described(drop(FakeTensorMode().from_tensor(real), seed=3)) == described(y)
    metas = with_gradient(drop, torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta"))
    assert [described(meta) for meta in metas] == [(*described(t)[:3], "meta") for t in (y, dx)]


def with_gradient(function, x):
    x.requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_equals_eager(drop, x, tracing_mode):
    def function(x):
        y = drop(x)
        return y, torch.autograd.grad(y.sin().sum(), x)[0]

    graph = make_fx(function, tracing_mode=tracing_mode)(x.clone().requires_grad_())
    for seed in range(2):
        z = x.clone().requires_grad_()
        ours, eager = under(seed, graph, z), under(seed, function, z)
        assert_equal(tuple(t.detach() for t in ours), tuple(t.detach() for t in eager))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_draws_anew(drop, x):
    traced = torch.jit.trace(lambda x: drop(x), (x,), check_trace=False)
    for seed in range(2):
        assert_equal(under(seed, gradient, traced, x), under(seed, gradient, drop, x))

"""Derivatives of every kind of dropout, and its behaviour under transforms, modes, tracers and subclasses."""

from __future__ import annotations

import contextlib
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


@pytest.fixture(params=DISTINCT)
def way(request) -> Kind:
    return DISTINCT[request.param]


@pytest.fixture
def drop(way):
    return functools.partial(way.torch, p=0.4)


@pytest.fixture
def x(way):
    return torch.randn(way.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seed_that_drops(way, p):
    """A seed under which something is dropped and something kept, or, of a mask of one cell, all is kept."""
    for seed in range(20):
        _, mask = way.numpy(np.zeros(way.shape), p, rng=seed)
        if way.scaling == "gaussian" or 0 < mask.kept < math.prod(way.cells) or math.prod(way.cells) == mask.kept == 1:
            return seed
    raise AssertionError("no such seed")


def reference(way, x, p, seed):
    """By torch's own differentiable ops: every way is an affine of each element, which NumPy gives."""
    shift, mask = way.numpy(np.zeros(way.shape), p, rng=seed)
    slope = fd.dropout_backward(np.ones(way.shape), mask)
    return x * torch.from_numpy(slope) + torch.from_numpy(shift)


# ---- derivatives ----


def test_derivatives_match_finite_differences(way):
    """Reverse, forward, batched, and of second order. Of a small piece, because each element takes a call."""

    def function(x):
        return way.torch(x, 0.4, seed=1)

    shape = [min(extent, 3 if way.scaling == "blocks" else 2) for extent in way.shape]
    part = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(
        function, part, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(lambda x: function(x) ** 3, part, check_fwd_over_rev=True, fast_mode=True)


def test_graph_is_as_any_other_of_torchs(way, x):
    """Hooks on it, backward again if it is retained and not otherwise, and second derivatives, in place too."""
    seed = seed_that_drops(way, 0.4)
    ways = [functools.partial(way.torch, seed=seed, **more) for more in way.in_places]
    found = []
    for drop in (lambda x, p: reference(way, x, p, seed), *ways):
        z, seen = x.clone().requires_grad_(), []
        y = drop(z * 1, 0.4)
        y.retain_grad()
        y.register_hook(lambda dy: dy * 3)
        y.grad_fn.register_prehook(lambda dy: seen.append("before"))  # noqa: B023
        y.grad_fn.register_hook(lambda dx, dy: seen.append("after"))  # noqa: B023
        loss = y.sin().sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        assert seen == ["before", "after"] * 2
        (dx,) = torch.autograd.grad(loss, z, create_graph=True)
        (again,) = torch.autograd.grad(dx.pow(2).sum(), z)
        found.append((z.grad, y.grad, dx.detach(), again))
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            loss.backward()
    for ours in found[1:]:
        torch.testing.assert_close(ours, found[0])


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
        if name in ("jvp of grad", "functionalize"):
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


def test_vmap_different_equals_the_loop(drop, x):
    """Over any axis, nested, and over no samples."""
    each, samples = vmap(drop, randomness="different"), stacked(x)
    expected = under(3, gradient, functools.partial(loop, drop), samples)
    assert_equal(under(3, gradient, each, samples), expected)
    last = under(3, vmap(drop, randomness="different", in_dims=-1, out_dims=-1), samples.movedim(0, -1))
    assert_equal(last.movedim(-1, 0), expected[0])
    nested = under(3, vmap(each, randomness="different"), torch.stack([samples, samples]))
    assert_equal(nested.flatten(0, 1), under(3, loop, drop, torch.cat([samples, samples])))
    assert each(samples[:0]).shape == vmap(drop, randomness="same")(samples[:0]).shape == (0, *x.shape)


def test_vmap_same_is_one_mask_for_all_samples(drop, x):
    seed = int(under(3, lambda: torch.empty((), dtype=torch.int64).random_()))
    given = functools.partial(drop, seed=seed)
    ours = under(3, gradient, vmap(drop, randomness="same"), stacked(x))
    assert_equal(ours, gradient(functools.partial(loop, given), stacked(x)))
    assert_equal(vmap(given)(stacked(x)), ours[0])


def test_vmap_over_seeds_equals_the_loop(drop, x):
    seeds = torch.tensor([5, -3, 2**40])
    of_both = lambda x, seed: drop(x, seed=seed)  # noqa: E731
    assert_equal(vmap(of_both)(stacked(x), seeds), loop(of_both, stacked(x), seeds))
    of_seeds = lambda seed: drop(x, seed=seed)  # noqa: E731
    assert_equal(vmap(of_seeds)(seeds), loop(of_seeds, seeds))


def test_vmap_without_randomness_and_over_p_is_refused(way, drop, x):
    """The former in torch's words."""
    with pytest.raises(RuntimeError) as theirs:
        vmap(torch.rand_like)(x)
    with pytest.raises(RuntimeError) as ours:
        vmap(drop)(stacked(x))
    assert str(ours.value) == str(theirs.value)
    with pytest.raises((RuntimeError, ValueError)):
        vmap(lambda x, p: way.torch(x, p, seed=0))(stacked(x), torch.full((3,), 0.5))


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


@contextlib.contextmanager
def changed(change, value, before):
    change(value)
    try:
        yield
    finally:
        change(before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": lambda: changed(torch.use_deterministic_algorithms, True, False),  # new memory is NaN
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: changed(torch.set_default_dtype, torch.bfloat16, torch.float32),
}


def test_surroundings_change_nothing(drop, x):
    """The dtype neither."""
    for surroundings in SURROUNDINGS.values():
        expected = under(3, gradient, drop, x.float()), drop(x, seed=3)
        with surroundings():
            assert_equal((under(3, gradient, drop, x.float()), drop(x, seed=3)), expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = drop(x.requires_grad_(), seed=3)
            assert not y.requires_grad
            assert_equal(y.clone(), drop(x.detach(), seed=3))


# ---- modes and subclasses ----


def test_function_subclasses_and_modes(way, drop, x):
    """A subclass keeps its type, and both see the call, whichever way it takes."""
    function = way.torch.func if isinstance(way.torch, functools.partial) else way.torch
    Named.seen = []
    ours, expected = x.clone().as_subclass(Named).requires_grad_(), under(3, gradient, drop, x)
    y = under(3, drop, ours)
    assert type(y) is Named
    assert function in Named.seen
    y.sin().sum().backward()
    assert_equal((y.detach().as_subclass(torch.Tensor), ours.grad.as_subclass(torch.Tensor)), expected)
    if way.in_place:
        own = x.clone().as_subclass(Named)
        assert under(3, drop, own, inplace=True) is own
        assert_equal(own.as_subclass(torch.Tensor), expected[0])
    with LogFunctions() as log:
        assert_equal(under(3, drop, x), expected[0])
    assert function in log.seen


def test_function_subclass_is_found_by_keyword():
    Named.seen = []
    x = torch.ones(2, 3, 4).as_subclass(Named)
    for function in (fdt.dropout, fdt.dropout1d):
        assert type(function(p=0.5, input=x)) is Named
        assert function in Named.seen


def test_dispatch_subclasses_and_modes(way, drop, x):
    """A subclass keeps its type; a mode sees the ops. A parameter is a plain tensor."""
    expected = under(3, gradient, drop, x)
    for ours in (Wrapped(x.clone()).requires_grad_(), torch.nn.Parameter(x.clone())):
        y = under(3, drop, ours)
        assert type(y) is (Wrapped if type(ours) is Wrapped else torch.Tensor)
        y.sin().sum().backward()
        assert type(ours.grad) is type(y)
        assert_equal(tuple(t.inner if type(t) is Wrapped else t.detach() for t in (y, ours.grad)), expected)
    names = {"gaussian": {"gaussian"}, "blocks": {"draw_blocks", "keep_blocks"}}.get(way.scaling, {"forward"})
    with Log() as log:
        assert_equal(under(3, gradient, drop, x), expected)
    assert {f"fastdrop.{name}.default" for name in {"draw", *names}} <= set(log.seen)


# ---- without memory, and traced ----


def described(tensors):
    return [(t.shape, t.stride(), t.dtype, t.device.type) for t in tensors]


def with_gradient(function, x):
    x.requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]


def test_fake_and_meta_tensors_have_the_shape_of_real_ones(drop, x):
    for real in (x.mT.contiguous().mT, x.float(), x[:0], x[..., ::2]):
        expected = described(with_gradient(drop, real))
        with FakeTensorMode() as mode:
            assert described(with_gradient(drop, mode.from_tensor(real))) == expected
        assert described([drop(FakeTensorMode().from_tensor(real), seed=3)]) == expected[:1]
        meta = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta")
        assert described(with_gradient(drop, meta)) == [(*rest, "meta") for *rest, _ in expected]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
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

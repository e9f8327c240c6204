"""Derivatives of every kind of dropout, and transforms, modes, tracers and subclasses around it."""

from __future__ import annotations

import math

import numpy as np
import pytest

import fastdrop as fd

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastdrop.torch as fdt  # noqa: E402

from .torch_cases import (  # noqa: E402
    KINDS,
    Kind,
    Log,
    LogFunctions,
    Named,
    Wrapped,
    assert_equal,
    gradient,
    numbers_drawn,
    under,
)

# torch's own, when it first loads what forward-mode AD needs
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

OPS = torch.ops.fastdrop


@pytest.fixture(autouse=True)
def torch_state():
    with torch.random.fork_rng():
        yield


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def x(kind):
    return torch.randn(kind.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seed_that_drops(kind, p):
    """A seed under which something is dropped and something kept, or, of a mask of one cell, all is kept."""
    for seed in range(20):
        _, mask = kind.numpy(np.zeros(kind.shape), p, rng=seed)
        if kind.law == "gaussian" or 0 < mask.kept < math.prod(kind.cells) or math.prod(kind.cells) == mask.kept == 1:
            return seed
    raise AssertionError("no such seed")


def reference(kind, x, p, seed):
    """By torch's own differentiable ops: every kind is an affine of each element, which NumPy gives."""
    shift, mask = kind.numpy(np.zeros(kind.shape), p, rng=seed)
    slope = fd.dropout_backward(np.ones(kind.shape), mask)
    return x * torch.from_numpy(slope) + torch.from_numpy(shift)


def part(kind):
    """So small a piece of a kind's shape that finite differences take little time."""
    least = 4 if kind.law == "blocks" else 3
    shape = [min(extent, least) for extent in kind.shape]
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


# ---- derivatives against finite differences ----


def test_derivatives_match_finite_differences(kind):
    """Reverse, forward, batched, and of second order."""
    for options in kind.options:
        for seed in range(2):

            def function(x, seed=seed, options=options):
                return kind.torch(x, 0.4, seed=seed, **options)

            assert torch.autograd.gradcheck(
                function, part(kind), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
            )
            assert torch.autograd.gradgradcheck(lambda x, f=function: f(x) ** 3, part(kind), check_fwd_over_rev=True)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.in_place])
def test_derivatives_in_place_match_finite_differences(name):
    kind = KINDS[name]
    for options in kind.options:
        arguments = (lambda x, o=options: kind.torch(x * 2, 0.4, seed=1, inplace=True, **o), part(kind))
        assert torch.autograd.gradcheck(*arguments, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(*arguments, check_fwd_over_rev=True)


def test_gradient_is_exactly_0_where_dropped(kind, x):
    for p, options in ((p, options) for p in kind.p for options in kind.options):
        z = x.clone().requires_grad_()
        seed = 3 if p == 1.0 else seed_that_drops(kind, p)
        y = kind.torch(z, p, seed=seed, **options)
        y.backward(torch.full_like(x, math.inf))
        dropped = reference(kind, torch.ones_like(x), p, seed) == reference(kind, torch.zeros_like(x), p, seed)
        assert dropped.any() or kind.law == "gaussian" or math.prod(kind.cells) == 1
        assert_equal(z.grad[dropped], torch.zeros_like(z.grad[dropped]))
        assert z.grad[~dropped].isinf().all()


def test_used_twice_and_again(kind, x):
    """One output in two losses, one input in two dropouts, one graph run twice."""
    for options in kind.options:
        z = x.clone().requires_grad_()
        seed = seed_that_drops(kind, 0.4)
        y = kind.torch(z, 0.4, seed=seed, **options)
        again = kind.torch(z, 0.4, seed=seed + 1, **options)
        loss = (y.sin() + y * again).sum()
        loss.backward(retain_graph=True)
        once = z.grad.clone()
        loss.backward()
        assert_equal(z.grad, 2 * once)
        expected = x.clone().requires_grad_()
        y, again = reference(kind, expected, 0.4, seed), reference(kind, expected, 0.4, seed + 1)
        (y.sin() + y * again).sum().backward()
        torch.testing.assert_close(once, expected.grad)
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            loss.backward()


def test_gradient_penalty(kind, x):
    """A loss of a gradient: backward under create_graph."""
    for options in kind.options:
        results = []
        for drop in (lambda x, o=options: kind.torch(x, 0.4, seed=1, **o), lambda x: reference(kind, x, 0.4, 1)):
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


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_equals_that_of_torchs_own_ops(kind, x, transform):
    seed = seed_that_drops(kind, 0.4)
    expected = TRANSFORMS[transform](lambda x: reference(kind, x, 0.4, seed), x)
    for options in kind.options:
        ours = TRANSFORMS[transform](lambda x, o=options: kind.torch(x, 0.4, seed=seed, **o), x)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jvp of grad", "functionalize"])
def test_transform_draws_the_mask_that_eager_draws(kind, x, transform):
    seed = int(under(9, lambda: torch.empty((), dtype=torch.int64).random_()))
    expected = TRANSFORMS[transform](lambda x: reference(kind, x, 0.4, seed), x)
    torch.testing.assert_close(under(9, TRANSFORMS[transform], lambda x: kind.torch(x, 0.4), x), expected)


def test_dual_numbers(kind, x):
    seed = seed_that_drops(kind, 0.4)
    shift = reference(kind, torch.zeros_like(x), 0.4, seed)
    for options in kind.options:
        for inplace in {False, kind.in_place}:
            given = {"inplace": True, **options} if inplace else options
            with fwAD.dual_level():
                dual = fwAD.make_dual(x.clone(), x.cos())
                y = kind.torch(dual, 0.4, seed=seed, **given)
                assert (y is dual) == inplace
                primal, tangent = fwAD.unpack_dual(y)
            torch.testing.assert_close(primal, reference(kind, x, 0.4, seed))
            torch.testing.assert_close(tangent, reference(kind, x.cos(), 0.4, seed) - shift)


# ---- vmap ----


def stacked(x):
    """Samples of a kind's shape."""
    return torch.stack([x, x.cos(), x.sin()])


def test_vmap_different_equals_the_loop(kind, x):
    for options in kind.options:
        drop = lambda x, o=options: kind.torch(x, 0.4, **o)  # noqa: E731
        samples = stacked(x)
        ours = under(3, gradient, vmap(drop, randomness="different"), samples)
        assert_equal(ours, under(3, gradient, lambda x, d=drop: torch.stack([d(sample) for sample in x]), samples))


def test_vmap_same_is_one_mask_for_all_samples(kind, x):
    seed = int(under(3, lambda: torch.empty((), dtype=torch.int64).random_()))
    for options in kind.options:
        ours = under(3, gradient, vmap(lambda x, o=options: kind.torch(x, 0.4, **o), randomness="same"), stacked(x))
        loop = lambda x, o=options: torch.stack([kind.torch(sample, 0.4, seed=seed, **o) for sample in x])  # noqa: E731
        assert_equal(ours, gradient(loop, stacked(x)))
        assert_equal(vmap(lambda x, o=options: kind.torch(x, 0.4, seed=seed, **o))(stacked(x)), ours[0])


def test_vmap_error_has_torchs_text(kind, x):
    with pytest.raises(RuntimeError) as theirs:
        vmap(torch.rand_like)(x)
    with pytest.raises(RuntimeError) as ours:
        vmap(lambda x: kind.torch(x, 0.4))(stacked(x))
    assert str(ours.value) == str(theirs.value)


def test_vmap_over_seeds_equals_the_loop(kind, x):
    seeds = torch.tensor([5, -3, 2**40])
    for options in kind.options:
        drop = lambda x, seed, o=options: kind.torch(x, 0.4, seed=seed, **o)  # noqa: E731
        loop = torch.stack([drop(sample, seed) for sample, seed in zip(stacked(x), seeds, strict=True)])
        assert_equal(vmap(drop)(stacked(x), seeds), loop)
        one = torch.stack([drop(x, seed) for seed in seeds])
        assert_equal(vmap(lambda seed, d=drop: d(x, seed))(seeds), one)


def test_vmap_over_the_last_axis_nested_and_of_nothing(kind, x):
    samples = stacked(x)
    drop = lambda x: kind.torch(x, 0.4)  # noqa: E731
    last = under(3, vmap(drop, randomness="different", in_dims=-1, out_dims=-1), samples.movedim(0, -1))
    assert_equal(last, under(3, lambda: torch.stack([drop(sample) for sample in samples], -1)))
    nested = under(3, vmap(vmap(drop, randomness="different"), randomness="different"), torch.stack([samples, samples]))
    assert_equal(nested[0], under(3, lambda: torch.stack([drop(sample) for sample in samples])))
    for randomness in ("same", "different"):
        none = vmap(drop, randomness=randomness)(samples[:0])
        assert none.shape == (0, *kind.shape)


def test_vmap_over_p_is_refused(kind, x):
    with pytest.raises((RuntimeError, ValueError)):
        vmap(lambda x, p: kind.torch(x, p, seed=0))(stacked(x), torch.full((3,), 0.5))


def test_vmap_of_grad_equals_the_loop(kind, x):
    for options in kind.options:
        loss = lambda x, o=options: kind.torch(x, 0.4, **o).sin().sum()  # noqa: E731
        ours = under(5, vmap(grad(loss), randomness="different"), stacked(x))
        assert_equal(ours, under(5, lambda f=loss: torch.stack([grad(f)(sample) for sample in stacked(x)])))


# ---- around it ----


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpoint_draws_the_same_mask_again(kind, x, reentrant):
    for options in kind.options:

        def block(x, options=options):
            return kind.torch(kind.torch(x.sin(), 0.4, **options) * x, 0.2, **options)

        expected = under(5, gradient, block, x)
        run = lambda f=block: gradient(lambda x: checkpoint(f, x, use_reentrant=reentrant), x)  # noqa: E731
        assert_equal(under(5, run), expected)
        assert numbers_drawn(run) == 2


def test_autocast_keeps_the_dtype(kind, x):
    weight = torch.randn(kind.shape[-1], kind.shape[-1], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = x.float() @ weight
        y = kind.torch(hidden, 0.4, seed=1)
        assert kind.torch(x.float(), 0.4, seed=1).dtype is torch.float32
    assert y.dtype is hidden.dtype is torch.bfloat16
    assert_equal(y, kind.torch(hidden, 0.4, seed=1))
    y.sum().backward()
    assert weight.grad.dtype is torch.float32


def test_inference_mode_and_no_grad_give_the_same_numbers(kind, x):
    expected = kind.torch(x.clone().requires_grad_(), 0.4, seed=3).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = kind.torch(x.requires_grad_(), 0.4, seed=3)
            assert not y.requires_grad
            assert_equal(y.clone(), expected)


def test_deterministic_algorithms_are_no_matter(kind, x):
    """torch then fills new memory with NaN: none may be left over."""
    expected = gradient(lambda x: kind.torch(x, 0.4, seed=3), x)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(gradient(lambda x: kind.torch(x, 0.4, seed=3), x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_device_is_without_effect(kind, x, device):
    expected = under(3, gradient, lambda x: kind.torch(x, 0.4), x), kind.torch(x, 0.4, seed=3)
    for options in kind.options:
        with torch.device(device):
            ours = under(3, gradient, lambda x, o=options: kind.torch(x, 0.4, **o), x)
            assert_equal((ours, kind.torch(x, 0.4, seed=3, **options)), expected)


# ---- modes and subclasses ----


def test_function_subclass_keeps_its_type(kind, x):
    for options in kind.options:
        Named.seen = []
        ours = x.clone().as_subclass(Named).requires_grad_()
        y = under(3, lambda x=ours, o=options: kind.torch(x, 0.4, **o))
        assert type(y) is Named
        assert getattr(kind.torch, "func", kind.torch) in Named.seen
        y.sin().sum().backward()
        expected = under(3, gradient, lambda x: kind.torch(x, 0.4), x)
        assert_equal((y.detach().as_subclass(torch.Tensor), ours.grad.as_subclass(torch.Tensor)), expected)
        if kind.in_place:
            own = x.clone().as_subclass(Named)
            assert under(3, lambda own=own, o=options: kind.torch(own, 0.4, inplace=True, **o)) is own
            assert_equal(own.as_subclass(torch.Tensor), expected[0])


def test_function_subclass_is_found_by_keyword():
    Named.seen = []
    x = torch.ones(2, 3, 4).as_subclass(Named)
    assert type(fdt.dropout1d(p=0.5, input=x)) is Named
    assert fdt.dropout1d in Named.seen


def test_function_mode_sees_the_call(kind, x):
    with LogFunctions() as log:
        ours = under(3, lambda: kind.torch(x, 0.4))
    assert getattr(kind.torch, "func", kind.torch) in log.seen
    assert_equal(ours, under(3, lambda: kind.torch(x, 0.4)))


def test_dispatch_subclass_keeps_its_type(kind, x):
    for options in kind.options:
        ours = Wrapped(x.clone()).requires_grad_()
        y = under(3, lambda x=ours, o=options: kind.torch(x, 0.4, **o))
        y.sin().sum().backward()
        assert type(y) is type(ours.grad) is Wrapped
        assert_equal((y.inner, ours.grad.inner), under(3, gradient, lambda x: kind.torch(x, 0.4), x))


def test_dispatch_mode_sees_the_ops_and_changes_nothing(kind, x):
    names = {"gaussian": {"gaussian"}, "blocks": {"draw_blocks", "keep_blocks"}}.get(kind.law, {"forward"})
    for options in kind.options:
        with Log() as log:
            ours = under(3, gradient, lambda x, o=options: kind.torch(x, 0.4, **o), x)
        assert {f"fastdrop.{name}.default" for name in {"draw", *names}} <= set(log.seen)
        assert_equal(ours, under(3, gradient, lambda x, o=options: kind.torch(x, 0.4, **o), x))


def test_parameters_are_plain_tensors(kind, x):
    ours = torch.nn.Parameter(x.clone())
    y = under(3, lambda: kind.torch(ours, 0.4))
    assert type(y) is torch.Tensor
    y.sin().sum().backward()
    assert_equal((y.detach(), ours.grad), under(3, gradient, lambda x: kind.torch(x, 0.4), x))


# ---- without memory, and traced ----


def described(x):
    return x.shape, x.stride(), x.dtype, x.device.type


def test_fake_and_meta_tensors_have_the_shape_of_real_ones(kind, x):
    for options in kind.options:
        for layout in (x.clone(), x.mT.detach(), x.float(), x[:0].detach()):
            real = layout.detach().requires_grad_()
            y = kind.torch(real, 0.4, **options)
            (dx,) = torch.autograd.grad(y, real, torch.ones_like(y))
            with FakeTensorMode() as mode:
                fake = mode.from_tensor(layout).requires_grad_()
                fy = kind.torch(fake, 0.4, **options)
                (fdx,) = torch.autograd.grad(fy, fake, torch.ones_like(fy))
                assert (described(fy), described(fdx)) == (described(y), described(dx))
                assert described(kind.torch(mode.from_tensor(layout), 0.4, seed=3, **options)) == described(y)
            assert described(kind.torch(FakeTensorMode().from_tensor(layout), 0.4, seed=3, **options)) == described(y)
            meta = torch.empty_strided(layout.shape, layout.stride(), dtype=layout.dtype, device="meta")
            my = kind.torch(meta.requires_grad_(), 0.4, **options)
            assert described(my) == (*described(y)[:3], "meta")
            my.backward(torch.ones_like(my))
            assert meta.grad.shape == layout.shape


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_equals_eager(kind, x, tracing_mode):
    for options in kind.options:

        def function(x):
            y = kind.torch(x, 0.4, **options)  # noqa: B023
            (dx,) = torch.autograd.grad(y.sin().sum(), x)
            return y, dx

        graph = make_fx(function, tracing_mode=tracing_mode)(x.clone().requires_grad_())
        for seed in range(2):
            z = x.clone().requires_grad_()
            ours, eager = under(seed, graph, z), under(seed, function, z)
            assert_equal(tuple(t.detach() for t in ours), tuple(t.detach() for t in eager))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_draws_anew(kind, x):
    traced = torch.jit.trace(lambda x: kind.torch(x, 0.4), (x,), check_trace=False)
    for seed in range(2):
        assert_equal(under(seed, gradient, traced, x), under(seed, gradient, lambda x: kind.torch(x, 0.4), x))

"""`lora_linear`: values, gradients, what is kept, compilers, transforms and bad input."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..cases import Named, Wrapped, assert_equal, numbers_drawn, saved_tensors, under, untouched
from ..ops.compiling import compiled, fresh_compiler, graphs

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of many kinds
__all__ = ["fresh_compiler"]  # a fixture of every test here

NAMES = ("x", "weight", "bias", "lora_A", "lora_B")
P, SCALING, SEED = 0.4, 0.7, 3
OPS = torch.ops.fastdrop
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tensors(dtype=torch.float64, leading=(4, 5), width=8, out=6, rank=3, bias=True):
    generator = torch.Generator().manual_seed(1)
    shapes = (*leading, width), (out, width), (out,), (rank, width), (out, rank)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return given if bias else [*given[:2], None, *given[3:]]


def leaves(given, wanted=NAMES):
    return [
        None if x is None else x.detach().requires_grad_(name in wanted) for name, x in zip(NAMES, given, strict=True)
    ]


def ours(*given, p=P, **options):
    return fdt.lora_linear(*given, SCALING, p, **({"seed": SEED} | options))


def formula(x, weight, bias, lora_A, lora_B, p=P, seed=SEED, **options):
    dropped = fdt.dropout(x, p, seed=seed, **options)
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, lora_A), lora_B) * SCALING


def gradients(function, given, wanted=NAMES):
    """The result, and the gradients of a loss of it."""
    given = leaves(given, wanted)
    y = function(*given)
    y.double().sin().sum().backward()
    return y.detach(), [None if x is None else x.grad for x in given]


def assert_near(actual, expected, dtype):
    """Within a few roundings of the largest number."""
    assert actual.dtype is dtype
    bound = 32 * torch.finfo(dtype).eps * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)


def assert_all_near(actual, expected, dtype=torch.float64):
    assert_near(actual[0], expected[0], dtype)
    for a, e in zip(actual[1], expected[1], strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert_near(a, e, dtype)


# ---- values and gradients ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype):
    """Those of the formula in float64 under `dropout`'s mask."""
    for bias, p in ((True, P), (False, P), (True, 1.0), (True, 0.0)):
        given = tensors(dtype, bias=bias)
        expected = gradients(partial(formula, p=p), [x if x is None else x.double() for x in given])
        assert_all_near(gradients(partial(ours, p=p), given), expected, dtype)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_gradients_are_computed_if_they_are_wanted(count):
    """Any of them alone or together, with the same numbers."""
    given = tensors()
    for wanted in itertools.combinations(NAMES, count):
        assert_all_near(gradients(ours, given, wanted), gradients(formula, given, wanted))


def test_no_product_is_computed_for_the_gradient_of_a_frozen_weight():
    x, weight, bias, lora_A, lora_B = leaves(tensors(), ("x", "lora_A", "lora_B"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(x, weight, bias, lora_A, lora_B).sum().backward()
    products = [event for event in profile.events() if event.name == "aten::mm"]
    assert len(products) == 1 + 5  # h of forward; dh, dx by lora_A, dlora_A, h again, dlora_B
    assert weight.grad is None


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0,), (3, 0, 2)], ids=str)
def test_shapes(shape):
    assert_all_near(gradients(ours, tensors(leading=shape)), gradients(formula, tensors(leading=shape)))


def test_no_columns_and_no_rank():
    for sizes in ({"width": 0}, {"out": 0}, {"rank": 0}):
        assert_all_near(gradients(ours, tensors(**sizes)), gradients(formula, tensors(**sizes)))


def test_strides():
    """The mask is that of the logical index, in both passes."""
    given = tensors()
    for x in (given[0].transpose(0, 1), given[0][:, ::2], given[0][:1].expand(4, 5, 8), given[0].permute(2, 1, 0)):
        arguments = [x, *tensors(width=x.shape[-1])[1:]]
        assert_near(ours(*arguments), formula(*arguments), torch.float64)
        for name in NAMES:
            assert_all_near(gradients(ours, arguments, (name,)), gradients(formula, arguments, (name,)))


def test_gradients_of_any_order():
    given = leaves(tensors(leading=(2,), width=4, out=3, rank=2))
    assert torch.autograd.gradcheck(ours, given)
    assert torch.autograd.gradgradcheck(ours, given)


def test_seed_generator_and_random_state():
    given = tensors()
    unseeded = partial(ours, *given, seed=None)
    seed = int(under(5, torch.empty((), dtype=torch.int64).random_).item())
    assert_equal(under(5, unseeded), ours(*given, seed=seed))
    assert_equal(ours(*given, seed=torch.tensor(SEED)), ours(*given))
    assert_equal(unseeded(generator=torch.Generator().manual_seed(5)), ours(*given, seed=seed))
    assert numbers_drawn(unseeded) == 1
    for options in ({"training": False}, {"p": 0.0}):
        assert numbers_drawn(partial(unseeded, **options)) == 0
        assert_equal(unseeded(**options), formula(*given, p=0.0))


def test_p_may_be_a_tensor():
    given = tensors()
    assert_equal(ours(*given, p=torch.tensor(P, dtype=torch.float64)), ours(*given))


def test_dropped_infinities_leave_no_trace():
    """In the gradients of the adapter."""
    given = leaves(tensors())
    dropped = (fdt.dropout(torch.ones(4, 5, 8), P, seed=SEED) == 0).nonzero()[0]
    with torch.no_grad():
        given[0][tuple(dropped)] = torch.inf
    found = torch.autograd.grad(ours(*given).sum(), given[3:])
    assert all(x.isfinite().all() for x in found)


# ---- what is kept ----


def kept_bytes(function, given, without):
    """Of storages, each once, but for those of ``without``."""
    with saved_tensors() as kept:
        result = function(*given)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    del result
    return sum(size for at, size in storages.items() if at not in {x.untyped_storage().data_ptr() for x in without})


def projections(*given):
    """Query, key and value of one x."""
    x, *parameters = given
    return tuple(ours(x, *parameters[i : i + 4], seed=i) for i in (0, 4, 8))


@pytest.mark.parametrize("frozen", [True, False])
def test_three_calls_on_one_x_keep_it_once(frozen):
    for width, rank in ((32, 8), (48, 16)):
        wanted = ("x", "lora_A", "lora_B") if frozen else NAMES
        x, *_ = leaves(tensors(width=width))
        parameters = [p for _ in range(3) for p in leaves(tensors(width=width, rank=rank), wanted)[1:]]
        for function in (projections, compiled(projections)):
            assert kept_bytes(function, (x, *parameters), parameters) <= x.nbytes + 3 * 8


def test_only_what_gradients_need_is_kept():
    for wanted, names in (
        (("x",), ("weight", "lora_A", "lora_B")),
        (("weight",), ("x",)),
        (("bias",), ()),
        (("lora_A",), ("x", "lora_B")),
        (("lora_B",), ("x", "lora_A")),
    ):
        given = leaves(tensors(), wanted)
        with saved_tensors() as kept:
            y = ours(*given)
        expected = {x.data_ptr() for name, x in zip(NAMES, given, strict=True) if name in names}
        assert {x.data_ptr() for x in kept if x.dim()} == expected
        del y


def test_writing_to_x_is_noticed():
    x, *parameters = leaves(tensors())
    x = x * 1.0
    y = ours(x, *parameters)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- compilers, transforms, modes ----


def test_compiled_equals_eager():
    given = tensors()
    function = compiled(lambda *x: ours(*(y * 1.5 for y in x), seed=None) * 2)
    for seed in (0, 1):
        expected = under(seed, gradients, lambda *x: ours(*(y * 1.5 for y in x), seed=None) * 2, given)
        assert_all_near(under(seed, gradients, function, given), expected)
    assert graphs() == 1


def test_compiled_with_dynamic_shapes_and_a_tensor_for_p():
    function = compiled(lambda x, p, *rest: fdt.lora_linear(x, *rest, SCALING, p, seed=SEED), dynamic=True)
    for rows, p in ((4, P), (7, 0.2), (9, 0.3)):
        given = tensors(leading=(rows,))
        at = torch.tensor(p, dtype=torch.float64)
        found = gradients(lambda x, *rest, at=at: function(x, at, *rest), given)
        assert_all_near(found, gradients(lambda *x, p=p: ours(*x, p=p), given))
    assert graphs() == 1


def test_autocast():
    given = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, found = gradients(ours, given)
        _, compiled_gradients = gradients(compiled(ours), given)
    expected, wanted = gradients(ours, [x.bfloat16() for x in given])
    assert_equal(y, expected)
    for x, same, e in zip(found, compiled_gradients, wanted, strict=True):
        assert x.dtype is torch.float32
        assert_near(x.bfloat16(), e, torch.bfloat16)
        assert_near(same.bfloat16(), e, torch.bfloat16)
    doubles = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(ours, doubles)
    assert_all_near(found, gradients(ours, doubles))


def test_autocast_keeps_x_once():
    """As it is: not in autocast's dtype, of which each call would make a copy."""
    x, *parameters = leaves(tensors(torch.float32), ("x", "lora_A", "lora_B"))
    with torch.autocast("cpu", torch.bfloat16), saved_tensors() as kept:
        y = [ours(x, *parameters, seed=i) for i in range(3)]
    assert {t.data_ptr() for t in kept if t.shape == x.shape} == {x.data_ptr()}
    assert y[0].dtype is torch.bfloat16


@pytest.mark.parametrize("cast", [False, True], ids=["bfloat16", "autocast"])
def test_bfloat16_keeps_x_and_is_as_exact_as_the_composed_form(cast):
    given = [x.bfloat16().float() if cast else x.bfloat16() for x in tensors(leading=(64,), width=48, out=32)]
    expected = gradients(formula, [x.double() for x in given])
    errors = []
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        for function in (ours, formula):
            y, found = gradients(function, given)
            pairs = zip((y, *found), (expected[0], *expected[1]), strict=True)
            errors.append([float((a.double() - e).norm() / e.norm()) for a, e in pairs])
        x, *parameters = leaves(given, ("x", "lora_A", "lora_B"))
        assert kept_bytes(ours, (x, *parameters), parameters) <= x.nbytes + 8 + cast * sum(p.nbytes for p in parameters)
    for actual, composed in zip(*errors, strict=True):
        assert actual <= 1.2 * composed


def test_second_order_under_autocast_and_without_rows():
    for dtype, leading in ((torch.float32, (4, 5)), (torch.float64, (0,))):
        results = []
        for function in (ours, formula):
            given = leaves(tensors(dtype, leading))
            with torch.autocast("cpu", torch.bfloat16):
                y = function(*given)
            first = torch.autograd.grad(y.double().square().sum(), given, create_graph=True)
            results.append(torch.autograd.grad(sum(x.double().square().sum() for x in first), given))
        for actual, expected in zip(*results, strict=True):
            assert actual.dtype is dtype
            if actual.numel():
                near = 0.05 * float(expected.abs().max())
                torch.testing.assert_close(actual, expected, rtol=0.1, atol=near)


def test_backward_inside_autocast():
    given = tensors(torch.float32)
    expected = gradients(ours, given)
    x = leaves(given)
    y = ours(*x)
    with torch.autocast("cpu", torch.bfloat16):
        y.double().sin().sum().backward()
    assert_all_near((y.detach(), [leaf.grad for leaf in x]), expected, torch.float32)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    given = tensors()

    def function(*x):
        return checkpoint(lambda *x: ours(*x, seed=None), *x, use_reentrant=reentrant)

    expected = under(2, gradients, lambda *x: ours(*x, seed=None), given)
    assert_all_near(under(2, gradients, function, given), expected)


def test_transforms():
    x, *rest = tensors()

    def of_x(function):
        return lambda x: function(x, *rest).sin()

    assert_near(
        vmap(of_x(ours), randomness="same")(x), torch.stack([ours(row, *rest).sin() for row in x]), torch.float64
    )
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        found, expected = (transform(lambda x, f=f: of_x(f)(x).sum())(x[0, :2]) for f in (ours, formula))
        assert_near(found, expected, torch.float64)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, x.cos())
        found, expected = (fwAD.unpack_dual(f(dual, *rest)).tangent for f in (ours, formula))
        assert_near(found, expected, torch.float64)


def test_subclasses_and_meta_tensors():
    given = tensors()
    expected = formula(*given)
    Named.seen = []
    found = ours(given[0].as_subclass(Named), *given[1:])
    assert fdt.lora_linear in Named.seen
    assert_near(found.as_subclass(torch.Tensor), expected, torch.float64)
    assert_near(ours(Wrapped(given[0]), *given[1:]).inner, expected, torch.float64)
    assert ours(*(x.to("meta") for x in given)).shape == expected.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, weight, bias, lora_A, lora_B = leaves(tensors(dtype, width=33))
    p, seed = torch.tensor(P, dtype=torch.float64), torch.tensor(SEED)
    torch.library.opcheck(OPS.lora.default, (x, weight, bias, lora_A, lora_B, seed, P, SCALING))
    torch.library.opcheck(OPS.lora.tensor, (x.transpose(0, 1), weight, None, lora_A, lora_B, seed, p, SCALING))
    data = [y.detach() for y in (x, weight, lora_A, lora_B)]
    dy, options = x.new_ones(4, 5, 6), (seed, P, SCALING, x.dtype)
    cast = [y.bfloat16().detach().requires_grad_() for y in (weight, bias, lora_A, lora_B)]
    torch.library.opcheck(OPS.lora.default, (x, *cast, seed, P, SCALING))
    torch.library.opcheck(OPS.lora_backward.default, (dy, *data, *options, [True] * 5))
    torch.library.opcheck(
        OPS.lora_backward.tensor,
        (dy, data[0], None, None, data[3], seed, p, SCALING, x.dtype, [False, True, False, True, False]),
    )


# ---- bad input ----


@pytest.mark.parametrize(
    ("index", "change", "error", "match"),
    [
        (0, lambda x: x[..., :7], ValueError, r"weight must be \(out, in\), here \(any, 7\), but got shape \(6, 8\)"),
        (0, lambda x: x[0, 0, 0], ValueError, r"x must be \(\*, in\), but got a tensor without axes"),
        (1, lambda x: x[None], ValueError, r"weight must be \(out, in\)"),
        (2, lambda x: x[:5], ValueError, r"bias must be \(out,\), here \(6\), but got shape \(5,\)"),
        (3, lambda x: x[:, :7], ValueError, r"lora_A must be \(r, in\), here \(any, 8\), but got shape \(3, 7\)"),
        (4, lambda x: x[:, :2], ValueError, r"lora_B must be \(out, r\), here \(6, 3\), but got shape \(6, 2\)"),
        (3, lambda x: x.float(), TypeError, r"lora_A must be of torch.float64, but got torch.float32"),
        (1, lambda x: x.to("meta"), ValueError, r"weight must be on cpu, as the data is, but got one on meta"),
        (0, lambda x: x.long(), RuntimeError, "but got torch.int64"),
        (0, lambda x: x.cfloat(), RuntimeError, "lora_linear takes real numbers"),
        (0, lambda x: torch.nested.nested_tensor([x]), RuntimeError, "lora_linear takes dense tensors"),
        (0, lambda x: x.to_sparse(), RuntimeError, "but got one of layout torch.sparse_coo"),
        (4, lambda x: None, TypeError, "lora_B must be a Tensor, but got NoneType"),
        (2, lambda x: 1.0, TypeError, "bias must be a Tensor, but got float"),
    ],
)
def test_bad_tensors(index, change, error, match):
    given = tensors()
    x = given[0]
    given[index] = change(given[index])
    untouched(x, lambda: ours(*given, seed=None), error, match)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"p": 1.5}, ValueError, "between 0 and 1"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"generator": torch.Generator()}, ValueError, "must not both be given"),
        ({"training": False, "seed": -1}, ValueError, "seed"),
    ],
)
def test_bad_options(options, error, match):
    given = tensors()
    untouched(given[0], lambda: ours(*given, **options), error, match)


def test_bad_scaling():
    given = tensors()
    for scaling, error in ((float("nan"), ValueError), (float("inf"), ValueError), ("2", TypeError)):
        untouched(given[0], lambda scaling=scaling: fdt.lora_linear(*given, scaling, P), error, "scaling")

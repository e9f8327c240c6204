"""Every kind of dropout as a torch function, plain dropout among them: values, gradients, memory, masks, bad input.

The table `KINDS` of ../cases.py gives each kind in torch and in NumPy. `ALL_WAYS` are all kinds with each store;
`DISTINCT` are those that differ once the cells of a mask are known. What only plain dropout has is in test_dropout.py.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import warnings

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core.random import DROP_ALL, threshold

torch = pytest.importorskip("torch")

import torch.nn.functional as F

import fastdrop.torch as fdt

from ...cases import DTYPES, assert_same_bits, bits_of
from ..cases import (
    ALL_WAYS,
    DISTINCT,
    Kind,
    alpha,
    array_of,
    assert_equal,
    numbers_drawn,
    saved_tensors,
    tensor_of,
    under,
    untouched,
)

IN_PLACE = [name for name, way in DISTINCT.items() if way.in_place]
DROPPING = [name for name, way in DISTINCT.items() if way.scaling != "gaussian"]
FEATURES = {"dropout1d": F.dropout1d, "dropout2d": F.dropout2d, "dropout3d": F.dropout3d}


@pytest.fixture(params=DISTINCT)
def way(request) -> Kind:
    return DISTINCT[request.param]


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


# ---- the values NumPy gets ----


@pytest.mark.parametrize("name", ALL_WAYS)
def test_values_are_numpys(backend, name):
    """Output and gradient, bit for bit, special values included; NumPy's on its reference backend."""
    way = ALL_WAYS[name]
    for dtype, (p, seed) in itertools.product(DTYPES, zip(way.p, (2**64 - 1, 0), strict=False)):
        special = np.ascontiguousarray(dtype.data(math.prod(way.shape))).view(dtype.public).reshape(way.shape)
        array, dy = special, np.flip(special).copy()
        with fd.use_backend("numpy"):
            wanted, mask = way.numpy(array, p, rng=seed)
            dx = fd.dropout_backward(dy, mask)
        assert mask.shape == way.cells
        x = tensor_of(array).requires_grad_()
        y = way.torch(x, p, seed=seed)
        y.backward(tensor_of(dy))
        assert_same_bits(array_of(y), wanted, ("y", p))
        assert_same_bits(array_of(x.grad), dx, ("dx", p))
        assert_same_bits(array_of(x), array, ("x must stay", p))
        assert_same_bits(array_of(way.torch(x.detach(), p, seed=seed)), wanted, ("no gradient", p))


@pytest.mark.parametrize("name", [name for name, way in DISTINCT.items() if way.cells == (7, 33)])
def test_numbers_without_axes_are_numpys(backend, name):
    way, array = ALL_WAYS[name], np.asarray(1.5, np.float32)
    for p, seed in itertools.product(way.p, range(4)):
        wanted, _ = way.numpy(array, p, rng=seed)
        assert_same_bits(array_of(way.torch(tensor_of(array), p, seed=seed)), wanted, seed)


def test_empty_input_gives_an_empty_result(way):
    for axis, p in itertools.product(range(len(way.shape)), way.p):
        shape = [extent if i != axis else 0 for i, extent in enumerate(way.shape)]
        x = torch.ones(shape, requires_grad=True)
        y = way.torch(x, p)
        y.sum().backward()
        assert y.shape == x.grad.shape == tuple(shape)
        if way.in_place:
            own = torch.ones(shape)
            assert way.torch(own, p, inplace=True) is own


LAYOUTS = {
    "offset": lambda make, shape: make((shape[0] + 1, *shape[1:]))[1:],
    "transposed": lambda make, shape: make(shape[::-1]).permute(*reversed(range(len(shape)))),
    "stepped": lambda make, shape: make((*shape[:-1], 2 * shape[-1]))[..., ::2],
    "expanded": lambda make, shape: make((*shape[:-1], 1)).expand(shape),
    "channels last": lambda make, shape: make((shape[0], *shape[2:], shape[1])).movedim(-1, 1),
}


def with_gradient(function, x, dy):
    """The output and dy's gradient."""
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def test_masks_follow_the_logical_index(backend, way):
    """Output, gradient and result in place are those of the contiguous tensor; strides those of torch's own ops."""
    function = functools.partial(way.torch, p=0.3, seed=4)
    for layout in LAYOUTS:
        x = LAYOUTS[layout](normal, way.shape)
        plain = x.clone(memory_format=torch.contiguous_format)
        for dy in (plain.flip(0), x):  # what comes in at backward may be laid out in any way too
            y, dx = with_gradient(function, x, dy)
            assert_equal((y, dx), with_gradient(function, plain, dy.contiguous()))
            assert y.stride() == torch.empty_like(x).stride()
            assert_equal(x, plain)
        if way.in_place and "expanded" not in layout:
            own = torch.empty_strided(x.shape, x.stride()).copy_(x)
            version = own._version
            assert function(own, inplace=True) is own
            assert own._version > version
            assert own.stride() == x.stride()
            assert_equal(own, y)


def test_threads_change_no_bit(way):
    """On data of more than one grain of work."""
    repeats = 70_000 // math.prod(way.shape) + 1
    shape = (way.shape[0] * repeats, *way.shape[1:])
    x = normal(shape).requires_grad_()
    own, results = fd.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = way.torch(x, 0.3, seed=3)
        results.append((y.detach(), *torch.autograd.grad(y, x, x.detach())))
        assert fd.get_num_threads() == own
    for result in results[1:]:
        assert_equal(result, results[0])


# ---- scalings ----


def test_complex_numbers_are_dropped_whole_or_refused(way):
    x = torch.randn(way.shape, dtype=torch.complex64)
    if way.scaling in ("alpha", "gaussian"):  # in which they have no sense
        for given, options in itertools.product((x, x.requires_grad_() * 1), way.in_places):
            call = functools.partial(way.torch, given, 0.5, **options)
            untouched(given, call, RuntimeError, "takes real numbers, but got")
        return
    for p in way.p:
        y = way.torch(x, p, seed=3)
        assert_equal(y.real, way.torch(x.real.clone(), p, seed=3))
        assert_equal(y.imag, way.torch(x.imag.clone(), p, seed=3))


# ---- nothing to do, everything to do ----


def test_what_drops_nothing_is_the_very_same_object(way):
    """And no number is drawn. A tensor of integers too, as in torch."""
    nothing = [{"p": p} for p in (0.0, 0, torch.tensor(0.0), *([1e-10] if way.scaling != "gaussian" else ()))]
    if way.scaling != "standard":
        nothing += [{"p": p, "training": False} for p in way.p]
    inputs = [torch.ones(way.shape), torch.ones(way.shape, requires_grad=True)]
    inputs += [torch.ones(way.shape, dtype=torch.int64), torch.ones(way.shape, dtype=torch.complex64).conj()]
    for options, how, x in itertools.product(way.in_places, nothing, inputs):
        version, results = x._version, []
        function = functools.partial(way.torch, x, **how, **options)
        assert numbers_drawn(lambda: results.append(function())) == 0  # noqa: B023
        assert results[0] is x
        assert x._version == version


STANDARD = {
    "dropout": lambda x, p, **options: fdt.dropout(x, p, scaling="standard", **options),
    "variational_dropout": lambda x, p, **options: fdt.variational_dropout(x, p, 0, scaling="standard", **options),
    "drop_connect": lambda x, p, **options: fdt.drop_connect(x, p, scaling="standard", **options),
    "stochastic_depth": lambda x, p, **options: fdt.stochastic_depth(x, p, "row", scaling="standard", **options),
}


@pytest.mark.parametrize("name", STANDARD)
def test_standard_scaling_keeps_in_training_and_scales_in_evaluation(name):
    """By 1 - p as it is realised in 32 bits, and as NumPy does."""
    for dtype, p in itertools.product((DTYPES[0], DTYPES[3]), (0.1, 1.0)):
        array = dtype.numbers((7, 33))
        x = tensor_of(array).requires_grad_()
        y = STANDARD[name](x, p, seed=3)
        kept = (STANDARD[name](torch.ones(7, 33), p, seed=3) != 0).numpy()
        assert_same_bits(array_of(y)[kept], array[kept])
        assert not bits_of(array_of(y)[~kept]).any()
        y = STANDARD[name](x, p, training=False)
        y.sum().backward()
        assert_same_bits(array_of(y), fd.dropout(array, p, training=False, scaling="standard")[0], p)
        scale = np.asarray(1 - threshold(p) / DROP_ALL).astype(dtype.public)
        assert_same_bits(array_of(x.grad), np.full((7, 33), scale))


@pytest.mark.parametrize("name", STANDARD)
def test_standard_scaling_refuses_integers_and_other_scalings(name):
    whole, x = torch.ones(7, 33, dtype=torch.int64), torch.ones(7, 33)
    for training in (True, False):
        call = functools.partial(STANDARD[name], whole, 0.5, training=training)
        untouched(whole, call, RuntimeError, "dropout takes float32")
    arguments = {"variational_dropout": (0,), "stochastic_depth": ("row",)}.get(name, ())
    call = functools.partial(getattr(fdt, name), x, 0.5, *arguments, scaling="alpha")
    untouched(x, call, ValueError, "^scaling must be one of 'inverted', 'standard', but got 'alpha'$")


def test_standard_scaling_in_place():
    """At p = 1 infinities and NaNs become 0 too, in the gradient as well, as in NumPy."""
    x = torch.tensor([1.0, -2.0, 4.0])
    assert fdt.dropout(x, 0.5, False, True, scaling="standard") is x
    assert x.tolist() == [0.5, -1.0, 2.0]
    leaf = torch.tensor([math.inf, -math.inf, math.nan, -1.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        fdt.dropout(leaf, 0.5, False, True, scaling="standard")
    for training, inplace in itertools.product((False, True), repeat=2):
        x = leaf * 1
        y = fdt.dropout(x, 1.0, training, inplace, scaling="standard")
        assert (y is x) == inplace
        (dx,) = torch.autograd.grad(y, leaf, leaf.detach())
        for result in (y, dx):
            assert_same_bits(array_of(result), np.zeros(4, np.float32))


@pytest.mark.parametrize("name", DROPPING)
def test_p_of_1_in_any_form_is_zero_and_has_no_gradient(name):
    for p in (1.0, 1, torch.tensor(1.0), 1 - 2.0**-34):
        x = torch.full(DISTINCT[name].shape, math.inf)
        for result in with_gradient(functools.partial(DISTINCT[name].torch, p=p), x, x):
            assert not bits_of(array_of(result)).any()


def test_gaussian_p_of_1_is_refused():
    x = torch.ones(12)
    text = r"^p must be below 1 for Gaussian dropout, whose variance is p / \(1 - p\), but got 1\.0$"
    for p, training in itertools.product((1.0, 1, True, torch.tensor(1.0), 1.0 - 2.0**-60), (True, False)):
        untouched(x, functools.partial(fdt.gaussian_dropout, x, p, training), ValueError, text)


# ---- in place ----


@pytest.mark.parametrize("name", IN_PLACE)
def test_inplace_of_a_leaf_is_refused_as_by_torch(name):
    x = torch.ones(ALL_WAYS[name].shape, requires_grad=True)
    with pytest.raises(RuntimeError) as torchs:
        F.dropout(x, 0.5, True, True)
    for p in ALL_WAYS[name].p:
        call = functools.partial(ALL_WAYS[name].torch, x, p, inplace=True)
        untouched(x, call, RuntimeError, re.escape(str(torchs.value)))


@pytest.mark.parametrize("name", IN_PLACE)
def test_inplace_makes_torch_notice_that_a_saved_tensor_changed(name):
    for grad in (False, True):
        leaf = torch.randn(ALL_WAYS[name].shape, requires_grad=True)
        x = leaf * 1 if grad else torch.randn(ALL_WAYS[name].shape)
        saved = x * leaf
        ALL_WAYS[name].torch(x.view(x.shape), 0.5, inplace=True)
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            saved.sum().backward()


@pytest.mark.parametrize("name", IN_PLACE)
def test_inplace_has_the_gradient_of_its_copy(name):
    """Of a view, through which the gradient reaches what it is a view of."""
    x = normal(ALL_WAYS[name].shape, torch.float64).requires_grad_()
    results = []
    for inplace in (False, True):
        base = x * 2
        y = ALL_WAYS[name].torch(base.view_as(base), 0.5, inplace=inplace, seed=6)
        results.append((y.detach(), *torch.autograd.grad((base if inplace else y).sin().sum(), x)))
    assert_equal(*results)


# ---- where masks come from ----


def test_each_call_draws_one_number(way):
    """And backward none. A generator of one's own gives the masks that torch's would."""
    own, strided = torch.Generator().manual_seed(3), LAYOUTS["transposed"](torch.ones, way.shape)
    for p, x in itertools.product(way.p, (torch.ones(way.shape), torch.ones(way.shape, requires_grad=True), strided)):
        call, results = functools.partial(way.torch, x, p), []
        assert numbers_drawn(lambda: results.append(call())) == 1  # noqa: B023
        assert numbers_drawn(functools.partial(call, generator=own), own) == 1
        assert numbers_drawn(functools.partial(call, generator=own)) == 0
        assert numbers_drawn(functools.partial(call, seed=1)) == 0
        if x.requires_grad:
            assert numbers_drawn(results[0].sum().backward) == 0
        torchs = under(11, lambda: tuple(call() for _ in range(8)))  # noqa: B023
        own.manual_seed(11)
        assert_equal(tuple(call(generator=own) for _ in range(8)), torchs)
        assert p == 1.0 or any(not torch.equal(torchs[0], other) for other in torchs[1:])


def test_seeds_have_64_bits_in_any_form(way):
    x = normal(way.shape)
    for seed in (0, 1, 2**63 - 1, 2**63, 2**64 - 1):
        signed = seed - 2**64 if seed >= 2**63 else seed
        wanted = tensor_of(way.numpy(x.numpy(), 0.3, rng=seed)[0])
        for form in (seed, torch.tensor(signed), torch.tensor([[signed]]), np.uint64(seed)):
            assert_equal(way.torch(x, 0.3, seed=form), wanted)


def test_seed_is_remembered_and_not_the_tensor_it_came_in(way):
    x, seed = normal(way.shape).requires_grad_(), torch.tensor(3)
    y = way.torch(x, 0.5, seed=seed)
    seed.fill_(4)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_equal(dx, torch.autograd.grad(way.torch(x, 0.5, seed=3).sum(), x)[0])


# ---- what is kept ----


def test_bytes_kept_for_backward(way):
    """Words of 32 cells or 8 bytes of a seed; beside DropBlock's words their count, of 8 bytes."""
    wanted = 8 if way.stores == ("seed",) else 4 * math.ceil(math.prod(way.cells) / 32) + 8 * (way.scaling == "blocks")
    for p, dtype in zip(way.p, (torch.float32, torch.bfloat16), strict=False):
        with saved_tensors() as kept:
            way.torch(torch.ones(way.shape, dtype=dtype, requires_grad=True), p)
        assert sum(t.untyped_storage().nbytes() for t in kept) == wanted


def test_nothing_is_kept_where_no_gradient_is_wanted(way):
    x = torch.ones(way.shape, requires_grad=True)
    with saved_tensors() as kept:
        way.torch(x.detach(), 0.5)
        with torch.no_grad():
            way.torch(x, 0.5)
        way.torch(x, 0.0)
        if way.scaling != "standard":
            way.torch(x, 0.5, training=False)
    assert not kept


# ---- bad input ----


def test_bad_p_is_refused(way):
    x = torch.ones(way.shape)
    for p, training in itertools.product((-0.1, math.nan, 2, torch.tensor(1.5)), (True, False)):
        text = re.escape(f"{way.probability} has to be between 0 and 1, but got {p}")
        untouched(x, functools.partial(way.torch, x, p, training=training), ValueError, f"^{text}$")
    for p in ("0.5", None, 0.5 + 0j, [0.5], torch.tensor([0.5, 0.5])):
        untouched(x, functools.partial(way.torch, x, p), TypeError, "p must be a number|float|real number")


class Subclass(torch.Tensor):
    """As torch makes them."""


def test_bad_options_are_refused(way):
    """On a plain tensor, one with a graph and one that takes the ops, in place and not. test_dropout.py has more."""
    makers = torch.Tensor.clone, lambda x: x.requires_grad_() * 1, lambda x: x.as_subclass(Subclass)
    for make, more in itertools.product(makers, way.in_places):
        x = make(torch.ones(way.shape))
        drop = functools.partial(way.torch, x, 0.5, **more)
        untouched(x, functools.partial(drop, seed=-1), ValueError, "seed must be from 0 to 2.*64 - 1, but got -1")
        untouched(x, functools.partial(drop, generator=5), TypeError, "generator")


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_other_dtypes_and_what_is_no_tensor_are_refused(way):
    def refused():
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.float8_e5m2, torch.complex32):
            x = torch.ones(way.shape).to(dtype)
            before = x.view(torch.uint8).clone()
            for p, options in itertools.product(way.p, way.in_places):
                with pytest.raises(RuntimeError, match=f"float32, .*complex128, but got {dtype}"):
                    way.torch(x, p, **options)
            assert torch.equal(x.view(torch.uint8), before)
            assert x._version == 0
        for x, training in itertools.product((np.ones((3,) * 4, np.float32), [1.0], 1.0, None), (True, False)):
            with pytest.raises(TypeError, match=r"^input must be a Tensor, but got "):
                way.torch(x, 0.5, training=training)

    assert numbers_drawn(refused) == 0


# ---- as the peer does ----


def shared_axes(function, shape):
    """The axes along which a dropout decides once."""
    results = [function(torch.ones(shape), 0.5) for _ in range(12)]
    return [i for i in range(len(shape)) if all((y == y.narrow(i, 0, 1)).all() for y in results)]


def outcome(function, rank):
    """Shared axes or error, and warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = shared_axes(function, (4, 3, 2, 3, 2, 2)[:rank])
        except RuntimeError as error:
            result = str(error)
    return result, {str(warning.message) for warning in caught}


@pytest.mark.parametrize("name", FEATURES)
def test_ranks_are_taken_refused_and_warned_of_as_by_torch(name):
    for rank in range(7):
        torch.manual_seed(0)
        wanted = outcome(FEATURES[name], rank)
        assert outcome(getattr(fdt, name), rank) == wanted, rank


def test_feature_alpha_dropout_takes_the_ranks_torch_takes():
    for rank in range(4):
        torch.manual_seed(0)
        wanted = outcome(lambda x, p: F.feature_alpha_dropout(x, p, True), rank)
        assert outcome(lambda x, p: fdt.feature_alpha_dropout(x, p, True), rank) == wanted, rank


@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
def test_alpha_dropout_has_torchs_two_values(name):
    """For what is dropped and, of 1, for what is kept; torch's own constants have seven digits."""
    x, p = torch.ones(300, 40, 2, dtype=torch.float64), 0.3
    assert getattr(fdt, name)(x) is x  # unless training, as torch's
    ours, theirs = getattr(fdt, name)(x, p, True, seed=1).unique(), getattr(F, name)(x, p, True).unique()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    a, b, c = alpha(p)
    torch.testing.assert_close(ours, torch.tensor(sorted({c, a + b}), dtype=torch.float64))


X2, X3, X4 = (torch.ones((2,) * n) for n in (2, 3, 4))
# Calls that do not fit, with the text of the error: torchvision's where it has one.
OF_A_KIND = (
    (ValueError, "input should be 4 dimensional. Got 3 dimensions.", fdt.drop_block2d, X3, 1),
    (ValueError, "input should be 5 dimensional. Got 4 dimensions.", fdt.drop_block3d, X4, 1),
    *((ValueError, "block_size must ", fdt.drop_block2d, X4, size) for size in (0, -1, (3,), (3, 3, 3), (3, 0))),
    *((TypeError, "block_size must ", fdt.drop_block2d, X4, size) for size in ("3", 3.0, None)),
    (ValueError, "mode has to be either 'batch' or 'row', but got Row", fdt.stochastic_depth, X2, "Row"),
    (ValueError, "mode has to be either 'batch' or 'row', but got None", fdt.stochastic_depth, X2, None),
    (ValueError, "time_axis must be an axis of x, which has 2, but got 2", fdt.variational_dropout, X2, 2),
    (ValueError, "time_axis must be an axis of x, which has 2, but got -3", fdt.variational_dropout, X2, -3),
    (TypeError, "time_axis must be an int, but got float", fdt.variational_dropout, X2, 0.0),
    (TypeError, "time_axis must be an int, but got bool", fdt.variational_dropout, X2, True),
    (TypeError, "time_axis must be an int, but got NoneType", fdt.variational_dropout, X2, None),
)


@pytest.mark.parametrize(("error", "text", "function", "x", "argument"), OF_A_KIND)
def test_arguments_of_one_kind_are_refused(error, text, function, x, argument):
    for training in (True, False):
        call = functools.partial(function, x, 0.5, argument, training=training)
        untouched(x, call, error, f"^{re.escape(text)}")

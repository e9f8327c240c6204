"""Dropout of torch tensors: the values NumPy gets, on any strides, and what torch's own dropout promises besides."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core.random import threshold

from ...cases import DTYPES, LENGTHS, VARIANTS, P, activated, assert_same_bits, bits_of

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..cases import array_of, numbers_drawn, saved_tensors, tensor_of, untouched

# torch's own, when it first loads what forward-mode AD needs
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

STORES = ("bits", "seed")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex64, torch.complex128)


@pytest.fixture(autouse=True)
def torch_state():
    """Generator and threads are as before afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def public(dtype, n, reverse=False):
    """n numbers of random bits, special ones first or last, as the NumPy API takes them."""
    data = dtype.data(n)[::-1] if reverse else dtype.data(n)
    return np.ascontiguousarray(data).view(dtype.public)


def plain(x):
    """A C-contiguous copy with no conjugate or negative bit: x as plainly as it can be had."""
    return x.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def dropped(shape, p, seed):
    return torch.from_numpy(~fd.draw_mask(shape, p, rng=seed).to_bool())


# ---- the values NumPy gets ----


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("p", [0.5, 0.1, 0.003, 1.0])
def test_dropout_equals_numpy(variant, dtype, p, store):
    """Output and gradient bit for bit, special values included."""
    for n in LENGTHS:
        if n > 20_000 and p != 0.1:
            continue
        array, gradient = public(dtype, n), public(dtype, n, reverse=True)
        wanted, mask = fd.dropout(array, p, rng=n)
        x = tensor_of(array).requires_grad_()
        y = fdt.dropout(x, p, seed=n, store=store)
        y.backward(tensor_of(gradient))
        assert y.grad_fn is not None
        assert_same_bits(array_of(y), wanted, ("y", n))
        assert_same_bits(array_of(x.grad), fd.dropout_backward(gradient, mask), ("dx", n))
        assert_same_bits(array_of(x), array, ("x must stay", n))
        assert_same_bits(array_of(fdt.dropout(x.detach(), p, seed=n, store=store)), wanted, ("no gradient", n))


@pytest.mark.parametrize("p", [*P, 1 - 2.0**-32, 2.0**-32, 1.0])
def test_dropout_equals_numpy_at_every_p(backend, p):
    array = DTYPES[0].numbers(5000)
    assert_same_bits(array_of(fdt.dropout(tensor_of(array), p, seed=7)), fd.dropout(array, p, rng=7)[0])


NOISE = (
    ((8, 3, 5, 5), (None, None, 1, 1)),
    ((9, 4, 6), (1, 4, 6)),
    ((16, 7, 5), (None, 1, 1)),
    ((3, 4, 5, 6), (1, None, 1, None)),
    ((50, 60), (1, 1)),
    ((4, 700), [None, None]),
    ((5, 1), torch.Size([5, 1])),
    ((), ()),
    ((3, 0, 4), (None, None, 1)),
)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("p", [0.5, 0.1, 1.0])
@pytest.mark.parametrize(("shape", "noise_shape"), NOISE, ids=str)
def test_dropout_equals_numpy_under_a_noise_shape(variant, dtype, shape, noise_shape, p, store):
    array, gradient = dtype.numbers(shape), dtype.numbers(shape, seed=1)
    array, gradient = np.asarray(array, dtype.public), np.asarray(gradient, dtype.public)
    wanted, mask = fd.dropout(array, p, rng=5, noise_shape=noise_shape)
    x = tensor_of(array).requires_grad_()
    y = fdt.dropout(x, p, seed=5, noise_shape=noise_shape, store=store)
    y.backward(tensor_of(gradient))
    assert_same_bits(array_of(y), wanted, "y")
    assert_same_bits(array_of(x.grad), fd.dropout_backward(gradient, mask), "dx")


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("store", STORES)
def test_dropout_takes_all_64_bits_of_a_seed(backend, seed, store):
    array = DTYPES[0].numbers(1000)
    wanted, mask = fd.dropout(array, 0.5, rng=seed)
    signed = seed - 2**64 if seed >= 2**63 else seed
    forms = [seed, torch.tensor(signed), torch.tensor([[signed]]), np.uint64(seed)]
    for form in forms:
        x = tensor_of(array).requires_grad_()
        y = fdt.dropout(x, 0.5, seed=form, store=store)
        y.sum().backward()
        assert_same_bits(array_of(y), wanted, form)
        assert_same_bits(array_of(x.grad), fd.dropout_backward(np.ones_like(array), mask), form)


@pytest.mark.parametrize("store", STORES)
def test_dropout_remembers_the_seed_and_not_the_tensor_it_came_in(store):
    x, seed = torch.ones(200, requires_grad=True), torch.tensor(3)
    y = fdt.dropout(x, 0.5, seed=seed, store=store)
    seed.fill_(4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("kind", COMPLEX)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("p", [0.5, 0.1, 1.0])
@pytest.mark.parametrize(
    ("shape", "noise_shape"),
    [((1000,), None), ((7, 9), None), ((7, 9), (1, None)), ((), None), ((3, 0), None)],
    ids=str,
)
def test_complex_numbers_are_dropped_whole(backend, kind, p, shape, noise_shape, store):
    """Under the mask of real numbers of the same shape."""
    options = {"p": p, "seed": 3, "noise_shape": noise_shape, "store": store}
    x, dy = torch.randn(shape, dtype=kind).requires_grad_(), torch.randn(shape, dtype=kind)
    y = fdt.dropout(x, **options)
    y.backward(dy)
    for whole, result in ((x.detach(), y.detach()), (dy, x.grad)):
        assert result.dtype is kind
        for part in ("real", "imag"):
            wanted = fdt.dropout(getattr(whole, part).clone(), **options)
            assert_same_bits(array_of(getattr(result, part)), array_of(wanted), part)


@pytest.mark.parametrize("kind", COMPLEX)
@pytest.mark.parametrize("store", STORES)
def test_gradient_of_complex_numbers_is_right(kind, store):
    if kind is torch.complex128:
        x = torch.randn(3, 4, dtype=kind, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: fdt.dropout(x, 0.4, seed=2, store=store), x, check_forward_ad=True)
    x, w = torch.randn(50, dtype=kind, requires_grad=True), torch.randn(50, dtype=kind)
    (fdt.dropout(x, 0.4, seed=2, store=store) * w).abs().sum().backward()
    reference = x.detach().clone().requires_grad_()
    scale = (~dropped((50,), 0.4, 2)) / 0.6
    (reference * scale * w).abs().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)


# ---- layouts ----


def unaligned(make):
    x = make(6, 7)
    memory = bytearray(1) + bytearray(x.view(torch.uint8).reshape(-1).tolist())
    return torch.frombuffer(memory, dtype=x.dtype, offset=1).view(6, 7)


LAYOUTS = {
    "contiguous": lambda make: make(5, 7),
    "offset": lambda make: make(8, 7)[3:],
    "unaligned": unaligned,
    "transposed": lambda make: make(33, 65).t(),
    "permuted": lambda make: make(3, 4, 5).permute(2, 0, 1),
    "channels last": lambda make: make(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last, one image": lambda make: make(1, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last, 3d": lambda make: make(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "channels last, stepped": lambda make: make(2, 3, 4, 10).to(memory_format=torch.channels_last)[..., ::2],
    "stepped": lambda make: make(6, 14)[:, ::2],
    "rows stepped": lambda make: make(14, 6)[::3],
    "stepped, transposed": lambda make: make(6, 14)[:, ::2].t(),
    "expanded": lambda make: make(3, 1).expand(3, 40),
    "expanded, first axis": lambda make: make(7).expand(9, 7),
    "expanded, middle axis": lambda make: make(3, 1, 5).expand(3, 4, 5),
    "expanded, transposed": lambda make: make(3, 1, 5).expand(3, 4, 5).permute(2, 1, 0),
    "expanded, all axes": lambda make: make().expand(5, 6),
    "diagonal": lambda make: make(9, 9).diagonal(),
    "windows": lambda make: make(20).unfold(0, 5, 2),
    "0-dim": lambda make: make(),
    "0-dim of another": lambda make: make(4)[2],
    "empty": lambda make: make(0),
    "empty, permuted": lambda make: make(3, 0, 4).permute(2, 0, 1),
}
# Of the other kind of number: parts of complex ones, and conjugates.
PARTS = {
    "real part": lambda make: make(5, 7).real,
    "imaginary part": lambda make: make(5, 7).imag,
    "negative bit": lambda make: make(5, 7).conj().imag,
    "negative bit, transposed": lambda make: make(5, 7).conj().imag.t(),
    "negative bit, 0-dim": lambda make: make().conj().imag,
}
CONJUGATES = {
    "conjugate bit": lambda make: make(5, 7).conj(),
    "conjugate bit, transposed": lambda make: make(5, 7).mH,
}


def make_of(kind):
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, dtype=kind, generator=generator)


def layouts(kind):
    """(name, tensor) of every layout of a dtype."""
    kinds = LAYOUTS | CONJUGATES if kind.is_complex else LAYOUTS
    yield from ((name, layout(make_of(kind))) for name, layout in kinds.items())
    if kind in (torch.float32, torch.float64):
        parent = torch.complex64 if kind is torch.float32 else torch.complex128
        yield from ((name, layout(make_of(parent))) for name, layout in PARTS.items())


def test_layouts_are_what_they_say():
    conjugates, negatives = dict(layouts(torch.complex64)), dict(layouts(torch.float32))
    assert all(conjugates[name].is_conj() for name in CONJUGATES)
    assert all(negatives[name].is_neg() for name in negatives if "negative" in name)
    assert all(0 in x.stride() for name, x in negatives.items() if "expanded" in name)
    assert negatives["unaligned"].data_ptr() % 4 == 1
    for name in ("transposed", "channels last", "stepped", "imaginary part", "diagonal"):
        assert not negatives[name].is_contiguous()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("shared", [False, True], ids=["", "noise_shape"])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_mask_follows_the_logical_index(backend, kind, p, shared, store):
    """Output, gradient and result in place are those of the contiguous tensor, whatever the strides."""
    for name, x in layouts(kind):
        options = {"p": p, "seed": 4, "noise_shape": [1, *[None] * (x.dim() - 1)] if shared and x.dim() else None}
        before, wanted = plain(x), fdt.dropout(plain(x), **options)
        assert_same_bits(array_of(plain(fdt.dropout(x, **options, store=store))), array_of(wanted), name)
        assert_same_bits(array_of(plain(x)), array_of(before), (name, "x must stay"))
        leaf = x.detach().requires_grad_()
        y = fdt.dropout(leaf, **options, store=store)
        assert_same_bits(array_of(plain(y)), array_of(wanted), (name, "y"))
        dy = torch.randn_like(before)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        assert_same_bits(array_of(plain(dx)), array_of(fdt.dropout(dy, **options)), (name, "dx"))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("shared", [False, True], ids=["", "noise_shape"])
def test_gradient_of_any_layout(backend, kind, shared, store):
    """What comes in at backward may have strides of its own, be expanded, negative or conjugate."""
    for name, dy in layouts(kind):
        options = {"p": 0.3, "seed": 4, "noise_shape": [1, *[None] * (dy.dim() - 1)] if shared and dy.dim() else None}
        x = torch.randn(dy.shape, dtype=kind, requires_grad=True)
        y = fdt.dropout(x, **options, store=store)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert_same_bits(array_of(plain(dx)), array_of(fdt.dropout(plain(dy), **options)), name)


def test_gradient_of_a_sum_is_expanded_and_right():
    x = torch.randn(33, 5, requires_grad=True)
    y = fdt.dropout(x.t(), 0.3, seed=4)
    y.sum().backward()
    assert torch.equal(x.grad.t(), fdt.dropout(torch.ones(5, 33), 0.3, seed=4))


def significant(x):
    """Strides, of axes where they mean something."""
    return [stride for stride, extent in zip(x.stride(), x.shape, strict=True) if extent > 1]


@pytest.mark.parametrize("kind", [*FLOATS, torch.complex64], ids=str)
@pytest.mark.parametrize("options", [{}, {"p": 1.0}, {"store": "seed"}, {"noise_shape": 1}], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_strides_are_those_of_torchs_dropout(kind, options, grad):
    for name, x in layouts(kind):
        if "noise_shape" in options:
            options = {"noise_shape": (1,) * x.dim()}
        y = fdt.dropout(x.detach().requires_grad_() if grad else x, **options)
        assert y.shape == x.shape, name
        assert y.dtype is kind, name
        assert y.stride() == torch.empty_like(x).stride(), name
        if not kind.is_complex:  # which torch's dropout does not take
            assert significant(y) == significant(F.dropout(x)), name
        assert not y.is_conj(), name
        assert not y.is_neg(), name


def test_strides_of_axes_of_one_are_those_of_empty_like():
    x = torch.randn(2, 1, 4, 8).to(memory_format=torch.channels_last)[..., ::2]
    assert fdt.dropout(x).stride() == torch.empty_like(x).stride() == F.dropout(x).stride()


def test_output_is_memory_of_its_own():
    for kind in (*FLOATS, *COMPLEX):
        for name, x in layouts(kind):
            if x.numel():
                y = fdt.dropout(x, 0.5)
                assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), name
                assert not y._is_view() or kind.is_complex, name


def test_copy_on_write_input_is_not_written_through(backend):
    original = torch.ones(1000)
    lazy = torch._lazy_clone(original)
    y = fdt.dropout(lazy, 0.5, inplace=True)
    assert y is lazy
    assert not y.all()
    assert original.all()


# ---- values ----


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropped_infinities_and_nans_are_zero(variant, dtype, p, store):
    """Exactly +0, in output and gradient, where everything is dropped as well."""
    bad = np.resize(np.array([np.inf, -np.inf, np.nan, -0.0, -1.0]), 5000).astype(dtype.public)
    x = tensor_of(bad).requires_grad_()
    y = fdt.dropout(x, p, seed=1, store=store)
    y.backward(tensor_of(bad))
    gone = dropped((5000,), p, 1).numpy()
    assert gone.any()
    for result in (y, x.grad):
        assert not bits_of(array_of(result))[gone].any()
        assert p == 1.0 or not torch.isfinite(result).all()


@pytest.mark.parametrize("kind", [*FLOATS, *COMPLEX], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_dropout_of_everything_is_zero(kind, grad):
    x = torch.full((3, 50), math.inf, dtype=kind)
    leaf = x.clone().requires_grad_(grad)
    for p in (1.0, 1, torch.tensor(1.0), 1 - 2.0**-34):  # the last rounds to a threshold of 2**32
        y = fdt.dropout(leaf, p)
        assert_same_bits(array_of(y), np.zeros_like(array_of(x)))
        if grad:
            (dx,) = torch.autograd.grad(y, leaf, x)
            assert_same_bits(array_of(dx), np.zeros_like(array_of(x)))


NOTHING_TO_DO = (
    {"p": 0.0},
    {"p": 0},
    {"p": torch.tensor(0.0)},
    {"p": 1e-10},
    {"p": 2.0**-33},
    {"training": False},
    {"p": 1.0, "training": False},
    {"p": 0.0, "store": "seed"},
    {"training": False, "store": "seed"},
    {"p": 0.0, "noise_shape": (1, None)},
    {"training": False, "seed": 1},
)


@pytest.mark.parametrize("options", NOTHING_TO_DO, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_that_does_nothing_returns_the_very_same_object(options, inplace):
    leaf = torch.randn(4, 5, requires_grad=True)
    inputs = [leaf, leaf * 1, leaf.detach(), leaf.t()[:, :], leaf.detach().conj(), torch.nn.Parameter(leaf.detach())]
    inputs += [torch.ones(4, 5, dtype=kind) for kind in (torch.int64, torch.bool, torch.complex64, torch.float16)]
    for x in inputs:
        before = x._version
        results = []
        assert numbers_drawn(lambda x=x, to=results: to.append(fdt.dropout(x, inplace=inplace, **options))) == 0
        assert results[0] is x
        assert x._version == before


def test_smallest_p_that_drops():
    """2**-33 is half a step of the 32-bit threshold and rounds to nothing; the next number rounds to one step."""
    x, p = torch.ones(8), math.nextafter(2.0**-33, 1)
    assert fdt.dropout(x, 2.0**-33) is x
    assert fdt.dropout(x, p) is not x
    assert threshold(p) == 1


def test_dropout_of_1e_minus_10_is_the_exact_identity_on_any_strides():
    for _, x in layouts(torch.float32):
        assert torch.equal(fdt.dropout(x, 1e-10), x)


def test_bfloat16_is_unbiased():
    """Within sampling error, which is small enough to see that torch's own, whose scale is rounded, is not."""
    p, n = 0.1, 1 << 21
    x = torch.rand(n, generator=torch.Generator().manual_seed(0)).add_(1).to(torch.bfloat16)
    spread = x.double().square().mean() / x.double().mean() ** 2
    error = 4 * math.sqrt(p / (1 - p) / n * spread)
    ratio = fdt.dropout(x, p, seed=0).double().mean() / x.double().mean()
    assert abs(ratio - 1) < error < 0.0016


# ---- p ----


@pytest.mark.parametrize(
    ("p", "same"),
    [
        (1, 1.0),
        (torch.tensor(0.25), 0.25),
        (torch.tensor(0.1), float(torch.tensor(0.1))),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor(1), 1.0),
        (torch.tensor([0.25]), 0.25),
        (np.float32(0.25), 0.25),
        (np.float64(0.1), 0.1),
        (Fraction(1, 4), 0.25),
    ],
    ids=repr,
)
def test_p_may_be_any_number(p, same):
    x = torch.ones(1000)
    assert torch.equal(fdt.dropout(x, p, seed=1), fdt.dropout(x, same, seed=1))


@pytest.mark.parametrize("wrap", [bool, torch.tensor], ids=["bool", "tensor"])
def test_p_may_be_a_bool_as_for_torchs_dropout(wrap):
    x = torch.ones(10)
    assert torch.equal(F.dropout(x, wrap(True)), torch.zeros(10))
    assert torch.equal(fdt.dropout(x, wrap(True)), torch.zeros(10))
    assert torch.equal(fdt.dropout(x, wrap(False)), x)
    assert torch.equal(fdt.dropout(x, wrap(True), training=False), x)


BAD_P = (-0.1, 1.1, -5e-324, math.nextafter(1, 2), math.inf, -math.inf, 2, -1, 10**30)


@pytest.mark.parametrize("p", BAD_P, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_p_is_refused_as_by_torchs_dropout(p, training, inplace):
    forms = [p] if isinstance(p, int) and p > 2**60 else [p, torch.tensor(p, dtype=torch.float64)]
    for form in forms:
        x = torch.ones(12)
        with pytest.raises(ValueError, match="between 0 and 1") as torchs:
            F.dropout(x, form, training, inplace)
        untouched(x, lambda x=x, form=form: fdt.dropout(x, form, training, inplace), ValueError, "between 0 and 1")
        with pytest.raises(ValueError, match="between 0 and 1") as ours:
            fdt.dropout(x, form, training, inplace)
        assert str(ours.value) == str(torchs.value)


@pytest.mark.parametrize("p", [math.nan, torch.tensor(math.nan), np.float32("nan")], ids=repr)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_p_that_is_no_number_is_refused(p, training):
    x = torch.ones(12)
    text = "^dropout probability has to be between 0 and 1, but got nan$"
    untouched(x, lambda: fdt.dropout(x, p, training, True), ValueError, text)


@pytest.mark.parametrize("p", ["0.5", None, 0.5 + 0j, [0.5], torch.tensor([0.5, 0.5])], ids=repr)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_p_of_another_type_is_refused(p, training):
    x = torch.ones(12)
    untouched(x, lambda: fdt.dropout(x, p, training, True), TypeError, "p must be a number|float|real number")


# ---- other bad input ----

BAD = {
    "seed negative": ({"seed": -1}, ValueError, "seed must be from 0 to 2.*64 - 1, but got -1"),
    "seed too large": ({"seed": 2**64}, ValueError, "seed must be from 0 to 2.*64 - 1, but got 18446744073709551616"),
    "seed float": ({"seed": 1.0}, TypeError, "seed must be an int, but got float"),
    "seed bool": ({"seed": True}, TypeError, "seed must be an int, but got bool"),
    "seed str": ({"seed": "1"}, TypeError, "seed must be an int, but got str"),
    "seed int32": ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "seed must be .*int64.*got.*int32"),
    "seed float tensor": ({"seed": torch.tensor(1.0)}, TypeError, "seed must be .*int64.*got.*float32"),
    "seed of two": ({"seed": torch.tensor([1, 2])}, ValueError, r"seed must be one number, .*\(2,\)"),
    "seed of none": ({"seed": torch.ones(0, dtype=torch.int64)}, ValueError, r"seed must be one number, .*\(0,\)"),
    "seed and generator": ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator"),
    "generator int": ({"generator": 5}, TypeError, "generator"),
    "generator of NumPy": ({"generator": np.random.default_rng(0)}, TypeError, "generator"),
    "store unknown": ({"store": "bytes"}, ValueError, "store must be one of 'bits', 'seed', but got 'bytes'"),
    "store None": ({"store": None}, ValueError, "store must be one of 'bits', 'seed', but got None"),
    "noise_shape extent": ({"noise_shape": (2, None)}, ValueError, r"noise_shape must be 1, .*\(3, 4\).*\(2, None\)"),
    "noise_shape short": ({"noise_shape": (1,)}, ValueError, r"noise_shape must have one entry per axis.*\(1,\)"),
    "noise_shape long": ({"noise_shape": (1, 1, 1)}, ValueError, "noise_shape must have one entry per axis"),
    "noise_shape negative": ({"noise_shape": (-1, None)}, ValueError, "noise_shape must not have negative"),
    "noise_shape int": ({"noise_shape": 1}, TypeError, "noise_shape must be None or a tuple.*got 1"),
    "noise_shape float": ({"noise_shape": (1.0, None)}, TypeError, "noise_shape must be"),
}


@pytest.mark.parametrize(("options", "error", "match"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("way", ["plain", "grad", "conjugate", "vmap"])
def test_bad_options_are_refused(options, error, match, inplace, way):
    if way == "vmap":
        x = torch.ones(2, 3, 4)
        call = torch.func.vmap(lambda x: fdt.dropout(x, 0.5, inplace=inplace, **options), randomness="different")
        untouched(x, lambda: call(x), error, match)
        return
    leaf = torch.ones(3, 4, dtype=torch.complex64 if way == "conjugate" else torch.float32)
    x = {"plain": lambda: leaf, "grad": lambda: leaf.requires_grad_() * 1, "conjugate": leaf.conj}[way]()
    untouched(x, lambda: fdt.dropout(x, 0.5, inplace=inplace, **options), error, match)


INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize("kind", [*INTEGERS, torch.float8_e5m2, torch.complex32], ids=str)
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_other_dtypes_are_refused(kind, p, inplace):
    x = torch.ones(12).to(kind)
    bytes_before, version = x.view(torch.uint8).clone(), x._version

    def refused():
        with pytest.raises(RuntimeError, match=f"float32, .*complex128, but got {kind}"):
            fdt.dropout(x, p, inplace=inplace)

    assert numbers_drawn(refused) == 0
    assert torch.equal(x.view(torch.uint8), bytes_before)
    assert x._version == version


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_integers_pass_when_there_is_nothing_to_do(kind):
    """As in torch's dropout."""
    x = torch.ones(3, dtype=kind)
    assert fdt.dropout(x, 0.0) is x
    assert fdt.dropout(x, 0.5, training=False) is x


@pytest.mark.parametrize("x", [np.ones(3, np.float32), [1.0], 1.0, None], ids=repr)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_is_no_tensor_is_refused(x, training):
    with pytest.raises(TypeError):
        F.dropout(x, 0.5, training)
    with pytest.raises(TypeError):
        fdt.dropout(x, 0.5, training)


# ---- in place ----


@pytest.mark.parametrize("kind", [*FLOATS, *COMPLEX], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "noise_shape"])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_inplace_returns_the_same_object_with_the_same_numbers(backend, kind, p, shared):
    for name, x in layouts(kind):
        if "expanded" in name or "windows" in name:
            continue
        options = {"p": p, "seed": 6, "noise_shape": [1, *[None] * (x.dim() - 1)] if shared and x.dim() else None}
        wanted, version, strides = fdt.dropout(plain(x), **options), x._version, x.stride()
        y = fdt.dropout(x, inplace=True, **options)
        assert y is x, name
        assert x.stride() == strides, name
        assert x._version > version, name
        assert_same_bits(array_of(plain(x)), array_of(wanted), name)


def test_inplace_writes_nothing_between(backend):
    wide = torch.full((6, 14), 7.0)
    fdt.dropout(wide[:, ::2], 0.5, inplace=True)
    assert (wide[:, 1::2] == 7).all()
    assert not (wide[:, ::2] == 7).any()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("shared", [False, True], ids=["", "noise_shape"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[1:],
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x.view(-1),
        lambda x: x.conj(),
        lambda x: x.real,
        lambda x: x.conj().imag,
    ],
    ids=["itself", "rows", "transposed", "stepped", "flat", "conjugate", "real part", "negative bit"],
)
def test_inplace_gradient_reaches_through_views(view, shared, store):
    """Of a tensor part of which was dropped in place, against the same out of place."""
    leaf = torch.randn(4, 6, dtype=torch.complex128, requires_grad=True)
    probe = view(leaf.detach())
    options = {"p": 0.4, "seed": 6, "noise_shape": [1, *[None] * (probe.dim() - 1)] if shared else None}
    scale = fdt.dropout(torch.ones(probe.shape, dtype=torch.float64), **options)
    results = []
    for change in (
        lambda x: fdt.dropout(x, inplace=True, store=store, **options),
        lambda x: x.mul_(scale),
    ):
        base = leaf * 1
        part = view(base)
        assert change(part) is part
        loss = torch.view_as_real(base.resolve_conj()).pow(3).sum() + torch.view_as_real(base[0].resolve_conj()).sum()
        results.append((base.detach().clone(), *torch.autograd.grad(loss, leaf)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("store", STORES)
def test_inplace_gradient_is_right(store):
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    for view in (lambda x: x, lambda x: x.t(), lambda x: x[:, ::2]):

        def function(x, view=view):
            return fdt.dropout(view(x * 2), 0.4, inplace=True, seed=3, store=store).sin()

        assert torch.autograd.gradcheck(function, x)


def test_inplace_of_what_needs_no_gradient_under_a_graph():
    """x is a constant that multiplies a leaf: written in place before use."""
    x, w = torch.ones(50), torch.ones(50, requires_grad=True)
    y = fdt.dropout(x, 0.5, inplace=True)
    assert y is x
    assert not y.requires_grad
    (y * w).sum().backward()
    assert torch.equal(w.grad, y)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t(), lambda x: x[:2]], ids=["itself", "transposed", "rows"])
def test_inplace_makes_torch_notice_that_a_saved_tensor_changed(grad, view):
    leaf = torch.randn(4, 5, requires_grad=True)
    x = leaf * 1 if grad else torch.randn(4, 5)
    saved = x * leaf
    fdt.dropout(view(x), 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        saved.sum().backward()


def leaf_itself(leaf):
    return leaf


def view_of_leaf(leaf):
    return leaf.view(2, 6)


def transposed_view_of_leaf(leaf):
    return leaf.view(2, 6).t()


def one_of_several_views(leaf):
    return (leaf * 1).view(2, 6).unbind()[0]


def view_made_under_no_grad(leaf):
    base = leaf * 1
    with torch.no_grad():
        return base.view(2, 6).requires_grad_()


def view_of_leaf_made_under_no_grad(leaf):
    with torch.no_grad():
        return leaf.view(2, 6)


def expanded(leaf):
    return (leaf * 1).view(1, 12).expand(3, 12)


REFUSED = (
    leaf_itself,
    view_of_leaf,
    transposed_view_of_leaf,
    one_of_several_views,
    view_made_under_no_grad,
    view_of_leaf_made_under_no_grad,
    expanded,
)


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("options", [{}, {"p": 1.0}, {"store": "seed"}, {"noise_shape": (1, None)}], ids=str)
def test_inplace_is_refused_where_torch_refuses_it(make, options):
    """In torch's words, with nothing written and nothing drawn."""
    leaf = torch.ones(12, requires_grad=True)
    x = make(leaf)
    if x.dim() < 2:
        options = {name: value for name, value in options.items() if name != "noise_shape"}
    with pytest.raises(RuntimeError) as torchs:
        F.dropout(x, 0.5, True, True)
    untouched(x, lambda: fdt.dropout(x, inplace=True, **options), RuntimeError, re.escape(str(torchs.value)))
    assert (leaf == 1).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.complex64], ids=str)
def test_inplace_of_an_expanded_constant_is_refused(kind):
    x = torch.ones(3, 1, dtype=kind).expand(3, 4)
    untouched(x, lambda: fdt.dropout(x, inplace=True), RuntimeError, "more than one element of the written-to tensor")


def test_inplace_of_a_leaf_leaves_the_generator_alone():
    x = torch.ones(12, requires_grad=True)
    untouched(x, lambda: fdt.dropout(x, inplace=True), RuntimeError, "a leaf Variable that requires grad is being used")
    x = torch.nn.Parameter(torch.ones(12))
    untouched(x, lambda: fdt.dropout(x, inplace=True), RuntimeError, "a leaf Variable that requires grad is being used")


def test_inplace_of_a_leaf_is_allowed_without_gradient():
    x = torch.ones(100, requires_grad=True)
    with torch.no_grad():
        assert fdt.dropout(x, 0.5, inplace=True) is x
    assert x.requires_grad
    assert x.is_leaf
    assert set(x.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t(), lambda x: x[1:]], ids=["itself", "transposed", "rows"])
def test_inplace_of_an_inference_tensor_is_refused_outside(view):
    """torch's rule: nothing tracks its version."""
    with torch.inference_mode():
        x, y = torch.ones(5, 8), torch.ones(5, 8)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        F.dropout(view(x), 0.5, True, True)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        fdt.dropout(view(y), 0.5, inplace=True)
    assert (y == 1).all()


# ---- where masks come from ----


@pytest.mark.parametrize(
    "options", [{}, {"p": 1.0}, {"store": "seed"}, {"inplace": True}, {"p": torch.tensor(0.5)}], ids=str
)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_each_call_draws_one_number(options, grad, kind):
    own = torch.Generator().manual_seed(3)
    for name, x in layouts(kind):
        if "expanded" in name or "windows" in name:
            continue
        y = x.detach().requires_grad_(grad)
        call = functools.partial(fdt.dropout, y.clone() if "inplace" in options else y, **options)
        shapes = [None] * x.dim(), [1] * x.dim()
        assert numbers_drawn(call) == 1, name
        assert [numbers_drawn(functools.partial(call, noise_shape=shape)) for shape in shapes] == [1, 1], name
        assert numbers_drawn(functools.partial(call, generator=own), own) == 1, name
        assert numbers_drawn(functools.partial(call, generator=own)) == 0, name
        assert numbers_drawn(functools.partial(call, seed=1)) == 0, name


@pytest.mark.parametrize("store", STORES)
def test_backward_draws_nothing(store):
    x = torch.ones(100, requires_grad=True)
    y = fdt.dropout(x, store=store)
    assert numbers_drawn(lambda: y.sum().backward()) == 0


def test_manual_seed_repeats_masks(backend):
    x = torch.ones(5000)
    torch.manual_seed(11)
    first = [fdt.dropout(x) for _ in range(3)]
    torch.manual_seed(11)
    again = [fdt.dropout(x) for _ in range(3)]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(12)
    assert not torch.equal(first[0], fdt.dropout(x))


def test_seed_is_the_63_bits_that_torch_draws():
    """Whichever way the call takes."""
    for kind in (torch.float32, torch.complex64):
        for name, x in layouts(kind):
            for leaf in (x, x.detach().requires_grad_()):
                torch.manual_seed(11)
                y = fdt.dropout(leaf)
                torch.manual_seed(11)
                seed = torch.empty((), dtype=torch.int64).random_()
                assert 0 <= int(seed) < 2**63
                assert torch.equal(y, fdt.dropout(leaf, seed=seed)), name


def test_generator_drives_the_mask_and_leaves_the_default_one_alone():
    x, own = torch.ones(5000), torch.Generator().manual_seed(11)
    torch.manual_seed(11)
    wanted = [fdt.dropout(x) for _ in range(2)]
    got = []
    assert numbers_drawn(lambda: got.extend(fdt.dropout(x, generator=own) for _ in range(2))) == 0
    assert all(map(torch.equal, got, wanted))


def test_fork_rng_and_set_state_take_masks_back():
    x = torch.ones(5000)
    with torch.random.fork_rng():
        inside = fdt.dropout(x)
    assert torch.equal(fdt.dropout(x), inside)
    state = torch.get_rng_state()
    y = fdt.dropout(x)
    torch.set_rng_state(state)
    assert torch.equal(fdt.dropout(x), y)


def test_manual_seed_of_numpy_stream_is_another():
    """fd.manual_seed and torch.manual_seed drive streams of their own."""
    x = torch.ones(5000)
    torch.manual_seed(1)
    y = fdt.dropout(x)
    torch.manual_seed(1)
    fd.manual_seed(99)
    fd.draw_mask(10, 0.5)
    assert torch.equal(fdt.dropout(x), y)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("noise_shape", [None, (None, 1)])
def test_threads_change_no_bit(backend, kind, noise_shape):
    """torch's number of threads is used, and fastdrop's own left as it is."""
    x = torch.randn(400, 1000, dtype=kind, generator=torch.Generator().manual_seed(0)).requires_grad_()
    own = fd.get_num_threads()
    results = []
    for threads in (1, 2, 3, 300):
        torch.set_num_threads(threads)
        y = fdt.dropout(x, 0.1, seed=3, noise_shape=noise_shape)
        (dx,) = torch.autograd.grad(y, x, x.detach())
        results.append((array_of(y), array_of(dx)))
        assert fd.get_num_threads() == own
    for y, dx in results:
        assert_same_bits(y, results[0][0])
        assert_same_bits(dx, results[0][0])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("noise_shape", [None, (1, None)])
def test_kernels_get_torchs_number_of_threads(compiled, threads, noise_shape, monkeypatch):
    """And NumPy's side its own number back afterwards."""
    seen = []
    for name in (
        "dropout_forward",
        "draw_bits",
        "masked_affine",
        "dropout_forward_at",
        "draw_bits_at",
        "masked_affine_at",
    ):
        if hasattr(compiled, name):
            kernel = getattr(compiled, name)

            def spy(*arguments, kernel=kernel, name=name):
                seen.append(arguments[0] if name.endswith("_at") else compiled._num_threads)
                return kernel(*arguments)

            monkeypatch.setattr(compiled, name, spy)
    torch.set_num_threads(threads)
    fd.set_num_threads(3)
    x = torch.ones(10, 30_000, requires_grad=True)
    fdt.dropout(x, 0.1, noise_shape=noise_shape).sum().backward()
    assert len(seen) >= 2
    assert set(seen) == {threads}
    assert fd.get_num_threads() == 3
    assert getattr(compiled, "_num_threads", 3) == 3


@pytest.mark.parametrize("store", STORES)
def test_python_threads_at_once_with_their_own_seeds(backend, store):
    def run(seed):
        x = torch.ones(30_000, requires_grad=True)
        y = fdt.dropout(x, 0.1, seed=seed, store=store)
        y.sum().backward()
        return y.detach(), x.grad

    wanted = [fdt.dropout(torch.ones(30_000), 0.1, seed=seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        for (y, dx), y_wanted in zip(pool.map(run, range(16)), wanted, strict=True):
            assert torch.equal(y, y_wanted)
            assert torch.equal(dx, y_wanted)


def test_python_threads_at_once_share_the_default_generator():
    """No number is drawn twice or lost: together they get the masks that one thread gets."""
    x, calls = torch.ones(64), 50
    torch.manual_seed(5)
    wanted = sorted(fdt.dropout(x).tolist() for _ in range(4 * calls))
    torch.manual_seed(5)
    start = threading.Barrier(4)

    def run(_):
        start.wait()
        return [fdt.dropout(x).tolist() for _ in range(calls)]

    with ThreadPoolExecutor(4) as pool:
        assert sorted(itertools.chain(*pool.map(run, range(4)))) == wanted


# ---- what is kept ----


@pytest.mark.parametrize("kind", [*FLOATS, *COMPLEX], ids=str)
@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("shape", [(0,), (), (1,), (32,), (33,), (7, 1001), (1001, 7)], ids=str)
def test_bits_kept_are_one_per_element_and_nothing_else(kind, p, inplace, shape):
    n = math.prod(shape)
    leaf = torch.randn(shape, dtype=kind, requires_grad=True)
    for layout in (lambda x: x, lambda x: x.mT if x.dim() > 1 else x):
        x = layout(leaf * 1)
        with saved_tensors() as kept:
            fdt.dropout(x, p, inplace=inplace)
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == math.ceil(n / 32) * 4


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_bits_kept_are_one_per_decision(kind):
    x = torch.randn(64, 8, 28, 28, dtype=kind, requires_grad=True)
    with saved_tensors() as kept:
        fdt.dropout(x, 0.5, noise_shape=(None, None, 1, 1))
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 64 * 8 // 8


@pytest.mark.parametrize("kind", [*FLOATS, *COMPLEX], ids=str)
@pytest.mark.parametrize("options", [{}, {"noise_shape": (None, 1)}, {"inplace": True}, {"p": 1.0}], ids=str)
def test_seed_kept_is_a_few_bytes(kind, options):
    for layout in (lambda x: x, lambda x: x.t()):
        x = layout(torch.randn(300, 200, dtype=kind, requires_grad=True) * 1)
        with saved_tensors() as kept:
            fdt.dropout(x, store="seed", **options)
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept) <= 64


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x.conj(), lambda x: x.t()], ids=["plain", "conj", "transposed"]
)
def test_input_is_not_kept(store, view):
    leaf = torch.randn(30, 40, dtype=torch.complex64, requires_grad=True)
    x = leaf * 1
    with saved_tensors() as kept:
        y = fdt.dropout(view(x), 0.5, store=store)
    assert kept
    assert all(tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for tensor in kept)
    freed = weakref.ref(x)
    del x
    gc.collect()
    assert freed() is None
    y.real.sum().backward()
    assert leaf.grad.shape == (30, 40)


@pytest.mark.parametrize("store", STORES)
def test_output_is_not_kept(store):
    leaf = torch.randn(30, 40, requires_grad=True)
    y = fdt.dropout(leaf, 0.5, store=store)
    node, freed = y.grad_fn, weakref.ref(y)
    del y
    gc.collect()
    assert freed() is None
    assert node is not None


@pytest.mark.parametrize("options", [{}, {"store": "seed"}, {"noise_shape": (1, None)}], ids=str)
def test_nothing_is_kept_where_no_gradient_is_wanted(options):
    x = torch.ones(5, 6)
    with saved_tensors() as kept:
        fdt.dropout(x, **options)
        with torch.no_grad():
            fdt.dropout(x.clone().requires_grad_(), **options)
        fdt.dropout(x.clone().requires_grad_(), training=False, **options)
        fdt.dropout(x.clone().requires_grad_(), 0.0, **options)
    assert not kept


def test_saved_tensors_may_be_packed():
    """Hooks that move what is saved elsewhere, as save_on_cpu does."""
    x = torch.ones(500, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().tobytes(), lambda b: unpacked(b)):
        y = fdt.dropout(x, 0.5)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    with torch.autograd.graph.save_on_cpu():
        y = fdt.dropout(x, 0.5, store="seed")
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())


def unpacked(data):
    return torch.frombuffer(bytearray(data), dtype=torch.int32)


# ---- autograd ----


@pytest.mark.parametrize("options", [{}, {"noise_shape": (1, None)}, {"p": 1.0}], ids=str)
def test_no_grad_and_inference_mode_give_the_same_numbers(backend, options):
    x = torch.randn(50, 60, requires_grad=True)
    wanted = fdt.dropout(x, seed=3, **options).detach()
    with torch.no_grad():
        y = fdt.dropout(x, seed=3, **options)
    assert not y.requires_grad
    assert y.grad_fn is None
    assert torch.equal(y, wanted)
    for layout in (lambda x: x, lambda x: x.t().contiguous().t()):
        with torch.inference_mode():
            inputs = [layout(x), layout(x * 1), layout(x.detach())]
            for z in inputs:
                y = fdt.dropout(z, seed=3, **options)
                assert y.is_inference()
                assert not y.requires_grad
                assert torch.equal(y, wanted)
            part = inputs[1]
            assert fdt.dropout(part, seed=3, inplace=True, **options) is part
            assert torch.equal(part, wanted)


@pytest.mark.parametrize("options", [{}, {"noise_shape": (1, None)}, {"store": "seed"}], ids=str)
def test_inference_tensor_outside_of_inference_mode(options):
    with torch.inference_mode():
        x = torch.randn(50, 60)
    y = fdt.dropout(x, seed=3, **options)
    assert not y.is_inference()
    w = torch.ones(50, 60, requires_grad=True)
    (y * w).sum().backward()
    assert torch.equal(w.grad, fdt.dropout(x.clone(), seed=3, **options))


def test_first_call_of_a_thread_may_be_in_inference_mode():
    """What a thread keeps for its later calls must not be an inference tensor."""

    def run():
        with torch.inference_mode():
            fdt.dropout(torch.ones(40), 0.5)
        x = torch.ones(40, requires_grad=True)
        y = fdt.dropout(x, 0.5)
        y.sum().backward()
        return torch.equal(x.grad, y.detach())

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result()


@pytest.mark.parametrize("kind", [*FLOATS, *COMPLEX], ids=str)
def test_requires_grad_follows_the_input(kind):
    x = torch.ones(40, dtype=kind)
    assert not fdt.dropout(x).requires_grad
    assert fdt.dropout(x).is_leaf
    y = fdt.dropout(x.requires_grad_())
    assert y.requires_grad
    assert not y.is_leaf


def test_parameter_gives_a_tensor_and_gets_a_gradient():
    x = torch.nn.Parameter(torch.ones(40))
    y = fdt.dropout(x, 0.5)
    assert type(y) is torch.Tensor
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert type(fdt.dropout(torch.nn.Buffer(torch.ones(4)), 0.5)) is torch.Tensor


@pytest.mark.parametrize("store", STORES)
def test_gradients_of_several_inputs(store):
    x, unused, other = (torch.ones(40, requires_grad=True) for _ in range(3))
    y = fdt.dropout(x, 0.5, store=store)
    dx, none, dother = torch.autograd.grad((y + other).sum(), [x, unused, other], allow_unused=True)
    assert torch.equal(dx, y.detach())
    assert none is None
    assert torch.equal(dother, torch.ones(40))
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(fdt.dropout(x, store=store).sum(), [unused])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", [torch.float32, torch.complex64], ids=str)
def test_backward_twice_needs_the_graph_retained(store, kind):
    x = torch.ones(40, dtype=kind, requires_grad=True)
    y = fdt.dropout(x, 0.5, store=store)
    y.real.sum().backward(retain_graph=True)
    y.real.sum().backward()
    assert torch.equal(x.grad, 2 * y.detach())
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        y.real.sum().backward()


@pytest.mark.parametrize("store", STORES)
def test_hooks_on_the_output_run(store):
    x = torch.ones(40, requires_grad=True)
    y = fdt.dropout(x, 0.5, store=store)
    y.retain_grad()
    seen = []
    y.register_hook(lambda dy: dy * 3)
    y.grad_fn.register_prehook(lambda dy: seen.append("before"))
    y.grad_fn.register_hook(lambda dx, dy: seen.append("after"))
    y.sum().backward()
    assert torch.equal(x.grad, 3 * y.detach())
    assert torch.equal(y.grad, torch.full((40,), 3.0))
    assert seen == ["before", "after"]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("noise_shape", [None, (1, None)])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_gradients_of_first_and_second_order(store, noise_shape, p):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for layout in (lambda x: x, lambda x: x.t()):

        def function(x, layout=layout):
            return fdt.dropout(layout(x), p, seed=1, store=store, noise_shape=noise_shape)

        assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda x, function=function: function(x) ** 3, x)


@pytest.mark.parametrize("store", STORES)
def test_gradient_penalty(store):
    """A loss of a gradient: backward under create_graph."""
    x = torch.randn(100, dtype=torch.float64, requires_grad=True)
    scale = fdt.dropout(torch.ones(100, dtype=torch.float64), 0.5, seed=1)
    results = []
    for drop in (lambda x: fdt.dropout(x, 0.5, seed=1, store=store), lambda x: x * scale):
        (dx,) = torch.autograd.grad(drop(x.sin()).pow(2).sum(), x, create_graph=True)
        results += torch.autograd.grad(dx.pow(2).sum(), x)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("store", STORES)
def test_checkpoint_draws_the_same_mask_again(reentrant, store):
    """And leaves the generator where it would be without a checkpoint."""
    x = torch.ones(1000, requires_grad=True)
    seen = []

    def block(x):
        y = fdt.dropout(fdt.dropout(x, 0.5, store=store), 0.3, store=store)
        seen.append(y.detach())
        return y * y

    def step():
        block_output = checkpoint(block, x, use_reentrant=reentrant)
        block_output.sum().backward()
        return block_output

    assert numbers_drawn(step) == 2
    first, again = seen
    assert torch.equal(first, again)
    torch.testing.assert_close(x.grad, 2 * first**2)


def test_autocast_keeps_the_dtype():
    x = torch.ones(40, 40, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fdt.dropout(x).dtype is F.dropout(x).dtype is torch.float32
        h = x @ x
        y = fdt.dropout(h)
        assert y.dtype is h.dtype is torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype is torch.float32


def test_anomaly_mode_finds_no_anomaly():
    """Of a dropped NaN nothing is left in the gradient."""
    x = torch.full((100,), math.nan, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        fdt.dropout(x, 1.0).sum().backward()
    assert torch.equal(x.grad, torch.zeros(100))


def test_other_default_device_and_dtype_are_no_matter():
    x = torch.ones(40, requires_grad=True)
    wanted = fdt.dropout(x, 0.5, seed=3).detach()
    with torch.device("meta"):
        torch.manual_seed(0)
        y = fdt.dropout(x, 0.5)
        assert y.device.type == "cpu"
        for store in STORES:
            z = fdt.dropout(x, 0.5, seed=3, store=store)
            assert torch.equal(z, wanted)
            assert torch.equal(torch.autograd.grad(z.sum(), x)[0], wanted)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(fdt.dropout(x, 0.5, seed=3), wanted)
    finally:
        torch.set_default_dtype(before)


def test_deterministic_algorithms_are_no_matter():
    """torch then fills new memory with NaN: none may be left over."""
    torch.use_deterministic_algorithms(True)
    try:
        for name, x in layouts(torch.float32):
            y = fdt.dropout(x, 0.5, seed=3)
            assert torch.equal(y, fdt.dropout(plain(x), 0.5, seed=3)), name
            assert not y.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


# ---- the samples that torch ships ----


@pytest.fixture(scope="module")
def opinfo():
    """torch's own description of dropout with its sample inputs; importing it takes seconds."""
    pytest.importorskip("expecttest", reason="torch's own test samples need expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    (found,) = [op for op in op_db if op.name == "nn.functional.dropout"]
    return found


def sampled(op, kind):
    samples = list(op.sample_inputs("cpu", kind, requires_grad=True))
    assert len(samples) > 10
    for sample in samples:
        assert not sample.args
        yield sample, sample.kwargs.get("p", 0.5), sample.kwargs.get("training", True)
        sample = sample.noncontiguous()
        assert sample.input.dim() < 2 or not sample.input.is_contiguous()
        yield sample, sample.kwargs.get("p", 0.5), sample.kwargs.get("training", True)


def test_opinfo_samples_agree_with_torchs_dropout(opinfo):
    assert opinfo.supported_dtypes("cpu") <= set(FLOATS)
    for kind in FLOATS:
        for sample, p, training in sampled(opinfo, kind):
            x = sample.input
            torchs = opinfo(x, **sample.kwargs)
            ours = fdt.dropout(x, **sample.kwargs)
            assert (ours.shape, ours.dtype, ours.requires_grad) == (torchs.shape, kind, True)
            assert significant(ours) == significant(torchs)
            (dx,) = torch.autograd.grad(ours.sum(), x)
            if p in (0.0, 1.0) or not training:
                assert torch.equal(ours, torchs)
                assert torch.equal(dx, torch.autograd.grad(torchs.sum(), x)[0])
            else:
                assert ((ours == 0) | (ours == x * 2)).all()
                assert torch.equal(dx, (ours != 0).to(kind) * 2)
            changed = fdt.dropout(plain(x), inplace=True, seed=1, **sample.kwargs)
            assert torch.equal(changed, fdt.dropout(x, seed=1, **sample.kwargs))


def test_opinfo_samples_gradients(opinfo):
    for sample, _, _ in sampled(opinfo, torch.float64):
        for store in STORES:

            def function(x, store=store, options=sample.kwargs):
                return fdt.dropout(x, seed=1, store=store, **options)

            x = sample.input
            assert torch.autograd.gradcheck(
                function, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
            )
            assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True)


# ---- what torch's own test suite asks of dropout ----


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_mean_is_kept_forward_and_backward(inplace):
    """torch's bounds are 0.05; the seed makes these four standard errors."""
    for p in (0.1, 0.2, 0.5, 0.8):
        x = torch.full((1000, 50), 1 - p, requires_grad=True)
        y = fdt.dropout(x + 0, p, inplace=inplace, seed=1)
        y.backward(torch.full_like(x, 1 - p))
        error = 4 * math.sqrt(p * (1 - p) / x.numel())
        assert abs(y.mean().item() - (1 - p)) < error < 0.05
        assert abs(x.grad.mean().item() - (1 - p)) < error


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_discontiguous_input(memory_format):
    inp = torch.ones(2, 3, 3, 3)
    x = torch.empty(2, 3, 3, 6).to(memory_format=memory_format)[..., ::2]
    x.copy_(inp)
    for p in (0, 1e-10):
        assert torch.equal(fdt.dropout(x, p), inp)
    y = fdt.dropout(x, 0.5, seed=1)
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(y, fdt.dropout(inp, 0.5, seed=1))


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
def test_permuted_strides_and_mean_are_preserved(shift):
    for permutation in itertools.permutations(range(4)):
        x = torch.ones(2, 3, 4, 5).permute(permutation).contiguous().permute(*np.argsort(permutation).tolist())
        x = x[shift[0] :, shift[1] :]
        for p in (0.3, 0.5, 0.7):
            y = fdt.dropout(x, p, seed=1)
            assert y.permute(permutation).is_contiguous()
            assert not torch.equal(y, x)
            assert abs(y.mean().item() - 1) < 0.5
        assert torch.equal(fdt.dropout(x, 1e-10), x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_corner_cases_agree_with_native_dropout(training, p):
    for shape in ((5,), (), (2, 3, 4)):
        x, reference = (torch.ones(shape, requires_grad=True) for _ in range(2))
        y, y_reference = fdt.dropout(x, p, training), torch.native_dropout(reference, p, training)[0]
        y.sum().backward()
        y_reference.sum().backward()
        assert torch.equal(y, y_reference)
        assert torch.equal(x.grad, reference.grad)


@pytest.mark.parametrize("options", [{}, {"p": 1.0}, {"store": "seed"}, {"inplace": True}], ids=str)
def test_empty_input(backend, options):
    for shape in ((0,), (0, 5), (3, 0, 4)):
        for x in (torch.ones(shape), torch.ones(shape, requires_grad=True) * 1):
            y = fdt.dropout(x, **options)
            assert y.shape == shape
            if y.requires_grad:
                y.sum().backward()


def test_input_without_a_batch_axis_is_a_batch_of_one():
    x = torch.randn(3, 4, 5)
    assert torch.equal(fdt.dropout(x, seed=1), fdt.dropout(x[None], seed=1)[0])


def test_two_dimensions_drop_independently_of_each_other():
    """No row, column or diagonal is dropped as one."""
    y = fdt.dropout(torch.ones(64, 64), 0.5, seed=1)
    for lines in (y, y.t(), torch.stack([y.roll(i, 1)[:, 0] for i in range(64)])):
        assert lines.any(1).all()
        assert not lines.all(1).any()


def test_variants_agree_on_torch_tensors():
    """One mask for all backends and instruction sets."""
    x = torch.randn(20_001)
    results = {}
    for name in VARIANTS:
        with contextlib.suppress(pytest.skip.Exception), activated(name):
            results[name] = array_of(fdt.dropout(x, 0.1, seed=1))
    assert len(results) >= 2
    for name, y in results.items():
        assert_same_bits(y, results["numpy"], name)


# ---- saved tensors that hooks have changed ----


@pytest.mark.parametrize("n", [1000, 400_000])
def test_words_come_back_from_hooks_in_another_layout(backend, n):
    x = torch.ones(n, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.stack([t, t], 1)[:, 0], lambda t: t):
        y = fdt.dropout(x, 0.5, seed=1)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize(
    "change", [lambda t: t[:1].clone(), lambda t: t.long(), lambda t: t.float(), lambda t: t.to("meta")], ids=range(4)
)
def test_other_words_come_back_from_hooks(backend, change):
    """Refused, where kernels would read past the end or take other bits."""
    x = torch.ones(4000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(change, lambda t: t):
        y = fdt.dropout(x, 0.5, seed=1)
    with pytest.raises(ValueError, match=r"^words must be 125 int32 on cpu for 4000 cells, but got"):
        y.sum().backward()

"""Plain dropout of torch tensors: long inputs, every layout of memory, p and options as torch takes them, autograd.

What plain dropout has in common with the other kinds is tested in test_variants.py and test_gradients.py.
"""

from __future__ import annotations

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

from ...cases import DTYPES, LENGTHS, P, assert_same_bits

torch = pytest.importorskip("torch")

import torch.nn.functional as F

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


# ---- the values NumPy gets ----


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


def assert_is_numpys(array, gradient, p, seed, **options):
    """Output and gradient, with either store and without a gradient."""
    wanted, mask = fd.dropout(array, p, rng=seed, **options)
    for store in STORES:
        x = tensor_of(array).requires_grad_()
        y = fdt.dropout(x, p, seed=seed, store=store, **options)
        y.backward(tensor_of(gradient))
        what = array.dtype, array.shape, p, store
        assert_same_bits(array_of(y), wanted, what)
        assert_same_bits(array_of(x.grad), fd.dropout_backward(gradient, mask), what)
        assert_same_bits(array_of(x), array, what)
        assert_same_bits(array_of(fdt.dropout(x.detach(), p, seed=seed, store=store, **options)), wanted, what)


@pytest.mark.parametrize("p", [0.5, 0.1, 0.003, 1.0])
def test_dropout_equals_numpy(variant, dtype, p):
    """At the lengths where blocks, chunks and threads begin, special values included."""
    for n in LENGTHS if p == 0.1 else LENGTHS[-4:-2]:
        assert_is_numpys(public(dtype, n), public(dtype, n, reverse=True), p, n)


def test_dropout_equals_numpy_at_every_p(backend):
    for p in (*P, 1 - 2.0**-32, 2.0**-32, 1.0):
        array = DTYPES[0].numbers(5000)
        assert_same_bits(array_of(fdt.dropout(tensor_of(array), p, seed=7)), fd.dropout(array, p, rng=7)[0])


@pytest.mark.parametrize(("shape", "noise_shape"), NOISE, ids=str)
def test_dropout_equals_numpy_under_a_noise_shape(variant, shape, noise_shape):
    for dtype, p in itertools.product((DTYPES[0], DTYPES[3]), (0.5, 0.1, 1.0)):
        array, gradient = (np.asarray(dtype.numbers(shape, seed=i), dtype.public) for i in range(2))
        assert_is_numpys(array, gradient, p, 5, noise_shape=noise_shape)


def test_gradient_of_complex_numbers_is_right():
    for kind, store in itertools.product(COMPLEX, STORES):
        x, w = torch.randn(50, dtype=kind, requires_grad=True), torch.randn(50, dtype=kind)
        (fdt.dropout(x, 0.4, seed=2, store=store) * w).abs().sum().backward()
        reference = x.detach().clone().requires_grad_()
        scale = torch.from_numpy(fd.draw_mask(50, 0.4, rng=2).to_bool()) / 0.6
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


def significant(x):
    """Strides, of axes where they mean something."""
    return [stride for stride, extent in zip(x.stride(), x.shape, strict=True) if extent > 1]


@pytest.mark.parametrize("kind", [*FLOATS, torch.complex64], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "noise_shape"])
def test_any_layout(backend, kind, shared):
    """Output and gradient, dy in that layout too, and in place: all are those of contiguous tensors.

    The strides of the result are those that torch's dropout gives.
    """
    for (name, x), store, p in itertools.product(layouts(kind), STORES, (0.3, 1.0)):
        options = {"p": p, "seed": 4, "noise_shape": [1, *[None] * (x.dim() - 1)] if shared and x.dim() else None}
        before, wanted, what = plain(x), fdt.dropout(plain(x), **options), (name, store, p)
        leaf = x.detach().requires_grad_()
        y = fdt.dropout(leaf, **options, store=store)
        for result in (y, fdt.dropout(x, **options, store=store)):
            assert_same_bits(array_of(plain(result)), array_of(wanted), what)
            assert result.stride() == torch.empty_like(x).stride(), what
            assert kind.is_complex or significant(result) == significant(F.dropout(x)), what
            assert not any((result.is_conj(), result.is_neg(), result._is_view() and not kind.is_complex)), what
        assert_same_bits(array_of(plain(x)), array_of(before), what)
        for dy in (torch.randn_like(before), x):
            (dx,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
            assert_same_bits(array_of(plain(dx)), array_of(fdt.dropout(plain(dy), **options)), what)
        if "expanded" in name or "windows" in name:
            continue
        version, strides = x._version, x.stride()
        assert fdt.dropout(x, inplace=True, **options, store=store) is x
        assert x.stride() == strides, what
        assert x._version > version, what
        assert_same_bits(array_of(plain(x)), array_of(wanted), what)


# ---- values ----


def test_smallest_p_that_drops():
    """2**-33 is half a step of the 32-bit threshold and rounds to nothing; the next number rounds to one step."""
    x, p = torch.ones(8), math.nextafter(2.0**-33, 1)
    assert fdt.dropout(x, 2.0**-33) is x
    assert fdt.dropout(x, p) is not x
    assert threshold(p) == 1


def test_bfloat16_is_unbiased():
    """Within sampling error, which is small enough to see that torch's own, whose scale is rounded, is not."""
    p, n = 0.1, 1 << 21
    x = torch.rand(n, generator=torch.Generator().manual_seed(0)).add_(1).to(torch.bfloat16)
    spread = x.double().square().mean() / x.double().mean() ** 2
    error = 4 * math.sqrt(p / (1 - p) / n * spread)
    ratio = fdt.dropout(x, p, seed=0).double().mean() / x.double().mean()
    assert abs(ratio - 1) < error < 0.0016


# ---- p ----


def test_what_drops_nothing_is_the_very_same_object():
    """Of integers as well, as in torch's dropout."""
    leaf = torch.randn(4, 5, requires_grad=True)
    inputs = [leaf, leaf * 1, leaf.detach(), leaf.t()[:, :], leaf.detach().conj(), torch.nn.Parameter(leaf.detach())]
    inputs += [torch.ones(4, 5, dtype=kind) for kind in (torch.int64, torch.bool, torch.complex64, torch.float16)]
    nothing = [{"p": p} for p in (0.0, 0, torch.tensor(0.0), 1e-10, 2.0**-33)]
    nothing += [{"training": False}, {"p": 1.0, "training": False}, {"training": False, "seed": 1}]
    nothing += [{"p": 0.0, "store": "seed"}, {"p": 0.0, "noise_shape": (1, None)}]
    for options, inplace, x in itertools.product(nothing, (False, True), inputs):
        before, results = x._version, []
        call = functools.partial(fdt.dropout, x, inplace=inplace, **options)
        assert numbers_drawn(lambda call=call, to=results: to.append(call())) == 0
        assert results[0] is x
        assert x._version == before


def test_p_may_be_any_number():
    """A bool too, as for torch's dropout."""
    x = torch.ones(1000)
    for p, same in (
        (1, 1.0),
        (torch.tensor(0.1), float(torch.tensor(0.1))),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor([0.25]), 0.25),
        (np.float32(0.25), 0.25),
        (Fraction(1, 4), 0.25),
        (True, 1.0),
        (torch.tensor(True), 1.0),
        (False, 0.0),
    ):
        assert torch.equal(fdt.dropout(x, p, seed=1), fdt.dropout(x, same, seed=1))


BAD_P = (-0.1, 1.1, -5e-324, math.nextafter(1, 2), math.inf, -math.inf, 2, -1, 10**30, np.float32("nan"))


@pytest.mark.parametrize("p", BAD_P, ids=str)
def test_p_is_refused_as_by_torchs_dropout(p):
    """torch's lets a NaN pass."""
    forms = [p] if isinstance(p, int) and p > 2**60 else [p, torch.tensor(float(p), dtype=torch.float64)]
    for form, training, inplace in itertools.product(forms, (True, False), (True, False)):
        x, text = torch.ones(12), "^dropout probability has to be between 0 and 1, but got nan$"
        if p == p:
            with pytest.raises(ValueError, match="between 0 and 1") as torchs:
                F.dropout(x, form, training, inplace)
            text = f"^{re.escape(str(torchs.value))}$"
        untouched(x, functools.partial(fdt.dropout, x, form, training, inplace), ValueError, text)


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
def test_bad_options_are_refused(options, error, match):
    for inplace in (False, True):
        drop = functools.partial(fdt.dropout, inplace=inplace, **options)
        x, own, complex_ = torch.ones(2, 3, 4), torch.ones(3, 4).requires_grad_() * 1, torch.ones(3, 4) + 0j
        mapped = torch.func.vmap(drop, randomness="different")
        for y, call in ((x, mapped), (x[0], drop), (own, drop), (complex_.conj(), drop)):
            untouched(y, functools.partial(call, y), error, match)


# ---- in place ----

VIEWS = (
    lambda x: x,
    lambda x: x[1:],
    lambda x: x.t(),
    lambda x: x[:, ::2],
    lambda x: x.view(-1),
    lambda x: x.conj(),
    lambda x: x.real,
    lambda x: x.conj().imag,
)


@pytest.mark.parametrize("view", VIEWS, ids=range(len(VIEWS)))
def test_inplace_gradient_reaches_through_views(view):
    """Of a tensor part of which was dropped in place, against the same out of place."""
    leaf = torch.randn(4, 6, dtype=torch.complex128, requires_grad=True)
    probe = view(leaf.detach())
    for store, shared in itertools.product(STORES, (False, True)):
        options = {"p": 0.4, "seed": 6, "noise_shape": [1, *[None] * (probe.dim() - 1)] if shared else None}
        scale = fdt.dropout(torch.ones(probe.shape, dtype=torch.float64), **options)
        results = []
        for change in (
            lambda x: fdt.dropout(x, inplace=True, store=store, **options),  # noqa: B023
            lambda x: x.mul_(scale),  # noqa: B023
        ):
            base = leaf * 1
            part = view(base)
            assert change(part) is part
            real = torch.view_as_real(base.resolve_conj())
            results.append((real.detach().clone(), *torch.autograd.grad(real.pow(3).sum() + real[0].sum(), leaf)))
        torch.testing.assert_close(*results)


def no_grad(function):
    def call(x):
        with torch.no_grad():
            return function(x)

    return call


REFUSED = {
    "leaf": lambda leaf: leaf,
    "parameter": lambda leaf: torch.nn.Parameter(leaf.detach()),
    "view of a leaf": lambda leaf: leaf.view(2, 6),
    "transposed view of a leaf": lambda leaf: leaf.view(2, 6).t(),
    "one of several views": lambda leaf: (leaf * 1).view(2, 6).unbind()[0],
    "view made under no_grad": lambda leaf: no_grad(lambda x: x.view(2, 6).requires_grad_())(leaf * 1),
    "view of a leaf made under no_grad": no_grad(lambda leaf: leaf.view(2, 6)),
    "expanded": lambda leaf: (leaf * 1).view(1, 12).expand(3, 12),
    "expanded constant": lambda leaf: torch.ones(3, 1).expand(3, 4),
    "expanded complex constant": lambda leaf: (torch.ones(3, 1) + 0j).expand(3, 4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inplace_is_refused_where_torch_refuses_it(name):
    """In torch's words, with nothing written and nothing drawn."""
    for options in ({}, {"p": 1.0}, {"store": "seed"}, {"noise_shape": (1, None)}):
        leaf = torch.ones(12, requires_grad=True)
        x = REFUSED[name](leaf)
        if x.dim() < 2 and "noise_shape" in options:
            continue
        match = "more than one element of the written-to tensor"
        if not x.is_complex():
            with pytest.raises(RuntimeError) as torchs:
                F.dropout(x, 0.5, True, True)
            match = re.escape(str(torchs.value))
        untouched(x, functools.partial(fdt.dropout, x, inplace=True, **options), RuntimeError, match)
        assert (leaf == 1).all()


def test_inplace_of_a_leaf_is_allowed_without_gradient():
    x = torch.ones(100, requires_grad=True)
    with torch.no_grad():
        assert fdt.dropout(x, 0.5, inplace=True) is x
    assert x.requires_grad
    assert x.is_leaf
    assert set(x.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t(), lambda x: x[1:]], ids=["itself", "transposed", "rows"])
def test_inference_tensors_outside_of_inference_mode(view):
    """In place they are refused by torch's rule, because nothing tracks their version."""
    with torch.inference_mode():
        x, torchs = torch.ones(5, 8), torch.ones(5, 8)
    for function, tensor in ((F.dropout, torchs), (fdt.dropout, x)):
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
            function(view(tensor), 0.5, True, True)
    assert (x == 1).all()
    y = fdt.dropout(view(x), seed=3)
    assert not y.is_inference()
    w = torch.ones(y.shape, requires_grad=True)
    (y * w).sum().backward()
    assert torch.equal(w.grad, fdt.dropout(view(x).clone(), seed=3))


# ---- where masks come from ----


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


def test_fork_rng_and_set_state_take_masks_back():
    x = torch.ones(5000)
    with torch.random.fork_rng():
        inside = fdt.dropout(x)
    assert torch.equal(fdt.dropout(x), inside)
    state = torch.get_rng_state()
    y = fdt.dropout(x)
    torch.set_rng_state(state)
    assert torch.equal(fdt.dropout(x), y)


@pytest.mark.parametrize("noise_shape", [None, (1, None)])
def test_kernels_get_torchs_number_of_threads(compiled, noise_shape, monkeypatch):
    """And fastdrop's own number stays."""
    seen = []
    for name in ("dropout_forward", "draw_bits", "masked_affine"):
        for entry in (name, f"{name}_at"):
            if hasattr(compiled, entry):
                kernel = getattr(compiled, entry)

                def spy(*arguments, kernel=kernel, entry=entry):
                    seen.append(arguments[0] if entry.endswith("_at") else compiled._num_threads)
                    return kernel(*arguments)

                monkeypatch.setattr(compiled, entry, spy)
    fd.set_num_threads(3)
    for threads in (1, 2):
        seen.clear()
        torch.set_num_threads(threads)
        x = torch.ones(10, 30_000, requires_grad=True)
        fdt.dropout(x, 0.1, noise_shape=noise_shape).sum().backward()
        assert len(seen) >= 2
        assert set(seen) == {threads}
        assert fd.get_num_threads() == 3
        assert getattr(compiled, "_num_threads", 3) == 3


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


@pytest.mark.parametrize("shape", [(0,), (), (1,), (32,), (33,), (7, 1001), (1001, 7)], ids=str)
def test_bits_kept_are_one_per_element_and_nothing_else(shape):
    for kind, inplace in itertools.product((torch.float32, torch.bfloat16, torch.complex64), (False, True)):
        leaf = torch.randn(shape, dtype=kind, requires_grad=True)
        for layout in (lambda x: x, lambda x: x.mT if x.dim() > 1 else x):
            x = layout(leaf * 1)
            with saved_tensors() as kept:
                fdt.dropout(x, 0.1, inplace=inplace)
            assert sum(t.untyped_storage().nbytes() for t in kept) == math.ceil(math.prod(shape) / 32) * 4


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.conj(), lambda x: x.t()], ids=["", "conj", "transposed"])
def test_input_and_output_are_not_kept(store, view):
    leaf = torch.randn(30, 40, dtype=torch.complex64, requires_grad=True)
    x = leaf * 1
    with saved_tensors() as kept:
        y = fdt.dropout(view(x), 0.5, store=store)
    assert kept
    assert all(tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for tensor in kept)
    total, freed = y.real.sum(), [weakref.ref(x), weakref.ref(y)]
    del x, y
    gc.collect()
    assert [reference() for reference in freed] == [None, None]
    total.backward()
    assert leaf.grad.shape == (30, 40)


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


@pytest.mark.parametrize("store", STORES)
def test_gradients_of_several_inputs_and_hooks_on_the_output(store):
    x, unused, other = (torch.ones(40, requires_grad=True) for _ in range(3))
    y = fdt.dropout(x, 0.5, store=store)
    dx, none, dother = torch.autograd.grad((y + other).sum(), [x, unused, other], allow_unused=True)
    assert torch.equal(dx, y.detach())
    assert none is None
    assert torch.equal(dother, torch.ones(40))
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


def test_anomaly_mode_finds_no_anomaly():
    """Of a dropped NaN nothing is left in the gradient."""
    x = torch.full((100,), math.nan, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        fdt.dropout(x, 1.0).sum().backward()
    assert torch.equal(x.grad, torch.zeros(100))


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


@pytest.mark.slow("test_any_layout and test_corner_cases_agree_with_native_dropout")
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


@pytest.mark.slow("test_derivatives_match_finite_differences")
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


def test_corner_cases_agree_with_native_dropout():
    for shape, p, training in itertools.product(((5,), (), (2, 3, 4)), (0.0, 1.0), (True, False)):
        x, reference = (torch.ones(shape, requires_grad=True) for _ in range(2))
        y, y_reference = fdt.dropout(x, p, training), torch.native_dropout(reference, p, training)[0]
        y.sum().backward()
        y_reference.sum().backward()
        assert torch.equal(y, y_reference)
        assert torch.equal(x.grad, reference.grad)


# ---- saved tensors that hooks have changed ----


@pytest.mark.parametrize("n", [1000, 400_000])
def test_words_come_back_from_hooks_in_another_layout(backend, n):
    x = torch.ones(n, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.stack([t, t], 1)[:, 0], lambda t: t):
        y = fdt.dropout(x, 0.5, seed=1)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_other_words_come_back_from_hooks(backend):
    """Refused, where kernels would read past the end or take other bits."""
    x = torch.ones(4000, requires_grad=True)
    for change in (lambda t: t[:1].clone(), lambda t: t.long(), lambda t: t.float(), lambda t: t.to("meta")):
        with torch.autograd.graph.saved_tensors_hooks(change, lambda t: t):
            y = fdt.dropout(x, 0.5, seed=1)
        with pytest.raises(ValueError, match=r"^words must be 125 int32 on cpu for 4000 cells, but got"):
            y.sum().backward()

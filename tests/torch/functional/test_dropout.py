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

from ..cases import array_of, assert_equal, saved_tensors, tensor_of, untouched

# torch's own, when it first loads what forward-mode AD needs
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

STORES = ("bits", "seed")


def plain(x):
    """A C-contiguous copy with no conjugate or negative bit: x as plainly as it can be had."""
    return x.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


# ---- the values NumPy gets ----


def assert_is_numpys(array, p, seed, **options):
    """Output and gradient, with either store and without a gradient."""
    wanted, mask = fd.dropout(array, p, rng=seed, **options)
    gradient = np.ascontiguousarray(array[..., ::-1]) if array.ndim else array
    for store in STORES:
        x = tensor_of(array).requires_grad_()
        y = fdt.dropout(x, p, seed=seed, store=store, **options)
        y.backward(tensor_of(gradient))
        what = array.shape, p, store
        assert_same_bits(array_of(y), wanted, what)
        assert_same_bits(array_of(x.grad), fd.dropout_backward(gradient, mask), what)
        assert_same_bits(array_of(fdt.dropout(x.detach(), p, seed=seed, store=store, **options)), wanted, what)


def test_dropout_equals_numpy(backend):
    """At the lengths where blocks, chunks and threads begin, special values included; and at every p."""
    for n in LENGTHS:
        assert_is_numpys(DTYPES[0].data(n), 0.1, n)
    for p in (*P, 1 - 2.0**-32, 2.0**-32, 1.0):
        assert_is_numpys(DTYPES[0].data(5000), p, 7)


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


def test_dropout_equals_numpy_under_a_noise_shape(backend):
    for shape, noise_shape in NOISE:
        for dtype, p in ((DTYPES[0], 0.1), (DTYPES[3], 0.5), (DTYPES[0], 1.0)):
            assert_is_numpys(np.asarray(dtype.numbers(shape), dtype.public), p, 5, noise_shape=noise_shape)


def test_gradient_of_complex_numbers_is_right():
    for kind, store in itertools.product((torch.complex64, torch.complex128), STORES):
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
# Made of complex numbers: parts of them, and conjugates.
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


def make_of(dtype):
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, dtype=dtype, generator=generator)


def layouts(dtype):
    """(name, tensor) of every layout of float32 or complex64."""
    of_complex = CONJUGATES if dtype.is_complex else PARTS
    yield from ((name, layout(make_of(dtype))) for name, layout in LAYOUTS.items())
    yield from ((name, layout(make_of(torch.complex64))) for name, layout in of_complex.items())


def significant(x):
    """Strides, of axes where they mean something."""
    return [stride for stride, extent in zip(x.stride(), x.shape, strict=True) if extent > 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "noise_shape"])
def test_any_layout(backend, dtype, shared):
    """Output and gradient, dy in that layout too, and in place: all are those of contiguous tensors.

    The strides of the result are those that torch's dropout gives.
    """
    for (name, x), (store, p) in itertools.product(layouts(dtype), (("bits", 0.3), ("seed", 0.3), ("bits", 1.0))):
        options = {"p": p, "seed": 4, "noise_shape": [1, *[None] * (x.dim() - 1)] if shared and x.dim() else None}
        before, wanted, what = plain(x), fdt.dropout(plain(x), **options), (name, store, p)
        leaf = x.detach().requires_grad_()
        y = fdt.dropout(leaf, **options, store=store)
        for result in (y, fdt.dropout(x, **options, store=store)):
            assert_same_bits(array_of(plain(result)), array_of(wanted), what)
            assert result.stride() == torch.empty_like(x).stride(), what
            assert dtype.is_complex or significant(result) == significant(F.dropout(x)), what
            assert not any((result.is_conj(), result.is_neg(), result._is_view() and not dtype.is_complex)), what
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


# ---- p ----


def test_smallest_p_that_drops():
    """2**-33 is half a step of the 32-bit threshold and rounds to nothing; the next number rounds to one step."""
    x, p = torch.ones(8), math.nextafter(2.0**-33, 1)
    assert fdt.dropout(x, 2.0**-33) is x
    assert fdt.dropout(x, p) is not x
    assert threshold(p) == 1


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


@pytest.mark.parametrize("p", [-0.1, -5e-324, math.nextafter(1, 2), math.inf, 2, 10**30], ids=str)
def test_p_is_refused_as_by_torchs_dropout(p):
    for form in [p] if isinstance(p, int) else [p, torch.tensor(p, dtype=torch.float64)]:
        x = torch.ones(12)
        with pytest.raises(ValueError, match="between 0 and 1") as torchs:
            F.dropout(x, form)
        for training, inplace in itertools.product((True, False), repeat=2):
            call = functools.partial(fdt.dropout, x, form, training, inplace)
            untouched(x, call, ValueError, f"^{re.escape(str(torchs.value))}$")


# ---- other bad input ----

BAD = {
    "seed negative": ({"seed": -1}, ValueError, "seed must be from 0 to 2.*64 - 1, but got -1"),
    "seed too large": ({"seed": 2**64}, ValueError, "seed must be from 0 to 2.*64 - 1, but got 18446744073709551616"),
    "seed float": ({"seed": 1.0}, TypeError, "seed must be an int, but got float"),
    "seed bool": ({"seed": True}, TypeError, "seed must be an int, but got bool"),
    "seed int32": ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "seed must be .*int64.*got.*int32"),
    "seed float tensor": ({"seed": torch.tensor(1.0)}, TypeError, "seed must be .*int64.*got.*float32"),
    "seed of three": ({"seed": torch.tensor([1, 2, 3])}, ValueError, r"seed must be one number, or two, .*\(3,\)"),
    "seed of none": ({"seed": torch.ones(0, dtype=torch.int64)}, ValueError, r"seed must be one number, .*\(0,\)"),
    "seed and generator": ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator"),
    "generator int": ({"generator": 5}, TypeError, "generator"),
    "generator of NumPy": ({"generator": np.random.default_rng(0)}, TypeError, "generator"),
    "store": ({"store": "bytes"}, ValueError, "store must be one of 'bits', 'seed', but got 'bytes'"),
    "noise_shape extent": ({"noise_shape": (2, None)}, ValueError, r"noise_shape must be 1, .*\(3, 4\).*\(2, None\)"),
    "noise_shape short": ({"noise_shape": (1,)}, ValueError, r"noise_shape must have one entry per axis.*\(1,\)"),
    "noise_shape long": ({"noise_shape": (1, 1, 1)}, ValueError, "noise_shape must have one entry per axis"),
    "noise_shape negative": ({"noise_shape": (-1, None)}, ValueError, "noise_shape must not have negative"),
    "noise_shape int": ({"noise_shape": 1}, TypeError, "noise_shape must be None or a tuple.*got 1"),
    "noise_shape float": ({"noise_shape": (1.0, None)}, TypeError, "noise_shape must be"),
}


@pytest.mark.parametrize(("options", "error", "match"), BAD.values(), ids=BAD)
def test_bad_options_are_refused(options, error, match):
    """Whichever way the call takes."""
    for inplace in (False, True):
        drop = functools.partial(fdt.dropout, inplace=inplace, **options)
        x, own, complex_ = torch.ones(2, 3, 4), torch.ones(3, 4).requires_grad_() * 1, torch.ones(3, 4) + 0j
        mapped = torch.func.vmap(drop, randomness="different")
        for y, call in ((x, mapped), (x[0], drop), (own, drop), (complex_.conj(), drop)):
            untouched(y, functools.partial(call, y), error, match)


# ---- in place ----

VIEWS = {
    "itself": lambda x: x,
    "rows": lambda x: x[1:],
    "transposed": lambda x: x.t(),
    "stepped": lambda x: x[:, ::2],
    "conjugate": lambda x: x.conj(),
    "real": lambda x: x.real,
    "negative": lambda x: x.conj().imag,
}


@pytest.mark.parametrize("name", VIEWS)
def test_inplace_gradient_reaches_through_views(name):
    """Of a tensor part of which was dropped in place, against the same out of place."""
    view = VIEWS[name]
    leaf = torch.randn(4, 6, dtype=torch.complex128, requires_grad=True)
    for store, noise_shape in (("bits", None), ("seed", (1, None))):
        options = {"p": 0.4, "seed": 6, "noise_shape": noise_shape}
        scale = fdt.dropout(torch.ones(view(leaf.detach()).shape, dtype=torch.float64), **options)
        results = []
        for change in (
            functools.partial(fdt.dropout, inplace=True, store=store, **options),
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
    for options in ({}, {"p": 1.0, "store": "seed"}):
        leaf = torch.ones(12, requires_grad=True)
        x = REFUSED[name](leaf)
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


def test_inference_tensors_outside_of_inference_mode():
    """In place they are refused by torch's rule, because nothing tracks their version."""
    for view in (lambda x: x, lambda x: x.t()):
        with torch.inference_mode():
            x, torchs = torch.ones(5, 8), torch.ones(5, 8)
        for function, tensor in ((F.dropout, torchs), (fdt.dropout, x)):
            with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
                function(view(tensor), 0.5, True, True)
        y = fdt.dropout(view(x), seed=3)
        assert not y.is_inference()
        w = torch.ones(y.shape, requires_grad=True)
        (y * w).sum().backward()
        assert torch.equal(w.grad, fdt.dropout(torch.ones(y.shape), seed=3))


# ---- where masks come from ----


def test_seed_is_the_63_bits_that_torch_draws():
    """Whichever way the call takes."""
    x = torch.randn(6, 7)
    for leaf in (x, x.clone().requires_grad_(), x.t(), x.to(torch.complex64).conj()):
        torch.manual_seed(11)
        y = fdt.dropout(leaf)
        torch.manual_seed(11)
        seed = torch.empty((), dtype=torch.int64).random_()
        assert 0 <= int(seed) < 2**63
        assert torch.equal(y, fdt.dropout(leaf, seed=seed))


def test_kernels_get_torchs_number_of_threads(compiled, monkeypatch):
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
    for threads, noise_shape in itertools.product((1, 2), (None, (1, None))):
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


@pytest.mark.parametrize("store", STORES)
def test_input_and_output_are_not_kept(store):
    for view in (lambda x: x, lambda x: x.conj(), lambda x: x.t()):
        leaf = torch.randn(30, 40, dtype=torch.complex64, requires_grad=True)
        x = leaf * 1
        with saved_tensors() as kept:
            y = fdt.dropout(view(x), 0.5, store=store)
        assert sum(t.untyped_storage().nbytes() for t in kept) == (8 if store == "seed" else math.ceil(1200 / 32) * 4)
        total, freed = y.real.sum(), [weakref.ref(x), weakref.ref(y)]
        del x, y
        gc.collect()
        assert [reference() for reference in freed] == [None, None]
        total.backward()
        assert leaf.grad.shape == (30, 40)


def test_hooks_may_move_what_is_kept(backend):
    """As `save_on_cpu` does; into another layout too. Other words are refused, not read past their end."""
    x = torch.ones(4000, requires_grad=True)

    def run(pack, unpack, **options):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = fdt.dropout(x, 0.5, seed=1, **options)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    def as_bytes(t):
        return t.dtype, t.numpy().tobytes()

    def of_bytes(packed):
        dtype, data = packed
        words = torch.frombuffer(bytearray(data), dtype=dtype)
        return words if dtype is torch.int32 else words[0]

    assert_equal(*run(as_bytes, of_bytes))
    assert_equal(*run(as_bytes, of_bytes, store="seed"))
    assert_equal(*run(lambda t: torch.stack([t, t], 1)[:, 0], lambda t: t))
    for change in (lambda t: t[:1].clone(), lambda t: t.long(), lambda t: t.to("meta")):
        with pytest.raises(ValueError, match=r"^words must be 125 int32 on cpu for 4000 cells, but got"):
            run(change, lambda t: t)


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

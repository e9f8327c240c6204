"""Subclasses of ndarray, arrays that overlap, and arrays over memory that something else owns."""

from __future__ import annotations

import gc
import itertools
import types

import numpy as np
import pytest

import fastdrop as fd

from ..cases import assert_same_bits

SHAPE = (3, 4)
X = np.arange(1, 13, dtype=np.float32).reshape(SHAPE)
VECTOR = np.ones(4, np.float32)
SHARED = fd.draw_mask((1, 4), 0.5, rng=1)

# Every call by its arrays, of shape (3, 4) or (4,); those in place of out come last.
CALLS = {
    "dropout": lambda x, **out: fd.dropout(x, 0.5, rng=0, **out)[0],
    "seed": lambda x, **out: fd.dropout(x, 0.5, rng=0, store="seed", **out)[0],
    "noise_shape": lambda x, **out: fd.dropout(x, 0.5, rng=0, noise_shape=(1, 4), **out)[0],
    "p=0": lambda x, **out: fd.dropout(x, 0.0, rng=0, **out)[0],
    "p=1": lambda x, **out: fd.dropout(x, 1.0, rng=0, **out)[0],
    "apply_mask": lambda x, **out: fd.apply_mask(x, SHARED, **out),
    "gaussian_dropout": lambda x, **out: fd.gaussian_dropout(x, 0.5, rng=0, **out)[0],
    "dropout_add": lambda x, r, **out: fd.dropout_add(x, r, 0.5, rng=0, **out)[0],
    "bias_dropout_add": lambda x, r, b, **out: fd.bias_dropout_add(x, b, r, 0.5, rng=0, **out)[0],
    "bias_act_dropout": lambda x, b, **out: fd.bias_act_dropout(x, b, 0.5, "gelu", rng=0, **out)[0],
    "swiglu_dropout": lambda x, r, **out: fd.swiglu_dropout(x, r, 0.5, rng=0, **out)[0],
    "softmax_dropout": lambda x, r, **out: fd.softmax_dropout(x, 0.5, 1.0, r, rng=0, **out)[0],
}
NORM = "dropout_add_layer_norm", lambda x, r, b: fd.dropout_add_layer_norm(x, r, b, b, 0.5, x_bias=b, rng=0)[0]
BACKWARD = "backward", lambda x, r: fd.dropout_add(r, r, 0.5, rng=0)[1].backward(x).x
ALL = CALLS | dict([NORM, BACKWARD])


def given(call, make=lambda array: array):
    names = call.__code__.co_varnames[: call.__code__.co_argcount]
    return [make({"x": X, "r": X[::-1], "b": VECTOR}[name].copy()) for name in names]


def refuse(self, *args, **more):
    raise AssertionError(args)


class Hostile(np.ndarray):
    """A class whose methods must not be called."""

    reshape = ravel = view = __getitem__ = __array_function__ = __array_ufunc__ = refuse


def subclass_of(kind, tmp_path):
    """A function that turns an array into an instance of a subclass, unless the subclass has no arrays of one axis."""
    numbers = itertools.count()

    def make(array):
        if array.ndim == 1 and kind in ("matrix", "memmap"):
            return array
        if kind != "memmap":
            return array.view({"matrix": np.matrix, "recarray": np.recarray, "hostile": Hostile}[kind])
        mapped = np.memmap(tmp_path / f"{next(numbers)}", array.dtype, "w+", shape=array.shape)
        mapped[...] = array
        return mapped

    return make


@pytest.mark.every_backend
@pytest.mark.parametrize("kind", ["matrix", "memmap", "recarray", "hostile"])
def test_subclasses_in_every_place_give_what_arrays_give(backend, kind, tmp_path):
    make = subclass_of(kind, tmp_path)
    for name, call in ALL.items():
        want = call(*given(call))
        arrays = given(call, make)
        got = call(*arrays)
        assert got is arrays[0] if name == "p=0" else type(got) is np.ndarray, name
        assert_same_bits(np.asarray(got), want, name)
        if name in CALLS:
            for out in (make(np.full(SHAPE, 7, np.float32)), arrays[0]):
                assert call(*arrays, out=out) is out, name
                assert_same_bits(np.asarray(out), want, name)


def test_words_of_a_subclass(backend, tmp_path):
    mask = fd.draw_mask(SHAPE, 0.5, rng=1)
    mapped = np.memmap(tmp_path / "words", np.uint32, "w+", shape=mask.words.shape)
    mapped[...] = mask.words
    for words in (mapped, mask.words.copy().view(Hostile)):
        assert_same_bits(fd.apply_mask(X, fd.PackedMask(words, SHAPE, 0.5)), fd.apply_mask(X, mask))


# ---- memory that overlaps ----


def layouts():
    """Yields arrays of many strides, and whether two of their elements share a byte, found by brute force."""
    for shape in ((3,), (2, 3), (2, 2, 2), (1, 3), (2, 0)):
        for strides in itertools.product((-8, -4, -2, 0, 2, 4, 5, 6, 8, 12), repeat=len(shape)):
            starts = [sum(i * s for i, s in zip(index, strides, strict=True)) for index in np.ndindex(*shape)]
            taken = [start + byte for start in starts for byte in range(4)]
            buffer = np.zeros(160, np.uint8)[64:]
            array = np.lib.stride_tricks.as_strided(buffer[:4].view(np.float32), shape, strides)
            yield array, len(set(taken)) < len(taken)


def test_outputs_that_overlap_themselves_are_found_exactly():
    for out, overlaps in layouts():
        x = np.ones(out.shape, np.float32)
        if overlaps:
            with pytest.raises(ValueError, match=r"^out must not have elements that overlap one another.*strides"):
                fd.dropout(x, 0.5, rng=0, out=out)
        else:
            fd.dropout(x, 0.5, rng=0, out=out)
            assert_same_bits(out, fd.dropout(x, 0.5, rng=0)[0])


def test_out_over_the_mask_is_refused():
    memory = np.zeros(16, np.float32)
    words = memory[:1].view(np.uint32)
    words[:] = fd.draw_mask(SHAPE, 0.5, rng=1).words
    mask, before = fd.PackedMask(words, SHAPE, 0.5), words.copy()
    with pytest.raises(ValueError, match=r"^out must be mask itself or not share memory"):
        fd.apply_mask(X, mask, out=memory[:12].reshape(SHAPE))
    assert (words == before).all()
    fd.apply_mask(X, mask, out=memory[1:13].reshape(SHAPE))


def test_a_view_with_other_strides_where_there_is_one_element_is_x_itself():
    x = np.arange(1, 5, dtype=np.float32)
    column = np.lib.stride_tricks.as_strided(x, (4, 1), (4, 400))
    want = fd.dropout(x.reshape(4, 1).copy(), 0.5, rng=0)[0]
    assert_same_bits(fd.dropout(x.reshape(4, 1), 0.5, rng=0, out=column)[0], want)


# ---- memory that is somebody else's ----


def test_memory_of_bytearrays_is_let_go_by_good_and_bad_calls(backend):
    """A bytearray can be resized only if no array uses its memory any more."""
    kept = []
    for name, call in ALL.items():
        owners = [bytearray(array.tobytes()) for array in (*given(call), X)]
        arrays = [np.frombuffer(owner, np.float32) for owner in owners]
        *arrays, out = [array.reshape(SHAPE) if array.size == 12 else array for array in arrays]
        call(*arrays, **({"out": out} if name in CALLS else {}))
        for bad in (out[:2], arrays[0].T) if name in CALLS else ():
            with pytest.raises((TypeError, ValueError)):
                call(*arrays, out=bad)
        with pytest.raises((TypeError, ValueError)):
            call(arrays[0].view(np.int32), *arrays[1:])
        bad = None
        del arrays, out
        kept += owners
    gc.collect()
    for owner in kept:
        owner.append(0)  # BufferError while it is exported


def test_primitives_let_go_of_what_they_refuse(c_variant):
    """If an argument is refused, the memory of those before it is released."""
    owner = bytearray(64)
    x = np.frombuffer(owner, np.float32)
    for bad in (None, types.SimpleNamespace(), "text", np.zeros((4, 8), np.float32)[:, ::2]):
        with pytest.raises((TypeError, ValueError, BufferError)):
            c_variant.masked_affine(0, x, x, bad, 0, 1, 1, 16, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="refused"):
        c_variant.masked_affine(9, x, x, x.view(np.uint32), 0, 1, 1, 16, 1.0, 0.0, 0.0)
    del x
    gc.collect()
    owner.append(0)

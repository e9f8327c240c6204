"""Masks as objects: the packed format, its size, conversions, comparison, pickling, refusals."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastdrop as fd
from fastdrop.core.mask import ALIGNED_FROM_WORDS

SIZES = (0, 1, 31, 32, 33, 1000, 32 * ALIGNED_FROM_WORDS - 1, 32 * ALIGNED_FROM_WORDS + 5)
LARGE = (5, 32 * ALIGNED_FROM_WORDS // 4 + 3)


@pytest.mark.parametrize("n", SIZES)
def test_packed_mask_nbytes(variant, n):
    """One bit per cell, and what the words are cut from counts too."""
    mask = fd.draw_mask(n, 0.5, rng=0)
    assert mask.nbytes == mask.words.nbytes == -(-n // 32) * 4
    base = mask.words if mask.words.base is None else mask.words.base
    assert base.nbytes <= -(-n // 32) * 4 + 64
    _, stored = fd.dropout(np.ones(n, np.float16), 0.5, rng=0)
    assert stored.nbytes == mask.nbytes


def test_packed_mask_words_are_little_endian_least_significant_first():
    keep = np.zeros(70, bool)
    keep[[0, 1, 31, 32, 69]] = True
    mask = fd.PackedMask.from_bool(keep, 0.5)
    assert mask.words.tolist() == [1 | 2 | 1 << 31, 1, 1 << 5]
    assert mask.words.dtype == np.uint32
    assert (np.unpackbits(mask.words.view(np.uint8), bitorder="little")[:70] == keep).all()


def test_packed_mask_properties():
    mask = fd.draw_mask((4, 30), 0.25, rng=0)
    assert (mask.shape, mask.p, mask.scale, mask.nbytes) == ((4, 30), 0.25, 1 / 0.75, 16)
    assert mask.kept == mask.to_bool().sum()
    assert mask.to_bool().shape == (4, 30)
    assert mask.to_bool().dtype == np.bool_


def test_packed_mask_cannot_be_assigned_to():
    mask = fd.draw_mask(4, 0.5, rng=0)
    for name in ("words", "shape", "p", "scale", "nbytes", "kept", "other"):
        with pytest.raises(AttributeError):
            setattr(mask, name, 1)


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)), st.floats(0, 0.99))
def test_packed_mask_from_bool_round_trips(keep, p):
    mask = fd.PackedMask.from_bool(keep, p)
    assert mask.shape == keep.shape
    assert mask.kept == keep.sum()
    assert (mask.to_bool() == keep).all()
    assert mask == fd.PackedMask(mask.words, mask.shape, p)


def test_packed_mask_from_bool_follows_the_logical_index():
    keep = np.arange(70).reshape(7, 10) % 3 == 0
    for view in (keep, np.asfortranarray(keep), np.repeat(keep, 2, 1)[:, ::2], keep[::-1].copy()[::-1], keep.tolist()):
        assert fd.PackedMask.from_bool(view, 0.5) == fd.PackedMask.from_bool(keep, 0.5)


def test_packed_mask_equality():
    mask = fd.PackedMask.from_bool([True, False, True], 0.5)
    assert mask == fd.PackedMask.from_bool([True, False, True], 0.5)
    assert mask != fd.PackedMask.from_bool([True, True, True], 0.5)
    assert mask != fd.PackedMask.from_bool([True, False, True], 0.4)
    assert mask != fd.PackedMask.from_bool([[True, False, True]], 0.5)
    assert mask != fd.PackedMask(mask.words, mask.shape, 0.5, scale=1.0)
    assert mask != mask.words
    assert mask != "mask"
    assert mask != fd.SeededMask(0, 0, (3,), 0.5)


def test_masks_are_unhashable():
    """They compare by value and hold arrays."""
    for mask in (fd.draw_mask(3, 0.5), fd.SeededMask(0, 0, (3,), 0.5)):
        with pytest.raises(TypeError, match="unhashable"):
            hash(mask)


@pytest.mark.parametrize("shape", [(0,), (), (7, 33), LARGE], ids=str)
@pytest.mark.parametrize("clone", [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy])
def test_packed_mask_pickles(shape, clone):
    mask = fd.draw_mask(shape, 0.3, rng=0)
    restored = clone(mask)
    assert restored == mask
    assert restored.words.dtype == np.uint32
    assert (restored.p, restored.scale, restored.shape) == (mask.p, mask.scale, mask.shape)
    x = np.ones(shape, np.float32)
    assert (fd.apply_mask(x, restored) == fd.apply_mask(x, mask)).all()


def test_packed_mask_pickles_only_its_words():
    mask = fd.draw_mask(LARGE, 0.3, rng=0)
    assert len(pickle.dumps(mask, protocol=5)) < mask.nbytes + 1000


def test_large_words_start_on_a_cache_line(variant):
    assert fd.draw_mask(LARGE, 0.5, rng=0).words.ctypes.data % 64 == 0


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_packed_mask_repr_is_useful(p):
    mask = fd.draw_mask((4, 8), p, rng=0)
    assert repr(mask) == f"PackedMask(shape=(4, 8), p={p}, kept={mask.kept}, nbytes=4)"


WORD = np.ones(1, np.uint32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones(1, np.int32), (3,), 0.5), TypeError, "words must be an array of uint32, but got int32"),
        ((np.ones(1, ">u4"), (3,), 0.5), TypeError, "words must be an array of uint32, but got >u4"),
        (([1], (3,), 0.5), TypeError, "words must be an array of uint32, but got list"),
        ((WORD, (33,), 0.5), ValueError, r"words must be 2 contiguous words for 33 cells, but got shape \(1,\)"),
        ((np.ones(2, np.uint32), (32,), 0.5), ValueError, r"words must be 1 contiguous.*got shape \(2,\)"),
        ((np.ones((1, 1), np.uint32), (32,), 0.5), ValueError, r"words must be 1 contiguous.*got shape \(1, 1\)"),
        ((np.ones(4, np.uint32)[::2], (64,), 0.5), ValueError, "words must be 2 contiguous"),
        ((WORD * 8, (3,), 0.5), ValueError, "words must have 0 in the unused bits past cell 3, but got 0x00000008"),
        ((WORD, (-3,), 0.5), ValueError, "shape must not have negative extents"),
        ((WORD, 3.5, 0.5), TypeError, "shape must be an int or a tuple of ints, but got 3.5"),
        ((WORD, (3,), 1.5), ValueError, "p, the drop probability, must be between 0 and 1, but got 1.5"),
        ((WORD, (3,), float("nan")), ValueError, "p, the drop probability.*nan"),
        ((WORD, (3,), "0.5"), TypeError, "p must be a number, but got str"),
        ((WORD, (3,), 0.5, float("inf")), ValueError, "scale must be finite, but got inf"),
        ((WORD, (3,), 0.5, "2"), TypeError, "scale must be a number, but got str"),
        ((WORD, (3,), 1.0), ValueError, "p = 1 drops everything"),  # scale 0 would make NaN of a kept inf
    ],
)
def test_packed_mask_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        fd.PackedMask(*arguments)


@pytest.mark.parametrize(
    ("keep", "p", "error", "message"),
    [
        ([1, 0], 0.5, TypeError, "keep must be boolean, True = keep, but got dtype int64"),
        (np.ones(3), 0.5, TypeError, "keep must be boolean, True = keep, but got dtype float64"),
        ([True], 2, ValueError, "p, the drop probability.*2"),
        ([True, False], 1.0, ValueError, "p = 1 drops everything, but keep would keep something"),
    ],
)
def test_packed_mask_from_bool_refuses(keep, p, error, message):
    with pytest.raises(error, match=message):
        fd.PackedMask.from_bool(keep, p)


def test_packed_mask_from_bool_of_nothing_kept():
    mask = fd.PackedMask.from_bool([False, False], 1.0)
    assert (mask.kept, mask.scale) == (0, 0.0)
    assert fd.apply_mask(np.array([np.inf, 1.0]), mask).tolist() == [0.0, 0.0]


def test_unaligned_words_are_words(variant):
    """A mask over bytes read from a file at an odd offset."""
    mask = fd.draw_mask(1000, 0.5, rng=0)
    buffer = np.frombuffer(b"x" + mask.words.tobytes(), np.uint8)
    unaligned = fd.PackedMask(buffer[1:].view(np.uint32), (1000,), 0.5)
    assert unaligned == mask
    assert unaligned.kept == mask.kept
    x = np.arange(1000.0)
    assert (fd.apply_mask(x, unaligned) == fd.apply_mask(x, mask)).all()
    tall, row = np.ones((3, 1000), np.float32), (1, 1000)
    shared = fd.PackedMask(unaligned.words, row, 0.5)
    assert (fd.apply_mask(tall, shared) == fd.apply_mask(tall, fd.PackedMask(mask.words, row, 0.5))).all()


# ---- SeededMask ----


def test_seeded_mask_properties():
    mask = fd.SeededMask(3, 4, (5, 6), 0.25)
    assert (mask.seed, mask.offset, mask.shape, mask.p) == (3, 4, (5, 6), 0.25)
    assert (mask.scale, mask.threshold, mask.nbytes) == (1 / 0.75, 1 << 30, 0)
    assert repr(mask) == "SeededMask(seed=3, offset=4, shape=(5, 6), p=0.25)"


def test_seeded_mask_equality():
    mask = fd.SeededMask(3, 4, (5, 6), 0.25)
    assert mask == fd.SeededMask(3, 4, (5, 6), 0.25)
    for other in ((2, 4, (5, 6), 0.25), (3, 5, (5, 6), 0.25), (3, 4, (6, 5), 0.25), (3, 4, (5, 6), 0.5)):
        assert mask != fd.SeededMask(*other)
    assert mask != fd.SeededMask(3, 4, (5, 6), 0.25, scale=1.0)
    assert mask != fd.draw_mask((5, 6), 0.25, rng=fd.Stream(3, 4))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_seeded_mask_is_the_packed_one(variant, p):
    """Also with thresholds that need no draw."""
    x = np.full((5, 40), np.inf, np.float32)
    packed, seeded = fd.draw_mask(x.shape, p, rng=fd.Stream(3, 4)), fd.SeededMask(3, 4, x.shape, p)
    assert (fd.apply_mask(x, packed) == fd.apply_mask(x, seeded)).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0, (3,), 0.5), ValueError, "seed must be from 0 to 2.*-1"),
        ((0, 2**64, (3,), 0.5), ValueError, "offset must be from 0 to 2.*18446744073709551616"),
        ((0.0, 0, (3,), 0.5), TypeError, "seed must be an int, but got float"),
        ((0, 0, (-3,), 0.5), ValueError, "shape must not have negative extents"),
        ((0, 0, "a", 0.5), TypeError, "shape must be an int or a tuple of ints, but got 'a'"),
        ((0, 0, (3,), -0.5), ValueError, "p, the drop probability, must be between 0 and 1, but got -0.5"),
        ((0, 0, (3,), 0.5, float("nan")), ValueError, "scale must be finite, but got nan"),
    ],
)
def test_seeded_mask_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        fd.SeededMask(*arguments)


# ---- GaussianNoise ----


def test_gaussian_noise_properties():
    noise = fd.GaussianNoise(3, 4, (5, 6), 0.25)
    assert (noise.seed, noise.offset, noise.shape, noise.p, noise.nbytes) == (3, 4, (5, 6), 0.25, 0)
    assert repr(noise) == "GaussianNoise(seed=3, offset=4, shape=(5, 6), p=0.25)"
    assert fd.GaussianNoise(0, 0, 7, 0.25).shape == (7,)


def test_gaussian_noise_cannot_be_assigned_to():
    noise = fd.GaussianNoise(3, 4, (5, 6), 0.25)
    for name in ("seed", "offset", "shape", "p", "nbytes", "other"):
        with pytest.raises(AttributeError):
            setattr(noise, name, 1)


def test_gaussian_noise_equality():
    noise = fd.GaussianNoise(3, 4, (5, 6), 0.25)
    assert noise == fd.GaussianNoise(3, 4, (5, 6), 0.25)
    for other in ((2, 4, (5, 6), 0.25), (3, 5, (5, 6), 0.25), (3, 4, (6, 5), 0.25), (3, 4, (5, 6), 0.5)):
        assert noise != fd.GaussianNoise(*other)
    assert noise != fd.SeededMask(3, 4, (5, 6), 0.25)
    assert fd.SeededMask(3, 4, (5, 6), 0.25) != noise
    assert fd.draw_mask((5, 6), 0.25, rng=3) != noise
    assert noise != "noise"
    with pytest.raises(TypeError, match="unhashable"):
        hash(noise)


@pytest.mark.parametrize("clone", [lambda noise: pickle.loads(pickle.dumps(noise)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("shape", [(), (0,), (5, 6), LARGE], ids=str)
def test_gaussian_noise_pickles(clone, shape):
    """In a few bytes, whatever its shape."""
    noise = fd.GaussianNoise(2**64 - 1, 2**64 - 1, shape, 0.3)
    assert clone(noise) == noise
    assert len(pickle.dumps(noise)) < 200
    x = np.ones(shape, np.float32)
    assert (fd.apply_mask(x, clone(noise)) == fd.apply_mask(x, noise)).all()


def test_gaussian_noise_is_what_the_call_returns():
    _, noise = fd.gaussian_dropout(np.ones((5, 6)), 0.25, rng=fd.Stream(3, 4))
    assert noise == fd.GaussianNoise(3, 4, (5, 6), 0.25)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0, (3,), 0.5), ValueError, "seed must be from 0 to 2.*-1"),
        ((True, 0, (3,), 0.5), TypeError, "seed must be an int, but got bool"),
        ((0, 2**64, (3,), 0.5), ValueError, "offset must be from 0 to 2.*18446744073709551616"),
        ((0.0, 0, (3,), 0.5), TypeError, "seed must be an int, but got float"),
        ((0, 0, (-3,), 0.5), ValueError, "shape must not have negative extents"),
        ((0, 0, "a", 0.5), TypeError, "shape must be an int or a tuple of ints, but got 'a'"),
        ((0, 0, (3,), -0.5), ValueError, "p, the drop probability, must be between 0 and 1, but got -0.5"),
        ((0, 0, (3,), float("nan")), ValueError, "p, the drop probability.*nan"),
        ((0, 0, (3,), "0.5"), TypeError, "p must be a number, but got str"),
        ((0, 0, (3,), 1.0), ValueError, r"p must be below 1 for Gaussian dropout.*p / \(1 - p\), but got 1.0"),
    ],
)
def test_gaussian_noise_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        fd.GaussianNoise(*arguments)

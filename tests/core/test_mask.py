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
from fastdrop.arrays.host import ALIGNED_FROM_WORDS

SIZES = (0, 1, 32, 33, 32 * ALIGNED_FROM_WORDS - 1, 32 * ALIGNED_FROM_WORDS + 5)
LARGE = (5, 32 * ALIGNED_FROM_WORDS // 4 + 3)


# ---- the packed format ----


@pytest.mark.parametrize("n", SIZES)
def test_packed_mask_nbytes(variant, n):
    """One bit per cell, and at most 64 bytes more. Large masks start on a cache line."""
    mask = fd.draw_mask(n, 0.5, rng=0)
    assert mask.nbytes == mask.words.nbytes == -(-n // 32) * 4
    base = mask.words if mask.words.base is None else mask.words.base
    assert base.nbytes <= -(-n // 32) * 4 + 64
    assert mask.words.size < ALIGNED_FROM_WORDS or mask.words.ctypes.data % 64 == 0
    _, stored = fd.dropout(np.ones(n, np.float16), 0.5, rng=0)
    assert stored.nbytes == mask.nbytes


def test_packed_mask_words_are_little_endian_least_significant_first():
    keep = np.zeros(70, bool)
    keep[[0, 1, 31, 32, 69]] = True
    mask = fd.PackedMask.from_bool(keep, 0.5)
    assert mask.words.tolist() == [1 | 2 | 1 << 31, 1, 1 << 5]
    assert mask.words.dtype == np.uint32
    assert (np.unpackbits(mask.words.view(np.uint8), bitorder="little")[:70] == keep).all()


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)), st.floats(0, 0.99))
def test_packed_mask_from_bool_round_trips(keep, p):
    mask = fd.PackedMask.from_bool(keep, p)
    assert mask.shape == keep.shape
    assert mask.kept == keep.sum()
    assert (mask.to_bool() == keep).all()
    assert mask.to_bool().dtype == np.bool_
    assert mask == fd.PackedMask(mask.words, mask.shape, p)


def test_packed_mask_from_bool_follows_the_logical_index():
    keep = np.arange(70).reshape(7, 10) % 3 == 0
    for view in (keep, np.asfortranarray(keep), np.repeat(keep, 2, 1)[:, ::2], keep[::-1].copy()[::-1], keep.tolist()):
        assert fd.PackedMask.from_bool(view, 0.5) == fd.PackedMask.from_bool(keep, 0.5)


def test_packed_mask_from_bool_of_nothing_kept():
    mask = fd.PackedMask.from_bool([False, False], 1.0)
    assert (mask.kept, mask.scale) == (0, 0.0)
    assert fd.apply_mask(np.array([np.inf, 1.0]), mask).tolist() == [0.0, 0.0]


def test_unaligned_words_are_words(variant):
    """Words may lie at any address, for example in bytes read from a file."""
    mask = fd.draw_mask(1000, 0.5, rng=0)
    buffer = np.frombuffer(b"x" + mask.words.tobytes(), np.uint8)
    unaligned = fd.PackedMask(buffer[1:].view(np.uint32), (1000,), 0.5)
    assert unaligned == mask
    assert unaligned.kept == mask.kept
    for x, shape in ((np.arange(1000.0), (1000,)), (np.ones((3, 1000), np.float32), (1, 1000))):
        results = [fd.apply_mask(x, fd.PackedMask(own.words, shape, 0.5)) for own in (unaligned, mask)]
        assert (results[0] == results[1]).all()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_seeded_mask_is_the_packed_one(variant, p):
    """Also for p = 0 and 1, which need no draw."""
    x = np.full((5, 40), np.inf, np.float32)
    packed, seeded = fd.draw_mask(x.shape, p, rng=fd.Stream(3, 4)), fd.SeededMask(3, 4, x.shape, p)
    assert (fd.apply_mask(x, packed) == fd.apply_mask(x, seeded)).all()


# ---- masks as values ----

PACKED = fd.draw_mask((4, 30), 0.25, rng=0)
SEEDED = fd.SeededMask(3, 4, (5, 6), 0.25)
NOISE = fd.GaussianNoise(3, 4, (5, 6), 0.25)


def test_properties_and_representation():
    assert (PACKED.shape, PACKED.p, PACKED.scale, PACKED.nbytes) == ((4, 30), 0.25, 1 / 0.75, 16)
    assert repr(PACKED) == f"PackedMask(shape=(4, 30), p=0.25, kept={PACKED.to_bool().sum()}, nbytes=16)"
    for drawn in (SEEDED, NOISE):
        assert (drawn.seed, drawn.offset, drawn.shape, drawn.p, drawn.nbytes) == (3, 4, (5, 6), 0.25, 0)
        assert repr(drawn) == f"{type(drawn).__name__}(seed=3, offset=4, shape=(5, 6), p=0.25)"
    assert (SEEDED.scale, SEEDED.threshold) == (1 / 0.75, 1 << 30)
    assert fd.GaussianNoise(0, 0, 7, 0.25).shape == (7,)


@pytest.mark.parametrize("mask", [PACKED, SEEDED, NOISE], ids=lambda mask: type(mask).__name__)
def test_masks_are_immutable_and_unhashable(mask):
    for name in ("words", "seed", "offset", "shape", "p", "scale", "nbytes", "kept", "other"):
        with pytest.raises(AttributeError):
            setattr(mask, name, 1)
    with pytest.raises(TypeError, match="unhashable"):
        hash(mask)


def test_equality():
    mask = fd.PackedMask.from_bool([True, False, True], 0.5)
    assert mask == fd.PackedMask.from_bool([True, False, True], 0.5)
    for other in (
        fd.PackedMask.from_bool([True, True, True], 0.5),
        fd.PackedMask.from_bool([True, False, True], 0.4),
        fd.PackedMask.from_bool([[True, False, True]], 0.5),
        fd.PackedMask(mask.words, mask.shape, 0.5, scale=1.0),
        fd.SeededMask(0, 0, (3,), 0.5),
        mask.words,
        "mask",
    ):
        assert mask != other
    for kind, own in ((fd.SeededMask, SEEDED), (fd.GaussianNoise, NOISE)):
        assert own == kind(3, 4, (5, 6), 0.25)
        for other in ((2, 4, (5, 6), 0.25), (3, 5, (5, 6), 0.25), (3, 4, (6, 5), 0.25), (3, 4, (5, 6), 0.5)):
            assert own != kind(*other)
        assert own != fd.draw_mask((5, 6), 0.25, rng=fd.Stream(3, 4))
        assert own != "mask"
    assert fd.SeededMask(3, 4, (5, 6), 0.25, scale=1.0) != SEEDED
    assert SEEDED != NOISE
    assert NOISE != SEEDED


@pytest.mark.parametrize("clone", [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("shape", [(0,), (), LARGE], ids=str)
def test_masks_pickle(shape, clone):
    """A packed mask pickles its words only, the others take a few bytes."""
    x, last = np.ones(shape, np.float32), 2**64 - 1
    for mask in (
        fd.draw_mask(shape, 0.3, rng=0),
        fd.SeededMask(last, last, shape, 0.3, scale=1.0),
        fd.GaussianNoise(last, last, shape, 0.3),
    ):
        restored = clone(mask)
        assert type(restored) is type(mask)
        assert restored == mask
        assert (fd.apply_mask(x, restored) == fd.apply_mask(x, mask)).all()
        assert len(pickle.dumps(mask, protocol=5)) < mask.nbytes + 1000


# ---- what is refused ----

WORD = np.ones(1, np.uint32)
BAD_WORDS = [
    ((np.ones(1, np.int32), (3,), 0.5), TypeError, "words must be an array of uint32, but got int32"),
    ((np.ones(1, ">u4"), (3,), 0.5), TypeError, "words must be an array of uint32, but got >u4"),
    (([1], (3,), 0.5), TypeError, "words must be an array of uint32, but got list"),
    ((WORD, (33,), 0.5), ValueError, r"words must be 2 contiguous words for 33 cells, but got shape \(1,\)"),
    ((np.ones(2, np.uint32), (32,), 0.5), ValueError, r"words must be 1 contiguous.*got shape \(2,\)"),
    ((np.ones((1, 1), np.uint32), (32,), 0.5), ValueError, r"words must be 1 contiguous.*got shape \(1, 1\)"),
    ((np.ones(4, np.uint32)[::2], (64,), 0.5), ValueError, "words must be 2 contiguous"),
    ((WORD * 8, (3,), 0.5), ValueError, "words must have 0 in the unused bits past cell 3, but got 0x00000008"),
    ((np.ma.masked_array(WORD), (3,), 0.5), TypeError, "words must not be a masked array"),
    ((WORD, (3,), 1.0), ValueError, "p = 1 drops everything"),  # scale 0 would make NaN of a kept inf
]
BAD_STATES = [
    ((-1, 0), ValueError, "seed must be from 0 to 2.*-1"),
    ((0, 2**64), ValueError, "offset must be from 0 to 2.*18446744073709551616"),
    ((0.0, 0), TypeError, "seed must be an int, but got float"),
    ((True, 0), TypeError, "seed must be an int, but got bool"),
]
BAD_REST = [
    (((-3,), 0.5), ValueError, "shape must not have negative extents"),
    ((3.5, 0.5), TypeError, "shape must be an int or a tuple of ints, but got 3.5"),
    (("a", 0.5), TypeError, "shape must be an int or a tuple of ints, but got 'a'"),
    (((3,), -0.5), ValueError, "p, the drop probability, must be between 0 and 1, but got -0.5"),
    (((3,), float("nan")), ValueError, "p, the drop probability.*nan"),
    (((3,), "0.5"), TypeError, "p must be a number, but got str"),
]
BAD_SCALES = [
    (((3,), 0.5, float("inf")), ValueError, "scale must be finite, but got inf"),
    (((3,), 0.5, "2"), TypeError, "scale must be a number, but got str"),
]
GOOD = (3,), 0.5
BAD_KEEPS = [
    (([1, 0], 0.5), TypeError, "keep must be boolean, True = keep, but got dtype int64"),
    ((np.ma.masked_array([True]), 0.5), TypeError, "keep must not be a masked array"),
    (([True], 2), ValueError, "p, the drop probability.*2"),
    (([True, False], 1.0), ValueError, "p = 1 drops everything, but keep would keep something"),
    (([True, False], 1.0 - 2.0**-34), ValueError, "p = 1 drops everything, but keep would keep something"),
]
REFUSED = {
    fd.PackedMask: [*BAD_WORDS, *(((WORD, *rest), *why) for rest, *why in (*BAD_REST, *BAD_SCALES))],
    fd.PackedMask.from_bool: BAD_KEEPS,
    fd.SeededMask: [
        *(((*state, *GOOD), *why) for state, *why in BAD_STATES),
        *(((0, 0, *rest), *why) for rest, *why in (*BAD_REST, *BAD_SCALES)),
    ],
    fd.GaussianNoise: [
        *(((*state, *GOOD), *why) for state, *why in BAD_STATES),
        *(((0, 0, *rest), *why) for rest, *why in BAD_REST),
        ((0, 0, (3,), 1.0), ValueError, r"p must be below 1 for Gaussian dropout.*p / \(1 - p\), but got 1.0"),
    ],
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__qualname__)
def test_bad_arguments_are_refused(make):
    for arguments, error, message in REFUSED[make]:
        with pytest.raises(error, match=message):
            make(*arguments)

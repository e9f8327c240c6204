"""The mask specification: golden vectors on every variant, and each bit against the 32-bit draw it stands for."""

from __future__ import annotations

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.backends import reference
from fastdrop.core.mask import word_count
from fastdrop.core.random import philox4x32_10, threshold

from ..cases import FIRSTS, LENGTHS, OFFSET, POSITIONS, SEED, TENTH, THRESHOLDS, Guarded, golden

MASKS = golden()["masks"]


def parse(vector):
    """(seed, offset, first cell, words) of a golden vector."""
    words = np.array([int(word, 16) for word in vector["words"]], np.uint32)
    return int(vector["seed"], 16), int(vector["offset"], 16), 32 * vector["first_word"], words


def draws(first_word, words, seed, offset):
    """The 32-bit draw u of each cell, from all 32 planes as the specification words it: nothing lazy or packed."""
    u = np.zeros((words, 32), np.uint64)
    w = [first_word + i for i in range(words)]
    low, high = np.array([i & 0xFFFFFFFF for i in w]), np.array([i >> 32 for i in w])
    for group in range(8):
        counter = (low, high | 1 << 27 | group << 29, offset & 0xFFFFFFFF, offset >> 32)
        for k, plane in enumerate(philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))):
            bit = plane[:, None] >> np.arange(32, dtype=np.uint32) & 1
            u |= bit.astype(np.uint64) << np.uint64(31 - 4 * group - k)
    return u.reshape(-1)


def drawn(module, n, first, cut, position=0):
    """draw_bits into guarded words of a pattern; the words, and what they held before."""
    size = word_count(position + n) + 1  # the last one must stay
    before = np.random.default_rng(0).integers(0, 2**32, size, np.uint32)
    words = Guarded.of(before)
    module.draw_bits(words.array, position, first, n, SEED, OFFSET, cut)
    assert words.intact
    return words.array, before


def bits(words):
    return np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_)


def test_golden_thresholds():
    assert [threshold(vector["p"]) for vector in MASKS] == [vector["threshold"] for vector in MASKS]


def test_golden_vectors_cover_the_ends():
    cuts = {vector["threshold"] for vector in MASKS}
    assert cuts >= {0, 1 << 32}
    assert max(32 * (vector["first_word"] + len(vector["words"])) for vector in MASKS) == 2**64


def test_draw_bits_golden_vectors(variant):
    for vector in MASKS:
        seed, offset, first, expected = parse(vector)
        if 0 < vector["threshold"] < 1 << 32:
            words = np.full(expected.size, 0xA5A5A5A5, np.uint32)
            variant.draw_bits(words, 0, first, 32 * words.size, seed, offset, vector["threshold"])
            assert words.tolist() == expected.tolist(), vector


def test_public_golden_vectors():
    """By draw_mask and, where a vector begins with cell 0, by dropout of ones."""
    for vector in MASKS:
        seed, offset, first, expected = parse(vector)
        mask = fd.draw_mask(32 * expected.size, vector["p"], rng=fd.Stream(seed, offset), first_cell=first)
        assert mask.words.tolist() == expected.tolist(), vector
        if first == 0 and vector["threshold"]:
            y, mask = fd.dropout(np.ones(32 * expected.size), vector["p"], rng=fd.Stream(seed, offset))
            assert mask.words.tolist() == expected.tolist(), vector
            assert (y != 0).tolist() == bits(expected).tolist(), vector


@pytest.mark.parametrize("cut", THRESHOLDS.values(), ids=THRESHOLDS)
def test_reference_compares_every_draw_with_the_threshold(cut):
    for first_word in (0, 5, 2**32 - 3, 2**59 - 64):
        words = np.empty(64, np.uint32)
        reference.draw_bits(words, 0, 32 * first_word, 32 * 64, SEED, OFFSET, cut)
        assert (bits(words) == (draws(first_word, 64, SEED, OFFSET) >= cut)).all()


def test_draw_bits_decides_by_all_32_planes(variant):
    """A cell is kept under a threshold equal to its draw and dropped under the next one, even in the last plane."""
    u = draws(0, 32, SEED, OFFSET)
    for cell in range(0, 1024, 41):
        kept, _ = drawn(variant, 1024, 0, int(u[cell]))
        dropped, _ = drawn(variant, 1024, 0, int(u[cell]) + 1)
        assert bits(kept)[cell], cell
        assert not bits(dropped)[cell], cell
        assert (bits(kept) != bits(dropped))[:1024].sum() == (u == u[cell]).sum(), cell


def test_draw_bits_thresholds_and_lengths(compiled):
    thresholds = [(cut, 20_000, first) for cut in THRESHOLDS.values() for first in (31, 512, 2**37 - 4101)]
    lengths = [(TENTH, n, FIRSTS[k % len(FIRSTS)]) for k, n in enumerate(LENGTHS)]
    for cut, n, first in (*thresholds, *lengths):
        words, _ = drawn(compiled, n, first, cut)
        expected, _ = drawn(reference, n, first, cut)
        assert (words == expected).all(), (cut, n, first)


@pytest.mark.parametrize("position", POSITIONS)
def test_draw_bits_at_any_position(variant, position):
    """Bits below stay, bits above in the last word are cleared, words beyond stay; the bits drawn are the same."""
    for n in (0, 1, 31, 32, 33, 64, 511, 513, 8192, 8193, 140_001):
        for first in (0, 1, 513, 2**37 - 4101):
            words, before = drawn(variant, n, first, TENTH, position)
            expected, _ = drawn(reference, n, first, TENTH)
            end = position + n
            assert (bits(words)[:position] == bits(before)[:position]).all(), (n, first)
            assert (bits(words)[position:end] == bits(expected)[:n]).all(), (n, first)
            if n:
                assert not bits(words)[end : 32 * word_count(end)].any(), (n, first)
                assert (words[word_count(end) :] == before[word_count(end) :]).all(), (n, first)
            else:
                assert (words == before).all(), first


def test_draw_bits_to_the_last_cell(variant):
    whole = draws(2**59 - 512, 512, SEED, OFFSET) >= TENTH
    for n in (1, 31, 33, 512, 513, 9000):
        words, _ = drawn(variant, n, 2**64 - n, TENTH)
        assert (bits(words)[:n] == whole[-n:]).all()


@pytest.mark.parametrize("p", [0.0, 1e-10, 0.1, 0.5, 1.0])
def test_draw_mask_to_the_last_cell(p):
    whole = draws(2**59 - 4, 4, SEED, OFFSET) >= threshold(p)
    for n in (1, 32, 33, 100, 128):
        mask = fd.draw_mask(n, p, rng=fd.Stream(SEED, OFFSET), first_cell=2**64 - n)
        assert (mask.to_bool() == whole[-n:]).all(), n


@pytest.mark.parametrize("p", [0.0, 1e-10, 1.0 - 2.0**-34, 1.0])
def test_draw_mask_without_a_draw(p):
    """Thresholds 0 and 2**32 keep and drop everything; unused bits are 0 still."""
    for n in (0, 1, 31, 32, 33, 100):
        mask = fd.draw_mask(n, p, rng=0)
        assert mask.kept == (n if p < 0.5 else 0)
        assert mask.words.size == word_count(n)
        assert not bits(mask.words)[n:].any()

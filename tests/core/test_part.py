"""Parts of a whole: their masks are those of the whole, cut out."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastdrop as fd
from fastdrop.core.part import runs
from fastdrop.core.samples import sample_runs

from ..cases import activated

P, SEED = 0.3, 5


def box(part: fd.Part) -> tuple[slice, ...]:
    return tuple(slice(start, start + local) for start, local in zip(part.start, part.local, strict=True))


@st.composite
def parts(draw: st.DrawFn) -> fd.Part:
    """Of wholes of up to five axes, so that a part needs several calls of draw_rows."""
    shape = draw(st.lists(st.integers(1, 7), max_size=5))
    ends = [sorted(draw(st.tuples(st.integers(0, extent), st.integers(0, extent)))) for extent in shape]
    return fd.Part(tuple(shape), tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@given(parts(), st.sampled_from(["c", "numba", "numpy"]))
def test_a_part_has_the_cells_of_the_whole(part, backend):
    whole = fd.draw_mask(part.shape, P, rng=SEED).to_bool()
    with activated(backend):
        mask = fd.draw_mask(part.local, P, rng=SEED, part=part)
    np.testing.assert_array_equal(mask.to_bool(), whole[box(part)])
    assert mask == fd.PackedMask(mask.words, part.local, P, part=part)  # unused bits are 0


@given(parts(), st.data())
def test_draws_are_few(part, data):
    """As many as there are axes beyond three that a part cuts."""
    found = list(part.runs())
    assert sum(run.cells for run in found) == np.prod(part.local, dtype=int)
    if len(part.shape) <= 3:
        assert len(found) <= 1


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("store", ["bits", "seed"])
def test_several_parts_along_an_axis(store, axis):
    """Such as shuffled samples, or both ends of a sequence. (tests/arrays/test_parts.py has all ops.)"""
    rng = np.random.default_rng(0)
    shape = (6, 5, 7)
    x = rng.normal(size=shape).astype(np.float32)
    y, mask = fd.dropout(x, P, rng=SEED, store=store)
    order = [3, 0, 4]
    own = [fd.Part(shape, *_cut(shape, axis, at)) for at in order]
    mine = x.take(order, axis)
    part_y, part_mask = fd.dropout(mine, P, rng=SEED, store=store, part=own)
    np.testing.assert_array_equal(part_y, y.take(order, axis))
    for restored in (part_mask, pickle.loads(pickle.dumps(part_mask))):
        np.testing.assert_array_equal(
            fd.dropout_backward(mine, restored), fd.dropout_backward(x, mask).take(order, axis)
        )


def _cut(shape: tuple[int, ...], axis: int, at: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start, local = [0] * len(shape), list(shape)
    start[axis], local[axis] = at, 1
    return tuple(start), tuple(local)


def test_masks_know_their_parts():
    x, own = np.ones((2, 3)), [fd.Part((9, 3), (at, 0), (1, 3)) for at in (4, 2)]
    calls = {
        "PackedMask(shape=(2, 3), p=0.3, kept=": lambda **more: fd.dropout(x, P, rng=SEED, **more)[1],
        "SeededMask(seed=5, offset=0, ": lambda **more: fd.dropout(x, P, rng=SEED, store="seed", **more)[1],
        "GaussianNoise(seed=5, offset=0, ": lambda **more: fd.gaussian_dropout(x, P, rng=SEED, **more)[1],
    }
    for start, call in calls.items():
        whole, mask = call(), call(part=own)
        assert (whole.parts, mask.parts) == (None, tuple(own))
        assert mask == pickle.loads(pickle.dumps(mask)) != whole
        assert repr(mask).startswith(start)
        assert repr(mask).endswith(f", parts={tuple(own)})")
        assert "parts" not in repr(whole)
    packed, seeded, _ = (call(part=own) for call in calls.values())
    assert fd.draw_mask((2, 3), P, rng=fd.Stream(seeded.seed), part=seeded.parts) == packed


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_no_draw_needs_no_part(p):
    x, part = np.ones((2, 3)), fd.Part((4, 3), (2, 0), (2, 3))
    np.testing.assert_array_equal(fd.dropout(x, p, part=part)[0], fd.dropout(x, p)[0])


def test_far_cells():
    whole = (1 << 40, 3, 5)
    part = fd.Part(whole, ((1 << 40) - 2, 1, 2), (2, 2, 3))
    (run,) = runs((part,), part.local)
    assert run == (0, ((1 << 40) - 2) * 15 + 7, 2, 15, 2, 5, 3)
    drawn = fd.draw_mask(part.local, P, rng=SEED, part=part).to_bool()
    for (i, j, k), kept in np.ndenumerate(drawn):
        first = (whole[0] - 2 + i) * 15 + (1 + j) * 5 + 2 + k
        assert fd.draw_mask(1, P, rng=SEED, first_cell=first).to_bool()[0] == kept


def test_samples_have_cells_up_to_the_last():
    (run,) = sample_runs([(1 << 61) - 1], (1, 8), 0, (False, False))
    assert run.end == 1 << 64
    with pytest.raises(ValueError, match="samples must have cells below"):
        list(sample_runs([0, 1 << 61], (2, 8), 0, (False, False)))


def test_bad_parts():
    x, part = np.ones((2, 3)), fd.Part((4, 3), (2, 0), (2, 3))
    other = fd.Part((5, 3), (2, 0), (2, 3))
    for wrong, error, words in (
        (lambda: fd.Part((4, 3), (3, 0), (2, 3)), ValueError, "goes from 3 to 5 of 4 on axis 0"),
        (lambda: fd.Part((4, 3), (0,), (2, 3)), ValueError, "an entry for each axis"),
        (lambda: fd.Part((4.5, 3), (0, 0), (2, 3)), TypeError, "part's shape must be"),
        (lambda: fd.Part((1 << 40, 1 << 40), (0, 0), (1, 1)), ValueError, "2\\*\\*64 cells"),
        (lambda: fd.dropout(np.ones((3, 3)), P, part=part), ValueError, "must have x's shape"),
        (lambda: fd.dropout(x, P, part=[part, part]), ValueError, "must have x's shape"),
        (lambda: fd.dropout(np.ones((4, 3)), P, part=[part, other]), ValueError, "of one whole"),
        (lambda: fd.dropout(x, P, part=[]), ValueError, "of one whole"),
        (lambda: fd.dropout(x, P, part=(4, 3)), TypeError, "fastdrop.Part"),
        (lambda: fd.draw_mask((2, 3), P, part=part, first_cell=3), ValueError, "must not both"),
    ):
        with pytest.raises(error, match=words):
            wrong()

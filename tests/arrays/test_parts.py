"""Every op of a part of an array: its results, gradients and masks are those of the whole, cut out."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastdrop as fd

from ..cases import DTYPES, activated, assert_same_bits
from .test_bad_input import refused
from .test_fused import OPS
from .variant_cases import KINDS

P, SEED = 0.3, 5
BACKENDS = ("c", "numba", "numpy")
VECTORS = {"weight", "bias", "x_bias"}
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """An op and what its parts may be: they have the axes from ``uncut`` on whole. Those that lie one after the other
    along an axis start ``alike`` on the others, or need not."""

    call: Callable[..., tuple[Any, ...]]
    arrays: Arrays
    uncut: int
    alike: Callable[[int], bool] = lambda axis: False
    stores: tuple[str, ...] = ("bits", "seed")

    @property
    def shape(self) -> tuple[int, ...]:
        return next(iter(self.arrays.values())).shape

    def run(self, arrays: Arrays, dys: list[np.ndarray], **options: Any) -> tuple[list[np.ndarray], Any, Arrays]:
        """The results, the mask or Saved, and the gradients that have an element for each of x's."""
        *results, kept = self.call(**arrays, p=P, **options)
        if isinstance(kept, fd.Saved):
            found = kept.backward(*dys[: len(results)])._asdict()
            return results, kept.mask, {n: g for n, g in found.items() if n not in VECTORS and g is not None}
        return results, kept, {"x": fd.dropout_backward(dys[0], pickle.loads(pickle.dumps(kept)))}


def kinds() -> dict[str, Case]:
    found = {}
    for name, kind in KINDS.items():
        x = {"w" if name == "drop_connect" else "x": DTYPES[0].numbers(kind.shape)}
        cells = kind.call(np.zeros(kind.shape, np.float32), p=P, rng=0)[1].shape
        uncut = 2 if name.startswith("drop_block") else len(kind.shape)
        alike = partial(lambda cells, shape, axis: cells[axis] != shape[axis], cells, kind.shape)
        found[name] = Case(kind.call, x, uncut, alike, kind.stores or ("",))
    return found


def fused() -> dict[str, Case]:
    found = {}
    for name, op in OPS.items():
        masked = "attn_mask" in op.options
        shape = (5, *op.options["attn_mask"].shape) if masked else (5, 4, 24)
        uncut = 1 if masked else 2 if "norm" in name or "softmax" in name else 3
        arrays = op.arrays(("float32", "float32"), shape)
        alike = partial(lambda arrays, axis: bool(VECTORS & {*arrays}), arrays)
        found[name] = Case(partial(op.call, **op.options), arrays, uncut, alike)
    return found


KIND_CASES = kinds()
CASES = KIND_CASES | fused()


def box(part: fd.Part) -> tuple[slice, ...]:
    return tuple(slice(start, start + local) for start, local in zip(part.start, part.local, strict=True))


def random_parts(case: Case, rng: np.random.Generator, count: int) -> tuple[list[fd.Part], int]:
    """Boxes of equal extents on all axes but one, along which they lie one after the other. Some are empty."""
    axis = int(rng.integers(case.uncut))
    cut = range(case.uncut)
    own = [int(rng.choice([1, extent, rng.integers(extent + 1)])) for extent in case.shape]
    start = [int(rng.integers(whole - own[i] + 1)) for i, whole in enumerate(case.shape)]
    parts = []
    for _ in range(count):
        own[axis] = int(rng.integers(case.shape[axis] + 1))
        anew = [axis] if case.alike(axis) else cut
        for i in anew:
            start[i] = int(rng.integers(case.shape[i] - own[i] + 1))
        local = tuple(own[i] if i in cut else extent for i, extent in enumerate(case.shape))
        parts.append(fd.Part(case.shape, tuple(start[i] if i in cut else 0 for i in range(len(local))), local))
    return parts, axis


def taken(x: np.ndarray, parts: list[fd.Part], axis: int) -> np.ndarray:
    """What the parts have of an array of the whole's shape, or of one with an element for each column. A single part is
    a view with gaps."""
    if len(parts) == 1:
        return x[box(parts[0])[-x.ndim :]]
    if x.ndim < len(parts[0].shape):
        last = axis == len(parts[0].shape) - 1
        return np.concatenate([x[box(part)[-1]] for part in (parts if last else parts[:1])])
    return np.concatenate([x[box(part)] for part in parts], axis)


@pytest.mark.every_backend
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_has_the_results_gradients_and_mask_of_the_whole(backend):
    rng = np.random.default_rng(BACKENDS.index(backend))
    with activated(backend):
        # Numba takes long to compile the fused primitives, which know nothing of parts.
        for name, case in (KIND_CASES if backend == "numba" else CASES).items():
            for store in case.stores:
                options = {"store": store} if store else {}
                dys = [DTYPES[0].numbers(case.shape, seed=50 + i) for i in range(2)]
                whole = case.run(case.arrays, dys, rng=SEED, **options)
                for count in (1, 1, 1, 2, 3):
                    parts, axis = random_parts(case, rng, count)
                    mine = {n: taken(array, parts, axis) for n, array in case.arrays.items()}
                    stream = fd.Stream(SEED)
                    own = case.run(
                        mine,
                        [taken(dy, parts, axis) for dy in dys],
                        rng=stream,
                        part=parts[0] if count == 1 else parts,
                        **options,
                    )
                    what = f"{name}, {store}, {parts}"
                    for got, wanted in zip(own[0], whole[0], strict=True):
                        assert_same_bits(got, taken(wanted, parts, axis), what)
                    for of in whole[2]:
                        assert_same_bits(own[2][of], taken(whole[2][of], parts, axis), what)
                    assert (own[1].p, getattr(own[1], "scale", 1)) == (whole[1].p, getattr(whole[1], "scale", 1)), what
                    assert own[1].parts is not None, what
                    assert stream.offset == 1, what


def test_noise_of_parts_in_every_dtype(dtype):
    x = dtype.numbers((6, 7, 41))
    y, _ = fd.gaussian_dropout(x, P, rng=SEED)
    for part in (fd.Part(x.shape, (2, 0, 0), (3, 7, 41)), fd.Part(x.shape, (1, 2, 3), (4, 5, 33))):
        mine, noise = fd.gaussian_dropout(x[box(part)], P, rng=SEED, part=part)
        assert_same_bits(mine, y[box(part)], part)
        assert_same_bits(fd.apply_mask(x[box(part)], noise), mine, part)


@pytest.mark.parametrize("name", CASES)
def test_a_call_takes_the_same_random_numbers_whatever_its_part(name):
    case = CASES[name]
    for start in (0, case.shape[0]):
        own = fd.Part(case.shape, (start, *(0,) * (len(case.shape) - 1)), (case.shape[0] - start, *case.shape[1:]))
        mine = {of: array if array.ndim < len(case.shape) else array[box(own)] for of, array in case.arrays.items()}
        for p in (P, 1.0 - 2.0**-30):
            generators = [np.random.default_rng(0) for _ in range(2)]
            case.call(**case.arrays, p=p, rng=generators[0])
            case.call(**mine, p=p, rng=generators[1], part=own)
            assert len({generator.integers(1 << 62) for generator in generators}) == 1


def test_a_part_of_one_sample_shares_what_the_whole_shares():
    """Its extent of 1 is not that of an axis that shares decisions, and it may have an extent of 1 where they do."""
    x = np.ones((8, 6, 5), np.float32)
    y, _ = fd.feature_dropout(x, 0.5, rng=SEED)
    kept, _ = fd.dropout(x, 0.5, noise_shape=(8, 1, None), rng=SEED)
    for sample in range(8):
        part = fd.Part(x.shape, (sample, 0, 2), (1, 6, 1))
        mine, mask = fd.feature_dropout(x[box(part)], 0.5, rng=SEED, part=part)
        assert_same_bits(mine, y[box(part)])
        assert mask.parts == (fd.Part((8, 6, 1), (sample, 0, 0), (1, 6, 1)),)
        mine, _ = fd.dropout(x[box(part)], 0.5, noise_shape=(None, 1, None), rng=SEED, part=part)
        assert_same_bits(mine, kept[box(part)])


def test_parts_that_an_op_can_not_have_are_refused():
    x, shape = np.ones((3, 4, 4), np.float32), (6, 8, 8)
    cut, rows, whole_rows = (fd.Part(shape, (1, 0, 0), local) for local in ((3, 4, 4), (3, 4, 8), (3, 8, 8)))
    halves = [fd.Part(shape, (1, at, 0), (3, 2, 4)) for at in (4, 0)]
    wide, tall = np.ones((3, 4, 8), np.float32), np.ones((3, 8, 8), np.float32)
    askew = [fd.Part(shape, (1, 0, 0), (3, 2, 4)), fd.Part(shape, (1, 2, 4), (3, 2, 4))]
    for call, words in (
        (lambda: fd.dropout_add_layer_norm(x, None, part=cut), "must not cut the last axis"),
        (lambda: fd.dropout_add_rms_norm(x, None, part=halves), "must not cut the last axis"),
        (lambda: fd.softmax_dropout(x, part=cut), "must not cut the last axis"),
        (lambda: fd.softmax_dropout(wide, causal=True, part=rows), "must not cut the axis of queries"),
        (lambda: fd.drop_block(wide, 0.1, 2, part=fd.Part(shape, (0, 1, 0), (3, 4, 8))), None),
        (lambda: fd.drop_block(x, 0.1, 2, part=cut), "must not cut the spatial axes"),
        (lambda: fd.variational_dropout(x, 0.1, 1, part=halves), None),
        (lambda: fd.variational_dropout(x, 0.1, 1, part=askew), "start alike on all other axes"),
        (lambda: fd.variational_dropout(x, 0.1, 2, part=askew), None),
        (lambda: fd.dropout(x, 0.1, noise_shape=(3, 1, 4), part=cut), None),
        (lambda: fd.dropout(x, 0.1, noise_shape=(6, 1, 8), part=cut), "axis of x, whose shape is (3, 4, 4)"),
        (lambda: fd.softmax_dropout(tall, causal=True, part=whole_rows), None),
    ):
        if words is None:
            call()
        else:
            with refused(ValueError, words, "but got"):
                call()
    far = fd.Part((1 << 40, 1 << 22), (0, 0), (3, 4))
    for call in (
        lambda: fd.gaussian_dropout(x[0, :3], part=far),
        lambda: fd.GaussianNoise(0, 0, (3, 4), P, part=far),
    ):
        with refused(ValueError, "2**61 elements for noise"):
            call()

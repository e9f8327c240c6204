"""Every kind of dropout in the NumPy API, plain dropout among them: values, gradients, memory, masks and seeds.

The table `KINDS` gives each kind as a call and its law in plain NumPy. A new kind is tested by its row in that table.
"""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastdrop as fd
from fastdrop.core.random import NOISE_DOMAIN, keep_scale, philox4x32_10, threshold

from ..cases import DTYPES, GRAIN, assert_same_bits, bits_of
from .test_properties import laid_out
from .variant_cases import DENSE, KINDS, LAYOUTS, MASKED, SCALINGS, STORES, drawn, in_blocks, layouts, under

P = (0.5, 0.1, 1 / 3, 0.999, 1.0 - 2.0**-34, 1.0)
MASKS = (fd.PackedMask, fd.SeededMask)
SIZES = (DTYPES[0], DTYPES[3])  # dtypes of two sizes, where only the size matters

kinds_of_all = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
kinds_of_masks = pytest.mark.parametrize("kind", MASKED.values(), ids=MASKED)


def larger(shape):
    """With a first axis so long that several threads have something to do."""
    return (-(-2 * GRAIN // math.prod(shape[1:])), *shape[1:])


# ---- values and gradients ----

# Hidden activations of the domain, p = 0.5, units 0 and 2 kept: each kind where its cells are these four.
HIDDEN, GRADIENT = np.array([0.36, 0.13, 0.42, 0.25]), np.array([0.3, -0.1, 0.2, -0.05])
WORKED = {
    "dropout": (fd.dropout, HIDDEN.shape, {}),
    "drop_connect": (fd.drop_connect, (2, 2), {}),
    "feature_dropout": (fd.feature_dropout, (1, 1, 4), {"channel_axis": -1}),
    "variational_dropout": (fd.variational_dropout, (1, 4), {"time_axis": 0}),
    "stochastic_depth": (fd.stochastic_depth, (4, 1), {"mode": "row"}),
}


@pytest.mark.parametrize(("op", "shape", "arguments"), WORKED.values(), ids=WORKED)
def test_worked_numbers(variant, op, shape, arguments):
    seed = next(seed for seed in itertools.count() if drawn(4)(0.5, seed).tolist() == [True, False, True, False])
    a = HIDDEN.reshape(shape)
    for store in STORES:
        y, mask = op(a, p=0.5, rng=seed, store=store, **arguments)
        assert y.ravel().tolist() == [0.72, 0, 0.84, 0]
        assert fd.dropout_backward(GRADIENT.reshape(shape), mask).ravel().tolist() == [0.6, 0, 0.4, 0]
        y, _ = op(a, p=0.5, rng=seed, store=store, scaling="standard", **arguments)
        assert y.ravel().tolist() == [0.36, 0, 0.42, 0]
    assert op(a, p=0.5, training=False, **arguments)[0] is a
    y, _ = op(a, p=0.5, training=False, scaling="standard", **arguments)
    assert y.ravel().tolist() == (HIDDEN * 0.5).tolist()


@kinds_of_masks
def test_forward_and_backward_are_their_law(variant, dtype, kind):
    x, dy = dtype.numbers(kind.shape), dtype.numbers(kind.shape, seed=1)
    before = x.copy(), dy.copy()
    for p, options in itertools.product(P, kind.options()):
        keep = kind.keep(p, 5)
        a, b, c = kind.affine(p, keep, options.get("scaling", "alpha"))
        y, mask = kind.call(x, p=p, rng=5, **options)
        what = p, options
        assert type(mask) is MASKS[options.get("store") == "seed"], what
        assert (mask.shape, mask.p, mask.scale) == (keep.shape, p, a), what
        assert_same_bits(y, under(dtype, x, keep, a, b, c), ("y", what))
        assert_same_bits(fd.dropout_backward(dy, mask), under(dtype, dy, keep, a), ("dx", what))
        assert_same_bits(fd.apply_mask(dy, mask), under(dtype, dy, keep, a), ("apply_mask", what))
        assert not np.shares_memory(x, y)
        if isinstance(mask, fd.PackedMask):
            assert (mask.to_bool() == keep).all(), what
            assert (mask.nbytes, mask.kept) == (-(-keep.size // 32) * 4, keep.sum()), what
        else:
            assert mask.nbytes == 0
            assert (fd.draw_mask(mask.shape, p, rng=fd.Stream(mask.seed, mask.offset)).to_bool() == keep).all(), what
    assert_same_bits(x, before[0], "x must stay")
    assert_same_bits(dy, before[1], "dy must stay")


@kinds_of_masks
def test_dropped_infinities_and_nans_leave_no_trace(variant, kind):
    """At p = 1 none are left, and of alpha dropout no floor either, as in torch."""
    for dtype, p, options in itertools.product(DTYPES, (0.3, 1.0), kind.options()):
        x = np.resize(np.array([np.inf, -np.inf, np.nan]), kind.shape).astype(dtype.public)
        keep = np.broadcast_to(kind.keep(p, 2), kind.shape)
        _, _, c = kind.affine(p, keep, options.get("scaling", "alpha"))
        y, mask = kind.call(x, p=p, rng=2, **options)
        dx = fd.dropout_backward(x, mask)
        assert not keep.all()
        assert_same_bits(y[~keep], np.full_like(y[~keep], c), (dtype.name, p, options))
        assert not bits_of(dx[~keep]).any()
        for result in (y, dx):
            assert not np.isfinite(result[keep].astype(np.float64)).any()


@kinds_of_all
def test_what_drops_nothing_is_x_itself(kind):
    stream = fd.Stream(0)
    undrawn = [{"p": 0.0}, {"p": 0}, {"p": 0.4, "training": False}, {"p": 0.0, "training": False}]
    undrawn += [{"p": 1e-10}] * (kind.keep is not None)  # rounds to 0; noise of that p is noise
    for how, options in itertools.product(undrawn, kind.options()):
        if options.get("scaling") == "standard" and how["p"] == 0.4:
            continue
        x = DTYPES[0].numbers(kind.shape).T.copy().T
        y, mask = kind.call(x, rng=stream, **how, **options)
        assert y is x
        assert mask is None
        out = np.full_like(x, np.nan)
        assert kind.call(x, rng=stream, out=out, **how, **options)[0] is out
        assert_same_bits(out, x)
    assert stream.offset == 0


@pytest.mark.parametrize("name", ["dropout", "variational_dropout, time last", "drop_connect", "stochastic_depth, row"])
def test_standard_evaluation_multiplies_by_the_realised_keep_probability(variant, name):
    """At p = 1 by nothing: zeros, even of infinities."""
    kind = MASKED[name]
    for dtype, p, store in itertools.product(DTYPES, (0.1, 1 / 3, 1.0), STORES):
        x = dtype.numbers(kind.shape)
        x.flat[0] = np.inf
        for out in (None, np.full_like(x, np.nan)):
            y, mask = kind.call(x, p=p, training=False, scaling="standard", store=store, out=out)
            assert mask is None
            assert out is None or y is out
            assert_same_bits(y, under(dtype, x, p < 1, 1 - threshold(p) / 2**32), (dtype.name, p))


@pytest.mark.every_backend
@kinds_of_all
def test_results_equal_the_numpy_backend(variant, kind):
    """With the special values there are, in C's order and another, in more than one grain of threads."""
    dtype = DTYPES[0]
    small = np.resize(dtype.specials().view(dtype.public), kind.shape)
    large = np.resize(dtype.data(3 * GRAIN).view(dtype.public), larger(kind.shape))

    def results():
        stream = fd.Stream(77)
        for x in (small, small.copy("F"), large):
            for options in kind.options():
                y, mask = kind.call(x, p=0.1, rng=stream, **options)
                yield y
                yield fd.dropout_backward(x, mask)

    with fd.use_backend("numpy"):
        wanted = list(results())
    for actual, want in zip(results(), wanted, strict=True):
        assert_same_bits(actual, want)


@kinds_of_all
def test_any_number_of_threads_gives_the_same_bits(variant, threads, kind):
    x, found = DTYPES[0].numbers(larger(kind.shape)), []
    for count in (1, 2, 5):
        fd.set_num_threads(count)
        (y, mask), *rest = (kind.call(x, p=0.1, rng=5, **options) for options in kind.options())
        found.append([y, fd.dropout_backward(x, mask), *(y for y, _ in rest)])
    for other in found[1:]:
        for actual, want in zip(other, found[0], strict=True):
            assert_same_bits(actual, want)


# ---- memory ----


@kinds_of_all
def test_memory_of_any_layout(variant, kind):
    """Of x, of dy, of ``out``, and in place: the numbers are those of contiguous arrays.

    The result lies as x does where x has no gaps. ``out`` may be another view of x.
    """
    for dtype, options in itertools.product(SIZES, kind.options()):
        x = dtype.numbers(kind.shape)
        y, mask = kind.call(x, p=0.3, rng=4, **options)
        dx = fd.dropout_backward(x, mask)
        for layout in LAYOUTS:
            for call, wanted in (
                (lambda x, o=options, **out: kind.call(x, p=0.3, rng=4, **o, **out)[0], y),
                (lambda x, m=mask, **out: fd.dropout_backward(x, m, **out), dx),
            ):
                what, other = (dtype.name, options, layout), layouts(x)[layout]
                result = call(other)
                assert_same_bits(result, wanted, what)
                assert_same_bits(other, x, what)
                if layout in DENSE:
                    assert result.strides == other.strides, what
                out = layouts(np.full_like(x, np.nan))[layout]
                assert call(layouts(x)["Fortran's"], out=out) is out
                assert_same_bits(out, wanted, what)
                call(other, out=other[:])
                assert_same_bits(other, wanted, what)


@kinds_of_all
def test_out_writes_between_the_lines_of_others(variant, kind):
    """An out that is every second column leaves the columns between alone."""
    x = DTYPES[0].numbers(kind.shape)
    broad = np.full((*kind.shape[:-1], 2 * kind.shape[-1]), 7, np.float32)
    y, _ = kind.call(x, p=0.3, rng=4, out=broad[..., ::2])
    assert_same_bits(y, kind.call(x, p=0.3, rng=4)[0])
    assert (broad[..., 1::2] == 7).all()


@kinds_of_all
def test_lists_are_arrays_of_float64(kind):
    x = np.random.default_rng(0).normal(size=kind.shape)
    y, mask = kind.call(x.tolist(), p=0.3, rng=0)
    assert_same_bits(y, kind.call(x, p=0.3, rng=0)[0])
    assert_same_bits(fd.dropout_backward(x.tolist(), mask), fd.dropout_backward(x, mask))


DEGENERATE = [
    (0, 3, 4, 5),
    (2, 0, 4, 5),
    (2, 3, 0, 5),
    (2, 3, 4, 0),
    (1, 3, 4, 5),
    (2, 1, 1, 5),
    (1, 1, 1, 1),
    (0, 0, 0, 0),
]


@pytest.mark.parametrize("shape", DEGENERATE, ids=str)
def test_extents_of_0_and_1(variant, shape):
    dtype, x, (n, c, _, w) = DTYPES[0], DTYPES[0].numbers(shape), shape
    calls = {
        "dropout": (lambda **o: fd.dropout(x, 0.5, **o), shape),
        "shared": (lambda **o: fd.dropout(x, 0.5, noise_shape=(1, None, 1, None), **o), (1, c, 1, w)),
        "feature": (lambda **o: fd.feature_dropout(x, 0.5, **o), (n, c, 1, 1)),
        "feature, channels last": (lambda **o: fd.feature_dropout(x, 0.5, 3, **o), (n, 1, 1, w)),
        "row": (lambda **o: fd.stochastic_depth(x, 0.5, "row", **o), (n, 1, 1, 1)),
        "batch": (lambda **o: fd.stochastic_depth(x, 0.5, "batch", **o), (1, 1, 1, 1)),
    }
    for (name, (call, cells)), store in itertools.product(calls.items(), STORES):
        y, mask = call(rng=3, store=store)
        keep = drawn(*cells)(0.5, 3)
        assert mask.shape == cells, name
        assert_same_bits(y, under(dtype, x, keep, 2.0), name)
        assert_same_bits(fd.dropout_backward(x, mask), under(dtype, x, keep, 2.0), name)
    for op in (fd.alpha_dropout, fd.feature_alpha_dropout, fd.gaussian_dropout):
        y, mask = op(x, 0.5, rng=3)
        assert y.shape == fd.dropout_backward(x, mask).shape == shape
        with fd.use_backend("numpy"):
            assert_same_bits(y, op(x, 0.5, rng=3)[0], op)
    for size, p in itertools.product(((1, 1), (2, 2), (9, 1)), (0.5, 1.0)):
        stream = fd.Stream(3)
        y, mask = fd.drop_block(x, p, size, rng=stream)
        assert stream.offset == 1, "takes its number even of nothing, as every other kind does"
        assert mask.shape == y.shape == shape
        if x.size:
            keep = in_blocks(shape, size)(p, 3)
            assert (mask.to_bool() == keep).all()
            assert_same_bits(y, under(dtype, x, keep, mask.scale))


def test_arrays_without_axes(variant, dtype):
    """What needs none takes them."""
    x, seen = dtype.numbers(()), set()
    for seed in range(10):
        kept = bool(fd.draw_mask((), 0.5, rng=seed).to_bool())
        seen.add(kept)
        for op, store in itertools.product((fd.dropout, fd.drop_connect), STORES):
            y, mask = op(x, 0.5, rng=seed, store=store)
            assert y.shape == mask.shape == ()
            assert_same_bits(y, under(dtype, x, kept, 2.0))
            assert_same_bits(fd.dropout_backward(x, mask), y)
        for op in (fd.alpha_dropout, fd.gaussian_dropout):
            y, mask = op(x, 0.5, rng=seed)
            assert y.shape == mask.shape == ()
            assert_same_bits(y, op(x.reshape(1), 0.5, rng=seed)[0].reshape(()))
    assert seen == {True, False}


# ---- arguments ----


@pytest.mark.parametrize("kind", [int, np.int8, np.uint64], ids=lambda kind: kind.__name__)
def test_axes_and_sizes_of_any_integer_type(kind):
    x = np.ones((4, 5, 6))
    assert fd.feature_dropout(x, 0.5, kind(2), rng=0)[1].shape == (4, 1, 6)
    assert fd.variational_dropout(x, 0.5, kind(2), rng=0)[1].shape == (4, 5, 1)
    blocks = np.ones((2, 3, 8, 9))
    for size in (kind(3), (kind(3), 3), [3, kind(3)], np.array([3, 3])):
        assert fd.drop_block(blocks, 0.3, size, rng=0)[1] == fd.drop_block(blocks, 0.3, 3, rng=0)[1]


def test_negative_axes_count_from_the_end():
    x = np.random.default_rng(0).normal(size=(4, 5, 6))
    for axis in range(3):
        for call in (fd.feature_dropout, fd.feature_alpha_dropout, fd.variational_dropout):
            (y, mask), (z, other) = call(x, 0.5, axis, rng=1), call(x, 0.5, axis - 3, rng=1)
            assert mask == other
            assert_same_bits(y, z)


@kinds_of_all
def test_random_state_of_every_kind(kind):
    """An int is a seed, a Stream takes one offset a call, a Generator gives a seed, None is the process-wide stream."""
    x, stream = np.ones(kind.shape), fd.Stream(3)
    masks = [kind.call(x, p=0.5, rng=stream)[1] for _ in range(3)]
    assert stream.offset == 3
    assert masks == [kind.call(x, p=0.5, rng=fd.Stream(3, offset))[1] for offset in range(3)]
    assert masks[0] == kind.call(x, p=0.5, rng=3)[1] == kind.call(x, p=0.5, rng=np.uint64(3))[1]
    seed = int(np.random.default_rng(8).integers(0, 2**64, dtype=np.uint64))
    assert kind.call(x, p=0.5, rng=np.random.default_rng(8))[1] == kind.call(x, p=0.5, rng=seed)[1]
    fd.manual_seed(6)
    assert [kind.call(x, p=0.5)[1] for _ in range(2)] == [kind.call(x, p=0.5, rng=fd.Stream(6, at))[1] for at in (0, 1)]


@kinds_of_all
def test_masks_pickle_and_compare(kind):
    """A p of any real type is a float in them."""
    x = np.random.default_rng(0).normal(size=kind.shape)
    for options in kind.options():
        _, mask = kind.call(x, p=0.25, rng=6, **options)
        restored = pickle.loads(pickle.dumps(mask))
        assert restored == mask
        assert_same_bits(fd.dropout_backward(x, restored), fd.dropout_backward(x, mask))
        assert any(kind.call(x, p=0.25, rng=seed, **options)[1] != mask for seed in range(9))
        assert kind.call(x, p=0.26, rng=6, **options)[1] != mask
        for p in (np.float64(0.25), np.float32(0.25), np.float16(0.25), np.array(0.25)):
            _, same = kind.call(x, p=p, rng=6, **options)
            assert same == mask
            assert type(same.p) is float


# ---- Gaussian ----


def factors(n, p, seed, offset=0):
    """``1 + sigma z`` in float64, from the generator's own numbers and textbook formulas."""
    tiles = -(-n // 64)
    b = np.arange(16 * tiles, dtype=np.uint64)
    counter = b & np.uint64(2**32 - 1), b >> np.uint64(32) | np.uint64(NOISE_DOMAIN), offset % 2**32, offset >> 32
    r0, r1, r2, r3 = (word.astype(np.int64) for word in philox4x32_10(counter, (seed % 2**32, seed >> 32)))
    normals = []
    for radius, angle in ((r0, r1), (r2, r3)):
        r = np.sqrt(-2 * np.log(((radius >> 1) + 0.5) / 2**31))
        t = ((angle << 2 & 2**32 - 1) + 2**31) % 2**32 - 2**31
        t = t * (math.pi / 2**33)  # within a quarter, from its middle
        sine, cosine = np.sin(t), np.cos(t) * np.where(angle >> 31, -1, 1)
        swap = angle >> 30 & 1 == 1
        normals += [r * np.where(swap, sine, cosine), r * np.where(swap, cosine, sine)]
    z = np.stack([normal.reshape(tiles, 16) for normal in normals], axis=1).reshape(-1)[:n]
    return 1 + math.sqrt(p / (1 - p)) * z


@pytest.mark.parametrize("p", [0.5, 0.1, 0.9])
def test_gaussian_dropout_multiplies_by_normal_numbers(variant, p):
    """Those of the formulas, within float32's rounding of a radius up to 6.7."""
    for n in (1, 63, 64, 65, 1000, 20_001):
        y, _ = fd.gaussian_dropout(np.ones(n, np.float32), p, rng=fd.Stream(2**40 + 7, 2**33 + 5))
        np.testing.assert_allclose(y, factors(n, p, 2**40 + 7, 2**33 + 5), rtol=0, atol=1e-5 * math.sqrt(p / (1 - p)))


@pytest.mark.parametrize("p", [1e-300, 0.1, 0.5, 1 - 2.0**-53])
def test_gaussian_dropout_multiplies_by_float32_factors(variant, dtype, p):
    """They are the same for every dtype, forward and backward, and depend on the logical index alone.

    The product is computed in the wider type and rounded once: infinities, NaNs and zeros stay what they are.
    """
    x, dy = dtype.numbers((6, 7, 41)), dtype.numbers((6, 7, 41), seed=1)
    x.flat[:5] = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0])
    factor = fd.gaussian_dropout(np.ones(2000, np.float32), p, rng=8)[0][: x.size].reshape(x.shape)
    y, noise = fd.gaussian_dropout(x, p, rng=8)
    for result, values in ((y, x), (fd.dropout_backward(dy, noise), dy), (fd.apply_mask(dy, noise), dy)):
        with np.errstate(over="ignore"):
            wanted = (values.astype(dtype.computed) * factor.astype(dtype.computed)).astype(dtype.public)
        np.testing.assert_array_equal(result.astype(np.float64), wanted.astype(np.float64))
    assert noise == fd.GaussianNoise(8, 0, (6, 7, 41), p)
    assert noise.nbytes == 0


def test_gaussian_noise_made_by_hand_is_noise():
    x = np.random.default_rng(0).normal(size=(5, 40))
    y, _ = fd.gaussian_dropout(x, 0.3, rng=fd.Stream(3, 4))
    assert_same_bits(fd.apply_mask(x, fd.GaussianNoise(3, 4, (5, 40), 0.3)), y)
    assert_same_bits(fd.apply_mask(x, fd.GaussianNoise(3, 4, (5, 40), 0.0)), x)


# ---- any shape, axis and layout ----

SHARING = {
    "feature": (2, lambda x, p, axis, **o: fd.feature_dropout(x, p, axis, **o)),
    "variational": (1, lambda x, p, axis, **o: fd.variational_dropout(x, p, axis, **o)),
    "row": (1, lambda x, p, axis, **o: fd.stochastic_depth(x, p, "row", **o)),
    "batch": (1, lambda x, p, axis, **o: fd.stochastic_depth(x, p, "batch", **o)),
}


def cells_of(name, shape, axis):
    own = {"feature": {0, axis}, "variational": set(range(len(shape))) - {axis}, "row": {0}, "batch": set()}[name]
    return tuple(extent if at in own else 1 for at, extent in enumerate(shape))


@given(data=st.data(), name=st.sampled_from(list(SHARING)), p=st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
def test_sharing_agrees_with_numpy(variant, data, name, p, seed):
    least, call = SHARING[name]
    dtype = data.draw(st.sampled_from(DTYPES[:3]))
    shape = tuple(data.draw(st.lists(st.integers(0, 7), min_size=least, max_size=5)))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    options = {"scaling": data.draw(st.sampled_from(SCALINGS)), "store": data.draw(st.sampled_from(STORES))}
    x, dy = dtype.numbers(shape, seed=1), dtype.numbers(shape, seed=2)
    out = data.draw(st.one_of(st.none(), laid_out(np.full_like(x, np.nan))))
    y, mask = call(data.draw(laid_out(x)), p, axis, rng=seed, out=out, **options)
    cells = cells_of(name, shape, axis % len(shape))
    keep, scale = drawn(*cells)(p, seed), keep_scale(threshold(p)) if options["scaling"] == "inverted" else 1.0
    assert mask is None or mask.shape == cells
    assert_same_bits(y, under(dtype, x, keep, scale))
    assert_same_bits(fd.dropout_backward(data.draw(laid_out(dy)), mask), under(dtype, dy, keep, scale))


@given(data=st.data(), seed=st.integers(0, 2**64 - 1), p=st.one_of(st.sampled_from([0.1, 0.5, 1.0]), st.floats(0, 1)))
def test_drop_block_agrees_with_a_loop_over_blocks(variant, data, seed, p):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=5)))
    sizes = tuple(data.draw(st.integers(1, 10)) for _ in shape[2:])
    dtype = data.draw(st.sampled_from(DTYPES[:3]))
    x = dtype.numbers(shape)
    y, mask = fd.drop_block(data.draw(laid_out(x)), p, sizes, rng=seed)
    keep = in_blocks(shape, sizes)(p, seed)
    if mask is None:
        assert keep.all()
        assert_same_bits(y, x)
    else:
        assert (mask.to_bool() == keep).all()
        assert_same_bits(y, under(dtype, x, keep, keep.size / keep.sum() if keep.any() else 0.0))
        assert_same_bits(fd.dropout_backward(x, mask), y)

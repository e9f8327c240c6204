"""Every kind of dropout in the NumPy API, plain dropout among them: values, gradients, memory, masks and seeds.

`KINDS` gives each kind as a call and its formula in NumPy. A new kind is tested by its row in that table.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastdrop as fd
from fastdrop.core.random import NOISE_DOMAIN, keep_scale, philox4x32_10, threshold

from ..cases import DTYPES, GRAIN, assert_same_bits
from .variant_cases import DENSE, KINDS, LAYOUTS, MASKED, SCALINGS, STORES, drawn, in_blocks, layouts, under

P = (0.5, 0.1, 1.0 - 2.0**-34, 1.0)
MASKS = (fd.PackedMask, fd.SeededMask)
FLOAT32, BFLOAT16 = DTYPES[0], DTYPES[3]

kinds_of_all = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
kinds_of_masks = pytest.mark.parametrize("kind", MASKED.values(), ids=MASKED)


# ---- values and gradients ----


@kinds_of_masks
def test_forward_and_backward_match_the_formula(variant, kind):
    """All dropped elements are infinite or NaN, and the results do not show it."""
    specials = np.resize([np.inf, -np.inf, np.nan], kind.shape)
    for dtype, p, options in itertools.product((FLOAT32, BFLOAT16), P, kind.options()):
        keep = kind.keep(p, 5)
        x, dy = (np.where(keep, dtype.numbers(kind.shape, seed), specials).astype(dtype.public) for seed in (0, 1))
        before = x.copy(), dy.copy()
        a, b, c = kind.affine(p, keep, options.get("scaling", "alpha"))
        y, mask = kind.call(x, p=p, rng=5, **options)
        what = dtype.name, p, options
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


@kinds_of_all
def test_what_drops_nothing_is_x_itself(kind):
    stream = fd.Stream(0)
    undrawn = [{"p": 0}, {"p": 0.4, "training": False}]
    undrawn += [{"p": 1e-10}] * (kind.keep is not None)  # rounds to 0; noise of that p is noise
    for how, options in itertools.product(undrawn, kind.options()):
        if options.get("scaling") == "standard" and how["p"] == 0.4:
            continue
        x = FLOAT32.numbers(kind.shape).T.copy().T
        y, mask = kind.call(x, rng=stream, **how, **options)
        assert y is x
        assert mask is None
        out = np.full_like(x, np.nan)
        assert kind.call(x, rng=stream, out=out, **how, **options)[0] is out
        assert_same_bits(out, x)
    assert stream.offset == 0


@pytest.mark.parametrize("name", ["dropout", "variational_dropout, time last", "drop_connect", "stochastic_depth, row"])
def test_standard_evaluation_multiplies_by_the_realised_keep_probability(variant, name):
    """At p = 1 everything is 0, even infinities."""
    kind = MASKED[name]
    for dtype, p, store in itertools.product((FLOAT32, BFLOAT16), (1 / 3, 1.0), STORES):
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
    """The data are special values, in C order and in Fortran order."""
    x = np.resize(FLOAT32.specials().view(FLOAT32.public), kind.shape)

    def results():
        stream = fd.Stream(77)
        for data, options in itertools.product((x, x.copy("F")), kind.options()):
            y, mask = kind.call(data, p=0.1, rng=stream, **options)
            yield y
            yield fd.dropout_backward(data, mask)

    with fd.use_backend("numpy"):
        wanted = list(results())
    for actual, want in zip(results(), wanted, strict=True):
        assert_same_bits(actual, want)


@pytest.mark.parametrize("name", ["dropout", "feature_dropout, channels last", "drop_block, one axis"])
def test_any_number_of_threads_gives_the_same_bits(variant, threads, name):
    kind, found = MASKED[name], []
    x = FLOAT32.numbers((2 * GRAIN // math.prod(kind.shape[1:]) + 1, *kind.shape[1:]))
    for count in (1, 5):
        fd.set_num_threads(count)
        y, mask = kind.call(x, p=0.1, rng=5)
        found.append((y, fd.dropout_backward(x, mask)))
    for actual, want in zip(*found, strict=True):
        assert_same_bits(actual, want)


# ---- memory ----


@kinds_of_all
def test_memory_of_any_layout(variant, kind):
    """The layout of x, dy and ``out`` does not change the numbers, and neither does working in place.

    The result has x's layout if x has no gaps. ``out`` may be another view of x.
    """
    x = BFLOAT16.numbers(kind.shape)
    for options in kind.options():
        if options.get("scaling") == "standard":
            continue
        y, mask = kind.call(x, p=0.3, rng=4, **options)
        dx = fd.dropout_backward(x, mask)
        for layout in LAYOUTS:
            for call, wanted in (
                (lambda x, o=options, **out: kind.call(x, p=0.3, rng=4, **o, **out)[0], y),
                (lambda x, m=mask, **out: fd.dropout_backward(x, m, **out), dx),
            ):
                what, other = (options, layout), layouts(x)[layout]
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


@pytest.mark.parametrize("shape", [(), (0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 1, 1, 5), (1, 1, 1, 1)], ids=str)
def test_extents_of_0_and_1(variant, shape):
    """`test_sharing_agrees_with_numpy` has them for other kinds."""
    x = FLOAT32.numbers(shape)
    for op in (fd.alpha_dropout, fd.gaussian_dropout):
        y, mask = op(x, 0.5, rng=3)
        assert y.shape == mask.shape == fd.dropout_backward(x, mask).shape == shape
        with fd.use_backend("numpy"):
            assert_same_bits(y, op(x, 0.5, rng=3)[0], op)
    for size, p in itertools.product(((1, 1), (2, 2), (9, 1)) if shape else (), (0.5, 1.0)):
        stream = fd.Stream(3)
        y, mask = fd.drop_block(x, p, size, rng=stream)
        assert stream.offset == 1, "takes its number even of nothing, as every other kind does"
        assert mask.shape == y.shape == shape
        if x.size:
            keep = in_blocks(shape, size)(p, 3)
            assert (mask.to_bool() == keep).all()
            assert_same_bits(y, under(FLOAT32, x, keep, mask.scale))


# ---- arguments ----


def test_axes_and_sizes_of_any_integer_type_and_from_the_end():
    x, blocks = FLOAT32.numbers((4, 5, 6)), np.ones((2, 3, 8, 9))
    for axis, of_type in itertools.product(range(3), (int, np.int8, np.uint64)):
        for call in (fd.feature_dropout, fd.feature_alpha_dropout, fd.variational_dropout):
            (y, mask), (z, other) = call(x, 0.5, of_type(axis), rng=1), call(x, 0.5, axis - 3, rng=1)
            assert mask == other
            assert_same_bits(y, z)
    expected = fd.drop_block(blocks, 0.3, 3, rng=0)[1]
    for size in (np.int8(3), (np.uint64(3), 3), [3, 3], np.array([3, 3])):
        assert fd.drop_block(blocks, 0.3, size, rng=0)[1] == expected


@kinds_of_all
def test_random_state_of_every_kind(kind):
    """An int is a seed, a Stream takes one offset a call, a Generator gives a seed, None is the process-wide stream.

    A p of any real type is a float in the mask.
    """

    def mask(rng=None, p=0.5):
        return kind.call(x, p=p, rng=rng)[1]

    x, stream = np.ones(kind.shape), fd.Stream(3)
    masks = [mask(stream) for _ in range(3)]
    assert stream.offset == 3
    assert masks == [mask(fd.Stream(3, offset)) for offset in range(3)]
    assert masks[0] == mask(3) == mask(np.uint64(3)) == mask(np.int8(3))
    assert any(mask(seed) != masks[0] for seed in range(9))
    seed = int(np.random.default_rng(8).integers(0, 2**64, dtype=np.uint64))
    generator = np.random.default_rng(8)
    assert mask(generator) == mask(seed)
    assert generator.bit_generator.state != np.random.default_rng(8).bit_generator.state
    fd.manual_seed(6)
    assert [mask(), mask()] == [mask(fd.Stream(6, at)) for at in (0, 1)]
    for p in (np.float64(0.25), np.float32(0.25), np.float16(0.25), np.array(0.25)):
        assert mask(3, p) == mask(3, 0.25) != mask(3, 0.26)
        assert type(mask(3, p).p) is float


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


def test_gaussian_dropout_multiplies_by_normal_numbers(variant):
    """Compares with the formulas, up to float32's rounding of a radius of at most 6.7."""
    for p, n in itertools.product((0.5, 0.1, 0.9), (1, 65, 20_001)):
        y, _ = fd.gaussian_dropout(np.ones(n, np.float32), p, rng=fd.Stream(2**40 + 7, 2**33 + 5))
        np.testing.assert_allclose(y, factors(n, p, 2**40 + 7, 2**33 + 5), rtol=0, atol=1e-5 * math.sqrt(p / (1 - p)))


def test_gaussian_dropout_multiplies_by_float32_factors(variant, dtype):
    """The multipliers are the same for every dtype, in forward and backward, and depend on the logical index only.

    The product is computed in the wider type and rounded once: infinities, NaNs and zeros stay what they are.
    """
    x, dy = dtype.numbers((6, 7, 41)), dtype.numbers((6, 7, 41), seed=1)
    x.flat[:5] = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0])
    for p in (1e-300, 0.1, 1 - 2.0**-53):
        factor = fd.gaussian_dropout(np.ones(2000, np.float32), p, rng=8)[0][: x.size].reshape(x.shape)
        y, noise = fd.gaussian_dropout(x, p, rng=8)
        for result, values in ((y, x), (fd.dropout_backward(dy, noise), dy), (fd.apply_mask(dy, noise), dy)):
            with np.errstate(over="ignore"):
                wanted = (values.astype(dtype.computed) * factor.astype(dtype.computed)).astype(dtype.public)
            np.testing.assert_array_equal(result.astype(np.float64), wanted.astype(np.float64))
        assert noise == fd.GaussianNoise(8, 0, (6, 7, 41), p)
        assert noise.nbytes == 0
    assert_same_bits(fd.apply_mask(dy, fd.GaussianNoise(3, 4, dy.shape, 0.0)), dy)


# ---- any shape, axis and layout ----

SEEDS = st.integers(0, 2**64 - 1)
PROBABILITIES = st.one_of(
    st.sampled_from([0.0, 1e-10, 1e-6, 0.003, 3 / 256, 0.1, 1 / 3, 0.5, 0.75, 0.999, 1.0]), st.floats(0, 1)
)
SHAPES = st.lists(st.integers(0, 7), max_size=5).map(tuple)
DTYPE = st.sampled_from(DTYPES)


@st.composite
def laid_out(draw, values):
    """The same array in memory of another order, stride and direction."""
    order = draw(st.permutations(range(values.ndim)))
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in order]
    flips = [draw(st.booleans()) for _ in order]
    base = np.zeros([values.shape[axis] * step for axis, step in zip(order, steps, strict=True)], values.dtype)
    view = base[(..., *(slice(None, None, step) for step in steps))]
    view = view[(..., *(slice(None, None, -1 if flip else 1) for flip in flips))]
    view = view.transpose(np.argsort(order)) if order else view
    view[...] = values
    return view


@st.composite
def sharing(draw):
    """(call, shape of x, shape of the mask) of a kind in which elements may share decisions."""
    name = draw(st.sampled_from(["noise_shape", "feature", "variational", "row", "batch"]))
    least = {"noise_shape": 0, "feature": 2}.get(name, 1)
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=least, max_size=5)))
    if name == "noise_shape":
        written = tuple(draw(st.sampled_from([1, None, extent])) for extent in shape)
        cells = tuple(extent if e is None else e for e, extent in zip(written, shape, strict=True))
        return lambda x, p, **o: fd.dropout(x, p, noise_shape=written, **o), shape, cells
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    at = axis % len(shape)
    own = {"feature": {0, at}, "variational": set(range(len(shape))) - {at}, "row": {0}, "batch": set()}[name]
    calls = {
        "feature": lambda x, p, **o: fd.feature_dropout(x, p, axis, **o),
        "variational": lambda x, p, **o: fd.variational_dropout(x, p, axis, **o),
        "row": lambda x, p, **o: fd.stochastic_depth(x, p, "row", **o),
        "batch": lambda x, p, **o: fd.stochastic_depth(x, p, "batch", **o),
    }
    return calls[name], shape, tuple(extent if i in own else 1 for i, extent in enumerate(shape))


@given(data=st.data(), dtype=DTYPE, kind=sharing(), p=PROBABILITIES, seed=SEEDS)
def test_sharing_agrees_with_numpy(variant, data, dtype, kind, p, seed):
    call, shape, cells = kind
    options = {"scaling": data.draw(st.sampled_from(SCALINGS)), "store": data.draw(st.sampled_from(STORES))}
    x, dy = dtype.numbers(shape, seed=1), dtype.numbers(shape, seed=2)
    source, gradient = data.draw(laid_out(x)), data.draw(laid_out(dy))
    out = data.draw(st.one_of(st.none(), st.just(source), laid_out(np.full_like(x, np.nan))))
    y, mask = call(source, p, rng=seed, out=out, **options)
    scale = keep_scale(threshold(p)) if options["scaling"] == "inverted" else 1.0
    keep = drawn(*cells)(p, seed)
    assert mask is None or mask.shape == cells
    assert_same_bits(y, under(dtype, x, keep, scale))
    assert_same_bits(fd.dropout_backward(gradient, mask), under(dtype, dy, keep, scale))
    assert out is None or y is out
    assert_same_bits(gradient, dy)
    if out is not source:
        assert_same_bits(source, x)
    if threshold(p) == 0:
        assert mask is None
        assert y is (source if out is None else out)


@given(data=st.data(), dtype=DTYPE, seed=SEEDS, p=st.one_of(st.sampled_from([0.1, 0.5, 1.0]), st.floats(0, 1)))
def test_drop_block_agrees_with_a_loop_over_blocks(variant, data, dtype, seed, p):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=5)))
    sizes = tuple(data.draw(st.integers(1, 10)) for _ in shape[2:])
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


@given(
    n=st.integers(0, 3000),
    p=PROBABILITIES,
    seed=SEEDS,
    first=st.one_of(st.integers(0, 2000), st.just(2**37 - 700), st.integers(0, 2**64 - 3001)),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
)
def test_shards_tile_the_whole_mask(variant, n, p, seed, first, cuts):
    whole = fd.draw_mask(n, p, rng=seed, first_cell=first).to_bool()
    borders = [0, *sorted(cut for cut in cuts if cut <= n), n]
    shards = [
        fd.draw_mask(stop - start, p, rng=seed, first_cell=first + start).to_bool()
        for start, stop in itertools.pairwise(borders)
    ]
    assert (np.concatenate(shards) == whole).all()


@given(shape=SHAPES, more=st.integers(0, 99), p=PROBABILITIES, q=PROBABILITIES, seed=SEEDS)
def test_masks_depend_on_the_logical_index_and_are_nested_in_p(shape, more, p, q, seed):
    """A mask of another shape has the same bits, and a higher p drops everything that a lower one drops."""
    n, (low, high) = math.prod(shape), sorted((p, q))
    kept, longer = fd.draw_mask(shape, high, rng=seed).to_bool(), fd.draw_mask(n + more, high, rng=seed).to_bool()
    assert (kept.reshape(-1) == longer[:n]).all()
    assert (kept <= fd.draw_mask(shape, low, rng=seed).to_bool()).all()

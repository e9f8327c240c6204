"""The fused ops of the NumPy API against their formulas in float64, under the masks of plain dropout.

The table `OPS` gives each op with its formula.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.arrays.host import HOST, HostOps
from fastdrop.core.random import keep_scale, threshold

from ..cases import DTYPES, SEED, TOLERANCE, assert_close, assert_same_bits, bits_of

STORES = ("bits", "seed")
P = 0.3
SCALE = keep_scale(threshold(P))

DTYPE = {dtype.name: dtype for dtype in DTYPES}
FLOAT32, FLOAT64, MIXED = ("float32", "float32"), ("float64", "float64"), ("bfloat16", "float32")  # x and residual
SHAPE = (7, 53)


# ---- what the ops are composed of, in float64 ----


def phi(h):
    return 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-h / math.sqrt(2))


ACTIVATIONS = {
    None: lambda h: h,
    "relu": lambda h: np.maximum(h, 0),
    "gelu": lambda h: h * phi(h),
    "gelu_tanh": lambda h: h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "silu": lambda h: h / (1 + np.exp(-h)),
}


def dropped(h, keep, scale):
    return np.where(keep, h * scale, 0.0)


def added(keep, scale, x, residual=0.0, bias=0.0):
    return (residual + dropped(x + bias, keep, scale),)


def activated(keep, scale, x, bias=0.0, activation="gelu"):
    return (dropped(ACTIVATIONS[activation](x + bias), keep, scale),)


def gated(keep, scale, gate, up, activation="silu"):
    return (dropped(ACTIVATIONS[activation](gate) * up, keep, scale),)


def normed(keep, scale, x, residual=None, weight=1.0, bias=0.0, x_bias=0.0, eps=1e-5, centred=True):
    stream = dropped(x + x_bias, keep, scale) + (0.0 if residual is None else residual)
    centre = stream.mean(-1, keepdims=True) if centred else 0.0
    deviation = np.sqrt(np.square(stream - centre).mean(-1, keepdims=True) + eps)
    return (stream - centre) / deviation * weight + bias, stream


def softmax(keep, scale, scores, factor=1.0, mask=None, causal=False):
    s = scores * factor
    if mask is not None:
        s = np.where(mask, s, -np.inf) if mask.dtype == np.bool_ else s + mask.astype(np.float64)
    if causal:
        s = np.where(np.tri(*s.shape[-2:]), s, -np.inf)
    with np.errstate(invalid="ignore"):
        e = np.exp(s - s.max(-1, keepdims=True))
        e = np.where(np.isneginf(s).all(-1, keepdims=True), 0.0, e / e.sum(-1, keepdims=True))
    if causal:
        e = np.where(np.tri(*s.shape[-2:]), e, 0.0)  # in a row of NaNs as well
    return (dropped(e, keep, scale),)


@dataclass(frozen=True)
class Op:
    """``takes`` says for each array: like x ("x"), like the residual ("stream"), or a vector ("columns")."""

    call: Callable[..., tuple[Any, ...]]
    takes: dict[str, str]
    composed: Callable[..., tuple[np.ndarray, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    keeps: tuple[str, ...] = ()

    @property
    def first(self) -> str:
        return next(iter(self.takes))

    @property
    def takes_out(self) -> bool:
        return "norm" not in self.call.__name__

    @property
    def keeps_results(self) -> bool:
        """Whether backward reads results that were rounded to the dtype of x or of the residual."""
        return bool({"residual_out", "probabilities"} & set(self.keeps))

    def arrays(self, kinds: tuple[str, str], shape: tuple[int, ...] = SHAPE) -> dict[str, np.ndarray]:
        """Ordinary numbers. Vectors are float32 or float64."""
        x, stream = (DTYPE[name] for name in kinds)
        dtypes = {"x": x, "stream": stream, "columns": DTYPE["float64" if x.name == "float64" else "float32"]}
        return {
            name: dtypes[kind].numbers(shape[-1:] if kind == "columns" else shape, seed=i)
            for i, (name, kind) in enumerate(self.takes.items())
        }

    def __call__(self, arrays: dict[str, np.ndarray], p: float = P, **more: Any) -> tuple[list[np.ndarray], Any]:
        *results, saved = self.call(**arrays, **self.options, p=p, **{"rng": SEED, **more})
        return results, saved

    def expected(self, arrays: dict[str, np.ndarray], keep: Any, scale: float) -> tuple[np.ndarray, ...]:
        with np.errstate(all="ignore"):
            return self.composed(keep, scale, **{name: array.astype(np.float64) for name, array in arrays.items()})


ADD = {"x": "x", "residual": "stream"}
BIAS = {"x": "x", "bias": "columns"}
BOTH = ("dropout_add", "bias_dropout_add")
NORM = {"x": "x", "residual": "stream", "weight": "columns", "bias": "columns", "x_bias": "columns"}
RMS = {"x": "x", "residual": "stream", "weight": "columns", "x_bias": "columns"}
TRIANGLE = np.tri(SHAPE[0], SHAPE[1], 20)


def act(name, takes=BIAS):
    keeps = () if name in (None, "relu") else tuple(takes)
    options = {"activation": name} if "bias" in takes else {"activation": name, "bias": None}
    return Op(fd.bias_act_dropout, takes, partial(activated, activation=name), options, keeps)


BARE_NORM = ("residual_out", "statistics")
WEIGHTED_NORM = (*BARE_NORM, "weight")
RMSED = partial(normed, eps=2.0**-23, centred=False)
OPS = {
    "dropout_add": Op(fd.dropout_add, ADD, added),
    "bias_dropout_add": Op(fd.bias_dropout_add, {**BIAS, "residual": "stream"}, added),
    "no activation": act(None),
    "relu": act("relu"),
    "relu, no bias": act("relu", {"x": "x"}),
    "gelu": act("gelu"),
    "gelu, no bias": act("gelu", {"x": "x"}),
    "gelu_tanh": act("gelu_tanh"),
    "silu": act("silu"),
    "swiglu_dropout": Op(fd.swiglu_dropout, {"gate": "x", "up": "x"}, gated, {}, ("gate", "up")),
    "geglu_dropout": Op(
        fd.geglu_dropout, {"gate": "x", "up": "x"}, partial(gated, activation="gelu"), {}, ("gate", "up")
    ),
    "geglu_dropout, tanh": Op(
        fd.geglu_dropout,
        {"gate": "x", "up": "x"},
        partial(gated, activation="gelu_tanh"),
        {"approximate": "tanh"},
        ("gate", "up"),
    ),
    "layer_norm": Op(fd.dropout_add_layer_norm, NORM, normed, {}, WEIGHTED_NORM),
    "layer_norm, bare": Op(fd.dropout_add_layer_norm, {"x": "x"}, normed, {"residual": None}, BARE_NORM),
    "rms_norm": Op(fd.dropout_add_rms_norm, RMS, RMSED, {"eps": 2.0**-23}, WEIGHTED_NORM),
    "softmax": Op(fd.softmax_dropout, {"scores": "x"}, softmax, {}, ("probabilities",)),
    "softmax, masked": Op(
        fd.softmax_dropout,
        {"scores": "x"},
        partial(softmax, factor=0.7, mask=TRIANGLE, causal=True),
        {"scale": 0.7, "attn_mask": TRIANGLE, "causal": True},
        ("probabilities",),
    ),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


@pytest.fixture(params=[name for name, op in OPS.items() if "attn_mask" not in op.options])
def unmasked(request):
    """Each op that accepts data of any shape."""
    return OPS[request.param]


def keep_of(shape, p=P):
    return fd.draw_mask(shape, p, rng=SEED).to_bool()


def incoming(results):
    """Ordinary numbers for the gradients of results."""
    with np.errstate(over="ignore"):
        return [np.random.default_rng(50 + i).normal(size=r.shape).astype(r.dtype) for i, r in enumerate(results)]


def gradients_of(op, arrays, **options):
    """The gradients of a call by name, for ordinary numbers as incoming gradients."""
    results, saved = op(arrays, **options)
    return saved.backward(*incoming(results))._asdict()


def assert_near(actual, expected, kind, what="", rounded=False):
    """``rounded``: an intermediate result was stored in 16 bits, which may change every number."""
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    if rounded:
        rounding = TOLERANCE[kind]
        np.testing.assert_allclose(actual, expected, rounding, rounding * np.abs(expected).mean(), err_msg=str(what))
    else:
        assert_close(actual, expected, DTYPE[kind], what)


def assert_all_same(first, second):
    """Compares results or gradients bit for bit."""
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same_bits(a, b)


# ---- results and gradients ----


@pytest.mark.parametrize("kinds", [FLOAT32, FLOAT64, MIXED], ids=" ".join)
def test_results_and_gradients_are_those_of_the_formula_under_the_plain_mask(backend, op, kinds):
    arrays = op.arrays(kinds)
    results, saved = op(arrays)
    keep = keep_of(SHAPE)
    for i, (actual, expected) in enumerate(zip(results, op.expected(arrays, keep, SCALE), strict=True)):
        is_stream = "residual" in op.takes and (i == 1 or "norm" not in saved.op)
        assert actual.dtype == DTYPE[kinds[is_stream]].public
        assert actual.flags.c_contiguous
        is_rounded = kinds == MIXED and op.keeps_results and i < len(results) - 1
        assert_near(actual, expected, kinds[0], i, rounded=is_rounded)
    if op.options.get("activation") == "relu":
        h = arrays["x"].astype(np.float64) + arrays.get("bias", 0.0)
        assert saved.mask == fd.PackedMask.from_bool(keep & (h > 0), P)
    else:
        assert saved.mask == fd.dropout(arrays[op.first], P, rng=SEED)[1]

    down = incoming(results)
    gradients = saved.backward(*down)._asdict()
    with fd.use_backend("numpy"):
        _, wide = op({name: array.astype(np.float64) for name, array in arrays.items()})
        wanted = wide.backward(*(dy.astype(np.float64) for dy in down))._asdict()
    for name, gradient in gradients.items():
        assert (gradient is not None) == (name in op.takes), name
        if gradient is not None:
            assert gradient.dtype == arrays[name].dtype, name
            assert gradient.flags.c_contiguous
            assert_near(gradient, wanted[name], kinds[0], name, rounded=kinds == MIXED and op.keeps_results)


@pytest.mark.every_backend
@pytest.mark.parametrize("name", ["bias_dropout_add", "gelu", "layer_norm", "softmax, masked"])
def test_one_of_each_primitive_on_every_backend(backend, name):
    """Beside float32 a residual of 32 bits and data of 16, from bits and from a seed."""
    op = OPS[name]
    for kinds, store in ((FLOAT32, "seed"), (MIXED, "bits")):
        arrays = op.arrays(kinds)
        results, saved = op(arrays, store=store)
        with fd.use_backend("numpy"):
            wanted, wide = op({name: array.astype(np.float64) for name, array in arrays.items()})
        down = incoming(results)
        gradients, expected = saved.backward(*down), wide.backward(*(dy.astype(np.float64) for dy in down))
        for actual, want in zip((*results, *gradients), (*wanted, *expected), strict=True):
            assert (actual is None) == (want is None)
            if actual is not None:
                assert_near(actual, want, kinds[0], name, rounded=kinds == MIXED and op.keeps_results)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_match_finite_differences(backend, op, training):
    shape, h = (4, 6), 1e-5
    arrays = op.arrays(FLOAT64, shape)
    if "attn_mask" in op.options:
        op = Op(op.call, op.takes, op.composed, {**op.options, "attn_mask": TRIANGLE[:4, :6]})
    results, saved = op(arrays, training=training)
    down = incoming(results)
    gradients = saved.backward(*down)._asdict()

    def loss(name, index, step):
        moved = arrays[name].copy()
        moved[index] += step
        results, _ = op({**arrays, name: moved}, training=training)
        return sum((result * dy).sum() for result, dy in zip(results, down, strict=True))

    for name, array in arrays.items():
        numeric = np.empty_like(array)
        for index in np.ndindex(array.shape):
            numeric[index] = (loss(name, index, h) - loss(name, index, -h)) / (2 * h)
        np.testing.assert_allclose(gradients[name], numeric, rtol=1e-6, atol=1e-8, err_msg=name)


def test_gradient_of_either_result_alone(backend):
    """A norm's two results may be used alone: y without dresidual, and the sum with dy = 0."""
    op = OPS["layer_norm"]
    (y, stream), saved = op(op.arrays(FLOAT64))
    (dy,) = incoming([y])
    assert_all_same(saved.backward(dy), saved.backward(dy, np.zeros_like(stream)))
    of_stream = saved.backward(np.zeros_like(y), dy)
    assert_same_bits(of_stream.residual, dy)
    assert_same_bits(of_stream.x, dropped(dy, keep_of(SHAPE), SCALE))
    assert not of_stream.weight.any()


def test_residual_gradient_is_dy_itself():
    names = ("dropout_add", "bias_dropout_add")
    for name, kinds, training in itertools.product(names, (FLOAT32, MIXED), (True, False)):
        arrays = OPS[name].arrays(kinds)
        (y,), saved = OPS[name](arrays, training=training)
        for how in ("as it is", "Fortran", "every other"):
            dy = laid_out(y, how)
            gradients = saved.backward(dy)
            assert gradients.residual is dy
            assert gradients.x.dtype == arrays["x"].dtype
            nothing_to_do = name == "dropout_add" and kinds == FLOAT32 and not training
            assert (gradients.x is dy) == nothing_to_do
            assert nothing_to_do or gradients.x.flags.c_contiguous


# ---- modes ----


def test_nothing_is_dropped_and_no_number_taken(backend, op):
    for mode in ({"training": False}, {"p": 2.0**-40}):
        arrays, stream = op.arrays(FLOAT32), fd.Stream(3, 8)
        results, saved = op(arrays, rng=stream, **mode)
        assert stream.offset == 8
        for actual, expected in zip(results, op.expected(arrays, True, 1.0), strict=True):
            assert_near(actual, expected, "float32")
        if op.options.get("activation") == "relu":
            assert (saved.mask.p, saved.mask.scale) == (0.0, 1.0)
            assert (saved.mask.to_bool() == (results[0] > 0)).all()
        else:
            assert saved.mask is None


@pytest.mark.parametrize("store", STORES)
def test_everything_is_dropped(backend, op, store):
    """p = 1: the result is the residual even if x is infinite, and the gradient of x is 0 even if dy is NaN."""
    arrays = op.arrays(FLOAT32)
    is_softmax = op.first == "scores"
    if not is_softmax:
        arrays[op.first][...] = np.inf
    results, saved = op(arrays, p=1.0, store=store)
    assert saved.mask.p == 1.0
    if "residual" in arrays:
        assert_same_bits(results[-1], arrays["residual"] + np.float32(0))
    else:
        assert not bits_of(results[-1]).any()
    down = [np.full_like(result, np.nan) for result in results] if op.takes_out else incoming(results)
    gradients = saved.backward(*down)._asdict()
    for name in (op.first, "up"):
        if gradients.get(name) is not None and not is_softmax:
            assert not bits_of(gradients[name]).any(), name


def test_seed_store_equals_bits_store(backend, op):
    arrays = op.arrays(FLOAT32)
    (one, packed), (other, seeded) = (op(arrays, store=store, rng=fd.Stream(3, 8)) for store in STORES)
    assert_all_same(one, other)
    assert_all_same(packed.backward(*one), seeded.backward(*one))
    assert isinstance(packed.mask, fd.PackedMask)
    if op.options.get("activation") == "relu":
        assert packed.mask == seeded.mask
    else:
        assert isinstance(seeded.mask, fd.SeededMask)
        assert (seeded.mask.seed, seeded.mask.offset) == (3, 8)
        assert packed.nbytes - seeded.nbytes == packed.mask.nbytes


def test_what_is_kept(op):
    """Backward may run twice and after pickling. It does not change if an optimiser changes weights in place."""
    arrays = op.arrays(MIXED)
    columns = [name for name, of in op.takes.items() if of == "columns"]
    n, keeps = math.prod(SHAPE), ("mask", *op.keeps)
    for own in (arrays, arrays | {name: arrays[name].astype(np.float16) for name in columns}):  # which are cast
        results, saved = op(own)
        bytes_of = {"x": 2 * n, "gate": 2 * n, "up": 2 * n, "probabilities": 2 * n, "statistics": 8 * SHAPE[0]}
        bytes_of |= {"residual_out": (4 if "residual" in op.takes else 2) * n, "mask": 4 * ((n + 31) // 32)}
        bytes_of |= dict.fromkeys(("bias", "weight"), 4 * SHAPE[1])
        expected = sum(bytes_of[name] for name in keeps)
        assert saved.nbytes == expected
        assert repr(saved) == f"Saved(op={op.call.__name__!r}, shape={SHAPE}, keeps={keeps}, nbytes={expected})"
        assert isinstance(saved, fd.Saved)
        down = incoming(results)
        before, gradients = [dy.copy() for dy in down], saved.backward(*down)
        for name in columns:
            own[name] += 1
        assert_all_same(saved.backward(*down), gradients)
        assert_all_same(pickle.loads(pickle.dumps(saved)).backward(*down), gradients)
        assert_all_same(down, before)


# ---- shapes and memory ----


def test_shapes(backend, unmasked):
    """The axes before the last make no difference to a row. One element and one row are among the shapes."""
    op = unmasked
    for shape in [(1,), (5,), (4, 1), (1, 1), (3, 2, 33), (2, 3, 1, 8), (130, 3)]:
        arrays = op.arrays(FLOAT32, shape)
        results, saved = op(arrays)
        for actual, expected in zip(results, op.expected(arrays, keep_of(shape), SCALE), strict=True):
            assert_near(actual, expected, "float32", shape)
        rows = {k: v if op.takes[k] == "columns" else v.reshape(-1, shape[-1]) for k, v in arrays.items()}
        flat, flat_saved = op(rows)
        assert_all_same([result.reshape(-1, shape[-1]) for result in results], flat)
        gradients, flat_gradients = saved.backward(*results)._asdict(), flat_saved.backward(*flat)._asdict()
        for name, array in arrays.items():
            assert gradients[name].shape == array.shape
            assert_same_bits(gradients[name].reshape(rows[name].shape), flat_gradients[name], (shape, name))


def test_empty_arrays(backend, unmasked):
    op = unmasked
    for shape, store in itertools.product([(0,), (0, 5), (3, 0), (2, 0, 4)], STORES):
        arrays = op.arrays(MIXED, shape)
        results, saved = op(arrays, store=store)
        assert [result.shape for result in results] == [shape] * len(results)
        gradients = saved.backward(*results)._asdict()
        for name, array in arrays.items():
            assert gradients[name].shape == array.shape
            assert gradients[name].dtype == array.dtype
            assert not gradients[name].any()


def test_numbers_and_lists(backend):
    x, other = np.array(2.0), np.array(-1.0)
    for training in (True, False):
        y, saved = fd.dropout_add(x, other, 1.0, training=training)
        assert y.shape == ()
        assert y == (-1.0 if training else 1.0)
        assert saved.backward(x).x == (0.0 if training else 2.0)
    y, saved = fd.swiglu_dropout(x, other, 0.0)
    assert y == pytest.approx(-2 / (1 + math.exp(-2)))
    y, saved = fd.bias_act_dropout(x, None, 0.0, "relu")
    assert y == 2.0
    assert saved.backward(x).x.shape == ()
    y, saved = fd.bias_dropout_add([[1.0, 2.0]], [0.5, 0.5], [[1.0, 1.0]], 0.0)
    assert y.tolist() == [[2.5, 3.5]]
    assert saved.backward([[1.0, 2.0]]).bias.tolist() == [1.0, 2.0]


def laid_out(array, how):
    """The same numbers in another order of memory."""
    if how == "as it is":
        return array
    if how == "Fortran":
        return np.asfortranarray(array)
    if how == "reversed":
        return array[::-1].copy()[::-1]
    return np.repeat(array, 2, axis=-1)[..., ::2]


def test_strides_do_not_matter(backend, op):
    arrays = op.arrays(MIXED)
    results, saved = op(arrays)
    down = incoming(results)
    gradients = saved.backward(*down)
    for how in ("Fortran", "reversed", "every other"):
        others, other_saved = op({name: laid_out(array, how) for name, array in arrays.items()})
        assert_all_same(results, others)
        assert all(result.flags.c_contiguous for result in others)
        assert_all_same(gradients, other_saved.backward(*(laid_out(dy, how) for dy in down)))


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.takes_out])
def test_out_takes_the_result(backend, name):
    op = OPS[name]
    for kinds in (FLOAT32, MIXED):
        arrays = op.arrays(kinds)
        (y,), saved = op(arrays)
        expected = saved.backward(*incoming([y]))
        for out in (np.empty_like(y), np.empty((SHAPE[1], 2 * SHAPE[0]), y.dtype).T[::2]):
            (result,), _ = op(arrays, out=out)
            assert result is out
            assert_same_bits(result, y)
        for over, order in itertools.product(arrays, "CF"):
            if arrays[over].shape == y.shape and arrays[over].dtype == y.dtype:
                own = {of: array.copy(order) for of, array in arrays.items()}
                (result,), saved = op(own, out=own[over])
                assert result is own[over]
                assert_same_bits(result, y)
                assert_all_same(saved.backward(*incoming([y])), expected)


@pytest.mark.parametrize("name", ["bias_dropout_add", "gelu", "softmax"])
def test_out_over_columns_changes_nothing(backend, name):
    """The first row of the result overwrites a bias or attention mask that the second row and gelu's gradient need."""
    op, n = OPS[name], 3001  # more than kernels have in hand at once
    x, columns = op.arrays(FLOAT64, (2, n)), np.linspace(0, 1, n)
    of = "attn_mask" if name == "softmax" else "bias"
    (y,), saved = op({**x, of: columns})
    out = np.zeros((2, n))
    out[0] = columns
    (over,), over_saved = op({**x, of: out[0]}, out=out)
    assert over is out
    assert_same_bits(over, y)
    assert_all_same(saved.backward(y), over_saved.backward(y))


def test_eps_of_an_rms_norm_is_that_of_the_arithmetic(backend):
    """The numbers are as small as eps, so that the result depends on it."""
    for kind, eps in (("float32", 2.0**-23), ("float16", 2.0**-23), ("float64", 2.0**-52)):
        x = np.full((2, 8), math.sqrt(eps), kind)
        y, _, _ = fd.dropout_add_rms_norm(x, None, p=0.0)
        assert_same_bits(y, fd.dropout_add_rms_norm(x, None, None, 0.0, eps)[0])
        np.testing.assert_allclose(y, math.sqrt(0.5), rtol=1e-2)


@pytest.mark.parametrize("of", ["bfloat16", "float64"])
def test_columns_of_any_dtype(backend, of):
    """They are cast to the dtype of the computation; their gradients have their own dtype."""
    for name in ("bias_dropout_add", "gelu", "layer_norm", "rms_norm"):
        op = OPS[name]
        arrays = op.arrays(FLOAT32)
        given = {k: v.astype(DTYPE[of].public) if op.takes[k] == "columns" else v for k, v in arrays.items()}
        wide = {k: v.astype(np.float32) for k, v in given.items()}
        assert_all_same(op(given)[0], op(wide)[0])
        got, expected = gradients_of(op, given), gradients_of(op, wide)
        for k, v in given.items():
            assert_same_bits(got[k], expected[k].astype(v.dtype))


# ---- attention masks ----

SCORES = (2, 3, 4, 5)
MASKS = [
    (),
    (1,),
    (5,),
    (4, 1),
    (4, 5),
    (3, 1, 1),
    (3, 1, 5),
    (1, 4, 5),
    (2, 1, 1, 5),
    (2, 1, 4, 1),
    (2, 3, 1, 5),
    SCORES,
]


@pytest.mark.parametrize("kind", ["bool", "float16"])
def test_attention_masks_broadcast_without_copies(backend, monkeypatch, kind):
    rng, run, sizes = np.random.default_rng(1), HOST.run_primitive, []

    def spy(_, primitive, dtypes, arrays, *rest):
        sizes.append(arrays[1].size)
        return run(primitive, dtypes, arrays, *rest)

    monkeypatch.setattr(HostOps, "run_primitive", spy)
    scores = rng.normal(size=SCORES).astype(np.float32)
    for shape in MASKS:
        mask = np.asarray(rng.random(shape) < 0.7 if kind == "bool" else rng.normal(size=shape), kind)
        y, _ = fd.softmax_dropout(scores, P, 0.5, mask, rng=SEED)
        (expected,) = softmax(keep_of(SCORES), SCALE, scores, 0.5, mask)
        assert_near(y, expected, "float32", shape)
        spread, _ = fd.softmax_dropout(scores, P, 0.5, np.broadcast_to(mask, SCORES), rng=SEED)
        assert_same_bits(y, spread, shape)
        assert {sizes.pop(), sizes.pop()} == {math.prod((1, *shape)[:-1]) * SCORES[-1]}, shape

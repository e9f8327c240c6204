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
from fastdrop.arrays import host
from fastdrop.cli import selftest
from fastdrop.core.random import keep_scale, threshold

from ..cases import DTYPES, SEED, TOLERANCE, assert_close, assert_same_bits, bits_of

STORES = ("bits", "seed")
P = 0.3
SCALE = keep_scale(threshold(P))

DTYPE = {dtype.name: dtype for dtype in DTYPES}
KINDS = {  # of x and of the residual
    "float32": ("float32", "float32"),
    "float64": ("float64", "float64"),
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16 in float32": ("float16", "float32"),
    "bfloat16 in float32": ("bfloat16", "float32"),
}
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
    """``takes`` names the arrays: "x" of its shape, "stream" of that and the residual's dtype, "columns"."""

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

    def rounds(self, kind: str) -> bool:
        """Whether it keeps what it computed, in 16 bits."""
        return DTYPE[kind].itemsize == 2 and bool({"residual_out", "probabilities"} & set(self.keeps))

    def arrays(self, kinds: tuple[str, str], shape: tuple[int, ...] = SHAPE, seed: int = 0) -> dict[str, np.ndarray]:
        """Ordinary numbers; what is per column is always float32 or float64."""
        x, stream = (DTYPE[name] for name in kinds)
        dtypes = {"x": x, "stream": stream, "columns": DTYPE["float64" if x.name == "float64" else "float32"]}
        return {
            name: dtypes[kind].numbers(shape[-1:] if kind == "columns" else shape, seed + i)
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
NORMS = [name for name in OPS if "norm" in name]
POINTWISE = [name for name in OPS if "norm" not in name and "softmax" not in name]


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


@pytest.fixture(params=[name for name, op in OPS.items() if "attn_mask" not in op.options])
def unmasked(request):
    """Those that take data of any shape."""
    return OPS[request.param]


def keep_of(shape, p=P):
    return fd.draw_mask(shape, p, rng=SEED).to_bool()


def gradients_of(op, arrays, seed=50, **options):
    """Of a call, given ordinary numbers for what comes back; by name."""
    results, saved = op(arrays, **options)
    with np.errstate(over="ignore"):
        down = [np.random.default_rng(seed + i).normal(size=r.shape).astype(r.dtype) for i, r in enumerate(results)]
    return saved.backward(*down)._asdict()


def assert_near(actual, expected, kind, what="", rounded=False):
    """``rounded``: something on the way was stored in 16 bits, and every number may show it."""
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    if rounded:
        rounding = TOLERANCE[kind]
        np.testing.assert_allclose(actual, expected, rounding, rounding * np.abs(expected).mean(), err_msg=str(what))
    else:
        assert_close(actual, expected, DTYPE[kind], what)


def assert_all_same(first, second):
    """Bit for bit, results or gradients by name."""
    pairs = (
        zip(first.values(), second.values(), strict=True)
        if isinstance(first, dict)
        else zip(first, second, strict=True)
    )
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            assert_same_bits(a, b)


# ---- results and gradients ----


@pytest.mark.parametrize("kind", KINDS)
def test_result_is_the_composed_formula_under_the_plain_mask(backend, op, kind):
    kinds = KINDS[kind]
    if kinds[0] != kinds[1] and "residual" not in op.takes:
        kinds = (kinds[0], kinds[0])
    arrays = op.arrays(kinds)
    results, saved = op(arrays)
    keep = keep_of(SHAPE)
    for i, (actual, expected) in enumerate(zip(results, op.expected(arrays, keep, SCALE), strict=True)):
        is_stream = i == 1 or "norm" not in saved.op
        assert actual.dtype == DTYPE[kinds[1] if is_stream and "residual" in op.takes else kinds[0]].public
        assert actual.flags.c_contiguous
        assert_near(actual, expected, kinds[0], i, rounded=op.rounds(kinds[0]) and i < len(results) - 1)
    if op.options.get("activation") == "relu":
        h = arrays["x"].astype(np.float64) + arrays.get("bias", 0.0)
        assert saved.mask == fd.PackedMask.from_bool(keep & (h > 0), P)
    else:
        assert saved.mask == fd.dropout(arrays[op.first], P, rng=SEED)[1]


@pytest.mark.every_backend
@pytest.mark.parametrize("kind", ["float32", "bfloat16 in float32"])
def test_gradients_are_those_in_float64(backend, op, kind):
    kinds = KINDS[kind]
    if kinds[0] != kinds[1] and "residual" not in op.takes:
        kinds = (kinds[0], kinds[0])
    arrays = op.arrays(kinds)
    gradients = gradients_of(op, arrays)
    with fd.use_backend("numpy"):
        results, _ = op(arrays)
        wide = {name: array.astype(np.float64) for name, array in arrays.items()}
        _, saved = op(wide)
        down = [np.random.default_rng(50 + i).normal(size=r.shape).astype(r.dtype) for i, r in enumerate(results)]
        expected = saved.backward(*(dy.astype(np.float64) for dy in down))._asdict()
    for name, gradient in gradients.items():
        assert (gradient is not None) == (name in op.takes), name
        if gradient is not None:
            assert gradient.dtype == arrays[name].dtype, name
            assert gradient.flags.c_contiguous
            assert_near(gradient, expected[name], kinds[0], name, rounded=op.rounds(kinds[0]))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_match_finite_differences(backend, op, training):
    shape, h = (4, 6), 1e-5
    arrays = op.arrays(KINDS["float64"], shape)
    if "attn_mask" in op.options:
        mask = TRIANGLE[:4, :6]
        op = Op(op.call, op.takes, op.composed, {**op.options, "attn_mask": mask})
    results, saved = op(arrays, training=training)
    rng = np.random.default_rng(3)
    down = [rng.normal(size=result.shape) for result in results]
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
    """The two results of a norm are used apart as well: y alone, and the stream by way of a zero dy."""
    op = OPS["layer_norm"]
    arrays = op.arrays(KINDS["float64"])
    (y, stream), saved = op(arrays)
    dy = np.random.default_rng(3).normal(size=y.shape)
    assert_all_same(saved.backward(dy)._asdict(), saved.backward(dy, np.zeros_like(stream))._asdict())
    of_stream = saved.backward(np.zeros_like(y), dy)
    assert_same_bits(of_stream.residual, dy)
    assert_same_bits(of_stream.x, dropped(dy, keep_of(SHAPE), SCALE))
    assert not of_stream.weight.any()


def test_residual_gradient_is_dy_itself():
    for name, kind, training in itertools.product(BOTH, ("bfloat16 in float32", "float32"), (True, False)):
        arrays = OPS[name].arrays(KINDS[kind])
        (y,), saved = OPS[name](arrays, training=training)
        for how in ("as it is", "Fortran", "every other"):
            dy = laid_out(y, how)
            gradients = saved.backward(dy)
            assert gradients.residual is dy
            assert gradients.x.dtype == arrays["x"].dtype
            nothing_to_do = name == "dropout_add" and kind == "float32" and not training
            assert (gradients.x is dy) == nothing_to_do
            assert nothing_to_do or gradients.x.flags.c_contiguous


# ---- modes ----


def test_nothing_is_dropped_and_no_number_taken(backend, op):
    for mode in ({"training": False}, {"p": 0.0}, {"p": 2.0**-40}):
        assert_drops_nothing(op, mode)


def assert_drops_nothing(op, mode):
    arrays, stream = op.arrays(KINDS["float32"]), fd.Stream(3, 8)
    results, saved = op(arrays, rng=stream, **mode)
    assert stream.offset == 8
    for actual, expected in zip(results, op.expected(arrays, True, 1.0), strict=True):
        assert_near(actual, expected, "float32")
    if op.options.get("activation") == "relu":
        assert (saved.mask.p, saved.mask.scale) == (0.0, 1.0)
        assert (saved.mask.to_bool() == (results[0] > 0)).all()
    else:
        assert saved.mask is None
    arrays = op.arrays(KINDS["float64"])
    expected = gradients_of(op, arrays, **mode)
    for name, gradient in gradients_of(op, op.arrays(KINDS["float32"]), **mode).items():
        if gradient is not None:
            assert_near(gradient, expected[name], "float32", name)


@pytest.mark.parametrize("store", STORES)
def test_everything_is_dropped(backend, op, store):
    """p = 1: the residual passes, whatever x is, and x gets no gradient, whatever dy is."""
    arrays = op.arrays(KINDS["float32"])
    if "softmax" not in op.call.__name__:
        arrays[op.first][...] = np.inf
    results, saved = op(arrays, p=1.0, store=store)
    assert saved.mask.p == 1.0
    last = results[-1]
    if "residual" in arrays:
        assert_same_bits(last, arrays["residual"] + np.float32(0))
    else:
        assert not bits_of(last).any()
    down = [np.full_like(result, np.nan) for result in results] if op.takes_out else [np.ones_like(r) for r in results]
    gradients = saved.backward(*down)._asdict()
    for name in (op.first, "up"):
        if gradients.get(name) is not None and "softmax" not in op.call.__name__:
            assert not bits_of(gradients[name]).any(), name


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_seed_store_equals_bits_store(backend, op, kind):
    arrays = op.arrays((kind, kind))
    (one, packed), (other, seeded) = (op(arrays, store=store, rng=fd.Stream(3, 8)) for store in STORES)
    assert_all_same(one, other)
    down = [np.ones_like(result) for result in one]
    assert_all_same(packed.backward(*down)._asdict(), seeded.backward(*down)._asdict())
    assert isinstance(packed.mask, fd.PackedMask)
    if op.options.get("activation") == "relu":
        assert packed.mask == seeded.mask
    else:
        assert isinstance(seeded.mask, fd.SeededMask)
        assert (seeded.mask.seed, seeded.mask.offset) == (3, 8)
        assert packed.nbytes - seeded.nbytes == packed.mask.nbytes


def test_what_is_kept(op):
    arrays = op.arrays(KINDS["float16 in float32" if "residual" in op.takes else "float16"])
    _, saved = op(arrays)
    n = math.prod(SHAPE)
    bytes_of = {"x": 2 * n, "gate": 2 * n, "up": 2 * n, "probabilities": 2 * n, "statistics": 8 * SHAPE[0]}
    bytes_of["residual_out"] = (4 if "residual" in op.takes else 2) * n
    bytes_of["bias"] = bytes_of["weight"] = 4 * SHAPE[1]
    expected = 4 * ((n + 31) // 32) + sum(bytes_of[name] for name in op.keeps)
    assert saved.nbytes == expected
    assert repr(saved) == (
        f"Saved(op={op.call.__name__!r}, shape={SHAPE}, keeps={('mask', *op.keeps)}, nbytes={expected})"
    )
    assert isinstance(saved, fd.Saved)


def test_what_is_kept_pickles(op):
    results, saved = op(op.arrays(KINDS["float32"]))
    down = [np.ones_like(result) for result in results]
    again = pickle.loads(pickle.dumps(saved))
    assert_all_same(again.backward(*down)._asdict(), saved.backward(*down)._asdict())


def test_backward_may_run_again(backend, op):
    results, saved = op(op.arrays(KINDS["float32"]))
    down = [np.ones_like(result) for result in results]
    before = [dy.copy() for dy in down]
    assert_all_same(saved.backward(*down)._asdict(), saved.backward(*down)._asdict())
    assert_all_same(down, before)


def test_weights_and_biases_may_change_before_backward(op):
    """As an optimiser changes them, in place."""
    for kind in ("float32", "float16"):  # the latter's are cast
        arrays = op.arrays(KINDS[kind])
        columns = [name for name, of in op.takes.items() if of == "columns"]
        arrays |= {name: arrays[name].astype(kind) for name in columns}
        results, saved = op(arrays)
        down = [np.ones_like(result) for result in results]
        expected = saved.backward(*down)._asdict()
        for name in columns:
            arrays[name] += 1
        assert_all_same(saved.backward(*down)._asdict(), expected)


# ---- values that a multiplication in place of a selection would betray ----


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("name", POINTWISE)
def test_dropped_infinities_and_nans_leave_no_trace(backend, name, kind):
    op = OPS[name]
    arrays = op.arrays((kind, kind), (40, 33))
    specials = np.array([np.inf, -np.inf, np.nan, -0.0, 1.0], kind)
    arrays[op.first][...] = np.resize(specials, (40, 33))
    (y,), saved = op(arrays)
    gone = ~keep_of((40, 33))
    rest = arrays.get("residual", np.zeros((), kind))
    assert_same_bits(y[gone], np.broadcast_to(rest + np.zeros((), kind), y.shape)[gone])
    assert_near(y, op.expected(arrays, ~gone, SCALE)[0], kind)
    gradients = saved.backward(np.full_like(y, np.nan))._asdict()
    for of in (op.first, "up"):
        if of in gradients:
            assert not bits_of(gradients[of])[gone.reshape(-1)].any()
            assert np.isnan(gradients[of][~gone]).any()


@pytest.mark.parametrize("name", [*NORMS, "softmax", "softmax, masked"])
def test_a_row_of_nans_or_infinities_stays_a_row(backend, name):
    op = OPS[name]
    arrays = op.arrays(KINDS["float32"])
    clean, clean_saved = op(arrays)
    down = [np.ones_like(result) for result in clean]
    for row, special in zip((5, 6, 4), (np.nan, np.inf, -np.inf), strict=True):
        arrays[op.first][row, 3:40] = special
    results, saved = op(arrays)
    with np.errstate(invalid="ignore"):
        wanted = op.expected(arrays, keep_of(SHAPE), SCALE)
    for result, expected, before in zip(results, wanted, clean, strict=True):
        assert not np.isfinite(expected[5:]).all(-1).any()
        for row in (4, 5, 6):
            assert_near(result[row], expected[row], "float32", row)
        assert_same_bits(result[:4], before[:4])
    gradient, clean_gradient = (s.backward(*down)._asdict()[op.first] for s in (saved, clean_saved))
    assert np.isnan(gradient[5:]).any(-1).all()
    assert_same_bits(gradient[:4], clean_gradient[:4])


# ---- shapes and memory ----


def test_shapes(backend, unmasked):
    """Rows are rows whatever the axes before them; one element and one row among them."""
    op = unmasked
    for shape in [(1,), (5,), (4, 1), (1, 1), (3, 2, 33), (2, 3, 1, 8), (130, 3)]:
        arrays = op.arrays(KINDS["float32"], shape)
        results, saved = op(arrays)
        for actual, expected in zip(results, op.expected(arrays, keep_of(shape), SCALE), strict=True):
            assert_near(actual, expected, "float32", shape)
        rows = {k: v if op.takes[k] == "columns" else v.reshape(-1, shape[-1]) for k, v in arrays.items()}
        flat, flat_saved = op(rows)
        assert_all_same([result.reshape(-1, shape[-1]) for result in results], flat)
        gradients = saved.backward(*(np.ones_like(result) for result in results))._asdict()
        flat_gradients = flat_saved.backward(*(np.ones_like(result) for result in flat))._asdict()
        for name, array in arrays.items():
            assert gradients[name].shape == array.shape
            assert_same_bits(gradients[name].reshape(rows[name].shape), flat_gradients[name], (shape, name))


def test_empty_arrays(backend, unmasked):
    op = unmasked
    for shape, store in itertools.product([(0,), (0, 5), (3, 0), (2, 0, 4)], STORES):
        arrays = op.arrays(KINDS["float16"], shape)
        results, saved = op(arrays, store=store)
        assert [result.shape for result in results] == [shape] * len(results)
        gradients = saved.backward(*results)._asdict()
        for name, array in arrays.items():
            assert gradients[name].shape == array.shape
            assert gradients[name].dtype == array.dtype
            assert not gradients[name].any()


def test_numbers_without_axes_where_no_columns_are_needed(backend):
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
    for how, kind in itertools.product(["Fortran", "reversed", "every other"], ["float32", "bfloat16"]):
        arrays = op.arrays((kind, kind))
        spread = {name: laid_out(array, how) for name, array in arrays.items()}
        (results, saved), (others, other_saved) = op(arrays), op(spread)
        assert_all_same(results, others)
        assert all(result.flags.c_contiguous for result in others)
        down = [np.arange(result.size).reshape(result.shape).astype(result.dtype) for result in results]
        down_spread = [laid_out(dy, how) for dy in down]
        assert_all_same(saved.backward(*down)._asdict(), other_saved.backward(*down_spread)._asdict())


def test_lists_are_taken():
    y, saved = fd.bias_dropout_add([[1.0, 2.0]], [0.5, 0.5], [[1.0, 1.0]], 0.0)
    assert y.tolist() == [[2.5, 3.5]]
    assert saved.backward([[1.0, 2.0]]).bias.tolist() == [1.0, 2.0]


WITH_OUT = [name for name, op in OPS.items() if op.takes_out]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WITH_OUT)
def test_out_takes_the_result(backend, name, kind):
    op = OPS[name]
    arrays = op.arrays((kind, kind))
    (y,), _ = op(arrays)
    expected = gradients_of(op, arrays)
    outs = {"new": np.empty_like(y), "strided": np.empty((SHAPE[1], 2 * SHAPE[0]), y.dtype).T[::2]}
    for out in outs.values():
        (result,), _ = op(arrays, out=out)
        assert result is out
        assert_same_bits(result, y)
    for over in (of for of, kind_of in op.takes.items() if kind_of != "columns"):
        for order in ("C", "F"):
            own = {of: array.copy(order) for of, array in arrays.items()}
            (result,), saved = op(own, out=own[over])
            assert result is own[over]
            assert_same_bits(result, y)
            dy = np.random.default_rng(50).normal(size=y.shape).astype(y.dtype)
            assert_all_same(saved.backward(dy)._asdict(), expected)


@pytest.mark.parametrize("name", ["bias_dropout_add", "gelu", "softmax"])
def test_out_over_columns_changes_nothing(backend, name):
    """The first row goes over a bias or an attention mask that the second one needs, as does gelu's gradient."""
    op, n = OPS[name], 3001  # more than kernels have in hand at once
    x, columns = op.arrays(KINDS["float64"], (2, n)), np.linspace(0, 1, n)
    of = "attn_mask" if name == "softmax" else "bias"
    (y,), saved = op({**x, of: columns})
    out = np.zeros((2, n))
    out[0] = columns
    (over,), over_saved = op({**x, of: out[0]}, out=out)
    assert over is out
    assert_same_bits(over, y)
    assert_all_same(saved.backward(y)._asdict(), over_saved.backward(y)._asdict())


def test_eps_of_an_rms_norm_is_that_of_the_arithmetic(backend):
    """What is small shows it."""
    for kind, eps in (("float32", 2.0**-23), ("float16", 2.0**-23), ("float64", 2.0**-52)):
        x = np.full((2, 8), math.sqrt(eps), kind)
        by_default, given = (
            fd.dropout_add_rms_norm(x, None, p=0.0)[0],
            fd.dropout_add_rms_norm(x, None, None, 0.0, eps)[0],
        )
        assert_same_bits(by_default, given)
        np.testing.assert_allclose(by_default, math.sqrt(0.5), rtol=1e-2)


def test_out_of_the_wider_residual(backend):
    arrays = OPS["dropout_add"].arrays(KINDS["float16 in float32"])
    y, _ = fd.dropout_add(**arrays, p=P, rng=SEED)
    z, _ = fd.dropout_add(**arrays, p=P, rng=SEED, out=arrays["residual"])
    assert z is arrays["residual"]
    assert_same_bits(z, y)


@pytest.mark.parametrize("of", ["float16", "bfloat16", "float32", "float64"])
def test_columns_of_any_dtype(backend, of):
    """They are computed with as the data is, and their gradients come in their own."""
    for name in ("bias_dropout_add", "gelu", "layer_norm", "rms_norm"):
        op = OPS[name]
        arrays = op.arrays(KINDS["float32"])
        given = {k: v.astype(DTYPE[of].public) if op.takes[k] == "columns" else v for k, v in arrays.items()}
        wide = {k: v.astype(np.float32) for k, v in given.items()}
        assert_all_same(op(given)[0], op(wide)[0])
        got, expected = gradients_of(op, given), gradients_of(op, wide)
        for k, v in given.items():
            assert_same_bits(got[k], expected[k].astype(v.dtype))


# ---- sums over rows ----


def test_selftest_compares_results():
    """One number wrong in a gradient is one check failed."""
    results = selftest._fused()
    assert not any(selftest._near(results, results))
    right = results["gelu, float32"]
    wrong = [*right[:-1], right[-1].copy()]
    wrong[-1][5] += 0.01
    problems = [problem for problem in selftest._near({**results, "gelu, float32": wrong}, results) if problem]
    assert problems == ["gelu, float32: gradient 2 is not the reference's"]


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


def elements_given(monkeypatch):
    """The sizes of attention masks as they come to the primitive."""
    sizes, run = [], host.run_primitive

    def spy(primitive, dtypes, arrays, *rest):
        sizes.append(arrays[1].size)
        return run(primitive, dtypes, arrays, *rest)

    monkeypatch.setattr(host, "run_primitive", spy)
    return sizes


@pytest.mark.parametrize("kind", ["bool", "float32", "float64", "float16"])
def test_attention_masks_broadcast_without_copies(backend, monkeypatch, kind):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=SCORES).astype(np.float32)
    sizes = elements_given(monkeypatch)
    for shape in MASKS:
        mask = np.asarray(rng.random(shape) < 0.7 if kind == "bool" else rng.normal(size=shape), kind)
        y, _ = fd.softmax_dropout(scores, P, 0.5, mask, rng=SEED)
        (expected,) = softmax(keep_of(SCORES), SCALE, scores, 0.5, mask)
        assert_near(y, expected, "float32", shape)
        spread, _ = fd.softmax_dropout(scores, P, 0.5, np.broadcast_to(mask, SCORES), rng=SEED)
        assert_same_bits(y, spread, shape)
        assert {sizes.pop(), sizes.pop()} == {math.prod((1, *shape)[:-1]) * SCORES[-1]}, shape

"""Bad input of the fused ops: the exception, what its message names, and that nothing is written or drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastdrop as fd

from ..cases import bits_of
from .test_bad_input import ALLOWED, BAD_DTYPES, BAD_P, refused

X = np.arange(12, dtype=np.float32).reshape(3, 4)
COLUMNS = np.arange(4, dtype=np.float32)

OPS = {  # call, arrays
    "dropout_add": (fd.dropout_add, {"x": X, "residual": X}),
    "bias_dropout_add": (fd.bias_dropout_add, {"x": X, "bias": COLUMNS, "residual": X}),
    "relu": (lambda **more: fd.bias_act_dropout(activation="relu", **more), {"x": X, "bias": COLUMNS}),
    "gelu": (fd.bias_act_dropout, {"x": X, "bias": COLUMNS}),
    "swiglu_dropout": (fd.swiglu_dropout, {"gate": X, "up": X}),
    "layer_norm": (
        fd.dropout_add_layer_norm,
        {"x": X, "residual": X, "weight": COLUMNS, "bias": COLUMNS, "x_bias": COLUMNS},
    ),
    "rms_norm": (fd.dropout_add_rms_norm, {"x": X, "residual": X, "weight": COLUMNS, "x_bias": COLUMNS}),
    "softmax": (fd.softmax_dropout, {"scores": X, "attn_mask": X > 3}),
}
VECTORS = ("bias", "weight", "x_bias")


def ops(*taking):
    """A decorator: ``op`` and ``arrays`` of each op that takes any of these arrays, or of all."""
    found = {name: row for name, row in OPS.items() if not taking or set(taking) & set(row[1])}
    return pytest.mark.parametrize(("op", "arrays"), found.values(), ids=found)


def assert_refused(op, arrays, error, *parts, **bad):
    """In training and out of it, whatever is kept; nothing is written and no random number is taken."""
    first = next(iter(arrays.values()))
    out, stream, generator = np.full(np.shape(first), 7, np.float32), fd.Stream(0), np.random.default_rng(0)
    untouched = generator.bit_generator.state
    more = {} if {"weight", "x_bias"} & set(arrays) else {"out": out}
    for training, rng in itertools.product((True, False), (stream, generator)):
        with refused(error, *parts):
            op(**{**arrays, "p": 0.5, "training": training, "rng": rng, **more, **bad})
    assert (out == 7).all()
    assert stream.offset == 0
    assert generator.bit_generator.state == untouched


# ---- what all take ----


@ops()
def test_p_is_refused(op, arrays):
    for p, error, came in BAD_P.values():
        allowed = "between 0 and 1" if error is ValueError else "number"
        assert_refused(op, arrays, error, "p", allowed, "got", came, p=p)


@ops()
def test_store_is_refused(op, arrays):
    for store in ("bit", "", None, 1):
        assert_refused(op, arrays, ValueError, "store", "'bits', 'seed'", "got", repr(store), store=store)


@ops()
def test_random_state_is_refused(op, arrays):
    for rng, error, came in (("1", TypeError, "str"), (1.0, TypeError, "float"), (-1, ValueError, "-1")):
        for training in (True, False):
            with refused(error, "rng", "got", came):
                op(**arrays, rng=rng, training=training)


@ops()
def test_dtypes_are_refused(op, arrays):
    for name, array in arrays.items():
        for kind in BAD_DTYPES:
            if (name, kind) == ("attn_mask", "?") or np.dtype(kind) == np.float64:
                continue
            bad = {**arrays, name: np.zeros(array.shape, kind)}
            assert_refused(op, bad, TypeError, name, ALLOWED, "got", np.dtype(kind))


@ops()
def test_what_is_no_array_of_floats_is_refused(op, arrays):
    for name, array in arrays.items():
        for value in ([[1, 2, 3, 4]] * 3, "text", 3, None):
            if value is None and (array is COLUMNS or name in ("attn_mask", "residual")):
                continue  # where some may leave it out; see below
            with refused(TypeError, name, ALLOWED, "got"):
                op(**{**arrays, name: value})


def test_what_must_be_given_is_refused_as_none():
    for name in ("x", "residual"):
        with refused(TypeError, name, ALLOWED, "got object"):
            fd.dropout_add(**{"x": X, "residual": X, name: None})
    for name in ("x", "bias", "residual"):
        with refused(TypeError, name, ALLOWED, "got object"):
            fd.bias_dropout_add(**{"x": X, "bias": COLUMNS, "residual": X, name: None})
    for name in ("gate", "up"):
        with refused(TypeError, name, ALLOWED, "got object"):
            fd.swiglu_dropout(**{"gate": X, "up": X, name: None})


# ---- arrays beside x ----


@ops("residual")
@pytest.mark.parametrize(("of", "given"), [("float32", "float64"), ("float64", "float32"), ("float32", "float16")])
def test_residual_of_another_dtype_is_refused(op, arrays, of, given):
    with refused(TypeError, f"residual must have x's dtype, {of}, but got {given}"):
        op(**{**arrays, "x": X.astype(of), "residual": X.astype(given)})


@ops("residual")
def test_residual_beside_16_bits_may_only_be_float32(op, arrays):
    for given in ("float64", pytest.importorskip("ml_dtypes").bfloat16):
        residual = X.astype(given)
        with refused(TypeError, "residual must have x's dtype, float16, or float32, but got", residual.dtype):
            op(**{**arrays, "x": X.astype(np.float16), "residual": residual})


@ops("residual", "up")
@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (3, 1), (1, 3, 4), (4, 3), (0, 4)], ids=str)
def test_what_would_have_to_be_broadcast_is_refused(op, arrays, shape):
    name, of = ("up", "gate") if "up" in arrays else ("residual", "x")
    bad = {**arrays, name: np.zeros(shape, np.float32)}
    assert_refused(
        op, bad, ValueError, f"{name} must have {of}'s shape, (3, 4), as nothing is broadcast, but got", shape
    )


def test_up_of_another_dtype_is_refused():
    for given in ("float64", "float16"):
        bad = {"gate": X, "up": X.astype(given)}
        assert_refused(fd.swiglu_dropout, bad, TypeError, f"up must have gate's dtype, float32, but got {given}")


@ops(*VECTORS)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5,), (1, 4), (3, 4), (0,)], ids=str)
def test_columns_of_another_shape_are_refused(op, arrays, shape):
    for name in VECTORS:
        if name in arrays:
            message = f"{name} must have an element for each column of x, shape (4,), but got {shape}"
            assert_refused(op, {**arrays, name: np.zeros(shape)}, ValueError, message)


@ops(*VECTORS, "attn_mask")
def test_numbers_without_axes_are_refused_where_columns_are_needed(op, arrays):
    name = next(iter(arrays))
    what = "keys" if name == "scores" else "an axis of columns"
    numbers = {key: np.float32(1) if array is X else array for key, array in arrays.items()}
    assert_refused(op, numbers, ValueError, f"{name} must have {what}, but got 0 axes")


def test_norms_need_columns_even_alone():
    for op in (fd.dropout_add_layer_norm, fd.dropout_add_rms_norm):
        with refused(ValueError, "x must have an axis of columns, but got 0 axes"):
            op(1.0, None)


class OnGpu:
    """As much of an array on a GPU as says that it is one."""

    __cuda_array_interface__: dict[str, object] = {}  # noqa: RUF012


@ops()
def test_arrays_partly_on_a_gpu_are_refused(op, arrays):
    first, *others = arrays
    for name in others:
        message = f"{name} must be in memory, as {first} is, but got one on a GPU"
        assert_refused(op, {**arrays, name: OnGpu()}, TypeError, message)


# ---- options ----


@pytest.mark.parametrize("name", ["Gelu", "swish", "", "None", 0, True, ("relu",), np.array(["relu"] * 2)], ids=repr)
def test_activation_is_refused(name):
    parts = "activation must be one of None, 'relu', 'gelu', 'gelu_tanh', 'silu', but got", repr(name)
    assert_refused(fd.bias_act_dropout, {"x": X, "bias": COLUMNS}, ValueError, *parts, activation=name)
    parts = "approximate must be one of 'none', 'tanh', but got", repr(name)
    assert_refused(fd.geglu_dropout, {"gate": X, "up": X}, ValueError, *parts, approximate=name)


NO_NUMBERS = [("1", "str"), (None, "NoneType"), (True, "bool"), (1j, "complex"), ([1.0], "list")]
NOT_FINITE = [float("nan"), float("inf"), -np.inf, np.float32("nan"), 10**400]


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_eps_is_refused(name):
    op, arrays = OPS[name]
    for eps, came in NO_NUMBERS:
        if eps is None and name == "rms_norm":
            continue
        assert_refused(op, arrays, TypeError, "eps must be a", "number, but got", came, eps=eps)
    for eps in NOT_FINITE:
        assert_refused(op, arrays, ValueError, "eps must be finite, but got", eps=eps)
    for eps in (-1e-5, -5e-324, -1):
        assert_refused(op, arrays, ValueError, "eps must be at least 0, but got", f"{eps:g}", eps=eps)


def test_scale_is_refused():
    op, arrays = OPS["softmax"]
    for scale, came in NO_NUMBERS:
        assert_refused(op, arrays, TypeError, "scale must be a", "number, but got", came, scale=scale)
    for scale in NOT_FINITE:
        assert_refused(op, arrays, ValueError, "scale must be finite, but got", scale=scale)


@pytest.mark.parametrize("shape", [(5,), (3,), (2, 4), (3, 5), (1, 3, 4), (2, 1, 1), (0,), (4, 3)], ids=str)
def test_attention_mask_that_does_not_broadcast_is_refused(shape):
    for kind in (np.bool_, np.float32):
        message = f"attn_mask must broadcast to the shape of scores, (3, 4), but got {shape}"
        bad = {"scores": X, "attn_mask": np.zeros(shape, kind)}
        assert_refused(fd.softmax_dropout, bad, ValueError, message)


def test_causal_needs_queries():
    message = "scores must have queries and keys, but got 1 axis"
    assert_refused(fd.softmax_dropout, {"scores": COLUMNS}, ValueError, message, causal=True)


# ---- out ----

WITH_OUT = {
    name: OPS[name] for name in ("dropout_add", "bias_dropout_add", "relu", "gelu", "swiglu_dropout", "softmax")
}
with_out = pytest.mark.parametrize(("op", "arrays"), WITH_OUT.values(), ids=WITH_OUT)


@with_out
def test_out_of_another_kind_is_refused(op, arrays):
    of = "residual" if "residual" in arrays else next(iter(arrays))
    sevens = np.full_like(X, 7)
    readonly = sevens.copy()
    readonly.flags.writeable = False
    repeated = np.lib.stride_tricks.as_strided(np.full(4, 7, np.float32), (3, 4), (0, 4))
    for out, error, parts in (
        (np.full((4, 3), 7, np.float32), ValueError, [f"{of}'s shape, (3, 4)", "(4, 3)"]),
        (np.full((1, 3, 4), 7, np.float32), ValueError, [f"{of}'s shape, (3, 4)", "(1, 3, 4)"]),
        (np.full((3, 4), 7.0), TypeError, [f"{of}'s dtype, float32", "float64"]),
        (sevens.tolist(), TypeError, ["ndarray", "list"]),
        (readonly, ValueError, ["read-only"]),
        (repeated, ValueError, ["strides"]),
    ):
        before = np.array(out)
        assert_refused(op, arrays, error, "out", *parts, out=out)
        assert (np.array(out) == before).all()


@with_out
def test_out_that_overlaps_an_argument_in_part_is_refused(op, arrays):
    for name, array in arrays.items():
        if array is not X:  # columns and masks are copied first
            continue
        line = np.arange(40, dtype=np.float32)
        given, before = {**arrays, name: line[4:16].reshape(3, 4)}, line.copy()
        for start, stop, step in ((0, 12, 1), (5, 17, 1), (8, 20, 1), (15, 3, -1)):
            out = line[start:stop:step].reshape(3, 4)
            message = f"out must be {name} itself or not share memory with it"
            assert_refused(op, given, ValueError, message, out=out)
        assert (bits_of(line) == bits_of(before)).all()


def test_out_over_numbers_of_another_dtype_is_refused():
    """Both begin at one address and step alike."""
    residual = np.zeros((3, 1), np.float32)
    x = residual.view(np.float16)[:, :1]
    message = "out must be x itself or not share memory with it"
    with refused(ValueError, message):
        fd.dropout_add(x, residual, out=residual)


# ---- backward ----


@ops()
def test_gradients_that_do_not_fit_are_refused(op, arrays):
    *results, saved = op(**arrays, p=0.5, rng=0)
    of = "y" if len(results) == 2 else "the result"
    for dtype in ("float64", "float16"):
        with refused(TypeError, f"dy must have {of}'s dtype, float32, but got {dtype}"):
            saved.backward(X.astype(dtype))
    for shape in ((4,), (1, 3, 4), (4, 3), ()):
        with refused(ValueError, f"dy must have {of}'s shape, (3, 4), as nothing is broadcast, but got {shape}"):
            saved.backward(np.zeros(shape, np.float32))
    for value in (None, "text", X.astype(int), X > 1):
        with refused(TypeError, "dy", ALLOWED, "got"):
            saved.backward(value)
    with refused(TypeError, "dy must be in memory, as", "is, but got one on a GPU"):
        saved.backward(OnGpu())


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_gradients_of_the_stream_that_do_not_fit_are_refused(name):
    op, arrays = OPS[name]
    _, _, saved = op(**{**arrays, "x": X.astype(np.float16)}, p=0.5, rng=0)
    dy = X.astype(np.float16)
    with refused(TypeError, "dy must have y's dtype, float16, but got float32"):
        saved.backward(X)
    with refused(TypeError, "dresidual must have residual_out's dtype, float32, but got float16"):
        saved.backward(dy, dy)
    with refused(ValueError, "dresidual must have residual_out's shape, (3, 4), as nothing is broadcast, but got (4,)"):
        saved.backward(dy, COLUMNS)


def test_saved_is_frozen():
    _, saved = fd.dropout_add(X, X, rng=0)
    with pytest.raises(AttributeError):
        saved.mask = None

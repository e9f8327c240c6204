"""Bad input of the NumPy API: the exception, what its message names, and that nothing is written or drawn.

`CALLS` has a valid call of each function. `ARGUMENTS` lists bad values by the name of an argument: every function that
has an argument of a name is given all bad values of that name.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import fastdrop as fd

from ..cases import bits_of, primitive_modules, run_python

X = np.arange(12, dtype=np.float32).reshape(3, 4)
COLUMNS = np.arange(4, dtype=np.float32)
IMAGES = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
MASK = fd.draw_mask((3, 4), 0.5, rng=0)
NOISE = fd.GaussianNoise(0, 0, (3, 4), 0.5)
ALLOWED = "float32, float64, float16, bfloat16"
BAD_DTYPES = ["i4", "i8", "u1", "u2", "u4", "?", "c8", "c16", "g", ">f4", ">f8", "O", "U3", "S2", "V2", "M8[s]"]


@dataclass(frozen=True)
class Call:
    """A function and the arguments of a valid call, by name: arrays and others."""

    function: Callable[..., Any]
    arrays: dict[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def takes(self) -> set[str]:
        return set(inspect.signature(self.function).parameters)

    @property
    def first(self) -> str:
        return next(iter(self.arrays))

    @property
    def like_out(self) -> str:
        """The name of the array whose shape and dtype ``out`` must have."""
        return "residual" if "residual" in self.arrays else self.first

    def __call__(self, **more: Any) -> Any:
        return self.function(**{**self.arrays, **self.options, **more})


NORM = {"x": X, "residual": X, "weight": COLUMNS, "bias": COLUMNS, "x_bias": COLUMNS}
KINDS = {
    "dropout": Call(fd.dropout, {"x": IMAGES}),
    "feature_dropout": Call(fd.feature_dropout, {"x": IMAGES}, {"channel_axis": 1}),
    "alpha_dropout": Call(fd.alpha_dropout, {"x": IMAGES}),
    "feature_alpha_dropout": Call(fd.feature_alpha_dropout, {"x": IMAGES}, {"channel_axis": 1}),
    "variational_dropout": Call(fd.variational_dropout, {"x": IMAGES}, {"p": 0.5, "time_axis": 0}),
    "drop_connect": Call(fd.drop_connect, {"w": IMAGES}),
    "stochastic_depth": Call(fd.stochastic_depth, {"x": IMAGES}, {"p": 0.5, "mode": "row"}),
    "drop_block": Call(fd.drop_block, {"x": IMAGES}, {"p": 0.5, "block_size": 3}),
    "gaussian_dropout": Call(fd.gaussian_dropout, {"x": IMAGES}),
}
FUSED = {
    "dropout_add": Call(fd.dropout_add, {"x": X, "residual": X}),
    "bias_dropout_add": Call(fd.bias_dropout_add, {"x": X, "bias": COLUMNS, "residual": X}),
    "relu": Call(functools.partial(fd.bias_act_dropout, activation="relu"), {"x": X, "bias": COLUMNS}),
    "gelu": Call(fd.bias_act_dropout, {"x": X, "bias": COLUMNS}),
    "swiglu_dropout": Call(fd.swiglu_dropout, {"gate": X, "up": X}),
    "geglu_dropout": Call(fd.geglu_dropout, {"gate": X, "up": X}),
    "layer_norm": Call(fd.dropout_add_layer_norm, NORM),
    "rms_norm": Call(fd.dropout_add_rms_norm, {name: array for name, array in NORM.items() if name != "bias"}),
    "softmax": Call(fd.softmax_dropout, {"scores": X, "attn_mask": X > 3}),
}
CALLS = {
    **KINDS,
    "dropout, seed": Call(fd.dropout, {"x": X}, {"store": "seed"}),
    "dropout, shared": Call(fd.dropout, {"x": X}, {"noise_shape": (1, 4)}),
    "dropout, standard": Call(fd.dropout, {"x": X}, {"scaling": "standard"}),
    "dropout, all": Call(fd.dropout, {"x": X}, {"p": 1.0}),
    "dropout_backward": Call(fd.dropout_backward, {"dy": X}, {"mask": MASK}),
    "dropout_backward, no mask": Call(fd.dropout_backward, {"dy": X}, {"mask": None}),
    "apply_mask": Call(fd.apply_mask, {"x": X}, {"mask": MASK}),
    "apply_mask, noise": Call(fd.apply_mask, {"x": X}, {"mask": NOISE}),
    **FUSED,
}
VECTORS = ("bias", "weight", "x_bias")


def of(calls, *taking):
    """A decorator that runs a test for each call, or for each call that takes one of these arrays."""
    found = {name: call for name, call in calls.items() if not taking or set(taking) & set(call.arrays)}
    return pytest.mark.parametrize("call", found.values(), ids=found)


def refused(error, *parts):
    """Expects an error whose message contains the parts in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(str(part)) for part in parts))


def assert_refused(call, error, *parts, **bad):
    """Expects the error with training on and off, and that nothing is written and no random number is taken."""
    out = np.full(np.shape(bad.get(call.like_out, call.arrays[call.like_out])), 7, np.float32)
    stream, generator = fd.Stream(0), np.random.default_rng(0)
    untouched = generator.bit_generator.state
    for training, rng in itertools.product((True, False), (stream, generator)):
        given = {"p": 0.5, "training": training, "rng": rng, "out": out}
        given = {name: value for name, value in given.items() if name in call.takes}
        with refused(error, *parts):
            call(**{**given, **call.options, **bad})
    assert (out == 7).all()
    assert stream.offset == 0
    assert generator.bit_generator.state == untouched


# ---- arguments that are no arrays ----

NO_NUMBERS = [("1", "str"), (None, "NoneType"), (True, "bool"), (1j, "complex"), ([1.0], "list")]
NOT_FINITE = [float("nan"), float("inf"), -np.inf, np.float32("nan"), 10**400]
BAD_P = [
    *((p, ValueError, str(p)) for p in (-0.1, -5e-324, 1.5, float("nan"), float("inf"), float("-inf"), 2)),
    (np.nextafter(1, 2), ValueError, "1.0000000000000002"),
    (np.float32("nan"), ValueError, "nan"),
    (10**400, ValueError, ""),
    (Fraction(10**400), ValueError, ""),
    *((p, TypeError, came) for p, came in NO_NUMBERS),
    (np.True_, TypeError, "bool"),
    (np.complex64(0.5), TypeError, "complex64"),
    (np.array([0.5]), TypeError, "ndarray"),
]
BAD_RNG = [
    (-1, ValueError, "-1"),
    (2**64, ValueError, str(2**64)),
    *((rng, TypeError, type(rng).__name__) for rng in (1.0, "seed", True, np.random, range(3), (1, 2))),
    (np.True_, TypeError, "bool"),
]
BAD_AXES = [
    *((axis, ValueError, "axis of x, which has 4", "got", str(axis)) for axis in (4, -5, 10**30, np.int8(4))),
    *((axis, TypeError, "int", "got", type(axis).__name__) for axis in (1.0, "1", None, True, (1,))),
    (np.True_, TypeError, "int", "got", "bool"),
]
BAD_BLOCKS = [
    *((size, ValueError, "positive") for size in (0, (3, 0))),
    *((size, ValueError, "negative") for size in (-1, (3, -2))),
    *((size, ValueError, "each of the 2 spatial axes") for size in ((3,), (3, 3, 3), ())),
    *((size, TypeError, "tuple of ints") for size in (3.0, (3, 2.5), "33", None, True)),
]
BAD_NOISE_SHAPES = [
    *((shape, ValueError) for shape in ((5,), (2, 3, 4, 5, 1), (), (3, 3, 4, 5), (2, 3, 4, 0), (2, 3, 4, -1))),
    *((shape, TypeError) for shape in ((2, 3, 4, 1.0), ("2", "3", "4", "5"), 3, "abcd")),
]
PART, TALLER_PART = (fd.Part((9, 3, 4, 5), (3, 0, 0, 0), (batch, 3, 4, 5)) for batch in (2, 3))
OTHER_PART = fd.Part((8, 3, 4, 5), (3, 0, 0, 0), (2, 3, 4, 5))


def no_choice(allowed, *values):
    return [(value, ValueError, f"must be one of {allowed}, but got {value!r}") for value in values]


ARGUMENTS = {  # value, error, parts of the message
    "p": [(p, error, "between 0 and 1" if error is ValueError else "number", "got", came) for p, error, came in BAD_P],
    "rng": [(rng, error, "got", came) for rng, error, came in BAD_RNG],
    "scaling": no_choice("'inverted', 'standard'", "other", "alpha", "Inverted", "", None, 1),
    "store": no_choice("'bits', 'seed'", "bit", "Bits", "", None, 1),
    "mode": no_choice("'batch', 'row'", "rows", "Row", "", None, 0, True),
    "activation": no_choice(
        "None, 'relu', 'gelu', 'gelu_tanh', 'silu'", "Gelu", "", 0, True, ("relu",), np.array(["relu"] * 2)
    ),
    "approximate": no_choice("'none', 'tanh'", "Tanh", "", None, 0, True, ("tanh",)),
    "channel_axis": BAD_AXES,
    "time_axis": BAD_AXES,
    "block_size": [(size, error, allowed, "got", repr(size)) for size, error, allowed in BAD_BLOCKS],
    "noise_shape": [(shape, error, "got", "a" if shape == "abcd" else shape) for shape, error in BAD_NOISE_SHAPES],
    "eps": [
        *((eps, TypeError, "must be a", "number, but got", came) for eps, came in NO_NUMBERS),
        *((eps, ValueError, "must be finite, but got") for eps in NOT_FINITE),
        *((eps, ValueError, "must be at least 0, but got", f"{eps:g}") for eps in (-1e-5, -5e-324, -1)),
    ],
    "part": [
        *((part, TypeError, "fastdrop.Part", "got", repr(part)) for part in (3, "abc", (2, 3, 4, 5), 1.0, True)),
        *((part, ValueError, "one whole", "got", repr(part)) for part in ([], (PART, OTHER_PART))),
        *((part, ValueError, "x's shape", "got", repr(part)) for part in (TALLER_PART, [PART, PART])),
    ],
    "scale": [
        *((scale, TypeError, "must be a", "number, but got", came) for scale, came in NO_NUMBERS),
        *((scale, ValueError, "must be finite, but got") for scale in NOT_FINITE),
    ],
}


@of(KINDS | FUSED)
def test_bad_arguments_are_refused(call):
    """Also if p = 0, when nothing would be drawn."""
    parameters = inspect.signature(call.function).parameters
    for argument in sorted(call.takes & set(ARGUMENTS)):
        for value, error, *parts in ARGUMENTS[argument]:
            if value is None and parameters[argument].default is None:
                continue
            assert_refused(call, error, argument, *parts, **{argument: value})
            if argument in ("rng", "scaling", "store"):
                assert_refused(call, error, argument, *parts, **{"p": 0.0, argument: value})


def test_every_argument_has_bad_values():
    taken = set().union(*(call.takes - set(call.arrays) for call in (KINDS | FUSED).values()))
    assert taken - {"out", "training", "causal"} == set(ARGUMENTS)


def test_gaussian_dropout_refuses_p_of_1():
    """The variance would be infinite."""
    for p in (1, 1.0, np.float32(1)):
        assert_refused(KINDS["gaussian_dropout"], ValueError, "p must be below 1", "Gaussian", "got 1", p=p)


def test_data_of_too_few_axes_is_refused():
    def refuse(name, shape, *parts, **arguments):
        call = (KINDS | FUSED)[name]
        assert_refused(call, ValueError, *parts, **{call.first: np.ones(shape, np.float32)}, **arguments)

    for axis, name in itertools.product((0, 1, -1), ("feature_dropout", "feature_alpha_dropout")):
        for shape, came in (((), "0 axes"), ((6,), "1 axis")):
            refuse(name, shape, "x", "at least two axes", "got", came, channel_axis=axis)
    for axis in (0, -1):
        refuse("variational_dropout", (), "time_axis", "has 0", "got", axis, time_axis=axis)
    for mode in ("row", "batch"):
        refuse("stochastic_depth", (), "x", "axis of samples", "got 0 axes", mode=mode)
    for shape in ((), (6,), (2, 3), (1, 2, 3, 4, 5, 6)):
        refuse("drop_block", shape, "x", "(N, C, *)", "one to three spatial", "got", len(shape), block_size=1)
    refuse("gelu", (), "x must have an axis of columns, but got 0 axes")
    for name in ("layer_norm", "rms_norm"):
        alone = dict.fromkeys(FUSED[name].arrays.keys() - {"x"})
        refuse(name, (), "x must have an axis of columns, but got 0 axes", **alone)
    refuse("softmax", (), "scores must have keys, but got 0 axes")
    refuse("softmax", (4,), "scores must have queries and keys, but got 1 axis", causal=True)


# ---- data and out ----


@of(CALLS)
def test_data_that_is_no_array_of_floats_is_refused(call):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    swapped = np.dtype(ml_dtypes.bfloat16).newbyteorder("S")  # its name is the native one's
    optional = {"attn_mask", *VECTORS, *(["residual"] if "x_bias" in call.arrays else [])}
    for name, array in call.arrays.items():
        for kind in [np.dtype(kind) for kind in (*BAD_DTYPES, ml_dtypes.float8_e5m2, swapped)]:
            if kind == np.float64 or (name, kind) == ("attn_mask", np.bool_):  # longdouble is on some platforms
                continue
            assert_refused(call, TypeError, name, ALLOWED, "got", kind, **{name: np.zeros(array.shape, kind)})
        for value in ([[1, 2, 3, 4]] * 3, "text", 3, None):
            if value is not None or name not in optional:
                with refused(TypeError, name, ALLOWED, "got"):
                    call(**{name: value})
    if call is FUSED["bias_dropout_add"]:
        with refused(TypeError, "bias", ALLOWED, "got object"):
            call(bias=None)


@of(CALLS)
def test_masked_and_sparse_arrays_are_refused_in_every_place(call):
    """The mask of a masked array would be lost."""
    sparse = type("csr_array", (), {"todense": lambda self: X, "shape": X.shape, "dtype": X.dtype})()
    for name, array in call.arrays.items():
        with refused(TypeError, f"{name} must not be a masked array"):
            call(**{name: np.ma.masked_array(array, array > 3)})
        with refused(TypeError, f"{name} must be a dense array, but got a sparse csr_array"):
            call(**{name: sparse})
    if "out" in call.takes:
        out = np.ma.masked_array(np.full_like(call.arrays[call.like_out], 7), True)
        with refused(TypeError, "out must not be a masked array"):
            call(out=out)
        assert (out.data == 7).all()


def test_sparse_arrays_of_scipy_are_refused():
    sparse = pytest.importorskip("scipy.sparse")
    for make in (sparse.csr_array, sparse.coo_matrix):
        with refused(TypeError, "x must be a dense array, but got a sparse"):
            fd.dropout(make(X))


def bad_outs(shape):
    """Yields (x, out, error, parts of the message). ``out`` is filled with 7."""
    size = int(np.prod(shape))
    x, sevens = np.arange(size, dtype=np.float32).reshape(shape), np.full(shape, 7, np.float32)
    readonly = sevens.copy()
    readonly.flags.writeable = False
    line = np.full(3 * size, 7, np.float32)
    repeated = np.lib.stride_tricks.as_strided(sevens, shape, (0, *sevens.strides[1:]))
    windows = np.lib.stride_tricks.as_strided(line, shape, (4,) * len(shape))
    yield x, np.full(shape[::-1], 7, np.float32), ValueError, ["shape", str(shape), str(shape[::-1])]
    yield x, np.full((1, *shape), 7, np.float32), ValueError, ["shape", str(shape), str((1, *shape))]
    yield x, np.full(shape, 7.0), TypeError, ["dtype", "float32", "float64"]
    yield x, sevens.astype(">f4"), TypeError, ["float32", ">f4"]
    yield x, sevens.tolist(), TypeError, ["ndarray", "list"]
    yield x, readonly, ValueError, ["read-only"]
    yield readonly, readonly, ValueError, ["read-only"]
    yield x, repeated, ValueError, ["overlap one another", "strides"]
    yield x, windows, ValueError, ["overlap one another", "strides"]
    yield windows, windows, ValueError, ["overlap one another", "strides"]
    for start in (1, shape[-1]):  # of each other's memory a part, or all in another order
        parts = line[:size].reshape(shape), line[start : start + size].reshape(shape)
        yield *parts, ValueError, ["overlaps in part"]
        yield *parts[::-1], ValueError, ["overlaps in part"]
    yield line[:size].reshape(shape), line[size - 1 :: -1].reshape(shape), ValueError, ["overlaps in part"]
    bytes_ = line.view(np.uint8)
    shifted = (bytes_[at : at + 4 * size].view(np.float32).reshape(shape) for at in (0, 1))
    yield *shifted, ValueError, ["overlaps in part"]


@of({name: call for name, call in CALLS.items() if "out" in call.takes})
def test_bad_out_is_refused_and_left_alone(call):
    shape = call.arrays[call.first].shape
    for name, array in call.arrays.items():
        if array.shape != shape or array.dtype != np.float32:  # columns and attention masks are copied first
            continue
        for x, out, error, parts in bad_outs(shape):
            if name != call.like_out and (parts[0] != "overlaps in part" or x is out):
                continue
            before = x.copy(), np.array(out)
            assert_refused(call, error, "out", *parts, **{name: x}, out=out)
            assert (bits_of(np.array(out)) == bits_of(before[1])).all()
            assert (bits_of(x) == bits_of(before[0])).all()


def test_out_over_numbers_of_another_dtype_is_refused():
    """Both arrays have the same address and the same strides."""
    residual = np.zeros((3, 1), np.float32)
    with refused(ValueError, "out must be x itself or not share memory with it"):
        fd.dropout_add(residual.view(np.float16)[:, :1], residual, out=residual)


# ---- arrays beside x ----


@of(FUSED, "residual", "up")
def test_what_is_not_like_x_is_refused(call):
    name = "up" if "up" in call.arrays else "residual"
    for x, given in (("float32", "float64"), ("float64", "float32"), ("float32", "float16")):
        bad = {call.first: X.astype(x), name: X.astype(given)}
        with refused(TypeError, f"{name} must have {call.first}'s dtype, {x}, but got {given}"):
            call(**bad)
    wider = ", or float32" if name == "residual" else ""
    for given in ("float64", pytest.importorskip("ml_dtypes").bfloat16):
        bad = {call.first: X.astype(np.float16), name: X.astype(given)}
        with refused(TypeError, f"{name} must have {call.first}'s dtype, float16{wider}, but got", bad[name].dtype):
            call(**bad)
    for shape in ((), (4,), (1, 4), (3, 1), (1, 3, 4), (4, 3), (0, 4)):
        message = f"{name} must have {call.first}'s shape, (3, 4), as nothing is broadcast, but got {shape}"
        assert_refused(call, ValueError, message, **{name: np.zeros(shape, np.float32)})


@of(FUSED, *VECTORS)
def test_columns_of_another_shape_are_refused(call):
    for name, shape in itertools.product(VECTORS, ((), (1,), (3,), (5,), (1, 4), (3, 4), (0,))):
        if name in call.arrays:
            message = f"{name} must have an element for each column of x, shape (4,), but got {shape}"
            assert_refused(call, ValueError, message, **{name: np.zeros(shape)})


def test_attention_masks_that_do_not_broadcast_are_refused():
    for shape, kind in itertools.product(
        ((5,), (3,), (2, 4), (3, 5), (1, 3, 4), (2, 1, 1), (0,), (4, 3)), (np.bool_, np.float32)
    ):
        message = f"attn_mask must broadcast to the shape of scores, (3, 4), but got {shape}"
        assert_refused(FUSED["softmax"], ValueError, message, attn_mask=np.zeros(shape, kind))


class OnGpu:
    """An object that only says that it is an array on a GPU."""

    __cuda_array_interface__: dict[str, object] = {}  # noqa: RUF012


@of(FUSED)
def test_arrays_partly_on_a_gpu_are_refused(call):
    for name in list(call.arrays)[1:]:
        message = f"{name} must be in memory, as {call.first} is, but got one on a GPU"
        with refused(TypeError, message):
            call(**{name: OnGpu()})


# ---- gradients ----


@of(FUSED)
def test_gradients_that_do_not_fit_are_refused(call):
    *results, saved = call(p=0.5, rng=0)
    result = "y" if len(results) == 2 else "the result"
    for dtype in ("float64", "float16"):
        with refused(TypeError, f"dy must have {result}'s dtype, float32, but got {dtype}"):
            saved.backward(X.astype(dtype))
    for shape in ((4,), (1, 3, 4), (4, 3), ()):
        with refused(ValueError, f"dy must have {result}'s shape, (3, 4), as nothing is broadcast, but got {shape}"):
            saved.backward(np.zeros(shape, np.float32))
    for value in (None, "text", X.astype(int), X > 1):
        with refused(TypeError, "dy", ALLOWED, "got"):
            saved.backward(value)
    with refused(TypeError, "dy must be in memory, as", "is, but got one on a GPU"):
        saved.backward(OnGpu())
    with pytest.raises(AttributeError):
        saved.mask = None


def test_gradients_of_a_norms_sum_that_do_not_fit_are_refused():
    dy = X.astype(np.float16)
    for name in ("layer_norm", "rms_norm"):
        _, _, saved = FUSED[name](x=dy, p=0.5, rng=0)
        with refused(TypeError, "dy must have y's dtype, float16, but got float32"):
            saved.backward(X)
        with refused(TypeError, "dresidual must have residual_out's dtype, float32, but got float16"):
            saved.backward(dy, dy)
        with refused(
            ValueError, "dresidual must have residual_out's shape, (3, 4), as nothing is broadcast, but got (4,)"
        ):
            saved.backward(dy, COLUMNS)


# ---- masks ----


@pytest.mark.parametrize("function", [fd.dropout_backward, fd.apply_mask], ids=lambda f: f.__name__)
def test_masks_that_do_not_fit_are_refused(function):
    """Noise has a number for each element, so an extent of 1 does not fit either."""
    out = np.full_like(X, 7)
    for shape in ((4, 3), (12,), (3, 4, 1), (1, 3, 4), (3, 5), (3, 2), (2, 1), ()):
        for mask in (fd.draw_mask(shape, 0.5, rng=0), fd.SeededMask(0, 0, shape, 0.5)):
            with refused(ValueError, "mask", "(3, 4)", "got", shape):
                function(X, mask, out=out)
    for shape in ((4, 3), (12,), (3, 4, 1), (3, 5), (1, 4), (3, 1), (1, 1), ()):
        with refused(ValueError, "mask", "(3, 4)", "got noise", shape):
            function(X, fd.GaussianNoise(0, 0, shape, 0.5), out=out)
    for mask in (np.ones((3, 4), bool), 0.5, "mask", [True]):
        with refused(TypeError, "mask", "PackedMask", "got", type(mask).__name__):
            function(X, mask, out=out)
    assert (out == 7).all()


def test_draw_mask_refuses_bad_arguments():
    stream = fd.Stream(0)

    def refuse(error, *parts, shape=5, p=0.5, **arguments):
        with refused(error, *parts):
            fd.draw_mask(shape, p, **{"rng": stream, **arguments})

    for argument in ("p", "rng"):
        for value, error, *parts in ARGUMENTS[argument]:
            refuse(error, argument, *parts, **{argument: value})
    for shape in (-1, (3, -2)):
        refuse(ValueError, "shape", "got", shape, shape=shape)
    for shape in (2.5, (3, 2.5), "ab", None):
        refuse(TypeError, "shape", "got", shape, shape=shape)
    refuse(ValueError, "shape must have at most 2**64 cells, but got", shape=(1 << 40, 1 << 40))
    for p in (0.0, 0.5):
        for first in (-1, 2**64 - 99, 2**64, 2**70):
            refuse(ValueError, "first_cell", "got", first, shape=100, p=p, first_cell=first)
        for first in (1.0, "1", None, True):
            refuse(TypeError, "first_cell", "got", type(first).__name__, shape=100, p=p, first_cell=first)
    assert stream.offset == 0
    assert fd.draw_mask(100, 0.5, rng=0, first_cell=2**64 - 100).shape == (100,)
    assert fd.draw_mask(0, 0.5, rng=0, first_cell=2**64 - 1).shape == (0,)


# ---- environment ----

DRAW = "import fastdrop as fd; fd.draw_mask(5, 0.5)"


def test_environment_isa_is_never_a_fallback():
    native = primitive_modules()["c"]
    if native.unavailable():
        pytest.skip(native.unavailable())
    result = run_python(DRAW, FASTDROP_ISA="sse9")
    assert result.returncode != 0
    assert f"FASTDROP_ISA must be one of {', '.join(native.usable_isas())}" in result.stderr
    assert "'sse9'" in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "message", "code"),
    [
        ("FASTDROP_BACKEND", "numpy ", "one of auto, c, numba, numpy, but got 'numpy '", DRAW),
        ("FASTDROP_NUM_THREADS", "0", "from 1 to 256, but got '0'", DRAW),
        ("FASTDROP_NUM_THREADS", "two", "from 1 to 256, but got 'two'", "import fastdrop as fd; fd.get_num_threads()"),
    ],
    ids=["backend", "threads", "no number"],
)
def test_environment_is_refused(name, value, message, code):
    result = run_python(code, **{name: value})
    assert result.returncode != 0
    assert f"{name} must be {message}" in result.stderr

"""Bad input of the NumPy API: the exception, what its message names, and that nothing is written or drawn.

`ARGUMENTS` lists bad values by the name of an argument. Every function that has an argument of a name is given all bad
values of that name.
"""

from __future__ import annotations

import inspect
import itertools
import re
from fractions import Fraction

import numpy as np
import pytest

import fastdrop as fd

from ..cases import bits_of, primitive_modules, run_python

X = np.arange(12, dtype=np.float32).reshape(3, 4)
IMAGES = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
MASK = fd.draw_mask((3, 4), 0.5, rng=0)
NOISE = fd.GaussianNoise(0, 0, (3, 4), 0.5)
ALLOWED = "float32, float64, float16, bfloat16"
SCALING, STORE = "'inverted', 'standard'", "'bits', 'seed'"
BAD_DTYPES = ["i4", "i8", "u1", "u2", "u4", "?", "c8", "c16", "g", ">f4", ">f8", "O", "U3", "S2", "V2", "M8[s]"]

# Every way through the library that reads data, by the name its array has there.
TAKES_ARRAY = {
    "dropout": ("x", lambda x, **more: fd.dropout(x, 0.5, rng=0, **more)),
    "dropout-seed": ("x", lambda x, **more: fd.dropout(x, 0.5, rng=0, store="seed", **more)),
    "dropout-noise": ("x", lambda x, **more: fd.dropout(x, 0.5, rng=0, noise_shape=(1, 4), **more)),
    "dropout-p=0": ("x", lambda x, **more: fd.dropout(x, 0.0, rng=0, **more)),
    "dropout-p=1": ("x", lambda x, **more: fd.dropout(x, 1.0, rng=0, **more)),
    "evaluation-standard": ("x", lambda x, **more: fd.dropout(x, 0.5, training=False, scaling="standard", **more)),
    "dropout_backward": ("dy", lambda x, **more: fd.dropout_backward(x, MASK, **more)),
    "dropout_backward-none": ("dy", lambda x, **more: fd.dropout_backward(x, None, **more)),
    "apply_mask": ("x", lambda x, **more: fd.apply_mask(x, MASK, **more)),
    "apply_mask-noise": ("x", lambda x, **more: fd.apply_mask(x, NOISE, **more)),
}
FAMILY = {
    "dropout": (fd.dropout, {}),
    "feature_dropout": (fd.feature_dropout, {"channel_axis": 1}),
    "alpha_dropout": (fd.alpha_dropout, {}),
    "feature_alpha_dropout": (fd.feature_alpha_dropout, {"channel_axis": 1}),
    "variational_dropout": (fd.variational_dropout, {"time_axis": 0}),
    "drop_connect": (fd.drop_connect, {}),
    "stochastic_depth": (fd.stochastic_depth, {"mode": "row"}),
    "drop_block": (fd.drop_block, {"block_size": 3}),
    "gaussian_dropout": (fd.gaussian_dropout, {}),
}
calls = pytest.mark.parametrize(("name", "function"), TAKES_ARRAY.values(), ids=TAKES_ARRAY)
family = pytest.mark.parametrize(("op", "arguments"), FAMILY.values(), ids=FAMILY)


def refused(error, *names):
    """raises(error) whose message has each of these in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(str(name)) for name in names))


def assert_refused(op, arguments, error, *names, x=IMAGES, **bad):
    """In training and out of it; nothing is written and no random number is taken."""
    out, stream, generator = np.full(x.shape, 7, np.float32), fd.Stream(0), np.random.default_rng(0)
    untouched = generator.bit_generator.state
    for training, rng in itertools.product((True, False), (stream, generator)):
        with refused(error, *names):
            op(x, **{"p": 0.5, "rng": rng, "out": out, "training": training, **arguments, **bad})
    assert (out == 7).all()
    assert stream.offset == 0
    assert generator.bit_generator.state == untouched


# ---- arguments ----

BAD_P = {
    "below 0": (-0.1, ValueError, "-0.1"),
    "just below 0": (-5e-324, ValueError, "-5e-324"),
    "above 1": (1.5, ValueError, "1.5"),
    "just above 1": (np.nextafter(1, 2), ValueError, "1.0000000000000002"),
    "NaN": (float("nan"), ValueError, "nan"),
    "NumPy NaN": (np.float32("nan"), ValueError, "nan"),
    "inf": (float("inf"), ValueError, "inf"),
    "-inf": (float("-inf"), ValueError, "-inf"),
    "int": (2, ValueError, "2"),
    "huge int": (10**400, ValueError, ""),
    "huge fraction": (Fraction(10**400), ValueError, ""),
    "str": ("0.5", TypeError, "str"),
    "None": (None, TypeError, "NoneType"),
    "bool": (True, TypeError, "bool"),
    "NumPy bool": (np.True_, TypeError, "bool"),
    "complex": (0.5 + 0j, TypeError, "complex"),
    "NumPy complex": (np.complex64(0.5), TypeError, "complex64"),
    "list": ([0.5], TypeError, "list"),
    "1-d array": (np.array([0.5]), TypeError, "ndarray"),
}
BAD_RNG = [
    (-1, ValueError, "-1"),
    (2**64, ValueError, str(2**64)),
    *((rng, TypeError, type(rng).__name__) for rng in (1.0, "seed", True, np.random, range(3), (1, 2))),
    (np.True_, TypeError, "bool"),
]
BAD_AXES = [
    *((axis, ValueError, "axis of x, which has 4", str(axis)) for axis in (4, -5, 10**30, np.int8(4))),
    *((axis, TypeError, "int", type(axis).__name__) for axis in (1.0, "1", None, True, (1,))),
    (np.True_, TypeError, "int", "bool"),
]
BAD_BLOCKS = [
    *((size, ValueError, "positive") for size in (0, (3, 0))),
    *((size, ValueError, "negative") for size in (-1, (3, -2))),
    *((size, ValueError, "each of the 2 spatial axes") for size in ((3,), (3, 3, 3), ())),
    *((size, TypeError, "tuple of ints") for size in (3.0, (3, 2.5), "33", None)),
]
BAD_NOISE_SHAPES = [
    *((shape, ValueError) for shape in ((5,), (2, 3, 4, 5, 1), (), (3, 3, 4, 5), (2, 3, 4, 0), (2, 3, 4, -1))),
    *((shape, TypeError) for shape in ((2, 3, 4, 1.0), ("2", "3", "4", "5"), 3, "abcd")),
]
ARGUMENTS = {  # value, error, parts of the message
    "p": [
        (p, error, "between 0 and 1" if error is ValueError else "number", "got", c) for p, error, c in BAD_P.values()
    ],
    "rng": [(rng, error, "got", came) for rng, error, came in BAD_RNG],
    "scaling": [(v, ValueError, SCALING, "got", repr(v)) for v in ("other", "alpha", "Inverted", "", None, 1)],
    "store": [(v, ValueError, STORE, "got", repr(v)) for v in ("other", "Bits", "", None, 1)],
    "channel_axis": [(axis, error, allowed, "got", came) for axis, error, allowed, came in BAD_AXES],
    "time_axis": [(axis, error, allowed, "got", came) for axis, error, allowed, came in BAD_AXES],
    "mode": [(v, ValueError, "'batch', 'row'", "got", repr(v)) for v in ("rows", "Row", "", None, 0, True)],
    "block_size": [(size, error, allowed, "got", repr(size)) for size, error, allowed in BAD_BLOCKS],
    "noise_shape": [(shape, error, "got", "a" if shape == "abcd" else shape) for shape, error in BAD_NOISE_SHAPES],
}


@pytest.mark.parametrize("argument", ARGUMENTS)
@family
def test_bad_arguments_are_refused(op, arguments, argument):
    """Also where p = 0, so that nothing would be drawn."""
    if argument not in inspect.signature(op).parameters:
        return
    for value, error, *parts in ARGUMENTS[argument]:
        assert_refused(op, arguments, error, argument, *parts, **{argument: value})
        if argument in ("rng", "scaling", "store"):
            assert_refused(op, arguments, error, argument, *parts, **{"p": 0.0, argument: value})


def test_every_argument_has_bad_values():
    taken = {name for op, _ in FAMILY.values() for name in inspect.signature(op).parameters}
    assert taken - {"x", "w", "out", "training"} == set(ARGUMENTS)


def test_gaussian_dropout_refuses_p_of_1():
    """Its variance would have no bounds."""
    for p in (1, 1.0, np.float32(1)):
        assert_refused(fd.gaussian_dropout, {}, ValueError, "p must be below 1", "Gaussian", "got 1", p=p)
        with refused(ValueError, "p must be below 1", "Gaussian", "got 1"):
            fd.GaussianNoise(0, 0, (3,), p)


def test_data_of_too_few_axes_is_refused():
    def refuse(op, shape, *parts, **arguments):
        assert_refused(op, {}, ValueError, *parts, x=np.ones(shape, np.float32), **arguments)

    for axis in (0, 1, -1):
        for op, (shape, came) in itertools.product(
            (fd.feature_dropout, fd.feature_alpha_dropout), (((), "0 axes"), ((6,), "1 axis"))
        ):
            refuse(op, shape, "x", "at least two axes", "got", came, channel_axis=axis)
    for axis in (0, -1):
        refuse(fd.variational_dropout, (), "time_axis", "has 0", "got", axis, time_axis=axis)
    for mode in ("row", "batch"):
        refuse(fd.stochastic_depth, (), "x", "axis of samples", "got 0 axes", mode=mode)
    for shape in ((), (6,), (2, 3), (1, 2, 3, 4, 5, 6)):
        refuse(fd.drop_block, shape, "x", "(N, C, *)", "one to three spatial", "got", len(shape), block_size=1)


# ---- data and out ----


@calls
def test_data_of_other_dtypes_is_refused(name, function):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    swapped = np.dtype(ml_dtypes.bfloat16).newbyteorder("S")  # its name is the native one's
    for kind in [np.dtype(kind) for kind in (*BAD_DTYPES, ml_dtypes.float8_e5m2, swapped)]:
        if kind == np.float64:  # longdouble on some platforms
            continue
        out = np.full_like(X, 7)
        with refused(TypeError, name, ALLOWED, "got", kind):
            function(np.zeros((3, 4), kind), out=out)
        assert (out == 7).all()
    for x in ([[1, 2, 3, 4]] * 3, None, "text", 3):
        with refused(TypeError, name, ALLOWED, "got"):
            function(x)


@family
def test_family_refuses_dtypes(op, arguments):
    name = next(iter(inspect.signature(op).parameters))
    for kind in ("i4", "?", "c8", ">f4", "O"):
        x = np.zeros(IMAGES.shape, kind)
        assert_refused(op, arguments, TypeError, name, ALLOWED, "got", x.dtype, x=x)


def bad_outs(shape):
    """(x, out, error, what the message must have); out always starts as sevens."""
    size = int(np.prod(shape))
    x, sevens = np.arange(size, dtype=np.float32).reshape(shape), np.full(shape, 7, np.float32)
    readonly = sevens.copy()
    readonly.flags.writeable = False
    line = np.full(3 * size, 7, np.float32)
    repeated = np.lib.stride_tricks.as_strided(sevens, shape, (0, *sevens.strides[1:]))
    yield x, np.full(shape[::-1], 7, np.float32), ValueError, [str(shape), str(shape[::-1])]
    yield x, np.full(size, 7, np.float32), ValueError, [str(shape), f"({size},)"]
    yield x, np.full((1, *shape), 7, np.float32), ValueError, [str(shape), str((1, *shape))]
    yield x, np.full(shape, 7.0), TypeError, ["float32", "float64"]
    yield x, sevens.astype(">f4"), TypeError, ["float32", ">f4"]
    yield x, sevens.tolist(), TypeError, ["ndarray", "list"]
    yield x, readonly, ValueError, ["read-only"]
    yield x, repeated, ValueError, ["strides"]
    for start in (1, shape[-1]):  # of each other's memory a part, or all in another order
        parts = line[:size].reshape(shape), line[start : start + size].reshape(shape)
        yield *parts, ValueError, ["overlap"]
        yield *parts[::-1], ValueError, ["overlap"]
    yield line[:size].reshape(shape), line[size - 1 :: -1].reshape(shape), ValueError, ["overlap"]
    bytes_ = line.view(np.uint8)
    shifted = (bytes_[at : at + 4 * size].view(np.float32).reshape(shape) for at in (0, 1))
    yield *shifted, ValueError, ["overlap"]


def assert_out_is_refused(function, shape):
    for x, out, error, parts in bad_outs(shape):
        before = x.copy(), np.array(out)
        with refused(error, "out", *parts):
            function(x, out=out)
        assert (bits_of(np.array(out)) == bits_of(before[1])).all()
        assert (bits_of(x) == bits_of(before[0])).all()
    x = np.ones(shape, np.float32)
    x.flags.writeable = False
    with refused(ValueError, "out", "read-only"):
        function(x, out=x)


@calls
def test_bad_out_is_refused_and_left_alone(name, function):
    assert_out_is_refused(function, X.shape)


@family
def test_family_refuses_out(op, arguments):
    assert_out_is_refused(lambda x, out: op(x, p=0.5, rng=0, out=out, **arguments), IMAGES.shape)


# ---- masks ----


@pytest.mark.parametrize("function", [fd.dropout_backward, fd.apply_mask], ids=lambda f: f.__name__)
def test_masks_that_do_not_fit_are_refused(function):
    """Noise shares nothing, so that an extent of 1 is no help to it."""
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


def test_masks_refuse_to_keep_at_a_p_that_rounds_to_1():
    for p in (1.0, 1.0 - 2.0**-34):
        with pytest.raises(ValueError, match="drops everything, but keep would keep something"):
            fd.PackedMask.from_bool(np.array([True, False]), p)


def test_draw_mask_refuses_bad_arguments():
    stream = fd.Stream(0)
    for argument in ("p", "rng"):
        for value, error, *parts in ARGUMENTS[argument]:
            if argument != "rng" or value is not None:
                with refused(error, argument, *parts):
                    fd.draw_mask(5, **{"p": 0.5, "rng": stream, argument: value})
    for shape, error in (
        (-1, ValueError),
        ((3, -2), ValueError),
        (2.5, TypeError),
        ((3, 2.5), TypeError),
        ("ab", TypeError),
    ):
        with refused(error, "shape", "got", shape):
            fd.draw_mask(shape, 0.5, rng=stream)
    with refused(TypeError, "shape", "got None"):
        fd.draw_mask(None, 0.5, rng=stream)
    for p in (0.0, 0.5):
        for first in (-1, 2**64 - 99, 2**64, 2**70):
            with refused(ValueError, "first_cell", "got", first):
                fd.draw_mask(100, p, rng=stream, first_cell=first)
        for first in (1.0, "1", None, True):
            with refused(TypeError, "first_cell", "got", type(first).__name__):
                fd.draw_mask(100, p, rng=stream, first_cell=first)
    assert stream.offset == 0
    assert fd.draw_mask(100, 0.5, rng=0, first_cell=2**64 - 100).shape == (100,)
    assert fd.draw_mask(0, 0.5, rng=0, first_cell=2**64 - 1).shape == (0,)


# ---- environment ----

DRAW = "import fastdrop as fd; fd.draw_mask(5, 0.5)"


@pytest.mark.parametrize("isa", ["sse9", "neon"])
def test_environment_isa_is_never_a_fallback(isa):
    native = primitive_modules()["c"]
    if native.unavailable():
        pytest.skip(native.unavailable())
    if isa in native.usable_isas():
        pytest.skip(f"{isa} is usable here")
    result = run_python(DRAW, FASTDROP_ISA=isa)
    assert result.returncode != 0
    assert f"FASTDROP_ISA must be one of {', '.join(native.usable_isas())}" in result.stderr
    assert repr(isa) in result.stderr


def test_environment_backend_is_never_a_fallback():
    result = run_python(DRAW, FASTDROP_BACKEND="numpy ")
    assert result.returncode != 0
    assert "FASTDROP_BACKEND must be one of auto, c, numba, numpy, but got 'numpy '" in result.stderr


@pytest.mark.parametrize(("count", "code"), [("0", DRAW), ("two", "import fastdrop as fd; fd.get_num_threads()")])
def test_environment_num_threads_is_refused(count, code):
    result = run_python(code, FASTDROP_NUM_THREADS=count)
    assert result.returncode != 0
    assert f"FASTDROP_NUM_THREADS must be from 1 to 256, but got {count!r}" in result.stderr

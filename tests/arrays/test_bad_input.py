"""Bad input: which exception, what its message names, and that nothing is written."""

from __future__ import annotations

import inspect
import itertools
import re
from fractions import Fraction

import numpy as np
import pytest

import fastdrop as fd

from ..cases import bits_of, primitive_modules, readable, run_python

X = np.arange(12, dtype=np.float32).reshape(3, 4)
MASK = fd.draw_mask((3, 4), 0.5, rng=0)
NOISE = fd.GaussianNoise(0, 0, (3, 4), 0.5)
ALLOWED = "float32, float64, float16, bfloat16"

# The calls that read data, by the name their array has there.
TAKES_ARRAY = {
    "dropout": ("x", lambda x, **more: fd.dropout(x, 0.5, rng=0, **more)),
    "dropout-seed": ("x", lambda x, **more: fd.dropout(x, 0.5, rng=0, store="seed", **more)),
    "dropout-noise": ("x", lambda x, **more: fd.dropout(x, 0.5, rng=0, noise_shape=(1, 4), **more)),
    "dropout-p=0": ("x", lambda x, **more: fd.dropout(x, 0.0, rng=0, **more)),
    "dropout-p=1": ("x", lambda x, **more: fd.dropout(x, 1.0, rng=0, **more)),
    "evaluation": ("x", lambda x, **more: fd.dropout(x, 0.5, training=False, **more)),
    "evaluation-standard": ("x", lambda x, **more: fd.dropout(x, 0.5, training=False, scaling="standard", **more)),
    "dropout_backward": ("dy", lambda x, **more: fd.dropout_backward(x, MASK, **more)),
    "dropout_backward-none": ("dy", lambda x, **more: fd.dropout_backward(x, None, **more)),
    "apply_mask": ("x", lambda x, **more: fd.apply_mask(x, MASK, **more)),
    "apply_mask-noise": ("x", lambda x, **more: fd.apply_mask(x, NOISE, **more)),
    "feature_dropout": ("x", lambda x, **more: fd.feature_dropout(x, 0.5, rng=0, **more)),
    "alpha_dropout": ("x", lambda x, **more: fd.alpha_dropout(x, 0.5, rng=0, **more)),
    "feature_alpha_dropout": ("x", lambda x, **more: fd.feature_alpha_dropout(x, 0.5, rng=0, **more)),
    "variational_dropout": ("x", lambda x, **more: fd.variational_dropout(x, 0.5, 0, rng=0, **more)),
    "drop_connect": ("w", lambda x, **more: fd.drop_connect(x, 0.5, rng=0, **more)),
    "drop_connect-standard": (
        "w",
        lambda x, **more: fd.drop_connect(x, 0.5, training=False, scaling="standard", **more),
    ),
    "stochastic_depth": ("x", lambda x, **more: fd.stochastic_depth(x, 0.5, "row", rng=0, **more)),
    "gaussian_dropout": ("x", lambda x, **more: fd.gaussian_dropout(x, 0.5, rng=0, **more)),
    "gaussian_dropout-evaluation": ("x", lambda x, **more: fd.gaussian_dropout(x, 0.5, training=False, **more)),
}


@pytest.fixture(params=TAKES_ARRAY)
def call(request):
    return TAKES_ARRAY[request.param]


def refused(error, *names):
    """raises(error) whose message has each of these in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(str(name)) for name in names))


# ---- p ----

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


@pytest.mark.parametrize(("p", "error", "came"), BAD_P.values(), ids=BAD_P)
@pytest.mark.parametrize("training", [True, False])
def test_dropout_refuses_p(p, error, came, training):
    out = np.full_like(X, 7)
    allowed = "between 0 and 1" if error is ValueError else "number"
    with refused(error, "p", allowed, "got", came):
        fd.dropout(X, p, training=training, rng=0, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(("p", "error", "came"), BAD_P.values(), ids=BAD_P)
def test_draw_mask_refuses_p(p, error, came):
    with refused(error, "p", "between 0 and 1" if error is ValueError else "number", "got", came):
        fd.draw_mask(5, p)


# ---- dtype ----

BAD_DTYPES = ["i4", "i8", "u1", "u2", "u4", "?", "c8", "c16", "g", ">f4", ">f8", "O", "U3", "S2", "V2", "M8[s]"]


@pytest.mark.parametrize("kind", BAD_DTYPES)
def test_data_of_other_dtypes_is_refused(call, kind):
    name, function = call
    if np.dtype(kind) == np.float64:
        pytest.skip("longdouble is float64 on this platform")
    x = np.zeros((3, 4), kind)
    out = np.full_like(X, 7)
    with refused(TypeError, name, ALLOWED, "got", x.dtype):
        function(x, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("x", [[[1, 2, 3, 4]] * 3, None, "text", 3], ids=readable)
def test_data_that_is_no_array_of_floats_is_refused(call, x):
    name, function = call
    with refused(TypeError, name, ALLOWED, "got"):
        function(x)


def test_float8_is_refused(call):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    name, function = call
    with refused(TypeError, name, ALLOWED, "got", "float8_e5m2"):
        function(X.astype(ml_dtypes.float8_e5m2))


# ---- out ----


def bad_outs():
    """(x, out, error, what the message must have) by case; out always starts as sevens."""
    sevens = np.full_like(X, 7)
    readonly = sevens.copy()
    readonly.flags.writeable = False
    line = np.full(40, 7, np.float32)
    square = np.full((4, 4), 7, np.float32)
    repeated = np.lib.stride_tricks.as_strided(np.full(4, 7, np.float32), (3, 4), (0, 4))
    return {
        "another shape": (X, np.full((4, 3), 7, np.float32), ValueError, ["(3, 4)", "(4, 3)"]),
        "fewer axes": (X, np.full(12, 7, np.float32), ValueError, ["(3, 4)", "(12,)"]),
        "a shape that broadcasts": (X, np.full((1, 3, 4), 7, np.float32), ValueError, ["(3, 4)", "(1, 3, 4)"]),
        "another dtype": (X, np.full((3, 4), 7.0), TypeError, ["float32", "float64"]),
        "another byte order": (X, sevens.astype(">f4"), TypeError, ["float32", ">f4"]),
        "a list": (X, sevens.tolist(), TypeError, ["ndarray", "list"]),
        "read-only": (X, readonly, ValueError, ["read-only"]),
        "shifted by one": (line[:12].reshape(3, 4), line[1:13].reshape(3, 4), ValueError, ["overlap"]),
        "shifted by a row": (line[:12].reshape(3, 4), line[4:16].reshape(3, 4), ValueError, ["overlap"]),
        "shifted by a byte": (
            line.view(np.uint8)[:48].view(np.float32).reshape(3, 4),
            line.view(np.uint8)[1:49].view(np.float32).reshape(3, 4),
            ValueError,
            ["overlap"],
        ),
        "ahead of x": (line[1:13].reshape(3, 4), line[:12].reshape(3, 4), ValueError, ["overlap"]),
        "x reversed": (line[:12].reshape(3, 4), line[11::-1].reshape(3, 4), ValueError, ["overlap"]),
        "x transposed": (square[:3, :3], square[:3, :3].T, ValueError, ["overlap"]),
        "one row repeated": (X, repeated, ValueError, ["strides"]),
    }


@pytest.mark.parametrize("case", bad_outs())
def test_bad_out_is_refused_and_left_alone(call, case):
    name, function = call
    x, out, error, parts = bad_outs()[case]
    if x.shape != X.shape and name == "dy":
        function = lambda x, **more: fd.dropout_backward(x, fd.draw_mask(x.shape, 0.5, rng=0), **more)  # noqa: E731
    elif x.shape != X.shape and name == "x":
        function = lambda x, **more: fd.dropout(x, 0.5, rng=0, **more)  # noqa: E731
    before = x.copy(), np.array(out)
    with refused(error, "out", *parts):
        function(x, out=out)
    assert (bits_of(np.array(out)) == bits_of(before[1])).all()
    assert (bits_of(x) == bits_of(before[0])).all()


def test_x_itself_as_out_must_be_writeable(call):
    _, function = call
    x = X.copy()
    x.flags.writeable = False
    with refused(ValueError, "out", "read-only"):
        function(x, out=x)
    assert (x == X).all()


def test_a_refused_call_takes_no_offset():
    stream = fd.Stream(0)
    for bad in (
        {"p": 2},
        {"x": X.astype(int)},
        {"out": X[:2].copy()},
        {"noise_shape": (2, 4)},
        {"scaling": "other"},
        {"store": "other"},
    ):
        with pytest.raises((TypeError, ValueError), match="must"):
            fd.dropout(**{"x": X, "p": 0.5, "rng": stream} | bad)
    with pytest.raises(ValueError, match="first_cell"):
        fd.draw_mask(5, 0.5, rng=stream, first_cell=-1)
    assert stream.offset == 0


# ---- the family: every argument of every kind ----

IMAGES = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
FAMILY = {
    "feature_dropout": (fd.feature_dropout, {"channel_axis": 1}),
    "alpha_dropout": (fd.alpha_dropout, {}),
    "feature_alpha_dropout": (fd.feature_alpha_dropout, {"channel_axis": 1}),
    "variational_dropout": (fd.variational_dropout, {"time_axis": 0}),
    "drop_connect": (fd.drop_connect, {}),
    "stochastic_depth": (fd.stochastic_depth, {"mode": "row"}),
    "drop_block": (fd.drop_block, {"block_size": 3}),
    "gaussian_dropout": (fd.gaussian_dropout, {}),
}


def takers(argument):
    """A decorator: `op` and `arguments` of each kind that takes an argument of this name."""
    found = {name: row for name, row in FAMILY.items() if argument in inspect.signature(row[0]).parameters}
    assert found
    return pytest.mark.parametrize(("op", "arguments"), found.values(), ids=found)


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


@takers("p")
def test_family_refuses_p(op, arguments):
    for p, error, came in BAD_P.values():
        allowed = "between 0 and 1" if error is ValueError else "number"
        assert_refused(op, arguments, error, "p", allowed, "got", came, p=p)


@pytest.mark.parametrize("p", [1, 1.0, np.float32(1)], ids=repr)
def test_gaussian_dropout_refuses_p_of_1(p):
    """Its variance would have no bounds."""
    assert_refused(fd.gaussian_dropout, {}, ValueError, "p must be below 1", "Gaussian", "got 1", p=p)
    with refused(ValueError, "p must be below 1", "Gaussian", "got 1"):
        fd.GaussianNoise(0, 0, (3,), p)


AXES = {  # value, error, what came; of four axes
    "past the last": (4, ValueError, "4"),
    "before the first": (-5, ValueError, "-5"),
    "huge": (10**30, ValueError, str(10**30)),
    "NumPy int": (np.int8(4), ValueError, "4"),
    "float": (1.0, TypeError, "float"),
    "str": ("1", TypeError, "str"),
    "None": (None, TypeError, "NoneType"),
    "bool": (True, TypeError, "bool"),
    "NumPy bool": (np.True_, TypeError, "bool"),
    "tuple": ((1,), TypeError, "tuple"),
}


@pytest.mark.parametrize("argument", ["channel_axis", "time_axis"])
@pytest.mark.parametrize(("axis", "error", "came"), AXES.values(), ids=AXES)
def test_family_refuses_axes(argument, axis, error, came):
    allowed = "axis of x, which has 4" if error is ValueError else "int"
    for op, arguments in FAMILY.values():
        if argument in arguments:
            assert_refused(op, arguments, error, argument, allowed, "got", came, **{argument: axis})


@pytest.mark.parametrize("op", [fd.feature_dropout, fd.feature_alpha_dropout], ids=["features", "alpha"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_feature_dropouts_refuse_data_without_channels(op, axis):
    for shape, came in (((), "0 axes"), ((6,), "1 axis")):
        x = np.ones(shape, np.float32)
        assert_refused(op, {}, ValueError, "x", "at least two axes", "got", came, x=x, channel_axis=axis)


def test_variational_dropout_refuses_data_without_axes():
    x = np.ones((), np.float32)
    for axis in (0, -1):
        assert_refused(fd.variational_dropout, {}, ValueError, "time_axis", "has 0", "got", axis, x=x, time_axis=axis)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_refuses_data_without_samples(mode):
    x = np.ones((), np.float32)
    assert_refused(fd.stochastic_depth, {}, ValueError, "x", "axis of samples", "got 0 axes", x=x, mode=mode)


@pytest.mark.parametrize("mode", ["rows", "Row", "", None, 0, True], ids=repr)
def test_stochastic_depth_refuses_mode(mode):
    assert_refused(fd.stochastic_depth, {}, ValueError, "mode", "'batch', 'row'", "got", repr(mode), mode=mode)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 2, 3, 4, 5, 6)], ids=str)
def test_drop_block_refuses_data_of_other_ranks(shape):
    x = np.ones(shape, np.float32)
    parts = "x", "(N, C, *)", "one to three spatial", "got", str(len(shape))
    assert_refused(fd.drop_block, {}, ValueError, *parts, x=x, block_size=1)


@pytest.mark.parametrize(
    ("size", "error", "allowed"),
    [
        (0, ValueError, "positive"),
        (-1, ValueError, "negative"),
        ((3, 0), ValueError, "positive"),
        ((3, -2), ValueError, "negative"),
        ((3,), ValueError, "each of the 2 spatial axes"),
        ((3, 3, 3), ValueError, "each of the 2 spatial axes"),
        ((), ValueError, "each of the 2 spatial axes"),
        (3.0, TypeError, "tuple of ints"),
        ((3, 2.5), TypeError, "tuple of ints"),
        ("33", TypeError, "tuple of ints"),
        (None, TypeError, "tuple of ints"),
    ],
    ids=readable,
)
def test_drop_block_refuses_block_size(size, error, allowed):
    assert_refused(fd.drop_block, {}, error, "block_size", allowed, "got", repr(size), block_size=size)


@takers("scaling")
@pytest.mark.parametrize("value", ["other", "alpha", "alpha_slope", "Inverted", None, 1])
def test_family_refuses_scaling(op, arguments, value):
    allowed = "'inverted', 'standard'"
    assert_refused(op, arguments, ValueError, "scaling", allowed, "got", repr(value), scaling=value)
    with refused(ValueError, "scaling", allowed, "got", repr(value)):
        fd.dropout(X, 0.5, scaling=value)


@takers("store")
@pytest.mark.parametrize("value", ["other", "Bits", None, 1])
def test_family_refuses_store(op, arguments, value):
    assert_refused(op, arguments, ValueError, "store", "'bits', 'seed'", "got", repr(value), store=value)


@takers("rng")
@pytest.mark.parametrize(
    ("rng", "error", "came"),
    [(-1, ValueError, "-1"), (2**64, ValueError, str(2**64)), ("seed", TypeError, "str"), (True, TypeError, "bool")],
    ids=readable,
)
@pytest.mark.parametrize("undrawn", [{}, {"p": 0.0}], ids=str)
def test_family_refuses_rng(op, arguments, rng, error, came, undrawn):
    assert_refused(op, arguments, error, "rng", "got", came, rng=rng, **undrawn)


@takers("out")
def test_family_refuses_out(op, arguments):
    """As all calls do; DropBlock, whose data has other axes, is shown here alone."""
    readonly, sevens = np.full_like(IMAGES, 7), np.full_like(IMAGES, 7)
    readonly.flags.writeable = False
    line = np.full(121, 7, np.float32)
    for x, out, error, part in (
        (IMAGES, sevens[:1], ValueError, "shape"),
        (IMAGES, sevens.astype(np.float64), TypeError, "dtype"),
        (IMAGES, sevens.tolist(), TypeError, "ndarray"),
        (IMAGES, readonly, ValueError, "read-only"),
        (line[:120].reshape(IMAGES.shape), line[1:].reshape(IMAGES.shape), ValueError, "overlap"),
    ):
        assert_refused(op, arguments, error, "out", part, x=x, out=out)
        assert (np.array(out) == 7).all()


@takers("p")
def test_family_refuses_dtypes(op, arguments):
    name = next(iter(inspect.signature(op).parameters))
    for kind in ("i4", "?", "c8", ">f4", "O"):
        x = np.zeros(IMAGES.shape, kind)
        assert_refused(op, arguments, TypeError, name, ALLOWED, "got", x.dtype, x=x)


# ---- noise_shape, scaling, store, rng ----


@pytest.mark.parametrize(
    ("noise_shape", "error", "came"),
    [
        ((4,), ValueError, "(4,)"),
        ((3, 4, 1), ValueError, "(3, 4, 1)"),
        ((), ValueError, "()"),
        ((2, 4), ValueError, "(2, 4)"),
        ((3, 0), ValueError, "(3, 0)"),
        ((3, -1), ValueError, "(3, -1)"),
        ((3, 1.0), TypeError, "(3, 1.0)"),
        (("3", "4"), TypeError, "('3', '4')"),
        (3, TypeError, "3"),
        ("ab", TypeError, "a"),
    ],
    ids=readable,
)
@pytest.mark.parametrize("training", [True, False])
def test_dropout_refuses_noise_shape(noise_shape, error, came, training):
    out = np.full_like(X, 7)
    with refused(error, "noise_shape", "got", came) as caught:
        fd.dropout(X, 0.5, noise_shape=noise_shape, rng=0, out=out, training=training)
    if error is ValueError and -1 not in noise_shape:
        assert "(3, 4)" in str(caught.value)
    assert (out == 7).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("argument", "allowed"), [("scaling", "'inverted', 'standard'"), ("store", "'bits', 'seed'")])
@pytest.mark.parametrize("value", ["other", "", None, 1, "Bits"])
def test_dropout_refuses_unknown_choices(argument, allowed, value, training):
    out = np.full_like(X, 7)
    with refused(ValueError, argument, allowed, "got", repr(value)):
        fd.dropout(X, 0.5, rng=0, out=out, training=training, **{argument: value})
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("rng", "error", "came"),
    [
        (-1, ValueError, "-1"),
        (2**64, ValueError, "18446744073709551616"),
        (1.0, TypeError, "float"),
        ("seed", TypeError, "str"),
        (True, TypeError, "bool"),
        (np.True_, TypeError, "bool"),
        (np.random, TypeError, "module"),
        (range(3), TypeError, "range"),
        ((1, 2), TypeError, "tuple"),
    ],
    ids=readable,
)
def test_bad_rng_is_refused(rng, error, came):
    out = np.full_like(X, 7)
    with refused(error, "rng", "got", came):
        fd.dropout(X, 0.5, rng=rng, out=out)
    with refused(error, "rng", "got", came):
        fd.draw_mask(5, 0.5, rng=rng)
    assert (out == 7).all()


# ---- masks ----


@pytest.mark.parametrize("function", [fd.dropout_backward, fd.apply_mask], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["packed", "seeded"])
@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 4, 1), (1, 3, 4), (3, 5), (3, 2), (2, 1), ()], ids=readable)
def test_mask_of_another_shape_is_refused(function, kind, shape):
    mask = fd.draw_mask(shape, 0.5, rng=0) if kind == "packed" else fd.SeededMask(0, 0, shape, 0.5)
    out = np.full_like(X, 7)
    with refused(ValueError, "mask", "(3, 4)", "got", shape):
        function(X, mask, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("function", [fd.dropout_backward, fd.apply_mask], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 4, 1), (3, 5), (1, 4), (3, 1), (1, 1), ()], ids=readable)
def test_noise_of_another_shape_is_refused(function, shape):
    """It shares nothing, so 1 is no help."""
    out = np.full_like(X, 7)
    with refused(ValueError, "mask", "(3, 4)", "got noise", shape):
        function(X, fd.GaussianNoise(0, 0, shape, 0.5), out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("function", [fd.dropout_backward, fd.apply_mask], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mask", [np.ones((3, 4), bool), 0.5, "mask", [True]], ids=lambda m: type(m).__name__)
def test_what_is_no_mask_is_refused(function, mask):
    out = np.full_like(X, 7)
    with refused(TypeError, "mask", "PackedMask", "got", type(mask).__name__):
        function(X, mask, out=out)
    assert (out == 7).all()


# ---- draw_mask ----


@pytest.mark.parametrize(
    ("shape", "error", "came"),
    [
        (-1, ValueError, "-1"),
        ((3, -2), ValueError, "(3, -2)"),
        (2.5, TypeError, "2.5"),
        ((3, 2.5), TypeError, "(3, 2.5)"),
        ("ab", TypeError, "'ab'"),
        (None, TypeError, "None"),
    ],
    ids=readable,
)
def test_draw_mask_refuses_shape(shape, error, came):
    with refused(error, "shape", "got", came):
        fd.draw_mask(shape, 0.5)


@pytest.mark.parametrize(
    ("first_cell", "error"),
    [
        (-1, ValueError),
        (2**64 - 99, ValueError),
        (2**64, ValueError),
        (2**70, ValueError),
        (1.0, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
    ids=readable,
)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_draw_mask_refuses_first_cell(first_cell, error, p):
    with refused(error, "first_cell", "got", first_cell if error is ValueError else type(first_cell).__name__):
        fd.draw_mask(100, p, rng=0, first_cell=first_cell)


def test_draw_mask_takes_the_last_first_cell():
    assert fd.draw_mask(100, 0.5, rng=0, first_cell=2**64 - 100).shape == (100,)
    assert fd.draw_mask(0, 0.5, rng=0, first_cell=2**64 - 1).shape == (0,)


# ---- environment ----

DRAW = "import fastdrop as fd; fd.draw_mask(5, 0.5)"


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "neon", "avx512"])
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


@pytest.mark.parametrize("name", ["gpu", "C", "numpy "])
def test_environment_backend_is_never_a_fallback(name):
    result = run_python(DRAW, FASTDROP_BACKEND=name)
    assert result.returncode != 0
    assert f"FASTDROP_BACKEND must be one of auto, c, numba, numpy, but got {name!r}" in result.stderr


@pytest.mark.parametrize("count", ["0", "257", "-1", "two", "1.5", "1e1"])
@pytest.mark.parametrize("code", [DRAW, "import fastdrop as fd; fd.get_num_threads()"], ids=["draw", "get"])
def test_environment_num_threads_is_refused(count, code):
    result = run_python(code, FASTDROP_NUM_THREADS=count)
    assert result.returncode != 0
    assert f"FASTDROP_NUM_THREADS must be from 1 to 256, but got {count!r}" in result.stderr


def test_dropout_refuses_swapped_bfloat16():
    """Its name is the native one's."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    swapped = np.ones(4, ml_dtypes.bfloat16).view(np.dtype(ml_dtypes.bfloat16).newbyteorder("S"))
    with pytest.raises(TypeError, match="x must have dtype float32, float64, float16, bfloat16"):
        fd.dropout(swapped, 0.5)


def test_masks_refuse_to_keep_at_a_p_that_rounds_to_1():
    for p in (1.0, 1.0 - 2.0**-34):
        with pytest.raises(ValueError, match="drops everything, but keep would keep something"):
            fd.PackedMask.from_bool(np.array([True, False]), p)


@pytest.mark.parametrize("undrawn", [{"p": 0.0}, {"training": False}])
def test_dropout_refuses_rng_even_where_nothing_is_drawn(undrawn):
    stream = fd.Stream(3)
    with pytest.raises(TypeError, match="rng must be"):
        fd.dropout(np.ones(4), rng="seed", **undrawn)
    fd.dropout(np.ones(4), rng=stream, **undrawn)
    assert stream.offset == 0

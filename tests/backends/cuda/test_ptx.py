"""The PTX interpreter, against Python integers, libm, NumPy, and PTX's own descriptions of its instructions."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import itertools
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastdrop.core.random import philox4x32_10

from . import ptx

Array = NDArray[Any]

RNG_SEED = 20
N = 1000
ARCHITECTURE = "sm_90"

TYPES = [f"{kind}{bits}" for bits in (16, 32, 64) for kind in "us"]
SIGNED = [type for type in TYPES if type[0] == "s"]
BITS = ("b16", "b32", "b64")


def bits_of(type: str) -> int:
    return 8 * ptx.DTYPES[type].itemsize


# ---- running one instruction ----

handwritten: set[str] = set()


@pytest.fixture(scope="module", autouse=True)
def assembled() -> Iterator[None]:
    """That the PTX written here is PTX; all of it at once, after the tests, where ptxas is installed."""
    yield
    ptxas = shutil.which("ptxas")
    if ptxas and handwritten:
        header, marker = entry("").split(".visible", 1)[0], ".visible .entry kernel("
        entries = [
            text.removeprefix(header).replace(marker, f".visible .entry kernel_{i}(")
            for i, text in enumerate(sorted(handwritten))
        ]
        command = [ptxas, f"-arch={ARCHITECTURE}", "-O0", "-o", os.devnull, "-"]
        done = subprocess.run(command, input=header + "".join(entries), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def entry(body: str, parameters: Sequence[str] = (), name: str = "kernel") -> str:
    """PTX of a kernel; parameters are declared as given, named p0, p1 and on."""
    declared = ", ".join(f".param .{type} p{i}" for i, type in enumerate(parameters))
    return (
        f".version 8.0\n.target {ARCHITECTURE}\n.address_size 64\n.visible .entry {name}({declared})\n{{\n{body}\n}}\n"
    )


def program(instruction: str, result: str, operands: Sequence[str]) -> str:
    """A kernel that applies an instruction on $d, $a, $b, $c to an element per thread; predicates are held as u32."""
    lines = [".reg .b32 %i, %t, %block;", ".reg .b64 %wide, %at;"]
    lines += ["mov.u32 %i, %tid.x;", "mov.u32 %t, %ntid.x;", "mov.u32 %block, %ctaid.x;"]
    lines += ["mad.lo.u32 %i, %block, %t, %i;", "cvt.u64.u32 %wide, %i;"]
    for i, (letter, type) in enumerate(zip("dabc", (result, *operands), strict=False)):
        held = "u32" if type == "pred" else type
        register = "pred" if type == "pred" else type if type in ("f32", "f64") else f"b{max(16, bits_of(type))}"
        lines += [f".reg .{register} %{letter};", f"ld.param.u64 %at, [p{i}];"]
        lines += [f"mad.lo.u64 %at, %wide, {bits_of(held) // 8}, %at;"]
        if letter == "d":
            lines += [".reg .b64 %out;", "mov.u64 %out, %at;"]
        elif type == "pred":
            lines += ["ld.global.u32 %t, [%at];", f"setp.ne.u32 %{letter}, %t, 0;"]
        else:
            lines += [f"ld.global.{memory_type(type)} %{letter}, [%at];"]
    for letter in "dabc":
        instruction = instruction.replace(f"${letter}", f"%{letter}")
    lines += [instruction]
    lines += ["selp.u32 %t, 1, 0, %d;"] if result == "pred" else []
    lines += [f"st.global.{memory_type(result)} [%out], {'%t' if result == 'pred' else '%d'};", "ret;"]
    return entry("\n".join(lines), ["u64"] * (1 + len(operands)))


def memory_type(type: str) -> str:
    return {"pred": "u32", "f16": "b16", "bf16": "b16"}.get(type, type)


def evaluate(instruction: str, result: str, *operands: tuple[str, Array], threads: int = 250) -> Array:
    """The instruction's result for each element; of at most so many threads per block as divide them."""
    text = program(instruction, result, [type for type, _ in operands])
    arrays = [np.ascontiguousarray(values, np.uint32 if type == "pred" else None) for type, values in operands]
    n = len(arrays[0])
    out = np.zeros(n, np.uint32 if result == "pred" else ptx.DTYPES[result])
    threads = next(count for count in range(threads, 0, -1) if n % count == 0)
    launch(text, [out, *arrays], blocks=n // threads, threads=threads)
    return out.astype(bool) if result == "pred" else out


def launch(text: str, arrays: Sequence[Array], *more: bytes, blocks: int = 1, threads: int = 32, **options: Any) -> Any:
    """Runs a kernel whose first parameters are these arrays' addresses."""
    parameters = b"".join(struct.pack("<Q", array.ctypes.data) for array in arrays)
    handwritten.add(text)
    return ptx.Machine(arrays, **options).launch(text, blocks, threads, b"".join((parameters, *more)))


def aligned(n: int, dtype: Any) -> Array:
    """Zeros at a multiple of 16 bytes."""
    dtype = np.dtype(dtype)
    raw = np.zeros(n * dtype.itemsize + 16, np.uint8)
    start = -raw.ctypes.data % 16
    return raw[start : start + n * dtype.itemsize].view(dtype)


def samples(type: str, seed: int = RNG_SEED, n: int = N) -> Array:
    """Random bits of every magnitude, after the values where things change."""
    rng = np.random.default_rng(seed)
    if type == "pred":
        return rng.integers(0, 2, n).astype(bool)
    width = bits_of(type)
    bits = rng.integers(0, 2**64, n, dtype=np.uint64) >> rng.integers(0, width, n, dtype=np.uint64)
    bits = (bits & np.uint64(2**width - 1)).astype(f"u{width // 8}")
    dtype = ptx.DTYPES[type]
    if dtype.kind == "f":
        bits = rng.integers(0, 2**width, n, dtype=np.uint64).astype(bits.dtype)
        special = np.array([0, 1, 1.5, 2.5, np.inf, np.nan, np.finfo(dtype).tiny, np.finfo(dtype).max, 1e-45], dtype)
        special = np.concatenate([special, -special]).view(bits.dtype)
    else:
        special = np.array([0, 1, 2, 2 ** (width - 1) - 1, 2 ** (width - 1), 2**width - 1], bits.dtype)
    pairs = rng.permutation(np.resize(special, n // 4))
    bits[: len(pairs)] = pairs
    return bits.view(dtype)


def integers(values: Array) -> list[int]:
    return [int(value) for value in values]


def wrapped(values: Sequence[int], type: str) -> Array:
    width = bits_of(type)
    return np.array([value % 2**width for value in values], f"u{width // 8}").view(ptx.DTYPES[type])


def check_integers(instruction: str, reference: Callable[..., int], result: str, *operands: tuple[str, Array]) -> None:
    expected = wrapped([int(reference(*row)) for row in zip(*(integers(v) for _, v in operands), strict=True)], result)
    np.testing.assert_array_equal(evaluate(instruction, result, *operands), expected)


# ---- integers ----


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ARITHMETIC: dict[str, Callable[[int, int, int], int]] = {
    "add": lambda a, b, width: a + b,
    "sub": lambda a, b, width: a - b,
    "mul.lo": lambda a, b, width: a * b,
    "mul.hi": lambda a, b, width: a * b >> width,
    "div": lambda a, b, width: quotient(a, b),
    "rem": lambda a, b, width: a - b * quotient(a, b),
    "min": lambda a, b, width: min(a, b),
    "max": lambda a, b, width: max(a, b),
}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_integer_arithmetic(name: str, type: str) -> None:
    a, b = samples(type), samples(type, 1)
    if name in ("div", "rem"):
        b = np.where(b == 0, b.dtype.type(3), b)
    reference = ARITHMETIC[name]
    check_integers(
        f"{name}.{type} $d, $a, $b;", lambda a, b: reference(a, b, bits_of(type)), type, (type, a), (type, b)
    )


@pytest.mark.parametrize("type", TYPES)
def test_multiply_add(type: str) -> None:
    operands = [(type, samples(type, seed)) for seed in range(3)]
    width = bits_of(type)
    check_integers(f"mad.lo.{type} $d, $a, $b, $c;", lambda a, b, c: a * b + c, type, *operands)
    check_integers(f"mad.hi.{type} $d, $a, $b, $c;", lambda a, b, c: (a * b >> width) + c, type, *operands)


@pytest.mark.parametrize("type", ["u16", "s16", "u32", "s32"])
def test_wide_multiplication(type: str) -> None:
    wide = f"{type[0]}{2 * bits_of(type)}"
    a, b, c = (type, samples(type)), (type, samples(type, 1)), (wide, samples(wide, 2))
    check_integers(f"mul.wide.{type} $d, $a, $b;", lambda a, b: a * b, wide, a, b)
    check_integers(f"mad.wide.{type} $d, $a, $b, $c;", lambda a, b, c: a * b + c, wide, a, b, c)


@pytest.mark.parametrize("type", SIGNED)
def test_signs(type: str) -> None:
    check_integers(f"neg.{type} $d, $a;", lambda a: -a, type, (type, samples(type)))
    check_integers(f"abs.{type} $d, $a;", abs, type, (type, samples(type)))


@pytest.mark.parametrize("type", [*BITS, "pred"])
def test_logic(type: str) -> None:
    a, b = (type, samples(type)), (type, samples(type, 1))
    for name, reference in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        np.testing.assert_array_equal(evaluate(f"{name}.{type} $d, $a, $b;", type, a, b), reference(a[1], b[1]))
    np.testing.assert_array_equal(evaluate(f"not.{type} $d, $a;", type, a), ~a[1])


@pytest.mark.parametrize("truth", [0x00, 0x3C, 0x96, 0xCA, 0xE8, 0xFF])
def test_lop3(truth: int) -> None:
    def reference(a: int, b: int, c: int) -> int:
        rows = (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1) for i in range(32))
        return sum((truth >> row & 1) << i for i, row in enumerate(rows))

    operands = [("b32", samples("b32", seed)) for seed in range(3)]
    check_integers(f"lop3.b32 $d, $a, $b, $c, {truth};", reference, "b32", *operands)


@pytest.mark.parametrize("type", BITS)
def test_shifts_clamp(type: str) -> None:
    width = bits_of(type)
    count = (
        "u32",
        np.resize(np.array([0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 2**31, 2**32 - 1], np.uint32), N),
    )
    value, signed = samples(type), f"s{width}"
    check_integers(f"shl.{type} $d, $a, $b;", lambda a, b: a << min(b, 64), type, (type, value), count)
    check_integers(f"shr.{type} $d, $a, $b;", lambda a, b: a >> b, type, (type, value), count)
    check_integers(f"shr.u{width} $d, $a, $b;", lambda a, b: a >> b, type, (type, value), count)
    check_integers(
        f"shr.{signed} $d, $a, $b;", lambda a, b: a >> b, signed, (signed, value.view(f"i{width // 8}")), count
    )


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode: str) -> None:
    def by(count: int) -> int:
        return count & 31 if mode == "wrap" else min(count, 32)

    operands = [("b32", samples("b32", seed)) for seed in range(2)]
    operands += [("u32", np.resize(np.array([0, 1, 31, 32, 33, 63, 64, 2**32 - 1], np.uint32), N))]
    check_integers(f"shf.l.{mode}.b32 $d, $a, $b, $c;", lambda a, b, c: (b << 32 | a) << by(c) >> 32, "b32", *operands)
    check_integers(f"shf.r.{mode}.b32 $d, $a, $b, $c;", lambda a, b, c: (b << 32 | a) >> by(c), "b32", *operands)


def test_prmt() -> None:
    def reference(a: int, b: int, c: int) -> int:
        source = [(b << 32 | a) >> 8 * i & 0xFF for i in range(8)]
        chosen = [c >> 4 * i & 15 for i in range(4)]
        parts = [255 * (source[n & 7] >> 7) if n & 8 else source[n] for n in chosen]
        return sum(part << 8 * i for i, part in enumerate(parts))

    check_integers("prmt.b32 $d, $a, $b, $c;", reference, "b32", *[("b32", samples("b32", seed)) for seed in range(3)])


def fields() -> tuple[tuple[str, Array], tuple[str, Array]]:
    borders = np.array([0, 1, 8, 31, 32, 33, 63, 64, 65, 255, 256 + 5, 2**32 - 1], np.uint32)
    position, length = np.array(list(itertools.product(borders, borders)), np.uint32).T
    return ("u32", np.resize(position, N)), ("u32", np.resize(length, N))


@pytest.mark.parametrize("type", ["u32", "s32", "u64", "s64"])
def test_bfe(type: str) -> None:
    top = bits_of(type) - 1

    def reference(a: int, b: int, c: int) -> int:
        """As the PTX manual puts it."""
        position, length = b & 0xFF, c & 0xFF
        sign = 0 if type[0] == "u" or length == 0 else a >> min(position + length - 1, top) & 1
        return sum((a >> position + i & 1 if i < length and position + i <= top else sign) << i for i in range(top + 1))

    check_integers(f"bfe.{type} $d, $a, $b, $c;", reference, type, (type, samples(type)), *fields())


@pytest.mark.parametrize("type", ["b32", "b64"])
def test_bfi(type: str) -> None:
    a, b = samples(type), samples(type, 1)
    for position, length in itertools.product((0, 5, 31, 32, 63, 64, 255, 260), (0, 1, 8, 31, 32, 64, 255)):
        place, count = position & 0xFF, length & 0xFF
        inside = range(place, min(place + count, bits_of(type)))
        mask = sum(1 << i for i in inside)
        expected = [(y & ~mask) | (x << place & mask) for x, y in zip(integers(a), integers(b), strict=True)]
        constants = f".reg .b32 %p, %l; mov.u32 %p, {position}; mov.u32 %l, {length};"
        result = evaluate(f"{constants} bfi.{type} $d, $a, $b, %p, %l;", type, (type, a), (type, b))
        np.testing.assert_array_equal(result, wrapped(expected, type))


@pytest.mark.parametrize("width", [32, 64])
def test_counting_bits(width: int) -> None:
    type = f"b{width}"
    a = (type, samples(type))
    check_integers(f"popc.{type} $d, $a;", lambda a: bin(a).count("1"), "u32", a)
    check_integers(f"clz.{type} $d, $a;", lambda a: width - a.bit_length(), "u32", a)
    check_integers(f"brev.{type} $d, $a;", lambda a: int(f"{a:0{width}b}"[::-1], 2), type, a)
    for signed in (f"u{width}", f"s{width}"):
        b = (signed, samples(signed))
        check_integers(f"bfind.{signed} $d, $a;", lambda a: (~a if a < 0 else a).bit_length() - 1, "u32", b)
        check_integers(
            f"bfind.shiftamt.{signed} $d, $a;",
            lambda a: width - (~a if a < 0 else a).bit_length() if a not in (0, -1) else -1,
            "u32",
            b,
        )


@pytest.mark.parametrize("type", [*BITS, *TYPES, "f32", "f64"])
def test_selp(type: str) -> None:
    a, b, c = samples(type), samples(type, 1), samples("pred")
    result = evaluate(f"selp.{type} $d, $a, $b, $c;", type, (type, a), (type, b), ("pred", c))
    assert result.tobytes() == np.where(c, a, b).tobytes()


# ---- comparisons ----

PYTHON = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
FLOAT_COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]


def compared(name: str, a: Array, b: Array) -> Array:
    return np.array([eval(f"x {PYTHON[name]} y") for x, y in zip(a.tolist(), b.tolist(), strict=True)])


@pytest.mark.parametrize("type", [*BITS, *TYPES])
def test_setp_of_integers(type: str) -> None:
    a, b = samples(type), samples(type, 1)
    b[::3] = a[::3]
    names = {"b": ["eq", "ne"], "s": list(PYTHON)[:6], "u": list(PYTHON)}[type[0]]
    for name in names:
        result = evaluate(f"setp.{name}.{type} $d, $a, $b;", "pred", (type, a), (type, b))
        np.testing.assert_array_equal(result, compared(name, a, b))


@pytest.mark.parametrize("type", ["f32", "f64"])
@pytest.mark.parametrize("name", FLOAT_COMPARISONS)
def test_setp_of_floats(name: str, type: str) -> None:
    a, b = samples(type), samples(type, 1)
    b[::3] = a[::3]
    nan = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        expected = nan if name == "nan" else ~nan
    else:
        expected = compared(name[:2], a, b)
        expected[nan] = len(name) == 3
    np.testing.assert_array_equal(evaluate(f"setp.{name}.{type} $d, $a, $b;", "pred", (type, a), (type, b)), expected)


@pytest.mark.parametrize(("name", "join"), [("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)])
@pytest.mark.parametrize("negated", ["", "!"])
def test_setp_joins_two_results(name: str, join: Any, negated: str) -> None:
    a, b, c = samples("s32"), samples("s32", 1), samples("pred")
    operands = ("s32", a), ("s32", b), ("pred", c)
    other = ~c if negated else c
    first = evaluate(f"setp.lt.{name}.s32 $d, $a, $b, {negated}$c;", "pred", *operands)
    both = f".reg .pred %q; setp.lt.{name}.s32 %q|$d, $a, $b, {negated}$c;"
    np.testing.assert_array_equal(first, join(a < b, other))
    np.testing.assert_array_equal(evaluate(both, "pred", *operands), join(a >= b, other))


# ---- floats ----


def canonical(values: Array) -> Array:
    """float32 with the NaN that GPUs return."""
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF).view(np.float32), values)


def same_bits(a: Array, b: Array) -> None:
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))


FLOAT_FUNCTIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
FLOAT_FUNCTIONS |= {f"{name}.rn": function for name, function in FLOAT_FUNCTIONS.items()} | {"div.rn": np.divide}


@pytest.mark.parametrize("name", FLOAT_FUNCTIONS)
def test_float_arithmetic(name: str) -> None:
    function = FLOAT_FUNCTIONS[name]
    for type in ("f32", "f64"):
        a, b = samples(type, n=20_000), samples(type, 1, n=20_000)
        result = evaluate(f"{name}.{type} $d, $a, $b;", type, (type, a), (type, b))
        with np.errstate(all="ignore"):
            expected = function(a, b)
        if type == "f32":
            same_bits(result, canonical(expected))
        else:
            np.testing.assert_array_equal(result, expected)
            np.testing.assert_array_equal(np.signbit(result), np.signbit(expected))


@pytest.mark.parametrize(("name", "function"), [("rcp", np.reciprocal), ("sqrt", np.sqrt)])
def test_reciprocal_and_root(name: str, function: Any) -> None:
    a = samples("f32", n=20_000)
    with np.errstate(all="ignore"):
        same_bits(evaluate(f"{name}.rn.f32 $d, $a;", "f32", ("f32", a)), canonical(function(a)))


def libm(name: str) -> Callable[[float, float, float], float]:
    path = ctypes.util.find_library("m")
    if path is None:
        pytest.skip("there is no libm to compare with")
    function = getattr(ctypes.CDLL(path), name)
    kind = ctypes.c_float if name == "fmaf" else ctypes.c_double
    function.restype, function.argtypes = kind, [kind] * 3
    return function  # type: ignore[no-any-return]


@pytest.mark.parametrize(("type", "name"), [("f32", "fmaf"), ("f64", "fma")])
def test_fma_rounds_once(type: str, name: str) -> None:
    a, b, c = (samples(type, seed, n=20_000) for seed in range(3))
    dtype = ptx.DTYPES[type]
    digits = 24 if type == "f32" else 53
    # Products halfway between two results, then a little more or less than that; cancellation; subnormals.
    half = dtype.type(1 + 2.0 ** -(digits // 2))
    tiny = [sign * x for x in (2.0**-60, 2.0**-120, 2.0**-52 - 2.0**-76) for sign in (1, -1)]
    rng = np.random.default_rng(3)
    with np.errstate(all="ignore"):
        near = rng.standard_normal((2, 2000)).astype(dtype)
        cancelling = -(near[0] * near[1])
        small = (rng.standard_normal((3, 2000)) * np.array([1, *[float(np.finfo(dtype).tiny)] * 2])[:, None]).astype(
            dtype
        )
    a = np.concatenate([a, np.full(len(tiny), half), near[0], small[0]])
    b = np.concatenate([b, np.full(len(tiny), half), near[1], small[1]])
    c = np.concatenate([c, np.array(tiny, dtype), cancelling, small[2]])
    fma = libm(name)
    with np.errstate(all="ignore"):
        expected = np.array([fma(*row) for row in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], dtype)
    result = evaluate(f"fma.rn.{type} $d, $a, $b, $c;", type, (type, a), (type, b), (type, c))
    if type == "f32":
        same_bits(result, canonical(expected))
    else:
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(np.signbit(result)[~np.isnan(result)], np.signbit(expected)[~np.isnan(expected)])


@pytest.mark.parametrize("type", ["f32", "f64"])
def test_float_min_and_max(type: str) -> None:
    dtype = ptx.DTYPES[type]
    a, b = np.array(list(itertools.product([-np.inf, -1, -0.0, 0.0, 1, np.inf, np.nan], repeat=2)), dtype).T
    ordered = [sorted((x, y), key=lambda v: (v, np.copysign(1, v))) for x, y in zip(a, b, strict=True)]
    low, high = np.array(ordered, dtype).T
    for name, extreme in (("min", low), ("max", high)):
        expected = np.where(np.isnan(a), b, np.where(np.isnan(b), a, extreme))
        result = evaluate(f"{name}.{type} $d, $a, $b;", type, (type, a), (type, b))
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(np.signbit(result), np.signbit(expected) & ~np.isnan(expected))
        if type == "f32":
            expected = canonical(np.where(np.isnan(a) | np.isnan(b), np.nan, extreme).astype(dtype))
            same_bits(evaluate(f"{name}.NaN.f32 $d, $a, $b;", type, (type, a), (type, b)), expected)


@pytest.mark.parametrize("type", ["f32", "f64"])
def test_float_signs(type: str) -> None:
    a, b = samples(type), samples(type, 1)
    nan = canonical if type == "f32" else np.positive
    same_bits(evaluate(f"neg.{type} $d, $a;", type, (type, a)), nan(-a))
    same_bits(evaluate(f"abs.{type} $d, $a;", type, (type, a)), nan(np.abs(a)))
    same_bits(evaluate(f"copysign.{type} $d, $a, $b;", type, (type, a), (type, b)), np.copysign(b, a))


def test_subnormals_are_kept_unless_flushed() -> None:
    a = np.array([1e-40, -1e-40, 1.5e-38, 2.0**-126, 3.0], np.float32)
    b = np.array([1.0, 1.0, 0.5, 1.0, 1e-40], np.float32)
    operands = ("f32", a), ("f32", b)
    same_bits(evaluate("mul.rn.f32 $d, $a, $b;", "f32", *operands), a * b)
    flushed = np.array([0.0, -0.0, 0.0, 2.0**-126, 0.0], np.float32)
    same_bits(evaluate("mul.rn.ftz.f32 $d, $a, $b;", "f32", *operands), flushed)
    np.testing.assert_array_equal(evaluate("setp.eq.ftz.f32 $d, $a, 0f00000000;", "pred", ("f32", a)), a < 2.0**-126)
    same_bits(
        evaluate("cvt.ftz.f64.f32 $d, $a;", "f64", ("f32", a)), np.where(a < 2.0**-126, a * 0, a).astype(np.float64)
    )


# ---- conversions ----

WIDTHS = ("u8", "s8", *TYPES)


@pytest.mark.parametrize("source", WIDTHS)
def test_cvt_between_integers(source: str) -> None:
    a = samples(source)
    for result in WIDTHS:
        if result != source:
            expected = a.astype(ptx.DTYPES[result])
            held = result if bits_of(result) > 8 else f"{result[0]}16"  # 8 bits are extended to a register of 16
            got = evaluate(f"cvt.{result}.{source} $d, $a;", held, (source, a))
            np.testing.assert_array_equal(got, expected, f"{result} of {source}")


def test_cvt_takes_low_bits_and_extends() -> None:
    a = ("b32", samples("b32"))
    np.testing.assert_array_equal(evaluate("cvt.s64.s8 $d, $a;", "s64", a), a[1].astype(np.int8))
    np.testing.assert_array_equal(evaluate("cvt.s16.s16 $d, $a;", "s32", a), a[1].astype(np.int16))
    np.testing.assert_array_equal(evaluate("cvt.u16.s16 $d, $a;", "u32", a), a[1].astype(np.uint16))


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("result", ["f32", "f64"])
def test_cvt_integer_to_float(result: str, source: str) -> None:
    a = samples(source)
    expected = np.array(integers(a), ptx.DTYPES[source]).astype(ptx.DTYPES[result])
    same_bits(evaluate(f"cvt.rn.{result}.{source} $d, $a;", result, (source, a)), expected)


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("result", TYPES)
def test_cvt_float_to_integer(result: str, source: str) -> None:
    width = bits_of(result)
    low, high = (0, 2**width - 1) if result[0] == "u" else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    near = [sign * (whole + part) for whole in (0, 1, 2, 7) for part in (0.0, 0.25, 0.5, 0.75) for sign in (1, -1)]
    borders = [2.0**k + d for k in (15, 16, 31, 32, 62, 63, 64) for d in (-1.5, -1, -0.5, 0, 0.5)]
    a = np.array([*near, *borders, *(-x for x in borders), np.inf, -np.inf, np.nan], ptx.DTYPES[source])
    nan = 0 if source == "f32" and width < 64 else 1 << width - 1
    for rounding, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        rounded = function(a)
        expected = [
            nan if np.isnan(x) else high if x == np.inf else low if x == -np.inf else min(max(int(x), low), high)
            for x in rounded
        ]
        got = evaluate(f"cvt.{rounding}.{result}.{source} $d, $a;", result, (source, a))
        np.testing.assert_array_equal(got, wrapped(expected, result))


@pytest.mark.parametrize(
    ("rounding", "function"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_cvt_to_integral_float(rounding: str, function: Any) -> None:
    a = np.arange(-20, 20, dtype=np.float32) / 4
    same_bits(evaluate(f"cvt.{rounding}.f32.f32 $d, $a;", "f32", ("f32", a)), function(a))


def test_cvt_between_float32_and_float64() -> None:
    a, b = samples("f64"), samples("f32")
    with np.errstate(all="ignore"):
        same_bits(evaluate("cvt.rn.f32.f64 $d, $a;", "f32", ("f64", a)), canonical(a.astype(np.float32)))
        np.testing.assert_array_equal(evaluate("cvt.f64.f32 $d, $a;", "f64", ("f32", b)), b.astype(np.float64))


EVERY_HALF = np.arange(2**16, dtype=np.uint16)


def test_cvt_from_every_16_bit_float() -> None:
    wide = evaluate("cvt.f32.f16 $d, $a;", "f32", ("b16", EVERY_HALF))
    same_bits(wide, canonical(EVERY_HALF.view(np.float16).astype(np.float32)))
    wide = evaluate("cvt.f32.bf16 $d, $a;", "f32", ("b16", EVERY_HALF))
    same_bits(wide, (EVERY_HALF.astype(np.uint32) << 16).view(np.float32))  # a shift: NaNs are kept


def nearest_even(x: Array, values: Array) -> Array:
    """Indices of the nearest among ascending finite ``values``, by exact arithmetic; ties to the even index."""
    x = x.astype(np.float64)
    above = np.searchsorted(values, x).clip(1, len(values) - 1)
    to_low, to_high = x - values[above - 1], values[above] - x  # exact: floats of few bits, close together
    return np.where((to_high < to_low) | ((to_high == to_low) & (above % 2 == 0)), above, above - 1)


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_cvt_to_16_bit_floats(type: str) -> None:
    halves = np.arange(0x7C00 if type == "f16" else 0x7F80, dtype=np.uint16)
    values = (halves.view(np.float16) if type == "f16" else (halves.astype(np.uint32) << 16).view(np.float32)).astype(
        float
    )
    infinity = len(values)
    values = np.append(values, 2 * values[-1] - values[-2])  # where the next one would be: half way is infinite
    a = np.concatenate([samples("f32", n=20_000), ((values[1:] + values[:-1]) / 2).astype(np.float32)])
    magnitude = np.minimum(np.nan_to_num(np.abs(a), nan=0, posinf=np.inf).astype(float), values[-1])
    expected = nearest_even(magnitude, values).astype(np.uint16)
    assert expected.max() == infinity
    expected = np.where(np.isnan(a), 0x7FFF, expected | np.where(np.signbit(a), 0x8000, 0)).astype(np.uint16)
    np.testing.assert_array_equal(evaluate(f"cvt.rn.{type}.f32 $d, $a;", "b16", ("f32", a)), expected)
    pairs = evaluate(f"cvt.rn.{type}x2.f32 $d, $a, $b;", "b32", ("f32", a), ("f32", a[::-1]))
    np.testing.assert_array_equal(pairs >> 16, expected)
    np.testing.assert_array_equal(pairs & 0xFFFF, expected[::-1])


# ---- moves, scopes, parameters, special registers ----


def test_mov_packs_and_unpacks() -> None:
    a, b = samples("b16"), samples("b16", 1)
    packed = a.astype(np.uint32) | b.astype(np.uint32) << 16
    np.testing.assert_array_equal(evaluate("mov.b32 $d, {$a, $b};", "b32", ("b16", a), ("b16", b)), packed)
    np.testing.assert_array_equal(evaluate("mov.b32 {_, $d}, $a;", "b16", ("b32", packed)), b)
    half = ".reg .b16 %x; mov.b32 {$d, %x}, $a;"
    np.testing.assert_array_equal(evaluate(half, "b16", ("b32", packed)), a)
    x, y = samples("b32"), samples("b32", 1)
    packed = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    np.testing.assert_array_equal(evaluate("mov.b64 $d, {$a, $b};", "b64", ("b32", x), ("b32", y)), packed)
    np.testing.assert_array_equal(evaluate("mov.b64 {_, $d}, $a;", "b32", ("b64", packed)), y)
    four = ".reg .b16 %w<4>; mov.b64 {%w0, %w1, %w2, %w3}, $a; mov.b64 $d, {%w3, %w2, %w1, %w0};"
    swapped = packed.view(np.uint16).reshape(-1, 4)[:, ::-1].copy().view(np.uint64)[:, 0]
    np.testing.assert_array_equal(evaluate(four, "b64", ("b64", packed)), swapped)


def test_braces_scope_registers_and_labels() -> None:
    once = "{ .reg .b32 %x; .reg .pred %p; setp.lt.s32 %p, %a, 0; mov.b32 %x, %a;"
    once += "@%p bra L; neg.s32 %x, %x; L: mov.b32 %d, %x; }"
    twice = once + "/* again,\n of the result */ " + once.replace("%a", "%d")
    a = samples("s32")
    result = evaluate(twice, "s32", ("s32", a))
    np.testing.assert_array_equal(result, np.where(a < 0, a, -a))


def test_immediates() -> None:
    a = np.arange(4, dtype=np.uint32)
    np.testing.assert_array_equal(evaluate("add.u32 $d, $a, -1;", "u32", ("u32", a)), a - 1)
    np.testing.assert_array_equal(evaluate("add.u32 $d, $a, 0xFFU;", "u32", ("u32", a)), a + 255)
    np.testing.assert_array_equal(evaluate("add.u32 $d, $a, WARP_SZ;", "u32", ("u32", a)), a + 32)
    np.testing.assert_array_equal(evaluate("mov.f32 $d, 0f40490FDB;", "f32", ("u32", a)), np.float32(np.pi))
    np.testing.assert_array_equal(evaluate("mov.f64 $d, 0d400921FB54442D18;", "f64", ("u32", a)), np.pi)
    np.testing.assert_array_equal(evaluate("mov.b32 $d, 0f40490FDB;", "b32", ("u32", a)), 0x40490FDB)


def test_parameters_lie_at_their_natural_alignment() -> None:
    out = aligned(5, np.uint64)
    body = """
        .reg .b64 %o, %x<5>; .reg .f64 %f; .reg .b32 %r; .reg .f32 %g;
        ld.param.u64 %o, [p0]; ld.param.u8 %x0, [p1]; ld.param.s16 %x1, [p2]; ld.param.f32 %g, [p3];
        ld.param.f64 %f, [p4]; ld.param.s32 %x4, [p5+4];
        mov.b32 %r, %g; cvt.u64.u32 %x2, %r; mov.b64 %x3, %f;
        st.global.u64 [%o], %x0; st.global.u64 [%o+8], %x1; st.global.u64 [%o+16], %x2; st.global.u64 [%o+24], %x3;
        st.global.u64 [%o+32], %x4; ret;
    """
    text = entry(body, ["u64", "u8", "u16", "f32", "f64", "align 4 .b8"]).replace("p5)", "p5[8])")
    handwritten.add(text)
    parameters = struct.pack("<QBxhfdii", out.ctypes.data, 200, -2, 1.5, -2.5, 7, -9)
    ptx.Machine([out]).launch(text, 1, 1, parameters)
    expected = [200, -2, int(np.float32(1.5).view(np.uint32)), int(np.float64(-2.5).view(np.int64)), -9]
    np.testing.assert_array_equal(out.view(np.int64), expected)
    for wrong in (parameters[:-1], parameters + bytes(8)):
        with pytest.raises(ValueError, match=f"has 32 bytes of parameters, but got {len(wrong)}"):
            ptx.Machine([out]).launch(text, 1, 1, wrong)


def test_special_registers() -> None:
    names = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + [
        "%laneid",
        "%warpid",
    ]
    body = """
        .reg .b32 %r<9>; .reg .b64 %o, %w;
        mov.u32 %r0, %tid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r3, %r1, %r2, %r0;
        ld.param.u64 %o, [p0]; mad.wide.u32 %o, %r3, 56, %o;
    """
    body += "".join(f"mov.u32 %r4, {name}; st.global.u32 [%o+{4 * i}], %r4;" for i, name in enumerate(names))
    text = entry(body, ["u64"])
    blocks, threads = 3, 70
    out = np.zeros((blocks, threads, len(names)), np.uint32)
    launch(text, [out], blocks=blocks, threads=threads)
    block, thread = np.indices((blocks, threads))
    zero = np.zeros_like(block)
    expected = [
        thread,
        zero,
        zero,
        zero + threads,
        zero + 1,
        zero + 1,
        block,
        zero,
        zero,
        zero + blocks,
        zero + 1,
        zero + 1,
    ]
    np.testing.assert_array_equal(out, np.stack([*expected, thread % 32, thread // 32], axis=-1))


@pytest.mark.parametrize(("blocks", "threads"), [(0, 32), (1, 0), (1, 1025), (1, 65)])
def test_launch_sizes_are_checked(blocks: int, threads: int) -> None:
    text = entry("ret;").replace("()\n", "()\n.maxntid 64, 1, 1\n") if threads == 65 else entry("ret;")
    with pytest.raises(ValueError, match=f"{blocks} blocks of {threads} threads"):
        ptx.Machine([]).launch(text, blocks, threads, b"")


# ---- memory ----


@pytest.mark.parametrize(
    ("type", "count"),
    [
        (type, count)
        for type in ("b8", "u8", "s8", *BITS, *TYPES, "f32", "f64")
        for count in (1, 2, 4)
        if count * bits_of(type) <= 128
    ],
)
def test_loads_and_stores(type: str, count: int) -> None:
    register = type if type[0] == "f" else f"b{max(16, bits_of(type))}"
    names = ", ".join(f"%x{i}" for i in range(count))
    group = f"{{{names}}}" if count > 1 else names
    vector = f".v{count}" if count > 1 else ""
    body = f"""
        .reg .{register} %x<4>; .reg .b64 %a, %b; .reg .b32 %i;
        mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
        mad.wide.u32 %a, %i, {count * bits_of(type) // 8}, %a; mad.wide.u32 %b, %i, {count * bits_of(type) // 8}, %b;
        ld.global.nc.L1::no_allocate{vector}.{type} {group}, [%a];
        st.global{vector}.{type} [%b], {group};
    """
    text = entry(body, ["u64", "u64"])
    n = 50
    x, y = aligned(n * count, ptx.DTYPES[type]), aligned(n * count, ptx.DTYPES[type])
    x[:] = samples(type, n=n * count)
    launch(text, [x, y], threads=n)
    same_bits(y, x)


@pytest.mark.parametrize("type", ["u8", "s8", "u16", "s16", "u32", "s32"])
def test_narrow_loads_extend_and_narrow_stores_truncate(type: str) -> None:
    body = f"""
        .reg .b64 %x, %a, %b; .reg .b32 %i;
        mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
        mad.wide.u32 %a, %i, {bits_of(type) // 8}, %a; mad.wide.u32 %b, %i, 8, %b;
        ld.global.{type} %x, [%a]; st.global.u64 [%b], %x; st.global.{type} [%a+0], %x;
    """
    text = entry(body, ["u64", "u64"])
    x, y = samples(type, n=100), aligned(100, np.int64)
    before = x.copy()
    launch(text, [x, y], threads=100)
    np.testing.assert_array_equal(y, before.astype(np.int64))
    np.testing.assert_array_equal(x, before)


COPY = """
    .reg .b64 %a, %b; .reg .b32 %i, %r<4>;
    mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
    mad.wide.u32 %a, %i, SIZE, %a; mad.wide.u32 %b, %i, SIZE, %b;
    ld.global.TYPE GROUP, [%a]; st.global.TYPE [%b], GROUP;
"""
COPY_4 = entry(COPY.replace("SIZE", "4").replace("TYPE", "u32").replace("GROUP", "%r0"), ["u64", "u64"])
COPY_16 = entry(
    COPY.replace("SIZE", "16").replace("TYPE", "v4.u32").replace("GROUP", "{%r0, %r1, %r2, %r3}"), ["u64"] * 2
)


def faults(what: str) -> Any:
    return pytest.raises(ptx.Fault, match=what)


def test_access_out_of_bounds_is_a_fault() -> None:
    x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    one_block = {"blocks": 1, "threads": 64}
    launch(COPY_4, [x, y], **one_block)
    address = x.ctypes.data + 4 * 63
    pattern = rf"outside.*load from {address:#x}, by thread 63 of block 0, at: ld\.global\.u32 %r0, \[%a\];"
    parameters = struct.pack("<QQ", x.ctypes.data, y.ctypes.data)
    with faults(pattern):
        ptx.Machine([x[:63], y]).launch(COPY_4, 1, 64, parameters)
    with faults(rf"outside.*load from {x.ctypes.data:#x}, by thread 0"):
        ptx.Machine([x[1:], y]).launch(COPY_4, 1, 64, parameters)
    with faults(rf"outside.*store to {y.ctypes.data:#x}"):
        ptx.Machine([x]).launch(COPY_4, 1, 64, parameters)
    with faults("outside"):
        ptx.Machine([]).launch(COPY_4, 1, 64, parameters)
    memory = ptx.Memory([x])
    machine = ptx.Machine(memory)
    memory.allow(y)
    machine.launch(COPY_4, 1, 64, parameters)


def test_access_may_not_straddle_the_end() -> None:
    x, y = aligned(8, np.uint32), aligned(8, np.uint32)
    launch(COPY_16, [x, y], threads=2)
    with faults(rf"outside.*{x.ctypes.data + 16:#x}"):
        ptx.Machine([x[:7], y]).launch(COPY_16, 1, 2, struct.pack("<QQ", x.ctypes.data, y.ctypes.data))


@pytest.mark.parametrize("off", [4, 8, 12])
def test_misaligned_access_is_a_fault(off: int) -> None:
    x, y = aligned(64, np.uint32), aligned(64, np.uint32)
    with faults(f"misaligned for 16 bytes: load from {x.ctypes.data + off:#x}, by thread 0 of block 0"):
        ptx.Machine([x, y]).launch(COPY_16, 1, 2, struct.pack("<QQ", x.ctypes.data + off, y.ctypes.data))
    with faults(f"misaligned for 16 bytes: store to {y.ctypes.data + off:#x}, by thread 0 of block 0"):
        ptx.Machine([x, y]).launch(COPY_16, 1, 2, struct.pack("<QQ", x.ctypes.data, y.ctypes.data + off))


def test_store_to_read_only_memory_is_a_fault() -> None:
    x, y = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    x.flags.writeable = False
    launch(COPY_4, [x, y], threads=64)
    np.testing.assert_array_equal(x, y)
    with faults(f"read-only memory: store to {x.ctypes.data:#x}"):
        launch(COPY_4, [y, x], threads=64)


def test_strided_arrays_are_allowed_from_end_to_end() -> None:
    x, y = np.zeros((8, 16), np.uint32), np.zeros(64, np.uint32)
    x[...] = np.arange(128).reshape(8, 16)
    inner = x[::-1, 3:5][1:4]  # rows 4 to 6
    start = x[4:, 3:].ctypes.data
    parameters = struct.pack("<QQ", start, y.ctypes.data)
    ptx.Machine([inner, y]).launch(COPY_4, 1, 34, parameters)
    np.testing.assert_array_equal(y[:34], np.arange(67, 101))
    with faults("outside"):
        ptx.Machine([inner, y]).launch(COPY_4, 1, 35, parameters)


# ---- races ----


def store_at(index: str, load: bool = False) -> str:
    """Thread i stores to (or loads from) word ``index`` of p0; and loads word i first, of p1."""
    body = f"""
        .reg .b64 %a, %b; .reg .b32 %i, %j, %r, %n, %c;
        mov.u32 %i, %tid.x; mov.u32 %n, %ntid.x; mov.u32 %c, %ctaid.x; mad.lo.u32 %i, %c, %n, %i;
        ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
        {index}
        mad.wide.u32 %a, %j, 4, %a; mad.wide.u32 %b, %i, 4, %b;
        st.global.u32 [%a], %i; {"ld.global.u32 %r, [%b]; st.global.u32 [%b], %r;" if load else ""}
    """
    return entry(body, ["u64", "u64"])


def races(who: str) -> Any:
    return pytest.raises(ptx.Race, match=who)


def test_two_writers_race() -> None:
    x, y = np.zeros(9000, np.uint32), np.zeros(9000, np.uint32)
    launch(store_at("mov.u32 %j, %i;"), [x, y], blocks=90, threads=100)
    pattern = (
        rf"writes {x.ctypes.data + 4 * 50:#x}, which thread (0|50) of block (0|1) accessed, by thread (50|0) of block"
    )
    with races(pattern):  # in one instruction
        launch(store_at("rem.u32 %j, %i, 50; add.u32 %j, %j, 50;"), [x, y], blocks=1, threads=100)
    apart = ptx.THREADS_AT_ONCE // 100  # blocks that don't run together
    with races(rf"writes {x.ctypes.data:#x}, which thread 0 of block 0 accessed, by thread 0 of block {apart}"):
        launch(store_at(f"rem.u32 %j, %i, {100 * apart};"), [x, y], blocks=apart + 3, threads=100)
    launch(store_at("mov.u32 %j, 0;"), [x, y], blocks=1, threads=100, races=False)


def test_reader_and_writer_race() -> None:
    x = np.zeros(200, np.uint32)
    own = store_at("mov.u32 %j, %i;", load=True)
    launch(own, [x, x], threads=100)  # its own byte a thread may read and write again
    shifted = store_at("add.u32 %j, %i, 1;", load=True)
    with races(rf"reads {x.ctypes.data + 4:#x}, which thread 0 of block 0 accessed, by thread 1 of block 0"):
        launch(shifted, [x, x], threads=100)
    launch(shifted, [x, x], threads=100, races=False)


WRITE_AFTER_READS = entry(
    """
    .reg .b64 %a, %b; .reg .b32 %i, %r; .reg .pred %p;
    mov.u32 %i, %tid.x; ld.param.u64 %a, [p0];
    ld.global.u32 %r, [%a];
    setp.ne.u32 %p, %i, 5;
    @%p bra DONE;
    st.global.u32 [%a], %r;
    DONE: ret;
    """,
    ["u64"],
)


def test_writing_what_others_read_is_a_race() -> None:
    x = np.zeros(4, np.uint32)
    with races(rf"writes {x.ctypes.data:#x}, which several threads accessed, by thread 5 of block 0"):
        launch(WRITE_AFTER_READS, [x])


def test_races_are_found_by_the_byte() -> None:
    """Neighbours within a word are no race; a wide access meets a narrow one inside it."""
    body = """
        .reg .b64 %a, %b; .reg .b32 %i, %r, %s; .reg .pred %p;
        mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; cvt.u64.u32 %b, %i; add.u64 %b, %a, %b;
        st.global.u8 [%b], %i;
        setp.ne.u32 %p, %i, 31;
        @%p bra DONE;
        WIDE
        DONE: ret;
    """
    x = aligned(48, np.uint8)
    launch(entry(body.replace("WIDE", ""), ["u64"]), [x])
    np.testing.assert_array_equal(x[:32], np.arange(32))
    launch(entry(body.replace("WIDE", "ld.global.u64 %b, [%a+32];"), ["u64"]), [x])
    with races(f"reads {x.ctypes.data + 24:#x}, which thread 24 of block 0 accessed, by thread 31"):
        launch(entry(body.replace("WIDE", "ld.global.u64 %b, [%a+24];"), ["u64"]), [x])


ADD = """
    .reg .b64 %a, %b, %i, %r; .reg .b32 %t; .reg .pred %p;
    mov.u32 %t, %tid.x; cvt.u64.u32 %i, %t; ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
    and.b64 %r, %i, 1; mad.lo.u64 %a, %r, 8, %a;
    atom.global.add.u64 %r, [%a], %i;
    MORE
    mad.lo.u64 %b, %i, 8, %b; st.global.u64 [%b], %r;
"""


def test_atomic_addition() -> None:
    sums, before = np.array([2**32 - 1, 7], np.uint64), np.zeros(64, np.uint64)
    launch(entry(ADD.replace("MORE", ""), ["u64", "u64"]), [sums, before], threads=64)
    assert sums.tolist() == [2**32 - 1 + sum(range(0, 64, 2)), 7 + sum(range(1, 64, 2))]
    assert before[:6].tolist() == [2**32 - 1, 7, 2**32 - 1, 8, 2**32 + 1, 11]


@pytest.mark.parametrize(
    ("more", "verb"), [("ld.global.u64 %i, [%a];", "reads"), ("st.global.u64 [%a], %i;", "writes")]
)
def test_atomic_addition_beside_other_accesses_is_a_race(more: str, verb: str) -> None:
    sums, before = np.zeros(2, np.uint64), np.zeros(64, np.uint64)
    with races(f"{verb} {sums.ctypes.data:#x}, which an atomic accessed, by thread 0 of block 0"):
        launch(entry(ADD.replace("MORE", more), ["u64", "u64"]), [sums, before], threads=64)
    reads_first = ADD.replace("MORE", "").replace("atom.", "ld.global.u64 %r, [%a]; atom.")
    with races(f"writes {sums.ctypes.data:#x}, which several threads accessed"):
        launch(entry(reads_first, ["u64", "u64"]), [sums, before], threads=64)


# ---- control flow and warps ----


def collatz_steps(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = (3 * n + 1 if n & 1 else n // 2), steps + 1
    return steps


COLLATZ = """
    .reg .b32 %n, %k, %odd; .reg .pred %p, %q;
    mov.u32 %k, 0; mov.u32 %n, $a;
    LOOP:
    setp.eq.u32 %p, %n, 1;
    @%p bra DONE;
    and.b32 %odd, %n, 1;
    setp.ne.u32 %q, %odd, 0;
    add.u32 %k, %k, 1;
    @%q bra ODD;
    shr.u32 %n, %n, 1;
    bra.uni LOOP;
    ODD:
    mad.lo.u32 %n, %n, 3, 1;
    bra LOOP;
    DONE:
    mov.u32 $d, %k;
"""


def test_divergent_loops() -> None:
    a = np.arange(1, 701, dtype=np.uint32)
    np.testing.assert_array_equal(evaluate(COLLATZ, "u32", ("u32", a)), [collatz_steps(int(n)) for n in a])


def test_guards() -> None:
    a, c = samples("s32"), samples("pred")
    guarded = "mov.b32 $d, $a; @$c neg.s32 $d, $a; @!$c add.s32 $d, $d, 1;"
    result = evaluate(guarded, "s32", ("s32", a), ("s32", a), ("pred", c))
    np.testing.assert_array_equal(result, np.where(c, -a, a + 1))


def test_counts_are_of_warps() -> None:
    """70 threads are three warps; the loop runs as often as the slowest lane of each."""
    body = """
        .reg .b32 %i, %n; .reg .pred %p;
        mov.u32 %i, %tid.x;
        mov.u32 %n, 0;
        LOOP: add.u32 %n, %n, 32; setp.lt.u32 %p, %n, %i; @%p bra LOOP;
        setp.ge.u32 %p, %i, 40;
        @%p exit;
        @%p not.b32 %n, %n;
        ret;
    """
    text = entry(body)
    counts = launch(text, [], threads=70)
    loops = 1 + 2 + 3
    looping = dict.fromkeys(("add.u32", "setp.lt.u32", "bra"), loops)
    assert counts == {"mov.u32": 6, **looping, "setp.ge.u32": 3, "exit": 3, "not.b32": 2, "ret": 2}
    assert counts.total() == 6 + 3 * loops + 3 + 3 + 2 + 2


def test_endless_loops_are_ended() -> None:
    with faults("still running"):
        launch(entry("LOOP: bra LOOP;"), [], steps=1000)
    with faults("still running"):
        launch(
            entry(WARP_BODY + "@%p bra LOOP; bar.warp.sync -1; ret; LOOP: bra LOOP;", ["u64"]),
            [np.zeros(1)],
            steps=1000,
        )


@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
def test_shfl(mode: str) -> None:
    """Each lane's source as the PTX manual works it out."""
    n, rng = 32 * 200, np.random.default_rng(RNG_SEED)
    a = rng.integers(0, 2**32, n, dtype=np.uint32)
    b = rng.integers(0, 64, n, dtype=np.uint32)
    c = rng.choice(np.array([31, 0, 0x1C03, 0x1800, 0x1007, 0x181F], np.uint32), n)
    if mode == "up":
        c &= np.uint32(0xFF00)
    expected, inside = [], []
    for lane, step, bounds, base in zip(
        np.arange(n) % 32, integers(b), integers(c), np.arange(n) // 32 * 32, strict=True
    ):
        step, clamp, segment = step & 31, bounds & 31, bounds >> 8 & 31
        most, least = (lane & segment) | (clamp & ~segment), lane & segment
        source = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": least | (step & ~segment)}[mode]
        valid = source >= most if mode == "up" else source <= most
        expected.append(a[base + (source if valid else lane)])
        inside.append(valid)
    operands = ("b32", a), ("b32", b), ("b32", c)
    np.testing.assert_array_equal(
        evaluate(f"shfl.sync.{mode}.b32 $d, $a, $b, $c, -1;", "b32", *operands, threads=64), expected
    )
    with_predicate = f".reg .b32 %v; shfl.sync.{mode}.b32 %v|$d, $a, $b, $c, 0xFFFFFFFF;"
    np.testing.assert_array_equal(evaluate(with_predicate, "pred", *operands, threads=64), inside)


def test_votes() -> None:
    rng = np.random.default_rng(RNG_SEED)
    flags = rng.random((64, 32)) < rng.choice([0, 0.1, 0.5, 1], 64)[:, None]
    a = ("pred", flags.ravel())
    for mode, expected in (
        ("any", flags.any(axis=1)),
        ("all", flags.all(axis=1)),
        ("uni", flags.all(axis=1) | ~flags.any(axis=1)),
    ):
        result = evaluate(f"vote.sync.{mode}.pred $d, $a, -1;", "pred", a, threads=64)
        np.testing.assert_array_equal(result, expected.repeat(32))
    ballots = np.packbits(flags, axis=1, bitorder="little").view(np.uint32)[:, 0]
    np.testing.assert_array_equal(
        evaluate("vote.sync.ballot.b32 $d, $a, -1;", "b32", a, threads=64), ballots.repeat(32)
    )
    np.testing.assert_array_equal(
        evaluate("vote.sync.ballot.b32 $d, !$a, -1;", "b32", a, threads=64), ~ballots.repeat(32)
    )


def test_votes_of_halves() -> None:
    """Two membermasks at one instruction, each lane in one of them."""
    flags = np.random.default_rng(RNG_SEED).random((64, 32)) < 0.05
    halves = """
        .reg .b32 %lane, %m; .reg .pred %h;
        mov.u32 %lane, %laneid; setp.lt.u32 %h, %lane, 16; selp.b32 %m, 0xFFFF, 0xFFFF0000, %h;
        vote.sync.any.pred $d, $a, %m;
    """
    expected = flags.reshape(64, 2, 16).any(axis=2).repeat(16)
    np.testing.assert_array_equal(evaluate(halves, "pred", ("pred", flags.ravel()), threads=64), expected)


def test_activemask_and_lanes_that_do_not_exist() -> None:
    active = """
        .reg .b32 %lane, %low; .reg .pred %p;
        mov.u32 %lane, %laneid; and.b32 %low, %lane, 1; setp.eq.u32 %p, %low, 0;
        mov.b32 $d, 0;
        @%p bra EVEN;
        activemask.b32 $d;
        EVEN:
        bar.warp.sync 0xFFFFFFFF;
    """
    a = np.zeros(40, np.uint32)
    expected = np.where(np.arange(40) % 2, np.where(np.arange(40) < 32, 0xAAAAAAAA, 0xAA), 0)
    np.testing.assert_array_equal(evaluate(active, "u32", ("u32", a)), expected)
    ballots = evaluate("vote.sync.ballot.b32 $d, 1, -1;", "b32", ("u32", a))
    np.testing.assert_array_equal(ballots, np.where(np.arange(40) < 32, 2**32 - 1, 0xFF))


WARP_BODY = """
    .reg .b32 %i, %r; .reg .pred %p; .reg .b64 %a;
    mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; mad.wide.u32 %a, %i, 4, %a; mov.u32 %r, 7;
    setp.ge.u32 %p, %i, 16;
"""


@pytest.mark.parametrize("leave", ["exit", "bra DONE", "bra THERE"])
def test_exited_lanes_are_not_waited_for(leave: str) -> None:
    x = np.zeros(32, np.uint32)
    vote = "vote.sync.ballot.b32 %r, 1, -1; st.global.u32 [%a], %r; bra DONE;"
    launch(entry(WARP_BODY + f"@%p {leave}; {vote} THERE: bra DONE; DONE: ret;", ["u64"]), [x])
    np.testing.assert_array_equal(x, np.where(np.arange(32) < 16, 0xFFFF, 0))


@pytest.mark.parametrize(
    "instruction", ["vote.sync.ballot.b32 %r, 1, -1;", "shfl.sync.idx.b32 %r, %r, 0, 31, -1;", "bar.warp.sync -1;"]
)
def test_a_lane_missing_from_the_membermask_is_a_fault(instruction: str) -> None:
    x = np.zeros(32, np.uint32)
    text = entry(WARP_BODY + f"@%p bra DONE; {instruction} DONE: st.global.u32 [%a], %r;", ["u64"])
    with faults(f"lanes named in the membermask never come here, by thread 0 of block 0, at: {instruction[:8]}"):
        launch(text, [x])
    launch(text.replace("-1;", "0xFFFF;"), [x])


def test_lanes_wait_for_those_that_come_later() -> None:
    """Lanes that continue early reach the vote, at a lower program counter, before the rest of the loop has run."""
    body = (
        WARP_BODY
        + """
        .reg .b32 %k, %v, %sum; .reg .pred %q, %more;
        mov.u32 %k, 0; mov.u32 %sum, 0;
        LOOP:
        mov.u32 %v, 0;
        vote.sync.ballot.b32 %v, 1, -1;
        popc.b32 %v, %v;
        add.u32 %sum, %sum, %v;
        add.u32 %k, %k, 1;
        setp.gt.u32 %more, %k, 3;
        @%more bra DONE;
        @%p bra LOOP;
        add.u32 %sum, %sum, 1000;
        bra LOOP;
        DONE: st.global.u32 [%a], %sum;
    """
    )
    text = entry(body, ["u64"])
    x = np.zeros(32, np.uint32)
    counts = launch(text, [x])
    np.testing.assert_array_equal(x, 4 * 32 + np.where(np.arange(32) < 16, 3000, 0))
    assert counts["vote.sync.ballot.b32"] == 4
    assert counts["mov.u32"] == 4 + 1 + 2 * 3  # together once, then those who wait and those who come


def test_a_lane_outside_its_own_membermask_is_a_fault() -> None:
    text = entry(WARP_BODY + "vote.sync.ballot.b32 %r, 1, 0xFFFF;", ["u64"])
    with faults("lane not in its own membermask, by thread 16"):
        launch(text, [np.zeros(32, np.uint32)])


def test_different_membermasks_that_overlap_are_a_fault() -> None:
    text = entry(WARP_BODY + "selp.b32 %r, 0xFFFFFFFF, 0x1FFFF, %p; vote.sync.ballot.b32 %r, 1, %r;", ["u64"])
    with faults("lanes with different membermasks"):
        launch(text, [np.zeros(32, np.uint32)])


def test_reading_a_lane_that_is_not_there_is_a_fault() -> None:
    text = entry(WARP_BODY + "shfl.sync.idx.b32 %r, %r, 31, 31, -1;", ["u64"])
    launch(text, [np.zeros(32, np.uint32)])
    with faults("reads lane 31, which is not there, by thread 0"):
        launch(text, [np.zeros(32, np.uint32)], threads=31)
    halves = "selp.b32 %r, 0xFFFF0000, 0xFFFF, %p; shfl.sync.bfly.b32 %i, %i, LANES, 31, %r;"
    launch(entry(WARP_BODY + halves.replace("LANES", "15"), ["u64"]), [np.zeros(32, np.uint32)])
    with faults("reads lane 16, which is not there, by thread 0"):
        launch(entry(WARP_BODY + halves.replace("LANES", "16"), ["u64"]), [np.zeros(32, np.uint32)])


# Threads write a word of their block's memory each, and read that of the one as far from the end.
SHARED_BODY = """
.shared .align 8 .b8 before[8];
.shared .align 4 .b8 tile[256];
.reg .b32 %i, %n, %r; .reg .b64 %a, %at, %w; .reg .pred %p;
ld.param.u64 %a, [p0];
mov.u32 %i, %tid.x;
mov.u32 %n, %ntid.x;
setp.ge.u32 %p, %i, 32;
mul.wide.u32 %w, %i, 4;
mov.u64 %at, tile;
add.u64 %at, %at, %w;
st.shared.u32 [%at], %i;
WAIT
sub.u32 %r, %n, %i;
mul.wide.u32 %w, %r, 4;
mov.u64 %at, tile;
add.u64 %at, %at, %w;
ld.shared.u32 %r, [%at+-4];
mov.u32 %n, %ctaid.x;
mad.lo.u32 %i, %n, 64, %i;
mul.wide.u32 %w, %i, 4;
add.u64 %a, %a, %w;
st.global.u32 [%a], %r;
ret;
"""


def shared(wait: str) -> str:
    return entry(SHARED_BODY.replace("WAIT", wait), ["u64"])


def test_blocks_share_memory_of_their_own() -> None:
    out = np.zeros(3 * 64, np.uint32)
    executed = launch(shared("bar.sync 0;"), [out], blocks=3, threads=64)
    assert out.reshape(3, 64).tolist() == [list(range(63, -1, -1))] * 3
    assert executed["bar.sync"] == 3 * 2


@pytest.mark.parametrize("wait", ["", "bar.warp.sync -1;"], ids=["nothing", "a warp"])
def test_shared_memory_without_a_barrier_is_a_race(wait: str) -> None:
    with races("which thread .* of block 0 accessed"):
        launch(shared(wait), [np.zeros(64, np.uint32)], threads=64)


def test_what_a_barrier_separates_is_no_race() -> None:
    again = "bar.sync 0; ld.shared.u32 %r, [tile]; bar.sync 0; st.shared.u32 [%at], %i; bar.sync 0;"
    out = np.zeros(64, np.uint32)
    launch(shared(again), [out], threads=64)
    assert out.tolist() == list(range(63, -1, -1))
    with races("which several threads accessed"):
        launch(shared(again.replace("bar.sync 0; st", "st")), [out], threads=64)


def test_threads_missing_from_a_barrier_are_a_fault() -> None:
    with faults("threads of the block never come here, by thread 32 of block 0, at: @%p bar"):
        launch(shared("@%p bar.sync 0;"), [np.zeros(64, np.uint32)], threads=64, races=False)


@pytest.mark.parametrize("offset", [-12, 256], ids=["below", "above"])
def test_shared_memory_ends(offset: int) -> None:
    with faults("outside of the memory allowed"):
        launch(shared(f"ld.shared.u32 %r, [tile+{offset}];"), [np.zeros(32, np.uint32)])


def test_division_by_zero_is_a_fault() -> None:
    with faults(r"division by zero, by thread 2 of block 0, at: div\.u32 %d, %a, %b;"):
        evaluate(
            "div.u32 $d, $a, $b;",
            "u32",
            ("u32", np.arange(4, dtype=np.uint32)),
            ("u32", np.array([1, 1, 0, 1], np.uint32)),
        )


def test_trap_is_a_fault() -> None:
    with faults("trap, by thread 16 of block 0"):
        launch(entry(WARP_BODY + "@%p trap;", ["u64"]), [np.zeros(32, np.uint32)])


@pytest.mark.parametrize(
    "line",
    [
        "sin.approx.f32 %f0, %f1;",
        "add.sat.s32 %r0, %r1, %r2;",
        "add.rz.f32 %f0, %f1, %f2;",
        "add.s32 %r0, %rd1, %r2;",
        "add.s32 %r0, %r1;",
        "add.s32 %r0, %unknown, %r2;",
        "add.s32 %r0, %f1, %p0;",
        "cvt.f32.f64 %f0, %d0;",
        "cvt.rz.f16.f32 %h0, %f0;",
        "cvt.rn.satfinite.bf16x2.f32 %r0, %f0, %f1;",
        "cvt.sat.f32.f32 %f0, %f1;",
        "setp.ltu.s32 %p0, %r0, %r1;",
        "setp.lo.s32 %p0, %r0, %r1;",
        "ld.shared.u32 %r0, [%r1];",
        "ld.local.u32 %r0, [%rd1];",
        "ld.global.u32 %r0, [somewhere];",
        "ld.global.f32 %rd0, [%rd1];",
        "st.global.f32 [%rd1], %rd0;",
        "ld.param.u32 %r0, [somewhere];",
        "ld.global.v4.u64 {%rd0, %rd1, %rd2}, [%rd3];",
        "atom.global.add.u32 %r0, [%rd0], 1;",
        "bar.sync 1;",
        "barrier.sync 0;",
        "mov.u64 %rd0, somewhere;",
        "mov.u32 %tid.x, %r0;",
        "call (%r0), callee, (%r1);",
        "bra nowhere;",
        ".local .align 8 .b8 __local_depot0[16];",
        ".shared .align 4 .b32 tile[4];",
    ],
)
def test_what_is_not_known_is_named(line: str) -> None:
    declared = ".reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .f32 %f<4>; .reg .f64 %d<4>; .reg .b16 %h<4>; .reg .pred %p<4>;"
    with pytest.raises(ptx.Unsupported) as error:
        ptx.Machine([]).launch(entry(f"{declared} {line} ret;"), 1, 32, b"")
    assert line in str(error.value)


def test_one_entry_is_expected() -> None:
    with pytest.raises(ptx.Unsupported, match=r"one \.entry is expected, not 2"):
        ptx.Machine([]).launch(entry("ret;") + entry("ret;", name="other"), 1, 32, b"")


# ---- kernels that Numba compiles ----

HAVE_NUMBA_CUDA = importlib.util.find_spec("numba_cuda") is not None
compiled = pytest.mark.skipif(not HAVE_NUMBA_CUDA, reason="numba-cuda is not installed")

if HAVE_NUMBA_CUDA:
    from llvmlite import ir
    from numba import cuda, types
    from numba.core.extending import intrinsic

    I32, F32 = ir.IntType(32), ir.FloatType()
    VECTOR = ir.VectorType(I32, 4)

    def defined(returns: Any, parameters: Sequence[Any], emit: Callable[..., Any]) -> Any:
        """An intrinsic; ``emit(builder, *values)`` returns its value, a list for a tuple."""

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            value = emit(builder, *values)
            return context.make_tuple(builder, returns, value) if isinstance(value, list) else value

        def typed(*_: Any) -> Any:
            return returns(*parameters), codegen

        forms = {
            1: lambda typingctx, a: typed(),
            2: lambda typingctx, a, b: typed(),
            5: lambda typingctx, a, b, c, d, e: typed(),
        }
        return intrinsic(forms[len(parameters)])

    def emit_load(builder: Any, address: Any) -> list[Any]:
        loaded = builder.load(builder.inttoptr(address, ir.PointerType(VECTOR, 1)), align=16)
        return [builder.extract_element(loaded, I32(i)) for i in range(4)]

    def emit_store(builder: Any, address: Any, *values: Any) -> None:
        vector = ir.Constant(VECTOR, ir.Undefined)
        for i, value in enumerate(values):
            vector = builder.insert_element(vector, value, I32(i))
        builder.store(vector, builder.inttoptr(address, ir.PointerType(VECTOR, 1)), align=16)

    def assembly(text: str, returns: Any, operands: Sequence[Any], constraints: str) -> Callable[..., Any]:
        function = ir.FunctionType(returns, operands)
        return lambda builder, *values: builder.call(ir.InlineAsm(function, text, constraints), values)

    load_16_bytes = defined(types.UniTuple(types.uint32, 4), [types.uint64], emit_load)
    store_16_bytes = defined(types.void, [types.uint64, *[types.uint32] * 4], emit_store)
    narrow_pair = defined(
        types.uint32,
        [types.float32, types.float32],
        assembly("cvt.rn.bf16x2.f32 $0, $2, $1;", I32, [F32, F32], "=r,f,f"),
    )
    scoped = defined(
        types.uint32,
        [types.uint32],
        assembly("{ .reg .b32 t; not.b32 t, $1; shl.b32 t, t, 1; xor.b32 $0, t, $1; }", I32, [I32], "=r,r"),
    )


def compile_kernel(kernel: Callable[..., Any], *parameters: Any) -> str:
    text, _ = cuda.compile_ptx(kernel, types.void(*parameters), cc=(9, 0))
    return str(text)


def of_array(array: Array) -> bytes:
    """An array as Numba's kernels take it: meminfo, parent, size, item size, data, shape, strides."""
    fields = (0, 0, array.size, array.itemsize, array.ctypes.data, *array.shape, *array.strides)
    return struct.pack(f"<{len(fields)}q", *fields)


def run_compiled(kernel: Callable[..., Any], arrays: Sequence[Array], threads: int = 128, **options: Any) -> Any:
    """A kernel of one-dimensional arrays, at least as many threads as the last has elements."""
    kinds = [types.Array(getattr(types, array.dtype.name), 1, "C") for array in arrays]
    blocks = -(-len(arrays[-1]) // threads)
    parameters = b"".join(map(of_array, arrays))
    return ptx.Machine(arrays, **options).launch(compile_kernel(kernel, *kinds), blocks, threads, parameters)


@compiled
def test_compiled_philox() -> None:
    u, mask, half = np.uint64, np.uint64(0xFFFFFFFF), np.uint64(32)
    m0, m1, w0, w1 = u(0xD2511F53), u(0xCD9E8D57), u(0x9E3779B9), u(0xBB67AE85)

    def kernel(words, k0, k1):  # type: ignore[no-untyped-def]
        i = u(cuda.grid(1))
        if i < u(words.size) // u(4):
            c0, c1, c2, c3 = i * u(0x9E3779B97F4A7C15) & mask, i, u(7), ~i & mask
            for _ in range(10):
                p0, p1 = m0 * c0, m1 * c2
                c0, c1 = (p1 >> half) ^ c1 ^ k0, p1 & mask
                c2, c3 = (p0 >> half) ^ c3 ^ k1, p0 & mask
                k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
            words[u(4) * i], words[u(4) * i + u(1)] = c0, c1
            words[u(4) * i + u(2)], words[u(4) * i + u(3)] = c2, c3

    n, key = 5000, (0x12345678, 0x9ABCDEF0)
    words = np.zeros(4 * n, np.uint32)
    text = compile_kernel(kernel, types.uint32[::1], types.uint64, types.uint64)
    ptx.Machine([words]).launch(text, 40, 128, of_array(words) + struct.pack("<2Q", *key))
    i = np.arange(n, dtype=np.uint64)
    first = (i * u(0x9E3779B97F4A7C15) & mask).astype(np.uint32)
    low = i.astype(np.uint32)
    expected = philox4x32_10((first, low, np.uint32(7), ~low), key)
    np.testing.assert_array_equal(words.reshape(n, 4), np.stack(expected, axis=1))


@compiled
def test_compiled_divergent_while_loop() -> None:
    def kernel(starts, steps):  # type: ignore[no-untyped-def]
        i = cuda.grid(1)
        if i < starts.size:
            n, k = starts[i], 0
            while n != 1:
                if n & 1:
                    n = 3 * n + 1
                else:
                    n //= 2
                k += 1
            steps[i] = k

    starts = np.arange(1, 701, dtype=np.int64)
    steps = np.zeros(700, np.int64)
    counts = run_compiled(kernel, [starts, steps])
    np.testing.assert_array_equal(steps, [collatz_steps(int(n)) for n in starts])
    assert counts.total() > 22 * 100


@compiled
def test_compiled_shuffles_and_votes() -> None:
    def kernel(x, sums, ballots, flags):  # type: ignore[no-untyped-def]
        i = cuda.grid(1)
        value = x[i]
        step = 16
        while step:
            value += cuda.shfl_xor_sync(-1, value, step)
            step //= 2
        sums[i] = (
            value + cuda.shfl_down_sync(-1, x[i], 1) - cuda.shfl_up_sync(-1, x[i], 1) + cuda.shfl_sync(-1, x[i], 5)
        )
        ballots[i] = cuda.ballot_sync(-1, x[i] & 1)
        flags[i] = 2 * cuda.any_sync(-1, x[i] > 90) + cuda.all_sync(-1, x[i] > 2)

    x = np.random.default_rng(RNG_SEED).integers(0, 100, (24, 32), dtype=np.int32)
    sums, ballots, flags = np.zeros(768, np.int32), np.zeros(768, np.uint32), np.zeros(768, np.int32)
    run_compiled(kernel, [x.ravel(), sums, ballots, flags])
    after, before = np.hstack([x[:, 1:], x[:, -1:]]), np.hstack([x[:, :1], x[:, :-1]])
    np.testing.assert_array_equal(sums.reshape(x.shape), x.sum(axis=1, keepdims=True) + after - before + x[:, 5:6])
    np.testing.assert_array_equal(ballots, np.packbits(x & 1, axis=1, bitorder="little").view(np.uint32).repeat(32))
    np.testing.assert_array_equal(flags, (2 * (x > 90).any(axis=1) + (x > 2).all(axis=1)).repeat(32))


@compiled
def test_compiled_loads_and_stores_of_16_bytes() -> None:
    def kernel(x, y, n):  # type: ignore[no-untyped-def]
        i = np.uint64(cuda.grid(1))
        if i < n:
            a, b, c, d = load_16_bytes(x + np.uint64(16) * i)
            store_16_bytes(y + np.uint64(16) * i, d, c, b, a)

    text = compile_kernel(kernel, *[types.uint64] * 3)
    assert "ld.global.v4" in text
    assert "st.global.v4" in text
    n = 1000
    x, y = aligned(4 * n, np.uint32), aligned(4 * n, np.uint32)
    x[:] = samples("u32", n=4 * n)
    parameters = struct.pack("<3Q", x.ctypes.data, y.ctypes.data, n)
    counts = ptx.Machine([x, y]).launch(text, 8, 128, parameters)
    np.testing.assert_array_equal(y.reshape(n, 4), x.reshape(n, 4)[:, ::-1])
    assert [times for opcode, times in counts.items() if ".v4" in opcode] == [32, 32]
    for start, off, what in ((x, 4, "misaligned"), (x, 16, "outside")):
        parameters = struct.pack("<3Q", start.ctypes.data + off, y.ctypes.data, n)
        with faults(what):
            ptx.Machine([x, y]).launch(text, 8, 128, parameters)


@compiled
def test_compiled_inline_assembly() -> None:
    def kernel(a, b, pairs, words):  # type: ignore[no-untyped-def]
        i = cuda.grid(1)
        if i < pairs.size:
            pairs[i] = narrow_pair(a[i], b[i])
            words[i] = scoped(scoped(pairs[i]))

    a, b = samples("f32"), samples("f32", 1)
    pairs, words = np.zeros(N, np.uint32), np.zeros(N, np.uint32)
    run_compiled(kernel, [a, b, pairs, words])
    low, high = (evaluate("cvt.rn.bf16.f32 $d, $a;", "b16", ("f32", values)) for values in (a, b))
    np.testing.assert_array_equal(pairs, low.astype(np.uint32) | high.astype(np.uint32) << 16)
    once = (~pairs << 1) ^ pairs
    np.testing.assert_array_equal(words, (~once << 1) ^ once)


@compiled
def test_compiled_widening_of_every_float16() -> None:
    def kernel(halves, wide):  # type: ignore[no-untyped-def]
        i = cuda.grid(1)
        if i < halves.size:
            wide[i] = np.float32(halves[i])

    halves, wide = EVERY_HALF.view(np.float16), np.zeros(2**16, np.float32)
    run_compiled(kernel, [halves, wide])
    same_bits(wide, canonical(halves.astype(np.float32)))


@compiled
@pytest.mark.parametrize("type", ["f32", "f64"])
def test_compiled_float_arithmetic(type: str) -> None:
    def kernel(a, b, added, multiplied, divided):  # type: ignore[no-untyped-def]
        i = cuda.grid(1)
        if i < added.size:
            added[i] = a[i] + b[i]
            multiplied[i] = a[i] * b[i]
            divided[i] = a[i] / b[i]

    a, b = samples(type, n=20_000), samples(type, 1, n=20_000)
    results = [np.zeros_like(a) for _ in range(3)]
    run_compiled(kernel, [a, b, *results])
    with np.errstate(all="ignore"):
        expected = a + b, a * b, a / b
    for result, exact in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, exact)
        if type == "f32":
            same_bits(result, canonical(exact))


@compiled
def test_compiled_faults_and_races() -> None:
    def kernel(x, y):  # type: ignore[no-untyped-def]
        i = cuda.grid(1)
        y[i // 2] = x[i]

    x, y = np.zeros(256, np.float32), np.zeros(256, np.float32)
    with races("writes"):
        run_compiled(kernel, [x, y])
    run_compiled(kernel, [x, y], races=False)
    with faults("outside"):
        run_compiled(kernel, [x[:100], y], races=False)
    y.flags.writeable = False
    with faults("read-only"):
        run_compiled(kernel, [x, y], races=False)


@compiled
def test_compiled_lane_missing_from_the_membermask() -> None:
    def kernel(x):  # type: ignore[no-untyped-def]
        i = cuda.grid(1)
        if x[i] > 3:
            x[i] = cuda.shfl_sync(-1, x[i], 0)
        x[i] += 1

    with faults("lanes named in the membermask never come here"):
        run_compiled(kernel, [np.arange(32, dtype=np.int32)], threads=32)

"""Runs PTX that is written in a test: one instruction on arrays, or a whole kernel.

`evaluate` puts an instruction into a kernel that applies it to an element per thread. Where ptxas is installed, the
fixture `assembled` has it check that what was run is PTX.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from . import ptx

Array = NDArray[Any]

RNG_SEED = 20
N = 1000
ARCHITECTURE = "sm_90"
TYPES = [f"{kind}{bits}" for bits in (16, 32, 64) for kind in "us"]
BITS = ("b16", "b32", "b64")


def bits_of(type: str) -> int:
    return 8 * ptx.DTYPES[type].itemsize


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


def same_bits(a: Array, b: Array) -> None:
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))

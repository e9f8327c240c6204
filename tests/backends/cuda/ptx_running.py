"""Runs PTX that is written in a test: one instruction on arrays, or a whole kernel.

`evaluate` puts an instruction into a kernel that applies it to an element per thread.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import ptx

Array = NDArray[Any]

N = 1000


def bits_of(type: str) -> int:
    return 8 * ptx.DTYPES[type].itemsize


def entry(body: str, parameters: Sequence[str] = (), name: str = "kernel") -> str:
    """PTX of a kernel; parameters are declared as given, named p0, p1 and on."""
    declared = ", ".join(f".param .{type} p{i}" for i, type in enumerate(parameters))
    return f".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry {name}({declared})\n{{\n{body}\n}}\n"


def program(instruction: str, result: str, operands: Sequence[str]) -> str:
    """A kernel that applies an instruction on $d, $a, $b, $c to an element per thread; predicates are held as u32."""
    lines = [".reg .b32 %i, %t, %block;", ".reg .b64 %wide, %at, %out;"]
    lines += ["mov.u32 %i, %tid.x;", "mov.u32 %t, %ntid.x;", "mov.u32 %block, %ctaid.x;"]
    lines += ["mul.lo.s32 %t, %block, %t;", "add.s32 %i, %t, %i;"]
    for i, (letter, type) in enumerate(zip("dabc", (result, *operands), strict=False)):
        held = memory_type(type)
        register = "pred" if type == "pred" else type if type in ("f32", "f64") else f"b{bits_of(type)}"
        lines += [f".reg .{register} %{letter};", f"mul.wide.u32 %wide, %i, {bits_of(held) // 8};"]
        lines += [f"ld.param.u64 %at, [p{i}];", "add.s64 %at, %at, %wide;"]
        if letter == "d":
            lines += ["mov.u64 %out, %at;"]
        elif type == "pred":
            lines += ["ld.global.u32 %t, [%at];", f"setp.ne.s32 %{letter}, %t, 0;"]
        else:
            lines += [f"ld.global.{held} %{letter}, [%at];"]
    for letter in "dabc":
        instruction = instruction.replace(f"${letter}", f"%{letter}")
    lines += [instruction, "selp.u32 %t, 1, 0, %d;" if result == "pred" else ""]
    lines += [f"st.global.{memory_type(result)} [%out], {'%t' if result == 'pred' else '%d'};", "ret;"]
    return entry("\n".join(lines), ["u64"] * (1 + len(operands)))


def memory_type(type: str) -> str:
    return "u32" if type == "pred" else type.replace("s", "u").replace("f16", "b16")


def evaluate(instruction: str, result: str, *operands: tuple[str, Array], threads: int = 250) -> Array:
    """The instruction's result for each element; of at most so many threads per block as divide them."""
    text = program(instruction, result, [type for type, _ in operands])
    arrays = [np.ascontiguousarray(values, np.uint32 if type == "pred" else None) for type, values in operands]
    n = len(arrays[0])
    out = np.zeros(n, np.uint32 if result == "pred" else ptx.DTYPES[result])
    threads = next(count for count in range(threads, 0, -1) if n % count == 0)
    launch(text, [out, *arrays], blocks=n // threads, threads=threads)
    return out.astype(bool) if result == "pred" else out


def launch(text: str, arrays: Sequence[Array], blocks: int = 1, threads: int = 32, **options: Any) -> Any:
    """Runs a kernel whose parameters are these arrays' addresses."""
    parameters = b"".join(struct.pack("<Q", array.ctypes.data) for array in arrays)
    return ptx.Machine(arrays, **options).launch(text, blocks, threads, parameters)


def aligned(n: int, dtype: Any) -> Array:
    """Zeros at a multiple of 16 bytes."""
    raw = np.zeros(n * np.dtype(dtype).itemsize + 16, np.uint8)
    start = -raw.ctypes.data % 16
    return raw[start : start + n * np.dtype(dtype).itemsize].view(dtype)


def samples(type: str, seed: int = 20, n: int = N) -> Array:
    """Random bits of every magnitude, after the values where things change."""
    rng = np.random.default_rng(seed)
    if type == "pred":
        return rng.integers(0, 2, n).astype(bool)
    width, dtype = bits_of(type), ptx.DTYPES[type]
    bits = rng.integers(0, 2**64, n, dtype=np.uint64)
    if dtype.kind == "f":
        special = np.array([0, 1, 1.5, 2.5, np.inf, np.nan, np.finfo(dtype).tiny, np.finfo(dtype).max, 1e-45], dtype)
        special = np.concatenate([special, -special]).view(f"u{width // 8}")
    else:
        bits >>= rng.integers(0, width, n, dtype=np.uint64)
        special = np.array([0, 1, 2, 2 ** (width - 1) - 1, 2 ** (width - 1), 2**width - 1], f"u{width // 8}")
    bits = (bits & np.uint64(2**width - 1)).astype(special.dtype)
    bits[: n // 4] = rng.permutation(np.resize(special, n // 4))
    return bits.view(dtype)


def same_bits(a: Array, b: Array) -> None:
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))

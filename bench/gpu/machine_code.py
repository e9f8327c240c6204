"""Compiles the CUDA kernels for three GPUs and tables their machine code: `make cuda-report`.

It needs no GPU and no driver: the linker is the one that fastdrop itself uses. For each kernel the table has the
registers of a thread, bytes spilled to local memory, bytes of stack, the widest load from and store to global memory
in bytes, and the number of instructions. Look at it before and after you change a kernel.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from fastdrop.backends.cuda import compile
from fastdrop.backends.cuda.compile import Capability, Variant
from fastdrop.core.activations import ACTIVATIONS, GELU, NONE, RELU, SILU
from fastdrop.core.checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from fastdrop.core.installing import how_to_install

CAPABILITIES: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0))
DTYPES = ("float32", "float64", "float16", "bfloat16")

VARIANTS = (
    Variant("draw_words"),
    Variant("draw_rows"),
    *(Variant("elementwise", dtype, form) for form in ("drawn", "stored") for dtype in range(4)),
    Variant("elementwise", FLOAT32, "drawn_shifted"),
    *(Variant("elementwise", FLOAT32, form, plain=False) for form in ("drawn", "drawn_shifted", "stored")),
    *(Variant("strided", dtype, form) for form in ("wide", "narrow") for dtype in (FLOAT32, BFLOAT16)),
    *(Variant("strided", FLOAT32, form, plain=False) for form in ("wide", "narrow")),
    Variant("elementwise", FLOAT32, "stored", counted=True),
    *(Variant("strided", FLOAT32, form, counted=True) for form in ("wide", "narrow")),
    *(Variant("gaussian_multiply", dtype) for dtype in range(4)),
    Variant("dilate_bits"),
    Variant("count_bits"),
)
BITS_ALONE = ("draw_rows", "dilate_bits", "count_bits")

# Of each kernel on rows what is likely to be called most, and what takes the most registers.
ROWS = (
    *(Variant("pointwise_forward", BFLOAT16, residual_dtype=BFLOAT16, activation=code) for code in (NONE, RELU, GELU)),
    Variant("pointwise_forward", FLOAT32, residual_dtype=FLOAT32, activation=GELU),
    *(Variant("pointwise_backward", dtype, residual_dtype=dtype, activation=SILU) for dtype in (FLOAT32, BFLOAT16)),
    Variant("pointwise_columns", BFLOAT16, "wide", residual_dtype=FLOAT32, activation=GELU),
    *(Variant("norm_forward", dtype, "wide", residual_dtype=FLOAT32) for dtype in (FLOAT32, BFLOAT16)),
    *(Variant("norm_backward", dtype, "wide", residual_dtype=FLOAT32) for dtype in (FLOAT32, BFLOAT16)),
    Variant("norm_backward", FLOAT64, "wide", residual_dtype=FLOAT64),
    Variant("norm_columns", BFLOAT16, "wide", residual_dtype=BFLOAT16),
    Variant("add_panels", FLOAT32, "narrow"),
    *(Variant("softmax_forward", dtype, "wide", residual_dtype=dtype) for dtype in (FLOAT32, BFLOAT16)),
    Variant("softmax_backward", FLOAT16, "wide", residual_dtype=FLOAT16),
)
CURVES = {code: name for name, code in ACTIVATIONS.items()}


# ---- tools ----


def tool(name: str) -> Path | None:
    """An NVIDIA program: on PATH, in CUDA's folder, or in one of NVIDIA's Python packages."""
    found = shutil.which(name)
    if found:
        return Path(found)
    folders = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        folders += sorted(Path(root).glob("*/bin"), reverse=True)
    return next((folder / name for folder in folders if os.access(folder / name, os.X_OK)), None)


def disassembler() -> Path | None:
    """nvdisasm, otherwise cuobjdump."""
    return tool("nvdisasm") or tool("cuobjdump")


def missing() -> str | None:
    """What is to be installed before anything can be compiled and read, in one sentence; None if all is there."""
    for package in ("numba_cuda", "cuda.bindings.nvjitlink"):
        try:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: {how_to_install('cuda')}"
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed: {how_to_install('cuda')}"
    if not disassembler():
        return "neither nvdisasm nor cuobjdump is at hand: pip install nvidia-cuda-nvdisasm"
    return None


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout + done.stderr


# ---- machine code ----


# Records of a cubin's `.nv.info` sections, by the names that NVIDIA's tools print: EIFMT_SVAL; EIATTR_FRAME_SIZE and
# EIATTR_REGCOUNT, of any function, in `.nv.info`; EIATTR_KPARAM_INFO in `.nv.info.<kernel>`.
_SIZED, _FRAME_SIZE, _PARAMETER, _REGISTERS = 0x04, 0x11, 0x17, 0x2F


@dataclass(frozen=True)
class Cubin:
    """What a cubin of one kernel says of itself. ``parameters``: (offset, size) in bytes; the most of any function."""

    kernel: str
    parameters: list[tuple[int, int]]
    registers: int
    stack: int

    @classmethod
    def read(cls, code: bytes) -> Cubin:
        at = struct.unpack_from("<Q", code, 0x28)[0]
        size, count, names = struct.unpack_from("<HHH", code, 0x3A)
        sections = [struct.unpack_from("<IIQQQQ", code, at + i * size) for i in range(count)]
        text = sections[names][4]
        found: dict[int, int] = defaultdict(int)
        parameters: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        for name, _, _, _, start, length in sections:
            title = code[text + name : code.index(b"\0", text + name)].decode()
            if title == ".nv.info":
                for kind, record in _records(code, start, start + length):
                    if kind in (_FRAME_SIZE, _REGISTERS):
                        found[kind] = max(found[kind], struct.unpack("<II", record)[1])
            elif title.startswith(".nv.info."):
                for kind, record in _records(code, start, start + length):
                    if kind == _PARAMETER:
                        _, ordinal, offset, packed = struct.unpack("<IHHI", record)
                        parameters[title.removeprefix(".nv.info.")].append((ordinal, offset, packed >> 18))
        if len(parameters) != 1 or not found[_REGISTERS]:
            raise ValueError(f"this is no cubin of one kernel: {sorted(parameters)}")
        ((kernel, of_kernel),) = parameters.items()
        laid_out = [(offset, size) for _, offset, size in sorted(of_kernel)]
        return cls(kernel, laid_out, found[_REGISTERS], found[_FRAME_SIZE])


def _records(code: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    while at < end:
        form, kind, size = struct.unpack_from("<BBH", code, at)
        at += 4
        if form == _SIZED:
            yield kind, code[at : at + size]
            at += size


class Instruction(NamedTuple):
    opcode: str
    operands: str = ""

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_ENTRY = re.compile(r"\s*\.section\s+\.text\.([\w$.]+)|\s*Function : ([\w$.]+)")


def parse(text: str, entry: str) -> list[Instruction]:
    """The instructions of one function in what nvdisasm -c or cuobjdump -sass printed."""
    result, inside = [], False
    for line in text.splitlines():
        if section := _ENTRY.match(line):
            inside = entry in section.groups()
        elif inside and (found := _LINE.match(line)):
            result.append(Instruction(*found.groups()))
    if not result:
        raise ValueError(f"no function {entry} in the listing")
    return result


def _access_bytes(opcode: str) -> int:
    """Of a load or store: LDG.E.128 accesses 16."""
    parts = opcode.split(".")
    for part in parts[1:]:
        if part in ("U8", "S8"):
            return 1
        if part in ("U16", "S16"):
            return 2
        if part in ("64", "128", "256"):
            return int(part) // 8
    return 4


def widest(code: Iterable[Instruction], name: str) -> int:
    """Bytes of the widest access of a kind (LDG, STG, ...); 0 if there is none."""
    return max((_access_bytes(one.opcode) for one in code if one.name == name), default=0)


# ---- kernels ----


@dataclass(frozen=True)
class Code:
    """A kernel's machine code."""

    variant: Variant
    cc: Capability
    cubin: Cubin
    listing: list[Instruction] = field(repr=False)

    @property
    def spilled(self) -> int:
        """Bytes that the code's accesses to local memory store and load."""
        return sum(_access_bytes(one.opcode) for one in self.listing if one.name in ("STL", "LDL"))

    @property
    def load(self) -> int:
        """Bytes of the widest load from global memory."""
        return widest(self.listing, "LDG")

    @property
    def store(self) -> int:
        return widest(self.listing, "STG")


def linked(variant: Variant, cc: Capability) -> Code:
    """As fastdrop itself loads it."""
    program = disassembler()
    if program is None:
        raise RuntimeError(missing())
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, FASTDROP_CACHE_DIR=folder):
        image = compile.image(variant, cc)[1]
        file = Path(folder, "kernel.cubin")
        file.write_bytes(image)
        text = _run([program, "-c" if program.stem == "nvdisasm" else "-sass", file])
    cubin = Cubin.read(image)
    return Code(variant, cc, cubin, parse(text, cubin.kernel))


# ---- the report ----


def name(variant: Variant) -> str:
    """As the table has it."""
    if variant.body in ("draw_words", *BITS_ALONE):
        return variant.body
    form = f" {variant.form.replace('_', ' ')}" if variant.form else ""
    if variant.on_rows:
        stream = f" on {DTYPES[variant.residual_dtype]}" if variant.residual_dtype != variant.dtype else ""
        last = f"{stream}, {CURVES[variant.activation]}" if variant.activation else stream
    else:
        last = ", affine" * (not variant.plain) + ", scale of a count" * variant.counted
    return f"{variant.body}{form}, {DTYPES[variant.dtype]}{last}"


def report(codes: Sequence[Code], linker: str) -> str:
    lines = [
        "# CUDA kernels, as compiled",
        "",
        f"Compiled by {linker}, without a GPU: nothing here is a time. Spills, stack and the widest accesses to global "
        "memory are in bytes.",
    ]
    for cc in CAPABILITIES:
        lines += ["", f"## Compute capability {cc[0]}.{cc[1]}", ""]
        lines += [
            "| kernel | registers | spilled | stack | load | store | instructions |",
            "|---|---|---|---|---|---|---|",
        ]
        for code in (code for code in codes if code.cc == cc):
            cells = code.cubin.registers, code.spilled, code.cubin.stack, code.load, code.store, len(code.listing)
            lines.append(f"| {name(code.variant)} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results/cuda_code.md"))
    output: Path = parser.parse_args(arguments).output
    lacking = missing()
    if lacking:
        print(lacking)
        return 1
    codes = [linked(variant, cc) for cc in CAPABILITIES for variant in (*VARIANTS, *ROWS)]
    text = report(codes, f"nvJitLink {metadata.version('nvidia-nvjitlink')}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(f"{text}\nwrote {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

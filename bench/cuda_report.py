"""What the CUDA kernels compile to: python -m bench.cuda_report [--output TABLE.md]. Needs no GPU and no driver.

Each kernel goes through the assemblers that are at hand: the linker that fastdrop itself uses, and ``ptxas``. Counted
are registers, spills, the stack, the widest access to global memory and instructions per element; JSON goes beside the
table.

How instructions are counted. What a fast path executes is a loop: over tiles, or over a thread's vectors. Loops are
found in the control flow of the machine code (an edge back to an instruction that every way passes). Of a loop's
instructions those count that one pass executes: the cheapest way from its head back to it that stores what a full
pass stores and draws as often as the form does. So tails, code after the loop, and side paths for warps whose lanes
are apart (``BRA.DIV`` is taken to fall through) don't count. Instructions under a false predicate do: they are issued.
What works on bits alone, a word for 32 cells, has no such number. Nor have fused kernels on rows and columns: they go
over their data several times, in loops that the compiler unrolls and doubles for what may not be given.
``most`` is the dearest way instead, every branch taken for the worst: bits at any position, cells at any strides, and
all that may be given to a fused kernel.

A draw is a loop within. It counts as often as it is expected to run until 1,024 cells are decided (`expected_groups`),
each time as a whole, although the last pass leaves at the vote, a few instructions early. Elements are the bytes that
the path's widest stores write: a thread's instructions per element are what a warp issues for 32 elements.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from fastdrop.backends.cuda import compile
from fastdrop.backends.cuda.compile import Capability, Variant
from fastdrop.backends.cuda.tile import ITEM_BYTES, LANES, TILE_CELLS
from fastdrop.core.activations import ACTIVATIONS, GELU, NONE, RELU, SILU
from fastdrop.core.checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from fastdrop.core.random import PLANES_PER_GROUP, threshold

CAPABILITIES: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0))
DTYPES = ("float32", "float64", "float16", "bfloat16")
P = (0.1, 0.5)

VARIANTS = (
    Variant("draw_words"),
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
BITS_ALONE = ("dilate_bits", "count_bits")

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
FLAT = ("pointwise_forward", "pointwise_backward")
CURVES = {code: name for name, code in ACTIVATIONS.items()}


# ---- the chip ----


@dataclass(frozen=True)
class Chip:
    """``bandwidth`` in bytes per second, ``hertz`` of the SMs' clock, both at their highest."""

    name: str
    sms: int
    schedulers: int
    hertz: float
    bandwidth: float

    @property
    def issue(self) -> float:
        """Warp instructions per second."""
        return self.sms * self.schedulers * self.hertz


H100 = Chip("H100 SXM", sms=132, schedulers=4, hertz=1.7e9, bandwidth=3.35e12)  # bandwidth: NVIDIA's data sheet

# Pipes of 16 lanes per scheduler, which a warp takes for two cycles: CUDA's programming guide gives 64 results per SM
# and cycle, on compute capability 8.0 and 9.0, for integer multiplication, and for logic, shifts, integer addition and
# comparison. That a wide multiplication takes no longer than another is an assumption.
HALF_RATE_CYCLES = 2
MULTIPLIER = {"IMAD"}
LOGIC = {"LOP3", "PLOP3", "SHF", "IADD3", "LEA", "ISETP", "FSETP", "SEL", "FSEL", "PRMT", "R2P", "P2R", "VIADD", "F2FP"}


def bytes_per_element(item_bytes: int, bits: int = 1, arrays: int = 2) -> float:
    """Forward: an element read, one written, a bit written. Backward: the same, the bit read. Noise has no bits."""
    return arrays * item_bytes + bits / 8


@dataclass(frozen=True)
class Work:
    """Instructions of a thread, and those of them for each of the two half-rate pipes."""

    instructions: float = 0.0
    multiplier: float = 0.0
    logic: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.instructions + other.instructions, self.multiplier + other.multiplier, self.logic + other.logic
        )

    def __mul__(self, factor: float) -> Work:
        return Work(self.instructions * factor, self.multiplier * factor, self.logic * factor)


@dataclass(frozen=True)
class Budget:
    """What keeping up with memory takes of a chip.

    ``share``: of the instructions it can issue. ``pipe_share``: of what the busier of its half-rate pipes can take.
    """

    bytes_per_element: float
    elements_per_second: float
    instructions_per_element: float
    share: float
    pipe_share: float


def budget(item_bytes: int, per_element: Work, chip: Chip = H100, bits: int = 1, arrays: int = 2) -> Budget:
    """At the chip's full bandwidth."""
    moved = bytes_per_element(item_bytes, bits, arrays)
    rate = chip.bandwidth / moved
    warps = rate / LANES / chip.issue
    pipe = HALF_RATE_CYCLES * max(per_element.multiplier, per_element.logic)
    return Budget(moved, rate, per_element.instructions, per_element.instructions * warps, pipe * warps)


def groups(threshold: int) -> int:
    """Groups up to the one with the threshold's last 1 bit."""
    return 8 - ((threshold & -threshold).bit_length() - 1) // PLANES_PER_GROUP


def expected_groups(threshold: int, cells: int = TILE_CELLS) -> float:
    """How many groups are drawn until all cells are decided or the threshold's last 1 bit is behind.

    A cell is undecided after ``g`` groups if its draw begins with the 4 g bits that the threshold begins with.
    """
    undecided = [2.0 ** -(PLANES_PER_GROUP * g) for g in range(groups(threshold))]
    return sum(1.0 if u == 1.0 else -math.expm1(cells * math.log1p(-u)) for u in undecided)


# ---- tools ----


def tool(name: str, beside: Iterable[Path] = ()) -> Path | None:
    """An NVIDIA program: on PATH, beside others, in CUDA's folder, or in one of NVIDIA's Python packages."""
    found = shutil.which(name)
    if found:
        return Path(found)
    folders = [*beside, *(Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ)]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        folders += sorted(Path(root).glob("*/bin"), reverse=True)
    return next((folder / name for folder in folders if os.access(folder / name, os.X_OK)), None)


def ptxas() -> Path | None:
    return tool("ptxas")


def disassembler() -> Path | None:
    """nvdisasm, otherwise cuobjdump."""
    assembler = ptxas()
    beside = [assembler.resolve().parent] if assembler else []
    return tool("nvdisasm", beside) or tool("cuobjdump", beside)


def missing() -> str | None:
    """What is to be installed before anything can be compiled and read, in one sentence; None if all is there."""
    for package in ("numba_cuda", "cuda.bindings.nvjitlink"):
        try:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: pip install 'fastdrop[cuda]'"
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed: pip install 'fastdrop[cuda]'"
    if not disassembler():
        return "neither nvdisasm nor cuobjdump is at hand: pip install nvidia-cuda-nvdisasm"
    return None


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout + done.stderr


def version(program: Path) -> str:
    found = re.search(r"\bV(\d+(\.\d+)+)", _run([program, "--version"]))
    return found.group(1) if found else "of unknown version"


# ---- machine code ----


@dataclass(frozen=True)
class Resources:
    """Bytes, and registers, of a thread."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def ptxas_resources(log: str) -> Resources:
    """What ``ptxas -v`` says, the most of any function."""

    def most(pattern: str) -> int:
        found = [int(number) for number in re.findall(pattern, log)]
        if not found:
            raise ValueError(f"no {pattern!r} in what ptxas said: {log}")
        return max(found)

    return Resources(
        most(r"Used (\d+) registers"),
        most(r"(\d+) bytes stack frame"),
        most(r"(\d+) bytes spill stores"),
        most(r"(\d+) bytes spill loads"),
    )


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


@dataclass(frozen=True)
class Instruction:
    """``target``: the index of the instruction that it may go to; None too where that is another function's."""

    opcode: str
    operands: str = ""
    guarded: bool = False  # by a predicate
    target: int | None = None

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_LABEL = re.compile(r"(\.L_[\w.]+|\$[\w.$]+):")
_TARGET = re.compile(r"`\(([^)]+)\)\s*$|(?:^|[\s,])0x([0-9a-f]+)\s*$")
_ENTRY = re.compile(r"\s*\.section\s+\.text\.([\w$.]+)|\s*Function : ([\w$.]+)")
_JUMPS = ("BRA", "CALL", "WARPSYNC", "JMP")  # BSSY only names where threads meet again; CALL.ABS leaves the function


def parse(text: str, entry: str) -> list[Instruction]:
    """A function of what nvdisasm -c or cuobjdump -sass printed. Targets are labels there, addresses here."""
    lines: list[re.Match[str]] = []
    places: dict[str, int] = {}
    inside = False
    for line in text.splitlines():
        if section := _ENTRY.match(line):
            inside = entry in section.groups()
        elif inside and (label := _LABEL.match(line)):
            places[label.group(1)] = len(lines)
        elif inside and (found := _LINE.match(line)):
            places[f"{int(found.group(1), 16):#x}"] = len(lines)
            lines.append(found)
    if not lines:
        raise ValueError(f"no function {entry} in the listing")
    result = []
    for found in lines:
        _, guard, opcode, operands = found.groups()
        target = None
        if opcode.split(".")[0] in _JUMPS and ".ABS" not in opcode and (to := _TARGET.search(operands)):
            target = places.get(to.group(1) or f"{int(to.group(2), 16):#x}")
        guarded = guard is not None or re.match(r"!?U?P\d", operands) is not None
        result.append(Instruction(opcode, operands, guarded and not (guard or "").startswith("@PT"), target))
    return result


_PLAIN, _ASIDE = 0, 1  # edges: of the ordinary flow; to where only warps go that aren't together


class Flow:
    """A function's control flow."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.code = code
        self.edges = [self._edges(i) for i in range(len(code))]
        self.loops = self._loops()

    def _edges(self, i: int) -> list[tuple[int, int]]:
        one = self.code[i]
        after = [(i + 1, _PLAIN)] if i + 1 < len(self.code) else []
        if one.name in ("EXIT", "RET"):
            return after if one.guarded else []
        if one.target is None or self.calls(i):
            return after
        if one.opcode == "BRA.DIV" or one.name == "WARPSYNC":
            return [*after, (one.target, _ASIDE)]
        return [*(after if one.guarded else []), (one.target, _PLAIN)]

    def calls(self, i: int) -> bool:
        """Whether an instruction calls a function: for compute capability 8.0, CALL is also a jump, without return."""
        target = self.code[i].target
        return self.code[i].name == "CALL" and (target is None or self._returns(target))

    def _returns(self, start: int) -> bool:
        seen, open_ = set(), [start]
        while open_:
            i = open_.pop()
            if i in seen or i >= len(self.code):
                continue
            seen.add(i)
            one = self.code[i]
            if one.name == "RET":
                return True
            if one.name != "EXIT" or one.guarded:
                open_ += [i + 1] if one.name != "BRA" or one.guarded else []
                open_ += [one.target] if one.name == "BRA" and one.target is not None else []
        return False

    def _loops(self) -> list[Loop]:
        """Natural loops: what leads back to an instruction that all ways to it pass."""
        order = self._order()
        place = {i: k for k, i in enumerate(order)}
        before: dict[int, list[int]] = defaultdict(list)
        for i in order:
            for to, _ in self.edges[i]:
                before[to].append(i)
        above = {order[0]: order[0]}  # immediate dominators, after Cooper, Harvey and Kennedy

        def meet(a: int, b: int) -> int:
            while a != b:
                while place[a] > place[b]:
                    a = above[a]
                while place[b] > place[a]:
                    b = above[b]
            return a

        changed = True
        while changed:
            changed = False
            for i in order[1:]:
                known = [b for b in before[i] if b in above]
                nearest = known[0]
                for b in known[1:]:
                    nearest = meet(nearest, b)
                changed |= above.get(i) != nearest
                above[i] = nearest

        def dominates(a: int, b: int) -> bool:
            while place[b] > place[a]:
                b = above[b]
            return a == b

        bodies: dict[int, set[int]] = {}
        for i in order:
            for head, _ in self.edges[i]:
                if head in place and dominates(head, i):
                    body = bodies.setdefault(head, {head})
                    open_ = [i]
                    while open_:
                        j = open_.pop()
                        if j not in body:
                            body.add(j)
                            open_ += before[j]
        return [Loop(self, head, frozenset(body)) for head, body in sorted(bodies.items())]

    def _order(self) -> list[int]:
        """Reachable instructions, each before those that it leads to, but for loops."""
        done: list[int] = []
        seen = {0}
        stack = [(0, iter(self.edges[0]))]
        while stack:
            i, rest = stack[-1]
            for to, _ in rest:
                if to not in seen:
                    seen.add(to)
                    stack.append((to, iter(self.edges[to])))
                    break
            else:
                done.append(i)
                stack.pop()
        return done[::-1]


@dataclass(frozen=True)
class Cost:
    """One way through a loop: what it takes, how many draws it has, bytes that its widest stores write."""

    work: Work = field(default_factory=Work)
    draws: int = 0
    stored: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.work + other.work, self.draws + other.draws, self.stored + other.stored)


@dataclass(frozen=True)
class Loop:
    flow: Flow = field(repr=False)
    head: int
    body: frozenset[int] = field(repr=False)

    @property
    def instructions(self) -> list[Instruction]:
        return [self.flow.code[i] for i in sorted(self.body)]

    @property
    def calls(self) -> list[Instruction]:
        return [self.flow.code[i] for i in sorted(self.body) if self.flow.calls(i)]

    @property
    def inner(self) -> list[Loop]:
        """The loops right within."""
        within = [loop for loop in self.flow.loops if loop.body < self.body]
        return [loop for loop in within if not any(loop.body < other.body for other in within)]

    def paths(self, passes: float, wide: int, dearest: bool = False) -> list[Cost]:
        """The cheapest (or dearest) way round for each number of draws and of bytes stored in ``wide`` accesses.

        A loop within is passed through as often as ``passes``.
        """
        code, edges = self.flow.code, self.flow.edges
        inside = {loop.head: loop for loop in self.inner}
        hidden = {i: loop.head for loop in inside.values() for i in loop.body}
        best: dict[int, dict[tuple[int, int], Cost]] = defaultdict(dict)
        best[self.head][0, 0] = Cost()
        done: dict[tuple[int, int], Cost] = {}

        def keep(into: dict[tuple[int, int], Cost], cost: Cost) -> None:
            held = into.get((cost.draws, cost.stored))
            if held is None or (cost.work.instructions > held.work.instructions) == dearest:
                into[cost.draws, cost.stored] = cost

        for i in (i for i in self.flow._order() if i in self.body):
            if hidden.get(i, i) != i:
                continue
            if i in inside and i != self.head:
                loop = inside[i]
                turn = min(loop.paths(passes, wide), key=_instructions)
                add = Cost(turn.work * passes, draws=1)
                out = [(to, kind) for j in loop.body for to, kind in edges[j] if to not in loop.body]
            else:
                stored = _access_bytes(code[i].opcode) if code[i].name == "STG" else 0
                work = Work(1, code[i].name in MULTIPLIER, code[i].name in LOGIC)
                add = Cost(work, stored=stored if stored == wide else 0)
                out = edges[i]
            for cost in best[i].values():
                total = cost + add
                for to, kind in out:
                    if kind == _PLAIN and to == self.head:
                        keep(done, total)
                    elif kind == _PLAIN and to in self.body:
                        keep(best[to], total)
        return list(done.values())


def _instructions(cost: Cost) -> float:
    return cost.work.instructions


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
    """A kernel's machine code and the loops of its fast path: over whole tiles, vectors, single elements or words."""

    variant: Variant
    cc: Capability
    cubin: Cubin
    resources: Resources
    listing: list[Instruction] = field(repr=False)
    loops: list[Loop] = field(repr=False)

    @property
    def wide(self) -> int:
        """Bytes of an access to data on the fast path."""
        return widest((one for loop in self.loops for one in loop.instructions), "STG")

    @property
    def load(self) -> int:
        return widest((one for loop in self.loops for one in loop.instructions), "LDG")

    def per_element(self, passes: float, dearest: bool = False) -> Work:
        """Each draw taking so many groups."""
        wide = self.wide
        found = [cost for loop in self.loops for cost in loop.paths(passes, wide, dearest)]
        if not dearest:
            found = [cost for cost in found if cost.draws == draws(self.variant)]
        most = max((cost.stored for cost in found), default=0)
        if not most:
            raise ValueError(f"no pass of {self.variant} draws and stores what it should")
        best = (max if dearest else min)((cost for cost in found if cost.stored == most), key=_instructions)
        return best.work * (stored_bytes(self.variant) / best.stored)


def item_bytes(variant: Variant) -> int:
    return ITEM_BYTES[variant.dtype]


def stored_bytes(variant: Variant) -> float:
    """Per element, by a pass that stores all it may."""
    if variant.body == "draw_words":
        return 1 / 8
    if variant.body == "pointwise_forward":
        return ITEM_BYTES[variant.residual_dtype]
    return item_bytes(variant) * (2 if variant.body == "pointwise_backward" else 1)


def fused_arrays(variant: Variant) -> int:
    """What a flat kernel reads and writes: of swiglu's gradients, an activation, a residual sum."""
    return 5 if variant.body == "pointwise_backward" else 2 if variant.activation else 3


def is_counted(variant: Variant) -> bool:
    """Whether it has a number of instructions per element."""
    return variant.body not in BITS_ALONE and (variant.body in FLAT or not variant.on_rows)


def draws(variant: Variant) -> int:
    """How many words a lane draws for a tile, at the least."""
    return {"drawn": 1, "drawn_shifted": 2}.get(variant.form, int(variant.body == "draw_words"))


def fast_loops(variant: Variant, flow: Flow) -> list[Loop]:
    """Outermost loops with the widest stores that the kernel has; of draw_words and narrow ones all that store.

    Of count_bits, which stores nothing, all.
    """
    outer = [loop for loop in flow.loops if not any(loop.body < other.body for other in flow.loops)]
    wide = max((widest(loop.instructions, "STG") for loop in outer), default=0)
    return [loop for loop in outer if widest(loop.instructions, "STG") == wide]


class Unreadable(RuntimeError):
    """This ptxas is older than the PTX that Numba's compiler writes."""


def linked(variant: Variant, cc: Capability) -> Code:
    """As fastdrop itself loads it."""
    with tempfile.TemporaryDirectory() as folder, _environment("FASTDROP_CACHE_DIR", folder):
        return _read(variant, cc, compile.image(variant, cc)[1])


def assembled(variant: Variant, cc: Capability) -> Code:
    """As ptxas assembles it."""
    program = ptxas()
    if program is None:
        raise RuntimeError("there is no ptxas: pip install nvidia-cuda-nvcc")
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(compile.ptx(variant, cc))
        try:
            log = _run([program, "-v", f"-arch=sm_{cc[0]}{cc[1]}", source, "-o", result])
        except RuntimeError as error:
            if "Unsupported .version" in str(error):
                raise Unreadable(f"ptxas {version(program)} is older than the PTX that Numba writes") from error
            raise
        return _read(variant, cc, result.read_bytes(), ptxas_resources(log))


ASSEMBLERS: dict[str, Callable[[Variant, Capability], Code]] = {"linker": linked, "ptxas": assembled}


def _read(variant: Variant, cc: Capability, image: bytes, resources: Resources | None = None) -> Code:
    """``resources``: where nobody has told them, spills are what the code accesses of local memory."""
    program = disassembler()
    if program is None:
        raise RuntimeError(missing())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(image)
        listing = _run([program, "-c" if program.stem == "nvdisasm" else "-sass", file])
    cubin = Cubin.read(image)
    code = parse(listing, cubin.kernel)
    if resources is None:
        spilled = (sum(_access_bytes(one.opcode) for one in code if one.name == name) for name in ("STL", "LDL"))
        resources = Resources(cubin.registers, cubin.stack, *spilled)
    return Code(variant, cc, cubin, resources, code, fast_loops(variant, Flow(code)))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


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


def row(assembler: str, code: Code) -> dict[str, Any]:
    variant = code.variant
    shown = P if draws(variant) else P[:1]
    passes = {p: expected_groups(threshold(p)) for p in shown if is_counted(variant)}
    per_element = {str(p): round(code.per_element(n).instructions, 3) for p, n in passes.items()}
    most = [round(code.per_element(n, dearest=True).instructions, 3) for n in passes.values()]
    return {
        "assembler": assembler,
        "kernel": name(variant),
        "cc": f"{code.cc[0]}.{code.cc[1]}",
        **variant._asdict(),
        **asdict(code.resources),
        "load_bytes": code.load,
        "store_bytes": code.wide,
        "instructions_per_element": per_element,
        "most_instructions_per_element": most[0] if most else None,
        "instructions": len(code.listing),
        "aside": sum(one.opcode == "BRA.DIV" for loop in code.loops for one in loop.instructions),
    }


def budgets(codes: Iterable[Code], p: float = 0.1, chip: Chip = H100) -> dict[str, Budget]:
    """Forward and backward of what ``codes`` has, element-wise and unshifted, noise, and flat fused kernels with all
    that may be given, at full bandwidth."""
    direction = {"drawn": "forward", "stored": "backward", "": "Gaussian"}
    result = {}
    for code in codes:
        variant = code.variant
        noise = variant.body == "gaussian_multiply"
        if noise or (
            variant.body == "elementwise" and variant.form in direction and variant.plain and not variant.counted
        ):
            work = code.per_element(expected_groups(threshold(p)))
            what = f"{direction[variant.form]}, {DTYPES[variant.dtype]}"
            result[what] = budget(item_bytes(variant), work, chip, bits=not noise)
        elif variant.body in FLAT:
            work = code.per_element(0, dearest=True)
            result[name(variant)] = budget(item_bytes(variant), work, chip, arrays=fused_arrays(variant))
    return result


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    lines = [
        "| kernel | registers | spilled | stack | load | store | length | per element, p = 0.1 | p = 0.5 | most |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        numbers = (*(r["instructions_per_element"].get(str(p)) for p in P), r["most_instructions_per_element"])
        costs = " | ".join("" if number is None else f"{number:.1f}" for number in numbers)
        lines.append(
            f"| {r['kernel']} | {r['registers']} | {r['spill_stores'] + r['spill_loads']} | {r['stack']} | "
            f"{r['load_bytes']} | {r['store_bytes']} | {r['instructions']} | {costs} |"
        )
    return lines


def budget_table(found: dict[str, Budget]) -> list[str]:
    lines = [
        "| p = 0.1 | bytes per element | elements/s | instructions per element | of the issue rate "
        "| of the busier half-rate pipe |",
        "|---|---|---|---|---|---|",
    ]
    for what, b in found.items():
        lines.append(
            f"| {what} | {b.bytes_per_element:g} | {b.elements_per_second:.3g} | {b.instructions_per_element:.1f} | "
            f"{b.share:.0%} | {b.pipe_share:.0%} |"
        )
    return lines


def report(rows: list[dict[str, Any]], found: dict[str, dict[str, Budget]], versions: dict[str, str]) -> str:
    lines = [
        "# CUDA kernels, as compiled",
        "",
        "Compiled without a GPU: nothing here is a time. Widths and spills are in bytes, length is that of the code in "
        "instructions. Per element: those that a thread executes on the fast path (draw_words: per cell); most: with "
        "every branch the dear way, p = 0.1. How they are counted is written in `bench/cuda_report.py`.",
        "",
    ]
    for assembler, of_version in versions.items():
        which = "the linker that fastdrop uses" if assembler == "linker" else assembler
        for cc in sorted({r["cc"] for r in rows}, key=float):
            lines += [f"## Compute capability {cc}, {which} ({of_version})", ""]
            lines += [*table(r for r in rows if (r["assembler"], r["cc"]) == (assembler, cc)), ""]
            apart = [r["kernel"] for r in rows if (r["assembler"], r["cc"]) == (assembler, cc) and r["aside"]]
            if apart:
                lines += [f"With side paths for warps whose lanes are apart: {'; '.join(apart)}.", ""]
    lines += [
        f"## Instruction budget, {H100.name}",
        "",
        f"{H100.sms} SMs x {H100.schedulers} schedulers x {H100.hertz / 1e9:g} GHz issue {H100.issue:.3g} warp "
        f"instructions per second; full bandwidth is {H100.bandwidth / 1e12:g} TB/s (data sheet). The budget is half "
        "of the issue rate, but for Gaussian noise and for fused kernels (here the flat ones), before whose forward "
        "draw_words runs. Integer multiplication has a pipe of half that rate, logic, shifts and comparisons have "
        "another: the last column is the share of the busier one.",
        "",
    ]
    for assembler, of_assembler in found.items():
        if of_assembler:
            lines += [f"Compute capability 9.0, {assembler}:", "", *budget_table(of_assembler), ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What the CUDA kernels compile to; needs no GPU.")
    parser.add_argument("--output", type=Path, default=Path("bench/results/cuda_code.md"))
    output: Path = parser.parse_args(arguments).output
    lacking = missing()
    if lacking:
        print(lacking)
        return 1
    program = disassembler()
    assembler = ptxas()
    versions = {"linker": f"nvJitLink {metadata.version('nvidia-nvjitlink')}"} | (
        {"ptxas": version(assembler)} if assembler else {}
    )
    rows, found = [], {}
    for kind in list(versions):
        try:
            codes = [ASSEMBLERS[kind](variant, cc) for cc in CAPABILITIES for variant in (*VARIANTS, *ROWS)]
        except Unreadable as error:
            print(f"left out: {error}")
            del versions[kind]
            continue
        rows += [row(kind, code) for code in codes]
        found[kind] = budgets(code for code in codes if code.cc == (9, 0))
    text = report(rows, found, versions)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    data = {
        "versions": versions | {"disassembler": f"{program.stem} {version(program)}" if program else ""},
        "chip": asdict(H100) | {"issue": H100.issue},
        "kernels": rows,
        "budget": {kind: {what: asdict(b) for what, b in of.items()} for kind, of in found.items()},
    }
    output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)
    print(f"wrote {output} and {output.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

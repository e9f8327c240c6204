"""From the text of a PTX kernel to closures over `threads.Threads`, an instruction each.

`Unsupported` names the line that this interpreter doesn't know.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import (
    DTYPES,
    FLOAT_COMPARISONS,
    FLOATS,
    INTEGER_COMPARISONS,
    INTEGERS,
    UNSIGNED,
    conversion,
    pair,
    rounded,
)
from .memory import WIDEST, Fault, Selection, Threads, round_up

Read = Callable[[Threads, Selection], Any]
Write = Callable[[Threads, Selection, Any], None]
Run = Callable[[Threads, Selection], None]
Form = dict[str, str]  # what an opcode's pattern matched

LANES = 32


class Unsupported(Exception):
    """PTX that this interpreter doesn't know."""


COMMENT = re.compile(r"//[^\n]*")
ENTRY = re.compile(r"\.entry\s+[\w$]+\s*\((?P<parameters>[^)]*)\)[^{;]*\{", re.S)
PARAMETER = re.compile(r"\.param\s+\.(?P<type>\w+)\s+(?P<name>[\w$]+)")
TOKEN = re.compile(r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$%.]+)\s*:(?!:)|(?P<statement>[^;]+);)", re.S)
STATEMENT = re.compile(r"(?:@(?P<guard>[\w$%]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*);")
DECLARATION = re.compile(r"\.reg\s*\.(?P<type>\w+) (?P<names>.*);")
SHARED = re.compile(r"\.shared \.align (?P<align>\d+) \.b8 (?P<name>[\w$]+)\[(?P<size>\d+)\];")
COMMA = re.compile(r"\s*,\s*(?![^{\[]*[}\]])")
ADDRESS = re.compile(r"\[\s*(?P<base>[\w$%.]+)\s*(?:\+\s*(?P<offset>-?\w+))?\s*\]")
NUMBER = re.compile(r"-?\d\w*")

SPECIAL = ("%laneid", "%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x")


class Register(NamedTuple):
    number: int
    dtype: np.dtype[Any]  # bool, or unsigned


@dataclass
class Instruction:
    text: str
    opcode: str
    kind: str = "plain"  # or "branch", "exit", "warp", "block"
    guard: Read | None = None
    run: Run = lambda t, at: None
    target: int = -1


class Program:
    """An entry: where its parameters lie, its registers, its instructions as closures over `_Threads`."""

    def __init__(self, text: str) -> None:
        text = COMMENT.sub("", text)
        entries = list(ENTRY.finditer(text))
        if len(entries) != 1:
            raise Unsupported(f"one .entry is expected, not {len(entries)}")
        (entry,) = entries
        self.granule = WIDEST
        self.shared: dict[str, int] = {}  # where variables lie in the block's memory
        self.shared_bytes = 0
        self.dtypes: list[np.dtype[Any]] = []  # by register
        self.slots: dict[tuple[int, np.dtype[Any]], int] = {}  # views of registers
        self.special = {name: self._register("u32") for name in SPECIAL}
        self.names: ChainMap[str, Register] = ChainMap({}, self.special)
        self.labels: ChainMap[str, int] = ChainMap()
        self.branches: list[tuple[Instruction, str, ChainMap[str, int]]] = []
        self.instructions: list[Instruction] = []
        self._parse_parameters(entry["parameters"])
        self._parse_body(text, entry.end())
        for branch, label, labels in self.branches:
            if label not in labels:
                raise Unsupported(branch.text)
            branch.target = labels[label]

    def _parse_parameters(self, text: str) -> None:
        self.parameters: dict[str, int] = {}
        self.parameter_bytes = 0
        for declaration in filter(str.strip, text.split(",")):
            match = PARAMETER.fullmatch(declaration.strip())
            if not match or match["type"] not in DTYPES:
                raise Unsupported(declaration.strip())
            size = DTYPES[match["type"]].itemsize
            self.parameters[match["name"]] = round_up(self.parameter_bytes, size)
            self.parameter_bytes = self.parameters[match["name"]] + size

    def _parse_body(self, text: str, at: int) -> None:
        depth = 1
        while depth:
            token = TOKEN.match(text, at)
            if not token:
                raise Unsupported(text[at : at + 80].strip())
            at = token.end()
            if token["open"]:
                depth, self.names, self.labels = depth + 1, self.names.new_child(), self.labels.new_child()
            elif token["close"]:
                depth, self.names, self.labels = depth - 1, self.names.parents, self.labels.parents
            elif token["label"]:
                self.labels[token["label"]] = len(self.instructions)
            else:
                line = " ".join(token["statement"].split()) + ";"
                try:
                    self._statement(line)
                except (KeyError, ValueError, TypeError) as error:
                    raise Unsupported(line) from error
        self.instructions.append(Instruction("ret;", "ret", "exit"))

    def _statement(self, line: str) -> None:
        if declaration := DECLARATION.fullmatch(line):
            for name in COMMA.split(declaration["names"]):
                stem, _, count = name.rstrip(">").partition("<")
                for full in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                    self.names[full] = self._register(declaration["type"])
        elif variable := SHARED.fullmatch(line):
            self.shared[variable["name"]] = round_up(self.shared_bytes, int(variable["align"]))
            self.shared_bytes = self.shared[variable["name"]] + int(variable["size"])
        elif match := STATEMENT.fullmatch(line):
            self.current = Instruction(line, match["opcode"])
            if match["guard"]:
                self.current.guard = self._read(match["guard"], "pred")
            operands = COMMA.split(match["operands"]) if match["operands"] else []
            self.current.run = self._compiled(match["opcode"], operands)
            self.instructions.append(self.current)
        else:
            raise KeyError(line)

    def _register(self, type: str) -> Register:
        self.dtypes.append(DTYPES[type] if type == "pred" else UNSIGNED[DTYPES[type].itemsize])
        return Register(len(self.dtypes) - 1, self.dtypes[-1])

    # ---- operands ----

    def _slot(self, operand: str, dtype: np.dtype[Any], wide: bool) -> int:
        register = self.names[operand]
        if wide and dtype.kind == "u" and register.dtype.itemsize > dtype.itemsize:
            dtype = register.dtype
        if register.dtype.itemsize != dtype.itemsize or (register.dtype.kind == "b") != (dtype.kind == "b"):
            raise KeyError(operand)
        return self.slots.setdefault((register.number, dtype), len(self.slots))

    def _read(self, operand: str, type: str, wide: bool = False) -> Read:
        """The operand's values as ``type``; ``wide`` takes the low bits of wider registers."""
        dtype = DTYPES[type]
        if NUMBER.fullmatch(operand):
            constant = _constant(operand, dtype)
            return lambda t, at: constant
        if operand in self.shared and type in ("u64", "b64"):
            place = np.uint64(self.shared[operand])
            return lambda t, at: place
        slot = self._slot(operand, dtype, wide)
        if wide:
            return lambda t, at: t.registers[slot][at].astype(dtype)
        return lambda t, at: t.registers[slot][at]

    def _write(self, operand: str, type: str, wide: bool = False) -> Write:
        """Puts values of ``type``; ``wide`` extends them by zeros to wider registers."""
        if operand in self.special:
            raise KeyError(operand)
        slot = self._slot(operand, DTYPES[type], wide)

        def put(t: Threads, at: Selection, value: Any) -> None:
            t.registers[slot][at] = value

        return put

    def _address(self, operand: str) -> Read:
        match = ADDRESS.fullmatch(operand)
        if not match:
            raise KeyError(operand)
        base, offset = self._read(match["base"], "u64"), np.uint64(int(match["offset"] or "0", 0) % 2**64)
        return lambda t, at: base(t, at) + offset

    # ---- instructions ----

    def _compiled(self, opcode: str, operands: list[str]) -> Run:
        for pattern, build in BUILDERS:
            if form := re.fullmatch(pattern, opcode):
                return build(self, form.groupdict(""), *operands)
        if opcode.startswith("mov.") and any("{" in operand for operand in operands):
            return self._repack(opcode.removeprefix("mov."), *operands)
        for pattern, signature, function in INTEGERS + FLOATS:
            if form := re.fullmatch(pattern, opcode):
                t = form.groupdict("").get("t", "")
                result, *types = ({"t": t, "w": f"{t[:1]}64"}.get(type, type) for type in signature.split())
                reads = [self._read(operand, type) for operand, type in zip(operands[1:], types, strict=True)]
                if function in (np.floor_divide, np.remainder):
                    reads[1] = _nonzero(reads[1])
                if (pattern, signature, function) in FLOATS:
                    function = rounded(function)
                return _compute(self._write(operands[0], result), function, *reads)
        raise KeyError(opcode)

    def _branch(self, form: Form, label: str) -> Run:
        self.current.kind = "branch"
        self.branches.append((self.current, label, self.labels))
        return self.current.run

    def _exit(self, form: Form) -> Run:
        self.current.kind = "exit"
        return self.current.run

    def _convert(self, form: Form, result: str, operand: str) -> Run:
        d, a = form["d"], form["a"]
        function = conversion(d, a, form["round"])
        write = self._write(result, "b16" if d in ("f16", "bf16") else d)
        return _compute(write, function, self._read(operand, a))

    def _convert_pair(self, form: Form, result: str, high: str, low: str) -> Run:
        reads = self._read(high, "f32"), self._read(low, "f32")
        return _compute(self._write(result, "b32"), partial(pair, type=form["t"]), *reads)

    def _repack(self, type: str, result: str, operand: str) -> Run:
        whole, parts = (operand, _names(result)) if result.startswith("{") else (result, _names(operand))
        bits = int(type.removeprefix("b"))
        shifts, part = range(0, bits, bits // len(parts)), f"b{bits // len(parts)}"
        if whole == operand:
            read, writes = self._read(whole, type), [self._write(name, part) for name in parts]

            def unpack(t: Threads, at: Selection) -> None:
                value = read(t, at)
                for write, shift in zip(writes, shifts, strict=True):
                    write(t, at, value >> shift)

            return unpack

        def pack(*values: Any) -> Any:
            return sum(value.astype(DTYPES[type]) << shift for value, shift in zip(values, shifts, strict=True))

        return _compute(self._write(whole, type), pack, *(self._read(name, part) for name in parts))

    def _compare(self, form: Form, result: str, a: str, b: str) -> Run:
        table = FLOAT_COMPARISONS if form["t"][0] == "f" else INTEGER_COMPARISONS
        reads = [self._read(operand, form["t"]) for operand in (a, b)]
        return _compute(self._write(result, "pred"), table[form["compare"]], *reads)

    def _load_parameter(self, form: Form, result: str, source: str) -> Run:
        dtype, write = DTYPES[form["t"]], self._write(result, form["t"], wide=True)
        offset = self.parameters[source.strip("[]")]
        return lambda t, at: write(t, at, np.frombuffer(t.parameters, dtype, 1, offset))

    def _accessed(self, form: Form, group: str) -> tuple[str, list[str]]:
        """Type, without the difference of floats and bits; and the registers."""
        names = _names(group) if form["count"] else [group]
        if len(names) != int(form["count"] or 1):
            raise KeyError(group)
        type = form["t"].replace("f", "b")
        self.granule = min(self.granule, DTYPES[type].itemsize)
        return type, names

    def _load(self, form: Form, result: str, source: str) -> Run:
        type, names = self._accessed(form, result)
        address, writes = self._address(source), [self._write(name, type, wide=True) for name in names]

        def load(t: Threads, at: Selection) -> None:
            window, where = t.space(form["space"], at, address(t, at))
            for write, value in zip(writes, window.load(t, at, where, DTYPES[type], len(writes)), strict=True):
                write(t, at, value)

        return load

    def _store(self, form: Form, target: str, source: str) -> Run:
        type, names = self._accessed(form, source)
        address, reads = self._address(target), [self._read(name, type, wide=True) for name in names]

        def store(t: Threads, at: Selection) -> None:
            window, where = t.space(form["space"], at, address(t, at))
            window.store(t, at, where, DTYPES[type], [read(t, at) for read in reads])

        return store

    def _add(self, form: Form, result: str, target: str, source: str) -> Run:
        self.granule = min(self.granule, 8)
        address, read, write = self._address(target), self._read(source, "u64"), self._write(result, "u64")
        return lambda t, at: write(t, at, t.window.add(t, at, address(t, at), read(t, at)))

    def _synchronise(self, members: str) -> None:
        if members != "-1":
            raise KeyError(members)
        self.current.kind = "warp"

    def _barrier(self, form: Form, number: str) -> Run:
        if number != "0":
            raise KeyError(number)
        self.current.kind = "block"
        return lambda t, at: t.meet(at)

    def _shuffle(self, form: Form, result: str, source: str, step: str, bounds: str, members: str) -> Run:
        self._synchronise(members)
        if bounds != "31":
            raise KeyError(bounds)
        read, step_of, write = self._read(source, "b32"), self._read(step, "u32"), self._write(result, "b32")

        def shuffle(t: Threads, at: Selection) -> None:
            threads, number = t.ids[at], np.asarray(step_of(t, at), np.int64) & 31
            other = threads ^ number if form["mode"] == "bfly" else threads - threads % LANES + number
            absent = ~t.here[other]
            if absent.any():
                t.fail(Fault, f"reads lane {other[absent][0] % LANES}, which is not there", at, absent)
            write(t, at, read(t, other))

        return shuffle

    def _vote(self, form: Form, result: str, source: str, members: str) -> Run:
        self._synchronise(members)
        read, write = self._read(source, "pred"), self._write(result, "pred")
        return lambda t, at: write(t, at, t.any_of_warp(at, read(t, at)))


SPACE = r"\.(?P<space>global|shared)"
ACCESS = rf"{SPACE}(?:\.v(?P<count>[24]))?\.(?P<t>[bu](?:16|32|64)|f32|f64)"
CONVERTED = "[us](?:16|32|64)|f16|bf16|f32|f64"
BUILDERS: list[tuple[str, Callable[..., Run]]] = [
    (r"bra(?:\.uni)?", Program._branch),
    (r"ret", Program._exit),
    (rf"cvt(?:\.(?P<round>rn|rni))?\.(?P<d>{CONVERTED})\.(?P<a>{CONVERTED})", Program._convert),
    (r"cvt\.rn\.(?P<t>b?f16)x2\.f32", Program._convert_pair),
    (r"setp\.(?P<compare>\w+)\.(?P<t>[bus](?:32|64)|f32|f64)", Program._compare),
    (r"ld\.param\.(?P<t>u32|u64|f32|f64)", Program._load_parameter),
    (rf"ld{ACCESS}", Program._load),
    (rf"st{ACCESS}", Program._store),
    (r"atom\.global\.add\.u64", Program._add),
    (r"bar\.sync", Program._barrier),
    (r"shfl\.sync\.(?P<mode>idx|bfly)\.b32", Program._shuffle),
    (r"vote\.sync\.any\.pred", Program._vote),
]


def _names(group: str) -> list[str]:
    """Those in ``{a, b}``."""
    return [name.strip() for name in group.removeprefix("{").removesuffix("}").split(",")]


def _constant(text: str, dtype: np.dtype[Any]) -> Any:
    if bits := re.fullmatch(r"0(?:[fF]([\da-fA-F]{8})|[dD]([\da-fA-F]{16}))", text):
        return UNSIGNED[4 if bits[1] else 8].type(int(text[2:], 16)).view(dtype).reshape(())[()]
    return UNSIGNED[dtype.itemsize].type(int(text, 0) % 256**dtype.itemsize).view(dtype)


def _compute(write: Write, function: Callable[..., Any], *reads: Read) -> Run:
    if len(reads) == 1:
        (a,) = reads
        return lambda t, at: write(t, at, function(a(t, at)))
    if len(reads) == 2:
        a, b = reads
        return lambda t, at: write(t, at, function(a(t, at), b(t, at)))
    return lambda t, at: write(t, at, function(*[read(t, at) for read in reads]))


def _nonzero(read: Read) -> Read:
    def checked(t: Threads, at: Selection) -> Any:
        divisor = read(t, at)
        if not np.all(divisor):
            t.fail(Fault, "division by zero", at, np.broadcast_to(divisor == 0, t.ids[at].shape))
        return divisor

    return checked

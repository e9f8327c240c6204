"""The CUDA kernels as machine code, compiled here for GPUs that needn't be here; how it is kept on disk.

A kernel is compiled once for a capability and looked at in one test, whichever process takes it.
"""

from __future__ import annotations

import functools
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import cuda_report as report
from bench.cuda_report import CAPABILITIES, Flow, Instruction
from fastdrop.backends.cuda import compile
from fastdrop.backends.cuda.compile import Capability, Variant
from fastdrop.core.activations import SILU
from fastdrop.core.checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from fastdrop.core.random import threshold

from ...cases import THRESHOLDS

SMALL = Variant("strided", FLOAT32, "narrow")  # a tenth of a second to compile

# An SM's 65,536 registers are enough for 32 warps of 64 a thread. A float64 lane has as many elements under way as a
# float32 one, in twice the registers, so that 16 warps (128 a thread) ask memory for as many bytes at once.
REGISTERS = {FLOAT32: 64, FLOAT64: 128, FLOAT16: 64, BFLOAT16: 64}

# The longest to compile, and its parts are tested.
TESTED = [v for v in report.VARIANTS if v != Variant("elementwise", FLOAT32, "drawn_shifted", plain=False)]


@pytest.fixture
def linker() -> None:
    for package in ("numba_cuda", "cuda.bindings.nvjitlink"):
        pytest.importorskip(package, reason=f"compiling needs {package}: pip install 'fastdrop[cuda]'")


@pytest.fixture
def tools() -> None:
    lacking = report.missing()
    if lacking:
        pytest.skip(lacking)


linked = functools.cache(report.linked)


class Translated(Exception):
    """Carries what Numba hands to NVVM."""


@functools.cache
def library(variant: Variant, new: bool) -> Any:
    """What Numba makes of a kernel before NVVM takes it for one capability: the same for all from 8.0 on, or below."""
    compile._ready_numba_cuda()
    from numba.cuda import compiler

    def stop(*arguments: Any, **options: Any) -> None:
        raise Translated(translate(*arguments, **options)[0])

    translate = compiler._compile_pyfunc_with_fixup
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_compile_pyfunc_with_fixup", stop)
        with pytest.raises(Translated) as caught:
            translated(variant, CAPABILITIES[0] if new else compile.OLDEST, "ptx")
    return caught.value.args[0]


translated = compile._translated


def translated_once(variant: Variant, cc: Capability, output: str) -> Any:
    found = library(variant, cc >= (8, 0))
    return found.get_ltoir(cc=cc) if output == "ltoir" else found.get_asm_strs(cc=cc)[0]


@pytest.fixture(autouse=True)
def one_translation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba takes seconds for a kernel, NVVM and the linker a fraction of one for each capability."""
    monkeypatch.setattr(compile, "_translated", translated_once)


def capability(cc: Capability) -> str:
    return f"sm_{cc[0]}{cc[1]}"


# ---- the kernels ----


def assert_fast(code: report.Code) -> None:
    variant, used = code.variant, code.resources
    assert (used.spill_stores, used.spill_loads, used.stack) == (0, 0, 0)
    assert used.registers <= REGISTERS[variant.dtype]
    assert not [one for one in code.listing if one.name in ("LDL", "STL")]
    if variant.form == "narrow" or variant.body == "gaussian_multiply":
        assert code.wide == report.item_bytes(variant)
    elif variant.body in ("elementwise", "strided"):
        assert (code.load, code.wide) == (16, 16)
    # Where the compiler doesn't see that a warp's lanes stay together, side paths bring them together. Roots of what
    # is not a normal number are a function of the compiler's.
    calls = [one.operands for loop in code.loops for one in loop.calls]
    assert all("sqrt_rn_f32_slowpath" in to for to in calls)
    assert bool(calls) == (variant.body == "gaussian_multiply")
    in_loops = {one.opcode for loop in code.loops for one in loop.instructions}
    assert not in_loops & {"BRA.DIV", "WARPSYNC", "WARPSYNC.COLLECTIVE"}


def assert_packed_as_laid_out(code: report.Code) -> None:
    """Each parameter lies where the kernel reads it."""
    codes = code.variant.codes
    ends = [struct.calcsize("@" + codes[: i + 1]) for i in range(len(codes))]
    sizes = [struct.calcsize(one) for one in codes]
    assert code.cubin.parameters == [(end - size, size) for end, size in zip(ends, sizes, strict=True)]
    assert compile.packer(code.variant).size == ends[-1]


@pytest.mark.parametrize("variant", TESTED, ids=str)
def test_machine_code(variant: Variant, tools: None) -> None:
    for cc in CAPABILITIES:
        code = linked(variant, cc)
        assert_fast(code)
        assert_packed_as_laid_out(code)


@pytest.mark.parametrize("cc", [*CAPABILITIES, (12, 0)], ids=capability)
def test_translation_serves_all_capabilities(cc: Capability, linker: None) -> None:
    variant = Variant("strided", BFLOAT16, "wide")
    own, shared = (
        re.sub(r"\b_ZN[\w$]+?(?=_param_|[^\w$])", "", text)  # names tell the translation's number and capability
        for text in (translated(variant, cc, "ptx"), translated_once(variant, cc, "ptx"))
    )
    assert own == shared


MOST_REGISTERS = {FLOAT32: 48, FLOAT64: 64, FLOAT16: 80, BFLOAT16: 80}
# Functions of the compiler's: for roots, inverses and quotients that aren't normal numbers, and where a block's task
# begins.
CALLED = r"__cuda_sm\d+x?_(?:d?sqrt|(?:dbl)?rcp|div)_rn_|__cuda_sm20_(?:div|rem)_u64"


def assert_fast_on_rows(code: report.Code) -> None:
    used = code.resources
    assert (used.spill_stores, used.spill_loads, used.stack) == (0, 0, 0)
    assert used.registers <= MOST_REGISTERS[code.variant.dtype]
    loops = [loop.instructions for loop in code.loops]
    opcodes = {one.opcode for loop in loops for one in loop}
    assert not {opcode for opcode in opcodes if opcode.startswith(("LDL", "STL", "BRA.DIV", "WARPSYNC"))}
    assert not {opcode for opcode in opcodes if "ATOM" in opcode or "RED" in opcode}
    assert all(re.search(CALLED, one.operands) for loop in code.loops for one in loop.calls)
    innermost = [loop for loop in Flow(code.listing).loops if not loop.inner]
    assert innermost
    assert not [one for loop in innermost for one in loop.calls if "_u64" in one.operands]
    if code.variant.body != "add_panels":
        assert (code.load, code.wide) == (16, 16)


@pytest.mark.parametrize("variant", report.ROWS, ids=str)
def test_machine_code_on_rows(variant: Variant, tools: None) -> None:
    code = linked(variant, (9, 0))
    assert_fast_on_rows(code)
    assert_packed_as_laid_out(code)
    row = report.row("linker", code)
    assert bool(row["instructions_per_element"]) == (variant.body in report.FLAT)
    if variant.body in report.FLAT:
        assert 0 < row["instructions_per_element"]["0.1"] <= row["most_instructions_per_element"]
        (budget,) = report.budgets([code]).values()
        assert budget.instructions_per_element == pytest.approx(row["most_instructions_per_element"], abs=1e-3)
        assert budget.bytes_per_element == report.fused_arrays(variant) * report.item_bytes(variant) + 1 / 8


def test_report_has_each_kernel_once() -> None:
    variants = report.VARIANTS + report.ROWS
    assert {variant.body for variant in variants} == {*compile.PARAMETERS, *compile.ROW_PARAMETERS}
    assert len({report.name(variant) for variant in variants}) == len(variants)
    assert report.name(Variant("norm_forward", BFLOAT16, "wide", residual_dtype=FLOAT32)) == (
        "norm_forward wide, bfloat16 on float32"
    )
    assert report.name(Variant("pointwise_backward", FLOAT16, residual_dtype=FLOAT16, activation=SILU)) == (
        "pointwise_backward, float16, silu"
    )


def test_bytes_that_a_pass_stores_per_element() -> None:
    assert report.stored_bytes(Variant("draw_words")) == 1 / 8
    assert report.stored_bytes(Variant("strided", FLOAT64, "wide")) == 8
    assert report.stored_bytes(Variant("pointwise_forward", BFLOAT16, residual_dtype=FLOAT32)) == 4
    assert report.stored_bytes(Variant("pointwise_backward", FLOAT16, residual_dtype=FLOAT32)) == 4  # dx, dfactor


@pytest.mark.parametrize("cc", [(7, 5), (12, 0)], ids=capability)
def test_oldest_and_newest_capability_on_rows(cc: Capability, tools: None) -> None:
    code = linked(Variant("norm_forward", BFLOAT16, "wide", residual_dtype=FLOAT32), cc)
    assert (code.resources.spill_stores, code.resources.stack) == (0, 0)
    assert_packed_as_laid_out(code)


@pytest.mark.parametrize("dtype", range(4), ids=report.DTYPES)
def test_noise_is_rounded_at_each_step(dtype: int, tools: None) -> None:
    """Nothing is contracted, in PTX or after it: what multiplies and adds at once are the steps of two roots."""
    variant = Variant("gaussian_multiply", dtype)
    arithmetic = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt)\.\S*f32\b", compile.ptx(variant, (9, 0))))
    assert arithmetic == {"add.rn.f32", "mul.rn.f32", "sqrt.rn.f32"}
    (loop,) = linked(variant, (9, 0)).loops
    assert [one.name for one in loop.instructions].count("FFMA") == 4


@pytest.mark.parametrize("form", ["drawn", "stored"])
def test_ptxas_agrees(form: str, tools: None) -> None:
    if report.ptxas() is None:
        pytest.skip("there is no ptxas: pip install nvidia-cuda-nvcc")
    try:
        code = report.assembled(Variant("elementwise", BFLOAT16, form), (9, 0))
    except report.Unreadable as error:
        pytest.skip(str(error))
    assert_fast(code)
    assert_packed_as_laid_out(code)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_instructions_leave_half_of_an_h100_free(dtype: int, tools: None) -> None:
    codes = [linked(Variant("elementwise", dtype, form), (9, 0)) for form in ("drawn", "stored")]
    budgets = report.budgets(codes, p=0.1, chip=report.H100)
    assert [what.split(",")[0] for what in budgets] == ["forward", "backward"]
    for what, budget in budgets.items():
        assert budget.share < 0.5, what
        assert budget.pipe_share < 1, what


@pytest.mark.parametrize("cc", [(7, 5), (12, 0)], ids=capability)
@pytest.mark.parametrize(
    "variant",
    [
        Variant("draw_words"),
        Variant("elementwise", BFLOAT16, "stored"),
        Variant("elementwise", FLOAT16, "stored"),
        Variant("strided", FLOAT64, "wide", plain=False),
        Variant("gaussian_multiply", BFLOAT16),
        Variant("count_bits"),
    ],
    ids=str,
)
def test_oldest_and_newest_capability(variant: Variant, cc: Capability, tools: None) -> None:
    """Those between are compiled above."""
    code = linked(variant, cc)
    assert (code.resources.spill_stores, code.resources.stack) == (0, 0)
    assert_packed_as_laid_out(code)


@pytest.mark.parametrize(
    "variant",
    [
        Variant("draw_words"),
        *(Variant("elementwise", dtype, "stored") for dtype in (FLOAT32, FLOAT64)),
        *(Variant("strided", dtype, "narrow") for dtype in (FLOAT32, FLOAT64)),
        Variant("strided", FLOAT32, "narrow", counted=True),
        Variant("gaussian_multiply", FLOAT64),
        Variant("dilate_bits"),
        Variant("count_bits"),
    ],
    ids=str,
)
def test_parameters_are_of_the_types_packed(variant: Variant, linker: None) -> None:
    text = compile.ptx(variant, (9, 0))
    head = text[text.index(".entry") :]
    declared = re.findall(r"\.param\s+\.(\w+)\s", head[: head.index("{")])
    assert "".join({"u64": "Q", "u32": "I", "f32": "f", "f64": "d"}[type] for type in declared) == variant.codes


# ---- what is kept on disk ----


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("FASTDROP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(linker: None, monkeypatch: pytest.MonkeyPatch) -> list[Capability]:
    """For what has been compiled, one entry each time."""
    done: list[Capability] = []
    link = compile.cubin

    def counting(source: Any, cc: Capability) -> bytes:
        done.append(cc)
        return link(source, cc)

    monkeypatch.setattr(compile, "cubin", counting)
    return done


def assert_whole(image: tuple[bytes, bytes]) -> None:
    name, code = image
    assert report.Cubin.read(code).kernel == name.decode()
    # The table of sections comes last but for that of segments: cut code ends before it.
    table, flags_to_sections = struct.unpack_from("<Q", code, 0x28)[0], struct.unpack_from("<HH", code, 0x3A)
    assert table + flags_to_sections[0] * flags_to_sections[1] <= len(code)


def test_image_is_compiled_once(folder: Path, compiled: list[Capability], monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile.image(SMALL, (9, 0))
    assert_whole(first)
    (file,) = folder.iterdir()
    before = file.stat().st_mtime_ns

    def never(*_: object) -> str:
        raise AssertionError("compiled although it is on the disk")

    monkeypatch.setattr(compile, "ptx", never)
    monkeypatch.setattr(compile, "cubin", never)
    assert compile.image(SMALL, (9, 0)) == first
    assert list(folder.iterdir()) == [file]
    assert file.stat().st_mtime_ns == before


def test_the_driver_compiles_where_there_is_no_linker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> bytes:
        raise RuntimeError("no linker")

    monkeypatch.setattr(compile, "cubin", none)
    name, code = compile.image(SMALL, (9, 0))
    assert code.endswith(b"\0")  # the driver reads on to there
    assert b".entry " + name in code
    assert not list(folder.glob("*"))  # there may be one next time


def test_image_is_kept_per_variant_and_capability(folder: Path, compiled: list[Capability]) -> None:
    others = [
        SMALL._replace(**change)
        for change in ({"dtype": FLOAT64}, {"form": "wide"}, {"plain": False}, {"counted": True})
    ]
    wanted = [(SMALL, (9, 0)), (SMALL, (8, 0)), *((other, (9, 0)) for other in others)]
    images = [compile.image(variant, cc) for variant, cc in wanted]
    assert compiled == [cc for _, cc in wanted]
    assert [compile.image(variant, cc) for variant, cc in wanted] == images
    assert len(compiled) == len(list(folder.iterdir())) == len(wanted)
    assert len({code for _, code in images}) == len(wanted)


def spoil(file: Path, damage: str) -> None:
    whole = file.read_bytes()
    if damage.startswith("cut"):
        kept = {"to nothing": 0, "to a byte": 1, "to half": len(whole) // 2, "by a byte": len(whole) - 1}
        file.write_bytes(whole[: kept[damage.removeprefix("cut ")]])
    else:
        place = {"first": 0, "middle": len(whole) // 2, "last": len(whole) - 1}[damage.split()[0]]
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])


@pytest.mark.parametrize(
    "damage",
    ["cut to nothing", "cut to a byte", "cut to half", "cut by a byte", "first byte", "middle byte", "last byte"],
)
def test_damaged_image_is_compiled_again(damage: str, folder: Path, compiled: list[Capability]) -> None:
    compile.image(SMALL, (9, 0))
    (file,) = folder.iterdir()
    spoil(file, damage)
    again = compile.image(SMALL, (9, 0))
    assert_whole(again)
    assert len(compiled) == 2
    assert compile.image(SMALL, (9, 0)) == again
    assert len(compiled) == 2


def test_image_without_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Capability]) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FASTDROP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert_whole(compile.image(SMALL, (9, 0)))
    assert_whole(compile.image(SMALL, (9, 0)))
    assert len(compiled) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes to any folder")
def test_image_in_a_folder_that_cannot_be_written(folder: Path, compiled: list[Capability]) -> None:
    folder.mkdir(mode=0o500)
    assert_whole(compile.image(SMALL, (9, 0)))
    assert list(folder.iterdir()) == []


def test_folder_in_the_way_of_an_image(folder: Path, compiled: list[Capability]) -> None:
    compile.image(SMALL, (9, 0))
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()
    assert_whole(compile.image(SMALL, (9, 0)))
    assert list(folder.iterdir()) == [file]


def test_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        compile._keep(folder / "kernel", b"code")
    assert list(folder.iterdir()) == []


ROOT = str(Path(compile.__file__).parents[3])


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": ROOT}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, text=True, env=environment)


def test_image_is_whole_whoever_writes_it(folder: Path) -> None:
    """Two processes keep a kernel again and again, from no file on, while this one reads it."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fastdrop.backends.cuda import compile\n"
        "for size in range(300):\n"
        "    compile._keep(Path(sys.argv[1]), sys.argv[2].encode() * (100_000 + size))\n"
    )
    file = folder / "kernel"
    writers = [start(code, str(file), own) for own in "ab"]
    seen = set()
    try:
        while any(writer.poll() is None for writer in writers):
            if file.exists():
                content = file.read_bytes()
                seen.add(content[-1:])
                body = content[-100_000:]
                assert body == content[-1:] * 100_000
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {b"a", b"b"}
    assert seen
    assert list(folder.iterdir()) == [file]


def test_processes_that_compile_at_once(folder: Path, linker: None) -> None:
    """Both get the kernel, and a third, later, finds it without a compiler."""
    code = (
        "import sys\n"
        "from fastdrop.backends.cuda import compile\n"
        f"name, code = compile.image(compile.Variant(*{tuple(SMALL)!r}), (9, 0))\n"
        "assert code.startswith(bytes([127]) + b'ELF') and name in code\n"
    )
    both = [start(code) for _ in range(2)]
    for process in both:
        process.communicate()
    assert [process.returncode for process in both] == [0, 0]
    later = start(code + "assert 'numba' not in sys.modules\n")
    later.communicate()
    assert later.returncode == 0
    assert len(list(folder.iterdir())) == 1


# ---- the model ----


@pytest.mark.parametrize("name", list(THRESHOLDS))
def test_expected_groups_by_trial(name: str) -> None:
    """For few cells, where all of a group's chances matter, against draws that are looked at bit by bit."""
    t, cells, trials = THRESHOLDS[name], 40, 20_000
    last = 8 - ((t & -t).bit_length() - 1) // 4
    draws = np.random.default_rng(7).integers(0, 1 << 32, (trials, cells), np.uint64)
    differ = draws ^ np.uint64(t)
    undecided_after = [((differ >> np.uint64(32 - 4 * group)) == 0).any(axis=1) for group in range(1, last)]
    drawn = 1 + np.sum(undecided_after, axis=0) if undecided_after else np.ones(trials)
    error = 5 * np.std(drawn) / math.sqrt(trials)
    assert report.expected_groups(t, cells) == pytest.approx(drawn.mean(), abs=error + 1e-12)


def test_expected_groups_of_a_tile() -> None:
    assert report.expected_groups(threshold(0.5)) == 1
    assert report.expected_groups(threshold(3 / 256)) == pytest.approx(2, abs=1e-9)
    # 1,024 / 256 cells are left on average after two groups, 1,024 / 4,096 after three, and so on.
    by_chance = sum(1 - (1 - 16.0**-group) ** 1024 for group in range(8))
    assert report.expected_groups(threshold(0.1)) == pytest.approx(by_chance)
    assert report.expected_groups(threshold(0.1)) == pytest.approx(3.2196, abs=1e-4)


def test_budget_of_a_plain_chip() -> None:
    """A chip of round numbers: 1,000 warp instructions per second beside 8,250 bytes per second."""
    chip = report.Chip("plain", sms=10, schedulers=2, hertz=50.0, bandwidth=8250.0)
    work = report.Work(instructions=16.0, multiplier=4.0, logic=6.0)
    budget = report.budget(4, work, chip)
    assert budget.bytes_per_element == 8.125
    assert budget.elements_per_second == pytest.approx(8250 / 8.125)
    assert budget.share == pytest.approx(16 * 8250 / 8.125 / 32 / 1000)
    assert budget.pipe_share == pytest.approx(2 * 6 * 8250 / 8.125 / 32 / 1000)
    assert report.bytes_per_element(2) == 4.125
    assert report.budget(4, work, chip, bits=0).elements_per_second == pytest.approx(8250 / 8)


# ---- reading machine code ----


def listing(*lines: str, name: str = "kernel") -> str:
    """As nvdisasm prints it; a line that ends in a colon is a label."""
    text, address = [f'\t.section\t.text.{name},"ax",@progbits', f"{name}:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
            text.append(f"        /*{address:04x}*/ {guard:>14} {rest} ;")
            address += 16
    return "\n".join(text)


def flow(*lines: str) -> Flow:
    return Flow(report.parse(listing(*lines), "kernel"))


NESTED = (
    "MOV R1, c[0x0][0x28]",
    "@P0 BRA `(.L_x_9)",
    ".L_x_1:",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "@!P1 BRA `(.L_x_3)",
    ".L_x_2:",
    "IMAD.WIDE.U32 R6, R6, -0x2daee0ad, RZ",
    "LOP3.LUT R7, R6, R5, RZ, 0x3c, !PT",
    "VOTE.ANY P0, P0",
    "@!P0 BRA `(.L_x_3)",
    "VIADD R41, R41, 0x1",
    "@!P2 BRA `(.L_x_2)",
    ".L_x_3:",
    "@P3 BRA `(.L_x_4)",
    "NOP",
    "NOP",
    ".L_x_4:",
    "@P4 STG.E desc[UR4][R8.64], R6",
    "STG.E.128 desc[UR4][R10.64], R4",
    "BRA.U !UP0, `(.L_x_1)",
    ".L_x_9:",
    "EXIT",
    ".L_x_10:",
    "BRA `(.L_x_10)",
)


def test_parse_reads_guards_operands_and_targets() -> None:
    code = report.parse(listing(*NESTED), "kernel")
    assert code[0] == Instruction("MOV", "R1, c[0x0][0x28]")
    assert code[1] == Instruction("BRA", "`(.L_x_9)", guarded=True, target=16)
    assert code[2].name == "LDG"
    assert (code[15].opcode, code[15].guarded, code[15].target) == ("BRA.U", True, 2)
    assert code[-1] == Instruction("BRA", "`(.L_x_10)", target=17)


def test_parse_takes_the_function_asked_for() -> None:
    text = listing("NOP", "NOP", "RET.ABS.NODEC R20 0x0", name="__helper") + "\n" + listing("MOV R1, R2", "EXIT")
    assert [one.opcode for one in report.parse(text, "kernel")] == ["MOV", "EXIT"]
    assert len(report.parse(text, "__helper")) == 3
    with pytest.raises(ValueError, match="no function other"):
        report.parse(text, "other")


def test_parse_reads_cuobjdump() -> None:
    """Addresses instead of labels, and each instruction's bits behind it."""
    text = """
        Function : kernel
        .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   S2R R0, SR_TID.X ;        /* 0x0000000000007919 */
                                                             /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.64 R2, desc[UR4][R2.64+0x10] ;  /* 0x0000000402027981 */
        /*0020*/              @!P0 BRA 0x10 ;                /* 0xfffffff000008947 */
        /*0030*/                   EXIT ;                    /* 0x000000000000794d */
        /*0040*/                   BRA 0x40;                 /* 0xfffffffc00fc7947 */
"""
    code = report.parse(text, "kernel")
    assert [one.target for one in code] == [None, None, 1, None, 4]
    (loop,) = Flow(code).loops
    assert [one.opcode for one in loop.instructions] == ["LDG.E.64", "BRA"]


def test_loops_are_nested() -> None:
    outer, inner = flow(*NESTED).loops
    assert (outer.head, len(outer.body)) == (2, 14)
    assert (inner.head, len(inner.body)) == (4, 6)
    assert outer.inner == [inner]
    assert inner.inner == []


@pytest.mark.parametrize("passes", [1.0, 3.25])
def test_path_goes_through_the_draw_and_by_the_shortest_way(passes: float) -> None:
    outer, _ = flow(*NESTED).loops
    around = 6  # load, test, branch over the two, guarded store, store, branch back
    costs = {(cost.draws, cost.stored): cost.work for cost in outer.paths(passes, wide=16)}
    assert costs[1, 16].instructions == around + 6 * passes
    assert costs[1, 16].multiplier == passes
    assert costs[1, 16].logic == 2 * passes
    assert costs[0, 16].instructions == around
    dearest = {(cost.draws, cost.stored): cost.work for cost in outer.paths(passes, wide=16, dearest=True)}
    assert dearest[1, 16].instructions == around + 2 + 6 * passes


def test_side_path_of_apart_lanes_belongs_to_the_loop_and_costs_nothing() -> None:
    (loop,) = flow(
        ".L_x_1:",
        "BRA.DIV UR14, `(.L_x_5)",
        "VOTE.ANY P1, P1",
        ".L_x_2:",
        "STG.E.128 desc[UR4][R10.64], R4",
        "@!P1 BRA `(.L_x_1)",
        "EXIT",
        ".L_x_5:",
        "WARPSYNC.COLLECTIVE R14, `(.L_x_7)",
        "VOTE.ANY P1, P1",
        "ENDCOLLECTIVE",
        ".L_x_7:",
        "BRA `(.L_x_2)",
    ).loops
    assert "WARPSYNC.COLLECTIVE" in {one.opcode for one in loop.instructions}
    (cost,) = loop.paths(1, wide=16, dearest=True)
    assert cost.work.instructions == 4


def test_call_that_only_jumps_far_leaves_the_loop() -> None:
    """As for compute capability 8.0, where a loop may end so."""
    (loop,) = flow(
        ".L_x_1:",
        "STG.E desc[UR4][R10.64], R4",
        "@P0 CALL.REL.NOINC `(.L_x_2)",
        "BRA `(.L_x_1)",
        ".L_x_2:",
        "EXIT",
    ).loops
    assert len(loop.body) == 3
    assert loop.calls == []
    (cost,) = loop.paths(1, wide=4)
    assert cost.work.instructions == 3


def test_call_of_a_function_comes_back() -> None:
    (loop,) = flow(
        ".L_x_1:",
        "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_u64)",
        "STG.E desc[UR4][R10.64], R4",
        "@P0 BRA `(.L_x_1)",
        "EXIT",
        "$__internal_0_$__cuda_sm20_div_u64:",
        "MOV R4, R5",
        "RET.REL.NODEC R4 `(kernel)",
    ).loops
    assert [one.name for one in loop.instructions] == ["CALL", "STG", "BRA"]
    assert [one.name for one in loop.calls] == ["CALL"]


def test_jump_back_from_cold_code_is_no_loop() -> None:
    assert flow("@P0 BRA `(.L_x_2)", ".L_x_1:", "NOP", "EXIT", ".L_x_2:", "NOP", "BRA `(.L_x_1)").loops == []


@pytest.mark.parametrize(
    ("opcode", "size"),
    [("LDG.E.128", 16), ("STG.E.64", 8), ("LDG.E", 4), ("LDG.E.U16.CONSTANT", 2), ("STG.E.U8", 1), ("STL.128", 16)],
)
def test_width_of_an_access(opcode: str, size: int) -> None:
    assert report.widest([Instruction(opcode), Instruction("LDS.U8")], opcode.split(".")[0]) == size


def test_width_without_an_access() -> None:
    assert report.widest([Instruction("MOV")], "LDG") == 0


def test_what_ptxas_says() -> None:
    log = """ptxas info    : Compiling entry function 'kernel' for 'sm_90'
ptxas info    : Function properties for helper
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 60 registers, used 0 barriers
"""
    assert report.ptxas_resources(log) == report.Resources(60, 16, 4, 8)
    with pytest.raises(ValueError, match="registers"):
        report.ptxas_resources("nothing")


def test_report_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "missing", lambda: "numba_cuda is not installed: pip install 'fastdrop[cuda]'")
    assert report.main([]) == 1
    assert "numba_cuda is not installed" in capsys.readouterr().out

"""Checks the CUDA kernels' machine code, compiled for GPUs that needn't be here, and how it is kept on disk."""

from __future__ import annotations

import functools
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import machine_code
from bench.gpu.machine_code import Code, Instruction
from fastdrop.backends.cuda import compile
from fastdrop.backends.cuda.compile import Capability, Variant
from fastdrop.backends.cuda.tile import ITEM_BYTES
from fastdrop.core.activations import NONE, RELU, SILU
from fastdrop.core.checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from fastdrop.core.installing import how_to_install

from ...cases import ROOT

SMALL = Variant("strided", FLOAT32, "narrow")  # a tenth of a second to compile
HOPPER: Capability = (9, 0)

# An SM's 65,536 registers are enough for 32 warps of 64 a thread. A float64 lane has as many elements under way as a
# float32 one, in twice the registers, so that 16 warps (128 a thread) ask memory for as many bytes at once.
REGISTERS = {FLOAT32: 64, FLOAT64: 128, FLOAT16: 64, BFLOAT16: 64}
ROW_REGISTERS = {FLOAT32: 48, FLOAT64: 64, FLOAT16: 80, BFLOAT16: 80}

# Compiling takes seconds each. These are not tested because others have all of their code and at least as many
# registers (`make cuda-report` tables all): bfloat16 for float16, drawn for stored, stored for affine, GELU for less.
PART_OF_OTHERS = {
    *(Variant("elementwise", FLOAT16, form) for form in ("drawn", "stored")),
    Variant("elementwise", FLOAT64, "stored"),
    *(Variant("elementwise", FLOAT32, form, plain=False) for form in ("drawn", "drawn_shifted")),
    Variant("gaussian_multiply", FLOAT16),
    *(Variant("pointwise_forward", BFLOAT16, residual_dtype=BFLOAT16, activation=code) for code in (NONE, RELU)),
}
TESTED = [variant for variant in machine_code.VARIANTS + machine_code.ROWS if variant not in PART_OF_OTHERS]
# Linkers' code for shuffles and votes differs by capability: these have them.
WARPS = [Variant("draw_words"), *(Variant("elementwise", dtype, "drawn") for dtype in (FLOAT32, BFLOAT16))]
WARPS += [Variant("norm_forward", BFLOAT16, "wide", residual_dtype=FLOAT32), Variant("gaussian_multiply", BFLOAT16)]
# Functions of the compiler's: for roots, inverses and quotients that aren't normal numbers, and where a block's task
# begins.
CALLED = r"sqrt_rn_f32_slowpath|__cuda_sm\d+x?_(?:d?sqrt|(?:dbl)?rcp|div)_rn_|__cuda_sm20_(?:div|rem)_u64"


@pytest.fixture
def linker() -> None:
    for package in ("numba_cuda", "cuda.bindings.nvjitlink"):
        pytest.importorskip(package, reason=f"compiling needs {package}: {how_to_install('cuda')}")


@pytest.fixture
def tools() -> None:
    lacking = machine_code.missing()
    if lacking:
        pytest.skip(lacking)


linked = functools.cache(machine_code.linked)


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
            translated(variant, HOPPER if new else compile.OLDEST, "ptx")
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


def assert_sound(code: Code) -> None:
    """Nothing is spilled, nothing but the compiler's own functions is called, parameters lie where they are packed."""
    variant, cubin = code.variant, code.cubin
    assert (code.spilled, cubin.stack) == (0, 0)
    assert not [one for one in code.listing if one.name in ("LDL", "STL")]
    assert variant.body == "count_bits" or not [one for one in code.listing if one.name in ("ATOM", "ATOMG", "RED")]
    calls = [one.operands for one in code.listing if one.name == "CALL" and "($" in one.operands]
    assert all(re.search(CALLED, to) for to in calls), calls
    codes = variant.codes
    ends = [struct.calcsize("@" + codes[: i + 1]) for i in range(len(codes))]
    sizes = [struct.calcsize(one) for one in codes]
    assert cubin.parameters == [(end - size, size) for end, size in zip(ends, sizes, strict=True)]
    assert compile.packer(variant).size == ends[-1]


@pytest.mark.slow("test_draw_bits_thresholds")
@pytest.mark.parametrize("variant", TESTED, ids=str)
def test_machine_code(variant: Variant, tools: None) -> None:
    code = linked(variant, HOPPER)
    assert_sound(code)
    assert code.cubin.registers <= (ROW_REGISTERS if variant.on_rows else REGISTERS)[variant.dtype]
    if variant.form == "narrow" or variant.body == "gaussian_multiply":
        assert code.store == ITEM_BYTES[variant.dtype]
    elif variant.body not in ("draw_words", *machine_code.BITS_ALONE):
        assert (code.load, code.store) == (16, 16)


@pytest.mark.slow("test_draw_bits_thresholds")
@pytest.mark.parametrize(
    ("variant", "cc"),
    [
        *((variant, cc) for variant in WARPS for cc in ((7, 5), (12, 0))),
        *((WARPS[0], cc) for cc in ((8, 0), (10, 0))),
    ],
    ids=lambda one: str(one) if isinstance(one, Variant) else capability(one),
)
def test_machine_code_of_other_capabilities(variant: Variant, cc: Capability, tools: None) -> None:
    """A linker that is given PTX calls a function for each shuffle below 9.0, and takes 144 registers."""
    code = linked(variant, cc)
    assert_sound(code)
    assert code.cubin.registers <= 80


def test_noise_is_rounded_at_each_step(tools: None) -> None:
    """Nothing is contracted, in PTX or after it: what multiplies and adds at once are the steps of two roots."""
    variant = Variant("gaussian_multiply", FLOAT32)
    arithmetic = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt)\.\S*f32\b", compile.ptx(variant, HOPPER)))
    assert arithmetic == {"add.rn.f32", "mul.rn.f32", "sqrt.rn.f32"}
    code = [one.opcode for one in linked(variant, HOPPER).listing]
    roots = sum(opcode.startswith("MUFU") for opcode in code)
    assert sum(opcode.split(".")[0] == "FFMA" for opcode in code) <= 4 * roots


# ---- what is kept on disk ----


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("FASTDROP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What a stand-in for the compilers has compiled, one entry each time."""
    done: list[bytes] = []

    def link(source: bytes, cc: Capability) -> bytes:
        done.append(source)
        return b"\0.nv.info.kernel\0" + source

    monkeypatch.setattr(compile, "intermediate", lambda variant, cc: f"{variant} {cc}".encode())
    monkeypatch.setattr(compile, "cubin", link)
    return done


def test_image_is_kept_per_variant_and_capability(folder: Path, compiled: list[bytes]) -> None:
    changes = ({}, {"dtype": FLOAT64}, {"form": "wide"}, {"plain": False}, {"counted": True})
    wanted = [(SMALL, (8, 0)), *((SMALL._replace(**change), HOPPER) for change in changes)]
    images = [compile.image(variant, cc) for variant, cc in wanted]
    assert [name for name, _ in images] == [b"kernel"] * len(wanted)
    assert len({code for _, code in images}) == len(compiled) == len(wanted)
    assert [compile.image(variant, cc) for variant, cc in wanted] == images
    assert len(compiled) == len(list(folder.iterdir())) == len(wanted)


def test_the_driver_compiles_where_there_is_no_linker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> bytes:
        raise RuntimeError("no linker")

    monkeypatch.setattr(compile, "cubin", none)
    name, code = compile.image(SMALL, HOPPER)
    assert code.endswith(b"\0")  # the driver reads on to there
    assert b".entry " + name in code
    assert not list(folder.glob("*"))  # there may be one next time
    monkeypatch.setattr(compile, "ptx", none)
    with pytest.raises(RuntimeError, match=r"can't be compiled here \(no linker\): pip install"):
        compile.image(SMALL, HOPPER)


def test_damaged_image_is_compiled_again(folder: Path, compiled: list[bytes]) -> None:
    whole = compile.image(SMALL, HOPPER)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    damaged = [bytes([content[0] ^ 0x10]) + content[1:], content[:-1] + bytes([content[-1] ^ 0x10])]
    for number, damage in enumerate([b"", content[:-1], *damaged], 2):
        file.write_bytes(damage)
        for _ in range(2):
            assert compile.image(SMALL, HOPPER) == whole
            assert len(compiled) == number


def test_image_where_the_disk_refuses_it(
    tmp_path: Path, folder: Path, compiled: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    whole = compile.image(SMALL, HOPPER)
    (file,) = folder.iterdir()
    file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert compile.image(SMALL, HOPPER) == whole
    assert list(folder.iterdir()) == []
    file.mkdir()  # a folder in its way
    assert compile.image(SMALL, HOPPER) == whole
    assert list(folder.iterdir()) == [file]
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FASTDROP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert compile.image(SMALL, HOPPER) == whole
    assert len(compiled) == 4


def test_processes_that_compile_at_once(folder: Path, linker: None) -> None:
    """Both get the kernel, and a third, later, finds it without a compiler."""
    code = (
        "import sys\n"
        "from fastdrop.backends.cuda import compile\n"
        f"name, code = compile.image(compile.Variant(*{tuple(SMALL)!r}), (9, 0))\n"
        "assert code.startswith(bytes([127]) + b'ELF') and name in code\n"
    )

    def start(code: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})

    assert [process.wait() for process in [start(code) for _ in range(2)]] == [0, 0]
    assert start(code + "assert 'numba' not in sys.modules\n").wait() == 0
    assert len(list(folder.iterdir())) == 1


# ---- the report ----


def test_report_has_each_kernel_once() -> None:
    variants = machine_code.VARIANTS + machine_code.ROWS
    assert {variant.body for variant in variants} == {*compile.PARAMETERS, *compile.ROW_PARAMETERS}
    assert len({machine_code.name(variant) for variant in variants}) == len(variants)
    on_float32 = Variant("norm_forward", BFLOAT16, "wide", residual_dtype=FLOAT32)
    assert machine_code.name(on_float32) == "norm_forward wide, bfloat16 on float32"
    silu = Variant("pointwise_backward", FLOAT16, residual_dtype=FLOAT16, activation=SILU)
    assert machine_code.name(silu) == "pointwise_backward, float16, silu"


NVDISASM = """\t.section\t.text.other,"ax",@progbits
        /*0000*/                   NOP ;
\t.section\t.text.kernel,"ax",@progbits
kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/              @!P0 STG.E.U16.STRONG desc[UR4][R8.64], R6 ;
        /*0020*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_u64) ;
"""
CUOBJDUMP = """
        Function : kernel
        .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   LDL R2, [R1] ;        /* 0x0000000402027981 */
                                                         /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x10 ;            /* 0xfffffff000008947 */
"""


def test_listings_are_read() -> None:
    code = machine_code.parse(NVDISASM, "kernel")
    assert [one.opcode for one in code] == ["LDG.E.128", "STG.E.U16.STRONG", "CALL.REL.NOINC"]
    assert code[2].operands == "`($__internal_0_$__cuda_sm20_div_u64)"
    assert [machine_code.widest(code, name) for name in ("LDG", "STG", "STL")] == [16, 2, 0]
    assert machine_code.parse(CUOBJDUMP, "kernel") == [Instruction("LDL", "R2, [R1]"), Instruction("BRA", "0x10")]
    with pytest.raises(ValueError, match="no function absent"):
        machine_code.parse(NVDISASM, "absent")


def test_report_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "missing", lambda: "numba_cuda is not installed: get it")
    assert machine_code.main([]) == 1
    assert "numba_cuda is not installed" in capsys.readouterr().out

"""Reads and sets the calling thread's floating-point modes: how it rounds, and whether it flushes subnormals to zero.

`threads` reads the modes of the caller's thread and sets them on the threads that help, as csrc/threads.c does, so any
number of threads gives the bits of one. The modes are MXCSR on x86, without its flags, and FPCR on Arm; on other CPUs
nothing is carried over.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (typed by Numba)

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, extending

from .scalars import kernel

intrinsic: Any = extending.intrinsic
LONG, WORD = ir.IntType(64), ir.IntType(32)
MACHINE = platform.machine().lower()
MXCSR_FLAGS = 0x3F  # what has happened, not how to compute


# LLVM's intrinsics and no inline assembly: on Arm LLVM may lack the parser for it, and would then abort.


def _mxcsr(builder: Any, instruction: str, slot: Any) -> None:
    """Stores the register to memory, or loads it from there."""
    byte = ir.IntType(8).as_pointer()
    _call(builder, ir.VoidType(), f"llvm.x86.sse.{instruction}", builder.bitcast(slot, byte))


def _call(builder: Any, result: Any, name: str, *operands: Any) -> Any:
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def _read(builder: Any) -> Any:
    if MACHINE in ("x86_64", "amd64"):
        slot = cgutils.alloca_once(builder, WORD)
        _mxcsr(builder, "stmxcsr", slot)
        return builder.zext(builder.and_(builder.load(slot), WORD(~MXCSR_FLAGS & 0xFFFFFFFF)), LONG)
    if MACHINE in ("aarch64", "arm64"):
        return _call(builder, LONG, "llvm.aarch64.get.fpcr")
    return LONG(0)


def _write(builder: Any, modes: Any) -> None:
    if MACHINE in ("x86_64", "amd64"):
        slot = cgutils.alloca_once_value(builder, builder.trunc(modes, WORD))
        _mxcsr(builder, "ldmxcsr", slot)
    elif MACHINE in ("aarch64", "arm64"):
        _call(builder, ir.VoidType(), "llvm.aarch64.set.fpcr", modes)


@intrinsic  # type: ignore[untyped-decorator]
def _read_modes(typingctx: Any) -> Any:
    return types.int64(), lambda context, builder, signature, args: _read(builder)


@intrinsic  # type: ignore[untyped-decorator]
def _write_modes(typingctx: Any, modes: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _write(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


# Python calls these functions: within a kernel LLVM might move arithmetic past them.
@kernel
def float_modes():
    return _read_modes()


@kernel
def set_float_modes(modes):
    _write_modes(modes)

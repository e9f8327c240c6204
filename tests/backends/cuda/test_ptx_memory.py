"""Tests which accesses to memory the PTX interpreter allows, and which races it finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from . import ptx
from .ptx_running import aligned, entry, launch

COPY = """
    .reg .b64 %a, %b, %o; .reg .b32 %i; .reg .b32 %r<4>;
    mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
    mul.wide.u32 %o, %i, SIZE; add.s64 %a, %a, %o; add.s64 %b, %b, %o;
    ld.global.TYPE GROUP, [%a]; st.global.TYPE [%b], GROUP;
"""


def copying(type: str, size: int, group: str) -> str:
    """A kernel that copies so many bytes a thread, from p0 to p1."""
    body = COPY.replace("SIZE", str(size)).replace("GROUP", group).replace("TYPE", type)
    return entry(body, ["u64", "u64"])


COPY_4, COPY_16 = copying("u32", 4, "%r0"), copying("v4.u32", 16, "{%r0, %r1, %r2, %r3}")


def faults(what: str) -> Any:
    return pytest.raises(ptx.Fault, match=what)


def races(who: str) -> Any:
    return pytest.raises(ptx.Race, match=who)


def test_access_out_of_bounds_is_a_fault() -> None:
    x, y = aligned(64, np.uint32), aligned(64, np.uint32)
    parameters = np.array([x.ctypes.data, y.ctypes.data], np.uint64).tobytes()

    def run(*arrays: Any, text: str = COPY_4, threads: int = 64) -> None:
        ptx.Machine(arrays).launch(text, 1, threads, parameters)

    run(x, y)
    with pytest.raises(ValueError, match="has 16 bytes of parameters, but got 15"):
        ptx.Machine([x, y]).launch(COPY_4, 1, 64, parameters[:-1])
    pattern = rf"outside.*load from {x.ctypes.data + 252:#x}, by thread 63 of block 0, at: ld\.global\.u32 %r0, \[%a\];"
    with faults(pattern):
        run(x[:63], y)
    with faults(rf"outside.*load from {x.ctypes.data:#x}, by thread 0"):
        run(x[1:], y)
    with faults(rf"outside.*store to {y.ctypes.data:#x}"):
        run(x)
    with faults(rf"outside.*{x.ctypes.data + 16:#x}"):  # straddles the end
        run(x[:7], y, text=COPY_16, threads=2)
    y.flags.writeable = False
    with faults(f"read-only memory: store to {y.ctypes.data:#x}"):
        run(x, y)


def test_misaligned_access_is_a_fault() -> None:
    x, y = aligned(64, np.uint32), aligned(64, np.uint32)
    for arrays, what in (((x[1:], y), "load from"), ((x, y[2:]), "store to")):
        with faults(f"misaligned for 16 bytes: {what} .*, by thread 0 of block 0"):
            launch(COPY_16, arrays, threads=2)


# ---- races ----


def store_at(index: str, load: bool = False) -> str:
    """Thread i stores to word ``index`` of p0, then loads word i of p1 and stores it there."""
    body = f"""
        .reg .b64 %a, %b, %o; .reg .b32 %i, %j, %r, %n, %c;
        mov.u32 %i, %tid.x; mov.u32 %n, %ntid.x; mov.u32 %c, %ctaid.x; mul.lo.s32 %c, %c, %n; add.s32 %i, %i, %c;
        ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
        {index}
        mul.wide.u32 %o, %j, 4; add.s64 %a, %a, %o; mul.wide.u32 %o, %i, 4; add.s64 %b, %b, %o;
        st.global.u32 [%a], %i; {"ld.global.u32 %r, [%b]; st.global.u32 [%b], %r;" if load else ""}
    """
    return entry(body, ["u64", "u64"])


def test_two_writers_race() -> None:
    x, y = np.zeros(9000, np.uint32), np.zeros(9000, np.uint32)
    launch(store_at("mov.u32 %j, %i;"), [x, y], blocks=90, threads=100)
    with races(rf"writes {x.ctypes.data + 200:#x}, which thread (0|50) of block 0 accessed, by thread (50|0) of block"):
        launch(store_at("rem.u32 %j, %i, 50; add.s32 %j, %j, 50;"), [x, y], threads=100)  # in one instruction
    apart = ptx.THREADS_AT_ONCE // 100  # blocks that don't run together
    with races(rf"writes {x.ctypes.data:#x}, which thread 0 of block 0 accessed, by thread 0 of block {apart}"):
        launch(store_at(f"rem.u32 %j, %i, {100 * apart};"), [x, y], blocks=apart + 3, threads=100)


def test_reader_and_writer_race() -> None:
    x = np.zeros(200, np.uint32)
    launch(store_at("mov.u32 %j, %i;", load=True), [x, x], threads=100)  # its own byte a thread may access again
    with races(rf"reads {x.ctypes.data + 4:#x}, which thread 0 of block 0 accessed, by thread 1 of block 0"):
        launch(store_at("add.s32 %j, %i, 1;", load=True), [x, x], threads=100)


def test_writing_what_others_read_is_a_race() -> None:
    body = """
        .reg .b64 %a; .reg .b32 %i, %r; .reg .pred %p;
        mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; ld.global.u32 %r, [%a]; setp.ne.s32 %p, %i, 5;
        @%p bra DONE;
        st.global.u32 [%a], %r;
        DONE: ret;
    """
    x = np.zeros(4, np.uint32)
    with races(rf"writes {x.ctypes.data:#x}, which several threads accessed, by thread 5 of block 0"):
        launch(entry(body, ["u64"]), [x])


def test_races_are_found_by_the_access() -> None:
    """Neighbours within a word are no race; a wide access meets a narrow one inside it."""
    body = """
        .reg .b64 %a, %b; .reg .b32 %i; .reg .pred %p;
        mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; mul.wide.u32 %b, %i, 2; add.s64 %b, %a, %b;
        st.global.u16 [%b], %i; setp.ne.s32 %p, %i, 31;
        @%p bra DONE;
        ld.global.u64 %b, [%a+PLACE];
        DONE: ret;
    """
    x = aligned(48, np.uint16)
    launch(entry(body.replace("PLACE", "64"), ["u64"]), [x])
    np.testing.assert_array_equal(x[:32], np.arange(32))
    with races(f"reads {x.ctypes.data + 48:#x}, which thread 24 of block 0 accessed, by thread 31"):
        launch(entry(body.replace("PLACE", "48"), ["u64"]), [x])


ADD = """
    .reg .b64 %a, %b, %i, %r; .reg .b32 %t;
    mov.u32 %t, %tid.x; cvt.u64.u32 %i, %t; ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
    shl.b64 %r, %i, 3; add.s64 %b, %b, %r; and.b64 %r, %r, 8; add.s64 %a, %a, %r;
    BEFORE atom.global.add.u64 %r, [%a], %i; AFTER
    st.global.u64 [%b], %r;
"""


def adding(before: str = "", after: str = "") -> str:
    return entry(ADD.replace("BEFORE", before).replace("AFTER", after), ["u64", "u64"])


def test_atomic_addition() -> None:
    sums, before = np.array([2**32 - 1, 7], np.uint64), np.zeros(64, np.uint64)
    launch(adding(), [sums, before], threads=64)
    assert sums.tolist() == [2**32 - 1 + sum(range(0, 64, 2)), 7 + sum(range(1, 64, 2))]
    assert before[:6].tolist() == [2**32 - 1, 7, 2**32 - 1, 8, 2**32 + 1, 11]
    with races(f"reads {sums.ctypes.data:#x}, which an atomic accessed, by thread 0 of block 0"):
        launch(adding(after="ld.global.u64 %i, [%a];"), [sums, before], threads=64)
    with races(f"writes {sums.ctypes.data:#x}, which several threads accessed"):
        launch(adding("ld.global.u64 %r, [%a];"), [sums, before], threads=64)

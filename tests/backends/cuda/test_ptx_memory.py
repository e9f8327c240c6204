"""Tests which accesses to memory the PTX interpreter allows, and which races it finds."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from . import ptx
from .ptx_running import BITS, TYPES, aligned, assembled, bits_of, entry, launch, same_bits, samples

__all__ = ["assembled"]

# ---- memory ----

COPY = """
    .reg .b64 %a, %b; .reg .b32 %i; .reg .REGISTER %r<4>;
    mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
    mad.wide.u32 %a, %i, SIZE, %a; mad.wide.u32 %b, %i, SIZE, %b;
    ld.global.TYPE GROUP, [%a]; st.global.TYPE [%b], GROUP;
"""


def copying(type: str, count: int = 1) -> str:
    """A kernel that copies ``count`` numbers a thread, from p0 to p1."""
    group = f"{{{', '.join(f'%r{i}' for i in range(count))}}}" if count > 1 else "%r0"
    register = type if type[0] == "f" else f"b{max(16, bits_of(type))}"
    body = COPY.replace("SIZE", str(count * bits_of(type) // 8)).replace("GROUP", group).replace("REGISTER", register)
    return entry(body.replace("TYPE", f"v{count}.{type}" if count > 1 else type), ["u64", "u64"])


COPY_4, COPY_16 = copying("u32"), copying("u32", 4)


def faults(what: str) -> Any:
    return pytest.raises(ptx.Fault, match=what)


def test_loads_and_stores() -> None:
    for type in ("u8", "s8", *BITS, *TYPES, "f32", "f64"):
        for count in (1, 2, 4):
            if count * bits_of(type) <= 128:
                x, y = (aligned(50 * count, ptx.DTYPES[type]) for _ in range(2))
                x[:] = samples(type, n=50 * count)
                launch(copying(type, count), [x, y], threads=50)
                same_bits(y, x)


@pytest.mark.parametrize("type", ["u8", "s8", "u16", "s16", "u32", "s32"])
def test_narrow_loads_extend_and_narrow_stores_truncate(type: str) -> None:
    body = f"""
        .reg .b64 %x, %a, %b; .reg .b32 %i;
        mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
        mad.wide.u32 %a, %i, {bits_of(type) // 8}, %a; mad.wide.u32 %b, %i, 8, %b;
        ld.global.{type} %x, [%a]; st.global.u64 [%b], %x; st.global.{type} [%a+0], %x;
    """
    x, y = samples(type, n=100), aligned(100, np.int64)
    before = x.copy()
    launch(entry(body, ["u64", "u64"]), [x, y], threads=100)
    np.testing.assert_array_equal(y, before.astype(np.int64))
    np.testing.assert_array_equal(x, before)


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

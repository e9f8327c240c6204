"""Tests that the PTX interpreter runs threads apart and together as a GPU does, and what it refuses.

That it computes what kernels need is shown by the tests of the kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from . import ptx
from .ptx_running import entry, launch


def faults(what: str) -> Any:
    return pytest.raises(ptx.Fault, match=what)


# ---- control flow ----


def test_endless_loops_are_ended() -> None:
    with faults("still running"):
        launch(entry("LOOP: bra LOOP;"), [], steps=1000)


def test_counts_are_of_warps() -> None:
    """70 threads are three warps; the loop runs as often as the slowest lane of each."""
    body = """
        .reg .b32 %i, %n; .reg .pred %p;
        mov.u32 %i, %tid.x; mov.u32 %n, 0;
        LOOP: add.s32 %n, %n, 32; setp.lt.u32 %p, %n, %i; @%p bra LOOP;
        setp.ge.u32 %p, %i, 40;
        @%p ret;
        @%p not.b32 %n, %n;
        ret;
    """
    looping = dict.fromkeys(("add.s32", "setp.lt.u32", "bra"), 1 + 2 + 3)
    expected = {"mov.u32": 6, **looping, "setp.ge.u32": 3, "not.b32": 2, "ret": 3 + 2}
    assert launch(entry(body), [], threads=70) == expected


# ---- warps ----


WARP_BODY = """
    .reg .b32 %i, %r; .reg .pred %p; .reg .b64 %a, %o;
    mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; mul.wide.u32 %o, %i, 4; add.s64 %a, %a, %o; mov.u32 %r, 7;
    setp.ge.u32 %p, %i, 16;
"""


@pytest.mark.parametrize("leave", ["ret", "bra DONE", "bra THERE"])
def test_lanes_that_left_are_not_waited_for(leave: str) -> None:
    x = np.zeros(32, np.uint32)
    vote = "setp.lt.u32 %p, %i, 99; vote.sync.any.pred %p, %p, -1; selp.b32 %r, 5, 6, %p; st.global.u32 [%a], %r;"
    launch(entry(WARP_BODY + f"@%p {leave}; {vote} bra DONE; THERE: bra DONE; DONE: ret;", ["u64"]), [x])
    np.testing.assert_array_equal(x, np.where(np.arange(32) < 16, 5, 0))


def test_lanes_wait_for_those_that_come_later() -> None:
    """Lanes that continue early reach the shuffle, at a lower program counter, before the rest of the loop has run."""
    body = """
        .reg .b32 %k, %v, %sum; .reg .pred %more;
        mov.u32 %k, 0; mov.u32 %sum, 0;
        LOOP:
        mov.u32 %v, 0;
        shfl.sync.idx.b32 %v, %i, 31, 31, -1;
        add.s32 %sum, %sum, %v;
        add.s32 %k, %k, 1;
        setp.gt.u32 %more, %k, 3;
        @%more bra DONE;
        @%p bra LOOP;
        add.s32 %sum, %sum, 1000;
        bra LOOP;
        DONE: st.global.u32 [%a], %sum;
    """
    x = np.zeros(32, np.uint32)
    counts = launch(entry(WARP_BODY + body, ["u64"]), [x])
    np.testing.assert_array_equal(x, 4 * 31 + np.where(np.arange(32) < 16, 3000, 0))
    assert counts["shfl.sync.idx.b32"] == 4
    assert counts["mov.u32"] == 4 + 1 + 2 * 3  # together once, then those who wait and those who come


@pytest.mark.parametrize(
    ("code", "threads", "what"),
    [
        ("@%p bra DONE; vote.sync.any.pred %p, %p, -1; DONE: st.global.u32 [%a], %r;", 32, "lanes of the warp never"),
        ("shfl.sync.idx.b32 %r, %r, 31, 31, -1;", 31, "reads lane 31, which is not there, by thread 0"),
        ("div.u32 %r, %r, %i;", 32, r"division by zero, by thread 0 of block 0, at: div\.u32 %r, %r, %i;"),
    ],
    ids=["never come", "no lane", "division"],
)
def test_what_is_undefined_is_a_fault(code: str, threads: int, what: str) -> None:
    with faults(what):
        launch(entry(WARP_BODY + code, ["u64"]), [np.zeros(32, np.uint32)], threads=threads)


# ---- blocks ----

# Threads write a word of their block's memory each, and read that of the one as far from the end.
SHARED_BODY = """
.shared .align 8 .b8 before[8];
.shared .align 4 .b8 tile[256];
.reg .b32 %i, %n, %r; .reg .b64 %a, %at, %w; .reg .pred %p;
ld.param.u64 %a, [p0];
mov.u32 %i, %tid.x; mov.u32 %n, %ntid.x;
setp.ge.u32 %p, %i, 32;
mul.wide.u32 %w, %i, 4; mov.u64 %at, tile; add.s64 %at, %at, %w;
st.shared.u32 [%at], %i;
WAIT
sub.s32 %r, %n, %i;
mul.wide.u32 %w, %r, 4; mov.u64 %at, tile; add.s64 %at, %at, %w;
ld.shared.u32 %r, [%at+-4];
mov.u32 %n, %ctaid.x; mul.lo.s32 %n, %n, 64; add.s32 %i, %i, %n;
mul.wide.u32 %w, %i, 4; add.s64 %a, %a, %w;
st.global.u32 [%a], %r;
ret;
"""


def shared(wait: str) -> str:
    return entry(SHARED_BODY.replace("WAIT", wait), ["u64"])


def test_blocks_share_memory_of_their_own() -> None:
    out = np.zeros(3 * 64, np.uint32)
    executed = launch(shared("bar.sync 0;"), [out], blocks=3, threads=64)
    assert out.reshape(3, 64).tolist() == [list(range(63, -1, -1))] * 3
    assert executed["bar.sync"] == 3 * 2


def test_only_a_barrier_orders_shared_memory() -> None:
    again = "bar.sync 0; ld.shared.u32 %r, [tile]; bar.sync 0; st.shared.u32 [%at], %i; bar.sync 0;"
    launch(shared(again), [np.zeros(64, np.uint32)], threads=64)
    for wait, who in (("", "thread .* of block 0"), (again.replace("bar.sync 0; st", "st"), "several threads")):
        with pytest.raises(ptx.Race, match=f"which {who} accessed"):
            launch(shared(wait), [np.zeros(64, np.uint32)], threads=64)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (
            "setp.lt.u32 %p, %i, 32; @%p bra END; bar.sync 0; END: ret;",
            "threads of the block never come here, by thread 32 of block 0, at: bar",
        ),
        ("bar.sync 0; ld.shared.u32 %r, [tile+-12];", "outside of the memory allowed"),
        ("bar.sync 0; ld.shared.u32 %r, [tile+256];", "outside of the memory allowed"),
    ],
)
def test_faults_of_blocks(code: str, what: str) -> None:
    with faults(what):
        launch(shared(code), [np.zeros(64, np.uint32)], threads=64)


# ---- what is not known ----


@pytest.mark.parametrize(
    "line",
    [
        "sin.approx.f32 %f0, %f1;",
        "add.rz.f32 %f0, %f1, %f2;",
        "add.s32 %r0, %rd1, %r2;",
        "add.s32 %r0, %r1;",
        "add.s32 %r0, %unknown, %r2;",
        "cvt.f32.f64 %f0, %d0;",
        "setp.ltu.s32 %p0, %r0, %r1;",
        "ld.local.u32 %r0, [%rd1];",
        "ld.global.v4.u32 {%r0, %r1, %r2}, [%rd3];",
        "atom.global.add.u32 %r0, [%rd0], 1;",
        "bar.sync 1;",
        "vote.sync.any.pred %p0, %p1, 255;",
        "mov.u32 %tid.x, %r0;",
        "bra nowhere;",
        ".local .align 8 .b8 __local_depot0[16];",
    ],
)
def test_what_is_not_known_is_named(line: str) -> None:
    declared = ".reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .f32 %f<4>; .reg .f64 %d<4>; .reg .b16 %h<4>; .reg .pred %p<4>;"
    with pytest.raises(ptx.Unsupported) as error:
        ptx.Machine([]).launch(entry(f"{declared} {line} ret;"), 1, 32, b"")
    assert line in str(error.value)


def test_one_entry_is_expected() -> None:
    with pytest.raises(ptx.Unsupported, match=r"one \.entry is expected, not 2"):
        ptx.Machine([]).launch(entry("ret;") + entry("ret;", name="other"), 1, 32, b"")

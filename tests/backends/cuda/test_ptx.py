"""Tests how the PTX interpreter runs kernels: registers, branches, warps, barriers; and what it refuses."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from . import ptx
from .ptx_running import (
    RNG_SEED,
    aligned,
    assembled,
    entry,
    evaluate,
    handwritten,
    integers,
    launch,
    samples,
)

__all__ = ["assembled"]

# ---- moves, scopes, parameters, special registers ----


def test_mov_packs_and_unpacks() -> None:
    a, b = samples("b16"), samples("b16", 1)
    packed = a.astype(np.uint32) | b.astype(np.uint32) << 16
    np.testing.assert_array_equal(evaluate("mov.b32 $d, {$a, $b};", "b32", ("b16", a), ("b16", b)), packed)
    np.testing.assert_array_equal(evaluate("mov.b32 {_, $d}, $a;", "b16", ("b32", packed)), b)
    half = ".reg .b16 %x; mov.b32 {$d, %x}, $a;"
    np.testing.assert_array_equal(evaluate(half, "b16", ("b32", packed)), a)
    x, y = samples("b32"), samples("b32", 1)
    packed = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    np.testing.assert_array_equal(evaluate("mov.b64 $d, {$a, $b};", "b64", ("b32", x), ("b32", y)), packed)
    np.testing.assert_array_equal(evaluate("mov.b64 {_, $d}, $a;", "b32", ("b64", packed)), y)
    four = ".reg .b16 %w<4>; mov.b64 {%w0, %w1, %w2, %w3}, $a; mov.b64 $d, {%w3, %w2, %w1, %w0};"
    swapped = packed.view(np.uint16).reshape(-1, 4)[:, ::-1].copy().view(np.uint64)[:, 0]
    np.testing.assert_array_equal(evaluate(four, "b64", ("b64", packed)), swapped)


def test_braces_scope_registers_and_labels() -> None:
    once = "{ .reg .b32 %x; .reg .pred %p; setp.lt.s32 %p, %a, 0; mov.b32 %x, %a;"
    once += "@%p bra L; neg.s32 %x, %x; L: mov.b32 %d, %x; }"
    twice = once + "/* again,\n of the result */ " + once.replace("%a", "%d")
    a = samples("s32")
    result = evaluate(twice, "s32", ("s32", a))
    np.testing.assert_array_equal(result, np.where(a < 0, a, -a))


def test_immediates() -> None:
    a = np.arange(4, dtype=np.uint32)
    for text, expected in (("-1", a - 1), ("0xFFU", a + 255), ("WARP_SZ", a + 32)):
        np.testing.assert_array_equal(evaluate(f"add.u32 $d, $a, {text};", "u32", ("u32", a)), expected)
    np.testing.assert_array_equal(evaluate("mov.f32 $d, 0f40490FDB;", "f32", ("u32", a)), np.float32(np.pi))
    np.testing.assert_array_equal(evaluate("mov.f64 $d, 0d400921FB54442D18;", "f64", ("u32", a)), np.pi)


def test_parameters_lie_at_their_natural_alignment() -> None:
    out = aligned(5, np.uint64)
    body = """
        .reg .b64 %o, %x<5>; .reg .f64 %f; .reg .b32 %r; .reg .f32 %g;
        ld.param.u64 %o, [p0]; ld.param.u8 %x0, [p1]; ld.param.s16 %x1, [p2]; ld.param.f32 %g, [p3];
        ld.param.f64 %f, [p4]; ld.param.s32 %x4, [p5+4];
        mov.b32 %r, %g; cvt.u64.u32 %x2, %r; mov.b64 %x3, %f;
        st.global.u64 [%o], %x0; st.global.u64 [%o+8], %x1; st.global.u64 [%o+16], %x2; st.global.u64 [%o+24], %x3;
        st.global.u64 [%o+32], %x4; ret;
    """
    text = entry(body, ["u64", "u8", "u16", "f32", "f64", "align 4 .b8"]).replace("p5)", "p5[8])")
    handwritten.add(text)
    parameters = struct.pack("<QBxhfdii", out.ctypes.data, 200, -2, 1.5, -2.5, 7, -9)
    ptx.Machine([out]).launch(text, 1, 1, parameters)
    expected = [200, -2, int(np.float32(1.5).view(np.uint32)), int(np.float64(-2.5).view(np.int64)), -9]
    np.testing.assert_array_equal(out.view(np.int64), expected)
    for wrong in (parameters[:-1], parameters + bytes(8)):
        with pytest.raises(ValueError, match=f"has 32 bytes of parameters, but got {len(wrong)}"):
            ptx.Machine([out]).launch(text, 1, 1, wrong)


def test_special_registers() -> None:
    names = ["%tid.x", "%tid.y", "%ntid.x", "%ntid.y", "%ctaid.x", "%nctaid.x", "%laneid", "%warpid"]
    body = """
        .reg .b32 %r<9>; .reg .b64 %o, %w;
        mov.u32 %r0, %tid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r3, %r1, %r2, %r0;
        ld.param.u64 %o, [p0]; mad.wide.u32 %o, %r3, 32, %o;
    """
    body += "".join(f"mov.u32 %r4, {name}; st.global.u32 [%o+{4 * i}], %r4;" for i, name in enumerate(names))
    blocks, threads = 3, 70
    out = np.zeros((blocks, threads, len(names)), np.uint32)
    launch(entry(body, ["u64"]), [out], blocks=blocks, threads=threads)
    block, thread = np.indices((blocks, threads))
    all = np.ones_like(block)
    expected = [thread, 0 * all, threads * all, all, block, blocks * all, thread % 32, thread // 32]
    np.testing.assert_array_equal(out, np.stack(expected, axis=-1))


@pytest.mark.parametrize(("blocks", "threads"), [(0, 32), (1, 0), (1, 1025), (1, 65)])
def test_launch_sizes_are_checked(blocks: int, threads: int) -> None:
    text = entry("ret;").replace("()\n", "()\n.maxntid 64, 1, 1\n") if threads == 65 else entry("ret;")
    with pytest.raises(ValueError, match=f"{blocks} blocks of {threads} threads"):
        ptx.Machine([]).launch(text, blocks, threads, b"")


def faults(what: str) -> Any:
    return pytest.raises(ptx.Fault, match=what)


# ---- control flow and warps ----


def collatz_steps(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = (3 * n + 1 if n & 1 else n // 2), steps + 1
    return steps


COLLATZ = """
    .reg .b32 %n, %k, %odd; .reg .pred %p, %q;
    mov.u32 %k, 0; mov.u32 %n, $a;
    LOOP:
    setp.eq.u32 %p, %n, 1;
    @%p bra DONE;
    and.b32 %odd, %n, 1;
    setp.ne.u32 %q, %odd, 0;
    add.u32 %k, %k, 1;
    @%q bra ODD;
    shr.u32 %n, %n, 1;
    bra.uni LOOP;
    ODD:
    mad.lo.u32 %n, %n, 3, 1;
    bra LOOP;
    DONE:
    mov.u32 $d, %k;
"""


def test_divergent_loops() -> None:
    a = np.arange(1, 701, dtype=np.uint32)
    np.testing.assert_array_equal(evaluate(COLLATZ, "u32", ("u32", a)), [collatz_steps(int(n)) for n in a])


def test_guards() -> None:
    a, c = samples("s32"), samples("pred")
    guarded = "mov.b32 $d, $a; @$c neg.s32 $d, $a; @!$c add.s32 $d, $d, 1;"
    result = evaluate(guarded, "s32", ("s32", a), ("s32", a), ("pred", c))
    np.testing.assert_array_equal(result, np.where(c, -a, a + 1))


def test_counts_are_of_warps() -> None:
    """70 threads are three warps; the loop runs as often as the slowest lane of each."""
    body = """
        .reg .b32 %i, %n; .reg .pred %p;
        mov.u32 %i, %tid.x;
        mov.u32 %n, 0;
        LOOP: add.u32 %n, %n, 32; setp.lt.u32 %p, %n, %i; @%p bra LOOP;
        setp.ge.u32 %p, %i, 40;
        @%p exit;
        @%p not.b32 %n, %n;
        ret;
    """
    looping = dict.fromkeys(("add.u32", "setp.lt.u32", "bra"), 1 + 2 + 3)
    expected = {"mov.u32": 6, **looping, "setp.ge.u32": 3, "exit": 3, "not.b32": 2, "ret": 2}
    assert launch(entry(body), [], threads=70) == expected


def test_endless_loops_are_ended() -> None:
    with faults("still running"):
        launch(entry("LOOP: bra LOOP;"), [], steps=1000)


@pytest.mark.parametrize("mode", ["idx", "bfly"])
def test_shfl(mode: str) -> None:
    """Each lane's source as the PTX manual works it out."""
    n, rng = 32 * 200, np.random.default_rng(RNG_SEED)
    a, b = rng.integers(0, 2**32, n, dtype=np.uint32), rng.integers(0, 64, n, dtype=np.uint32)
    c = rng.choice(np.array([31, 0, 0x1C03, 0x1800, 0x1007, 0x181F], np.uint32), n)
    expected, inside = [], []
    for i, (step, bounds) in enumerate(zip(integers(b), integers(c), strict=True)):
        lane, base, step, clamp, segment = i % 32, i // 32 * 32, step & 31, bounds & 31, bounds >> 8 & 31
        source = lane ^ step if mode == "bfly" else (lane & segment) | (step & ~segment)
        inside.append(source <= (lane & segment) | (clamp & ~segment))
        expected.append(a[base + (source if inside[-1] else lane)])
    operands = ("b32", a), ("b32", b), ("b32", c)
    result = evaluate(f"shfl.sync.{mode}.b32 $d, $a, $b, $c, -1;", "b32", *operands, threads=64)
    np.testing.assert_array_equal(result, expected)
    with_predicate = f".reg .b32 %v; shfl.sync.{mode}.b32 %v|$d, $a, $b, $c, 0xFFFFFFFF;"
    np.testing.assert_array_equal(evaluate(with_predicate, "pred", *operands, threads=64), inside)


def test_votes() -> None:
    """Of warps; of halves of them, two membermasks at one instruction."""
    flags = np.random.default_rng(RNG_SEED).random((64, 32)) < 0.05
    votes = evaluate("vote.sync.any.pred $d, $a, -1;", "pred", ("pred", flags.ravel()), threads=64)
    np.testing.assert_array_equal(votes, flags.any(axis=1).repeat(32))
    halves = """
        .reg .b32 %lane, %m; .reg .pred %h;
        mov.u32 %lane, %laneid; setp.lt.u32 %h, %lane, 16; selp.b32 %m, 0xFFFF, 0xFFFF0000, %h;
        vote.sync.any.pred $d, $a, %m;
    """
    expected = flags.reshape(64, 2, 16).any(axis=2).repeat(16)
    np.testing.assert_array_equal(evaluate(halves, "pred", ("pred", flags.ravel()), threads=64), expected)


WARP_BODY = """
    .reg .b32 %i, %r; .reg .pred %p; .reg .b64 %a;
    mov.u32 %i, %tid.x; ld.param.u64 %a, [p0]; mad.wide.u32 %a, %i, 4, %a; mov.u32 %r, 7;
    setp.ge.u32 %p, %i, 16;
"""


@pytest.mark.parametrize("leave", ["exit", "bra DONE", "bra THERE"])
def test_exited_lanes_are_not_waited_for(leave: str) -> None:
    x = np.zeros(32, np.uint32)
    vote = "vote.sync.any.pred %p, 1, -1; selp.b32 %r, 5, 6, %p; st.global.u32 [%a], %r; bra DONE;"
    launch(entry(WARP_BODY + f"@%p {leave}; {vote} THERE: bra DONE; DONE: ret;", ["u64"]), [x])
    np.testing.assert_array_equal(x, np.where(np.arange(32) < 16, 5, 0))


@pytest.mark.parametrize(
    "instruction", ["vote.sync.any.pred %p, 1, -1;", "shfl.sync.idx.b32 %r, %r, 0, 31, -1;", "bar.warp.sync -1;"]
)
def test_a_lane_missing_from_the_membermask_is_a_fault(instruction: str) -> None:
    x = np.zeros(32, np.uint32)
    text = entry(WARP_BODY + f"@%p bra DONE; {instruction} DONE: st.global.u32 [%a], %r;", ["u64"])
    with faults(f"lanes named in the membermask never come here, by thread 0 of block 0, at: {instruction[:8]}"):
        launch(text, [x])
    launch(text.replace("-1;", "0xFFFF;"), [x])


def test_lanes_wait_for_those_that_come_later() -> None:
    """Lanes that continue early reach the vote, at a lower program counter, before the rest of the loop has run."""
    body = (
        WARP_BODY
        + """
        .reg .b32 %k, %v, %sum; .reg .pred %q, %more;
        mov.u32 %k, 0; mov.u32 %sum, 0;
        LOOP:
        mov.u32 %v, 0;
        shfl.sync.idx.b32 %v, %i, 31, 31, -1;
        add.u32 %sum, %sum, %v;
        add.u32 %k, %k, 1;
        setp.gt.u32 %more, %k, 3;
        @%more bra DONE;
        @%p bra LOOP;
        add.u32 %sum, %sum, 1000;
        bra LOOP;
        DONE: st.global.u32 [%a], %sum;
    """
    )
    text = entry(body, ["u64"])
    x = np.zeros(32, np.uint32)
    counts = launch(text, [x])
    np.testing.assert_array_equal(x, 4 * 31 + np.where(np.arange(32) < 16, 3000, 0))
    assert counts["shfl.sync.idx.b32"] == 4
    assert counts["mov.u32"] == 4 + 1 + 2 * 3  # together once, then those who wait and those who come


@pytest.mark.parametrize(
    ("code", "threads", "what"),
    [
        ("vote.sync.any.pred %p, 1, 0xFFFF;", 32, "lane not in its own membermask, by thread 16"),
        (
            "selp.b32 %r, 0xFFFFFFFF, 0x1FFFF, %p; vote.sync.any.pred %p, 1, %r;",
            32,
            "lanes with different membermasks",
        ),
        ("shfl.sync.idx.b32 %r, %r, 31, 31, -1;", 31, "reads lane 31, which is not there, by thread 0"),
        (
            "selp.b32 %r, 0xFFFF0000, 0xFFFF, %p; shfl.sync.bfly.b32 %i, %i, 16, 31, %r;",
            32,
            "reads lane 16, which is not there, by thread 0",
        ),
        ("@%p trap;", 32, "trap, by thread 16 of block 0"),
        ("div.u32 %r, %r, %i;", 32, r"division by zero, by thread 0 of block 0, at: div\.u32 %r, %r, %i;"),
    ],
    ids=["own mask", "masks", "no lane", "other half", "trap", "division"],
)
def test_what_is_undefined_is_a_fault(code: str, threads: int, what: str) -> None:
    with faults(what):
        launch(entry(WARP_BODY + code, ["u64"]), [np.zeros(32, np.uint32)], threads=threads)


# Threads write a word of their block's memory each, and read that of the one as far from the end.
SHARED_BODY = """
.shared .align 8 .b8 before[8];
.shared .align 4 .b8 tile[256];
.reg .b32 %i, %n, %r; .reg .b64 %a, %at, %w; .reg .pred %p;
ld.param.u64 %a, [p0];
mov.u32 %i, %tid.x;
mov.u32 %n, %ntid.x;
setp.ge.u32 %p, %i, 32;
mul.wide.u32 %w, %i, 4;
mov.u64 %at, tile;
add.u64 %at, %at, %w;
st.shared.u32 [%at], %i;
WAIT
sub.u32 %r, %n, %i;
mul.wide.u32 %w, %r, 4;
mov.u64 %at, tile;
add.u64 %at, %at, %w;
ld.shared.u32 %r, [%at+-4];
mov.u32 %n, %ctaid.x;
mad.lo.u32 %i, %n, 64, %i;
mul.wide.u32 %w, %i, 4;
add.u64 %a, %a, %w;
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


@pytest.mark.parametrize("wait", ["", "bar.warp.sync -1;"], ids=["nothing", "a warp"])
def test_shared_memory_without_a_barrier_is_a_race(wait: str) -> None:
    with pytest.raises(ptx.Race, match=r"which thread .* of block 0 accessed"):
        launch(shared(wait), [np.zeros(64, np.uint32)], threads=64)


def test_what_a_barrier_separates_is_no_race() -> None:
    again = "bar.sync 0; ld.shared.u32 %r, [tile]; bar.sync 0; st.shared.u32 [%at], %i; bar.sync 0;"
    out = np.zeros(64, np.uint32)
    launch(shared(again), [out], threads=64)
    assert out.tolist() == list(range(63, -1, -1))
    with pytest.raises(ptx.Race, match="which several threads accessed"):
        launch(shared(again.replace("bar.sync 0; st", "st")), [out], threads=64)


def test_threads_missing_from_a_barrier_are_a_fault() -> None:
    with faults("threads of the block never come here, by thread 32 of block 0, at: @%p bar"):
        launch(shared("@%p bar.sync 0;"), [np.zeros(64, np.uint32)], threads=64, races=False)


@pytest.mark.parametrize("offset", [-12, 256], ids=["below", "above"])
def test_shared_memory_ends(offset: int) -> None:
    with faults("outside of the memory allowed"):
        launch(shared(f"ld.shared.u32 %r, [tile+{offset}];"), [np.zeros(32, np.uint32)])


@pytest.mark.parametrize(
    "line",
    [
        "sin.approx.f32 %f0, %f1;",
        "add.sat.s32 %r0, %r1, %r2;",
        "add.rz.f32 %f0, %f1, %f2;",
        "add.s32 %r0, %rd1, %r2;",
        "add.s32 %r0, %r1;",
        "add.s32 %r0, %unknown, %r2;",
        "cvt.f32.f64 %f0, %d0;",
        "cvt.rn.satfinite.bf16x2.f32 %r0, %f0, %f1;",
        "setp.ltu.s32 %p0, %r0, %r1;",
        "ld.local.u32 %r0, [%rd1];",
        "ld.global.u32 %r0, [somewhere];",
        "ld.global.v4.u64 {%rd0, %rd1, %rd2}, [%rd3];",
        "atom.global.add.u32 %r0, [%rd0], 1;",
        "bar.sync 1;",
        "mov.u32 %tid.x, %r0;",
        "call (%r0), callee, (%r1);",
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

"""Random state: the generator's published answers, exact thresholds, and streams that never give an offset twice."""

from __future__ import annotations

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fastdrop as fd
from fastdrop.core.random import keep_scale, philox4x32_10, threshold

from ..cases import golden, output_of, primitive_modules

KNOWN_ANSWERS = [
    tuple(tuple(int(word, 16) for word in answer[part]) for part in ("counter", "key", "out"))
    for answer in golden()["philox"]
]


@pytest.mark.parametrize("name", ["numpy", "c", "numba"])
def test_philox_known_answers(name):
    module = primitive_modules()[name]
    if module.unavailable():
        pytest.skip(module.unavailable())
    for counter, key, out in KNOWN_ANSWERS:
        assert tuple(int(word) for word in module.philox4x32_10(counter, key)) == out


def test_philox_broadcasts_over_counters():
    first, third = np.arange(5, dtype=np.uint32), np.uint32(9)
    words = philox4x32_10((first, 1, third, 2), (3, 4))
    for i in range(5):
        assert [w[i] for w in words] == [w[()] for w in philox4x32_10((i, 1, 9, 2), (3, 4))]


@given(st.floats(0, 1))
@example(2.0**-33)  # halfway to 1: even
@example(3 * 2.0**-33)
@example(np.nextafter(2.0**-33, 1))
@example(1 - 2.0**-33)
def test_threshold_rounds_half_to_even(p):
    assert threshold(p) == round(Fraction(p) * 2**32)


@given(st.integers(0, 2**32 - 1))
def test_keep_scale_is_exact(cut):
    assert keep_scale(cut) == float(1 / (1 - Fraction(cut, 2**32)))
    assert keep_scale(2**32) == 0.0


def test_stream_takes_each_offset_in_turn_and_wraps_past_the_last():
    stream = fd.Stream(7, 40)
    assert [stream.take() for _ in range(3)] == [(7, 40), (7, 41), (7, 42)]
    assert (stream.seed, stream.offset) == (7, 43)
    last = fd.Stream(2**64 - 1, 2**64 - 1)
    assert [last.take()[1] for _ in range(2)] == [2**64 - 1, 0]


def test_stream_is_a_value_that_stands_somewhere():
    stream = fd.Stream(np.uint8(5), np.int64(0))
    assert stream == fd.Stream(5)
    stream.take()
    for other in (fd.Stream(5), fd.Stream(6, 1), fd.Stream(5, 1, 1), (5, 1)):
        assert stream != other
    copy = pickle.loads(pickle.dumps(stream))
    assert copy == stream == eval(repr(stream), {"Stream": fd.Stream})
    assert copy.take() == stream.take() == (5, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "seed must be from 0 to 2.*-1"),
        ((2**64,), ValueError, "seed must be from 0 to 2.*18446744073709551616"),
        ((1.0,), TypeError, "seed must be an int, but got float"),
        ((True,), TypeError, "seed must be an int, but got bool"),
        ((0, -1), ValueError, "offset must be from 0 to 2.*-1"),
        ((0, "1"), TypeError, "offset must be an int, but got str"),
    ],
)
def test_stream_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        fd.Stream(*arguments)
    if len(arguments) == 1:
        with pytest.raises(error, match=message):
            fd.manual_seed(*arguments)


def yielding(frame, event, arg):
    """A trace function that lets other threads run between any two lines of take()."""
    if frame.f_code.co_name != "take":
        return None
    time.sleep(0)
    return yielding


def test_stream_gives_no_offset_twice_to_threads():
    stream, start = fd.Stream(0), threading.Barrier(16)

    def draw(_):
        start.wait()
        return [stream.take()[1] for _ in range(200)]

    threading.settrace(yielding)
    try:
        with ThreadPoolExecutor(16) as pool:
            taken = [offset for offsets in pool.map(draw, range(16)) for offset in offsets]
    finally:
        threading.settrace(None)
    assert sorted(taken) == list(range(16 * 200))


def test_manual_seed_restarts_the_process_wide_stream():
    stream = fd.manual_seed(11)
    first = [fd.draw_mask(100, 0.5) for _ in range(3)]
    assert stream == fd.Stream(11, 3)
    fd.manual_seed(11)
    assert [fd.draw_mask(100, 0.5) for _ in range(3)] == first
    assert first == [fd.draw_mask(100, 0.5, rng=fd.Stream(11, offset)) for offset in range(3)]


FORK = """
import os, subprocess, sys, threading
import fastdrop as fd
def draw(**options):
    return str(fd.draw_mask(256, 0.5, **options).words.tolist())
def in_child(function):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, function().encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return os.read(read, 1 << 16).decode()
def children_of_a_child():
    return ";".join([in_child(draw), draw(), in_child(draw)])
def line(*masks):
    print(*masks, sep=";")
line(in_child(draw), in_child(draw), draw())  # nobody has seeded
for _ in range(2):
    stream = fd.manual_seed(5)
    first = in_child(draw)
    subprocess.run([sys.executable, "-c", ""], check=True)  # does not count
    line(first, in_child(children_of_a_child), draw(), in_child(draw), draw())
line(*[draw(rng=s) for s in (fd.Stream(5), *fd.Stream(5).spawn(4))])
line(in_child(lambda: draw(rng=stream)), draw(rng=stream))
fd.manual_seed(5)
threads, seen = [threading.Thread(target=lambda: seen.append(in_child(draw))) for _ in range(8)], []
for t in threads: t.start()
for t in threads: t.join()
line(*seen)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_processes_draw_different_masks_and_the_same_ones_again():
    """The process-wide stream of a child depends on the seed and on the number of forks since it was set. An explicit
    stream is a value: a child draws from its copy what the parent draws next."""
    unseeded, seeded, reseeded, explicit, value, threads = (line.split(";") for line in output_of(FORK).splitlines())
    others, again, *_ = (line.split(";") for line in output_of(FORK).splitlines())
    assert len({*unseeded, *others}) == 6
    assert seeded == reseeded == again
    assert len({*seeded}) == len(seeded) == 7  # two children and the next one's three, and the parent's own two
    assert len({*seeded, *explicit}) == len(seeded) + len(explicit) - 1  # the parent's first is that of Stream(5)
    assert seeded[4] == explicit[0]
    assert value[0] == value[1]
    assert len({*threads}) == 8
    assert {*seeded[:1], seeded[2], seeded[5]} <= {*threads}


FORK_WITHIN_TAKE = """
import os, threading
import fastdrop as fd
def child_draws_while_a_thread_takes(stream, rng):
    inside, leave = threading.Event(), threading.Event()
    def stop_within_take(frame, event, arg):
        if frame.f_code.co_name != "take":
            return None
        lines = []
        def at_line(frame, event, arg):
            lines.append(event)
            if len(lines) == 2:  # past the first line, where the lock is taken
                inside.set()
                leave.wait()
            return at_line
        return at_line
    threading.settrace(stop_within_take)
    thread = threading.Thread(target=stream.take)
    thread.start()
    threading.settrace(None)
    inside.wait()
    pid = os.fork()
    if not pid:
        fd.draw_mask(100, 0.5, rng=rng)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    leave.set()
    thread.join()
    return code
own = fd.Stream(1)
print(child_draws_while_a_thread_takes(fd.manual_seed(1), None), child_draws_while_a_thread_takes(own, own))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_draws_though_a_thread_was_drawing():
    """The child must not wait for the lock that a thread of the parent holds."""
    assert output_of(FORK_WITHIN_TAKE) == "0 0"

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
from hypothesis import given
from hypothesis import strategies as st

import fastdrop as fd
from fastdrop.core.random import keep_scale, philox4x32_10, threshold

from ..cases import golden, output_of, primitive_modules

KNOWN_ANSWERS = [
    tuple(tuple(int(word, 16) for word in answer[part]) for part in ("counter", "key", "out"))
    for answer in golden()["philox"]
]


@pytest.mark.parametrize(("counter", "key", "out"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, out):
    assert tuple(int(word) for word in philox4x32_10(counter, key)) == out


@pytest.mark.parametrize(("counter", "key", "out"), KNOWN_ANSWERS)
@pytest.mark.parametrize("name", ["c", "numba"])
def test_philox_known_answers_of_backends(name, counter, key, out):
    module = primitive_modules()[name]
    if module.unavailable():
        pytest.skip(module.unavailable())
    assert tuple(module.philox4x32_10(counter, key)) == out


def test_philox_broadcasts_over_counters():
    first, third = np.arange(5, dtype=np.uint32), np.uint32(9)
    words = philox4x32_10((first, 1, third, 2), (3, 4))
    for i in range(5):
        assert [w[i] for w in words] == [w[()] for w in philox4x32_10((i, 1, 9, 2), (3, 4))]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.0, 0),
        (1e-10, 0),
        (2.0**-33, 0),  # halfway to 1: even
        (np.nextafter(2.0**-33, 1), 1),
        (3 * 2.0**-33, 2),  # halfway from 1 to 2: even
        (5 * 2.0**-33, 2),
        (2.0**-32, 1),
        (0.5, 2**31),
        (3 / 256, 3 << 24),
        (0.1, 429496730),
        (1 - 2.0**-32, 2**32 - 1),
        (1 - 2.0**-33, 2**32),  # halfway to all: even
        (1.0, 2**32),
    ],
)
def test_threshold_rounds_half_to_even(p, expected):
    assert threshold(p) == expected


@given(st.floats(0, 1))
def test_threshold_is_exact(p):
    assert threshold(p) == round(Fraction(p) * 2**32)


@given(st.integers(0, 2**32 - 1))
def test_keep_scale_is_exact(cut):
    assert keep_scale(cut) == float(1 / (1 - Fraction(cut, 2**32)))


def test_keep_scale_of_dropping_all_is_zero():
    assert keep_scale(2**32) == 0.0


def test_stream_takes_each_offset_in_turn():
    stream = fd.Stream(7, 40)
    assert [stream.take() for _ in range(3)] == [(7, 40), (7, 41), (7, 42)]
    assert (stream.seed, stream.offset) == (7, 43)


def test_stream_wraps_past_the_last_offset():
    stream = fd.Stream(2**64 - 1, 2**64 - 1)
    assert [stream.take()[1] for _ in range(2)] == [2**64 - 1, 0]


def test_stream_compares_by_value():
    assert fd.Stream(1, 2) == fd.Stream(1, 2)
    assert fd.Stream(1, 2) != fd.Stream(1, 3)
    assert fd.Stream(1, 2) != fd.Stream(2, 2)
    assert fd.Stream(1, 2) != (1, 2)


def test_stream_pickles_where_it_stands():
    stream = fd.Stream(5)
    stream.take()
    copy = pickle.loads(pickle.dumps(stream))
    assert copy == stream
    assert copy.take() == stream.take() == (5, 1)


def test_stream_repr_evaluates_to_it():
    assert eval(repr(fd.Stream(3, 4)), {"Stream": fd.Stream}) == fd.Stream(3, 4)


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


@pytest.mark.parametrize("kind", [int, np.int64, np.uint64, np.uint8])
def test_stream_takes_numpy_integers(kind):
    assert fd.Stream(kind(3), kind(4)) == fd.Stream(3, 4)


def yielding(frame, event, arg):
    """Trace function that lets other threads run between any two lines of take()."""
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


def test_manual_seed_refuses_what_is_no_seed():
    with pytest.raises(ValueError, match="seed must be from 0"):
        fd.manual_seed(-1)


def test_processes_left_unseeded_draw_different_masks():
    code = "import fastdrop as fd; print(fd.draw_mask(256, 0.5).words.tolist())"
    assert output_of(code) != output_of(code)


FORK = """
import os
import fastdrop as fd
{seeded}
fd.draw_mask(100, 0.5)
def child():
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, str(fd.draw_mask(256, 0.5).words.tolist()).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return os.read(read, 1 << 16).decode()
print(child()); print(child()); print(fd.draw_mask(256, 0.5).words.tolist())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(("seeded", "masks"), [("fd.manual_seed(5)", 1), ("", 3)], ids=["seeded", "unseeded"])
def test_forked_children_share_a_seeded_stream_only(seeded, masks):
    """As with numpy.random.seed, a child goes on where a seeded parent stood; unseeded, it gets its own seed."""
    lines = output_of(FORK.format(seeded=seeded)).splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == masks


FORK_WITHIN_TAKE = """
import os, threading
import fastdrop as fd
stream = {stream}
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
    fd.draw_mask(100, 0.5, rng={rng})
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
leave.set()
thread.join()
print(code)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(
    ("stream", "rng"), [("fd.manual_seed(1)", "None"), ("fd.Stream(1)", "stream")], ids=["process-wide", "own"]
)
def test_forked_child_draws_though_a_thread_was_drawing(stream, rng):
    """The lock that the parent's other thread holds is not the child's to wait for."""
    assert output_of(FORK_WITHIN_TAKE.format(stream=stream, rng=rng)) == "0"

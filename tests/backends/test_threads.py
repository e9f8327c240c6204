"""Threads and processes: forks after use, many callers at once, the number of threads as an argument."""

from __future__ import annotations

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastdrop as fd

from ..cases import DTYPES, assert_same_bits, output_of, readable

N = 400_000  # enough for several threads

FORK = """
import os, threading
import numpy as np
import fastdrop as fd
fd.use_backend({backend!r})
fd.set_num_threads(2)
x = np.ones(1 << 20, np.float32)
def digest():
    y, mask = fd.dropout(x, 0.1, rng=5)
    dx = fd.dropout_backward(x, mask)
    return [mask.words.tobytes(), y.tobytes(), dx.tobytes()]
wanted = digest()
def threads():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 2
def fork(generations):
    pid = os.fork()
    if not pid:
        ok = digest() == wanted and threads() >= {threads}
        ok = ok and (generations == 1 or fork(generations - 1)) and digest() == wanted
        os._exit(0 if ok else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert fork(2)
assert digest() == wanted
stop = threading.Event()
def busy():
    while not stop.is_set():
        fd.dropout(x, 0.1)
callers = [threading.Thread(target=busy) for _ in range(3)]
for thread in callers: thread.start()
try:
    assert all(fork(1) for _ in range(6))
finally:
    stop.set()
for thread in callers: thread.join()
print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use_and_while_other_threads_are_inside(backend):
    """Child and grandchild of a process that used two threads draw the same mask, with two threads of their own.
    Whatever locks other threads hold are not the child's."""
    threads = 1 if backend == "numpy" else 2
    assert output_of(FORK.format(backend=backend, threads=threads)) == "same"


def results(dtype, x):
    y, mask = fd.dropout(x, 0.1, rng=5)
    _, seeded = fd.dropout(x, 0.1, rng=5, store="seed")
    return [y, mask.words, fd.dropout_backward(x, mask), fd.dropout_backward(x, seeded)]


def test_16_python_threads_at_once(compiled):
    dtype = DTYPES[0]
    x = dtype.numbers(N)
    fd.set_num_threads(2)
    wanted, start = results(dtype, x), threading.Barrier(16)

    def call(_):
        start.wait()
        return results(dtype, x)

    with ThreadPoolExecutor(16) as pool:
        for got in pool.map(call, range(16)):
            for actual, want in zip(got, wanted, strict=True):
                assert_same_bits(actual, want)


def test_calls_while_another_thread_is_inside(compiled):
    """Small and large calls meet large ones, while the number of threads changes under all of them."""
    dtype = DTYPES[0]
    large, small = dtype.numbers(4 * N), dtype.numbers(777)
    wanted_large, wanted_small = results(dtype, large), results(dtype, small)
    failures, stop = [], threading.Event()

    def background():
        while not stop.is_set():
            for actual, want in zip(results(dtype, large), wanted_large, strict=True):
                if not np.array_equal(actual, want):
                    failures.append("background")

    thread = threading.Thread(target=background)
    thread.start()
    try:
        for round_ in range(12):
            fd.set_num_threads(1 + round_ % 4)
            for x, wanted in ((small, wanted_small), (large, wanted_large)):
                for actual, want in zip(results(dtype, x), wanted, strict=True):
                    assert_same_bits(actual, want)
    finally:
        stop.set()
        thread.join()
    assert not failures


def test_set_num_threads_is_what_get_num_threads_says(backend):
    for n in (1, 2, np.int32(7), np.uint8(255)):
        fd.set_num_threads(n)
        assert fd.get_num_threads() == n
        assert type(fd.get_num_threads()) is int


@pytest.mark.parametrize(
    ("n", "error", "came"),
    [
        (0, ValueError, "0"),
        (-1, ValueError, "-1"),
        (257, ValueError, "257"),
        (2**70, ValueError, str(2**70)),
        (1.0, TypeError, "float"),
        ("2", TypeError, "str"),
        (True, TypeError, "bool"),
        (None, TypeError, "NoneType"),
    ],
    ids=readable,
)
def test_set_num_threads_refuses(n, error, came):
    before = fd.get_num_threads()
    with pytest.raises(error, match=rf"^n.*got {came}"):
        fd.set_num_threads(n)
    assert fd.get_num_threads() == before


def test_num_threads_survives_a_change_of_backend(backend):
    fd.set_num_threads(3)
    with fd.use_backend("numpy"):
        assert fd.get_num_threads() == 3
        fd.set_num_threads(2)
    assert fd.get_num_threads() == 2


def test_num_threads_comes_from_the_environment():
    assert output_of("import fastdrop as fd; print(fd.get_num_threads())", FASTDROP_NUM_THREADS="3") == "3"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_num_threads_defaults_to_the_cpus_this_process_may_use():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert output_of(code + "import fastdrop as fd; print(fd.get_num_threads())") == "1"


def test_numba_ranges_tile_the_whole(monkeypatch):
    """However many threads: parts meet, at multiples of a block, and end where the whole ends."""
    pytest.importorskip("numba")
    from fastdrop.backends.numba import threads

    sizes = itertools.product((0, 13, 511), (2, 3, 140, 192, 256), (0, 1, 5, 511, 65_535))
    for lead, parts, extra in sizes:
        seen = []
        n = parts * threads.GRAIN_CELLS + extra
        monkeypatch.setattr(threads, "_num_threads", parts)
        threads.over_ranges(lambda begin, end, seen=seen: seen.append((begin, end)), (), n, lead)
        assert seen[0] == (0, 0)  # compiled before any thread starts
        seen = sorted(seen[1:])
        assert (seen[0][0], seen[-1][1]) == (0, n)
        assert [end for _, end in seen[:-1]] == [begin for begin, _ in seen[1:]]
        assert all(begin < end for begin, end in seen)
        assert all((lead + begin) % threads.BLOCK_CELLS == 0 for begin, _ in seen[1:])

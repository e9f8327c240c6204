"""Where memory ends, and where the interpreter does; streams for workers."""

from __future__ import annotations

import copy
import pickle
import sys

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core.random import philox4x32_10

from ..cases import output_of

X = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)
LINE = np.ones(48, np.float32)
IMAGES = X.reshape(2, 2, 16, 48)

DRAWS = {
    "draw_mask": lambda x, **more: fd.draw_mask(x.shape, 0.5, **more),
    "dropout": lambda x, **more: fd.dropout(x, 0.5, **more),
    "seed": lambda x, **more: fd.dropout(x, 0.5, store="seed", **more),
    "p=1": lambda x, **more: fd.dropout(x, 1.0, **more),
    "variational": lambda x, **more: fd.variational_dropout(x, 0.5, 0, **more),
    "variational seed": lambda x, **more: fd.variational_dropout(x, 0.5, 0, store="seed", **more),
    "gaussian": lambda x, **more: fd.gaussian_dropout(x, 0.5, **more),
    "drop_block": lambda x, **more: fd.drop_block(x.reshape(IMAGES.shape), 0.1, 3, **more),
    "dropout_add": lambda x, **more: fd.dropout_add(x, x, 0.5, **more),
    "relu": lambda x, **more: fd.bias_act_dropout(x, LINE, 0.5, "relu", **more),
    "gelu": lambda x, **more: fd.bias_act_dropout(x, LINE, 0.5, "gelu", store="seed", **more),
    "norm": lambda x, **more: fd.dropout_add_layer_norm(x, x, LINE, LINE, 0.5, **more),
    "softmax": lambda x, **more: fd.softmax_dropout(x, 0.5, **more),
}


class Allocator:
    """Lets so many arrays be made, and no more."""

    def __init__(self, monkeypatch):
        self.left = -1  # no limit
        for place, name in [(np, "empty"), (np, "empty_like"), (np, "zeros"), (np, "ascontiguousarray")]:
            monkeypatch.setattr(place, name, self.counted(getattr(place, name)))

    def counted(self, make):
        def call(*args, **more):
            if self.left == 0:
                raise MemoryError
            self.left -= 1
            return make(*args, **more)

        return call


@pytest.mark.parametrize("name", DRAWS)
def test_a_failed_allocation_takes_no_random_state(name, monkeypatch):
    """Whichever array it is that can't be made, of data that lies in order and of data that must be copied."""
    allocator = Allocator(monkeypatch)
    for x in (X, np.asfortranarray(X)):
        stream, generator = fd.Stream(5), np.random.default_rng(5)
        before, failures = generator.bit_generator.state, 0
        for left in range(20):
            for rng in (stream, generator):
                allocator.left = left
                try:
                    DRAWS[name](x, rng=rng)
                except MemoryError:
                    allocator.left = -1
                    failures += 1
                    assert stream == fd.Stream(5)
                    assert generator.bit_generator.state == before
            if stream.offset:
                break
        allocator.left = -1
        assert stream.offset == 1
        assert failures >= 2


def test_masks_that_no_memory_could_hold_take_no_random_state():
    stream = fd.Stream(0)
    with pytest.raises(MemoryError):
        fd.draw_mask(1 << 60, 0.5, rng=stream)
    assert stream == fd.Stream(0)


NO_ROOM = """
import resource, threading
import numpy as np
import fastdrop as fd
fd.use_backend("numba")
fd.set_num_threads(2)
x = np.ones(1 << 18, np.float32)
stream = fd.Stream(0)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (100 << 20), resource.RLIM_INFINITY))
try:
    fd.dropout(x, 0.5, rng=stream)
except MemoryError as error:
    assert threading.active_count() == 1
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_numba_without_room_to_compile_raises_in_the_caller(tmp_path):
    pytest.importorskip("numba")
    assert "Numba must compile a kernel" in output_of(NO_ROOM, NUMBA_CACHE_DIR=str(tmp_path))


NO_THREADS = """
import numpy as np
import fastdrop as fd
from fastdrop.backends.numba import threads
fd.use_backend("numba")
x = np.ones(1 << 20, np.float32)
fd.set_num_threads(1)
want = fd.dropout(x, 0.5, rng=0)[0]
fd.set_num_threads(4)
class Pool:
    def submit(self, *work): raise RuntimeError("can't start new thread")
threads._workers = Pool
assert (fd.dropout(x, 0.5, rng=0)[0] == want).all()
print("same")
"""


def test_numba_does_alone_what_no_thread_can_be_started_for():
    pytest.importorskip("numba")
    assert output_of(NO_THREADS) == "same"


AT_EXIT = """
import os, sys
import numpy as np
import fastdrop as fd
fd.use_backend({backend!r})
x, line = np.ones((300, 512), np.float32), np.ones(512, np.float32)
def calls():
    y, mask = fd.dropout(x, 0.5, rng=0)
    fd.dropout_backward(x, mask)
    fd.dropout_add(x, x, 0.5)[1].backward(x)
    if {backend!r} == "numba":
        return  # the rest takes seconds to load
    fd.gaussian_dropout(x, 0.5)
    fd.drop_block(x[None, None], 0.1, 3)
    fd.apply_mask(np.matrix(x), fd.draw_mask(x.shape, 0.5))
    fd.bias_act_dropout(x, line, 0.5, "gelu")[1].backward(x)
    fd.dropout_add_layer_norm(x, x, line, line, 0.5)[2].backward(x)
    fd.softmax_dropout(x, 0.5, rng=np.random.default_rng(0))[1].backward(x)
    fd.Stream(0).spawn(2)
    with fd.use_backend("numpy"):
        fd.dropout(x, 0.5)
class Late:
    def __del__(self):
        calls()
        os.write(1, b"imports are over" if sys.meta_path is None else b"too early")
calls()
late = Late()
"""


@pytest.mark.parametrize("name", ["c", "numba"])
def test_calls_at_the_interpreters_exit(name):
    if fd.backends.reason(name):
        pytest.skip(fd.backends.reason(name))
    assert output_of(AT_EXIT.format(backend=name)) == "imports are over"


# ---- streams for workers ----


def test_children_are_the_blocks_that_the_design_says():
    seed = 0x9E3779B97F4A7C15
    for child, number in zip(fd.Stream(seed, spawned=2**33).spawn(3), range(2**33, 2**33 + 3), strict=True):
        block = philox4x32_10((number & 0xFFFFFFFF, number >> 32 | 3 << 27, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
        assert (child.seed, child.offset) == tuple(int(block[i]) | int(block[i + 1]) << 32 for i in (0, 2))
    assert fd.Stream(7).spawn(1) == [fd.Stream(14601736658269469074, 7650411655809062284)]


def test_children_differ_from_each_other_and_from_their_parent_and_come_again():
    parent = fd.Stream(7)
    fd.draw_mask(4096, 0.5, rng=parent)
    children = parent.spawn(3) + parent.spawn(2)
    assert parent == fd.Stream(7, 1, 5)
    assert children == fd.Stream(7, 99).spawn(5)
    grandchildren = [grandchild for child in children for grandchild in child.spawn(2)]
    assert fd.Stream(8).spawn(5) != children
    masks = [fd.draw_mask(4096, 0.5, rng=stream) for stream in [parent, *children, *grandchildren]]
    for mask in masks[1:]:  # 4096 fair coins agree 2048 times, within 6 standard deviations
        assert abs(int((mask.to_bool() == masks[0].to_bool()).sum()) - 2048) < 6 * 32
    assert len({mask.words.tobytes() for mask in masks}) == len(masks)
    assert fd.draw_mask(4096, 0.5, rng=fd.Stream(7, 1)) == masks[0]  # spawning takes no offset


def test_copies_spawn_on_from_where_the_original_stands():
    stream = fd.Stream(3)
    stream.spawn(4)
    for other in (copy.copy(stream), copy.deepcopy(stream), pickle.loads(pickle.dumps(stream)), eval_of(stream)):
        assert other == stream != fd.Stream(3)
        assert other.spawn(1) == fd.Stream(3).spawn(5)[4:]


def eval_of(stream):
    return eval(repr(stream), {"Stream": fd.Stream})


def test_spawn_refuses():
    stream, large = fd.Stream(0), 2**59 + 1
    for n, error in ((-1, ValueError), (large, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match=r"^n_children must be"):
            stream.spawn(n)
    assert stream == fd.Stream(0)
    assert stream.spawn(0) == []

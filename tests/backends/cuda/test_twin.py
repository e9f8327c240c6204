"""The CUDA kernels' bodies, written out in plain Python (`twin`), against the reference backend.

The simulator takes milliseconds for what a GPU does in nanoseconds: small arrays and few blocks, so that each warp
takes several turns. test_cuda_primitives.py runs what the bodies are compiled to, on more.
"""

from __future__ import annotations

import inspect
import itertools
import threading

import numpy as np
import pytest

from fastdrop.backends import reference
from fastdrop.backends.cuda import driver
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.core.activations import ACTIVATIONS
from fastdrop.core.mask import word_count

from ...cases import AFFINE, DTYPES, GRIDS, OFFSET, SEED, TENTH, THRESHOLDS, Guarded, assert_same_bits, golden
from .cases import (
    AXES,
    COUNTS,
    DILATIONS,
    ROWS_CASES,
    assert_activations_as_reference,
    assert_as_reference,
    assert_case_as_reference,
    assert_counted,
    assert_dilated_as_reference,
    assert_forward_as_reference,
    assert_gaussian_as_reference,
    assert_masked_as_reference,
    assert_scaled_by_a_count,
    assert_special_numbers_as_reference,
    assert_strided_as_reference,
    drawing_noise,
    drawn,
    expected_drawn,
    expected_forward,
    expected_masked,
    forward,
    random_words,
)

pytest.importorskip("numba", reason="the CUDA kernels are written in Numba")
pytest.importorskip("numba.cuda.simulator.kernel", reason="this Numba has no CUDA simulator", exc_type=ImportError)

from numba.cuda.simulator import kernel as simulator

from . import twin

SCALE = AFFINE["scale"]
COEFFICIENTS = AFFINE | {"dropped": (1.25, 0.0, 0.7)}  # nothing is added to what is kept, but -0 becomes +0

# Both sides of word and tile (1,024), and beyond two blocks' first turn; test_cuda_primitives.py has what lies between.
LENGTHS = (1, 31, 33, 1023, 1025, 2049)
FIRSTS = (0, 1, 31, 32, 2**37 - 1029)  # within a word, and so that the word index passes 2**32 midway
POSITIONS = (0, 1, 31, 32, 33, 1000)
SMALL_GRIDS = [grid for grid in GRIDS if grid[0] * grid[1] * grid[2] <= 6000]
SMALL_AXES = {name: axes for name, axes in AXES.items() if name != "transposed"}


def taken_lock():
    """One that a thread waits for until another releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Lane(simulator.BlockThread):
    """A simulated thread that runs when it is its turn, up to the next barrier or its end."""

    def __init__(self, *of):
        super().__init__(*of)
        self.turn, self.over = taken_lock(), False

    def run(self):
        self.turn.acquire()
        super().run()
        self.over = True
        self._manager.done.release()

    def syncthreads(self):
        self._manager.done.release()
        self.turn.acquire()
        if self.abort:
            raise RuntimeError("aborted at a barrier")


class InTurns(simulator.BlockManager):
    """Runs a block's threads one after another, there and back: the simulator's own manager polls them all."""

    def run(self, block, *arguments):
        self.done = taken_lock()
        points = np.ndindex(*self._block_dim)
        threads = [Lane(lambda: self._f(*arguments), self, block, point, self._debug) for point in points]
        for thread in threads:
            thread.start()
        live, failed = threads, None
        while live:
            for thread in live:
                thread.abort = failed is not None
                thread.turn.release()
                self.done.acquire()
                failed = failed or thread.exception
            live = [thread for thread in reversed(live) if not thread.over]
        if failed:
            raise failed[0].with_traceback(failed[1])


@pytest.fixture(autouse=True)
def threads_in_turns(monkeypatch):
    monkeypatch.setattr(simulator, "BlockManager", InTurns)


@pytest.fixture
def gpu(monkeypatch):
    """What the launcher takes for a GPU: the twin, two blocks of a warp."""
    device = twin.Device()
    monkeypatch.setattr(driver, "device", lambda ordinal: device)
    return device


def assert_drawn_as_reference(gpu, n, **options):
    gpu.forget()
    cuda_intrinsics, before = drawn(gpu, n, **options)
    assert_same_bits(cuda_intrinsics, expected_drawn(n, before, **options), (n, options))


def forms(gpu):
    """The kernels that ran, and whether in vectors."""
    return {(launch.variant.body, launch.variant.form) for launch in gpu.launches}


# ---- the twin itself ----


def test_twin_has_the_words_of_the_kernels():
    """The same ones, with as many parameters."""
    from fastdrop.backends.cuda import intrinsics as cuda_intrinsics

    for dtype in DTYPES:
        real = cuda_intrinsics.Vocabulary(dtype.tag, (9, 0), True)
        mine = twin.Vocabulary(dtype.tag, True, twin.Memory())
        intrinsics = {name: word for name, word in vars(real).items() if hasattr(word, "_defn")}
        assert intrinsics
        for name, word in intrinsics.items():
            parameters = list(inspect.signature(word._defn).parameters)[1:]  # the first is Numba's
            assert len(inspect.signature(getattr(mine, name)).parameters) == len(parameters), name
        for name in ("dtype", "plain", "counted", "item_bytes", "vector_items", "sweeps"):
            assert getattr(mine, name) == getattr(real, name), name


def test_twin_stops_at_memory_that_is_not_the_kernels(gpu):
    cuda_intrinsics = Guarded(8, np.uint32)
    at = cuda_intrinsics.array.ctypes.data
    gpu.allow(cuda_intrinsics.array[:4])
    for position, n in ((0, 129), (128, 1)):
        with pytest.raises(twin.Fault, match="in no array"):
            numba_cuda.draw_bits_at(0, 0, at, position, 0, n, SEED, OFFSET, TENTH)
    with pytest.raises(twin.Fault, match="not aligned"):
        numba_cuda.draw_bits_at(0, 0, at + 2, 0, 0, 32, SEED, OFFSET, TENTH)


def test_twin_stops_at_vectors_that_are_not_aligned(gpu, monkeypatch):
    monkeypatch.setattr(numba_cuda, "_tiles", lambda x, y, n: (1, 32))
    with pytest.raises(twin.Fault, match="not aligned"):
        forward(gpu, DTYPES[0], 1024, shifts=(4, 0, 0))


def test_twin_stops_at_memory_written_before(gpu):
    cuda_intrinsics = np.zeros(4, np.uint32)
    gpu.allow(cuda_intrinsics)
    v = twin.Vocabulary(0, True, gpu.memory)
    at = cuda_intrinsics.ctypes.data + 4

    def twice():
        v.store_word(at, np.uint64(v.lane()))

    def afterwards():
        if v.lane() == 0:
            v.store_word(at, np.uint64(1))
            v.load_word(at)

    for body in (twice, afterwards):
        gpu.memory.begin()
        with pytest.raises(twin.Fault, match="written before"):
            twin.run(body, 1, 1)


def test_twin_adds_from_many_threads_but_reads_from_none():
    sums, memory = np.zeros(1, np.uint64), twin.Memory()
    memory.add(sums)
    v, at = twin.Vocabulary(0, True, memory), sums.ctypes.data
    twin.run(lambda: v.add_long(at, np.uint64(v.thread())), 2, 2)
    assert sums.tolist() == [2 * sum(range(64))]
    with pytest.raises(twin.Fault, match="written before"):
        v.load_long(at)


def test_twin_stops_where_lanes_part():
    v = twin.Vocabulary(0, True, twin.Memory())

    def absent():
        if v.lane() != 5:
            v.any_lane(True)

    def elsewhere():
        v.uniform(1) if v.lane() == 5 else v.any_lane(True)

    def oftener():
        v.any_lane(True)
        if v.lane() == 5:
            v.any_lane(True)

    for body in (absent, elsewhere, oftener):
        with pytest.raises(twin.Fault, match="are not where lane"):
            twin.run(body, 1, 2)
    with pytest.raises(twin.Fault, match="different numbers"):
        twin.run(lambda: v.uniform(v.lane()), 1, 1)


def test_twin_votes_in_warps():
    """Each warp for itself, whatever the others do meanwhile."""
    v, votes = twin.Vocabulary(0, True, twin.Memory()), {}

    def body():
        warp = int(v.thread()) // 32
        for turn in range(1 + warp):
            votes[int(v.thread()), turn] = v.any_lane(v.lane() == turn and warp == 1)

    twin.run(body, 1, 3)
    assert votes == {(thread, turn): thread // 32 == 1 for thread in range(96) for turn in range(1 + thread // 32)}


def test_twin_blocks_share_memory_between_barriers():
    """Warps that come to a barrier by way of different numbers of exchanges."""
    v, found = twin.RowVocabulary(0, twin.Memory(), 0, False, 2), {}

    def body():
        warp = int(v.thread()) // 32
        for _ in range(1 + 2 * warp):
            v.any_lane(True)
        v.share_number(warp, np.float32(warp + 1))
        v.meet()
        found[int(v.block()), int(v.thread())] = v.shared_number(1 - warp)
        v.meet()

    def one_writer():
        if v.lane() == 0:
            body()
        else:
            v.meet()
            v.meet()

    v.any_lane = lambda flag: None
    twin.run(one_writer, 2, 2)
    assert found == {(block, 32 * warp): 2 - warp for block in range(2) for warp in range(2)}


def test_twin_stops_at_shared_memory_without_a_barrier():
    for barriers in (1, 0):
        v = twin.RowVocabulary(0, twin.Memory(), 0, False, 2)

        def body(v=v, barriers=barriers):
            if v.thread() == 0:
                v.share_number(0, np.float32(1))
            v.meet()
            v.shared_number(0)
            for _ in range(barriers):
                v.meet()
            if v.thread() == 33:
                v.share_number(0, np.float32(2))

        if barriers:
            twin.run(body, 1, 2)
        else:
            with pytest.raises(twin.Fault, match="no barrier is before"):
                twin.run(body, 1, 2)


def test_twin_stops_where_threads_miss_a_barrier(monkeypatch):
    monkeypatch.setattr(twin, "TURNS", 20)
    v = twin.RowVocabulary(0, twin.Memory(), 0, False, 2)
    with pytest.raises(twin.Fault, match="never come to the barrier"):
        twin.run(lambda: v.meet() if v.thread() < 32 else None, 1, 2)


# ---- draw_words ----


def test_draw_bits_golden_vectors(gpu):
    vectors = [vector for vector in golden()["masks"] if 0 < vector["threshold"] < 1 << 32]
    assert vectors
    for vector in vectors:
        expected = [int(word, 16) for word in vector["words"]]
        cuda_intrinsics = np.full(len(expected), 0xA5A5A5A5, np.uint32)
        gpu.forget()
        gpu.allow(cuda_intrinsics)
        seed, offset = int(vector["seed"], 16), int(vector["offset"], 16)
        first, n = 32 * vector["first_word"], 32 * cuda_intrinsics.size
        numba_cuda.draw_bits_at(0, 0, cuda_intrinsics.ctypes.data, 0, first, n, seed, offset, vector["threshold"])
        assert cuda_intrinsics.tolist() == expected, vector


@pytest.mark.parametrize("position", POSITIONS)
def test_draw_bits_positions(gpu, position):
    """Bits below stay, those above the last one are cleared, the next word stays."""
    for n, first in itertools.product((1, 31, 33, 1000), FIRSTS):
        assert_drawn_as_reference(gpu, n, first=first, position=position)


@pytest.mark.parametrize("cut", THRESHOLDS.values(), ids=THRESHOLDS)
def test_draw_bits_thresholds(gpu, cut):
    for first, position in ((0, 0), (2**37 - 200, 3)):
        assert_drawn_as_reference(gpu, 400, first=first, position=position, cut=cut)


def test_draw_bits_to_the_last_cell(gpu):
    for n, position in itertools.product((1, 33, 1024), (0, 9)):
        assert_drawn_as_reference(gpu, n, first=2**64 - n, position=position)


def test_positions_beyond_32_bits(gpu):
    """Words that lie where bit 0 would be 16 GiB below them."""
    far, dtype = 2**37, DTYPES[0]
    x, y = dtype.data(240), np.empty(240, np.float32)
    cuda_intrinsics, expected = random_words(300), random_words(300)
    gpu.allow(x, y, cuda_intrinsics)
    at = cuda_intrinsics.ctypes.data - far // 8
    numba_cuda.draw_bits_at(0, 0, at, far + 41, 7, 200, SEED, OFFSET, TENTH)
    reference.draw_bits(expected, 41, 7, 200, SEED, OFFSET, TENTH)
    assert_same_bits(cuda_intrinsics, expected)
    for grid in ((1, 1, 240), (3, 5, 16), (5, 16, 3)):
        numba_cuda.masked_affine_at(0, 0, dtype.tag, x.ctypes.data, y.ctypes.data, at, far + 41, *grid, *SCALE)
        assert_as_reference(dtype, y, expected_masked(dtype, grid, cuda_intrinsics, position=41), grid)


@pytest.mark.parametrize(("blocks", "warps"), [(1, 1), (3, 1), (2, 2), (1, 4)])
def test_draw_bits_any_number_of_blocks(gpu, blocks, warps):
    gpu.blocks, gpu.warps = blocks, warps
    assert_drawn_as_reference(gpu, 5000, first=12_345, position=3)
    assert gpu.launches[0].blocks == blocks


@pytest.mark.parametrize("first", [0, 5])
def test_seed_on_the_device(gpu, first):
    """The seed given by value is not used then."""
    at = np.array([SEED], np.uint64)
    dtype, x, y, kept = DTYPES[0], DTYPES[0].data(1100), np.empty(1100, np.float32), np.empty(35, np.uint32)
    gpu.allow(at, x, y, kept)
    cuda_intrinsics, before = drawn(gpu, 100, first=first, seed=123, seed_at=at.ctypes.data)
    assert_same_bits(cuda_intrinsics, expected_drawn(100, before, first=first))
    addresses = [array.ctypes.data for array in (x, y, kept)]
    numba_cuda.dropout_forward_at(
        0, 0, dtype.tag, *addresses, first, y.size, 123, OFFSET, TENTH, *SCALE, seed_at=at.ctypes.data
    )
    expected_y, expected_words = np.empty_like(y), np.empty_like(kept)
    reference.dropout_forward(dtype.tag, x, expected_y, expected_words, first, y.size, SEED, OFFSET, TENTH, *SCALE)
    assert_same_bits(kept, expected_words)
    assert_as_reference(dtype, y, expected_y)


# ---- elementwise, drawn ----


@pytest.mark.parametrize("first", [0, 31])
def test_dropout_forward_lengths(gpu, dtype, first):
    for n in LENGTHS:
        assert_forward_as_reference(gpu, dtype, n, first=first)
    assert forms(gpu) == {("elementwise", "drawn_shifted" if first else "drawn")}


@pytest.mark.parametrize("first", [32, 2**37 - 1024, 2**37 - 1029, 2**64 - 1100])
def test_dropout_forward_firsts(gpu, first):
    assert_forward_as_reference(gpu, DTYPES[0], 1100, first=first)


@pytest.mark.parametrize("cut", THRESHOLDS.values(), ids=THRESHOLDS)
def test_dropout_forward_thresholds(gpu, cut):
    for first in (0, 13):
        assert_forward_as_reference(gpu, DTYPES[3], 1100, first=first, cut=cut)


@pytest.mark.parametrize("affine", COEFFICIENTS.values(), ids=COEFFICIENTS)
def test_dropout_forward_affine(gpu, dtype, affine):
    assert_forward_as_reference(gpu, dtype, 1100, affine=affine)
    assert {launch.variant.plain for launch in gpu.launches} == {affine[1] == affine[2] == 0.0}


def test_dropout_forward_alignment(gpu, dtype):
    """Vectors where x and y both lie at multiples of 16 bytes, and nowhere else."""
    item = dtype.itemsize
    for x_shift, y_shift in ((0, 0), (16, 48), (item, 0), (0, item), (item, item), (8, 24)):
        gpu.launches.clear()
        assert_forward_as_reference(gpu, dtype, 1100, first=0, shifts=(x_shift, y_shift, 4))
        (launch,) = gpu.launches
        assert launch.values[5] == (x_shift % 16 == y_shift % 16 == 0)  # whole tiles


@pytest.mark.parametrize("shift", [0, 8], ids=["whole tiles", "unaligned"])
def test_dropout_forward_in_place(gpu, dtype, shift):
    y, cuda_intrinsics = forward(gpu, dtype, 2100, first=7, shifts=(shift, shift, 0), in_place=True)
    expected_y, expected_words = expected_forward(dtype, 2100, first=7)
    assert_same_bits(cuda_intrinsics, expected_words)
    assert_as_reference(dtype, y, expected_y)


@pytest.mark.parametrize("shift", [0, 8], ids=["whole tiles", "unaligned"])
def test_dropout_forward_without_words(gpu, dtype, shift):
    for first in (0, 5):
        y, cuda_intrinsics = forward(gpu, dtype, 1100, first=first, shifts=(shift, 0, 0), stored=False)
        assert (cuda_intrinsics == 0xFFFFFFFF).all()
        kept, _ = forward(gpu, dtype, 1100, first=first)
        assert_as_reference(dtype, y, kept)


@pytest.mark.parametrize(("blocks", "warps"), [(1, 1), (3, 1), (2, 2), (1, 4), (9, 1)])
@pytest.mark.parametrize("shift", [0, 4], ids=["whole tiles", "unaligned"])
def test_elementwise_any_number_of_blocks(gpu, blocks, warps, shift):
    """Each tile once, by whichever warp."""
    gpu.blocks, gpu.warps = blocks, warps
    n = 5 * 1024 + 7
    assert_forward_as_reference(gpu, DTYPES[3], n, shifts=(shift, 0, 0))
    assert_masked_as_reference(gpu, DTYPES[0], (1, 1, n), random_words(n + 3), position=3, shifts=(shift, 0, 0))
    assert {launch.blocks for launch in gpu.launches} == {min(blocks, -(-6 // warps))}


# ---- elementwise, stored ----


@pytest.mark.parametrize("position", POSITIONS)
def test_masked_affine_lengths(gpu, dtype, position):
    for n in LENGTHS:
        assert_masked_as_reference(gpu, dtype, (1, 1, n), random_words(position + n), position=position)
    assert forms(gpu) == {("elementwise", "stored")}


@pytest.mark.parametrize("affine", COEFFICIENTS.values(), ids=COEFFICIENTS)
def test_masked_affine_affine(gpu, dtype, affine):
    cuda_intrinsics = random_words(5 + 1100)
    cuda_intrinsics[0] |= 0x3FE0  # keeps zeros of both signs, and other special values
    for grid in ((1, 1, 1100), (3, 5, 16), (3, 5, 11)):
        assert_masked_as_reference(gpu, dtype, grid, cuda_intrinsics, position=5, affine=affine)
    assert forms(gpu) == {("elementwise", "stored"), ("strided", "wide"), ("strided", "narrow")}


def test_masked_affine_alignment(gpu, dtype):
    item = dtype.itemsize
    for shifts in ((16, 32, 4), (item, 0, 0), (0, item, 4), (item, item, 0)):
        for grid in ((1, 1, 1100), (3, 5, 16)):
            gpu.launches.clear()
            assert_masked_as_reference(gpu, dtype, grid, random_words(9 + 1100), position=9, shifts=shifts)
            (launch,) = gpu.launches
            vectors = launch.values[5] == 1 if grid[0] == 1 else launch.variant.form == "wide"
            assert vectors == (shifts[0] == 16), (shifts, grid)


@pytest.mark.parametrize("grid", [(1, 1, 2100), (3, 20, 16), (3, 20, 11)], ids=str)
@pytest.mark.parametrize("shift", [0, 8], ids=["aligned", "unaligned"])
def test_masked_affine_in_place(gpu, dtype, grid, shift):
    cuda_intrinsics = random_words(grid[0] * grid[2])
    assert_masked_as_reference(gpu, dtype, grid, cuda_intrinsics, shifts=(shift, shift, 0), in_place=True)


@pytest.mark.parametrize("shift", [0, 4], ids=["whole tiles", "unaligned"])
def test_dropped_values_leave_no_trace(gpu, dtype, shift):
    """A dropped infinity or NaN, of either sign, is +0: every bit of it."""
    x = np.tile(dtype.specials(), 55)
    source, y = Guarded.of(x, 2 * shift), Guarded(x.size, dtype.storage)
    cuda_intrinsics, none = np.zeros(word_count(x.size), np.uint32), np.zeros(word_count(x.size), np.uint32)
    gpu.allow(source.array, y.array, cuda_intrinsics, none)
    at = [array.ctypes.data for array in (source.array, y.array)]
    numba_cuda.masked_affine_at(0, 0, dtype.tag, *at, none.ctypes.data, 0, 1, 1, x.size, *SCALE)
    assert not y.array.view(dtype.bits).any()
    numba_cuda.dropout_forward_at(
        0, 0, dtype.tag, *at, cuda_intrinsics.ctypes.data, 0, x.size, SEED, OFFSET, 1 << 31, 2.0, 0.0, 0.0
    )
    keep = np.unpackbits(cuda_intrinsics.view(np.uint8), bitorder="little")[: x.size].view(np.bool_)
    assert not keep.all()
    assert not y.array.view(dtype.bits)[~keep].any()


# ---- strided ----


@pytest.mark.parametrize("grid", SMALL_GRIDS, ids=str)
def test_masked_affine_grids(gpu, dtype, grid):
    for position in (0, 33):
        cuda_intrinsics = random_words(position + grid[0] * grid[2])
        assert_masked_as_reference(gpu, dtype, grid, cuda_intrinsics, position=position)


@pytest.mark.parametrize("axes", SMALL_AXES.values(), ids=SMALL_AXES)
def test_strided_affine_axes(gpu, dtype, axes):
    assert_strided_as_reference(gpu, dtype, axes, position=29)
    assert_strided_as_reference(gpu, dtype, axes, shifts=(dtype.itemsize, 0, 4), affine=AFFINE["affine"])


@pytest.mark.parametrize(
    "axes",
    [
        ((3, 1), (5, 1001), (7, 17), (16, 170)),  # vectors of any stride
        ((3, 1), (5, 1001), (7, 17), (16, 2)),
        ((3, 2003), (5, 0), (2, 501), (32, 1)),  # vectors of neighbours
        ((3, 409), (5, 31), (2, 3), (16, 0)),  # vectors that share a cell
        ((3, 1), (5, 1001), (7, 17), (9, 170)),
        ((3, 2003), (5, 0), (2, 501), (33, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("blocks", "warps"), [(1, 1), (2, 2)])
def test_strided_affine_four_axes(gpu, dtype, axes, blocks, warps):
    gpu.blocks, gpu.warps = blocks, warps
    for position in (0, 29):
        assert_strided_as_reference(gpu, dtype, axes, position=position, in_place=position == 0)
    assert forms(gpu) == {("strided", "narrow" if axes[-1][0] % 2 else "wide")}


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_scale_of_a_count(gpu, dtype, counts):
    assert_scaled_by_a_count(gpu, dtype, *counts)
    assert {launch.variant.counted for launch in gpu.launches} == {True}


# ---- noise, and bits alone ----


@pytest.mark.parametrize("first", [0, 5, 63, 2**34 - 70, 2**61 - 200])
def test_gaussian_multiply(gpu, dtype, first):
    """From within a tile, over where the counter passes 2**32, to the last cell."""
    for n in (1, 59, 64, 200):
        assert_gaussian_as_reference(gpu, dtype, n, first=first, shifts=(dtype.itemsize, 0))
    assert_gaussian_as_reference(gpu, dtype, 200, first=first, in_place=True)


def test_gaussian_multiply_where_the_logarithm_is_0(gpu):
    first, offset = drawing_noise(0xFFFFFFFF, 0x12345678)
    assert_gaussian_as_reference(gpu, DTYPES[0], 64, first=first, offset=offset)


@pytest.mark.parametrize(("blocks", "warps"), [(1, 1), (3, 1), (2, 2)])
def test_bits_and_noise_any_number_of_blocks(gpu, blocks, warps):
    gpu.blocks, gpu.warps = blocks, warps
    assert_gaussian_as_reference(gpu, DTYPES[0], 1000, first=7)
    assert_dilated_as_reference(gpu, 30, 70, 1, 3)
    assert_counted(gpu, 1700, before=2**32 - 1)
    assert {launch.blocks for launch in gpu.launches} == {blocks}


@pytest.mark.parametrize("shape", DILATIONS, ids=str)
def test_dilate_bits(gpu, shape):
    assert_dilated_as_reference(gpu, *shape)


# ---- rows ----

# Each kernel once, with all that it may have.
FULL = ("bias_dropout_add", "bias's sums, odd", "layer norm", "norm's gradients", "softmax, mask", "softmax's gradient")


@pytest.mark.parametrize("name", ROWS_CASES)
def test_fused_bfloat16_on_float32(gpu, name):
    assert_case_as_reference(gpu, name, "bfloat16 on float32")


@pytest.mark.parametrize("name", FULL)
def test_fused_float64(gpu, name):
    assert_case_as_reference(gpu, name, "float64")


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(("pair", "columns"), [("float32", 8), ("float64", 9), ("float16", 16)])
def test_fused_activations(gpu, activation, pair, columns):
    assert_activations_as_reference(gpu, activation, pair, columns)


@pytest.mark.parametrize("pair", ["float64", "bfloat16 on float32"])
def test_fused_special_numbers(gpu, pair):
    assert_special_numbers_as_reference(gpu, pair, ACTIVATIONS)


@pytest.mark.parametrize(("blocks", "warps"), [(1, 1), (3, 1), (1, 2), (2, 4)])
def test_fused_any_number_of_blocks(gpu, blocks, warps):
    gpu.blocks, gpu.warps = blocks, warps
    for name in ("unaligned", "bias's sums", "layer norm, long", "norm's gradients, long"):
        assert_case_as_reference(gpu, name, "float32")
    assert max(launch.blocks for launch in gpu.launches) == blocks


def test_nothing_to_do_launches_nothing(gpu, dtype):
    forward(gpu, dtype, 0)
    drawn(gpu, 0)
    assert_gaussian_as_reference(gpu, dtype, 0)
    assert_dilated_as_reference(gpu, 0, 3, 5, 2)
    assert_counted(gpu, 0)
    for grid in ((0, 3, 5), (3, 0, 5), (3, 5, 0)):
        assert_masked_as_reference(gpu, dtype, grid, random_words(32))
    assert gpu.launches == []

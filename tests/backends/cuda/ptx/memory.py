"""Memory as a launch of a PTX kernel sees it: which bytes it may touch, and which thread has touched them.

`program` compiles loads and stores to calls of `Window`, which stops at memory outside of the arrays, at misaligned
addresses and at data races.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Selection = Any  # of threads, in order: a slice, or an index array where they have gaps
Threads = Any  # `threads.Threads`

WIDEST = 16  # bytes of one access
SEVERAL, ATOMIC = -1, -2  # in the place of a thread: several have read it; some have added to it


class Fault(Exception):
    """What a GPU stops at, or what PTX leaves undefined."""


class Race(Exception):
    """Two threads of a launch on the same byte, at least one of them writing."""


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Memory:
    """Arrays that kernels may access, from lowest to highest byte, and write unless they are read-only; kept alive."""

    def __init__(self, arrays: Iterable[NDArray[Any]]) -> None:
        self._arrays = [array for array in arrays if array.size]
        bounds = map(np.lib.array_utils.byte_bounds, self._arrays)
        self._ranges = [(*ends, a.flags.writeable) for ends, a in zip(bounds, self._arrays, strict=True)]

    def intervals(self, writeable: bool) -> NDArray[np.uint64]:
        """Starts and ends of what may be read or written, joined where they touch."""
        joined: list[list[int]] = []
        for low, high, may_write in sorted(self._ranges):
            if may_write or not writeable:
                if joined and low <= joined[-1][1]:
                    joined[-1][1] = max(high, joined[-1][1])
                else:
                    joined.append([low, high])
        return np.array(joined or [[2**64 - 1] * 2], np.uint64).T


class _Bytes:
    """The address space from ``low`` to ``high``, for numpy.asarray; what isn't indexed isn't touched."""

    def __init__(self, low: int, high: int) -> None:
        self.__array_interface__ = {"data": (low, False), "shape": (high - low,), "typestr": "|u1", "version": 3}


class Window:
    """Memory as one launch sees it. Threads' marks are kept per granule: the narrowest access there is."""

    def __init__(self, memory: Memory, granule: int) -> None:
        (self.starts, self.ends), (self.may_start, self.may_end) = map(memory.intervals, (False, True))
        self.low = int(self.starts[0]) // WIDEST * WIDEST
        high = round_up(int(self.ends[-1]), WIDEST) if self.ends[-1] < 2**63 else self.low
        self.bytes = np.asarray(_Bytes(self.low, high)) if high > self.low else np.empty(0, np.uint8)
        self.granule = granule
        if high > self.low:
            firsts = self.starts // np.uint64(WIDEST) * np.uint64(WIDEST)
            sizes = [round_up(int(size), WIDEST) for size in self.ends - firsts]
            *offsets, total = accumulate(sizes, initial=0)
            self.shifts = firsts - np.array(offsets, np.uint64)
            self.writer, self.reader = np.zeros((2, total // granule), np.int32)  # thread + 1

    def forget(self, interval: int) -> None:
        """What was accessed there: a barrier is between that and what follows."""
        first, end = (int(at[interval] - self.shifts[interval]) // self.granule for at in (self.starts, self.ends))
        self.writer[first:end] = self.reader[first:end] = 0

    def load(self, t: Threads, at: Selection, address: Any, dtype: np.dtype[Any], count: int) -> list[NDArray[Any]]:
        units, index = self._units(t, at, address, dtype, count, writes=False)
        return list(units[index].T)

    def store(self, t: Threads, at: Selection, address: Any, dtype: np.dtype[Any], values: Sequence[Any]) -> None:
        units, index = self._units(t, at, address, dtype, len(values), writes=True)
        for i, value in enumerate(values):
            units[index, i] = value

    def add(self, t: Threads, at: Selection, address: Any, values: Any) -> NDArray[Any]:
        """Atomically, in the threads' order; what was there before."""
        units, index = self._units(t, at, address, np.dtype("u8"), 1, writes=True, atomic=True)
        before = np.empty(len(index), np.uint64)
        for i, value in enumerate(np.broadcast_to(values, before.shape)):
            before[i] = units[index[i], 0]
            units[index[i], 0] += value
        return before

    def _units(
        self,
        t: Threads,
        at: Selection,
        address: Any,
        dtype: np.dtype[Any],
        count: int,
        writes: bool,
        atomic: bool = False,
    ) -> Any:
        width = count * dtype.itemsize
        address = np.broadcast_to(address, t.ids[at].shape)
        self._fail_if(t, at, address, address % width != 0, f"misaligned for {width} bytes:", writes)
        interval, inside = self._find(self.starts, self.ends, address, width)
        self._fail_if(t, at, address, ~inside, "outside of the memory allowed:", writes)
        if writes:
            _, inside = self._find(self.may_start, self.may_end, address, width)
            self._fail_if(t, at, address, ~inside, "read-only memory:", writes)
        self._mark(t, at, address, address - self.shifts[interval], width, writes, atomic)
        return self.bytes.view(dtype).reshape(-1, count), ((address - self.low) // width).astype(np.intp)

    @staticmethod
    def _find(starts: Any, ends: Any, address: Any, width: int) -> Any:
        interval = np.searchsorted(starts, address, side="right") - 1  # -1, the last, where below all
        return interval, (starts[interval] <= address) & (address <= ends[interval] - width)

    @staticmethod
    def _fail_if(t: Threads, at: Selection, address: Any, wrong: Any, what: str, writes: bool) -> None:
        if wrong.any():
            t.fail(Fault, f"{what} {'store to' if writes else 'load from'} {int(address[wrong][0]):#x}", at, wrong)

    def _mark(
        self, t: Threads, at: Selection, address: Any, place: Any, width: int, writes: bool, atomic: bool
    ) -> None:
        cells, me, per = (place // self.granule).astype(np.intp), t.first + 1 + t.ids[at], width // self.granule
        if atomic:
            me = np.full_like(me, ATOMIC)
        if per > 1:
            cells, me = (cells[:, None] + np.arange(per)).ravel(), me.repeat(per)
        other = self.writer[cells]
        if writes:
            other = np.where((other == 0) | (other == me), self.reader[cells], other)
            self.writer[cells] = me
            other = np.where((other == 0) | (other == me), self.writer[cells], other)
        else:
            before = self.reader[cells]
            self.reader[cells] = me
            several = ((before != 0) & (before != me)) | (self.reader[cells] != me)
            self.reader[cells[several]] = SEVERAL
        clash = (other != 0) & (other != me)
        if clash.any():
            first = int(clash.argmax())
            who = {SEVERAL: "several threads", ATOMIC: "an atomic"}.get(other[first]) or t.name(int(other[first]) - 1)
            what = f"{'writes' if writes else 'reads'} {int(address[first // per]):#x}, which {who} accessed"
            t.fail(Race, what, at, np.arange(len(address)) == first // per)

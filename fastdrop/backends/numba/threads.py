"""Runs a kernel over ranges of its work by several threads, for the launchers (`launch`).

A small pool of Python threads shares the ranges; kernels release the GIL. Numba's own parallel layers are not used,
because they hang or abort in forked children and under concurrent callers.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from .modes import float_modes, set_float_modes

BLOCK_CELLS = 512
GRAIN_CELLS = 128 * BLOCK_CELLS

_num_threads = 1
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def set_num_threads(n: int) -> None:
    global _num_threads
    _num_threads = n


def over_ranges(kernel: Callable[..., None], arguments: tuple[Any, ...], n: int, lead: int = 0, cells: int = 1) -> None:
    """kernel(begin, end, *arguments) over 0 .. n, units of so many cells, by several threads where that pays.

    Seams lie where ``lead`` + cell is a multiple of a block, so that no two threads share a word; between any units of
    several cells, which share none. The last part takes what rounding leaves.
    """
    parts = min(_num_threads, n * cells // GRAIN_CELLS, n)
    if parts <= 1:
        kernel(0, n, *arguments)
        return
    seam = BLOCK_CELLS if cells == 1 else 1
    step = n // parts // seam * seam
    seams = [0, *(i * step - lead % seam for i in range(1, parts)), n]
    # Over no range, to compile: where memory is short that fails, and must in the caller and not in a pool's thread.
    kernel(0, 0, *arguments)
    _Job(kernel, arguments, itertools.pairwise(seams)).run(parts)


class _Job:
    """One call's ranges. A free thread takes the next one, under the caller's floating-point modes."""

    def __init__(self, kernel: Callable[..., None], arguments: tuple[Any, ...], ranges: Iterable[Any]) -> None:
        self._kernel, self._arguments = kernel, arguments
        self._ranges = deque(ranges)
        self._left = len(self._ranges)
        self._ended: SimpleQueue[BaseException | None] = SimpleQueue()  # None, or what was raised, for each range
        self._modes = float_modes()

    def run(self, threads: int) -> None:
        """Everything, by so many threads, or fewer where the system gives no more."""
        for _ in range(threads - 1):
            try:
                _workers().submit(self._help)
            except RuntimeError:  # no thread can be started: memory is short, or the interpreter is about to end
                break
        self._work()
        ended = [self._ended.get() for _ in range(self._left)]
        for error in ended:
            if error is not None:
                raise error

    def _help(self) -> None:
        own = float_modes()
        set_float_modes(self._modes)
        try:
            self._work()
        finally:
            set_float_modes(own)

    def _work(self) -> None:
        while True:
            try:
                part = self._ranges.popleft()
            except IndexError:
                return
            error: BaseException | None = None
            try:
                self._kernel(*part, *self._arguments)
            except BaseException as raised:
                error = raised
            self._ended.put(error)


def _workers() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(256, thread_name_prefix="fastdrop")
        return _pool


def _forget_pool() -> None:
    """The threads of a parent are not in its forked child."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)

"""Where results come from while a case is timed: memory that is used again, or new from the system each time.

glibc maps an array of a few MiB anew or takes it from its heap, and gives the heap's end back or not, by what was freed
before: a case may meet either, and new pages cost more than most kernels here. So a case says which it is to meet, and
both sides of a comparison meet the same.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # mallopt's
KINDS = ("reused", "fresh")


@contextlib.contextmanager
def results(kind: str) -> Iterator[None]:
    """``reused``: from the heap, which keeps what is freed; ``fresh``: mapped anew from 1 MiB on."""
    options = {"reused": {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}, "fresh": {MMAP_MAX: 65536, MMAP_THRESHOLD: 1 << 20}}
    _set(options[kind])
    try:
        yield
    finally:
        _set({MMAP_MAX: 65536, MMAP_THRESHOLD: 128 << 10, TRIM_THRESHOLD: 128 << 10})  # glibc's defaults


def _set(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not all(mallopt(option, value) for option, value in options.items()):
        raise RuntimeError("these benchmarks ask glibc for memory, but this C library has no mallopt or refused it")

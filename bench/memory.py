"""Decides where results come from while a case is timed: memory that is used again, or new pages from the system.

glibc takes an array of a few MiB from its heap or maps it anew, depending on what was freed before. New pages cost more
than most kernels here. So a case says which of the two it is to meet, and both sides of a comparison meet the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Callable, Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # mallopt's
KINDS = ("reused", "fresh")
FROM_BYTES = 1 << 20
OPTIONS = {"reused": {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}, "fresh": {MMAP_MAX: 65536, MMAP_THRESHOLD: FROM_BYTES}}


@contextlib.contextmanager
def results(kind: str) -> Iterator[None]:
    """``reused``: from the heap, which keeps what is freed; ``fresh``: mapped anew from 1 MiB on.

    Once asked for, glibc's own way, a threshold that moves with what is freed, does not come back: let no case of a
    suite do without.
    """
    c = ctypes.CDLL(None)
    if not all(c.mallopt(option, value) for option, value in OPTIONS[kind].items()):
        raise RuntimeError("these benchmarks ask glibc for memory, but it refused")
    c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    taken = list(_free_chunks(c.malloc)) if kind == "fresh" else []
    try:
        yield
    finally:
        for chunk in taken:
            c.free(chunk)


def _free_chunks(malloc: Callable[[int], int]) -> Iterator[int]:
    """What the heap has left of large chunks, which it would give before it maps any."""
    while True:
        chunk = malloc(FROM_BYTES)
        yield chunk
        if ctypes.c_size_t.from_address(chunk - ctypes.sizeof(ctypes.c_size_t)).value & 2:  # it is mapped
            return


def faults(call: Callable[[], object]) -> int:
    """Pages that the system has to provide for a call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

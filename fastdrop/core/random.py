"""Random numbers: streams of (seed, offset), the Philox generator, and the threshold and scale of a probability.

Every op asks `random_state` for the seed and offset of its draw; users make a `Stream` or call `manual_seed`. The rule
that turns them into bits is decided here (docs/design.md, section 1): mask word ``w`` is made of eight groups of four
bit planes, and group ``g`` is one Philox4x32-10 block with the key ``seed`` and the counter
``(w low, w high | 1 << 27 | g << 29, offset low, offset high)``.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks

UInt32Array = NDArray[np.uint32]
State = tuple[int, int]  # seed, offset

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # key increments: golden ratio, sqrt(3) - 1
MASK_DOMAIN = 1 << 27  # bits 27-28 of counter word 1: 1 = mask bits; 0 is free for torch and cuRAND
NOISE_DOMAIN = 2 << 27  # Gaussian noise
CHILD_DOMAIN = 3 << 27  # seed and offset of a child stream
SPAWNED, FORKED = 0, 1  # third counter word: a child of `Stream.spawn`, or the process-wide stream of a forked process
GROUP_SHIFT = 29
PLANES_PER_GROUP = 4
GROUPS = 8
# Noise: 16 counters make a tile of 64 cells. Cell ``16 k + j`` of the tile is normal k of counter j.
NOISE_CELLS, NOISE_COUNTERS = 64, 16
# ln(1 + x) / x**3 + 1 / (2 x) - 1 / x**2 for sqrt(1/2) <= 1 + x < sqrt(2), highest power first; ln 2 in two parts.
# Source: Moshier, Cephes 2.2, 1992, logf; so are the sine and the cosine, for angles up to pi / 4.
LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
SQRT_HALF_BITS = 0x3F3504F3
SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
RADIANS = 1.5707963267948966 / 2**32  # of a quarter turn, in 2**32 steps
DROP_ALL = 1 << 32  # the threshold of p = 1
LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """``round_half_even(p * 2**32)``: a cell is dropped when its 32-bit draw is below the threshold.

    >>> threshold(0.5) == 2**31, threshold(1e-10), threshold(1.0) == 2**32
    (True, 0, True)
    """
    return round(p * 4294967296.0)  # the product is exact: only the exponent changes


@lru_cache(maxsize=1024)
def threshold_and_scale(p: float) -> tuple[int, float]:
    """`threshold` and its `keep_scale`, cached because a network uses few different p."""
    drop_threshold = threshold(p)
    return drop_threshold, keep_scale(drop_threshold)


def keep_scale(threshold: int) -> float:
    """``1 / (1 - threshold / 2**32)``: inverted dropout's multiplier, for the drop probability that is really used.

    >>> keep_scale(2**31)
    2.0
    """
    return nearest(DROP_ALL, DROP_ALL - threshold) if threshold < DROP_ALL else 0.0


def nearest(numerator: int, denominator: int) -> float:
    """The quotient, rounded to nearest under any rounding mode of the CPU.

    Cached results must not depend on the mode of the first caller. Python divides ints of more than 53 bits by integer
    arithmetic, which no mode changes.

    >>> nearest(1, 3) == 1 / 3
    True
    """
    return (numerator << 64) / (denominator << 64)


def philox4x32_10(
    counter: tuple[Any, Any, Any, Any], key: tuple[int, int]
) -> tuple[UInt32Array, UInt32Array, UInt32Array, UInt32Array]:
    """Four words of Philox4x32-10 for each counter.

    Parameters
    ----------
    counter : tuple of four uint32 scalars or arrays that broadcast together
    key : tuple of two ints below 2**32

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    >>> [hex(int(word)) for word in philox4x32_10((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = (np.asarray(c).astype(np.uint64) for c in counter)
    m0, m1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
    k0, k1 = key
    low, shift = np.uint64(LOW), np.uint64(32)
    for _ in range(ROUNDS):  # parts of the counter broadcast late: the first rounds work on small arrays
        p0, p1 = m0 * c0, m1 * c2
        c0, c1 = (p1 >> shift) ^ (c1 ^ np.uint64(k0)), p1 & low
        c2, c3 = (p0 >> shift) ^ (c3 ^ np.uint64(k1)), p0 & low
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


class Stream:
    """A seed and a running offset. Each draw takes the next offset, so the draws of a stream are independent.

    Parameters
    ----------
    seed, offset : int
        From 0 to 2**64 - 1. After the last offset comes 0.
    spawned : int
        The number of children that the stream has already made; see `spawn`.

    Raises
    ------
    TypeError, ValueError
        For anything else.

    Notes
    -----
    Drawing is thread-safe. Streams compare by value and can be pickled. A copy, or a stream that a forked process
    inherits, draws the same as the original draws next. Use `spawn` to give each worker a stream of its own.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> s = fd.Stream(7)
    >>> first, second = fd.draw_mask(1000, 0.5, rng=s), fd.draw_mask(1000, 0.5, rng=s)
    >>> first == second, s
    (False, Stream(seed=7, offset=2))
    >>> first == fd.draw_mask(1000, 0.5, rng=fd.Stream(7))
    True
    """

    __slots__ = ("__weakref__", "_lock", "_offset", "_seed", "_spawned")

    def __init__(self, seed: int, offset: int = 0, spawned: int = 0) -> None:
        self._seed = checks.uint64("seed", seed)
        self._offset = checks.uint64("offset", offset)
        self._spawned = checks.child_count("spawned", spawned)
        self._lock = threading.Lock()
        _streams[id(self)] = self

    @property
    def seed(self) -> int:
        """The seed of all draws."""
        return self._seed

    @property
    def offset(self) -> int:
        """The offset that the next draw will take."""
        return self._offset

    @property
    def spawned(self) -> int:
        """The number of children that the stream has made."""
        return self._spawned

    def take(self) -> State:
        """Takes the random state of one draw. The next call gives the next offset.

        Returns
        -------
        seed, offset : int
        """
        with self._lock:
            offset = self._offset
            self._offset = offset + 1 if offset < checks.UINT64_END - 1 else 0
        return self._seed, offset

    def spawn(self, n_children: int) -> list[Stream]:
        """Returns independent child streams, one for each worker, as `numpy.random.Generator.spawn` does.

        Child ``i`` depends on the stream's seed and on ``i`` only. The next call makes the next children. The stream's
        own draws do not change. A child's seed and offset are a Philox block of this stream's seed (docs/design.md,
        section 1), so children of children are independent as well.

        Parameters
        ----------
        n_children : int
            At least 0.

        Returns
        -------
        list of Stream

        Raises
        ------
        TypeError, ValueError
            n_children is not an int, is below 0, or would make more than 2**59 children in all.

        Examples
        --------
        >>> import fastdrop as fd
        >>> stream = fd.Stream(7)
        >>> workers = stream.spawn(3)
        >>> masks = [fd.draw_mask(1000, 0.5, rng=worker) for worker in workers]
        >>> masks[0] == masks[1], stream
        (False, Stream(seed=7, offset=0, spawned=3))
        >>> fd.Stream(7).spawn(3) == fd.Stream(7).spawn(1) + fd.Stream(7, spawned=1).spawn(2)
        True
        """
        with self._lock:
            first = self._spawned
            end = checks.child_count("n_children", n_children, first)
            children = [self._child(number) for number in range(first, end)]
            self._spawned = end
        return children

    def _child(self, number: int, kind: int = SPAWNED) -> Stream:
        counter = number & LOW, number >> 32 | CHILD_DOMAIN, kind, 0
        block = philox4x32_10(counter, (self._seed & LOW, self._seed >> 32))
        a, b, c, d = (int(word) for word in block)
        return Stream(a | b << 32, c | d << 32)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stream):
            return NotImplemented
        return bool(self.__reduce__() == other.__reduce__())

    def __reduce__(self) -> tuple[type[Stream], tuple[int, int, int]]:
        return Stream, (self._seed, self._offset, self._spawned)

    def __repr__(self) -> str:
        spawned = f", spawned={self._spawned}" if self._spawned else ""
        return f"Stream(seed={self._seed}, offset={self._offset}{spawned})"


# All streams. A forked child gives each a new lock, because a thread of the parent may hold the old one forever.
_streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()


def _entropy() -> int:
    return int.from_bytes(os.urandom(8), "little")


_default = Stream(_entropy())
_seeded_by_user = False
_forks = itertools.count()  # numbers the forks of this process since it was seeded
_this_thread = threading.local()


def check_random_state(rng: Any) -> None:
    """Raises the errors of `random_state`, but draws nothing."""
    if not (rng is None or type(rng) is Stream or isinstance(rng, (Stream, np.random.Generator))):
        random_state(rng)


def random_state(rng: Any) -> State:
    """(seed, offset) for one draw, from any value that ``rng`` may have; None is the process-wide stream."""
    if rng is None:
        return _default.take()
    if type(rng) is int:
        return checks.uint64("rng, as a seed,", rng), 0
    if isinstance(rng, Stream):
        return rng.take()
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(0, checks.UINT64_END, dtype=np.uint64)), 0
    if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
        return checks.uint64("rng, as a seed,", rng), 0
    raise checks.random_state_error(rng)


def manual_seed(seed: int) -> Stream:
    """Restarts the process-wide stream at ``seed`` and returns it.

    Parameters
    ----------
    seed : int
        From 0 to 2**64 - 1.

    Returns
    -------
    Stream
        The process-wide stream, from which calls draw if their rng is None.

    Raises
    ------
    TypeError, ValueError
        If seed is not an int or out of range.

    Notes
    -----
    A forked process gets a stream of its own, which depends on ``seed`` and on the number of forks since this call: the
    workers of a DataLoader differ, in each epoch, and a program that is run again draws the same masks. The parent's
    stream does not change. Processes that are forked in turn follow the same rule. Without a call of this function
    each process gets a random seed, and so does one that is started by "spawn" or "forkserver"; call it there too.

    All calls of `os.fork` count, also those of other code. `subprocess` calls it only for ``preexec_fn``.

    Examples
    --------
    >>> import fastdrop as fd
    >>> fd.manual_seed(0)
    Stream(seed=0, offset=0)
    """
    global _default, _seeded_by_user, _forks
    _default, _forks = Stream(seed), itertools.count()
    _seeded_by_user = True
    return _default


def _before_fork() -> None:
    # The child has this thread alone, so it finds its own number, though other threads may be forking.
    _this_thread.fork = next(_forks)


def _after_fork_in_child() -> None:
    global _default, _forks
    for stream in list(_streams.values()):
        stream._lock = threading.Lock()
    _default = _default._child(_this_thread.fork, FORKED) if _seeded_by_user else Stream(_entropy())
    _forks = itertools.count()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)

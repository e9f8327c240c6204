"""Masks as values: what the forward pass hands to the backward pass.

Users get a `PackedMask` (one bit per cell), a `SeededMask` or `GaussianNoise` (nothing but a random state) from the ops
of `fastdrop.arrays`. The packed format is decided here: words are uint32, bit ``j`` of word ``w`` is cell ``32 w + j``,
least significant bit first, 1 = keep; unused bits of the last word are 0; memory is little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .part import Part, Parts, parts_of
from .random import DROP_ALL, State, keep_scale, threshold

NOISE_END = 1 << 61  # the cells that Gaussian noise has numbers for


def word_count(cells: int) -> int:
    """The number of words for so many cells."""
    return (cells + 31) >> 5


def fill_words(words: NDArray[np.uint32], cells: int, threshold: int) -> None:
    """Writes a mask that needs no draw: keep all (threshold 0) or drop all (threshold 2**32)."""
    words[:] = 0 if threshold == DROP_ALL else 0xFFFFFFFF
    if threshold != DROP_ALL and cells & 31:
        words[-1] = (1 << (cells & 31)) - 1


def popcount(words: NDArray[np.uint32]) -> int:
    """The number of bits that are 1."""
    if hasattr(np, "bitwise_count"):
        return int(np.bitwise_count(words).sum(dtype=np.int64))
    step = 1 << 16  # NumPy 1 has no bitwise_count: unpack the bits, a piece at a time
    return sum(int(np.unpackbits(words[i : i + step].view(np.uint8)).sum()) for i in range(0, words.size, step))


def unpack_words(words: NDArray[np.uint32], cells: int) -> NDArray[np.bool_]:
    """The cells of a packed mask as booleans, True = keep."""
    little = words.astype("<u4", copy=False).view(np.uint8)
    return np.unpackbits(little, count=cells, bitorder="little").view(np.bool_)


def to_host(words: Any) -> NDArray[np.uint32]:
    """Words in the host's memory: those on a GPU, in an array of CuPy or Numba, are copied."""
    if isinstance(words, np.ndarray):
        return words
    copied: NDArray[np.uint32] = words.get() if hasattr(words, "get") else words.copy_to_host()
    return copied


def parts_of_noise(given: Any, shape: tuple[int, ...]) -> Parts:
    """`parts_of`, of a whole that noise has numbers for."""
    parts = parts_of(given, shape)
    if math.prod(parts[0].shape) > NOISE_END:
        raise ValueError(f"part must be of a whole of at most 2**61 elements for noise, but got {parts[0]}")
    return parts


class _Mask:
    """What all masks have."""

    __slots__ = ("_p", "_parts", "_shape")

    _shape: tuple[int, ...]
    _p: float
    _parts: Parts | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The mask's own shape: 1 on axes along which elements share a decision."""
        return self._shape

    @property
    def p(self) -> float:
        """Drop probability that the mask was drawn with."""
        return self._p

    @property
    def parts(self) -> Parts | None:
        """The parts of a whole that the mask is made of; None: it is a whole itself."""
        return self._parts

    def _described(self, **what: Any) -> str:
        """The representation, with parts if there are any."""
        shown = what if self._parts is None else {**what, "parts": self._parts}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"


class PackedMask(_Mask):
    """A dropout mask at one bit per cell.

    The mask of an array on a GPU keeps its words on that GPU, in an array of the same library. Counting, comparing,
    unpacking and pickling such a mask wait for the GPU and copy the words to the host.

    Parameters
    ----------
    words : ndarray of uint32, C-contiguous, ``ceil(cells / 32)`` of them
        Bit ``j`` of word ``w`` is cell ``32 w + j`` of ``shape`` in C order; 1 means keep. Bits past the last
        cell are 0.
    shape : tuple of int
        The mask's own shape: 1 on axes along which elements share a decision.
    p : float
        Drop probability that the mask was drawn with.
    scale : float, optional
        The multiplier of kept elements; by default that of inverted dropout, ``1 / (1 - p)``.
    part : Part or sequence of them, optional
        Of which whole mask this one is a part, as in `dropout`.

    Raises
    ------
    TypeError, ValueError
        Words of another dtype, size or layout, or with bits set past the last cell; p outside [0, 1].

    Examples
    --------
    >>> mask = PackedMask.from_bool([True, False, True, True], 0.25)
    >>> mask
    PackedMask(shape=(4,), p=0.25, kept=3, nbytes=4)
    >>> mask.words, mask.to_bool()
    (array([13], dtype=uint32), array([ True, False,  True,  True]))
    """

    __slots__ = ("_scale", "_words")

    _words: NDArray[np.uint32]
    _scale: float

    def __init__(
        self,
        words: NDArray[np.uint32],
        shape: tuple[int, ...],
        p: float,
        scale: float | None = None,
        part: Part | Sequence[Part] | None = None,
    ) -> None:
        self._p = checks.probability(p)
        self._shape = checks.shape("shape", shape)
        self._words = checks.words(words, math.prod(self._shape), word_count(math.prod(self._shape)))
        if scale is None:
            self._scale = keep_scale(threshold(self._p))
            checks.check_nothing_kept("words", self._words, self._scale)
        else:
            self._scale = checks.finite("scale", scale)
        self._parts = None if part is None else parts_of(part, self._shape)

    @classmethod
    def from_bool(cls, keep: ArrayLike, p: float) -> PackedMask:
        """Packs a boolean array.

        Parameters
        ----------
        keep : array_like of bool, any shape
            True keeps the element.
        p : float
            Drop probability, 0 to 1. Kept elements are multiplied by ``1 / (1 - p)``.

        Returns
        -------
        PackedMask

        Raises
        ------
        TypeError
            If ``keep`` is not boolean.
        ValueError
            If ``p`` is 1 and anything is kept.
        """
        flags, p = checks.keep_flags(keep), checks.probability(p)
        scale = keep_scale(threshold(p))
        checks.check_nothing_kept("keep", flags, scale)
        packed = np.zeros(4 * word_count(flags.size), np.uint8)
        bits = np.packbits(flags.reshape(-1), bitorder="little")
        packed[: bits.size] = bits
        words = packed.view("<u4").astype(np.uint32, copy=False)
        return packed_mask(words, flags.shape, p, scale)

    @property
    def words(self) -> NDArray[np.uint32]:
        """The bits, 32 cells in each uint32."""
        return self._words

    @property
    def scale(self) -> float:
        """Multiplier of kept elements: ``1 / (1 - T / 2**32)``, or 1 under standard scaling; 0 when all are dropped."""
        return self._scale

    @property
    def nbytes(self) -> int:
        """Bytes kept for backward: 1/8 per cell, rounded up to whole words."""
        return int(self._words.nbytes)

    @property
    def kept(self) -> int:
        """Number of cells kept."""
        return popcount(to_host(self._words))

    def to_bool(self) -> NDArray[np.bool_]:
        """Unpacks the mask, to 1 byte per cell.

        Returns
        -------
        ndarray of bool, of the mask's shape
            True where kept.
        """
        return unpack_words(to_host(self._words), math.prod(self._shape)).reshape(self._shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedMask):
            return NotImplemented
        own, its = ((mask._shape, mask._p, mask._scale, mask._parts) for mask in (self, other))
        return own == its and np.array_equal(to_host(self._words), to_host(other._words))

    def __reduce__(self) -> tuple[Any, ...]:
        words = np.ascontiguousarray(to_host(self._words))
        return PackedMask, (words, self._shape, self._p, self._scale, self._parts)

    def __repr__(self) -> str:
        return self._described(shape=self._shape, p=self._p, kept=self.kept, nbytes=self.nbytes)


class _Drawn(_Mask):
    """A mask or noise that is drawn again from its random state whenever it is needed: zero bytes per cell."""

    __slots__ = ("_offset", "_seed")

    _seed: int
    _offset: int

    @property
    def seed(self) -> int:
        """The seed of the random state."""
        return self._seed

    @property
    def offset(self) -> int:
        """The offset of the random state."""
        return self._offset

    @property
    def nbytes(self) -> int:
        """Bytes kept per cell: none."""
        return 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return bool(self.__reduce__() == other.__reduce__())

    def __repr__(self) -> str:
        return self._described(seed=self._seed, offset=self._offset, shape=self._shape, p=self._p)


class SeededMask(_Drawn):
    """A dropout mask stored as its random state: zero bytes per cell. The bits are drawn again when they are needed.

    Parameters
    ----------
    seed, offset : int
        Random state, from 0 to 2**64 - 1.
    shape : tuple of int
        The mask's own shape: 1 on axes along which elements share a decision.
    p : float
        Drop probability.
    scale : float, optional
        The multiplier of kept elements; by default that of inverted dropout, ``1 / (1 - p)``.
    part : Part or sequence of them, optional
        Of which whole mask this one is a part, as in `dropout`.

    Notes
    -----
    ``draw_mask(mask.shape, mask.p, rng=Stream(mask.seed, mask.offset), part=mask.parts)`` gives the same mask, packed.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> x = np.ones(1000, np.float32)
    >>> y, mask = fd.dropout(x, 0.1, store="seed", rng=3)
    >>> mask
    SeededMask(seed=3, offset=0, shape=(1000,), p=0.1)
    >>> mask.nbytes, bool((fd.dropout_backward(x, mask) == y).all())
    (0, True)
    """

    __slots__ = ("_scale", "_threshold")

    _scale: float
    _threshold: int

    def __init__(
        self,
        seed: int,
        offset: int,
        shape: tuple[int, ...],
        p: float,
        scale: float | None = None,
        part: Part | Sequence[Part] | None = None,
    ) -> None:
        self._seed = checks.uint64("seed", seed)
        self._offset = checks.uint64("offset", offset)
        self._shape = checks.shape("shape", shape)
        self._p = checks.probability(p)
        self._threshold = threshold(self._p)
        self._scale = keep_scale(self._threshold) if scale is None else checks.finite("scale", scale)
        self._parts = None if part is None else parts_of(part, self._shape)

    @property
    def threshold(self) -> int:
        """A cell is dropped if its 32-bit random number is below this: p, rounded to ``threshold / 2**32``."""
        return self._threshold

    @property
    def scale(self) -> float:
        """Multiplier of kept elements, as for `PackedMask`."""
        return self._scale

    def __reduce__(self) -> tuple[Any, ...]:
        return SeededMask, (self._seed, self._offset, self._shape, self._p, self._scale, self._parts)


class GaussianNoise(_Drawn):
    """Gaussian dropout's multipliers stored as their random state: zero bytes. The backward pass draws them again.

    Parameters
    ----------
    seed, offset : int
        Random state, from 0 to 2**64 - 1.
    shape : tuple of int
        The data's shape: each element has a multiplier of its own.
    p : float
        From 0 to below 1: the multipliers have mean 1 and variance ``p / (1 - p)``, as dropout's have at this p.
    part : Part or sequence of them, optional
        Of which whole this is the noise of a part, as in `dropout`. The whole has at most 2**61 elements.

    Raises
    ------
    TypeError, ValueError
        For anything else.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> y, noise = fd.gaussian_dropout(np.ones(4), 0.2, rng=3)
    >>> noise, noise.nbytes
    (GaussianNoise(seed=3, offset=0, shape=(4,), p=0.2), 0)
    >>> bool((fd.dropout_backward(np.ones(4), noise) == y).all())
    True
    """

    __slots__ = ()

    def __init__(
        self,
        seed: int,
        offset: int,
        shape: tuple[int, ...],
        p: float,
        part: Part | Sequence[Part] | None = None,
    ) -> None:
        self._seed = checks.uint64("seed", seed)
        self._offset = checks.uint64("offset", offset)
        self._shape = checks.shape("shape", shape)
        self._p = checks.gaussian_probability(p)
        self._parts = None if part is None else parts_of_noise(part, self._shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return GaussianNoise, (self._seed, self._offset, self._shape, self._p, self._parts)


# ---- masks made from checked parts: the ops use these, users the constructors ----


def packed_mask(
    words: NDArray[np.uint32], shape: tuple[int, ...], p: float, scale: float, parts: Parts | None = None
) -> PackedMask:
    """A `PackedMask` without the constructor's checks."""
    mask = object.__new__(PackedMask)
    mask._words = words
    mask._shape = shape
    mask._p = p
    mask._scale = scale
    mask._parts = parts
    return mask


def seeded_mask(
    state: State, shape: tuple[int, ...], p: float, scale: float, threshold: int, parts: Parts | None = None
) -> SeededMask:
    """A `SeededMask` without the constructor's checks."""
    mask = object.__new__(SeededMask)
    mask._seed, mask._offset = state
    mask._shape, mask._p, mask._scale, mask._threshold, mask._parts = shape, p, scale, threshold, parts
    return mask


def gaussian_noise(state: State, shape: tuple[int, ...], p: float, parts: Parts | None = None) -> GaussianNoise:
    """`GaussianNoise` without the constructor's checks."""
    noise = object.__new__(GaussianNoise)
    noise._seed, noise._offset = state
    noise._shape, noise._p, noise._parts = shape, p, parts
    return noise

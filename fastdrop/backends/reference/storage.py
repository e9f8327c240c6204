"""How the NumPy backend reads and writes packed bits, bfloat16 and the data of the fused primitives.

NumPy has no type for bfloat16, so it comes as its bits in uint16: `bfloat16_to_float32` and back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.checks import BFLOAT16, FLOAT16

Array = NDArray[Any]
Words = NDArray[np.uint32]
Doubles = NDArray[np.float64]
BITS = {4: np.uint32, 8: np.uint64}  # unsigned integers by their size


def bfloat16_to_float32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: Array) -> Array:
    """Rounds to nearest even; NaNs stay NaNs, quiet, with the top bits of their payload."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def as_computed(dtype: int, x: Array) -> Array:
    """Data of a dtype in the type that plain dropout computes in: float32 for 16-bit data."""
    if dtype == BFLOAT16:
        return bfloat16_to_float32(x)
    return x.astype(np.float32) if dtype == FLOAT16 else x


def store(dtype: int, to: Array, values: Array) -> None:
    """Rounds numbers of that type to the dtype."""
    to[...] = float32_to_bfloat16(values) if dtype == BFLOAT16 else values


def unpack_bits(words: Words, position: int, n: int) -> NDArray[np.bool_]:
    """Bits ``position .. position+n-1`` as booleans."""
    whole = words[position >> 5 : (position + n + 31) >> 5].astype("<u4", copy=False)
    lead = position & 31
    return np.unpackbits(whole.view(np.uint8), bitorder="little")[lead : lead + n].view(np.bool_)


def align_rows(words: Words, lead: Array) -> Words:
    """Rows of words, each moved down by its lead, which is below 32 bits; zeros come in."""
    pairs = words.astype(np.uint64)
    pairs[:, :-1] |= pairs[:, 1:] << np.uint64(32)
    pairs >>= lead.astype(np.uint64)[:, None]
    return pairs.astype(np.uint32)


def write_bits(words: Words, position: int, keep: NDArray[np.bool_]) -> None:
    lead = position & 31
    start, stop = position >> 5, (position + keep.size + 31) >> 5
    bits = np.zeros(32 * (stop - start), np.bool_)
    bits[:lead] = unpack_bits(words, position - lead, lead)
    bits[lead : lead + keep.size] = keep
    words[start:stop] = np.packbits(bits, bitorder="little").view("<u4")


def select(keep: NDArray[np.bool_], values: Array, dropped: float = 0.0) -> None:
    """Writes ``dropped`` to the values that are not kept. ``keep`` broadcasts to the float array ``values``.

    A number's bits times 1 or 0 are the number or +0. NumPy's `where` branches at each element, which takes ten times
    as long under a random mask.
    """
    unsigned = BITS[values.itemsize]
    bits = values.view(unsigned)
    if dropped == 0.0:
        bits *= keep
    else:
        instead = values.dtype.type(dropped).view(unsigned)
        bits ^= instead
        bits *= keep
        bits ^= instead


def copy_bits(words: Words, position: int, source: Words, lead: int, n: int) -> None:
    """Writes bits ``lead .. lead+n-1`` of source at ``position``, as `write_bits` does."""
    if lead or position & 31:
        write_bits(words, position, unpack_bits(source, lead, n))
        return
    start, stop = position >> 5, (position + n + 31) >> 5
    words[start:stop] = source[: stop - start]
    if n & 31:
        words[stop - 1] &= np.uint32((1 << (n & 31)) - 1)


def read_bits(words: Words | None, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Bits of rows and columns; all of them set where there are no words."""
    if words is None:
        return np.ones(shape, np.bool_)
    return unpack_bits(words, 0, shape[0] * shape[1]).reshape(shape)


def read_doubles(dtype: int, x: Array, shape: tuple[int, int]) -> Doubles:
    values = bfloat16_to_float32(x) if dtype == BFLOAT16 else x
    return values.reshape(shape).astype(np.float64)


def write_doubles(dtype: int, to: Array, values: Doubles) -> None:
    """Rounds to the dtype."""
    store(dtype, to.reshape(values.shape), values.astype(np.float32) if dtype == BFLOAT16 else values)

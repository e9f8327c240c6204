"""All kinds of dropout in the NumPy API: the call, the shape of its data, and its formula in plain NumPy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import fastdrop as fd
from fastdrop.core import variants
from fastdrop.core.random import DROP_ALL, threshold

STORES = ("bits", "seed")
SCALINGS = ("inverted", "standard")


@dataclass(frozen=True)
class Kind:
    """``keep`` gives the kept elements for p and a seed, as booleans that broadcast; None if the kind has no mask.

    ``scalings`` and ``stores`` are what the call takes.
    """

    call: Callable[..., tuple[np.ndarray, Any]]
    shape: tuple[int, ...]
    keep: Callable[[float, int], np.ndarray] | None
    scalings: tuple[str, ...] = SCALINGS
    stores: tuple[str, ...] = STORES

    def options(self) -> Iterator[dict[str, str]]:
        """Yields the options of each way to call it."""
        for scaling, store in itertools.product(self.scalings or (None,), self.stores or (None,)):
            both = {"scaling": scaling, "store": store}
            yield {name: value for name, value in both.items() if value is not None}

    def affine(self, p: float, keep: np.ndarray, scaling: str = "alpha") -> tuple[float, float, float]:
        """(a, b, c): a kept x becomes ``a x + b``, a dropped one becomes c."""
        if not self.stores:  # DropBlock counts
            return (keep.size / keep.sum() if keep.any() else 0.0), 0.0, 0.0
        return variants.affine(scaling, threshold(p))


def drawn(*cells: int) -> Callable[[float, int], np.ndarray]:
    return lambda p, rng: fd.draw_mask(cells, p, rng=rng).to_bool()


def in_blocks(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Callable[[float, int], np.ndarray]:
    """DropBlock as in Ghiasi et al. 2018: for each dropped seed a block is dropped, in a loop."""

    def keep(p: float, rng: int) -> np.ndarray:
        lead, extents = shape[:2], shape[2:]
        fitting = [min(size, extent) for size, extent in zip(sizes, extents, strict=True)]
        free = [extent - size + 1 for extent, size in zip(extents, fitting, strict=True)]
        gamma = p * math.prod(extents) / (math.prod(fitting) * math.prod(free)) if threshold(p) < DROP_ALL else 1.0
        seeds = fd.draw_mask((*lead, *free), gamma, rng=rng).to_bool()
        kept = np.ones(shape, np.bool_)
        for n, c, *at in np.argwhere(~seeds):
            kept[(n, c, *(slice(i, i + size) for i, size in zip(at, fitting, strict=True)))] = False
        return kept

    return keep


def _feature(shape: tuple[int, ...], axis: int, *cells: int, alpha: bool = False) -> Kind:
    if alpha:
        return Kind(partial(fd.feature_alpha_dropout, channel_axis=axis), shape, drawn(*cells), ())
    return Kind(partial(fd.feature_dropout, channel_axis=axis), shape, drawn(*cells))


def _blocks(shape: tuple[int, ...], size: Any) -> Kind:
    sizes = (size,) * (len(shape) - 2) if isinstance(size, int) else size
    return Kind(partial(fd.drop_block, block_size=size), shape, in_blocks(shape, sizes), (), ())


BLOCKS = {
    "drop_block, one axis": _blocks((5, 3, 37), 4),
    "drop_block, 5 x 1 of 8 x 11": _blocks((3, 4, 8, 11), (5, 1)),
    "drop_block, larger than the extents": _blocks((40, 3, 4, 6), 9),
}

# Shapes without an extent of 1, so that each layout is one; some with ragged words.
MASKED = {
    "dropout": Kind(fd.dropout, (37, 53), drawn(37, 53)),
    "dropout, shared along two axes": Kind(
        partial(fd.dropout, noise_shape=(1, None, 1, None)), (3, 4, 5, 6), drawn(1, 4, 1, 6)
    ),
    "feature_dropout, channels first": _feature((6, 7, 5, 9), 1, 6, 7, 1, 1),
    "feature_dropout, channels last": _feature((6, 5, 9, 7), -1, 6, 1, 1, 7),
    "feature_dropout, one sample": _feature((33, 5, 9), 0, 33, 1, 1),
    "alpha_dropout": Kind(fd.alpha_dropout, (6, 7, 41), drawn(6, 7, 41), ()),
    "feature_alpha_dropout": _feature((6, 5, 9, 7), 3, 6, 1, 1, 7, alpha=True),
    "variational_dropout, time first": Kind(partial(fd.variational_dropout, time_axis=0), (9, 4, 35), drawn(1, 4, 35)),
    "variational_dropout, time last": Kind(partial(fd.variational_dropout, time_axis=-1), (4, 35, 9), drawn(4, 35, 1)),
    "drop_connect": Kind(fd.drop_connect, (37, 53), drawn(37, 53)),
    "stochastic_depth, row": Kind(partial(fd.stochastic_depth, mode="row"), (45, 4, 5), drawn(45, 1, 1)),
    "stochastic_depth, batch": Kind(partial(fd.stochastic_depth, mode="batch"), (8, 4, 5), drawn(1, 1, 1)),
    **BLOCKS,
}
KINDS = {**MASKED, "gaussian_dropout": Kind(fd.gaussian_dropout, (6, 7, 41), None, (), ())}


def under(dtype: Any, x: np.ndarray, keep: np.ndarray | bool, a: float, b: float = 0.0, c: float = 0.0) -> np.ndarray:
    """``a x + b`` if kept, otherwise c, computed in float32 or wider and rounded once more at the end."""
    kind = dtype.computed
    with np.errstate(all="ignore"):
        kept = x.astype(kind) * kind(a)
        if b or c:
            kept = kept + kind(b)
        return np.where(keep, kept, kind(c)).astype(x.dtype)


def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    """The same array of at least two axes in other layouts. The first three have no gaps."""
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    backwards = (slice(None, None, -1), *(slice(None),) * (x.ndim - 2), slice(None, None, -1))
    shifted = np.zeros(x.nbytes + 1, np.uint8)
    shifted[1:] = np.frombuffer(x.tobytes(), np.uint8)
    return {
        "contiguous": x.copy("C"),
        "Fortran's": x.copy("F"),
        "axis 1 innermost": np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1),
        "sliced": wide[..., ::2],
        "reversed": x[backwards].copy()[backwards],
        "unaligned": shifted[1:].view(x.dtype).reshape(x.shape),
    }


LAYOUTS = tuple(layouts(np.zeros((2, 2))))
DENSE = LAYOUTS[:3]

"""Where a call's cells lie in a mask: an offset of the seed, and the cells that a part of a whole has.

Most calls draw cells 0, 1, 2, ... of an int. Others have a `Located` in the int's place. Ops have either as an int64
tensor ``seed`` of 1, 2 or ``2 + 6 k`` numbers: the seed, its offset, and for each of k runs of cells the fields of
`core.part.Run` but for the position. So a compiled graph is the same for all parts, and needs no other argument.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.part import Part, Parts, Run, check_uncut, parts_of, parts_of_mask
from ...core.part import runs as runs_of_parts
from . import layouts
from .dispatch import hide_from_dynamo
from .dispatch.tensors import jit_trace

LOW_64_BITS = (1 << 64) - 1
NUMBERS = 6  # of each run, as ops have it

Shape = tuple[int, ...]
Shared = tuple[Any, ...] | None  # 1 on axes along which elements share cells


class Weights(NamedTuple):
    """In place of a part, for data that has no samples on any axis."""

    part: Any = None


class Located(NamedTuple):
    """What a mask is drawn from. Without runs its cells are 0, 1, 2, ..."""

    seed: int | Tensor  # a tensor is on a GPU
    offset: int = 0
    runs: tuple[Run, ...] | None = None

    @property
    def first(self) -> int | None:
        """The first cell if the others follow it one by one, otherwise None."""
        if self.runs is None:
            return 0
        if len(self.runs) == 1 and self.runs[0].is_one_row:
            return self.runs[0].first
        return None

    def check(self, cells: int) -> None:
        """Raises unless it has as many cells as a mask: the ops may be called by hand."""
        if self.runs is not None and (own := sum(run.cells for run in self.runs)) != cells:
            raise ValueError(f"part must have a cell for each of the mask's {cells}, but has {own}")


class Drawn(NamedTuple):
    """In place of a caller's seed, the tensor that a function took for an op and hands on to another function."""

    seed: Tensor


def locate(seed: Any, runs: tuple[Run, ...]) -> Located:
    """A seed, as kernels take it, with the cells of a part."""
    return seed._replace(runs=runs) if isinstance(seed, Located) else Located(seed, 0, runs)


def runs_of(part: Any, shape: Shape, shared: Shared = None) -> tuple[Run, ...]:
    """The cells of a mask for data of a shape that is a `Part`, several, what tells them, or what `cells_of` gave."""
    if isinstance(part, Tensor):
        runs = _runs_in(_flat(part).tolist())
        Located(0, 0, runs).check(math.prod(shape if shared is None else _mask_shape(shape, shared)))
        return runs
    parts, shape = _resolved(part, shape)
    if torch.compiler.is_compiling():
        return _compute_runs(parts, shape, shared)
    try:
        return _runs_of(parts, shape, shared)
    except TypeError:  # what is no part can't be hashed, perhaps
        parts_of(part, shape)
        raise


def _resolved(part: Any, shape: Shape) -> tuple[Any, Shape]:
    """What a caller gave as ``part`` for data of a shape, a tuple of parts if it is good, and the shape."""
    if jit_trace() is not None:  # extents are tensors there
        shape = tuple(int(extent) for extent in shape)
    part = layouts.resolve(part, shape)
    return (part,) if isinstance(part, Part) else tuple(part) if isinstance(part, list) else part, shape


def check_uncut_part(part: Any, shape: Shape, first_axis: int, what: str) -> None:
    """Raises ValueError for a ``part`` that does not have the whole of the axes from ``first_axis`` on. A tensor of
    cells does not tell."""
    if isinstance(part, Weights):
        part = part.part
    if part is not None and not isinstance(part, Tensor):
        check_uncut(parts_of(*_resolved(part, shape)), first_axis, what)


def _compute_runs(parts: Parts, shape: Shape, shared: Shared) -> tuple[Run, ...]:
    parts = parts_of(parts, shape)
    if shared is None:
        return tuple(runs_of_parts(parts, shape))
    of_mask, cells = parts_of_mask(parts, shape, tuple(cells == 1 for cells in shared))
    return tuple(runs_of_parts(of_mask, cells))


def _mask_shape(shape: Shape, shared: tuple[Any, ...]) -> Shape:
    return tuple(extent if own is None else own for own, extent in zip(shared, shape, strict=True))


_runs_of = functools.lru_cache(maxsize=1024)(_compute_runs)


def numbers_of(runs: Iterable[Run]) -> list[int]:
    """Runs as ops have them."""
    return [as_int64(number) for run in runs for number in run[1:]]


def cells_of(part: Any, shape: Shape, shared: Shared = None) -> Tensor:
    """The runs of a mask as a tensor ``[6 k]``."""
    if isinstance(part, Tensor):
        return _flat(part)
    return torch.tensor(numbers_of(runs_of(part, shape, shared)), dtype=torch.int64, device="cpu")


def as_numbers(located: Located) -> list[int]:
    """The tensor ``seed`` of ops, as a list."""
    if isinstance(located.seed, Tensor):
        raise RuntimeError(
            'a CUDA graph can\'t draw the mask of a part again in backward: leave out store="seed", or give a seed'
        )
    return [as_int64(located.seed), as_int64(located.offset), *numbers_of(located.runs or ())]


def from_numbers(numbers: Sequence[int]) -> Located:
    """The opposite of `as_numbers`."""
    seed, offset, *rest = numbers
    return Located(seed & LOW_64_BITS, offset & LOW_64_BITS, _runs_in(rest) if rest else None)


def _flat(cells: Tensor) -> Tensor:
    if cells.dtype is not torch.int64:
        raise TypeError(f"part must be a fastdrop.Part or a tensor of int64, but got one of {cells.dtype}")
    if cells.numel() % NUMBERS:
        raise ValueError(f"part must have {NUMBERS} numbers for each run of cells, but got {cells.numel()}")
    return cells.reshape(-1)


def _runs_in(flat: Sequence[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    position = 0
    for at in range(0, len(flat), NUMBERS):
        first, outer, outer_pitch, rows, pitch, columns = flat[at : at + NUMBERS]
        if min(outer, rows, columns) < 0:
            raise ValueError(f"part must have runs of 0 cells or more, but got {flat[at : at + NUMBERS]}")
        pitches = outer_pitch & LOW_64_BITS, pitch & LOW_64_BITS
        run = Run(position, first & LOW_64_BITS, outer, pitches[0], rows, pitches[1], columns)
        if run.cells and run.end > checks.UINT64_END:
            raise ValueError(f"part must have cells below 2**64, but got {flat[at : at + NUMBERS]}")
        runs.append(run)
        position += run.cells
    return tuple(run for run in runs if run.cells) or tuple(runs[:1])  # compiled code has room for more


def as_int64(number: int) -> int:
    """64 bits as int64 has them: the highest comes out as the sign."""
    return number - (1 << 64) if number >> 63 else number


hide_from_dynamo(locate, runs_of, cells_of)

"""Parts of a whole array: where a process that holds one finds its cells in the mask of the whole.

A mask is a function of the cell's number in the whole. So each process draws the bits of its own part, and together
they have the mask that one process would have. `Part` is a box of the whole; a local array may be made of several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import checks
from .grid import cell_axes, collapse

__all__ = ["Part", "Parts", "Run", "check_uncut", "first_cell", "parts_of", "parts_of_mask", "runs", "runs_of_box"]


class Run(NamedTuple):
    """What one call of ``draw_rows`` draws: bit ``position + (o rows + r) columns + c`` is cell
    ``first + o outer_pitch + r pitch + c``."""

    position: int
    first: int
    outer: int
    outer_pitch: int
    rows: int
    pitch: int
    columns: int

    @property
    def cells(self) -> int:
        return self.outer * self.rows * self.columns

    @property
    def end(self) -> int:
        """One more than its last cell. The run has cells."""
        return self.first + (self.outer - 1) * self.outer_pitch + (self.rows - 1) * self.pitch + self.columns

    @property
    def is_one_row(self) -> bool:
        """Whether its cells follow one another in the whole."""
        return self.outer * self.rows == 1

    @property
    def draw(self) -> tuple[str, tuple[int, ...]]:
        """The primitive that draws it, and its arguments from the position on."""
        return ("draw_bits", (self.position, self.first, self.columns)) if self.is_one_row else ("draw_rows", self)

    def each_row(self) -> Iterator[tuple[int, int, int]]:
        """(position, first cell, number of cells) of each row. Rows without cells are left out."""
        if not self.columns:
            return
        for o, r in itertools.product(range(self.outer), range(self.rows)):
            position = self.position + (o * self.rows + r) * self.columns
            yield position, self.first + o * self.outer_pitch + r * self.pitch, self.columns

    def distance(self, steps: int) -> int:
        """How many cells the first is from the one ``steps`` bits on."""
        rows, column = divmod(steps, self.columns or 1)
        outer, row = divmod(rows, self.rows or 1)
        return outer * self.outer_pitch + row * self.pitch + column


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a larger array: what one of several processes holds of it.

    Parameters
    ----------
    shape : tuple of int
        The whole's. It has at most 2**64 elements.
    start : tuple of int
        Where the part begins on each axis.
    local : tuple of int
        The part's own shape.

    Raises
    ------
    TypeError
        For what is no tuple of ints.
    ValueError
        For tuples of several lengths and for a part that reaches out of the whole.

    Examples
    --------
    >>> import fastdrop as fd
    >>> whole = fd.draw_mask((4, 6), 0.5, rng=1).to_bool()
    >>> part = fd.Part((4, 6), start=(1, 2), local=(2, 3))
    >>> bool((fd.draw_mask((2, 3), 0.5, rng=1, part=part).to_bool() == whole[1:3, 2:5]).all())
    True
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    local: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("shape", "start", "local"):
            object.__setattr__(self, name, checks.shape(f"part's {name}", getattr(self, name)))
        if not len(self.shape) == len(self.start) == len(self.local):
            raise ValueError(
                "a part's shape, start and local must have an entry for each axis, but got "
                f"{self.shape}, {self.start} and {self.local}"
            )
        checks.first_cell(0, math.prod(self.shape))
        for axis, (whole, start, local) in enumerate(zip(self.shape, self.start, self.local, strict=True)):
            if start + local > whole:
                end = start + local
                raise ValueError(
                    f"a part must lie in its whole, but goes from {start} to {end} of {whole} on axis {axis}"
                )

    def sharing(self, shared: Sequence[bool]) -> Part:
        """The part of a mask whose cells are shared along some axes.

        Parameters
        ----------
        shared : sequence of bool
            For each axis, whether all elements along it share one decision.

        Returns
        -------
        Part
        """
        own = zip(self.shape, self.start, self.local, shared, strict=True)
        axes = [(1, 0, 1) if one else (whole, start, local) for whole, start, local, one in own]
        return Part(*(tuple(entries) for entries in zip(*axes, strict=True)))

    def runs(self, position: int = 0) -> Iterator[Run]:
        """The part's cells in its own C order, as runs of cells with regular distances.

        Parameters
        ----------
        position : int
            The bit of the mask at which the first cell lies.

        Yields
        ------
        Run
        """
        if 0 in self.local:
            return
        strides = [stride for _, stride in cell_axes(self.shape, self.shape)]
        first = sum(start * stride for start, stride in zip(self.start, strides, strict=True))
        yield from runs_of_box(zip(self.local, strides, strict=True), first, position)


def runs_of_box(axes: Iterable[tuple[int, int]], first: int, position: int) -> Iterator[Run]:
    """The cells of a box in its C order. ``axes`` are (extent, distance of neighbours in cells), no extent 0."""
    own = collapse(axes)
    columns = own.pop()[0] if own and own[-1][1] == 1 else 1
    rows, pitch = own.pop() if own else (1, 0)
    outer, outer_pitch = own.pop() if own else (1, 0)
    size = outer * rows * columns
    for i, index in enumerate(itertools.product(*(range(extent) for extent, _ in own))):
        cell = first + sum(at * step for at, (_, step) in zip(index, own, strict=True))
        yield Run(position + i * size, cell, outer, outer_pitch, rows, pitch, columns)


Parts = tuple[Part, ...]


def parts_of(given: Any, shape: tuple[int, ...]) -> Parts:
    """The parts that an array of this shape is made of, one after the other along one axis."""
    parts = (given,) if isinstance(given, Part) else given
    if isinstance(parts, str) or not isinstance(parts, Sequence) or not all(isinstance(one, Part) for one in parts):
        raise TypeError(f"part must be a fastdrop.Part or a sequence of them, but got {given!r}")
    if not parts or any(one.shape != parts[0].shape for one in parts):
        raise ValueError(f"part must be parts of one whole, but got {given!r}")
    if parts[0].local == shape and len(parts) == 1:
        return tuple(parts)
    if len(parts[0].shape) == len(shape) > 0:
        axis = _joined_axis(parts, shape)
        others = {one.local[:axis] + one.local[axis + 1 :] for one in parts}
        if others == {shape[:axis] + shape[axis + 1 :]} and sum(one.local[axis] for one in parts) == shape[axis]:
            return tuple(parts)
    raise ValueError(f"part must have x's shape, {shape}, or its parts must along one axis, but got {given!r}")


def parts_of_mask(parts: Parts, shape: tuple[int, ...], shared: Sequence[bool]) -> tuple[Parts, tuple[int, ...]]:
    """The parts of a mask whose cells are shared along some axes, and its shape. ``parts`` make up an array of a shape.

    Whether an axis is shared can't be read from extents: the part of one process may have an extent of 1. Raises
    ValueError for parts along a shared axis that do not have the same cells.
    """
    cells = tuple(1 if one else extent for one, extent in zip(shared, shape, strict=True))
    axis = _joined_axis(parts, shape)
    own = tuple(part.sharing(shared) for part in parts)
    if len(own) > 1 and shared[axis]:
        if any(part != own[0] for part in own):
            raise ValueError(
                f"part must be parts that start alike on all other axes, because elements share decisions along axis "
                f"{axis}, but got {parts}"
            )
        own = own[:1]
    return own, cells


def check_uncut(parts: Parts | None, first_axis: int, what: str) -> None:
    """Raises ValueError for parts that do not have the whole of the axes from ``first_axis`` on."""
    for part in parts or ():
        if part.local[first_axis:] != part.shape[first_axis:]:
            raise ValueError(f"part must not cut {what}, but got {part}")


def _joined_axis(parts: Sequence[Part], shape: tuple[int, ...]) -> int:
    """The axis along which parts lie one after the other in an array of this shape."""
    differing = (i for i in range(len(shape)) if any(one.local[i] != shape[i] for one in parts))
    return next(differing, shape.index(0) if 0 in shape else 0)  # all may have 0 there


def runs(parts: Parts, shape: tuple[int, ...]) -> Iterator[Run]:
    """The cells of an array that is made of parts, in the array's C order."""
    axis = _joined_axis(parts, shape) if shape else 0
    outer = shape[:axis]
    size = math.prod(shape[axis:])
    for i, index in enumerate(itertools.product(*map(range, outer))):
        position = i * size
        for part in parts:
            if len(parts) > 1:
                at = tuple(start + offset for start, offset in zip(part.start, index, strict=False))
                part = Part(part.shape, at + part.start[axis:], (1,) * axis + part.local[axis:])
            yield from part.runs(position)
            position += math.prod(part.local)
        if len(parts) == 1:
            return


def first_cell(parts: Parts, shape: tuple[int, ...]) -> int | None:
    """The first of an array's cells if they follow one another in the whole, otherwise None."""
    found = list(itertools.islice(runs(parts, shape), 2))
    return found[0].first if len(found) == 1 and found[0].is_one_row else None

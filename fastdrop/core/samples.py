"""Cells of a batch by its samples' numbers: which cells of the mask of all samples those of some samples are.

The cells of sample i of all are ``i * size`` to ``(i + 1) * size - 1``, where ``size`` is the number of cells of one
sample. So they depend neither on the batch that holds the sample nor on how many samples there are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import checks
from .part import Part, Run, runs_of_box

__all__ = ["sample_runs"]


class _Piece(NamedTuple):
    """Evenly spaced cells along an axis."""

    extent: int
    first: int
    step: int


def sample_runs(
    samples: Sequence[int],
    shape: tuple[int, ...],
    axis: int,
    shared: Sequence[bool],
    parts: Sequence[Part] = (),
) -> Iterator[Run]:
    """The cells of data of a shape whose ``axis`` has the samples of these numbers, in the data's C order.

    The axis has a multiple of as many entries as samples; those of a sample are neighbours. A sample's cells are
    numbered in C order of these and the other axes. ``shared`` says along which axes elements share cells, and
    ``parts`` which part of the whole the data is along the axes other than ``axis``: one, or several that lie one
    after the other along an axis.

    >>> [run[1:] for run in sample_runs([4, 6, 8], (3, 5), 0, (False, False))]
    [(20, 1, 0, 3, 10, 5)]
    """
    whole = parts[0].shape if parts else shape
    several = shape[axis] // len(samples) if len(samples) else 1
    steps, size = [0] * len(shape), 1
    for i in reversed(range(len(shape))):
        if i != axis and not shared[i]:
            steps[i] = size
            size *= whole[i]
    axes: list[list[_Piece]] = []
    for i, step in enumerate(steps):
        if shared[i]:
            axes.append([_Piece(1, 0, 0)])
        elif i == axis:
            of_sample = several * size
            axes.append([_Piece(n, first * of_sample, apart * of_sample) for n, first, apart in _even(samples)])
            axes.append([_Piece(several, 0, size)])
        else:
            starts = dict.fromkeys((part.local[i], part.start[i]) for part in parts) or {(shape[i], 0): None}
            axes.append([_Piece(extent, start * step, step) for extent, start in starts])
    if samples and (max(samples) + 1) * several * size > checks.UINT64_END:
        raise ValueError(f"samples must have cells below 2**64, but got {max(samples)}, with {several * size} each")
    if all(axes):
        yield from _runs(axes, 0, 0)


def _even(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(count, first, distance) of each run of evenly ascending numbers."""
    at = 0
    while at < len(numbers):
        end = at + 1
        apart = numbers[end] - numbers[at] if end < len(numbers) else 1
        while apart > 0 and end < len(numbers) and numbers[end] - numbers[end - 1] == apart:
            end += 1
        yield end - at, numbers[at], apart if end - at > 1 else 1
        at = end


def _runs(axes: list[list[_Piece]], position: int, first: int) -> Iterator[Run]:
    """The runs of cells from bit ``position`` on. Axes before one of several pieces are gone over one by one."""
    cut = next((i for i, pieces in enumerate(axes) if len(pieces) > 1), None)
    if cut is None:
        yield from _box([piece for (piece,) in axes], position, first)
        return
    before, after = [piece for (piece,) in axes[:cut]], axes[cut + 1 :]
    size = math.prod(sum(piece.extent for piece in pieces) for pieces in after)
    for index in itertools.product(*(range(piece.extent) for piece in before)):
        at = first + sum(piece.first + i * piece.step for i, piece in zip(index, before, strict=True))
        for piece in axes[cut]:
            yield from _runs([[piece], *after], position, at)
            position += piece.extent * size


def _box(pieces: list[_Piece], position: int, first: int) -> Iterator[Run]:
    if not all(piece.extent for piece in pieces):
        return
    first += sum(piece.first for piece in pieces)
    yield from runs_of_box(((piece.extent, piece.step) for piece in pieces), first, position)

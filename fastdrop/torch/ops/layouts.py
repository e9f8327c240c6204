"""The op ``torch.ops.fastdrop.layout_cells``: the cells of this process's part, for compiled code.

The process finds its place in the mesh when the op runs. So the processes of a mesh run one graph.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..runtime import layouts, located
from ..runtime.dispatch.compilers import constant_in_graphs
from ..runtime.dispatch.dtensors import ranks_of
from ..runtime.layouts import Layout, Step
from .record import called_by_inductor, library

__all__ = ["cells_in_graph"]

Shape = tuple[int, ...]


def cells_in_graph(x: Tensor, layout: Layout, local: Shape, shared: Any) -> Tensor:
    """What `located.cells_of` gives for a layout, in code that is being compiled. x is any tensor of the process."""
    mesh = tuple(layout.mesh.shape)
    ranks = ranks_of(layout.mesh)
    steps = layouts.steps_of(layout.placements, layout.order, len(local))
    shape = layouts.whole_shape(mesh, steps, local) if layout.shape is None else layout.shape
    flags = [] if shared is None else [int(own == 1) for own in shared]
    count = _runs_of_any_shape(steps, len(shape), tuple(flags))
    if not count:
        count = _most_runs(mesh, steps, tuple(int(extent) for extent in shape), tuple(flags))
    flat = [number for step in steps for number in step]
    cells: Tensor = torch.ops.fastdrop.layout_cells(x, shape, mesh, ranks, flat, flags, count)
    return cells


@constant_in_graphs
def _runs_of_any_shape(steps: tuple[Step, ...], rank: int, flags: Shape) -> int:
    """How many runs of cells a process has at most, whatever the extents are. 0 if they decide: a run has two pitches,
    and an axis that is sharded needs one unless it is the first. Shards in several pieces need the first axis."""
    axes = [axis for axis in range(rank) if not flags or not flags[axis]]
    own = [step for step in steps if step[1] in axes]
    pitches = {axis for _, axis, _ in own if axis != axes[0]}
    if len(pitches) > 2 or any(before > 1 and axis in pitches for _, axis, before in own):
        return 0
    return math.prod(before for _, _, before in own)


@constant_in_graphs
def _most_runs(mesh: Shape, steps: tuple[Step, ...], shape: Shape, flags: Shape) -> int:
    """How many runs of cells a process has at most. The others have empty ones too, so that all have one graph."""
    coordinates = itertools.product(*map(range, mesh))
    return max(len(_runs_at(coordinate, mesh, steps, shape, flags)) for coordinate in coordinates)


def _runs_at(coordinate: Shape, mesh: Shape, steps: tuple[Step, ...], shape: Shape, flags: Shape) -> Any:
    parts = layouts.parts_at(coordinate, mesh, steps, shape)
    local = list(parts[0].local)
    for axis in range(len(local)):
        if any(part.start[axis] != parts[0].start[axis] for part in parts):
            local[axis] = sum(part.local[axis] for part in parts)
    shared = tuple(1 if flag else None for flag in flags) if flags else None
    return located.runs_of(parts, tuple(local), shared)


def _layout_cells(
    like: Tensor, shape: list[int], mesh: list[int], ranks: list[int], steps: list[int], shared: list[int], runs: int
) -> Tensor:
    index = ranks.index(torch.distributed.get_rank())
    coordinate = []
    for extent in reversed(mesh):
        index, own = divmod(index, extent)
        coordinate.append(own)
    triples = tuple(zip(steps[::3], steps[1::3], steps[2::3], strict=True))
    found = _runs_at(tuple(reversed(coordinate)), tuple(mesh), triples, tuple(shape), tuple(shared))
    if len(found) > runs:
        raise ValueError(f"layout_cells must have room for {len(found)} runs of cells, but got runs={runs}")
    numbers = located.numbers_of(found)
    numbers += [0] * (located.NUMBERS * runs - len(numbers))
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _layout_cells_outputs(
    like: Tensor, shape: Any, mesh: Any, ranks: Any, steps: Any, shared: Any, runs: int
) -> Tensor:
    return torch.empty(located.NUMBERS * runs, dtype=torch.int64, device="cpu")


library.define(
    "layout_cells(Tensor like, SymInt[] shape, int[] mesh, int[] ranks, int[] steps, int[] shared, int runs) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("layout_cells", _layout_cells, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastdrop::layout_cells", called_by_inductor("layout_cells", _layout_cells_outputs), lib=library
)

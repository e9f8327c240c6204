"""Layouts: which part of a whole each process of a device mesh has, by torch's placements.

A `Layout` says it for DTensors, and for plain local tensors inside of tensor-parallel plans. `located` asks it for the
cells of this process's part.

This module also compares the generators of a mesh's processes, because they have one mask only if their seeds are
equal.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...core.part import Part, Parts
from .dispatch.compilers import constant_in_graphs
from .dispatch.tensors import is_in_dispatch_mode

Shape = tuple[int, ...]
Range = tuple[int, int]  # where it begins, and its length
Step = tuple[int, int, int]  # which axis of a mesh splits which of a tensor, and into how many that was split before

__all__ = ["Layout", "as_layout", "compare_generators", "describe", "resolve"]


class Layout(NamedTuple):
    """A device mesh, and a placement for each of its axes.

    ``shape`` is the whole's. None: each process has as much on a sharded axis as the others. ``order`` is the order in
    which mesh axes shard, as DTensors have it.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: Shape | None = None
    order: Any = None

    def parts(self, local: Shape) -> Parts:
        """The parts that this process's array of a shape is made of."""
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise ValueError("layout's mesh must have this process, but does not")
        return _parts(tuple(self.mesh.shape), tuple(coordinate), self.placements, self.order, self.shape, local)

    def __deepcopy__(self, memo: Any) -> Layout:
        return self  # groups of processes can't be copied


def as_layout(given: Any) -> Layout | None:
    """What a caller gave as ``(mesh, placements)``, or None if that is something else."""
    if type(given) is Layout:
        return given
    if not isinstance(given, tuple) or len(given) != 2 or not hasattr(given[0], "get_coordinate"):
        return None
    mesh, placements = given
    placements = tuple(placements) if isinstance(placements, Sequence) else (placements,)
    if len(placements) != mesh.ndim or not all(hasattr(placement, "is_partial") for placement in placements):
        raise ValueError(f"layout must have a placement for each of the mesh's {mesh.ndim} axes, but got {placements}")
    for placement in placements:
        if placement.is_partial():
            raise ValueError(f"layout must have placements Shard or Replicate, but got {placement}")
    return Layout(mesh, placements)


def describe(given: Any) -> str:
    """``layout`` in the text of a module."""
    if not isinstance(given, Layout):
        return repr(given)
    names = given.mesh.mesh_dim_names or range(given.mesh.ndim)
    placed = (f"{name}: {placement}" for name, placement in zip(names, given.placements, strict=True))
    return f"({', '.join(placed)})"


def resolve(given: Any, shape: Shape) -> Any:
    """``part`` as a caller may give it: a layout becomes parts, and a function is called with the local shape."""
    if type(given) is Layout:
        return given.parts(shape)
    if callable(given) and not isinstance(given, Part):
        given = given(shape)
    layout = as_layout(given)
    return given if layout is None else layout.parts(shape)


@functools.lru_cache(maxsize=1024)
def _parts(
    mesh: Shape, coordinate: Shape, placements: tuple[Any, ...], order: Any, shape: Shape | None, local: Shape
) -> Parts:
    steps = steps_of(placements, order, len(local))
    return parts_at(coordinate, mesh, steps, whole_shape(mesh, steps, local) if shape is None else shape)


@constant_in_graphs
def steps_of(placements: tuple[Any, ...], order: Any, rank: int) -> tuple[Step, ...]:
    """How a tensor is split, one step after the other."""
    steps = []
    ordered = [] if order is None else [mesh_axis for _, mesh_axes in order for mesh_axis in mesh_axes]
    for mesh_axis in ordered or range(len(placements)):
        placement = placements[mesh_axis]
        if placement.is_replicate() or placement.is_partial():
            continue
        axis = placement.dim
        if not -rank <= axis < rank:
            raise ValueError(f"layout must have placements of {rank} axes, but got {placement}")
        steps.append((mesh_axis, axis % rank, getattr(placement, "split_factor", 1)))
    return tuple(steps)


def whole_shape(mesh: Shape, steps: tuple[Step, ...], local: Shape) -> Shape:
    """The shape of a whole that is split into equal shards."""
    shape = list(local)
    for mesh_axis, axis, _ in steps:
        shape[axis] *= mesh[mesh_axis]
    return tuple(shape)


def parts_at(coordinate: Shape, mesh: Shape, steps: tuple[Step, ...], shape: Shape) -> Parts:
    """The parts of a whole that the process at a coordinate of a mesh has."""
    ranges: list[list[Range]] = [[(0, extent)] for extent in shape]
    for mesh_axis, axis, before in steps:
        ranges[axis] = _split(ranges[axis], coordinate[mesh_axis], mesh[mesh_axis], before)
    several = [axis for axis, own in enumerate(ranges) if len(own) > 1]
    if len(several) > 1:
        raise ValueError(f"a shard must be in one piece on all axes but one, but is in several on axes {several}")
    boxes = zip(*(own if len(own) > 1 else itertools.repeat(own[0]) for own in ranges), strict=False)
    parts = itertools.islice(boxes, len(ranges[several[0]]) if several else 1) if ranges else [()]
    return tuple(Part(shape, tuple(start for start, _ in box), tuple(length for _, length in box)) for box in parts)


def _split(own: list[Range], index: int, count: int, before: int) -> list[Range]:
    """One of the pieces of what is left of an axis, as torch.chunk splits: they are of one size, as long as they last.

    An axis may have been split before by mesh axes that come later (FSDP2's shards of tensor-parallel weights). This is
    then a split of each of these ``before`` pieces.
    """
    earlier = [_chunk(own, i, before) for i in range(before)] if before > 1 else [own]
    joined: list[Range] = []
    for start, length in (piece for chunk in earlier for piece in _chunk(chunk, index, count)):
        if joined and sum(joined[-1]) == start:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        elif length:
            joined.append((start, length))
    return joined or [(0, 0)]


def _chunk(own: list[Range], index: int, count: int) -> list[Range]:
    total = sum(length for _, length in own)
    size = -(-total // count)
    begin, end = min(index * size, total), min((index + 1) * size, total)
    found, at = [], 0
    for start, length in own:
        first, last = max(begin, at), min(end, at + length)
        if first < last:
            found.append((start + first - at, last - first))
        at += length
    return found


def add_up(layout: Layout, count: torch.Tensor, axes: tuple[int, ...], rank: int) -> torch.Tensor:
    """The sum of a number over the processes that have different shards along some axes of a tensor."""
    for mesh_axis, placement in enumerate(layout.placements):
        if not placement.is_replicate() and placement.dim % rank in axes:
            torch.distributed.all_reduce(count, group=layout.mesh.get_group(mesh_axis))
    return count


# ---- generators ----

_compared: set[Any] = set()


def compare_generators(mesh: Any, device: torch.device, generator: torch.Generator | None) -> None:
    """Raises if the processes of a mesh would not draw the same number next. It is asked before each draw, and compares
    once for each mesh: the first time."""
    key = mesh, generator is not None
    if key in _compared or is_in_dispatch_mode():
        return
    if mesh.get_coordinate() is None:
        return
    if mesh.size() > 1 and not _is_equal_over(mesh, _state(device, generator)):
        raise RuntimeError(
            "the processes of a mesh must draw the same seeds, but their generators differ: call torch.manual_seed "
            "with one number on all ranks of the mesh, give the dropout a seed, or use name_masks"
        )
    _compared.add(key)


def _state(device: torch.device, generator: torch.Generator | None) -> int:
    """A hash of a generator's state, 63 bits."""
    if generator is None:
        generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    if generator.device.type == "cuda":
        state = f"{generator.initial_seed()} {generator.get_offset()}".encode()
    else:
        state = generator.get_state().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little") >> 1


def _is_equal_over(mesh: Any, number: int) -> bool:
    """Whether all processes of a mesh have one number. All of them get the same answer."""
    bounds = torch.tensor([number, ~number], device=mesh.device_type)
    for axis in range(mesh.ndim):
        torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX, mesh.get_group(axis))
    most, least = bounds.tolist()
    return bool(most == ~least)

"""`cells_of`: a part of a whole as a tensor, for compiled code."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...core import checks
from ...core.part import Part
from ..runtime import located

__all__ = ["cells_of"]


def cells_of(
    part: Part | Sequence[Part], shape: tuple[int, ...] | None = None, noise_shape: Sequence[int | None] | None = None
) -> Tensor:
    """Returns the cells of a part as a tensor, which functions take as ``part`` too.

    Compiled code with a `fastdrop.Part` in it is compiled for this part. With a tensor the code is the same for all
    parts that have as many runs of cells, so all processes run one graph.

    Parameters
    ----------
    part : fastdrop.Part or sequence of them
    shape : tuple of int, optional
        Of the data that is made of several parts. That of a single one is known.
    noise_shape : sequence of (int or None), optional
        As in `dropout`: 1 on axes that share one decision. A function such as `dropout2d`, which shares decisions
        without it, takes the cells of its own mask: here of ``(None, None, 1, 1)``.

    Returns
    -------
    Tensor of int64, ``(k, 6)``
        A row for each of k runs of cells: ``first, outer, outer_pitch, rows, pitch, columns`` stand for the cells
        ``first + o outer_pitch + r pitch + c``. A part that is cut along three axes or fewer has one run.

    Raises
    ------
    TypeError
        For what is no part.
    ValueError
        For a shape or a noise_shape that does not fit.

    Examples
    --------
    >>> import torch, fastdrop as fd, fastdrop.torch as fdt
    >>> fdt.cells_of(fd.Part((4, 6), start=(1, 2), local=(2, 3)))
    tensor([[8, 1, 0, 2, 6, 3]])
    """
    if shape is None:
        if not isinstance(part, Part):
            raise ValueError(f"shape must be given for several parts, but got none for {part!r}")
        shape = part.local
    shape = checks.shape("shape", shape)
    shared = None
    if noise_shape is not None:
        checks.noise_shape(noise_shape, shape)
        shared = tuple(noise_shape)
    return located.cells_of(part, shape, shared).reshape(-1, located.NUMBERS)

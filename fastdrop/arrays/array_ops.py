"""The interface between the ops of the NumPy API and the memory in which their arrays lie.

`dropout.py`, `structured.py` and `fused.py` say once what an op does. They reach arrays and kernels through an
`ArrayOps`: `HostOps` for arrays in memory (`host.py`), `DeviceOps` for arrays on a GPU (`device.py`). For example,
``as_array`` of the host accepts any array_like, and that of the device refuses arrays that are not C-contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from ..core import checks
from ..core.part import Run
from ..core.random import State

Shape = tuple[int, ...]
DeferredDraw = tuple[Any, State, int]  # the backend's function that draws and runs a primitive; state, threshold
BlockPasses = tuple[tuple[int, int, int, int], ...]
Scaling = tuple[float, float, float]  # scale, shift, dropped: a `core.variants.Coefficients`, or as much as one

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


class ArrayOps(Protocol):
    """What an op asks of the memory that its arrays lie in.

    ``tag`` is the number by which kernels know a dtype. ``words`` are the words of a mask, and ``mask_shape`` is its
    shape: 1 on axes along which elements share a decision.
    """

    on_device: bool

    # ---- arguments and results ----

    def as_array(self, name: str, value: Any) -> tuple[Any, int]:
        """An argument as an array that kernels accept, and its dtype's tag."""
        ...

    def as_attention_mask(self, name: str, value: Any) -> Any:
        """An attention mask, of booleans or floats, as an array."""
        ...

    def output_array(self, out: Any, x: Any, name: str) -> Any:
        """``out`` if it can hold the result for x; a new array like x if ``out`` is None."""
        ...

    def check_no_overlap(self, out: Any, x: Any, name: str) -> None:
        """Raises if the arrays share memory, unless they are the same elements."""
        ...

    def check_mask_memory(self, name: str, words: Any) -> None:
        """Raises unless a mask's words lie where the array of this name lies."""
        ...

    def copy_into(self, y: Any, x: Any) -> None:
        """Copies x to y."""
        ...

    # ---- masks ----

    def empty_words(self, like: Any, cells: int) -> Any:
        """Uninitialised words for so many cells, on the device of ``like``."""
        ...

    def draw_words(
        self, words: Any, like: Any, cells: int, state: State, threshold: int, runs: Iterable[Run] | None = None
    ) -> None:
        """Draws a mask of any threshold into ``words``, on the stream of ``like``. ``runs`` are its cells, in order;
        None: those from 0 on."""
        ...

    def draw_or_defer(
        self, words: Any, like: Any, cells: int, state: State, threshold: int, runs: Iterable[Run] | None = None
    ) -> DeferredDraw | None:
        """Draws a mask into ``words`` as `draw_words` does, or returns what `run_primitive` needs to draw it itself."""
        ...

    def widen_blocks(self, words: Any, buffers: list[Any], passes: BlockPasses) -> Any:
        """The words after DropBlock's passes, each of which writes to a buffer of its own."""
        ...

    def kept_count(self, words: Any) -> int:
        """The number of cells that are kept."""
        ...

    # ---- the primitives of plain dropout ----

    def kernel_arrays(self, x: Any, y: Any, mask_shape: Shape) -> tuple[Any, Any]:
        """x and y if the primitives below accept them as they lie in memory, otherwise C-contiguous stand-ins.

        The caller copies y's stand-in to y afterwards.
        """
        ...

    def dropout_forward(
        self, tag: int, x: Any, y: Any, words: Any, state: State, threshold: int, coefficients: Scaling, first: int = 0
    ) -> None:
        """Draws a mask of x's shape and applies it; ``words`` receives it unless None. Its cells are those from
        ``first`` on."""
        ...

    def gaussian_multiply(
        self, tag: int, x: Any, y: Any, state: State, sigma: float, runs: Iterable[Run] | None = None
    ) -> None:
        """y = x times Gaussian noise of mean 1. ``runs`` are its cells, as in `draw_words`."""
        ...

    def apply_mask(self, tag: int, x: Any, y: Any, words: Any, mask_shape: Shape, coefficients: Scaling) -> None:
        """y = x under a stored mask."""
        ...

    # ---- the fused primitives; None stands for an array that an op does not have ----

    def empty(self, like: Any, shape: Shape, dtype: Any) -> Any: ...

    def zeros(self, like: Any, shape: Shape, dtype: Any) -> Any: ...

    def as_contiguous(self, x: Any) -> Any:
        """x in C order: a copy if x is not. None stays None."""
        ...

    def output_buffer(self, y: Any) -> Any:
        """y if it is in C order, otherwise a new array whose contents the caller copies to y."""
        ...

    def copy_if_overlapping(self, x: Any, y: Any) -> Any:
        """x, or a copy of it if a write to y could change it. None stays None."""
        ...

    def cast(self, name: str, x: Any, dtype: Any) -> Any:
        """x converted to a dtype, in C order."""
        ...

    def as_additive_mask(self, name: str, mask: Any, shape: Shape, dtype: Any) -> Any:
        """An attention mask as numbers that are added to scores: 0 and -inf if it is boolean."""
        ...

    def run_primitive(
        self,
        primitive: str,
        dtypes: tuple[int, ...],
        arrays: tuple[Any, ...],
        numbers: tuple[float, ...],
        draw: DeferredDraw | None = None,
    ) -> None:
        """Runs a fused primitive on contiguous arrays; ``draw`` is the result of `draw_or_defer`."""
        ...


def rows_and_columns(shape: Shape) -> tuple[int, int]:
    """The shape as rows of the last axis; an array without axes is one row of one column."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that fused kernels compute in, and that vectors, statistics and sums are stored in."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def dtype_tags(*dtypes: np.dtype[Any]) -> tuple[int, ...]:
    return tuple([checks.dtype_tag("x", dtype) for dtype in dtypes])

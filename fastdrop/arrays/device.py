"""Arrays on a GPU: how those of CuPy and Numba, which must be C-contiguous, reach the CUDA backend.

The ops call `DEVICE` for arrays that have the CUDA array interface. Results and masks are arrays of the same library as
the argument. Work is submitted to the stream that the array names (CuPy: the current one). Nothing waits and nothing is
copied to the host, except that DropBlock reads the number of kept cells.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..backends import cuda_backend
from ..core import checks
from ..core.grid import cell_axes
from ..core.mask import to_host, word_count
from ..core.part import Run
from ..core.random import DROP_ALL, State
from .array_ops import BlockPasses, DeferredDraw, Scaling, Shape

DLPACK_CUDA = 2


class DeviceOps:
    """`ArrayOps` for arrays of CuPy and Numba, which must be C-contiguous."""

    __slots__ = ()

    on_device = True

    # ---- arguments and results ----

    def as_array(self, name: str, value: Any) -> tuple[Any, int]:
        _library(name, value)
        tag = checks.dtype_tag(name, value.dtype)
        _check_order(name, value)
        return value, tag

    def as_attention_mask(self, name: str, value: Any) -> Any:
        _library(name, value)
        _check_order(name, value)
        if value.dtype != np.bool_:
            checks.dtype_tag(f"{name}, unless boolean,", value.dtype)
        return value

    def output_array(self, out: Any, x: Any, name: str) -> Any:
        if out is None:
            return self.empty(x, tuple(x.shape), x.dtype)
        if out is x:
            return x
        if not hasattr(out, "__cuda_array_interface__"):
            raise TypeError(f"out must be an array on the GPU, as {name} is, but got {type(out).__name__}")
        self.as_array("out", out)
        checks.check_output(out, x, name, not out.__cuda_array_interface__["data"][1])
        self.check_no_overlap(out, x, name)
        _places(x, out)
        return out

    def check_no_overlap(self, out: Any, x: Any, name: str) -> None:
        same_elements = _start(out) == _start(x) and out.dtype == x.dtype  # the shapes are the same
        if _overlap(out, x) and not same_elements:
            raise checks.overlap_error(name)

    def check_mask_memory(self, name: str, words: Any) -> None:
        if isinstance(words, np.ndarray):
            raise TypeError("mask must be of an array on the GPU, or a SeededMask, but got a PackedMask in memory")

    def copy_into(self, y: Any, x: Any) -> None:
        source, target = _places(x, y)
        if source.address:
            cuda_backend().copy_at(source.device, source.stream, target.address, source.address, _size(x))

    # ---- masks ----

    def empty_words(self, like: Any, cells: int) -> Any:
        return self.empty(like, (word_count(cells),), np.uint32)

    def draw_words(
        self, words: Any, like: Any, cells: int, state: State, threshold: int, runs: Iterable[Run] | None = None
    ) -> None:
        """Unused bits of the last word are not 0 if the mask keeps everything."""
        if not cells:
            return
        place, stream = _place(words), _place(like).stream
        if 0 < threshold < DROP_ALL:
            if runs is None:
                cuda_backend().draw_bits_at(place.device, stream, place.address, 0, 0, cells, *state, threshold)
                return
            for run in runs:
                cuda_backend().draw_rows_at(place.device, stream, place.address, *run, *state, threshold)
        else:
            word = 0 if threshold == DROP_ALL else 0xFFFFFFFF
            cuda_backend().fill_at(place.device, stream, place.address, word, word_count(cells))

    def draw_or_defer(
        self, words: Any, like: Any, cells: int, state: State, threshold: int, runs: Iterable[Run] | None = None
    ) -> DeferredDraw | None:
        """CUDA's primitives read words that were drawn before: nothing is deferred."""
        self.draw_words(words, like, cells, state, threshold, runs)
        return None

    def widen_blocks(self, words: Any, buffers: list[Any], passes: BlockPasses) -> Any:
        for buffer, extents in zip(buffers, passes, strict=True):
            target, source = _place(buffer), _place(words)
            cuda_backend().dilate_bits_at(target.device, source.stream, target.address, source.address, *extents)
            words = buffer
        return words

    def kept_count(self, words: Any) -> int:
        """Waits for the GPU and copies eight bytes from it."""
        count = self.empty(words, (1,), np.uint64)
        place, source = _place(count), _place(words)
        cuda_backend().fill_at(place.device, source.stream, place.address, 0, 2)
        cuda_backend().count_bits_at(place.device, source.stream, source.address, math.prod(words.shape), place.address)
        return int(to_host(count)[0])

    # ---- the primitives of plain dropout ----

    def kernel_arrays(self, x: Any, y: Any, mask_shape: Shape) -> tuple[Any, Any]:
        return x, y

    def dropout_forward(
        self, tag: int, x: Any, y: Any, words: Any, state: State, threshold: int, coefficients: Scaling, first: int = 0
    ) -> None:
        source, target, mask = _places(x, y, words)
        at = source.device, source.stream, tag, source.address, target.address, mask.address
        cuda_backend().dropout_forward_at(*at, first, math.prod(x.shape), *state, threshold, *coefficients)

    def gaussian_multiply(
        self, tag: int, x: Any, y: Any, state: State, sigma: float, runs: Iterable[Run] | None = None
    ) -> None:
        cells = math.prod(x.shape)
        if not cells:
            return
        source, target = _places(x, y)
        size = _size(x) // cells
        for run in (Run(0, 0, 1, 0, 1, 0, cells),) if runs is None else runs:
            for position, first, n in run.each_row():
                at = source.address + position * size, target.address + position * size
                cuda_backend().gaussian_multiply_at(source.device, source.stream, tag, *at, first, n, *state, sigma)

    def apply_mask(self, tag: int, x: Any, y: Any, words: Any, mask_shape: Shape, coefficients: Scaling) -> None:
        shape = tuple(x.shape)
        if math.prod(shape):
            source, target, mask = _places(x, y, words)
            on, arrays = (source.device, source.stream), (source.address, target.address, mask.address)
            cuda_backend().strided_affine_at(on, tag, arrays, 0, cell_axes(shape, mask_shape), coefficients)

    # ---- the fused primitives ----

    def empty(self, like: Any, shape: Shape, dtype: Any) -> Any:
        if _library("x", like) == "cupy":
            with like.device:
                return _cupy().empty(shape, dtype)
        return cuda_backend().empty(shape, dtype, _place(like).device, like.stream)

    def zeros(self, like: Any, shape: Shape, dtype: Any) -> Any:
        array = self.empty(like, shape, dtype)
        if math.prod(shape):
            place = _place(array)
            cuda_backend().fill_at(place.device, _place(like).stream, place.address, 0, _size(array) // 4)
        return array

    def as_contiguous(self, x: Any) -> Any:
        """x itself, because `as_array` refuses arrays that are not contiguous."""
        return x

    def output_buffer(self, y: Any) -> Any:
        """y itself, because `output_array` refuses arrays that are not contiguous."""
        return y

    def copy_if_overlapping(self, x: Any, y: Any) -> Any:
        if x is None or not _overlap(x, y):
            return x
        copy = self.empty(x, tuple(x.shape), x.dtype)
        self.copy_into(copy, x)
        return copy

    def cast(self, name: str, x: Any, dtype: Any) -> Any:
        """An array of Numba must already have the dtype."""
        if x.dtype == dtype:
            return x
        if _library(name, x) != "cupy":
            raise TypeError(f"{name} must have dtype {np.dtype(dtype)} as an array of Numba, but got {x.dtype}")
        with x.device:
            return x.astype(dtype)

    def as_additive_mask(self, name: str, mask: Any, shape: Shape, dtype: Any) -> Any:
        """An array of Numba must already have the dtype and the shape."""
        given = (1,) * (len(shape) - len(mask.shape)) + tuple(mask.shape)
        if _library(name, mask) == "cupy" and (given != shape or mask.dtype != dtype):
            cupy = _cupy()
            with mask.device:
                if mask.dtype == np.bool_:
                    mask = cupy.where(mask, 0.0, -np.inf)
                return cupy.ascontiguousarray(cupy.broadcast_to(mask, shape), dtype)
        if given != shape and mask.dtype == dtype:
            raise ValueError(f"{name} must have shape {shape} as an array of Numba, but got {given}")
        return self.cast(name, mask, dtype)

    def run_primitive(
        self,
        primitive: str,
        dtypes: tuple[int, ...],
        arrays: tuple[Any, ...],
        numbers: tuple[float, ...],
        draw: DeferredDraw | None = None,
    ) -> None:
        """The first array, which is never None, names the stream."""
        places = _places(*arrays)
        addresses = [place.address for place in places]
        run = getattr(cuda_backend(), f"{primitive}_at")
        run(places[0].device, places[0].stream, *dtypes, *addresses, *numbers)


DEVICE = DeviceOps()


class Place(NamedTuple):
    """Where an array lies. An empty array has the address 0."""

    address: int
    device: int
    stream: int


NO_ARRAY = Place(0, -1, 0)


def is_on_device(x: Any) -> bool:
    """Whether x says that its memory is on a GPU."""
    if _root(x) == "torch":  # the attributes below may raise other errors than AttributeError on a torch tensor
        return bool(getattr(x, "is_cuda", False))
    if hasattr(x, "__cuda_array_interface__"):
        return True
    dlpack_device = getattr(x, "__dlpack_device__", None)
    return dlpack_device is not None and dlpack_device()[0] == DLPACK_CUDA


# ---- what an array says of itself ----


def _check_order(name: str, x: Any) -> None:
    described = x.__cuda_array_interface__
    strides = described.get("strides")
    if strides is not None and math.prod(x.shape):
        step = np.dtype(described["typestr"]).itemsize
        for extent, stride in zip(reversed(x.shape), reversed(strides), strict=True):
            if extent > 1 and stride != step:
                raise ValueError(f"{name} must be C-contiguous on a GPU, but got strides {tuple(strides)}")
            step *= extent


def _library(name: str, x: Any) -> str:
    """The library of the array: "cupy" or "numba"."""
    root = _root(x)
    if root in ("cupy", "numba") and hasattr(x, "__cuda_array_interface__"):
        return root
    if root == "torch":
        raise TypeError(f"{name} is a torch tensor on a GPU: fastdrop.torch.dropout takes those")
    what = f"{type(x).__module__}.{type(x).__qualname__}"
    raise TypeError(
        f"{name} on a GPU must be an array of CuPy or Numba, but got {what}; cupy.from_dlpack makes it one, uncopied"
    )


_cupy_held: Any = None  # sys.modules no longer has it at the interpreter's exit


def _cupy() -> Any:
    """CuPy, which is imported if one of its arrays exists."""
    global _cupy_held
    _cupy_held = sys.modules.get("cupy") or _cupy_held
    return _cupy_held


def _root(x: Any) -> str:
    """The top-level package of x's type."""
    return type(x).__module__.partition(".")[0]


def _place(x: Any) -> Place:
    if x is None:
        return NO_ARRAY
    with x.device if _root(x) == "cupy" else contextlib.nullcontext():  # CuPy names the current device's stream
        described = x.__cuda_array_interface__
    address = described["data"][0]
    if not math.prod(described["shape"]):
        return NO_ARRAY
    # The interface gives the default streams the same numbers as the driver.
    return Place(address, cuda_backend().device_of(address), described.get("stream") or 0)


def _places(*arrays: Any) -> list[Place]:
    """The places of arrays, which must lie on one GPU."""
    places = [_place(array) for array in arrays]
    devices = sorted({place.device for place in places if place.device >= 0})
    if len(devices) > 1:
        raise ValueError(f"x, out and mask must lie on one GPU, but got GPUs {', '.join(map(str, devices))}")
    return places


def _size(x: Any) -> int:
    """Size in bytes."""
    return int(math.prod(x.shape) * np.dtype(x.__cuda_array_interface__["typestr"]).itemsize)


def _start(x: Any) -> int:
    return int(x.__cuda_array_interface__["data"][0])


def _overlap(x: Any, y: Any) -> bool:
    """Whether they share memory."""
    return _start(x) < _start(y) + _size(y) and _start(y) < _start(x) + _size(x)

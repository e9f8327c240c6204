"""The NumPy API for arrays on a GPU: CuPy's and Numba's, by way of the CUDA array interface.

Results and masks are arrays of the kind that came. Work goes to the stream that the array names (CuPy: the current
one), nothing is waited for and nothing crosses to the host. This module owns what such arrays must be and how they are
made.
"""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any, NamedTuple

import numpy as np

from . import _checks
from .backends import cuda
from .grid import cell_axes
from .mask import PackedMask, SeededMask, word_count
from .stream import DROP_ALL, check_random_state, random_state, threshold_and_scale

__all__ = ["dropout", "is_on_device", "masked"]

Mask = PackedMask | SeededMask

DLPACK_CUDA = 2


class Memory(NamedTuple):
    """Where an array lies."""

    address: int
    device: int
    stream: int


def is_on_device(x: Any) -> bool:
    """Whether x says that its memory is a GPU's."""
    if _root(x) == "torch":  # whose tensors may raise other errors where they haven't the attributes
        return bool(getattr(x, "is_cuda", False))
    if hasattr(x, "__cuda_array_interface__"):
        return True
    ask = getattr(x, "__dlpack_device__", None)
    return ask is not None and ask()[0] == DLPACK_CUDA


def dropout(
    x: Any, p: Any, training: bool, noise_shape: Any, scaling: str, store: str, rng: Any, out: Any
) -> tuple[Any, Mask | None]:
    """`fastdrop.dropout` for an array on a GPU."""
    tag = _tag("x", x)
    p = _checks.probability(p)
    _checks.choice("scaling", scaling, _checks.SCALINGS)
    _checks.choice("store", store, _checks.STORES)
    shape = tuple(x.shape)
    cells_shape = _checks.noise_shape(noise_shape, shape)
    cut, scale = threshold_and_scale(p)
    if not training or cut == 0:
        check_random_state(rng)
        if scaling == "standard" and cut:
            every = PackedMask._of(_filled(x, 1, True), (1,) * len(shape), 0.0, 1.0 - cut / DROP_ALL)
            return masked("x", x, every, out), None
        return masked("x", x, None, out), None
    y = _output(out, x, "x")
    seed, offset = random_state(rng)
    if scaling == "standard":
        scale = 1.0
    mask: Mask
    if store == "seed":
        mask = SeededMask._of(seed, offset, cells_shape, p, scale, cut)
    else:
        cells = math.prod(cells_shape)
        if cells_shape == shape and 0 < cut < DROP_ALL and cells:
            words = _empty(x, (word_count(cells),), np.uint32)
            _forward(tag, x, y, words, seed, offset, cut, scale)
            return y, PackedMask._of(words, shape, p, scale)
        mask = PackedMask._of(_draw_words(x, cells, seed, offset, cut), cells_shape, p, scale)
    _apply(tag, x, mask, y)
    return y, mask


def masked(name: str, x: Any, mask: Mask | None, out: Any) -> Any:
    """`fastdrop.apply_mask` and `fastdrop.dropout_backward` for an array on a GPU."""
    tag = _tag(name, x)
    if mask is None:
        if out is None or out is x:
            return x
        y = _output(out, x, name)
        _copy(y, x)
        return y
    if not isinstance(mask, (PackedMask, SeededMask)):
        raise TypeError(f"mask must be a PackedMask, a SeededMask or None, but got {type(mask).__name__}")
    _checks.mask_grid(name, tuple(x.shape), mask.shape)
    y = _output(out, x, name)
    _apply(tag, x, mask, y)
    return y


def _forward(tag: int, x: Any, y: Any, words: Any, seed: int, offset: int, cut: int, scale: float) -> None:
    source, target = _same_device(x, y)
    keep = 0 if words is None else _memory(words).address
    n = math.prod(x.shape)
    cuda().dropout_forward_at(
        source.device,
        source.stream,
        tag,
        source.address,
        target.address,
        keep,
        0,
        n,
        seed,
        offset,
        cut,
        scale,
        0.0,
        0.0,
    )


def _apply(tag: int, x: Any, mask: Mask, y: Any) -> None:
    shape = tuple(x.shape)
    if not math.prod(shape):
        return
    if isinstance(mask, SeededMask):
        if mask.shape == shape and 0 < mask.threshold < DROP_ALL:
            _forward(tag, x, y, None, mask.seed, mask.offset, mask.threshold, mask.scale)
            return
        words = _draw_words(x, math.prod(mask.shape), mask.seed, mask.offset, mask.threshold)
    else:
        words = mask.words
    if isinstance(words, np.ndarray):
        raise TypeError("mask must be of an array on the GPU, or a SeededMask, but got a PackedMask in memory")
    source, target, keep = _same_device(x, y, words)
    cuda().strided_affine_at(
        source.device,
        source.stream,
        tag,
        source.address,
        target.address,
        keep.address,
        0,
        cell_axes(shape, mask.shape),
        mask.scale,
        0.0,
        0.0,
    )


def _draw_words(like: Any, cells: int, seed: int, offset: int, cut: int) -> Any:
    if not 0 < cut < DROP_ALL or not cells:
        return _filled(like, cells, cut < DROP_ALL)
    words = _empty(like, (word_count(cells),), np.uint32)
    at = _memory(words)
    cuda().draw_bits_at(at.device, _memory(like).stream, at.address, 0, 0, cells, seed, offset, cut)
    return words


# ---- arrays ----


def _tag(name: str, x: Any) -> int:
    """The dtype's tag of an array that kernels can take."""
    _kind(name, x)
    described = x.__cuda_array_interface__
    tag = _checks.dtype_tag(name, np.dtype(x.dtype))
    strides = described.get("strides")
    if strides is not None and math.prod(x.shape):
        step = np.dtype(described["typestr"]).itemsize
        for extent, stride in zip(reversed(x.shape), reversed(strides), strict=True):
            if extent > 1 and stride != step:
                raise ValueError(f"{name} must be C-contiguous on a GPU, but got strides {tuple(strides)}")
            step *= extent
    return tag


def _kind(name: str, x: Any) -> str:
    """Whose array it is: cupy or numba."""
    root = _root(x)
    if root in ("cupy", "numba") and hasattr(x, "__cuda_array_interface__"):
        return root
    what = f"{type(x).__module__}.{type(x).__qualname__}"
    if root == "torch":
        raise TypeError(f"{name} is a torch tensor on a GPU: fastdrop.torch.dropout takes those")
    raise TypeError(
        f"{name} on a GPU must be an array of CuPy or Numba, but got {what}; cupy.from_dlpack makes it one, uncopied"
    )


def _root(x: Any) -> str:
    """The top-level package of x's type."""
    return type(x).__module__.partition(".")[0]


def _memory(x: Any) -> Memory:
    with x.device if _root(x) == "cupy" else contextlib.nullcontext():  # CuPy names the current device's stream
        described = x.__cuda_array_interface__
    address = described["data"][0]
    if not math.prod(described["shape"]):
        return Memory(0, -1, 0)
    # The interface numbers the default streams as the driver does.
    return Memory(address, cuda().device_of(address), described.get("stream") or 0)


def _same_device(x: Any, *others: Any) -> list[Memory]:
    memories = [_memory(array) for array in (x, *others)]
    devices = sorted({memory.device for memory in memories if memory.device >= 0})
    if len(devices) > 1:
        raise ValueError(f"x, out and mask must lie on one GPU, but got GPUs {', '.join(map(str, devices))}")
    return memories


def _empty(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of the kind and on the GPU of another, not yet written."""
    if _kind("x", like) == "cupy":
        with like.device:
            return sys.modules["cupy"].empty(shape, dtype)
    at = _memory(like)
    return cuda().empty(shape, dtype, at.device, like.stream)


def _filled(like: Any, cells: int, kept: bool) -> Any:
    """Words of a mask that keeps all or nothing; bits past the last cell are not 0 where it keeps."""
    words = _empty(like, (word_count(cells),), np.uint32)
    if cells:
        at = _memory(words)
        cuda().fill_at(at.device, _memory(like).stream, at.address, 0xFFFFFFFF if kept else 0, word_count(cells))
    return words


def _copy(y: Any, x: Any) -> None:
    source, target = _same_device(x, y)
    if source.address:
        size = math.prod(x.shape) * np.dtype(x.__cuda_array_interface__["typestr"]).itemsize
        cuda().copy_at(source.device, source.stream, target.address, source.address, size)


def _output(out: Any, x: Any, name: str) -> Any:
    """out if it may take the result for x, a new array like x if it is None."""
    if out is None:
        return _empty(x, tuple(x.shape), x.dtype)
    if out is x:
        return x
    if not hasattr(out, "__cuda_array_interface__"):
        raise TypeError(f"out must be an array on the GPU, as {name} is, but got {type(out).__name__}")
    _tag("out", out)
    described = out.__cuda_array_interface__
    _checks.takes_result(out, x, name, not described["data"][1])
    size = math.prod(x.shape) * np.dtype(described["typestr"]).itemsize
    if 0 < abs(described["data"][0] - x.__cuda_array_interface__["data"][0]) < size:
        raise _checks.overlaps(name)
    _same_device(x, out)
    return out

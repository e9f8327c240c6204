"""Arrays on a GPU, as the NumPy API's flow (`ops`, `fused`) asks for them: CuPy's and Numba's.

They come by the CUDA array interface; results and masks are arrays of the kind that came. Work goes to the stream that
the array names (CuPy: the current one), nothing is waited for and nothing crosses to the host, but for DropBlock's
count. This module owns what such arrays must be and how they are made.
"""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any, NamedTuple

import numpy as np

from ..backends import cuda_backend
from ..core import checks
from ..core.grid import cell_axes
from ..core.mask import PackedMask, in_memory, word_count
from ..core.random import DROP_ALL

__all__ = [
    "additive",
    "apart",
    "apply",
    "cast",
    "check_words",
    "contiguous",
    "copy",
    "detached",
    "dilated",
    "draw_into",
    "draw_or_defer",
    "draw_words",
    "empty",
    "empty_words_like",
    "forward",
    "gaussian",
    "in_order",
    "is_on_device",
    "kept",
    "output",
    "run",
    "taken",
    "taken_mask",
    "target",
    "zeros",
]

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


def taken(name: str, x: Any) -> tuple[Any, int]:
    """x, which kernels can take, and its dtype's tag."""
    return x, _tag(name, x)


def output(out: Any, x: Any, name: str) -> Any:
    """out if it may take the result for x, a new array like x if it is None."""
    if out is None:
        return _empty(x, tuple(x.shape), x.dtype)
    if out is x:
        return x
    if not hasattr(out, "__cuda_array_interface__"):
        raise TypeError(f"out must be an array on the GPU, as {name} is, but got {type(out).__name__}")
    _tag("out", out)
    checks.takes_result(out, x, name, not out.__cuda_array_interface__["data"][1])
    apart(out, x, name)
    _same_device(x, out)
    return out


def apart(out: Any, x: Any, name: str) -> None:
    """Raises if they share memory, unless element on element."""
    if _meet(out, x) and not _coincide(out, x):
        raise checks.overlaps(name)


def copy(y: Any, x: Any) -> None:
    source, target = _same_device(x, y)
    if source.address:
        cuda_backend().copy_at(source.device, source.stream, target.address, source.address, _size(x))


def check_words(name: str, mask: PackedMask) -> None:
    """Raises unless the mask lies on a GPU."""
    if isinstance(mask.words, np.ndarray):
        raise TypeError("mask must be of an array on the GPU, or a SeededMask, but got a PackedMask in memory")


def empty_words_like(x: Any, cells: int) -> Any:
    return _empty(x, (word_count(cells),), np.uint32)


def draw_words(like: Any, cells: int, first: int, seed: int, offset: int, cut: int) -> Any:
    """The words of a mask of so many cells, any threshold; bits past the last are not 0 where it keeps all."""
    words = empty_words_like(like, cells)
    draw_into(words, like, cells, first, seed, offset, cut)
    return words


def draw_into(words: Any, like: Any, cells: int, first: int, seed: int, offset: int, cut: int) -> None:
    """The same into words that are there, on the stream of like."""
    if cells:
        at, stream = _memory(words), _memory(like).stream
        if 0 < cut < DROP_ALL:
            cuda_backend().draw_bits_at(at.device, stream, at.address, 0, first, cells, seed, offset, cut)
        else:
            cuda_backend().fill_at(
                at.device, stream, at.address, 0 if cut == DROP_ALL else 0xFFFFFFFF, word_count(cells)
            )


def draw_or_defer(words: Any, like: Any, cells: int, seed: int, offset: int, cut: int) -> None:
    """Draws words; nothing is left to `run`."""
    draw_into(words, like, cells, 0, seed, offset, cut)


def dilated(words: Any, rooms: list[Any], passes: tuple[tuple[int, int, int, int], ...]) -> Any:
    """Words after each of DropBlock's passes, which have a room each."""
    for to, (outer, n, inner, block) in zip(rooms, passes, strict=True):
        target, source = _memory(to), _memory(words)
        cuda_backend().dilate_bits_at(
            target.device, source.stream, target.address, source.address, outer, n, inner, block
        )
        words = to
    return words


def kept(words: Any) -> int:
    """How many cells words keep: waits for the GPU, and for eight bytes from there."""
    total = _empty(words, (1,), np.uint64)
    at, stream = _memory(total), _memory(words).stream
    cuda_backend().fill_at(at.device, stream, at.address, 0, 2)
    cuda_backend().count_bits_at(at.device, stream, _memory(words).address, math.prod(words.shape), at.address)
    return int(in_memory(total)[0])


def in_order(x: Any, y: Any, cells_shape: tuple[int, ...]) -> tuple[Any, Any]:
    """x and y, which are contiguous."""
    return x, y


def forward(
    tag: int,
    x: Any,
    y: Any,
    words: Any,
    seed: int,
    offset: int,
    cut: int,
    a: float,
    b: float,
    c: float,
) -> None:
    """y = x under a mask of its shape that is drawn and, unless words is None, kept."""
    source, target = _same_device(x, y)
    keep = 0 if words is None else _memory(words).address
    at = source.device, source.stream, tag, source.address, target.address
    cuda_backend().dropout_forward_at(*at, keep, 0, math.prod(x.shape), seed, offset, cut, a, b, c)


def gaussian(tag: int, x: Any, y: Any, seed: int, offset: int, sigma: float) -> None:
    """y = x times its Gaussian factors."""
    source, target = _same_device(x, y)
    at = source.device, source.stream, tag, source.address, target.address
    cuda_backend().gaussian_multiply_at(*at, 0, math.prod(x.shape), seed, offset, sigma)


def apply(tag: int, x: Any, y: Any, words: Any, cells_shape: tuple[int, ...], a: float, b: float, c: float) -> None:
    """y = x under stored bits of a mask that fits."""
    shape = tuple(x.shape)
    if math.prod(shape):
        source, target, keep = _same_device(x, y, words)
        at = source.device, source.stream, tag, source.address, target.address, keep.address
        cuda_backend().strided_affine_at(*at, 0, cell_axes(shape, cells_shape), a, b, c)


# ---- rows, for the fused ops ----


def taken_mask(name: str, value: Any) -> Any:
    """A mask that is an array on a GPU, of booleans or floats."""
    _check_order(name, value)
    if value.dtype != np.bool_:
        checks.dtype_tag(f"{name}, unless boolean,", np.dtype(value.dtype))
    return value


def empty(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    return _empty(like, shape, dtype)


def zeros(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    array = _empty(like, shape, dtype)
    if math.prod(shape):
        at = _memory(array)
        cuda_backend().fill_at(at.device, _memory(like).stream, at.address, 0, _size(array) // 4)
    return array


def contiguous(x: Any) -> Any:
    """x, for `taken` refuses what isn't."""
    return x


def target(y: Any) -> Any:
    """y, for `output` refuses what isn't contiguous."""
    return y


def detached(x: Any, y: Any) -> Any:
    """x, or a copy if writing y might change it."""
    if not _meet(x, y):
        return x
    apart = _empty(x, tuple(x.shape), x.dtype)
    copy(apart, x)
    return apart


def cast(name: str, x: Any, dtype: Any) -> Any:
    """x as numbers of a dtype; arrays of Numba must have it."""
    if x.dtype == dtype:
        return x
    if _kind(name, x) != "cupy":
        raise TypeError(f"{name} must have dtype {np.dtype(dtype)} as an array of Numba, but got {x.dtype}")
    with x.device:
        return x.astype(dtype)


def additive(name: str, mask: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """A mask as what is added to scores, contiguous and of a shape that it broadcasts to; Numba's must be that."""
    given = (1,) * (len(shape) - len(mask.shape)) + tuple(mask.shape)
    if given == shape and mask.dtype == dtype:
        return mask
    if _kind(name, mask) != "cupy":
        if mask.dtype != dtype:
            raise TypeError(f"{name} must have dtype {np.dtype(dtype)} as an array of Numba, but got {mask.dtype}")
        raise ValueError(f"{name} must have shape {shape} as an array of Numba, but got {given}")
    cupy = _cupy()
    with mask.device:
        if mask.dtype == np.bool_:
            mask = cupy.where(mask, 0.0, -np.inf)
        return cupy.ascontiguousarray(cupy.broadcast_to(mask, shape), dtype)


def run(
    primitive: str, dtypes: tuple[int, ...], arrays: tuple[Any, ...], numbers: tuple[float, ...], draw: None = None
) -> None:
    """A fused primitive on arrays, of which the first names the stream."""
    at = iter(_same_device(*(x for x in arrays if x is not None)))
    places = [Memory(0, -1, 0) if x is None else next(at) for x in arrays]
    device, stream = places[0].device, places[0].stream
    getattr(cuda_backend(), f"{primitive}_at")(device, stream, *dtypes, *(place.address for place in places), *numbers)


# ---- arrays ----


def _tag(name: str, x: Any) -> int:
    """The dtype's tag of an array that kernels can take."""
    _kind(name, x)
    tag = checks.dtype_tag(name, np.dtype(x.dtype))
    _check_order(name, x)
    return tag


def _check_order(name: str, x: Any) -> None:
    _kind(name, x)
    described = x.__cuda_array_interface__
    strides = described.get("strides")
    if strides is not None and math.prod(x.shape):
        step = np.dtype(described["typestr"]).itemsize
        for extent, stride in zip(reversed(x.shape), reversed(strides), strict=True):
            if extent > 1 and stride != step:
                raise ValueError(f"{name} must be C-contiguous on a GPU, but got strides {tuple(strides)}")
            step *= extent


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


_cupy_held: Any = None  # at the interpreter's exit sys.modules has it no more


def _cupy() -> Any:
    """CuPy, which is there wherever one of its arrays is."""
    global _cupy_held
    _cupy_held = sys.modules.get("cupy") or _cupy_held
    return _cupy_held


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
    return Memory(address, cuda_backend().device_of(address), described.get("stream") or 0)


def _address(x: Any) -> int:
    return int(x.__cuda_array_interface__["data"][0])


def _size(x: Any) -> int:
    """Bytes."""
    return int(math.prod(x.shape) * np.dtype(x.__cuda_array_interface__["typestr"]).itemsize)


def _meet(x: Any, y: Any) -> bool:
    """Whether they share memory."""
    return _address(x) < _address(y) + _size(y) and _address(y) < _address(x) + _size(x)


def _coincide(x: Any, y: Any) -> bool:
    """Whether they, of one shape, are the same elements."""
    return _address(x) == _address(y) and bool(x.dtype == y.dtype)


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
            return _cupy().empty(shape, dtype)
    at = _memory(like)
    return cuda_backend().empty(shape, dtype, at.device, like.stream)

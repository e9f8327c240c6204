"""The calls that benchmarks and the demo compare: fastdrop, NumPy as people write it, ``F.dropout``, multiplications.

A contender is forward, backward and both in turn. All contenders use the same buffers, so that none of them has fresher
memory. torch is imported only when a comparison asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdrop import Stream, backends, draw_mask, dropout, dropout_backward
from fastdrop.core import checks
from fastdrop.core.random import keep_scale
from fastdrop.core.random import threshold as threshold_of

Array = NDArray[Any]

FASTDROP, F_DROPOUT, NUMPY, TORCH_MUL, LIMIT = "fastdrop", "F.dropout", "NumPy", "torch.mul", "scale limit"
SEED = 0
LINE_BYTES = 64


@dataclass(frozen=True)
class Contender:
    """Calls to time, and bytes per element that forward keeps for backward (None where there is nothing to keep)."""

    name: str
    forward: Callable[[], object]
    backward: Callable[[], object]
    both: Callable[[], object]
    kept: float | None


@dataclass(frozen=True)
class Buffers:
    """The arrays that all contenders share; on cache lines, as torch allocates them."""

    x: Array
    dy: Array
    y: Array
    dx: Array

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffers:
        rng = np.random.default_rng(SEED)
        arrays = [_aligned(shape, dtype) for _ in range(4)]
        arrays[0][...] = rng.standard_normal(shape, np.float32)
        arrays[1][...] = rng.standard_normal(shape, np.float32)
        arrays[2][...] = arrays[3][...] = 0  # touched, so that no page is new to the first contender
        return cls(*arrays)


def numpy_dropout(x: Array, p: float, rng: np.random.Generator) -> tuple[Array, NDArray[np.bool_]]:
    """Dropout as people write it in NumPy, with the mask to keep for backward."""
    keep = rng.random(x.shape) >= p
    return numpy_dropout_backward(x, keep, p), keep


def numpy_dropout_backward(dy: Array, keep: NDArray[np.bool_], p: float) -> Array:
    dx: Array = dy * keep * dy.dtype.type(1.0 / (1.0 - p))
    return dx


def import_torch() -> Any:
    """torch, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch


@contextlib.contextmanager
def threads(n: int, torch: Any) -> Iterator[None]:
    """Gives fastdrop and torch, unless it is None, so many threads until the block ends."""
    before = backends.get_num_threads(), torch and torch.get_num_threads()
    backends.set_num_threads(n)
    try:
        if torch is not None:
            torch.set_num_threads(n)
        yield
    finally:
        backends.set_num_threads(before[0])
        if torch is not None:
            torch.set_num_threads(before[1])


def fastdrop(buffers: Buffers, p: float) -> Contender:
    b, rng = buffers, Stream(SEED)
    _, mask = dropout(b.x, p, rng=rng, out=b.y)

    def both() -> None:
        _, drawn = dropout(b.x, p, rng=rng, out=b.y)
        dropout_backward(b.dy, drawn, out=b.dx)

    return Contender(
        FASTDROP,
        lambda: dropout(b.x, p, rng=rng, out=b.y),
        lambda: dropout_backward(b.dy, mask, out=b.dx),
        both,
        mask.nbytes / b.x.size if mask is not None else 0.0,
    )


def kernels(backend: Any, buffers: Buffers, p: float) -> Contender:
    """A backend's primitives over memory that is there: `fastdrop` less what Python costs around them."""
    _, tag = checks.as_array("x", buffers.x)
    x, dy, y, dx = (a.view(np.uint16) if tag == checks.BFLOAT16 else a for a in vars(buffers).values())
    n, threshold, words = x.size, threshold_of(p), draw_mask(x.size, p, rng=SEED).words
    scale, forward, backward = keep_scale(threshold), backend.dropout_forward, backend.masked_affine
    forward(tag, x, y, words, 0, n, SEED, 0, threshold, scale, 0.0, 0.0)

    def both() -> None:
        forward(tag, x, y, words, 0, n, SEED, 0, threshold, scale, 0.0, 0.0)
        backward(tag, dy, dx, words, 0, 1, 1, n, scale, 0.0, 0.0)

    return Contender(
        FASTDROP,
        lambda: forward(tag, x, y, words, 0, n, SEED, 0, threshold, scale, 0.0, 0.0),
        lambda: backward(tag, dy, dx, words, 0, 1, 1, n, scale, 0.0, 0.0),
        both,
        words.nbytes / n,
    )


def plain_numpy(buffers: Buffers, p: float) -> Contender:
    b, rng = buffers, np.random.default_rng(SEED)
    _, keep = numpy_dropout(b.x, p, rng)

    def both() -> None:
        _, drawn = numpy_dropout(b.x, p, rng)
        numpy_dropout_backward(b.dy, drawn, p)

    return Contender(
        NUMPY,
        lambda: numpy_dropout(b.x, p, rng),
        lambda: numpy_dropout_backward(b.dy, keep, p),
        both,
        keep.nbytes / b.x.size,
    )


def torch_dropout(torch: Any, buffers: Buffers, p: float) -> Contender:
    """``F.dropout`` as a training step runs it: recorded by autograd, differentiated with `torch.autograd.grad`."""
    x, dy = _tensor(torch, buffers.x).requires_grad_(), _tensor(torch, buffers.dy)
    forward, grad = torch.nn.functional.dropout, torch.autograd.grad
    saved: dict[int, int] = {}  # bytes by address: a tensor saved twice is kept once

    def pack(tensor: Any) -> Any:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(x, p, True)
    return Contender(
        F_DROPOUT,
        lambda: forward(x, p, True),
        lambda: grad(y, x, dy, retain_graph=True),
        lambda: grad(forward(x, p, True), x, dy),
        sum(saved.values()) / x.numel(),
    )


def torch_mul(torch: Any, buffers: Buffers, p: float) -> Contender:
    """No dropout at all: one multiplication for each pass."""
    x, dy, y, dx = (_tensor(torch, array) for array in (buffers.x, buffers.dy, buffers.y, buffers.dx))
    scale = keep_scale(threshold_of(p))

    def both() -> None:
        torch.mul(x, scale, out=y)
        torch.mul(dy, scale, out=dx)

    return Contender(TORCH_MUL, lambda: torch.mul(x, scale, out=y), lambda: torch.mul(dy, scale, out=dx), both, None)


def scale_limit(buffers: Buffers, p: float) -> Contender | None:
    """The C backend's bare multiplication, one thread, streaming where the kernels stream; float32 only."""
    if backends.active_name() != "c" or buffers.x.dtype != np.float32:
        return None
    b, scale, multiply = buffers, keep_scale(threshold_of(p)), backends.active().scale_float32
    stream = b.y.nbytes >= backends.active().STREAM_BYTES

    def both() -> None:
        multiply(b.x, b.y, scale, stream)
        multiply(b.dy, b.dx, scale, stream)

    return Contender(
        LIMIT, lambda: multiply(b.x, b.y, scale, stream), lambda: multiply(b.dy, b.dx, scale, stream), both, None
    )


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + LINE_BYTES, np.uint8)
    skip = -raw.ctypes.data % LINE_BYTES
    return raw[skip : skip + nbytes].view(dtype).reshape(shape)


def _tensor(torch: Any, array: Array) -> Any:
    """A tensor over the same memory."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

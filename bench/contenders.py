"""The calls that benchmarks and the demo compare: fastdrop, NumPy as people write it, ``F.dropout``, multiplications.

A contender is forward, backward and both in turn. All contenders use the same buffers, so that none of them has fresher
memory. torch is imported only when a comparison asks for it.

The limit of a case is the fastest of the `WAYS` to read these bytes once and write as many, in the same run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdrop import Stream, backends, draw_mask, dropout, dropout_backward
from fastdrop.backends import c as native
from fastdrop.backends.memory import Policy, policy, use_policy
from fastdrop.cli import bench as cli_bench
from fastdrop.cli.bench import numpy_dropout, numpy_dropout_backward
from fastdrop.core import checks
from fastdrop.core.random import keep_scale
from fastdrop.core.random import threshold as threshold_of

Array = NDArray[Any]

FASTDROP, F_DROPOUT, NUMPY, TORCH_MUL, LIMIT = "fastdrop", "F.dropout", "NumPy", "torch.mul", "limit"
WAYS = ("memcpy", "ordinary", "streaming", "interleaved")
INTERLEAVED = Policy(pages=4, lines=8)
SEED = 0
LINE_BYTES = 64


@dataclass(frozen=True)
class Contender:
    """Calls to time, and bytes per element that forward keeps for backward (None where there is nothing to keep).

    ``around`` gives the context that the calls run in; entering it is not to be timed.
    """

    name: str
    forward: Callable[[], object]
    backward: Callable[[], object]
    both: Callable[[], object]
    kept: float | None
    around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext

    def call(self, operation: str) -> Callable[[], object]:
        return {"forward": self.forward, "backward": self.backward, "forward+backward": self.both}[operation]


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


@contextlib.contextmanager
def threads(n: int, torch: Any) -> Iterator[None]:
    """`fastdrop.cli.bench.threads`, also for the C backend where another backend runs, because C is a peer then."""
    before = backends.get_num_threads()
    with cli_bench.threads(n, torch):
        try:
            _give_c_threads(n)
            yield
        finally:
            _give_c_threads(before)


def threads_id(n: int) -> str:
    """As names of cases have it."""
    return f"{n}thread{'s' * (n > 1)}"


def p_id(value: object) -> str | None:
    """p as names of cases have it; other parameters get what pytest calls them."""
    return f"p{value}" if isinstance(value, float) else None


def _give_c_threads(n: int) -> None:
    if native.unavailable() is None:
        native.set_num_threads(n)


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


def scale_limits(buffers: Buffers, p: float) -> dict[str, Contender]:
    """Each of the `WAYS` over the buffers' bytes, on as many threads as are set; none where C is not built.

    memcpy copies. The others are the C backend's bare multiplication of the bytes as float32, whatever their dtype:
    with ordinary stores, with stores around the cache, and with such stores to several pages in turn. What `Buffers.of`
    makes has next to no subnormal numbers when it is read so; those would slow down some CPUs.
    """
    if native.unavailable() is not None:
        return {}
    return {way: _scaling(buffers, keep_scale(threshold_of(p)), way) for way in WAYS}


def _scaling(buffers: Buffers, scale: float, way: str) -> Contender:
    x, dy, y, dx = (array.reshape(-1).view(np.float32) for array in vars(buffers).values())
    multiply = native.scale_float32

    def both() -> None:
        multiply(x, y, scale, way)
        multiply(dy, dx, scale, way)

    forward, backward = lambda: multiply(x, y, scale, way), lambda: multiply(dy, dx, scale, way)
    return Contender(way, forward, backward, both, None, lambda: _at_best(way))


@contextlib.contextmanager
def _at_best(way: str) -> Iterator[None]:
    """The best instruction set, whichever a case measures; for ``interleaved``, several pages if the policy has one."""
    isa, chosen = native.isa(), policy()
    if way == "interleaved" and chosen.pages == 1:
        chosen = dataclasses.replace(chosen, pages=INTERLEAVED.pages, lines=INTERLEAVED.lines)
    native.select_isa(native.usable_isas()[-1])
    try:
        with use_policy(chosen):
            yield
    finally:
        native.select_isa(isa)


def with_limit(peers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The peers of a case as they were timed, and the limit if there are ways: the fastest, with its name."""
    ways = [way for way in WAYS if way in peers]
    if not ways:
        return peers
    fastest = min(ways, key=lambda way: peers[way]["seconds"])
    return {**peers, LIMIT: {**peers[fastest], "way": fastest}}


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

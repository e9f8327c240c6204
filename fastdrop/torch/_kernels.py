"""Plain tensors in, plain tensors out: the primitives as torch's side of the package calls them.

No autograd, no generator, and no checks but of dtypes and of words, past whose end kernels would read. This module owns
how a CPU tensor's memory reaches a backend: by address where the backend is C, as NumPy views elsewhere, and in logical
order always. Threads are as many as torch's own ops may use. CUDA tensors it hands to `_cuda`.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import backends
from .._checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from ..backends import native
from ..grid import Grid
from ..mask import fill_words, word_count
from ..stream import DROP_ALL
from . import _cuda
from ._plain import hide_from_dynamo

TAGS = {
    torch.float32: FLOAT32,
    torch.float64: FLOAT64,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
}
DTYPES = frozenset([*TAGS, torch.complex64, torch.complex128])

Shape = tuple[int, ...]

with torch.inference_mode(False):
    _NO_WORDS = torch.empty(0, dtype=torch.int32, device="cpu")  # its `new_empty` costs less than `torch.empty`


# From here on glibc maps memory anew for each tensor, and a page at a time the system takes three times as long to
# provide it as the kernel to fill it: 3.8 ns per element of forward and backward, 0.8 in pages of 2 MiB. NumPy asks for
# those itself.
FRESH_BYTES = 32 << 20
_advise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None


def _new_like(x: Tensor, n: int) -> Tensor:
    """An output for x's n elements, not yet written."""
    y = torch.empty_like(x)
    if n >= FRESH_BYTES // 8 and _advise is not None and (size := n * x.element_size()) >= FRESH_BYTES:
        first, end = (y.data_ptr() + mmap.PAGESIZE - 1) & -mmap.PAGESIZE, (y.data_ptr() + size) & -mmap.PAGESIZE
        _advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_HUGEPAGE)  # a wish: no harm if refused
    return y


def _borrow_threads() -> None:
    """Has torch's own threads, which spin for its next loop, do ours in between: another pool would fight them."""
    if native.unavailable() is None and "OpenMP" in torch.__config__.parallel_info():
        with contextlib.suppress(AttributeError, OSError):  # an OpenMP without GNU's entry point
            native.use_team(ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0)


_borrow_threads()


def forward(
    x: Tensor, seed: Any, cut: int, scale: float, cells_shape: Shape | None, bits: bool, inplace: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Draws a mask and applies it: x or a new tensor with the strides torch would give it, and the words if asked for.

    ``cells_shape`` is None where each element is a cell; else 1 or the full extent on each axis. ``seed`` is an int,
    for a CUDA tensor also a tensor on its device.
    """
    tag = TAGS.get(x.dtype)
    n = x.numel()
    if cells_shape is None and tag is not None and 0 < cut < DROP_ALL and n:
        if x.is_cuda:
            if x.is_contiguous():
                y = x if inplace else torch.empty_like(x)
                words = _empty_words(x, n) if bits else None
                _cuda.forward(tag, x, y, words, n, seed, cut, scale)
                return y, words
            return _forward_by_words(x, seed, cut, scale, None, bits, inplace)
        words = _NO_WORDS.new_empty((n + 31) >> 5) if bits else None
        if x.is_contiguous():
            source, y = x, x if inplace else _new_like(x, n)
        else:
            source = y = x.contiguous()
        backend = backends.active()
        if backend is native:
            at = 0 if words is None else words.data_ptr()
            threads, from_, to = torch.get_num_threads(), source.data_ptr(), y.data_ptr()
            if native.dropout_forward_at(threads, tag, from_, to, at, 0, n, seed, 0, cut, scale, 0.0, 0.0):
                raise _refusal()
        else:
            keep = None if words is None else _words(words)
            arrays = _array(source), _array(y)
            _call(backend, backend.dropout_forward, tag, *arrays, keep, 0, n, seed, 0, cut, scale, 0.0, 0.0)
        if source is x:
            return y, words
        return x.copy_(y) if inplace else _like(y, x), words
    check_dtype(x)
    return _forward_by_words(x, seed, cut, scale, cells_shape, bits, inplace)


def _forward_by_words(
    x: Tensor, seed: Any, cut: int, scale: float, cells_shape: Shape | None, bits: bool, inplace: bool
) -> tuple[Tensor, Tensor | None]:
    words = draw(x, math.prod(x.shape if cells_shape is None else cells_shape), seed, cut)
    y = apply(x, words, scale, cells_shape)
    return x.copy_(y) if inplace else y, words if bits else None


def _empty_words(like: Tensor, cells: int) -> Tensor:
    return like.new_empty(word_count(cells), dtype=torch.int32)


def draw(like: Tensor, cells: int, seed: Any, cut: int) -> Tensor:
    """The words of a mask of so many cells, any threshold, where ``like`` is."""
    if like.is_cuda:
        words = _empty_words(like, cells)
        if 0 < cut < DROP_ALL and cells:
            _cuda.draw(words, cells, seed, cut)
        elif cells:
            words.fill_(0 if cut == DROP_ALL else -1)
            if cut != DROP_ALL and cells & 31:
                words[-1].fill_((1 << (cells & 31)) - 1)
        return words
    words = _NO_WORDS.new_empty(word_count(cells))
    if 0 < cut < DROP_ALL and cells:
        backend = backends.active()
        if backend is native:
            if native.draw_bits_at(torch.get_num_threads(), words.data_ptr(), 0, 0, cells, seed, 0, cut):
                raise _refusal()
        else:
            _call(backend, backend.draw_bits, _words(words), 0, 0, cells, seed, 0, cut)
        return words
    if cells:
        fill_words(_words(words), cells, cut)
    return words


def _checked(words: Tensor, cells: int, device: torch.device) -> Tensor:
    """Words as kernels take them, who would read past the end of fewer. Hooks on saved tensors may change them."""
    if words.dtype != torch.int32 or words.shape != (word_count(cells),) or words.device != device:
        raise ValueError(
            f"words must be {word_count(cells)} int32 on {device} for {cells} cells, but got {words.dtype} of shape "
            f"{tuple(words.shape)} on {words.device}"
        )
    return words.contiguous()


def apply(x: Tensor, words: Tensor, scale: float, cells_shape: Shape | None) -> Tensor:
    """x under stored bits: kept elements times scale, exactly 0 elsewhere."""
    tag = TAGS.get(x.dtype)
    if tag is None:  # complex: two numbers side by side share a cell
        check_dtype(x)
        y = apply(
            torch.view_as_real(x.resolve_conj()), words, scale, (*(x.shape if cells_shape is None else cells_shape), 1)
        )
        return torch.view_as_complex(y)
    n = x.numel()
    cells = n if cells_shape is None else math.prod(cells_shape)
    whole = words.dtype is torch.int32 and words.numel() == (cells + 31) >> 5 and words.is_contiguous()
    if not whole or not (words.is_cpu if x.is_cpu else words.device == x.device):
        words = _checked(words, cells, x.device)
    if not n:
        return torch.empty_like(x)
    if x.is_cuda:
        if cells_shape is None and x.is_contiguous():
            y = torch.empty_like(x)
            _cuda.apply(tag, x, y, words, n, scale)
            return y
        order = _cuda.memory_order(x)
        if order is None:
            return _like(apply(x.contiguous(), words, scale, cells_shape), x)
        y = torch.empty_like(x)
        _cuda.apply_strided(tag, x, y, order, words, scale, cells_shape)
        return y
    if x.is_contiguous():
        source, y = x, _new_like(x, n)
    else:
        source = y = x.contiguous()
    if cells_shape is None:
        _masked_affine(tag, source, y, 0, words, 0, 1, 1, n, scale)
    else:
        grid = Grid.of(x.shape, cells_shape)
        for start, cell in grid.pieces():
            _masked_affine(tag, source, y, start, words, cell, grid.outer, grid.repeat, grid.inner, scale)
    return y if source is x else _like(y, x)


def check_dtype(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"dropout takes float32, float64, float16, bfloat16, complex64 or complex128, but got {x.dtype}"
        )


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y, which is contiguous, with the strides of an elementwise op's result on x."""
    result = torch.empty_like(x)
    return y if result.stride() == y.stride() else result.copy_(y)


def _masked_affine(
    tag: int,
    x: Tensor,
    y: Tensor,
    start: int,
    words: Tensor,
    position: int,
    outer: int,
    repeat: int,
    inner: int,
    scale: float,
) -> None:
    backend = backends.active()
    if backend is native:
        from_, to, at = x.data_ptr(), y.data_ptr(), words.data_ptr()
        if start:
            from_, to = from_ + start * x.element_size(), to + start * x.element_size()
        threads = torch.get_num_threads()
        if native.masked_affine_at(threads, tag, from_, to, at, position, outer, repeat, inner, scale, 0.0, 0.0):
            raise _refusal()
    else:
        part = slice(start, start + outer * repeat * inner)
        source, target = _array(x).reshape(-1)[part], _array(y).reshape(-1)[part]
        _call(
            backend,
            backend.masked_affine,
            tag,
            source,
            target,
            _words(words),
            position,
            outer,
            repeat,
            inner,
            scale,
            0.0,
            0.0,
        )


def _call(backend: Any, primitive: Any, *arguments: Any) -> None:
    """A primitive of a backend that knows one number of threads for all callers."""
    backend.set_num_threads(min(torch.get_num_threads(), 256))
    try:
        primitive(*arguments)
    finally:
        backend.set_num_threads(backends.get_num_threads())


def _array(x: Tensor) -> Any:
    x = x.detach()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype is torch.bfloat16 else x.numpy()


def _words(words: Tensor) -> Any:
    return words.numpy().view(np.uint32)


def _refusal() -> RuntimeError:
    """Unreachable through the public functions, which check first."""
    return RuntimeError("the C kernel refused its arguments")


hide_from_dynamo(forward, draw, apply)

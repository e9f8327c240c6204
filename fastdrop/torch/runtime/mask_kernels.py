"""Plain tensors in, plain tensors out: the primitives as torch's side of the package calls them.

No autograd, no generator, and no checks but of dtypes and of words, past whose end kernels would read. This module owns
how a CPU tensor's memory reaches a backend: by address where the backend is C, as NumPy views elsewhere, and in logical
order always. Threads are as many as torch's own ops may use. CUDA tensors it hands to `runtime.cuda`.
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

from ... import backends
from ...backends import c as native
from ...core.checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from ...core.grid import Grid, memory_order
from ...core.mask import fill_words, popcount, word_count
from ...core.random import DROP_ALL
from ...core.variants import Blocks
from . import cuda
from .dispatch import hide_from_dynamo, is_lazy, read_address

TAGS = {
    torch.float32: FLOAT32,
    torch.float64: FLOAT64,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
}
DTYPES = frozenset([*TAGS, torch.complex64, torch.complex128])

Shape = tuple[int, ...]
Affine = tuple[float, float, float]  # a, b, c: kept x becomes a x + b, dropped x becomes c

with torch.inference_mode(False):
    _NO_WORDS = torch.empty(0, dtype=torch.int32, device="cpu")  # its `new_empty` costs less than `torch.empty`


# Of this size memory is often new: glibc maps it anew for each tensor from 32 MiB on, and gives back the end of its
# heap, where two results of 16 MiB lie, when they are freed. A page at a time the system takes three times as long to
# provide it as the kernel to fill it: 3.8 ns per element of forward and backward, 0.8 in pages of 2 MiB. NumPy asks for
# those itself.
FRESH_BYTES = 8 << 20
FRESH_FROM = FRESH_BYTES // 8  # no fewer elements take that much
_advise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None


def _new_like(x: Tensor, n: int) -> Tensor:
    """An output for x's n elements, not yet written."""
    y = torch.empty_like(x)
    if n >= FRESH_FROM and x.is_cpu and _advise is not None and (size := n * x.element_size()) >= FRESH_BYTES:
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
    x: Tensor, seed: Any, cut: int, affine: Affine, cells_shape: Shape | None, bits: bool, inplace: bool = False
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
                cuda.forward(tag, x, y, words, n, seed, cut, affine)
                return y, words
            return _forward_by_words(x, seed, cut, affine, None, bits, inplace)
        words = _NO_WORDS.new_empty((n + 31) >> 5) if bits else None
        if x.is_contiguous():
            source, y = x, x if inplace else torch.empty_like(x) if n < FRESH_FROM else _new_like(x, n)
        else:
            source = y = x.contiguous()
        backend = backends.active()
        if backend is native:
            at = 0 if words is None else words.data_ptr()
            threads, to = torch.get_num_threads(), y.data_ptr()
            from_ = read_address(source) if is_lazy(source) else source.data_ptr()
            if native.dropout_forward_at(threads, tag, from_, to, at, 0, n, seed, 0, cut, *affine):
                raise _refusal()
        else:
            keep = None if words is None else _words(words)
            to, from_ = _array(y), _read_array(source)
            _call(backend, backend.dropout_forward, tag, from_, to, keep, 0, n, seed, 0, cut, *affine)
        return y if source is x else _delivered(y, x, source, inplace), words
    check_dtype(x)
    return _forward_by_words(x, seed, cut, affine, cells_shape, bits, inplace)


def forward_each(
    x: Tensor, seeds: list[Any], cut: int, affine: Affine, cells_shape: Shape | None, bits: bool
) -> tuple[Tensor, Tensor | None]:
    """`forward` of each entry of x's first axis with a seed of its own, stacked. ``cells_shape`` is of one entry."""
    tag = TAGS.get(x.dtype)
    n = x[0].numel()
    fits = cells_shape is None and tag is not None and 0 < cut < DROP_ALL and n and x[0].is_contiguous()
    if not fits or not x.is_cpu or backends.active() is not native:
        results = [forward(entry, seed, cut, affine, cells_shape, bits) for entry, seed in zip(x, seeds, strict=True)]
        kept = [words for _, words in results if words is not None]
        return torch.stack([y for y, _ in results]), torch.stack(kept) if bits else None
    y, size, count = x.new_empty(x.shape), x.element_size(), word_count(n)
    words = _NO_WORDS.new_empty((len(seeds), count)) if bits else None
    from_, to, at = read_address(x), y.data_ptr(), 0 if words is None else words.data_ptr()
    threads, step = torch.get_num_threads(), x.stride(0) * size
    for seed in seeds:
        if native.dropout_forward_at(threads, tag, from_, to, at, 0, n, seed, 0, cut, *affine):
            raise _refusal()
        from_, to, at = from_ + step, to + n * size, at + 4 * count * bits
    return y, words


def _source_and_target(x: Tensor, n: int, inplace: bool) -> tuple[Tensor, Tensor]:
    """x in logical order, and where its result goes: over a copy, if x lies in another order."""
    if x.is_contiguous():
        return x, x if inplace else _new_like(x, n)
    copied = x.contiguous()
    return copied, copied


def _delivered(y: Tensor, x: Tensor, source: Tensor, inplace: bool) -> Tensor:
    if source is x:
        return y
    return x.copy_(y) if inplace else _like(y, x)


def _forward_by_words(
    x: Tensor, seed: Any, cut: int, affine: Affine, cells_shape: Shape | None, bits: bool, inplace: bool
) -> tuple[Tensor, Tensor | None]:
    words = draw(x, math.prod(x.shape if cells_shape is None else cells_shape), seed, cut)
    y = apply(x, words, affine, cells_shape, inplace=inplace)
    return y, words if bits else None


def _empty_words(like: Tensor, cells: int) -> Tensor:
    return like.new_empty(word_count(cells), dtype=torch.int32)


def draw(like: Tensor, cells: int, seed: Any, cut: int) -> Tensor:
    """The words of a mask of so many cells, any threshold, where ``like`` is."""
    if like.is_cuda:
        words = _empty_words(like, cells)
        if 0 < cut < DROP_ALL and cells:
            cuda.draw(words, cells, seed, cut)
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


def draw_blocks(like: Tensor, seed: Any, cut: int, plan: Blocks) -> tuple[Tensor, Tensor]:
    """The words of DropBlock's mask, and how many cells they keep: int64 without axes, where ``like`` is."""
    outer, n, inner, block = plan.passes[-1]
    if not outer * (n + block - 1) * inner:
        return like.new_empty(0, dtype=torch.int32), like.new_zeros((), dtype=torch.int64)
    words = draw(like, math.prod(plan.seeds), seed, cut)
    for outer, n, inner, block in plan.passes:
        cells = outer * (n + block - 1) * inner
        if like.is_cuda:
            to = _empty_words(like, cells)
            cuda.dilate(to, words, outer, n, inner, block)
        else:
            to = _NO_WORDS.new_empty(word_count(cells))
            backend = backends.active()
            if backend is native:
                at = to.data_ptr(), words.data_ptr()
                if native.dilate_bits_at(torch.get_num_threads(), *at, outer, n, inner, block):
                    raise _refusal()
            else:
                _call(backend, backend.dilate_bits, _words(to), _words(words), outer, n, inner, block)
        words = to
    if like.is_cuda:
        return words, cuda.count(words)
    return words, torch.tensor(popcount(_words(words)), dtype=torch.int64)


def keep_blocks(x: Tensor, words: Tensor, kept: Tensor, cells_shape: Shape | None, inplace: bool = False) -> Tensor:
    """x under DropBlock's mask: what is kept times cells / cells kept."""
    cells = x.numel() if cells_shape is None else math.prod(cells_shape)
    if kept.dtype is not torch.int64 or kept.numel() != 1 or kept.device != x.device:  # read on a GPU unseen from here
        raise ValueError(
            f"kept must be one int64 on {x.device}, but got {kept.dtype} of shape {tuple(kept.shape)} on {kept.device}"
        )
    if x.is_cuda:
        return apply(x, words, (float(cells), 0.0, 0.0), cells_shape, inplace=inplace, kept=kept)
    count = int(kept.item())
    return apply(x, words, (cells / count if count else 0.0, 0.0, 0.0), cells_shape, inplace=inplace)


def gaussian(x: Tensor, seed: Any, sigma: float, inplace: bool = False) -> Tensor:
    """x times its Gaussian factors."""
    check_real(x, "Gaussian dropout")
    tag = TAGS[x.dtype]
    n = x.numel()
    if not n:
        return x if inplace else torch.empty_like(x)
    source, y = _source_and_target(x, n, inplace)
    if x.is_cuda:
        cuda.gaussian(tag, source, y, n, seed, sigma)
        return _delivered(y, x, source, inplace)
    backend = backends.active()
    if backend is native:
        to, from_ = y.data_ptr(), read_address(source)
        if native.gaussian_multiply_at(torch.get_num_threads(), tag, from_, to, 0, n, seed, 0, sigma):
            raise _refusal()
    else:
        to, from_ = _array(y), _read_array(source)
        _call(backend, backend.gaussian_multiply, tag, from_, to, 0, n, seed, 0, sigma)
    return _delivered(y, x, source, inplace)


def _checked(words: Tensor, cells: int, device: torch.device) -> Tensor:
    """Words as kernels take them, who would read past the end of fewer. Hooks on saved tensors may change them."""
    if words.dtype != torch.int32 or words.shape != (word_count(cells),) or words.device != device:
        raise ValueError(
            f"words must be {word_count(cells)} int32 on {device} for {cells} cells, but got {words.dtype} of shape "
            f"{tuple(words.shape)} on {words.device}"
        )
    return words.contiguous()


def apply(
    x: Tensor,
    words: Tensor,
    affine: Affine,
    cells_shape: Shape | None,
    *,
    inplace: bool = False,
    kept: Tensor | None = None,
) -> Tensor:
    """x under stored bits, to x or a new tensor. ``kept``, on a GPU, divides the scale when the kernel runs."""
    tag = TAGS.get(x.dtype)
    if tag is None:  # complex: two numbers side by side share a cell
        check_dtype(x)
        if affine[1] or affine[2]:
            check_real(x, "alpha dropout")
        pairs = (*(x.shape if cells_shape is None else cells_shape), 1)
        y = torch.view_as_complex(apply(torch.view_as_real(x.resolve_conj()), words, affine, pairs, kept=kept))
        return x.copy_(y) if inplace else y
    n = x.numel()
    cells = n if cells_shape is None else math.prod(cells_shape)
    whole, on_cuda = words.dtype is torch.int32 and words.numel() == (cells + 31) >> 5, x.is_cuda
    if not whole or not words.is_contiguous() or not (words.device == x.device if on_cuda else words.is_cpu):
        words = _checked(words, cells, x.device)
    if not n:
        return x if inplace else torch.empty_like(x)
    if on_cuda:
        if cells_shape is None and x.is_contiguous():
            y = x if inplace else torch.empty_like(x)
            cuda.apply(tag, x, y, words, n, affine, kept)
            return y
        order = memory_order(x.shape, x.stride())
        if order is None:
            y = _like(apply(x.contiguous(), words, affine, cells_shape, kept=kept), x)
            return x.copy_(y) if inplace else y
        y = x if inplace else torch.empty_like(x)
        cuda.apply_strided(tag, x, y, order, words, affine, cells_shape, kept)
        return y
    if cells_shape is None and x.is_contiguous():
        y = x if inplace else torch.empty_like(x) if n < FRESH_FROM else _new_like(x, n)
        _masked_affine(tag, x, y, 0, words, 0, 1, 1, n, affine)
        return y
    shape = tuple(x.shape)
    grid = Grid.in_memory(shape, x.stride(), shape if cells_shape is None else cells_shape)
    source, y = (x, x if inplace else _new_like(x, n)) if grid is not None else _source_and_target(x, n, inplace)
    if grid is None:
        grid = Grid.of(shape, shape if cells_shape is None else cells_shape)
    for start, cell in grid.pieces():
        _masked_affine(tag, source, y, start, words, cell, grid.outer, grid.repeat, grid.inner, affine)
    return _delivered(y, x, source, inplace)


def check_dtype(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"dropout takes float32, float64, float16, bfloat16, complex64 or complex128, but got {x.dtype}"
        )


def check_real(x: Tensor, what: str) -> None:
    check_dtype(x)
    if x.is_complex():
        raise RuntimeError(f"{what} takes real numbers, but got {x.dtype}")


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
    affine: Affine,
) -> None:
    """Elements from ``start`` on, in the order of memory."""
    backend = backends.active()
    if backend is native:
        to = y.data_ptr()
        from_ = read_address(x) if is_lazy(x) else x.data_ptr()
        at = words.data_ptr()
        if start:
            from_, to = from_ + start * x.element_size(), to + start * x.element_size()
        threads = torch.get_num_threads()
        if native.masked_affine_at(threads, tag, from_, to, at, position, outer, repeat, inner, *affine):
            raise _refusal()
    else:
        n = outer * repeat * inner
        flat_x, flat_y = (tensor.as_strided((n,), (1,), tensor.storage_offset() + start) for tensor in (x, y))
        to, from_, bits = _array(flat_y), _read_array(flat_x), _words(words)
        _call(backend, backend.masked_affine, tag, from_, to, bits, position, outer, repeat, inner, *affine)


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


def _read_array(x: Tensor) -> Any:
    """The same for who only reads."""
    if not is_lazy(x):
        return _array(x)
    size, dtype = x.element_size(), _array(x.new_empty(0)).dtype
    reach = 1 + sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True))
    memory: Any = (ctypes.c_char * (reach * size if x.numel() else 0)).from_address(read_address(x))
    return np.ndarray(tuple(x.shape), dtype, memory, strides=[stride * size for stride in x.stride()])


def read_words(words: Tensor) -> Tensor:
    """Words that `apply` may take: it writes to none, but asks for the writing address, which costs it less."""
    if not is_lazy(words) or not words.is_cpu or words.dtype is not torch.int32:
        return words
    return torch.from_numpy(_read_array(words))


def _words(words: Tensor) -> Any:
    return _read_array(words).view(np.uint32).reshape(-1)


def _refusal() -> RuntimeError:
    """Unreachable through the public functions, which check first."""
    return RuntimeError("the C kernel refused its arguments")


hide_from_dynamo(forward, draw, apply, draw_blocks, keep_blocks, gaussian)

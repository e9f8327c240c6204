"""The mask's primitives as the rest of `fastdrop.torch` calls them: tensors in, tensors out.

`ops.mask` and `functional.dropout` call this module once they know that tensors are eager and dense. There is no
autograd here and no generator. The only checks are those of dtypes and of packed words, because a kernel would read
past the end of too few. A mask's cells are numbered in logical order. `runtime.cuda` does the work on CUDA tensors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...backends import c as native
from ...core.grid import Grid, memory_order
from ...core.mask import NOISE_END, popcount, word_count
from ...core.random import DROP_ALL
from ...core.variants import Blocks
from . import cuda, memory
from .dispatch import hide_from_dynamo, is_lazy, read_address
from .dtypes import TAGS, check_dtype, check_real
from .located import Located
from .memory import HUGE_PAGES_FROM, call_with_threads, kernel_error, like_elementwise, mask_words, new_like, new_words

Shape = tuple[int, ...]
Affine = tuple[float, float, float]  # a, b, c: kept x becomes a x + b, dropped x becomes c


def forward(
    x: Tensor,
    seed: Any,
    threshold: int,
    affine: Affine,
    mask_shape: Shape | None,
    store_bits: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Draws a mask and applies it. Returns the result, with the strides that torch would give it, and words or None.

    ``mask_shape`` is None if each element has its own cell. Otherwise it has 1 or the full extent on each axis.
    ``seed`` is an int, a `Located`, or for a CUDA tensor also a tensor on its device.
    """
    tag = TAGS.get(x.dtype)
    n = x.numel()
    on_cuda, contiguous, first, offset, drawn = x.is_cuda, x.is_contiguous(), 0, 0, seed
    if type(seed) is Located:
        seed, offset, first = seed.seed, seed.offset, drawn.first
    own_cells = mask_shape is None and first is not None
    if own_cells and tag is not None and 0 < threshold < DROP_ALL and n and (contiguous or not on_cuda):
        if drawn is not seed:
            drawn.check(n)
        if on_cuda:
            y = x if inplace else torch.empty_like(x)
            words = _empty_words(x, n) if store_bits else None
            cuda.forward(tag, x, y, words, first, n, seed, offset, threshold, affine)
            return y, words
        words = new_words((n + 31) >> 5) if store_bits else None
        if contiguous:
            source, y = x, x if inplace else torch.empty_like(x) if n < HUGE_PAGES_FROM else new_like(x, n)
        else:
            source = y = x.contiguous()
        backend = backends.active()
        if backend is native:
            at = 0 if words is None else words.data_ptr()
            threads, to = torch.get_num_threads(), y.data_ptr()
            from_ = read_address(source) if is_lazy(source) else source.data_ptr()
            if native.dropout_forward_at(threads, tag, from_, to, at, first, n, seed, offset, threshold, *affine):
                raise kernel_error()
        else:
            keep = None if words is None else mask_words(words)
            to, from_, numbers = memory.as_array(y), memory.read_array(source), (first, n, seed, offset, threshold)
            call_with_threads(backend, backend.dropout_forward, tag, from_, to, keep, *numbers, *affine)
        return y if source is x else _delivered(y, x, source, inplace), words
    check_dtype(x)
    words = draw_mask(x, n if mask_shape is None else math.prod(mask_shape), drawn, threshold)
    return apply(x, words, affine, mask_shape, inplace=inplace), words if store_bits else None


def forward_each(
    x: Tensor, seeds: list[Any], threshold: int, affine: Affine, mask_shape: Shape | None, store_bits: bool
) -> tuple[Tensor, Tensor | None]:
    """`forward` of each entry of x's first axis with its own seed, stacked. ``mask_shape`` is that of one entry."""
    tag = TAGS.get(x.dtype)
    n = x[0].numel()
    fits = mask_shape is None and tag is not None and 0 < threshold < DROP_ALL and n and x[0].is_contiguous()
    if not fits or not x.is_cpu or backends.active() is not native or any(type(seed) is Located for seed in seeds):
        results = [
            forward(entry, seed, threshold, affine, mask_shape, store_bits)
            for entry, seed in zip(x, seeds, strict=True)
        ]
        masks = [words for _, words in results if words is not None]
        return torch.stack([y for y, _ in results]), torch.stack(masks) if store_bits else None
    y, size, count = x.new_empty(x.shape), x.element_size(), word_count(n)
    words = new_words((len(seeds), count)) if store_bits else None
    from_, to, at = read_address(x), y.data_ptr(), 0 if words is None else words.data_ptr()
    threads, step = torch.get_num_threads(), x.stride(0) * size
    for seed in seeds:
        if native.dropout_forward_at(threads, tag, from_, to, at, 0, n, seed, 0, threshold, *affine):
            raise kernel_error()
        from_, to, at = from_ + step, to + n * size, at + 4 * count * store_bits
    return y, words


def _source_and_target(x: Tensor, n: int, inplace: bool) -> tuple[Tensor, Tensor]:
    """x in logical order, and the tensor for its result: if x had to be copied, the result goes over the copy."""
    if x.is_contiguous():
        return x, x if inplace else new_like(x, n)
    copied = x.contiguous()
    return copied, copied


def _delivered(y: Tensor, x: Tensor, source: Tensor, inplace: bool) -> Tensor:
    if source is x:
        return y
    return x.copy_(y) if inplace else like_elementwise(y, x)


def _empty_words(like: Tensor, cells: int) -> Tensor:
    """Words on the device of ``like``, not yet written."""
    return like.new_empty(word_count(cells), dtype=torch.int32) if like.is_cuda else new_words(word_count(cells))


def draw_mask(like: Tensor, cells: int, seed: Any, threshold: int) -> Tensor:
    """The words of a mask of ``cells`` cells, on the device of ``like``, for any threshold."""
    words = _empty_words(like, cells)
    if type(seed) is Located:
        seed.check(cells)
    if not cells:
        return words
    if not 0 < threshold < DROP_ALL:
        words.fill_(0 if threshold else -1)
        if not threshold and cells & 31:
            words[-1].fill_((1 << (cells & 31)) - 1)
    elif type(seed) is not Located:
        _draw("draw_bits", words, 0, 0, cells, seed, 0, threshold)
    elif seed.runs is None:
        _draw("draw_bits", words, 0, 0, cells, *seed[:2], threshold)
    else:
        for run in seed.runs:
            if run.cells:
                primitive, numbers = run.draw
                _draw(primitive, words, *numbers, *seed[:2], threshold)
    return words


def draw_rows(
    words: Tensor,
    first: int,
    outer: int,
    rows: int,
    columns: int,
    pitches: tuple[int, int],
    draw: tuple[int, int, int],
) -> None:
    """Bits ``[outer, rows, columns]`` on the CPU, of the cells ``first + o * pitches[0] + r * pitches[1] + c``.

    ``draw`` is the seed, the offset and the threshold, which may be any.
    """
    if not 0 < draw[2] < DROP_ALL:
        words.fill_(0 if draw[2] else -1)
        return
    _draw("draw_rows", words, 0, first, outer, pitches[0], rows, pitches[1], columns, *draw)


def _draw(primitive: str, words: Tensor, *numbers: Any) -> None:
    """Runs one of the primitives that write words."""
    if words.is_cuda:
        cuda.draw(primitive, words, *numbers)
    elif (backend := backends.active()) is not native:
        call_with_threads(backend, getattr(backend, primitive), mask_words(words), *numbers)
    elif getattr(native, primitive + "_at")(torch.get_num_threads(), words.data_ptr(), *numbers):
        raise kernel_error()


def draw_blocks(like: Tensor, seed: Any, threshold: int, plan: Blocks) -> tuple[Tensor, Tensor]:
    """The words of DropBlock's mask, and the number of cells it keeps as an int64 tensor, on the device of ``like``."""
    outer, n, inner, block = plan.passes[-1]
    if not outer * (n + block - 1) * inner:
        return like.new_empty(0, dtype=torch.int32), like.new_zeros((), dtype=torch.int64)
    words = draw_mask(like, math.prod(plan.seeds), seed, threshold)
    for outer, n, inner, block in plan.passes:
        cells = outer * (n + block - 1) * inner
        to, extents = _empty_words(like, cells), (outer, n, inner, block)
        if like.is_cuda:
            cuda.dilate(to, words, *extents)
        elif (backend := backends.active()) is native:
            if native.dilate_bits_at(torch.get_num_threads(), to.data_ptr(), words.data_ptr(), *extents):
                raise kernel_error()
        else:
            call_with_threads(backend, backend.dilate_bits, mask_words(to), mask_words(words), *extents)
        words = to
    if like.is_cuda:
        return words, cuda.count(words)
    return words, torch.tensor(popcount(mask_words(words)), dtype=torch.int64)


def keep_blocks(
    x: Tensor,
    words: Tensor,
    kept_count: Tensor,
    mask_shape: Shape | None,
    whole_cells: float = 0.0,
    inplace: bool = False,
) -> Tensor:
    """x under DropBlock's mask. What is kept is multiplied by cells / cells kept, both of the whole mask."""
    cells = whole_cells or float(x.numel() if mask_shape is None else math.prod(mask_shape))
    if kept_count.dtype is not torch.int64 or kept_count.numel() != 1 or kept_count.device != x.device:
        raise ValueError(  # a GPU reads the number when the kernel runs, so it cannot be checked then
            f"kept_count must be one int64 on {x.device}, but got {kept_count.dtype} of shape "
            f"{tuple(kept_count.shape)} on {kept_count.device}"
        )
    if x.is_cuda:
        return apply(x, words, (cells, 0.0, 0.0), mask_shape, inplace=inplace, kept_count=kept_count)
    count = int(kept_count.item())
    return apply(x, words, (cells / count if count else 0.0, 0.0, 0.0), mask_shape, inplace=inplace)


def gaussian(x: Tensor, seed: Any, sigma: float, inplace: bool = False) -> Tensor:
    """x times its Gaussian factors."""
    check_real(x, "Gaussian dropout")
    n = x.numel()
    drawn = seed if type(seed) is Located else Located(seed)
    if drawn.runs is not None:
        drawn.check(n)
        if (end := max((run.end for run in drawn.runs if run.cells), default=0)) > NOISE_END:
            raise ValueError(f"part must have cells below 2**61 for noise, but has some up to {end}")
    if not n:
        return x if inplace else torch.empty_like(x)
    source, y = _source_and_target(x, n, inplace)
    if drawn.runs is None:
        _multiply(source, y, 0, 0, n, drawn, sigma)
    else:
        for run in drawn.runs:
            for start, first, columns in run.each_row():  # the primitive knows consecutive cells
                _multiply(source, y, start, first, columns, drawn, sigma)
    return _delivered(y, x, source, inplace)


def _multiply(x: Tensor, y: Tensor, start: int, first: int, n: int, drawn: Located, sigma: float) -> None:
    """Elements from ``start`` on times the factors of the cells from ``first`` on. x and y are contiguous."""
    tag, numbers = TAGS[x.dtype], (first, n, drawn.seed, drawn.offset, sigma)
    backend, on_cuda = backends.active(), x.is_cuda
    if on_cuda or backend is native:
        skip = start * x.element_size()
        if on_cuda:
            cuda.gaussian(tag, x, y, skip, *numbers)
            return
        to, from_ = y.data_ptr() + skip, read_address(x) + skip
        if native.gaussian_multiply_at(torch.get_num_threads(), tag, from_, to, *numbers):
            raise kernel_error()
    else:
        to, from_ = (array.reshape(-1)[start : start + n] for array in (memory.as_array(y), memory.read_array(x)))
        call_with_threads(backend, backend.gaussian_multiply, tag, from_, to, *numbers)


def apply(
    x: Tensor,
    words: Tensor,
    affine: Affine,
    mask_shape: Shape | None,
    *,
    inplace: bool = False,
    kept_count: Tensor | None = None,
) -> Tensor:
    """x under a packed mask. ``kept_count`` is for a GPU: the kernel divides the scale by it."""
    tag = TAGS.get(x.dtype)
    if tag is None:  # complex: real and imaginary part share a cell
        check_dtype(x)
        if affine[1] or affine[2]:
            check_real(x, "alpha dropout")
        pairs = (*(x.shape if mask_shape is None else mask_shape), 1)
        y = torch.view_as_complex(
            apply(torch.view_as_real(x.resolve_conj()), words, affine, pairs, kept_count=kept_count)
        )
        return x.copy_(y) if inplace else y
    n = x.numel()
    cells = n if mask_shape is None else math.prod(mask_shape)
    whole, on_cuda = words.dtype is torch.int32 and words.numel() == (cells + 31) >> 5, x.is_cuda
    if not whole or not words.is_contiguous() or not (words.device == x.device if on_cuda else words.is_cpu):
        words = memory.check_words(words, cells, x.device)
    if not n:
        return x if inplace else torch.empty_like(x)
    if on_cuda:
        if mask_shape is None and x.is_contiguous():
            y = x if inplace else torch.empty_like(x)
            cuda.apply(tag, x, y, words, n, affine, kept_count)
            return y
        order = memory_order(x.shape, x.stride())
        if order is None:
            y = like_elementwise(apply(x.contiguous(), words, affine, mask_shape, kept_count=kept_count), x)
            return x.copy_(y) if inplace else y
        y = x if inplace else torch.empty_like(x)
        cuda.apply_strided(tag, x, y, order, words, affine, mask_shape, kept_count)
        return y
    if mask_shape is None and x.is_contiguous():
        y = x if inplace else torch.empty_like(x) if n < HUGE_PAGES_FROM else new_like(x, n)
        _masked_affine(tag, x, y, words, affine, (1, 1, n))
        return y
    shape = tuple(x.shape)
    grid = Grid.in_memory(shape, x.stride(), shape if mask_shape is None else mask_shape)
    source, y = (x, x if inplace else new_like(x, n)) if grid is not None else _source_and_target(x, n, inplace)
    if grid is None:
        grid = Grid.of(shape, shape if mask_shape is None else mask_shape)
    for start, cell in grid.pieces():
        _masked_affine(tag, source, y, words, affine, (grid.outer, grid.repeat, grid.inner), start, cell)
    return _delivered(y, x, source, inplace)


def _masked_affine(
    tag: int,
    x: Tensor,
    y: Tensor,
    words: Tensor,
    affine: Affine,
    extents: tuple[int, int, int],
    start: int = 0,
    first_cell: int = 0,
) -> None:
    """Applies a mask to elements ``[outer, repeat, inner]`` from ``start`` on, in the order of memory."""
    backend = backends.active()
    if backend is native:
        to = y.data_ptr()
        from_ = read_address(x) if is_lazy(x) else x.data_ptr()
        at = words.data_ptr()
        if start:
            from_, to = from_ + start * x.element_size(), to + start * x.element_size()
        threads = torch.get_num_threads()
        if native.masked_affine_at(threads, tag, from_, to, at, first_cell, *extents, *affine):
            raise kernel_error()
    else:
        n = math.prod(extents)
        flat_x, flat_y = (tensor.as_strided((n,), (1,), tensor.storage_offset() + start) for tensor in (x, y))
        to, from_, bits = memory.as_array(flat_y), memory.read_array(flat_x), mask_words(words)
        call_with_threads(backend, backend.masked_affine, tag, from_, to, bits, first_cell, *extents, *affine)


def read_words(words: Tensor) -> Tensor:
    """Words that `apply` may take. It writes to none, but asks for the address for writing, because that costs less."""
    if not is_lazy(words) or not words.is_cpu or words.dtype is not torch.int32:
        return words
    return torch.from_numpy(memory.read_array(words))


hide_from_dynamo(forward, draw_mask, apply, draw_blocks, keep_blocks, gaussian)

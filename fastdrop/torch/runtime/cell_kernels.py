"""The kept rows and columns of a matrix, by the primitives of `backends`: tensors in, tensors out.

`functional.batchwise` calls this module. What the primitives do not take (tensors that are not eager and dense, not on
the CPU, complex or not contiguous; nothing kept; whole rows) goes by torch's own ops, which have gradients and work
under transforms. So do indices that hooks on saved tensors have changed, because torch's ops check them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import backends
from ...backends import c as native
from . import memory
from .dispatch import hide_from_dynamo, is_eager_dense, read_address
from .dtypes import TAGS

Index = Tensor | None  # int64, ascending, on the matrix's device; None: all


def gather(x: Tensor, rows: Index, columns: Index) -> Tensor:
    """``x[rows][:, columns]``"""
    if columns is None or not _has_kernel(x, rows, columns):
        x = x if rows is None else x.index_select(0, rows)
        return x if columns is None else x.index_select(1, columns)
    rows = _all(x.shape[0]) if rows is None else rows
    return _run("gather_cells", x, (rows.shape[0], columns.shape[0]), rows, columns, x.shape)


def scatter(x: Tensor, rows: Index, columns: Index, shape: tuple[int, int]) -> Tensor:
    """A matrix of that shape, which is x at these rows and columns and 0 elsewhere: the gradient of `gather`."""
    if columns is None or not _has_kernel(x, rows, columns) or not _fits(x, rows, columns, shape[0]):
        if columns is not None:
            x = x.new_zeros(x.shape[0], shape[1]).index_copy(1, columns, x)
        return x if rows is None else x.new_zeros(shape).index_copy(0, rows, x)
    rows = _all(shape[0]) if rows is None else rows
    return _run("scatter_cells", x, shape, rows, columns, shape)


def _has_kernel(x: Tensor, rows: Index, columns: Tensor) -> bool:
    some = x.numel() and all(index is None or (_is_index(index) and index.shape[0]) for index in (rows, columns))
    return bool(some and x.is_cpu and x.dtype in TAGS and is_eager_dense(x) and x.is_contiguous())


def _is_index(index: Tensor) -> bool:
    return index.dtype is torch.int64 and index.dim() == 1 and index.is_cpu and index.is_contiguous()


def _fits(x: Tensor, rows: Index, columns: Tensor, height: int) -> bool:
    """Whether x has an element for each of these rows and columns. A kernel would read past the end of fewer."""
    return x.shape == (height if rows is None else rows.shape[0], columns.shape[0])


@functools.lru_cache(maxsize=64)
def _all(n: int) -> Tensor:
    """The index of all rows, which nobody writes to."""
    with torch.inference_mode(False):
        return torch.arange(n, device="cpu")


def _run(
    primitive: str, x: Tensor, shape: tuple[int, int], rows: Tensor, columns: Tensor, whole: tuple[int, ...]
) -> Tensor:
    """The result, of a shape. ``whole`` is the shape of the matrix that rows and columns are those of."""
    y = memory.in_large_pages(x.new_empty(shape), shape[0] * shape[1])
    tag, extents = TAGS[x.dtype], (rows.shape[0], columns.shape[0], *whole)
    backend = backends.active()
    if backend is native:
        at = read_address(x), y.data_ptr(), rows.data_ptr(), columns.data_ptr()
        if getattr(native, f"{primitive}_at")(torch.get_num_threads(), tag, *at, *extents):
            raise memory.kernel_error()
    else:
        index = rows.numpy(), columns.numpy()
        arrays = memory.read_array(x), memory.as_array(y), *index
        memory.call_with_threads(backend, getattr(backend, primitive), tag, *arrays, *extents)
    return y


hide_from_dynamo(gather, scatter)

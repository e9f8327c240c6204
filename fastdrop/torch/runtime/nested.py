"""Dropout of nested tensors, jagged and strided, by the dense tensor of their elements.

`functional.routing` and `functional.fused` come here with a function of dense tensors. It is called on ``x.values()``,
and its result gets x's structure. So a mask's bits are numbered by position in ``x.values()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch.tensors import jagged_like, ragged_axis, sample_sizes, strided_like

RAGGED = -1  # in place of an extent that differs between samples


def shape_of(x: Any) -> tuple[Any, ...]:
    """x's shape, with `RAGGED` for axes along which samples differ."""
    if not x.is_nested:
        return tuple(x.shape)
    if x.layout is torch.jagged:
        ragged = ragged_axis(x)
        return tuple(RAGGED if axis == ragged else extent for axis, extent in enumerate(x.shape))
    sizes = sample_sizes(x)
    extents = [int(column[0]) if bool((column == column[0]).all()) else RAGGED for column in sizes.unbind(1)]
    return (len(sizes), *extents)


def refuse(x: Tensor, what: str) -> None:
    if x.is_nested:
        raise RuntimeError(f"{what} takes dense tensors, but got a nested one: call it on each of x.unbind()")


def write(x: Tensor, y: Tensor) -> Tensor:
    """Writes y to x, for dropout in place."""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("a nested tensor that requires grad can't be dropped in place: give inplace=False")
    return x.copy_(y)


def check_dense(*tensors: Tensor | None) -> None:
    """Raises if a tensor has a layout without an element for each index."""
    for x in tensors:
        if x is not None and x.layout is not torch.strided and not x.is_nested:
            raise RuntimeError(
                f"dropout takes dense tensors, but got one of layout {x.layout}: give x.to_dense(), or its values()"
            )


def on_values(function: Callable[..., Any], *tensors: Tensor | None, columns: bool = False) -> Any:
    """Calls a function of dense tensors on the values of nested ones. ``columns`` says that it needs the last axis.

    The first tensor is nested. Each other is nested with the same structure, a vector of columns, or None. The results,
    one or several, get the first's structure.
    """
    first = tensors[0]
    assert first is not None
    width = shape_of(first)[-1] if columns else None
    if width == RAGGED:
        raise RuntimeError("the last axis of a nested tensor is ragged here: call it on each of x.unbind()")
    values = []
    for x in tensors:
        if x is not None and x.is_nested:
            if not _alike(x, first):
                raise ValueError(
                    "nested tensors given together must have one structure and, if jagged, the same offsets"
                )
            x = _values(x)
            x = x if width is None or x.dim() > 1 else x.reshape(-1, width)
        elif x is not None and x.dim() > 1:
            raise ValueError("a tensor beside a nested one must be nested too, or a vector of columns")
        values.append(x)
    results = function(*values)
    if isinstance(results, Tensor):
        return _nested_like(results, first)
    return tuple(_nested_like(result, first) for result in results)


def is_full(cells: Any, extent: Any) -> bool:
    """Whether a mask has a cell for each index of an axis. None means that it has."""
    return cells is None or not isinstance(cells, int) or cells == extent


def drop(x: Tensor, mask_shape: Sequence[Any] | None, scaling: str, call: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """``call(values, mask_shape of the values)`` of nested x. ``mask_shape`` has 1 or the full extent on each axis.

    If a whole sample shares its decisions along the ragged axis, they are those of a dense tensor of extent 1 there.
    """
    values = _values(x)
    if mask_shape is None:
        return _nested_like(call(values, None), x)
    shape = shape_of(x)
    if len(mask_shape) != len(shape):
        raise ValueError(f"noise_shape must have one entry per axis of x, which has {len(shape)}, but got {mask_shape}")
    full = [is_full(cells, extent) for cells, extent in zip(mask_shape, shape, strict=True)]
    for cells, fits in zip(mask_shape, full, strict=True):
        if not fits and cells != 1:
            raise ValueError(f"noise_shape must be 1, None or the full extent on each axis of x, but got {mask_shape}")
    if all(full):
        return _nested_like(call(values, None), x)
    if x.layout is torch.jagged:
        axis = ragged_axis(x)
    elif RAGGED not in shape[2:]:
        axis, values = 1, values.reshape(-1, *shape[2:])
    else:
        raise RuntimeError(
            "decisions that elements share need one ragged axis, the first after the samples', in a strided nested "
            "tensor: give one of layout torch.jagged, or call it on each of x.unbind()"
        )
    packed = axis - 1  # the values' axis along which samples follow one another
    of_values = [extent if keep else 1 for extent, keep in zip(values.shape, full[1:], strict=True)]
    if full[0] == full[axis] or shape[0] == 1:
        of_values[packed] = values.shape[packed] if full[axis] else 1
        return _nested_like(call(values, tuple(of_values)), x)
    if full[axis]:
        raise RuntimeError("samples of a nested tensor have no positions in common, by which to share a decision")
    if scaling == "alpha":
        raise RuntimeError(
            "alpha dropout of nested tensors can't drop a ragged axis whole: call it on each of x.unbind()"
        )
    return _nested_like(_by_sample(x, values, packed, of_values, call), x)


def _by_sample(
    x: Any, values: Tensor, packed: int, mask_shape: list[Any], call: Callable[[Tensor, Any], Tensor]
) -> Tensor:
    """One decision per sample along ``packed``, the values' axis on which samples follow one another."""
    strided = x.layout is not torch.jagged
    ends = sample_sizes(x)[:, 0].cumsum(0).to(values.device) if strided else x.offsets()[1:]
    wide = torch.float64 if values.dtype in (torch.float64, torch.complex128) else torch.float32
    factors = call(torch.ones((x.size(0), *mask_shape), dtype=wide, device=values.device), None)
    rows = torch.arange(values.shape[packed], device=values.device)
    # Values behind the last end belong to no sample.
    sample = torch.bucketize(rows, ends, right=True).clamp(max=x.size(0) - 1)
    factors = factors.index_select(0, sample).squeeze(1 + packed).movedim(0, packed)
    scaled = values * factors  # in the wider of their dtypes
    return torch.where(factors == 0.0, torch.zeros_like(scaled), scaled).to(values.dtype)


# ---- structure ----


def _values(x: Tensor) -> Tensor:
    if x.layout is not torch.jagged and not x.is_contiguous():
        x = x.contiguous()
    return x.values()


def _nested_like(values: Tensor, x: Any) -> Tensor:
    """A nested tensor of these values, with x's structure."""
    if x.layout is torch.jagged:
        return jagged_like(values, x)
    return strided_like(values, x if x.is_contiguous() else x.contiguous())


def _alike(x: Any, y: Any) -> bool:
    if x.layout is not y.layout:
        return False
    if x.layout is torch.jagged:
        return bool(x.shape == y.shape)  # a ragged extent is equal to itself alone, by its offsets
    return torch.equal(sample_sizes(x), sample_sizes(y))

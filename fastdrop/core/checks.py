"""Validation of user input: all of it is here.

The NumPy face, the torch face and the schedules call these functions before they write or draw anything. A function
returns the checked value or raises; the message names the argument, what it was given and what is allowed.
"""

from __future__ import annotations

import itertools
import math
import numbers
import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

UINT64_END = 1 << 64
CHILDREN_END = 1 << 59  # a child's number uses the counter bits that the domain leaves free

# The numbers by which kernels know a dtype; csrc/fastdrop.h has the same.
FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)
BOOL = 4  # attention masks alone

ALLOWED = "float32, float64, float16, bfloat16 (ml_dtypes)"
SCALINGS = ("inverted", "standard")
DEPTH_MODES = ("batch", "row")
STORES = ("bits", "seed")
# Steps that NumPy may take to compare interleaved views; views that need more count as overlapping.
EXACT_OVERLAP_WORK = 10_000

# The tag of each dtype that was found valid; bfloat16 is added when it is first used.
_tags: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): FLOAT32,
    np.dtype(np.float64): FLOAT64,
    np.dtype(np.float16): FLOAT16,
}


def as_array(name: str, value: Any) -> tuple[Array, int]:
    """The value as a plain ndarray, and its dtype's tag."""
    array: Array = value if type(value) is np.ndarray else as_ndarray(name, value)
    tag = _tags.get(array.dtype)
    return array, dtype_tag(name, array.dtype) if tag is None else tag


def as_ndarray(name: str, value: Any) -> Array:
    """The value as an instance of ndarray itself; an instance of a subclass becomes a view.

    Subclasses may give shapes and indices another meaning: np.matrix always has two axes.
    """
    # Compared by name, because an import would fail at the interpreter's exit.
    if any(kind.__name__ == "MaskedArray" and kind.__module__.startswith("numpy.ma") for kind in type(value).__mro__):
        raise TypeError(f"{name} must not be a masked array, whose mask would be lost: give its data or filled() array")
    if hasattr(value, "todense") and not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a dense array, but got a sparse {type(value).__name__}: make it dense first")
    return np.asarray(value)


def dtype_tag(name: str, dtype: np.dtype[Any]) -> int:
    tag = _tags.get(dtype)
    if tag is None:
        if dtype.name != "bfloat16" or dtype.itemsize != 2 or not dtype.isnative:
            raise TypeError(f"{name} must have dtype {ALLOWED}, but got {dtype}")
        tag = _tags[dtype] = BFLOAT16
    return tag


def probability(p: Any) -> float:
    """p as a Python float in [0, 1]."""
    if type(p) is not float:
        p = number("p", p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p, the drop probability, must be between 0 and 1, but got {p}")
    return float(p)


def dropout_probability(p: float, given: Any = None, what: str = "dropout probability") -> float:
    """p, if it is from 0 to 1. The error has the words of torch or torchvision."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{what} has to be between 0 and 1, but got {p if given is None else given}")
    return p


def gaussian_probability(p: Any) -> float:
    """p as a Python float in [0, 1): at 1 the noise would be infinite."""
    number = probability(p)
    if number == 1.0:
        raise ValueError(f"p must be below 1 for Gaussian dropout, whose variance is p / (1 - p), but got {p}")
    return number


def number(name: str, given: Any) -> float:
    value = given
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, numbers.Real) and not isinstance(value, np.number):
        raise TypeError(f"{name} must be a number, but got {type(value).__name__}")
    if isinstance(value, (bool, np.bool_, np.complexfloating)):
        raise TypeError(f"{name} must be a real number, but got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if given > 0 else -math.inf


def finite(name: str, value: Any) -> float:
    result = number(name, value)
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite, but got {result}")
    return result


def between(name: str, value: Any, low: float, high: float) -> float:
    result = number(name, value)
    if not low <= result <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, but got {result}")
    return result


def number_from(name: str, value: Any, low: float) -> float:
    result = finite(name, value)
    if result < low:
        raise ValueError(f"{name} must be at least {low:g}, but got {result:g}")
    return result


def integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, but got {type(value).__name__}")
    return operator.index(value)  # unlike int, a constant to torch's compiler


def uint64(name: str, value: Any) -> int:
    number: int = value if type(value) is int else integer(name, value)
    if not 0 <= number < UINT64_END:
        raise ValueError(f"{name} must be from 0 to 2**64 - 1, but got {number}")
    return number


def child_count(name: str, value: Any, before: int = 0) -> int:
    """The number of children that a stream has after it spawns ``value`` more."""
    count = uint64(name, value)
    if before + count > CHILDREN_END:
        raise ValueError(f"{name} must be at most {CHILDREN_END - before}, as children are numbered, but got {count}")
    return before + count


def choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but got {value!r}")


def scaling(value: str) -> str:
    """A scaling that callers may choose."""
    if value != "inverted":
        choice("scaling", value, SCALINGS)
    return value


def random_state_error(rng: Any) -> TypeError:
    return TypeError(
        f"rng must be None, an int seed, a fastdrop.Stream or a numpy.random.Generator, but got {type(rng).__name__}"
    )


def shape(name: str, value: Any) -> tuple[int, ...]:
    axes = (value,) if isinstance(value, (int, np.integer)) else value
    try:
        extents = tuple(operator.index(axis) for axis in axes)  # unlike int, a constant to torch's compiler
    except TypeError:
        raise TypeError(f"{name} must be an int or a tuple of ints, but got {value!r}") from None
    if any(extent < 0 for extent in extents):
        raise ValueError(f"{name} must not have negative extents, but got {value!r}")
    return extents


def noise_shape(value: Any, full: tuple[int, ...], of: str = "x") -> tuple[int, ...]:
    """noise_shape with None replaced by the extent: 1 or the extent on each axis."""
    if value is None:
        return full
    axes = noise_shape_entries(value)
    if len(axes) != len(full):
        raise ValueError(f"noise_shape must have one entry per axis of {of}, whose shape is {full}, but got {value!r}")
    cells = tuple(e if a is None else operator.index(a) for a, e in zip(axes, full, strict=True))
    if any(c not in (1, e) for c, e in zip(cells, full, strict=True)):
        raise ValueError(
            f"noise_shape must be 1, None or the full extent on each axis of {of}, whose shape is {full}, but got "
            f"{value!r}"
        )
    return cells


def noise_shape_entries(value: Any) -> tuple[int | None, ...]:
    """noise_shape as far as it can be checked without an array."""
    try:
        axes = tuple(value)
    except TypeError:
        raise TypeError(f"noise_shape must be None or a tuple of ints and None, but got {value!r}") from None
    shape("noise_shape", tuple(1 if a is None else a for a in axes))
    return axes


def axis(name: str, value: Any, ndim: int) -> int:
    """The axis as a number from 0."""
    number = integer(name, value)
    if not -ndim <= number < ndim:
        raise ValueError(f"{name} must be an axis of x, which has {ndim}, but got {value}")
    return number % ndim


def at_least(name: str, ndim: int, least: int, what: str) -> None:
    if ndim < least:
        raise ValueError(f"{name} must have {what}, but got {ndim} {'axis' if ndim == 1 else 'axes'}")


def block_size(value: Any, axes: int) -> tuple[int, ...]:
    """The extents of DropBlock's blocks; one number means the same extent on each axis."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"block_size must be an int or a tuple of ints, but got {value!r}")
    extents = shape("block_size", value)
    if isinstance(value, (int, np.integer)):
        extents *= axes
    if len(extents) != axes or not all(extents):
        raise ValueError(
            f"block_size must be a positive int or one for each of the {axes} spatial axes, but got {value!r}"
        )
    return extents


def fits(name: str, value: Any, of: str, shape: tuple[int, ...], *dtypes: np.dtype[Any]) -> None:
    """Raises unless an array has the shape of another (``of``) and one of the dtypes. The first is the other's own."""
    if value.dtype not in dtypes:
        others = "".join(f", or {dtype}" for dtype in dtypes[1:])
        raise TypeError(f"{name} must have {of}'s dtype, {dtypes[0]}{others}, but got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name} must have {of}'s shape, {shape}, as nothing is broadcast, but got {tuple(value.shape)}"
        )


def per_column(name: str, shape: tuple[int, ...], of: str, columns: int) -> None:
    if shape != (columns,):
        raise ValueError(f"{name} must have an element for each column of {of}, shape {(columns,)}, but got {shape}")


def broadcasts(name: str, shape: tuple[int, ...], of: str, full: tuple[int, ...]) -> None:
    aligned = zip(reversed(shape), reversed(full), strict=False)
    if len(shape) > len(full) or any(extent not in (1, whole) for extent, whole in aligned):
        raise ValueError(f"{name} must broadcast to the shape of {of}, {full}, but got {shape}")


def check_same_memory(name: str, on_gpu: bool, of: str, of_on_gpu: bool) -> None:
    """Raises unless two arrays lie both in the host's memory or both on a GPU."""
    if on_gpu != of_on_gpu:
        there, here = ("on a GPU", "in memory") if of_on_gpu else ("in memory", "on a GPU")
        raise TypeError(f"{name} must be {there}, as {of} is, but got one {here}")


def check_spatial_axes(name: str, ndim: int) -> None:
    if not 3 <= ndim <= 5:
        raise ValueError(f"{name} must have the axes (N, C, *) with one to three spatial ones, but got {ndim} axes")


def check_mask_shape(name: str, data_shape: tuple[int, ...], mask_shape: tuple[int, ...], shared: bool = True) -> None:
    """Raises unless each extent of the mask is the data's or, if decisions may be shared, 1."""
    extents = zip(mask_shape, data_shape, strict=False)
    if len(data_shape) != len(mask_shape) or any(m != d and not (shared and m == 1) for m, d in extents):
        got = ", or 1 on axes that share a decision, but got a mask" if shared else ", but got noise"
        raise ValueError(f"mask must have the shape of {name}, {data_shape}{got} of shape {mask_shape}")


def first_cell(value: Any, cells: int) -> int:
    if cells > UINT64_END:
        raise ValueError(f"shape must have at most 2**64 cells, but got {cells}")
    first = uint64("first_cell", value)
    if first + cells > UINT64_END:
        raise ValueError(f"first_cell must be at most 2**64 less the mask's {cells} cells, but got {first}")
    return first


def words(value: Any, cells: int, count: int) -> NDArray[np.uint32]:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint32:
        raise TypeError(f"words must be an array of uint32, but got {getattr(value, 'dtype', type(value).__name__)}")
    array: NDArray[np.uint32] = as_ndarray("words", value)
    if array.shape != (count,) or not array.flags.c_contiguous:
        raise ValueError(f"words must be {count} contiguous words for {cells} cells, but got shape {array.shape}")
    if cells & 31 and int(array[-1]) >> (cells & 31):
        raise ValueError(f"words must have 0 in the unused bits past cell {cells}, but got {int(array[-1]):#010x}")
    return array


def keep_flags(keep: ArrayLike) -> NDArray[np.bool_]:
    flags = as_ndarray("keep", keep)
    if flags.dtype != np.bool_:
        raise TypeError(f"keep must be boolean, True = keep, but got dtype {flags.dtype}")
    return flags


def check_nothing_kept(name: str, bits: Array, scale: float) -> None:
    """Raises if the scale is 0 and something is kept: p = 1 has no scale."""
    if scale == 0.0 and bits.any():
        raise ValueError(f"p = 1 drops everything, but {name} would keep something")


def output_array(out: Any, x: Array, name: str) -> Array:
    """``out`` as a plain ndarray, if it can hold the result for x; a new array like x if ``out`` is None."""
    if out is None:
        return np.empty_like(x)
    in_place: bool = out is x
    if in_place and x.flags.writeable and x.flags.forc:
        return x
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an ndarray, but got {type(out).__name__}")
    result = as_ndarray("out", out)
    check_output(result, x, name, result.flags.writeable)
    check_no_overlap(result, x, name)
    if not result.flags.forc and _overlaps_itself(result):
        raise ValueError(
            f"out must not have elements that overlap one another, but got strides {result.strides} for shape "
            f"{result.shape}"
        )
    return result


def check_no_overlap(out: Array, x: Array, name: str) -> None:
    """Raises if the arrays share memory, unless they are the same elements."""
    own = out.flags.owndata and x.flags.owndata  # then there is no need to compare addresses
    if not own and np.may_share_memory(out, x) and not _same_elements(out, x) and _overlap(out, x):
        raise overlap_error(name)


def check_output(out: Any, x: Any, name: str, writeable: bool) -> None:
    """Raises unless ``out`` is writeable and has the dtype and shape of x."""
    if out.dtype != x.dtype:
        raise TypeError(f"out must have {name}'s dtype, {x.dtype}, but got {out.dtype}")
    if out.shape != x.shape:
        raise ValueError(f"out must have {name}'s shape, {x.shape}, but got {out.shape}")
    if not writeable:
        raise ValueError("out must be writeable, but got a read-only array")


def overlap_error(name: str) -> ValueError:
    return ValueError(f"out must be {name} itself or not share memory with it, but got one that overlaps in part")


def _same_elements(a: Array, b: Array) -> bool:
    same_start: bool = a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    return same_start and a.dtype == b.dtype and a.shape == b.shape and _axes(a) == _axes(b)


def _axes(array: Array) -> list[tuple[int, int]]:
    """(stride, extent) of the axes that have more than one element."""
    return [(stride, extent) for stride, extent in zip(array.strides, array.shape, strict=True) if extent > 1]


def _overlaps_itself(array: Array) -> bool:
    """Whether any two elements share a byte."""
    axes = sorted((abs(step), extent) for step, extent in _axes(array))
    reach = array.itemsize  # the span in bytes of the elements along the axes so far
    nested = True
    for step, extent in axes:
        nested = nested and step >= reach
        reach += step * (extent - 1)
    if nested or array.nbytes > reach:
        return not nested
    starts = np.zeros(1, np.intp)
    for step, extent in axes:
        starts = np.add.outer(starts, step * np.arange(extent)).reshape(-1)
    starts.sort()
    return bool((np.diff(starts) < array.itemsize).any())


def _overlap(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(a, b, max_work=EXACT_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def function(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, but got {type(value).__name__}")


def pieces(boundaries: Any, values: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The checked boundaries, which must increase, and values, of which there is one more."""
    try:
        steps, rates = tuple(boundaries), tuple(values)
    except TypeError:
        raise TypeError(
            f"boundaries and values must be sequences of numbers, but got {boundaries!r} and {values!r}"
        ) from None
    steps = tuple(number_from(f"boundaries[{i}]", step, 0) for i, step in enumerate(steps))
    rates = tuple(between(f"values[{i}]", rate, 0, 1) for i, rate in enumerate(rates))
    if any(after <= before for before, after in itertools.pairwise(steps)):
        raise ValueError(f"boundaries must increase, but got {steps}")
    if len(rates) != len(steps) + 1:
        raise ValueError(f"values must be one more than boundaries, {len(steps) + 1}, but got {len(rates)}")
    return steps, rates

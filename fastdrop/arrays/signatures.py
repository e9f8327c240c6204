"""The types in the signatures of the NumPy API, for type checkers.

An op has an overload for each value of ``store``, which decides the type of the mask. The keyword arguments that do not
decide a type are written once here, as TypedDicts, so that overloads need not repeat them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..core.mask import GaussianNoise, PackedMask, SeededMask
from ..core.part import Part
from ..core.random import Stream


class DeviceArray(Protocol):
    """An array on a GPU, such as one of CuPy or Numba."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


Array = NDArray[Any]
AnyArray = Array | DeviceArray
ArrayArgument = ArrayLike | DeviceArray
SameArray = TypeVar("SameArray", bound=Array | DeviceArray)  # the result is an array of the argument's type
BitMask = PackedMask | SeededMask
Mask = BitMask | GaussianNoise
# The values of ``rng``. A string, because NumPy loads `numpy.random` when asked, which takes as long as our own import.
RandomState: TypeAlias = "int | np.integer[Any] | Stream | np.random.Generator | None"
PartOfWhole = None | Part | Sequence[Part]  # the values of ``part``

# A mask is None if nothing was dropped: at p = 0 and when not training. Most code only hands it on to
# `dropout_backward`, which accepts None, and code that reads it knows its p. So results are typed ``PackedMask |
# MaybeNone``, as typeshed does it: an unknown attribute is an error, a missing check for None is not.
MaybeNone = Any


class CommonOptions(TypedDict, total=False):
    """The keyword arguments of all ops."""

    training: bool
    rng: RandomState
    out: AnyArray | None
    part: PartOfWhole


class ScaledOptions(CommonOptions, total=False):
    """Those of ops with a choice of scaling."""

    scaling: Literal["inverted", "standard"]


class GridOptions(ScaledOptions, total=False):
    """Those of `dropout`."""

    noise_shape: Sequence[int | None] | None

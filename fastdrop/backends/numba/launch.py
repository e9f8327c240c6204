"""The Numba CPU backend, on any CPU that Numba runs on: what `fastdrop.backends` loads as "numba".

Here primitives hand their arguments to kernels: `draw` and `mask` for masks and plain dropout, `pointwise`, `norm`,
`softmax` and `attention` for the fused ones, `cells` for kept rows and columns. Kernels follow the scheme of the C
kernels as loops that LLVM vectorises. They run over ranges, which threads share (`threads`), and their compiled code is
cached on disk.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.checks import BFLOAT16, FLOAT16, FLOAT64
from ...core.random import LOW
from .. import memory
from ..generate import function
from ..primitives import PRIMITIVES, Primitive

numba: Any
try:
    numba = importlib.import_module("numba")

    from . import attention, cells, draw, mask, norm, pointwise, softmax, threads
    from .threads import over_ranges
except ImportError as error:
    numba = None
    _import_error = str(error)

Array = NDArray[Any]


def unavailable() -> str | None:
    if numba is None:
        return f"numba is not installed ({_import_error}): pip install numba"
    return None


def describe() -> str:
    return f"Numba {numba.__version__}"


def set_num_threads(n: int) -> None:
    threads.set_num_threads(n)


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """One block, for known-answer tests."""
    return [int(word) & LOW for word in draw.one_block(*(np.uint64(word) for word in (*counter, *key)))]


_NO_WORDS = np.zeros(0, np.uint32)


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _real(dtype: int, number: float) -> Any:
    """A number in the type that data of a dtype is computed in."""
    return np.float64(number) if dtype == FLOAT64 else np.float32(number)


def _add_panels(sums: Array, panels: int) -> None:
    lines = sums.reshape(panels, -1)
    for line in lines[1:]:
        lines[0] += line


def _typed(dtype: int, x: Array) -> Array:
    """Flat, with 16-bit dtypes told apart by the integer type that holds their bits."""
    flat = x if x.ndim == 1 else x.reshape(-1)
    if dtype == FLOAT16:
        return flat.view(np.int16)
    return flat.view(np.uint16) if dtype == BFLOAT16 else flat


def _way(y: Array) -> mask.Way:
    """Through y. Results of 16 bits never stream: LLVM has no such stores for them."""
    policy = memory.policy()
    if y.nbytes < policy.stream or y.itemsize < 4 or _address(y) % y.itemsize:
        return _ordinary(policy.ahead)
    return _streaming(policy, y.itemsize, -_address(y) % mask.LINE_BYTES // y.itemsize)


@functools.cache
def _ordinary(ahead: int) -> mask.Way:
    return mask.Way(*map(np.uint64, (0, 0, threads.BLOCK_CELLS, 0, 0, ahead)))


@functools.lru_cache(maxsize=64)
def _streaming(policy: memory.Policy, element_bytes: int, seam: int) -> mask.Way:
    cells, page_bits, round_bits, ahead = threads.BLOCK_CELLS, 0, 0, policy.ahead_streaming
    if policy.pages > 1:
        piece = policy.lines * mask.LINE_BYTES
        cells, ahead = piece // element_bytes, 0
        page_bits, round_bits = policy.pages.bit_length() - 1, (mask.PAGE_BYTES // piece).bit_length() - 1
    return mask.Way(*map(np.uint64, (1, seam, cells, page_bits, round_bits, ahead)))


def _coefficients(a: float, b: float, c: float) -> tuple[float, ...]:
    """Those of the affine. Kernels leave out what adds nothing: the tuple's length is part of its type."""
    return (a,) if b == 0 and c == 0 else (a, b, c)


# How much work a call is, as arguments of `over_ranges`: how many units and, where they are not 0 and 1, the position
# of the first in its word and the cells of each. By name, or by what a primitive runs over.
WORK = {
    "cells": "rows * columns",
    "rows": "rows, cells=columns",
    "panels": "panels, cells=rows * columns // panels",
    "attention_forward": "outer * heads * group * -(-queries // chunk), cells=min(queries, chunk) * keys * score_cells",
    "attention_backward": "outer * heads * parts, cells=group * queries * (keys // parts + 1) * score_cells",
    "draw_bits": "n, position",
    "draw_rows": "outer * rows * columns, position",
    "dropout_forward": "n",
    "masked_affine": "outer * repeat * inner",
    "gaussian_multiply": "n, first",
    "gather_cells": "m, cells=n",
    "scatter_cells": "height, cells=width",
    "dilate_bits": "outer * (n + block - 1) * inner",
}
SCORE_CELLS = 16  # a score of attention costs as much as so many cells of other kernels


def _launcher(kernel: Any) -> Any:
    """The primitive of a kernel's name. The kernel takes a range, then what its parameters ask for (`_passed`)."""
    name = kernel.__name__
    primitive = PRIMITIVES[name]
    _, _, *asked = inspect.signature(kernel.py_func).parameters
    arguments = ", ".join(_passed(primitive, parameter) for parameter in asked)
    body = f"run(kernel, ({arguments}), {WORK[name if name in WORK else primitive.over]})"
    if "sums" in primitive.names:
        by_panels = f"(run(kernel, ({arguments}), {WORK['panels']}), add_panels(sums, panels))"
        body = f"{by_panels} if sums is not None else {body}"
    scope = {
        "kernel": kernel,
        "run": over_ranges,
        "address": _address,
        "typed": _typed,
        "no_words": _NO_WORDS,
        "real": _real,
        "coefficients": _coefficients,
        "way": _way,
        "add_panels": _add_panels,
        "uint64": np.uint64,
        "chunk": attention.CHUNK_QUERIES,
        "score_cells": SCORE_CELLS,
    }
    return function(name, ", ".join(primitive.names), body, scope)


def _passed(primitive: Primitive, name: str) -> str:
    """The text of what a kernel gets for a parameter.

    Fused kernels take addresses and numbers of the type that they compute in. The others take arrays and, for a, b and
    c, the affine as a tuple. Seeds are given their type, because Numba takes every int for one of 64 signed bits.
    """
    if name == "coefficients":
        return "coefficients(a, b, c)"
    if name == "way":
        return "way(y)"
    parameter = next(parameter for parameter in primitive.parameters if parameter.name == name)
    if parameter.kind in CONVERTED:
        return CONVERTED[parameter.kind].format(name)
    if not parameter.is_array:
        return name
    if primitive.is_fused:
        absent, present = "0", f"address({name})"
    else:
        absent, present = "no_words", f"typed(dtype, {name})" if parameter.kind == "data" else name
    return f"{absent} if {name} is None else {present}" if parameter.optional else present


# Numbers that are not passed as they are, by kind.
CONVERTED = {"seed": "uint64({})", "flag": "int({})", "double": "float({})", "number": "real(dtype, {})"}


if numba is not None:
    draw_bits, draw_rows = _launcher(draw.draw_bits), _launcher(draw.draw_rows)
    dropout_forward, masked_affine = _launcher(mask.dropout_forward), _launcher(mask.masked_affine)
    gaussian_multiply, dilate_bits = _launcher(mask.gaussian_multiply), _launcher(mask.dilate_bits)
    gather_cells, scatter_cells = map(_launcher, (cells.gather_cells, cells.scatter_cells))
    pointwise_forward, pointwise_backward = map(_launcher, (pointwise.pointwise_forward, pointwise.pointwise_backward))
    norm_forward, norm_backward = map(_launcher, (norm.norm_forward, norm.norm_backward))
    softmax_forward, softmax_backward = map(_launcher, (softmax.softmax_forward, softmax.softmax_backward))
    attention_forward, attention_backward = map(_launcher, (attention.attention_forward, attention.attention_backward))

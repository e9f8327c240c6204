"""Calls of the primitives of attention: their extents, arrays at strides, and results. `test_attention` runs them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from fastdrop.backends import reference
from fastdrop.backends.primitives import PRIMITIVES
from fastdrop.core.checks import BOOL
from fastdrop.core.mask import word_count

from ..cases import DTYPES, OFFSET, SEED, TENTH, Dtype, assert_close
from .calls import Call, Results

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = DTYPES
FORWARD, BACKWARD = "attention_forward", "attention_backward"
STRIDED = ("query", "key", "value", "mask", "dy", "dmask")  # in the order of the strides
OUTER, HEAD, ROW, COLUMN = range(4)  # axes
GRADIENTS = "dquery dkey dvalue dmask"
LOSS = 4.0  # times the error that other fused kernels may make: exponents are sums of products here


@dataclass(frozen=True)
class Case:
    """A call of both primitives.

    Attributes
    ----------
    mask : str
        Of which type: "bool", "data" (the dtype) or "float32"; "": there is none.
    broadcast : tuple of int
        Axes of the mask and of its gradient whose stride is 0.
    transposed : bool
        Queries of the mask are next to each other, and keys are not.
    by_rows : bool
        Query, key, value and dy lie as [rows, outer, heads, columns], with gaps of NaN between rows.
    shared_cells : tuple of int
        Axes along which weights share a cell of dropout's mask: OUTER, HEAD or ROW.
    words : bool
        The bits are given: those that would be drawn.
    gradients : str
        Those that are asked for; of dmask only if the case has a mask of numbers whose gradients can be added up.
    """

    dtype: Dtype = FLOAT32
    outer: int = 1
    heads: int = 1
    group: int = 1
    queries: int = 5
    keys: int = 37
    width: int = 7
    value_width: int = 5
    mask: str = ""
    broadcast: tuple[int, ...] = ()
    transposed: bool = False
    by_rows: bool = False
    causal: bool = False
    shared_cells: tuple[int, ...] = ()
    words: bool = False
    first: int = 0
    threshold: int = TENTH
    parts: int = 1
    gradients: str = GRADIENTS

    @property
    def heads_of_query(self) -> int:
        return self.heads * self.group

    @property
    def scores(self) -> int:
        return self.outer * self.heads_of_query * self.queries * self.keys

    @property
    def mask_shape(self) -> list[int]:
        """Cells along each axis of the weights."""
        return [1 if axis in self.shared_cells else extent for axis, extent in enumerate(self.shape("weights"))]

    @property
    def cell_strides(self) -> list[int]:
        cells = self.mask_shape
        return [0 if axis in self.shared_cells else math.prod(cells[axis + 1 :]) for axis in range(4)]

    @property
    def mask_type(self) -> Dtype:
        return FLOAT32 if self.mask == "float32" else self.dtype

    @property
    def real(self) -> Dtype:
        """The type of statistics, dquery and dmask."""
        return FLOAT64 if self.dtype is FLOAT64 else FLOAT32

    @property
    def asked(self) -> list[str]:
        shared = {OUTER: self.outer, HEAD: self.heads, COLUMN: self.parts}
        has_dmask = self.mask in ("data", "float32") and all(shared.get(axis, 1) == 1 for axis in self.broadcast)
        return [name for name in self.gradients.split() if name != "dmask" or has_dmask]

    def shape(self, name: str) -> tuple[int, int, int, int]:
        rows, columns = {
            "query": (self.queries, self.width),
            "key": (self.keys, self.width),
            "value": (self.keys, self.value_width),
            "dy": (self.queries, self.value_width),
        }.get(name.removeprefix("d") if name != "dy" else name, (self.queries, self.keys))
        return self.outer, self.heads if name.endswith(("key", "value")) else self.heads_of_query, rows, columns

    def type_of(self, name: str) -> Dtype:
        return self.real if name in ("statistics", "dquery", "dmask") else self.dtype

    def place(self, name: str, values: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Numbers [outer, heads, rows, columns] where the case has them, and at which strides."""
        if name.endswith("mask"):
            order = [OUTER, HEAD, COLUMN, ROW] if self.transposed else [OUTER, HEAD, ROW, COLUMN]
            shared, gap = self.broadcast, 1
        else:
            order = [ROW, OUTER, HEAD, COLUMN] if self.by_rows else [OUTER, HEAD, ROW, COLUMN]
            shared, gap = (), 3 * self.by_rows
        strides, step = [0] * 4, 1
        for axis in reversed(order):
            if axis not in shared:
                strides[axis] = step
                step *= values.shape[axis] + (gap if axis == order[-1] else 0)
        values = values[tuple(slice(0, 1 if axis in shared else None) for axis in range(4))]
        reach = 1 + sum(stride * (extent - 1) for stride, extent in zip(strides, values.shape, strict=True))
        flat = np.full(reach * values.itemsize, 0xFF, np.uint8).view(values.dtype)
        as_strided(flat, values.shape, [stride * values.itemsize for stride in strides])[...] = values
        return flat, strides

    def numbers(self) -> dict[str, Any]:
        parameters = (*PRIMITIVES[FORWARD].parameters, *PRIMITIVES[BACKWARD].parameters)
        names = {parameter.name for parameter in parameters if not parameter.is_array}
        return {name: getattr(self, name) for name in names if hasattr(self, name)} | {
            "dtype": self.dtype.tag,
            "mask_dtype": BOOL if self.mask == "bool" else self.mask_type.tag,
            "causal": int(self.causal),
            "softmax_scale": 1 / math.sqrt(self.width),
            "a": 1.25,
            "seed": SEED,
            "offset": OFFSET,
        }


def values_of(case: Case, name: str) -> np.ndarray:
    """Ordinary numbers, [outer, heads, rows, columns]. A seventh of a mask is -infinity, or False."""
    shape = case.shape(name)
    rng = np.random.default_rng([sum(name.encode()), *shape])
    values = rng.normal(size=shape)
    if name == "mask":
        masked = rng.random(shape) < 1 / 7
        if case.mask == "bool":
            return ~masked
        return case.mask_type.narrow(np.where(masked, -np.inf, values))
    return case.type_of(name).narrow(values)


def inputs_of(case: Case, **special: np.ndarray) -> Results:
    """A call's inputs. ``special`` are numbers [outer, heads, rows, columns] instead of ordinary ones, as float64."""
    arrays, strides = {}, np.zeros((len(STRIDED) + 1, 4), np.int64)
    strides[-1] = case.cell_strides
    for i, name in enumerate(STRIDED):
        if name.endswith("mask") and not (case.mask and (name == "mask" or name in case.asked)):
            continue
        if name in special:
            own = case.mask_type if name == "mask" else case.type_of(name)
            values = own.narrow(np.broadcast_to(special[name], case.shape(name)))
        else:
            values = values_of(case, name)
        arrays[name], strides[i] = case.place(name, values)
    arrays["strides"] = strides.reshape(-1)
    if "dquery" in case.asked:
        outer, heads, rows, columns = case.shape("query")
        parts = np.random.default_rng(case.parts).normal(size=case.parts * outer * heads * rows * columns)
        arrays["dquery"] = case.real.narrow(parts)
    if case.words:
        arrays["words"] = bits_of_draw(case)
    return arrays


def bits_of_draw(case: Case) -> np.ndarray:
    """Words with the bits of cells 0 to the last one of the case."""
    n = case.first + math.prod(case.mask_shape)
    if case.threshold == 0 or case.threshold >> 32:
        return np.full(word_count(n), 0 if case.threshold else 2**32 - 1, np.uint32)
    words = np.zeros(word_count(n), np.uint32)
    reference.draw_bits(words, 0, 0, n, SEED, OFFSET, case.threshold)
    return words


def rows_of(case: Case, name: str, values: np.ndarray, given: Results) -> np.ndarray:
    """The rows of a result of a call of ``given``, as float64. A mask's gradient has no axis without a stride."""
    rows = case.outer * case.heads_of_query * case.queries
    if name == "dmask":
        strides = given["strides"].reshape(-1, 4)[STRIDED.index(name)] * values.itemsize
        return as_strided(values, case.shape(name), strides).reshape(rows, -1).astype(np.float64)
    return case.type_of(name).wide(values).reshape(rows, -1)


def forward(module: Any, case: Case, given: Results | None = None, **layout: Any) -> Results:
    """y and statistics. `Call.arrays` explains layouts."""
    given = inputs_of(case) if given is None else given
    rows = case.outer * case.heads_of_query * case.queries
    outputs = {"y": (rows * case.value_width, case.dtype.storage), "statistics": (2 * rows, case.real.storage)}
    return Call(FORWARD, _of(FORWARD, given), outputs, case.numbers()).run(module, **layout)


def backward(module: Any, case: Case, given: Results, **layout: Any) -> Results:
    """The gradients. ``given`` has y and statistics too. What is added to is an input and an output."""
    inputs, asked = _of(BACKWARD, given), case.asked
    added_to = [name for name in ("dquery", "dmask") if name in asked]
    outputs = {name: (math.prod(case.shape(name)), case.dtype.storage) for name in asked if name not in added_to}
    outputs |= {name: (inputs[name].size, inputs[name].dtype.type) for name in added_to}
    over = {name: name for name in added_to}
    return Call(BACKWARD, inputs, outputs, case.numbers()).run(module, over=over, **layout)


def _of(op: str, given: Results) -> Results:
    return {name: given[name] for name in PRIMITIVES[op].names if name in given}


def run(module: Any, case: Case, **layout: Any) -> Results:
    """The results of both, backward from the reference's forward."""
    given, expected = inputs_of(case), expected_forward_of(case)
    return forward(module, case, given, **layout) | backward(module, case, given | expected, **layout)


@functools.cache
def expected_forward_of(case: Case) -> Results:
    return forward(reference, case)


@functools.cache
def expected_of(case: Case) -> Results:
    return run(reference, case)


def assert_results_close(case: Case, results: Results, expected: Results) -> None:
    """query's gradient as the sum over its parts, and each of the two statistics apart."""
    assert results.keys() == expected.keys()
    for name, wanted in expected.items():
        own = case.type_of(name)
        both = [own.wide(values) for values in (results[name], wanted)]
        if name == "dquery":
            both = [values.reshape(case.parts, -1).sum(0) for values in both]
        lines = 2 if name == "statistics" else 1
        for line in range(lines):
            assert_numbers_close(case, name, *(values[line::lines] for values in both), what=line)


def assert_numbers_close(
    case: Case, name: str, got: np.ndarray, wanted: np.ndarray, size: float = 1.0, what: object = ""
) -> None:
    """Some numbers of a result, as float64. ``size``: of queries and keys."""
    terms = np.abs(wanted[np.isfinite(wanted)]).max(initial=size * terms_of(case, name))
    assert_close(got, wanted, case.type_of(name), (name, what, case), LOSS * terms)


def terms_of(case: Case, name: str) -> float:
    """About the sum of the absolute terms of a number of a gradient. Terms cancel if a query sees few keys, and if a
    mask's gradient is summed over keys."""
    extents = case.shape(name)
    added = {
        "dquery": 1,
        "dkey": case.group * case.queries,
        "dmask": math.prod(extents[axis] for axis in case.broadcast),
    }
    return max(1.0, added[name] / case.keys) * math.sqrt(case.value_width) if name in added else 0.0

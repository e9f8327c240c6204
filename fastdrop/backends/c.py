"""The C backend: hands pointers to ``fastdrop._native`` and decides nothing but the instruction set.

``FASTDROP_ISA`` forces one by name; a name that is unknown or that this CPU lacks is an error, never a fallback.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

_native: Any
try:
    _native = importlib.import_module("fastdrop._native")
except ImportError as error:
    _native = None
    _import_error = str(error)

Array = NDArray[Any]
Words = NDArray[np.uint32]

if _native is not None:
    _lib: Any = _native.lib
    _address: Any = _native.ffi.from_buffer
    _no_words: Any = _native.ffi.NULL
    STREAM_BYTES: int = _lib.FD_STREAM_BYTES  # outputs from here on are written around the cache
    # The primitives by address: most threads first, then as below but with integers for pointers, 0 for none. They
    # return 0, or a negative code and have done nothing.
    draw_bits_at: Any = _lib.fd_draw_bits_at
    dropout_forward_at: Any = _lib.fd_dropout_forward_at
    masked_affine_at: Any = _lib.fd_masked_affine_at
    gaussian_multiply_at: Any = _lib.fd_gaussian_multiply_at
    dilate_bits_at: Any = _lib.fd_dilate_bits_at
    pointwise_forward_at: Any = _lib.fd_pointwise_forward_at
    pointwise_backward_at: Any = _lib.fd_pointwise_backward_at
    norm_forward_at: Any = _lib.fd_norm_forward_at
    norm_backward_at: Any = _lib.fd_norm_backward_at
    softmax_forward_at: Any = _lib.fd_softmax_forward_at
    softmax_backward_at: Any = _lib.fd_softmax_backward_at
    # Those that write the words they work under, as `draw_bits` of cells from 0 on: seed, offset and threshold follow
    # the threads. Their time goes by while data is on its way.
    pointwise_forward_drawn_at: Any = _lib.fd_pointwise_forward_drawn_at
    norm_forward_drawn_at: Any = _lib.fd_norm_forward_drawn_at
    softmax_forward_drawn_at: Any = _lib.fd_softmax_forward_drawn_at


def unavailable() -> str | None:
    if _native is None:
        return (
            f"the C extension is not built ({_import_error}); install a C compiler (Debian: apt-get install gcc "
            "python3-dev) and then, in fastdrop's source folder: pip install --force-reinstall ."
        )
    return None


def describe() -> str:
    return f"C, {isa()} in use of {', '.join(usable_isas())}"


def isa() -> str:
    """Name of the instruction set in use."""
    return _name(_lib.fd_isa_active())


def usable_isas() -> list[str]:
    """Names of those built in and supported by this CPU, best last."""
    return [_name(i) for i in range(_lib.fd_isa_count()) if _lib.fd_isa_usable(i)]


def select_isa(name: str) -> None:
    """Makes one the instruction set of all calls from now on, in all threads."""
    for i in range(_lib.fd_isa_count()):
        if _name(i) == name and _lib.fd_isa_select(i) == _lib.FD_OK:
            return
    raise ValueError(f"FASTDROP_ISA must be one of {', '.join(usable_isas())} on this machine, but got {name!r}")


def set_num_threads(n: int) -> None:
    if _lib.fd_set_num_threads(n):
        raise _refusal()


def use_team(parallel: int) -> None:
    """Runs the calls by address on the threads of the library that makes them: the address of its ``GOMP_parallel``."""
    _lib.fd_use_team(parallel)


def scale_float32(x: Array, y: Array, a: float, stream: bool) -> None:
    """y = a x, for benchmarks: the least that any pass over this memory can take."""
    if _lib.fd_scale_float32(_address(x), _address(y), x.size, a, stream):
        raise _refusal()


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """One block, for known-answer tests."""
    out = _native.ffi.new("uint32_t[4]")
    _lib.fd_philox4x32_10(counter, key, out)
    return list(out)


def draw_bits(words: Words, position: int, first: int, n: int, seed: int, offset: int, threshold: int) -> None:
    if _lib.fd_draw_bits(_address(words), position, first, n, seed, offset, threshold):
        raise _refusal()


def dropout_forward(
    dtype: int,
    x: Array,
    y: Array,
    words: Words | None,
    first: int,
    n: int,
    seed: int,
    offset: int,
    threshold: int,
    a: float,
    b: float,
    c: float,
) -> None:
    bits = _no_words if words is None else _address(words)
    if _lib.fd_dropout_forward(dtype, _address(x), _address(y), bits, first, n, seed, offset, threshold, a, b, c):
        raise _refusal()


def masked_affine(
    dtype: int,
    x: Array,
    y: Array,
    words: Words,
    position: int,
    outer: int,
    repeat: int,
    inner: int,
    a: float,
    b: float,
    c: float,
) -> None:
    if _lib.fd_masked_affine(dtype, _address(x), _address(y), _address(words), position, outer, repeat, inner, a, b, c):
        raise _refusal()


def gaussian_multiply(dtype: int, x: Array, y: Array, first: int, n: int, seed: int, offset: int, sigma: float) -> None:
    if _lib.fd_gaussian_multiply(dtype, _address(x), _address(y), first, n, seed, offset, sigma):
        raise _refusal()


def dilate_bits(to: Words, words: Words, outer: int, n: int, inner: int, block: int) -> None:
    if _lib.fd_dilate_bits(_address(to), _address(words), outer, n, inner, block):
        raise _refusal()


def pointwise_forward(
    dtype: int,
    residual_dtype: int,
    x: Array,
    input_bias: Array | None,
    multiplier: Array | None,
    residual: Array | None,
    words: Words | None,
    y: Array,
    signs: Words | None,
    rows: int,
    columns: int,
    a: float,
    activation: int,
) -> None:
    if _lib.fd_pointwise_forward(
        dtype,
        residual_dtype,
        _address(x),
        _at(input_bias),
        _at(multiplier),
        _at(residual),
        _at(words),
        _address(y),
        _at(signs),
        rows,
        columns,
        a,
        activation,
    ):
        raise _refusal()


def pointwise_backward(
    dtype: int,
    residual_dtype: int,
    dy: Array,
    x: Array | None,
    input_bias: Array | None,
    multiplier: Array | None,
    words: Words | None,
    dx: Array,
    dmultiplier: Array | None,
    sums: Array | None,
    rows: int,
    columns: int,
    panels: int,
    a: float,
    activation: int,
) -> None:
    if _lib.fd_pointwise_backward(
        dtype,
        residual_dtype,
        _address(dy),
        _at(x),
        _at(input_bias),
        _at(multiplier),
        _at(words),
        _address(dx),
        _at(dmultiplier),
        _at(sums),
        rows,
        columns,
        panels,
        a,
        activation,
    ):
        raise _refusal()


def norm_forward(
    dtype: int,
    residual_dtype: int,
    x: Array,
    input_bias: Array | None,
    residual: Array | None,
    words: Words | None,
    weight: Array | None,
    norm_bias: Array | None,
    y: Array,
    residual_out: Array,
    statistics: Array,
    rows: int,
    columns: int,
    a: float,
    eps: float,
    centred: int,
) -> None:
    if _lib.fd_norm_forward(
        dtype,
        residual_dtype,
        _address(x),
        _at(input_bias),
        _at(residual),
        _at(words),
        _at(weight),
        _at(norm_bias),
        _address(y),
        _address(residual_out),
        _address(statistics),
        rows,
        columns,
        a,
        eps,
        centred,
    ):
        raise _refusal()


def norm_backward(
    dtype: int,
    residual_dtype: int,
    dy: Array,
    dresidual_out: Array | None,
    residual_out: Array,
    statistics: Array,
    weight: Array | None,
    words: Words | None,
    dx: Array | None,
    dresidual: Array | None,
    sums: Array | None,
    rows: int,
    columns: int,
    panels: int,
    a: float,
    centred: int,
) -> None:
    if _lib.fd_norm_backward(
        dtype,
        residual_dtype,
        _address(dy),
        _at(dresidual_out),
        _address(residual_out),
        _address(statistics),
        _at(weight),
        _at(words),
        _at(dx),
        _at(dresidual),
        _at(sums),
        rows,
        columns,
        panels,
        a,
        centred,
    ):
        raise _refusal()


def softmax_forward(
    dtype: int,
    x: Array,
    mask: Array | None,
    words: Words | None,
    probabilities: Array | None,
    y: Array,
    rows: int,
    columns: int,
    heads: int,
    queries: int,
    outer_stride: int,
    head_stride: int,
    query_stride: int,
    softmax_scale: float,
    a: float,
    causal: int,
) -> None:
    if _lib.fd_softmax_forward(
        dtype,
        _address(x),
        _at(mask),
        _at(words),
        _at(probabilities),
        _address(y),
        rows,
        columns,
        heads,
        queries,
        outer_stride,
        head_stride,
        query_stride,
        softmax_scale,
        a,
        causal,
    ):
        raise _refusal()


def softmax_backward(
    dtype: int,
    dy: Array,
    probabilities: Array,
    words: Words | None,
    dx: Array,
    y: Array | None,
    rows: int,
    columns: int,
    softmax_scale: float,
    a: float,
) -> None:
    if _lib.fd_softmax_backward(
        dtype, _address(dy), _address(probabilities), _at(words), _address(dx), _at(y), rows, columns, softmax_scale, a
    ):
        raise _refusal()


def drawn(primitive: str, seed: int, offset: int, threshold: int, *arguments: Any) -> None:
    """A fused forward primitive that writes the words it works under."""
    given = [_at(x) if x is None or isinstance(x, np.ndarray) else x for x in arguments]
    if getattr(_lib, f"fd_{primitive}_drawn")(seed, offset, threshold, *given):
        raise _refusal()


def _at(array: Array | None) -> Any:
    return _no_words if array is None else _address(array)


def _name(isa: int) -> str:
    return str(_native.ffi.string(_lib.fd_isa_name(isa)).decode())


def _refusal() -> ValueError:
    """Unreachable from the public API, which checks first."""
    return ValueError("the C kernel refused its arguments")


if _forced := os.environ.get("FASTDROP_ISA"):
    if _native is None:
        raise ValueError(f"FASTDROP_ISA must not be set where the C extension is not built, but got {_forced!r}")
    select_isa(_forced)

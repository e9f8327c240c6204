"""``fastdrop selftest``: whether this installation draws the masks of the specification and applies them right.

What counts as right is decided elsewhere, by the golden vectors and by the NumPy reference; this module decides how
much of it is tried in a few seconds: every backend and instruction set of this machine, all golden masks, lengths and
probabilities that reach each path of a kernel once, and each fused op in each dtype with one of each family on long
rows. The test suite does the rest. Benchmarks run it first and stop when it fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import backends
from ..arrays.array_ops import compute_dtype
from ..arrays.dropout import draw_mask, dropout, dropout_backward
from ..arrays.fused import (
    bias_act_dropout,
    bias_dropout_add,
    dropout_add,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    geglu_dropout,
    softmax_dropout,
    swiglu_dropout,
)
from ..backends import reference
from ..backends.reference.storage import float32_to_bfloat16
from ..core import checks as core_checks
from ..core.mask import word_count
from ..core.random import Stream, keep_scale, threshold

HELP = "check every backend and instruction set here against the golden vectors"
DESCRIPTION = (
    "Checks every backend and instruction set of this machine: the generator's published answers, the golden masks, "
    "and forward and backward of every dtype against the NumPy reference, bit for bit; of the fused ops to rounding. "
    "Exit code 0 if all pass, else 1."
)

Array = NDArray[Any]
Words = NDArray[np.uint32]
Results = dict[str, list[Array]]
Run = tuple[str, str | None]  # backend, instruction set (C only)

ISAS = ("scalar", "avx2", "avx512", "neon")  # the names that FASTDROP_ISA knows
DTYPES: dict[str, tuple[int, type]] = {  # storage of each tag as backends take it
    "float32": (core_checks.FLOAT32, np.float32),
    "float64": (core_checks.FLOAT64, np.float64),
    "float16": (core_checks.FLOAT16, np.float16),
    "bfloat16": (core_checks.BFLOAT16, np.uint16),
}
P = 0.1
# Decided by one bit of the draw, by one, two and eight groups of them, and seldom.
OTHER_P = (0.5, 0.25, 85 / 256, 1 / 3, 1e-6)
SEED, OFFSET = 0x0123456789ABCDEF, 0xFEDCBA9876543210
POSITION = 13  # of the first bit in its word, for reading and writing off the word borders
GRID = (3, 5, 37)  # outer, repeat, inner of a mask that is shared along an axis
THREADS = (1, 2)
POISON = 0xA5
# A tail alone, a cell over a word and over a block of 512, and enough for two threads to share.
LENGTHS = (1, 33, 513, 150_001)
ROWS = (37, 67)  # of the fused ops
# Longer than kernels have buffers for, of whole words, so that they draw them; enough for two threads to share, and for
# stores around the cache.
LONG_ROWS = (1100, 4128)
# What their results may differ by from the reference's, of themselves and of the average: the rounding of a result, or
# of float32 sums and functions.
NEAR = {"float32": 2.0**-16, "float64": 2.0**-45, "float16": 2.0**-9, "bfloat16": 2.0**-6}
STREAMED_BYTES = (16 << 20) + 4104  # kernels write around the cache from 16 MiB on


@dataclass(frozen=True)
class Case:
    """Inputs of one length and dtype, and what the reference makes of them."""

    name: str
    tag: int
    p: float
    n: int
    x: Array
    words: Words
    y: Array


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    return 0 if run() else 1


def run(print: Callable[[str], object] = print) -> bool:
    """Checks everything that can run here, prints a line for each, and returns whether all passed.

    Backend, instruction set and threads are afterwards what they were before.
    """
    vectors = json.loads((importlib.resources.files("fastdrop") / "vectors" / "masks.json").read_text())
    cases, shared = _cases(), _shared_case()
    with backends.use_backend("numpy"):
        api, fused = _through_the_api(), _fused()
    threads = backends.get_num_threads()
    passed = failed = missing = 0
    for (backend, isa), reason in _runs():
        name = f"{backend}/{isa}" if isa else backend
        if reason:
            missing += 1
            print(f"{name:10}  n/a   {reason}")
            continue
        start = time.perf_counter()
        problems: list[str] = []
        checks = 0
        try:
            with contextlib.nullcontext() if backend == backends.CUDA else _running(backend, isa) as module:
                problems_found = (
                    _check(module, vectors, cases, shared, api, fused) if module else _check_cuda(cases, fused)
                )
                for problem in problems_found:
                    checks += 1
                    problems += [problem] if problem else []
        except Exception as error:  # whatever a broken backend raises is its result
            checks += 1
            problems.append(f"{type(error).__name__}: {error}")
        finally:
            backends.set_num_threads(threads)
        seconds = time.perf_counter() - start
        if problems:
            failed += 1
            print(f"{name:10}  FAIL  {len(problems)} of {checks} checks, first: {problems[0]}")
        else:
            passed += 1
            print(f"{name:10}  PASS  {checks} checks, {seconds:.1f} s")
    ok = passed > 0 and failed == 0
    print(f"{'PASS' if ok else 'FAIL'}: {passed} passed, {failed} failed, {missing} not available here")
    return ok


@contextlib.contextmanager
def _running(backend: str, isa: str | None) -> Iterator[ModuleType]:
    """Makes a backend and instruction set the ones that run, until the block ends."""
    with backends.use_backend(backend):
        module = backends.load(backend)
        if isa is None:
            yield module
            return
        before = module.isa()
        module.select_isa(isa)
        try:
            yield module
        finally:
            module.select_isa(before)


def _runs() -> Iterator[tuple[Run, str | None]]:
    """Every backend, C once per instruction set, with the reason where it can't run."""
    for backend, reason in backends.reasons().items():
        if backend != "c" or reason:
            yield (backend, None), reason
            continue
        usable = backends.load("c").usable_isas()
        for isa in ISAS:
            yield (backend, isa), None if isa in usable else "not an instruction set of this processor, or not built"


def _check(
    module: ModuleType, vectors: Any, cases: list[Case], shared: Case, api: Results, fused: Results
) -> Iterator[str | None]:
    """None for each check that holds, else what is wrong."""
    yield from _philox(module, vectors["philox"])
    yield from _golden(vectors["masks"])
    for threads in THREADS if module is not reference else THREADS[:1]:
        backends.set_num_threads(threads)
        for case in cases:
            where = f"{case.name}, p = {case.p:.3g}, n = {case.n:,}, threads = {threads}"
            yield from (f"{where}: {problem}" if problem else None for problem in _same_as_reference(module, case))
    y = _poisoned(shared.y)
    module.masked_affine(shared.tag, shared.x, y, shared.words, POSITION, *GRID, keep_scale(threshold(P)), 0.0, 0.0)
    yield _difference("mask shared along an axis", y, shared.y)
    for name, results in _through_the_api().items():
        for what, got, expected in zip(("forward", "backward"), results, api[name], strict=True):
            yield _difference(f"{name}, {what} through the API, transposed", got, expected)
    if module is not reference:
        yield from _near(_fused(), fused)


def _check_cuda(cases: list[Case], fused: Results) -> Iterator[str | None]:
    """The same for arrays on a GPU, whose one NaN stands for all."""
    upload: Any = backends.cuda_backend().upload
    for case in cases:
        if case.tag == core_checks.BFLOAT16:  # Numba has no arrays of it
            continue
        where = f"{case.name}, p = {case.p:.3g}, n = {case.n:,}"
        on_gpu = upload(case.x)
        y, mask = dropout(case.x, case.p, rng=SEED)
        y_there: Any
        again: Any
        y_there, mask_there = dropout(on_gpu, case.p, rng=SEED)
        again, _ = dropout(on_gpu, case.p, store="seed", rng=SEED)
        dx_there: Any = dropout_backward(on_gpu, mask_there)
        yield None if mask_there == mask else f"{where}: mask differs"
        for what, got, expected in (
            ("forward", y_there, y),
            ("backward", dx_there, dropout_backward(case.x, mask)),
            ("forward, seed kept", again, y),
        ):
            same = np.array_equal(got.copy_to_host(), expected, equal_nan=True)
            yield None if same else f"{where}: {what} differs"
    there: Any = _fused(upload, without=("bfloat16",))
    yield from _near({name: [array.copy_to_host() for array in arrays] for name, arrays in there.items()}, fused)


def _philox(module: ModuleType, answers: Any) -> Iterator[str | None]:
    for answer in answers:
        counter, key, expected = (tuple(int(word, 16) for word in answer[part]) for part in ("counter", "key", "out"))
        same = tuple(int(word) for word in module.philox4x32_10(counter, key)) == expected
        yield None if same else f"Philox4x32-10 of counter {counter} is not the published answer"


def _golden(masks: Any) -> Iterator[str | None]:
    for mask in masks:
        words = np.array([int(word, 16) for word in mask["words"]], np.uint32)
        state = Stream(int(mask["seed"], 16), int(mask["offset"], 16))
        drawn = draw_mask(32 * words.size, mask["p"], rng=state, first_cell=32 * mask["first_word"]).words
        yield _difference(f"golden mask p = {mask['p']}, word {mask['first_word']}", drawn, words)


def _same_as_reference(module: ModuleType, case: Case) -> Iterator[str | None]:
    cut = threshold(case.p)
    scale = keep_scale(cut)
    y, words = _poisoned(case.y), _poisoned(case.words)
    module.dropout_forward(case.tag, case.x, y, words, POSITION, case.n, SEED, OFFSET, cut, scale, 0.0, 0.0)
    yield _difference("mask", words, case.words)
    yield _difference("forward", y, case.y)
    y = _poisoned(case.y)
    module.dropout_forward(case.tag, case.x, y, None, POSITION, case.n, SEED, OFFSET, cut, scale, 0.0, 0.0)
    yield _difference("forward without storing the mask", y, case.y)
    y = _poisoned(case.y)
    module.masked_affine(case.tag, case.x, y, case.words, 0, 1, 1, case.n, scale, 0.0, 0.0)
    yield _difference("backward", y, case.y)
    shifted = _poisoned(np.empty(word_count(POSITION + case.n), np.uint32))
    shifted[0] = 0
    module.draw_bits(shifted, POSITION, POSITION, case.n, SEED, OFFSET, cut)
    y = case.x.copy()
    module.masked_affine(case.tag, y, y, shifted, POSITION, 1, 1, case.n, scale, 0.0, 0.0)
    yield _difference("backward in place, mask off the word border", y, case.y)
    if case.n <= LENGTHS[-1]:  # the reference takes its time
        yield from _others_as_reference(module, case)


def _others_as_reference(module: ModuleType, case: Case) -> Iterator[str | None]:
    """Affines with constants, noise and blocks."""
    for what, primitive, before in (
        ("alpha dropout", "dropout_forward", (None, POSITION, case.n, SEED, OFFSET, threshold(case.p), 1.3, -0.2, 0.7)),
        ("a stored affine", "masked_affine", (case.words, 0, 1, 1, case.n, 1.3, -0.2, 0.7)),
        ("Gaussian dropout", "gaussian_multiply", (POSITION, case.n, SEED, OFFSET, 0.5)),
    ):
        y, expected = _poisoned(case.y), _poisoned(case.y)
        getattr(module, primitive)(case.tag, case.x, y, *before)
        getattr(reference, primitive)(case.tag, case.x, expected, *before)
        yield _difference(what, y, expected)
    outer, n, inner, block = 2, case.n // 8, 3, 5
    words, wanted = (_poisoned(np.empty(word_count(outer * (n + block - 1) * inner), np.uint32)) for _ in range(2))
    module.dilate_bits(words, case.words, outer, n, inner, block)
    reference.dilate_bits(wanted, case.words, outer, n, inner, block)
    yield _difference("blocks", words, wanted)


def _cases() -> list[Case]:
    cases = []
    words = _reference_words(P, STREAMED_BYTES // 2)
    for name, (_, dtype) in DTYPES.items():
        cases += _cases_of(name, P, words, (*LENGTHS, STREAMED_BYTES // np.dtype(dtype).itemsize))
    for p in OTHER_P:
        cases += _cases_of("float32", p, _reference_words(p, LENGTHS[-1]), LENGTHS[-1:])
    return cases


def _cases_of(name: str, p: float, words: Words, lengths: tuple[int, ...]) -> list[Case]:
    """Cases whose masks all begin at the same cell, so that one draw and one pass of the reference make them all."""
    tag, dtype = DTYPES[name]
    x = _data(tag, dtype, lengths[-1])
    y = np.empty_like(x)
    reference.masked_affine(tag, x, y, words, 0, 1, 1, x.size, keep_scale(threshold(p)), 0.0, 0.0)
    cases = []
    for n in lengths:
        first = words[: word_count(n)].copy()
        if n % 32:
            first[-1] &= (1 << n % 32) - 1
        cases.append(Case(name, tag, p, n, x[:n], first, y[:n]))
    return cases


def _reference_words(p: float, n: int) -> Words:
    words = np.empty(word_count(n), np.uint32)
    reference.draw_bits(words, 0, POSITION, n, SEED, OFFSET, threshold(p))
    return words


def _shared_case() -> Case:
    outer, repeat, inner = GRID
    n = outer * repeat * inner
    x = _data(core_checks.FLOAT32, np.float32, n)
    words = np.empty(word_count(POSITION + outer * inner), np.uint32)
    reference.draw_bits(words, 0, 0, POSITION + outer * inner, SEED, OFFSET, threshold(P))
    y = np.empty_like(x)
    reference.masked_affine(core_checks.FLOAT32, x, y, words, POSITION, *GRID, keep_scale(threshold(P)), 0.0, 0.0)
    return Case("float32", core_checks.FLOAT32, P, n, x, words, y)


def _through_the_api() -> Results:
    """Forward and backward of a transposed array of every dtype NumPy has here, by the backend that runs."""
    results = {}
    for dtype in _dtypes():
        x = np.arange(-600, 600).reshape(40, 30).astype(dtype).T
        y, mask = dropout(x, P, rng=SEED)
        results[dtype.name] = [y, dropout_backward(x, mask)]
    return results


def _fused(place: Callable[[Array], Any] = np.asarray, without: tuple[str, ...] = ()) -> Results:
    """Results and gradients of the fused ops by the backend that runs, of arrays put where ``place`` puts them."""
    results: Results = {}
    for dtype in (dtype for dtype in _dtypes() if dtype.name not in without):
        for name, call in _fused_calls(dtype, ROWS, place).items():
            results[f"{name}, {dtype.name}"] = _there_and_back(call, place)
    calls = _fused_calls(np.dtype(np.float32), LONG_ROWS, place)
    for name in ("bias_dropout_add", "dropout_add_layer_norm", "softmax_dropout"):
        results[f"{name}, float32, long rows"] = _there_and_back(calls[name], place)
    return results


def _fused_calls(
    dtype: np.dtype[Any], shape: tuple[int, int], place: Callable[[Array], Any]
) -> dict[str, Callable[..., Any]]:
    """The fused ops on their arrays; 16-bit data beside a float32 residual in some."""
    normal = np.resize(np.random.default_rng(SEED).standard_normal(4 * math.prod(ROWS)), (4, *shape))
    wide = dtype if dtype.itemsize > 2 else np.dtype(np.float32)
    x, residual, other = (place(array.astype(dtype)) for array in normal[:3])
    wide_residual, mask = place(normal[1].astype(wide)), place(normal[3].astype(compute_dtype(dtype)))
    columns = place(normal[3, 0].astype(compute_dtype(dtype)))
    biases = {"bias": columns, "x_bias": columns}
    causal = shape == ROWS  # among thousands of keys, rows that see few would not be average
    return {
        "dropout_add": partial(dropout_add, x, residual),
        "bias_dropout_add": partial(bias_dropout_add, x, columns, wide_residual),
        "swiglu_dropout": partial(swiglu_dropout, x, other),
        "geglu_dropout": partial(geglu_dropout, x, other),
        "dropout_add_layer_norm": partial(dropout_add_layer_norm, x, wide_residual, columns, **biases),
        "dropout_add_rms_norm": partial(dropout_add_rms_norm, x, None, columns),
        "softmax_dropout": partial(softmax_dropout, x, scale=0.5, attn_mask=mask, causal=causal),
        **{
            activation: partial(bias_act_dropout, x, columns, activation=activation)
            for activation in ("relu", "gelu", "gelu_tanh", "silu")
        },
    }


def _there_and_back(call: Callable[..., Any], place: Callable[[Array], Any]) -> list[Array]:
    """A call's results and its gradients."""
    *outputs, saved = call(p=P, rng=SEED)
    down = [place(np.resize(np.sin(np.arange(1009)), y.shape).astype(y.dtype)) for y in outputs]
    return [*outputs, *(gradient for gradient in saved.backward(*down) if gradient is not None)]


def _near(results: Results, expected: Results) -> Iterator[str | None]:
    for name, arrays in results.items():
        for i, (got, wanted) in enumerate(zip(arrays, expected[name], strict=True)):
            exact = wanted.astype(np.float64)
            room = NEAR[name.split(", ")[1]] * (np.abs(exact) + np.abs(exact).mean())
            same = got.shape == wanted.shape and bool((np.abs(got.astype(np.float64) - exact) <= room).all())
            yield None if same else f"{name}: {'gradient' if i else 'result'} {i} is not the reference's"


def _dtypes() -> list[np.dtype[Any]]:
    """Those that NumPy has here."""
    return [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), *_bfloat16()]


def _bfloat16() -> list[np.dtype[Any]]:
    try:
        import ml_dtypes
    except ImportError:
        return []
    return [np.dtype(ml_dtypes.bfloat16)]


def _data(tag: int, dtype: type, n: int) -> Array:
    """Normal values, and those that a multiplication in place of a selection would betray."""
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    for i, special in enumerate((np.inf, -np.inf, np.nan, -0.0, 1e-7, 65504.0)):
        values[i + 7 :: 101] = special
    if tag == core_checks.BFLOAT16:
        return float32_to_bfloat16(values)
    with np.errstate(all="ignore"):
        return values.astype(dtype)


def _poisoned(like: Array) -> Array:
    """A new array of the same kind, full of what no result is."""
    array = np.empty_like(like)
    array.view(np.uint8).fill(POISON)
    return array


def _difference(what: str, got: Array, expected: Array) -> str | None:
    """None if every bit is the same."""
    got, expected = np.ascontiguousarray(got).reshape(-1), np.ascontiguousarray(expected).reshape(-1)
    same = got.view(np.uint8) == expected.view(np.uint8)
    if same.all():
        return None
    return f"{what} differs from element {int(same.argmin()) // got.itemsize:,} on"

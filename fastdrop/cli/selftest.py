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
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
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
    geglu_dropout,
    swiglu_dropout,
)
from ..arrays.fused_rows import dropout_add_layer_norm, dropout_add_rms_norm, softmax_dropout
from ..backends import reference
from ..backends.memory import NEVER, Policy, use_policy
from ..backends.reference.storage import float32_to_bfloat16
from ..core import checks as core_checks
from ..core.mask import to_host, word_count
from ..core.random import Stream, keep_scale
from ..core.random import threshold as threshold_of

HELP = "check that this installation computes the right masks and results"
DESCRIPTION = (
    "Checks every backend and instruction set that runs on this machine, in a few seconds: the published answers of "
    "the random generator, stored masks, forward and backward of every dtype against NumPy bit for bit, and the fused "
    "functions up to rounding."
)
EPILOG = """examples:
  fastdrop selftest          after an installation, or on a new machine
  fastdrop selftest --all    Numba too, which compiles for minutes

exit codes: 0 all checks pass, 1 one fails, 2 wrong usage, 130 interrupted
"""

Array = NDArray[Any]
Place = Callable[[Array], Any]  # puts an array where it is to be computed with
Named = Iterator[tuple[str, Array]]  # results, with names for what differs
Problems = Iterator[str | None]  # None for each check that holds, else what is wrong

ISAS = ("scalar", "avx2", "avx512", "neon")  # the names that FASTDROP_ISA knows
COMPILES = "not in use here, and it compiles for minutes: fastdrop selftest --all checks it"
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
THREADS = (1, 2)
POISON = 0xA5
# A tail alone, a cell over a word and over a block of 512, and enough for two threads to share.
LENGTHS = (1, 33, 513, 150_001)
# Ways through memory: by ordinary stores, around the cache, and so from several pages in turn.
WAYS = (Policy(NEVER), Policy(0), Policy(0, pages=4))
SHARED = (3, 5, 37)  # outer, repeat, inner of a mask that is shared along an axis
ROWS = (37, 67)  # of the fused ops
# Longer than kernels have buffers for, of whole words, so that they draw them; enough for two threads to share.
LONG_ROWS = (100, 4128)
# What their results may differ by from the reference's, of themselves and of the average: the rounding of a result, or
# of float32 sums and functions.
NEAR = {"float32": 2.0**-16, "float64": 2.0**-45, "float16": 2.0**-9, "bfloat16": 2.0**-6}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all",
        action="store_true",
        help="check Numba too, which first compiles for one to five minutes (without --all it is checked only if "
        "fastdrop would run on it)",
    )


def main(args: argparse.Namespace) -> int:
    return 0 if run(partial(print, flush=True), numba=args.all) else 1


def run(print: Callable[[str], object] = print, numba: bool = False) -> bool:
    """Checks what can run here, prints a line for each, and returns whether all passed.

    Numba compiles for minutes, so it is checked only if ``numba`` asks for it or if it is the backend in use. Backend,
    instruction set and threads are afterwards what they were before.
    """
    vectors = json.loads((importlib.resources.files("fastdrop") / "vectors" / "masks.json").read_text())
    with backends.use_backend("numpy"):
        exact = dict(_plain(reference)) | dict(_through_the_api(np.asfortranarray))
        fused = _fused()
    threads = backends.get_num_threads()
    passed = failed = left_out = 0
    for backend, isa, reason in _runs(numba or backends.active_name() == "numba"):
        name = f"{backend}/{isa}" if isa else backend
        if reason:
            left_out += 1
            print(f"{name:10}  {'skip' if reason == COMPILES else 'n/a '}  {reason}")
            continue
        if backend == "numba":
            print(f"{name:10}  ...   compiling, which takes minutes the first time")
        start = time.perf_counter()
        checks, problems = 0, []
        try:
            with _running(backend, isa) as module:
                for problem in _check(module, vectors, exact, fused):
                    checks += 1
                    problems += [problem] if problem else []
        except Exception as error:  # whatever a broken backend raises is its result
            checks += 1
            problems.append(f"{type(error).__name__}: {error}")
        finally:
            backends.set_num_threads(threads)
        if problems:
            failed += 1
            print(f"{name:10}  FAIL  {len(problems)} of {checks} checks, first: {problems[0]}")
        else:
            passed += 1
            print(f"{name:10}  PASS  {checks} checks, {time.perf_counter() - start:.1f} s")
    ok = passed > 0 and failed == 0
    print(f"{'PASS' if ok else 'FAIL'}: {passed} passed, {failed} failed, {left_out} not checked")
    return ok


def _runs(numba: bool) -> Iterator[tuple[str, str | None, str | None]]:
    """Every backend, C once per instruction set, with the reason where it isn't checked."""
    for backend, reason in backends.reasons().items():
        if backend == "numba" and not (numba or reason):
            yield backend, None, COMPILES
        elif backend != "c" or reason:
            yield backend, None, reason
        else:
            usable = backends.load("c").usable_isas()
            for isa in ISAS:
                yield backend, isa, None if isa in usable else "not an instruction set of this processor, or not built"


@contextlib.contextmanager
def _running(backend: str, isa: str | None) -> Iterator[ModuleType]:
    """Makes a backend and instruction set the ones that run, until the block ends. CUDA runs for arrays on a GPU."""
    if backend == backends.CUDA:
        yield backends.cuda_backend()
        return
    with backends.use_backend(backend):
        module = backends.load(backend)
        before = module.isa() if isa else None
        if isa:
            module.select_isa(isa)
        try:
            yield module
        finally:
            if isa:
                module.select_isa(before)


def _check(module: ModuleType, vectors: Any, exact: dict[str, Array], fused: dict[str, list[Array]]) -> Problems:
    if hasattr(module, "upload"):  # CUDA
        upload = module.upload
        yield from _same(_through_the_api(upload, without=("bfloat16",)), exact, any_nan=True)  # Numba has no bfloat16
        yield from _near(_fused(upload, without=("bfloat16",)), fused)
        return
    yield from _philox(module, vectors["philox"])
    yield from _golden(vectors["masks"])
    if module is reference:
        return
    for threads, way in itertools.product(THREADS, WAYS):
        backends.set_num_threads(threads)
        with use_policy(way):
            for problem in _same(_plain(module), exact):
                yield f"{problem}, threads = {threads}, {way}" if problem else None
    yield from _same(_through_the_api(np.asfortranarray), exact)
    for way in WAYS[:2]:
        with use_policy(way):
            yield from _near(_fused(), fused)


# ---- the specification ----


def _philox(module: ModuleType, answers: Any) -> Problems:
    for answer in answers:
        counter, key, expected = (tuple(int(word, 16) for word in answer[part]) for part in ("counter", "key", "out"))
        same = tuple(int(word) for word in module.philox4x32_10(counter, key)) == expected
        yield None if same else f"Philox4x32-10 of counter {counter} is not the published answer"


def _golden(masks: Any) -> Problems:
    for mask in masks:
        words = np.array([int(word, 16) for word in mask["words"]], np.uint32)
        state = Stream(int(mask["seed"], 16), int(mask["offset"], 16))
        drawn = draw_mask(32 * words.size, mask["p"], rng=state, first_cell=32 * mask["first_word"]).words
        yield _difference(f"golden mask p = {mask['p']}, word {mask['first_word']}", drawn, words)


# ---- plain dropout, bit for bit ----


def _plain(module: ModuleType) -> Named:
    """What the primitives of a backend make of data of each dtype."""
    for name, (tag, _) in DTYPES.items():
        for n in LENGTHS:
            for what, array in _dropped(module, tag, _data(name, n), P):
                yield f"{what} of {name}, n = {n:,}", array
    for p in OTHER_P:
        for what, array in _dropped(module, core_checks.FLOAT32, _data("float32", LENGTHS[-1]), p):
            yield f"{what} of float32, p = {p:.3g}", array


def _dropped(module: ModuleType, tag: int, x: Array, p: float) -> Named:
    n, threshold = x.size, threshold_of(p)
    inverted = keep_scale(threshold), 0.0, 0.0
    draw = POSITION, n, SEED, OFFSET, threshold

    def result(primitive: str, *arguments: Any) -> Array:
        y = _poisoned(x)
        getattr(module, primitive)(tag, x, y, *arguments)
        return y

    words = _poisoned(np.empty(word_count(n), np.uint32))
    yield "forward", result("dropout_forward", words, *draw, *inverted)
    yield "mask", words
    yield "backward", result("masked_affine", words, 0, 1, 1, n, *inverted)
    yield "forward without storing the mask", result("dropout_forward", None, *draw, *inverted)
    yield "alpha dropout", result("dropout_forward", None, *draw, 1.3, -0.2, 0.7)
    yield "a stored affine", result("masked_affine", words, 0, 1, 1, n, 1.3, -0.2, 0.7)
    yield "Gaussian dropout", result("gaussian_multiply", POSITION, n, SEED, OFFSET, 0.5)
    shifted = np.zeros(word_count(POSITION + n), np.uint32)
    module.draw_bits(shifted, POSITION, *draw)
    in_place = x.copy()
    module.masked_affine(tag, in_place, in_place, shifted, POSITION, 1, 1, n, *inverted)
    yield "backward in place, mask off the word border", in_place
    part = _poisoned(np.empty(word_count(6 * (n // 8)), np.uint32))
    module.draw_rows(part, 0, POSITION, 2, n, 3, n // 4, n // 8, *draw[2:])
    yield "a part of a mask", part
    if n >= math.prod(SHARED):
        x = x[: math.prod(SHARED)]
        yield "mask shared along an axis", result("masked_affine", shifted, POSITION, *SHARED, *inverted)
    outer, length, inner, block = 2, n // 8, 3, 5
    blocks = _poisoned(np.empty(word_count(outer * (length + block - 1) * inner), np.uint32))
    module.dilate_bits(blocks, words, outer, length, inner, block)
    yield "blocks", blocks


def _through_the_api(place: Place, without: tuple[str, ...] = ()) -> Named:
    """Forward and backward by the backend that runs."""
    for dtype in _dtypes(without):
        for shape in (1,), (33,), (301, 500):
            x = place(_data("float32", math.prod(shape)).astype(dtype).reshape(shape))
            y, mask = dropout(x, P, rng=SEED)
            again, seed = dropout(x, P, rng=SEED, store="seed")
            words: Any = getattr(mask, "words", None)
            results = {"forward": y, "mask": words, "backward": dropout_backward(x, mask)}
            results |= {"forward, seed kept": again, "backward, seed kept": dropout_backward(x, seed)}
            for what, array in results.items():
                yield f"{what} of {dtype.name} through the API, shape {shape}", to_host(array)


def _same(results: Named, expected: dict[str, Array], any_nan: bool = False) -> Problems:
    for name, array in results:
        yield _difference(name, array, expected[name], any_nan)


def _difference(name: str, got: Array, expected: Array, any_nan: bool = False) -> str | None:
    """None if every bit is the same. With ``any_nan`` a NaN may be any NaN: the arithmetic of a GPU has only one."""
    got, expected = np.ascontiguousarray(got).reshape(-1), np.ascontiguousarray(expected).reshape(-1)
    bits = f"u{got.itemsize}"
    same = got.view(bits) == expected.view(bits)
    if any_nan:
        same |= (got != got) & (expected != expected)
    return None if same.all() else f"{name} differs from element {int(same.argmin()):,} on"


# ---- fused ops, to rounding ----


def _fused(place: Place = np.asarray, without: tuple[str, ...] = ()) -> dict[str, list[Array]]:
    """Results and gradients of the fused ops by the backend that runs."""
    results = {}
    for dtype in _dtypes(without):
        for name, call in _fused_calls(dtype, ROWS, place).items():
            results[f"{name}, {dtype.name}"] = _there_and_back(call, place)
    calls = _fused_calls(np.dtype(np.float32), LONG_ROWS, place)
    for name in ("bias_dropout_add", "dropout_add_layer_norm", "softmax_dropout"):
        results[f"{name}, float32, long rows"] = _there_and_back(calls[name], place)
    return results


def _fused_calls(dtype: np.dtype[Any], shape: tuple[int, int], place: Place) -> dict[str, Callable[..., Any]]:
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


def _there_and_back(call: Callable[..., Any], place: Place) -> list[Array]:
    """A call's results and its gradients."""
    *outputs, saved = call(p=P, rng=SEED)
    down = [place(np.resize(np.sin(np.arange(1009)), y.shape).astype(y.dtype)) for y in outputs]
    return [to_host(array) for array in (*outputs, *saved.backward(*down)) if array is not None]


def _near(results: dict[str, list[Array]], expected: dict[str, list[Array]]) -> Problems:
    for name, arrays in results.items():
        for i, (got, wanted) in enumerate(zip(arrays, expected[name], strict=True)):
            exact = wanted.astype(np.float64)
            room = NEAR[name.split(", ")[1]] * (np.abs(exact) + np.abs(exact).mean())
            same = got.shape == wanted.shape and bool((np.abs(got.astype(np.float64) - exact) <= room).all())
            yield None if same else f"{name}: {'gradient' if i else 'result'} {i} is not the reference's"


# ---- arrays ----


def _dtypes(without: tuple[str, ...]) -> list[np.dtype[Any]]:
    """Those that NumPy has here, but for some."""
    dtypes: list[np.dtype[Any]] = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)]
    with contextlib.suppress(ImportError):
        import ml_dtypes

        dtypes.append(np.dtype(ml_dtypes.bfloat16))
    return [dtype for dtype in dtypes if dtype.name not in without]


def _data(name: str, n: int) -> Array:
    """Normal values, and those that a multiplication in place of a selection would betray."""
    values = np.random.default_rng(0).standard_normal(1009).astype(np.float32)
    for i, special in enumerate((np.inf, -np.inf, np.nan, -0.0, 1e-7, 65504.0)):
        values[i + 7 :: 101] = special
    stored = float32_to_bfloat16(values) if name == "bfloat16" else values.astype(DTYPES[name][1])
    return np.resize(stored, n)


def _poisoned(like: Array) -> Array:
    """A new array of the same kind, full of what no result is."""
    array = np.empty_like(like)
    array.view(np.uint8).fill(POISON)
    return array

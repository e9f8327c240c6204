"""Compiles all kernels before the first one is timed or tested, in several processes.

A process that is spawned finds a function by its module, and does not import a ``__main__``: so this is a module.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

from fastdrop.backends.cuda import compile
from fastdrop.backends.cuda.compile import Variant
from fastdrop.backends.cuda.tile import ITEM_BYTES
from fastdrop.core.activations import ACTIVATIONS
from fastdrop.core.checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

from .processes import Task


def compile_all(task: Task) -> dict[str, Any]:
    cc = tuple(task.machine.describe()["compute_capability"])
    variants = every_variant()[: 1 if task.dry_run else None]
    workers = min(len(variants), os.cpu_count() or 1, 16)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, [cc] * len(variants), variants))
    return {"kernels": len(variants), "workers": workers}


def every_variant() -> list[Variant]:
    """All that is timed or tested."""
    tags = range(len(ITEM_BYTES))
    found = [Variant(body) for body in ("draw_words", "draw_rows", "dilate_bits", "count_bits")]
    found += [Variant("gaussian_multiply", tag) for tag in tags]
    counted = ("elementwise", "stored"), ("strided", "wide"), ("strided", "narrow")
    found += [Variant(body, tag, form, counted=True) for tag in tags for body, form in counted]
    for body, forms in (("elementwise", ("drawn", "drawn_shifted", "stored")), ("strided", ("wide", "narrow"))):
        found += [Variant(body, tag, form, plain) for tag in tags for form in forms for plain in (True, False)]
    found += [Variant("add_panels", tag, "narrow", residual_dtype=tag) for tag in (FLOAT32, FLOAT64)]
    forms = "wide", "narrow"
    for tag, of_sum in (*zip(tags, tags, strict=True), (FLOAT16, FLOAT32), (BFLOAT16, FLOAT32)):
        of = partial(Variant, dtype=tag, residual_dtype=of_sum)
        for code in ACTIVATIONS.values():
            found += [of(body, activation=code) for body in ("pointwise_forward", "pointwise_backward")]
            found += [of("pointwise_columns", form=form, activation=code) for form in forms]
        norms = "norm_forward", "norm_backward", "norm_columns"
        bodies = (*norms, "softmax_forward", "softmax_backward") if tag == of_sum else norms
        found += [of(body, form=form) for body in bodies for form in forms]
    return found


def compile_one(cc: tuple[int, int], variant: Variant) -> None:
    compile.image(variant, cc)

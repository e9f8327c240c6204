"""The cases of plain dropout: operation x variant x dtype x size x p x threads, and the peers of each.

A variant is a backend, with its instruction set if it has several. Every case runs beside ``torch.mul``. Kernels at
p = 0.1 also run beside the limits, which are the least that any pass over this memory takes. Whole calls of the best C
variant also meet the dropouts that people use today, up to 16M, and Numba meets C.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from fastdrop import backends
from fastdrop.backends import c as native

from .. import contenders

SIZES = {"64k": 1 << 16, "1M": 1 << 20, "16M": 1 << 24, "64M": 1 << 26}
DTYPES = ("float32", "float64", "float16", "bfloat16")
PROBABILITIES = (0.1, 0.5)
THREADS = (1, 2)
OPERATIONS = ("forward", "backward", "forward+backward")
# Slow variants and peers stop where a single call takes long; what they cost per element no longer changes there.
LARGEST = {"numpy": SIZES["1M"], "c-scalar": SIZES["16M"]}
PEERS_LARGEST = SIZES["16M"]
# The mask of a shard of 8, of a million cells: rows, the whole's columns, the shard's. The second is aligned.
ROWS = {"draw_rows, 125 columns": (8388, 1000, 125), "draw_rows, 512 columns": (2048, 4096, 512)}
MAIN_MEMORY = (SIZES["16M"], SIZES["64M"])


@dataclass(frozen=True)
class Case:
    operation: str
    variant: str
    dtype: str
    size: int
    p: float
    threads: int
    level: str = "kernel"  # the primitives over given memory; "call": the public function, Python's share included
    store: str = "bits"

    @property
    def id(self) -> str:
        """What it computes, then who: a comparison of two runs goes by it."""
        size = next(name for name, n in SIZES.items() if n == self.size)
        extra = "" if self.store == "bits" else f"-{self.store}"
        threads = contenders.threads_id(self.threads)
        return f"{self.operation}-{self.level}{extra}-{self.dtype}-{size}-p{self.p}-{threads}-{self.contender}"

    @property
    def contender(self) -> str:
        """The variant that ``auto`` takes is plainly fastdrop, so that its case has one name on all machines."""
        return contenders.FASTDROP if self.variant == best() else self.variant

    @property
    def has_limits(self) -> bool:
        """Whether it runs beside the limits; they do not depend on p."""
        return self.p == 0.1 and self.level == "kernel" and self.variant not in LARGEST

    @property
    def has_others(self) -> bool:
        """Whether it runs beside the dropouts that people use today."""
        return self.level == "call" and self.size <= PEERS_LARGEST

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def variants() -> list[str]:
    """Those that can run here."""
    here = [name for name, reason in backends.reasons().items() if reason is None]
    isas = [f"c-{isa}" for isa in native.usable_isas()] if "c" in here else []
    return isas + [name for name in here if name != "c"]


@functools.cache
def best() -> str:
    """The variant that ``auto`` takes; as it was when cases were collected, because they run under other variants."""
    name = backends.active_name()
    return f"c-{native.usable_isas()[-1]}" if name == "c" else name


def every_case() -> Iterator[Case]:
    for size in SIZES.values():
        for dtype in DTYPES:
            for p in PROBABILITIES:
                for threads in THREADS:
                    for operation in OPERATIONS:
                        for variant in variants():
                            if size <= LARGEST.get(variant, size) and not (variant == "numpy" and threads > 1):
                                yield Case(operation, variant, dtype, size, p, threads)
    yield from call_cases(DTYPES, PROBABILITIES, THREADS)


def call_cases(
    dtypes: tuple[str, ...] = ("float32",),
    probabilities: tuple[float, ...] = PROBABILITIES,
    threads: tuple[int, ...] = (1,),
) -> Iterator[Case]:
    """Whole calls of the public functions; beyond `PEERS_LARGEST` for float32 on one thread only."""
    for size in SIZES.values():
        for dtype in dtypes:
            for p in probabilities:
                for n in threads:
                    if size <= PEERS_LARGEST or (dtype, n) == ("float32", 1):
                        for operation in OPERATIONS:
                            yield Case(operation, best(), dtype, size, p, n, "call")
    yield Case("backward", best(), "float32", SIZES["16M"], 0.1, 1, "call", "seed")


def quick_cases() -> Iterator[Case]:
    """The rows of the speed table that the project holds itself to."""
    chosen = best()
    others = {*variants()} - {chosen}
    for size in SIZES.values():
        for p in PROBABILITIES:
            yield Case("forward", chosen, "float32", size, p, 1)
        yield Case("backward", chosen, "float32", size, 0.1, 1)
        if size > SIZES["64k"]:
            yield Case("forward+backward", chosen, "float32", size, 0.1, 2)
        for dtype in ("bfloat16", "float16"):
            yield Case("forward", chosen, dtype, size, 0.1, 1)
            if size == SIZES["16M"]:
                yield Case("backward", chosen, dtype, size, 0.1, 1)
    for size in MAIN_MEMORY:
        for operation in ("forward", "backward"):
            yield Case(operation, chosen, "float32", size, 0.1, 2)
    for size in (SIZES["64k"], SIZES["16M"]):
        for variant in ("c-avx2", "numba"):
            if variant in others:
                yield Case("forward", variant, "float32", size, 0.1, 1)
    if "numba" in others:
        yield Case("backward", "numba", "float32", SIZES["16M"], 0.1, 1)
    yield from call_cases()

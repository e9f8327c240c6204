"""``fastdrop bench``: a paired benchmark that needs nothing but the installed package.

Decides what is timed against what, and how it is put: everything alternates in one run (`timing`), over shared buffers
(`contenders`), times are medians, and ratios are paired. No numbers come from an installation that fails its selftest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import sys
from typing import Any

import numpy as np

from .. import __version__, backends
from . import contenders, selftest
from .contenders import LIMIT, TORCH_MUL, Buffers, Contender
from .info import version
from .timing import Timing, alternate

HELP = "time dropout here against NumPy, F.dropout and a bare multiplication"
DESCRIPTION = (
    "Times forward, backward and both against NumPy's dropout, F.dropout and torch.mul (where torch is installed) and, "
    "on the C backend with one thread, a bare multiplication written the way the kernels write. Medians of alternating "
    "runs; ratios are taken within a round of these. Runs the selftest first and refuses to go on if it fails."
)

SUFFIXES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
DTYPES = ("float32", "float64", "float16", "bfloat16")
DIRECTIONS = {"forward": 1, "backward": 1, "forward + backward": 2}  # passes over data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        type=sizes,
        default="64k,1M,16M",
        metavar="N,N,...",
        help="elements, with k, M or G for 2**10, 2**20, 2**30 (default: %(default)s)",
    )
    parser.add_argument("--p", type=probability, default="0.1", help="drop probability (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument(
        "--threads",
        type=threads,
        default="1",
        metavar="N",
        help="for fastdrop and torch; NumPy has one (default: %(default)s)",
    )
    parser.add_argument("--backend", choices=tuple(backends.MODULES), help="default: the one that fastdrop takes here")
    parser.add_argument(
        "--seconds", type=seconds, default="1", metavar="S", help="per size and direction, about (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results, with all samples, to FILE")


def sizes(text: str) -> list[int]:
    """The numbers of elements in "64k,1M".

    >>> sizes("64k,1M,1000")
    [65536, 1048576, 1000]
    """
    return [_size(part.strip()) for part in text.split(",")]


def _size(text: str) -> int:
    factor = SUFFIXES.get(text[-1:].lower(), 1)
    digits = text if factor == 1 else text[:-1]
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(
            f"a size must be a positive number with or without k, M or G, but got {text!r}"
        )
    return int(digits) * factor


def probability(text: str) -> float:
    return _between(text, 0.0, 1.0)


def seconds(text: str) -> float:
    return _between(text, 0.0, math.inf)


def _between(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low < value < high:
        raise argparse.ArgumentTypeError(f"must be a number above {low:g} and below {high:g}, but got {text!r}")
    return value


def threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"must be from 1 to 256, but got {text!r}")
    return int(text)


def main(args: argparse.Namespace) -> int:
    try:
        dtype = _dtype(args.dtype)
    except ImportError:
        return _refuse("bfloat16 arrays need ml_dtypes: pip install ml_dtypes")
    lines: list[str] = []
    if not selftest.run(print=lines.append):
        return _refuse("the selftest fails here, and numbers from a wrong kernel mean nothing:\n" + "\n".join(lines))
    torch = contenders.import_torch()
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(args.json, "w")) if args.json else None
            if args.backend:
                stack.enter_context(backends.use_backend(args.backend))
        except (OSError, RuntimeError) as error:  # can't be written; can't run here
            return _refuse(str(error))
        stack.enter_context(contenders.threads(args.threads, torch))
        report = _report(args, dtype, torch)
        if file:
            json.dump(report, file, indent=1)
    return 0


def _refuse(why: str) -> int:
    print(f"fastdrop bench: {why}", file=sys.stderr)
    return 1


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


def _report(args: argparse.Namespace, dtype: np.dtype[Any], torch: Any) -> dict[str, Any]:
    """Times and prints everything; returns what ``--json`` writes."""
    about = {
        "fastdrop": __version__,
        "backend": backends.active_name(),
        "backend_details": backends.active().describe(),
        "threads": args.threads,
        "dtype": args.dtype,
        "p": args.p,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": version("torch"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    print(f"fastdrop {__version__}: {about['backend_details']}")
    print(f"NumPy {np.__version__}, torch {about['torch'] or 'not installed'}, Python {platform.python_version()}")
    print(f"{args.dtype}, p = {args.p}, {args.threads} thread{'s' if args.threads > 1 else ''}")
    print("GB/s: data read and written, masks not counted. Ratios below 1 are faster than the one named.\n")
    results = []
    for size in args.sizes:
        print(f"{size:,} elements")
        buffers = Buffers.of((size,), dtype)
        entrants = _entrants(buffers, args.p, args.threads, torch)
        for direction, passes in DIRECTIONS.items():
            calls = {e.name: {"forward": e.forward, "backward": e.backward}.get(direction, e.both) for e in entrants}
            timings = alternate(calls, seconds=args.seconds)
            rows = [_row(name, timings, size, dtype.itemsize * 2 * passes) for name in timings]
            _print_rows(direction, rows)
            results += [{"elements": size, "direction": direction, **row} for row in rows]
        _print_kept(entrants)
    return {**about, "results": results}


def _entrants(buffers: Buffers, p: float, threads: int, torch: Any) -> list[Contender]:
    entrants: list[Contender | None] = [contenders.fastdrop(buffers, p), contenders.plain_numpy(buffers, p)]
    if torch is not None:
        entrants += [contenders.torch_dropout(torch, buffers, p), contenders.torch_mul(torch, buffers, p)]
    if threads == 1:  # the limit has one
        entrants.append(contenders.scale_limit(buffers, p))
    return [entrant for entrant in entrants if entrant]


def _row(name: str, timings: dict[str, Timing], size: int, bytes_per_element: int) -> dict[str, Any]:
    timing = timings[name]
    return {
        "name": name,
        "ns_per_element": timing.median / size * 1e9,
        "spread": timing.spread,
        "gb_per_s": bytes_per_element * size / timing.median / 1e9,
        "ratio_to_torch_mul": timing.ratio(timings[TORCH_MUL]) if TORCH_MUL in timings else None,
        "ratio_to_limit": timing.ratio(timings[LIMIT]) if LIMIT in timings else None,
        "seconds_per_call": list(timing.samples),
    }


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"  {title:24}{'ns/element':>12}{'spread':>9}{'GB/s':>8}{'/ torch.mul':>13}{'/ limit':>9}")
    for row in rows:
        print(
            f"    {row['name']:22}{row['ns_per_element']:12.3f}{row['spread']:9.0%}{row['gb_per_s']:8.1f}"
            f"{_ratio(row['ratio_to_torch_mul']):>13}{_ratio(row['ratio_to_limit']):>9}"
        )


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _print_kept(entrants: list[Contender]) -> None:
    kept = ", ".join(f"{e.name} {e.kept:.3f}" for e in entrants if e.kept is not None)
    print(f"  bytes kept for backward per element: {kept}\n")

"""``fastdrop bench``: how much faster fastdrop is here than what people use today.

It needs nothing but an installed package. Each row is one comparison whose two sides take turns (`timing`). The
benchmarks in the source folder (``pytest bench``) measure far more.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import __version__, backends
from ..arrays.dropout import dropout, dropout_backward
from ..core.random import Stream
from .timing import alternate

HELP = "time fastdrop against plain NumPy and torch on this machine"
DESCRIPTION = (
    "Times dropout of float32 in several sizes: fastdrop beside the formula in plain NumPy and, where torch is "
    "installed, beside torch's F.dropout. The two sides of a row take turns, so that both meet the same machine. Each "
    "row is printed as soon as it is measured."
)
EPILOG = """examples:
  fastdrop bench --quick                      up to 1M elements, in 20 seconds
  fastdrop bench                              up to 16M elements, in two minutes
  fastdrop bench --quick --output speed.png   a picture, too (needs matplotlib)
  fastdrop bench --quick --json > speed.json  for scripts

Close other programs first. "faster" is the median of ratios of samples that
were taken one after the other, so it is more exact than the times.

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted
"""

Array = NDArray[Any]
Calls = tuple[Callable[[], object], Callable[[], object]]  # fastdrop's, the peer's

SIZES = {"4k": 1 << 12, "64k": 1 << 16, "1M": 1 << 20, "16M": 1 << 24}
QUICK_SIZES = ("4k", "64k", "1M")
SECONDS, QUICK_SECONDS = 3.0, 0.6  # of a row
FORWARD, BACKWARD = "forward", "backward"
PLAIN_NUMPY, F_DROPOUT = "plain NumPy", "F.dropout"
PICTURES = (".png", ".svg", ".pdf")
COLORS = {"fastdrop": "#D55E00", "peer": "#0072B2"}  # Okabe and Ito's: colour-blind people tell them apart


class Row(NamedTuple):
    """One comparison. ``ratio``: the median of fastdrop's time over the peer's in the same round."""

    face: str
    operation: str
    size: str
    elements: int
    seconds: float
    peer: str
    peer_seconds: float
    ratio: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer sizes and samples: below 20 seconds")
    parser.add_argument(
        "--output", metavar="PICTURE", type=_picture, help="draw the times to a .png, .svg or .pdf file"
    )
    parser.add_argument("--json", action="store_true", help="print JSON; the rows go to the standard error meanwhile")
    parser.add_argument("--threads", metavar="N", type=_count, default=1, help="threads of both sides (default: 1)")
    parser.add_argument("--p", metavar="P", type=_rate, default=0.1, help="the rate of dropout (default: 0.1)")


def main(args: argparse.Namespace) -> int:
    if args.output and importlib.util.find_spec("matplotlib") is None:
        print("fastdrop: --output needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    torch = import_torch()
    with threads(args.threads, torch):
        run = {
            "fastdrop": __version__,
            "backend": backends.active().describe(),
            "torch": None if torch is None else str(torch.__version__),
            "numpy": np.__version__,
            "threads": args.threads,
            "dtype": "float32",
            "p": args.p,
        }
        rows = _measure_and_show(run, args.quick, torch, sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps({**run, "rows": [row._asdict() for row in rows]}, indent=2))
    if args.output:
        _draw(run, rows, args.output)
        print(f"wrote {args.output}", file=sys.stderr if args.json else sys.stdout)
    return 0


def import_torch() -> Any:
    """torch, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch


@contextlib.contextmanager
def threads(n: int, torch: Any) -> Iterator[None]:
    """Gives fastdrop and torch, unless it is None, so many threads until the block ends."""
    before = backends.get_num_threads(), torch and torch.get_num_threads()
    backends.set_num_threads(n)
    try:
        if torch is not None:
            torch.set_num_threads(n)
        yield
    finally:
        backends.set_num_threads(before[0])
        if torch is not None:
            torch.set_num_threads(before[1])


def numpy_dropout(x: Array, p: float, rng: np.random.Generator) -> tuple[Array, NDArray[np.bool_]]:
    """Dropout as people write it in NumPy, with the mask to keep for backward."""
    keep = rng.random(x.shape) >= p
    return numpy_dropout_backward(x, keep, p), keep


def numpy_dropout_backward(dy: Array, keep: NDArray[np.bool_], p: float) -> Array:
    dx: Array = dy * keep * dy.dtype.type(1.0 / (1.0 - p))
    return dx


def _measure_and_show(run: dict[str, Any], quick: bool, torch: Any, file: Any) -> list[Row]:
    def show(line: str) -> None:
        print(line, file=file, flush=True)

    show(f"fastdrop {run['fastdrop']}, backend {run['backend']}")
    show(f"NumPy {run['numpy']}, torch {run['torch'] or 'not installed'}")
    show(f"dropout of float32, p = {run['p']}, threads: {run['threads']}; microseconds per call")
    if backends.active_name() == "numba":
        show("Numba compiles first, which can take a minute")
    show("")
    header = f"{'API':6} {'operation':9} {'elements':>8} {'fastdrop':>11} {'peer':>11}  {'':11} {'faster':>8}"
    show(header.rstrip())
    sizes = {name: SIZES[name] for name in (QUICK_SIZES if quick else SIZES)}
    rows = []
    for row in _rows(sizes, run["p"], torch, QUICK_SECONDS if quick else SECONDS):
        rows.append(row)
        show(
            f"{row.face:6} {row.operation:9} {row.size:>8} {1e6 * row.seconds:11,.1f} {1e6 * row.peer_seconds:11,.1f}  "
            f"{row.peer:11} {1 / row.ratio:7.2f}x"
        )
    return rows


def _rows(sizes: dict[str, int], p: float, torch: Any, seconds: float) -> Iterator[Row]:
    faces: dict[str, tuple[str, Callable[[Array, float], dict[str, Calls]]]] = {"NumPy": (PLAIN_NUMPY, _numpy_calls)}
    if torch is not None:
        faces["torch"] = (F_DROPOUT, lambda x, p: _torch_calls(torch, x, p))
    for face, (peer, calls_of) in faces.items():
        for size, elements in sizes.items():
            x = np.random.default_rng(0).standard_normal(elements, np.float32)
            for operation, (ours, theirs) in calls_of(x, p).items():
                timings = alternate({"": ours, peer: theirs}, seconds=seconds)
                ratio = timings[""].ratio(timings[peer])
                yield Row(face, operation, size, elements, timings[""].median, peer, timings[peer].median, ratio)


def _numpy_calls(x: Array, p: float) -> dict[str, Calls]:
    """Whole calls of the public functions, which allocate what they return, as the formula does."""
    stream, rng, dy = Stream(0), np.random.default_rng(0), x[::-1].copy()
    _, mask = dropout(x, p, rng=stream)
    _, keep = numpy_dropout(x, p, rng)
    return {
        FORWARD: (lambda: dropout(x, p, rng=stream), lambda: numpy_dropout(x, p, rng)),
        BACKWARD: (lambda: dropout_backward(dy, mask), lambda: numpy_dropout_backward(dy, keep, p)),
    }


def _torch_calls(torch: Any, x: Array, p: float) -> dict[str, Calls]:
    """As a training step calls them: recorded by autograd."""
    import fastdrop.torch as fdt

    leaf, dy = torch.from_numpy(x).requires_grad_(), torch.from_numpy(x[::-1].copy())
    theirs, grad = torch.nn.functional.dropout, torch.autograd.grad
    y, their_y = fdt.dropout(leaf, p), theirs(leaf, p)
    return {
        FORWARD: (lambda: fdt.dropout(leaf, p), lambda: theirs(leaf, p)),
        BACKWARD: (
            lambda: grad(y, leaf, dy, retain_graph=True),
            lambda: grad(their_y, leaf, dy, retain_graph=True),
        ),
    }


def _draw(run: dict[str, Any], rows: list[Row], path: Path) -> None:
    """Nanoseconds per element over sizes: a panel for each face and operation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    faces = list(dict.fromkeys(row.face for row in rows))
    size = (9.0, 2.9 * len(faces) + 0.8)
    figure, panels = plt.subplots(len(faces), 2, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for line, face in zip(panels, faces, strict=True):
        for axis, operation in zip(line, (FORWARD, BACKWARD), strict=True):
            shown = [row for row in rows if (row.face, row.operation) == (face, operation)]
            elements = [row.elements for row in shown]
            for name, marker, times in (
                ("fastdrop", "o", [row.seconds for row in shown]),
                ("peer", "D", [row.peer_seconds for row in shown]),
            ):
                values = [1e9 * time / n for time, n in zip(times, elements, strict=True)]
                label = shown[0].peer if name == "peer" else f"fastdrop ({face})"
                axis.plot(elements, values, marker=marker, color=COLORS[name], linewidth=2, label=label)
            axis.set(xscale="log", yscale="log", title=f"{face}: {operation}")
            axis.set_xticks(elements, [row.size for row in shown])
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
    for axis in panels[:, 0]:
        axis.set_ylabel("ns per element")
    for axis in panels[-1]:
        axis.set_xlabel("elements")
    threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
    figure.suptitle(f"Dropout of float32, p = {run['p']}, {threads}; {run['backend']}", fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(PICTURES)}, but got {text!r}")
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.resolve().parent}")
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= backends.MAX_THREADS:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {backends.MAX_THREADS}, but got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        p = float(text)
    except ValueError:
        p = -1.0
    if not 0 < p < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, but got {text!r}")
    return p

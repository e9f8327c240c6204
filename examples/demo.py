"""Shows what dropout does to a network in NumPy, and what it costs beside F.dropout and plain NumPy.

    python examples/demo.py            # under a minute
    python examples/demo.py --quick    # a few seconds, to see that it runs

`make demo` runs it first. It trains a network on 400 of scikit-learn's 1,797 digits, with and without dropout. The
network has 300,000 weights, so without dropout it learns 400 digits by heart. Both networks start from the same weights
and see the same batches. The training is repeated on three splits of the data. Then the demo times one large dropout
layer and the training step, with one thread each because NumPy uses no more.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from matplotlib import rc_context
    from matplotlib.colors import to_hex, to_rgba_array
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
    from threadpoolctl import threadpool_limits  # comes with scikit-learn
except ImportError as error:
    from fastdrop.core.installing import how_to_install

    sys.exit(f"{error}. The demo needs scikit-learn, matplotlib and rich: {how_to_install('demo')}")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where bench/ is

from mlp import MLP, Dropout, FastDropout, NumpyDropout
from pictures import BLUE, DPI, GREEN, GREY, STYLE, VERMILLION, check_picture, mark_smoke_test

from bench import contenders
from bench.contenders import F_DROPOUT, FASTDROP, NUMPY, TORCH_MUL, Buffers
from fastdrop import Stream, __version__, backends
from fastdrop.cli.bench import import_torch
from fastdrop.cli.timing import Timing, alternate

Array = NDArray[Any]

SAMPLES = 400  # for training; the other 1,397 validate
WIDTHS = (64, 512, 512, 10)
P = 0.5  # Srivastava et al. 2014, for hidden layers
RATE, BATCH, EPOCHS, QUICK_EPOCHS = 0.05, 50, 80, 5
SPLITS, QUICK_SPLITS = 3, 1
LAYER, QUICK_LAYER = (2048, 2048), (256, 256)
LAYER_P = (0.1, 0.5)
SECONDS, QUICK_SECONDS = 3.0, 0.05  # per comparison
CURVES = ("training loss", "training accuracy", "validation loss", "validation accuracy")

NO_DROPOUT = "no dropout"
LABELS = {F_DROPOUT: "torch F.dropout", NUMPY: "plain NumPy", TORCH_MUL: "two torch.mul"}
COLOURS = {FASTDROP: VERMILLION, F_DROPOUT: BLUE, NUMPY: GREEN, TORCH_MUL: GREY}
LIGHT = {
    name: to_hex(0.5 + 0.5 * to_rgba_array(colour)[0, :3]) for name, colour in COLOURS.items()
}  # for the smaller p
WITH, WITHOUT = VERMILLION, GREY


@dataclass(frozen=True)
class Layer:
    """How one dropout layer fares: forward and backward."""

    timings: dict[float, dict[str, Timing]]  # by p
    kept: dict[str, float]  # bytes per element
    elements: int

    def names(self) -> list[str]:
        """The contenders that were timed, in the order to show them."""
        return [name for name in (FASTDROP, F_DROPOUT, NUMPY, TORCH_MUL) if name in self.timings[P]]

    def nanoseconds(self, p: float, name: str) -> float:
        return self.timings[p][name].median / self.elements * 1e9

    def ratio(self, p: float, name: str) -> float:
        """Its time over fastdrop's, of the medians shown."""
        return self.timings[p][name].median / self.timings[p][FASTDROP].median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="fastdrop-demo.png", help="the picture (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few epochs and short timings, to see that it runs")
    args = parser.parse_args()
    check_picture(parser, args.output)
    start = time.perf_counter()
    console = Console(highlight=False)
    console.print(f"fastdrop {__version__}: {backends.active().describe()}\n")
    with threadpool_limits(1, "blas"):  # matrices this small gain little, and lose much where the cores are shared
        curves = _train(console, args.quick)
        steps = _time_steps(args.quick)
    _print_training(console, curves)
    layer = _time_layer(console, args.quick)
    _print_layer(console, layer)
    _print_steps(console, steps)
    with rc_context(STYLE | {"axes.grid": False}):
        figure = _draw(curves, layer)
        if args.quick:
            mark_smoke_test(figure)
        figure.savefig(args.output, dpi=DPI)
    console.print(f"Picture: {args.output} ({time.perf_counter() - start:.0f} s in all)")


def _name(p: float) -> str:
    return f"dropout p = {p}" if p else NO_DROPOUT


def _sizes() -> str:
    return "-".join(map(str, WIDTHS))


# ---- training ----


def _train(console: Console, quick: bool) -> dict[float, Array]:
    """Curves [split, epoch, CURVES] for each p, 0 and P."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    epochs, splits = (QUICK_EPOCHS, QUICK_SPLITS) if quick else (EPOCHS, SPLITS)
    console.print(
        f"Training {_sizes()} on {SAMPLES} digits, validating on {len(images) - SAMPLES}, "
        f"{splits} split{'s' if splits > 1 else ''},\n"
        "from the same weights through the same batches with and without dropout"
    )
    curves = {p: np.zeros((splits, epochs, len(CURVES))) for p in (0.0, P)}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for p, curve in curves.items():
            task = progress.add_task(f"{_name(p):15}", total=splits * epochs)
            for split in range(splits):
                _train_one(p, split, images, labels, curve[split], partial(progress.advance, task))
    return curves


def _train_one(
    p: float, split: int, images: Array, labels: Array, curve: Array, after_epoch: Callable[[], object]
) -> None:
    """Trains one network on one split of the data and fills its curve."""
    rng = np.random.default_rng(split)  # of the split, the weights and the batches: the same for every p
    order = rng.permutation(len(images))
    train, validation = order[:SAMPLES], order[SAMPLES:]
    stream = Stream(split)
    network = MLP(WIDTHS, [FastDropout(p, stream) for _ in WIDTHS[1:-1]], rng)
    for at in curve:
        for batch in rng.permutation(train).reshape(-1, BATCH):
            network.step(images[batch], labels[batch], RATE)
        at[:2] = network.evaluate(images[train], labels[train])
        at[2:] = network.evaluate(images[validation], labels[validation])
        after_epoch()


def _print_training(console: Console, curves: dict[float, Array]) -> None:
    headings = ("", "accuracy\ntraining", "\nvalidation", "\ngap", "loss\ntraining", "\nvalidation", "\ngap")
    console.print("\n[bold]After training, mean over the splits")
    table = _table(headings)
    for p, curve in curves.items():
        loss, accuracy, validation_loss, validation_accuracy = curve[:, -1].mean(axis=0)
        table.add_row(
            _name(p),
            f"{accuracy:.1%}",
            f"{validation_accuracy:.1%}",
            f"{accuracy - validation_accuracy:.1%}",
            f"{loss:.4f}",
            f"{validation_loss:.3f}",
            f"{validation_loss - loss:.3f}",
        )
    console.print(table)


def _table(headings: tuple[str, ...]) -> Any:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)  # so that all fits 80 columns
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    return table


# ---- costs ----


def _time_layer(console: Console, quick: bool) -> Layer:
    shape, seconds = (QUICK_LAYER, QUICK_SECONDS) if quick else (LAYER, SECONDS)
    console.print(f"Timing a dropout layer on {shape[0]} x {shape[1]} float32 beside what people use today ...")
    torch = import_torch()
    buffers = Buffers.of(shape, np.dtype(np.float32))
    timings, kept = {}, {}
    with contenders.threads(1, torch):
        for p in LAYER_P:
            entrants = [contenders.fastdrop(buffers, p), contenders.plain_numpy(buffers, p)]
            if torch is not None:
                entrants += [contenders.torch_dropout(torch, buffers, p), contenders.torch_mul(torch, buffers, p)]
            timings[p] = alternate({entrant.name: entrant.both for entrant in entrants}, seconds=seconds)
            kept = {entrant.name: entrant.kept for entrant in entrants if entrant.kept is not None}
    return Layer(timings, kept, buffers.x.size)


def _time_steps(quick: bool) -> dict[str, Timing]:
    """The training step of the demo's network with each kind of dropout."""
    rng = np.random.default_rng(0)
    x, labels = rng.random((BATCH, WIDTHS[0]), np.float32), rng.integers(0, WIDTHS[-1], BATCH)
    stream = Stream(0)
    kinds: dict[str, Callable[[], Dropout]] = {
        FASTDROP: lambda: FastDropout(P, stream),
        NUMPY: lambda: NumpyDropout(P, rng),
        NO_DROPOUT: lambda: FastDropout(0.0, stream),
    }
    networks = {
        name: MLP(WIDTHS, [kind() for _ in WIDTHS[1:-1]], np.random.default_rng(0)) for name, kind in kinds.items()
    }
    calls = {name: (lambda network=network: network.step(x, labels, RATE)) for name, network in networks.items()}
    return alternate(calls, seconds=QUICK_SECONDS if quick else SECONDS)


def _print_layer(console: Console, layer: Layer) -> None:
    headings: list[str] = [""]
    for p in LAYER_P:
        headings += [f"p = {p}\nns/element", "against\nfastdrop"]
    console.print("\n[bold]The layer, forward + backward, one thread each")
    table = _table((*headings, "kept for backward\nbytes/element"))
    for name in layer.names():
        cells = [LABELS.get(name, name)]
        for p in LAYER_P:
            cells += [f"{layer.nanoseconds(p, name):.2f}", f"{layer.ratio(p, name):.1f} x"]
        cells.append(f"{layer.kept[name]:.3f}" if name in layer.kept else "")
        table.add_row(*cells)
    console.print(table)
    if TORCH_MUL in layer.names():
        console.print(f"({LABELS[TORCH_MUL]} drop nothing: that is what passing over the memory costs)")
    else:
        console.print(f"({LABELS[F_DROPOUT]}: torch is not installed)")


def _print_steps(console: Console, steps: dict[str, Timing]) -> None:
    console.print(f"\n[bold]Whole training step of the network above, batch of {BATCH}, p = {P}")
    table = _table(("", "ms", "against\nno dropout"))
    for name, timing in steps.items():
        label = LABELS.get(name, name) + (" dropout" if name != NO_DROPOUT else "")
        table.add_row(label, f"{timing.median * 1e3:.2f}", f"{timing.median / steps[NO_DROPOUT].median:.2f} x")
    console.print(table)


# ---- picture ----


def _draw(curves: dict[float, Array], layer: Layer) -> Figure:
    figure = Figure(figsize=(12.5, 6.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1), wspace=0.05)
    _draw_curves(left.subplots(), curves)
    top, bottom = right.subplots(2, 1, height_ratios=(1.8, 1), gridspec_kw={"hspace": 0.1})
    _draw_speed(top, layer)
    _draw_memory(bottom, layer)
    return figure


def _draw_curves(axes: Any, curves: dict[float, Array]) -> None:
    """Means over the splits, in a band from least to most."""
    for p, curve in curves.items():
        colour = WITH if p else WITHOUT
        epochs = np.arange(1, curve.shape[1] + 1)
        for column, line, kind in ((2, "-", "validation"), (0, "--", "training")):
            loss = curve[:, :, column]
            axes.fill_between(epochs, loss.min(axis=0), loss.max(axis=0), color=colour, alpha=0.12, linewidth=0)
            axes.plot(epochs, loss.mean(axis=0), line, color=colour, linewidth=2, label=f"{_name(p)}, {kind}")
        end = curve[:, -1].mean(axis=0)
        axes.annotate(
            f"{end[3]:.1%}\ncorrect",
            (epochs[-1], end[2]),
            (6, 0),
            textcoords="offset points",
            color=colour,
            va="bottom" if p == 0 else "top",
            annotation_clip=False,
        )
    axes.set(xlabel="epoch", ylabel="loss (cross-entropy, nats)", xlim=(1, epochs[-1]), ylim=(0, 0.5))
    axes.set_title(f"Digits: {SAMPLES} training samples, network {_sizes()}")
    axes.grid(axis="y")
    axes.legend(loc="upper right")


def _draw_speed(axes: Any, layer: Layer) -> None:
    names = layer.names()
    height = 0.38
    for i, (p, colours) in enumerate(zip(LAYER_P, (LIGHT, COLOURS), strict=True)):
        values = [layer.nanoseconds(p, name) for name in names]
        texts = [
            f"{value:.2f}" + (f"  ({layer.ratio(p, name):.1f} x)" if name != FASTDROP else "")
            for name, value in zip(names, values, strict=True)
        ]
        at = np.arange(len(names)) + (i - 0.5) * height
        bars = axes.barh(at, values, height * 0.94, color=[colours[name] for name in names])
        axes.bar_label(bars, texts, padding=4, fontsize=9.5)
    labels = [LABELS.get(name, name) + ("\n(no dropout)" if name == TORCH_MUL else "") for name in names]
    _finish_bars(axes, labels, "nanoseconds per element, forward + backward (times fastdrop's)")
    axes.set_title(f"Time of a dropout layer, {layer.elements:,} float32, one thread")
    keys = [
        Patch(color=colours[TORCH_MUL], label=f"p = {p}") for p, colours in zip(LAYER_P, (LIGHT, COLOURS), strict=True)
    ]
    axes.legend(handles=keys, loc="upper right")


def _draw_memory(axes: Any, layer: Layer) -> None:
    names = [name for name in layer.names() if name in layer.kept]
    bars = axes.barh(range(len(names)), [layer.kept[name] for name in names], 0.62, color=[COLOURS[n] for n in names])
    axes.bar_label(bars, [f"{layer.kept[name]:g}" for name in names], padding=4, fontsize=9.5)
    _finish_bars(axes, [LABELS.get(name, name) for name in names], "bytes per element")
    axes.set_title("Memory kept for the backward pass")


def _finish_bars(axes: Any, labels: list[str], quantity: str) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(quantity)
    axes.grid(axis="x")


if __name__ == "__main__":
    main()

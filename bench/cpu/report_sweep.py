"""Reports plain dropout over sizes: `python -m bench.cpu.report_sweep RESULTS.json` writes RESULTS.md and RESULTS.png.

The targets come first, those that were missed on top: at no size may the memory policy's choice, to stream or not, be
much slower than the other one. Then come all sizes, and a picture of them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .. import pictures
from ..contenders import F_DROPOUT, FASTDROP, LIMIT, TORCH_MUL, WAYS
from ..report import Row, machine_line, write

SIZES = tuple(1 << k for k in range(16, 28))
OPERATIONS, THREADS, P = ("forward", "backward"), (1, 2), 0.1
ALWAYS, NEVER = "always streaming", "never streaming"
JUDGED_FROM, AT_MOST = 1 << 20, 1.1  # of the better choice's time
DETAILS = "## Every size"
INTRO = (
    f"Dropout of float32 at p = {P}: the backend's primitives over memory that is there. Medians of alternating "
    "samples; every ratio is the median of ratios taken round by round. `always streaming` and `never streaming` are "
    "fastdrop with that choice forced, whatever the memory policy says. The limit is the fastest of four ways to read "
    f"and write these bytes once: {', '.join(WAYS)}. `F.dropout`, outside of autograd, runs apart from the others "
    "because it takes much longer, so it has no ratio."
)


def size_name(elements: int) -> str:
    return f"{elements >> 20}M" if elements >= 1 << 20 else f"{elements >> 10}k"


def better(row: Row) -> str:
    """The faster choice at this size."""
    return min((ALWAYS, NEVER), key=lambda name: row["peers"][name]["seconds"])


def chosen(row: Row) -> str:
    """What the policy in force does."""
    return ALWAYS if row["elements"] >= row["streams_from"] else NEVER


def report(run: dict[str, Any], rows: list[Row]) -> str:
    lines = ["# Benchmark report: sizes", "", machine_line(run), "", INTRO, ""]
    if missing := [size_name(size) for size in SIZES if not any(row["elements"] == size for row in rows)]:
        lines += [f"Not measured: {', '.join(missing)}. Their arrays take more than half of the free memory.", ""]
    lines += ["## Targets", "", "| what | against | size | at most | measured | |", "|---|---|---|---|---|---|"]
    judged = [(row, row["peers"][better(row)]["ratio"]) for row in rows if row["elements"] >= JUDGED_FROM]
    for row, ratio in sorted(judged, key=lambda one: one[1] <= AT_MOST):
        verdict = "met" if ratio <= AT_MOST else "**missed**"
        lines.append(
            f"| {what(row)} | {better(row)} | {size_name(row['elements'])} | {AT_MOST} | {ratio:.2f} | {verdict} |"
        )
    lines += ["", DETAILS, "", "Nanoseconds per element; then fastdrop's ratios."]
    for operation in OPERATIONS:
        for threads in THREADS:
            lines += table([row for row in rows if (row["operation"], row["threads"]) == (operation, threads)])
    return "\n".join(lines) + "\n"


def what(row: Row) -> str:
    return f"{row['operation']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def table(rows: list[Row]) -> list[str]:
    """The sizes of one operation on so many threads."""
    if not rows:
        return []
    columns = ["size", FASTDROP, "the policy's choice", ALWAYS, NEVER, TORCH_MUL, F_DROPOUT, LIMIT, "its way"]
    columns += ["/ the better choice", f"/ {TORCH_MUL}", f"/ {LIMIT}"]
    lines = [
        "",
        f"### {what(rows[0]).capitalize()}",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for row in rows:
        cells = [size_name(row["elements"]), f"{nanoseconds(row):.3f}", chosen(row)]
        for peer in (ALWAYS, NEVER, TORCH_MUL, F_DROPOUT, LIMIT):
            cells.append(f"{nanoseconds(row, peer):.3f}" if peer in row["peers"] else "")
        cells.append(row["peers"].get(LIMIT, {}).get("way", ""))
        ratios = [row["peers"].get(peer, {}).get("ratio") for peer in (better(row), TORCH_MUL, LIMIT)]
        lines.append("| " + " | ".join(cells + [f"{ratio:.2f}" if ratio else "" for ratio in ratios]) + " |")
    return lines


def nanoseconds(row: Row, peer: str = "") -> float:
    """Per element, of fastdrop or a peer."""
    return float(1e9 * (row["peers"][peer] if peer else row)["seconds"] / row["elements"])


STYLES: dict[str, dict[str, Any]] = {
    F_DROPOUT: {"color": pictures.GREEN, "linestyle": "-.", "marker": "s"},
    TORCH_MUL: {"color": pictures.BLUE, "linestyle": "--", "marker": "^"},
    ALWAYS: {"color": pictures.YELLOW, "linestyle": "-", "marker": "x"},
    NEVER: {"color": pictures.PURPLE, "linestyle": "-", "marker": "+"},
    FASTDROP: {"color": pictures.ORANGE, "linewidth": 3.0, "marker": "o", "zorder": 1.5},
    LIMIT: {"color": pictures.BLACK, "linestyle": ":", "marker": "."},
}


def plot(run: dict[str, Any], rows: list[Row], path: Path) -> None:
    """ns per element over size; a panel for each operation and number of threads."""
    figure, axes = pictures.pyplot().subplots(
        2, 2, figsize=(pictures.WIDTH, 7.2), sharex=True, sharey="row", layout="constrained"
    )
    for line, operation in zip(axes, OPERATIONS, strict=True):
        for axis, threads in zip(line, THREADS, strict=True):
            panel(axis, [row for row in rows if (row["operation"], row["threads"]) == (operation, threads)])
            axis.set(title=what({"operation": operation, "threads": threads}))
    for axis in axes[:, 0]:
        axis.set(ylabel="ns per element")
    for axis in axes[-1]:
        axis.set(xlabel="elements of float32")
    handles, labels = axes[0, 0].get_legend_handles_labels()  # forward has every curve
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Dropout over sizes, p = {P} ({run['machine_info']['cpu_name']})")
    pictures.save(figure, path)


def panel(axis: Any, rows: list[Row]) -> None:
    for peer, style in STYLES.items():
        name = "" if peer == FASTDROP else peer
        points = [(row["elements"], nanoseconds(row, name)) for row in rows if not name or name in row["peers"]]
        if points:
            label = f"{FASTDROP}, {peer}" if peer in (ALWAYS, NEVER) else peer
            axis.plot(*zip(*points, strict=True), label=label, **{"linewidth": 1.5, "markersize": 6, **style})
    pictures.time_axes(axis, {size_name(size): size for size in SIZES[::2]})
    for start in {row["streams_from"] for row in rows if row["streams_from"] <= SIZES[-1]}:
        axis.axvline(start, color="#777777", linestyle=(0, (1, 2)), label="policy: streams from here on")


if __name__ == "__main__":
    sys.exit(write(sys.argv[1:], __doc__ or "", report, plot, DETAILS))

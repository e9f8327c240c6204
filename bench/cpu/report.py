"""Reports plain dropout on a CPU: `python -m bench.cpu.report RESULTS.json` writes RESULTS.md and RESULTS.png.

The targets come first, those that were missed on top. The second table has every case: nanoseconds per element, GB/s,
and the ratio to the limit and to each peer. Ratios compare runs that alternated on the same machine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .. import pictures
from ..contenders import LIMIT, WAYS
from ..report import machine_line, write

SIZE_NAMES = {1 << 16: "64k", 1 << 20: "1M", 1 << 24: "16M", 1 << 26: "64M", 1000: "1000"}
PEER_COLUMNS = (LIMIT, "torch.mul", "F.dropout", "compiled F.dropout", "NumPy", "C", "bits", "draw_bits")
K64, M1, M16, M64 = 1 << 16, 1 << 20, 1 << 24, 1 << 26

# (what, peer, {size: at most}, and the case it is read from); ratios, medians of paired samples
# ruff: noqa: E501
TARGETS = [
    ("C forward, p = 0.1", "torch.mul", {K64: 1.6, M1: 1.0, M16: 0.85, M64: 0.85}, ("forward", "best", "float32", 0.1, 1)),
    ("C forward, p = 0.5", "torch.mul", {K64: 1.05, M1: 1.0, M16: 1.0, M64: 1.0}, ("forward", "best", "float32", 0.5, 1)),
    ("C backward", "torch.mul", {K64: 1.0, M1: 1.0, M16: 0.65, M64: 0.65}, ("backward", "best", "float32", 0.1, 1)),
    ("C forward, p = 0.1", LIMIT, {M16: 1.35, M64: 1.35}, ("forward", "best", "float32", 0.1, 1)),
    ("C backward", LIMIT, {M16: 1.15, M64: 1.15}, ("backward", "best", "float32", 0.1, 1)),
    ("C forward, p = 0.1, 2 threads", "torch.mul", {M16: 0.85, M64: 0.85}, ("forward", "best", "float32", 0.1, 2)),
    ("C backward, 2 threads", "torch.mul", {M16: 0.65, M64: 0.65}, ("backward", "best", "float32", 0.1, 2)),
    ("C forward, p = 0.1, 2 threads", LIMIT, {M16: 1.35, M64: 1.35}, ("forward", "best", "float32", 0.1, 2)),
    ("C backward, 2 threads", LIMIT, {M16: 1.15, M64: 1.15}, ("backward", "best", "float32", 0.1, 2)),
    ("forward + backward, 2 threads, against torch.mul twice", "torch.mul", {M1: 1.0, M16: 1.0, M64: 1.0},
     ("forward+backward", "best", "float32", 0.1, 2)),
    ("bfloat16 forward", "torch.mul", {K64: 1.4, M1: 1.4, M16: 0.85, M64: 1.0}, ("forward", "best", "bfloat16", 0.1, 1)),
    ("float16 forward", "torch.mul", {K64: 1.4, M1: 1.4, M16: 0.85, M64: 1.0}, ("forward", "best", "float16", 0.1, 1)),
    ("bfloat16 backward", "torch.mul", {M16: 0.85}, ("backward", "best", "bfloat16", 0.1, 1)),
    ("float16 backward", "torch.mul", {M16: 0.85}, ("backward", "best", "float16", 0.1, 1)),
    ("AVX2 forward, p = 0.1", "torch.mul", {K64: 3.0, M16: 1.2}, ("forward", "c-avx2", "float32", 0.1, 1)),
    ("Numba forward, p = 0.1", "C", {K64: 2.0, M16: 1.25}, ("forward", "numba", "float32", 0.1, 1)),
    ("Numba backward", "C", {M16: 1.25}, ("backward", "numba", "float32", 0.1, 1)),
    ("store=\"seed\" backward", "bits", {M16: 1.2}, ("backward", "seed", "float32", 0.1, 1)),
]  # fmt: skip
CALL_MICROSECONDS = 4.0
DRAW_ROWS = {"draw_rows, 125 columns": 1.4, "draw_rows, 512 columns": 1.05}  # against draw_bits of as many cells
Target = tuple[str, str, str, float, float, str]  # what, peer, size, at most, measured, unit


def report(run: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Benchmark report",
        "",
        machine_line(run),
        "",
        "Medians of alternating samples; every ratio is the median of ratios taken round by round. A case is a kernel: "
        'the backend\'s primitive over memory that is there, called from Python. A "call" is the public function '
        "(`fd.dropout(x, p, out=y)`), with its checks, its random state and a new mask; the dropouts people use today "
        "stand beside those. The limit is the fastest of four ways to read and write these bytes once, timed in turn "
        "with the case: " + ", ".join(WAYS) + ".",
        "",
        "## Targets",
        "",
    ]
    lines += target_table(sorted(targets(rows, "kernel"), key=lambda row: row[4] <= row[3]))
    lines += ["", "The same for whole calls:", "", *target_table(targets(rows, "call"))]
    columns = ["case", "ns/element", "GB/s", *(f"/ {peer}" for peer in PEER_COLUMNS), "limit: the way"]
    lines += ["", "## Every case", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        ns = 1e9 * row["seconds"] / row["size"]
        ratios = [row["peers"].get(peer, {}).get("ratio") for peer in PEER_COLUMNS]
        cells = [name(row), f"{ns:.3f}", f"{row['bytes_per_element'] / ns:.1f}"]
        cells += [f"{r:.3g}" if r else "" for r in ratios] + [row["peers"].get(LIMIT, {}).get("way", "")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def target_table(judged: list[Target]) -> list[str]:
    lines = ["| what | against | size | at most | measured | |", "|---|---|---|---|---|---|"]
    for what, peer, size, limit, measured, unit in judged:
        verdict = "met" if measured <= limit else "**missed**"
        lines.append(f"| {what} | {peer} | {size} | {limit:g}{unit} | {measured:.2f}{unit} | {verdict} |")
    return lines


def name(row: dict[str, Any]) -> str:
    threads = f", {row['threads']} threads" if row["threads"] > 1 else ""
    store = ", seed" if row["store"] == "seed" else ""
    level = "" if row["level"] == "kernel" else ", call"
    return f"{row['operation']} {row['variant']} {row['dtype']} {SIZE_NAMES[row['size']]} p={row['p']}{threads}{level}{store}"


def targets(rows: list[dict[str, Any]], level: str) -> list[Target]:
    """Each target that this run measured."""
    best = next((row["variant"] for row in rows if row["operation"] == "whole call"), None)
    found = []
    for what, peer, limits, (operation, variant, dtype, p, threads) in TARGETS:
        for size, limit in limits.items():
            wanted = {
                "operation": operation, "dtype": dtype, "p": p, "threads": threads, "size": size,
                "variant": best if variant in ("best", "seed") else variant,
                "store": "seed" if variant == "seed" else "bits", "level": "call" if variant == "seed" else level,
            }  # fmt: skip
            for row in rows:
                if all(row.get(key) == value for key, value in wanted.items()) and peer in row["peers"]:
                    found.append((what, peer, SIZE_NAMES[size], limit, row["peers"][peer]["ratio"], "x"))
    for row in rows if level == "kernel" else []:
        if row["operation"] == "whole call":
            what = "`fd.dropout` of 1,000 elements, whole call"
            found.append((what, "", "1000", CALL_MICROSECONDS, 1e6 * row["seconds"], " us"))
        if row["operation"] in DRAW_ROWS:
            limit, ratio = DRAW_ROWS[row["operation"]], row["peers"]["draw_bits"]["ratio"]
            found.append((f"C {row['operation']} of a shard of 8", "draw_bits", "1M", limit, ratio, "x"))
    return found


STYLES: dict[str, dict[str, Any]] = {  # fastdrop's lines are whole, the peers' are broken
    "fastdrop, c-avx512": {"color": pictures.ORANGE},
    "fastdrop, c-neon": {"color": pictures.ORANGE},
    "fastdrop, c-avx2": {"color": pictures.YELLOW, "marker": "v"},
    "fastdrop, numba": {"color": pictures.PURPLE, "marker": "P"},
    "fastdrop, c-scalar": {"color": pictures.SKY, "marker": "<"},
    "fastdrop, numpy": {"color": pictures.GREY, "marker": ">"},
    "F.dropout": {"color": pictures.GREEN, "linestyle": "-.", "marker": "s"},
    "compiled F.dropout": {"color": pictures.GREEN, "linestyle": ":", "marker": "D"},
    "NumPy": {"color": pictures.BLACK, "linestyle": "-.", "marker": "x"},
    "torch.mul": {"color": pictures.BLUE, "linestyle": "--", "marker": "^"},
    LIMIT: {"color": pictures.BLACK, "linestyle": ":", "marker": "."},
}


def plot(run: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """ns per element over size, forward and backward: fastdrop, the peers, the limit."""
    best = next((row["variant"] for row in rows if row["operation"] == "whole call"), None)
    figure, axes = pictures.pyplot().subplots(1, 2, figsize=(pictures.WIDTH, 4.8), sharey=True, layout="constrained")
    for axis, operation in zip(axes, ("forward", "backward"), strict=True):
        curves: dict[str, dict[int, float]] = {}
        for row in rows:
            if (row["operation"], row["dtype"], row["p"], row["threads"]) != (operation, "float32", 0.1, 1):
                continue
            if row["store"] != "bits":
                continue
            if row["variant"] == best:
                for peer, times in row["peers"].items():
                    if peer in WAYS:
                        continue
                    curves.setdefault(peer, {})[row["size"]] = 1e9 * times["seconds"] / row["size"]
            if row["level"] == "call":
                continue
            label = f"fastdrop, {row['variant']}"
            curves.setdefault(label, {})[row["size"]] = 1e9 * row["seconds"] / row["size"]
        for label, points in sorted(curves.items(), key=lambda item: -max(item[1].values())):
            style = {"linewidth": 1.4, "marker": "o", **STYLES.get(label, {})}
            if label == f"fastdrop, {best}":
                style.update(linewidth=3.0, zorder=1.5, color=pictures.ORANGE, marker="o")
            sizes = sorted(points)
            axis.plot(sizes, [points[size] for size in sizes], markersize=5, label=label, **style)
        axis.set(title=operation, xlabel="elements")
        pictures.time_axes(axis, {SIZE_NAMES[size]: size for size in (K64, M1, M16, M64)})
    axes[0].set_ylabel("ns per element")
    handles, labels = axes[0].get_legend_handles_labels()  # forward has every curve
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Dropout of float32, p = 0.1, one thread ({run['machine_info']['cpu_name']})")
    pictures.save(figure, path)


if __name__ == "__main__":
    sys.exit(write(sys.argv[1:], __doc__, report, plot, "## Every case"))

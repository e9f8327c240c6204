"""Turns a benchmark JSON of the family into a report: python -m bench.report_family RESULTS.json.

It writes RESULTS.md and RESULTS.png: the targets, misses on top, then every case.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .report import machine_line, write

# kind: (operations judged, at most: of the peer's time)
LIMITS = {
    "feature": (("forward", "backward"), 1.0),
    "variational": (("forward", "backward"), 1.0),
    "stochastic depth": (("forward", "backward"), 1.0),
    "DropBlock": (("forward", "forward+backward"), 1 / 5),
    "DropConnect": (("forward",), 1.1),
    "alpha": (("forward",), 1.1),
    "Gaussian": (("forward", "forward+backward"), 1 / 4),
    "mc_predict": (("50 samples",), 1 / 3),
}


def report(run: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Benchmark report: the family",
        "",
        machine_line(run),
        "",
        "Medians of alternating samples, every ratio the median of those taken round by round. Against `torch.mul` and "
        "`fd.dropout`, calls are the NumPy API's, whole, into memory that is there; the others are `fastdrop.torch`'s, "
        "which allocate their results, as their peers do. `mc_predict` is judged by the loop that torch's users write; "
        "the same loop over fastdrop's modules stands in the last table.",
        "",
        "## Targets",
        "",
        "| kind | case | against | must be | measured | |",
        "|---|---|---|---|---|---|",
    ]
    judged = sorted((row for row in rows if judge(row) is not None), key=lambda row: bool(judge(row)))
    for row in judged:
        limit = LIMITS[row["kind"]][1]
        must = f"at most {limit}" if limit >= 1 else f"{1 / limit:.0f}x faster"
        value = ratio(row)
        measured = f"{value:.2f}" if limit >= 1 else f"{1 / value:.1f}x"
        met = "met" if judge(row) else "**missed**"
        lines.append(f"| {row['kind']} | {case(row)} | {peer(row)} | {must} | {measured} | {met} |")
    lines += [
        "",
        "## Every case",
        "",
        "| kind | case | fastdrop, ms | ns/element | peer | peer, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        per_element = 1e9 * row["seconds"] / row["elements"]
        for name, theirs in row["peers"].items():
            lines.append(
                f"| {row['kind']} | {case(row)} | {1e3 * row['seconds']:.3f} | {per_element:.3f} | {name} | "
                f"{1e3 * theirs['seconds']:.3f} | {theirs['ratio']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def judge(row: dict[str, Any]) -> bool | None:
    """Whether a case meets its limit; None if it has none."""
    operations, limit = LIMITS[row["kind"]]
    return ratio(row) <= limit if row["operation"] in operations else None


def peer(row: dict[str, Any]) -> str:
    return str(next(iter(row["peers"])))


def ratio(row: dict[str, Any]) -> float:
    return float(row["peers"][peer(row)]["ratio"])


def case(row: dict[str, Any]) -> str:
    return f"{row['operation']}, {row['layout']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def plot(run: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Each case's time as a share of its peer's, one thread, beside its limit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row["threads"] == 1][::-1]
    figure, axis = plt.subplots(figsize=(10, 0.32 * len(shown) + 1.2), layout="constrained")
    colors = ["#aaaaaa" if judge(row) is None else "#2ca02c" if judge(row) else "#d62728" for row in shown]
    bars = axis.barh(range(len(shown)), [ratio(row) for row in shown], color=colors)
    axis.bar_label(bars, fmt=" %.2f", fontsize=8)
    for i, row in enumerate(shown):
        if judge(row) is not None:
            limit = LIMITS[row["kind"]][1]
            axis.plot([limit, limit], [i - 0.45, i + 0.45], color="black", linewidth=2)
    axis.set_yticks(
        range(len(shown)),
        [f"{row['kind']}: {row['operation']}, {row['layout']}  /  {peer(row)}" for row in shown],
        fontsize=8,
    )
    axis.set(xscale="log", xlabel="time, as a share of the peer's; black: at most this")
    axis.margins(x=0.08)
    axis.grid(axis="x", alpha=0.3)
    figure.suptitle(f"The family of dropouts, float32, one thread ({run['machine_info']['cpu_name']})")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(write(sys.argv[1:], __doc__ or "", report, plot, "## Every case"))

"""Shared by the reports of the CPU benchmarks: reading the JSON, the line about the machine, and `Suite`.

A `Suite` is a report whose cases all have peers. Its module says what share of a peer's time a case may take at most.
The targets come first, those that were missed on top; then every case; then a picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ALL_CASES = "## Every case"
LONGEST_BAR = 2.0
COLORS = {"met": "#0072B2", "missed": "#D55E00", "no target": "#bbbbbb"}  # told apart by the colour-blind too


def write(arguments: list[str], usage: str, report: Callable[..., str], plot: Callable[..., None], details: str) -> int:
    """The report and the picture of the JSON that the arguments name, beside it."""
    if len(arguments) != 1:
        print(usage)
        return 2
    source = Path(arguments[0])
    run = json.loads(source.read_text())
    rows = [benchmark["extra_info"] for benchmark in run["benchmarks"] if "peers" in benchmark["extra_info"]]
    text = report(run, rows)
    source.with_suffix(".md").write_text(text)
    plot(run, rows, source.with_suffix(".png"))
    print(text.split(details)[0])
    print(f"wrote {source.with_suffix('.md')} and {source.with_suffix('.png')}")
    return 0


def machine_line(run: dict[str, Any]) -> str:
    """What ran where and when: the CPU, its caches, the versions, the memory policy."""
    machine = run["machine_info"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items()) or "caches unknown"
    versions = [f"{package} {machine[package]}" for package in ("torch", "fastdrop") if package in machine]
    return (
        f"{machine['cpu_name']}, {machine['cpu'].get('count', '?')} CPUs, {caches}; {machine['system']}; Python "
        f"{machine['python_version']}; {'; '.join(versions)}; {run['datetime'][:10]}. Memory policy: "
        f"{machine['memory_policy']}."
    )


@dataclass(frozen=True)
class Suite:
    """``limits(row, peer)``: at most these shares of the peer's value (time, or bytes); none where nothing is asked."""

    title: str
    intro: str
    limits: Callable[[Row, str], tuple[float, ...]]
    picture: str

    def main(self, arguments: list[str], usage: str) -> int:
        return write(arguments, usage, self.report, self.plot, ALL_CASES)

    def report(self, run: dict[str, Any], rows: list[Row]) -> str:
        lines = [f"# Benchmark report: {self.title}", "", machine_line(run), "", self.intro, "", "## Targets", ""]
        lines += ["| kind | case | against | must be | measured | |", "|---|---|---|---|---|---|"]
        judged = [(row, peer, limit) for row, peer in pairs(rows) for limit in self.limits(row, peer)]
        for row, peer, limit in sorted(judged, key=lambda one: ratio(*one[:2]) <= one[2]):
            value, faster = ratio(row, peer), limit < 0.5
            must = f"{1 / limit:.0f}x faster" if faster else f"at most {limit}"
            measured = f"{1 / value:.1f}x" if faster else f"{value:.2f}"
            met = "met" if value <= limit else "**missed**"
            lines.append(f"| {row['kind']} | {case(row)} | {peer} | {must} | {measured} | {met} |")
        lines += ["", ALL_CASES, "", "| kind | case | fastdrop, ms | ns/element | peer | peer, ms | ratio |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row, peer in pairs(rows):
            theirs = row["peers"][peer]
            if "bytes" in theirs:
                continue
            lines.append(
                f"| {row['kind']} | {case(row)} | {1e3 * row['seconds']:.3f} | {per_element(row)} | {peer} | "
                f"{1e3 * theirs['seconds']:.3f} | {theirs['ratio']:.3f} |"
            )
        return "\n".join(lines) + "\n"

    def plot(self, run: dict[str, Any], rows: list[Row], path: Path) -> None:
        """Each case's value as a share of its peer's, beside its limit; a panel for each number of threads."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        labels = list(dict.fromkeys(label(row, peer) for row, peer in pairs(rows)))[::-1]
        threads = sorted({row["threads"] for row in rows})
        size = (6.0 + 3.5 * len(threads), 0.26 * len(labels) + 1.6)
        figure, panels = plt.subplots(1, len(threads), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axis, count in zip(panels[0], threads, strict=True):
            shown = [one for one in pairs(rows) if one[0]["threads"] == count]
            end = 1.15 * min(max(ratio(*one) for one in shown), LONGEST_BAR)
            for row, peer in shown:
                self._bar(axis, labels.index(label(row, peer)), ratio(row, peer), self.limits(row, peer), end)
            axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
            axis.set(xlim=(0.0, end), xlabel="share of the peer's")
            axis.set_title(f"{count} thread{'s' * (count > 1)}", loc="left", fontsize=10)
            axis.set_yticks(range(len(labels)), labels, fontsize=8)
            axis.grid(axis="x", alpha=0.3)
        panels[0][0].set_ylim(-0.7, len(labels) - 0.3)
        for name, color in COLORS.items():
            panels[0][0].barh(0, 0, color=color, label=name)
        panels[0][0].plot([], [], color="black", linewidth=2, label="at most this")
        figure.legend(loc="outside lower right", ncols=4, fontsize=8, frameon=False)
        figure.suptitle(f"{self.picture}, float32 ({run['machine_info']['cpu_name']})")
        figure.savefig(path, dpi=110)
        plt.close(figure)

    @staticmethod
    def _bar(axis: Any, place: int, value: float, asked: tuple[float, ...], end: float) -> None:
        """A bar that is too long ends at the panel's end; its number tells."""
        judged = "no target" if not asked else "met" if value <= min(asked) else "missed"
        axis.barh(place, min(value, end), color=COLORS[judged])
        for limit in asked:
            axis.plot([limit, limit], [place - 0.45, place + 0.45], color="black", linewidth=2)
        after = max(value, *asked, 0.0) if asked else value
        inside = after > 0.9 * end
        axis.text(
            min(after, end) + (-0.02 if inside else 0.02) * end, place, f"{value:.2f}", fontsize=8,
            horizontalalignment="right" if inside else "left", verticalalignment="center",
            color="white" if inside else "black",
        )  # fmt: skip


def label(row: Row, peer: str) -> str:
    return f"{row['kind']}: {row['operation']}, {row['layout']}  /  {peer}"


def pairs(rows: list[Row]) -> list[tuple[Row, str]]:
    return [(row, peer) for row in rows for peer in row["peers"]]


def ratio(row: Row, peer: str) -> float:
    return float(row["peers"][peer]["ratio"])


def per_element(row: Row) -> str:
    """Nanoseconds, where elements say something."""
    return f"{1e9 * row['seconds'] / row['elements']:.3f}" if "elements" in row else ""


def case(row: Row) -> str:
    return f"{row['operation']}, {row['layout']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"

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

from .pictures import Point, draw_ratios

Row = dict[str, Any]
ALL_CASES = "## Every case"


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
    """``limits(row, peer)``: at most these shares of the peer's value (time, or bytes); none where nothing is asked.

    The picture has about 25 lines at most: ``line(row, peer)`` gives the heading and the label of each, and of several
    layouts with the same one the worst is shown. ``left_out`` leaves lines out. ``note`` says so below the title.
    """

    title: str
    intro: str
    limits: Callable[[Row, str], tuple[float, ...]]
    picture: str
    line: Callable[[Row, str], tuple[str, str]] = lambda row, peer: by_layout(row, peer)
    left_out: Callable[[Row, str], bool] = lambda row, peer: False
    note: str = ""

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
        """The cases that matter most; see `Suite`."""
        lines: dict[tuple[str, str], dict[str, dict[int, Point]]] = {}
        for row, peer in pairs(rows):
            if not self.left_out(row, peer):
                found = lines.setdefault(self.line(row, peer), {}).setdefault(row["layout"], {})
                found[row["threads"]] = Point(ratio(row, peer), self.limits(row, peer))
        groups: dict[str, list[tuple[str, dict[int, Point]]]] = {}
        for (heading, text), layouts in lines.items():
            groups.setdefault(heading, []).append((text, max(layouts.values(), key=_distance)))
        title = f"{self.picture}, float32 ({run['machine_info']['cpu_name']})"
        draw_ratios([*groups.items()], title, self.note, path)


def by_layout(row: Row, peer: str) -> tuple[str, str]:
    """A group for each kind, a line for each operation and layout."""
    operation = "" if row["operation"] == "step" else f"{row['operation']}, "
    return row["kind"], f"{operation}{row['layout']}  /  {peer}"


def by_operation(row: Row, peer: str) -> tuple[str, str]:
    """A group for each operation, a line for each kind, whatever the layout."""
    return row["operation"], f"{row['kind']}  /  {peer}"


def _distance(points: dict[int, Point]) -> float:
    """How far the worst point is from its target, or from 1."""
    return max(point.ratio / min(point.targets, default=1.0) for point in points.values())


def pairs(rows: list[Row]) -> list[tuple[Row, str]]:
    return [(row, peer) for row in rows for peer in row["peers"]]


def ratio(row: Row, peer: str) -> float:
    return float(row["peers"][peer]["ratio"])


def per_element(row: Row) -> str:
    """Nanoseconds, where elements say something."""
    return f"{1e9 * row['seconds'] / row['elements']:.3f}" if "elements" in row else ""


def case(row: Row) -> str:
    return f"{row['operation']}, {row['layout']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"

"""How the reports draw: ratios as points left and right of 1 (`draw_ratios`), and what all pictures share.

The colours are Okabe and Ito's, which colour-blind people tell apart, and each has a shape of its own. A picture is
about 900 pixels wide, so that a page shows it in full size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, BLACK, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#666666",
)  # fmt: skip
DPI = 100
WIDTH = 9.0  # inches
ROW = 0.23  # inches
VERDICTS = {"target met": BLUE, "target missed": ORANGE, "no target": GREY}
MARKERS = {1: "o", 2: "D"}  # by threads
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
NANOSECONDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)
FIRST_NUMBER = 1.03  # where the columns of numbers begin, in widths of the axis


@dataclass(frozen=True)
class Point:
    """A ratio, and the targets it is judged by: at most these."""

    ratio: float
    targets: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        if not self.targets:
            return "no target"
        return "target met" if self.ratio <= min(self.targets) else "target missed"


# A heading, and below it lines: a label, and a point by number of threads.
Group = tuple[str, list[tuple[str, dict[int, Point]]]]


def pyplot() -> Any:
    """matplotlib's, for files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)


def ratio_axis(axis: Any, ratios: list[float], along: str = "x") -> None:
    """A logarithmic axis on which 1 is in view, as a line, and ticks are plain numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = 0.93 * min(*ratios, 0.65), 1.08 * max(*ratios, 1.4)
    getattr(axis, f"set_{along}scale")("log")
    getattr(axis, f"set_{along}lim")(low, high)
    scale = getattr(axis, f"{along}axis")
    few = [tick for tick in TICKS if tick not in (0.3, 0.7, 1.5, 3)]
    scale.set_major_locator(FixedLocator([tick for tick in (few if high / low > 12 else TICKS) if low < tick < high]))
    scale.set_minor_locator(NullLocator())
    scale.set_major_formatter("{x:g}")
    axis.grid(axis=along, alpha=0.3)
    (axis.axvline if along == "x" else axis.axhline)(1.0, color=BLACK, linewidth=1.2, zorder=1)


def time_axes(axis: Any, sizes: dict[str, int]) -> None:
    """Both logarithmic: nanoseconds, as plain numbers, over sizes, by name."""
    from matplotlib.ticker import FixedLocator

    axis.set(xscale="log", yscale="log")
    axis.set_xticks([*sizes.values()], [*sizes])
    axis.yaxis.set_major_locator(FixedLocator(NANOSECONDS))  # set_yticks would make room for all of them
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def draw_ratios(groups: list[Group], title: str, note: str, path: Path) -> None:
    """A line for each case: what fastdrop takes as a share of what its peer takes. The numbers stand beside it."""
    threads = sorted({n for _, lines in groups for _, points in lines for n in points})
    count = sum(1 + len(lines) for _, lines in groups)
    figure, axis = pyplot().subplots(figsize=(WIDTH, ROW * count + 1.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    ratio_axis(axis, [value for _, lines in groups for _, points in lines for point in points.values()
                      for value in (point.ratio, *point.targets)])  # fmt: skip
    place, ticks = 0, {}
    for heading, lines in groups:
        ticks[place] = (heading, "bold")
        place += 1
        for label, points in lines:
            ticks[place] = (label, "normal")
            for column, n in enumerate(threads):
                if n in points:
                    _draw_point(axis, place, n, points[n], len(threads))
                    _write_number(axis, place, column, points[n])
            place += 1
    axis.set_ylim(count - 0.4, -0.6)
    axis.set_yticks([*ticks], [text for text, _ in ticks.values()], fontsize=8.5)
    for text, (_, weight) in zip(axis.get_yticklabels(), ticks.values(), strict=True):
        text.set_fontweight(weight)
    axis.tick_params(axis="y", length=0)
    for column, n in enumerate(threads):
        beside = axis.get_yaxis_transform()
        axis.text(FIRST_NUMBER + 0.1 * column, 0, f"{n} thr.", transform=beside, fontsize=8, ha="center", va="center")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_xlabel("share of what the peer takes; left of 1 fastdrop takes less", fontsize=9)
    _add_legend(figure, threads)
    figure.suptitle(title + (f"\n{note}" if note else ""), fontsize=10.5)
    save(figure, path)


def _draw_point(axis: Any, place: int, n: int, point: Point, of: int) -> None:
    """The point hangs at 1 by a line. A target is a small tick in its line's height."""
    height, color = place + (0.2 * (n - 1.5) * 2 if of > 1 else 0.0), VERDICTS[point.verdict]
    axis.plot([1.0, point.ratio], [height, height], color=color, linewidth=1.2, alpha=0.5, zorder=2)
    filled = color if n == 1 else "white"
    axis.plot(point.ratio, height, MARKERS.get(n, "s"), color=color, markerfacecolor=filled, markersize=5, zorder=4)
    for target in point.targets:
        axis.plot([target, target], [height - 0.17, height + 0.17], color=BLACK, linewidth=1.6, zorder=3)


def _write_number(axis: Any, place: int, column: int, point: Point) -> None:
    missed = point.verdict == "target missed"
    axis.text(
        FIRST_NUMBER + 0.1 * column, place, f"{point.ratio:.2f}", transform=axis.get_yaxis_transform(), fontsize=8.5,
        ha="center", va="center", color=VERDICTS[point.verdict], fontweight="bold" if missed else "normal",
    )  # fmt: skip


def _add_legend(figure: Any, threads: list[int]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, linewidth=3, label=name) for name, color in VERDICTS.items()]
    handles += [
        Line2D([], [], color=GREY, marker=MARKERS.get(n, "s"), markerfacecolor=GREY if n == 1 else "white",
               linewidth=0, label=f"{n} thread{'s' * (n > 1)}")
        for n in threads
    ]  # fmt: skip
    handles.append(Line2D([], [], color=BLACK, marker="|", markersize=8, linewidth=0, label="at most this"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8.5, frameon=False)

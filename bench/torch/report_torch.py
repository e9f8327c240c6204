"""Reports torch's function and training steps: `python -m bench.torch.report_torch RESULTS.json`.

It writes RESULTS.md and RESULTS.png. The targets come first, those that were missed on top. The second table has every
case.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .. import pictures
from ..contenders import F_DROPOUT
from ..report import machine_line, write

ELEMENTS = {"1k": 1000, "64k": 1 << 16, "1M": 1 << 20, "16M": 1 << 24}
STEP_LIMITS = {"TransformerEncoder": 1.06, "MLP": 1.05}  # of the step at p = 0
NO_GRAD_LIMIT = 0.8  # of F.dropout's time, at 1k
SPEEDUP = 10  # forward + backward, from 64k on
SEED_BYTES = 64
P_ZERO, SEED = "p = 0", 'store="seed"'


def report(run: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Benchmark report: torch",
        "",
        machine_line(run),
        "",
        "Medians of alternating samples; every ratio is the median of ratios taken round by round. Training steps are "
        "forward, backward and SGD; fastdrop's run under `fdt.enable()`, with no change to the model.",
        "",
        "## Targets",
        "",
        "| what | case | must be | measured | |",
        "|---|---|---|---|---|",
    ]
    judged = sorted(targets(rows), key=lambda row: row[4])
    for what, case, must, measured, met in judged:
        lines.append(f"| {what} | {case} | {must} | {measured} | {'met' if met else '**missed**'} |")
    lines += [
        "",
        "## Training steps",
        "",
        "| network | threads | F.dropout, ms | fastdrop, ms | p = 0, ms | F.dropout / p = 0 | fastdrop / p = 0 | x |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in steps(rows):
        theirs, floor = row["peers"][F_DROPOUT], row["peers"][P_ZERO]
        lines.append(
            f"| {row['operation']}, p = {row['p']} | {row['threads']} | {1e3 * theirs['seconds']:.1f} | "
            f"{1e3 * row['seconds']:.1f} | {1e3 * floor['seconds']:.1f} | {floor['ratio'] / theirs['ratio']:.2f} | "
            f"{floor['ratio']:.3f} | {1 / theirs['ratio']:.2f} |"
        )
    lines += [
        "",
        "## The function",
        "",
        "| operation | elements | dtype | p | threads | F.dropout, us | fastdrop, us | fastdrop, ns/element | faster | "
        "/ store=\"seed\" | kept, bytes: fastdrop, seed, F.dropout |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in functions(rows):
        theirs, seed = row["peers"][F_DROPOUT], row["peers"].get(SEED)
        cells = [row["operation"], row["size"], row["dtype"], row["p"], row["threads"]]
        cells += [f"{1e6 * theirs['seconds']:.1f}", f"{1e6 * row['seconds']:.1f}"]
        cells += [f"{1e9 * row['seconds'] / ELEMENTS[row['size']]:.2f}", f"{1 / theirs['ratio']:.1f}x"]
        cells += [f"{seed['ratio']:.2f}" if seed else ""]
        kept = row.get("kept", {})
        cells += [", ".join(f"{kept[name]:,}" for name in ("fastdrop", SEED, F_DROPOUT) if name in kept)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "training step"]


def functions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "function"]


def targets(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, str, bool]]:
    """(what, case, must be, measured, met) of each target that this run measured."""
    found = []
    for row in steps(rows):
        limit, measured = STEP_LIMITS.get(row["operation"]), row["peers"][P_ZERO]["ratio"]
        if limit is not None:
            what = f"{row['operation']} step against p = 0"
            found.append((what, threads(row), f"at most {limit}", f"{measured:.3f}", measured <= limit))
    for row in functions(rows):
        ratio, case = row["peers"][F_DROPOUT]["ratio"], f"{row['size']} {row['dtype']} p={row['p']}, {threads(row)}"
        if row["operation"] == "no grad":
            if row["size"] == "1k":
                limit = f"at most {NO_GRAD_LIMIT}"
                found.append(("no-grad call against F.dropout", case, limit, f"{ratio:.2f}", ratio <= NO_GRAD_LIMIT))
            continue
        what = "forward + backward against F.dropout"
        if row["size"] == "1k":
            found.append((what, case, "never slower", f"{ratio:.2f}", ratio <= 1.0))
        else:
            found.append((what, case, f"{SPEEDUP}x faster", f"{1 / ratio:.1f}x", 1 / ratio >= SPEEDUP))
        bits, seed = row["kept"]["fastdrop"], row["kept"][SEED]
        limit = ELEMENTS[row["size"]] / 8 + SEED_BYTES
        if row["threads"] == 1 and row["p"] == 0.1:
            found.append(("bytes kept, bits", case, f"at most {limit:,.0f}", f"{bits:,}", bits <= limit))
            found.append(("bytes kept, seed", case, f"at most {SEED_BYTES}", f"{seed:,}", seed <= SEED_BYTES))
    return found


def threads(row: dict[str, Any]) -> str:
    return f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def label(row: dict[str, Any]) -> str:
    name = "Transformer-\nEncoder" if row["operation"] == "TransformerEncoder" else row["operation"]
    return f"{name}\np = {row['p']}\n{threads(row)}"


def plot(run: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Left: what dropout adds to a training step. Right: ns per element of the function."""
    figure, (left, right) = pictures.pyplot().subplots(
        1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2)
    )
    shown = steps(rows)
    width = 0.38
    for shift, name, color in ((-width / 2, F_DROPOUT, pictures.BLUE), (width / 2, "fastdrop", pictures.ORANGE)):
        added = [
            100 * (row["peers"][P_ZERO]["ratio"] / (row["peers"][F_DROPOUT]["ratio"] if name == F_DROPOUT else 1.0) - 1)
            for row in shown
        ]
        bars = left.bar([i + shift for i in range(len(shown))], added, width, label=name, color=color)
        left.bar_label(bars, fmt="%+.0f%%", fontsize=8)
    left.set_xticks(
        range(len(shown)),
        [label(row) for row in shown],
        fontsize=8,
    )
    left.set(title="Time that dropout adds\nto a training step", ylabel="% of the step at p = 0")
    left.legend(frameon=False)
    left.margins(y=0.12)
    for name, color in ((F_DROPOUT, pictures.BLUE), ("fastdrop", pictures.ORANGE)):
        points = {
            ELEMENTS[row["size"]]: 1e9 * (row["peers"][name]["seconds"] if name == F_DROPOUT else row["seconds"])
            / ELEMENTS[row["size"]]
            for row in functions(rows)
            if (row["operation"], row["dtype"], row["p"], row["threads"]) == ("forward+backward", "float32", 0.1, 1)
        }  # fmt: skip
        right.plot(
            sorted(points), [points[n] for n in sorted(points)], marker="o", color=color, label=name, linewidth=2
        )
    right.set(
        xscale="log",
        yscale="log",
        title="The function, forward + backward\nfloat32, p = 0.1, one thread",
        xlabel="elements",
    )
    right.set_ylabel("ns per element")
    right.set_xticks(list(ELEMENTS.values()), list(ELEMENTS))
    right.minorticks_off()
    right.grid(alpha=0.3)
    right.legend(frameon=False)
    figure.suptitle(f"torch with fastdrop ({run['machine_info']['cpu_name']})")
    pictures.save(figure, path)


if __name__ == "__main__":
    sys.exit(write(sys.argv[1:], __doc__, report, plot, "## The function"))

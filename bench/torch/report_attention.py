"""Reports attention: `python -m bench.torch.report_attention RESULTS.json` writes RESULTS.md and RESULTS.png.

The targets come first, those that were missed on top. The second table has every case.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .. import pictures
from ..report import ALL_CASES, Row, Suite, write

P_ZERO, DROPPED = "torch's at p = 0", "torch's at p = 0.1"
SPARE_BYTES = 16 << 20
MEMORY = "torch's at p = 0, and 16 MiB"
JUDGED_FROM = 1024
STEPS = {
    "TransformerEncoder, 2,048 tokens": 1.1,
    "TransformerEncoder, 2,048 tokens, causal": 1.15,
    "TransformerEncoder, 8 x 128 tokens": 0.97,
    "causal characters, 128 wide": 1.12,
}
INTRO = (
    "Medians of alternating samples, every ratio the median of those taken round by round. Layouts are batch x heads x "
    "length x width of a self-attention; dropout at p = 0.1 in fastdrop's; float32 where no dtype is named. Forward "
    "alone is of tensors that want no gradient. Peak memory is what a step adds to a process of its own beside its "
    "inputs, gradients included, in one thread. The training step is forward, backward and SGD."
)


def limits(row: Row, peer: str) -> tuple[float, ...]:
    kind = row["kind"]
    if kind.startswith("training step"):
        return (STEPS[row["operation"]],)
    if kind == "peak memory":
        return (1.0,) if peer == MEMORY else ()
    if kind.startswith("small"):
        return (1.05,)  # not slower, but for the clock's noise
    if peer == DROPPED:
        return (0.3,) if row["length"] >= JUDGED_FROM else (1.0,)
    if row["length"] < JUDGED_FROM:
        return ()
    if row["dtype"]:
        return (1.4,)
    return (1.2,) if row["operation"] == "forward" else (1.3,) if row["masked"] == "causal" else (1.25,)


SUITE = Suite("attention", INTRO, limits, "Attention")


def plot(run: dict[str, Any], rows: list[Row], path: Path) -> None:
    """Time over length, as a share of torch's without dropout; a panel for each operation."""
    figure, axes = pictures.pyplot().subplots(
        1, 2, figsize=(pictures.WIDTH, 4.2), sharex=True, sharey=True, layout="constrained"
    )
    ratios = []
    for axis, operation in zip(axes, ("forward", "forward+backward"), strict=True):
        for masked, color in (("", pictures.ORANGE), ("causal", pictures.BLUE)):
            for threads, style in ((1, "-"), (2, "--")):
                points = sorted(
                    (row["length"], row["peers"][P_ZERO]["ratio"])
                    for row in rows
                    if (row["kind"], row["operation"], row["threads"]) == ("attention", operation, threads)
                    and (row["masked"], row["dtype"]) == (masked, "")
                )
                if points:
                    ratios += [ratio for _, ratio in points]
                    label = f"{masked or 'every key'}, {threads} thread{'s' * (threads > 1)}"
                    axis.plot(
                        *zip(*points, strict=True), style, color=color, label=label, markersize=6,
                        marker=pictures.MARKERS[threads], markerfacecolor=color if threads == 1 else "white",
                    )  # fmt: skip
        lengths = sorted({row["length"] for row in rows if row["kind"] == "attention"})
        axis.set(title=operation, xscale="log", xlabel="queries and keys")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes:
        pictures.ratio_axis(axis, ratios, "y")
    axes[0].set(ylabel="fastdrop at p = 0.1 / torch at p = 0")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Attention with dropout beside torch's without, float32 ({run['machine_info']['cpu_name']})")
    pictures.save(figure, path)


if __name__ == "__main__":
    sys.exit(write(sys.argv[1:], __doc__ or "", SUITE.report, plot, ALL_CASES))

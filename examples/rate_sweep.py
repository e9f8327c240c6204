"""How much to drop: the same network at p = 0, 0.3, 0.5 and 0.7.

python examples/rate_sweep.py
"""

from common import Figure, at_end, run
from overfitting_gap import curves
from pictures import BLUE, VERMILLION, WIDE

RATES = (0.0, 0.3, 0.5, 0.7)


def picture(quick: bool) -> Figure:
    epochs = 5 if quick else 100
    figure = Figure(figsize=(WIDE, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends = []
    for p in RATES:
        seen, unseen = curves(p, epochs)
        left.plot(range(1, epochs + 1), unseen, label=f"p = {p:g}")
        ends.append((at_end(seen), at_end(unseen)))
        print(f"p = {p:g}: {ends[-1][0]:.1f} % of the training digits, {ends[-1][1]:.1f} % of new ones")
    left.set(title="New digits", xlabel="epoch", ylabel="accuracy, %")
    left.set_ylim(bottom=min(80, left.get_ylim()[0]) if quick else 80)
    left.legend(loc="lower right")
    lines = ("o--", BLUE, "training digits, with their wrong labels"), ("o-", VERMILLION, "new digits")
    for (line, colour, name), values in zip(lines, zip(*ends, strict=True), strict=True):
        right.plot(RATES, values, line, color=colour, label=name)
        for p, value, end in zip(RATES, values, ends, strict=True):
            away = (0, 7) if value == max(end) else (0, -16)
            right.annotate(f"{value:.1f}", (p, value), away, textcoords="offset points", ha="center", color=colour)
    right.set(title="Mean of the last epochs", xlabel="drop probability p", ylabel="accuracy, %")
    right.set_xticks(RATES)
    right.margins(x=0.1, y=0.2)
    right.legend(loc="lower center" if quick else "upper right", fontsize=9)
    return figure


if __name__ == "__main__":
    run(picture, __doc__, "rate_sweep.png")

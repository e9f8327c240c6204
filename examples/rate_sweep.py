"""How much to drop: the same network at p = 0, 0.3, 0.5 and 0.7.

python examples/rate_sweep.py
"""

from common import Figure, run
from overfitting_gap import curves

RATES = (0.0, 0.3, 0.5, 0.7)


def picture(quick: bool) -> Figure:
    epochs = 5 if quick else 100
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends = []
    for p in RATES:
        seen, unseen = curves(p, epochs)
        left.plot(unseen, label=f"p = {p:g}")
        ends.append((sum(seen[-5:]) / 5, sum(unseen[-5:]) / 5))  # of the last epochs: one is luck
        print(f"p = {p:g}: {ends[-1][0]:.1f} % of the training digits, {ends[-1][1]:.1f} % of new ones")
    left.set(title="New digits", xlabel="epoch", ylabel="accuracy, %")
    left.set_ylim(bottom=min(80, left.get_ylim()[0]) if quick else 80)
    left.legend(loc="lower right")
    for shift, name, values in ((-0.2, "training digits", 0), (0.2, "new digits", 1)):
        bars = right.bar([i + shift for i in range(len(RATES))], [end[values] for end in ends], 0.38, label=name)
        right.bar_label(bars, fmt="%.1f", fontsize=8)
    right.set_xticks(range(len(RATES)), [f"p = {p:g}" for p in RATES])
    right.set(title="At the end", ylabel="accuracy, %", ylim=(min(min(end) for end in ends) - 5, 106))
    right.legend(loc="upper center", ncols=2)
    return figure


if __name__ == "__main__":
    run(picture, __doc__, "rate_sweep.png")

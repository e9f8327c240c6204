"""Dropout against overfitting: accuracy on training digits and on new ones, with dropout and without.

    python examples/overfitting_gap.py

The network (64-512-256-10) is large enough to learn 600 digits by heart. A tenth of them has wrong labels. Who learns
those too gets fewer of the new digits right.
"""

from common import Figure, accuracy, at_end, digits, nn, run, torch, train
from pictures import BLUE, GREY, VERMILLION, WIDE

import fastdrop.torch as fdt

P = 0.5


def mlp(p: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 512), nn.ReLU(), fdt.Dropout(p),
        nn.Linear(512, 256), nn.ReLU(), fdt.Dropout(p),
        nn.Linear(256, 10),
    )  # fmt: skip


def curves(p: float, epochs: int) -> tuple[list[float], list[float]]:
    """Accuracies of each epoch, on the training digits and on new ones."""
    training, validation = digits()
    model = mlp(p)
    points = [(accuracy(model, training), accuracy(model, validation)) for _ in train(model, training, epochs)]
    seen, unseen = zip(*points, strict=True)
    return list(seen), list(unseen)


def picture(quick: bool) -> Figure:
    epochs = 5 if quick else 100
    figure = Figure(figsize=(WIDE, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, p, name in zip(axes, (0.0, P), ("No dropout", f"Dropout, p = {P:g}"), strict=True):
        seen, unseen = curves(p, epochs)
        axis.plot(range(1, epochs + 1), seen, "--", color=BLUE, label="training digits, with their wrong labels")
        axis.plot(range(1, epochs + 1), unseen, color=VERMILLION, label="new digits")
        axis.fill_between(range(1, epochs + 1), unseen, seen, color=GREY, alpha=0.15, linewidth=0)
        axis.set(title=f"{name}: {at_end(unseen):.1f} % at the end", xlabel="epoch")
        print(
            f"p = {p:g}, mean of the last epochs: {at_end(seen):.1f} % of the training digits, "
            f"{at_end(unseen):.1f} % of new ones ({max(unseen):.1f} % in their best epoch)"
        )
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(loc="lower right")
    return figure


if __name__ == "__main__":
    run(picture, __doc__, "overfitting_gap.png")

"""Dropout in a convolutional network: of elements, of whole channels, and of blocks.

    python examples/convolutional.py

Neighbouring pixels of a large feature map are alike, so what is dropped in one pixel can be read from the next one.
`Dropout2d` drops whole channels, with higher rates in deeper layers (0.2, 0.3, 0.4). `DropBlock2d` drops squares of
pixels. The left of the picture shows digits that are enlarged to be as smooth as such a map. The network on the right
sees the small digits, whose pixels differ more; there the kinds differ by no more than the seeds of one kind.
"""

from collections.abc import Callable

from common import LAST, Figure, Tensor, accuracy, at_end, digits, nn, run, torch, train
from matplotlib import colormaps
from matplotlib.axes import Axes
from pictures import COLOURS, VERMILLION, WIDE
from torch.nn import functional as F

import fastdrop.torch as fdt

RATES = (0.2, 0.3, 0.4)
WIDTHS = (16, 32, 32)
EPOCHS, SEEDS, LEARNING_RATE = 15, 3, 3e-3
KINDS: dict[str, Callable[[float], nn.Module]] = {
    "none": lambda p: nn.Identity(),
    "elements": fdt.Dropout,
    "channels": fdt.Dropout2d,
    "blocks": lambda p: fdt.DropBlock2d(p / 2, block_size=3),
}
SHOWN_P, ENLARGED = 0.5, 4
SHOWN: dict[str, nn.Module] = {
    "elements": fdt.Dropout(SHOWN_P, seed=0),
    "blocks": fdt.DropBlock2d(SHOWN_P, block_size=9, seed=0),
    "channels": fdt.Dropout2d(SHOWN_P, seed=0),
}


def network(drop: Callable[[float], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    before = 1
    for width, p in zip(WIDTHS, RATES, strict=True):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), drop(p)]
        before = width
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * before, 10))


def hidden(maps: Tensor, dropped: Tensor) -> float:
    """How much of the dropped pixels' variance the mean of their kept neighbours doesn't tell, in percent."""
    kept = (~dropped).float()
    count, total = (F.avg_pool2d(values, 3, 1, 1) for values in (kept, maps * kept))
    guess = torch.where(count > 0, total / count, maps.mean())  # the mean of all if no neighbour is kept
    return 100 * ((guess - maps)[dropped].square().mean() / maps[dropped].var()).item()


def show_masks(axes: list[Axes], images: Tensor) -> None:
    """Four digits as the channels of a feature map, with each kind of mask, and what the masks hide in all digits."""
    small = images.unflatten(1, (1, 8, 8))
    large = F.interpolate(small, scale_factor=ENLARGED, mode="bilinear")
    grey = colormaps["gray_r"].with_extremes(bad=VERMILLION)
    for axis, (name, drop) in zip(axes, SHOWN.items(), strict=True):
        dropped = drop(torch.ones_like(large)) == 0
        share = hidden(large, dropped)
        print(f"{name} dropped in enlarged digits: kept neighbours leave {share:.0f} % of the variance unknown")
        first = large.masked_fill(dropped, torch.nan)[:4, 0]
        axis.imshow(torch.cat([torch.cat([first[0], first[1]], 1), torch.cat([first[2], first[3]], 1)]), cmap=grey)
        axis.set(title=name, xlabel=f"hidden: {share:.0f} %", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    dropped = fdt.dropout(torch.ones_like(small), SHOWN_P, seed=0) == 0
    print(f"elements dropped in the small digits: they leave {hidden(small, dropped):.0f} % of it unknown")


def show_accuracies(axis: Axes, epochs: int, seeds: int) -> None:
    training, validation = digits()
    for place, ((name, drop), colour) in enumerate(zip(KINDS.items(), COLOURS, strict=False)):
        reached = []
        for seed in range(seeds):
            model = network(drop, seed)
            at_work = train(model, training, epochs, rate=LEARNING_RATE, seed=seed)
            reached.append(at_end([accuracy(model, validation) for epoch in at_work if epoch >= epochs - LAST]))
        mean = sum(reached) / seeds
        axis.plot([place] * seeds, reached, "o", color=colour, markerfacecolor="none")
        axis.plot([place - 0.25, place + 0.25], [mean, mean], color=colour, linewidth=2.5)
        print(f"network, dropout of {name}: {mean:.1f} % of new digits ({min(reached):.1f} to {max(reached):.1f})")
    axis.set_xticks(range(len(KINDS)), KINDS)
    axis.set(title="Network on 8 x 8 digits", ylabel="accuracy on new digits, %", xlabel="dropped; a dot is a seed")
    axis.margins(x=0.1)


def picture(quick: bool) -> Figure:
    figure = Figure(figsize=(WIDE, 3.4), layout="constrained")
    *masks, accuracies = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.9))
    show_masks(masks, digits()[1][0])
    show_accuracies(accuracies, *((2, 1) if quick else (EPOCHS, SEEDS)))
    return figure


if __name__ == "__main__":
    run(picture, __doc__, "convolutional.png")

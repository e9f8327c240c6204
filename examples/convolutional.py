"""Dropout in a convolutional network: of elements, of whole channels, and of blocks.

    python examples/convolutional.py

Neighbouring pixels of a feature map are alike, so dropping some of them hides little. `Dropout2d` drops whole channels,
with higher rates in deeper layers (0.2, 0.3, 0.4). `DropBlock2d` drops squares of pixels. On digits this small all
three end within one percentage point of each other, and a little above no dropout.
"""

from collections.abc import Callable

from common import Figure, accuracy, digits, nn, run, torch, train

import fastdrop.torch as fdt

RATES = (0.2, 0.3, 0.4)
WIDTHS = (32, 64, 64)
KINDS: dict[str, Callable[[float], nn.Module]] = {
    "none": lambda p: nn.Identity(),
    "elements": fdt.Dropout,
    "channels": fdt.Dropout2d,
    "blocks": lambda p: fdt.DropBlock2d(p / 2, block_size=3),
}


def network(drop: Callable[[float], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    before = 1
    for width, p in zip(WIDTHS, RATES, strict=True):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), drop(p)]
        before = width
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * before, 10))


def picture(quick: bool) -> Figure:
    training, validation = digits()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, drop in KINDS.items():
        model = network(drop)
        curve = [accuracy(model, validation) for _ in train(model, training, 2 if quick else 25)]
        last = curve[-5:]
        label = f"{name}: {sum(last) / len(last):.1f} %"
        axis.plot(curve, label=label)
        print(f"dropout of {label} of new digits, mean of the last epochs")
    axis.set(title="New digits, by what is dropped", xlabel="epoch", ylabel="accuracy, %")
    if not quick:
        axis.set_ylim(bottom=92)
    axis.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    run(picture, __doc__, "convolutional.png")

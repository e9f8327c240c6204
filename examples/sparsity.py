"""Dropout makes hidden activations sparser: how often units are on, and how strongly.

    python examples/sparsity.py

Srivastava et al. 2014 show it in section 7.2. A unit is on for a digit if its activation is above 0.
"""

from common import Figure, digits, nn, run, torch, train
from pictures import COLOURS, WIDE

import fastdrop.torch as fdt

RATES = (0.0, 0.5)


def picture(quick: bool) -> Figure:
    training, (x, _) = digits()
    figure = Figure(figsize=(WIDE, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = []
    for p in RATES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), fdt.Dropout(p), nn.Linear(512, 10))
        for _ in train(model, training, 5 if quick else 100):
            pass
        with torch.no_grad():
            hidden = model[:2](x)
        strength, share = hidden.mean(0), 100 * (hidden > 0).float().mean(0)
        shown.append((strength, share))
        print(
            f"p = {p:g}: a unit is on for {share.mean():.1f} % of new digits on average, "
            f"mean activation {hidden.mean():.3f}, {int((share == 0).sum())} units are never on"
        )
    for axis, values in zip((left, right), zip(*shown, strict=True), strict=True):
        end = max(value.max().item() for value in values)  # of both, so that both have the same bins
        for p, value, colour in zip(RATES, values, COLOURS, strict=False):
            label = f"p = {p:g}, mean {value.mean():.2g}"
            look = {"bins": 40, "range": (0, end), "color": colour, "linewidth": 1.5}
            axis.hist(value.numpy(), histtype="stepfilled", alpha=0.25, **look)
            axis.hist(value.numpy(), histtype="step", label=label, **look)
        axis.legend(loc="upper center")
    left.set(title="Mean activation of each hidden unit", xlabel="activation", ylabel="units")
    right.set(title="How often each unit is on", xlabel="new digits, %", ylabel="units")
    return figure


if __name__ == "__main__":
    run(picture, __doc__, "sparsity.png")

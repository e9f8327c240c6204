"""Dropout makes hidden activations sparse: how often units are on, and how strongly.

python examples/sparsity.py
"""

from common import Figure, digits, nn, run, torch, train

import fastdrop.torch as fdt

RATES = (0.0, 0.5)


def picture(quick: bool) -> Figure:
    training, (x, _) = digits()
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for p in RATES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), fdt.Dropout(p), nn.Linear(512, 10))
        for _ in train(model, training, 5 if quick else 100):
            pass
        with torch.no_grad():
            hidden = model[:2](x)
        on = (hidden > 0).float().mean(0)
        label = f"p = {p:g}"
        left.hist(hidden.mean(0).numpy(), bins=40, alpha=0.6, label=label)
        right.hist(100 * on.numpy(), bins=40, alpha=0.6, label=f"{label}: {100 * on.mean():.0f} % on average")
        print(f"{label}: units are on for {100 * on.mean():.1f} % of new digits, mean activation {hidden.mean():.3f}")
    left.set(title="Mean activation of each hidden unit", xlabel="activation", ylabel="units")
    right.set(title="How often each is on", xlabel="new digits, %", ylabel="units")
    for axis in (left, right):
        axis.legend()
    return figure


if __name__ == "__main__":
    run(picture, __doc__, "sparsity.png")

"""What a network doesn't know: its Monte Carlo predictions differ where it has seen no data.

python examples/uncertainty.py
"""

from common import F, Figure, nn, run, torch, tqdm

import fastdrop.torch as fdt

P, SAMPLES = 0.2, 200


def picture(quick: bool) -> Figure:
    torch.manual_seed(0)
    x = torch.cat([torch.rand(80, 1) * 2 - 3.5, torch.rand(80, 1) * 2 + 0.5])  # nothing in between, nothing beyond
    y = torch.sin(2 * x) + 0.1 * torch.randn_like(x)
    model = nn.Sequential(
        nn.Linear(1, 256), nn.ReLU(), fdt.Dropout(P),
        nn.Linear(256, 256), nn.ReLU(), fdt.Dropout(P),
        nn.Linear(256, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-5)
    for _ in tqdm(range(200 if quick else 3000), leave=False, disable=None):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    model.eval()
    line = torch.linspace(-7, 6, 400)[:, None]
    prediction = fdt.mc_predict(model, line, SAMPLES, seed=0)
    at, mean, std = (values.squeeze(1) for values in (line, prediction.mean, prediction.std))
    near = torch.cdist(line, x).min(1).values < 0.1
    print(f"standard deviation {std[near].mean():.3f} on the data, {std[~near].mean():.3f} off it")

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    for deviations in (1, 2):
        axis.fill_between(
            at, mean - deviations * std, mean + deviations * std, color="#0b7a75", alpha=0.18, linewidth=0
        )
    axis.plot(at, mean, color="#0b7a75", label=f"mean of {SAMPLES} samples; bands: one and two standard deviations")
    axis.plot(at, torch.sin(2 * at), "--", color="#8c8c8c", label="what the data came from")
    axis.plot(x, y, ".", color="#d9822b", markersize=5, label="data")
    axis.set(title="Uncertainty grows off the data", xlabel="x", ylabel="y", ylim=(-3.5, 3))
    axis.legend(loc="upper left", fontsize=9)
    return figure


if __name__ == "__main__":
    run(picture, __doc__, "uncertainty.png")

"""What a network doesn't know, and doesn't know that it doesn't: Monte Carlo dropout off the data.

    python examples/uncertainty.py

Predictions of thinned networks differ, and their spread is read as uncertainty (Gal and Ghahramani, "Dropout as a
Bayesian Approximation: Representing Model Uncertainty in Deep Learning", 2016). Beyond the data the spread grows. In
the gap between two groups of data it need not: Foong et al. ("On the Expressiveness of Approximate Inference in
Bayesian Neural Networks", 2020) prove it for networks with one hidden layer and observe it in deeper ones. Osband
("Risk versus Uncertainty in Deep Learning: Bayes, Bootstrap and the Dangers of Dropout", 2016) adds that with a fixed
p the spread doesn't shrink with more data.
"""

from common import F, Figure, Tensor, nn, run, torch, tqdm
from pictures import BLACK, BLUE, GREY, VERMILLION, WIDE

import fastdrop.torch as fdt

P, SAMPLES = 0.2, 200
GROUPS = (-3.5, -1.5), (0.5, 2.5)  # where the data is


def truth(x: Tensor) -> Tensor:
    return torch.sin(2 * x)


def trained(x: Tensor, y: Tensor, steps: int) -> nn.Module:
    model = nn.Sequential(
        nn.Linear(1, 256), nn.ReLU(), fdt.Dropout(P),
        nn.Linear(256, 256), nn.ReLU(), fdt.Dropout(P),
        nn.Linear(256, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-5)
    for _ in tqdm(range(steps), leave=False, disable=None):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model.eval()


def picture(quick: bool) -> Figure:
    torch.manual_seed(0)
    x = torch.cat([start + (end - start) * torch.rand(80, 1) for start, end in GROUPS])
    y = truth(x) + 0.1 * torch.randn_like(x)
    model = trained(x, y, 200 if quick else 3000)
    line = torch.linspace(-7, 6, 400)[:, None]
    prediction = fdt.mc_predict(model, line, SAMPLES, seed=0)
    at, mean, std = (values.squeeze(1) for values in (line, prediction.mean, prediction.std))
    (first, gap_start), (gap_end, last) = GROUPS
    gap, beyond = (gap_start < at) & (at < gap_end), (at < first) | (at > last)
    off = (mean - truth(at)).abs()
    for name, where in (("on the data", ~gap & ~beyond), ("in the gap", gap), ("beyond", beyond)):
        inside = 100 * (off[where] < 2 * std[where]).float().mean()
        print(
            f"{name}: standard deviation {std[where].mean():.2f}, error {off[where].mean():.2f}, "
            f"the truth is inside of two standard deviations at {inside:.0f} % of the points"
        )

    figure = Figure(figsize=(WIDE, 4.5), layout="constrained")
    axis = figure.subplots()
    for deviations in (1, 2):
        axis.fill_between(at, mean - deviations * std, mean + deviations * std, color=BLUE, alpha=0.18, linewidth=0)
    axis.plot(at, mean, color=BLUE, label=f"mean of {SAMPLES} samples; bands: one and two standard deviations")
    axis.plot(at, truth(at), "--", color=GREY, label="what the data came from")
    axis.plot(x, y, ".", color=VERMILLION, markersize=5, label="data")
    axis.axvspan(gap_start, gap_end, color=BLACK, alpha=0.06, linewidth=0)
    worst = (off / std)[gap].max()
    axis.text((gap_start + gap_end) / 2, -3.3, f"gap: the truth is up to\n{worst:.0f} deviations away", ha="center")
    axis.set(title="The band widens beyond the data, but hardly in the gap", xlabel="x", ylabel="y", ylim=(-3.5, 3.5))
    axis.legend(loc="upper left", fontsize=9)
    return figure


if __name__ == "__main__":
    run(picture, __doc__, "uncertainty.png")

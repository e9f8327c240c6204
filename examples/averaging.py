"""Weight scaling against Monte Carlo averaging: how many thinned networks are as good as the whole one.

    python examples/averaging.py

The whole, scaled network needs one forward pass; the mean of k thinned networks needs k. The 2014 paper found that both
are about equally good from 50 samples on.
"""

from common import Figure, accuracy, digits, run, torch, train
from overfitting_gap import mlp
from pictures import BLUE, VERMILLION, WIDE

import fastdrop.torch as fdt

P, SAMPLES, DRAWS = 0.5, 100, 20


def picture(quick: bool) -> Figure:
    training, (x, labels) = digits()
    model = mlp(P)
    for _ in train(model, training, 5 if quick else 60):
        pass
    whole = 100 - accuracy(model, (x, labels))
    errors = []
    for seed in range(2 if quick else DRAWS):
        samples = fdt.mc_predict(model, x, SAMPLES, seed=seed, task="classification", keep_samples=True).samples
        means = samples.cumsum(0) / torch.arange(1, SAMPLES + 1)[:, None, None]
        errors.append(100 * (means.argmax(-1) != labels).float().mean(-1))
    error = torch.stack(errors)
    mean, spread = error.mean(0), error.std(0)
    for k in (1, 10, 50, 100):
        print(f"{k:3} samples: {mean[k - 1]:.2f} % wrong")
    print(f"weight scaling: {whole:.2f} % wrong")

    figure = Figure(figsize=(WIDE, 4), layout="constrained")
    axis = figure.subplots()
    counts = range(1, SAMPLES + 1)
    axis.plot(counts, mean, color=VERMILLION, label=f"mean of k thinned networks; band: spread of {len(errors)} draws")
    axis.fill_between(counts, mean - spread, mean + spread, color=VERMILLION, alpha=0.2, linewidth=0)
    axis.axhline(whole, color=BLUE, linestyle="--", label="weight scaling: the whole network, once")
    axis.set(title="New digits that are not recognised", xlabel="thinned networks k", ylabel="wrong, %", xscale="log")
    ticks = (1, 2, 5, 10, 20, 50, 100)
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.legend()
    return figure


if __name__ == "__main__":
    run(picture, __doc__, "averaging.png")

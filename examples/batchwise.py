"""Dropout of elements and of whole units: accuracy against time, at several learning rates.

    python examples/batchwise.py

Batchwise dropout has one mask for the batch and computes kept units only, so a step costs less. But its gradients are
noisier, and high learning rates diverge. Each point of a curve is an epoch; times are those of the CPU, on one thread.
"""

import time

from common import BATCH, F, Figure, Pair, accuracy, digits, nn, run, torch
from pictures import BLUE, VERMILLION, WIDE

import fastdrop.torch as fdt

RATES = (0.1, 0.03, 0.01)  # of learning, by gradient descent with momentum
MOMENTUM, P, WIDTH = 0.9, 0.5, 1024
KINDS = {"elements": fdt.Dropout, "units of a batch": fdt.BatchwiseDropout}
Curve = tuple[list[float], list[float]]  # seconds, accuracies


def network(drop: type, width: int) -> nn.Sequential:
    model = nn.Sequential(
        *(nn.Linear(64, width), nn.ReLU(), drop(P), nn.Linear(width, width), nn.ReLU(), drop(P), nn.Linear(width, 10))
    )
    fdt.fuse(model)
    return model


def curve(kind: str, rate: float, epochs: int, width: int, data: tuple[Pair, Pair]) -> Curve:
    """Validation's accuracy after so many seconds of training."""
    (x, labels), validation = data
    torch.manual_seed(0)
    model = network(KINDS[kind], width)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    seconds, reached, spent = [], [], 0.0
    for _ in range(epochs):
        begin = time.process_time()
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), labels[batch]).backward()
            optimizer.step()
        spent += time.process_time() - begin
        seconds.append(spent)
        reached.append(accuracy(model.eval(), validation))
        model.train()
    return seconds, reached


def picture(quick: bool) -> Figure:
    epochs, width = (3, 64) if quick else (20, WIDTH)
    data = digits(wrong=0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the CPU's time would include that of threads that wait
    figure = Figure(figsize=(WIDE, 3.8), layout="constrained")
    for axis, rate in zip(figure.subplots(1, len(RATES), sharey=True), RATES, strict=True):
        for kind, colour in zip(KINDS, (BLUE, VERMILLION), strict=True):
            seconds, reached = curve(kind, rate, epochs, width, data)
            axis.plot(seconds, reached, ".-", color=colour, label=kind)
            last = sum(reached[-5:]) / len(reached[-5:])
            print(f"learning rate {rate:g}, {kind}: {last:.1f} % in the last epochs, {seconds[-1]:.1f} s in all")
        axis.set(
            title=f"Learning rate {rate:g}", xlabel="seconds of the CPU, one thread", xlim=(0, None), ylim=(0, 100)
        )
    torch.set_num_threads(threads)
    figure.axes[0].set_ylabel("accuracy on new digits, %")
    figure.axes[-1].legend(loc="lower right", title="dropped")
    return figure


if __name__ == "__main__":
    run(picture, __doc__, "batchwise.png")

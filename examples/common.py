"""What the examples share: handwritten digits, a training loop and the command line.

An example is a module with ``picture(quick)``, which runs its experiment and returns a figure. `pictures.py` has the
look of all pictures.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

try:
    import matplotlib
    import torch
    from matplotlib.figure import Figure
    from rich.console import Console  # noqa: F401  for transformer.py
    from sklearn.datasets import load_digits
    from torch import Tensor, nn
    from torch.nn import functional as F
    from tqdm.auto import tqdm
except ImportError as error:
    from fastdrop.core.installing import how_to_install

    sys.exit(f"{error}. The examples need torch and more: {how_to_install('torch,demo')}")

from pictures import DPI, STYLE, mark_smoke_test

TRAINING = 600  # digits to learn from; the other 1,197 validate
WRONG_LABELS = 0.1  # of the training digits: something to overfit to
BATCH = 60
LAST = 5  # epochs that are averaged at the end: one alone is luck

Pair = tuple[Tensor, Tensor]  # inputs and labels


def digits(wrong: float = WRONG_LABELS) -> tuple[Pair, Pair]:
    """8 x 8 digits (N, 64) from 0 to 1 with their labels, to train and to validate; so many of the first are wrong."""
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    train, validation = order[:TRAINING], order[TRAINING:]
    learned = labels[train]
    changed = torch.rand(TRAINING, generator=generator) < wrong
    learned[changed] = torch.randint(10, (int(changed.sum()),), generator=generator)
    return (x[train], learned), (x[validation], labels[validation])


def train(model: nn.Module, data: Pair, epochs: int, *, rate: float = 1e-3, seed: int = 0) -> Iterator[int]:
    """Adam on the cross-entropy; yields each epoch at its end, with the model in evaluation."""
    torch.manual_seed(seed)
    x, labels = data
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for epoch in tqdm(range(epochs), leave=False, disable=None):
        model.train()
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), labels[batch]).backward()
            optimizer.step()
        model.eval()
        yield epoch


@torch.no_grad()
def accuracy(model: nn.Module, data: Pair) -> float:
    """In percent."""
    x, labels = data
    return 100 * (model(x).argmax(-1) == labels).float().mean().item()


def at_end(accuracies: Sequence[float]) -> float:
    """Mean of the last epochs."""
    last = accuracies[-LAST:]
    return sum(last) / len(last)


def draw(picture: Callable[[bool], Figure], quick: bool) -> Figure:
    """The figure in the style of all pictures; that of a quick form says so."""
    with matplotlib.rc_context(STYLE):
        figure = picture(quick)
        if quick:
            mark_smoke_test(figure)
    return figure


def run(picture: Callable[[bool], Figure], description: str, output: str) -> None:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small form, to see that it runs")
    parser.add_argument("--output", default=output, help="the picture (default: %(default)s)")
    args = parser.parse_args()
    draw(picture, args.quick).savefig(args.output, dpi=DPI)
    print(f"Picture: {args.output}")

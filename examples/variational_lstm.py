"""A recurrent network that keeps its masks over a whole sequence.

    python examples/variational_lstm.py

A new mask at each step soon has dropped every unit of the hidden state, and with it what the unit remembers of the
sequence's begin. A mask for the whole sequence leaves the units that it keeps alone (Gal and Ghahramani, "A
Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016). The left of the picture counts
units.

On the right, two LSTMs learn to predict the next character of Python's own language reference: one without dropout, one
with variational dropout of its inputs, its recurrent connections and its outputs.
"""

from pydoc_data.topics import topics

from common import F, Figure, Tensor, nn, run, torch, tqdm
from matplotlib.axes import Axes
from pictures import BLUE, GREY, VERMILLION, WIDE

import fastdrop.torch as fdt

CHARACTERS, LENGTH, BATCH, WIDTH = 20_000, 64, 32, 128
P, SHOWN_STEPS, SHOWN_UNITS = 0.3, 30, 10_000


class Language(nn.Module):
    """Logits (N, T, vocabulary) of each next character."""

    def __init__(self, vocabulary: int, p: float) -> None:
        super().__init__()
        self.embedding = fdt.EmbeddingDropout(nn.Embedding(vocabulary, WIDTH), p / 4)
        self.lstm = fdt.VariationalLSTM(
            WIDTH, WIDTH, 2, batch_first=True, dropout_input=p, dropout_recurrent=p / 2, dropout_output=p
        )
        self.logits = nn.Linear(WIDTH, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        return self.logits(self.lstm(self.embedding(characters))[0])


def show_untouched(axis: Axes) -> None:
    """Shares of the units that no step so far has dropped, by masks of the rate of the recurrent connections."""
    ones = torch.ones(1, SHOWN_STEPS, SHOWN_UNITS)
    kinds = {
        "a new mask at each step": (fdt.Dropout(P / 2, seed=0), BLUE),
        "one mask for the sequence": (fdt.VariationalDropout(P / 2, 1, seed=0), VERMILLION),
    }
    for name, (drop, colour) in kinds.items():
        untouched = 100 * (drop(ones)[0] > 0).cumprod(0).float().mean(1)
        axis.plot(range(1, SHOWN_STEPS + 1), untouched, ".-", color=colour, label=name)
        print(f"{name}: {untouched[9]:.0f} % of the units are never dropped in 10 steps, {untouched[-1]:.0f} % in 30")
    axis.set(title=f"Units never dropped, p = {P / 2:g}", xlabel="steps", ylabel="units, %", ylim=(0, 100))
    axis.legend()


def load_text() -> tuple[Tensor, Tensor, int]:
    """Characters to learn from, rows (N, LENGTH) of others to validate on, and the size of the alphabet."""
    text = "".join(topics[name] for name in sorted(topics))[:CHARACTERS]
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])
    split = 9 * len(codes) // 10
    return codes[:split], codes[split:].unfold(0, LENGTH, LENGTH), len(alphabet)


def losses_of(p: float, steps: int, every: int) -> dict[int, tuple[float, float]]:
    """Trains a model. Its losses on a batch of training text and on new text, after so many steps."""
    codes, validation, alphabet = load_text()
    torch.manual_seed(0)
    model = Language(alphabet, p)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    losses = {}
    for step in tqdm(range(1, steps + 1), leave=False, disable=None):
        rows = torch.stack([codes[start : start + LENGTH] for start in torch.randint(len(codes) - LENGTH, (BATCH,))])
        model.train()
        optimizer.zero_grad()
        loss(model, rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0:
            model.eval()
            with torch.no_grad():
                losses[step] = loss(model, rows).item(), loss(model, validation).item()
    return losses


def picture(quick: bool) -> Figure:
    figure = Figure(figsize=(WIDE, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    show_untouched(left)
    for name, p, colour in (("no dropout", 0.0, GREY), ("variational dropout", P, VERMILLION)):
        losses = losses_of(p, *((2, 1) if quick else (500, 25)))
        seen, unseen = zip(*losses.values(), strict=True)
        right.plot(list(losses), unseen, color=colour, label=f"{name}, new text")
        right.plot(list(losses), seen, "--", color=colour, label=f"{name}, training text")
        print(f"{name}: {min(unseen):.3f} nats per character of new text at best, {unseen[-1]:.3f} at the end")
    right.set(title="A character-level LSTM", xlabel="training step", ylabel="cross-entropy, nats per character")
    right.legend(fontsize=9)
    return figure


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


if __name__ == "__main__":
    run(picture, __doc__, "variational_lstm.png")

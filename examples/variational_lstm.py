"""A recurrent network that keeps its masks over a whole sequence.

    python examples/variational_lstm.py

Two LSTMs learn to predict the next character of Python's own language reference: one plain, one with variational
dropout of its inputs, its recurrent connections and its outputs (Gal and Ghahramani 2016).
"""

from pydoc_data.topics import topics

from common import F, Figure, Tensor, nn, run, torch, tqdm

import fastdrop.torch as fdt

CHARACTERS, LENGTH, BATCH, WIDTH = 20_000, 64, 32, 128


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


def picture(quick: bool) -> Figure:
    steps, every = (2, 1) if quick else (800, 40)
    text = "".join(topics[name] for name in sorted(topics))[:CHARACTERS]
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])
    split = 9 * len(codes) // 10
    validation = codes[split : split + LENGTH * ((len(codes) - split) // LENGTH)].view(-1, LENGTH)

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, p in (("plain", 0.0), ("variational dropout", 0.3)):
        torch.manual_seed(0)
        model = Language(len(alphabet), p)
        optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
        losses: dict[int, tuple[float, float]] = {}
        for step in tqdm(range(1, steps + 1), leave=False, disable=None):
            starts = torch.randint(split - LENGTH, (BATCH,))
            rows = torch.stack([codes[start : start + LENGTH] for start in starts])
            model.train()
            optimizer.zero_grad()
            loss(model, rows).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % every == 0:
                model.eval()
                with torch.no_grad():
                    losses[step] = loss(model, rows).item(), loss(model, validation).item()
        seen, unseen = zip(*losses.values(), strict=True)
        (line,) = axis.plot(list(losses), unseen, label=f"{name}, new text")
        axis.plot(list(losses), seen, "--", color=line.get_color(), label=f"{name}, training text")
        print(f"{name}: {min(unseen):.3f} nats per character of new text at best, {unseen[-1]:.3f} at the end")
    axis.set(title="A character-level LSTM", xlabel="step", ylabel="cross-entropy, nats per character")
    axis.legend()
    return figure


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


if __name__ == "__main__":
    run(picture, __doc__, "variational_lstm.png")

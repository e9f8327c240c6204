"""Trains a small character-level transformer three times: with torch's dropout, with fastdrop's, and with none.

    python examples/transformer.py            # about three minutes on two cores
    python examples/transformer.py --quick    # under half a minute, to see that it runs

The model is plain ``torch.nn`` and knows nothing of fastdrop. One of its copies trains inside
``fastdrop.torch.enabled()``, where dropout runs on fastdrop, also inside the attention. All copies start from the same
weights and see the same batches. So the two with dropout differ only in their masks. This changes the validation loss
at the end by several hundredths, as another seed of F.dropout does. The copies take turns at every step, so that their
times can be compared. "Kept for backward" is what autograd saves in one forward pass, without parameters. The text is
Python's own language reference, which ships with it.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from operator import sub, truediv
from pydoc_data.topics import topics
from typing import Any

from common import Console, F, Figure, Tensor, matplotlib, nn, torch
from pictures import BLACK, BLUE, DPI, GREY, STYLE, VERMILLION, check_picture, mark_smoke_test
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fastdrop.torch as fdt

CHARACTERS = 120_000  # of the text; the last tenth of them validates
LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 4, 128, 4, 128, 8
LEARNING_RATE = 3e-3  # at its peak
SEED = 0
STEPS, QUICK_STEPS = 1000, 50
WARM_UP = 5  # rounds whose times do not count
VALIDATIONS = 10  # but one every ten steps at most
SMOOTHING = 0.05  # of all steps: training losses shown are means over so many

Context = Callable[[], AbstractContextManager[object]]

F_DROPOUT, FASTDROP, NO_DROPOUT = "F.dropout", "fastdrop", "no dropout"
COLOURS = {F_DROPOUT: BLUE, FASTDROP: VERMILLION, NO_DROPOUT: GREY}


class CharacterModel(nn.Module):
    """Logits (N, CONTEXT, vocabulary) of each next character, given characters (N, CONTEXT)."""

    def __init__(self, vocabulary: int, p: float) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.dropout = nn.Dropout(p)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, p, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS)
        self.logits = nn.Linear(WIDTH, vocabulary)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, characters: Tensor) -> Tensor:
        x = self.dropout(self.characters(characters) + self.positions.weight)
        logits: Tensor = self.logits(self.layers(x, mask=self.causal, is_causal=True))
        return logits

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per character, of windows (N, CONTEXT + 1)."""
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@dataclass
class Contender:
    """One copy of the model, what it trains inside, and what came of it."""

    model: CharacterModel
    context: Context
    steps: int  # to come
    losses: list[float] = field(default_factory=list)  # of every step
    seconds: list[float] = field(default_factory=list)  # of every step
    validation: dict[int, float] = field(default_factory=dict)  # loss after so many steps
    mebibytes: float = 0.0  # kept for backward

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LEARNING_RATE, self.steps)

    def step(self, windows: Tensor) -> None:
        start = time.perf_counter()
        with self.context():
            self.optimizer.zero_grad()
            loss = self.model.loss(windows)
            loss.backward()
            self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def validate(self, windows: Tensor) -> None:
        self.model.eval()
        losses = [self.model.loss(batch).item() for batch in windows.split(4 * BATCH)]
        self.validation[len(self.losses)] = statistics.fmean(losses)
        self.model.train()

    def measure_kept(self, windows: Tensor) -> None:
        """Adds up what one forward pass saves for backward: every storage once, parameters not at all."""
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}  # holds what it counts, so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage
            return tensor

        with self.context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.model.loss(windows)
        self.mebibytes = sum(storage.nbytes() for storage in saved.values()) / 2**20

    @property
    def milliseconds(self) -> float:
        return statistics.median(self.seconds[WARM_UP:]) * 1e3

    def paired(self, compare: Callable[[float, float], float], other: "Contender") -> float:
        """Median over the rounds of two step times compared within a round."""
        return statistics.median(map(compare, self.seconds[WARM_UP:], other.seconds[WARM_UP:]))


def smoothed(losses: list[float]) -> list[float]:
    """Means over the last steps, at each step."""
    width = max(1, round(SMOOTHING * len(losses)))
    return [statistics.fmean(losses[max(0, end - width) : end]) for end in range(1, len(losses) + 1)]


def load_text() -> tuple[Tensor, Tensor, int]:
    """Windows (N, CONTEXT + 1) of characters to train on, others to validate on, and the size of the vocabulary."""
    text = "".join(topics.values())[:CHARACTERS]
    vocabulary = sorted(set(text))
    training, validation = torch.tensor([vocabulary.index(character) for character in text]).split(CHARACTERS // 10 * 9)
    return training.unfold(0, CONTEXT + 1, 1), validation.unfold(0, CONTEXT + 1, CONTEXT), len(vocabulary)


def train(console: Console, p: float, steps: int) -> dict[str, Contender]:
    training, validation, vocabulary = load_text()
    kinds: dict[str, tuple[float, Context]] = {
        F_DROPOUT: (p, nullcontext),
        FASTDROP: (p, fdt.enabled),
        NO_DROPOUT: (0.0, nullcontext),
    }
    contenders = {}
    for name, (its_p, context) in kinds.items():
        torch.manual_seed(SEED)
        contenders[name] = Contender(CharacterModel(vocabulary, its_p), context, steps)
    weights = sum(parameter.numel() for parameter in contenders[FASTDROP].model.parameters())
    console.print(f"Training {LAYERS} layers, {WIDTH} wide, {HEADS} heads, {weights:,} weights, dropout p = {p:g},")
    console.print(f"on batches of {BATCH} x {CONTEXT} characters, {torch.get_num_threads()} threads")

    interval = max(10, steps // VALIDATIONS)
    batches, turns = torch.Generator().manual_seed(SEED), random.Random(SEED)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, auto_refresh=False) as progress:  # its thread would disturb the timing
        task = progress.add_task("", total=steps)
        for step in range(1, steps + 1):
            windows = training[torch.randint(len(training), (BATCH,), generator=batches)]
            for contender in turns.sample(list(contenders.values()), len(contenders)):
                contender.step(windows)
            if step % interval == 0 or step == steps:
                for contender in contenders.values():
                    contender.validate(validation)
                losses = ", ".join(f"{contender.validation[step]:.2f}" for contender in contenders.values())
                progress.update(task, description=f"validation loss {losses}")
            progress.update(task, advance=1, refresh=True)
    for contender in contenders.values():
        contender.measure_kept(windows)
    return contenders


def report(console: Console, contenders: dict[str, Contender]) -> None:
    torchs, ours, floor = contenders.values()
    columns: dict[str, Callable[[Contender], str]] = {
        "step\nms": lambda contender: f"{contender.milliseconds:.1f}",
        "against\nno dropout": lambda contender: f"{contender.paired(truediv, floor):.2f} x",
        "dropout\ncosts, ms": lambda contender: f"{contender.paired(sub, floor) * 1e3:.1f}",
        "kept for\nbackward, MiB": lambda contender: f"{contender.mebibytes:.1f}",
        "training\nloss": lambda contender: f"{smoothed(contender.losses)[-1]:.3f}",
        "validation\nloss": lambda contender: f"{contender.validation[len(contender.losses)]:.3f}",
    }
    table = Table("", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, contender in contenders.items():
        table.add_row(name, *(cell(contender) for cell in columns.values()))
    console.print(table)
    console.print("Ratios and costs are medians over rounds of what is compared within a round, so they")
    console.print("differ from quotients of the first column if the machine's speed changes.")
    ratio, saved = torchs.paired(truediv, ours), torchs.mebibytes - ours.mebibytes
    console.print(f"A step with F.dropout takes {ratio:.2f} times as long as one with fastdrop, and its")
    console.print(f"masks take {saved:.1f} MiB more. The rest above no dropout is what only dropout makes")
    console.print("torch keep: activations before and after it, and attention weights.")


def draw(contenders: dict[str, Contender], p: float) -> Figure:
    floor = contenders[NO_DROPOUT]
    figure: Any = Figure(figsize=(12.5, 4.2), layout="constrained")
    losses, times, memory = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))

    looks = ("-", 7), ("--", 4), ("-", 4)  # so that two curves that coincide both show
    for (name, contender), (line, size) in zip(contenders.items(), looks, strict=True):
        label, colour = name if contender is floor else f"{name}, p = {p:g}", COLOURS[name]
        steps = range(1, len(contender.losses) + 1)
        losses.plot(steps, smoothed(contender.losses), line, color=colour, label=label)
        losses.plot(*zip(*contender.validation.items(), strict=True), "o", color=colour, markersize=size)
    losses.plot([], [], "-", color=BLACK, label="training, smoothed")
    losses.plot([], [], "o", color=BLACK, markersize=4, label="validation")
    losses.set(xlabel="step", ylabel="cross-entropy, nats per character", title="Loss")
    losses.legend(edgecolor="none", framealpha=1)

    ratios = [contender.paired(truediv, floor) for contender in contenders.values()]
    draw_bars(times, ratios, [*(f"{ratio:.2f} x" for ratio in ratios[:-1]), f"{floor.milliseconds:.0f} ms"])
    times.set(title="Time per training step", ylabel="times no dropout's, median of rounds")
    sizes = [contender.mebibytes for contender in contenders.values()]
    draw_bars(memory, sizes, [f"{size:.0f} MiB\n{size / floor.mebibytes:.2f} x" for size in sizes])
    memory.set(title="Kept for the backward pass", ylabel="MiB")
    return figure


def draw_bars(axes: Any, heights: list[float], labels: list[str]) -> None:
    """A bar of each contender, from 0, with its label; a line at the height of the last one."""
    bars = axes.bar(list(COLOURS), heights, 0.62, color=list(COLOURS.values()))
    axes.bar_label(bars, labels, padding=3)
    axes.axhline(heights[-1], color=COLOURS[NO_DROPOUT], linestyle=":")
    axes.margins(y=0.17)
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help=f"training steps of each (default: {STEPS}, quick {QUICK_STEPS})")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--threads", type=int, help="for torch, which fastdrop follows (default: torch's own number)")
    parser.add_argument("--p", type=float, default=0.1, help="drop probability (default: %(default)s)")
    parser.add_argument("--output", default="transformer.png", help="the picture (default: %(default)s)")
    args = parser.parse_args()
    steps = args.steps if args.steps is not None else QUICK_STEPS if args.quick else STEPS
    if steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, the steps that are not timed, but got {steps}")
    check_picture(parser, args.output)

    start = time.perf_counter()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = Console(highlight=False)
    contenders = train(console, args.p, steps)
    report(console, contenders)
    with matplotlib.rc_context(STYLE):
        figure = draw(contenders, args.p)
        if args.quick and args.steps is None:
            mark_smoke_test(figure)
        figure.savefig(args.output, dpi=DPI)
    console.print(f"Picture: {args.output} ({time.perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    main()

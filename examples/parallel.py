"""Trains a transformer in one process, then in four as large models are trained: the losses are the same with fastdrop.

    python examples/parallel.py            # about a minute on two cores
    python examples/parallel.py --quick    # under half a minute, to see that it runs

Each function of ``WAYS`` is a recipe that spreads training over processes. Here they are four on one machine, which
talk by gloo. On several machines ``torchrun`` starts them, and ``init_process_group`` needs the backend only.

The model is plain ``torch.nn`` and trains twice in each way: with torch's own dropout, and inside of
``fdt.enabled()``. torch's masks depend on which process computes what, so they differ from way to way. The masks of
``fdt.name_masks`` depend on the run's seed, a module's name, the step and a sample's number in the whole batch. All
weights are float64, because rounding then hides nothing.
"""

import multiprocessing
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pydoc_data.topics import topics
from typing import Any

from common import F, Figure, Tensor, nn, run, torch
from pictures import BLACK, COLOURS, WIDE
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing import start_processes

import fastdrop.torch as fdt

PROCESSES = 4
BATCH, LENGTH, WIDTH, HEADS, P = 8, 8, 32, 4, 0.4
LEARNING_RATE, MOMENTUM, SEED = 0.2, 0.9, 0
STEPS, QUICK_STEPS = 40, 3
NOTHING = 1e-16  # a logarithmic axis has no 0
SLOW_IMPORTS = [
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "fastdrop.torch",
    "sklearn.datasets",
]
Losses = list[float]  # of the whole batch at each step


class Attention(nn.Module):
    """Of all heads, or of those that this process has."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        projections = (linear(x) for linear in (self.query, self.key, self.value))
        query, key, value = (y.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for y in projections)
        p = P if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=True)
        return self.output(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.attention_dropout = Attention(), nn.Dropout(P)
        self.up, self.up_dropout = nn.Linear(WIDTH, 4 * WIDTH), nn.Dropout(P)
        self.down, self.down_dropout = nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(P)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x)))
        hidden = self.up_dropout(F.gelu(self.up(self.norm(x))))
        return x + self.down_dropout(self.down(hidden))


class Embedding(nn.Module):
    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(alphabet, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.dropout = nn.Dropout(P)

    def forward(self, characters: Tensor) -> Tensor:
        return self.dropout(self.characters(characters) + self.positions.weight)


def transformer() -> nn.Sequential:
    """Logarithms of the probabilities (N, LENGTH, alphabet) of each next character, given characters (N, LENGTH)."""
    torch.manual_seed(SEED)
    *_, alphabet = load_text()
    parts = {
        "embedding": Embedding(alphabet),
        "layer0": Layer(),
        "layer1": Layer(),
        "prediction": nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, alphabet), nn.LogSoftmax(-1)),
    }
    return nn.Sequential(OrderedDict(parts)).double()


def load_text() -> tuple[Tensor, Tensor, int]:
    """Characters (BATCH, LENGTH), those that follow them, and the size of the alphabet.

    The model learns these few by heart. All of them are in each batch, so only dropout makes losses go up and down.
    """
    text = topics["assignment"][: BATCH * LENGTH + 1]
    alphabet = sorted(set(text))
    numbers = torch.tensor([alphabet.index(character) for character in text])
    return numbers[:-1].view(BATCH, LENGTH), numbers[1:].view(BATCH, LENGTH), len(alphabet)


def cross_entropy(logarithms: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(logarithms.flatten(0, 1), labels.flatten())


def gradient_descent(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def train(model: nn.Module, masks: fdt.NamedMasks, mine: Tensor, steps: int) -> Losses:
    """Trains with the samples ``mine`` of the batch: all of them, or this process's share."""
    characters, labels, _ = load_text()
    optimizer = gradient_descent(model)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        with masks.at(step=step, samples=mine):
            loss = cross_entropy(model(characters[mine]), labels[mine])
        loss.backward()
        optimizer.step()
        losses.append(mean_of_processes(loss.detach()))
    return losses


def mean_of_processes(loss: Tensor) -> float:
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def one_process(model: nn.Sequential, steps: int) -> Losses:
    torch.manual_seed(SEED)  # for torch's dropout
    return train(model, fdt.name_masks(model, seed=SEED), torch.arange(BATCH), steps)


def data_parallel(model: nn.Sequential, steps: int) -> Losses:
    """Each process has the whole model, and every fourth sample."""
    torch.manual_seed(SEED + dist.get_rank())  # with equal seeds torch's masks would be the same in all processes
    mine = torch.arange(dist.get_rank(), BATCH, PROCESSES)
    masks = fdt.name_masks(model, seed=SEED)
    return train(nn.parallel.DistributedDataParallel(model), masks, mine, steps)


def fully_sharded(model: nn.Sequential, steps: int) -> Losses:
    """Each process keeps a quarter of each parameter, and has a quarter of the samples."""
    torch.manual_seed(SEED + dist.get_rank())
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for part in model:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = torch.arange(BATCH).chunk(PROCESSES)[dist.get_rank()]
    return train(model, fdt.name_masks(model, seed=SEED), mine, steps)


def tensor_parallel(model: nn.Sequential, steps: int) -> Losses:
    """Each process has all samples, one head of the attention, and a quarter of the hidden units."""
    torch.manual_seed(SEED)  # with different seeds the processes would disagree about what all of them compute
    mesh = init_device_mesh("cpu", (PROCESSES,))
    split = ("attention.query", "attention.key", "attention.value", "up")
    joined = ("attention.output", "down")
    plan = {f"layer*.{name}": ColwiseParallel() for name in split}
    plan |= {f"layer*.{name}": RowwiseParallel() for name in joined}
    parallelize_module(model, mesh, plan)
    # Between the two kinds a process has an ordinary tensor with a part of the heads (axis 1) or hidden units (axis 2).
    layouts = {"layer*.attention": (mesh, [Shard(1)]), "layer*.up_dropout": (mesh, [Shard(2)])}
    return train(model, fdt.name_masks(model, seed=SEED, layouts=layouts), torch.arange(BATCH), steps)


class Stage(nn.Module):
    """A part of the model. The schedule passes it step and samples of each micro-batch, besides the data."""

    def __init__(self, part: nn.Sequential) -> None:
        super().__init__()
        self.part, self.masks = part, fdt.name_masks(part, seed=SEED)

    def forward(self, x: Tensor, step: int, samples: Tensor) -> Tensor:
        with self.masks.at(step=step, samples=samples):
            return self.part(x)


def pipeline(model: nn.Sequential, steps: int) -> Losses:
    """Each process has one part of the model, through which two samples go at a time."""
    rank, last = dist.get_rank(), PROCESSES - 1
    torch.manual_seed(SEED + rank)
    characters, labels, _ = load_text()
    module = Stage(model[rank : rank + 1])  # a slice, so that its modules have the same names as in the model
    stage = PipelineStage(module, rank, PROCESSES, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=BATCH // 2, loss_fn=cross_entropy)
    optimizer = gradient_descent(module)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        inputs = (characters,) if rank == 0 else ()
        target = labels if rank == last else None
        parts = [torch.zeros(())]  # the last process replaces it by the losses of the micro-batches
        schedule.step(*inputs, target=target, losses=parts, step=step, samples=torch.arange(BATCH))
        optimizer.step()
        losses.append(torch.stack(parts).mean().item())
    return losses


WAYS = {  # by number of processes
    1: {"one process": one_process},
    PROCESSES: {"DDP": data_parallel, "FSDP2": fully_sharded, "tensor parallel": tensor_parallel, "pipeline": pipeline},
}


@contextmanager
def as_torch_drops() -> Iterator[None]:
    """Without the warnings that torch's dropout knows no names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* drops by torch's generator")
        yield


DROPOUTS = {"torch's dropout": as_torch_drops, "fastdrop": fdt.enabled}


def work(rank: int, processes: int, folder: str, steps: int) -> None:
    """What each process does: it trains in all ways for so many processes, with each dropout."""
    torch.set_num_threads(1)
    patience = timedelta(minutes=1)  # with other processes; then an error ends all
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", patience, processes, rank)
    losses: dict[str, dict[str, Losses]] = {}
    for name, way in WAYS[processes].items():
        losses[name] = {}
        for dropout, context in DROPOUTS.items():
            with context():
                losses[name][dropout] = way(transformer(), steps)
    if rank == processes - 1:  # which has the losses of all ways
        torch.save(losses, f"{folder}/losses")
    dist.barrier()
    dist.destroy_process_group()


def train_in_processes(processes: int, steps: int) -> dict[str, dict[str, Losses]]:
    with tempfile.TemporaryDirectory() as folder:
        start_processes(work, (processes, folder, steps), processes, start_method="forkserver")
        losses: dict[str, dict[str, Losses]] = torch.load(f"{folder}/losses")
    return losses


def picture(quick: bool) -> Figure:
    steps = QUICK_STEPS if quick else STEPS
    multiprocessing.set_forkserver_preload(SLOW_IMPORTS)  # once, not in each process
    losses = {name: curves for processes in WAYS for name, curves in train_in_processes(processes, steps).items()}
    figure = Figure(figsize=(WIDE, 4.4), layout="constrained")
    *curves, gaps = figure.subplots(1, 3)
    curves[1].sharey(curves[0])
    for axis, dropout, line in zip(curves, DROPOUTS, ("--", "-"), strict=True):
        expected = torch.tensor(losses["one process"][dropout], dtype=torch.float64)
        for turn, (name, colour) in enumerate(zip(losses, COLOURS, strict=True)):
            actual = torch.tensor(losses[name][dropout], dtype=torch.float64)
            axis.plot(actual, color=colour, label=name, **look(turn, dropout == "fastdrop"))
            if turn:
                gap = (actual - expected).abs()
                gaps.plot(gap.clamp(min=NOTHING), line, color=colour)
                print(f"{dropout}, {name}: losses differ from those of one process by at most {gap.max():.1e}")
        axis.set(title=f"Loss with {dropout}", xlabel="step")
        gaps.plot([], [], line, color=BLACK, label=dropout)
    curves[0].set_ylabel("cross-entropy, nats per character")
    curves[0].legend()
    gaps.set(
        title="Difference of the losses", xlabel="step", ylabel="from one process; 0 is drawn as 1e-16", yscale="log"
    )
    gaps.legend(loc="center right")
    return figure


def look(turn: int, coincide: bool) -> dict[str, Any]:
    """Of a curve. Those that coincide are dashes side by side, on one that is wide."""
    if turn == 0:
        return {"linewidth": 6, "alpha": 0.4}
    return {"linewidth": 2, "linestyle": (2 * turn, (2, 6))} if coincide else {"linewidth": 1.5}


if __name__ == "__main__":
    run(picture, __doc__, "parallel.png")

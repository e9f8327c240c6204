"""Training in four processes has the loss curve of one process, however the work is spread over them.

All numbers are float64, so a curve that differs by more than rounding has other masks somewhere.
"""

from __future__ import annotations

import contextlib
import functools

import pytest

torch = pytest.importorskip("torch")

from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

RANKS, STEPS = 4, 3
SAVED = 2  # steps before a checkpoint
BATCH, LENGTH, WIDTH, HEADS, P = 8, 8, 16, 4, 0.2
SHARES = [[5, 0, 3], [7, 1], [2, 6], [4]]  # the samples of each rank
RATE, MOMENTUM = 0.05, 0.9


# ---- models ----


def encoder(layers=2):
    """Of torch's own modules, whose dropout is fastdrop's under `enable`."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, P, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).double()


def deep_encoder():
    """Of a layer or two for each stage of a pipeline."""
    return encoder(2 * RANKS)


class Attention(nn.Module):
    """Its linear layers may give it some of the heads, or DTensors of all."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        heads = [
            linear(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        ]
        y = fdt.scaled_dot_product_attention(*heads, dropout_p=P)
        return self.output(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, with modules of fastdrop."""

    def __init__(self):
        super().__init__()
        self.attention, self.up, self.down = Attention(), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.attention_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention_drop, self.hidden_drop, self.drop = fdt.Dropout(P), fdt.Dropout(P), fdt.Dropout(P)

    def forward(self, x):
        x = x + self.attention_drop(self.attention(self.attention_norm(x)))
        return x + self.drop(self.down(self.hidden_drop(torch.relu(self.up(self.norm(x))))))


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)).double()


# ---- training ----


def data():
    """Input and target of the whole batch."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))


def descent(model):
    return torch.optim.SGD(model.parameters(), RATE, MOMENTUM)


def error(y, target):
    """A sum over samples. So sums of parts are the whole batch's, however uneven they are."""
    y = y.full_tensor() if isinstance(y, DTensor) else y
    return (y - target).square().sum() / (BATCH * LENGTH * WIDTH)


def everywhere(loss, share):
    """The whole batch's loss; of those that have a share of it, each has a part."""
    total = torch.as_tensor(loss).clone()
    if share > 1:
        dist.all_reduce(total)
        total *= share / dist.get_world_size()
    return total.item()


def train(model, masks, batches=(range(BATCH),), share=1, optimizer=None, steps=range(STEPS)):
    """Losses of the whole batch, and the fingerprints of its masks. ``share`` processes have different samples, and
    wrappers of models take the mean of their gradients."""
    x, target = data()
    optimizer = optimizer or descent(model)

    def forward(step, samples):
        index = [*samples]
        with masks.at(step, samples):  # reentrant checkpoints need a gradient of x
            return error(model(x[index].requires_grad_()), target[index])

    losses = []
    for step in steps:
        optimizer.zero_grad()
        own = 0.0
        for turn, samples in enumerate(batches):
            more = turn < len(batches) - 1 and isinstance(model, DistributedDataParallel)
            with model.no_sync() if more else contextlib.nullcontext():
                loss = forward(step, samples)
                (loss * share).backward()
            own += loss.detach()
        optimizer.step()
        losses.append(everywhere(own, share))
    return losses, fingerprints(masks, lambda: [forward(step, samples) for samples in batches])


def fingerprints(masks, run, expected=None):
    with torch.no_grad():
        return fdt.check_masks(masks, run, expected)


# ---- ways to spread the work ----


def one_process(build, seed=0):
    model = build()
    return train(model, fdt.name_masks(model, seed))


def data_parallel(micro_batches):
    """Names of the wrapper's modules are those of the model's."""
    model = DistributedDataParallel(encoder())
    share = SHARES[dist.get_rank()]
    batches = [[sample] for sample in share] if micro_batches else [share]
    return train(model, fdt.name_masks(model), batches, RANKS)


def fully_sharded(shape):
    """Over one axis of a mesh; of two, the first has copies."""
    mesh, model = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :]), encoder()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    masks = fdt.name_masks(fully_shard(model, mesh=mesh))
    return train(model, masks, [SHARES[dist.get_rank()]], RANKS)


def again(forward, reentrant, x, **masks):
    return checkpoint(functools.partial(forward, **masks), x, use_reentrant=reentrant, preserve_rng_state=False)


def checkpointed(reentrant):
    model = encoder()
    for layer in model.layers:
        layer.forward = functools.partial(again, layer.forward, reentrant)
    masks = fdt.name_masks(model)
    model = DistributedDataParallel(model)
    return train(model, masks, [SHARES[dist.get_rank()]], RANKS)


def perceptrons(mesh, local):
    """Tensor-parallel layers of torch's encoder: hidden units are DTensors, or plain tensors that need a layout."""
    model = encoder()
    up, down = ColwiseParallel(use_local_output=local), RowwiseParallel()
    parallelize_module(model, mesh, {"layers.*.linear1": up, "layers.*.linear2": down})
    return model, {"layers.*.dropout": (mesh, [Shard(2)])} if local else {}


def columns_and_rows(mesh, local):
    """Heads and hidden units are DTensors, or plain tensors that need a layout."""
    model = blocks()
    plan = {}
    for block in "01":
        for name in "attention.query", "attention.key", "attention.value", "up":
            plan[f"{block}.{name}"] = ColwiseParallel(use_local_output=local)
        plan |= {f"{block}.{name}": RowwiseParallel() for name in ("attention.output", "down")}
    parallelize_module(model, mesh, plan)
    return model, {"*.attention": (mesh, [Shard(1)]), "*.hidden_drop": (mesh, [Shard(2)])} if local else {}


def tensor_parallel(make, local):
    model, layouts = make(init_device_mesh("cpu", (RANKS,)), local)
    return train(model, fdt.name_masks(model, layouts=layouts))


def sequence_parallel():
    mesh, model = init_device_mesh("cpu", (RANKS,)), blocks()
    rows = {"output_layouts": Shard(1), "use_local_output": False}
    plan = {
        "0": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False),
        "2": SequenceParallel(),
        "3": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for block in "01":
        plan |= {f"{block}.{name}": SequenceParallel() for name in ("attention_norm", "norm", "attention_drop", "drop")}
        plan |= {
            f"{block}.attention": PrepareModuleInput(
                input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=False
            ),
            f"{block}.up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
            f"{block}.attention.output": RowwiseParallel(**rows),
            f"{block}.down": RowwiseParallel(**rows),
        }
        for name in ("query", "key", "value"):
            plan[f"{block}.attention.{name}"] = ColwiseParallel(use_local_output=False)
    parallelize_module(model, mesh, plan)
    return train(model, fdt.name_masks(model))


def two_axes(make, local):
    """Two times two processes: each half of the samples is on two processes, which have the tensors' parts."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, layouts = make(mesh["tensor"], local)
    for module in model.modules():
        if isinstance(module, (Block, nn.TransformerEncoderLayer)):
            fully_shard(module, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    half = mesh["data"].get_local_rank()
    masks = fdt.name_masks(model, layouts=layouts)
    return train(model, masks, [SHARES[2 * half] + SHARES[2 * half + 1]], 2)


class Stage(nn.Module):
    """Some of the encoder's layers. The schedule passes it step and samples of each micro-batch, besides the data."""

    def __init__(self, layers):
        super().__init__()
        self.layers, self.masks = layers, None

    def forward(self, x, step, samples):
        with self.masks.at(step, samples):
            for layer in self.layers:
                x = layer(x)
        return x


def pipeline(build, numbers, count):
    """``numbers`` are those of a rank's stages, of so many."""
    x, target = data()
    layers = deep_encoder().layers
    each = len(layers) // count
    modules = nn.ModuleList(Stage(layers[number * each : (number + 1) * each]) for number in numbers)
    names = {f"{i}.layers.{j}": f"layers.{n * each + j}" for i, n in enumerate(numbers) for j in range(each)}
    masks = fdt.name_masks(modules, names=names)
    stages = []
    for module, number in zip(modules, numbers, strict=True):
        module.masks = masks
        stages.append(PipelineStage(module, number, count, torch.device("cpu")))
    schedule = build(stages, n_microbatches=BATCH // 2, loss_fn=error, scale_grads=False)
    inputs, last = (x,) if 0 in numbers else (), count - 1 in numbers

    def run(step):
        parts = []
        labels = {"target": target, "losses": parts} if last else {}
        schedule.step(*inputs, step=step, samples=torch.arange(BATCH), **labels)
        return sum(part.detach() for part in parts) if last else torch.zeros((), dtype=torch.float64)

    optimizer, losses = descent(modules), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = run(step)
        optimizer.step()
        losses.append(everywhere(loss, RANKS))
    return losses, fdt.check_masks(masks, lambda: run(step))


def one_stage(schedule):
    return pipeline(lambda stages, **options: schedule(stages[0], **options), [dist.get_rank()], RANKS)


def interleaved(schedule):
    return pipeline(schedule, [dist.get_rank(), dist.get_rank() + RANKS], 2 * RANKS)


def zigzag():
    return pipeline(ScheduleZBVZeroBubble, [dist.get_rank(), 2 * RANKS - 1 - dist.get_rank()], 2 * RANKS)


WAYS = {
    encoder: {
        "DDP": (data_parallel, False),
        "accumulation": (data_parallel, True),
        "FSDP2": (fully_sharded, (RANKS,)),
        "HSDP": (fully_sharded, (2, 2)),
        "checkpoints": (checkpointed, False),
        "reentrant checkpoints": (checkpointed, True),
        "TP, layouts": (tensor_parallel, perceptrons, True),
        "TP, DTensors": (tensor_parallel, perceptrons, False),
        "FSDP2 x TP, layouts": (two_axes, perceptrons, True),
    },
    blocks: {
        "TP, layouts": (tensor_parallel, columns_and_rows, True),
        "TP, DTensors": (tensor_parallel, columns_and_rows, False),
        "TP + SP": (sequence_parallel,),
        "FSDP2 x TP, DTensors": (two_axes, columns_and_rows, False),
    },
    deep_encoder: {
        "GPipe": (one_stage, ScheduleGPipe),
        "1F1B": (one_stage, Schedule1F1B),
        "interleaved 1F1B": (interleaved, ScheduleInterleaved1F1B),
        "interleaved zero-bubble": (interleaved, ScheduleInterleavedZeroBubble),
        "zero-bubble": (zigzag,),
    },
}


# ---- tests ----


@fdt.enabled()
def go(ways):
    """What each of the ways returns."""
    return {name: way(*arguments) for name, (way, *arguments) in ways.items()}


@pytest.fixture(scope="module")
def curves(processes):
    """Of one process: losses and fingerprints by seed, for each model."""
    ways = {(build, seed): (one_process, build, seed) for build in WAYS for seed in range(2)}
    (found,) = processes.run(go, ways, size=1)
    for build in WAYS:
        (own, prints), (other, others) = found[build, 0], found[build, 1]
        assert all(abs(a - b) > 1e-3 * b for a, b in zip(own, other, strict=True))
        assert prints.keys() == others.keys()
        assert all(prints[name] != others[name] for name in prints)
    return found


@pytest.mark.parametrize("build", WAYS, ids=lambda build: build.__name__)
def test_losses_are_those_of_one_process(build, processes, curves):
    expected, prints = curves[build, 0]
    for rank, found in enumerate(processes.run(go, WAYS[build])):
        for name, (losses, own) in found.items():
            assert losses == pytest.approx(expected, rel=1e-13, abs=0), (name, rank)
            assert own == prints, (name, rank)


@fdt.enabled()
def first_half(folder):
    mesh, model = init_device_mesh("cpu", (RANKS,)), encoder()
    masks = fdt.name_masks(fully_shard(model, mesh=mesh))
    optimizer = descent(model)
    losses, _ = train(model, masks, [SHARES[dist.get_rank()]], RANKS, optimizer, range(SAVED))
    weights, momenta = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": momenta, "masks": masks.state_dict()}, checkpoint_id=folder)
    return losses


@fdt.enabled()
def second_half(folder):
    """In one process without FSDP2."""
    ranks, model = dist.get_world_size(), encoder()
    if ranks > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    masks, optimizer = fdt.name_masks(model, seed=9), descent(model)
    weights, momenta = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": momenta, "masks": masks.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    masks.load_state_dict(state["masks"])
    batches = [[sample for share in SHARES[dist.get_rank() :: ranks] for sample in share]]
    return train(model, masks, batches, ranks, optimizer, range(masks.step + 1, STEPS))[0]


def test_checkpoint_of_four_processes_goes_on_in_two_and_one(processes, curves, tmp_path):
    expected = curves[encoder, 0][0]
    for losses in processes.run(first_half, tmp_path):
        assert losses == pytest.approx(expected[:SAVED], rel=1e-13, abs=0)
    for size in 2, 1:
        for losses in processes.run(second_half, tmp_path, size=size):
            assert losses == pytest.approx(expected[SAVED:], rel=1e-13, abs=0)


@fdt.enabled()
def mistakes(expected):
    """What `check_masks` says of them."""
    rank, mesh, x = dist.get_rank(), init_device_mesh("cpu", (RANKS,)), next(data())
    model, (parts, layouts) = blocks(), columns_and_rows(mesh, True)
    without = {name: layout for name, layout in layouts.items() if name != "*.hidden_drop"}
    cases = {
        "nothing": (model, {}, SHARES[rank] if rank < 2 else [2, 6, 4] if rank == 2 else []),
        "a layout": (parts, without, range(BATCH)),
        "samples": (model, {}, None),
        "samples of two": (model, {}, [2 * (rank // 2), 2 * (rank // 2) + 1]),
        "a sample twice": (model, {}, SHARES[rank] if rank else [*SHARES[0], 7]),
    }
    said = {}
    for name, (wrong, places, samples) in cases.items():
        with fdt.name_masks(wrong, layouts=places) as masks:

            def run(model=wrong, masks=masks, samples=samples):
                with masks.at(STEPS - 1, samples):
                    model(x[[rank, rank + 1] if samples is None else [*samples]])

            try:
                said[name] = fingerprints(masks, run, expected)
            except RuntimeError as raised:
                said[name] = str(raised)
    return said


def test_first_dropout_that_is_wrong_is_named(processes, curves):
    expected = curves[blocks, 0][1]
    said, *others = processes.run(mistakes, expected)
    assert all(other == said for other in others)
    assert said.pop("nothing") == expected
    for name, start in {
        "a layout": "0.hidden_drop differs from one process",
        "samples": "0.attention differs from one process",
        "samples of two": "0.attention differs from one process",
        "a sample twice": "0.attention has cells twice",
    }.items():
        assert said[name].startswith(start), said

"""DTensors and layouts: the processes of a mesh drop together what one process drops, bit for bit.

Functions that run in the processes return what is wrong.
"""

from __future__ import annotations

import copy
import itertools

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import distributed as dist
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastdrop as fd
import fastdrop.torch as fdt

# Uneven, empty, and smaller than the mesh on some axes.
SHAPES = [(8,), (7,), (3, 5), (4, 6), (1, 9), (2, 3, 4), (5, 4, 6), (2, 2, 2, 8), (0, 3), (64, 33)]


def mesh_2d(*names):
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names or ("dp", "tp"))


def split(x, mesh, placements):
    """A DTensor of what each process has whole already."""
    return distribute_tensor(x.detach(), mesh, placements, src_data_rank=None).requires_grad_(x.requires_grad)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def same_shards(x, expected):
    return torch.equal(x.to_local(), split(expected, x.device_mesh, x.placements).to_local())


def with_gradients(function, arguments, dy=None):
    """The result, and the gradient of each argument."""
    y = function(*arguments)
    tensors = [x for x in arguments if x.requires_grad]
    return y, torch.autograd.grad(y, tensors, torch.ones_like(y) if dy is None else dy)


# ---- trust ----


def every_placement():
    size, wrong = dist.get_world_size(), []
    meshes = [init_device_mesh("cpu", (size,)), *([mesh_2d()] if size == 4 else [])]
    backends = {"numpy", fd.backends.active_name()}  # C, where it was compiled
    for backend, store, shape in itertools.product(sorted(backends), ("bits", "seed"), SHAPES):
        with fd.use_backend(backend):
            x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
            y, (dx,) = with_gradients(lambda x, store=store: fdt.dropout(x, 0.3, seed=5, store=store), [x], dy)
            for mesh in meshes:
                for placements in itertools.product((Replicate(), *map(Shard, range(len(shape)))), repeat=mesh.ndim):
                    own = split(x, mesh, placements)
                    z = fdt.dropout(own, 0.3, seed=5, store=store)
                    z.backward(split(dy, mesh, placements))
                    right = same_shards(z, y) and same_shards(own.grad, dx) and z.shape == y.shape
                    if (backend, store) == ("numpy", "bits") and (mesh.ndim == 1 or shape == (5, 4, 6)):
                        right &= torch.equal(z.full_tensor(), y) and torch.equal(own.grad.full_tensor(), dx)
                    if not right or z.placements != placements or own.grad.placements != placements:
                        wrong.append((backend, store, shape, placements))
    return wrong


@pytest.mark.parametrize("size", [2, 4])
def test_shards_have_the_mask_of_the_whole(processes, size):
    assert processes.run(every_placement, size=size) == [[]] * size


# ---- other functions ----

A = (4, 6, 8)
B = (4, 4, 6, 6)
HALVES = (Shard(0), Shard(1)), (Replicate(), Shard(1))
ROWS = (Shard(0), Shard(0)), (Replicate(), Shard(0))

# The function, its shapes, and placements of the first; the others are replicated, and None makes them plain.
FUNCTIONS = {
    "dropout1d": (lambda x: fdt.dropout1d(x, 0.4, seed=1), [A], HALVES),
    "noise_shape": (lambda x: fdt.dropout(x, 0.4, noise_shape=(None, 1, 8), seed=1), [A], [(Shard(1), Shard(2))]),
    "feature_alpha": (lambda x: fdt.feature_alpha_dropout(x, 0.4, True, seed=1), [A], HALVES),
    "alpha": (lambda x: fdt.alpha_dropout(x, 0.4, True, seed=1), [A], [(Shard(2), Shard(0))]),
    "variational": (lambda x: fdt.variational_dropout(x, 0.4, 1, seed=1), [A], HALVES),
    "depth": (lambda x: fdt.stochastic_depth(x, 0.4, "row", seed=1), [A], HALVES),
    "drop_connect": (lambda x: fdt.drop_connect(x, 0.4, seed=1), [A], HALVES),
    "gaussian": (lambda x: fdt.gaussian_dropout(x, 0.4, seed=1), [A], (*HALVES, (Shard(2), Shard(0)))),
    "gaussian_p": (lambda x, p: fdt.gaussian_dropout(x, p.sigmoid(), seed=1), [A, ()], HALVES),
    "block": (lambda x: fdt.drop_block2d(x, 0.3, 3, seed=1), [B], (*HALVES, (Shard(1), Shard(0)))),
    "coupled": (lambda x: fdt.drop_block2d(x, 0.3, 3, couple_channels=True, seed=1), [B], HALVES),
    "tokens": (lambda x: fdt.token_dropout(x, 0.5, seed=1), [A], (*ROWS, (Shard(0), Shard(2)))),
    "token_index": (lambda x: fdt.token_dropout(x, 0.5, seed=1, return_index=True)[1] + 0 * x[:, :3, 0], [A], ROWS),
    "lora": (
        lambda x, w, b, a, c: fdt.lora_linear(x, w, b, a, c, 0.5, 0.3, seed=1),
        [A, (5, 8), (5,), (2, 8), (5, 2)],
        HALVES,
    ),
    "add": (lambda x, r: fdt.dropout_add(x, r, 0.3, seed=1), [A, A], (*HALVES, (Shard(2), Shard(1)))),
    "bias_add": (
        lambda x, b, r: fdt.bias_dropout_add(x, b, r, 0.3, seed=1),
        [A, (8,), A],
        (*HALVES, (Shard(0), Shard(2))),
    ),
    "relu": (lambda x, b: fdt.bias_act_dropout(x, b, 0.3, "relu", seed=1), [A, (8,)], (*HALVES, (Shard(2), Shard(2)))),
    "swiglu": (lambda x, up: fdt.swiglu_dropout(x, up, 0.3, seed=1), [A, A], (*HALVES, (Shard(0), Shard(2)))),
    "norm": (
        lambda x, r, w, b, i: fdt.dropout_add_layer_norm(x, r, w, b, 0.3, seed=1, input_bias=i)[0],
        [A, A, (8,), (8,), (8,)],
        HALVES,
    ),
    "rms": (lambda x, r, w: sum(fdt.dropout_add_rms_norm(x, r, w, 0.3, seed=1)), [A, A, (8,)], HALVES),
    "softmax": (lambda x, m: fdt.softmax_dropout(x, 0.3, attn_mask=m, seed=1), [A, (6, 8)], HALVES),
    "causal": (lambda x: fdt.softmax_dropout(x, 0.3, causal=True, seed=1), [B], HALVES),
    "attention": (
        lambda q, k, v, m: fdt.scaled_dot_product_attention(q, k, v, m, 0.3, seed=1),
        [B, (4, 4, 9, 6), (4, 4, 9, 5), (6, 9)],
        (*HALVES, (Shard(1), Shard(2))),
    ),
    "few_heads": (
        lambda q, k, v: fdt.scaled_dot_product_attention(q, k, v, None, 0.3, enable_gqa=True, seed=1),
        [B, (4, 2, 9, 6), (4, 2, 9, 6)],
        HALVES,
    ),
    "heads": (
        lambda q, k, v: fdt.scaled_dot_product_attention(
            q, k, v, None, 0.3, True, noise_shape=(4, None, 1, 1), seed=1, store="bits"
        ),
        [B, B, B],
        HALVES,
    ),
}


def every_function():
    mesh, wrong = mesh_2d(), []
    for name, (function, shapes, all_placements) in FUNCTIONS.items():
        arguments = [torch.randn(shape, requires_grad=True) for shape in shapes]
        y, gradients = with_gradients(function, arguments)
        for i, placements in enumerate(all_placements):
            plain = i % 2
            others = [x if plain else split(x, mesh, [Replicate(), Replicate()]) for x in arguments[1:]]
            z, found = with_gradients(function, [split(arguments[0], mesh, placements), *others])
            if z.shape != y.shape or not same_shards(z, y) or not same_shards(found[0], gradients[0]):
                wrong.append((name, placements))
            for number, (a, b) in enumerate(zip(found[1:], gradients[1:], strict=True)):
                if not torch.allclose(whole(a), b, rtol=1e-5, atol=1e-5):
                    wrong.append((name, placements, f"gradient {number + 1}"))
    return wrong


def test_all_functions_take_dtensors(processes):
    assert processes.run(every_function) == [[]] * 4


# ---- what DTensors may be, and what they may be part of ----


def unusual_tensors():
    right = {}
    mesh = mesh_2d()
    for rows in (8, 7, 3):  # FSDP2 over tensor parallelism: the shards of a process lie apart
        layer = nn.Linear(5, rows, bias=False)
        weight = layer.weight.detach().clone()
        fully_shard(parallelize_module(layer, mesh["tp"], ColwiseParallel()), mesh=mesh["dp"])
        assert "Strided" in str(layer.weight.placements)
        dropped = fdt.drop_connect(layer.weight, 0.4, seed=1)
        right[f"strided {rows}"] = torch.equal(dropped.full_tensor(), fdt.drop_connect(weight, 0.4, seed=1))
    x = torch.randn(4, 6, requires_grad=True)
    pending = DTensor.from_local(torch.randn(4, 3) * (1 + dist.get_rank()), mesh, [Partial(), Shard(1)])
    total = pending.full_tensor()
    right["partial"] = torch.equal(fdt.dropout(pending, 0.4, seed=1).full_tensor(), fdt.dropout(total, 0.4, seed=1))
    y, (dx,) = with_gradients(lambda x: fdt.dropout(x, 0.4, seed=1), [x])
    own = split(x, mesh, [Shard(0), Shard(1)])
    fdt.dropout(own, 0.4, seed=1).backward(split(torch.ones(4, 6), mesh, [Replicate(), Shard(0)]))
    right["gradient elsewhere"] = own.grad.placements == own.placements and same_shards(own.grad, dx)
    for drop in (fdt.dropout, fdt.gaussian_dropout):
        own = split(x, mesh, [Shard(0), Shard(1)])
        written = own * 1
        result = drop(written, 0.4, inplace=True, seed=1)
        result.backward(torch.ones_like(result))
        y, (dx,) = with_gradients(lambda x, drop=drop: drop(x, 0.4, seed=1), [x])
        right[f"in place {drop.__name__}"] = result is written and same_shards(written, y) and same_shards(own.grad, dx)
    double = split(x, mesh, [Shard(0), Shard(1)])
    (first,) = torch.autograd.grad((fdt.dropout(double, 0.4, seed=1) ** 2).sum(), double, create_graph=True)
    first.sum().backward()
    right["twice"] = same_shards(double.grad, (fdt.dropout(torch.ones(4, 6), 0.4, seed=1)) ** 2 * 2)
    half = split(x.bfloat16(), mesh, [Shard(0), Shard(1)])
    result = fdt.dropout_add(half, split(x, mesh, [Shard(0), Shard(1)]), 0.4, seed=1)
    right["wider"] = result.dtype is torch.float32 and same_shards(
        result, fdt.dropout_add(x.bfloat16(), x, 0.4, seed=1)
    )
    turned = split(x.t(), mesh, [Shard(1), Shard(0)])
    right["strides"] = fdt.dropout(turned, 0.4, seed=1).stride() == turned.stride()
    right["nothing"] = fdt.dropout(own, 0.4, training=False) is own
    return [name for name, ok in right.items() if not ok]


def modules_of_processes():
    right = {}
    mesh = mesh_2d()
    torch.manual_seed(0)
    x = torch.randn(3, 6)

    def under_seed(function, *arguments):
        torch.manual_seed(5)
        return function(*arguments)

    one = fdt.DropConnect(nn.Linear(6, 8), p=0.4)
    many = [copy.deepcopy(one) for _ in range(2)]
    fully_shard(many[0], mesh=mesh)
    parallelize_module(many[1], mesh["tp"], {"module": ColwiseParallel(use_local_output=False)})
    y = under_seed(one, x)
    y.sum().backward()
    for name, module in zip(("FSDP2", "tensor parallel"), many, strict=True):
        z = whole(under_seed(module, x))
        z.sum().backward()
        gradient = module.module.weight.grad.full_tensor()
        right[name] = torch.equal(z, y) and torch.allclose(gradient, one.module.weight.grad)
    words = fdt.EmbeddingDropout(nn.Embedding(12, 4), 0.5)
    rows = copy.deepcopy(words)
    plan = RowwiseParallel(input_layouts=Replicate(), use_local_output=False)
    parallelize_module(rows, mesh["tp"], {"embedding": plan})
    text = torch.randint(0, 12, (4, 5))
    right["embedding"] = torch.equal(under_seed(rows, text).full_tensor(), under_seed(words, text))

    x = torch.randn(8, 6, 4, 4)
    placements = Shard(0), Shard(-3)
    own = split(x, mesh, placements)
    layout = mesh, placements
    for make in (
        fdt.Dropout,
        fdt.Dropout2d,
        fdt.AlphaDropout,
        fdt.GaussianDropout,
        fdt.DropPath,
        fdt.BatchwiseDropout,
        lambda p, **given: fdt.VariationalDropout(p, 2, **given),
        lambda p, **given: fdt.DropBlock2d(p, 2, **given),
    ):
        y = under_seed(make(0.4), x)
        name = type(make(0.4)).__name__
        right[name] = same_shards(under_seed(make(0.4), own), y)
        in_plan = copy.deepcopy(make(0.4, layout=layout))
        expected = split(y, mesh, placements).to_local()
        right[f"{name} of local tensors"] = torch.equal(under_seed(in_plan, own.to_local()), expected)
        seeded = under_seed(make(0.4, seed=3, layout=layout), own.to_local())
        expected = split(under_seed(make(0.4, seed=3), x), mesh, placements).to_local()
        right[f"{name} with a seed"] = torch.equal(seeded, expected)
    kept = fdt.skip_residual(x, torch.tanh, 0.5, seed=3)
    shard = fdt.skip_residual(own.to_local(), torch.tanh, 0.5, seed=3, part=layout)
    right["skip_residual"] = torch.equal(shard, split(kept, mesh, placements).to_local())
    uneven = split(x[:7], mesh, [Shard(0), Replicate()])
    start = 4 * mesh.get_coordinate()[0]

    def part(shape):
        return fd.Part((7, *shape[1:]), (start, 0, 0, 0), shape)

    y = fdt.dropout(uneven.to_local(), 0.4, seed=3, part=part)
    right["callable"] = torch.equal(y, split(fdt.dropout(x[:7], 0.4, seed=3), mesh, uneven.placements).to_local())

    encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
    x = torch.randn(4, 6, 8)
    own = split(x, mesh, [Shard(0), Replicate()])
    for name, function in (("F.dropout", F.dropout), ("module", nn.Dropout1d(0.4)), ("convert", encoder.dropout)):
        with fdt.enabled():
            y, z = under_seed(function, x), under_seed(function, own)
        right[f"enabled {name}"] = same_shards(z, y)
    q = torch.randn(4, 4, 16, 8)
    with fdt.enabled():
        y = under_seed(F.scaled_dot_product_attention, q, q, q, None, 0.3)
        own = split(q, mesh, [Shard(0), Shard(1)])
        z = under_seed(F.scaled_dot_product_attention, own, own, own, None, 0.3)
    right["enabled attention"] = torch.allclose(z.to_local(), split(y, mesh, z.placements).to_local(), atol=1e-5)
    return [name for name, ok in right.items() if not ok]


def outside_of_the_mesh():
    """The fourth process takes as many numbers as the others do."""
    wrong = []
    mesh = DeviceMesh("cpu", [0, 1, 2])
    x, ones = torch.randn(5, 4, 6, requires_grad=True), torch.ones(6)
    own = distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
    functions = {
        "dropout": lambda x: fdt.dropout(x, 0.3),
        "dropout1d": lambda x: fdt.dropout1d(x, 0.3),
        "gaussian": lambda x: fdt.gaussian_dropout(x, 0.3),
        "norm": lambda x: fdt.dropout_add_layer_norm(x, None, ones)[0],
        "attention": lambda x: fdt.scaled_dot_product_attention(x, x.detach(), x.detach(), dropout_p=0.3),
        "tokens": lambda x: fdt.token_dropout(x.detach(), 0.5),
        "block": lambda x: fdt.drop_block2d(x.unsqueeze(1), 0.3, 2),
    }
    for name, function in functions.items():
        torch.manual_seed(1)
        y, next_number = function(x), torch.rand(())
        torch.manual_seed(1)
        z = function(own)
        if z.requires_grad:
            z.sum().backward()
        if torch.rand(()) != next_number or z.shape != y.shape:
            wrong.append(name)
        if dist.get_rank() < 3 and not torch.equal(z.full_tensor(), y):
            wrong.append((name, "inside"))
    return wrong


@pytest.mark.parametrize("function", [unusual_tensors, modules_of_processes, outside_of_the_mesh])
def test_what_else_is_right(processes, function):
    assert processes.run(function) == [[]] * 4


# ---- errors ----


def errors():
    said = []
    mesh = mesh_2d("errors", "axis")
    x = torch.randn(4, 4, 6, 6)
    own = split(x, mesh, [Shard(0), Shard(3)])
    keys = split(x, mesh, [Shard(0), Shard(2)])
    rows = split(x, mesh, [Shard(0), Replicate()])
    wide = split(torch.randn(6, 6), mesh, [Shard(0), Replicate()])
    some = own[0, 0], wide, None, wide, wide, 1.0, 0.3
    calls = (
        lambda: fdt.softmax_dropout(own, 0.3),
        lambda: fdt.softmax_dropout(keys, 0.3, causal=True),
        lambda: fdt.dropout_add_layer_norm(own, own),
        lambda: fdt.scaled_dot_product_attention(rows, keys, rows, dropout_p=0.3),
        lambda: fdt.drop_block2d(own, 0.3, 2),
        lambda: fdt.token_dropout(split(x, mesh, [Shard(0), Shard(1)]), 0.3),
        lambda: fdt.skip_residual(rows, torch.tanh, 0.3),
        lambda: fdt.batchwise_linear(rows, (wide, wide), (None, None)),
        lambda: fdt.lora_linear(*some),
        lambda: fdt.dropout_add(x, own),
        lambda: fdt.gaussian_dropout(own, torch.full((1, 1, 1, own.shape[-1]), 0.3, requires_grad=True)),
        lambda: fdt.dropout(own, split(torch.full((2,), 0.3), mesh, [Shard(0), Replicate()])),
        lambda: fdt.dropout(own, 0.3, part=fd.Part((4,), (0,), (4,))),
        lambda: fdt.dropout(x, 0.3, part=(mesh, [Shard(0)])),
        lambda: fdt.dropout(x, 0.3, part=(mesh, [Shard(0), Partial()])),
        lambda: fdt.dropout(x, 0.3, part=(mesh, [Shard(0), Shard(4)])),
        lambda: fdt.LayerDrop([nn.Linear(2, 2)], 0.3, layout=(mesh, [Shard(0), Shard(1)])),
        lambda: fdt.VariationalLSTM(2, 2, layout=(mesh, [Shard(0), Shard(1)])),
        lambda: fdt.drop_block2d(x, 0.3, 2, part=fd.Part((8, 4, 6, 6), (0, 0, 0, 0), (4, 4, 6, 6))),
    )
    for call in calls:
        with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
            call()
        said.append(str(error.value))

    # Generators are compared at the first dropout on a mesh that draws from them, and this draws no number.
    torch.manual_seed(dist.get_rank() // 2)
    fdt.dropout(own, 0.3, seed=1)
    with pytest.raises(RuntimeError, match="generators differ: call torch"):
        fdt.dropout(own, 0.3)
    for p in (0.3, split(torch.tensor(0.3), mesh, [Replicate()] * 2)):
        torch.manual_seed(7)
        y = fdt.dropout(own, p).full_tensor()
        torch.manual_seed(7)
        assert torch.equal(y, fdt.dropout(x, whole(p)))
    generator = torch.Generator().manual_seed(dist.get_rank())
    with pytest.raises(RuntimeError, match="generators differ"):
        fdt.dropout(own, 0.3, generator=generator)
    return said


SAID = """
softmax_dropout needs axis -1 of scores whole, but it is sharded: call scores.redistribute
softmax_dropout needs axis -2 of scores whole
dropout_add_layer_norm needs axis -1 of input whole
scaled_dot_product_attention needs axis -2 of key whole, but it is sharded: call key.redistribute
drop_block2d needs axis -1 of input whole
token_dropout needs axis -3 of x whole
skip_residual takes no DTensor: call it on x.to_local() with part=(x.device_mesh, x.placements)
batchwise_linear takes no DTensor
lora_linear needs axis -1 of x whole
input must be a DTensor, as another argument is, but got Tensor
p must be a number or a tensor of one, but got shape
p must be a number, a tensor of one or a replicated DTensor of one
part must not be given where input is a DTensor
layout must have a placement for each of the mesh's 2 axes
layout must have placements Shard or Replicate, but got P(sum)
layout must have placements of 4 axes, but got S(4)
LayerDrop takes no layout
VariationalLSTM takes no layout
part of DropBlock must be a device mesh with placements
"""


def test_errors(processes):
    for said in processes.run(errors):
        for text, expected in zip(said, SAID.strip().splitlines(), strict=True):
            assert text.startswith(expected)


# ---- compiled ----


def compiled():
    """The graphs, and what is wrong."""
    graphs, wrong = [], []
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    bias = torch.randn(6)
    drop = fdt.Dropout(0.4, layout=(mesh, [Shard(1)]))

    def network(x):
        y = fdt.dropout(fdt.bias_act_dropout(x, bias, 0.3), 0.4, store="seed")
        return F.dropout(fdt.dropout1d(y, 0.3), 0.3).to_local() * drop(x.to_local())

    def note(graph, example):
        graphs.append(graph.print_readable(print_output=False))
        return aot_eager(graph, example)

    with fdt.enabled():
        torch.compiler.reset()
        ours, own = torch.compile(network, backend=note, fullgraph=True), split(torch.randn(8, 4, 6), mesh, [Shard(1)])
        for seed in (1, 2):
            results = []
            for call in (network, ours):
                torch.manual_seed(seed)
                y, (dx,) = with_gradients(call, [own.detach().requires_grad_()])
                results.append((y, dx.to_local()))
            if not all(map(torch.equal, *results)):
                wrong.append(seed)
    ours = torch.compile(drop, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x, results = torch.randn(rows, 2, 6), []
        for call in (drop, ours):
            torch.manual_seed(rows)
            results.append(call(x))
        if not torch.equal(*results):
            wrong.append(f"{rows} rows")
    return graphs, wrong


def test_processes_compile_one_graph(processes):
    (graphs, wrong), (others, also_wrong) = processes.run(compiled, size=2)
    assert not wrong
    assert not also_wrong
    assert len(graphs) == 1
    assert others == graphs

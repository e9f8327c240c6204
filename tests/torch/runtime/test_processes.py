"""Dropout for torch in more than one process: workers, forks, and training that is spread over processes.

What runs in processes of its own is a function here, called in a fresh interpreter that a time limit ends. Each test
has one interpreter, because it takes seconds to start.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

import fastdrop as fd
import fastdrop.torch as fdt

from ...cases import ROOT, output_of

LARGE = 300_003  # elements: several threads' worth of work


def call(function, *arguments):
    """Has a function of this module called in a fresh interpreter."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom {__name__} import {function.__name__} as function\n"
    assert output_of(f"{code}function(*{arguments!r})\nprint('done')") == "done"


def public_names():
    """What works on whole models is imported at its first use, and all other names with the package."""
    here = "fastdrop.torch."
    later = {here + "models", here + "tools.audit", here + "tools.monte_carlo", here + "tools.named_masks"}
    assert not later & {*sys.modules}
    assert {*fdt.__all__} <= {*dir(fdt)}
    assert sorted(fdt.__all__) == fdt.__all__
    values = {name: getattr(fdt, name) for name in fdt.__all__}
    assert later <= {*sys.modules}
    for name, value in values.items():
        assert vars(fdt)[name] is value
        assert value.__name__ == name
        assert value.__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'dropuot'"):
        fdt.dropuot  # noqa: B018


def test_models_and_tools_are_imported_at_first_use():
    call(public_names)


def fingerprint(*tensors):
    """Of the bytes, by NumPy and hashlib alone: torch's own loops may hang in a forked process."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


# ---- forks ----


class Masks(Dataset):
    """Item i: i, the worker's number and seed, and two dropouts of ones."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        x = torch.ones(LARGE)
        return i, get_worker_info().id, torch.initial_seed(), fdt.dropout(x, 0.5), fdt.dropout(x, 0.25, store="seed")


def load(seed):
    loader = DataLoader(
        Masks(),
        batch_size=None,
        num_workers=2,
        generator=torch.Generator().manual_seed(seed),
        multiprocessing_context="fork",
        timeout=60,
    )
    return [(i, worker, seed, a.clone(), b.clone()) for i, worker, seed, a, b in loader]


def masks_of(items):
    return [fingerprint(t) for _, _, _, a, b in items for t in (a, b)]


def load_in_workers():
    """Workers draw from their own seeds: the same under one seed of the loader, others under another."""
    first = load(1)
    assert [i for i, *_ in first] == list(range(8))
    seeds = {worker: seed for _, worker, seed, *_ in first}
    assert set(seeds) == {0, 1}
    assert seeds[0] != seeds[1]
    for number, seed in seeds.items():
        torch.manual_seed(seed)
        for _, worker, _, a, b in first:
            if worker == number:
                assert torch.equal(a, fdt.dropout(torch.ones(LARGE), 0.5))
                assert torch.equal(b, fdt.dropout(torch.ones(LARGE), 0.25))
    masks = masks_of(first)
    assert len(set(masks)) == 16
    assert masks_of(load(1)) == masks
    assert not set(masks) & set(masks_of(load(2)))


class NumPyMasks(Dataset):
    """Item i: a mask of the NumPy API, from the process-wide stream."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return str(fd.draw_mask(256, 0.5).words.tolist())


def draw_in_workers():
    """`fd.manual_seed` gives each worker other masks, and those of the next epoch others again."""
    options = {"batch_size": None, "num_workers": 4, "multiprocessing_context": "fork", "timeout": 60}
    runs = []
    for persistent in (False, False, True):
        fd.manual_seed(0)
        loader = DataLoader(NumPyMasks(), persistent_workers=persistent, **options)
        runs.append([mask for _ in range(2) for mask in loader])
    assert [len({*masks}) for masks in runs] == [32, 32, 32]
    assert runs[0] == runs[1]
    assert runs[2][:16] == runs[0][:16]


def in_a_fork(function):
    """What the function returns in a forked child, or what went wrong there."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = function()
        except BaseException as error:
            answer = f"failed: {error!r}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def step(x, store):
    """Forward and backward, with nothing of torch's that takes threads."""
    y = fdt.dropout(x, 0.3, store=store)
    (dx,) = torch.autograd.grad(y, x, x.detach())
    return fingerprint(y, dx, fdt.dropout(x.detach(), 0.5, noise_shape=(1, None)))


def fork_after_use(threads, store):
    """A child has the generator's state, so its next mask is its parent's next, and so is its own child's."""
    torch.set_num_threads(threads)
    x = torch.ones(2, LARGE, requires_grad=True)
    torch.manual_seed(0)
    before = step(x, store)

    def child():
        mine = step(x, store)
        assert in_a_fork(lambda: step(x, store)) == step(x, store)
        for count in (1, threads):
            torch.set_num_threads(count)
            step(x, store)
        return mine

    theirs = in_a_fork(child)
    again = in_a_fork(child)
    ours = step(x, store)
    assert theirs == again == ours != before, (threads, store)
    torch.manual_seed(0)
    assert step(x, store) == before, (threads, store)


def fork_while_others_compute():
    """Forks at moments when another thread is in the middle of a dropout."""
    torch.set_num_threads(2)
    x, stop = torch.ones(LARGE), threading.Event()

    def work():
        while not stop.is_set():
            fdt.dropout(x, 0.5, seed=1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        expected = fingerprint(fdt.dropout(x, 0.5, seed=7))
        for _ in range(10):
            assert in_a_fork(lambda: fingerprint(fdt.dropout(x, 0.5, seed=7))) == expected
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def fork_while_enabled():
    with fdt.enabled():
        x = torch.ones(LARGE)
        torch.manual_seed(0)
        child = in_a_fork(lambda: fingerprint(F.dropout(x)))
        assert child == fingerprint(fdt.dropout(x))


def fork():
    for threads, store in ((1, "seed"), (2, "bits")):
        fork_after_use(threads, store)
    fork_while_enabled()
    fork_while_others_compute()
    load_in_workers()
    draw_in_workers()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_processes_draw_what_they_should():
    """After use, while enabled, in the middle of another thread's dropout, and as a DataLoader's workers."""
    call(fork)


# ---- spawn ----


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(12, 40), fdt.Dropout(0.5), nn.ReLU(), fdt.Dropout(0.2, store="seed"), nn.Linear(40, 6)
    )


def skipping():
    """Of which few samples go through the branch."""
    torch.manual_seed(1)
    branch = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
    return nn.Sequential(fdt.SkipResidual(branch, 0.9), nn.Linear(12, 6))


def dropping_layers(static_parameters=True):
    torch.manual_seed(1)
    layers = [nn.Linear(12, 12) for _ in range(4)]
    return nn.Sequential(nn.Linear(12, 12), fdt.LayerDrop(layers, 0.5, static_parameters=static_parameters))


SOME_AND_NONE = 3, 2  # seeds under which `skipping` keeps samples of one batch, and none


def batch(rank):
    return torch.randn(16, 12, generator=torch.Generator().manual_seed(10 + rank))


def train(net, seed, x):
    torch.manual_seed(seed)
    y = net(x)
    loss = y.sin().sum()
    loss.backward()
    return y.detach(), loss.detach()


def expected_gradients(seeds, make):
    """The mean over ranks of what each has alone; None where no rank has one."""
    nets = [make() for _ in seeds]
    results = [train(net, seed, batch(rank)) for rank, (net, seed) in enumerate(zip(nets, seeds, strict=True))]
    first, second = ([p.grad for p in net.parameters()] for net in nets)
    return results, [None if a is None else (a + b) / 2 for a, b in zip(first, second, strict=True)]


def spawned(rank, shared, file):
    """Drops in place in memory that processes share, then trains with the other process."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    fdt.dropout(shared[rank], 0.5, inplace=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        for seeds in ((5, 6), (7, 7)):
            data_parallel(rank, seeds)
        data_parallel(rank, SOME_AND_NONE, skipping)
        data_parallel(rank, (7, 7), dropping_layers, static_graph=True)
        torch.distributed.barrier()
        fully_sharded(rank, (5, 6))
        fully_sharded(rank, SOME_AND_NONE, skipping)
        for static_parameters in (False, True):
            fully_sharded(rank, (7, 7), lambda static=static_parameters: dropping_layers(static))
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def data_parallel(rank, seeds, make=network, **options):
    net = nn.parallel.DistributedDataParallel(make(), **options)
    results, gradients = expected_gradients(seeds, make)
    for _ in range(2):  # DDP tells in the second step of gradients that it missed in the first
        net.zero_grad()
        y, _ = train(net, seeds[rank], batch(rank))
        torch.testing.assert_close(y, results[rank][0])
        for p, gradient in zip(net.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient)
    alone = make()
    train(alone, seeds[rank], batch(rank))
    assert not torch.allclose(next(alone.parameters()).grad, gradients[0])
    mask = (fdt.dropout(torch.ones(4000), 0.5) == 0).int()
    masks = [torch.empty_like(mask) for _ in range(2)]
    torch.distributed.all_gather(masks, mask)
    assert torch.equal(*masks) == (seeds[0] == seeds[1])


def fully_sharded(rank, seeds, make=network):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, net = init_device_mesh("cpu", (2,)), make()
    linears = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    for layer in linears:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    assert linears[0].weight.to_local().numel() == linears[0].weight.numel() // 2
    y, loss = train(net, seeds[rank], batch(rank))
    results, gradients = expected_gradients(seeds, make)
    torch.testing.assert_close((y, loss), results[rank])
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(None if p.grad is None else p.grad.full_tensor(), gradient)


def gradients_alone(make, seed, rank):
    net = make()
    train(net, seed, batch(rank))
    return [p.grad for p in net.parameters()]


def spawn(file):
    some, none = (gradients_alone(skipping, seed, rank) for rank, seed in enumerate(SOME_AND_NONE))
    assert [bool(g.any()) for g in some] == [True] * 8
    assert [bool(g.any()) for g in none] == [False] * 6 + [True] * 2
    skipped = [g is None for g in gradients_alone(lambda: dropping_layers(static_parameters=False), 7, 0)]
    assert 0 < sum(skipped) < 8
    shared = torch.ones(2, LARGE).share_memory_()
    torch.multiprocessing.spawn(spawned, (shared, file), nprocs=2)
    for rank in range(2):
        torch.manual_seed(rank)
        assert torch.equal(shared[rank], fdt.dropout(torch.ones(LARGE), 0.5))


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)
def test_training_in_two_processes_has_the_mean_of_their_gradients(tmp_path):
    """Under DDP, then FSDP2: dropout, a branch for which one of them keeps no sample, and layers that both skip.
    Before that, each process drops in place in memory that both share."""
    call(spawn, str(tmp_path / "rendezvous"))

"""Tests `fastdrop.torch` on a GPU: masks, seeds, graphs, memory, and that nothing waits.

Skipped without a GPU; `bench/gpu.py` runs this file.
"""

from __future__ import annotations

import itertools
import math
import threading

import numpy as np
import pytest

import fastdrop as fd
from fastdrop import backends

if reason := backends.reason("cuda"):
    pytest.skip(f"no GPU: {reason}", allow_module_level=True)
torch = pytest.importorskip("torch", reason="CUDA tensors come from torch")
if not torch.cuda.is_available():
    pytest.skip("this torch has no CUDA", allow_module_level=True)

import torch.nn.functional as F

import fastdrop.torch as fdt

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (1, 31, 32, 33, 1000, 1023, 1024, 1025, 5000, 131_072, 1_000_003)
P = (0.5, 0.1, 0.003, 0.999)


@pytest.fixture(autouse=True)
def fail_where_something_waits():
    """torch raises at its own synchronising calls inside of `dropout`; tests copy to the CPU outside of it."""
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def dropped(x, *arguments, **options):
    torch.cuda.set_sync_debug_mode("error")
    try:
        return fdt.dropout(x, *arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def data(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def both(x, p, **options):
    """(output, gradient) on the CPU and on the GPU, for the same seed."""
    results = []
    for leaf in (x.detach().clone(), x.detach().cuda()):
        leaf.requires_grad_()
        y = dropped(leaf, p, **options)
        dy = torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x.dtype).to(leaf.device)
        y.backward(dy)
        results.append((y.detach().cpu(), leaf.grad.cpu()))
    return results


def same(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got, expected)


# ---- the same mask ----


@pytest.mark.parametrize("store", ["bits", "seed"])
@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_and_gpu_agree(dtype, n, p, store):
    on_cpu, on_gpu = both(data(n, dtype), p, seed=7, store=store)
    same(on_gpu[0], on_cpu[0])
    same(on_gpu[1], on_cpu[1])


IMAGE = (2, 16, 9, 12)
LAYOUTS = {
    "contiguous": lambda x: x[:3456].view(IMAGE),
    "unaligned": lambda x: x[1:3457].view(IMAGE),
    "channels last": lambda x: x[:3456].view(IMAGE).contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x[:3456].view(9, 2, 12, 16).permute(1, 3, 0, 2),
    "with gaps": lambda x: x[:6912].view(2, 16, 9, 24)[..., ::2],
}


@pytest.mark.parametrize("cells", [None, (2, 16, 1, 1), (1, 16, 9, 1), (2, 1, 9, 12), (1, 1, 1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_in_every_layout(dtype, layout, cells):
    view, results = LAYOUTS[layout], []
    for device in ("cpu", "cuda"):
        x = view(data(7000, dtype).to(device)).detach().requires_grad_()
        for store in ("bits", "seed"):
            y = fdt.dropout(x, 0.3, seed=7, noise_shape=cells, store=store)
            (dx,) = torch.autograd.grad(y, x, view(data(7000, dtype).flip(0).to(device)))
            results += [y.detach(), dx]
    for on_cpu, on_gpu in zip(results[:4], results[4:], strict=True):
        assert on_gpu.stride() == on_cpu.stride()
        same(on_gpu.cpu(), on_cpu)


def test_empty_scalar_and_p_0():
    for x in (torch.empty(0, 3), torch.tensor(2.0)):
        on_cpu, on_gpu = both(x, 0.5, seed=3)
        same(on_gpu[0], on_cpu[0])
        same(on_gpu[1], on_cpu[1])
    x = data(1000)
    same(dropped(x.cuda(), 0.0).cpu(), x)


def test_special_values_are_selected_not_multiplied():
    x = torch.tensor([float("inf"), float("nan"), -0.0, 1e-42] * 500)
    on_cpu, on_gpu = fdt.dropout(x, 0.5, seed=1), dropped(x.cuda(), 0.5, seed=1).cpu()
    assert torch.equal(on_gpu.isnan(), on_cpu.isnan())
    assert torch.equal(on_gpu.nan_to_num(7.0).view(torch.int32), on_cpu.nan_to_num(7.0).view(torch.int32))
    same(dropped(x.cuda(), 1.0).cpu(), torch.zeros_like(x))


def test_in_place_and_nothing_around_it_is_written():
    n = 70_001
    x = data(3 * n)
    on_gpu = x.cuda()
    part = on_gpu[n : 2 * n]
    assert dropped(part, 0.3, inplace=True, seed=2) is part
    same(on_gpu.cpu(), torch.cat([x[:n], fdt.dropout(x[n : 2 * n], 0.3, seed=2), x[2 * n :]]))


@pytest.mark.large
def test_beyond_2_to_the_31_elements():
    n, tail = (1 << 31) + 1000, 100_000
    x = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    y = dropped(x, 0.1, seed=9)
    cell = (n - tail) // 32 * 32
    keep = fd.draw_mask(n - cell, 0.1, rng=9, first_cell=cell).to_bool()
    assert np.array_equal(y[cell:].float().cpu().numpy() != 0, keep)
    keep = fd.draw_mask(tail, 0.1, rng=9, first_cell=(1 << 31) - tail // 2).to_bool()
    middle = y[(1 << 31) - tail // 2 : (1 << 31) + tail // 2]
    assert np.array_equal(middle.float().cpu().numpy() != 0, keep)
    del x, y, middle
    x = torch.ones((2, n // 2), dtype=torch.float16, device="cuda")
    y = dropped(x, 0.1, seed=9, noise_shape=(1, n // 2))
    assert torch.equal(y[0], y[1])
    keep = fd.draw_mask(tail, 0.1, rng=9, first_cell=(n // 2 - tail) // 32 * 32).to_bool()
    start = (n // 2 - tail) // 32 * 32
    assert np.array_equal(y[1, start : start + tail].float().cpu().numpy() != 0, keep)


@pytest.mark.large
def test_beyond_2_to_the_31_elements_backward():
    n = (1 << 31) + 1000
    if torch.cuda.mem_get_info()[0] < 10 * n:
        pytest.skip(f"{10 * n} bytes of GPU memory are not free")
    x = torch.ones(n + 1, dtype=torch.float16, device="cuda")[1:].requires_grad_()  # unaligned
    poisoned = torch.full((n,), math.nan, dtype=torch.float16, device="cuda")
    del poisoned  # the output finds it
    y = fdt.dropout(x, 0.1, seed=9)
    (dx,) = torch.autograd.grad(y, x, x)
    y = y.detach()
    for start in range(0, n, 1 << 28):  # an element left unwritten is NaN, which equals nothing
        assert torch.equal(y[start : start + (1 << 28)], dx[start : start + (1 << 28)])
    kept = sum(int(torch.count_nonzero(y[start : start + (1 << 28)])) for start in range(0, n, 1 << 28))
    assert abs(kept / n - 0.9) < 1e-3


# ---- seeds ----


def test_torchs_seeds():
    x = torch.ones(4000, device="cuda")
    own = torch.cuda.default_generators[torch.cuda.current_device()]
    torch.manual_seed(3)
    state, before = torch.cuda.get_rng_state(), own.get_offset()
    first, second = dropped(x, 0.5), dropped(x, 0.5)
    assert not torch.equal(first, second)
    assert own.get_offset() == before + 8  # torch's own numbers do not repeat ours
    torch.rand(1000, device="cuda")
    for restore in (lambda: torch.manual_seed(3), lambda: torch.cuda.set_rng_state(state)):
        restore()
        same(dropped(x, 0.5), first)
        same(dropped(x, 0.5), second)
    generators = (torch.Generator("cuda").manual_seed(5) for _ in range(2))
    same(*(dropped(x, 0.5, generator=generator) for generator in generators))
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        fdt.dropout(x, 0.5, generator=torch.Generator())


def test_p_on_the_device_is_refused():
    with pytest.raises(ValueError, match="p, the drop probability, must be a number or a tensor on the CPU"):
        fdt.dropout(torch.ones(4, device="cuda"), torch.tensor(0.5, device="cuda"))


# ---- streams, threads, graphs ----


def test_two_streams():
    x = data(3_000_000).cuda()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    results = []
    torch.cuda.synchronize()
    for seed in range(40):
        with torch.cuda.stream(streams[seed % 2]):
            results.append(dropped(x, 0.1, seed=seed))
    torch.cuda.synchronize()
    for seed, y in enumerate(results):
        same(y.cpu(), fdt.dropout(x.cpu(), 0.1, seed=seed))


def test_backward_on_a_fresh_thread():
    x = data(5000).cuda().requires_grad_()
    y = dropped(x, 0.5, seed=1)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    same((x.grad != 0).cpu(), fdt.dropout(torch.ones(5000), 0.5, seed=1) != 0)


def replays(step, before_each):
    """What a step returns, at each replay of its graph, after something that isn't captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for before in before_each:
        before()
        graph.replay()
        yield [result.detach().cpu() for result in results]


@pytest.mark.parametrize("store", ["bits", "seed"])
def test_captured_graphs(store):
    """They draw anew at each replay, or keep a number, or follow a seed on the device."""
    x = data(70_001)
    leaf, at = x.cuda().requires_grad_(), torch.tensor(11, device="cuda")
    dy = leaf.detach().clone()

    def step(seed=None):
        y = fdt.dropout(leaf, 0.3, seed=seed, store=store)
        return y, *torch.autograd.grad(y, leaf, dy)

    drawn = list(replays(step, [lambda: None] * 3))
    for y, dx in drawn:
        same(dx, y)
        assert 0.68 < (y != 0).float().mean() < 0.72
    assert not any(torch.equal(one, other) for (one, _), (other, _) in itertools.combinations(drawn, 2))

    for y, dx in replays(lambda: step(11), [lambda: None] * 2):
        same(y, fdt.dropout(x, 0.3, seed=11))
        same(dx, y)
    seeds = (11, 12, 1 << 40)
    for seed, (y, dx) in zip(seeds, replays(lambda: step(at), [lambda s=s: at.fill_(s) for s in seeds]), strict=True):
        same(y, fdt.dropout(x, 0.3, seed=seed))
        same(dx, y)


def test_make_graphed_callables():
    sample = torch.rand(50_001, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(fdt.Dropout(0.5).cuda(), (sample,))
    masks = []
    for _ in range(3):
        x = (1.0 + torch.rand(50_001, device="cuda")).requires_grad_()
        y = graphed(x)
        y.backward(torch.ones_like(y))
        masks.append((x.grad != 0).cpu())
        same(y.detach().cpu(), torch.where(masks[-1], 2.0 * x.detach().cpu(), 0.0))
    for one, other in itertools.combinations(masks, 2):
        assert abs(float((one == other).double().mean()) - 0.5) < 0.02


@pytest.mark.parametrize("options", [{}, {"seed": 7}, {"store": "seed"}, {"noise_shape": (1, 99)}], ids=str)
def test_backward_does_not_wait_either(options):
    x = data((40, 99)).cuda().requires_grad_()
    dy = torch.ones_like(x)
    torch.autograd.grad(fdt.dropout(x, 0.3, **options), x, dy)
    y = dropped(x, 0.3, **options)
    torch.cuda.set_sync_debug_mode("error")  # until the fixture's end
    torch.autograd.grad(y, x, dy)


# ---- memory ----


@pytest.mark.parametrize(("store", "limit"), [("bits", 1_000_003 // 8 + 4), ("seed", 8)])
def test_an_eighth_of_a_byte_per_element_is_kept(store, limit):
    x, kept = data(1_000_003, torch.bfloat16).cuda().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fdt.dropout(x, 0.5, store=store)
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) <= limit


@pytest.mark.parametrize("cells", [None, (16, 64, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nothing_is_copied(layout, cells):
    """Forward takes its output and the mask, backward its output, and neither anything else for a while."""
    x = torch.randn(16, 64, 64, 64, device="cuda").to(memory_format=layout).requires_grad_()
    dy = torch.ones_like(x)
    output, slack = x.numel() * 4, 4 << 20  # the allocator hands out up to 2 MiB more than asked for

    def peak(call):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result

    taken, y = peak(lambda: fdt.dropout(x, 0.1, noise_shape=cells))
    assert output <= taken <= output + x.numel() // 8 + slack
    taken, _ = peak(lambda: torch.autograd.grad(y, x, dy))
    assert output <= taken <= output + slack


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_device_counts_and_not_the_current_one():
    x = data(5000)
    same(dropped(x.to("cuda:1"), 0.5, seed=1).cpu(), fdt.dropout(x, 0.5, seed=1))
    with pytest.raises(ValueError, match="seed must be on the CPU or on cuda:1"):
        fdt.dropout(x.to("cuda:1"), 0.5, seed=torch.tensor(3, device="cuda:0"))


def test_cudnns_recurrent_layers_do_not_wait_after_it():
    lstm, x = torch.nn.LSTM(16, 16, 2, dropout=0.2).cuda(), torch.ones(5, 3, 16, device="cuda")
    lstm(x)  # sets up its dropout's state, and waits
    fdt.dropout(x, 0.5)
    torch.cuda.set_sync_debug_mode("error")
    lstm(x)


# ---- the rest of torch ----


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    x = data((64, 100)).cuda().requires_grad_()

    def step(x):
        return fdt.dropout(torch.sin(x), 0.4) * 2

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for _ in range(3):
        y = compiled(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        same((gradient != 0).cpu(), (y != 0).detach().cpu())
    first, second = compiled(x).detach().clone(), compiled(x).detach().clone()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    x = data(5000).cuda().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(lambda x: fdt.dropout(x.sin(), 0.5).cos(), x, use_reentrant=reentrant)
    y.sum().backward()
    same((x.grad != 0), (y != 1.0).detach())


def test_enable():
    x = torch.full((4000,), float("inf"), device="cuda")
    with fdt.enabled():
        y = F.dropout(x, 0.5)
        assert not y.isnan().any()
        torch.manual_seed(2)
        first = F.dropout(x, 0.5)
    torch.manual_seed(2)
    same(fdt.dropout(x, 0.5), first)
    assert F.dropout(x, 0.5).isnan().any()

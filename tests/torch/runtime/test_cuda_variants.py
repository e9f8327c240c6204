"""The family on CUDA without a GPU, as in `test_torch_cuda`: CPU tensors that say they are CUDA's, and fake ones."""

from __future__ import annotations

import contextlib
import functools
import itertools

import pytest

torch = pytest.importorskip("torch", reason="fastdrop.torch needs torch")

import fastdrop.torch as fdt
from fastdrop.torch.runtime import cuda as cuda_runtime
from fastdrop.torch.runtime import mask_kernels, seeds

from ..cases import KINDS, WAYS, Kind, assert_equal, saved_tensors
from .test_cuda import STREAM, cuda, memory  # noqa: F401

pytest_plugins = ["tests.backends.cuda.gpu_stub"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OPS = torch.ops.fastdrop


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=WAYS)
def way(request) -> Kind:
    return WAYS[request.param]


@pytest.fixture
def device(cuda, monkeypatch):  # noqa: F811
    """`cuda` that knows the memory of the family's kernels as well."""
    seen = []
    cuda.gpu.allow_from(lambda: seen)
    zeros = torch.zeros

    def recorded(*arguments, **options):
        made = zeros(*arguments, **options)
        seen.append(memory(made))
        return made

    for name in ("forward", "draw", "apply", "apply_strided", "dilate", "count", "gaussian"):
        real = getattr(cuda_runtime, name)

        def watched(*arguments, real=real):
            seen[:] = [memory(x) for x in arguments if isinstance(x, torch.Tensor)]
            with monkeypatch.context() as patch:
                patch.setattr(torch, "zeros", recorded)  # where the count goes
                return real(*arguments)

        monkeypatch.setattr(cuda_runtime, name, watched)
    return cuda


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def both(device, function, x):
    """(output, gradient) on the CPU, then on the GPU."""
    results = []
    for context in (contextlib.nullcontext, device):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with context():
            y = function(leaf)
            (dx,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype))
        results.append((y.detach(), dx))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradient_are_the_cpus(device, way, dtype):
    for p in way.p:
        on_cpu, on_gpu = both(device, functools.partial(way.torch, p=p, seed=7), normal(way.shape, dtype))
        assert_equal(on_gpu, on_cpu)
    assert {launch.stream for launch in device.gpu.launches} == {STREAM}


LAYOUTS = {
    "transposed": lambda shape: normal(shape[::-1]).permute(*reversed(range(len(shape)))),
    "channels last": lambda shape: normal((shape[0], *shape[2:], shape[1])).movedim(-1, 1),
    "every other": lambda shape: normal((*shape[:-1], 2 * shape[-1]))[..., ::2],
    "expanded": lambda shape: normal((*shape[:-1], 1)).expand(shape),
    "empty": lambda shape: normal((0, *shape[1:])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(device, kind, layout):
    x, function = LAYOUTS[layout](kind.shape), functools.partial(kind.torch, p=0.3, seed=7)
    on_cpu, on_gpu = both(device, function, x)
    assert_equal(on_gpu, on_cpu)
    with device():
        y = function(x)
        assert y.stride() == torch.empty_like(x).stride()
        if kind.in_place and layout != "expanded":
            assert function(x, inplace=True) is x
            assert_equal(x, y)


def test_a_seed_follows_from_the_generators_state(device, kind):
    x = normal(kind.shape)
    with device() as state:
        y = kind.torch(x, 0.3)
        assert state.generator.offset == 4
    assert_equal(y, kind.torch(x, 0.3, seed=seeds.mix(5, 0)))


def test_captured_calls_draw_into_memory_that_the_kernel_reads(device, way):
    x = normal(way.shape).requires_grad_()
    with device() as state:
        state.capturing = True
        torch.manual_seed(4)
        y = way.torch(x, 0.3)
        (dx,) = torch.autograd.grad(y.sum(), x)
    torch.manual_seed(4)
    expected = way.torch(x, 0.3, seed=torch.empty((), dtype=torch.int64).random_())
    assert_equal((y.detach(), dx), (expected.detach(), torch.autograd.grad(expected.sum(), x)[0]))


def test_nothing_waits_and_nothing_is_copied(device, kind, monkeypatch):
    with device():
        monkeypatch.setattr(torch.Tensor, "item", None)
        leaf = normal(kind.shape).requires_grad_()
        with saved_tensors() as kept:
            y = kind.torch(leaf, 0.3)
        y.sum().backward()
    assert kept
    allowed = ("cuInit", "cuDevice", "cuCtx", "cuModule", "cuLaunchKernel", "cuThreadExchangeStreamCaptureMode")
    assert not [name for name in device.gpu.calls if not name.startswith((*allowed, "cuGetProcAddress", "cuDriverGet"))]
    assert len(device.gpu.launches) >= (1 if kind.law == "standard" else 2)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("extents", [(7, 8), (3, 40), (1, 5)], ids=str)
def test_blocks_of_any_size(device, extents, size):
    x = normal((3, 2, *extents))
    for p, coupled in itertools.product((0.1, 0.9, 1.0), (False, True)):
        function = functools.partial(fdt.drop_block2d, p=p, block_size=size, seed=7, couple_channels=coupled)
        on_cpu, on_gpu = both(device, function, x)
        assert_equal(on_gpu, on_cpu)


def test_words_and_count_on_another_device_are_refused(device):
    x, words, kept = torch.ones(2, 1, 4, 8), torch.zeros(2, dtype=torch.int32), torch.tensor(5)
    with device():
        with pytest.raises(ValueError, match="words must be 2 int32 on cpu for 64 cells, but got"):
            mask_kernels.keep_blocks(x, words.to("meta"), kept, None)
        for other in (kept.to("meta"), kept.int(), torch.tensor([5, 5])):
            with pytest.raises(ValueError, match="kept_count must be one int64 on cpu, but got"):
                mask_kernels.keep_blocks(x, words, other, None)


def test_p_on_the_gpu_is_refused(device, kind):
    with device(), pytest.raises(ValueError, match="p, the drop probability, must be a number or a tensor on the CPU"):
        kind.torch(torch.ones(kind.shape), torch.tensor(0.5))


# ---- fake CUDA tensors ----


@pytest.fixture
def fake(kind):
    """A CUDA tensor without memory, where nothing is recorded for a gradient."""
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        yield torch.empty(kind.shape, device="cuda")


def test_fake_tensors_stay_on_their_device(kind, fake):
    drop = functools.partial(kind.torch, p=0.3)
    assert drop(fake).device == drop(fake, seed=3).device == fake.device
    for randomness in ("same", "different"):
        assert torch.vmap(drop, randomness=randomness)(fake.expand(3, *fake.shape)).device == fake.device


def test_a_trace_has_the_ops(kind, fake):
    from torch.fx.experimental.proxy_tensor import make_fx

    names = {"gaussian": ["gaussian"], "blocks": ["draw_blocks", "keep_blocks"]}.get(kind.law, ["forward"])
    code = make_fx(lambda x: kind.torch(x, 0.3))(fake).code
    assert all(f"torch.ops.fastdrop.{name}.default" in code for name in ["draw", *names])


def test_compiled_for_fake_tensors(kind, fake):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: kind.torch(x, 0.4), backend="aot_eager", fullgraph=True)
    assert compiled(fake).device == fake.device


def test_fake_ops_have_their_results_on_the_device():
    with torch._subclasses.FakeTensorMode():
        x, seed = torch.empty(2, 3, 8, 8, device="cuda"), torch.tensor(3)
        for p, overload in ((0.3, "default"), (torch.tensor(0.3), "tensor")):
            words, kept = getattr(OPS.draw_blocks, overload)(x, seed, p, [2, 3, 8, 8], [2, 2])
            assert (words.device, words.shape, kept.device, kept.shape) == (x.device, (12,), x.device, ())
            assert OPS.keep_blocks(x, words, kept, [2, 3, 8, 8]).device == x.device
            assert getattr(OPS.gaussian, overload)(x, seed, p).device == x.device

"""The CUDA side of `fastdrop.torch` without a GPU: CPU tensors that say they are CUDA's, the real kernels in the
interpreter, and fake CUDA tensors for what compilers see. `test_cuda_gpu.py` has what takes a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="fastdrop.torch needs torch")

import fastdrop.torch as fdt
from fastdrop import backends
from fastdrop.torch.models import enable
from fastdrop.torch.runtime import cuda as cuda_runtime
from fastdrop.torch.runtime import dispatch, mask_kernels
from fastdrop.torch.runtime import seeds as seed_source

from ..cases import assert_equal

pytest_plugins = ["tests.backends.cuda.gpu_stub"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STREAM = 0x5EED
CELLS = ((3, 4, 5, 8), (3, 4, 1, 1), (1, 4, 5, 8), (3, 1, 1, 1), (1, 4, 1, 8), (1, 1, 1, 1))


class Generator:
    """The state that a CUDA generator has on the host."""

    device = torch.device("cuda", 0)

    def __init__(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def graphsafe_get_state(self) -> Generator:
        return self

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset


def memory(x: torch.Tensor) -> np.ndarray:
    """All of the storage that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy()


@pytest.fixture
def cuda(gpu, monkeypatch):
    """``with cuda():`` makes all tensors CUDA's, on a device that `gpu` plays."""
    seen: list[np.ndarray] = []
    gpu.allow_from(lambda: seen)
    for name in ("forward", "draw", "apply", "apply_strided"):
        real = getattr(cuda_runtime, name)

        def watched(*arguments, real=real):
            seen[:] = [memory(x) for x in arguments if isinstance(x, torch.Tensor)]
            return real(*arguments)

        monkeypatch.setattr(cuda_runtime, name, watched)
    monkeypatch.setattr(cuda_runtime, "place", lambda x: (0, STREAM))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # what a CPU tensor's device has for an index
    backends.cuda_backend.cache_clear()
    state = SimpleNamespace(generator=Generator(5), capturing=False)
    monkeypatch.setattr(torch.cuda, "default_generators", {None: state.generator})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)

    @contextlib.contextmanager
    def playing() -> Iterator[SimpleNamespace]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
            yield state

    playing.state, playing.gpu = state, gpu
    yield playing
    backends.cuda_backend.cache_clear()


def data(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def both(cuda, x, *arguments, **options):
    """(output, gradient) on the CPU, then on the GPU."""
    results = []
    for context in (contextlib.nullcontext, cuda):
        leaf = x.detach().clone().requires_grad_()
        with context():
            y = fdt.dropout(leaf, *arguments, **options)
            y.backward(torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x.dtype))
        results.append((y.detach(), leaf.grad))
    return results


@pytest.mark.parametrize("store", ["bits", "seed"])
@pytest.mark.parametrize("n", [1, 33, 1024, 2500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradient_are_the_cpus(cuda, dtype, n, store):
    on_cpu, on_gpu = both(cuda, data(n, dtype), 0.1, seed=7, store=store)
    assert_equal(on_gpu[0], on_cpu[0])
    assert_equal(on_gpu[1], on_cpu[1])
    assert {launch.stream for launch in cuda.gpu.launches} == {STREAM}
    assert len(cuda.gpu.launches) == 2


@pytest.mark.parametrize("cells", CELLS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_masks_of_any_grid_in_both_layouts(cuda, layout, cells):
    x = data((3, 4, 5, 8)).to(memory_format=layout)
    on_cpu, on_gpu = both(cuda, x, 0.4, seed=5, noise_shape=cells)
    assert_equal(on_gpu[0], on_cpu[0])
    assert_equal(on_gpu[1], on_cpu[1])
    assert on_gpu[0].stride() == x.stride()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[1:, 3:9],
        lambda x: x[:, 1:],
        lambda x: x[0, 1:],
        lambda x: x.expand(3, *x.shape),
        lambda x: x.to(torch.complex64),
        lambda x: x[:0],
        lambda x: x[0, 0],
    ],
    ids=["transposed", "every other", "block", "unaligned rows", "unaligned", "expanded", "complex", "empty", "scalar"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_other_strides(cuda, view, inplace):
    x = data((12, 70))
    if inplace and view(x).stride().count(0):
        pytest.skip("can't be written in place")
    expected = fdt.dropout(view(x.clone()), 0.4, inplace=inplace, seed=5)
    with cuda():
        given = view(x.clone())
        y = fdt.dropout(given, 0.4, inplace=inplace, seed=5)
    assert (y is given) == inplace
    assert y.stride() == expected.stride()
    assert_equal(y, expected)


@pytest.mark.parametrize("p", [0.0, 1e-12, 1.0, 1 - 1e-12])
def test_ends_of_p(cuda, p):
    on_cpu, on_gpu = both(cuda, data(100), p, seed=5) if p > 1e-10 else ((data(100),), (data(100),))
    assert_equal(on_gpu[0], on_cpu[0])
    with cuda():
        y = fdt.dropout(data((4, 50)), p, seed=5, noise_shape=(4, 1))
    assert_equal(y, fdt.dropout(data((4, 50)), p, seed=5, noise_shape=(4, 1)))


# ---- seeds ----


def test_a_seed_follows_from_the_generators_state_and_moves_it_on(cuda):
    x = torch.ones(2000)
    with cuda() as state:
        first, second = fdt.dropout(x, 0.5), fdt.dropout(x, 0.5)
        assert state.generator.offset == 8
        state.generator.offset = 0
        assert_equal(fdt.dropout(x, 0.5), first)
    assert not torch.equal(first, second)
    assert_equal(first, fdt.dropout(x, 0.5, seed=seed_source.mix(5, 0)))


def test_eager_and_ops_take_the_same_seed(cuda):
    x = torch.ones(2000)
    with cuda() as state:
        first = fdt.dropout(x, 0.5)
        state.generator.offset = 0
        seed = torch.ops.fastdrop.draw(x, [])
        y, _ = torch.ops.fastdrop.forward(x, seed, 0.5, None, True)
    assert_equal(y, first)


def test_captured_calls_draw_into_memory_that_the_kernel_reads(cuda):
    x = torch.ones(2000)
    with cuda() as state:
        state.capturing = True
        offset = state.generator.offset
        leaf = x.clone().requires_grad_()
        torch.manual_seed(4)
        y = fdt.dropout(leaf, 0.5, store="seed")
        y.sum().backward()
        assert state.generator.offset == offset
    assert_equal(leaf.grad, y.detach())
    torch.manual_seed(4)
    assert_equal(y.detach(), fdt.dropout(x, 0.5, seed=torch.empty((), dtype=torch.int64).random_()))


def test_seeds_differ_by_offset_and_by_seed():
    seeds = {seed_source.mix(seed, offset) for seed in (0, 1, 2**63, 2**64 - 1) for offset in range(0, 4000, 4)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**64 for seed in seeds)
    # SplitMix64's published first output for seed 0 is that of the state one step on.
    assert seed_source.mix(0x9E3779B97F4A7C15, 0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True)])
def test_a_seed_on_the_device_is_not_read_where_nothing_is_dropped(cuda, monkeypatch, p, training):
    monkeypatch.setattr(torch.Tensor, "item", None)
    x = torch.ones(8)
    with cuda():
        assert fdt.dropout(x, p, training, seed=torch.tensor(3)) is x
        with pytest.raises(ValueError, match="seed must be one number"):
            fdt.dropout(x, p, training, seed=torch.tensor([3, 4]))


def test_generators_of_the_wrong_device(cuda):
    with cuda(), pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        fdt.dropout(torch.ones(4), 0.5, generator=torch.Generator())


def test_p_on_the_gpu_is_refused(cuda):
    with cuda(), pytest.raises(ValueError, match="p, the drop probability, must be a number or a tensor on the CPU"):
        fdt.dropout(torch.ones(4), torch.tensor(0.5))


# ---- no GPU, no backend ----


def test_the_reason_is_given_where_there_is_no_backend(monkeypatch):
    backends.cuda_backend.cache_clear()
    module = backends._module_of("cuda.launch")
    monkeypatch.setattr(module, "unavailable", lambda: "numba-cuda is not installed: get it")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    with pytest.raises(RuntimeError, match="backend 'cuda' can't run here: numba-cuda is not installed: get it"):
        fdt.dropout(torch.ones(4), 0.5, seed=3)


@pytest.mark.parametrize("usable", [False, True])
def test_enable_takes_cuda_tensors_where_it_can(monkeypatch, usable):
    monkeypatch.setattr(cuda_runtime, "is_usable", lambda device: usable)
    with torch._subclasses.FakeTensorMode():
        assert enable.is_supported(torch.ones(4, device="cuda"), 0.5) == usable
        assert enable.is_supported(torch.ones(4), 0.5)


def test_devices_that_cannot_be_used_are_left_to_torch(gpu):
    cuda_runtime.is_usable.cache_clear()
    backends.cuda_backend.cache_clear()
    try:
        gpu.install((9, 0), (7, 0))
        assert cuda_runtime.is_usable(0)
        with pytest.warns(
            UserWarning, match=r"dropout on cuda:1 stays torch's: .* 7\.5 or later, and this one has 7\.0"
        ):
            assert not cuda_runtime.is_usable(1)
        gpu.install((9, 0))
        gpu.fail("cuModuleLoadData", 222)
        cuda_runtime.is_usable.cache_clear()
        with pytest.warns(UserWarning, match=r"can't load what the compiler made .* update the driver, or pip install"):
            assert not cuda_runtime.is_usable(0)
    finally:
        cuda_runtime.is_usable.cache_clear()
        backends.cuda_backend.cache_clear()


# ---- what compilers see ----


def test_plain_keys_are_those_of_cuda_tensors():
    python = torch._C.DispatchKeySet(torch._C.DispatchKey.Python).raw_repr()
    python |= torch._C.DispatchKeySet(torch._C.DispatchKey.PythonTLSSnapshot).raw_repr()
    with torch._subclasses.FakeTensorMode():
        for inference in (False, True):
            with torch.inference_mode(inference):
                for device in ("cpu", "cuda"):
                    x = torch.empty(4, device=device)
                    assert torch._C._dispatch_keys(x).raw_repr() & ~python in dispatch.PLAIN, (device, inference)
    assert len(dispatch.PLAIN) == 4


def test_fake_tensors_stay_on_their_device():
    # Without derivatives: a torch without CUDA can't have a graph of CUDA tensors, not even fake ones.
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(40, 3, device="cuda")
        y = fdt.dropout(x, 0.4)
        assert y.device == x.device
        seed = torch.ops.fastdrop.draw(x, [])
        assert seed.device == x.device
        out, words = torch.ops.fastdrop.forward(x, seed, 0.4, [40, 1], True)
        assert (out.device, words.device, words.shape) == (x.device, x.device, (2,))
        assert torch.ops.fastdrop.backward(y, words, 0.4, [40, 1]).device == x.device
        assert torch.ops.fastdrop.forward(x, torch.tensor(3), 0.4, None, False)[1].device == x.device


def test_words_on_another_device_are_refused(cuda):
    x = torch.ones(64)
    with cuda(), pytest.raises(ValueError, match="words must be 2 int32 on cpu for 64 cells, but got"):
        mask_kernels.apply(x, torch.zeros(2, dtype=torch.int32, device="meta"), 2.0, None)


def test_nothing_waits_and_nothing_is_copied(cuda):
    with cuda():
        leaf = data(3000).requires_grad_()
        fdt.dropout(leaf, 0.5).sum().backward()
    allowed = ("cuInit", "cuDevice", "cuCtx", "cuModule", "cuLaunchKernel", "cuThreadExchangeStreamCaptureMode")
    called = [name for name in cuda.gpu.calls if not name.startswith((*allowed, "cuGetProcAddress", "cuDriverGet"))]
    assert not called
    assert not [name for name in cuda.gpu.calls if "Synchronize" in name]


@pytest.fixture
def fake():
    """A CUDA tensor without memory, where nothing is recorded for a gradient (see above)."""
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        yield torch.empty(4, 8, device="cuda")


def test_transforms_of_fake_tensors_stay_on_their_device(fake):
    drop = functools.partial(fdt.dropout, p=0.3)
    assert torch.vmap(drop, randomness="different")(fake).device == fake.device
    assert torch.vmap(drop, randomness="same")(fake).device == fake.device
    value, tangent = torch.func.jvp(functools.partial(drop, seed=1), (fake,), (torch.empty_like(fake),))
    assert value.device == tangent.device == fake.device


def test_a_trace_has_the_ops(fake):
    from torch.fx.experimental.proxy_tensor import make_fx

    code = make_fx(lambda x: fdt.dropout(x, 0.3))(fake).code
    assert "torch.ops.fastdrop.draw.default" in code
    assert "torch.ops.fastdrop.forward.default" in code


@pytest.mark.parametrize("strict", [False, True])
def test_export(fake, strict):
    exported = torch.export.export(torch.nn.Sequential(fdt.Dropout(0.3)), (fake,), strict=strict)
    values = {str(node.target): node.meta["val"] for node in exported.graph.nodes if node.op == "call_function"}
    assert values["fastdrop.draw.default"].device == fake.device
    assert [value.device for value in values["fastdrop.forward.default"]] == [fake.device] * 2


def test_compile(fake):
    seen = []

    def backend(graph, inputs):
        seen.append(inputs[0].device)
        return graph.forward

    assert torch.compile(lambda x: fdt.dropout(x, 0.3), backend=backend, fullgraph=True)(fake).device == fake.device
    assert seen == [fake.device]
    compiled = torch.compile(lambda x: fdt.dropout(x, 0.4), backend="aot_eager", fullgraph=True)
    assert compiled(fake).device == fake.device

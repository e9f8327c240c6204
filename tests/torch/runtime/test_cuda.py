"""The CUDA side of `fastdrop.torch` without a GPU: CPU tensors that say they are CUDA's, the real kernels in the
interpreter, and fake CUDA tensors for what compilers see. tests/backends/cuda/test_gpu_torch.py has what takes a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="fastdrop.torch needs torch")

from torch.fx.experimental.proxy_tensor import make_fx

import fastdrop.torch as fdt
from fastdrop import backends
from fastdrop.torch.models import enable
from fastdrop.torch.runtime import cuda as cuda_runtime
from fastdrop.torch.runtime import mask_kernels
from fastdrop.torch.runtime import seeds as seed_source
from fastdrop.torch.runtime.dispatch.tensors import EAGER_DENSE_KEYS

from ..cases import DISTINCT, WAYS, Kind, assert_equal, saved_tensors

pytest_plugins = ["tests.backends.cuda.gpu_stub"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STREAM = 0x5EED
FAMILY = DISTINCT | {name: WAYS[name] for name in ("drop_block2d uneven", "drop_block3d")}
# One of each kernel, and of each way in which cells are found.
FEW = ("dropout, bits", "dropout2d, seed", "variational_dropout batch first, bits", "drop_block2d", "gaussian_dropout")
OPS = torch.ops.fastdrop
ALLOWED = ("cuInit", "cuDevice", "cuCtx", "cuModule", "cuLaunchKernel", "cuThreadExchangeStreamCaptureMode")


@pytest.fixture(params=FEW)
def way(request) -> Kind:
    return FAMILY[request.param]


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


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def both(cuda, function, x):
    """(output, gradient) on the CPU, then on the GPU."""
    results = []
    for context in (contextlib.nullcontext, cuda):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with context():
            y = function(leaf)
            (dx,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype))
        results.append((y.detach(), dx))
    return results


def assert_same(cuda, function, x):
    on_cpu, on_gpu = both(cuda, function, x)
    assert_equal(on_gpu, on_cpu)


# ---- values ----


@pytest.mark.parametrize(("name", "dtype"), list(zip(FAMILY, itertools.cycle(DTYPES), strict=False)))
def test_output_and_gradient_are_the_cpus(cuda, name, dtype):
    way = FAMILY[name]
    for p in way.p:
        assert_same(cuda, functools.partial(way.torch, p=p, seed=7), normal(way.shape, dtype))
    assert {launch.stream for launch in cuda.gpu.launches} == {STREAM}


@pytest.mark.parametrize(
    ("n", "dtype", "store"),
    [
        (1, torch.float32, "bits"),
        (33, torch.float64, "seed"),
        (1024, torch.float16, "bits"),
        (2500, torch.bfloat16, "seed"),
    ],
)
def test_sizes(cuda, n, dtype, store):
    assert_same(cuda, functools.partial(fdt.dropout, p=0.1, seed=7, store=store), normal(n, dtype))
    assert len(cuda.gpu.launches) == 2


@pytest.mark.parametrize(
    ("cells", "layout"),
    [
        ((3, 4, 1, 1), torch.channels_last),
        ((1, 4, 5, 8), torch.contiguous_format),
        ((1, 4, 1, 8), torch.channels_last),
        ((1, 1, 1, 1), torch.contiguous_format),
    ],
    ids=str,
)
def test_masks_of_any_grid_in_both_layouts(cuda, layout, cells):
    x = normal((3, 4, 5, 8)).to(memory_format=layout)
    assert_same(cuda, functools.partial(fdt.dropout, p=0.4, seed=5, noise_shape=cells), x)


LAYOUTS = {
    "transposed": lambda shape: normal(shape[::-1]).permute(*reversed(range(len(shape)))),
    "every other": lambda shape: normal((*shape[:-1], 2 * shape[-1]))[..., ::2],
    "part": lambda shape: normal((*shape[:-1], shape[-1] + 3))[..., 1:-2],
    "expanded": lambda shape: normal((*shape[:-1], 1)).expand(shape),
    "empty": lambda shape: normal((0, *shape[1:])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(cuda, way, layout):
    x, function = LAYOUTS[layout](way.shape), functools.partial(way.torch, p=0.3, seed=7)
    assert_same(cuda, function, x)
    with cuda():
        y = function(x)
        assert y.stride() == torch.empty_like(x).stride()
        if way.in_place and layout != "expanded":
            assert function(x, inplace=True) is x
            assert_equal(x, y)


def test_complex_numbers_and_scalars(cuda):
    for x in (normal((12, 7)).to(torch.complex64), normal(())):
        with cuda():
            y = fdt.dropout(x, 0.4, seed=5)
        assert_equal(y, fdt.dropout(x, 0.4, seed=5))


@pytest.mark.parametrize("p", [0.0, 1e-12, 1 - 1e-12])
def test_ends_of_p(cuda, p):
    x = normal((4, 50))
    for options in ({}, {"noise_shape": (4, 1)}):
        with cuda():
            y = fdt.dropout(x, p, seed=5, **options)
        assert_equal(y, fdt.dropout(x, p, seed=5, **options))


@pytest.mark.parametrize(
    ("extents", "size", "coupled"), [((7, 8), 1, False), ((7, 8), 2, True), ((3, 40), 9, False), ((1, 5), 7, True)]
)
def test_blocks_of_any_size(cuda, extents, size, coupled):
    for p in (0.1, 0.9):
        function = functools.partial(fdt.drop_block2d, p=p, block_size=size, seed=7, couple_channels=coupled)
        assert_same(cuda, function, normal((3, 2, *extents)))


# ---- seeds ----


def test_a_seed_follows_from_the_generators_state_and_moves_it_on(cuda, way):
    x = normal(way.shape)
    with cuda() as state:
        first, second = way.torch(x, 0.3), way.torch(x, 0.3)
        assert state.generator.offset == 8
    assert not torch.equal(first, second)
    assert_equal(first, way.torch(x, 0.3, seed=seed_source.mix(5, 0)))


def test_eager_and_ops_take_the_same_seed(cuda):
    x = torch.ones(2000)
    with cuda() as state:
        first = fdt.dropout(x, 0.5)
        state.generator.offset = 0
        seed = torch.ops.fastdrop.draw(x, [])
        y, _ = torch.ops.fastdrop.forward(x, seed, 0.5, None, True)
    assert_equal(y, first)


def test_captured_calls_draw_into_memory_that_the_kernel_reads(cuda, way):
    x = normal(way.shape).requires_grad_()
    with cuda() as state:
        state.capturing = True
        torch.manual_seed(4)
        y = way.torch(x, 0.3)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert state.generator.offset == 0
    torch.manual_seed(4)
    expected = way.torch(x, 0.3, seed=torch.empty((), dtype=torch.int64).random_())
    assert_equal((y.detach(), dx), (expected.detach(), torch.autograd.grad(expected.sum(), x)[0]))


def test_nothing_waits_and_nothing_is_copied(cuda, way, monkeypatch):
    with cuda():
        monkeypatch.setattr(torch.Tensor, "item", None)
        leaf = normal(way.shape).requires_grad_()
        with saved_tensors() as kept:
            y = way.torch(leaf, 0.3)
        y.sum().backward()
    assert kept
    assert not [name for name in cuda.gpu.calls if not name.startswith((*ALLOWED, "cuGetProcAddress", "cuDriverGet"))]
    assert len(cuda.gpu.launches) >= 2


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


@pytest.mark.parametrize("name", ["dropout, bits", "drop_block2d", "gaussian_dropout"])
def test_p_on_the_gpu_is_refused(cuda, name):
    way = FAMILY[name]
    with cuda(), pytest.raises(ValueError, match="p, the drop probability, must be a number or a tensor on the CPU"):
        way.torch(torch.ones(way.shape), torch.tensor(0.5))


def test_words_and_count_on_another_device_are_refused(cuda):
    x, words, kept = torch.ones(2, 1, 4, 8), torch.zeros(2, dtype=torch.int32), torch.tensor(5)
    refused = "words must be 2 int32 on cpu for 64 cells, but got"
    with cuda():
        with pytest.raises(ValueError, match=refused):
            mask_kernels.apply(x, words.to("meta"), (2.0, 0.0, 0.0), None)
        with pytest.raises(ValueError, match=refused):
            mask_kernels.keep_blocks(x, words.to("meta"), kept, None)
        for other in (kept.to("meta"), kept.int(), torch.tensor([5, 5])):
            with pytest.raises(ValueError, match="kept_count must be one int64 on cpu, but got"):
                mask_kernels.keep_blocks(x, words, other, None)


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
                    assert torch._C._dispatch_keys(x).raw_repr() & ~python in EAGER_DENSE_KEYS, (device, inference)
    assert len(EAGER_DENSE_KEYS) == 4


def test_fake_ops_have_their_results_on_the_device():
    # Without derivatives: a torch without CUDA can't have a graph of CUDA tensors, not even fake ones.
    with torch._subclasses.FakeTensorMode():
        x, seed = torch.empty(2, 3, 8, 8, device="cuda"), torch.tensor(3)
        assert OPS.draw(x, []).device == x.device
        for p, overload in ((0.3, "default"), (torch.tensor(0.3), "tensor")):
            y, words = getattr(OPS.forward, overload)(x, seed, p, [2, 1, 8, 1], True)
            assert (y.device, words.device, words.shape) == (x.device, x.device, (1,))
            assert getattr(OPS.backward, overload)(y, words, p, [2, 1, 8, 1]).device == x.device
            words, kept = getattr(OPS.draw_blocks, overload)(x, seed, p, [2, 3, 8, 8], [2, 2])
            assert (words.device, words.shape, kept.device, kept.shape) == (x.device, (12,), x.device, ())
            assert OPS.keep_blocks(x, words, kept, [2, 3, 8, 8]).device == x.device
            assert getattr(OPS.gaussian, overload)(x, seed, p).device == x.device


@pytest.fixture
def fake(way):
    """A CUDA tensor without memory, where nothing is recorded for a gradient (see above)."""
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        yield torch.empty(way.shape, device="cuda")


def test_transforms_of_fake_tensors_stay_on_their_device(way, fake):
    drop = functools.partial(way.torch, p=0.3)
    assert drop(fake).device == drop(fake, seed=3).device == fake.device
    for randomness in ("same", "different"):
        assert torch.vmap(drop, randomness=randomness)(fake.expand(3, *fake.shape)).device == fake.device


def test_a_trace_has_the_ops(way, fake):
    names = {"gaussian": ["gaussian"], "blocks": ["draw_blocks", "keep_blocks"]}.get(way.scaling, ["forward"])
    code = make_fx(lambda x: way.torch(x, 0.3))(fake).code
    assert all(f"torch.ops.fastdrop.{name}.default" in code for name in ["draw", *names])


def test_export_and_compile():
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 8, device="cuda")
        exported = torch.export.export(torch.nn.Sequential(fdt.Dropout(0.3)), (x,))
        values = {str(node.target): node.meta["val"] for node in exported.graph.nodes if node.op == "call_function"}
        assert values["fastdrop.draw.default"].device == x.device
        assert [value.device for value in values["fastdrop.forward.default"]] == [x.device] * 2
        torch.compiler.reset()
        compiled = torch.compile(lambda x: fdt.dropout(x, 0.4), backend="aot_eager", fullgraph=True)
        assert compiled(x).device == x.device

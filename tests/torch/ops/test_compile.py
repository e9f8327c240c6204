"""Dropout for torch, compiled and exported: one graph, and the values of eager code under the same seed."""

from __future__ import annotations

import math

import pytest

import fastdrop as fd

torch = pytest.importorskip("torch")

import torch._dynamo.compiled_autograd as compiled_autograd
from torch import nn
from torch._dynamo.utils import counters
from torch.func import grad, jacfwd, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of many kinds

STORES = ("bits", "seed")
BACKENDS = ("aot_eager", "inductor")
P = (0.1, 0.5, 1.0, 0.7)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled before; nor by another version of this package, as torch's cache of gradients would have it."""
    torch.compiler.reset()
    counters.clear()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch.compiler.reset()


@pytest.fixture
def x():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def graphs():
    """How many graphs the compiler has made."""
    return counters["stats"]["unique_graphs"]


def compiled(function, backend="aot_eager", **options):
    """In one graph, or an error."""
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def run(function, seed, x, *arguments):
    """Output and gradient under a seed; the gradient depends on the values."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = function(x, *arguments)
    real = y.abs() if y.is_complex() else y
    real.sin().sum().backward()
    return y.detach(), x.grad


def drops(x, p=0.5, **options):
    """Two dropouts, with something for the compiler to fuse between them."""
    return fdt.dropout(fdt.dropout(x.sin() + 3, p, **options) + 1, 0.3, **options)


def assert_same(actual, expected):
    """The same elements dropped; the others within the rounding of compiled arithmetic."""
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a == 0, e == 0)
        assert (a.shape, a.stride(), a.dtype) == (e.shape, e.stride(), e.dtype)
        torch.testing.assert_close(a, e, equal_nan=True)


def assert_equals_eager(function, compiled_function, x, *arguments, seeds=(0, 1, 2)):
    expected = [run(function, seed, x, *arguments) for seed in seeds]
    for seed, e in zip(seeds, expected, strict=True):
        assert_same(run(compiled_function, seed, x, *arguments), e)
    return expected


# ---- values ----


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(x, backend, store):
    """Two dropouts in one graph: two masks, eager's sequence of them, and others under another seed."""

    def function(x):
        return drops(x, store=store)

    results = assert_equals_eager(function, compiled(function, backend), x, seeds=range(5))
    assert graphs() == 1
    masks = [y == 0 for y, _ in results]
    assert not any(torch.equal(masks[0], mask) for mask in masks[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_dropouts_of_one_input_differ(backend):
    both = compiled(lambda x: (fdt.dropout(x, 0.5), fdt.dropout(x, 0.5)), backend)
    x = torch.ones(500)
    torch.manual_seed(3)
    first, second = both(x)
    torch.manual_seed(3)
    assert torch.equal(first, fdt.dropout(x, 0.5))
    assert torch.equal(second, fdt.dropout(x, 0.5))
    assert not torch.equal(first, second)


def test_compiled_saves_packed_bits(x):
    """The words, and nothing else of their size, live from forward to backward."""
    x = torch.randn(64, 64, requires_grad=True)
    for store, expected in (("bits", 64 * 64 // 8), ("seed", 8)):
        function = compiled(lambda x, store=store: fdt.dropout(x, 0.5, store=store))
        function(x)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.nbytes), t)[1], lambda t: t):
            function(x)
        assert sum(sizes) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_bfloat16_channels_last(backend):
    x = torch.randn(2, 3, 4, 5).bfloat16().to(memory_format=torch.channels_last)

    def function(x):
        return fdt.dropout(x * 2, 0.5)

    results = assert_equals_eager(function, compiled(function, backend), x)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(6, 5).t(),
        torch.randn(10, 12)[::2, 1::3],
        torch.randn(6, 1).expand(6, 5),
        torch.randn(6, 5, dtype=torch.complex64),
        torch.randn(6, 5, dtype=torch.float64),
        torch.randn(6, 5).half(),
        torch.randn(()),
        torch.randn(0, 5),
    ],
    ids=["transposed", "strided", "expanded", "complex", "float64", "float16", "scalar", "empty"],
)
def test_compiled_equals_eager_on_any_layout(x):
    ours = compiled(fdt.dropout)
    for seed in range(3):
        torch.manual_seed(seed)
        actual = ours(x)
        torch.manual_seed(seed)
        expected = fdt.dropout(x)
        assert_same([actual], [expected])


@pytest.mark.parametrize("noise_shape", [(1, None), (None, 1), (1, 1), (8, 16), [8, 1]], ids=str)
@pytest.mark.parametrize("store", STORES)
def test_compiled_noise_shape(x, store, noise_shape):
    def function(x):
        return fdt.dropout(x, 0.5, noise_shape=noise_shape, store=store)

    assert_equals_eager(function, compiled(function), x)


@pytest.mark.parametrize("store", STORES)
def test_compiled_in_place(x, store):
    def inside(x):
        y = x * 2
        z = fdt.dropout(y, 0.5, inplace=True, store=store)
        return z + y

    assert_equals_eager(inside, compiled(inside), x)
    ours, own = compiled(lambda x: fdt.dropout(x, 0.5, inplace=True, store=store)), x.clone()
    torch.manual_seed(4)
    y = ours(own)
    torch.manual_seed(4)
    assert torch.equal(own, fdt.dropout(x, 0.5))
    assert y is own


def test_compiled_without_gradients(x):
    ours = compiled(drops)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(2)
            y = ours(x)
        torch.manual_seed(2)
        assert_same([y], [drops(x)])


def test_compiled_autocast(x):
    weight = torch.randn(16, 16)

    def function(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fdt.dropout(x @ weight, 0.5)

    results = assert_equals_eager(function, compiled(function), x)
    assert results[0][0].dtype == torch.bfloat16


# ---- arguments ----


@pytest.mark.parametrize("kind", [float, int, "nn.Module"], ids=["float", "int", "module"])
def test_compiled_p(x, kind):
    module = fdt.Dropout(0.5)

    def function(x, p):
        return fdt.dropout(x, p)

    ours = compiled(function)
    for i, p in enumerate((0, 1, 0, 1) if kind is int else P):
        if kind == "nn.Module":
            module.p = p
            assert_equals_eager(module, compiled(module), x, seeds=(i,))
        else:
            assert_equals_eager(function, ours, x, p, seeds=(i,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_p_in_a_tensor_compiles_once(x, backend, store, dtype):
    def function(x, p):
        return fdt.dropout(x, p, store=store)

    ours = compiled(function, backend)
    for i, p in enumerate((*P, 0.0, 1 / 3)):
        assert_equals_eager(function, ours, x, torch.tensor(p, dtype=dtype), seeds=(i,))
    assert graphs() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("store", STORES)
def test_compiled_p_in_a_tensor_is_not_in_torchs_caches(x, store, dtype, tmp_path, monkeypatch):
    """Compiled with one p and found again on disk, a graph is right for another."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def function(x, p):
        return fdt.dropout(x, p, store=store)

    with torch._functorch.config.patch(enable_autograd_cache=True):
        for i, p in enumerate(P):
            torch.compiler.reset()
            assert_equals_eager(function, compiled(function, "inductor"), x, torch.tensor(p, dtype=dtype), seeds=(i,))


@pytest.mark.parametrize("store", STORES)
def test_compiled_seed_as_an_int(x, store):
    """One graph for the first, one for all the others."""

    def function(x, seed):
        return fdt.dropout(x, 0.5, seed=seed, store=store)

    ours = compiled(function)
    for seed in (5, 0, 1, 77, 2**31, 2**40, 2**63 - 1):
        assert_equals_eager(function, ours, x, seed, seeds=(0,))
    assert graphs() <= 4  # 0 and 1 have theirs


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_compiled_seed_of_64_bits(x, seed):
    def function(x):
        return fdt.dropout(x, 0.5, seed=seed)

    assert_equals_eager(function, compiled(function), x, seeds=(0,))


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("store", STORES)
def test_compiled_seed_in_a_tensor_compiles_once(x, store, shape):
    def function(x, seed):
        return fdt.dropout(x, 0.5, seed=seed, store=store)

    ours = compiled(function)
    for seed in (0, 1, 77, -3, 2**40, -(2**63)):
        y, _ = assert_equals_eager(function, ours, x, torch.full(shape, seed), seeds=(0,))[0]
        keep = torch.from_numpy(fd.draw_mask((8, 16), 0.5, rng=seed % 2**64).to_bool())
        assert torch.equal(y != 0, keep)
    assert graphs() == 1


def test_compiled_training_flag_and_mode(x):
    def function(x, training):
        return fdt.dropout(x, 0.5, training)

    ours = compiled(function)
    for training in (True, False, True, False):
        assert_equals_eager(function, ours, x, training, seeds=(0,))
    assert graphs() <= 2
    module = fdt.Dropout(0.5)
    ours = compiled(module)
    for training in (True, False, True, False):
        module.train(training)
        assert_equals_eager(module, ours, x, seeds=(0,))


@pytest.mark.parametrize("options", [{"training": False}, {"p": 0.0}, {"p": 1e-10}, {"p": 0}], ids=str)
def test_compiled_identity(x, options):
    state = torch.get_rng_state()
    assert compiled(lambda x: fdt.dropout(x, **options))(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"p": 1.5}, "dropout probability has to be between 0 and 1, but got 1.5"),
        ({"p": -0.1, "training": False}, "dropout probability has to be between 0 and 1, but got -0.1"),
        ({"p": float("nan")}, "dropout probability has to be between 0 and 1, but got nan"),
        ({"p": torch.tensor(1.5)}, "dropout probability has to be between 0 and 1, but got 1.5"),
        ({"store": "bytes"}, "store must be one of 'bits', 'seed', but got 'bytes'"),
        ({"noise_shape": (2, 16)}, "noise_shape must be 1, None or the full extent"),
        ({"noise_shape": (1,)}, "noise_shape must have one entry per axis"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": torch.tensor(1.0)}, "seed must be an int or a tensor of int64"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_compiled_errors_are_eagers(x, options, words, fullgraph):
    with pytest.raises(Exception, match=words) as eager:
        fdt.dropout(x, **options)
    with pytest.raises(Exception, match=words) as ours:
        torch.compile(fdt.dropout, backend="aot_eager", fullgraph=fullgraph)(x, **options)
    if not fullgraph:  # torch's own error, with ours inside, where it may not leave the graph
        assert type(ours.value) is type(eager.value)


def test_compiled_p_of_another_type_is_refused(x):
    for function in (fdt.dropout, torch.compile(fdt.dropout, backend="aot_eager")):
        with pytest.raises(TypeError):
            function(x, "0.5")


def test_compiled_integers_are_refused():
    with pytest.raises(RuntimeError, match="dropout takes float32"):
        compiled(fdt.dropout)(torch.ones(3, dtype=torch.int64))


def test_compiled_generator_is_refused_by_name(x):
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(Exception, match=r"generator can't be compiled.*: give seed"):
        compiled(lambda x: fdt.dropout(x, 0.5, generator=generator))(x)


def test_compiled_generator_breaks_the_graph_where_that_is_allowed(x, backend):
    """Whichever backend draws: torch would take NumPy's code for its own, and has no shift of uint64."""
    ours = torch.compile(lambda x, g: fdt.dropout(x, 0.5, generator=g), backend="aot_eager")
    y = ours(x, torch.Generator().manual_seed(3))
    assert torch.equal(y, fdt.dropout(x, 0.5, generator=torch.Generator().manual_seed(3)))


# ---- shapes ----


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_for_any_size_once(backend, store):
    if (backend, store) == ("inductor", "seed"):
        pytest.skip("inductor calls the same ops")

    def function(x):
        return fdt.dropout(x * 2, 0.5, store=store)

    ours = compiled(function, backend, dynamic=True)
    for rows in (9, 33, 64, 7, 100, 1000):
        assert_equals_eager(function, ours, torch.randn(rows, 7), seeds=(rows,))
    assert graphs() == 1


def test_compiled_for_marked_sizes_once():
    def function(x):
        return fdt.dropout(x, 0.5, noise_shape=(None, 1, None))

    ours = compiled(function)
    for rows, columns in ((9, 50), (33, 60), (100, 70)):
        x = torch.randn(rows, 5, columns)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 2)
        torch.manual_seed(rows)
        y = ours(x)
        torch.manual_seed(rows)
        assert torch.equal(y, function(x))
    assert graphs() == 1


def test_compiled_for_sizes_up_to_a_word():
    """32 elements and fewer have one word: a graph of their own, right all the same."""
    ours = compiled(lambda x: fdt.dropout(x, 0.5), dynamic=True)
    for n in (31, 32, 33, 64, 65, 2, 1, 0):
        x = torch.ones(n)
        torch.manual_seed(n)
        y = ours(x)
        torch.manual_seed(n)
        assert torch.equal(y, fdt.dropout(x, 0.5))


# ---- modules ----


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
    assert len(fdt.convert(layer).changed) == 3
    return layer


def test_compiled_transformer_layer():
    layer, x = encoder(), torch.randn(2, 5, 16)

    def function(x):
        layer.zero_grad()
        return layer(x)

    ours = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        expected = (*run(function, seed, x), *(p.grad.clone() for p in layer.parameters()))
        layer.zero_grad()
        actual = (*run(ours, seed, x), *(p.grad.clone() for p in layer.parameters()))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
    assert graphs() == 1
    layer.eval()
    assert_equals_eager(layer, ours, x, seeds=(0,))


def test_compiled_transformer_layer_calls_our_ops():
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled(encoder(), backend)(torch.randn(2, 5, 16))
    assert sum(target == "fastdrop.forward.default" for target in targets) == 3
    assert not any("dropout" in target and "attention" not in target for target in targets)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_checkpoint_equals_eager_without(x, backend, store):
    if (backend, store) == ("inductor", "seed"):
        pytest.skip("inductor calls the same ops")

    def function(x):
        return fdt.dropout(fdt.dropout(x, 0.5, store=store) * x, 0.3, store=store)

    assert_equals_eager(function, compiled(lambda x: checkpoint(function, x, use_reentrant=False), backend), x)


# ---- transforms inside of a graph ----


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_vmap(x, backend, randomness, store):
    if (backend, store) == ("inductor", "seed"):
        pytest.skip("inductor calls the same ops")
    function = vmap(lambda x: fdt.dropout(x, 0.5, store=store), randomness=randomness)
    results = assert_equals_eager(function, compiled(function, backend), x)
    dropped = results[0][0] == 0
    assert torch.equal(dropped.any(0), dropped.all(0)) == (randomness == "same")


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_compiled_vmap_of_an_unbatched_input(x, randomness):
    weights = torch.arange(1.0, 5.0)

    def function(x):
        return vmap(lambda w: fdt.dropout(x, 0.5) * w, randomness=randomness)(weights)

    assert_equals_eager(function, compiled(function), x)


def test_compiled_vmap_over_seeds(x):
    seeds = torch.arange(8)

    def function(x):
        return vmap(lambda x, seed: fdt.dropout(x, 0.5, seed=seed))(x, seeds)

    assert_equals_eager(function, compiled(function), x, seeds=(0,))


FORWARD_MODE = {
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x: jacfwd(f)(x[0]),
}


@pytest.mark.parametrize("transform", FORWARD_MODE)
@pytest.mark.parametrize("store", STORES)
def test_compiled_forward_mode_is_right_or_refused(x, store, transform):
    """Never a tangent of zero without a word."""

    def function(x):
        return FORWARD_MODE[transform](lambda x: fdt.dropout(x, 0.5, seed=3, store=store), x)

    expected = function(x)
    try:
        ours = torch.compile(function, backend="aot_eager")(x)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(ours, expected)


def test_compiled_on_dual_numbers_is_right_or_refused(x):
    ours = torch.compile(lambda x: fdt.dropout(x, 0.5, seed=3), backend="aot_eager")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.cos())
        try:
            tangent = torch.autograd.forward_ad.unpack_dual(ours(dual)).tangent
        except (RuntimeError, NotImplementedError):
            return
        torch.testing.assert_close(tangent, fdt.dropout(x.cos(), 0.5, seed=3))


def test_compiled_grad_is_right_or_refused(x):
    function = grad(lambda x: fdt.dropout(x, 0.5, seed=3).sin().sum())
    try:
        ours = torch.compile(function, backend="aot_eager")(x)
    except RuntimeError:
        return
    torch.testing.assert_close(ours, function(x))


# ---- compiled autograd ----


def backward_compiled(function, seed, x, *arguments, fullgraph=True):
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    compiler = torch.compile(backend="aot_eager", fullgraph=fullgraph)
    with compiled_autograd._enable(compiler):
        y = function(x, *arguments)
        y.sin().sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize(
    ("forward", "noise_shape"), [("eager", None), ("eager", (1, None)), ("compiled", None)], ids=str
)
@pytest.mark.parametrize("store", STORES)
def test_compiled_autograd_has_the_gradient_of_the_mask(x, store, forward, noise_shape):
    """Several p, a fresh seed at each step: nothing of an earlier step is left in the graph."""

    def function(x, p):
        return fdt.dropout(fdt.dropout(x, p, store=store, noise_shape=noise_shape) + 1, 0.3, store=store)

    ours = compiled(function) if forward == "compiled" else function
    for i, p in enumerate((*P, 0.1, 0.5)):
        x = x.roll(1)
        assert_same(backward_compiled(ours, i, x, p), run(function, i, x, p))


@pytest.mark.parametrize("store", STORES)
def test_compiled_autograd_compiles_once_for_one_p(x, store):
    def function(x):
        return fdt.dropout(x, 0.5, store=store)

    for seed in range(6):
        assert_same(backward_compiled(function, seed, x), run(function, seed, x))
    assert counters["compiled_autograd"]["captures"] == 1
    assert graphs() == 1


@pytest.mark.parametrize("store", STORES)
def test_compiled_autograd_beyond_the_recompile_limit(x, store):
    def function(x, p):
        return fdt.dropout(x, p, store=store)

    for i in range(12):
        p = 0.05 + 0.07 * i
        assert_same(backward_compiled(function, i, x, p, fullgraph=False), run(function, i, x, p))


def test_compiled_autograd_in_place(x):
    def function(x):
        return fdt.dropout(x * 2, 0.5, inplace=True)

    for seed in range(3):
        assert_same(backward_compiled(function, seed, x), run(function, seed, x))


def test_compiled_autograd_of_a_second_derivative(x):
    def second(compile_it):
        z = x.clone().requires_grad_()
        y = fdt.dropout(z, 0.5, seed=3).pow(3).sum()
        (first,) = torch.autograd.grad(y, z, create_graph=True)
        if compile_it:
            with compiled_autograd._enable(torch.compile(backend="aot_eager")):
                first.pow(2).sum().backward()
        else:
            first.pow(2).sum().backward()
        return z.grad

    torch.testing.assert_close(second(True), second(False))


def test_compiled_autograd_by_configuration():
    net = nn.Sequential(nn.Linear(6, 6), fdt.Dropout(0.5), nn.Linear(6, 6), fdt.Dropout(0.3, store="seed"))

    def step(x):
        loss = net(x).sin().sum()
        loss.backward()
        return loss

    def result(step, seed, x):
        net.zero_grad()
        torch.manual_seed(seed)
        return step(x).detach(), *(p.grad.clone() for p in net.parameters())

    ours = None
    for seed in range(4):
        x = torch.randn(3, 6)
        expected = result(step, seed, x)
        with torch._dynamo.config.patch(compiled_autograd=True):
            ours = ours or torch.compile(step, backend="aot_eager")
            actual = result(ours, seed, x)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
    assert counters["compiled_autograd"]["captures"] >= 1


# ---- export ----


def network(width=20):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, width), fdt.Dropout(0.5), nn.Linear(width, 6), fdt.Dropout(0.3, store="seed"))


def targets(exported):
    return [str(node.target) for node in exported.graph.nodes]


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_export_of_training_equals_eager(x, strict):
    net = network()
    exported = torch.export.export(net, (x,), strict=strict)
    decomposed = exported.run_decompositions()
    assert targets(decomposed).count("fastdrop.forward.default") == 2
    for seed in range(2):
        expected = run(net, seed, x)
        assert_same(run(exported.module(), seed, x), expected)
        torch.manual_seed(seed)
        assert_same([decomposed.module()(x).detach()], expected[:1])


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_export_of_evaluation_has_no_dropout(x, strict):
    net = network().eval()
    exported = torch.export.export(net, (x,), strict=strict).run_decompositions()
    assert not any("dropout" in target or "fastdrop" in target for target in targets(exported))
    assert torch.equal(exported.module()(x), net(x))


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_export_of_any_batch_size(x, training, strict):
    net = network(20).train(training)
    exported = torch.export.export(net, (x,), strict=strict, dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    for n in (2, 3, 11, 50):
        z = torch.randn(n, 16)
        torch.manual_seed(n)
        actual = exported.module()(z)
        torch.manual_seed(n)
        torch.testing.assert_close(actual, net(z))


def test_export_is_saved_and_loaded(x, tmp_path):
    net = network()
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    assert_same(run(loaded, 3, x), run(net, 3, x))


def test_onnx_of_evaluation_runs(x):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    reference = pytest.importorskip("onnx.reference", reason="the exported model is run by onnx's own evaluator")
    net = network().eval()
    model = torch.onnx.export(net, (x,), dynamo=True, verbose=False).model_proto
    assert not any("ropout" in node.op_type or "fastdrop" in node.domain for node in model.graph.node)
    (y,) = reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x).detach())


def test_keeping_all_begins_where_the_threshold_does():
    from fastdrop.core.random import threshold
    from fastdrop.torch.functional.plan import KEEPS_ALL

    assert threshold(KEEPS_ALL) == 0
    assert threshold(math.nextafter(KEEPS_ALL, 1)) == 1


def test_compiled_noise_shape_of_other_rank_is_refused(x):
    with pytest.raises(Exception, match="noise_shape must have one entry per axis"):
        torch.compile(lambda x: fdt.dropout(x, 0.5, noise_shape=(1,) * 5), backend="aot_eager")(x)

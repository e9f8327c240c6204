"""Every kind of dropout compiled and exported: one graph, and the values of eager code under the same seed.

Compilation takes seconds a case, so a test runs on a few kinds in `make test` and on all `COMPILED` in `make test-all`.
"""

from __future__ import annotations

import functools
import io
import math
import re

import pytest

import fastdrop as fd

torch = pytest.importorskip("torch")

import torch._dynamo.compiled_autograd as compiled_autograd
from torch import nn
from torch._dynamo.utils import counters
from torch.func import grad, jacfwd, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt
from fastdrop.core.random import threshold
from fastdrop.torch.functional.plan import KEEPS_ALL

from ..cases import DISTINCT, assert_equal, gradient, saved_tensors, under
from .compiling import assert_equals_eager, assert_same, compiled, fresh_compiler, graphs, some

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of many kinds
__all__ = ["fresh_compiler"]  # a fixture of every test here

STORES = ("bits", "seed")
P = (0.1, 0.5, 1.0, 0.7)
# To a compiler the store and the cells are arguments of an op that all masks share.
ALIKE = ("dropout2d", "feature_alpha_dropout", "variational_dropout", "drop_connect", "drop_block2d")
COMPILED = [name for name in DISTINCT if name.partition(",")[0] not in ALIKE]
PLAIN, BLOCKS, NOISE = "dropout, bits", "drop_block2d coupled", "gaussian_dropout"
GUARD = "test_compiled_equals_eager"


def of_kinds(*quick, guard=GUARD):
    return pytest.mark.parametrize("name", some(COMPILED, quick, guard))


@pytest.fixture
def x():
    return normal((8, 16))


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def way_of(name):
    """The kind, its function with p = 0.4, and data."""
    way = DISTINCT[name]
    return way, functools.partial(way.torch, p=0.4), normal(way.shape)


# ---- values ----


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager(name):
    """Two dropouts in one graph, the first in place where that is possible: two masks, others under another seed.

    From forward to backward the graph keeps what eager code keeps.
    """
    way, drop, x = way_of(name)

    def function(x):
        return drop(drop(x.sin() + 3, **way.in_places[-1]) + 1)

    ours = compiled(function)
    outputs = assert_equals_eager(function, ours, x, seeds=range(3))
    assert graphs() == 1
    assert len({tuple(y.flatten().tolist()) for y in outputs}) > 1
    sizes = []
    for run in (function, ours):
        with saved_tensors() as kept:
            run(x.clone().requires_grad_())
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept if t.dtype in (torch.int32, torch.int64)))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("name", some((PLAIN, "dropout, seed", "alpha_dropout, bits", BLOCKS, NOISE), (PLAIN,), GUARD))
def test_inductor_equals_eager(name):
    way, drop, x = way_of(name)

    def function(x):
        return way.torch(drop(x.sin() + 3) + 1, 0.3)

    ours = compiled(function, "inductor")
    assert_equals_eager(function, ours, x, seeds=(0, 1))
    assert_equals_eager(function, ours, x.movedim(1, -1).contiguous().movedim(-1, 1))


@of_kinds(PLAIN)
def test_compiled_on_other_layouts_and_dtypes(name):
    _, drop, x = way_of(name)
    others = [x.mT.contiguous().mT, x.bfloat16(), x.double(), x[:0], x[::2]]
    others += [x.cfloat().mT.contiguous().mT] * (name == PLAIN)
    for other in others:
        y = under(1, compiled(drop), other)
        assert_same([y], [under(1, drop, other)])


@pytest.mark.parametrize("noise_shape", [(1, None), pytest.param([8, 1], marks=pytest.mark.slow(GUARD))], ids=str)
def test_compiled_noise_shape(x, noise_shape):
    def function(x):
        return fdt.dropout(x, 0.5, noise_shape=noise_shape)

    assert_equals_eager(function, compiled(function), x)


def test_compiled_in_place_writes_to_its_argument(x):
    own = x.clone()
    y = under(4, compiled(lambda x: fdt.dropout(x, 0.5, inplace=True)), own)
    assert torch.equal(own, under(4, fdt.dropout, x, 0.5))
    assert y is own


def test_compiled_without_gradients_and_under_autocast(x):
    def function(x):
        return fdt.dropout(fdt.dropout(x, 0.5) + 1, 0.3)

    ours = compiled(function)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = under(2, ours, x)
        assert_same([y], [under(2, function, x)])
    weight = torch.randn(16, 16)

    def mixed(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fdt.dropout(x @ weight, 0.5)

    (y,) = assert_equals_eager(mixed, compiled(mixed), x)
    assert y.dtype == torch.bfloat16


# ---- p, seed, training ----


@of_kinds(PLAIN, NOISE)
def test_compiled_p_in_a_tensor_compiles_once(name):
    """Where it happens to be 0 or 1 as well."""
    way, _, x = way_of(name)
    ours = compiled(way.torch)
    for dtype in (torch.float64, torch.float32):
        with torch._dynamo.config.patch(error_on_recompile=dtype is torch.float64):
            for p in (0.1, 0.5, 1 / 3, 0.0, *way.p):
                assert_equals_eager(way.torch, ours, x, torch.tensor(p, dtype=dtype))


@of_kinds(PLAIN)
def test_compiled_p_that_varies(name):
    way, _, x = way_of(name)
    ours = compiled(way.torch)
    for p in (0.1, 0.5, 0.25, *way.p):
        assert_equals_eager(way.torch, ours, x, p)


@pytest.mark.slow("test_compiled_p_in_a_tensor_compiles_once")
@pytest.mark.parametrize("store", STORES)
def test_compiled_p_in_a_tensor_is_not_in_torchs_caches(x, store, tmp_path, monkeypatch):
    """Compiled with one p and found again on disk, a graph is right for another."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def function(x, p):
        return fdt.dropout(x, p, store=store)

    with torch._functorch.config.patch(enable_autograd_cache=True):
        for p in P:
            torch.compiler.reset()
            assert_equals_eager(function, compiled(function, "inductor"), x, torch.tensor(p))


@of_kinds("dropout, seed")
def test_compiled_seed(name):
    """As an int one graph for the first and one for all others (0 and 1 have theirs); as a tensor one for all."""
    _, drop, x = way_of(name)

    def function(x, seed):
        return drop(x, seed=seed)

    ours = compiled(function)
    for seed in (5, 77, 2**40, 2**63 - 1, 0, 1):
        assert_equals_eager(function, ours, x, seed)
    assert graphs() <= 4
    before = graphs()
    for seed in (0, 1, 77, -3, -(2**63)):
        assert_equals_eager(function, ours, x, torch.tensor(seed))
    assert graphs() == before + 1
    assert_equals_eager(lambda x: drop(x, seed=2**64 - 1), compiled(lambda x: drop(x, seed=2**64 - 1)), x)


def test_compiled_axes_and_block_sizes_that_vary():
    """Symbolic ints, to the compiler: none may be taken for another number."""

    def variational(x, axis):
        return fdt.variational_dropout(x, 0.4, axis)

    def blocks(x, block_size):
        return fdt.drop_block2d(x, 0.4, block_size)

    ours = compiled(variational, dynamic=True)
    for axis in (0, 2, -1):
        assert_equals_eager(variational, ours, normal((5, 6, 7)), axis)
    ours = compiled(blocks, dynamic=True)
    for block_size in (2, 3):
        assert_equals_eager(blocks, ours, normal((2, 3, 6, 7)), block_size)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((7, 33), torch.bfloat16), pytest.param((), torch.float32, marks=pytest.mark.slow("the other case"))],
)
def test_compiled_evaluation_under_standard_scaling(dtype, shape):
    """With p as a float, and as a tensor, whose dtype is no matter."""

    def function(x, p):
        return fdt.dropout(x, p, training=False, scaling="standard")

    ours = compiled(function)
    for p in (0.1, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64), torch.tensor(1)):
        assert_equals_eager(function, ours, normal(shape, dtype), p)


@pytest.mark.parametrize("options", [{"p": 0.4, "training": False}, {"p": 0.0}, {"p": 1e-10}, {"p": 0}], ids=str)
def test_compiled_identity(x, options):
    state = torch.get_rng_state()
    assert compiled(lambda x: fdt.dropout(x, **options))(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert (threshold(KEEPS_ALL), threshold(math.nextafter(KEEPS_ALL, 1))) == (0, 1)


# ---- bad input ----

ERRORS = {
    "p": (lambda x: fdt.dropout(x, 1.5), "dropout probability has to be between 0 and 1, but got 1.5"),
    "p in evaluation": (lambda x: fdt.dropout(x, -0.1, False), "has to be between 0 and 1, but got -0.1"),
    "p in a tensor": (lambda x: fdt.dropout(x, torch.tensor(1.5)), "has to be between 0 and 1, but got 1.5"),
    "p of blocks": (
        lambda x: fdt.drop_block2d(x[None], torch.tensor(-0.1), 2),
        "probability has to be between 0 and 1",
    ),
    "Gaussian p of 1": (lambda x: fdt.gaussian_dropout(x, 1.0), "p must be below 1 for Gaussian dropout"),
    "store": (lambda x: fdt.dropout(x, store="bytes"), "store must be one of 'bits', 'seed', but got 'bytes'"),
    "noise_shape": (lambda x: fdt.dropout(x, noise_shape=(2, 4, 5)), "noise_shape must be 1, None or the full extent"),
    "rank of noise_shape": (lambda x: fdt.dropout(x, noise_shape=(1,) * 5), "noise_shape must have one entry per axis"),
    "seed": (lambda x: fdt.dropout(x, seed=-1), "seed must be from 0 to"),
    "seed of floats": (lambda x: fdt.dropout(x, seed=torch.tensor(1.0)), "seed must be an int or a tensor of int64"),
    "rank": (lambda x: fdt.drop_block2d(x, 0.5, 3), "input should be 4 dimensional. Got 3 dimensions"),
    "block size": (lambda x: fdt.drop_block2d(x[None], 0.5, 0), "block_size must be a positive int"),
    "mode": (lambda x: fdt.stochastic_depth(x, 0.5, "col"), "mode has to be either 'batch' or 'row', but got col"),
    "time axis": (lambda x: fdt.variational_dropout(x, 0.5, 3), "time_axis must be an axis of x, which has 3"),
    "channels": (lambda x: fdt.dropout1d(x[None], 0.5), "dropout1d: Expected 2D or 3D input, but received a 4D input"),
    "scaling": (lambda x: fdt.drop_connect(x, 0.5, scaling="alpha"), "scaling must be one of 'inverted', 'standard'"),
    "integers": (lambda x: fdt.gaussian_dropout(x.long(), 0.5), "dropout takes float32"),
    "complex": (lambda x: fdt.gaussian_dropout(x.cfloat(), 0.5), "Gaussian dropout takes real numbers"),
    "alpha of complex": (lambda x: fdt.alpha_dropout(x.cfloat(), 0.5, True), "alpha dropout takes real numbers"),
    "generator": (lambda x: fdt.dropout(x, 0.5, generator=torch.Generator()), "generator can't be compiled"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_compiled_errors_are_eagers(name):
    call, text = ERRORS[name]
    if name != "generator":
        with pytest.raises((RuntimeError, ValueError, TypeError), match=re.escape(text)):
            call(torch.ones(3, 4, 5))
    with pytest.raises(Exception, match=re.escape(text)):
        compiled(call)(torch.ones(3, 4, 5))


def test_compiled_errors_have_eagers_type_where_the_graph_may_break(x):
    for options in ({"p": 1.5}, {"store": "bytes"}, {"p": "0.5"}):
        errors = []
        for function in (fdt.dropout, torch.compile(fdt.dropout, backend="aot_eager")):
            with pytest.raises((ValueError, TypeError)) as raised:
                function(x, **options)
            errors.append(raised.type)
        assert errors[0] is errors[1]


def test_compiled_generator_breaks_the_graph_where_that_is_allowed(x, backend):
    """Whichever backend draws: torch would take NumPy's code for its own, and has no shift of uint64."""
    ours = torch.compile(lambda x, g: fdt.dropout(x, 0.5, generator=g), backend="aot_eager")
    y = ours(x, torch.Generator().manual_seed(3))
    assert torch.equal(y, fdt.dropout(x, 0.5, generator=torch.Generator().manual_seed(3)))


# ---- shapes ----


@of_kinds(PLAIN, BLOCKS)
def test_compiled_for_any_size_once(name):
    """The kind's own numbers, such as a block's extent, are constants."""
    way, drop, _ = way_of(name)

    def function(x):
        return drop(x * 2)

    ours = compiled(function, dynamic=True)
    for more in (0, 3, 7):
        assert_equals_eager(function, ours, normal(tuple(extent + more for extent in way.shape)))
    assert graphs() == 1


def test_compiled_for_marked_sizes_once():
    def function(x):
        return fdt.dropout(x, 0.5, noise_shape=(None, 1, None))

    ours = compiled(function)
    for rows, columns in ((9, 50), (33, 60), (100, 70)):
        x = torch.randn(rows, 5, columns)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 2)
        assert torch.equal(under(rows, ours, x), under(rows, function, x))
    assert graphs() == 1


def test_compiled_for_sizes_up_to_a_word():
    """32 elements and fewer have one word: a graph of their own, right all the same."""
    ours = compiled(lambda x: fdt.dropout(x, 0.5), dynamic=True)
    for n in (31, 32, 33, 65, 1, 0):
        x = torch.ones(n)
        assert torch.equal(under(n, ours, x), under(n, fdt.dropout, x, 0.5))


# ---- modules ----


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
    assert len(fdt.convert(layer).changed) == 3
    return layer


def test_compiled_transformer_layer():
    layer, x, targets = encoder(), torch.randn(2, 5, 16), []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled(layer, backend)(x)
    assert sum(target == "fastdrop.forward.default" for target in targets) == 3
    assert not any("dropout" in target and "attention" not in target for target in targets)
    torch.compiler.reset()
    ours, results = compiled(layer), []
    for function in (layer, ours):
        layer.zero_grad()
        results.append((*under(1, gradient, function, x), *(p.grad.clone() for p in layer.parameters())))
    torch.testing.assert_close(*results)
    layer.eval()
    assert_equals_eager(layer, ours, x)


@of_kinds(PLAIN)
def test_compiled_module_follows_p_and_mode(name):
    way = DISTINCT[name]
    if way.module is None:
        return
    module = way.module(0.5)
    ours, x = compiled(module), normal(way.shape)
    for p, training in ((0.5, True), (0.5, False), (0.25, True), (0.0, True)):
        module.train(training).p = p
        assert_equals_eager(module, ours, x)


MODULES = {
    **{name: (way.module, way.p, way.shape) for name, way in DISTINCT.items() if name in COMPILED and way.module},
    "DropPath": (fdt.DropPath, (0.3, 1.0), (60, 3)),
    "DropPath unscaled": (functools.partial(fdt.DropPath, scale_by_keep=False), (0.3, 1.0), (60, 3)),
}


@pytest.mark.parametrize("name", some(MODULES, (PLAIN, BLOCKS, "DropPath"), GUARD))
def test_compiled_module_with_a_rate_compiles_once(name):
    """Driven as a scheduler does it: p changes, its tensor is another, and the graph stays."""
    make, rates, shape = MODULES[name]
    module = nn.Sequential(nn.Identity(), make(0.5))
    module[1].rate_tensor = torch.tensor(0.5, dtype=torch.float64)
    ours, x = compiled(module), normal(shape)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for p in (0.5, 0.1, 0.0, *rates):
            module[1].p, module[1].rate_tensor = p, torch.tensor(p, dtype=torch.float64)
            assert_equals_eager(module, ours, x)


# ---- transforms and checkpoints inside of a graph ----


@of_kinds(PLAIN, NOISE)
def test_compiled_checkpoint(name):
    _, drop, x = way_of(name)

    def block(x):
        return drop(drop(x.sin()) * x)

    assert_equals_eager(block, compiled(lambda x: checkpoint(block, x, use_reentrant=False)), x)


@of_kinds(PLAIN, BLOCKS)
def test_compiled_vmap(name):
    _, drop, x = way_of(name)
    for randomness in ("same", "different"):
        function = vmap(drop, randomness=randomness)
        assert_equals_eager(function, compiled(function), torch.stack([x, x.cos()]))


def test_compiled_vmap_of_an_unbatched_input_and_over_seeds(x):
    def unbatched(x):
        return vmap(lambda w: fdt.dropout(x, 0.5) * w, randomness="different")(torch.arange(1.0, 5.0))

    def over_seeds(x):
        return vmap(lambda x, seed: fdt.dropout(x, 0.5, seed=seed))(x, torch.arange(8))

    for function in (unbatched, over_seeds):
        assert_equals_eager(function, compiled(function), x)


FORWARD_MODE = {
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x: jacfwd(f)(x[0]),
    "grad": lambda f, x: grad(lambda x: f(x).sin().sum())(x),
}


@pytest.mark.parametrize("transform", FORWARD_MODE)
def test_compiled_transform_is_right_or_refused(x, transform):
    """Never a tangent of zero without a word."""

    def function(x):
        return FORWARD_MODE[transform](lambda x: fdt.dropout(x, 0.5, seed=3), x)

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


# ---- compiled autograd ----


def backward_compiled(function, seed, x, *arguments, fullgraph=True):
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=fullgraph)):
        return under(seed, gradient, lambda x: function(x, *arguments), x)


@pytest.mark.parametrize(
    ("forward", "store"),
    [
        ("eager", "bits"),
        *(pytest.param(*w, marks=pytest.mark.slow(GUARD)) for w in (("compiled", "bits"), ("eager", "seed"))),
    ],
)
def test_compiled_autograd_has_the_gradient_of_the_mask(x, store, forward):
    """Several p, a fresh seed at each step: nothing of an earlier step is left in the graph."""

    def function(x, p):
        return fdt.dropout(
            fdt.dropout(x * 1, p, store=store, noise_shape=(1, None)) + 1, 0.3, store=store, inplace=True
        )

    ours = compiled(function) if forward == "compiled" else function
    for i, p in enumerate((0.1, 0.5, 1.0, 0.1)):
        x = x.roll(1)
        assert_same(backward_compiled(ours, i, x, p), under(i, gradient, lambda x, p=p: function(x, p), x))


def test_compiled_autograd_compiles_once_for_one_p(x):
    for seed in range(4):
        assert_same(
            backward_compiled(fdt.dropout, seed, x, 0.5), under(seed, gradient, lambda x: fdt.dropout(x, 0.5), x)
        )
    assert counters["compiled_autograd"]["captures"] == 1
    assert graphs() == 1


@pytest.mark.slow("test_compiled_autograd_has_the_gradient_of_the_mask")
def test_compiled_autograd_beyond_the_recompile_limit(x):
    for i in range(12):
        p = 0.05 + 0.07 * i
        ours = backward_compiled(fdt.dropout, i, x, p, fullgraph=False)
        assert_same(ours, under(i, gradient, lambda x, p=p: fdt.dropout(x, p), x))


def test_compiled_autograd_of_a_second_derivative(x):
    results = []
    for compile_it in (True, False):
        z = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(fdt.dropout(z, 0.5, seed=3).pow(3).sum(), z, create_graph=True)
        if compile_it:
            with compiled_autograd._enable(torch.compile(backend="aot_eager")):
                first.pow(2).sum().backward()
        else:
            first.pow(2).sum().backward()
        results.append(z.grad)
    torch.testing.assert_close(*results)


# ---- export ----


def family(couple_channels=False):
    """A network with each of the modules."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        fdt.Dropout2d(0.3),
        fdt.DropBlock2d(0.2, 3, couple_channels=couple_channels),
        fdt.StochasticDepth(0.2, "row"),
        fdt.DropPath(0.1),
        nn.SELU(),
        fdt.FeatureAlphaDropout(0.2, store="seed"),
        fdt.GaussianDropout(0.2),
        nn.Flatten(2),
        fdt.VariationalDropout(0.3, 1),
        fdt.Dropout1d(0.1),
        fdt.AlphaDropout(0.2),
        nn.Flatten(),
        fdt.Dropout(0.5, scaling="standard"),
        nn.Linear(4 * 36, 2),
    )


STRICT = [False, pytest.param(True, marks=pytest.mark.slow("the case that is not strict"))]


def targets(exported):
    return [str(node.target) for node in exported.run_decompositions().graph.nodes]


@pytest.mark.parametrize("strict", STRICT)
def test_export_of_training_equals_eager(strict):
    net, x = family(), normal((5, 3, 8, 8))
    exported = torch.export.export(net, (x,), strict=strict)
    names = targets(exported)
    assert names.count("fastdrop.forward.default") == 8
    assert names.count("fastdrop.draw_blocks.default") == names.count("fastdrop.gaussian.default") == 1
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (exported, torch.export.load(file)):
        assert_equals_eager(net, program.module(), x, seeds=(0, 1))


@pytest.mark.parametrize("strict", STRICT)
def test_export_of_evaluation_has_no_dropout(strict):
    net, x = family().eval(), normal((5, 3, 8, 8))
    exported = torch.export.export(net, (x,), strict=strict)
    assert not any("dropout" in target or "fastdrop" in target for target in targets(exported))
    torch.testing.assert_close(exported.module()(x), net(x))


@pytest.mark.parametrize("strict", STRICT)
def test_export_of_any_batch_size(strict):
    """Of a layer with both stores, and of DropBlock, whose masks must have two words or more."""
    layer = nn.Sequential(nn.Linear(16, 20), fdt.Dropout(0.5), nn.Linear(20, 6), fdt.Dropout(0.3, store="seed"))
    blocks = nn.Sequential(fdt.DropBlock2d(0.2, 3, couple_channels=True), fdt.Dropout2d(0.3))
    for net, shape, least in ((layer, (16,), 2), (blocks, (3, 8, 8), 34)):
        dynamic = ({0: torch.export.Dim("n", min=least)},)
        exported = torch.export.export(net, (normal((40, *shape)),), strict=strict, dynamic_shapes=dynamic).module()
        for n in (least, 50):
            z = normal((n, *shape))
            torch.testing.assert_close(under(n, exported, z), under(n, net, z))


@pytest.mark.slow("test_export_of_evaluation_has_no_dropout")
def test_onnx_of_evaluation_runs(x):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    reference = pytest.importorskip("onnx.reference", reason="the exported model is run by onnx's own evaluator")
    net = nn.Sequential(nn.Linear(16, 20), fdt.Dropout(0.5), nn.Linear(20, 6)).eval()
    model = torch.onnx.export(net, (x,), dynamo=True, verbose=False).model_proto
    assert not any("ropout" in node.op_type or "fastdrop" in node.domain for node in model.graph.node)
    (y,) = reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x).detach())


def test_two_dropouts_of_one_input_differ():
    both = compiled(lambda x: (fdt.dropout(x, 0.5), fdt.dropout(x, 0.5)))
    x = torch.ones(500)
    first, second = under(3, both, x)
    torch.manual_seed(3)
    assert_equal((first, second), (fdt.dropout(x, 0.5), fdt.dropout(x, 0.5)))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    assert torch.equal(first != 0, torch.from_numpy(fd.draw_mask(500, 0.5, rng=seed).to_bool()))

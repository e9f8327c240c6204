"""Every kind of dropout compiled and exported: one graph, and the values of eager code under the same seed."""

from __future__ import annotations

import functools
import io
import math
import re

import pytest

torch = pytest.importorskip("torch")

import torch._dynamo.compiled_autograd as compiled_autograd
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap

import fastdrop.torch as fdt
from fastdrop.core.random import threshold
from fastdrop.torch.functional.plan import KEEPS_ALL

from ..cases import DISTINCT, gradient, saved_tensors, under
from .compiling import assert_equals_eager, assert_same, compiled, fresh_compiler, graphs

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of many kinds
__all__ = ["fresh_compiler"]  # a fixture of every test here

PLAIN, SHARED, BLOCKS, NOISE = "dropout, bits", "dropout shared, bits", "drop_block2d coupled", "gaussian_dropout"
# To a compiler the kind's cells and scaling are arguments of an op that most kinds share.
COMPILED = (PLAIN, "dropout, seed", SHARED, "alpha_dropout, bits", BLOCKS, NOISE)


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
    first, second = assert_equals_eager(function, ours, x, seeds=(0, 1))
    assert graphs() == 1
    assert not torch.equal(first, second)
    sizes = []
    for run in (function, ours):
        with saved_tensors() as kept:
            run(x.clone().requires_grad_())
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept if t.dtype in (torch.int32, torch.int64)))
    assert sizes[0] == sizes[1] > 0


def test_compiled_on_other_layouts_and_dtypes(x):
    for other in (x.cfloat().mT.contiguous().mT, x.bfloat16(), x[:0], x[::2]):
        y = under(1, compiled(fdt.dropout), other)
        assert_same([y], [under(1, fdt.dropout, other)])


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


@pytest.mark.parametrize("name", [PLAIN, NOISE])
def test_compiled_p_in_a_tensor_compiles_once(name):
    """Where it happens to be 0 or 1 as well. As a number it may vary, too."""
    way, _, x = way_of(name)
    ours = compiled(way.torch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for p in (0.1, 0.0, *way.p):
            assert_equals_eager(way.torch, ours, x, torch.tensor(p))
    for p in (0.1, *way.p):
        assert_equals_eager(way.torch, ours, x, p)


@pytest.mark.slow("test_compiled_p_in_a_tensor_compiles_once")
def test_compiled_p_in_a_tensor_is_not_in_torchs_caches(x, tmp_path, monkeypatch):
    """Compiled with one p and found again on disk, a graph is right for another."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def function(x, p):
        return fdt.dropout(fdt.dropout(x, p), p, store="seed")

    with torch._functorch.config.patch(enable_autograd_cache=True):
        for p in (0.1, 0.5, 1.0):
            torch.compiler.reset()
            assert_equals_eager(function, compiled(function, "inductor"), x, torch.tensor(p))


def test_compiled_seed(x):
    """As an int one graph for the first and one for all others (0 and 1 have theirs); as a tensor one for all."""

    def function(x, seed):
        return fdt.dropout(x, 0.4, seed=seed, store="seed")

    ours = compiled(function)
    for seed in (5, 77, 2**63 - 1, 0):
        assert_equals_eager(function, ours, x, seed)
    assert graphs() <= 3
    before = graphs()
    for seed in (0, 77, -(2**63)):
        assert_equals_eager(function, ours, x, torch.tensor(seed))
    assert graphs() == before + 1
    largest = functools.partial(fdt.dropout, p=0.4, seed=2**64 - 1)
    assert_equals_eager(largest, compiled(largest), x)


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


def test_compiled_evaluation(x):
    """Under standard scaling, with p as a float and as a tensor of any dtype; else nothing is drawn or made."""

    def scaled(x, p):
        return fdt.dropout(x, p, training=False, scaling="standard")

    ours = compiled(scaled)
    for p in (0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor(1)):
        assert_equals_eager(scaled, ours, x.bfloat16(), p)
    state = torch.get_rng_state()
    for options in ({"p": 0.4, "training": False}, {"p": 1e-10}, {"p": 0}):
        assert compiled(functools.partial(fdt.dropout, **options))(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert (threshold(KEEPS_ALL), threshold(math.nextafter(KEEPS_ALL, 1))) == (0, 1)


# ---- bad input ----

GENERATOR = torch.Generator()
ERRORS = {
    "p": (lambda x: fdt.dropout(x, 1.5), "dropout probability has to be between 0 and 1, but got 1.5"),
    "p in a tensor": (lambda x: fdt.dropout(x, torch.tensor(1.5)), "has to be between 0 and 1, but got 1.5"),
    "p of blocks": (
        lambda x: fdt.drop_block2d(x[None], torch.tensor(-0.1), 2),
        "probability has to be between 0 and 1",
    ),
    "Gaussian p of 1": (lambda x: fdt.gaussian_dropout(x, 1.0), "p must be below 1 for Gaussian dropout"),
    "store": (lambda x: fdt.dropout(x, store="bytes"), "store must be one of 'bits', 'seed', but got 'bytes'"),
    "noise_shape": (lambda x: fdt.dropout(x, noise_shape=(2, 4, 5)), "noise_shape must be 1, None or the full extent"),
    "seed": (lambda x: fdt.dropout(x, seed=-1), "seed must be from 0 to"),
    "seed of floats": (lambda x: fdt.dropout(x, seed=torch.tensor(1.0)), "seed must be an int or a tensor of int64"),
    "rank": (lambda x: fdt.drop_block2d(x, 0.5, 3), "input should be 4 dimensional. Got 3 dimensions"),
    "integers": (lambda x: fdt.gaussian_dropout(x.long(), 0.5), "dropout takes float32"),
    "alpha of complex": (lambda x: fdt.alpha_dropout(x.cfloat(), 0.5, True), "alpha dropout takes real numbers"),
    "activation": (lambda x: fdt.bias_act_dropout(x, None, activation="swish"), "activation must be one of"),
    "residual": (lambda x: fdt.dropout_add(x, x[:2]), "residual must have"),
    "generator": (lambda x: fdt.dropout(x, 0.5, generator=GENERATOR), "generator can't be compiled"),
    "fused generator": (
        lambda x: fdt.dropout_add(x, x, generator=GENERATOR),
        "generator can't be compiled",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_compiled_errors_are_eagers(name):
    call, text = ERRORS[name]
    if "generator" not in name:
        with pytest.raises((RuntimeError, ValueError, TypeError), match=re.escape(text)):
            call(torch.ones(3, 4, 5))
    with pytest.raises(Exception, match=re.escape(text)):
        compiled(call)(torch.ones(3, 4, 5))


def test_compiled_errors_have_eagers_type_where_the_graph_may_break(x):
    for options, error in (({"p": 1.5}, ValueError), ({"p": "0.5"}, TypeError)):
        for function in (fdt.dropout, torch.compile(fdt.dropout, backend="aot_eager")):
            with pytest.raises(error):
                function(x, **options)


def test_compiled_generator_breaks_the_graph_where_that_is_allowed(x, backend):
    """Whichever backend draws: torch would take NumPy's code for its own, and has no shift of uint64."""
    ours = torch.compile(lambda x, g: fdt.dropout(x, 0.5, generator=g), backend="aot_eager")
    y = ours(x, torch.Generator().manual_seed(3))
    assert torch.equal(y, fdt.dropout(x, 0.5, generator=torch.Generator().manual_seed(3)))


# ---- shapes ----


@pytest.mark.parametrize("name", [SHARED, BLOCKS])
def test_compiled_for_any_size_once(name):
    """The kind's own numbers, such as a block's extent, are constants."""
    way, drop, _ = way_of(name)

    def function(x):
        return drop(x * 2)

    ours = compiled(function, dynamic=True)
    for more in (0, 7):
        assert_equals_eager(function, ours, normal(tuple(extent + more for extent in way.shape)))
    assert graphs() == 1


def test_compiled_for_sizes_up_to_a_word():
    """32 elements and fewer have one word: a graph of their own, right all the same."""
    ours = compiled(lambda x: fdt.dropout(x, 0.5), dynamic=True)
    for n in (31, 32, 33, 65, 1, 0):
        x = torch.ones(n)
        assert torch.equal(under(n, ours, x), under(n, fdt.dropout, x, 0.5))


# ---- modules ----


def test_compiled_transformer_layer():
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True), torch.randn(2, 5, 16)
    assert len(fdt.convert(layer).changed) == 3
    results = []
    for function in (layer, compiled(layer)):
        layer.zero_grad()
        results.append((*under(1, gradient, function, x), *(p.grad.clone() for p in layer.parameters())))
    torch.testing.assert_close(*results)


def test_compiled_module_follows_p_and_mode(x):
    module = fdt.Dropout(0.5)
    ours = compiled(module)
    for p, training in ((0.5, True), (0.5, False), (0.25, True), (0.0, True)):
        module.train(training).p = p
        assert_equals_eager(module, ours, x)


@pytest.mark.parametrize(("module", "shape"), [(fdt.DropBlock2d(0.5, 3), (3, 2, 7, 8)), (fdt.DropPath(0.5), (60, 3))])
def test_compiled_module_with_a_rate_compiles_once(module, shape):
    """Driven as a scheduler does it: p changes, its tensor is another, and the graph stays."""
    net, x = nn.Sequential(nn.Identity(), module), normal(shape)
    module.rate_tensor = torch.tensor(0.5, dtype=torch.float64)
    ours = compiled(net)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for p in (0.5, 0.0, 1.0):
            module.p, module.rate_tensor = p, torch.tensor(p, dtype=torch.float64)
            assert_equals_eager(net, ours, x)


# ---- transforms inside of a graph ----


@pytest.mark.parametrize(("name", "randomness"), [(PLAIN, "same"), (BLOCKS, "different")])
def test_compiled_vmap(name, randomness):
    _, drop, x = way_of(name)
    function = vmap(drop, randomness=randomness)
    assert_equals_eager(function, compiled(function), torch.stack([x, x.cos()]))


def test_compiled_vmap_of_an_unbatched_input_and_over_seeds(x):
    def unbatched(x):
        return vmap(lambda w: fdt.dropout(x, 0.5) * w, randomness="different")(torch.arange(1.0, 5.0))

    def over_seeds(x):
        return vmap(lambda x, seed: fdt.dropout(x, 0.5, seed=seed))(x, torch.arange(8))

    for function in (unbatched, over_seeds):
        assert_equals_eager(function, compiled(function), x)


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


FORWARD_MODE = {
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x: jacfwd(f)(x[0]),
    "grad": lambda f, x: grad(lambda x: f(x).sin().sum())(x),
    "dual numbers": dual,
}


@pytest.mark.parametrize("transform", FORWARD_MODE)
def test_compiled_transform_is_right_or_refused(x, transform):
    """Never a tangent of zero without a word."""

    def drop(x):
        return fdt.dropout(x, 0.5, seed=3)

    derivative = FORWARD_MODE[transform]
    expected = derivative(drop, x)
    try:
        if transform == "dual numbers":
            ours = derivative(torch.compile(drop, backend="aot_eager"), x)
        else:
            ours = torch.compile(lambda x: derivative(drop, x), backend="aot_eager")(x)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(ours, expected)


# ---- compiled autograd ----


def backward_compiled(function, seed, x, *arguments):
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        return under(seed, gradient, lambda x: function(x, *arguments), x)


def test_compiled_autograd_has_the_gradient_of_the_mask(x):
    """Several p, a fresh seed at each step: nothing of an earlier step is left in the graph."""

    def function(x, p):
        return fdt.dropout(fdt.dropout(x * 1, p, noise_shape=(1, None)) + 1, 0.3, store="seed", inplace=True)

    for i, p in enumerate((0.1, 0.1, 1.0)):
        x = x.roll(1)
        assert_same(backward_compiled(function, i, x, p), under(i, gradient, lambda x, p=p: function(x, p), x))
    assert counters["compiled_autograd"]["captures"] == 1


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


def family():
    """A network with each of the modules."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        fdt.Dropout2d(0.3),
        fdt.DropBlock2d(0.2, 3),
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


def targets(exported):
    return [str(node.target) for node in exported.run_decompositions().graph.nodes]


def test_export_equals_eager():
    """In training, saved and loaded too. In evaluation there is no dropout."""
    net, x = family(), normal((5, 3, 8, 8))
    exported = torch.export.export(net, (x,))
    names = targets(exported)
    assert names.count("fastdrop.forward.default") == 8
    assert names.count("fastdrop.draw_blocks.default") == names.count("fastdrop.gaussian.default") == 1
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    assert_equals_eager(net, torch.export.load(file).module(), x, seeds=(0, 1))
    evaluated = torch.export.export(net.eval(), (x,))
    assert not any("dropout" in target or "fastdrop" in target for target in targets(evaluated))
    torch.testing.assert_close(evaluated.module()(x), net(x))


def test_export_of_any_batch_size():
    """Of a layer with both stores, and of DropBlock, whose masks must have two words or more."""
    layer = nn.Sequential(nn.Linear(16, 20), fdt.Dropout(0.5), nn.Linear(20, 6), fdt.Dropout(0.3, store="seed"))
    blocks = nn.Sequential(fdt.DropBlock2d(0.2, 3, couple_channels=True), fdt.Dropout2d(0.3))
    for net, shape, least, strict in ((layer, (16,), 2, True), (blocks, (3, 8, 8), 34, False)):
        dynamic = ({0: torch.export.Dim("n", min=least)},)
        exported = torch.export.export(net, (normal((40, *shape)),), strict=strict, dynamic_shapes=dynamic).module()
        for n in (least, 50):
            z = normal((n, *shape))
            torch.testing.assert_close(under(n, exported, z), under(n, net, z))

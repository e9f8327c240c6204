"""Every kind of dropout compiled, exported and as ops: one graph, and the values of eager code under the same seed."""

from __future__ import annotations

import functools
import math
import re

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch._dynamo.utils import counters
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt
from fastdrop.core import variants

from ..cases import WAYS, Kind, assert_equal, gradient, saved_tensors, under

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of many kinds

OPS = torch.ops.fastdrop
# To a compiler the store is an argument of an op that all masks share: two kinds with a seed stand for all.
SEEDED = ("dropout2d, seed", "alpha_dropout, seed", "gaussian_dropout")
COMPILED = {name: way for name, way in WAYS.items() if way.stores == ("bits",) or name in SEEDED}
# Which cells an axis or a rank gives is known before an op is called: these share all that comes after with another.
ALIKE = ("dropout1d,", "dropout3d", "variational_dropout batch first", "drop_block2d uneven", "drop_block3d")
DISTINCT = {name: way for name, way in COMPILED.items() if not name.startswith(ALIKE)}
RATED = [name for name, way in DISTINCT.items() if way.module is not None]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled before; nor by another version of this package, as torch's cache of gradients would have it."""
    torch.compiler.reset()
    counters.clear()
    with torch.random.fork_rng(), torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch.compiler.reset()


@pytest.fixture(params=DISTINCT)
def way(request) -> Kind:
    return COMPILED[request.param]


every_way = pytest.mark.parametrize("way", COMPILED.values(), ids=COMPILED)


@pytest.fixture
def drop(way):
    return functools.partial(way.torch, p=0.4)


@pytest.fixture
def x(way):
    return normal(way.shape)


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def compiled(function, backend="aot_eager", **options):
    """In one graph, or an error."""
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def assert_equals_eager(function, ours, *arguments, seeds=(0, 1, 2)):
    """Output and gradient: the same elements dropped, the others within the rounding of compiled arithmetic."""
    for seed in seeds:
        expected = under(seed, gradient, lambda x: function(x, *arguments[1:]), arguments[0])
        actual = under(seed, gradient, lambda x: ours(x, *arguments[1:]), arguments[0])
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a == 0, e == 0)
            assert (a.shape, a.stride(), a.dtype) == (e.shape, e.stride(), e.dtype)
            torch.testing.assert_close(a, e)


def graphs():
    """How many graphs the compiler has made."""
    return counters["stats"]["unique_graphs"]


# ---- values ----


@every_way
def test_compiled_equals_eager(way, drop, x):
    """Two dropouts in one graph, in place and not."""
    for options in way.in_places:

        def function(x):
            return drop(drop(x.sin() + 3, **options) + 1)  # noqa: B023

        before = graphs()
        assert_equals_eager(function, compiled(function), x)
        assert graphs() == before + 1


@pytest.mark.parametrize(
    "name",
    [
        "dropout2d, bits",
        "alpha_dropout, seed",
        "drop_block2d coupled",
        "stochastic_depth row, bits",
        "gaussian_dropout",
    ],
)
def test_inductor_equals_eager(name):
    way = WAYS[name]

    def function(x):
        return way.torch(way.torch(x.sin() + 3, 0.4) + 1, 0.3)

    assert_equals_eager(function, compiled(function, "inductor"), normal(way.shape))
    channels_last = normal(way.shape).movedim(1, -1).contiguous().movedim(-1, 1)
    assert_equals_eager(function, compiled(function, "inductor"), channels_last, seeds=(0,))


def test_compiled_equals_eager_on_other_layouts_and_dtypes(drop, x):
    for other in (x.mT.contiguous().mT, x.bfloat16(), x.double(), x[:0]):
        assert_equals_eager(drop, compiled(drop), other, seeds=(0,))


def test_compiled_seed(drop, x):
    def function(x, seed):
        return drop(x, seed=seed)

    ours = compiled(function)
    for seed in (5, 77, 2**40, 2**63 - 1):
        assert_equals_eager(function, ours, x, seed, seeds=(0,))
    assert graphs() <= 2
    before = graphs()
    for seed in (0, 77, -3, -(2**63)):
        assert_equals_eager(function, ours, x, torch.tensor(seed), seeds=(0,))
    assert graphs() == before + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_compiled_p_in_a_tensor_compiles_once(way, x, dtype):
    """Where it happens to be 0 or 1 as well."""
    ours = compiled(way.torch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for p in (0.1, 0.5, 1 / 3, 0.0, *way.p):
            assert_equals_eager(way.torch, ours, x, torch.tensor(p, dtype=dtype), seeds=(0,))


def test_compiled_p_that_varies(way, x):
    ours = compiled(way.torch)
    for p in (0.1, 0.5, 0.25, *way.p):
        assert_equals_eager(way.torch, ours, x, p, seeds=(0,))


def test_compiled_axes_and_block_sizes_that_vary():
    """Symbolic ints, to the compiler: none may be taken for another number."""

    def variational(x, axis):
        return fdt.variational_dropout(x, 0.4, axis)

    def blocks(x, block_size):
        return fdt.drop_block2d(x, 0.4, block_size)

    ours = compiled(variational, dynamic=True)
    for axis in (0, 1, 2, -1, -2):
        assert_equals_eager(variational, ours, normal((5, 6, 7)), axis, seeds=(0,))
    for sizes in ((2, 3, 4), ((2, 3), (3, 2))):
        ours = compiled(blocks, dynamic=True)
        for block_size in sizes:
            assert_equals_eager(blocks, ours, normal((2, 3, 6, 7)), block_size, seeds=(0,))


@pytest.mark.parametrize("shape", [(7, 33), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_compiled_evaluation_under_standard_scaling(dtype, shape):
    """With p as a float, and as a tensor, whose dtype is no matter."""

    def function(x, p):
        return fdt.dropout(x, p, training=False, scaling="standard")

    ours = compiled(function)
    for p in (0.1, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64), 1.0, torch.tensor(1)):
        assert_equals_eager(function, ours, normal(shape, dtype), p, seeds=(0,))


@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 0.4, "training": False}], ids=str)
@pytest.mark.parametrize("name", [name for name, way in COMPILED.items() if way.law != "standard"])
def test_compiled_identity(name, options):
    x, state = normal(WAYS[name].shape), torch.get_rng_state()
    assert compiled(functools.partial(WAYS[name].torch, **options))(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@every_way
def test_compiled_for_any_size_once(way, drop):
    """The kind's own numbers, such as a block's extent, are constants."""

    def function(x):
        return drop(x * 2)

    ours = compiled(function, dynamic=True)
    for more in (0, 3, 7):
        assert_equals_eager(function, ours, normal(tuple(extent + more for extent in way.shape)), seeds=(more,))
    assert graphs() == 1


def test_compiled_saves_what_eager_saves(drop, x):
    sizes = []
    for function in (drop, compiled(drop)):
        function(x.clone().requires_grad_())
        with saved_tensors() as kept:
            function(x.clone().requires_grad_())
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_compiled_vmap(drop, x, randomness):
    function = vmap(drop, randomness=randomness)
    assert_equals_eager(function, compiled(function), torch.stack([x, x.cos()]), seeds=(0,))


def test_compiled_checkpoint(drop, x):
    def block(x):
        return drop(x.sin()) * x

    again = compiled(lambda x: checkpoint(block, x, use_reentrant=False))
    assert_equals_eager(block, again, x, seeds=(0,))


# ---- bad input ----


@pytest.mark.parametrize(
    ("p", "fullgraph"), [(1.5, True), (-0.1, False), (torch.tensor(1.5), True), (torch.tensor(-0.1), False)], ids=repr
)
def test_compiled_p_out_of_range_is_refused(way, x, p, fullgraph):
    text = "drop(out)? probability has to be between 0 and 1, but got " + re.escape(f"{float(p)}")
    with pytest.raises(Exception, match=text):
        torch.compile(lambda x: way.torch(x, p), backend="aot_eager", fullgraph=fullgraph)(x)


@pytest.mark.parametrize("p", [1.0, torch.tensor(1.0)], ids=repr)
def test_compiled_gaussian_p_of_1_is_refused(p):
    with pytest.raises(Exception, match="p must be below 1 for Gaussian dropout"):
        compiled(lambda x: fdt.gaussian_dropout(x, p))(torch.ones(3))


ERRORS = {
    "rank": (lambda x: fdt.drop_block2d(x, 0.5, 3), "input should be 4 dimensional. Got 3 dimensions"),
    "block size": (lambda x: fdt.drop_block2d(x[None], 0.5, 0), "block_size must be a positive int"),
    "mode": (lambda x: fdt.stochastic_depth(x, 0.5, "col"), "mode has to be either 'batch' or 'row', but got col"),
    "time axis": (
        lambda x: fdt.variational_dropout(x, 0.5, 3),
        "time_axis must be an axis of x, which has 3, but got 3",
    ),
    "channels": (lambda x: fdt.dropout1d(x[None], 0.5), "dropout1d: Expected 2D or 3D input, but received a 4D input"),
    "scaling": (lambda x: fdt.drop_connect(x, 0.5, scaling="alpha"), "scaling must be one of 'inverted', 'standard'"),
    "integers": (lambda x: fdt.gaussian_dropout(x.long(), 0.5), "dropout takes float32"),
    "complex": (lambda x: fdt.gaussian_dropout(x.cfloat(), 0.5), "Gaussian dropout takes real numbers"),
    "alpha of complex": (lambda x: fdt.alpha_dropout(x.cfloat(), 0.5, True), "alpha dropout takes real numbers"),
    "blocks of integers": (lambda x: fdt.drop_block2d(x[None].long(), 0.5, 2), "dropout takes float32"),
    "generator": (lambda x: fdt.gaussian_dropout(x, 0.5, generator=torch.Generator()), "generator can't be compiled"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_compiled_errors_are_eagers(name):
    call, text = ERRORS[name]
    if name != "generator":
        with pytest.raises((RuntimeError, ValueError), match=re.escape(text)):
            call(torch.ones(3, 4, 5))
    with pytest.raises(Exception, match=re.escape(text)):
        compiled(call)(torch.ones(3, 4, 5))


# ---- modules ----


@pytest.mark.parametrize("name", RATED)
def test_compiled_module_with_a_rate_compiles_once(name):
    """Driven as a scheduler does it: p changes, its tensor is another, and the graph stays."""
    way = WAYS[name]
    module = nn.Sequential(nn.Identity(), way.module(0.5))
    module[1].rate_tensor = torch.tensor(0.5, dtype=torch.float64)
    ours, x = compiled(module), normal(way.shape)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for p in (0.5, 0.1, 0.25, 0.0, *way.p):
            module[1].p, module[1].rate_tensor = p, torch.tensor(p, dtype=torch.float64)
            assert_equals_eager(module, ours, x, seeds=(0,))


@pytest.mark.parametrize("name", RATED)
def test_compiled_module_follows_p_and_mode(name):
    way = WAYS[name]
    module = way.module(0.5)
    ours, x = compiled(module), normal(way.shape)
    for p, training in ((0.5, True), (0.5, False), (0.25, True), (0.0, True)):
        module.train(training).p = p
        assert_equals_eager(module, ours, x, seeds=(0,))


def test_compiled_drop_path():
    for scale_by_keep in (True, False):
        torch.compiler.reset()
        module = nn.Sequential(fdt.DropPath(0.5, scale_by_keep))
        module[0].rate_tensor = torch.tensor(0.5, dtype=torch.float64)
        ours, x = compiled(module), normal((60, 3))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for p in (0.5, 0.1, 0.0, 1.0):
                module[0].p, module[0].rate_tensor = p, torch.tensor(p, dtype=torch.float64)
                assert_equals_eager(module, ours, x, seeds=(0,))


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


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_export_of_training_equals_eager(strict):
    net, x = family(), normal((5, 3, 8, 8))
    exported = torch.export.export(net, (x,), strict=strict)
    names = [str(node.target) for node in exported.run_decompositions().graph.nodes]
    assert names.count("fastdrop.forward.default") == 8
    assert names.count("fastdrop.draw_blocks.default") == names.count("fastdrop.gaussian.default") == 1
    assert_equals_eager(net, exported.module(), x)


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_export_of_evaluation_has_no_dropout(strict):
    net, x = family().eval(), normal((5, 3, 8, 8))
    exported = torch.export.export(net, (x,), strict=strict).run_decompositions()
    assert not any("dropout" in str(node.target) or "fastdrop" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), net(x))


@pytest.mark.parametrize("couple_channels", [False, True])
def test_export_of_any_batch_size(couple_channels, tmp_path):
    net = family(couple_channels)
    dynamic = ({0: torch.export.Dim("n", min=34)},)  # whose masks have two words or more
    exported = torch.export.export(net, (normal((40, 3, 8, 8)),), dynamic_shapes=dynamic)
    torch.export.save(exported, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for n in (34, 41, 77):
        assert_equals_eager(net, loaded, normal((n, 3, 8, 8)), seeds=(n,))


# ---- the ops themselves ----

SAMPLES = {
    "plain": lambda: torch.randn(2, 3, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(5, 4, 3, 2).permute(3, 2, 1, 0),
    "expanded": lambda: torch.randn(2, 3, 1, 5).expand(2, 3, 4, 5),
    "empty": lambda: torch.randn(2, 0, 4, 5),
    "bfloat16": lambda: torch.randn(2, 3, 4, 5).bfloat16(),
}


def probability(overload):
    return 0.3 if overload == "default" else torch.tensor(0.3)


@pytest.mark.parametrize("overload", ["default", "tensor"])
@pytest.mark.parametrize(
    ("sample", "requires_grad"),
    [("plain", False), *((sample, True) for sample in SAMPLES)],
    ids=["plain, no gradient", *SAMPLES],
)
def test_opcheck(sample, overload, requires_grad):
    """All four checks hold for all samples. Whether a gradient is asked for is nothing that a layout changes."""
    x, p, seed = SAMPLES[sample]().requires_grad_(requires_grad), probability(overload), torch.tensor(3)
    op = {name: getattr(getattr(OPS, name), overload) for name in ("gaussian", "forward", "backward", "draw_blocks")}
    torch.library.opcheck(op["gaussian"], (x, seed, p))
    channels = [*x.shape[:2], 1, 1]
    torch.library.opcheck(op["forward"], (x, seed, p, channels, True, "alpha"))
    torch.library.opcheck(op["forward"], (x, seed, p, None, False, "standard"))
    words = op["forward"](x.detach(), seed, p, channels, True, "alpha")[1]
    torch.library.opcheck(op["backward"], (x, words, p, channels, "alpha_slope"))
    coupled = [x.shape[0], min(1, x.shape[1]), *x.shape[2:]]
    torch.library.opcheck(op["draw_blocks"], (x, seed, p, coupled, [2, 3]))
    torch.library.opcheck(OPS.keep_blocks, (x, *op["draw_blocks"](x, seed, p, coupled, [2, 3]), coupled))


@pytest.mark.parametrize("overload", ["default", "tensor"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_ops_equal_functions(sample, overload):
    x, p, seed = SAMPLES[sample](), probability(overload), torch.tensor(3)
    number = float(p)
    assert_equal(getattr(OPS.gaussian, overload)(x, seed, p), fdt.gaussian_dropout(x, number, seed=3))
    cells = [*x.shape[:2], 1, 1]
    y, words = getattr(OPS.forward, overload)(x, seed, p, cells, True, "alpha")
    assert_equal(y, fdt.feature_alpha_dropout(x, number, True, seed=3))
    assert words.numel() == math.ceil(math.prod(cells) / 32)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(fdt.feature_alpha_dropout(leaf, number, True, seed=3), leaf, x)
    assert_equal(getattr(OPS.backward, overload)(x, words, p, cells, "alpha_slope"), dx)
    words, kept = getattr(OPS.draw_blocks, overload)(x, seed, p, [*x.shape], [2, 3])
    assert (words.dtype, kept.dtype, kept.shape) == (torch.int32, torch.int64, ())
    y = OPS.keep_blocks(x, words, kept, [*x.shape])
    assert_equal(y, fdt.drop_block2d(x, number, (2, 3), seed=3))
    assert int(kept) == int((fdt.drop_block2d(torch.ones(x.shape), number, (2, 3), seed=3) != 0).sum())
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(
    "words",
    [torch.zeros(3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)],
    ids=["too few", "none", "int64"],
)
def test_op_refuses_words_it_would_read_beyond(words):
    with pytest.raises(ValueError, match="words must be 4 int32"):
        OPS.keep_blocks(torch.ones(2, 3, 4, 5), words, torch.tensor(5), [2, 3, 4, 5])


@pytest.mark.parametrize("overload", ["default", "tensor"])
def test_ops_refuse_p_out_of_range(overload):
    x, seed = torch.ones(2, 3, 4, 5), torch.tensor(3)
    for p in (1.5, -0.1, math.nan):
        given = p if overload == "default" else torch.tensor(p)
        with pytest.raises(ValueError, match="between 0 and 1"):
            getattr(OPS.gaussian, overload)(x, seed, given)
        with pytest.raises(ValueError, match="between 0 and 1"):
            getattr(OPS.draw_blocks, overload)(x, seed, given, [2, 3, 4, 5], [2, 2])
    with pytest.raises(ValueError, match="below 1"):
        getattr(OPS.gaussian, overload)(x, seed, 1.0 if overload == "default" else torch.tensor(1.0))


def test_slope_is_its_own():
    """A derivative's derivative has the same law."""
    for law in ("inverted", "standard", "alpha"):
        assert variants.slope(variants.slope(law)) == variants.slope(law)
        assert variants.affine(variants.slope(law), 2**30)[1:] == (0.0, 0.0)
        assert variants.affine(variants.slope(law), 2**30)[0] == variants.affine(law, 2**30)[0]

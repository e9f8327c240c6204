"""Every kind of dropout as a torch function: NumPy's bits on any strides, its law, and its peer's behaviour."""

from __future__ import annotations

import functools
import itertools
import math
import re
import warnings

import numpy as np
import pytest

import fastdrop as fd
from fastdrop.core import variants
from fastdrop.core.random import DROP_ALL, threshold

torch = pytest.importorskip("torch")

import torch.nn.functional as F

import fastdrop.torch as fdt

from ...cases import DTYPES, assert_same_bits, bits_of
from ..cases import (
    KINDS,
    WAYS,
    Kind,
    alpha,
    array_of,
    assert_equal,
    numbers_drawn,
    saved_tensors,
    tensor_of,
    under,
    untouched,
)

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MASKED = [name for name, way in WAYS.items() if way.law not in ("blocks", "gaussian")]
BLOCKS = [name for name, way in WAYS.items() if way.law == "blocks"]
NOISE = [name for name, way in WAYS.items() if way.law == "gaussian"]
REAL = [name for name, way in WAYS.items() if way.law in ("alpha", "gaussian")]  # which complex numbers are not
IN_PLACE = [name for name, way in WAYS.items() if way.in_place]
FEATURES = {"dropout1d": F.dropout1d, "dropout2d": F.dropout2d, "dropout3d": F.dropout3d}


@pytest.fixture(autouse=True)
def torch_state():
    """Generator and threads are as before afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=WAYS)
def way(request) -> Kind:
    return WAYS[request.param]


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


# ---- the values NumPy gets ----


def test_values_are_numpys(variant, dtype, way):
    """Output and gradient, bit for bit, special values included; NumPy's on its reference backend."""
    special = np.ascontiguousarray(dtype.data(math.prod(way.shape))).view(dtype.public).reshape(way.shape)
    array, dy = special, np.flip(special).copy()
    for p, seed in itertools.product(way.p, (0, 2**64 - 1)):
        with fd.use_backend("numpy"):
            wanted, mask = way.numpy(array, p, rng=seed)
            dx = fd.dropout_backward(dy, mask)
        x = tensor_of(array).requires_grad_()
        y = way.torch(x, p, seed=seed)
        y.backward(tensor_of(dy))
        assert_same_bits(array_of(y), wanted, ("y", p))
        assert_same_bits(array_of(x.grad), dx, ("dx", p))
        assert_same_bits(array_of(x), array, ("x must stay", p))
        assert_same_bits(array_of(way.torch(x.detach(), p, seed=seed)), wanted, ("no gradient", p))


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.cells == (7, 33)])
def test_numbers_without_axes_are_numpys(backend, dtype, name):
    way, array = WAYS[name], np.asarray(1.5, dtype.public)
    for p, seed in itertools.product(way.p, range(4)):
        wanted, _ = way.numpy(array, p, rng=seed)
        assert_same_bits(array_of(way.torch(tensor_of(array), p, seed=seed)), wanted, seed)


def test_empty_input_gives_an_empty_result(backend, way):
    for axis, p in itertools.product(range(len(way.shape)), way.p):
        shape = [extent if i != axis else 0 for i, extent in enumerate(way.shape)]
        x = torch.ones(shape, requires_grad=True)
        y = way.torch(x, p)
        y.sum().backward()
        assert y.shape == x.grad.shape == tuple(shape)
        if way.in_place:
            own = torch.ones(shape)
            assert way.torch(own, p, inplace=True) is own


LAYOUTS = {
    "contiguous": lambda make, shape: make(shape),
    "offset": lambda make, shape: make((shape[0] + 1, *shape[1:]))[1:],
    "transposed": lambda make, shape: make(shape[::-1]).permute(*reversed(range(len(shape)))),
    "stepped": lambda make, shape: make((*shape[:-1], 2 * shape[-1]))[..., ::2],
    "expanded": lambda make, shape: make((*shape[:-1], 1)).expand(shape),
    "expanded, first axis": lambda make, shape: make((1, *shape[1:])).expand(shape),
    "channels last": lambda make, shape: make((shape[0], *shape[2:], shape[1])).movedim(-1, 1),
}


def with_gradient(function, x, dy):
    """The output and dy's gradient."""
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_follow_the_logical_index(backend, dtype, way, layout):
    """Output, gradient and result in place are those of the contiguous tensor; strides those of torch's own ops."""
    x = LAYOUTS[layout](functools.partial(normal, dtype=dtype), way.shape)
    plain = x.clone(memory_format=torch.contiguous_format)
    for p in way.p:
        function = functools.partial(way.torch, p=p, seed=4)
        # What comes in at backward may be laid out in any way too.
        for dy in (plain.flip(0), x):
            y, dx = with_gradient(function, x, dy)
            assert_equal((y, dx), with_gradient(function, plain, dy.contiguous()))
            assert y.stride() == torch.empty_like(x).stride()
            assert_equal(x, plain)
        if way.in_place and "expanded" not in layout:
            own = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
            version = own._version
            assert function(own, inplace=True) is own
            assert own._version > version
            assert own.stride() == x.stride()
            assert_equal(own, y)


def test_threads_change_no_bit(backend, kind):
    """On data of more than one grain of work."""
    repeats = 70_000 // math.prod(kind.shape) + 1
    shape = (kind.shape[0] * repeats, *kind.shape[1:])
    x = normal(shape).requires_grad_()
    own, results = fd.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = kind.torch(x, 0.3, seed=3)
        results.append((y.detach(), *torch.autograd.grad(y, x, x.detach())))
        assert fd.get_num_threads() == own
    for result in results[1:]:
        assert_equal(result, results[0])


# ---- laws ----


@pytest.mark.parametrize("name", MASKED)
def test_cells_are_dropped_whole(backend, name):
    """Kept x becomes a x + b, dropped x becomes c, in every element of a cell; each cell has a bit of the mask."""
    way = WAYS[name]
    x, decisions = normal(way.shape, torch.float64), set()
    for seed in range(8):
        a, b, c = way.affine(0.25)  # exact in 32 bits
        keep = torch.from_numpy(fd.draw_mask(way.cells, 0.25, rng=seed).to_bool()).expand(way.shape)
        decisions.update(keep.flatten().tolist())
        y = way.torch(x, 0.25, seed=seed)
        torch.testing.assert_close(y, torch.where(keep, a * x + b, torch.full_like(x, c)), rtol=1e-14, atol=1e-14)
        assert_equal(y[~keep], torch.full_like(y[~keep], c))
    assert decisions == {False, True}


def naive_blocks(cells, block_size, p, seed):
    """What DropBlock keeps: a block dropped from each seed on, by loops."""
    plan = variants.blocks(cells, p, block_size)
    keep = np.ones(cells, bool)
    for at in np.argwhere(~fd.draw_mask(plan.seeds, plan.gamma, rng=seed).to_bool()):
        spatial = at[len(cells) - len(block_size) :]
        lead = tuple(at[: len(cells) - len(block_size)])
        keep[(*lead, *(slice(i, i + size) for i, size in zip(spatial, block_size, strict=True)))] = False
    return torch.from_numpy(keep)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_dropped_whole(backend, name):
    """And what is kept is multiplied by cells / cells kept."""
    kind = WAYS[name]
    size = kind.torch.keywords["block_size"]
    block_size = (size,) * (len(kind.shape) - 2) if isinstance(size, int) else size
    x = normal(kind.shape, torch.float64)
    for seed, p in itertools.product(range(4), (0.1, 0.5)):
        keep = naive_blocks(kind.cells, block_size, p, seed)
        scale = keep.numel() / int(keep.sum())
        y = kind.torch(x, p, seed=seed)
        assert_equal(y, torch.where(keep, x * scale, torch.zeros_like(x)))
        assert not keep.all()
        ones = kind.torch(torch.ones_like(x), p, seed=seed)
        assert float(ones.mean()) == pytest.approx(1.0, rel=1e-12)


def test_blocks_of_one_are_elements():
    x = normal((3, 2, 7, 8))
    keep = torch.from_numpy(fd.draw_mask(x.shape, 0.3, rng=2).to_bool())
    assert_equal(fdt.drop_block2d(x, 0.3, 1, seed=2) != 0, keep)


def test_blocks_as_large_as_the_input_drop_all_or_nothing():
    y = fdt.drop_block2d(torch.ones(40, 5, 3, 4), 0.3, 9, seed=2).flatten(2)
    assert_equal((y == 0).any(2), (y == 0).all(2))
    assert_equal((y == 0).all(2), torch.from_numpy(~fd.draw_mask((40, 5), 0.3, rng=2).to_bool()))


def test_gaussian_noise_multiplies(backend):
    """By factors that do not depend on what is multiplied."""
    x = normal((7, 33), torch.float64)
    factors = fdt.gaussian_dropout(torch.ones_like(x), 0.3, seed=2)
    assert_equal(fdt.gaussian_dropout(x, 0.3, seed=2), x * factors)
    assert factors.unique().numel() == x.numel()
    assert_equal(fdt.gaussian_dropout(torch.ones(7, 33), 0.3, seed=2), factors.float())


@pytest.mark.parametrize("name", MASKED + BLOCKS)
def test_dropped_infinities_and_nans_leave_no_trace(backend, dtype, name):
    """+0, or alpha's floor, in the output, and +0 in the gradient."""
    way = WAYS[name]
    bad = np.resize(np.array([np.inf, -np.inf, np.nan, -0.0]), way.shape).astype(dtype.public)
    floor = np.asarray(way.affine(0.5)[2] if way.law == "alpha" else 0.0, dtype.public)
    some = False
    for seed in range(3):
        one, two = (way.torch(torch.full(way.shape, value), 0.5, seed=seed) for value in (1.0, 2.0))
        gone = (one == two).flatten().numpy()
        x = tensor_of(bad).requires_grad_()
        y = way.torch(x, 0.5, seed=seed)
        y.backward(tensor_of(bad))
        assert (bits_of(array_of(y))[gone] == bits_of(floor)).all()
        assert not bits_of(array_of(x.grad))[gone].any()
        some |= bool(gone.any())
    assert some


def test_gaussian_noise_keeps_infinities_and_nans():
    y = fdt.gaussian_dropout(torch.tensor([math.inf, math.nan]), 0.3, seed=1)
    assert y[0].isinf()
    assert y[1].isnan()


@pytest.mark.parametrize("name", [name for name in WAYS if name not in REAL])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_numbers_are_dropped_whole(backend, name, dtype):
    way = WAYS[name]
    x = torch.randn(way.shape, dtype=dtype)
    for p in way.p:
        y = way.torch(x, p, seed=3)
        assert_equal(y.real, way.torch(x.real.clone(), p, seed=3))
        assert_equal(y.imag, way.torch(x.imag.clone(), p, seed=3))


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("grad", [False, True])
def test_complex_numbers_are_refused_where_they_have_no_sense(name, grad, inplace):
    x = torch.ones(WAYS[name].shape, dtype=torch.complex64, requires_grad=grad) * 1
    untouched(x, lambda: WAYS[name].torch(x, 0.5, inplace=inplace), RuntimeError, "takes real numbers, but got")


# ---- nothing to do, everything to do ----


def assert_nothing_done(function, x):
    """The input is returned, and no number drawn."""
    version, results = x._version, []
    assert numbers_drawn(lambda: results.append(function(x))) == 0
    assert results[0] is x
    assert x._version == version


@pytest.mark.parametrize("p", [0.0, 0, torch.tensor(0.0)], ids=repr)
def test_p_of_0_is_the_very_same_object(way, p):
    for options in way.in_places:
        for x in (torch.ones(way.shape), torch.ones(way.shape, requires_grad=True)):
            assert_nothing_done(functools.partial(way.torch, p=p, **options), x)


@pytest.mark.parametrize("name", MASKED + BLOCKS)
def test_p_that_rounds_to_0_is_the_very_same_object(name):
    assert_nothing_done(functools.partial(WAYS[name].torch, p=1e-10), torch.ones(WAYS[name].shape))


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.law != "standard"])
def test_evaluation_is_the_very_same_object(name):
    way = WAYS[name]
    for options, p in itertools.product(way.in_places, way.p):
        for x in (torch.ones(way.shape), torch.ones(way.shape, dtype=torch.int64)):
            assert_nothing_done(functools.partial(way.torch, p=p, training=False, **options), x)


STANDARD = {
    "dropout": lambda x, p, **options: fdt.dropout(x, p, scaling="standard", **options),
    "variational_dropout": lambda x, p, **options: fdt.variational_dropout(x, p, 0, scaling="standard", **options),
    "drop_connect": lambda x, p, **options: fdt.drop_connect(x, p, scaling="standard", **options),
    "stochastic_depth": lambda x, p, **options: fdt.stochastic_depth(x, p, "row", scaling="standard", **options),
}


@pytest.mark.parametrize("name", STANDARD)
def test_standard_scaling_keeps_in_training_and_scales_in_evaluation(backend, dtype, name):
    """By 1 - p as it is realised in 32 bits, and as NumPy does."""
    array = dtype.numbers((7, 33))
    for p in (0.1, 0.5, 1.0):
        x = tensor_of(array).requires_grad_()
        y = STANDARD[name](x, p, seed=3)
        kept = (STANDARD[name](torch.ones(7, 33), p, seed=3) != 0).numpy()
        assert_same_bits(array_of(y)[kept], array[kept])
        assert not bits_of(array_of(y)[~kept]).any()
        y = STANDARD[name](x, p, training=False)
        y.sum().backward()
        assert_same_bits(array_of(y), fd.dropout(array, p, training=False, scaling="standard")[0], p)
        scale = np.asarray(1 - threshold(p) / DROP_ALL).astype(dtype.public)
        assert_same_bits(array_of(x.grad), np.full((7, 33), scale))


@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.parametrize("training", [True, False])
def test_standard_scaling_refuses_integers(name, training):
    x = torch.ones(7, 33, dtype=torch.int64)
    untouched(x, lambda: STANDARD[name](x, 0.5, training=training), RuntimeError, "dropout takes float32")


def test_standard_scaling_in_place_in_evaluation():
    x = torch.tensor([1.0, -2.0, 4.0])
    assert fdt.dropout(x, 0.5, False, True, scaling="standard") is x
    assert x.tolist() == [0.5, -1.0, 2.0]
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        fdt.dropout(leaf, 0.5, False, True, scaling="standard")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [False, True])
def test_standard_scaling_of_p_1_is_zero(training, inplace):
    """Of infinities and NaNs too, and of their gradient, as in NumPy."""
    leaf = torch.tensor([math.inf, -math.inf, math.nan, -1.0], requires_grad=True)
    x = leaf * 1
    y = fdt.dropout(x, 1.0, training, inplace, scaling="standard")
    assert (y is x) == inplace
    (dx,) = torch.autograd.grad(y, leaf, leaf.detach())
    for result in (y, dx):
        assert_same_bits(array_of(result), np.zeros(4, np.float32))


@pytest.mark.parametrize("name", MASKED + BLOCKS)
def test_p_of_1_is_zero_and_has_no_gradient(backend, dtype, name):
    for p in (1.0, 1, torch.tensor(1.0)):
        x = tensor_of(np.full(WAYS[name].shape, np.inf).astype(dtype.public))
        for result in with_gradient(functools.partial(WAYS[name].torch, p=p), x, x):
            assert not bits_of(array_of(result)).any()


@pytest.mark.parametrize("p", [1.0, 1, True, torch.tensor(1.0), 1.0 - 2.0**-60], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_gaussian_p_of_1_is_refused(p, training):
    x = torch.ones(12)
    text = r"^p must be below 1 for Gaussian dropout, whose variance is p / \(1 - p\), but got 1\.0$"
    untouched(x, lambda: fdt.gaussian_dropout(x, p, training), ValueError, text)


# ---- in place ----


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("make", [lambda leaf: leaf, lambda leaf: leaf.view(leaf.shape)], ids=["leaf", "view of leaf"])
def test_inplace_of_a_leaf_is_refused_as_by_torch(name, make):
    for p in WAYS[name].p:
        x = make(torch.ones(WAYS[name].shape, requires_grad=True))
        with pytest.raises(RuntimeError) as torchs:
            F.dropout(x, 0.5, True, True)
        call = functools.partial(WAYS[name].torch, x, p, inplace=True)
        untouched(x, call, RuntimeError, re.escape(str(torchs.value)))


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("grad", [False, True])
def test_inplace_makes_torch_notice_that_a_saved_tensor_changed(name, grad):
    leaf = torch.randn(WAYS[name].shape, requires_grad=True)
    x = leaf * 1 if grad else torch.randn(WAYS[name].shape)
    saved = x * leaf
    WAYS[name].torch(x, 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("name", IN_PLACE)
def test_inplace_has_the_gradient_of_its_copy(name):
    """Of a view, through which the gradient reaches what it is a view of."""
    x = normal(WAYS[name].shape, torch.float64).requires_grad_()
    results = []
    for inplace in (False, True):
        base = x * 2
        y = WAYS[name].torch(base.view_as(base), 0.5, inplace=inplace, seed=6)
        results.append((y.detach(), *torch.autograd.grad((base if inplace else y).sin().sum(), x)))
    assert_equal(*results)


# ---- where masks come from ----


def test_each_call_draws_one_number(way):
    own = torch.Generator().manual_seed(3)
    for p in way.p:
        strided = LAYOUTS["transposed"](torch.ones, way.shape)
        for x in (torch.ones(way.shape), torch.ones(way.shape, requires_grad=True), strided):
            call = functools.partial(way.torch, x, p)
            assert numbers_drawn(call) == 1
            assert numbers_drawn(functools.partial(call, generator=own), own) == 1
            assert numbers_drawn(functools.partial(call, generator=own)) == 0
            assert numbers_drawn(functools.partial(call, seed=1)) == 0


def test_backward_draws_nothing(way):
    y = way.torch(torch.ones(way.shape, requires_grad=True), 0.5)
    assert numbers_drawn(lambda: y.sum().backward()) == 0


def test_manual_seed_and_generator_repeat_masks(kind):
    x, own = normal(kind.shape), torch.Generator()
    first = under(11, lambda: [kind.torch(x, 0.5) for _ in range(8)])
    again = under(11, lambda: [kind.torch(x, 0.5) for _ in range(8)])
    by_generator = [kind.torch(x, 0.5, generator=own.manual_seed(11) if i == 0 else own) for i in range(8)]
    assert_equal(tuple(again), tuple(first))
    assert_equal(tuple(by_generator), tuple(first))
    assert any(not torch.equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_seeds_have_64_bits_in_any_form(way, seed):
    x, signed = normal(way.shape), seed - 2**64 if seed >= 2**63 else seed
    wanted = tensor_of(way.numpy(x.numpy(), 0.3, rng=seed)[0])
    for form in (seed, torch.tensor(signed), torch.tensor([[signed]]), np.uint64(seed)):
        assert_equal(way.torch(x, 0.3, seed=form), wanted)


def test_seed_is_remembered_and_not_the_tensor_it_came_in(way):
    x, seed = normal(way.shape).requires_grad_(), torch.tensor(3)
    y = way.torch(x, 0.5, seed=seed)
    seed.fill_(4)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_equal(dx, torch.autograd.grad(way.torch(x, 0.5, seed=3).sum(), x)[0])


# ---- what is kept ----


def test_bytes_kept_for_backward(way):
    """Words of 32 cells or 8 bytes of a seed; beside DropBlock's words their count, of 8 bytes."""
    wanted = 8 if way.stores == ("seed",) else 4 * math.ceil(math.prod(way.cells) / 32) + 8 * (way.law == "blocks")
    for p, dtype in itertools.product(way.p, FLOATS):
        with saved_tensors() as kept:
            way.torch(torch.ones(way.shape, dtype=dtype, requires_grad=True), p)
        assert sum(t.untyped_storage().nbytes() for t in kept) == wanted


def test_nothing_is_kept_where_no_gradient_is_wanted(kind):
    x = torch.ones(kind.shape, requires_grad=True)
    with saved_tensors() as kept:
        kind.torch(x.detach(), 0.5)
        with torch.no_grad():
            kind.torch(x, 0.5)
        kind.torch(x, 0.0)
        if kind.law != "standard":
            kind.torch(x, 0.5, training=False)
    assert not kept


# ---- bad input ----

BAD_P = (-0.1, 1.1, math.nan, math.inf, 2, torch.tensor(1.5))


@pytest.mark.parametrize("p", BAD_P, ids=repr)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_p_out_of_range_is_refused(kind, p, training):
    x = torch.ones(kind.shape)
    text = re.escape(f"{kind.probability} has to be between 0 and 1, but got {p}")
    untouched(x, lambda: kind.torch(x, p, training=training), ValueError, f"^{text}$")


@pytest.mark.parametrize("p", ["0.5", None, [0.5], torch.tensor([0.5, 0.5])], ids=repr)
def test_p_of_another_type_is_refused(kind, p):
    x = torch.ones(kind.shape)
    untouched(x, lambda: kind.torch(x, p), TypeError, "p must be a number|float|real number")


BAD = {
    "seed negative": ({"seed": -1}, ValueError, "seed must be from 0 to 2.*64 - 1, but got -1"),
    "seed float": ({"seed": 1.0}, TypeError, "seed must be an int, but got float"),
    "seed int32": ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "seed must be .*int64.*got.*int32"),
    "seed of two": ({"seed": torch.tensor([1, 2])}, ValueError, r"seed must be one number, .*\(2,\)"),
    "seed and generator": ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator"),
    "generator int": ({"generator": 5}, TypeError, "generator"),
}


@pytest.mark.parametrize(("options", "error", "match"), BAD.values(), ids=BAD)
def test_bad_options_are_refused(kind, options, error, match):
    """On a plain tensor, one with a graph and one that takes the ops, in place and not."""
    for make in (torch.Tensor.clone, lambda x: x.requires_grad_() * 1, lambda x: x.as_subclass(Subclass)):
        x = make(torch.ones(kind.shape))
        for more in kind.in_places:
            untouched(x, functools.partial(kind.torch, x, 0.5, **more, **options), error, match)


class Subclass(torch.Tensor):
    """As torch makes them."""


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if len(kind.stores) == 2])
def test_unknown_store_is_refused(name):
    x = torch.ones(KINDS[name].shape)
    text = "^store must be one of 'bits', 'seed', but got 'bytes'$"
    untouched(x, lambda: KINDS[name].torch(x, 0.5, store="bytes"), ValueError, text)


@pytest.mark.parametrize("name", STANDARD)
def test_unknown_scaling_is_refused(name):
    x = torch.ones(7, 33)
    call = {
        "dropout": lambda: fdt.dropout(x, 0.5, scaling="alpha"),
        "variational_dropout": lambda: fdt.variational_dropout(x, 0.5, 0, scaling="alpha"),
        "drop_connect": lambda: fdt.drop_connect(x, 0.5, scaling="alpha"),
        "stochastic_depth": lambda: fdt.stochastic_depth(x, 0.5, "row", scaling="alpha"),
    }[name]
    untouched(x, call, ValueError, "^scaling must be one of 'inverted', 'standard', but got 'alpha'$")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e5m2], ids=str)
def test_other_dtypes_are_refused(kind, dtype):
    x = torch.ones(kind.shape).to(dtype)

    def refused():
        for p in kind.p:
            with pytest.raises(RuntimeError, match=f"float32, .*complex128, but got {dtype}"):
                kind.torch(x, p)

    assert numbers_drawn(refused) == 0


@pytest.mark.parametrize("x", [np.ones((3, 3, 3, 3), np.float32), [1.0], 1.0, None], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_is_no_tensor_is_refused(kind, x, training):
    with pytest.raises(TypeError, match=r"^input must be a Tensor, but got "):
        kind.torch(x, 0.5, training=training)


# ---- as the peer does ----


def shared_axes(function, shape):
    """The axes along which a dropout decides once."""
    results = [function(torch.ones(shape), 0.5) for _ in range(12)]
    return [i for i in range(len(shape)) if all((y == y.narrow(i, 0, 1)).all() for y in results)]


def outcome(function, rank):
    """Shared axes or error, and warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = shared_axes(function, (4, 3, 2, 3, 2, 2)[:rank])
        except RuntimeError as error:
            result = str(error)
    return result, {str(warning.message) for warning in caught}


@pytest.mark.parametrize("rank", range(7))
@pytest.mark.parametrize("name", FEATURES)
def test_ranks_are_taken_refused_and_warned_of_as_by_torch(name, rank):
    torch.manual_seed(0)
    wanted = outcome(FEATURES[name], rank)
    assert outcome(getattr(fdt, name), rank) == wanted


@pytest.mark.parametrize("rank", range(4))
def test_feature_alpha_dropout_takes_the_ranks_torch_takes(rank):
    torch.manual_seed(0)
    wanted = outcome(lambda x, p: F.feature_alpha_dropout(x, p, True), rank)
    assert outcome(lambda x, p: fdt.feature_alpha_dropout(x, p, True), rank) == wanted


@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
def test_alpha_dropout_does_nothing_unless_training_as_torchs(name):
    x = torch.ones(4, 5, 6)
    assert getattr(fdt, name)(x) is x
    assert_equal(getattr(F, name)(x), x)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
def test_alpha_dropout_has_torchs_two_values(name, p):
    """For what is dropped and, of 1, for what is kept; torch's own constants have seven digits."""
    x = torch.ones(300, 40, 2, dtype=torch.float64)
    ours, theirs = getattr(fdt, name)(x, p, True, seed=1).unique(), getattr(F, name)(x, p, True).unique()
    assert len(ours) == len(theirs) == (2 if p else 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    a, b, c = alpha(p)
    torch.testing.assert_close(ours, torch.tensor(sorted({c, a + b} if p else {1.0}), dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
def test_drop_block_refuses_other_ranks_as_torchvisions(training):
    for function, rank in ((fdt.drop_block2d, 4), (fdt.drop_block3d, 5)):
        for n in {0, 3, 4, 5, 6} - {rank}:
            x = torch.ones((2,) * n)
            text = f"^input should be {rank} dimensional. Got {n} dimensions.$"
            untouched(x, lambda f=function, x=x: f(x, 0.5, 1, training=training), ValueError, text)


@pytest.mark.parametrize(
    ("block_size", "error"),
    [
        *((size, ValueError) for size in (0, -1, (3,), (3, 3, 3), (3, 0))),
        *((size, TypeError) for size in ("3", 3.0, None)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("training", [True, False])
def test_block_sizes_that_do_not_fit_are_refused(block_size, error, training):
    x = torch.ones(2, 3, 5, 5)
    untouched(x, lambda: fdt.drop_block2d(x, 0.5, block_size, training=training), error, "^block_size must ")


@pytest.mark.parametrize("mode", ["col", "Row", "", None])
@pytest.mark.parametrize("training", [True, False])
def test_stochastic_depth_refuses_other_modes_as_torchvisions(mode, training):
    x = torch.ones(2, 3)
    text = f"^mode has to be either 'batch' or 'row', but got {mode}$"
    untouched(x, lambda: fdt.stochastic_depth(x, 0.5, mode, training), ValueError, text)


@pytest.mark.parametrize(
    ("time_axis", "error", "match"),
    [
        (2, ValueError, "time_axis must be an axis of x, which has 2, but got 2"),
        (-3, ValueError, "time_axis must be an axis of x, which has 2, but got -3"),
        (0.0, TypeError, "time_axis must be an int, but got float"),
        (True, TypeError, "time_axis must be an int, but got bool"),
        (None, TypeError, "time_axis must be an int, but got NoneType"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("training", [True, False])
def test_time_axes_that_input_has_not_are_refused(time_axis, error, match, training):
    x = torch.ones(2, 3)
    untouched(x, lambda: fdt.variational_dropout(x, 0.5, time_axis, training), error, f"^{match}$")


def test_dtype_table_is_whole():
    """The dtypes compared with NumPy are all the real ones that torch's face takes."""
    from fastdrop.torch.runtime.mask_kernels import TAGS

    assert {str(kind).removeprefix("torch.") for kind in TAGS} == {dtype.name for dtype in DTYPES}

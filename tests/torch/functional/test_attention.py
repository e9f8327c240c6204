"""Attention with dropout: its values and gradients by the formula under the mask of `dropout`, and what it keeps."""

from __future__ import annotations

import contextlib
import math

import pytest

torch = pytest.importorskip("torch")

import torch._dynamo.compiled_autograd as compiled_autograd
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt
from fastdrop.torch.functional import attention
from fastdrop.torch.functional.attention import scaled_dot_product_attention
from fastdrop.torch.models import enable
from fastdrop.torch.ops import attention as attention_ops

from ..cases import Log, Named, assert_equal, numbers_drawn, saved_tensors, under
from ..ops.compiling import some

P, SEED = 0.3, 5
NO = -math.inf
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(query, key, value, mask=None, p=P, causal=False, scale=None, gqa=False, *, seed=SEED):
    """In float64, of torch's ops around `dropout` of the weights."""
    query, key, value = query.double(), key.double(), value.double()
    if gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, NO) if mask.dtype is torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), NO)
    nothing = (scores == NO).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return fdt.dropout(weights, p, seed=seed) @ value


def with_gradients(function, tensors, dy):
    tensors = [x.detach().requires_grad_() for x in tensors]
    y = function(*tensors)
    return y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))


def assert_close(actual, expected, dtype):
    """To the largest number in each."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype is dtype
        assert a.shape == e.shape
        error = (a.double() - e).abs().max() / e.abs().max().clamp(min=1e-3)
        assert error <= TOLERANCE[dtype], error


def bools(*shape):
    return normal(*shape, seed=9) > 0


# Shapes of query, key and value; a mask or none; options.
CASES = {
    "plain": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), None, {}),
    "without heads": ((5, 8), (7, 8), (7, 8), None, {}),
    "without batch": ((3, 9, 8), (3, 11, 8), (3, 11, 8), None, {"scale": -0.7}),
    "more batch": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8), normal(2, 1, 1, 7), {}),
    "one of each": ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), None, {}),
    "causal wide": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), None, {"is_causal": True}),
    "causal tall": ((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 8), None, {"is_causal": True}),
    "bool (L, S)": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), bools(5, 7), {}),
    "bool (B, 1, 1, S)": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), bools(2, 1, 1, 7), {}),
    "bool (B, H, L, S)": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), bools(2, 3, 5, 7), {}),
    "bool expanded": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), bools(2, 1, 5, 7).expand(2, 3, 5, 7), {}),
    "float (L, S)": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), normal(5, 7), {}),
    "float (B, 1, 1, S)": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), normal(2, 1, 1, 7), {}),
    "float (B, H, L, S)": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), normal(2, 3, 7, 5).mT, {}),
    "float (H, 1, S)": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), normal(3, 1, 7), {}),
    "float (L, 1)": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), normal(5, 1), {}),
    "float (S)": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), normal(7), {}),
    "queries without keys": (
        (3, 5, 8),
        (3, 7, 8),
        (3, 7, 8),
        torch.zeros(5, 7).index_fill_(0, torch.tensor(2), NO),
        {},
    ),
    "grouped": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 4), None, {"enable_gqa": True}),
    "grouped causal": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 4), None, {"is_causal": True, "enable_gqa": True}),
    "grouped (H, L, S)": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 4), bools(4, 5, 7), {"enable_gqa": True}),
    "grouped apart": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 4), None, {"enable_gqa": True}),
    "broadcast": ((2, 3, 5, 8), (3, 7, 8), (2, 1, 7, 8), None, {}),
}

COMPILED = ("plain", "bool (B, 1, 1, S)", "float (L, S)", "causal wide", "grouped")


def tensors_of(case, dtype=torch.float64):
    *shapes, mask, options = CASES[case]
    mask = mask if mask is None or mask.dtype is torch.bool else mask.to(dtype)
    return [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)], mask, options


def both(case, dtype):
    """The function and the formula."""
    tensors, mask, options = tensors_of(case, dtype)
    names = {"is_causal": "causal", "enable_gqa": "gqa"}
    others = {names.get(name, name): value for name, value in options.items()}
    return (
        tensors,
        lambda *x: scaled_dot_product_attention(*x, mask, P, **options, seed=SEED),
        lambda *x: formula(*x, mask, **others),
    )


@pytest.fixture(params=[1 << 20, 80, 20], ids=["one block", "blocks", "heads"])
def block(request, monkeypatch):
    """How much is worked on at once: here everything, or a few heads, whose bits begin anywhere in a word."""
    monkeypatch.setattr(attention_ops, "BLOCK", request.param)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_formula(block, case):
    tensors, ours, expected = both(case, torch.float64)
    dy = normal(*expected(*tensors).shape, seed=7)
    assert_close(with_gradients(ours, tensors, dy), with_gradients(expected, tensors, dy), torch.float64)
    assert_equal(ours(*tensors), with_gradients(ours, tensors, dy)[0])  # where nothing is kept


@pytest.mark.parametrize("case", ["plain", "grouped"])
def test_heads_side_by_side_in_memory(block, case):
    """As modules make them of one projection; gradients of the result too."""
    tensors, ours, expected = both(case, torch.float64)
    dy = normal(*expected(*tensors).shape, seed=7)
    tensors, (dy,) = ([x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs] for xs in (tensors, [dy]))
    assert not any(x.is_contiguous() for x in (*tensors, dy))
    assert_close(with_gradients(ours, tensors, dy), with_gradients(expected, tensors, dy), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["plain", "causal wide", "bool (B, 1, 1, S)", "float (B, H, L, S)", "grouped"])
def test_dtypes_equal_the_formula(case, dtype):
    tensors, ours, expected = both(case, dtype)
    dy = normal(*expected(*tensors).shape, dtype=dtype, seed=7)
    results = with_gradients(ours, tensors, dy)
    assert_close(results, with_gradients(expected, [x.double() for x in tensors], dy), dtype)


def test_float32_mask_with_16_bit_data():
    tensors, _, _ = tensors_of("plain", torch.bfloat16)
    mask = normal(5, 7, dtype=torch.float32)
    y = scaled_dot_product_attention(*tensors, mask, P, seed=SEED)
    assert_close([y], [formula(*tensors, mask)], torch.bfloat16)


def test_large_scores_of_float16_stay_finite():
    """Products are float32's."""
    query = torch.full((2, 4, 64), 100.0, dtype=torch.float16)
    y = scaled_dot_product_attention(query, query, query, dropout_p=P, seed=SEED)
    assert_close([y], [formula(query, query, query)], torch.float16)


def test_mask_is_that_of_dropout():
    """Of equal scores and a unit matrix of values, attention is its dropped weights."""
    zero, unit = torch.zeros(2, 3, 45, 8), torch.eye(45).expand(2, 3, 45, 45)
    y = scaled_dot_product_attention(zero, zero, unit, dropout_p=P, seed=SEED)
    assert_equal(y != 0, fdt.dropout(torch.ones(2, 3, 45, 45), P, seed=SEED) != 0)


def test_generator_gives_one_seed_to_a_call():
    tensors, _, _ = tensors_of("plain")
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(3)))
    expected = scaled_dot_product_attention(*tensors, None, P, seed=seed)
    mine = torch.Generator().manual_seed(3)
    assert_equal(scaled_dot_product_attention(*tensors, None, P, generator=mine), expected)
    assert_equal(under(3, scaled_dot_product_attention, *tensors, None, P), expected)
    assert_equal(scaled_dot_product_attention(*tensors, None, P, seed=torch.tensor(seed)), expected)
    assert numbers_drawn(lambda: scaled_dot_product_attention(*tensors, None, P)) == 1
    assert numbers_drawn(lambda: scaled_dot_product_attention(*tensors, None, P, seed=1)) == 0
    assert numbers_drawn(lambda: scaled_dot_product_attention(*tensors, None, 0.0)) == 0


def test_without_dropout_it_is_torchs():
    tensors, mask, _ = tensors_of("bool (L, S)", torch.float32)
    assert_equal(scaled_dot_product_attention(*tensors, mask), F.scaled_dot_product_attention(*tensors, mask))


def test_dropping_everything_is_zero():
    tensors, _, _ = tensors_of("plain")
    results = with_gradients(lambda *x: scaled_dot_product_attention(*x, None, 1.0), tensors, torch.ones(2, 3, 5, 4))
    assert_equal(results, tuple(torch.zeros_like(x) for x in (torch.ones(2, 3, 5, 4).double(), *tensors)))


def test_nan_stays_in_its_query():
    tensors, _, _ = tensors_of("plain", torch.float32)
    tensors[0][1, 2, 3, 0] = math.nan
    y = scaled_dot_product_attention(*tensors, None, P, seed=SEED)
    lost = torch.zeros(2, 3, 5, dtype=torch.bool)
    lost[1, 2, 3] = True
    assert_equal(y.isnan().all(-1), lost)
    assert_equal(y.isnan().any(-1), lost)


@pytest.mark.parametrize("shapes", [(0, 5, 7, 8), (2, 0, 7, 8), (2, 5, 0, 8), (2, 5, 7, 0)], ids=str)
def test_empty_arguments_give_what_torch_gives(shapes):
    batch, queries, keys, width = shapes
    tensors = [torch.ones(batch, n, width, requires_grad=True) for n in (queries, keys, keys)]
    y = scaled_dot_product_attention(*tensors, None, P, seed=SEED)
    assert_equal(y, F.scaled_dot_product_attention(*tensors, None, P))
    y.sum().backward()
    assert_equal(tensors[0].grad, torch.zeros(batch, queries, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_are_the_arguments_the_weights_and_their_bits(dtype):
    tensors, mask, _ = tensors_of("bool (L, S)", dtype)
    tensors = [x.requires_grad_() for x in tensors]
    with saved_tensors() as kept:
        scaled_dot_product_attention(*tensors, mask, P)
    new = [t for t in kept if not any(t is x for x in (*tensors, mask))]
    scores = 2 * 3 * 5 * 7
    assert sorted(t.nbytes for t in new) == sorted([4 * -(-scores // 32), scores * dtype.itemsize])


def test_of_value_alone_nothing_else_is_kept():
    (query, key, value), ours, expected = both("plain", torch.float64)
    value.requires_grad_()
    with saved_tensors() as kept:
        y = ours(query, key, value)
    assert not [t for t in kept if any(t is x for x in (query, key, value))]
    assert len(kept) == 2
    (dvalue,) = torch.autograd.grad(y.sin().sum(), value, create_graph=True)
    (theirs,) = torch.autograd.grad(expected(query, key, value).sin().sum(), value, create_graph=True)
    torch.testing.assert_close(dvalue, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(d.square().sum(), value)[0] for d in (dvalue, theirs)))


def test_arguments_may_change_but_for_those_kept():
    tensors, mask, _ = tensors_of("bool (L, S)")
    query, mask = tensors[0].requires_grad_(), mask.clone()
    y = scaled_dot_product_attention(*tensors, mask, P)
    mask.zero_()
    y.sum().backward(retain_graph=True)
    tensors[2].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert query.grad is not None


def test_nothing_is_kept_without_a_gradient():
    tensors, _, _ = tensors_of("plain")
    with torch.inference_mode():
        y = scaled_dot_product_attention(*tensors, None, P, seed=SEED)
    assert y.grad_fn is None
    assert_close([y.clone()], [formula(*tensors)], torch.float64)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_each_argument_may_want_a_gradient_alone(wanted):
    tensors, ours, expected = both("grouped", torch.float64)
    tensors[wanted].requires_grad_()
    gradients = [torch.autograd.grad(f(*tensors).sin().sum(), tensors[wanted])[0] for f in (ours, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("grouped", [False, True], ids=["own heads", "shared heads"])
def test_gradients_of_any_order(monkeypatch, grouped):
    monkeypatch.setattr(attention_ops, "BLOCK", 9)
    heads = 1 if grouped else 2
    tensors = [normal(h, 3, 2, seed=i).requires_grad_() for i, h in enumerate((2, heads, heads))]
    mask = torch.zeros(3, 3).double()
    mask[1], mask[0, 1] = NO, NO

    def function(*x):
        return scaled_dot_product_attention(*x, mask, P, enable_gqa=grouped, seed=1)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("create_graph", [False, True], ids=["kernel", "composed"])
def test_gradients_where_a_score_is_minus_infinity(create_graph):
    query = torch.tensor([[[1e20, 0.0], [1.0, 0.0]]], requires_grad=True)
    key = torch.tensor([[[-1e20, 0.0], [1.0, 0.0]]], requires_grad=True)
    y = scaled_dot_product_attention(query, key, torch.ones(1, 2, 4), dropout_p=P, seed=2)
    gradients = torch.autograd.grad(y.sum(), (query, key), create_graph=create_graph)
    assert all(x.isfinite().all() for x in gradients)


def test_gradient_that_is_batched_or_compiled_or_checkpointed():
    tensors, ours, _ = both("plain", torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    y = ours(*leaves)
    vectors = torch.stack([y.detach().cos(), y.detach().sin()])
    single = [torch.autograd.grad(y, leaves, v, retain_graph=True) for v in vectors]
    batched = torch.autograd.grad(y, leaves, vectors, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(batched, tuple(torch.stack(grads) for grads in zip(*single, strict=True)))
    for use_reentrant in (False, True):
        again = checkpoint(ours, *leaves, use_reentrant=use_reentrant)
        if use_reentrant:  # which `torch.autograd.grad` cannot go through
            again.backward(vectors[0])
            grads = tuple(x.grad for x in leaves)
        else:
            grads = torch.autograd.grad(again, leaves, vectors[0])
        assert_equal(grads, single[0])
    for x in leaves:
        x.grad = None
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        ours(*leaves).backward(vectors[0])
    torch.testing.assert_close(tuple(x.grad for x in leaves), single[0])
    torch.compiler.reset()


def test_mask_may_want_a_gradient():
    tensors, mask, _ = tensors_of("float (B, 1, 1, S)")
    dy = normal(2, 3, 5, 8, seed=7)

    def run(function, name):
        return with_gradients(lambda *x: function(*x[:3], **{name: x[3]}, seed=SEED), [*tensors, mask], dy)

    ours = run(lambda *x, **o: scaled_dot_product_attention(*x, **o, dropout_p=P), "attn_mask")
    assert_close(ours, run(formula, "mask"), torch.float64)
    small = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate([(2, 3, 2)] * 3 + [(3, 1)])]
    assert torch.autograd.gradgradcheck(lambda *x: scaled_dot_product_attention(*x, P, seed=SEED), small)


def test_gradient_of_a_float32_mask_beside_16_bits():
    """Summed in float32; nothing more is kept for it."""
    tensors = [x.half().requires_grad_() for x in tensors_of("plain")[0]]
    mask = normal(5, 7, dtype=torch.float32).requires_grad_()
    with saved_tensors() as kept:
        y = scaled_dot_product_attention(*tensors, mask, P, seed=SEED)
    new = [t for t in kept if not any(t is x for x in (*tensors, mask))]
    assert sorted(t.nbytes for t in new) == [4 * 7, 2 * 210]
    (actual,) = torch.autograd.grad(y, mask, torch.ones_like(y) * 1000)
    double = mask.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(formula(*tensors, double), double, torch.ones_like(y).double() * 1000)
    assert_close([actual.half()], [expected], torch.float16)
    assert not torch.equal(actual, actual.half().float())


def test_forward_mode_and_transforms_have_the_same_mask():
    tensors, ours, expected = both("plain", torch.float64)
    query, *others = tensors
    tangent = query.cos()

    def of_query(f):
        return lambda x: f(x, *others)

    slopes = jvp(of_query(expected), (query,), (tangent,))
    torch.testing.assert_close(jvp(of_query(ours), (query,), (tangent,)), slopes)
    torch.testing.assert_close(*(grad(lambda x, f=f: f(x, *others).sin().sum())(query) for f in (ours, expected)))
    samples = torch.stack([query, tangent])
    torch.testing.assert_close(*(vmap(of_query(f), randomness="same")(samples) for f in (ours, expected)))
    with fwAD.dual_level():
        torch.testing.assert_close(tuple(fwAD.unpack_dual(ours(fwAD.make_dual(query, tangent), *others))), slopes)


def test_modes_and_subclasses_see_it():
    tensors, ours, expected = both("plain", torch.float64)
    with Log() as log:
        y = ours(*tensors)
    assert any("fastdrop" in name for name in log.seen)
    torch.testing.assert_close(y, expected(*tensors))
    Named.seen = []
    y = scaled_dot_product_attention(tensors[0], tensors[1].as_subclass(Named), tensors[2], None, P, seed=SEED)
    assert Named.seen[0] is scaled_dot_product_attention
    assert type(y) is Named
    with FakeTensorMode():
        fakes = [torch.empty(x.shape) for x in tensors]
        assert scaled_dot_product_attention(*fakes, None, P).shape == (2, 3, 5, 4)
    assert scaled_dot_product_attention(*(x.to("meta") for x in tensors), None, P).shape == (2, 3, 5, 4)


def test_autocast_is_torchs():
    tensors, _, _ = tensors_of("plain", torch.float32)
    expected = scaled_dot_product_attention(*(x.bfloat16() for x in tensors), None, P, seed=SEED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(scaled_dot_product_attention(*tensors, None, P, seed=SEED), expected)


def test_threads_change_no_bit_of_the_mask():
    zero, unit = torch.zeros(3, 2, 200, 8), torch.eye(200).expand(3, 2, 200, 200)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(scaled_dot_product_attention(zero, zero, unit, dropout_p=P, seed=SEED))
    finally:
        torch.set_num_threads(before)
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_hooks_that_change_what_was_kept_are_found_out():
    tensors, ours, _ = both("plain", torch.float64)
    query = tensors[0].requires_grad_()

    def halved(x):
        return x[: len(x) // 2] if x.dtype is torch.int32 else x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, halved):
        y = ours(query, *tensors[1:])
    with pytest.raises(ValueError, match="words must be 7 int32 on cpu for 210 cells"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", some(COMPILED, ("float (L, S)", "grouped"), "the two cases that are not slow"))
def test_compiled_equals_eager(case):
    tensors, mask, options = tensors_of(case)
    function = torch.compile(
        lambda *x: scaled_dot_product_attention(*x, mask, P, **options), backend="aot_eager", fullgraph=True
    )
    dy = normal(2, tensors[0].shape[1], 5, tensors[2].shape[-1], seed=7)
    compiled = under(3, with_gradients, function, tensors, dy)
    eager = under(3, with_gradients, lambda *x: scaled_dot_product_attention(*x, mask, P, **options), tensors, dy)
    torch.testing.assert_close(compiled, eager)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["ours", "torch's while enabled"])
def test_compiled_keeps_what_eager_code_does(monkeypatch, case):
    monkeypatch.setattr(enable, "FEWEST_SCORES", 0)
    tensors = [x.requires_grad_() for x in tensors_of("plain", torch.bfloat16)[0]]
    mask = normal(5, 7, dtype=torch.float32)
    attend = scaled_dot_product_attention if case == "ours" else F.scaled_dot_product_attention

    def function(*x):
        return attend(*x, mask, P)

    def kept(function):
        with saved_tensors() as saved:
            function(*tensors)
        return sum(t.nbytes for t in saved)

    with fdt.enabled() if case == "torch's while enabled" else contextlib.nullcontext():
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        compiled(*tensors)
        assert kept(compiled) == kept(function)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_lengths_change_without_a_new_graph():
    def function(query, key, value):
        return scaled_dot_product_attention(query, key, value, None, P, True)

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9, 13):
        tensors = [normal(2, 3, length, 8, seed=i) for i in range(3)]
        dy = normal(2, 3, length, 8, seed=7)
        torch.testing.assert_close(
            *(under(1, with_gradients, f, tensors, dy) for f in (compiled, function)), rtol=1e-6, atol=1e-6
        )
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("p", [P, torch.tensor(P)], ids=["number", "tensor"])
def test_ops(p):
    """Schemas, fake kernels, derivatives, and vmap's rule."""
    overload = "default" if p is P else "tensor"
    op, back = (getattr(getattr(torch.ops.fastdrop, name), overload) for name in ("attention", "attention_backward"))
    tensors, mask, _ = tensors_of("grouped (H, L, S)", torch.float32)
    seed = torch.tensor(SEED)
    torch.library.opcheck(op, (*tensors, mask, seed, p, False, 0.3, False))
    y, words, probabilities = op(*tensors, mask, seed, p, False, 0.3, True)
    shapes = [list(x.shape) for x in tensors]
    for data, wanted in ((tensors, [True, False, True]), ([None] * 3, [False, False, True])):
        torch.library.opcheck(back, (y, words, probabilities, *data, p, False, 0.3, *shapes, wanted))
    mapped = torch.func.vmap(lambda query: op(query, *tensors[1:], mask, seed, p, False, 0.3, False)[0])
    assert_equal(mapped(torch.stack([tensors[0]] * 2)), torch.stack([y, y]))
    leaves, added = [x.requires_grad_() for x in tensors], normal(5, 7, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(op, (*leaves, added, seed, p, False, 0.3, True))


X = torch.ones(2, 4, 5, 8)
REFUSED = {
    "dtypes": ((X, X.double(), X), {}),
    "devices": ((X, X.to("meta"), X), {}),
    "one axis": ((X[0, 0, 0],) * 3, {}),
    "width": ((X, X[..., :7], X), {}),
    "keys": ((X, X, X[:, :, :4]), {}),
    "heads": ((X, X[:, :2], X[:, :2]), {}),
    "groups": ((X, X[:, :3], X[:, :3]), {"enable_gqa": True}),
    "groups without heads": ((X[0, 0],) * 3, {"enable_gqa": True}),
    "int64": ((X.long(),) * 3, {}),
    "complex": ((X + 0j,) * 3, {}),
    "mask and causal": ((X, X, X), {"attn_mask": torch.ones(5, 5, dtype=torch.bool), "is_causal": True}),
    "mask of int64": ((X, X, X), {"attn_mask": torch.ones(5, 5, dtype=torch.int64)}),
    "mask of float64": ((X, X, X), {"attn_mask": torch.ones(5, 5).double()}),
    "mask of other keys": ((X, X, X), {"attn_mask": torch.ones(5, 6)}),
    "mask of more axes": ((X, X, X), {"attn_mask": torch.ones(3, 2, 4, 5, 5)}),
    "mask elsewhere": ((X, X, X), {"attn_mask": torch.empty(5, 5, device="meta")}),
    "key of int64": ((X, X.long(), X), {}),
    "no tensor": ((X, None, X), {}),
    "mask no tensor": ((X, X, X), {"attn_mask": [1]}),
    "scale no number": ((X, X, X), {"scale": "2"}),
    "causal no bool": ((X, X, X), {"is_causal": None}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_refused_in_its_words(case):
    arguments, options = REFUSED[case]
    with pytest.raises((RuntimeError, TypeError, IndexError)) as torchs:
        F.scaled_dot_product_attention(*arguments, **options, dropout_p=P)

    def refused():
        with pytest.raises(torchs.type) as ours:
            scaled_dot_product_attention(*arguments, **options, dropout_p=P)
        assert str(ours.value) == str(torchs.value)

    assert numbers_drawn(refused) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["dtypes", "complex", "mask of float64", "width", "heads"])
def test_what_eager_code_refuses_is_not_compiled(case):
    (query, key, value), options = REFUSED[case]
    function = torch.compile(
        lambda *x: scaled_dot_product_attention(*x, **options, dropout_p=P, seed=SEED), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match=r"(?i)expected|must match|takes real numbers"):
        function(query, key, value)
    torch.compiler.reset()


def test_infinite_scale_is_refused():
    with pytest.raises(ValueError, match="scale must be finite, but got inf"):
        scaled_dot_product_attention(X, X, X, dropout_p=P, scale=math.inf)


def test_what_torch_takes_is_not_computed_to_learn_that(monkeypatch):
    asked, torchs = [], attention._torchs
    monkeypatch.setattr(attention, "_torchs", lambda *args: asked.append(args[0].device.type) or torchs(*args))
    assert scaled_dot_product_attention(X, X[:1], X[:1], dropout_p=P).shape == X.shape
    assert asked == ["meta"]


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_bad_probability_is_refused(p):
    with pytest.raises(ValueError, match=f"dropout probability has to be between 0 and 1, but got {p}"):
        scaled_dot_product_attention(X, X, X, dropout_p=p)


@pytest.mark.parametrize("p", [0.0, P])
def test_bad_random_state_is_refused(p):
    with pytest.raises(ValueError, match="seed and generator must not both be given"):
        scaled_dot_product_attention(X, X, X, dropout_p=p, seed=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="seed"):
        scaled_dot_product_attention(X, X, X, dropout_p=p, seed=-1)


# ---- torch's own, while enabled ----


@pytest.mark.parametrize("case", ["plain", "causal wide", "bool (B, 1, 1, S)", "float (L, S)", "grouped", "broadcast"])
def test_enabled_is_ours(monkeypatch, case):
    monkeypatch.setattr(enable, "FEWEST_SCORES", 0)
    tensors, mask, options = tensors_of(case)
    dy = normal(*scaled_dot_product_attention(*tensors, mask, P, **options).shape, seed=7)
    expected = under(3, with_gradients, lambda *x: scaled_dot_product_attention(*x, mask, P, **options), tensors, dy)
    with fdt.enabled():
        y = under(3, with_gradients, lambda *x: F.scaled_dot_product_attention(*x, mask, P, **options), tensors, dy)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("case", REFUSED)
def test_enabled_refuses_as_torch_does(case):
    arguments, options = REFUSED[case]
    texts = []
    for state in (contextlib.nullcontext, fdt.enabled):
        with state(), pytest.raises((RuntimeError, TypeError, IndexError)) as raised:
            F.scaled_dot_product_attention(*arguments, **options, dropout_p=P)
        texts.append((raised.type, str(raised.value)))
    assert texts[0] == texts[1]

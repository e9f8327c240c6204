"""Attention with dropout: its values and gradients by the formula under the mask of `dropout`, and what it keeps."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from functools import partial

import pytest

from fastdrop import backends
from fastdrop.backends import c as native

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt
from fastdrop.torch.functional import attention
from fastdrop.torch.functional.attention import scaled_dot_product_attention
from fastdrop.torch.models import enable
from fastdrop.torch.runtime import attention_kernels

from ...cases import ROOT
from ..cases import Log, Named, assert_equal, numbers_drawn, saved_tensors, under
from ..ops.compiling import fresh_compiler, graphs

__all__ = ["fresh_compiler"]  # a fixture of every test here

P, SEED = 0.3, 5
NO = -math.inf
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(query, key, value, mask=None, p=P, causal=False, scale=None, gqa=False, *, seed=SEED, noise_shape=None):
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
    return fdt.dropout(weights, p, seed=seed, noise_shape=noise_shape) @ value


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
QKV = (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)
GROUPED = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 4)
CASES = {
    "plain": (QKV, None, {}),
    "without heads": (((5, 8), (7, 8), (7, 8)), None, {}),
    "without batch": (((3, 9, 8), (3, 11, 8), (3, 11, 8)), None, {"scale": -0.7}),
    "more batch": (((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)), normal(2, 1, 1, 7), {}),
    "one of each": (((1, 1, 1, 1),) * 3, None, {}),
    "causal wide": (QKV, None, {"is_causal": True}),
    "causal tall": (((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 8)), None, {"is_causal": True}),
    "bool (L, S)": (QKV, bools(5, 7), {}),
    "bool (B, 1, 1, S)": (QKV, bools(2, 1, 1, 7), {}),
    "bool (B, H, L, S)": (QKV, bools(2, 3, 5, 7), {}),
    "bool expanded": (QKV, bools(2, 1, 5, 7).expand(2, 3, 5, 7), {}),
    "float (L, S)": (QKV, normal(5, 7), {}),
    "float (B, 1, 1, S)": (QKV, normal(2, 1, 1, 7), {}),
    "float (B, H, L, S)": (QKV, normal(2, 3, 7, 5).mT, {}),
    "float (H, 1, S)": (QKV, normal(3, 1, 7), {}),
    "float (L, 1)": (QKV, normal(5, 1), {}),
    "float (S)": (QKV, normal(7), {}),
    "queries without keys": (QKV, torch.zeros(5, 7).index_fill_(0, torch.tensor(2), NO), {}),
    "grouped": (GROUPED, None, {"enable_gqa": True}),
    "grouped causal": (GROUPED, None, {"is_causal": True, "enable_gqa": True}),
    "grouped (H, L, S)": (GROUPED, bools(4, 5, 7), {"enable_gqa": True}),
    "grouped apart": ((*GROUPED[:2], (2, 1, 7, 4)), None, {"enable_gqa": True}),
    "broadcast": (((2, 3, 5, 8), (3, 7, 8), (2, 1, 7, 8)), None, {}),
}


def tensors_of(case, dtype=torch.float64):
    shapes, mask, options = CASES[case]
    mask = mask if mask is None or mask.dtype is torch.bool else mask.to(dtype)
    return [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)], mask, options


def both(case, dtype=torch.float64):
    """Arguments, the function and the formula."""
    tensors, mask, options = tensors_of(case, dtype)
    names = {"is_causal": "causal", "enable_gqa": "gqa"}
    others = {names.get(name, name): value for name, value in options.items()}
    return (
        tensors,
        lambda *x: scaled_dot_product_attention(*x, mask, P, **options, seed=SEED),
        lambda *x: formula(*x, mask, **others),
    )


# ---- values and gradients ----


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_formula(case):
    """Also where heads lie side by side in memory, as modules make them of one projection, or columns do not."""
    tensors, ours, expected = both(case)
    dy = normal(*expected(*tensors).shape, seed=7)
    wanted = with_gradients(expected, tensors, dy)
    side_by_side = [x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.dim() > 2 else x for x in (*tensors, dy)]
    results = with_gradients(ours, tensors, dy)
    assert_close(results, wanted, torch.float64)
    assert_close(with_gradients(ours, side_by_side[:3], side_by_side[3]), wanted, torch.float64)
    turned = [x.mT.contiguous().mT for x in (*tensors, dy)]
    assert_close(with_gradients(ours, turned[:3], turned[3]), wanted, torch.float64)
    assert_equal(ours(*tensors), results[0])  # where nothing is kept


# Around the borders of tiles (96 queries, 256 keys) and of chunks (480 queries): queries, keys, and what else there is.
LENGTHS = {
    "one query": (1, 300, {}),
    "two keys": (300, 2, {}),
    "below a tile": (95, 255, {"is_causal": True}),
    "a tile": (96, 256, {"is_causal": True}),
    "beyond a tile": (97, 257, {"is_causal": True}),
    "square causal": (512, 512, {"is_causal": True}),
    "tall causal": (600, 258, {"is_causal": True}),
    "wide causal": (255, 700, {"is_causal": True}),
    "below a chunk": (479, 511, {"masked": "bool"}),
    "a chunk": (480, 513, {"masked": "bool"}),
    "beyond a chunk": (481, 300, {"masked": "float"}),
    "long": (1025, 770, {"masked": "float"}),
    "longer": (770, 1100, {"masked": "keys"}),
    "grouped": (260, 520, {"enable_gqa": True}),
    "grouped causal": (520, 520, {"enable_gqa": True, "is_causal": True}),
}


def long_case(case, dtype):
    """Query, key, value, mask and options. Some queries see no key, others see none of the first tile."""
    queries, keys, options = LENGTHS[case]
    options = dict(options)
    masked, heads = options.pop("masked", None), 1 if options.get("enable_gqa") else 2
    tensors = [
        normal(1, h, n, w, dtype=dtype, seed=i)
        for i, (h, n, w) in enumerate([(2, queries, 12), (heads, keys, 12), (heads, keys, 20)])
    ]
    mask = None
    if masked == "keys":
        mask = torch.zeros(1, 1, 1, keys, dtype=dtype)
        mask[..., :300] = NO
    elif masked:
        mask = (
            torch.ones(queries, keys, dtype=torch.bool) if masked == "bool" else normal(2, queries, keys, dtype=dtype)
        )
        mask[..., 3, :], mask[..., 4:9, :260] = (False, False) if masked == "bool" else (NO, NO)
    return tensors, mask, options


@pytest.mark.parametrize("case", LENGTHS)
def test_lengths_around_tiles_equal_the_formula(case):
    for dtype in (torch.float32, torch.float64):
        tensors, mask, options = long_case(case, dtype)
        names = {"is_causal": "causal", "enable_gqa": "gqa"}
        others = {names[name]: value for name, value in options.items()}
        dy = normal(*tensors[0].shape[:3], 20, dtype=dtype, seed=7)
        ours = lambda *x: scaled_dot_product_attention(*x, mask, P, **options, seed=SEED)  # noqa: B023, E731
        wanted = with_gradients(lambda *x: formula(*x, mask, **others), [x.double() for x in tensors], dy)  # noqa: B023
        assert_close(with_gradients(ours, tensors, dy), wanted, dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(), (1, 1), (1, 3), (2, 7)], ids=str)
def test_threads_never_change_a_bit(heads, causal):
    """Also where there are more threads than heads: a head's keys are then shared, and its sums of gradients too."""
    for dtype in (torch.float32, torch.bfloat16):
        of_query = (*heads[:-1], 2 * heads[-1]) if heads else ()
        shapes = (*of_query, 500, 24), (*heads, 530, 24), (*heads, 530, 40), (*of_query, 500, 40)
        *tensors, dy = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            call = lambda *x: scaled_dot_product_attention(*x, None, P, causal, enable_gqa=bool(heads), seed=SEED)  # noqa: E731
            results.append(with_gradients(call, tensors, dy))
        for other in results[1:]:
            for one, expected in zip(other, results[0], strict=True):
                assert_equal(one, expected)


MEMORY = """
import re, torch, fastdrop.torch as fdt
def peak():  # in KiB; that of the module resource begins with what the parent had
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
def step(n):
    query, key, value = (torch.randn(2, 2, 2, n, 16, requires_grad=True) for _ in range(3))
    some = torch.zeros(2, 1, 1, n, 1)
    masks = [(some == 0).expand(2, 1, 1, n, n), some.expand(2, 1, 1, n, n)]
    for options in ({"is_causal": True}, *({"attn_mask": mask} for mask in masks)):
        fdt.scaled_dot_product_attention(query, key, value, dropout_p=0.1, **options).sum().backward()
    with torch.no_grad():
        fdt.scaled_dot_product_attention(query.double(), key.double(), value.double(), masks[1], dropout_p=0.1)
step(256)
before = peak()
step(4096)
print(peak() - before)
"""


@pytest.mark.skipif(
    backends.active_name() not in ("c", "numba") or not sys.platform.startswith("linux"),
    reason="the NumPy backend keeps a head's scores, and Linux counts memory in /proc",
)
def test_memory_grows_with_the_length_alone():
    """Scores of the eight heads would take 512 MiB, a mask of booleans of their shape 128 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < 72 * 1024


@pytest.mark.skipif(backends.active_name() not in ("c", "numba"), reason="the NumPy backend multiplies by all keys")
def test_causal_attention_skips_keys_that_nobody_sees():
    """What is multiplied by 0 there would make all queries NaN."""
    tensors = [normal(2, 600, 8, dtype=torch.float32, seed=i) for i in range(3)]
    for x in tensors[1:]:
        x[:, 512:] = math.nan
    y, dquery, _dkey, _dvalue = with_gradients(
        lambda *x: scaled_dot_product_attention(*x, None, P, True, seed=SEED), tensors, normal(2, 600, 8, seed=7)
    )
    assert not y[:, :480].isnan().any()
    assert not dquery[:, :480].isnan().any()
    assert y[:, 512:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_huge_scores_lose_no_digits(dtype):
    """Also where a mask moves all scores of a row: padding is often masked by the least number and not by -inf."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32  # of the formula too: it rounds such sums as well
    dy, *small = (normal(2, 300, 8, dtype=dtype, seed=i) for i in range(4))
    large = [x * factor for x, factor in zip(small, (300, 100, 1), strict=True)]
    mask = torch.zeros(300, 300, dtype=dtype)
    for row, least in enumerate((torch.finfo(dtype).min, -1e4, -6e4 if dtype is torch.float16 else -1e9)):
        mask[40 * row] = least
    kept = fdt.dropout(torch.ones(2, 300, 300, dtype=wide), P, seed=SEED)

    def formula_rounding(query, key, value, added):
        return (query @ key.mT / 8**0.5 + added.to(wide)).softmax(-1).mul(kept) @ value

    cases = [(small, mask, {torch.float64: 1e-13, torch.float32: 1e-4})]
    if dtype is wide:  # y of 16 bits has rounded what backward takes the sums from
        cases.append((large, mask[:, :1] * 0, {torch.float64: 1e-10, torch.float32: 1e-2}))
    for tensors, added, near in cases:
        ours = lambda *x, added=added: scaled_dot_product_attention(*x, added, P, seed=SEED)  # noqa: E731
        theirs = lambda *x, added=added: formula_rounding(*x, added)  # noqa: E731
        results = with_gradients(ours, tensors, dy)
        wanted = with_gradients(theirs, [x.to(wide) for x in tensors], dy.to(wide))
        for actual, expected in zip(results, wanted, strict=True):
            assert (actual.to(wide) - expected).abs().max() <= near.get(dtype, 3e-2) * max(1.0, expected.abs().max())


def test_gradient_of_any_mask():
    """By the kernel, summed over the axes along which it broadcasts."""
    tensors = [normal(2, 2, *shape, seed=i) for i, shape in enumerate([(4, 5, 3), (2, 7, 3), (2, 7, 6)])]
    dy = normal(2, 2, 4, 5, 6, seed=7)
    for shape in ((7,), (5, 7), (4, 1, 7), (2, 1, 1, 7), (2, 1, 4, 5, 7), (1, 2, 1, 5, 7), (2, 2, 4, 5, 7)):
        given = [*tensors, normal(*shape, seed=5)]
        ours = lambda *x: scaled_dot_product_attention(*x, P, enable_gqa=True, seed=SEED)  # noqa: E731
        assert_close(
            with_gradients(ours, given, dy), with_gradients(lambda *x: formula(*x, gqa=True), given, dy), torch.float64
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_equal_the_formula(dtype):
    for case in ("plain", "causal wide", "bool (B, 1, 1, S)", "float (B, H, L, S)", "grouped"):
        tensors, ours, expected = both(case, dtype)
        dy = normal(*expected(*tensors).shape, dtype=dtype, seed=7)
        results = with_gradients(ours, tensors, dy)
        assert_close(results, with_gradients(expected, [x.double() for x in tensors], dy), dtype)


def test_large_scores_of_float16_stay_finite():
    """Products are float32's."""
    query = torch.full((2, 4, 64), 100.0, dtype=torch.float16)
    y = scaled_dot_product_attention(query, query, query, dropout_p=P, seed=SEED)
    assert_close([y], [formula(query, query, query)], torch.float16)


def test_mask_is_that_of_dropout_with_any_number_of_threads():
    """Of equal scores and a unit matrix of values, attention is its dropped weights."""
    zero, unit = torch.zeros(3, 2, 200, 8), torch.eye(200).expand(3, 2, 200, 200)
    expected = fdt.dropout(torch.ones(3, 2, 200, 200), P, seed=SEED) != 0
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert_equal(scaled_dot_product_attention(zero, zero, unit, dropout_p=P, seed=SEED) != 0, expected)


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
    assert not any(x.any() for x in results)


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


# ---- memory ----


def test_kept_are_the_arguments_the_result_and_two_numbers_for_each_query():
    """And the seed. None of them may be written to before backward."""
    tensors, mask, _ = tensors_of("bool (L, S)", torch.bfloat16)
    tensors, mask = [x.requires_grad_() for x in tensors], mask.clone()
    with saved_tensors() as kept:
        y = scaled_dot_product_attention(*tensors, mask, P)
    new = [t for t in kept if not any(t is x for x in (*tensors, mask, y))]
    assert sorted(t.nbytes for t in new) == [8, 2 * 4 * 2 * 3 * 5]
    for written in (tensors[2], mask, y):
        y = scaled_dot_product_attention(*tensors, mask, P)
        y.sum().backward(retain_graph=True)
        with torch.no_grad():
            (y if written.shape == y.shape else written).zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_of_value_alone_neither_value_nor_the_result_is_kept():
    (query, key, value), ours, expected = both("plain")
    value.requires_grad_()
    with saved_tensors() as kept:
        y = ours(query, key, value)
    assert not [t for t in kept if t is value or t is y]
    assert len(kept) == 4
    (dvalue,) = torch.autograd.grad(y.sin().sum(), value, create_graph=True)
    (theirs,) = torch.autograd.grad(expected(query, key, value).sin().sum(), value, create_graph=True)
    torch.testing.assert_close(dvalue, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(d.square().sum(), value)[0] for d in (dvalue, theirs)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("p", [P, 1.0])
def test_bits_may_be_kept_instead_of_the_seed(p):
    """One for each weight, and nothing else changes."""
    for case in ("plain", "grouped causal", "broadcast"):
        tensors, mask, options = tensors_of(case)
        stored = lambda *x: scaled_dot_product_attention(*x, mask, p, **options, store="bits", seed=SEED)  # noqa: B023, E731
        drawn = lambda *x: scaled_dot_product_attention(*x, mask, p, **options, seed=SEED)  # noqa: B023, E731
        dy = normal(*drawn(*tensors).shape, seed=7)
        expected = with_gradients(drawn, tensors, dy)
        assert_equal(with_gradients(stored, tensors, dy), expected)
        compiled = torch.compile(stored, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(with_gradients(compiled, tensors, dy), expected)
    tensors = [x.requires_grad_() for x in tensors_of("plain")[0]]
    with saved_tensors() as kept:
        y = scaled_dot_product_attention(*tensors, None, p, store="bits")
    new = [t for t in kept if not any(t is x for x in (*tensors, y))]
    assert sorted(t.nbytes for t in new) == [4 * -(-2 * 3 * 5 * 7 // 32), 2 * 8 * 2 * 3 * 5]
    function = lambda *x: scaled_dot_product_attention(*x, None, p, store="bits", seed=SEED)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


# ---- masks that weights share ----

FLAX, DROP_HEAD, BY_QUERY, BY_KEY = (1, 1, None, None), (None, None, 1, 1), (None, 1, None, 1), (1, None, 1, None)
SHARED = {  # a case, and the noise shapes that its mask has
    "plain": (FLAX, DROP_HEAD, BY_QUERY, BY_KEY, (1, 1, 1, 1), (2, 1, 5, None)),
    "causal wide": (FLAX, (None, None, 1, None)),
    "grouped": (FLAX, DROP_HEAD, (None, 1, None, None), BY_KEY),
    "float (L, S)": (BY_KEY, (1, None, None, 1)),
    "without heads": ((1, None), (None, 1)),
    "more batch": ((1, 1, None, None, None), (1, None, None, None, None), (None, 1, 1, 1, None), (None, 1, 1, 1, 1)),
    "broadcast": (FLAX, DROP_HEAD, BY_KEY),
}


def shared_cases(*cases):
    """Arguments, our function and the formula, the latter two under one noise shape after the other."""
    for case in cases or SHARED:
        tensors, mask, options = tensors_of(case)
        others = {{"is_causal": "causal", "enable_gqa": "gqa"}[name]: value for name, value in options.items()}
        for shape in SHARED[case]:
            random = {"seed": SEED, "noise_shape": shape}
            ours = partial(scaled_dot_product_attention, attn_mask=mask, dropout_p=P, **options, **random)
            yield shape, tensors, ours, partial(formula, mask=mask, **others, **random)


def test_shared_masks_equal_the_formula():
    """Of `dropout` of the weights; a head's keys in several parts, whose gradients are summed apart, too."""
    for _, tensors, ours, expected in shared_cases():
        dy = normal(*expected(*tensors).shape, seed=7)
        wanted = with_gradients(expected, tensors, dy)
        results = with_gradients(ours, tensors, dy)
        assert_close(results, wanted, torch.float64)
        stored = with_gradients(partial(ours, store="bits"), tensors, dy)
        assert_equal(stored, results)
    tensors = [normal(2, 2, *s, seed=i) for i, s in enumerate(((100, 8), (1100, 8), (1100, 8)))]
    given, dy = [*tensors, normal(2, 1, 100, 1100, seed=4)], normal(2, 2, 100, 8, seed=7)
    for shape in (FLAX, BY_KEY, (None, 1, None, None)):
        random = {"seed": SEED, "noise_shape": shape}
        results = with_gradients(lambda *x: scaled_dot_product_attention(*x, P, **random), given, dy)  # noqa: B023
        assert_close(results, with_gradients(lambda *x: formula(*x, **random), given, dy), torch.float64)  # noqa: B023


def test_shared_masks_go_the_kernels_way(monkeypatch):
    """But where axes before the heads differ. Words are those of the shared mask."""
    composed, compose = [], attention.compose
    monkeypatch.setattr(attention, "compose", lambda *args: composed.append(args[5]) or compose(*args))
    for _, tensors, ours, _ in shared_cases("plain", "grouped", "more batch"):
        ours(*tensors)
    assert composed == [(1, None, None, None, None), (None, 1, 1, 1, None)]
    tensors = [x.requires_grad_() for x in tensors_of("plain")[0]]
    for shape, own in ((FLAX, [8]), (DROP_HEAD, [4, 8, 8 * 2 * 3 * 5 * 4])):  # the words; a dummy seed and y
        with saved_tensors() as kept:
            y = scaled_dot_product_attention(*tensors, None, P, noise_shape=shape, store="bits")
        new = [t.nbytes for t in kept if not any(t is x for x in (*tensors, y))]
        assert sorted(new) == sorted([*own, 2 * 8 * 2 * 3 * 5])


@pytest.mark.filterwarnings("ignore")
def test_shared_masks_under_derivatives_transforms_and_compilers():
    for shape, tensors, ours, expected in shared_cases("grouped"):
        if shape in (FLAX, DROP_HEAD):
            dy = normal(*expected(*tensors).shape, seed=7)
            compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=shape == FLAX)
            torch.testing.assert_close(with_gradients(compiled, tensors, dy), with_gradients(expected, tensors, dy))
        query, *others = tensors
        slopes = [jvp(lambda x, f=f: f(x, *others), (query,), (query.cos(),)) for f in (ours, expected)]  # noqa: B023
        torch.testing.assert_close(*slopes)
        samples = torch.stack([query, query.sin()])
        mapped = [vmap(lambda x, f=f: f(x, *others), randomness="same")(samples) for f in (ours, expected)]  # noqa: B023
        torch.testing.assert_close(*mapped)
        leaves = [x.requires_grad_() for x in tensors]
        assert torch.autograd.gradgradcheck(ours, leaves, fast_mode=True), shape
    with pytest.raises(Exception, match="mask_shape must have 1 or the full extent"):
        torch.compile(ours, backend="eager", fullgraph=True)(*tensors, noise_shape=(1, 1, 2, None))


@pytest.mark.parametrize(
    ("shape", "match"),
    [((1, 1), "one entry per axis of the weights, whose shape"), ((1, 1, 2, None), "on each axis of the weights")],
)
def test_bad_noise_shapes_are_refused(shape, match):
    for p in (P, 0.0):
        with pytest.raises(ValueError, match=match):
            scaled_dot_product_attention(X, X, X, dropout_p=p, noise_shape=shape)
    with pytest.raises(TypeError, match="noise_shape must be"):
        scaled_dot_product_attention(X, X, X, dropout_p=P, noise_shape=3)


def test_nothing_drops_outside_of_training():
    tensors, mask, _ = tensors_of("bool (L, S)", torch.float32)
    expected, found = F.scaled_dot_product_attention(*tensors, mask), []
    call = lambda **options: scaled_dot_product_attention(*tensors, mask, P, training=False, **options)  # noqa: E731
    assert numbers_drawn(lambda: found.append(call())) == 0
    assert_equal(found[0], expected)
    assert_equal(call(noise_shape=DROP_HEAD), expected)


# ---- derivatives ----


def test_each_argument_may_want_a_gradient_alone():
    for wanted in range(3):
        tensors, ours, expected = both("grouped")
        tensors[wanted].requires_grad_()
        gradients = [torch.autograd.grad(f(*tensors).sin().sum(), tensors[wanted])[0] for f in (ours, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("grouped", [False, True], ids=["own heads", "shared heads"])
def test_gradients_of_any_order(grouped):
    heads = 1 if grouped else 2
    tensors = [normal(h, 3, 2, seed=i).requires_grad_() for i, h in enumerate((2, heads, heads))]
    mask = torch.zeros(3, 3).double()
    mask[1], mask[0, 1] = NO, NO

    def function(*x):
        return scaled_dot_product_attention(*x, mask, P, enable_gqa=grouped, seed=1)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("create_graph", [False, True], ids=["kernel", "composed"])
def test_gradients_where_a_score_is_minus_infinity(create_graph):
    query = torch.tensor([[[1e20, 0.0], [1.0, 0.0]]], requires_grad=True)
    key = torch.tensor([[[-1e20, 0.0], [1.0, 0.0]]], requires_grad=True)
    y = scaled_dot_product_attention(query, key, torch.ones(1, 2, 4), dropout_p=P, seed=2)
    gradients = torch.autograd.grad(y.sum(), (query, key), create_graph=create_graph)
    assert all(x.isfinite().all() for x in gradients)


def test_gradient_that_is_batched_or_checkpointed():
    tensors, ours, _ = both("plain")
    leaves = [x.requires_grad_() for x in tensors]
    y = ours(*leaves)
    vectors = torch.stack([y.detach().cos(), y.detach().sin()])
    single = [torch.autograd.grad(y, leaves, v, retain_graph=True) for v in vectors]
    batched = torch.autograd.grad(y, leaves, vectors, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(batched, tuple(torch.stack(grads) for grads in zip(*single, strict=True)))
    again = checkpoint(ours, *leaves, use_reentrant=False)
    assert_equal(torch.autograd.grad(again, leaves, vectors[0]), single[0])
    checkpoint(ours, *leaves, use_reentrant=True).backward(vectors[0])
    assert_equal(tuple(x.grad for x in leaves), single[0])


def test_mask_may_want_a_gradient():
    tensors, mask, _ = tensors_of("float (B, 1, 1, S)")
    dy = normal(2, 3, 5, 4, seed=7)

    def run(function, name):
        return with_gradients(lambda *x: function(*x[:3], **{name: x[3]}, seed=SEED), [*tensors, mask], dy)

    ours = run(lambda *x, **o: scaled_dot_product_attention(*x, **o, dropout_p=P), "attn_mask")
    assert_close(ours, run(formula, "mask"), torch.float64)
    small = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate([(2, 3, 2)] * 3 + [(3, 1)])]
    function = lambda *x: scaled_dot_product_attention(*x, P, seed=SEED)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, small, fast_mode=True)


def test_float32_mask_beside_16_bits():
    """Its gradient is summed in float32; nothing more is kept for it."""
    tensors = [x.half().requires_grad_() for x in tensors_of("plain")[0]]
    mask = normal(5, 7, dtype=torch.float32).requires_grad_()
    with saved_tensors() as kept:
        y = scaled_dot_product_attention(*tensors, mask, P, seed=SEED)
    new = [t for t in kept if not any(t is x for x in (*tensors, mask))]
    assert sorted(t.nbytes for t in new if t is not y) == [8, 2 * 4 * 30]
    (actual,) = torch.autograd.grad(y, mask, torch.ones_like(y) * 1000)
    double = mask.detach().double().requires_grad_()
    expected = formula(*tensors, double)
    assert_close([y], [expected], torch.float16)
    (expected,) = torch.autograd.grad(expected, double, torch.ones_like(y).double() * 1000)
    assert_close([actual.half()], [expected], torch.float16)
    assert not torch.equal(actual, actual.half().float())


# ---- transforms, modes, subclasses, autocast ----


def test_forward_mode_and_transforms_have_the_same_mask():
    tensors, ours, expected = both("plain")
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
    tensors, ours, expected = both("plain")
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


# ---- compiled ----


def bytes_kept(function, tensors):
    with saved_tensors() as saved:
        function(*[x.detach().requires_grad_() for x in tensors])
    return sum(t.nbytes for t in saved)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "p"), [("float (L, S)", P), ("grouped", torch.tensor(P))], ids=["number", "tensor"])
def test_compiled_equals_eager(case, p):
    """And keeps no more."""
    tensors, mask, options = tensors_of(case)
    function = lambda *x: scaled_dot_product_attention(*x, mask, p, **options)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    dy = normal(*function(*tensors).shape, seed=7)
    torch.testing.assert_close(*(under(3, with_gradients, f, tensors, dy) for f in (compiled, function)))
    of_p = p.nbytes if isinstance(p, torch.Tensor) else 0
    assert bytes_kept(compiled, tensors) == bytes_kept(function, tensors) + of_p


@pytest.mark.filterwarnings("ignore")
def test_torchs_function_compiled_while_enabled_keeps_what_eager_code_does(monkeypatch):
    monkeypatch.setattr(enable, "FEWEST_SCORES", 0)
    tensors, mask = tensors_of("plain", torch.bfloat16)[0], normal(5, 7, dtype=torch.float32)
    function = lambda *x: F.scaled_dot_product_attention(*x, mask, P)  # noqa: E731
    with fdt.enabled():
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert bytes_kept(compiled, tensors) == bytes_kept(function, tensors)


@pytest.mark.filterwarnings("ignore")
def test_lengths_change_without_a_new_graph():
    function = lambda *x: scaled_dot_product_attention(*x, None, P, True)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9, 13):
        tensors = [normal(2, 3, length, 8, seed=i) for i in range(3)]
        results = [under(1, with_gradients, f, tensors, tensors[0].cos()) for f in (compiled, function)]
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert graphs() == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("p", [P, torch.tensor(P)], ids=["number", "tensor"])
def test_ops(p):
    """Schemas, fake kernels, and vmap's rule."""
    overload = "default" if p is P else "tensor"
    op, back = (getattr(getattr(torch.ops.fastdrop, name), overload) for name in ("attention", "attention_backward"))
    tensors, mask, _ = tensors_of("grouped (H, L, S)", torch.float32)
    seed, quick = torch.tensor(SEED), ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, (*tensors, mask, seed, p, False, 0.3, False, False), test_utils=quick)
    torch.library.opcheck(op, (*tensors, mask, seed, p, False, 0.3, True, False, [1, 4, 1, 7]), test_utils=quick)
    y, statistics, _ = op(*tensors, mask, seed, p, False, 0.3, False, True)
    for value, result, wanted in (
        (tensors[2], y, [True, False, True, False]),
        (None, None, [False, False, True, False]),
    ):
        arguments = (y, *tensors[:2], value, mask, result, statistics, seed, p, False, 0.3, False, wanted)
        torch.library.opcheck(back, arguments, test_utils=quick)
        torch.library.opcheck(back, (*arguments, [1, 4, 1, 7]), test_utils=quick)
    mapped = torch.func.vmap(lambda query: op(query, *tensors[1:], mask, seed, p, False, 0.3, False, False)[0])
    assert_equal(mapped(torch.stack([tensors[0]] * 2)), torch.stack([y, y]))
    leaves, added = [x.requires_grad_() for x in tensors], normal(5, 7, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(op, (*leaves, added, seed, p, False, 0.3, True, True), test_utils=quick)


@pytest.mark.skipif(backends.reason("c") is not None, reason="C is not built")
def test_no_memory_is_a_memory_error(monkeypatch):
    """C says so by a number of its own."""
    header = (ROOT / "csrc" / "fastdrop.h").read_text()
    assert int(re.search(r"FD_NO_MEMORY = (-\d+)", header)[1]) == native.NO_MEMORY
    monkeypatch.setattr(native, "attention_forward_at", lambda *args: native.NO_MEMORY, raising=False)
    tensors, ours, _ = both("plain")
    with backends.use_backend("c"), pytest.raises(MemoryError, match="no memory"):
        ours(*tensors)


def test_parts_of_keys_are_whole_tiles():
    kernels = (ROOT / "csrc" / "kernels.h").read_text()
    assert int(re.search(r"ATTENTION_KEYS = (\d+)", kernels)[1]) == attention_kernels.PART_KEYS


# ---- bad input ----

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


def refusal(function, case):
    """The type and the words of an error."""
    arguments, options = REFUSED[case]
    with pytest.raises((RuntimeError, TypeError, IndexError)) as error:
        function(*arguments, **options, dropout_p=P)
    return error.type, str(error.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_refused_in_its_words(case):
    """By its own function while enabled too."""
    torchs, found = refusal(F.scaled_dot_product_attention, case), []
    assert numbers_drawn(lambda: found.append(refusal(scaled_dot_product_attention, case))) == 0
    with fdt.enabled():
        found.append(refusal(F.scaled_dot_product_attention, case))
    assert found == [torchs, torchs]


@pytest.mark.filterwarnings("ignore")
def test_what_eager_code_refuses_is_not_compiled():
    for case in ("dtypes", "complex", "width"):
        (query, key, value), _ = REFUSED[case]
        function = torch.compile(scaled_dot_product_attention, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"(?i)expected|must match|takes real numbers"):
            function(query, key, value, dropout_p=P, seed=SEED)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dropout_p": P, "scale": math.inf}, "scale must be finite, but got inf"),
        ({"dropout_p": -0.1}, "dropout probability has to be between 0 and 1, but got -0.1"),
        ({"dropout_p": math.nan}, "dropout probability has to be between 0 and 1, but got nan"),
        ({"dropout_p": P, "seed": 1, "generator": torch.Generator()}, "seed and generator must not both be given"),
        ({"dropout_p": 0.0, "seed": 1, "generator": torch.Generator()}, "seed and generator must not both be given"),
        ({"dropout_p": P, "seed": -1}, "seed must be from 0"),
        ({"dropout_p": P, "store": "words"}, "store must be"),
        ({"dropout_p": 0.0, "seed": -1}, "seed must be from 0"),
    ],
    ids=["scale", "p", "p NaN", "two sources", "two sources, p = 0", "seed", "store", "seed, p = 0"],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        scaled_dot_product_attention(X, X, X, **options)


def test_what_torch_takes_is_not_computed_to_learn_that(monkeypatch):
    asked, torchs = [], attention._torchs
    monkeypatch.setattr(attention, "_torchs", lambda *args: asked.append(args[0].device.type) or torchs(*args))
    assert scaled_dot_product_attention(X, X[:1], X[:1], dropout_p=P).shape == X.shape
    assert asked == ["meta"]


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

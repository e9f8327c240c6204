"""The fused functions of torch's face: values, gradients, masks, memory, transforms and bad input.

The table `FUSED` gives each function with its formula in torch's own ops. `KINDS` are one for each primitive, for what
functions of one primitive do in the same way.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastdrop.torch as fdt
from fastdrop import backends
from fastdrop.backends import c as native
from fastdrop.core.random import keep_scale, threshold
from fastdrop.torch.ops.norm import NORM
from fastdrop.torch.ops.pointwise import POINTWISE
from fastdrop.torch.ops.softmax import SOFTMAX
from fastdrop.torch.runtime import cuda as cuda_runtime
from fastdrop.torch.runtime import fused_kernels

from ..cases import Log, Named, Wrapped, assert_equal, numbers_drawn, saved_tensors, under, untouched
from .fused_cases import FUSED, SEED, Fused, P, mask_of

# torch's own, when it first loads what forward-mode AD needs
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

NORMS = [name for name in FUSED if "norm" in name]
WITH_RESIDUAL = [name for name in FUSED if "residual" in FUSED[name].axes]
# One of each primitive, and the one that keeps signs
KINDS = (
    "bias_dropout_add",
    "bias_act_dropout relu",
    "swiglu_dropout",
    "dropout_add_layer_norm",
    "softmax_dropout masked",
)


@pytest.fixture(params=FUSED)
def fused(request) -> Fused:
    return FUSED[request.param]


@pytest.fixture(params=KINDS)
def kind(request) -> Fused:
    """One function of each primitive."""
    return FUSED[request.param]


def leaves(tensors):
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


def loss(results):
    """Whose gradient differs from element to element."""
    return sum((y.double().sin() * (i + 1)).sum() for i, y in enumerate(results))


def gradients(function, tensors):
    """Results, and the gradient of their loss by name."""
    tensors = leaves(tensors)
    results = function(tensors)
    loss(results).backward()
    return tuple(y.detach() for y in results), {name: x.grad for name, x in tensors.items()}


def assert_near(actual, expected, dtype, what="result", rounded=None):
    """Within a few roundings, to another dtype if one is named, of the largest number: sums and norms spread their
    error over a row."""
    assert actual.dtype == dtype, what
    bound = 24 * torch.finfo(rounded or dtype).eps * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=bound, msg=lambda text: f"{what}: {text}"
    )


def assert_all_near(actual, expected, dtype=torch.float32):
    """Of results and gradients as `gradients` gives them."""
    for y, wanted in zip(actual[0], expected[0], strict=True):
        assert_near(y, wanted, dtype)
    for name, wanted in expected[1].items():
        assert_near(actual[1][name], wanted, dtype, name)


# ---- values and gradients ----


def test_values_and_gradients(fused):
    """Those of the formula in float64 under `dropout`'s mask."""
    for dtype, store, p in (
        (torch.float32, "bits", P),
        (torch.float64, "seed", P),
        (torch.float16, "seed", P),
        (torch.bfloat16, "bits", P),
        (torch.float32, "seed", 1.0),
    ):
        tensors = fused.tensors(dtype)
        ours = gradients(functools.partial(fused, p=p, store=store), tensors)
        assert_all_near(ours, gradients(functools.partial(fused.reference, p=p), tensors), dtype)
        assert all(y.is_contiguous() for y in ours[0])
        if p == 1.0:
            dropped = [name for name in tensors if name not in ("residual", "weight", "bias")]
            assert not any(ours[1][name].any() for name in dropped)


@pytest.mark.parametrize("name", WITH_RESIDUAL)
def test_wide_residual_beside_16_bits(name):
    """A float32 stream and parameters of any dtype: gradients come in their tensors' own."""
    fused, half = FUSED[name], torch.bfloat16
    tensors = fused.tensors(half, residual=torch.float32, bias=torch.float64, weight=torch.float32)
    results, grads = gradients(fused.reference, tensors)
    ours, our_grads = gradients(fused, tensors)
    assert_near(ours[-1], results[-1], torch.float32)
    norm = len(ours) == 2
    if norm:
        assert_near(ours[0], results[0], half)
    for key, expected in grads.items():
        dtype = tensors[key].dtype
        # Of a norm's result a gradient comes in 16 bits. Sums are float32's.
        rounded = half if norm else torch.promote_types(half, torch.float32) if dtype is not half else half
        assert_near(our_grads[key], expected, dtype, key, rounded)


@pytest.mark.parametrize("create_graph", [False, True], ids=["kernel", "composed"])
def test_sums_over_16_bits_are_float32s(create_graph):
    """Past what float16 holds, and of more digits."""
    x, parameter = torch.zeros(8192, 4, dtype=torch.float16), torch.zeros(4, requires_grad=True)
    x[:, 0] = 1
    kept = mask_of((8192, 4)).sum(0) * keep_scale(threshold(P)) * 20
    for y, expected in (
        (fdt.bias_dropout_add(x, parameter, x, P, seed=SEED), kept),
        (fdt.bias_dropout_add(x, parameter, x.float(), P, seed=SEED), kept),
        (fdt.dropout_add_layer_norm(x, x, bias=parameter, p=P, seed=SEED)[0], torch.full((4,), 8192 * 20.0)),
        (fdt.dropout_add_layer_norm(x, x, input_bias=parameter, p=P, seed=SEED)[1], kept),
    ):
        dy = torch.full_like(y, 20.0)
        (actual,) = torch.autograd.grad(y, parameter, dy, create_graph=create_graph)
        torch.testing.assert_close(actual.detach(), expected.to(torch.float32), rtol=1e-6, atol=0)


def test_gradient_of_a_float32_mask_beside_16_bits():
    """Summed over many rows in float32, and rounded once, as the scores' own is."""
    half = torch.bfloat16
    scores = torch.linspace(-1, 1, 32768).view(16384, 2).to(half).requires_grad_()
    mask = torch.zeros(2, requires_grad=True)
    dy = torch.tensor([40.0, -40.0], dtype=half).expand(16384, 2)
    doubles = [x.detach().double().requires_grad_() for x in (scores, mask)]
    ours, expected = (
        torch.autograd.grad(fdt.softmax_dropout(s, P, 0.3, m, seed=SEED), (s, m), g)
        for s, m, g in ((scores, mask, dy), (*doubles, dy.double()))
    )
    torch.testing.assert_close(ours[1].double(), expected[1], rtol=1e-4, atol=0)
    assert not torch.equal(ours[1], ours[1].to(half).float())
    alone = torch.autograd.grad(fdt.softmax_dropout(scores, P, 0.3, mask.detach(), seed=SEED), scores, dy)
    assert_equal(ours[:1], alone)


def test_nothing_dropped(fused):
    """The same formula, and nothing drawn or kept for a mask."""
    tensors = fused.tensors()
    expected = gradients(functools.partial(fused.reference, p=0.0), tensors)
    relu = "relu" in getattr(fused.function, "keywords", {}).values()  # which keeps the signs
    for p, training in ((P, False), (0.0, True), (1e-11, True)):
        function, ours = functools.partial(fused.bare, p=p, training=training), []
        with saved_tensors() as kept:
            assert numbers_drawn(lambda: ours.extend(gradients(function, tensors))) == 0  # noqa: B023
        assert_all_near(ours, expected)
        assert sum(x.dtype in (torch.int32, torch.int64) for x in kept) == relu


def test_only_what_is_asked_for(fused):
    """A gradient of one input alone is what it is beside the others."""
    tensors = fused.tensors()
    _, grads = gradients(fused, tensors)
    for name in tensors:
        only = tensors | {name: tensors[name].clone().requires_grad_()}
        loss(fused(only)).backward()
        assert_equal(only[name].grad, grads[name])


@pytest.mark.parametrize(
    ("name", "wanted", "made"),
    [
        ("bias_dropout_add", "residual", None),
        ("bias_dropout_add", "input", None),  # dropout's own kernel does it
        ("bias_dropout_add", "bias", ["dx", "sums"]),
        ("swiglu_dropout", "gate", ["dx"]),
        ("dropout_add_layer_norm", "residual", ["dresidual"]),
        ("dropout_add_layer_norm", "weight", ["dx", "sums"]),  # the kernel asks for one of dx and dresidual
        ("dropout_add_layer_norm", "input residual", ["dx", "dresidual"]),
        ("dropout_add_layer_norm", "input_bias", ["dx", "sums"]),
    ],
)
def test_backward_makes_what_is_wanted(monkeypatch, name, wanted, made):
    outputs = {
        "pointwise_backward": (7, ("dx", "dmultiplier", "sums")),
        "norm_backward": (8, ("dx", "dresidual", "sums")),
    }
    run, seen = fused_kernels.run, []

    def watched(primitive, *arguments, **options):
        if primitive in outputs:
            first, names = outputs[primitive]
            seen.append([name for i, name in enumerate(names, first) if arguments[i] is not None])
        run(primitive, *arguments, **options)

    monkeypatch.setattr(fused_kernels, "run", watched)
    tensors = FUSED[name].tensors()
    for each in wanted.split():
        tensors[each].requires_grad_()
    FUSED[name](tensors)[0].sum().backward()
    assert seen == ([] if made is None else [made])


@pytest.mark.parametrize("name", WITH_RESIDUAL)
def test_nothing_is_kept_of_a_mask_for_what_is_not_dropped(name):
    tensors = FUSED[name].tensors()
    for key, x in tensors.items():
        x.requires_grad_(key == "residual" or (name in NORMS and key in ("weight", "bias")))
    with saved_tensors() as kept:
        FUSED[name](tensors)
    assert not [x for x in kept if x.dtype is torch.int32]


def test_gradient_of_residual_is_no_copy():
    tensors = leaves(FUSED["bias_dropout_add"].tensors())
    (y,) = FUSED["bias_dropout_add"](tensors)
    dy = torch.randn_like(y)
    (dresidual,) = torch.autograd.grad(y, tensors["residual"], dy)
    assert dresidual.data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("name", NORMS)
def test_gradient_of_one_of_two_results(name):
    tensors = FUSED[name].tensors()
    for which in (0, 1):
        _, grads = gradients(lambda x: [FUSED[name](x)[which]], tensors)  # noqa: B023
        _, expected = gradients(lambda x: [FUSED[name].reference(x)[which]], tensors)  # noqa: B023
        for key, grad in expected.items():
            if grad is None:
                assert grads[key] is None
            else:
                assert_near(grads[key], grad, torch.float32, key)


def by_position(function, names):
    """A function of tensors by name as one of as many arguments."""
    return lambda *values: function(dict(zip(names, values, strict=True)))


def cubed(function):
    return lambda *values: [y**3 for y in function(*values)]


def test_gradients_match_finite_differences(fused):
    """Reverse and forward, first and second order, batched."""
    tensors = leaves(fused.tensors(torch.float64, (2, 3)))
    function, values = by_position(fused, tensors), list(tensors.values())
    assert torch.autograd.gradcheck(
        function, values, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(
        cubed(function), values, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


def test_second_derivatives_with_other_options(kind):
    for option in ({"store": "seed"}, {"training": False}):
        tensors = leaves(kind.tensors(torch.float64, (2, 3)))
        function = by_position(functools.partial(kind, **option), tensors)
        assert torch.autograd.gradgradcheck(cubed(function), list(tensors.values()), fast_mode=True)


def test_second_derivative_of_one_tensor_in_two_places():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: fdt.swiglu_dropout(x, x, P, seed=SEED), x)
    assert torch.autograd.gradgradcheck(lambda x: fdt.dropout_add_layer_norm(x, x, x[0], p=P, seed=SEED), x)


# ---- the mask, and random state ----


def test_mask_is_that_of_dropout():
    """Bit for bit, whatever gives the seed; and each call takes one number."""
    x = torch.randn(7, 33)
    zero, ones = torch.zeros_like(x), torch.ones_like(x)
    for seed in (5, 2**64 - 1, torch.tensor(7)):
        assert_equal(fdt.dropout_add(x, zero, P, seed=seed), fdt.dropout(x, P, seed=seed) + 0.0)
    generator = torch.Generator().manual_seed(1)
    ours = fdt.dropout_add(x, zero, P, generator=generator), fdt.dropout_add(x, zero, P, generator=generator)
    generator.manual_seed(1)
    assert_equal(ours, (fdt.dropout(x, P, generator=generator), fdt.dropout(x, P, generator=generator)))
    expected = under(2, fdt.dropout, x, 0.999) != 0
    for store, leaf in itertools.product(("bits", "seed"), (ones, ones.clone().requires_grad_())):
        assert_equal(under(2, fdt.dropout_add, leaf, zero, 0.999, store=store) != 0, expected)


def test_random_numbers_taken(fused):
    tensors = fused.tensors()
    for inputs, p in itertools.product((tensors, leaves(tensors)), (P, 1.0)):
        assert numbers_drawn(lambda: fused.bare(inputs, p)) == 1  # noqa: B023
        generator = torch.Generator().manual_seed(1)
        assert numbers_drawn(lambda: fused.bare(inputs, p, generator=generator), generator) == 1  # noqa: B023
        assert numbers_drawn(lambda: fused(inputs, p)) == 0  # noqa: B023


def test_backends_agree(kind, backend):
    """NumPy views where the backend is not C."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = kind.tensors(dtype)
        assert_all_near(gradients(kind, tensors), gradients(kind.reference, tensors), dtype)


# ---- memory ----


def test_bytes_kept(fused):
    """As documented: of new memory and of inputs."""
    dtype = torch.bfloat16
    tensors = leaves(fused.tensors(dtype, (16, 4, 64)))
    n, relu = 16 * 4 * 64, "relu" in getattr(fused.function, "keywords", {}).values()
    size = {"result": n * dtype.itemsize, "statistics": 2 * 4 * 64} | {name: x.nbytes for name, x in tensors.items()}
    for store, mask in (("bits", n // 8), ("seed", n // 8 if relu else 8)):
        with saved_tensors() as kept:
            fused(tensors, store=store)
        assert sum(x.nbytes for x in kept) == mask + sum(size[name] for name in fused.kept)


@pytest.mark.parametrize("name", [name for name in FUSED if FUSED[name].kept and "softmax" not in name])
def test_what_is_kept_must_not_be_written_to(name):
    """Inputs, and the sum of a norm: the gradient would be wrong, and nothing would say so."""
    for kept in set(FUSED[name].kept) - {"statistics"}:  # which nobody but backward has
        tensors = {key: x * 1 for key, x in leaves(FUSED[name].tensors()).items()}
        results = FUSED[name](tensors)
        with torch.no_grad():
            (results[-1] if kept == "result" else tensors[kept]).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            results[0].sum().backward()


def test_without_a_gradient_nothing_is_kept(fused, monkeypatch):
    """Not even by the graph, nor made to be kept; and results are the same."""
    tensors = fused.tensors()
    expected = tuple(y.detach() for y in fused(leaves(tensors)))
    for op in (POINTWISE, NORM, SOFTMAX):

        def watched(call, launch=op.launch):
            assert not call.store_bits
            assert not getattr(call, "keep_probabilities", False)
            return launch(call)

        monkeypatch.setattr(op, "launch", watched)
    with saved_tensors() as kept:
        with torch.no_grad():
            assert_equal(fused(leaves(tensors)), expected)
        assert_equal(fused(tensors), expected)
        with torch.inference_mode():
            assert_equal(fused(fused.tensors()), expected)
    assert not kept


# ---- special numbers, shapes, strides ----


@pytest.mark.parametrize("way", ["kernel", "composed"])
@pytest.mark.parametrize("name", [name for name in FUSED if "softmax" not in name])
def test_dropped_is_0_whatever_it_is(name, way):
    """In results and in gradients, also those of transforms."""
    fused, keep = FUSED[name], mask_of((6, 33))
    tensors = fused.tensors(shape=(6, 33))
    for value in (math.nan, math.inf, -math.inf):
        hidden = {key: tensors[key].masked_fill(~keep, value) for key in ("input", "gate", "up") if key in tensors}
        if way == "kernel":
            results, grads = gradients(fused, tensors | hidden)
        else:
            results, pullback = torch.func.vjp(fused, tensors | hidden)
            (grads,) = pullback(tuple(torch.ones_like(y) for y in results))
        assert all(x.isfinite().all() for x in (*results, *grads.values()))
        assert not any(grads[key][~keep].any() for key in hidden)
        if "residual" not in tensors:
            assert not results[-1][~keep].any()


def test_kept_nan_and_infinity_go_through(fused):
    """A row with one is the formula's."""
    tensors = fused.tensors()
    keep = mask_of(fused.shape).view(-1, fused.shape[-1])
    rows = tensors[fused.data].view(-1, fused.shape[-1])
    rows[3][keep[3]] = math.nan
    rows[5][keep[5]] = math.inf
    with torch.no_grad():
        for actual, expected in zip(fused(tensors), fused.reference(tensors), strict=True):
            assert torch.equal(actual.isnan(), expected.isnan())
            assert torch.equal(actual.isinf(), expected.isinf())


def test_rows_of_nothing_but_minus_infinity_are_0():
    """In the softmax, its gradient and its composed form."""
    scores = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    for function in (
        lambda x: fdt.softmax_dropout(x, P, attn_mask=mask, seed=SEED),
        torch.func.vmap(lambda x: fdt.softmax_dropout(x, 0.0, attn_mask=mask)),
    ):
        (y,), grads = gradients(lambda x: [function(x["scores"])], {"scores": scores})  # noqa: B023
        for result in (y, grads["scores"]):
            assert not result[:, 1].any()
            assert result.isfinite().all()


def test_shapes(fused):
    """A norm's row of one is a difference of equals."""
    for shape in ((5, 1), (0, 7), (2, 0, 3), (3, 0), (1,), (33, 31)):
        if len(shape) == 1 and ("attn_mask" in fused.axes or fused.options.get("causal")):
            shape = (1, *shape)
        tensors = fused.tensors(shape=shape)
        ours, grads = gradients(fused, tensors)
        assert [y.shape for y in ours] == [torch.Size(shape)] * len(ours)
        assert all(grads[name].shape == x.shape for name, x in tensors.items())
        inputs = leaves(tensors)
        composed = torch.autograd.grad(loss(fused(inputs)), list(inputs.values()), create_graph=True)
        assert [x.shape for x in composed] == [x.shape for x in tensors.values()]
        if shape[-1]:
            expected = gradients(fused.reference, tensors)
            torch.testing.assert_close((ours, grads), expected, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_number_without_axes():
    x = torch.tensor(2.0, requires_grad=True)
    y = fdt.dropout_add(x, torch.tensor(1.0), 0.5, seed=1)
    assert_equal(y, 1 + fdt.dropout(x, 0.5, seed=1))
    y.backward()
    assert x.grad in (0.0, 2.0)
    assert fdt.bias_act_dropout(x, None, 0.0).shape == ()


def test_strides(fused):
    """Any, of inputs and of gradients; the mask goes by logical order."""
    tensors = fused.tensors()
    strided = {}
    for name, x in tensors.items():
        spread = torch.empty(*x.shape, 2).select(-1, 0).copy_(x)
        strided[name] = spread.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 3 else spread
        assert not strided[name].is_contiguous()
    results = fused(strided)
    of_input = torch.empty_like(strided[fused.data]).stride()
    for y in results:
        assert y.is_contiguous() if len(results) == 2 else y.stride() == of_input  # a norm's are contiguous
    assert_equal(results, fused(tensors))
    grads = []
    for inputs in (strided, tensors):
        inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        sum(y.sum() for y in fused(inputs)).backward()  # a gradient of stride 0
        grads.append(tuple(x.grad for x in inputs.values()))
    assert_equal(*grads)


@pytest.mark.parametrize(
    "shape",
    [(), (33,), (5, 33), (5, 1), (4, 1, 33), (3, 1, 5, 33), (3, 4, 5, 33), (3, 1, 1, 1), (1, 4, 1, 33)],
    ids=str,
)
def test_attention_masks(shape):
    """Whatever broadcasts, with gradients of its own shape."""

    def ours(tensors, mask=None):
        mask = tensors.get("mask", mask)
        return [fdt.softmax_dropout(tensors["scores"], P, 0.5, mask, True, seed=SEED)]

    def formula(tensors, mask=None):
        mask = tensors.get("mask", mask)
        drop = lambda h: fdt.dropout(h, P, seed=SEED)  # noqa: E731
        return [FUSED["softmax_dropout masked"].formula(tensors["scores"], drop, mask, scale=0.5, causal=True)]

    scores = {"scores": torch.randn(3, 4, 5, 33)}
    for dtype in (torch.float32, torch.float16):
        tensors = scores | {"mask": torch.randn(shape).to(dtype)}
        torch.testing.assert_close(gradients(ours, tensors), gradients(formula, tensors), rtol=1e-3, atol=1e-4)
    mask = torch.rand(shape) < 0.7
    added = torch.zeros(shape).masked_fill(~mask, -math.inf)
    results = gradients(lambda x: ours(x, mask), scores), gradients(lambda x: formula(x, added), scores)
    torch.testing.assert_close(*results)


def test_an_expanded_mask_is_taken_as_it_was(monkeypatch):
    scores, mask = torch.randn(3, 4, 5, 33), torch.randn(3, 1, 1, 33) > -1
    run, seen = fused_kernels.run, []
    monkeypatch.setattr(
        fused_kernels, "run", lambda name, *args, **rest: seen.append(args[2].numel()) or run(name, *args, **rest)
    )
    for dtype in (torch.bool, torch.float16):
        masks = mask.to(dtype), mask.to(dtype).expand(3, 4, 5, 33)
        assert_equal(*(fdt.softmax_dropout(scores, P, 1.0, x, seed=SEED) for x in masks))
    assert seen == [3 * 33] * 4


def test_mask_over_two_outer_axes():
    """Axes before the heads that are not one in the mask's memory."""
    scores, mask = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 1, 4, 5, 6)
    for laid_out in (mask, mask.mT.contiguous().mT):
        y = fdt.softmax_dropout(scores, 0.0, attn_mask=laid_out)
        torch.testing.assert_close(y, torch.softmax(scores + mask, -1))


def test_eps_of_rms_norm():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = (torch.randn(3, 8) * 1e-3).to(dtype)
        normed, _ = fdt.dropout_add_rms_norm(x, None, p=0.0)
        torch.testing.assert_close(normed, F.rms_norm(x, (8,)))


# ---- transforms, modes, tracers, subclasses ----


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(kind, randomness):
    """A seed gives all samples one mask; without one they have that, or one each."""
    stacked = {name: torch.stack([x, x + 1, x * 2]) for name, x in kind.tensors().items()}
    ours = torch.func.vmap(kind)(stacked)
    each = [kind({name: x[i] for name, x in stacked.items()}) for i in range(3)]
    torch.testing.assert_close(ours, tuple(torch.stack(results) for results in zip(*each, strict=True)))
    mapped = torch.func.vmap(lambda x: kind.bare(x)[-1], randomness=randomness)
    same = {name: x[:1].expand(3, *x.shape[1:]) for name, x in stacked.items()}
    first, second, _ = under(1, mapped, same)
    assert torch.equal(first, second) == (randomness == "same")
    if randomness == "same":
        torch.testing.assert_close(first, under(1, lambda: kind.bare({k: x[0] for k, x in same.items()})[-1]))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(kind.bare)(stacked)


def test_function_transforms(fused):
    """grad, jvp, and grads for each sample agree with autograd."""
    tensors = fused.tensors(torch.float64)
    _, grads = gradients(fused, tensors)
    tangents = {name: torch.randn_like(x) for name, x in tensors.items()}
    _, derivative = torch.func.jvp(lambda x: loss(fused(x)), (tensors,), (tangents,))
    torch.testing.assert_close(derivative, sum((grads[name] * tangents[name]).sum() for name in tensors))
    stacked = {name: torch.stack([x, x * 2]) for name, x in tensors.items()}
    each = torch.func.vmap(torch.func.grad(lambda x: loss(fused(x))))(stacked)
    torch.testing.assert_close({name: x[0] for name, x in each.items()}, grads)


def test_gradient_that_is_transformed(kind):
    """Forward in eager code, backward under vmap and forward-mode AD."""
    tensors = leaves(kind.tensors(torch.float64))
    y = kind(tensors)[0]
    vectors = torch.randn(3, *y.shape, dtype=torch.float64)

    def pulled(v):
        return torch.autograd.grad(y, list(tensors.values()), v, retain_graph=True)

    expected = [torch.stack(grads) for grads in zip(*(pulled(v) for v in vectors), strict=True)]
    torch.testing.assert_close(list(torch.func.vmap(pulled)(vectors)), expected)
    with fwAD.dual_level():
        grads = pulled(fwAD.make_dual(vectors[0], vectors[1]))
        torch.testing.assert_close([fwAD.unpack_dual(g).tangent for g in grads], [g[1] for g in expected])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
def test_modes_tracers_and_subclasses(kind):
    tensors = kind.tensors()
    expected = kind(tensors)
    function, values = by_position(kind, tensors), tuple(tensors.values())
    with Log() as log:
        torch.testing.assert_close(kind(tensors), expected)
    assert "fastdrop.forward.default" in log.seen
    for traced in (make_fx(function)(*values), torch.jit.trace(function, values)):
        torch.testing.assert_close(traced(*values), expected)
    with FakeTensorMode() as mode:
        fake = kind({name: mode.from_tensor(x) for name, x in tensors.items()})
    assert [(y.shape, y.dtype) for y in fake] == [(y.shape, y.dtype) for y in expected]
    Named.seen = []
    last = list(tensors)[-1]
    results = kind(tensors | {last: tensors[last].as_subclass(Named)})
    assert all(type(y) is Named for y in results)
    assert Named.seen
    assert_equal(tuple(y.as_subclass(torch.Tensor) for y in results), expected)
    wrapped = kind({name: Wrapped(x) for name, x in tensors.items()})
    torch.testing.assert_close(tuple(y.inner for y in wrapped), expected)


def test_complex_numbers_are_dropped_whole():
    x, residual = (torch.randn(6, 33, dtype=torch.complex64) for _ in range(2))
    bias = torch.randn(33)
    x.requires_grad_()
    torch.testing.assert_close(fdt.dropout_add(x, residual, P, seed=1), residual + fdt.dropout(x, P, seed=1))
    y = fdt.bias_dropout_add(x, bias, residual, P, seed=1)
    torch.testing.assert_close(y, residual + fdt.dropout(x + bias, P, seed=1))
    y.abs().sum().backward()
    assert torch.equal(x.grad != 0, mask_of((6, 33), seed=1))


# ---- CUDA ----


@pytest.fixture
def cuda(monkeypatch):
    """``with cuda():`` makes all tensors CUDA's, and the C kernels its backend, of the same arguments."""
    if native.unavailable() is not None:
        pytest.skip("the C kernels stand in for the GPU's")
    called = []

    def entry(name):
        def call(device, stream, *arguments, seed_at=0, kept_at=0):
            assert (device, stream, kept_at) == (0, 5, 0)
            called.append(name)
            if seed_at:
                at = {"draw_bits_at": 4, "dropout_forward_at": 6}[name]
                arguments = (*arguments[:at], ctypes.c_uint64.from_address(seed_at).value, *arguments[at + 1 :])
            assert getattr(native, name)(1, *arguments) == 0

        return call

    primitives = [f"{what}_{way}_at" for what in ("pointwise", "norm", "softmax") for way in ("forward", "backward")]
    names = ("draw_bits_at", "masked_affine_at", "dropout_forward_at", *primitives)
    backend = SimpleNamespace(**{name: entry(name) for name in names})

    @contextlib.contextmanager
    def playing():
        with monkeypatch.context() as patch:
            patch.setattr(backends, "cuda_backend", lambda: backend)
            patch.setattr(cuda_runtime, "place", lambda x: (0, 5))
            patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
            patch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
            yield called

    return playing


@pytest.mark.parametrize("store", ["bits", "seed"])
def test_cuda_tensors_have_the_same_results(kind, cuda, store):
    tensors, function = kind.tensors(), functools.partial(kind, store=store)
    expected = gradients(function, tensors)
    with cuda() as called:
        actual = gradients(function, tensors)
    assert_equal((*actual[0], *actual[1].values()), (*expected[0], *expected[1].values()))
    assert any(name.endswith("_forward_at") and name != "dropout_forward_at" for name in called)


def test_attention_on_cuda_is_composed(cuda):
    tensors = {name: torch.randn(2, 3, 5, 8) for name in ("query", "key", "value")}

    def attention(x):
        return (fdt.scaled_dot_product_attention(**x, dropout_p=P, seed=SEED),)

    expected = gradients(attention, tensors)
    with cuda() as called:
        torch.testing.assert_close(gradients(attention, tensors), expected)
    assert called == ["draw_bits_at", "softmax_forward_at", "draw_bits_at", "softmax_backward_at"]


# ---- autocast ----


@pytest.mark.parametrize(
    ("dtype", "other", "result"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_autocast_promotes_what_does_not_go_together(dtype, other, result):
    x, residual = (torch.randn(4, 8).to(kind).requires_grad_() for kind in (dtype, other))
    with torch.autocast("cpu", torch.bfloat16):
        y = fdt.dropout_add(x, residual, P, seed=SEED)
        z = fdt.swiglu_dropout(x, residual, P, seed=SEED)
    assert y.dtype is z.dtype is result
    expected = residual.double() + fdt.dropout(x.double(), P, seed=SEED)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    (y.sum() + z.sum()).backward()
    assert (x.grad.dtype, residual.grad.dtype) == (dtype, other)
    if (dtype, other) != (torch.bfloat16, torch.float32):  # which go together without autocast
        with pytest.raises(TypeError, match=rf"residual must have input's dtype, .*{dtype}.*, but got {other}"):
            fdt.dropout_add(x, residual, P)


# ---- bad input ----

X, VECTOR = torch.randn(4, 6), torch.randn(6)
META = torch.empty(4, 6, device="meta")
BAD = (
    (TypeError, "input must be a Tensor, but got float", lambda: fdt.dropout_add(3.0, X)),
    (TypeError, "residual must be a Tensor, but got NoneType", lambda: fdt.dropout_add(X, None)),
    (TypeError, "gate must be a Tensor, but got list", lambda: fdt.swiglu_dropout([1.0], X)),
    (TypeError, "bias must be a Tensor, but got float", lambda: fdt.bias_act_dropout(X, 1.0)),
    (TypeError, "attn_mask must be a Tensor", lambda: fdt.softmax_dropout(X, attn_mask=True)),
    # devices
    (ValueError, "residual must be on cpu, as input is, but got one on meta", lambda: fdt.dropout_add(X, META)),
    (ValueError, "input_bias must be on cpu", lambda: fdt.dropout_add_layer_norm(X, None, input_bias=META[0])),
    # dtypes
    (RuntimeError, "dropout takes .*, but got torch.int64", lambda: fdt.dropout_add(X.long(), X)),
    (RuntimeError, "a norm takes real numbers", lambda: fdt.dropout_add_layer_norm(X.cfloat(), None)),
    (RuntimeError, "gelu takes real numbers", lambda: fdt.bias_act_dropout(X.cfloat(), None)),
    (RuntimeError, "softmax takes real numbers", lambda: fdt.softmax_dropout(X.cfloat())),
    (TypeError, "input's dtype, torch.float32, but got torch.float64", lambda: fdt.dropout_add(X, X.double())),
    (
        TypeError,
        "residual must have input's dtype, torch.float16, or torch.float32, but got torch.bfloat16",
        lambda: fdt.dropout_add_layer_norm(X.half(), X.bfloat16()),
    ),
    (TypeError, "residual must have input's dtype, torch", lambda: fdt.dropout_add(META, META.double())),  # no autocast
    (TypeError, "up must have gate's dtype, torch.float16, but", lambda: fdt.swiglu_dropout(X.half(), X)),
    (TypeError, "bias must be of a float dtype, but got", lambda: fdt.bias_act_dropout(X, VECTOR.int())),
    (TypeError, "attn_mask must be of bool or a float dtype", lambda: fdt.softmax_dropout(X, attn_mask=VECTOR.int())),
    # shapes
    (
        ValueError,
        r"residual must have input's shape, \(4, 6\), as nothing is broadcast, but got \(6,\)",
        lambda: fdt.dropout_add(X, VECTOR),
    ),
    (ValueError, "up must have gate's shape", lambda: fdt.swiglu_dropout(X, X[:2])),
    (
        ValueError,
        r"bias must have an element for each column of input, shape \(6,\), but got \(5,\)",
        lambda: fdt.bias_dropout_add(X, VECTOR[:5], X),
    ),
    (ValueError, "weight must have an element for each column", lambda: fdt.dropout_add_rms_norm(X, None, X)),
    (ValueError, "input must have an axis of columns, but", lambda: fdt.bias_act_dropout(X[0, 0], VECTOR)),
    (ValueError, "input must have an axis of columns", lambda: fdt.dropout_add_layer_norm(X[0, 0], None)),
    (
        ValueError,
        r"attn_mask must broadcast to .*scores.*, \(4, 6\), but got \(3, 6\)",
        lambda: fdt.softmax_dropout(X, attn_mask=X[:3]),
    ),
    (ValueError, "scores must have queries and keys, but got 1", lambda: fdt.softmax_dropout(VECTOR, causal=True)),
    (ValueError, "scores must have keys, but got 0 axes", lambda: fdt.softmax_dropout(X[0, 0])),
    # options
    (ValueError, "activation must be one of None, 'relu'", lambda: fdt.bias_act_dropout(X, None, 0.5, "swish")),
    (ValueError, "approximate must be one of 'none'", lambda: fdt.geglu_dropout(X, X, approximate="quick")),
    (ValueError, "eps must be at least 0, but got -1", lambda: fdt.dropout_add_layer_norm(X, None, eps=-1.0)),
    (TypeError, "eps must be a number", lambda: fdt.dropout_add_rms_norm(X, None, eps="1")),
    (ValueError, "scale must be finite, but got inf", lambda: fdt.softmax_dropout(X, scale=math.inf)),
    (ValueError, "dropout probability has to be between 0 and 1, but", lambda: fdt.dropout_add(X, X, 1.5)),
    (ValueError, "dropout probability has to be between 0 and 1", lambda: fdt.dropout_add(X, X, 1.5, False)),
    (ValueError, "store must be one of 'bits', 'seed', but got", lambda: fdt.softmax_dropout(X, store="bytes")),
    (ValueError, "seed and generator must", lambda: fdt.dropout_add(X, X, seed=1, generator=torch.Generator())),
    (ValueError, "seed must be", lambda: fdt.dropout_add(X, X, training=False, seed=-1)),
    (TypeError, "seed must be an int or a tensor", lambda: fdt.dropout_add(X, X, seed=torch.ones(()))),
)


@pytest.mark.parametrize(("error", "match", "call"), BAD, ids=[match for _, match, _ in BAD])
def test_bad_input(error, match, call):
    untouched(X, call, error, match)

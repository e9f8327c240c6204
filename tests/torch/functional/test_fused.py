"""The fused functions of torch's face: values, gradients, masks, memory, transforms and bad input.

The table `FUSED` gives each function with its formula in torch's own ops.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

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

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NORMS = [name for name in FUSED if "norm" in name]
# One of each primitive, and the one that keeps signs
KINDS = ("bias_dropout_add", "bias_act_dropout relu", "swiglu_dropout", "dropout_add_layer_norm", "softmax_dropout")


@pytest.fixture(autouse=True)
def torch_state():
    with torch.random.fork_rng():
        yield


@pytest.fixture(params=FUSED)
def fused(request) -> Fused:
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
    return [y.detach() for y in results], {name: x.grad for name, x in tensors.items()}


def assert_near(actual, expected, dtype, what="", rounded=None):
    """Within a few roundings, to another dtype if one is named, of the largest number: sums and norms spread their
    error over a row."""
    assert actual.dtype == dtype, what
    bound = 24 * torch.finfo(rounded or dtype).eps * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=bound, msg=lambda text: f"{what}: {text}"
    )


# ---- values and gradients ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(fused, dtype):
    """Those of the formula in float64 under `dropout`'s mask, with either store."""
    tensors = fused.tensors(dtype)
    results, grads = gradients(fused.reference, tensors)
    for store in ("bits", "seed"):
        ours, our_grads = gradients(lambda x: fused(x, store=store), tensors)  # noqa: B023
        for actual, expected in zip(ours, results, strict=True):
            assert actual.is_contiguous()
            assert_near(actual, expected, dtype, "result")
        for name, expected in grads.items():
            assert_near(our_grads[name], expected, dtype, name)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in FUSED if "residual" in FUSED[name].axes])
def test_wide_residual_beside_16_bits(name, half):
    """A float32 stream and parameters of any dtype: gradients come in their tensors' own."""
    fused = FUSED[name]
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


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_a_float32_mask_beside_16_bits(half):
    """Summed over many rows in float32, and rounded once, as the scores' own is."""
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


def test_results_are_the_same_with_and_without_gradient(fused):
    tensors = fused.tensors()
    assert_equal(fused(tensors), tuple(y.detach() for y in fused(leaves(tensors))))
    with torch.inference_mode():
        assert_equal(fused(fused.tensors()), fused(tensors))


def test_nothing_dropped(fused):
    """The same formula, and nothing drawn or kept for a mask."""
    for p, training in ((P, False), (0.0, True), (1e-11, True)):
        assert_nothing_dropped(fused, p, training)


def assert_nothing_dropped(fused, p, training):
    tensors = fused.tensors()
    results, grads = gradients(lambda x: fused.reference(x, 0.0), tensors)
    run = []
    drawn = numbers_drawn(lambda: run.append(gradients(lambda x: fused.bare(x, p, training=training), tensors)))
    assert drawn == 0
    ours, our_grads = run[0]
    for actual, expected in zip(ours, results, strict=True):
        assert_near(actual, expected, torch.float32)
    for name, expected in grads.items():
        assert_near(our_grads[name], expected, torch.float32, name)
    with saved_tensors() as kept:
        fused.bare(leaves(tensors), p, training=training)
    relu = "relu" in getattr(fused.function, "keywords", {}).values()
    assert sum(x.dtype in (torch.int32, torch.int64) for x in kept) == relu


def test_all_dropped(fused):
    tensors = fused.tensors()
    keeps_nothing = {name: x for name, x in tensors.items() if name in ("residual", "weight", "bias")}
    ours, grads = gradients(lambda x: fused(x, 1.0), tensors)
    results, expected = gradients(lambda x: fused.reference(x, 1.0), tensors)
    for actual, reference in zip(ours, results, strict=True):
        assert_near(actual, reference, torch.float32)
    for name, grad in grads.items():
        assert_near(grad, expected[name], torch.float32, name)
        if name not in keeps_nothing:
            assert not grad.any()


def test_only_what_is_asked_for(fused):
    """A gradient of one input alone is what it is beside the others."""
    tensors = fused.tensors()
    _, grads = gradients(fused, tensors)
    for name in tensors:
        only = dict(tensors)
        only[name] = tensors[name].clone().requires_grad_()
        loss(fused(only)).backward()
        assert_equal(only[name].grad, grads[name])


def test_unneeded_gradients_are_not_computed(monkeypatch):
    """None at all for a residual alone; sums only for parameters."""
    fused = FUSED["bias_dropout_add"]
    asked = []
    backward = fused_kernels.pointwise_backward
    monkeypatch.setattr(fused_kernels, "pointwise_backward", lambda *args: asked.append(args[-1]) or backward(*args))
    for name, expected in (("residual", []), ("input", []), ("bias", [(True, False)])):
        tensors = fused.tensors()
        tensors[name].requires_grad_()
        fused(tensors)[0].sum().backward()
        assert asked == expected
        asked.clear()
    gate, up = (x.requires_grad_(name == "gate") for name, x in FUSED["swiglu_dropout"].tensors().items())
    fdt.swiglu_dropout(gate, up).sum().backward()
    assert asked == [(False, False)]


@pytest.mark.parametrize(
    ("wanted", "made"),
    [
        ("input", ["words", "dx"]),
        ("residual", ["dresidual"]),
        ("weight", ["dx", "sums"]),
        ("residual weight bias", ["dresidual", "sums"]),
        ("input residual", ["words", "dx", "dresidual"]),
        ("input_bias", ["words", "dx", "sums"]),
    ],
)
def test_norm_makes_what_is_wanted(monkeypatch, wanted, made):
    """And one of dx and dresidual, which its kernel asks for."""
    fused = FUSED["dropout_add_layer_norm"]
    tensors = fused.tensors()
    for name in wanted.split():
        tensors[name].requires_grad_()
    normed, _ = fused(tensors)
    run, seen = fused_kernels._run, []
    monkeypatch.setattr(fused_kernels, "_run", lambda name, *args: seen.append((name, args)) or run(name, *args))
    normed.sum().backward()
    ((_, arguments),) = (call for call in seen if call[0] == "norm_backward")
    given = dict(zip(("words", "dx", "dresidual", "sums"), arguments[7:11], strict=True))
    assert [name for name, x in given.items() if x is not None] == made


@pytest.mark.parametrize("name", [name for name in FUSED if "residual" in FUSED[name].axes])
def test_nothing_is_kept_of_a_mask_for_what_is_not_dropped(name):
    tensors = FUSED[name].tensors()
    beside = {
        key: x.requires_grad_()
        for key, x in tensors.items()
        if key == "residual" or ("norm" in name and key in ("weight", "bias"))
    }
    with saved_tensors() as kept:
        results = FUSED[name](tensors)
    assert not [x for x in kept if x.dtype is torch.int32]
    loss(results).backward()
    _, expected = gradients(FUSED[name], {key: x.detach() for key, x in tensors.items()})
    for key, x in beside.items():
        assert_equal(x.grad, expected[key])


@pytest.mark.parametrize("name", ["dropout_add", "bias_dropout_add"])
def test_gradient_of_residual_is_no_copy(name):
    tensors = leaves(FUSED[name].tensors())
    (y,) = FUSED[name](tensors)
    dy = torch.randn_like(y)
    (dresidual,) = torch.autograd.grad(y, tensors["residual"], dy)
    assert dresidual.data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_of_two_results(name, which):
    fused = FUSED[name]
    tensors = fused.tensors()
    _, grads = gradients(lambda x: [fused(x)[which]], tensors)
    _, expected = gradients(lambda x: [fused.reference(x)[which]], tensors)
    for key, grad in expected.items():
        if grad is not None:
            assert_near(grads[key], grad, torch.float32, key)
        else:
            assert grads[key] is None


def test_gradients_match_finite_differences(fused):
    """Reverse and forward, first and second order, batched."""
    names, values = zip(*fused.tensors(torch.float64, (2, 2, 3)).items(), strict=True)
    values = [x.requires_grad_() for x in values]

    def function(*values):
        return fused(dict(zip(names, values, strict=True)))

    def cubed(*values):
        return [y**3 for y in function(*values)]

    assert torch.autograd.gradcheck(
        function, values, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(cubed, values, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("option", [{"store": "seed"}, {"training": False}], ids=str)
def test_second_derivatives_with_other_options(name, option):
    fused = FUSED[name]
    names, values = zip(*fused.tensors(torch.float64, (2, 2, 3)).items(), strict=True)

    def cubed(*values):
        return [y**3 for y in fused(dict(zip(names, values, strict=True)), **option)]

    assert torch.autograd.gradgradcheck(cubed, [x.requires_grad_() for x in values])


def test_second_derivative_of_one_tensor_in_two_places():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: fdt.swiglu_dropout(x, x, P, seed=SEED), x)
    assert torch.autograd.gradgradcheck(lambda x: fdt.dropout_add_layer_norm(x, x, x[0], p=P, seed=SEED), x)


# ---- the mask, and random state ----


def test_mask_is_that_of_dropout():
    """Bit for bit, whatever gives the seed; and each call takes one number."""
    x = torch.randn(7, 33)
    zero = torch.zeros_like(x)
    for seed in (5, 2**64 - 1, torch.tensor(7)):
        assert_equal(fdt.dropout_add(x, zero, P, seed=seed), fdt.dropout(x, P, seed=seed) + 0.0)
    generator = torch.Generator().manual_seed(1)
    ours = fdt.dropout_add(x, zero, P, generator=generator), fdt.dropout_add(x, zero, P, generator=generator)
    generator.manual_seed(1)
    assert_equal(ours, (fdt.dropout(x, P, generator=generator), fdt.dropout(x, P, generator=generator)))
    ones = torch.ones_like(x)
    for p in (0.1, 1 / 3, 0.999):
        expected = under(2, fdt.dropout, x, p) != 0
        for store in ("bits", "seed"):
            for x_ in (ones, ones.clone().requires_grad_()):
                assert_equal(under(2, fdt.dropout_add, x_, zero, p, store=store) != 0, expected)


def test_random_numbers_taken(fused):
    tensors = fused.tensors()
    for inputs in (tensors, leaves(tensors)):
        for p in (P, 1.0):
            assert numbers_drawn(lambda: fused.bare(inputs, p)) == 1  # noqa: B023
            generator = torch.Generator().manual_seed(1)
            assert numbers_drawn(lambda: fused.bare(inputs, p, generator=generator), generator) == 1  # noqa: B023
        assert numbers_drawn(lambda: fused(inputs)) == 0  # noqa: B023


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(fused, use_reentrant):
    tensors = fused.tensors()

    def twice(tensors):
        inputs = {name: x * 2 for name, x in tensors.items()}
        return [y * 2 for y in fused.bare(inputs)]

    def checkpointed(tensors):
        def called(*values):
            return tuple(twice(dict(zip(tensors, values, strict=True))))

        return checkpoint(called, *tensors.values(), use_reentrant=use_reentrant)

    assert_equal(*(tuple(under(4, gradients, run, tensors)[1].values()) for run in (twice, checkpointed)))


@pytest.mark.parametrize("name", KINDS)
def test_backends_agree(name, backend):
    """NumPy views where the backend is not C."""
    fused = FUSED[name]
    for dtype in (torch.float32, torch.bfloat16):
        tensors = fused.tensors(dtype)
        results, grads = gradients(fused.reference, tensors)
        ours, our_grads = gradients(fused, tensors)
        for actual, expected in zip((*ours, *our_grads.values()), (*results, *grads.values()), strict=True):
            assert_near(actual, expected, dtype)


# ---- memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_kept(fused, dtype):
    """As documented: of new memory and of inputs."""
    tensors = leaves(fused.tensors(dtype, (16, 4, 64)))
    n, relu = 16 * 4 * 64, "relu" in getattr(fused.function, "keywords", {}).values()
    size = {"result": n * dtype.itemsize, "statistics": 2 * 4 * 64} | {name: x.nbytes for name, x in tensors.items()}
    rest = sum(size[name] for name in fused.kept)
    for store, mask in (("bits", n // 8), ("seed", n // 8 if relu else 8)):
        with saved_tensors() as kept:
            fused(tensors, store=store)
        assert sum(x.nbytes for x in kept) == mask + rest
    if relu:
        assert rest == 0


def test_no_bits_without_gradient(fused, monkeypatch):
    """In a call that nobody differentiates nothing is kept, not even by the graph, nor made to be."""
    for op in (POINTWISE, NORM, SOFTMAX):

        def watched(call, launch=op.launch):
            assert not call.store_bits
            assert not getattr(call, "keep_probabilities", False)
            return launch(call)

        monkeypatch.setattr(op, "launch", watched)
    with torch.no_grad(), saved_tensors() as kept:
        results = fused(leaves(fused.tensors()))
    assert not kept
    assert not any(y.requires_grad for y in results)


def test_saved_tensor_hooks(fused):
    """What hooks move out and back does its part; what they spoil is refused, not read past its end."""
    tensors = fused.tensors()
    _, expected = gradients(fused, tensors)
    inputs = leaves(tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(force=True).copy(), torch.from_numpy):
        results = fused(inputs)
    loss(results).backward()
    assert_equal(tuple(x.grad for x in inputs.values()), tuple(expected.values()))
    inputs = leaves(tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.detach().reshape(-1)[:1].clone()):
        results = fused(inputs)
        with pytest.raises(ValueError, match=r"(words|x|residual_out|probabilities) must be .* but got"):
            loss(results).backward()


@pytest.mark.parametrize("name", NORMS)
def test_sum_must_not_be_written_to(name):
    normed, stream = FUSED[name](leaves(FUSED[name].tensors()))
    stream += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()


# ---- special numbers, shapes, strides ----


@pytest.mark.parametrize("way", ["kernel", "composed"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_dropped_is_0_whatever_it_is(value, way):
    """In results and in gradients, also those of transforms."""
    keep = mask_of((6, 33))

    def run(function, *tensors):
        if way == "kernel":
            tensors = [x.requires_grad_() for x in tensors]
            y = function(*tensors)
            return y, torch.autograd.grad(y, tensors, torch.ones_like(y))
        y, pullback = torch.func.vjp(function, *tensors)
        return y, pullback(torch.ones_like(y))

    for activation in (None, "relu", "gelu", "gelu_tanh", "silu"):
        x = torch.randn(6, 33).masked_fill(~keep, value)
        y, (dx,) = run(lambda x: fdt.bias_act_dropout(x, None, P, activation, seed=SEED), x)  # noqa: B023
        for result in (y, dx):
            assert not result[~keep].any()
            assert result.isfinite().all()
    gate, up = (torch.randn(6, 33).masked_fill(~keep, value) for _ in range(2))
    y, grads = run(lambda gate, up: fdt.swiglu_dropout(gate, up, P, seed=SEED), gate, up)
    for result in (y, *grads):
        assert not result[~keep].any()
        assert result.isfinite().all()
    x, residual = torch.randn(6, 33).masked_fill(~keep, value), torch.randn(6, 33)
    y, (dx, _) = run(lambda x, r: fdt.dropout_add_layer_norm(x, r, p=P, seed=SEED)[0], x, residual)
    assert y.isfinite().all()
    assert not dx[~keep].any()


def test_kept_nan_and_infinity_go_through(fused):
    """A row with one is the formula's."""
    tensors = fused.tensors()
    keep = mask_of(fused.shape)
    row = tensors[fused.data].view(-1, fused.shape[-1])
    row[3][keep.view(-1, fused.shape[-1])[3]] = math.nan
    row[5][keep.view(-1, fused.shape[-1])[5]] = math.inf
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
        leaf = scores.clone().requires_grad_()
        y = function(leaf)
        y.sin().sum().backward()
        assert not y[:, 1].any()
        assert not leaf.grad[:, 1].any()
        assert y.isfinite().all()
        assert leaf.grad.isfinite().all()


def test_shapes(fused):
    for shape in ((5, 1), (0, 7), (2, 0, 3), (3, 0), (1,), (33, 31), (2, 70_001)):
        assert_right_for_shape(fused, shape)


def assert_right_for_shape(fused, shape):
    if len(shape) == 1 and "attn_mask" in fused.axes:
        shape = (1, *shape)
    if fused.options.get("causal") and len(shape) < 2:
        shape = (1, *shape)
    tensors = fused.tensors(shape=shape)
    ours, grads = gradients(fused, tensors)
    if 0 in shape[-1:]:
        assert [y.shape for y in ours] == [torch.Size(shape)] * len(ours)
        assert all(grads[name].shape == x.shape for name, x in tensors.items())
        inputs = leaves(tensors)
        composed = torch.autograd.grad(loss(fused(inputs)), list(inputs.values()), create_graph=True)
        assert [x.shape for x in composed] == [x.shape for x in tensors.values()]
        return
    results, expected = gradients(fused.reference, tensors)
    for actual, reference in zip(ours, results, strict=True):
        assert actual.shape == reference.shape
        # A norm's row of one is a difference of equals.
        torch.testing.assert_close(actual.double(), reference, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        bound = 1e-4 * max(1.0, float(expected[name].abs().max()) if expected[name].numel() else 0.0)
        torch.testing.assert_close(grad.double(), expected[name].double(), rtol=0, atol=bound)


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
        assert_equal(strided[name], x)
    results = fused(strided)
    if len(results) == 1:  # a norm's are contiguous
        assert results[0].stride() == torch.empty_like(next(iter(strided.values()))).stride()
    else:
        assert all(y.is_contiguous() for y in results)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool], ids=str)
def test_attention_masks(shape, dtype):
    """Whatever broadcasts, with gradients of its own shape."""
    scores = torch.randn(3, 4, 5, 33)
    mask = torch.randn(shape).to(dtype) if dtype != torch.bool else torch.rand(shape) < 0.7
    added = torch.zeros(shape).masked_fill(~mask, -math.inf) if dtype == torch.bool else mask.clone()
    inputs, references = [scores.clone().requires_grad_(), mask], [scores.clone().requires_grad_(), added]
    for tensors in (inputs, references):
        if dtype != torch.bool:
            tensors[1].requires_grad_()
    y = fdt.softmax_dropout(inputs[0], P, 0.5, inputs[1], True, seed=SEED)
    hidden = torch.ones(5, 33, dtype=torch.bool).tril().logical_not()
    softmax = torch.softmax((references[0] * 0.5 + references[1]).masked_fill(hidden, -math.inf), -1).nan_to_num(0.0)
    expected = fdt.dropout(softmax, P, seed=SEED)
    torch.testing.assert_close(y, expected)
    for result in (y, expected):
        result.sin().sum().backward()
    torch.testing.assert_close(inputs[0].grad.nan_to_num(0.0), references[0].grad.nan_to_num(0.0))
    if dtype != torch.bool:
        torch.testing.assert_close(inputs[1].grad, references[1].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16], ids=str)
def test_an_expanded_mask_is_taken_as_it_was(monkeypatch, dtype):
    scores, mask = torch.randn(3, 4, 5, 33), (torch.randn(3, 1, 1, 33) > -1).to(dtype)
    run, seen = fused_kernels._run, []
    monkeypatch.setattr(
        fused_kernels, "_run", lambda name, *args, **rest: seen.append(args[2].numel()) or run(name, *args, **rest)
    )
    results = [fdt.softmax_dropout(scores, P, 1.0, x, seed=SEED) for x in (mask, mask.expand(3, 4, 5, 33))]
    assert_equal(*results)
    assert seen == [3 * 33, 3 * 33]


def test_mask_over_two_outer_axes():
    """Axes before the heads that are not one in the mask's memory."""
    scores, mask = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 1, 4, 5, 6)
    torch.testing.assert_close(fdt.softmax_dropout(scores, 0.0, attn_mask=mask), torch.softmax(scores + mask, -1))
    mask = mask.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(fdt.softmax_dropout(scores, 0.0, attn_mask=mask), torch.softmax(scores + mask, -1))


def test_eps_of_rms_norm():
    for dtype in DTYPES:
        x = (torch.randn(3, 8) * 1e-3).to(dtype)
        normed, _ = fdt.dropout_add_rms_norm(x, None, p=0.0)
        torch.testing.assert_close(normed, F.rms_norm(x, (8,)))


# ---- transforms, modes, tracers, subclasses ----


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(fused, randomness):
    """A seed gives all samples one mask; without one they have that, or one each."""
    stacked = {name: torch.stack([x, x + 1, x * 2]) for name, x in fused.tensors().items()}
    ours = torch.func.vmap(fused)(stacked)
    each = [fused({name: x[i] for name, x in stacked.items()}) for i in range(3)]
    torch.testing.assert_close(ours, tuple(torch.stack(results) for results in zip(*each, strict=True)))
    mapped = torch.func.vmap(lambda x: fused.bare(x)[-1], randomness=randomness)
    same = {name: x[:1].expand(3, *x.shape[1:]) for name, x in stacked.items()}
    first, second, _ = under(1, mapped, same)
    assert torch.equal(first, second) == (randomness == "same")
    if randomness == "same":
        torch.testing.assert_close(first, under(1, lambda: fused.bare({k: x[0] for k, x in same.items()})[-1]))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(fused.bare)(stacked)


def test_function_transforms(fused):
    """grad, jvp, and grads for each sample agree with autograd."""
    tensors = fused.tensors(torch.float64)
    _, grads = gradients(fused, tensors)
    by_transform = torch.func.grad(lambda x: loss(fused(x)))(tensors)
    torch.testing.assert_close(by_transform, grads)
    tangents = {name: torch.randn_like(x) for name, x in tensors.items()}
    _, derivative = torch.func.jvp(lambda x: loss(fused(x)), (tensors,), (tangents,))
    torch.testing.assert_close(derivative, sum((grads[name] * tangents[name]).sum() for name in tensors))
    with fwAD.dual_level():
        duals = {name: fwAD.make_dual(x, tangents[name]) for name, x in tensors.items()}
        torch.testing.assert_close(fwAD.unpack_dual(loss(fused(duals))).tangent, derivative)
    stacked = {name: torch.stack([x, x * 2]) for name, x in tensors.items()}
    each = torch.func.vmap(torch.func.grad(lambda x: loss(fused(x))))(stacked)
    torch.testing.assert_close({name: x[0] for name, x in each.items()}, grads)


def test_gradient_that_is_transformed(fused):
    """Forward in eager code, backward under vmap and forward-mode AD."""
    tensors = leaves(fused.tensors(torch.float64))
    y = fused(tensors)[0]
    vectors = torch.randn(3, *y.shape, dtype=torch.float64)

    def pulled(v):
        return torch.autograd.grad(y, list(tensors.values()), v, retain_graph=True)

    expected = [torch.stack(grads) for grads in zip(*(pulled(v) for v in vectors), strict=True)]
    torch.testing.assert_close(list(torch.func.vmap(pulled)(vectors)), expected)
    batched = torch.autograd.grad(y, list(tensors.values()), vectors, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(list(batched), expected)
    with fwAD.dual_level():
        grads = pulled(fwAD.make_dual(vectors[0], vectors[1]))
        torch.testing.assert_close([fwAD.unpack_dual(g).tangent for g in grads], [g[1] for g in expected])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
@pytest.mark.parametrize("name", KINDS)
def test_modes_tracers_and_subclasses(name):
    fused = FUSED[name]
    tensors = fused.tensors()
    expected = fused(tensors)
    with Log() as log:
        torch.testing.assert_close(fused(tensors), expected)
    assert "fastdrop.forward.default" in log.seen
    names = list(tensors)
    traced = make_fx(lambda *values: fused(dict(zip(names, values, strict=True))))(*tensors.values())
    torch.testing.assert_close(traced(*tensors.values()), expected)
    jitted = torch.jit.trace(lambda *values: fused(dict(zip(names, values, strict=True))), tuple(tensors.values()))
    torch.testing.assert_close(jitted(*tensors.values()), expected)
    with FakeTensorMode() as mode:
        fake = fused({name: mode.from_tensor(x) for name, x in tensors.items()})
    assert [(y.shape, y.dtype) for y in fake] == [(y.shape, y.dtype) for y in expected]
    Named.seen = []
    last = {**tensors, names[-1]: tensors[names[-1]].as_subclass(Named)}
    results = fused(last)
    assert all(type(y) is Named for y in results)
    assert_equal(tuple(y.as_subclass(torch.Tensor) for y in results), expected)
    assert len(Named.seen) >= 1
    wrapped = fused({name: Wrapped(x) for name, x in tensors.items()})
    torch.testing.assert_close(tuple(y.inner for y in wrapped), expected)


def test_complex_numbers_are_dropped_whole():
    x, residual, bias = (
        torch.randn(6, 33, dtype=torch.complex64),
        torch.randn(6, 33, dtype=torch.complex64),
        torch.randn(33),
    )
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


@pytest.mark.skipif(native.unavailable() is not None, reason="the C kernels stand in for the GPU's")
@pytest.mark.parametrize("store", ["bits", "seed"])
def test_cuda_tensors_have_the_same_results(fused, cuda, store):
    tensors = fused.tensors()
    expected = gradients(lambda x: fused(x, store=store), tensors)
    with cuda() as called:
        actual = gradients(lambda x: fused(x, store=store), tensors)
    assert_equal((*actual[0], *actual[1].values()), (*expected[0], *expected[1].values()))
    assert any(name.endswith("_forward_at") and name != "dropout_forward_at" for name in called)


@pytest.mark.skipif(native.unavailable() is not None, reason="the C kernels stand in for the GPU's")
def test_attention_on_cuda_is_composed(cuda):
    tensors = {name: torch.randn(2, 3, 5, 8) for name in ("query", "key", "value")}

    def attention(x):
        return (fdt.scaled_dot_product_attention(**x, dropout_p=P, seed=SEED),)

    expected = gradients(attention, tensors)
    with cuda() as called:
        torch.testing.assert_close(gradients(attention, tensors), expected)
    assert called == ["draw_bits_at", "softmax_forward_at", "softmax_backward_at"]


# ---- autocast ----


def test_autocast():
    """A linear layer's 16-bit result beside a float32 stream, a gradient for each in its dtype."""
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        h = F.linear(x, weight)
        y = fdt.bias_dropout_add(h, bias, x, P, seed=SEED)
        normed, stream = fdt.dropout_add_layer_norm(h, y, bias, bias, P, seed=SEED)
        gelu = fdt.bias_act_dropout(h, bias, P, seed=SEED)
    assert [h.dtype, y.dtype, normed.dtype, stream.dtype, gelu.dtype] == [
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]
    expected = x + fdt.dropout(h.float() + bias, P, seed=SEED)
    torch.testing.assert_close(y, expected)
    (normed.sum() + stream.sum() + gelu.sum()).backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in (x, weight, bias))


@pytest.mark.parametrize(
    ("dtypes", "result"),
    [
        (("float32", "bfloat16"), "float32"),
        (("bfloat16", "float16"), "float32"),
        (("float64", "float32"), "float64"),
        (("bfloat16", "float32"), "float32"),
    ],
    ids=str,
)
def test_autocast_promotes_what_does_not_go_together(dtypes, result):
    x, residual = (torch.randn(4, 8).to(getattr(torch, dtype)).requires_grad_() for dtype in dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        y = fdt.dropout_add(x, residual, P, seed=SEED)
        z = fdt.swiglu_dropout(x, residual, P, seed=SEED)
    assert (y.dtype, z.dtype) == (getattr(torch, result),) * 2
    torch.testing.assert_close(
        y.double(), residual.double() + fdt.dropout(x.double(), P, seed=SEED), rtol=1e-6, atol=1e-6
    )
    (y.sum() + z.sum()).backward()
    assert (x.grad.dtype, residual.grad.dtype) == (x.dtype, residual.dtype)
    if dtypes[0] != "bfloat16" or dtypes[1] != "float32":
        with pytest.raises(
            TypeError, match=rf"residual must have input's dtype, .*{dtypes[0]}.*, but got .*{dtypes[1]}"
        ):
            fdt.dropout_add(x, residual, P)


# ---- bad input ----

X, VECTOR = torch.randn(4, 6), torch.randn(6)
BAD = {
    "input no tensor": (lambda: fdt.dropout_add(3.0, X), TypeError, "input must be a Tensor, but got float"),
    "residual no tensor": (lambda: fdt.dropout_add(X, None), TypeError, "residual must be a Tensor, but got NoneType"),
    "gate no tensor": (lambda: fdt.swiglu_dropout([1.0], X), TypeError, "gate must be a Tensor, but got list"),
    "unknown gelu": (
        lambda: fdt.geglu_dropout(X, X, approximate="quick"),
        ValueError,
        "approximate must be one of 'none', 'tanh', but got 'quick'",
    ),
    "integers": (lambda: fdt.dropout_add(X.long(), X), RuntimeError, "dropout takes .*, but got torch.int64"),
    "complex norm": (
        lambda: fdt.dropout_add_layer_norm(X.cfloat(), None),
        RuntimeError,
        "a norm takes real numbers, but got torch.complex64",
    ),
    "complex gelu": (
        lambda: fdt.bias_act_dropout(X.cfloat(), None),
        RuntimeError,
        "gelu takes real numbers, but got torch.complex64",
    ),
    "complex softmax": (lambda: fdt.softmax_dropout(X.cfloat()), RuntimeError, "softmax takes real numbers"),
    "residual of another shape": (
        lambda: fdt.dropout_add(X, VECTOR),
        ValueError,
        r"residual must have input's shape, \(4, 6\), as nothing is broadcast, but got \(6,\)",
    ),
    "residual of another dtype": (
        lambda: fdt.dropout_add(X, X.double()),
        TypeError,
        "residual must have input's dtype, torch.float32, but got torch.float64",
    ),
    "residual of another 16-bit dtype": (
        lambda: fdt.dropout_add_layer_norm(X.half(), X.bfloat16()),
        TypeError,
        "residual must have input's dtype, torch.float16, or torch.float32, but got torch.bfloat16",
    ),
    "residual of another dtype where there is no autocast": (
        lambda: fdt.dropout_add(*(torch.empty(3, dtype=d, device="meta") for d in (torch.float32, torch.float64))),
        TypeError,
        "residual must have input's dtype",
    ),
    "residual elsewhere": (
        lambda: fdt.dropout_add(X, torch.empty(4, 6, device="meta")),
        ValueError,
        "residual must be on cpu, as input is, but got one on meta",
    ),
    "up of another dtype": (
        lambda: fdt.swiglu_dropout(X.half(), X),
        TypeError,
        "up must have gate's dtype, torch.float16, but got torch.float32",
    ),
    "up of another shape": (lambda: fdt.swiglu_dropout(X, X[:2]), ValueError, "up must have gate's shape"),
    "bias of another length": (
        lambda: fdt.bias_dropout_add(X, VECTOR[:5], X),
        ValueError,
        r"bias must have an element for each column of input, shape \(6,\), but got \(5,\)",
    ),
    "bias of integers": (
        lambda: fdt.bias_act_dropout(X, VECTOR.int()),
        TypeError,
        "bias must be of a float dtype, but got torch.int32",
    ),
    "bias that is a number": (lambda: fdt.bias_act_dropout(X, 1.0), TypeError, "bias must be a Tensor, but got float"),
    "bias for a number": (
        lambda: fdt.bias_act_dropout(X[0, 0], VECTOR),
        ValueError,
        "input must have an axis of columns, but got 0 axes",
    ),
    "weight of two axes": (
        lambda: fdt.dropout_add_rms_norm(X, None, X),
        ValueError,
        "weight must have an element for each column",
    ),
    "input_bias elsewhere": (
        lambda: fdt.dropout_add_layer_norm(X, None, input_bias=torch.empty(6, device="meta")),
        ValueError,
        "input_bias must be on cpu",
    ),
    "norm of a number": (lambda: fdt.dropout_add_layer_norm(X[0, 0], None), ValueError, "input must have an axis"),
    "negative eps": (
        lambda: fdt.dropout_add_layer_norm(X, None, eps=-1.0),
        ValueError,
        "eps must be at least 0, but got -1",
    ),
    "eps no number": (lambda: fdt.dropout_add_rms_norm(X, None, eps="1"), TypeError, "eps must be a number"),
    "activation": (
        lambda: fdt.bias_act_dropout(X, None, 0.5, "swish"),
        ValueError,
        "activation must be one of None, 'relu', 'gelu', 'gelu_tanh', 'silu', but got 'swish'",
    ),
    "mask that does not broadcast": (
        lambda: fdt.softmax_dropout(X, attn_mask=torch.ones(3, 6)),
        ValueError,
        r"attn_mask must broadcast to .*scores.*, \(4, 6\), but got \(3, 6\)",
    ),
    "mask of integers": (
        lambda: fdt.softmax_dropout(X, attn_mask=torch.ones(6).int()),
        TypeError,
        "attn_mask must be of bool or a float dtype, but got torch.int32",
    ),
    "mask no tensor": (lambda: fdt.softmax_dropout(X, attn_mask=True), TypeError, "attn_mask must be a Tensor"),
    "causal without queries": (
        lambda: fdt.softmax_dropout(VECTOR, causal=True),
        ValueError,
        "scores must have queries and keys, but got 1 axis",
    ),
    "scores without axes": (lambda: fdt.softmax_dropout(X[0, 0]), ValueError, "scores must have keys, but got 0 axes"),
    "infinite scale": (lambda: fdt.softmax_dropout(X, scale=math.inf), ValueError, "scale must be finite, but got inf"),
    "p above 1": (
        lambda: fdt.dropout_add(X, X, 1.5),
        ValueError,
        "dropout probability has to be between 0 and 1, but got 1.5",
    ),
    "p above 1 in evaluation": (lambda: fdt.dropout_add(X, X, 1.5, False), ValueError, "has to be between 0 and 1"),
    "store": (
        lambda: fdt.softmax_dropout(X, store="bytes"),
        ValueError,
        "store must be one of 'bits', 'seed', but got 'bytes'",
    ),
    "seed and generator": (
        lambda: fdt.dropout_add(X, X, seed=1, generator=torch.Generator()),
        ValueError,
        "seed and generator must not both be given",
    ),
    "negative seed in evaluation": (lambda: fdt.dropout_add(X, X, training=False, seed=-1), ValueError, "seed must be"),
    "seed of floats": (
        lambda: fdt.dropout_add(X, X, seed=torch.ones(())),
        TypeError,
        "seed must be an int or a tensor",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, match = BAD[name]
    untouched(X, call, error, match)

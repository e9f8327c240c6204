"""The fused functions compiled, exported and as ops: one graph, and the values of eager code under the same seed."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch._dynamo.compiled_autograd as compiled_autograd
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..cases import assert_equal, saved_tensors, under
from ..functional.fused_cases import FUSED, SEED, P
from .compiling import compiled, fresh_compiler, graphs, some

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of many kinds
__all__ = ["fresh_compiler"]  # a fixture of every test here

OPS = torch.ops.fastdrop
# One of each op, and the one that keeps signs.
KINDS = (
    "bias_dropout_add",
    "bias_act_dropout relu",
    "swiglu_dropout",
    "dropout_add_layer_norm",
    "softmax_dropout masked",
)


def of_kinds(*quick):
    return pytest.mark.parametrize("name", some(KINDS, quick, "test_compiled_equals_eager"))


def gradients(function, tensors, *arguments):
    """Results and gradients under torch's generator."""
    tensors = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    results = function(tensors, *arguments)
    sum(y.float().sin().sum() for y in results).backward()
    return tuple(y.detach() for y in results), {name: x.grad for name, x in tensors.items()}


def assert_equals_eager(function, ours, tensors, *arguments, seeds=(0, 1)):
    for seed in seeds:
        expected = under(seed, gradients, function, tensors, *arguments)
        actual = under(seed, gradients, ours, tensors, *arguments)
        torch.testing.assert_close(actual, expected)
        for a, e in zip(actual[0], expected[0], strict=True):
            assert torch.equal(a == 0, e == 0)
            assert a.stride() == e.stride()


def step(fused, **options):
    """With something to fuse on both sides."""

    def function(tensors, p=P):
        results = fused.bare({name: x * 1.5 for name, x in tensors.items()}, p, **options)
        return [y * 2 for y in results]

    return function


# ---- values ----


@pytest.mark.parametrize("name", some(FUSED, KINDS, "the cases of the same op"))
def test_compiled_equals_eager(name):
    """And where nothing has a gradient, nothing is kept for one."""
    fused = FUSED[name]
    function = step(fused)
    ours = compiled(function)
    assert_equals_eager(function, ours, fused.tensors())
    assert graphs() == 1
    with torch.no_grad():
        assert_equal(under(1, ours, fused.tensors()), under(1, function, fused.tensors()))


@pytest.mark.slow("test_compiled_equals_eager and test_inductor_equals_eager of test_compile.py")
@pytest.mark.parametrize("name", ["bias_act_dropout gelu", "dropout_add_layer_norm"])
def test_inductor_equals_eager(name):
    function = step(FUSED[name])
    assert_equals_eager(function, compiled(function, "inductor"), FUSED[name].tensors())


@of_kinds("dropout_add_layer_norm")
@pytest.mark.parametrize("option", [{"store": "seed", "seed": 7}, {"training": False}], ids=str)
def test_options_equal_eager(name, option):
    function = step(FUSED[name], **option)
    assert_equals_eager(function, compiled(function), FUSED[name].tensors(), seeds=(0,))


@of_kinds("bias_act_dropout relu")
def test_shapes_and_p_change_without_a_new_graph(name):
    """Symbolic shapes; p as a tensor of any value, 0 and 1 among them."""
    fused = FUSED[name]
    function = step(fused)
    ours = compiled(function, dynamic=True)
    for rows, p in ((3, 0.2), (5, 0.5), (9, 1.0), (4, 0.0)):
        tensors = fused.tensors(shape=(rows, 5, 33))
        expected = under(1, gradients, function, tensors, p)
        torch.testing.assert_close(under(1, gradients, ours, tensors, torch.tensor(p)), expected)
    assert graphs() == 1


@pytest.mark.parametrize("name", KINDS)
def test_compiled_keeps_bits(name):
    """From forward to backward no byte more than eager code does."""
    fused = FUSED[name]

    def kept(function, tensors):
        with saved_tensors() as saved:
            function(tensors)
        return sum(x.nbytes for x in saved)

    for store in ("bits", "seed"):
        tensors = {key: x.requires_grad_() for key, x in fused.tensors(shape=(16, 4, 64)).items()}
        function = compiled(lambda x, store=store: fused.bare(x, store=store))
        function(tensors)
        eager = kept(lambda x, store=store: fused.bare(x, store=store), tensors)
        assert kept(function, tensors) <= eager


def test_bad_input_is_refused_in_eager_words():
    x = torch.randn(4, 6)
    with pytest.raises(Exception, match="activation must be one of"):
        compiled(lambda x: fdt.bias_act_dropout(x, None, activation="swish"))(x)
    with pytest.raises(Exception, match="residual must have"):
        compiled(lambda x: fdt.dropout_add(x, x[:2]))(x)
    with pytest.raises(Exception, match="generator can't be compiled"):
        compiled(lambda x, generator: fdt.dropout_add(x, x, generator=generator))(x, torch.Generator())


# ---- with the rest of torch ----


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x):
        h = fdt.bias_act_dropout(x @ self.up.weight.t(), self.up.bias, P)
        h = h @ self.down.weight.t()
        bias = {"input_bias": self.down.bias}
        normed, _ = fdt.dropout_add_layer_norm(h, x, self.norm.weight, self.norm.bias, P, **bias)
        return normed


def test_block_in_one_graph_under_autocast_and_checkpoint():
    block, x = Block(), torch.randn(8, 16)

    def plain(x):
        return block(block(x))

    def checkpointed(x):
        return checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False)

    def grads(function, autocast):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = under(1, function, x)
        y.float().sin().sum().backward()
        return [y.detach(), *(parameter.grad for parameter in block.parameters())]

    for function in (plain, checkpointed):
        torch.testing.assert_close(grads(compiled(function), False), grads(plain, False))
    with torch.autocast("cpu", torch.bfloat16):  # and what does not go together is promoted
        mixed = compiled(lambda x, y: fdt.dropout_add(x, y, P, seed=SEED))(x, x.bfloat16())
    assert_equal(mixed, fdt.dropout_add(x, x.bfloat16().float(), P, seed=SEED))
    close = {"rtol": 0.05, "atol": 0.05}  # 16-bit products may be ordered otherwise
    torch.testing.assert_close(grads(compiled(plain), True), grads(plain, True), **close)


@of_kinds("dropout_add_layer_norm", "softmax_dropout masked")
def test_transforms_inside_of_a_graph(name):
    """Compiled `grad` and `vmap`."""
    fused = FUSED[name]
    tensors = fused.tensors()

    def grad(tensors):
        return torch.func.grad(lambda x: sum(y.sin().sum() for y in fused(x)))(tensors)

    torch.testing.assert_close(compiled(grad)(tensors), grad(tensors))
    stacked = {key: torch.stack([x, x * 2]) for key, x in tensors.items()}
    mapped = torch.func.vmap(lambda x: fused(x))
    torch.testing.assert_close(compiled(mapped)(stacked), mapped(stacked))


@of_kinds("dropout_add_layer_norm", "softmax_dropout masked")
def test_forward_mode_inside_of_a_graph(name):
    fused = FUSED[name]
    tensors = fused.tensors()
    tangents = {key: x.cos() for key, x in tensors.items()}

    def tangent(tensors, tangents):
        return torch.func.jvp(lambda x: fused(x), (tensors,), (tangents,))[1]

    torch.testing.assert_close(compiled(tangent)(tensors, tangents), tangent(tensors, tangents))


def test_complex_numbers():
    fused = FUSED["bias_dropout_add"]
    function = step(fused)
    tensors = fused.tensors(torch.complex64, bias=torch.float32)

    def grads(function):
        inputs = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        (y,) = under(1, function, inputs)
        y.abs().square().sum().backward()
        return y.detach(), {name: x.grad for name, x in inputs.items()}

    torch.testing.assert_close(grads(compiled(function)), grads(function))


@of_kinds("dropout_add_layer_norm")
def test_compiled_autograd(name):
    fused = FUSED[name]
    function = step(fused)
    ours = compiled(function) if name == "swiglu_dropout" else function
    for seed in range(2):
        expected = under(seed, gradients, function, fused.tensors())
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            actual = under(seed, gradients, ours, fused.tensors())
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["bias_act_dropout gelu", "dropout_add_layer_norm", "softmax_dropout"])
def test_compiled_second_derivative_is_right_or_refused(name):
    fused = FUSED[name]

    def penalty(x, others):
        y = sum((result**3).sum() for result in fused({**others, fused.data: x}))
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        return dx.square().sum()

    others = fused.tensors()
    x = others.pop(fused.data).requires_grad_()
    (expected,) = torch.autograd.grad(penalty(x, others), x)
    try:
        (actual,) = torch.autograd.grad(torch.compile(penalty, backend="aot_eager")(x, others), x)
    except RuntimeError:
        return
    torch.testing.assert_close(actual, expected)


def test_export():
    for training in (True, False):

        class Net(Block):
            def forward(self, x):
                return fdt.bias_dropout_add(x, self.down.bias, x, P, training)  # noqa: B023

        net, x = Net(), torch.randn(4, 16)
        program = torch.export.export(net, (x,))
        assert_equal(under(1, program.module(), x), under(1, net, x))


# ---- the ops themselves ----

SEEDS = {"bits": torch.tensor(SEED), "nothing": None}


def probability(overload):
    return torch.tensor(P, dtype=torch.float64) if overload == "tensor" else P


@pytest.mark.parametrize(("overload", "dtype"), [("default", torch.bfloat16), ("tensor", torch.float32)], ids=str)
def test_opcheck(overload, dtype):
    """Schemas, fake kernels, autograd and compiled graphs of all six, with and without what may be missing."""
    op = {name: getattr(getattr(OPS, name), overload) for name in ("pointwise", "norm", "softmax")}
    back = {name: getattr(getattr(OPS, f"{name}_backward"), overload) for name in op}
    p, seed = probability(overload), torch.tensor(SEED)
    x, other = (torch.randn(4, 3, 10).to(dtype).requires_grad_() for _ in range(2))
    stream, bias = torch.randn(4, 3, 10, requires_grad=True), torch.randn(10, requires_grad=True)
    mask = torch.randn(3, 10, requires_grad=True)
    y = x.detach()
    for arguments in (
        (x, bias, None, stream, seed, p, None, True),
        (x, bias, None, None, seed, p, "relu", True),
        (x, bias, None, None, seed, p, "relu", False),
        (x, None, other, None, seed, p, "silu", False),
        (x.transpose(0, 1), None, None, None, None, p, "gelu", True),
    ):
        torch.library.opcheck(op["pointwise"], arguments)
    words = op["pointwise"](y, None, None, None, seed, p, None, True)[1]
    for arguments in (
        (y, None, None, None, words, p, True, None, dtype, False, False),
        (y, None, None, None, None, p, True, None, dtype, False, False),
        (stream.detach(), None, None, None, seed, p, False, None, dtype, True, False),
        (y, y, bias.detach(), y, words, p, True, "silu", dtype, True, True),
    ):
        torch.library.opcheck(back["pointwise"], arguments)
    for arguments in (
        (x, bias, stream, bias, bias, seed, p, 1e-5, True, True),
        (x, None, None, None, None, None, p, 1e-5, False, True),
    ):
        torch.library.opcheck(op["norm"], arguments)
    vector = bias.detach()
    _, sum, statistics, words = op["norm"](y, vector, stream.detach(), vector, None, seed, p, 1e-5, True, True)
    for arguments in (
        (y, sum, sum, statistics, vector, words, p, True, True, [True] * 5),
        (y, sum, sum, statistics, vector, words, p, True, True, [False, False, False, True, False]),
        (y, None, y, statistics, None, None, p, True, True, [True, True, False, False, False]),
    ):
        torch.library.opcheck(back["norm"], arguments)
    for arguments in (
        (x, mask, seed, p, 0.5, True, True, True),
        (x, None, seed, p, 0.5, False, False, True),
        (x, None, None, p, 0.5, False, True, True),
    ):
        torch.library.opcheck(op["softmax"], arguments)
    _, probabilities, words = op["softmax"](y, None, seed, p, 1.0, False, True, True)
    torch.library.opcheck(back["softmax"], (y, probabilities, words, p, True, 0.5))


def test_derivatives_of_ops():
    """Also of second order, as eager code may call them."""
    seed, x = torch.tensor(SEED), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def pointwise(x, bias):
        return OPS.pointwise(x, bias, None, x, seed, P, "gelu", True)[0] ** 2

    def norm(x, bias):
        return OPS.norm(x, bias, None, bias, bias, seed, P, 1e-5, True, False)[:2]

    def softmax(x, bias):
        return OPS.softmax(x, bias, seed, P, 0.5, False, True, True)[0] ** 2

    def softmax_that_keeps_nothing(x, bias):
        return OPS.softmax(x, bias, seed, P, 0.5, True, False, False)[0] ** 2

    for function in (pointwise, norm, softmax, softmax_that_keeps_nothing):
        assert torch.autograd.gradcheck(function, (x, bias))
        assert torch.autograd.gradgradcheck(function, (x, bias))


def test_gradient_ops_refuse_to_be_differentiated():
    """Instead of no gradient without a word: their derivatives are composed of others."""
    dy = torch.randn(3, 4, requires_grad=True)
    dx, _, _ = OPS.pointwise_backward(dy, None, None, None, torch.tensor(SEED), P, False, None, dy.dtype, False, False)
    with pytest.raises(NotImplementedError, match="backward"):
        dx.sum().backward()


@pytest.mark.parametrize("way", ["kernel", "fake kernel"])
def test_ops_refuse_bad_arguments(way):
    """By name, whoever calls them."""
    x = torch.ones(3, 4, device="cpu" if way == "kernel" else "meta")
    nothing = (None, 0.5)
    for call, error, match in (
        (lambda: OPS.pointwise(x.int(), None, None, None, *nothing, None, True), RuntimeError, "but got torch.int32"),
        (
            lambda: OPS.pointwise(x, None, None, None, *nothing, "swish", True),
            ValueError,
            "activation must be one of .*, but got 'swish'",
        ),
        (
            lambda: OPS.pointwise_backward(x, x, None, None, *nothing, True, "swish", x.dtype, False, False),
            ValueError,
            "activation must be one of",
        ),
        (lambda: OPS.softmax(x.int(), None, *nothing, 1.0, False, True, True), RuntimeError, "but got torch.int32"),
    ):
        with pytest.raises(error, match=match):
            call()
    if way == "kernel":
        with pytest.raises(ValueError, match=r"residual must be torch.float32 of shape \(3, 4\) on cpu, but got"):
            OPS.pointwise(x, None, None, x[:2], *nothing, None, True)
        with pytest.raises(ValueError, match=r"weight must be torch.float32 of shape \(4,\) on cpu, but got"):
            OPS.norm(x, None, None, x[0, :3], None, *nothing, 1e-5, True, True)


def test_ops_under_vmap():
    x = torch.randn(3, 4, 5)

    def function(x):
        return OPS.pointwise(x, None, None, None, torch.tensor(SEED), P, None, True)[0]

    assert_equal(torch.func.vmap(function, in_dims=1)(x), torch.stack([function(x[:, i]) for i in range(4)]))
    assert torch.func.vmap(function)(x[:0]).shape == (0, 4, 5)

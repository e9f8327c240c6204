"""The fused functions compiled: one graph, and the values of eager code under the same seed."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch._dynamo.compiled_autograd as compiled_autograd
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..cases import assert_equal, saved_tensors, under
from ..functional.fused_cases import FUSED, SEED, P
from .compiling import compiled, fresh_compiler, graphs

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of many kinds
__all__ = ["fresh_compiler"]  # a fixture of every test here

NORM, MASKED = "dropout_add_layer_norm", "softmax_dropout masked"
# One of each op, and the one that keeps signs.
KINDS = ("bias_dropout_add", "bias_act_dropout relu", "swiglu_dropout", NORM, MASKED)


def gradients(function, tensors, *arguments):
    """Results and gradients under torch's generator."""
    tensors = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    results = function(tensors, *arguments)
    sum(torch.view_as_real(y.cfloat()).sin().sum() for y in results).backward()
    return tuple(y.detach() for y in results), {name: x.grad for name, x in tensors.items()}


def assert_equals_eager(function, ours, tensors, *arguments, seed=1):
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


@pytest.mark.parametrize("name", KINDS)
def test_compiled_equals_eager(name):
    """From forward to backward the graph keeps no byte more than eager code does. Without gradients it is the same."""
    fused = FUSED[name]
    function = step(fused)
    ours = compiled(function)
    for seed in (0, 1):
        assert_equals_eager(function, ours, fused.tensors(), seed=seed)
    assert graphs() == 1
    sizes = []
    for run in (ours, function):
        with saved_tensors() as kept:
            run({key: x.requires_grad_() for key, x in fused.tensors().items()})
        sizes.append(sum(x.nbytes for x in kept))
    assert 0 < sizes[0] <= sizes[1]
    with torch.no_grad():
        assert_equal(under(1, ours, fused.tensors()), under(1, function, fused.tensors()))


@pytest.mark.parametrize("option", [{"store": "seed", "seed": 7}, {"training": False}], ids=str)
def test_options_equal_eager(option):
    function = step(FUSED[NORM], **option)
    assert_equals_eager(function, compiled(function), FUSED[NORM].tensors())


def test_complex_numbers_equal_eager():
    fused = FUSED["bias_dropout_add"]
    function = step(fused)
    assert_equals_eager(function, compiled(function), fused.tensors(torch.complex64, bias=torch.float32))


def test_shapes_and_p_change_without_a_new_graph():
    """Symbolic shapes; p as a tensor of any value, 0 and 1 among them."""
    fused = FUSED["bias_act_dropout relu"]
    function = step(fused)
    ours = compiled(function, dynamic=True)
    for rows, p in ((3, 0.2), (9, 1.0), (4, 0.0)):
        tensors = fused.tensors(shape=(rows, 5, 33))
        expected = under(1, gradients, function, tensors, p)
        torch.testing.assert_close(under(1, gradients, ours, tensors, torch.tensor(p)), expected)
    assert graphs() == 1


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

    def checkpointed(x):
        return checkpoint(block, x, use_reentrant=False)

    def grads(function, autocast):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = under(1, function, x)
        y.float().sin().sum().backward()
        return [y.detach(), *(parameter.grad for parameter in block.parameters())]

    torch.testing.assert_close(grads(compiled(checkpointed), False), grads(block, False))
    with torch.autocast("cpu", torch.bfloat16):  # and what does not go together is promoted
        mixed = compiled(lambda x, y: fdt.dropout_add(x, y, P, seed=SEED))(x, x.bfloat16())
    assert_equal(mixed, fdt.dropout_add(x, x.bfloat16().float(), P, seed=SEED))
    close = {"rtol": 0.05, "atol": 0.05}  # 16-bit products may be ordered otherwise
    torch.testing.assert_close(grads(compiled(block), True), grads(block, True), **close)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: sum(y.sin().sum() for y in f(x)))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), ({key: y.cos() for key, y in x.items()},))[1],
    "vmap": lambda f, x: torch.func.vmap(f)({key: torch.stack([y, y * 2]) for key, y in x.items()}),
}


@pytest.mark.parametrize(("name", "transform"), [(NORM, "grad"), (NORM, "jvp"), (MASKED, "jvp"), (MASKED, "vmap")])
def test_transforms_inside_of_a_graph(name, transform):
    fused = FUSED[name]

    def function(tensors):
        return TRANSFORMS[transform](lambda x: fused(x), tensors)

    torch.testing.assert_close(compiled(function)(fused.tensors()), function(fused.tensors()))


def test_compiled_autograd():
    function, tensors = step(FUSED[NORM]), FUSED[NORM].tensors()
    expected = under(1, gradients, function, tensors)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        actual = under(1, gradients, function, tensors)
    torch.testing.assert_close(actual, expected)


def test_compiled_second_derivative_is_right_or_refused():
    fused = FUSED[NORM]

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

"""`name_masks` of compiled models: eager code's masks, and one graph for all steps and samples."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt

from ..ops.compiling import compiled, fresh_compiler, graphs  # noqa: F401


class Block(nn.Module):
    """Dropout by fastdrop's module, torch's module and functions, attention; a module is called twice."""

    def __init__(self, again=False):
        super().__init__()
        self.drop, self.theirs, self.again = fdt.Dropout(0.3), nn.Dropout(0.3), again
        self.attend = nn.MultiheadAttention(12, 3, dropout=0.3, batch_first=True)
        self.depth, self.weights = fdt.StochasticDepth(0.5, "batch"), fdt.DropConnect(nn.Linear(12, 12), p=0.3)

    def inside(self, x):
        y = self.attend(x, x, x, need_weights=False)[0]
        return x + self.depth(F.dropout(self.drop(self.theirs(y)), 0.3))

    def forward(self, x):
        x = checkpoint(self.inside, x, use_reentrant=False) if self.again else self.inside(x)
        return self.drop(self.weights(x)) + F.dropout(x, 0.3)


def whole():
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.3), Block(again=True), fdt.Dropout(0.3)).double()


def parts():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), Block()).double()


def results(model, masks, x, step, samples, run=None):
    x = x.clone().requires_grad_()
    model.zero_grad()
    with masks.at(step, samples):
        y = (run or model)(x)
    y.square().sum().backward()
    return y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())


def by_parts(model):
    """One graph of the last layer, of which the hooks are called, and graphs around it."""
    model[2].compile(backend="aot_eager")

    def run(x):
        y = model[1](model[0](x))
        torch._dynamo.graph_break()
        return model[2](y)

    return torch.compile(run, backend="aot_eager")


@pytest.mark.parametrize(("model", "compile_it"), [(whole, compiled), (parts, by_parts)])
@fdt.enabled()
def test_compiled_code_has_eager_codes_masks(model, compile_it):
    eager, ours = model(), model()
    masks, own = fdt.name_masks(eager, 3), fdt.name_masks(ours, 3)
    run, x = compile_it(ours), torch.randn(6, 8, 12, dtype=torch.float64)
    made = None
    for step, samples in enumerate([None, range(6), range(12, 18), range(1, 12, 2), [5, 0, 9, 2, 7, 4]]):
        actual, expected = (
            results(one, names, x, step, samples, call) for one, names, call in ((ours, own, run), (eager, masks, None))
        )
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
        made = made or graphs()
        assert graphs() == made
    with pytest.raises(RuntimeError, match="outside of a block"):
        run(x)
    assert not torch._functorch.config.enable_autograd_cache  # which knows no modules
    own.remove()
    if model is parts:
        torch.manual_seed(0)
        y = run(x)
        torch.manual_seed(0)
        assert torch.equal(run(x), y)  # by torch's generator again
    masks.remove()

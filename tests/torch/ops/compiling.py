"""What the tests of compiled code share; import it after `pytest.importorskip("torch")`."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from ..cases import gradient, under


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Starts with nothing compiled, and without torch's cache of gradients, which another version may have filled."""
    torch.compiler.reset()
    counters.clear()
    with torch.random.fork_rng(), torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch.compiler.reset()


def graphs():
    """How many graphs the compiler has made."""
    return counters["stats"]["unique_graphs"]


def compiled(function, backend="aot_eager", **options):
    """In one graph, or an error."""
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def assert_same(actual, expected):
    """The same elements dropped; the others within the rounding of compiled arithmetic."""
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a == 0, e == 0)
        assert (a.shape, a.stride(), a.dtype) == (e.shape, e.stride(), e.dtype)
        torch.testing.assert_close(a, e, equal_nan=True)


def assert_equals_eager(function, ours, x, *arguments, seeds=(0,)):
    """Output and gradient under each seed of torch's generator; returns the outputs."""
    outputs = []
    for seed in seeds:
        expected = under(seed, gradient, lambda x: function(x, *arguments), x)
        assert_same(under(seed, gradient, lambda x: ours(x, *arguments), x), expected)
        outputs.append(expected[0])
    return outputs

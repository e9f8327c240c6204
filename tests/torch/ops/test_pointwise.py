"""The table of activations that gradients of any order are composed of."""

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F

from fastdrop.core.activations import ACTIVATIONS
from fastdrop.torch.ops import pointwise

OPS = torch.ops.fastdrop


def test_every_activation_has_a_formula():
    assert list(pointwise.FORMULAS) == list(ACTIVATIONS)
    x = torch.randn(50)
    expected = {
        None: x,
        "relu": F.relu(x),
        "gelu": F.gelu(x),
        "gelu_tanh": F.gelu(x, approximate="tanh"),
        "silu": F.silu(x),
    }
    for name in ACTIVATIONS:
        torch.testing.assert_close(pointwise.activated(x, name), expected[name])
        y, _ = OPS.pointwise(x, None, None, None, None, 0.0, name, False)
        torch.testing.assert_close(y, expected[name], rtol=1e-5, atol=1e-6)


def test_an_unknown_activation_is_refused():
    x = torch.randn(5)
    with pytest.raises(KeyError, match="tanh"):
        pointwise.activated(x, "tanh")
    for device in ("cpu", "meta"):
        given = x.to(device)
        with pytest.raises(ValueError, match="activation must be one of"):
            OPS.pointwise(given, None, None, None, None, 0.0, "tanh", False)
        with pytest.raises(ValueError, match="activation must be one of"):
            OPS.pointwise_backward(given, given, None, None, None, 0.0, False, "tanh", x.dtype, False, False)

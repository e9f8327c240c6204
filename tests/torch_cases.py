"""What the tests of torch's face share; import it after `pytest.importorskip("torch")`."""

from __future__ import annotations

import torch


def assert_equal(actual, expected):
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_equal(a, e)
        return
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)

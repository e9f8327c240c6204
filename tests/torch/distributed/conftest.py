"""The processes that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .processes import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Four, which start at the first call."""
    torch = pytest.importorskip("torch")
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    pool = Processes(4, seconds=60)
    yield pool
    pool.stop()

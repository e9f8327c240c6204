"""Keeps torch's generator and number of threads for the tests of torch functions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def torch_state() -> Iterator[None]:
    """Generator and threads are as before afterwards."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)

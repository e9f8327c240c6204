"""Every test of the torch face starts with the same random state, and leaves torch as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def torch_state() -> Iterator[None]:
    """Keeps torch's generator and number of threads; torch's own dropout is torch's again afterwards."""
    torch = pytest.importorskip("torch")
    import fastdrop.torch as fdt

    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
    fdt.disable()

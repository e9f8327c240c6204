"""torch's generator starts each test here alike and is afterwards as it was; torch's dropout is torch's again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def torch_state() -> Iterator[None]:
    torch = pytest.importorskip("torch")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    import fastdrop.torch as fdt

    fdt.disable()

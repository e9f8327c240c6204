"""What the benchmarks of torch share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastdrop.cli.bench import import_torch

from .. import contenders


@pytest.fixture(params=(1, 2), ids=contenders.threads_id)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads for fastdrop and torch."""
    with contenders.threads(request.param, import_torch()):
        yield request.param

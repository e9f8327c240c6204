"""Fixtures: every backend x instruction set that can run here, every dtype, and state left as it was found.

Primitives are tested on each of them. What stands on primitives calls them all alike and is tested on fewer: the NumPy
face on each backend with its best instruction set, torch's on C and NumPy. ``FASTDROP_TEST_EVERYTHING=1`` tests all on
all.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

import fastdrop as fd
from fastdrop.backends import c as native

from .cases import DTYPES, VARIANTS, Dtype, activated

HERE = Path(__file__).parent
collect_ignore = ["c"]  # a C program and what feeds it; `make sanitize` runs them

# No deadline: no test is about time. `variant` lasts for all examples of a test, as it should.
settings.register_profile(
    "fastdrop", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
settings.load_profile("fastdrop")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: arrays beyond 2**31 elements; several GB of memory")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what would only call primitives once more, by the values of `variant` and `backend`."""
    if os.environ.get("FASTDROP_TEST_EVERYTHING") == "1":
        return
    best = f"c-{native.isa()}" if native.unavailable() is None else "c-scalar"
    other = {name for name in VARIANTS if name.startswith("c-")} - {best}
    left_out = []
    for item in items:
        if HERE not in item.path.parents:
            continue
        room, parameters = item.path.relative_to(HERE).parts[0], getattr(getattr(item, "callspec", None), "params", {})
        names = {
            parameters.get(fixture) for fixture in ("variant", "backend") if isinstance(parameters.get(fixture), str)
        }
        repeats = names & {"torch": other | {"numba"}, "arrays": other, "core": other}.get(room, set())
        if repeats:
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def pytest_collection_finish() -> None:
    """No test's garbage collection need look through the tests themselves: they are a million objects."""
    gc.freeze()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The primitives of one backend x instruction set, which is also the active one."""
    with activated(request.param) as module:
        yield module


@pytest.fixture(params=[name for name in VARIANTS if name.startswith("c-")])
def c_variant(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with activated(request.param) as module:
        yield module


@pytest.fixture(params=[name for name in VARIANTS if name != "numpy"])
def compiled(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with activated(request.param) as module:
        yield module


@pytest.fixture(params=["numpy", "numba", "c"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend's name, active with its best instruction set."""
    with activated(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> Dtype:
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is as before afterwards."""
    before = fd.get_num_threads()
    yield
    fd.set_num_threads(before)

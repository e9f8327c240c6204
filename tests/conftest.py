"""The three sizes of the test suite, and fixtures for every backend, instruction set and dtype that can run here.

`make test` leaves out the tests marked ``slow``. `make test-all` (``--tier all``) adds them. `make check`
(``--tier check``) runs at most `FEW` cases of each test, the first case of every test first, and skips what it does not
reach in `CHECK_SECONDS`. Only tests/backends and the C tests run the full product of
backends, instruction sets and dtypes, because everything above calls all primitives in the same way: tests of the NumPy
face use the default backend, except those marked ``every_backend``, and tests of the torch face use C and NumPy.
``FASTDROP_TEST_EVERYTHING=1`` lifts all these limits in any of the three.
"""

from __future__ import annotations

import gc
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

# Several processes of tests share the cores. A thread of torch's that waits by spinning takes one from another process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes that import torch first

import fastdrop as fd
from fastdrop.backends import c as native

from .cases import DTYPES, VARIANTS, Dtype, activated

HERE = Path(__file__).parent
collect_ignore = ["c"]  # C programs; `make test-c` and `make sanitize` run them
EVERYTHING = os.environ.get("FASTDROP_TEST_EVERYTHING") == "1"
FEW = 4  # cases of a test in `make check`
NAMES = {*VARIANTS, *(name.partition("-")[0] for name in VARIANTS)}  # of instruction sets and of backends
CHECK_SECONDS = 40  # from here on: lint and the start of the processes take the rest of its minute
START = time.monotonic()

# No test is about time, so none has a deadline. A fixture such as `variant` lasts for all examples of a test.
health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("all", deadline=None, suppress_health_check=health)
settings.register_profile("test", settings.get_profile("all"), max_examples=40)
settings.register_profile("check", settings.get_profile("all"), max_examples=10)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=("check", "test", "all"), default="test", help="how much of the suite runs")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow(guard): only in `make test-all`; guard names the quicker test of the same")
    config.addinivalue_line("markers", "every_backend: of the tests of the NumPy face, one that runs on each backend")
    config.addinivalue_line("markers", "large: arrays beyond 2**31 elements; several GB of memory")
    settings.load_profile("all" if EVERYTHING else config.getoption("--tier"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what this tier does not run."""
    if EVERYTHING:
        return
    tier = config.getoption("--tier")
    left_out = {
        item for item in items if _repeats_primitives(item) or (tier != "all" and item.get_closest_marker("slow"))
    }
    if tier == "check":
        tests = defaultdict(list)
        for item in items:
            if item not in left_out:
                tests[item.nodeid.partition("[")[0]].append(item)
        turns = {}
        for cases in tests.values():
            few = dict.fromkeys(cases[i * len(cases) // FEW] for i in range(FEW))
            turns.update({case: turn for turn, case in enumerate(few)})
            left_out.update(case for case in cases if case not in few)
        items.sort(key=lambda item: turns.get(item, 0))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if not EVERYTHING and item.config.getoption("--tier") == "check" and time.monotonic() - START > CHECK_SECONDS:
        pytest.skip("not reached within the minute of make check: make test runs it")


def _repeats_primitives(item: pytest.Item) -> bool:
    """Whether an item differs from another only in a backend or instruction set that its room does not test."""
    if HERE not in item.path.parents:
        return False
    room = item.path.relative_to(HERE).parts[0]
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    used = [parameters.get(fixture) for fixture in ("variant", "compiled", "backend")]
    best = f"c-{native.isa()}" if native.unavailable() is None else "numba"
    tested = {best, best.partition("-")[0]}
    if room == "torch":
        tested |= {"numpy"}
    elif room not in ("arrays", "core"):
        return False
    elif item.get_closest_marker("every_backend"):
        tested |= {"numpy", "numba"}
    return any(isinstance(name, str) and name in NAMES - tested for name in used)


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from looking through the collected tests, which are very many objects."""
    gc.freeze()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The primitives of one backend and instruction set, which is also the active one."""
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
    """The name of each backend, which is active with its best instruction set."""
    with activated(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> Dtype:
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts fastdrop's number of threads back."""
    before = fd.get_num_threads()
    yield
    fd.set_num_threads(before)

"""Sets up the CPU benchmarks: which files a run collects, the selftest before it, and the JSON that it leaves.

A run stops when the selftest fails, because the time of a wrong kernel means nothing.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastdrop
from fastdrop import backends
from fastdrop.cli import selftest

# What is collected: plain dropout in NumPy (all, or the speed table alone), in torch, other kinds, fused kernels.
SELECTIONS = {
    "all": "test_dropout.py",
    "quick": "test_dropout.py",
    "torch": "test_torch.py",
    "family": "test_family.py",
    "fused": "test_fused.py",
}
ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", choices=SELECTIONS, default="all", help="all, quick (the speed table), torch, family or fused"
    )
    parser.addoption("--json", type=Path, help="the file for the results")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    chosen = SELECTIONS[config.getoption("--cases")]
    return True if collection_path.name in {*SELECTIONS.values()} - {chosen} else None


def pytest_sessionstart(session: pytest.Session) -> None:
    lines: list[str] = []
    if not session.config.option.collectonly and not selftest.run(print=lines.append):
        pytest.exit("the selftest fails, so nothing is measured:\n" + "\n".join(lines), returncode=1)


@pytest.fixture
def row() -> Iterator[dict[str, Any]]:
    """What the report is to have of a case: a test fills it."""
    found: dict[str, Any] = {}
    yield found
    if "seconds" in found:
        ROWS.append(found)


@pytest.fixture
def threads(request: pytest.FixtureRequest, row: dict[str, Any]) -> Iterator[int]:
    """The number of threads of a case in torch: 1 and 2."""
    from . import contenders

    row["threads"] = request.param
    with contenders.threads(request.param, contenders.import_torch()):
        yield request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", (1, 2), indirect=True, ids=lambda n: f"t{n}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--json")
    if file is None or not ROWS:
        return
    machine = {
        "cpu_name": _cpu_name(), "cpus": os.cpu_count(), "system": platform.system(),
        "python_version": platform.python_version(), "fastdrop": fastdrop.__version__,
        "backends": {name: reason or backends.load(name).describe() for name, reason in backends.reasons().items()},
    }  # fmt: skip
    if importlib.util.find_spec("torch"):
        machine["torch"] = importlib.metadata.version("torch")
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    file.write_text(json.dumps({"machine": machine, "datetime": now, "rows": ROWS}, indent=1) + "\n")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""Sets up the CPU benchmarks: which files a run collects, the selftest before it, what the JSON says of the machine.

A run stops when the selftest fails, because the time of a wrong kernel means nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

import fastdrop
from fastdrop import backends
from fastdrop.backends import memory
from fastdrop.cli import selftest

from . import machine

# What is collected: plain dropout in NumPy (all, or the speed table alone, or over sizes), in torch, other kinds, fused
# kernels, attention, what saves work, masks for many processes.
SELECTIONS = {
    "all": "test_dropout.py",
    "quick": "test_dropout.py",
    "sweep": "test_sweep.py",
    "torch": "test_torch.py",
    "family": "test_family.py",
    "fused": "test_fused.py",
    "attention": "test_attention.py",
    "saving": "test_saving.py",
    "parallel": "test_parallel.py",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", choices=SELECTIONS, default="all", help="which set; quick is all's speed table")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    chosen = SELECTIONS[config.getoption("--cases")]
    return True if collection_path.name in {*SELECTIONS.values()} - {chosen} else None


def pytest_sessionstart(session: pytest.Session) -> None:
    lines: list[str] = []
    if not session.config.option.collectonly and not selftest.run(print=lines.append):
        pytest.exit("the selftest fails, so nothing is measured:\n" + "\n".join(lines), returncode=1)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info["fastdrop"] = fastdrop.__version__
    machine_info["backends"] = {
        name: reason or backends.load(name).describe() for name, reason in backends.reasons().items()
    }
    machine_info["cpu_name"], machine_info["caches"] = machine.cpu_name(), machine.caches()
    machine_info["memory_policy"] = memory.describe()
    if importlib.util.find_spec("torch"):
        machine_info["torch"] = importlib.metadata.version("torch")


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[object], output_json: dict[str, object]
) -> None:
    """Keeps what the report needs: no host's name, no single samples."""
    output_json.pop("commit_info", None)
    output_json["machine_info"].pop("node", None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)

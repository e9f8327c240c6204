"""Benchmarks say nothing of wrong kernels: no run without a passing selftest. The machine goes into the JSON."""

from __future__ import annotations

import platform

import pytest

import fastdrop
from fastdrop import backends
from fastdrop.cli import selftest

SELECTIONS = ("all", "quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", choices=SELECTIONS, default="all", help="all cases, or those of the speed table alone")


def pytest_sessionstart(session: pytest.Session) -> None:
    lines: list[str] = []
    if not session.config.option.collectonly and not selftest.run(print=lines.append):
        pytest.exit("the selftest fails, so nothing is measured:\n" + "\n".join(lines), returncode=1)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info["fastdrop"] = fastdrop.__version__
    machine_info["backends"] = {
        name: reason or backends.load(name).describe() for name, reason in backends.reasons().items()
    }
    machine_info["cpu_name"] = _cpu_name()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[object], output_json: dict[str, object]
) -> None:
    """Keeps what the report needs: no host's name, no single samples."""
    output_json.pop("commit_info", None)
    output_json["machine_info"].pop("node", None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

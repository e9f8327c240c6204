"""Sets up the CPU benchmarks: what is collected, the selftest before a run, what the JSON says of the machine.

A run stops when the selftest fails, because the time of a wrong kernel means nothing. docs/benchmarks.md is the manual.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import fastdrop
from fastdrop import backends
from fastdrop.backends import c as native
from fastdrop.backends import memory
from fastdrop.cli import selftest

from . import machine, pairing


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: a row of the speed table of plain dropout")
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install -e '.[bench]' in fastdrop's folder")
    if (reason := native.unavailable()) and native.installed_elsewhere():
        raise pytest.UsageError(f"the benchmarks would run without C: {reason}")
    pairing.share_of_seconds = float(config.getoption("benchmark_max_time"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    if importlib.util.find_spec("torch"):
        return []
    return [
        "torch is not installed: bench/torch is skipped. pip install -e '.[torch]' in fastdrop's folder installs it"
    ]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Only tests are collected. --doctest-modules would import all modules, and some of them need torch."""
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Each file once: --doctest-modules would collect it a second time, for its docstrings."""
    collected = yield
    return [collector for collector in collected if type(collector) is pytest.Module]


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if config.option.collectonly or not session.items:
        return
    terminal = config.pluginmanager.getplugin("terminalreporter")

    def show(line: str) -> None:
        terminal.write_line(line)
        terminal.flush()

    show("selftest: wrong kernels are not timed")
    numba = any("numba" in item.name for item in session.items)
    if not selftest.run(print=show, numba=numba):
        pytest.exit("the selftest fails, so nothing is measured", returncode=1)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["cpu"] = {name: machine_info["cpu"].get(name) for name in ("count", "arch", "brand_raw")}  # no clock
    machine_info["fastdrop"] = fastdrop.__version__
    machine_info["backends"] = {
        name: reason or backends.load(name).describe() for name, reason in backends.reasons().items()
    }
    machine_info["cpu_name"], machine_info["caches"] = machine.cpu_name(), machine.caches()
    machine_info["memory_policy"] = memory.describe()
    if importlib.util.find_spec("torch"):
        machine_info["torch"] = importlib.metadata.version("torch")


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_benchmark_compare_machine_info(
    benchmarksession: Any, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Says what differs. pytest-benchmark, which comes next, would print all that it knows of both machines."""
    saved, here = compared_benchmark["machine_info"], json.loads(json.dumps(machine_info, default=str))
    names = [name for name in here if name != "node" and here[name] != saved.get(name)]
    differ = [f"{name}: {saved.get(name)} there, {here[name]} here" for name in names]
    if differ:
        benchmarksession.logger.warning("the run to compare with is of something else: " + "; ".join(differ))
    compared_benchmark["machine_info"] = machine_info


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Keeps the host's name out, and single samples unless --benchmark-save-data asks for them."""
    output_json["machine_info"].pop("node", None)
    for benchmark in [] if config.getoption("benchmark_save_data") else output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)

"""``fastdrop info``: what is installed, which backend runs and why.

Decides nothing and imports nothing that fastdrop does not need: versions come from package metadata, reasons from the
registry. It must work where nothing else does, so a wrong environment variable is part of the report.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

from .. import __version__, backends
from ..backends import memory
from ..core.installing import how_to_install

HELP = "versions, backends and why each is or isn't used, instruction set, threads, memory policy"
DESCRIPTION = (
    "Shows versions, the backends and why each one is or isn't used, instruction sets, threads and environment."
)

PACKAGES = {  # distribution: what it is good for
    "numpy": "",
    "numba": f"Numba backend: {how_to_install('numba')}",
    "numba-cuda": f"arrays on a GPU: {how_to_install('cuda')}",
    "torch": f"fastdrop.torch: {how_to_install('torch')}",
    "ml_dtypes": "bfloat16 arrays: pip install ml_dtypes",
}
VARIABLES = ("FASTDROP_BACKEND", "FASTDROP_ISA", "FASTDROP_NUM_THREADS", memory.VARIABLE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    rows = [("fastdrop", __version__)]
    rows.append(("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"))
    rows += [(package, version(package) or _missing(use)) for package, use in PACKAGES.items()]
    _print_section("Versions", rows)
    _print_section("Environment", [(name, os.environ.get(name, "not set")) for name in VARIABLES])
    try:
        _print_section("Backends (* in use)", _backend_rows())
        _print_section("In use", _in_use_rows())
    except (ValueError, RuntimeError) as error:  # a variable asks for what can't be had
        print(f"Error\n  {error}")
        return 1
    return 0


def version(package: str) -> str | None:
    """A distribution's version without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _missing(use: str) -> str:
    return f"not installed ({use})"


def _backend_rows() -> list[tuple[str, str]]:
    taken = backends.active_name()
    why = dict(line.split(": ", 1) for line in backends.explain().splitlines())
    return [(("* " if name == taken else "  ") + name, why[name]) for name in backends.FILES]


def _in_use_rows() -> list[tuple[str, str]]:
    rows = [("backend", backends.active().describe())]
    if backends.reasons()["c"] is None:
        native = backends.load("c")
        rows.append(("C instruction set", f"{native.isa()} (usable here: {', '.join(native.usable_isas())})"))
    rows.append(("memory policy", memory.describe()))
    rows.append(("threads", str(backends.get_num_threads())))
    return rows


def _print_section(title: str, rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, text in rows:
        print(f"  {name:{width}}  {text}")
    print()

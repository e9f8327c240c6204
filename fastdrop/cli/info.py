"""``fastdrop info``: what is installed, which backend runs and why.

Decides nothing and imports nothing that fastdrop does not need: versions come from package metadata, reasons from the
registry. It must work where nothing else does, so a wrong environment variable is part of the report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import textwrap
from importlib import metadata
from typing import Any

from .. import __version__, backends
from ..backends import memory
from ..core.installing import how_to_install
from ..integrations import INTEGRATIONS

HELP = "show versions, which backend runs and why, and what else could be installed"
DESCRIPTION = (
    "Shows the versions, the environment variables that fastdrop reads, each backend and why it is or isn't used, the "
    "instruction set, the threads, the memory policy, and the libraries that fastdrop has integrations for. Paste it "
    "into an issue."
)
EPILOG = """examples:
  fastdrop info           for people
  fastdrop info --json    for scripts; the keys stay the same

exit codes:
  0  done
  1  an environment variable asks for what can't be had; the report says so
  2  wrong usage
  130  interrupted
"""

PACKAGES = {  # distribution: what it is good for
    "numpy": "",
    "numba": f"Numba backend: {how_to_install('numba')}",
    "numba-cuda": f"arrays on a GPU: {how_to_install('cuda')}",
    "torch": f"fastdrop.torch: {how_to_install('torch')}",
    "ml_dtypes": "bfloat16 arrays: pip install ml_dtypes",
}
VARIABLES = ("FASTDROP_BACKEND", "FASTDROP_ISA", "FASTDROP_NUM_THREADS", memory.VARIABLE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def main(args: argparse.Namespace) -> int:
    found = collect()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 1 if found["error"] else 0


def collect() -> dict[str, Any]:
    """All that is reported. The keys are documented in docs/command_line.md."""
    found: dict[str, Any] = {
        "fastdrop": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {package: version(package) for package in PACKAGES},
        "integrations": {module: _first_installed(distributions) for module, distributions in INTEGRATIONS.items()},
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "backends": {},
        "backend": None,
        "instruction_set": None,
        "instruction_sets": [],
        "memory_policy": None,
        "threads": None,
        "error": None,
    }
    try:
        found.update(_running())
    except (ValueError, RuntimeError) as error:  # a variable asks for what can't be had
        found["error"] = str(error)
    return found


def version(package: str) -> str | None:
    """A distribution's version without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_installed(distributions: tuple[str, ...]) -> dict[str, str | None]:
    """The first that is installed; the first of all if none is."""
    name = next((name for name in distributions if version(name)), distributions[0])
    return {"distribution": name, "version": version(name)}


def _running() -> dict[str, Any]:
    """What would run now."""
    active = backends.active_name()
    why = dict(line.split(": ", 1) for line in backends.explain().splitlines())
    native = backends.load("c") if backends.reasons()["c"] is None else None
    return {
        "backends": {name: {"used": name == active, "why": why[name]} for name in backends.FILES},
        "backend": backends.load(active).describe(),
        "instruction_set": native and native.isa(),
        "instruction_sets": list(native.usable_isas()) if native else [],
        "memory_policy": memory.describe(),
        "threads": backends.get_num_threads(),
    }


def _print(found: dict[str, Any]) -> None:
    rows = [("fastdrop", found["fastdrop"]), ("Python", f"{found['python']}, {found['platform']}")]
    rows += [(name, its or f"not installed ({PACKAGES[name]})") for name, its in found["packages"].items()]
    _print_section("Versions", rows)
    _print_section("Integrations", [_integration(*entry) for entry in found["integrations"].items()])
    _print_section("Environment", [(name, its or "not set") for name, its in found["environment"].items()])
    if found["error"]:
        print(f"Error\n  {found['error']}")
        return
    backend_rows = [(("* " if its["used"] else "  ") + name, its["why"]) for name, its in found["backends"].items()]
    _print_section("Backends (* in use)", backend_rows)
    rows = [("backend", found["backend"])]
    if found["instruction_set"]:
        usable = ", ".join(found["instruction_sets"])
        rows.append(("C instruction set", f"{found['instruction_set']} (usable here: {usable})"))
    rows += [("memory policy", found["memory_policy"]), ("threads", str(found["threads"]))]
    _print_section("In use", rows)


def _integration(module: str, its: dict[str, str | None]) -> tuple[str, str]:
    distribution, installed = its["distribution"], its["version"]
    text = f"{distribution} {installed}" if installed else f"not installed (pip install {distribution})"
    return module, text


def _print_section(title: str, rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for name, text in rows:
        start = f"  {name:{width}}  "
        print(textwrap.fill(text, max(columns, 60), initial_indent=start, subsequent_indent=" " * len(start)))
    print()

"""Runs everything that needs a GPU, by one command: `python bench/gpu.py [--output FOLDER] [--quick]`.

It runs the tests that need GPU 0, and times fastdrop there beside a copy of memory, torch's dropout, torch.compile's
and a seeded one in Triton. It takes under eight minutes, prints a table last, and leaves gpu-NAME.json and gpu-NAME.md
in the folder. It needs torch with CUDA, numba-cuda and pytest, and no build of this package. A failing section does not
stop the others.

The fused kernels have a run of their own, as long: ``--sections build,suite,fused`` tests and times each, forward and
backward, beside a copy of memory and torch's formula, eager and compiled.

``--dry-run`` runs the sections on the CPU, with tiny tensors and no tests. It shows that the script runs, and nothing
else. Without ``--output`` it leaves no files.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import build, report, timing
from .processes import ROOT, Item, Task, failed, one_line, run_for, run_items, run_section

TOTAL_SECONDS, QUICK_SECONDS = 450.0, 200.0
NO_GPU = 2  # exit code
GPU_TESTS = ("tests/backends/cuda/test_gpu.py", "tests/backends/cuda/test_gpu_torch.py")
PACKAGES = ("fastdrop", "torch", "triton", "numba", "numba-cuda", "cuda-bindings", "nvidia-nvjitlink", "numpy")


# ---- sections that time nothing ----


def describe(task: Task) -> dict[str, Any]:
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    versions["CUDA of torch"] = str(task.machine.torch.version.cuda)
    return {**task.machine.describe(), "system": platform.platform(), "cpus": os.cpu_count(), "versions": versions}


def run_tests(task: Task) -> dict[str, Any]:
    if task.dry_run:
        return {"summary": "no tests in a dry run"}
    # Without the other tests' conftest.py and options, which may need what isn't installed here.
    flags = ["--noconftest", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short", "-v", "-rfE", "--maxfail=40"]
    code, text = run_for([sys.executable, "-m", "pytest", *flags, *GPU_TESTS], task.left() - 5.0)
    return judged_suite(code, text)


def judged_suite(code: int | None, text: str) -> dict[str, Any]:
    """pytest's summary; AssertionError where a test failed, where they didn't end, and where none ran."""
    lines = text.strip().splitlines() or ["no output"]
    last = lines[-1].strip("= ")
    if code is None:
        begun = [line.split()[0] for line in lines if "::" in line]
        raise AssertionError(f"the tests did not end in time; the last one begun is {begun[-1] if begun else 'none'}")
    if code or not re.search(r"\d+ passed", last):
        failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        raise AssertionError("; ".join([f"{last} (code {code})", *failures[:12]]) + "\n" + text[-5000:])
    return {"summary": last}


# ---- the command ----


@dataclass(frozen=True)
class Section:
    title: str
    items: Callable[[bool], dict[str, Item]]  # given whether the run is a quick one
    seconds: float  # at most, all items together


SECTIONS = {
    "machine": Section("the machine", lambda quick: {"machine": describe}, 60),
    "build": Section("compiling the kernels", lambda quick: {"kernels": build.compile_all}, 75),
    "suite": Section("the tests that need a GPU", lambda quick: {"tests": run_tests}, 130),
    "kernels": Section("times of kernels", timing.kernels, 140),
    "host": Section("time on the host", timing.host, 25),
    "channels": Section("a decision per channel", timing.channels, 20),
    "fused": Section("times of fused kernels", timing.fused, 400),
    "tune": Section("launch shapes", timing.tune, 90),
}
QUICK = "machine,build,suite,kernels,host,channels"
ALL = f"{QUICK},tune"


def run_sections(
    data: dict[str, Any],
    sections: Mapping[str, Section],
    run: Callable[[str, float], dict[str, Any]],
    seconds: float,
    folder: Path | None,
) -> None:
    """One section after the other within so many seconds, the JSON written after each; none stops those after it."""
    start = time.monotonic()
    for name, section in sections.items():
        begun = time.monotonic()
        items, allowed = {}, min(section.seconds, seconds - (begun - start))
        if allowed > 1:
            try:
                items = run(name, allowed)
            except Exception as error:
                items = {"section": failed(one_line(error), traceback.format_exc())}
        fates = {row["status"] for row in items.values()}
        status = "failed" if "failed" in fates else "cut" if "not run" in fates or not items else "ok"
        took = round(time.monotonic() - begun, 1)
        data["sections"][name] = {"title": section.title, "status": status, "seconds": took, "items": items}
        data["seconds"] = round(time.monotonic() - start, 1)
        if folder:
            report.save(data, folder)
        print(f"{data['seconds']:6.1f} s  {section.title}: {status}", flush=True)


def unusable() -> str | None:
    """Why there is no GPU to run on, in a sentence; None if there is one."""
    from fastdrop.backends.cuda import launch as numba_cuda

    reason = numba_cuda.unavailable()
    if reason:
        return reason
    try:
        import torch
    except ImportError as error:
        return f"torch is not installed ({error}): pip install torch"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU: install one built for CUDA"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the JSON and the report (default: bench/results)")
    parser.add_argument("--quick", action="store_true", help="about three minutes: fewer sizes, no launch shapes")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU: shows that the script runs")
    parser.add_argument("--sections", help=f"some of {','.join(SECTIONS)} (default: {ALL}); the files are named so")
    # What `run_section` starts: a section's name, the file of its lines, the seconds that are left.
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    unknown = set((chosen.sections or ALL).split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections must be of {', '.join(SECTIONS)}, but got {', '.join(sorted(unknown))}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.child:
        name, file, seconds = chosen.child
        task = Task(chosen.dry_run, time.monotonic() + float(seconds))
        return int(not run_items(SECTIONS[name].items(chosen.quick), Path(file), task))
    reason = None if chosen.dry_run else unusable()
    if reason:
        print(f"bench/gpu.py needs a GPU: {reason}", file=sys.stderr)
        return NO_GPU
    folder = chosen.output or (None if chosen.dry_run else ROOT / "bench" / "results")
    wanted = {"machine", *(chosen.sections or (QUICK if chosen.quick else ALL)).split(",")}
    data: dict[str, Any] = {
        "options": {"quick": chosen.quick, "dry_run": chosen.dry_run},
        "part": (chosen.sections or "").replace(",", "-"),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "sections": {},
    }
    modes = [flag for flag, on in (("--quick", chosen.quick), ("--dry-run", chosen.dry_run)) if on]
    with tempfile.TemporaryDirectory() as scratch:

        def run(name: str, seconds: float) -> dict[str, Any]:
            command = [sys.executable, "-m", "bench.gpu", *modes, "--child", name]
            return run_section(command, Path(scratch) / f"{name}.jsonl", seconds)

        sections = {name: section for name, section in SECTIONS.items() if name in wanted}
        run_sections(data, sections, run, QUICK_SECONDS if chosen.quick else TOTAL_SECONDS, folder)
    print(f"\n{report.printed(data)}", flush=True)
    if folder:
        print("wrote " + " and ".join(map(str, report.save(data, folder))), flush=True)
    return int(any(section["status"] == "failed" for section in data["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())

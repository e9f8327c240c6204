"""Runs the benchmarks and the report: python bench/run.py [--quick | --torch] [--name NAME]."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the speed table alone, a few minutes")
    parser.add_argument("--torch", action="store_true", help="the torch face and training steps, a few minutes")
    parser.add_argument("--name", default=None, help="of the files under bench/results (default: all, quick or torch)")
    args = parser.parse_args()
    cases = "torch" if args.torch else "quick" if args.quick else "all"
    report = "bench.report_torch" if args.torch else "bench.report"
    results = BENCH / "results" / f"{args.name or cases}.json"
    command = [
        sys.executable, "-m", "pytest", str(BENCH), "-q", "--cases", cases, "-p", "no:cacheprovider",
        "--benchmark-json", str(results), "--benchmark-disable-gc", "--benchmark-columns", "median,iqr,rounds",
        "--benchmark-sort", "name", "--no-header",
    ]  # fmt: skip
    status = subprocess.run(command, cwd=BENCH.parent, check=False).returncode
    return (
        status or subprocess.run([sys.executable, "-m", report, str(results)], cwd=BENCH.parent, check=False).returncode
    )


if __name__ == "__main__":
    sys.exit(main())

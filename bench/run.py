"""Runs the benchmarks and the report: python bench/run.py [--quick | --torch | --family | --fused] [--name NAME]."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent
REPORTS = {
    "quick": "bench.report",
    "torch": "bench.report_torch",
    "family": "bench.report_family",
    "fused": "bench.report_fused",
    "all": "bench.report",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the speed table alone, a few minutes")
    parser.add_argument("--torch", action="store_true", help="the torch face and training steps, a few minutes")
    parser.add_argument("--family", action="store_true", help="the other kinds of dropout, a few minutes")
    parser.add_argument("--fused", action="store_true", help="fused kernels, eight minutes")
    parser.add_argument("--name", default=None, help="of the files under bench/results (default: all, or the suite's)")
    args = parser.parse_args()
    cases = next((name for name in REPORTS if getattr(args, name, False)), "all")
    report = REPORTS[cases]
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

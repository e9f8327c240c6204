"""Runs a set of CPU benchmarks, then writes its report: `python -m bench.run [--quick | --sweep | --torch | ...]`.

The sets are the keys of `REPORTS`; without an option all of plain dropout runs. Results go to a folder of bench/results
that is named after the kind of machine: NAME.json (not under version control), NAME.md and NAME.png. `--report` runs
nothing and writes the reports of the JSON files that are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .machine import kind

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
REPORTS = {
    "quick": "bench.cpu.report",
    "sweep": "bench.cpu.report_sweep",
    "torch": "bench.torch.report_torch",
    "family": "bench.torch.report_family",
    "fused": "bench.torch.report_fused",
    "attention": "bench.torch.report_attention",
    "saving": "bench.torch.report_saving",
    "parallel": "bench.torch.report_parallel",
    "all": "bench.cpu.report",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="plain dropout, the speed table alone: six minutes")
    parser.add_argument("--sweep", action="store_true", help="plain dropout over sizes: five minutes")
    parser.add_argument("--torch", action="store_true", help="torch's function and training steps: five minutes")
    parser.add_argument("--family", action="store_true", help="the other kinds of dropout: five minutes")
    parser.add_argument("--fused", action="store_true", help="fused kernels: eight minutes")
    parser.add_argument("--attention", action="store_true", help="attention, its memory, transformers: ten minutes")
    parser.add_argument("--saving", action="store_true", help="dropout that saves work: twelve minutes")
    parser.add_argument("--parallel", action="store_true", help="masks for many processes: three minutes")
    parser.add_argument("--report", action="store_true", help="only write the reports of the results that are there")
    parser.add_argument("--name", help="of the files (default: the set's name)")
    args = parser.parse_args()
    if args.report:
        found = [(module, path) for name, module in REPORTS.items() for path in sorted(RESULTS.glob(f"*/{name}.json"))]
        if not found:
            print(f"there are no results in {RESULTS}: run make bench first")
        return max((report(module, path) for module, path in found), default=1)
    cases = next((name for name in REPORTS if getattr(args, name, False)), "all")
    results = RESULTS / kind() / f"{args.name or cases}.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "pytest", "bench/cpu", "bench/torch", "-q", "--cases", cases, "-p", "no:cacheprovider",
        "--benchmark-json", str(results), "--benchmark-disable-gc", "--benchmark-columns", "median,iqr,rounds",
        "--benchmark-sort", "name", "--no-header",
    ]  # fmt: skip
    status = subprocess.run(command, cwd=BENCH.parent, check=False).returncode
    return status or report(REPORTS[cases], results)


def report(module: str, results: Path) -> int:
    return subprocess.run([sys.executable, "-m", module, str(results)], cwd=BENCH.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

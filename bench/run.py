"""Runs a set of CPU benchmarks, then writes its report: `python -m bench.run [--quick | --sweep | --torch | ...]`.

The sets are the keys of `SETS`; without an option all of plain dropout runs. Results go to a folder of bench/results
that is named after the kind of machine: NAME.json (not under version control), NAME.md and NAME.png. `--report` runs
nothing and writes the reports of the JSON files that are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .machine import kind

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"


class Set(NamedTuple):
    """Its tests, what pytest is told beside them, the module that writes its report."""

    tests: str
    report: str
    options: tuple[str, ...] = ()


SETS = {
    # Five times as long for each case as when all cases run.
    "quick": Set("cpu/test_dropout.py", "bench.cpu.report", ("-m", "quick", "--benchmark-max-time", "5")),
    "sweep": Set("cpu/test_sweep.py", "bench.cpu.report_sweep"),
    "torch": Set("torch/test_torch.py", "bench.torch.report_torch"),
    "family": Set("torch/test_family.py", "bench.torch.report_family"),
    "fused": Set("torch/test_fused.py", "bench.torch.report_fused"),
    "attention": Set("torch/test_attention.py", "bench.torch.report_attention"),
    "saving": Set("torch/test_saving.py", "bench.torch.report_saving"),
    "parallel": Set("torch/test_parallel.py", "bench.torch.report_parallel"),
    "all": Set("cpu/test_dropout.py", "bench.cpu.report"),
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
        found = [(name, path) for name in SETS for path in sorted(RESULTS.glob(f"*/{name}.json"))]
        if not found:
            print(f"there are no results in {RESULTS}: run make bench first")
        return max((report(SETS[name].report, path) for name, path in found), default=1)
    name = next((name for name in SETS if getattr(args, name, False)), "all")
    results = RESULTS / kind() / f"{args.name or name}.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "pytest", f"bench/{SETS[name].tests}", *SETS[name].options, "-v", "--no-header",
        "-p", "no:cacheprovider", "--benchmark-json", str(results), "--benchmark-disable-gc",
        "--benchmark-columns", "median,iqr,rounds", "--benchmark-sort", "name",
    ]  # fmt: skip
    status = subprocess.run(command, cwd=BENCH.parent, check=False).returncode
    return status or report(SETS[name].report, results)


def report(module: str, results: Path) -> int:
    return subprocess.run([sys.executable, "-m", module, str(results)], cwd=BENCH.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

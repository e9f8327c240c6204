"""Prints the tests of what has changed: `make check` runs them.

Changed is what the working tree and this branch have changed since the branch left ``main``, or, with a clean tree on
``main`` itself, what the last commit changed. A test file stands for itself. A module is tested by the test files of
its name in the folder of tests/ that mirrors its own, or else by those that `TABLE` names for its folder. The files of
`SMOKE` always run, because they hold rules that any change can break.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE = [
    "tests/test_mutations.py",
    "tests/test_docstrings.py",
    "tests/core/test_grid.py",
    "tests/backends/test_registry.py",
]
TORCH = "tests/torch"
KERNELS = [f"tests/backends/test_{name}.py" for name in ("mask", "fused", "attention", "mask_spec")]
TABLE = {  # tests of a folder's modules that have no test file of their name; the longest start of a path counts
    "csrc/": KERNELS,
    "fastdrop/": [f"{TORCH}/functional/test_dropout.py", "tests/arrays/test_dropout.py", "tests/cli"],
    "fastdrop/arrays/": ["tests/arrays/test_dropout.py", "tests/arrays/test_fused.py"],
    "fastdrop/backends/": KERNELS,
    "fastdrop/backends/cuda/": ["tests/backends/cuda/test_primitives.py", "tests/backends/cuda/test_fused.py"],
    "fastdrop/cli/": ["tests/cli"],
    "fastdrop/core/": ["tests/core"],
    "fastdrop/integrations/": ["tests/integrations"],
    "fastdrop/torch/": [f"{TORCH}/functional/test_dropout.py", f"{TORCH}/functional/test_fused.py"],
    "fastdrop/torch/functional/": [f"{TORCH}/functional/test_{name}.py" for name in ("dropout", "variants", "fused")],
    "fastdrop/torch/models/": [f"{TORCH}/models"],
    "fastdrop/torch/models/fuse/": [f"{TORCH}/models/test_fuse.py", f"{TORCH}/models/test_fuse_transformers.py"],
    "fastdrop/torch/models/source/": [f"{TORCH}/models/test_convert.py", f"{TORCH}/models/test_reports.py"],
    "fastdrop/torch/nn/": [f"{TORCH}/nn"],
    "fastdrop/torch/ops/": [
        f"{TORCH}/ops/test_{name}.py" for name in ("transforms", "ops", "raw_ops", "compile_fused")
    ],
    "fastdrop/torch/tools/": [f"{TORCH}/tools"],
    "fastdrop/vectors/": KERNELS,
    "bench/": ["tests/bench"],
    "docs/": ["tests/test_docs.py"],
    "docs/recipes.md": ["tests/test_recipes.py"],
    "README.md": ["tests/test_docs.py"],
    "examples/": ["tests/test_examples.py"],
    "examples/recipes/": ["tests/test_recipes.py"],
}


def tests_of(path: str) -> list[str]:
    """The test files of one changed file: those of its name in the folder that mirrors its own, or its folder's."""
    if path.startswith("tests/"):
        return [path] if Path(path).name.startswith("test_") and (ROOT / path).exists() else []
    room = ROOT / "tests" / Path(path).parent.relative_to("fastdrop") if path.startswith("fastdrop/") else None
    own = sorted(room.glob(f"test_{Path(path).stem}*.py")) if room else []
    return [str(test.relative_to(ROOT)) for test in own] or _of_folder(path)


def _of_folder(path: str) -> list[str]:
    starts = [start for start in TABLE if path.startswith(start)]
    return TABLE[max(starts, key=len)] if starts else []


def changed() -> list[str]:
    """Paths that differ from where this branch began, and those that git does not know yet."""

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.split() if done.returncode == 0 else []

    base, tree = git("merge-base", "HEAD", "main") or ["HEAD"], git("status", "--porcelain")
    if base == git("rev-parse", "HEAD") and not tree:
        base = git("rev-parse", "HEAD~1") or base
    return [*git("diff", "--name-only", *base), *git("ls-files", "--others", "--exclude-standard")]


def main() -> None:
    print(*dict.fromkeys([*SMOKE, *(test for path in changed() for test in tests_of(path))]))


if __name__ == "__main__":
    main()

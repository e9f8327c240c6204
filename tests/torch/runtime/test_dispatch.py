"""Private names of torch: all in one place, and none without which fastdrop gives another result."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import fastdrop

from ...conftest import EVERYTHING

pytest.importorskip("torch")

ROOT = Path(fastdrop.__file__).parent
DISPATCH = ROOT / "torch" / "runtime" / "dispatch"
# Private names of others: namedtuples, sys, configurations of transformers; and the end of names that are generated.
OTHERS = {"_replace", "_fields", "_field_defaults", "_asdict", "_getframe", "_attn_implementation", "_drawn_at"}
OTHERS |= {"_attn", "timm.models._efficientnet_blocks"}  # timm's
PUBLIC = {"torch.library", "torch.onnx", "torch.distributed.tensor"}  # as strings, in `sys.modules`


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}


@cache
def own_names(folder: Path = ROOT) -> set[str]:
    """All that fastdrop defines: functions, classes, variables, and attributes of its own objects."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(trees()[path]):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) in ("self", "ctx") else set()
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(tree: ast.Module, folder: Path = ROOT) -> set[str]:
    """Private names that ``folder`` doesn't define, in a source: attributes, imports from torch, strings."""
    found, own = set(), own_names(folder) | OTHERS
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "torch":
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {path for path in paths if any(map(is_private, path.split(".")))}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if re.search(r"^torch\b.*\._", alias.name)}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own:
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"torch(\.\w+)+", node.value):
                found |= {node.value} if any(map(is_private, node.value.split("."))) else set()
            elif re.fullmatch(r"(\w+\.)*_[a-z]\w*", node.value) and is_private(node.value.rpartition(".")[2]):
                ours = any(name.endswith(node.value) for name in own) or node.value.startswith("_fastdrop")
                found |= set() if ours else {node.value}
    return found


def test_no_other_file_uses_a_private_name_of_torch():
    used = {
        str(path.relative_to(ROOT)): names
        for path, tree in trees().items()
        if DISPATCH not in path.parents and "torch" in path.read_text() and (names := private_names(tree))
    }
    assert not used


def names_of_torch() -> list[str]:
    """What dispatch asks torch for, private or found under a private name."""
    found = set()
    for path in DISPATCH.glob("*.py"):
        found |= private_names(trees()[path], DISPATCH)
    return sorted(found - PUBLIC)


def run(names: list[str]) -> list[dict[str, str | list[float]]]:
    command = [sys.executable, "-m", "tests.torch.runtime.one_name_less", *names]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def is_right(name: str, result: str | list[float], expected: str | list[float] | None) -> bool:
    """Whether a check gave what it gives when no name is missing, or an error that tells the name."""
    if isinstance(result, list) and isinstance(expected, list):
        return len(result) == len(expected) and np.allclose(result, expected, rtol=1e-4, atol=1e-5)
    return result == expected or (isinstance(result, str) and "RuntimeError" in result and name in result)


def wrong_without(names: list[str]) -> list[str]:
    """The checks that give something else, and tell nothing, without one of these names."""
    whole, *without = run(["", *names])
    assert sorted(found["name"] for found in without) == sorted(names)
    assert not {check: text for check, text in whole.items() if isinstance(text, str) and "Error" in text}
    return [
        f"{check} without {found['name']}: {result}"
        for found in without
        for check, result in found.items()
        if check != "name" and not is_right(found["name"], result, whole.get(check))
    ]


def test_each_name_may_be_missing(request):
    """Each check then gives the same, or tells which name is missing, and torch's own dropout stays as it was. Only
    `make test-all` tries all names."""
    names, of_every_call = names_of_torch(), {"torch._C._dispatch_keys", "torch._C._functorch.peek_interpreter_stack"}
    assert len(names) > 60
    assert of_every_call <= set(names)
    wrong = wrong_without(names if EVERYTHING or request.config.getoption("--tier") == "all" else sorted(of_every_call))
    assert not wrong, "\n".join(wrong)

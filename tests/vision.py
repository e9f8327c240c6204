"""Runs the recipes for timm and torchvision on the packages in a folder: ``python -m tests.vision build/vision``.

`make test-vision` installs the two there, because torchvision's binary is made for torch with CUDA and does not load
beside the pinned torch for CPUs. Without it torchvision's Python code can't be imported, as its operators are not
declared. This module declares them from the list in torchvision's source. No model here calls one.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import torch

from .cases import ROOT

RECIPES = sorted((ROOT / "examples" / "recipes" / "vision").glob("*.py"))


def declare_operators(folder: Path) -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    source = (folder / "torchvision" / "_meta_registrations.py").read_text()
    for name in sorted(set(re.findall(r'(?:register_meta\("|torchvision::)(\w+)"', source))):
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(folder))
    library = declare_operators(folder)
    assert RECIPES
    for recipe in RECIPES:
        print(f"-- {recipe.name}")
        sys.argv = [str(recipe), "--quick"]
        runpy.run_path(str(recipe), run_name="__main__")
    del library


if __name__ == "__main__":
    main()

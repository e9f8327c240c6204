"""The recipes in their quick form. Each asserts what it shows. `make test-vision` runs those for timm and torchvision."""

from __future__ import annotations

import runpy
import sys

import pytest

from .cases import ROOT

torch = pytest.importorskip("torch")

FOLDER = ROOT / "examples" / "recipes"
PAGE = ROOT / "docs" / "recipes.md"
# In one test, because the libraries take seconds to import and tests may run in several processes.
LIBRARIES = ("transformers_trainer", "peft_lora", "accelerate_loop", "lightning_callback", "export_model")
OTHERS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in LIBRARIES)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a recipe as a script of one thread, which leaves torch's state as it was. Returns what it prints."""

    def run_recipe(name):
        path = FOLDER / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), "--quick"])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield run_recipe
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", OTHERS)
def test_recipe(run, name):
    assert run(name)


@pytest.mark.filterwarnings("ignore")
def test_recipes_for_libraries(run):
    for name in LIBRARIES:
        assert run(name), name


def test_page_lists_every_recipe():
    page = PAGE.read_text()
    for path in FOLDER.rglob("*.py"):
        assert f"(../{path.relative_to(ROOT).as_posix()})" in page, path
        assert path.read_text().startswith('"""'), path

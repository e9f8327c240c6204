"""The recipes in their quick form, each of which asserts what it shows. `make test-vision` runs the vision ones."""

from __future__ import annotations

import re
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


def test_page_shows_the_lines_of_every_recipe():
    """Each section has lines of the recipe that it links to, whatever their indent and order."""
    _, *sections = re.split(r"^## ", PAGE.read_text(), flags=re.M)
    linked = set()
    for section in sections:
        (link,) = re.findall(r"\(\.\./(examples/recipes/\S+\.py)\)", section)
        lines = {line.strip() for line in (ROOT / link).read_text().splitlines()}
        (block,) = re.findall(r"```py\n(.*?)```", section, re.S)
        assert [line for line in block.splitlines() if line.strip() not in lines | {""}] == [], link
        linked.add(ROOT / link)
    assert linked == set(FOLDER.rglob("*.py"))

"""The examples and their notebook, in their quick form: they run, print results and draw a picture of them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import numpy as np
import pytest

from .cases import ROOT

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = ROOT / "examples"
PICTURES = sorted(path.stem for path in EXAMPLES.glob("*.py") if "def picture(" in path.read_text())


@pytest.fixture
def beside_examples(monkeypatch):
    """Imports as a script of that folder has them; modules are forgotten again."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in [*PICTURES, "common"]:
        sys.modules.pop(name, None)


@pytest.mark.slow("test_notebook_runs")
@pytest.mark.parametrize("name", PICTURES)
def test_example_draws_what_it_found(name, beside_examples, tmp_path, capsys, monkeypatch):
    example = importlib.import_module(name)
    output = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--output", str(output)])
    figures = []

    def remember(quick):
        figures.append(example.picture(quick))
        return figures[-1]

    example.run(remember, example.__doc__, "unused.png")
    printed = capsys.readouterr().out
    assert output.read_bytes()[:4] == b"\x89PNG"
    assert printed.count("\n") > 1
    assert "nan" not in printed
    for axis in figures[0].axes:
        drawn = [line.get_ydata() for line in axis.lines] + [[bar.get_height() for bar in axis.patches]]
        values = np.concatenate([np.asarray(values, float).reshape(-1) for values in drawn])
        assert values.size > 1
        assert np.isfinite(values).all()
        assert axis.get_title(loc="left")
        assert axis.get_xlabel() or len(axis.get_xticklabels()) > 1


def test_demo_draws_its_picture(tmp_path):
    picture = tmp_path / "demo.png"
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--output", str(picture)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "dropout p = 0.5" in done.stdout


def test_every_example_is_in_the_notebook():
    text = (EXAMPLES / "tour.ipynb").read_text()
    assert all(f"show({name}.picture)" in text for name in PICTURES)
    assert len(PICTURES) == 7


def test_notebook_runs(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("FASTDROP_QUICK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run on the other cores
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in str(output)]
    assert len(pictures) == len(PICTURES)
    assert "Dropout" in notebook.cells[-1].outputs[0].text  # the audit's table

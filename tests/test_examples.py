"""The examples in their quick form: they run, print results and draw a picture of them."""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from .cases import ROOT

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
figures = pytest.importorskip("matplotlib.figure")
to_hex = pytest.importorskip("matplotlib.colors").to_hex
Polygon = pytest.importorskip("matplotlib.patches").Polygon

EXAMPLES = ROOT / "examples"
PICTURES = sorted(path.stem for path in EXAMPLES.glob("*.py") if "def picture(" in path.read_text())

DROPOUTS = "torch's dropout", "fastdrop"  # of parallel.py
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#777777"}
SMOKE_TEST = "quick form: a smoke test, too short to show the effect"


@pytest.fixture
def beside_examples(monkeypatch):
    """Imports as a script of that folder has them; modules are forgotten again. One thread: others use the cores."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    for name in [*PICTURES, "common", "pictures"]:
        sys.modules.pop(name, None)


def test_tour_shows_every_example(beside_examples, monkeypatch, tmp_path, capsys):
    pytest.importorskip("IPython")
    drawn, save = [], figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **o: drawn.append(self) or save(self, *a, **o))
    monkeypatch.setenv("FASTDROP_QUICK", "1")
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    namespace: dict[str, object] = {}
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for k, cell in enumerate(code):
        exec(compile(cell, f"cell {k}", "exec"), namespace)
        printed = capsys.readouterr().out
        assert "nan" not in printed
        assert printed.count("\n") >= 1 or k == 0
        assert printed.count(SMOKE_TEST) == cell.count("show(") - cell.count("def show(")
        if "parallel" in code[k]:
            gaps = {
                name: [float(gap) for gap in re.findall(rf"{name}, .* ([0-9.e+-]+)\n", printed)] for name in DROPOUTS
            }
            assert max(gaps["fastdrop"]) < 1e-13
            assert min(gaps["torch's dropout"]) > 1e-3
            assert [len(values) for values in gaps.values()] == [4, 4]
    assert "Dropout" in printed  # the audit's table
    assert all(f"    {name}.picture," in "".join(code) for name in PICTURES)
    assert len(drawn) == len(PICTURES) == 9
    assert all(figure.get_supxlabel() == SMOKE_TEST for figure in drawn)
    for axis in (axis for figure in drawn for axis in figure.axes):
        check_axis(axis)


def check_axis(axis):
    """A chart says what it shows: finite values, in colours that all can tell apart, and bars that start at 0."""
    assert axis.get_title(loc="left")
    assert axis.get_xlabel() or len(axis.get_xticklabels()) > 1
    box, paper = axis.get_tightbbox(), axis.figure.bbox
    assert -1 < box.x0 < box.x1 < paper.x1 + 1  # no title is cut off
    if axis.images:
        return
    histograms = [patch for patch in axis.patches if isinstance(patch, Polygon)]
    values = [np.asarray(line.get_ydata(), float) for line in axis.lines] + [patch.get_xy() for patch in histograms]
    assert sum(value.size for value in values) > 1
    assert all(np.isfinite(value).all() for value in values)
    assert axis.get_ylabel() or axis.get_subplotspec().colspan.start > 0  # the first one's counts for all
    if axis.containers or histograms:
        assert axis.get_ylim()[0] == 0
    assert {to_hex(line.get_color()) for line in axis.lines} <= OKABE_ITO


def test_stored_tour_is_the_full_form():
    """The notebook is a page of the documentation: its texts quote the results that it shows."""
    text = (EXAMPLES / "tour.ipynb").read_text()
    assert len(text) < 1_500_000
    cells = json.loads(text)["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose, re.M)]
    assert levels == [1] + [2] * (len(levels) - 1)
    shown = 0
    for cell, after in itertools.pairwise(cells):
        printed = "".join("".join(output.get("text", "")) for output in cell.get("outputs", ()))
        assert SMOKE_TEST not in printed
        assert not re.search(r"/(home|root|work|tmp|Users)/|[A-Z]:\\\\", printed)
        assert not any(
            output["output_type"] == "error" or output.get("name") == "stderr" for output in cell.get("outputs", ())
        )
        images = [output for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
        if "show(" in "".join(cell["source"]) and images:
            shown += 1
            assert images[0]["metadata"]["image/png"]["alt"]
            sentence = re.sub(r"\(http[^)]*\)", "", "".join(after["source"]))
            assert sentence.startswith("**What to see.**")
            assert set(re.findall(r"\d+\.\d+", sentence)) <= set(re.findall(r"\d+\.\d+", printed))
    assert shown == len(PICTURES)


def test_command_draws_its_picture(beside_examples, monkeypatch, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["sparsity.py", "--quick", "--output", str(picture)])
    runpy.run_path(str(EXAMPLES / "sparsity.py"), run_name="__main__")
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "p = 0.5" in printed
    assert SMOKE_TEST in printed


def test_demo_draws_its_picture(tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--output", str(picture)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "p = 0.5" in done.stdout
    assert SMOKE_TEST in done.stdout

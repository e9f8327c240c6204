"""The examples in their quick form: they run, print results and draw a picture of them."""

from __future__ import annotations

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

EXAMPLES = ROOT / "examples"
PICTURES = sorted(path.stem for path in EXAMPLES.glob("*.py") if "def picture(" in path.read_text())

DROPOUTS = "torch's dropout", "fastdrop"  # of parallel.py


@pytest.fixture
def beside_examples(monkeypatch):
    """Imports as a script of that folder has them; modules are forgotten again. One thread: others use the cores."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    for name in [*PICTURES, "common"]:
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
        if "parallel" in code[k]:
            gaps = {
                name: [float(gap) for gap in re.findall(rf"{name}, .* ([0-9.e+-]+)\n", printed)] for name in DROPOUTS
            }
            assert max(gaps["fastdrop"]) < 1e-13
            assert min(gaps["torch's dropout"]) > 1e-3
            assert [len(values) for values in gaps.values()] == [4, 4]
    assert "Dropout" in printed  # the audit's table
    assert all(f"show({name}.picture)" in "".join(code) for name in PICTURES)
    assert len(drawn) == len(PICTURES) == 9
    for axis in (axis for figure in drawn for axis in figure.axes):
        lines = [line.get_ydata() for line in axis.lines] + [[bar.get_height() for bar in axis.patches]]
        values = np.concatenate([np.asarray(values, float).reshape(-1) for values in lines])
        assert values.size > 1
        assert np.isfinite(values).all()
        assert axis.get_title(loc="left")
        assert axis.get_xlabel() or len(axis.get_xticklabels()) > 1


def test_command_draws_its_picture(beside_examples, monkeypatch, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["sparsity.py", "--quick", "--output", str(picture)])
    runpy.run_path(str(EXAMPLES / "sparsity.py"), run_name="__main__")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "p = 0.5" in capsys.readouterr().out


def test_demo_draws_its_picture(tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--output", str(picture)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "p = 0.5" in done.stdout

"""The command line: exit codes, what it refuses, and that it leaves things as they were."""

from __future__ import annotations

import itertools
import json
import re
import sys

import numpy as np
import pytest

import fastdrop as fd
from fastdrop import backends
from fastdrop.__main__ import COMMANDS, main
from fastdrop.backends import reference
from fastdrop.cli import bench, info, selftest
from fastdrop.cli.timing import Timing

from ..cases import ROOT


def test_info_names_versions_backends_and_threads(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in (fd.__version__, np.__version__, "c", "numba", "numpy", str(fd.get_num_threads())):
        assert name in out


def test_info_in_json_has_keys_that_stay(capsys, monkeypatch):
    """The keys are those that the manual lists."""
    known = {"there": ("no-such-distribution", "numpy"), "missing": ("no-such-distribution", "nor-this")}
    monkeypatch.setattr(info, "INTEGRATIONS", known)
    monkeypatch.setenv("FASTDROP_NUM_THREADS", "3")
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    manual = (ROOT / "docs" / "command_line.md").read_text()
    assert [*found] == re.findall(r"^\| `([a-z_]+)` \|", manual, re.M)
    assert found["packages"]["numpy"] == np.__version__
    assert found["environment"]["FASTDROP_NUM_THREADS"] == "3"
    assert found["integrations"]["there"] == {"distribution": "numpy", "version": np.__version__}
    assert found["integrations"]["missing"]["version"] is None
    assert [name for name, backend in found["backends"].items() if backend["used"]] == [backends.active_name()]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"numpy {np.__version__}" in text
    assert "pip install no-such-distribution" in text


def test_info_reports_a_wrong_variable(capsys, monkeypatch):
    monkeypatch.setenv("FASTDROP_BACKEND", "cobol")
    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.setattr(backends, "_module", None)
    assert main(["info"]) == 1
    captured = capsys.readouterr()
    said = "FASTDROP_BACKEND must be one of auto, c, numba, numpy, but got 'cobol'"
    assert said in captured.out + captured.err
    assert main(["info", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"].startswith(said)


def test_unknown_command_exits_with_2(capsys):
    assert main(["fly"]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch):
    """A selftest of NumPy and of one backend more, on small arrays; its name."""
    compiled = "c" if backends.reason("c") is None else "numba"
    monkeypatch.setattr(backends, "reasons", lambda: {compiled: None, "numpy": None, "cuda": "left out"})
    monkeypatch.setattr(selftest, "ISAS", ("scalar", "avx1024"))
    monkeypatch.setattr(selftest, "LONG_ROWS", (3, 1100))
    return compiled


def outcomes(capsys):
    *lines, last = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line.split()[1] for line in lines}, lines, last.partition(":")[0]


def test_selftest_passes_and_restores(quick, capsys):
    before = backends.active(), fd.get_num_threads()
    assert main(["selftest"]) == 0
    expected = {"c/scalar": "PASS", "c/avx1024": "n/a"} if quick == "c" else {"numba": "PASS"}
    results, _, last = outcomes(capsys)
    assert results == {**expected, "numpy": "PASS", "cuda": "n/a"}
    assert last == "PASS"
    assert (backends.active(), fd.get_num_threads()) == before


# Outputs of the reference in which a number is wrong: where they stand among the arguments, and what is said then.
FAULTS = {
    "draw_bits": (0, "FAIL", "first: golden mask p ="),
    "softmax_backward": (4, "PASS", "softmax_dropout, float32: gradient 1 is not the reference's"),
}


@pytest.mark.parametrize("primitive", FAULTS)
@pytest.mark.usefixtures("quick")
def test_selftest_fails_on_one_wrong_number(primitive, capsys, monkeypatch):
    output, of_numpy, text = FAULTS[primitive]
    right = getattr(reference, primitive)

    def wrong(*arguments):
        right(*arguments)
        arguments[output].reshape(-1)[:1] += 1

    monkeypatch.setattr(reference, primitive, wrong)
    before = backends.active()
    assert main(["selftest"]) == 1
    results, lines, last = outcomes(capsys)
    assert results["numpy"] == of_numpy
    assert any(text in line for line in lines)
    assert last == "FAIL"
    assert backends.active() is before


def test_selftest_of_a_backend_that_raises_goes_on(quick, capsys, monkeypatch):
    def dilate_bits(*arguments):
        raise OSError("a broken build")

    monkeypatch.setattr(backends.load(quick), "dilate_bits", dilate_bits)
    assert main(["selftest"]) == 1
    results, lines, _ = outcomes(capsys)
    assert "OSError: a broken build" in lines[0]
    assert results["numpy"] == "PASS"


def test_selftest_leaves_numba_out_unless_it_is_asked_for_or_in_use(quick, capsys, monkeypatch):
    checked = []
    monkeypatch.setattr(backends, "reasons", lambda: {"numba": None, "numpy": None})
    monkeypatch.setattr(selftest, "_check", lambda module, *_: checked.append(module.__name__) or [None])
    for arguments, active, expected in (([], "c", "skip"), (["--all"], "c", "PASS"), ([], "numba", "PASS")):
        monkeypatch.setattr(backends, "active_name", lambda active=active: active)
        assert main(["selftest", *arguments]) == 0
        assert outcomes(capsys)[0] == {"numba": expected, "numpy": "PASS"}
    assert len(checked) == 5


@pytest.mark.slow("test_selftest_passes_and_restores")
def test_selftest_of_all_backends_passes(capsys):
    assert main(["selftest", "--all"]) == 0


# ---- help, exit codes ----


def test_every_help_has_examples_and_exit_codes_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    manual = (ROOT / "docs" / "command_line.md").read_text()
    for command in ([], *([name] for name in COMMANDS)):
        assert main([*command, "--help"]) == 0
        text = capsys.readouterr().out
        assert all(part in text for part in ("examples:", "exit codes:", "130"))
        assert max(map(len, text.splitlines())) <= 80
        assert all(option in manual for option in re.findall(r"--[a-z]+", text))
    assert all(f"## fastdrop {name}" in manual for name in COMMANDS)


def test_a_command_that_is_interrupted_exits_with_130(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(selftest, "main", interrupted)
    assert main(["selftest"]) == 130
    assert "interrupted" in capsys.readouterr().err


# ---- bench ----


@pytest.fixture
def twice_as_slow(monkeypatch):
    """`fastdrop bench` in which fastdrop takes two seconds and each peer one; what was called and with which result."""
    results = []

    def alternate(calls, seconds):
        results.append({name: call() for name, call in calls.items()})
        return {name: Timing((1.0 + (name == ""),) * 5) for name in calls}

    monkeypatch.setattr(bench, "alternate", alternate)
    monkeypatch.setattr(bench, "SIZES", dict.fromkeys(bench.SIZES, 1000))
    return results


def test_bench_compares_like_with_like_and_says_who_is_faster(twice_as_slow, capsys):
    torch = bench.import_torch()
    threads = [library.get_num_threads() for library in (fd, torch) if library]
    assert main(["bench", "--quick", "--json", "--p", "0.5", "--threads", "3"]) == 0
    assert [library.get_num_threads() for library in (fd, torch) if library] == threads
    captured = capsys.readouterr()
    run = json.loads(captured.out)
    faces = ["NumPy", "torch"] if run["torch"] else ["NumPy"]
    expected = itertools.product(faces, bench.QUICK_SIZES, ("forward", "backward"))
    assert [(row["face"], row["size"], row["operation"]) for row in run["rows"]] == [*expected]
    assert {(row["seconds"], row["peer_seconds"], row["ratio"]) for row in run["rows"]} == {(2.0, 1.0, 2.0)}
    assert captured.err.count(" 0.50x") == len(run["rows"])  # fastdrop is half as fast
    for result in twice_as_slow:
        for y in result.values():
            y = y[0] if isinstance(y, tuple) else y
            dropped = float((np.asarray(y.detach() if hasattr(y, "detach") else y) == 0).mean())
            assert 0.4 < dropped < 0.6


def test_bench_draws_a_picture_or_says_what_it_needs(twice_as_slow, capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "speed.png"
    assert main(["bench", "--quick", "--output", str(path)]) == 0
    assert path.stat().st_size > 10_000
    for wrong in (["--output", "speed.doc"], ["--output", "no/folder/speed.png"], ["--p", "1.5"], ["--threads", "257"]):
        assert main(["bench", *wrong]) == 2
    capsys.readouterr()
    measured = len(twice_as_slow)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--quick", "--output", str(path)]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert len(twice_as_slow) == measured  # it says so before it measures

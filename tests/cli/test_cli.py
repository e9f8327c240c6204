"""The command line: exit codes, what it refuses, and that it leaves things as they were."""

from __future__ import annotations

import numpy as np
import pytest

import fastdrop as fd
from fastdrop import backends
from fastdrop.__main__ import main
from fastdrop.backends import reference
from fastdrop.cli import selftest


def test_info_names_versions_backends_and_threads(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in (fd.__version__, np.__version__, "c", "numba", "numpy", str(fd.get_num_threads())):
        assert name in out


def test_info_reports_a_wrong_variable(capsys, monkeypatch):
    monkeypatch.setenv("FASTDROP_BACKEND", "cobol")
    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.setattr(backends, "_module", None)
    assert main(["info"]) == 1
    captured = capsys.readouterr()
    assert "FASTDROP_BACKEND must be one of auto, c, numba, numpy, but got 'cobol'" in captured.out + captured.err


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


@pytest.mark.slow("test_selftest_passes_and_restores")
def test_selftest_of_all_backends_passes(capsys):
    assert main(["selftest"]) == 0

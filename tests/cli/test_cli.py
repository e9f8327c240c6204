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


@pytest.mark.slow("test_selftest_fails_on_one_wrong_bit")
def test_selftest_passes_and_restores(capsys):
    before = backends.active(), fd.get_num_threads()
    assert main(["selftest"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("PASS")
    assert (backends.active(), fd.get_num_threads()) == before


def wrong_bits(words, *arguments):
    """draw_bits with the first bit wrong."""
    RIGHT_BITS(words, *arguments)
    words[0] ^= 1


RIGHT_BITS = reference.draw_bits


def test_selftest_fails_on_one_wrong_bit(capsys, monkeypatch):
    monkeypatch.setattr(reference, "draw_bits", wrong_bits)
    before = backends.active()
    assert not selftest.run(print=lambda line: None)
    assert main(["selftest"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL")
    assert backends.active() is before

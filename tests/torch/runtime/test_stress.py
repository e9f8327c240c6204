"""Threads, switching, Monte Carlo, compiled calls and forks at once: see `stress`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ...cases import ROOT

pytest.importorskip("torch")


@pytest.mark.slow("test_switching_beside_a_thread_that_drops")
def test_any_number_of_threads_gets_what_one_gets():
    ended = subprocess.run(
        [sys.executable, "-m", "tests.stress", "--seconds", "20"], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr

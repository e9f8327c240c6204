"""Threads, switching, Monte Carlo, compiled calls and forks at once: see `stress`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")


def test_any_number_of_threads_gets_what_one_gets():
    script = Path(__file__).with_name("stress.py")
    ended = subprocess.run(
        [sys.executable, str(script), "--seconds", "20"], capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr

"""What README shows runs, and prints what it says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_code_runs_as_shown(block, capsys):
    exec(compile(block, str(README), "exec"), {})
    promised = re.findall(r"print\(.*\)\s*# (.*)", block)
    assert promised
    assert capsys.readouterr().out.splitlines() == promised

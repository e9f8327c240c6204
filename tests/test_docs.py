"""The code in README and in the pages of the documentation runs, and prints what its comments say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_documentation_runs_as_shown(block, capsys):
    exec(compile(block, "documentation", "exec"), {})
    promised = re.findall(r"print\(.*\)  # (.*)", block)
    assert promised
    assert capsys.readouterr().out.splitlines() == promised

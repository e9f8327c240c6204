"""The code in README and in the pages of the documentation runs, and prints what its comments say."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_LINKS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "bench" / "results").rglob("*.md")]
MADE_LATER = {ROOT / "docs/api/index.md"}  # by `make docs`
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


def test_picture_of_the_kinds_is_what_its_script_draws():
    script = runpy.run_path(str(ROOT / "docs/kinds_picture.py"))
    assert script["PICTURE"].read_text() == script["picture"]()


def anchors(page):
    """The names of a page's headings, as code hosts and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_lead_to_files_and_headings():
    broken = []
    for page in WITH_LINKS:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
            target = (page.parent / path).resolve() if path else page
            there = target in MADE_LATER or (target.exists() and (not anchor or anchor in anchors(target)))
            if not there:
                broken.append(f"{page.relative_to(ROOT)}: {path}#{anchor}")
    assert not broken

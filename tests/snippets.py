"""Writes each python block of README and docs to a file of its own, which `make lint` checks as a user's type checker.

Run as ``python -m tests.snippets FOLDER``. The check is that of strict mypy, with exceptions that do not concern
fastdrop: a block's own functions may lack annotations, and it may do what torch's types forbid: read ``.grad``, which
may be None, and add to a parameter in place.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = """\
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, no-warn-unused-ignores
# mypy: disable-error-code=misc
"""
READS_GRAD = re.compile(r"^(.*\.grad\b[^#\n]*).*$", re.M)


def write(folder: Path) -> None:
    """Writes the blocks. Blank lines stand for the text before a block, so that an error names the page's line."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.py"):
        old.unlink()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        for i, block in enumerate(re.finditer(r"```python\n(.*?)```", text, re.S)):
            lines_before = text.count("\n", 0, block.start(1))
            code = READS_GRAD.sub(r"\1  # type: ignore[union-attr, operator, misc]", block[1])
            name = f"{page.stem.lower().replace('-', '_')}_{i}.py"
            (folder / name).write_text("\n" * lines_before + code + SETTINGS)


if __name__ == "__main__":
    write(Path(sys.argv[1]))

"""Turns fastdrop's docstrings, which are numpydoc, into the text that Sphinx reads.

napoleon does the work. To napoleon a section ends at the next heading only, but fastdrop's docstrings may have prose
and examples after a section. And napoleon makes links of all types and errors, also of those that are told in words.
"""

import importlib
import re
from typing import Any

from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import NumpyDocstring

SECTIONS = {"Parameters", "Attributes", "Returns", "Yields", "Raises", "Warns"}


PUBLIC = ("fastdrop.torch", "fastdrop.schedules", "fastdrop")
CONFIG: Any = Config(
    napoleon_use_param=False,
    napoleon_use_rtype=False,
    napoleon_custom_sections=[("Raises", "returns_style"), ("Attributes", "params_style")],
)


def process(app: Any, what: Any, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Rewrites a docstring in place, as the event "autodoc-process-docstring" asks for."""
    lines[:] = [linked(line, name) for line in lines]
    if what not in {"property", "attribute"}:  # these have no sections, and napoleon takes a colon for a type's end
        lines[:] = str(NumpyDocstring(end_sections(lines), CONFIG, app, what, name, obj, options)).splitlines()


def linked(line: str, name: str) -> str:
    """Makes links of the names in single backticks that are fastdrop's public ones, and code of the others."""

    def role(match: re.Match[str]) -> str:
        word = match[1]
        for full in (word, f"{home}.{word}"):
            module, _, attribute = full.rpartition(".")
            if module in PUBLIC and attribute in importlib.import_module(module).__all__:
                return f":py:obj:`{word} <{full}>`"
        return f"``{word}``"

    home = next((module for module in PUBLIC if name.startswith(f"{module}.")), "fastdrop")
    return re.sub(r"(?<![`:\w])`([^`]+)`(?!`)", role, line)


def end_sections(lines: list[str]) -> list[str]:
    """The lines, with a heading before prose and before examples that follow a section."""
    section = ""
    out: list[str] = []
    for i, line in enumerate(lines):
        following = lines[i + 1] if i + 1 < len(lines) else ""
        heading = ""
        if re.fullmatch("-{3,}", following) and line.strip():
            section = line.strip()
        elif section in SECTIONS and starts_paragraph(lines, i):
            heading = "Examples" if line.startswith(">>>") else "Notes"
        elif section == "Notes" and line.startswith(">>>"):
            heading = "Examples"
        if heading:
            section = heading
            out += ["", heading, "-" * len(heading), ""]
        out.append(line)
    return out


def starts_paragraph(lines: list[str], i: int) -> bool:
    """Whether line i begins a paragraph that is no entry of a section: an entry has an indented line below it."""
    follows_blank = i > 0 and not lines[i - 1].strip()
    has_body = i + 1 < len(lines) and lines[i + 1].startswith(" ")
    return follows_blank and bool(lines[i].strip()) and not lines[i].startswith((" ", "-")) and not has_body

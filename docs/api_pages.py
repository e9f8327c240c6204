"""Writes the pages of the API reference from the public names, before Sphinx reads the pages.

A name belongs to the group that names its module, or the nearest package above it. A name that no group has is a
warning, which `make docs` takes for an error. The pages are in `docs/api`, which git ignores.
"""

import importlib
from pathlib import Path
from typing import Any

from sphinx.util import logging

FOLDER = Path(__file__).parent / "api"

# public module -> groups: file name, title, and the modules below it that define the names of the group
GROUPS = {
    "fastdrop": [
        ("numpy_dropout", "NumPy: dropout", ["arrays"]),
        ("numpy_fused", "NumPy: fused functions", ["arrays.fused", "arrays.fused_rows", "arrays.saved"]),
        ("numpy_masks", "NumPy: masks, random state, parts", ["core"]),
        ("backends", "Backends and threads", ["backends"]),
    ],
    "fastdrop.torch": [
        ("torch_models", "torch: whole models", ["models"]),
        ("torch_modules", "torch: modules", ["nn"]),
        (
            "torch_fused",
            "torch: fused functions",
            ["functional.fused", "functional.gated", "functional.attention", "functional.lora"],
        ),
        ("torch_functions", "torch: functions", ["functional"]),
        ("torch_tools", "torch: uncertainty, seeds, rates, checks", ["tools"]),
    ],
    "fastdrop.schedules": [("schedules", "Schedules", [""])],
    "fastdrop.integrations.transformers": [("transformers", "Callback for transformers", [""])],
    "fastdrop.integrations.lightning": [("lightning", "Callback for Lightning", [""])],
}
# what a module has for torch, or a callback for its trainer, and no user calls
HIDDEN = (
    "forward, drop_input, evaluate_input, extra_repr, on_train_begin, on_step_end, on_log, on_train_end, on_fit_start, "
    "on_train_batch_start, on_exception, teardown"
)

logger = logging.getLogger(__name__)


def write(app: Any = None) -> None:
    """Writes one page for each group and an index of all names; touches only files that change."""
    pages = {}
    index = ["# API reference", ""]
    for module, groups in GROUPS.items():
        members = by_group(module, groups)
        for file, title, _ in groups:
            names = members[file]
            pages[f"{file}.md"] = page(title, module, names)
            index += [f"## [{title}]({file}.md)", "", *rst(".. autosummary::", "   :nosignatures:", "", *names)]
    index += ["```{toctree}", ":hidden:", "", *(name.removesuffix(".md") for name in pages), "```"]
    pages["index.md"] = "\n".join(index) + "\n"
    FOLDER.mkdir(exist_ok=True)
    for stale in set(FOLDER.glob("*.md")) - {FOLDER / name for name in pages}:
        stale.unlink()
    for name, text in pages.items():
        target = FOLDER / name
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


def by_group(module: str, groups: list[tuple[str, str, list[str]]]) -> dict[str, list[str]]:
    """The full names of a module's public objects, by the file of their group."""
    public = importlib.import_module(module)
    members: dict[str, list[str]] = {file: [] for file, _, _ in groups}
    for name in public.__all__:
        home = getattr(getattr(public, name), "__module__", None)
        if home is None:  # a module, which has a page of its own
            continue
        fitting = [(len(room), file) for file, _, rooms in groups for room in rooms if lies_in(home, module, room)]
        if fitting:
            members[max(fitting)[1]].append(f"{module}.{name}")
        else:
            logger.warning("%s.%s (of %s) is in no group of docs/api_pages.py", module, name, home)
    return members


def lies_in(home: str, module: str, room: str) -> bool:
    whole = f"{module}.{room}".rstrip(".")
    return home == whole or home.startswith(f"{whole}.")


def page(title: str, module: str, names: list[str]) -> str:
    public = importlib.import_module(module)
    blocks = [f"# {title}", ""]
    if module == "fastdrop.schedules":  # the only module whose own docstring is for users
        blocks += rst(f".. automodule:: {module}")
    for full in names:
        name = full.rsplit(".", 1)[1]
        if isinstance(getattr(public, name), type):
            blocks += rst(f".. autoclass:: {full}", "   :members:", f"   :exclude-members: {HIDDEN}")
        else:
            blocks += rst(f".. autofunction:: {full}")
    return "\n".join(blocks)


def rst(*lines: str) -> list[str]:
    indented = [f"   {line}" if line.startswith("fastdrop.") else line for line in lines]
    return ["```{eval-rst}", *indented, "```", ""]

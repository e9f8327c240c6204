"""Runs a section in a process of its own, so that a failing section does not take the others along.

An error on a GPU ends its process's use of it, and a kernel that hangs can only be killed. So a section's process
writes a row to a file when an item starts and when it ends. After a failure or a crash another process goes on with the
next item.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import device

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 5.0  # for an item that was begun in time
BEGUN = "it was begun and did not end"
Row = dict[str, Any]
NOT_RUN: Row = {"status": "not run", "error": "the section's time was over"}


@dataclass
class Task:
    """What an item gets."""

    dry_run: bool = False
    deadline: float = math.inf  # of the section, by time.monotonic
    remaining: int = 1  # items, this one included
    is_spoiled: bool = False  # for items to set: what comes next needs another process

    @cached_property
    def machine(self) -> Any:
        return device.Host() if self.dry_run else device.Cuda()

    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def share(self, at_most: float) -> float:
        """Seconds to measure for: this item's part of what is left, half of it for preparations."""
        return 0.02 if self.dry_run else max(0.3, min(at_most, self.left() / self.remaining / 2))


Item = Callable[[Task], Any]


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def failed(error: str, details: str = "") -> Row:
    return {"status": "failed", "error": error, "details": details[-6000:]}


def rows(file: Path) -> dict[str, Row]:
    """By item, those whose lines are whole."""
    text = file.read_text() if file.exists() else ""
    return {row["item"]: row for row in map(json.loads, text.rpartition("\n")[0].splitlines())}


def add(file: Path, name: str, row: Row) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps({"item": name, **row}, default=str) + "\n")


def run_items(items: Mapping[str, Item], file: Path, task: Task) -> bool:
    """Runs the items that have no row yet until one fails; returns whether all of them have one now."""
    pending = [name for name in items if name not in rows(file)]
    for k, name in enumerate(pending):
        if task.left() <= 0:
            add(file, name, NOT_RUN)
            continue
        add(file, name, failed(BEGUN))
        task.remaining = len(pending) - k
        try:
            add(file, name, {"status": "ok", "result": items[name](task)})
        except Exception as error:
            add(file, name, failed(one_line(error), traceback.format_exc()))
            task.is_spoiled = True
        if task.is_spoiled:
            return k + 1 == len(pending)
    return True


def run_section(command: Sequence[str], file: Path, seconds: float) -> dict[str, Row]:
    """The items' rows, by as many processes as it takes.

    ``command`` starts a process, given the file and the seconds that are left; its code is 0 when no item is left.
    """
    deadline, code, before = time.monotonic() + seconds, None, -1
    while code != 0 and (left := deadline - time.monotonic()) > 0:
        code, output = run_for([*command, str(file), f"{left:.1f}"], left + GRACE_SECONDS)
        found = rows(file)
        ended = failed(f"the section's process ended with code {code}", output[-3000:])
        for name, row in found.items():
            if row.get("error") == BEGUN:
                add(file, name, NOT_RUN if code is None else ended)
        if not found or (code != 0 and len(found) == before):  # another process would fare no better
            add(file, "process", ended)
            break
        before = len(found)
    return rows(file)


def run_for(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """(code, output) of a command and all that it starts; code None where it had to be killed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]

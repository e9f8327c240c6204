"""Items of work of which none takes the others along.

An error on a GPU ends its process's use of it, and a kernel that hangs can only be killed. So a section's items run in
a process of their own, which leaves a line on disk when an item starts and when it ends; where the process dies, or an
item takes too long, that item has failed and another process goes on with the next. So it does after any failure.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.gpu import device as gpu_device

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 5.0  # for an item that was begun in time
TIME_OVER = "the section's time was over before it ended"


class Skip(Exception):
    """Why there is nothing to do here."""


@dataclass
class Task:
    """What an item gets."""

    dry_run: bool = False
    deadline: float = math.inf  # of the section, by time.monotonic
    remaining: int = 1  # items, this one included
    found: dict[str, dict[str, Any]] = field(default_factory=dict)  # rows of the items before it
    is_spoiled: bool = False  # for items to set: what comes next needs another process

    @cached_property
    def machine(self) -> Any:
        return gpu_device.Host() if self.dry_run else gpu_device.Cuda()

    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def share(self, at_most: float) -> float:
        """Seconds to measure for: this item's part of what is left, half of it for preparations."""
        return 0.02 if self.dry_run else max(0.3, min(at_most, self.left() / self.remaining / 2))


Item = Callable[[Task], Any]


class Lines:
    """Rows of JSON on disk, one per line, whole as soon as they are written."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, row: dict[str, Any]) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(row, default=str) + "\n")

    def read(self) -> list[dict[str, Any]]:
        text = self.file.read_text() if self.file.exists() else ""
        return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]

    def done(self) -> dict[str, dict[str, Any]]:
        return {row["item"]: row for row in self.read() if "item" in row}

    def in_flight(self) -> str | None:
        """The item that was started last, if it hasn't ended."""
        started = [row["start"] for row in self.read() if "start" in row]
        return started[-1] if started and started[-1] not in self.done() else None


def one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:300] + "..."


def failed(error: str, details: str = "") -> dict[str, Any]:
    return {"status": "failed", "error": error, "details": details[-6000:]}


def run_items(items: Mapping[str, Item], lines: Lines, task: Task) -> None:
    """Those that have no row yet, in order, until one fails; ``end`` is the last line where none is left."""
    task.found = lines.done()
    pending = {name: item for name, item in items.items() if name not in task.found}
    for k, (name, item) in enumerate(pending.items()):
        if task.left() <= 0:
            lines.add({"item": name, "status": "not run", "error": "no time was left"})
            continue
        lines.add({"start": name})
        task.remaining = len(pending) - k
        start = time.monotonic()
        try:
            row = {"status": "ok", "result": item(task)}
        except Skip as reason:
            row = {"status": "skipped", "error": str(reason)}
        except Exception as error:
            row = failed(one_line(error), traceback.format_exc())
            task.is_spoiled = True
        task.found[name] = {"item": name, **row, "seconds": round(time.monotonic() - start, 3)}
        lines.add(task.found[name])
        if task.is_spoiled:
            break
    if len(lines.done()) >= len(items):
        lines.add({"end": True})


def run_section(command: Sequence[str], file: Path, seconds: float, limit: float) -> tuple[bool, dict[str, Any]]:
    """(whether all items have had their turn, the items' rows), by as many processes as it takes.

    ``command`` starts one, given the file of lines and the seconds that are left; no item may take more than ``limit``.
    """
    lines, output = Lines(file), file.with_suffix(".log")
    start = time.monotonic()
    ended = False
    while not ended and (left := seconds - (time.monotonic() - start)) > 0:
        before = len(lines.read())
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [*command, str(file), f"{left:.1f}"],
                stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(), start_new_session=True,
            )  # fmt: skip
        try:
            status = _watch(process, lines, limit, start + seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        rows = lines.read()
        ended = bool(rows) and "end" in rows[-1]
        tail = output.read_bytes()[-3000:].decode(errors="replace")
        if (stuck := lines.in_flight()) is not None:
            lines.add({"item": stuck, **failed(status, tail), "status": "not run" if status == TIME_OVER else "failed"})
        elif not ended and len(rows) == before:  # not even one item: another process would fare no better
            lines.add({"item": "process", **failed(status, tail)})
            break
    return ended, lines.done()


def _watch(process: subprocess.Popen[bytes], lines: Lines, limit: float, deadline: float) -> str:
    """Waits for the process; how it ended, or why it has to be ended."""
    count, since = -1, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"its process ended with code {process.wait(0.1)}"
        now = time.monotonic()
        if (length := len(lines.read())) != count:
            count, since = length, now
        if now - since > limit:
            return f"it had not ended after {limit:.0f} s and was killed"
        if now > deadline + GRACE_SECONDS:
            return TIME_OVER


def run_for(command: Sequence[str], seconds: float, more: Mapping[str, str] | None = None) -> tuple[int | None, str]:
    """(code, output) of a command, with ``more`` in its environment; code None where it had to be killed."""
    with tempfile.TemporaryFile() as output:
        where: dict[str, Any] = {"cwd": ROOT, "env": environment() | dict(more or {})}
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=max(1.0, seconds), **where)
            code = done.returncode
        output.seek(0)
        return code, output.read().decode(errors="replace")


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

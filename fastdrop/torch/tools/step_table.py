"""The result of `report`: rows, and how they print as a table in Markdown. `step_report` makes them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from ..models.report import fold, fold_members

__all__ = ["DropoutRow", "StepReport"]

KIB = 1024.0
REACHING = ("enable", "convert", "fuse")  # functions of fastdrop
COLUMNS = ("module", "dropped by", "p", "shape", "forward ms", "backward ms", "step", "kept")
LEFT_ALIGNED = ("module", "dropped by", "shape")


@dataclasses.dataclass(frozen=True)
class DropoutRow:
    """What dropped at one place: in a dropout module, or in a function that a module calls.

    Attributes
    ----------
    path : str
        Of the module; "" is the model itself.
    call : str
        The class of a dropout module, torch's operator, or fastdrop's autograd function.
    line : str
        The file and line that call a function; "" for dropout modules and for modules of torch and fastdrop.
    by : {"fastdrop", "torch"}
        Whose code dropped.
    code : tuple of str
        The kernels of fastdrop, or the operators of torch, that drew and applied the mask.
    fused : bool
        Whether an op of fastdrop computes more than dropout. Then, and for attention, times and bytes are of the whole.
    p : float or None
    shape : tuple of int
        Of the first input.
    runs : int
        How often it dropped in a step.
    forward_ms, backward_ms : float or None
        Medians of a step's total. None where compiled code hides it.
    share : float or None
        Of the time of a step.
    kept_bytes : int or None
        What it kept for backward. None where compiled code hides it.
    reached_by : tuple of str
        Which of "enable", "convert" and "fuse" would make it drop by fastdrop; empty if fastdrop dropped.
    why : str
        Why fastdrop did not drop; "" if it did.
    """

    path: str
    call: str
    line: str
    by: str
    code: tuple[str, ...]
    fused: bool
    p: float | None
    shape: tuple[int, ...]
    runs: int
    forward_ms: float
    backward_ms: float | None
    share: float | None
    kept_bytes: int | None
    reached_by: tuple[str, ...]
    why: str


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What `report` found. It prints as a table in Markdown; equal rows of numbered modules are one line.

    Attributes
    ----------
    header : dict of str
        Versions, backend, instruction set, threads, device, and whether `enable` is on.
    step_ms : float
        The time of a step, forward and backward, without anything that observes it.
    rows : list of DropoutRow
        In the order of their first calls.
    silent : list of (path, reason)
        Dropout modules that dropped nothing.
    notes : list of str
        What could not be seen.
    """

    header: dict[str, str]
    step_ms: float
    rows: list[DropoutRow]
    silent: list[tuple[str, str]]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The same for `json.dumps`.

        Returns
        -------
        dict
            The attributes, in dicts, lists, texts and numbers.
        """
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        parts = [", ".join(f"{name} {value}" for name, value in self.header.items()), self._summary()]
        if self.rows:
            parts.append(_markdown(self.rows))
        parts += self._footnotes()
        for reason in dict.fromkeys(reason for _, reason in self.silent):
            paths = ", ".join(path for (path,) in fold((path,) for path, why in self.silent if why == reason))
            parts.append(f"Dropped nothing, because {reason}: {paths}")
        return "\n\n".join([*parts, *self.notes])

    def _summary(self) -> str:
        if not self.rows:
            return f"A step takes {_digits(self.step_ms)} ms. Nothing dropped."
        calls: Counter[str] = Counter()
        for row in self.rows:
            calls[row.by] += row.runs
        times = [(row.forward_ms, row.backward_ms or 0.0) for row in self.rows]
        known = all(row.kept_bytes is not None for row in self.rows)
        kept = f" and keep {_bytes(sum(row.kept_bytes or 0 for row in self.rows))} for backward" if known else ""
        spent = sum(map(sum, times))
        by = f"fastdrop drops in {calls['fastdrop']} of {sum(calls.values())} calls, torch in {calls['torch']}."
        return f"A step takes {_digits(self.step_ms)} ms; the calls below take {_digits(spent)} ms of it{kept}. {by}"

    def _footnotes(self) -> list[str]:
        torchs = [row for row in self.rows if row.by == "torch"]
        lines = [f"[{i}] {why}" for why, i in _numbers(self.rows).items()]
        calls = sum(row.runs for row in torchs)
        reached = [
            f"fdt.{name}() would reach {count} of {calls} calls"
            for name in REACHING
            if (count := sum(row.runs for row in torchs if name in row.reached_by))
        ]
        return (
            ["\n".join([*lines, "Of what torch drops: " + ", ".join(reached)] if reached else lines)] if lines else []
        )


def _numbers(rows: list[DropoutRow]) -> dict[str, int]:
    """A number for each reason."""
    reasons = dict.fromkeys(row.why for row in rows if row.why)
    return {why: i for i, why in enumerate(reasons, 1)}


def _markdown(rows: list[DropoutRow]) -> str:
    numbers = _numbers(rows)
    alike = [
        (
            row.path,
            row.line,
            _code(row) + (f" [{numbers[row.why]}]" if row.why else ""),
            "" if row.p is None else f"{row.p:g}",
            "x".join(map(str, row.shape)),
        )
        for row in rows
    ]
    lines: list[tuple[str, ...]] = [COLUMNS]
    for path, members in fold_members(alike):
        _, line, *rest = alike[members[0]]
        here = [rows[i] for i in members]
        runs = sum(row.runs for row in here)
        place = f"{path}{f' ({runs}x)' if runs > 1 else ''}" + (f" {line}" if line else "")
        lines.append((place, *rest, *_amounts(here)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [name in LEFT_ALIGNED for name in COLUMNS]
    lines.insert(1, tuple("-" * (width - 1) + "-:"[not at] for width, at in zip(widths, left, strict=True)))
    rows_of_text = (
        [f"{c:<{w}}" if at else f"{c:>{w}}" for c, w, at in zip(x, widths, left, strict=True)] for x in lines
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows_of_text)


def _code(row: DropoutRow) -> str:
    """The code in short: without the parts of names that all of them have."""
    names = [name.removeprefix("aten::").replace("scaled_dot_product_attention", "attention") for name in row.code]
    names = [name.removesuffix("_drawn").removesuffix("_forward") for name in names]
    return f"{row.by}: {', '.join(names)}{' (fused)' * row.fused}"


def _amounts(rows: list[DropoutRow]) -> tuple[str, str, str, str]:
    """The sums of times, shares and bytes of rows; "?" for what is not known."""
    forward, backward, share, kept = (
        None if None in (values := [getattr(row, name) for row in rows]) else sum(values)
        for name in ("forward_ms", "backward_ms", "share", "kept_bytes")
    )
    times = ["?" if each is None else f"{each:.3f}" for each in (forward, backward)]
    return times[0], times[1], "?" if share is None else f"{share:.1%}", "?" if kept is None else _bytes(kept)


def _bytes(n: int) -> str:
    size, unit = float(n), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < KIB:
            break
        size, unit = size / KIB, larger
    return f"{size:.3g} {unit}" if size < 100 else f"{size:.0f} {unit}"


def _digits(ms: float) -> str:
    return f"{ms:.3g}" if ms < 100.0 else f"{ms:.0f}"

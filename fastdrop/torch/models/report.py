"""Reports on a model: a row for each module, printed as a table in which equal rows are one line.

`convert`, `fuse`, `fold_scaling` and the scheduler make a `Report`; `audit` prints its findings by the same functions.
If the rows of ``layer.0.dropout`` to ``layer.11.dropout`` say the same, one line is printed:
``layer.0-11.dropout (12x)``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["MODEL", "Report", "Row", "class_name", "describe", "fold", "fold_and_count", "fold_members", "table"]

NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d*)(?!\d)")
MODEL = "(the model)"  # the path of the model itself, in print

Key = tuple[Any, ...]  # the parts of a path: texts and, at odd positions, sets of numbers
Entry = tuple[Key, tuple[str, ...]]


@dataclass(frozen=True)
class Row:
    """What became of one module. ``after`` is None if the module was left, and ``reason`` says why.

    The ``reason`` of a changed module is empty, or says what could not be found out about it.
    """

    path: str
    before: str
    after: str | None
    reason: str = ""


class Report:
    """What `convert`, `revert`, `fuse`, `unfuse` or `fold_scaling` did to a model, or what a `DropoutScheduler` drives.

    A report prints as a table. Rows that differ only in the numbers in their paths are one line with their count.

    Attributes
    ----------
    rows : list of Row
        One for each module that drops and for each dropout function that a module calls.
    changed, left : list of Row
        Those that were changed, and the others.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    @property
    def changed(self) -> list[Row]:
        """The rows of what was changed."""
        return [row for row in self.rows if row.after is not None]

    @property
    def left(self) -> list[Row]:
        """The rows of what was left as it was."""
        return [row for row in self.rows if row.after is None]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if not self.rows:
            return "no module with dropout"
        return table([("module", "before", "after"), *fold((row.path, row.before, _after(row)) for row in self.rows)])


def _after(row: Row) -> str:
    if row.after is None:
        return f"left: {row.reason}"
    return f"{row.after} ({row.reason})" if row.reason else row.after


def table(lines: Iterable[tuple[str, ...]]) -> str:
    """Lines as text in aligned columns. All lines have the same number of cells; the last column is not padded."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:-1]]
    padded = ([f"{cell:{width}}" for cell, width in zip(line, widths, strict=False)] + [line[-1]] for line in lines)
    return "\n".join("  ".join(cells) for cells in padded)


def fold(lines: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Makes one line of those that are equal but for the numbers in their paths, which are the first cell.

    A folded path stands for exactly the paths that it is made of. Their number is in brackets.

    >>> fold([("a.0.drop", "x"), ("a.1.drop", "x"), ("a.3.drop", "x"), ("a.4.drop", "y"), ("head", "x")])
    [('a.0-1,3.drop (3x)', 'x'), ('a.4.drop', 'y'), ('head', 'x')]
    >>> fold([("a.0.b.0", "x"), ("a.0.b.1", "x"), ("a.1.b.0", "x"), ("a.1.b.1", "x"), ("a.2.b.0", "x")])
    [('a.0-1.b.0-1 (4x)', 'x'), ('a.2.b.0', 'x')]
    """
    return [line for line, _ in fold_and_count(lines)]


def fold_and_count(lines: Iterable[tuple[str, ...]]) -> list[tuple[tuple[str, ...], int]]:
    """The same as `fold`, with how many lines each one stands for."""
    lines = list(lines)
    return [
        ((path + (f" ({len(members)}x)" if len(members) > 1 else ""), *lines[members[0]][1:]), len(members))
        for path, members in fold_members(lines)
    ]


def fold_members(lines: Sequence[tuple[str, ...]]) -> list[tuple[str, list[int]]]:
    """The folded paths of `fold`, with the positions of the lines that each one stands for.

    >>> fold_members([("a.0", "x"), ("b", "x"), ("a.1", "x")])
    [('a.0-1', [0, 2]), ('b', [1])]
    """
    members: dict[Entry, list[int]] = {}
    for i, (path, *rest) in enumerate(lines):
        parts = NUMBER.split(path)
        key = tuple(frozenset([int(part)]) if i % 2 else part for i, part in enumerate(parts))
        members.setdefault((key, tuple(rest)), []).append(i)
    longest = max((len(key) for key, _ in members), default=0)
    for position in range(longest - longest % 2 - 1, 0, -2):
        members = _merge(members, position)
    return [(_path(key), sorted(positions)) for (key, _), positions in members.items()]


def _merge(members: dict[Entry, list[int]], position: int) -> dict[Entry, list[int]]:
    """Makes one entry of those that differ at one position only, in the place of the first of them."""
    groups: dict[object, list[Entry]] = {}
    for key, rest in members:
        groups.setdefault((key[:position], key[position + 1 :], rest), []).append((key, rest))
    merged: dict[Entry, list[int]] = {}
    for entries in groups.values():
        key, rest = entries[0]
        if position < len(key):
            numbers = frozenset[int]().union(*(other[position] for other, _ in entries))
            key = (*key[:position], numbers, *key[position + 1 :])
        merged[key, rest] = [i for entry in entries for i in members[entry]]
    return merged


def _path(key: Key) -> str:
    return "".join(part if isinstance(part, str) else _ranges(sorted(part)) for part in key) or MODEL


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def describe(module: Any) -> str:
    """A module's repr without the modules inside, which would take lines of their own."""
    return f"{type(module).__name__}({module.extra_repr()})"


def class_name(given: type, *others: type | str) -> str:
    """The name of a class, with its module if it has the same name as one of the others."""
    names = {other if isinstance(other, str) else other.__name__ for other in others}
    return f"{given.__module__}.{given.__qualname__}" if given.__name__ in names else given.__name__

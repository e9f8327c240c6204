"""`check_masks`: whether the processes of a job have the parts of one process's masks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...core import checks
from ..runtime.located import LOW_64_BITS
from ..runtime.names import Draw
from ..runtime.seeds import mix
from .named_masks import NamedMasks

__all__ = ["check_masks"]

CHUNK = 1 << 18  # cells that are hashed at a time


class _Seen(NamedTuple):
    """What one process has drawn of a dropout."""

    seed: int
    step: int
    size: int
    samples: list[int] | None
    cells: int
    total: int  # of the cells' hashes


def check_masks(
    masks: NamedMasks, run: Callable[[], Any], expected: Mapping[str, int] | None = None, group: Any = None
) -> dict[str, int]:
    """Runs a pass, and returns a fingerprint of each dropout's mask: a number for its name, the same on all processes.

    A fingerprint is the sum, modulo 2**64, of a hash of each cell of the whole's mask, under the seed and the step that
    decide whether the cell is kept. So a pass in several processes has the fingerprints of the same pass in one, if all
    of them together have each cell once. Processes that have the same cells of a dropout count once.

    Parameters
    ----------
    masks : NamedMasks
    run : callable
        Runs a forward, in one or several blocks of ``masks.at``: the whole batch in one process, or what this process
        has of it. Of a schedule of `torch.distributed.pipelining` it is not the first step, in which stages run once
        more to find out shapes.
    expected : dict of str to int, optional
        What `check_masks` returned for the same batch in one process. Without it a layout that is missing on all
        processes can't be seen: each of them then takes what it has for the whole.
    group : ProcessGroup, optional
        The processes that have the whole together: by default all, if `torch.distributed` is initialised. All of them
        must call this function.

    Returns
    -------
    dict of str to int
        The fingerprint of each dropout, by its name.

    Raises
    ------
    RuntimeError
        On all processes, which names the first dropout in the order of the model that is wrong: its seeds or steps
        differ; cells are missing, or several processes have them, or one has them twice; or its fingerprint is another
        than expected.

    Notes
    -----
    Nothing else is drawn than by ``run``. It takes about 30 ns for each cell of the whole.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), fdt.Dropout(0.5)), torch.randn(6, 4)
    >>> masks = fdt.name_masks(model)
    >>> def run(*batches):
    ...     for samples in batches:
    ...         with masks.at(step=0, samples=samples):
    ...             model(x[list(samples)])
    >>> expected = fdt.check_masks(masks, lambda: run(range(6)))
    >>> expected == fdt.check_masks(masks, lambda: run([5, 1], [0, 2, 3, 4]), expected)
    True
    """
    if not isinstance(masks, NamedMasks):
        raise TypeError(f"masks must be what name_masks returned, but got {type(masks).__name__}")
    checks.function("run", run)
    with masks.watched() as draws:
        run()
    own = _by_name(draws)
    everywhere: list[Any] = [own]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everywhere = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(everywhere, own, group)
    found: dict[str, int] = {}
    for name in dict.fromkeys(name for one in everywhere for name in one):
        found[name] = _fingerprint(name, [one[name] for one in everywhere if name in one])
        if expected is not None and expected.get(name) != found[name]:
            what = "which does not drop there" if name not in expected else "in its cells, its seed or its step"
            raise RuntimeError(
                f"{name} differs from one process's, {what}: look at layouts, samples and what is called"
            )
    if missing := [name for name in expected or () if name not in found]:
        raise RuntimeError(f"{missing[0]} drops in one process, but not here: look at eval() and enable()")
    return found


def _by_name(draws: Iterable[Draw]) -> dict[str, _Seen | str]:
    """What this process has drawn of each dropout, in one or more passes, or what is wrong with it."""
    seen: dict[str, _Seen | str] = {}
    for name, drawn, cells in draws:
        assert isinstance(drawn.seed, int)
        if cells.samples is not None and not len(cells.samples):
            continue  # has no cells, and can't tell how many a sample has
        count, total = _sum(drawn.seed, drawn.offset, _blocks_of(drawn.runs, math.prod(cells.shape)))
        samples = None if cells.samples is None else [*cells.samples]
        one = _Seen(drawn.seed, drawn.offset, cells.size, samples, count, total)
        before = seen.get(name, one)
        if isinstance(before, str) or name not in seen:
            seen[name] = before
        elif before[:3] != one[:3] or (samples is None and before != one):
            seen[name] = "draws from several seeds, steps or wholes in one process: run passes of one step"
        elif samples is not None:  # otherwise one mask is for all samples
            count, total = before.cells + count, before.total + total & LOW_64_BITS
            seen[name] = before._replace(samples=[*(before.samples or ()), *samples], cells=count, total=total)
    return seen


def _fingerprint(name: str, everywhere: list[_Seen | str]) -> int:
    """That of a dropout, of which these processes have cells. Raises if they do not have the whole together."""
    for one in everywhere:
        if isinstance(one, str):
            raise RuntimeError(f"{name} {one}")
    seen = [one for one in everywhere if not isinstance(one, str)]
    first = seen[0]
    for field, what in (("seed", "seeds"), ("step", "steps"), ("size", "sizes of the whole")):
        values = {getattr(one, field) for one in seen}
        if len(values) > 1:
            raise RuntimeError(f"{name} has other {what} in some processes than in others: {sorted(values)}")
    samples = None if first.samples is None else sorted({i for one in seen for i in one.samples or ()})
    whole = _whole(first.seed, first.step, first.size, None if samples is None else tuple(samples))
    parts = {(one.cells, one.total) for one in seen if one.cells}
    count, total = sum(count for count, _ in parts), sum(total for _, total in parts) & LOW_64_BITS
    if (count, total) != whole:
        wrong = "lacks cells" if count < whole[0] else "has cells twice" if count > whole[0] else "has the wrong cells"
        raise RuntimeError(
            f"{name} {wrong}: processes have {count} cells together, and {whole[0]} make up the whole of "
            f"{'all samples' if samples is None else f'{len(samples)} samples'}; look at samples and layouts"
        )
    return total


@functools.lru_cache(maxsize=256)
def _whole(seed: int, step: int, size: int, samples: tuple[int, ...] | None) -> tuple[int, int]:
    """The number of cells of a whole, and the sum of their hashes."""
    return _sum(seed, step, [(sample * size, size) for sample in ((0,) if samples is None else samples)])


def _blocks_of(runs: Any, count: int) -> Iterator[tuple[int, int]]:
    """(first, number) of cells that follow one another."""
    if runs is None:
        yield 0, count
        return
    for run in runs:
        for row in range(run.outer * run.rows):
            outer, inner = divmod(row, run.rows)
            yield run.first + outer * run.outer_pitch + inner * run.pitch, run.columns


def _sum(seed: int, step: int, blocks: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The number of cells, and the sum of their hashes."""
    key, count, total = mix(seed, step), 0, 0
    for cells in _chunks(blocks):
        count += len(cells)
        total += int(mix(key, cells).sum(dtype=np.uint64))
    return count, total & LOW_64_BITS


def _chunks(blocks: Iterable[tuple[int, int]]) -> Iterator[NDArray[np.uint64]]:
    """The cells of blocks, many at a time."""
    waiting: list[NDArray[np.uint64]] = []
    size = 0
    for first, count in blocks:
        for start in range(0, count, CHUNK):
            waiting.append(np.arange(min(CHUNK, count - start), dtype=np.uint64) + np.uint64(first + start))
            size += len(waiting[-1])
            if size >= CHUNK:
                yield np.concatenate(waiting)
                waiting, size = [], 0
    if waiting:
        yield np.concatenate(waiting)

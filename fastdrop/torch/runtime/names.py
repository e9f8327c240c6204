"""Named masks: the source of seeds, offsets and cells of models that `tools.named_masks` has named.

A dropout asks `draw` here before it asks torch's generator. Hooks on the modules of a named model keep a stack of the
modules that run, by thread. A dropout's seed is a hash of the model's seed, the name of the innermost of these modules,
the number of that module's call in the pass, and the number of the dropout in the call. Its offset is the step. Its
cells are those of its samples among all samples, so they are the same in whichever process a sample is.

A checkpoint that runs in forward writes down what its dropouts drew from. In backward, perhaps in another thread and
after the pass, they get the same again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...core.part import Part, Parts, Run, parts_of
from ...core.samples import sample_runs
from . import context, layouts, located, seeds, traced_names
from .dispatch import hide_from_dynamo
from .dispatch.checkpoints import checkpoints_around, is_computed_again, may_be_checkpointed
from .dispatch.compilers import cache_graphs
from .dispatch.modules import MAY_BE_LEFT_OUT
from .located import Located

__all__ = [
    "Cells",
    "Draw",
    "NamedModule",
    "Names",
    "Scope",
    "are_in_force",
    "are_used",
    "draw",
    "draw_traced",
    "largest_axis",
    "note_axis",
    "note_users",
    "uncounted",
]

are_used = False  # whether any model has names: most calls of dropout read this and look no further
largest_axis = 0  # of samples, in any model
_users, _cached = 0, True
_numbers = itertools.count()
_lock = threading.Lock()

Shape = tuple[int, ...]
Layout = Any  # which part of the whole the data of a shape is: what `layouts.resolve` knows

CACHED = 64  # samples of batches, and for each of them as many shapes times 16
LOG = "_fastdrop_names"  # on a checkpoint: what the dropouts in it drew from


def note_users(more: int) -> None:
    """Counts the models that have names. Graphs of their code have the names of modules, so they are not cached."""
    global are_used, _users, _cached
    with _lock:
        _users += more
        if are_used != (_users > 0):
            are_used = _users > 0
            if are_used:
                _cached = cache_graphs(False)
            else:
                cache_graphs(_cached)


def note_axis(axis: int) -> None:
    """Has compiled code have room for samples along an axis."""
    global largest_axis
    largest_axis = max(largest_axis, axis)


class _Thread(threading.local):
    """The modules that run in a thread, outermost first."""

    def __init__(self) -> None:
        self.running: list[_Call] = []
        self.passes: list[Scope] = []


class _Call:
    """A call of a module. It gets its number in the pass when it first drops."""

    __slots__ = ("drops", "module", "number")

    def __init__(self, module: NamedModule) -> None:
        self.module, self.number, self.drops = module, -1, 0

    @property
    def name(self) -> str:
        """That of its last dropout."""
        call = f", call {self.number + 1}" if self.number else ""
        return f"{self.module}{call}" + (f", dropout {self.drops}" if self.drops > 1 else "")


_thread = _Thread()


class Scope:
    """A pass: its step, the global numbers of its samples, and how often each module has dropped in it."""

    def __init__(self, step: int, samples: Sequence[int] | None, cells: dict[Any, Any]) -> None:
        self.step, self.samples, self.cells = step, samples, cells
        self.calls: dict[str, int] = {}
        self.numbers: dict[str, int] = {}  # of the last call of each module, by key
        self.depth = len(_thread.running)


class Cells(NamedTuple):
    """The cells of a dropout's data. Without ``samples`` its mask is one for all of them."""

    runs: tuple[Run, ...] | None  # None: all that the mask has
    shape: Shape  # of the mask
    samples: Sequence[int] | None
    size: int  # of the whole: the number of cells of a sample, or of the mask for all


class Draw(NamedTuple):
    """What one dropout drew from, for those who watch."""

    name: str
    drawn: Located
    cells: Cells


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """A block whose calls of modules don't count in the passes that this thread is in."""
    before = [(scope, scope.calls.copy(), scope.numbers.copy()) for scope in _thread.passes]
    try:
        yield
    finally:
        for scope, calls, numbers in before:
            scope.calls, scope.numbers = calls, numbers


class Names:
    """What the hooks of one model share."""

    def __init__(self, seed: int) -> None:
        self.seed, self.warns = seed, True
        self.number = next(_numbers)  # of the model among those of the process
        self.watch: Callable[[Draw], None] | None = None
        self._open = threading.local()
        self._cells: dict[Any, dict[Any, Any]] = {}

    def scope(self) -> Scope | None:
        """The innermost pass of this thread."""
        scopes = getattr(self._open, "scopes", None)
        return scopes[-1] if scopes else None

    def open(self, step: int, samples: Sequence[int] | None) -> Scope:
        if len(self._cells) > CACHED:
            self._cells.clear()
        scope = Scope(step, samples, self._cells.setdefault(samples, {}))
        self._open.__dict__.setdefault("scopes", []).append(scope)
        _thread.passes.append(scope)
        return scope

    def close(self, scope: Scope) -> None:
        """Also after an exception that kept hooks from being called."""
        self._open.scopes.remove(scope)
        _thread.passes.remove(scope)
        del _thread.running[scope.depth :]


class NamedModule:
    """The hooks of one module. A copy of the module, or what is read from its pickle, gets some that do nothing."""

    def __init__(self, names: Names | None, name: str, axis: int, layout: Layout, drops_torchs: bool) -> None:
        self.names, self.name, self.axis, self.layout = names, name, axis, layout
        self.drops_torchs = drops_torchs
        self.key = "" if names is None else f"{names.number}: {name}"
        self.hash = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        self._seeds: dict[tuple[int, int, int], int] = {}

    def __str__(self) -> str:
        return self.name or "the model itself"

    def __reduce__(self) -> Any:
        return NamedModule, (None, "", 0, None, False)

    def enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # `traced_names` knows compiled calls
            traced_names.guard_by(self.key)
            return
        if self.names is None:
            return
        if self.drops_torchs and self.names.warns and module.training and not context.is_enabled():
            self._warn(module)
        _thread.running.append(_Call(self))

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if torch.compiler.is_compiling() or self.names is None:
            return
        running = _thread.running
        for i in range(len(running) - 1, -1, -1):
            if running[i].module is self:
                del running[i:]
                return

    enter.__dict__[MAY_BE_LEFT_OUT] = leave.__dict__[MAY_BE_LEFT_OUT] = True

    def _warn(self, module: Any) -> None:
        rate = getattr(module, "p", getattr(module, "dropout", 0.0))
        if rate and self.names is not None:
            self.names.warns = False
            warnings.warn(
                f"{self} ({type(module).__name__}) drops by torch's generator, which knows no names: call "
                "fastdrop.torch.enable() or convert(model)",
                stacklevel=4,
            )

    def seed(self, number: int, order: int) -> int:
        """The seed of the dropout of this order in the module's call of this number."""
        assert self.names is not None
        key = self.names.seed, number, order
        if key not in self._seeds:
            if len(self._seeds) > 16 * CACHED:
                self._seeds.clear()
            own = seeds.mix(seeds.mix(self.names.seed, self.hash), number)
            self._seeds[key] = seeds.mix(own, order)
        return self._seeds[key]


def draw(shape: Shape, shared: Any, part: Any, starts_with_samples: bool) -> Located | None:
    """What a dropout is to draw from whose mask is for data of a shape. None if it is in no named model, or if Monte
    Carlo has seeds of its own.

    ``shared`` has 1 on axes along which elements share decisions, and ``part`` is what the caller gave. Axis 0 has the
    samples, whatever the module, if ``starts_with_samples``.
    """
    if seeds.sample_seeds() is not None:
        return None
    return _drawn((shape, shared, part, starts_with_samples), _innermost)


def draw_traced(
    shape: Shape, shared: Any, part: Any, starts_with_samples: bool, key: str, order: int
) -> Located | None:
    """`draw` for the dropout of this order in a call of the module of a key, which is compiled."""
    if seeds.sample_seeds() is not None:
        return None

    def call() -> tuple[_Call | None, Scope | None]:
        module = traced_names.module_of(key)
        if module is None:
            return None, None
        scope = module.names.scope()
        traced = _Call(module)
        if scope is not None and order > 1:
            traced.number, traced.drops = scope.numbers.get(key, -1), order - 1
        return traced, scope

    if key != traced_names.OF_SOME_CALL:
        return _drawn((shape, shared, part, starts_with_samples), call)
    if not _thread.running and _thread.passes and not is_computed_again():
        raise RuntimeError(
            "a dropout of compiled code has no name, because it is in no module: compile with fullgraph=True, or give "
            "it a seed"
        )
    return _drawn((shape, shared, part, starts_with_samples), _innermost)


def _drawn(data: tuple[Shape, Any, Any, bool], find: Callable[[], tuple[_Call | None, Scope | None]]) -> Located | None:
    """What a checkpoint in backward noted in forward, or else a new mask for the call that ``find`` gives."""
    logs: list[_Log] = []
    if may_be_checkpointed():
        for checkpoint, again in checkpoints_around():
            log: _Log | None = getattr(checkpoint, LOG, None)
            if again is not None:
                if log is not None:
                    return _noted(log.next(again, data[0]), data[0], logs)
                break
            if log is None:
                log = _Log()
                setattr(checkpoint, LOG, log)
            logs.append(log)
    call, scope = find()
    if call is None:
        return _noted(None, data[0], logs)
    if is_computed_again():
        raise RuntimeError(f"a checkpoint computes {call.module} again, but ran without it before")
    if scope is None:
        raise RuntimeError(
            f"{call.module} drops in a model with named masks, but outside of a block of masks.at(step, samples)"
        )
    return _noted(_fresh(call, scope, data), data[0], logs)


def are_in_force() -> bool:
    """Whether a module of a named model runs in this thread."""
    return bool(_thread.running)


def layout() -> Layout:
    """That of the module that runs, if its model has names."""
    call, _ = _innermost()
    return None if call is None else call.module.layout


def _innermost() -> tuple[_Call | None, Scope | None]:
    """The innermost call of a module whose model is in a pass, or else of any."""
    running = _thread.running
    for call in reversed(running):
        scope = call.module.names.scope()  # type: ignore[union-attr]
        if scope is not None:
            return call, scope
    return (running[-1], None) if running else (None, None)


def _fresh(call: _Call, scope: Scope, data: tuple[Shape, Any, Any, bool]) -> Located:
    module = call.module
    cells = _cells(scope, module, *data)  # found good or bad before anything is counted
    if call.number < 0:
        call.number = scope.numbers[module.key] = scope.calls.get(module.name, 0)
        scope.calls[module.name] = call.number + 1
    call.drops += 1
    drawn = Located(module.seed(call.number, call.drops), scope.step, cells.runs)
    watch = module.names.watch  # type: ignore[union-attr]
    if watch is not None:
        watch(Draw(call.name, drawn, cells))
    return drawn


# ---- checkpoints ----


class _Log:
    """What the dropouts in a checkpoint drew from, in their order."""

    def __init__(self) -> None:
        self.entries: list[tuple[Shape, Located | None]] = []
        self.again: Any = None
        self.position = 0

    def next(self, again: Any, shape: Shape) -> Located | None:
        if again is not self.again and again != self.again:
            self.again, self.position = again, 0
        if self.position == len(self.entries):
            running = _thread.running
            where = running[-1].module if running else "a function"
            raise RuntimeError(f"a checkpoint computes {where} again, and it drops more often than in forward")
        had, drawn = self.entries[self.position]
        if had != shape:
            raise RuntimeError(f"a checkpoint computes a dropout again, of shape {shape} and not {had} as in forward")
        self.position += 1
        return drawn


def _noted(drawn: Located | None, shape: Shape, logs: list[_Log]) -> Located | None:
    for log in logs:
        log.entries.append((shape, drawn))
    return drawn


# ---- cells ----


def _cells(scope: Scope, module: NamedModule, shape: Shape, shared: Any, part: Any, starts_with_samples: bool) -> Cells:
    axis: int | None = 0 if starts_with_samples else module.axis
    if isinstance(part, located.Weights):
        part, axis = part.part, None
    if part is None:
        part = module.layout
    if isinstance(part, torch.Tensor):
        if axis is not None and scope.samples not in (None, range(len(scope.samples or ()))):
            raise RuntimeError(
                f"{module} drops a part whose cells are a tensor, as compiled code has those of DTensors: give "
                "masks.at() no samples, or a layout to name_masks"
            )
        runs = located.runs_of(part, shape, shared)
        return Cells(runs, shape, None, sum(run.cells for run in runs))
    key = shape, shared, tuple(part) if isinstance(part, list) else part, axis
    try:
        return scope.cells[key]  # type: ignore[no-any-return]
    except KeyError:
        pass
    if len(scope.cells) > 16 * CACHED:
        scope.cells.clear()
    cells = scope.cells[key] = _compute_cells(module, scope.samples, *key)
    return cells


def _compute_cells(
    module: NamedModule, samples: Sequence[int] | None, shape: Shape, shared: Any, part: Any, axis: int | None
) -> Cells:
    """``axis`` is that of samples, if there is one."""
    parts: Parts = ()
    if part is not None:
        part = layouts.resolve(part, shape)
        if isinstance(part, Part) and shared is None and axis == 0 and _has_as_many(part, shape):
            shape = part.local
        parts = parts_of(part, shape)
    shares = (False,) * len(shape) if shared is None else tuple(extent == 1 for extent in shared)
    own = tuple(1 if one else extent for one, extent in zip(shares, shape, strict=True))
    whole = tuple(1 if one else extent for one, extent in zip(shares, parts[0].shape if parts else shape, strict=True))
    has_axis = axis is not None and axis < len(shape)
    if axis is None or (has_axis and shares[axis]) or (samples is None and not has_axis):
        runs = located.runs_of(parts, shape, shared) if parts else None
        return Cells(runs, own, None, math.prod(whole))  # in C order of the whole
    if samples is None:
        start = parts[0].start[axis] if parts else 0
        samples = range(start, start + shape[axis])
    _check_samples(module, shape, axis, len(samples))
    of_sample = math.prod(whole[:axis] + whole[axis + 1 :]) * (shape[axis] // (len(samples) or 1))
    if samples == range(len(samples)) and axis == 0 and not parts:
        return Cells(None, own, samples, of_sample)
    return Cells(tuple(sample_runs(samples, shape, axis, shares, parts)), own, samples, of_sample)


def _has_as_many(part: Part, shape: Shape) -> bool:
    """Whether a part has as many elements as data of another shape, such as one that takes batch and heads together."""
    return len(part.local) != len(shape) and math.prod(part.local) == math.prod(shape)


def _check_samples(module: NamedModule, shape: Shape, axis: int, count: int) -> None:
    extent = shape[axis] if axis < len(shape) else None
    if extent is None or (extent % count if count else extent):
        raise ValueError(
            f"{module} drops data of shape {shape}, whose axis {axis} must have a multiple of the {count} samples: "
            "give name_masks a sample_axis, or at() the samples of this data"
        )


# Where a module's forward alone is compiled, its hooks run as they are.
hide_from_dynamo(NamedModule.enter, NamedModule.leave)

"""Runs a compiled PTX kernel: all threads of many blocks advance together, an instruction at a time.

A register is an array with an element per thread. When threads diverge, those at the lowest program counter run, and so
structured code comes together again. Threads that reach a warp instruction wait there for their warp; threads that
reach a barrier wait for their block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .memory import WIDEST, Fault, Memory, Selection, Window, round_up
from .program import LANES, Program

THREADS_AT_ONCE = 8192  # registers of more would leave the cache
POISON = {size: int("A5" * size, 16) for size in (1, 2, 4, 8)}  # what registers hold that nothing was written to


def _selection(ids: NDArray[np.intp]) -> Selection:
    """None for nobody."""
    if not len(ids):
        return None
    return slice(int(ids[0]), int(ids[-1]) + 1) if ids[-1] - ids[0] + 1 == len(ids) else ids


class Threads:
    """Some blocks of a launch, in ``groups`` by program counter. Blocks are padded with lanes that never live."""

    def __init__(
        self, program: Program, window: Window, parameters: bytes, grid: tuple[int, int], blocks: range
    ) -> None:
        self.program, self.window, self.parameters = program, window, parameters
        self.padded = round_up(grid[1], LANES)
        self.first, self.ids = blocks.start * self.padded, np.arange(len(blocks) * self.padded)
        block, thread = np.divmod(self.ids, self.padded)
        self.alive = thread < grid[1]
        self.here = np.zeros_like(self.alive)  # at the warp instruction that runs
        self.groups: dict[int, Selection] = {0: _selection(self.ids[self.alive])}
        self.parked: dict[int, Selection] = {}  # waiting for lanes
        self.current = program.instructions[0]
        n = len(self.ids)
        files = [np.full(n, POISON[dtype.itemsize] if dtype.kind == "u" else 0, dtype) for dtype in program.dtypes]
        special = {"%tid.x": thread, "%laneid": thread % LANES, "%ctaid.x": block + blocks.start}
        special |= {"%ntid.x": np.array(grid[1]), "%nctaid.x": np.array(grid[0])}
        for name, register in program.special.items():
            files[register.number][:] = special[name]
        self.registers = [files[number].view(dtype) for number, dtype in program.slots]
        if program.shared_bytes:
            apart = round_up(program.shared_bytes, WIDEST) + 4 * WIDEST
            room = np.full((len(blocks) + 1) * apart, POISON[1], np.uint8)
            start = -room.ctypes.data % WIDEST
            self.of_blocks = room[start:][: len(blocks) * apart].reshape(-1, apart)[:, : program.shared_bytes]
            self.shared = Window(Memory(self.of_blocks), program.granule)

    def space(self, name: str, at: Selection, address: Any) -> tuple[Window, Any]:
        """The memory of a state space, and where these threads' addresses are there."""
        if name != "shared":
            return self.window, address
        within = np.minimum(address, np.uint64(self.of_blocks.shape[1]))  # there it lies in no array
        return self.shared, self.shared.starts[self.ids[at] // self.padded] + within

    def meet(self, at: Selection) -> None:
        """Whole blocks have come to a barrier."""
        if self.program.shared_bytes:
            for block in np.unique(self.ids[at] // self.padded).tolist():
                self.shared.forget(block)

    def name(self, thread: int) -> str:
        return f"thread {thread % self.padded} of block {thread // self.padded}"

    def fail(self, error: type[Exception], what: str, at: Selection, flags: Any = slice(None)) -> NoReturn:
        raise error(f"{what}, by {self.name(self.first + int(self.ids[at][flags][0]))}, at: {self.current.text}")

    def any_of_warp(self, at: Selection, flags: Any) -> Any:
        """For each of the threads, whether a lane of its warp raises its flag."""
        raised = np.zeros(len(self.ids), bool)
        raised[at] = flags
        return raised.reshape(-1, LANES).any(axis=1)[self.ids[at] // LANES]

    def run(self, executed: NDArray[np.int64], steps: int) -> None:
        instructions = self.program.instructions
        while self.groups:
            pc = min(self.groups)
            at = self.groups.pop(pc)
            if not (steps := steps - 1):
                self.fail(Fault, "still running", at)
            stop = min((other for other in (*self.groups, *self.parked) if other > pc), default=len(instructions))
            warps = self._warps(at)
            while pc < stop:
                self.current = instruction = instructions[pc]
                if instruction.kind != "plain":
                    self._control(pc, at, executed)
                    break
                executed[pc] += warps
                chosen, _ = self._guarded(at)
                if chosen is not None:
                    instruction.run(self, chosen)
                pc += 1
            else:
                self._arrive(pc, at)
        for pc, at in self.parked.items():
            self.current = instructions[pc]
            who = "threads of the block" if self.current.kind == "block" else "lanes of the warp"
            self.fail(Fault, f"{who} never come here", at)

    def _control(self, pc: int, at: Selection, executed: NDArray[np.int64]) -> None:
        instruction = self.current
        chosen, rest = self._guarded(at)
        if rest is not None:
            self._arrive(pc + 1, rest)
        if instruction.kind in ("warp", "block") and chosen is not None:
            if instruction.kind == "warp":
                absent = self._absent(chosen, LANES, but=self._leaving())
            else:
                absent = self._absent(chosen, self.padded)
            waiting, chosen = self._split(chosen, absent)
            if waiting is not None:
                self.parked[pc] = waiting
        executed[pc] += self._warps(self._joined(chosen, rest))
        if chosen is None:
            return
        if instruction.kind == "exit":
            self.alive[chosen] = False
        else:
            instruction.run(self, chosen)
            self._arrive(instruction.target if instruction.kind == "branch" else pc + 1, chosen)

    def _arrive(self, pc: int, at: Selection) -> None:
        for others in (self.groups, self.parked):
            at = self._joined(at, others.pop(pc, None))
        self.groups[pc] = at

    def _joined(self, a: Selection, b: Selection) -> Selection:
        if a is None or b is None:
            return b if a is None else a
        return _selection(np.sort(np.concatenate((self.ids[a], self.ids[b]))))

    def _guarded(self, at: Selection) -> tuple[Selection, Selection]:
        guard = self.current.guard
        return (at, None) if guard is None else self._split(at, guard(self, at))

    def _split(self, at: Selection, flags: Any) -> tuple[Selection, Selection]:
        if flags.all():
            return at, None
        return _selection(self.ids[at][flags]), _selection(self.ids[at][~flags])

    def _warps(self, at: Selection) -> int:
        if at is None:
            return 0
        warps = self.ids[at] // LANES
        return 1 + int(np.count_nonzero(warps[1:] != warps[:-1]))

    def _ends(self, pc: int) -> bool:
        seen: set[int] = set()
        instruction = self.program.instructions[pc]
        while instruction.kind == "branch" and instruction.guard is None and instruction.target not in seen:
            seen.add(instruction.target)
            instruction = self.program.instructions[instruction.target]
        return instruction.kind == "exit" and instruction.guard is None

    def _absent(self, at: Selection, size: int, but: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """Which of these threads lack others of their warp, or block, of this size that live; ``but`` don't count."""
        self.here[:] = False
        self.here[at] = True
        absent = self.alive & ~self.here
        if but is not None:
            absent &= ~but
        return np.take(absent.reshape(-1, size).any(axis=1), self.ids[at] // size)

    def _leaving(self) -> NDArray[np.bool_]:
        """Threads that have nothing before them but the end."""
        leaving = np.zeros_like(self.alive)
        for pc, at in self.groups.items():
            if self._ends(pc):
                leaving[at] = True
        return leaving


class Machine:
    """Runs kernels over arrays. ``steps`` ends runaway loops; it counts stretches without a branch."""

    def __init__(self, arrays: Iterable[NDArray[Any]], steps: int = 1_000_000) -> None:
        self.memory, self.steps = Memory(arrays), steps

    def launch(self, ptx: str, blocks: int, threads_per_block: int, parameters: bytes) -> Counter[str]:
        """Warp instructions executed, by opcode: one for each warp that comes to an instruction, whatever its guard.

        ``parameters`` as CU_LAUNCH_PARAM_BUFFER_POINTER takes them: each at its natural alignment.
        """
        program = _program(ptx)
        if not program.parameter_bytes <= len(parameters) <= round_up(program.parameter_bytes, 8):
            raise ValueError(f"the kernel has {program.parameter_bytes} bytes of parameters, but got {len(parameters)}")
        window = Window(self.memory, program.granule)
        executed = np.zeros(len(program.instructions), np.int64)
        at_once = max(1, THREADS_AT_ONCE // threads_per_block)
        with np.errstate(all="ignore"):
            for first in range(0, blocks, at_once):
                some = range(first, min(first + at_once, blocks))
                Threads(program, window, parameters, (blocks, threads_per_block), some).run(executed, self.steps)
        counts: Counter[str] = Counter()
        for instruction, times in zip(program.instructions, executed.tolist(), strict=True):
            counts[instruction.opcode] += times
        return +counts


_program = lru_cache(maxsize=256)(Program)

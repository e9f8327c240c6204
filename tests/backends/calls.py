"""A call of a primitive on arrays between guards: what the contract tests of the primitives are made of."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdrop.backends.primitives import PRIMITIVES

from ..cases import Guarded, assert_same_bits

Results = dict[str, np.ndarray]


class AtPage:
    """An array that begins where a page ends that may not be touched, or ends where one begins (`AtPageEnd`)."""

    last = False
    intact = True  # otherwise the process is dead

    def __init__(self, n: int, dtype: type, shift: int = 0) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        page, size, no_access = mmap.PAGESIZE, n * np.dtype(dtype).itemsize, 0
        room = -(-size // page) * page
        memory = np.frombuffer(mmap.mmap(-1, room + page), np.uint8)
        forbidden = memory.ctypes.data + (room if self.last else 0)
        assert libc.mprotect(ctypes.c_void_p(forbidden), page, no_access) == 0
        start = room - size if self.last else page
        self.array = memory[start : start + size].view(dtype)


class AtPageEnd(AtPage):
    last = True


@dataclass(frozen=True, eq=False)
class Call:
    """A primitive's arguments. Of outputs it has the number of elements and their type; an array in neither is None."""

    op: str
    inputs: Results
    outputs: dict[str, tuple[int, type]]
    numbers: dict[str, Any]

    def arrays(
        self,
        *,
        shifts: tuple[int, ...] = (0,),
        over: dict[str, str] | None = None,
        memory: Callable[..., Any] = Guarded,
    ) -> dict[str, Any]:
        """Guarded arrays, each so many bytes past a cache line. Outputs start as NaN, or are the input that ``over``
        names."""
        found = {}
        names = [parameter.name for parameter in PRIMITIVES[self.op].parameters if parameter.is_array]
        for i, name in enumerate(names):
            shift = shifts[i % len(shifts)]
            if name in self.inputs:
                values = self.inputs[name]
                found[name] = memory(values.size, values.dtype.type, shift)
                found[name].array[:] = values
            elif name in self.outputs:
                found[name] = memory(*self.outputs[name], shift)
        return found | {name: found[given] for name, given in (over or {}).items()}

    def on(self, module: Any, arrays: dict[str, Any]) -> None:
        given = {**self.numbers, **{name: guarded.array for name, guarded in arrays.items()}}
        getattr(module, self.op)(*(given.get(name) for name in PRIMITIVES[self.op].names))

    def run(self, module: Any, **layout: Any) -> Results:
        """The outputs. What must not change is checked."""
        arrays = self.arrays(**layout)
        self.on(module, arrays)
        for name, values in self.inputs.items():
            if name not in (layout.get("over") or {}).values():
                assert_same_bits(arrays[name].array, values, (name, self))
        assert all(guarded.intact for guarded in arrays.values()), self
        return {name: arrays[name].array for name in self.outputs}

    def __repr__(self) -> str:
        return f"{self.op} {self.numbers} of {', '.join([*self.inputs, *self.outputs])}"


def assert_same_results(results: Results, expected: Results, what: object = "") -> None:
    for name, wanted in expected.items():
        assert_same_bits(results[name], wanted, (name, what))

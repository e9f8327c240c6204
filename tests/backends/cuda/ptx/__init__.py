"""A PTX interpreter in NumPy: runs what Numba compiles for a GPU, over host memory and without a GPU.

The tests of the CUDA kernels launch through it (`gpu_stub`)::

    ptx.Machine([x, y]).launch(text, blocks, threads_per_block, parameters)

It stops at what PTX leaves undefined: memory outside of what was allowed, misaligned addresses, data races, lanes that
never come to a warp instruction or are read though they aren't there, threads that never come to their block's barrier,
division by zero. Races: no two threads may touch a byte that either writes within a launch, whatever orders them,
unless both add atomically; in shared memory, between two barriers.

It knows the instructions that the kernels have; `Unsupported` names the line of another. The two approximate functions
are nearly exact, which a GPU's are not. Lanes may not meet at two different warp instructions, nor threads at two
different barriers, though GPUs let them.
"""

from .arithmetic import DTYPES
from .memory import Fault, Memory, Race
from .program import Unsupported
from .threads import THREADS_AT_ONCE, Machine

__all__ = ["DTYPES", "THREADS_AT_ONCE", "Fault", "Machine", "Memory", "Race", "Unsupported"]

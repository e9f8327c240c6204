"""Chooses the backend that runs, and explains the choice.

Everything that computes calls `active` for the module whose primitives run. ``auto`` chooses the first of C, Numba and
NumPy that can run here. A backend that is asked for by name never falls back to another. Arrays on a GPU always go to
the CUDA backend.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import sys
import warnings
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from . import memory

__all__ = ["active", "explain", "get_num_threads", "reasons", "set_num_threads", "show_config", "use_backend"]

MODULES = {"c": "c", "numba": "numba.launch", "numpy": "reference"}  # best first
CUDA = "cuda"
FILES = {**MODULES, CUDA: "cuda.launch"}
MAX_THREADS = 256
AUTO = "auto"
NO_COMPILER = ("emscripten", "wasi")  # systems for which C is not built

_package = sys.modules[__name__.partition(".")[0]]  # held, because nothing can be imported at the interpreter's exit

_chosen: str | None = None  # by name; None until FASTDROP_BACKEND or use_backend has said which
_module: Any = None  # the module of _chosen, once it is used
_found: Any = None  # the module that the environment or "auto" led to
_num_threads: int | None = None
_has_warned = False


def active() -> Any:
    """The module whose primitives run now."""
    return _module if _module is not None else _resolve()


def drawn() -> Any:
    """C's `drawn`, if C runs: it calls fused forward primitives that draw their mask words. Otherwise None."""
    return getattr(active(), "drawn", None)


def draws() -> bool:
    """Whether the running backend has it."""
    return drawn() is not None


def active_name() -> str:
    """The name of the backend that runs now."""
    module = _running()
    return next(name for name, file in MODULES.items() if module.__name__.endswith("." + file))


def why_numpy() -> str | None:
    """Why NumPy runs though nobody has asked for it by name. None if something else runs, or if somebody has."""
    return reason("c") if active_name() == "numpy" and _chosen == AUTO else None


def is_vectorized() -> bool:
    """Whether the running backend computes with the CPU's vectors. NumPy's kernels and C's scalar ones run anywhere,
    but may be slower than what they replace."""
    name = active_name()
    return name == "numba" or (name == "c" and _running().isa() != "scalar")


def load(name: str) -> ModuleType:
    """A backend by name, usable; RuntimeError with the reason if it is not."""
    why = reason(name)
    if why:
        raise RuntimeError(f"backend {name!r} can't run here: {why}")
    return _module_of(FILES[name])


@functools.cache
def cuda_backend() -> Any:
    """The CUDA backend; RuntimeError with the reason where there is none. Asking the driver takes 80 us: once."""
    return load(CUDA)


def reason(name: str) -> str | None:
    """Why a backend can't run here; None if it can."""
    why: str | None = _module_of(FILES[name]).unavailable()
    return why


def reasons() -> dict[str, str | None]:
    """For each backend, why it can't run here; None where it can."""
    return {name: reason(name) for name in FILES}


@functools.cache  # held: at the interpreter's exit nothing can be imported any more, not even again
def _module_of(file: str) -> ModuleType:
    return importlib.import_module(f".{file}", __name__)


def _resolve() -> Any:
    global _module
    module = _running()
    if _chosen == AUTO:
        _warn_of_fallback()
    module.set_num_threads(get_num_threads())  # may have changed since the module was found
    if _module is None:  # else another thread has chosen meanwhile
        _module = module
    return module


def _running() -> Any:
    """The module that runs, or would if something was to be computed now."""
    global _chosen, _found
    if _module is not None:
        return _module
    if _chosen is None:
        _chosen, _found = _checked(os.environ.get("FASTDROP_BACKEND", AUTO), "FASTDROP_BACKEND"), None
    if _found is None:
        _found = _loaded(_chosen)
    return _found


def _warn_of_fallback() -> None:
    """Says once, at the first use, that C does not run where it could."""
    global _has_warned
    why, name = reason("c"), active_name()
    if why is None or _has_warned or sys.platform in NO_COMPILER:
        return
    _has_warned = True
    warnings.warn(
        f"fastdrop computes with the backend {name!r}, which is slower than 'c': {why}\nIf it is what you want, choose "
        f"it by fastdrop.use_backend({name!r}) or FASTDROP_BACKEND={name}; then there is no warning",
        RuntimeWarning,
        stacklevel=user_level(),
    )


def user_level() -> int:
    """The ``stacklevel`` with which the caller's warning names the user's line: that outside of fastdrop and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastdrop", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _loaded(name: str) -> Any:
    module: Any = load(_best() if name == AUTO else name)
    if name == CUDA:
        raise ValueError(f"cuda takes arrays on a GPU without being asked; for others choose from {', '.join(MODULES)}")
    module.set_num_threads(get_num_threads())
    return module


def _best() -> str:
    """The first that can run; those after it are not even imported."""
    return next(name for name, file in MODULES.items() if _module_of(file).unavailable() is None)


def _checked(name: str, argument: str) -> str:
    if name not in (AUTO, *FILES):
        raise ValueError(f"{argument} must be one of {', '.join((AUTO, *MODULES))}, but got {name!r}")
    return name


class use_backend:
    """Makes a backend the one that runs, process-wide; as a context manager, until the block ends.

    Parameters
    ----------
    name : {"auto", "c", "numba", "numpy"}
        The environment variable ``FASTDROP_BACKEND`` sets the same at start.

    Raises
    ------
    ValueError
        Unknown name.
    RuntimeError
        The backend can't run here; the message says why and how to get it. Also for "cuda", which can't be chosen: it
        takes arrays on a GPU, and those alone.

    Examples
    --------
    >>> import fastdrop as fd
    >>> with fd.use_backend("numpy"):
    ...     mask = fd.draw_mask(8, 0.5, rng=0)
    >>> mask == fd.draw_mask(8, 0.5, rng=0)
    True
    """

    def __init__(self, name: str) -> None:
        global _chosen, _module
        self._name = _checked(name, "name")
        self._before = (_chosen, _module)
        module = _loaded(name)  # first: other threads go on with the old one until it is there
        _chosen, _module = name, module

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen, _module
        _chosen, _module = self._before
        if _module is not None:
            _module.set_num_threads(get_num_threads())

    def __repr__(self) -> str:
        return f"use_backend({self._name!r})"


def explain() -> str:
    """Which backend runs and, for each, why it was or was not taken.

    Returns
    -------
    str
        A line for each backend.

    Examples
    --------
    >>> import fastdrop as fd
    >>> with fd.use_backend("numpy"):
    ...     print(fd.explain().splitlines()[2])
    numpy: taken, asked for by name
    """
    taken = active_name()
    lines = []
    for name, reason in reasons().items():
        if name == taken:
            why = "taken, the best that can run here" if _chosen == AUTO else "taken, asked for by name"
            why += f"; instruction set {load(name).isa()}" if name == "c" else ""
        elif reason:
            why = f"can't run: {reason}"
        elif name == CUDA:
            why = "takes arrays on a GPU"
        else:
            why = f"could run, but {taken} " + ("is faster" if _chosen == AUTO else "was asked for by name")
        lines.append(f"{name}: {why}")
    return "\n".join(lines)


def set_num_threads(n: int) -> None:
    """Sets how many threads a call may use; never changes a bit of any mask.

    Parameters
    ----------
    n : int
        1 to 256. The environment variable ``FASTDROP_NUM_THREADS`` sets the same at start.

    Raises
    ------
    TypeError, ValueError
        For anything else.

    Examples
    --------
    >>> import fastdrop as fd
    >>> before = fd.get_num_threads()
    >>> fd.set_num_threads(2)
    >>> fd.get_num_threads()
    2
    >>> fd.set_num_threads(before)
    """
    global _num_threads
    if isinstance(n, (bool, np.bool_)) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"n must be an int, but got {type(n).__name__}")
    if not 1 <= n <= MAX_THREADS:
        raise ValueError(f"n, the number of threads, must be from 1 to {MAX_THREADS}, but got {n}")
    _num_threads = int(n)
    if _module is not None:
        _module.set_num_threads(_num_threads)


def get_num_threads() -> int:
    """How many threads a call may use.

    Returns
    -------
    int
        What was set; by default ``FASTDROP_NUM_THREADS``, or the CPUs that this process may run on.

    Raises
    ------
    ValueError
        If ``FASTDROP_NUM_THREADS`` is not a number from 1 to 256.

    Examples
    --------
    >>> import fastdrop as fd
    >>> fd.get_num_threads() >= 1
    True
    """
    global _num_threads
    if _num_threads is None:
        from_environment = os.environ.get("FASTDROP_NUM_THREADS")
        if from_environment is not None:
            if not (from_environment.isdecimal() and 1 <= int(from_environment) <= MAX_THREADS):
                raise ValueError(f"FASTDROP_NUM_THREADS must be from 1 to {MAX_THREADS}, but got {from_environment!r}")
            _num_threads = int(from_environment)
        elif hasattr(os, "sched_getaffinity"):
            _num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        else:
            _num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    return _num_threads


def show_config() -> None:
    """Prints versions, backends, instruction set, threads and the memory policy.

    Examples
    --------
    >>> import fastdrop as fd
    >>> fd.show_config()  # doctest: +ELLIPSIS
    fastdrop ...
    """
    print(f"fastdrop {_package.__version__}, Python {platform.python_version()}, NumPy {np.__version__}")
    print(f"{platform.system()} {platform.machine()}, {get_num_threads()} threads")
    for name, reason in reasons().items():
        mark = "*" if name == active_name() else " "
        print(f"{mark} {name:6} {reason or load(name).describe()}")
    print(f"memory: {memory.describe()}")

"""The C backend: hands arrays, or addresses, to ``fastdrop._native``.

Its primitives are made from the table when they are first asked for (`__getattr__`). Nothing is decided here but the
instruction set: ``FASTDROP_ISA`` forces one by name; a name that is unknown or that this CPU lacks is an error, never a
fallback. The memory policy comes from `memory`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any

from numpy.typing import NDArray

from . import memory
from .generate import function
from .primitives import Parameter, entry_points

_native: Any
try:
    _native = importlib.import_module("fastdrop._native")
except ImportError as error:
    _native = None
    _import_error = str(error)

Array = NDArray[Any]
FOLDER = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
BAD_ARGUMENT, NO_MEMORY = -1, -3  # of csrc/fastdrop.h

if _native is not None:
    _lib: Any = _native.lib
    _address: Any = _native.ffi.from_buffer
    HOW = {"memcpy": _lib.FD_MEMCPY, "ordinary": _lib.FD_ORDINARY, "streaming": _lib.FD_STREAMING}
    HOW["interleaved"] = _lib.FD_INTERLEAVED


def unavailable() -> str | None:
    if _native is None and (folder := installed_elsewhere()):
        return (
            f"the C extension is in {folder}, but fastdrop is imported from {os.path.dirname(FOLDER)}; leave that "
            "folder, or run pip install -e . in it"
        )
    if _native is None:
        return (
            f"the C extension is not built ({_import_error}); install a C compiler (Debian: apt-get install gcc "
            "python3-dev) and then, in fastdrop's source folder: pip install --force-reinstall ."
        )
    return None


def installed_elsewhere() -> str | None:
    """Where a built fastdrop is that this one hides. The source folder hides an installed one from what runs there."""
    if _has_extension(FOLDER):  # which does not load
        return None
    return next(filter(_has_extension, (os.path.realpath(os.path.join(entry, "fastdrop")) for entry in sys.path)), None)


def _has_extension(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, "_native" + suffix)) for suffix in EXTENSION_SUFFIXES)


def describe() -> str:
    return f"C, {isa()} in use of {', '.join(usable_isas())}"


def isa() -> str:
    """Name of the instruction set in use."""
    return _name(_lib.fd_isa_active())


def usable_isas() -> list[str]:
    """Names of those built in and supported by this CPU, best last."""
    return [_name(i) for i in range(_lib.fd_isa_count()) if _lib.fd_isa_usable(i)]


def select_isa(name: str) -> None:
    """Makes one the instruction set of all calls from now on, in all threads."""
    for i in range(_lib.fd_isa_count()):
        if _name(i) == name and _lib.fd_isa_select(i) == _lib.FD_OK:
            return
    raise ValueError(f"FASTDROP_ISA must be one of {', '.join(usable_isas())} on this machine, but got {name!r}")


def set_num_threads(n: int) -> None:
    if _lib.fd_set_num_threads(n):
        raise _refusal()


def use_team(parallel: int) -> None:
    """Runs the calls by address on the threads of the library that makes them: the address of its ``GOMP_parallel``."""
    _lib.fd_use_team(parallel)


def set_memory(policy: memory.Policy) -> None:
    if _lib.fd_set_memory(*dataclasses.astuple(policy)):
        raise _refusal()


def get_memory() -> memory.Policy:
    """The policy that the kernels follow."""
    choices = _native.ffi.new("uint64_t[5]")
    _lib.fd_get_memory(choices)
    return memory.Policy(*choices)


def scale_float32(x: Array, y: Array, a: float, how: str) -> None:
    """y = a x in one of the ways of `HOW`, or y = x by libc's memcpy, for benchmarks: what memory allows a pass."""
    if _lib.fd_scale_float32(_address(x), _address(y), x.size, a, HOW[how]):
        raise _refusal()


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """One block, for known-answer tests."""
    out = _native.ffi.new("uint32_t[4]")
    _lib.fd_philox4x32_10(counter, key, out)
    return list(out)


def drawn(primitive: str, seed: int, offset: int, threshold: int, *arguments: Any) -> None:
    """A fused forward primitive that writes the mask words that it works under, while data is on its way."""
    _entry_point(f"{primitive}_drawn")(seed, offset, threshold, *arguments)


def __getattr__(name: str) -> Any:
    """A primitive that is asked for the first time; then it is an attribute of this module.

    ``<primitive>`` and ``<primitive>_drawn`` take arrays. ``<primitive>_at`` and ``<primitive>_drawn_at`` take the
    number of threads that may be used, then the same with addresses for arrays, 0 for none; they return 0, or a
    negative code and have done nothing.
    """
    if _native is None or name.removesuffix("_at") not in entry_points():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _entry_point(name)
    return globals()[name]


@functools.cache
def _entry_point(name: str) -> Any:
    native = getattr(_lib, f"fd_{name}")
    if name.endswith("_at"):
        return native
    parameters = entry_points()[name]
    names = ", ".join(parameter.name for parameter in parameters)
    scope = {"call": native, "address": _address, "null": _native.ffi.NULL, "refusal": _refusal}
    return function(
        name,
        names,
        f"status = call({', '.join(map(_passed, parameters))})\n    if status: raise refusal(status)",
        scope,
    )


def _passed(parameter: Parameter) -> str:
    """How a wrapper hands a parameter on."""
    name = parameter.name
    if not parameter.is_array:
        return name
    return f"null if {name} is None else address({name})" if parameter.optional else f"address({name})"


def _name(isa: int) -> str:
    return str(_native.ffi.string(_lib.fd_isa_name(isa)).decode())


def _refusal(status: int = BAD_ARGUMENT) -> Exception:
    """Unreachable from the public API, which checks first, unless there is no memory."""
    if status == NO_MEMORY:
        return MemoryError("a C kernel found no memory")
    return ValueError("the C kernel refused its arguments")


if _native is not None:
    memory.follow(set_memory)

if _forced := os.environ.get("FASTDROP_ISA"):
    if _native is None:
        raise ValueError(f"FASTDROP_ISA must not be set where the C extension is not built, but got {_forced!r}")
    select_isa(_forced)

"""Builds fastdrop._native: the C sources of this folder, and what cffi needs to know of them.

The primitives' prototypes are made from the table in fastdrop/backends/primitives.py, the others are read from
fastdrop.h. Each primitive comes in two forms: ``fd_<name>`` takes what `ffi.from_buffer` makes of an array;
``fd_<name>_at`` takes addresses as integers, after the number of threads that the call may use, for callers whose
memory and threads belong to another library.
"""

import os
import re
import runpy
import sys
import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = ["dispatch.c", "memory.c", "threads.c", "isa_scalar.c", "isa_neon.c", "isa_avx2.c", "isa_avx512.c"]
HEADERS = sorted(path.name for pattern in ("*.h", "*.def") for path in HERE.glob(pattern))

# Wider instructions appear only inside the isa_ files' own target regions. No contraction: a x + b must round twice on
# every instruction set, as NumPy does. No errno from sqrtf, which would make it a call into libm.
COMPILE_ARGS = ["-std=c11", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread", "-g0"]

LINK_ARGS = ["-pthread"]
if sys.platform == "win32":  # MinGW's GCC; fastdrop.h refuses Microsoft's compiler
    # GCC does not align the stack of Windows for wide registers (its bug 54412). No library of MinGW's to be found.
    COMPILE_ARGS.append("-Wa,-muse-unaligned-vector-move")
    LINK_ARGS.append("-static")
# MinGW's linker takes names from this library before those of one version of Python.
STABLE_ABI = ["python3"] if sys.platform == "win32" and not sysconfig.get_config_var("Py_GIL_DISABLED") else []

COMMENT = re.compile(r"/\*.*?\*/", re.S)
TABLE = runpy.run_path(str(HERE.parent / "fastdrop" / "backends" / "primitives.py"))


def addressed() -> dict[str, tuple[str, str]]:
    """The prototype of each ``fd_<name>_at`` and its body."""
    forms = {}
    for name, parameters in TABLE["entry_points"]().items():
        declared = ", ".join(f"{'uintptr_t' if p.is_array else p.c_type} {p.name}" for p in parameters)
        passed = ", ".join(f"({p.c_type}){p.name}" for p in parameters)
        prototype = f"int fd_{name}_at(int threads, {declared})"
        body = f"fd_limit_threads(threads); int status = fd_{name}({passed}); fd_limit_threads(0); return status;"
        forms[name] = prototype, body
    return forms


def cdef() -> str:
    """Every prototype of the ABI, for cffi."""
    prototypes = [
        f"int fd_{name}({', '.join(f'{p.c_type} {p.name}' for p in parameters)});"
        for name, parameters in TABLE["entry_points"]().items()
    ]
    prototypes += [f"{prototype};" for prototype, _ in addressed().values()]
    header = COMMENT.sub("", (HERE / "fastdrop.h").read_text())
    prototypes += re.findall(r"^(?:int|void|const char \*) ?fd_\w+\([^#;]*\);", header, re.M)
    names = r"OK|BAD_\w+|FLOAT\w+|BFLOAT\w+|BLOCK_CELLS|MEMCPY|ORDINARY|STREAMING|INTERLEAVED"
    constants = re.findall(rf"\b(FD_(?:{names}))\b =", header)
    return "\n".join(prototypes + [f"#define {name} ..." for name in constants])


def builder() -> FFI:
    ffi = FFI()
    ffi.cdef(cdef())
    root = HERE.parent
    debug = os.environ.get("FASTDROP_CFLAGS", "").split()  # sanitizers and warnings, for the project's own tests
    ffi.set_source(
        "fastdrop._native",
        "\n".join(
            ['#include "fastdrop.h"'] + [f"static {prototype} {{ {body} }}" for prototype, body in addressed().values()]
        ),
        sources=[str((HERE / name).relative_to(root)) for name in SOURCES],
        include_dirs=[str(HERE.relative_to(root))],
        depends=[str((HERE / name).relative_to(root)) for name in HEADERS],
        extra_compile_args=[*COMPILE_ARGS, *debug],
        libraries=["m", *STABLE_ABI],
        extra_link_args=[*LINK_ARGS, *debug],
        # No compiler: the install goes through and fastdrop runs on Numba or NumPy. A wheel for others must have it.
        optional=not os.environ.get("FASTDROP_REQUIRE_EXTENSION"),
    )
    return ffi


ffibuilder = builder()

if __name__ == "__main__":
    print(cdef())

"""From a kernel's name to machine code: Numba to PTX, NVIDIA's linker to a cubin, kept on disk.

Nothing here needs a GPU or a driver. Numba and the linker are imported only where the disk has no cubin.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from ..._checks import FLOAT64

Capability = tuple[int, int]

OLDEST: Capability = (7, 5)

# What machine code hangs on beside the variant.
SOURCES = (
    "_checks.py",
    "stream.py",
    "backends/_scalars.py",
    "backends/_cuda/compile.py",
    "backends/_cuda/tile.py",
    "backends/_cuda/words.py",
    "backends/_cuda/kernels.py",
)
PACKAGES = ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm", "nvidia-nvjitlink")

# Parameters of each body as `struct` codes; F is what elements are computed in. The kernels' ABI.
PARAMETERS = {
    "draw_words": "QQQQQQQII",
    "elementwise": "QQQQQQQQQIIFFF",
    "strided": "QQQQI" + 3 * "IIIQ" + "QFFF",
}


class Variant(NamedTuple):
    """A kernel: which body, for which storage type, in which form.

    ``form`` is where elementwise's bits come from (drawn, drawn_shifted, stored), how wide strided's accesses are
    (wide, narrow). ``plain``: b = 0.
    """

    body: str
    dtype: int = 0
    form: str = ""
    plain: bool = True

    def __str__(self) -> str:
        return "-".join((self.body, str(self.dtype), self.form or "only", "scale" if self.plain else "affine"))

    @property
    def codes(self) -> str:
        return PARAMETERS[self.body].replace("F", "d" if self.dtype == FLOAT64 else "f")


def packer(variant: Variant) -> struct.Struct:
    """Lays parameters out as the driver takes them: each at its natural alignment."""
    return struct.Struct("@" + variant.codes)


def ptx(variant: Variant, cc: Capability) -> str:
    """PTX with one entry, by Numba, for a compute capability; about a second."""
    from numba import cuda, types

    from . import kernels, words

    of_code = {"Q": types.uint64, "I": types.uint32, "f": types.float32, "d": types.float64}
    vocabulary = words.Vocabulary(variant.dtype, cc, variant.plain)
    text: str = cuda.compile_ptx(  # type: ignore[attr-defined, no-untyped-call]
        kernels.build(vocabulary, variant.body, variant.form), types.void(*(of_code[c] for c in variant.codes)), cc=cc
    )[0]
    return text


def entry(image: bytes) -> bytes:
    """The name of the kernel in PTX."""
    found = re.search(rb"\.entry\s+([\w$]+)", image)
    assert found
    return found.group(1)


def cubin(text: str, cc: Capability) -> bytes:
    """Machine code from PTX."""
    from cuda.bindings import nvjitlink

    handle = nvjitlink.create(1, [f"-arch=sm_{cc[0]}{cc[1]}"])
    try:
        source = text.encode() + b"\0"
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, source, len(source), "fastdrop")
        nvjitlink.complete(handle)
        code = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, code)
        return bytes(code)
    finally:
        nvjitlink.destroy(handle)


def image(variant: Variant, cc: Capability) -> tuple[bytes, bytes]:
    """(kernel's name, cubin), from the disk where it has them."""
    file = cache_folder() / f"{variant}-sm_{cc[0]}{cc[1]}-{_fingerprint()}.cubin"
    try:
        name, _, code = file.read_bytes().partition(b"\n")
    except OSError:
        text = ptx(variant, cc)
        name, code = entry(text.encode()), cubin(text, cc)
        _keep(file, name + b"\n" + code)
    return name, code


def cache_folder() -> Path:
    """``FASTDROP_CACHE_DIR``, or fastdrop's folder in the user's cache. Code is loaded from there: keep it your own."""
    own = os.environ.get("FASTDROP_CACHE_DIR")
    if own:
        return Path(own)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "fastdrop" / "cuda"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastdrop" / "cuda"


def _fingerprint() -> str:
    """Of `SOURCES` and the versions of `PACKAGES`."""
    global _seen
    if _seen is None:
        digest = hashlib.sha256()
        folder = Path(__file__).parents[2]
        for source in SOURCES:
            digest.update((folder / source).read_bytes())
        for package in PACKAGES:
            digest.update(f"{package} {_version(package)}\n".encode())
        _seen = digest.hexdigest()[:16]
    return _seen


_seen: str | None = None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _keep(file: Path, content: bytes) -> None:
    """Whole or not at all, whoever else writes it; without a disk that takes it, the next process compiles again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except OSError:
        pass

"""Makes machine code for a CUDA kernel, and keeps it on disk: Numba, NVVM's IR for linking, NVIDIA's linker, a cubin.

`driver` calls `image` for a `Variant`, the name of a kernel. The way by PTX is not taken: the linker treats PTX as a
part of a larger program. Below compute capability 9.0 it then doesn't see that the lanes of a warp stay together,
surrounds every shuffle and vote with calls, and uses 144 registers instead of 55.

Nothing here needs a GPU or a driver. Numba and the linker are imported only if the disk has no cubin.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import re
import struct
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...core.checks import FLOAT64
from ...core.installing import how_to_install

Capability = tuple[int, int]

OLDEST: Capability = (7, 5)

# Source files that decide, beside the variant, what the machine code is: patterns within fastdrop/.
SOURCES = ("core/*.py", "backends/numba/math.py", "backends/numba/scalars.py", "backends/cuda/*.py")
LINKERS = ("nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12")
PACKAGES = ("numba", "numba-cuda", "llvmlite", *LINKERS)

DIGEST_BYTES = hashlib.sha256().digest_size

# Parameters of each body as `struct` codes: the kernels' ABI. F is the type of the arithmetic; A is that, or float64
# where a count on the device divides it. The second table is that of the fused kernels.
PARAMETERS = {
    "draw_words": "QQQQQQQII",
    "draw_rows": "QQQQQQQQQQQQQQQII",
    "elementwise": "QQQQQQQQQIIQAFF",
    "strided": "QQQQI" + 3 * "IIIQ" + "QQAFF",
    "gaussian_multiply": "QQQQQQQf",
    "dilate_bits": "QQQQQQQQ",
    "count_bits": "QQQ",
}
ROW_PARAMETERS = {
    "pointwise_forward": "QQQQQQQQQQF",
    "pointwise_backward": "QQQQQQQQQQF",
    "pointwise_columns": "QQQQQQQQQQQQF",
    "norm_forward": "QQQQQQQQQQQIIFF",
    "norm_backward": "QQQQQQQQQQIIF",
    "norm_columns": "QQQQQQQ",
    "add_panels": "QQQ",
    "softmax_forward": "QQQQQQQQQQQQQQQQIIFF",
    "softmax_backward": "QQQQQQQIFF",
}


class Variant(NamedTuple):
    """A kernel: which body, for which storage type, in which form.

    ``form`` says where the bits of elementwise come from (drawn, drawn_shifted, stored), or how wide the accesses of
    strided and of most fused kernels are (wide, narrow). ``plain``: b is 0. ``counted``: the scale is a, divided by a
    count on the device. ``residual_dtype``, in which the residual stream is stored, and ``activation`` are for fused
    kernels.
    """

    body: str
    dtype: int = 0
    form: str = ""
    plain: bool = True
    counted: bool = False
    residual_dtype: int = 0
    activation: int = 0

    def __str__(self) -> str:
        if self.on_rows:
            return f"{self.body}-{self.dtype}-{self.residual_dtype}-{self.form or 'both'}-{self.activation}"
        affine = ("scale" if self.plain else "affine") + "-counted" * self.counted
        return f"{self.body}-{self.dtype}-{self.form or 'only'}-{affine}"

    @property
    def on_rows(self) -> bool:
        """Whether it is a fused one, of `pointwise`, `norm` or `softmax`."""
        return self.body in ROW_PARAMETERS

    @property
    def codes(self) -> str:
        computed = "d" if self.dtype == FLOAT64 else "f"
        codes = (PARAMETERS | ROW_PARAMETERS)[self.body]
        return codes.replace("F", computed).replace("A", "d" if self.counted else computed)


def packer(variant: Variant) -> struct.Struct:
    """Lays parameters out as the driver takes them: each at its natural alignment."""
    return struct.Struct("@" + variant.codes)


def ptx(variant: Variant, cc: Capability) -> str:
    """PTX with one entry, by Numba, for a compute capability: for people and tests that read it. Takes a second."""
    return str(_translated(variant, cc, "ptx"))


def intermediate(variant: Variant, cc: Capability) -> bytes:
    """The same for the linker to compile."""
    return bytes(_translated(variant, cc, "ltoir"))


def _translated(variant: Variant, cc: Capability, output: str) -> Any:
    _ready_numba_cuda()
    from numba import cuda, types

    of_code = {"Q": types.uint64, "I": types.uint32, "f": types.float32, "d": types.float64}
    signature = types.void(*(of_code[c] for c in variant.codes))
    return cuda.compile(_body(variant, cc), signature, device=False, cc=cc, output=output, abi="numba")[0]  # type: ignore


def _body(variant: Variant, cc: Capability) -> Any:
    """The Python function of a kernel, in the vocabulary of its variant."""
    from . import mask, norm, pointwise, softmax
    from .intrinsics import Vocabulary
    from .vector_intrinsics import RowVocabulary

    body, form, activation = variant.body, variant.form, variant.activation
    if not variant.on_rows:
        options = {"elementwise": (form,), "strided": (form == "wide",)}.get(body, ())
        return getattr(mask, body)(Vocabulary(variant.dtype, cc, variant.plain, variant.counted), *options)
    wide, narrow = (RowVocabulary(variant.dtype, cc, variant.residual_dtype, wide) for wide in (True, False))
    if body in ("pointwise_forward", "pointwise_backward"):
        return getattr(pointwise, body)(wide, narrow, activation)
    vocabulary = wide if form == "wide" else narrow
    if body == "pointwise_columns":
        return pointwise.pointwise_columns(vocabulary, activation)
    module = norm if body.startswith("norm") else softmax if body.startswith("softmax") else pointwise
    return getattr(module, body)(vocabulary)


def _ready_numba_cuda() -> None:
    """Imports numba-cuda with `numpy.row_stack`, which it needs (its issue 907) and which NumPy 2.5 no longer has."""
    gone = "row_stack"
    if not hasattr(np, gone):
        setattr(np, gone, np.vstack)
        try:
            importlib.import_module("numba.cuda.np.arrayobj")
        finally:
            delattr(np, gone)


def entry(image: bytes) -> bytes:
    """The name of the kernel in PTX, or in a cubin, where a section that describes the kernel has it."""
    found = re.search(rb"\.entry\s+([\w$]+)|\0\.nv\.info\.([\w$]+)\0", image)
    assert found
    return found.group(1) or found.group(2)


def cubin(code: bytes, cc: Capability) -> bytes:
    """Machine code from `intermediate`."""
    from cuda.bindings import nvjitlink

    handle = nvjitlink.create(2, [f"-arch=sm_{cc[0]}{cc[1]}", "-lto"])
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.LTOIR, code, len(code), "fastdrop")
        nvjitlink.complete(handle)
        linked = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, linked)
        return bytes(linked)
    finally:
        nvjitlink.destroy(handle)


def image(variant: Variant, cc: Capability) -> tuple[bytes, bytes]:
    """(kernel's name, machine code), from the disk where it has it."""
    file = cache_folder() / f"{variant}-sm_{cc[0]}{cc[1]}-{_fingerprint()}.cubin"
    code = _kept(file)
    if code is None:
        try:
            code = cubin(intermediate(variant, cc), cc)
            _keep(file, hashlib.sha256(code).digest() + code)
        except Exception:  # no linker, or one too old for the IR: the driver compiles PTX itself
            try:
                code = ptx(variant, cc).encode() + b"\0"
            except Exception as error:
                raise RuntimeError(
                    f"the CUDA kernels can't be compiled here ({error}): {how_to_install('cuda')}"
                ) from error
    return entry(code), code


def _kept(file: Path) -> bytes | None:
    """The code behind its digest, unless a disk has lost part of it."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, code = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def cache_folder() -> Path:
    """``FASTDROP_CACHE_DIR``, or fastdrop's folder in the user's cache. Code is loaded from there: keep it your own."""
    own = os.environ.get("FASTDROP_CACHE_DIR")
    if own:
        return Path(own)
    variable, usual = ("LOCALAPPDATA", "~/AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", "~/.cache")
    base = os.environ.get(variable, "")
    if not os.path.isabs(base):  # relative ones are to be ignored, and "" is one
        base = os.path.expanduser(usual)
    return Path(base) / "fastdrop" / "cuda"


@functools.cache
def _fingerprint() -> str:
    """Of `SOURCES` and the versions of `PACKAGES`."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for source in sorted(Path(__file__).parents[2].glob(pattern)):
            digest.update(source.read_bytes())
    for package in PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "none"
        digest.update(f"{package} {version}\n".encode())
    return digest.hexdigest()[:16]


def _keep(file: Path, content: bytes) -> None:
    """Writes the whole file or nothing. If the disk refuses it, the next process compiles again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=file.parent)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)

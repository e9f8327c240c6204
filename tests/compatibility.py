"""What tests/compatibility.sh asks of an installed wheel: python compatibility.py FOLDER_OF_THE_INSTALLATION.

It needs NumPy and fastdrop alone, so it runs where the test suite can't.
"""

from __future__ import annotations

import importlib.metadata
import pickle
import platform
import sys
from pathlib import Path

import numpy as np

import fastdrop as fd


def versions() -> str:
    """One line for the table in docs/install.md."""
    names = ("fastdrop-kernels", "numpy", "cffi", "numba", "torch")
    found = [f"Python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def check_backend(name: str) -> None:
    """The example of README, a pickled mask and a fused function, against NumPy's backend."""
    x = np.linspace(-2, 2, 4 * 515, dtype=np.float32).reshape(4, 515)
    results: list[tuple[np.ndarray, ...]] = []
    for backend in (name, "numpy"):
        with fd.use_backend(backend):
            y, mask = fd.dropout(x, p=0.25, rng=0)
            dx = fd.dropout_backward(np.ones_like(y), pickle.loads(pickle.dumps(mask)))
            half = fd.dropout(x.astype(np.float16), p=0.25, rng=0)[0]
            normed = fd.dropout_add_layer_norm(x, x, p=0.25, rng=0)[0]
            _, small = fd.dropout(np.ones((4, 8), np.float32), p=0.25, rng=0)
        assert repr(small) == "PackedMask(shape=(4, 8), p=0.25, kept=24, nbytes=4)", small
        assert np.array_equal(dx != 0, y != 0)
        assert np.allclose(y[y != 0], x[y != 0] / 0.75)
        results.append((y, dx, half, normed))
    (*exact, normed), (*reference, reference_normed) = results
    assert all((a == b).all() for a, b in zip(exact, reference, strict=True)), f"{name} differs from NumPy"
    assert np.allclose(normed, reference_normed, atol=1e-5), f"{name}'s fused function differs from NumPy's"


def main() -> None:
    installation = Path(sys.argv[1]).resolve()
    assert installation in Path(fd.__file__).resolve().parents, f"{fd.__file__} is not in {installation}"
    assert fd.explain().startswith("c: taken"), fd.explain()
    usable = [name for name, reason in fd.backends.reasons().items() if reason is None and name != "cuda"]
    for name in usable:
        check_backend(name)
    print(f"{versions()}: backends {', '.join(usable)} agree")


if __name__ == "__main__":
    main()

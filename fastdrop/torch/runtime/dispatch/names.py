"""How private names of torch are looked up: once, at import, with a note of those that torch lacks.

>>> from fastdrop.torch.runtime.dispatch.names import absent, named
>>> named("torch._C._there_is_no_such_name", "instead")
'instead'
>>> absent.pop()
'torch._C._there_is_no_such_name'
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

absent: list[str] = []


def named(path: str, instead: Any = None) -> Any:
    """What torch has under a private name. If torch lacks it: ``instead``, and `absent` lists the name."""
    try:
        return functools.reduce(_member, path.split(".")[1:], torch)
    except (ImportError, AttributeError):
        if path not in absent:
            absent.append(path)
        return instead


def _member(owner: Any, name: str) -> Any:
    """What a module or a class has under this name, which may be a module that nobody has imported yet."""
    try:
        return getattr(owner, name)
    except AttributeError:
        if not isinstance(owner, ModuleType):
            raise
        return importlib.import_module(f"{owner.__name__}.{name}")


def has(*values: Any) -> bool:
    """Whether all of these names were found."""
    return all(value is not None for value in values)


def require(what: str, *paths: str) -> None:
    """Raises if torch lacks one of the names that something can't do without."""
    lacking = [path for path in paths if path in absent]
    if lacking:
        raise RuntimeError(f"{what} needs {' and '.join(lacking)}, which torch {torch.__version__} does not have")

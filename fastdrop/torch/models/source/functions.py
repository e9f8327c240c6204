"""Source code, names and globals of Python functions, for the modules of this package and for `drop_path`.

Nothing here raises, whatever a function looks like: a function without source has no `definition`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

__all__ = [
    "LIBRARIES",
    "cell_contents",
    "definition",
    "global_value",
    "names_in",
    "package_of",
    "python_function",
    "remembered",
    "unwrap",
]

Result = TypeVar("Result")

LIBRARIES = ("torch", "fastdrop")  # whose classes and functions are known without reading their source


def package_of(value: Any) -> str:
    """The package in which a class or function is defined."""
    return (getattr(value, "__module__", None) or "").partition(".")[0]


def unwrap(function: Any) -> Any:
    with contextlib.suppress(Exception):  # a cycle of wrappers, or an attribute that raises
        return inspect.unwrap(function)
    return function


def python_function(function: Any) -> types.FunctionType | None:
    """The Python function behind a method, a static method or a decorator; None if there is none."""
    function = unwrap(function)
    with contextlib.suppress(Exception):
        function = unwrap(getattr(function, "__func__", None) or function)
    return function if isinstance(function, types.FunctionType) else None


@functools.lru_cache(1024)
def definition(code: types.CodeType) -> ast.FunctionDef | None:
    """The definition of a function; None if its source can't be had, or if it shares its lines with another's."""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    defined = parsed.body[0] if parsed.body else None
    if isinstance(defined, ast.FunctionDef) and defined.name == code.co_name:
        return defined
    return None


def remembered(read: Callable[[type], Result]) -> Callable[[type], Result]:
    """A decorator that remembers what was read of a class, until the class is given another forward."""
    known: WeakKeyDictionary[type, tuple[Any, Result]] = WeakKeyDictionary()

    @functools.wraps(read)
    def ask(cls: type) -> Result:
        code = getattr(python_function(getattr(cls, "forward", None)), "__code__", None)
        if cls not in known or known[cls][0] is not code:
            known[cls] = code, read(cls)
        return known[cls][1]

    return ask


def names_in(code: types.CodeType) -> set[str]:
    """The names in a function and in those inside it, with its strings, which may be names of attributes."""
    inner = [names_in(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}.union(*inner)


def global_value(function: types.FunctionType, name: str) -> Any:
    """What a name stands for that a function doesn't define itself: in a closure, a module or the builtins."""
    code = function.__code__
    if name in code.co_freevars:
        cell = (function.__closure__ or ())[code.co_freevars.index(name)]
        return next(iter(cell_contents(cell)), None)
    builtin = function.__globals__.get("__builtins__", {})
    builtins = builtin if isinstance(builtin, dict) else vars(builtin)
    return function.__globals__.get(name, builtins.get(name))


def cell_contents(cell: types.CellType) -> list[Any]:
    """A list of the one value in a closure's cell; an empty list before it is set."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []

"""Makes functions with explicit parameter lists from the table of primitives.

The modules of the backends call it. A backend gives a template for a primitive's body and gets a function whose
parameters are named as in `primitives`: Python then checks a call's arguments, and the call costs as much as if the
function stood in a file. Source text is made from the table and from constants of the calling module alone.

>>> from fastdrop.backends.primitives import PRIMITIVES
>>> scope = {"show": print}
>>> function("masked", "x, n", "show('n is', n)", scope)(None, 3)
n is 3
>>> PRIMITIVES["draw_bits"].names
['words', 'position', 'first', 'n', 'seed', 'offset', 'threshold']
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from .primitives import PRIMITIVES


def function(
    name: str, parameters: str, body: str, scope: dict[str, Any], doc: str | None = None
) -> Callable[..., Any]:
    """The function of that text; ``scope`` holds what the text refers to."""
    scope = dict(scope)
    exec(compile(f"def {name}({parameters}):\n    {body}\n", f"<fastdrop {name}>", "exec"), scope)
    made: Callable[..., Any] = scope[name]
    made.__doc__ = doc
    return made


def primitive(body: Callable[[Any], None]) -> Callable[..., None]:
    """Decorates a function of one record: makes it a primitive with the parameters that the table gives to its name.

    The record's fields are the primitive's arguments.
    """
    return _from_record(body, PRIMITIVES[body.__name__].names, ())


def primitive_at(*options: str) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """The same for ``<primitive>_at``, which takes a device and a stream first and options, 0 by default, by name."""

    def decorate(body: Callable[[Any], None]) -> Callable[..., None]:
        names = PRIMITIVES[body.__name__.removesuffix("_at")].names
        return _from_record(body, ["device", "stream", *names], options)

    return decorate


def _from_record(body: Callable[[Any], None], names: list[str], options: tuple[str, ...]) -> Callable[..., None]:
    fields = ", ".join(f"{name}={name}" for name in [*names, *options])
    parameters = ", ".join([*names, *(["*"] if options else []), *(f"{option}=0" for option in options)])
    scope = {"body": body, "Record": SimpleNamespace, "__name__": body.__module__}
    return function(body.__name__, parameters, f"body(Record({fields}))", scope, body.__doc__)

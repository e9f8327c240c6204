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
    names = PRIMITIVES[body.__name__].names
    fields = ", ".join(f"{name}={name}" for name in names)
    scope = {"body": body, "Record": SimpleNamespace, "__name__": body.__module__}
    return function(body.__name__, ", ".join(names), f"body(Record({fields}))", scope, body.__doc__)

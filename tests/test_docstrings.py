"""Each public docstring has numpydoc's sections: all parameters, what is returned, an example."""

import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import fastdrop as fd

torch = pytest.importorskip("torch")
import fastdrop.torch as fdt

ORDER = ["Parameters", "Attributes", "Returns", "Yields", "Raises", "Warns", "See Also", "Notes", "Examples"]
OF_ENTRIES = ORDER[:6]  # the sections that are lists


def sections(doc: str) -> dict[str, list[str]]:
    """The lines of each section by its name; "" is the text before the first."""
    found: dict[str, list[str]] = {"": []}
    lines, name = doc.split("\n"), ""
    for line, under in zip(lines, [*lines[1:], ""], strict=True):
        if re.fullmatch("-+", under) and line and not line.startswith(" "):
            name = line
            assert name not in found, f"two sections {name}"
            found[name] = []
        elif not re.fullmatch("-{3,}", line):
            found[name].append(line)
    return found


def entries(lines: list[str]) -> list[str]:
    """The names in a section of entries. ``a, b : type`` has two. An entry without a type has none."""
    heads = [line.split(" : ")[0] for line in lines if " : " in line and not line.startswith(" ")]
    return [name.strip().lstrip("*") for head in heads for name in head.split(", ")]


def parameters(function: Any) -> list[str]:
    """The names of a signature; those in a TypedDict of keyword arguments in place of its name."""
    names = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and "Unpack" in str(parameter.annotation):
            owner = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
            (typed,) = typing.get_args(eval(parameter.annotation, owner.__globals__))
            names += typed.__annotations__
        elif parameter.name not in ("self", "cls"):
            names.append(parameter.name)
    return names


def returns(function: Any) -> bool:
    return inspect.unwrap(function).__annotations__.get("return") not in (None, "None")


def public() -> Iterator[tuple[str, Any, Any]]:
    """(path, object, the class that it is a member of or None) of functions, classes and their own members."""
    for module in (fd, fdt, fd.schedules):
        for name in module.__all__:
            item = getattr(module, name)
            if inspect.ismodule(item):
                continue
            yield f"{module.__name__}.{name}", item, None
            for member, value in vars(item).items() if inspect.isclass(item) else ():
                value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
                if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                    yield f"{module.__name__}.{name}.{member}", value, item


def complaints(path: str, item: Any, owner: Any) -> Iterator[str]:
    name = path.rsplit(".", 1)[1]
    doc = item.__doc__ and inspect.cleandoc(item.__doc__)
    if not doc:
        inherited = owner and any(getattr(getattr(base, name, None), "__doc__", None) for base in owner.__mro__[1:])
        if not inherited:
            yield "has no docstring"
        return
    if isinstance(item, property):
        return
    found = sections(doc)
    if unknown := set(found) - {"", *ORDER}:
        yield f"has unknown sections {unknown}"
    if [each for each in ORDER if each in found] != [each for each in found if each]:
        yield f"has sections in another order than {ORDER}"
    for section in OF_ENTRIES:
        if re.search(r"\n\n(?=\S)", "\n".join(found.get(section, [])).strip()):
            yield f"has text after the entries of {section}, which belongs under Notes"
    if ">>>" in "\n".join(line for section, lines in found.items() if section != "Examples" for line in lines):
        yield "has an example outside of Examples"
    is_a_result = inspect.isclass(item) and "Attributes" in found and "Parameters" not in found  # users don't make it
    if not is_a_result and sorted(entries(found.get("Parameters", []))) != sorted(parameters(item)):
        yield f"has Parameters {entries(found.get('Parameters', []))}, but its signature has {parameters(item)}"
    if not inspect.isclass(item) and returns(item) and not {"Returns", "Yields"} & set(found):
        yield "has no Returns"
    if owner is None and not is_a_result and ">>>" not in "\n".join(found.get("Examples", [])):
        yield "has no Examples"


def test_overloads_have_the_parameters_of_their_function():
    overloaded = [item for _, item, _ in public() if inspect.isfunction(item) and typing.get_overloads(item)]
    assert len(overloaded) > 10
    for function in map(inspect.unwrap, overloaded):
        for overload in typing.get_overloads(function):
            assert sorted(parameters(overload)) == sorted(parameters(function))


def test_public_docstrings_are_complete():
    found = {path: said for path, *item in public() if (said := list(complaints(path, *item)))}
    assert found == {}


def test_an_incomplete_docstring_is_found():
    def wrong(x: int, y: int) -> int:
        """Says little.

        Parameters
        ----------
        x : int

        Kept for backward: nothing.

        >>> 1
        1
        """
        return x

    said = "\n".join(complaints("module.wrong", wrong, None))
    for what in ("text after the entries of Parameters", "has Parameters ['x'", "no Returns", "no Examples", "outside"):
        assert what in said

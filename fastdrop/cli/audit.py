"""``fastdrop audit``: the pitfalls of dropout in a model, for people and for scripts that go by the exit code.

Decides how a model is named and made; what is looked for is decided in ``fastdrop.torch.tools.audit``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from operator import attrgetter
from typing import Any

HELP = "look for common mistakes with dropout in a torch model"
DESCRIPTION = (
    "Looks for common mistakes with dropout in a torch model and prints a table: where, why, what to do. Functions "
    "that drop in the forward of a module are listed below the findings; they don't count."
)
EPILOG = """examples:
  fastdrop audit train:make_model            make_model() in ./train.py
  fastdrop audit train:make_model --input 8,3,32,32
                                             runs it, to see the layers' order
  fastdrop audit train:make_model --strict   notes count as findings

exit codes:
  0  nothing found that is a warning or worse
  1  something was found
  2  wrong usage, or the model could not be made or run
  130  interrupted
"""
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODULE:FACTORY",
        help="a function or class that returns the model, or the model itself, in a Python module that can be imported "
        "from here",
    )
    parser.add_argument(
        "--input",
        metavar="SHAPE[:DTYPE]",
        action="append",
        type=_spec,
        help="run the model on zeros of this shape to see the order of its layers, as in 8,3,32,32 or 8,16:int64; once "
        "for each argument of the model",
    )
    parser.add_argument("--samples", metavar="N", type=int, help="how many samples there are to train on")
    parser.add_argument("--strict", action="store_true", help="notes count too for the exit code")


def main(args: argparse.Namespace) -> int:
    try:
        from ..torch.tools.audit import audit

        report = audit(_made(args.model), _zeros(args.input) if args.input else None, samples=args.samples)
    except (Exception, SystemExit) as error:  # whatever code of the user's may raise
        print(f"fastdrop: can't audit {args.model}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(report)
    return 1 if report.at_least("note" if args.strict else "warning") else 0


def _made(name: str) -> Any:
    from torch import nn

    module, colon, factory = name.partition(":")
    if not (module and colon and factory):
        raise ValueError("the model must be given as module:factory")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found = attrgetter(factory)(importlib.import_module(module))
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{factory} must return a torch.nn.Module, but got {type(model).__name__}")
    return model


def _zeros(specs: list[tuple[tuple[int, ...], str]]) -> tuple[Any, ...]:
    import torch

    return tuple(torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in specs)


def _spec(text: str) -> tuple[tuple[int, ...], str]:
    shape, _, dtype = text.partition(":")
    dtype = dtype or DTYPES[0]
    if dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"the dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}")
    try:
        extents = tuple(int(extent) for extent in shape.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a shape such as 8,3,32,32, but got {text!r}") from None
    return extents, dtype

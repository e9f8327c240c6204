"""The command line: ``python -m fastdrop`` and the ``fastdrop`` script."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from . import __version__, backends
from .cli import audit, info, selftest

COMMANDS: dict[str, ModuleType] = {"info": info, "selftest": selftest, "audit": audit}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed (or, for audit, found), 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="fastdrop", description="Dropout at the speed of memory.")
    parser.add_argument("--version", action="version", version=f"fastdrop {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(command)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed usage, help or version
        return int(stop.code or 0)
    if args.command != "info":  # which reports a bad environment itself
        try:
            backends.explain()
        except (ValueError, RuntimeError) as error:  # a variable of the environment is wrong
            print(f"fastdrop: {error}", file=sys.stderr)
            return 1
    try:
        return int(COMMANDS[args.command].main(args))
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nfastdrop: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

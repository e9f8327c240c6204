"""The command line: ``python -m fastdrop`` and the ``fastdrop`` script."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from . import __version__, backends
from .cli import audit, bench, info, selftest

COMMANDS: dict[str, ModuleType] = {"info": info, "selftest": selftest, "bench": bench, "audit": audit}
EPILOG = """examples:
  fastdrop info              what is installed and which backend runs
  fastdrop selftest          whether this installation computes the right thing
  fastdrop bench --quick     how fast it is here
  fastdrop bench --help      all options of a command

exit codes: 0 done, 1 failed or found something, 2 wrong usage, 130 interrupted
"""


class HelpFormatter(argparse.HelpFormatter):
    """Wraps descriptions, and leaves the lines of examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed or found, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="fastdrop",
        description="Fast dropout for torch and NumPy on the CPU.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastdrop {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=HelpFormatter,
        )
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

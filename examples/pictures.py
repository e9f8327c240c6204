"""The check of the command line that both demos make before they train."""

from argparse import ArgumentParser
from pathlib import Path

from matplotlib.figure import Figure


def check_picture(parser: ArgumentParser, path: str) -> None:
    """Ends the program if no picture can be written to this path."""
    if Path(path).suffix[1:] not in Figure().canvas.get_supported_filetypes():
        parser.error(f"--output: {path} is no picture that matplotlib can write")
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        parser.error(f"--output: {error}")

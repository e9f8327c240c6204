"""What all pictures of the examples share: colours, fonts, and the note on a picture of a quick form.

`common.py` uses it for the pictures of the tour, and both demos use it. A colour always means the same: vermillion is
fastdrop or dropout, blue is torch's dropout, and grey has no dropout.
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# By Okabe and Ito, who chose colours that colour-blind people tell apart.
VERMILLION, BLUE, GREEN, PURPLE, SKY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9"
GREY, BLACK = "#777777", "#000000"
COLOURS = [GREY, VERMILLION, BLUE, GREEN, PURPLE]

WIDE = 9.0  # inches; equal widths give equal fonts on a page
DPI = 160
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "font.size": 10.5,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}

SMOKE_TEST = "quick form: a smoke test, too short to show the effect"


def mark_smoke_test(figure: Any) -> None:
    """Says in the picture's corner and in what is printed that this is the quick form."""
    figure.supxlabel(SMOKE_TEST, x=0.995, ha="right", fontsize=10, style="italic", color=BLACK)
    print(SMOKE_TEST)


def check_picture(parser: ArgumentParser, path: str) -> None:
    """Ends the program if no picture can be written to this path."""
    if Path(path).suffix[1:] not in Figure().canvas.get_supported_filetypes():
        parser.error(f"--output: {path} is no picture that matplotlib can write")
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        parser.error(f"--output: {error}")

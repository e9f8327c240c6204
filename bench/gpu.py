"""The command for a machine with a GPU: `python bench/gpu.py`. What it does is in bench/gpu/__main__.py.

This file only sets the path: Python puts this folder first, where torch/ would hide the package torch.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path = [str(HERE.parent), *(entry for entry in sys.path if Path(entry).resolve() != HERE)]

from bench.gpu.__main__ import main

if __name__ == "__main__":
    sys.exit(main())

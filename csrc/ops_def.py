"""Writes ops.def, the C side's list of primitives, from fastdrop/backends/primitives.py: ``python csrc/ops_def.py``.

``make format`` runs it, and a test fails while the two differ. The file is kept in git because C is then built, tested
and read without Python.
"""

from __future__ import annotations

import runpy
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLE = runpy.run_path(str(HERE.parent / "fastdrop" / "backends" / "primitives.py"))
WIDTH = 120

HEAD = """\
/* The list of primitives: parameters and one FD_OP row each. Written by ops_def.py from the table in
 * fastdrop/backends/primitives.py: change that, and run `make format`. Include with FD_OP(name, PARAMETERS) defined;
 * PARAMETERS(FIRST, NEXT) expands FIRST(type, name) NEXT(type, name) ... An FD_DRAWING_OP may also be asked to draw
 * the words that it works under; by itself it is an FD_OP.
 *
 * fastdrop/backends/reference/ says in NumPy what each computes. Those with a dtype, rows and columns work on data
 * [rows, columns], element (r, c) under bit r columns + c of words, all kept where words is NULL. Vectors of columns
 * (input_bias, weight, norm_bias), statistics and sums are float32, or float64 with float64 data; residual,
 * residual_out and their gradients are of residual_dtype, all else of dtype. NULL: absent. */
#ifndef FD_DRAWING_OP
#define FD_DRAWING_OP FD_OP
#endif
"""


def text() -> str:
    parts = [HEAD, _comment("What a drawn forward takes before its own parameters."), *_list("DRAW", TABLE["DRAW"])]
    for primitive in TABLE["TABLE"]:
        macro = primitive.name.upper()
        row = "FD_DRAWING_OP" if primitive.draws else "FD_OP"
        parts += ["", _comment(primitive.does), *_list(macro, primitive.parameters)]
        parts.append(f"{row}({primitive.name}, {macro}_PARAMETERS)")
    return "\n".join([*parts, "", "#undef FD_DRAWING_OP", ""])


def _comment(sentences: str) -> str:
    return "\n".join(textwrap.wrap(f"/* {sentences} */", WIDTH, subsequent_indent=" * "))


def _list(macro: str, parameters: tuple[Any, ...]) -> list[str]:
    entries = [f"{'NEXT' if i else 'FIRST'}({p.c_type}, {p.name})" for i, p in enumerate(parameters)]
    whole = " ".join(entry.replace(" ", "~") for entry in entries)  # no line ends within an entry
    wrapped = textwrap.wrap(whole, WIDTH - 2, initial_indent="    ", subsequent_indent="    ")
    lines = [f"#define {macro}_PARAMETERS(FIRST, NEXT)", *(line.replace("~", " ") for line in wrapped)]
    return [line.ljust(WIDTH - 1) + "\\" for line in lines[:-1]] + lines[-1:]


if __name__ == "__main__":
    (HERE / "ops.def").write_text(text())

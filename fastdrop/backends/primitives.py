"""The table of primitives: their names, their parameters, and what they run over.

Everything that repeats a parameter list is made from this table: `csrc/ops.def` by ``make format``, cffi's declarations
by ``csrc/ffi_build.py``, and the functions of the backends by `generate`. What a primitive computes is defined by the
module `reference`, in NumPy. To add a primitive, begin with an entry here.

The build loads this file by its path, before fastdrop can be imported. Therefore it imports the standard library alone.
"""

from __future__ import annotations


class Parameter:
    """A parameter: what it is (``kind``), and for arrays whether it is written and whether a call may go without."""

    __slots__ = ("c_type", "kind", "name", "optional", "written")

    def __init__(self, kind: str, c_type: str, name: str = "", written: bool = False, optional: bool = False) -> None:
        self.kind, self.c_type, self.name, self.written, self.optional = kind, c_type, name, written, optional

    @property
    def is_array(self) -> bool:
        return self.c_type.endswith("*")


class Primitive:
    """``over``: "cells" are independent of each other; "rows" and "panels" (of rows) are worked on as a whole.

    ``draws``: there is also ``<name>_drawn``, which takes `DRAW` first and writes the mask words that it works under.
    """

    __slots__ = ("does", "draws", "name", "over", "parameters")

    def __init__(self, name: str, over: str, does: str, draws: bool = False, **parameters: Parameter) -> None:
        self.name, self.over, self.does, self.draws, self.parameters = name, over, does, draws, _named(**parameters)

    @property
    def names(self) -> list[str]:
        return [parameter.name for parameter in self.parameters]


def _named(**parameters: Parameter) -> tuple[Parameter, ...]:
    return tuple(Parameter(p.kind, p.c_type, name, p.written, p.optional) for name, p in parameters.items())


# Numbers. Codes and counts are ints; a seed may need all 64 bits.
CODE = Parameter("code", "int")  # of a dtype or an activation
FLAG = Parameter("flag", "int")
COUNT = Parameter("count", "uint64_t")
SEED = Parameter("seed", "uint64_t")
NUMBER = Parameter("number", "double")  # rounded to the type of the arithmetic
DOUBLE = Parameter("double", "double")  # taken as it is, or rounded to float32, for every dtype
# Arrays. Those of the last four kinds hold numbers of the type that is computed in: float64 for float64 data, else
# float32.
WORDS = Parameter("words", "const void *")  # packed bits, uint32
DATA = Parameter("data", "const void *")  # numbers of ``dtype``, one for each element
RESIDUAL = Parameter("residual", "const void *")  # numbers of ``residual_dtype``, one for each element
COLUMN = Parameter("column", "const void *")  # a number for each column
MASK = Parameter("mask", "const void *")  # numbers to be added to scores, read at strides
STATISTICS = Parameter("statistics", "const void *")  # two numbers for each row
SUMS = Parameter("sums", "const void *")  # lines of columns, one or three for each panel of rows


def out(array: Parameter) -> Parameter:
    """An array that is written."""
    return Parameter(array.kind, "void *", written=True)


def maybe(array: Parameter) -> Parameter:
    """An array that may be absent: None in Python, NULL in C, 0 where it is an address."""
    return Parameter(array.kind, array.c_type, written=array.written, optional=True)


DRAW = _named(seed=SEED, offset=SEED, threshold=COUNT)

TABLE = (
    Primitive(
        "draw_bits",
        over="cells",
        does="Bits of cells first .. first+n-1, written at bits position .. position+n-1 of words.",
        words=out(WORDS),
        position=COUNT,
        first=SEED,
        n=COUNT,
        seed=SEED,
        offset=SEED,
        threshold=COUNT,
    ),
    Primitive(
        "dropout_forward",
        over="cells",
        does="y[i] = keep(first + i) ? a x[i] + b : c for i < n; the bits go to words too, where there are any.",
        dtype=CODE,
        x=DATA,
        y=out(DATA),
        words=maybe(out(WORDS)),
        first=SEED,
        n=COUNT,
        seed=SEED,
        offset=SEED,
        threshold=COUNT,
        a=NUMBER,
        b=NUMBER,
        c=NUMBER,
    ),
    Primitive(
        "masked_affine",
        over="cells",
        does="y[o, r, i] = bit(position + o inner + i) ? a x[o, r, i] + b : c.",
        dtype=CODE,
        x=DATA,
        y=out(DATA),
        words=WORDS,
        position=COUNT,
        outer=COUNT,
        repeat=COUNT,
        inner=COUNT,
        a=NUMBER,
        b=NUMBER,
        c=NUMBER,
    ),
    Primitive(
        "gaussian_multiply",
        over="cells",
        does="y[i] = x[i] (1 + sigma z(first + i)), z the cells' standard normal numbers.",
        dtype=CODE,
        x=DATA,
        y=out(DATA),
        first=SEED,
        n=COUNT,
        seed=SEED,
        offset=SEED,
        sigma=DOUBLE,
    ),
    Primitive(
        "dilate_bits",
        over="cells",
        does="Bit [o, i, j] of to = AND over s < block of bit [o, i - s, j] of words, [outer, n, inner], where there "
        "is one; to is [outer, n + block - 1, inner].",
        to=out(WORDS),
        words=WORDS,
        outer=COUNT,
        n=COUNT,
        inner=COUNT,
        block=COUNT,
    ),
    Primitive(
        "pointwise_forward",
        over="cells",
        draws=True,
        does="y = residual + (bit ? a act(x + input_bias) multiplier : 0). For relu alone, signs takes the bits of "
        "what is kept and not at or below 0.",
        dtype=CODE,
        residual_dtype=CODE,
        x=DATA,
        input_bias=maybe(COLUMN),
        multiplier=maybe(DATA),
        residual=maybe(RESIDUAL),
        words=maybe(WORDS),
        y=out(RESIDUAL),
        signs=maybe(out(WORDS)),
        rows=COUNT,
        columns=COUNT,
        a=NUMBER,
        activation=CODE,
    ),
    Primitive(
        "pointwise_backward",
        over="cells",
        does="Of dy, of residual_dtype: dx, dmultiplier, and the gradient of input_bias in sums, [panels, columns], "
        "whose first row ends as the total.",
        dtype=CODE,
        residual_dtype=CODE,
        dy=RESIDUAL,
        x=maybe(DATA),
        input_bias=maybe(COLUMN),
        multiplier=maybe(DATA),
        words=maybe(WORDS),
        dx=out(DATA),
        dmultiplier=maybe(out(DATA)),
        sums=maybe(out(SUMS)),
        rows=COUNT,
        columns=COUNT,
        panels=COUNT,
        a=NUMBER,
        activation=CODE,
    ),
    Primitive(
        "norm_forward",
        over="rows",
        draws=True,
        does="residual_out = residual + (bit ? a (x + input_bias) : 0); y = (residual_out - mean) / deviation weight + "
        "norm_bias by rows, mean 0 unless centred; statistics [rows, 2]: the mean and one over the deviation.",
        dtype=CODE,
        residual_dtype=CODE,
        x=DATA,
        input_bias=maybe(COLUMN),
        residual=maybe(RESIDUAL),
        words=maybe(WORDS),
        weight=maybe(COLUMN),
        norm_bias=maybe(COLUMN),
        y=out(DATA),
        residual_out=out(RESIDUAL),
        statistics=out(STATISTICS),
        rows=COUNT,
        columns=COUNT,
        a=NUMBER,
        eps=DOUBLE,
        centred=FLAG,
    ),
    Primitive(
        "norm_backward",
        over="panels",
        does="dresidual = dresidual_out + the norm's gradient of dy; dx = bit ? a dresidual : 0; sums [panels, 3, "
        "columns]: of weight, norm_bias and input_bias.",
        dtype=CODE,
        residual_dtype=CODE,
        dy=DATA,
        dresidual_out=maybe(RESIDUAL),
        residual_out=RESIDUAL,
        statistics=STATISTICS,
        weight=maybe(COLUMN),
        words=maybe(WORDS),
        dx=maybe(out(DATA)),
        dresidual=maybe(out(RESIDUAL)),
        sums=maybe(out(SUMS)),
        rows=COUNT,
        columns=COUNT,
        panels=COUNT,
        a=NUMBER,
        centred=FLAG,
    ),
    Primitive(
        "softmax_forward",
        over="rows",
        draws=True,
        does="probabilities = softmax by rows of softmax_scale x + mask; y = bit ? a probabilities : 0. Row r is query "
        "r % queries of head r / queries % heads; its row of the mask begins at (r / queries / heads) outer_stride + "
        "head head_stride + query query_stride.",
        dtype=CODE,
        x=DATA,
        mask=maybe(MASK),
        words=maybe(WORDS),
        probabilities=maybe(out(DATA)),
        y=out(DATA),
        rows=COUNT,
        columns=COUNT,
        heads=COUNT,
        queries=COUNT,
        outer_stride=COUNT,
        head_stride=COUNT,
        query_stride=COUNT,
        softmax_scale=NUMBER,
        a=NUMBER,
        causal=FLAG,
    ),
    Primitive(
        "softmax_backward",
        over="rows",
        does="dx = softmax_scale probabilities (g - sum of g probabilities over the row), g = bit ? a dy : 0; y as in "
        "forward.",
        dtype=CODE,
        dy=DATA,
        probabilities=DATA,
        words=maybe(WORDS),
        dx=out(DATA),
        y=maybe(out(DATA)),
        rows=COUNT,
        columns=COUNT,
        softmax_scale=NUMBER,
        a=NUMBER,
    ),
)

PRIMITIVES = {primitive.name: primitive for primitive in TABLE}


def entry_points() -> dict[str, tuple[Parameter, ...]]:
    """The functions of a backend that can draw: the primitives, and ``<name>_drawn`` of those that draw."""
    plain = {primitive.name: primitive.parameters for primitive in TABLE}
    return plain | {f"{primitive.name}_drawn": DRAW + primitive.parameters for primitive in TABLE if primitive.draws}

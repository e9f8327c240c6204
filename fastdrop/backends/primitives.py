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
    """``over``: "cells" are independent of each other; "rows", "panels" (of rows) and "heads" are worked
    on as a whole.

    ``draws``: there is also ``<name>_drawn``, which takes `DRAW` first and writes the mask words that it works under.
    ``cpu_only``: the CUDA backend has no such function.
    """

    __slots__ = ("cpu_only", "does", "draws", "name", "over", "parameters")

    def __init__(
        self, name: str, over: str, does: str, parameters: str, draws: bool = False, cpu_only: bool = False
    ) -> None:
        self.name, self.over, self.does, self.draws, self.parameters = name, over, does, draws, _declared(parameters)
        self.cpu_only = cpu_only

    @property
    def names(self) -> list[str]:
        return [parameter.name for parameter in self.parameters]

    @property
    def is_fused(self) -> bool:
        """Whether it works on rows of data: ``[rows, columns]``, or attention's."""
        return {"dtype", "rows", "columns"} <= set(self.names) or self.over == "heads"


# Kinds of numbers, and their types in C.
NUMBERS = {
    "code": "int",  # of a dtype or an activation
    "flag": "int",
    "count": "uint64_t",
    "seed": "uint64_t",  # may need all 64 bits
    "number": "double",  # rounded to the type of the arithmetic
    "double": "double",  # taken as it is, or rounded to float32, for every dtype
}
# Kinds of arrays. Those of the last four hold numbers of the type that is computed in: float64 for float64 data, else
# float32.
ARRAYS = {
    "words": "packed bits, uint32",
    "data": "numbers of ``dtype``, one for each element",
    "residual": "numbers of ``residual_dtype``, one for each element",
    "strides": "int64, in elements",
    "index": "int64, ascending",
    "column": "a number for each column",
    "mask": "numbers to be added to scores, read at strides; attention's is of ``mask_dtype``",
    "statistics": "two numbers for each row",
    "sums": "lines of columns, one or three for each panel of rows; sums of gradients of attention",
}


def _declared(declarations: str) -> tuple[Parameter, ...]:
    """Parameters of declarations as in C: a kind and names. An array of ``kind!`` is written. One of ``kind?`` may be
    absent: None in Python, NULL in C, 0 where it is an address."""
    found = []
    for declaration in declarations.split(";"):
        marked, *names = declaration.replace(",", " ").split()
        kind, written, optional = marked.rstrip("!?"), "!" in marked, "?" in marked
        c_type = "void *" if written else "const void *" if kind in ARRAYS else NUMBERS[kind]
        found += [Parameter(kind, c_type, name, written, optional) for name in names]
    return tuple(found)


DRAW = _declared("seed seed, offset; count threshold")

TABLE = (
    Primitive(
        "draw_bits",
        over="cells",
        does="Bits of cells first .. first+n-1, written at bits position .. position+n-1 of words.",
        parameters="words! words; count position; seed first; count n; seed seed, offset; count threshold",
    ),
    Primitive(
        "draw_rows",
        over="cells",
        does="Bit position + (o rows + r) columns + c of words = the bit of cell first + o outer_pitch + r pitch + c, "
        "for o < outer, r < rows, c < columns.",
        parameters="words! words; count position; seed first; count outer; seed outer_pitch; count rows; seed pitch; "
        "count columns; seed seed, offset; count threshold",
    ),
    Primitive(
        "dropout_forward",
        over="cells",
        does="y[i] = keep(first + i) ? a x[i] + b : c for i < n; the bits go to words too, where there are any.",
        parameters="code dtype; data x; data! y; words!? words; seed first; count n; seed seed, offset; "
        "count threshold; number a, b, c",
    ),
    Primitive(
        "masked_affine",
        over="cells",
        does="y[o, r, i] = bit(position + o inner + i) ? a x[o, r, i] + b : c.",
        parameters="code dtype; data x; data! y; words words; count position, outer, repeat, inner; number a, b, c",
    ),
    Primitive(
        "gaussian_multiply",
        over="cells",
        does="y[i] = x[i] (1 + sigma z(first + i)), z the cells' standard normal numbers.",
        parameters="code dtype; data x; data! y; seed first; count n; seed seed, offset; double sigma",
    ),
    Primitive(
        "dilate_bits",
        over="cells",
        does="Bit [o, i, j] of to = AND over s < block of bit [o, i - s, j] of words, [outer, n, inner], where "
        "there is one; to is [outer, n + block - 1, inner].",
        parameters="words! to; words words; count outer, n, inner, block",
    ),
    Primitive(
        "gather_cells",
        over="rows",
        cpu_only=True,
        does="y[r, c] = x[kept_rows[r], kept_columns[c]] for r < m, c < n; x is [height, width]. Each index ascends.",
        parameters="code dtype; data x; data! y; index kept_rows, kept_columns; count m, n, height, width",
    ),
    Primitive(
        "scatter_cells",
        over="rows",
        cpu_only=True,
        does="y[kept_rows[r], kept_columns[c]] = x[r, c] for r < m, c < n; all else of y [height, width] is +0. Each "
        "index ascends.",
        parameters="code dtype; data x; data! y; index kept_rows, kept_columns; count m, n, height, width",
    ),
    Primitive(
        "pointwise_forward",
        over="cells",
        draws=True,
        does="y = residual + (bit ? a act(x + input_bias) multiplier : 0). For relu alone, signs takes the bits "
        "of what is kept and not at or below 0.",
        parameters="code dtype, residual_dtype; data x; column? input_bias; data? multiplier; residual? residual; "
        "words? words; residual! y; words!? signs; count rows, columns; number a; code activation",
    ),
    Primitive(
        "pointwise_backward",
        over="cells",
        does="Of dy, of residual_dtype: dx, dmultiplier, and the gradient of input_bias in sums, [panels, "
        "columns], whose first row ends as the total.",
        parameters="code dtype, residual_dtype; residual dy; data? x; column? input_bias; data? multiplier; "
        "words? words; data! dx; data!? dmultiplier; sums!? sums; count rows, columns, panels; number a; "
        "code activation",
    ),
    Primitive(
        "norm_forward",
        over="rows",
        draws=True,
        does="residual_out = residual + (bit ? a (x + input_bias) : 0); y = (residual_out - mean) / deviation "
        "weight + norm_bias by rows, mean 0 unless centred; statistics [rows, 2]: the mean and one over the "
        "deviation.",
        parameters="code dtype, residual_dtype; data x; column? input_bias; residual? residual; words? words; "
        "column? weight, norm_bias; data! y; residual! residual_out; statistics! statistics; "
        "count rows, columns; number a; double eps; flag centred",
    ),
    Primitive(
        "norm_backward",
        over="panels",
        does="dresidual = dresidual_out + the norm's gradient of dy; dx = bit ? a dresidual : 0; sums [panels, "
        "3, columns]: of weight, norm_bias and input_bias.",
        parameters="code dtype, residual_dtype; data dy; residual? dresidual_out; residual residual_out; "
        "statistics statistics; column? weight; words? words; data!? dx; residual!? dresidual; sums!? sums; "
        "count rows, columns, panels; number a; flag centred",
    ),
    Primitive(
        "softmax_forward",
        over="rows",
        draws=True,
        does="probabilities = softmax by rows of softmax_scale x + mask; y = bit ? a probabilities : 0. Row r is "
        "query r % queries of head r / queries % heads; its row of the mask begins at (r / queries / heads) "
        "outer_stride + head head_stride + query query_stride.",
        parameters="code dtype; data x; mask? mask; words? words; data!? probabilities; data! y; "
        "count rows, columns, heads, queries, outer_stride, head_stride, query_stride; "
        "number softmax_scale, a; flag causal",
    ),
    Primitive(
        "softmax_backward",
        over="rows",
        does="dx = softmax_scale probabilities (g - sum of g probabilities over the row), g = bit ? a dy : 0; y "
        "as in forward.",
        parameters="code dtype; data dy, probabilities; words? words; data! dx; data!? y; count rows, columns; "
        "number softmax_scale, a",
    ),
    Primitive(
        "attention_forward",
        over="heads",
        cpu_only=True,
        does="y = W value, W = bit ? a softmax by rows of (softmax_scale query key^T + mask) : 0, for each of the "
        "outer heads group heads of query [queries, width], of which a group shares a head of key [keys, width] and of "
        "value [keys, value_width]. Under causal, query q sees the keys up to q. y is [outer, heads group, queries, "
        "value_width]; statistics of its rows before dropout: the largest score, and one over the sum of exp(score - "
        "largest); infinity and 0 where nothing is seen. A weight's bit is that of cell first + its place among the "
        "cells, or bit first + that place of words, where there are any. strides: outer, head, row and column of each "
        "of query, key, value, mask, dy, dmask and cells; columns of all but mask and dmask are 1. Cells have the axes "
        "of the weights, and a stride of 0 along an axis that shares them.",
        parameters="code dtype, mask_dtype; data query, key, value; mask? mask; words? words; data! y; "
        "statistics! statistics; strides strides; count outer, heads, group, queries, keys, width, value_width; "
        "seed first, seed, offset; count threshold; number softmax_scale, a; flag causal",
    ),
    Primitive(
        "attention_backward",
        over="heads",
        cpu_only=True,
        does="The gradients of attention_forward, of those that are asked for: dquery [parts, outer, heads group, "
        "queries, width] and dmask are added to, and query's gradient is the sum over the parts, each of some of the "
        "keys; dkey and dvalue are written, [outer, heads, keys, ...]. Neither two heads of key nor two parts may "
        "share an element of dmask. All gradients but dvalue need value and y.",
        parameters="code dtype, mask_dtype; data query, key; data? value; mask? mask; words? words; data dy; data? y; "
        "statistics statistics; sums!? dquery; data!? dkey, dvalue; sums!? dmask; strides strides; "
        "count outer, heads, group, queries, keys, width, value_width, parts; "
        "seed first, seed, offset; count threshold; number softmax_scale, a; flag causal",
    ),
)

PRIMITIVES = {primitive.name: primitive for primitive in TABLE}


def entry_points() -> dict[str, tuple[Parameter, ...]]:
    """The functions of a backend that can draw: the primitives, and ``<name>_drawn`` of those that draw."""
    plain = {primitive.name: primitive.parameters for primitive in TABLE}
    return plain | {f"{primitive.name}_drawn": DRAW + primitive.parameters for primitive in TABLE if primitive.draws}

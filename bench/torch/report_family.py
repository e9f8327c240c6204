"""Reports the other kinds of dropout: `python -m bench.torch.report_family RESULTS.json`.

It writes RESULTS.md and RESULTS.png. The targets come first, those that were missed on top. The second table has every
case.
"""

from __future__ import annotations

import sys

from ..report import Row, Suite

# kind: (operations judged, at most: of the first peer's time)
LIMITS = {
    "feature": (("forward", "backward"), 1.0),
    "variational": (("forward", "backward"), 1.0),
    "stochastic depth": (("forward", "backward"), 1.0),
    "DropBlock": (("forward", "forward+backward"), 1 / 5),
    "DropConnect": (("forward",), 1.1),
    "alpha": (("forward",), 1.1),
    "Gaussian": (("forward", "forward+backward"), 1 / 4),
    "mc_predict": (("50 samples",), 1 / 3),
}
INTRO = (
    "Medians of alternating samples, every ratio the median of those taken round by round. Against `torch.mul` and "
    "`fd.dropout`, calls are the NumPy API's, whole, into memory that is there; the others are `fastdrop.torch`'s, "
    "which allocate their results, as their peers do. `mc_predict` is judged by the loop that torch's users write; "
    "the same loop over fastdrop's modules stands in the last table."
)


def limits(row: Row, peer: str) -> tuple[float, ...]:
    operations, share = LIMITS[row["kind"]]
    return (share,) if row["operation"] in operations and peer == next(iter(row["peers"])) else ()


def line(row: Row, peer: str) -> tuple[str, str]:
    """Sizes are worth a line each."""
    size = f", {row['layout']}" if row["kind"] in ("Gaussian", "mc_predict") else ""
    return row["kind"], f"{row['operation']}{size}  /  {peer}"


def left_out(row: Row, peer: str) -> bool:
    return row["kind"] == "Gaussian" and row["layout"] == "1M"


NOTE = "of several memory layouts and rates the one that is further from its target"
SUITE = Suite("the family", INTRO, limits, "The family of dropouts", line, left_out, NOTE)

if __name__ == "__main__":
    sys.exit(SUITE.main(sys.argv[1:], __doc__ or ""))

"""Reports dropout that saves work: `python -m bench.torch.report_saving RESULTS.json`.

It writes RESULTS.md and RESULTS.png. The targets come first, those that were missed on top. The second table has every
case.
"""

from __future__ import annotations

import sys

from ..report import Row, Suite

P_ZERO, MASKED, TORCH_DROPPED = "the same without dropout", "all samples, then a mask", "torch's dropout"
KEPT, INPUT, FUSED = "bytes kept without dropout", "bytes of the input", "torch's layer"
# kind and layout: at most this share of each peer
LIMITS = {
    ("skipped residual branches", "p = 0.1"): {P_ZERO: 0.97},
    ("skipped residual branches", "p = 0.2"): {P_ZERO: 0.86},
    ("skipped residual branches", "p = 0.4"): {P_ZERO: 0.65, KEPT: 0.65},
    ("LoRA", "p = 0.1"): {P_ZERO: 1.08, INPUT: 1.1},
    ("shared recurrent mask", "256 wide"): {FUSED: 1.05},
    ("shared recurrent mask", "512 wide"): {FUSED: 1.05},
    ("recurrent mask per sequence", "512 wide"): {FUSED: 1.15},
    ("batchwise", "batch 256, p = 0.5"): {P_ZERO: 0.52},
    ("batchwise", "batch 64, p = 0.5"): {P_ZERO: 0.8},
}
INTRO = (
    "Medians of alternating samples, every ratio the median of those taken round by round. A step is forward, backward "
    "and SGD, in memory that is used again. Residual branches: 4 pre-norm blocks, 256 wide, of 32 x 64 tokens. LoRA: "
    "three adapters of rank 16 on one input of 2,048 x 1,024, whose projections are frozen. Recurrent: one layer, 32 "
    "sequences of 64 steps, p = 0.3. Batchwise: 784-2048-2048-10 after `fdt.fuse`. Bytes are those that the forward "
    "pass keeps, parameters not counted."
)


def limits(row: Row, peer: str) -> tuple[float, ...]:
    found = LIMITS.get((row["kind"], row["layout"]), {})
    return (found[peer],) if peer in found else ()


def left_out(row: Row, peer: str) -> bool:
    """What the table has beside the main comparison of a kind."""
    return peer in (MASKED, TORCH_DROPPED) or (peer == KEPT and not limits(row, peer))


SUITE = Suite("dropout that saves work", INTRO, limits, "Dropout that saves work", left_out=left_out)

if __name__ == "__main__":
    sys.exit(SUITE.main(sys.argv[1:], __doc__ or ""))

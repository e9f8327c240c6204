"""Reports what masks for any number of processes cost: `python -m bench.torch.report_parallel RESULTS.json`.

It writes RESULTS.md and RESULTS.png. The targets come first, those that were missed on top. The second table has every
case.
"""

from __future__ import annotations

import sys

from ..report import Row, Suite

TORCH_MUL, UNNAMED = "torch's mul of it by a number", "the same without names"
LIMITS = {TORCH_MUL: 1.3, UNNAMED: 1.03}
INTRO = (
    "Medians of alternating samples, every ratio the median of those taken round by round, p = 0.1. A DTensor lies on "
    "a mesh of one process: what is timed is one process's call, not what processes send. Recorded means that autograd "
    "records the call. The step is forward, backward and SGD of `nn.TransformerEncoder` (4 layers, 256 wide) inside of "
    "`fdt.enabled()`, with and without `fdt.name_masks`. `make bench-quick` times `draw_rows`, which draws a shard's "
    "part of a mask."
)


def limits(row: Row, peer: str) -> tuple[float, ...]:
    return (LIMITS[peer],)


SUITE = Suite("masks for many processes", INTRO, limits, "Masks for many processes")

if __name__ == "__main__":
    sys.exit(SUITE.main(sys.argv[1:], __doc__ or ""))

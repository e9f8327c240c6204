"""Turns a benchmark JSON of the fused kernels into a report: python -m bench.report_fused RESULTS.json.

It writes RESULTS.md and RESULTS.png: the targets, misses on top, then every case.
"""

from __future__ import annotations

import sys

from .limits import Row, Suite

ADD, MUL, GELU, LAYER_NORM, SOFTMAX = "torch.add", "torch.mul", "F.gelu", "F.layer_norm", "F.softmax"
COMPILED, P_ZERO, KEPT = "the formula, compiled", "plain torch at p = 0", "bytes kept by plain torch at p = 0.1"
LIMITS = {ADD: 1.2, MUL: 1.2, GELU: 0.8, LAYER_NORM: 1.2, SOFTMAX: 1.2, COMPILED: 0.2, P_ZERO: 1.0, KEPT: 0.6}
INTRO = (
    "Medians of alternating samples, every ratio the median of those taken round by round; p = 0.1. Against "
    "`torch.add` and `torch.mul` with `out=`, calls are the NumPy API's, whole, into memory that is there; the others "
    "are `fastdrop.torch`'s on tensors that require gradients, which allocate their results and keep what backward "
    "needs, as their peers do. Backward is `torch.autograd.grad` alone. The training step is forward, backward and SGD "
    "after `fdt.fuse`, under `fdt.enable()`."
)


def limit(row: Row, peer: str) -> float | None:
    return LIMITS.get(peer)


if __name__ == "__main__":
    sys.exit(Suite("fused kernels", INTRO, limit, "Fused kernels").main(sys.argv[1:], __doc__ or ""))

"""Reports fused kernels: `python -m bench.torch.report_fused RESULTS.json`.

It writes RESULTS.md and RESULTS.png. The targets come first, those that were missed on top. The second table has every
case.
"""

from __future__ import annotations

import sys

from ..report import Row, Suite, by_operation

ADD, MUL, GELU, LAYER_NORM, SOFTMAX = "torch.add", "torch.mul", "F.gelu", "F.layer_norm", "F.softmax"
COMPILED, P_ZERO, KEPT = "the formula, compiled", "plain torch at p = 0", "bytes kept by plain torch at p = 0.1"
ADD_AND_NORM = "torch.add, then F.layer_norm"
LIMITS = {
    ADD: 1.2,
    MUL: 1.2,
    GELU: 0.8,
    LAYER_NORM: 1.2,
    SOFTMAX: 1.2,
    COMPILED: 0.2,
    P_ZERO: 1.0,
    KEPT: 0.6,
}
# kind, operation, layout, peer: (threads, at most), beside what is asked of the peer in general
CASE_LIMITS = {
    ("dropout_add_layer_norm", "forward", "8192 x 1024", ADD_AND_NORM): ((1, 2), 0.75),
    ("bias_act_dropout gelu", "forward", "2048 x 2048", GELU): ((2,), 0.9),
}
INTRO = (
    "Medians of alternating samples, every ratio the median of those taken round by round; p = 0.1. Calls are "
    "`fastdrop.torch`'s, which allocate their results: on tensors that require gradients, so that they keep what "
    "backward needs, as their peers do, and on tensors that don't beside `torch.add` and `torch.mul`, which write to "
    "`out=`. Memory is used again by the next call, on both sides; where a case says fresh memory, the system provides "
    "it anew for each result, on both sides. Backward is `torch.autograd.grad` alone. The training step is forward, "
    "backward and SGD after `fdt.fuse`, and nothing else."
)


def limits(row: Row, peer: str) -> tuple[float, ...]:
    """None of a peer that is there for orientation."""
    general = (LIMITS[peer],) if peer in LIMITS else ()
    threads, share = CASE_LIMITS.get((row["kind"], row["operation"], row["layout"], peer), ((), 0.0))
    return (*general, share) if row["threads"] in threads else general


NOTE = "of two shapes of the data, 2048 x 2048 and 8192 x 1024, the one that is further from its target"
SUITE = Suite("fused kernels", INTRO, limits, "Fused kernels", by_operation, note=NOTE)

if __name__ == "__main__":
    sys.exit(SUITE.main(sys.argv[1:], __doc__ or ""))

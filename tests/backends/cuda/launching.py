"""Launches for the tests of the launcher and the driver: arguments, calls, and the parameters that reach a kernel."""

from __future__ import annotations

import re
import struct

import numpy as np

from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.core.checks import FLOAT32, FLOAT64

from ...cases import TENTH

STREAM = 0x7F00_1234_5670
CODES = {"u64": "Q", "u32": "I", "f32": "f", "f64": "d"}
X, Y, WORDS = 0x7F10_0000_0000, 0x7F20_0000_0000, 0x7F30_0000_0004
SEED, OFFSET, SEED_AT, KEPT = 0xFEDC_BA98_7654_3210, 0x8000_0000_0000_0001, 0x7F40_0000_0008, 0x7F50_0000_0010
FIRST, POSITION = 2**63 + 32, 2**62 + 7
AFFINE = (1.1, -0.3, 0.7)


def parameters(launch):
    """A launch's parameters by the types and alignments that its PTX declares."""
    declared = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)", launch.ptx, re.S)[1]
    at, values = 0, []
    for kind in re.findall(r"\.param\s+\.(\w+)", declared):
        size = struct.calcsize(CODES[kind])
        at = -(-at // size) * size
        values.append(struct.unpack_from(CODES[kind], launch.parameters, at)[0])
        at += size
    assert at == len(launch.parameters)
    return values


def coefficients(dtype, values):
    return list(values) if dtype == FLOAT64 else [float(np.float32(v)) for v in values]


def draw(device=0, stream=STREAM, n=1000, **options):
    numba_cuda.draw_bits_at(device, stream, WORDS, POSITION, FIRST, n, SEED, OFFSET, TENTH, **options)


def forward(device=0, stream=STREAM, dtype=FLOAT32, n=1000, first=FIRST, affine=AFFINE, **options):
    numba_cuda.dropout_forward_at(device, stream, dtype, X, Y, WORDS, first, n, SEED, OFFSET, TENTH, *affine, **options)

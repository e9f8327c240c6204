"""Launches for the tests of the launcher and the driver: arguments, calls, and the parameters that reach a kernel."""

from __future__ import annotations

import struct

from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.core.checks import FLOAT32

from ...cases import TENTH

STREAM = 0x7F00_1234_5670
X, Y, WORDS = 0x7F10_0000_0000, 0x7F20_0000_0000, 0x7F30_0000_0004
SEED, OFFSET, SEED_AT, KEPT = 0xFEDC_BA98_7654_3210, 0x8000_0000_0000_0001, 0x7F40_0000_0008, 0x7F50_0000_0010
FIRST, POSITION = 2**63 + 32, 2**62 + 7
AFFINE = (1.1, -0.3, 0.7)


def parameters(launch):
    """A launch's parameters, each at its natural alignment."""
    return list(struct.unpack("@" + launch.variant.codes, launch.parameters))


def draw(device=0, n=1000, **options):
    numba_cuda.draw_bits_at(device, STREAM, WORDS, POSITION, FIRST, n, SEED, OFFSET, TENTH, **options)


def forward(dtype=FLOAT32, n=1000, first=FIRST, affine=AFFINE, **options):
    numba_cuda.dropout_forward_at(0, STREAM, dtype, X, Y, WORDS, first, n, SEED, OFFSET, TENTH, *affine, **options)

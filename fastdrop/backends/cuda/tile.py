"""How work is divided: numbers that the launcher, the kernels and their vocabulary share."""

from __future__ import annotations

from ...core.checks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

LANES = 32  # of a warp
TILE_CELLS = 32 * LANES  # a warp's: each lane has a word of them
VECTOR_BYTES = 16  # one access of a lane
BATCH = 8  # elements a lane has under way where it takes them one by one
COUNTED = 16  # words of a thread, at the least, before it adds what it counted to what all did
ITEM_BYTES = {FLOAT32: 4, FLOAT64: 8, FLOAT16: 2, BFLOAT16: 2}
TEAM_WARPS = 4  # of a block
SHORT_ROW = 512  # columns that a warp takes; longer rows are a block's

"""Faults to plant: one line each, over all layers, with the tests that must catch them.

The suite may become smaller and faster only if it still finds these. ``python tests/mutations.py`` copies the project,
plants one fault at a time, runs the tests named beside it, and prints which faults were caught and which were not; its
exit status is the number of those that were not. ``-k WORD`` picks faults by name or file, ``--list`` prints them,
``--all-tests`` runs the whole suite for each. A fault in C takes a build, about a minute.

`test_mutations` holds the list to the source: each line that is to be changed stands exactly once in its file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


LIMIT = 1200  # seconds for the tests of one fault


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest


MASKS, PRIMITIVES, ROWS = (
    "tests/backends/test_mask_spec.py",
    "tests/backends/test_mask.py",
    "tests/backends/test_fused.py",
)
CELLS, BATCHWISE = "tests/backends/test_cells.py", "tests/torch/functional/test_batchwise.py"
ATTENTION, MEMORY = "tests/backends/test_attention.py", "tests/backends/test_memory.py"
FUSED, FAMILY = "tests/arrays/test_fused.py", "tests/arrays/test_variants.py"
PARTS, SHARDS = "tests/arrays/test_parts.py", "tests/torch/distributed/test_dtensor.py"
CURVES = "tests/torch/distributed/test_curves.py"
CUDA, CUDA_ROWS = "tests/backends/cuda/test_primitives.py", "tests/backends/cuda/test_fused.py"

MUTATIONS = (
    # ---- C ----
    Mutation(
        "a Philox round less",
        "csrc/draw.inc.h",
        "for (int r = 3; r < PHILOX_ROUNDS - 1; r++) {",
        "for (int r = 3; r < PHILOX_ROUNDS - 2; r++) {",
        MASKS,
    ),
    Mutation(
        "another mask domain",
        "csrc/philox.h",
        "#define MASK_DOMAIN (1u << 27)",
        "#define MASK_DOMAIN (1u << 28)",
        MASKS,
    ),
    Mutation(
        "offset's upper half lost",
        "csrc/draw.inc.h",
        "p->round1_c2 = (uint32_t)(offset >> 32) ^ p->key1[0];",
        "p->round1_c2 = (uint32_t)(offset >> 33) ^ p->key1[0];",
        MASKS,
    ),
    Mutation(
        "seed's upper half lost",
        "csrc/draw.inc.h",
        "p->key1[r] = (uint32_t)(seed >> 32) + (uint32_t)r * PHILOX_W1;",
        "p->key1[r] = (uint32_t)(seed >> 31) + (uint32_t)r * PHILOX_W1;",
        MASKS,
    ),
    Mutation(
        "the upper half of the index is not followed",
        "csrc/draw.inc.h",
        "philox_set_high(&d->philox, high);",
        "philox_set_high(&d->philox, d->philox.high);",
        PRIMITIVES,
    ),
    Mutation(
        "words set aside are given up a group early",
        "csrc/draw.inc.h",
        "for (int g = 2; g < d->groups && pending; g++) {",
        "for (int g = 2; g + 1 < d->groups && pending; g++) {",
        MASKS,
    ),
    Mutation(
        "a group too few for thresholds of two groups",
        "csrc/draw.inc.h",
        "d->groups = (planes + PLANES_PER_GROUP - 1) / PLANES_PER_GROUP;",
        "d->groups = (planes + PLANES_PER_GROUP - 2) / PLANES_PER_GROUP;",
        MASKS,
    ),
    Mutation(
        "draw_bits starts at the part's own cell 0",
        "csrc/draw.inc.h",
        "uint64_t cell = args->first + (at - args->position);",
        "uint64_t cell = args->first + (at - begin);",
        PRIMITIVES,
    ),
    Mutation(
        "draw_rows lists a row a word too short",
        "csrc/rows.inc.h",
        "words += (lead + (unsigned)columns + 31) / 32;",
        "words += ((unsigned)columns + 31) / 32;",
        PRIMITIVES,
    ),
    Mutation(
        "bits of a run read a bit late",
        "csrc/mask_bits.inc.h",
        "return (uint32_t)(pair >> (position & 7));",
        "return (uint32_t)(pair >> (position & 6));",
        PRIMITIVES,
    ),
    Mutation(
        "the tail of a mask is not cleared",
        "csrc/bits.h",
        "return (uint32_t)(pair >> shift) & low_bits(n);",
        "return (uint32_t)(pair >> shift);",
        PRIMITIVES,
    ),
    Mutation(
        "repeated bits of shared decisions: one cell early",
        "csrc/mask_bits.inc.h",
        "step = min_u64(args->repeat - r, n);",
        "step = min_u64(args->repeat - r + (r == 0), n);",
        PRIMITIVES,
    ),
    Mutation(
        "the seam of two blocks is applied under the wrong bits",
        "csrc/apply.inc.h",
        "D(apply_block)(x + at, y + at, now->words, lead, n, b, &f);",
        "D(apply_block)(x + at, y + at, now->words, lead * (b > 0), n, b, &f);",
        PRIMITIVES,
    ),
    Mutation(
        "b is added where it is 0",
        "csrc/apply.inc.h",
        "D(set1)(c), b == 0 && c == 0, stream,",
        "D(set1)(c), 0, stream,",
        PRIMITIVES,
    ),
    Mutation(
        "a last vector is cut by one",
        "csrc/apply.inc.h",
        "memcpy(y, part, n * sizeof *y);",
        "memcpy(y, part, (n - 1) * sizeof *y);",
        PRIMITIVES,
    ),
    Mutation(
        "noise of the wrong tile",
        "csrc/apply.inc.h",
        "uint64_t cell = args->first + at, lead = cell % TILE_CELLS;",
        "uint64_t cell = args->first + at - begin, lead = cell % TILE_CELLS;",
        PRIMITIVES,
    ),
    Mutation(
        "blocks one cell too short",
        "csrc/dilate.inc.h",
        "and_shifted(window, reached, more * inner);",
        "and_shifted(window, reached, (more - (have + more == taken)) * inner);",
        PRIMITIVES,
    ),
    Mutation(
        "a relu keeps the bits of zeros",
        "csrc/drop.inc.h",
        "keep = C(except)(keep, C(not_above)(v.v[k], C(set1)(0)));",
        "keep = C(except)(keep, C(not_above)(v.v[k], C(set1)(-1)));",
        ROWS,
    ),
    Mutation(
        "the residual is scaled too",
        "csrc/drop.inc.h",
        "if (adds) kept = kept + C(load)(residual + i + at);",
        "if (adds) kept = kept + C(load)(residual + i + at) * a;",
        ROWS,
    ),
    Mutation(
        "columns of the bias begin one late",
        "csrc/pointwise.inc.h",
        "const uint64_t column = at % c->columns;",
        "const uint64_t column = (at + 1) % c->columns;",
        ROWS,
    ),
    Mutation(
        "the gradient of a norm without its mean",
        "csrc/norm.inc.h",
        "m.mean_g = C(set1)(args->centred ? m.sum_g / (double)columns : 0);",
        "m.mean_g = C(set1)(0);",
        ROWS,
    ),
    Mutation(
        "causal softmax sees a key less",
        "csrc/softmax.inc.h",
        "keys = args->causal ? min_u64(columns, query + 1) : columns;",
        "keys = args->causal ? min_u64(columns, query) : columns;",
        ROWS,
    ),
    Mutation(
        "softmax's gradient without its scale",
        "csrc/softmax.inc.h",
        "(C(load_partial)(g + i, left) - dot) * C(load_partial)(p + i, left) * scale, left, 0);",
        "(C(load_partial)(g + i, left) - dot) * C(load_partial)(p + i, left), left, 0);",
        ROWS,
    ),
    Mutation(
        "the first panel is added twice",
        "csrc/kernels.inc.h",
        "for (uint64_t panel = 1; panel < args->panels; panel++) {",
        "for (uint64_t panel = 0; panel < args->panels; panel++) {",
        ROWS,
    ),
    Mutation(
        "every other piece of a page is left out",
        "csrc/order.inc.h",
        "return (group << o->page_bits | page) << o->round_bits | round;",
        "return (group << o->page_bits | page) << o->round_bits | (round & ~1u);",
        PRIMITIVES,
    ),
    Mutation(
        "more pages than a chunk of 16-bit data has",
        "csrc/order.inc.h",
        "while ((uint64_t)PAGE_BYTES << order.page_bits > CHUNK_CELLS * element_bytes) order.page_bits--;",
        "",
        PRIMITIVES,
    ),
    Mutation(
        "streaming from where no line begins",
        "csrc/apply.inc.h",
        "const uint64_t to = min_u64(n, (piece + 1) * f->order.cells + seam);",
        "const uint64_t to = min_u64(n, (piece + 1) * f->order.cells);",
        PRIMITIVES,
    ),
    Mutation(
        "attention's mask of a tile begins at the wrong cell",
        "csrc/attention.inc.h",
        "C(element)(cells, tile->outer, tile->head, tile->query) + tile->key;",
        "C(element)(cells, tile->outer, tile->head, tile->query);",
        ATTENTION,
    ),
    Mutation(
        "attention: a tile's queries share a row of cells, and only the first has it",
        "csrc/attention.inc.h",
        "for (uint64_t r = rows; r < tile->rows; r++) memcpy(bits + r * pitch",
        "for (uint64_t r = tile->rows; r < rows; r++) memcpy(bits + r * pitch",
        ATTENTION,
    ),
    Mutation(
        "attention: heads that share cells have the next ones in backward of a mask",
        "fastdrop/torch/runtime/attention_kernels.py",
        "first = o.start * of_outer + h.start * extents.group * of_head",
        "first = o.start * of_outer + h.start * extents.group * extents.queries * extents.keys",
        "tests/torch/functional/test_attention.py",
    ),
    Mutation(
        "attention: sums of tiles before are not brought to the new maximum",
        "csrc/attention.inc.h",
        "if (factor == factor && factor != 1) C(times)(row, row, panels * C(panel), C(set1)(factor));",
        "if (factor < 0) C(times)(row, row, panels * C(panel), C(set1)(factor));",
        ATTENTION,
    ),
    Mutation(
        "attention: the weights' sum is of those that are kept",
        "csrc/attention.inc.h",
        "sum.v[k] = sum.v[k] + v.v[k];",
        "sum.v[k] = sum.v[k] + C(scale)(keep.v[k], v.v[k], C(set1)(1));",
        ATTENTION,
    ),
    Mutation(
        "attention: a causal tile's last key is not seen",
        "csrc/attention.inc.h",
        "return query < tile->key ? 0 : min_u64(tile->columns, query - tile->key + 1);",
        "return query < tile->key ? 0 : min_u64(tile->columns, query - tile->key);",
        ATTENTION,
    ),
    Mutation(
        "attention: a product forgets its last rows",
        "csrc/products.inc.h",
        "CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)",
        "CASE(1) CASE(2) CASE(3) CASE(4)",
        ATTENTION,
    ),
    Mutation(
        "attention: a part of query's gradient is added to another's",
        "csrc/attention.inc.h",
        "((part * args->outer + tile->outer) * heads + tile->head) * call->queries",
        "((part + tile->outer) * heads + tile->head) * call->queries",
        ATTENTION,
    ),
    Mutation(
        "attention: the mask's gradient of a query replaces that of the one before",
        "csrc/attention.inc.h",
        "C(add)(to, d, to, n);",
        "memcpy(to, d, n * sizeof *d);",
        ATTENTION,
    ),
    Mutation(
        "attention: a group is of heads that are not neighbours",
        "csrc/attention.inc.h",
        "tile->head = shared * args->group + member;",
        "tile->head = shared + member * args->heads;",
        ATTENTION,
    ),
    Mutation(
        "attention: the sum of dy y has dy's first strip for each strip of y",
        "csrc/attention.inc.h",
        "C(load_partial)(dy + j + i, left)",
        "C(load_partial)(dy + i, left)",
        ATTENTION,
    ),
    # ---- the memory policy ----
    Mutation(
        "C does not follow the memory policy",
        "fastdrop/backends/c.py",
        "    memory.follow(set_memory)",
        "    pass",
        MEMORY,
    ),
    Mutation(
        "small outputs stream where caches are small",
        "fastdrop/backends/memory.py",
        "max(quarter, 2 * MIB)",
        "max(quarter, 0)",
        MEMORY,
    ),
    # ---- NumPy: the specification and what stands on it ----
    Mutation(
        "p rounded down",
        "fastdrop/core/random.py",
        "return round(p * 4294967296.0)",
        "return int(p * 4294967296.0)",
        "tests/core/test_random.py",
    ),
    Mutation(
        "the scale of p as it was given",
        "fastdrop/core/random.py",
        "return nearest(DROP_ALL, DROP_ALL - threshold) if threshold < DROP_ALL else 0.0",
        "return round(nearest(DROP_ALL, DROP_ALL - threshold), 4) if threshold < DROP_ALL else 0.0",
        "tests/core/test_random.py",
    ),
    Mutation(
        "a stream's offset stays",
        "fastdrop/core/random.py",
        "self._offset = offset + 1 if offset < checks.UINT64_END - 1 else 0",
        "self._offset = offset",
        "tests/core/test_random.py",
    ),
    Mutation(
        "p = 1 keeps the last word",
        "fastdrop/core/mask.py",
        "words[:] = 0 if threshold == DROP_ALL else 0xFFFFFFFF",
        "words[:-1] = 0 if threshold == DROP_ALL else 0xFFFFFFFF",
        "tests/core/test_mask.py",
    ),
    Mutation(
        "masks compare without their scale",
        "fastdrop/core/mask.py",
        "(mask._shape, mask._p, mask._scale, mask._parts)",
        "(mask._shape, mask._p, mask._parts)",
        "tests/core/test_mask.py",
    ),
    Mutation(
        "alpha dropout's shift has the wrong sign",
        "fastdrop/core/variants.py",
        "(a, -a * q * f, a * f * (1 - q))",
        "(a, a * q * f, a * f * (1 - q))",
        "tests/core/test_variants.py tests/arrays/test_variants.py",
    ),
    Mutation(
        "gamma without the places where a block fits",
        "fastdrop/core/variants.py",
        "room = math.prod(sizes) * math.prod(free)",
        "room = math.prod(sizes) * math.prod(extents)",
        "tests/core/test_variants.py tests/arrays/test_variants.py",
    ),
    Mutation(
        "feature dropout shares along samples",
        "fastdrop/core/variants.py",
        "return tuple(extent if axis in (0, channel_axis) else 1 for axis, extent in enumerate(shape))",
        "return tuple(extent if axis == channel_axis else 1 for axis, extent in enumerate(shape))",
        "tests/core/test_variants.py tests/arrays/test_variants.py",
    ),
    Mutation(
        "strides of shared axes",
        "fastdrop/core/grid.py",
        "axes.append((extent, stride if cells == extent else 0))",
        "axes.append((extent, stride))",
        "tests/core/test_grid.py",
    ),
    Mutation(
        "pieces of more axes in the wrong order",
        "fastdrop/core/grid.py",
        "yield i * self.size, sum(at * stride for at, stride in zip(index, strides, strict=True))",
        "yield i * self.size, sum(at * stride for at, stride in zip(index, strides[::-1], strict=True))",
        "tests/core/test_grid.py tests/arrays/test_variants.py",
    ),
    Mutation(
        "cosine starts fast",
        "fastdrop/schedules.py",
        "return _mix(self.start, self.end, (1.0 - math.cos(math.pi * fraction)) / 2)",
        "return _mix(self.start, self.end, math.sin(math.pi * fraction / 2))",
        "tests/test_schedules.py",
    ),
    Mutation(
        "warm-up takes steps from its schedule",
        "fastdrop/schedules.py",
        "return self.schedule(step - self.steps)",
        "return self.schedule(step)",
        "tests/test_schedules.py",
    ),
    Mutation(
        "a value of piecewise one step late",
        "fastdrop/schedules.py",
        "return self.values[bisect_right(self.boundaries, step)]",
        "return self.values[bisect_right(self.boundaries, step - 1)]",
        "tests/test_schedules.py",
    ),
    Mutation(
        "the words of a mask are allocated after the random state has moved",
        "fastdrop/arrays/masking.py",
        "    kernel_x, kernel_y = ops.kernel_arrays(x, y, mask_shape)\n    state = random_state(rng)\n",
        "    state = random_state(rng)\n    kernel_x, kernel_y = ops.kernel_arrays(x, y, mask_shape)\n",
        "tests/backends/test_ends.py",
    ),
    Mutation(
        "a gated op keeps its inputs in the wrong order",
        "fastdrop/arrays/fused_call.py",
        "kept_x, kept_multiplier = ops.copy_if_overlapping(x, y), ops.copy_if_overlapping(multiplier, y)",
        "kept_multiplier, kept_x = ops.copy_if_overlapping(x, y), ops.copy_if_overlapping(multiplier, y)",
        FUSED,
    ),
    Mutation(
        "an attention mask loses the stride of its heads",
        "fastdrop/arrays/fused_call.py",
        "(heads, head_stride)",
        "(1, head_stride)",
        FUSED,
    ),
    Mutation(
        "backward of a saved mask without its scale",
        "fastdrop/arrays/saved.py",
        "return 1.0 if self.mask is None else self.mask.scale",
        "return 1.0",
        FUSED,
    ),
    Mutation(
        "an axis of one sample is taken for one that shares decisions",
        "fastdrop/arrays/masking.py",
        "zip(mask_shape_of(whole), whole, strict=True)",
        "zip(mask_shape_of(shape), whole, strict=True)",
        PARTS,
    ),
    Mutation(
        "a part that is one run is applied from the whole's first cell",
        "fastdrop/arrays/masking.py",
        "return 0 if parts is None else first_cell(parts, shape)",
        "return 0 if parts is None else first_cell(parts, shape) and 0",
        PARTS,
    ),
    Mutation(
        "rows of noise all begin at the run's first cell",
        "fastdrop/core/part.py",
        "yield position, self.first + o * self.outer_pitch + r * self.pitch, self.columns",
        "yield position, self.first, self.columns",
        PARTS,
    ),
    Mutation(
        "a fused op of a part defers its draw, which knows no parts",
        "fastdrop/arrays/host.py",
        "if runs is None and 0 < threshold < DROP_ALL and primitive_with_draw is not None:",
        "if 0 < threshold < DROP_ALL and primitive_with_draw is not None:",
        PARTS,
    ),
    Mutation(
        "DropBlock of a part is scaled by the part's own count",
        "fastdrop/arrays/blocks.py",
        "counted = words if whole is own else whole.draw(state, threshold)",
        "counted, whole = words, own",
        PARTS,
    ),
    Mutation(
        "an array in another order of axes is applied in C order",
        "fastdrop/arrays/host.py",
        "grid = _grid_in_memory(x, y, mask_shape) or Grid.of(x.shape, mask_shape)",
        "grid = Grid.of(x.shape, mask_shape)",
        FAMILY,
    ),
    Mutation(
        "an array on a GPU: every argument is of the stream 0",
        "fastdrop/arrays/device.py",
        'return Place(address, cuda_backend().device_of(address), described.get("stream") or 0)',
        "return Place(address, cuda_backend().device_of(address), 0)",
        "tests/arrays/test_device.py",
    ),
    # ---- Numba ----
    Mutation(
        "Numba: keys of the last round",
        "fastdrop/backends/numba/scalars.py",
        "return philox_round(c0, c1, c2, c3, k0 + U(9) * W0, k1 + U(9) * W1)",
        "return philox_round(c0, c1, c2, c3, k0 + U(9) * W0, k1 + U(8) * W1)",
        MASKS,
    ),
    Mutation(
        "Numba: a plane equal to the threshold's is dropped",
        "fastdrop/backends/numba/scalars.py",
        "return (keep & r) | (~t & (keep | r))",
        "return (keep & r) | (~t & r)",
        MASKS,
    ),
    Mutation(
        "Numba: bfloat16 rounded towards zero",
        "fastdrop/backends/numba/scalars.py",
        "rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))",
        "rounded = np.uint32(bits >> np.uint32(16))",
        PRIMITIVES,
    ),
    Mutation(
        "Numba: pieces of a page in the wrong order",
        "fastdrop/backends/numba/mask.py",
        "return (((group << way.page_bits) | page) << way.round_bits) | turn",
        "return (((group << way.page_bits) | turn) << way.round_bits) | page",
        PRIMITIVES,
    ),
    Mutation(
        "Numba: a tail shorter than the seam",
        "fastdrop/backends/numba/mask.py",
        "begin = min(n, piece * way.cells + way.seam)",
        "begin = piece * way.cells + way.seam",
        PRIMITIVES,
    ),
    # ---- CUDA ----
    Mutation(
        "CUDA: the tail of a mask is not cleared",
        "fastdrop/backends/cuda/mask.py",
        "store_word(words + ((tile << WORD_SHIFT) + lane) * WORD_BYTES, word & ((ONE << bits) - ONE))",
        "store_word(words + ((tile << WORD_SHIFT) + lane) * WORD_BYTES, word)",
        CUDA,
    ),
    Mutation(
        "CUDA: bits of shared axes from the wrong word",
        "fastdrop/backends/cuda/mask.py",
        "bits = (low | (high << HALF)) >> (cell & LOW_5)",
        "bits = low >> (cell & LOW_5)",
        CUDA,
    ),
    Mutation(
        "CUDA: noise of a neighbouring cell",
        "fastdrop/backends/cuda/mask.py",
        "element = (counter << U(2)) - three * (counter & (NOISE_COUNTERS - ONE)) - first",
        "element = (counter << U(2)) - three * (counter & (NOISE_COUNTERS - ONE)) - first + ONE",
        CUDA,
    ),
    Mutation(
        "CUDA: blocks one cell too short",
        "fastdrop/backends/cuda/mask.py",
        "while back <= row - length:",
        "while back < row - length:",
        CUDA,
    ),
    Mutation(
        "CUDA: the factor's gradient is not masked",
        "fastdrop/backends/cuda/pointwise.py",
        "store_data(dmultiplier + cell * item, kept(bits, of_multiplier(g, h)))",
        "store_data(dmultiplier + cell * item, of_multiplier(g, h))",
        CUDA_ROWS,
    ),
    Mutation(
        "CUDA: a panel loses its last row",
        "fastdrop/backends/cuda/teams.py",
        "        if panel < longer:\n            end += ONE",
        "        if panel + ONE < longer:\n            end += ONE",
        CUDA_ROWS,
    ),
    # ---- torch ----
    Mutation(
        "mixed seeds ignore the call",
        "fastdrop/torch/runtime/seeds.py",
        "z = (seed + (offset * 0x9E3779B97F4A7C15 & LOW_64_BITS)) & LOW_64_BITS",
        "z = seed & LOW_64_BITS",
        "tests/torch/tools/test_monte_carlo.py",
    ),
    Mutation(
        "backward of a seed's mask with another scale",
        "fastdrop/torch/functional/routing.py",
        "dx, _ = mask_kernels.forward(dy, seed, threshold, (a, 0.0, 0.0), cells, False)",
        "dx, _ = mask_kernels.forward(dy, seed, threshold, (1.0, 0.0, 0.0), cells, False)",
        "tests/torch/functional/test_dropout.py",
    ),
    Mutation(
        "backward of bits adds alpha's shift",
        "fastdrop/torch/ops/mask.py",
        "    scaling = variants.slope(scaling)\n",
        "",
        "tests/torch/functional/test_gradients.py",
    ),
    Mutation(
        "a traced draw does not name the one before",
        "fastdrop/torch/runtime/tracing.py",
        "after = _last.get(mode.tracer)",
        "after = None",
        "tests/torch/runtime/test_tracing.py",
    ),
    Mutation(
        "a traced draw may be drawn again in backward",
        "fastdrop/torch/runtime/tracing.py",
        'meta["recompute"] = CheckpointPolicy.MUST_SAVE',
        "pass",
        "tests/torch/runtime/test_tracing.py",
    ),
    Mutation(
        "a budget of 0 is left",
        "fastdrop/torch/runtime/tracing.py",
        "if memory_budget() == 0:",
        "if memory_budget() < 0:",
        "tests/torch/runtime/test_tracing.py",
    ),
    Mutation(
        "a torch that lacks a private name is taken for one that has it",
        "fastdrop/torch/runtime/dispatch/tensors.py",
        "if not _KNOWS_EAGER:\n\n    def is_eager_dense",
        "if False:\n\n    def is_eager_dense",
        "tests/torch/runtime/test_dispatch.py",
    ),
    Mutation(
        "vmap gives all samples one seed",
        "fastdrop/torch/ops/mask.py",
        "return around.wrap(torch.ops.fastdrop.draw(like, [around.batch_size, *size], after), 0)",
        "return around.wrap(torch.ops.fastdrop.draw(like, size, after).expand(around.batch_size, *size), 0)",
        "tests/torch/ops/test_transforms.py",
    ),
    Mutation(
        "in place is not told to autograd",
        "fastdrop/torch/functional/routing.py",
        "    if inplace:\n        torch.autograd.graph.increment_version(x)\n    return mask_kernels.forward(",
        "    return mask_kernels.forward(",
        "tests/torch/functional/test_dropout.py",
    ),
    Mutation(
        "standard scaling scales in training",
        "fastdrop/core/variants.py",
        '    if scaling == "standard":\n        return Coefficients(1.0, 0.0, 0.0)\n',
        "",
        "tests/torch/functional/test_variants.py",
    ),
    Mutation(
        "shards are of one size, and the last takes the rest",
        "fastdrop/torch/runtime/layouts.py",
        "    size = -(-total // count)\n",
        "    size = total // count\n",
        SHARDS,
    ),
    Mutation(
        "a strided shard is one piece",
        "fastdrop/torch/runtime/layouts.py",
        "    earlier = [_chunk(own, i, before) for i in range(before)] if before > 1 else [own]\n",
        "    earlier = [own]\n",
        SHARDS,
    ),
    Mutation(
        "one axis of a mesh compares its generators",
        "fastdrop/torch/runtime/layouts.py",
        "    for axis in range(mesh.ndim):\n",
        "    for axis in range(1, mesh.ndim):\n",
        SHARDS,
    ),
    Mutation(
        "the gradient of a replicated operand is that of one shard",
        "fastdrop/torch/functional/sharded.py",
        "partial if own is None and axis is not None else placements[-1]",
        "placements[-1]",
        SHARDS,
    ),
    Mutation(
        "DropBlock counts what one process keeps",
        "fastdrop/torch/functional/blocks.py",
        "    if shard.source[2] is not None:\n        count",
        "    if False:\n        count",
        SHARDS,
    ),
    Mutation(
        "the gradient of a DTensor stays where it is",
        "fastdrop/torch/runtime/dispatch/dtensors.py",
        "if dy is not None and dy.placements != ctx.placements:",
        "if False:",
        SHARDS,
    ),
    Mutation(
        "the gradient of transposed DTensors has the data's strides",
        "fastdrop/torch/runtime/dispatch/dtensors.py",
        "tuple(strides)[::-1] if spec.shape else ()",
        "spec.stride",
        CURVES,
    ),
    Mutation(
        "a process without samples tells how large one is",
        "fastdrop/torch/tools/check_masks.py",
        "if cells.samples is not None and not len(cells.samples):",
        "if False:",
        CURVES,
    ),
    Mutation(
        "a process has the place of the first in compiled code",
        "fastdrop/torch/ops/layouts.py",
        "    index = ranks.index(torch.distributed.get_rank())\n",
        "    index = 0\n",
        SHARDS,
    ),
    Mutation(
        "LoRA's gradient of x is not dropped",
        "fastdrop/torch/ops/lora.py",
        "dx = _drop(_product(dh, lora_A), call, inplace=True)",
        "dx = _product(dh, lora_A)",
        "tests/torch/functional/test_lora.py",
    ),
    Mutation(
        "LoRA's gradient of lora_B is not scaled",
        "fastdrop/torch/ops/lora.py",
        "dlora_B = _product(dy.t(), h).mul_(scaling)",
        "dlora_B = _product(dy.t(), h)",
        "tests/torch/functional/test_lora.py",
    ),
    Mutation(
        "a norm's gradient forgets the second output",
        "fastdrop/torch/ops/norm.py",
        "        if dresidual_out is not None:\n            dresidual = dresidual + wide(dresidual_out)\n",
        "",
        "tests/torch/functional/test_fused.py",
    ),
    Mutation(
        "the mask's gradient is not summed over what it broadcasts to",
        "fastdrop/torch/ops/softmax.py",
        "slope, once = (g - (g * normal).sum(-1, keepdim=True)) * normal, 1.0",
        "slope, once = (g - g.sum(-1, keepdim=True)) * normal, 1.0",
        "tests/torch/functional/test_fused.py",
    ),
    Mutation(
        "attention scales by the width of its values",
        "fastdrop/torch/functional/attention.py",
        "scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale + 0.0",
        "scale = 1.0 / query.shape[-1] if scale is None else scale + 0.0",
        "tests/torch/functional/test_attention.py",
    ),
    Mutation(
        "a thread looks for its first kept row one too late",
        "csrc/cells.inc.h",
        "if ((uint64_t)rows[middle] < begin)",
        "if ((uint64_t)rows[middle] <= begin)",
        CELLS,
    ),
    Mutation(
        "an index past the last column is let through",
        "csrc/dispatch.c",
        "if (next <= last || (uint64_t)next >= extent) return 0;",
        "if (next <= last || (uint64_t)next > extent) return 0;",
        CELLS,
    ),
    Mutation(
        "Numba scatters from the first kept row in each range",
        "fastdrop/backends/numba/cells.py",
        "r = U(np.searchsorted(kept_rows, begin))",
        "r = U(0)",
        CELLS,
    ),
    Mutation(
        "units that fill a line are not dropped",
        "fastdrop/torch/functional/batchwise.py",
        "PackedMask.from_bool(np.isin(index, kept, assume_unique=True), p)",
        "PackedMask.from_bool(np.isin(index, index, assume_unique=True), p)",
        BATCHWISE,
    ),
    Mutation(
        "the next layer takes all columns",
        "fastdrop/torch/functional/batchwise.py",
        "before = kept.units",
        "before = None",
        BATCHWISE,
    ),
    Mutation(
        "batchwise dropout computes kept units however few rows there are",
        "fastdrop/torch/functional/batchwise.py",
        "return MIN_P + MIN_P_TIMES_ROWS / max(math.prod(x.shape[:-1]), 1)",
        "return MIN_P",
        BATCHWISE,
    ),
    Mutation(
        "the gradient of a weight has no gradient",
        "fastdrop/torch/functional/batchwise.py",
        "way: Any = _Scatter.apply if is_eager_dense(dy) else cell_kernels.scatter",
        "way: Any = cell_kernels.scatter",
        BATCHWISE,
    ),
    Mutation(
        "a kernel scatters by more indices than the gradient has",
        "fastdrop/torch/runtime/cell_kernels.py",
        "return x.shape == (height if rows is None else rows.shape[0], columns.shape[0])",
        "return True",
        BATCHWISE,
    ),
    Mutation(
        "a run of batchwise dropout takes a noise_shape of other units",
        "fastdrop/torch/models/fuse/batchwise_runs.py",
        "return len(shape) == axes and shape[-1] in (None, linear.out_features)",
        "return len(shape) == axes",
        "tests/torch/models/test_fuse_batchwise.py",
    ),
    Mutation(
        "a run of batchwise dropout drops in evaluation",
        "fastdrop/torch/models/fuse/batchwise_runs.py",
        "rates = [drop.rate if drop.training else 0.0 for drop in self.drops]",
        "rates = [drop.rate for drop in self.drops]",
        "tests/torch/models/test_fuse_batchwise.py",
    ),
    Mutation(
        "a run of batchwise dropout ignores what stands between",
        "fastdrop/torch/models/fuse/batchwise_runs.py",
        "if type(module) not in ELEMENTWISE and rules.activation_name(module) is None:",
        "if False:",
        "tests/torch/models/test_fuse_batchwise.py",
    ),
    Mutation(
        "the gradient of kept samples is not scaled",
        "fastdrop/torch/functional/residual.py",
        "return dy, _rows(dy, index) * ctx.scale, None, None",
        "return dy, _rows(dy, index), None, None",
        "tests/torch/functional/test_skip_residual.py",
    ),
    Mutation(
        "a fixed number of samples is always the same ones",
        "fastdrop/torch/functional/selection.py",
        "index: Tensor = keys.argsort(stable=True)[..., :kept].sort().values",
        "index: Tensor = keys.argsort(stable=True).sort().values[..., :kept]",
        "tests/torch/functional/test_skip_residual.py",
    ),
    Mutation(
        "a residual branch draws before its samples' seed",
        "fastdrop/torch/functional/residual.py",
        "source = source if way == ONNX else (None, Drawn(chosen) if isinstance(chosen, Tensor) else chosen, None)",
        "",
        "tests/torch/functional/test_skip_residual.py",
    ),
    Mutation(
        "LayerDrop runs the layers that it should skip",
        "fastdrop/torch/nn/residual.py",
        "if i in kept:",
        "if i not in kept:",
        "tests/torch/nn/test_residual.py",
    ),
    Mutation(
        "gradients pass the dropped hidden state",
        "fastdrop/torch/nn/recurrence.py",
        "dh.addmm_(dgates_step, w_hh, beta=0.0, alpha=steps.scale).masked_fill_(drop, 0.0)",
        "dh.addmm_(dgates_step, w_hh, beta=0.0, alpha=steps.scale)",
        "tests/torch/nn/test_recurrent.py",
    ),
    Mutation(
        "an input that was computed from another gets its gradient too",
        "fastdrop/torch/nn/recurrence.py",
        "None if given is None else given.view_as(given) if wants else given.detach()",
        "None if given is None else given if wants else given.detach()",
        "tests/torch/nn/test_recurrent.py",
    ),
    Mutation(
        "each call of a named module has one mask",
        "fastdrop/torch/runtime/names.py",
        "own = seeds.mix(seeds.mix(self.names.seed, self.hash), number)",
        "own = seeds.mix(seeds.mix(self.names.seed, self.hash), 0)",
        "tests/torch/tools/test_named_masks.py",
    ),
    Mutation(
        "samples that lie apart have neighbours' cells",
        "fastdrop/core/samples.py",
        "first * of_sample, apart * of_sample",
        "first * of_sample, of_sample",
        "tests/torch/tools/test_named_masks.py",
    ),
    Mutation(
        "a second backward goes on in what a checkpoint noted",
        "fastdrop/torch/runtime/names.py",
        "self.again, self.position = again, 0",
        "self.again = again",
        "tests/torch/tools/test_named_masks.py",
    ),
    Mutation(
        "named recurrent layers have samples on their first axis",
        "fastdrop/torch/tools/named_masks.py",
        "axes.update(dict.fromkeys(module.children(), 1))",
        "axes.update(dict.fromkeys(module.children(), 0))",
        "tests/torch/tools/test_named_masks.py",
    ),
    Mutation(
        "weights have samples",
        "fastdrop/torch/runtime/names.py",
        "part, axis = part.part, None",
        "part = part.part",
        "tests/torch/tools/test_named_masks.py",
    ),
    Mutation(
        "processes that have the same cells count each",
        "fastdrop/torch/tools/check_masks.py",
        "parts = {(one.cells, one.total) for one in seen if one.cells}",
        "parts = [(one.cells, one.total) for one in seen if one.cells]",
        "tests/torch/tools/test_named_masks.py",
    ),
    Mutation(
        "dropouts of a compiled module are counted from 2",
        "fastdrop/torch/runtime/traced_names.py",
        "orders[key, call] = order = orders.get((key, call), 0) + 1",
        "orders[key, call] = order = orders.get((key, call), 1)",
        "tests/torch/tools/test_named_masks_compiled.py",
    ),
    Mutation(
        "a compiled checkpoint draws names again",
        "fastdrop/torch/runtime/tracing.py",
        'if key != "recompute":',
        "if key:",
        "tests/torch/tools/test_named_masks_compiled.py",
    ),
    Mutation(
        "a module's own seed gives one mask for ever",
        "fastdrop/torch/nn/base.py",
        "self.calls += 1",
        "self.calls = 1",
        "tests/torch/nn/test_own_source.py",
    ),
    Mutation(
        "each rate of a recurrent layer has the seed's stream for itself",
        "fastdrop/torch/nn/recurrent.py",
        "self.dropout_recurrent.own_source = self.dropout_output.own_source = self.dropout_input.own_source",
        "self.dropout_recurrent.draw_from(**source), self.dropout_output.draw_from(**source)",
        "tests/torch/nn/test_own_source.py",
    ),
    Mutation(
        "a trace makes a constant of a module's own seed",
        "fastdrop/torch/nn/base.py",
        "if tracing.is_recorded():",
        "if False:",
        "tests/torch/nn/test_own_source.py",
    ),
    Mutation(
        "a checkpoint may draw from a generator again",
        "fastdrop/torch/runtime/dispatch/compilers.py",
        'if code.co_name in ("unpack_hook", "backward")',
        'if code.co_name in ("backward",)',
        "tests/torch/nn/test_own_source.py",
    ),
    Mutation(
        "token_dropout takes tokens in the order of their keys",
        "fastdrop/torch/functional/selection.py",
        "[..., :kept].sort().values",
        "[..., :kept]",
        "tests/torch/functional/test_tokens.py",
    ),
    Mutation(
        "the outer of two blocks of same_masks counts",
        "fastdrop/torch/tools/same_masks.py",
        "prepend=True, always_call=True",
        "always_call=True",
        "tests/torch/tools/test_same_masks.py",
    ),
    Mutation(
        "the first of two trainings to end switches off both",
        "fastdrop/integrations/session.py",
        "if not self.users and not self.was_on:",
        "if not self.was_on:",
        "tests/integrations/test_session.py",
    ),
    Mutation(
        "the end of a training switches off what the user switched on",
        "fastdrop/integrations/session.py",
        "self.was_on = context.is_enabled_everywhere()",
        "self.was_on = False",
        "tests/integrations/test_session.py",
    ),
    Mutation(
        "the end of a training unfuses what the user fused",
        "fastdrop/integrations/session.py",
        "if type(module) is not its_class:",
        "if True:",
        "tests/integrations/test_session.py",
    ),
    Mutation(
        "a training that begins again never ends the first time",
        "fastdrop/integrations/session.py",
        "        self.end()\n        self.reports",
        "        self.reports",
        "tests/integrations/test_session.py",
    ),
    Mutation(
        "fuse leaves out hooks",
        "fastdrop/torch/models/fuse/rules.py",
        "if hooks := hook_obstacle(module):",
        "if False and (hooks := hook_obstacle(module)):",
        "tests/torch/models/test_fuse.py",
    ),
    Mutation(
        "a fused block gives attention the masks of all samples",
        "fastdrop/torch/models/fuse/residual_layers.py",
        "if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[0] != 1:",
        "if False:",
        "tests/torch/models/test_fuse_residual.py",
    ),
    Mutation(
        "a fused block scales what it should not",
        "fastdrop/torch/models/fuse/residual_layers.py",
        '"scale_by_keep": getattr(drop, "scale_by_keep", True)',
        '"scale_by_keep": True',
        "tests/torch/models/test_fuse_residual.py",
    ),
    Mutation(
        "skip_residual lets a branch write to its input",
        "fastdrop/torch/functional/residual.py",
        "if _version(x) != version and not may_write:",
        "if False:",
        "tests/torch/functional/test_skip_residual.py",
    ),
    Mutation(
        "explain_attention forgets noise_shape",
        "fastdrop/torch/models/enable.py",
        "composed = why_composed(arguments, options, noise_shape)",
        "composed = why_composed(arguments, options)",
        "tests/torch/models/test_enable.py",
    ),
    Mutation(
        "fuse takes a norm of several axes",
        "fastdrop/torch/models/fuse/rules.py",
        'return "" if len(norm.normalized_shape) == 1 else f"{name} is of more than one axis"',
        'return ""',
        "tests/torch/models/test_fuse.py",
    ),
    Mutation(
        "enable leaves alpha dropout's scaling",
        "fastdrop/torch/models/enable.py",
        '"alpha_dropout": (False, "alpha"),',
        '"alpha_dropout": (False, "inverted"),',
        "tests/torch/models/test_enable.py",
    ),
    Mutation(
        "enabled is for all threads",
        "fastdrop/torch/runtime/context.py",
        "return _everywhere or (bool(_enabled_somewhere) and bool(_value(_here)))",
        "return True",
        "tests/torch/runtime/test_threads.py",
    ),
    Mutation(
        "compiled code of one state runs in the other",
        "fastdrop/torch/runtime/dispatch/compilers.py",
        "builder.guard_manager.root.add_lambda_guard(holds, [reason], guard.user_stack)",
        "builder.guard_manager.root.add_lambda_guard(lambda _: True, [reason], guard.user_stack)",
        "tests/torch/runtime/test_threads.py tests/torch/models/test_enable.py",
    ),
    Mutation(
        "moments of samples that come in several passes",
        "fastdrop/torch/tools/monte_carlo.py",
        "self.mean = self.mean + delta * (count / total)",
        "self.mean = self.mean + delta * 0.5",
        "tests/torch/tools/test_monte_carlo.py",
    ),
    Mutation(
        "mutual information is the entropy of the samples",
        "fastdrop/torch/tools/monte_carlo.py",
        "information = (entropy - entropies.result()[0]).clamp_(min=0.0)",
        "information = entropies.result()[0]",
        "tests/torch/tools/test_monte_carlo.py",
    ),
    Mutation(
        "a rate as a tensor keeps its first value",
        "fastdrop/torch/nn/base.py",
        "            self.drive(value)",
        "            pass",
        "tests/torch/tools/test_scheduler.py",
    ),
    Mutation(
        "stochastic depth decides by batch",
        "fastdrop/core/variants.py",
        'return tuple(extent if axis == 0 and mode == "row" else 1 for axis, extent in enumerate(shape))',
        "return tuple(1 for axis, extent in enumerate(shape))",
        "tests/torch/functional/test_variants.py",
    ),
)


def plant(mutation: Mutation, root: Path) -> None:
    """Changes the line in a copy of the project."""
    path = root / mutation.file
    source = path.read_text()
    if source.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.name}: its line stands {source.count(mutation.old)} times in {mutation.file}")
    path.write_text(source.replace(mutation.old, mutation.new))


def copy_project(root: Path) -> None:
    """What git knows of the working tree, and the built extension."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "fastdrop").glob("_native*.so")]
    for name in [*names.stdout.splitlines(), *built]:
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)


def is_caught(mutation: Mutation, root: Path, tests: str) -> tuple[bool, str]:
    """Whether the tests fail with the fault in, and what pytest said last."""
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "NUMBA_CACHE_DIR": str(root / "numba"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "FASTDROP_CACHE_DIR": str(root / "cuda"),
    }
    run = {"cwd": root, "env": environment, "capture_output": True, "text": True}
    if mutation.file.startswith("csrc/"):
        built = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], **run)
        if built.returncode:
            raise SystemExit(f"{mutation.name}: doesn't compile\n{built.stderr}")
    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "--show-capture=no"]
    try:
        ended = subprocess.run([sys.executable, "-m", "pytest", *options, *tests.split()], **run, timeout=LIMIT)
    except subprocess.TimeoutExpired:  # a loop without end is seen in CI too
        return True, f"not over after {LIMIT} s"
    said = ended.stdout.strip().splitlines()
    if ended.returncode not in (0, 1):  # a crash catches the fault as well; that no test ran does not
        return ended.returncode < 0, f"exit status {ended.returncode}"
    failed = next((line for line in said if line.startswith("FAILED")), said[-1] if said else "")
    return ended.returncode == 1, failed.removeprefix("FAILED ").partition(" - ")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", metavar="WORD", help="faults whose name or file has this")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--all-tests", action="store_true")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if options.k.lower() in m.name.lower() or options.k in m.file]
    if options.list:
        for mutation in chosen:
            print(f"{mutation.file:40} {mutation.name}")
        return 0
    missed = 0
    for mutation in chosen:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            copy_project(root)
            plant(mutation, root)
            began = time.monotonic()
            caught, said = is_caught(mutation, root, "tests" if options.all_tests else mutation.tests)
        missed += not caught
        print(
            f"{'caught' if caught else 'MISSED'}  {time.monotonic() - began:5.0f} s  {mutation.name}: {said}",
            flush=True,
        )
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return missed


if __name__ == "__main__":
    sys.exit(main())

/* All kernels of one instruction set. Each isa_<name>.c includes this file once, after its simd_<name>.h and after it
 * has defined FD_TABLE, the name of the table that the last lines here fill.
 *
 * C has no generics, so the .inc.h files are templates: a body is written once and compiled for every instruction set,
 * and those that touch data once per number type too. Bodies use only the operations that every simd_<name>.h defines
 * under the same names; simd_scalar.h explains them.
 *
 *   order.inc.h        in which order a pass goes through memory, and what it prefetches
 *   draw.inc.h         random bits compared with the threshold: draw_bits
 *   rows.inc.h         the bits of rows that lie apart in the mask: draw_rows
 *   mask_bits.inc.h    mask bits beside data
 *   gaussian.inc.h     normal random numbers
 *   apply.inc.h        per dtype: dropout_forward, masked_affine, gaussian_multiply
 *   dilate.inc.h       masks of blocks: dilate_bits
 *   cells.inc.h        kept rows and columns of a matrix: gather_cells, scatter_cells
 *   vector_math.inc.h  exp, tanh and the normal distribution
 *   strips.inc.h       how fused kernels go through data
 *   fused.inc.h        per type that is computed in: storage, activations, drop, pointwise, norm, softmax, products,
 *                      attention
 *
 * Mask bits are in small local buffers that have slack behind them. User memory is never read or written past its end.
 * Large outputs are written around the cache (`stream`).
 */
#include "bits.h"
#include "kernels.h"
#include "philox.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
#define OUTLINE __attribute__((noinline))

enum {
    CHUNK_BLOCKS = 16,
    CHUNK_CELLS = CHUNK_BLOCKS * FD_BLOCK_CELLS,       /* bits are drawn and applied a chunk at a time */
    CHUNK_WORDS = (CHUNK_BLOCKS + 1) * FD_BLOCK_WORDS, /* a chunk may begin inside a block */
    SLACK_WORDS = 4,                                   /* behind local buffers: bits are read eight bytes at a time */
    SLACK_CELLS = 64,                                  /* the same for a mask in user memory */
    LINE_BYTES = 64,
    RUN = 32 /* cells per step of the loops that apply bits */
};

INLINE uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
INLINE uint64_t blocks_for(uint64_t cells) { return (cells + FD_BLOCK_CELLS - 1) / FD_BLOCK_CELLS; }

/* p may point past the data. Not by prefetchnta, which halves the speed of memory on some CPUs (docs/design.md). */
INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }

#include "order.inc.h"

#include "draw.inc.h"
#include "mask_bits.inc.h"
#include "rows.inc.h"

#include "gaussian.inc.h"

#define DTYPE f32
#include "apply.inc.h"
#define DTYPE f64
#include "apply.inc.h"
#define DTYPE f16
#include "apply.inc.h"
#define DTYPE bf16
#include "apply.inc.h"

/* dispatch.c has refused calls with any other dtype. */
#define DEFINE_BY_DTYPE(op)                                                                                            \
    static void op(const void *arguments, uint64_t begin, uint64_t end) {                                              \
        const op##_args *args = arguments;                                                                             \
        switch (args->dtype) {                                                                                         \
        case FD_FLOAT32: f32_##op(args, begin, end); break;                                                            \
        case FD_FLOAT64: f64_##op(args, begin, end); break;                                                            \
        case FD_FLOAT16: f16_##op(args, begin, end); break;                                                            \
        case FD_BFLOAT16: bf16_##op(args, begin, end); break;                                                          \
        }                                                                                                              \
    }
DEFINE_BY_DTYPE(dropout_forward)
DEFINE_BY_DTYPE(masked_affine)
DEFINE_BY_DTYPE(gaussian_multiply)

#include "cells.inc.h"
#include "dilate.inc.h"
#include "vector_math.inc.h"

#include "strips.inc.h"

#define CTYPE f32
#include "fused.inc.h"
#define CTYPE f64
#include "fused.inc.h"

/* float16 and bfloat16 are computed in float32. */
#define DEFINE_BY_WIDTH(op)                                                                                            \
    static void op(const void *arguments, uint64_t begin, uint64_t end) {                                              \
        const op##_args *args = arguments;                                                                             \
        if (args->dtype == FD_FLOAT64)                                                                                 \
            f64_##op(args, begin, end);                                                                                \
        else                                                                                                           \
            f32_##op(args, begin, end);                                                                                \
    }
DEFINE_BY_WIDTH(pointwise_forward)
DEFINE_BY_WIDTH(pointwise_backward)
DEFINE_BY_WIDTH(norm_forward)
DEFINE_BY_WIDTH(norm_backward)
DEFINE_BY_WIDTH(softmax_forward)
DEFINE_BY_WIDTH(softmax_backward)
DEFINE_BY_WIDTH(attention_forward)
DEFINE_BY_WIDTH(attention_backward)

/* Adds the panels' sums to those of the first panel, one panel after the other, so that the order of the additions
 * depends on the shape alone. */
static void add_panels(const void *arguments, uint64_t begin, uint64_t end) {
    const add_panels_args *args = arguments;
    for (uint64_t at = begin, n; at < end; at += n) {
        n = min_u64(end - at, STRIP_CELLS);
        for (uint64_t panel = 1; panel < args->panels; panel++) {
            if (args->wide) {
                double *total = (double *)args->sums + at;
                f64_add(total, total + panel * args->width, total, n);
            } else {
                float *total = (float *)args->sums + at;
                f32_add(total, total + panel * args->width, total, n);
            }
        }
    }
}

INLINE void scale_piece(const float *x, float *y, uint64_t n, f32_v a, uint64_t ahead, const int stream) {
    const f32_keep all = f32_mask(~0u, 0);
    uint64_t i = 0;
    for (; i + RUN <= n; i += RUN) {
        for (unsigned byte = 0; byte < RUN * sizeof *x; byte += LINE_BYTES)
            prefetch_from((const char *)(x + i) + byte, ahead);
#pragma GCC unroll 4
        for (unsigned k = 0; k < RUN; k += f32_lanes) {
            f32_v v = f32_scale(all, f32_load(x + i + k), a);
            if (stream)
                f32_stream(y + i + k, v);
            else
                f32_store(y + i + k, v);
        }
    }
    for (; i < n; i++) { /* through bytes: any alignment is legal */
        float one[f32_lanes] = {0};
        memcpy(one, x + i, sizeof *x);
        f32_store(one, f32_scale(all, f32_load(one), a));
        memcpy(y + i, one, sizeof *y);
    }
}

static void scale_float32(const void *arguments, uint64_t begin, uint64_t end) {
    const scale_args *args = arguments;
    const f32_v a = f32_set1(args->a);
    const int stream = args->how >= FD_STREAMING && (uintptr_t)args->y % LINE_BYTES == 0;
    order_t order = order_of(args->how == FD_INTERLEAVED, sizeof *args->x);
    if (args->how == FD_STREAMING) order.ahead = distance_ahead(1);
    if (args->how == FD_MEMCPY) {
        begin = min_u64(begin * args->part, args->n);
        end = min_u64(end * args->part, args->n);
        memcpy(args->y + begin, args->x + begin, (end - begin) * sizeof *args->x);
        return;
    }
    for (uint64_t at = begin, n; at < end; at += n) {
        n = min_u64(end - at, CHUNK_CELLS);
        const uint64_t pieces = (n + order.cells - 1) / order.cells;
        for (unsigned k = 0; k < pieces; k++) {
            const uint64_t from = order.cells * (n == CHUNK_CELLS ? piece_at(&order, k) : k);
            const float *x = args->x + at + from;
            float *y = args->y + at + from;
            if (stream)
                scale_piece(x, y, min_u64(n - from, order.cells), a, order.ahead, 1);
            else
                scale_piece(x, y, min_u64(n - from, order.cells), a, order.ahead, 0);
        }
    }
    if (stream) stream_fence();
}

const fd_table FD_TABLE = {
    .add_panels = add_panels,
    .scale_float32 = scale_float32,
#define FD_OP(name, PARAMETERS) .name = name,
#include "ops.def"
#undef FD_OP
};

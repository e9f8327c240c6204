/* For each lane, the bit of a run that decides it. Included by simd_avx2.h and simd_avx512.h, which test a run against
 * these. lane_bit + k is for the lanes of cells k and up. They are tables, because GCC would compute shifted constants
 * again in every step. */
#ifndef FASTDROP_SIMD_LANE_BITS_H
#define FASTDROP_SIMD_LANE_BITS_H

#include <stdalign.h>
#include <stdint.h>

#define FOUR(from, step) 1u << (from), 1u << (from + step), 1u << (from + 2 * step), 1u << (from + 3 * step)
#define SIXTEEN(from, step)                                                                                            \
    FOUR(from, step), FOUR(from + 4 * step, step), FOUR(from + 8 * step, step), FOUR(from + 12 * step, step)

static const alignas(64) uint32_t lane_bit[32] = {SIXTEEN(0, 1), SIXTEEN(16, 1)};
static const alignas(64) uint64_t lane_bit_64[32] = {SIXTEEN(0, 1), SIXTEEN(16, 1)};
/* Even cells of the run, then odd ones. */
static const alignas(64) uint32_t lane_bit_pairs[32] = {SIXTEEN(0, 2), SIXTEEN(1, 2)};

#undef FOUR
#undef SIXTEEN

#endif

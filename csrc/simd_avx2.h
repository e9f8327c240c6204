/* Lane operations of AVX2, FMA and F16C: 8 words, 8 floats. Included by isa_avx2.c; simd_scalar.h explains the names,
 * and simd_avx512.h the even and odd halves of wide_t. AVX2 has no lane masks: a compare turns a mask bit into a full
 * lane, and an AND with it selects, which gives the +0 that a dropped element must be, whatever the data. */
#ifndef FASTDROP_SIMD_AVX2_H
#define FASTDROP_SIMD_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "simd_lane_bits.h"

#define LANES 8
#define UNROLL_GROUPS 2 /* spills a little; one group leaves the multiplier idle half the time */

typedef __m256i words_t;
typedef struct {
    __m256i even, odd;
} wide_t;
typedef wide_t product_t;

enum { HIGH_HALVES = 0xF5, LOW_TO_HIGH = 0xA0, ODD_LANES = 0xAA, LOW_HALVES = 0x20, UPPER_HALVES = 0x31 };

static inline words_t words_set1(uint32_t v) { return _mm256_set1_epi32((int)v); }
static inline words_t words_count_from(uint32_t first) {
    return _mm256_add_epi32(words_set1(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline words_t words_load(const uint32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void words_store(uint32_t *p, words_t v) { _mm256_storeu_si256((__m256i *)p, v); }
static inline void words_stream(uint32_t *p, words_t v) { _mm256_stream_si256((__m256i *)p, v); }
static inline words_t words_add(words_t a, words_t b) { return _mm256_add_epi32(a, b); }
static inline words_t words_sub(words_t a, words_t b) { return _mm256_sub_epi32(a, b); }
static inline words_t words_left(words_t v, int n) { return _mm256_slli_epi32(v, n); }
static inline words_t words_right(words_t v, int n) { return _mm256_srli_epi32(v, n); }
static inline words_t words_right_signed(words_t v, int n) { return _mm256_srai_epi32(v, n); }
static inline words_t words_xor3(words_t a, words_t b, words_t c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
static inline words_t words_and(words_t a, words_t b) { return _mm256_and_si256(a, b); }
/* A branch, because the threshold is the same for all words of a call: it costs nothing, a select three instructions.
 */
static inline words_t words_keep(words_t keep, words_t r, uint32_t t) {
    return t ? _mm256_and_si256(keep, r) : _mm256_or_si256(keep, r);
}
static inline words_t words_equal(words_t equal, words_t r, uint32_t t) {
    return t ? _mm256_and_si256(r, equal) : _mm256_andnot_si256(r, equal);
}
static inline words_t words_unless(words_t keep, words_t equal, words_t later) {
    return _mm256_andnot_si256(_mm256_andnot_si256(later, equal), keep);
}
/* Row m holds the positions of the 1 bits of m, a byte each, lowest first. */
#define COMPACT_STEP(m, lane, later) ((uint64_t)(later) << 8 * ((m) >> (lane) & 1) | ((m) >> (lane) & 1) * (lane))
#define COMPACT_LOW(m, later) COMPACT_STEP(m, 0, COMPACT_STEP(m, 1, COMPACT_STEP(m, 2, COMPACT_STEP(m, 3, later))))
#define COMPACT_ROW(m) COMPACT_LOW(m, COMPACT_STEP(m, 4, COMPACT_STEP(m, 5, COMPACT_STEP(m, 6, COMPACT_STEP(m, 7, 0)))))
#define COMPACT_4(m) COMPACT_ROW(m), COMPACT_ROW(m + 1), COMPACT_ROW(m + 2), COMPACT_ROW(m + 3)
#define COMPACT_16(m) COMPACT_4(m), COMPACT_4(m + 4), COMPACT_4(m + 8), COMPACT_4(m + 12)
#define COMPACT_64(m) COMPACT_16(m), COMPACT_16(m + 16), COMPACT_16(m + 32), COMPACT_16(m + 48)
static const uint64_t compact_rows[256] = {COMPACT_64(0), COMPACT_64(64), COMPACT_64(128), COMPACT_64(192)};

/* By a table and not by a loop over lanes: the lanes that count are as random as the mask, so branches would be
 * mispredicted, and the CPU could not work on the next data meanwhile. */
static inline unsigned words_compact(words_t index, words_t value, uint32_t *indices, uint32_t *values) {
    __m256i zero = _mm256_cmpeq_epi32(value, _mm256_setzero_si256());
    unsigned nonzero = ~(unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(zero)) & 0xFF;
    __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&compact_rows[nonzero]));
    words_store(indices, _mm256_permutevar8x32_epi32(index, lanes));
    words_store(values, _mm256_permutevar8x32_epi32(value, lanes));
    return (unsigned)__builtin_popcount(nonzero);
}

static inline __m256i high_halves(__m256i v) { return _mm256_shuffle_epi32(v, HIGH_HALVES); }
static inline wide_t wide_of(words_t v) { return (wide_t){v, high_halves(v)}; }
static inline wide_t wide_set1(uint32_t v) { return (wide_t){words_set1(v), words_set1(v)}; }
static inline wide_t wide_xor(wide_t a, wide_t b) {
    return (wide_t){_mm256_xor_si256(a.even, b.even), _mm256_xor_si256(a.odd, b.odd)};
}
static inline wide_t wide_xor3(wide_t a, wide_t b, wide_t c) { return wide_xor(wide_xor(a, b), c); }
static inline product_t wide_mul(wide_t a, uint32_t b) {
    return (product_t){_mm256_mul_epu32(a.even, words_set1(b)), _mm256_mul_epu32(a.odd, words_set1(b))};
}
static inline wide_t wide_low(product_t p) { return p; }
static inline wide_t wide_high(product_t p) { return (wide_t){high_halves(p.even), high_halves(p.odd)}; }
static inline words_t words_of(wide_t v) {
    return _mm256_blend_epi32(v.even, _mm256_shuffle_epi32(v.odd, LOW_TO_HIGH), ODD_LANES);
}
static inline words_t words_low(product_t p) { return words_of(p); }
static inline words_t words_high(product_t p) { return _mm256_blend_epi32(high_halves(p.even), p.odd, ODD_LANES); }

typedef float f32_t;
typedef __m256 f32_v;
typedef __m256 f32_keep;
enum { f32_lanes = 8 };
static inline f32_v f32_load(const f32_t *p) { return _mm256_loadu_ps(p); }
static inline void f32_store(f32_t *p, f32_v v) { _mm256_storeu_ps(p, v); }
static inline void f32_stream(f32_t *p, f32_v v) { _mm256_stream_ps(p, v); }
static inline f32_v f32_set1(double v) { return _mm256_set1_ps((float)v); }
static inline f32_v f32_from_floats(const float *p) { return f32_load(p); }
static inline f32_keep f32_mask(uint32_t run, int k) {
    __m256i lane = _mm256_load_si256((const __m256i *)(lane_bit + k));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(words_set1(run), lane), lane));
}
static inline f32_v f32_scale(f32_keep keep, f32_v x, f32_v a) { return _mm256_and_ps(keep, _mm256_mul_ps(x, a)); }
static inline f32_v f32_affine(f32_keep keep, f32_v x, f32_v a, f32_v b, f32_v c) {
    return _mm256_blendv_ps(c, _mm256_add_ps(_mm256_mul_ps(x, a), b), keep);
}
static inline f32_v f32_of_int(words_t v) { return _mm256_cvtepi32_ps(v); }
static inline f32_v f32_of_bits(words_t v) { return _mm256_castsi256_ps(v); }
static inline words_t bits_of_f32(f32_v v) { return _mm256_castps_si256(v); }
static inline f32_v f32_sqrt(f32_v v) { return _mm256_sqrt_ps(v); }
static inline f32_v f32_turn(words_t w, f32_v v) {
    return _mm256_xor_ps(v, f32_of_bits(words_and(w, words_set1(1u << 31))));
}
static inline f32_v f32_where(words_t w, f32_v yes, f32_v no) { return _mm256_blendv_ps(no, yes, f32_of_bits(w)); }

static inline f32_v f32_fma(f32_v a, f32_v b, f32_v c) { return _mm256_fmadd_ps(a, b, c); }
static inline f32_v f32_max(f32_v a, f32_v b) { return _mm256_max_ps(a, b); }
static inline f32_v f32_min(f32_v a, f32_v b) { return _mm256_min_ps(a, b); }
static inline f32_v f32_round(f32_v v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline f32_v f32_times_power(f32_v v, f32_v n) {
    const words_t bias = words_set1(127);
    words_t whole = _mm256_cvtps_epi32(n), half = words_right_signed(whole, 1), rest = words_sub(whole, half);
    return v * f32_of_bits(words_left(words_add(half, bias), 23)) * f32_of_bits(words_left(words_add(rest, bias), 23));
}
static inline f32_keep f32_less(f32_v a, f32_v b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline f32_keep f32_not_above(f32_v a, f32_v b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
static inline f32_keep f32_except(f32_keep keep, f32_keep drop) { return _mm256_andnot_ps(drop, keep); }
static inline f32_v f32_select(f32_keep keep, f32_v yes, f32_v no) { return _mm256_blendv_ps(no, yes, keep); }
static inline uint32_t f32_bits(f32_keep keep) { return (uint32_t)_mm256_movemask_ps(keep); }

typedef double f64_t;
typedef __m256d f64_v;
typedef __m256d f64_keep;
enum { f64_lanes = 4 };
static inline f64_v f64_load(const f64_t *p) { return _mm256_loadu_pd(p); }
static inline void f64_store(f64_t *p, f64_v v) { _mm256_storeu_pd(p, v); }
static inline void f64_stream(f64_t *p, f64_v v) { _mm256_stream_pd(p, v); }
static inline f64_v f64_set1(double v) { return _mm256_set1_pd(v); }
static inline f64_v f64_from_floats(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
static inline f64_keep f64_mask(uint32_t run, int k) {
    __m256i lane = _mm256_load_si256((const __m256i *)(lane_bit_64 + k));
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(words_set1(run), lane), lane));
}
static inline f64_v f64_scale(f64_keep keep, f64_v x, f64_v a) { return _mm256_and_pd(keep, _mm256_mul_pd(x, a)); }
static inline f64_v f64_affine(f64_keep keep, f64_v x, f64_v a, f64_v b, f64_v c) {
    return _mm256_blendv_pd(c, _mm256_add_pd(_mm256_mul_pd(x, a), b), keep);
}

static inline f64_v f64_fma(f64_v a, f64_v b, f64_v c) { return _mm256_fmadd_pd(a, b, c); }
static inline f64_v f64_max(f64_v a, f64_v b) { return _mm256_max_pd(a, b); }
static inline f64_keep f64_not_above(f64_v a, f64_v b) { return _mm256_cmp_pd(a, b, _CMP_LE_OQ); }
static inline f64_keep f64_except(f64_keep keep, f64_keep drop) { return _mm256_andnot_pd(drop, keep); }
static inline f64_v f64_select(f64_keep keep, f64_v yes, f64_v no) { return _mm256_blendv_pd(no, yes, keep); }
static inline uint32_t f64_bits(f64_keep keep) { return (uint32_t)_mm256_movemask_pd(keep); }

typedef uint16_t f16_t;
static inline f32_v f16_load(const f16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline __m128i f16_of_f32(f32_v v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline void f16_store(f16_t *p, f32_v v) { _mm_storeu_si128((__m128i *)p, f16_of_f32(v)); }
static inline void f16_stream(f16_t *p, f32_v v) { _mm_stream_si128((__m128i *)p, f16_of_f32(v)); }

/* Even and odd elements as two vectors of floats, as simd_avx512.h explains. */
#define BF16_PAIRS
#include "simd_16bit.h"

typedef uint16_t bf16_t;
static inline bf16_v bf16_load(const bf16_t *p) {
    __m256i pairs = _mm256_loadu_si256((const __m256i *)p);
    return (bf16_v){_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
                    _mm256_castsi256_ps(_mm256_and_si256(pairs, words_set1(0xFFFF0000u)))};
}
static inline bf16_v bf16_from_floats(const float *p) {
    __m256 low = f32_load(p), high = f32_load(p + f32_lanes);
    __m256 first = _mm256_permute2f128_ps(low, high, LOW_HALVES);
    __m256 last = _mm256_permute2f128_ps(low, high, UPPER_HALVES);
    return (bf16_v){_mm256_shuffle_ps(first, last, _MM_SHUFFLE(2, 0, 2, 0)),
                    _mm256_shuffle_ps(first, last, _MM_SHUFFLE(3, 1, 3, 1))};
}
static inline __m256 bf16_half_mask(uint32_t run, const uint32_t *bits) {
    __m256i lane = _mm256_load_si256((const __m256i *)bits);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(words_set1(run), lane), lane));
}
static inline bf16_keep bf16_mask(uint32_t run, int k) {
    return (bf16_keep){bf16_half_mask(run, lane_bit_pairs + k / 2), bf16_half_mask(run, lane_bit_pairs + 16 + k / 2)};
}
static inline __m256i bf16_rounded(__m256 v) {
    __m256i u = _mm256_castps_si256(v), lowest = _mm256_and_si256(_mm256_srli_epi32(u, 16), words_set1(1));
    return _mm256_add_epi32(u, _mm256_add_epi32(lowest, words_set1(0x7FFF)));
}
static inline __m256i bf16_quieted(__m256i rounded, __m256 v) {
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_or_si256(_mm256_castps_si256(v), words_set1(0x400000)), nan);
}
static inline __m256i bf16_of(bf16_v v) {
    __m256i even = bf16_rounded(v.even), odd = bf16_rounded(v.odd);
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(v.even, v.odd, _CMP_UNORD_Q)) != 0, 0)) {
        even = bf16_quieted(even, v.even);
        odd = bf16_quieted(odd, v.odd);
    }
    return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA);
}
static inline void bf16_store(bf16_t *p, bf16_v v) { _mm256_storeu_si256((__m256i *)p, bf16_of(v)); }
static inline void bf16_stream(bf16_t *p, bf16_v v) { _mm256_stream_si256((__m256i *)p, bf16_of(v)); }

/* As many numbers as one vector of floats holds, in the order of memory. */
static inline f32_v bf16_load_lanes(const bf16_t *p) {
    return f32_of_bits(words_left(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline __m128i bf16_of_floats(f32_v v) {
    __m256i halves = words_right(bf16_quieted(bf16_rounded(v), v), 16);
    return _mm256_castsi256_si128(
        _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), _MM_SHUFFLE(3, 1, 2, 0)));
}
static inline void bf16_store_lanes(bf16_t *p, f32_v v) { _mm_storeu_si128((__m128i *)p, bf16_of_floats(v)); }
static inline void bf16_stream_lanes(bf16_t *p, f32_v v) { _mm_stream_si128((__m128i *)p, bf16_of_floats(v)); }

static inline void stream_fence(void) { _mm_sfence(); }

#endif

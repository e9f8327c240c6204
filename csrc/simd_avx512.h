/* Lane operations of AVX-512 F, BW, DQ, VL: 16 words, 16 floats. Included by isa_avx512.c; simd_scalar.h explains the
 * names.
 *
 * vpmuludq multiplies the even 32-bit lanes only, so Philox keeps a vector of words as two (wide_t): the even words in
 * place, the odd ones shifted down. The high halves of 64-bit lanes hold values that the multiplier ignores, so nothing
 * has to be masked. A high half is fetched by vpshufd and not by vpsrlq, because vpshufd runs on four ports of Zen 4
 * and 5 (vpsrlq: two), and on Intel's port 5, while vpsrlq competes with the multiplier for port 0.
 */
#ifndef FASTDROP_SIMD_AVX512_H
#define FASTDROP_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#include "simd_lane_bits.h"

#define LANES 16
#define UNROLL_GROUPS 2 /* groups drawn side by side: four chains of multiplications in flight, no spills */

typedef __m512i words_t;
typedef struct {
    __m512i even, odd;
} wide_t;
typedef wide_t product_t;

/* Truth tables of vpternlogd: bit 4a + 2b + c of the immediate is f(a, b, c). */
enum { TERNARY_XOR3 = 0x96, TERNARY_XOR_AND = 0x78, TERNARY_KEEP = 0xD4, TERNARY_EQUAL = 0x90, TERNARY_UNLESS = 0xB0 };

static inline words_t words_set1(uint32_t v) { return _mm512_set1_epi32((int)v); }
static inline words_t words_count_from(uint32_t first) {
    return _mm512_add_epi32(_mm512_set1_epi32((int)first),
                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
static inline words_t words_load(const uint32_t *p) { return _mm512_loadu_si512(p); }
static inline void words_store(uint32_t *p, words_t v) { _mm512_storeu_si512(p, v); }
static inline void words_stream(uint32_t *p, words_t v) { _mm512_stream_si512((__m512i *)p, v); }
static inline words_t words_add(words_t a, words_t b) { return _mm512_add_epi32(a, b); }
static inline words_t words_sub(words_t a, words_t b) { return _mm512_sub_epi32(a, b); }
static inline words_t words_left(words_t v, int n) { return _mm512_slli_epi32(v, n); }
static inline words_t words_right(words_t v, int n) { return _mm512_srli_epi32(v, n); }
static inline words_t words_right_signed(words_t v, int n) { return _mm512_srai_epi32(v, n); }
static inline words_t words_xor3(words_t a, words_t b, words_t c) {
    return _mm512_ternarylogic_epi32(a, b, c, TERNARY_XOR3);
}
static inline words_t words_keep(words_t keep, words_t r, uint32_t t) {
    return _mm512_ternarylogic_epi32(keep, r, words_set1(t), TERNARY_KEEP);
}
static inline words_t words_equal(words_t equal, words_t r, uint32_t t) {
    return _mm512_ternarylogic_epi32(equal, r, words_set1(t), TERNARY_EQUAL);
}
static inline words_t words_unless(words_t keep, words_t equal, words_t later) {
    return _mm512_ternarylogic_epi32(keep, equal, later, TERNARY_UNLESS);
}
static inline words_t words_and(words_t a, words_t b) { return _mm512_and_si512(a, b); }
static inline unsigned words_compact(words_t index, words_t value, uint32_t *indices, uint32_t *values) {
    /* Compress in registers, then store whole: the compress-store form is microcoded on Zen 4. */
    __mmask16 nonzero = _mm512_test_epi32_mask(value, value);
    _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(nonzero, index));
    _mm512_storeu_si512(values, _mm512_maskz_compress_epi32(nonzero, value));
    return (unsigned)__builtin_popcount(nonzero);
}

static inline __m512i high_halves(__m512i v) { return _mm512_shuffle_epi32(v, _MM_PERM_DDBB); }
static inline wide_t wide_of(words_t v) { return (wide_t){v, high_halves(v)}; }
static inline wide_t wide_set1(uint32_t v) { return (wide_t){words_set1(v), words_set1(v)}; }
static inline wide_t wide_xor(wide_t a, wide_t b) {
    return (wide_t){_mm512_xor_si512(a.even, b.even), _mm512_xor_si512(a.odd, b.odd)};
}
static inline wide_t wide_xor3(wide_t a, wide_t b, wide_t c) {
    return (wide_t){words_xor3(a.even, b.even, c.even), words_xor3(a.odd, b.odd, c.odd)};
}
static inline product_t wide_mul(wide_t a, uint32_t b) {
    return (product_t){_mm512_mul_epu32(a.even, words_set1(b)), _mm512_mul_epu32(a.odd, words_set1(b))};
}
static inline wide_t wide_low(product_t p) { return p; }
static inline wide_t wide_high(product_t p) { return (wide_t){high_halves(p.even), high_halves(p.odd)}; }
static inline words_t words_of(wide_t v) { return _mm512_mask_shuffle_epi32(v.even, 0xAAAA, v.odd, _MM_PERM_CCAA); }
static inline words_t words_low(product_t p) { return words_of(p); }
static inline words_t words_high(product_t p) {
    return _mm512_mask_shuffle_epi32(p.odd, 0x5555, p.even, _MM_PERM_DDBB);
}

typedef float f32_t;
typedef __m512 f32_v;
typedef __mmask16 f32_keep;
enum { f32_lanes = 16 };
static inline f32_v f32_load(const f32_t *p) { return _mm512_loadu_ps(p); }
static inline void f32_store(f32_t *p, f32_v v) { _mm512_storeu_ps(p, v); }
static inline void f32_stream(f32_t *p, f32_v v) { _mm512_stream_ps(p, v); }
static inline f32_v f32_set1(double v) { return _mm512_set1_ps((float)v); }
static inline f32_v f32_from_floats(const float *p) { return f32_load(p); }
/* Bits k .. k+15 of a run as a lane mask: a test against one bit per lane costs one instruction, where moving the bits
 * to a mask register costs two and waits on a crossing between register files. */
static inline f32_keep f32_mask(uint32_t run, int k) {
    return _mm512_test_epi32_mask(words_set1(run), _mm512_load_si512(lane_bit + k));
}
static inline f32_v f32_scale(f32_keep keep, f32_v x, f32_v a) { return _mm512_maskz_mul_ps(keep, x, a); }
static inline f32_v f32_affine(f32_keep keep, f32_v x, f32_v a, f32_v b, f32_v c) {
    return _mm512_mask_add_ps(c, keep, _mm512_mul_ps(x, a), b);
}
static inline f32_v f32_of_int(words_t v) { return _mm512_cvtepi32_ps(v); }
static inline f32_v f32_of_bits(words_t v) { return _mm512_castsi512_ps(v); }
static inline words_t bits_of_f32(f32_v v) { return _mm512_castps_si512(v); }
static inline f32_v f32_sqrt(f32_v v) { return _mm512_sqrt_ps(v); }
static inline f32_v f32_turn(words_t w, f32_v v) {
    return f32_of_bits(_mm512_ternarylogic_epi32(bits_of_f32(v), w, words_set1(1u << 31), TERNARY_XOR_AND));
}
static inline f32_v f32_where(words_t w, f32_v yes, f32_v no) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(w), no, yes);
}

static inline f32_v f32_fma(f32_v a, f32_v b, f32_v c) { return _mm512_fmadd_ps(a, b, c); }
static inline f32_v f32_max(f32_v a, f32_v b) { return _mm512_max_ps(a, b); }
static inline f32_v f32_min(f32_v a, f32_v b) { return _mm512_min_ps(a, b); }
static inline f32_v f32_round(f32_v v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline f32_v f32_times_power(f32_v v, f32_v n) { return _mm512_scalef_ps(v, n); }
static inline f32_keep f32_less(f32_v a, f32_v b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline f32_keep f32_not_above(f32_v a, f32_v b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
static inline f32_keep f32_except(f32_keep keep, f32_keep drop) { return _kandn_mask16(drop, keep); }
static inline f32_v f32_select(f32_keep keep, f32_v yes, f32_v no) { return _mm512_mask_blend_ps(keep, no, yes); }
static inline uint32_t f32_bits(f32_keep keep) { return keep; }

typedef double f64_t;
typedef __m512d f64_v;
typedef __mmask8 f64_keep;
enum { f64_lanes = 8 };
static inline f64_v f64_load(const f64_t *p) { return _mm512_loadu_pd(p); }
static inline void f64_store(f64_t *p, f64_v v) { _mm512_storeu_pd(p, v); }
static inline void f64_stream(f64_t *p, f64_v v) { _mm512_stream_pd(p, v); }
static inline f64_v f64_set1(double v) { return _mm512_set1_pd(v); }
static inline f64_v f64_from_floats(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
static inline f64_keep f64_mask(uint32_t run, int k) {
    return _mm512_test_epi64_mask(words_set1(run), _mm512_load_si512(lane_bit_64 + k));
}
static inline f64_v f64_scale(f64_keep keep, f64_v x, f64_v a) { return _mm512_maskz_mul_pd(keep, x, a); }
static inline f64_v f64_affine(f64_keep keep, f64_v x, f64_v a, f64_v b, f64_v c) {
    return _mm512_mask_add_pd(c, keep, _mm512_mul_pd(x, a), b);
}

static inline f64_v f64_fma(f64_v a, f64_v b, f64_v c) { return _mm512_fmadd_pd(a, b, c); }
static inline f64_v f64_max(f64_v a, f64_v b) { return _mm512_max_pd(a, b); }
static inline f64_keep f64_not_above(f64_v a, f64_v b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
static inline f64_keep f64_except(f64_keep keep, f64_keep drop) { return _kandn_mask8(drop, keep); }
static inline f64_v f64_select(f64_keep keep, f64_v yes, f64_v no) { return _mm512_mask_blend_pd(keep, no, yes); }
static inline uint32_t f64_bits(f64_keep keep) { return keep; }

typedef uint16_t f16_t;
static inline f32_v f16_load(const f16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline __m256i f16_of_f32(f32_v v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline void f16_store(f16_t *p, f32_v v) { _mm256_storeu_si256((__m256i *)p, f16_of_f32(v)); }
static inline void f16_stream(f16_t *p, f32_v v) { _mm256_stream_si256((__m256i *)p, f16_of_f32(v)); }

/* A bfloat16 is the upper half of a float32, so a vector of 32 becomes two of floats, even and odd elements, by a shift
 * and a mask, and back by a shift and a blend: nothing crosses lanes. The hardware's own conversion flushes subnormals;
 * here numbers are rounded in integers, by adding 0x7FFF and the lowest bit kept. */
#define BF16_PAIRS
#include "simd_16bit.h"

typedef uint16_t bf16_t;
static inline bf16_v bf16_load(const bf16_t *p) {
    __m512i pairs = _mm512_loadu_si512(p);
    return (bf16_v){_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
                    _mm512_castsi512_ps(_mm512_and_si512(pairs, words_set1(0xFFFF0000u)))};
}
static inline bf16_v bf16_from_floats(const float *p) {
    const __m512i even = words_left(words_count_from(0), 1), odd = words_add(even, words_set1(1));
    __m512 low = f32_load(p), high = f32_load(p + f32_lanes);
    return (bf16_v){_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}
static inline bf16_keep bf16_mask(uint32_t run, int k) {
    (void)k; /* one vector takes the whole run */
    return (bf16_keep){_mm512_test_epi32_mask(words_set1(run), _mm512_load_si512(lane_bit_pairs)),
                       _mm512_test_epi32_mask(words_set1(run), _mm512_load_si512(lane_bit_pairs + 16))};
}
static inline __m512i bf16_rounded(__m512 v) {
    __m512i u = _mm512_castps_si512(v), up = _mm512_add_epi32(u, words_set1(0x7FFF));
    return _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(u, words_set1(0x10000)), up, words_set1(1));
}
static inline __m512i bf16_quieted(__m512i rounded, __m512 v) {
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, _mm512_castps_si512(v), words_set1(0x400000));
}
static inline __m512i bf16_of(bf16_v v) {
    __m512i even = bf16_rounded(v.even), odd = bf16_rounded(v.odd);
    if (__builtin_expect(_mm512_cmp_ps_mask(v.even, v.odd, _CMP_UNORD_Q) != 0, 0)) { /* a NaN on either side */
        even = bf16_quieted(even, v.even);
        odd = bf16_quieted(odd, v.odd);
    }
    return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(even, 16), odd);
}
static inline void bf16_store(bf16_t *p, bf16_v v) { _mm512_storeu_si512(p, bf16_of(v)); }
static inline void bf16_stream(bf16_t *p, bf16_v v) { _mm512_stream_si512((__m512i *)p, bf16_of(v)); }

/* As many numbers as one vector of floats holds, in the order of memory. */
static inline f32_v bf16_load_lanes(const bf16_t *p) {
    return f32_of_bits(words_left(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline __m256i bf16_of_floats(f32_v v) {
    return _mm512_cvtepi32_epi16(words_right(bf16_quieted(bf16_rounded(v), v), 16));
}
static inline void bf16_store_lanes(bf16_t *p, f32_v v) { _mm256_storeu_si256((__m256i *)p, bf16_of_floats(v)); }
static inline void bf16_stream_lanes(bf16_t *p, f32_v v) { _mm256_stream_si256((__m256i *)p, bf16_of_floats(v)); }

static inline void stream_fence(void) { _mm_sfence(); }

#endif

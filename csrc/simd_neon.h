/* Lane operations of Arm AdvSIMD: 4 words, 4 floats. Included by isa_neon.c; simd_scalar.h explains the names. The
 * widening multiply takes two lanes at a time and leaves the products in two registers. uzp1 and uzp2 fetch all low and
 * all high halves from these, so words need no even and odd halves. */
#ifndef FASTDROP_SIMD_NEON_H
#define FASTDROP_SIMD_NEON_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#define LANES 4
#define UNROLL_GROUPS 2

typedef uint32x4_t words_t;
typedef uint32x4_t wide_t;
typedef struct {
    uint32x4_t first, second; /* products of lanes 0, 1 and of lanes 2, 3 */
} product_t;

static inline words_t words_set1(uint32_t v) { return vdupq_n_u32(v); }
static inline words_t words_count_from(uint32_t first) {
    const uint32_t lane[LANES] = {0, 1, 2, 3};
    return vaddq_u32(vdupq_n_u32(first), vld1q_u32(lane));
}
static inline words_t words_load(const uint32_t *p) { return vld1q_u32(p); }
static inline void words_store(uint32_t *p, words_t v) { vst1q_u32(p, v); }
static inline void words_stream(uint32_t *p, words_t v) { words_store(p, v); }
static inline words_t words_add(words_t a, words_t b) { return vaddq_u32(a, b); }
static inline words_t words_sub(words_t a, words_t b) { return vsubq_u32(a, b); }
static inline words_t words_left(words_t v, int n) { return v << vdupq_n_u32((uint32_t)n); }
static inline words_t words_right(words_t v, int n) { return v >> vdupq_n_u32((uint32_t)n); }
static inline words_t words_right_signed(words_t v, int n) {
    return vreinterpretq_u32_s32(vreinterpretq_s32_u32(v) >> vdupq_n_s32(n));
}
static inline words_t words_xor3(words_t a, words_t b, words_t c) { return veorq_u32(veorq_u32(a, b), c); }
static inline words_t words_and(words_t a, words_t b) { return vandq_u32(a, b); }
static inline words_t words_keep(words_t keep, words_t r, uint32_t t) {
    return t ? vandq_u32(keep, r) : vorrq_u32(keep, r);
}
static inline words_t words_equal(words_t equal, words_t r, uint32_t t) {
    return t ? vandq_u32(equal, r) : vbicq_u32(equal, r);
}
static inline words_t words_unless(words_t keep, words_t equal, words_t later) {
    return vbicq_u32(keep, vbicq_u32(equal, later));
}
static inline unsigned words_compact(words_t index, words_t value, uint32_t *indices, uint32_t *values) {
    uint32_t i[LANES], v[LANES];
    unsigned n = 0;
    words_store(i, index);
    words_store(v, value);
    for (unsigned lane = 0; lane < LANES; lane++)
        if (v[lane]) {
            indices[n] = i[lane];
            values[n++] = v[lane];
        }
    return n;
}

static inline wide_t wide_of(words_t v) { return v; }
static inline wide_t wide_set1(uint32_t v) { return vdupq_n_u32(v); }
static inline wide_t wide_xor(wide_t a, wide_t b) { return veorq_u32(a, b); }
static inline wide_t wide_xor3(wide_t a, wide_t b, wide_t c) { return words_xor3(a, b, c); }
static inline product_t wide_mul(wide_t a, uint32_t b) {
    return (product_t){vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a), b)),
                       vreinterpretq_u32_u64(vmull_high_n_u32(a, b))};
}
static inline wide_t wide_low(product_t p) { return vuzp1q_u32(p.first, p.second); }
static inline wide_t wide_high(product_t p) { return vuzp2q_u32(p.first, p.second); }
static inline words_t words_of(wide_t v) { return v; }
static inline words_t words_low(product_t p) { return wide_low(p); }
static inline words_t words_high(product_t p) { return wide_high(p); }

typedef float f32_t;
typedef float32x4_t f32_v;
typedef uint32x4_t f32_keep;
enum { f32_lanes = 4 };
static inline f32_v f32_load(const f32_t *p) { return vld1q_f32(p); }
static inline void f32_store(f32_t *p, f32_v v) { vst1q_f32(p, v); }
static inline void f32_stream(f32_t *p, f32_v v) { f32_store(p, v); }
static inline f32_v f32_set1(double v) { return vdupq_n_f32((float)v); }
static inline f32_v f32_from_floats(const float *p) { return f32_load(p); }
static inline f32_keep f32_mask(uint32_t run, int k) {
    const uint32_t lane[LANES] = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(run), vshlq_u32(vld1q_u32(lane), vdupq_n_s32(k)));
}
static inline f32_v f32_scale(f32_keep keep, f32_v x, f32_v a) {
    return vreinterpretq_f32_u32(vandq_u32(keep, vreinterpretq_u32_f32(vmulq_f32(x, a))));
}
static inline f32_v f32_affine(f32_keep keep, f32_v x, f32_v a, f32_v b, f32_v c) {
    return vbslq_f32(keep, vaddq_f32(vmulq_f32(x, a), b), c);
}
static inline f32_v f32_of_int(words_t v) { return vcvtq_f32_s32(vreinterpretq_s32_u32(v)); }
static inline f32_v f32_of_bits(words_t v) { return vreinterpretq_f32_u32(v); }
static inline words_t bits_of_f32(f32_v v) { return vreinterpretq_u32_f32(v); }
static inline f32_v f32_sqrt(f32_v v) { return vsqrtq_f32(v); }
static inline f32_v f32_turn(words_t w, f32_v v) {
    return f32_of_bits(veorq_u32(bits_of_f32(v), vandq_u32(w, words_set1(1u << 31))));
}
static inline f32_v f32_where(words_t w, f32_v yes, f32_v no) { return vbslq_f32(words_right_signed(w, 31), yes, no); }

static inline f32_v f32_fma(f32_v a, f32_v b, f32_v c) { return vfmaq_f32(c, a, b); }
static inline f32_v f32_max(f32_v a, f32_v b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline f32_v f32_min(f32_v a, f32_v b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline f32_v f32_round(f32_v v) { return vrndnq_f32(v); }
static inline f32_v f32_times_power(f32_v v, f32_v n) {
    const int32x4_t bias = vdupq_n_s32(127);
    int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1), rest = vsubq_s32(whole, half);
    v = vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23)));
    return vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23)));
}
static inline f32_keep f32_less(f32_v a, f32_v b) { return vcltq_f32(a, b); }
static inline f32_keep f32_not_above(f32_v a, f32_v b) { return vcleq_f32(a, b); }
static inline f32_keep f32_except(f32_keep keep, f32_keep drop) { return vbicq_u32(keep, drop); }
static inline f32_v f32_select(f32_keep keep, f32_v yes, f32_v no) { return vbslq_f32(keep, yes, no); }
static inline uint32_t f32_bits(f32_keep keep) {
    const uint32_t lane[LANES] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(keep, vld1q_u32(lane)));
}

typedef double f64_t;
typedef float64x2_t f64_v;
typedef uint64x2_t f64_keep;
enum { f64_lanes = 2 };
static inline f64_v f64_load(const f64_t *p) { return vld1q_f64(p); }
static inline void f64_store(f64_t *p, f64_v v) { vst1q_f64(p, v); }
static inline void f64_stream(f64_t *p, f64_v v) { f64_store(p, v); }
static inline f64_v f64_set1(double v) { return vdupq_n_f64(v); }
static inline f64_v f64_from_floats(const float *p) { return vcvt_f64_f32(vld1_f32(p)); }
static inline f64_keep f64_mask(uint32_t run, int k) {
    const uint64_t lane[2] = {1, 2};
    return vtstq_u64(vdupq_n_u64(run), vshlq_u64(vld1q_u64(lane), vdupq_n_s64(k)));
}
static inline f64_v f64_scale(f64_keep keep, f64_v x, f64_v a) {
    return vreinterpretq_f64_u64(vandq_u64(keep, vreinterpretq_u64_f64(vmulq_f64(x, a))));
}
static inline f64_v f64_affine(f64_keep keep, f64_v x, f64_v a, f64_v b, f64_v c) {
    return vbslq_f64(keep, vaddq_f64(vmulq_f64(x, a), b), c);
}

static inline f64_v f64_fma(f64_v a, f64_v b, f64_v c) { return vfmaq_f64(c, a, b); }
static inline f64_v f64_max(f64_v a, f64_v b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
static inline f64_keep f64_not_above(f64_v a, f64_v b) { return vcleq_f64(a, b); }
static inline f64_keep f64_except(f64_keep keep, f64_keep drop) { return vbicq_u64(keep, drop); }
static inline f64_v f64_select(f64_keep keep, f64_v yes, f64_v no) { return vbslq_f64(keep, yes, no); }
static inline uint32_t f64_bits(f64_keep keep) {
    const uint64_t lane[2] = {1, 2};
    return (uint32_t)vaddvq_u64(vandq_u64(keep, vld1q_u64(lane)));
}

/* Conversions between half and single are in the base instruction set; half arithmetic is not, and is not needed. */
typedef uint16_t f16_t;
static inline f32_v f16_load(const f16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void f16_store(f16_t *p, f32_v v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
static inline void f16_stream(f16_t *p, f32_v v) { f16_store(p, v); }

typedef uint16_t bf16_t;
static inline f32_v bf16_load(const bf16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline void bf16_store(bf16_t *p, f32_v v) {
    uint32x4_t u = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    rounded = vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(u, vdupq_n_u32(0x400000)));
    vst1_u16(p, vshrn_n_u32(rounded, 16));
}
static inline void bf16_stream(bf16_t *p, f32_v v) { bf16_store(p, v); }

static inline void stream_fence(void) {}

#include "simd_16bit.h"

#endif

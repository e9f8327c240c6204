/* Lane operations in plain C11: one word, one number at a time. Included by isa_scalar.c. Every simd_<name>.h defines
 * the same names over the vectors of its instruction set, and kernels use nothing else. Read this one first: the
 * comments here explain the names for all of them.
 *
 *   words_t    LANES mask words, one 32-bit lane each
 *   wide_t     the same words in the form that multiplication needs; product_t: the 64-bit products
 *   f32_t ...  a number as it is stored; f32_v ...: f32_lanes of them to compute with; f32_keep: a lane mask
 *
 * An f32_v has as many lanes as a words_t. The operators + - * / work on f32_v and f64_v in every instruction set.
 */
#ifndef FASTDROP_SIMD_SCALAR_H
#define FASTDROP_SIMD_SCALAR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 1
#define UNROLL_GROUPS 1

typedef uint32_t words_t;
typedef uint32_t wide_t;
typedef uint64_t product_t;

static inline words_t words_set1(uint32_t v) { return v; }
static inline words_t words_count_from(uint32_t first) { return first; }
static inline words_t words_load(const uint32_t *p) { return *p; }
static inline void words_store(uint32_t *p, words_t v) { *p = v; }
static inline void words_stream(uint32_t *p, words_t v) { *p = v; }
static inline words_t words_add(words_t a, words_t b) { return a + b; }
static inline words_t words_sub(words_t a, words_t b) { return a - b; }
static inline words_t words_left(words_t v, int n) { return v << n; }
static inline words_t words_right(words_t v, int n) { return v >> n; }
static inline words_t words_right_signed(words_t v, int n) { return (uint32_t)((int32_t)v >> n); }
static inline words_t words_xor3(words_t a, words_t b, words_t c) { return a ^ b ^ c; }
static inline words_t words_and(words_t a, words_t b) { return a & b; }
/* The next three compare random numbers with the threshold, least significant plane first: r is a plane of the random
 * numbers, t (0 or ~0) the same plane of the threshold. keep: the number is not below the threshold so far. */
static inline words_t words_keep(words_t keep, words_t r, uint32_t t) { return t ? keep & r : keep | r; }
/* equal: all planes equal the threshold's so far. */
static inline words_t words_equal(words_t equal, words_t r, uint32_t t) { return equal & ~(r ^ t); }
/* Later planes decide cells that are equal. */
static inline words_t words_unless(words_t keep, words_t equal, words_t later) { return keep & (later | ~equal); }
/* Appends the (index, value) pairs of nonzero values; may write up to LANES pairs, returns how many count. */
static inline unsigned words_compact(words_t index, words_t value, uint32_t *indices, uint32_t *values) {
    *indices = index;
    *values = value;
    return value != 0;
}

static inline wide_t wide_of(words_t v) { return v; }
static inline wide_t wide_set1(uint32_t v) { return v; }
static inline wide_t wide_xor(wide_t a, wide_t b) { return a ^ b; }
static inline wide_t wide_xor3(wide_t a, wide_t b, wide_t c) { return a ^ b ^ c; }
static inline product_t wide_mul(wide_t a, uint32_t b) { return (uint64_t)a * b; }
static inline wide_t wide_low(product_t p) { return (uint32_t)p; }
static inline wide_t wide_high(product_t p) { return (uint32_t)(p >> 32); }
static inline words_t words_of(wide_t v) { return v; }
static inline words_t words_low(product_t p) { return (uint32_t)p; }
static inline words_t words_high(product_t p) { return (uint32_t)(p >> 32); }

static inline uint32_t bits_of_f32(float v) {
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}
static inline float f32_of_bits(uint32_t u) {
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}
static inline uint64_t bits_of_f64(double v) {
    uint64_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}
static inline double f64_of_bits(uint64_t u) {
    double v;
    memcpy(&v, &u, sizeof v);
    return v;
}

typedef float f32_t;
typedef float f32_v;
typedef int f32_keep;
enum { f32_lanes = 1 };
static inline f32_v f32_load(const f32_t *p) {
    float v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void f32_store(f32_t *p, f32_v v) { memcpy(p, &v, sizeof v); }
static inline void f32_stream(f32_t *p, f32_v v) { f32_store(p, v); }
static inline f32_v f32_set1(double v) { return (float)v; }
static inline f32_v f32_from_floats(const float *p) { return f32_load(p); }
static inline f32_keep f32_mask(uint32_t run, int k) { return (int)(run >> k & 1); }
static inline f32_v f32_scale(f32_keep keep, f32_v x, f32_v a) {
    return f32_of_bits(bits_of_f32(x * a) & (0u - (uint32_t)keep)); /* no branch: it would be mispredicted at random */
}
static inline f32_v f32_affine(f32_keep keep, f32_v x, f32_v a, f32_v b, f32_v c) { return keep ? x * a + b : c; }

static inline f32_v f32_of_int(words_t v) { return (float)(int32_t)v; }
static inline f32_v f32_sqrt(f32_v v) { return sqrtf(v); }
/* f32_turn changes the sign and f32_where selects, both by the top bit of each word. */
static inline f32_v f32_turn(words_t w, f32_v v) { return f32_of_bits(bits_of_f32(v) ^ (w & 1u << 31)); }
static inline f32_v f32_where(words_t w, f32_v yes, f32_v no) {
    uint32_t all = 0u - (w >> 31);
    return f32_of_bits((bits_of_f32(yes) & all) | (bits_of_f32(no) & ~all));
}

/* a b + c, rounded once where the hardware does that. */
static inline f32_v f32_fma(f32_v a, f32_v b, f32_v c) { return a * b + c; }
/* Where either is NaN, the second. */
static inline f32_v f32_max(f32_v a, f32_v b) { return a > b ? a : b; }
static inline f32_v f32_min(f32_v a, f32_v b) { return a < b ? a : b; }
/* To the nearest whole number; |v| is below 2^22. NaN may become any such number. */
static inline f32_v f32_round(f32_v v) { return v + 0x1.8p23f - 0x1.8p23f; }
/* v 2^n for whole n from -150 to 128, rounded once at most: in two steps, as 2^n may be out of range. */
static inline f32_v f32_times_power(f32_v v, f32_v n) {
    int whole = n == n ? (int)n : 0, half = whole >> 1;
    return v * f32_of_bits((uint32_t)(half + 127) << 23) * f32_of_bits((uint32_t)(whole - half + 127) << 23);
}
static inline f32_keep f32_less(f32_v a, f32_v b) { return a < b; }
static inline f32_keep f32_not_above(f32_v a, f32_v b) { return a <= b; }
static inline f32_keep f32_except(f32_keep keep, f32_keep drop) { return keep && !drop; }
static inline f32_v f32_select(f32_keep keep, f32_v yes, f32_v no) { return keep ? yes : no; }
static inline uint32_t f32_bits(f32_keep keep) { return (uint32_t)keep; }

typedef double f64_t;
typedef double f64_v;
typedef int f64_keep;
enum { f64_lanes = 1 };
static inline f64_v f64_load(const f64_t *p) {
    double v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void f64_store(f64_t *p, f64_v v) { memcpy(p, &v, sizeof v); }
static inline void f64_stream(f64_t *p, f64_v v) { f64_store(p, v); }
static inline f64_v f64_set1(double v) { return v; }
static inline f64_v f64_from_floats(const float *p) { return f32_load(p); }
static inline f64_keep f64_mask(uint32_t run, int k) { return (int)(run >> k & 1); }
static inline f64_v f64_scale(f64_keep keep, f64_v x, f64_v a) {
    return f64_of_bits(bits_of_f64(x * a) & (0u - (uint64_t)keep));
}
static inline f64_v f64_affine(f64_keep keep, f64_v x, f64_v a, f64_v b, f64_v c) { return keep ? x * a + b : c; }

static inline f64_v f64_fma(f64_v a, f64_v b, f64_v c) { return a * b + c; }
static inline f64_v f64_max(f64_v a, f64_v b) { return a > b ? a : b; }
static inline f64_keep f64_not_above(f64_v a, f64_v b) { return a <= b; }
static inline f64_keep f64_except(f64_keep keep, f64_keep drop) { return keep && !drop; }
static inline f64_v f64_select(f64_keep keep, f64_v yes, f64_v no) { return keep ? yes : no; }
static inline uint32_t f64_bits(f64_keep keep) { return (uint32_t)keep; }

/* 16-bit types are computed in float32 and rounded once, to nearest even. NaNs stay NaNs: the quiet bit is set and the
 * payload's top bits are kept, as the conversion instructions of x86 and Arm do. */
static inline float f32_of_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u)
        return f32_of_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13 | (magnitude > 0x7C00u ? 0x400000u : 0u));
    /* No float here is subnormal, because flush-to-zero would make it 0, and the instructions don't. */
    if (magnitude < 0x400u) return f32_of_bits(sign | bits_of_f32((float)(int32_t)magnitude * 0x1p-24f));
    return f32_of_bits(sign | ((magnitude << 13) + 0x38000000u));
}
static inline uint16_t f16_of_f32(float v) {
    uint32_t u = bits_of_f32(v), sign = u >> 16 & 0x8000u, magnitude = u & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00u | (magnitude >> 13 & 0x3FFu));
    if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u); /* rounds to 2^16 or beyond */
    if (magnitude < 0x38800000u) {                                   /* subnormal: let the adder round at 2^-24 */
        uint32_t rounded = bits_of_f32(f32_of_bits(magnitude) + 0.5f) - 0x3F000000u;
        return (uint16_t)(sign | rounded);
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13));
}
static inline float f32_of_bf16(uint16_t h) { return f32_of_bits((uint32_t)h << 16); }
static inline uint16_t bf16_of_f32(float v) {
    uint32_t u = bits_of_f32(v);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
}

typedef uint16_t f16_t;
typedef uint16_t bf16_t;
static inline f32_v f16_load(const f16_t *p) {
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return f32_of_f16(h);
}
static inline void f16_store(f16_t *p, f32_v v) {
    uint16_t h = f16_of_f32(v);
    memcpy(p, &h, sizeof h);
}
static inline void f16_stream(f16_t *p, f32_v v) { f16_store(p, v); }
static inline f32_v bf16_load(const bf16_t *p) {
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return f32_of_bf16(h);
}
static inline void bf16_store(bf16_t *p, f32_v v) {
    uint16_t h = bf16_of_f32(v);
    memcpy(p, &h, sizeof h);
}
static inline void bf16_stream(bf16_t *p, f32_v v) { bf16_store(p, v); }

static inline void stream_fence(void) {}

#include "simd_16bit.h"

#endif

/* float16 and bfloat16 are computed in float32, so all of their operations but loads and stores are those of f32.
 * Included by each simd_<name>.h. One that keeps bfloat16 as pairs of even and odd elements defines BF16_PAIRS first.
 */
#ifndef FASTDROP_SIMD_16BIT_H
#define FASTDROP_SIMD_16BIT_H

#define f16_v f32_v
#define f16_keep f32_keep
#define f16_lanes f32_lanes
#define f16_set1 f32_set1
#define f16_from_floats f32_from_floats
#define f16_mask f32_mask
#define f16_scale f32_scale
#define f16_affine f32_affine

#ifdef BF16_PAIRS
typedef struct {
    f32_v even, odd;
} bf16_v;
typedef struct {
    f32_keep even, odd;
} bf16_keep;
enum { bf16_lanes = 2 * f32_lanes };
static inline bf16_v bf16_set1(double v) { return (bf16_v){f32_set1(v), f32_set1(v)}; }
static inline bf16_v bf16_scale(bf16_keep keep, bf16_v x, bf16_v a) {
    return (bf16_v){f32_scale(keep.even, x.even, a.even), f32_scale(keep.odd, x.odd, a.odd)};
}
static inline bf16_v bf16_affine(bf16_keep keep, bf16_v x, bf16_v a, bf16_v b, bf16_v c) {
    return (bf16_v){f32_affine(keep.even, x.even, a.even, b.even, c.even),
                    f32_affine(keep.odd, x.odd, a.odd, b.odd, c.odd)};
}
#else
#define bf16_load_lanes bf16_load
#define bf16_store_lanes bf16_store
#define bf16_stream_lanes bf16_stream
#define bf16_v f32_v
#define bf16_keep f32_keep
#define bf16_lanes f32_lanes
#define bf16_set1 f32_set1
#define bf16_from_floats f32_from_floats
#define bf16_mask f32_mask
#define bf16_scale f32_scale
#define bf16_affine f32_affine
#endif

#endif

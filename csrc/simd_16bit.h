/* float16 and bfloat16 compute in float32: all but their loads and stores is f32's. Included by each vocabulary; one
 * that computes bfloat16 in a form of its own defines BF16_PAIRS. */
#ifndef FASTDROP_SIMD_16BIT_H
#define FASTDROP_SIMD_16BIT_H

#define f16_v f32_v
#define f16_keep f32_keep
#define f16_lanes f32_lanes
#define f16_set1 f32_set1
#define f16_mask f32_mask
#define f16_scale f32_scale
#define f16_affine f32_affine

#ifndef BF16_PAIRS
#define bf16_v f32_v
#define bf16_keep f32_keep
#define bf16_lanes f32_lanes
#define bf16_set1 f32_set1
#define bf16_mask f32_mask
#define bf16_scale f32_scale
#define bf16_affine f32_affine
#endif

#endif

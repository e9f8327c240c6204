/* The kernels for AVX2 with FMA, F16C, BMI2 (Haswell, Zen and later). The target is set by a pragma,
 * so that no other file is compiled for it. */
#if defined(__x86_64__) && !defined(FASTDROP_PORTABLE)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2")
#endif
#include "simd_avx2.h"
#define FD_TABLE fd_table_avx2
#include "kernels.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

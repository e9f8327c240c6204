/* The kernels for AVX-512 F, BW, DQ, VL (Skylake-X, Zen 4 and later). The target is set by a pragma,
 * so that no other file is compiled for it. */
#if defined(__x86_64__) && !defined(FASTDROP_PORTABLE)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi2"))),  \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi2")
#endif
#include "simd_avx512.h"
#define FD_TABLE fd_table_avx512
#include "kernels.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

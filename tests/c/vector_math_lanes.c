/* The kernels of the instruction set -DISA=<name>, unchanged, and functions by which vector_math_test.c calls the
 * vector math, which is static there. */
#define STRING_(text) #text
#define STRING(text) STRING_(text)
#define SOURCE_(isa) STRING(isa_##isa.c)
#define SOURCE(isa) SOURCE_(isa)
#include SOURCE(ISA)

#if defined(FD_TABLE) /* else not of this architecture */

#if defined(FASTDROP_SIMD_AVX512_H)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi2")))
#elif defined(FASTDROP_SIMD_AVX2_H)
#define TARGET __attribute__((target("avx2,fma,f16c,popcnt,bmi2")))
#else
#define TARGET
#endif

#define DEFINE_(isa, function)                                                                                         \
    TARGET void test_##function##_##isa(const float *x, float *y, unsigned n) {                                        \
        for (unsigned i = 0; i < n; i += f32_unrolled)                                                                 \
            f32_store_unrolled(y + i, f32_##function(f32_load_unrolled(x + i)));                                       \
    }
#define DEFINE(isa, function) DEFINE_(isa, function)
DEFINE(ISA, exp)
DEFINE(ISA, tanh)
DEFINE(ISA, normal_cdf)

#endif

/* The float32 vector math beside the C library's double precision: exp and tanh in units of the spacing of float32 at
 * the true value, the normal distribution in units of what vector_math.inc.h allows. */
#include "testing.h"

#include <math.h>

typedef void lanes_function(const float *x, float *y, unsigned n);
typedef struct {
    lanes_function *lanes;
    double (*exact)(double);
    double (*error)(float got, double exact);
    double most;
    const char *name;
    double worst; /* error, and where */
    float where;
} function_t;

enum { BATCH = 1024, DENSER = 32, NEAR = 500 };
static const uint32_t SIGN = 1u << 31;
/* Magnitudes between which the functions are curved: 2^-12 and 2^7. Elsewhere they are x, 1 or a limit. */
static const uint32_t CURVED_FROM = 0x39800000, CURVED_TO = 0x43000000;
/* Subnormals and NaN begin, the functions' formulas change, exp(x) overflows, is subnormal, is 0. */
static const uint32_t EDGES[] = {0,          0x00800000, 0x7F800000, 0x3F19999A, 0x3F4CCCCD,
                                 0x40800000, 0x41200000, 0x42B17218, 0x42AEAC50, 0x42CFF1B5};

/* Infinity counts as 2^128, where the next number would be. */
static double ulps(float got, double exact) {
    const double beyond = 0x1p128;
    double value = isinf(got) ? copysign(beyond, got) : got, magnitude = fabs(exact);
    if (magnitude > beyond) exact = copysign(beyond, exact);
    int exponent = magnitude < 0x1p-126 ? -126 : magnitude >= 0x1p127 ? 127 : ilogb(magnitude);
    return fabs(value - exact) * ldexp(1, 23 - exponent);
}

static double normal_cdf(double h) { return 0.5 * erfc(-0.70710678118654752 * h); }

/* 2^-23 and, from h = -6 on, also a thousandth of the value. */
static double normal_units(float got, double exact) {
    const double relative = exact < normal_cdf(-6) ? INFINITY : exact / 1000;
    return fabs(got - exact) / fmin(0x1p-23, relative);
}

static void check_batch(function_t *f, int isa, const float *x, unsigned n) {
    float y[BATCH];
    f->lanes(x, y, BATCH);
    for (unsigned i = 0; i < n; i++) {
        const double exact = f->exact(x[i]);
        if (isnan(x[i]) || isnan(y[i])) {
            expect(isnan(x[i]) && isnan(y[i]), "NaN in vector math", isa, i, 0);
            continue;
        }
        const double error = f->error(y[i], exact);
        if (!signbit(y[i]) != !signbit(exact)) f->worst = INFINITY, f->where = x[i];
        if (error > f->worst) f->worst = error, f->where = x[i];
    }
}

/* Bit patterns from, from + step .. below `to`. */
static void check_range(function_t *f, int isa, uint64_t from, uint64_t to, uint32_t step) {
    static float x[BATCH];
    unsigned n = 0;
    for (uint64_t at = from; at < to; at += step) {
        uint32_t bits = (uint32_t)at;
        memcpy(&x[n++], &bits, sizeof bits);
        if (n == BATCH || at + step >= to) check_batch(f, isa, x, n), n = 0;
    }
}

static void check_functions(int isa, uint32_t stride, lanes_function *e, lanes_function *t, lanes_function *n) {
    function_t functions[] = {{e, exp, ulps, 2, "exp", 0, 0},
                              {t, tanh, ulps, 2, "tanh", 0, 0},
                              {n, normal_cdf, normal_units, 1, "normal_cdf", 0, 0}};
    for (size_t i = 0; i < COUNT(functions); i++) {
        function_t *f = &functions[i];
        check_range(f, isa, 0, 1ull << 32, stride);
        for (uint32_t sign = 0;; sign = SIGN) {
            check_range(f, isa, sign + CURVED_FROM, sign + CURVED_TO, stride / DENSER | 1);
            for (size_t k = 0; k < COUNT(EDGES); k++) {
                uint32_t edge = sign + EDGES[k];
                check_range(f, isa, EDGES[k] ? edge - NEAR : edge, edge + NEAR, 1);
            }
            if (sign) break;
        }
        expect(f->worst <= f->most, f->name, isa, (uint64_t)fmin(f->worst, 1e9), 0);
        printf("%s: %s within %.3f units, at %a\n", fd_isa_name(isa), f->name, f->worst, (double)f->where);
    }
}

#define CHECK(set)                                                                                                     \
    if (!strcmp(fd_isa_name(isa), #set)) {                                                                             \
        lanes_function test_exp_##set, test_tanh_##set, test_normal_cdf_##set;                                         \
        check_functions(isa, stride, test_exp_##set, test_tanh_##set, test_normal_cdf_##set);                          \
        checked++;                                                                                                     \
    }

void check_vector_math(int isa, uint32_t stride) {
    int checked = 0;
    CHECK(scalar)
#if defined(__x86_64__) && !defined(FASTDROP_PORTABLE)
    CHECK(avx2)
    CHECK(avx512)
#elif defined(__aarch64__)
    CHECK(neon)
#endif
    expect(checked == 1, "vector math without a test", isa, 0, 0);
}

/* exp, tanh and the normal distribution for the activations and softmax. Included once by kernels.inc.h.
 *
 * float32 uses polynomials that were fitted for the purpose. exp and tanh are at most 2 ulp from the true value over
 * the whole range, subnormal results included; NaN stays NaN. The coefficients are those of
 * fastdrop/core/activations.py, highest power first, and a test compares them. float64 calls the C library a lane at a
 * time: it has to be right, not fast.
 */
static const float EXP[] = {1.38358019285e-3f,
                            8.37564503033e-3f,
                            4.16682887279e-2f,
                            1.66664102439e-1f,
                            4.99999915941e-1f,
                            1.00000003853f,
                            1.0f};
static const float EXP2[] = {1.53457891094e-4f,
                             1.3399957587e-3f,
                             9.61848924371e-3f,
                             5.55032871194e-2f,
                             2.40226468861e-1f,
                             6.93147205767e-1f,
                             1.0f};
static const float TAIL[] = {-9.93506565309e-7f, 1.73076391383e-5f, -8.36138771077e-5f,
                             -3.73801107022e-4f, 7.35248590299e-3f, -5.26788466017e-2f,
                             -4.59154094879e-1f, -1.15111107757f,   -9.99999890982e-1f};
static const float TANH_NEAR[] = {1.58475578222e-3f,  -7.40955650978e-3f, 2.13029904058e-2f,
                                  -5.38523313966e-2f, 1.33322210242e-1f,  -3.33332973583e-1f};
static const float TAIL_END = 6.0f, TANH_SEAM = 0.8f, TANH_END = 10.0f;
static const double SQRT_HALF = 0.70710678118654752, NORMAL_DENSITY = 0.39894228040143268;
static const double TANH_SCALE = 0.79788456080286536, TANH_CUBIC = 0.044715;
static const float EXP_LOWEST = -104.0f, EXP_HIGHEST = 89.0f; /* beyond: 0 and infinity */

/* UNROLL vectors at once: with one alone, each step of a polynomial would wait for the result of the step before. EACH
 * runs a statement for k = 0 .. UNROLL-1. */
enum { UNROLL = 2 };
typedef struct {
    f32_v v[UNROLL];
} f32_vs;
typedef struct {
    f64_v v[UNROLL];
} f64_vs;
#define EACH _Pragma("GCC unroll 4") for (int k = 0; k < UNROLL; k++)

INLINE f32_vs fused_polynomial(const float *coefficients, const int n, f32_vs x) {
    f32_vs value;
    EACH value.v[k] = f32_set1(coefficients[0]);
#pragma GCC unroll 8
    for (int i = 1; i < n; i++) EACH value.v[k] = f32_fma(value.v[k], x.v[k], f32_set1(coefficients[i]));
    return value;
}
#define FUSED_POLYNOMIAL(coefficients, x)                                                                              \
    fused_polynomial(coefficients, sizeof(coefficients) / sizeof *(coefficients), x)

INLINE f32_v f32_abs(f32_v x) { return f32_of_bits(words_and(bits_of_f32(x), words_set1(0x7FFFFFFF))); }
/* The magnitude of the first with the sign of the second. */
INLINE f32_v f32_sign_of(f32_v magnitude, f32_v x) { return f32_turn(bits_of_f32(x), magnitude); }

/* e^x = 2^n e^r for x from EXP_LOWEST to EXP_HIGHEST. */
INLINE f32_vs exp_within(f32_vs x) {
    f32_vs n, r, value;
    EACH n.v[k] = f32_round(x.v[k] * f32_set1(1.44269504088896341));
    EACH r.v[k] = f32_fma(n.v[k], f32_set1(-LN2_LOW), f32_fma(n.v[k], f32_set1(-LN2_HIGH), x.v[k]));
    value = FUSED_POLYNOMIAL(EXP, r);
    EACH value.v[k] = f32_times_power(value.v[k], n.v[k]);
    return value;
}

/* 2^x for x in the range of exponents. Cheaper than exp_within, because x splits into n and r exactly. */
INLINE f32_vs exp2_within(f32_vs x) {
    f32_vs n, r, value;
    EACH n.v[k] = f32_round(x.v[k]);
    EACH r.v[k] = x.v[k] - n.v[k];
    value = FUSED_POLYNOMIAL(EXP2, r);
    EACH value.v[k] = f32_times_power(value.v[k], n.v[k]);
    return value;
}

INLINE f32_vs f32_exp(f32_vs x) {
    EACH x.v[k] = f32_max(f32_set1(EXP_LOWEST), f32_min(f32_set1(EXP_HIGHEST), x.v[k]));
    return exp_within(x);
}

INLINE f32_vs f32_tanh(f32_vs x) {
    const f32_v one = f32_set1(1);
    f32_vs square, near, far;
    EACH square.v[k] = x.v[k] * x.v[k];
    near = FUSED_POLYNOMIAL(TANH_NEAR, square);
    EACH far.v[k] = f32_min(f32_set1(TANH_END), f32_abs(x.v[k])) * f32_set1(2);
    far = exp_within(far);
    EACH {
        f32_v t = f32_abs(x.v[k]);
        near.v[k] = f32_fma(near.v[k] * square.v[k], t, t);
        far.v[k] = one - f32_set1(2) / (far.v[k] + one);
        x.v[k] = f32_sign_of(f32_select(f32_less(t, f32_set1(TANH_SEAM)), near.v[k], far.v[k]), x.v[k]);
    }
    return x;
}

/* The probability that a standard normal number is below h. Absolute error at most 2^-23; relative error at most 1/1000
 * down to -TAIL_END, below which it is 0. Not computed by erf: 1 + erf loses all digits there. */
INLINE f32_vs f32_normal_cdf(f32_vs h) {
    const f32_v end = f32_set1(TAIL_END), zero = f32_set1(0);
    f32_vs tail;
    EACH tail.v[k] = f32_min(end, f32_abs(h.v[k]));
    tail = exp2_within(FUSED_POLYNOMIAL(TAIL, tail));
    EACH {
        tail.v[k] = f32_select(f32_less(end, f32_abs(h.v[k])), zero, tail.v[k]);
        h.v[k] = f32_select(f32_less(h.v[k], zero), tail.v[k], f32_set1(1) - tail.v[k]);
    }
    return h;
}

INLINE double normal_cdf(double h) { return 0.5 * erfc(-SQRT_HALF * h); }

#define BY_LANES(name, function)                                                                                       \
    static f64_vs name(f64_vs x) {                                                                                     \
        EACH {                                                                                                         \
            double lanes[f64_lanes];                                                                                   \
            f64_store(lanes, x.v[k]);                                                                                  \
            for (int i = 0; i < f64_lanes; i++) lanes[i] = function(lanes[i]);                                         \
            x.v[k] = f64_load(lanes);                                                                                  \
        }                                                                                                              \
        return x;                                                                                                      \
    }
BY_LANES(f64_exp, exp)
BY_LANES(f64_tanh, tanh)
BY_LANES(f64_normal_cdf, normal_cdf)
#undef BY_LANES

/* exp, tanh, erf and the normal distribution in words of the lane vocabulary: included by kernels.inc.h.
 *
 * float32 by polynomials fitted for the purpose, at most 2 ulp from the true value over the whole range, subnormal
 * results included; NaN stays NaN. Coefficients are fastdrop/core/activations.py's, highest power first. float64 goes
 * to the C library, a lane at a time: it is there to be right.
 */
static const float EXP[] = {1.38358019285e-3f,
                            8.37564503033e-3f,
                            4.16682887279e-2f,
                            1.66664102439e-1f,
                            4.99999915941e-1f,
                            1.00000003853f,
                            1.0f};
static const float ERF_NEAR[] = {4.51235798907e-3f, -2.66469863602e-2f, 1.12809917263e-1f, -3.76125126092e-1f,
                                 1.283791579e-1f};
static const float EXP2[] = {1.53457891094e-4f,
                             1.3399957587e-3f,
                             9.61848924371e-3f,
                             5.55032871194e-2f,
                             2.40226468861e-1f,
                             6.93147205767e-1f,
                             1.0f};
static const float ERF_FAR[] = {3.20957334897e-4f,  -4.74237159696e-3f, 3.33763852417e-2f, -1.52469013054e-1f,
                                -9.16589237366e-1f, -1.62835890427f,    4.55101072006e-5f};
static const float TAIL[] = {-9.93506565309e-7f, 1.73076391383e-5f, -8.36138771077e-5f,
                             -3.73801107022e-4f, 7.35248590299e-3f, -5.26788466017e-2f,
                             -4.59154094879e-1f, -1.15111107757f,   -9.99999890982e-1f};
static const float TANH_NEAR[] = {1.58475578222e-3f,  -7.40955650978e-3f, 2.13029904058e-2f,
                                  -5.38523313966e-2f, 1.33322210242e-1f,  -3.33332973583e-1f};
static const float ERF_SEAM = 0.6f, ERF_END = 4.0f, TAIL_END = 6.0f, TANH_SEAM = 0.8f, TANH_END = 10.0f;
static const double SQRT_HALF = 0.70710678118654752, NORMAL_DENSITY = 0.39894228040143268;
static const double TANH_SCALE = 0.79788456080286536, TANH_CUBIC = 0.044715;
static const float EXP_LOWEST = -104.0f, EXP_HIGHEST = 89.0f; /* beyond: 0 and infinity */

/* Several vectors side by side: one alone would wait for its own results at every step of a polynomial. */
enum { ABREAST = 2 };
typedef struct {
    f32_v v[ABREAST];
} f32_vs;
typedef struct {
    f64_v v[ABREAST];
} f64_vs;
#define EACH _Pragma("GCC unroll 4") for (int k = 0; k < ABREAST; k++)

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

/* Of x from EXP_LOWEST to EXP_HIGHEST: e^x = 2^n e^r. */
INLINE f32_vs exp_within(f32_vs x) {
    f32_vs n, r, value;
    EACH n.v[k] = f32_round(x.v[k] * f32_set1(1.44269504088896341));
    EACH r.v[k] = f32_fma(n.v[k], f32_set1(-LN2_LOW), f32_fma(n.v[k], f32_set1(-LN2_HIGH), x.v[k]));
    value = FUSED_POLYNOMIAL(EXP, r);
    EACH value.v[k] = f32_times_power(value.v[k], n.v[k]);
    return value;
}

/* 2^x of x in the range of exponents: cheaper by the splitting of x. */
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

/* No kernel needs it: gelu takes f32_below. */
INLINE f32_vs f32_erf(f32_vs x) {
    f32_vs square, near, far;
    EACH square.v[k] = x.v[k] * x.v[k];
    near = FUSED_POLYNOMIAL(ERF_NEAR, square);
    EACH far.v[k] = f32_min(f32_set1(ERF_END), f32_abs(x.v[k]));
    far = exp2_within(FUSED_POLYNOMIAL(ERF_FAR, far));
    EACH {
        f32_v t = f32_abs(x.v[k]);
        near.v[k] = f32_fma(near.v[k], t, t);
        far.v[k] = f32_set1(1) - far.v[k];
        x.v[k] = f32_sign_of(f32_select(f32_less(t, f32_set1(ERF_SEAM)), near.v[k], far.v[k]), x.v[k]);
    }
    return x;
}

/* The probability of a standard normal number to be below h: to 2^-24, and to a thousandth of itself down to -TAIL_END,
 * from where on it is 0. Not by erf, of which nothing is left there but rounding. */
INLINE f32_vs f32_below(f32_vs h) {
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

INLINE double below(double h) { return 0.5 * erfc(-SQRT_HALF * h); }

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
BY_LANES(f64_below, below)
#undef BY_LANES

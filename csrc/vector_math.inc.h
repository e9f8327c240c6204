/* exp, tanh, erf and the activations made of them: included by kernels.inc.h, in words of the lane vocabulary.
 *
 * float32 by polynomials fitted for the purpose, at most 2 ulp from the true value over the whole range, subnormal
 * results included; NaN stays NaN. Coefficients are fastdrop/activations.py's, highest power first. float64 goes to the
 * C library, a lane at a time: it is there to be right.
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
static const float ERF_FAR[] = {-2.22470671764e-4f, 3.2871615016e-3f, -2.31347473276e-2f, 1.05683466521e-1f,
                                6.35331245612e-1f,  1.12869238343f,   -3.15452024931e-5f};
static const float TANH_NEAR[] = {1.58475578222e-3f,  -7.40955650978e-3f, 2.13029904058e-2f,
                                  -5.38523313966e-2f, 1.33322210242e-1f,  -3.33332973583e-1f};
static const float ERF_SEAM = 0.6f, ERF_END = 4.0f, TANH_SEAM = 0.8f, TANH_END = 10.0f;
static const float EXP_LOWEST = -104.0f, EXP_HIGHEST = 89.0f; /* beyond: 0 and infinity */

INLINE f32_v fused_polynomial(const float *coefficients, const int n, f32_v x) {
    f32_v value = f32_set1(coefficients[0]);
#pragma GCC unroll 8
    for (int i = 1; i < n; i++) value = f32_fma(value, x, f32_set1(coefficients[i]));
    return value;
}
#define FUSED_POLYNOMIAL(coefficients, x)                                                                              \
    fused_polynomial(coefficients, sizeof(coefficients) / sizeof *(coefficients), x)

INLINE f32_v f32_abs(f32_v x) { return f32_of_bits(words_and(bits_of_f32(x), words_set1(0x7FFFFFFF))); }
/* The magnitude of the first with the sign of the second. */
INLINE f32_v f32_sign_of(f32_v magnitude, f32_v x) { return f32_turn(bits_of_f32(x), magnitude); }

/* Of x from EXP_LOWEST to EXP_HIGHEST: e^x = 2^n e^r. */
INLINE f32_v exp_within(f32_v x) {
    f32_v n = f32_round(x * f32_set1(1.44269504088896341));
    f32_v r = f32_fma(n, f32_set1(-LN2_LOW), f32_fma(n, f32_set1(-LN2_HIGH), x));
    return f32_times_power(FUSED_POLYNOMIAL(EXP, r), n);
}

INLINE f32_v f32_exp(f32_v x) { return exp_within(f32_max(f32_set1(EXP_LOWEST), f32_min(f32_set1(EXP_HIGHEST), x))); }

INLINE f32_v f32_tanh(f32_v x) {
    f32_v t = f32_abs(x), square = x * x;
    f32_v near = f32_fma(FUSED_POLYNOMIAL(TANH_NEAR, square) * square, t, t);
    f32_v far = f32_min(f32_set1(TANH_END), t);
    far = f32_set1(1) - f32_set1(2) / (exp_within(far + far) + f32_set1(1));
    return f32_sign_of(f32_select(f32_less(t, f32_set1(TANH_SEAM)), near, far), x);
}

INLINE f32_v f32_erf(f32_v x) {
    f32_v t = f32_abs(x);
    f32_v near = f32_fma(FUSED_POLYNOMIAL(ERF_NEAR, t * t), t, t);
    f32_v far = f32_min(f32_set1(ERF_END), t);
    far = f32_set1(1) - exp_within(f32_set1(0) - FUSED_POLYNOMIAL(ERF_FAR, far));
    return f32_sign_of(f32_select(f32_less(t, f32_set1(ERF_SEAM)), near, far), x);
}

#define BY_LANES(name, function)                                                                                       \
    static f64_v name(f64_v x) {                                                                                       \
        double lanes[f64_lanes];                                                                                       \
        f64_store(lanes, x);                                                                                           \
        for (int i = 0; i < f64_lanes; i++) lanes[i] = function(lanes[i]);                                             \
        return f64_load(lanes);                                                                                        \
    }
BY_LANES(f64_exp, exp)
BY_LANES(f64_tanh, tanh)
BY_LANES(f64_erf, erf)
#undef BY_LANES

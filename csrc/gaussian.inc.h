/* Gaussian noise for gaussian_multiply of apply.inc.h. Included once by kernels.inc.h. draw_factors writes the factors
 * 1 + sigma z of a run of cells to a local buffer, from which data of any type and alignment takes them.
 *
 * A tile of TILE_CELLS cells is made from 16 Philox counters. Output k of counter j gives cell 16 k + j, so a vector of
 * counters gives vectors of neighbouring cells and nothing has to be transposed. z comes from Box and Muller's
 * transform. Its logarithm, sine and cosine are computed here and not by a library, because libraries round
 * differently. Constants and the order of operations are those of the reference backend, so results are the same bit
 * for bit.
 */
enum {
    TILE_CELLS = 64,
    TILE_COUNTERS = 16,
    NOISE_CELLS = 32 * TILE_CELLS /* drawn at a time; one tile in 32 may be drawn twice */
};

/* The first counter of the tile that a cell lies in. */
INLINE uint64_t first_counter(uint64_t cell) { return cell / TILE_CELLS * TILE_COUNTERS; }

/* Moshier, Cephes 2.2, 1992: logf, sinf, cosf; highest power first. */
static const float LOG[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                            -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                            2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
static const float SINE[] = {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f};
static const float COSINE[] = {2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f};
static const float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
static const float RADIANS = (float)(1.5707963267948966 / 4294967296.0); /* of a quarter turn, in 2^32 steps */
static const uint32_t SQRT_HALF_BITS = 0x3F3504F3, EXPONENT_BITS = 0xFF800000;

INLINE f32_v polynomial(const float *coefficients, const int n, f32_v x) {
    f32_v value = f32_set1(coefficients[0]);
#pragma GCC unroll 8
    for (int i = 1; i < n; i++) value = value * x + f32_set1(coefficients[i]);
    return value;
}
#define POLYNOMIAL(coefficients, x) polynomial(coefficients, sizeof(coefficients) / sizeof *(coefficients), x)

/* Two independent standard normal numbers from two uniform ones. */
INLINE void normal_pair(words_t radius, words_t angle, f32_v z[2]) {
    /* -2 ln u for u = (the upper 31 bits + 1/2) / 2^31: u = m 2^e with m about 1, ln u = ln m + e ln 2. */
    f32_v u = (f32_of_int(words_right(radius, 1)) + f32_set1(0.5)) * f32_set1(0x1p-31);
    words_t bits = bits_of_f32(u), scaled = words_sub(bits, words_set1(SQRT_HALF_BITS));
    f32_v e = f32_of_int(words_right_signed(scaled, 23));
    f32_v x = f32_of_bits(words_sub(bits, words_and(scaled, words_set1(EXPONENT_BITS)))) - f32_set1(1);
    f32_v square = x * x;
    f32_v log = POLYNOMIAL(LOG, x) * x * square;
    log = log + e * f32_set1(LN2_LOW);
    log = log - square * f32_set1(0.5);
    log = (x + log) + e * f32_set1(LN2_HIGH);
    f32_v r = f32_sqrt(log * f32_set1(-2));
    /* The upper two bits turn by quarters, the lower thirty within one: -pi/4 to pi/4. */
    f32_v t = f32_of_int(words_left(angle, 2)) * f32_set1(RADIANS);
    square = t * t;
    f32_v sine = POLYNOMIAL(SINE, square) * square * t + t;
    f32_v cosine = POLYNOMIAL(COSINE, square) * square * square - square * f32_set1(0.5) + f32_set1(1);
    words_t swap = words_left(angle, 1);
    cosine = f32_turn(angle, cosine);
    z[0] = r * f32_where(swap, sine, cosine);
    z[1] = r * f32_where(swap, cosine, sine);
}

/* The factors of n cells; the first begins a tile. In two loops, because a CPU has more iterations of a short loop in
 * flight. */
static void draw_factors(philox_t *p, uint64_t first, uint64_t n, float sigma, float *factors) {
    const f32_v one = f32_set1(1), spread = f32_set1(sigma);
    uint32_t drawn[NOISE_CELLS];
    uint64_t b = first_counter(first);
    for (uint64_t tile = 0; tile < n; tile += TILE_CELLS, b += TILE_COUNTERS) {
        uint32_t high = (uint32_t)(b >> 32);
        if (__builtin_expect(high != p->high, 0)) philox_set_high(p, high);
        for (unsigned v = 0; v < TILE_COUNTERS; v += LANES) {
            state_t s = state_of(p, counter_of(p, words_count_from((uint32_t)b + v)), 0);
            words_t output[4];
#pragma GCC unroll 6
            for (int r = 3; r < PHILOX_ROUNDS - 1; r++) philox_round(p, &s, r);
            philox_outputs(p, &s, output);
#pragma GCC unroll 4
            for (unsigned k = 0; k < 4; k++) words_store(drawn + tile + k * TILE_COUNTERS + v, output[k]);
        }
    }
    for (uint64_t pair = 0; pair < n; pair += 2 * TILE_COUNTERS)
        for (unsigned v = 0; v < TILE_COUNTERS; v += LANES) {
            const uint32_t *radius = drawn + pair + v, *angle = radius + TILE_COUNTERS;
            float *to = factors + pair + v;
            f32_v z[2];
            normal_pair(words_load(radius), words_load(angle), z);
            f32_store(to, one + spread * z[0]);
            f32_store(to + TILE_COUNTERS, one + spread * z[1]);
        }
}

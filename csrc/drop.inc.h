/* Dropout of a strip, with a bias, an activation and a residual: the loop that most forward calls consist of.
 * Included by fused.inc.h for each type that is computed in; pointwise, norm and softmax use it.
 *
 * drop_loop is compiled for each combination of its constants, so that its inner loop does not branch.
 */

/* y = residual + (bit ? a act(x + bias) : 0) for n elements, the first under bit `position`. */
typedef struct {
    const C(t) * x, *bias, *residual; /* NULL: no bias, no residual; a residual needs FD_NO_ACTIVATION */
    C(t) * y;
    uint32_t *signs; /* for relu: takes the bits of what is kept and above 0 */
    const bits_t *bits;
    uint64_t position, n;
    C(t) a;
    int activation, stream;
} C(drop_t);

/* The first n elements, which are whole runs. relu drops what is not above 0 as well. */
INLINE void C(drop_loop)(const C(drop_t) * d, uint64_t n, const int activation, const int biased, const int adds,
                         const int stream) {
    const C(t) *x = d->x, *bias = d->bias, *residual = d->residual;
    const C(v) a = C(set1)(d->a);
    const bits_t *bits = d->bits;
    const uint64_t position = d->position, ahead = distance_ahead(stream);
    C(t) *y = d->y;
    uint32_t *signs = d->signs;
    for (uint64_t i = 0; i < n; i += RUN) {
        uint32_t run = run_at(bits, position + i, RUN), left = 0;
        for (unsigned byte = 0; byte < RUN * sizeof *x; byte += LINE_BYTES) {
            prefetch_from((const char *)(x + i) + byte, ahead);
            if (adds) prefetch_from((const char *)(residual + i) + byte, ahead);
        }
#pragma GCC unroll 2
        for (unsigned j = 0; j < RUN; j += C(unrolled)) {
            C(vs) v = C(load_unrolled)(x + i + j);
            if (biased) EACH v.v[k] = v.v[k] + C(load)(bias + i + j + k * C(lanes));
            if (activation != FD_RELU) v = C(activation)(v, activation);
            EACH {
                const unsigned at = j + k * C(lanes);
                C(keep) keep = C(mask)(run, (int)at);
                if (activation == FD_RELU) {
                    keep = C(except)(keep, C(not_above)(v.v[k], C(set1)(0)));
                    left |= C(bits)(keep) << at;
                }
                C(v) kept = C(scale)(keep, v.v[k], a);
                if (adds) kept = kept + C(load)(residual + i + at);
                C(store_partial)(y + i + at, kept, C(lanes), stream);
            }
        }
        if (activation == FD_RELU) signs[i / RUN] = left;
    }
}

INLINE void C(drop_as)(const C(drop_t) * d, uint64_t n, const int activation, const int adds) {
    if (d->bias && d->stream)
        C(drop_loop)(d, n, activation, 1, adds, 1);
    else if (d->bias)
        C(drop_loop)(d, n, activation, 1, adds, 0);
    else if (d->stream)
        C(drop_loop)(d, n, activation, 0, adds, 1);
    else
        C(drop_loop)(d, n, activation, 0, adds, 0);
}

static OUTLINE void C(drop_runs)(const C(drop_t) * d, uint64_t n) {
    switch (d->activation) {
    case FD_NO_ACTIVATION:
        if (d->residual)
            C(drop_as)(d, n, FD_NO_ACTIVATION, 1);
        else
            C(drop_as)(d, n, FD_NO_ACTIVATION, 0);
        break;
#define ROW(code, name)                                                                                                \
    case code: C(drop_as)(d, n, code, 0); break;
        FD_ACTIVATIONS(ROW)
#undef ROW
    }
}

/* Any number of elements; a last run that is not whole goes through scratch. */
static void C(drop)(const C(drop_t) * d) {
    const uint64_t rest = d->n % RUN, whole = d->n - rest, size = rest * sizeof(C(t));
    if (whole) C(drop_runs)(d, whole);
    if (!rest) return;
    C(t) x[RUN] = {0}, bias[RUN] = {0}, residual[RUN] = {0}, y[RUN];
    const uint32_t run = run_at(d->bits, d->position + whole, (unsigned)rest) & low_bits((unsigned)rest);
    const bits_t bits = {&run, RUN};
    C(drop_t) last = {.x = x, .y = y, .bits = &bits, .a = d->a, .activation = d->activation};
    memcpy(x, d->x + whole, size);
    if (d->bias) last.bias = memcpy(bias, d->bias + whole, size);
    if (d->residual) last.residual = memcpy(residual, d->residual + whole, size);
    if (d->signs) last.signs = d->signs + whole / RUN;
    C(drop_runs)(&last, RUN);
    memcpy(d->y + whole, y, size);
}

/* to = bit ? a x : 0. */
INLINE void C(mask_strip)(const C(t) * x, C(t) * to, const bits_t *bits, uint64_t position, uint64_t n, C(t) a,
                          int stream) {
    C(drop)(&(C(drop_t)){.x = x, .y = to, .bits = bits, .position = position, .n = n, .a = a, .stream = stream});
}

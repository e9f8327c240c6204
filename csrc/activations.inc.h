/* Activations and their derivatives. Included by fused.inc.h for each type that is computed in.
 *
 * FD_ACTIVATIONS in fastdrop.h lists them. For each name there are two functions here, C(name) and C(name_slope), and
 * every switch over activations is made from the list: a new row without its functions does not compile. dispatch.c
 * refuses any other code, so no switch has a default.
 */

INLINE C(vs) C(sigmoid)(C(vs) h) {
    const C(v) one = C(set1)(1);
    EACH h.v[k] = C(set1)(0) - h.v[k];
    h = C(exp)(h);
    EACH h.v[k] = one / (one + h.v[k]);
    return h;
}

/* The tanh in gelu_tanh. */
INLINE C(vs) C(tanh_of_cubic)(C(vs) h) {
    const C(v) scale = C(set1)(TANH_SCALE), cubic = C(set1)(TANH_SCALE * TANH_CUBIC);
    EACH h.v[k] = h.v[k] * C(fma)(cubic * h.v[k], h.v[k], scale);
    return C(tanh)(h);
}

INLINE C(vs) C(relu)(C(vs) h) {
    EACH h.v[k] = C(select)(C(not_above)(h.v[k], C(set1)(0)), C(set1)(0), h.v[k]);
    return h;
}

INLINE C(vs) C(relu_slope)(C(vs) h) {
    EACH h.v[k] = C(select)(C(not_above)(h.v[k], C(set1)(0)), C(set1)(0), C(set1)(1));
    return h;
}

INLINE C(vs) C(gelu)(C(vs) h) {
    const C(vs) below = C(normal_cdf)(h);
    EACH h.v[k] = h.v[k] * below.v[k];
    return h;
}

INLINE C(vs) C(gelu_slope)(C(vs) h) {
    const C(vs) below = C(normal_cdf)(h);
    C(vs) density;
    EACH density.v[k] = C(set1)(-0.5) * h.v[k] * h.v[k];
    density = C(exp)(density);
    EACH h.v[k] = C(fma)(h.v[k], C(set1)(NORMAL_DENSITY) * density.v[k], below.v[k]);
    return h;
}

INLINE C(vs) C(gelu_tanh)(C(vs) h) {
    const C(vs) t = C(tanh_of_cubic)(h);
    EACH h.v[k] = C(set1)(0.5) * h.v[k] * (C(set1)(1) + t.v[k]);
    return h;
}

INLINE C(vs) C(gelu_tanh_slope)(C(vs) h) {
    const C(v) one = C(set1)(1), scale = C(set1)(TANH_SCALE), cubic = C(set1)(3 * TANH_SCALE * TANH_CUBIC);
    const C(vs) t = C(tanh_of_cubic)(h);
    EACH {
        C(v) g = h.v[k] * (one - t.v[k] * t.v[k]); /* 0 where h^2 may be infinite */
        h.v[k] = C(set1)(0.5) * (one + t.v[k] + C(fma)(g * h.v[k], cubic * h.v[k], g * scale));
    }
    return h;
}

INLINE C(vs) C(silu)(C(vs) h) {
    const C(vs) s = C(sigmoid)(h);
    EACH h.v[k] = h.v[k] * s.v[k];
    return h;
}

INLINE C(vs) C(silu_slope)(C(vs) h) {
    const C(v) one = C(set1)(1);
    const C(vs) s = C(sigmoid)(h);
    EACH h.v[k] = s.v[k] * C(fma)(h.v[k], one - s.v[k], one);
    return h;
}

/* The activation at h. Callers pass a constant, so that nothing is left of the switch. */
INLINE C(vs) C(activation)(C(vs) h, const int activation) {
    switch (activation) {
#define ROW(code, name)                                                                                                \
    case code: return C(name)(h);
        FD_ACTIVATIONS(ROW)
#undef ROW
    }
    return h;
}

/* to = act(x). */
INLINE void C(activate_as)(const C(t) * x, C(t) * to, uint64_t n, const int activation) {
    const uint64_t ahead = distance_ahead(0);
    uint64_t i = 0;
    for (; i + C(unrolled) <= n; i += C(unrolled)) {
        prefetch_from(x + i, ahead);
        C(store_unrolled)(to + i, C(activation)(C(load_unrolled)(x + i), activation));
    }
    if (i == n) return;
    C(t) scratch[C(unrolled)] = {0};
    memcpy(scratch, x + i, (n - i) * sizeof *x);
    C(store_unrolled)(scratch, C(activation)(C(load_unrolled)(scratch), activation));
    memcpy(to + i, scratch, (n - i) * sizeof *x);
}

/* to = act(x + bias). */
static void C(activate)(const C(t) * x, const C(t) * bias, C(t) * to, uint64_t n, int activation) {
    if (bias) {
        C(add)(x, bias, to, n);
        x = to;
    }
    switch (activation) {
    case FD_NO_ACTIVATION: C(activate_as)(x, to, n, FD_NO_ACTIVATION); break;
#define ROW(code, name)                                                                                                \
    case code: C(activate_as)(x, to, n, code); break;
        FD_ACTIVATIONS(ROW)
#undef ROW
    }
}

/* g times the activation's derivative at h; there is an activation. */
static void C(activate_backward)(const C(t) * g, const C(t) * h, C(t) * to, uint64_t n, int activation) {
    const uint64_t ahead = distance_ahead(0);
    C(t) scratch[C(unrolled)] = {0};
    uint64_t i = 0;
    switch (activation) {
#define ROW(code, name)                                                                                                \
    case code:                                                                                                         \
        for (; i + C(unrolled) <= n; i += C(unrolled)) {                                                               \
            prefetch_from(g + i, ahead);                                                                               \
            prefetch_from(h + i, ahead);                                                                               \
            C(vs) slope = C(name##_slope)(C(load_unrolled)(h + i));                                                    \
            EACH C(store)(to + i + k * C(lanes), C(load)(g + i + k * C(lanes)) * slope.v[k]);                          \
        }                                                                                                              \
        if (i == n) break;                                                                                             \
        memcpy(scratch, h + i, (n - i) * sizeof *h);                                                                   \
        C(store_unrolled)(scratch, C(name##_slope)(C(load_unrolled)(scratch)));                                        \
        C(mul)(g + i, scratch, to + i, n - i);                                                                         \
        break;
        FD_ACTIVATIONS(ROW)
#undef ROW
    }
}

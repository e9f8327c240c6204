/* The fused kernels: included by kernels.inc.h for float32 and for float64, CTYPE, in which a kernel computes.
 *
 * Data goes through a kernel's stages (bias, activation, bits, residual) a strip at a time, each stage a loop over
 * numbers of CTYPE in the nearest cache. What is stored as CTYPE is read and written where it lies; what is stored in
 * 16 bits passes through a strip's room. So a stage exists once for all storage types. One loop is composed at build
 * time, `drop_as`, of bias, activation, bits and residual: it is all that most forward calls do. Norms and softmax go
 * over a row again while it is in the cache.
 *
 * Sums over a row are taken in lanes and then in double, sums over a column by panels of rows and then over the panels:
 * in orders that the shape decides, whatever the threads.
 */
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define C(name) PASTE(CTYPE, name)

/* ---- storage ---- */

/* n numbers of a dtype from element `at` on: as they lie or, if they are not of CTYPE, in the room. NULL stays NULL. */
INLINE const C(t) * C(view)(int dtype, const void *data, uint64_t at, uint64_t n, C(t) * room) {
    if (!data) return NULL;
    if (dtype == FD_FLOAT16)
        f16_widen((const f16_t *)data + at, (void *)room, n);
    else if (dtype == FD_BFLOAT16)
        bf16_widen((const bf16_t *)data + at, (void *)room, n);
    else
        return (const C(t) *)data + at;
    return room;
}

/* Where numbers for element `at` on are to be made: as they will lie or, if `deliver` has to take them there, in the
 * room. Staged: they will be read again, and are then to go around the cache. */
INLINE C(t) * C(place)(int dtype, void *data, uint64_t at, C(t) * room, int staged) {
    return staged || dtype == FD_FLOAT16 || dtype == FD_BFLOAT16 ? room : (C(t) *)data + at;
}

/* A number at any address. */
INLINE C(t) C(one)(const C(t) * p) {
    C(t) one;
    memcpy(&one, p, sizeof one);
    return one;
}

INLINE void C(put_one)(C(t) * p, C(t) one) { memcpy(p, &one, sizeof one); }

/* Up to a vector of numbers; what is missing is 0. Where n is a constant nothing is left of the question. */
INLINE C(v) C(few)(const C(t) * p, uint64_t n) {
    C(t) few[C(lanes)] = {0};
    if (n >= C(lanes)) return C(load)(p);
    memcpy(few, p, n * sizeof *p);
    return C(load)(few);
}

INLINE void C(put)(C(t) * p, C(v) v, uint64_t n, const int stream) {
    if (n >= C(lanes) && stream) {
        C(stream)(p, v);
    } else if (n >= C(lanes)) {
        C(store)(p, v);
    } else {
        C(t) few[C(lanes)];
        C(store)(few, v);
        memcpy(p, few, n * sizeof *p);
    }
}

/* A loop's body, written as a function of i and of how many elements are left there: whole vectors, then the rest. */
#define FOR_LANES(n, BODY)                                                                                             \
    do {                                                                                                               \
        uint64_t i = 0;                                                                                                \
        for (; i + C(lanes) <= (n); i += C(lanes)) BODY(C(lanes))                                                      \
        if (i < (n)) BODY(((n) - i))                                                                                   \
    } while (0)

INLINE uint64_t C(size)(int dtype) { return dtype == FD_FLOAT16 || dtype == FD_BFLOAT16 ? 2 : sizeof(C(t)); }

/* Elements until data of a dtype reaches a line; more than there are, where it never does. */
INLINE uint64_t C(to_line)(int dtype, const void *data, uint64_t at) {
    uint64_t size = C(size)(dtype), address = (uintptr_t)data + at * size;
    return address % size ? UINT64_MAX : -address % LINE_BYTES / size;
}

/* Takes n numbers from where `place` had them made to where they belong; stream: around the cache. */
static void C(deliver)(int dtype, void *data, uint64_t at, uint64_t n, const C(t) * made, int stream) {
    const uint64_t lead = stream ? min_u64(C(to_line)(dtype, data, at), n) : 0; /* until a line begins */
    if (dtype == FD_FLOAT16) {
        f16_narrow((const void *)made, (f16_t *)data + at, lead, 0);
        f16_narrow((const void *)(made + lead), (f16_t *)data + at + lead, n - lead, stream);
    } else if (dtype == FD_BFLOAT16) {
        bf16_narrow((const void *)made, (bf16_t *)data + at, lead, 0);
        bf16_narrow((const void *)(made + lead), (bf16_t *)data + at + lead, n - lead, stream);
    } else if (made != (C(t) *)data + at) {
        C(t) *to = (C(t) *)data + at;
        memcpy(to, made, lead * sizeof *to);
#define BODY(left) C(put)(to + lead + i, C(few)(made + lead + i, left), left, 1);
        if (stream)
            FOR_LANES(n - lead, BODY);
        else
            memcpy(to, made, n * sizeof *to);
#undef BODY
    }
}

/* ---- stages ---- */

INLINE C(t) C(total)(C(v) v) {
    C(t) lanes[C(lanes)];
    C(store)(lanes, v);
    for (int n = C(lanes) / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
}

static void C(add)(const C(t) * x, const C(t) * bias, C(t) * to, uint64_t n) {
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        AHEAD(x + i, 0);                                                                                               \
        C(put)(to + i, C(few)(x + i, left) + C(few)(bias + i, left), left, 0);                                         \
    }
    FOR_LANES(n, BODY);
#undef BODY
}

static void C(times)(const C(t) * x, const C(t) * multiplier, C(t) * to, uint64_t n) {
#define BODY(left) C(put)(to + i, C(few)(x + i, left) * C(few)(multiplier + i, left), left, 0);
    FOR_LANES(n, BODY);
#undef BODY
}

/* ---- activations ---- */

INLINE C(vs) C(gate)(C(vs) h) {
    const C(v) one = C(set1)(1);
    EACH h.v[k] = C(set1)(0) - h.v[k];
    h = C(exp)(h);
    EACH h.v[k] = one / (one + h.v[k]);
    return h;
}

INLINE C(vs) C(tanh_of_cubic)(C(vs) h) {
    const C(v) scale = C(set1)(TANH_SCALE), cubic = C(set1)(TANH_SCALE * TANH_CUBIC);
    EACH h.v[k] = h.v[k] * C(fma)(cubic * h.v[k], h.v[k], scale);
    return C(tanh)(h);
}

INLINE C(vs) C(same)(C(vs) h) { return h; }

INLINE C(vs) C(relu)(C(vs) h) {
    EACH h.v[k] = C(select)(C(not_above)(h.v[k], C(set1)(0)), C(set1)(0), h.v[k]);
    return h;
}

INLINE C(vs) C(gelu)(C(vs) h) {
    const C(vs) below = C(below)(h);
    EACH h.v[k] = h.v[k] * below.v[k];
    return h;
}

INLINE C(vs) C(gelu_tanh)(C(vs) h) {
    const C(vs) t = C(tanh_of_cubic)(h);
    EACH h.v[k] = C(set1)(0.5) * h.v[k] * (C(set1)(1) + t.v[k]);
    return h;
}

INLINE C(vs) C(silu)(C(vs) h) {
    const C(vs) gate = C(gate)(h);
    EACH h.v[k] = h.v[k] * gate.v[k];
    return h;
}

INLINE C(vs) C(relu_slope)(C(vs) h) {
    EACH h.v[k] = C(select)(C(not_above)(h.v[k], C(set1)(0)), C(set1)(0), C(set1)(1));
    return h;
}

INLINE C(vs) C(gelu_slope)(C(vs) h) {
    const C(vs) below = C(below)(h);
    C(vs) density;
    EACH density.v[k] = C(set1)(-0.5) * h.v[k] * h.v[k];
    density = C(exp)(density);
    EACH h.v[k] = C(fma)(h.v[k], C(set1)(NORMAL_DENSITY) * density.v[k], below.v[k]);
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

INLINE C(vs) C(silu_slope)(C(vs) h) {
    const C(v) one = C(set1)(1);
    const C(vs) gate = C(gate)(h);
    EACH h.v[k] = gate.v[k] * C(fma)(h.v[k], one - gate.v[k], one);
    return h;
}

enum { C(bunch) = ABREAST * C(lanes) };

INLINE C(vs) C(several)(const C(t) * p) {
    C(vs) several;
    EACH several.v[k] = C(load)(p + k * C(lanes));
    return several;
}

INLINE void C(put_several)(C(t) * p, C(vs) several) { EACH C(store)(p + k * C(lanes), several.v[k]); }

/* to = act(x + bias). */
static void C(activate)(const C(t) * x, const C(t) * bias, C(t) * to, uint64_t n, int activation) {
    C(t) room[C(bunch)] = {0};
    if (bias) {
        C(add)(x, bias, to, n);
        x = to;
    }
#define CURVED(curve)                                                                                                  \
    for (; i + C(bunch) <= n; i += C(bunch)) {                                                                         \
        AHEAD(x + i, 0);                                                                                               \
        C(put_several)(to + i, curve(C(several)(x + i)));                                                              \
    }                                                                                                                  \
    if (i == n) break;                                                                                                 \
    memcpy(room, x + i, (n - i) * sizeof *x);                                                                          \
    C(put_several)(room, curve(C(several)(room)));                                                                     \
    memcpy(to + i, room, (n - i) * sizeof *x);                                                                         \
    break;
    uint64_t i = 0;
    switch (activation) {
    case FD_RELU: CURVED(C(relu))
    case FD_GELU: CURVED(C(gelu))
    case FD_GELU_TANH: CURVED(C(gelu_tanh))
    case FD_SILU: CURVED(C(silu))
    default: CURVED(C(same))
    }
#undef CURVED
}

/* g times the activation's derivative at h. */
static void C(activate_back)(const C(t) * g, const C(t) * h, C(t) * to, uint64_t n, int activation) {
    C(t) room[C(bunch)] = {0};
#define CURVED(slope)                                                                                                  \
    for (; i + C(bunch) <= n; i += C(bunch)) {                                                                         \
        AHEAD(g + i, 0);                                                                                               \
        AHEAD(h + i, 0);                                                                                               \
        C(vs) s = slope(C(several)(h + i));                                                                            \
        EACH C(store)(to + i + k * C(lanes), C(load)(g + i + k * C(lanes)) * s.v[k]);                                  \
    }                                                                                                                  \
    if (i == n) break;                                                                                                 \
    memcpy(room, h + i, (n - i) * sizeof *h);                                                                          \
    C(put_several)(room, slope(C(several)(room)));                                                                     \
    C(times)(g + i, room, to + i, n - i);                                                                              \
    break;
    uint64_t i = 0;
    switch (activation) {
    case FD_RELU: CURVED(C(relu_slope))
    case FD_GELU: CURVED(C(gelu_slope))
    case FD_GELU_TANH: CURVED(C(gelu_tanh_slope))
    default: CURVED(C(silu_slope))
    }
#undef CURVED
}

/* ---- bits ---- */

/* y = residual + (bit ? a act(h + bias) : 0), n in whole runs. What relu makes 0 is dropped as well, and alive takes
 * the bits of what is left. */
INLINE void C(drop_as)(const C(t) * h, const C(t) * bias, const C(t) * residual, C(t) * y, const bits_t *bits,
                       uint64_t position, uint64_t n, C(v) a, uint32_t *alive, const int activation, const int biased,
                       const int adds, const int stream) {
    for (uint64_t i = 0; i < n; i += RUN) {
        uint32_t run = run_at(bits, position + i, RUN), left = 0;
        for (unsigned byte = 0; byte < RUN * sizeof *h; byte += LINE_BYTES) {
            AHEAD((const char *)(h + i) + byte, stream);
            if (adds) AHEAD((const char *)(residual + i) + byte, stream);
        }
#pragma GCC unroll 2
        for (unsigned j = 0; j < RUN; j += C(bunch)) {
            C(vs) v = C(several)(h + i + j);
            if (biased) EACH v.v[k] = v.v[k] + C(load)(bias + i + j + k * C(lanes));
            switch (activation) {
            case FD_GELU: v = C(gelu)(v); break;
            case FD_GELU_TANH: v = C(gelu_tanh)(v); break;
            case FD_SILU: v = C(silu)(v);
            }
            EACH {
                const unsigned at = j + k * C(lanes);
                C(keep) keep = C(mask)(run, (int)at);
                if (activation == FD_RELU) {
                    keep = C(except)(keep, C(not_above)(v.v[k], C(set1)(0)));
                    left |= C(bits)(keep) << at;
                }
                C(v) kept = C(scale)(keep, v.v[k], a);
                if (adds) kept = kept + C(load)(residual + i + at);
                C(put)(y + i + at, kept, C(lanes), stream);
            }
        }
        if (activation == FD_RELU) alive[i / RUN] = left;
    }
}

INLINE void C(drop_some)(const C(t) * h, const C(t) * bias, C(t) * y, const bits_t *bits, uint64_t position, uint64_t n,
                         C(v) a, uint32_t *alive, int stream, const int activation) {
    if (bias && stream)
        C(drop_as)(h, bias, NULL, y, bits, position, n, a, alive, activation, 1, 0, 1);
    else if (bias)
        C(drop_as)(h, bias, NULL, y, bits, position, n, a, alive, activation, 1, 0, 0);
    else if (stream)
        C(drop_as)(h, NULL, NULL, y, bits, position, n, a, alive, activation, 0, 0, 1);
    else
        C(drop_as)(h, NULL, NULL, y, bits, position, n, a, alive, activation, 0, 0, 0);
}

/* A residual only where there is no activation. */
static OUTLINE void C(drop_runs)(const C(t) * h, const C(t) * bias, const C(t) * residual, C(t) * y, const bits_t *bits,
                                 uint64_t position, uint64_t n, C(v) a, int activation, uint32_t *alive, int stream) {
    switch (activation) {
    case FD_RELU: C(drop_some)(h, bias, y, bits, position, n, a, alive, stream, FD_RELU); return;
    case FD_GELU: C(drop_some)(h, bias, y, bits, position, n, a, NULL, stream, FD_GELU); return;
    case FD_GELU_TANH: C(drop_some)(h, bias, y, bits, position, n, a, NULL, stream, FD_GELU_TANH); return;
    case FD_SILU: C(drop_some)(h, bias, y, bits, position, n, a, NULL, stream, FD_SILU); return;
    }
    if (!residual)
        C(drop_some)(h, bias, y, bits, position, n, a, NULL, stream, FD_NO_ACTIVATION);
    else if (bias && stream)
        C(drop_as)(h, bias, residual, y, bits, position, n, a, NULL, FD_NO_ACTIVATION, 1, 1, 1);
    else if (bias)
        C(drop_as)(h, bias, residual, y, bits, position, n, a, NULL, FD_NO_ACTIVATION, 1, 1, 0);
    else if (stream)
        C(drop_as)(h, NULL, residual, y, bits, position, n, a, NULL, FD_NO_ACTIVATION, 0, 1, 1);
    else
        C(drop_as)(h, NULL, residual, y, bits, position, n, a, NULL, FD_NO_ACTIVATION, 0, 1, 0);
}

/* Of any n; what is no whole run goes through rooms. */
static void C(drop)(const C(t) * h, const C(t) * bias, const C(t) * residual, C(t) * y, const bits_t *bits,
                    uint64_t position, uint64_t n, C(v) a, int activation, uint32_t *alive, int stream) {
    const uint64_t rest = n % RUN, whole = n - rest, size = rest * sizeof *h;
    if (whole) C(drop_runs)(h, bias, residual, y, bits, position, whole, a, activation, alive, stream);
    if (!rest) return;
    C(t) room_h[RUN] = {0}, room_bias[RUN] = {0}, room_residual[RUN] = {0}, room_y[RUN];
    const uint32_t run = run_at(bits, position + whole, (unsigned)rest) & low_bits((unsigned)rest);
    const bits_t last = {&run, RUN};
    memcpy(room_h, h + whole, size);
    if (bias) memcpy(room_bias, bias + whole, size);
    if (residual) memcpy(room_residual, residual + whole, size);
    C(drop_runs)(room_h, bias ? room_bias : NULL, residual ? room_residual : NULL, room_y, &last, 0, RUN, a, activation,
                 alive ? alive + whole / RUN : NULL, 0);
    memcpy(y + whole, room_y, size);
}

/* Where nothing comes before or after: to = bit ? a x : 0. */
INLINE void C(mask_strip)(const C(t) * x, C(t) * to, const bits_t *bits, uint64_t position, uint64_t n, C(v) a,
                          int stream) {
    C(drop)(x, NULL, NULL, to, bits, position, n, a, FD_NO_ACTIVATION, NULL, stream);
}

/* ---- bias, activation, dropout, residual ---- */

/* A row of columns, repeated where it is short, so that a strip may begin at any column and go on past the end. */
typedef struct {
    const C(t) * row; /* NULL: none */
    uint64_t columns, reach, column;
    C(t) room[2 * STRIP_CELLS];
} C(columns_t);

static void C(columns_open)(C(columns_t) * c, const void *row, uint64_t columns, uint64_t at) {
    c->row = row;
    c->columns = columns;
    c->reach = columns;
    c->column = at % columns;
    if (!row || columns > STRIP_CELLS) return;
    c->reach = 2 * STRIP_CELLS;
    memcpy(c->room, row, columns * sizeof *c->room);
    for (uint64_t have = columns, n; have < c->reach; have += n) { /* whole rows, but for the last copy */
        n = min_u64(have, c->reach - have);
        memcpy(c->room + have, c->room, n * sizeof *c->room);
    }
    c->row = c->room;
}

/* Of the next elements; *n of them at most, less where a long row ends. */
INLINE const C(t) * C(columns_next)(C(columns_t) * c, uint64_t *n) {
    if (!c->row) return NULL;
    const C(t) *next = c->row + c->column;
    *n = min_u64(*n, c->reach - c->column);
    c->column += *n;
    if (c->column >= c->columns) c->column %= c->columns;
    return next;
}

typedef struct {
    C(t) x[STRIP_CELLS], multiplier[STRIP_CELLS], residual[STRIP_CELLS], y[STRIP_CELLS];
} C(rooms_t);

/* Elements at .. at+n-1, n at most a strip, under part of the bias. */
INLINE void C(point)(const pointwise_forward_args *args, const bits_t *bits, C(rooms_t) * rooms, const C(t) * bias,
                     uint64_t at, uint64_t n, C(v) a, int stream) {
    const int type = args->dtype, residual_type = args->residual_dtype;
    const C(t) *h = C(view)(type, args->x, at, n, rooms->x);
    const C(t) *multiplier = C(view)(type, args->multiplier, at, n, rooms->multiplier);
    const C(t) *residual = C(view)(residual_type, args->residual, at, n, rooms->residual);
    C(t) *y = C(place)(residual_type, args->y, at, rooms->y, 0);
    uint32_t alive[STRIP_CELLS / 32];
    int activation = args->activation;
    if (multiplier) {
        if (activation == FD_RELU)
            C(drop)(h, bias, NULL, rooms->x, bits, at, n, C(set1)(1), FD_RELU, alive, 0);
        else
            C(activate)(h, bias, rooms->x, n, activation);
        C(times)(rooms->x, multiplier, rooms->x, n);
        h = rooms->x;
        bias = NULL;
        activation = FD_NO_ACTIVATION;
    }
    if (residual && activation != FD_NO_ACTIVATION) {
        C(drop)(h, bias, NULL, rooms->x, bits, at, n, a, activation, alive, 0);
        C(add)(rooms->x, residual, y, n);
    } else {
        C(drop)(h, bias, residual, y, bits, at, n, a, activation, alive, stream && y != rooms->y);
    }
    C(deliver)(residual_type, args->y, at, n, y, stream);
    if (args->signs) copy_bits(args->signs, at, alive, 0, n);
}

static void C(pointwise_forward)(const pointwise_forward_args *args, uint64_t begin, uint64_t end) {
    const C(v) a = C(set1)(args->a);
    drawing_t drawing;
    C(columns_t) bias;
    C(rooms_t) rooms;
    drawing_open(&drawing, args->words, args->rows * args->columns, args->draw, begin, end);
    C(columns_open)(&bias, args->input_bias, args->columns, begin);
    for (uint64_t at = begin, n; at < end; at += n) {
        uint64_t lead = args->stream ? C(to_line)(args->residual_dtype, args->y, at) : 0;
        n = min_u64(end - at, strip_after(lead));
        const C(t) *part = C(columns_next)(&bias, &n);
        draw_until(&drawing, at + n);
        C(point)(args, &drawing.bits, &rooms, part, at, n, a, args->stream && !lead);
    }
    if (args->stream) stream_fence();
}

/* Adds a strip's rows to sums over columns; it begins at a column and wraps around at the last. */
static void C(add_to_columns)(const C(t) * g, C(t) * sums, uint64_t columns, uint64_t column, uint64_t n) {
    for (uint64_t i = 0, step; i < n; i += step, column = 0) {
        step = min_u64(n - i, columns - column);
        C(add)(g + i, sums + column, sums + column, step);
    }
}

static void C(backward_cells)(const pointwise_backward_args *args, uint64_t begin, uint64_t end, C(t) * sums) {
    const bits_t bits = {args->words, args->rows * args->columns};
    const int type = args->dtype, residual_type = args->residual_dtype;
    const C(v) a = C(set1)(args->a);
    C(columns_t) biases;
    C(t)
    room_g[STRIP_CELLS], room_h[STRIP_CELLS], room_multiplier[STRIP_CELLS], room_dx[STRIP_CELLS], other[STRIP_CELLS];
    C(columns_open)(&biases, args->input_bias, args->columns, begin);
    for (uint64_t at = begin, n; at < end; at += n) {
        n = min_u64(end - at, STRIP_CELLS);
        const C(t) *bias = C(columns_next)(&biases, &n);
        const C(t) *g = C(view)(residual_type, args->dy, at, n, room_g), *h = C(view)(type, args->x, at, n, room_h);
        const C(t) *multiplier = C(view)(type, args->multiplier, at, n, room_multiplier);
        if (h && bias) {
            C(add)(h, bias, room_h, n);
            h = room_h;
        }
        if (args->dmultiplier) {
            C(activate)(h, NULL, other, n, args->activation);
            C(times)(g, other, other, n);
        }
        if (args->activation != FD_NO_ACTIVATION) {
            C(activate_back)(g, h, room_g, n, args->activation);
            g = room_g;
        }
        if (multiplier) {
            C(times)(g, multiplier, room_g, n);
            g = room_g;
        }
        C(t) *dx = C(place)(type, args->dx, at, room_dx, args->stream);
        C(mask_strip)(g, dx, &bits, at, n, a, 0);
        C(deliver)(type, args->dx, at, n, dx, args->stream);
        if (sums) C(add_to_columns)(dx, sums, args->columns, at % args->columns, n);
        if (args->dmultiplier) { /* last: it may lie over multiplier */
            C(mask_strip)(other, other, &bits, at, n, a, 0);
            C(deliver)(type, args->dmultiplier, at, n, other, args->stream);
        }
    }
    if (args->stream) stream_fence();
}

/* Over cells or, with sums, over panels. */
static void C(pointwise_backward)(const pointwise_backward_args *args, uint64_t begin, uint64_t end) {
    if (!args->sums) {
        C(backward_cells)(args, begin, end, NULL);
        return;
    }
    for (uint64_t panel = begin; panel < end; panel++) {
        C(t) *sums = (C(t) *)args->sums + panel * args->columns;
        memset(sums, 0, args->columns * sizeof *sums);
        C(backward_cells)(args, panel_row(args->rows, args->panels, panel) * args->columns,
                          panel_row(args->rows, args->panels, panel + 1) * args->columns, sums);
    }
}

/* ---- norms ---- */

/* The sum of a strip, or of the squares of its distances from a centre. */
static double C(strip_sum)(const C(t) * x, uint64_t n, C(t) centre, int squares) {
    const C(v) c = C(set1)(centre);
    C(v) sums[4] = {C(set1)(0), C(set1)(0), C(set1)(0), C(set1)(0)};
    uint64_t i = 0;
    if (squares) {
        for (; i + 4 * C(lanes) <= n; i += 4 * C(lanes)) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                C(v) v = C(load)(x + i + k * C(lanes)) - c;
                sums[k] = C(fma)(v, v, sums[k]);
            }
        }
    } else {
        for (; i + 4 * C(lanes) <= n; i += 4 * C(lanes)) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) sums[k] = sums[k] + C(load)(x + i + k * C(lanes));
        }
    }
    for (uint64_t left; i < n; i += C(lanes)) {
        left = min_u64(n - i, C(lanes));
        C(v) v = C(few)(x + i, left);
        if (squares) {
            v = C(scale)(C(mask)(low_bits((unsigned)left), 0), v - c, C(set1)(1));
            v = v * v;
        }
        sums[0] = sums[0] + v;
    }
    return C(total)((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/* y = (x - mean) rstd weight + shift. */
static void C(normalise)(const C(t) * x, C(t) * y, const C(t) * weight, const C(t) * shift, uint64_t n, C(t) mean,
                         C(t) rstd, int stream) {
    const C(v) centre = C(set1)(mean), scale = C(set1)(rstd);
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        C(v) v = (C(few)(x + i, left) - centre) * scale;                                                               \
        if (weight) v = v * C(few)(weight + i, left);                                                                  \
        if (shift) v = v + C(few)(shift + i, left);                                                                    \
        if (stream)                                                                                                    \
            C(put)(y + i, v, left, 1);                                                                                 \
        else                                                                                                           \
            C(put)(y + i, v, left, 0);                                                                                 \
    }
    FOR_LANES(n, BODY);
#undef BODY
}

/* Elements of a row that a kernel keeps beside it from one look to the next; a longer row is read again, by strips. */
enum { C(row_cells) = 4096 };

static void C(norm_forward)(const norm_forward_args *args, uint64_t begin, uint64_t end) {
    const int type = args->dtype, residual_type = args->residual_dtype, narrow = C(size)(residual_type) < sizeof(C(t));
    const uint64_t columns = args->columns;
    const int fits = columns <= C(row_cells), stream = args->stream && fits;
    const C(v) a = C(set1)(args->a);
    C(t) *statistics = args->statistics;
    C(t) room[C(row_cells)], x[STRIP_CELLS], residual[STRIP_CELLS], other[STRIP_CELLS];
    drawing_t drawing;
    drawing_open(&drawing, args->words, args->rows * columns, args->draw, begin * columns, end * columns);
    for (uint64_t r = begin; r < end; r++) {
        const uint64_t first = r * columns;
        C(t) *row = fits && (stream || narrow) ? room
                    : narrow                   ? NULL
                                               : (C(t) *)args->residual_out + first; /* NULL: by strips */
        double total = 0, squares = 0;
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j;
            n = min_u64(columns - j, STRIP_CELLS);
            const C(t) *h = C(view)(type, args->x, at, n, x), *bias = args->input_bias;
            C(t) *to = row ? row + j : other;
            draw_until(&drawing, at + n);
            C(drop)(h, bias ? bias + j : NULL, C(view)(residual_type, args->residual, at, n, residual), to,
                    &drawing.bits, at, n, a, FD_NO_ACTIVATION, NULL, 0);
            if (narrow) { /* statistics are those of what is stored */
                C(deliver)(residual_type, args->residual_out, at, n, to, 0);
                C(view)(residual_type, args->residual_out, at, n, to);
            }
            if (args->centred) total += C(strip_sum)(to, n, 0, 0);
        }
        if (stream && !narrow) C(deliver)(residual_type, args->residual_out, first, columns, row, 1);
        const C(t) mean = (C(t))(total / (double)columns);
        for (uint64_t j = 0, n; j < columns; j += n) {
            n = min_u64(columns - j, STRIP_CELLS);
            squares += C(strip_sum)(row ? row + j : C(view)(residual_type, args->residual_out, first + j, n, other), n,
                                    mean, 1);
        }
        const C(t) rstd = (C(t))(1 / sqrt(squares / (double)columns + args->eps));
        C(put_one)(statistics + 2 * r, mean);
        C(put_one)(statistics + 2 * r + 1, rstd);
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j, lead = stream ? C(to_line)(type, args->y, at) : 0;
            n = min_u64(columns - j, strip_after(lead));
            C(t) *y = C(place)(type, args->y, at, x, 0);
            C(normalise)(row ? row + j : C(view)(residual_type, args->residual_out, at, n, other), y,
                         args->weight ? (const C(t) *)args->weight + j : NULL,
                         args->norm_bias ? (const C(t) *)args->norm_bias + j : NULL, n, mean, rstd,
                         stream && !lead && y != x);
            C(deliver)(type, args->y, at, n, y, stream && !lead);
        }
    }
    if (stream) stream_fence();
}

/* A row's statistics as vectors, and the means over the row of its gradient and of that times the normed row. */
typedef struct {
    C(v) mean, rstd, of_g, of_gx;
} C(moments_t);

/* Adds up, for a strip, the gradient and its product with the normed row: over the row, and for weight and shift over
 * the columns. */
static void C(norm_look)(const C(t) * dy, const C(t) * x, const C(t) * weight, C(t) * of_weight, C(t) * of_shift,
                         uint64_t n, const C(moments_t) * m, double *of_g, double *of_gx) {
    C(v) g_sum = C(set1)(0), gx_sum = C(set1)(0);
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        AHEAD(dy + i, 0);                                                                                              \
        AHEAD(x + i, 0);                                                                                               \
        C(v) g = C(few)(dy + i, left), normal = (C(few)(x + i, left) - m->mean) * m->rstd;                             \
        if (left < C(lanes)) normal = C(scale)(C(mask)(low_bits((unsigned)(left)), 0), normal, C(set1)(1));            \
        if (of_weight) {                                                                                               \
            C(put)(of_weight + i, C(fma)(g, normal, C(few)(of_weight + i, left)), left, 0);                            \
            C(put)(of_shift + i, C(few)(of_shift + i, left) + g, left, 0);                                             \
        }                                                                                                              \
        if (weight) g = g * C(few)(weight + i, left);                                                                  \
        g_sum = g_sum + g;                                                                                             \
        gx_sum = C(fma)(g, normal, gx_sum);                                                                            \
    }
    FOR_LANES(n, BODY);
#undef BODY
    *of_g += C(total)(g_sum);
    *of_gx += C(total)(gx_sum);
}

/* The second look: the row's gradient. Meanwhile the next row is on its way: a quarter of the time. */
static void C(norm_slope)(const C(t) * dy, const C(t) * x, const C(t) * weight, const C(t) * dresidual_out, C(t) * to,
                          uint64_t n, const C(moments_t) * m, const void *next_dy, uint64_t dy_size, const void *next_x,
                          uint64_t x_size) {
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        prefetch((const char *)next_dy + i * dy_size, 0);                                                              \
        prefetch((const char *)next_x + i * x_size, 0);                                                                \
        C(v) g = C(few)(dy + i, left), normal = (C(few)(x + i, left) - m->mean) * m->rstd;                             \
        if (weight) g = g * C(few)(weight + i, left);                                                                  \
        g = (g - m->of_g - normal * m->of_gx) * m->rstd;                                                               \
        if (dresidual_out) g = g + C(few)(dresidual_out + i, left);                                                    \
        C(put)(to + i, g, left, 0);                                                                                    \
    }
    FOR_LANES(n, BODY);
#undef BODY
}

/* Rows begin .. end-1, and their part of the sums unless that is NULL. */
static void C(norm_back)(const norm_backward_args *args, uint64_t begin, uint64_t end, C(t) * sums) {
    const bits_t bits = {args->words, args->rows * args->columns};
    const int type = args->dtype, residual_type = args->residual_dtype;
    const uint64_t columns = args->columns, dy_size = C(size)(type), x_size = C(size)(residual_type);
    const C(t) *statistics = args->statistics;
    const C(v) a = C(set1)(args->a);
    C(t)
    room_dy[STRIP_CELLS], room_x[STRIP_CELLS], room_dresidual_out[STRIP_CELLS], slope[STRIP_CELLS],
        room_dx[STRIP_CELLS];
    for (uint64_t r = begin; r < end; r++) {
        double of_g = 0, of_gx = 0;
        C(moments_t) m;
        m.mean = C(set1)(C(one)(statistics + 2 * r));
        m.rstd = C(set1)(C(one)(statistics + 2 * r + 1));
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = r * columns + j;
            n = min_u64(columns - j, STRIP_CELLS);
            C(norm_look)(C(view)(type, args->dy, at, n, room_dy),
                         C(view)(residual_type, args->residual_out, at, n, room_x),
                         args->weight ? (const C(t) *)args->weight + j : NULL, sums ? sums + j : NULL,
                         sums ? sums + columns + j : NULL, n, &m, &of_g, &of_gx);
        }
        m.of_g = C(set1)(args->centred ? of_g / (double)columns : 0);
        m.of_gx = C(set1)(of_gx / (double)columns);
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = r * columns + j;
            n = min_u64(columns - j, STRIP_CELLS);
            C(t) *to = args->dresidual ? C(place)(residual_type, args->dresidual, at, slope, args->stream) : slope;
            C(norm_slope)(C(view)(type, args->dy, at, n, room_dy),
                          C(view)(residual_type, args->residual_out, at, n, room_x),
                          args->weight ? (const C(t) *)args->weight + j : NULL,
                          C(view)(residual_type, args->dresidual_out, at, n, room_dresidual_out), to, n, &m,
                          (const char *)args->dy + (at + columns) * dy_size, dy_size,
                          (const char *)args->residual_out + (at + columns) * x_size, x_size);
            if (args->dresidual) C(deliver)(residual_type, args->dresidual, at, n, to, args->stream);
            if (!args->dx && !sums) continue;
            C(t) *dx = args->dx ? C(place)(type, args->dx, at, room_dx, args->stream) : room_dx;
            C(mask_strip)(to, dx, &bits, at, n, a, 0);
            if (args->dx) C(deliver)(type, args->dx, at, n, dx, args->stream);
            if (sums) C(add)(dx, sums + 2 * columns + j, sums + 2 * columns + j, n);
        }
    }
    if (args->stream) stream_fence();
}

/* Over rows or, with sums, over panels. */
static void C(norm_backward)(const norm_backward_args *args, uint64_t begin, uint64_t end) {
    if (!args->sums) {
        C(norm_back)(args, begin, end, NULL);
        return;
    }
    for (uint64_t panel = begin; panel < end; panel++) {
        C(t) *sums = (C(t) *)args->sums + panel * 3 * args->columns;
        memset(sums, 0, 3 * args->columns * sizeof *sums);
        C(norm_back)(args, panel_row(args->rows, args->panels, panel), panel_row(args->rows, args->panels, panel + 1),
                     sums);
    }
}

/* ---- softmax ---- */

/* scale x + mask, and the largest of that and `most` in each lane. */
static C(v) C(scores)(const C(t) * x, const C(t) * mask, C(t) * to, uint64_t n, C(v) scale, C(v) most) {
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        AHEAD(x + i, 0);                                                                                               \
        C(v) v = C(few)(x + i, left) * scale;                                                                          \
        if (mask) v = v + C(few)(mask + i, left);                                                                      \
        C(put)(to + i, v, left, 0);                                                                                    \
        if (left < C(lanes)) v = C(select)(C(mask)(low_bits((unsigned)(left)), 0), v, most);                           \
        most = C(max)(most, v);                                                                                        \
    }
    FOR_LANES(n, BODY);
#undef BODY
    return most;
}

/* exp(x - top), and the sum of that. */
static double C(exponentials)(const C(t) * x, C(t) * to, uint64_t n, C(v) top) {
    C(vs) v, sum;
    C(t) room[C(bunch)];
    uint64_t i = 0;
    EACH sum.v[k] = C(set1)(0);
    for (; i + C(bunch) <= n; i += C(bunch)) {
        v = C(several)(x + i);
        EACH v.v[k] = v.v[k] - top;
        v = C(exp)(v);
        C(put_several)(to + i, v);
        EACH sum.v[k] = sum.v[k] + v.v[k];
    }
    if (i < n) {
        memcpy(room, x + i, (n - i) * sizeof *x);
        for (uint64_t j = n - i; j < C(bunch); j++) room[j] = -INFINITY;
        v = C(several)(room);
        EACH v.v[k] = v.v[k] - top;
        v = C(exp)(v);
        C(put_several)(room, v);
        memcpy(to + i, room, (n - i) * sizeof *x);
        EACH sum.v[k] = sum.v[k] + v.v[k];
    }
    for (int k = 1; k < ABREAST; k++) sum.v[0] = sum.v[0] + sum.v[k];
    return C(total)(sum.v[0]);
}

static void C(softmax_forward)(const softmax_forward_args *args, uint64_t begin, uint64_t end) {
    const int type = args->dtype;
    const uint64_t columns = args->columns;
    const int fits = columns <= C(row_cells);
    const C(v) a = C(set1)(args->a), scale = C(set1)(args->softmax_scale);
    C(t) row[C(row_cells)], x[STRIP_CELLS], room_p[STRIP_CELLS], room_y[STRIP_CELLS];
    drawing_t drawing;
    drawing_open(&drawing, args->words, args->rows * columns, args->draw, begin * columns, end * columns);
    for (uint64_t r = begin; r < end; r++) {
        const uint64_t first = r * columns, query = r % args->queries, head = r / args->queries % args->heads;
        const uint64_t outer = r / args->queries / args->heads,
                       keys = args->causal ? min_u64(columns, query + 1) : columns;
        const C(t) *mask = args->mask;
        if (mask) mask += outer * args->outer_stride + head * args->head_stride + query * args->query_stride;
        C(v) most = C(set1)(-INFINITY);
        for (uint64_t j = 0, n; j < keys; j += n) {
            n = min_u64(keys - j, STRIP_CELLS);
            const C(t) *part = C(view)(type, args->x, first + j, n, x);
            draw_until(&drawing, first + j + n);
            most = C(scores)(part, mask ? mask + j : NULL, fits ? row + j : x, n, scale, most);
        }
        C(t) lanes[C(lanes)], largest;
        C(store)(lanes, most);
        largest = lanes[0];
        for (int i = 1; i < C(lanes); i++) largest = lanes[i] > largest ? lanes[i] : largest;
        const C(v) top = C(set1)(largest == -INFINITY ? 0 : largest); /* -inf - -inf would be NaN */
        double total = 0;
        for (uint64_t j = 0, n; j < keys; j += n) {
            C(t) *to = fits ? row + j : x;
            n = min_u64(keys - j, STRIP_CELLS);
            if (!fits) C(scores)(C(view)(type, args->x, first + j, n, x), mask ? mask + j : NULL, to, n, scale, most);
            total += C(exponentials)(to, to, n, top);
        }
        const C(t) share = total == 0 ? 0 : (C(t))(1 / total); /* nothing left: 0 */
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j, lead = args->stream ? C(to_line)(type, args->y, at) : 0;
            n = min_u64((j < keys ? keys : columns) - j, strip_after(lead));
            C(t) *from = fits ? row + j : x, *p = room_p, *y = C(place)(type, args->y, at, room_y, 0);
            const int stream = args->stream && !lead;
            if (args->probabilities) p = C(place)(type, args->probabilities, at, room_p, 0);
            if (j >= keys || share == 0) {
                memset(p, 0, n * sizeof *p);
            } else {
                if (!fits) {
                    C(scores)(C(view)(type, args->x, at, n, x), mask ? mask + j : NULL, x, n, scale, most);
                    C(exponentials)(x, x, n, top);
                }
                const bits_t all = {NULL, 0};
                C(mask_strip)(from, p, &all, 0, n, C(set1)(share), 0);
            }
            if (j >= keys) draw_until(&drawing, at + n);
            C(mask_strip)(p, y, &drawing.bits, at, n, a, stream && y != room_y);
            if (args->probabilities) C(deliver)(type, args->probabilities, at, n, p, 0);
            C(deliver)(type, args->y, at, n, y, stream && y == room_y);
        }
    }
    if (args->stream) stream_fence();
}

static double C(dot)(const C(t) * x, const C(t) * y, uint64_t n) {
    C(v) sum = C(set1)(0);
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        AHEAD(y + i, 0);                                                                                               \
        sum = C(fma)(C(few)(x + i, left), C(few)(y + i, left), sum);                                                   \
    }
    FOR_LANES(n, BODY);
#undef BODY
    return C(total)(sum);
}

/* to = scale p (g - dot). */
static void C(softmax_slope)(const C(t) * g, const C(t) * p, C(t) * to, uint64_t n, C(v) dot, C(v) scale) {
#define BODY(left) C(put)(to + i, (C(few)(g + i, left) - dot) * C(few)(p + i, left) * scale, left, 0);
    FOR_LANES(n, BODY);
#undef BODY
}

static void C(softmax_backward)(const softmax_backward_args *args, uint64_t begin, uint64_t end) {
    const bits_t bits = {args->words, args->rows * args->columns};
    const int type = args->dtype;
    const uint64_t columns = args->columns;
    const int fits = columns <= C(row_cells);
    const C(v) a = C(set1)(args->a), scale = C(set1)(args->softmax_scale);
    C(t) row[C(row_cells)], room_g[STRIP_CELLS], room_p[STRIP_CELLS], other[STRIP_CELLS], dropped[STRIP_CELLS];
    for (uint64_t r = begin; r < end; r++) {
        const uint64_t first = r * columns;
        double dot = 0;
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j;
            n = min_u64(columns - j, STRIP_CELLS);
            C(t) *g = fits ? row + j : room_g;
            C(mask_strip)(C(view)(type, args->dy, at, n, room_g), g, &bits, at, n, a, 0);
            dot += C(dot)(g, C(view)(type, args->probabilities, at, n, room_p), n);
        }
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j;
            n = min_u64(columns - j, STRIP_CELLS);
            C(t) *g = fits ? row + j : room_g;
            if (!fits) C(mask_strip)(C(view)(type, args->dy, at, n, room_g), g, &bits, at, n, a, 0);
            const C(t) *p = C(view)(type, args->probabilities, at, n, room_p);
            C(t) *dx = C(place)(type, args->dx, at, other, args->y || args->stream);
            C(softmax_slope)(g, p, dx, n, C(set1)(dot), scale);
            if (args->y) { /* before dx is written: that may lie over the probabilities */
                C(t) *y = C(place)(type, args->y, at, dropped, args->stream);
                C(mask_strip)(p, y, &bits, at, n, a, 0);
                C(deliver)(type, args->y, at, n, y, args->stream);
            }
            C(deliver)(type, args->dx, at, n, dx, args->stream);
        }
    }
    if (args->stream) stream_fence();
}

#undef FOR_LANES
#undef C
#undef PASTE
#undef PASTE_
#undef CTYPE

/* The fused kernels: included by kernels.inc.h for float32 and for float64, CTYPE, in which a kernel computes.
 *
 * Data goes through a kernel's stages (bias, activation, bits, residual) a strip at a time, each stage a loop over
 * numbers of CTYPE in the nearest cache. What is stored as CTYPE is read and written where it lies; what is stored in
 * 16 bits passes through a strip's room. So a stage exists once, and storage types, activations and ops need not be
 * multiplied with one another. Norms and softmax go over a row again while it is in the cache.
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

static void C(times)(const C(t) * x, const C(t) * factor, C(t) * to, uint64_t n) {
#define BODY(left) C(put)(to + i, C(few)(x + i, left) * C(few)(factor + i, left), left, 0);
    FOR_LANES(n, BODY);
#undef BODY
}

INLINE C(v) C(gate)(C(v) h) { return C(set1)(1) / (C(set1)(1) + C(exp)(C(set1)(0) - h)); }
/* The probability of a standard normal number to be below h. */
INLINE C(v) C(below)(C(v) h) { return C(fma)(C(set1)(0.5), C(erf)(h * C(set1)(0.70710678118654752)), C(set1)(0.5)); }
INLINE C(v) C(tanh_of_cubic)(C(v) h) {
    const C(v) scale = C(set1)(0.79788456080286536);
    return C(tanh)(h * C(fma)(scale * C(set1)(0.044715) * h, h, scale));
}
INLINE C(v) C(same)(C(v) h) { return h; }
INLINE C(v) C(relu)(C(v) h) { return C(select)(C(not_above)(h, C(set1)(0)), C(set1)(0), h); }
INLINE C(v) C(gelu)(C(v) h) { return h * C(below)(h); }
INLINE C(v) C(gelu_tanh)(C(v) h) { return C(set1)(0.5) * h * (C(set1)(1) + C(tanh_of_cubic)(h)); }
INLINE C(v) C(silu)(C(v) h) { return h * C(gate)(h); }

static void C(activate)(const C(t) * x, C(t) * to, uint64_t n, int activation) {
#define CURVED(curve)                                                                                                  \
    for (uint64_t i = 0; i < n; i += C(lanes)) {                                                                       \
        AHEAD(x + i, 0);                                                                                               \
        C(put)(to + i, curve(C(few)(x + i, n - i)), n - i, 0);                                                         \
    }                                                                                                                  \
    break;
    switch (activation) {
    case FD_RELU: CURVED(C(relu))
    case FD_GELU: CURVED(C(gelu))
    case FD_GELU_TANH: CURVED(C(gelu_tanh))
    case FD_SILU: CURVED(C(silu))
    default: CURVED(C(same))
    }
#undef CURVED
}

INLINE C(v) C(gelu_slope)(C(v) h) {
    C(v) density = C(set1)(0.39894228040143268) * C(exp)(C(set1)(-0.5) * h * h);
    return C(fma)(h, density, C(below)(h));
}
INLINE C(v) C(gelu_tanh_slope)(C(v) h) {
    const C(v) one = C(set1)(1), scale = C(set1)(0.79788456080286536);
    C(v) t = C(tanh_of_cubic)(h), inner = C(fma)(scale * C(set1)(3 * 0.044715) * h, h, scale);
    return C(set1)(0.5) * C(fma)(h * (one - t * t), inner, one + t);
}
INLINE C(v) C(silu_slope)(C(v) h) {
    const C(v) one = C(set1)(1);
    C(v) gate = C(gate)(h);
    return gate * C(fma)(h, one - gate, one);
}

INLINE C(v) C(relu_slope)(C(v) h) { return C(select)(C(not_above)(h, C(set1)(0)), C(set1)(0), C(set1)(1)); }

/* g times the activation's derivative at h. */
static void C(activate_back)(const C(t) * g, const C(t) * h, C(t) * to, uint64_t n, int activation) {
#define CURVED(slope)                                                                                                  \
    for (uint64_t i = 0; i < n; i += C(lanes)) {                                                                       \
        AHEAD(g + i, 0);                                                                                               \
        AHEAD(h + i, 0);                                                                                               \
        C(put)(to + i, C(few)(g + i, n - i) * slope(C(few)(h + i, n - i)), n - i, 0);                                  \
    }                                                                                                                  \
    break;
    switch (activation) {
    case FD_RELU: CURVED(C(relu_slope))
    case FD_GELU: CURVED(C(gelu_slope))
    case FD_GELU_TANH: CURVED(C(gelu_tanh_slope))
    default: CURVED(C(silu_slope))
    }
#undef CURVED
}

/* The bits of a strip's elements that are kept and that relu leaves as they are. */
static void C(sign_bits)(const C(t) * h, const bits_t *bits, uint64_t position, uint64_t n, uint32_t *alive) {
    for (uint64_t i = 0, step; i < n; i += step) {
        uint32_t above = 0;
        step = min_u64(n - i, RUN);
#pragma GCC unroll 4
        for (unsigned k = 0; k < RUN; k += C(lanes)) {
            if (k >= step) break;
            above |= (~C(bits)(C(not_above)(C(few)(h + i + k, step - k), C(set1)(0))) & low_bits(C(lanes))) << k;
        }
        *alive++ = above & run_at(bits, position + i, (unsigned)step);
    }
}

/* y = residual + (bit ? a h : 0). */
INLINE void C(drop_as)(const C(t) * h, const C(t) * residual, C(t) * y, const bits_t *bits, uint64_t position,
                       uint64_t n, C(v) a, const int adds, const int stream) {
    uint64_t i = 0;
    for (; i + RUN <= n; i += RUN) {
        uint32_t run = run_at(bits, position + i, RUN);
        for (unsigned byte = 0; byte < RUN * sizeof *h; byte += LINE_BYTES) {
            AHEAD((const char *)(h + i) + byte, stream);
            if (adds) AHEAD((const char *)(residual + i) + byte, stream);
        }
#pragma GCC unroll 4
        for (unsigned k = 0; k < RUN; k += C(lanes)) {
            C(v) v = C(scale)(C(mask)(run, (int)k), C(load)(h + i + k), a);
            if (adds) v = v + C(load)(residual + i + k);
            C(put)(y + i + k, v, C(lanes), stream);
        }
    }
    for (unsigned step; i < n; i += step) {
        step = (unsigned)min_u64(n - i, C(lanes));
        C(v) v = C(scale)(C(mask)(run_at(bits, position + i, step), 0), C(few)(h + i, step), a);
        if (adds) v = v + C(few)(residual + i, step);
        C(put)(y + i, v, step, 0);
    }
}

static void C(drop)(const C(t) * h, const C(t) * residual, C(t) * y, const bits_t *bits, uint64_t position, uint64_t n,
                    C(v) a, int stream) {
    if (residual && stream)
        C(drop_as)(h, residual, y, bits, position, n, a, 1, 1);
    else if (residual)
        C(drop_as)(h, residual, y, bits, position, n, a, 1, 0);
    else if (stream)
        C(drop_as)(h, NULL, y, bits, position, n, a, 0, 1);
    else
        C(drop_as)(h, NULL, y, bits, position, n, a, 0, 0);
}

/* ---- bias, activation, dropout, residual ---- */

/* A row of columns, repeated where it is short, so that a strip may begin at any column and go on past the end. */
typedef struct {
    const C(t) * row; /* NULL: none */
    uint64_t columns, reach;
    C(t) room[2 * STRIP_CELLS];
} C(columns_t);

static void C(columns_open)(C(columns_t) * c, const void *row, uint64_t columns) {
    c->row = row;
    c->columns = columns;
    c->reach = columns;
    if (!row || columns > STRIP_CELLS) return;
    c->reach = 2 * STRIP_CELLS;
    for (uint64_t i = 0; i < 2 * STRIP_CELLS; i++)
        memcpy(c->room + i, (const C(t) *)row + i % columns, sizeof *c->room);
    c->row = c->room;
}

/* Of elements from `at` on; *n of them at most, less where a long row ends. */
INLINE const C(t) * C(columns_at)(const C(columns_t) * c, uint64_t at, uint64_t *n) {
    if (!c->row) return NULL;
    *n = min_u64(*n, c->reach - at % c->columns);
    return c->row + at % c->columns;
}

typedef struct {
    C(t) x[STRIP_CELLS], factor[STRIP_CELLS], residual[STRIP_CELLS], y[STRIP_CELLS];
} C(rooms_t);

/* Elements at .. at+n-1, n at most a strip, under part of the bias. */
INLINE void C(point)(const pointwise_forward_args *args, const bits_t *bits, C(rooms_t) * rooms, const C(t) * bias,
                     uint64_t at, uint64_t n, C(v) a, int stream) {
    const int type = args->dtype, sum_type = args->sum_dtype;
    const C(t) *h = C(view)(type, args->x, at, n, rooms->x);
    const C(t) *factor = C(view)(type, args->factor, at, n, rooms->factor);
    const C(t) *residual = C(view)(sum_type, args->residual, at, n, rooms->residual);
    uint32_t alive[STRIP_CELLS / 32 + SLACK_WORDS];
    const bits_t above = {alive, n + SLACK_CELLS};
    uint64_t position = at;
    if (bias) {
        C(add)(h, bias, rooms->x, n);
        h = rooms->x;
    }
    if (args->activation == FD_RELU) { /* what it makes 0 is dropped as well */
        C(sign_bits)(h, bits, at, n, alive);
        if (args->signs) copy_bits(args->signs, at, alive, 0, n);
        bits = &above;
        position = 0;
    } else if (args->activation != FD_NO_ACTIVATION) {
        C(activate)(h, rooms->x, n, args->activation);
        h = rooms->x;
    }
    if (factor) {
        C(times)(h, factor, rooms->x, n);
        h = rooms->x;
    }
    C(t) *y = C(place)(sum_type, args->y, at, rooms->y, 0);
    C(drop)(h, residual, y, bits, position, n, a, stream && y != rooms->y);
    C(deliver)(sum_type, args->y, at, n, y, stream);
}

static void C(pointwise_forward)(const pointwise_forward_args *args, uint64_t begin, uint64_t end) {
    const bits_t bits = {args->words, args->rows * args->columns};
    const C(v) a = C(set1)(args->a);
    C(columns_t) bias;
    C(rooms_t) rooms;
    C(columns_open)(&bias, args->bias, args->columns);
    for (uint64_t at = begin, n; at < end; at += n) {
        uint64_t lead = args->stream ? C(to_line)(args->sum_dtype, args->y, at) : 0;
        n = min_u64(end - at, strip_after(lead));
        const C(t) *part = C(columns_at)(&bias, at, &n);
        C(point)(args, &bits, &rooms, part, at, n, a, args->stream && !lead);
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
    const int type = args->dtype, sum_type = args->sum_dtype;
    const C(v) a = C(set1)(args->a);
    C(columns_t) biases;
    C(t) room_g[STRIP_CELLS], room_h[STRIP_CELLS], room_factor[STRIP_CELLS], room_dx[STRIP_CELLS], other[STRIP_CELLS];
    C(columns_open)(&biases, args->bias, args->columns);
    for (uint64_t at = begin, n; at < end; at += n) {
        n = min_u64(end - at, STRIP_CELLS);
        const C(t) *bias = C(columns_at)(&biases, at, &n);
        const C(t) *g = C(view)(sum_type, args->dy, at, n, room_g), *h = C(view)(type, args->x, at, n, room_h);
        const C(t) *factor = C(view)(type, args->factor, at, n, room_factor);
        if (h && bias) {
            C(add)(h, bias, room_h, n);
            h = room_h;
        }
        if (args->dfactor) {
            C(activate)(h, other, n, args->activation);
            C(times)(g, other, other, n);
        }
        if (args->activation != FD_NO_ACTIVATION) {
            C(activate_back)(g, h, room_g, n, args->activation);
            g = room_g;
        }
        if (factor) {
            C(times)(g, factor, room_g, n);
            g = room_g;
        }
        C(t) *dx = C(place)(type, args->dx, at, room_dx, args->stream);
        C(drop)(g, NULL, dx, &bits, at, n, a, 0);
        C(deliver)(type, args->dx, at, n, dx, args->stream);
        if (sums) C(add_to_columns)(dx, sums, args->columns, at % args->columns, n);
        if (args->dfactor) { /* last: it may lie over factor */
            C(drop)(other, NULL, other, &bits, at, n, a, 0);
            C(deliver)(type, args->dfactor, at, n, other, args->stream);
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

/* What a row is while a kernel goes over it again: numbers as they were stored, in the row's own room if they fit. */
enum { C(row_cells) = 4096 };

static void C(norm_forward)(const norm_forward_args *args, uint64_t begin, uint64_t end) {
    const bits_t bits = {args->words, args->rows * args->columns};
    const int type = args->dtype, sum_type = args->sum_dtype, narrow = C(size)(sum_type) < sizeof(C(t));
    const uint64_t columns = args->columns;
    const int fits = columns <= C(row_cells), stream = args->stream && fits;
    const C(v) a = C(set1)(args->a);
    C(t) *statistics = args->statistics;
    C(t) room[C(row_cells)], x[STRIP_CELLS], residual[STRIP_CELLS], other[STRIP_CELLS];
    for (uint64_t r = begin; r < end; r++) {
        const uint64_t first = r * columns;
        C(t) *row = fits && (stream || narrow) ? room : narrow ? NULL : (C(t) *)args->sum + first; /* NULL: by strips */
        double total = 0, squares = 0;
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j;
            n = min_u64(columns - j, STRIP_CELLS);
            const C(t) *h = C(view)(type, args->x, at, n, x);
            if (args->bias) {
                C(add)(h, (const C(t) *)args->bias + j, x, n);
                h = x;
            }
            C(t) *to = row ? row + j : other;
            C(drop)(h, C(view)(sum_type, args->residual, at, n, residual), to, &bits, at, n, a, 0);
            if (narrow) { /* statistics are those of what is stored */
                C(deliver)(sum_type, args->sum, at, n, to, 0);
                C(view)(sum_type, args->sum, at, n, to);
            }
            if (args->centred) total += C(strip_sum)(to, n, 0, 0);
        }
        if (stream && !narrow) C(deliver)(sum_type, args->sum, first, columns, row, 1);
        const C(t) mean = (C(t))(total / (double)columns);
        for (uint64_t j = 0, n; j < columns; j += n) {
            n = min_u64(columns - j, STRIP_CELLS);
            squares += C(strip_sum)(row ? row + j : C(view)(sum_type, args->sum, first + j, n, other), n, mean, 1);
        }
        const C(t) rstd = (C(t))(1 / sqrt(squares / (double)columns + args->eps));
        C(put_one)(statistics + 2 * r, mean);
        C(put_one)(statistics + 2 * r + 1, rstd);
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j, lead = stream ? C(to_line)(type, args->y, at) : 0;
            n = min_u64(columns - j, strip_after(lead));
            C(t) *y = C(place)(type, args->y, at, x, 0);
            C(normalise)(row ? row + j : C(view)(sum_type, args->sum, at, n, other), y,
                         args->weight ? (const C(t) *)args->weight + j : NULL,
                         args->shift ? (const C(t) *)args->shift + j : NULL, n, mean, rstd, stream && !lead && y != x);
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
static void C(norm_slope)(const C(t) * dy, const C(t) * x, const C(t) * weight, const C(t) * dsum, C(t) * to,
                          uint64_t n, const C(moments_t) * m, const char *next_dy, const char *next_x) {
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        prefetch(next_dy + i * sizeof *dy, 0);                                                                         \
        prefetch(next_x + i * sizeof *x, 0);                                                                           \
        C(v) g = C(few)(dy + i, left), normal = (C(few)(x + i, left) - m->mean) * m->rstd;                             \
        if (weight) g = g * C(few)(weight + i, left);                                                                  \
        g = (g - m->of_g - normal * m->of_gx) * m->rstd;                                                               \
        if (dsum) g = g + C(few)(dsum + i, left);                                                                      \
        C(put)(to + i, g, left, 0);                                                                                    \
    }
    FOR_LANES(n, BODY);
#undef BODY
}

static void C(norm_backward)(const norm_backward_args *args, uint64_t begin, uint64_t end) {
    const bits_t bits = {args->words, args->rows * args->columns};
    const int type = args->dtype, sum_type = args->sum_dtype;
    const uint64_t columns = args->columns;
    const C(t) *statistics = args->statistics;
    const C(v) a = C(set1)(args->a);
    C(t) room_dy[STRIP_CELLS], room_x[STRIP_CELLS], room_dsum[STRIP_CELLS], slope[STRIP_CELLS], room_dx[STRIP_CELLS];
    for (uint64_t panel = begin; panel < end; panel++) {
        C(t) *sums = args->sums ? (C(t) *)args->sums + panel * 3 * columns : NULL;
        if (sums) memset(sums, 0, 3 * columns * sizeof *sums);
        const uint64_t stop = panel_row(args->rows, args->panels, panel + 1);
        for (uint64_t r = panel_row(args->rows, args->panels, panel); r < stop; r++) {
            double of_g = 0, of_gx = 0;
            C(moments_t) m;
            m.mean = C(set1)(C(one)(statistics + 2 * r));
            m.rstd = C(set1)(C(one)(statistics + 2 * r + 1));
            for (uint64_t j = 0, n; j < columns; j += n) {
                const uint64_t at = r * columns + j;
                n = min_u64(columns - j, STRIP_CELLS);
                C(norm_look)(C(view)(type, args->dy, at, n, room_dy), C(view)(sum_type, args->sum, at, n, room_x),
                             args->weight ? (const C(t) *)args->weight + j : NULL, sums ? sums + j : NULL,
                             sums ? sums + columns + j : NULL, n, &m, &of_g, &of_gx);
            }
            m.of_g = C(set1)(args->centred ? of_g / (double)columns : 0);
            m.of_gx = C(set1)(of_gx / (double)columns);
            for (uint64_t j = 0, n; j < columns; j += n) {
                const uint64_t at = r * columns + j;
                n = min_u64(columns - j, STRIP_CELLS);
                C(t) *to = args->dresidual ? C(place)(sum_type, args->dresidual, at, slope, args->stream) : slope;
                C(norm_slope)(C(view)(type, args->dy, at, n, room_dy), C(view)(sum_type, args->sum, at, n, room_x),
                              args->weight ? (const C(t) *)args->weight + j : NULL,
                              C(view)(sum_type, args->dsum, at, n, room_dsum), to, n, &m,
                              (const char *)args->dy + (at + columns) * C(size)(type),
                              (const char *)args->sum + (at + columns) * C(size)(sum_type));
                if (args->dresidual) C(deliver)(sum_type, args->dresidual, at, n, to, args->stream);
                if (!args->dx && !sums) continue;
                C(t) *dx = args->dx ? C(place)(type, args->dx, at, room_dx, args->stream) : room_dx;
                C(drop)(to, NULL, dx, &bits, at, n, a, 0);
                if (args->dx) C(deliver)(type, args->dx, at, n, dx, args->stream);
                if (sums) C(add)(dx, sums + 2 * columns + j, sums + 2 * columns + j, n);
            }
        }
    }
    if (args->stream) stream_fence();
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
    C(v) sum = C(set1)(0);
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        C(v) v = C(exp)(C(few)(x + i, left) - top);                                                                    \
        C(put)(to + i, v, left, 0);                                                                                    \
        if (left < C(lanes)) v = C(scale)(C(mask)(low_bits((unsigned)(left)), 0), v, C(set1)(1));                      \
        sum = sum + v;                                                                                                 \
    }
    FOR_LANES(n, BODY);
#undef BODY
    return C(total)(sum);
}

static void C(softmax_forward)(const softmax_forward_args *args, uint64_t begin, uint64_t end) {
    const bits_t bits = {args->words, args->rows * args->columns};
    const int type = args->dtype;
    const uint64_t columns = args->columns;
    const int fits = columns <= C(row_cells);
    const C(v) a = C(set1)(args->a), scale = C(set1)(args->scale);
    C(t) row[C(row_cells)], x[STRIP_CELLS], room_p[STRIP_CELLS], room_y[STRIP_CELLS];
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
                C(drop)(from, NULL, p, &all, 0, n, C(set1)(share), 0);
            }
            C(drop)(p, NULL, y, &bits, at, n, a, stream && y != room_y);
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
    const C(v) a = C(set1)(args->a), scale = C(set1)(args->scale);
    C(t) row[C(row_cells)], room_g[STRIP_CELLS], room_p[STRIP_CELLS], other[STRIP_CELLS], dropped[STRIP_CELLS];
    for (uint64_t r = begin; r < end; r++) {
        const uint64_t first = r * columns;
        double dot = 0;
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j;
            n = min_u64(columns - j, STRIP_CELLS);
            C(t) *g = fits ? row + j : room_g;
            C(drop)(C(view)(type, args->dy, at, n, room_g), NULL, g, &bits, at, n, a, 0);
            dot += C(dot)(g, C(view)(type, args->probabilities, at, n, room_p), n);
        }
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j;
            n = min_u64(columns - j, STRIP_CELLS);
            C(t) *g = fits ? row + j : room_g;
            if (!fits) C(drop)(C(view)(type, args->dy, at, n, room_g), NULL, g, &bits, at, n, a, 0);
            const C(t) *p = C(view)(type, args->probabilities, at, n, room_p);
            C(t) *dx = C(place)(type, args->dx, at, other, args->y || args->stream);
            C(softmax_slope)(g, p, dx, n, C(set1)(dot), scale);
            if (args->y) { /* before dx is written: that may lie over the probabilities */
                C(t) *y = C(place)(type, args->y, at, dropped, args->stream);
                C(drop)(p, NULL, y, &bits, at, n, a, 0);
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

/* norm_forward and norm_backward: bias, dropout and residual, then layer norm or, if not centred, RMS norm.
 * Included by fused.inc.h for each type that is computed in.
 *
 * Forward goes over a row three times: residual_out and its sum; the squares of the distances from the mean; y.
 * Backward goes over it twice: the sums that the gradient needs; the gradient. Meanwhile the row stays in a near cache.
 */

/* The sum of a strip or, if squares, of the squares of its distances from a centre. */
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
        C(v) v = C(load_partial)(x + i, left);
        if (squares) {
            v = C(scale)(C(mask)(low_bits((unsigned)left), 0), v - c, C(set1)(1));
            v = v * v;
        }
        sums[0] = sums[0] + v;
    }
    return C(sum_lanes)((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/* y = (x - mean) rstd weight + norm_bias; weight and norm_bias may be NULL. has_both and stream are constants. */
INLINE void C(normalise_as)(const C(t) * x, C(t) * y, const C(t) * weight, const C(t) * norm_bias, uint64_t n,
                            const C(v) centre, const C(v) scale, const int has_both, const int stream) {
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        C(v) v = (C(load_partial)(x + i, left) - centre) * scale;                                                      \
        if (has_both || weight) v = v * C(load_partial)(weight + i, left);                                             \
        if (has_both || norm_bias) v = v + C(load_partial)(norm_bias + i, left);                                       \
        C(store_partial)(y + i, v, left, stream);                                                                      \
    }
    FOR_VECTORS(n, BODY);
#undef BODY
}

static void C(normalise)(const C(t) * x, C(t) * y, const C(t) * weight, const C(t) * norm_bias, uint64_t n, C(t) mean,
                         C(t) rstd, int stream) {
    const C(v) centre = C(set1)(mean), scale = C(set1)(rstd);
    const int has_both = weight && norm_bias;
    if (has_both && stream)
        C(normalise_as)(x, y, weight, norm_bias, n, centre, scale, 1, 1);
    else if (has_both)
        C(normalise_as)(x, y, weight, norm_bias, n, centre, scale, 1, 0);
    else if (stream)
        C(normalise_as)(x, y, weight, norm_bias, n, centre, scale, 0, 1);
    else
        C(normalise_as)(x, y, weight, norm_bias, n, centre, scale, 0, 0);
}

static void C(norm_forward)(const norm_forward_args *args, uint64_t begin, uint64_t end) {
    const int type = args->dtype, sum_type = args->residual_dtype, narrow = C(size)(sum_type) < sizeof(C(t));
    const uint64_t columns = args->columns;
    const int fits = columns <= ROW_CELLS, stream = args->stream && fits;
    C(t) *statistics = args->statistics;
    C(t) row_scratch[ROW_CELLS], x[STRIP_CELLS], residual[STRIP_CELLS], strip[STRIP_CELLS];
    drawing_t drawing;
    drawing_open(&drawing, args->words, args->rows * columns, args->draw, begin * columns, end * columns);
    for (uint64_t r = begin; r < end; r++) {
        const uint64_t first = r * columns;
        C(t) *row = (C(t) *)args->residual_out + first; /* the row as numbers of C(t); NULL: read again by strips */
        if (narrow || stream) row = fits ? row_scratch : NULL;
        double total = 0, squares = 0;
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j;
            n = min_u64(columns - j, STRIP_CELLS);
            C(t) *to = row ? row + j : strip;
            draw_until(&drawing, at + n);
            C(drop)(&(C(drop_t)){.x = C(load_strip)(type, args->x, at, n, x),
                                 .bias = C(from_column)(args->input_bias, j),
                                 .residual = C(load_strip)(sum_type, args->residual, at, n, residual),
                                 .y = to,
                                 .bits = &drawing.bits,
                                 .position = at,
                                 .n = n,
                                 .a = (C(t))args->a});
            if (narrow) { /* the statistics are those of the rounded numbers */
                C(store_strip)(sum_type, args->residual_out, at, n, to, 0);
                C(load_strip)(sum_type, args->residual_out, at, n, to);
            }
            if (args->centred) total += C(strip_sum)(to, n, 0, 0);
        }
        if (stream && !narrow) C(store_strip)(sum_type, args->residual_out, first, columns, row, 1);
        const C(t) mean = (C(t))(total / (double)columns);
        for (uint64_t j = 0, n; j < columns; j += n) {
            n = min_u64(columns - j, STRIP_CELLS);
            const C(t) *h = row ? row + j : C(load_strip)(sum_type, args->residual_out, first + j, n, strip);
            squares += C(strip_sum)(h, n, mean, 1);
        }
        const C(t) rstd = (C(t))(1 / sqrt(squares / (double)columns + args->eps));
        C(store_one)(statistics + 2 * r, mean);
        C(store_one)(statistics + 2 * r + 1, rstd);
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j, lead = stream ? C(to_line)(type, args->y, at) : 0;
            n = min_u64(columns - j, strip_after(lead));
            const C(t) *h = row ? row + j : C(load_strip)(sum_type, args->residual_out, at, n, strip);
            C(t) *y = C(output_strip)(type, args->y, at, x, 0);
            C(normalise)(h, y, C(from_column)(args->weight, j), C(from_column)(args->norm_bias, j), n, mean, rstd,
                         stream && !lead && y != x);
            C(store_strip)(type, args->y, at, n, y, stream && !lead);
        }
    }
    if (stream) stream_fence();
}

/* What backward knows about a row: its statistics; the sums over the row of the gradient g and of g times the
 * normalised row; the means of these two. */
typedef struct {
    C(v) mean, rstd, mean_g, mean_gx;
    double sum_g, sum_gx;
} C(moments_t);

/* First pass over a strip: adds to the row's sums and, unless dweight is NULL, to the columns' sums of the gradients of
 * weight and norm_bias. */
static void C(norm_sums)(const C(t) * dy, const C(t) * x, const C(t) * weight, C(t) * dweight, C(t) * dnorm_bias,
                         uint64_t n, C(moments_t) * m) {
    const uint64_t ahead = distance_ahead(0);
    C(v) g_sum = C(set1)(0), gx_sum = C(set1)(0);
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        prefetch_from(dy + i, ahead);                                                                                  \
        prefetch_from(x + i, ahead);                                                                                   \
        C(v) g = C(load_partial)(dy + i, left), normal = (C(load_partial)(x + i, left) - m->mean) * m->rstd;           \
        if (left < C(lanes)) normal = C(scale)(C(mask)(low_bits((unsigned)(left)), 0), normal, C(set1)(1));            \
        if (dweight) {                                                                                                 \
            C(store_partial)(dweight + i, C(fma)(g, normal, C(load_partial)(dweight + i, left)), left, 0);             \
            C(store_partial)(dnorm_bias + i, C(load_partial)(dnorm_bias + i, left) + g, left, 0);                      \
        }                                                                                                              \
        if (weight) g = g * C(load_partial)(weight + i, left);                                                         \
        g_sum = g_sum + g;                                                                                             \
        gx_sum = C(fma)(g, normal, gx_sum);                                                                            \
    }
    FOR_VECTORS(n, BODY);
#undef BODY
    m->sum_g += C(sum_lanes)(g_sum);
    m->sum_gx += C(sum_lanes)(gx_sum);
}

/* The inputs of the next row, which the second pass prefetches: that saves a quarter of the time. */
typedef struct {
    const char *dy, *x;
    uint64_t dy_size, x_size;
} C(next_t);

/* Second pass over a strip: to = the gradient of residual_out. */
static void C(norm_gradient)(const C(t) * dy, const C(t) * x, const C(t) * weight, const C(t) * dresidual_out,
                             C(t) * to, uint64_t n, const C(moments_t) * m, const C(next_t) * next) {
    const C(next_t) ahead = *next;
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        prefetch(ahead.dy + i * ahead.dy_size);                                                                        \
        prefetch(ahead.x + i * ahead.x_size);                                                                          \
        C(v) g = C(load_partial)(dy + i, left), normal = (C(load_partial)(x + i, left) - m->mean) * m->rstd;           \
        if (weight) g = g * C(load_partial)(weight + i, left);                                                         \
        g = (g - m->mean_g - normal * m->mean_gx) * m->rstd;                                                           \
        if (dresidual_out) g = g + C(load_partial)(dresidual_out + i, left);                                           \
        C(store_partial)(to + i, g, left, 0);                                                                          \
    }
    FOR_VECTORS(n, BODY);
#undef BODY
}

/* Rows begin .. end-1; sums, [3, columns], of the gradients of weight, norm_bias and input_bias unless that is NULL. */
static void C(norm_backward_rows)(const norm_backward_args *args, uint64_t begin, uint64_t end, C(t) * sums) {
    const bits_t bits = {args->words, args->rows * args->columns};
    const int type = args->dtype, sum_type = args->residual_dtype;
    const uint64_t columns = args->columns;
    const C(t) *statistics = args->statistics;
    const C(t) a = (C(t))args->a;
    C(t) dy_scratch[STRIP_CELLS], x_scratch[STRIP_CELLS], dresidual_out[STRIP_CELLS];
    C(t) gradient[STRIP_CELLS], dx_scratch[STRIP_CELLS];
    C(next_t) next = {.dy_size = C(size)(type), .x_size = C(size)(sum_type)};
    for (uint64_t r = begin; r < end; r++) {
        C(moments_t) m;
        m.mean = C(set1)(C(load_one)(statistics + 2 * r));
        m.rstd = C(set1)(C(load_one)(statistics + 2 * r + 1));
        m.sum_g = m.sum_gx = 0;
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = r * columns + j;
            n = min_u64(columns - j, STRIP_CELLS);
            const C(t) *dy = C(load_strip)(type, args->dy, at, n, dy_scratch);
            const C(t) *x = C(load_strip)(sum_type, args->residual_out, at, n, x_scratch);
            C(norm_sums)(dy, x, C(from_column)(args->weight, j), sums ? sums + j : NULL,
                         sums ? sums + columns + j : NULL, n, &m);
        }
        m.mean_g = C(set1)(args->centred ? m.sum_g / (double)columns : 0);
        m.mean_gx = C(set1)(m.sum_gx / (double)columns);
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = r * columns + j;
            n = min_u64(columns - j, STRIP_CELLS);
            const C(t) *dy = C(load_strip)(type, args->dy, at, n, dy_scratch);
            const C(t) *x = C(load_strip)(sum_type, args->residual_out, at, n, x_scratch);
            const C(t) *added = C(load_strip)(sum_type, args->dresidual_out, at, n, dresidual_out);
            C(t) *to = gradient;
            if (args->dresidual) to = C(output_strip)(sum_type, args->dresidual, at, gradient, args->stream);
            next.dy = (const char *)args->dy + (at + columns) * next.dy_size;
            next.x = (const char *)args->residual_out + (at + columns) * next.x_size;
            C(norm_gradient)(dy, x, C(from_column)(args->weight, j), added, to, n, &m, &next);
            if (args->dresidual) C(store_strip)(sum_type, args->dresidual, at, n, to, args->stream);
            if (!args->dx && !sums) continue;
            C(t) *dx = args->dx ? C(output_strip)(type, args->dx, at, dx_scratch, args->stream) : dx_scratch;
            C(mask_strip)(to, dx, &bits, at, n, a, 0);
            if (args->dx) C(store_strip)(type, args->dx, at, n, dx, args->stream);
            if (sums) C(add)(dx, sums + 2 * columns + j, sums + 2 * columns + j, n);
        }
    }
    if (args->stream) stream_fence();
}

/* Units are rows or, with sums, panels of rows. */
static void C(norm_backward)(const norm_backward_args *args, uint64_t begin, uint64_t end) {
    if (!args->sums) {
        C(norm_backward_rows)(args, begin, end, NULL);
        return;
    }
    for (uint64_t panel = begin; panel < end; panel++) {
        C(t) *sums = (C(t) *)args->sums + panel * 3 * args->columns;
        memset(sums, 0, 3 * args->columns * sizeof *sums);
        C(norm_backward_rows)(args, panel_row(args->rows, args->panels, panel),
                              panel_row(args->rows, args->panels, panel + 1), sums);
    }
}

/* softmax_forward and softmax_backward: the softmax of attention scores, then dropout of the probabilities.
 * Included by fused.inc.h for each type that is computed in.
 *
 * Forward goes over a row three times: the scores and the largest of them; the exponentials and their sum; the
 * probabilities. A row longer than ROW_CELLS is not kept between them: its scores are computed again each time.
 */

/* to = scale x + mask. Returns, per lane, the largest of that and of `most`. */
static C(v) C(scores)(const C(t) * x, const C(t) * mask, C(t) * to, uint64_t n, C(v) scale, C(v) most) {
    const uint64_t ahead = distance_ahead(0);
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        prefetch_from(x + i, ahead);                                                                                   \
        C(v) v = C(load_partial)(x + i, left) * scale;                                                                 \
        if (mask) v = v + C(load_partial)(mask + i, left);                                                             \
        C(store_partial)(to + i, v, left, 0);                                                                          \
        if (left < C(lanes)) v = C(select)(C(mask)(low_bits((unsigned)(left)), 0), v, most);                           \
        most = C(max)(most, v);                                                                                        \
    }
    FOR_VECTORS(n, BODY);
#undef BODY
    return most;
}

/* to = exp(x - top). Returns the sum of that. */
static double C(exponentials)(const C(t) * x, C(t) * to, uint64_t n, C(v) top) {
    C(vs) v, sum;
    C(t) scratch[C(unrolled)];
    uint64_t i = 0;
    EACH sum.v[k] = C(set1)(0);
    for (; i + C(unrolled) <= n; i += C(unrolled)) {
        v = C(load_unrolled)(x + i);
        EACH v.v[k] = v.v[k] - top;
        v = C(exp)(v);
        C(store_unrolled)(to + i, v);
        EACH sum.v[k] = sum.v[k] + v.v[k];
    }
    if (i < n) {
        memcpy(scratch, x + i, (n - i) * sizeof *x);
        for (uint64_t j = n - i; j < C(unrolled); j++) scratch[j] = -INFINITY;
        v = C(load_unrolled)(scratch);
        EACH v.v[k] = v.v[k] - top;
        v = C(exp)(v);
        C(store_unrolled)(scratch, v);
        memcpy(to + i, scratch, (n - i) * sizeof *x);
        EACH sum.v[k] = sum.v[k] + v.v[k];
    }
    for (int k = 1; k < UNROLL; k++) sum.v[0] = sum.v[0] + sum.v[k];
    return C(sum_lanes)(sum.v[0]);
}

/* Where row r of the mask begins; NULL: no mask. */
#define MASK_ROW(args, r)                                                                                              \
    (!(args)->mask ? NULL                                                                                              \
                   : (const C(t) *)(args)->mask + (r) / (args)->queries / (args)->heads * (args)->outer_stride +       \
                         (r) / (args)->queries % (args)->heads * (args)->head_stride +                                 \
                         (r) % (args)->queries * (args)->query_stride)

/* A row of scores on its way to exponentials. */
typedef struct {
    const void *x;
    const C(t) * mask; /* NULL: no mask */
    int type;
    uint64_t first, keys; /* the row's first element, and how many keys it sees */
    C(v) scale;
    C(t) * row, *strip; /* room for the row, NULL: it is not kept between passes; room for a strip of it */
} C(row_t);

/* Row r of a kernel's scores, of which `seen` keys are seen. */
#define ROW_OF(args, r, seen, kept, room)                                                                              \
    {.x = (args)->x,                                                                                                   \
     .mask = MASK_ROW(args, r),                                                                                        \
     .type = (args)->dtype,                                                                                            \
     .first = (r) * (args)->columns,                                                                                   \
     .keys = seen,                                                                                                     \
     .scale = C(set1)((args)->softmax_scale),                                                                          \
     .row = kept,                                                                                                      \
     .strip = room}

/* The strip's scores in the row, or in the room for a strip. */
INLINE C(t) * C(score_strip)(const C(row_t) * r, uint64_t j, uint64_t n, C(v) * most) {
    C(t) *to = r->row ? r->row + j : r->strip;
    const C(t) *x = C(load_strip)(r->type, r->x, r->first + j, n, r->strip);
    *most = C(scores)(x, r->mask ? r->mask + j : NULL, to, n, r->scale, *most);
    return to;
}

/* The first pass: the scores. Returns the largest. The mask is drawn meanwhile, if it is to be drawn. */
static C(t) C(row_scores)(const C(row_t) * r, drawing_t *drawing) {
    C(v) most = C(set1)(-INFINITY);
    C(t) lanes[C(lanes)], largest;
    for (uint64_t j = 0, n; j < r->keys; j += n) {
        n = min_u64(r->keys - j, STRIP_CELLS);
        draw_until(drawing, r->first + j + n);
        C(score_strip)(r, j, n, &most);
    }
    C(store)(lanes, most);
    largest = lanes[0];
    for (int i = 1; i < C(lanes); i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

/* The second pass: exp(score - top). Returns the sum. */
static double C(row_exponentials)(const C(row_t) * r, C(v) top) {
    double sum = 0;
    for (uint64_t j = 0, n; j < r->keys; j += n) {
        C(v) most = top;
        n = min_u64(r->keys - j, STRIP_CELLS);
        C(t) *to = r->row ? r->row + j : C(score_strip)(r, j, n, &most);
        sum += C(exponentials)(to, to, n, top);
    }
    return sum;
}

/* A strip of what the second pass computed. */
INLINE C(t) * C(row_strip)(const C(row_t) * r, uint64_t j, uint64_t n, C(v) top) {
    C(v) most = top;
    if (r->row) return r->row + j;
    C(score_strip)(r, j, n, &most);
    C(exponentials)(r->strip, r->strip, n, top);
    return r->strip;
}

static void C(softmax_forward)(const softmax_forward_args *args, uint64_t begin, uint64_t end) {
    const int type = args->dtype;
    const uint64_t columns = args->columns;
    const C(t) a = (C(t))args->a;
    C(t) row[ROW_CELLS], x[STRIP_CELLS], p_scratch[STRIP_CELLS], y_scratch[STRIP_CELLS];
    drawing_t drawing;
    drawing_open(&drawing, args->words, args->rows * columns, args->draw, begin * columns, end * columns);
    for (uint64_t r = begin; r < end; r++) {
        const uint64_t first = r * columns, query = r % args->queries;
        const uint64_t keys = args->causal ? min_u64(columns, query + 1) : columns;
        const C(row_t) scores = ROW_OF(args, r, keys, columns <= ROW_CELLS ? row : NULL, x);
        const C(t) largest = C(row_scores)(&scores, &drawing);
        const C(v) top = C(set1)(largest == -INFINITY ? 0 : largest); /* all masked: -inf - -inf would be NaN */
        const double total = C(row_exponentials)(&scores, top);
        const C(t) share = total == 0 ? 0 : (C(t))(1 / total); /* all masked: 0 */
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j, lead = args->stream ? C(to_line)(type, args->y, at) : 0;
            n = min_u64((j < keys ? keys : columns) - j, strip_after(lead));
            C(t) *p = p_scratch, *y = C(output_strip)(type, args->y, at, y_scratch, 0);
            const int stream = args->stream && !lead;
            if (args->probabilities) p = C(output_strip)(type, args->probabilities, at, p_scratch, 0);
            if (j >= keys || share == 0) {
                memset(p, 0, n * sizeof *p);
            } else {
                const bits_t all = {NULL, 0};
                C(mask_strip)(C(row_strip)(&scores, j, n, top), p, &all, 0, n, share, 0);
            }
            if (j >= keys) draw_until(&drawing, at + n);
            C(mask_strip)(p, y, &drawing.bits, at, n, a, stream && y != y_scratch);
            if (args->probabilities) C(store_strip)(type, args->probabilities, at, n, p, 0);
            C(store_strip)(type, args->y, at, n, y, stream && y == y_scratch);
        }
    }
    if (args->stream) stream_fence();
}

static double C(dot)(const C(t) * x, const C(t) * y, uint64_t n) {
    const uint64_t ahead = distance_ahead(0);
    C(v) sum = C(set1)(0);
#define BODY(left)                                                                                                     \
    {                                                                                                                  \
        prefetch_from(y + i, ahead);                                                                                   \
        sum = C(fma)(C(load_partial)(x + i, left), C(load_partial)(y + i, left), sum);                                 \
    }
    FOR_VECTORS(n, BODY);
#undef BODY
    return C(sum_lanes)(sum);
}

/* to = (g - dot) p scale. */
static void C(softmax_gradient)(const C(t) * g, const C(t) * p, C(t) * to, uint64_t n, C(v) dot, C(v) scale) {
#define BODY(left)                                                                                                     \
    C(store_partial)(to + i, (C(load_partial)(g + i, left) - dot) * C(load_partial)(p + i, left) * scale, left, 0);
    FOR_VECTORS(n, BODY);
#undef BODY
}

static void C(softmax_backward)(const softmax_backward_args *args, uint64_t begin, uint64_t end) {
    const bits_t bits = {args->words, args->rows * args->columns};
    const int type = args->dtype;
    const uint64_t columns = args->columns;
    const int fits = columns <= ROW_CELLS;
    const C(t) a = (C(t))args->a;
    const C(v) scale = C(set1)(args->softmax_scale);
    C(t) row[ROW_CELLS], g_scratch[STRIP_CELLS], p_scratch[STRIP_CELLS], dx_scratch[STRIP_CELLS], dropped[STRIP_CELLS];
    for (uint64_t r = begin; r < end; r++) {
        const uint64_t first = r * columns;
        double dot = 0;
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j;
            n = min_u64(columns - j, STRIP_CELLS);
            C(t) *g = fits ? row + j : g_scratch;
            C(mask_strip)(C(load_strip)(type, args->dy, at, n, g_scratch), g, &bits, at, n, a, 0);
            dot += C(dot)(g, C(load_strip)(type, args->probabilities, at, n, p_scratch), n);
        }
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j;
            n = min_u64(columns - j, STRIP_CELLS);
            C(t) *g = fits ? row + j : g_scratch;
            if (!fits) C(mask_strip)(C(load_strip)(type, args->dy, at, n, g_scratch), g, &bits, at, n, a, 0);
            const C(t) *p = C(load_strip)(type, args->probabilities, at, n, p_scratch);
            C(t) *dx = C(output_strip)(type, args->dx, at, dx_scratch, args->y || args->stream);
            C(softmax_gradient)(g, p, dx, n, C(set1)(dot), scale);
            if (args->y) { /* before dx, which may be the same memory as probabilities */
                C(t) *y = C(output_strip)(type, args->y, at, dropped, args->stream);
                C(mask_strip)(p, y, &bits, at, n, a, 0);
                C(store_strip)(type, args->y, at, n, y, args->stream);
            }
            C(store_strip)(type, args->dx, at, n, dx, args->stream);
        }
    }
    if (args->stream) stream_fence();
}

/* attention_forward and attention_backward: attention scores a tile at a time, the caller's products of matrices before
 * and after. Included by fused.inc.h for each type that is computed in, after softmax.inc.h, whose loops they use.
 */

/* The columns that a row sees. */
INLINE uint64_t C(seen)(uint64_t columns, int causal, uint64_t query, uint64_t first_key) {
    if (!causal) return columns;
    return query < first_key ? 0 : min_u64(columns, query - first_key + 1);
}

static void C(attention_forward)(const attention_forward_args *args, uint64_t begin, uint64_t end) {
    const int type = args->dtype;
    const uint64_t columns = args->columns, width = args->width;
    const bits_t bits = {args->words, args->rows * columns};
    const C(t) *before = args->before;
    C(t) row[ROW_CELLS], x[STRIP_CELLS], y_scratch[STRIP_CELLS], *after = args->after;
    drawing_t given;
    drawing_open(&given, args->words, args->rows * columns, NULL, 0, 0);
    for (uint64_t r = begin; r < end; r++) {
        const uint64_t query = r % args->queries;
        const uint64_t keys = C(seen)(columns, args->causal, args->first_query + query, args->first_key);
        const C(row_t) scores = ROW_OF(args, r, keys, columns <= ROW_CELLS ? row : NULL, x);
        const C(t) old = before ? C(load_one)(before + 2 * r) : -INFINITY, largest = C(row_scores)(&scores, &given);
        C(t) top = largest > old ? largest : old;
        const C(v) base = C(set1)(top == -INFINITY ? 0 : top); /* nothing seen: -inf - -inf would be NaN */
        const double sum = C(row_exponentials)(&scores, base);
        const C(t) one = sum == sum ? 1 : NAN; /* NaN makes all of the row NaN; a maximum may pass it over */
        top *= one;
        const C(t) factor = top == old ? 1 : (C(t))exp((double)old - (double)top);
        C(store_one)(after + 2 * r, top);
        C(store_one)(after + 2 * r + 1, (C(t))((before ? C(load_one)(before + 2 * r + 1) : 0) * (double)factor + sum));
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = scores.first + j;
            n = min_u64((j < scores.keys ? scores.keys : columns) - j, STRIP_CELLS);
            C(t) *y = C(output_strip)(type, args->y, at, y_scratch, 0);
            if (j < scores.keys)
                C(mask_strip)(C(row_strip)(&scores, j, n, base), y, &bits, at, n, one, 0);
            else
                memset(y, 0, n * sizeof *y);
            C(store_strip)(type, args->y, at, n, y, 0);
        }
        if (!args->scaled) continue;
        const C(t) *totals = (const C(t) *)args->totals + r * width;
        C(t) *scaled = (C(t) *)args->scaled + r * width;
        if (factor != 1 || scaled != totals) C(times)(totals, scaled, width, C(set1)(factor));
    }
}

static void C(attention_backward)(const attention_backward_args *args, uint64_t begin, uint64_t end) {
    const int type = args->dtype;
    const uint64_t columns = args->columns;
    const bits_t bits = {args->words, args->rows * columns};
    const C(t) a = (C(t))args->a, *base_and_dot = args->base_and_dot;
    C(t) p[STRIP_CELLS], g[STRIP_CELLS], scratch[STRIP_CELLS];
    for (uint64_t r = begin; r < end; r++) {
        const uint64_t query = r % args->queries, first = r * columns;
        const uint64_t keys = C(seen)(columns, args->causal, args->first_query + query, args->first_key);
        const C(row_t) scores = ROW_OF(args, r, keys, NULL, p);
        const C(v) base = C(set1)(C(load_one)(base_and_dot + 2 * r)),
                   dot = C(set1)(C(load_one)(base_and_dot + 2 * r + 1));
        for (uint64_t j = 0, n; j < columns; j += n) {
            const uint64_t at = first + j;
            n = min_u64((j < keys ? keys : columns) - j, STRIP_CELLS);
            if (j < keys)
                C(row_strip)(&scores, j, n, base);
            else
                memset(p, 0, n * sizeof *p);
            if (args->dx) { /* before y, which may be the same memory as dy */
                C(t) *dx = C(output_strip)(type, args->dx, at, scratch, 0);
                C(mask_strip)(C(load_strip)(type, args->dy, at, n, g), g, &bits, at, n, a, 0);
                if (j < keys)
                    C(softmax_gradient)(g, p, dx, n, dot, C(set1)(1));
                else
                    memset(dx, 0, n * sizeof *dx);
                C(store_strip)(type, args->dx, at, n, dx, 0);
            }
            if (args->y) {
                C(t) *y = C(output_strip)(type, args->y, at, scratch, 0);
                C(mask_strip)(p, y, &bits, at, n, a, 0);
                C(store_strip)(type, args->y, at, n, y, 0);
            }
        }
    }
}

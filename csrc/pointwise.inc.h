/* pointwise_forward and pointwise_backward: bias, activation, a second factor (multiplier), dropout, residual.
 * Included by fused.inc.h for each type that is computed in.
 *
 * Both go over cells: a strip may begin in the middle of a row and go on into the next. Only the bias depends on the
 * column, so it is repeated, and a strip can read it from any column on.
 */

/* A row that is repeated if it is short, so that a strip may begin at any column and go on past the row's end. */
typedef struct {
    const C(t) * row; /* NULL: none */
    uint64_t columns, reach;
    C(t) scratch[2 * STRIP_CELLS];
} C(repeated_t);

static void C(repeated_open)(C(repeated_t) * c, const void *row, uint64_t columns) {
    c->row = row;
    c->columns = columns;
    c->reach = columns;
    if (!row || columns > STRIP_CELLS) return;
    c->reach = 2 * STRIP_CELLS;
    memcpy(c->scratch, row, columns * sizeof *c->scratch);
    for (uint64_t have = columns, n; have < c->reach; have += n) { /* whole rows but the last time */
        n = min_u64(have, c->reach - have);
        memcpy(c->scratch + have, c->scratch, n * sizeof *c->scratch);
    }
    c->row = c->scratch;
}

/* The row's numbers for elements at .. at+*n-1; *n becomes smaller if a long row ends first. */
INLINE const C(t) * C(repeated_at)(const C(repeated_t) * c, uint64_t at, uint64_t *n) {
    if (!c->row) return NULL;
    const uint64_t column = at % c->columns;
    *n = min_u64(*n, c->reach - column);
    return c->row + column;
}

typedef struct {
    C(t) x[STRIP_CELLS], multiplier[STRIP_CELLS], residual[STRIP_CELLS], y[STRIP_CELLS];
} C(scratch_t);

/* Elements at .. at+n-1, n at most a strip; bias is theirs. */
INLINE void C(forward_strip)(const pointwise_forward_args *args, const bits_t *bits, C(scratch_t) * scratch,
                             const C(t) * bias, uint64_t at, uint64_t n, int stream) {
    const int type = args->dtype, residual_type = args->residual_dtype;
    const C(t) *x = C(load_strip)(type, args->x, at, n, scratch->x);
    const C(t) *multiplier = C(load_strip)(type, args->multiplier, at, n, scratch->multiplier);
    const C(t) *residual = C(load_strip)(residual_type, args->residual, at, n, scratch->residual);
    C(t) *y = C(output_strip)(residual_type, args->y, at, scratch->y, 0);
    uint32_t signs[STRIP_CELLS / 32];
    C(drop_t)
    d = {.x = x,
         .bias = bias,
         .y = scratch->x,
         .signs = signs,
         .bits = bits,
         .position = at,
         .n = n,
         .a = (C(t))args->a,
         .activation = args->activation};
    if (multiplier) {
        if (d.activation == FD_RELU) { /* drop gives the signs, too */
            d.a = 1;
            C(drop)(&d);
            d.a = (C(t))args->a;
        } else {
            C(activate)(x, bias, scratch->x, n, d.activation);
        }
        C(mul)(scratch->x, multiplier, scratch->x, n);
        d.x = scratch->x;
        d.bias = NULL;
        d.activation = FD_NO_ACTIVATION;
    }
    if (residual && d.activation != FD_NO_ACTIVATION) {
        C(drop)(&d);
        C(add)(scratch->x, residual, y, n);
    } else {
        d.residual = residual;
        d.y = y;
        d.stream = stream && y != scratch->y;
        C(drop)(&d);
    }
    C(store_strip)(residual_type, args->y, at, n, y, stream);
    if (args->signs) copy_bits(args->signs, at, signs, 0, n);
}

static void C(pointwise_forward)(const pointwise_forward_args *args, uint64_t begin, uint64_t end) {
    drawing_t drawing;
    C(repeated_t) bias;
    C(scratch_t) scratch;
    drawing_open(&drawing, args->words, args->rows * args->columns, args->draw, begin, end);
    C(repeated_open)(&bias, args->input_bias, args->columns);
    for (uint64_t at = begin, n; at < end; at += n) {
        uint64_t lead = args->stream ? C(to_line)(args->residual_dtype, args->y, at) : 0;
        n = min_u64(end - at, strip_after(lead));
        const C(t) *part = C(repeated_at)(&bias, at, &n);
        draw_until(&drawing, at + n);
        C(forward_strip)(args, &drawing.bits, &scratch, part, at, n, args->stream && !lead);
    }
    if (args->stream) stream_fence();
}

/* Adds a strip to sums over columns. The strip begins at `column` and wraps around after the last one. */
static void C(add_to_columns)(const C(t) * g, C(t) * sums, uint64_t columns, uint64_t column, uint64_t n) {
    for (uint64_t i = 0, step; i < n; i += step, column = 0) {
        step = min_u64(n - i, columns - column);
        C(add)(g + i, sums + column, sums + column, step);
    }
}

/* Cells begin .. end-1; sums over columns unless that is NULL. */
static void C(backward_cells)(const pointwise_backward_args *args, uint64_t begin, uint64_t end, C(t) * sums) {
    const bits_t bits = {args->words, args->rows * args->columns};
    const int type = args->dtype, residual_type = args->residual_dtype;
    const C(t) a = (C(t))args->a;
    C(repeated_t) biases;
    C(t) g_scratch[STRIP_CELLS], h_scratch[STRIP_CELLS], multiplier_scratch[STRIP_CELLS];
    C(t) dx_scratch[STRIP_CELLS], dmultiplier[STRIP_CELLS];
    C(repeated_open)(&biases, args->input_bias, args->columns);
    for (uint64_t at = begin, n; at < end; at += n) {
        n = min_u64(end - at, STRIP_CELLS);
        const C(t) *bias = C(repeated_at)(&biases, at, &n);
        const C(t) *g = C(load_strip)(residual_type, args->dy, at, n, g_scratch);
        const C(t) *h = C(load_strip)(type, args->x, at, n, h_scratch);
        const C(t) *multiplier = C(load_strip)(type, args->multiplier, at, n, multiplier_scratch);
        if (h && bias) {
            C(add)(h, bias, h_scratch, n);
            h = h_scratch;
        }
        if (args->dmultiplier) {
            C(activate)(h, NULL, dmultiplier, n, args->activation);
            C(mul)(g, dmultiplier, dmultiplier, n);
        }
        if (args->activation != FD_NO_ACTIVATION) {
            C(activate_backward)(g, h, g_scratch, n, args->activation);
            g = g_scratch;
        }
        if (multiplier) {
            C(mul)(g, multiplier, g_scratch, n);
            g = g_scratch;
        }
        C(t) *dx = C(output_strip)(type, args->dx, at, dx_scratch, args->stream);
        C(mask_strip)(g, dx, &bits, at, n, a, 0);
        C(store_strip)(type, args->dx, at, n, dx, args->stream);
        if (sums) C(add_to_columns)(dx, sums, args->columns, at % args->columns, n);
        if (args->dmultiplier) { /* last: dmultiplier may be the same memory as multiplier */
            C(mask_strip)(dmultiplier, dmultiplier, &bits, at, n, a, 0);
            C(store_strip)(type, args->dmultiplier, at, n, dmultiplier, args->stream);
        }
    }
    if (args->stream) stream_fence();
}

/* Units are cells or, with sums, panels of rows. */
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

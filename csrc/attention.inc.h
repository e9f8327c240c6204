/* attention_forward and attention_backward: attention with dropout in memory that grows with the number of queries and
 * keys, not with their product. Included by fused.inc.h for each type that is computed in, after softmax.inc.h, whose
 * pass over the scores they use.
 *
 * Scores are made a tile at a time, of ATTENTION_ROWS queries and ATTENTION_KEYS keys, in scratch memory that stays in
 * the cache: a product of matrices, then passes over its rows that leave dropped exponentials, then the product of
 * these with the values. The tile's mask is drawn beside it. Forward keeps a running maximum and sum for each query,
 * and makes up for a new maximum. Backward makes the scores and the mask again.
 *
 * A unit of work is a chunk of queries of a head forward, and a part of the keys of a head backward: the keys of a tile
 * are brought into the form that products need once for all queries of the unit.
 */

/* What both kernels are given. */
typedef struct {
    const void *query, *key, *value, *mask;
    const uint32_t *words;
    strides_t strides[FD_STRIDES];
    int type, mask_type, causal;
    uint64_t heads, queries, keys, width, value_width, first, seed, offset, threshold;
    C(v) scale;
} C(attention_t);

#define ATTENTION_OF(args)                                                                                             \
    {.query = (args)->query,                                                                                           \
     .key = (args)->key,                                                                                               \
     .value = (args)->value,                                                                                           \
     .mask = (args)->mask,                                                                                             \
     .words = (args)->words,                                                                                           \
     .type = (args)->dtype,                                                                                            \
     .mask_type = (args)->mask_dtype,                                                                                  \
     .causal = (args)->causal,                                                                                         \
     .heads = (args)->heads * (args)->group,                                                                           \
     .queries = (args)->queries,                                                                                       \
     .keys = (args)->keys,                                                                                             \
     .width = (args)->width,                                                                                           \
     .value_width = (args)->value_width,                                                                               \
     .first = (args)->first,                                                                                           \
     .seed = (args)->seed,                                                                                             \
     .offset = (args)->offset,                                                                                         \
     .threshold = (args)->threshold,                                                                                   \
     .scale = C(set1)((args)->softmax_scale)}

/* Some queries of one of query's heads, and some keys. */
typedef struct {
    uint64_t outer, head, query, rows, key, columns;
} C(tile_t);

/* How many of the tile's keys a row sees. */
INLINE uint64_t C(seen)(const C(attention_t) * call, const C(tile_t) * tile, uint64_t row) {
    const uint64_t query = tile->query + row;
    if (!call->causal) return tile->columns;
    return query < tile->key ? 0 : min_u64(tile->columns, query - tile->key + 1);
}

/* Words of a row of its bits. */
INLINE uint64_t C(bit_words)(const C(tile_t) * tile) { return (tile->columns + 31) / 32; }

INLINE uint64_t C(element)(const strides_t *strides, uint64_t outer, uint64_t head, uint64_t row) {
    return outer * strides->outer + head * strides->head + row * strides->row;
}

/* The tile's bits: rows that begin at words. */
static void C(tile_bits)(const C(attention_t) * call, const C(tile_t) * tile, uint32_t *bits) {
    const strides_t *cells = call->strides + FD_CELL_STRIDES;
    const uint64_t first = call->first + C(element)(cells, tile->outer, tile->head, tile->query) + tile->key;
    const uint64_t pitch = C(bit_words)(tile), rows = cells->row ? tile->rows : 1; /* 1: queries share a row of cells */
    if (call->words) {
        for (uint64_t r = 0; r < rows; r++)
            copy_bits(bits + r * pitch, 0, call->words, first + r * cells->row, tile->columns);
    } else if (call->threshold == 0 || call->threshold >> 32) {
        memset(bits, call->threshold ? 0 : 0xFF, tile->rows * pitch * sizeof *bits);
    } else {
        const draw_rows_args args = {.words = bits,
                                     .first = first,
                                     .outer = 1,
                                     .rows = rows,
                                     .pitch = cells->row,
                                     .columns = 32 * pitch,
                                     .seed = call->seed,
                                     .offset = call->offset,
                                     .threshold = call->threshold};
        draw_rows(&args, 0, rows * 32 * pitch);
    }
    for (uint64_t r = rows; r < tile->rows; r++) memcpy(bits + r * pitch, bits, pitch * sizeof *bits);
}

/* to = bit ? 0 : -infinity, for booleans side by side; whole runs of them. */
static void C(added_by_bools)(const unsigned char *bools, C(t) * to, uint64_t n) {
    for (uint64_t j = 0; j < n; j += RUN) {
        unsigned char some[RUN] = {0};
        uint32_t run = 0;
        memcpy(some, bools + j, min_u64(RUN, n - j));
        for (unsigned i = 0; i < RUN; i += 8) {
            uint64_t eight; /* bytes that are not 0 become bits: each is multiplied into its place of the top byte */
            memcpy(&eight, some + i, sizeof eight);
            eight |= eight >> 4;
            eight |= eight >> 2;
            eight |= eight >> 1;
            run |= (uint32_t)((eight & 0x0101010101010101) * 0x0102040810204080 >> 56) << i;
        }
        for (int k = 0; k < RUN; k += C(lanes))
            C(store)(to + j + (uint64_t)k, C(select)(C(mask)(run, k), C(set1)(0), C(set1)(-INFINITY)));
    }
}

/* Elements of `size` bytes that lie `stride` elements apart, brought side by side. */
static void C(gather)(const unsigned char *from, unsigned char *to, uint64_t n, uint64_t stride, uint64_t size) {
    switch (size) {
#define CASE(bytes)                                                                                                    \
    case bytes:                                                                                                        \
        for (uint64_t j = 0; j < n; j++) memcpy(to + j * bytes, from + j * stride * bytes, bytes);                     \
        break;
        CASE(1) CASE(2) CASE(4) CASE(8)
#undef CASE
    }
}

/* What the mask adds to the tile's part of a row, in place or in `room`; NULL: no mask. */
static const C(t) * C(added)(const C(attention_t) * call, const C(tile_t) * tile, uint64_t row, C(t) * room) {
    const strides_t *strides = call->strides + FD_MASK_STRIDES;
    const uint64_t at = C(element)(strides, tile->outer, tile->head, tile->query + row) + tile->key * strides->column;
    const uint64_t size = call->mask_type == FD_BOOL ? 1 : C(size)(call->mask_type), n = tile->columns;
    const unsigned char *from = (const unsigned char *)call->mask + at * size;
    unsigned char side_by_side[ATTENTION_KEYS * sizeof(C(t))];
    if (!call->mask) return NULL;
    if (call->mask_type != FD_BOOL && strides->column == 1) return C(load_strip)(call->mask_type, from, 0, n, room);
    if (strides->column != 1) {
        C(gather)(from, side_by_side, n, strides->column, size);
        from = side_by_side;
    }
    if (call->mask_type == FD_BOOL) {
        C(added_by_bools)(from, room, n);
    } else {
        const C(t) *added = C(load_strip)(call->mask_type, from, 0, n, room);
        if (added != room) memcpy(room, added, n * sizeof *room);
    }
    return room;
}

/* The same for all rows, if they have one row of the mask in common; NULL: they have not. */
static const C(t) * C(added_to_all)(const C(attention_t) * call, const C(tile_t) * tile, C(t) * room) {
    return call->strides[FD_MASK_STRIDES].row == 0 ? C(added)(call, tile, 0, room) : NULL;
}

/* From products to scores, in place; -infinity behind those that are seen. Returns the largest. */
static C(t)
    C(tile_scores)(const C(attention_t) * call, const C(tile_t) * tile, uint64_t row, const C(t) * to_all, C(t) * x) {
    const uint64_t keys = C(seen)(call, tile, row);
    C(t) room[ATTENTION_KEYS], lanes[C(lanes)], largest = -INFINITY;
    const C(t) *added = to_all ? to_all : C(added)(call, tile, row, room);
    C(store)(lanes, C(scores)(x, added, x, keys, call->scale, C(set1)(-INFINITY)));
    for (int i = 0; i < C(lanes); i++) largest = lanes[i] > largest ? lanes[i] : largest;
    for (uint64_t j = keys; j < tile->columns || j % C(unrolled); j++) x[j] = -INFINITY;
    return largest;
}

/* UNROLL vectors of a row's bits from number j on, a multiple of as many. */
typedef struct {
    C(keep) v[UNROLL];
} C(keeps);

INLINE C(keeps) C(load_bits)(const uint32_t *row, uint64_t j) {
    C(keeps) keeps;
    const uint32_t *run = row + j / RUN;
    EACH {
        const unsigned at = (unsigned)k * C(lanes);
        keeps.v[k] = C(unrolled) % RUN ? C(mask)(*run >> j % RUN, (int)at) : C(mask)(run[at / RUN], (int)(at % RUN));
    }
    return keeps;
}

/* Memory for matrices, from which C(cut) cuts them. */
typedef struct {
    void *memory; /* NULL: there is none, and the call fails */
    C(t) * at;
} C(pool_t);

/* For rows of the wider of the two widths and rows of a tile's keys. */
static C(pool_t) C(allocate)(const C(attention_t) * call, uint64_t rows_of_width, uint64_t rows_of_keys) {
    const uint64_t widest = call->width > call->value_width ? call->width : call->value_width;
    const uint64_t n = rows_of_width * C(pitch_of)(widest) + rows_of_keys * C(pitch_of)(ATTENTION_KEYS);
    C(pool_t) scratch = {malloc(n * sizeof(C(t)) + LINE_BYTES), NULL};
    scratch.at = (C(t) *)(((uintptr_t)scratch.memory + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES);
    return scratch;
}

INLINE C(matrix) C(cut)(C(pool_t) * scratch, uint64_t rows, uint64_t columns) {
    const C(matrix) matrix = {scratch->at, C(pitch_of)(columns)};
    scratch->at += rows * matrix.pitch;
    return matrix;
}

/* Rows of query, key, value or dy, as `which` strides say. */
static void C(take)(const C(attention_t) * call, const void *data, int which, uint64_t outer, uint64_t head,
                    uint64_t row, uint64_t rows, uint64_t columns, C(matrix) to, int transposed) {
    const strides_t *strides = call->strides + which;
    const uint64_t at = C(element)(strides, outer, head, row);
    if (transposed)
        C(take_transposed)(call->type, data, at, strides->row, rows, columns, to);
    else
        C(take_rows)(call->type, data, at, strides->row, rows, columns, to);
}

/* ---- forward ---- */

/* x = bit ? exp(x - top) : 0. Returns the sum of exp(x - top). */
static double C(dropped_exponentials)(C(t) * x, uint64_t n, C(v) top, const uint32_t *bits) {
    C(vs) v, sum;
    EACH sum.v[k] = C(set1)(0);
    for (uint64_t j = 0; j < n; j += C(unrolled)) {
        const C(keeps) keep = C(load_bits)(bits, j);
        v = C(load_unrolled)(x + j);
        EACH v.v[k] = v.v[k] - top;
        v = C(exp)(v);
        EACH {
            sum.v[k] = sum.v[k] + v.v[k];
            C(store)(x + j + k * C(lanes), C(scale)(keep.v[k], v.v[k], C(set1)(1)));
        }
    }
    for (int k = 1; k < UNROLL; k++) sum.v[0] = sum.v[0] + sum.v[k];
    return C(sum_lanes)(sum.v[0]);
}

/* A row of the tile under the row's running largest score and total, which it updates. Returns what the sums of the
 * tiles before have to be multiplied by. */
static C(t) C(attend_row)(const C(attention_t) * call, const C(tile_t) * tile, uint64_t row, const C(t) * to_all,
                          C(t) * x, const uint32_t *bits, C(t) * largest, double *total) {
    const C(t) here = C(tile_scores)(call, tile, row, to_all, x), old = *largest;
    C(t) top = here > old ? here : old;
    const C(v) base = C(set1)(top == -INFINITY ? 0 : top); /* nothing seen: -inf - -inf would be NaN */
    const double sum = C(dropped_exponentials)(x, tile->columns, base, bits);
    if (sum != sum) { /* all of the row becomes NaN; the largest may have passed it over */
        const uint64_t seen = C(seen)(call, tile, row);
        top = NAN;
        for (uint64_t j = 0; j < tile->columns; j++) x[j] = j < seen && bits[j / 32] >> j % 32 & 1 ? NAN : 0;
    }
    *largest = top;
    const double factor = top == old || old == -INFINITY ? 1 : exp((double)old - (double)top); /* -inf: sums are 0 */
    *total = *total * factor + sum;
    return (C(t))factor;
}

typedef struct {
    C(matrix) keys, values, query, scores, sums; /* keys: transposed; sums: of a chunk */
    C(t) largest[ATTENTION_QUERIES];
    double totals[ATTENTION_QUERIES];
    uint32_t bits[ATTENTION_ROWS * ATTENTION_KEYS / 32 + SLACK_WORDS];
} C(attend_t);

/* A tile of the chunk that begins with query `chunk`. */
static void C(attend_tile)(const C(attention_t) * call, C(attend_t) * s, const C(tile_t) * tile, uint64_t chunk) {
    const uint64_t at = tile->query - chunk, panels = (call->value_width + C(panel) - 1) / C(panel);
    const C(matrix) query = {s->query.at + at * s->query.pitch, s->query.pitch};
    const C(matrix) sums = {s->sums.at + at * s->sums.pitch, s->sums.pitch};
    C(t) room[ATTENTION_KEYS];
    C(product)(query, 0, s->keys, s->scores, tile->rows, tile->columns, call->width, 0);
    C(tile_bits)(call, tile, s->bits);
    const C(t) *to_all = C(added_to_all)(call, tile, room);
    for (uint64_t r = 0; r < tile->rows; r++) {
        const C(t) factor = C(attend_row)(call, tile, r, to_all, s->scores.at + r * s->scores.pitch,
                                          s->bits + r * C(bit_words)(tile), s->largest + at + r, s->totals + at + r);
        C(t) *row = sums.at + r * sums.pitch;
        if (factor == factor && factor != 1) C(times)(row, row, panels * C(panel), C(set1)(factor));
        for (uint64_t j = 0; factor != factor && j < call->value_width; j++)
            if (row[j] != 0) row[j] = NAN; /* nothing was kept: 0 stays */
    }
    C(product)(s->scores, 0, s->values, sums, tile->rows, call->value_width, tile->columns, 1);
}

/* Results of a chunk's queries. */
static void C(attend_results)(const attention_forward_args *args, C(attend_t) * s, uint64_t row, uint64_t queries) {
    const uint64_t n = args->value_width;
    for (uint64_t r = 0; r < queries; r++) {
        const C(t) share = s->totals[r] == 0 ? 0 : (C(t))(1 / s->totals[r]);
        C(t) *sums = s->sums.at + r * s->sums.pitch, *statistics = (C(t) *)args->statistics + 2 * (row + r);
        C(store_one)(statistics, s->totals[r] == 0 ? INFINITY : s->largest[r]);
        C(store_one)(statistics + 1, share);
        C(times)(sums, sums, n, C(set1)((share == share ? share : 1) * (C(t))args->a)); /* else sums have the NaN */
        C(store_strip)(args->dtype, args->y, (row + r) * n, n, sums, 0);
    }
}

static void C(attention_forward)(const attention_forward_args *args, uint64_t begin, uint64_t end) {
    C(attention_t) call = ATTENTION_OF(args);
    const uint64_t chunks = attention_chunks(call.queries), width = call.width, value_width = call.value_width;
    memcpy(call.strides, args->strides, sizeof call.strides);
    C(pool_t)
    scratch = C(allocate)(&call, ATTENTION_KEYS + 2 * ATTENTION_QUERIES, width + ATTENTION_ROWS);
    C(attend_t) s;
    if (!scratch.memory) {
        atomic_store_explicit(args->failed, 1, memory_order_relaxed);
        return;
    }
    s.keys = C(cut)(&scratch, width, ATTENTION_KEYS);
    s.scores = C(cut)(&scratch, ATTENTION_ROWS, ATTENTION_KEYS);
    s.values = C(cut)(&scratch, ATTENTION_KEYS, value_width);
    s.query = C(cut)(&scratch, ATTENTION_QUERIES, width);
    s.sums = C(cut)(&scratch, ATTENTION_QUERIES, value_width);
    for (uint64_t unit = begin; unit < end; unit++) {
        const uint64_t row = unit / chunks, chunk = attention_chunk_begin(call.queries, unit % chunks);
        const uint64_t queries = attention_chunk_begin(call.queries, unit % chunks + 1) - chunk;
        const uint64_t keys = call.causal ? min_u64(call.keys, chunk + queries) : call.keys;
        C(tile_t) tile = {.outer = row / call.heads, .head = row % call.heads};
        C(take)(&call, call.query, FD_QUERY_STRIDES, tile.outer, tile.head, chunk, queries, width, s.query, 0);
        memset(s.sums.at, 0, queries * s.sums.pitch * sizeof *s.sums.at);
        for (uint64_t r = 0; r < queries; r++) {
            s.largest[r] = -INFINITY;
            s.totals[r] = 0;
        }
        for (tile.key = 0; tile.key < keys; tile.key += ATTENTION_KEYS) {
            const uint64_t columns = min_u64(ATTENTION_KEYS, keys - tile.key), shared = tile.head / args->group;
            C(take)(&call, call.key, FD_KEY_STRIDES, tile.outer, shared, tile.key, columns, width, s.keys, 1);
            C(take)(&call, call.value, FD_VALUE_STRIDES, tile.outer, shared, tile.key, columns, value_width, s.values,
                    0);
            for (tile.query = chunk; tile.query < chunk + queries; tile.query += tile.rows) {
                tile.rows = min_u64(ATTENTION_ROWS, chunk + queries - tile.query);
                tile.columns = columns;
                tile.columns = C(seen)(&call, &tile, tile.rows - 1);
                if (tile.columns) C(attend_tile)(&call, &s, &tile, chunk);
            }
        }
        C(attend_results)(args, &s, row * call.queries + chunk, queries);
    }
    free(scratch.memory);
}

/* ---- backward ---- */

typedef struct {
    C(matrix) keys_t, values_t, keys, query, dy, scores, slopes, product, dkey, dvalue; /* _t: transposed */
    C(t) a;
    uint32_t bits[ATTENTION_ROWS * ATTENTION_KEYS / 32 + SLACK_WORDS];
} C(slope_t);

/* Of scores x and dy value^T in d: x = bit ? a p : 0, p = exp(x - base) share; d = scale p ((bit ? a d : 0) - dot), the
 * gradient of the scores. */
static void C(score_gradient)(C(t) * x, C(t) * d, uint64_t n, const C(t) * statistics, C(t) dot, C(t) a, C(v) scale,
                              const uint32_t *bits) {
    const C(v) base = C(set1)(C(load_one)(statistics)), share = C(set1)(C(load_one)(statistics + 1));
    for (uint64_t j = 0; j < n; j += C(unrolled)) {
        const C(keeps) keep = C(load_bits)(bits, j);
        C(vs) v = C(load_unrolled)(x + j);
        EACH v.v[k] = v.v[k] - base;
        v = C(exp)(v);
        EACH {
            const uint64_t at = j + (uint64_t)k * C(lanes);
            const C(v) p = v.v[k] * share, kept = C(scale)(keep.v[k], C(load)(d + at), C(set1)(a));
            C(store)(x + at, C(scale)(keep.v[k], p, C(set1)(a)));
            C(store)(d + at, p * scale * (kept - C(set1)(dot)));
        }
    }
}

/* The sum of dy y over row `row` of y. */
static C(t) C(row_dot)(const attention_backward_args *args, const C(t) * dy, uint64_t row) {
    const uint64_t width = args->value_width;
    C(t) room[ATTENTION_KEYS];
    C(v) sum = C(set1)(0);
    for (uint64_t j = 0, n; j < width; j += n) {
        n = min_u64(width - j, ATTENTION_KEYS);
        const C(t) *y = C(load_strip)(args->dtype, args->y, row * width + j, n, room);
#define BODY(left) sum = C(fma)(C(load_partial)(dy + j + i, left), C(load_partial)(y + i, left), sum);
        FOR_VECTORS(n, BODY);
#undef BODY
    }
    return C(sum_lanes)(sum);
}

/* Adds a row of the scores' gradient to the mask's, of which several elements are one where the stride is 0. */
static void C(add_to_mask)(const C(t) * d, uint64_t n, C(t) * to, uint64_t stride) {
    if (stride == 1)
        C(add)(to, d, to, n);
    else
        for (uint64_t j = 0; j < n; j++, to += stride) C(store_one)(to, C(load_one)(to) + d[j]);
}

/* The passes over a tile's rows, between its products. */
static void C(slope_rows)(const attention_backward_args *args, const C(attention_t) * call, C(slope_t) * s,
                          const C(tile_t) * tile) {
    const uint64_t first = (tile->outer * call->heads + tile->head) * call->queries + tile->query;
    const strides_t *strides = call->strides + FD_DMASK_STRIDES;
    C(t) room[ATTENTION_KEYS];
    const C(t) *statistics = args->statistics, *to_all = C(added_to_all)(call, tile, room);
    for (uint64_t r = 0; r < tile->rows; r++) {
        const uint64_t seen = C(seen)(call, tile, r);
        const uint32_t *bits = s->bits + r * C(bit_words)(tile);
        C(t) *x = s->scores.at + r * s->scores.pitch, *d = s->slopes.at + r * s->slopes.pitch;
        const C(t) dot = args->y ? C(row_dot)(args, s->dy.at + r * s->dy.pitch, first + r) : 0;
        C(tile_scores)(call, tile, r, to_all, x);
        C(score_gradient)(x, d, tile->columns, statistics + 2 * (first + r), dot, s->a,
                          args->dmask ? C(set1)(1) : call->scale, bits);
        memset(x + seen, 0, (tile->columns - seen) * sizeof *x); /* in a row with NaN they are NaN */
        memset(d + seen, 0, (tile->columns - seen) * sizeof *d); /* where a value is infinite they are NaN */
        if (!args->dmask) continue;
        C(t) *to = (C(t) *)args->dmask + C(element)(strides, tile->outer, tile->head, tile->query + r);
        C(add_to_mask)(d, seen, to + tile->key * strides->column, strides->column);
        C(times)(d, d, tile->columns, call->scale);
    }
}

static void C(slope_tile)(const attention_backward_args *args, const C(attention_t) * call, C(slope_t) * s,
                          const C(tile_t) * tile, C(t) * dquery) {
    const uint64_t rows = tile->rows, columns = tile->columns, width = call->width;
    C(take)(call, call->query, FD_QUERY_STRIDES, tile->outer, tile->head, tile->query, rows, width, s->query, 0);
    C(take)(call, args->dy, FD_DY_STRIDES, tile->outer, tile->head, tile->query, rows, call->value_width, s->dy, 0);
    C(product)(s->query, 0, s->keys_t, s->scores, rows, columns, width, 0);
    if (args->y)
        C(product)(s->dy, 0, s->values_t, s->slopes, rows, columns, call->value_width, 0);
    else
        memset(s->slopes.at, 0, rows * s->slopes.pitch * sizeof *s->slopes.at);
    C(tile_bits)(call, tile, s->bits);
    C(slope_rows)(args, call, s, tile);
    if (args->dvalue) C(product)(s->scores, 1, s->dy, s->dvalue, columns, call->value_width, rows, 1);
    if (args->dkey) C(product)(s->slopes, 1, s->query, s->dkey, columns, width, rows, 1);
    if (!dquery) return;
    C(product)(s->slopes, 0, s->keys, s->product, rows, width, columns, 0);
    for (uint64_t r = 0; r < rows; r++)
        C(add)(dquery + r * width, s->product.at + r * s->product.pitch, dquery + r * width, width);
}

/* Rows of sums to where a gradient of keys or values begins. */
static void C(put_rows)(int type, void *data, uint64_t row, uint64_t rows, uint64_t columns, C(matrix) sums) {
    for (uint64_t r = 0; data && r < rows; r++)
        C(store_strip)(type, data, (row + r) * columns, columns, sums.at + r * sums.pitch, 0);
}

/* Keys `tile->key` and up of head `shared`, under all queries of its group. */
static void C(slope_keys)(const attention_backward_args *args, const C(attention_t) * call, C(slope_t) * s,
                          C(tile_t) * tile, uint64_t shared, uint64_t part) {
    const uint64_t columns = tile->columns, heads = call->heads, row = tile->outer * args->heads + shared;
    const int strides = FD_KEY_STRIDES;
    C(take)(call, call->key, strides, tile->outer, shared, tile->key, columns, call->width, s->keys_t, 1);
    C(take)(call, call->key, strides, tile->outer, shared, tile->key, columns, call->width, s->keys, 0);
    if (args->y)
        C(take)(call, call->value, FD_VALUE_STRIDES, tile->outer, shared, tile->key, columns, call->value_width,
                s->values_t, 1);
    memset(s->dkey.at, 0, columns * s->dkey.pitch * sizeof *s->dkey.at);
    memset(s->dvalue.at, 0, columns * s->dvalue.pitch * sizeof *s->dvalue.at);
    for (uint64_t member = 0; member < args->group; member++) {
        tile->head = shared * args->group + member;
        const uint64_t first = ((part * args->outer + tile->outer) * heads + tile->head) * call->queries;
        for (tile->query = 0; tile->query < call->queries; tile->query += tile->rows) {
            tile->rows = min_u64(ATTENTION_ROWS, call->queries - tile->query);
            tile->columns = columns;
            tile->columns = C(seen)(call, tile, tile->rows - 1);
            if (!tile->columns) continue;
            C(slope_tile)(args, call, s, tile,
                          args->dquery ? (C(t) *)args->dquery + (first + tile->query) * call->width : NULL);
        }
    }
    C(put_rows)(call->type, args->dkey, row * call->keys + tile->key, columns, call->width, s->dkey);
    C(put_rows)(call->type, args->dvalue, row * call->keys + tile->key, columns, call->value_width, s->dvalue);
}

static void C(attention_backward)(const attention_backward_args *args, uint64_t begin, uint64_t end) {
    C(attention_t) call = ATTENTION_OF(args);
    const uint64_t tiles = (call.keys + ATTENTION_KEYS - 1) / ATTENTION_KEYS;
    memcpy(call.strides, args->strides, sizeof call.strides);
    C(pool_t)
    scratch =
        C(allocate)(&call, 3 * ATTENTION_KEYS + 3 * ATTENTION_ROWS, call.width + call.value_width + 2 * ATTENTION_ROWS);
    C(slope_t) s = {.a = (C(t))args->a};
    if (!scratch.memory) {
        atomic_store_explicit(args->failed, 1, memory_order_relaxed);
        return;
    }
    s.keys_t = C(cut)(&scratch, call.width, ATTENTION_KEYS);
    s.values_t = C(cut)(&scratch, call.value_width, ATTENTION_KEYS);
    s.scores = C(cut)(&scratch, ATTENTION_ROWS, ATTENTION_KEYS);
    s.slopes = C(cut)(&scratch, ATTENTION_ROWS, ATTENTION_KEYS);
    s.keys = C(cut)(&scratch, ATTENTION_KEYS, call.width);
    s.dkey = C(cut)(&scratch, ATTENTION_KEYS, call.width);
    s.dvalue = C(cut)(&scratch, ATTENTION_KEYS, call.value_width);
    s.query = C(cut)(&scratch, ATTENTION_ROWS, call.width);
    s.dy = C(cut)(&scratch, ATTENTION_ROWS, call.value_width);
    s.product = C(cut)(&scratch, ATTENTION_ROWS, call.width);
    for (uint64_t unit = begin; unit < end; unit++) {
        const uint64_t part = unit % args->parts, head = unit / args->parts;
        for (uint64_t t = panel_row(tiles, args->parts, part); t < panel_row(tiles, args->parts, part + 1); t++) {
            C(tile_t) tile = {.outer = head / args->heads, .key = t * ATTENTION_KEYS};
            tile.columns = min_u64(ATTENTION_KEYS, call.keys - tile.key);
            C(slope_keys)(args, &call, &s, &tile, head % args->heads, part);
        }
    }
    free(scratch.memory);
}

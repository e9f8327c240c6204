/* dropout_forward, masked_affine and gaussian_multiply: mask bits or noise meet data. Included by kernels.inc.h four
 * times, with DTYPE f32, f64, f16 and bf16. D(name) is f32_name and so on: D(t) a number as it is stored, D(v) a vector
 * of what it is computed in.
 *
 * dropout_forward draws a chunk ahead: while it applies block b of one chunk, it draws block b of the next, so that the
 * multiplications of Philox fill the time in which data is loaded.
 */
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define D(name) PASTE(DTYPE, name)

/* y = bit ? a x + b : c. no_shift: b = c = 0, and y is a x or +0 (adding b = 0 would turn -0 into +0). */
typedef struct {
    D(v) a, b, c;
    int no_shift, stream;
    order_t order;
} D(affine_t);

static D(affine_t) D(affine_of)(double a, double b, double c, int stream, const void *y) {
    if ((uintptr_t)y % sizeof(D(t))) stream = 0; /* no element ever begins a line */
    return (D(affine_t)){D(set1)(a), D(set1)(b), D(set1)(c), b == 0 && c == 0, stream, order_of(stream, sizeof(D(t)))};
}

/* A vector of x under bits k and up of a run. */
INLINE D(v) D(lanes_under)(const D(affine_t) * f, uint32_t run, int k, D(v) x, const int no_shift) {
    D(keep) keep = D(mask)(run, k);
    return no_shift ? D(scale)(keep, x, f->a) : D(affine)(keep, x, f->a, f->b, f->c);
}

/* Fewer elements than a vector has, by way of a local copy. */
INLINE void D(apply_part)(const D(t) * x, D(t) * y, const uint32_t *bits, uint64_t position, unsigned n,
                          const D(affine_t) * f, const int no_shift) {
    D(t) part[D(lanes)] = {0};
    memcpy(part, x, n * sizeof *x);
    D(store)(part, D(lanes_under)(f, bits_at(bits, position, 0), 0, D(load)(part), no_shift));
    memcpy(y, part, n * sizeof *y);
}

/* stream: first up to where a cache line of y begins, then by stores around the cache. bytewise: whole runs begin at
 * multiples of 8 bits. Both and no_shift are constants. */
INLINE void D(apply_runs)(const D(t) * x, D(t) * y, const uint32_t *bits, uint64_t position, uint64_t n,
                          const D(affine_t) * f, const int no_shift, const int stream, const int bytewise) {
    uint64_t i = 0;
    for (unsigned step; stream && i < n && (step = ELEMENTS_TO_LINE(y + i)); i += step) {
        if (step > D(lanes)) step = D(lanes);
        if (step > n - i) step = (unsigned)(n - i);
        D(apply_part)(x + i, y + i, bits, position + i, step, f, no_shift);
    }
    for (; i + RUN <= n; i += RUN) {
        uint32_t run = bits_at(bits, position + i, bytewise);
        for (unsigned byte = 0; byte < RUN * sizeof *x; byte += LINE_BYTES)
            prefetch_from((const char *)(x + i) + byte, f->order.ahead);
#pragma GCC unroll 4
        for (unsigned k = 0; k < RUN; k += D(lanes)) {
            D(v) v = D(lanes_under)(f, run, (int)k, D(load)(x + i + k), no_shift);
            if (stream)
                D(stream)(y + i + k, v);
            else
                D(store)(y + i + k, v);
        }
    }
    for (unsigned step; i < n; i += step) {
        step = n - i < D(lanes) ? (unsigned)(n - i) : (unsigned)D(lanes);
        D(apply_part)(x + i, y + i, bits, position + i, step, f, no_shift);
    }
}

/* Block b's share of a chunk of n elements: as many pieces, in the chunk's order. The first piece has the elements
 * before the first line of y too. */
INLINE void D(apply_pieces)(const D(t) * x, D(t) * y, const uint32_t *bits, uint64_t position, uint64_t n, unsigned b,
                            const D(affine_t) * f, const int no_shift, const int stream) {
    const unsigned seam = stream ? ELEMENTS_TO_LINE(y) : 0, pieces = FD_BLOCK_CELLS / f->order.cells;
    for (unsigned k = b * pieces; k < (b + 1) * pieces; k++) {
        const uint64_t piece = n == CHUNK_CELLS ? piece_at(&f->order, k) : k;
        const uint64_t from = piece ? piece * f->order.cells + seam : 0;
        const uint64_t to = min_u64(n, (piece + 1) * f->order.cells + seam);
        if (from >= to) continue;
        if ((position + seam) % 8 == 0)
            D(apply_runs)(x + from, y + from, bits, position + from, to - from, f, no_shift, stream, 1);
        else
            D(apply_runs)(x + from, y + from, bits, position + from, to - from, f, no_shift, stream, 0);
    }
}

INLINE void D(apply_block)(const D(t) * x, D(t) * y, const uint32_t *bits, uint64_t position, uint64_t n, unsigned b,
                           const D(affine_t) * f) {
    if (f->no_shift && f->stream)
        D(apply_pieces)(x, y, bits, position, n, b, f, 1, 1);
    else if (f->no_shift)
        D(apply_pieces)(x, y, bits, position, n, b, f, 1, 0);
    else if (f->stream)
        D(apply_pieces)(x, y, bits, position, n, b, f, 0, 1);
    else
        D(apply_pieces)(x, y, bits, position, n, b, f, 0, 0);
}

static void D(masked_affine)(const masked_affine_args *args, uint64_t begin, uint64_t end) {
    const D(t) *x = args->x;
    D(t) *y = args->y;
    D(affine_t) f = D(affine_of)(args->a, args->b, args->c, args->stream, y);
    uint64_t cells = args->outer * args->inner;
    pattern_t pattern;
    pattern.begin = pattern.end = end;
    for (uint64_t at = begin, step; at < end; at += step) {
        step = min_u64(end - at, CHUNK_CELLS);
        const uint32_t *bits = args->words; /* in place if possible: a copy would wait for the words of each chunk */
        uint64_t position = args->position + at;
        if (args->repeat != 1 || cells - at < step + SLACK_CELLS) {
            bits = pattern.bits;
            position = pattern_for(&pattern, args, at, step);
        }
        for (unsigned b = 0; b < blocks_for(step); b++) D(apply_block)(x + at, y + at, bits, position, step, b, &f);
    }
    if (f.stream) stream_fence();
}

static void D(dropout_forward)(const dropout_forward_args *args, uint64_t begin, uint64_t end) {
    const D(t) *x = args->x;
    D(t) *y = args->y;
    D(affine_t) f = D(affine_of)(args->a, args->b, args->c, args->stream, y);
    draw_t d;
    chunk_t chunks[2], *now = &chunks[0], *next = &chunks[1];
    draw_prepare(&d, args->seed, args->offset, args->threshold, args->first + begin);
    uint64_t lead = (args->first + begin) % FD_BLOCK_CELLS; /* the chunk begins so many cells inside a block */
    uint64_t block = (args->first + begin) / FD_BLOCK_CELLS;
    uint64_t at = begin, n = 0, ahead = min_u64(end - begin, CHUNK_CELLS); /* cells to apply, to draw */
    while (n || ahead) {
        uint64_t apply_blocks = blocks_for(n), draw_blocks = ahead ? blocks_for(lead + ahead) : 0;
        chunk_open(&d, next, block);
        for (unsigned b = 0; b < apply_blocks || b < draw_blocks; b++) {
            if (b < draw_blocks) draw_block(&d, next, b);
            if (b < apply_blocks) D(apply_block)(x + at, y + at, now->words, lead, n, b, &f);
        }
        draw_pending(&d, next);
        if (args->words) store_bits(args->words, at, now->words, lead, n, f.stream);
        chunk_t *applied = now;
        now = next;
        next = applied;
        block += CHUNK_BLOCKS;
        at += n;
        n = ahead;
        ahead = min_u64(end - at - n, CHUNK_CELLS);
    }
    if (f.stream) stream_fence();
}

/* y = x factors. A whole vector of factors can be read at any of them. */
INLINE void D(multiply)(const D(t) * x, D(t) * y, const float *factors, uint64_t n, uint64_t ahead, const int stream) {
    const D(keep) all = D(mask)(~0u, 0);
    for (uint64_t i = 0, step; i < n; i += step) {
        unsigned part = stream ? ELEMENTS_TO_LINE(y + i) % D(lanes) : 0;
        step = min_u64(n - i, part ? part : (unsigned)D(lanes));
        D(v) factor = D(from_floats)(factors + i);
        prefetch_from(x + i, ahead);
        if (step < D(lanes)) {
            D(t) partial[D(lanes)] = {0};
            memcpy(partial, x + i, step * sizeof *x);
            D(store)(partial, D(scale)(all, D(load)(partial), factor));
            memcpy(y + i, partial, step * sizeof *y);
        } else if (stream) {
            D(stream)(y + i, D(scale)(all, D(load)(x + i), factor));
        } else {
            D(store)(y + i, D(scale)(all, D(load)(x + i), factor));
        }
    }
}

static void D(gaussian_multiply)(const gaussian_multiply_args *args, uint64_t begin, uint64_t end) {
    const D(t) *x = args->x;
    D(t) *y = args->y;
    const int stream = args->stream && (uintptr_t)y % sizeof *y == 0;
    const uint64_t ahead = distance_ahead(stream);
    float factors[NOISE_CELLS + SLACK_CELLS];
    philox_t philox;
    philox_prepare(&philox, args->seed, args->offset, NOISE_DOMAIN, first_counter(args->first + begin));
    for (uint64_t at = begin, step; at < end; at += step) {
        uint64_t cell = args->first + at, lead = cell % TILE_CELLS;
        step = min_u64(end - at, NOISE_CELLS - lead);
        if (stream && step < end - at)
            step -= (uintptr_t)(y + at + step) % LINE_BYTES / sizeof *y; /* steps end where lines of y do */
        draw_factors(&philox, cell - lead, lead + step, (float)args->sigma, factors);
        if (stream)
            D(multiply)(x + at, y + at, factors + lead, step, ahead, 1);
        else
            D(multiply)(x + at, y + at, factors + lead, step, ahead, 0);
    }
    if (stream) stream_fence();
}

#undef D
#undef PASTE
#undef PASTE_
#undef DTYPE

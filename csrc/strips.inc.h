/* Strips: how the fused kernels go through data, as far as no number type matters. Included once by kernels.inc.h,
 * before fused.inc.h.
 *
 * A fused kernel has several stages (bias, activation, dropout, residual ...). It takes a strip of STRIP_CELLS cells
 * through all of them before it goes on to the next strip, so that the numbers between two stages stay in the nearest
 * cache. Here are the parts of that: the mask of a strip, given or drawn on the way, and 16-bit data to float32 and
 * back.
 */

enum {
    STRIP_CELLS = 1024, /* a strip's buffers fit the nearest cache */
    ROW_CELLS = 4096    /* a kernel keeps a row up to this long between its passes; it reads a longer one again */
};

/* A mask in user memory. */
typedef struct {
    const uint32_t *words; /* NULL: all kept */
    uint64_t cells;
} bits_t;

/* A mask that the kernel draws itself while it works, a chunk ahead of the data as in dropout_forward. */
typedef struct {
    bits_t bits;
    const draw_bits_args *args;
    uint64_t at, n, end; /* cells below `at` are drawn, at .. at+n-1 are being drawn; the thread's part ends at `end` */
    unsigned lead;       /* the position of cell `at` in its block */
    unsigned blocks, begun; /* blocks of the chunk, and how many of them are drawn */
    draw_t draw;
    chunk_t chunk;
} drawing_t;

static void drawing_next_chunk(drawing_t *d) {
    uint64_t cell = d->args->first + d->at;
    d->n = min_u64(d->end - d->at, CHUNK_CELLS);
    d->lead = (unsigned)(cell % FD_BLOCK_CELLS);
    d->blocks = d->n ? (unsigned)blocks_for(d->lead + d->n) : 0;
    d->begun = 0;
    if (d->n) chunk_open(&d->draw, &d->chunk, cell / FD_BLOCK_CELLS);
}

/* For a thread's part: cells begin .. end-1 of a mask of `cells`. draw is NULL if the words are given. If the kernel
 * draws them, it must not read words past `end`, because another thread may be writing them. */
static void drawing_open(drawing_t *d, const uint32_t *words, uint64_t cells, const draw_bits_args *draw,
                         uint64_t begin, uint64_t end) {
    d->bits.words = words;
    d->bits.cells = draw ? end : cells;
    d->at = UINT64_MAX;
    d->begun = d->blocks = 0;
    if (!draw) return;
    d->args = draw;
    d->at = begin;
    d->end = end;
    draw_prepare(&d->draw, draw->seed, draw->offset, draw->threshold, draw->first + begin);
    drawing_next_chunk(d);
}

/* Called before each strip: draws what is missing up to the strip's end, then as many blocks of the next chunk as a
 * strip has. */
static OUTLINE void draw_until(drawing_t *d, uint64_t until) {
    while (d->at < until) {
        for (; d->begun < d->blocks; d->begun++) draw_block(&d->draw, &d->chunk, d->begun);
        draw_pending(&d->draw, &d->chunk);
        copy_bits(d->args->words, d->at, d->chunk.words, d->lead, d->n);
        d->at += d->n;
        drawing_next_chunk(d);
    }
    for (int more = STRIP_CELLS / FD_BLOCK_CELLS; more && d->begun < d->blocks; more--)
        draw_block(&d->draw, &d->chunk, d->begun++);
}

/* n <= RUN bits from a position on; bits above them may be anything. Reads nothing past the mask's end. */
INLINE uint32_t run_at(const bits_t *bits, uint64_t position, unsigned n) {
    if (!bits->words) return ~0u;
    if (bits->cells - position >= SLACK_CELLS) return bits_at(bits->words, position, 0);
    return read_bits(bits->words, position, n);
}

/* The first row of a panel. If rows do not divide evenly, the first panels have one more row than the others. */
INLINE uint64_t panel_row(uint64_t rows, uint64_t panels, uint64_t panel) {
    return panel * (rows / panels) + min_u64(panel, rows % panels);
}

/* 16-bit numbers to float32 and back; stream: by stores around the cache. */
#define DEFINE_STORAGE(T)                                                                                              \
    static void T##_widen(const T##_t *from, float *to, uint64_t n) {                                                  \
        const uint64_t ahead = distance_ahead(0);                                                                      \
        uint64_t i = 0;                                                                                                \
        for (; i + f32_lanes <= n; i += f32_lanes) {                                                                   \
            prefetch_from(from + i, ahead);                                                                            \
            f32_store(to + i, T##_load_lanes(from + i));                                                               \
        }                                                                                                              \
        if (i < n) {                                                                                                   \
            T##_t part[f32_lanes] = {0};                                                                               \
            float wide[f32_lanes];                                                                                     \
            memcpy(part, from + i, (n - i) * sizeof *part);                                                            \
            f32_store(wide, T##_load_lanes(part));                                                                     \
            memcpy(to + i, wide, (n - i) * sizeof *wide);                                                              \
        }                                                                                                              \
    }                                                                                                                  \
    static void T##_narrow(const float *from, T##_t *to, uint64_t n, int stream) {                                     \
        uint64_t i = 0;                                                                                                \
        for (; stream && i + f32_lanes <= n; i += f32_lanes) T##_stream_lanes(to + i, f32_load(from + i));             \
        for (; i + f32_lanes <= n; i += f32_lanes) T##_store_lanes(to + i, f32_load(from + i));                        \
        if (i < n) {                                                                                                   \
            float part[f32_lanes] = {0};                                                                               \
            T##_t narrow[f32_lanes];                                                                                   \
            memcpy(part, from + i, (n - i) * sizeof *part);                                                            \
            T##_store_lanes(narrow, f32_load(part));                                                                   \
            memcpy(to + i, narrow, (n - i) * sizeof *narrow);                                                          \
        }                                                                                                              \
    }
#define f16_load_lanes f16_load
#define f16_store_lanes f16_store
#define f16_stream_lanes f16_stream
DEFINE_STORAGE(f16)
DEFINE_STORAGE(bf16)

/* The length of the next strip: up to where a cache line of the output begins, then whole strips. */
INLINE uint64_t strip_after(uint64_t lead) { return lead && lead < STRIP_CELLS ? lead : STRIP_CELLS; }

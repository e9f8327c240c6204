/* Mask bits beside data: read at any position, written with the data, repeated for masks that are broadcast.
 * Included once by kernels.inc.h, for apply.inc.h (all of it) and strips.inc.h (bits_at).
 *
 * bits_at always reads eight bytes, so it needs slack behind the last bit. User memory has none: kernels read the last
 * bits of a mask through a local buffer (pattern_t) or by read_bits of bits.h.
 */

/* copy_bits which, given a whole chunk and `stream`, writes around the cache as the data does: ordinary stores between
 * streaming ones cost the memory system several times their share. */
INLINE void store_bits(uint32_t *to, uint64_t to_position, const uint32_t *from, uint64_t from_position, uint64_t n,
                       int stream) {
    uint32_t *line = to + to_position / 32;
    if (!stream || n != CHUNK_CELLS || from_position || to_position % 32 || (uintptr_t)line % LINE_BYTES) {
        copy_bits(to, to_position, from, from_position, n);
        return;
    }
    for (unsigned w = 0; w < CHUNK_CELLS / 32; w += LANES) words_stream(line + w, words_load(from + w));
}

/* The RUN bits from a position on. The eight bytes there must be readable. bytewise: the position is a multiple of 8,
 * so that a vector load can broadcast the bits straight from memory. */
INLINE uint32_t bits_at(const uint32_t *bits, uint64_t position, const int bytewise) {
    const unsigned char *at = (const unsigned char *)bits + (position >> 3);
    uint64_t pair;
    uint32_t run;
    if (bytewise) {
        memcpy(&run, at, sizeof run);
        return run;
    }
    memcpy(&pair, at, sizeof pair);
    return (uint32_t)(pair >> (position & 7));
}

/* Collects the bits of elements at .. at+n-1 of data [outer, repeat, inner] under a mask [outer, inner]. */
static void gather_bits(uint32_t *to, const masked_affine_args *args, uint64_t at, uint64_t n) {
    writer_t writer = {(unsigned char *)to, 0, 0};
    if (args->repeat == 1) {
        append_copy(&writer, args->words, args->position + at, n);
    } else {
        uint64_t row = at / args->inner, i = at % args->inner; /* row counts [outer, repeat] */
        uint64_t o = row / args->repeat, r = row % args->repeat;
        for (uint64_t step; n; n -= step) {
            uint64_t cell = args->position + o * args->inner + i;
            if (args->inner == 1) {
                step = min_u64(args->repeat - r, n);
                append_run(&writer, read_bits(args->words, cell, 1), step);
                r += step;
            } else {
                step = min_u64(args->inner - i, n);
                append_copy(&writer, args->words, cell, step);
                i = 0;
                r += 1;
            }
            if (r == args->repeat) {
                r = 0;
                o += 1;
            }
        }
    }
    append_end(&writer);
}

/* Bits that gather_bits collected, from element `begin` on. If the bits repeat every `inner` elements, `inner` more
 * than a chunk are collected, and these serve all elements up to `end`. */
typedef struct {
    uint32_t bits[2 * CHUNK_CELLS / 32 + SLACK_WORDS];
    uint64_t begin, end;
} pattern_t;

/* Where in the pattern the bits of elements at .. at+n-1 begin; collects them first if they are not there. */
static uint64_t pattern_for(pattern_t *p, const masked_affine_args *args, uint64_t at, uint64_t n) {
    if (at < p->begin || at + n > p->end) {
        uint64_t same = args->repeat * args->inner, left = same - at % same;
        int repeats = args->inner <= CHUNK_CELLS && left >= n + args->inner;
        gather_bits(p->bits, args, at, repeats ? n + args->inner : n);
        p->begin = at;
        p->end = repeats ? at + left : at;
    }
    return (at - p->begin) % args->inner;
}

/* Every kernel body, once. An isa_<name>.c file includes a lane vocabulary and then this; it defines FD_TABLE first.
 * Here is the draw of mask bits; how bits meet data is in apply.inc.h, noise in gaussian.inc.h, dilation in
 * dilate.inc.h, fused kernels in rows.inc.h and their curves in vector_math.inc.h.
 *
 * How the draw works. A vector holds LANES mask words; one Philox group gives each of them four bit planes, most
 * significant first. All words of a mask share key and offset, and a word's groups differ in one counter word only, so
 * the first three rounds are mostly common: counter_of() does that part once per word, state_of() what is left of it
 * per group, and seven full rounds remain of ten.
 *
 * Planes are compared with the threshold's, least significant first, one instruction each for "keep" and for "equal".
 * After two groups (8 planes) one cell in 256 is undecided, which still hits nearly every block of 512. So undecided
 * words are set aside, gathered over a chunk, and only then given more groups, a full vector at a time: 2.2 groups per
 * block where deciding each block to its end takes 3.1.
 *
 * How memory is handled. dropout_forward draws a chunk ahead: while block b of this chunk is applied, block b of the
 * next is drawn, so that the multiplications of Philox fill the time in which data is in flight; the data itself is
 * prefetched PREFETCH_BYTES ahead. Bits live in a small local buffer with slack behind it; user memory is never read or
 * written beyond its end.
 */
#include "bits.h"
#include "kernels.h"
#include "philox.h"

#include <math.h>

#define INLINE static inline __attribute__((always_inline))
#define OUTLINE __attribute__((noinline))

enum {
    CHUNK_BLOCKS = 16,
    CHUNK_CELLS = CHUNK_BLOCKS * FD_BLOCK_CELLS,
    CHUNK_WORDS = (CHUNK_BLOCKS + 1) * FD_BLOCK_WORDS, /* a chunk may begin inside a block */
    SLACK_WORDS = 4,                                   /* behind buffers: bits are fetched eight bytes at a time */
    SLACK_CELLS = 64,                                  /* the same behind words in place */
    LINE_BYTES = 64,
    PREFETCH_BYTES = 8192, /* how far ahead of the data applied; measured, flat from 4 to 16 KiB */
    RUN = 32               /* cells per step of the apply loop */
};

INLINE uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
INLINE uint64_t blocks_for(uint64_t cells) { return (cells + FD_BLOCK_CELLS - 1) / FD_BLOCK_CELLS; }

/* ---- Philox ---- */

/* Words 1 to 3 of the counter are the same for all vectors of a block, so what rounds 1 to 3 make of them alone are
 * constants; those of a group belong to one upper half of the index. */
typedef struct {
    uint32_t key0[PHILOX_ROUNDS], key1[PHILOX_ROUNDS];
    uint32_t offset_low, domain;
    uint32_t round1_c2, round2_c0, high, group_round2_c2[GROUPS], group_round3_c2[GROUPS];
} philox_t;

/* What rounds 1 to 3 make of the indices, whatever the group. */
typedef struct {
    product_t p0, p1, p2;
} counter_t;

typedef struct {
    wide_t c0, c1, c2, c3;
} state_t;

static void philox_set_high(philox_t *p, uint32_t high) {
    p->high = high;
    for (uint32_t g = 0; g < GROUPS; g++) {
        uint32_t c1 = high | p->domain | g << GROUP_SHIFT;
        uint32_t c0 = mul_high(PHILOX_M1, p->offset_low) ^ c1 ^ p->key0[0];
        p->group_round2_c2[g] = mul_high(PHILOX_M0, c0) ^ p->key1[1];
        p->group_round3_c2[g] = PHILOX_M0 * c0 ^ p->key1[2];
    }
}

static void philox_prepare(philox_t *p, uint64_t seed, uint64_t offset, uint32_t domain, uint64_t index) {
    for (int r = 0; r < PHILOX_ROUNDS; r++) {
        p->key0[r] = (uint32_t)seed + (uint32_t)r * PHILOX_W0;
        p->key1[r] = (uint32_t)(seed >> 32) + (uint32_t)r * PHILOX_W1;
    }
    p->offset_low = (uint32_t)offset;
    p->domain = domain;
    p->round1_c2 = (uint32_t)(offset >> 32) ^ p->key1[0];
    p->round2_c0 = PHILOX_M1 * p->offset_low ^ p->key0[1];
    philox_set_high(p, (uint32_t)(index >> 32));
}

/* Rounds 1 to 3 as far as they do not depend on the group. */
INLINE counter_t counter_of(const philox_t *p, words_t w) {
    counter_t c;
    c.p0 = wide_mul(wide_of(w), PHILOX_M0);
    c.p1 = wide_mul(wide_xor(wide_high(c.p0), wide_set1(p->round1_c2)), PHILOX_M1);
    c.p2 = wide_mul(wide_xor(wide_high(c.p1), wide_set1(p->round2_c0)), PHILOX_M0);
    return c;
}

/* State of a group after round 3. */
INLINE state_t state_of(const philox_t *p, counter_t c, int group) {
    product_t product = wide_mul(wide_xor(wide_low(c.p0), wide_set1(p->group_round2_c2[group])), PHILOX_M1);
    state_t s;
    s.c0 = wide_xor3(wide_high(product), wide_low(c.p1), wide_set1(p->key0[2]));
    s.c1 = wide_low(product);
    s.c2 = wide_xor(wide_high(c.p2), wide_set1(p->group_round3_c2[group]));
    s.c3 = wide_low(c.p2);
    return s;
}

INLINE void philox_round(const philox_t *p, state_t *s, int r) {
    product_t p0 = wide_mul(s->c0, PHILOX_M0), p1 = wide_mul(s->c2, PHILOX_M1);
    s->c0 = wide_xor3(wide_high(p1), s->c1, wide_set1(p->key0[r]));
    s->c1 = wide_low(p1);
    s->c2 = wide_xor3(wide_high(p0), s->c3, wide_set1(p->key1[r]));
    s->c3 = wide_low(p0);
}

/* The last round, its results back in the order of the indices. */
INLINE void philox_outputs(const philox_t *p, const state_t *s, words_t output[4]) {
    const int r = PHILOX_ROUNDS - 1;
    product_t p0 = wide_mul(s->c0, PHILOX_M0), p1 = wide_mul(s->c2, PHILOX_M1);
    output[0] = words_xor3(words_high(p1), words_of(s->c1), words_set1(p->key0[r]));
    output[1] = words_low(p1);
    output[2] = words_xor3(words_high(p0), words_of(s->c3), words_set1(p->key1[r]));
    output[3] = words_low(p0);
}

/* ---- draw ---- */

enum first_look { ONE_PLANE, ONE_GROUP, TWO_GROUPS, MORE_GROUPS };

typedef struct {
    philox_t philox;
    uint32_t planes[GROUPS * PLANES_PER_GROUP]; /* threshold, spread: all ones where its bit is 1 */
    int groups;                                 /* later ones cannot change a decision: the threshold is 0 there */
    enum first_look look;
} draw_t;

/* Bits of a run of blocks, and which of their words are still undecided. */
typedef struct {
    uint32_t words[CHUNK_WORDS + SLACK_WORDS];
    uint64_t first_word; /* index of words[0] in the mask */
    counter_t
        counters[FD_BLOCK_WORDS / LANES]; /* of the block to be drawn next: begun early, they hide their latency */
    unsigned pending;                     /* undecided words: where in words they are, and which of their bits */
    uint32_t slot[CHUNK_WORDS + LANES], undecided[CHUNK_WORDS + LANES];
} chunk_t;

static void draw_prepare(draw_t *d, uint64_t seed, uint64_t offset, uint64_t threshold, uint64_t first) {
    uint32_t t = (uint32_t)threshold;
    philox_prepare(&d->philox, seed, offset, MASK_DOMAIN, first / 32);
    for (int k = 0; k < 32; k++) d->planes[k] = t >> (31 - k) & 1 ? ~0u : 0u;
    int planes = 32 - __builtin_ctz(t | 1u << 31); /* 0 < t: the caller handles keep-all and drop-all */
    d->groups = (planes + PLANES_PER_GROUP - 1) / PLANES_PER_GROUP;
    d->look = planes == 1 ? ONE_PLANE : d->groups == 1 ? ONE_GROUP : d->groups == 2 ? TWO_GROUPS : MORE_GROUPS;
}

/* Compares draws with the threshold in groups group .. group+groups-1, the first `planes` planes of each: constants
 * where called. *keep: cells not below the threshold there; *equal: cells undecided. */
INLINE void draw_groups(const draw_t *d, counter_t counter, int group, const int groups, const int planes,
                        words_t *keep, words_t *equal) {
    state_t s[2];
    words_t ge[2], eq[2];
#pragma GCC unroll 2
    for (int from = 0; from < groups; from += GROUPS_ABREAST) {
        const int to = from + GROUPS_ABREAST < groups ? from + GROUPS_ABREAST : groups;
#pragma GCC unroll 2
        for (int g = from; g < to; g++) s[g] = state_of(&d->philox, counter, group + g);
#pragma GCC unroll 6
        for (int r = 3; r < PHILOX_ROUNDS - 1; r++) {
#pragma GCC unroll 2
            for (int g = from; g < to; g++) philox_round(&d->philox, &s[g], r);
        }
#pragma GCC unroll 2
        for (int g = from; g < to; g++) {
            words_t plane[PLANES_PER_GROUP];
            philox_outputs(&d->philox, &s[g], plane);
            ge[g] = eq[g] = words_set1(~0u);
#pragma GCC unroll 4
            for (int k = planes - 1; k >= 0; k--) {
                uint32_t t = d->planes[(group + g) * PLANES_PER_GROUP + k];
                ge[g] = words_keep(ge[g], plane[k], t);
                eq[g] = words_equal(eq[g], plane[k], t);
            }
        }
    }
    *keep = groups == 2 ? words_unless(ge[0], eq[0], ge[1]) : ge[0];
    *equal = groups == 2 ? words_and(eq[0], eq[1]) : eq[0];
}

/* Decides the words set aside, a group for all of them at a time; those still undecided move to the front. */
static void draw_pending(const draw_t *d, chunk_t *chunk) {
    words_t base = words_set1((uint32_t)chunk->first_word);
    unsigned pending = chunk->pending;
    for (int g = 2; g < d->groups && pending; g++) {
        uint32_t decided[LANES];
        unsigned left = 0;
        words_store(chunk->undecided + pending, words_set1(0)); /* lanes past the last word */
        for (unsigned i = 0; i < pending; i += LANES) {
            unsigned n = pending - i < LANES ? pending - i : LANES;
            words_t slot = words_load(chunk->slot + i), undecided = words_load(chunk->undecided + i), keep, equal;
            draw_groups(d, counter_of(&d->philox, words_add(base, slot)), g, 1, PLANES_PER_GROUP, &keep, &equal);
            words_store(decided, words_unless(words_set1(~0u), undecided, keep));
            for (unsigned j = 0; j < n; j++) chunk->words[chunk->slot[i + j]] &= decided[j];
            left += words_compact(slot, words_and(undecided, equal), chunk->slot + left, chunk->undecided + left);
        }
        pending = left;
    }
    chunk->pending = 0;
}

INLINE counter_t block_counter(const draw_t *d, uint64_t first_word, unsigned v) {
    return counter_of(&d->philox, words_count_from((uint32_t)first_word + v * LANES));
}

static inline void chunk_open(const draw_t *d, chunk_t *chunk, uint64_t first_block) {
    chunk->first_word = first_block * FD_BLOCK_WORDS;
    chunk->pending = 0;
    for (unsigned v = 0; v < FD_BLOCK_WORDS / LANES; v++) chunk->counters[v] = block_counter(d, chunk->first_word, v);
}

/* First look at block b of the chunk; blocks come in order. They never straddle a multiple of 2^32 words, so the words
 * of one share the upper half of their index. */
INLINE void draw_block(draw_t *d, chunk_t *chunk, unsigned b) {
    uint64_t word = chunk->first_word + (uint64_t)b * FD_BLOCK_WORDS;
    uint32_t high = (uint32_t)(word >> 32);
    if (__builtin_expect(high != d->philox.high, 0)) {
        draw_pending(d, chunk);
        philox_set_high(&d->philox, high);
    }
    for (unsigned v = 0; v < FD_BLOCK_WORDS / LANES; v++) {
        uint32_t slot = b * FD_BLOCK_WORDS + v * LANES;
        words_t keep, equal;
        counter_t counter = chunk->counters[v];
        chunk->counters[v] = block_counter(d, word + FD_BLOCK_WORDS, v);
        switch (d->look) {
        case ONE_PLANE: draw_groups(d, counter, 0, 1, 1, &keep, &equal); break;
        case ONE_GROUP: draw_groups(d, counter, 0, 1, PLANES_PER_GROUP, &keep, &equal); break;
        case TWO_GROUPS: draw_groups(d, counter, 0, 2, PLANES_PER_GROUP, &keep, &equal); break;
        default:
            draw_groups(d, counter, 0, 2, PLANES_PER_GROUP, &keep, &equal);
            chunk->pending += words_compact(words_count_from(slot), equal, chunk->slot + chunk->pending,
                                            chunk->undecided + chunk->pending);
        }
        words_store(chunk->words + slot, keep);
    }
}

static void draw_bits(const void *arguments, uint64_t begin, uint64_t end) {
    const draw_bits_args *args = arguments;
    draw_t d;
    chunk_t chunk;
    draw_prepare(&d, args->seed, args->offset, args->threshold, args->first + (begin - args->position));
    for (uint64_t at = begin, step; at < end; at += step) {
        step = min_u64(end - at, CHUNK_CELLS);
        uint64_t cell = args->first + (at - args->position);
        unsigned lead = (unsigned)(cell % FD_BLOCK_CELLS);
        chunk_open(&d, &chunk, cell / FD_BLOCK_CELLS);
        for (unsigned b = 0; b * FD_BLOCK_CELLS < lead + step; b++) draw_block(&d, &chunk, b);
        draw_pending(&d, &chunk);
        copy_bits(args->words, at, chunk.words, lead, step);
    }
}

/* ---- apply ---- */

/* once: the line will not be wanted again soon, keep it out of the outer caches. May point past the data. */
INLINE void prefetch(const void *p, const int once) {
    if (once)
        __builtin_prefetch(p, 0, 0);
    else
        __builtin_prefetch(p, 0, 3);
}

/* copy_bits for whole chunks of a mask that is written around the cache: ordinary stores between streaming ones cost
 * the memory system several times their share. */
INLINE void store_bits(uint32_t *to, uint64_t to_position, const uint32_t *from, uint64_t from_position, uint64_t n,
                       int stream) {
    uint32_t *line = to + to_position / 32;
    if (!stream || n != CHUNK_CELLS || from_position || to_position % 32 || (uintptr_t)line % LINE_BYTES) {
        copy_bits(to, to_position, from, from_position, n);
        return;
    }
    for (unsigned w = 0; w < CHUNK_CELLS / 32; w += LANES) words_stream(line + w, words_load(from + w));
}

/* The RUN bits from a position on; the buffer has eight bytes of slack. bytewise: the position is known to be a
 * multiple of 8, and the load can broadcast straight from memory. */
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

/* Bits of elements at .. at+n-1 of data (outer, repeat, inner) under a mask (outer, inner). */
static void gather_bits(uint32_t *to, const masked_affine_args *args, uint64_t at, uint64_t n) {
    writer_t writer = {(unsigned char *)to, 0, 0};
    if (args->repeat == 1) {
        append_copy(&writer, args->words, args->position + at, n);
    } else {
        uint64_t row = at / args->inner, i = at % args->inner; /* row counts (outer, repeat) */
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

/* Bits of a chunk, and of `inner` elements after it where those up to `end` only repeat them. */
typedef struct {
    uint32_t bits[2 * CHUNK_CELLS / 32 + SLACK_WORDS];
    uint64_t begin, end;
} pattern_t;

/* Where in the pattern the bits of elements at .. at+n-1 begin. */
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

/* Elements until y reaches a cache line; 0 where it never does. */
#define ELEMENTS_TO_LINE(y) ((uintptr_t)(y) % sizeof *(y) ? 0 : (unsigned)(-(uintptr_t)(y) % LINE_BYTES / sizeof *(y)))

#include "gaussian.inc.h"

#define DTYPE f32
#include "apply.inc.h"
#define DTYPE f64
#include "apply.inc.h"
#define DTYPE f16
#include "apply.inc.h"
#define DTYPE bf16
#include "apply.inc.h"

#define DEFINE_BY_DTYPE(op)                                                                                            \
    static void op(const void *arguments, uint64_t begin, uint64_t end) {                                              \
        const op##_args *args = arguments;                                                                             \
        switch (args->dtype) {                                                                                         \
        case FD_FLOAT32: f32_##op(args, begin, end); break;                                                            \
        case FD_FLOAT64: f64_##op(args, begin, end); break;                                                            \
        case FD_FLOAT16: f16_##op(args, begin, end); break;                                                            \
        default: bf16_##op(args, begin, end); break;                                                                   \
        }                                                                                                              \
    }
DEFINE_BY_DTYPE(dropout_forward)
DEFINE_BY_DTYPE(masked_affine)
DEFINE_BY_DTYPE(gaussian_multiply)

#include "dilate.inc.h"
#include "vector_math.inc.h"

/* ---- fused kernels ---- */

enum { STRIP_CELLS = 1024 }; /* of a fused kernel's data that go through its stages at a time, in the nearest cache */

typedef struct {
    const uint32_t *words; /* NULL: all kept */
    uint64_t cells;
} bits_t;

/* Words that are drawn while the data they meet is on its way, a chunk ahead of it as in dropout_forward. */
typedef struct {
    bits_t bits;
    const draw_bits_args *args;
    uint64_t at, n, end; /* cells at .. at+n-1 are being drawn, of a thread's part up to end; those below are there */
    unsigned lead;       /* of cell `at` in its block */
    unsigned blocks, begun; /* of the chunk, and of those drawn so far */
    draw_t draw;
    chunk_t chunk;
} drawing_t;

static void drawing_next(drawing_t *d) {
    uint64_t cell = d->args->first + d->at;
    d->n = min_u64(d->end - d->at, CHUNK_CELLS);
    d->lead = (unsigned)(cell % FD_BLOCK_CELLS);
    d->blocks = d->n ? (unsigned)blocks_for(d->lead + d->n) : 0;
    d->begun = 0;
    if (d->n) chunk_open(&d->draw, &d->chunk, cell / FD_BLOCK_CELLS);
}

/* A thread's part, begin .. end-1, of so many cells; draw is NULL where the words are there. Where they are not, what
 * comes after the end is another thread's, who may be writing it. */
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
    drawing_next(d);
}

/* Before each strip: draws what it still lacks up to its end, and of the next chunk as many blocks as a strip has. */
static OUTLINE void draw_until(drawing_t *d, uint64_t until) {
    while (d->at < until) {
        for (; d->begun < d->blocks; d->begun++) draw_block(&d->draw, &d->chunk, d->begun);
        draw_pending(&d->draw, &d->chunk);
        copy_bits(d->args->words, d->at, d->chunk.words, d->lead, d->n);
        d->at += d->n;
        drawing_next(d);
    }
    for (int more = STRIP_CELLS / FD_BLOCK_CELLS; more && d->begun < d->blocks; more--)
        draw_block(&d->draw, &d->chunk, d->begun++);
}

/* n <= RUN bits from a position on; those above may be anything. */
INLINE uint32_t run_at(const bits_t *bits, uint64_t position, unsigned n) {
    if (!bits->words) return ~0u;
    if (bits->cells - position >= SLACK_CELLS) return bits_at(bits->words, position, 0);
    return read_bits(bits->words, position, n);
}

/* The first row of a panel: the first of them have one more than the last, where they don't come out even. */
INLINE uint64_t panel_row(uint64_t rows, uint64_t panels, uint64_t panel) {
    return panel * (rows / panels) + min_u64(panel, rows % panels);
}

/* Has the data that comes later on its way. May point past its end. */
#define AHEAD(data, stream) prefetch((const char *)(data) + PREFETCH_BYTES, stream)

/* 16-bit numbers to float32 and back. */
#define DEFINE_STORAGE(T)                                                                                              \
    static void T##_widen(const T##_t *from, float *to, uint64_t n) {                                                  \
        uint64_t i = 0;                                                                                                \
        for (; i + f32_lanes <= n; i += f32_lanes) {                                                                   \
            AHEAD(from + i, 0);                                                                                        \
            f32_store(to + i, T##_load_lanes(from + i));                                                               \
        }                                                                                                              \
        if (i < n) {                                                                                                   \
            T##_t few[f32_lanes] = {0};                                                                                \
            float wide[f32_lanes];                                                                                     \
            memcpy(few, from + i, (n - i) * sizeof *few);                                                              \
            f32_store(wide, T##_load_lanes(few));                                                                      \
            memcpy(to + i, wide, (n - i) * sizeof *wide);                                                              \
        }                                                                                                              \
    }                                                                                                                  \
    static void T##_narrow(const float *from, T##_t *to, uint64_t n, int stream) {                                     \
        uint64_t i = 0;                                                                                                \
        for (; stream && i + f32_lanes <= n; i += f32_lanes) T##_stream_lanes(to + i, f32_load(from + i));             \
        for (; i + f32_lanes <= n; i += f32_lanes) T##_store_lanes(to + i, f32_load(from + i));                        \
        if (i < n) {                                                                                                   \
            float few[f32_lanes] = {0};                                                                                \
            T##_t narrow[f32_lanes];                                                                                   \
            memcpy(few, from + i, (n - i) * sizeof *few);                                                              \
            T##_store_lanes(narrow, f32_load(few));                                                                    \
            memcpy(to + i, narrow, (n - i) * sizeof *narrow);                                                          \
        }                                                                                                              \
    }
#define f16_load_lanes f16_load
#define f16_store_lanes f16_store
#define f16_stream_lanes f16_stream
DEFINE_STORAGE(f16)
DEFINE_STORAGE(bf16)

/* How far a strip goes: to where a line of the output begins, then by whole strips. */
INLINE uint64_t strip_after(uint64_t lead) { return lead && lead < STRIP_CELLS ? lead : STRIP_CELLS; }

#define CTYPE f32
#include "rows.inc.h"
#define CTYPE f64
#include "rows.inc.h"

#define DEFINE_BY_WIDTH(op)                                                                                            \
    static void op(const void *arguments, uint64_t begin, uint64_t end) {                                              \
        const op##_args *args = arguments;                                                                             \
        if (args->dtype == FD_FLOAT64)                                                                                 \
            f64_##op(args, begin, end);                                                                                \
        else                                                                                                           \
            f32_##op(args, begin, end);                                                                                \
    }
DEFINE_BY_WIDTH(pointwise_forward)
DEFINE_BY_WIDTH(pointwise_backward)
DEFINE_BY_WIDTH(norm_forward)
DEFINE_BY_WIDTH(norm_backward)
DEFINE_BY_WIDTH(softmax_forward)
DEFINE_BY_WIDTH(softmax_backward)

/* The panels' sums into the first panel's, one after the other: the order in which they are added is the shape's. */
static void add_panels(const void *arguments, uint64_t begin, uint64_t end) {
    const add_panels_args *args = arguments;
    for (uint64_t at = begin, n; at < end; at += n) {
        n = min_u64(end - at, STRIP_CELLS);
        for (uint64_t panel = 1; panel < args->panels; panel++) {
            if (args->wide) {
                double *total = (double *)args->sums + at;
                f64_add(total, total + panel * args->width, total, n);
            } else {
                float *total = (float *)args->sums + at;
                f32_add(total, total + panel * args->width, total, n);
            }
        }
    }
}

static void scale_float32(const float *x, float *y, uint64_t n, float a, int stream) {
    uint64_t i = 0;
    f32_v scale = f32_set1(a);
    if ((uintptr_t)y % LINE_BYTES) stream = 0;
    for (; i + RUN <= n; i += RUN) {
        for (unsigned byte = 0; byte < RUN * sizeof *x; byte += LINE_BYTES)
            prefetch((const char *)(x + i) + PREFETCH_BYTES + byte, stream);
#pragma GCC unroll 4
        for (unsigned k = 0; k < RUN; k += f32_lanes) {
            f32_v v = f32_scale(f32_mask(~0u, 0), f32_load(x + i + k), scale);
            if (stream)
                f32_stream(y + i + k, v);
            else
                f32_store(y + i + k, v);
        }
    }
    for (; i < n; i++) { /* through bytes: any alignment is legal */
        float v;
        memcpy(&v, x + i, sizeof v);
        v *= a;
        memcpy(y + i, &v, sizeof v);
    }
    if (stream) stream_fence();
}

const fd_table FD_TABLE = {
    .add_panels = add_panels,
    .scale_float32 = scale_float32,
#define FD_OP(name, PARAMETERS) .name = name,
#include "ops.def"
#undef FD_OP
};

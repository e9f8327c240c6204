/* Drawing mask bits: the primitive draw_bits, and draw_block and draw_pending for kernels that draw while they work.
 * Included once by kernels.inc.h. philox.h has Philox itself in scalar form.
 *
 * A cell is kept if its 32-bit random number is not below the threshold. The random numbers of the 32 cells of a mask
 * word are stored across 32 bit planes: plane k is a word that holds bit 31 - k of each number. One Philox call, a
 * "group", gives four planes for one mask word. Comparing by planes takes one instruction for "keep" and one for
 * "equal", whatever the number of cells, and most thresholds need few planes.
 *
 * A vector holds LANES mask words. All words of a mask share key and offset, and the groups of a word differ in one
 * counter word only, so most of the first three rounds is common: counter_of() does that part once per word, state_of()
 * does the rest of it per group, and seven of the ten rounds remain.
 *
 * After two groups (8 planes) one cell in 256 is undecided, which still hits nearly every block of 512 cells. Undecided
 * words are therefore set aside, collected over a chunk, and then given more groups a full vector at a time. That takes
 * 2.2 groups per block; deciding each block to its end would take 3.1.
 */

/* What is the same for all words of a call. Counter words 1 to 3 do not differ between the vectors of a block, so the
 * values that rounds 1 to 3 compute from them alone are computed once. Those with an entry per group hold for one upper
 * half of the word index, `high`. */
typedef struct {
    uint32_t key0[PHILOX_ROUNDS], key1[PHILOX_ROUNDS];
    uint32_t offset_low, domain;
    uint32_t round1_c2, round2_c0, high, group_round2_c2[GROUPS], group_round3_c2[GROUPS];
} philox_t;

/* The part of rounds 1 to 3 that depends on the word index but not on the group. */
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

INLINE counter_t counter_of(const philox_t *p, words_t w) {
    counter_t c;
    c.p0 = wide_mul(wide_of(w), PHILOX_M0);
    c.p1 = wide_mul(wide_xor(wide_high(c.p0), wide_set1(p->round1_c2)), PHILOX_M1);
    c.p2 = wide_mul(wide_xor(wide_high(c.p1), wide_set1(p->round2_c0)), PHILOX_M0);
    return c;
}

/* The state of one group after round 3. */
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

/* The last round. Its results are back in the order of the word indices. */
INLINE void philox_outputs(const philox_t *p, const state_t *s, words_t output[4]) {
    const int r = PHILOX_ROUNDS - 1;
    product_t p0 = wide_mul(s->c0, PHILOX_M0), p1 = wide_mul(s->c2, PHILOX_M1);
    output[0] = words_xor3(words_high(p1), words_of(s->c1), words_set1(p->key0[r]));
    output[1] = words_low(p1);
    output[2] = words_xor3(words_high(p0), words_of(s->c3), words_set1(p->key1[r]));
    output[3] = words_low(p0);
}

/* How many planes draw_block compares: all that the threshold has, but two groups at most. MORE_GROUPS: draw_pending
 * decides the rest. */
enum first_look { ONE_PLANE, ONE_GROUP, TWO_GROUPS, MORE_GROUPS };

typedef struct {
    philox_t philox;
    uint32_t planes[GROUPS * PLANES_PER_GROUP]; /* the threshold's bits, highest first, each spread over a word */
    int groups;                                 /* that can change a decision: below them the threshold is 0 */
    enum first_look look;
} draw_t;

/* The bits of up to CHUNK_BLOCKS + 1 neighbouring blocks, or of words that are listed, and which of the words are still
 * undecided. */
typedef struct {
    uint32_t words[CHUNK_WORDS + SLACK_WORDS];
    const uint32_t *low;                        /* of listed words: lower halves of their indices; of blocks NULL */
    uint64_t first_word;                        /* of blocks: index of words[0] in the mask */
    counter_t counters[FD_BLOCK_WORDS / LANES]; /* of the next block: computed a block early to hide the latency */
    unsigned pending;                           /* how many words are undecided; slot: where, undecided: which bits */
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

/* Compares random numbers with the threshold in groups group .. group+groups-1, the first `planes` planes of each; the
 * callers pass constants. *keep: cells not below the threshold there; *equal: cells still undecided. */
INLINE void draw_groups(const draw_t *d, counter_t counter, int group, const int groups, const int planes,
                        words_t *keep, words_t *equal) {
    state_t s[2];
    words_t ge[2], eq[2];
#pragma GCC unroll 2
    for (int from = 0; from < groups; from += UNROLL_GROUPS) {
        const int to = from + UNROLL_GROUPS < groups ? from + UNROLL_GROUPS : groups;
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

/* Lower halves of the indices of pending words i .. i+n-1 of a list. */
INLINE words_t listed_at(const chunk_t *chunk, unsigned i, unsigned n) {
    uint32_t low[LANES] = {0};
    for (unsigned j = 0; j < n; j++) low[j] = chunk->low[chunk->slot[i + j]];
    return words_load(low);
}

/* Decides the words that were set aside, by one more group for all of them at a time. Words that are still undecided
 * after it move to the front. */
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
            words_t index = chunk->low ? listed_at(chunk, i, n) : words_add(base, slot);
            draw_groups(d, counter_of(&d->philox, index), g, 1, PLANES_PER_GROUP, &keep, &equal);
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
    chunk->low = NULL;
    chunk->first_word = first_block * FD_BLOCK_WORDS;
    chunk->pending = 0;
    for (unsigned v = 0; v < FD_BLOCK_WORDS / LANES; v++) chunk->counters[v] = block_counter(d, chunk->first_word, v);
}

/* Draws a vector of the chunk's words and sets aside what is undecided after two groups. */
INLINE void draw_words(const draw_t *d, chunk_t *chunk, counter_t counter, uint32_t slot) {
    words_t keep, equal;
    switch (d->look) {
    case ONE_PLANE: draw_groups(d, counter, 0, 1, 1, &keep, &equal); break;
    case ONE_GROUP: draw_groups(d, counter, 0, 1, PLANES_PER_GROUP, &keep, &equal); break;
    default: draw_groups(d, counter, 0, 2, PLANES_PER_GROUP, &keep, &equal);
    }
    words_store(chunk->words + slot, keep);
    if (d->look == MORE_GROUPS)
        chunk->pending += words_compact(words_count_from(slot), equal, chunk->slot + chunk->pending,
                                        chunk->undecided + chunk->pending);
}

/* Draws block b of the chunk and sets aside what is undecided after two groups. Blocks come in order. A block never
 * straddles a multiple of 2^32 words, so all of its words have the same upper half of the index. */
INLINE void draw_block(draw_t *d, chunk_t *chunk, unsigned b) {
    uint64_t word = chunk->first_word + (uint64_t)b * FD_BLOCK_WORDS;
    uint32_t high = (uint32_t)(word >> 32);
    if (__builtin_expect(high != d->philox.high, 0)) {
        draw_pending(d, chunk);
        philox_set_high(&d->philox, high);
    }
    for (unsigned v = 0; v < FD_BLOCK_WORDS / LANES; v++) {
        counter_t counter = chunk->counters[v];
        chunk->counters[v] = block_counter(d, word + FD_BLOCK_WORDS, v);
        draw_words(d, chunk, counter, b * FD_BLOCK_WORDS + v * LANES);
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

/* draw_rows: the bits of rows of cells that lie apart in the mask, side by side. Included once by kernels.inc.h.
 *
 * The words that hold the rows' cells are listed, so that a vector of LANES words is full however short the rows are:
 * a row of 125 cells needs five words at most, but lies in one or two blocks of sixteen. A list of words is drawn; then
 * the runs of its bits that belong to rows are appended to the output, in a local buffer.
 *
 * Listing and appending are scalar work, the draw is vector work. Words are therefore listed shortly before they are
 * drawn, and a list's runs are appended while the next list is drawn, so that the CPU does all three at once.
 */
enum {
    RUN_CELLS = 2 * FD_BLOCK_CELLS, /* a long row is cut into runs at the multiples of it */
    LISTED_WORDS = CHUNK_BLOCKS * FD_BLOCK_WORDS,
    LISTED_AHEAD = 8,                                /* blocks of words */
    PACKED_WORDS = LISTED_WORDS + 2 + RUN_CELLS / 32 /* what is there before, and what comes along with a run */
};

typedef struct {
    uint32_t position, n; /* bits position .. position+n-1 of the list's words */
} run_t;

typedef struct {
    uint32_t low[LISTED_WORDS + FD_BLOCK_WORDS]; /* lower halves of the words' indices in the mask */
    run_t runs[LISTED_WORDS];                    /* rows, or parts of rows */
    unsigned words, count;                       /* words and runs that are listed */
    uint32_t high;                               /* upper half of the words' indices */
    chunk_t chunk;                               /* the words' bits */
} list_t;

/* Where in the mask the cells that are to be listed are. Cells are listed past the last one, to the end of a run: what
 * is drawn for them is not copied. */
typedef struct {
    const draw_rows_args *args;
    uint64_t cell, left;              /* the next cell; cells from it to the end of its row */
    uint64_t row, rows_left, row_set; /* first cells of its row and of the row's set of `rows`; rows to the set's end */
    int64_t cells;                    /* to be listed still */
} cursor_t;

static cursor_t cursor_at(const draw_rows_args *args, uint64_t i, uint64_t cells) {
    uint64_t row = i / args->columns, column = i % args->columns, o = row / args->rows, r = row % args->rows;
    cursor_t c = {.args = args, .left = args->columns - column, .rows_left = args->rows - r, .cells = (int64_t)cells};
    c.row_set = args->first + o * args->outer_pitch;
    c.row = c.row_set + r * args->pitch;
    c.cell = c.row + column;
    return c;
}

/* Lists short rows while they fit whole, but not the last of a set. Returns how many. */
static unsigned list_rows(list_t *list, cursor_t *at, unsigned wanted) {
    const uint64_t columns = at->args->columns, pitch = at->args->pitch;
    const unsigned most = (unsigned)(columns + 62) / 32; /* words of a row */
    const unsigned stop = wanted < LISTED_WORDS + 1 - most ? wanted : LISTED_WORDS + 1 - most;
    uint64_t rows = min_u64(at->rows_left - 1, (uint64_t)at->cells / columns + 1), cell = at->cell;
    unsigned words = list->words, count = list->count;
    const words_t lanes = words_set1(LANES);
    if (!rows || (uint32_t)((cell + (rows - 1) * pitch + columns - 1) >> 37) != list->high) return 0;
    for (; rows && words < stop; rows--) {
        const unsigned lead = cell % 32;
        words_t index = words_count_from((uint32_t)(cell / 32));
        for (unsigned i = 0; i < most; i += LANES, index = words_add(index, lanes))
            words_store(list->low + words + i, index);
        list->runs[count++] = (run_t){32 * words + lead, (uint32_t)columns};
        words += (lead + (unsigned)columns + 31) / 32;
        cell += pitch;
    }
    at->cell = at->row = cell;
    const unsigned listed = count - list->count;
    at->rows_left -= listed;
    at->cells -= (int64_t)(listed * columns);
    list->words = words;
    list->count = count;
    return listed;
}

/* Lists a run: what is left of a row, if that is short and fits. */
static void list_run(list_t *list, cursor_t *at) {
    const unsigned lead = at->cell % 32;
    const uint64_t limit = (uint64_t)(list->high + 1) << 37; /* of cells; 2^64 is 0 here */
    const uint64_t room = min_u64(32 * (uint64_t)(LISTED_WORDS - list->words) - lead, limit - at->cell);
    const uint64_t n = min_u64(room, at->left <= RUN_CELLS ? at->left : RUN_CELLS - at->cell % RUN_CELLS);
    const unsigned words = (unsigned)(lead + n + 31) / 32;
    for (unsigned i = 0; i < words; i += LANES)
        words_store(list->low + list->words + i, words_count_from((uint32_t)(at->cell / 32) + i));
    list->runs[list->count++] = (run_t){32 * list->words + lead, (uint32_t)n};
    list->words += words;
    at->cells -= (int64_t)n;
    at->cell += n;
    at->left -= n;
    if (at->left) return;
    at->row += at->args->pitch;
    if (--at->rows_left == 0) {
        at->row_set += at->args->outer_pitch;
        at->row = at->row_set;
        at->rows_left = at->args->rows;
    }
    at->cell = at->row;
    at->left = at->args->columns;
}

/* Lists words, and the runs of bits in them, until there are `wanted` words or no more fit. */
static void list_words(list_t *list, cursor_t *at, unsigned wanted) {
    const uint64_t columns = at->args->columns;
    wanted = wanted < LISTED_WORDS ? wanted : LISTED_WORDS;
    while (list->words < wanted && at->cells > 0 && (uint32_t)(at->cell >> 37) == list->high) {
        if (columns > RUN_CELLS || at->left < columns || !list_rows(list, at, wanted)) list_run(list, at);
    }
}

static void list_open(list_t *list, draw_t *d, cursor_t *at) {
    list->chunk.low = list->low;
    list->chunk.pending = list->words = list->count = 0;
    list->high = (uint32_t)(at->cell >> 37);
    if (list->high != d->philox.high) philox_set_high(&d->philox, list->high);
    list_words(list, at, LISTED_AHEAD * FD_BLOCK_WORDS);
}

/* Bits that are on their way to the output: n, and anything behind them. */
typedef struct {
    uint32_t words[PACKED_WORDS];
    unsigned n;
} packed_t;

/* 64 bits of a list, from bit `shift` (below 32) of the word at `from` on. */
INLINE uint64_t long_from(const unsigned char *from, unsigned shift) {
    uint64_t bits, later;
    memcpy(&bits, from, sizeof bits);
    memcpy(&later, from + 4, sizeof later);
    return bits >> shift | later << (32 - shift);
}

/* Appends a run, 64 bits of the output at a time. The bits of the list before and behind the run come along: what was
 * there stays instead of the former, and what is appended next replaces the latter. */
INLINE void append_run_of(packed_t *to, const list_t *list, run_t run) {
    const unsigned n = to->n, have = n % 64;
    const unsigned position = 64 + run.position - have; /* of the first 64 bits, counted from `from` on */
    const unsigned bytes = (run.n + 126) / 64 * 8;      /* for any `have`: rows of one length branch alike */
    const unsigned char *from = (const unsigned char *)list + offsetof(list_t, chunk.words) - 8;
    unsigned char *at = (unsigned char *)to + offsetof(packed_t, words);
    uint64_t before, bits;
    to->n = n + run.n;
    if ((n | run.position) % 32 == 0) {
        memcpy(at + n / 8, from + 8 + run.position / 8, RUN_CELLS / 8);
        return;
    }
    from += position / 32 * 4;
    at += n / 64 * 8;
    memcpy(&before, at, sizeof before);
    bits = long_from(from, position % 32);
    bits = before ^ ((before ^ bits) & ~0ull << have);
    memcpy(at, &bits, sizeof bits);
    for (unsigned done = 8; done < bytes; done += 8) {
        bits = long_from(from + done, position % 32);
        memcpy(at + done, &bits, sizeof bits);
    }
}

/* Lists and draws words, and appends the runs of the list before meanwhile. */
static void draw_list(draw_t *d, list_t *list, cursor_t *at, const list_t *before, packed_t *packed) {
    const unsigned each = before->count * FD_BLOCK_WORDS / LISTED_WORDS + 1; /* runs for each block */
    unsigned appended = 0;
    list_open(list, d, at);
    for (unsigned v = 0; v < FD_BLOCK_WORDS / LANES; v++)
        list->chunk.counters[v] = counter_of(&d->philox, words_load(list->low + v * LANES));
    for (unsigned slot = 0; slot < list->words; slot += FD_BLOCK_WORDS) {
        if (list->words < slot + 2 * FD_BLOCK_WORDS) list_words(list, at, slot + LISTED_AHEAD * FD_BLOCK_WORDS);
        for (unsigned v = 0; v < FD_BLOCK_WORDS; v += LANES) {
            const counter_t counter = list->chunk.counters[v / LANES];
            list->chunk.counters[v / LANES] = counter_of(&d->philox, words_load(list->low + slot + FD_BLOCK_WORDS + v));
            draw_words(d, &list->chunk, counter, slot + v);
        }
        const unsigned stop = appended + each < before->count ? appended + each : before->count;
        for (; appended < stop; appended++) append_run_of(packed, before, before->runs[appended]);
    }
    while (appended < before->count) append_run_of(packed, before, before->runs[appended++]);
    draw_pending(d, &list->chunk);
}

static void draw_rows(const void *arguments, uint64_t begin, uint64_t end) {
    draw_rows_args args = *(const draw_rows_args *)arguments;
    uint32_t *to = (uint32_t *)args.words + begin / 32;
    draw_t d;
    list_t lists[2];
    packed_t packed;
    uint64_t left = begin % 32 + (end - begin); /* bits of the output from `to` on */
    if (args.pitch == args.columns) {           /* one long row */
        args.columns *= args.rows;
        args.rows = 1;
    }
    cursor_t at = cursor_at(&args, begin - args.position, end - begin);
    packed.n = begin % 32;
    if (packed.n) packed.words[0] = word_at(to);
    draw_prepare(&d, args.seed, args.offset, args.threshold, at.cell);
    lists[0].count = 0;
    for (unsigned turn = 0;; turn ^= 1) {
        draw_list(&d, &lists[turn ^ 1], &at, &lists[turn], &packed);
        if (packed.n >= left) break;
        const unsigned words = packed.n / 64 * 2;
        memcpy(to, packed.words, words * sizeof *to);
        memcpy(packed.words, packed.words + words, 2 * sizeof *to);
        to += words;
        left -= 32 * words;
        packed.n %= 64;
    }
    copy_bits(to, 0, packed.words, 0, left);
}

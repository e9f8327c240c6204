/* The primitives of attention: each instruction set against a plain loop in double, several threads against one, given
 * words against drawn ones, misaligned arrays; what they refuse, and that a lack of memory is an error. The Python
 * suite tests them against its reference. */
#define _GNU_SOURCE /* setrlimit */
#include "testing.h"

#include "kernels.h"

#if !defined(_WIN32)
#include <sys/resource.h>
#endif

/* A sanitizer's malloc returns NULL too where there is no memory. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }
const char *__tsan_default_options(void);
const char *__tsan_default_options(void) { return "allocator_may_return_null=1"; }

/* Sanitizers need more memory than any limit, and refuse such sizes by themselves. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { LIMITED = 0 };
#else
enum { LIMITED = 1 };
#endif

enum { POISON = 0xA5, THREADS = 3, NO_MASK = -1 };
static const double A = 1.25;

#define PASS(type, name) a->name
#define PASS_NEXT(type, name) , a->name
static int forward(const attention_forward_args *a) {
    return fd_attention_forward(ATTENTION_FORWARD_PARAMETERS(PASS, PASS_NEXT));
}
static int backward(const attention_backward_args *a) {
    return fd_attention_backward(ATTENTION_BACKWARD_PARAMETERS(PASS, PASS_NEXT));
}

/* The arrays of both calls, those with strides first, in their order. */
enum { QUERY, KEY, VALUE, MASK, DY, DMASK, Y, STATISTICS, DQUERY, DKEY, DVALUE, WORDS, ARRAYS };

typedef struct {
    int isa, dtype, mask_dtype, causal, by_rows; /* by_rows: query, key, value and dy are [rows, outer, heads, ...] */
    uint64_t outer, heads, group, queries, keys, width, value_width, parts, first, threshold;
    strides_t strides[FD_STRIDES];
    unsigned shared;       /* bits of the axes of mask and dmask whose stride is 0 */
    unsigned shared_cells; /* the same for the cells of the mask of dropout */
    uint32_t state;
} test_t;

static void fail(const test_t *t, const char *what) {
    char text[200];
    snprintf(text, sizeof text, "attention: %s, dtypes %d %d, causal %d, shared axes %x, heads %d x %d, widths %d %d",
             what, t->dtype, t->mask_dtype, t->causal, t->shared, (int)t->heads, (int)t->group, (int)t->width,
             (int)t->value_width);
    expect(0, text, t->isa, t->queries, t->keys);
}

static uint64_t heads_of(const test_t *t) { return t->heads * t->group; }

/* Outer, heads, rows and columns of cells. */
static void cells_of(const test_t *t, uint64_t extents[4]) {
    const uint64_t all[4] = {t->outer, heads_of(t), t->queries, t->keys};
    for (int i = 0; i < 4; i++) extents[i] = t->shared_cells >> i & 1 ? 1 : all[i];
}

static uint64_t count_of_cells(const test_t *t) {
    uint64_t extents[4];
    cells_of(t, extents);
    return extents[0] * extents[1] * extents[2] * extents[3];
}

static void set_cell_strides(test_t *t) {
    uint64_t extents[4], step = 1;
    cells_of(t, extents);
    for (int i = 3; i >= 0; i--) {
        (&t->strides[FD_CELL_STRIDES].outer)[i] = t->shared_cells >> i & 1 ? 0 : step;
        step *= extents[i];
    }
}

static int dtype_of(const test_t *t, int array) {
    const int wide = t->dtype == FD_FLOAT64 ? FD_FLOAT64 : FD_FLOAT32;
    if (array == MASK) return t->mask_dtype;
    return array == STATISTICS || array == DQUERY || array == DMASK ? wide : t->dtype;
}

/* Outer, heads, rows and columns. */
static void extents_of(const test_t *t, int array, uint64_t extents[4]) {
    const int of_keys = array == KEY || array == VALUE || array == DKEY || array == DVALUE;
    const int wide = array == VALUE || array == DVALUE || array == DY || array == Y;
    extents[0] = t->outer * (array == DQUERY ? t->parts : 1);
    extents[1] = of_keys ? t->heads : heads_of(t);
    extents[2] = of_keys ? t->keys : t->queries;
    extents[3] = array == MASK || array == DMASK ? t->keys : array == STATISTICS ? 2 : wide ? t->value_width : t->width;
}

static void set_strides(test_t *t, int array) {
    uint64_t extents[4], *strides = &t->strides[array].outer, step = 1;
    const int masks = array == MASK || array == DMASK, by_rows = t->by_rows && !masks;
    const int order[4] = {3, by_rows ? 1 : 2, by_rows ? 0 : 1, by_rows ? 2 : 0};
    extents_of(t, array, extents);
    for (int i = 0; i < 4; i++) {
        strides[order[i]] = masks && t->shared >> order[i] & 1 ? 0 : step;
        if (strides[order[i]]) step *= extents[order[i]];
    }
}

/* Elements; the last one that strides reach is the array's last. */
static uint64_t count_of(const test_t *t, int array) {
    uint64_t extents[4], reach = 1;
    extents_of(t, array, extents);
    if (array == WORDS) return (t->first + count_of_cells(t) + 31) / 32;
    if (array > DMASK) return extents[0] * extents[1] * extents[2] * extents[3];
    for (int i = 0; i < 4; i++) reach += (extents[i] - 1) * (&t->strides[array].outer)[i];
    return reach;
}

static size_t bytes_of(const test_t *t, int array) {
    return count_of(t, array) * (array == WORDS                  ? 4
                                 : dtype_of(t, array) == FD_BOOL ? 1
                                                                 : element_bytes(dtype_of(t, array)));
}

static int has(const test_t *t, int array) {
    if (array == MASK) return t->mask_dtype != NO_MASK;
    return array != DMASK || (t->mask_dtype != NO_MASK && t->mask_dtype != FD_BOOL);
}

/* Words hold the bits that would be drawn. What is added to begins as 0. */
static void open_arrays(const test_t *t, size_t shift, array_t arrays[ARRAYS]) {
    for (int i = 0; i < ARRAYS; i++) {
        if (!has(t, i)) continue;
        arrays[i] = array(bytes_of(t, i), shift, i == DQUERY || i == DMASK ? 0 : POISON);
        if (i == WORDS) {
            const uint64_t cells = t->first + count_of_cells(t);
            fd_isa_select(0);
            expect(fd_draw_bits(arrays[i].at, 0, 0, cells, 3, 5, t->threshold) == FD_OK, "draw", 0, cells, 0);
        } else if (i == MASK && t->mask_dtype == FD_BOOL) {
            fill_random(arrays[i].at, bytes_of(t, i), t->state);
            for (size_t k = 0; k < bytes_of(t, i); k++) arrays[i].at[k] &= 1;
        } else if (i < DMASK) {
            fill_numbers(dtype_of(t, i), arrays[i].at, count_of(t, i), t->state + (uint32_t)i, 0);
        }
    }
}

static void close_arrays(array_t arrays[ARRAYS]) {
    for (int i = 0; i < ARRAYS; i++) free(arrays[i].block);
}

/* Both passes. */
static void run(const test_t *t, int threads, int given, const array_t arrays[ARRAYS]) {
#define BOTH                                                                                                           \
    .dtype = t->dtype, .mask_dtype = t->mask_dtype, .query = arrays[QUERY].at, .key = arrays[KEY].at,                  \
    .value = arrays[VALUE].at, .mask = arrays[MASK].at, .words = given ? arrays[WORDS].at : NULL, .y = arrays[Y].at,   \
    .statistics = arrays[STATISTICS].at, .strides = t->strides, .outer = t->outer, .heads = t->heads,                  \
    .group = t->group, .queries = t->queries, .keys = t->keys, .width = t->width, .value_width = t->value_width,       \
    .first = t->first, .seed = 3, .offset = 5, .threshold = t->threshold, .softmax_scale = 0.4, .a = A,                \
    .causal = t->causal
    const attention_forward_args first = {BOTH};
    const attention_backward_args second = {BOTH,
                                            .dy = arrays[DY].at,
                                            .dquery = arrays[DQUERY].at,
                                            .dkey = arrays[DKEY].at,
                                            .dvalue = arrays[DVALUE].at,
                                            .dmask = arrays[DMASK].at,
                                            .parts = t->parts};
#undef BOTH
    fd_isa_select(t->isa);
    fd_set_num_threads(threads);
    if (forward(&first) != FD_OK || backward(&second) != FD_OK) fail(t, "status");
    fd_set_num_threads(1);
}

static void expect_same(const test_t *t, const char *what, const array_t *a, const array_t *b) {
    for (int i = Y; i < WORDS; i++)
        if (memcmp(a[i].at, b[i].at, bytes_of(t, i))) fail(t, what);
    if (has(t, DMASK) && memcmp(a[DMASK].at, b[DMASK].at, bytes_of(t, DMASK))) fail(t, what);
}

/* ---- the plain loop ---- */

static uint64_t index_of(const test_t *t, int array, uint64_t outer, uint64_t head, uint64_t row, uint64_t column) {
    const strides_t *s = &t->strides[array];
    return outer * s->outer + head * s->head + row * s->row + column * s->column;
}

static double number_of(const test_t *t, const array_t *arrays, int array, uint64_t outer, uint64_t head, uint64_t row,
                        uint64_t column) {
    return value_at(dtype_of(t, array), arrays[array].at, index_of(t, array, outer, head, row, column));
}

/* The sum over i < n of numbers (row, i) of two arrays, the second of a head of keys. */
static double dot(const test_t *t, const array_t *arrays, int x, int y, uint64_t outer, uint64_t head, uint64_t row,
                  uint64_t key, uint64_t n) {
    double sum = 0;
    for (uint64_t i = 0; i < n; i++)
        sum += number_of(t, arrays, x, outer, head, row, i) * number_of(t, arrays, y, outer, head / t->group, key, i);
    return sum;
}

/* A row of probabilities, and its two statistics. */
static void plain_softmax(const test_t *t, const array_t *arrays, uint64_t outer, uint64_t head, uint64_t row,
                          double *p, double statistics[2]) {
    double largest = -INFINITY, total = 0;
    for (uint64_t j = 0; j < t->keys; j++) {
        p[j] = 0.4 * dot(t, arrays, QUERY, KEY, outer, head, row, j, t->width);
        if (t->mask_dtype == FD_BOOL && !arrays[MASK].at[index_of(t, MASK, outer, head, row, j)]) p[j] = -INFINITY;
        if (has(t, DMASK)) p[j] += number_of(t, arrays, MASK, outer, head, row, j);
        if (t->causal && j > row) p[j] = -INFINITY;
        if (p[j] > largest) largest = p[j];
    }
    for (uint64_t j = 0; j < t->keys; j++) total += p[j] = largest == -INFINITY ? 0 : exp(p[j] - largest);
    for (uint64_t j = 0; j < t->keys && total > 0; j++) p[j] /= total;
    statistics[0] = total > 0 ? largest : INFINITY;
    statistics[1] = total > 0 ? 1 / total : 0;
}

/* All results of a row; gradients are added to. right: for each array of results its numbers as double. */
static void plain_row(const test_t *t, const array_t *arrays, uint64_t outer, uint64_t head, uint64_t row, double *p,
                      double *const right[ARRAYS]) {
    const uint64_t at = (outer * heads_of(t) + head) * t->queries + row, shared = head / t->group;
    const uint64_t of_keys = (outer * t->heads + shared) * t->keys, w = t->width, n = t->value_width;
    double along = 0;
    plain_softmax(t, arrays, outer, head, row, p, right[STATISTICS] + 2 * at);
    for (uint64_t i = 0; i < n; i++) /* of y as it was stored */
        along += number_of(t, arrays, DY, outer, head, row, i) * value_at(t->dtype, arrays[Y].at, at * n + i);
    for (uint64_t j = 0; j < t->keys; j++) {
        const strides_t *cells = &t->strides[FD_CELL_STRIDES];
        const uint64_t cell = t->first + outer * cells->outer + head * cells->head + row * cells->row + j;
        const double a = bit_of(arrays[WORDS].at, cell) ? A : 0;
        const double slope = p[j] * (a * dot(t, arrays, DY, VALUE, outer, head, row, j, n) - along);
        for (uint64_t i = 0; i < n; i++) {
            right[Y][at * n + i] += a * p[j] * number_of(t, arrays, VALUE, outer, shared, j, i);
            right[DVALUE][(of_keys + j) * n + i] += a * p[j] * number_of(t, arrays, DY, outer, head, row, i);
        }
        for (uint64_t i = 0; i < w; i++) {
            right[DQUERY][at * w + i] += 0.4 * slope * number_of(t, arrays, KEY, outer, shared, j, i);
            right[DKEY][(of_keys + j) * w + i] += 0.4 * slope * number_of(t, arrays, QUERY, outer, head, row, i);
        }
        if (has(t, DMASK)) right[DMASK][index_of(t, DMASK, outer, head, row, j)] += slope;
    }
}

/* To some roundings of numbers as large as 1; query's gradient as the sum of its parts. */
static void expect_near(const test_t *t, int array, const unsigned char *got, const double *right) {
    static const double TOLERANCE[] = {
        [FD_FLOAT32] = 0x1p-17, [FD_FLOAT64] = 0x1p-46, [FD_FLOAT16] = 0x1p-9, [FD_BFLOAT16] = 0x1p-6};
    const int dtype = dtype_of(t, array);
    const uint64_t parts = array == DQUERY ? t->parts : 1, n = count_of(t, array) / parts;
    for (uint64_t i = 0; i < n; i++) {
        double sum = 0;
        for (uint64_t part = 0; part < parts; part++) sum += value_at(dtype, got, part * n + i);
        if (sum == right[i] || fabs(sum - right[i]) <= TOLERANCE[dtype] * (1 + fabs(right[i]))) continue;
        fail(t, (const char *[ARRAYS]){[Y] = "y",
                                       [STATISTICS] = "statistics",
                                       [DQUERY] = "dquery",
                                       [DKEY] = "dkey",
                                       [DVALUE] = "dvalue",
                                       [DMASK] = "dmask"}[array]);
        return;
    }
}

static void check_plain(const test_t *t, const array_t arrays[ARRAYS]) {
    double *right[ARRAYS] = {NULL}, *p = malloc(t->keys * sizeof *p);
    for (int i = DMASK; i < WORDS; i++)
        if (has(t, i)) right[i] = calloc(count_of(t, i), sizeof **right);
    for (uint64_t outer = 0; outer < t->outer; outer++)
        for (uint64_t head = 0; head < heads_of(t); head++)
            for (uint64_t row = 0; row < t->queries; row++) plain_row(t, arrays, outer, head, row, p, right);
    for (int i = DMASK; i < WORDS; i++) {
        if (has(t, i)) expect_near(t, i, arrays[i].at, right[i]);
        free(right[i]);
    }
    free(p);
}

/* ---- cases ---- */

static void check_call(const test_t *t, size_t shift) {
    array_t one[ARRAYS] = {{NULL, NULL}}, several[ARRAYS] = {{NULL, NULL}};
    open_arrays(t, shift, one);
    run(t, 1, 1, one);
    check_plain(t, one);
    open_arrays(t, 0, several);
    run(t, THREADS, 0, several);
    expect_same(t, "threads, drawn, aligned", several, one);
    close_arrays(several);
    close_arrays(one);
}

/* outer, heads, group, queries, keys, width, value_width, parts: below, at and past tiles of 96 queries and 256 keys,
 * and chunks of up to 480 queries. */
static const uint64_t SHAPES[][8] = {
    {1, 1, 1, 1, 1, 1, 1, 1},      {2, 2, 2, 3, 5, 7, 3, 2},     {1, 2, 1, 95, 33, 16, 17, 1},
    {1, 1, 3, 7, 255, 5, 33, 1},   {2, 1, 2, 5, 256, 3, 1, 2},   {1, 1, 1, 97, 257, 4, 2, 2},
    {1, 1, 1, 481, 31, 3, 5, 3},   {1, 1, 1, 6, 530, 2, 7, 2},   {1, 3, 1, 65, 65, 20, 12, 1},
    {1, 1, 1, 2, 3, 1100, 300, 1}, {1, 2, 1, 100, 530, 3, 2, 3},
};

void check_attention(int isa) {
    uint32_t state = 7;
    for (int dtype = FD_FLOAT32; dtype <= FD_BFLOAT16; dtype++)
        for (size_t s = 0; s < COUNT(SHAPES); s++) {
            const uint64_t *shape = SHAPES[s];
            const int masks[] = {NO_MASK, FD_BOOL, dtype, dtype == FD_FLOAT64 ? dtype : FD_FLOAT32};
            state = state * 1664525u + 1013904223u;
            test_t t = {.isa = isa,
                        .dtype = dtype,
                        .mask_dtype = masks[(s + (size_t)dtype) % COUNT(masks)],
                        .causal = (int)(state >> 8 & 1),
                        .by_rows = (int)(state >> 9 & 1),
                        .shared = state >> 10 & 15,
                        .shared_cells = state >> 26 & 7,
                        .outer = shape[0],
                        .heads = shape[1],
                        .group = shape[2],
                        .queries = shape[3],
                        .keys = shape[4],
                        .width = shape[5],
                        .value_width = shape[6],
                        .parts = shape[7],
                        .first = state >> 20 & 63,
                        .threshold = state >> 14 & 1 ? 0x80000000 : 0x19999999,
                        .state = state};
            if (t.outer > 1) t.shared &= ~1u; /* heads of keys, and parts, share no element of dmask */
            if (t.heads > 1) t.shared &= ~2u;
            if (t.parts > 1) t.shared &= ~8u;
            for (int i = 0; i <= DMASK; i++) set_strides(&t, i);
            set_cell_strides(&t);
            check_call(&t, state >> 15 & 7);
        }
}

/* ---- refusals ---- */

#define REFUSED(call, good, what, ...)                                                                                 \
    do {                                                                                                               \
        __typeof__(good) bad = good;                                                                                   \
        __VA_ARGS__;                                                                                                   \
        expect(call(&bad) == FD_BAD_ARGUMENT, #call " " what, fd_isa_active(), 0, 0);                                  \
    } while (0)

/* What both refuse. */
#define REFUSED_EXTENTS(call, good)                                                                                    \
    do {                                                                                                               \
        REFUSED(call, good, "no outer", bad.outer = 0);                                                                \
        REFUSED(call, good, "no heads", bad.heads = 0);                                                                \
        REFUSED(call, good, "no group", bad.group = 0);                                                                \
        REFUSED(call, good, "no queries", bad.queries = 0);                                                            \
        REFUSED(call, good, "no keys", bad.keys = 0);                                                                  \
        REFUSED(call, good, "no width", bad.width = 0);                                                                \
        REFUSED(call, good, "no value_width", bad.value_width = 0);                                                    \
        REFUSED(call, good, "queries past 2^32", bad.queries = ((uint64_t)1 << 32) + 1);                               \
        REFUSED(call, good, "value_width past 2^32", bad.value_width = ((uint64_t)1 << 32) + 1);                       \
        REFUSED(call, good, "scores past 2^60", bad.queries = bad.keys = (uint64_t)1 << 30);                           \
        REFUSED(call, good, "scores past 2^64", bad.outer = bad.queries = bad.keys = (uint64_t)1 << 32);               \
        REFUSED(call, good, "dtype", bad.dtype = 4);                                                                   \
        REFUSED(call, good, "float16 mask", bad.mask_dtype = FD_FLOAT16);                                              \
        REFUSED(call, good, "float64 and float32", bad.dtype = FD_FLOAT64);                                            \
        REFUSED(call, good, "no query", bad.query = NULL);                                                             \
        REFUSED(call, good, "no key", bad.key = NULL);                                                                 \
        REFUSED(call, good, "no statistics", bad.statistics = NULL);                                                   \
        REFUSED(call, good, "no strides", bad.strides = NULL);                                                         \
    } while (0)

/* So wide that scratch memory would take more terabytes than the limit allows. Windows promises no memory that it does
 * not have. */
static void check_no_memory(attention_forward_args first, attention_backward_args second) {
#if !defined(_WIN32)
    struct rlimit before, less;
    getrlimit(RLIMIT_AS, &before);
    less = before;
    if (LIMITED && before.rlim_cur > (rlim_t)1 << 43) less.rlim_cur = (rlim_t)1 << 43;
    setrlimit(RLIMIT_AS, &less);
#endif
    first.width = second.value_width = (uint64_t)1 << 32;
    expect(forward(&first) == FD_NO_MEMORY, "forward without memory", fd_isa_active(), first.width, 0);
    expect(backward(&second) == FD_NO_MEMORY, "backward without memory", fd_isa_active(), 0, second.value_width);
#if !defined(_WIN32)
    setrlimit(RLIMIT_AS, &before);
#endif
}

void check_attention_refusals(void) {
    float x[8] = {1, 2, 3, 4, 5, 6, 7, 8}, y[8] = {9, 9, 9, 9, 9, 9, 9, 9};
    static const strides_t strides[FD_STRIDES];
#define BOTH                                                                                                           \
    .query = x, .key = x, .value = x, .mask = x, .strides = strides, .outer = 1, .heads = 1, .group = 1, .queries = 1, \
    .keys = 1, .width = 1, .value_width = 1, .softmax_scale = 1, .a = 1
    attention_forward_args first = {BOTH, .y = y, .statistics = y + 2};
    attention_backward_args second = {BOTH,          .y = x,          .statistics = x, .dy = x,   .dquery = y,
                                      .dkey = y + 1, .dvalue = y + 2, .dmask = y + 3,  .parts = 1};
#undef BOTH
    REFUSED_EXTENTS(forward, first);
    REFUSED(forward, first, "no value", bad.value = NULL);
    REFUSED(forward, first, "no y", bad.y = NULL);
    REFUSED_EXTENTS(backward, second);
    REFUSED(backward, second, "no dy", bad.dy = NULL);
    REFUSED(backward, second, "no parts", bad.parts = 0);
    REFUSED(backward, second, "parts past 2^64", bad.outer = 2; bad.parts = (uint64_t)1 << 63);
    REFUSED(backward, second, "y without value", bad.value = NULL);
    REFUSED(backward, second, "value without y", bad.y = NULL);
    REFUSED(backward, second, "dquery without value", bad.value = bad.y = NULL; bad.dkey = bad.dmask = NULL);
    REFUSED(backward, second, "dkey without value", bad.value = bad.y = NULL; bad.dquery = bad.dmask = NULL);
    REFUSED(backward, second, "dmask without value", bad.value = bad.y = NULL; bad.dquery = bad.dkey = NULL);
    check_no_memory(first, second);
    for (size_t i = 0; i < COUNT(y); i++) expect(y[i] == 9, "untouched after an error", 0, i, 0);
    expect(forward(&first) == FD_OK && backward(&second) == FD_OK, "the call that was changed", 0, 0, 0);
}

/* The fused primitives over rows: each instruction set against the scalar one, several threads against one, in place
 * against not, drawn words against given ones, with and without the optional operands. The Python suite tests them
 * against its reference. */
#include "testing.h"

enum { OPERANDS = 10, MAX_OUTPUTS = 3, THREADS = 3, POISON = 0xA5 };

/* What an operand is: of dtype, of residual_dtype, of float32 or float64, or mask words; its size; its role. */
enum kind { DATA, RESIDUAL, WIDE, BITS };
enum count { CELLS, COLUMNS, TWO_ROWS, LINES, THREE_LINES, MASK };
enum role { IN, MAYBE_IN, OUT, MAYBE_OUT };
typedef struct {
    enum kind kind;
    enum count count;
    enum role role;
} operand_t;

typedef struct {
    int dtype, residual_dtype, activation, flag; /* flag: centred or causal */
    uint32_t drawn;                              /* threshold of a forward that draws its words; 0: they are given */
    uint64_t rows, columns, panels, heads, queries, strides[3];
} case_t;

/* p: the operands in the order of ops.def. */
typedef int call_t(const case_t *c, void *const *p);
typedef struct {
    const char *name;
    call_t *call;
    operand_t operands[OPERANDS];
    int count, over[2][2]; /* pairs of an output and an input that may be the same memory */
} op_t;

static const double SCALE = 1.25, EPS = 1e-5, SOFTMAX_SCALE = 0.7;

static const uint64_t SEED = 0x0123456789ABCDEF, OFFSET = 7;
static const uint32_t THRESHOLDS[] = {0x80000000, 0x19000000, 0x19990000, 0x40000001}; /* one plane, group, two, more */

#define MAYBE_DRAWN(op, ...) (c->drawn ? fd_##op##_drawn(SEED, OFFSET, c->drawn, __VA_ARGS__) : fd_##op(__VA_ARGS__))

static int pointwise_forward(const case_t *c, void *const *p) {
    return MAYBE_DRAWN(pointwise_forward, c->dtype, c->residual_dtype, p[0], p[1], p[2], p[3], p[4], p[5], p[6],
                       c->rows, c->columns, SCALE, c->activation);
}
static int pointwise_backward(const case_t *c, void *const *p) {
    return fd_pointwise_backward(c->dtype, c->residual_dtype, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], c->rows,
                                 c->columns, c->panels, SCALE, c->activation);
}
static int norm_forward(const case_t *c, void *const *p) {
    return MAYBE_DRAWN(norm_forward, c->dtype, c->residual_dtype, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8],
                       c->rows, c->columns, SCALE, EPS, c->flag);
}
static int norm_backward(const case_t *c, void *const *p) {
    return fd_norm_backward(c->dtype, c->residual_dtype, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], c->rows,
                            c->columns, c->panels, SCALE, c->flag);
}
static int softmax_forward(const case_t *c, void *const *p) {
    return MAYBE_DRAWN(softmax_forward, c->dtype, p[0], p[1], p[2], p[3], p[4], c->rows, c->columns, c->heads,
                       c->queries, c->strides[0], c->strides[1], c->strides[2], SOFTMAX_SCALE, SCALE, c->flag);
}
static int softmax_backward(const case_t *c, void *const *p) {
    return fd_softmax_backward(c->dtype, p[0], p[1], p[2], p[3], p[4], c->rows, c->columns, SOFTMAX_SCALE, SCALE);
}
/* clang-format off */
#define WORDS {BITS, CELLS, MAYBE_IN}
static const op_t OPS[] = {
    {"pointwise_forward", pointwise_forward,
     {{DATA, CELLS, IN}, {WIDE, COLUMNS, MAYBE_IN}, {DATA, CELLS, MAYBE_IN}, {RESIDUAL, CELLS, MAYBE_IN}, WORDS,
      {RESIDUAL, CELLS, OUT}, {BITS, CELLS, MAYBE_OUT}}, 7, {{5, 3}, {5, 0}}},
    {"pointwise_backward", pointwise_backward,
     {{RESIDUAL, CELLS, IN}, {DATA, CELLS, MAYBE_IN}, {WIDE, COLUMNS, MAYBE_IN}, {DATA, CELLS, MAYBE_IN}, WORDS,
      {DATA, CELLS, OUT}, {DATA, CELLS, MAYBE_OUT}, {WIDE, LINES, MAYBE_OUT}}, 8, {{5, 1}, {6, 3}}},
    {"norm_forward", norm_forward,
     {{DATA, CELLS, IN}, {WIDE, COLUMNS, MAYBE_IN}, {RESIDUAL, CELLS, MAYBE_IN}, WORDS, {WIDE, COLUMNS, MAYBE_IN},
      {WIDE, COLUMNS, MAYBE_IN}, {DATA, CELLS, OUT}, {RESIDUAL, CELLS, OUT}, {WIDE, TWO_ROWS, OUT}}, 9,
     {{6, 0}, {7, 2}}},
    {"norm_backward", norm_backward,
     {{DATA, CELLS, IN}, {RESIDUAL, CELLS, MAYBE_IN}, {RESIDUAL, CELLS, IN}, {WIDE, TWO_ROWS, IN},
      {WIDE, COLUMNS, MAYBE_IN}, WORDS, {DATA, CELLS, MAYBE_OUT}, {RESIDUAL, CELLS, MAYBE_OUT},
      {WIDE, THREE_LINES, MAYBE_OUT}}, 9, {{6, 0}, {7, 1}}},
    {"softmax_forward", softmax_forward,
     {{DATA, CELLS, IN}, {WIDE, MASK, MAYBE_IN}, WORDS, {DATA, CELLS, MAYBE_OUT}, {DATA, CELLS, OUT}}, 5,
     {{4, 0}, {3, 0}}},
    {"softmax_backward", softmax_backward,
     {{DATA, CELLS, IN}, {DATA, CELLS, IN}, WORDS, {DATA, CELLS, OUT}, {DATA, CELLS, MAYBE_OUT}}, 5, {{3, 1}, {3, 0}}},
};
/* clang-format on */
enum { POINTWISE_FORWARD, POINTWISE_BACKWARD, NORM_FORWARD, NORM_BACKWARD, SOFTMAX_FORWARD, SOFTMAX_BACKWARD };

static int draws(const op_t *op) { return strstr(op->name, "forward") != NULL; }

/* ---- operands ---- */

static int is_output(const operand_t *o) { return o->role == OUT || o->role == MAYBE_OUT; }

static int dtype_of(const case_t *c, const operand_t *o) {
    int wide = c->dtype == FD_FLOAT64 ? FD_FLOAT64 : FD_FLOAT32;
    return o->kind == DATA ? c->dtype : o->kind == RESIDUAL ? c->residual_dtype : wide;
}

/* The mask ends where the last row's part of it ends. */
static uint64_t mask_count(const case_t *c) {
    uint64_t count = 0;
    for (uint64_t r = 0; r < c->rows; r++) {
        uint64_t query = r % c->queries, head = r / c->queries % c->heads, outer = r / c->queries / c->heads;
        uint64_t end = outer * c->strides[0] + head * c->strides[1] + query * c->strides[2] + c->columns;
        if (end > count) count = end;
    }
    return count;
}

static uint64_t count_of(const case_t *c, const operand_t *o) {
    switch (o->count) {
    case CELLS: return c->rows * c->columns;
    case COLUMNS: return c->columns;
    case TWO_ROWS: return 2 * c->rows;
    case LINES: return c->panels * c->columns;
    case THREE_LINES: return 3 * c->panels * c->columns;
    default: return mask_count(c);
    }
}

static size_t bytes_of(const case_t *c, const operand_t *o) {
    uint64_t count = count_of(c, o);
    return o->kind == BITS ? (count + 31) / 32 * 4 : count * element_bytes(dtype_of(c, o));
}

/* ---- one case ---- */

typedef struct {
    const op_t *op;
    case_t c;
    unsigned absent; /* by operand */
    uint32_t state;
    int isa;
} test_t;

static int has(const test_t *t, int i) { return !(t->absent >> i & 1); }

static void fail(const test_t *t, const char *what, int operand) {
    char text[200];
    snprintf(text, sizeof text, "%s: %s, operand %d, dtypes %d %d, absent %x, activation %d", t->op->name, what,
             operand, t->c.dtype, t->c.residual_dtype, t->absent, t->c.activation);
    expect(0, text, t->isa, t->c.rows, t->c.columns);
}

static void open_inputs(const test_t *t, size_t shift, array_t arrays[OPERANDS]) {
    for (int i = 0; i < t->op->count; i++) {
        const operand_t *o = &t->op->operands[i];
        if (is_output(o) || !has(t, i)) continue;
        arrays[i] = array(bytes_of(&t->c, o), shift, 0);
        if (o->kind == BITS)
            fill_random(arrays[i].at, bytes_of(&t->c, o), t->state);
        else
            fill_numbers(dtype_of(&t->c, o), arrays[i].at, count_of(&t->c, o), t->state + (uint32_t)i,
                         t->state % 4 == 0 && (o->count == CELLS || o->count == MASK));
    }
}

static void open_outputs(const test_t *t, size_t shift, array_t arrays[OPERANDS]) {
    for (int i = 0; i < t->op->count; i++)
        if (is_output(&t->op->operands[i]) && has(t, i))
            arrays[i] = array(bytes_of(&t->c, &t->op->operands[i]), shift, POISON);
}

static void close_arrays(array_t *arrays, int outputs_alone, const op_t *op) {
    for (int i = 0; i < op->count; i++)
        if (!outputs_alone || is_output(&op->operands[i])) {
            free(arrays[i].block);
            arrays[i] = (array_t){NULL, NULL};
        }
}

static void run(const test_t *t, int isa, int threads, const array_t arrays[OPERANDS]) {
    void *pointers[OPERANDS];
    for (int i = 0; i < t->op->count; i++) pointers[i] = arrays[i].at;
    fd_isa_select(isa);
    fd_set_num_threads(threads);
    if (t->op->call(&t->c, pointers) != FD_OK) fail(t, "status", 0);
    fd_set_num_threads(1);
}

/* Bit for bit, except that any NaN equals any other. */
static void expect_same(const test_t *t, const char *what, const array_t *a, const array_t *b) {
    for (int i = 0; i < t->op->count; i++) {
        const operand_t *o = &t->op->operands[i];
        if (!is_output(o) || !has(t, i) || !memcmp(a[i].at, b[i].at, bytes_of(&t->c, o))) continue;
        int dtype = dtype_of(&t->c, o);
        size_t size = element_bytes(dtype);
        uint64_t n = o->kind == BITS ? 0 : count_of(&t->c, o), at = 0;
        for (; at < n; at++)
            if (memcmp(a[i].at + at * size, b[i].at + at * size, size) &&
                !(isnan(value_at(dtype, a[i].at, at)) && isnan(value_at(dtype, b[i].at, at))))
                break;
        if (o->kind == BITS || at < n) fail(t, what, i);
    }
}

/* To a few roundings of numbers of average size. */
static void expect_near(const test_t *t, const array_t *a, const array_t *b) {
    static const double TOLERANCE[] = {
        [FD_FLOAT32] = 0x1p-17, [FD_FLOAT64] = 0x1p-46, [FD_FLOAT16] = 0x1p-9, [FD_BFLOAT16] = 0x1p-6};
    for (int i = 0; i < t->op->count; i++) {
        const operand_t *o = &t->op->operands[i];
        if (!is_output(o) || !has(t, i) || !memcmp(a[i].at, b[i].at, bytes_of(&t->c, o))) continue;
        int dtype = dtype_of(&t->c, o);
        uint64_t n = o->kind == BITS ? 0 : count_of(&t->c, o), at = 0, finite = 0;
        double total = 0;
        for (uint64_t k = 0; k < n; k++) {
            double value = value_at(dtype, b[i].at, k);
            if (isfinite(value)) total += fabs(value), finite++;
        }
        for (; at < n; at++) {
            double got = value_at(dtype, a[i].at, at), right = value_at(dtype, b[i].at, at);
            if (isnan(right)   ? !isnan(got)
                : isinf(right) ? got != right
                               : !(fabs(got - right) <= TOLERANCE[dtype] * (fabs(right) + total / (double)finite)))
                break;
        }
        if (o->kind == BITS || at < n) fail(t, "beside scalar", i);
    }
}

/* A dropped element is +0 if nothing is added to it. */
static void expect_zeros(const test_t *t, const array_t *arrays, int words, int output) {
    static const unsigned char zeros[8];
    if (!has(t, words) || !has(t, output)) return;
    size_t size = element_bytes(dtype_of(&t->c, &t->op->operands[output]));
    for (uint64_t i = 0; i < t->c.rows * t->c.columns; i++)
        if (!bit_of(arrays[words].at, i) && memcmp(arrays[output].at + i * size, zeros, size)) {
            fail(t, "not +0 where dropped", output);
            return;
        }
}

static void check_zeros(const test_t *t, const array_t *arrays) {
    switch (t->op - OPS) {
    case POINTWISE_FORWARD:
        if (!has(t, 3)) expect_zeros(t, arrays, 4, 5);
        break;
    case POINTWISE_BACKWARD: expect_zeros(t, arrays, 4, 5), expect_zeros(t, arrays, 4, 6); break;
    case NORM_BACKWARD: expect_zeros(t, arrays, 5, 6); break;
    case SOFTMAX_FORWARD: expect_zeros(t, arrays, 2, 4); break;
    case SOFTMAX_BACKWARD: expect_zeros(t, arrays, 2, 4); break;
    default: break;
    }
}

/* An output in the memory of an input of its type gets the same bits. */
static void check_in_place(const test_t *t, size_t shift, const array_t *expected) {
    for (int way = 0; way < 2; way++) {
        const int out = t->op->over[way][0], in = t->op->over[way][1];
        const operand_t *operands = t->op->operands;
        if (!has(t, out) || !has(t, in) || dtype_of(&t->c, operands + out) != dtype_of(&t->c, operands + in)) continue;
        array_t arrays[OPERANDS] = {{NULL, NULL}}, separate;
        open_inputs(t, shift, arrays);
        open_outputs(t, shift, arrays);
        separate = arrays[out];
        arrays[out] = arrays[in];
        run(t, t->isa, 1, arrays);
        expect_same(t, "in place", arrays, expected);
        arrays[out] = separate;
        close_arrays(arrays, 0, t->op);
    }
}

/* A forward that draws its words against one with words that draw_bits drew. */
static void check_drawn(const test_t *t, size_t shift) {
    int words = 0;
    while (words < t->op->count && t->op->operands[words].kind != BITS) words++;
    if (!draws(t->op) || !has(t, words)) return;
    array_t right[OPERANDS] = {{NULL, NULL}}, drawn[OPERANDS] = {{NULL, NULL}};
    const uint64_t cells = t->c.rows * t->c.columns;
    test_t draws = *t;
    draws.c.drawn = THRESHOLDS[t->state % COUNT(THRESHOLDS)];
    open_inputs(t, shift, right);
    open_outputs(t, shift, right);
    expect(fd_draw_bits(right[words].at, 0, 0, cells, SEED, OFFSET, draws.c.drawn) == FD_OK, "draw", t->isa, cells, 0);
    run(t, t->isa, 1, right);
    open_inputs(t, shift, drawn);
    open_outputs(t, shift, drawn);
    run(&draws, t->isa, THREADS, drawn);
    expect_same(t, "drawn", drawn, right);
    expect(!memcmp(drawn[words].at, right[words].at, (cells + 31) / 32 * 4), "drawn words", t->isa, cells, 0);
    close_arrays(right, 0, t->op);
    close_arrays(drawn, 0, t->op);
}

static void check_call(const test_t *t, size_t shift) {
    array_t right[OPERANDS] = {{NULL, NULL}}, one[OPERANDS] = {{NULL, NULL}}, several[OPERANDS];
    open_inputs(t, 0, right);
    open_outputs(t, 0, right);
    run(t, 0, 1, right);
    open_inputs(t, shift, one);
    open_outputs(t, shift, one);
    run(t, t->isa, 1, one);
    if (t->isa)
        expect_near(t, one, right);
    else
        expect_same(t, "misaligned", one, right);
    check_zeros(t, one);
    memcpy(several, one, sizeof several);
    open_outputs(t, shift, several);
    run(t, t->isa, THREADS, several);
    expect_same(t, "threads", several, one);
    close_arrays(several, 1, t->op);
    check_in_place(t, shift, one);
    check_drawn(t, shift);
    close_arrays(right, 0, t->op);
    close_arrays(one, 0, t->op);
}

/* ---- cases ---- */

static const int DTYPES[][2] = {{FD_FLOAT32, FD_FLOAT32},   {FD_FLOAT64, FD_FLOAT64}, {FD_FLOAT16, FD_FLOAT16},
                                {FD_BFLOAT16, FD_BFLOAT16}, {FD_FLOAT16, FD_FLOAT32}, {FD_BFLOAT16, FD_FLOAT32}};

/* Makes a sound call of any set of absent operands. */
static test_t test_of(int op, const int dtypes[2], uint64_t rows, uint64_t columns, unsigned absent, uint32_t state,
                      int isa) {
    test_t t = {&OPS[op], {0}, 0, state, isa};
    case_t *c = &t.c;
    *c = (case_t){.dtype = dtypes[0],
                  .residual_dtype = dtypes[1],
                  .activation = (int)(state >> 8) % (FD_SILU + 1),
                  .flag = (int)(state >> 12 & 1),
                  .rows = rows,
                  .columns = columns,
                  .panels = rows > 100 ? 13 : 1 + (state >> 16) % 5,
                  .heads = 1 + (state >> 20) % 3,
                  .queries = 1 + (state >> 24) % 5};
    /* A mask for each query of each head, one for all heads, one line for each outer one. */
    const uint64_t line = columns + 1, head = c->queries * line;
    const uint64_t strides[][3] = {{c->heads * head, head, line}, {0, 0, line}, {columns, 0, 0}};
    memcpy(c->strides, strides[state % 3], sizeof c->strides);
    for (int i = 0; i < t.op->count; i++)
        if ((t.op->operands[i].role == MAYBE_IN || t.op->operands[i].role == MAYBE_OUT) && absent >> i & 1)
            t.absent |= 1u << i;
    if (op == POINTWISE_FORWARD && has(&t, 6)) c->activation = FD_RELU;
    if (op == POINTWISE_BACKWARD && (c->activation || has(&t, 6))) t.absent &= ~(1u << 1);
    if (op == NORM_BACKWARD && !has(&t, 6) && !has(&t, 7)) t.absent &= ~(1u << 7);
    return t;
}

/* The next call of a random sequence; about half of them are misaligned. */
static void check_next(int op, const int dtypes[2], const uint64_t shape[2], unsigned absent, uint32_t *state,
                       int isa) {
    *state = *state * 1664525u + 1013904223u;
    const test_t t = test_of(op, dtypes, shape[0], shape[1], absent, *state >> 3, isa);
    check_call(&t, (*state >> 8 & 1) * (*state >> 9 & 7));
}

/* Ordinary stores by one thread; around the cache by several, to outputs that begin anywhere. */
static void check_around(int op, const int dtypes[2], const uint64_t shape[2], int isa) {
    test_t t = test_of(op, dtypes, shape[0], shape[1], 0, 5, isa);
    if (draws(t.op)) t.c.drawn = THRESHOLDS[isa];
    array_t one[OPERANDS] = {{NULL, NULL}}, several[OPERANDS];
    open_inputs(&t, 0, one);
    memcpy(several, one, sizeof several); /* the words too: drawn twice they are the same */
    open_outputs(&t, 0, one);
    open_outputs(&t, shape[0] % 3 * element_bytes(dtypes[0]), several);
    go_by_ordinary_stores();
    run(&t, isa, 1, one);
    go_around_cache(1, 8);
    run(&t, isa, THREADS, several);
    go_by_ordinary_stores();
    expect_same(&t, "around the cache", several, one);
    close_arrays(several, 1, t.op);
    close_arrays(one, 0, t.op);
}

void check_fused(int isa) {
    static const uint64_t SHAPES[][2] = {{0, 5}, {1, 1}, {3, 1}, {1, 31}, {5, 7}, {7, 33}, {37, 64}, {2, 513}};
    static const uint64_t LONG[][2] = {{3, 4096}, {2, 4097}, {1, 9001}}; /* around ROW_CELLS */
    static const uint64_t AROUND[][2] = {
        {140, 1021}, {20, 4111}, {127, 1056}}; /* rows end within lines, and with them */
    static const uint64_t SHARED[][2] = {{131, 1201}, {601, 320}, {40001, 5}}; /* among threads */
    uint32_t state = 1;
    for (int op = 0; op < (int)COUNT(OPS); op++) {
        for (size_t d = 0; d < COUNT(DTYPES); d++) {
            if (op >= SOFTMAX_FORWARD && DTYPES[d][0] != DTYPES[d][1]) continue;
            for (size_t s = 0; s < COUNT(SHAPES); s++)
                for (int turn = 0; turn < 4; turn++) /* all operands, none that may be absent, some */
                    check_next(op, DTYPES[d], SHAPES[s], turn < 2 ? 0u - (unsigned)turn : state >> 4, &state, isa);
            check_next(op, DTYPES[d], LONG[d % 3], state >> 4, &state, isa);
        }
        for (size_t s = 0; s < COUNT(LONG); s++) check_next(op, DTYPES[s & 1], LONG[s], state >> 4, &state, isa);
        check_next(op, DTYPES[(op + isa) % 4], SHARED[op % 3], 0, &state, isa);
        if (op == POINTWISE_BACKWARD) /* without sums threads share cells, not panels */
            check_next(op, DTYPES[isa % 4], SHARED[op % 3], 1u << 7, &state, isa);
        if (op == NORM_FORWARD) check_next(op, DTYPES[isa % 4], SHARED[1], 0, &state, isa); /* whole words a row */
        for (size_t s = 0; s < COUNT(AROUND) && isa; s++) /* the scalar stores all go to the cache */
            for (size_t d = 0; d < COUNT(DTYPES); d += 1 + (s + (size_t)op) % 2)
                if (op < SOFTMAX_FORWARD || DTYPES[d][0] == DTYPES[d][1]) check_around(op, DTYPES[d], AROUND[s], isa);
    }
}

void check_fused_refusals(void) {
    float x[8] = {1, 2, 3, 4, 5, 6, 7, 8}, y[8] = {9, 9, 9, 9, 9, 9, 9, 9};
    uint32_t words[1] = {5};
    struct {
        const char *what;
        int status;
    } calls[] = {
        {"NULL", fd_pointwise_forward(0, 0, NULL, NULL, NULL, NULL, words, y, NULL, 2, 4, 1, 0)},
        {"no columns", fd_pointwise_forward(0, 0, x, NULL, NULL, NULL, words, y, NULL, 2, 0, 1, 0)},
        {"cells past 2^60", fd_pointwise_forward(0, 0, x, NULL, NULL, NULL, words, y, NULL, 1ull << 40, 1 << 21, 1, 0)},
        {"rows past 2^64", fd_pointwise_forward(0, 0, x, NULL, NULL, NULL, words, y, NULL, 1ull << 63, 4, 1, 0)},
        {"activation", fd_pointwise_forward(0, 0, x, NULL, NULL, NULL, words, y, NULL, 2, 4, 1, 5)},
        {"narrower residual", fd_pointwise_forward(0, 2, x, NULL, NULL, NULL, words, y, NULL, 2, 4, 1, 0)},
        {"float64 and float32", fd_pointwise_forward(1, 0, x, NULL, NULL, NULL, words, y, NULL, 1, 4, 1, 0)},
        {"signs of gelu", fd_pointwise_forward(0, 0, x, NULL, NULL, NULL, NULL, y, words, 2, 4, 1, FD_GELU)},
        {"signs over words", fd_pointwise_forward(0, 0, x, NULL, NULL, NULL, words, y, words, 2, 4, 1, FD_RELU)},
        {"gelu without x", fd_pointwise_backward(0, 0, x, NULL, NULL, NULL, words, y, NULL, NULL, 2, 4, 1, 1, FD_GELU)},
        {"dmultiplier without x", fd_pointwise_backward(0, 0, x, NULL, NULL, x, words, y, y + 4, NULL, 1, 4, 1, 1, 0)},
        {"no panels", fd_pointwise_backward(0, 0, x, NULL, NULL, NULL, words, y, NULL, y + 4, 1, 4, 0, 1, 0)},
        {"no statistics", fd_norm_forward(0, 0, x, NULL, NULL, NULL, NULL, NULL, y, y, NULL, 2, 4, 1, 1, 1)},
        {"no output", fd_norm_backward(0, 0, x, NULL, x, x, NULL, words, NULL, NULL, y, 2, 4, 1, 1, 1)},
        {"no panels", fd_norm_backward(0, 0, x, NULL, x, x, NULL, words, y, NULL, y, 2, 4, 0, 1, 1)},
        {"no heads", fd_softmax_forward(0, x, NULL, NULL, NULL, y, 2, 4, 0, 2, 0, 0, 0, 1, 1, 0)},
        {"no queries", fd_softmax_forward(0, x, NULL, NULL, NULL, y, 2, 4, 1, 0, 0, 0, 0, 1, 1, 0)},
        {"nothing to draw",
         fd_softmax_forward_drawn(1, 0, 0, 0, x, NULL, words, NULL, y, 2, 4, 1, 2, 0, 0, 0, 1, 1, 0)},
        {"no words", fd_softmax_forward_drawn(1, 0, 9, 0, x, NULL, NULL, NULL, y, 2, 4, 1, 2, 0, 0, 0, 1, 1, 0)},
        {"dtype", fd_softmax_backward(4, x, x, words, y, NULL, 2, 4, 1, 1)},
    };
    for (size_t i = 0; i < COUNT(calls); i++) expect(calls[i].status == FD_BAD_ARGUMENT, calls[i].what, 0, i, 0);
    for (size_t i = 0; i < COUNT(y); i++) expect(y[i] == 9 && words[0] == 5, "untouched after a refusal", 0, i, 0);
}

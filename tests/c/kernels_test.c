/* The C tests' main program: every instruction set of this machine against the scalar one and the golden vectors. It
 * needs no Python, so the sanitizers and the emulator run it (Makefile: test-c, sanitize, test-neon).
 *
 * kernels_test GOLDEN STRIDE: GOLDEN is the output of golden.py, vector math is tested at every STRIDE-th float. */
#include "testing.h"

#include <fenv.h>
#include <pthread.h>

enum { MAX_CELLS = 200000, CALLERS = 6 };

static const uint64_t LENGTHS[] = {0, 1, 7, 31, 32, 33, 63, 511, 512, 513, 1000, 8191, 8192, 8193, 8704, 20001};
static const uint64_t FIRSTS[] = {0, 1, 31, 33, 511, 512, 1000, (1ull << 37) - 4097, (1ull << 63) + 77};
static const uint64_t THRESHOLDS[] = {1u << 31, 1u << 30, 77u << 24, 429496730u, 4295u, 1u, 0xFFFFFFFFu, 0xE0000001u};
static const uint64_t SEED = 0x123456789ABCDEF0ull, OFFSET = 0xFEDCBA9876543210ull;

int failures;

/* Against the scalar kernels, bit for bit. x is random bytes, which contain every kind of NaN. */
static void compare(int isa, int dtype, uint64_t n, uint64_t first, uint64_t threshold, size_t shift, double b) {
    size_t bytes = n * element_bytes(dtype), word_bytes = (n + 31) / 32 * 4;
    array_t x = array(bytes, shift, 0), y[2], words[2], back[2];
    fill_random(x.at, bytes, (uint32_t)(n * 31 + first));
    for (int side = 0; side < 2; side++) {
        fd_isa_select(side ? isa : 0);
        y[side] = array(bytes, side ? shift : 0, 0xA5);
        back[side] = array(bytes, 0, 0x5A);
        words[side] = array(word_bytes, side ? shift : 0, 0xFF);
        expect(fd_dropout_forward(dtype, x.at, y[side].at, words[side].at, first, n, SEED, OFFSET, threshold, 1.25, b,
                                  b) == FD_OK,
               "status", isa, n, first);
        fd_masked_affine(dtype, x.at, back[side].at, words[side].at, 0, 1, 1, n, 1.25, b, b);
    }
    expect(!memcmp(words[0].at, words[1].at, word_bytes), "words", isa, n, first);
    expect(!memcmp(y[0].at, y[1].at, bytes), "forward", isa, n, first);
    expect(!memcmp(y[0].at, back[0].at, bytes), "backward, scalar", isa, n, first);
    expect(!memcmp(y[0].at, back[1].at, bytes), "backward", isa, n, first);
    free(x.block);
    for (int side = 0; side < 2; side++) {
        free(y[side].block);
        free(words[side].block);
        free(back[side].block);
    }
}

/* masked_affine against its definition, element by element. */
static void compare_grids(int isa) {
    static const uint64_t GRIDS[][3] = {{1, 5, 7},    {3, 49, 1},   {4, 3, 33},   {2, 700, 64},
                                        {1, 9000, 1}, {5, 2, 4097}, {2, 9000, 7}, {2, 100, 520}};
    for (size_t g = 0; g < COUNT(GRIDS); g++)
        for (uint64_t position = 0; position < 40; position += 13) {
            const uint64_t *e = GRIDS[g], cells = e[0] * e[2], n = cells * e[1];
            size_t word_bytes = (position + cells + 31) / 32 * 4;
            array_t x = array(4 * n, 0, 0), words = array(word_bytes, 0, 0), y = array(4 * n, 0, 0xA5);
            float *naive = malloc(4 * n), c = (float)position;
            fill_random(words.at, word_bytes, 11);
            for (uint64_t i = 0; i < n; i++) {
                uint64_t cell = i / (e[1] * e[2]) * e[2] + i % e[2];
                float value = (float)(i % 1000 + 1);
                memcpy(x.at + 4 * i, &value, 4);
                naive[i] = bit_of(words.at, position + cell) ? value * 2 + c : c;
            }
            fd_isa_select(isa);
            fd_masked_affine(FD_FLOAT32, x.at, y.at, words.at, position, e[0], e[1], e[2], 2, c, c);
            expect(!memcmp(y.at, naive, 4 * n), "grid", isa, g, position);
            free(x.block), free(words.block), free(y.block), free(naive);
        }
}

/* Noise against the scalar kernels, misaligned too, in place and not. */
static void compare_noise(int isa, int dtype, uint64_t n, uint64_t first, size_t shift) {
    size_t bytes = n * element_bytes(dtype);
    array_t x = array(bytes, shift, 0), y[2];
    fill_random(x.at, bytes, (uint32_t)(n + first));
    for (int side = 0; side < 2; side++) {
        fd_isa_select(side ? isa : 0);
        y[side] = array(bytes, side ? shift : 0, 0xA5);
        expect(fd_gaussian_multiply(dtype, x.at, y[side].at, first, n, SEED, OFFSET, 0.75) == FD_OK, "status", isa, n,
               first);
    }
    fd_gaussian_multiply(dtype, x.at, x.at, first, n, SEED, OFFSET, 0.75);
    expect(!memcmp(y[0].at, y[1].at, bytes), "noise", isa, n, first);
    expect(!memcmp(y[0].at, x.at, bytes), "noise in place", isa, n, first);
    free(x.block), free(y[0].block), free(y[1].block);
}

/* The noise of a cell is the same in a call for this cell alone, and equals the reference backend's. */
static void check_noise(int isa) {
    static const struct {
        uint64_t cell;
        float value;
    } GOLDEN[] = {{0, 0x1.a995e8p-2f},
                  {17, 0x1.1f4296p+0f},
                  {(1ull << 34) + 33, 0x1.ba1d7ap-1f},
                  {(1ull << 61) - 1, 0x1.17a588p+1f}};
    enum { CELLS = 2500 };
    static const uint64_t FROM[] = {0, 5, (1ull << 34) - 999, (1ull << 61) - CELLS};
    static float x[CELLS], y[CELLS];
    fd_isa_select(isa);
    for (int i = 0; i < CELLS; i++) x[i] = 1;
    for (size_t g = 0; g < COUNT(GOLDEN); g++) {
        fd_gaussian_multiply(FD_FLOAT32, x, y, GOLDEN[g].cell, 1, SEED, OFFSET, 1);
        expect(y[0] == GOLDEN[g].value, "golden noise", isa, GOLDEN[g].cell, 0);
    }
    for (size_t f = 0; f < COUNT(FROM); f++) {
        fd_gaussian_multiply(FD_FLOAT32, x, y, FROM[f], CELLS, SEED, OFFSET, 1);
        for (uint64_t i = 0; i < CELLS; i += 7) {
            float alone;
            fd_gaussian_multiply(FD_FLOAT32, x, &alone, FROM[f] + i, 1, SEED, OFFSET, 1);
            expect(y[i] == alone, "noise of a cell alone", isa, FROM[f], i);
        }
    }
}

/* draw_rows against draw_bits row by row, which clears what is behind each row, so that both leave the same words. */
static void compare_rows(int isa, const uint64_t extents[5], uint64_t position, uint64_t first, size_t turn) {
    const uint64_t outer = extents[0], rows = extents[2], columns = extents[4],
                   t = THRESHOLDS[turn % COUNT(THRESHOLDS)];
    const size_t shift = 4 * (turn % 2), bytes = (position + outer * rows * columns + 31) / 32 * 4;
    array_t words = array(bytes, shift, 0xA5), naive = array(bytes, 0, 0xA5);
    fd_isa_select(isa);
    for (uint64_t row = 0; row < outer * rows; row++)
        fd_draw_bits(naive.at, position + row * columns, first + row / rows * extents[1] + row % rows * extents[3],
                     columns, SEED, OFFSET, t);
    fd_set_num_threads(1 + (int)(turn % 3));
    expect(fd_draw_rows(words.at, position, first, outer, extents[1], rows, extents[3], columns, SEED, OFFSET, t) ==
               FD_OK,
           "status", isa, columns, first);
    expect(!memcmp(words.at, naive.at, bytes), "rows", isa, columns, first);
    fd_set_num_threads(1);
    free(words.block), free(naive.block);
}

static void compare_row_sets(int isa) {
    static const uint64_t EXTENTS[][5] = {{1, 0, 600, 2, 1},
                                          {1, 0, 600, 1000, 1},
                                          {3, 9000, 300, 32, 31},
                                          {2, 9999, 310, 32, 32},
                                          {3, 5000, 101, 40, 33},
                                          {2, 99999, 1000, 1000, 125},
                                          {2, 9625, 77, 125, 125},
                                          {3, 40000, 9, 4096, 512},
                                          {1, 0, 20, 1024, 513},
                                          {2, 30000, 11, 2000, 1000},
                                          {2, 70000, 3, 10001, 9000},
                                          {3, 10, 40, 3, 70},
                                          {2, 0, 3, 1ull << 37, 140},
                                          {0, 5, 5, 9, 5},
                                          {5, 90, 5, 9, 0}};
    static const uint64_t FROM[] = {0, 7, 512, (1ull << 37) - 4097, (1ull << 63) + 77};
    for (size_t e = 0, turn = 0; e < COUNT(EXTENTS); e++)
        for (size_t f = 0; f < COUNT(FROM); f++, turn++)
            compare_rows(isa, EXTENTS[e], turn % 4 ? 13 * (turn % 4) : 0, FROM[f], turn);
}

/* dilate_bits against its definition, bit by bit. */
static void compare_dilation(int isa, const uint64_t extents[4], size_t shift, int threads) {
    const uint64_t outer = extents[0], n = extents[1], inner = extents[2], block = extents[3], m = n + block - 1;
    size_t bytes = (outer * n * inner + 31) / 32 * 4, to_bytes = (outer * m * inner + 31) / 32 * 4;
    array_t words = array(bytes, shift, 0), to = array(to_bytes, shift, 0xA5);
    unsigned char *naive = calloc(to_bytes + 1, 1);
    fill_random(words.at, bytes, (uint32_t)(n + block));
    for (size_t i = 0; i < bytes; i++) words.at[i] |= i % 5 ? 0xFF : 0x7E; /* most cells kept */
    for (uint64_t o = 0; o < outer; o++)
        for (uint64_t i = 0; i < m; i++)
            for (uint64_t j = 0; j < inner; j++) {
                unsigned keep = 1;
                for (uint64_t s = i < n ? 0 : i - n + 1; s < block && s <= i; s++)
                    keep &= bit_of(words.at, (o * n + i - s) * inner + j);
                uint64_t at = (o * m + i) * inner + j;
                naive[at / 8] |= (unsigned char)(keep << at % 8);
            }
    fd_isa_select(isa);
    fd_set_num_threads(threads);
    expect(fd_dilate_bits(to.at, words.at, outer, n, inner, block) == FD_OK, "status", isa, n, block);
    expect(!memcmp(to.at, naive, to_bytes), "dilation", isa, n, block);
    fd_set_num_threads(1);
    free(words.block), free(to.block), free(naive);
}

static void compare_dilations(int isa) {
    static const uint64_t EXTENTS[][4] = {{0, 5, 5, 3},     {5, 0, 5, 3},       {5, 5, 0, 3},     {1, 1, 1, 1},
                                          {1, 1, 1, 100},   {3, 5, 1, 1},       {70, 56, 1, 7},   {9, 50, 62, 7},
                                          {700, 1, 1, 64},  {30, 64, 1, 65},    {7, 3, 130, 200}, {4, 3000, 3, 9},
                                          {2, 5, 40000, 3}, {2, 3, 100001, 2},  {1, 9, 7, 30000}, {2, 9, 1000, 99},
                                          {33, 31, 1, 2},   {1, 100000, 1, 17}, {5, 64, 64, 64},  {3, 1, 65, 3}};
    for (size_t e = 0; e < COUNT(EXTENTS); e++)
        for (size_t shift = 0; shift < 3; shift++) compare_dilation(isa, EXTENTS[e], shift, 1 + (int)shift);
}

static void check_golden(const char *path) {
    FILE *file = fopen(path, "r");
    unsigned long long seed, offset, first_word, threshold;
    unsigned count, golden[64];
    if (!file) {
        perror(path);
        exit(2);
    }
    int lines = 0;
    while (fscanf(file, "%llx %llx %llx %llx %u", &seed, &offset, &first_word, &threshold, &count) == 5) {
        for (unsigned i = 0; i < count; i++)
            if (count > 64 || fscanf(file, "%x", &golden[i]) != 1) exit(2);
        lines++;
        for (int isa = 0; isa < fd_isa_count(); isa++) {
            uint32_t words[64];
            if (fd_isa_select(isa) != FD_OK) continue;
            int status = fd_draw_bits(words, 0, 32 * first_word, 32 * count, seed, offset, threshold);
            expect(status == FD_OK && !memcmp(words, golden, 4 * count), "golden", isa, first_word, threshold);
        }
    }
    fclose(file);
    expect(lines > 50, "number of golden vectors", 0, (uint64_t)lines, 0);
}

/* Several callers at once: one gets the pool, the others work alone, all get the same bits. */
static float shared_x[MAX_CELLS], expected_y[MAX_CELLS], expected_noise[MAX_CELLS];
static uint32_t expected_words[MAX_CELLS / 32];
static void *caller(void *unused) {
    float *y = malloc(sizeof shared_x);
    uint32_t *words = malloc(sizeof expected_words);
    (void)unused;
    for (int turn = 0; turn < 8; turn++) {
        int bad = 0;
        memset(words, 0, sizeof expected_words);
        fd_dropout_forward(FD_FLOAT32, shared_x, y, words, 3, MAX_CELLS, SEED, OFFSET, 429496730u, 1.5, 0, 0);
        bad |= memcmp(words, expected_words, sizeof expected_words) || memcmp(y, expected_y, sizeof expected_y);
        memset(words, 0, sizeof expected_words);
        fd_draw_bits(words, 0, 3, MAX_CELLS, SEED, OFFSET, 429496730u);
        memset(y, 0xA5, sizeof shared_x);
        fd_masked_affine(FD_FLOAT32, shared_x, y, words, 0, 1, 1, MAX_CELLS, 1.5, 0, 0);
        bad |= memcmp(words, expected_words, sizeof expected_words) || memcmp(y, expected_y, sizeof expected_y);
        fd_gaussian_multiply(FD_FLOAT32, shared_x, y, 3, MAX_CELLS, SEED, OFFSET, 0.5);
        bad |= memcmp(y, expected_noise, sizeof expected_noise);
        if (bad) __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
    }
    free(y);
    free(words);
    return NULL;
}

static void check_threads(void) {
    const int before = failures;
    pthread_t threads[CALLERS];
    fd_set_num_threads(1);
    for (int i = 0; i < MAX_CELLS; i++) shared_x[i] = (float)i;
    fd_dropout_forward(FD_FLOAT32, shared_x, expected_y, expected_words, 3, MAX_CELLS, SEED, OFFSET, 429496730u, 1.5, 0,
                       0);
    fd_gaussian_multiply(FD_FLOAT32, shared_x, expected_noise, 3, MAX_CELLS, SEED, OFFSET, 0.5);
    fd_set_num_threads(3);
    for (int i = 0; i < CALLERS; i++) pthread_create(&threads[i], NULL, caller, NULL);
    for (int i = 0; i < CALLERS; i++) pthread_join(threads[i], NULL);
    expect(failures == before, "threads", fd_isa_active(), CALLERS, 0);
    fd_set_num_threads(1);
}

/* A stand-in for another library's threads: parallel is its GOMP_parallel. */
enum { TEAM = 4 };
static unsigned team_asked;
typedef struct {
    void (*work)(void *);
    void *data;
} share_t;
static void *team_member(void *share) {
    ((share_t *)share)->work(((share_t *)share)->data);
    return NULL;
}
static void parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    pthread_t members[TEAM];
    share_t share = {work, data};
    (void)flags;
    team_asked = threads;
    for (unsigned i = 1; i < threads; i++) pthread_create(&members[i], NULL, team_member, &share);
    work(data);
    for (unsigned i = 1; i < threads; i++) pthread_join(members[i], NULL);
}

static void check_team(void) {
    static float y[MAX_CELLS];
    static uint32_t words[MAX_CELLS / 32];
    fd_use_team((uintptr_t)parallel);
    for (int limit = 0; limit <= TEAM; limit++) { /* 0: a call of our own, on the pool */
        memset(y, 0xFF, sizeof y);
        memset(words, 0xFF, sizeof words);
        team_asked = 0;
        fd_limit_threads(limit);
        fd_dropout_forward(FD_FLOAT32, shared_x, y, words, 3, MAX_CELLS, SEED, OFFSET, 429496730u, 1.5, 0, 0);
        expect(team_asked == (limit > 1 ? (unsigned)limit : 0), "team's size", fd_isa_active(), limit, team_asked);
        expect(!memcmp(y, expected_y, sizeof y) && !memcmp(words, expected_words, sizeof words), "team's result",
               fd_isa_active(), limit, 0);
    }
    fd_limit_threads(0);
    fd_use_team(0);
}

static void reset_float_modes(void) {
    fesetenv(FE_DFL_ENV);
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(0x1F80); /* MinGW's fesetenv leaves MXCSR as it is */
#endif
}

/* Under another rounding mode, and with subnormals flushed on x86 and Arm, the pool and a team give the bits of one
 * thread. Afterwards their threads have their own modes again. */
static void check_float_modes(void) {
    static float tiny[MAX_CELLS], y[4][MAX_CELLS];
    for (int i = 0; i < MAX_CELLS; i++) tiny[i] = i % 2 ? 0x1p-130f : (float)i;
    for (int flush = 0; flush < 2; flush++) {
        if (flush) {
#if defined(__x86_64__)
            __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040); /* flush results, take operands for 0 */
#elif defined(__aarch64__)
            uint64_t fpcr;
            __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
            __asm__ volatile("msr fpcr, %0" : : "r"(fpcr | 1 << 24));
#endif
        } else {
            fesetround(FE_UPWARD);
        }
        for (int way = 0; way < 4; way++) { /* one thread, pool, team, pool under default modes */
            if (way == 3) reset_float_modes();
            if (way == 2) fd_use_team((uintptr_t)parallel);
            fd_set_num_threads(way ? 4 : 1);
            fd_limit_threads(way == 2 ? TEAM : 0);
            fd_dropout_forward(FD_FLOAT32, tiny, y[way], NULL, 3, MAX_CELLS, SEED, OFFSET, 429496730u, 1.1, 0, 0);
            fd_limit_threads(0);
            fd_use_team(0);
        }
        expect(!memcmp(y[0], y[1], sizeof *y), "the pool's modes", fd_isa_active(), flush, 0);
        expect(!memcmp(y[0], y[2], sizeof *y), "a team's modes", fd_isa_active(), flush, 0);
        fd_set_num_threads(1);
        fd_dropout_forward(FD_FLOAT32, tiny, y[0], NULL, 3, MAX_CELLS, SEED, OFFSET, 429496730u, 1.1, 0, 0);
        expect(!memcmp(y[0], y[3], sizeof *y), "modes left behind", fd_isa_active(), flush, 0);
        expect(memcmp(y[1], y[3], sizeof *y), "modes that change nothing", fd_isa_active(), flush, 0);
    }
}

/* gather_cells and scatter_cells: every element of the result, on any number of threads. */
static void check_cells(int isa) {
    enum { HEIGHT = 700, WIDTH = 401 };
    static int64_t rows[HEIGHT], columns[WIDTH];
    for (int dtype = FD_FLOAT32, k = 0; k < 9; dtype = ++k % 4, fd_set_num_threads(1 + k % 3)) {
        uint64_t m = 0, n = 0;
        size_t size = element_bytes(dtype), bytes = HEIGHT * WIDTH * size;
        for (int64_t r = 0; r < HEIGHT; r++)
            if ((r * 7 + k) % 5 > 1) rows[m++] = r;
        for (int64_t c = 0; c < WIDTH; c++)
            if ((c * 11 + k) % 7 > 2) columns[n++] = c;
        array_t x = array(bytes, (size_t)k, 0), part = array(m * n * size, 3, 0xA5), whole = array(bytes, 1, 0xA5);
        fill_random(x.at, bytes, 9);
        fd_isa_select(isa);
        expect(!fd_gather_cells(dtype, x.at, part.at, rows, columns, m, n, HEIGHT, WIDTH), "gather", isa, m, n);
        expect(!fd_scatter_cells(dtype, part.at, whole.at, rows, columns, m, n, HEIGHT, WIDTH), "scatter", isa, m, n);
        for (uint64_t i = 0, r = 0, c = 0; i < HEIGHT * WIDTH; i++) {
            static const unsigned char zeros[8];
            const uint64_t row = i / WIDTH, column = i % WIDTH;
            if (column == 0) c = 0;
            const int kept = r < m && c < n && (uint64_t)rows[r] == row && (uint64_t)columns[c] == column;
            const unsigned char *wanted = kept ? x.at + i * size : zeros;
            expect(!memcmp(whole.at + i * size, wanted, size), "scattered", isa, row, column);
            if (kept) expect(!memcmp(part.at + (r * n + c++) * size, wanted, size), "gathered", isa, row, column);
            if (column == WIDTH - 1 && r < m && (uint64_t)rows[r] == row) r++;
        }
        free(x.block), free(part.block), free(whole.block);
    }
    fd_set_num_threads(1);
}

static void check_refusals(void) {
    uint32_t words[2] = {1, 2};
    float x[4] = {1, 2, 3, 4};
    expect(fd_draw_bits(NULL, 0, 0, 1, 0, 0, 5) == FD_BAD_ARGUMENT, "NULL", 0, 0, 0);
    expect(fd_draw_bits(words, 0, 0, 1, 0, 0, 0) == FD_BAD_ARGUMENT, "threshold 0", 0, 0, 0);
    expect(fd_draw_bits(words, 0, ~0ull, 2, 0, 0, 5) == FD_BAD_ARGUMENT, "cells past 2^64", 0, 0, 0);
    expect(fd_draw_rows(words, 0, 5, 2, ~0ull - 13, 3, 4, 2, 0, 0, 5) == FD_BAD_ARGUMENT, "rows past 2^64", 0, 0, 0);
    expect(fd_masked_affine(7, x, x, words, 0, 1, 1, 4, 1, 0, 0) == FD_BAD_ARGUMENT, "dtype", 0, 0, 0);
    expect(fd_masked_affine(0, x, x, words, 0, 1ull << 40, 1ull << 40, 1, 1, 0, 0) == FD_BAD_ARGUMENT, "size", 0, 0, 0);
    expect(fd_gaussian_multiply(0, x, x, (1ull << 61) - 3, 4, 0, 0, 1) == FD_BAD_ARGUMENT, "cells past 2^61", 0, 0, 0);
    expect(fd_dilate_bits(words, words + 1, 1, 1, 1, 0) == FD_BAD_ARGUMENT, "block 0", 0, 0, 0);
    expect(fd_dilate_bits(words, words + 1, 1, 2, 1, ~0ull) == FD_BAD_ARGUMENT, "block too long", 0, 0, 0);
    const int64_t index[2] = {1, 0};
    expect(fd_gather_cells(0, x, x, index, index, 1, 2, 2, 2) == FD_BAD_ARGUMENT, "order", 0, 0, 0);
    expect(fd_scatter_cells(0, x, x, index, index, 1, 1, 1, 2) == FD_BAD_ARGUMENT, "past the rows", 0, 0, 0);
    expect(fd_isa_select(99) == FD_BAD_ISA && fd_set_num_threads(0) == FD_BAD_ARGUMENT, "range", 0, 0, 0);
    expect(fd_set_memory(0, 3, 8, 0, 0) == FD_BAD_ARGUMENT && fd_set_memory(0, 1, 2, 0, 0) == FD_BAD_ARGUMENT &&
               fd_set_memory(0, 16, 8, 0, 0) == FD_BAD_ARGUMENT && fd_set_memory(0, 1, 32, 0, 0) == FD_BAD_ARGUMENT,
           "policy", 0, 0, 0);
    expect(words[0] == 1 && words[1] == 2, "words untouched", 0, 0, 0);
}

/* Around the cache: each number of pages and lines, each dtype, outputs that begin anywhere, lengths that end with a
 * chunk, a piece, or next to them. */
static void check_ways(int isa) {
    static const int WAYS[][2] = {{1, 8}, {2, 16}, {4, 8}, {8, 4}, {8, 16}};
    static const size_t PAST[] = {0, 8, 24, 1};
    static const uint64_t SIZES[] = {5, 8191, 8193, 16384 + 513, 3 * 8192};
    for (size_t w = 0; w < COUNT(WAYS); w++)
        for (int dtype = FD_FLOAT32; dtype <= FD_BFLOAT16; dtype++)
            for (size_t k = 0; k < COUNT(SIZES); k++) {
                const size_t turn = w + (size_t)dtype + k;
                go_around_cache(WAYS[w][0], WAYS[w][1]);
                compare(isa, dtype, SIZES[k], turn * 19, THRESHOLDS[3], PAST[turn % COUNT(PAST)], turn % 3 ? 0 : 0.5);
                if (w == 0) compare_noise(isa, dtype, SIZES[k], turn, PAST[turn % COUNT(PAST)]);
            }
    go_by_ordinary_stores();
}

int main(int argc, char **argv) {
    const unsigned long stride = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
    if (!stride || argc > 3) {
        fprintf(stderr, "usage: kernels_test GOLDEN STRIDE\n");
        return 2;
    }
    fd_set_num_threads(1);
    check_golden(argv[1]);
    int sets = 0;
    for (int isa = 0; isa < fd_isa_count(); isa++) {
        if (!fd_isa_usable(isa)) continue;
        sets++;
        for (int dtype = FD_FLOAT32; dtype <= FD_BFLOAT16; dtype++)
            for (size_t i = 0; i < COUNT(LENGTHS); i++)
                for (size_t j = 0; j < COUNT(FIRSTS); j++) {
                    size_t turn = i + j + (size_t)dtype;
                    compare(isa, dtype, LENGTHS[i], FIRSTS[j], THRESHOLDS[turn % COUNT(THRESHOLDS)],
                            turn % 3 * (turn % 5), turn % 4 ? 0 : 0.5);
                }
        for (int dtype = FD_FLOAT32; dtype <= FD_BFLOAT16; dtype++)
            for (size_t i = 0; i < COUNT(LENGTHS); i++)
                for (size_t j = 0; j + 1 < COUNT(FIRSTS); j++) { /* the last is no cell of noise */
                    size_t turn = i + j + (size_t)dtype;
                    compare_noise(isa, dtype, LENGTHS[i], FIRSTS[j], turn % 3 * (turn % 5));
                }
        check_noise(isa);
        compare_grids(isa);
        compare_dilations(isa);
        compare_row_sets(isa);
        check_ways(isa);
        check_cells(isa);
        check_kept_cells(isa);
        check_vector_math(isa, (uint32_t)stride);
        check_fused(isa);
        check_attention(isa);
        printf("%s: %s\n", fd_isa_name(isa), failures ? "FAIL" : "ok");
    }
    check_threads();
    check_team();
    check_float_modes();
    check_refusals();
    check_fused_refusals();
    check_attention_refusals();
    printf("%s: %d instruction sets, %d failures\n", failures ? "FAIL" : "PASS", sets, failures);
    return failures != 0;
}

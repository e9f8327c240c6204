/* Products of small matrices in scratch memory, for attention. Included by fused.inc.h for each type that is computed
 * in.
 *
 * Six rows by two vectors of the result are summed in registers over the whole of the inner axis. A number of `a` is
 * broadcast, so `a` may be transposed. Each number of the result is summed in the order of the inner axis, whatever the
 * other extents are: results depend on the shape of their own row and column alone.
 */
#ifndef PRODUCT_ROWS
#define PRODUCT_ROWS 6
#define PRODUCT_VECTORS 2
#define EACH_ROW _Pragma("GCC unroll 6") for (int i = 0; i < rows; i++)
#define EACH_VECTOR _Pragma("GCC unroll 2") for (int h = 0; h < PRODUCT_VECTORS; h++)
#endif

enum { C(panel) = PRODUCT_VECTORS * C(lanes), C(line) = LINE_BYTES / sizeof(C(t)) };

/* Rows of numbers in scratch memory; `pitch` numbers from one to the next. */
typedef struct {
    C(t) * at;
    uint64_t pitch;
} C(matrix);

/* The pitch of rows of n columns: whole panels, in an odd number of cache lines, because an even one would put all rows
 * into a part of the cache's sets. */
INLINE uint64_t C(pitch_of)(uint64_t n) {
    const uint64_t whole = C(panel) > C(line) ? C(panel) : C(line), pitch = (n + whole - 1) / whole * whole;
    return pitch / C(line) % 2 ? pitch : pitch + C(line);
}

/* `rows` rows of a panel of c. With constant arguments there are no branches in the loop. */
INLINE void C(multiply_panel)(const C(t) * a, uint64_t a_row, uint64_t a_column, C(matrix) b, C(matrix) c,
                              const int rows, uint64_t inner, int add) {
    C(v) sums[PRODUCT_ROWS][PRODUCT_VECTORS];
    EACH_ROW EACH_VECTOR sums[i][h] = C(set1)(0);
    for (; inner; inner--, a += a_column, b.at += b.pitch) {
        C(v) line[PRODUCT_VECTORS];
        EACH_VECTOR line[h] = C(load)(b.at + h * C(lanes));
        EACH_ROW {
            const C(v) number = C(set1)(a[(uint64_t)i * a_row]);
            EACH_VECTOR sums[i][h] = C(fma)(number, line[h], sums[i][h]);
        }
    }
    EACH_ROW {
        EACH_VECTOR {
            C(t) *to = c.at + (uint64_t)i * c.pitch + h * C(lanes);
            if (add) sums[i][h] = C(load)(to) + sums[i][h];
            C(store)(to, sums[i][h]);
        }
    }
}

INLINE void C(multiply_rows)(const C(t) * a, uint64_t a_row, uint64_t a_column, C(matrix) b, C(matrix) c, uint64_t rows,
                             uint64_t inner, int add) {
    for (; rows >= PRODUCT_ROWS; rows -= PRODUCT_ROWS) {
        C(multiply_panel)(a, a_row, a_column, b, c, PRODUCT_ROWS, inner, add);
        a += PRODUCT_ROWS * a_row;
        c.at += PRODUCT_ROWS * c.pitch;
    }
    switch (rows) {
#define CASE(n)                                                                                                        \
    case n: C(multiply_panel)(a, a_row, a_column, b, c, n, inner, add); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#undef CASE
    }
}

/* c = a b, or c += a b. c is [rows, columns], b [inner, columns], and a [rows, inner], or [inner, rows] if transposed.
 * Columns are rounded up to whole panels. */
static void C(product)(C(matrix) a, int transposed, C(matrix) b, C(matrix) c, uint64_t rows, uint64_t columns,
                       uint64_t inner, int add) {
    for (uint64_t j = 0; j < columns; j += C(panel), b.at += C(panel), c.at += C(panel)) {
        if (transposed)
            C(multiply_rows)(a.at, 1, a.pitch, b, c, rows, inner, add);
        else
            C(multiply_rows)(a.at, a.pitch, 1, b, c, rows, inner, add);
    }
}

/* Rows of data, `stride` elements apart from element `at` on, as numbers; zeros behind them, to the end of a panel. */
static void C(take_rows)(int type, const void *data, uint64_t at, uint64_t stride, uint64_t rows, uint64_t columns,
                         C(matrix) to) {
    for (; rows; rows--, at += stride, to.at += to.pitch) {
        const C(t) *row = C(load_strip)(type, data, at, columns, to.at);
#define BODY(left) C(store)(to.at + i, C(load_partial)(row + i, left));
        FOR_VECTORS(columns, BODY);
#undef BODY
        const uint64_t whole = (columns + C(lanes) - 1) / C(lanes);
        if (whole % PRODUCT_VECTORS) C(store)(to.at + whole * C(lanes), C(set1)(0));
    }
}

/* The same transposed: to [columns, rows]. Four rows at once, so that their numbers are stored together. */
static void C(take_transposed)(int type, const void *data, uint64_t at, uint64_t stride, uint64_t rows,
                               uint64_t columns, C(matrix) to) {
    const uint64_t end = (rows + C(panel) - 1) / C(panel) * C(panel);
    C(t) room[4][STRIP_CELLS];
    const C(t) * row[4];
    for (uint64_t r = 0; r < end; r += 4) {
        for (uint64_t j = 0, n; j < columns; j += n) {
            n = min_u64(columns - j, STRIP_CELLS);
            for (uint64_t k = 0; k < 4; k++) {
                row[k] = room[k];
                if (r + k < rows)
                    row[k] = C(load_strip)(type, data, at + (r + k) * stride + j, n, room[k]);
                else
                    memset(room[k], 0, n * sizeof **room);
            }
            C(t) *line = to.at + j * to.pitch + r;
            for (uint64_t i = 0; i < n; i++, line += to.pitch) {
                const C(t) four[4] = {C(load_one)(row[0] + i), C(load_one)(row[1] + i), C(load_one)(row[2] + i),
                                      C(load_one)(row[3] + i)};
                memcpy(line, four, sizeof four);
            }
        }
    }
}

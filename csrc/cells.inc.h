/* gather_cells and scatter_cells: the kept rows and columns of a matrix, side by side, and back. Included once by
 * kernels.inc.h. Scalar: a load and a store for each element are as fast as memory that is new to the process.
 *
 * Elements are moved as bits of their size. Indices ascend (dispatch.c has checked that), so a thread finds the first
 * kept row of its range by bisection.
 */
typedef int64_t __attribute__((aligned(1), may_alias)) index_t;

INLINE void gather_row(const char *x, char *y, const index_t *columns, uint64_t n, const size_t size) {
    for (uint64_t c = 0; c < n; c++) memcpy(y + c * size, x + (uint64_t)columns[c] * size, size);
}

INLINE void scatter_row(const char *x, char *y, const index_t *columns, uint64_t n, const size_t size) {
    for (uint64_t c = 0; c < n; c++) memcpy(y + (uint64_t)columns[c] * size, x + c * size, size);
}

/* The same with the size as a constant, so that a copy is a load and a store. */
#define DEFINE_BY_SIZE(move)                                                                                           \
    OUTLINE static void move##_of(const char *x, char *y, const index_t *columns, uint64_t n, size_t size) {           \
        switch (size) {                                                                                                \
        case 2: move(x, y, columns, n, 2); break;                                                                      \
        case 4: move(x, y, columns, n, 4); break;                                                                      \
        case 8: move(x, y, columns, n, 8); break;                                                                      \
        }                                                                                                              \
    }
DEFINE_BY_SIZE(gather_row)
DEFINE_BY_SIZE(scatter_row)
#undef DEFINE_BY_SIZE

INLINE size_t cell_bytes(int dtype) { return dtype == FD_FLOAT64 ? 8 : dtype == FD_FLOAT32 ? 4 : 2; }

static void gather_cells(const void *arguments, uint64_t begin, uint64_t end) {
    const gather_cells_args *args = arguments;
    const index_t *rows = args->kept_rows;
    const size_t size = cell_bytes(args->dtype);
    const char *x = args->x;
    char *y = args->y;
    for (uint64_t r = begin; r < end; r++)
        gather_row_of(x + (uint64_t)rows[r] * args->width * size, y + r * args->n * size, args->kept_columns, args->n,
                      size);
}

static void scatter_cells(const void *arguments, uint64_t begin, uint64_t end) {
    const scatter_cells_args *args = arguments;
    const index_t *rows = args->kept_rows;
    const size_t size = cell_bytes(args->dtype);
    const char *x = args->x;
    char *y = args->y;
    uint64_t r = 0;
    for (uint64_t last = args->m; r < last;) {
        uint64_t middle = r + (last - r) / 2;
        if ((uint64_t)rows[middle] < begin)
            r = middle + 1;
        else
            last = middle;
    }
    for (uint64_t at = begin; at < end; at++) {
        char *row = y + at * args->width * size;
        memset(row, 0, args->width * size);
        if (r < args->m && (uint64_t)rows[r] == at)
            scatter_row_of(x + r++ * args->n * size, row, args->kept_columns, args->n, size);
    }
}

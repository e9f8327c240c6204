/* gather_cells and scatter_cells under one instruction set, against loops, with indices and data at odd addresses and
 * by several threads. */
#include "testing.h"

enum { HEIGHT = 1201, WIDTH = 257 };

/* Every step-th number below extent, beginning with from. Returns how many. */
static uint64_t every(array_t index, uint64_t extent, uint64_t from, uint64_t step) {
    uint64_t n = 0;
    for (uint64_t i = from; i < extent; i += step, n++) {
        int64_t kept = (int64_t)i;
        memcpy(index.at + n * sizeof kept, &kept, sizeof kept);
    }
    return n;
}

static void check_kept(int isa, int dtype, uint64_t height, uint64_t width, uint64_t from, uint64_t step) {
    const size_t size = element_bytes(dtype), shift = step % 3;
    const uint64_t m = from < height ? (height - from + step - 1) / step : 0, n = (width + step - 1) / step;
    array_t whole = array(height * width * size, shift, 0), part = array(m * n * size, shift, 0xA5);
    array_t back = array(height * width * size, 0, 0xA5);
    array_t rows = array(m * 8, shift, 0), columns = array(n * 8, shift, 0);
    unsigned char *naive = calloc(height * width, size), *gathered = malloc(m * n * size + 1);
    fill_random(whole.at, height * width * size, (uint32_t)(height + width));
    expect(every(rows, height, from, step) == m && every(columns, width, 0, step) == n, "index", isa, m, n);
    for (uint64_t r = 0; r < m; r++)
        for (uint64_t c = 0; c < n; c++) {
            const uint64_t at = ((from + r * step) * width + c * step) * size;
            memcpy(gathered + (r * n + c) * size, whole.at + at, size);
            memcpy(naive + at, whole.at + at, size);
        }
    fd_isa_select(isa);
    for (int threads = 1; threads <= 4; threads += 3) {
        fd_set_num_threads(threads);
        expect(fd_gather_cells(dtype, whole.at, part.at, rows.at, columns.at, m, n, height, width) == FD_OK, "status",
               isa, m, n);
        expect(!memcmp(part.at, gathered, m * n * size), "gather_cells", isa, m, n);
        expect(fd_scatter_cells(dtype, part.at, back.at, rows.at, columns.at, m, n, height, width) == FD_OK, "status",
               isa, m, n);
        expect(!memcmp(back.at, naive, height * width * size), "scatter_cells", isa, m, n);
    }
    fd_set_num_threads(1);
    free(whole.block), free(part.block), free(back.block), free(rows.block), free(columns.block);
    free(naive), free(gathered);
}

void check_kept_cells(int isa) {
    for (int dtype = FD_FLOAT32; dtype <= FD_BFLOAT16; dtype++)
        for (uint64_t step = 1; step < 9; step += 3) {
            check_kept(isa, dtype, 1, 1, 0, step);
            check_kept(isa, dtype, 7, 33, 7, step); /* no row */
            check_kept(isa, dtype, HEIGHT, WIDTH, step, step);
            check_kept(isa, dtype, HEIGHT, WIDTH, 1190, step);
        }
}

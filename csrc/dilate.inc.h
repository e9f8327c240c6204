/* dilate_bits: each dropped cell drops a block of cells. Included once by kernels.inc.h. Scalar, 64 cells at a time.
 *
 * Rows of n * inner bits become rows of (n + block - 1) * inner. Imagine (block - 1) * inner ones before each input row
 * and after the last. Then an output cell is the AND of `block` cells, `inner` apart, of one long string of bits, and
 * no row reaches into the next. The string is laid out a window at a time in a local buffer. Each step ANDs the window
 * with a copy of itself, shifted by the number of cells already covered times inner, so the covered width doubles. If a
 * block reaches past a window, it is covered in parts that fit.
 */
enum {
    DILATE_CELLS = 64 * FD_BLOCK_CELLS, /* of output per window, which with all its reach takes 16 KiB */
    REACH_CELLS = 3 * DILATE_CELLS
};

/* n cells of the padded string from cell `from` on; n is a multiple of 64. */
static void pad_bits(uint64_t *to, const dilate_bits_args *args, uint64_t from, uint64_t n) {
    uint64_t ones = (args->block - 1) * args->inner, data = args->n * args->inner, row = ones + data;
    uint64_t end = args->outer * data, at = from % row;
    uint64_t position = min_u64(end, from / row * data + (at > ones ? at - ones : 0));
    writer_t writer = {(unsigned char *)to, 0, 0};
    for (uint64_t step; n; n -= step) {
        if (at < ones || position == end) {
            step = min_u64(n, at < ones ? ones - at : row - at);
            append_run(&writer, 1, step);
        } else {
            step = min_u64(n, row - at);
            append_copy(&writer, args->words, position, step);
            position += step;
        }
        at = at + step < row ? at + step : 0;
    }
}

/* string[i] &= string[i + shift], for words that have all of it within the string. */
static void and_shifted(uint64_t *string, uint64_t words, uint64_t shift) {
    const uint64_t *later = string + shift / 64;
    unsigned low = shift % 64;
    for (uint64_t i = 0; i + shift / 64 + 1 < words; i++)
        string[i] &= later[i] >> low | later[i + 1] << 1 << (63 - low);
}

static void dilate_bits(const void *arguments, uint64_t begin, uint64_t end) {
    const dilate_bits_args *args = arguments;
    const uint64_t inner = args->inner, block = args->block;
    uint64_t window[(DILATE_CELLS + REACH_CELLS) / 64 + 2], result[DILATE_CELLS / 64];
    for (uint64_t at = begin, step; at < end; at += step) {
        step = min_u64(end - at, DILATE_CELLS);
        uint64_t words = (step + 63) / 64;
        memset(result, 0xFF, sizeof result);
        for (uint64_t from = 0, taken; from < block; from += taken) {
            taken = min_u64(block - from, 1 + REACH_CELLS / inner);
            uint64_t reached = words + ((taken - 1) * inner + 63) / 64 + 1;
            pad_bits(window, args, at + from * inner, 64 * reached);
            for (uint64_t have = 1, more; have < taken; have += more) {
                more = min_u64(have, taken - have);
                and_shifted(window, reached, more * inner);
            }
            for (uint64_t i = 0; i < words; i++) result[i] &= window[i];
        }
        if (step % 64) result[words - 1] &= ~0ull >> (64 - step % 64);
        memcpy((uint32_t *)args->to + at / 32, result, (step + 31) / 32 * sizeof(uint32_t));
    }
}

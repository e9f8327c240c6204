/* The public entry points fd_<name>, for cffi and the C tests. Each checks its arguments (<name>_good), finds out how
 * the work is split (<name>_work), and runs the kernel from the table of the active instruction set. The instruction
 * set is chosen here too, once per process, by asking the CPU.
 *
 * Kernels check nothing: a call that <name>_good lets through must be safe on every instruction set.
 */
#include "kernels.h"
#include "philox.h"

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#if defined(__x86_64__) && !defined(FASTDROP_PORTABLE)
#include <cpuid.h>
#endif

/* ---- instruction sets ---- */

enum { ISA_SCALAR, ISA_NEON, ISA_AVX2, ISA_AVX512, ISA_COUNT };

static int always(void) { return 1; }

#if defined(__x86_64__) && !defined(FASTDROP_PORTABLE)
enum { XCR0_SSE_AVX = 0x06, XCR0_AVX512 = 0xE6 };

/* The register state that the operating system saves on a context switch. xgetbv is written as bytes, because the
 * intrinsic needs a target flag. */
static uint64_t saved_state(void) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}

static int has_avx2(void) {
    uint32_t a, b, c, d;
    const uint32_t wanted = bit_FMA | bit_AVX | bit_F16C | bit_POPCNT;
    if ((saved_state() & XCR0_SSE_AVX) != XCR0_SSE_AVX) return 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & wanted) != wanted) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2) && (b & bit_BMI2);
}

static int has_avx512(void) {
    uint32_t a, b, c, d;
    const uint32_t wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if (!has_avx2() || (saved_state() & XCR0_AVX512) != XCR0_AVX512) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & wanted) == wanted;
}
#endif

static const struct {
    const char *name;
    const fd_table *table; /* NULL: not built for this architecture */
    int (*supported)(void);
} isas[ISA_COUNT] = {
    [ISA_SCALAR] = {"scalar", &fd_table_scalar, always},
#if defined(__aarch64__)
    [ISA_NEON] = {"neon", &fd_table_neon, always},
#else
    [ISA_NEON] = {"neon", NULL, NULL},
#endif
#if defined(__x86_64__) && !defined(FASTDROP_PORTABLE)
    [ISA_AVX2] = {"avx2", &fd_table_avx2, has_avx2},
    [ISA_AVX512] = {"avx512", &fd_table_avx512, has_avx512},
#else
    [ISA_AVX2] = {"avx2", NULL, NULL},
    [ISA_AVX512] = {"avx512", NULL, NULL},
#endif
};

static atomic_int active = -1; /* -1: not probed yet. Any thread may probe: all get the same result */

int fd_isa_count(void) { return ISA_COUNT; }

const char *fd_isa_name(int isa) { return isa >= 0 && isa < ISA_COUNT ? isas[isa].name : ""; }

int fd_isa_usable(int isa) { return isa >= 0 && isa < ISA_COUNT && isas[isa].table && isas[isa].supported(); }

int fd_isa_active(void) {
    int isa = atomic_load_explicit(&active, memory_order_relaxed);
    if (isa < 0) {
        for (isa = ISA_COUNT - 1; !fd_isa_usable(isa);) isa--;
        atomic_store_explicit(&active, isa, memory_order_relaxed);
    }
    return isa;
}

int fd_isa_select(int isa) {
    if (!fd_isa_usable(isa)) return FD_BAD_ISA;
    atomic_store(&active, isa);
    return FD_OK;
}

/* ---- primitives ---- */

static const uint64_t THRESHOLD_ALL = (uint64_t)1 << 32; /* drops all, as 0 keeps all; the callers handle both */

static uint64_t element_bytes(int dtype) { return dtype == FD_FLOAT64 ? 8 : dtype == FD_FLOAT32 ? 4 : 2; }

static int good_draw(uint64_t first, uint64_t n, uint64_t threshold) {
    return threshold > 0 && threshold < THRESHOLD_ALL && (n == 0 || n - 1 <= UINT64_MAX - first);
}

static int good_dtype(int dtype) { return dtype >= FD_FLOAT32 && dtype <= FD_BFLOAT16; }

/* For each op there are two functions: <name>_good, whether the arguments are sound, and <name>_work, how the work is
 * split among threads. */
typedef struct {
    uint64_t begin, units; /* units begin .. begin+units-1: cells, rows, panels of rows, parts of heads */
    uint64_t cells;        /* in a unit */
    uint64_t bytes;        /* of the largest output */
    add_panels_args sums;  /* added up afterwards if there is more than one panel */
} work_t;

static work_t by_cells(uint64_t n, int dtype) {
    return (work_t){.units = n, .cells = 1, .bytes = n * element_bytes(dtype)};
}

static work_t by_rows(uint64_t rows, uint64_t columns, int dtype) {
    return (work_t){.units = rows, .cells = columns, .bytes = rows * columns * element_bytes(dtype)};
}

/* n: elements in all panels. */
static work_t by_panels(uint64_t n, int dtype, void *sums, uint64_t panels, uint64_t width) {
    return (work_t){.units = panels,
                    .cells = n / panels,
                    .bytes = n * element_bytes(dtype),
                    .sums = {sums, panels, width, dtype == FD_FLOAT64}};
}

static int draw_bits_good(const draw_bits_args *a) {
    return a->words && good_draw(a->first, a->n, a->threshold) && a->n <= UINT64_MAX - a->position;
}
static work_t draw_bits_work(const draw_bits_args *a) {
    return (work_t){.begin = a->position, .units = a->n, .cells = 1, .bytes = a->n / 8};
}

static int draw_rows_good(const draw_rows_args *a) {
    uint64_t n, last, outer, row;
    if (!a->words || !good_draw(a->first, 0, a->threshold) || __builtin_mul_overflow(a->outer, a->rows, &n) ||
        __builtin_mul_overflow(n, a->columns, &n) || n > UINT64_MAX - a->position)
        return 0;
    return n == 0 ||
           (!__builtin_mul_overflow(a->outer - 1, a->outer_pitch, &outer) &&
            !__builtin_mul_overflow(a->rows - 1, a->pitch, &row) && !__builtin_add_overflow(outer, row, &last) &&
            !__builtin_add_overflow(last, a->columns - 1, &last) && !__builtin_add_overflow(last, a->first, &last));
}
static work_t draw_rows_work(const draw_rows_args *a) {
    uint64_t n = a->outer * a->rows * a->columns;
    return (work_t){.begin = a->position, .units = n, .cells = 1, .bytes = n / 8};
}

static int dropout_forward_good(const dropout_forward_args *a) {
    return a->x && a->y && good_dtype(a->dtype) && good_draw(a->first, a->n, a->threshold);
}
static work_t dropout_forward_work(const dropout_forward_args *a) { return by_cells(a->n, a->dtype); }

static int masked_affine_good(const masked_affine_args *a) {
    uint64_t n;
    return a->x && a->y && a->words && good_dtype(a->dtype) && !__builtin_mul_overflow(a->outer, a->repeat, &n) &&
           !__builtin_mul_overflow(n, a->inner, &n) && a->outer * a->inner <= UINT64_MAX - a->position;
}
static work_t masked_affine_work(const masked_affine_args *a) {
    return by_cells(a->outer * a->repeat * a->inner, a->dtype);
}

static int gaussian_multiply_good(const gaussian_multiply_args *a) {
    const uint64_t cells = (uint64_t)1 << 61; /* larger counters would reach into the domain's bits */
    return a->x && a->y && good_dtype(a->dtype) && a->first <= cells && a->n <= cells - a->first;
}
static work_t gaussian_multiply_work(const gaussian_multiply_args *a) { return by_cells(a->n, a->dtype); }

static int dilate_bits_good(const dilate_bits_args *a) {
    uint64_t n;
    return a->to && a->words && a->block && !__builtin_add_overflow(a->n, a->block - 1, &n) &&
           !__builtin_mul_overflow(n, a->inner, &n) && !__builtin_mul_overflow(n, a->outer, &n);
}
static work_t dilate_bits_work(const dilate_bits_args *a) {
    uint64_t n = a->outer * (a->n + a->block - 1) * a->inner;
    return (work_t){.units = n, .cells = 1, .bytes = n / 8};
}

static int good_dtypes(int dtype, int residual_dtype) {
    return good_dtype(dtype) && good_dtype(residual_dtype) &&
           (dtype == residual_dtype || (residual_dtype == FD_FLOAT32 && dtype != FD_FLOAT64));
}

static int good_rows(uint64_t rows, uint64_t columns) {
    const uint64_t cells = (uint64_t)1 << 60;
    uint64_t n;
    return columns && !__builtin_mul_overflow(rows, columns, &n) && n <= cells;
}

/* Ascending, and below the extent. As cheap as it is, it keeps the kernels inside of their arrays. */
static int good_index(const void *index, uint64_t n, uint64_t extent) {
    int64_t next, last = -1;
    if (!index) return 0;
    for (uint64_t i = 0; i < n; i++, last = next) {
        memcpy(&next, (const char *)index + i * sizeof next, sizeof next);
        if (next <= last || (uint64_t)next >= extent) return 0;
    }
    return 1;
}

static int gather_cells_good(const gather_cells_args *a) {
    return a->x && a->y && good_dtype(a->dtype) && good_rows(a->height, a->width) && a->n &&
           good_index(a->kept_rows, a->m, a->height) && good_index(a->kept_columns, a->n, a->width);
}
static work_t gather_cells_work(const gather_cells_args *a) { return by_rows(a->m, a->n, a->dtype); }

static int scatter_cells_good(const scatter_cells_args *a) {
    return a->x && a->y && good_dtype(a->dtype) && good_rows(a->height, a->width) &&
           good_index(a->kept_rows, a->m, a->height) && good_index(a->kept_columns, a->n, a->width);
}
static work_t scatter_cells_work(const scatter_cells_args *a) { return by_rows(a->height, a->width, a->dtype); }

static int good_activation(int activation) {
    switch (activation) {
    case FD_NO_ACTIVATION: return 1;
#define ROW(code, name)                                                                                                \
    case code: return 1;
        FD_ACTIVATIONS(ROW)
#undef ROW
    }
    return 0;
}

static int pointwise_forward_good(const pointwise_forward_args *a) {
    return a->x && a->y && good_dtypes(a->dtype, a->residual_dtype) && good_rows(a->rows, a->columns) &&
           good_activation(a->activation) && (!a->signs || (a->activation == FD_RELU && a->signs != a->words));
}
static work_t pointwise_forward_work(const pointwise_forward_args *a) {
    return by_cells(a->rows * a->columns, a->residual_dtype);
}

static int pointwise_backward_good(const pointwise_backward_args *a) {
    int needs_x = a->activation != FD_NO_ACTIVATION || a->dmultiplier;
    return a->dy && a->dx && (a->x || !needs_x) && good_dtypes(a->dtype, a->residual_dtype) &&
           good_rows(a->rows, a->columns) && good_activation(a->activation) && (!a->sums || a->panels);
}
static work_t pointwise_backward_work(const pointwise_backward_args *a) {
    uint64_t n = a->rows * a->columns;
    return a->sums ? by_panels(n, a->dtype, a->sums, a->panels, a->columns) : by_cells(n, a->dtype);
}

static int norm_forward_good(const norm_forward_args *a) {
    return a->x && a->y && a->residual_out && a->statistics && good_dtypes(a->dtype, a->residual_dtype) &&
           good_rows(a->rows, a->columns);
}
static work_t norm_forward_work(const norm_forward_args *a) { return by_rows(a->rows, a->columns, a->residual_dtype); }

static int norm_backward_good(const norm_backward_args *a) {
    return a->dy && a->residual_out && a->statistics && (a->dx || a->dresidual) &&
           good_dtypes(a->dtype, a->residual_dtype) && good_rows(a->rows, a->columns) && (!a->sums || a->panels);
}
static work_t norm_backward_work(const norm_backward_args *a) {
    const int type = a->dresidual ? a->residual_dtype : a->dtype;
    if (!a->sums) return by_rows(a->rows, a->columns, type);
    return by_panels(a->rows * a->columns, type, a->sums, a->panels, 3 * a->columns);
}

static int softmax_forward_good(const softmax_forward_args *a) {
    return a->x && a->y && good_dtype(a->dtype) && good_rows(a->rows, a->columns) && a->heads && a->queries;
}
static work_t softmax_forward_work(const softmax_forward_args *a) { return by_rows(a->rows, a->columns, a->dtype); }

static int softmax_backward_good(const softmax_backward_args *a) {
    return a->dy && a->probabilities && a->dx && good_dtype(a->dtype) && good_rows(a->rows, a->columns);
}
static work_t softmax_backward_work(const softmax_backward_args *a) { return by_rows(a->rows, a->columns, a->dtype); }

static int good_attention(int dtype, int mask_dtype, const void *mask, const uint64_t extents[7]) {
    const uint64_t largest = (uint64_t)1 << 32; /* of an extent; the number of scores must fit 60 bits too */
    uint64_t scores = 1;
    for (int i = 0; i < 7; i++) {
        if (extents[i] == 0 || extents[i] > largest) return 0;
        if (i < 5 && __builtin_mul_overflow(scores, extents[i], &scores)) return 0;
    }
    return good_dtype(dtype) && scores >> 60 == 0 &&
           (!mask || mask_dtype == FD_BOOL || mask_dtype == dtype || (mask_dtype == FD_FLOAT32 && dtype != FD_FLOAT64));
}
#define ATTENTION_EXTENTS(a)                                                                                           \
    (const uint64_t[]) { (a)->outer, (a)->heads, (a)->group, (a)->queries, (a)->keys, (a)->width, (a)->value_width }

/* A score costs as much as ATTENTION_CELLS cells of other kernels. */
enum { ATTENTION_CELLS = 16 };

static int attention_forward_good(const attention_forward_args *a) {
    return a->query && a->key && a->value && a->y && a->statistics && a->strides &&
           good_attention(a->dtype, a->mask_dtype, a->mask, ATTENTION_EXTENTS(a));
}
static work_t attention_forward_work(const attention_forward_args *a) {
    const uint64_t chunks = attention_chunks(a->queries);
    return (work_t){.units = a->outer * a->heads * a->group * chunks,
                    .cells = a->queries * a->keys / chunks * ATTENTION_CELLS};
}

static int attention_backward_good(const attention_backward_args *a) {
    const int of_scores = a->dquery || a->dkey || a->dmask;
    uint64_t units;
    return a->query && a->key && a->dy && a->statistics && a->strides && a->parts && !a->value == !a->y &&
           (a->y || !of_scores) && good_attention(a->dtype, a->mask_dtype, a->mask, ATTENTION_EXTENTS(a)) &&
           !__builtin_mul_overflow(a->outer * a->heads, a->parts, &units);
}
static work_t attention_backward_work(const attention_backward_args *a) {
    return (work_t){.units = a->outer * a->heads * a->parts,
                    .cells = a->group * a->queries * (a->keys / a->parts + 1) * ATTENTION_CELLS};
}

/* The entry points. run_<name> expects sound arguments. */
#define FD_VALUE(type, name) .name = name,
#define FD_OP(op, PARAMETERS)                                                                                          \
    static int run_##op(op##_args *args) {                                                                             \
        const fd_table *table = isas[fd_isa_active()].table;                                                           \
        const work_t work = op##_work(args);                                                                           \
        atomic_int failed = 0;                                                                                         \
        args->failed = &failed;                                                                                        \
        args->stream = work.bytes >= atomic_load_explicit(&fd_memory.stream, memory_order_relaxed);                    \
        fd_parallel_for(table->op, args, work.begin, work.begin + work.units, work.cells);                             \
        if (work.sums.panels > 1)                                                                                      \
            fd_parallel_for(table->add_panels, &work.sums, 0, work.sums.width, work.sums.panels);                      \
        return atomic_load(&failed) ? FD_NO_MEMORY : FD_OK;                                                            \
    }                                                                                                                  \
    int fd_##op(PARAMETERS(FD_PARAMETER, FD_NEXT_PARAMETER)) {                                                         \
        op##_args args = {PARAMETERS(FD_VALUE, FD_VALUE)};                                                             \
        return op##_good(&args) ? run_##op(&args) : FD_BAD_ARGUMENT;                                                   \
    }
/* fd_<name>_drawn. The kernel draws the words itself, unless rows end inside a word: two threads could then write the
 * same word, so the words are drawn before. Work that is split by cells is split at whole blocks. */
#define FD_DRAWING_OP(op, PARAMETERS)                                                                                  \
    FD_OP(op, PARAMETERS)                                                                                              \
    int fd_##op##_drawn(DRAW_PARAMETERS(FD_PARAMETER, FD_NEXT_PARAMETER)                                               \
                            PARAMETERS(FD_NEXT_PARAMETER, FD_NEXT_PARAMETER)) {                                        \
        op##_args args = {PARAMETERS(FD_VALUE, FD_VALUE)};                                                             \
        draw_bits_args draw = {.words = (void *)words, .n = rows * columns, DRAW_PARAMETERS(FD_VALUE, FD_VALUE)};      \
        if (!op##_good(&args) || !draw_bits_good(&draw)) return FD_BAD_ARGUMENT;                                       \
        const work_t work = op##_work(&args);                                                                          \
        if (work.cells > 1 && work.cells % 32)                                                                         \
            run_draw_bits(&draw);                                                                                      \
        else                                                                                                           \
            args.draw = &draw;                                                                                         \
        return run_##op(&args);                                                                                        \
    }
#include "ops.def"
#undef FD_OP

void fd_philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    philox4x32_10(counter, key, out);
}

int fd_scale_float32(const void *x, void *y, uint64_t n, float a, int how) {
    const uint64_t threads = (uint64_t)fd_get_num_threads();
    const scale_args args = {x, y, a, how, n, (n + threads - 1) / threads};
    if (!x || !y || how < FD_MEMCPY || how > FD_INTERLEAVED) return FD_BAD_ARGUMENT;
    const fd_kernel kernel = isas[fd_isa_active()].table->scale_float32;
    if (how == FD_MEMCPY)
        fd_parallel_for(kernel, &args, 0, threads, args.part);
    else
        fd_parallel_for(kernel, &args, 0, n, 1);
    return FD_OK;
}
